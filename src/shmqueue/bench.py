"""``shmqueue bench``: how fast queues between processes are on this machine.

A ``Workload`` is what is sent and by how many, a ``Candidate`` a queue to send it through. Candidates take turns, each
time with a queue and processes of their own, so that whatever else the machine does hits all of them: compare ratios
of one run, never figures of two. Before the timed turns each candidate carries the workload once with every item
compared; that turn also says how many items fill the time of the others.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import importlib
import importlib.util
import itertools
import json
import mmap
import os
import secrets
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack, suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from threading import BrokenBarrierError
from typing import Any

import msgpack

from . import __version__, serialization
from .processes import FORK, Progress, machine, number_from, signals_blocked, signals_exit, when_parent_dies
from .queue import ShmQueue

__all__ = [
    "CANDIDATES", "MAKERS", "Candidate", "Failed", "Outcome", "Port", "Unable", "Workload", "add_command", "candidates",
    "compare", "new_name", "summary", "table", "turn", "workloads",
]  # fmt: skip

LIMIT_S = 60.0
"""Seconds that one turn may take."""

FIRST_COUNT = 2_000
"""Items of the turn that compares them, of each producer; of frames a hundredth."""

ROOM = 1 << 20
"""Bytes for waiting items, where a candidate lets its user choose; and at least those of four items."""

PACED_S = 0.002

GAVE_UP = "gave up, as another worker did"


# ---- what is sent, and by how many


@dataclasses.dataclass(frozen=True)
class Workload:
    """Items sent through one queue; or, with ``pause_s``, one item sent to and fro through two."""

    name: str
    item: Any
    producers: int = 1
    consumers: int = 1
    """0: the one process puts and gets."""

    batch: int = 1
    """Items of one put_many; 1: put."""

    get_batch: int = 1
    """Items of one get_many at most; 1: get."""

    pause_s: float | None = None
    """Seconds between two round trips."""

    bytes_read: bool = False
    """Consumers read the payload, every byte of it."""

    size: int = 0
    """Bytes of a frame."""

    only: str = ""
    """The only candidate that can do it, if there is just one."""

    @property
    def is_copied(self) -> bool:
        """Whether bytes per second mean something."""
        return bool(self.size) and not self.only

    @property
    def is_ping_pong(self) -> bool:
        return self.pause_s is not None

    @property
    def room(self) -> int:
        """Bytes for waiting items."""
        return max(ROOM, 4 * (self.size + 4096))


DICT = {"id": 1, "v": 1.5, "name": "sensor"}
TUPLE = (1, 2, 3, 4, 5)
FRAME_SHAPE = (1080, 1920, 3)


def frame(*shape: int) -> Any:
    """A frame of bytes that aren't all alike."""
    numpy = importlib.import_module("numpy")
    return numpy.arange(int(numpy.prod(shape)), dtype=numpy.uint32).astype(numpy.uint8).reshape(shape)


def in_place(image: Any) -> Workload:
    """Frames that are neither written nor copied nor read."""
    size = f"{image.nbytes // 1024}KiB"
    return Workload(f"frame-in-place-{size}", image, size=image.nbytes, only="shmqueue, reserve_array")


def frames(name: str, bytes_read: bool = False) -> Workload:
    """Frames of a camera."""
    image = frame(*FRAME_SHAPE)
    return Workload(name, image, size=image.nbytes, bytes_read=bytes_read)


MAKERS: dict[str, Callable[[], Workload]] = {
    "dict-1:1": lambda: Workload("dict-1:1", DICT),
    "bytes-1:1": lambda: Workload("bytes-1:1", bytes(range(100))),
    "dict-4:4": lambda: Workload("dict-4:4", DICT, 4, 4),
    "dict-1:1-batch": lambda: Workload("dict-1:1-batch", DICT, batch=100, get_batch=100),
    "dict-alone": lambda: Workload("dict-alone", DICT, consumers=0),
    "ping-pong": lambda: Workload("ping-pong", DICT, pause_s=0.0),
    "ping-pong-paced": lambda: Workload("ping-pong-paced", DICT, pause_s=PACED_S),
    "frame-1:1": lambda: frames("frame-1:1"),
    "frame-read-1:1": lambda: frames("frame-read-1:1", bytes_read=True),
    "frame-in-place-64KiB": lambda: in_place(frame(65536)),
    "frame-in-place-6075KiB": lambda: in_place(frame(*FRAME_SHAPE)),
}
"""Make a workload; those of frames raise ``ModuleNotFoundError`` without numpy."""


def workloads(names: Collection[str] = MAKERS) -> dict[str, Workload]:
    """Those of them that can be made here."""
    found = {}
    for name in names:
        with suppress(ModuleNotFoundError):
            found[name] = MAKERS[name]()
    return found


# ---- the queues


def new_name() -> str:
    """A name that no other queue has."""
    return f"bench-{os.getpid()}-{secrets.token_hex(4)}"


@dataclasses.dataclass(frozen=True)
class Port:
    """A queue as one worker uses it."""

    put: Callable[[Any], Any]
    get: Callable[[], Any]
    put_many: Callable[[Sequence[Any]], Any] | None = None
    get_many: Callable[[int], Sequence[Any]] | None = None
    close: Callable[[], Any] = lambda: None


class Candidate:
    """A queue to measure: made here, opened by each worker. This base is for queues that are inherited by fork."""

    module = ""
    """What has to be installed."""

    is_checked = False
    """Whether each item will be compared."""

    def __init__(self, workload: Workload) -> None:
        self.workload = workload

    def open(self, number: int, is_producer: bool) -> Port:
        """The port of producer or consumer ``number``. Called in that worker."""
        raise NotImplementedError

    def remove(self) -> None:
        """Leave nothing behind."""


class Unable(Exception):
    """This candidate can't do this workload."""


class Shm(Candidate):
    """A ``ShmQueue``, opened by name."""

    def __init__(self, workload: Workload) -> None:
        super().__init__(workload)
        self._name = new_name()
        self._queue = ShmQueue[Any](self._name, buffer_size=workload.room)

    def open(self, number: int, is_producer: bool) -> Port:
        return self._port(ShmQueue[Any](self._name))

    def _port(self, queue: ShmQueue[Any]) -> Port:
        return Port(queue.put, queue.get, queue.put_many, queue.get_many, queue.shutdown)

    def remove(self) -> None:
        self._queue.shutdown()


class ShmLease(Shm):
    """The same; items are leased and not copied."""

    def _port(self, queue: ShmQueue[Any]) -> Port:
        held: list[Any] = []

        def get() -> Any:
            while held:
                held.pop().release()
            held.append(queue.lease(copy=False))
            return held[0].item

        return dataclasses.replace(super()._port(queue), get=get)


class ShmInPlace(ShmLease):
    """The same; frames are also made in the queue, so that nothing is copied at all. Nothing is written either, but in
    the turn that is checked: how long a frame takes to make is the user's affair."""

    def _port(self, queue: ShmQueue[Any]) -> Port:
        is_checked = self.is_checked

        def put(item: Any) -> None:
            with queue.reserve_array(item.shape, item.dtype) as array:
                if is_checked:
                    array[...] = item

        return dataclasses.replace(super()._port(queue), put=put)


class Memcpy(Candidate):
    """No queue but the limit of any: frames copied into shared memory and out of it. Who waits spins."""

    module = "numpy"
    SLOTS = 4
    in_place = False

    def __init__(self, workload: Workload) -> None:
        super().__init__(workload)
        if not workload.size or workload.producers != 1 or workload.consumers != 1:
            raise Unable("frames from one to one")
        numpy = importlib.import_module("numpy")
        item = workload.item
        self._memory = mmap.mmap(-1, 4096 + self.SLOTS * workload.size)
        self._counts = numpy.frombuffer(self._memory, "u8", 16)  # [0]: put, [8]: got
        self._slots = [
            numpy.frombuffer(self._memory, item.dtype, item.size, 4096 + i * workload.size).reshape(item.shape)
            for i in range(self.SLOTS)
        ]
        self._copy = numpy.copyto
        self._out = numpy.empty_like(item)

    def open(self, number: int, is_producer: bool) -> Port:
        counts, slots, copy, out = self._counts, self._slots, self._copy, self._out
        n, in_place = self.SLOTS, self.in_place
        out[:] = 0

        def put(item: Any) -> None:
            done = int(counts[0])
            while done - int(counts[8]) >= n - 1:
                pass
            copy(slots[done % n], item)
            counts[0] = done + 1

        def get() -> Any:
            done = int(counts[8])
            while int(counts[0]) == done:
                pass
            if not in_place:
                copy(out, slots[done % n])
            counts[8] = done + 1  # in place, the producer still keeps off it: it leaves one slot free
            return slots[done % n] if in_place else out

        return Port(put, get)


class MemcpyIn(Memcpy):
    """The same, read where they are."""

    in_place = True


class Stdlib(Candidate):
    """``multiprocessing.Queue``, which pickles."""

    def __init__(self, workload: Workload) -> None:
        super().__init__(workload)
        self._queue = FORK.Queue(10_000)

    def open(self, number: int, is_producer: bool) -> Port:
        def close() -> None:
            self._queue.close()
            self._queue.join_thread()

        return Port(self._queue.put, self._queue.get, close=close)

    def remove(self) -> None:
        self._queue.close()


class FasterFifo(Candidate):
    """faster-fifo, which pickles."""

    module = "faster_fifo"

    def __init__(self, workload: Workload) -> None:
        super().__init__(workload)
        self._queue = importlib.import_module(self.module).Queue(max_size_bytes=workload.room)

    def open(self, number: int, is_producer: bool) -> Port:
        queue = self._queue

        def put(item: Any) -> None:
            queue.put(item, timeout=LIMIT_S)

        def get() -> Any:
            return queue.get(timeout=LIMIT_S)

        def put_many(items: Sequence[Any]) -> None:
            queue.put_many(items, timeout=LIMIT_S)

        def get_many(most: int) -> Any:
            return queue.get_many(timeout=LIMIT_S, max_messages_to_get=most)

        return Port(put, get, put_many, get_many)

    def remove(self) -> None:
        self._queue.close()


class _Bytes(Candidate):
    """A queue of bytes: what isn't bytes is packed as a ``ShmQueue`` does, frames go as they are."""

    def __init__(self, workload: Workload) -> None:
        super().__init__(workload)
        item = workload.item
        packb, option, self.unpack = serialization.fast_codec(False)
        self.pack: Callable[[Any], Any] = lambda item: packb(item, None, option)
        if isinstance(item, bytes):
            self.pack = self.unpack = bytes
        elif workload.size:
            numpy = importlib.import_module("numpy")
            self.pack = lambda item: item.data.cast("B")
            self.unpack = lambda got: numpy.frombuffer(got, dtype=item.dtype).reshape(item.shape)


class HyperQ(_Bytes):
    """hyperq, whose queues of bytes are faster than its queues of objects."""

    module = "hyperq"

    def __init__(self, workload: Workload) -> None:
        super().__init__(workload)
        self._open = importlib.import_module(self.module).BytesHyperQ
        self._name = new_name()
        self._queue = self._open(workload.room, name=self._name)

    def open(self, number: int, is_producer: bool) -> Port:
        queue, pack, unpack = self._open(self._queue.shm_name), self.pack, self.unpack
        if isinstance(self.workload.item, bytes):
            return Port(queue.put, queue.get)
        if self.workload.size:
            return Port(lambda item: queue.put(item.tobytes()), lambda: unpack(queue.get()))
        return Port(lambda item: queue.put(pack(item)), lambda: unpack(queue.get()))

    def remove(self) -> None:
        for left in Path("/dev/shm").glob(f"*{self._name}*"):  # where its users were killed
            left.unlink(missing_ok=True)


class HyperQMsgpack(HyperQ):
    """The same with msgpack, the usual library."""

    def __init__(self, workload: Workload) -> None:
        super().__init__(workload)
        self.pack, self.unpack = msgpack.packb, msgpack.unpackb


class ZeroMQ(_Bytes):
    """pyzmq over ipc. Each producer has a socket for each consumer and uses them in turn."""

    module = "zmq"

    def __init__(self, workload: Workload) -> None:
        super().__init__(workload)
        self._zmq = importlib.import_module(self.module)
        self._directory = tempfile.mkdtemp(prefix="shmqueue-bench-")

    def open(self, number: int, is_producer: bool) -> Port:
        context = self._zmq.Context()
        consumers = max(1, self.workload.consumers)
        addresses = [f"ipc://{self._directory}/{i}" for i in range(consumers)]
        pull = context.socket(self._zmq.PULL)
        if not is_producer or not self.workload.consumers:
            pull.bind(addresses[number])
        pushes = [context.socket(self._zmq.PUSH) for _ in addresses]
        if is_producer:
            for push, address in zip(pushes, addresses, strict=True):
                push.connect(address)
        turns = itertools.cycle(pushes)
        pack, unpack = self.pack, self.unpack
        is_copied = not self.workload.size

        def put(item: Any) -> None:
            next(turns).send(pack(item), copy=is_copied)

        def get() -> Any:
            return unpack(pull.recv(copy=is_copied) if is_copied else pull.recv(copy=False).buffer)

        def put_many(items: Sequence[Any]) -> None:
            next(turns).send_multipart([pack(item) for item in items])

        def get_many(_: int) -> Any:
            return [unpack(got) for got in pull.recv_multipart()]

        is_batched = self.workload.batch > 1
        return Port(put, get, put_many if is_batched else None, get_many if is_batched else None, context.destroy)

    def remove(self) -> None:
        shutil.rmtree(self._directory, ignore_errors=True)


class Iceoryx2(_Bytes):
    """iceoryx2's publish and subscribe, made to lose nothing; who waits spins. It has no queue for many consumers."""

    module = "iceoryx2"
    in_place = False

    def __init__(self, workload: Workload) -> None:
        super().__init__(workload)
        if workload.producers != 1 or workload.consumers > 1:
            raise Unable("one publisher, one subscriber")
        self._iox = importlib.import_module(self.module)
        self._name = new_name()
        self._largest = max(workload.size, 256)
        self._kept: list[Any] = []

    def open(self, number: int, is_producer: bool) -> Port:
        iox = self._iox
        iox.set_log_level(iox.LogLevel.Fatal)
        off = iox.SignalHandlingMode.Disabled
        node = iox.NodeBuilder.new().signal_handling_mode(off).create(iox.ServiceType.Ipc)
        depth = max(4, min(1000, self.workload.room // self._largest))
        service = (
            node.service_builder(iox.ServiceName.new(self._name))
            .publish_subscribe(iox.Slice[ctypes.c_uint8])
            .enable_safe_overflow(False)
            .subscriber_max_buffer_size(depth)
            .open_or_create()
        )
        strategy = iox.BackpressureStrategy.RetryUntilDelivered
        publisher: Any = None
        subscriber: Any = None
        if not is_producer or not self.workload.consumers:
            subscriber = service.subscriber_builder().create()
        if is_producer:
            publisher = (
                service.publisher_builder()
                .initial_max_slice_len(self._largest)
                .backpressure_strategy(strategy)
                .create()
            )
        self._kept = [node, service, publisher, subscriber]
        pack, unpack, in_place = self.pack, self.unpack, self.in_place

        def put(item: Any) -> None:
            data = pack(item)
            sample = publisher.loan_slice_uninit(len(data))
            source = item.ctypes.data if self.workload.size else data
            ctypes.memmove(sample.payload_ptr, source, len(data))
            sample.assume_init().send()

        def get() -> Any:
            while (sample := subscriber.receive()) is None:
                pass
            payload = sample.payload()
            if in_place:
                got = unpack((ctypes.c_uint8 * payload.len()).from_address(sample.payload_ptr))
                self._kept.append(sample)
                if len(self._kept) > 5:
                    self._kept.pop(4).delete()
                return got
            got = unpack(ctypes.string_at(sample.payload_ptr, payload.len()))
            sample.delete()
            return got

        return Port(put, get)


class Iceoryx2InPlace(Iceoryx2):
    """The same, frames read where they are."""

    in_place = True


CANDIDATES: dict[str, type[Candidate]] = {
    "shmqueue": Shm,
    "multiprocessing.Queue": Stdlib,
    "faster-fifo": FasterFifo,
    "hyperq": HyperQ,
    "hyperq, msgpack": HyperQMsgpack,
    "pyzmq": ZeroMQ,
    "iceoryx2": Iceoryx2,
}
"""By label. They raise ``Unable`` for a workload that can't be done."""

FOR_FRAMES: dict[str, type[Candidate]] = {
    "shmqueue, lease(copy=False)": ShmLease,
    "iceoryx2, in place": Iceoryx2InPlace,
    "(copied in and out)": Memcpy,
    "(copied in)": MemcpyIn,
}
"""More of them."""

PEERS = [label for label in CANDIDATES if "," not in label and label != "shmqueue"]


def is_installed(candidate: type[Candidate]) -> bool:
    """Whether it can be measured here."""
    return not candidate.module or importlib.util.find_spec(candidate.module) is not None


def candidates(workload: Workload, wanted: Collection[str] = CANDIDATES) -> dict[str, type[Candidate]]:
    """Who does this workload, of those wanted that are installed, and their variants; the limits always do."""
    if workload.only:
        return {workload.only: ShmInPlace}
    found = CANDIDATES | FOR_FRAMES if workload.size else CANDIDATES
    if workload.size or isinstance(workload.item, bytes):
        found = {label: one for label, one in found.items() if one is not HyperQMsgpack}
    return {
        label: one
        for label, one in found.items()
        if (label[0] == "(" or label.partition(", ")[0] in wanted) and is_installed(one)
    }


# ---- one turn


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What one turn gave."""

    items: int
    seconds: float
    """From the first worker's start to the last one's end."""

    cpu_seconds: float
    """Of all workers, between the same two."""

    round_trips: tuple[float, ...] = ()
    """Seconds of each, sorted."""

    @property
    def rate(self) -> float:
        """Items per second."""
        return self.items / self.seconds

    def percentile(self, part: float) -> float:
        """Seconds that ``part`` of the round trips took at most."""
        return self.round_trips[min(len(self.round_trips) - 1, int(part * len(self.round_trips)))]


class Failed(Exception):
    """A turn didn't end as it should."""


Work = Callable[[Port], Any]


def _produce(workload: Workload, count: int) -> Work:
    item, batch = workload.item, [workload.item] * workload.batch

    def work(port: Port) -> None:
        put = port.put
        if len(batch) == 1 or port.put_many is None:
            for _ in itertools.repeat(None, count):
                put(item)
            return
        for _ in itertools.repeat(None, count // len(batch)):
            port.put_many(batch)

    return work


def read(data: Any) -> None:
    """Read every byte of an array."""
    data.reshape(-1).view("u8").max()


def _consume(workload: Workload, count: int, is_checked: bool) -> Work:
    same = _same(workload)

    def work(port: Port) -> None:
        get, get_many = port.get, port.get_many
        if workload.get_batch > 1 and get_many is not None:
            left = count
            while left:
                got = get_many(min(left, workload.get_batch))
                left -= len(got)
                if is_checked:
                    for item in got:
                        same(item)
        elif is_checked:
            for _ in itertools.repeat(None, count):
                same(get())
        elif workload.bytes_read:
            for _ in itertools.repeat(None, count):
                read(get())
        else:
            for _ in itertools.repeat(None, count):
                get()

    return work


def _alone(workload: Workload, count: int, is_checked: bool) -> Work:
    item, same = workload.item, _same(workload)

    def work(port: Port) -> None:
        put, get = port.put, port.get
        if is_checked:
            for _ in itertools.repeat(None, count):
                put(item)
                same(get())
            return
        for _ in itertools.repeat(None, count):
            put(item)
            get()

    return work


def _same(workload: Workload) -> Callable[[Any], None]:
    """A function that raises unless it is given the workload's item; a list will do for a tuple."""
    item = workload.item
    is_tuple = isinstance(item, tuple)
    expected: Any = list(item) if is_tuple else item
    to_compare: Callable[[Any], Any] = list if is_tuple else lambda got: got
    if workload.size:
        expected = item.tobytes()
        to_compare = lambda got: got.tobytes()  # noqa: E731

    def same(got: Any) -> None:
        if to_compare(got) != expected:
            raise Failed(f"another item arrived: {got!r:.200}")

    return same


def _ping(workload: Workload, count: int, back: Candidate) -> Work:
    def work(port: Port) -> list[float]:
        there, get, item, now = port.put, back.open(0, is_producer=False).get, workload.item, time.perf_counter
        seconds = []
        for _ in itertools.repeat(None, count):
            if workload.pause_s:
                time.sleep(workload.pause_s)
            start = now()
            there(item)
            get()
            seconds.append(now() - start)
        return seconds

    return work


def _pong(count: int, back: Candidate) -> Work:
    def work(port: Port) -> None:
        get, put = port.get, back.open(0, is_producer=True).put
        for _ in itertools.repeat(None, count):
            put(get())

    return work


def turn(make: Callable[[Workload], Candidate], workload: Workload, count: int, is_checked: bool = False) -> Outcome:
    """Send ``count`` items, or make as many round trips, with processes and a queue of their own.

    The workers of a ping-pong each have a CPU of their own where there are two; others run where the system puts them.

    Args:
        make: Makes the candidate.
        workload: What to send.
        count: Items in all; rounded so that each worker has the same share, and a whole number of batches.
        is_checked: Compare each item.

    Raises:
        Failed: A worker failed, or the turn took more than ``LIMIT_S``.
        Unable: The candidate can't do this.
    """
    share = workload.producers * max(1, workload.consumers) * workload.batch
    count = max(1, round(count / share)) * share
    with ExitStack() as stack:

        def made() -> Candidate:
            candidate = make(workload)
            candidate.is_checked = is_checked
            stack.callback(candidate.remove)
            return candidate

        candidate = made()
        works: list[tuple[Work, int, bool]]
        cpus: list[int] = []
        if workload.is_ping_pong:
            back = made()
            works = [(_ping(workload, count, back), 0, True), (_pong(count, back), 0, False)]
            cpus = sorted(os.sched_getaffinity(0))[:2]
        elif workload.consumers == 0:
            works = [(_alone(workload, count, is_checked), 0, True)]
        else:
            put = _produce(workload, count // workload.producers)
            get = _consume(workload, count // workload.consumers, is_checked)
            works = [(get, i, False) for i in range(workload.consumers)]
            works += [(put, i, True) for i in range(workload.producers)]
        return _run(candidate, works, count, cpus)


def _run(candidate: Candidate, works: list[tuple[Work, int, bool]], count: int, cpus: list[int]) -> Outcome:
    barrier = FORK.Barrier(len(works))
    workers = []
    deadline = time.monotonic() + LIMIT_S
    try:
        for i, (work, number, is_producer) in enumerate(works):
            with signals_blocked():
                ours, theirs = FORK.Pipe(duplex=False)
                cpu = cpus[i % len(cpus)] if cpus else None
                arguments = (os.getpid(), candidate, work, number, is_producer, cpu, barrier, theirs)
                process = FORK.Process(target=_run_worker, args=arguments, daemon=True)
                process.start()
                theirs.close()
                workers.append((process, ours))
        reports = _reports([connection for _, connection in workers], deadline)
        for process, _ in workers:
            process.join(max(0.0, deadline - time.monotonic()))
    finally:
        for process, connection in workers:
            if process.is_alive():
                process.kill()
            process.join()
            connection.close()
    seconds = max(end for _, end, _, _ in reports) - min(start for start, _, _, _ in reports)
    trips = sorted(trip for *_, result in reports for trip in result or ())
    return Outcome(count, seconds, sum(cpu for _, _, cpu, _ in reports), tuple(trips))


def _reports(connections: list[Connection], deadline: float) -> list[tuple[float, float, float, Any]]:
    """Start, end, CPU seconds and result of each worker; an error as soon as there is one."""
    reports: list[tuple[float, float, float, Any]] = []
    pending = list[Any](connections)
    while pending:
        ready: list[Any] = wait(pending, max(0.0, deadline - time.monotonic()))
        if not ready:
            raise Failed(f"not done after {LIMIT_S:g} s")
        for connection in ready:
            pending.remove(connection)
            try:
                error, *report = connection.recv()
            except EOFError:
                raise Failed("a worker died") from None
            if error and (error != GAVE_UP or not pending):
                raise Failed(error)
            reports.append(tuple(report))
    return reports


def _run_worker(
    parent: int, candidate: Candidate, work: Work, number: int, is_producer: bool, cpu: int | None, barrier: Any,
    to_parent: Connection,
) -> None:  # fmt: skip
    when_parent_dies(parent, signal.SIGKILL)
    if cpu is not None:
        os.sched_setaffinity(0, [cpu])
    try:
        port = candidate.open(number, is_producer)
        barrier.wait(LIMIT_S)
        start, cpu_start = time.monotonic(), time.process_time()
        result = work(port)
        end, cpu_end = time.monotonic(), time.process_time()
        to_parent.send((None, start, end, cpu_end - cpu_start, result))
        port.close()
    except Exception as error:
        barrier.abort()
        to_parent.send((GAVE_UP if isinstance(error, BrokenBarrierError) else f"{error!r:.300}",))
        to_parent.close()
        os._exit(1)


# ---- turns


def compare(
    workload: Workload,
    makers: Mapping[str, Callable[[Workload], Candidate]],
    turns: int,
    seconds: float,
    progress: Callable[[str], None] = lambda line: None,
) -> tuple[dict[str, list[Outcome]], dict[str, str]]:
    """Measure candidates in turn.

    Args:
        workload: What to send.
        makers: Candidates by label.
        turns: Turns of each, after the one that compares items.
        seconds: What a turn should take, about.
        progress: Is told how far it is.

    Returns:
        The outcomes of each candidate that could do it, and why each of the others couldn't.
    """
    counts: dict[str, int] = {}
    outcomes: dict[str, list[Outcome]] = {}
    failures: dict[str, str] = {}

    def attempt(label: str, count: int, is_checked: bool) -> Outcome | None:
        try:
            return turn(makers[label], workload, count, is_checked)
        except (Failed, Unable, OSError) as error:
            failures[label] = str(error)
            outcomes.pop(label, None)
            return None

    first = FIRST_COUNT * workload.producers * workload.batch**0.5
    if workload.size or workload.is_ping_pong:
        first = FIRST_COUNT / 20
    for label in makers:
        progress(f"{workload.name}: {label}, every item compared")
        if (outcome := attempt(label, int(first), is_checked=True)) is not None:
            counts[label] = max(10, int(outcome.rate * seconds))
            outcomes[label] = []
    for i in range(turns):
        for label in list(outcomes):
            progress(f"{workload.name}: {label}, turn {i + 1} of {turns}")
            if (outcome := attempt(label, counts[label], is_checked=False)) is not None:
                outcomes[label].append(outcome)
                counts[label] = max(10, int(outcome.rate * seconds))
    return outcomes, failures


PERCENTILES = {"p50_us": 0.5, "p90_us": 0.9, "p99_us": 0.99, "p99.9_us": 0.999}


def summary(workload: Workload, outcomes: dict[str, list[Outcome]], failures: dict[str, str]) -> dict[str, Any]:
    """What ``compare`` gave, as it goes to JSON: EPILOG says what it holds."""
    queues = {}
    for label, turns in outcomes.items():
        queues[label] = {"cpu_us": [one.cpu_seconds / one.items * 1e6 for one in turns]}
        if workload.is_ping_pong:
            queues[label] |= {key: [one.percentile(part) * 1e6 for one in turns] for key, part in PERCENTILES.items()}
        else:
            queues[label] |= {"rate": [one.rate for one in turns]}
    return {"size": workload.size, "queues": queues, "failures": failures}


# ---- the command

DESCRIPTION = """\
Measure queues between processes on this machine, in turn: shmqueue and those others that are installed
(pip install faster-fifo hyperq iceoryx2 pyzmq). Each turn has processes and a queue of its own. Shown are medians
over the turns with the spread between the slowest and the fastest, and the CPU time of all workers per item.
Compare what one run shows; the figures of two runs may differ by more than two queues do."""

EPILOG = """\
workloads: `dict` is a small dict, `bytes` are 100 of them, `frame` is an array of 6.2 MB. 4:4 are four producers and
four consumers; `alone` is one process that puts and gets. A `ping-pong` goes through two queues, there and back, and
each of its two processes is bound to a CPU; `paced` is one every 2 ms. Consumers of `frame-read` read every byte.
`frame-in-place` is reserve_array() and lease(copy=False), where nothing is copied or written: what remains is the cost
of the calls. "(copied in and out)" is no queue but copying alone, the limit for all that copy.

--json: for each workload `size`, bytes of a frame, else 0; `queues`, and for each of them lists with a figure for
each turn: `rate`, items per second, or for a ping-pong `p50_us`, `p90_us`, `p99_us`, `p99.9_us`, percentiles of its
round trips in microseconds; `cpu_us`, CPU time of all workers per item, or round trip, in microseconds; `failures`,
why others couldn't do it.

exit code: 0, or 1 if shmqueue failed at a workload, 2 for arguments that can't do, 130 after Ctrl-C, 143 after
SIGTERM, 129 after SIGHUP."""


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``bench`` to the subcommands of ``shmqueue``."""
    parser = commands.add_parser(
        "bench",
        help="measure this and other queues on this machine",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("workloads", nargs="*", metavar="WORKLOAD", help=f"of {', '.join(MAKERS)}; default: all")
    add("--turns", type=number_from(int, 1), default=5, metavar="N", help="turns of each; default: %(default)s")
    add(
        "--seconds", type=number_from(float, 0.01), default=0.5, metavar="S",
        help="of one turn, about; default: %(default)g",
    )  # fmt: skip
    add(
        "--against", action="append", choices=[*PEERS, "none"], metavar="QUEUE",
        help=f"only this one of {', '.join(PEERS)}, or none; may be given again",
    )  # fmt: skip
    add("--json", action="store_true", help="print the figures of every turn, in JSON")
    add("--verbose", action="store_true", help="tell how far it is, each second, also where there is no terminal")
    parser.set_defaults(run=lambda arguments: _run_command(parser, arguments))


def _run_command(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> int:
    names = arguments.workloads or list(MAKERS)
    if unknown := [name for name in names if name not in MAKERS]:
        parser.error(f"no workload {', '.join(unknown)}; there are {', '.join(MAKERS)}")
    against = arguments.against or PEERS
    if "none" in against and len(against) > 1:
        parser.error("--against none: no other queue can be given with it")
    absent = [label for label in PEERS if label in against and not is_installed(CANDIDATES[label])]
    if not is_installed(Memcpy) and (left_out := [name for name in arguments.workloads if name.startswith("frame")]):
        parser.error(f"{left_out[0]}: numpy isn't installed; try: {sys.executable} -m pip install numpy")
    if absent and arguments.against:
        parser.error(f"--against {absent[0]}: not installed; try: {sys.executable} -m pip install {absent[0]}")
    progress = Progress(arguments.verbose)
    found: dict[str, Any] = {}
    is_sound = True
    try:
        with signals_exit():
            if not arguments.json:
                print(f"shmqueue {__version__}, {machine()}; turns: {arguments.turns}", flush=True)
            for name, workload in workloads(names).items():
                makers = candidates(workload, {"shmqueue", *against})
                outcomes, failures = compare(workload, makers, arguments.turns, arguments.seconds, progress)
                progress.clear()
                is_sound = is_sound and not any(label.startswith("shmqueue") for label in failures)
                found[name] = summary(workload, outcomes, failures)
                if not arguments.json:
                    print(table(workload, found[name]), flush=True)
    except (KeyboardInterrupt, SystemExit) as error:
        progress.clear()
        print("interrupted; the workers are ended, the queues are removed", file=sys.stderr)
        if isinstance(error, SystemExit):
            raise
        return 128 + signal.SIGINT
    if absent:
        print(f"left out, as not installed: {', '.join(absent)}", file=sys.stderr)
    if left_out := [name for name in names if name not in found]:
        print(f"left out, as numpy isn't installed: {', '.join(left_out)}", file=sys.stderr)
    if arguments.json:
        print(json.dumps({"version": __version__, "machine": machine(), "workloads": found}, indent=2))
    return 0 if is_sound else 1


def table(workload: Workload, found: dict[str, Any]) -> str:
    """A summary, a line for each candidate."""
    lines = [f"\n{workload.name}"]
    for label, figures in found["queues"].items():
        middle = {field: statistics.median(values) for field, values in figures.items()}
        cpu = f"{middle['cpu_us']:10,.2f} us CPU"
        if workload.is_ping_pong:
            lines.append(f"  {label:28}{middle['p50_us']:12,.1f} us p50 {middle['p99_us']:12,.1f} us p99 {cpu}")
        else:
            size = f" {middle['rate'] * workload.size / 1e9:6,.2f} GB/s" if workload.is_copied else ""
            spread = f"({min(figures['rate']):,.0f} to {max(figures['rate']):,.0f})"
            lines.append(f"  {label:28}{middle['rate']:12,.0f} items/s {spread:26}{size}{cpu}")
    lines += [f"  {label:28}{reason}" for label, reason in found["failures"].items()]
    return "\n".join(lines)
