"""SIGKILL in the middle of things: the others go on, nothing that was promised is lost, nothing comes twice.

Every producer notes each put that has returned, every consumer each item it got, in memory that outlives
them. At the end the notes are compared: a returned put's item is missing only if its taker was killed.
"""

from __future__ import annotations

import mmap
import os
import random
import signal
import statistics
import struct
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from shmqueue import ShmQueue, ShmQueueEmpty

KILLS = 200
SIZES = (0, 10, 300, 4000, 5000, 20000)  # copied inside the lock up to 4096 bytes, outside from there on


def wait_until(is_so: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline, "it never became so"
        time.sleep(0.002)


NUMBERS = 1 << 22
"""Numbers of each child; more than the fastest can use up in its life."""


class Notes:
    """Numbers that a child leaves behind: the count last and by one store, so that a death in between hides the last.

    ``struct.pack_into`` won't do for that: it clears what it is about to write to.
    """

    def __init__(self) -> None:
        self._words = memoryview(mmap.mmap(-1, 8 * (NUMBERS + 1))).cast("Q")

    def add(self, number: int) -> None:
        count = self._words[0]
        self._words[count + 1] = number
        self._words[0] = count + 1

    def __iter__(self) -> Iterator[int]:
        return iter(self._words[1 : self._words[0] + 1])


def item(number: int) -> list[Any]:
    """An item that shows a tear: its bytes follow from its number."""
    return [number, bytes([number % 251]) * SIZES[number % len(SIZES)]]


def number_of(got: list[Any]) -> int:
    number = got[0]
    assert got == item(number), f"item {number} is torn"
    return number


def produce(q: ShmQueue[Any], notes: Notes, first: int) -> None:
    for number in range(first, first + NUMBERS):
        q.put(item(number))
        notes.add(number)


def produce_many(q: ShmQueue[Any], notes: Notes, first: int) -> None:
    for start in range(first, first + NUMBERS - 7, 7):
        q.put_many(item(number) for number in range(start, start + 7))
        for number in range(start, start + 7):
            notes.add(number)


def consume(q: ShmQueue[Any], notes: Notes, _: int) -> None:
    while True:
        notes.add(number_of(q.get()))


def consume_many(q: ShmQueue[Any], notes: Notes, _: int) -> None:
    while True:
        for got in q.get_many(5):
            notes.add(number_of(got))


MOST_IN_HAND = {consume: 1, consume_many: 5}


class Storm:
    """Children at work, one killed and replaced at a time."""

    def __init__(self, name: str, seed: int) -> None:
        self.q = ShmQueue[Any](name, buffer_size=1 << 16)
        self.random = random.Random(seed)
        self.returned: list[Notes] = []
        self.got: list[Notes] = []
        self.may_miss = 0
        self.children: dict[int, Callable[..., None]] = {}
        self.mine: list[int] = []
        self.pauses: list[float] = []
        self._next = 0

    def start(self, work: Callable[..., None]) -> None:
        notes = Notes()
        (self.got if work in MOST_IN_HAND else self.returned).append(notes)
        first = self._next
        self._next += NUMBERS
        pid = os.fork()
        if pid == 0:
            try:
                work(self.q, notes, first)
            finally:
                os._exit(1)
        self.children[pid] = work

    def kill(self, pid: int) -> None:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        self.may_miss += MOST_IN_HAND.get(self.children.pop(pid), 0)

    def note_pause(self) -> None:
        """How long until a put and a get of a survivor go through."""
        start = time.monotonic()
        number = self._next
        self._next += 1
        self.q.put(item(number), timeout=20)
        self.mine.append(number)
        self.got_here(self.q.get(timeout=20))
        self.pauses.append(time.monotonic() - start)

    def got_here(self, got: Any) -> None:
        self.mine_got.add(number_of(got))

    def run(self, kills: int) -> None:
        self.mine_got = Notes()
        self.got.append(self.mine_got)
        works = [produce, produce_many, consume, consume_many]
        for work in works:
            self.start(work)
        for _ in range(kills):
            time.sleep(self.random.uniform(0, 0.01))
            victim = self.random.choice(list(self.children))
            work = self.children[victim]
            self.kill(victim)
            self.note_pause()
            assert self.q.refs == 1 + len(self.children)
            self.start(work)
        for pid in list(self.children):
            self.kill(pid)
        while not self.q.empty():
            for each in self.q.get_many(100, block=False):
                self.got_here(each)

    def verify(self) -> None:
        returned = Counter(number for notes in self.returned for number in notes) + Counter(self.mine)
        got = Counter(number for notes in self.got for number in notes)
        assert max(got.values()) == 1, "an item came twice"
        missing = returned - got
        assert len(missing) <= self.may_miss, f"{len(missing)} items lost, {self.may_miss} may be"
        assert self.q.check() == []
        assert (self.q.refs, self.q.qsize(), self.q.buffer_occupancy()) == (1, 0, 0)

    def end(self) -> None:
        for pid in list(self.children):
            self.kill(pid)
        self.q.shutdown()


@pytest.mark.timeout(300)
def test_survivors_go_on_after_200_kills_and_nothing_is_lost(queue_name: str) -> None:
    seed = random.randrange(1 << 32)
    print("seed", seed)
    storm = Storm(queue_name, seed)
    try:
        storm.run(KILLS)
        storm.verify()
    finally:
        storm.end()
    print(f"pauses: median {statistics.median(storm.pauses):.6f} s, longest {max(storm.pauses):.6f} s")
    assert statistics.median(storm.pauses) < 0.05
    assert max(storm.pauses) < 1.0
    assert not os.path.exists(f"/dev/shm/shmqueue.{queue_name}")


def dies_decoding(q: ShmQueue[Any]) -> None:
    """A child is killed with all items of the queue in its hands."""
    pid = os.fork()
    if pid == 0:
        q.custom_deserialize(lambda method, chunks: os.kill(os.getpid(), signal.SIGKILL))
        q.get_many()
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


def get_all_nowait(q: ShmQueue[Any]) -> list[Any]:
    got = []
    while True:
        try:
            got.append(q.get_nowait())
        except ShmQueueEmpty:
            return got


@pytest.mark.parametrize("n", [1, 5])
@pytest.mark.parametrize(
    ("look", "seen"),
    [
        (ShmQueue[Any].qsize, len),
        (ShmQueue[Any].empty, lambda items: False),
        (lambda q: q.snapshot().qsize, len),
        (lambda q: sorted(get_all_nowait(q)), list),
        (lambda q: sorted(q.get_many(block=False) + get_all_nowait(q)), list),
        (lambda q: q.clear() or q.buffer_occupancy(), lambda items: 0),
    ],
    ids=["qsize", "empty", "snapshot", "get_nowait", "get_many", "clear"],
)
def test_what_a_dead_taker_held_shows_at_once(
    queue_name: str, n: int, look: Callable[[Any], Any], seen: Callable[[Any], Any]
) -> None:
    """Nobody waits here, so nobody sweeps by the way: each call has to look for the dead by itself."""
    with ShmQueue[Any](queue_name) as q:
        q.custom_serialize(lambda method, data: struct.pack("I", data))
        q.custom_deserialize(lambda method, chunks: struct.unpack("I", chunks[0])[0])
        for _ in range(10):
            q.put_many(range(n), serialization_method=2000)
            dies_decoding(q)
            assert look(q) == seen(range(n))
            q.clear()
            assert (q.qsize(), q.buffer_occupancy()) == (0, 0)


def test_what_a_dead_taker_held_comes_soon_though_the_queue_never_runs_empty(queue_name: str) -> None:
    with ShmQueue[Any](queue_name, buffer_size=1 << 24) as q:
        q.custom_serialize(lambda method, data: data)
        q.put(b"first", serialization_method=2000)
        dies_decoding(q)
        q.custom_deserialize(lambda method, chunks: bytes(chunks[0]))
        q.put_many(range(1000))
        start = time.monotonic()
        while q.get() != b"first":
            q.put(0)
            assert time.monotonic() - start < 1.0


def test_what_a_dead_producer_reserved_is_room_at_once(queue_name: str) -> None:
    size = 64 << 20
    code = f"import shmqueue\nq = shmqueue.ShmQueue({queue_name!r})\nwhile True: q.put(bytes({size}))\n"
    was_in_time = False
    with ShmQueue[Any](queue_name, buffer_size=2 * size) as q:
        for _ in range(20):
            child = subprocess.Popen([sys.executable, "-c", code])
            try:
                wait_until(lambda: q.buffer_occupancy() > size)
            finally:
                child.kill()
                child.wait()
            was_in_time = was_in_time or q.qsize() == 0  # in the middle of its first put
            q.clear()
            q.put(bytes(2 * size - 100), block=False)
            q.clear()
    assert was_in_time


def test_a_killed_process_is_dead_although_its_forked_child_lives(queue_name: str) -> None:
    code = (
        "import os, sys, time, shmqueue\n"
        f"q = shmqueue.ShmQueue({queue_name!r}); pids = shmqueue.ShmQueue({queue_name + '.pids'!r})\n"
        "pid = os.fork()\n"
        "if pid == 0:\n"
        "    time.sleep(60); os._exit(0)\n"
        "pids.put(pid)\n"
        "while True:\n"
        "    q.put(bytes(100)); q.get()\n"
    )
    with ExitStack() as cleanup:
        q = cleanup.enter_context(ShmQueue[Any](queue_name))
        pids = cleanup.enter_context(ShmQueue[int](queue_name + ".pids"))
        cleanup.callback(wait_until, lambda: (q.refs, pids.refs) == (1, 1))  # all of them gone
        for _ in range(5):
            child = subprocess.Popen([sys.executable, "-c", code])
            cleanup.callback(child.wait)
            cleanup.callback(child.kill)
            grandchild = pids.get(timeout=30)
            cleanup.callback(os.kill, grandchild, signal.SIGKILL)
            time.sleep(0.05)
            refs = q.refs
            child.kill()
            child.wait()
            start = time.monotonic()
            q.put("mine", timeout=10)
            while q.get(timeout=10) != "mine":
                pass
            assert time.monotonic() - start < 1.0
            assert q.refs == refs - 1  # the grandchild has an attachment of its own


def test_an_item_is_gettable_while_another_producer_is_frozen_in_a_big_put(queue_name: str) -> None:
    size = 100 << 20
    code = (
        "import shmqueue, sys\n"
        f"q = shmqueue.ShmQueue({queue_name!r})\n"
        f"big = bytes({size})\n"
        "q.put('ready')\n"
        "q.put(big)\n"
        "q.put('after')\n"
        "sys.stdin.read()\n"
    )
    with ShmQueue[Any](queue_name, buffer_size=2 * size) as q:
        child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE)
        try:
            assert q.get(timeout=60) == "ready"
            wait_until(lambda: q.buffer_occupancy() >= size)  # reserved, and now being copied
            child.send_signal(signal.SIGSTOP)
            if q.qsize() == 0:  # else it was faster than we: nothing is frozen in the middle
                q.put("small")
                assert q.get_nowait() == "small"
                assert q.qsize() == 0
                q.put("next")
            child.send_signal(signal.SIGCONT)
            got = list(iter(lambda: q.get(timeout=60), "after"))
            assert [len(x) for x in got if isinstance(x, bytes)] == [size]
        finally:
            child.kill()
            child.communicate()
