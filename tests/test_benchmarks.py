"""Each benchmark runs with `--smoke`, and writes the table and the JSON it promises."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"
CORE = str(min(os.sched_getaffinity(0)))


def bench(name: str, out: Path, *flags: str) -> tuple[dict[str, Any], str]:
    """What the benchmark wrote: its JSON and its table."""
    script, limit = str(FOLDER / f"{name}.py"), 300
    words = [sys.executable, script, "--smoke", "--out", str(out), *flags]
    done = subprocess.run(words, capture_output=True, text=True, timeout=limit)
    assert done.returncode == 0, done.stderr
    (path,) = out.glob("*.json")
    assert path.name.startswith(name)
    text = path.with_suffix(".md").read_text()
    assert text.strip() in done.stdout
    return json.loads(path.read_text()), text


def check_machine(result: dict[str, Any], text: str) -> None:
    assert result["smoke"] is True
    assert "smoke" in text
    assert result["machine"]["cpu"]
    assert "--smoke" in result["command"]
    assert "--out" not in result["command"]
    assert result["machine"]["versions"]["torch"] in text


@pytest.mark.slow
def test_ppo_throughput(tmp_path: Path) -> None:
    pytest.importorskip("stable_baselines3")
    flags = ("--cores", CORE, "--cases", "CartPole, 8", "--only", "SB3;ours eager")
    result, text = bench("ppo_throughput", tmp_path, *flags)
    check_machine(result, text)
    ((name, case),) = result["cases"].items()
    assert name == "CartPole, 8 lanes"
    assert case["settings"]["envs"] == 8
    assert {"SB3", "ours eager"} <= case["results"].keys()
    for who, rounds in case["results"].items():
        (each,) = rounds
        assert each["steps_per_second"] == pytest.approx(each["steps"] / each["seconds"])
        assert each["steps"] == 2 * 8 * 16 or who.startswith("ours")  # where a lane only resets, ours counts nothing
        assert 0 < each["seconds"] < each["wall"]
        assert 0 < each["startup"] < each["wall"]
        assert f"| {who} " in text


@pytest.mark.slow
def test_time_to_solve(tmp_path: Path) -> None:
    pytest.importorskip("stable_baselines3")
    result, text = bench("time_to_solve", tmp_path, "--cores", CORE)
    check_machine(result, text)
    assert result["results"].keys() == {"SB3", "SB3, 1 evaluation lane", "ours"}
    for who, rounds in result["results"].items():
        (each,) = rounds
        assert 0 < each["imports"] < each["until_training"] < each["seconds"] < each["wall"]
        assert each["steps"] >= result["rule"]["every"]
        assert each["final"] > 5
        assert f"| {who} " in text


def test_gpu_throughput_tries_its_code_on_a_cpu(tmp_path: Path) -> None:
    result, text = bench("gpu_throughput", tmp_path, "--device", "cpu", "--modes", "eager", "--lanes", "16,8")
    check_machine(result, text)
    cells = {(cell["env"], cell["lanes"]): cell for cell in result["cells"]}
    assert cells.keys() == {(env, lanes) for env in ("CartPole-v1", "Catch-v0") for lanes in (16, 8)}
    for cell in cells.values():
        assert "error" not in cell
        assert cell["steps_per_second"] > 0
        assert cell["phases"].keys() == {"fill", "update"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to measure")
def test_gpu_throughput_without_a_gpu_says_so_in_one_sentence(tmp_path: Path) -> None:
    words = [sys.executable, str(FOLDER / "gpu_throughput.py"), "--out", str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0
    assert done.stdout.count("\n") == 1
    assert "no CUDA device" in done.stdout
    assert not list(tmp_path.iterdir())


def test_a_child_that_fails_is_told_of(tmp_path: Path) -> None:
    sys.path.insert(0, str(FOLDER))
    try:
        from common import child
    finally:
        sys.path.remove(str(FOLDER))
    script = tmp_path / "fails.py"
    script.write_text("raise SystemExit('the disk is full')")
    with pytest.raises(RuntimeError, match="failed with status 1: the disk is full"):
        child(str(script), {"kind": "any"}, [int(CORE)])


@pytest.mark.slow
def test_offpolicy_throughput(tmp_path: Path) -> None:
    pytest.importorskip("stable_baselines3")
    result, text = bench("offpolicy_throughput", tmp_path, "--cores", CORE, "--cases", "DQN CartPole")
    check_machine(result, text)
    results = result["cases"]["DQN CartPole"]["results"]
    assert {"SB3", "ours eager", "ours bf16 compiled"} <= results.keys()
    for (each,) in results.values():
        assert each["updates_per_step"] == pytest.approx(0.5, abs=0.1)


@pytest.mark.slow
def test_offpolicy_learning(tmp_path: Path) -> None:
    pytest.importorskip("stable_baselines3")
    flags = ("--cores", CORE, "--systems", "sac", "--envs", "Hopper-v5", "--runs", str(tmp_path / "runs"))
    result, text = bench("offpolicy_learning", tmp_path, *flags)
    check_machine(result, text)
    assert {run["kind"] for run in result["runs"]} == {"ours", "sb3"}


def test_intervals_over_few_seeds_are_of_students_t(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(FOLDER)
    from offpolicy_learning import interval

    assert interval([1_000.0, 1_100.0, 1_200.0]) == "1,100 (852 to 1,348)"  # 4.303 · 100 / √3 either side
    assert interval([1_000.0]) == "1,000"


@pytest.mark.slow
def test_replay_throughput(tmp_path: Path) -> None:
    pytest.importorskip("stable_baselines3")
    result, text = bench("replay_throughput", tmp_path, "--cores", CORE)
    check_machine(result, text)


@pytest.mark.slow
def test_scaling(tmp_path: Path) -> None:
    result, text = bench("scaling", tmp_path, "--cores", CORE)
    check_machine(result, text)
    assert result["scaling"].keys() == {"impala, 2 ms, 1", "impala, 2 ms, 2"}
    check_rates(result["scaling"])
    ((step,),) = result["actor_step"].values()
    parts = [step[part] for part in ("inference", "environment", "rows and accounts")]
    assert step["all"] == pytest.approx(sum(parts))


@pytest.mark.slow
def test_overhead(tmp_path: Path) -> None:
    result, text = bench("overhead", tmp_path, "--cores", CORE)
    check_machine(result, text)
    assert {name.rpartition(", ")[2] for name in result["overhead"]} == {"loop", "inline", "local"}
    check_rates(result["overhead"])


def check_rates(found: dict[str, list[dict[str, Any]]]) -> None:
    for (each,) in found.values():
        assert each["steps_per_second"] == pytest.approx(each["steps"] / each["seconds"])
        assert 0 < each["cores_busy"] <= 1.1


@pytest.mark.slow
def test_shared_inference(tmp_path: Path) -> None:
    result, text = bench("shared_inference", tmp_path, "--cores", CORE)
    check_machine(result, text)
    for case in result["cases"].values():
        assert list(case) == ["own", "shared", "shared, double buffer"]
        assert all(run["steps_per_second"] > 0 for runs in case.values() for run in runs)


@pytest.mark.slow
def test_apex_exploration(tmp_path: Path) -> None:
    result, text = bench("apex_exploration", tmp_path, "--cores", CORE)
    check_machine(result, text)
    assert [run["updates"] for run in result["results"]["16 actors, ladder"]] == [pytest.approx(100, rel=0.15)]


@pytest.mark.slow
def test_impala_throughput(tmp_path: Path) -> None:
    result, text = bench("impala_throughput", tmp_path, "--cores", CORE)
    check_machine(result, text)
    for runs in result["results"].values():
        assert all(run["steps_per_second"] > 0 and 0 < run["learner_busy"] <= 1 for run in runs)
