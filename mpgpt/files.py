"""Files that are written: where a path leads, and how a file is replaced so that nobody sees half of it.

Knows: symbolic links, modes and owners, and what is no regular file.
Must not know: what is in any file.

A regular file is replaced by one that was written beside it. Where that would lose something (a hard link, an owner, a
folder that takes no new file), it is written over. What is no regular file, such as a pipe or a terminal, and whatever
is open already, such as /dev/stdout, is appended to.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import shutil
import stat
from dataclasses import dataclass
from pathlib import Path

from mpgpt.errors import UsageError
from mpgpt.stdio import output_error, write_all

OPEN_ALREADY = re.compile(r"/(?:dev|proc/(?P<pid>\d+)(?:/task/\d+)?)/fd/(?P<descriptor>\d+)")
MOST_LINKS = 40
NO_REPLACING = {errno.EACCES, errno.EPERM, errno.EROFS, errno.EBUSY}
"""Of a folder that takes no new file, an owner that is somebody else, a file that is mounted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Destination:
    """Where a path leads, behind all its symbolic links."""

    path: Path
    regular: bool
    """A regular file, or none yet."""
    descriptor: int | None
    """What this process has open already under that name."""


def destination(path: Path) -> Destination:
    """Follow ``path``. Raises ``OSError`` for links that go round in circles, directories and disks."""
    at = path
    for _ in range(MOST_LINKS):
        at = _in_real_folder(at)
        if match := OPEN_ALREADY.fullmatch(str(at)):
            own = match["pid"] in (None, str(os.getpid()))
            return Destination(path=at, regular=False, descriptor=int(match["descriptor"]) if own else None)
        if not at.is_symlink():
            break
        at = at.parent / at.readlink()
    else:
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
    try:
        mode = at.stat().st_mode
    except FileNotFoundError:
        return Destination(path=at, regular=True, descriptor=None)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if stat.S_ISBLK(mode):
        raise OSError(errno.EINVAL, "it is a disk")
    return Destination(path=at, regular=stat.S_ISREG(mode), descriptor=None)


def _in_real_folder(path: Path) -> Path:
    """The same entry, its folder without links; not the entry itself, which may be a link of a kind of its own."""
    if path.name in ("", ".."):
        return Path(os.path.realpath(path))
    return Path(os.path.realpath(path.parent)) / path.name


def open_at_end(target: Destination) -> int:
    """A descriptor for appending; a new file is made. Raises ``OSError``. A pipe that nobody reads is waited for."""
    if target.descriptor is not None:
        return _for_writing(os.dup(target.descriptor))
    flags = os.O_WRONLY | os.O_APPEND | os.O_NOCTTY
    try:
        return os.open(target.path, flags)
    except FileNotFoundError:  # only now: in a folder for everybody, O_CREAT refuses what belongs to somebody else
        return os.open(target.path, flags | os.O_CREAT, 0o666)


def append(descriptor: int, data: bytes) -> None:
    """Write all of ``data`` at the end, or, to a regular file, nothing. Raises ``OSError``."""
    before = os.fstat(descriptor)
    regular = stat.S_ISREG(before.st_mode)
    at = os.lseek(descriptor, 0, os.SEEK_CUR) if regular else 0
    try:
        write_all(descriptor, data)
    except OSError:
        if regular:
            os.ftruncate(descriptor, before.st_size)
            os.lseek(descriptor, at, os.SEEK_SET)
        raise


def replace(path: Path, data: bytes) -> None:
    """Give a regular file, which is no link and need not be there, new content. Raises ``OSError``."""
    try:
        old = path.stat()
    except FileNotFoundError:
        old = None
    if old and old.st_nlink > 1:
        _overwrite(path, data)
        return
    try:
        _replace(path, data, old)
    except OSError as error:
        if old is None or error.errno not in NO_REPLACING:
            raise
        _overwrite(path, data)


def _replace(path: Path, data: bytes, old: os.stat_result | None) -> None:
    part = path.with_name(f".{path.name[:40]}.{secrets.token_hex(4)}.part")
    try:
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            if old:
                mine = os.fstat(descriptor)
                if (mine.st_uid, mine.st_gid) != (old.st_uid, old.st_gid):
                    os.chown(descriptor, old.st_uid, old.st_gid)
                shutil.copystat(path, part)
            write_all(descriptor, data)
        finally:
            os.close(descriptor)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _overwrite(path: Path, data: bytes) -> None:
    """In its place. First what needs room, so that a disk that is full leaves the old content as it was."""
    with path.open("r+b", buffering=0) as file:
        descriptor, length = file.fileno(), os.fstat(file.fileno()).st_size
        try:
            file.seek(length)
            write_all(descriptor, data[length:])
        except OSError:
            file.truncate(length)
            raise
        file.seek(0)
        write_all(descriptor, data[:length])
        file.truncate(len(data))


def write_atomically(path: Path, data: bytes, what: str = "") -> None:
    """Write ``data`` to where ``path`` leads: whoever looks sees the old file or the new one.

    Raises ``OutputError``, in which ``what`` names the file.
    """
    try:
        target = destination(path)
        if target.regular:
            replace(target.path, data)
            return
        descriptor = open_at_end(target)
        try:
            append(descriptor, data)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise output_error(error, what or str(path)) from None


def check_writable(path: Path, option: str) -> None:
    """Raises ``UsageError`` when what ``option`` names cannot be written. Nothing is changed or left behind."""
    try:
        target = destination(path)
        folder = target.path.parent
        if target.descriptor is not None:
            os.close(_for_writing(os.dup(target.descriptor)))
        elif target.path.exists():
            if not os.access(target.path, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        elif not folder.is_dir():
            raise UsageError(f"{option} {path} cannot be written: the folder {folder} does not exist")
        else:
            os.close(os.open(target.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
            target.path.unlink()
    except IsADirectoryError:
        raise UsageError(f"{option} {path} is a directory, not a file") from None
    except OSError as error:
        raise UsageError(f"{option} {path} cannot be written: {error.strerror or error}") from None


def _for_writing(descriptor: int) -> int:
    """The same descriptor. Raises ``OSError``, and closes it, when it is for reading only."""
    if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
        os.close(descriptor)
        raise OSError(errno.EBADF, "it is closed, or for reading only")
    return descriptor
