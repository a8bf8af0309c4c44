"""What shmqueue raises; each one is a ``ShmQueueException`` and also the builtin that users expect.

``ShmQueueEmpty`` and ``ShmQueueFull`` are events a program plans for; a caller's slip is a type or
value error; a refusal by the system is an ``OSError`` of that errno. Unless its docstring says
otherwise, an error leaves the queue and its items as they were. All of them can be pickled, as they
travel through process pools; none remembers the queue's handle.
"""

from __future__ import annotations

import builtins
import queue
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any, TypeVar, cast

__all__ = [
    "ShmQueueBufferOverflow",
    "ShmQueueCorruptedError",
    "ShmQueueDeserializationError",
    "ShmQueueEmpty",
    "ShmQueueException",
    "ShmQueueFull",
    "ShmQueueNoDeserializerError",
    "ShmQueueNoSerializerError",
    "ShmQueueNotInitializedError",
    "ShmQueueOSError",
    "ShmQueueRuntimeError",
    "ShmQueueSerializationError",
    "ShmQueueTypeError",
    "ShmQueueValueError",
]

E = TypeVar("E", bound=BaseException)


class ShmQueueException(Exception):
    """Base of all errors of this package.

    Attributes:
        accepted: Items that a ``put_many`` put before it failed; they stay in the queue.
        remaining: The other items of that ``put_many``, beginning with the one not accepted. After
            a trip through pickle it is empty: those items never left their process.
    """

    accepted: int = 0
    remaining: Iterator[Any] = iter(())


class ShmQueueEmpty(ShmQueueException, queue.Empty):
    """No item came in time."""


class ShmQueueFull(ShmQueueException, queue.Full):
    """The item didn't fit in time; it would have, had consumers made room."""


class ShmQueueValueError(ShmQueueException, ValueError):
    """An argument has a value that can never do: a bad name, an item larger than the queue."""


class ShmQueueTypeError(ShmQueueException, TypeError):
    """An argument has the wrong type, or a custom serializer returned something not bytes-like."""


class ShmQueueBufferOverflow(ShmQueueException, OverflowError):
    """Known to programs written for 0.0.2; never raised."""


class ShmQueueRuntimeError(ShmQueueException, RuntimeError):
    """The call makes no sense in this state or place: it was refused and did nothing."""


class ShmQueueCorruptedError(ShmQueueRuntimeError):
    """The segment is foreign, truncated or damaged: a value in it can't be. It was left alone."""


class ShmQueueNotInitializedError(ShmQueueException, RuntimeError):
    """The handle has been shut down, before the call or, by another thread, while it waited."""


class ShmQueueSerializationError(ShmQueueException):
    """The item can't be turned into bytes, or pickle would be needed and isn't allowed."""


class ShmQueueNoSerializerError(ShmQueueSerializationError, NotImplementedError):
    """The serialization method asked for is unknown here; see ``custom_serialize``."""


class ShmQueueDeserializationError(ShmQueueException):
    """An item's bytes can't be turned back. The item is off the queue; its bytes are in here.

    Attributes:
        payload: The item's bytes, whole.
        serialization_method: The method they were written by.
    """

    def __init__(self, message: str, *, payload: bytes, serialization_method: int) -> None:
        super().__init__(message)
        self.payload = payload
        self.serialization_method = serialization_method

    def __reduce__(self) -> tuple[Any, ...]:
        make = partial(type(self), payload=self.payload, serialization_method=self.serialization_method)
        return make, self.args, self.__dict__


class ShmQueueNoDeserializerError(ShmQueueDeserializationError, NotImplementedError):
    """The item was written by a method that is unknown here; see ``custom_deserialize``."""


class ShmQueueOSError(ShmQueueException, OSError):
    """The system refused: ``/dev/shm`` full or read-only, another user's segment, and the like.

    Made by ``system_error``, so that it is also a ``PermissionError``, ``FileNotFoundError`` etc.
    """

    _builtin = "OSError"

    def __reduce__(self) -> tuple[Any, ...]:
        _, args, *state = cast("tuple[Any, ...]", super().__reduce__())
        return _make_os_error, (self._builtin, args), *state


def system_error(errno: int, message: str) -> ShmQueueOSError:
    """Return the ``ShmQueueOSError`` of ``errno``, which is also the builtin that stands for it.

    >>> import errno
    >>> isinstance(system_error(errno.EACCES, "queue 'jobs': ..."), PermissionError)
    True
    """
    return _make_os_error(type(OSError(errno, message)).__name__, (errno, message))


def _make_os_error(builtin: str, args: tuple[Any, ...]) -> ShmQueueOSError:
    return _os_error_type(builtin)(*args)


@cache
def _os_error_type(builtin: str) -> type[ShmQueueOSError]:
    if builtin == ShmQueueOSError._builtin:
        return ShmQueueOSError
    bases = (ShmQueueOSError, getattr(builtins, builtin))
    namespace = {"__module__": __name__, "__doc__": ShmQueueOSError.__doc__, "_builtin": builtin}
    return type(f"ShmQueue{builtin}", bases, namespace)


def with_progress(error: E, accepted: int, remaining: Iterator[Any]) -> E:
    """Return ``error``, of whatever type, marked with how far a ``put_many`` had come."""
    vars(error).update(accepted=accepted, remaining=_Remaining(remaining))
    return error


class _Remaining(Iterator[Any]):
    """Items not accepted. Generators can't be pickled, and an error must be: it leaves them."""

    def __init__(self, items: Iterator[Any]) -> None:
        self._items = items

    def __next__(self) -> Any:
        return next(self._items)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[tuple[()]]]:
        return iter, ((),)
