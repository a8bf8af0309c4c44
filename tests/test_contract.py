"""What every face of the queue must do, whoever wrote it: `queue.Queue`, to the letter, and then more.

`TestAsQueue` uses nothing but what the standard library's queue has, and runs against that one too: if
a test is wrong about the vocabulary, the original says so. `TestAsShmQueue` holds what is ours. Another
face joins by a line in FACES; it is made by calling it with a name.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import math
import os
import pickle
import queue
import signal
import statistics
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

import shmqueue
from shmqueue import SYSTEM_PAGESIZE, SerializationMethods, ShmQueue, exceptions

PATIENCE_S = 60  # for what takes well under a second on an idle machine


class Original(queue.Queue):  # type: ignore[type-arg]
    """The standard library's queue, with room for as many small items as a page has."""

    def __init__(self, name: str) -> None:
        super().__init__(maxsize=SYSTEM_PAGESIZE // 9)


FACES: dict[str, Callable[[str], Any]] = {"ShmQueue": ShmQueue, "queue.Queue": Original}
OURS = ["ShmQueue"]


@pytest.fixture(params=FACES)
def make(request: pytest.FixtureRequest) -> Callable[[str], Any]:
    """What makes a queue of the face under test, given a name."""
    return FACES[request.param]


@pytest.fixture
def q(make: Callable[[str], Any], queue_name: str) -> Iterator[Any]:
    """A queue, empty. Whatever a test does with it, no invariant may be broken at its end."""
    q = make(queue_name)
    yield q
    if isinstance(q, queue.Queue):
        return
    with contextlib.suppress(exceptions.ShmQueueNotInitializedError):
        assert q.check() == []
    q.shutdown()


# ---- helpers


def short(value: Any) -> str:
    """A test's id."""
    return ascii(value)[:20]


class Call(threading.Thread):
    """A call in a thread of its own; `result()` returns what it returned, or raises what it raised."""

    def __init__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        super().__init__(daemon=True)
        self._call = lambda: function(*args, **kwargs)
        self._value: Any = None
        self._error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self._value = self._call()
        except BaseException as error:
            self._error = error

    def result(self) -> Any:
        self.join(PATIENCE_S)
        assert not self.is_alive(), "the call has not returned"
        if self._error is not None:
            raise self._error
        return self._value


def asleep(*calls: Call) -> None:
    """Wait until the calls are blocked: their threads sleep whenever one looks."""
    seen = 0
    deadline = time.monotonic() + PATIENCE_S
    while seen < 4:
        assert time.monotonic() < deadline, "it never fell asleep"
        time.sleep(0.003)
        assert all(call.is_alive() for call in calls), "it returned instead of waiting"
        states = [Path(f"/proc/self/task/{call.native_id}/stat").read_text().rpartition(") ")[2][0] for call in calls]
        seen = seen + 1 if set(states) == {"S"} else 0


def fill(q: Any) -> int:
    """Put small items until there is no room for one; return how many."""
    n = 0
    with contextlib.suppress(queue.Full):
        while True:
            q.put(n % 100, block=False)
            n += 1
    return n


class Interrupt(Exception):
    """What a signal handler raised."""


@contextlib.contextmanager
def on_alarm(handler: Callable[[], None], *, after_s: float = 0.15) -> Iterator[None]:
    """Call `handler` in the main thread, as a signal handler, some time into the block."""
    previous = signal.signal(signal.SIGALRM, lambda number, frame: handler())
    signal.setitimer(signal.ITIMER_REAL, after_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def interrupt() -> None:
    raise Interrupt


class Clock:
    """How long a block took; `took_s` must be at least what was asked for, and not absurdly more."""

    def __enter__(self) -> Clock:
        self._before = time.monotonic()
        return self

    def __exit__(self, *_: object) -> None:
        self.took_s = time.monotonic() - self._before

    def shows(self, seconds: float) -> bool:
        return seconds <= self.took_s < seconds + PATIENCE_S / 2


def program(code: str, *args: str) -> None:
    done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, timeout=PATIENCE_S)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr


# ---- the standard library's contract


class TestAsQueue:
    """Holds for queue.Queue as well, and is tried on it."""

    def test_items_come_out_in_the_order_they_went_in(self, q: Any) -> None:
        for i in range(200):
            q.put(i)
        assert [q.get() for _ in range(200)] == list(range(200))

    def test_items_of_several_laps_come_out_in_order(self, q: Any) -> None:
        inside = 0
        for i in range(3000):
            q.put(i)
            inside += 1
            if inside == 150:
                assert [q.get() for _ in range(100)] == list(range(i - 149, i - 49))
                inside -= 100
        assert [q.get() for _ in range(inside)] == list(range(3000 - inside, 3000))

    def test_put_returns_none(self, q: Any) -> None:
        assert q.put(1) is None
        assert q.put_nowait(2) is None

    def test_none_is_an_item_like_any_other(self, q: Any) -> None:
        q.put(None)
        assert q.qsize() == 1
        assert q.get(block=False) is None

    def test_falsy_items_are_items(self, q: Any) -> None:
        things = [0, False, "", b"", [], {}, 0.0]
        for thing in things:
            q.put(thing)
        assert [q.get_nowait() for _ in things] == things

    def test_size_and_emptiness_follow_each_put_and_get(self, q: Any) -> None:
        assert (q.qsize(), q.empty(), q.full()) == (0, True, False)
        for i in range(1, 51):
            q.put(i)
            assert (q.qsize(), q.empty()) == (i, False)
        for i in range(49, -1, -1):
            q.get()
            assert (q.qsize(), q.empty()) == (i, i == 0)

    @pytest.mark.parametrize("arguments", [{"block": False}, {"block": True, "timeout": 0}, {"timeout": 0.05}])
    def test_get_from_an_empty_queue_raises_empty(self, q: Any, arguments: dict[str, Any]) -> None:
        with pytest.raises(queue.Empty):
            q.get(**arguments)
        with pytest.raises(queue.Empty):
            q.get_nowait()

    @pytest.mark.parametrize("arguments", [{"block": False}, {"block": True, "timeout": 0}, {"timeout": 0.05}])
    def test_put_into_a_full_queue_raises_full_and_puts_nothing(self, q: Any, arguments: dict[str, Any]) -> None:
        n = fill(q)
        assert n == SYSTEM_PAGESIZE // 9
        with pytest.raises(queue.Full):
            q.put(1, **arguments)
        with pytest.raises(queue.Full):
            q.put_nowait(1)
        assert q.qsize() == n
        assert [q.get() for _ in range(n)] == [i % 100 for i in range(n)]
        assert q.empty()

    def test_arguments_may_be_positional(self, q: Any) -> None:
        q.put(1, True, 5)
        q.put(2, False)
        q.put(3, False, None)
        assert (q.get(True, 5), q.get(False), q.get(False, None)) == (1, 2, 3)
        with pytest.raises(queue.Empty):
            q.get(False)

    def test_block_may_be_any_object_with_a_truth(self, q: Any) -> None:
        with pytest.raises(queue.Empty):
            q.get([], 5)
        with pytest.raises(queue.Empty):
            q.get("yes", 0.01)
        with pytest.raises(queue.Empty):
            q.get(None)

    def test_get_waits_as_long_as_it_was_told(self, q: Any) -> None:
        with Clock() as clock, pytest.raises(queue.Empty):
            q.get(timeout=0.25)
        assert clock.shows(0.25)

    def test_put_waits_as_long_as_it_was_told(self, q: Any) -> None:
        fill(q)
        with Clock() as clock, pytest.raises(queue.Full):
            q.put(1, timeout=0.25)
        assert clock.shows(0.25)

    def test_timeout_true_is_a_second(self, q: Any) -> None:
        with Clock() as clock, pytest.raises(queue.Empty):
            q.get(timeout=True)
        assert clock.shows(1)

    def test_timeout_false_is_no_time_at_all(self, q: Any) -> None:
        with pytest.raises(queue.Empty):
            q.get(timeout=False)
        q.put(1, timeout=False)
        assert q.get(timeout=False) == 1

    @pytest.mark.parametrize("timeout", [Fraction(1, 20), 5e-324, sys.float_info.min, -0.0], ids=repr)
    def test_timeout_may_be_any_real_number(self, q: Any, timeout: Any) -> None:
        with Clock() as clock, pytest.raises(queue.Empty):
            q.get(timeout=timeout)
        assert clock.shows(float(timeout))
        q.put(1, timeout=timeout)
        assert q.get(timeout=timeout) == 1

    @pytest.mark.parametrize("timeout", [-1, -0.001, -1e300, -math.inf, -(10**400), Fraction(-1, 3)], ids=short)
    def test_negative_timeout_is_a_value_error(self, q: Any, timeout: Any) -> None:
        with pytest.raises(ValueError, match="'timeout' must be a non-negative number"):
            q.get(timeout=timeout)
        q.put(1)
        with pytest.raises(ValueError, match="'timeout' must be a non-negative number"):
            q.get(timeout=timeout)  # with an item there, too
        fill(q)
        with pytest.raises(ValueError, match="'timeout' must be a non-negative number"):
            q.put(2, timeout=timeout)
        assert q.get() == 1

    @pytest.mark.parametrize("timeout", ["1", [], (1,), (1, 2), object(), 1j], ids=repr)
    def test_timeout_that_is_no_number_is_a_type_error(self, q: Any, timeout: Any) -> None:
        with pytest.raises(TypeError):
            q.get(timeout=timeout)
        fill(q)
        with pytest.raises(TypeError):
            q.put(1, timeout=timeout)

    @pytest.mark.parametrize("timeout", [-1, "x", math.nan, None], ids=repr)
    def test_timeout_is_not_looked_at_without_block(self, q: Any, timeout: Any) -> None:
        with pytest.raises(queue.Empty):
            q.get(block=False, timeout=timeout)
        q.put(1, block=False, timeout=timeout)
        assert q.get(block=False, timeout=timeout) == 1

    @pytest.mark.parametrize(
        ("method", "args", "kwargs"),
        [
            ("put", (), {}),
            ("put", (1,), {"data": 1, "item": 2}),
            ("put", (1,), {"wait": True}),
            ("put_nowait", (), {}),
            ("get", (True, 1, 2), {}),
            ("get", (), {"when": 1}),
            ("get", (True,), {"block": True}),
            ("get_nowait", (1,), {}),
            ("qsize", (1,), {}),
        ],
    )
    def test_wrong_arguments_are_a_type_error(self, q: Any, method: str, args: Any, kwargs: Any) -> None:
        with pytest.raises(TypeError):
            getattr(q, method)(*args, **kwargs)
        assert q.empty()

    def test_get_waits_until_an_item_is_put(self, q: Any) -> None:
        call = Call(q.get)
        asleep(call)
        q.put("it")
        assert call.result() == "it"

    def test_get_with_a_timeout_returns_as_soon_as_an_item_is_put(self, q: Any) -> None:
        call = Call(q.get, timeout=PATIENCE_S)
        asleep(call)
        q.put("it")
        assert call.result() == "it"

    def test_put_waits_until_room_is_made(self, q: Any) -> None:
        n = fill(q)
        call = Call(q.put, -1)
        asleep(call)
        assert q.qsize() == n
        items = [q.get()]
        assert call.result() is None
        while not q.empty():
            items.append(q.get())
        assert items == [*(i % 100 for i in range(n)), -1]

    def test_put_with_a_timeout_returns_as_soon_as_room_is_made(self, q: Any) -> None:
        n = fill(q)
        call = Call(q.put, 7, timeout=PATIENCE_S)
        asleep(call)
        q.get()
        assert call.result() is None
        assert q.qsize() == n

    def test_one_item_wakes_one_of_several_consumers_and_the_others_wait_on(self, q: Any) -> None:
        calls = [Call(q.get) for _ in range(4)]
        asleep(*calls)
        q.put(0)
        deadline = time.monotonic() + PATIENCE_S
        while all(call.is_alive() for call in calls):
            assert time.monotonic() < deadline
            time.sleep(0.001)
        waiting = [call for call in calls if call.is_alive()]
        assert len(waiting) == 3
        asleep(*waiting)
        for i in (1, 2, 3):
            q.put(i)
        assert sorted(call.result() for call in calls) == [0, 1, 2, 3]

    def test_room_for_all_wakes_every_producer(self, q: Any) -> None:
        n = fill(q)
        calls = [Call(q.put, 100 + i) for i in range(4)]
        asleep(*calls)
        for _ in range(n):
            q.get()
        for call in calls:
            call.result()
        assert sorted(q.get() for _ in range(4)) == [100, 101, 102, 103]

    def test_waking_takes_no_polling_interval(self, q: Any) -> None:
        took = []
        for i in range(25):
            call = Call(q.get)
            asleep(call)
            before = time.monotonic()
            q.put(i)
            assert call.result() == i
            took.append(time.monotonic() - before)
        assert statistics.median(took) < 0.05

    def test_waking_a_producer_takes_no_polling_interval(self, q: Any) -> None:
        took = []
        for i in range(15):
            n = fill(q)
            call = Call(q.put, i)
            asleep(call)
            before = time.monotonic()
            for _ in range(n):  # not the first get wakes, but surely the last
                q.get()
            call.result()
            took.append(time.monotonic() - before)
            assert q.get() == i
        assert statistics.median(took) < 0.05

    def test_threads_share_a_queue_and_each_item_is_delivered_once(self, q: Any) -> None:
        producers, consumers, each = 3, 3, 1500

        def produce(me: int) -> None:
            for i in range(each):
                q.put([me, i])

        def consume() -> list[list[int]]:
            return list(iter(q.get, None))

        consuming = [Call(consume) for _ in range(consumers)]
        producing = [Call(produce, me) for me in range(producers)]
        for call in producing:
            call.result()
        for _ in range(consumers):
            q.put(None)
        parts = [call.result() for call in consuming]
        assert sorted(item for part in parts for item in part) == [
            [me, i] for me in range(producers) for i in range(each)
        ]
        for part in parts:  # and of each producer in order
            for me in range(producers):
                mine = [i for who, i in part if who == me]
                assert mine == sorted(mine)
        assert q.empty()

    def test_other_threads_run_while_one_waits(self, q: Any) -> None:
        getting = Call(q.get)
        asleep(getting)
        with Clock() as clock:
            assert sum(range(1_000_000)) == 499999500000
        assert getting.is_alive()
        assert clock.shows(0)
        q.put(1)
        assert getting.result() == 1
        fill(q)
        putting = Call(q.put, 1)
        asleep(putting)
        before = Call(lambda: sum(range(1_000_000)))
        assert before.result() == 499999500000
        assert putting.is_alive()
        q.get()
        putting.result()

    def test_signal_handler_that_raises_ends_a_waiting_get(self, q: Any) -> None:
        with Clock() as clock, on_alarm(interrupt), pytest.raises(Interrupt):
            q.get()
        assert clock.shows(0.15)
        q.put(1)
        assert q.get(block=False) == 1

    def test_signal_handler_that_raises_ends_a_get_with_a_timeout(self, q: Any) -> None:
        with Clock() as clock, on_alarm(interrupt), pytest.raises(Interrupt):
            q.get(timeout=10 * PATIENCE_S)
        assert clock.shows(0.15)

    def test_signal_handler_that_raises_ends_a_waiting_put_and_nothing_is_put(self, q: Any) -> None:
        n = fill(q)
        with Clock() as clock, on_alarm(interrupt), pytest.raises(Interrupt):
            q.put("never")
        assert clock.shows(0.15)
        assert q.qsize() == n
        assert "never" not in [q.get(block=False) for _ in range(n)]

    def test_ctrl_c_ends_a_waiting_get_by_keyboard_interrupt(self, q: Any) -> None:
        def press() -> None:
            raise KeyboardInterrupt

        with on_alarm(press), pytest.raises(KeyboardInterrupt):
            q.get()
        fill(q)
        with on_alarm(press), pytest.raises(KeyboardInterrupt):
            q.put(1)

    def test_signal_handler_that_returns_does_not_shorten_the_wait(self, q: Any) -> None:
        ran: list[int] = []
        with on_alarm(lambda: ran.append(1)), Clock() as clock, pytest.raises(queue.Empty):
            q.get(timeout=0.5)
        assert ran == [1]
        assert clock.shows(0.5)
        fill(q)
        with on_alarm(lambda: ran.append(2)), Clock() as clock, pytest.raises(queue.Full):
            q.put(1, timeout=0.5)
        assert ran == [1, 2]
        assert clock.shows(0.5)

    def test_works_under_the_standard_librarys_log_listener(self, q: Any) -> None:
        import logging
        import logging.handlers

        seen: list[str] = []
        target = logging.Handler()
        target.emit = lambda record: seen.append(record.getMessage())  # type: ignore[method-assign]
        listener = logging.handlers.QueueListener(q, target)
        logger = logging.Logger("apart")
        logger.addHandler(logging.handlers.QueueHandler(q))
        listener.start()
        for i in range(5):  # its put_nowait() must find room
            logger.warning("line %d", i)
        listener.stop()
        assert seen == [f"line {i}" for i in range(5)]


# ---- what is ours


class TestAsShmQueue:
    """Waiting, handles and references, beyond what queue.Queue has."""

    @pytest.fixture(params=OURS)
    def make(self, request: pytest.FixtureRequest) -> Callable[[str], Any]:
        return FACES[request.param]

    # -- errors and timeouts

    def test_empty_and_full_are_ours_and_the_standard_librarys(self, q: Any) -> None:
        with pytest.raises(exceptions.ShmQueueEmpty) as empty:
            q.get_nowait()
        assert isinstance(empty.value, (queue.Empty, exceptions.ShmQueueException))
        assert repr(q.identifier) in str(empty.value)
        fill(q)
        with pytest.raises(exceptions.ShmQueueFull) as full:
            q.put_nowait(b"some bytes")
        assert isinstance(full.value, (queue.Full, exceptions.ShmQueueException))
        for told in (repr(q.identifier), f"{8 + 12} bytes", f"{q.buffer_occupancy()} of {SYSTEM_PAGESIZE}"):
            assert told in str(full.value)

    def test_message_of_a_timeout_says_how_long(self, q: Any) -> None:
        with pytest.raises(exceptions.ShmQueueEmpty, match=r"0\.02 s"):
            q.get(timeout=0.02)

    @pytest.mark.parametrize("timeout", [math.nan, -math.nan, Decimal("nan")], ids=repr)
    def test_timeout_nan_is_a_value_error(self, q: Any, timeout: Any) -> None:
        for call in (q.get, lambda **options: q.put(1, **options), q.get_many, lambda **o: q.put_many([1], **o)):
            with pytest.raises(exceptions.ShmQueueValueError, match="timeout"):
                call(timeout=timeout)
        assert q.empty()

    @pytest.mark.parametrize("timeout", [math.inf, 1e300, 1e10, 2**63, 2**64, 10**400, Decimal("inf")], ids=short)
    def test_huge_timeout_waits_without_end(self, q: Any, timeout: Any) -> None:
        call = Call(q.get, timeout=timeout)
        asleep(call)
        q.put(1)
        assert call.result() == 1
        fill(q)
        call = Call(q.put, 2, timeout=timeout)
        asleep(call)
        q.clear()
        call.result()
        assert q.get(timeout=timeout) == 2

    @pytest.mark.parametrize("timeout", [Decimal("-0.5"), -1, -0.5, -math.inf, -(10**400)], ids=short)
    def test_errors_of_timeouts_are_ours_too(self, q: Any, timeout: Any) -> None:
        with pytest.raises(exceptions.ShmQueueValueError):
            q.get(timeout=timeout)

    @pytest.mark.parametrize("timeout", ["1", b"1", [1], object, 1j], ids=short)
    def test_timeout_of_a_wrong_type_is_our_type_error_and_names_the_type(self, q: Any, timeout: Any) -> None:
        for call in (q.get, lambda **options: q.put(1, **options), q.get_many, lambda **o: q.put_many([1], **o)):
            with pytest.raises(exceptions.ShmQueueTypeError, match=type(timeout).__name__):
                call(timeout=timeout)
        assert q.empty()

    def test_timeout_that_converts_itself_to_a_number_is_one(self, q: Any) -> None:
        numpy = pytest.importorskip("numpy")
        with pytest.raises(queue.Empty):
            q.get(timeout=numpy.float32(0.01))
        with pytest.raises(exceptions.ShmQueueValueError):
            q.get(timeout=numpy.float32(-1))
        with pytest.raises(queue.Empty):
            q.get(timeout=Decimal("0.01"))

    # -- several handles

    def test_handles_on_one_name_share_one_queue(self, make: Callable[[str], Any], q: Any) -> None:
        with make(q.identifier) as other:
            q.put(1)
            other.put(2)
            assert (q.qsize(), other.qsize()) == (2, 2)
            assert other.get() == 1
            assert q.get() == 2

    def test_put_through_one_handle_wakes_a_get_through_another(self, make: Callable[[str], Any], q: Any) -> None:
        with make(q.identifier) as other:
            call = Call(other.get)
            asleep(call)
            q.put(1)
            assert call.result() == 1

    def test_put_of_another_process_wakes_a_get(self, q: Any) -> None:
        call = Call(q.get)
        asleep(call)
        program("import shmqueue, sys; shmqueue.ShmQueue(sys.argv[1]).put('from afar')", q.identifier)
        assert call.result() == "from afar"

    def test_get_of_another_process_wakes_a_put(self, q: Any) -> None:
        fill(q)
        call = Call(q.put, "late")
        asleep(call)
        program("import shmqueue, sys; shmqueue.ShmQueue(sys.argv[1]).get_many()", q.identifier)
        call.result()
        assert q.get() == "late"

    def test_names_are_apart_however_alike(self, make: Callable[[str], Any], queue_name: str) -> None:
        names = [queue_name + end for end in ("", " ", ".", "%2F", "/", "%", "%25", "é", "e\u0301", "\n", "É")]
        with contextlib.ExitStack() as stack:
            queues = {name: stack.enter_context(make(name)) for name in names}
            for name, each in queues.items():
                each.put(name)
            for name, each in queues.items():
                assert each.identifier == name
                assert each.get(block=False) == name

    def test_a_finalizer_may_put_into_the_queue_that_is_putting(self, q: Any) -> None:
        """No Python runs inside a lock, so this can't lock itself out."""

        class Item:
            def __reduce__(self) -> Any:
                q.put("while serializing")
                return int, ("7",)

        q.put(Item())
        assert (q.get(block=False), q.get(block=False)) == ("while serializing", 7)

    # -- shutdown

    @pytest.mark.parametrize("blocked", ["get", "put", "get_many", "put_many", "iteration", "with a timeout"])
    def test_shutdown_in_one_thread_wakes_the_others_blocked_calls(self, q: Any, blocked: str) -> None:
        calls = {
            "get": q.get,
            "put": lambda: q.put(1),
            "get_many": q.get_many,
            "put_many": lambda: q.put_many([1, 2]),
            "iteration": lambda: next(iter(q)),
            "with a timeout": lambda: q.get(timeout=10 * PATIENCE_S),
        }
        if "put" in blocked:
            fill(q)
        waiting = [Call(calls[blocked]) for _ in range(3)]
        asleep(*waiting)
        q.shutdown()
        for call in waiting:
            with pytest.raises(exceptions.ShmQueueNotInitializedError):
                call.result()

    def test_shutdown_under_blocked_calls_frees_the_memory(self, q: Any, queue_name: str) -> None:
        waiting = [Call(q.get) for _ in range(3)]
        asleep(*waiting)
        q.shutdown()
        for call in waiting:
            with pytest.raises(exceptions.ShmQueueNotInitializedError):
                call.result()
        assert not Path(f"/dev/shm/shmqueue.{queue_name}").exists()
        assert not any(queue_name in line for line in Path("/proc/self/maps").read_text().splitlines())

    def test_shutdown_of_one_handle_leaves_calls_of_another_waiting(self, make: Callable[[str], Any], q: Any) -> None:
        other = make(q.identifier)
        call = Call(q.get)
        asleep(call)
        other.shutdown()
        asleep(call)
        q.put(1)
        assert call.result() == 1

    def test_shutdown_while_threads_put_and_get_ends_each_of_them(self, make: Callable[[str], Any], q: Any) -> None:
        witness = make(q.identifier)

        def work() -> None:
            while True:
                q.put(1, timeout=PATIENCE_S)
                q.get(timeout=PATIENCE_S)
                q.qsize()

        calls = [Call(work) for _ in range(4)]
        while witness.snapshot().put_pos == 0:
            time.sleep(0.001)
        q.shutdown()
        for call in calls:
            with pytest.raises(exceptions.ShmQueueNotInitializedError):
                call.result()
        assert witness.refs == 1
        assert witness.check() == []
        witness.shutdown()

    def test_every_call_after_shutdown_raises_not_initialized(self, q: Any) -> None:
        q.put(1)
        q.shutdown()
        calls: list[Callable[[], Any]] = [
            lambda: q.put(1),
            lambda: q.put({1, 2}),
            lambda: q.put(bytes(10**6)),
            lambda: q.put(1, block=False),
            lambda: q.put(1, timeout=1),
            lambda: q.put_nowait(1),
            lambda: q.put_many([1]),
            lambda: q.put_many([]),
            q.get,
            lambda: q.get(False),
            lambda: q.get(timeout=1),
            q.get_nowait,
            q.get_many,
            lambda: q.get_many(1, block=False),
            lambda: next(iter(q)),
            q.qsize,
            q.empty,
            q.full,
            q.buffer_occupancy,
            q.max_buffer_size,
            q.clear,
            q.check,
            q.snapshot,
            lambda: q.debug_ref_data,
            lambda: q.refs,
            lambda: q.add_ref_manually(os.getpid()),
            q.reduce_ref_counter,
        ]
        for number, call in enumerate(calls):
            with pytest.raises(exceptions.ShmQueueNotInitializedError) as caught:
                call()
            assert repr(q.identifier) in str(caught.value), number

    def test_identifier_and_repr_work_after_shutdown(self, q: Any, queue_name: str) -> None:
        before = repr(q)
        assert queue_name in before
        assert str(SYSTEM_PAGESIZE) in before
        q.shutdown()
        assert q.identifier == queue_name
        assert repr(q) == before.removesuffix(")") + ", shut down)"
        q.shutdown()

    def test_shutdown_by_many_threads_at_once_is_fine(self, make: Callable[[str], Any], q: Any) -> None:
        for _ in range(20):
            handle = make(q.identifier)
            for call in [Call(handle.shutdown) for _ in range(4)]:
                call.result()
            assert q.refs == 1

    def test_handles_in_a_cycle_let_go_when_collected(self, make: Callable[[str], Any], q: Any) -> None:
        other = make(q.identifier)
        other.itself = other
        gone = weakref.ref(other)
        assert q.refs == 2
        del other
        gc.collect()
        assert gone() is None
        assert q.refs == 1

    def test_handle_that_could_not_attach_can_be_forgotten(self, make: Callable[[str], Any]) -> None:
        with pytest.raises(ValueError, match="NUL"):
            make("\0")
        gc.collect()  # an error in __del__ would be an unraisable one, which fails the test
        bare = ShmQueue.__new__(ShmQueue)
        for method, args in (("put", [1]), ("get", []), ("qsize", []), ("get_many", []), ("put_many", [[1]])):
            with pytest.raises((exceptions.ShmQueueNotInitializedError, AttributeError)):
                getattr(bare, method)(*args)
        del bare
        gc.collect()

    # -- conveniences

    def test_with_is_shutdown_at_the_end(self, make: Callable[[str], Any], queue_name: str) -> None:
        with make(queue_name) as q:
            assert isinstance(q, ShmQueue)
            q.put(1)
        with pytest.raises(exceptions.ShmQueueNotInitializedError):
            q.put(1)
        assert not Path(f"/dev/shm/shmqueue.{queue_name}").exists()

    def test_with_is_shutdown_when_the_block_fails_too(self, make: Callable[[str], Any], queue_name: str) -> None:
        with pytest.raises(ZeroDivisionError), make(queue_name) as q:
            q.put(1 // 0)
        with pytest.raises(exceptions.ShmQueueNotInitializedError):
            q.qsize()

    def test_shutdown_inside_of_with_is_fine(self, make: Callable[[str], Any], queue_name: str) -> None:
        with make(queue_name) as q:
            q.shutdown()

    def test_iteration_waits_for_each_item_for_ever(self, q: Any) -> None:
        seen: list[int] = []

        def consume() -> None:
            for item in q:
                if item is None:
                    return
                seen.append(item)

        q.put(0)
        call = Call(consume)
        asleep(call)
        assert seen == [0]
        q.put(1)
        asleep(call)
        assert seen == [0, 1]
        q.put(None)
        call.result()
        assert iter(q) is q

    @pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
    def test_pickled_handle_is_a_new_handle_on_the_same_queue(self, q: Any, protocol: int) -> None:
        with pickle.loads(pickle.dumps(q, protocol)) as other:
            assert type(other) is type(q)
            assert other is not q
            assert other.identifier == q.identifier
            assert q.refs == 2
            q.put("over there")
            assert other.get() == "over there"
        assert q.refs == 1

    def test_pickled_handle_carries_its_options_and_no_custom_functions(self, queue_name: str) -> None:
        with ShmQueue[Any](queue_name, buffer_size=3 * SYSTEM_PAGESIZE, allow_pickle=False) as q:
            q.custom_serialize(lambda method, data: b"never pickled")
            pickled = pickle.dumps(q)
        with pickle.loads(pickled) as other:  # alone: it makes the queue anew
            assert other.max_buffer_size() == 3 * SYSTEM_PAGESIZE
            with pytest.raises(exceptions.ShmQueueSerializationError):
                other.put({1, 2})
            with pytest.raises(NotImplementedError):
                other.put(1, serialization_method=SerializationMethods.FIRST_PUBLIC_NUMBER + 1)

    def test_handle_can_be_sent_through_the_queue_and_copied(self, q: Any) -> None:
        q.put({"answer to": q})
        with q.get()["answer to"] as other, copy.copy(q) as third:
            other.put(1)
            assert q.refs == 3
            assert third.get() == 1

    def test_subscript_is_for_type_checkers_and_makes_the_same(self, queue_name: str) -> None:
        with ShmQueue[int](queue_name) as q:
            assert type(q) is ShmQueue
            q.put(1)
            assert q.get() == 1
        assert ShmQueue[int] is not None
        assert ShmQueue[dict[str, int]].__origin__ is ShmQueue  # type: ignore[attr-defined]

    def test_subclasses_are_queues_of_their_own_type(self, queue_name: str) -> None:
        class Doubling(ShmQueue[int]):
            def put(self, data: int, *args: Any, **kwargs: Any) -> None:
                super().put(2 * data, *args, **kwargs)

        with Doubling(queue_name) as q:
            q.put(21)
            assert q.get() == 42
            assert repr(q).startswith("Doubling(")

    def test_handles_take_attributes_and_weak_references(self, q: Any) -> None:
        q.note = 1
        assert weakref.ref(q)() is q
        assert q in {q}

    # -- references

    def test_manual_references_are_counted_and_taken_back(self, make: Callable[[str], Any], q: Any) -> None:
        assert q.refs == 1
        q.add_ref_manually(os.getpid())
        q.add_ref_manually(1)
        assert q.refs == q.snapshot().ref_count == 3
        q.reduce_ref_counter()
        q.reduce_ref_counter()
        assert q.refs == 1

    def test_the_only_reference_cannot_be_taken_back(self, q: Any) -> None:
        with pytest.raises(exceptions.ShmQueueValueError):
            q.reduce_ref_counter()
        assert q.refs == 1
        q.put(1)
        assert q.get() == 1

    def test_live_attachments_cannot_be_taken_back(self, make: Callable[[str], Any], q: Any) -> None:
        with make(q.identifier) as other:
            with pytest.raises(exceptions.ShmQueueRuntimeError):
                q.reduce_ref_counter()
            assert q.refs == 2
            other.put(1)
            assert q.get() == 1

    def test_manual_references_of_others_can_be_taken_back(self, make: Callable[[str], Any], q: Any) -> None:
        with make(q.identifier) as other:
            other.add_ref_manually(os.getpid())
            assert q.refs == 3
            q.reduce_ref_counter()
            assert q.refs == 2
            with pytest.raises(exceptions.ShmQueueRuntimeError):
                q.reduce_ref_counter()

    def test_own_manual_references_are_taken_back_first(self, make: Callable[[str], Any], q: Any) -> None:
        other = make(q.identifier)
        other.add_ref_manually(os.getpid())
        q.add_ref_manually(os.getpid())
        q.reduce_ref_counter()
        other.shutdown()  # its own goes with it: had q taken that one, 2 would be left
        assert q.refs == 1

    def test_a_manual_reference_goes_with_the_attachment_that_added_it(
        self, make: Callable[[str], Any], q: Any
    ) -> None:
        other = make(q.identifier)
        other.add_ref_manually(os.getpid())
        other.add_ref_manually(os.getpid())
        assert q.refs == 4
        other.shutdown()
        assert q.refs == 1
        again = make(q.identifier)
        assert q.refs == 2
        again.shutdown()

    def test_manual_references_do_not_keep_the_memory(self, make: Callable[[str], Any], queue_name: str) -> None:
        q = make(queue_name)
        q.add_ref_manually(os.getpid())
        q.shutdown()
        assert not Path(f"/dev/shm/shmqueue.{queue_name}").exists()

    @pytest.mark.parametrize("pid", ["1", None, 1.0, b"1"])
    def test_manual_reference_of_no_pid_is_a_type_error(self, q: Any, pid: Any) -> None:
        with pytest.raises(exceptions.ShmQueueTypeError):
            q.add_ref_manually(pid)
        assert q.refs == 1

    def test_first_own_reference_in_a_forked_child_is_its_attachment(self, q: Any) -> None:
        child = os.fork()
        if child == 0:
            try:
                q.add_ref_manually(os.getpid())
                counts = [q.refs]
                q.add_ref_manually(os.getpid())
                counts.append(q.refs)
                q.reduce_ref_counter()
                counts.append(q.refs)
                q.put(counts)
            finally:
                os._exit(0)
        assert q.get(timeout=PATIENCE_S) == [2, 3, 2]
        os.waitpid(child, 0)
        assert q.refs == 1

    # -- clear and check

    def test_clear_drops_all_items_and_makes_room(self, q: Any) -> None:
        for _ in range(3):
            fill(q)
            q.clear()
            assert (q.qsize(), q.empty(), q.full(), q.buffer_occupancy()) == (0, True, False, 0)
            with pytest.raises(queue.Empty):
                q.get(block=False)
            q.put("after")
            assert q.get() == "after"
        q.clear()  # of nothing
        assert q.empty()

    def test_clear_wakes_waiting_producers(self, q: Any) -> None:
        fill(q)
        calls = [Call(q.put, i) for i in range(3)]
        asleep(*calls)
        q.clear()
        for call in calls:
            call.result()
        assert sorted(q.get() for _ in range(3)) == [0, 1, 2]

    def test_clear_is_for_all_handles(self, make: Callable[[str], Any], q: Any) -> None:
        with make(q.identifier) as other:
            q.put(1)
            other.clear()
            assert q.empty()

    def test_check_finds_nothing_whatever_goes_on(self, make: Callable[[str], Any], q: Any) -> None:
        stop = threading.Event()

        def work(me: int) -> None:
            while not stop.is_set():
                with contextlib.suppress(queue.Full):
                    q.put_many([bytes(me * 7), me, [me]], timeout=0.1)
                with contextlib.suppress(queue.Empty):
                    q.get_many(2, block=False)
                with contextlib.suppress(queue.Empty):
                    q.get(block=False)

        calls = [Call(work, me) for me in range(3)]
        with make(q.identifier) as other:
            for _ in range(100):
                assert other.check() == []
        stop.set()
        for call in calls:
            call.result()

    def test_check_changes_nothing(self, q: Any) -> None:
        q.put_many(range(10))
        before = q.snapshot()
        for _ in range(3):
            assert q.check() == []
        assert q.snapshot() == before
        assert q.get_many() == list(range(10))


def test_package_says_what_it_exports() -> None:
    assert shmqueue.ShmQueue is ShmQueue
    assert {"ShmQueue", "SerializationMethods", "exceptions"} <= set(shmqueue.__all__)
