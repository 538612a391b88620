"""A Ray cluster as a run sees it: which hosts there are, what they have, and where a role finds room."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

__all__ = ["Cluster", "ClusterError", "Host", "Needs"]

Needs = Mapping[str, float]  # resources by Ray's names

LOOK = 0.5  # seconds between two looks at which hosts there are
PATIENCE = 4.0  # seconds that a look may take, or the head counts as lost
SHUN = 30.0  # seconds for which a host is left alone after a role was lost there
CLAIM = 30.0  # seconds that Ray may take to reserve what there is room for
KNOCK = 5.0  # seconds that a head may take to answer
SMALL = 1e-6  # resources are counted in floating point


class ClusterError(ValueError):
    """A cluster that cannot be reached, or has not what a run needs to begin; the message says what would do."""


class Host:
    """A host of the cluster, and what this run has taken of it."""

    def __init__(self, node: str, name: str, total: Needs) -> None:
        self.node, self.name, self.total = node, name, total
        self.taken: Counter[str] = Counter()
        self.lost_at = -SHUN  # when a role was last lost there

    def has(self, *needs: Needs) -> bool:
        """Whether there is room for all of these."""
        wanted: Counter[str] = Counter()
        for each in needs:
            wanted.update(each)
        left = {name: self.total.get(name, 0.0) - self.taken[name] for name in wanted}
        return all(left[name] + SMALL >= amount for name, amount in wanted.items())

    @property
    def trusted(self) -> bool:
        """Whether no role was lost there of late."""
        return time.monotonic() - self.lost_at >= SHUN

    @property
    def load(self) -> float:
        """The share of its cores that is taken."""
        return self.taken["CPU"] / max(self.total.get("CPU", 0.0), SMALL)


class Cluster:
    """The hosts of the cluster at an address, while a run is on it.

    Args:
        address: of its head, "auto" for the one of this machine; None begins a cluster of this machine alone, which
            has as many cores as the run asks for, for as long as the run.
        placement: "spread" takes the host with the smallest share of its cores taken, "pack" this one while it has
            room, then one after the other.
    """

    def __init__(self, address: str | None, placement: Literal["spread", "pack"]) -> None:
        self.address, self.placement = address, placement
        self.hosts: dict[str, Host] = {}  # that are alive, by node
        self._here = ""  # the node of this process
        self._nodes: list[dict[str, Any]] = []  # as Ray last told
        self.leaving: set[str] = set()  # nodes that are about to leave, as it did
        self._looked, self._looked_at = threading.Condition(), 0.0  # after each look; when the last one was
        self._left = threading.Event()
        self._claims: list[Any] = []  # that were granted

    @contextlib.contextmanager
    def joined(self, cores: float) -> Iterator[None]:
        """Be part of it; `cores` are what a cluster that is begun for it has at least.

        Raises:
            ClusterError: if there is none, or it does not let us in.
        """
        mine = "ray" not in sys.modules or not sys.modules["ray"].is_initialized()
        if mine:
            with _signals_kept():
                _reach(self.address, max(cores, float(os.cpu_count() or 1)))
        import ray

        try:
            self._here, self._nodes = ray.get_runtime_context().get_node_id(), ray.nodes()
            self._looked_at = time.monotonic()
            self._left.clear()
            threading.Thread(target=self._watch, daemon=True).start()
            self.look()
            yield
        finally:
            self._left.set()
            claims, self._claims = self._claims, []
            if mine:
                ray.shutdown()
            for claim in claims if not mine else ():  # else they end with our part in the cluster
                with contextlib.suppress(Exception):  # Ray's, of many kinds: the head may be gone
                    ray.util.remove_placement_group(claim)

    def _watch(self) -> None:
        """In a thread: while the head is lost, to ask which hosts there are may take a minute."""
        import ray
        from ray._private.state import state

        while not self._left.wait(LOOK):
            with contextlib.suppress(Exception):  # Ray's, of many kinds; what was told last holds
                self._nodes, self.leaving = ray.nodes(), set(state.get_draining_nodes())
                self._looked_at = time.monotonic()
                with self._looked:
                    self._looked.notify_all()

    def look(self) -> None:
        """Take note of the hosts that are alive now; this one is."""
        self.hosts = {
            node["NodeID"]: self.hosts.get(node["NodeID"])
            or Host(node["NodeID"], node["NodeManagerHostname"], node["Resources"])
            for node in self._nodes
            if node["Alive"] or node["NodeID"] == self._here
        }

    @property
    def headless(self) -> bool:
        """Whether the head has not been heard of for a while."""
        return time.monotonic() - self._looked_at > PATIENCE

    def alive(self, node: str) -> bool:
        """Whether a node is, as of a look that begins from now on; not, if nobody can tell."""
        with self._looked:
            told = all(self._looked.wait(PATIENCE) for _ in range(2))  # the first began before
        return told and any(each["Alive"] for each in self._nodes if each["NodeID"] == node)

    @property
    def here(self) -> Host:
        """The host of this process."""
        return self.hosts[self._here]

    def place(self, needs: Needs, staying: Sequence[Needs] = (), stays: bool = False) -> Host | None:
        """A host with room; None if there is none.

        Args:
            staying: needs of those that have to be here, for which room is left.
            stays: whether this is one of them: while this host is there, it is there.
        """
        here = self.here
        if stays:
            return here if here.has(needs) else None
        hosts = [here] if self.headless else self.hosts.values()  # to start elsewhere would wait for the head
        stay = [host for host in hosts if host.trusted and host.node not in self.leaving]
        free = [host for host in stay if host.has(needs, *(staying if host is here else ()))]
        if self.placement == "pack":
            return min(free, key=lambda host: (host is not here, -host.load, host.name), default=None)
        return min(free, key=lambda host: (host.load, host is not here, host.name), default=None)

    def check(self, asked: Sequence[Needs], stay: bool) -> None:
        """Refuse what there is no room for, before Ray waits for it without a word.

        Args:
            asked: what each role needs.
            stay: whether all of them have to be here.

        Raises:
            ClusterError: says what is asked for, and what there is.
        """
        import ray

        hosts = [self.here] if stay else list(self.hosts.values())
        where = f"the {len(hosts)} hosts of the cluster have" if len(hosts) > 1 else f"the host {hosts[0].name} has"
        why = ", and they share memory, so that they have to be on one" if stay else ""
        free = ray.available_resources()
        for name in sorted({name for needs in asked for name in needs}):
            wanted = sum(needs.get(name, 0.0) for needs in asked)
            total = sum(host.total.get(name, 0.0) for host in hosts)
            used = 0.0 if stay else total - free.get(name, 0.0)
            if wanted > total - used + SMALL:
                others = f", of which others use {used:g}" if used > SMALL else ""
                raise ClusterError(
                    f"{len(asked)} roles ask for {wanted:g} {name}{why}; {where} {total:g}{others}: use fewer actors, "
                    "let each role take less (role_needs), or add hosts."
                )

    def claim(self, needs: Needs, who: str) -> None:
        """Reserve what a process on this host takes until the run leaves, so that Ray gives it to nobody else.

        Raises:
            ClusterError: if others were faster.
        """
        import ray
        from ray.util.placement_group import placement_group

        mark = next(name for name in self.here.total if name.startswith("node:") and "__" not in name)
        claim = placement_group([{**needs, mark: 0.001}])
        if not claim.wait(CLAIM):
            ray.util.remove_placement_group(claim)
            raise ClusterError(
                f"there was no room for {who} ({dict(needs)}) on this host for {CLAIM:g} s: others use it; wait for "
                "them, or use fewer actors."
            )
        self._claims.append(claim)


@contextlib.contextmanager
def _signals_kept() -> Iterator[None]:
    """Ray takes signals for itself when it begins; a run that they stop leaves a checkpoint."""
    before = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
    yield
    if threading.current_thread() is threading.main_thread():
        for each, handler in before.items():
            signal.signal(each, handler)


def _reach(address: str | None, cores: float) -> None:
    """Join the cluster at that address, or begin one of this machine alone."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if address is None and "ray" not in sys.modules:  # which reads this when it is imported
        os.environ.setdefault("RAY_AUTH_MODE", "token")  # since it listens on every interface
    token = os.environ.get("RAY_AUTH_TOKEN_PATH")
    if token is not None and not (Path(token).is_file() and Path(token).stat().st_size):
        raise ClusterError(
            f"RAY_AUTH_TOKEN_PATH names {token}, where there is no token; copy that of the cluster there."
        )
    try:
        import ray
    except ImportError as error:
        raise ClusterError("runtime='ray' needs Ray; install it by `pip install rookery[ray]`.") from error

    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address is None:
        at_once = {"prestart_worker_first_driver": False}  # no processes that wait for work: roles have their own
        ray.init("local", num_cpus=math.ceil(cores), include_dashboard=False, _system_config=at_once, **quiet)
        return
    try:
        _knock(address)
        ray.init(address, **quiet)
    except (ConnectionError, OSError, RuntimeError) as error:
        raise ClusterError(
            f"no Ray cluster answers at address={address!r} ({error}); begin one by `ray start --head --port=6379` on "
            "its first host."
        ) from error


def _knock(address: str) -> None:
    """See at once whether somebody is there who lets us in: `ray.init` tries for 20 s, and does not say why."""
    from ray._private.services import canonicalize_bootstrap_address
    from ray._raylet import GcsClient  # type: ignore[attr-defined]

    found = canonicalize_bootstrap_address(address)
    if found is None:
        raise ConnectionError("none was begun on this machine")
    host, _, port = found.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=KNOCK):
        pass
    try:
        GcsClient(address=found)
    except Exception as error:  # Ray's, of many kinds
        if "token" not in str(error).lower():
            raise ConnectionError(str(error)) from error
        raise ClusterError(
            f"the Ray cluster at {found} refuses this process, whose token is missing or another: set "
            "RAY_AUTH_MODE=token, and let RAY_AUTH_TOKEN_PATH name a file with the token the cluster was begun with."
        ) from error
