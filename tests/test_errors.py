"""Bad input and bad surroundings: each gives the error it should, loses nothing and leaves nothing behind.

What a program can't do to itself - a full or read-only /dev/shm, another user, exhausted descriptors or
memory, damage to a segment under it - is done to programs of their own, some in mount namespaces of their own.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import mmap
import os
import pickle
import random
import re
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgpack
import pytest

from shmqueue import SYSTEM_PAGESIZE, SerializationMethods, ShmQueue, ShmRefDataSnapshot, exceptions

PATIENCE_S = 60  # for what takes well under a second on an idle machine
MY_METHOD = SerializationMethods.FIRST_PUBLIC_NUMBER
SHM = Path("/dev/shm")


@pytest.fixture
def q(queue_name: str) -> Iterator[ShmQueue[Any]]:
    with ShmQueue[Any](queue_name) as q:
        yield q


@pytest.fixture
def path(queue_name: str) -> Iterator[Path]:
    """Where the segment of that name is or would be; whatever lies there is removed at the end."""
    path = SHM / f"shmqueue.{queue_name}"
    yield path
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


def run(code: str, *args: str, before: tuple[str, ...] = (), **options: Any) -> str:
    """Run a program to its end; return what it printed. It must succeed and say nothing on stderr."""
    done = subprocess.run(
        [*before, sys.executable, "-W", "error", "-X", "faulthandler", "-c", PRELUDE + textwrap.dedent(code), *args],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        **options,
    )
    assert (done.returncode, done.stderr) == (0, ""), f"{done.returncode}: {done.stdout}\n{done.stderr}"
    return done.stdout


# What the programs share: a way to say what a call raised.
PRELUDE = """\
import contextlib, errno, os, queue, resource, signal, sys, time
import shmqueue
from shmqueue import ShmQueue, exceptions

def raised(function, *args, **kwargs):
    try:
        function(*args, **kwargs)
    except exceptions.ShmQueueException as error:
        return error
    raise AssertionError("no error")

def segments():
    return sorted(name for name in os.listdir("/dev/shm") if name.startswith("shmqueue."))

UNLIMITED = resource.getrlimit(resource.RLIMIT_AS)

def limit_memory(more):
    with open("/proc/self/statm") as statm:
        used = int(statm.read().split()[0]) * 4096
    resource.setrlimit(resource.RLIMIT_AS, (used + more, UNLIMITED[1]))

def take_all_descriptors():
    resource.setrlimit(resource.RLIMIT_NOFILE, (20, 20))
    taken = []
    with contextlib.suppress(OSError):
        while True:
            taken.append(os.open("/dev/null", os.O_RDONLY))
    return taken
"""


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def is_untouched(q: ShmQueue[Any], *items: Any) -> bool:
    """Are these items, and nothing else, in the queue? It works as before."""
    assert q.check() == []
    assert q.get_many(block=False) == [*items] if items else q.empty()
    assert q.buffer_occupancy() == 0
    q.put("works")
    return q.get(block=False) == "works"


# ---- names


@pytest.mark.parametrize(
    ("name", "because"),
    [
        ("", "0 characters"),
        ("\0", "NUL at index 0"),
        ("a\0b", "NUL at index 1"),
        ("x" * 201, "201 bytes"),
        ("/" * 67, "201 bytes"),
        ("\U0001f600" * 17, "204 bytes"),
        ("\0" + "x" * 10**6, "NUL"),
        ("x" * 10**6, "1000000 bytes"),
    ],
    ids=lambda value: ascii(value)[:20],
)
def test_bad_name_is_a_value_error_that_says_why(name: str, because: str) -> None:
    with pytest.raises(exceptions.ShmQueueValueError, match=because) as caught:
        ShmQueue(name)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("name", [None, 5, b"bytes", ["list"], Path("p")], ids=repr)
def test_name_that_is_no_str_is_a_type_error(name: Any) -> None:
    with pytest.raises(exceptions.ShmQueueTypeError, match=type(name).__name__):
        ShmQueue(name)


def test_missing_name_and_unknown_options_are_type_errors(queue_name: str) -> None:
    with pytest.raises(TypeError):
        ShmQueue()  # type: ignore[call-arg]
    with pytest.raises(TypeError):
        ShmQueue(queue_name, 4096)  # type: ignore[misc]
    with pytest.raises(TypeError):
        ShmQueue(queue_name, buffer=4096)  # type: ignore[call-arg]
    assert not (SHM / f"shmqueue.{queue_name}").exists()


@pytest.mark.parametrize(
    "end", ["/", "/../..", " ", "\n", "\t", "%", "\x7f", "é", "日本", "\udc80", "*?[", "'\"", "\\"]
)
def test_any_other_character_is_good_in_a_name(queue_name: str, end: str) -> None:
    before = set(os.listdir(SHM))
    with ShmQueue[int](queue_name + end) as q:
        (file,) = {name for name in set(os.listdir(SHM)) - before if queue_name in name}
        assert file.startswith("shmqueue.")
        assert file.isascii()
        q.put(1)
        with ShmQueue[int](queue_name + end) as other:
            assert other.get(block=False) == 1
        assert q.identifier == queue_name + end
    assert file not in os.listdir(SHM)


# ---- sizes


@pytest.mark.parametrize("size", [0, -1, -4096, -(2**70), 2**63, 2**64, 2**70])
def test_impossible_buffer_size_is_a_value_error(queue_name: str, size: int) -> None:
    with pytest.raises(exceptions.ShmQueueValueError, match=re.escape(str(size))):
        ShmQueue(queue_name, buffer_size=size)
    assert not (SHM / f"shmqueue.{queue_name}").exists()


@pytest.mark.parametrize("size", ["4096", 4096.0, None, b"1", [1], True, False, 1j], ids=repr)
def test_buffer_size_that_is_no_int_is_a_type_error(queue_name: str, size: Any) -> None:
    with pytest.raises(exceptions.ShmQueueTypeError, match=type(size).__name__):
        ShmQueue(queue_name, buffer_size=size)
    assert not (SHM / f"shmqueue.{queue_name}").exists()


@pytest.mark.parametrize("size", [2**40, 2**46, 2**47, 2**61])
def test_buffer_size_beyond_the_machine_is_an_os_error_that_names_the_sizes(queue_name: str, size: int) -> None:
    used = shutil.disk_usage(SHM).used
    with pytest.raises(OSError, match=repr(queue_name)) as caught:
        ShmQueue(queue_name, buffer_size=size)
    assert isinstance(caught.value, exceptions.ShmQueueException)
    assert caught.value.errno in (errno.ENOSPC, errno.ENOMEM, errno.EFBIG)
    needed, free = map(int, re.findall(r"\((\d+) bytes needed, (\d+) free", str(caught.value))[0])
    assert size < needed < size + 2**20
    assert free < size
    assert shutil.disk_usage(SHM).used < used + 2**28  # nothing of that size was taken
    assert not (SHM / f"shmqueue.{queue_name}").exists()


# ---- what is put


class Refuses:
    def __reduce__(self) -> Any:
        raise RuntimeError("I stay")


def nested(depth: int, kind: str) -> Any:
    item: Any = 0
    for _ in range(depth):
        item = {"list": lambda i: [i], "dict": lambda i: {"k": i}, "tuple": lambda i: (i,), "set": lambda i: [{1}, i]}[
            kind
        ](item)
    return item


@pytest.mark.parametrize(
    "item",
    [
        lambda: 0,
        Refuses(),
        [Refuses()],
        {"k": Refuses()},
        open,
        (i for i in ()),
        threading.Lock(),
        type("Local", (), {})(),
    ],
    ids=lambda item: type(item).__name__,
)
def test_unserializable_item_is_refused_with_its_cause_and_puts_nothing(q: ShmQueue[Any], item: Any) -> None:
    if item is open:
        item = sys._getframe()
    q.put("before")
    with pytest.raises(exceptions.ShmQueueSerializationError) as caught:
        q.put(item)
    assert caught.value.__cause__ is not None
    assert type(item).__name__ in str(caught.value)
    assert is_untouched(q, "before")


@pytest.mark.parametrize("kind", ["list", "dict", "tuple", "set"])
def test_too_deeply_nested_item_is_a_serialization_error_and_puts_nothing(queue_name: str, kind: str) -> None:
    with ShmQueue[Any](queue_name, buffer_size=1 << 24) as q:
        item = nested(200_000, kind)
        for method in (SerializationMethods.DEFAULT, SerializationMethods.PICKLE):
            with pytest.raises(exceptions.ShmQueueSerializationError):
                q.put(item, serialization_method=method)
        assert is_untouched(q)


@pytest.mark.parametrize("kind", ["list", "dict", "tuple"])
def test_moderately_nested_item_arrives(queue_name: str, kind: str) -> None:
    with ShmQueue[Any](queue_name, buffer_size=1 << 20) as q:
        for depth in (100, 250, 255, 256, 257, 500, 511, 512, 900):
            q.put(nested(depth, kind))
            got, expected = q.get(block=False), nested(depth, "list" if kind == "tuple" else kind)
            while expected:
                assert type(got) is type(expected)
                got, expected = (got["k"], expected["k"]) if kind == "dict" else (got[0], expected[0])
            assert got == expected
            assert q.buffer_occupancy() == 0


def patch_payload(path: Path, method: int, payload: bytes) -> None:
    """Overwrite the first item of a segment in place: what a peer with a bug could have put."""
    with open(path, "r+b") as file:
        ring = header(file)["ring_offset"]
        file.seek(ring)
        (word,) = struct.unpack("<Q", file.read(8))
        assert word >> 32 == len(payload), "the payload to replace must have the same length"
        file.seek(ring)
        file.write(struct.pack("<Q", len(payload) << 32 | method << 8 | word & 0xFF) + payload)


def header(file: Any) -> dict[str, int]:
    file.seek(0)
    magic, version, ring_offset, capacity = struct.unpack("<8sIIQ", file.read(24))
    assert magic == b"shmqueue"
    return {"version": version, "ring_offset": ring_offset, "capacity": capacity}


DEEP = 100_000


@pytest.mark.parametrize(
    ("method", "payload"),
    [
        (0, b"\x91" * DEEP + b"\xc0"),
        (0, b"\x81\xc0" * DEEP + b"\xc0"),
        (0, b"\x81" * DEEP + b"\xc0" * (DEEP + 1)),
        (0, b"\x91" * DEEP),
        (1, b"\x80\x05" + b"]" * DEEP + b"a" * (DEEP - 1) + b"."),
        (1, b"(" * DEEP + b"t" * DEEP + b"."),
        (2, bytes(range(256)) * 10),
        (2, b"\xff" * 4096),
        (2, struct.pack("<QQQ", 1, 100, 2**63) + bytes(1000)),
        (0, b"\xdd\xff\xff\xff\xff" + b"\xc0" * 1000),
        (0, b"\xc6\xff\xff\xff\xff" + b"\xc0" * 1000),
        (0, b"\xdf\xff\xff\xff\xff" + b"\xc0" * 1000),
        (0, b"\xc1" * 1000),
        (0, b"\xc0" * 1000),  # more than one item
        (1, b"\x80\x05" + b"\x8e" + b"\xff" * 8 + bytes(100)),
        (1, bytes(1000)),
        (5, bytes(1000)),
        (2**24 - 1, bytes(1000)),
    ],
    ids=lambda value: str(value)[:14] if isinstance(value, bytes) else str(value),
)
def test_payload_that_cannot_be_decoded_comes_out_whole_and_what_follows_is_unharmed(
    queue_name: str, path: Path, method: int, payload: bytes
) -> None:
    program = """
        import gc
        name, method, size, kind = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
        q = ShmQueue(name)
        try:
            q.get(block=False) if kind == "get" else q.get_many(1)
        except exceptions.ShmQueueDeserializationError as error:
            assert error.serialization_method == method
            assert error.__cause__ is not None
            assert len(error.payload) == size
            sys.stdout.write(error.payload.hex())
        else:
            sys.stdout.write("decoded")
        gc.collect()
        assert q.get(block=False) == "next"
        assert q.check() == []
    """
    for kind in ("get", "get_many"):
        with ShmQueue[Any](queue_name, buffer_size=1 << 20) as q:
            q.custom_serialize(lambda method, data: data)
            q.put(bytes(len(payload)), serialization_method=MY_METHOD)
            q.put("next")
            patch_payload(path, method, payload)
            told = run(program, queue_name, str(method), str(len(payload)), kind)
            # A library may take 100,000 levels, or pass over what follows the first item: no harm is done.
            assert told == payload.hex() or (told == "decoded" and (len(payload) > DEEP or payload[:2] == b"\xc0\xc0"))


def test_item_larger_than_the_queue_is_refused_by_every_way_in(q: ShmQueue[Any]) -> None:
    q.custom_serialize(lambda method, data: data)
    q.put("before")
    big = bytes(SYSTEM_PAGESIZE)
    for call in (
        lambda: q.put(big),
        lambda: q.put(big, timeout=PATIENCE_S),
        lambda: q.put_nowait(big),
        lambda: q.put_many([big]),
        lambda: q.put(big.decode()),
        lambda: q.put({1, big}),
        lambda: q.put(bytearray(big)),
        lambda: q.put(big, serialization_method=MY_METHOD),
        lambda: q.put(list(big)),
    ):
        with pytest.raises(exceptions.ShmQueueValueError, match=f"{SYSTEM_PAGESIZE} in all"):
            call()
    assert is_untouched(q, "before")


def test_payload_of_4_gib_is_refused_before_it_is_copied(queue_name: str) -> None:
    program = """
        import mmap, pickle
        # 24 GiB of addresses but no memory: a copy of what is refused would not fit
        resource.setrlimit(resource.RLIMIT_AS, (24 << 30, 24 << 30))
        q = ShmQueue(sys.argv[1])
        q.custom_serialize(lambda method, data: data)
        huge = memoryview(mmap.mmap(-1, (4 << 30) + 4096, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for size in ((4 << 30) - 1, 4 << 30, (4 << 30) + 1):
            print(type(raised(q.put, huge[:size], serialization_method=1001)).__name__)
            print(type(raised(q.put_many, [huge[:size]], serialization_method=1001)).__name__)
        print(type(raised(q.put, bytes(4 << 30))).__name__)
        print("4 GiB" in str(raised(q.put, huge[: 4 << 30], serialization_method=1001)))
        print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) < 100_000)
        q.put(b"works")
        print(q.get(block=False), q.empty(), q.check())
    """
    assert run(program, queue_name).splitlines() == [*["ShmQueueValueError"] * 7, "True", "True", "b'works' True []"]


@pytest.mark.parametrize("method", ["0", 1.0, None, [0], b"0", object()], ids=lambda method: type(method).__name__)
def test_method_that_is_no_int_is_a_value_error(q: ShmQueue[Any], method: Any) -> None:
    q.custom_serialize(lambda method, data: b"")
    for call in (q.put, q.put_nowait, lambda data, **options: q.put_many([data], **options)):
        with pytest.raises(exceptions.ShmQueueValueError, match="serialization_method"):
            call(1, serialization_method=method)
    assert is_untouched(q)


@pytest.mark.parametrize("method", [2**24, 2**31, 2**32, 2**32 + 1, 2**63, 2**64, 2**200])
def test_method_beyond_24_bits_is_a_value_error(q: ShmQueue[Any], method: int) -> None:
    q.custom_serialize(lambda method, data: b"")
    with pytest.raises(exceptions.ShmQueueValueError):
        q.put(1, serialization_method=method)
    assert is_untouched(q)


@pytest.mark.parametrize("method", [-1, -(2**31), -(2**32), -(2**64), 2, 3, 1000])
def test_unknown_and_negative_methods_are_not_implemented(q: ShmQueue[Any], method: int) -> None:
    q.custom_serialize(lambda method, data: b"never asked")
    with pytest.raises(NotImplementedError) as caught:
        q.put(1, serialization_method=method)
    assert isinstance(caught.value, exceptions.ShmQueueException)
    assert is_untouched(q)


@pytest.mark.parametrize("result", [None, "str", 5, [b"x"], object()], ids=repr)
def test_custom_serializer_that_returns_no_bytes_is_a_type_error(q: ShmQueue[Any], result: Any) -> None:
    q.custom_serialize(lambda method, data: result)
    with pytest.raises(exceptions.ShmQueueTypeError, match=type(result).__name__):
        q.put(1, serialization_method=MY_METHOD)
    assert is_untouched(q)


@pytest.mark.parametrize(
    "error", [ValueError("mine"), KeyboardInterrupt(), SystemExit(3), MemoryError(), StopIteration()]
)
def test_error_of_a_custom_serializer_propagates_as_it_is(q: ShmQueue[Any], error: BaseException) -> None:
    def fail(method: int, data: Any) -> bytes:
        raise error

    q.custom_serialize(fail)
    with pytest.raises(type(error)) as caught:
        q.put(1, serialization_method=MY_METHOD)
    assert caught.value is error
    assert is_untouched(q)


@pytest.mark.parametrize("function", [None, 5, "f"])
def test_custom_functions_must_be_callable(q: ShmQueue[Any], function: Any) -> None:
    with pytest.raises(exceptions.ShmQueueTypeError):
        q.custom_serialize(function)
    with pytest.raises(exceptions.ShmQueueTypeError):
        q.custom_deserialize(function)


def test_view_given_to_a_deserializer_is_read_only_and_ends_with_the_call(q: ShmQueue[Any]) -> None:
    kept: list[memoryview] = []

    def deserialize(method: int, chunks: list[memoryview]) -> int:
        (view,) = chunks
        kept.append(view)
        with pytest.raises(TypeError):
            view[0] = 1
        return len(view)

    q.custom_serialize(lambda method, data: data)
    q.custom_deserialize(deserialize)
    for size in (1, 100, 4000):
        q.put(bytes(size), serialization_method=MY_METHOD)
        assert q.get() == size
    for view in kept:
        with pytest.raises(ValueError, match="released"):
            bytes(view)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3)])
def test_interrupt_of_a_deserializer_propagates(q: ShmQueue[Any], error: BaseException) -> None:
    def fail(method: int, chunks: list[memoryview]) -> Any:
        raise error

    q.custom_serialize(lambda method, data: data)
    q.custom_deserialize(fail)
    q.put(b"x", serialization_method=MY_METHOD)
    with pytest.raises(type(error)):
        q.get(block=False)
    q.clear()
    assert is_untouched(q)


def test_class_that_cannot_be_unpickled_there_comes_out_as_bytes(q: ShmQueue[Any]) -> None:
    program = """
        class OnlyHere:
            pass
        import pickle
        item = OnlyHere()
        ShmQueue(sys.argv[1]).put(item)
        sys.stdout.write(pickle.dumps(item, 5).hex())
    """
    pickled = bytes.fromhex(run(program, q.identifier))
    q.put("next")
    with pytest.raises(exceptions.ShmQueueDeserializationError) as caught:
        q.get()
    assert isinstance(caught.value.__cause__, AttributeError)
    assert (caught.value.payload, caught.value.serialization_method) == (pickled, SerializationMethods.PICKLE)
    assert q.get() == "next"
    assert pickle.loads(pickle.dumps(caught.value)).payload == pickled


# ---- other things of the same name


def is_left_alone(path: Path, before: bytes) -> bool:
    return path.read_bytes() == before


def a_segment(name: str, path: Path) -> bytes:
    """The bytes of a good segment with an item in it."""
    with ShmQueue[Any](name) as q:
        q.put("an item")
        return path.read_bytes()


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda good: b"",
    "a byte": lambda good: b"s",
    "some text": lambda good: b"hello",
    "zeros": lambda good: bytes(len(good)),
    "many zeros": lambda good: bytes(1 << 20),
    "noise": lambda good: random.Random(1).randbytes(len(good)),
    "another magic": lambda good: b"Shmqueue" + good[8:],
    "header only": lambda good: good[:128],
    "first page": lambda good: good[:SYSTEM_PAGESIZE],
    "a byte short": lambda good: good[:-1],
    "a page short": lambda good: good[:-SYSTEM_PAGESIZE],
    "a byte long": lambda good: good + b"\0",
    "a page long": lambda good: good + bytes(SYSTEM_PAGESIZE),
    "ring_offset 0": lambda good: good[:12] + struct.pack("<I", 0) + good[16:],
    "ring_offset odd": lambda good: good[:12] + struct.pack("<I", 4097) + good[16:],
    "ring_offset huge": lambda good: good[:12] + struct.pack("<I", 2**32 - 1) + good[16:],
    "capacity 0": lambda good: good[:16] + struct.pack("<Q", 0) + good[24:],
    "capacity odd": lambda good: good[:16] + struct.pack("<Q", SYSTEM_PAGESIZE + 1) + good[24:],
    "capacity doubled": lambda good: good[:16] + struct.pack("<Q", 2 * SYSTEM_PAGESIZE) + good[24:],
    "capacity huge": lambda good: good[:16] + struct.pack("<Q", 2**63) + good[24:],
    "capacity all ones": lambda good: good[:16] + b"\xff" * 8 + good[24:],
    "capacity wrapping": lambda good: good[:16] + struct.pack("<Q", 2**64 - SYSTEM_PAGESIZE) + good[24:],
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_corrupt_or_foreign_segment_is_refused_and_left_alone(queue_name: str, path: Path, damage: str) -> None:
    bad = DAMAGE[damage](a_segment(queue_name, path))
    path.write_bytes(bad)
    descriptors = open_descriptors()
    for _ in range(3):
        with pytest.raises(exceptions.ShmQueueCorruptedError, match=re.escape(str(path))) as caught:
            ShmQueue(queue_name)
        assert isinstance(caught.value, RuntimeError)
        assert repr(queue_name) in str(caught.value)
    assert is_left_alone(path, bad)
    del caught
    assert open_descriptors() == descriptors
    assert str(path) not in Path("/proc/self/maps").read_text()


def test_the_undamaged_copy_of_a_segment_is_adopted_with_its_item(queue_name: str, path: Path) -> None:
    """Else the tests around would prove nothing."""
    path.write_bytes(a_segment(queue_name, path))
    with ShmQueue[Any](queue_name) as q:
        assert q.get(block=False) == "an item"
    assert not path.exists()


@pytest.mark.parametrize("version", [0, 2, 99, 2**32 - 1])
def test_segment_of_another_format_is_refused_and_both_formats_are_named(
    queue_name: str, path: Path, version: int
) -> None:
    good = a_segment(queue_name, path)
    (ours,) = struct.unpack("<I", good[8:12])
    bad = good[:8] + struct.pack("<I", version) + good[12:]
    path.write_bytes(bad)
    with pytest.raises(exceptions.ShmQueueRuntimeError, match=rf"format {version}\b.* reads {ours}\b") as caught:
        ShmQueue(queue_name)
    assert not isinstance(caught.value, exceptions.ShmQueueCorruptedError)
    assert is_left_alone(path, bad)


@pytest.mark.parametrize("kind", ["fifo", "directory", "socket", "symlink", "dangling symlink", "symlink to a segment"])
def test_what_is_no_file_of_that_name_is_refused_at_once_and_left_alone(
    queue_name: str, path: Path, kind: str, tmp_path: Path
) -> None:
    target = tmp_path / "target"
    with contextlib.ExitStack() as stack:
        if kind == "fifo":
            os.mkfifo(path)
        elif kind == "directory":
            path.mkdir()
        elif kind == "socket":
            listener = stack.enter_context(socket.socket(socket.AF_UNIX))
            listener.bind(str(path))
        elif kind == "symlink":
            target.write_bytes(b"somebody's file")
            path.symlink_to(target)
        elif kind == "dangling symlink":
            path.symlink_to(target)
        else:
            target.write_bytes(a_segment(queue_name, path))
            path.symlink_to(target)
        before = path.lstat()
        content = target.read_bytes() if target.exists() else None
        with pytest.raises(exceptions.ShmQueueCorruptedError, match=re.escape(str(path))):
            ShmQueue(queue_name)
        assert (path.lstat().st_ino, path.lstat().st_mode) == (before.st_ino, before.st_mode)
        assert (target.read_bytes() if target.exists() else None) == content


def test_removing_what_was_in_the_way_is_all_it_takes(queue_name: str, path: Path) -> None:
    path.write_bytes(b"in the way")
    with pytest.raises(exceptions.ShmQueueCorruptedError):
        ShmQueue(queue_name)
    path.unlink()
    with ShmQueue[int](queue_name) as q:
        assert is_untouched(q)


def test_segment_is_for_its_user_only(q: ShmQueue[Any]) -> None:
    status = (SHM / f"shmqueue.{q.identifier}").stat()
    assert stat.S_IMODE(status.st_mode) == 0o600
    assert status.st_uid == os.geteuid()


def test_segment_is_for_its_user_only_whatever_the_umask(queue_name: str, path: Path) -> None:
    for umask in (0, 0o777):
        previous = os.umask(umask)
        try:
            with ShmQueue[int](queue_name) as q:
                assert stat.S_IMODE(path.stat().st_mode) == 0o600
                q.put(1)
                assert q.get() == 1
        finally:
            os.umask(previous)


def test_segment_removed_by_hand_serves_those_who_have_it_and_nobody_else(queue_name: str, path: Path) -> None:
    with ShmQueue[Any](queue_name) as q, ShmQueue[Any](queue_name) as other:
        path.unlink()
        q.put("old")
        with ShmQueue[Any](queue_name) as new:
            new.put("new")
            assert other.get(block=False) == "old"
            assert q.refs == 2
            assert new.refs == 1
            q.shutdown()
            other.shutdown()
            assert path.exists(), "they removed a segment that is not theirs"
            assert new.get(block=False) == "new"
    assert not path.exists()


# ---- damage to a segment in use


class Damaged:
    """A live segment, and a way to write into it as a peer with a bug could.

    Offsets as in docs/format.md: the producing and the consuming side at 256 and 384, each
    {lock, seq, mark[2] of {pos, count}, top}; slots of 64 bytes from 512 on, each beginning with its owner.
    """

    LOCK, SEQ, MARKS, SLOTS = 0, 8, 16, 512

    def __init__(self, path: Path) -> None:
        with open(path, "r+b") as file:
            self.ring = header(file)["ring_offset"]
            self._map = mmap.mmap(file.fileno(), 0)
        self._sides = {"producing": 256, "consuming": 384}

    def read(self, offset: int) -> int:
        return struct.unpack_from("<Q", self._map, offset)[0]

    def write(self, offset: int, value: int) -> None:
        struct.pack_into("<Q", self._map, offset, value & (2**64 - 1))

    def mark(self, side: str) -> int:
        """The offset of the side's position in force; its count follows."""
        return self._sides[side] + self.MARKS + 16 * (self.read(self._sides[side] + self.SEQ) % 2)

    def lock(self, side: str) -> int:
        return self._sides[side] + self.LOCK


@pytest.fixture
def damaged(q: ShmQueue[Any], path: Path) -> Damaged:
    q.put("first")
    q.put("second")
    return Damaged(path)


@pytest.mark.parametrize(
    ("side", "position"),
    [
        ("producing", 2**63),
        ("producing", SYSTEM_PAGESIZE + 1),
        ("producing", -1),
        ("consuming", 2**63),
        ("consuming", 1000),
    ],
)
def test_impossible_position_is_an_error_that_names_it_and_can_be_left(
    q: ShmQueue[Any], damaged: Damaged, side: str, position: int
) -> None:
    good = damaged.read(damaged.mark(side))
    damaged.write(damaged.mark(side), position)
    for call in (q.snapshot, q.qsize, q.buffer_occupancy, q.full, q.empty):
        with pytest.raises(exceptions.ShmQueueCorruptedError, match="pos"):
            call()
    with ShmQueue[Any](q.identifier) as other, pytest.raises(exceptions.ShmQueueCorruptedError):
        other.get(block=False)  # its bounds are fresh
    assert q.check() != []
    damaged.write(damaged.mark(side), good)
    assert q.check() == []
    assert [q.get(block=False), q.get(block=False)] == ["first", "second"]


@pytest.mark.parametrize(
    ("word", "because"),
    [
        (0, "state"),
        (2**64 - 1, "length"),
        (2 | (10_000 << 32), "length"),
        (2 | (100 << 32), "length"),
        (99 | (6 << 32), "state"),
    ],
)
def test_impossible_record_is_an_error_that_names_the_field(
    q: ShmQueue[Any], damaged: Damaged, word: int, because: str
) -> None:
    good = damaged.read(damaged.ring)
    damaged.write(damaged.ring, word)
    for call in (lambda: q.get(block=False), lambda: q.get(timeout=PATIENCE_S), q.get_many, lambda: next(iter(q))):
        with pytest.raises(exceptions.ShmQueueCorruptedError, match=because):
            call()
    assert any("of a record" in line for line in q.check())
    assert q.qsize() == 2
    damaged.write(damaged.ring, good)
    assert q.get_many() == ["first", "second"]


def test_damaged_queue_can_be_shut_down_and_made_anew(q: ShmQueue[Any], damaged: Damaged, path: Path) -> None:
    damaged.write(damaged.mark("producing"), 2**63)
    q.shutdown()
    assert not path.exists()
    with ShmQueue[Any](q.identifier) as again:
        assert is_untouched(again)


def test_lock_that_a_dead_process_left_is_taken_over(q: ShmQueue[Any], damaged: Damaged) -> None:
    nobody = (12345 << 11) | (400 << 1)  # slot 399 has no attachment
    for side in ("producing", "consuming"):
        damaged.write(damaged.lock(side), nobody)
        q.put("third", timeout=PATIENCE_S)
        assert q.get_many(timeout=PATIENCE_S)[-1] == "third"
        assert q.check() == []
        damaged.write(damaged.lock(side), nobody)
        q.clear()
        q.put("again", block=False)
        assert q.get(block=False) == "again"


def test_lock_of_a_live_owner_that_does_not_go_on_ends_each_call_in_its_time(
    q: ShmQueue[Any], damaged: Damaged
) -> None:
    """As if another process had been stopped in the middle of a put and of a get."""
    with ShmQueue[Any](q.identifier) as other:
        slots = [damaged.read(damaged.SLOTS + 64 * i) for i in range(2)]
        stopped = slots[1]
        assert stopped != 0
        assert other.refs == 2
        for side in ("producing", "consuming"):
            damaged.write(damaged.lock(side), stopped)
        for call, error in (
            (lambda **wait: q.put(1, **wait), exceptions.ShmQueueFull),
            (lambda **wait: q.put_many([1], **wait), exceptions.ShmQueueFull),
            (q.get, exceptions.ShmQueueEmpty),
            (q.get_many, exceptions.ShmQueueEmpty),
        ):
            for wait in ({"block": False}, {"timeout": 0}, {"timeout": 0.2}):
                before = time.monotonic()
                with pytest.raises(error, match=rf"lock is held by process {os.getpid()}\b"):
                    call(**wait)
                assert wait.get("timeout", 0) <= time.monotonic() - before < PATIENCE_S / 4
        assert (q.qsize(), q.refs, q.full()) == (2, 2, False)
        for side in ("producing", "consuming"):
            damaged.write(damaged.lock(side), 0)
        q.put("third")
        assert other.get_many() == ["first", "second", "third"]


@pytest.mark.parametrize("wait", [{}, {"timeout": PATIENCE_S}])
def test_call_waits_for_a_live_owner_that_goes_on_after_a_while(
    q: ShmQueue[Any], damaged: Damaged, wait: dict[str, Any]
) -> None:
    calls: list[tuple[str, Callable[[], Any]]] = [
        ("producing", lambda: q.put("third", **wait)),
        ("producing", lambda: q.put_many(["fourth"], **wait)),
        ("consuming", lambda: q.get(**wait)),
        ("consuming", lambda: q.get_many(1, **wait)),
    ]
    with ShmQueue[Any](q.identifier):
        for side, call in calls:
            damaged.write(damaged.lock(side), damaged.read(damaged.SLOTS + 64))
            goes_on = threading.Timer(0.3, damaged.write, (damaged.lock(side), 0))
            goes_on.start()
            before = time.monotonic()
            call()
            assert time.monotonic() - before > 0.2
            goes_on.join()
    assert q.get_many() == ["third", "fourth"]


def test_clear_gives_up_when_a_live_owner_does_not_go_on(q: ShmQueue[Any], damaged: Damaged) -> None:
    def too_late(number: int, frame: Any) -> None:
        raise AssertionError("it waits for ever")

    with ShmQueue[Any](q.identifier):
        damaged.write(damaged.lock("consuming"), damaged.read(damaged.SLOTS + 64))
        previous = signal.signal(signal.SIGALRM, too_late)
        signal.alarm(12)
        try:
            with pytest.raises(exceptions.ShmQueueException, match="lock is held by process"):
                q.clear()
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, previous)
            damaged.write(damaged.lock("consuming"), 0)
    assert q.get_many() == ["first", "second"]


FUZZ = """
import random, struct
seed = int(sys.argv[2])
rng = random.Random(seed)
name, path = sys.argv[1], f"/dev/shm/shmqueue.{sys.argv[1]}"
values = [0, 1, 2, 3, 8, 63, 511, 512, 4095, 4096, 4097, 2**31, 2**32 - 1, 2**32, 2**63, 2**64 - 1]
signal.alarm(50)  # ends it by that signal if something never returns
for _ in range(int(sys.argv[3])):
    q = ShmQueue(name, buffer_size=8192)
    other = ShmQueue(name)
    q.put_many(range(20))
    q.put(bytes(5000))
    with open(path, "r+b") as file:
        for _ in range(rng.choice((1, 1, 2, 5, 30))):
            # What comes before is read once; of the slots and entries the first ones stand for all.
            spans = [(128, 512), (512, 640), (33280, 33400), (37376, 37500), (65536, 65536 + 8192 - 8)]
            offset = rng.randrange(*rng.choice(spans)) & ~7
            value = rng.choice([rng.choice(values), rng.getrandbits(64), rng.getrandbits(16)])
            file.seek(offset)
            file.write(struct.pack("<Q", value))
    for _ in range(12):
        handle = rng.choice((q, other))
        call = rng.choice([
            lambda: handle.put(bytes(rng.randrange(6000)), timeout=0.01),
            lambda: handle.put_many([1, bytes(5000), 2], timeout=0.01),
            lambda: handle.get(timeout=0.01),
            lambda: handle.get_many(timeout=0.01),
            lambda: handle.get_many(3, block=False),
            handle.get_nowait, handle.qsize, handle.snapshot, handle.check, lambda: handle.refs,
            handle.buffer_occupancy, handle.full, handle.empty,
            lambda: (handle.add_ref_manually(os.getpid()), handle.reduce_ref_counter()),
        ])
        with contextlib.suppress(exceptions.ShmQueueException):
            call()
    for handle in (q, other):
        handle.shutdown()
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
"""


@pytest.mark.parametrize("part", range(3))
def test_no_damage_to_a_segment_crashes_or_hangs_a_program(queue_name: str, part: int) -> None:
    """'Nothing read from shared memory is trusted': a peer with a bug costs an exception, never a crash."""
    seed = int(os.environ.get("SHMQUEUE_SEED", "0")) or random.SystemRandom().randrange(10**9)
    print(f"SHMQUEUE_SEED={seed}")
    run(FUZZ, queue_name, str(seed + part), "60")


# ---- bad surroundings

UNSHARE = [["unshare", "-m"], ["unshare", "-r", "-m"]]


@functools.cache
def namespace(mount: str) -> tuple[str, ...]:
    """The command that starts a program with a /dev/shm of its own."""
    script = f'{mount} && exec "$@"'
    for unshare in UNSHARE:
        command = (*unshare, "sh", "-c", script, "sh")
        with contextlib.suppress(FileNotFoundError, subprocess.TimeoutExpired):
            if subprocess.run([*command, "true"], capture_output=True, timeout=PATIENCE_S).returncode == 0:
                return command
    pytest.skip("mounting a /dev/shm in a namespace of one's own isn't permitted here")


def test_full_dev_shm_is_enospc_that_names_the_sizes_and_leaves_nothing() -> None:
    program = """
        free = os.statvfs("/dev/shm").f_bavail
        for size in (1 << 20, 1 << 30, (1 << 20) - 4096):
            error = raised(ShmQueue, "jobs", buffer_size=size)
            assert isinstance(error, OSError) and error.errno == errno.ENOSPC, repr(error)
            assert "'jobs'" in str(error) and "bytes needed" in str(error) and "free in /dev/shm" in str(error), error
        assert os.listdir("/dev/shm") == []
        assert os.statvfs("/dev/shm").f_bavail == free
        with ShmQueue("jobs") as q:
            q.put(1)
            assert q.get() == 1
        assert os.listdir("/dev/shm") == []
    """
    run(program, before=namespace("mount -t tmpfs -o size=1m none /dev/shm"))


def test_queue_in_a_dev_shm_that_others_have_filled_works_to_the_last_byte() -> None:
    """Its memory is taken when it is made: no SIGBUS later, and handles come and go."""
    program = """
        with ShmQueue("jobs", buffer_size=1 << 18) as q:
            with open("/dev/shm/others", "wb", buffering=0) as others:
                with contextlib.suppress(OSError):
                    while True:
                        others.write(bytes(4096))
            assert os.statvfs("/dev/shm").f_bavail == 0
            n = 0
            with contextlib.suppress(queue.Full):
                while True:
                    q.put(bytes([n % 256]) * 1000, block=False)
                    n += 1
            with ShmQueue("jobs") as other:
                for i in range(n):
                    assert other.get() == bytes([i % 256]) * 1000
            assert n == (1 << 18) // 1011
            assert raised(ShmQueue, "more").errno == errno.ENOSPC
            q.put(1)
        assert os.listdir("/dev/shm") == ["others"]
    """
    run(program, before=namespace("mount -t tmpfs -o size=1m none /dev/shm"))


def test_dev_shm_without_inodes_is_enospc() -> None:
    program = """
        error = raised(ShmQueue, "jobs")
        assert isinstance(error, OSError) and error.errno == errno.ENOSPC, repr(error)
        assert os.listdir("/dev/shm") == []
    """
    run(program, before=namespace("mount -t tmpfs -o size=1m,nr_inodes=1 none /dev/shm"))


def test_read_only_dev_shm_is_erofs_and_nothing_is_lost() -> None:
    program = """
        error = raised(ShmQueue, "jobs")
        assert isinstance(error, OSError) and error.errno == errno.EROFS, repr(error)
        assert "'jobs'" in str(error)
        assert os.listdir("/dev/shm") == []
    """
    run(program, before=namespace("mount -t tmpfs -o size=1m,ro none /dev/shm"))


def test_segment_in_a_dev_shm_that_became_read_only_is_erofs_and_keeps_its_items() -> None:
    program = """
        import subprocess
        pid = os.fork()
        if pid == 0:  # is killed with an item put, so the segment stays
            q = ShmQueue("jobs")
            q.put("kept")
            os.kill(os.getpid(), signal.SIGKILL)
        os.waitpid(pid, 0)
        assert segments() == ["shmqueue.jobs"]
        subprocess.run(["mount", "-o", "remount,ro", "/dev/shm"], check=True)
        for _ in range(2):
            error = raised(ShmQueue, "jobs")
            assert isinstance(error, OSError) and error.errno == errno.EROFS, repr(error)
        subprocess.run(["mount", "-o", "remount,rw", "/dev/shm"], check=True)
        with ShmQueue("jobs") as q:
            assert q.get(block=False) == "kept"
        assert segments() == []
    """
    run(program, before=namespace("mount -t tmpfs -o size=1m none /dev/shm"))


def test_dev_shm_that_is_not_there_is_an_os_error() -> None:
    program = """
        error = raised(ShmQueue, "jobs")
        assert isinstance(error, FileNotFoundError), repr(error)
        assert "'jobs'" in str(error)
    """
    # An empty /dev is all it takes, but Python wants its urandom.
    mount = "mount -t tmpfs none /dev && mknod -m 666 /dev/urandom c 1 9 && mknod -m 666 /dev/null c 1 3"
    run(program, before=namespace(mount))


AS_NOBODY = """
os.setgroups([])
os.setresgid(65534, 65534, 65534)
os.setresuid(65534, 65534, 65534)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_segment_of_another_user_is_a_permission_error_and_nothing_is_lost(q: ShmQueue[Any]) -> None:
    q.put("mine")
    program = f"""
{textwrap.indent(AS_NOBODY, " " * 8)}
        for _ in range(3):
            error = raised(ShmQueue, sys.argv[1])
            assert isinstance(error, PermissionError) and error.errno == errno.EACCES, repr(error)
            assert repr(sys.argv[1]) in str(error)
        with ShmQueue(sys.argv[1] + ".2") as own:
            own.put(1)
            assert own.get() == 1
    """
    run(program, q.identifier)
    assert q.refs == 1
    assert is_untouched(q, "mine")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_users_without_privileges_make_and_share_queues(queue_name: str) -> None:
    program = f"""
{textwrap.indent(AS_NOBODY, " " * 8)}
        with ShmQueue(sys.argv[1], buffer_size=1 << 20) as q:
            pid = os.fork()
            if pid == 0:
                with ShmQueue(sys.argv[1]) as other:
                    other.put(other.refs)
                q.put(q.refs)
                os._exit(0)
            os.waitpid(pid, 0)
            assert q.get_many(block=False) == [3, 2]
            assert q.refs == 1
        assert not any(sys.argv[1] in name for name in segments())
    """
    run(program, queue_name)


def test_too_many_attachments_are_a_runtime_error_and_the_others_go_on(queue_name: str) -> None:
    program = """
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if hard < 700:
            print("descriptors", end="")
            sys.exit()
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 700), hard))
        handles = [ShmQueue(sys.argv[1]) for _ in range(512)]
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(3):
            error = raised(ShmQueue, sys.argv[1])
            assert type(error) is exceptions.ShmQueueRuntimeError, repr(error)
            assert "512" in str(error) and repr(sys.argv[1]) in str(error)
        assert len(os.listdir("/proc/self/fd")) == before
        handles[0].put("item")
        assert handles[511].get(block=False) == "item"
        assert handles[300].refs == handles[300].snapshot().ref_count == 512
        pid = os.fork()  # all are inherited, and there is no room for even one of them
        if pid == 0:
            error = raised(handles[5].put, 1)
            assert "attachments" in str(error), repr(error)
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
        handles.pop().shutdown()
        with ShmQueue(sys.argv[1]) as late:
            late.put("late")
            assert handles[0].get(block=False) == "late"
            assert late.refs == 512
        assert handles[0].refs == 511
        for handle in handles:
            handle.shutdown()
        assert not any(sys.argv[1] in name for name in segments())
    """
    if run(program, queue_name) == "descriptors":
        pytest.skip("fewer than 700 file descriptors are allowed here")


def test_without_file_descriptors_attaching_fails_and_what_is_attached_goes_on(queue_name: str) -> None:
    program = """
        q = ShmQueue(sys.argv[1])
        other = ShmQueue(sys.argv[1])
        q.put("kept")
        taken = take_all_descriptors()
        for _ in range(3):
            for name in (sys.argv[1], sys.argv[1] + ".new"):
                error = raised(ShmQueue, name)
                assert isinstance(error, OSError) and error.errno == errno.EMFILE, repr(error)
        assert q.get(block=False) == "kept"
        for i in range(1000):
            q.put(i)
            assert other.get() == i
        assert q.refs == 2
        assert q.check() == []
        other.shutdown()
        while taken:
            os.close(taken.pop())
        assert q.refs == 1
        q.shutdown()
        assert not any(sys.argv[1] in name for name in segments())
    """
    run(program, queue_name)


def test_without_file_descriptors_the_last_one_to_leave_still_frees_the_memory(queue_name: str) -> None:
    program = """
        q = ShmQueue(sys.argv[1])
        taken = take_all_descriptors()
        q.shutdown()
        while taken:
            os.close(taken.pop())
        assert not any(sys.argv[1] in name for name in segments())
    """
    run(program, queue_name)


def test_program_that_closes_all_descriptors_goes_on_and_is_still_alive_to_others(queue_name: str) -> None:
    program = """
        q = ShmQueue(sys.argv[1])
        other = ShmQueue(sys.argv[1])
        os.closerange(3, 256)
        files = [open("/dev/null") for _ in range(20)]  # the same numbers, something else behind them
        q.put("kept")
        assert (q.refs, other.refs) == (2, 2)
        assert other.get(block=False) == "kept"
        for file in files:
            file.read()
        other.shutdown()
        assert q.refs == 1
        q.shutdown()
        for file in files:
            file.read()  # none of them was closed
            file.close()
        assert not any(sys.argv[1] in name for name in segments())
    """
    run(program, queue_name)


def test_without_memory_attaching_is_enomem_and_leaves_nothing(queue_name: str) -> None:
    program = """
        before = len(os.listdir("/proc/self/fd"))
        limit_memory(64 << 20)
        for _ in range(3):
            error = raised(ShmQueue, sys.argv[1], buffer_size=48 << 20)  # mapped twice
            assert isinstance(error, OSError) and error.errno == errno.ENOMEM, repr(error)
            assert not any(sys.argv[1] in name for name in segments())
        assert len(os.listdir("/proc/self/fd")) == before
        with ShmQueue(sys.argv[1]) as q:
            q.put(1)
            assert q.get() == 1
    """
    run(program, queue_name)


@pytest.mark.parametrize("call", ["q.get(block=False)", "q.get_many(block=False)"])
@pytest.mark.parametrize("kind", ["bytes", "str", "pickle"])
def test_get_without_memory_for_the_item_leaves_it_in_the_queue(queue_name: str, call: str, kind: str) -> None:
    program = f"""
        q = ShmQueue(sys.argv[1], buffer_size=80 << 20)
        item = {{"bytes": b"x" * (64 << 20), "str": "x" * (64 << 20), "pickle": {{b"x" * (64 << 20)}}}}[sys.argv[2]]
        q.put(item)
        q.put("next")
        del item
        limit_memory(16 << 20)
        for _ in range(3):
            try:
                {call}
            except MemoryError:
                pass
            else:
                raise AssertionError("no MemoryError")
            assert q.qsize() == 2
        resource.setrlimit(resource.RLIMIT_AS, UNLIMITED)
        assert q.check() == []
        item = {call}
        item = item[0] if isinstance(item, list) else item
        assert len(item) == (64 << 20) or len(item.pop()) == (64 << 20)
    """
    run(program, queue_name, kind)


def test_get_with_memory_for_the_payload_but_not_for_the_item_loses_nothing(queue_name: str) -> None:
    """Decoding has failed, so the error has the payload. (ormsgpack 1.13 ends the process, hence a pickle.)"""
    program = """
        import pickle
        q = ShmQueue(sys.argv[1], buffer_size=80 << 20)
        q.put({b"x" * (64 << 20)})
        q.put("next")
        limit_memory(96 << 20)
        error = raised(q.get, block=False)
        resource.setrlimit(resource.RLIMIT_AS, UNLIMITED)
        assert type(error) is exceptions.ShmQueueDeserializationError
        assert isinstance(error.__cause__, MemoryError)
        assert pickle.loads(error.payload) == {b"x" * (64 << 20)}
        assert q.get(block=False) == "next"
    """
    run(program, queue_name)


@pytest.mark.parametrize("method", [1, 1001])
def test_put_without_memory_for_the_copy_puts_nothing(queue_name: str, method: int) -> None:
    """By all methods but msgpack: ormsgpack 1.13 ends the process when there is no memory."""
    program = """
        q = ShmQueue(sys.argv[1], buffer_size=80 << 20)
        q.custom_serialize(lambda method, data: data[0].encode() + b".")
        item = ["x" * (64 << 20)]
        limit_memory(16 << 20)
        try:
            q.put(item, serialization_method=int(sys.argv[2]))
        except MemoryError:
            pass
        else:
            raise AssertionError("no MemoryError")
        resource.setrlimit(resource.RLIMIT_AS, UNLIMITED)
        assert q.empty() and q.buffer_occupancy() == 0 and q.check() == []
        q.put(item)
        assert q.get() == item
    """
    run(program, queue_name, str(method))


@pytest.mark.parametrize("kind", ["bytes", "out of band"])
def test_put_of_large_buffers_needs_no_memory_for_a_copy(queue_name: str, kind: str) -> None:
    program = """
        import pickle
        class Large:
            def __init__(self, data):
                self.data = data
            def __reduce_ex__(self, protocol):
                return Large, (pickle.PickleBuffer(self.data),)
        q = ShmQueue(sys.argv[1], buffer_size=80 << 20)
        data = bytes(64 << 20)
        item = data if sys.argv[2] == "bytes" else Large(data)
        limit_memory(16 << 20)
        q.put(item, block=False)
        resource.setrlimit(resource.RLIMIT_AS, UNLIMITED)
        got = q.get(block=False)
        assert (got if sys.argv[2] == "bytes" else bytes(got.data)) == data
    """
    run(program, queue_name, kind)


# ---- errors themselves


def test_errors_do_not_keep_the_queue(queue_name: str, path: Path) -> None:
    q = ShmQueue[Any](queue_name)
    errors: list[BaseException] = []
    calls: list[tuple[str, Any]] = [("get", False), ("put", bytes(10**6)), ("put", lambda: 0), ("get_many", 0)]
    for method, argument in calls:
        try:
            getattr(q, method)(argument)
        except exceptions.ShmQueueException as error:
            errors.append(error.with_traceback(None))
    assert len(errors) == 4
    for error in errors:
        error.__context__ = error.__cause__ = None
    del q
    assert not path.exists()


@pytest.mark.parametrize("kind", ["Empty", "Full", "ValueError", "SerializationError", "DeserializationError"])
def test_errors_of_the_queue_travel_by_pickle(q: ShmQueue[Any], kind: str) -> None:
    q.custom_serialize(lambda method, data: data)
    calls: dict[str, Callable[[], Any]] = {
        "Empty": lambda: q.get(timeout=0.001),
        "Full": lambda: q.put_many([bytes(3000)] * 2, block=False),
        "ValueError": lambda: q.put(bytes(5000)),
        "SerializationError": lambda: q.put(lambda: 0),
        "DeserializationError": lambda: q.put(b"x", serialization_method=MY_METHOD) or q.get(),
    }
    with pytest.raises(getattr(exceptions, f"ShmQueue{kind}")) as caught:
        calls[kind]()
    there = pickle.loads(pickle.dumps(caught.value))
    assert type(there) is type(caught.value)
    assert str(there) == str(caught.value)
    assert repr(q.identifier) in str(there)


def test_snapshot_travels_by_pickle(q: ShmQueue[Any]) -> None:
    assert isinstance(pickle.loads(pickle.dumps(q.snapshot())), ShmRefDataSnapshot)


def test_msgpack_of_a_lying_length_is_no_reason_to_allocate_it(queue_name: str, path: Path) -> None:
    """A payload that claims to hold 4 GiB fails in no time and little memory."""
    program = """
        q = ShmQueue(sys.argv[1])
        resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
        error = raised(q.get, block=False)
        print(type(error).__name__, len(error.payload))
    """
    with ShmQueue[Any](queue_name) as q:
        q.custom_serialize(lambda method, data: data)
        for head in (b"\xdd", b"\xdf", b"\xc6", b"\xdb", b"\xc9"):
            q.put(bytes(16), serialization_method=MY_METHOD)
            with ShmQueue[Any](queue_name + ".2") as fresh:  # whose first record is at the ring's beginning
                fresh.custom_serialize(lambda method, data: data)
                fresh.put(bytes(16), serialization_method=MY_METHOD)
                patch_payload(SHM / f"shmqueue.{queue_name}.2", 0, head + b"\xff" * 4 + bytes(11))
                assert run(program, queue_name + ".2") == "ShmQueueDeserializationError 16\n"
        assert msgpack.unpackb(msgpack.packb(1)) == 1


# ---- found by attacks

F_OFD_SETLK = 37  # Python's fcntl has no name for it


@pytest.mark.parametrize("options", [{}, {"allow_pickle": False}, {"strict_types": True}], ids=str)
@pytest.mark.parametrize("kind", ["list", "dict", "tuple"])
@pytest.mark.parametrize("levels", [*range(1015, 1030)])
def test_what_put_takes_get_can_decode_at_any_depth(
    queue_name: str, options: dict[str, Any], kind: str, levels: int
) -> None:
    item: Any = []
    for _ in range(levels - 1):
        item = {"list": [item], "dict": {"a": item}, "tuple": (item,)}[kind]
    with ShmQueue[Any](queue_name, buffer_size=1 << 16, **options) as q:
        try:
            q.put(item)
        except exceptions.ShmQueueSerializationError:
            assert q.empty()
        else:
            q.get_nowait()


class HandlersError(Exception):
    pass


def raise_it(number: int, frame: Any) -> None:
    raise HandlersError


def test_the_exception_of_a_signal_handler_is_not_taken_for_the_packers(queue_name: str) -> None:
    before = signal.signal(signal.SIGALRM, raise_it)
    try:
        with ShmQueue[Any](queue_name, buffer_size=1 << 26, strict_types=True) as q:
            item = [b"xxx"] * 2_000_000  # looked through in Python, for a while
            signal.setitimer(signal.ITIMER_REAL, 0.05)
            with pytest.raises(HandlersError):
                q.put(item)
            assert q.empty()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_one_stopped_while_attaching_holds_up_nobody_else(queue_name: str, path: Path) -> None:
    """It has byte 0 locked. Neither forks nor other queues wait, and Ctrl-C interrupts who does."""

    def wait_in_vain() -> None:
        with pytest.raises(exceptions.ShmQueueRuntimeError):
            ShmQueue[Any](queue_name)

    with ShmQueue[Any](queue_name) as q, ShmQueue[Any](queue_name + ".other") as other:
        fd = os.open(path, os.O_RDWR)
        lock = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 1, 0)
        fcntl.fcntl(fd, F_OFD_SETLK, lock)
        waiter = threading.Thread(target=wait_in_vain)
        waiter.start()
        try:
            time.sleep(0.1)
            start = time.monotonic()
            pid = os.fork()
            if pid == 0:
                os._exit(0)
            os.waitpid(pid, 0)
            with ShmQueue[Any](queue_name + ".other") as third:
                assert third.refs == 2
            other.put(1)
            assert q.qsize() == 0
            before = signal.signal(signal.SIGALRM, raise_it)
            signal.setitimer(signal.ITIMER_REAL, 0.1)
            try:
                with pytest.raises(HandlersError):
                    ShmQueue[Any](queue_name)
            finally:
                signal.signal(signal.SIGALRM, before)
            assert time.monotonic() - start < 2.0
        finally:
            waiter.join()
            os.close(fd)


def test_timeouts_beyond_any_float_are_told_of_other_errors(q: ShmQueue[Any]) -> None:
    with pytest.raises(exceptions.ShmQueueValueError, match="takes 5011 bytes"):
        q.put(bytes(5000), timeout=10**400)
    q.shutdown()
    with pytest.raises(exceptions.ShmQueueNotInitializedError):
        q.get(timeout=10**400)


def test_a_handle_is_opened_once(q: ShmQueue[Any], queue_name: str) -> None:
    with pytest.raises(exceptions.ShmQueueRuntimeError, match="is open already"):
        q.__init__(queue_name + ".other")  # type: ignore[misc]
    assert q.identifier == queue_name


def test_a_logger_that_is_none_is_a_type_error(queue_name: str) -> None:
    with pytest.raises(exceptions.ShmQueueTypeError, match=r"logger must be .* not str"):
        ShmQueue(queue_name, logger="bad")  # type: ignore[arg-type]


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_the_resource_tracker_of_a_family_says_nothing(queue_name: str, method: str, tmp_path: Path) -> None:
    program = tmp_path / "family.py"
    program.write_text(
        "import multiprocessing, shmqueue\n"
        "def child():\n"
        f"    with shmqueue.ShmQueue({queue_name!r}, track_resources=True) as q: q.put(1)\n"
        "if __name__ == '__main__':\n"
        f"    q = shmqueue.ShmQueue({queue_name!r}, track_resources=True)\n"
        f"    p = multiprocessing.get_context({method!r}).Process(target=child)\n"
        "    p.start(); p.join(); assert q.get(timeout=5) == 1; q.shutdown()\n"
    )
    done = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
