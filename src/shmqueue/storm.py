"""``shmqueue storm``: kill a queue's workers at random, account for every item, say how long the others stood still.

Producers and consumers, a process each, work on one queue. Every few ms one of them is killed and replaced; now and
then one is frozen for a while first. A witness, which is never killed, puts and gets an item after each kill: how
long that takes is the recovery. Three parts: ``Notes`` are what a worker leaves behind however it ends, the
``Ledger`` adds them up, the ``Storm`` decides who dies when. The decisions follow from the seed; what the workers
do meanwhile doesn't.
"""

from __future__ import annotations

import argparse
import dataclasses
import glob
import importlib
import json
import math
import mmap
import os
import queue as stdlib_queue
import random
import secrets
import signal
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import Any, NoReturn

from . import names
from .exceptions import ShmQueueException
from .processes import FORK, Progress, machine, number_from, signals_blocked, signals_exit, when_parent_dies
from .queue import ShmQueue

__all__ = ["Contender", "Ledger", "Notes", "Options", "Report", "Shm", "Storm", "add_command"]

BATCH = 5
"""Items of one put_many or get_many."""

WAIT_S = 3600.0
"""Seconds that a worker waits in a call; it is killed long before. None isn't known to all queues."""

START_S, CALM_S, DRAIN_S = 60.0, 10.0, 60.0
"""Seconds for what isn't measured: the first start, each worker's next item when the killing is over, the emptying."""

DEEP_S = 0.001
"""More of them for each item that stays in the queue."""

TEARDOWN_S = 1.0
"""Seconds until a killed process must have ceased to count. As a rule it has when its parent is told, but who just
reads its ``/proc/<pid>/environ``, as ``ps`` and the like do, holds its memory, and with it its place in the queue."""

FREEZE_S = 0.02
"""Seconds that a worker is stopped, at most."""

MOST_WORKERS = 500
"""512 handles may share a queue."""


@dataclasses.dataclass(frozen=True)
class Options:
    """What a storm shall be like; times in seconds, sizes in bytes."""

    producers: int = 4
    consumers: int = 4
    kills: int = 1000
    every_s: float = 0.01
    stops: int = 100
    lease: bool = False
    deep: int = 0
    buffer_size: int = 1 << 20
    seed: int = 0
    timeout_s: float = 5.0


# ---- items

# Copied inside the queue's locks up to 4096 bytes, outside from there on.
SIZES = (0, 10, 300, 30, 1000, 100, 4000, 3) * 3 + (0, 5000, 50, 20_000, 8, 6000, 200, 60_000)
OVERHEAD = 23  # bytes of an item in the ring beside its payload, at most
PATTERN = random.Random(0).randbytes(0x10000 + max(SIZES))

# An item's number: its producer's above, where it stands among that one's items below.
SEQUENCE = (1 << 32) - 1
AGAIN, TORN = 1 << 63, 1 << 62  # marks that a note bears beside the number


def item(number: int, largest: int) -> list[Any]:
    """An item that shows a tear: its bytes, at most ``largest`` of them, follow from its number."""
    start = number * 7919 & 0xFFFF
    return [number, PATTERN[start : start + min(SIZES[number % len(SIZES)], largest)]]


def read(got: Any, largest: int) -> int:
    """The number of an item, or ``TORN``."""
    is_item = isinstance(got, (list, tuple)) and len(got) == 2 and isinstance(got[0], int) and 0 <= got[0] < TORN
    return got[0] if is_item and list(got) == item(got[0], largest) else TORN


def room(options: Options) -> int:
    """Bytes of the queue: twice what its waiting items take, on average, and what was asked for beside them."""
    mean = OVERHEAD + sum(min(size, options.buffer_size // 4) for size in SIZES) // len(SIZES)
    return options.buffer_size + 2 * options.deep * mean


# ---- what a worker leaves behind


class Notes:
    """What a worker has done, in memory that outlives it: 64-bit words, each written by one store.

    ======  ===================================================================================
    word    what
    ======  ===================================================================================
    0       items whose put has returned; or items got, after the number of the last was written
    1       leases of word 0's whose release has returned
    2, ...  the numbers of the items got
    ======  ===================================================================================

    ``struct.pack_into`` wouldn't do: it clears what it is about to write to.
    """

    def __init__(self, numbers: int = 1 << 18) -> None:
        self._memory = mmap.mmap(-1, 8 * (2 + numbers))
        self._words = memoryview(self._memory).cast("Q")

    @property
    def count(self) -> int:
        return self._words[0]

    @count.setter
    def count(self, count: int) -> None:
        self._words[0] = count

    @property
    def room(self) -> int:
        """How many more numbers can be added."""
        return len(self._words) - 2 - self._words[0]

    def add(self, number: int) -> None:
        count = self._words[0]
        self._words[2 + count] = number
        self._words[0] = count + 1

    def add_release(self) -> None:
        self._words[1] = self._words[0]

    @property
    def numbers(self) -> list[int]:
        return self._words[2 : 2 + self._words[0]].tolist()

    @property
    def held(self) -> list[int]:
        """The item, if any, that was noted and whose release hadn't returned."""
        return self._words[2 + self._words[1] : 2 + self._words[0]].tolist()

    def close(self) -> None:
        self._words.release()
        self._memory.close()


# ---- what the notes say


class Ledger:
    """Adds up the notes of all workers.

    ``hands`` is how many items killed consumers can have held when they died, each what one call of it gets.
    Leases aren't among them: what their holders leave is delivered again.
    """

    def __init__(self) -> None:
        self.deliveries = self.torn = self.late = self.unknown = self.hands = 0
        self._returned: dict[int, int] = {}  # of each producer: puts that have returned
        self._times: dict[int, bytearray] = {}  # of each producer: how often each item was got
        self._held: Counter[int] = Counter()  # by consumers that were killed between note and release

    def add_put(self, producer: int, returned: int) -> None:
        self._returned[producer] = returned

    def add_got(self, notes: Iterable[int], put_so_far: dict[int, int] | None = None, held: Iterable[int] = ()) -> None:
        """Add what one consumer got, in its order.

        Args:
            notes: Numbers with their marks.
            put_so_far: Puts that have returned by now, of the producers that still live.
            held: What it held under a lease when it was killed.
        """
        put = self._returned | (put_so_far or {})
        latest: dict[int, int] = {}
        producer, limit, last, times = -1, 0, -1, bytearray()
        for note in notes:  # millions of them: those of one producer often come in a row
            self.deliveries += 1
            if note & TORN:
                self.torn += 1
                continue
            if (note & ~AGAIN) >> 32 != producer:
                latest[producer] = last
                producer = (note & ~AGAIN) >> 32
                limit = put[producer] + BATCH if producer in put else 0  # no put in progress gets there
                last = latest.get(producer, -1)
                times = self._times.setdefault(producer, bytearray()) if limit else bytearray()
            sequence = note & SEQUENCE
            if sequence >= limit:
                self.unknown += 1
                continue
            if sequence >= len(times):
                times.extend(bytes(sequence + 256 - len(times)))
            times[sequence] += times[sequence] < 255
            if sequence > last:
                last = sequence
            elif not note & AGAIN:  # what a death gave back may come late
                self.late += 1
        self._held.update(number & ~AGAIN for number in held)

    @property
    def put(self) -> int:
        """Items whose put has returned."""
        return sum(self._returned.values())

    @property
    def got(self) -> int:
        """Different items that were got."""
        return sum(len(times) - times.count(0) for times in self._times.values())

    @property
    def cut_off(self) -> int:
        """Items that were got though their producer was killed before their put returned."""
        returned = self._returned
        return sum(len(tail) - tail.count(0) for i, times in self._times.items() for tail in [times[returned[i] :]])

    @property
    def lost(self) -> int:
        """Items that nobody got, though their put has returned."""
        return self.put - (self.got - self.cut_off)

    def repeats(self) -> tuple[int, int]:
        """Deliveries of an item after its first: those before which a holder of it was killed, and all others."""
        explained = unexplained = 0
        for producer, times in self._times.items():
            if times.count(0) + times.count(1) < len(times):
                for sequence, n in enumerate(times):
                    if n > 1:
                        due = min(n - 1, self._held[producer << 32 | sequence])
                        explained += due
                        unexplained += n - 1 - due
        return explained, unexplained


# ---- the queues


class Contender:
    """A queue to try: made here, opened by each worker. This base is one that others inherit by fork."""

    has_batches = False
    """Does it have ``put_many`` and ``get_many`` as a ``ShmQueue`` has?"""

    is_named = False
    """Does it stay when all its processes are killed?"""

    sound = "can't be looked at"
    """What it means that ``faults`` finds none in the end."""

    def __init__(self, label: str, queue: Any) -> None:
        self.label = label
        self._queue = queue

    def open(self) -> Any:
        """The queue, for a worker, which calls this once."""
        return self._queue

    def close(self, queue: Any) -> None:
        """Done with what ``open`` gave."""

    def remove_on_sigterm(self, queue: Any) -> None:
        """Make SIGTERM mean for this process that all others are dying, and that it is to remove a named queue."""

    def held_lock(self, pid: int) -> bool:
        """Does a lock still name this process, which has just died? False if that can't be known."""
        return False

    def faults(self, users: int, *, is_empty: bool = False) -> list[str]:
        """What is wrong, if at most ``users`` processes beside this one can be using it."""
        return []

    def end(self) -> list[str]:
        """Remove it; what is left of it nonetheless."""
        return []


class Shm(Contender):
    """A ``ShmQueue``, or what is given in its place, opened by name."""

    has_batches = is_named = True
    sound = "hold: check() finds nothing, 1 reference is left, 0 bytes are in use"

    def __init__(self, options: Options, kind: type[ShmQueue[Any]] = ShmQueue) -> None:
        self._name = f"storm-{os.getpid()}-{secrets.token_hex(4)}"
        self._kind = kind
        self._size = room(options)
        queue = kind(self._name, buffer_size=self._size)
        super().__init__(f"shmqueue, {queue.max_buffer_size():,} bytes", queue)

    def open(self) -> Any:
        self._queue.shutdown()  # what was inherited; an unrelated process would have no more than the name
        return self._kind(self._name, buffer_size=self._size)

    def close(self, queue: Any) -> None:
        queue.shutdown()

    def remove_on_sigterm(self, queue: Any) -> None:
        queue.set_console_handlers()
        leave: Any = signal.getsignal(signal.SIGTERM)

        def leave_last(number: int, frame: FrameType | None) -> None:
            deadline = time.monotonic() + CALM_S
            while queue.refs > 1 and time.monotonic() < deadline:
                time.sleep(0.01)
            leave(number, frame)

        signal.signal(signal.SIGTERM, leave_last)

    def held_lock(self, pid: int) -> bool:
        return pid in (self._queue._lock_pid(0), self._queue._lock_pid(1))

    def faults(self, users: int, *, is_empty: bool = False) -> list[str]:
        deadline = time.monotonic() + TEARDOWN_S
        while (refs := self._queue.refs) > 1 + users and time.monotonic() < deadline:
            time.sleep(0.001)
        found = [f"{refs} references, at most {1 + users} processes use it"] if refs > 1 + users else []
        if is_empty:
            found += self._queue.check()
            items, size = self._queue.qsize(), self._queue.buffer_occupancy()
            if items or size:
                found.append(f"{items} items, {size} bytes in use in a queue that was emptied")
        return found

    def end(self) -> list[str]:
        self._queue.shutdown()
        return glob.glob(glob.escape(names.segment_path(self._name)) + "*")


def _stdlib(options: Options) -> Contender:
    return Contender("multiprocessing.Queue", FORK.Queue(maxsize=64 + options.deep))


def _faster_fifo(options: Options) -> Contender:
    module = importlib.import_module("faster_fifo")
    size = room(options)
    return Contender(f"faster-fifo, {size:,} bytes", module.Queue(max_size_bytes=size))


AGAINST: dict[str, Callable[[Options], Contender]] = {"multiprocessing": _stdlib, "faster-fifo": _faster_fifo}


# ---- the workers


@dataclasses.dataclass(frozen=True)
class Job:
    """What a worker has to know."""

    number: int
    notes: Notes
    options: Options

    @property
    def largest(self) -> int:
        """Bytes of the largest payload."""
        return self.options.buffer_size // 4

    def item(self, sequence: int) -> list[Any]:
        return item(self.number << 32 | sequence, self.largest)

    def may_take(self, queue: Any) -> bool:
        """Wait until more items wait than shall stay; is there room for another note?

        Not for long: where an item that was given back holds up the room behind it, the queue is full with fewer.
        """
        for _ in range(10):
            if not self.options.deep or queue.qsize() > self.options.deep:
                break
            time.sleep(0.001)
        return self.notes.room > 0


def put(queue: Any, job: Job) -> None:
    for sequence in range(SEQUENCE):
        queue.put(job.item(sequence), timeout=WAIT_S)
        job.notes.count = sequence + 1


def put_many(queue: Any, job: Job) -> None:
    for first in range(0, SEQUENCE - BATCH, BATCH):
        queue.put_many([job.item(sequence) for sequence in range(first, first + BATCH)], timeout=WAIT_S)
        job.notes.count = first + BATCH


def get(queue: Any, job: Job) -> None:
    while job.may_take(queue):
        job.notes.add(read(queue.get(timeout=WAIT_S), job.largest))


def get_many(queue: Any, job: Job) -> None:
    while job.may_take(queue):
        for got in queue.get_many(min(BATCH, job.notes.room), timeout=WAIT_S):
            job.notes.add(read(got, job.largest))


def lease(queue: Any, job: Job) -> None:
    while job.may_take(queue):
        held = queue.lease(timeout=WAIT_S)
        job.notes.add(_read_lease(held, job.largest))
        held.release()
        job.notes.add_release()


def _read_lease(held: Any, largest: int) -> int:
    return read(held.item, largest) | (AGAIN if held.deliveries > 1 else 0)


Work = Callable[[Any, Job], None]
HANDS: dict[Work, int] = {get: 1, get_many: BATCH, lease: 0}
"""What consumers do, and how many items are gone at most if one is killed."""


def _run_worker(parent: int, contender: Contender, work: Work, job: Job, complaints: int) -> NoReturn:
    _obey(parent)
    try:
        queue = contender.open()
        work(queue, job)
        contender.close(queue)
    except BaseException as error:
        os.write(complaints, f"{work.__name__}: {error!r}"[:500].encode() + b"\n")
        os._exit(1)
    os._exit(0)


def _obey(parent: int) -> None:
    """Die with the parent, however it dies; leave Ctrl-C and the first turn on a CPU to it. Signals are blocked yet."""
    os.nice(5)
    when_parent_dies(parent, signal.SIGKILL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])


class Witness:
    """A survivor. In a process of its own, so that a queue that hangs for good doesn't hang the storm with it."""

    def __init__(self, queue: Any, job: Job) -> None:
        self._queue = queue
        self._job = job

    def fill(self, count: int) -> None:
        for _ in range(count):
            self._put(self._job.options.timeout_s)

    def recover(self, since: float) -> tuple[float, int]:
        """Put an item and get some item: seconds from ``since`` on, and the note of what was got."""
        deadline = since + self._job.options.timeout_s
        self._put(max(0.0, deadline - time.monotonic()))
        note = self._take(max(0.0, deadline - time.monotonic()))
        return time.monotonic() - since, note

    def drain(self) -> list[int]:
        """Get all that is there."""
        notes = []
        with suppress(stdlib_queue.Empty):
            while True:
                notes.append(self._take(0.2))
        return notes

    def _put(self, timeout_s: float) -> None:
        notes = self._job.notes
        self._queue.put(self._job.item(notes.count), timeout=timeout_s)
        notes.count += 1

    def _take(self, timeout_s: float) -> int:
        if not self._job.options.lease:
            return read(self._queue.get(timeout=timeout_s), self._job.largest)
        held = self._queue.lease(timeout=timeout_s)
        note = _read_lease(held, self._job.largest)
        held.release()
        return note


def _run_witness(parent: int, contender: Contender, _: Work, job: Job, orders: Connection) -> NoReturn:
    """Answer each order with a verdict, "" if all is well, and what was found."""
    _obey(parent)
    try:
        queue = contender.open()
        if contender.is_named:
            contender.remove_on_sigterm(queue)
            when_parent_dies(parent, signal.SIGTERM)
        witness = Witness(queue, job)
        while (order := orders.recv())[0] != "leave":
            try:
                orders.send(("", getattr(witness, order[0])(*order[1:])))
            except stdlib_queue.Full as error:
                orders.send(("wedged", f"the witness found no room in time. {error}"))
            except stdlib_queue.Empty as error:
                orders.send(("wedged", f"the witness found no item in time. {error}"))
        contender.close(queue)
    except BaseException as error:
        orders.send(("failed", f"the witness: {error!r}"))
    os._exit(0)


# ---- the storm


@dataclasses.dataclass(eq=False)
class Worker:
    """A living worker and what it works at."""

    process: BaseProcess
    work: Work
    job: Job

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    def signal(self, number: int) -> None:
        if self.process.exitcode is None:  # once it has been waited for, its pid may be anybody's
            os.kill(self.pid, number)


@dataclasses.dataclass(frozen=True)
class Recovery:
    """Seconds from a kill until the witness had put an item and got one."""

    count: int
    median_s: float
    p99_s: float
    slowest_s: float

    @classmethod
    def of(cls, seconds: list[float]) -> Recovery | None:
        if not seconds:
            return None
        ordered = sorted(seconds)
        return cls(len(ordered), statistics.median(ordered), ordered[math.ceil(0.99 * len(ordered)) - 1], ordered[-1])


@dataclasses.dataclass(frozen=True)
class Report:
    """What a storm has shown. ``lost`` is None if it ended early, so that nobody knows what was still in the queue."""

    verdict: str
    faults: list[str]
    queue: str
    machine: str
    options: Options
    kills: int
    killed_consumers: int
    stops: int
    seconds: float
    put: int
    got: int
    cut_off: int
    lost: int | None
    lost_at_most: int
    doubled: int
    repeated: int
    torn: int
    late: int
    unknown: int
    recovery: Recovery | None
    owner_recovery: Recovery | None
    invariants: str
    left: list[str]

    @property
    def is_passed(self) -> bool:
        return self.verdict == "passed"

    def __str__(self) -> str:
        lost = "unknown" if self.lost is None else f"{self.lost:,}"
        if self.lost is not None and self.lost_at_most:
            lost += f" (killed consumers can have held {self.lost_at_most:,})"
        rows = [
            ("queue", self.queue),
            ("machine", self.machine),
            ("seed", f"{self.options.seed}"),
            ("kills", f"{self.kills:,} in {self.seconds:.1f} s, {self.killed_consumers:,} of them of consumers"),
            ("stops", f"{self.stops:,}"),
            ("put", f"{self.put:,}, and {self.cut_off:,} by a put that a kill cut off after it had taken effect"),
            ("got", f"{self.got:,}, {self.got / self.seconds:,.0f} a second"),
            ("lost", lost),
            ("doubled", f"{self.doubled:,}"),
            ("torn", f"{self.torn:,}"),
            ("unknown", f"{self.unknown:,}"),
            ("late", f"{self.late:,}" + (" (what a killed consumer gave back)" if self.late else "")),
            ("recovery", _recovery(self.recovery)),
            ("... of an owner", _recovery(self.owner_recovery)),
            ("invariants", self.invariants),
            ("left behind", ", ".join(self.left) or "nothing"),
            *(("fault", fault) for fault in self.faults),
            ("verdict", self.verdict + (f" after {self.kills:,} kills" if self.lost is None else "")),
        ]
        if self.options.lease:
            rows.insert(9, ("worked on twice", f"{self.repeated:,}, each after a holder of it was killed"))
        return "\n".join(f"{name:16} {text}" for name, text in rows)


def _recovery(recovery: Recovery | None) -> str:
    if recovery is None:
        return "none seen"
    ms = [f"{1000 * seconds:.1f}" for seconds in (recovery.median_s, recovery.p99_s, recovery.slowest_s)]
    return f"median {ms[0]} ms, 99 % within {ms[1]} ms, slowest {ms[2]} ms ({recovery.count:,} kills)"


class _Ended(Exception):
    """The storm can't go on."""

    def __init__(self, verdict: str, why: str) -> None:
        super().__init__(verdict, why)
        self.verdict = verdict
        self.why = why


class Storm:
    """Kills workers of a queue at random and replaces them, and looks how the others take it.

    >>> options = Options(kills=100, seed=1)
    >>> print(Storm(options, Shm(options)).run())
    """

    def __init__(self, options: Options, contender: Contender, tell: Callable[[str], None] = lambda line: None) -> None:
        """Args: options; the queue to try, which ends with the storm; who is told after each kill how far it is."""
        self.kills = 0
        self._options = options
        self._contender = contender
        self._tell = tell
        self._random = random.Random(options.seed)
        self._stops_before = Counter(self._random.randrange(options.kills) for _ in range(options.stops))
        self._ledger = Ledger()
        self._next_number = 0
        self._witness: Worker | None = None
        self._workers: list[Worker] = []
        self._killed_consumers = self._stops = 0
        self._recoveries: list[float] = []
        self._owner_recoveries: list[float] = []
        self._problems: list[tuple[str, str]] = []  # verdict, what was found
        self._is_complete = False
        self._invariants = "unknown"
        self._orders, self._theirs = FORK.Pipe()
        self._complaints, self._complain = os.pipe()
        os.set_blocking(self._complaints, False)

    def run(self) -> Report:
        """Storm, once, and report. It ends early when something stands still or fails.

        Whatever is raised meanwhile, such as ``KeyboardInterrupt``, passes on after all processes have
        been ended and the queue has been removed.
        """
        start = time.monotonic()
        try:
            self._begin()
            for n in range(self._options.kills):
                self._strike(self._stops_before[n])
                self._tell(self._progress(time.monotonic() - start))
            self._see_all_go_on()
            self._empty()
        except _Ended as end:
            self._problems.append((end.verdict, end.why))
        finally:
            seconds = time.monotonic() - start
            left = self._end()
        self._judge(left)
        return self._report(seconds, left)

    # ---- one step after the other

    def _begin(self) -> None:
        with signals_blocked():
            self._witness = self._start(_run_witness, put, self._theirs)
        self._theirs.close()
        self._ask("fill", self._options.deep)
        self._answer(START_S + self._options.deep * DEEP_S)
        puts, gets = ([put, put_many], [get, get_many]) if self._contender.has_batches else ([put], [get])
        if self._options.lease:
            gets = [lease]
        works = [puts[n % len(puts)] for n in range(self._options.producers)]
        works += [gets[n % len(gets)] for n in range(self._options.consumers)]
        for work in works:
            with signals_blocked():
                self._workers.append(self._start(_run_worker, work, self._complain))

    def _start(self, run: Callable[..., NoReturn], work: Work, channel: Any) -> Worker:
        """Call this with signals blocked: none may come between the start and its being remembered."""
        job = Job(self._next_number, Notes(), self._options)
        self._next_number += 1
        process = FORK.Process(target=run, args=(os.getpid(), self._contender, work, job, channel), daemon=True)
        process.start()
        return Worker(process, work, job)

    def _strike(self, stops: int) -> None:
        """Wait a little, freeze some, kill one, wake the frozen, and time how the witness fares."""
        time.sleep(self._random.uniform(0, self._options.every_s))
        frozen = [self._freeze() for _ in range(stops)]
        index = self._random.randrange(len(self._workers))
        victim = self._workers[index]
        since = time.monotonic()
        victim.process.kill()
        for worker in frozen:
            worker.signal(signal.SIGCONT)
        victim.process.join()
        held_lock = self._contender.held_lock(victim.pid)
        self._ask("recover", since)
        self.kills += 1
        self._killed_consumers += victim.work in HANDS
        for fault in self._contender.faults(len(self._workers)):
            raise _Ended("corrupted", fault)
        self._replace(index)
        recovery, note = self._answer(self._options.timeout_s + 1)  # the witness is the first to give up
        self._ledger.add_got([note], self._put_so_far())
        self._recoveries.append(recovery)
        if held_lock:
            self._owner_recoveries.append(recovery)
        if recovery > self._options.timeout_s:
            raise _Ended("wedged", f"a recovery took {recovery:.4g} s, {self._options.timeout_s:g} s were allowed")
        self._replace_ended()

    def _freeze(self) -> Worker:
        worker = self._random.choice(self._workers)
        worker.signal(signal.SIGSTOP)
        self._stops += 1
        time.sleep(self._random.uniform(0, FREEZE_S))
        return worker

    def _replace_ended(self) -> None:
        for index, worker in enumerate(self._workers):
            if worker.process.exitcode is not None:
                self._replace(index)

    def _replace(self, index: int) -> None:
        """Start another in place of one that was killed, or that went because its notes were full."""
        ended = self._workers[index]
        if ended.process.exitcode not in (0, -signal.SIGKILL):
            raise _Ended("failed", self._complaint() or f"{ended.work.__name__} ended with {ended.process.exitcode}")
        with signals_blocked():
            self._workers[index] = self._start(_run_worker, ended.work, self._complain)
        self._absorb(ended)

    def _complaint(self) -> str:
        try:
            return os.read(self._complaints, 1 << 16).decode(errors="replace").strip()
        except BlockingIOError:
            return ""

    def _absorb(self, ended: Worker) -> None:
        """Take over the notes of one that has been waited for."""
        notes = ended.job.notes
        if ended.work in HANDS:
            held = notes.held if ended.work is lease else []
            self._ledger.add_got(notes.numbers, self._put_so_far(), held)
            if ended.process.exitcode != 0:
                self._ledger.hands += HANDS[ended.work]
        else:
            self._ledger.add_put(ended.job.number, notes.count)
        notes.close()
        with suppress(ValueError):  # "still running": Ctrl-C came after the wait and before its result was stored
            ended.process.close()

    def _put_so_far(self) -> dict[int, int]:
        alive = [*self._workers, self._witness] if self._witness else self._workers
        return {each.job.number: each.job.notes.count for each in alive if each.work not in HANDS}

    def _see_all_go_on(self) -> None:
        """The killing is over: each worker must put or get something yet."""
        deadline = time.monotonic() + CALM_S
        waiting = [(worker, worker.job.notes.count) for worker in self._workers]
        while waiting := [(w, n) for w, n in waiting if w in self._workers and w.job.notes.count == n]:
            if time.monotonic() > deadline:
                works = ", ".join(worker.work.__name__ for worker, _ in waiting)
                raise _Ended("wedged", f"stood still for {CALM_S:g} s after the last kill: {works}")
            time.sleep(0.001)
            self._replace_ended()

    def _empty(self) -> None:
        """End the workers, get what they left, and look whether all is in order then."""
        assert self._witness is not None
        self._reap_workers()
        self._ask("drain")
        self._ledger.add_got(self._answer(DRAIN_S + self._options.deep * DEEP_S), self._put_so_far())
        self._ask("leave")
        self._witness.process.join(self._options.timeout_s)
        self._is_complete = True
        faults = self._contender.faults(0, is_empty=True)
        self._problems += [("corrupted", fault) for fault in faults]
        self._invariants = "broken" if faults else self._contender.sound

    def _reap_workers(self) -> None:
        workers, self._workers = self._workers, []
        for worker in workers:
            worker.process.kill()
        for worker in sorted(workers, key=lambda each: each.work in HANDS):  # producers first: what is known then
            worker.process.join()
            self._absorb(worker)

    def _end(self) -> list[str]:
        """End all processes and remove the queue; what is left of it nonetheless."""
        with signals_blocked():
            if self._witness is not None:
                self._witness.process.kill()
                self._witness.process.join()
            self._reap_workers()
            if self._witness is not None:
                self._absorb(self._witness)
            left = self._contender.end()
            self._orders.close()
            self._theirs.close()
            os.close(self._complaints)
            os.close(self._complain)
        return left

    # ---- the witness

    def _ask(self, *order: Any) -> None:
        self._orders.send(order)

    def _answer(self, within_s: float) -> Any:
        deadline = time.monotonic() + within_s
        while not self._orders.poll(0.02):
            if time.monotonic() > deadline:
                raise _Ended("wedged", f"the witness's call hasn't come back within {within_s:g} s")
            self._replace_ended()  # the witness may be waiting for one of them
        try:
            verdict, found = self._orders.recv()
        except EOFError:
            raise _Ended("failed", "the witness has ended") from None
        if verdict:
            raise _Ended(verdict, found)
        return found

    # ---- what it comes to

    def _judge(self, left: list[str]) -> None:
        """Turn what the ledger shows into verdicts; an earlier one comes first."""
        ledger, hands = self._ledger, self._ledger.hands
        doubled = ledger.repeats()[1]
        lost = ledger.lost if self._is_complete else 0
        for verdict, is_so, what in (
            ("lost", lost > hands, f"{lost:,} items lost; killed consumers can have held {hands:,}"),
            ("doubled", doubled > 0, f"{doubled:,} deliveries of an item that nobody had left behind"),
            ("torn", ledger.torn > 0, f"{ledger.torn:,} items that aren't what was put"),
            ("unknown", ledger.unknown > 0, f"{ledger.unknown:,} items that nobody can have put"),
            ("out of order", ledger.late > hands, f"{ledger.late:,} items late; at most {hands:,} were given back"),
            ("left behind", bool(left), ", ".join(left)),
        ):
            if is_so:
                self._problems.append((verdict, what))

    def _progress(self, seconds: float) -> str:
        got = sum(each.job.notes.count for each in self._workers if each.work in HANDS) + self._ledger.deliveries
        return (
            f"{self.kills:,} of {self._options.kills:,} kills, {got / seconds:,.0f} items/s, "
            f"slowest recovery {1000 * max(self._recoveries):.1f} ms"
        )

    def _report(self, seconds: float, left: list[str]) -> Report:
        ledger = self._ledger
        repeated, doubled = ledger.repeats()
        return Report(
            verdict=self._problems[0][0] if self._problems else "passed",
            faults=[what for _, what in self._problems],
            queue=self._contender.label,
            machine=machine(),
            options=self._options,
            kills=self.kills,
            killed_consumers=self._killed_consumers,
            stops=self._stops,
            seconds=seconds,
            put=ledger.put,
            got=ledger.got,
            cut_off=ledger.cut_off,
            lost=ledger.lost if self._is_complete else None,
            lost_at_most=ledger.hands,
            doubled=doubled,
            repeated=repeated,
            torn=ledger.torn,
            late=ledger.late,
            unknown=ledger.unknown,
            recovery=Recovery.of(self._recoveries),
            owner_recovery=Recovery.of(self._owner_recoveries),
            invariants=self._invariants,
            left=left,
        )


# ---- the command

DESCRIPTION = """\
Kill the workers of a queue at random and see whether the others go on. Producers and consumers, a process
each, work on a queue of their own; every few ms one is killed by SIGKILL and replaced, and now and then one
is frozen for some ms by SIGSTOP. A witness that is never killed then puts an item and gets one: how long
that takes, counted from the kill, is the recovery. Each worker notes what it has done in memory that
outlives it, so that in the end every item is accounted for: lost, doubled, torn, or out of order."""

EPILOG = """\
An item that a consumer has taken dies with it; with --lease it doesn't, and is worked on twice if its holder
is killed between its note and the release. Nothing else may get lost, and nothing be doubled.

exit code: 0 if all went well, 1 if not, 2 for arguments that can't do, 130 after Ctrl-C. With --against it
is 0 as soon as there is a verdict, whatever that is: most queues are expected to end as 'wedged'."""


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``storm`` to the subcommands of ``shmqueue``."""
    parser = commands.add_parser(
        "storm",
        help="kill a queue's workers at random and account for every item",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add, default = parser.add_argument, Options()
    some, any_number = number_from(int, 1), number_from(int, 0)
    add("--producers", type=some, default=default.producers, metavar="N", help="default: %(default)s")
    add("--consumers", type=some, default=default.consumers, metavar="N", help="default: %(default)s")
    add("--kills", type=some, default=default.kills, metavar="N", help="SIGKILLs; default: %(default)s")
    add(
        "--every", type=number_from(float, 0), default=default.every_s * 1000, metavar="MS",
        help="longest pause between two kills, at random from 0 on; default: %(default)g",
    )  # fmt: skip
    add("--stops", type=any_number, metavar="N", help="SIGSTOPs; default: a tenth of the kills")
    add("--lease", action="store_true", help="consumers lease instead of get")
    add(
        "--deep", type=any_number, default=default.deep, metavar="N",
        help="keep about N items waiting, each takes about 7 KB of /dev/shm, or 0.8 KB with --buffer-size 4096; "
        "default: %(default)s",
    )  # fmt: skip
    add(
        "--buffer-size", type=number_from(int, 4096), default=default.buffer_size, metavar="BYTES",
        help="room for what isn't kept waiting; an item takes a quarter at most; default: %(default)s",
    )  # fmt: skip
    add("--seed", type=int, metavar="N", help="same seed, same decisions; default: a random one")
    add(
        "--timeout", type=number_from(float, 0.001), default=default.timeout_s, metavar="S",
        help="a longer recovery ends the storm as 'wedged'; default: %(default)g",
    )  # fmt: skip
    add("--against", choices=sorted(AGAINST), help="try this queue instead")
    add("--json", action="store_true", help="report in JSON")
    add("--verbose", action="store_true", help="tell how far it is, each second, also where there is no terminal")
    parser.set_defaults(run=lambda arguments: _run_command(parser, arguments))


def _run_command(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> int:
    if arguments.producers + arguments.consumers > MOST_WORKERS:
        parser.error(f"{arguments.producers + arguments.consumers} workers; at most {MOST_WORKERS} can share a queue")
    if arguments.lease and arguments.against:
        parser.error(f"--lease: {arguments.against} has no leases")
    options = Options(
        producers=arguments.producers,
        consumers=arguments.consumers,
        kills=arguments.kills,
        every_s=arguments.every / 1000,
        stops=arguments.kills // 10 if arguments.stops is None else arguments.stops,
        lease=arguments.lease,
        deep=arguments.deep,
        buffer_size=arguments.buffer_size,
        seed=secrets.randbits(32) if arguments.seed is None else arguments.seed,
        timeout_s=arguments.timeout,
    )
    progress = Progress(arguments.verbose)
    storm = None
    try:
        with signals_exit():
            storm = Storm(options, AGAINST.get(arguments.against, Shm)(options), progress)
            report = storm.run()
    except ModuleNotFoundError as error:
        parser.error(f"--against {arguments.against}: {error}; try: {sys.executable} -m pip install faster-fifo")
    except KeyboardInterrupt:
        progress.clear()
        kills = storm.kills if storm else 0
        print(f"interrupted after {kills:,} kills; the workers are ended, the queue is removed", file=sys.stderr)
        return 128 + signal.SIGINT
    except (ShmQueueException, OSError) as error:
        progress.clear()
        print(f"the storm itself failed: {error}", file=sys.stderr)
        return 1
    progress.clear()
    print(json.dumps(dataclasses.asdict(report), indent=2) if arguments.json else report)
    return 0 if report.is_passed or arguments.against else 1
