"""Many at once: forks, comings and goings, stops and signals, while others work; every item is accounted for.

Kills at random are ``shmqueue storm``'s (test_storm.py); one process at a time is test_processes.py's.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest

from shmqueue import ShmQueue, ShmQueueEmpty, ShmQueueFull


def reap_all(pids: list[int], seconds: float = 60.0) -> list[int]:
    """Wait for children; their exit codes, or minus the signal. Those that take too long are killed."""
    deadline = time.monotonic() + seconds
    codes = []
    for pid in pids:
        while (status := os.waitpid(pid, os.WNOHANG)) == (0, 0):
            if time.monotonic() > deadline:
                os.kill(pid, signal.SIGKILL)
            time.sleep(0.001)
        codes.append(os.waitstatus_to_exitcode(status[1]))
    return codes


def fork(work: Callable[[], object]) -> int:
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return pid


# ---- forks


def grow(q: ShmQueue[int], depth: int) -> None:
    """Use the inherited handle, then have two children do the same, and leave in one of several ways."""
    q.put(depth, timeout=30)
    if depth > 0:
        pids = [fork(lambda: grow(q, depth - 1)) for _ in range(2)]
        q.put(depth, timeout=30)
        assert set(reap_all(pids)) <= {0, -signal.SIGKILL}
    end = os.getpid() % 3
    if end == 0:
        q.shutdown()
    elif end == 1:
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_tree_of_forks_shares_one_queue(queue_name: str) -> None:
    depth = 5
    with ShmQueue[int](queue_name, buffer_size=1 << 16) as q:
        codes = reap_all([fork(lambda: grow(q, depth))])
        assert set(codes) <= {0, -signal.SIGKILL}
        got = Counter(q.get_many())
        assert got == Counter({level: (2 if level else 1) * 2 ** (depth - level) for level in range(depth + 1)})
        assert (q.refs, q.check(), q.buffer_occupancy()) == (1, [], 0)


def test_forks_of_a_process_whose_threads_wait_put_and_lease(queue_name: str) -> None:
    with ShmQueue[Any](queue_name, buffer_size=1 << 16) as q, ShmQueue[Any](queue_name + "-2") as nothing:
        stop = threading.Event()

        def wait() -> None:
            while not stop.is_set():
                with pytest.raises(ShmQueueEmpty):
                    nothing.get(timeout=0.05)

        def work() -> None:
            while not stop.is_set():
                q.put("thread")
                with q.lease():
                    pass

        def child() -> None:
            q.put("child", timeout=30)
            with q.lease(timeout=30):
                pass

        threads = [threading.Thread(target=target) for target in (wait, wait, work, work)]
        for thread in threads:
            thread.start()
        try:
            for _ in range(25):
                assert reap_all([fork(child) for _ in range(4)]) == [0] * 4
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        assert (q.qsize(), q.refs, q.check(), q.buffer_occupancy()) == (0, 1, [], 0)


# ---- coming and going


VISITS = {
    "shutdown": "q.shutdown()",
    "exit": "pass",
    "_exit": "os._exit(0)",
    "killed": "os.kill(os.getpid(), 9)",
    "lease held": "lease = q.lease(timeout=30); os._exit(0)",
    "lease held, killed": "lease = q.lease(timeout=30); os.kill(os.getpid(), 9)",
    "exec": "os.execv('/bin/true', ['true'])",
    "daemon": "os.closerange(3, 256); q.put(-1); q.get()",
    "vfork": "import subprocess; subprocess.run(['/bin/true'], close_fds=False)",
    "threads": "import threading; threading.Thread(target=q.get, daemon=True).start()",
}


def test_a_hundred_come_and_go_in_every_way(queue_name: str) -> None:
    with ShmQueue[int](queue_name, buffer_size=1 << 16) as q:
        waiting: list[subprocess.Popen[bytes]] = []
        n = 0
        for n in range(1, 101):
            end = list(VISITS.values())[n % len(VISITS)]
            code = f"import os, shmqueue; q = shmqueue.ShmQueue({queue_name!r}); q.put({n}); {end}"
            waiting.append(subprocess.Popen([sys.executable, "-c", code]))
            if len(waiting) == 10:
                for child in waiting:
                    assert child.wait(60) in (0, -signal.SIGKILL)
                waiting.clear()
        got = q.get_many()
        # a daemon's own get, and that of a thread, took one each at most
        assert set(got) <= set(range(1, n + 1)) | {-1}
        assert len(got) >= n - sum("q.get" in end for end in VISITS.values()) * n // len(VISITS)
        assert max(count for item, count in Counter(got).items() if item > 0) == 1
        assert (q.refs, q.check(), q.buffer_occupancy()) == (1, [], 0)


def test_the_first_and_the_last_meet(queue_name: str) -> None:
    """Nobody holds the queue between the rounds: it is created and unlinked all the time. An item that was put while
    somebody stayed attached is never lost."""

    def visit() -> None:
        for _ in range(60):
            with ShmQueue[int](queue_name) as q:
                q.put(1, timeout=30)
                assert q.get(timeout=30) == 1

    assert reap_all([fork(visit) for _ in range(8)]) == [0] * 8
    assert not os.path.exists(f"/dev/shm/shmqueue.{queue_name}")


# ---- stops


def test_timeouts_hold_while_others_are_stopped_at_any_instruction(queue_name: str) -> None:
    """The longest of many calls, on a busy machine; what one takes in the core alone is in test_queue_deaths.c."""

    def churn() -> None:
        q = ShmQueue[bytes](queue_name)
        while True:
            q.put(bytes(random.choice([10, 5000, 20000])))
            with q.lease():
                pass

    with ShmQueue[bytes](queue_name, buffer_size=1 << 16) as q:
        pids = [fork(churn) for _ in range(3)]
        longest = 0.0
        try:
            time.sleep(0.2)
            for _ in range(60):
                for pid in pids:
                    os.kill(pid, signal.SIGSTOP)
                for timeout in (0.0, 0.05):
                    for call in (lambda t: q.put(b"mine", timeout=t), lambda t: q.get(timeout=t)):
                        start = time.monotonic()
                        with suppress(ShmQueueEmpty, ShmQueueFull):
                            call(timeout)
                        longest = max(longest, time.monotonic() - start - timeout)
                for pid in pids:
                    os.kill(pid, signal.SIGCONT)
                time.sleep(random.uniform(0, 0.005))
        finally:
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
            reap_all(pids)
        q.clear()
        assert (q.refs, q.check(), q.buffer_occupancy()) == (1, [], 0)
        assert longest < 1.0


# ---- signals


@contextmanager
def alarms(handler: Callable[[int, Any], None], first: float, every: float) -> Iterator[None]:
    before = signal.signal(signal.SIGALRM, handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, first, every)
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_signals_that_return_change_nothing_in_any_call(queue_name: str) -> None:
    beats = 0

    def beat(number: int, frame: Any) -> None:
        nonlocal beats
        beats += 1

    with ShmQueue[Any](queue_name, buffer_size=1 << 16) as q, alarms(beat, 0.0003, 0.0003):
        for n in range(400):
            q.put([n, bytes(n * 37 % 9000)])
            q.put_many(range(5))
            assert q.qsize() == 6
            with q.lease(timeout=5) as item:
                assert item[0] == n
            assert q.get_many(3) == [0, 1, 2]
            assert [q.get(), q.get_nowait()] == [3, 4]
            with pytest.raises(ShmQueueEmpty):
                q.get(timeout=0.002)
            assert (q.refs, q.check(), q.empty(), q.buffer_occupancy()) == (1, [], True, 0)
            with ShmQueue[Any](queue_name) as other:
                assert other.refs == 2
            q.clear()
    assert beats > 100


def test_a_signal_handler_that_uses_the_queue_itself(queue_name: str) -> None:
    """It comes between two calls, or in one that waits; never inside of a critical section."""
    with ShmQueue[Any](queue_name, buffer_size=1 << 16) as q:
        sent = 0

        def use(number: int, frame: Any) -> None:
            nonlocal sent
            q.put("signal", timeout=5)
            sent += 1

        seen = 0
        with alarms(use, 0.001, 0.001):
            deadline = time.monotonic() + 1.0
            while time.monotonic() < deadline:
                if q.get(timeout=5) == "signal":
                    seen += 1
        while not q.empty():
            seen += q.get_nowait() == "signal"
        assert seen == sent > 50


def test_a_signal_that_raises_loses_no_item(queue_name: str) -> None:
    """What was put has been put, or not; what a lease gave goes back. (A get that is interrupted after it has taken
    its item takes it along, as queue.Queue's does.)"""

    def interrupt(number: int, frame: Any) -> None:
        raise InterruptedError

    with ShmQueue[int](queue_name, buffer_size=1 << 16) as q:
        taken: list[int] = []
        number = 0
        for _ in range(200):
            with suppress(InterruptedError), alarms(interrupt, random.uniform(0.0002, 0.003), 0):
                while True:
                    number += 1
                    q.put(number)
                    with q.lease() as item:
                        taken.append(item)
            while not q.empty():  # the one whose put had returned, or whose lease was given back
                item = q.get()
                assert item in (number - 1, number)
                if item not in taken[-1:]:
                    taken.append(item)
        assert taken == sorted(set(taken))
        assert (q.refs, q.check(), q.buffer_occupancy()) == (1, [], 0)
