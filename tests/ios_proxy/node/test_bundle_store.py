"""How a node keeps bundles: in pieces, damaged, with hostile names, on a full disk."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest

from mpgpt.errors import ModelError
from mpgpt_ios.bundle import Bundle, bundle_hash
from mpgpt_ios.node.bundle_store import KEPT, SPARE, NoRoom, Store
from mpgpt_ios.protocol.messages import File, Offer
from tests.ios_proxy.rig import make_bundle


@pytest.fixture(scope="module")
def bundle(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_bundle(models["llama"], tmp_path_factory.mktemp("bundle"), padding=5000)


def offer(bundle: Bundle) -> Offer:
    files = tuple(File(name=e.name, length=e.length, sha256=e.sha256) for e in bundle.entries)
    return Offer(bundle=bundle.hash, files=files)


def test_a_bundle_that_comes_in_pieces_and_after_a_restart(bundle: Bundle, tmp_path: Path) -> None:
    arrival = Store(tmp_path).receive(offer(bundle))
    assert arrival.have == 0 and Store(tmp_path).find(bundle.hash) is None
    arrival.write(bundle.read(0, 1234))
    arrival.close()
    again = Store(tmp_path).receive(offer(bundle))
    assert again.have == 1234 and Store(tmp_path).hashes() == []
    again.write(bundle.read(1234, 1 << 20))
    kept = again.finish()
    assert kept.hash == bundle.hash and Store(tmp_path).hashes() == [bundle.hash.hex()]
    found = Store(tmp_path).find(bundle.hash)
    assert found and found.read(0, 1 << 20) == bundle.read(0, 1 << 20)
    assert [path.name for path in tmp_path.iterdir()] == [bundle.hash.hex()]


def test_what_came_damaged_is_not_kept(bundle: Bundle, tmp_path: Path) -> None:
    store = Store(tmp_path)
    arrival = store.receive(offer(bundle))
    data = bytearray(bundle.read(0, 1 << 20))
    data[len(data) // 2] ^= 1
    arrival.write(bytes(data))
    with pytest.raises(ModelError, match="damaged on the way"):
        arrival.finish()
    assert not list(tmp_path.iterdir())
    again = store.receive(offer(bundle))
    again.close()
    assert again.have == 0


def test_what_was_damaged_later_is_thrown_away(bundle: Bundle, tmp_path: Path) -> None:
    store = Store(tmp_path)
    arrival = store.receive(offer(bundle))
    arrival.write(bundle.read(0, 1 << 20))
    arrival.finish()
    weights = tmp_path / bundle.hash.hex() / "model.mlpackage" / "Data" / "weight.bin"
    weights.write_bytes(b"x" + weights.read_bytes()[1:])
    assert store.find(bundle.hash) is None and not list(tmp_path.iterdir())


NAMES = [
    "../a", "/etc/passwd", "model.mlpackage/../../a", "model.mlpackage", "model.mlpackage\\a", "C:a", "other",
    "model.mlpackage//a", "./manifest.json", "model.mlpackage/a\nb", "",
    "model.mlpackage/é", "model.mlpackage/a b", "model.mlpackage/./a", "model.mlpackage/a/",
    "model.mlpackage/" + "a" * 190,
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_names_that_lead_elsewhere(bundle: Bundle, tmp_path: Path, name: str) -> None:
    files = sorted([*offer(bundle).files, File(name=name, length=1, sha256=bytes(32))], key=lambda f: f.name.encode())
    hostile = Offer(bundle=bundle_hash([(f.name, f.length, f.sha256) for f in files]), files=tuple(files))
    with pytest.raises(ModelError, match="which it may not have"):
        Store(tmp_path).receive(hostile)
    assert not list(tmp_path.iterdir())


def test_offers_that_cannot_be(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, files = Store(tmp_path), offer(bundle).files

    def refused(files: tuple[File, ...], digest: bytes | None = None) -> str:
        right = bundle_hash([(f.name, f.length, f.sha256) for f in files])
        with pytest.raises(ModelError) as caught:
            store.receive(Offer(bundle=digest or right, files=files))
        return str(caught.value)

    assert "not the one that its hash names" in refused(files, bytes(32))
    assert "not the one that its hash names" in refused(tuple(reversed(files)))
    assert "lacks its manifest" in refused(files[1:])
    assert "names a file twice" in refused((files[0], files[0], *files[1:]))
    alike = [replace(file, name=name) for file in files[1:2] for name in ("model.mlpackage/A", "model.mlpackage/a")]
    assert "names a file twice" in refused((files[0], *alike, files[-1])), "on a disk that does not tell cases apart"
    large = tuple(File(name=f.name, length=1 << 40, sha256=f.sha256) for f in files)
    assert "more than is taken here" in refused(large)

    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(1000))
    assert "there is no room for a package" in refused(files)
    assert not list(tmp_path.iterdir())


def test_a_name_that_is_anothers_folder(bundle: Bundle, tmp_path: Path) -> None:
    """Refused before anything comes: not when all of it lies there and is to be written out."""
    for folder, name in (("Data/weight.bin", "Data/weight.bin/a"), ("a", "a/b/c"), ("a-b/a", "a-b/a/a")):
        both = [File(name=f"model.mlpackage/{each}", length=1, sha256=bytes(32)) for each in (folder, name)]
        files = {file.name: file for file in (*offer(bundle).files, *both)}
        listed = tuple(files[name] for name in sorted(files, key=str.encode))
        hostile = Offer(bundle=bundle_hash([(f.name, f.length, f.sha256) for f in listed]), files=listed)
        with pytest.raises(ModelError) as caught:
            Store(tmp_path).receive(hostile)
        assert f"'model.mlpackage/{folder}' as a file and as the folder of 'model" in str(caught.value)
        assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def many(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> list[Bundle]:
    root, made = tmp_path_factory.mktemp("many"), list[Bundle]()
    for n in range(KEPT + 2):
        (root / str(n)).mkdir()
        made.append(make_bundle(models["llama"], root / str(n), padding=100 + n))
    return made


def keep(store: Store, bundle: Bundle) -> None:
    arrival = store.receive(offer(bundle))
    arrival.write(bundle.read(0, 1 << 20))
    arrival.finish()


def test_old_bundles_make_room(many: list[Bundle], tmp_path: Path) -> None:
    """There are never more than ``KEPT``, and the one that was used longest ago goes first."""
    store = Store(tmp_path / "store")
    for at, bundle in enumerate(many[:KEPT]):
        keep(store, bundle)
        assert len(store.hashes()) == at + 1
    assert store.find(many[0].hash)
    keep(store, many[KEPT])
    assert store.hashes() == sorted(bundle.hash.hex() for bundle in (many[0], *many[2 : KEPT + 1]))
    arrival = store.receive(offer(many[KEPT + 1]))
    arrival.close()
    assert len(list((tmp_path / "store").iterdir())) == KEPT, "what came half is counted too"
    keep(store, many[KEPT + 1])
    assert store.hashes() == sorted(bundle.hash.hex() for bundle in (many[0], *many[3:]))


class Usage(NamedTuple):
    free: int


def test_what_is_free_is_asked_when_old_bundles_have_made_room(
    many: list[Bundle], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path / "store")
    for bundle in many[:KEPT]:
        keep(store, bundle)
    disk = SPARE + 2 * many[KEPT].length + sum(bundle.length for bundle in many[1:KEPT])

    def usage(path: Path) -> Usage:
        return Usage(disk - sum(file.stat().st_size for file in path.rglob("*") if file.is_file()))

    monkeypatch.setattr(shutil, "disk_usage", usage)
    keep(store, many[KEPT])
    disk -= 1000
    with pytest.raises(NoRoom):
        store.receive(offer(many[KEPT + 1]))


def test_half_a_bundle_needs_room_for_its_rest_and_for_all_its_files(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, half = Store(tmp_path), bundle.length // 2
    arrival = store.receive(offer(bundle))
    arrival.write(bundle.read(0, half))
    arrival.close()
    need = SPARE + (bundle.length - half) + bundle.length
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(need - 1))
    with pytest.raises(NoRoom):
        store.receive(offer(bundle))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(need))
    again = store.receive(offer(bundle))
    again.close()
    assert again.have == half, "it was not thrown away"


FULL = Path("/dev/full")


@pytest.mark.skipif(not FULL.exists(), reason="no device here is always full")
def test_a_disk_that_is_full_when_the_last_bytes_are_written(bundle: Bundle, tmp_path: Path) -> None:
    part = tmp_path / f"{bundle.hash.hex()}.part"
    part.mkdir()
    (part / "bytes").symlink_to(FULL)
    arrival = Store(tmp_path).receive(offer(bundle))
    arrival.write(b"a few bytes, which wait for more")
    with pytest.raises(NoRoom, match="the disk is full"):
        arrival.finish()
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not FULL.exists(), reason="no device here is always full")
def test_a_disk_that_is_full_on_the_way(bundle: Bundle, tmp_path: Path) -> None:
    part = tmp_path / f"{bundle.hash.hex()}.part"
    part.mkdir()
    (part / "bytes").symlink_to(FULL)
    arrival = Store(tmp_path).receive(offer(bundle))
    with pytest.raises(NoRoom, match="the disk is full"):
        arrival.write(bytes(1 << 20))
    arrival.write(b"a few bytes")
    arrival.close()


def test_a_place_where_nothing_can_be_made(bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / f"{bundle.hash.hex()}.part").write_text("a file where a folder should be")
    with pytest.raises(ModelError, match="cannot be kept: File exists"):
        Store(tmp_path).receive(offer(bundle))


def test_a_store_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match="cannot keep packages"):
        Store(tmp_path / "file" / "store")
