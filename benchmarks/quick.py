"""Two ratios, each from one run: a put and get against the codec alone, and 1:1 against multiprocessing.Queue.

    python benchmarks/quick.py [--turns 15]

Candidates take turns; medians are printed with the spread between the quartiles. Producer and consumer are
separate processes, placed by the system; every item is counted.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

from shmqueue import ShmQueue, __version__, serialization

ITEM = {"id": 1, "v": 1.5, "name": "sensor"}
NAME = f"bench.{os.getpid()}"


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def codec_alone(count: int) -> None:
    pack, option, unpack = serialization.fast_codec(False)
    for _ in range(count):
        unpack(pack(ITEM, None, option))


def put_and_get(queue: ShmQueue[Any], count: int) -> None:
    put, get = queue.put, queue.get
    for _ in range(count):
        put(ITEM)
        get()


def produce(queue: Any, count: int) -> None:
    for _ in range(count):
        queue.put(ITEM)


def consume(queue: Any, count: int) -> None:
    for _ in range(count):
        queue.get()


def one_to_one(queue: Any, count: int) -> float:
    """Items per second from the first one's arrival to the last one's."""
    producer = multiprocessing.get_context("fork").Process(target=produce, args=(queue, count + 1))
    producer.start()
    queue.get()
    rate = count / seconds(lambda: consume(queue, count))
    producer.join()
    return rate


def show(what: str, values: list[float], unit: str) -> None:
    low, middle, high = statistics.quantiles(values, n=4)
    print(f"{what:44} {middle:14,.0f} {unit:8} ({low:,.0f} to {high:,.0f})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=15, help="how often each candidate is measured")
    turns = parser.parse_args().turns
    print(f"shmqueue {__version__}, CPython {platform.python_version()}, {os.cpu_count()} CPUs, item {ITEM}")

    count = 20_000
    alone: list[float] = []
    queued: list[float] = []
    with ShmQueue[Any](NAME) as queue:
        for _ in range(turns):
            alone.append(seconds(lambda: codec_alone(count)) / count * 1e9)
            queued.append(seconds(lambda: put_and_get(queue, count)) / count * 1e9)
    show("pack + unpack alone", alone, "ns")
    show("put + get in one process, 4 KiB queue", queued, "ns")
    print(f"ratio: {statistics.median(a / b for a, b in zip(queued, alone, strict=True)):.2f}\n")

    ours: list[float] = []
    theirs: list[float] = []
    for _ in range(max(3, turns // 3)):
        with ShmQueue[Any](NAME, buffer_size=1 << 20) as queue:
            ours.append(one_to_one(queue, 400_000))
        theirs.append(one_to_one(multiprocessing.get_context("fork").Queue(), 40_000))
    show("shmqueue, 1 producer 1 consumer, 1 MiB", ours, "items/s")
    show("multiprocessing.Queue, the same", theirs, "items/s")
    print(f"ratio: {statistics.median(a / b for a, b in zip(ours, theirs, strict=True)):.1f}")


if __name__ == "__main__":
    main()
