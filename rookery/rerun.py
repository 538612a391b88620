"""A run with processes once more, in one process, in the order in which everything arrived."""

from __future__ import annotations

import dataclasses
import itertools
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rookery.algorithms.base import Algorithm, Network
from rookery.run import Run, load
from rookery.runs.checkpoint import Checkpoints
from rookery.runs.folder import RunFolder
from rookery.runs.metrics import read
from rookery.runs.recorder import CLOCK
from rookery.runtimes.arrivals import Replayed, pieces
from rookery.runtimes.inline import RoleError
from rookery.runtimes.rerun import Rerun
from rookery.settings import EnvLike
from rookery.systems import system_of
from rookery.train import ARRIVALS, execute, saved_whole

__all__ = ["differences", "parting", "rerun"]

UNORDERED = "hogwild"  # the topology whose roles write to memory without asking anybody


def rerun(
    path: str | Path,
    *,
    until: int | None = None,
    run_dir: str | Path | None = None,
    quiet: bool = False,
    algorithm: Algorithm | type[Algorithm] | str | None = None,
    env: EnvLike | None = None,
    network: Network | str | None = None,
) -> Run:
    """Repeat a run of `runtime="local"` in this process: bit for bit where environments are, and all is on the CPU.

    Args:
        until: stop once the learner has made so many updates, between two batches of it; the new run's checkpoint is
            then the state there. A parameter server has many learners: it stops once the first knows of so many.
        run_dir: the folder of the new run; by default a new one under `runs/`.

    Raises:
        ValueError: for `until` below 1; for a run that left no record (inline ones repeat by themselves, from their
            seed), or of hogwild.
        Diverged: where something else happens than is written in the record.
    """
    if until is not None and until < 1:
        raise ValueError(f"until={until} is before the first update; use 1 or more, or leave it out.")
    run = load(path, algorithm=algorithm, env=env, network=network)
    config, records = run.config, pieces(run.path / ARRIVALS)
    if not records or records[0][0] > 0:
        raise ValueError(
            f"{run.path} has no record of who came when from its beginning on, which runs with runtime='local' leave; "
            "train the run again with its seed, which repeats inline runs."
        )
    if system_of(config["system"], run.algorithm).topology == UNORDERED:
        raise ValueError(f"{run.path} is of {config['system']}, whose workers write to shared memory in no order.")
    folder = RunFolder.create(run_dir, config["system"], str(config["env"]), config["options"]["seed"])
    folder.write_config({**config, "rerun_of": str(run.path)})
    run.folder, run.checkpoints = folder, Checkpoints(folder.checkpoints)
    options, saved = dataclasses.replace(run._make_env.options, sinks=()), None
    for (_, budget, record), following in itertools.zip_longest(records, records[1:]):
        resumed_at = None if following is None else following[0]
        options = dataclasses.replace(options, steps=budget)
        make = partial(Rerun, record=Replayed(record), until=until, resumed_at=resumed_at)
        try:
            execute(run, config["system"], options, quiet, saved, make)
        except RoleError:  # it failed then, too, and was resumed
            if following is None:
                raise
        saved = saved_whole(run, options)
        if until is not None and saved["run"]["roles"]["learner_0"]["counts"]["updates"] >= until:
            break
    return run


def differences(one: Run, two: Run) -> list[str]:
    """Where the learners of two runs' newest checkpoints differ."""
    ours, theirs = (run.saved()["run"]["roles"]["learner_0"] for run in (one, two))
    return _unlike("learner", ours, theirs)


def parting(one: Run, two: Run) -> int | None:
    """The first step at which the learners' rows of two runs differ, as far as both go; None if nowhere."""
    ours, theirs = ([row for row in read(run.folder.metrics) if row["role"] == "learner"] for run in (one, two))
    for mine, other in zip(ours, theirs, strict=False):
        if any(mine.get(name) != other.get(name) for name in (mine.keys() | other.keys()) - set(CLOCK)):
            return int(mine["step"])
    return None


def _unlike(name: str, one: Any, two: Any) -> list[str]:
    if isinstance(one, dict) and isinstance(two, dict) and one.keys() == two.keys():
        return [line for key in one for line in _unlike(f"{name}.{key}", one[key], two[key])]
    same = torch.equal(one, two) if isinstance(one, Tensor) and isinstance(two, Tensor) else one == two
    return [] if same else [name]
