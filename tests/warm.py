"""Processes that start warm: forked from one that has only imported what a training needs.

To import torch and Lightning takes seconds of CPU time, so tests that kill a training again and
again do not start Python anew for each.
"""

import contextlib
import multiprocessing
import os
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path

PRELOAD = ["training.runs", "tests.conftest"]


class WarmProcess:
    """A function in a process of its own, which tells what it does, line by line.

    Args:
        function: of a module's top level. It gets a function that sends a line, then the arguments.
        arguments: must be picklable.
    """

    def __init__(self, function: Callable[..., None], *arguments: object):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        self.lines, there = context.Pipe(duplex=False)
        self.process = context.Process(target=run, args=(there, function, *arguments), daemon=True)
        self.process.start()
        there.close()

    def __iter__(self) -> Iterator[str]:
        """Give the lines until the process ends, however it ends."""
        with contextlib.suppress(EOFError):
            while True:
                yield self.lines.recv()

    def kill(self) -> None:
        """Kill it (SIGKILL) and wait until it is gone."""
        self.process.kill()
        self.process.join()
        self.lines.close()


def run(there: Connection, function: Callable[..., None], *arguments: object) -> None:
    """Call the function in the new process; what it prints goes nowhere."""
    with Path(os.devnull).open("w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        function(there.send, *arguments)
