"""The local runtime: each role in a process of its own, the words kept by this one.

Every wait of a role is a question to this process, which answers when the inline runtime's word of the same name would
go on; so both runtimes obey the same rules by the same code, and no lock is shared that a killed process could hold.
What is large lies in boxes, memory that the processes share: only their numbers travel.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import multiprocessing.util
import pickle
import re
import select
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from typing import Any

from rookery.runtimes.arrivals import DIED, KEPT, MESSAGE, MOVED, PAUSE, RELENT, RESUME, TURN, Arrivals
from rookery.runtimes.boxes import fill, packed, unpacked
from rookery.runtimes.forks import preload, started
from rookery.runtimes.inline import Deadlock, RoleError, State, restore, role_seed, said
from rookery.runtimes.local_words import WORDS, Box, Member
from rookery.runtimes.meter import WORK, Meter
from rookery.runtimes.process import UNGUARDED, main
from rookery.runtimes.words import Graph

__all__ = ["Local"]

log = logging.getLogger("rookery")

TICK = 0.2  # seconds after which signals and deadlines are looked at, when nothing happens
UNITS = ("put", "insert", "publish", "answer", "report", "advance")  # what a role says when it has done a unit of work
BURST = 64  # messages heard from one member before the others have their turn
SILENT = ("box", "content")  # messages that nobody goes on for
ASIDE = ("box", "count")  # questions that are answered at once, and lend no work
GRACE = 5.0  # seconds that a role has to close what it holds
WINDOW = 600.0  # seconds in which deaths are counted
LARGE = ("tensordict",)  # modules of which each role would import its own, seconds long, where the run needs them
STARTS = 4  # attempts to start a process, the second after
PAUSE_BEFORE = 0.1  # seconds, the third after twice as many
LONG = 200  # characters of an error's message in a row of metrics


class Local:
    """Runs a graph of roles as processes.

    A role whose process dies or raises, or that is not heard of for `deadline` seconds, is started again from its
    arguments (and the last state that it handed over): the unit of work it was at is dropped and counted, the others
    go on. `failures` in a row without a unit of work done end the run, and so do `often` deaths within ten minutes.
    Who was idle when its process was killed has not failed.

    Args:
        report: takes role, index, step and values of every row.
        threads: of torch, in each process.
        deadline: seconds that a role may work without a word.
        arrivals: where to write down the order in which messages are heard (`Rerun`).
    """

    def __init__(
        self,
        report: Callable[[str, int, int, dict[str, Any]], None],
        *,
        threads: int = 1,
        deadline: float = 600.0,
        failures: int = 3,
        often: int = 20,
        arrivals: Arrivals | None = None,
    ) -> None:
        self.report, self.threads, self.deadline = report, threads, deadline
        self.failures, self.often = failures, often
        self.arrivals = arrivals
        self.steps = self.restarts = self.dropped = 0
        self._traced: set[str] = set()  # why roles have failed, of which the traceback is told
        self.members: list[Member] = []
        self._queue: list[Member] = []  # the members, who was answered longest ago first
        self.words: dict[str, Any] = {}
        self.meter = Meter()
        self._measured: dict[str, Any] | None = None  # when the run was over
        self._since = 0.0  # when there was last nothing to hear
        self._seed = 0  # of the graph
        self._with: tuple[Member, float] | None = None  # who is listened or spoken to, and since when
        self._quiet = threading.Event()  # nobody is heard any more
        self._boxes: dict[int, Box] = {}
        self._paused = False
        self._stirred = False  # whether a question, as it was first looked at, changed anything for others
        self._owing: set[int] = set()  # members whose state was asked for

    # Boxes.

    def box(self, value: Any = None) -> Box:
        made = Box(len(self._boxes), value)
        self._boxes[made.number] = made
        return made

    def lend(self, member: Member, box: Box) -> int:
        """The box's number, once the member knows what it stands for, to be filled."""
        box.edition += 1
        return self.introduce(member, box)

    def show(self, member: Member, box: Box) -> int:
        """The same, to be read."""
        return self.introduce(member, box)

    def introduce(self, member: Member, box: Box) -> int:
        """Tell a member what a box stands for, if it does not know; gives its number."""
        if box.value is not None and member.connection not in box.known_to:
            box.known_to.add(member.connection)
            self._send(member, "box", box.number, box.value)
        return box.number

    def fell_back(self, member: Member, word: str, versions: int, steps: int) -> None:
        """A member has begun again after a death, so many versions before the newest that it had published."""
        plural = "s" if versions > 1 else ""
        log.warning("%s goes on from %s version%s of %s earlier.", member.name, f"{versions:,}", plural, word)
        row = {"fell_back": member.name, "word": word, "undone": versions, "undone_steps": steps}
        self.report("runtime", member.spec.index, self.steps, row)

    # Measuring.

    def measured(self) -> dict[str, Any]:
        """What happened so far (`Meter.measured`).

        A role waits from the moment that its question is heard until it can be answered; messages under way, and what
        the word does to answer, count as its work.
        """
        here = [member for member in self.members if not member.away]
        return self._measured or self.meter.measured(self.words, 1 + len(here))

    # Running.

    def run(
        self, graph: Graph, between: Callable[[int, Callable[[], State]], bool], saved: State | None = None
    ) -> State:
        """Run until a role that ends the run returns, or `between` says so; gives the final state.

        Raises:
            Deadlock: if no role can go on.
            RoleError: if a role fails again and again.
        """
        self.words = {name: WORDS[spec.kind](self, name, **spec.options) for name, spec in graph.words.items()}
        if saved is not None:
            self.steps = saved["steps"]
            for name, word in self.words.items():
                if hasattr(word, "load_state"):
                    restore(word, saved["words"].get(name, {}), name)
        for spec in graph.roles:
            state = None if saved is None else saved["roles"].get(f"{spec.name}_{spec.index}")
            self.members.append(Member(spec, role_seed(graph.seed, spec), packed(state)))
            self.meter.role(self.members[-1].name)
        self._queue, self._seed = list(self.members), graph.seed
        self._prepare(graph)
        self._measured = None
        try:
            for member in sorted(self.members, key=lambda member: member.spec.anew):  # others can do without those
                self._start(member)
            self._since = time.perf_counter()
            self._arrange()
            while not between(self.steps, self.snapshot) and not self._ended():
                self._turn()
                self._arrange()
            return self.snapshot()
        except RoleError as error:
            error.state = self._rescued()
            raise
        finally:
            self._quiet.set()
            self._measured = self.measured()
            self._end()
            if self.arrivals is not None:
                self.arrivals.close()
            self.members, self._queue, self.words, self._boxes = [], [], {}, {}  # which frees the shared memory

    def _arrange(self) -> None:
        """Between turns: move roles that are to go on elsewhere; here there is no elsewhere."""

    @staticmethod
    def _preload(graph: Graph) -> None:
        """Let the server of forks begin; what it has by then, every role has."""
        multiprocessing.util.get_temp_dir()  # one for all processes: a killed one cannot remove its own
        _open_many_files()
        modules = {main.__module__, *(spec.function.__module__ for spec in graph.roles)}
        preload([*sorted(modules), *(name for name in LARGE if name in sys.modules)])

    def _prepare(self, graph: Graph) -> None:
        self._preload(graph)
        self._quiet.clear()
        threading.Thread(target=self._interrupt, daemon=True).start()

    def _interrupt(self) -> None:
        """In a thread: kill who never ends what it began to say, or never listens: this process waits for both."""
        while not self._quiet.wait(min(1.0, self.deadline / 4)):
            if (now_with := self._with) is not None and time.monotonic() - now_with[1] > self.deadline:
                now_with[0].process.kill()

    def snapshot(self) -> State:
        """The run's state once nobody is at work: what is begun is finished, nothing new is started."""
        self._paused = True
        self._note(PAUSE)
        while True:
            while self._answer_all() or not self._idle() or self._finish():
                self._turn()
            self._owing = {id(member) for member in self.members if not member.over and not member.away}
            for member in self.members:
                member.since = time.monotonic()
                self._send(member, "state")
            while self._owing and self._idle():
                self._turn()
            if not self._owing:  # else one has died: once more
                break
        self._paused = False
        self._note(RESUME)
        return self._collected()

    def _rescued(self) -> State | None:
        """The state of a run that a role has ended: its own is what it last handed over."""
        try:
            return self.snapshot()
        except (RoleError, Deadlock):
            return None

    def _collected(self) -> State:
        kept = {f"{member.spec.name}_{member.spec.index}": member.kept for member in self.members}
        return {
            "roles": {name: unpacked(state) for name, state in kept.items() if state is not None},
            "words": {name: word.state() for name, word in self.words.items() if hasattr(word, "state")},
            "steps": self.steps,
        }

    def _finish(self) -> bool:
        """Let one go on while something is on its way that others wait to complete; whether one does."""
        underway = any(getattr(word, "underway", False) for word in self.words.values())
        return underway and any(self._answer(member, paused=False) for member in self.members)

    def _ended(self) -> bool:
        return any(member.over and member.spec.ends_run for member in self.members)

    def _turn(self) -> None:
        """Answer what can be answered, and hear what there is to be heard."""
        self._answer_all()
        self._note(TURN)
        at = {member.connection: member for member in self.members if not member.over and not member.away}
        stuck = self._idle() and not any(member.away for member in self.members)
        if stuck and not self._paused and not self._ended() and not _heard(at, 0):
            if self._relent():
                self._note(RELENT)
                return
            waits = "; ".join(f"{member.name} waits for {member.waits_for}" for member in self.members)
            raise Deadlock(f"no role can go on: {waits}.")
        self.meter.keeper += time.perf_counter() - self._since
        heard = _heard(at, TICK)
        self._since = time.perf_counter()
        for connection in heard:
            self._listen(at[connection])
        self._look_after()

    def _relent(self) -> bool:
        """Let those go on who were made to wait because of a death; whether there are any."""
        return bool(sum(word.relent() for word in self.words.values() if hasattr(word, "relent")))

    def _listen(self, member: Member) -> None:
        """Hear what a member says."""
        connection = member.connection
        for _ in range(BURST):
            try:
                message = self._read(member)
            except (EOFError, OSError) as error:
                self._note(DIED, member)
                cause = _cause(member.process)
                if member.process.exitcode == UNGUARDED:
                    raise RoleError(
                        "processes import the script they are started from, and this one would train again in each: "
                        "put what trains under `if __name__ == '__main__':`, or use runtime='inline'."
                    ) from None
                killed = cause.startswith("signal")
                hint = "" if member.spoke else " before it began" + "; what it says stands above" * (not killed)
                self._revive(member, f"its process ended ({cause}){hint}", error)
                return
            if message[0] == "told":  # which changes nothing
                self.meter.role(member.name).tells(message[1], time.perf_counter())
            else:
                if message[0] not in SILENT and not (message[0] == "ask" and message[2] in ASIDE):
                    self._note(KEPT if message[0] == "kept" else MESSAGE, member)
                self._take(member, message)
            if member.over or member.connection is not connection or not _heard([connection], 0):
                return

    def _read(self, member: Member) -> Any:
        """A member's next message."""
        return self._by(member, member.connection.recv)

    def _by(self, member: Member, talks: Callable[..., Any], *words: Any) -> Any:
        """Hear a member or speak to it; how long that takes is not counted against those who wait to be heard."""
        began = time.monotonic()
        self._with = (member, began)
        try:
            return talks(*words)
        finally:
            self._with = None
            if (blocked := time.monotonic() - began) > TICK:
                for each in self.members:
                    each.since += blocked

    def _take(self, member: Member, message: tuple[Any, ...]) -> None:
        try:
            self._hear(member, *message)
        except RoleError:
            raise
        except Exception as error:  # a word's, on the role's behalf
            raise RoleError(f"{member.name} failed: {said(error)}") from error

    def _note(self, what: int, member: Member | None = None) -> None:
        if self.arrivals is not None:
            self.arrivals.note(what, 0 if member is None else self.members.index(member))

    def _idle(self) -> bool:
        return all(member.over or member.away or member.waiting is not None for member in self.members)

    def _hear(self, member: Member, kind: str, *rest: Any) -> None:
        member.since, member.spoke, self.meter.who = time.monotonic(), True, member.name
        if kind == "tell":
            word, what, args = rest
            getattr(self.words[word], f"tell_{what}")(member, *args)
            self._credit(member, what)
        elif kind == "ask":
            word, what, args = rest
            member.waiting = getattr(self.words[word], f"ask_{what}")(member, *args)
            member.starts, member.works = what in self.words[word].starts, what not in ASIDE
            if member.works:
                self.meter.role(member.name).turn(word, self.meter.begins(member.name))
        elif kind == "box":
            number, value = rest
            self._boxes[number].value = value
            self._boxes[number].known_to = {member.connection}
        elif kind == "content":
            number, content = rest
            fill(self._boxes[number].value, content)
        elif kind == "report":
            self.report(member.spec.name, member.spec.index, *rest)
            self._credit(member, kind)
        elif kind == "within":
            member.within = rest[0]
        elif kind == "advance":  # of several roles at once the furthest; who begins again may have fallen back
            self.steps = max(self.steps, rest[0]) if member.advanced else rest[0]
            member.advanced = True
            self._credit(member, kind)
        elif kind == "kept":
            member.kept, learnt = rest
            if learnt is not None:
                self.words[learnt].leave(member)
        elif kind == "state":
            member.kept = rest[0]
            self._owing.discard(id(member))
        elif kind == "over":
            member.over, member.waits_for, member.kept = True, "nothing, it has ended", rest[0]
            for each in self.words.values():
                if hasattr(each, "leave"):
                    each.leave(member)
            self.meter.role(member.name).turn(None, time.perf_counter())
            self._send(member, "end")
        elif kind == "failed":
            error, trace = rest
            self._revive(member, error, RuntimeError(trace))

    def _credit(self, member: Member, what: str) -> None:
        """Note a unit of work done; failures are forgotten once the run has come further than it was at the last."""
        if member.granted and what in UNITS:
            member.granted = False
            if self.steps > member.failed_at:
                member.failures = 0

    def _answer_all(self) -> bool:
        """Answer what can be answered, and what can be then; whether anything was.

        Who was answered comes last the next time, so that nobody takes all the room there is.
        """
        found, self._stirred = False, True
        while self._stirred:
            self._stirred = False
            served = [member for member in self._queue if self._answer(member, self._paused)]
            self._queue = [member for member in self._queue if member not in served] + served
            self._stirred |= bool(served)
            found |= bool(served)
        return found

    def _answer(self, member: Member, paused: bool) -> bool:
        """Answer a member's question if that can be; whether it was."""
        if member.waiting is None or (paused and member.starts and not member.within):
            return False
        self.meter.who, began = member.name, time.perf_counter()
        try:
            member.waits_for, stirred, _ = member.waiting.send(None)
            self._stirred |= stirred
            return False
        except StopIteration as answer:
            member.waiting, member.since = None, time.monotonic()
            if member.works:
                self.meter.role(member.name).turn(WORK, began)
            member.granted |= member.works
            self._send(member, "answer", answer.value)
            return True
        except Exception as error:
            raise RoleError(f"{member.name} failed: {said(error)}") from error

    # Processes.

    def _start(self, member: Member) -> None:
        for attempt in range(STARTS):
            member.connection, theirs = multiprocessing.Pipe()
            try:
                part = ForkingPickler.dumps((member.spec, member.seed, member.kept))
                process = started(main, (theirs, self.threads), member.name)
                break
            except (AttributeError, TypeError, pickle.PicklingError) as error:
                raise ValueError(
                    f"{member.name} cannot be handed to another process ({error}); make environments, networks and "
                    "functions importable (no lambdas or local classes), or use runtime='inline'."
                ) from error
            except (EOFError, OSError) as error:  # no memory for it, or the server of forks is dead and has to be new
                member.connection.close()
                if attempt == STARTS - 1:
                    raise RoleError(f"{member.name} cannot be started: {error}") from error
                time.sleep(PAUSE_BEFORE * 2**attempt)
            finally:
                theirs.close()
        member.process, member.since, member.over = process, time.monotonic(), False
        member.begin()
        with contextlib.suppress(OSError):  # its end is noticed at the next turn
            self._by(member, member.connection.send_bytes, part)

    def _revive(self, member: Member, reason: str, error: BaseException) -> None:
        """Start a role again that has failed, and take back what it held."""
        self._close(member, 0.0)
        now = time.monotonic()
        member.deaths = [*(then for then in member.deaths if now - then < WINDOW), now]
        member.failures, member.failed_at = member.failures + (member.waiting is None), self.steps
        lost = self._reclaim(member)
        self.dropped += lost
        why = _brief(reason, str(error))
        self.meter.role(member.name).dies(lost, why, time.perf_counter())
        member.over = True  # if it is not started again
        if member.failures >= self.failures:
            raise RoleError(f"{member.name} failed {member.failures} times in a row: {reason}") from error
        if len(member.deaths) >= self.often:
            within = f"{len(member.deaths)} times within {WINDOW / 60:g} minutes"
            raise RoleError(f"{member.name} failed {within}: {reason}") from error
        held = f", and {lost:,} unit{'s' if lost > 1 else ''} of its work dropped" if lost else ""
        trace = "" if isinstance(error, (EOFError, OSError)) or why in self._traced else f"\n{str(error).rstrip()}"
        self._traced.add(why)
        log.warning("%s failed: %s; it is started again%s.%s", member.name, reason.partition("\n")[0], held, trace)
        self.restarts += 1
        row = {"restarted": member.name, "dropped": lost, "reason": why}
        self.report("runtime", member.spec.index, self.steps, row)
        self._start(member)

    def _reclaim(self, member: Member) -> int:
        """Take back what a role held whose process is gone; gives how many units of work are lost."""
        member.lives += 1
        if member.spec.anew:  # or it would do again what it did since its state was taken, and count it twice
            member.kept, member.seed = None, role_seed(self._seed, member.spec, member.lives)
        lost = 0
        for name, word in self.words.items():
            filling = [box for held, box in member.filling.values() if held == name]
            reading = [box for held, box in member.reading.values() if held == name]
            if filling or reading:
                lost += word.reclaim(filling, reading)
            if hasattr(word, "forget"):
                word.forget(member)
        if not (lost or member.reading) and member.granted and member.starts and member.waiting is None:
            lost = 1  # of what lies in no slot: steps and an update of memory that stays, an evaluation
        member.filling, member.reading, member.waiting = {}, {}, None
        return lost

    def _move(self, members: Sequence[Member]) -> None:
        """Start roles anew, elsewhere if that is to be, at a moment when nobody is at work: nothing is lost."""
        for member in members:
            self._note(MOVED, member)
        Local.snapshot(self)
        for member in members:
            if member.over:
                continue
            self._close(member, 0.0)
            self.dropped += self._reclaim(member)
            self.report("runtime", member.spec.index, self.steps, {"moved": member.name})
            self._start(member)

    def _look_after(self) -> None:
        """Start again who has died silently or is not heard of."""
        now = time.monotonic()
        for member in self.members:
            works = (member.waiting is None and not member.away) or id(member) in self._owing
            if works and not member.over and now - member.since > self.deadline:
                reason = f"it was not heard of for {self.deadline:g} s"
                self._note(DIED, member)
                self._revive(member, reason, TimeoutError(reason))

    def _send(self, member: Member, *message: Any) -> None:
        with contextlib.suppress(OSError):  # its end is noticed at the next turn
            self._by(member, member.connection.send, message)

    def _close(self, member: Member, patience: float) -> None:
        """End a process, first by asking, then by force."""
        member.connection.close()
        member.process.join(patience)
        if member.process.is_alive():
            member.process.kill()
            member.process.join()
        if member.waiting is not None:
            member.waiting.close()

    def _end(self) -> None:
        for member in self.members:
            if member.process is not None:
                self._send(member, "end")
        latest = time.monotonic() + GRACE
        begun = [member for member in self.members if member.process is not None]
        try:
            for member in begun:
                self._close(member, max(0.0, latest - time.monotonic()))
        except BaseException:  # Ctrl-C once more: no grace
            for member in begun:
                member.process.kill()
            raise


def _heard(connections: Iterable[Connection], seconds: float) -> list[Connection]:
    """Those to be read from, or whose other end is gone; as `connection.wait`, in a third of its time."""
    poll, at = select.poll(), {connection.fileno(): connection for connection in connections}
    for number in at:
        poll.register(number, select.POLLIN)
    return [at[number] for number, _ in poll.poll(seconds * 1000)]


def _open_many_files() -> None:
    """Each tensor of a box keeps a file open: some 30 an actor, and the usual limit is 1024."""
    with contextlib.suppress(ImportError, OSError, ValueError):  # where there is no such limit, or no way to raise it
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _cause(process: Any) -> str:
    process.join(GRACE)
    code = process.exitcode
    if isinstance(code, str):
        return code
    return f"signal {-code}" if code is not None and code < 0 else f"exit status {code}"


def _brief(reason: str, trace: str) -> str:
    """Why a role ended, in a line: the reason, or of an error what its traceback ends with, and where that is."""
    places = re.findall(r'File "(?:.*[/\\])?(.+?)", line (\d+)', trace)
    if not places:
        return reason
    lines, first = trace.strip().splitlines(), reason.partition("\n")[0]
    said = next((line for line in reversed(lines) if line.endswith(first)), lines[-1])  # a message may have many lines
    return f"it raised {said.strip()[:LONG]} ({places[-1][0]}, line {places[-1][1]})"
