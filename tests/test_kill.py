"""SIGKILL at chosen moments: the others go on, and see at once what the dead one held.

Kills at random moments are ``shmqueue storm``'s (test_storm.py).
"""

from __future__ import annotations

import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest

from shmqueue import ShmQueue, ShmQueueEmpty


def wait_until(is_so: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline, "it never became so"
        time.sleep(0.002)


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
