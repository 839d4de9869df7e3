"""Where paths lead, and files that are replaced: links, modes, owners, and what is no regular file."""

from __future__ import annotations

import errno
import os
import resource
import stat
import threading
from pathlib import Path
from typing import Any

import pytest

from mpgpt.errors import OutputError, ReaderGone, UsageError
from mpgpt.files import append, check_writable, destination, open_at_end, replace, write_atomically


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def only(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


# -- where a path leads


def test_links_lead_to_the_file_behind_them(tmp_path: Path) -> None:
    real = tmp_path / "there" / "real"
    real.parent.mkdir()
    (tmp_path / "folder").symlink_to("there")
    (tmp_path / "one").symlink_to(real)
    (tmp_path / "two").symlink_to("folder/../one")
    for way in (real, tmp_path / "folder" / "real", tmp_path / "one", tmp_path / "two"):
        for _ in ("before it is there", "and after"):
            target = destination(way)
            assert (target.path, target.regular, target.descriptor) == (real, True, None)
        real.touch()
    with pytest.raises(IsADirectoryError):
        destination(tmp_path / "folder")
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(OSError, match="symbolic links") as caught:
        destination(tmp_path / "a")
    assert caught.value.errno == errno.ELOOP


def test_what_is_no_regular_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert not destination(tmp_path / "pipe").regular
    assert not destination(Path(os.devnull)).regular
    (tmp_path / "out").touch()
    descriptor = os.open(tmp_path / "out", os.O_WRONLY)
    (tmp_path / "link").symlink_to(f"/dev/fd/{descriptor}")
    for way in (f"/dev/fd/{descriptor}", f"/proc/self/fd/{descriptor}", str(tmp_path / "link")):
        target = destination(Path(way))
        assert (target.regular, target.descriptor) == (False, descriptor), "though a regular file is open there"
    os.close(descriptor)
    for n, name in enumerate(("/dev/stdin", "/dev/stdout", "/dev/stderr")):
        assert destination(Path(name)).descriptor == n


# -- writing


def test_a_link_is_written_through(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    (tmp_path / "link").symlink_to("far/real")
    for content in (b"new", b"newer"):
        write_atomically(tmp_path / "link", content)
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "far" / "real").read_bytes() == content
    assert only(tmp_path) == ["far", "link"] and only(tmp_path / "far") == ["real"]


@pytest.mark.parametrize("bits", [0o600, 0o640, 0o664, 0o4755])
def test_a_mode_is_kept(tmp_path: Path, bits: int) -> None:
    path = tmp_path / "out"
    path.write_bytes(b"old")
    path.chmod(bits)
    number = path.stat().st_ino
    write_atomically(path, b"new")
    assert mode(path) == bits and path.read_bytes() == b"new"
    assert path.stat().st_ino != number, "replaced, so that nobody sees half of it"


def test_a_new_file_has_the_mode_that_is_usual(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_atomically(tmp_path / "out", b"x")
    finally:
        os.umask(before)
    assert mode(tmp_path / "out") == 0o640


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_an_owner_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.write_bytes(b"old")
    path.chmod(0o600)
    os.chown(path, 12345, 23456)
    write_atomically(path, b"new")
    there = path.stat()
    assert (there.st_uid, there.st_gid, mode(path), path.read_bytes()) == (12345, 23456, 0o600, b"new")


def test_an_owner_that_cannot_be_kept_keeps_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "out"
    path.write_bytes(b"old")
    number = path.stat().st_ino

    def mine(path: Any, target: Any) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "replace", mine)
    write_atomically(path, b"much newer")
    assert (path.stat().st_ino, path.read_bytes()) == (number, b"much newer")
    write_atomically(path, b"n")
    assert path.read_bytes() == b"n" and only(tmp_path) == ["out"]


def test_hard_links_stay_one_file(tmp_path: Path) -> None:
    path, other = tmp_path / "out", tmp_path / "other"
    path.write_bytes(b"some old content")
    other.hardlink_to(path)
    for content in (b"new", b"new, and longer than before"):
        write_atomically(path, content)
        assert other.read_bytes() == content and path.samefile(other)
    assert only(tmp_path) == ["other", "out"]


def test_a_name_as_long_as_names_can_be(tmp_path: Path) -> None:
    path = tmp_path / ("é" * 127)
    for content in (b"1", b"2"):
        check_writable(path, "--json")
        write_atomically(path, content)
        assert path.read_bytes() == content


@pytest.mark.parametrize("linked", [False, True], ids=["replaced", "written over"])
def test_a_full_disk_leaves_the_old_content(tmp_path: Path, linked: bool) -> None:
    path = tmp_path / "out"
    path.write_bytes(b"old" * 100)
    if linked:
        (tmp_path / "other").hardlink_to(path)
    before = only(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OutputError, match=r"--json x cannot be written: File too large"):
            write_atomically(path, b"new" * 1000, "--json x")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == b"old" * 100 and only(tmp_path) == before


def test_appending_leaves_no_half(tmp_path: Path) -> None:
    descriptor = open_at_end(destination(tmp_path / "out"))
    append(descriptor, b"a" * 600)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            append(descriptor, b"b" * 600)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "out").read_bytes() == b"a" * 600
    append(descriptor, b"c")
    os.close(descriptor)
    assert (tmp_path / "out").read_bytes() == b"a" * 600 + b"c"


def test_a_pipe_gets_it_all_and_stays(tmp_path: Path) -> None:
    path, got = tmp_path / "pipe", []
    os.mkfifo(path)
    reader = threading.Thread(target=lambda: got.append(path.read_bytes()))
    reader.start()
    check_writable(path, "--json")
    write_atomically(path, b"x" * 300_000)
    reader.join()
    assert got == [b"x" * 300_000] and path.is_fifo() and only(tmp_path) == ["pipe"]


def test_what_is_open_already_is_appended_to(tmp_path: Path) -> None:
    path = tmp_path / "out"
    with path.open("wb", buffering=0) as file:
        file.write(b"before ")
        number = path.stat().st_ino
        write_atomically(Path(f"/dev/fd/{file.fileno()}"), b"between ")
        file.write(b"after")
    assert path.read_bytes() == b"before between after" and path.stat().st_ino == number


def test_a_reader_that_has_gone_is_no_error_to_tell_of() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with pytest.raises(ReaderGone, match=r"^$"):
        write_atomically(Path(f"/dev/fd/{writing}"), b"x")
    os.close(writing)


def test_replacing_needs_a_file_that_can_be(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        replace(tmp_path / "absent" / "out", b"x")


# -- before the work


def test_devices_can_be_written_and_stay(tmp_path: Path) -> None:
    (tmp_path / "null").symlink_to(os.devnull)
    for path in (Path(os.devnull), tmp_path / "null"):
        check_writable(path, "--json")
        write_atomically(path, b"x")
    assert Path(os.devnull).is_char_device() and (tmp_path / "null").is_symlink()
    with pytest.raises(OutputError, match=r"/dev/full cannot be written: No space left"):
        write_atomically(Path("/dev/full"), b"x")


def test_what_cannot_be_written_is_found_before(tmp_path: Path) -> None:
    (tmp_path / "dangling").symlink_to("absent/out")
    (tmp_path / "file").touch()
    reading, writing = os.pipe()
    for path, said in (
        (tmp_path, "is a directory"),
        (tmp_path / "dangling", "absent does not exist"),
        (tmp_path / "file" / "out", "cannot be written: Not a directory"),
        (Path(f"/dev/fd/{reading}"), "cannot be written: it is closed, or for reading only"),
        (Path("/dev/fd/999"), "cannot be written: Bad file descriptor"),
    ):
        with pytest.raises(UsageError, match=f"^--plot {path}.*{said}"):
            check_writable(path, "--plot")
    check_writable(Path(f"/dev/fd/{writing}"), "--plot")
    os.close(reading)
    os.close(writing)
