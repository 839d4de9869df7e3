"""The bundles that a node keeps: by hash, each in a folder of its own; one that came half is taken up again.

Knows: folders, what is whole, which names may be written.
Must not know: sockets, messages' order, what a package is for.

A bundle is a folder named by its hash, and is there only when every byte has been checked. What is under way lies in
``HASH.part``: the bytes as they come, one file after the other, in ``bytes``; their table was in the offer, which comes
again with every attempt.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import shutil
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from mpgpt.errors import ModelError
from mpgpt_ios.bundle import MANIFEST, PACKAGE, SELFTEST, Bundle, bundle_hash
from mpgpt_ios.protocol import messages as m

MAX_BUNDLE = 64 << 30
SPARE = 64 << 20
"""Bytes that must stay free on the disk."""
KEPT = 4
"""Bundles at most, those that came half included; the one that was used longest ago makes room for the next."""
PART = ".part"
PLAIN_NAME = re.compile("[A-Za-z0-9._/-]{1,200}")


class NoRoom(ModelError):
    """The disk is full, or would be. NO_SPACE on the wire."""


class Store:
    """A folder of bundles."""

    def __init__(self, folder: Path) -> None:
        """Raises ``ModelError`` when the folder cannot be made."""
        self._folder = folder.expanduser()
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ModelError(f"{folder} cannot keep packages: {error.strerror}") from None

    def hashes(self) -> list[str]:
        """Of the bundles that are here, in hex."""
        return sorted(path.name for path in self._folder.iterdir() if path.is_dir() and not path.suffix)

    def find(self, digest: bytes) -> Bundle | None:
        """A bundle that is here and whole; None if it is absent, or damaged, in which case it is deleted."""
        folder = self._folder / digest.hex()
        if not folder.is_dir():
            return None
        try:
            bundle = Bundle.at(folder)
        except ModelError:
            bundle = None
        if bundle is None or bundle.hash != digest:
            shutil.rmtree(folder, ignore_errors=True)
            return None
        os.utime(folder)
        return bundle

    def receive(self, offer: m.Offer) -> PartialBundle:
        """Take up a bundle where it was left. Raises ``ModelError`` when it cannot be what it claims, ``NoRoom`` when
        there is too little even after old bundles have made room."""
        check_offer(offer)
        total = offer.length
        folder = self._folder / offer.bundle.hex()
        part = folder.with_suffix(PART)
        try:
            self._make_room(part)
            data = part / "bytes"
            have = data.stat().st_size if data.exists() else 0
            if have > total:
                data.unlink()
                have = 0
            # What is still to come, and then every file once more.
            if shutil.disk_usage(self._folder).free < total - have + total + SPARE:
                raise NoRoom(
                    f"there is no room for a package of {total / 1e6:.0f} MB; free some, or delete old packages"
                )
            part.mkdir(exist_ok=True)
            return PartialBundle(part, folder, offer, have)
        except OSError as error:
            raise _disk(error) from None

    def _make_room(self, part: Path) -> None:
        """For one bundle more, whose beginning may be in ``part`` already."""
        others = [path for path in self._folder.iterdir() if path.is_dir() and path != part]
        others.sort(key=lambda path: path.stat().st_mtime, reverse=True)
        for path in others[KEPT - 1 :]:
            shutil.rmtree(path, ignore_errors=True)


class PartialBundle:
    """A bundle on its way in."""

    def __init__(self, part: Path, folder: Path, offer: m.Offer, have: int) -> None:
        self._part, self._folder, self._offer = part, folder, offer
        self.have, self.total = have, offer.length
        self._file: BinaryIO = (part / "bytes").open("ab")

    def write(self, piece: bytes) -> None:
        """The next bytes. Raises ``ModelError`` when the disk is full."""
        try:
            self._file.write(piece)
        except OSError as error:
            raise _disk(error) from None
        self.have += len(piece)

    def finish(self) -> Bundle:
        """All is here: check it, and give it its place. Raises ``ModelError`` when it is not what was offered, or
        cannot be written; then nothing of it is kept."""
        fresh = self._part / "files"
        try:
            self._file.close()  # writes what is left, for which the disk may be too full
            shutil.rmtree(fresh, ignore_errors=True)
            with (self._part / "bytes").open("rb") as data:
                for file in self._offer.files:
                    _write_out(data, file, fresh / file.name)
            bundle = Bundle.at(fresh)
            assert bundle.hash == self._offer.bundle, "every file is right, and the whole is not"
            os.replace(fresh, self._folder)
        except OSError as error:
            raise _disk(error) from None
        finally:
            shutil.rmtree(self._part, ignore_errors=True)
        return Bundle.at(self._folder)

    def close(self) -> None:
        """Keep the bytes so far; WANT requests again those for which the disk has no room."""
        with contextlib.suppress(OSError):
            self._file.close()


def _write_out(data: BinaryIO, file: m.File, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    digest, left = hashlib.sha256(), file.length
    with path.open("xb") as out:
        while left:
            block = data.read(min(left, 1 << 20))
            if not block:
                raise ModelError(f"the package's {file.name} is cut")
            out.write(block)
            digest.update(block)
            left -= len(block)
    if digest.digest() != file.sha256:
        raise ModelError(f"the package's {file.name} was damaged on the way: its hash does not fit")


def check_offer(offer: m.Offer) -> None:
    """Raise ``ModelError`` where these files cannot be a bundle, before any of them comes."""
    total = offer.length
    if total > MAX_BUNDLE:
        raise ModelError(f"a package of {total / 1e9:.1f} GB is more than is taken here")
    files = [(file.name, file.length, file.sha256) for file in offer.files]
    if files != sorted(files, key=lambda file: file[0].encode()) or bundle_hash(files) != offer.bundle:
        raise ModelError("the package is not the one that its hash names")
    names = {name for name, _, _ in files}
    for name in names:
        _check_name(name)
    if len({name.lower() for name in names}) != len(files) or not {MANIFEST, SELFTEST} < names:
        raise ModelError("the package lacks its manifest or its self-test, or names a file twice")
    for name in sorted(names):
        for folder in map(str, PurePosixPath(name).parents):
            if folder in names:
                raise ModelError(f"the package has {folder!r} as a file and as the folder of {name!r}")


def _check_name(name: str) -> None:
    """A name that cannot leave the folder, on any system."""
    parts = name.split("/")
    inside = parts[0] == PACKAGE and len(parts) > 1
    plain = PLAIN_NAME.fullmatch(name) and not {"", ".", ".."} & set(parts)
    if not plain or not (inside or name in (MANIFEST, SELFTEST)):
        raise ModelError(f"the package has a file named {name!r}, which it may not have")


def _disk(error: OSError) -> ModelError:
    if error.errno == errno.ENOSPC:
        return NoRoom("the disk is full")
    return ModelError(f"the package cannot be kept: {error.strerror}")
