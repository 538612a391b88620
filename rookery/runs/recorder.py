"""The one place that a run's roles report to."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from rookery.runs.metrics import RUNTIME, MetricsLog, plain
from rookery.runs.progress import Progress
from rookery.runs.sinks import Guarded, Sink

__all__ = ["CLOCK", "Recorder"]

CLOCK = ("seconds", "steps_per_second")  # what depends on the clock, in the rows of roles
EVALUATION = ("eval_return_mean", "eval_return_std", "eval_episodes")


class Recorder:
    """Hands every report to the log, the sinks and the progress display, and keeps what the summary needs.

    Whatever depends on the clock is reported under `seconds` and `steps_per_second` (`CLOCK`) and under no other name,
    or by the role `runtime`, so that two logs can be compared without it.
    """

    def __init__(self, log: MetricsLog, sinks: Sequence[Sink] = (), progress: Progress | None = None) -> None:
        self.log = log
        self.steps: dict[str, int] = {}  # the latest step of each role, by `role.index`
        self._sinks = [Guarded(sink) for sink in sinks]
        self._progress = progress
        self._episodes = 0
        self._returns: deque[float] = deque(maxlen=100)
        self._evaluation: dict[str, Any] = dict.fromkeys(EVALUATION)
        self._lags: dict[str, float] = {}  # number, sum and maximum of those reported

    def report(self, role: str, index: int, step: int, values: Mapping[str, Any]) -> None:
        """Take what a role measured at `step`.

        A row with `episode_return` tells of one episode, or of the mean over several: it then brings their `returns`,
        a list that is not written but kept for the mean of the last 100.

        Raises:
            ValueError: if `values` names `step`, `role` or `index` itself.
            MetricsError: if the log cannot be written; the row is counted. A sink that fails is only switched off.
        """
        returns = values.get("returns", [values["episode_return"]] if "episode_return" in values else [])
        written = {name: plain(value) for name, value in values.items() if name != "returns"}
        row = {"step": step, "role": role, "index": index, **written}
        if len(row) != 3 + len(written):
            raise ValueError(f"{role} {index} reports a value named step, role or index; give it another name.")
        if role != RUNTIME:
            self.steps[f"{role}.{index}"] = step
        if "policy_lag" in row:
            number, total, most = self._lags.values() if self._lags else (0, 0.0, 0)
            lag, largest = row["policy_lag"], row.get("policy_lag_max", row["policy_lag"])
            self._lags = {"number": number + 1, "sum": total + lag, "max": max(most, largest)}
        self._episodes += len(returns)
        self._returns.extend(value for value in map(plain, returns) if value is not None)
        if "eval_return_mean" in row:
            success = {"eval_success": row["eval_success"]} if "eval_success" in row else {}
            self._evaluation = {**{name: row.get(name) for name in EVALUATION}, **success}
        self.log.append(row)
        for sink in self._sinks:
            sink.write(row)
        if self._progress is not None:
            self._progress.update(row)

    def summary(self) -> dict[str, Any]:
        """Episodes, the mean return of the last 100 of them, the last evaluation, and mean and maximum of the policy
        lags that were reported; None for what there is not."""
        mean = sum(self._returns) / len(self._returns) if self._returns else None
        lag = {"mean": self._lags["sum"] / self._lags["number"], "max": self._lags["max"]} if self._lags else None
        return {"episodes": self._episodes, "return_mean_last_100": mean, **self._evaluation, "policy_lag": lag}

    def state(self) -> dict[str, Any]:
        """What a resumed run goes on with, as JSON has it."""
        return {
            "episodes": self._episodes,
            "returns": list(self._returns),
            "evaluation": dict(self._evaluation),
            "steps": dict(self.steps),
            "lags": dict(self._lags),
            "rows": self.log.rows,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from where `state()` was taken."""
        self._episodes = state["episodes"]
        self._returns = deque(state["returns"], maxlen=100)
        self._evaluation = dict(state["evaluation"])
        self.steps = dict(state["steps"])
        self._lags = dict(state.get("lags", {}))
        if self._progress is not None:
            self._progress.goes_on(self._returns, self._evaluation)

    def close(self) -> None:
        """Close the progress display, the sinks and the log; harmless when called twice."""
        if self._progress is not None:
            self._progress.close()
        for sink in self._sinks:
            sink.close()
        self.log.close()
