"""A cache's entries beside other programs, other users, other processes and killed ones."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cache_parts import CPU, Source, module, read_only, same
from torch import Tensor
from typer.testing import CliRunner

from vortex_core import VortexInputError
from vortex_core.checkpoint import cache as cache_module
from vortex_core.checkpoint.cache import Cache, default_folder
from vortex_core.cli.main import app
from vortex_core.errors import VortexWarning
from vortex_core.storage.materialize import Target
from vortex_core.utils import lock as lock_module
from vortex_core.utils.lock import Lock
from vortex_core.utils.paths import expanded
from vortex_core.utils.temporary_files import HOST, partial

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


# ---------------------------------------------------------------- other people's files, other people's folders


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
