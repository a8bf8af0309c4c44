"""The command ``shmqueue``, also ``python -m shmqueue``: each subcommand is a module that adds itself."""

from __future__ import annotations

import argparse
import os
import signal
from collections.abc import Sequence

from . import __version__, bench, storm

__all__ = ["main"]

COMMANDS = (bench.add_command, storm.add_command)
"""Functions that add a subcommand's parser; its default ``run`` takes the arguments and returns the exit code."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line, by default this process's own, and return the exit code.

    Raises:
        SystemExit: after ``--help`` and ``--version`` with code 0, for arguments that can't do with 2.
    """
    parser = argparse.ArgumentParser(
        prog="shmqueue", description="Tools for queues in shared memory.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"shmqueue {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add_command in COMMANDS:
        add_command(commands)
    arguments = parser.parse_args(argv)
    try:
        code: int = arguments.run(arguments)
        print(end="", flush=True)
    except BrokenPipeError:  # whoever reads, like `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for the interpreter's own flush
        code = 128 + signal.SIGPIPE
    return code
