# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""What a command says, whether or not anyone can read it."""

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import TextIO


GONE = {errno.EPIPE, errno.EIO}  # the reader of a pipe, or the terminal


class _Terminal:
    """A text stream that replaces what its encoding lacks, and is silent once nobody reads it."""

    def __init__(self, stream: TextIO):
        self.stream = stream

    def __getattr__(self, name: str):
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        encoding = self.stream.encoding or "utf-8"
        try:
            text.encode(encoding, self.stream.errors or "strict")
        except UnicodeEncodeError:
            text = text.encode(encoding, "replace").decode(encoding)
        self._try(self.stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._try(self.stream.flush)

    def _try(self, function, *arguments):
        try:
            function(*arguments)
        except OSError as error:
            if error.errno not in GONE:
                raise
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.stream.fileno())  # for what is still in buffers, too
            os.close(nowhere)


@contextmanager
def forgiving_terminal() -> Iterator[None]:
    """So that neither a closed pipe nor a character that stdout or stderr cannot encode aborts the work."""
    with (
        redirect_stdout(sys.stdout and _Terminal(sys.stdout)),  # `None` where it was closed from the beginning
        redirect_stderr(sys.stderr and _Terminal(sys.stderr)),
    ):
        yield


def progress(message: str) -> None:
    """Says on stderr what is going on."""
    print(f"ttt-omni: {message}", file=sys.stderr, flush=True)
