"""Hostile memory: overwrites a queue's segment at random while processes use all of the queue's API.

python tests/fuzz.py --seconds 60 [--overwrites 1000000] [--seed 1]

The parent never attaches. It maps the segment's file and writes into header, tables and ring, while its workers make
random calls with short timeouts; every few hundred overwrites all go over to a new queue. First, one worker opens files
that are no queues, or broken ones. Whatever stands there, a call must end in time, with a result or an error documented
for it. Failures are:

- a worker that a signal or a sanitizer has ended
- an error not documented for the call, or a ShmQueueCorruptedError that doesn't name field, found and allowed
- a call that takes GRACE_S longer than its timeout
- a worker that grows by GROWTH bytes
- a segment that outlives its handles

Payloads are overwritten too, and loading a hostile pickle may do anything, by design. So no worker loads one: handles
that get have allow_pickle=False, and those that may pickle only put. The seed repeats a run's choices, not its races.
"""

from __future__ import annotations

import argparse
import faulthandler
import itertools
import logging
import math
import mmap
import os
import pickle
import random
import re
import resource
import signal
import socket
import struct
import sys
import tempfile
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from shmqueue import SerializationMethods, ShmQueue, exceptions

try:
    import numpy
except ImportError:
    numpy = None  # type: ignore[assignment]

GRACE_S = 2.0
LOOK_S = 2.0  # check() and clear() wait so long for a lock
GROWTH = 256 << 20
ADDRESS_SPACE = 2 << 30  # more than a worker has when it starts; one length of 4 GiB is too much
PAGE = mmap.PAGESIZE
NAME = f"fuzz.{os.getpid()}"
IS_SANITIZED = "libasan" in Path("/proc/self/maps").read_text()


def path_of(name: str) -> Path:
    return Path(f"/dev/shm/shmqueue.{name}")


class LogFilter(logging.Filter):
    """Burying an item is logged; it happens all the time here."""

    def filter(self, record: logging.LogRecord) -> bool:
        return "moved to" not in record.getMessage()


# ---- the board: what everybody does, in memory that all share


class Board:
    """A row per thread: the queue it is at, counts of outcomes, the call it is in, since when, with which timeout, and
    the call that took longest beyond its timeout."""

    ROW = struct.Struct("5Q2d32sd32s")
    OUTCOMES = ("working", "corrupted", "other errors")
    PER_WORKER = 4  # rows: the main thread, a forked child, two threads

    def __init__(self, workers: int) -> None:
        self.rows = workers * self.PER_WORKER
        self.memory = mmap.mmap(-1, 8 + self.rows * self.ROW.size)

    @property
    def queue(self) -> int:
        """The queue that all should be at; 0: there will be no more."""
        return int(struct.unpack_from("Q", self.memory)[0])

    @queue.setter
    def queue(self, number: int) -> None:
        struct.pack_into("Q", self.memory, 0, number)

    def _at(self, row: int) -> int:
        return 8 + row * self.ROW.size

    def row(self, row: int) -> tuple[Any, ...]:
        return self.ROW.unpack_from(self.memory, self._at(row))

    def arrive(self, row: int, number: int) -> None:
        struct.pack_into("Q", self.memory, self._at(row), number)

    def begin(self, row: int, call: str, seconds: float) -> None:
        struct.pack_into("2d32s", self.memory, self._at(row) + 40, time.monotonic(), seconds, call.encode())

    def end(self, row: int, outcome: int, excess: float) -> None:
        _, calls, *counts, _, _, call, longest, _ = self.row(row)
        counts[outcome] += 1
        struct.pack_into("4Qd", self.memory, self._at(row) + 8, calls + 1, *counts, 0.0)
        if excess > longest:
            struct.pack_into("d32s", self.memory, self._at(row) + 88, excess, call)

    def idle(self, row: int) -> None:
        struct.pack_into("d", self.memory, self._at(row) + 40, 0.0)

    def overdue(self) -> Iterator[str]:
        now = time.monotonic()
        for row in range(self.rows):
            since, seconds, call = self.row(row)[5:8]
            if since and now - since > seconds + GRACE_S:
                worker, thread = divmod(row, self.PER_WORKER)
                yield f"worker {worker}, row {thread}: in {text(call)} for {now - since:.1f} s, timeout {seconds} s"

    def totals(self) -> list[int]:
        """Calls, and calls of each outcome."""
        return [sum(column) for column in zip(*(self.row(row)[1:5] for row in range(self.rows)), strict=True)]

    def longest(self) -> str:
        excess, call = max(self.row(row)[8:] for row in range(self.rows))
        return f"{text(call)} came back latest, {excess:.3f} s after its timeout"

    def __str__(self) -> str:
        lines = []
        for row in range(self.rows):
            number, calls, *_, since, _, call, _, _ = self.row(row)
            if calls:
                state = f"in for {time.monotonic() - since:.3f} s" if since else "back from"
                lines.append(f"  worker {row // self.PER_WORKER}, queue {number}: {state} {text(call)}")
        return "\n".join(lines)


def text(padded: bytes) -> str:
    return padded.rstrip(b"\0").decode()


# ---- a player: random calls on one queue, and what may come of each

GET = (exceptions.ShmQueueEmpty, exceptions.ShmQueueDeserializationError)
PUT = (exceptions.ShmQueueFull, exceptions.ShmQueueValueError, exceptions.ShmQueueSerializationError)
CLOSED = (exceptions.ShmQueueNotInitializedError,)
NAMES_ALL = re.compile(r"is no intact queue: (it is no regular file|[\w. -]+ is \w+, expected is \w+);")
OWN_METHOD = SerializationMethods.FIRST_PUBLIC_NUMBER + 1


class Player:
    """One thread's calls. ``queue`` gets and doesn't load pickles; ``sender`` puts, and may pickle."""

    def __init__(self, board: Board, row: int, rng: random.Random, name: str, size: int) -> None:
        self.board, self.row, self.rng, self.name, self.size = board, row, rng, name, size
        self.leases: list[Any] = []
        self.may_be_closed = False

    def open(self, errors: tuple[type[Exception], ...] = ()) -> bool:
        """Open both handles; with ``errors`` it may be refused."""
        self.sender = self.opened(errors, allow_pickle=True)
        self.queue = self.opened(errors, allow_pickle=False)
        return self.queue is not None and self.sender is not None

    def opened(self, errors: tuple[type[Exception], ...], **options: Any) -> Any:
        q = self.call("open", 0, errors, ShmQueue, self.name, buffer_size=self.size, message="has format", **options)
        if q is not None:
            q.custom_serialize(lambda _method, data: data)
            if self.rng.random() < 0.8:
                q.custom_deserialize(lambda _method, chunks: bytes(chunks[0]))
        return q

    def call(
        self,
        what: str,
        seconds: float,
        errors: tuple[type[Exception], ...],
        function: Callable[..., Any],
        *args: Any,
        message: str = "",
        **options: Any,
    ) -> Any:
        """Call ``function``, which may raise ``errors`` with ``message`` in them; None if it raises."""
        if self.may_be_closed:
            errors += CLOSED
        result, outcome, start = None, 0, time.monotonic()
        self.board.begin(self.row, what, seconds)
        try:
            result = function(*args, **options)
        except exceptions.ShmQueueCorruptedError as error:
            outcome = 1
            if not NAMES_ALL.search(str(error)):
                raise AssertionError(f"{what}: not all is named") from error
        except errors as error:
            outcome = 2
            if message not in str(error) and not isinstance(error, CLOSED):
                raise AssertionError(f"{what}: not documented") from error
        took = time.monotonic() - start
        self.board.end(self.row, outcome, took - seconds)
        assert took <= seconds + GRACE_S, f"{what} took {took:.1f} s, its timeout is {seconds} s"
        return result

    def move(self) -> None:
        self.rng.choices(MOVES, WEIGHTS)[0](self)

    # -- what is put, and how long it may take

    def timeout(self) -> float:
        return self.rng.choice((0.0, 0.0, 0.001, 0.005, 0.03))

    def item(self) -> Any:
        rng = self.rng
        kind = rng.randrange(12)
        if kind == 0 and numpy is not None:
            return numpy.arange(rng.choice((1, 100, 5000)))
        if kind == 1:
            return {rng.random(), "a set goes by pickle"}
        if kind == 2:
            return {"k": [1, "ü", None, {"deep": [[[1.5]]]}], "n": rng.getrandbits(60)}
        if kind == 3:
            return [bytes(rng.randrange(3000)), bytes(rng.randrange(6000))]
        if kind < 7:
            return bytes(rng.choice((0, 1, 100, 1000, 4080, 4096, 5000, self.size // 2, self.size - 13, self.size)))
        return rng.choice((None, True, rng.getrandbits(64), "x" * rng.randrange(300), bytearray(50), (1, 2)))

    # -- moves

    def put(self) -> None:
        q, timeout = self.rng.choice((self.queue, self.sender)), self.timeout()
        self.call("put", timeout, PUT, q.put, self.item(), timeout=timeout)

    def put_nowait(self) -> None:
        self.call("put_nowait", 0, PUT, self.rng.choice((self.queue, self.sender)).put_nowait, self.item())

    def put_by_own_method(self) -> None:
        payload = self.rng.randbytes(self.rng.choice((0, 10, 6000)))
        self.call("put by a method", 0, PUT, self.queue.put, payload, block=False, serialization_method=OWN_METHOD)

    def put_many(self) -> None:
        items = [self.item() for _ in range(self.rng.choice((1, 5, 80)))]
        timeout = self.timeout()
        given = items if self.rng.random() < 0.7 else iter(items)
        self.call("put_many", timeout, PUT, self.sender.put_many, given, timeout=timeout)

    def get(self) -> None:
        timeout = self.timeout()
        self.call("get", timeout, GET, self.queue.get, timeout=timeout)

    def get_nowait(self) -> None:
        self.call("get_nowait", 0, GET, self.queue.get_nowait)

    def get_many(self) -> None:
        timeout, most = self.timeout(), self.rng.choice((None, 1, 10, 1000))
        self.call("get_many", timeout, GET, self.queue.get_many, most, timeout=timeout)

    def lease(self) -> None:
        timeout, most = self.timeout(), self.rng.choice((None, None, 1, 3))
        lease = self.call(
            "lease",
            timeout,
            (*GET, exceptions.ShmQueueFull, exceptions.ShmQueueValueError),  # of the dead-letter queue
            self.queue.lease,
            timeout=timeout,
            max_deliveries=most,
            copy=self.rng.random() < 0.5,
        )
        if lease is not None:
            self.leases.append(lease)
            assert lease.__enter__() is lease.item
            assert not lease.is_over
            assert f"delivery {lease.deliveries}" in repr(lease)
        while len(self.leases) > self.rng.randrange(8):
            self.end_a_lease()

    def end_a_lease(self) -> None:
        lease = self.leases.pop(self.rng.randrange(len(self.leases)))
        how = self.rng.randrange(5)
        if how == 0:
            self.call("release", 0, (), lease.release)
            self.call("release again", 0, (exceptions.ShmQueueRuntimeError,), lease.release, message="is over")
        elif how == 1:
            self.call("give_back", 0, (), lease.give_back)
        elif how == 2:
            self.call("leave a lease", 0, (), lease.__exit__, None, None, None)
        elif how == 3:
            self.call("leave a lease by an error", 0, (), lease.__exit__, KeyError, KeyError(), None)
        else:
            lease = None  # given back by being forgotten

    def reserve(self) -> None:
        rng, timeout = self.rng, self.timeout()
        size = rng.choice((0, 1, 100, 5000, self.size // 2, self.size))
        room = self.call("reserve", timeout, PUT, self.queue.reserve, size, timeout=timeout)
        if room is None:
            return
        buffer = room.buffer
        buffer[: size // 2] = bytes(size // 2)
        if rng.random() < 0.3:
            self.call("put while one is reserved", 0, PUT, self.queue.put, 1, block=False)
        how = rng.randrange(4)
        if how == 0:
            self.call("commit", 0, (), room.commit)
            self.call("commit again", 0, (exceptions.ShmQueueRuntimeError,), room.commit, message="is over")
        elif how == 1:
            self.call("abandon", 0, (), room.abandon)
        elif how == 2:
            self.call("leave a reservation by an error", 0, (), room.__exit__, KeyError, KeyError(), None)

    def look(self) -> None:
        q = self.queue
        for what, function in [
            ("qsize", q.qsize),
            ("empty", q.empty),
            ("full", q.full),
            ("buffer_occupancy", q.buffer_occupancy),
            ("snapshot", q.snapshot),
            ("refs", lambda: q.refs),
            ("max_buffer_size", q.max_buffer_size),
        ]:
            if self.rng.random() < 0.3:
                self.call(what, 0, (), function)

    def count_references(self) -> None:
        errors = (exceptions.ShmQueueValueError, exceptions.ShmQueueRuntimeError)
        self.call("add_ref_manually", 0, (), self.queue.add_ref_manually, self.rng.choice((1, os.getpid())))
        self.call("reduce_ref_counter", 0, errors, self.queue.reduce_ref_counter, message="reference")

    def check(self) -> None:
        self.call("check", LOOK_S, (exceptions.ShmQueueRuntimeError,), self.queue.check, message="lock is held")

    def clear(self) -> None:
        self.call("clear", LOOK_S, (exceptions.ShmQueueRuntimeError,), self.queue.clear, message="lock is held")

    def come_and_go(self) -> None:
        errors = (exceptions.ShmQueueRuntimeError,)
        if self.rng.random() < 0.5:
            other = self.opened(errors, allow_pickle=False)
        else:
            copy = pickle.dumps(self.queue)
            other = self.call("unpickle a handle", 0, errors, pickle.loads, copy, message="has format")
        if other is not None:
            self.call("get by another handle", 0, GET, other.get_nowait)
            self.close(other)

    def close(self, q: ShmQueue[Any]) -> None:
        self.call("shutdown", 0, (), q.shutdown)
        self.call("put after shutdown", 0, CLOSED, q.put, 1)

    def fork(self) -> None:
        """A child plays on the inherited handles; some are killed."""
        if self.row % Board.PER_WORKER != 0 or threading.active_count() > 1:
            return
        pid = self.call("fork", 0, (), os.fork)
        if pid == 0:
            run_and_exit(self.be_the_child)
        deadline = time.monotonic() + 30
        is_killed = self.rng.random() < 0.3
        if is_killed:
            time.sleep(self.rng.random() * 0.01)
            os.kill(pid, signal.SIGKILL)
        while (ended := os.waitpid(pid, os.WNOHANG))[0] == 0:
            assert time.monotonic() < deadline, "a forked child doesn't end"
            time.sleep(0.001)
        self.board.idle(self.row + 1)
        code = os.waitstatus_to_exitcode(ended[1])
        assert code == 0 or (is_killed and code == -signal.SIGKILL), f"a forked child ended with {code}"

    def be_the_child(self) -> None:
        self.board.idle(self.row)
        self.row += 1
        self.rng = random.Random(self.rng.random())
        for lease in self.leases:
            self.call("release the parent's", 0, (exceptions.ShmQueueRuntimeError,), lease.release, message="forked")
            self.call("leave the parent's", 0, (), lease.__exit__, None, None, None)
        self.leases.clear()
        for _ in range(self.rng.randrange(15)):
            self.move()
        if self.rng.random() < 0.5:
            self.leave()

    def leave(self) -> None:
        if self.rng.random() < 0.5:
            while self.leases:
                self.end_a_lease()
        self.close(self.queue)
        self.close(self.sender)
        self.leases.clear()


MOVES_BY_WEIGHT: dict[Callable[[Player], None], int] = {
    Player.put: 20, Player.put_nowait: 10, Player.put_by_own_method: 4, Player.put_many: 5,
    Player.get: 14, Player.get_nowait: 12, Player.get_many: 8, Player.lease: 14, Player.reserve: 6,
    Player.look: 10, Player.count_references: 2, Player.check: 2, Player.clear: 1,
    Player.come_and_go: 2, Player.fork: 1,
}  # fmt: skip
MOVES, WEIGHTS = list(MOVES_BY_WEIGHT), list(MOVES_BY_WEIGHT.values())


# ---- workers


def run_and_exit(work: Callable[[], object]) -> NoReturn:
    """Run ``work`` in a forked child or a thread; an exception ends the process."""
    code = 1
    try:
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def watch_own_growth() -> Callable[[], None]:
    """Return what fails when this process has grown too much since now. In the plain build it can't even ask for a
    lot; in the sanitized one that is ASan's max_allocation_size_mb."""

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE

    if not IS_SANITIZED:
        limit = int(Path("/proc/self/statm").read_text().split()[0]) * PAGE + ADDRESS_SPACE
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    start = resident()

    def look() -> None:
        grown = resident() - start
        assert grown < GROWTH, f"grown by {grown >> 20} MiB"

    return look


def play_in_a_thread(player: Player, is_over: Callable[[], bool]) -> threading.Thread:
    """Play on the handles of another player, which may shut them down any time; also wait without timeout."""

    def play() -> None:
        try:
            while not is_over():
                if player.rng.random() < 0.02:
                    forever = player.rng.choice((player.queue.get, player.queue.__next__, player.queue.lease))
                    player.call("get without timeout", math.inf, GET, forever)
                else:
                    player.move()
            player.leases.clear()
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)

    thread = threading.Thread(target=play, daemon=True)
    thread.start()
    return thread


def size_of(number: int) -> int:
    return (1, 5, 4, 40)[number % 4] * PAGE


def work(board: Board, worker: int, seed: int) -> None:
    row = worker * Board.PER_WORKER
    if worker == 2:  # its sleeps are interrupted
        signal.signal(signal.SIGALRM, lambda *_: None)
        signal.setitimer(signal.ITIMER_REAL, 0.005, 0.005)
    look_at_growth, n_moves = None, 0
    while (number := board.queue) != 0:
        rngs = [random.Random(f"{seed} {number} {worker} {i}") for i in range(3)]
        player, *others = (
            Player(board, row + place, rng, f"{NAME}.{number}", size_of(number))
            for place, rng in zip((0, 2, 3), rngs, strict=True)
        )
        player.open()
        threads = []
        for other in others if worker == 0 else ():
            other.queue, other.sender, other.may_be_closed = player.queue, player.sender, True
            threads.append(play_in_a_thread(other, lambda number=number: board.queue != number))
        board.arrive(row, number)
        while board.queue == number:
            player.move()
            n_moves += 1
            if look_at_growth is not None and n_moves % 100 == 0:
                look_at_growth()
        player.leave()
        for thread in threads:
            thread.join(GRACE_S)
            assert not thread.is_alive(), f"a thread still waits {GRACE_S} s after shutdown"
        if look_at_growth is None and number >= 3:
            look_at_growth = watch_own_growth()


# ---- files that are no queues


def broken_files(whole: bytes, rng: random.Random) -> Iterator[tuple[str, bytes]]:
    """What a file may hold that no handle may open."""
    ring_offset, capacity = struct.unpack_from("<I", whole, 12)[0], struct.unpack_from("<Q", whole, 16)[0]
    edges = [0, 1, 8, 12, 16, 24, 128, 144, 256, 384, 512, 33280, 37376, 76288, ring_offset, ring_offset + capacity]
    lengths = {edge + by for edge in edges for by in (-PAGE, -1, 0, 1, PAGE)} | {2 * len(whole)}
    lengths |= {rng.randrange(len(whole)) for _ in range(20)}
    for length in sorted(length for length in lengths if length >= 0):
        if length != len(whole):
            yield f"cut or extended to {length} bytes", whole[:length].ljust(length, b"\0")
        yield f"{length} bytes of zeros", bytes(length)
        yield f"{length} random bytes", rng.randbytes(length)
    yield "a program", Path(sys.executable).read_bytes()[: len(whole)]
    yield "a text", (b"not a queue\n" * len(whole))[: len(whole)]
    for field, offset, code in [("magic", 0, "Q"), ("format", 8, "I"), ("ring_offset", 12, "I"), ("capacity", 16, "Q")]:
        (was,) = struct.unpack_from(f"<{code}", whole, offset)
        most = 2 ** (8 * struct.calcsize(code)) - 1
        values = {0, 1, 2, most, most >> 1, most - PAGE + 1, was ^ 1, was + 1, was - 1, was * 2, was // 2}
        values |= {was + PAGE, was - PAGE, *(was ^ 1 << rng.randrange(32) for _ in range(8)), rng.randrange(most)}
        for value in sorted(values - {was}):
            broken = bytearray(whole)
            struct.pack_into(f"<{code}", broken, offset, value & most)
            yield f"{field} {value}", bytes(broken)


def other_kinds(path: Path) -> Iterator[str]:
    """Make what isn't a regular file, one kind after the other."""
    path.mkdir()
    yield "a folder"
    path.rmdir()
    os.mkfifo(path)
    yield "a fifo"
    path.unlink()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.fspath(path))
        yield "a socket"
    path.unlink()
    for target in (tempfile.gettempdir(), "/dev/zero", "/dev/shm/nothing", os.fspath(path)):
        path.symlink_to(target)
        yield f"a link to {target}"
        path.unlink()


def play_with_files(board: Board, seed: int) -> None:
    rng = random.Random(f"{seed} files")
    player = Player(board, 0, rng, f"{NAME}.file", 5 * PAGE)
    path = path_of(player.name)
    player.open()
    for _ in range(300):
        player.move()
    player.leases.clear()
    player.queue.clear()
    for item in (b"small", bytes(5000), [1, 2]):
        player.sender.put_nowait(item)
    player.leases.append(player.queue.lease())
    whole = path.read_bytes()
    player.leave()

    for what, content in broken_files(whole, rng):
        path.write_bytes(content)
        assert player.opened((exceptions.ShmQueueRuntimeError,)) is None, f"{what} was opened"
        assert path.read_bytes() == content, f"{what} was changed"
        path.unlink()
    for what in other_kinds(path):
        assert player.opened((exceptions.ShmQueueRuntimeError,)) is None, f"{what} was opened"
    for _ in range(300):
        path.write_bytes(whole)
        overwriter = Overwriter(path, rng, deque(maxlen=1))
        for _ in range(rng.choice((1, 5, 50))):
            overwriter.overwrite(regions=REGIONS[1:])
        assert player.open(), "refused, with an intact header"
        for _ in range(10):
            player.move()
        player.leave()
        assert not path.exists(), "the last handle left its segment behind"


# ---- the overwriter


class Region(NamedTuple):
    """``count`` structs of ``size`` bytes from ``start`` on; hit ``weight`` times of all."""

    name: str
    start: int
    size: int
    count: int
    weight: int


SIDES, SLOTS, R, H = 256, 512, 33280, 37376  # docs/format.md
REGIONS = [
    Region("header", 0, 128, 1, 3),
    Region("waiters", 128, 24, 1, 8),
    Region("producing side", SIDES, 52, 1, 14),
    Region("consuming side", SIDES + 128, 52, 1, 14),
    Region("slots in use", SLOTS, 32, 10, 10),
    Region("reservations in use", R, 32, 6, 12),
    Region("claims in use", H, 32, 12, 18),
    Region("all slots", SLOTS, 64, 512, 2),
    Region("all reservations", R, 32, 128, 2),
    Region("all claims", H, 32, 1216, 2),
    Region("records", 0, 0, 0, 15),
    Region("ring", 0, 0, 0, 3),
]
STRIDE = {"slots in use": 64}


class Overwriter:
    """Writes into a segment that it has mapped by itself."""

    def __init__(self, path: Path, rng: random.Random, log: deque[str]) -> None:
        self.rng, self.log = rng, log
        with path.open("r+b") as file:
            self.memory = mmap.mmap(file.fileno(), 0)
        (self.ring,) = struct.unpack_from("I", self.memory, 12)
        (self.capacity,) = struct.unpack_from("Q", self.memory, 16)
        self.base = 0

    def word(self, offset: int) -> int:
        return int(struct.unpack_from("Q", self.memory, offset)[0])

    def positions(self) -> list[int]:
        """Both copies of put_pos and get_pos."""
        return [self.word(SIDES + 128 * side + 16 + 16 * mark) for side in (0, 1) for mark in (0, 1)]

    def owner(self) -> int:
        return self.word(SLOTS + 64 * self.rng.randrange(10))

    def record(self) -> int:
        """Where a record begins, probably: some records on from a side's position."""
        pos = self.rng.choice(self.positions())
        for _ in range(self.rng.randrange(4)):
            pos += 8 + (self.word(self.ring_offset(pos)) >> 32)
        return self.ring_offset(pos)

    def ring_offset(self, pos: int) -> int:
        return min(self.ring + pos % self.capacity, len(self.memory) - 8)

    def aim(self, regions: list[Region]) -> tuple[str, int]:
        region = self.rng.choices(regions, [region.weight for region in regions])[0]
        if region.name == "records":
            return region.name, self.record()
        if region.name == "ring":
            return region.name, self.ring + self.rng.randrange(self.capacity // 8) * 8
        stride = STRIDE.get(region.name, region.size)
        start = region.start + self.rng.randrange(region.count) * stride
        return region.name, start + self.rng.randrange(-(-region.size // 8)) * 8

    def bad_value(self, was: int) -> int:
        """Bits, small numbers, all ones, positions a bit off, others' owner words, other words of the segment."""
        rng = self.rng
        return rng.choice(
            (
                lambda: rng.getrandbits(64),
                lambda: was ^ 1 << rng.randrange(64),
                lambda: was ^ 1 << rng.randrange(64),
                lambda: rng.randrange(4),
                lambda: 0,
                lambda: 2**64 - 1 - rng.randrange(3),
                lambda: 2**63 - 1 - rng.randrange(3),
                lambda: was + rng.randrange(-32, 32),
                lambda: was + rng.randrange(-2 * self.capacity, 2 * self.capacity),
                lambda: rng.choice(self.positions()) + rng.randrange(-8, 9),
                lambda: rng.choice(self.positions()) + rng.randrange(-self.capacity, self.capacity),
                lambda: self.owner() + rng.choice((0, 0, 1, 1 << 11, -1 << 11)),
                lambda: self.word(self.aim(REGIONS)[1]),
                lambda: rng.randrange(4) | rng.randrange(20000) << 32,
            )
        )()

    def overwrite(self, regions: list[Region] = REGIONS) -> Callable[[], None]:
        """Overwrite one word, or a part of it; what is returned puts back what was there."""
        region, offset = self.aim(regions)
        if self.rng.random() < 0.03:
            offset = min(offset + self.rng.randrange(8), len(self.memory) - 8)
        code = self.rng.choice("QQQQQQIIB")
        width = struct.calcsize(code)
        offset += self.rng.randrange(8 // width) * width if width < 8 else 0
        (was,) = struct.unpack_from(code, self.memory, offset)
        value = self.bad_value(was) % 2 ** (8 * width)
        struct.pack_into(code, self.memory, offset, value)
        self.log.append(f"{region}: {width} bytes at {offset}: {was:#x} -> {value:#x}")
        return lambda: struct.pack_into(code, self.memory, offset, was)

    def fill(self) -> None:
        """Fill R or H with entries as they may be."""
        start, count, top = self.rng.choice(((R, 128, SIDES + 48), (H, 1216, SIDES + 128 + 48)))
        owner = self.rng.choice((0, 0, self.owner()))
        pos, step = self.rng.choice(self.positions()), self.rng.choice((0, 1, 9, 5000))
        state = self.rng.randrange(1, 4)
        for i in range(count):
            first = (pos - i * step) % 2**64
            struct.pack_into("QQQ", self.memory, start + 32 * i, first + 1 & 2**64 - 1, owner, pos & 2**64 - 1)
            self.memory[self.ring_offset(first)] = state
        struct.pack_into("I", self.memory, top, count)
        self.log.append(f"table at {start}: all entries: owner {owner}, every {step} bytes below {pos}, state {state}")

    def flood(self) -> None:
        """Overwrite all of a region with one byte."""
        region = self.rng.choice(REGIONS[1:-2])
        length = region.count * STRIDE.get(region.name, region.size)
        byte = self.rng.choice((0, 0xFF, self.rng.randrange(256)))
        self.memory[region.start : region.start + length] = bytes([byte]) * length
        self.log.append(f"{region.name}: all of it: {byte:#x}")

    def mend(self) -> None:
        """Make it an empty queue, further on than any honest position was. As nobody is stopped meanwhile, this is one
        more surprise for who is in the middle of something."""
        self.base += self.rng.randrange(4 * self.capacity, 2**24)
        for start, size, count in ((R, 32, 128), (H, 32, 1216), (SIDES, 8, 1), (SIDES + 128, 8, 1)):
            self.memory[start : start + size * count] = bytes(size * count)
        for side in (SIDES, SIDES + 128):
            struct.pack_into("4QI", self.memory, side + 16, self.base, 0, self.base, 0, 0)


# ---- the parent


class Failed(Exception):
    """What a run has found."""


class Fuzzer:
    """Starts the workers, overwrites, and looks after them."""

    def __init__(self, workers: int, seed: int) -> None:
        self.seed, self.rng = seed, random.Random(seed)
        self.board = Board(workers)
        self.log: deque[str] = deque(maxlen=40)
        self.pids: dict[int, int] = {}
        self.overwrites = self.queues = 0

    def start(self, worker: int, play: Callable[[], object]) -> None:
        pid = os.fork()
        if pid == 0:
            faulthandler.register(signal.SIGUSR1)
            if not IS_SANITIZED:
                faulthandler.enable()
            run_and_exit(play)
        self.pids[pid] = worker

    def watch(self) -> None:
        """Raise Failed when a worker has ended and there is a queue to play on, or when it is late."""
        pid, status = os.waitpid(-1, os.WNOHANG) if self.pids else (0, 0)
        if pid:
            worker, code = self.pids.pop(pid), os.waitstatus_to_exitcode(status)
            if code != 0 or self.board.queue != 0:
                raise Failed(f"worker {worker} ended with {code}")
        for late in self.board.overdue():
            self.dump_stacks()
            raise Failed(late)

    def dump_stacks(self) -> None:
        for pid in self.pids:
            os.kill(pid, signal.SIGUSR1)
        time.sleep(0.5)

    def wait(self, what: str, fact: Callable[[], bool], seconds: float = 60.0) -> None:
        deadline = time.monotonic() + seconds
        while not fact():
            self.watch()
            if time.monotonic() > deadline:
                self.dump_stacks()
                raise Failed(f"{what}: not within {seconds} s")
            time.sleep(0.0005)

    def play_with_files(self) -> None:
        self.start(0, lambda: play_with_files(self.board, self.seed))
        self.wait("the run through broken files", lambda: not self.pids, 300.0)

    def is_everybody_at(self, number: int) -> bool:
        return all(self.board.row(row)[0] == number for row in range(0, self.board.rows, Board.PER_WORKER))

    def play(self, is_over: Callable[[], bool]) -> None:
        """Queue after queue, until it's over."""
        self.board.queue = 1
        for worker in range(self.board.rows // Board.PER_WORKER):
            self.start(worker, lambda worker=worker: work(self.board, worker, self.seed))  # type: ignore[misc]
        for number in itertools.count(1):
            self.wait(f"all are at queue {number}", lambda number=number: self.is_everybody_at(number))  # type: ignore[misc]
            self.look_for_segments_left(number - 1)
            self.queues = number
            overwriter = Overwriter(path_of(f"{NAME}.{number}"), self.rng, self.log)
            self.log.append(f"queue {number}, of {overwriter.capacity} bytes")
            self.attack(overwriter, self.rng.randrange(50, 700))
            self.board.queue = 0 if is_over() else number + 1
            self.attack(overwriter, 5)  # while they leave
            if self.board.queue == 0:
                break
        self.wait("all end", lambda: not self.pids)
        self.look_for_segments_left(number)

    def attack(self, overwriter: Overwriter, n: int) -> None:
        """Overwrite n times, in bursts. Most are taken back, and now and then all is mended: else every call would soon
        end in the same error. Neither counts."""
        end = self.overwrites + n
        while self.overwrites < end:
            if self.rng.random() < 0.003:
                self.rng.choice((overwriter.flood, overwriter.fill))()
                self.overwrites += 1
            undo = [overwriter.overwrite() for _ in range(self.rng.choice((1, 1, 1, 2, 3, 8)))]
            self.overwrites += len(undo)
            time.sleep(self.rng.choice((0.0, 0.0, 0.0002, 0.0005, 0.002)))
            if self.rng.random() < 0.6:
                for step in reversed(undo):
                    step()
                time.sleep(self.rng.choice((0.0, 0.0002)))
            if self.rng.random() < 0.1:
                overwriter.mend()
            self.watch()

    def look_for_segments_left(self, number: int) -> None:
        name = f"{NAME}.{number}"
        path_of(f"{name}.dead").unlink(missing_ok=True)  # it outlives its handles as long as items are in it
        if path_of(name).exists():
            raise Failed(f"{path_of(name)} has outlived its handles")

    def end(self) -> None:
        for pid in self.pids:
            os.kill(pid, signal.SIGKILL)
        for pid in self.pids:
            os.waitpid(pid, 0)
        for path in path_of(NAME).parent.glob(f"{path_of(NAME).name}.*"):
            with suppress(OSError):
                path.unlink()

    def __str__(self) -> str:
        calls, *counts = self.board.totals()
        outcomes = ", ".join(f"{count:,} {what}" for count, what in zip(counts, Board.OUTCOMES, strict=True))
        return f"{self.overwrites:,} overwrites of {self.queues:,} queues, {calls:,} calls: {outcomes}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--overwrites", type=int, default=0, help="as many at least; 0: until the time is up")
    parser.add_argument("--seconds", type=float, default=60.0, help="no longer than that")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**32))
    parser.add_argument("--workers", type=int, default=3)
    options = parser.parse_args()
    logging.getLogger("shmqueue").addFilter(LogFilter())
    fuzzer = Fuzzer(options.workers, options.seed)
    start, said = time.monotonic(), time.monotonic()

    def is_over() -> bool:
        nonlocal said
        now = time.monotonic()
        if now - said >= 10:
            said = now
            print(f"  {now - start:4.0f} s: {fuzzer}", flush=True)
        return now - start > options.seconds or 0 < options.overwrites <= fuzzer.overwrites

    kind = "ASan+UBSan" if IS_SANITIZED else "plain"
    print(f"fuzz: --seed {options.seed} --workers {options.workers}, {kind} build", flush=True)
    try:
        fuzzer.play_with_files()
        print(f"  broken files: {fuzzer}", flush=True)
        fuzzer.play(is_over)
        if fuzzer.overwrites < options.overwrites:
            raise Failed(f"the time was up after {fuzzer.overwrites:,} of {options.overwrites:,} overwrites")
    except Failed as failed:
        print("the last overwrites:", *fuzzer.log, "the last calls:", fuzzer.board, sep="\n")
        print(f"FAILED: {failed}\n  --seed {options.seed} --workers {options.workers}; {fuzzer}", flush=True)
        return 1
    finally:
        fuzzer.end()
    print(f"ok: {fuzzer}; {fuzzer.board.longest()}; {time.monotonic() - start:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
