"""Vortex LoRA inside a real ComfyUI: what runs again when, what is refused, and that pictures have the LoRAs.

And its own Flux with our weights, its own LoRA loader and sampler as an oracle: the same latents.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import comfy_host
import numpy as np
import pytest
import tiny_loras
import torch
from comfy_host import Host, NodeError
from engine_parts import painter_of
from lora_parts import KOHYA, PEFT, dotted, flat, save
from oracle import decoded
from safetensors.torch import load_file
from torch import Tensor

from vortex_core import Engine, load_flux_schnell
from vortex_core.checkpoint.bundle import TINY
from workflows import TINY_SIDE

pytestmark = [pytest.mark.comfyui, pytest.mark.slow, pytest.mark.allow_hosts(["127.0.0.1", "::1"])]

LOADER, SAMPLER, SAVE, LORA, SECOND = "1", "2", "3", "4", "5"
A, B = "a.safetensors", "style/b.safetensors"


@pytest.fixture(scope="module", params=comfy_host.trees() or [Path("no tree")], ids=lambda tree: tree.name)
def host(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    base = tmp_path_factory.mktemp(request.param.name) / "base"
    for seed, name in enumerate((A, B)):
        tiny_loras.write(base / "models" / "loras" / name, seed)
    started = Host(request.param, base)
    yield started
    started.stop()


@pytest.fixture
def folder(host: Host) -> Path:
    return host.base / "models" / "loras"


def workflow(seed: int, *chain: tuple[str, float]) -> dict[str, Any]:
    """The API twin as it is shipped, with these LoRAs in a row."""
    graph = json.loads((comfy_host.API / "lora.json").read_text())
    del graph[LORA]
    link = [LOADER, 0]
    for number, (name, strength) in enumerate(chain, int(LORA)):
        inputs = {"model": link, "lora_name": name, "strength": strength}
        graph[str(number)] = {"class_type": "VortexLoRA", "inputs": inputs}
        link = [str(number), 0]
    graph[SAMPLER]["inputs"] |= {"model": link, "seed": seed}
    return graph


def drawn(host: Host, seed: int, *chain: tuple[str, float]) -> np.ndarray:
    (picture,) = host.pictures(host.run(workflow(seed, *chain)))
    return picture


def test_the_node_lists_files_by_their_names(host: Host) -> None:
    info = host.get("/object_info/VortexLoRA")["VortexLoRA"]
    assert info["display_name"] == "Vortex LoRA"
    assert info["input"]["required"]["lora_name"][0] == ["tiny-outlines", A, B]


def test_pictures_are_the_engines_with_the_same_loras(host: Host, folder: Path) -> None:
    prompt = workflow(1)[SAMPLER]["inputs"]["prompt"]
    with load_flux_schnell("tiny", device="cpu") as engine:
        for chain in ((), ((A, 0.75),), ((A, 0.75), (B, -0.5))):
            wanted = engine.generate(
                prompt, seed=1, width=TINY_SIDE, height=TINY_SIDE,
                loras=[(folder / name, strength) for name, strength in chain],
            )  # fmt: skip
            assert np.abs(drawn(host, 1, *chain) - wanted[0].numpy()).max() < 0.02
    assert np.array_equal(drawn(host, 1, (A, 0.0)), drawn(host, 1))


def test_another_strength_draws_again_and_loads_nothing(host: Host) -> None:
    first = drawn(host, 2, (A, 1.0))
    loads = host.loads()
    entry = host.run(workflow(2, (A, 0.5)))
    assert LOADER in host.cached(entry)
    assert not {LORA, SAMPLER} & host.cached(entry)
    assert not np.array_equal(host.pictures(entry)[0], first)
    entry = host.run(workflow(2, (A, 0.5)))
    assert host.cached(entry) >= {LOADER, LORA, SAMPLER}
    assert host.loads() == loads


def test_a_file_that_changes_draws_again(host: Host, folder: Path) -> None:
    tiny_loras.write(folder / "changing.safetensors", 5)
    first = drawn(host, 3, ("changing.safetensors", 1.0))
    tiny_loras.write(folder / "changing.safetensors", 6)
    loads = host.loads()
    entry = host.run(workflow(3, (A, 0.0), ("changing.safetensors", 1.0)))
    second = host.pictures(entry)[0]
    assert not np.array_equal(second, first)
    tiny_loras.write(folder / "changing.safetensors", 5)
    entry = host.run(workflow(3, (A, 0.0), ("changing.safetensors", 1.0)))
    assert LORA in host.cached(entry)
    assert SECOND not in host.cached(entry)
    assert np.array_equal(host.pictures(entry)[0], first)
    assert host.loads() == loads


def test_loras_stay_when_the_host_unloads_models(host: Host) -> None:
    before = drawn(host, 4, (A, 0.75))
    host.post("/free", {"unload_models": True})
    time.sleep(1.5)  # the host's worker looks once a second
    drawn(host, 5, (A, 0.75))
    assert np.array_equal(drawn(host, 4, (A, 0.75)), before)


@pytest.mark.parametrize("name", ["gone.safetensors", "../../etc/passwd", "/etc/passwd", f"style/../{A}", "a\0b", ""])
def test_a_name_that_is_not_listed_is_refused(host: Host, name: str) -> None:
    with pytest.raises(NodeError, match=r"not in list.*models/loras"):
        host.run(workflow(6, (name, 1.0)))


def test_why_a_file_cannot_be_used_is_said_before_anything_runs(host: Host, folder: Path) -> None:
    (folder / "half.safetensors").write_bytes((folder / A).read_bytes()[:-1000])
    tiny_loras.write(folder / "flux2.safetensors", width=6144, rank=1)
    for name, reason in {"half.safetensors": "half", "flux2.safetensors": "a LoRA of FLUX.2"}.items():
        with pytest.raises(NodeError, match="custom_validation_failed") as refusal:
            host.run(workflow(7, (name, 1.0)))
        assert reason in str(refusal.value)
    with pytest.raises(NodeError, match="strength must be a number from -10 to 10"):
        host.run(workflow(7, (A, 11.0)))


def test_a_lora_of_another_size_is_refused_at_its_node(host: Host, folder: Path) -> None:
    tiny_loras.write(folder / "large.safetensors", width=3072, rank=1)
    with pytest.raises(NodeError, match=r"VortexLoRA: .*large\.safetensors does not fit this model"):
        host.run(workflow(8, ("large.safetensors", 1.0)))
    drawn(host, 9, (A, 1.0))


def test_the_probe_draws_with_it(host: Host) -> None:
    graph = workflow(10, (A, 0.75))
    size = {"width": 64, "height": 64, "steps": 1, "runs": 1, "warmup": 0, "prompt": "a red circle"}
    graph["8"] = {"class_type": "VortexLatencyProbe", "inputs": {"model": [LORA, 0], **size}}
    graph["9"] = {"class_type": "PreviewAny", "inputs": {"source": ["8", 0]}}
    assert f"tiny-schnell, {A} x 0.75, 64 x 64" in host.run(graph)["outputs"]["9"]["text"][0]


def test_the_log_is_clean(host: Host) -> None:
    log = host.log()
    assert "KeyError" not in log
    assert "AttributeError" not in log


# ---------------------------------------------------------------- the host's own loader, Flux and sampler as an oracle

OUTLINES = "tiny-outlines-lora.safetensors"
SEED = 1  # of the noise that each of the two draws itself
ROUNDING = 2e-5  # found: 4e-6 of what the LoRAs change, 6e-7 without
CHAINS: dict[str, list[tuple[str, float]]] = {
    "none": [],
    "BFL": [("bfl.safetensors", 0.75)],
    "kohya": [("kohya.safetensors", 0.75)],
    "diffusers": [("diffusers.safetensors", -0.5)],
    "bundled": [(OUTLINES, 1.0)],
    "two": [("kohya.safetensors", 0.75), ("diffusers.safetensors", -0.5)],
    "bundled and another": [(OUTLINES, -1.0), ("bfl.safetensors", 1.25)],
}


def factors(key: str, weight: Tensor, ends: tuple[str, str], alpha: float | None) -> dict[str, Tensor]:
    """An update of rank 4 that is about a tenth as large as the weight."""
    dice, rank = torch.Generator().manual_seed(sum(key.encode())), 4
    size = 0.1 * weight.float().std() / rank**0.5 * (1 if alpha is None else rank / alpha)
    up, down = (torch.randn(shape, generator=dice) for shape in ((len(weight), rank), (rank, weight.shape[1])))
    state = {key + ends[0]: size * up, key + ends[1]: down}
    return state if alpha is None else state | {f"{key}.alpha": torch.tensor(alpha)}


def write_loras(folder: Path, fused: dict[str, Tensor]) -> None:
    """Files that change every linear, modulation too: of the `fused` weights, and of each that diffusers has."""
    split = load_file(next((TINY / "transformer").glob("*.safetensors")))
    for file, weights, naming, ends, alpha in (
        ("bfl", fused, dotted("diffusion_model."), PEFT, None),
        ("kohya", fused, flat("lora_unet_"), KOHYA, 2.0),
        ("diffusers", split, dotted("transformer."), PEFT, None),
    ):
        state: dict[str, Tensor] = {}
        for name, weight in weights.items():
            if weight.ndim == 2:
                state |= factors(naming(name.removesuffix(".weight")), weight, ends, alpha)
        save(folder / f"{file}.safetensors", state)
    (folder / OUTLINES).write_bytes((TINY.parent / OUTLINES).read_bytes())


def clean_latents(engine: Engine, folder: Path, inputs: dict[str, Tensor], chain: list[tuple[str, float]]) -> Tensor:
    kept: list[Tensor] = []
    engine.set_loras([(folder / file, strength) for file, strength in chain])
    engine.generate(
        engine.condition(inputs["txt"], inputs["pooled"]), seed=SEED, width=TINY_SIDE, height=TINY_SIDE,
        on_step=lambda i, n, clean: kept.append(clean.clone()),
    )  # fmt: skip
    return kept[-1]


@pytest.mark.parametrize("tree", comfy_host.trees(), ids=lambda tree: tree.name)
def test_the_hosts_own_loader_and_flux_draw_the_same_latents(tree: Path, tmp_path: Path) -> None:
    dice = torch.Generator().manual_seed(0)
    with load_flux_schnell("tiny", device="cpu") as engine:
        model, modulation = painter_of(engine).model, painter_of(engine).conditioner.modulation
        weights = decoded(model.transformer) | decoded(modulation)
        inputs = {
            "txt": torch.randn(1, 256, model.flux.context, generator=dice) / 4,
            "pooled": torch.randn(1, model.flux.vec, generator=dice),
            "empty": torch.zeros(1, 16, TINY_SIDE // 8, TINY_SIDE // 8),
        }
        save(tmp_path / "weights.safetensors", weights)
        save(tmp_path / "inputs.safetensors", inputs)
        write_loras(tmp_path, weights)
        ours = {name: clean_latents(engine, tmp_path, inputs, chain) for name, chain in CHAINS.items()}
    (tmp_path / "chains.json").write_text(json.dumps({"seed": SEED, "chains": CHAINS}))
    ran = subprocess.run(
        [comfy_host.python(tree), str(Path(__file__).with_name("latents_by_comfyui.py")), str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"},
        timeout=300, capture_output=True, text=True,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert not re.search("not loaded|unet (missing|unexpected)", ran.stderr, re.I), ran.stderr
    theirs = load_file(tmp_path / "latents.safetensors")
    plain = theirs.pop("none")
    assert (ours["none"] - plain).norm() < ROUNDING * plain.norm()
    for name, latents in theirs.items():
        effect = (latents - plain).norm()
        assert effect > 0.1 * plain.norm(), name
        assert (ours[name] - latents).norm() < ROUNDING * effect, name
