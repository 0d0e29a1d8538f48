"""The command line: what it writes, and how it refuses."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from test_disk import file_size_limit
from typer.testing import CliRunner

import vortex_core
from vortex_core import Engine
from vortex_core.cli import png
from vortex_core.cli.main import app
from vortex_core.cli.start import read_start
from vortex_core.utils import packages, whole_files

runner = CliRunner()
SMALL = ["--size", "80x64", "--device", "cpu", "--steps", "1"]


def run(*arguments: str, code: int = 0) -> str:
    result = runner.invoke(app, list(arguments))
    text = re.sub(r"\s+", " ", result.output)
    assert result.exit_code == code, text
    return text


def test_generate_writes_a_png_that_remembers(tmp_path: Path) -> None:
    path = tmp_path / "circle.png"
    said = run("generate", "a red circle — naïve", "--seed", "7", "-o", str(path), *SMALL)
    assert "80 x 64, seed 7" in said
    with Image.open(path) as image:
        assert image.size == (80, 64)
        version = f"vortex {vortex_core.__version__}"
        assert image.text == {
            "parameters": "a red circle — naïve\nSteps: 1, Sampler: Euler, CFG scale: 1, Seed: 7, Size: 80x64, "
            f"Model: tiny-schnell, Version: {version}",
            "Software": version,
        }
    assert [p.name for p in tmp_path.iterdir()] == ["circle.png"]


def test_generate_never_overwrites_silently(tmp_path: Path) -> None:
    path = tmp_path / "kept.png"
    path.write_text("mine")
    said = run("generate", "a red circle", "-o", str(path), *SMALL, code=2)
    assert "exists; choose another name, or add --overwrite" in said
    assert path.read_text() == "mine"
    run("generate", "a red circle", "-o", str(path), "--overwrite", *SMALL)
    with Image.open(path) as image:
        assert image.size == (80, 64)


def test_a_batch_writes_numbered_files(tmp_path: Path) -> None:
    run("generate", "a red circle", "--seed", "3", "--batch", "2", "-o", str(tmp_path / "c.png"), *SMALL)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c-1.png", "c-2.png"]
    with Image.open(tmp_path / "c-2.png") as image:
        assert "Seed: 4," in image.text["parameters"]


def test_the_default_name_holds_the_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run("generate", "a red circle", "--seed", "5", *SMALL)
    assert (tmp_path / "vortex-5.png").is_file()


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["x", "--size", "80"], 2, "--size must look like 512x512"),
        (["x", "--size", "81x64"], 2, "width must be a multiple of 16"),
        (["x", "--size", "9" * 5000 + "x64"], 2, "--size must look like 512x512"),
        (["x", "--batch", "0"], 2, "--batch must be at least 1"),
        (["x", "--batch", "1000000000000"], 2, "at most 10000"),
        (["x", "--seed", "-1"], 2, "seed must be a whole number from 0"),
        (["x", "--mode", "quick"], 2, "Unknown mode 'quick'"),
        (["x", "--vram", "nan"], 2, "--vram must be above 0"),
        (["x", "--vram", "1e308"], 2, "--vram must be above 0"),
        (["caf\udce9"], 2, "The prompt is not UTF-8 at character 4"),
        (["x", "--model", "~nosuchuser/model"], 2, "begins with the home folder of a user"),
        (["x", "-o", "~nosuchuser/x.png"], 2, "begins with the home folder of a user"),
        (["x", "-o", "/proc/self/x.png"], 2, "No file can be written into /proc/self"),
        (["x", "-o", "x" * 252 + ".png"], 2, "File name too long"),
        (["x", "-o", "picture.jpg"], 2, "must end in .png"),
        (["x", "-o", "no/such/folder/x.png"], 2, "There is no folder"),
        (["x", "--model", "no/such/model"], 1, "There is no model at"),
        (["x", "--quantization", "int3"], 2, "Unknown quantization"),
        (["x", "--device", "cuda:99"], 1, "There is no cuda:99"),
        (["x", "--steps", "12"], 2, "steps must be from 1 to 8"),
    ],
)
def test_bad_input_gets_a_sentence_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], code: int, sentence: str
) -> None:
    monkeypatch.chdir(tmp_path)
    loads = "--model" in arguments or "--device" in arguments  # what only the library can tell, before it reads
    if not loads:
        monkeypatch.setattr("vortex_core.cli.pictures.Pictures.draw", None)
        monkeypatch.setattr("vortex_core.cli.main.load_engine", lambda *a, **o: pytest.fail("loaded"))
    said = run("generate", *arguments, code=code)
    assert sentence in said
    assert "Traceback" not in said
    assert not list(tmp_path.iterdir())


def test_warnings_are_notes(tmp_path: Path) -> None:
    path = str(tmp_path / "x.png")
    said = run("generate", "a red circle", "--negative-prompt", "blue", "-o", path, *SMALL)
    assert "note: negative_prompt has no effect" in said


def test_a_negative_prompt_counts_and_is_remembered(tmp_path: Path) -> None:
    plain, led = tmp_path / "plain.png", tmp_path / "led.png"
    run("generate", "a circle", "--seed", "1", "-o", str(plain), *SMALL)
    said = run(
        "generate", "a circle", "--seed", "1", "--negative", "a gray circle", "--nag", "5", "-o", str(led), *SMALL
    )
    assert "no effect" not in said
    assert plain.read_bytes() != led.read_bytes()
    with Image.open(led) as image:
        assert image.text["parameters"].startswith("a circle\nNegative prompt: a gray circle\nSteps: 1, ")
        assert "NAG scale: 5" in image.text["parameters"]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--nag", "99"], "nag must be 0 (off), a scale from 1 to 50"),
        (["--guidance", "0.5"], "guidance must be 0"),
        (["--nag", "5", "--guidance", "2"], "not both"),
        (["--strength", "0.5"], "--strength needs --image"),
        (["--mask", "{text}"], "--mask needs --image"),
        (["--image", "{text}"], "is not a picture that can be read"),
        (["--image", "{none}"], "cannot be read"),
        (["--image", "{wide}", "--mask", "{other}"], "--mask is 64x64, but the image 96x70"),
        (["--image", "{small}"], "height must be a multiple of 16 from 64"),
        (["--image", "{wide}", "--strength", "0"], "strength must be a number above 0"),
    ],
)
def test_pictures_to_begin_from_are_checked_before_a_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], sentence: str
) -> None:
    monkeypatch.setattr("vortex_core.cli.main.load_engine", lambda *a, **o: pytest.fail("loaded"))
    places = {name: tmp_path / f"{name}.png" for name in ("text", "none", "wide", "other", "small")}
    places["text"].write_text("no picture")
    for name, size in (("wide", (96, 70)), ("other", (64, 64)), ("small", (96, 60))):
        Image.new("RGB", size).save(places[name])
    named = [option.format(**places) for option in options]
    said = run("generate", "a circle", *named, "-o", str(tmp_path / "x.png"), code=2)
    assert sentence in said
    assert not (tmp_path / "x.png").exists()


def test_a_picture_to_begin_from_is_cut_or_scaled(tmp_path: Path) -> None:
    path, mask = tmp_path / "wide.png", tmp_path / "mask.png"
    picture = Image.new("RGB", (100, 70))
    picture.paste((255, 0, 0), (50, 0, 100, 70))
    picture.save(path)
    Image.new("L", (100, 70), 255).save(mask)
    image, white = read_start(path, mask, None, None, None)
    assert image is not None
    assert white is not None
    assert (tuple(image.shape), tuple(white.shape)) == ((1, 64, 96, 3), (1, 64, 96))
    assert image[0, :, 48:].eq(torch.tensor([1.0, 0, 0])).all()
    assert image[0, :, :48].eq(0).all()
    assert white.eq(1).all()
    scaled, _ = read_start(path, None, None, 128, 64)
    assert scaled is not None
    assert tuple(scaled.shape) == (1, 64, 128, 3)
    assert read_start(None, None, None, 64, 64) == (None, None)


@pytest.fixture
def loaded(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """The shared engine, in place of one that each command loads."""
    monkeypatch.setattr("vortex_core.cli.main.load_engine", lambda *arguments, **options: engine)
    return engine


def test_cancelling_counts_what_was_written(loaded: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generate, left = loaded.generate, [True]

    def interrupt(*arguments: Any, **options: Any) -> Any:
        if not left:
            raise KeyboardInterrupt
        left.pop()
        return generate(*arguments, **options)

    monkeypatch.setattr(loaded, "generate", interrupt)
    arguments = ["generate", "a red circle", "--batch", "6", "-o", str(tmp_path / "x.png"), *SMALL]
    assert "cancelled; 4 of 6 pictures were written" in run(*arguments, code=130)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"x-{i}.png" for i in range(1, 5)]
    assert "cancelled; nothing was written" in run(*arguments, "--overwrite", code=130)


def test_a_large_batch_is_the_single_pictures(loaded: Engine, tmp_path: Path) -> None:
    run("generate", "a red circle", "--seed", "3", "--batch", "5", "-o", str(tmp_path / "x.png"), *SMALL)
    run("generate", "a red circle", "--seed", "7", "-o", str(tmp_path / "y.png"), *SMALL)
    with Image.open(tmp_path / "x-5.png") as last, Image.open(tmp_path / "y.png") as single:
        assert last.tobytes() == single.tobytes()
        assert last.text == single.text


def test_a_name_that_is_taken_meanwhile_loses_no_picture(
    loaded: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate, path = loaded.generate, tmp_path / "x.png"

    def other(*arguments: Any, **options: Any) -> Any:
        path.write_text("of another run")
        return generate(*arguments, **options)

    monkeypatch.setattr(loaded, "generate", other)
    said = run("generate", "a red circle", "-o", str(path), *SMALL)
    assert "was made by somebody else meanwhile and is left alone" in said
    assert path.read_text() == "of another run"
    (beside,) = tmp_path.glob("x-*.png")
    with Image.open(beside) as image:
        assert image.size == (80, 64)


def test_a_full_disk_leaves_whole_pictures(loaded: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, room = whole_files.write, [True, True]

    def fill(path: Path, data: bytes, *, replace: bool) -> None:
        with file_size_limit(10**9 if room and room.pop() else 100):
            write(path, data, replace=replace)

    monkeypatch.setattr("vortex_core.cli.pictures.write", fill)
    said = run("generate", "a red circle", "--batch", "4", "-o", str(tmp_path / "x.png"), *SMALL, code=1)
    assert "error: [Errno 27] File too large" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x-1.png", "x-2.png"]


@pytest.mark.parametrize("prompt", ["[/b] [red] [x:y:0.5]", "🔴 紅い円\n星", "a\tb\nSteps: 9, Seed: 1\x0b\x1b[31m"])
def test_a_picture_remembers_any_prompt(loaded: Engine, tmp_path: Path, prompt: str) -> None:
    path = tmp_path / "x[" / "tmp] star [final].png"  # together: x[/tmp]
    path.parent.mkdir()
    said = run("generate", prompt, "-o", str(path), *SMALL)
    assert str(path) in said
    with Image.open(path) as image:
        text, _, line = image.text["parameters"].rpartition("\n")
        assert text == prompt
        assert line.startswith("Steps: 1, Sampler: Euler, CFG scale: 1, Seed: ")
        assert not {"prompt", "workflow"} & set(image.text)


def test_no_prompt_is_logged(loaded: Engine, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    run("-v", "generate", "a magenta heptagon", "-o", str(tmp_path / "x.png"), *SMALL)
    assert "heptagon" not in caplog.text


def test_a_missing_pillow_is_told_before_drawing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vortex_core.cli.main.load_engine", lambda *a, **o: pytest.fail("loaded"))
    monkeypatch.setattr(packages, "_broken", {})
    for module in ("PIL", "PIL.PngImagePlugin"):
        monkeypatch.setitem(sys.modules, module, None)
    said = run("generate", "a red circle", "-o", str(tmp_path / "x.png"), code=1)
    assert "Writing a picture needs the package pillow" in said
    assert "pip install pillow" in said


def test_a_model_s_name_is_any_file_s() -> None:
    made = png.parameters("x", steps=4, seed=7, width=64, height=80, model="caf\udce9\n")
    assert made.encode().endswith(f"Model: caf\\udce9\\n, Version: vortex {vortex_core.__version__}".encode())


def test_names_with_commas_are_quoted() -> None:
    made = png.parameters("x", steps=4, seed=7, width=64, height=80, model='flux, "mine"')
    assert ', Size: 64x80, Model: "flux, \\"mine\\"", Version: vortex ' in made


def test_doctor_says_what_it_found() -> None:
    said = run("doctor")
    for what in ("torch", "GPU", "NF4", "bundled model"):
        assert what in said
    report = json.loads(runner.invoke(app, ["doctor", "--json"]).stdout)
    assert report["vortex"] == vortex_core.__version__
    assert {finding["state"] for finding in report["findings"]} <= {"ok", "note", "fault"}


def test_help_teaches() -> None:
    assert "lighthouse" in run("generate", "--help")
    assert f"vortex {vortex_core.__version__}" in run("--version")


def test_module_runs_as_the_command() -> None:
    command = [sys.executable, "-m", "vortex_core", "--version"]
    said = subprocess.run(command, cwd=Path(__file__).parent.parent, check=True, capture_output=True, text=True).stdout
    assert said == f"vortex {vortex_core.__version__}\n"


def test_plan_needs_no_gpu_and_no_model() -> None:
    figures = json.loads(run("plan", "--vram", "6.5", "--size", "1024x1024", "--json"))
    assert sum(figures["breakdown"].values()) == figures["peak"] <= 6.5e9
    parts = {part["name"]: part for part in figures["parts"]}
    assert parts["step-time blocks"]["streamed"] == 0
    assert parts["T5"]["resident"] == parts["modulation"]["resident"] == 0
    assert 4.8e9 < parts["step-time blocks"]["nbytes"] < 4.9e9
    assert figures["pinned"] <= 5.0e9
    assert figures["picture_ms"] == 0
    assert 300 < figures["prompt_ms"] < 500  # 4.6 GB at 12 GB/s


def test_plan_says_what_streams_and_what_it_costs() -> None:
    said = run("plan", "--vram", "0.5", "--model", "tiny", "--batch", "3")
    for words in ("step-time blocks", "arena", "3 pictures, 3 at once of 128 x 128", "predicted peak"):
        assert words in said
    assert "the smallest budget is 0.2" in run("plan", "--vram", "0.1", "--model", "tiny", code=2)
