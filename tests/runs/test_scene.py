"""Scenes: roles and words stand as data goes, arrows say what was measured, and nothing is drawn over anything else."""

from __future__ import annotations

import itertools
import time
from pathlib import Path
from typing import Any

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from rookery.runs.flowchart import COLOURS, Box, _placed, plot_topology, shares
from rookery.runs.folder import RunFolder, RunFolderError
from rookery.runs.metrics import MetricsLog
from rookery.runs.scene import Arrow, amount, measured_of, overview, scene

Flow = tuple[str, str, float]


def found(words: dict[str, str], flows: list[Flow], **more: Any) -> dict[str, Any]:
    """An account with these words by kind and flows in units a second; a unit has 1,000 bytes."""
    ends = dict.fromkeys(end for flow in flows for end in flow[:2] if end not in words)
    one = {"busy": 0.6, "environment": 0.3, "inference": 0.2, "transfer": 0.1, "waiting": dict.fromkeys(words, 0.1)}
    return {
        "processes": 5,
        "cores": 2,
        "cores_busy": 1.5,
        "roles": {**{end: {**one, "steps_per_second": 1234.0} for end in ends}, "keeper": {"busy": 0.1}},
        "words": {name: {"kind": kind} for name, kind in words.items()},
        "flows": [
            {"from": source, "to": target, "per_second": rate, "bytes_per_second": rate * 1e3}
            for source, target, rate in flows
        ],
        "restarts": {},
        "dropped": {},
        "bottleneck": {"limit": "learner", "because": "So it is.", "change": "Do this.", "role": "learner"},
        **more,
    }


def actors_learner(actors: int = 2) -> dict[str, Any]:
    flows: list[Flow] = [
        ("learner 0", "weights", 25.0),
        ("weights", "evaluator 0", 25.0),
        ("unrolls", "learner 0", 50.0),
    ]
    flows += [(f"actor {index}", "unrolls", 25.0) for index in range(actors)]
    flows += [("weights", f"actor {index}", 25.0) for index in range(actors)]
    return found({"weights": "weights", "unrolls": "queue"}, flows)


def replicas() -> dict[str, Any]:
    words = {
        "weights": "weights",
        "unrolls_0": "queue",
        "unrolls_1": "queue",
        "parameters": "weights",
        "gradients": "queue",
    }
    flows: list[Flow] = [
        ("learner 0", "weights", 2.0),
        ("learner 0", "parameters", 64.0),
        ("gradients", "learner 0", 128.0),
    ]
    for index in range(2):
        flows += [(f"actor {index}", f"unrolls_{index}", 2.0), ("weights", f"actor {index}", 2.0)]
        flows += [(f"unrolls_{index}", f"replica {index}", 2.0), ("parameters", f"replica {index}", 64.0)]
        flows += [(f"replica {index}", "gradients", 64.0)]
    return found(words, flows)


def replay() -> dict[str, Any]:
    flows: list[Flow] = [
        ("actor × 16", "replay", 2000.0),
        ("replay", "learner 0", 12345.0),
        ("learner 0", "weights", 0.25),
    ]
    flows += [("weights", "actor × 16", 4.0), ("weights", "evaluator 0", 0.2)]
    whole = found({"weights": "weights", "replay": "replay"}, flows)
    whole["words"]["replay"] |= {"fill": 0.123, "samples_per_insert": 8.0}
    return whole


def hogwild() -> dict[str, Any]:
    flows: list[Flow] = [("learner 0", "memory", 0.1), ("learner 0", "weights", 0.1), ("weights", "evaluator 0", 0.1)]
    return found({"memory": "weights", "weights": "weights"}, [*flows, ("memory", "learner 1", 0.1)])


def inference() -> dict[str, Any]:
    flows: list[Flow] = [("actor 0", "calls", 900.0), ("calls", "server 0", 900.0), ("weights", "server 0", 5.0)]
    flows += [("actor 0", "unrolls", 5.0), ("unrolls", "learner 0", 5.0), ("learner 0", "weights", 5.0)]
    return found({"calls": "calls", "unrolls": "queue", "weights": "weights"}, flows)


def shards() -> dict[str, Any]:
    flows: list[Flow] = [("actor 0", "replay", 75.0), ("actor 0", "requests_0", 10.0), ("replay", "learner 0", 75.0)]
    flows += [("learner 0", "requests_0", 70.0), ("requests_0", "shard 0", 80.0), ("learner 0", "weights", 5.0)]
    flows += [("weights", "actor 0", 5.0)]
    return found({"replay": "replay", "requests_0": "calls", "weights": "weights"}, flows)


def alone() -> dict[str, Any]:
    return found({}, [], roles={"learner 0": {"busy": 1.0, "transfer": 1.0, "waiting": {}}, "keeper": {"busy": 0.0}})


def circle() -> dict[str, Any]:
    return found(
        {"there": "queue", "back": "queue"},
        [("a 0", "there", 1), ("there", "b 0", 1), ("b 0", "back", 1), ("back", "a 0", 1)],
    )


SCENES = (actors_learner, replicas, replay, hogwild, inference, shards, alone, circle)


def test_columns_as_data_goes() -> None:
    assert scene(actors_learner()).roles == [["actor 0", "actor 1", "evaluator 0"], ["learner 0"]]
    assert scene(actors_learner()).words == [["unrolls", "weights"], []]
    found = scene(replicas())
    assert found.roles == [["actor 0", "actor 1"], ["replica 0", "replica 1"], ["learner 0"]]
    assert found.words == [["unrolls_0", "unrolls_1", "weights"], ["gradients", "parameters"], []]
    assert scene(hogwild()).roles == [["learner 0", "learner 1", "evaluator 0"]]
    assert scene(hogwild()).words == [["memory", "weights"]]
    assert scene(inference()).roles == [["actor 0"], ["server 0", "learner 0"]]
    assert scene(shards()).roles == [["actor 0"], ["learner 0", "shard 0"]]
    assert scene(shards()).words == [["replay", "requests_0", "weights"], []]


@pytest.mark.parametrize("make", SCENES)
def test_everyone_stands_once_and_every_flow_is_an_arrow(make: Any) -> None:
    account = make()
    places = scene(account)
    assert sorted(itertools.chain(*places.roles)) == sorted(set(account["roles"]) - {"keeper"})
    assert sorted(itertools.chain(*places.words)) == sorted(account["words"])
    assert len(places.arrows) == len(account["flows"])


def test_arrows_say_what_was_measured() -> None:
    arrows = scene(replay()).arrows
    assert Arrow("actor × 16", "replay", True, "2k steps/s", "2 MB/s") in arrows
    assert Arrow("learner 0", "replay", False, "12.3k samples/s", "12.3 MB/s") in arrows
    assert Arrow("learner 0", "weights", True, "0.25 versions/s", "250 B/s") in arrows
    assert Arrow("actor 0", "unrolls_0", True, "2 unrolls/s", "2 kB/s") in scene(replicas()).arrows
    assert Arrow("actor 0", "calls", True, "900 requests/s", "900 kB/s") in scene(inference()).arrows


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (0.123, "0.12"),
        (3.44, "3.4"),
        (9.96, "10"),
        (99.6, "100"),
        (999.4, "999"),
        (999.6, "1k"),
        (12_345, "12.3k"),
        (123_456, "123k"),
        (2_500_000, "2.5M"),
        (7.1e11, "710G"),
    ],
)
def test_amount(value: float, text: str) -> None:
    assert amount(value) == text


def test_overview() -> None:
    assert overview(replay()) == "5 processes, 1.5 of 2 cores in use; the one that keeps the words is busy 10%"
    assert overview({**replay(), "processes": 1}).startswith("one process, in which roles take turns; 10% ")


def test_bars_are_whole() -> None:
    bar = shares(replay()["roles"]["learner 0"])
    assert list(bar) == ["environment", "inference", "transfer", "waiting"]
    assert sum(bar.values()) == pytest.approx(1.0)
    assert set(bar) <= set(COLOURS)


@pytest.mark.parametrize("make", SCENES)
def test_no_box_lies_on_another(make: Any) -> None:
    boxes, width, height = _placed(scene(make()))
    for box in boxes.values():
        assert 0 < box.x < box.x + box.width < width
        assert 0 < box.y < box.y + box.height < height
    for one, other in itertools.combinations(boxes.values(), 2):
        assert not overlap(one, other), (one, other)


def overlap(one: Box, other: Box) -> bool:
    across = one.x < other.x + other.width and other.x < one.x + one.width
    return across and one.y < other.y + other.height and other.y < one.y + one.height


@pytest.mark.parametrize("make", SCENES)
def test_no_text_lies_on_another_or_leaves_the_picture(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it is drawn, by matplotlib's own measure of the texts."""
    from rookery.runs import flowchart

    drawn: list[Any] = []
    saved = flowchart.save
    monkeypatch.setattr(flowchart, "save", lambda figure, path: drawn.append(figure) or saved(figure, path))
    path = plot_topology(ran(tmp_path, make(), ended=False))
    assert path == tmp_path / "run" / "plots" / "topology.png"
    with Image.open(path) as image:
        assert image.width > 900
    [figure] = drawn
    texts = [text for text in figure.axes[0].texts if text.get_text()]
    renderer = FigureCanvasAgg(figure).get_renderer()
    places = {text: text.get_window_extent(renderer) for text in texts}
    for text, place in places.items():
        assert figure.bbox.x0 <= place.x0 < place.x1 <= figure.bbox.x1, text
    for one, other in itertools.combinations(texts, 2):
        assert not places[one].overlaps(places[other]), (one, other)
    shown = {text.get_text() for text in texts}
    for arrow in scene(make()).arrows:
        assert {arrow.rate, arrow.size} <= shown
    assert {"Limit: learner", "So it is.", "Do this."} <= shown


def ran(folder: Path, account: dict[str, Any], ended: bool) -> Path:
    """A run folder with that measured; where it has ended, with less in its last row."""
    run = RunFolder.create(folder / "run", "ppo", "CartPole-v1", 0)
    run.write_config({"system": "ppo", "env": "CartPole-v1", "seed": 0, "options": {"steps": 100}})
    log = MetricsLog(run.metrics)
    log.append(
        {"step": 5, "role": "runtime", "index": 0, "measured": {**account, "processes": 77} if ended else account}
    )
    log.append({"step": 9, "role": "runtime", "index": 0, "restarted": "actor 0", "dropped": 1})
    log.close()
    if ended:
        run.write_summary(account)
    return run.path


@pytest.mark.parametrize("ended", [True, False])
def test_of_a_run_that_is_over_the_whole_is_shown(ended: bool, tmp_path: Path) -> None:
    folder = RunFolder.open(ran(tmp_path, replay(), ended))
    assert folder.ended == ended
    account = measured_of(folder)
    assert account is not None
    assert account["processes"] == 5
    time.sleep(0.05)  # files' times come in ticks
    MetricsLog(folder.metrics).append({"step": 10})  # somebody goes on with it
    assert not folder.ended


def test_a_run_that_was_not_measured(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run", "ppo", "CartPole-v1", 0)
    run.write_config({"system": "ppo"})
    assert plot_topology(run.path) is None
    MetricsLog(run.metrics).append({"step": 1, "role": "learner", "index": 0})
    run.write_summary({"steps": 1})
    assert plot_topology(run.path) is None
    with pytest.raises(RunFolderError):
        plot_topology(tmp_path)
