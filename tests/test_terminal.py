"""What reaches a terminal: foreign text as text, in every encoding, and sentences in the command's own words."""

import io
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from vortex_core import __main__
from vortex_core.bench import plot_style
from vortex_core.cli import interrupt, terminal
from vortex_core.cli.console import Bars, Console, Grid
from vortex_core.cli.main import app
from vortex_core.errors import VortexInputError
from vortex_core.utils.printable import printable

HOSTILE = "[/] [b]bold[/b] [link=https://x.org]x[/link] [red :smile: \\[x] 🔴 $\\frac{ \x1b[31m\x9b2J\r\a\u202e \udce9"
SHOWN = (
    "[/] [b]bold[/b] [link=https://x.org]x[/link] [red :smile: \\[x] 🔴 $\\frac{ "
    "\\x1b[31m\\x9b2J\\r\\x07\\u202e \\udce9"
)


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "400")


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str, str]]:
    """Runs the command as a process would: exit code and what it wrote, in a console of some encoding."""
    monkeypatch.setattr(interrupt, "install", lambda: None)

    def run(*arguments: str, encoding: str = "utf-8") -> tuple[int, str, str]:
        streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2)]
        for name, stream in zip(("stdout", "stderr"), streams, strict=True):
            monkeypatch.setattr(sys, name, stream)
        monkeypatch.setattr(sys, "argv", ["vortex", *arguments])
        with pytest.raises(SystemExit) as stop:
            __main__.main()
        texts = []
        for stream in streams:
            stream.flush()
            texts.append(stream.buffer.getvalue().decode(encoding))  # type: ignore[attr-defined]
        return int(stop.value.code or 0), *texts

    return run


@pytest.fixture(autouse=True)
def quiet_log() -> Iterator[None]:
    """The command sets up the log of its process, which is the tests' here."""
    handlers, level = logging.root.handlers[:], logging.root.level
    yield
    logging.root.handlers[:], logging.root.level = handlers, level


def test_foreign_text_is_printable() -> None:
    assert printable(HOSTILE) == SHOWN
    assert printable("a\nb\tc") == "a\\nb\\tc"
    assert printable("紅い円 👨‍👩‍👧 naïve") == "紅い円 👨‍👩‍👧 naïve"


@pytest.mark.usefixtures("wide")
def test_nothing_on_a_console_is_markup(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(stderr=True)
    console.say(HOSTILE, (HOSTILE, "green"))
    console.print(HOSTILE)
    grid = Grid("", "found", title=HOSTILE)
    grid.add_row("", HOSTILE)
    console.print(grid)
    with Bars(console) as bars:
        bars.add_task("loading", total=1, count="[/] [red]")
    said = capsys.readouterr().err
    assert said.count(SHOWN) == 5
    assert "[/] [red]" in said
    assert "\x1b" not in said.replace("\x1b[0m", "")


def test_a_sentence_is_never_broken(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    Console(stderr=True).say("a path that somebody copies: ", "/very/long/" * 20)
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_errors_notes_and_log_lines_are_plain(capsys: pytest.CaptureFixture[str]) -> None:
    import warnings

    from vortex_core.errors import VortexWarning

    def fail() -> None:
        with terminal.plain_errors():
            for _ in range(2):
                warnings.warn(HOSTILE, VortexWarning, stacklevel=1)
            raise VortexInputError(HOSTILE)

    with pytest.raises(typer.Exit):
        fail()
    assert capsys.readouterr().err.splitlines() == [f"note: {SHOWN}", f"error: {SHOWN}"]
    record = logging.LogRecord("x", logging.INFO, "x", 1, "%s\nsecond", (HOSTILE,), None)
    assert terminal.Lines("%(message)s").format(record) == f"{SHOWN}\nsecond"


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_every_encoding_takes_every_text(
    main: Callable[..., tuple[int, str, str]], encoding: str, tmp_path: Path
) -> None:
    path = str(tmp_path / f"星 {HOSTILE.replace('/', '')}")
    code, _, said = main("inspect", path, encoding=encoding)
    assert code == 1
    assert "There is no model at" in said
    assert "\x1b" not in said
    assert "Traceback" not in said
    code, said, _ = main("plan", "--model", "tiny", "--vram", "1", encoding=encoding)
    assert code == 0
    assert "step-time blocks" in said


@pytest.mark.parametrize("arguments", [[HOSTILE], ["inspect", "a", HOSTILE], ["generate", "x", "--steps", HOSTILE]])
def test_bad_usage_is_plain(main: Callable[..., tuple[int, str, str]], arguments: list[str]) -> None:
    code, _, said = main(*arguments)
    assert code == 2
    assert said.startswith("Usage: vortex")
    assert "\x1b" not in said


def test_no_command_gets_the_help(main: Callable[..., tuple[int, str, str]]) -> None:
    code, out, err = main()
    assert code in (0, 2)  # which one is click's choice
    assert len((out + err).splitlines()) > 10


def test_a_reader_that_leaves_is_no_error() -> None:
    command = f"{sys.executable} -m vortex_core --help | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert not done.stderr


def test_a_full_disk_behind_the_output_is_a_sentence() -> None:
    command = f"{sys.executable} -m vortex_core --version >/dev/full"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert (done.returncode, done.stderr) == (1, "error: [Errno 28] No space left on device\n")


@pytest.mark.parametrize(
    ("sentence", "said"),
    [
        ("give a folder with both as `tokenizers`.", "give a folder with both as --tokenizers."),
        ("Give files for them as `clip`, `t5`, `vae`.", "Give files for them as --clip, --t5, --vae."),
        ("or load it with `mode` exact.", "or load it with --mode exact."),
        ("Name a folder in `cache_dir` or", "Name a folder in --cache-dir or"),
        ("vram_budget is 9 GB; the smallest vram_budget", "--vram is 9 GB; the smallest --vram"),
        ("There is no model at /x/`vae`/vram_budget.", "There is no model at /x/`vae`/vram_budget."),
    ],
)
def test_the_library_speaks_of_options(sentence: str, said: str) -> None:
    assert terminal.as_options(sentence) == said


def test_titles_begin_no_formula() -> None:
    title = "FLUX $\\frac{ " + HOSTILE.encode(errors="ignore").decode().replace("🔴", "")  # a glyph the font lacks
    figure = plot_style.timeline(title, {title: [(0.0, 1.0)]}, levels=[(1.0, "$\\x", "red")])
    assert plot_style.pixels(figure).shape == (plot_style.HEIGHT, plot_style.WIDTH, 3)


def test_help_needs_no_library() -> None:
    """Of every command, in one process: what it imports is what `--help` and `--version` wait for."""
    script = """
import sys
from typer.main import get_command
from typer.testing import CliRunner
from vortex_core.cli.main import app

def walk(command, path=()):
    yield path
    for name, below in getattr(command, "commands", {}).items():
        yield from walk(below, (*path, name))

paths = list(walk(get_command(app)))
for path in paths:
    result = CliRunner().invoke(app, [*path, "--help"])
    assert result.exit_code == 0, path
    assert "Usage" in result.output
heavy = {"torch", "numpy", "transformers", "diffusers", "matplotlib", "scipy", "PIL", "tokenizers", "bitsandbytes"}
print(len(paths), sorted(heavy & set(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent
    )
    count, heavy = done.stdout.split(maxsplit=1)
    assert int(count) >= 19
    assert heavy.strip() == "[]"


def test_ctrl_c_ends_at_once_and_says_what_was_written() -> None:
    script = """
import os, signal
from vortex_core.cli import interrupt
interrupt.install()
interrupt.tally.begin(4)
interrupt.tally.written = 2
os.kill(os.getpid(), signal.SIGINT)
print("never")
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=Path(__file__).parent.parent
    )
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr == "cancelled; 2 of 4 pictures were written\n"


def test_ctrl_c_waits_for_a_file_and_its_count(monkeypatch: pytest.MonkeyPatch) -> None:
    import signal

    monkeypatch.setattr(interrupt, "_installed", True)
    before = signal.getsignal(signal.SIGINT)
    done = []

    def write() -> None:
        with interrupt.held():
            signal.raise_signal(signal.SIGINT)
            done.append(1)

    try:
        interrupt.raises()
        with pytest.raises(KeyboardInterrupt):
            write()
        interrupt.raises()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
    assert done


def test_a_command_that_ignores_ctrl_c_stays_so(monkeypatch: pytest.MonkeyPatch) -> None:
    import signal

    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        interrupt.install()
        interrupt.raises()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_the_app_alone_still_answers() -> None:
    assert "Usage" in CliRunner().invoke(app, ["--help"]).output


def test_an_empty_path_is_none_where_there_is_a_default_and_else_refused(
    main: Callable[..., tuple[int, str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `VORTEX_CACHE=`: what a script leaves empty is not the folder that it runs in."""
    monkeypatch.setenv("VORTEX_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    foreign = tmp_path / f"t5-{'0' * 24}.safetensors"
    foreign.write_bytes(b"of this folder")
    assert str(tmp_path / "cache") in main("cache", "list", "--cache-dir", "")[1].replace("\n", "")
    assert main("cache", "clear", "--cache-dir", "")[0] == 0
    assert foreign.exists()
    for arguments in (
        ("inspect", ""),
        ("quantize", "", "x.safetensors"),
        ("quantize", "x", ""),
        ("generate", "x", "-o", ""),
        ("generate", "x", "--model", ""),
        ("bench", "latency", "-o", ""),
        ("bench", "latency", "--log", ""),
    ):
        code, _, said = main(*arguments)
        assert code == 2, arguments
        assert "A path is expected, not an empty text." in " ".join(said.replace("\u2502", " ").split()), arguments
