"""A run through the package in one process and several, for builds with sanitizers: no pytest, no timing.

PYTHONPATH=... python tests/smoke.py
"""

from __future__ import annotations

import itertools
import os
import pickle
import queue
import subprocess
import sys
import threading
from pathlib import Path

import shmqueue
from shmqueue import SerializationMethods, ShmQueue, exceptions

NAME = f"smoke.{os.getpid()}"
ITEMS = [None, True, -1, 2**64 - 1, 2**70, 1.5, "ü", b"\0", [1, [2]], {"a": {"b": []}}, {1, 2}, 1j]
PRODUCER = """
import sys, shmqueue
with shmqueue.ShmQueue(sys.argv[1]) as q:
    for i in range(int(sys.argv[2])):
        q.put([i, bytes(i % 3000)])
"""


def types_and_laps() -> None:
    with ShmQueue[object](NAME) as q:
        for item in ITEMS * 50:
            q.put(item)
            assert q.get() == item
        for size in range(0, q.max_buffer_size() - 16, 7):  # each offset, each way to wrap
            q.put(bytes(size))
            assert q.get_nowait() == bytes(size)
        assert q.put_many(range(200)) == 200
        assert q.get_many(7) + q.get_many() == list(range(200))


def big_items() -> None:
    with ShmQueue[bytes](NAME, buffer_size=8 << 20) as q:
        for _ in range(5):
            q.put(os.urandom(1) * (3 << 20))
            q.put(b"small")
            assert len(q.get()) == 3 << 20
            assert q.get() == b"small"


def items_in_place() -> None:
    with ShmQueue[object](NAME, buffer_size=1 << 20, prefault=True) as q:
        for size in (0, 1, 300, 5000, 100_000):
            for ends in range(4):
                room = q.reserve(size)
                part = memoryview(room.buffer)[: size // 2]
                part[:] = bytes(size // 2)
                room.buffer[size // 2 :] = bytes(size - size // 2)
                if ends == 0:
                    room.abandon()
                    continue
                del part
                room.commit()
                lease = q.lease(copy=False)
                view = lease.item
                kept = memoryview(view)
                assert bytes(kept) == bytes(size)
                if ends == 1:
                    lease.release()
                elif ends == 2:
                    lease.give_back()
                    assert q.get() == bytes(size)
                del lease, view, kept
                q.clear()
        with q.reserve(5000) as buffer:
            buffer[:] = bytes(5000)
            child = os.fork()
            if child == 0:
                buffer[:] = b"C" * 5000  # goes nowhere
                q.put("from the child")
                q.shutdown()
                os._exit(0)
            assert os.waitpid(child, 0)[1] == 0
        assert q.get_many(2) == [bytes(5000), "from the child"]


def arrays_in_place() -> None:
    try:
        import numpy
    except ImportError:
        return
    with ShmQueue[object](NAME, buffer_size=1 << 20) as q:
        for shape in ((50_000,), (100, 300, 2)):
            with q.reserve_array(shape, "f4") as array:
                rows, again = list(array), numpy.frombuffer(memoryview(array).cast("B"), "f4")
                array[:] = 1.5
            assert array.shape == again.shape == () == rows[0].shape
            q.put({"frames": [q.get(), numpy.ones(shape)], "t": 1})
            with q.lease(copy=False) as item:
                first, second = item["frames"]  # type: ignore[index]
                kept = iter(second)
                assert first.sum() * 2 == second.sum() * 3
            assert (first.shape, second.shape) == ((), shape)
            assert q.buffer_occupancy() > 0
            del kept, second, item
            assert q.buffer_occupancy() == 0


def refusals() -> None:
    with ShmQueue[object](NAME, allow_pickle=False) as q:
        for wrong, error in [
            (lambda: q.put(bytes(1 << 20)), ValueError),
            (lambda: q.put(1j), exceptions.ShmQueueSerializationError),
            (lambda: q.put(1, serialization_method=5000), NotImplementedError),
            (lambda: q.put(1, timeout=-1), ValueError),
            (lambda: q.get(timeout=0.01), queue.Empty),
            (lambda: q.put_many(itertools.repeat(b"x" * 100), block=False), queue.Full),
            (lambda: ShmQueue("no\0"), ValueError),
        ]:
            try:
                wrong()
            except error:
                continue
            raise AssertionError(f"no {error}")
        q.clear()
        assert q.empty()
    try:
        q.put(1)
    except exceptions.ShmQueueNotInitializedError:
        pass
    else:
        raise AssertionError("put after shutdown")


def custom_methods() -> None:
    with ShmQueue[int](NAME) as q:
        q.custom_serialize(lambda method, data: data.to_bytes(8, "big"))
        q.custom_deserialize(lambda method, chunks: int.from_bytes(b"".join(chunks), "big"))
        for i in range(1000):
            q.put(i, serialization_method=SerializationMethods.FIRST_PUBLIC_NUMBER + 1)
            assert q.get() == i


def threads_share_a_handle() -> None:
    with ShmQueue[int](NAME) as q:
        producers = [threading.Thread(target=lambda: [q.put(i) for i in range(500)]) for _ in range(3)]
        for producer in producers:
            producer.start()
        assert sum(q.get() for _ in range(1500)) == 3 * sum(range(500))
        for producer in producers:
            producer.join()


def other_processes() -> None:
    with ShmQueue[list[object]](NAME, buffer_size=1 << 14) as q:
        producers = [subprocess.Popen([sys.executable, "-c", PRODUCER, NAME, "300"]) for _ in range(2)]
        total = sum(len(bytes(q.get()[1])) for _ in range(600))  # type: ignore[call-overload]
        assert total == 2 * sum(range(300))
        assert [producer.wait() for producer in producers] == [0, 0]
        killed = subprocess.Popen([sys.executable, "-c", PRODUCER, NAME, "1000000"])
        q.get()
        killed.kill()
        killed.wait()
        while True:
            try:
                q.get(timeout=0.5)
            except queue.Empty:
                break
        q.put([])
        assert q.get() == []
        assert q.refs == 1


def forks_and_pickles() -> None:
    with ShmQueue[str](NAME) as q:
        child = os.fork()
        if child == 0:
            q.put("from the child")
            os._exit(0)
        assert q.get() == "from the child"
        os.waitpid(child, 0)
        with pickle.loads(pickle.dumps(q)) as copy:
            copy.put("from the copy")
        assert q.get() == "from the copy"


def main() -> None:
    for part in (
        types_and_laps,
        big_items,
        items_in_place,
        arrays_in_place,
        refusals,
        custom_methods,
        threads_share_a_handle,
        other_processes,
        forks_and_pickles,
    ):
        print(f"{part.__name__} ", end="", flush=True)
        part()
        assert not Path(f"/dev/shm/shmqueue.{NAME}").exists(), "a segment is left"
    print(f"ok: shmqueue {shmqueue.__version__} of {Path(shmqueue.__file__).parent}")


if __name__ == "__main__":
    main()
