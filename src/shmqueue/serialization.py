"""How an item becomes the bytes of a record, and how they become an item again.

Pure functions; they know no queue. The binding tries ``fast_codec``'s functions first and calls
``encode`` / ``decode`` whenever that raised or can't apply. The method id stands in the record's header:

    id             payload
    0              msgpack: exactly what ``msgpack.packb`` gives
    1              pickle, protocol 5: exactly what ``pickle.dumps`` gives
    2              the same, its large buffers out of band (below); never asked for by the user
    1001..2**24-1  whatever the user's own serializer returns

By default an item goes by the first that keeps it whole: msgpack where every part is of one of
msgpack's own types, never a subclass; pickle otherwise.

Three libraries give the same bytes for these types (``benchmarks/serialization.py`` shows the figures
and what each does to other types). msgspec turns sets, datetimes and dataclasses into something else
and can't be told not to. ormsgpack is the fastest that can, but takes neither keys that aren't str,
nor ExtType, nor more than 255 levels: there msgpack follows. Two things it does its own way: its markers
``Ext`` and ``Fragment`` ask for raw msgpack and arrive as what they spell, and where memory runs out it
aborts the process instead of raising MemoryError.

Payload of method 2, integers little-endian:

    offset    bytes  what
    0         8      number of buffers, n
    8         8      length of the pickle, p
    16        8 n    length of each buffer
    16 + 8 n  p      the pickle
    aligned   ...    each buffer, at the next *address* in the ring that 64 divides
    ...       ...    padding: a record's length is fixed before its address is known, at the sum of
                     all lengths and 63 for each buffer

Reader and writer find the buffers by the same sum: where ``phase`` is the address of the payload's
first byte modulo 64, a buffer begins at ``cursor + -(phase + cursor) % 64``.
"""

from __future__ import annotations

import contextlib
import copyreg
import functools
import importlib
import io
import math
import operator
import pickle
import re
import struct
import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import msgpack

from .exceptions import (
    ShmQueueDeserializationError,
    ShmQueueNoDeserializerError,
    ShmQueueNoSerializerError,
    ShmQueueSerializationError,
    ShmQueueTypeError,
    ShmQueueValueError,
)

if TYPE_CHECKING:
    from typing_extensions import Buffer

Serializer: TypeAlias = "Callable[[int, Any], Buffer]"
Deserializer: TypeAlias = "Callable[[int, list[memoryview]], Any]"


class SerializationMethods:
    """Ids for ``put(..., serialization_method=...)``; up to 1000 they are the package's own."""

    MSGPACK = 0
    DEFAULT = MSGPACK
    PICKLE = 1
    FIRST_PUBLIC_NUMBER = 1001


class Encoded(NamedTuple):
    """A payload: the method used, whether its parts but the first begin at addresses in the ring that 64 divides,
    and the parts, which follow each other."""

    method: int
    is_aligned: bool
    parts: tuple[Any, ...]


PICKLE_OUT_OF_BAND = 2
LAST_METHOD = 2**24 - 1  # the header keeps 24 bits
ALIGNMENT = 64

# Below this a buffer is copied into the pickle: the detour costs more than the copies it saves.
# The two meet at about 48 KiB; from 256 KiB on, where malloc turns to mmap, it saves 9 parts of 10.
OUT_OF_BAND_SIZE = 32 * 1024

MSGPACK_LEVELS = 1024
_U64 = 2**64 - 1
_CONTAINER_HEADS = bytes([*range(0x80, 0xA0), *range(0xDC, 0xE0)])

_BYTES_TYPES = frozenset({bytes, bytearray, memoryview})
_MSGPACK_TYPES = _BYTES_TYPES | {
    type(None), bool, int, float, str, list, tuple, dict, msgpack.ExtType, msgpack.Timestamp
}  # fmt: skip


def _find_ormsgpack() -> Any:
    """Return ormsgpack, or None where there is none fit for bytes from elsewhere.

    Earlier releases crash on a payload that claims to be long, and read released memoryviews.
    """
    try:
        import ormsgpack
    except ImportError:
        return None
    release = [int(number) for number in re.findall(r"\d+", ormsgpack.__version__)[:3]]
    return ormsgpack if release >= [1, 13, 1] else None


_ormsgpack = _find_ormsgpack()


# --- what the binding calls first -------------------------------------------------------------------


def fast_codec(strict_types: bool) -> tuple[Callable[..., bytes], int, Callable[[bytes], Any]]:
    """Return ``(pack, option, unpack)``, to be called as ``pack(item, None, option)`` and ``unpack(payload)``.

    They make and read payloads of method 0. If one raises an ``Exception``, ``encode`` or ``decode`` decides.
    """
    if _ormsgpack is None:
        return _pack, strict_types, _unpack_plainly
    option: int = (
        _ormsgpack.OPT_PASSTHROUGH_DATACLASS
        | _ormsgpack.OPT_PASSTHROUGH_DATETIME
        | _ormsgpack.OPT_PASSTHROUGH_ENUM
        | _ormsgpack.OPT_PASSTHROUGH_SUBCLASS
        | _ormsgpack.OPT_PASSTHROUGH_UUID
    )
    if strict_types:
        return _pack_strictly, option | _ormsgpack.OPT_PASSTHROUGH_TUPLE, _ormsgpack.unpackb
    return _ormsgpack.packb, option, _ormsgpack.unpackb


# --- items to bytes ---------------------------------------------------------------------------------


def encode(data: Any, method: int, *, allow_pickle: bool, strict_types: bool, custom: Serializer | None) -> Encoded:
    """Turn an item into the parts of a payload.

    Args:
        method: One of ``SerializationMethods``, or an id of the user's own.
        allow_pickle: Whether pickle may be used. If not, subclasses go as their base types.
        strict_types: Whether tuple, bytearray and memoryview must arrive as such.
        custom: ``custom(method, data)`` returns the payload, for the user's own ids.
    Returns:
        The payload; its parts are contiguous. Large bodies are the caller's own memory, not copies.
    Raises:
        ShmQueueSerializationError: it can't be done; the cause is chained.
        ShmQueueNoSerializerError: no serializer for this method.
        ShmQueueValueError: the method isn't an int or is too large.
        ShmQueueTypeError: ``custom`` returned something not bytes-like.
        What ``custom`` raises.
    """
    if not isinstance(method, int):
        raise ShmQueueValueError(f"serialization_method is an int, not {method!r}")
    if method > LAST_METHOD:
        raise ShmQueueValueError(f"serialization_method is at most {LAST_METHOD}, not {method}")
    if method >= SerializationMethods.FIRST_PUBLIC_NUMBER and custom is not None:
        return Encoded(int(method), False, (_result(custom(method, data)),))
    if method not in (SerializationMethods.MSGPACK, SerializationMethods.PICKLE):
        raise ShmQueueNoSerializerError(
            f"no serializer for method {method}; ids from "
            f"{SerializationMethods.FIRST_PUBLIC_NUMBER} on are served by custom_serialize"
        )
    try:
        if method == SerializationMethods.PICKLE:
            if not allow_pickle:
                raise TypeError("pickle was asked for")
            return Encoded(SerializationMethods.PICKLE, False, (pickle.dumps(data, 5),))
        return _encode_default(data, allow_pickle, strict_types)
    except MemoryError:
        raise
    except Exception as error:
        hint = "" if allow_pickle else "; the queue has allow_pickle=False: put msgpack types only"
        raise ShmQueueSerializationError(
            f"can't serialize {type(data).__name__}: {type(error).__name__}: {error}{hint}"
        ) from error


def _encode_default(data: Any, allow_pickle: bool, strict_types: bool) -> Encoded:
    kind = type(data)
    if kind is bytes or (kind in _BYTES_TYPES and not strict_types):
        body = _contiguous(data)
        return Encoded(SerializationMethods.MSGPACK, False, (bin_head(memoryview(body).nbytes), body))
    if kind in _MSGPACK_TYPES:
        try:
            return Encoded(SerializationMethods.MSGPACK, False, (_pack(data, None, strict_types),))
        except (TypeError, ValueError, OverflowError, RecursionError, BufferError):
            if strict_types and not allow_pickle:
                raise
    if allow_pickle:
        return _pickle_apart(data, strict_types)
    if strict_types:
        raise TypeError(f"strict_types keeps {kind.__name__} from going as its base type")
    return Encoded(SerializationMethods.MSGPACK, False, (_pack_as_bases(data),))


def _pack(data: Any, _default: None, strict_types: int) -> bytes:
    """Pack exact types by msgpack, which takes all keys, ExtType, Timestamp and 1024 levels."""
    packer = msgpack.Packer(
        strict_types=True,
        default=None if strict_types else _tuple_to_list,
        buf_size=512,  # the default, 256 KiB, takes longer to get than a small item to pack
    )
    packed: bytes = packer.pack(data)
    if len(packed) > MSGPACK_LEVELS:
        _check_levels(packed)
    return _checked(packed, data) if strict_types else packed


def _check_levels(packed: bytes) -> None:
    """Raise a ValueError if ``packed`` has more levels than msgpack unpacks; it packs one more."""
    if len(packed) - len(packed.translate(None, _CONTAINER_HEADS)) > MSGPACK_LEVELS:
        unpacker = msgpack.Unpacker(max_buffer_size=0)
        unpacker.feed(packed)
        unpacker.skip()


def _pack_strictly(data: Any, _default: None, option: int) -> bytes:
    return _checked(_ormsgpack.packb(data, None, option), data)


def _checked(packed: bytes, data: Any) -> bytes:
    """Return ``packed`` unless ``data`` holds what would arrive as bytes but isn't.

    No library can be told to refuse these. Where no byte can be a bin's head, nothing has to be
    looked through.
    """
    pending = [data] if any(head in packed for head in (b"\xc4", b"\xc5", b"\xc6")) else []
    while pending:
        item = pending.pop()
        if type(item) is list:
            pending.extend(item)
        elif type(item) is dict:
            pending.extend(item)
            pending.extend(item.values())
        elif type(item) in (bytearray, memoryview):
            raise TypeError(f"strict_types keeps {type(item).__name__} from going as bytes")
    return packed


def _tuple_to_list(part: Any) -> list[Any]:
    if type(part) is tuple:
        return list(part)
    raise TypeError(f"{type(part).__name__} is not a msgpack type")


def _pack_as_bases(data: Any) -> bytes:
    """Pack subclasses of msgpack types as their base types."""
    packed: bytes = msgpack.Packer(buf_size=512).pack(data)
    _unpack(packed)  # a dict or list whose iteration and length disagree would fail its reader
    return packed


def bin_head(size: int) -> bytes:
    """Return the head of a msgpack bin. One of 4 GiB isn't put anyway, whatever its head says."""
    if size < 1 << 8:
        return struct.pack(">BB", 0xC4, size)
    if size < 1 << 16:
        return struct.pack(">BH", 0xC5, size)
    return struct.pack(">BI", 0xC6, min(size, 0xFFFFFFFF))


def _contiguous(part: Any) -> Buffer:
    """Return a bytes-like object as one that is contiguous: itself where it is."""
    view = memoryview(part)
    return part if view.c_contiguous else view.tobytes()


def _result(part: Any) -> Buffer:
    try:
        return _contiguous(part)
    except (TypeError, ValueError, BufferError):
        raise ShmQueueTypeError(f"a custom serializer returns a bytes-like object, not {type(part).__name__}") from None


class _ViewPickler(pickle.Pickler):
    """Pickles memoryviews as the bytes that they show; pickle itself refuses them."""

    def reducer_override(self, obj: Any) -> Any:
        return (bytes, (obj.tobytes(),)) if type(obj) is memoryview else NotImplemented


def _pickle_apart(data: Any, strict_types: bool) -> Encoded:
    """Pickle, large buffers out of band."""
    buffers: list[memoryview] = []

    def is_in_band(buffer: pickle.PickleBuffer) -> bool:
        view = buffer.raw()
        if view.nbytes < OUT_OF_BAND_SIZE:
            return True
        buffers.append(view)
        return False

    try:
        pickled = _dumps(data, is_in_band)
    except TypeError:  # a memoryview, perhaps
        if strict_types:
            raise
        buffers.clear()
        file = io.BytesIO()
        _ViewPickler(file, 5, buffer_callback=is_in_band).dump(data)
        pickled = file.getvalue()
    if not buffers:
        return Encoded(SerializationMethods.PICKLE, False, (pickled,))
    return _joined_apart(pickled, buffers)


def _dumps(data: Any, is_in_band: Callable[[pickle.PickleBuffer], bool]) -> bytes:
    torch = sys.modules.get("torch")
    if torch is None or not hasattr(torch, "Tensor"):  # it isn't there, or just being imported
        return pickle.dumps(data, 5, buffer_callback=is_in_band)
    file = io.BytesIO()
    pickler = pickle.Pickler(file, 5, buffer_callback=is_in_band)
    reducers: dict[type, Callable[[Any], Any]] = {torch.Tensor: _reduce_tensor}
    pickler.dispatch_table = {**copyreg.dispatch_table, **reducers}
    pickler.dump(data)
    return file.getvalue()


def _reduce_tensor(tensor: Any) -> Any:
    """Reduce a tensor on the CPU to an array, whose buffer goes out of band; torch would copy its whole storage."""
    if tensor.requires_grad or tensor.device.type != "cpu" or vars(tensor):
        return tensor.__reduce_ex__(5)
    try:
        array = tensor.numpy()
    except (TypeError, RuntimeError):  # sparse, conjugated, bfloat16, ...
        return tensor.__reduce_ex__(5)
    return tensor_of, (array,)


def tensor_of(array: Any) -> Any:
    """Return a tensor on the array's memory. torch knows no read-only ones: who writes to a leased one changes the item
    for whom it is delivered to next."""
    import numpy

    torch = importlib.import_module("torch")
    return torch.from_numpy(array if array.flags.writeable else numpy.asarray(_Writable(array)))


class _Writable:
    """An array's memory, to numpy, as if it could be written to; torch warns of any that can't."""

    def __init__(self, array: Any) -> None:
        interface = array.__array_interface__
        self.__array_interface__ = interface | {"data": (interface["data"][0], False)}
        self._array = array  # keeps the memory


def _joined_apart(pickled: bytes | memoryview, buffers: list[memoryview]) -> Encoded:
    lengths = [len(pickled), *(buffer.nbytes for buffer in buffers)]
    head = struct.pack(f"<{1 + len(lengths)}Q", len(buffers), *lengths)
    return Encoded(PICKLE_OUT_OF_BAND, True, (head + pickled, *buffers))


class ArrayLayout(NamedTuple):
    """Where the payload of an array that is yet to be filled has what."""

    head: bytes
    """All before the array."""

    nbytes: int
    shape: tuple[int, ...]
    dtype: Any
    order: str

    @property
    def size(self) -> int:
        """Bytes of the payload."""
        return len(self.head) + self.nbytes + ALIGNMENT - 1

    def array_in(self, payload: memoryview, phase: int) -> Any:
        """Write the head; return the array, which can be written to."""
        payload[: len(self.head)] = self.head
        start = len(self.head) + -(phase + len(self.head)) % ALIGNMENT
        flat = sys.modules["numpy"].frombuffer(payload[start : start + self.nbytes], self.dtype)
        return flat.reshape(self.shape, order=self.order)


class _Reduced:
    """Pickled as the call of a function."""

    def __init__(self, function: Any, arguments: tuple[Any, ...]) -> None:
        self._call = function, arguments

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self._call


def array_layout(shape: Any, dtype: Any, order: Any) -> ArrayLayout:
    """Return the layout of an array's payload.

    Args:
        shape: An int, or a sequence of them.
        dtype: What ``numpy.dtype`` takes.
        order: C or F.

    Raises:
        ShmQueueSerializationError: it holds objects, or its elements have no bytes.
        ShmQueueValueError: another order, or a negative dimension.
        ShmQueueTypeError: a shape or dtype that is none.
    """
    import numpy

    try:
        dimensions = tuple(map(operator.index, shape if isinstance(shape, Iterable) else (shape,)))
    except TypeError:
        raise ShmQueueTypeError(f"shape is an int or a sequence of them, not {shape!r}") from None
    if min(dimensions, default=0) < 0:
        raise ShmQueueValueError(f"shape {dimensions} has a negative dimension")
    if order not in ("C", "F"):
        raise ShmQueueValueError(f"order is 'C' or 'F', not {order!r}")
    try:
        return _array_layout(dimensions, numpy.dtype(dtype), order)
    except TypeError as error:
        raise ShmQueueTypeError(f"dtype {dtype!r}: {error}") from None


@functools.lru_cache(maxsize=64)
def _array_layout(shape: tuple[int, ...], dtype: Any, order: str) -> ArrayLayout:
    import numpy

    if dtype.hasobject or not dtype.itemsize:
        what = "holds objects" if dtype.hasobject else "has no bytes"
        raise ShmQueueSerializationError(f"an array of {dtype} {what} and can't be reserved; put it")
    # What numpy pickles an array as; by itself it would copy some dtypes into the pickle.
    from_buffer = numpy.empty(0, "u1").__reduce_ex__(5)[0]
    reduced = _Reduced(from_buffer, (pickle.PickleBuffer(b""), dtype, shape, order))
    pickled = pickle.dumps(reduced, 5, buffer_callback=lambda _: False)
    nbytes = math.prod(shape) * dtype.itemsize
    return ArrayLayout(struct.pack("<3Q", 1, len(pickled), nbytes & _U64) + pickled, nbytes, shape, dtype, order)


def again(method: int, payload: bytes | memoryview, phase: int) -> Encoded:
    """Return the parts of a payload that was in the ring at an address with this phase, to be put elsewhere.

    Raises:
        ShmQueueDeserializationError: it is of method 2 and malformed.
    """
    if method != PICKLE_OUT_OF_BAND:
        return Encoded(method, False, (payload,))
    try:
        return _joined_apart(*_parts_apart(memoryview(payload), phase))
    except (ValueError, struct.error) as error:
        raise _undecodable(method, payload, error) from error


# --- bytes to items ---------------------------------------------------------------------------------


def decode(
    method: int,
    payload: bytes | bytearray | memoryview,
    phase: int,
    *,
    allow_pickle: bool,
    custom: Deserializer | None,
) -> Any:
    """Turn a payload into the item.

    Args:
        method: The id in the record's header.
        payload: All bytes of the record. The item of method 2 keeps and uses this memory, which is
            why arrays can be written to only if it can.
        phase: Address of the payload's first byte in the ring, modulo 64.
        allow_pickle: Whether pickle may be used.
        custom: ``custom(method, [view])`` returns the item, for the user's own ids. The view is
            read-only and released afterwards.
    Raises:
        ShmQueueDeserializationError: it can't be done, for whatever reason; the cause is chained.
        ShmQueueNoDeserializerError: it can't be done for lack of a deserializer.
    """
    try:
        if method == SerializationMethods.MSGPACK:
            return _unpack(payload)
        if method in (SerializationMethods.PICKLE, PICKLE_OUT_OF_BAND):
            if not allow_pickle:
                raise TypeError("it is a pickle, and the queue has allow_pickle=False")
            if method == SerializationMethods.PICKLE:
                return pickle.loads(payload)
            return _unpickle_apart(memoryview(payload), phase)
        if method < SerializationMethods.FIRST_PUBLIC_NUMBER or custom is None:
            raise NotImplementedError("no deserializer; see custom_deserialize")
        return _call(custom, method, memoryview(payload).toreadonly())
    except Exception as error:
        raise _undecodable(method, payload, error) from error


def _undecodable(method: int, payload: bytes | bytearray | memoryview, why: Exception) -> ShmQueueDeserializationError:
    is_missing = isinstance(why, NotImplementedError) and method > PICKLE_OUT_OF_BAND
    return (ShmQueueNoDeserializerError if is_missing else ShmQueueDeserializationError)(
        f"can't deserialize {len(payload)} bytes of serialization method {method}: {type(why).__name__}: {why}",
        payload=bytes(payload),
        serialization_method=method,
    )


def _unpack(payload: bytes | bytearray | memoryview) -> Any:
    """Unpack what the fast way doesn't: other keys than str, ExtType, Timestamp; by msgpack ExtType as a key and more
    than 1022 levels."""
    if _ormsgpack is not None:
        with contextlib.suppress(ValueError):
            return _ormsgpack.unpackb(payload, ext_hook=_unpack_ext, option=_ormsgpack.OPT_NON_STR_KEYS)
    return msgpack.unpackb(payload, strict_map_key=False, object_pairs_hook=_dict_of_pairs)


def _unpack_plainly(payload: bytes) -> Any:
    return msgpack.unpackb(payload, strict_map_key=False)


def _unpack_ext(code: int, data: bytes) -> msgpack.ExtType | msgpack.Timestamp:
    return msgpack.Timestamp.from_bytes(data) if code == -1 else msgpack.ExtType(code, data)


def _dict_of_pairs(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    return {_to_key(key): value for key, value in pairs}


def _to_key(key: Any) -> Any:
    """Return a key, an array being a tuple there all the way down, and that may be 1024 levels."""
    return msgpack.unpackb(msgpack.packb(key), use_list=False) if type(key) is list else key


def _unpickle_apart(payload: memoryview, phase: int) -> Any:
    pickled, buffers = _parts_apart(payload, phase)
    return pickle.loads(pickled, buffers=buffers)


def _parts_apart(payload: memoryview, phase: int) -> tuple[memoryview, list[memoryview]]:
    """Return method 2's pickle and buffers. Its head is believed only as far as it fits; slices never reach too far."""
    count, pickle_length = struct.unpack_from("<2Q", payload)
    pickle_start = 16 + 8 * count
    cursor = pickle_end = pickle_start + pickle_length
    buffers = []
    for length in struct.unpack_from(f"<{count}Q", payload, 16):  # refuses more than there is
        start = cursor + -(phase + cursor) % ALIGNMENT
        cursor = start + length
        buffers.append(payload[start:cursor])
    if cursor > len(payload):
        raise ValueError(f"{cursor} bytes claimed")
    return payload[pickle_start:pickle_end], buffers


def _call(custom: Deserializer, method: int, view: memoryview) -> Any:
    try:
        return custom(method, [view])
    finally:
        with contextlib.suppress(BufferError):  # the user kept an array on it; the memory stays
            view.release()
