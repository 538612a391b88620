"""PPO whose replicas and learner die at chosen moments, once each, and whose every step is written down."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rookery.algorithms.ppo import PPO
from rookery.runtimes.process import LinkedQueue, LinkedWeights
from rookery.topologies import replicas

__all__ = ["Mortal"]

AT: dict[str, Any] = {"gradient": -1, "data": 0.0, "folder": ""}  # what this process is at


@dataclass(frozen=True)
class Mortal(PPO):
    """A gradient tells by its metrics which of its batch it is, and of which data."""

    folder: str = ""  # where steps are written down, and who is to die: files named by the moment

    def prepare(self, net: Any, unroll: Any) -> Any:
        AT.update(gradient=-1, data=float(unroll["obs"].double().sum()), folder=self.folder)
        return super().prepare(net, unroll)

    def loss(self, *args: Any) -> Any:
        loss = super().loss(*args)
        AT["gradient"] += 1
        moment(f"at {AT['gradient']}")
        own = {name: torch.tensor(AT[name], dtype=torch.float64) for name in ("gradient", "data")}
        return loss._replace(metrics={**loss.metrics, **own})


def moment(what: str) -> None:
    """Die if that is asked for; the first of the replicas does."""
    asked = Path(AT["folder"] or "/nowhere") / what
    if asked.exists():
        try:
            asked.unlink()
        except FileNotFoundError:  # another process was faster
            return
        os.kill(os.getpid(), signal.SIGKILL)


def last() -> bool:
    return AT["gradient"] == 7


def be_mortal() -> None:
    pooled, conclude = replicas.pooled, replicas.conclude
    newer_than, release, publish = LinkedWeights.newer_than, LinkedQueue.release, LinkedWeights.publish

    def pooling(learner: Any, shares: list[Any]) -> Any:
        AT["folder"] = learner.algorithm.folder
        row = {name: [float(share["metrics"][name]) for share in shares] for name in ("gradient", "data")}
        row |= {"updates": learner.updates, "before": learner.steps, "steps": [int(share["steps"]) for share in shares]}
        with (Path(learner.algorithm.folder) / "steps").open("a") as file:
            file.write(json.dumps(row) + "\n")
        moment(f"pooling {learner.updates % 8}")
        return pooled(learner, shares)

    def concluding(learner: Any, shares: list[Any]) -> None:
        conclude(learner, shares)
        moment("concluded")

    async def waiting(weights: Any, version: int, steps: int = 0) -> Any:
        if weights.name == "parameters" and last():
            moment("put")
        newest = await newer_than(weights, version, steps)
        if weights.name == "parameters" and last():
            moment("followed")
        return newest

    def releasing(queue: Any, slots: list[Any]) -> None:
        release(queue, slots)
        if queue.name.startswith("unrolls"):
            moment("released")

    def publishing(weights: Any, *args: Any) -> None:
        publish(weights, *args)
        moment(f"published {weights.name}")

    replicas.pooled, replicas.conclude = pooling, concluding  # type: ignore[assignment]
    LinkedWeights.newer_than, LinkedQueue.release = waiting, releasing  # type: ignore[method-assign, assignment]
    LinkedWeights.publish = publishing  # type: ignore[method-assign]


if getattr(multiprocessing.current_process(), "_inheriting", False):  # the process of a role begins
    be_mortal()
