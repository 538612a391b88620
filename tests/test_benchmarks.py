"""Each benchmark runs with `--smoke`, and writes the table and the JSON it promises."""

from __future__ import annotations

import argparse
import json
import math
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
    assert result["runs"].keys() == {"ours sac Hopper-v5", "sb3 sac Hopper-v5"}
    assert all(len(run["evaluations"]) >= 19 for runs in result["runs"].values() for run in runs)
    assert [*tmp_path.rglob("offpolicy_learning-*.png")]


def test_intervals_over_few_seeds_are_of_students_t(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(FOLDER)
    from offpolicy_learning import cell

    three = [{"score": 1_000.0}, {"score": 1_100.0}, {"score": 1_200.0}]
    assert cell(three) == "1,100 (852 to 1,348; 3 seeds)"  # 4.303 · 100 / √3 either side
    assert cell(three[:1]) == "1,000 (1 seed)"
    assert cell([]) == "not run"


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
    assert result["overhead"].keys() == {"as tuned", "one pass"}
    for ways in result["overhead"].values():
        assert ways.keys() == {"loop", "inline", "local"}
        check_rates(ways)


def check_rates(found: dict[str, list[dict[str, Any]]]) -> None:
    for (each,) in found.values():
        assert each["steps_per_second"] == pytest.approx(each["steps"] / each["seconds"])
        assert 0 < each["cores_busy"] <= 1.1  # of one


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


@pytest.mark.slow
def test_vs_rllib(tmp_path: Path) -> None:
    flags = ("--cores", CORE, "--cases", "CartPole PPO;CartPole IMPALA", "--only", "equal")
    result, text = bench("vs_rllib", tmp_path, *flags)
    check_machine(result, text)
    for case in result["cases"].values():
        ((each,),) = case["results"].values()
        assert each["steps_per_second"] > 0
        assert 0 < each["reached"] <= each["first"] < math.inf
    with pytest.raises(AssertionError, match="--runtimes has 'abacus', which Rookery has not; use some of inline,"):
        bench("vs_rllib", tmp_path, "--runtimes", "abacus")


def test_a_threshold_is_of_the_last_episodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(FOLDER)
    from vs_rllib import reached

    rows = [{"seconds": 1.0 + n, "episodes": 3, "mean": mean} for n, mean in enumerate((90, 0, 90, 70, 100))]
    assert reached(rows, 80, 3) == 1.0
    assert reached(rows, 80, 4) == 4.0  # (90 + 70) / 2
    assert reached(rows, 101, 3) == float("inf")


KEPT = """
import json, sys, time
from pathlib import Path
spec = json.loads(sys.argv[2])
log = Path(__file__).with_suffix(".log")
log.open("a").write(f"{spec['who']}{spec['seed']} ")
if spec["who"] == "b" and spec["seed"] == 1:
    time.sleep(60) if "late" in spec else sys.exit("the disk is full")
print("RESULT " + json.dumps({"who": spec["who"]}))
"""


@pytest.mark.parametrize("late", [{}, {"late": True}], ids=["fails", "takes too long"])
def test_a_benchmark_goes_on_with_what_it_had(
    late: dict[str, bool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is there is not measured again; what failed is left out and told of, and tried again."""
    monkeypatch.syspath_prepend(FOLDER)
    from kept import keeps, told

    script, args = tmp_path / "counts.py", argparse.Namespace(cores=[int(CORE)], smoke=False)
    script.write_text(KEPT)
    args.runs = tmp_path / "runs"

    def called(rounds: int, kept: bool = False) -> tuple[dict[str, Any], list[str], str]:
        args.rounds, args.kept, log = rounds, kept, script.with_suffix(".log")
        log.write_text("")
        variants = {who: {"kind": "any", "who": who, **late} for who in "ab"}
        found, failed = keeps(str(script), variants, args, lambda run: run["who"], 2.0 if late else 60.0)
        return found, failed, log.read_text().strip()

    found, failed, ran = called(2)
    assert ran == "a0 b0 a1 b1"
    assert {who: [run["seed"] for run in runs] for who, runs in found.items()} == {"a": [0, 1], "b": [0]}
    assert all(run["at"] and run["cpu"] and run["load"] >= 0 for runs in found.values() for run in runs)
    reason = "it took more than 2 s" if late else "the disk is full"
    assert [each.startswith("b, round 2: ") and reason in each for each in failed] == [True]
    assert told(failed)[0].endswith(f"- {failed[0]}")
    only, _, ran = called(3, kept=True)
    assert (only, ran) == (found, "")
    again, _, ran = called(3)
    assert ran == "b1 a2 b2"
    assert [again["a"][:2], again["b"][:1]] == [found["a"], found["b"]]
    args.runs = tmp_path / "others"
    assert called(1)[2] == "a0 b0"


def test_ratios_of_means_have_intervals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(FOLDER)
    from a3c_workers import interval, ratio

    assert interval([1_000.0, 1_100.0, 1_200.0]) == (1_100, pytest.approx(4.303 * 100 / 3**0.5, rel=1e-3))
    middle, low, high = ratio([2_000.0, 2_200.0, 2_400.0], [1_000.0, 1_100.0, 1_200.0])
    reach = 4.303 * (2 / 3) ** 0.5 / 11  # both have a deviation of an eleventh of their mean
    assert (middle, low, high) == pytest.approx((2, 2 * math.exp(-reach), 2 * math.exp(reach)), rel=1e-3)
    assert ratio([3.0], [2.0])[0] == 1.5


@pytest.mark.slow
def test_a3c_workers(tmp_path: Path) -> None:
    result, text = bench("a3c_workers", tmp_path, "--cores", CORE, "--workers", "1,2")
    check_machine(result, text)
    for (run,) in result["results"].values():
        assert run["steps"] == run["evaluations"][0][0] >= 256, "any return solves it"
    assert [*result["results"]] == ["1 worker", "2 workers"]
    assert len([*tmp_path.glob("a3c_workers-*.png")]) == 1


@pytest.mark.slow
def test_gorila_chaos(tmp_path: Path) -> None:
    result, text = bench("gorila_chaos", tmp_path, "--cores", CORE, "--only", "clean, safe;all, safe")
    check_machine(result, text)
    assert result["results"].keys() == {"clean, safe", "all, safe"}
    (clean,), (faulty,) = result["results"].values()
    assert clean["restarts"] == 0, "where it is quick, the other is over before the first kill, too"
    assert all(run["updates"] > 0 and run["lost"] <= 2 * run["restarts"] for run in (clean, faulty))


@pytest.mark.slow
def test_async_throughput(tmp_path: Path) -> None:
    result, text = bench("async_throughput", tmp_path, "--cores", CORE, "--cases", "CartPole, 2 × 16")
    check_machine(result, text)
    ((name, case),) = result["cases"].items()
    assert case["results"].keys() == {"ours", "ours, compiled", "ours, gym"}
    for (run,) in case["results"].values():
        assert run["steps_per_second"] == pytest.approx(run["steps"] / run["seconds"])
    assert text.count(f"| {name} ") == 3


@pytest.mark.slow
def test_replay_memory(tmp_path: Path) -> None:
    result, text = bench("replay_memory", tmp_path, "--cores", CORE)
    check_machine(result, text)
    for (each,) in result["cases"].values():
        assert each["bytes"] == sum(each["columns"].values())
        assert each["bytes"] / result["capacity"] < 7_500
