"""Files that are written whole or not at all."""

import errno
import os
import resource
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from vortex_core.errors import VortexInputError
from vortex_core.utils import whole_files


@pytest.mark.parametrize("links", [True, False])
def test_an_existing_file_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool) -> None:
    if not links:
        _without_links(monkeypatch)
    path = tmp_path / "x.png"
    whole_files.write(path, b"first", replace=False)
    with pytest.raises(FileExistsError):
        whole_files.write(path, b"second", replace=False)
    assert path.read_bytes() == b"first"
    whole_files.write(path, b"second", replace=True)
    assert path.read_bytes() == b"second"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("links", [True, False])
def test_modes_are_what_the_umask_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool) -> None:
    if not links:
        _without_links(monkeypatch)
    before = os.umask(0o027)
    try:
        whole_files.write(tmp_path / "x.png", b"x", replace=False)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "x.png").stat().st_mode) == 0o640


@pytest.mark.parametrize("replace", [True, False])
def test_a_full_disk_leaves_no_half(tmp_path: Path, replace: bool) -> None:
    path = tmp_path / "x.png"
    if replace:
        path.write_bytes(b"mine")
    with file_size_limit(1000), pytest.raises(OSError, match="too large"):
        whole_files.write(path, bytes(100_000), replace=replace)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == ({"x.png": b"mine"} if replace else {})


def test_a_device_is_written_to_and_stays(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    whole_files.write(pipe, b"whole", replace=True)
    assert os.read(reader, 100) == b"whole"
    assert pipe.is_fifo()
    os.close(reader)


def test_a_line_is_added_whole_or_not_at_all(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    whole_files.add_line(log, b"first")
    with log.open("ab") as half:
        half.write(b"half of a li")
    whole_files.add_line(log, b"second")
    assert log.read_bytes() == b"first\nhalf of a li\nsecond\n"
    with file_size_limit(30), pytest.raises(OSError, match=r"No space left|too large"):
        whole_files.add_line(log, b"x" * 100)
    assert log.read_bytes() == b"first\nhalf of a li\nsecond\n"
    whole_files.add_line(log, b"third")
    assert log.read_bytes().endswith(b"second\nthird\n")


def test_a_line_goes_into_a_pipe(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    whole_files.add_line(pipe, b"whole")
    assert os.read(reader, 100) == b"whole\n"
    os.close(reader)


def test_a_place_is_checked_without_a_trace(tmp_path: Path) -> None:
    whole_files.check_file(tmp_path / "x.png")
    assert not list(tmp_path.iterdir())
    for path, sentence in (
        (tmp_path / "no" / "x", "There is no folder"),
        (tmp_path / ("x" * 256), "File name too long"),
        (Path("/proc/self/x"), "No file can be written into /proc/self"),
        (tmp_path.parent / tmp_path.name, "is a folder"),
    ):
        with pytest.raises(VortexInputError, match=sentence):
            whole_files.check_file(path)


@contextmanager
def file_size_limit(limit: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def _without_links(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
