"""The templates of ComfyUI's own nodes over Vortex, and of pictures to begin from, in a running ComfyUI."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import comfy_host
import judge
import judge_outlines
import numpy as np
import pytest
from comfy_host import Host
from native_workflows import NATIVE, NEED_FILES
from scenes import Scene, Thing

pytestmark = [pytest.mark.comfyui, pytest.mark.slow, pytest.mark.allow_hosts(["127.0.0.1", "::1"])]

OUTLINES = comfy_host.ROOT / "vortex_core" / "assets" / "tiny-outlines-lora.safetensors"
SCENES = {
    "img2img": Scene((Thing("circle", "blue", size="large"),)),
    "inpainting": Scene((Thing("circle", "red"), Thing("star", "green")), ("white",), "left of"),
    "ksampler": Scene((Thing("ring", "green"),), ("yellow",)),
}


@pytest.fixture(scope="module", params=comfy_host.trees() or [Path("no tree")], ids=lambda tree: tree.name)
def host(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    base = tmp_path_factory.mktemp("host")
    (base / "models" / "loras").mkdir(parents=True)
    shutil.copy(OUTLINES, base / "models" / "loras")
    running = Host(request.param, base)
    yield running
    running.stop()


def picture(host: Host, name: str) -> np.ndarray:
    """What a template draws, by its twin for the API."""
    graph = json.loads((comfy_host.API / f"{name}.json").read_text())
    (found,) = host.pictures(host.run(graph))
    return found


@pytest.mark.parametrize("name", SCENES)
def test_it_draws_what_it_says(host: Host, name: str) -> None:
    assert judge.matches(picture(host, name), SCENES[name]).reasons == ()


def test_what_the_mask_keeps_stays(host: Host) -> None:
    graph = json.loads((comfy_host.API / "inpainting.json").read_text())
    graph["3"]["inputs"]["images"] = ["2", 0]
    (before,) = host.pictures(host.run(graph))
    half = before.shape[1] // 2
    after = picture(host, "inpainting")
    assert np.array_equal(before[:, :half], after[:, :half])
    assert not np.array_equal(before[:, half:], after[:, half:])


def test_nag_keeps_away_from_gray(host: Host) -> None:
    graph = json.loads((comfy_host.API / "nag.json").read_text())
    graph["2"]["inputs"]["model"] = ["1", 2]
    (plain,) = host.pictures(host.run(graph))
    colours = [[thing.colour for thing in judge.judge(seen).things] for seen in (plain, picture(host, "nag"))]
    assert colours[0] == ["gray"]
    assert len(colours[1]) == 1
    assert colours[1] != ["gray"]


def test_a_lora_by_the_hosts_loader(host: Host) -> None:
    square = Scene((Thing("square", "blue", size="large"),))
    assert judge_outlines.matches(picture(host, "lora-by-comfyui"), square).reasons == ()


def test_templates_that_need_files_know_their_nodes(host: Host) -> None:
    info = host.get("/object_info")
    for name in NEED_FILES:
        graph = json.loads((comfy_host.API / f"{name}.json").read_text())
        for node in graph.values():
            known = info[node["class_type"]]["input"]
            names = {*known["required"], *known.get("optional", {})}
            assert names >= set(node["inputs"]), node["class_type"]


def test_every_template_is_tried() -> None:
    assert {*SCENES, "nag", *NEED_FILES} == set(NATIVE)
