"""The command line as a user types it: what it prints, and what status it ends with."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import rookery
from rookery import cli
from rookery.runs.folder import RunFolderError
from rookery.settings import Options

ROOT = Path(rookery.__file__).resolve().parents[1]
FLAGS = {"steps": 64, "envs": 4, "unroll": 4, "hidden": 8, "eval-episodes": 2, "eval-every": 32}
TINY = [str(word) for name, value in FLAGS.items() for word in (f"--{name}", value)]


class Said(NamedTuple):
    status: int
    out: str
    err: str


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Any:
    """Run the command line in this process."""

    def run(*words: Any) -> Said:
        capsys.readouterr()
        status = 0
        try:
            cli.main([str(word) for word in words])
        except SystemExit as leaving:
            status = int(leaving.code or 0)  # a sentence as the code would be a status of 1 that nobody chose
        return Said(status, *capsys.readouterr())

    return run


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two runs on a tensor environment and one on EnvPool's or Gymnasium's."""
    folder = tmp_path_factory.mktemp("runs")
    for seed in (0, 1):
        cli.main(
            ["train", "ppo", "tensor:CartPole-v1", *TINY, "--seed", str(seed), "--run-dir", str(folder / f"{seed}")]
        )
    cli.main(["train", "a2c", "CartPole-v1", *TINY, "--run-dir", str(folder / "pool"), "--quiet"])
    return [folder / "0", folder / "1", folder / "pool"]


def refused(said: Said, status: int = 2) -> str:
    """The one line that says what was wrong."""
    assert said.status == status, said
    assert said.err.startswith("rookery: ")
    assert said.err.count("\n") == 1
    assert "Traceback" not in said.err
    return said.err


def unboxed(help: str) -> str:
    """What --help says without the sides of its boxes."""
    return help.replace("│", "")


# What works


def test_train_says_where_everything_is(say: Any, tmp_path: Path) -> None:
    said = say("train", "ppo", "tensor:CartPole-v1", *TINY, "--run-dir", tmp_path / "run")
    assert said.status == 0
    assert "ppo on tensor:CartPole-v1: evaluation " in said.out
    assert re.search(r"^limit       \w+: ", said.out, re.MULTILINE)
    for what, pattern in {"curve": "plots/*.png", "video": "video/*", "checkpoint": "checkpoints/0*"}.items():
        line = next(line for line in said.out.splitlines() if line.startswith(what))
        assert Path(line.split(maxsplit=1)[1]) in list((tmp_path / "run").glob(pattern))
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["options"]["steps"] == 64
    assert config["algorithm"]["hidden"] == [8]


def test_the_recipe_is_where_flags_begin(say: Any) -> None:
    from rookery.systems import recipe

    tuned = recipe("ppo", "CartPole-v1")
    assert tuned["lr"] != rookery.PPO().lr
    said = say("train", "ppo", "CartPole-v1", "--help")
    assert said.status == 0
    assert f"(default: {tuned['lr']}" in said.out.replace("│", "")
    assert "clipped" in said.out or "ε" in said.out
    plain = say("train", "ppo", "CartPole-v1", "--no-recipe", "--help")
    assert f"(default: {rookery.PPO().lr}" in plain.out.replace("│", "")
    assert say("train", "ppo", "CartPole-v1", "--no_recipe", "--help").out == plain.out


def test_resume(say: Any, trained: list[Path], tmp_path: Path) -> None:
    path = rookery.load(trained[0]).save(tmp_path / "run")
    said = say("resume", path, "--steps", 128, "--quiet")
    assert said.status == 0
    assert json.loads((path / "summary.json").read_text())["steps"] >= 128
    assert "evaluation" in said.out
    wrong = refused(say("resume", path, "--steps", 96))
    assert "steps=96: " in wrong
    assert " of 128 already; use more, or leave it out." in wrong
    assert json.loads((path / "config.json").read_text())["options"]["steps"] == 128


def test_eval(say: Any, trained: list[Path]) -> None:
    said = say("eval", trained[0], "--episodes", 3, "--json")
    found = json.loads(said.out)
    assert said.status == 0
    assert found["eval_episodes"] == 3 == len(found["returns"]) == len(found["lengths"])
    assert found["eval_return_mean"] == pytest.approx(sum(found["returns"]) / 3)
    again = json.loads(say("eval", trained[0], "--episodes", 3, "--json").out)
    assert again == found
    plain = say("eval", trained[0], "--episodes", 3, "--which", "best").out
    assert plain.startswith("return ")
    assert plain.endswith(" over 3 episodes\n")


def test_plot(say: Any, trained: list[Path], tmp_path: Path) -> None:
    one = say("plot", trained[0])
    assert one.out.splitlines() == [str(trained[0] / "plots" / name) for name in ("learning_curve.png", "topology.png")]
    assert all(Path(line).is_file() for line in one.out.splitlines())
    several = say("plot", *trained[:2], "--out", tmp_path / "both.png")
    assert several.status == 0
    assert Path(several.out.strip()) == tmp_path / "both.png"
    assert (tmp_path / "both.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("flags", [[], ["--once"]])
def test_watch_a_run_that_is_over(flags: list[str], say: Any, trained: list[Path]) -> None:
    said = say("watch", trained[0], *flags)
    assert said.status == 0
    assert re.match(r"ppo on tensor:CartPole-v1, seed 0\nover  \d+/64 steps  return ", said.out)
    for shown in ("actor 0  busy", "learner 0  busy", "actor 0 → ", "unrolls/s", "\nlimit: "):
        assert shown in said.out


@pytest.mark.parametrize("index", [0, 2], ids=["tensor", "other backend"])
def test_video(index: int, say: Any, trained: list[Path]) -> None:
    said = say("video", trained[index], "--steps", 20)
    assert said.status == 0
    path = Path(said.out.strip())
    assert path.parent == trained[index] / "video"
    assert path.stat().st_size > 500


def test_list(say: Any) -> None:
    systems = say("list", "systems").out.splitlines()
    assert [line.split()[0] for line in systems] == list(rookery.SYSTEMS)
    for line, system in zip(systems, rookery.SYSTEMS.values(), strict=True):
        assert line.index(system.topology, len(system.name)) == max(map(len, rookery.SYSTEMS)) + 1
    envs = say("list", "envs").out.split()
    assert {"tensor:CartPole-v1", "gym:CartPole-v1"} <= set(envs)
    assert len(envs) == len(set(envs))


def test_check_env(say: Any) -> None:
    said = say("check-env", "tensor:Catch-v0")
    assert said.status == 0
    assert said.out.strip()


@pytest.mark.parametrize("words", [[], ["help"], ["--help"], ["-h"]])
def test_help_names_every_verb(words: list[str], say: Any) -> None:
    said = say(*words)
    assert said.status == 0
    for verb in cli.VERBS:
        assert verb in said.out


@pytest.mark.parametrize("flag", ["-h", "--help"])
@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_verb_has_help(verb: str, flag: str, say: Any) -> None:
    said = say(verb, flag)
    assert (said.status, said.err) == (0, "")
    assert said.out.startswith(f"usage: rookery {verb}")


@pytest.mark.parametrize(
    ("words", "kinds"),
    {
        "resume": [cli.Resume],
        "eval": [cli.Eval],
        "video": [cli.Video],
        "watch": [cli.Watch],
        "plot": [cli.Plot],
        "train ppo CartPole-v1": [Options, cli.Display],
    }.items(),
)
def test_every_flag_has_help(words: str, kinds: list[type], say: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comment beside the field, which no field may lack."""
    monkeypatch.setenv("COLUMNS", "110")
    said = say(*words.split(), "--help")
    shown = " ".join(unboxed(said.out).split())
    for kind in kinds:
        source = inspect.getsource(kind)
        helped = dict(re.findall(r"^    (\w+): .*  # (.*)$", source, re.MULTILINE))
        assert list(helped) == [field.name for field in dataclasses.fields(kind)]
        for name, help in helped.items():
            assert help in shown, name


def test_train_help_without_a_system_names_them_all(say: Any) -> None:
    said = say("train", "--help").out
    assert all(re.search(rf"\b{system}\b", said) for system in rookery.SYSTEMS)
    assert max(map(len, said.splitlines())) <= 120
    for example in re.findall(r"^  rookery (train .*?)(?:  .*)?$", said, re.MULTILINE):
        words = example.split()
        assert words[0] == "train"
        assert words[1] in rookery.SYSTEMS or words[1].startswith("my_module:")


def test_train_help_has_a_title_for_each_group(say: Any) -> None:
    tuned, plain = (unboxed(say("train", "ppo", *env, "--help").out) for env in (["CartPole-v1"], []))
    for shown in (tuned, plain):
        titles = re.findall(r"(\w+ options)\b", shown)
        assert titles == ["run options", "ppo options", "display options"]
        assert "range of the probability ratio" in shown  # the comment beside the field
    assert plain.startswith("usage: rookery train ppo ENV ")
    assert f"(default: {rookery.PPO().lr})" in plain
    assert f"(default: {rookery.PPO().lr})" not in tuned


# What was asked wrongly: one sentence, status 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("trian ppo CartPole-v1", "no verb 'trian'; did you mean train?"),
        ("train", "train takes a system and an environment, such as `rookery train ppo CartPole-v1`"),
        ("train ppo --steps 5", "train takes a system and an environment"),
        ("train pppo CartPole-v1", "no system 'pppo'; nearest: ppo"),
        ("train ppo CartPoel-v1", "no backend has an environment 'CartPoel-v1'; nearest: CartPole"),
        ("train ppo tensor:CartPoel-v1", "the nearest are CartPole-v1"),
        ("train ppo tensor:CartPole-v1 --minibatches 7", "minibatches=7 does not divide the"),
        ("train ppo tensor:CartPole-v1 --env-options gravity=3", "CartPole-v1 has no option 'gravity'"),
        ("train ppo tensor:CartPole-v1 --stepz 3", "stepz: no setting of ppo; nearest: steps"),
        ("train dqn CartPole-v1 --memory lstm", "memory: no setting of dqn, but of ppo, a2c"),
        ("train dqn tensor:Pendulum-v1 --steps 512", "chooses among a fixed number of actions"),
        ("list", "say `rookery list systems` or `rookery list envs`"),
        ("list runs", "say `rookery list systems` or `rookery list envs`"),
        ("plot", "plot takes one run folder or several"),
        ("check-env", "check-env takes one environment"),
        ("check-env CartPoel-v1", "no backend has an environment 'CartPoel-v1'"),
    ],
)
def test_a_mistake_is_one_sentence(
    words: str, message: str, say: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in refused(say(*words.split()))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            "--lr fast",
            "rookery: --lr: 'fast' is not a number. `rookery train ppo tensor:CartPole-v1 --help` says more.",
        ),
        ("--envs 3.5", "rookery: --envs: '3.5' is not a whole number. "),
        ("--threads 1.5", "rookery: --threads: '1.5' is not a whole number. "),
        ("--max-grad-norm wide", "rookery: --max-grad-norm: 'wide' is not a number. "),
        ("--envs", "rookery: Missing value for argument '--envs'. "),
        ("--memory lstmm", "rookery: invalid choice 'lstmm' for argument '--memory'. Expected one of ('none', "),
        ("--steps 0", "rookery: steps=0 is too small; use 1 or more. `rookery train"),
        ("--epochs 2 3", "rookery: Unrecognized options: 3. "),
    ],
)
def test_a_wrong_value_is_refused(flags: str, message: str, say: Any) -> None:
    """By the parser, which would put a frame around it."""
    assert message in refused(say("train", "ppo", "tensor:CartPole-v1", *flags.split()))


OWN = """
from dataclasses import dataclass
from torch import nn
from rookery import PPO

@dataclass(frozen=True)
class Doubled(PPO):
    factor: float = 2.0

    def loss(self, net, target, batch, now):
        found = super().loss(net, target, batch, now)
        return found._replace(loss=self.factor * found.loss)

def part(spec):
    return nn.Linear(spec.obs_space.shape[0], 5)
"""


def test_an_algorithm_and_a_network_of_your_own(say: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No run folder says which code is to be run: who goes on with it does."""
    (tmp_path / "own_module.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    path = tmp_path / "run"
    means = ["--factor", "3", "--network", "own_module:part", "--run-dir", path, "--quiet"]
    assert say("train", "own_module:Doubled", "tensor:CartPole-v1", *TINY, *means).status == 0
    config = json.loads((path / "config.json").read_text())
    assert (config["system"], config["algorithm"]["factor"], config["network"]) == ("doubled", 3.0, "part")
    assert (
        "own network; load(path, network=...) needs it again (on the command line: --network module:Name)"
        in refused(say("eval", path))
    )
    assert "on the command line: --algorithm module:Name" in refused(say("eval", path, "--network", "own_module:part"))
    own = ["--network", "own_module:part", "--algorithm", "own_module:Doubled"]
    assert "over 20 episodes" in say("eval", path, *own).out
    assert say("resume", path, "--steps", "200", "--quiet", *own).status == 0
    assert rookery.load(path, network="own_module:part", algorithm="own_module:Doubled").algorithm.factor == 3.0  # type: ignore[attr-defined]
    for words, message in (
        (["train", "own_module:Trebled", "CartPole-v1"], "the module 'own_module' has no 'Trebled'"),
        (["train", "own_module:part", "CartPole-v1"], "own_module:part is no class of an algorithm"),
        (["eval", path, "--algorithm", "nowhere:X", *own[:2]], "the module 'nowhere' cannot be imported"),
    ):
        assert message in refused(say(*words))


@pytest.mark.parametrize("steps", ["1e2", "--steps=1e2", "1E+2"])
def test_large_numbers_may_be_written_short(steps: str, say: Any, tmp_path: Path) -> None:
    words = [steps] if "=" in steps else ["--steps", steps]
    tiny = [word for word in TINY if word != TINY[TINY.index("--steps") + 1] and word != "--steps"]
    assert (
        say("train", "ppo", "tensor:CartPole-v1", *tiny, *words, "--quiet", "--run-dir", tmp_path / "run").status == 0
    )
    assert rookery.load(tmp_path / "run").config["options"]["steps"] == 100


def test_success_is_said_where_there_are_goals(say: Any, tmp_path: Path) -> None:
    few = {"steps": 300, "envs": 2, "learning-starts": 50, "eval-episodes": 2, "hidden": 8}
    words = [str(word) for name, value in few.items() for word in (f"--{name}", value)]
    said = say("train", "dqn", "tensor:BitFlip-v0", *words, "--quiet", "--run-dir", tmp_path / "run")
    assert re.search(r"over 2 episodes, success \d+%, 300 steps", said.out), said.out + said.err
    assert re.search(r"over 20 episodes, success \d+%", say("eval", tmp_path / "run").out)


@pytest.mark.parametrize("episodes", [0, -3])
def test_no_episodes(episodes: int, say: Any, trained: list[Path]) -> None:
    said = refused(say("eval", trained[0], "--episodes", episodes))
    assert f"episodes={episodes} plays nothing; use 1 or more." in said


# What went wrong: one sentence, status 1


@pytest.mark.parametrize("verb", ["eval", "resume", "video", "watch", "plot"])
def test_no_run_there(verb: str, say: Any, tmp_path: Path) -> None:
    assert str(tmp_path) in refused(say(verb, tmp_path), 1)
    assert "nowhere" in refused(say(verb, tmp_path / "nowhere"), 1)


def test_a_folder_that_holds_a_run(say: Any, trained: list[Path]) -> None:
    said = say("train", "ppo", "tensor:CartPole-v1", *TINY, "--run-dir", trained[0])
    assert f"already holds a run; continue it with `rookery resume {trained[0]}`" in refused(said, 1)


@pytest.mark.parametrize("damage", ["flipped", "cut", "gone", "pickle"])
@pytest.mark.filterwarnings("ignore:Checkpoint")
def test_a_damaged_or_hostile_checkpoint(damage: str, say: Any, trained: list[Path], tmp_path: Path) -> None:
    path = rookery.load(trained[0]).save(tmp_path / "run")
    [folder] = (path / "checkpoints").glob("0*")
    tensors, state = folder / "tensors.safetensors", folder / "state.json"
    if damage == "flipped":
        data = bytearray(tensors.read_bytes())
        data[-3] ^= 4
        tensors.write_bytes(data)
    elif damage == "cut":
        state.write_bytes(state.read_bytes()[:-9])
    elif damage == "gone":
        state.unlink()
    else:
        # Unpickling this would make the file; nothing here unpickles.
        evil = f"cposix\nsystem\n(S'touch {tmp_path / 'owned'}'\ntR.".encode()
        tensors.write_bytes(evil)
        state.write_bytes(evil)
    assert "no readable checkpoint" in refused(say("eval", path, "--episodes", 2), 1)
    assert not (tmp_path / "owned").exists()


def test_a_config_that_was_tampered_with(say: Any, trained: list[Path], tmp_path: Path) -> None:
    path = rookery.load(trained[0]).save(tmp_path / "run")
    config = json.loads((path / "config.json").read_text())
    config["options"]["stepps"] = 3
    (path / "config.json").write_text(json.dumps(config))
    assert "stepps: no setting of Options; nearest: steps" in refused(say("eval", path), 1)


def test_traceback_is_there_for_who_wants_it(say: Any, tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="holds no run"):
        say("eval", tmp_path, "--traceback")


FAULTY = """
import gymnasium, numpy as np
from gymnasium import spaces
class Faulty(gymnasium.Env):
    observation_space, action_space = spaces.Box(-1, 1, (2,), np.float32), spaces.Discrete(2)
    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(2, np.float32), {}
    def step(self, action):
        raise ZeroDivisionError("the wheel came off")
gymnasium.register("Faulty-v0", Faulty)
"""


def test_an_environment_that_fails(say: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "faulty_module.py").write_text(FAULTY)
    monkeypatch.syspath_prepend(tmp_path)
    said = say("train", "ppo", "faulty_module:Faulty-v0", *TINY, "--run-dir", tmp_path / "run", "--quiet")
    line = refused(said, 1)
    assert "actor 0 failed: Faulty-v0, lane 0, step 1: raised ZeroDivisionError: the wheel came off" in line
    assert "--traceback shows where" in line


def test_sigterm_has_its_own_status(say: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rookery.train import Keeper

    between = Keeper.between

    def terminated(keeper: Keeper, *arguments: Any) -> bool:
        os.kill(os.getpid(), signal.SIGTERM)
        return between(keeper, *arguments)

    monkeypatch.setattr(Keeper, "between", terminated)
    said = say("train", "ppo", "tensor:CartPole-v1", *TINY, "--run-dir", tmp_path / "run")
    assert said.status == 143
    assert f"Go on with: rookery resume {tmp_path / 'run'}" in said.out


# In a process of its own


def start(*words: Any) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "rookery.cli", *map(str, words)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def test_ctrl_c_says_how_to_go_on(tmp_path: Path) -> None:
    path = tmp_path / "run"
    process = start("train", "ppo", "tensor:CartPole-v1", *TINY[2:], "--steps", 1_000_000, "--run-dir", path, "--quiet")
    try:
        deadline = time.monotonic() + 60
        while not list(path.glob("checkpoints/0*/state.json")):
            assert time.monotonic() < deadline
            assert process.poll() is None, process.communicate()
            time.sleep(0.02)
        watched = start("watch", path).communicate(timeout=60)[0]  # from the folder alone, while the run goes on
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert re.match(r"ppo on tensor:CartPole-v1, seed 0\n[\d,]+/1,000,000 steps", watched)
    assert process.returncode == 130, (out, err)
    assert f"Go on with: rookery resume {path}" in out
    steps = json.loads((path / "summary.json").read_text())["steps"]
    assert f"Interrupted at step {steps}; the checkpoint is written" in out
    assert rookery.load(path).checkpoints.steps()[-1] == steps


def test_a_closed_pipe_is_no_error() -> None:
    process = start("list", "envs")
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr is not None
    assert "Traceback" not in process.stderr.read()
    process.stderr.close()
    assert process.wait(60) == 0


DEAF = """
import gymnasium, os, signal
def make():
    try:
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(1000): pass
    except BaseException:  # as libraries do while they are imported
        pass
    return gymnasium.make("CartPole-v1")
"""


def test_a_library_that_swallows_ctrl_c_does_not_hinder_the_run_from_ending(tmp_path: Path) -> None:
    (tmp_path / "deaf.py").write_text(DEAF)
    command = [sys.executable, "-m", "rookery.cli", "train", "ppo", "deaf:make", *TINY, "--quiet", "--run-dir", "run"]
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (found.returncode, found.stderr) == (130, "")
    assert not (tmp_path / "run").exists()
