"""A cache's entries that are damaged, older than checksums, or of a source that changes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from cache_parts import CPU, Source, flip, make_older, module, read_only, same
from safetensors.torch import save_file
from torch import Tensor

from vortex_core import VortexCheckpointError, nf4
from vortex_core.checkpoint import cache_entry as entry_module
from vortex_core.checkpoint.cache import Cache
from vortex_core.checkpoint.cache_entry import DamagedEntry, EntryFile
from vortex_core.errors import VortexWarning
from vortex_core.storage.materialize import Target
from vortex_core.storage.upload import PIECE

# ---------------------------------------------------------------- damage


def test_no_flipped_bit_goes_unnoticed(source: Source) -> None:
    source.keep()
    data, path = source.entry.read_bytes(), source.entry
    EntryFile(path).verify()
    opened = EntryFile(path)
    with path.open("r+b", buffering=0) as file:
        for i, byte in enumerate(data):
            if i >= opened._start or i % 7 == 0:  # opening a file takes long on some machines
                os.pwrite(file.fileno(), bytes([byte ^ 1 << i % 8]), i)
                with pytest.raises((DamagedEntry, OSError)):
                    (opened if i >= opened._start else EntryFile(path)).verify()
                os.pwrite(file.fileno(), bytes([byte]), i)
    opened.verify()


@pytest.mark.parametrize("place", ["length", "name", "checksum", "data", "end", "empty", "nested header"])
def test_what_is_damaged_is_made_again(source: Source, place: str, quantizations: list[str]) -> None:
    expected = source.keep()
    path, data = source.entry, bytearray(source.entry.read_bytes())
    size = int.from_bytes(data[:8], "little")
    at = {"length": 3, "name": data.index(b"0.bias"), "checksum": data.index(b"checksums") + 20, "data": 8 + size + 70}
    if place in at:
        data[at[place]] ^= 1
    path.write_bytes(
        {"end": data[:-9], "empty": b"", "nested header": (10**5).to_bytes(8, "little") + b"[" * 10**5}.get(place, data)
    )
    quantizations.clear()
    assert same(source.keep(), expected)
    assert sorted(set(quantizations)) == ["0.weight", "1.weight"]
    quantizations.clear()
    assert same(source.keep(), expected)
    assert quantizations == []
    assert [differs for _, differs in Cache(source.folder).damaged()] == [False]
    assert source.names() == [path.name]


def test_damage_in_the_middle_of_a_load(source: Source, quantizations: list[str]) -> None:
    """Half of the module is filled when the last tensor turns out to be damaged: its entry becomes whole again."""
    expected = source.keep()
    flip(source.entry)
    assert same(source.keep(), expected)
    quantizations.clear()
    assert same(source.keep(), expected)
    assert quantizations == []


def test_a_disk_that_damages_every_entry(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = source.keep()
    real = entry_module.checksum
    monkeypatch.setattr(entry_module, "checksum", lambda data: real(data) if len(data) > 1000 else real(data) ^ 1)
    with pytest.warns(VortexWarning, match="cannot be read back"):
        assert same(source.keep(), expected)


def test_an_entry_that_ends_while_it_is_read(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = source.keep()
    cut = iter([True])
    real = EntryFile.read

    def read(self: EntryFile, name: str, device: torch.device = CPU) -> Tensor:
        if name == "1.weight" and next(cut, False):
            os.truncate(self.where, 500)
        return real(self, name, device)

    monkeypatch.setattr(EntryFile, "read", read)
    assert same(source.keep(), expected)
    assert [differs for _, differs in Cache(source.folder).damaged()] == [False]


def test_another_entry_under_its_name(source: Source, tmp_path: Path) -> None:
    expected = source.keep()
    other = Source(tmp_path / "other") if (tmp_path / "other").mkdir() is None else source
    other.keep()
    source.entry.write_bytes(other.entry.read_bytes())
    assert same(source.keep(), expected)


def test_pieces_are_checked_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: Source) -> None:
    monkeypatch.setattr("vortex_core.storage.checksum.PIECE", 64)  # of 192 and 128 bytes
    source.keep()
    with_pieces = EntryFile(source.entry)
    with_pieces.verify()
    assert len(with_pieces._places) > len(list(with_pieces.names()))
    monkeypatch.setattr("vortex_core.storage.checksum.PIECE", PIECE)
    with pytest.raises(DamagedEntry):  # and an entry of other pieces is no entry
        EntryFile(source.entry)


def test_a_source_that_changes_while_it_is_read(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    before = source.path.stat()
    real = nf4.quantize

    def change(weight: Tensor, name: str) -> Any:
        with source.path.open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"x")
        return real(weight, name)

    whole = source.path.read_bytes()
    monkeypatch.setattr(nf4, "quantize", change)
    with pytest.raises(VortexCheckpointError, match="changed while it was read"):
        source.keep()
    assert source.names() == []
    monkeypatch.setattr(nf4, "quantize", real)
    source.path.write_bytes(whole)
    os.utime(source.path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert same(source.keep(), source.keep(source.folder.with_name("other")))


def test_a_source_that_is_replaced_before_it_is_known(source: Source) -> None:
    """Opened, then replaced by a rename: what it is would be asked of the other file, and it is read from this one."""
    part, other = source.part(), source.path.with_name("other")
    save_file({name: torch.zeros(p.shape) for name, p in module().named_parameters()}, other)
    other.replace(source.path)
    target = Target(CPU, torch.float32, source.progress)
    with pytest.raises(VortexCheckpointError, match="changed while it was read"):
        Cache(source.folder).quantized(part, "t5", [(module(), "")], target)
    assert source.names() == []
    assert same(source.keep(), source.keep(source.folder.with_name("another cache")))


@pytest.mark.parametrize("act", ["written", "gone"])
def test_a_source_of_which_only_the_system_knows_that_it_changed(
    source: Source, monkeypatch: pytest.MonkeyPatch, act: str
) -> None:
    """Written to and its time set back, where no sample was taken."""
    before, real = source.path.stat(), nf4.quantize
    monkeypatch.setattr("vortex_core.checkpoint.cache.identity", lambda files: "as it was")
    monkeypatch.setattr("vortex_core.checkpoint.identity.identity", lambda files: "as it was")

    def change(weight: Tensor, name: str) -> Any:
        if act == "gone":
            source.path.unlink(missing_ok=True)
        else:
            os.utime(source.path, ns=(before.st_atime_ns, before.st_mtime_ns))
        return real(weight, name)

    monkeypatch.setattr(nf4, "quantize", change)
    with pytest.raises(VortexCheckpointError, match="changed while it was read"):
        source.keep()
    assert source.names() == []


# ---------------------------------------------------------------- older entries


def test_older_entries_are_taken_over(
    source: Source, quantizations: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = source.keep()
    make_older(source.entry)
    quantizations.clear()
    assert same(source.keep(), expected)
    monkeypatch.setattr(entry_module, "hashlib", None)  # nothing is compared again
    assert same(source.keep(), expected)
    assert quantizations == []
    assert source.names() == [source.entry.with_suffix(".json").name, source.entry.name]


def test_older_entries_of_another_user(
    source: Source, quantizations: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = source.keep()
    make_older(source.entry)
    before = source.entry.with_suffix(".json").read_bytes()
    quantizations.clear()
    read_only(monkeypatch)
    assert same(source.keep(), expected)
    assert quantizations == []
    assert source.entry.with_suffix(".json").read_bytes() == before


@pytest.mark.parametrize("harm", ["no manifest", "not JSON", "nested", "of another kind", "data", "data, summed"])
def test_older_entries_that_are_damaged(source: Source, harm: str, quantizations: list[str]) -> None:
    expected = source.keep()
    make_older(source.entry)
    manifest = source.entry.with_suffix(".json")
    if harm == "data, summed":
        source.keep()
    if harm.startswith("data"):
        flip(source.entry)
    elif harm == "no manifest":
        manifest.unlink()
    else:
        manifest.write_text({"not JSON": "\0", "nested": "[" * 10**5, "of another kind": '{"description": ""}'}[harm])
    quantizations.clear()
    assert [entry.kind for entry in Cache(source.folder).entries()] == ["t5"]
    assert same(source.keep(), expected)
    assert quantizations
    assert source.names() == [source.entry.name]


@pytest.mark.gpu
def test_damage_on_its_way_to_the_device(source: Source) -> None:
    source.keep()
    raw = EntryFile(source.entry)
    assert torch.equal(raw.read("1.weight", torch.device("cuda")).cpu(), raw.read("1.weight"))
    data = bytearray(source.entry.read_bytes())
    data[raw._start + raw._header["1.weight"]["data_offsets"][0]] ^= 1
    source.entry.write_bytes(data)
    with pytest.raises(DamagedEntry):
        EntryFile(source.entry).read("1.weight", torch.device("cuda"))
