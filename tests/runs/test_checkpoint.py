"""Checkpoints: what is saved comes back bit by bit, or is refused with a sentence; a crash never costs an older one."""

from __future__ import annotations

import errno
import json
import math
import os
import pickle
import random
import shutil
import signal
import struct
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rookery.runs import checkpoint
from rookery.runs.checkpoint import CheckpointError, Checkpoints, load, save

GOLDEN = Path(__file__).parent / "golden" / "v1"
DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.bool, torch.complex64),
    *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64),
]


def golden() -> dict[str, Any]:
    """What the golden checkpoint holds. Never changed: a new schema gets its own function and folder beside it."""
    counts = torch.arange(6)
    return {
        "learner": {
            "net": {"0.weight": counts.reshape(2, 3).float() / 8, "0.bias": torch.tensor([-0.0, math.inf])},
            "optimizer": {"step": torch.tensor(7.0), "exp_avg": counts.to(torch.bfloat16) * 0.5},
            "lr": 3e-4,
        },
        "env": {"done": counts % 2 == 0, "pixels": (counts * 40).to(torch.uint8), "t": counts - 3, "none": {}},
        "generator": {"state": counts.to(torch.uint8), "seed": 2**80 + 1},
        "returns": [1, 2.5, None, True, "x", math.nan, -math.inf],
        "empty": torch.zeros(0, 4),
        "../$odd/~key\u03b5": "\u00fc\n",
        "$tensor": {"$float": -0.0},
    }


def same(a: Any, b: Any) -> bool:
    """Equal in type, dtype, shape and every bit; dicts also in their order."""
    if isinstance(a, torch.Tensor):
        if not isinstance(b, torch.Tensor) or a.dtype != b.dtype or a.shape != b.shape:
            return False
        return a.numel() == 0 or bits_of(a).equal(bits_of(b))
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return repr(a) == repr(b)


def bits_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.clone(memory_format=torch.contiguous_format).flatten().view(torch.uint8)


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    """A tensor of any dtype, bits and strides: whole, transposed, sliced or broadcast."""
    dtype, seed = draw(st.sampled_from(DTYPES)), draw(st.integers(0, 2**31))
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    bits = torch.randint(0, 256, (*shape, dtype.itemsize), generator=torch.Generator().manual_seed(seed))
    bits = bits.to(torch.uint8)
    whole = (bits % 2).view(dtype).squeeze(-1) if dtype is torch.bool else bits.view(dtype).squeeze(-1)
    kind = draw(st.sampled_from(["whole", "transposed", "sliced", "broadcast"]))
    if kind == "transposed":
        return whole.permute(tuple(reversed(range(whole.ndim))))
    if kind == "sliced" and whole.ndim:
        return whole[::2]
    return whole.expand(2, *whole.shape) if kind == "broadcast" else whole


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
keys = st.text(st.characters(exclude_categories=["Cs"])) | st.sampled_from(["$tensor", "$float", "$$", "__metadata__"])
states = st.dictionaries(
    keys,
    st.recursive(
        scalars | tensors() | st.lists(scalars, max_size=4), lambda leaf: st.dictionaries(keys, leaf, max_size=4)
    ),
    max_size=4,
)


@given(states)
@settings(max_examples=30, deadline=None)
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, state: dict[str, Any]) -> None:
    folder = tmp_path_factory.mktemp("round") / "checkpoint"
    save(folder, state)
    assert same(load(folder), state)
    assert sorted(path.name for path in folder.parent.rglob("*")) == ["checkpoint", "state.json", "tensors.safetensors"]


def test_tensors_that_share_memory_come_back_as_two(tmp_path: Path) -> None:
    flat = torch.arange(10.0)
    state = {"flat": flat, "again": flat, "head": flat[:3], "tail": flat[3:], "grad": torch.nn.Parameter(flat[2:4])}
    save(tmp_path / "c", state)
    back = load(tmp_path / "c")
    assert all(back[name].equal(state[name]) for name in state)
    back["flat"].zero_()
    assert back["again"].equal(flat)
    assert not back["grad"].requires_grad


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"a": {"b": (1, 2)}}, "tuple at /a/b"),
        ({"a": [[1]]}, "list at /a/0"),
        ({"a": object()}, "object at /a"),
        ({3: 1}, "key 3 at the top"),
        ({"\ud800": 1}, "Unicode"),
        ({"a": torch.zeros(2).to_sparse()}, "dense"),
        ({"a": torch.zeros(2, dtype=torch.complex128)}, "complex128"),
        ([1], "is a list"),
    ],
)
def test_what_cannot_be_saved_is_refused_before_anything_is_written(tmp_path: Path, state: Any, words: str) -> None:
    with pytest.raises(TypeError, match=words):
        save(tmp_path / "c", state)
    assert not list(tmp_path.iterdir())


def test_nesting_is_limited(tmp_path: Path) -> None:
    state: dict[str, Any] = {"x": 1}
    for _ in range(checkpoint.DEPTH - 1):
        state = {"x": state}
    save(tmp_path / "c", state)
    assert same(load(tmp_path / "c"), state)
    with pytest.raises(TypeError, match="nested deeper"):
        save(tmp_path / "d", {"x": state})


def test_golden_checkpoint_of_schema_1_still_loads() -> None:
    assert same(load(GOLDEN), golden())


def test_every_older_schema_has_a_migration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(checkpoint.MIGRATIONS) == set(range(1, checkpoint.SCHEMA))
    save(tmp_path / "c", {"old": torch.ones(1)})
    steps = {checkpoint.SCHEMA: lambda state: {"new": state["old"]}, checkpoint.SCHEMA + 1: lambda s: s | {"added": 0}}
    monkeypatch.setattr(checkpoint, "SCHEMA", checkpoint.SCHEMA + 2)
    monkeypatch.setattr(checkpoint, "MIGRATIONS", checkpoint.MIGRATIONS | steps)
    assert same(load(tmp_path / "c"), {"new": torch.ones(1), "added": 0})


def test_a_newer_schema_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "SCHEMA", 2)
    save(tmp_path / "c", {})
    monkeypatch.setattr(checkpoint, "SCHEMA", 1)
    with pytest.raises(CheckpointError, match=r"schema 2 .* upgrade Rookery"):
        load(tmp_path / "c")


def test_any_flipped_bit_is_refused_or_harmless(tmp_path: Path) -> None:
    """A flip that loads at all (within a `\\u00fc`, say, its letter's case) must give the very same state."""
    rng, harmless, sentences = random.Random(0), 0, []
    for name in ("state.json", "tensors.safetensors"):
        data = (GOLDEN / name).read_bytes()
        for place in range(len(data)) if name == "state.json" else rng.sample(range(len(data)), 200):
            folder = tmp_path / f"{name}{place}"
            shutil.copytree(GOLDEN, folder)
            flipped = bytearray(data)
            flipped[place] ^= 1 << rng.randrange(8)
            (folder / name).write_bytes(flipped)
            try:
                assert same(load(folder), golden()), f"byte {place} of {name}"
                harmless += 1
            except CheckpointError as error:
                sentences.append(str(error))
            shutil.rmtree(folder)
    assert harmless < 5
    assert not [sentence for sentence in sentences if "\n" in sentence]


@pytest.mark.parametrize("name", ["state.json", "tensors.safetensors"])
def test_missing_or_cut_files_are_refused(tmp_path: Path, name: str) -> None:
    for keep in (None, 0, 1, 8, 9, 100, -1):
        folder = tmp_path / f"c{keep}"
        shutil.copytree(GOLDEN, folder)
        data = (folder / name).read_bytes()
        (folder / name).unlink()
        if keep is not None:
            (folder / name).write_bytes(data[:keep])
        with pytest.raises(CheckpointError, match="is damaged"):
            load(folder)
    with pytest.raises(CheckpointError, match="missing"):
        load(tmp_path / "nowhere")


class Bomb:
    """Unpickling it makes a folder."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.target),)


def test_a_renamed_pickle_is_refused_and_not_run(tmp_path: Path) -> None:
    evil, target = tmp_path / "evil", tmp_path / "executed"
    save(evil, {"x": torch.ones(1)})
    for name in ("state.json", "tensors.safetensors"):
        good = (evil / name).read_bytes()
        (evil / name).write_bytes(pickle.dumps(Bomb(target)))
        resign(evil)
        with pytest.raises(CheckpointError):
            load(evil)
        torch.save(Bomb(target), evil / name)
        resign(evil)
        with pytest.raises(CheckpointError):
            load(evil)
        (evil / name).write_bytes(good)
    assert not target.exists()
    with pytest.raises(FileNotFoundError):
        target.rmdir()
    pickle.loads(pickle.dumps(Bomb(target)))
    assert target.exists(), "the bomb is a dud, so this test shows nothing"


def resign(folder: Path, **changes: Any) -> None:
    """Make every checksum right again, as whoever wants to do harm would."""
    try:
        document = json.loads((folder / "state.json").read_bytes())
    except ValueError:
        return
    document.pop("checksum")
    document |= {"tensors": checkpoint._sha256(folder / "tensors.safetensors"), **changes}
    document["checksum"] = checkpoint._checksum(document)
    (folder / "state.json").write_text(json.dumps(document))


@pytest.mark.parametrize(
    "state",
    [
        {"x": {"$tensor": "/y"}},
        {"x": {"$tensor": ["/x"]}},
        {"x": {"$tensor": "/x"}, "y": {"$tensor": "/x"}},
        {"x": {"$float": "1e3"}},
        {"x": {"$object": "os.system"}},
        {"x": [{"$tensor": "/x"}]},
        {"x": [[1]]},
        {"x": 1},
        {"$tensor": "/x"},
        [],
        None,
    ],
)
def test_a_state_that_lies_is_refused_even_if_it_is_signed(tmp_path: Path, state: Any) -> None:
    save(tmp_path / "c", {"x": torch.ones(1)})
    resign(tmp_path / "c", state=state)
    with pytest.raises(CheckpointError, match="is damaged"):
        load(tmp_path / "c")


@pytest.mark.parametrize("changes", [{"schema": 0}, {"schema": True}, {"schema": "1"}, {"score": "x"}, {"more": 1}])
def test_a_document_that_lies_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    save(tmp_path / "c", {})
    resign(tmp_path / "c", **changes)
    with pytest.raises(CheckpointError, match="is damaged"):
        load(tmp_path / "c")


@pytest.mark.parametrize("text", ["[" * 500_000, '{"a":' * 500_000, "9" * 5000, "NaN", "\x00", '{"schema":1e999}', ""])
def test_absurd_json_is_refused(tmp_path: Path, text: str) -> None:
    save(tmp_path / "c", {})
    (tmp_path / "c" / "state.json").write_text(text)
    with pytest.raises(CheckpointError):
        load(tmp_path / "c")


def test_json_of_absurd_size_is_refused_unread(tmp_path: Path) -> None:
    save(tmp_path / "c", {})
    with (tmp_path / "c" / "state.json").open("r+b") as file:
        file.truncate(2**40)  # sparse: 1 TiB that takes no space
    with pytest.raises(CheckpointError, match="larger than"):
        load(tmp_path / "c")


@pytest.mark.parametrize(
    "header",
    [
        {"/x": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 4]}},
        {"/x": {"dtype": "F32", "shape": [2**63, 0], "data_offsets": [0, 0]}},
        {"/x": {"dtype": "F32", "shape": [1], "data_offsets": [2**40, 2**40 + 4]}},
        {"/x": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}},
        {"/x": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}},
        {"/x": {"dtype": "PICKLE", "shape": [1], "data_offsets": [0, 4]}},
        {"/x": {"dtype": "F64", "shape": [1], "data_offsets": [0, 4]}},
        {"/x": 3},
        [],
    ],
)
def test_a_tensor_file_whose_header_lies_is_refused(tmp_path: Path, header: Any) -> None:
    save(tmp_path / "c", {"x": torch.ones(1)})
    text = json.dumps(header).encode()
    for length in (len(text), 2**62, 0):
        (tmp_path / "c" / "tensors.safetensors").write_bytes(struct.pack("<Q", length) + text + bytes(4))
        resign(tmp_path / "c")
        with pytest.raises(CheckpointError, match="is damaged"):
            load(tmp_path / "c")


def test_keys_never_become_paths(tmp_path: Path) -> None:
    inner = tmp_path / "a" / "b"
    save(inner, {"../../escaped": torch.ones(1), "/absolute": {"..": torch.ones(2)}})
    load(inner)
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == [
        *("a", "a/b", "a/b/state.json", "a/b/tensors.safetensors")
    ]


@pytest.mark.parametrize("calls", range(5))
def test_a_full_disk_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: int) -> None:
    """Every sync of a save in turn fails: both files, the folder, and the parent after the rename."""
    save(tmp_path / "c", {"x": 1})
    left, fsync = [calls], os.fsync

    def full(descriptor: int) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    if calls < 4:
        with pytest.raises(CheckpointError, match="No space left on device"):
            save(tmp_path / "c", {"x": 2})
    else:
        save(tmp_path / "c", {"x": 2})
    assert load(tmp_path / "c") == {"x": 1 if calls < 3 else 2}
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".tmp-")]


def test_a_full_disk_is_given_the_older_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The newest that can be read, and the best, stay."""
    checkpoints = Checkpoints(tmp_path, keep_last=4)
    for step in (1, 2, 3, 4):
        checkpoints.save(step, {"n": step}, score=-float(step % 2))
    (checkpoints.path(4) / "state.json").write_text("{")
    save_file = checkpoint.save_file

    def full(tensors: Any, file: Path) -> None:
        if len(checkpoints.steps()) > 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save_file(tensors, file)

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.warns(RuntimeWarning, match="is damaged"):
        checkpoints.save(5, {"n": 5})
    assert checkpoints.steps() == [2, 3, 5]
    assert checkpoints.latest() == (5, {"n": 5})
    assert checkpoints.best() == (2, {"n": 2})


def test_a_first_checkpoint_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(tensors: Any, file: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(CheckpointError, match=r"No space left on device; .* Nothing is saved yet\.$"):
        Checkpoints(tmp_path).save(0, {})


FILL = """
import resource, sys
from pathlib import Path
import torch
from rookery.runs.checkpoint import CheckpointError, Checkpoints

checkpoints = Checkpoints(Path(sys.argv[1]))
checkpoints.save(1, {"x": torch.ones(1000)})
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # longer writes fail as they do on a full disk
try:
    checkpoints.save(2, {"x": torch.ones(1_000_000)})
except CheckpointError as error:
    print(error)
"""


def test_a_write_that_really_fails(tmp_path: Path) -> None:
    result = subprocess.run([sys.executable, "-c", FILL, str(tmp_path)], capture_output=True, text=True, check=True)
    assert "could not be written: " in result.stdout
    assert "File too large" in result.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000000000001", "index.json"]
    assert Checkpoints(tmp_path).latest()[0] == 1


def test_an_unwritable_place_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"file.c could not be written"):
        save(tmp_path / "file" / "c", {})


LOOP = """
import sys
from pathlib import Path
import torch
from rookery.runs.checkpoint import Checkpoints

checkpoints = Checkpoints(Path(sys.argv[1]), keep_last=2)
step = int(sys.argv[2])
while True:
    for at in (step, step):  # the second replaces the first
        checkpoints.save(at, {"step": at, "x": torch.full((20_000,), float(at))}, score=float(at % 7))
        print(at, flush=True)
    step += 1
"""


def test_sigkill_at_any_moment_leaves_a_latest_that_loads(tmp_path: Path) -> None:
    rng, done = random.Random(1), 0
    for _ in range(4):
        command = [sys.executable, "-c", LOOP, str(tmp_path), str(done + 1)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            done = int(process.stdout.readline())
            time.sleep(rng.random() * 0.1)
            process.send_signal(signal.SIGKILL)
            done = max([done, *(int(line) for line in process.stdout if line.endswith("\n"))])
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # nothing half written is even considered
            step, state = Checkpoints(tmp_path).latest()
            Checkpoints(tmp_path).best()
        assert step in (done, done + 1)
        assert same(state, {"step": step, "x": torch.full((20_000,), float(step))})


def test_last_k_and_best_are_kept(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep_last=2)
    for step, score in enumerate([1.0, 9.0, None, 9.0, math.nan, 2.0, 3.0]):
        path = checkpoints.save(step * 100, {"n": step}, score)
        assert path.name == f"{step * 100:012d}"
    assert checkpoints.steps() == [300, 500, 600]
    assert checkpoints.latest() == (600, {"n": 6})
    assert checkpoints.best() == (300, {"n": 3})
    assert len(list(checkpoints.folder.iterdir())) == 4


@pytest.mark.parametrize("index", [None, "{", "[]", '{"scores": 3}', '{"scores": {"x": 1}}', '{"scores": {"100": []}}'])
def test_a_lost_index_is_rebuilt(tmp_path: Path, index: str | None) -> None:
    checkpoints = Checkpoints(tmp_path, keep_last=1)
    checkpoints.save(100, {"n": 1}, 5.0)
    checkpoints.save(200, {"n": 2}, 4.0)
    (tmp_path / "index.json").unlink()
    if index is not None:
        (tmp_path / "index.json").write_text(index)
    assert checkpoints.best() == (100, {"n": 1})
    checkpoints.save(300, {"n": 3}, 3.0)
    assert checkpoints.steps() == [100, 300]
    assert json.loads((tmp_path / "index.json").read_text()) == {"scores": {"100": 5.0, "300": 3.0}}


def test_damaged_checkpoints_are_skipped_by_name(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2, 3):
        checkpoints.save(step, {"n": step}, float(step))
    (checkpoints.path(3) / "state.json").write_text("{}")
    shutil.rmtree(checkpoints.path(2))
    with pytest.warns(RuntimeWarning, match="000000000003 is damaged"):
        assert checkpoints.latest() == (1, {"n": 1})
    with pytest.warns(RuntimeWarning, match="000000000003 is damaged"):
        assert checkpoints.best() == (1, {"n": 1})
    (checkpoints.path(1) / "state.json").unlink()
    with pytest.warns(RuntimeWarning), pytest.raises(CheckpointError, match="no readable checkpoint"):
        checkpoints.latest()


def test_no_checkpoints(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "none")
    assert checkpoints.steps() == []
    for call in (checkpoints.latest, checkpoints.best):
        with pytest.raises(CheckpointError, match="no readable checkpoint"):
            call()
    assert not checkpoints.folder.exists()
    with pytest.raises(ValueError, match="keep_last=0"):
        Checkpoints(tmp_path, keep_last=0)
    with pytest.raises(ValueError, match="step=-1"):
        checkpoints.save(-1, {})


def test_a_replacement_killed_between_its_renames_is_found(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(5, {"n": 5}, 1.0)
    checkpoints.path(5).rename(tmp_path / ".old-000000000005")
    (tmp_path / ".tmp-000000000005-1").mkdir()
    assert checkpoints.latest() == checkpoints.best() == (5, {"n": 5})
    checkpoints.save(5, {"n": 6})
    assert checkpoints.latest() == (5, {"n": 6})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000000000005", "index.json"]
