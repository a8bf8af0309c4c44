"""Memory: what a queue costs at rest, and that nothing stays behind of a million items."""

from __future__ import annotations

import gc
import os
import tracemalloc
from contextlib import ExitStack
from typing import Any

import numpy as np

from shmqueue import ShmQueue

ITEMS: list[Any] = [
    None, 7, 1.5, "text", b"bytes", b"\0" * 6000, [1, [2, {"a": 3}]], {"id": 1, "v": 1.5, "name": "sensor"}, (1, 2),
    {3, 4}, 2**70, {1: "one"}, "x" * 5000,
]  # fmt: skip
IMAGE = np.zeros(40_000, "u1")


def private_bytes() -> int:
    with open("/proc/self/status", encoding="ascii") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


def put_and_get_all(q: ShmQueue[Any], times: int) -> int:
    """In every way there is; how many items that were."""
    count = 0
    for i in range(times):
        for item in ITEMS:
            q.put(item)
            q.get()
        q.put_many(ITEMS)
        q.get_many()
        q.put_many(ITEMS)
        for _ in ITEMS:
            with q.lease(copy=bool(i % 2)):
                pass
        q.put(IMAGE)
        q.get()
        with q.reserve_array(IMAGE.shape, IMAGE.dtype) as array:
            array[:] = 1
        with q.lease(copy=False) as item:
            assert item[0] == 1
        with q.reserve(100) as buffer:
            buffer[0] = 1
        q.get()
        count += 3 * len(ITEMS) + 3
    return count


def test_a_million_mixed_items_leak_nothing(queue_name: str) -> None:
    with ShmQueue[Any](queue_name, buffer_size=1 << 18, prefault=True) as q:
        put_and_get_all(q, 300)
        gc.collect()
        before, count = private_bytes(), 0
        while count < 1_000_000:
            count += put_and_get_all(q, 1000)
        gc.collect()
        assert private_bytes() - before < 1 << 20  # a leak of two bytes per item would show


def test_python_objects_do_not_pile_up(queue_name: str) -> None:
    with ShmQueue[Any](queue_name, buffer_size=1 << 18) as q:
        put_and_get_all(q, 50)
        gc.collect()
        tracemalloc.start()
        try:
            put_and_get_all(q, 120)
            gc.collect()
            before, _ = tracemalloc.get_traced_memory()
            count = put_and_get_all(q, 400)
            gc.collect()
            after, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert count > 16_000
        assert after - before < 64 << 10  # CPython's caches of attribute names grow; an object in 20 items would show


def test_a_queue_at_rest_costs_its_buffer_and_little_more(queue_name: str) -> None:
    count, size = 50, 1 << 16
    with ExitStack() as stack:
        stack.enter_context(ShmQueue[Any](queue_name, buffer_size=size))
        gc.collect()
        before, blocks = private_bytes(), 0
        for i in range(count):
            q = stack.enter_context(ShmQueue[Any](f"{queue_name}-{i}", buffer_size=size))
            blocks += os.stat(f"/dev/shm/shmqueue.{q.identifier}").st_blocks * 512
        beside = (blocks - count * size + private_bytes() - before) / count
        assert 0 < beside < 200 * 1024
