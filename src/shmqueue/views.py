"""``Reservation``: room in the queue for one item that the user writes in place. What becomes of arrays and memoryviews
when their time is over is in ``_core/views.c``."""

from __future__ import annotations

import sys
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from . import _core
from . import exceptions as exc

if TYPE_CHECKING:
    from ._core import Memory

__all__ = ["OVER", "Reservation"]

B = TypeVar("B")


class Over:
    """What an array holds whose lease or reservation is over: every operation raises."""

    MESSAGE = "the lease or reservation of this array is over; numpy.copy(array) in time is what stays"

    def __repr__(self) -> str:
        return f"<{self.MESSAGE}>"


def _raise(*_: object) -> None:
    raise exc.ShmQueueRuntimeError(Over.MESSAGE)


_OPERATIONS = """
    add and divmod floordiv lshift matmul mod mul or pow rshift sub truediv xor
    radd rand rdivmod rfloordiv rlshift rmatmul rmod rmul ror rpow rrshift rsub rtruediv rxor
    eq ge gt le lt ne abs bool bytes call complex contains float getitem hash index int invert iter len neg pos
    reduce_ex round setitem
"""
for _name in _OPERATIONS.split():
    setattr(Over, f"__{_name}__", _raise)

OVER = Over()


class Reservation(Generic[B]):
    """Room in the queue for one item, written in place; made by ``ShmQueue.reserve`` and ``ShmQueue.reserve_array``.

    As a context manager it gives the buffer. At the end of the block the item is in the queue; after an exception, and
    when the process dies, it never was. One that is forgotten is abandoned.
    """

    def __init__(self, who: str, memory: Memory, buffer: B) -> None:
        self._who = who
        self._held: list[Any] = [memory, buffer]

    @property
    def buffer(self) -> B:
        """The memoryview or array to write to.

        Raises:
            ShmQueueRuntimeError: the reservation is over, or is that of the process that this one was forked from.
        """
        self._must_be_open()
        buffer: B = self._held[1]
        return buffer

    @property
    def is_over(self) -> bool:
        """Whether it was committed or abandoned."""
        return not self._held

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
        if self._held and self._held[0].is_ours:
            self._end(kind is None, sys._getframe(1))

    def _must_be_open(self) -> None:
        if not self._held:
            raise exc.ShmQueueRuntimeError(f"{self._who}: the reservation is over: it was committed or abandoned")
        if not self._held[0].is_ours:
            raise exc.ShmQueueRuntimeError(f"{self._who}: the reservation is the parent process's")

    def _end(self, is_done: bool, frame: FrameType) -> None:
        if not _core.end_reservation(self._held, is_done, frame) and is_done:
            raise exc.ShmQueueRuntimeError(
                f"{self._who}: nothing was put, as something still shows the reserved memory and could write there; "
                "delete what was made of it before the block ends: tensors, iterators, rows of structured arrays"
            )

    def __repr__(self) -> str:
        return f"<Reservation of {self._who}{', over' if self.is_over else ''}>"
