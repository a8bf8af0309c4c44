"""A user's program for the type checkers, never run: the types that the queue promises."""

from __future__ import annotations

import queue
from collections.abc import Iterator

from typing_extensions import assert_type

import shmqueue
from shmqueue import DebugRefLogAction, Lease, SerializationMethods, ShmQueue, exceptions


def producer(jobs: ShmQueue[dict[str, int]]) -> None:
    jobs.put({"id": 1})
    jobs.put({"id": 2}, block=True, timeout=0.5)
    jobs.put({"id": 3}, serialization_method=SerializationMethods.PICKLE)
    jobs.put_nowait({"id": 4})
    assert_type(jobs.put_many(({"id": i} for i in range(9)), timeout=1), int)
    jobs.put("not a dict")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


def consumer(jobs: ShmQueue[dict[str, int]]) -> int:
    assert_type(jobs.get(), dict[str, int])
    assert_type(jobs.get(False), dict[str, int])
    assert_type(jobs.get_nowait(), dict[str, int])
    assert_type(jobs.get_many(10, timeout=0.1), list[dict[str, int]])
    return sum(job["id"] for job in jobs)


def worker(jobs: ShmQueue[dict[str, int]]) -> None:
    with jobs.lease(timeout=1) as job:
        assert_type(job, dict[str, int])
    lease = jobs.lease(block=False, max_deliveries=3)
    assert_type(lease, Lease[dict[str, int]])
    assert_type(lease.item, dict[str, int])
    if lease.deliveries > 1 and not lease.is_over:
        lease.give_back()


def status(jobs: ShmQueue[str]) -> tuple[int, bool, bool, int, int, int]:
    snapshot = jobs.snapshot()
    assert_type(snapshot.qsize, int)
    assert_type(snapshot.same_lap, int)
    return (
        jobs.qsize(),
        jobs.empty(),
        jobs.full(),
        jobs.buffer_occupancy(),
        jobs.max_buffer_size(),
        jobs.refs,
    )


def errors(jobs: ShmQueue[str]) -> Iterator[str]:
    try:
        jobs.put_many(["a", "b"], block=False)
    except exceptions.ShmQueueFull as error:
        assert_type(error.accepted, int)
        yield from error.remaining
    try:
        jobs.get_nowait()
    except exceptions.ShmQueueDeserializationError as error:
        assert_type(error.payload, bytes)
        assert_type(error.serialization_method, int)
    except queue.Empty:
        pass


def custom(jobs: ShmQueue[int]) -> None:
    def serialize(method: int, data: int) -> bytes:
        return data.to_bytes(method, "little")

    def deserialize(method: int, chunks: list[memoryview]) -> int:
        return int.from_bytes(chunks[0], "little", signed=method < 0)

    jobs.custom_serialize(serialize)
    jobs.custom_deserialize(deserialize)
    jobs.put(1, serialization_method=SerializationMethods.FIRST_PUBLIC_NUMBER + 1)


def main() -> None:
    untyped = ShmQueue("anything", allow_pickle=False)
    untyped.put({"what": ["ever", 1, None]})
    with ShmQueue[dict[str, int]]("jobs", buffer_size=16 * shmqueue.SYSTEM_PAGESIZE) as jobs:
        producer(jobs)
        assert_type(consumer(jobs), int)
        jobs.set_console_handlers(register_atexit=True)
    action: str = DebugRefLogAction.CREATE.value
    assert_type(shmqueue.SYSTEM_PAGESIZE, int)
    print(action, shmqueue.__version__)
