"""Any name but an empty, too long or NUL-bearing one becomes a safe part of a file name."""

from __future__ import annotations

import os
import urllib.parse

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shmqueue.exceptions import ShmQueueTypeError, ShmQueueValueError
from shmqueue.names import MAX_QUOTED, quote, segment_path

# Surrogates too: os.fsdecode() makes names of them.
NAMES = st.text(st.characters(exclude_characters="\0"), min_size=1, max_size=MAX_QUOTED // 12)


@given(NAMES)
def test_quoted_name_is_a_plain_file_name_that_leads_back(name: str) -> None:
    quoted = quote(name)
    assert quoted.isascii()
    assert quoted.isprintable()
    assert "/" not in quoted
    assert not quoted.startswith(".")
    assert urllib.parse.unquote(quoted, errors="surrogatepass") == name


@given(NAMES, NAMES)
def test_different_names_are_quoted_differently(one: str, other: str) -> None:
    assert (quote(one) == quote(other)) == (one == other)


def test_surrogates_are_not_taken_for_the_character_whose_bytes_they_stand_for() -> None:
    assert quote(os.fsdecode("é".encode("latin-1"))) != quote("é")
    assert quote("\udcc3\udca9") != quote("é")


@pytest.mark.parametrize(
    ("name", "quoted"),
    [
        ("jobs", "jobs"),
        ("a.b-c_d~e", "a.b-c_d~e"),
        (".", "%2E"),
        ("..", "%2E."),
        (".hidden", "%2Ehidden"),
        ("../../etc/passwd", "%2E.%2F..%2Fetc%2Fpasswd"),
        ("50%", "50%25"),
        ("two words\n", "two%20words%0A"),
        ("é", "%C3%A9"),
    ],
)
def test_quoting_is_that_of_urls(name: str, quoted: str) -> None:
    assert quote(name) == quoted
    assert segment_path(name) == f"/dev/shm/shmqueue.{quoted}"


def test_a_name_may_take_as_many_bytes_as_allowed_and_no_more() -> None:
    assert len(quote("x" * MAX_QUOTED)) == MAX_QUOTED
    assert len(f"_ref_log_{quote('x' * MAX_QUOTED)}.json.lock") <= 255
    with pytest.raises(ShmQueueValueError, match=r"takes 201 bytes .* at most 200"):
        quote("x" * (MAX_QUOTED + 1))
    with pytest.raises(ShmQueueValueError, match=r"takes 204 bytes .* at most 200"):
        quote("/" * 68)


@pytest.mark.parametrize("name", ["", "\0", "jobs\0"])
def test_empty_names_and_nul_are_refused(name: str) -> None:
    with pytest.raises(ShmQueueValueError, match=r"0 characters|NUL at index"):
        quote(name)


@pytest.mark.parametrize("name", [None, 1, b"jobs", ["jobs"]])
def test_a_name_that_is_no_str_is_a_type_error(name: object) -> None:
    with pytest.raises(ShmQueueTypeError, match=type(name).__name__):
        quote(name)  # type: ignore[arg-type]
