"""Which library should turn items into bytes? Speed, and what each does to types that msgpack doesn't have.

    python benchmarks/serialization.py [seconds per figure]

First table: median nanoseconds to pack and unpack, and the spread of the middle half in percent; the
candidates take turns within each round. "shmqueue" is the fast way of shmqueue.serialization with its
fallback. Second table: what becomes of an item on the way there and back. Needs msgpack; ormsgpack,
msgspec and numpy are measured where installed.
"""

from __future__ import annotations

import collections
import dataclasses
import datetime
import decimal
import enum
import importlib
import pickle
import platform
import statistics
import sys
import timeit
import uuid
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import msgpack

from shmqueue import serialization

ROUNDS = 15


class Library(NamedTuple):
    name: str
    pack: Callable[[Any], Any]
    unpack: Callable[[Any], Any]


class Level(enum.IntEnum):
    HIGH = 3


class Text(str): ...


class Point(NamedTuple):
    x: int
    y: int


@dataclasses.dataclass
class Box:
    size: int


def optional(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def libraries() -> Iterator[Library]:
    fast_pack, option, fast_unpack = serialization.fast_codec(False)
    options: dict[str, Any] = {"allow_pickle": True, "custom": None}

    def shm_pack(item: Any) -> tuple[int, bytes]:
        try:
            return 0, fast_pack(item, None, option)
        except Exception:
            method, _, parts = serialization.encode(item, 0, strict_types=False, **options)
            return method, b"".join(parts)

    def shm_unpack(sent: tuple[int, bytes]) -> Any:
        method, payload = sent
        try:
            if method == 0:
                return fast_unpack(payload)
        except Exception:
            pass
        return serialization.decode(method, payload, 0, **options)

    yield Library("shmqueue", shm_pack, shm_unpack)
    if ormsgpack := optional("ormsgpack"):
        keys = ormsgpack.OPT_NON_STR_KEYS
        yield Library(
            "ormsgpack",
            lambda item: ormsgpack.packb(item, None, option),
            lambda sent: ormsgpack.unpackb(sent, ext_hook=msgpack.ExtType, option=keys),
        )
    small: dict[str, Any] = {"strict_types": True, "default": tuple_to_list, "buf_size": 512}
    reused = msgpack.Packer(strict_types=True, default=tuple_to_list)
    unpack: Callable[[Any], Any] = lambda sent: msgpack.unpackb(sent, strict_map_key=False)  # noqa: E731
    yield Library("msgpack", msgpack.packb, unpack)
    yield Library("msgpack strict", lambda item: msgpack.Packer(**small).pack(item), unpack)
    yield Library("msgpack reused", reused.pack, unpack)
    if msgspec := optional("msgspec"):
        yield Library("msgspec", msgspec.msgpack.Encoder().encode, msgspec.msgpack.Decoder().decode)
    yield Library("pickle", lambda item: pickle.dumps(item, 5), pickle.loads)


def tuple_to_list(part: Any) -> list[Any]:
    if type(part) is tuple:
        return list(part)
    raise TypeError(type(part).__name__)


SPEED: dict[str, Any] = {
    "small record": {"id": 1, "v": 1.5, "name": "sensor"},
    "int": 42,
    "str": "hello",
    "100 ints": list(range(100)),
    "50 records": [{"id": i, "tags": ["a", "b"], "pos": {"x": i * 0.5, "y": None}} for i in range(50)],
    "100 KB str": {"s": "x" * 100_000},
    "int keys": {i: i for i in range(20)},
    "tuples": [(i, i * 0.5) for i in range(20)],
}


def show_speed(candidates: list[Library], seconds: float) -> None:
    for name, item in SPEED.items():
        print(f"\n{name:24}{'bytes':>8}{'pack ns':>12}{'spread':>8}{'unpack ns':>12}{'spread':>8}")
        timers: dict[str, list[tuple[timeit.Timer, int, list[float]]]] = {}
        sizes: dict[str, int] = {}
        for library in candidates:
            try:
                sent = library.pack(item)
                library.unpack(sent)
            except Exception as error:
                print(f"  {library.name:22}{type(error).__name__}: {error}")
                continue
            sizes[library.name] = len(sent[1] if library.name == "shmqueue" else sent)
            timers[library.name] = [
                timed(library.pack, item, seconds / ROUNDS),
                timed(library.unpack, sent, seconds / ROUNDS),
            ]
        for _ in range(ROUNDS):
            for pair in timers.values():
                for timer, number, figures in pair:
                    figures.append(timer.timeit(number) / number * 1e9)
        for library_name, pair in timers.items():
            print(f"  {library_name:22}{sizes[library_name]:8}" + "".join(map(figure, (f for _, _, f in pair))))


def timed(call: Callable[[Any], Any], item: Any, seconds: float) -> tuple[timeit.Timer, int, list[float]]:
    timer = timeit.Timer("call(item)", globals={"call": call, "item": item})
    once = timer.timeit(10) / 10
    return timer, max(3, int(seconds / once)), []


def figure(figures: list[float]) -> str:
    low, median, high = statistics.quantiles(figures, n=4)
    return f"{median:12.0f}{(high - low) / median:8.0%}"


def odd_items() -> dict[str, Any]:
    now = datetime.datetime(2024, 2, 29, 12, 30, 15, 123456)
    items = [Level.HIGH, Text("a"), {Text("a"): 1}, Point(1, 2), collections.OrderedDict(a=1), Box(1), {1, 2}, now]
    items += [now.date(), uuid.UUID(int=5), decimal.Decimal("1.10"), 2**64, 1j, "\ud800", bytearray(b"a"), {1: 1}]
    items += [{None: 1, 1.5: 2}, {(1, 2): 3}, msgpack.ExtType(5, b"x"), msgpack.Timestamp(1, 2)]
    if np := optional("numpy"):
        items += [np.int64(1), np.float64(1.5), np.str_("a"), np.arange(2)]
    named = {f"{type(item).__name__} {item!a}": item for item in items}
    for depth in (255, 256, 1023, 1024, 1025):
        item: Any = 1
        for _ in range(depth):
            item = [item]
        named[f"{depth} lists in each other"] = item
    return named


def show_odd_items(candidates: list[Library]) -> None:
    print(f"\n{'what arrives':34}" + "".join(f"{library.name:>15}" for library in candidates))
    for name, item in odd_items().items():
        print(f"{name:34.33}" + "".join(f"{fate(library, item):>15}" for library in candidates))


def fate(library: Library, item: Any) -> str:
    try:
        sent = library.pack(item)
    except Exception:
        return "refused"
    try:
        got = library.unpack(sent)
    except Exception:
        return "UNREADABLE"
    if type(got) is not type(item):
        return f"-> {type(got).__name__}"
    if [*map(type, keys(got))] != [*map(type, keys(item))]:
        return "-> other keys"
    return "whole"


def keys(item: Any) -> Any:
    return item if isinstance(item, dict) else ()


def main() -> None:
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 0.2
    versions = {name: getattr(optional(name), "__version__", "-") for name in ("ormsgpack", "msgspec", "numpy")}
    print(f"CPython {platform.python_version()}, {platform.machine()}, msgpack {msgpack.version}, {versions}")
    candidates = list(libraries())
    show_speed(candidates, seconds)
    show_odd_items([library for library in candidates if library.name != "msgpack reused"])


if __name__ == "__main__":
    main()
