"""The queue against a plain deque: any sequence of calls, through several handles, with exact byte accounting.

The model is a deque of (item, bytes it takes) and two byte counts. After each step every status call of
every handle must agree with it, and no invariant of the segment may be broken. Sizes are drawn where
things change: about SMALL (from where payloads are copied outside of the lock), pages, what is free.
"""

from __future__ import annotations

import pickle
import queue
from collections import deque
from collections.abc import Iterator
from typing import Any

import msgpack
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from shmqueue import SIZE_HEADER, SYSTEM_PAGESIZE, SerializationMethods, ShmQueue, exceptions

SMALL = 4096  # bytes; SHMQ_SMALL of core/shmq.h
MY_METHOD = SerializationMethods.FIRST_PUBLIC_NUMBER
PAGES = (1, 2, 3, 5, 16)  # powers of two and others
HANDLES = 4

small_values = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=50),
    st.lists(st.integers(), max_size=5),
    st.frozensets(st.integers(0, 9)),
    st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=3), st.floats(allow_nan=False), max_size=3
    ),
)
# Bytes that a whole record takes: often next to where something changes.
anchors = st.sampled_from((8, 16, 256, SMALL, SMALL + SIZE_HEADER, 2 * SYSTEM_PAGESIZE, 3 * SYSTEM_PAGESIZE, 65536))
sizes = st.one_of(
    st.integers(8, 300),
    st.builds(lambda anchor, off: max(8, anchor + off), anchors, st.integers(-9, 9)),
    st.sampled_from(["free", "free - 1", "free + 1", "half", "all", "all + 1"]),
)


class Item:
    """An item together with what it takes in the ring and how it must arrive."""

    def __init__(self, value: Any, method: int, payload: int, arrives: Any) -> None:
        self.value, self.method, self.size, self.arrives = value, method, SIZE_HEADER + payload, arrives


def by_default(value: Any) -> Item:
    try:
        payload = len(msgpack.packb(value, strict_types=True))
    except (TypeError, ValueError, OverflowError):
        payload = len(pickle.dumps(value, 5))
    return Item(value, SerializationMethods.DEFAULT, payload, value)


def by_pickle(value: Any) -> Item:
    return Item(value, SerializationMethods.PICKLE, len(pickle.dumps(value, 5)), value)


class Machine(RuleBasedStateMachine):
    """Rules are the calls; `self.model` is the truth."""

    name = ""

    def __init__(self) -> None:
        super().__init__()
        self.handles: list[ShmQueue[Any]] = []
        self.serial = 0
        self.forget()

    def forget(self) -> None:
        """The queue is gone, as far as the model knows."""
        self.model: deque[Item] = deque()
        self.put_pos = self.free_pos = self.capacity = 0

    # -- the model's arithmetic

    @property
    def used(self) -> int:
        return self.put_pos - self.free_pos

    @property
    def free(self) -> int:
        return self.capacity - self.used

    def is_put(self, item: Item) -> None:
        self.model.append(item)
        self.put_pos += item.size

    def is_got(self) -> Item:
        item = self.model.popleft()
        self.free_pos += item.size
        return item

    def record_of(self, size: int | str) -> Item:
        """An item of the user's own method that takes `size` bytes; no two have the same content."""
        if isinstance(size, str):
            free, capacity = self.free, self.capacity
            named = {"free": free, "free - 1": free - 1, "free + 1": free + 1}
            named |= {"half": capacity // 2, "all": capacity, "all + 1": capacity + 1}
            size = max(8, named[size])
        self.serial += 1
        length = size - SIZE_HEADER
        content = (b"%d," % self.serial * (length // 2 + 1))[:length]
        return Item(content, MY_METHOD, length, content)

    def draw_handle(self, data: st.DataObject) -> ShmQueue[Any]:
        return self.handles[data.draw(st.integers(0, len(self.handles) - 1), label="handle")]

    def draw_item(self, data: st.DataObject) -> Item:
        kind = data.draw(st.sampled_from(["record", "record", "value", "pickle", "bytes"]), label="kind")
        if kind == "record":
            return self.record_of(data.draw(sizes, label="size"))
        if kind == "bytes":  # by msgpack: the same contents with a head before them
            return by_default(self.record_of(data.draw(sizes, label="size")).value)
        value = data.draw(small_values, label="value")
        return by_pickle(value) if kind == "pickle" else by_default(value)

    # -- handles

    @initialize(pages=st.sampled_from(PAGES), start=st.one_of(st.just(0), st.integers(-300, 300)))
    def first(self, pages: int, start: int) -> None:
        self.attach(pages)
        self.turn(start % self.capacity)

    def turn(self, by: int) -> None:
        """Move on in the ring, so that what is at its seam comes soon."""
        if by > self.capacity:
            self.turn(by - self.capacity)
        elif by >= SIZE_HEADER:
            record = self.record_of(by)
            self.handles[0].put(record.value, serialization_method=record.method)
            assert self.handles[0].get(block=False) == record.value
            self.put_pos += by
            self.free_pos += by

    @precondition(lambda self: self.handles and not self.model)
    @rule(by=st.one_of(st.integers(8, 20_000), st.integers(-20, 20)))
    def turn_the_empty_ring(self, by: int) -> None:
        self.turn(by if by > 20 else (by - self.put_pos) % self.capacity)  # the latter: to about the seam

    @precondition(lambda self: 0 < len(self.handles) < HANDLES)
    @rule(pages=st.sampled_from(PAGES))
    def another(self, pages: int) -> None:
        self.attach(pages)

    @precondition(lambda self: not self.handles)
    @rule(pages=st.sampled_from(PAGES))
    def anew(self, pages: int) -> None:
        self.attach(pages)

    def attach(self, pages: int) -> None:
        handle = ShmQueue[Any](self.name, buffer_size=pages * SYSTEM_PAGESIZE)
        handle.custom_serialize(lambda method, data: data)
        handle.custom_deserialize(lambda method, chunks: bytes(chunks[0]))
        self.handles.append(handle)
        self.capacity = self.capacity or pages * SYSTEM_PAGESIZE

    @precondition(lambda self: len(self.handles) > 1)
    @rule(data=st.data())
    def shut(self, data: st.DataObject) -> None:
        handle = self.draw_handle(data)
        self.handles.remove(handle)
        handle.shutdown()

    @precondition(lambda self: len(self.handles) == 1)
    @rule(really=st.integers(0, 9))
    def shut_the_last(self, really: int) -> None:
        if really == 9:  # seldom: all is lost with it
            self.handles.pop().shutdown()
            self.forget()

    # -- putting

    @precondition(lambda self: self.handles)
    @rule(data=st.data(), nowait=st.booleans())
    def put(self, data: st.DataObject, nowait: bool) -> None:
        handle, item = self.draw_handle(data), self.draw_item(data)

        def call() -> None:
            if nowait:
                handle.put_nowait(item.value, serialization_method=item.method)
            else:
                handle.put(item.value, timeout=0, serialization_method=item.method)

        if item.size > self.capacity:
            with pytest.raises(exceptions.ShmQueueValueError):
                call()
        elif item.size > self.free:
            with pytest.raises(exceptions.ShmQueueFull):
                call()
        else:
            call()
            self.is_put(item)

    @precondition(lambda self: self.handles and self.free)
    @rule(handle=st.integers(0, HANDLES - 1), less=st.sampled_from((0, 0, 1, 7, 8, 9)))
    def fill(self, handle: int, less: int) -> None:
        """Leave no byte free, or a few."""
        if (size := self.free - less) >= SIZE_HEADER:
            record = self.record_of(size)
            self.handles[handle % len(self.handles)].put_nowait(record.value, record.method)
            self.is_put(record)

    @precondition(lambda self: self.handles)
    @rule(data=st.data(), n=st.one_of(st.integers(0, 8), st.integers(60, 70)), block=st.booleans())
    def put_many(self, data: st.DataObject, n: int, block: bool) -> None:
        handle = self.draw_handle(data)
        items = [self.record_of(data.draw(sizes if n <= 8 else st.integers(8, 60), label="size")) for _ in range(n)]
        source: Iterator[bytes] = iter([item.value for item in items])
        fit = 0
        while fit < n and items[fit].size <= self.free:
            self.is_put(items[fit])
            fit += 1
        if fit == n:
            assert handle.put_many(source, block, 0, MY_METHOD) == n
            return
        error = exceptions.ShmQueueFull if items[fit].size <= self.capacity else exceptions.ShmQueueValueError
        with pytest.raises(error) as caught:
            handle.put_many(source, block, 0, MY_METHOD)
        assert caught.value.accepted == fit
        assert list(caught.value.remaining) == [item.value for item in items[fit:]]

    @precondition(lambda self: self.handles)
    @rule(data=st.data(), before=st.integers(0, 3))
    def put_many_with_one_that_cannot_be_put(self, data: st.DataObject, before: int) -> None:
        handle = self.draw_handle(data)
        items: list[Any] = [*range(before), lambda: 0, "never"]
        fit = min(before, self.free // (SIZE_HEADER + 1))
        with pytest.raises(
            exceptions.ShmQueueFull if fit < before else exceptions.ShmQueueSerializationError
        ) as caught:
            handle.put_many(iter(items), block=False)
        assert caught.value.accepted == fit
        assert list(caught.value.remaining) == items[fit:]
        for i in range(fit):
            self.is_put(by_default(i))

    @precondition(lambda self: self.handles)
    @rule(
        data=st.data(),
        wrong=st.sampled_from(
            [lambda: 0, ("serialization_method", -1), ("serialization_method", "x"), ("timeout", -1)]
        ),
    )
    def put_nothing(self, data: st.DataObject, wrong: Any) -> None:
        value, options = (wrong, {}) if callable(wrong) else (1, dict([wrong]))
        handle = self.draw_handle(data)
        with pytest.raises((exceptions.ShmQueueSerializationError, exceptions.ShmQueueValueError)):
            handle.put(value, **options)

    # -- getting

    @precondition(lambda self: self.handles)
    @rule(data=st.data(), how=st.sampled_from(["nowait", "timeout", "block"]))
    def get(self, data: st.DataObject, how: str) -> None:
        handle = self.draw_handle(data)
        call = {
            "nowait": handle.get_nowait,
            "timeout": lambda: handle.get(timeout=0),
            "block": (handle.get if self.model else lambda: handle.get(timeout=0.001)),
        }[how]
        if not self.model:
            with pytest.raises(queue.Empty):
                call()
            return
        got, expected = call(), self.is_got().arrives
        assert got == expected
        assert type(got) is type(expected)

    @precondition(lambda self: self.handles)
    @rule(data=st.data(), most=st.one_of(st.none(), st.integers(1, 10), st.integers(60, 70)))
    def get_many(self, data: st.DataObject, most: int | None) -> None:
        handle = self.draw_handle(data)
        if not self.model:
            with pytest.raises(queue.Empty):
                handle.get_many(most, block=False)
            return
        n = len(self.model) if most is None else min(most, len(self.model))
        assert handle.get_many(most) == [self.is_got().arrives for _ in range(n)]

    @precondition(lambda self: self.handles)
    @rule(data=st.data())
    def clear(self, data: st.DataObject) -> None:
        self.draw_handle(data).clear()
        self.model.clear()
        self.free_pos = self.put_pos

    # -- what must hold after each step

    @precondition(lambda self: self.handles)
    @invariant()
    def every_handle_tells_the_truth(self) -> None:
        size = self.capacity
        for handle in self.handles:
            assert handle.qsize() == len(self.model)
            assert handle.empty() is (len(self.model) == 0)
            assert handle.full() is (self.used == size)
            assert handle.buffer_occupancy() == self.used
            assert handle.max_buffer_size() == size
            assert handle.refs == len(self.handles)
            assert handle.snapshot() == (
                len(self.handles),
                self.put_pos % size,
                self.free_pos % size,
                size,
                len(self.model),
                int(self.put_pos // size == self.free_pos // size),
            )

    @precondition(lambda self: self.handles)
    @invariant()
    def no_invariant_is_broken(self) -> None:
        assert self.handles[0].check() == []

    def teardown(self) -> None:
        for handle in self.handles:
            handle.shutdown()


@pytest.mark.parametrize("steps", [15, 60])
def test_any_sequence_of_calls_does_what_a_deque_would_do(queue_name: str, steps: int) -> None:
    class OfThisTest(Machine):
        name = queue_name

    run_state_machine_as_test(
        OfThisTest,
        settings=settings(
            max_examples=6000 // steps,
            stateful_step_count=steps,
            deadline=None,
            print_blob=True,
            suppress_health_check=list(HealthCheck),
        ),
    )
