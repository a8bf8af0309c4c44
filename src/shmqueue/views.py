"""Memory of the ring in the user's hands: reservations, and what becomes of arrays and memoryviews in the end.

A view that outlives its block would show, or write to, what is somebody else's by then. So at the end of a reservation
or of ``lease(copy=False)``:

1. Every array over the memory whose references are all known is made unusable, in place, and lets go of it. Known are
   those by the item's own containers and by variables of the calling frames. Any other reference may be that of an
   extension which keeps the array's address, so there the array stays as it is.
2. Every memoryview found on the way is released; using it afterwards is a ``ValueError``.
3. What still has a view then keeps the record in hand until it is gone (``_core/memory.c``).
"""

from __future__ import annotations

import gc
import inspect
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from types import FrameType, FunctionType, ModuleType, TracebackType
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from . import exceptions as exc

if TYPE_CHECKING:
    from ._core import Memory

__all__ = ["Over", "Reservation", "let_go"]

B = TypeVar("B")

FRAMES = 20
"""Calling frames that are looked through."""

OBJECTS = 1000
"""Objects of an item that are looked through."""

_HAVE_GC = 1 << 14  # of a type: its objects refer to others
_NO_CONTAINERS = (type, ModuleType, FunctionType)


class Over:
    """What an array holds whose lease or reservation is over."""

    def __repr__(self) -> str:
        return "<the lease or reservation of this array is over>"


OVER = Over()


def let_go(memory: Memory, item: list[Any], frame: FrameType | None) -> None:
    """Make unusable what shows the memory, as far as that is safe.

    Args:
        memory: The record's.
        item: A list of the item, the only reference to it beside those that the program has.
        frame: The frame that ends the lease or reservation.
    """
    arrays: dict[int, Any] = {}
    held: Counter[int] = Counter()  # references to each that are known
    places = _places(item, frame)
    while memory.exports and (things := next(places, None)) is not None:
        views = _sort(things, memory, arrays, held)
        things.clear()
        for key in arrays:
            if sys.getrefcount(arrays[key]) - _ONE == held[key]:
                _make_unusable(arrays[key])
                held[key] = 0
        for view in views:
            with suppress(BufferError):  # somebody has a view of the view
                view.release()


def _sort(things: list[Any], memory: Memory, arrays: dict[int, Any], held: Counter[int]) -> list[memoryview]:
    """Add the arrays over the memory, and how often each is among the things; return the memoryviews."""
    views = []
    kind = getattr(sys.modules.get("numpy"), "ndarray", None)
    for thing in things:
        if type(thing) is memoryview:
            if _shows(thing, memory):
                views.append(thing)
        elif type(thing) is kind and _is_over(thing, kind, memory):
            arrays[id(thing)] = thing
            held[id(thing)] += 1
    return views


def _places(item: list[Any], frame: FrameType | None) -> Iterator[list[Any]]:
    """What the item holds, then what the variables of each frame do: a thing as often as it is referred to there."""
    yield list(_parts(item))
    for _ in range(FRAMES):
        if frame is None:
            return
        variables = frame.f_locals
        things = list(variables.values())
        if frame.f_code.co_flags & inspect.CO_OPTIMIZED and sys.version_info < (3, 13):
            variables.clear()  # a copy that the frame would keep, and with it all that it holds
        yield things
        frame = frame.f_back


def _parts(item: list[Any]) -> Iterator[Any]:
    pending: list[Any] = [item]
    seen = {id(item)}
    while pending and len(seen) < OBJECTS:
        for part in gc.get_referents(pending.pop()):
            yield part
            if type(part).__flags__ & _HAVE_GC and not isinstance(part, _NO_CONTAINERS) and id(part) not in seen:
                seen.add(id(part))
                pending.append(part)


def _shows(view: memoryview, memory: Memory) -> bool:
    try:
        return view.obj is memory
    except ValueError:  # released
        return False


def _is_over(array: Any, kind: Any, memory: Memory) -> bool:
    base = array.base
    while type(base) is kind:
        base = base.base
    return type(base) is memoryview and _shows(base, memory)


def _make_unusable(array: Any) -> None:
    """Turn an array into one without dimensions that holds ``OVER``. It drops its base, and its address with that."""
    array.__setstate__((1, (), sys.modules["numpy"].dtype(object), False, [OVER]))


def _references_of_one() -> int:
    """What ``sys.getrefcount`` says in ``let_go`` of what nothing else refers to."""
    things = {0: object()}
    return sys.getrefcount(things[0])


_ONE = _references_of_one()


class Reservation(Generic[B]):
    """Room in the queue for one item, written in place; made by ``ShmQueue.reserve`` and ``ShmQueue.reserve_array``.

    As a context manager it gives the buffer. At the end of the block the item is in the queue; after an exception, and
    when the process dies, it never was. One that is forgotten is abandoned.
    """

    def __init__(self, who: str, memory: Memory, buffer: B) -> None:
        self._who = who
        self._memory = memory
        self._buffer: list[B] = [buffer]

    @property
    def buffer(self) -> B:
        """The memoryview or array to write to.

        Raises:
            ShmQueueRuntimeError: the reservation is over, or is that of the process that this one was forked from.
        """
        self._must_be_open()
        return self._buffer[0]

    @property
    def is_over(self) -> bool:
        """Whether it was committed or abandoned."""
        return not self._buffer

    def commit(self) -> None:
        """Put the item into the queue.

        Raises:
            ShmQueueRuntimeError: the reservation is over; or something still has a view of its memory, such as an
                array made of a slice, and could go on writing there: then it is abandoned.
        """
        self._must_be_open()
        self._end(True, sys._getframe(1))

    def abandon(self) -> None:
        """Put nothing; the room is free again.

        Raises:
            ShmQueueRuntimeError: the reservation is over.
        """
        self._must_be_open()
        self._end(False, sys._getframe(1))

    def __enter__(self) -> B:
        return self.buffer

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._buffer and self._memory.is_ours:
            self._end(kind is None, sys._getframe(1))

    def _must_be_open(self) -> None:
        if not self._buffer:
            raise exc.ShmQueueRuntimeError(f"{self._who}: the reservation is over: it was committed or abandoned")
        if not self._memory.is_ours:
            raise exc.ShmQueueRuntimeError(f"{self._who}: the reservation is the parent process's")

    def _end(self, is_done: bool, frame: FrameType) -> None:
        let_go(self._memory, self._buffer, frame)
        self._buffer.clear()
        is_shown = self._memory.exports > 0
        self._memory.end(is_done and not is_shown)
        if is_done and is_shown:
            raise exc.ShmQueueRuntimeError(
                f"{self._who}: nothing was put, as something still has a view of the reserved memory and could write "
                "there; delete what was made of the buffer before the block ends"
            )

    def __repr__(self) -> str:
        return f"<Reservation of {self._who}{', over' if self.is_over else ''}>"
