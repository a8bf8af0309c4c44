"""Every statement of the user's specification (SEED.md), each quoted by the test that holds us to it.

The specification's own code runs as it stands there, but for the queue's name. Programs are interpreters
of their own, started from nothing; the only thing they share with this one is a queue's name.
"""

from __future__ import annotations

import array
import contextlib
import datetime
import decimal
import gc
import inspect
import itertools
import json
import logging
import mmap
import multiprocessing
import os
import pickle
import queue
import random
import select
import signal
import struct
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import shmqueue
from shmqueue import SIZE_HEADER, SYSTEM_PAGESIZE, SerializationMethods, ShmQueue, exceptions

PATIENCE_S = 60  # for what takes well under a second on an idle machine
START_METHODS = ("fork", "spawn", "forkserver")
MY_METHOD = SerializationMethods.FIRST_PUBLIC_NUMBER + 1


# ---- programs


def run(code: str, *args: str, env: dict[str, str] | None = None) -> str:
    """Run a program to its end; return what it printed. It must succeed and say nothing on stderr."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(code), *args],
        capture_output=True,  # to the end of the pipe: the resource tracker, too, has ended and has spoken
        text=True,
        timeout=PATIENCE_S,
        env={**os.environ, **(env or {})},
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout


class Program:
    """An unrelated interpreter that says lines on stdout and goes on when it is told a line."""

    # Under nohup, or in the background of a shell, these would be ignored from the start.
    PRELUDE = """\
import os, signal, sys, time
import shmqueue
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
def say(word):
    print(word, flush=True)
def idle(): # in slices: a signal that comes just before a sleep begins is handled after it
    for _ in range(6000):
        time.sleep(0.1)
"""

    def __init__(self, code: str, *args: str) -> None:
        self._pipes = subprocess.Popen(
            [sys.executable, "-c", self.PRELUDE + textwrap.dedent(code), *args],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
        )
        self._heard = b""
        self.pid = self._pipes.pid
        self.send_signal = self._pipes.send_signal

    def says(self) -> str:
        """Return its next line."""
        deadline = time.monotonic() + PATIENCE_S
        while b"\n" not in self._heard:
            assert self._pipes.stdout is not None
            ready, _, _ = select.select([self._pipes.stdout], [], [], max(0, deadline - time.monotonic()))
            assert ready, "it said nothing for too long"
            more = os.read(self._pipes.stdout.fileno(), 65536)
            if not more:
                raise AssertionError(f"it ended: {self.ends()}")
            self._heard += more
        line, _, self._heard = self._heard.partition(b"\n")
        return line.decode()

    def tell(self, line: str = "") -> None:
        assert self._pipes.stdin is not None
        self._pipes.stdin.write(f"{line}\n".encode())

    def ends(self) -> tuple[int, str]:
        """Wait for its end and that of its helpers; return its exit status and what it said on stderr."""
        _, stderr = self._pipes.communicate(timeout=PATIENCE_S)
        return self._pipes.returncode, stderr.decode()

    def kill(self) -> None:
        self._pipes.kill()
        self._pipes.communicate(timeout=PATIENCE_S)


@pytest.fixture
def start() -> Iterator[Callable[..., Program]]:
    """Start programs; those still there at the end are killed."""
    programs: list[Program] = []

    def start(code: str, *args: str) -> Program:
        programs.append(Program(code, *args))
        return programs[-1]

    yield start
    for program in programs:
        program.kill()


def wait_until(is_so: Callable[[], Any]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not is_so():
        assert time.monotonic() < deadline, "it never came to be so"
        time.sleep(0.002)


def is_asleep(pid: int) -> bool:
    """Does the process's main thread sleep? Seen several times in a row, it's no short pause."""
    for _ in range(5):
        if Path(f"/proc/{pid}/stat").read_bytes().rpartition(b") ")[2][:1] != b"S":
            return False
        time.sleep(0.005)
    return True


def segment(name: str) -> Path:
    return Path(f"/dev/shm/shmqueue.{name}")


@pytest.fixture
def q(queue_name: str) -> Iterator[ShmQueue[Any]]:
    with ShmQueue[Any](queue_name) as q:
        yield q


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory for temporary files, of this process and its children."""
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return tmp_path


# ---- About


def test_multiple_processes_put_and_get_arbitrary_objects_and_only_the_queue_name_is_required(
    queue_name: str, start: Callable[..., Program]
) -> None:
    """'Multiple processes can put and get arbitrary Python objects [...] only the queue name is required.'"""
    producer = """
        import datetime, fractions
        with shmqueue.ShmQueue(sys.argv[1]) as q:
            q.put((sys.argv[2], {1, 2}, datetime.date(2024, 2, 29), fractions.Fraction(1, 3), 2**100))
            say("put")
            sys.stdin.readline()
    """
    producers = [start(producer, queue_name, number) for number in "123"]
    assert [program.says() for program in producers] == ["put"] * 3
    consumer = """
        import shmqueue, sys
        with shmqueue.ShmQueue(sys.argv[1]) as q:
            print(sorted(q.get() for _ in range(3)))
    """
    rest = "{1, 2}, datetime.date(2024, 2, 29), Fraction(1, 3), 1267650600228229401496703205376"
    assert run(consumer, queue_name) == f"[('1', {rest}), ('2', {rest}), ('3', {rest})]\n"
    for program in producers:
        program.tell()
        assert program.ends() == (0, "")


def test_it_is_fifo(q: ShmQueue[int]) -> None:
    """'an inter-process FIFO queue backed by a shared-memory ring buffer'"""
    for lap in range(20):
        for i in range(100):
            q.put(lap * 100 + i)
        assert [q.get() for _ in range(100)] == list(range(lap * 100, lap * 100 + 100))


# ---- Quick dive

QUICK_DIVE = """
import shmqueue

# ── Producer process ──────────────────────────────────────────────────────────
q = shmqueue.ShmQueue("my_queue", buffer_size=shmqueue.SYSTEM_PAGESIZE)
q.put({"hello": "world"})
q.put(b"raw bytes")
q.put(42)

# ── Consumer process (same name, any process on the same machine) ─────────────
q = shmqueue.ShmQueue("my_queue")
item = q.get()           # blocks until data is available
item = q.get(block=False)  # raises ShmQueueEmpty if nothing there

# ── Non-blocking put ──────────────────────────────────────────────────────────
try:
    q.put("data", block=False)
except shmqueue.exceptions.ShmQueueFull:
    pass

# ── Timeout ───────────────────────────────────────────────────────────────────
item = q.get(block=True, timeout=2.0)   # raises ShmQueueEmpty after 2 s

# ── Status ────────────────────────────────────────────────────────────────────
q.qsize()            # number of items currently in queue
q.empty()            # True / False
q.full()             # True / False
q.buffer_occupancy() # bytes used in ring buffer
snap = q.snapshot()  # all fields in one lock acquisition (ShmRefDataSnapshot)

# ── Cleanup ───────────────────────────────────────────────────────────────────
q.shutdown()         # decrement ref count; last closer frees shared memory
"""


def test_quick_dive_runs_as_it_stands(queue_name: str) -> None:
    """The block below 'Quick Dive', whole; and every value in it is what its comment says."""
    says = """
print(repr(item), snap)
assert type(snap) is shmqueue.ShmRefDataSnapshot
"""
    program = QUICK_DIVE.replace("my_queue", queue_name)
    printed = run(program + says)
    assert printed.startswith("42 ShmRefDataSnapshot(ref_count=1, ")
    assert "qsize=1" in printed  # "data" is left
    assert not segment(queue_name).exists()


def test_quick_dive_between_two_unrelated_interpreters(queue_name: str, start: Callable[..., Program]) -> None:
    """'Producer process' and 'Consumer process (same name, any process on the same machine)'"""
    producer = start(
        """
        q = shmqueue.ShmQueue(sys.argv[1], buffer_size=shmqueue.SYSTEM_PAGESIZE)
        q.put({"hello": "world"})
        q.put(b"raw bytes")
        q.put(42)
        say("put")
        sys.stdin.readline()
        """,
        queue_name,
    )
    assert producer.says() == "put"
    consumer = """
        import shmqueue, sys
        q = shmqueue.ShmQueue(sys.argv[1])
        item = q.get()           # blocks until data is available
        print(item)
        item = q.get(block=False)  # raises ShmQueueEmpty if nothing there
        print(item, q.get(block=False), q.empty())
        try:
            item = q.get(block=False)
        except shmqueue.exceptions.ShmQueueEmpty:
            print("ShmQueueEmpty")
        q.shutdown()
    """
    assert run(consumer, queue_name) == "{'hello': 'world'}\nb'raw bytes' 42 True\nShmQueueEmpty\n"
    producer.tell()
    assert producer.ends() == (0, "")
    assert not segment(queue_name).exists()


@pytest.mark.parametrize(
    "item",
    [
        None,
        True,
        0,
        -(2**63),
        2**64 - 1,
        2**64,
        1.5,
        float("inf"),
        "",
        "hällo \0 \U0001f600",
        b"",
        b"\xc1raw",
        [],
        [1, [2, [None]]],
        {},
        {"a": {"b": [1.0, b"c"]}},
        {1: "int key", None: "no key", b"b": "bytes key"},
        {(1, 2): "tuple key"},
        {1, 2},
        frozenset("ab"),
        1 + 2j,
        range(3),
        datetime.datetime(2024, 1, 2, 3, 4, 5, tzinfo=datetime.timezone.utc),
        decimal.Decimal("1.10"),
        array.array("d", [1.0, 2.0]),
        ValueError,
        "\udc80",
    ],
    ids=repr,
)
def test_put_and_get_an_item_of_each_type(q: ShmQueue[Any], item: Any) -> None:
    """'msgpack handles most primitives; pickle covers arbitrary Python objects'"""
    q.put(item)
    got = q.get()
    assert got == item
    assert type(got) is type(item)
    assert q.empty()


def test_get_blocks_until_data_is_available(q: ShmQueue[str], start: Callable[..., Program]) -> None:
    """'q.get()  # blocks until data is available'"""
    consumer = start('q = shmqueue.ShmQueue(sys.argv[1]); say("waits"); say(q.get())', q.identifier)
    assert consumer.says() == "waits"
    wait_until(lambda: is_asleep(consumer.pid))
    q.put("it came")
    assert consumer.says() == "it came"
    assert consumer.ends() == (0, "")


def test_get_without_block_raises_empty_if_nothing_is_there(q: ShmQueue[int]) -> None:
    """'q.get(block=False)  # raises ShmQueueEmpty if nothing there'"""
    with pytest.raises(exceptions.ShmQueueEmpty) as caught:
        q.get(block=False)
    assert isinstance(caught.value, queue.Empty)
    q.put(1)
    assert q.get(block=False) == 1


def test_put_without_block_raises_full_when_there_is_no_room(q: ShmQueue[bytes]) -> None:
    """'q.put("data", block=False)', 'except shmqueue.exceptions.ShmQueueFull'"""
    q.put(bytes(4000))
    with pytest.raises(exceptions.ShmQueueFull) as caught:
        q.put(bytes(100), block=False)
    assert isinstance(caught.value, queue.Full)
    assert q.qsize() == 1
    assert q.get() == bytes(4000)
    q.put(bytes(100), block=False)
    assert q.get() == bytes(100)


def test_get_with_a_timeout_raises_empty_after_2_s(q: ShmQueue[int]) -> None:
    """'q.get(block=True, timeout=2.0)  # raises ShmQueueEmpty after 2 s'"""
    before = time.monotonic()
    with pytest.raises(exceptions.ShmQueueEmpty):
        q.get(block=True, timeout=2.0)
    assert 2.0 <= time.monotonic() - before < 2.0 + PATIENCE_S


def test_get_with_a_timeout_returns_what_comes_in_time(q: ShmQueue[str], start: Callable[..., Program]) -> None:
    """'q.get(block=True, timeout=2.0)', in a program that is given an item before its time is up"""
    consumer = start(
        'q = shmqueue.ShmQueue(sys.argv[1]); say("waits"); say(q.get(block=True, timeout=60.0))', q.identifier
    )
    assert consumer.says() == "waits"
    wait_until(lambda: is_asleep(consumer.pid))
    q.put("in time")
    assert consumer.says() == "in time"
    assert consumer.ends() == (0, "")


def test_put_with_a_timeout_raises_full_when_it_is_over(q: ShmQueue[bytes]) -> None:
    """The 'Timeout' of 'put', which has the same two arguments."""
    q.put(bytes(4000))
    before = time.monotonic()
    with pytest.raises(exceptions.ShmQueueFull):
        q.put(bytes(100), block=True, timeout=0.3)
    assert 0.3 <= time.monotonic() - before < 0.3 + PATIENCE_S
    assert q.qsize() == 1


def test_status_calls_tell_what_is_in_the_queue(q: ShmQueue[Any]) -> None:
    """'qsize: number of items currently in queue', 'empty: True / False', 'full: True / False',
    'buffer_occupancy: bytes used in ring buffer'"""
    assert (q.qsize(), q.empty(), q.full(), q.buffer_occupancy()) == (0, True, False, 0)
    q.put("four")  # 5 bytes of msgpack
    assert (q.qsize(), q.empty(), q.full(), q.buffer_occupancy()) == (1, False, False, 8 + 5)
    q.put(bytes(SYSTEM_PAGESIZE - 13 - 8 - 3))
    assert (q.qsize(), q.empty(), q.full(), q.buffer_occupancy()) == (2, False, True, SYSTEM_PAGESIZE)
    q.get()
    assert (q.qsize(), q.empty(), q.full(), q.buffer_occupancy()) == (1, False, False, SYSTEM_PAGESIZE - 13)
    q.get()
    assert (q.qsize(), q.empty(), q.full(), q.buffer_occupancy()) == (0, True, False, 0)


def test_snapshot_has_all_fields(q: ShmQueue[Any]) -> None:
    """'q.snapshot()  # all fields in one lock acquisition (ShmRefDataSnapshot)'"""
    size = SYSTEM_PAGESIZE
    fields = ("ref_count", "put_pos", "get_pos", "buffer_size", "qsize", "same_lap")
    assert shmqueue.ShmRefDataSnapshot._fields == fields
    assert q.snapshot() == shmqueue.ShmRefDataSnapshot(1, 0, 0, size, 0, 1)  # empty: equal, in the same lap
    q.put(bytes(size - 100 - 11))
    assert q.snapshot() == (1, size - 100, 0, size, 1, 1)
    q.get()
    q.put(bytes(200 - 10))  # takes exactly 200: the last 100 bytes and the first 100
    assert q.snapshot() == (1, 100, size - 100, size, 1, 0)
    q.put(bytes(size - 200 - 11))
    assert q.snapshot() == (1, size - 100, size - 100, size, 2, 0)  # full: equal, and not in the same lap
    assert q.full()
    assert q.debug_ref_data == q.snapshot()
    with ShmQueue[Any](q.identifier) as other:
        assert other.snapshot() == (2, size - 100, size - 100, size, 2, 0)


def test_snapshot_is_of_one_instant_however_fast_others_are(queue_name: str, start: Callable[..., Program]) -> None:
    """'all fields in one lock acquisition': positions and count agree in each one."""
    item = bytes(16 - 8 - 2)  # takes 16 bytes, so qsize() tells the bytes between the positions
    with ShmQueue[bytes](queue_name) as q:
        busy = start(
            """
            q = shmqueue.ShmQueue(sys.argv[1])
            items = [bytes(6)] * 37
            say("busy")
            while True:
                q.put_many(items)
                for _ in items:
                    q.get()
            """,
            queue_name,
        )
        assert busy.says() == "busy"
        q.put(item)
        seen = set()
        for _ in range(20_000):
            snap = q.snapshot()
            used = snap.put_pos - snap.get_pos + (0 if snap.same_lap else snap.buffer_size)
            # While records are being copied out of the ring their bytes are in use, but they are no longer items.
            assert 0 <= snap.qsize * 16 <= used <= snap.buffer_size
            assert snap.put_pos % 16 == snap.get_pos % 16 == 0
            assert snap.ref_count == 2
            seen.add(snap.qsize)
        assert len(seen) > 1, "nothing ever moved"
        busy.kill()


def test_shutdown_decrements_the_ref_count_and_the_last_closer_frees_shared_memory(
    queue_name: str, start: Callable[..., Program]
) -> None:
    """'q.shutdown()  # decrement ref count; last closer frees shared memory'"""
    first = ShmQueue[int](queue_name)
    second = ShmQueue[int](queue_name)
    other = start("q = shmqueue.ShmQueue(sys.argv[1]); say(q.refs); sys.stdin.readline(); q.shutdown()", queue_name)
    assert other.says() == "3"
    assert first.snapshot().ref_count == first.refs == 3
    first.put(1)
    first.shutdown()
    assert second.refs == 2
    assert segment(queue_name).exists()
    other.tell()
    assert other.ends() == (0, "")
    assert second.refs == 1
    assert second.get(block=False) == 1
    second.shutdown()
    assert not segment(queue_name).exists()


def test_who_opens_a_queue_that_was_freed_gets_a_new_and_empty_one(queue_name: str) -> None:
    """'last closer frees shared memory': its items, and its size, go with it."""
    with ShmQueue[int](queue_name) as q:
        q.put(1)
    with ShmQueue[int](queue_name, buffer_size=3 * SYSTEM_PAGESIZE) as q:
        assert q.empty()
        assert q.max_buffer_size() == 3 * SYSTEM_PAGESIZE


def test_shutdown_twice_is_fine(queue_name: str) -> None:
    """'q.shutdown()', and once more, by the same handle and never at another's expense"""
    other = ShmQueue[int](queue_name)
    q = ShmQueue[int](queue_name)
    q.shutdown()
    q.shutdown(use_gc=False)
    q.shutdown(False)
    assert other.refs == 1
    assert segment(queue_name).exists()
    other.shutdown()
    other.shutdown()
    assert not segment(queue_name).exists()


# ---- Multi-process example

EXAMPLE = """
import multiprocessing, shmqueue, time

QUEUE_NAME = "demo_queue"

def producer():
    q = shmqueue.ShmQueue(QUEUE_NAME)
    for i in range(10):
        q.put(i)
    q.shutdown()

def consumer():
    q = shmqueue.ShmQueue(QUEUE_NAME)
    received = []
    while len(received) < 10:
        try:
            received.append(q.get(block=True, timeout=5.0))
        except shmqueue.exceptions.ShmQueueEmpty:
            break
    print(received)
    q.shutdown()

if __name__ == "__main__":
    q_main = shmqueue.ShmQueue(QUEUE_NAME)   # keep shm alive for duration
    p = multiprocessing.Process(target=producer)
    c = multiprocessing.Process(target=consumer)
    p.start(); c.start()
    p.join();  c.join()
    q_main.shutdown()
"""


@pytest.mark.parametrize("method", ["by itself", *START_METHODS])
def test_multi_process_example_runs_as_it_stands(queue_name: str, method: str, tmp_path: Path) -> None:
    """'Multi-process example', as a script of its own; and with each way to start a process"""
    code = EXAMPLE.replace("demo_queue", queue_name)
    if method != "by itself":
        main = 'if __name__ == "__main__":\n'
        code = code.replace(main, f'{main}    multiprocessing.set_start_method("{method}")\n')
    script = tmp_path / "example.py"
    script.write_text(code, encoding="utf-8")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=PATIENCE_S)
    assert (done.returncode, done.stdout, done.stderr) == (0, "[0, 1, 2, 3, 4, 5, 6, 7, 8, 9]\n", "")
    assert not segment(queue_name).exists()


# ---- Optional: register exit handlers

ENDINGS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
PASTIMES = {
    "computing": "while True: pass",
    "sleeping": "idle()",
    "getting": "queues[0].get()",
    "putting": "queues[0].put(bytes(4000)); queues[0].put(bytes(4000))",
    "putting many": "import itertools; queues[0].put_many(itertools.repeat(bytes(100)))",
}


@pytest.mark.parametrize("pastime", PASTIMES)
@pytest.mark.parametrize("number", ENDINGS, ids=lambda number: number.name)
def test_exit_handlers_release_shm_on_unexpected_termination(
    queue_name: str, start: Callable[..., Program], number: signal.Signals, pastime: str
) -> None:
    """'shm is released on unexpected termination (SIGINT / SIGTERM [...])', and the signal is still what
    it was: Ctrl-C raises KeyboardInterrupt, the others end the process."""
    program = start(
        f"""
        queues = [shmqueue.ShmQueue(sys.argv[1])]
        queues[0].set_console_handlers(register_atexit=True)
        say("ready")
        {PASTIMES[pastime]}
        """,
        queue_name,
    )
    assert program.says() == "ready"
    if pastime != "computing":
        wait_until(lambda: is_asleep(program.pid))
    assert segment(queue_name).exists()
    program.send_signal(number)
    status, stderr = program.ends()
    assert status == -number
    assert stderr.rstrip().endswith("KeyboardInterrupt") if number == signal.SIGINT else stderr == ""
    assert not segment(queue_name).exists()


def test_exit_handlers_of_several_queues_chain(queue_name: str, start: Callable[..., Program]) -> None:
    """'q.set_console_handlers(register_atexit=True)' for each of several queues: all are released."""
    names = [f"{queue_name}.{i}" for i in range(3)]
    for number in ENDINGS:
        program = start(
            """
            queues = [shmqueue.ShmQueue(name) for name in sys.argv[1:]]
            for q in queues:
                q.set_console_handlers(register_atexit=True)
                q.set_console_handlers()
            say("ready")
            idle()
            """,
            *names,
        )
        assert program.says() == "ready"
        assert all(segment(name).exists() for name in names)
        program.send_signal(number)
        assert program.ends()[0] == -number
        assert not any(segment(name).exists() for name in names)


def test_exit_handlers_leave_the_queue_to_those_who_still_use_it(
    q: ShmQueue[str], start: Callable[..., Program]
) -> None:
    """'so shm is released on unexpected termination': that process's hold on it, not the others'."""
    program = start(
        """
        q = shmqueue.ShmQueue(sys.argv[1])
        q.set_console_handlers()
        q.put("mine")
        say(q.refs)
        q.get(); q.get()
        """,
        q.identifier,
    )
    assert program.says() == "2"
    program.send_signal(signal.SIGTERM)
    assert program.ends() == (-signal.SIGTERM, "")
    assert q.refs == 1
    assert segment(q.identifier).exists()


def test_handlers_from_before_still_run_and_find_the_queue_released(
    queue_name: str, start: Callable[..., Program]
) -> None:
    """'Registers signal [...] handlers': in front of the program's own, not in their place."""
    program = start(
        """
        def mine(number, frame):
            is_there = os.path.exists("/dev/shm/shmqueue." + sys.argv[1])
            say(f"{signal.Signals(number).name} {is_there} {frame is not None}")
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, mine)
        q = shmqueue.ShmQueue(sys.argv[1])
        q.set_console_handlers()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.raise_signal(number)
        try:
            q.put(1)
        except shmqueue.exceptions.ShmQueueNotInitializedError:
            say("goes on")
        """,
        queue_name,
    )
    assert [program.says() for _ in range(4)] == [
        "SIGINT False True",
        "SIGTERM False True",
        "SIGHUP False True",
        "goes on",
    ]
    assert program.ends() == (0, "")


def test_handlers_that_chain_among_the_exit_handlers_run_once_each(
    queue_name: str, start: Callable[..., Program]
) -> None:
    """A program's handler that calls the one before it may stand between those of two queues."""
    program = start(
        """
        first, second = (shmqueue.ShmQueue(sys.argv[1] + end) for end in (".1", ".2"))
        first.set_console_handlers()
        before = signal.getsignal(signal.SIGTERM)
        def mine(number, frame):
            say("mine")
            before(number, frame)
        signal.signal(signal.SIGTERM, mine)
        second.set_console_handlers()
        say("ready")
        idle()
        """,
        queue_name,
    )
    assert program.says() == "ready"
    program.send_signal(signal.SIGTERM)
    assert program.says() == "mine"
    assert program.ends() == (-signal.SIGTERM, "")
    assert not any(segment(queue_name + end).exists() for end in (".1", ".2"))


def test_a_signal_that_was_ignored_stays_ignored(queue_name: str, start: Callable[..., Program]) -> None:
    """Under nohup, SIGHUP is no 'unexpected termination': the queue stays in use."""
    program = start(
        """
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        q = shmqueue.ShmQueue(sys.argv[1])
        q.set_console_handlers()
        signal.raise_signal(signal.SIGHUP)
        q.put("goes on")
        say(q.get())
        """,
        queue_name,
    )
    assert program.says() == "goes on"
    assert program.ends() == (0, "")


def test_exit_handlers_can_only_be_set_in_the_main_thread(q: ShmQueue[int]) -> None:
    """'q.set_console_handlers(register_atexit=True)', where Python takes no signal handlers"""
    caught: list[BaseException] = []

    def call() -> None:
        try:
            q.set_console_handlers()
        except BaseException as error:
            caught.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    thread.join(PATIENCE_S)
    assert [type(error) for error in caught] == [exceptions.ShmQueueRuntimeError]
    q.put(1)
    assert q.get() == 1


@pytest.mark.parametrize(
    ("end", "status"), [("", 0), ("sys.exit(3)", 3), ("1 / 0", 1), ("q = None", 0), ("q.me = q; del q", 0)]
)
@pytest.mark.parametrize("handlers", ["", "q.set_console_handlers()", "q.set_console_handlers(register_atexit=True)"])
def test_exit_handlers_release_shm_when_the_interpreter_ends(
    queue_name: str, handlers: str, end: str, status: int
) -> None:
    """'Registers signal, atexit, and weakref handlers so shm is released on unexpected termination'"""
    code = f"import shmqueue, sys\nq = shmqueue.ShmQueue(sys.argv[1])\nq.put([1])\n{handlers}\n{end}"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, queue_name], capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert done.returncode == status
    assert done.stderr == "" or end == "1 / 0"
    assert not segment(queue_name).exists()


def test_a_handle_that_nobody_holds_any_more_lets_go_at_once(queue_name: str) -> None:
    """'weakref handlers': neither the handlers nor anything else keeps a handle."""
    keeper = ShmQueue[int](queue_name)
    before = {number: signal.getsignal(number) for number in ENDINGS}
    gc.disable()
    try:
        q: ShmQueue[int] | None = ShmQueue[int](queue_name)
        q.set_console_handlers(register_atexit=True)
        q.custom_serialize(lambda method, data: b"")
        q.custom_deserialize(lambda method, chunks: 0)
        q.put(1, serialization_method=MY_METHOD)
        assert q.get_many() == [0]
        assert keeper.refs == 2
        q = None
        assert keeper.refs == 1
    finally:
        gc.enable()
        for number, handler in before.items():
            signal.signal(number, handler)
    keeper.shutdown()


# ---- Serialization


def test_serialization_methods_have_their_numbers() -> None:
    """'msgpack 0 (default)', 'pickle 1', 'Custom >= 1001'"""
    assert SerializationMethods.MSGPACK == SerializationMethods.DEFAULT == 0
    assert SerializationMethods.PICKLE == 1
    assert SerializationMethods.FIRST_PUBLIC_NUMBER == 1001
    assert inspect.signature(ShmQueue.put).parameters["serialization_method"].default == 0


@pytest.mark.parametrize("method", [SerializationMethods.MSGPACK, SerializationMethods.PICKLE])
def test_explicit_serialization_method_per_put(q: ShmQueue[Any], method: int) -> None:
    """'Explicit serialization method per put.' 'q.put("test", serialization_method=...)'"""
    q.put("test", serialization_method=method)
    payload = pickle.dumps("test", 5) if method else msgpack.packb("test")
    assert q.buffer_occupancy() == 8 + len(payload)
    assert q.get() == "test"
    q.put("test", True, 1.0, method)
    assert q.get() == "test"


def test_disabled_pickle_raises_serialization_error(queue_name: str) -> None:
    """'If picke is disabled, this will raise ShmQueueSerializationError'"""
    with ShmQueue[Any](queue_name, allow_pickle=False) as q:
        with pytest.raises(exceptions.ShmQueueSerializationError):
            q.put("test", serialization_method=shmqueue.SerializationMethods.PICKLE)
        with pytest.raises(exceptions.ShmQueueSerializationError):
            q.put({1, 2})
        assert q.empty()
        assert q.buffer_occupancy() == 0
        q.put(["msgpack", 1, None])
        assert q.get() == ["msgpack", 1, None]


def test_disabled_pickle_is_refused_at_the_receiving_end_too(queue_name: str, tmp_path: Path) -> None:
    """'pickle deserialization from untrusted data is a security concern - use allow_pickle=False'"""
    witness = tmp_path / "witness"

    class Payload:
        def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
            return Path.touch, (witness,)

    with ShmQueue[Any](queue_name) as sender, ShmQueue[Any](queue_name, allow_pickle=False) as q:
        sender.put(Payload())
        sender.put("next")
        with pytest.raises(exceptions.ShmQueueDeserializationError) as caught:
            q.get()
        assert caught.value.payload == pickle.dumps(Payload(), 5)
        assert caught.value.serialization_method == SerializationMethods.PICKLE
        assert q.get() == "next"
        assert q.empty()
    assert not witness.exists()


CUSTOM = """
import struct, shmqueue
from shmqueue import SerializationMethods

MY_METHOD = SerializationMethods.FIRST_PUBLIC_NUMBER + 1

q = shmqueue.ShmQueue("my_queue", buffer_size=1000)

def my_serializer(method: int, data) -> bytes:
    if method == MY_METHOD:
        return struct.pack("I", data)
    raise NotImplementedError

def my_deserializer(method: int, chunks: list) -> int:
    if method == MY_METHOD:
        return struct.unpack("I", b"".join(chunks))[0]
    raise NotImplementedError

q.custom_serialize(my_serializer)
q.custom_deserialize(my_deserializer)

q.put(42, serialization_method=MY_METHOD)
assert q.get() == 42
"""


def test_custom_serialization_runs_as_it_stands(queue_name: str) -> None:
    """The block below 'Custom serialization', whole"""
    assert run(CUSTOM.replace("my_queue", queue_name)) == ""
    assert not segment(queue_name).exists()


def set_custom(q: ShmQueue[Any]) -> None:
    """Payloads of any length, also 0: a str of digits as its number in a row of bytes of that value."""
    q.custom_serialize(lambda method, data: bytes([data % 256]) * (data % 301) if method == MY_METHOD else b"")
    q.custom_deserialize(lambda method, chunks: (method, b"".join(chunks)))


def test_custom_methods_make_5000_round_trips_with_wrap_around(q: ShmQueue[Any]) -> None:
    """'Any method ID >= SerializationMethods.FIRST_PUBLIC_NUMBER + 1 is user-defined': 5000 round trips"""
    set_custom(q)
    expected: list[tuple[int, bytes]] = []
    laps, last = 0, 0
    for i in range(5000):
        q.put(i, serialization_method=MY_METHOD)
        expected.append((MY_METHOD, bytes([i % 256]) * (i % 301)))
        if len(expected) > 8:
            assert q.get() == expected.pop(0)
        assert q.buffer_occupancy() == sum(8 + len(payload) for _, payload in expected)
        laps, last = laps + (q.snapshot().put_pos < last), q.snapshot().put_pos
    assert [q.get() for _ in expected] == expected
    assert laps > 150
    assert q.check() == []


@pytest.mark.parametrize("method", [1001, 1002, 65536, 2**24 - 1])
def test_any_method_id_from_the_first_public_number_on_is_user_defined(q: ShmQueue[Any], method: int) -> None:
    """'Custom >= 1001': the id is given to both functions"""
    seen: list[int] = []
    q.custom_serialize(lambda method, data: seen.append(method) or data)
    q.custom_deserialize(lambda method, chunks: (method, b"".join(chunks)))
    q.put(b"as it is", serialization_method=method)
    assert q.buffer_occupancy() == 8 + len(b"as it is")
    assert q.get() == (method, b"as it is")
    assert seen == [method]


@pytest.mark.parametrize("method", [2, 3, 1000, 1001, MY_METHOD, 2**24 - 1, -1, -(2**70)])
def test_a_method_without_a_serializer_is_not_implemented(q: ShmQueue[Any], method: int) -> None:
    """'Provide a serializer and deserializer': without one it is a NotImplementedError."""
    with pytest.raises(NotImplementedError):
        q.put(42, serialization_method=method)
    assert q.empty()
    assert q.buffer_occupancy() == 0


def test_a_serializer_that_raises_not_implemented_is_believed(q: ShmQueue[Any]) -> None:
    """'raise NotImplementedError' in 'my_serializer' and in 'my_deserializer'"""

    def refuse(method: int, data: Any) -> Any:
        raise NotImplementedError

    q.custom_serialize(refuse)
    with pytest.raises(NotImplementedError):
        q.put(42, serialization_method=MY_METHOD)
    assert q.empty()
    q.custom_serialize(lambda method, data: b"lost?")
    q.custom_deserialize(refuse)
    q.put(42, serialization_method=MY_METHOD)
    with pytest.raises(NotImplementedError) as caught:
        q.get()
    assert isinstance(caught.value, exceptions.ShmQueueDeserializationError)
    assert caught.value.payload == b"lost?"
    assert caught.value.serialization_method == MY_METHOD


def test_a_method_without_a_deserializer_loses_nothing(queue_name: str) -> None:
    """'Provide a serializer and deserializer', at the end that has none"""
    with ShmQueue[Any](queue_name) as sender, ShmQueue[Any](queue_name) as q:
        set_custom(sender)
        sender.put(42, serialization_method=MY_METHOD)
        sender.put("next")
        with pytest.raises(NotImplementedError) as caught:
            q.get()
        assert isinstance(caught.value, exceptions.ShmQueueDeserializationError)
        assert caught.value.payload == bytes([42]) * 42
        assert caught.value.serialization_method == MY_METHOD
        assert q.get() == "next"


def test_custom_functions_may_be_set_again(q: ShmQueue[Any]) -> None:
    """'q.custom_serialize(my_serializer)', 'q.custom_deserialize(my_deserializer)': the last ones count."""
    for add in range(3):
        q.custom_serialize(lambda method, data, add=add: bytes([data + add]))
        q.custom_deserialize(lambda method, chunks, add=add: chunks[0][0] - add)
        q.put(42, serialization_method=MY_METHOD)
        assert q.get() == 42


# ---- Troubleshooting: resource tracking

TRACKED_MOVES = """
import multiprocessing, sys
import shmqueue

def work(name, handle):
    with shmqueue.ShmQueue(name) as q:
        q.put(q.get() + 1)
    handle.put(handle.get() + 1)
    handle.shutdown()

if __name__ == "__main__":
    method, name = sys.argv[1:]
    context = multiprocessing.get_context(method)
    with shmqueue.ShmQueue(name) as q:
        q.put(0)
        workers = [context.Process(target=work, args=(name, q)) for _ in range(2)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        print(q.get(), q.refs, [worker.exitcode for worker in workers])
"""


@pytest.mark.parametrize("method", START_METHODS)
def test_no_false_warnings_of_the_resource_tracker_by_default(queue_name: str, method: str, tmp_path: Path) -> None:
    """'shmqueue suppresses these warnings by default (track_resources=False)'"""
    script = tmp_path / "moves.py"
    script.write_text(TRACKED_MOVES, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(script), method, queue_name], capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "4 1 [0, 0]\n", "")


def test_no_false_warnings_when_the_tracker_runs_anyway(queue_name: str) -> None:
    """'when multiple processes share the same block', and one has started the tracker for its own purposes"""
    printed = run(
        """
        import sys
        from multiprocessing import shared_memory
        import shmqueue
        block = shared_memory.SharedMemory(create=True, size=1)  # starts the tracker
        q = shmqueue.ShmQueue(sys.argv[1])
        q.put(1)
        print(q.get())
        block.close()
        block.unlink()
        """,
        queue_name,
    )
    assert printed == "1\n"


def test_tracked_segment_is_registered_while_attached(queue_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """'To opt back in: q = shmqueue.ShmQueue("my_queue", track_resources=True)'"""
    from multiprocessing import resource_tracker

    calls: list[tuple[str, str, str]] = []
    for action in ("register", "unregister"):
        monkeypatch.setattr(
            resource_tracker, action, lambda name, kind, action=action: calls.append((action, name, kind))
        )
    with ShmQueue[int](queue_name):
        pass
    assert calls == []
    with ShmQueue[int](queue_name, track_resources=True):
        assert calls == [("register", f"/{segment(queue_name).name}", "shared_memory")]
    assert calls[1:] == [("unregister", f"/{segment(queue_name).name}", "shared_memory")]


@pytest.mark.parametrize("ending", ["q.shutdown()", "", "del q", "sys.exit()"])
def test_tracked_segment_is_released_without_noise(queue_name: str, ending: str) -> None:
    """'track_resources=True' for a program that does as it should"""
    code = f"import shmqueue, sys\nq = shmqueue.ShmQueue(sys.argv[1], track_resources=True)\nq.put(1)\n{ending}"
    assert run(code, queue_name) == ""
    assert not segment(queue_name).exists()


def test_tracked_handles_of_one_process_are_released_without_noise(queue_name: str) -> None:
    """'track_resources=True' for two handles: the tracker knows names, not how often they were registered."""
    code = """
        import shmqueue, sys
        first = shmqueue.ShmQueue(sys.argv[1], track_resources=True)
        second = shmqueue.ShmQueue(sys.argv[1], track_resources=True)
        first.shutdown()
        second.put(1)
        print(second.get())
        second.shutdown()
    """
    assert run(code, queue_name) == "1\n"
    assert not segment(queue_name).exists()


def test_tracked_segment_of_a_killed_process_is_removed_by_the_tracker(
    queue_name: str, start: Callable[..., Program]
) -> None:
    """'track_resources=True': registered for real, so that the tracker cleans up and says so"""
    program = start(
        'q = shmqueue.ShmQueue(sys.argv[1], track_resources=True); q.put(1); say("put"); idle()', queue_name
    )
    assert program.says() == "put"
    assert segment(queue_name).exists()
    program.send_signal(signal.SIGKILL)
    status, stderr = program.ends()
    assert status == -signal.SIGKILL
    assert "leaked shared_memory" in stderr
    assert not segment(queue_name).exists()


# ---- Troubleshooting: buffer size


@pytest.mark.parametrize(
    ("asked", "pages"),
    [
        (1, 1),
        (1000, 1),
        (SYSTEM_PAGESIZE - 1, 1),
        (SYSTEM_PAGESIZE, 1),
        (SYSTEM_PAGESIZE + 1, 2),
        (2 * SYSTEM_PAGESIZE, 2),
        (10 * SYSTEM_PAGESIZE - 1, 10),
        (1_000_000, -(-1_000_000 // SYSTEM_PAGESIZE)),
    ],
)
def test_buffer_size_is_rounded_up_to_a_multiple_of_the_page_size(queue_name: str, asked: int, pages: int) -> None:
    """'buffer_size is rounded up to the nearest multiple of SYSTEM_PAGESIZE (typically 4096 bytes)'"""
    with ShmQueue[bytes](queue_name, buffer_size=asked) as q:
        size = pages * SYSTEM_PAGESIZE
        assert q.max_buffer_size() == q.snapshot().buffer_size == size
        head = len(msgpack.packb(bytes(size - 8))) - (size - 8)
        q.put(bytes(size - 8 - head))
        assert q.full()
        assert len(q.get()) == size - 8 - head


def test_buffer_size_defaults_to_a_page(q: ShmQueue[int]) -> None:
    """'q = shmqueue.ShmQueue("my_queue")': SYSTEM_PAGESIZE bytes"""
    assert q.max_buffer_size() == SYSTEM_PAGESIZE


def test_who_attaches_gets_the_size_that_the_queue_was_created_with(
    queue_name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """'Consumer process (same name [...])' names no size, or another one: that is only logged."""
    with ShmQueue[int](queue_name, buffer_size=2 * SYSTEM_PAGESIZE) as first:
        first.put(1)
        with caplog.at_level(logging.DEBUG, logger="shmqueue"):
            with ShmQueue[int](queue_name, buffer_size=100 * SYSTEM_PAGESIZE) as second:
                assert second.max_buffer_size() == 2 * SYSTEM_PAGESIZE
                assert second.get() == 1
            assert str(100 * SYSTEM_PAGESIZE) in caplog.text
            assert str(2 * SYSTEM_PAGESIZE) in caplog.text
            caplog.clear()
            with ShmQueue[int](queue_name, buffer_size=2 * SYSTEM_PAGESIZE - 1):
                assert caplog.text == ""


# One example on each side of every change of msgpack's format.
EDGES = [
    *(sign * (2**bits) + more for bits in (5, 7, 8, 15, 16, 31, 32) for sign in (1, -1) for more in (-1, 0, 1)),
    *(-(2**63), 2**63 - 1, 2**63, 2**64 - 1),
    *("s" * n for n in (0, 1, 31, 32, 255, 256, 65535, 65536)),
    *(bytes(n) for n in (0, 1, 15, 16, 255, 256, 4085, 4086, 65535, 65536)),
    *([0] * n for n in (0, 1, 15, 16, 65535, 65536)),
    *(dict.fromkeys(range(n)) for n in (0, 1, 15, 16)),
    None,
    True,
    False,
    0.0,
    -1.5,
    float("nan"),
    "ü" * 100,
    (1, (2, 3)),
    bytearray(300),
    memoryview(b"view" * 100),
    msgpack.ExtType(7, b"seven"),
    msgpack.Timestamp(1, 2),
    {"id": 1, "v": 1.5, "name": "sensor", "tags": ["a", b"b", {"c": None}]},
]
items = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(st.characters(exclude_categories=["Cs"]))
    | st.binary(),
    lambda some: st.lists(some) | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), some),
    max_leaves=20,
)


def test_an_item_occupies_the_header_and_its_msgpack(queue_name: str) -> None:
    """'A single item occupies SIZE_HEADER (8 B) + len(msgpack.packb(payload)) bytes.'"""
    with ShmQueue[Any](queue_name, buffer_size=1 << 20) as q:
        before = 0
        for item in EDGES:
            q.put(item)
            size = SIZE_HEADER + len(msgpack.packb(item))
            assert q.buffer_occupancy() - before == size, item
            before += size
        assert q.qsize() == len(EDGES)
        for item in EDGES:
            q.get()
            before -= SIZE_HEADER + len(msgpack.packb(item))
            assert q.buffer_occupancy() == before, item


def test_a_random_item_occupies_the_header_and_its_msgpack(queue_name: str) -> None:
    """'SIZE_HEADER (8 B) + len(msgpack.packb(payload)) bytes', whatever the item"""
    with ShmQueue[Any](queue_name, buffer_size=1 << 20) as q:

        @settings(max_examples=60, deadline=None)
        @given(st.lists(items, min_size=1, max_size=5))
        def check(some: list[Any]) -> None:
            for item in some:
                before = q.buffer_occupancy()
                q.put(item)
                assert q.buffer_occupancy() == before + SIZE_HEADER + len(msgpack.packb(item))
            assert repr(q.get_many()) == repr(some)  # repr, as nan != nan
            assert q.buffer_occupancy() == 0

        check()


@pytest.mark.parametrize("item", [{1, 2}, 2**70, datetime.date(2024, 1, 1), 1j], ids=repr)
def test_a_pickled_item_occupies_the_header_and_its_pickle(q: ShmQueue[Any], item: Any) -> None:
    """'pickle: Fallback for arbitrary Python objects', in protocol 5"""
    q.put(item)
    assert q.buffer_occupancy() == SIZE_HEADER + len(pickle.dumps(item, 5))


@pytest.mark.parametrize("pages", [1, 2, 3, 17])
def test_full_is_true_at_the_last_byte_and_not_before(queue_name: str, pages: int) -> None:
    """'q.full()  # True / False': not a byte is free"""
    size = pages * SYSTEM_PAGESIZE
    with ShmQueue[Any](queue_name, buffer_size=size) as q:
        q.custom_serialize(lambda method, data: bytes(data))
        for before in range(0, 4 * SYSTEM_PAGESIZE, 997):  # wherever in the ring it begins
            for free in (1, 7, 8, 9, 0):
                q.put(size - 8 - free, serialization_method=MY_METHOD)
                assert (q.full(), q.buffer_occupancy()) == (free == 0, size - free)
                if free < 8:  # not even an empty payload fits
                    with pytest.raises(exceptions.ShmQueueFull):
                        q.put(0, block=False, serialization_method=MY_METHOD)
                else:
                    q.put(free - 8, block=False, serialization_method=MY_METHOD)
                    assert q.full()
                q.clear()
                assert (q.full(), q.buffer_occupancy()) == (False, 0)
            q.put(before % 1000, serialization_method=MY_METHOD)
            q.clear()


def test_full_of_the_smallest_items(q: ShmQueue[Any]) -> None:
    """'SIZE_HEADER (8 B) + [...]': payloads of no bytes take 8, and 512 of them fill a page."""
    q.custom_serialize(lambda method, data: b"")
    q.custom_deserialize(lambda method, chunks: len(b"".join(chunks)))
    for _ in range(3):
        for n in range(SYSTEM_PAGESIZE // 8):
            assert (q.qsize(), q.buffer_occupancy(), q.full()) == (n, 8 * n, False)
            q.put(None, block=False, serialization_method=MY_METHOD)
        assert q.full()
        assert [q.get() for _ in range(SYSTEM_PAGESIZE // 8)] == [0] * (SYSTEM_PAGESIZE // 8)


@pytest.mark.parametrize("pages", [1, 3, 5])
def test_items_of_odd_sizes_pass_many_times_round_the_ring(queue_name: str, pages: int) -> None:
    """'a shared-memory ring buffer': hundreds of laps, wrapping at every offset, nothing torn or lost"""
    random_sizes = random.Random(pages)
    size = pages * SYSTEM_PAGESIZE
    with ShmQueue[bytes](queue_name, buffer_size=size) as q:
        expected: list[bytes] = []
        laps, last = 0, 0
        for i in range(6000):
            item = (i.to_bytes(4, "big") * (size // 8))[: random_sizes.choice((1, 13, 61, 251, 1021, size // 3))]
            with contextlib.suppress(exceptions.ShmQueueFull):
                q.put(item, block=False)
                expected.append(item)
                laps, last = laps + (q.snapshot().put_pos < last), q.snapshot().put_pos
                continue
            for _ in range(random_sizes.randint(1, len(expected))):
                assert q.get(block=False) == expected.pop(0)
            assert q.qsize() == len(expected)
        assert [q.get(block=False) for _ in expected] == expected
        assert laps > 100
        assert q.check() == []


@pytest.mark.parametrize("room", ["empty", "partly full", "full"])
def test_an_item_larger_than_buffer_size_is_refused_immediately(q: ShmQueue[bytes], room: str) -> None:
    """'An item larger than buffer_size raises ShmQueueValueError immediately.'"""
    inside = {"empty": [], "partly full": [b"first"], "full": [bytes(SYSTEM_PAGESIZE - 11)]}[room]
    for item in inside:
        q.put(item)
    for payload in (SYSTEM_PAGESIZE - 11 + 1, SYSTEM_PAGESIZE, 10 * SYSTEM_PAGESIZE, 10**7):
        for options in ({}, {"timeout": 600}, {"block": False}):
            before = time.monotonic()
            with pytest.raises(exceptions.ShmQueueValueError, match=r"\d+ bytes"):
                q.put(bytes(payload), **options)
            assert time.monotonic() - before < PATIENCE_S
    assert [q.get() for _ in inside] == inside
    q.put(bytes(SYSTEM_PAGESIZE - 11), block=False)  # the largest there is
    assert q.full()


# ---- Troubleshooting: abrupt process termination


def test_ref_counts_are_right_with_killed_processes_among_them(queue_name: str, start: Callable[..., Program]) -> None:
    """'Abrupt process termination': who was killed is no reference, and frees nothing for the others."""
    with ShmQueue[int](queue_name) as q:
        holder = 'q = shmqueue.ShmQueue(sys.argv[1]); q.put(int(sys.argv[2])); say("put"); idle()'
        programs = [start(holder, queue_name, str(number)) for number in range(4)]
        assert [program.says() for program in programs] == ["put"] * 4
        assert q.refs == 5
        for left, program in enumerate(programs[:3]):
            program.kill()
            wait_until(lambda left=left: q.refs == 4 - left)
        assert q.snapshot().ref_count == 2
        more = start("q = shmqueue.ShmQueue(sys.argv[1]); say(q.refs); idle()", queue_name)
        assert more.says() == "3"
        more.kill()
        programs[3].kill()
        wait_until(lambda: q.refs == 1)
        assert sorted(q.get(block=False) for _ in range(4)) == [0, 1, 2, 3]
    assert not segment(queue_name).exists()


def test_items_of_a_killed_process_wait_for_the_next_one(queue_name: str, start: Callable[..., Program]) -> None:
    """'If a process is killed': the last one, too, takes no item with it that it has put."""
    program = start('q = shmqueue.ShmQueue(sys.argv[1]); q.put_many(range(9)); say("put"); idle()', queue_name)
    assert program.says() == "put"
    program.kill()
    assert segment(queue_name).exists()
    with ShmQueue[int](queue_name, buffer_size=10 * SYSTEM_PAGESIZE) as q:
        assert q.max_buffer_size() == SYSTEM_PAGESIZE
        assert q.refs == 1
        assert q.get_many() == list(range(9))
    assert not segment(queue_name).exists()


@pytest.mark.parametrize("move", ["q.put(b'x' * 50)", "q.get()", "q.put(b'x' * 50); q.get()"])
def test_a_process_killed_during_put_or_get_locks_nobody_out(
    queue_name: str, start: Callable[..., Program], move: str
) -> None:
    """'If a process is killed during a put/get, the internal [...] mutex may remain locked': not here."""
    with ShmQueue[bytes](queue_name) as q:
        for _ in range(5):
            q.clear()
            program = start(f'q = shmqueue.ShmQueue(sys.argv[1]); say("goes")\nwhile True: {move}', queue_name)
            assert program.says() == "goes"
            for _ in range(200):
                with contextlib.suppress(queue.Full, queue.Empty):
                    q.put(b"x" * 50, block=False)
                    q.get(block=False)
            program.kill()
            q.clear()
            q.put(b"free", timeout=PATIENCE_S)
            assert q.get(timeout=PATIENCE_S) == b"free"
            assert q.check() == []
        wait_until(lambda: q.refs == 1)


# ---- what else it names


def test_module_has_its_constants() -> None:
    """'SYSTEM_PAGESIZE', 'SIZE_HEADER (8 B)', 'SerializationMethods', 'exceptions', 'ShmRefDataSnapshot'"""
    assert shmqueue.SYSTEM_PAGESIZE == mmap.PAGESIZE
    assert shmqueue.SIZE_HEADER == 8
    assert {action.name: action.value for action in shmqueue.DebugRefLogAction} == {
        "CREATE": "create",
        "SHUTDOWN": "shutdown",
    }
    assert shmqueue.__version__ == "0.1.0"
    for name in ("Empty", "Full", "ValueError", "TypeError", "SerializationError", "DeserializationError"):
        assert issubclass(getattr(shmqueue.exceptions, f"ShmQueue{name}"), shmqueue.exceptions.ShmQueueException)
    assert set(shmqueue.__all__) <= set(dir(shmqueue))


def test_signatures_are_those_of_0_0_2() -> None:
    """Programs written for the release that the specification describes pass these arguments."""
    init = inspect.signature(ShmQueue).parameters
    assert next(iter(init)) == "queue_name"
    given = {"logger": None, "buffer_size": SYSTEM_PAGESIZE, "debug_ref_to_file_log": False}
    given |= {"allow_pickle": True, "track_resources": False}
    for name, default in given.items():
        assert (init[name].default, init[name].kind) == (default, inspect.Parameter.KEYWORD_ONLY)
    put = inspect.signature(ShmQueue.put).parameters
    assert [(name, each.default) for name, each in put.items()][1:] == [
        ("data", inspect.Parameter.empty),
        ("block", True),
        ("timeout", None),
        ("serialization_method", 0),
    ]
    get = inspect.signature(ShmQueue.get).parameters
    assert [(name, each.default) for name, each in get.items()][1:] == [("block", True), ("timeout", None)]
    assert inspect.signature(ShmQueue.shutdown).parameters["use_gc"].default is True
    assert inspect.signature(ShmQueue.set_console_handlers).parameters["register_atexit"].default is False


def test_put_nowait_and_get_nowait_are_there(q: ShmQueue[int]) -> None:
    """'add put_nowait/get_nowait methods'"""
    with pytest.raises(exceptions.ShmQueueEmpty):
        q.get_nowait()
    q.put_nowait(1)
    q.put_nowait(2, serialization_method=SerializationMethods.PICKLE)
    assert (q.get_nowait(), q.get_nowait()) == (1, 2)
    q.put_nowait(bytes(4000))
    with pytest.raises(exceptions.ShmQueueFull):
        q.put_nowait(bytes(100))


def log_of(temporary: Path, name: str) -> dict[str, dict[str, Any]]:
    return json.loads((temporary / "shmqueue" / f"_ref_log_{name}.json").read_text())


def test_debug_log_tells_of_each_handle(queue_name: str, temporary: Path, start: Callable[..., Program]) -> None:
    """'debug file': created, shut down and ref_count of every handle, of all processes"""
    before = datetime.datetime.now(datetime.timezone.utc)
    q = ShmQueue[int](queue_name, debug_ref_to_file_log=True)
    (mine,) = log_of(temporary, queue_name)
    assert log_of(temporary, queue_name)[mine]["ref_count"] == 1
    assert not log_of(temporary, queue_name)[mine]["shutdown"]
    other = start(
        "q = shmqueue.ShmQueue(sys.argv[1], debug_ref_to_file_log=True); say(q.refs); sys.stdin.readline()", queue_name
    )
    assert other.says() == "2"
    (theirs,) = set(log_of(temporary, queue_name)) - {mine}
    assert log_of(temporary, queue_name)[theirs]["ref_count"] == 2
    other.tell()
    assert other.ends() == (0, "")
    killed = start("q = shmqueue.ShmQueue(sys.argv[1], debug_ref_to_file_log=True); say(q.refs); idle()", queue_name)
    assert killed.says() == "2"
    killed.kill()
    wait_until(lambda: q.refs == 1)
    q.shutdown()
    q.shutdown()
    log = log_of(temporary, queue_name)
    (lost,) = set(log) - {mine, theirs}
    assert not log[lost]["shutdown"]
    assert (log[theirs]["ref_count"], log[mine]["ref_count"]) == (1, 0)
    after = datetime.datetime.now(datetime.timezone.utc)
    for entry in (log[mine], log[theirs]):
        moments = [datetime.datetime.fromisoformat(entry[key]).astimezone() for key in ("created", "shutdown")]
        assert before <= moments[0] <= moments[1] <= after


def test_debug_log_has_the_quoted_name_and_is_only_written_on_request(temporary: Path, queue_name: str) -> None:
    """'debug_ref_to_file_log', and a name that is no file name"""
    name = f"{queue_name}/ü %"
    with ShmQueue[int](name):
        pass
    assert list(temporary.iterdir()) == []
    with ShmQueue[int](name, debug_ref_to_file_log=True):
        assert len(log_of(temporary, f"{queue_name}%2F%C3%BC%20%25")) == 1


def test_debug_log_that_cannot_be_written_stands_in_nobodys_way(
    temporary: Path, queue_name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A debugging aid is no reason for a queue to fail."""
    (temporary / "shmqueue").write_text("a file where the directory should be")
    with caplog.at_level(logging.WARNING), ShmQueue[int](queue_name, debug_ref_to_file_log=True) as q:
        q.put(1)
        assert q.get() == 1
    assert "_ref_log_" in caplog.text


def test_warnings_go_to_the_logger_given(queue_name: str) -> None:
    """'logger' of 0.0.2: the program's own"""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.Logger("mine", logging.DEBUG)
    logger.addHandler(handler)
    with ShmQueue[int](queue_name), ShmQueue[int](queue_name, logger=logger, buffer_size=5 * SYSTEM_PAGESIZE):
        pass
    assert [line for line in lines if str(5 * SYSTEM_PAGESIZE) in line]


def test_a_forked_child_is_a_reference_of_its_own(q: ShmQueue[int]) -> None:
    """'multiprocessing.Process(target=...)' with a handle from before the fork"""
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(2)

    def work() -> None:
        barrier.wait(PATIENCE_S)
        q.put(q.refs)
        barrier.wait(PATIENCE_S)

    child = context.Process(target=work)
    child.start()
    barrier.wait(PATIENCE_S)
    assert q.get(timeout=PATIENCE_S) == 2
    assert q.refs == 2
    barrier.wait(PATIENCE_S)
    child.join(PATIENCE_S)
    assert child.exitcode == 0
    assert q.refs == 1
    q.put(1)
    assert q.get() == 1


def test_many_producers_and_consumers_lose_and_double_nothing(queue_name: str, start: Callable[..., Program]) -> None:
    """'IPC between unrelated processes on the same machine without a broker'"""
    with ShmQueue[Any](queue_name, buffer_size=2 * SYSTEM_PAGESIZE) as q:
        producer = """
            me = int(sys.argv[2])
            with shmqueue.ShmQueue(sys.argv[1]) as q:
                for i in range(2000):
                    q.put([me, i, bytes(i % 97)])
        """
        producers = [start(producer, queue_name, str(me)) for me in range(3)]
        last = [-1, -1, -1]
        for _ in itertools.repeat(None, 6000):
            me, i, filling = q.get(timeout=PATIENCE_S)
            assert (i, filling) == (last[me] + 1, bytes(i % 97))
            last[me] = i
        assert last == [1999] * 3
        assert [program.ends() for program in producers] == [(0, "")] * 3
        assert q.empty()
        assert q.check() == []


def test_struct_example_takes_four_bytes(q: ShmQueue[int]) -> None:
    """'return struct.pack("I", data)': 4 bytes and the header"""
    q.custom_serialize(lambda method, data: struct.pack("I", data))
    q.put(42, serialization_method=MY_METHOD)
    assert q.buffer_occupancy() == SIZE_HEADER + 4
