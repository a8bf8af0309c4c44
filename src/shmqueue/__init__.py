"""shmqueue: a named FIFO queue in shared memory. Any process on the machine opens it by name.

>>> q = ShmQueue("jobs"); q.put({"hello": "world"}); item = q.get(timeout=2.0)
"""

from . import exceptions
from ._core import Lease
from .exceptions import (
    ShmQueueBufferOverflow,
    ShmQueueCorruptedError,
    ShmQueueDeserializationError,
    ShmQueueEmpty,
    ShmQueueException,
    ShmQueueFull,
    ShmQueueNotInitializedError,
    ShmQueueOSError,
    ShmQueueRuntimeError,
    ShmQueueSerializationError,
    ShmQueueTypeError,
    ShmQueueValueError,
)
from .queue import SIZE_HEADER, SYSTEM_PAGESIZE, ShmQueue, ShmRefDataSnapshot
from .reflog import DebugRefLogAction
from .serialization import SerializationMethods
from .views import Reservation

__version__ = "0.1.0"

__all__ = [
    "SIZE_HEADER",
    "SYSTEM_PAGESIZE",
    "DebugRefLogAction",
    "Lease",
    "Reservation",
    "SerializationMethods",
    "ShmQueue",
    "ShmQueueBufferOverflow",
    "ShmQueueCorruptedError",
    "ShmQueueDeserializationError",
    "ShmQueueEmpty",
    "ShmQueueException",
    "ShmQueueFull",
    "ShmQueueNotInitializedError",
    "ShmQueueOSError",
    "ShmQueueRuntimeError",
    "ShmQueueSerializationError",
    "ShmQueueTypeError",
    "ShmQueueValueError",
    "ShmRefDataSnapshot",
    "__version__",
    "exceptions",
]
