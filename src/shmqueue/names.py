"""Queue names as file names: any character but NUL may stand in a name.

What the system can't take is percent-encoded as in URLs, so each name has one file and
``urllib.parse.unquote(quoted, errors="surrogatepass")`` gives the name back.
"""

from __future__ import annotations

import string

from .exceptions import ShmQueueTypeError, ShmQueueValueError

__all__ = ["MAX_QUOTED", "quote", "segment_path"]

MAX_QUOTED = 200
"""Bytes of a quoted name; with the longest prefix and suffix a file name stays below 255."""

_SEGMENT_PREFIX = "/dev/shm/shmqueue."
_PLAIN = frozenset((string.ascii_letters + string.digits + "-._~").encode())


def quote(name: str) -> str:
    """Return ``name`` as a part of a file name; different names give different parts.

    Raises:
        ShmQueueTypeError: ``name`` isn't a str.
        ShmQueueValueError: it is empty, has a NUL, or takes over ``MAX_QUOTED`` bytes.
    """
    if not isinstance(name, str):
        raise ShmQueueTypeError(f"queue name must be a str, not {type(name).__name__}")
    if not name:
        raise ShmQueueValueError("queue name has 0 characters, at least 1 is needed")
    if "\0" in name:
        raise ShmQueueValueError(
            f"queue name {_short(name)}: NUL at index {name.index(chr(0))}; any other character is allowed"
        )
    # "surrogatepass", not "surrogateescape": the latter would quote '\udcc3\udca9' and 'é' alike.
    quoted = "".join(chr(byte) if byte in _PLAIN else f"%{byte:02X}" for byte in name.encode("utf-8", "surrogatepass"))
    if quoted.startswith("."):  # neither "..", nor a hidden file
        quoted = "%2E" + quoted[1:]
    if len(quoted) > MAX_QUOTED:
        raise ShmQueueValueError(
            f"queue name {_short(name)} takes {len(quoted)} bytes when quoted, at most {MAX_QUOTED} are allowed"
        )
    return quoted


def segment_path(name: str) -> str:
    """Return the path of the queue's segment; raises as ``quote`` does."""
    return _SEGMENT_PREFIX + quote(name)


def _short(name: str) -> str:
    return ascii(name if len(name) <= 40 else name[:37] + "...")
