"""`vortex bench report`: one text for an issue, in which nobody is named."""

from __future__ import annotations

import getpass
import json
import os
import platform
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from vortex_core import Engine
from vortex_core.bench import issue_report, machine, samples
from vortex_core.bench.anonymous import anonymous
from vortex_core.bench.issue_report import Drawn, IssueReport
from vortex_core.bench.machine import Reading
from vortex_core.bench.workload import PROMPTS, Workload
from vortex_core.cli.main import app
from vortex_core.flux1.spec import FluxSpec, ModelSpec
from vortex_core.memory.planner import MemoryPlan, MemoryRequirements, WeightGroupSize

runner = CliRunner()
SMALL = ["report", "--pictures", "2", "--size", "64x64", "--device", "cpu"]
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


@pytest.fixture
def somebody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, str]:
    """A user and a machine whose names would be noticed, in a folder that tells both."""
    home = tmp_path / "home" / "ferdinand"
    work = home / "secret project"
    work.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("USERPROFILE", str(home))
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.setenv(name, "ferdinand")
    monkeypatch.setattr(platform, "node", lambda: "atlas-7.example.org")
    monkeypatch.chdir(work)
    return {"home": str(home), "work": str(work), "user": "ferdinand", "host": "atlas-7"}


def test_a_report_has_what_an_issue_needs(bench: Bench, tmp_path: Path) -> None:
    result = bench(*SMALL, "--size", "80x64", "-o", str(tmp_path / "out"))
    text, found = (tmp_path / "out/report.md").read_text(), json.loads((tmp_path / "out/report.json").read_text())
    assert text == result.stdout[result.stdout.index("### Vortex") :]
    assert json.loads(re.search(r"```json\n(.*)\n```", text)[1]) == found  # type: ignore[index]
    for words in (
        "| device | CPU ",
        "| versions | vortex ",
        "| model | tiny-schnell, nf4, float32, budget none |",
        "| precision | **exact** (products in 8 bits gain nothing on cpu) |",
        "|  | 64 x 64, 4 steps | 80 x 64, 4 steps |",
        "| pictures | 2 | 2 |",
        "too few to tell) |",
    ):
        assert words in text, words
    rows = [line.split(" | ")[0].removeprefix("| ") for line in text.splitlines() if line.startswith("| ")]
    assert [row for row in rows if row.startswith("P")] == ["P50", "P90", "P95", "P99", "P99.9"]
    assert {"prompt", "steps", "decode", "copy out", "a new prompt adds"} <= set(rows)
    assert not any(row.startswith(("planned", "torch reserved", "PREDICTED")) for row in rows)  # there is no card
    assert found["schema"] == "vortex.bench.report/1"
    assert [drawn["width"] for drawn in found["sizes"]] == [64, 80]
    whole = found["sizes"][0]
    assert len(whole["seconds"]) == whole["series"]["cached"]["count"] == 2
    assert whole["series"]["cold"]["count"] == 3
    assert 0 < whole["parts"]["steps"] < whole["series"]["cached"]["mean"]
    assert found["load_seconds"] >= 0 < found["first_picture_seconds"]
    assert found["hardware"]["memory"] > 1e8


def test_nobody_is_named(bench: Bench, somebody: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even where an error, a driver or a model's file tells it."""
    load = issue_report.run

    def told(make: Any, *arguments: Any, **options: Any) -> IssueReport:
        found = load(make, *arguments, **options)
        why = f"Permission denied: '{somebody['home']}/.triton/x' on Atlas-7 of ferdinand; see {somebody['work']}/a|b"
        return replace(found, reason=why)

    monkeypatch.setattr(issue_report, "run", told)
    result = bench(*SMALL)
    for name in (*somebody.values(), "atlas-7.example.org", "secret project", ".triton", *PROMPTS):
        assert name.lower() not in result.stdout.lower(), name
    assert "Permission denied: '(a path)' on (a name) of (a name); see (a path)\\|b" in result.stdout
    quiet = bench(*SMALL, "--json").stdout
    assert json.loads(quiet)["precision"]["reason"].startswith("Permission denied: '(a path)' on (a name)")


def test_this_machine_is_not_named_either(bench: Bench) -> None:
    text = bench(*SMALL).stdout
    for name in (os.path.expanduser("~"), os.getcwd(), platform.node(), getpass.getuser()):
        assert not re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text, re.IGNORECASE), name


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("12 GB/s, 1/2 of it, and/or GNU/Linux, 50 / 60", "12 GB/s, 1/2 of it, and/or GNU/Linux, 50 / 60"),
        ("'/opt/x/y.so': no such file", "'(a path)': no such file"),
        (r"C:\Users\Jo\x.dll failed", "(a path) failed"),
        (r"\\server\share\x", "(a path)"),
        ("~/models/x and /y", "(a path) and (a path)"),
        ("of ferdinand's, not ferdinands or Ferdinand", "of (a name)'s, not ferdinands or (a name)"),
    ],
)
def test_paths_and_names_are_taken_out(somebody: dict[str, str], text: str, expected: str) -> None:
    assert anonymous({"ferdinand": [text, (text, 7, None)]}) == {"ferdinand": [expected, [expected, 7, None]]}


def test_a_home_with_blanks_is_taken_out(monkeypatch: pytest.MonkeyPatch) -> None:
    home = r"C:\Users\Jo Smith"
    monkeypatch.setattr(os.path, "expanduser", lambda path: home)
    for told in (home, home.replace("\\", "\\\\")):
        assert anonymous(rf"in {told}\AppData\x: no") == "in (a path): no"


def test_the_name_of_a_file_is_not_told(bench: Bench, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "name", "client-acme-final")
    found = json.loads(bench(*SMALL, "--json").stdout)
    assert found["model"]["name"] == "a model of other sizes"
    assert issue_report._name("client-acme-final", released=True) == "FLUX.1-schnell"


def test_slow_cards_draw_fewer_pictures(bench: Bench) -> None:
    found = json.loads(bench(*SMALL, "--pictures", "40", "--minutes", "0.0001", "--json").stdout)
    (drawn,) = found["sizes"]
    assert drawn["series"]["cached"]["count"] == samples.FEWEST
    assert drawn["series"]["cold"]["count"] == 3


def test_an_interrupt_reports_what_was_measured(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    draw, calls = samples.draw, []

    def interrupt(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return draw(*arguments, **options)

    monkeypatch.setattr(samples, "draw", interrupt)
    found = json.loads(bench(*SMALL, "--size", "80x64", "--json", code=130).stdout)
    assert found["interrupted"]
    assert [drawn["series"]["cached"]["count"] for drawn in found["sizes"]] == [2]
    calls[:] = [1, 1, 1]  # before any picture that counts
    assert "sizes" not in bench(*SMALL, "--json", code=130).stdout


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--minutes", "0"], "--minutes must be above 0"),
        (["--minutes", "nan"], "--minutes must be above 0"),
        (["--pictures", "0"], "equal to 1"),
        (["--size", "65x64"], "width must be a multiple of 16"),
        (["--size", "64x64", "--size", "x"], "--size must look like"),
        (["--output", __file__], "--output must be a folder"),
        (["--mode", "quick"], "Unknown mode 'quick'"),
    ],
)
def test_bad_input_is_refused_before_anything_is_loaded(
    arguments: list[str], sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Engine, "load", lambda *a, **o: pytest.fail("loaded"))
    result = runner.invoke(app, ["bench", "report", *arguments])
    assert result.exit_code == 2, result.output
    assert sentence in re.sub(r"[\s\u2502]+", " ", result.output)


def test_help_teaches() -> None:
    said = " ".join(runner.invoke(app, ["bench", "report", "--help"]).output.split())
    assert "no paths, no names of users or machines, and no prompts" in said
    assert "vortex bench report --model ~/models/FLUX.1-schnell" in said
    assert "report" in runner.invoke(app, ["bench", "--help"]).output


# On a card


RELEASED = ModelSpec()
CARD = SimpleNamespace(name="NVIDIA GeForce RTX 3060", total_memory=12.6e9)
PLAN = MemoryPlan((WeightGroupSize("b", "blocks", 10**9),), MemoryRequirements(64, 64, 1), frozenset({"b"}), 1)
READINGS = (Reading(1777, 7500, 71, 169.5, ("SwPowerCap",), 0.5), Reading(1700, 7500, 75, 170.0, (), 0.5))


def pretended(spec: ModelSpec = RELEASED, precision: str = "int8") -> Any:
    """An engine of an RTX 3060."""
    return SimpleNamespace(device=torch.device("cuda"), spec=spec, precision=precision, plan=PLAN)


def test_a_card_has_a_plan_a_peak_and_a_prediction(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def on_a_card(*arguments: Any) -> Drawn:
        found = draw(*arguments)
        told = tuple(replace(sample, reading=READINGS[i % 2]) for i, sample in enumerate(found.latency.samples))
        work = replace(found.latency.workload, width=512, height=512)
        predicted = issue_report._predicted(pretended(), work)
        latency = replace(found.latency, samples=told, workload=work)
        return replace(found, latency=latency, plan=PLAN, reserved=3 * 10**9, process=None, predicted=predicted)

    draw = issue_report._draw
    monkeypatch.setattr(issue_report, "_draw", on_a_card)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: CARD)
    said = bench(*SMALL).stdout
    assert "| torch reserved, peak | 3.00 GB |" in said
    assert "| process (NVML), peak | unknown |" in said
    assert "| weights that stream | 1.00 GB |" in said
    assert "| clocks, hottest, held down by | 1700 to 1777 MHz, 75 °C, SwPowerCap |" in said
    assert re.search(r"\| PREDICTED by a roofline \| 2\.52 s, at least 1\.14 s; measured 0\.\d\d of it \|", said)
    (size,) = json.loads(re.search(r"```json\n(.*)\n```", said)[1])["sizes"]  # type: ignore[index]
    assert (size["predicted"]["card"], size["predicted"]["measured"]) == ("RTX 3060", False)
    assert size["plan"]["peak"] == sum(size["plan"]["breakdown"].values())
    state = {"clocks": [1700, 1777], "temperature": 75, "power": 170.0, "throttled": ["SwPowerCap"]}
    assert size["state"] == state


def test_only_what_is_known_is_predicted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    card, work = CARD, Workload(512, 512)
    found = issue_report._predicted(pretended(), work)
    assert found is not None
    assert found.precision == "int8"
    assert issue_report._predicted(pretended(precision="fp8"), work) is None
    assert issue_report._predicted(pretended(ModelSpec(flux=FluxSpec(double_blocks=2))), work) is None
    card = SimpleNamespace(name="NVIDIA GeForce RTX 3060 Laptop GPU", total_memory=6.4e9)
    assert issue_report._predicted(pretended(), work) is None


def test_the_hardware_of_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1, 12_600_000_000))
    monkeypatch.setattr(platform, "freedesktop_os_release", lambda: {}["no such file"])
    monkeypatch.setattr(machine, "missing", lambda module: "is not there")
    monkeypatch.setattr(os, "sysconf", lambda name: {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 1000}[name])
    found = machine.hardware(torch.device("cuda", 0))
    assert (found.capability, found.vram, found.memory) == ("8.6", 12_600_000_000, 4_096_000)
    assert found.system.startswith(platform.system())

    def unknown(name: str) -> int:
        raise ValueError(name)

    monkeypatch.setattr(os, "sysconf", unknown)
    assert machine.hardware(torch.device("cpu")).memory is None
