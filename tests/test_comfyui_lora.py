"""Vortex LoRA inside a real ComfyUI: what runs again when, what is refused, and that pictures have the LoRAs."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import comfy_host
import numpy as np
import pytest
import tiny_loras
from comfy_host import Host, NodeError

from vortex_core import load_flux_schnell
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
