"""What the command does to the world around it: no network, no files but its own, no mode changed, no prompt told."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROMPT = "a secret ring of brass"
# Sockets refuse, and what is opened to be written, made, renamed or removed is noted.
WATCHED = """
import json, os, sys
log = open(os.environ["WATCHED"], "a", buffering=1)
CHANGES = {"os.mkdir": 1, "os.rename": 2, "os.remove": 1, "os.rmdir": 1, "os.link": 2, "os.symlink": 2, "os.chmod": 1,
           "os.truncate": 1, "os.chown": 1, "os.utime": 1, "os.mkfifo": 1, "shutil.rmtree": 1}
def watch(event, arguments):
    if event in ("socket.connect", "socket.bind", "socket.sendto", "socket.getaddrinfo", "socket.gethostbyname"):
        log.write(json.dumps(["network", event, repr(arguments[1:])]) + "\\n")
        raise ConnectionRefusedError("no network")
    if event == "open" and arguments[0] is not None and not isinstance(arguments[0], int):
        path, mode, flags = arguments
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) if isinstance(flags, int) else set(mode or "") & set("wax+"):
            log.write(json.dumps(["written", os.path.abspath(os.fsdecode(path))]) + "\\n")
    elif event in CHANGES:
        for path in arguments[:CHANGES[event]]:
            if not isinstance(path, int):
                log.write(json.dumps(["changed", os.path.abspath(os.fsdecode(path))]) + "\\n")
sys.addaudithook(watch)
os.umask(0o027)
sys.argv = ["vortex", *sys.argv[1:]]
from vortex_core.cli.main import app
try:
    app()
finally:
    umask = os.umask(0)
    log.write(json.dumps(["umask", umask]) + "\\n")
"""


CALLS = (
    "open,openat,creat,mkdir,mkdirat,rename,renameat,renameat2,unlink,unlinkat,link,linkat,symlink,symlinkat,chmod,"
    "fchmodat,truncate,connect,bind"
)


def can(*command: str) -> bool:
    """Whether a program is there, and works here."""
    return shutil.which(command[0]) is not None and subprocess.run(command, capture_output=True).returncode == 0


class Run:
    """One `vortex generate` in a home of its own, watched; also by strace, where that is installed."""

    def __init__(self, folder: Path) -> None:
        self.home, self.out, self.cache, self.temporary = (folder / name for name in ("home", "out", "cache", "tmp"))
        for made in (self.home, self.out, self.temporary):
            made.mkdir()
        self.model = shutil.copytree(ROOT / "vortex_core/assets/tiny-schnell", folder / "model")
        self.before = self.state()
        self.log, self.trace = folder / "watched", folder / "trace"
        environment = {
            "PATH": os.environ["PATH"], "HOME": str(self.home), "TMPDIR": str(self.temporary), "OMP_NUM_THREADS": "1",
            "VORTEX_CACHE": str(self.cache), "WATCHED": str(self.log), "PYTHONPATH": str(ROOT), "LANG": "C.UTF-8",
            "PYTHONDONTWRITEBYTECODE": "1",
        }  # fmt: skip
        options = ("--model", str(self.model), "--device", "cpu", "--size", "64x64", "--steps", "1", "--seed", "1")
        command = [sys.executable, "-c", WATCHED, "-v", "generate", *options, "-o", str(self.out / "a.png"), PROMPT]
        if can("strace", "-o", os.devnull, "true"):
            command = ["strace", "-f", "-qq", "-e", f"trace={CALLS}", "-o", str(self.trace), *command]
        self.result = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=300)
        self.watched = [json.loads(line) for line in self.log.read_text().splitlines()]

    def state(self) -> dict[str, tuple[int, int, int]]:
        """Mode, size and time of the model's files."""
        return {
            str(path): (status.st_mode, status.st_size, status.st_mtime_ns)
            for path in sorted(self.model.rglob("*"))
            for status in [path.stat()]
        }

    def allowed(self, path: str) -> bool:
        """Whether Vortex may write there: the output's folder, its cache, temporary folders, devices."""
        mine = (self.out, self.cache, self.temporary, Path("/dev"), Path("/proc/self"))
        return path == str(self.log) or any(Path(path).is_relative_to(place) for place in mine)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    made = Run(tmp_path_factory.mktemp("offline"))
    assert made.result.returncode == 0, made.result.stderr
    assert (made.out / "a.png").is_file()
    return made


@pytest.mark.slow
def test_no_connection_is_tried(run: Run) -> None:
    assert [line for line in run.watched if line[0] == "network"] == []


def test_nothing_is_written_outside_output_cache_and_temporary_folders(run: Run) -> None:
    written = {line[1] for line in run.watched if line[0] in ("written", "changed")}
    assert str(run.out) in {str(Path(path).parent) for path in written}  # it was watched
    assert sorted(path for path in written if not run.allowed(path)) == []
    assert sorted(path.name for path in run.home.rglob("*") if path.is_file()) == []
    assert [path.name for path in run.out.iterdir()] == ["a.png"]


def test_the_system_calls_say_the_same(run: Run) -> None:
    if not run.trace.exists():
        pytest.skip("NOT RUN: strace is not installed, or may not trace here")
    writes = re.compile(r"(?:O_WRONLY|O_RDWR|O_CREAT)")
    written, connected = set(), []
    for line in run.trace.read_text(errors="replace").splitlines():
        call = line.split(maxsplit=1)[1]
        name, paths = call.partition("(")[0], re.findall(r'"((?:[^"\\]|\\.)*)"', call)
        if call.rstrip().endswith(("ENOENT (No such file or directory)", "EEXIST (File exists)")):
            continue
        if name in ("connect", "bind") and "AF_UNIX" not in call:
            connected.append(call)
        elif paths and (not name.startswith("open") or writes.search(call)) and name not in ("connect", "bind"):
            written |= {os.path.join(run.out.parent, path) for path in paths}
    assert connected == []
    assert written
    assert sorted(path for path in written if not run.allowed(path)) == []


def test_modes_times_and_umask_are_kept(run: Run) -> None:
    assert run.state() == run.before
    assert stat.S_IMODE((run.out / "a.png").stat().st_mode) == 0o666 & ~0o027
    assert ["umask", 0o027] in run.watched


def test_the_log_does_not_tell_the_prompt(run: Run) -> None:
    """At INFO, which --verbose asks for."""
    assert "NF4 backend" in run.result.stderr
    for word in ("secret", "brass"):
        assert word not in run.result.stderr + run.result.stdout


@pytest.mark.slow
def test_without_any_network_it_draws(tmp_path: Path) -> None:
    """In a network namespace of its own, where not even the loopback is up."""
    if not can("unshare", "-rn", "true"):
        pytest.skip("NOT RUN: no network namespace can be had here")
    code = "import sys; from vortex_core.cli.main import app; sys.argv[0] = 'vortex'; app()"
    options = ("--device", "cpu", "--size", "64x64", "--steps", "1", "-o", str(tmp_path / "a.png"))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "0"}
    command = ["unshare", "-rn", sys.executable, "-c", code, "generate", *options, PROMPT]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "a.png").is_file()
