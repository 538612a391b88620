"""The Ray runtime: roles on the hosts of a cluster, and the words kept by this process as on one machine.

A role on this host is a process that shares memory with the others here, as in the local runtime: a hop costs
microseconds. On another host it is a Ray actor (`Seat`), whose messages are calls of Ray's. What is in boxes travels
through Ray's object store: whole unrolls, and weights once a version, fetched once by each host.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

from rookery.runtimes.boxes import content
from rookery.runtimes.cluster import Cluster, ClusterError, Host, Needs
from rookery.runtimes.inline import State
from rookery.runtimes.local import Local
from rookery.runtimes.local_words import Box, Member
from rookery.runtimes.seat import BEGIN, GROUPS, Carried, Seat
from rookery.runtimes.words import Graph, RoleSpec

__all__ = ["Ray"]

log = logging.getLogger("rookery")

INLINE = 100_000  # bytes of a message that Ray passes on with the call
LOST = 20.0  # seconds without an answer after which a seat counts as lost, though Ray has not noticed yet
RETRY = 1.0  # seconds between two attempts to place a role for which there is no room
HEADLESS = (
    "the head of the cluster is not heard of: nothing is started elsewhere until it is back; Ray ends this process if "
    "that takes longer than RAY_gcs_rpc_server_reconnect_timeout_s (60 s), and `rookery resume` goes on from the last "
    "checkpoint"
)
LEAVING = (
    "this host is about to leave the cluster, and the run with it: SIGTERM leaves a checkpoint, from which `rookery "
    "resume` goes on elsewhere"
)
CORE: Needs = {"CPU": 1.0}


class Seated:
    """A member's line to its seat, and the seat: what a connection and a process are to a member on this host."""

    exitcode: str | None = None
    lost = False  # whether it is its host that was lost

    def __init__(self, actor: Any, begun: Any, alive: Callable[[], bool], late: Counter[str]) -> None:
        self._actor, self._begun, self._alive, self._late = actor, begun, alive, late
        self._says, self._told = (getattr(actor, name).options(concurrency_group=name) for name in GROUPS)
        self._messages: deque[tuple[Any, ...] | None] = deque()
        self._unsent: list[tuple[Any, ...]] = []
        self._ready, self._rings = os.pipe()  # a byte for each message
        self._lock, self._closed = threading.Lock(), False
        self._ended = threading.Event()
        threading.Thread(target=self._carry, daemon=True).start()

    def _carry(self) -> None:
        """In a thread: fetch what the role says, until it is over or lost, or somebody else is that role."""
        import ray

        patience, over = BEGIN, False
        try:
            ray.get(self._begun, timeout=patience)
            patience = LOST
            while not over:
                messages, over = ray.get(self._says.remote(), timeout=patience)
                if not self._push(messages):
                    self._late.update(message[2] if message[0] == "tell" else message[0] for message in messages)
                    break
        except ray.exceptions.GetTimeoutError:
            self.exitcode, self.lost = f"it was not heard of for {patience:g} s", True
        except Exception as error:  # Ray's, of many kinds
            self.exitcode = re.sub(r"\x1b\[\d+m", "", str(error)).strip().split("\n")[-1].strip()
            self.lost = not self._alive()
        self._ended.set()
        self._push([None])
        self.kill()

    def _push(self, messages: list[Any]) -> bool:
        """Let messages be heard; whether there is somebody to hear them."""
        with self._lock:
            if not self._closed:
                self._messages.extend(messages)
                os.write(self._rings, b"." * len(messages))
            return not self._closed

    # As a connection.

    def fileno(self) -> int:
        return self._ready

    def send(self, message: tuple[Any, ...]) -> None:
        self._unsent.append(message)

    def flush(self) -> None:
        """Say what there is to be said, in one call."""
        if self._unsent:
            self._told.remote(*self._unsent)
            self._unsent = []

    def recv(self) -> tuple[Any, ...]:
        os.read(self._ready, 1)
        message = self._messages.popleft()
        if message is None:
            raise EOFError
        return message

    def close(self) -> None:
        self.flush()
        with self._lock:
            if not self._closed:
                self._closed = True
                os.close(self._ready)
                os.close(self._rings)

    # As a process.

    def join(self, patience: float | None = None) -> None:
        self._ended.wait(patience or 0.0)  # who cannot be reached is not waited for

    def is_alive(self) -> bool:
        return not self._ended.is_set()

    def kill(self) -> None:
        import ray

        with contextlib.suppress(Exception):  # it may be gone, or Ray
            ray.kill(self._actor, no_restart=True)


class Nowhere:
    """In place of the process of a role that has no place yet."""

    exitcode = None

    def send(self, message: tuple[Any, ...]) -> None:
        """Nobody hears it."""

    def close(self) -> None: ...

    def join(self, patience: float | None = None) -> None: ...

    def is_alive(self) -> bool:
        return False


class Ray(Local):
    """Runs a graph of roles on the hosts of a Ray cluster.

    A role whose host dies, or is cut off, is started again where there is room; until there is, it is left out, and
    has a place on the next host that joins. What an incarnation that was given up still says is dropped, and counted
    in `late`. Otherwise all is as with `Local`.

    Args:
        address, placement: as of `Cluster`.
        needs: what each role takes, by its name, in Ray's resources; a core by default.
        least: actors that are asked for to begin with, 0 for all; the others join as there is room.
        shares: whether roles on this host share its memory; without, all are Ray actors.
        local: `threads`, `deadline` and so on, of `Local`.
    """

    def __init__(
        self,
        report: Callable[[str, int, int, dict[str, Any]], None],
        *,
        address: str | None = None,
        placement: Literal["spread", "pack"] = "spread",
        needs: Mapping[str, Needs] | None = None,
        least: int = 0,
        shares: bool = True,
        **local: Any,
    ) -> None:
        super().__init__(report, **local)
        self.cluster, self.needs, self.least, self.shares = Cluster(address, placement), needs or {}, least, shares
        self.late: Counter[str] = Counter()  # messages of incarnations that were given up, by kind
        self._at: dict[int, Host] = {}  # of a member, where it is
        self._claimed: set[int] = set()  # members for which there is room on this host until the run ends
        self._shown: dict[tuple[Any, int], int] = {}  # the edition of a box that a seat was last shown
        self._parcels: dict[int, tuple[int, Any]] = {}  # a box's last edition that was sent to a seat
        self._tried = 0.0  # when a place was last looked for
        self._headless = False  # whether the head is lost, as was told
        self._told = 0  # late messages that were reported
        self._warned = False  # that this host is to leave
        self._together = False  # whether a word is memory that all roles share

    def run(
        self, graph: Graph, between: Callable[[int, Callable[[], State]], bool], saved: State | None = None
    ) -> State:
        asked = [self._of(spec) for spec in graph.roles if not (spec.anew and self.least and spec.index >= self.least)]
        names = {spec.name for spec in graph.roles}
        if unknown := sorted(self.needs.keys() - names):
            raise ClusterError(
                f"role_needs names {unknown[0]!r}; the roles of this run are {', '.join(sorted(names))}."
            )
        self._together = any(spec.options.get("once") for spec in graph.words.values())
        self._preload(graph)  # while Ray begins
        with self.cluster.joined(sum(self._of(spec).get("CPU", 0.0) for spec in graph.roles)):
            self.cluster.check(asked, self._together)
            return super().run(graph, between, saved)

    def _arrange(self) -> None:
        """Roles leave the hosts that are about to leave."""
        if not (leaving := self.cluster.leaving):
            return
        self.cluster.look()
        here = self.cluster.here
        if here.node in leaving and not self._warned:
            self._warned = True
            log.warning(LEAVING)
        at = ((member, self._at.get(id(member))) for member in self.members if not member.over)
        if moving := [member for member, host in at if host not in (None, here) and host.node in leaving]:
            self._move(moving)

    # Places.

    def _of(self, spec: RoleSpec) -> Needs:
        """What a role takes."""
        return self.needs.get(spec.name, CORE)

    def _stays(self, member: Member) -> bool:
        """Whether a role has to be on this host: it shares its memory, or is the clock of a run that ends with it."""
        return self._together or member.spec.ends_run or id(member) in self._claimed

    def _place(self, member: Member) -> Host | None:
        staying = [each for each in self.members if self._stays(each) and id(each) not in self._at]
        needs = self._of(member.spec)
        return self.cluster.place(needs, [self._of(each.spec) for each in staying], self._stays(member))

    def _start(self, member: Member) -> None:
        host, needs, claimed = self._place(member), self._of(member.spec), id(member) in self._claimed
        begins = not (member.lives or member.away)  # with the run, which may wait for its claims
        member.away = host is None
        if len(self.cluster.hosts) > 1:
            where = None if host is None else host.name
            self.report("runtime", member.spec.index, self.steps, {"placed": member.name, "host": where})
        if host is None:
            log.warning("%s waits for a host with room for it", member.name)
            member.connection = member.process = Nowhere()
            member.begin()
            return
        self._at[id(member)] = host
        host.taken.update(needs)
        if host is not self.cluster.here or not self.shares or not (begins or claimed):
            self._seat(member, host)
            return
        if not claimed:
            self.cluster.claim(needs, member.name)
            self._claimed.add(id(member))
        super()._start(member)

    def _seat(self, member: Member, host: Host) -> None:
        """Start a role as a Ray actor."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        needs = dict(self._of(member.spec))
        kind = ray.remote(
            num_cpus=needs.pop("CPU", 0.0),
            num_gpus=needs.pop("GPU", 0.0),
            resources=needs,
            scheduling_strategy=NodeAffinitySchedulingStrategy(host.node, soft=False),
            max_restarts=0,  # the runtime starts it again, elsewhere if need be
            concurrency_groups=dict.fromkeys(GROUPS, 1),
        )(Seat)
        actor = kind.remote(sys.path)
        begun = actor.begin.remote(member.spec, member.seed, member.kept, self.threads)
        alive = partial(self.cluster.alive, host.node)
        member.connection = member.process = Seated(actor, begun, alive, self.late)
        member.since, member.over = time.monotonic(), False
        member.begin()

    def _close(self, member: Member, patience: float) -> None:
        super()._close(member, patience)
        if (host := self._at.pop(id(member), None)) is not None:
            host.taken.subtract(self._of(member.spec))

    def _revive(self, member: Member, reason: str, error: BaseException) -> None:
        self.cluster.look()
        host = self._at.get(id(member))
        if host is not None and getattr(member.process, "lost", False):
            host.lost_at = time.monotonic()
            member.failures -= member.waiting is None  # which is not the role's fault
        super()._revive(member, reason, error)

    def _answer_all(self) -> bool:
        answered = super()._answer_all()
        for member in self.members:
            if isinstance(member.connection, Seated):
                member.connection.flush()
        return answered

    def _look_after(self) -> None:
        super()._look_after()
        if (late := self.late.total()) != self._told:
            self._told = late
            self.report("runtime", 0, self.steps, {"late": late})
        if self.cluster.headless != self._headless:
            self._headless = self.cluster.headless
            log.warning(HEADLESS if self._headless else "the head of the cluster is back")
        away = sorted((member for member in self.members if member.away), key=lambda member: member.spec.anew)
        if away and time.monotonic() - self._tried > RETRY:
            self._tried = time.monotonic()
            self.cluster.look()
            for member in away:
                if self._place(member) is not None:
                    self._start(member)
                    self.report("runtime", member.spec.index, self.steps, {"joined": member.name})

    # Boxes.

    def show(self, member: Member, box: Box) -> int:
        seat = member.connection
        if not isinstance(seat, Seated):
            return super().show(member, box)
        known: set[Any] = box.known_to
        if seat not in known:
            self.introduce(member, box)
        elif self._shown.get((seat, box.number)) != box.edition:
            self._send(member, "content", box.number, self._parcel(box))
        self._shown[seat, box.number] = box.edition
        return box.number

    def _parcel(self, box: Box) -> Any:
        """What is in a box, put into the object store once for all seats."""
        import ray

        edition, parcel = self._parcels.get(box.number, (-1, None))
        if edition != box.edition:
            arrays = content(box.value)
            large = sum(array.nbytes for array in arrays) > INLINE
            parcel = Carried(ray.put(arrays)) if large else arrays
            self._parcels[box.number] = box.edition, parcel
        return parcel
