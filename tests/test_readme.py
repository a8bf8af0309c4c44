"""Each Python block of the README runs, as a program of its own in a fresh interpreter."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
TEXT = README.read_text(encoding="utf-8")
BLOCKS = [
    # "\n" for each line above it, so that a traceback shows the README's line numbers
    pytest.param("\n" * TEXT.count("\n", 0, match.start(1)) + match[1], id=f"line-{line}")
    for match in BLOCK.finditer(TEXT)
    for line in [TEXT.count("\n", 0, match.start(1)) + 1]
]


# Not the queues of somebody who uses these names for real.
QUEUE = re.compile(r'"((?:my|demo)_queue|readme_\w+)"')


@pytest.mark.parametrize("code", BLOCKS)
def test_block_runs_by_itself(code: str, tmp_path: Path, queue_name: str) -> None:
    program = tmp_path / "README_block.py"
    code, names = QUEUE.subn(rf'"{queue_name}.\1"', code)
    assert names > 0
    program.write_text(code, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-W", "error", str(program)],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=tmp_path,
        env={**os.environ, "PYTHONFAULTHANDLER": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


def test_readme_has_the_blocks_that_it_should() -> None:
    assert len(BLOCKS) >= 8


def test_quick_dive_comes_first() -> None:
    assert 'q = shmqueue.ShmQueue("my_queue", buffer_size=shmqueue.SYSTEM_PAGESIZE)' in TEXT
