"""A cache's entries under everything that happens to files: damage, other programs, other users, killed processes."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from typer.testing import CliRunner

from vortex_core import VortexCheckpointError, VortexInputError, nf4
from vortex_core.checkpoint import cache as cache_module
from vortex_core.checkpoint import cache_entry as entry_module
from vortex_core.checkpoint.cache import Cache, default_folder
from vortex_core.checkpoint.cache_entry import DamagedEntry, EntryFile
from vortex_core.checkpoint.dialects import Part
from vortex_core.cli.main import app
from vortex_core.errors import VortexWarning
from vortex_core.quant.backends import ReferenceBackend
from vortex_core.storage.files import SafetensorsFiles
from vortex_core.storage.materialize import Target, materialize, pack
from vortex_core.storage.tensors import Stored
from vortex_core.storage.upload import PIECE
from vortex_core.utils import lock as lock_module
from vortex_core.utils.lock import Lock
from vortex_core.utils.partial import HOST, partial
from vortex_core.utils.paths import expanded

CPU = torch.device("cpu")


def module() -> nn.Module:
    with torch.device("meta"):
        return nn.Sequential(nn.Linear(64, 3), nn.Linear(128, 2), nn.LayerNorm(5))


class Source:
    """A small model in a file, and what came of keeping it."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "model.safetensors"
        made = nn.Sequential(nn.Linear(64, 3), nn.Linear(128, 2), nn.LayerNorm(5))
        save_file({name: p.detach() for name, p in made.named_parameters()}, self.path)
        self.folder = folder / "cache"
        self.progress: Callable[[int], None] = lambda nbytes: None

    def part(self) -> Part:
        stored = Stored(SafetensorsFiles(self.path, [self.path]))
        return Part(stored, stored, "fp32")

    def keep(self, folder: Path | None = None) -> dict[str, Tensor]:
        """Every tensor, read through the cache into a module as a load does; packed weights as bytes."""
        filled, target = module(), Target(CPU, torch.float32, self.progress)
        pack(filled, "", ReferenceBackend())
        tensors = Cache(folder or self.folder).quantized(self.part(), "t5", [(filled, "")], target)
        materialize(filled, tensors, target)
        return {name: value.clone() for name, value in filled.state_dict().items()}

    @property
    def entry(self) -> Path:
        (entry,) = Cache(self.folder).entries()
        return entry.path

    def names(self) -> list[str]:
        return sorted(path.name for path in self.folder.iterdir())


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Source:
    monkeypatch.setattr(cache_module, "SMALLEST", 0)
    torch.manual_seed(0)
    return Source(tmp_path)


@pytest.fixture
def quantizations(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The weights that were quantized."""
    done: list[str] = []
    real = nf4.quantize
    monkeypatch.setattr(nf4, "quantize", lambda weight, name: done.append(name) or real(weight, name))
    return done


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def make_older(path: Path) -> None:
    """The entry as Vortex wrote it before there were checksums: a manifest beside, with the file's SHA-256."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    for key in ("checksums", "entry"):
        del header["__metadata__"][key]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])
    said = {"source": "x", "kind": "t5", "words": "fp32", "format": 1}
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    path.with_suffix(".json").write_text(json.dumps({**said, "sha256": sha256}))


def flip(path: Path) -> None:
    """Change one packed weight, which still decodes."""
    data = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    data[start + json.loads(data[8:start])["1.weight"]["data_offsets"][0]] ^= 16
    path.write_bytes(data)


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


# ---------------------------------------------------------------- other people's files, other people's folders


FOREIGN = {
    "lora.safetensors": "x",
    "lora.json": '{"description": "x"}',
    ".film.mkv.part": "x",
    ".lora.safetensors.123.part": "x",
    "transformer-0.safetensors": "x",
    "clip-000000000000000000000000.safetensors": "x",
    "t5-000000000000000000000000.safetensors.bak": "x",
    "t5-00000000000000000000000g.lock": "x",
    ".vortex-00000000-1-00000000.part~": "x",
}


def test_only_our_names_are_listed_and_removed(source: Source) -> None:
    source.folder.mkdir()
    for name, content in FOREIGN.items():
        (source.folder / name).write_text(content)
    (source.folder / "t5-000000000000000000000000.safetensors").mkdir()
    source.keep()
    kept = Cache(source.folder, limit=0)
    assert [entry.source for entry in kept.entries()] == [str(source.path)]
    assert kept.clear() > 0
    assert source.names() == sorted({*FOREIGN, "t5-000000000000000000000000.safetensors"})


def test_an_empty_name_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("VORTEX_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "vortex"
    assert Cache("").folder == tmp_path / "vortex"


def test_the_home_folder_is_found_everywhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Cache("~/x").folder == Cache(Path("~/x")).folder == tmp_path / "x"
    monkeypatch.setenv("VORTEX_CACHE", "~/y")
    assert Cache().folder == tmp_path / "y"
    said = CliRunner().invoke(app, ["cache", "list", "--cache-dir=~/[z]"])
    assert said.output.replace("\n", "") == f"nothing is kept in {tmp_path}/[z]"


def test_no_home_folder_costs_the_cache_only(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> Path:
        raise RuntimeError("Could not determine home directory.")

    expected = source.keep()
    for name in ("VORTEX_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", none)
    part, filled = source.part(), module()
    with pytest.warns(VortexWarning, match=r"no home folder.*VORTEX_CACHE"):
        tensors = Cache().quantized(part, "t5", [(filled, "")], Target(CPU, torch.float32))
    assert not Cache().lacks(part, "t5")
    assert tensors is part.tensors
    said = CliRunner().invoke(app, ["cache", "list"])
    assert said.exit_code == 2
    assert "no home folder" in said.output
    assert expected


def test_what_is_no_path() -> None:
    with pytest.raises(VortexInputError, match="home folder of a user"):
        expanded("~nobody-of-that-name/x")
    with pytest.raises(VortexInputError, match="zero byte"):
        expanded("a\0b")
    with pytest.raises(VortexInputError, match="path is expected, not 5"):
        expanded(5)  # type: ignore[arg-type]
    assert CliRunner().invoke(app, ["cache", "clear", "--cache-dir", "~nobody-of-that-name"]).exit_code == 2


def read_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """As another user's folder is, for tests that may run as root."""

    def refuse(*arguments: object, **more: object) -> Any:
        raise PermissionError(errno.EACCES, "Permission denied")

    def look(path: Any, flags: int, *arguments: Any) -> int:
        return refuse() if flags & (os.O_WRONLY | os.O_RDWR) else really(path, flags, *arguments)

    really = os.open
    monkeypatch.setattr(os, "open", look)
    for name in ("utime", "replace", "mkdir"):
        monkeypatch.setattr(os, name, refuse)
    monkeypatch.setattr(Path, "unlink", refuse)
    monkeypatch.setattr(Path, "write_text", refuse)


def test_a_cache_of_another_user_is_read(
    source: Source, quantizations: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = source.keep()
    quantizations.clear()
    with monkeypatch.context() as patch:
        read_only(patch)
        assert same(source.keep(), expected)
        assert quantizations == []
    data = bytearray(source.entry.read_bytes())
    data[-1] ^= 1
    source.entry.write_bytes(data)
    read_only(monkeypatch)
    with pytest.warns(VortexWarning, match="could not be kept.*Permission denied"):
        assert same(source.keep(), expected)


@pytest.mark.parametrize("folder", ["a file", "below a file", "a name too long"])
def test_a_folder_that_cannot_be(source: Source, folder: str) -> None:
    expected = source.keep()
    path = {"a file": source.path, "below a file": source.path / "x", "a name too long": source.folder / ("x" * 300)}
    with pytest.warns(VortexWarning, match="could not be kept"):
        assert same(source.keep(path[folder]), expected)


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo, lambda path: os.symlink("nothing", path)])
def test_what_is_no_file_under_an_entrys_name(source: Source, make: Callable[[Path], None]) -> None:
    expected = source.keep()
    path = source.entry
    path.unlink()
    make(path)
    if path.is_dir():
        with pytest.warns(VortexWarning, match="could not be kept"):
            assert same(source.keep(), expected)
    else:
        assert same(source.keep(), expected)
        assert path.is_file()


# ---------------------------------------------------------------- several processes


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EIO])
def test_a_folder_that_cannot_lock(source: Source, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(file: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(lock_module, "_flock", refuse)
    assert source.keep()
    assert source.names() == [source.entry.name]


def test_a_lock_that_never_answers(
    source: Source, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    released = threading.Event()
    monkeypatch.setattr(lock_module, "_flock", lambda file: released.wait(20))
    monkeypatch.setattr(cache_module, "PATIENCE", 0.3)
    source.folder.mkdir()
    path = Cache(source.folder).path_of(source.part(), "t5").with_suffix(".lock")
    path.write_text("process 7 on elsewhere")
    calls = []
    source.progress = calls.append
    with caplog.at_level(logging.INFO):
        assert source.keep()
    released.set()
    assert "Waiting for process 7 on elsewhere" in caplog.text
    assert "which writes nothing; going on" in caplog.text
    assert 0 in calls  # where a load is cancelled
    assert [differs for _, differs in Cache(source.folder).damaged()] == [False]


def test_who_waits_takes_what_the_other_made(source: Source, quantizations: list[str]) -> None:
    results: list[dict[str, Tensor]] = []
    threads = [threading.Thread(target=lambda: results.append(source.keep())) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert same(results[0], results[1])
    assert same(results[0], results[2])
    assert len(quantizations) == 2
    assert source.names() == [source.entry.name]


def test_a_lock_is_one_holders(tmp_path: Path) -> None:
    path = tmp_path / "x.lock"
    with Lock(path) as first:
        assert first.answered(5)
        with Lock(path) as second:
            assert not second.answered(0.05)
            assert second.holder().startswith(f"process {os.getpid()} on ")
    assert second.answered(5)
    with Lock(path) as third:
        assert third.answered(5)
        assert third.refused is None
    assert not path.exists()


def gone() -> int:
    """The number of a process that is no more."""
    pid = os.posix_spawn(shutil.which("true") or "/bin/true", ["true"], {})
    os.waitpid(pid, 0)
    return pid


def test_what_killed_processes_left_is_removed(tmp_path: Path) -> None:
    here, now = HOST, time.time()
    left = [
        f".vortex-{here}-{gone()}-00000001.part",
        f".t5-{'0' * 24}.safetensors.{gone()}.part",  # as they were named before
        f".diffusion_pytorch_model.safetensors.{gone()}.part",
        ".vortex-00000000-1-00000002.part",  # another machine's, silent for long
        f".vortex-{here}-{os.getpid()}-00000003.part",  # a number that is ours now
    ]
    alive = [
        f".vortex-{here}-{os.getpid()}-00000004.part",
        ".vortex-00000000-1-00000005.part",
        ".film.mkv.part",
        f".f.safetensors.{gone()}.part",
    ]
    for name in left + alive:
        (tmp_path / name).write_text("x")
    for name in left[3:]:
        os.utime(tmp_path / name, (now - 10**7, now - 10**7))
    with partial(tmp_path / ("x" * 250)) as written:
        written.write_text("whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*alive, "x" * 250])

    def fill_up() -> None:
        with partial(tmp_path / "y") as written:
            written.write_text("half")
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        fill_up()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*alive, "x" * 250])


def test_the_limit_counts_what_others_own(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    source.keep()
    other = source.folder / f"transformer-{'0' * 24}.safetensors"
    shutil.copy(source.entry, other)
    os.utime(other, (1, 1))
    real = Path.unlink

    def refuse(path: Path, missing_ok: bool = False) -> None:
        if path == other:
            raise PermissionError(errno.EACCES, "Permission denied")
        real(path, missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", refuse)
        Cache(source.folder, limit=0).shrink(keep=source.folder / "none")
    assert source.names() == [other.name]
    Cache(source.folder, limit=0).shrink(keep=source.folder / "none")
    assert source.names() == []


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
