"""`vortex bench`: what it prints, writes and exits with."""

from __future__ import annotations

import csv
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from clock import told_time
from typer.testing import CliRunner, Result

from vortex_core import Engine
from vortex_core.bench import latency_report, revisions, samples
from vortex_core.bench.baseline import History, default_folder
from vortex_core.bench.workload import Workload
from vortex_core.cli.bench_output import homeless
from vortex_core.cli.main import app
from vortex_core.errors import VortexError, VortexInputError
from vortex_core.utils import packages

runner = CliRunner()
SMALL = ["--size", "64x64", "--steps", "1", "--device", "cpu"]
LATENCY = ["latency", *SMALL, "--iterations", "12", "--warmup", "0", "--cold", "2"]
Bench = Callable[..., Result]


@pytest.fixture
def bench(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """Runs `vortex bench ...` with the shared engine, and checks the exit code."""
    monkeypatch.setattr("vortex_core.cli.bench_options.load_engine", lambda *arguments, **options: engine)

    def run(*arguments: str, code: int = 0) -> Result:
        result = runner.invoke(app, ["bench", *arguments])
        assert result.exit_code == code, result.output
        return result

    return run


def last(result: Result) -> dict[str, Any]:
    """The JSON line at the end."""
    return json.loads(result.stdout.splitlines()[-1])


def test_latency_writes_everything_it_is_asked_for(bench: Bench, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    files = {"--trace": tmp_path / "trace.json", "--prometheus": tmp_path / "x.prom", "--log": tmp_path / "x.jsonl"}
    options = [str(text) for pair in files.items() for text in pair]
    result = bench(*LATENCY, "--target-p50", "1000", "-o", str(folder), *options)
    figures = last(result)
    assert figures["series"]["cached"]["whole"]["count"] == 12
    assert figures["exit_code"] == 0
    assert "unsupported" in result.stdout
    assert "PASS" in result.stdout
    names = {"report.json", "samples.csv", *(f"{n}.{k}" for n in ("latency", "phases", "run") for k in ("png", "svg"))}
    assert {path.name for path in folder.iterdir()} == names

    saved = json.loads((folder / "report.json").read_text())
    assert len(saved["samples"]) == 14
    with (folder / "samples.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["seconds"]) for row in rows] == [sample["seconds"] for sample in saved["samples"]]
    assert [row["cold"] for row in rows] == ["0"] * 12 + ["1"] * 2

    spans = [event for event in json.loads(files["--trace"].read_text())["traceEvents"] if event["ph"] == "X"]
    assert len([span for span in spans if span["name"] == "step 1"]) == 14
    assert all(span["dur"] >= 0 for span in spans)
    first = saved["samples"][0]
    assert spans[0]["dur"] == pytest.approx(first["seconds"] * 1e6)

    metrics = files["--prometheus"].read_text()
    assert metrics.startswith("# HELP vortex_picture_seconds ")
    count = re.search(r'_count\{.*prompt="cached",phase="whole"\} (\d+)', metrics)
    assert count
    assert count[1] == "12"
    lines = [json.loads(line) for line in files["--log"].read_text().splitlines()]
    assert [line["event"] for line in lines] == ["picture"] * 14 + ["report"]


@pytest.mark.slow
def test_json_prints_only_that(bench: Bench) -> None:
    for command in (LATENCY, ["leak", *SMALL, "--iterations", "20"]):
        result = bench(*command, "--json")
        assert len(result.stdout.splitlines()) == 1
        assert last(result)["schema"].startswith("vortex.bench.")


@pytest.mark.parametrize(
    ("options", "code", "word"),
    [
        (["--target-p50", "0.000001"], 1, "FAIL"),
        (["--target-p99", "1000"], 3, "not enough samples: 12, P99 needs 299"),
        (["--target-p99", "0.000001"], 1, "FAIL"),
    ],
)
def test_targets_decide_the_exit_code(bench: Bench, options: list[str], code: int, word: str) -> None:
    result = bench(*LATENCY, *options, code=code)
    assert word in re.sub(r"\s+", " ", result.stdout)
    assert last(result)["exit_code"] == code


def test_an_interrupt_reports_what_was_measured(bench: Bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    draw, calls = samples.draw, []

    def interrupt(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return draw(*arguments, **options)

    monkeypatch.setattr(samples, "draw", interrupt)
    figures = last(bench(*LATENCY, "-o", str(tmp_path / "out"), code=130))
    assert figures["interrupted"]
    assert figures["series"]["cached"]["whole"]["count"] == 4
    assert (tmp_path / "out" / "report.json").is_file()


def test_vram_says_that_there_is_none(bench: Bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(Engine, "unload", lambda self: None)  # the engine is shared
    file = tmp_path / "x.prom"
    result = bench("vram", *SMALL, "-o", str(tmp_path / "out"), "--prometheus", str(file), code=3)
    assert "there is no GPU here" in re.sub(r"\s+", " ", result.stdout)
    assert [stage["name"] for stage in last(result)["stages"]] == ["baseline", "loaded", "peak", "after clean-up"]
    assert (tmp_path / "out" / "vram.svg").is_file()
    assert file.read_text().count("vortex_vram_bytes{") == 4


@pytest.mark.slow
def test_leak_judges_and_plots(bench: Bench, tmp_path: Path) -> None:
    file = tmp_path / "x.prom"
    sizes = ["--size", "64x64", "--size", "80x64", "--steps", "1"]
    result = bench("leak", *sizes, "--iterations", "20", "-o", str(tmp_path / "out"), "--prometheus", str(file))
    assert last(result)["sizes"] == [[64, 64], [80, 64]]
    assert "PASS" in result.stdout
    assert (tmp_path / "out" / "leak.png").is_file()
    assert 'vortex_memory_slope_bytes{counter="host (RSS)"}' in file.read_text()


@pytest.fixture
def time_of() -> Iterator[Callable[[float], None]]:
    """Says how many seconds a picture takes from then on, and each a hundredth more than the one before."""
    with told_time() as (clock, patch):
        generate = Engine.generate

        def say(seconds: float) -> None:
            more = {i: seconds * i / 100 for i in range(100)}
            patch.setattr(Engine, "generate", clock.taking(seconds, generate, more))

        yield say


def test_a_baseline_is_kept_and_compared_with(bench: Bench, tmp_path: Path, time_of: Callable[[float], None]) -> None:
    time_of(1.0)
    work = [*SMALL, "--iterations", "12", "--warmup", "0", "--folder", str(tmp_path / "kept")]
    missing = bench("baseline", "compare", *work, code=1)
    assert "vortex bench baseline save" in re.sub(r"\s+", " ", missing.output)

    saved = Path(last(bench("baseline", "save", *work))["file"])
    assert saved.parent == tmp_path / "kept"
    time_of(3.0)
    result = bench("baseline", "compare", *work, "-o", str(tmp_path / "out"), code=1)
    figures = last(result)
    assert figures["change"] == pytest.approx(2, abs=0.2)
    assert "FAIL" in result.stdout
    assert [json.loads(line)["baseline"] for line in saved.read_text().splitlines()] == [True, False]
    assert (tmp_path / "out" / "trend.svg").read_text().count("baseline")

    other = bench("baseline", "compare", *work, "--prompt", "a red ring", code=1)  # other work, other history
    assert "There is no baseline" in other.output
    saved.write_text("{}\n")
    damaged = bench("baseline", "compare", *work, code=1)
    assert "line 1 is not a benchmark's run" in re.sub(r"\s+", " ", damaged.output)


GOOD = {
    "schema": "vortex.bench.run/1", "when": "2026-01-01T00:00:00+00:00", "vortex": "0.1.0", "baseline": True,
    "seconds": [0.5], "phases": {"decode": 0.1},
}  # fmt: skip


@pytest.mark.parametrize(
    "content",
    [
        b"null",
        b"[]",
        b"7",
        b"\xff\xfe\x00",
        b"{" * 100_000,
        b"[" * 100_000,
        b"",
        json.dumps(GOOD).encode()[:60],
        *(
            json.dumps(GOOD | changed).encode()
            for changed in (
                {"schema": "vortex.bench.run/9"},
                {"seconds": []},
                {"seconds": 7},
                {"seconds": ["a"]},
                {"seconds": [0.5, math.nan]},
                {"seconds": [0]},
                {"seconds": [-1.0]},
                {"seconds": [True]},
                {"seconds": [10**400]},
                {"phases": []},
                {"phases": {"decode": "slow"}},
                {"baseline": "yes"},
                {"when": None},
                {"when": "x" * 100},
                {"vortex": "0.1\x1b[31m"},
            )
        ),
    ],
    ids=lambda content: repr(content[-24:]),
)
def test_a_damaged_history_is_named(tmp_path: Path, content: bytes) -> None:
    history = object.__new__(History)
    history.path = tmp_path / "runs.jsonl"
    assert history.runs() == []
    history.path.write_bytes(json.dumps(GOOD).encode() + b"\n")
    assert history.runs()[0].seconds == (0.5,)
    history.path.write_bytes(json.dumps(GOOD).encode() + b"\n" + content + b"\n")
    with pytest.raises(VortexError, match="line 2 is not a benchmark's run") as error:
        history.runs()
    assert len(str(error.value)) < 600
    assert "\x1b" not in str(error.value)


def test_a_history_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    history = object.__new__(History)
    history.path = tmp_path
    with pytest.raises(VortexError, match="cannot be read: Is a directory"):
        history.runs()
    history.path = tmp_path / "huge.jsonl"
    with history.path.open("wb") as file:
        file.truncate(10**12)
    with pytest.raises(VortexError, match="is over 100 MB"):
        history.runs()


def test_a_missing_matplotlib_is_told_before_measuring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Engine, "load", lambda *a, **o: pytest.fail("loaded"))
    monkeypatch.setattr(packages, "_broken", {})
    for module in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, module, None)
    result = runner.invoke(app, ["bench", "latency", "-o", str(tmp_path / "out")])
    assert result.exit_code == 2
    assert "vortex-flux[plots]" in " ".join(result.output.split())
    assert not list(tmp_path.iterdir())


def test_where_runs_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VORTEX_BASELINES", "")  # empty is unset
    monkeypatch.setenv("XDG_DATA_HOME", "/data")
    assert default_folder() == Path("/data/vortex/baselines")
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # nobody knows this user
    monkeypatch.delenv("XDG_DATA_HOME")
    with pytest.raises(VortexInputError, match="name one with --folder"):
        default_folder()


def test_reports_name_no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    assert homeless('{"file": "/home/somebody/x", "other": "/home/somebodyelse"}') == (
        '{"file": "~/x", "other": "/home/somebodyelse"}'
    )


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["latency", "--size", "65x64"], "width must be a multiple of 16"),
        (["latency", "--steps", "9"], "steps must be from 1 to 8"),
        (["latency", "--iterations", "0"], "equal to 1"),
        (["latency", "--trace", "no/such/folder/t.json"], "There is no folder"),
        (["latency", "--output", __file__], "--output must be a folder"),
        (["latency", "--output", __file__ + "/x/y"], "--output must be a folder"),
        (["latency", "--output", "/proc/self/x"], "No file can be written into /proc/self"),
        (["latency", "--log", "/proc/self/x"], "No file can be written into /proc/self"),
        (["latency", "--mode", "quick"], "Unknown mode 'quick'"),
        (["latency", "--quantization", "int8"], "Unknown quantization 'int8'"),
        (["latency", "--vram", "nan"], "--vram must be above 0"),
        (["latency", "--target-p50", "inf"], "--target-p50 must be at least 0"),
        (["latency", "--prompt", "caf\udce9"], "A prompt is not UTF-8 at character 4"),
        (["latency", *(["--prompt", "x"] * 17)], "Give from 1 to 16 prompts, not 17"),
        (["baseline", "save", "--folder", "/proc/self/x"], "No file can be written into /proc/self"),
        (["baseline", "compare", "--threshold", "inf"], "--threshold must be at least 0"),
        (["compare", "--comfyui", "no/such/tree"], "There is no ComfyUI tree"),
        (["leak", "--size", "x"], "--size must look like"),
        (["vram", "--size", "16x16"], "must be a multiple of 16 from 64"),
        (["baseline", "compare", "--against", "no-such-revision"], "that knows 'no-such-revision'"),
        (["baseline", "compare", "--against", "--help"], "that knows '--help'"),
    ],
)
def test_bad_input_is_refused_before_anything_is_loaded(
    arguments: list[str], sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Engine, "load", lambda *a, **o: pytest.fail("loaded"))
    result = runner.invoke(app, ["bench", *arguments])
    assert result.exit_code == 2, result.output
    assert sentence in re.sub(r"[\s\u2502]+", " ", result.output)


def test_help_names_the_exit_codes() -> None:
    said = re.sub(r"\s+", " ", runner.invoke(app, ["bench", "latency", "--help"]).output)
    assert "Exit codes: 0 pass, 1 fail, 2 bad usage, 3 undecided, 130 interrupted" in said


@pytest.mark.slow
def test_two_revisions_take_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # a checkout of two commits whose `vortex_core` only says how long it took: 50 ms, then 100
    core = tmp_path / "vortex_core" / "__init__.py"
    core.parent.mkdir()
    git = ["git", "-c", "user.name=x", "-c", "user.email=x@example.org", "-C", str(tmp_path)]
    subprocess.run([*git, "init", "--quiet"], check=True)
    for seconds in (0.05, 0.1):
        core.write_text(STAND_IN.format(seconds=seconds))
        subprocess.run([*git, "add", "."], check=True)
        subprocess.run([*git, "commit", "--quiet", "-m", "x"], check=True)
    monkeypatch.setattr(revisions, "ROOT", tmp_path)
    command = ["bench", "baseline", "compare", "--against", "HEAD^", "--iterations", "12", "--json"]
    result = runner.invoke(app, command)
    assert result.exit_code == 1, result.output
    figures = json.loads(result.stdout)
    assert figures["paired"]
    assert figures["change"] == pytest.approx(1)
    assert [path.name for path in tmp_path.iterdir()].count("revision") == 0
    trees = subprocess.run([*git, "worktree", "list"], check=True, capture_output=True, text=True).stdout
    assert len(trees.splitlines()) == 1


STAND_IN = """
import time
from types import SimpleNamespace

now = 0.0
time.perf_counter = lambda: now

def load_flux_schnell(model, **options):
    print("what libraries print is no reply")
    return SimpleNamespace(name=model, native_size=64, device=SimpleNamespace(type="cpu"), generate=generate)

def generate(**request):
    global now
    now += {seconds}
    return SimpleNamespace(cpu=lambda: None)
"""


def test_a_worker_that_dies_is_named(tmp_path: Path) -> None:
    with pytest.raises(Exception, match=re.escape(str(tmp_path))):
        revisions.Worker(tmp_path, {"model": "no/such/model"})


@pytest.mark.parametrize("name", ["flux_latency", "flux_vram_profile"])
def test_modules_run_as_the_commands(name: str) -> None:
    command = [sys.executable, "-m", f"vortex_core.bench.{name}", "--help"]
    said = subprocess.run(command, cwd=Path(__file__).parent.parent, check=True, capture_output=True, text=True).stdout
    assert "--output" in said


def test_reports_say_what_was_measured(engine: Engine) -> None:
    report = latency_report.run(engine, Workload(64, 80, steps=1, iterations=1, warmup=0, cold=0))
    assert report.title.startswith("tiny-schnell, 64 x 80, 1 step, on ")
