"""`put_many` and `get_many`: in order, nothing lost, nothing doubled, and every error says how far it came.

A batch goes in and out in groups (64 records, 64 KiB), so what fails is tried at the seams of these.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import pickle
import queue
import random
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import msgpack
import pytest

from shmqueue import SYSTEM_PAGESIZE, SerializationMethods, ShmQueue, exceptions, serialization

PATIENCE_S = 60  # for what takes well under a second on an idle machine
MY_METHOD = SerializationMethods.FIRST_PUBLIC_NUMBER
SEAMS = [0, 1, 2, 62, 63, 64, 65, 127, 128, 129, 200]  # about multiples of 64


@pytest.fixture
def q(queue_name: str) -> Iterator[ShmQueue[Any]]:
    """A queue with room for some thousand small items."""
    with ShmQueue[Any](queue_name, buffer_size=1 << 16) as q:
        yield q
        with contextlib.suppress(exceptions.ShmQueueNotInitializedError):
            assert q.check() == []


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


class Broken(Exception):
    """What an iterable, an item or a function of the user's raised."""


class Unserializable:
    def __reduce__(self) -> Any:
        raise Broken("not me")


def counted(n: int) -> Iterator[int]:
    """A generator, which forgets what it has given away."""
    yield from range(n)


def failing(n: int, error: BaseException) -> Iterator[int]:
    yield from range(n)
    raise error


def drain(q: ShmQueue[Any]) -> list[Any]:
    items = []
    with contextlib.suppress(queue.Empty):
        while True:
            items.append(q.get(block=False))
    return items


def progress(error: BaseException, most: int | None = None) -> tuple[int, list[Any]]:
    """What every error of put_many tells: how many went in, and the others."""
    return error.accepted, list(itertools.islice(error.remaining, most))  # type: ignore[attr-defined]


# ---- put_many


@pytest.mark.parametrize("kind", [list, tuple, iter, deque, "generator", "dict", "range"])
def test_put_many_returns_the_number_of_items_put(q: ShmQueue[Any], kind: Any) -> None:
    kinds: dict[str, Callable[[range], Iterable[int]]]
    kinds = {
        "generator": lambda numbers: counted(len(numbers)),
        "dict": dict.fromkeys,
        "range": lambda numbers: numbers,
    }
    make = kinds.get(kind, kind)
    for n in SEAMS:
        assert q.put_many(make(range(n))) == n
        assert q.qsize() == n
        assert drain(q) == list(range(n))


def test_put_many_keeps_the_accounting_of_put(q: ShmQueue[Any]) -> None:
    items = [None, "text", bytes(300), {1, 2}, [1, [2]], 2**70, bytes(5000), "x" * 5000]
    q.put_many(items)
    together = q.buffer_occupancy()
    q.clear()
    for item in items:
        q.put(item)
    assert q.buffer_occupancy() == together
    assert q.get_many() == items


def test_put_many_takes_the_arguments_of_put(q: ShmQueue[Any]) -> None:
    assert q.put_many([1], True, 5, SerializationMethods.PICKLE) == 1
    assert q.buffer_occupancy() == 8 + len(pickle.dumps(1, 5))
    assert q.put_many(items=[2], block=False, timeout=None, serialization_method=SerializationMethods.MSGPACK) == 1
    assert q.get_many() == [1, 2]
    q.custom_serialize(lambda method, data: bytes([method % 256, data]))
    q.custom_deserialize(lambda method, chunks: (method, bytes(chunks[0])))
    q.put_many([3, 4], serialization_method=MY_METHOD)
    assert q.get_many() == [(MY_METHOD, bytes([MY_METHOD % 256, data])) for data in (3, 4)]


def test_items_of_one_batch_stay_in_order_among_those_of_others(queue_name: str) -> None:
    with ShmQueue[Any](queue_name) as q:
        calls = [Call(q.put_many, zip(itertools.repeat(me), range(2000))) for me in range(3)]
        expected = [0, 0, 0]
        for me, i in (q.get(timeout=PATIENCE_S) for _ in range(6000)):
            assert i == expected[me]
            expected[me] += 1
        assert [call.result() for call in calls] == [2000] * 3
        assert q.check() == []


@pytest.mark.parametrize("size", [1, 100, 4085, 4096, 5000, 20000])
def test_put_many_of_more_than_fits_waits_for_room_again_and_again(queue_name: str, size: int) -> None:
    with ShmQueue[bytes](queue_name, buffer_size=1 << 15) as q:
        n = 40 if size > 1000 else 4000
        items = [bytes([i % 256]) * size for i in range(n)]
        call = Call(q.put_many, items, timeout=PATIENCE_S)
        for item in items:
            assert q.get(timeout=PATIENCE_S) == item
        assert call.result() == n
        assert q.empty()
        assert q.check() == []


def test_put_many_of_things_that_are_not_iterable_is_a_type_error(q: ShmQueue[Any]) -> None:
    for thing in (5, None, object()):
        with pytest.raises(TypeError):
            q.put_many(thing)
    with pytest.raises(TypeError):
        q.put_many()  # type: ignore[call-arg]
    assert q.empty()


@pytest.mark.parametrize("size", [1, 100, 3000, 4096, 6000])
@pytest.mark.parametrize("wait", [{"block": False}, {"timeout": 0}, {"timeout": 0.05}])
def test_full_tells_how_many_went_in_and_keeps_the_rest(q: ShmQueue[Any], wait: Any, size: int) -> None:
    items = [bytes([i % 256]) * size for i in range(20_000)][: 200_000 // size]
    with pytest.raises(exceptions.ShmQueueFull) as caught:
        q.put_many(iter(items), **wait)
    accepted, remaining = progress(caught.value)
    assert accepted == q.qsize() > 0
    assert remaining == items[accepted:] != []
    assert drain(q) == items[:accepted]
    taken = 8 + size + (2 if size < 256 else 3)
    assert accepted == q.max_buffer_size() // taken  # not one less than fits


def test_timeout_is_for_all_of_the_items_together(queue_name: str) -> None:
    with ShmQueue[Any](queue_name) as q:
        item = bytes(1000)
        stop = threading.Event()

        def trickle() -> None:
            while not stop.wait(0.1):
                with contextlib.suppress(queue.Empty):
                    q.get(block=False)

        call = Call(trickle)
        before = time.monotonic()
        with pytest.raises(exceptions.ShmQueueFull) as caught:
            q.put_many(itertools.repeat(item), timeout=1.0)
        took = time.monotonic() - before
        stop.set()
        call.result()
        assert 1.0 <= took < 1.0 + PATIENCE_S / 2  # each get made room in less
        assert caught.value.accepted >= 4
        assert next(caught.value.remaining) == item


def test_what_remains_can_be_put_once_more(q: ShmQueue[Any]) -> None:
    rest: Iterator[Any] = counted(50_000)
    got: list[int] = []
    rounds = 0
    while True:
        rounds += 1
        try:
            q.put_many(rest, block=False)
            break
        except queue.Full as full:
            rest = full.remaining  # type: ignore[attr-defined]
            got += q.get_many(1000)
    got += drain(q)
    assert got == list(range(50_000))
    assert rounds > 10


@pytest.mark.parametrize("k", SEAMS)
def test_an_item_too_big_for_the_queue_stops_the_batch_at_that_item(q: ShmQueue[Any], k: int) -> None:
    items = [*range(k), bytes(q.max_buffer_size()), *range(k + 1, k + 100)]
    with pytest.raises(exceptions.ShmQueueValueError) as caught:
        q.put_many(iter(items))
    assert progress(caught.value) == (k, items[k:])
    assert drain(q) == items[:k]


@pytest.mark.parametrize("k", SEAMS)
def test_an_unserializable_item_stops_the_batch_at_that_item(q: ShmQueue[Any], k: int) -> None:
    items = [*range(k), Unserializable(), *range(k + 1, k + 100)]
    with pytest.raises(exceptions.ShmQueueSerializationError) as caught:
        q.put_many(iter(items))
    assert progress(caught.value) == (k, items[k:])
    assert drain(q) == items[:k]


def test_a_bad_item_is_only_looked_at_when_those_before_it_are_in(q: ShmQueue[Any]) -> None:
    """Who skips the first of `.remaining` after such an error must skip the bad item, not a good one."""
    items = [1, 2, Unserializable(), 3]
    q.put(bytes(q.max_buffer_size() - 8 - 5))  # no room even for one
    with pytest.raises(exceptions.ShmQueueFull) as full:
        q.put_many(iter(items), block=False)
    assert progress(full.value) == (0, items)
    with pytest.raises(exceptions.ShmQueueFull) as full:
        q.put_many(iter(items), timeout=0.05)
    assert progress(full.value) == (0, items)
    call = Call(q.put_many, iter(items))
    asleep(call)  # it waits for room, as it was told
    q.clear()
    with pytest.raises(exceptions.ShmQueueSerializationError) as bad:
        call.result()
    assert progress(bad.value) == (2, items[2:])
    assert q.get_many() == [1, 2]


@pytest.mark.parametrize("k", SEAMS)
def test_an_iterable_that_raises_loses_nothing_it_gave(q: ShmQueue[Any], k: int) -> None:
    error = Broken("no more")
    with pytest.raises(Broken) as caught:
        q.put_many(failing(k, error))
    assert caught.value is error
    assert progress(caught.value) == (k, [])
    assert drain(q) == list(range(k))


@pytest.mark.parametrize("k", SEAMS)
def test_an_iterable_that_raises_may_go_on_after_it(q: ShmQueue[Any], k: int) -> None:
    class Hiccup:
        """An iterator that fails once."""

        def __init__(self) -> None:
            self._n = -1
            self._failed = False

        def __iter__(self) -> Hiccup:
            return self

        def __next__(self) -> int:
            if self._n + 1 == k and not self._failed:
                self._failed = True
                raise Broken
            if self._n + 1 == k + 3:
                raise StopIteration
            self._n += 1
            return self._n

    with pytest.raises(Broken) as caught:
        q.put_many(Hiccup())
    assert progress(caught.value) == (k, [k, k + 1, k + 2])
    assert drain(q) == list(range(k))


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(), GeneratorExit(), MemoryError(), StopIteration()])
def test_errors_of_any_kind_tell_how_far_it_came(q: ShmQueue[Any], error: BaseException) -> None:
    class Items:
        def __init__(self) -> None:
            self._n = 0

        def __iter__(self) -> Items:
            return self

        def __next__(self) -> Any:
            self._n += 1
            if self._n == 4:
                raise error
            return self._n

    if isinstance(error, StopIteration):  # that is no error
        assert q.put_many(Items()) == 3
    else:
        with pytest.raises(type(error)) as caught:
            q.put_many(Items())
        assert caught.value is error
        assert progress(caught.value, 2) == (3, [5, 6])
    assert drain(q) == [1, 2, 3]


def test_custom_serializer_that_raises_stops_the_batch_and_its_error_propagates(q: ShmQueue[Any]) -> None:
    def serialize(method: int, data: int) -> bytes:
        if data == 70:
            raise Broken("70")
        return bytes([data])

    q.custom_serialize(serialize)
    q.custom_deserialize(lambda method, chunks: chunks[0][0])
    with pytest.raises(Broken) as caught:
        q.put_many(counted(100), serialization_method=MY_METHOD)
    assert progress(caught.value) == (70, list(range(70, 100)))
    assert drain(q) == list(range(70))


@pytest.mark.parametrize(
    ("method", "error"),
    [(MY_METHOD, NotImplementedError), (-1, NotImplementedError), ("1", ValueError), (2**24, ValueError)],
)
def test_a_wrong_method_stops_the_batch_at_its_first_item(q: ShmQueue[Any], method: Any, error: Any) -> None:
    with pytest.raises(error) as caught:
        q.put_many(counted(5), serialization_method=method)
    assert isinstance(caught.value, exceptions.ShmQueueException)
    assert progress(caught.value) == (0, list(range(5)))
    assert q.empty()


def test_an_interrupt_while_it_waits_for_room_loses_nothing(queue_name: str) -> None:
    """Ctrl-C in the main thread, in a program of its own; the rest is put afterwards."""
    with ShmQueue[int](queue_name) as q:
        code = """
import itertools, signal, sys, shmqueue
signal.signal(signal.SIGINT, signal.default_int_handler)
q = shmqueue.ShmQueue(sys.argv[1])
try:
    print("puts", flush=True)
    q.put_many(itertools.chain(range(3000)))
except KeyboardInterrupt as interrupt:
    print(interrupt.accepted, flush=True)
    print(q.put_many(interrupt.remaining))
"""
        program = subprocess.Popen([sys.executable, "-c", code, queue_name], stdout=subprocess.PIPE, text=True)
        try:
            assert program.stdout is not None
            assert program.stdout.readline() == "puts\n"
            deadline = time.monotonic() + PATIENCE_S
            while q.max_buffer_size() - q.buffer_occupancy() > 16:
                assert time.monotonic() < deadline
                time.sleep(0.005)
            program.send_signal(signal.SIGINT)
            accepted = int(program.stdout.readline())
            assert accepted == q.qsize()
            assert [q.get(timeout=PATIENCE_S) for _ in range(3000)] == list(range(3000))
            assert program.stdout.readline() == f"{3000 - accepted}\n"
            assert program.wait(PATIENCE_S) == 0
        finally:
            program.kill()
            program.communicate()


def test_an_interrupt_from_the_iterable_is_not_held_up_by_a_full_queue(q: ShmQueue[Any]) -> None:
    """Ctrl-C often strikes in the user's generator."""
    q.put(bytes(q.max_buffer_size() - 8 - 5))
    call = Call(q.put_many, failing(0, KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt) as caught:
        call.result()
    assert progress(caught.value) == (0, [])


def test_what_a_generator_gave_is_there_before_it_is_asked_for_more(q: ShmQueue[Any]) -> None:
    """One that is slow, or that waits for a consumer's answer, must not hold up what it gave before."""

    def items() -> Iterator[int]:
        for i in range(200):
            yield i
            assert q.get_nowait() == i

    assert q.put_many(items()) == 200


def test_shutdown_by_another_thread_tells_how_far_it_came(queue_name: str) -> None:
    with ShmQueue[int](queue_name) as keeper:
        q = ShmQueue[int](queue_name)
        call = Call(q.put_many, counted(3000))
        asleep(call)
        q.shutdown()
        with pytest.raises(exceptions.ShmQueueNotInitializedError) as caught:
            call.result()
        accepted, remaining = progress(caught.value)
        assert accepted == keeper.qsize() > 0
        assert [*drain(keeper), *remaining] == list(range(3000))


def test_an_iterable_may_use_the_queue_itself(q: ShmQueue[Any]) -> None:
    def items() -> Iterator[Any]:
        yield 1
        q.put("between")
        yield 2
        q.put_many(["and", "more"])
        yield 3

    assert q.put_many(items()) == 3
    got = drain(q)
    assert sorted(map(str, got)) == ["1", "2", "3", "and", "between", "more"]
    assert [item for item in got if isinstance(item, int)] == [1, 2, 3]


def test_an_iterable_may_shut_the_queue_down(queue_name: str) -> None:
    with ShmQueue[Any](queue_name) as keeper:
        q = ShmQueue[Any](queue_name)

        def items() -> Iterator[int]:
            yield 1
            q.shutdown()
            yield 2

        with pytest.raises(exceptions.ShmQueueNotInitializedError) as caught:
            q.put_many(items())
        accepted, remaining = progress(caught.value)
        assert [*drain(keeper), *remaining] == [1, 2]
        assert accepted + len(remaining) == 2


def test_error_of_put_many_travels_without_the_items(q: ShmQueue[Any]) -> None:
    with pytest.raises(exceptions.ShmQueueFull) as caught:
        q.put_many(itertools.repeat(bytes(30_000)), block=False)
    there = pickle.loads(pickle.dumps(caught.value))
    assert progress(there) == (2, [])
    assert str(there) == str(caught.value)


def test_put_many_holds_no_item_longer_than_needed(q: ShmQueue[Any]) -> None:
    marker = bytearray(b"marker")
    before = sys.getrefcount(marker)
    assert q.put_many(itertools.repeat(marker, 300)) == 300
    assert sys.getrefcount(marker) == before
    with pytest.raises(queue.Full):
        q.put_many(itertools.repeat(marker), block=False)
    assert sys.getrefcount(marker) <= before + 1  # that of the iterator of the error just raised, until it's gone
    assert q.get_many(300) == [b"marker"] * 300


# ---- get_many


def test_get_many_takes_all_there_is_without_a_number(q: ShmQueue[Any]) -> None:
    for n in SEAMS[1:]:
        q.put_many(range(n))
        assert q.get_many() == list(range(n))
        q.put_many(range(n))
        assert q.get_many(None) == list(range(n))
        assert q.empty()


@pytest.mark.parametrize("k", [1, 2, 63, 64, 65, 100, 200, 201, 10**6, 2**63, 2**200, True])
def test_get_many_takes_at_most_the_number_asked_for(q: ShmQueue[Any], k: int) -> None:
    q.put_many(range(200))
    assert q.get_many(k) == list(range(min(k, 200)))
    assert q.qsize() == 200 - min(k, 200)
    assert drain(q) == list(range(min(k, 200), 200))


def test_get_many_takes_the_arguments_of_get(q: ShmQueue[Any]) -> None:
    q.put_many(range(4))
    assert q.get_many(2, True, 1.0) == [0, 1]
    assert q.get_many(max_items=1, block=False, timeout=None) == [2]
    assert q.get_many(block=False) == [3]


@pytest.mark.parametrize("k", [0, -1, -(2**70), False])
def test_get_many_of_less_than_one_is_a_value_error(q: ShmQueue[Any], k: int) -> None:
    q.put(1)
    with pytest.raises(exceptions.ShmQueueValueError, match="max_items"):
        q.get_many(k)
    assert q.get() == 1


@pytest.mark.parametrize("k", ["x", 1.0, [1], b"1", object()], ids=repr)
def test_get_many_of_no_number_is_a_type_error(q: ShmQueue[Any], k: Any) -> None:
    q.put(1)
    with pytest.raises(exceptions.ShmQueueTypeError, match="max_items"):
        q.get_many(k)
    assert q.get() == 1


@pytest.mark.parametrize("k", [None, 1, 5])
def test_get_many_from_an_empty_queue_raises_empty(q: ShmQueue[Any], k: int | None) -> None:
    for wait in ({"block": False}, {"timeout": 0}, {"timeout": 0.02}):
        with pytest.raises(exceptions.ShmQueueEmpty):
            q.get_many(k, **wait)
    before = time.monotonic()
    with pytest.raises(exceptions.ShmQueueEmpty):
        q.get_many(k, timeout=0.2)
    assert 0.2 <= time.monotonic() - before < PATIENCE_S


def test_get_many_with_a_negative_timeout_is_a_value_error(q: ShmQueue[Any]) -> None:
    q.put(1)
    with pytest.raises(exceptions.ShmQueueValueError):
        q.get_many(timeout=-1)
    assert q.get_many(block=False, timeout=-1) == [1]


@pytest.mark.parametrize("k", [None, 1, 5])
def test_get_many_waits_for_the_first_item_only(q: ShmQueue[Any], k: int | None) -> None:
    call = Call(q.get_many, k)
    asleep(call)
    q.put("first")
    assert call.result() == ["first"]
    q.put_many([1, 2])
    assert q.get_many(k) == [1, 2][:k]


def test_get_many_of_all_ends_however_fast_others_put(queue_name: str) -> None:
    with ShmQueue[int](queue_name, buffer_size=1 << 16) as q:
        stop = threading.Event()

        def produce() -> int:
            n = 0
            with contextlib.suppress(queue.Full):
                while not stop.is_set():
                    n += q.put_many(range(n, n + 50), timeout=0.5)
            return n

        call = Call(produce)
        got: list[int] = []
        while len(got) < 20_000:
            part = q.get_many(timeout=PATIENCE_S)
            assert len(part) <= 2 * (q.max_buffer_size() // 9)
            got += part
        stop.set()
        n = call.result()
        got += drain(q)
        assert got == list(range(n))


def test_get_many_mixes_sizes_and_methods_in_order(queue_name: str) -> None:
    seed = int(os.environ.get("SHMQUEUE_SEED", "20240229"))
    print(f"seed {seed}")
    rng = random.Random(seed)
    with ShmQueue[Any](queue_name, buffer_size=1 << 18) as q:
        sizes = [0, 1, 100, 4000, 4085, 4086, 4093, 4094, 4096, 4097, 5000, 9000]
        kinds: list[Callable[[int], Any]] = [bytes, lambda n: "s" * n, lambda n: {n, 1j}, lambda n: [bytes(n)]]
        for _ in range(25):
            items = [rng.choice(kinds)(rng.choice(sizes)) for _ in range(rng.randint(1, 25))]
            assert q.put_many(items) == len(items)
            got: list[Any] = []
            while len(got) < len(items):
                got += q.get_many(rng.randint(1, 30), block=False)
            assert got == items
            assert q.buffer_occupancy() == 0
        assert q.check() == []


def test_get_many_makes_room_for_waiting_producers(queue_name: str) -> None:
    with ShmQueue[Any](queue_name) as q:
        q.put_many([0] * (SYSTEM_PAGESIZE // 9))
        calls = [Call(q.put, bytes(1000)) for _ in range(3)]
        asleep(*calls)
        q.get_many()
        for call in calls:
            call.result()
        assert q.get_many() == [bytes(1000)] * 3


def test_threads_and_handles_take_each_item_once(queue_name: str) -> None:
    with ShmQueue[Any](queue_name, buffer_size=1 << 14) as q, ShmQueue[Any](queue_name) as other:

        def consume(handle: ShmQueue[Any], most: int | None) -> list[Any]:
            got: list[Any] = []
            while None not in got:
                got += handle.get_many(most)
            if got.count(None) > 1:  # others' marks to end
                handle.put_many([None] * (got.count(None) - 1))
            return [item for item in got if item is not None]

        calls = [Call(consume, handle, most) for handle, most in ((q, 1), (q, 7), (other, 100), (other, None))]
        q.put_many(range(6000))
        q.put_many([None] * len(calls))
        parts = [call.result() for call in calls]
        assert sorted(item for part in parts for item in part) == list(range(6000))
        for part in parts:
            assert part == sorted(part)


# ---- items that can't be decoded


def put_with_one_bad(q: ShmQueue[Any], n: int, bad: int, filling: int) -> list[Any]:
    """Put n items, of which one is of a method that nobody can decode."""
    items = [[i, bytes(filling)] for i in range(n)]
    q.custom_serialize(lambda method, data: b"bad %d" % data)
    q.put_many(items[:bad])
    q.put(bad, serialization_method=MY_METHOD)
    q.put_many(items[bad + 1 :])
    return items


@pytest.mark.parametrize("filling", [0, 5000])
@pytest.mark.parametrize("bad", [1, 2, 30, 63, 64, 65, 99])
def test_decode_failure_comes_at_the_next_call_and_loses_nothing(queue_name: str, bad: int, filling: int) -> None:
    with ShmQueue[Any](queue_name, buffer_size=1 << 20) as q:
        for ask in (None, 100, 10**6):
            items = put_with_one_bad(q, 100, bad, filling)
            assert q.get_many(ask) == items[:bad]
            assert q.qsize() == 100 - bad - 1
            with pytest.raises(exceptions.ShmQueueDeserializationError) as caught:
                q.get_many(ask, block=False)
            assert caught.value.payload == b"bad %d" % bad
            assert caught.value.serialization_method == MY_METHOD
            assert isinstance(caught.value, NotImplementedError)
            if bad < 99:
                assert q.get_many(ask) == items[bad + 1 :]
            assert q.empty()
            assert q.buffer_occupancy() == 0
            assert q.check() == []


def test_decode_failure_of_the_first_item_comes_at_once(q: ShmQueue[Any]) -> None:
    items = put_with_one_bad(q, 5, 0, 0)
    with pytest.raises(exceptions.ShmQueueDeserializationError) as caught:
        q.get_many()
    assert caught.value.payload == b"bad 0"
    assert q.qsize() == 4
    assert q.get_many() == items[1:]


@pytest.mark.parametrize("next_call", ["get", "get_nowait", "get_many", "iteration"])
def test_decode_failure_comes_whatever_the_next_call_that_takes_is(q: ShmQueue[Any], next_call: str) -> None:
    items = put_with_one_bad(q, 10, 5, 0)
    assert q.get_many() == items[:5]
    q.put("looking and putting are no takers")
    assert q.qsize() == 5
    calls: dict[str, Callable[[], Any]] = {
        "get": lambda: q.get(timeout=PATIENCE_S),
        "get_nowait": q.get_nowait,
        "get_many": lambda: q.get_many(1),
        "iteration": lambda: next(iter(q)),
    }
    with pytest.raises(exceptions.ShmQueueDeserializationError) as caught:
        calls[next_call]()
    assert caught.value.payload == b"bad 5"
    assert drain(q) == [*items[6:], "looking and putting are no takers"]


@pytest.mark.parametrize("bad", [1, 30, 64])
@pytest.mark.parametrize("filling", [0, 5000])
def test_what_follows_a_decode_failure_can_be_got_by_another_handle(queue_name: str, bad: int, filling: int) -> None:
    with ShmQueue[Any](queue_name, buffer_size=1 << 20) as q, ShmQueue[Any](queue_name) as other:
        items = put_with_one_bad(q, 100, bad, filling)
        assert q.get_many() == items[:bad]
        assert other.qsize() == 100 - bad - 1
        q.put("newer")
        assert other.get() == items[bad + 1]
        assert other.get_many() == [*items[bad + 2 :], "newer"]
        assert other.empty()
        with pytest.raises(exceptions.ShmQueueDeserializationError):
            q.get(block=False)
        with pytest.raises(exceptions.ShmQueueEmpty):
            q.get(block=False)


def test_several_decode_failures_come_one_by_one(q: ShmQueue[Any]) -> None:
    q.custom_serialize(lambda method, data: data)
    q.put_many([1, 2])
    q.put_many([b"a", b"b"], serialization_method=MY_METHOD)
    q.put(3)
    q.put(b"c", serialization_method=MY_METHOD)
    got: list[Any] = []
    while not q.empty() or len(got) < 5:
        try:
            got.append(q.get_many(block=False))
        except exceptions.ShmQueueDeserializationError as error:
            got.append(error.payload)
    with contextlib.suppress(queue.Empty):
        got.append(q.get_many(block=False))
    assert got == [[1, 2], b"a", b"b", [3], b"c"]


def test_decode_failure_is_the_users_own_when_the_deserializer_raises(q: ShmQueue[Any]) -> None:
    def deserialize(method: int, chunks: list[memoryview]) -> int:
        if chunks[0] == b"7":
            raise Broken("seven")
        return int(bytes(chunks[0]))

    q.custom_serialize(lambda method, data: str(data).encode())
    q.custom_deserialize(deserialize)
    q.put_many(range(10), serialization_method=MY_METHOD)
    assert q.get_many() == list(range(7))
    with pytest.raises(exceptions.ShmQueueDeserializationError) as caught:
        q.get_many()
    assert isinstance(caught.value.__cause__, Broken)
    assert caught.value.payload == b"7"
    assert q.get_many() == [8, 9]


def test_interrupt_while_decoding_loses_no_item(q: ShmQueue[Any]) -> None:
    """What was decoded before is returned or still there; what was being decoded may be lost with the error."""
    interrupts = iter([KeyboardInterrupt])

    def deserialize(method: int, chunks: list[memoryview]) -> int:
        if chunks[0] == b"5":
            for interrupt in interrupts:
                raise interrupt
        return int(bytes(chunks[0]))

    q.custom_serialize(lambda method, data: str(data).encode())
    q.custom_deserialize(deserialize)
    q.put_many(range(10), serialization_method=MY_METHOD)
    got: list[int] = []
    interrupted = 0
    while len(got) < 9:
        try:
            got += q.get_many(block=False)
        except KeyboardInterrupt:
            interrupted += 1
    assert got in ([0, 1, 2, 3, 4, 6, 7, 8, 9], list(range(10)))
    assert interrupted == 1


def test_deserializer_may_use_the_queue_itself(q: ShmQueue[Any]) -> None:
    def deserialize(method: int, chunks: list[memoryview]) -> Any:
        q.put(["answer to", bytes(chunks[0])])
        return bytes(chunks[0])

    q.custom_serialize(lambda method, data: data)
    q.custom_deserialize(deserialize)
    q.put_many([b"a", b"b", b"c"], serialization_method=MY_METHOD)
    got = q.get_many(3)
    assert got == [b"a", b"b", b"c"]
    assert q.get_many() == [["answer to", item] for item in got]


def test_deserializer_may_get_from_the_queue_itself(q: ShmQueue[Any]) -> None:
    """An item is what it says and the item after it; whoever comes first, nothing is lost or doubled."""

    def deserialize(method: int, chunks: list[memoryview]) -> Any:
        try:
            return [bytes(chunks[0]), q.get(block=False)]
        except queue.Empty:
            return [bytes(chunks[0])]

    q.custom_serialize(lambda method, data: data)
    q.custom_deserialize(deserialize)
    q.put(b"head", serialization_method=MY_METHOD)
    q.put_many(range(5))
    seen: list[Any] = []
    while not q.empty():
        for item in q.get_many(block=False):
            seen += item if isinstance(item, list) else [item]
    assert sorted(seen, key=str) == [0, 1, 2, 3, 4, b"head"]


def test_decode_failures_of_two_calls_at_a_time_both_come(q: ShmQueue[Any]) -> None:
    """As by two threads that share a handle; here one call is made inside the other, so that it's sure to happen."""
    inner: list[Any] = []

    def deserialize(method: int, chunks: list[memoryview]) -> Any:
        if chunks[0] == b"nested":
            inner.extend(q.get_many(2, block=False))
            return "nested"
        raise Broken(bytes(chunks[0]))

    q.custom_serialize(lambda method, data: data)
    q.custom_deserialize(deserialize)
    q.put(b"nested", serialization_method=MY_METHOD)
    q.put(1)
    q.put(b"bad 1", serialization_method=MY_METHOD)
    q.put(2)
    q.put(b"bad 2", serialization_method=MY_METHOD)
    seen: list[Any] = []
    for _ in range(6):
        try:
            seen += q.get_many(3, block=False)
        except exceptions.ShmQueueDeserializationError as error:
            seen.append(error.payload)
        except queue.Empty:
            break
    assert sorted(map(str, seen + inner)) == sorted(map(str, ["nested", 1, 2, b"bad 1", b"bad 2"]))


# ---- waking


def test_put_many_of_n_wakes_n_consumers_without_a_polling_interval(queue_name: str) -> None:
    """One wake for a batch would leave the others asleep until they look by themselves."""
    n = 4
    took = []
    with contextlib.ExitStack() as stack:
        handles = [stack.enter_context(ShmQueue[int](queue_name)) for _ in range(n)]
        q = stack.enter_context(ShmQueue[int](queue_name))
        for _ in range(15):
            calls = [Call(handle.get) for handle in handles]
            asleep(*calls)
            before = time.monotonic()
            q.put_many(range(n))
            assert sorted(call.result() for call in calls) == list(range(n))
            took.append(time.monotonic() - before)
    assert statistics.median(took) < 0.05


def test_put_many_wakes_consumers_of_several_threads_of_one_handle(q: ShmQueue[int]) -> None:
    took = []
    for _ in range(15):
        calls = [Call(q.get_many, 1) for _ in range(4)]
        asleep(*calls)
        before = time.monotonic()
        q.put_many(range(4))
        assert sorted(call.result()[0] for call in calls) == list(range(4))
        took.append(time.monotonic() - before)
    assert statistics.median(took) < 0.05


def test_put_many_of_fewer_items_than_consumers_leaves_the_others_waiting(q: ShmQueue[int]) -> None:
    calls = [Call(q.get) for _ in range(4)]
    asleep(*calls)
    q.put_many([1, 2])
    deadline = time.monotonic() + PATIENCE_S
    while sum(call.is_alive() for call in calls) > 2:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    asleep(*(call for call in calls if call.is_alive()))
    q.put_many([3, 4])
    assert sorted(call.result() for call in calls) == [1, 2, 3, 4]


def test_a_partial_batch_wakes_consumers_while_its_producer_waits_for_room(queue_name: str) -> None:
    with ShmQueue[bytes](queue_name) as q:
        consumer = Call(lambda: [q.get() for _ in range(20)])
        asleep(consumer)
        assert q.put_many(bytes([i]) * 1000 for i in range(20)) == 20
        assert consumer.result() == [bytes([i]) * 1000 for i in range(20)]


# ---- put_many that fails before it begins


@pytest.mark.parametrize(
    ("arguments", "kind"),
    [
        ({"timeout": -1}, exceptions.ShmQueueValueError),
        ({"timeout": "1"}, exceptions.ShmQueueTypeError),
        ({}, exceptions.ShmQueueNotInitializedError),
    ],
)
@pytest.mark.parametrize("shape", [list, iter])
def test_put_many_refused_at_once_has_all_of_them_remaining(
    queue_name: str, arguments: dict[str, Any], kind: type[Exception], shape: Any
) -> None:
    with ShmQueue[int](queue_name) as q:
        if kind is exceptions.ShmQueueNotInitializedError:
            q.shutdown()
        with pytest.raises(kind) as caught:
            q.put_many(shape([1, 2, 3]), **arguments)
        assert progress(caught.value) == (0, [1, 2, 3])


def test_put_many_of_what_is_no_iterable_is_a_type_error(queue_name: str) -> None:
    wrong = "items must be iterable, not int"
    with ShmQueue[Any](queue_name) as q, pytest.raises(exceptions.ShmQueueTypeError, match=wrong):
        q.put_many(5)  # type: ignore[arg-type]


@pytest.mark.parametrize("max_items", [(), (1, 2), "3"])
def test_max_items_that_is_no_int_is_a_type_error(queue_name: str, max_items: Any) -> None:
    with ShmQueue[Any](queue_name) as q, pytest.raises(exceptions.ShmQueueTypeError, match="max_items must be an int"):
        q.get_many(max_items)


# ---- get_many that is interrupted, and errors kept for the next call


def put_with_one_raising(q: ShmQueue[Any], n: int, bad: int, error: type[BaseException]) -> None:
    def deserialize(method: int, chunks: list[memoryview]) -> int:
        number = int(bytes(chunks[0]))
        if number == bad:
            raise error
        return number

    q.custom_serialize(lambda method, data: str(data).encode())
    q.custom_deserialize(deserialize)
    q.put_many(range(n), serialization_method=MY_METHOD)


def test_ctrl_c_in_get_many_comes_at_once_and_leaves_the_batch(q: ShmQueue[Any]) -> None:
    put_with_one_raising(q, 10, 5, KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        q.get_many()
    assert q.qsize() == 10


def test_what_came_before_the_interrupted_batch_is_in_the_exception(q: ShmQueue[Any]) -> None:
    put_with_one_raising(q, 100, 90, KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt) as caught:
        q.get_many()
    assert caught.value.received == list(range(100 - q.qsize()))  # type: ignore[attr-defined]


def test_a_kept_error_is_its_processes_alone(q: ShmQueue[Any]) -> None:
    put_with_one_raising(q, 3, 1, ValueError)
    assert q.get_many() == [0]
    pid = os.fork()
    if pid == 0:
        os._exit(0 if q.get(timeout=10) == 2 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    with pytest.raises(exceptions.ShmQueueDeserializationError) as caught:
        q.get_nowait()
    assert caught.value.payload == b"1"


def test_a_kept_error_goes_with_clear_and_shutdown(q: ShmQueue[Any]) -> None:
    put_with_one_raising(q, 3, 1, ValueError)
    assert q.get_many() == [0]
    q.clear()
    with pytest.raises(exceptions.ShmQueueEmpty):
        q.get_nowait()
    q.put_many(range(3), serialization_method=MY_METHOD)
    assert q.get_many() == [0]
    q.shutdown()
    for call in (q.get_nowait, q.get_many):
        with pytest.raises(exceptions.ShmQueueNotInitializedError):
            call()


# ---- packed and unpacked together


def thing(rng: random.Random, depth: int = 3) -> Any:
    """An object of any kind: plain, bytes, and what only pickle can do; sizes about the seams of msgpack's formats."""
    size = rng.choice((0, 1, 7, 15, 16, 17, 31, 32, 33, 255, 256, 300))
    plain: list[Callable[[], Any]] = [
        lambda: None, lambda: True, lambda: rng.getrandbits(rng.choice((4, 7, 8, 15, 16, 31, 32, 63))),
        lambda: -rng.getrandbits(rng.choice((4, 5, 7, 8, 15, 16, 31, 32, 63))),
        lambda: rng.random(), lambda: "x" * size, lambda: "\u20ac" * size, lambda: bytes(size),
        lambda: bytearray(size), lambda: 2**64 - 1,
    ]  # fmt: skip
    nested: list[Callable[[], Any]] = [
        lambda: [rng.randrange(10)] * size, lambda: (1, "a") * rng.choice((0, 7, 8, 20)),
        lambda: {i: str(i) for i in range(size)}, lambda: [thing(rng, depth - 1) for _ in range(rng.randrange(5))],
        lambda: {str(i): thing(rng, depth - 1) for i in range(rng.randrange(5))},
        lambda: msgpack.ExtType(5, bytes(rng.choice((1, 2, 4, 8, 16, 3, size)))),
    ]  # fmt: skip
    odd: list[Callable[[], Any]] = [lambda: {1, 2}, lambda: 2**70, lambda: Fraction(1, 3), lambda: {(1, 2): 3}]
    if rng.random() < 0.02:
        return rng.choice(odd)()
    return rng.choice(plain + nested if depth else plain)()


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("strict_types", [False, True])
def test_a_batch_arrives_as_items_put_and_got_one_by_one(queue_name: str, seed: int, strict_types: bool) -> None:
    rng = random.Random(seed)
    items = [thing(rng) for _ in range(rng.choice((1, 2, 63, 64, 65, 200)))]
    with ShmQueue[Any](queue_name, buffer_size=16 << 20, strict_types=strict_types) as q:
        sizes, got = [], []
        for item in items:
            q.put(item)
            sizes.append(q.buffer_occupancy())
            got.append(q.get())
        assert q.put_many(items) == len(items)
        assert q.buffer_occupancy() == sum(sizes)
        together = q.get_many()
        assert together == got
        assert list(map(type, together)) == list(map(type, got))
        q.put_many(items)
        assert [q.get() for _ in items] == got
        for item in items:
            q.put(item)
        assert q.get_many() == got


def outcome(call: Callable[[], Any]) -> list[Any]:
    try:
        return [call()]
    except exceptions.ShmQueueDeserializationError as error:
        return [("error", bytes(error.payload))]


@pytest.mark.parametrize("seed", range(30))
def test_what_is_wrong_in_a_batch_spoils_nothing_else(q: ShmQueue[Any], seed: int) -> None:
    """One payload that ends too early beside one that goes on too long would make a list that looks right."""
    rng = random.Random(seed)
    bad = [
        b"", b"\x92\x01", b"\x01\x02", b"\xc1", b"\xd9", b"\xdb\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff\x01", b"\xa2a",
        b"\xcf\x00", b"\xc9\xff\xff", b"\x81\x01", b"\xa1\xff", bytes(5), rng.randbytes(9), b"\xdc\x00", b"\xc4\x05abc",
    ]  # fmt: skip
    payloads = [
        rng.choice(bad) if rng.random() < 0.1 else msgpack.packb(rng.choice((5, "text", [1, 2], {"a": None}, b"x" * 9)))
        for _ in range(150)
    ]
    for payload in payloads:
        q.put(serialization.again(0, payload, 0))
    expected: list[Any] = []
    while not q.empty():
        expected += outcome(q.get)
    for payload in payloads:
        q.put(serialization.again(0, payload, 0))
    found: list[Any] = []
    while len(found) < len(payloads):
        for part in outcome(lambda: q.get_many(block=False)):
            found += part if isinstance(part, list) else [part]
    assert found == expected
    assert q.empty()


def test_an_item_that_cannot_be_put_is_the_first_of_the_rest_wherever_it_is(queue_name: str) -> None:
    with ShmQueue[Any](queue_name, buffer_size=1 << 16, allow_pickle=False) as q:
        for at in (0, 1, 2, 63, 64, 65, 99):
            items: list[Any] = [{"n": i} for i in range(100)]
            items[at] = object()
            with pytest.raises(exceptions.ShmQueueSerializationError) as info:
                q.put_many(items)
            assert vars(info.value)["accepted"] == at
            assert list(vars(info.value)["remaining"]) == items[at:]
            assert q.get_many(block=False) == items[:at] if at else q.empty()


FORMATS: list[Any] = [
    None, True, 5, -3, 200, 60_000, 2**31, 2**63, -100, -1000, -(2**20), -(2**40), 1.5, "", "x" * 31, "x" * 40,
    "x" * 300, [], [1] * 15, [b"x"] * 16, (1, (2, "b")), {}, {"a": {"b": [1, 2.5]}}, dict.fromkeys(map(str, range(16))),
    [bytes(256), bytes(1)],
]  # fmt: skip
if serialization._ormsgpack is None:  # which doesn't pack them
    FORMATS += [msgpack.ExtType(5, bytes(size)) for size in (1, 2, 4, 8, 16, 3, 300)]


@pytest.mark.parametrize("item", FORMATS, ids=lambda item: repr(item)[:20])
def test_plain_items_are_packed_and_unpacked_together(
    queue_name: str, item: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    pack, options, unpack = serialization.fast_codec(False)

    def counted(strict_types: bool) -> Any:
        def packs(*args: Any) -> bytes:
            calls.append("pack")
            return pack(*args)

        def unpacks(payload: bytes) -> Any:
            calls.append("unpack")
            return unpack(payload)

        return packs, options, unpacks

    monkeypatch.setattr(serialization, "fast_codec", counted)
    with ShmQueue[Any](queue_name, buffer_size=8 << 20) as q:
        q.put_many([item] * 64)
        assert calls == ["pack"] * 2  # the first one alone, to know how large they are
        assert q.buffer_occupancy() == 64 * (8 + len(msgpack.packb(item)))
        got = q.get_many(64)
        assert calls[2:] == ["unpack"]
        assert got == [msgpack.unpackb(msgpack.packb(item))] * 64
