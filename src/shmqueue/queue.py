"""``ShmQueue``: what the binding's handle leaves to Python - names, options, messages, references.

``put``, ``get`` and the status calls are in the binding (``_core/handle.c``), so that no Python frame
stands between a caller and the ring. They come back here for what isn't plain: ``_encode``, ``_decode``
and ``_failed``. Forks, exits and signals are in ``lifecycle``.
"""

from __future__ import annotations

import errno
import logging
import math
import mmap
import operator
import os
import uuid
from collections.abc import Callable, Iterator
from itertools import chain
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, NoReturn, TypeVar

from . import _core, lifecycle, names, reflog, serialization, views
from . import exceptions as exc

__all__ = ["SIZE_HEADER", "SYSTEM_PAGESIZE", "ShmQueue", "ShmRefDataSnapshot"]

SYSTEM_PAGESIZE = mmap.PAGESIZE
"""Bytes of a memory page; ``buffer_size`` is rounded up to a multiple of it."""

SIZE_HEADER = 8
"""Bytes that an item takes in the ring beside its payload."""

if TYPE_CHECKING:
    import numpy
    from typing_extensions import TypeVar as TypeVarWithDefault

    T = TypeVarWithDefault("T", default=Any)  # ShmQueue("jobs") is a queue of anything
else:
    T = TypeVar("T")
_log = logging.getLogger("shmqueue")

_DEAD = ".dead"
"""Ends the name of a dead-letter queue, which outlives its handles as long as items are in it."""


class ShmRefDataSnapshot(NamedTuple):
    """What a queue held at one instant.

    ``put_pos`` and ``get_pos`` are offsets in bytes, modulo ``buffer_size``: where the next item will
    be written, and where the oldest bytes in use begin. ``same_lap`` is 1 when both are in the same lap
    of the ring (equal offsets: nothing in use) and 0 otherwise (equal offsets: full).
    """

    ref_count: int
    put_pos: int
    get_pos: int
    buffer_size: int
    qsize: int
    same_lap: int


class ShmQueue(_core.Handle[T]):
    """A FIFO queue that every process on the machine opens by its name.

    Any number of processes and threads may put and get. Bytes in use at 8 + len(payload) per item bound it.
    A handle is one attachment: it goes with ``shutdown()``, garbage collection or the process, and with the
    last one the memory is freed. A process that is killed loses only what it had already taken.

    Args:
        queue_name: Any characters but NUL; at most 200 bytes when percent-encoded.
        logger: Where warnings go; the ``shmqueue`` logger by default.
        buffer_size: Bytes of the ring, rounded up to a multiple of ``SYSTEM_PAGESIZE``. Who finds the queue
            in place gets the size that it was created with.
        debug_ref_to_file_log: Keep a journal of handles in ``<temp>/shmqueue/_ref_log_<name>.json``.
        allow_pickle: Whether pickle may be used, for putting and for getting.
        track_resources: Register the segment with multiprocessing's resource tracker while attached.
        strict_types: Keep tuples, bytearrays and the like as what they are, by pickle, where msgpack would
            deliver lists and bytes.
        prefault: Map all pages of the queue now, in this process, so that the first pass through a large one is as
            fast as later ones. Takes about 0.5 s per GiB.

    Raises:
        ShmQueueValueError, ShmQueueTypeError: a bad name or size.
        ShmQueueCorruptedError: the segment of that name is no queue, or is damaged; it was left alone.
        ShmQueueRuntimeError: it has another format, or 512 handles are attached already.
        ShmQueueOSError: /dev/shm is full or read-only, the queue belongs to another user, and the like.
    """

    def __init__(
        self,
        queue_name: str,
        *,
        logger: logging.Logger | None = None,
        buffer_size: int = SYSTEM_PAGESIZE,
        debug_ref_to_file_log: bool = False,
        allow_pickle: bool = True,
        track_resources: bool = False,
        strict_types: bool = False,
        prefault: bool = False,
    ) -> None:
        if logger is not None and not hasattr(logger, "log"):
            raise exc.ShmQueueTypeError(f"logger must be a logging.Logger, not {type(logger).__name__}")
        if self._is_open():
            raise exc.ShmQueueRuntimeError(f"{self!r} is open already; make another handle")
        self._name = queue_name
        self._path = names.segment_path(queue_name)
        self._options: dict[str, Any] = {
            "buffer_size": buffer_size,
            "debug_ref_to_file_log": debug_ref_to_file_log,
            "allow_pickle": allow_pickle,
            "track_resources": track_resources,
            "strict_types": strict_types,
            "prefault": prefault,
        }
        self._log = logger or _log
        self._serializer: Callable[[int, Any], Any] | None = None
        self._deserializer: Callable[[int, list[memoryview]], Any] | None = None
        self._dead: ShmQueue[Any] | None = None  # where items go that were handed out too often
        self._has_told_shown = False
        self._handle_uuid = str(uuid.uuid4())
        self._open(_whole_pages(queue_name, buffer_size))

    def _open(self, capacity: int) -> None:
        codec = serialization.fast_codec(self._options["strict_types"])
        status, was_created, fault = self._attach(os.fsencode(self._path), capacity, 0o600, codec)
        if status != _core.OK:
            self._raise_fault(status, fault, "attach")
        self._capacity = self.max_buffer_size()
        if self._name.endswith(_DEAD):
            self._keep_items()
        lifecycle.register(self)
        if self._options["prefault"]:
            self._prefault()
        if not was_created and self._capacity != capacity:
            self._log.log(
                logging.WARNING if capacity > self._capacity else logging.DEBUG,
                "queue %r: has %d bytes since it was created; %d were asked for",
                self._name, self._capacity, capacity,
            )  # fmt: skip
        if self._options["track_resources"]:
            lifecycle.track(self._path)
        if self._options["debug_ref_to_file_log"]:
            self._journal(reflog.DebugRefLogAction.CREATE, self.refs)

    # ---- what everybody sees

    @property
    def identifier(self) -> str:
        """The queue's name."""
        return self._name

    @property
    def refs(self) -> int:
        """Live attachments plus references added by hand. Killed processes don't count."""
        return self._refs()

    def __repr__(self) -> str:
        end = "" if self._is_open() else ", shut down"
        return f"{type(self).__name__}(queue_name={self._name}, buffer_size={self._capacity}{end})"

    def snapshot(self) -> ShmRefDataSnapshot:
        """Return positions and counts, all of the same instant."""
        put_pos, _, free_pos, qsize = self._info()
        size = self._capacity
        return ShmRefDataSnapshot(
            ref_count=self._refs(),
            put_pos=put_pos % size,
            get_pos=free_pos % size,
            buffer_size=size,
            qsize=qsize,
            same_lap=int(put_pos // size == free_pos // size),
        )

    @property
    def debug_ref_data(self) -> ShmRefDataSnapshot:
        """The same as ``snapshot()``."""
        return self.snapshot()

    def check(self) -> list[str]:
        """Return a line for every invariant of the segment that is broken; none is as it should be.

        Changes nothing, and holds each side's lock while it looks.
        """
        return self._check().splitlines()

    # ---- in place

    def reserve(self, nbytes: int, block: bool = True, timeout: float | None = None) -> views.Reservation[memoryview]:
        """Reserve room for an item of bytes and write it in the queue's own memory, without a copy.

            with q.reserve(len(header) + size) as buffer:
                camera.readinto(buffer)

        At the end of the block the item is put, and arrives as ``put(bytes(buffer))`` would. After an exception it
        never was, nor if the process dies before. Its place in the queue is that of the call; items put later don't
        wait for it. The buffer, and what was made of it, must not be used after the block.

        Args:
            nbytes: Bytes of the item. In the queue it takes ``8 + len(msgpack.packb(item))``.
            block, timeout: As for ``put()``.
        Returns:
            A ``Reservation``: a context manager that gives a writable memoryview of ``nbytes`` bytes, which aren't
            zeroed; or use its ``buffer``, ``commit()`` and ``abandon()``.
        Raises:
            ShmQueueFull: it didn't fit in time, or 128 reservations are open.
            ShmQueueValueError: it is larger than the queue; or ``nbytes`` is negative.
            ShmQueueNotInitializedError: the handle has been shut down.
        """
        try:
            size = operator.index(nbytes)
        except TypeError:
            raise exc.ShmQueueTypeError(f"{self._who}: nbytes must be an int, not {type(nbytes).__name__}") from None
        if not 0 <= size < 2**62:
            raise exc.ShmQueueValueError(f"{self._who}: nbytes is {size}, from 0 to {2**62 - 1} are possible")
        head = serialization.bin_head(size)
        memory = self._reserve(len(head) + size, serialization.SerializationMethods.MSGPACK, block, timeout)
        payload = memoryview(memory)
        payload[: len(head)] = head
        buffer = payload[len(head) :]
        payload.release()
        return views.Reservation(self._who, memory, buffer)

    def reserve_array(
        self,
        shape: int | tuple[int, ...],
        dtype: numpy.typing.DTypeLike = float,
        order: Literal["C", "F"] = "C",
        block: bool = True,
        timeout: float | None = None,
    ) -> views.Reservation[numpy.ndarray[Any, Any]]:
        """Reserve room for a numpy array and fill it in the queue's own memory, without a copy.

            with q.reserve_array((1080, 1920, 3), "uint8") as image:
                camera.read(image)

        The same as ``reserve()``, but that the buffer is an array, aligned to 64 bytes, and arrives as ``put(array)``
        would. After the block the array can't be used; to read it, ``get()`` or ``lease()`` the item.

        Args:
            shape, dtype, order: As for ``numpy.empty``; objects can't be in it.
            block, timeout: As for ``put()``.
        Raises:
            ShmQueueSerializationError: the queue has ``allow_pickle=False``, or the dtype holds objects.
            ShmQueueTypeError: the shape or dtype is none.
            And as ``reserve()`` does.
        """
        if not self._options["allow_pickle"]:
            raise exc.ShmQueueSerializationError(
                f"{self._who}: arrays go by pickle, and the queue has allow_pickle=False; use reserve()"
            )
        try:
            layout = serialization.array_layout(shape, dtype, order)
        except exc.ShmQueueException as error:
            error.args = (f"{self._who}: {error}",)
            raise
        if layout.size + SIZE_HEADER > self._capacity:
            self._too_big(layout.size + SIZE_HEADER)
        memory = self._reserve(layout.size, serialization.PICKLE_OUT_OF_BAND, block, timeout)
        return views.Reservation(self._who, memory, layout.array_in(memoryview(memory), memory.phase))

    def custom_serialize(self, callable_function: Callable[[int, Any], Any]) -> None:
        """Set ``f(method, data) -> bytes-like`` for methods from ``FIRST_PUBLIC_NUMBER`` on."""
        self._serializer = _callable(callable_function, "serializer")

    def custom_deserialize(self, callable_function: Callable[[int, list[memoryview]], Any]) -> None:
        """Set ``f(method, chunks) -> object``; chunks: one read-only memoryview, valid until f returns."""
        self._deserializer = _callable(callable_function, "deserializer")

    # ---- references

    def add_ref_manually(self, pid: int) -> None:
        """Add a reference; it belongs to this attachment and goes with it.

        The first one that a forked child adds for its own pid is the attachment that it has anyway.
        """
        if not isinstance(pid, int):
            raise exc.ShmQueueTypeError(f"{self._who}: pid must be an int, not {type(pid).__name__}")
        if pid == os.getpid() and lifecycle.first_ref_in_child(self):
            self._refs()  # attaches, if nothing else has yet
            return
        self._ref_add()

    def reduce_ref_counter(self) -> None:
        """Take one reference back that was added by hand, here or elsewhere.

        Raises:
            ShmQueueValueError: this attachment is the only reference.
            ShmQueueRuntimeError: the others are live attachments; only ``shutdown()`` ends those.
        """
        if self._ref_drop():
            return
        refs = self.refs
        if refs <= 1:
            raise exc.ShmQueueValueError(f"{self._who}: 1 reference is left; use shutdown() to end it")
        raise exc.ShmQueueRuntimeError(
            f"{self._who}: {refs} references, all of them live attachments; shutdown() ends one"
        )

    # ---- life

    def shutdown(self, use_gc: bool = True) -> None:
        """Detach; the last handle to go frees the memory. Twice is fine.

        Calls that other threads are blocked in end with ``ShmQueueNotInitializedError``.

        Args:
            use_gc: Kept for programs written for 0.0.2; there is nothing to collect.
        """
        self._leave(now=False)

    def _leave(self, *, now: bool) -> None:
        if not self._is_open():
            return
        refs = self._refs_or(1) - 1 if self._options["debug_ref_to_file_log"] else 0
        status = self._close(now)
        lifecycle.unregister(self)
        if self._options["track_resources"]:
            lifecycle.untrack(self._path)
        if self._dead is not None:
            self._dead._leave(now=now)
        if self._options["debug_ref_to_file_log"]:
            self._journal(reflog.DebugRefLogAction.SHUTDOWN, refs)
        if status != _core.OK:
            what, found, _, error = self._fault()
            self._log.warning(
                "queue %r: detached, but %s could not be cleaned up: %s failed (%s)",
                self._name, self._path, what, os.strerror(error) if error else f"busy, pid {found}",
            )  # fmt: skip

    def _refs_or(self, default: int) -> int:
        try:
            return self._refs()
        except exc.ShmQueueException:
            return default

    def _journal(self, action: reflog.DebugRefLogAction, refs: int) -> None:
        reflog.record(names.quote(self._name), self._handle_uuid, action, refs, logger=self._log)

    def __del__(self) -> None:
        if hasattr(self, "_capacity"):  # it was attached
            self._leave(now=False)

    def __enter__(self) -> ShmQueue[T]:
        self._must_be_open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown()

    def __reduce__(self) -> tuple[Any, ...]:
        self._must_be_open()  # opened elsewhere it would be another queue, perhaps
        return _reopen, (type(self), self._name, self._options)

    def set_console_handlers(self, register_atexit: bool = False) -> None:
        """Shut down on SIGINT, SIGTERM and SIGHUP; the signal then goes to whoever handled it before.

        Args:
            register_atexit: Also shut down at interpreter exit; since 0.1.0 that happens in any case.
        Raises:
            ShmQueueRuntimeError: called off the main thread, where Python takes no signal handlers.
        """
        lifecycle.handle_signals(self)

    # ---- what the binding asks for

    def _encode(self, data: Any, method: int) -> tuple[int, bool, tuple[Any, ...]]:
        if type(data) is serialization.Encoded:
            return data
        try:
            return serialization.encode(
                data,
                method,
                allow_pickle=self._options["allow_pickle"],
                strict_types=self._options["strict_types"],
                custom=self._serializer,
            )
        except exc.ShmQueueException as error:
            error.args = (f"{self._who}: {error}",)
            raise

    def _decode(self, method: int, payload: bytes | bytearray | memoryview, phase: int) -> Any:
        try:
            return serialization.decode(
                method,
                payload,
                phase,
                allow_pickle=self._options["allow_pickle"],
                custom=self._deserializer,
            )
        except exc.ShmQueueException as error:
            error.args = (f"{self._who}: {error}",)
            raise

    def _at_least_1(self, name: str, value: Any) -> int:
        try:
            n = operator.index(value)
        except TypeError:
            kind = type(value).__name__
            raise exc.ShmQueueTypeError(f"{self._who}: {name} must be an int, not {kind}") from None
        if n < 1:
            raise exc.ShmQueueValueError(f"{self._who}: {name} is {n}, at least 1 is needed")
        return min(n, 2**62)

    def _must_have_dead_name(self) -> None:
        """``max_deliveries`` was given: raise if there can't be a queue of that name."""
        if len(self._path) > names.MAX_QUOTED - len(_DEAD):  # rarely
            names.quote(self._dead_name)

    @property
    def _dead_name(self) -> str:
        return f"{self._name}{_DEAD}"

    def _letter(self, method: int, payload: bytes, phase: int) -> tuple[ShmQueue[Any], serialization.Encoded]:
        """Where an item goes that was handed out too often, and the item, still in the bytes that it is."""
        if self._dead is None:
            self._dead = ShmQueue(self._dead_name, logger=self._log, buffer_size=self._capacity)
        return self._dead, serialization.again(method, payload, phase)

    def _tell_buried(self, size: int, deliveries: int) -> None:
        self._log.warning(
            "queue %r: an item of %d bytes was handed out %d times and never released; moved to %r",
            self._name, size, deliveries - 1, self._dead_name,
        )  # fmt: skip

    def _tell_shown(self, size: int) -> None:
        if not self._has_told_shown:
            self._has_told_shown = True
            self._log.warning(
                "queue %r: a lease is over, but something still shows its item of %d bytes, which keeps its place in "
                "the queue until nothing does; numpy.copy(array) is what can stay (said once for this handle)",
                self._name, size,
            )  # fmt: skip

    def _lease_is_over(self, has_ended: bool) -> NoReturn:
        if has_ended:
            raise exc.ShmQueueRuntimeError(f"{self._who}: the lease is over: its item was released or given back")
        raise exc.ShmQueueRuntimeError(f"{self._who}: the lease is held by the process that this one was forked from")

    def _seconds(self, timeout: Any) -> float:
        kind = type(timeout)
        if not (hasattr(kind, "__float__") or hasattr(kind, "__index__")):
            raise exc.ShmQueueTypeError(f"{self._who}: timeout must be a number or None, not {kind.__name__}")
        try:
            seconds = float(timeout)
        except OverflowError:  # an int beyond any float
            seconds = math.copysign(math.inf, timeout > 0 or -1)
        if not seconds >= 0:
            found = "NaN" if math.isnan(seconds) else timeout
            raise exc.ShmQueueValueError(f"{self._who}: 'timeout' must be a non-negative number, not {found}")
        return seconds

    def _iterate(self, items: Any) -> Iterator[T]:
        if not hasattr(type(items), "__iter__") and not hasattr(type(items), "__getitem__"):
            raise exc.ShmQueueTypeError(f"{self._who}: items must be iterable, not {type(items).__name__}")
        return iter(items)

    def _put_so_far(self, error: BaseException, accepted: int, left: list[T] | None, rest: Iterator[T]) -> None:
        exc.with_progress(error, accepted, chain(left or (), rest))

    def _got_so_far(self, error: BaseException, items: list[T]) -> None:
        vars(error).update(received=items)

    @property
    def _who(self) -> str:
        return f"queue {self._name!r}"

    def _failed(self, status: int, size: int, timeout: float | None) -> NoReturn:
        """Raise what a status means. size: bytes that a put needs, 0 for a get, -1 for anything else."""
        within = ""
        if status in (_core.FULL, _core.EMPTY, _core.CLAIMED) and timeout is not None:
            within = f" within {float(timeout):g} s"
        if status == _core.FULL:
            put_pos, get_pos, free_pos, qsize = self._info()
            held = ""
            if get_pos != free_pos:
                held = f"; {get_pos - free_pos} of them from the oldest open lease, reservation or view on"
            elif not qsize:
                held = "; all of them are reserved"
            raise exc.ShmQueueFull(
                f"{self._who}: no room for {size} bytes{within} "
                f"({put_pos - free_pos} of {self._capacity} bytes in use{held})"
            )
        if status == _core.EMPTY:
            raise exc.ShmQueueEmpty(f"{self._who}: no item{within or ' there now'}")
        if status == _core.CLAIMED and size > 0:
            raise exc.ShmQueueFull(
                f"{self._who}: nothing can be reserved: 128 reservations are open, or over but still shown by "
                f"something, and none has ended{within or ' yet'}"
            )
        if status == _core.CLAIMED:
            raise exc.ShmQueueEmpty(
                f"{self._who}: no item can be leased: as many as possible are, and no lease has ended{within or ' yet'}"
            )
        if status == _core.TOO_BIG:
            self._too_big(size)
        if status == _core.BUSY:
            self._busy(size)
        if status == _core.CLOSED:
            lifecycle.end_thread_if_exiting()
            self._closed()
        if status == _core.GONE:
            raise exc.ShmQueueNotInitializedError(
                f"{self._who}: its segment was removed before this forked process used it; open a new handle"
            )
        self._raise_fault(status, self._fault(), "use")

    def _must_be_open(self) -> None:
        if not self._is_open():
            self._closed()

    def _closed(self) -> NoReturn:
        raise exc.ShmQueueNotInitializedError(f"{self._who}: the handle has been shut down; open a new one")

    def _too_big(self, size: int) -> NoReturn:
        if size > 2**32 + SIZE_HEADER:
            raise exc.ShmQueueValueError(f"{self._who}: the payload has 4 GiB or more; items must be smaller")
        asked = self._options["buffer_size"]
        remedy = "create it with a larger buffer_size"
        if asked > self._capacity:
            remedy = f"it was there before this handle asked for {asked}; close all its handles, or remove {self._path}"
        raise exc.ShmQueueValueError(
            f"{self._who}: the item takes {size} bytes, the queue has {self._capacity} in all; {remedy}"
        )

    def _busy(self, size: int) -> NoReturn:
        side = 0 if size > 0 else 1
        kinds = (exc.ShmQueueFull, exc.ShmQueueEmpty, exc.ShmQueueRuntimeError)
        kind = kinds[side] if size >= 0 else kinds[2]
        pid = self._lock_pid(side)
        holder = f"process {pid}" if pid else "one process after the other"
        raise kind(
            f"{self._who}: the {('producing', 'consuming')[side]} lock is held by {holder}, alive but not letting go "
            f"in time (stopped, or on a very busy machine?); {self.buffer_occupancy()} of {self._capacity} bytes in use"
        )

    def _raise_fault(self, status: int, fault: tuple[str | None, int, int, int], doing: str) -> NoReturn:
        what, found, allowed, error = fault
        who, path = self._who, self._path
        if status == _core.CORRUPT:
            show = hex if what == "magic" else str
            wrong = f"{what} is {show(found)}, expected is {show(allowed)}"
            if what == "kind of file":
                wrong = "it is no regular file"
            raise exc.ShmQueueCorruptedError(
                f"{who}: {path} is no intact queue: {wrong}; if nobody needs it, remove it"
            )
        if status == _core.VERSION:
            raise exc.ShmQueueRuntimeError(
                f"{who}: segment has format {found}, this shmqueue reads {allowed}; if nobody needs it, remove {path}"
            )
        if status == _core.NO_SLOT:
            raise exc.ShmQueueRuntimeError(f"{who}: all {allowed} attachments are in use; share handles, or close some")
        if status == _core.BUSY:
            raise exc.ShmQueueRuntimeError(f"{who}: process {found} has been attaching or detaching for 5 s")
        sizes = f" ({found} bytes needed, {allowed} free in /dev/shm)" if error == errno.ENOSPC and found else ""
        raise exc.system_error(error, f"{who}: cannot {doing}: {what} of {path} failed: {os.strerror(error)}{sizes}")


def _reopen(kind: type[ShmQueue[Any]], name: str, options: dict[str, Any]) -> ShmQueue[Any]:
    """Unpickle a handle: attach anew, whatever arguments a subclass's own constructor takes."""
    queue = kind.__new__(kind)
    ShmQueue.__init__(queue, name, **options)
    return queue


def _whole_pages(queue_name: str, buffer_size: Any) -> int:
    if isinstance(buffer_size, bool) or not hasattr(buffer_size, "__index__"):
        kind = type(buffer_size).__name__
        raise exc.ShmQueueTypeError(f"queue {queue_name!r}: buffer_size must be an int, not {kind}")
    size = operator.index(buffer_size)
    if not 0 < size < 2**62:
        allowed = "at least 1 is needed" if size < 1 else f"at most {2**62 - 1} are possible"
        raise exc.ShmQueueValueError(f"queue {queue_name!r}: buffer_size is {size} bytes, {allowed}")
    return -(-size // SYSTEM_PAGESIZE) * SYSTEM_PAGESIZE


def _callable(function: Any, kind: str) -> Any:
    if not callable(function):
        raise exc.ShmQueueTypeError(f"the {kind} must be callable, not {type(function).__name__}")
    return function
