"""Zero copy: reservations, and leases that show the ring; no view ever shows or overwrites what is somebody else's."""

from __future__ import annotations

import _thread
import contextlib
import ctypes
import dataclasses
import gc
import operator
import os
import pickle
import signal
import struct
import subprocess
import sys
import threading
import time
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import msgpack
import numpy as np
import pytest

from shmqueue import (
    SIZE_HEADER,
    Reservation,
    ShmQueue,
    ShmQueueFull,
    ShmQueueNotInitializedError,
    ShmQueueRuntimeError,
    ShmQueueSerializationError,
    ShmQueueTypeError,
    ShmQueueValueError,
)

SIZE = 1 << 20
IMAGE = np.arange(50_000, dtype="u4").reshape(100, 500)


@pytest.fixture
def q(queue_name: str) -> Iterator[ShmQueue[Any]]:
    with ShmQueue[Any](queue_name, buffer_size=SIZE) as queue:
        yield queue
        assert queue.check() == []


OPERATIONS: list[Callable[[Any], Any]] = [
    lambda array: array[0], len, iter, bool, float, hash, sum, np.mean, np.sqrt, np.sort, pickle.dumps,
    lambda array: array + 1, lambda array: 1 + array, lambda array: array == 0, lambda array: array < array,
    lambda array: array.sum() + 1, lambda array: array.fill(0), lambda array: array.item().something,
    lambda array: operator.setitem(array, ..., 0), lambda array: operator.iadd(array, 1),
    lambda array: np.concatenate([array, array]), lambda array: array.astype("f4"), lambda array: memoryview(array)[0],
]  # fmt: skip


def is_unusable(array: Any) -> bool:
    for operation in OPERATIONS:
        with pytest.raises((ShmQueueRuntimeError, IndexError, TypeError, ValueError, AttributeError)):
            operation(array)
    for operation in (float, pickle.dumps, lambda array: array + 1, lambda array: array == 0):
        with pytest.raises(ShmQueueRuntimeError, match="is over"):
            operation(array)
    return "is over" in repr(array)


def is_released(view: memoryview) -> bool:
    with pytest.raises(ValueError, match="released"):
        view[0]
    return True


def fill(q: ShmQueue[Any]) -> None:
    """Use all of the ring that is free, so that what was freed is somebody else's now."""
    q.put(b"\xff" * (SIZE - q.buffer_occupancy() - SIZE_HEADER - 5))
    assert q.full()


# ---- reserve


@pytest.mark.parametrize("size", [0, 1, 255, 256, 5000, 70_000])
def test_reserved_bytes_arrive_as_put_would_have_them(q: ShmQueue[Any], size: int) -> None:
    data = os.urandom(size)
    with q.reserve(size) as buffer:
        assert (len(buffer), buffer.readonly, buffer.format) == (size, False, "B")
        buffer[:] = data
        assert (q.qsize(), q.buffer_occupancy()) == (0, SIZE_HEADER + len(msgpack.packb(data)))
    assert (q.qsize(), q.buffer_occupancy()) == (1, SIZE_HEADER + len(msgpack.packb(data)))
    got = q.get_nowait()
    assert type(got) is bytes
    assert got == data


@pytest.mark.parametrize(
    ("shape", "dtype", "order"),
    [
        (3, float, "C"), ((100, 500), "u4", "C"), ([7, 5, 3], "f4", "F"), ((), "i8", "C"), ((0, 4), "u1", "C"),
        (20_000, "M8[ns]", "C"), (5, [("a", "u1"), ("b", "f8", 3)], "C"), ((200, 200), "c16", "F"),
    ],
)  # fmt: skip
def test_reserved_arrays_arrive_as_put_would_have_them(q: ShmQueue[Any], shape: Any, dtype: Any, order: Any) -> None:
    like: Any = np.zeros(shape, dtype, order)
    like.reshape(-1, order="A").view("u1")[:] = np.arange(like.nbytes) % 251
    with q.reserve_array(shape, dtype, order) as array:
        assert (array.shape, array.dtype, array.flags.f_contiguous) == (like.shape, like.dtype, like.flags.f_contiguous)
        assert array.flags.writeable
        assert array.flags.aligned
        assert array.size == 0 or array.ctypes.data % 64 == 0
        array[...] = like
    got = q.get_nowait()
    assert (type(got), got.dtype, got.flags.f_contiguous) == (np.ndarray, like.dtype, like.flags.f_contiguous)
    assert got.tobytes("A") == like.tobytes("A")
    assert q.buffer_occupancy() == 0


def test_an_exception_abandons(q: ShmQueue[Any]) -> None:
    for reserve in (q.reserve, q.reserve_array):
        room = reserve(100)
        with pytest.raises(ZeroDivisionError), room:
            1 / 0  # noqa: B018
        assert (q.qsize(), q.buffer_occupancy(), room.is_over) == (0, 0, True)


def test_by_hand_and_only_once(q: ShmQueue[Any]) -> None:
    room = q.reserve(3)
    room.buffer[:] = b"abc"
    assert repr(room) == f"<Reservation of queue {q.identifier!r}>"
    assert isinstance(room, Reservation)
    room.commit()
    assert room.is_over
    assert repr(room).endswith(", over>")
    for use in (room.commit, room.abandon, room.__enter__, lambda: room.buffer):
        with pytest.raises(ShmQueueRuntimeError, match=f"{q.identifier}.*over"):
            use()
    assert q.get_nowait() == b"abc"
    q.reserve(3).abandon()
    assert (q.qsize(), q.buffer_occupancy()) == (0, 0)
    with q.reserve(1) as buffer, q.reserve(1) as other:
        buffer[0], other[0] = 1, 2
    assert q.get_many() == [b"\x01", b"\x02"]


def test_its_place_is_that_of_the_call_and_later_items_do_not_wait(q: ShmQueue[Any]) -> None:
    q.put("first")
    room = q.reserve(1)
    q.put_many(["later", "latest"])
    assert q.get_many(2) == ["first", "later"]
    room.buffer[0] = 7
    room.commit()
    assert q.get_many() == [b"\x07", "latest"]


def test_a_forgotten_one_is_abandoned(q: ShmQueue[Any]) -> None:
    room = q.reserve_array(100)
    assert q.buffer_occupancy() > 0
    del room
    assert q.buffer_occupancy() == 0


def test_what_cannot_be_reserved(q: ShmQueue[Any], queue_name: str) -> None:
    with pytest.raises(ShmQueueValueError, match=f"{queue_name}.*takes"):
        q.reserve(SIZE)
    with pytest.raises(ShmQueueValueError, match="takes"):
        q.reserve_array(SIZE)
    with pytest.raises(ShmQueueValueError, match="4 GiB"):
        q.reserve(1 << 33)
    with pytest.raises(ShmQueueValueError, match="nbytes is -1"):
        q.reserve(-1)
    bad: Any = "3"
    with pytest.raises(ShmQueueTypeError, match="nbytes"):
        q.reserve(bad)
    with pytest.raises(ShmQueueSerializationError, match=f"{queue_name}.*objects"):
        q.reserve_array(3, object)
    with pytest.raises(ShmQueueTypeError, match=f"{queue_name}.*no type"):
        q.reserve_array(3, "no type")
    with pytest.raises(ShmQueueValueError, match=f"{queue_name}.*negative"):
        q.reserve_array((2, -3))
    with pytest.raises(ShmQueueValueError, match="order"):
        q.reserve_array(3, order=bad)
    with pytest.raises(ShmQueueTypeError, match="shape"):
        q.reserve_array(bad)
    with pytest.raises(ShmQueueSerializationError, match="no bytes"):
        q.reserve_array(3, "V0")
    with pytest.raises(ShmQueueValueError, match="4 GiB"):
        q.reserve_array(10**12)
    with pytest.raises(ShmQueueValueError, match="4 GiB"):
        q.reserve_array((10**12, 10**12))
    with ShmQueue[Any](queue_name, allow_pickle=False) as plain:
        with pytest.raises(ShmQueueSerializationError, match="allow_pickle"):
            plain.reserve_array(3)
        plain.reserve(3).abandon()
    assert q.buffer_occupancy() == 0


def test_timeouts_are_those_of_put(q: ShmQueue[Any]) -> None:
    fill(q)
    for options in ({"block": False}, {"timeout": 0}, {"timeout": 0.05}):
        start = time.monotonic()
        with pytest.raises(ShmQueueFull, match="no room for 111 bytes"):
            q.reserve(101, **options)
        assert time.monotonic() - start >= options.get("timeout", 0)
    with pytest.raises(ValueError, match="timeout"):
        q.reserve(1, timeout=-1)


def test_what_is_in_hand_is_in_the_message_of_a_full_queue(q: ShmQueue[Any]) -> None:
    room = q.reserve(SIZE - 1000)
    with pytest.raises(ShmQueueFull, match=r"no room for 2011 bytes \(\d+ of 1048576 bytes in use; all of.*reserved"):
        q.put(bytes(2000), block=False)
    room.commit()
    with pytest.raises(ShmQueueFull, match=r"in use\)"):
        q.put(bytes(2000), block=False)
    with q.lease(copy=False), pytest.raises(ShmQueueFull, match=f"in use; {q.buffer_occupancy()} of them.*lease"):
        q.put(bytes(2000), block=False)


def test_a_waiting_one_gets_the_room_of_what_is_taken(q: ShmQueue[Any]) -> None:
    fill(q)
    timer = threading.Timer(0.1, q.get_nowait)
    timer.start()
    with q.reserve(1000, timeout=10) as buffer:
        buffer[:] = bytes(1000)
    timer.join()
    assert q.get_nowait() == bytes(1000)


def test_as_many_as_the_table_holds_and_then_full(q: ShmQueue[Any]) -> None:
    rooms = [q.reserve(1) for _ in range(128)]
    with pytest.raises(ShmQueueFull, match=r"128 reservations are open.*yet"):
        q.reserve(1, block=False)
    with pytest.raises(ShmQueueFull, match=r"128 reservations.*within 0.05 s"):
        q.reserve(1, timeout=0.05)
    q.put("goes on")
    rooms.pop().commit()
    rooms.append(q.reserve(1, timeout=5))
    del rooms
    assert q.get_many(2) == ["goes on"] or q.qsize() == 0


def test_a_killed_process_never_put_what_it_reserved(q: ShmQueue[Any], queue_name: str) -> None:
    code = (
        "import os, signal, sys; from shmqueue import ShmQueue\n"
        "q = ShmQueue(sys.argv[1]); q.put('before'); room = q.reserve(5000); q.put('after')\n"
        "room.buffer[:] = bytes(5000); os.kill(os.getpid(), signal.SIGKILL)"
    )
    process = subprocess.run([sys.executable, "-c", code, queue_name], check=False)
    assert process.returncode == -signal.SIGKILL
    assert [q.get(timeout=5), q.get(timeout=5)] == ["before", "after"]
    with pytest.raises(Exception, match="no item"):
        q.get(timeout=0.1)
    assert q.buffer_occupancy() == 0


def test_a_forked_child_does_not_end_its_parents_reservation(q: ShmQueue[Any]) -> None:
    room = q.reserve(1)
    pid = os.fork()
    if pid == 0:
        try:
            for use in (room.commit, room.abandon, lambda: room.buffer):
                with pytest.raises(ShmQueueRuntimeError, match="parent"):
                    use()
            room.__exit__(None, None, None)
            del room
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    room.buffer[0] = 9
    room.commit()
    assert q.get_many() == [b"\x09"]


def test_shutdown_leaves_a_reservation_its_attachment(q: ShmQueue[Any], queue_name: str) -> None:
    other = ShmQueue[Any](queue_name)
    room = other.reserve(2)
    other.shutdown()
    with pytest.raises(ShmQueueNotInitializedError):
        other.reserve(2)
    assert q.refs == 2
    room.buffer[:] = b"ab"
    room.commit()
    assert (q.refs, q.get_nowait()) == (1, b"ab")


# ---- when a reservation is over


def test_the_buffer_is_released_and_arrays_made_of_it_are_unusable(q: ShmQueue[Any]) -> None:
    with q.reserve(IMAGE.nbytes) as buffer:
        part = buffer[10:20]
        array = np.frombuffer(buffer, IMAGE.dtype).reshape(IMAGE.shape)
        row = array[3]
        array[...] = IMAGE
    assert is_released(buffer)
    assert is_released(part)
    assert is_unusable(array)
    assert is_unusable(row)
    assert q.get_nowait() == IMAGE.tobytes()


def test_a_reserved_array_and_its_slices_are_unusable(q: ShmQueue[Any]) -> None:
    with q.reserve_array(IMAGE.shape, IMAGE.dtype) as array:
        top = array[:50]
        turned = array.T
        array[...] = IMAGE
    assert all(is_unusable(a) for a in (array, top, turned))
    assert (q.get_nowait() == IMAGE).all()


def test_what_could_still_write_there_is_an_error_and_nothing_is_put(q: ShmQueue[Any]) -> None:
    kept = SimpleNamespace()  # whose references aren't looked for
    with (
        pytest.raises(ShmQueueRuntimeError, match=f"{q.identifier}.*nothing was put.*shows"),
        q.reserve_array(IMAGE.shape, IMAGE.dtype) as array,
    ):
        kept.it = memoryview(array)  # has the array's address
    occupancy = q.buffer_occupancy()
    assert q.qsize() == 0
    assert occupancy > IMAGE.nbytes  # nobody else gets the memory
    fill(q)
    kept.it[0, 0] = 1
    assert q.get_nowait() == b"\xff" * (SIZE - occupancy - SIZE_HEADER - 5)
    del array
    del kept.it
    assert q.buffer_occupancy() == 0


# ---- lease(copy=False)


def test_large_buffers_are_views_of_the_ring(q: ShmQueue[Any]) -> None:
    q.put({"image": IMAGE, "nested": [IMAGE[0], {"t": 1.5}]})
    with q.lease(copy=False) as item:
        assert (item["image"] == IMAGE).all()
        assert (item["nested"][0] == IMAGE[0]).all()
        assert item["nested"][1] == {"t": 1.5}
        assert not item["image"].flags.writeable
        assert item["image"].ctypes.data % 64 == 0
        assert not item["image"].flags.owndata
    assert q.buffer_occupancy() == 0
    assert is_unusable(item["image"])
    assert (item["nested"][0] == IMAGE[0]).all()  # too small to be worth it: a copy


@pytest.mark.parametrize("size", [0, 10, 300, 70_000])
def test_bytes_are_a_memoryview_of_the_ring(q: ShmQueue[Any], size: int) -> None:
    data = os.urandom(size)
    q.put(data)
    with q.lease(copy=False) as item:
        assert (type(item), item.readonly, bytes(item)) == (memoryview, True, data)
        part = item[1:3]
    assert q.buffer_occupancy() == 0
    with pytest.raises(ValueError, match="released"):
        len(item)
    with pytest.raises(ValueError, match="released"):
        len(part)


@pytest.mark.parametrize("item", [None, 5, "text", [1, "a"], {"a": {"b": 1.5}}, (1, 2), {3}, 2**70])
def test_everything_else_is_decoded_from_the_ring(q: ShmQueue[Any], item: Any) -> None:
    q.put(item)
    expected = q.get_nowait()
    q.put(item)
    with q.lease(copy=False) as got:
        assert got == expected
    assert (got, q.buffer_occupancy()) == (expected, 0)


def test_what_is_unusable_is_not_put(q: ShmQueue[Any]) -> None:
    q.put(IMAGE)
    with q.lease(copy=False) as item:
        pass
    with pytest.raises(ShmQueueSerializationError, match="is over"):
        q.put({"image": item})
    assert q.empty()


def test_an_exception_gives_back(q: ShmQueue[Any]) -> None:
    q.put(IMAGE)
    with pytest.raises(ZeroDivisionError), q.lease(copy=False) as item:
        1 / 0  # noqa: B018
    assert is_unusable(item)
    with q.lease(copy=False) as item:
        assert (item == IMAGE).all()


def refuse(array: Any, depth: int = 3) -> None:
    half = array[50:]
    if depth:
        refuse(half[10:], depth - 1)
    raise ValueError(f"no good: {array.shape}")


@pytest.mark.parametrize("kind", ["with", "finally", "context"])
def test_an_exception_of_a_function_that_has_the_view_gives_back(queue_name: str, kind: str) -> None:
    with ShmQueue[Any](queue_name, buffer_size=IMAGE.nbytes + 4096) as q:
        q.put(IMAGE)
        for _ in range(3):
            with pytest.raises((ValueError, KeyError)):  # noqa: PT012
                if kind == "with":
                    with q.lease(copy=False, block=False) as item:
                        refuse(item)
                elif kind == "context":
                    with q.lease(copy=False, block=False) as item:
                        try:
                            refuse(item)
                        except ValueError:
                            raise KeyError from None
                else:
                    lease = q.lease(copy=False, block=False)
                    item = lease.item
                    try:
                        refuse(item)
                    finally:
                        lease.give_back()
            assert is_unusable(item)
            assert q.qsize() == 1
        assert (q.get_nowait() == IMAGE).all()
        for _ in range(3):
            with pytest.raises(ValueError, match="no good"), q.reserve_array(IMAGE.shape, "u4", block=False) as item:
                refuse(item)
            assert q.buffer_occupancy() == 0


def test_exceptions_that_pass_a_frame_twice_and_hidden_references(q: ShmQueue[Any]) -> None:
    """Each frame counts once, though the traceback has it several times."""
    kept = SimpleNamespace()

    def work(array: Any) -> None:
        kept.it = array
        try:
            refuse(array)
        except ValueError as error:
            raise error

    q.put(IMAGE)
    with pytest.raises(ValueError, match="no good"), q.lease(copy=False) as item:  # noqa: PT012
        try:
            work(item)
        except ValueError as error:
            raise error
    fill(q)
    assert (kept.it == IMAGE).all()
    assert (item == IMAGE).all()


class Calls:
    """Calls a function while a function in C reads it."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self.function = function

    def __array__(self, *_: Any, **__: Any) -> Any:
        self.function()
        return np.arange(5000, dtype="u1")


@pytest.mark.parametrize("way", ["method", "arguments", "method in a list"])
def test_a_call_in_c_may_have_the_address_and_no_reference(q: ShmQueue[Any], way: str) -> None:
    room = q.reserve_array(200_000, "u1")
    occupancy = []

    def end() -> None:
        room.abandon()
        occupancy.append(q.buffer_occupancy())

    put, arguments = room.buffer.put, (room.buffer, np.arange(5000), Calls(end))
    if way == "method":
        put(*arguments[1:])
    elif way == "arguments":
        np.ndarray.put(*arguments)
    else:
        methods = [put]
        methods[0](*arguments[1:])
    assert occupancy[0] > 200_000
    del put, arguments
    if way == "method in a list":
        del methods
    assert q.buffer_occupancy() == 0


def addresses(array: Any) -> Any:
    """What goes on showing an array's bytes, and has no reference to the array itself."""
    return np.nditer(array, flags=["external_loop"])


def test_a_shared_variable_that_is_also_a_comprehensions(q: ShmQueue[Any]) -> None:
    q.put(IMAGE)
    lease = q.lease(copy=False)
    x = lease.item
    shown = addresses(x)

    def inner() -> None:
        assert x is not None
        [x for x in ()]  # noqa: C416
        lease.release()

    inner()
    fill(q)
    assert (shown.value == IMAGE.reshape(-1)).all()


def test_copies_of_variables_that_are_renewed(q: ShmQueue[Any]) -> None:
    q.put(IMAGE)

    def inner(lease: Any, _: Any) -> None:
        lease.release()

    def outer() -> Any:
        lease = q.lease(copy=False)
        x = lease.item
        copies = locals()
        shown = addresses(x)
        x = None
        inner(lease, copies)
        return shown

    shown = outer()
    fill(q)
    assert (shown.value == IMAGE.reshape(-1)).all()


class Foreign:
    """The base of an array; runs a function when it is freed."""

    def __init__(self, array: Any, function: Callable[[], Any]) -> None:
        self.__array_interface__ = array.__array_interface__
        self.array, self.function = array, function

    def __del__(self) -> None:
        self.function()


def test_what_is_freed_in_the_end_may_take_references(q: ShmQueue[Any]) -> None:
    q.put(IMAGE)
    shown = []
    lease = q.lease(copy=False)

    def steal() -> None:
        if arrays:
            array, arrays[0] = arrays[0], None
            with contextlib.suppress(TypeError):  # it is unusable by now
                shown.append(addresses(array))

    arrays = [lease.item[10:], np.asarray(Foreign(lease.item, steal))]
    lease.release()
    fill(q)
    for one in shown:
        assert (one.value == IMAGE[10:].reshape(-1)).all()
    arrays.clear()
    shown.clear()


class Wrapper:
    def __init__(self, array: Any) -> None:
        self.array = array

    @property
    def __array_interface__(self) -> Any:
        return self.array.__array_interface__


def from_wrapper(array: Any, kept: Any) -> Any:
    wrapper = Wrapper(array)
    kept.it = np.asarray(wrapper)
    return wrapper


def from_ctypes(array: Any, kept: Any) -> Any:
    kept.it = (ctypes.c_uint32 * array.size).from_buffer(array)
    return kept.it._objects


RELIED_ON: list[Callable[[Any, Any], Any]] = [
    from_wrapper, from_ctypes, lambda array, kept: [from_wrapper(array, kept)],
    lambda array, kept: {"a": (from_ctypes(array, kept),)}, lambda array, kept: Frame(from_wrapper(array, kept), 1.5),
]  # fmt: skip


@pytest.mark.parametrize("make", RELIED_ON)
def test_who_has_the_address_may_rely_on_a_container(q: ShmQueue[Any], make: Callable[[Any, Any], Any]) -> None:
    kept = SimpleNamespace()
    with (  # noqa: PT012
        pytest.raises(ShmQueueRuntimeError, match="nothing was put"),
        q.reserve_array(IMAGE.shape, IMAGE.dtype) as item,
    ):
        item[...] = IMAGE
        container = make(item, kept)
    fill(q)
    assert (np.asarray(kept.it).reshape(-1) == IMAGE.reshape(-1)).all()
    assert container is not None
    q.get_nowait()
    del item, container, kept
    gc.collect()
    assert q.buffer_occupancy() == 0


def test_numpys_own_objects_that_keep_an_address(q: ShmQueue[Any]) -> None:
    q.put(IMAGE)
    with q.lease(copy=False) as item:
        c = item.ctypes
    fill(q)
    assert c.data_as(ctypes.POINTER(ctypes.c_uint32))[1] == 1


@pytest.mark.parametrize("is_apart", [False, True])
def test_copies_of_variables_that_free_each_other(q: ShmQueue[Any], is_apart: bool) -> None:
    q.put(IMAGE)

    def outer() -> Any:
        lease = q.lease(copy=False)
        x = lease.item
        shown = addresses(x)

        class Dying:
            def __del__(self) -> None:
                nonlocal x
                x = None

        dying: Any = Dying()

        def other() -> Any:
            return dying, x

        def end() -> None:
            assert other is not None
            if is_apart:
                assert x is None or x is not None
            lease.release()

        locals()
        dying = None
        end() if is_apart else lease.release()
        return shown

    shown = outer()
    fill(q)
    assert (shown.value == IMAGE.reshape(-1)).all()


def test_variables_of_another_thread_that_is_traced_survive(q: ShmQueue[Any]) -> None:
    q.put(IMAGE)
    lease = q.lease(copy=False)
    kept = SimpleNamespace(it=addresses(lease.item))
    stopped, go_on = threading.Event(), threading.Event()
    errors: list[Exception] = []
    totals: list[int] = []

    def work(number: int) -> None:
        other = number + 1
        try:
            raise ValueError
        except ValueError as error:
            errors.append(error)
        third = other + 1
        totals.append(number + other + third)

    def trace(frame: Any, event: str, _: Any) -> Any:
        if frame.f_code is work.__code__ and event == "line" and errors and not stopped.is_set():
            stopped.set()
            go_on.wait(30)
        return trace

    def run() -> None:
        sys.settrace(trace)
        try:
            work(5)
        finally:
            sys.settrace(None)

    thread = threading.Thread(target=run)
    thread.start()
    assert stopped.wait(30)
    try:
        raise errors[0]
    except ValueError:
        lease.release()
    go_on.set()
    thread.join()
    assert totals == [5 + 6 + 7]
    del kept


def test_garbage_collection_stays_off_if_somebody_turns_it_off(q: ShmQueue[Any]) -> None:
    q.put(IMAGE)
    lease = q.lease(copy=False)
    array = np.asarray(Foreign(lease.item, gc.disable))
    try:
        lease.release()
        assert is_unusable(array)
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_variables_survive_a_tracer_that_ends_a_lease(q: ShmQueue[Any]) -> None:
    q.put(IMAGE)
    leases = [q.lease(copy=False)]

    def trace(frame: Any, event: str, _: Any) -> Any:
        if event == "line" and leases and frame.f_code is traced.__code__:
            leases.pop().release()
        return trace

    def traced(number: int) -> int:
        other = number + 1
        third = other + 1
        return number + other + third

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        total = traced(5)
    finally:
        sys.settrace(before)
    assert total == 5 + 6 + 7
    assert leases == []
    assert q.buffer_occupancy() == 0


@pytest.mark.skipif(sys.version_info >= (3, 13), reason="exec() in a function sets no variables any more")
def test_variables_that_exec_made_stay(q: ShmQueue[Any]) -> None:
    exec("made = 5")
    q.put(IMAGE)
    with q.lease(copy=False) as item:
        assert item is not None
    assert eval("made") == 5


def test_a_lease_that_a_bare_thread_ends(q: ShmQueue[Any]) -> None:
    q.put(IMAGE)
    lease = q.lease(copy=False)
    _thread.start_new_thread(lease.release, ())
    deadline = time.monotonic() + 10
    while q.buffer_occupancy() and time.monotonic() < deadline:
        time.sleep(0.001)
    assert (lease.is_over, q.buffer_occupancy()) == (True, 0)
    with pytest.raises(ShmQueueRuntimeError, match="over"):
        lease.item  # noqa: B018


def test_what_still_shows_an_item_is_told_once(q: ShmQueue[Any], caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        q.put(IMAGE)
        with q.lease(copy=False) as item:
            pass
    assert caplog.records == []
    for _ in range(2):
        q.put(IMAGE)
        with q.lease(copy=False) as item:
            kept = SimpleNamespace(it=item)
        del kept
    assert len(caplog.records) == 1
    assert f"{q.identifier}" in caplog.text
    assert f"{IMAGE.nbytes}"[:3] in caplog.text


def test_the_lease_by_hand(q: ShmQueue[Any]) -> None:
    q.put(IMAGE)
    lease = q.lease(copy=False)
    assert (lease.item == IMAGE).all()
    lease.release()
    assert (lease.is_over, q.buffer_occupancy()) == (True, 0)
    with pytest.raises(ShmQueueRuntimeError, match="over"):
        lease.item  # noqa: B018
    assert "over" in repr(lease)


def test_a_forgotten_one_is_given_back(q: ShmQueue[Any]) -> None:
    q.put(IMAGE)
    lease = q.lease(copy=False)
    item = lease.item
    del lease
    assert (item == IMAGE).all()  # still its own
    assert q.qsize() == 0
    del item
    assert (q.qsize(), (q.get_nowait() == IMAGE).all()) == (1, True)


@dataclasses.dataclass
class Frame:
    image: Any
    t: float


def test_arrays_in_objects_are_found(q: ShmQueue[Any]) -> None:
    q.put([Frame(IMAGE, 1.5), {"a": (IMAGE, IMAGE + 1)}])
    with q.lease(copy=False) as item:
        assert (item[0].image == IMAGE).all()
        assert (item[1]["a"][1] == IMAGE + 1).all()
    assert q.buffer_occupancy() == 0
    assert is_unusable(item[0].image)
    assert is_unusable(item[1]["a"][0])


class Pair(NamedTuple):
    image: Any
    t: float


@dataclasses.dataclass
class Slotted:
    __slots__ = ("image",)
    image: Any


@dataclasses.dataclass(frozen=True, eq=False)
class Frozen:
    image: Any


class Frames(list[Any]):
    pass


CONTAINERS: list[Callable[[Any], Any]] = [
    lambda array: [array], lambda array: (array, [array]), lambda array: {"a": array, "b": {1: array}},
    lambda array: Frame(array, 1.5), lambda array: Pair(array, 1.5), Slotted, lambda array: Frames([array]),
    lambda array: deque([array], maxlen=3), lambda array: OrderedDict(a=array),
    lambda array: defaultdict(list, {1: [array]}), lambda array: [array[1:], array[2:].sum], lambda array: array.mean,
    lambda array: [Frame([Pair([Slotted(array)], 1.5)], 1.5)], lambda array: [[array]] * 10,
    lambda array: deque([{"observation": i, "info": [i]} for i in range(1000)] + [{"observation": array}]),
    lambda array: [None] * 20_000 + [array], lambda array: [array[i % 90 :] for i in range(2000)],
    lambda array: {Frozen(array)}, lambda array: (lambda: array), lambda array: (lambda x=array: x),
]  # fmt: skip


@pytest.mark.parametrize("contain", CONTAINERS)
def test_containers_of_all_kinds_are_looked_into(q: ShmQueue[Any], contain: Callable[[Any], Any]) -> None:
    q.put(IMAGE)
    with q.lease(copy=False) as item:
        container = contain(item)
    assert q.buffer_occupancy() == 0
    assert is_unusable(item)
    assert container is not None


def test_variables_that_functions_share_are_found(q: ShmQueue[Any]) -> None:
    q.put(IMAGE)
    with q.lease(copy=False) as item:
        rows = [item[i] for i in range(100)]  # before CPython 3.12, this is a function
        assert sum(1 for i in range(100) if (item[i] == IMAGE[i]).all()) == 100
        later = lambda: item  # noqa: E731
    assert q.buffer_occupancy() == 0
    assert is_unusable(later())
    assert is_unusable(rows[7])


def test_what_functions_share_with_a_reservation(q: ShmQueue[Any]) -> None:
    def fill(room: Any) -> list[Any]:
        with room as array:
            return [array[i].fill(i) for i in range(3)]

    fill(q.reserve_array((3, 5)))
    assert q.get_nowait()[:, 1].tolist() == [0, 1, 2]


def test_an_argument_that_functions_share(q: ShmQueue[Any]) -> None:
    def end(array: Any, lease: Any) -> Callable[[], Any]:
        array = array[50:]  # CPython 3.10 has what was passed on its caller's stack too
        lease.release()
        return lambda: array

    q.put(IMAGE)
    lease = q.lease(copy=False)
    later = end(lease.item, lease)
    assert q.buffer_occupancy() == 0
    assert is_unusable(later())


def test_two_functions_that_share_one_variable_beside_a_hidden_reference(q: ShmQueue[Any]) -> None:
    q.put(IMAGE)
    lease = q.lease(copy=False)
    image = lease.item
    kept = SimpleNamespace(it=image)

    def end() -> None:
        assert image is not None

        def really() -> None:
            assert image is not None
            lease.release()

        really()

    end()
    fill(q)
    assert (kept.it == IMAGE).all()


def test_variables_of_calling_functions_are_found(q: ShmQueue[Any]) -> None:
    q.put(IMAGE)
    lease = q.lease(copy=False)
    image = lease.item
    half = image[50:]

    def end() -> None:
        lease.release()

    end()
    assert q.buffer_occupancy() == 0
    assert is_unusable(image)
    assert is_unusable(half)


KEEP: list[Callable[[Any], Any]] = [
    memoryview,
    lambda array: array.flat,
    lambda array: iter(array),
    lambda array: [array],
    lambda array: np.nditer(array),
    lambda array: array.data,
    lambda array: np.asarray(memoryview(array)),
    lambda array: iter([array]),
    lambda array: array.ctypes,
    lambda array: array.view(np.recarray),
]


@pytest.mark.parametrize("keep", KEEP)
def test_what_has_the_address_in_another_way_goes_on_and_keeps_the_memory(
    q: ShmQueue[Any], keep: Callable[[Any], Any]
) -> None:
    q.put(IMAGE)
    kept = SimpleNamespace()  # whose references aren't looked for
    with q.lease(copy=False) as item:
        kept.it = keep(item)
        address = item.ctypes.data
    assert q.buffer_occupancy() > IMAGE.nbytes
    fill(q)
    assert np.ctypeslib.as_array((np.ctypeslib.ctypes.c_uint32 * 50_000).from_address(address)).tolist() == list(
        range(50_000)
    )
    q.get_nowait()
    del item
    del kept.it
    gc.collect()
    assert q.buffer_occupancy() == 0


def rest_on(array: Any) -> Any:
    """What an array's address is from in the end."""
    while type(array) is np.ndarray and array.base is not None:
        array = array.base
    return array


@pytest.mark.parametrize("by", ["variable", "hidden"])
def test_an_array_made_by_address_and_its_memoryview(q: ShmQueue[Any], by: str) -> None:
    q.put(bytes(range(200)))
    kept = SimpleNamespace()
    with q.lease(copy=False) as item:
        array: Any = np.ndarray((200,), "u1", buffer=item)
        if by == "hidden":
            kept.it = array
    fill(q)
    if by == "variable":
        assert is_unusable(array)
    else:
        assert (array == np.arange(200)).all()


def test_what_an_array_rests_on_is_not_released_under_it(q: ShmQueue[Any]) -> None:
    q.put(IMAGE)
    kept = SimpleNamespace()
    with q.lease(copy=False) as item:
        kept.it = item
        base = rest_on(item)
    fill(q)
    assert (kept.it == IMAGE).all()
    assert base.nbytes == IMAGE.nbytes


def test_a_variable_that_functions_share_is_one_reference(q: ShmQueue[Any]) -> None:
    q.put(IMAGE)
    lease = q.lease(copy=False)
    image = lease.item
    kept = SimpleNamespace(it=memoryview(image))

    def end() -> None:
        assert image.shape == IMAGE.shape
        lease.release()

    end()
    fill(q)
    assert (np.asarray(kept.it) == IMAGE).all()


def test_views_stored_in_the_item_itself(q: ShmQueue[Any]) -> None:
    q.put({"image": IMAGE})
    with q.lease(copy=False) as item:
        item["view"] = memoryview(item["image"])
        item["words"] = struct.iter_unpack("I", item["image"][0])
    fill(q)
    assert is_released(item["view"])
    assert [next(item["words"])[0] for _ in range(500)] == IMAGE[0].tolist()


def test_elements_of_an_iterator_that_is_closed(q: ShmQueue[Any]) -> None:
    with q.reserve_array((10, 10)) as array, np.nditer(array, op_flags=[["readwrite"]]) as iterator:
        for element in iterator:
            element[...] = 2
    assert is_unusable(element)
    assert (q.get_nowait() == 2).all()


def test_lists_of_rows_in_a_variable(q: ShmQueue[Any]) -> None:
    with q.reserve_array((10, 10)) as array:
        rows = list(array)
        for i, row in enumerate(rows):
            row[:] = i
    assert all(is_unusable(row) for row in rows)
    assert q.get_nowait()[7, 7] == 7


def test_at_module_level(q: ShmQueue[Any], queue_name: str) -> None:
    code = (
        "import sys, numpy; from shmqueue import ShmQueue\n"
        "q = ShmQueue(sys.argv[1])\n"
        "with q.reserve(100) as buffer:\n"
        "    array = numpy.frombuffer(buffer, 'u1'); half = array[:50]; array[:] = 7\n"
        "print(half)"
    )
    done = subprocess.run([sys.executable, "-c", code, queue_name], check=True, capture_output=True, text=True)
    assert "over" in done.stdout
    assert q.get_nowait() == b"\x07" * 100


def test_locals_that_the_program_has_stay(q: ShmQueue[Any]) -> None:
    number = 5
    found = locals()
    q.put(IMAGE)
    with q.lease(copy=False):
        pass
    assert found["number"] == number
    assert found["q"] is q


def test_threads_that_end_and_enter_one_lease(q: ShmQueue[Any]) -> None:
    for _ in range(200):
        q.put(IMAGE)
        lease = q.lease(copy=False)

        def enter(lease: Any = lease) -> None:
            with contextlib.suppress(ShmQueueRuntimeError):
                while True:
                    lease.__enter__()

        thread = threading.Thread(target=enter)
        thread.start()
        lease.release()
        thread.join()
    del thread, enter
    assert q.buffer_occupancy() == 0


def test_a_forked_childs_views_show_and_write_nothing(q: ShmQueue[Any]) -> None:
    q.put(IMAGE)
    lease, room = q.lease(copy=False), q.reserve(5000)
    item, buffer = lease.item, room.buffer
    pid = os.fork()
    if pid == 0:
        try:
            assert not item.any()
            buffer[:] = b"C" * 5000
            q.put("from the child")
            lease.__exit__(None, None, None)
            q.shutdown()
            assert not item.any()
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert (item == IMAGE).all()
    lease.release()
    room.commit()
    assert q.get_many() == [bytes(5000), "from the child"]


def test_errors_that_are_kept_keep_no_memory(q: ShmQueue[Any]) -> None:
    q.custom_serialize(lambda method, data: data)
    q.put(b"abc", serialization_method=1001)
    with pytest.raises(NotImplementedError) as info:
        q.lease(copy=False)
    assert q.buffer_occupancy() == 0
    assert vars(info.value)["payload"] == b"abc"


def test_cycles_are_collected(q: ShmQueue[Any], queue_name: str) -> None:
    other = ShmQueue[Any](queue_name)
    vars(other)["room"] = other.reserve(100)
    del other
    gc.collect()
    assert (q.refs, q.buffer_occupancy()) == (1, 0)


def test_slices_that_are_kept_elsewhere_go_on_and_keep_the_memory(q: ShmQueue[Any]) -> None:
    q.put(IMAGE)
    kept = SimpleNamespace()  # whose references aren't looked for
    with q.lease(copy=False) as item:
        kept.it = item[7]
    assert is_unusable(item)
    fill(q)
    assert (kept.it == IMAGE[7]).all()
    q.get_nowait()
    assert q.buffer_occupancy() > 0
    del kept.it
    assert q.buffer_occupancy() == 0


def test_a_loop_needs_room_for_no_more_than_one_item(queue_name: str) -> None:
    with ShmQueue[Any](queue_name, buffer_size=IMAGE.nbytes + 4096) as q:
        for i in range(20):
            q.put(IMAGE + i, block=False)
            with q.lease(copy=False, block=False) as item:
                assert (item == IMAGE + i).all()


def test_views_outlive_shutdown(queue_name: str) -> None:
    with ShmQueue[Any](queue_name, buffer_size=SIZE) as other:
        q = ShmQueue[Any](queue_name)
        q.put_many([IMAGE, b"abc"])
        kept = SimpleNamespace()  # whose references aren't looked for
        lease, second = q.lease(copy=False), q.lease(copy=False)
        kept.it = lease.item[5]
        q.shutdown()
        lease.release()
        second.give_back()
        assert (kept.it == IMAGE[5]).all()
        assert other.refs == 2  # the view holds its memory, its place and the record
        del kept.it
        assert (other.refs, other.get_nowait(), other.buffer_occupancy()) == (1, b"abc", 0)


def test_a_killed_holder_gives_back(q: ShmQueue[Any], queue_name: str) -> None:
    q.put(IMAGE)
    code = (
        "import os, signal, sys; from shmqueue import ShmQueue\n"
        "q = ShmQueue(sys.argv[1]); item = q.lease(copy=False).item; os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code, queue_name], check=False).returncode == -signal.SIGKILL
    with q.lease(timeout=5, copy=False) as item:
        assert (item == IMAGE).all()


def test_custom_deserializers_get_the_ring_itself(q: ShmQueue[Any]) -> None:
    seen = []

    def deserialize(method: int, chunks: list[memoryview]) -> int:
        seen.extend(chunks)
        assert chunks[0].readonly
        return len(chunks[0])

    q.custom_serialize(lambda method, data: data)
    q.custom_deserialize(deserialize)
    q.put(bytes(100_000), serialization_method=1001)
    with q.lease(copy=False) as item:
        assert item == 100_000
        assert is_released(seen[0])
    assert q.buffer_occupancy() == 0


def test_what_cannot_be_decoded_is_in_the_error_and_off_the_queue(q: ShmQueue[Any]) -> None:
    q.custom_serialize(lambda method, data: data)
    q.put(b"abc", serialization_method=1001)
    with pytest.raises(NotImplementedError) as info:
        q.lease(copy=False)
    assert vars(info.value)["payload"] == b"abc"
    del info
    gc.collect()
    assert (q.qsize(), q.buffer_occupancy()) == (0, 0)


def test_many_in_place_between_processes(q: ShmQueue[Any], queue_name: str) -> None:
    count, shape = 300, (40, 1000)
    code = (
        "import sys; from shmqueue import ShmQueue\n"
        "q = ShmQueue(sys.argv[1])\n"
        f"for i in range({count}):\n"
        f"    with q.reserve_array({shape}, 'u4', timeout=30) as array: array[...] = i"
    )
    process = subprocess.Popen([sys.executable, "-c", code, queue_name])
    for i in range(count):
        with q.lease(timeout=30, copy=False) as array:
            assert array.shape == shape
            assert array.min() == array.max() == i
    assert process.wait(30) == 0
    assert q.buffer_occupancy() == 0


# ---- torch, where it is installed


def test_tensors_go_like_arrays(q: ShmQueue[Any]) -> None:
    torch = pytest.importorskip("torch")
    tensor = torch.arange(100_000, dtype=torch.float32).reshape(100, 1000)
    q.put({"tensor": tensor, "row": tensor[1], "t": 1.5})
    assert q.buffer_occupancy() < 4 * 101_000 + 1000  # a row is no more than a row
    got = q.get()
    assert torch.equal(got["tensor"], tensor)
    assert torch.equal(got["row"], tensor[1])
    got["tensor"][0, 0] = 7  # it is the taker's own
    for odd in (tensor.T, tensor.to(torch.bfloat16), torch.zeros(3, requires_grad=True), torch.eye(3).to_sparse()):
        q.put(odd)
        back = q.get()
        assert (back.dtype, back.shape, back.requires_grad) == (odd.dtype, odd.shape, odd.requires_grad)
        assert torch.equal(back.to_dense(), odd.to_dense())
    q.put(tensor)
    with q.lease(copy=False) as leased:
        assert torch.equal(leased, tensor)
        assert q.buffer_occupancy() > tensor.nbytes
    kept = leased[5]
    assert torch.equal(kept, tensor[5])  # the record stays in hand as long as a tensor shows it
    assert q.buffer_occupancy() > tensor.nbytes
    del kept, leased
    assert q.buffer_occupancy() == 0


# ---- pages at hand


def shared_at_hand() -> int:
    """Bytes of shared memory that this process has at hand, by whatever mapping."""
    with open("/proc/self/status", encoding="ascii") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssShmem:"))


@pytest.mark.parametrize("prefault", [False, True])
def test_prefault_has_all_pages_at_hand(queue_name: str, prefault: bool) -> None:
    size, before = 8 << 20, shared_at_hand()
    with ShmQueue[Any](queue_name, buffer_size=size, prefault=prefault) as q:
        at_hand = shared_at_hand() - before
        assert at_hand >= 2 * size if prefault else at_hand < size
        q.put(1)
        assert q.get() == 1
