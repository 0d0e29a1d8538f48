"""LoRAs as callers give them: `set_loras`, `generate(loras=)`, the command; what is refused; nothing is lost."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from typer.testing import CliRunner

from vortex_core import Engine, VortexCheckpointError, VortexInputError, load_flux_schnell
from vortex_core.cli.main import app
from vortex_core.runtime import lora_files

pytestmark = pytest.mark.usefixtures("seeded")

PROMPT, SIZE = "a green ring", {"height": 64, "width": 96, "steps": 2}


@pytest.fixture(scope="module")
def shared(tiny_dir: Path) -> Iterator[Engine]:
    with load_flux_schnell(tiny_dir, device="cpu") as engine:
        yield engine


@pytest.fixture
def bare(shared: Engine) -> Iterator[Engine]:
    yield shared
    shared.set_loras([])


def written(folder: Path, name: str = "a.safetensors", seed: int = 0, **changed: Tensor) -> Path:
    torch.manual_seed(seed)
    stem = "transformer.single_transformer_blocks.1.proj_mlp"
    tensors = {f"{stem}.lora_A.weight": torch.randn(4, 256) / 8, f"{stem}.lora_B.weight": torch.randn(1024, 4) / 8}
    save_file(tensors | changed, folder / name)
    return folder / name


def drawn(engine: Engine, **options: Any) -> Tensor:
    return engine.generate(PROMPT, seed=1, **SIZE, **options)


def test_loras_of_an_engine_and_of_one_call(bare: Engine, tmp_path: Path) -> None:
    plain = drawn(bare)
    one, two = written(tmp_path), written(tmp_path, "b.safetensors", seed=1)
    with_one = drawn(bare, loras=[(one, 1.0)])
    assert not torch.equal(with_one, plain)
    assert bare.loras == ()
    assert torch.equal(drawn(bare), plain)
    bare.set_loras([(str(one), 1)])
    assert bare.loras == ((str(one), 1.0),)
    assert torch.equal(drawn(bare), with_one)
    assert not torch.equal(drawn(bare, loras=[(one, 1.0), (two, -0.5)]), with_one)
    assert torch.equal(drawn(bare, loras=[]), plain)
    assert torch.equal(drawn(bare, loras=((one, 0.0),)), plain)
    bare.set_loras([])
    assert torch.equal(drawn(bare), plain)


def test_a_file_is_read_again_when_it_changes_and_only_then(
    bare: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, seen = lora_files.read_lora, []
    monkeypatch.setattr(lora_files, "read_lora", lambda path, spec: (seen.append(path), read(path, spec))[1])
    path = written(tmp_path)
    first = drawn(bare, loras=[(path, 1.0)])
    drawn(bare, loras=[(path, 0.5)])
    assert torch.equal(drawn(bare, loras=[(path, 1.0)]), first)
    assert len(seen) == 1
    path.unlink()
    written(tmp_path, seed=3)
    assert not torch.equal(drawn(bare, loras=[(path, 1.0)]), first)
    assert len(seen) == 2
    others = [(written(tmp_path, f"{i}.safetensors", seed=i), 0.1) for i in range(lora_files.KEPT)]
    bare.set_loras(others)
    drawn(bare, loras=[(path, 1.0)])
    assert len(seen) == 3 + lora_files.KEPT


@pytest.mark.parametrize(
    ("loras", "words"),
    [
        ("a.safetensors", r"a list of pairs \(path, strength\), not 'a.safetensors'"),
        (7, "a list of pairs"),
        (["a.safetensors"], "Each of loras is a pair of a path and a strength, not 'a.safetensors'"),
        ([("a", 1, 2)], "Each of loras is a pair"),
        ([(3, 1.0)], "Each of loras is a pair"),
        ([("a", "strong")], "number from -100 to 100, not 'strong'"),
        ([("a", math.nan)], "number from -100 to 100, not nan"),
        ([("a", 101)], "number from -100 to 100, not 101"),
        ([("a", True)], "number from -100 to 100, not True"),
        ([("a", 1.0)] * 33, "33 LoRAs are too many"),
    ],
)
def test_what_is_no_list_of_loras_is_refused(bare: Engine, loras: Any, words: str) -> None:
    for call in (bare.set_loras, lambda given: drawn(bare, loras=given)):
        with pytest.raises(VortexInputError, match=words):
            call(loras)
    assert bare.loras == ()


def test_a_file_that_cannot_be_used_changes_nothing(bare: Engine, tmp_path: Path) -> None:
    good = written(tmp_path)
    bare.set_loras([(good, 1.0)])
    expected = drawn(bare)
    nan = torch.full((4, 256), math.nan)
    stem = "transformer.single_transformer_blocks.1.proj_mlp"
    for path in (
        tmp_path / "missing.safetensors",
        written(tmp_path, "nan.safetensors", **{f"{stem}.lora_A.weight": nan}),
        written(tmp_path, "shape.safetensors", **{f"{stem}.lora_A.weight": torch.zeros(4, 100)}),
        written(tmp_path, "strange.safetensors", **{"what.is.this": torch.zeros(4)}),
        tmp_path,
    ):
        with pytest.raises(VortexCheckpointError):
            bare.set_loras([(path, 1.0)])
        with pytest.raises(VortexCheckpointError):
            drawn(bare, loras=[(good, 1.0), (path, 1.0)])
        assert torch.equal(drawn(bare), expected)


def run(*arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, [*arguments])
    return done.exit_code, done.output


def test_the_command_draws_with_loras_and_says_so_in_the_file(bare: Engine, tmp_path: Path) -> None:
    path, out = written(tmp_path, "ink.safetensors"), tmp_path / "out.png"
    size = ("--size", "96x64", "--steps", "2", "--seed", "1", "--device", "cpu")
    code, said = run("generate", PROMPT, *size, "-o", str(out), "--lora", f"{path}:0.5", "--lora", str(path))
    assert code == 0, said
    with Image.open(out) as image:
        assert image.text["parameters"].startswith(f"{PROMPT} <lora:ink:0.5> <lora:ink:1>\nSteps: 2")
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(64, 96, 3)
    expected = drawn(bare, loras=[(path, 0.5), (path, 1.0)])[0]
    assert torch.equal(pixels, expected.mul(255).round().byte())


def test_the_command_refuses_a_lora_before_it_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*arguments: Any, **options: Any) -> None:
        raise AssertionError("nothing should be loaded")

    monkeypatch.setattr(Engine, "load", load)
    good, out = written(tmp_path), tmp_path / "out.png"
    wrong = written(tmp_path, "wrong.safetensors", **{"transformer.proj_out.lora_A.weight": torch.zeros(4, 77)})
    for lora, words in (
        (f"{tmp_path}/none.safetensors", "There is no LoRA at"),
        (f"{good}:nan", "number from -100 to 100"),
        (f"{good}:1e9", "number from -100 to 100"),
        (str(wrong), "proj_out"),
    ):
        code, said = run("generate", PROMPT, "-o", str(out), "--lora", lora)
        assert (code != 0, words in " ".join(said.split())) == (True, True), said
    assert not out.exists()


def test_a_colon_in_a_path_is_no_strength() -> None:
    from vortex_core.cli.loras import parse_lora

    assert parse_lora("C:\\loras\\ink.safetensors") == (Path("C:\\loras\\ink.safetensors"), 1.0)
    assert parse_lora("a:b.safetensors:-0.25") == (Path("a:b.safetensors"), -0.25)
