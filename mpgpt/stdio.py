"""Standard input, output and error as this process was given them: closed, full, without a reader, of any encoding.

Knows: what becomes of a write that fails, and of a character that an encoding lacks.
Must not know: what is written.

Standard output fails with an ``OutputError``, whoever writes to it. Standard error never fails: a message that cannot
be said is lost, and what it is about goes on.
"""

from __future__ import annotations

import codecs
import errno
import io
import os
import select
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TextIO

from mpgpt.errors import OutputError, ReaderGone

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

STREAMS = ("stdin", "stdout", "stderr")


def settle() -> None:
    """Prepare the three streams; before anything else is opened, which would take the place of one that is closed."""
    for descriptor, name in enumerate(STREAMS):
        if getattr(sys, name) is None:
            _occupy(descriptor)
    if sys.stdin is None:
        sys.stdin = io.TextIOWrapper(io.BufferedReader(io.FileIO(0, closefd=False)), encoding="utf-8")
    elif isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")
    sys.stdout = _stream(sys.stdout, _Output(1, "w", closefd=False))
    sys.stderr = _stream(sys.stderr, _Messages(2, "w", closefd=False))


def finish() -> OutputError | None:
    """Flush standard output for the last time; what prevents it, if anything does."""
    try:
        sys.stdout.flush()
    except OutputError as error:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)  # takes what is left over, which the interpreter would try once more
        os.close(null)
        return error
    return None


def parting(error: OutputError) -> int:
    """Say what ends a run that is otherwise in order; its exit status."""
    if str(error):
        sys.stderr.write(f"mpgpt: {error}\n")
    return error.exit_status


def is_utf8() -> bool:
    """Whether standard output can take any text."""
    return codecs.lookup(sys.stdout.encoding).name == "utf-8"


def put(text: str) -> None:
    """Write to standard output, at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


def output_error(error: OSError, what: str) -> OutputError:
    """The sentence for a failed write to ``what``; none for a reader that has what it wanted."""
    if error.errno == errno.EPIPE:
        return ReaderGone()
    return OutputError(f"{what} cannot be written: {error.strerror or error}")


def write_all(descriptor: int, data: ReadableBuffer) -> None:
    """Write all of ``data``; raises ``OSError``. Waits where a pipe that must not block takes no more for now."""
    rest = memoryview(data).cast("B")
    while rest:
        try:
            rest = rest[os.write(descriptor, rest) :]
        except BlockingIOError:
            poll = select.poll()
            poll.register(descriptor, select.POLLOUT)
            poll.poll()


class _Output(io.FileIO):
    """The bottom of standard output."""

    def write(self, data: ReadableBuffer, /) -> int:
        try:
            write_all(self.fileno(), data)
        except OSError as error:
            if error.errno == errno.EBADF:
                raise OutputError("standard output cannot be written: it is closed") from None
            raise output_error(error, "standard output") from None
        return memoryview(data).nbytes


class _Messages(io.FileIO):
    """The bottom of standard error."""

    def write(self, data: ReadableBuffer, /) -> int:
        with suppress(OSError):
            write_all(self.fileno(), data)
        return memoryview(data).nbytes


def _occupy(descriptor: int) -> None:
    """Put something where a closed stream was: nothing can be read from it, and writing fails as if it were closed."""
    try:
        os.fstat(descriptor)
    except OSError:
        null = os.open(os.devnull, os.O_RDONLY)
        if null != descriptor:
            os.dup2(null, descriptor)
            os.close(null)


def _stream(old: TextIO | None, bottom: io.FileIO) -> Any:
    """``old`` with another bottom; characters that its encoding lacks are escaped. Not what a test has put there."""
    if old is not None and old is not sys.__stdout__ and old is not sys.__stderr__:
        return old
    unbuffered = bool(getattr(old, "write_through", False))  # python -u
    buffer: Any = bottom if unbuffered else io.BufferedWriter(bottom)
    return io.TextIOWrapper(
        buffer, encoding=old.encoding if old else "utf-8", errors="backslashreplace", newline="\n",
        line_buffering=bool(old and old.line_buffering), write_through=unbuffered,
    )  # fmt: skip
