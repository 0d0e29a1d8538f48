"""The pack inside a real ComfyUI: each tree that is found, started on the CPU, on a loopback port."""

from __future__ import annotations

import copy
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import comfy_host
import judge_outlines
import numpy as np
import pytest
import stand_in
import workflow_format
from comfy_host import Host, NodeError
from judge import matches
from scenes import Scene, Thing

import workflows
from vortex_core import load_flux_schnell
from vortex_core.checkpoint.bundle import TINY
from workflows import TINY_SIDE

if TYPE_CHECKING:
    from vortex_core import Engine

pytestmark = [pytest.mark.comfyui, pytest.mark.slow, pytest.mark.allow_hosts(["127.0.0.1", "::1"])]

CIRCLE = Scene((Thing("circle", "red"),))
SCENES = {
    "first-picture": Scene((Thing("ring", "green"),), ("yellow",)),
    "batch-vram-monitor": Scene((Thing("triangle", "green"),)),
    "latency-probe": Scene((Thing("square", "blue"),)),
    "lora": Scene((Thing("square", "blue", size="large"),)),
    "native-interop": Scene((Thing("star", "yellow"),), ("blue",)),
    "schnell-512": CIRCLE,
    "schnell-1024": CIRCLE,
}
# The first stands for CLIP Text Encode, whose encoders are too large for a test: two long prompts at once.
TEST_NODES = """
import json, sys, torch

class TestConditioning:
    INPUT_TYPES = classmethod(lambda cls: {"required": {"width": ("INT", {"max": 8192})}})
    RETURN_TYPES, FUNCTION, CATEGORY = ("CONDITIONING",), "make", "tests"

    def make(self, width):
        g = torch.Generator().manual_seed(0)
        return ([[torch.randn(2, 300, width, generator=g), {"pooled_output": torch.randn(2, 128, generator=g)}]],)

class TestNumber:
    INPUT_TYPES = classmethod(lambda cls: {"required": {"value": ("INT", {"max": 8192})}})
    RETURN_TYPES, FUNCTION, CATEGORY = ("INT",), "give", "tests"

    def give(self, value):
        return (value,)

class TestState:
    INPUT_TYPES = classmethod(lambda cls: {"required": {"nonce": ("INT", {})}})
    RETURN_TYPES, FUNCTION, CATEGORY, OUTPUT_NODE = (), "read", "tests", True

    def read(self, nonce):
        state = {
            "modules": sorted({name.partition(".")[0] for name in sys.modules}),
            "torch": [str(torch.get_default_dtype()), str(torch.get_default_device()), torch.get_num_threads(),
                      torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled(),
                      torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.benchmark,
                      torch.backends.cuda.flash_sdp_enabled(), torch.is_autocast_enabled("cpu"),
                      torch.get_rng_state().sum().item()],
        }
        return {"ui": {"text": [json.dumps(state)]}}

NODE_CLASS_MAPPINGS = {"TestConditioning": TestConditioning, "TestNumber": TestNumber, "TestState": TestState}
"""
LOADER, SAMPLER = "1", "2"  # their ids in every workflow
OUTLINES = TINY.parent / "tiny-outlines-lora.safetensors"
FOLDER, FILE = "vortex/FLUX.1-schnell", "diffusion_models/flux1-schnell.safetensors"
CHECKPOINT = f"checkpoints/{workflows.CHECKPOINT}"


@pytest.fixture(scope="module", params=comfy_host.trees() or [Path("no tree")], ids=lambda tree: tree.name)
def host(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_dir: Path) -> Iterator[Host]:
    base = tmp_path_factory.mktemp(request.param.name) / "base"
    shutil.copytree(tiny_dir, base / "models" / FOLDER)
    stand_in.write_parts(tiny_dir, base / "models")
    stand_in.write_checkpoint(tiny_dir, base / "models" / CHECKPOINT)
    test_nodes = base / "custom_nodes" / "nodes_for_tests.py"
    test_nodes.parent.mkdir(parents=True)
    test_nodes.write_text(TEST_NODES)
    started = Host(request.param, base)
    yield started
    started.stop()


def workflow(name: str = "first-picture", **inputs: Any) -> dict[str, Any]:
    """An API twin as it is shipped, with other values for the sampler."""
    found = json.loads((comfy_host.API / f"{name}.json").read_text())
    found[SAMPLER]["inputs"] |= inputs
    return copy.deepcopy(found)


def uncached(seed: int, **inputs: Any) -> dict[str, Any]:
    return workflow(seed=seed, **inputs)


def state(host: Host, nonce: int) -> dict[str, Any]:
    """What the host has imported, and torch's global state."""
    entry = host.run({"1": {"class_type": "TestState", "inputs": {"nonce": nonce}}})
    return json.loads(entry["outputs"]["1"]["text"][0])


def test_the_host_lists_the_nodes(host: Host) -> None:
    info = host.get("/object_info")
    for key, name in workflow_format.load_pack().NODE_DISPLAY_NAME_MAPPINGS.items():
        assert info[key]["display_name"] == name
    loader = info["VortexFluxLoader"]["input"]
    assert loader["required"]["model"][0] == ["tiny-schnell", FOLDER, FILE, CHECKPOINT]
    assert {name: spec[0][1:] for name, spec in loader["optional"].items()} == {
        "clip_l": ["clip_l.safetensors"], "t5xxl": ["t5xxl_fp16.safetensors"], "vae": ["ae.safetensors"],
    }  # fmt: skip
    # seconds are not judged, but what is imported (test_nodes.py): the host's garbage collection takes 0.27 s at times
    assert any(comfy_host.PACK in line and "seconds" in line for line in host.log().splitlines())
    assert "IMPORT FAILED" not in host.log()


def test_nothing_heavy_is_imported_before_a_node_runs_and_torch_stays_as_it_is(host: Host) -> None:
    before = state(host, 1)
    assert not {"bitsandbytes", "diffusers", "gguf"} & set(before["modules"])  # transformers is the host's own
    host.run(uncached(100))
    assert state(host, 2)["torch"] == before["torch"]


def test_templates_and_help_are_served(host: Host) -> None:
    assert sorted(host.get("/workflow_templates")[comfy_host.PACK]) == sorted(workflows.WORKFLOWS)
    for name in workflows.WORKFLOWS:
        assert host.get(f"/api/workflow_templates/{comfy_host.PACK}/{name}.json")["version"] == 0.4
        assert host.get(f"/api/workflow_templates/{comfy_host.PACK}/{name}.jpg")[:2] == b"\xff\xd8"
    for key in workflow_format.load_pack().NODE_CLASS_MAPPINGS:
        assert host.get(f"/extensions/{comfy_host.PACK}/docs/{key}.md").startswith(b"# ")


@pytest.mark.parametrize("name", SCENES)  # others: test_comfyui_attached.py
def test_each_workflow_runs_and_draws_what_it_says(host: Host, engine: Engine, name: str) -> None:
    inputs: dict[str, Any] = {}
    if name.startswith("schnell"):
        # the miniature stands for the checkpoint: at the size it draws at, a scene that it knows
        inputs = {"prompt": "a red circle on a white background", "width": TINY_SIDE, "height": TINY_SIDE, "seed": 7}
    graph = workflow(name, **inputs)
    if name.startswith("schnell"):
        graph[LOADER]["inputs"]["model"] = FOLDER
    pictures = [p for p in host.pictures(host.run(graph)) if p.shape[0] == p.shape[1]]  # plots are wide
    asked = graph[SAMPLER]["inputs"]
    assert len(pictures) == asked["batch_size"]
    if name != "native-interop":  # which is scaled up
        own = engine.generate(
            asked["prompt"], seed=asked["seed"], width=TINY_SIDE, height=TINY_SIDE, batch_size=asked["batch_size"],
            loras=[(OUTLINES, 1.0)] if name == "lora" else [],
        )  # fmt: skip
        assert np.abs(np.stack(pictures) - own.numpy()).max() < 0.02  # 8 bits, and another number of threads
    judge = judge_outlines.matches if name == "lora" else matches
    for picture in pictures:
        assert judge(picture, SCENES[name]).reasons == ()


@pytest.mark.parametrize("name", ["schnell-512", "schnell-1024"])
def test_the_real_checkpoints_workflows_run_as_shipped(host: Host, name: str) -> None:
    graph = workflow(name, width=TINY_SIDE, height=TINY_SIDE)
    (picture,) = host.pictures(host.run(graph))
    own = load_flux_schnell(host.base / "models" / CHECKPOINT, tokenizers=own_tokenizers(host.tree), device="cpu")
    asked = graph[SAMPLER]["inputs"]
    wanted = own.generate(asked["prompt"], seed=asked["seed"], width=TINY_SIDE, height=TINY_SIDE)
    assert np.abs(picture - wanted[0].numpy()).max() < 0.02


def test_a_file_and_the_parts_it_lacks(host: Host) -> None:
    models = host.base / "models"
    graph = uncached(95)
    graph[LOADER]["inputs"] |= {"model": FILE, "vae": "ae.safetensors"}
    (picture,) = host.pictures(host.run(graph))
    own = load_flux_schnell(
        models / FILE, clip=models / "text_encoders/clip_l.safetensors", t5=models / "clip/t5xxl_fp16.safetensors",
        vae=models / "vae/ae.safetensors", tokenizers=own_tokenizers(host.tree), device="cpu",
    )  # fmt: skip
    wanted = own.generate(graph[SAMPLER]["inputs"]["prompt"], seed=95, width=TINY_SIDE, height=TINY_SIDE)
    assert np.abs(picture - wanted[0].numpy()).max() < 0.02


def own_tokenizers(tree: Path) -> tuple[Path, Path]:
    return tree / "comfy" / "sd1_tokenizer", tree / "comfy" / "text_encoders" / "t5_tokenizer"


def test_the_monitor_and_the_probe_report(host: Host) -> None:
    def report(name: str) -> str:
        return host.run(workflow(name))["outputs"]["5"]["text"][0]

    assert "No NVIDIA GPU" in report("batch-vram-monitor")
    assert "10 runs: mean" in report("latency-probe")
    assert "rests on" in report("latency-probe")


def test_the_hosts_decoder_draws_our_latents(host: Host) -> None:
    graph = workflow("native-interop")
    graph["9"] = {"class_type": "PreviewImage", "inputs": {"images": [SAMPLER, 0]}}
    graph["10"] = {"class_type": "PreviewImage", "inputs": {"images": ["3", 0]}}
    ours, theirs = host.pictures(host.run(graph))[1:]
    assert np.abs(ours - theirs).max() < 0.01


@pytest.mark.parametrize("node", ["VAEDecodeTiled", "VAEEncode", "VAEEncodeForInpaint"])
def test_the_hosts_vae_nodes_take_our_vae(host: Host, node: str) -> None:
    graph = uncached(170)
    images = graph["3"]["inputs"]["images"]
    inputs: dict[str, Any] = {"vae": [LOADER, 1], "pixels": images}
    if node == "VAEDecodeTiled":
        tiles = {"tile_size": 64, "overlap": 0, "temporal_size": 8, "temporal_overlap": 4}
        inputs = {"vae": [LOADER, 1], "samples": [SAMPLER, 1], **tiles}
    elif node == "VAEEncodeForInpaint":
        graph["9"] = {"class_type": "SolidMask", "inputs": {"value": 1.0, "width": TINY_SIDE, "height": TINY_SIDE}}
        inputs |= {"mask": ["9", 0], "grow_mask_by": 6}
    graph["8"] = {"class_type": node, "inputs": inputs}
    found = ["8", 0]
    if node != "VAEDecodeTiled":
        graph["10"] = {"class_type": "VAEDecode", "inputs": {"vae": [LOADER, 1], "samples": found}}
        found = ["10", 0]
    graph["11"] = {"class_type": "PreviewImage", "inputs": {"images": found}}
    drawn, again = host.pictures(host.run(graph))
    if node == "VAEDecodeTiled":
        assert np.abs(drawn - again).max() < 0.01
    else:  # what is inpainted is grey; the rest comes back
        assert again.shape == drawn.shape
        assert np.abs(drawn - again).mean() < (0.05 if node == "VAEEncode" else 0.7)


def test_a_graph_of_the_hosts_own_nodes_alone(host: Host) -> None:
    """CLIP Text Encode, KSampler and VAE Decode from the loader's outputs; a longer prompt gives another picture."""
    pictures = []
    for text in ("a red circle", "a red circle (green:1.3) " + "and more words " * 100):
        graph: dict[str, Any] = {LOADER: workflow()[LOADER]}
        graph["20"] = {"class_type": "CLIPTextEncode", "inputs": {"clip": [LOADER, 3], "text": text}}
        graph["21"] = {"class_type": "EmptySD3LatentImage", "inputs": {"width": 128, "height": 128, "batch_size": 1}}
        graph["22"] = {
            "class_type": "KSampler",
            "inputs": {
                "model": [LOADER, 2], "positive": ["20", 0], "negative": ["20", 0], "latent_image": ["21", 0],
                "seed": 7, "steps": 4, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0,
            },
        }  # fmt: skip
        graph["23"] = {"class_type": "VAEDecode", "inputs": {"vae": [LOADER, 1], "samples": ["22", 0]}}
        graph["24"] = {"class_type": "PreviewImage", "inputs": {"images": ["23", 0]}}
        pictures += host.pictures(host.run(graph))
    assert [picture.shape for picture in pictures] == [(128, 128, 3)] * 2
    assert np.abs(pictures[0] - pictures[1]).mean() > 0.01


def test_a_file_that_is_refused_gives_its_reason(host: Host) -> None:
    damaged = host.base / "models/diffusion_models/half.safetensors"
    damaged.write_bytes((host.base / "models" / FILE).read_bytes()[:-1000])
    graph = workflow()
    graph[LOADER]["inputs"]["model"] = "diffusion_models/half.safetensors"
    with pytest.raises(NodeError, match=r"half\.safetensors is"):
        host.run(graph)
    damaged.unlink()


def test_linked_sizes_are_checked_when_they_are_known(host: Host) -> None:
    graph = uncached(171, width=["8", 0], height=["8", 0])
    graph["8"] = {"class_type": "TestNumber", "inputs": {"value": TINY_SIDE}}
    host.run(graph)
    graph["8"]["inputs"]["value"] = 100
    with pytest.raises(NodeError, match="multiple of 16"):
        host.run(graph)


def test_the_200th_list_reads_no_more_than_the_2nd(host: Host) -> None:
    read = []
    for _ in range(200):
        before = host.bytes_read()
        host.get("/object_info/VortexFluxLoader")
        read.append(host.bytes_read() - before)
    assert sum(read[-20:]) <= 2 * sum(read[1:21]) + 100_000  # the host has threads of its own


def test_the_same_graph_again_runs_nothing(host: Host) -> None:
    host.run(uncached(101))
    loads = host.loads()
    entry = host.run(uncached(101))
    assert host.cached(entry) >= {LOADER, SAMPLER}
    assert host.loads() == loads


def test_a_new_seed_does_not_load_again(host: Host) -> None:
    host.run(uncached(102))
    loads = host.loads()
    first, second = (host.pictures(host.run(uncached(seed)))[0] for seed in (103, 104))
    assert host.loads() == loads
    assert not np.array_equal(first, second)


def test_two_models_alternate_without_loading(host: Host) -> None:
    loads = None
    for seed in range(110, 114):
        graph = uncached(seed)
        graph[LOADER]["inputs"]["model"] = ("tiny-schnell", FOLDER)[seed % 2]
        host.run(graph)
        loads = host.loads() if seed == 111 else loads
    assert host.loads() == loads


@pytest.mark.parametrize("free", [{"unload_models": True}, {"unload_models": True, "free_memory": True}])
def test_free_frees_and_the_next_run_works(host: Host, free: dict[str, bool]) -> None:
    before = host.pictures(host.run(uncached(120)))[0]
    loads = host.loads()
    host.post("/free", free)
    time.sleep(1.5)  # the host's worker looks once a second
    entry = host.run(uncached(121))
    if "free_memory" not in free:
        assert LOADER in host.cached(entry)  # without the loader
    assert np.array_equal(host.pictures(host.run(uncached(120)))[0], before)
    assert host.loads() == loads


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"width": 250}, "multiple of 16"),
        ({"seed": 2**64 - 1, "batch_size": 2}, "seed must be a whole number"),
    ],
)
def test_bad_input_is_refused_in_words(host: Host, inputs: dict[str, Any], message: str) -> None:
    with pytest.raises(NodeError, match=message):
        host.run(workflow(**inputs))
    host.run(uncached(130))


@pytest.mark.parametrize("name", ["../../etc", "/etc", "C:\\Windows", "vortex/../vortex/FLUX.1-schnell", "a\0b"])
@pytest.mark.parametrize("where", ["model", "clip_l", "t5xxl", "vae"])
def test_a_name_that_is_not_listed_is_refused(host: Host, name: str, where: str) -> None:
    graph = workflow()
    graph[LOADER]["inputs"][where] = name
    with pytest.raises(NodeError, match="not in list"):
        host.run(graph)


@pytest.mark.parametrize("prefix", ["../../outside", "/tmp/outside"])
def test_pictures_stay_in_the_output_folder(host: Host, prefix: str) -> None:
    graph = uncached(140)
    graph["3"]["inputs"]["filename_prefix"] = prefix
    with pytest.raises(NodeError):
        host.run(graph)


def test_native_conditioning_draws_in_place_of_the_prompt(host: Host) -> None:
    graph = uncached(150, prompt="", conditioning=["8", 0], batch_size=2)
    graph["8"] = {"class_type": "TestConditioning", "inputs": {"width": 128}}
    first, second = host.pictures(host.run(graph))
    assert not np.array_equal(first, second)


def test_conditioning_of_another_model_is_refused_in_words(host: Host) -> None:
    graph = uncached(151, conditioning=["8", 0])
    graph["8"] = {"class_type": "TestConditioning", "inputs": {"width": 4096}}
    with pytest.raises(NodeError, match=r"txt must be \[1, tokens, 128\]"):
        host.run(graph)
    host.run(uncached(152))


def test_an_interrupt_lands_and_the_next_run_is_clean(host: Host) -> None:
    wanted = host.pictures(host.run(uncached(160)))[0]
    long = uncached(161, width=512, height=512, batch_size=2, steps=8)
    started = time.monotonic()
    host.run(long)
    step = (time.monotonic() - started) / 8  # more than a step: encoding and decoding are in it
    long[SAMPLER]["inputs"]["seed"] = 162
    prompt = host.queue(long)
    time.sleep(2 * step)
    host.post("/interrupt")
    entry = host.wait(prompt)
    assert "execution_interrupted" in [event for event, _ in entry["status"]["messages"]]
    loads = host.loads()
    graph = uncached(160)
    graph["3"]["inputs"]["filename_prefix"] = "vortex/after"
    host.run(uncached(163))
    assert np.array_equal(host.pictures(host.run(graph))[0], wanted)
    assert host.loads() == loads


def test_the_probe_can_be_interrupted(host: Host) -> None:
    graph = workflow("latency-probe")
    graph["3"]["inputs"]["runs"] = 5000
    prompt = host.queue(graph)
    time.sleep(4)
    host.post("/interrupt")
    entry = host.wait(prompt)
    assert "execution_interrupted" in [event for event, _ in entry["status"]["messages"]]


def test_the_log_is_clean(host: Host) -> None:
    log = host.log()
    assert "memory leak" not in log
    assert "KeyError" not in log
    assert "AttributeError" not in log
