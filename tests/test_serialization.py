"""Items become bytes and come back equal and of their own types, whichever library did the work.

The real ways through the binding are imitated: fast functions first, ``encode`` / ``decode`` when they
raise. ROUTES are those with ormsgpack, without it, and by ``encode`` / ``decode`` alone.
"""

from __future__ import annotations

import array
import collections
import contextlib
import dataclasses
import datetime
import decimal
import enum
import fractions
import itertools
import pathlib
import pickle
import random
import struct
import threading
import time
import types
import uuid
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shmqueue import exceptions, serialization
from shmqueue.serialization import ALIGNMENT, LAST_METHOD, OUT_OF_BAND_SIZE, PICKLE_OUT_OF_BAND, SerializationMethods

MSGPACK, PICKLE = SerializationMethods.MSGPACK, SerializationMethods.PICKLE
ROUTES = ("ormsgpack", "msgpack", "slow")
USER = SerializationMethods.FIRST_PUBLIC_NUMBER + 1
BYTES_TYPES = (bytes, bytearray, memoryview)

few = settings(max_examples=100, deadline=None)


class Sent(NamedTuple):
    """One item on its way: what a record in the ring holds."""

    method: int
    payload: bytearray
    phase: int


def put(
    item: Any,
    method: Any = MSGPACK,
    *,
    route: str = "slow",
    allow_pickle: bool = True,
    strict_types: bool = False,
    custom: Any = None,
    phase: int = 0,
) -> Sent:
    """Lay an item out as the ring does."""
    if route != "slow" and method == MSGPACK and type(item) not in BYTES_TYPES:
        pack, option, _ = fast(route, strict_types)
        with contextlib.suppress(Exception):
            return Sent(MSGPACK, bytearray(pack(item, None, option)), phase)
    used, is_aligned, parts = serialization.encode(
        item, method, allow_pickle=allow_pickle, strict_types=strict_types, custom=custom
    )
    payload = bytearray(parts[0])
    for part in parts[1:]:
        if is_aligned:
            payload += bytes(-(phase + len(payload)) % ALIGNMENT)
        payload += part
    if is_aligned:
        fixed_before = sum(memoryview(part).nbytes for part in parts) + (ALIGNMENT - 1) * (len(parts) - 1)
        payload += bytes(fixed_before - len(payload))
    return Sent(used, payload, phase)


def get(sent: Sent, *, route: str = "slow", allow_pickle: bool = True, custom: Any = None) -> Any:
    if route != "slow" and sent.method == MSGPACK:
        _, _, unpack = fast(route, False)
        with contextlib.suppress(Exception):
            return unpack(sent.payload)
    return serialization.decode(
        sent.method, memoryview(sent.payload), sent.phase, allow_pickle=allow_pickle, custom=custom
    )


def fast(route: str, strict_types: bool) -> Any:
    if route == "ormsgpack":
        return serialization.fast_codec(strict_types)
    with mock.patch.object(serialization, "_ormsgpack", None):
        return serialization.fast_codec(strict_types)


def same(sent: Any, got: Any, *, tuples: bool = True) -> bool:
    """Equal and of the same exact types all the way down; floats to the bit. Or a tuple came as a list."""
    if type(sent) is tuple and not tuples:
        sent = list(sent)
    if type(sent) is not type(got):
        return False
    if type(sent) in (list, tuple):
        return len(sent) == len(got) and all(map(lambda a, b: same(a, b, tuples=tuples), sent, got))
    if type(sent) is dict:
        keys = all(map(same, sent, got))
        return len(sent) == len(got) and keys and same([*sent.values()], [*got.values()], tuples=tuples)
    if type(sent) is float:
        return struct.pack("d", sent) == struct.pack("d", got)
    return bool(sent == got)


# --- what random items do ------------------------------------------------------------------------

scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text()
    | st.binary()
    | st.builds(msgpack.ExtType, st.integers(0, 127), st.binary())
    | st.builds(msgpack.Timestamp, st.integers(-(2**63), 2**63 - 1), st.integers(0, 10**9 - 1))
)
keys = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3).map(tuple), max_leaves=4)


def nested(leaves: st.SearchStrategy[Any], names: st.SearchStrategy[Any] = keys) -> st.SearchStrategy[Any]:
    return st.recursive(
        leaves,
        lambda inner: (
            st.lists(inner)
            | st.lists(inner).map(tuple)
            | st.dictionaries(names, inner)
            | st.dictionaries(st.text(), inner)
        ),
        max_leaves=20,
    )


@pytest.mark.parametrize("route", ROUTES)
def test_random_msgpack_items_take_exactly_the_bytes_of_msgpack_and_return_whole(route: str) -> None:
    @few
    @given(nested(scalars))
    def check(item: Any) -> None:
        sent = put(item, route=route)
        assert (sent.method, sent.payload) == (MSGPACK, msgpack.packb(item))
        assert same(item, get(sent, route=route), tuples=False)
        assert same(item, get(sent), tuples=False)

    check()


@pytest.mark.parametrize("route", ROUTES)
def test_strict_types_keep_tuples_and_mutable_bytes_in_random_items(route: str) -> None:
    @few
    @given(nested(scalars | st.binary().map(bytearray), scalars))
    def check(item: Any) -> None:
        sent = put(item, route=route, strict_types=True)
        expected = pickle.dumps(item, 5) if sent.method == PICKLE else msgpack.packb(item)
        assert sent.payload == expected
        assert same(item, get(sent, route=route))

    check()


# --- what odd types do ---------------------------------------------------------------------------


class Level(enum.IntEnum):
    HIGH = 3


class Name(str, enum.Enum):
    FOX = "fox"


class Plain(enum.Enum):
    ONE = 1


class Text(str): ...


class Raw(bytes): ...


class Number(int): ...


class Real(float): ...


class Row(list): ...  # type: ignore[type-arg]


class Pair(tuple): ...  # type: ignore[type-arg]


class Table(dict): ...  # type: ignore[type-arg]


class Buffer(bytearray): ...


class Ext(msgpack.ExtType): ...  # type: ignore[misc]


class Point(NamedTuple):
    x: int
    y: int


@dataclasses.dataclass
class Box:
    size: int


@dataclasses.dataclass(frozen=True)
class Frozen:
    __slots__ = ("size",)
    size: int

    def __reduce__(self) -> Any:
        return Frozen, (self.size,)


class Model:
    """Like pydantic's: validates, and has a dict of its own."""

    model_config: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, size: int) -> None:
        self.__dict__["size"] = size

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Model) and vars(self) == vars(other)

    __hash__ = None  # type: ignore[assignment]


NOW = datetime.datetime(2024, 2, 29, 12, 30, 15, 123456)
BY_BASE = [
    Level.HIGH, Name.FOX, Text("a"), Raw(b"a"), Number(1), Real(1.5), Row([1]), Pair((1,)), Table(a=1), Buffer(b"a"),
    Point(1, 2), Ext(5, b"x"),
    collections.OrderedDict(a=1), collections.defaultdict(int, a=1), collections.Counter("aab"),
]  # fmt: skip
BY_PICKLE_ALONE = [
    Plain.ONE, Box(1), Frozen(1), Model(1), {1, 2}, frozenset({1}), 1j, range(3), 2**64, -(2**63) - 1, "\ud800", NOW,
    NOW.replace(tzinfo=datetime.timezone.utc), NOW.date(), NOW.time(), datetime.timedelta(1), uuid.UUID(int=5),
    decimal.Decimal("1.10"), fractions.Fraction(1, 3), pathlib.PurePosixPath("a"), array.array("i", [1, 2]), ..., int,
    collections.deque([1]), collections.ChainMap({"a": 1}), types.SimpleNamespace(a=1), ValueError,
]  # fmt: skip
ODD = BY_BASE + BY_PICKLE_ALONE


def around(item: Any) -> Iterator[Any]:
    """The item itself and deep within others, also as a key."""
    yield item
    yield [item]
    yield (1, {"a": [item]})
    with contextlib.suppress(TypeError):
        yield {item: 1}
        yield [{(1, item): 1}]


@pytest.mark.parametrize("odd", ODD, ids=lambda odd: type(odd).__name__)
def test_subclasses_and_foreign_types_go_by_pickle_anywhere_and_keep_their_type(odd: Any) -> None:
    for item, route in itertools.product(around(odd), ROUTES):
        sent = put(item, route=route)
        assert (sent.method, sent.payload) == (PICKLE, pickle.dumps(item, 5))
        assert same(item, get(sent, route=route))


@pytest.mark.parametrize("route", ["ormsgpack", "msgpack"])
def test_fast_functions_need_no_help_with_msgpack_types(route: str) -> None:
    item = {"id": 1, "at": [2.5, None, True, b"x", ()]}
    pack, option, unpack = fast(route, False)
    assert pack(item, None, option) == msgpack.packb(item)
    assert unpack(msgpack.packb(item)) == {**item, "at": [2.5, None, True, b"x", []]}


@few
@given(nested(scalars | st.sampled_from(ODD), scalars | st.sampled_from([Level.HIGH, Text("k"), frozenset()])))
def test_random_items_with_odd_parts_return_whole(item: Any) -> None:
    for route in ROUTES:
        sent = put(item, route=route)
        assert sent.payload == (pickle.dumps(item, 5) if sent.method == PICKLE else msgpack.packb(item))
        assert same(item, get(sent, route=route), tuples=sent.method == PICKLE)


@pytest.mark.parametrize("base", BY_BASE, ids=lambda base: type(base).__name__)
def test_without_pickle_subclasses_go_as_their_base_type(base: Any) -> None:
    for item in around(base):
        sent = put(item, allow_pickle=False)
        assert (sent.method, sent.payload) == (MSGPACK, msgpack.packb(item))
        assert get(sent, allow_pickle=False) == get(Sent(MSGPACK, bytearray(msgpack.packb(item)), 0))
        with pytest.raises(exceptions.ShmQueueSerializationError, match=rf"'tuple'|{type(base).__name__}"):
            put(item, allow_pickle=False, strict_types=True)


@pytest.mark.parametrize("odd", BY_PICKLE_ALONE, ids=lambda odd: type(odd).__name__)
def test_without_pickle_foreign_types_are_refused_with_advice(odd: Any) -> None:
    for item in around(odd):
        with pytest.raises(exceptions.ShmQueueSerializationError, match="allow_pickle=False") as caught:
            put(item, allow_pickle=False)
        assert caught.value.__cause__ is not None


def test_refusal_names_the_part_that_is_to_blame() -> None:
    with pytest.raises(exceptions.ShmQueueSerializationError, match=r"can't serialize dict: .*'set' object"):
        put({"a": [{1}]}, allow_pickle=False)


def test_without_pickle_a_list_that_lies_about_its_length_is_refused_not_garbled() -> None:
    class Liar(list):  # type: ignore[type-arg]
        def __iter__(self) -> Iterator[Any]:
            return iter(())

    with pytest.raises(exceptions.ShmQueueSerializationError):
        put(Liar([1, 2]), allow_pickle=False)


def test_ormsgpack_markers_arrive_as_what_they_spell() -> None:
    ormsgpack = pytest.importorskip("ormsgpack", minversion="1.13.1")
    marked = [ormsgpack.Ext(5, b"x"), ormsgpack.Fragment(b"\x91\x01")]
    assert get(put(marked, route="ormsgpack"), route="ormsgpack") == [msgpack.ExtType(5, b"x"), [1]]


@pytest.mark.parametrize("release", ["1.12.2", "1.13.0"])
def test_releases_of_ormsgpack_that_crash_on_corrupt_payloads_are_not_used(release: str) -> None:
    with mock.patch.dict("sys.modules", ormsgpack=types.SimpleNamespace(__version__=release)):
        assert serialization._find_ormsgpack() is None


# --- bytes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 255, 256, 65535, 65536, 1_000_000])
def test_bytes_take_the_bytes_of_msgpack_and_are_not_copied(size: int) -> None:
    body = random.Random(size).randbytes(size)
    for item in (body, bytearray(body), memoryview(body)):
        method, is_aligned, parts = serialization.encode(
            item, MSGPACK, allow_pickle=False, strict_types=False, custom=None
        )
        assert (method, is_aligned, parts[1] is item) == (MSGPACK, False, True)
        assert b"".join(parts) == msgpack.packb(body)
        assert same(body, get(put(item)))


VIEWS = {
    "strided": memoryview(b"abcdef")[::2],
    "reversed": memoryview(b"abc")[::-1],
    "two-dimensional": memoryview(bytes(range(12))).cast("I", (1, 3)),
    "of ints": memoryview(array.array("q", [1, -2])),
    "empty": memoryview(b"")[::2],
}


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_memoryviews_of_any_shape_arrive_as_their_bytes(view: memoryview, route: str) -> None:
    block = bytes(OUT_OF_BAND_SIZE)
    sent = put([Block(block), view], route=route)
    assert len(sent.payload) < 2 * OUT_OF_BAND_SIZE
    assert get(sent, route=route)[0].memory == block
    for item, arrives in (
        (view, view.tobytes()),
        ([view, 1], [view.tobytes(), 1]),
        ({"a": view, "b": {1}}, {"a": view.tobytes(), "b": {1}}),
    ):
        assert same(arrives, get(put(item, route=route), route=route))


@pytest.mark.parametrize("route", ROUTES)
def test_strict_types_refuse_memoryviews_which_nothing_can_keep(route: str) -> None:
    for item in (memoryview(b"a"), [memoryview(b"a")], {memoryview(b"a"): 1}):
        with pytest.raises(exceptions.ShmQueueSerializationError, match="memoryview"):
            put(item, route=route, strict_types=True)


def test_released_memoryview_is_refused() -> None:
    view = memoryview(b"abc")
    view.release()
    for item in (view, [view]):
        with pytest.raises(exceptions.ShmQueueSerializationError, match="released"):
            put(item)


# --- depth and size ------------------------------------------------------------------------------


def layers(depth: int, *, core: Any = 1, wrap: Callable[[Any], Any] = lambda inner: [inner]) -> Any:
    for _ in range(depth):
        core = wrap(core)
    return core


def might_refuse(is_deep: bool) -> contextlib.AbstractContextManager[Any]:
    """Beyond msgpack's depth pickle decides, and how deep that goes depends on the interpreter."""
    return contextlib.suppress(*[exceptions.ShmQueueSerializationError] * is_deep)


def peeled(item: Any) -> int:
    depth = 0
    while item != 1:
        item = next(iter(item.values() if type(item) is dict else item))
        depth += 1
    return depth


WRAPS: dict[str, Callable[[Any], Any]] = {
    "list": lambda inner: [inner],
    "tuple": lambda inner: (inner,),
    "dict": lambda inner: {"a": inner},
    "dict with int key": lambda inner: {1: inner},
}


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
def test_deep_items_arrive_or_are_refused_at_once(wrap: Callable[[Any], Any], route: str) -> None:
    for depth in (254, 255, 256, 510, 1022, 1023, 1024, 1025, 1026, 3000, 100_000):
        item = layers(depth, wrap=wrap)
        with pytest.raises(exceptions.ShmQueueSerializationError) if depth > 5000 else might_refuse(depth > 1024):
            assert peeled(get(put(item, route=route), route=route)) == depth
        with pytest.raises(exceptions.ShmQueueSerializationError) if depth > 1024 else contextlib.nullcontext():
            assert peeled(get(put(item, route=route, allow_pickle=False), route=route)) == depth


@pytest.mark.parametrize("route", ROUTES)
def test_tuples_as_keys_survive_at_any_depth(route: str) -> None:
    for depth in (1, 200, 500, 1000, 1022, 1023):
        key = layers(depth, wrap=lambda inner: (inner,))
        got = get(put({key: [(2,)], msgpack.ExtType(1, b"a"): 3}, route=route), route=route)
        (name, value), _ = got.items()
        assert (type(name), peeled(name), value) == (tuple, depth, [[2]])


def test_item_that_contains_itself_returns_with_the_same_shape() -> None:
    item: list[Any] = [1]
    item.append(item)
    got = get(put(item, route="ormsgpack"))
    assert got[1] is got
    with pytest.raises(exceptions.ShmQueueSerializationError):
        put(item, allow_pickle=False)


@pytest.mark.parametrize("route", ROUTES)
def test_large_and_empty_items_return_whole(route: str) -> None:
    for item in ("x" * 10**6, "\u20ac" * 10**5, list(range(10**5)), {str(n): n for n in range(10**4)}, "", [], {}, ()):
        assert same(item, get(put(item, route=route), route=route), tuples=False)


# --- large buffers -------------------------------------------------------------------------------


class Block:
    """An object with memory of its own, as arrays have."""

    def __init__(self, memory: Any) -> None:
        self.memory = memory

    def __reduce_ex__(self, protocol: Any) -> Any:
        return Block, (pickle.PickleBuffer(self.memory),)


@given(
    st.lists(st.integers(OUT_OF_BAND_SIZE, OUT_OF_BAND_SIZE + 99), min_size=1, max_size=4),
    st.integers(0, ALIGNMENT - 1),
    st.lists(st.integers(0, 99), max_size=3),
)
@settings(max_examples=50, deadline=None)
def test_large_buffers_lie_aligned_in_the_payload_and_are_used_in_place(
    large: list[int], phase: int, small: list[int]
) -> None:
    blocks = [bytearray(random.Random(n).randbytes(n)) for n in large + small]
    blocks.append(bytes(blocks[0]))  # type: ignore[arg-type]
    sent = put({"blocks": [Block(block) for block in blocks]}, phase=phase)
    assert sent.method == PICKLE_OUT_OF_BAND
    got = [block.memory for block in get(sent)["blocks"]]
    assert got == blocks
    assert [memoryview(memory).readonly for memory in got] == [False] * (len(blocks) - 1) + [True]
    first = bytes(blocks[0])
    assert (phase + sent.payload.index(first)) % ALIGNMENT == 0
    got[0][0] ^= 255
    assert first not in sent.payload[: len(sent.payload) // (len(large) + 1) + ALIGNMENT]


def test_objects_without_large_buffers_take_exactly_the_bytes_of_pickle() -> None:
    item = [Block(bytearray(OUT_OF_BAND_SIZE - 1)), Block(b"")]
    assert put(item)[:2] == (PICKLE, pickle.dumps(item, 5))


def test_pickle_asked_for_is_in_band_whatever_the_size() -> None:
    item = Block(bytearray(OUT_OF_BAND_SIZE))
    assert put(item, PICKLE)[:2] == (PICKLE, pickle.dumps(item, 5))


def test_arrays_return_equal_aligned_and_as_writable_as_they_were() -> None:
    np = pytest.importorskip("numpy")
    plain = np.arange(2 * OUT_OF_BAND_SIZE // 8, dtype="f8").reshape(2, -1)
    fixed = plain.copy()
    fixed.flags.writeable = False
    empty = np.zeros((0, 3))
    item = {"a": [plain, fixed], 1: (np.asfortranarray(plain), plain[:, ::2], plain[:1, :2], empty), "n": np.float64(1)}
    got = get(put(item, phase=13))
    for sent, arrived in zip([*item["a"], *item[1]], [*got["a"], *got[1]], strict=True):
        assert (sent == arrived).all()
        assert (sent.dtype, sent.shape, sent.flags.writeable) == (arrived.dtype, arrived.shape, arrived.flags.writeable)
    assert type(got["n"]) is np.float64
    got["a"][0][:] = 0
    for small in (np.arange(3), np.array(["x", None]), np.array(5)):
        assert put(small)[:2] == (PICKLE, pickle.dumps(small, 5))
        assert (get(put(small)) == small).all()


# --- what fails ----------------------------------------------------------------------------------


class Raiser:
    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __reduce__(self) -> Any:
        raise self.error


def unfinished() -> Any:
    raise NotImplementedError


class Unfinished:
    def __reduce__(self) -> Any:
        return unfinished, ()


@pytest.mark.parametrize("method", [MSGPACK, PICKLE])
@pytest.mark.parametrize("item", [lambda: 1, threading.Lock(), (n for n in ()), Raiser(ZeroDivisionError())])
def test_what_cannot_be_pickled_is_refused_with_its_cause(item: Any, method: int) -> None:
    for whole in (item, [item], {"a": item}):
        with pytest.raises(exceptions.ShmQueueSerializationError, match="can't serialize") as caught:
            put(whole, method)
        assert caught.value.__cause__ is not None


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt, SystemExit])
def test_no_memory_and_interrupts_pass_unchanged(error: type[BaseException]) -> None:
    for method in (MSGPACK, PICKLE):
        with pytest.raises(error):
            put([Raiser(error())], method)
    with mock.patch.object(msgpack, "Packer", side_effect=error), pytest.raises(error):
        put([1])


def test_unknown_methods_are_told_apart_from_impossible_ones() -> None:
    for method in (-1, 2, 3, 1000, 1001, LAST_METHOD):
        with pytest.raises(NotImplementedError) as caught:
            put(1, method)
        assert isinstance(caught.value, exceptions.ShmQueueSerializationError)
    for method in (-1, 2, 1000):
        with pytest.raises(NotImplementedError):
            put(1, method, custom=lambda *_: b"")
    for impossible in (1.0, "0", None, LAST_METHOD + 1, 2**70):
        with pytest.raises(exceptions.ShmQueueValueError, match="serialization_method"):
            put(1, impossible, custom=lambda *_: b"")


def test_pickle_is_refused_at_both_ends_when_not_allowed() -> None:
    with pytest.raises(exceptions.ShmQueueSerializationError, match="allow_pickle=False"):
        put(1, PICKLE, allow_pickle=False)
    for item in ({1}, Block(bytearray(OUT_OF_BAND_SIZE))):
        sent = put(item)
        with pytest.raises(exceptions.ShmQueueDeserializationError, match="allow_pickle=False") as caught:
            get(sent, allow_pickle=False)
        assert (caught.value.payload, caught.value.serialization_method) == (sent.payload, sent.method)


def test_custom_serializer_may_return_anything_bytes_like() -> None:
    for result in (b"abc", bytearray(b"abc"), memoryview(b"aabbcc")[::2], array.array("b", b"abc")):
        sent = put(1, USER, custom=lambda method, data, result=result: result)
        assert sent[:2] == (USER, b"abc")
        assert get(sent, custom=lambda method, chunks: (method, b"".join(chunks))) == (USER, b"abc")
    released = memoryview(b"a")
    released.release()
    for result in ("abc", None, 5, released):  # type: ignore[assignment]
        with pytest.raises(exceptions.ShmQueueTypeError, match=type(result).__name__):
            put(1, USER, custom=lambda method, data, result=result: result)
    with pytest.raises(ZeroDivisionError):
        put(1, USER, custom=lambda method, data: 1 // 0)


def test_custom_deserializer_gets_one_read_only_view_that_ends_with_the_call() -> None:
    kept: list[memoryview] = []
    sent = Sent(USER, bytearray(b"abc"), 0)

    def custom(method: int, chunks: list[memoryview]) -> bytes:
        kept.extend(chunks)
        assert chunks[0].readonly
        return chunks[0].tobytes()

    assert get(sent, custom=custom) == b"abc"
    with pytest.raises(ValueError, match="released"):
        len(kept[0])
    export = get(sent, custom=lambda method, chunks: pickle.PickleBuffer(chunks[0]))
    assert bytes(export) == b"abc"


def test_missing_deserializer_is_also_not_implemented() -> None:
    def choosy(method: int, chunks: list[memoryview]) -> Any:
        raise NotImplementedError

    for method, custom in ((USER, None), (USER, choosy), (7, choosy)):
        with pytest.raises(exceptions.ShmQueueDeserializationError) as caught:
            get(Sent(method, bytearray(b"abc"), 0), custom=custom)
        assert isinstance(caught.value, NotImplementedError)
        assert (caught.value.payload, caught.value.serialization_method) == (b"abc", method)


def test_pickled_object_that_is_not_implemented_is_no_missing_deserializer() -> None:
    with pytest.raises(exceptions.ShmQueueDeserializationError) as caught:
        get(put(Unfinished()))
    assert not isinstance(caught.value, NotImplementedError)


def test_failing_deserializer_loses_nothing() -> None:
    with pytest.raises(exceptions.ShmQueueDeserializationError, match="ZeroDivisionError") as caught:
        get(Sent(USER, bytearray(b"abc"), 0), custom=lambda method, chunks: 1 // 0)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert not isinstance(caught.value, NotImplementedError)
    assert caught.value.payload == b"abc"


# --- corrupt payloads ----------------------------------------------------------------------------


def mutated(payload: bytes, rng: random.Random, end: int) -> bytearray:
    """Change, remove and insert some of the first ``end`` bytes; heads that claim much come often."""
    changed = bytearray(payload)
    for _ in range(rng.choice((1, 1, 2, 5))):
        where = rng.randrange(end)
        new = bytes([rng.choice((0xDD, 0xDF, 0xC6, 0xDB, 0xC9, 0xFF, 0x7F, 0, rng.randrange(256)))])
        changed[where : where + rng.randrange(2)] = rng.choice((new, new * 8, b""))
    return changed


@pytest.mark.parametrize("route", ROUTES)
def test_corrupt_msgpack_gives_an_item_or_an_error(route: str) -> None:
    rng = random.Random(5)
    item = {"id": [1, 2.5, "x" * 40], (1, 2): msgpack.Timestamp(1, 2), None: [msgpack.ExtType(4, b"abc")] * 5, "": {}}
    payload = put(item).payload
    for _ in range(3000):
        with contextlib.suppress(exceptions.ShmQueueDeserializationError):
            get(Sent(MSGPACK, mutated(payload, rng, len(payload)), 0), route=route)


def test_corrupt_heads_of_out_of_band_payloads_give_an_item_or_an_error() -> None:
    rng = random.Random(6)
    sent = put([Block(bytearray(OUT_OF_BAND_SIZE)), Block(bytes(OUT_OF_BAND_SIZE))], phase=40)
    for _ in range(1000):
        with contextlib.suppress(exceptions.ShmQueueDeserializationError):
            get(sent._replace(payload=mutated(sent.payload, rng, 32)))
    for end in [*range(200), *range(200, len(sent.payload) - 2 * ALIGNMENT, 997)]:
        with pytest.raises(exceptions.ShmQueueDeserializationError):
            get(sent._replace(payload=sent.payload[:end]))


@pytest.mark.parametrize("route", ROUTES)
def test_payloads_that_claim_gigabytes_fail_at_once(route: str) -> None:
    claims = [b"\xdd\x00\x10\x00\x00" * 1000 + b"\x01" * 2**20, b"\xdf\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff", b""]
    began = time.monotonic()
    for claim in claims:
        with pytest.raises(exceptions.ShmQueueDeserializationError):
            get(Sent(MSGPACK, bytearray(claim), 0), route=route)
    for count, length in ((2**60, 1), (1, 2**63), (2**61, 2**63), (1, 2**64 - 24)):
        with pytest.raises(exceptions.ShmQueueDeserializationError):
            get(Sent(PICKLE_OUT_OF_BAND, bytearray(struct.pack("<3Q", count, length, 2**63)), 0))
    assert time.monotonic() - began < 5


def test_truncated_pickles_are_errors() -> None:
    payload = put({1, "two"}).payload
    for end in range(len(payload)):
        with pytest.raises(exceptions.ShmQueueDeserializationError):
            get(Sent(PICKLE, payload[:end], 0))
