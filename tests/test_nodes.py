"""Every node without ComfyUI, on a small stand-in for it: the table, sampler and VAE, checks, other hosts."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fake_host
import pytest
import torch
import workflow_format
from fake_host import PACK, FakeHost, Interrupted, module, node

import workflows

ROOT = Path(__file__).parent.parent
KEYS = sorted(PACK.NODE_CLASS_MAPPINGS)
PROMPT = "a red circle on a white background"
SIDE = 64

engines, host = module("nodes.engines"), module("nodes.host")
errors = module("vortex_core.errors")


def sample(model: Any, prompt: str = PROMPT, batch: int = 1, seed: int = 7, **more: Any) -> Any:
    return node("VortexSchnellSampler").sample(model, prompt, SIDE, SIDE, batch, seed, 2, **more)


# ---------------------------------------------------------------- the table


@pytest.mark.parametrize("key", KEYS)
def test_schema(comfy: FakeHost, key: str) -> None:
    kind = PACK.NODE_CLASS_MAPPINGS[key]
    inputs = kind.INPUT_TYPES()
    for name, spec in {**inputs["required"], **inputs.get("optional", {})}.items():
        assert spec[1]["tooltip"], name
    assert len(kind.RETURN_TYPES) == len(kind.RETURN_NAMES) == len(kind.OUTPUT_TOOLTIPS)
    assert callable(getattr(kind, kind.FUNCTION))
    assert kind.DESCRIPTION
    assert key in PACK.NODE_DISPLAY_NAME_MAPPINGS


@pytest.mark.parametrize("key", KEYS)
def test_help_page_names_every_input_and_has_its_picture(comfy: FakeHost, key: str) -> None:
    docs = ROOT / PACK.WEB_DIRECTORY / "docs"
    text = (docs / f"{key}.md").read_text()
    inputs = PACK.NODE_CLASS_MAPPINGS[key].INPUT_TYPES()
    for name in (*inputs["required"], *inputs.get("optional", {})):
        assert f"{name}**" in text or f"**{name}" in text or f", {name}" in text, name
    assert f"(./{key}.jpg)" in text
    assert (docs / f"{key}.jpg").stat().st_size > 5000


def test_output_order_is_what_saved_workflows_rely_on(comfy: FakeHost) -> None:
    # links name an output by its position: append, never reorder
    order = {key: PACK.NODE_CLASS_MAPPINGS[key].RETURN_TYPES for key in KEYS}
    assert order["VortexFluxLoader"] == ("VORTEX_MODEL", "VAE", "MODEL", "CLIP")
    assert order["VortexLoRA"] == ("VORTEX_MODEL",)
    assert order["VortexSchnellSampler"] == ("IMAGE", "LATENT")


def test_input_order_is_what_saved_workflows_rely_on(comfy: FakeHost) -> None:
    # widgets_values is positional: append, never reorder
    order = {key: list(workflow_format.Schemas().inputs(key)) for key in KEYS}
    assert order == {
        "VortexFluxLoader": ["model", "vram_budget", "mode", "clip_l", "t5xxl", "vae"],
        "VortexLatencyProbe": ["model", "prompt", "width", "height", "steps", "runs", "warmup", "value"],
        "VortexLoRA": ["model", "lora_name", "strength"],
        "VortexNAG": ["model", "negative", "scale", "tau", "alpha"],
        "VortexSchnellSampler": [
            *("model", "prompt", "width", "height", "batch_size", "seed", "steps", "negative_prompt", "conditioning"),
            *("image", "mask", "strength", "nag", "guidance"),
        ],
        "VortexVRAMMonitor": ["value", "soft_limit", "hard_limit", "reset_peak"],
    }  # fmt: skip


def test_workflows_are_in_step_with_the_nodes() -> None:
    assert workflows.stale() == []
    for name in workflows.WORKFLOWS:
        assert (workflows.FOLDER / f"{name}.jpg").is_file()


@pytest.mark.parametrize("name", ["schnell-512", "schnell-1024"])
def test_what_a_template_needs_is_offered_for_download(name: str) -> None:
    nodes = json.loads((workflows.FOLDER / f"{name}.json").read_text())["nodes"]
    wanting = [one for one in nodes if one["properties"].get("models")]
    for one in wanting:  # front ends drop what no widget names
        assert {file["name"] for file in one["properties"]["models"]} <= set(one["widgets_values"])
    # newer ones ask the loader, older ones the first node that has the address, by its name below the folder
    (named,) = next(one for one in wanting if one["type"] == "VortexFluxLoader")["properties"]["models"]
    (first,) = wanting[0]["properties"]["models"]
    assert named == first | {"name": f"{first['directory']}/{first['name']}"}


def test_the_registry_finds_the_icon() -> None:
    comfy = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["comfy"]
    assert (ROOT / comfy["Icon"]).read_text().startswith("<svg")


def test_loading_the_pack_is_light_and_changes_no_torch_state() -> None:
    code = """
import importlib.util, sys
root = sys.argv[1]
def load():
    spec = importlib.util.spec_from_file_location("pack", root + "/__init__.py", submodule_search_locations=[root])
    module = importlib.util.module_from_spec(spec)
    sys.modules["pack"] = module
    spec.loader.exec_module(module)
load()
heavy = {"torch", "numpy", "diffusers", "transformers", "bitsandbytes", "tokenizers", "pynvml", "PIL"}
assert not heavy & set(sys.modules)
import torch
def state():
    return (torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled(), torch.initial_seed(),
            torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled(),
            torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.benchmark, torch.backends.cudnn.enabled)
for name in [name for name in sys.modules if name.partition(".")[0] == "pack"]:
    del sys.modules[name]
before = state()
load()
assert state() == before
"""
    subprocess.run([sys.executable, "-c", code, str(ROOT)], check=True)


# ---------------------------------------------------------------- sampler and VAE


def test_pictures_and_latents_are_what_the_host_takes(comfy: FakeHost, model: Any) -> None:
    image, latent = sample(model, batch=2)
    assert image.shape == (2, SIDE, SIDE, 3)
    assert (image.dtype, image.device.type) == (torch.float32, "cpu")
    assert image.min() >= 0
    assert image.max() <= 1
    assert latent["samples"].shape == (2, 16, SIDE // 8, SIDE // 8)
    assert torch.equal(
        image, engines.acquire(model).generate(PROMPT, seed=7, height=SIDE, width=SIDE, steps=2, batch_size=2)
    )
    decoded = module("nodes.vae").Decoder(model).decode(latent["samples"])
    assert torch.allclose(decoded, image, atol=1e-3)


def test_outputs_are_nobody_elses_memory(comfy: FakeHost, model: Any) -> None:
    image, latent = sample(model)
    kept, kept_latent = image.clone(), latent["samples"].clone()
    sample(model, seed=8)
    assert torch.equal(image, kept)
    assert torch.equal(latent["samples"], kept_latent)


def test_progress_and_previews_follow_the_steps(comfy: FakeHost, model: Any) -> None:
    seen = []
    comfy.previewer = SimpleNamespace(
        decode_latent_to_preview_image=lambda kind, x0: seen.append(x0.shape) or (kind, 0, 512)
    )
    sample(model)
    assert comfy.progress[-1] == [(1, 2, ("JPEG", 0, 512)), (2, 2, ("JPEG", 0, 512))]
    assert seen == [(1, 16, SIDE // 8, SIDE // 8)] * 2


def test_an_interrupt_lands_in_the_step_and_the_next_run_is_clean(comfy: FakeHost, model: Any) -> None:
    wanted, _ = sample(model)
    comfy.interrupt_after = 1
    with pytest.raises(Interrupted):
        sample(model)
    assert len(comfy.progress[-1]) == 2
    comfy.interrupt_after = None
    assert torch.equal(sample(model)[0], wanted)


def test_a_picture_that_does_not_fit_makes_the_host_unload(
    comfy: FakeHost, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def generate(*arguments: Any, **options: Any) -> None:
        raise errors.MemoryPressureError("Too large", needed=2, available=1, breakdown={})

    monkeypatch.setattr(engines.acquire(model), "generate", generate)
    with pytest.raises(torch.OutOfMemoryError, match="Too large"):
        sample(model)


def test_native_conditioning_draws_what_its_embeddings_say(comfy: FakeHost, model: Any) -> None:
    engine = engines.acquire(model)
    torch.manual_seed(0)
    txt, pooled = torch.randn(2, 300, 128), torch.randn(2, 128)  # a long prompt, and two at once
    native = [[txt, {"pooled_output": pooled, "guidance": 3.5}]]
    image, latent = sample(model, "", batch=2, conditioning=native)
    assert latent["samples"].shape[0] == 2
    for i in range(2):
        single = engine.condition(txt[i : i + 1], pooled[i : i + 1], 2)
        assert torch.equal(image[i : i + 1], engine.generate(single, seed=7 + i, height=SIDE, width=SIDE, steps=2))
    assert comfy.progress[-1][-1][:2] == (2, 2)


@pytest.mark.parametrize(
    ("native", "message"),
    [
        ([], "holds 0 entries"),
        ([[torch.zeros(1, 8, 128), {"pooled_output": torch.zeros(1, 128)}]] * 2, "holds 2 entries"),
        ([[torch.zeros(1, 8, 128), {}]], "no pooled CLIP vector"),
        ([[torch.zeros(1, 8, 64), {"pooled_output": torch.zeros(1, 128)}]], r"txt must be \[1, tokens, 128\]"),
        ([[torch.zeros(1, 8, 128), {"pooled_output": torch.zeros(1, 64)}]], r"pooled must be \[1, 128\]"),
        ([[torch.zeros(2, 8, 128), {"pooled_output": torch.zeros(3, 128)}]], "2 texts but 3 pooled"),
    ],
)
def test_conditioning_of_another_model_is_refused_in_words(
    comfy: FakeHost, model: Any, native: Any, message: str
) -> None:
    with pytest.raises(errors.VortexInputError, match=message):
        sample(model, conditioning=native)


def test_what_conditioning_carries_in_vain_is_named(
    comfy: FakeHost, model: Any, caplog: pytest.LogCaptureFixture
) -> None:
    extras = {"pooled_output": torch.zeros(1, 128), "control": object()}
    sample(model, conditioning=[[torch.zeros(1, 8, 128), extras]])
    assert "control has no effect" in caplog.text


def test_a_negative_prompt_says_that_it_has_no_effect(comfy: FakeHost, model: Any) -> None:
    with pytest.warns(errors.NoEffectWarning):
        image, _ = sample(model, negative_prompt="blue")
    assert torch.equal(image, sample(model)[0])


@pytest.mark.parametrize("prompt", ["", "   \n"])
def test_an_empty_prompt_draws(comfy: FakeHost, model: Any, prompt: str) -> None:
    assert sample(model, prompt)[0].shape == (1, SIDE, SIDE, 3)


def test_the_vae_is_the_hosts_kind_and_works_both_ways(comfy: FakeHost, model: Any) -> None:
    vae = module("nodes.vae").vae_of(model)
    assert isinstance(vae, sys.modules["comfy.sd"].VAE)
    with pytest.raises(errors.VortexError, match="Load VAE"):
        vae.get_sd()
    assert not hasattr(vae, "quantize")  # what other packs ask before they reach for it
    with pytest.raises(AttributeError, match="Load VAE"):
        vae.quantize()
    _, latent = sample(model)
    whole = vae.decode(latent["samples"])
    assert torch.equal(vae.decode_tiled(latent["samples"], tile_x=64, tile_y=64, overlap=8, tile_t=None), whole)
    assert torch.equal(vae.decode_tiled(latent["samples"], 64, 64, 8), whole)
    assert torch.equal(vae.decode(latent["samples"][:, :, None]), whole)
    with pytest.raises(errors.VortexInputError, match=r"latents must be \[B, 16"):
        vae.decode(torch.zeros(1, 4, 8, 8))
    wide = torch.rand(1, 67, 90, 4)
    samples = vae.encode(wide)
    assert torch.equal(samples, vae.encode_tiled(wide[:, 1:65, 1:89], tile_x=512, tile_y=512, overlap=64))
    engine = engines.acquire(model)
    assert torch.equal(samples, host.to_native(engine.encode_image(wide[:, 1:65, 1:89, :3])))
    stage = vae.first_stage_model
    assert torch.allclose(stage.encode(vae.process_input(wide[:, 1:65, 1:89, :3].movedim(-1, 1))), samples, atol=1e-4)
    assert torch.allclose(vae.process_output(stage.decode(latent["samples"])).movedim(1, -1), whole, atol=1e-6)


def test_the_vae_has_what_the_hosts_nodes_read_of_one(comfy: FakeHost, model: Any) -> None:
    decoder = module("nodes.vae").vae_of(model)
    found = [getattr(decoder, name) for name in ("downscale_ratio", "upscale_ratio", "latent_channels", "latent_dim")]
    assert found == [8, 8, 16, 2]
    calls = (decoder.spacial_compression_decode, decoder.spacial_compression_encode)
    assert [call() for call in calls] == [8, 8]
    assert decoder.temporal_compression_decode() is None
    assert decoder.device == host.device()
    assert decoder.output_channels == 3
    assert decoder.patcher is engines._loaded[model.key].patcher
    assert decoder.model_size() == decoder.patcher.model_size()
    assert decoder.vae_encode_crop_pixels(torch.zeros(1, 70, 67, 4)).shape == (1, 64, 64, 3)
    decoder.throw_exception_if_invalid()
    copy.copy(decoder).device = "elsewhere"  # as a node does that moves a VAE to another card
    assert copy.deepcopy(decoder).model == model


# ---------------------------------------------------------------- checks before a model is loaded


def test_what_cannot_be_drawn_is_refused_before_a_model_is_loaded(
    comfy: FakeHost, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "acquire", lambda model: pytest.fail("loaded a model"))
    draw = node("VortexSchnellSampler").sample
    for arguments, message in {
        (PROMPT, 65, SIDE, 1, 7, 2): "width must be a multiple of 16",
        (PROMPT, SIDE, 4096, 1, 7, 2): "height must be",
        (PROMPT, SIDE, SIDE, 0, 7, 2): "batch_size",
        (PROMPT, SIDE, SIDE, 65, 7, 2): "at most 64",
        (PROMPT, SIDE, SIDE, 2, 2**64 - 1, 2): "seed must be",
        (PROMPT, SIDE, SIDE, 1, 7, 9): "steps must be",
        (None, SIDE, SIDE, 1, 7, 2): "prompt must be a text",
        (7, SIDE, SIDE, 1, 7, 2): "prompt must be a text",
    }.items():
        with pytest.raises(errors.VortexInputError, match=message):
            draw(model, *arguments)
    for arguments in ((PROMPT, 65, SIDE, 1, 5, 1), (None, SIDE, SIDE, 1, 5, 1), (PROMPT, SIDE, SIDE, 9, 5, 1)):
        with pytest.raises(errors.VortexInputError):
            node("VortexLatencyProbe").probe(model, *arguments)
    assert "width" in PACK.NODE_CLASS_MAPPINGS["VortexLatencyProbe"].VALIDATE_INPUTS(width=65)
    for native in ("text", [[torch.zeros(8, 128), {"pooled_output": torch.zeros(1, 128)}]], []):
        with pytest.raises(errors.VortexInputError, match="conditioning"):
            draw(model, PROMPT, SIDE, SIDE, 1, 7, 2, conditioning=native)


@pytest.mark.parametrize(
    ("budget", "mode"), [("6", "exact"), ([], "exact"), (6.5, []), (6.5, {"a": 1}), (6.5, "quick")]
)
def test_values_that_only_the_api_can_send_are_refused(comfy: FakeHost, budget: Any, mode: Any) -> None:
    with pytest.raises(Exception, match=r"vram_budget must be a number|Unknown mode") as refusal:
        node("VortexFluxLoader").load("tiny-schnell", budget, mode)
    assert type(refusal.value).__name__ == "VortexInputError"


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, None),
        ({"width": 512, "height": None, "seed": None, "batch_size": None}, None),  # linked inputs are None
        ({"width": 0}, "width must be"),
        ({"height": 1000}, "height must be a multiple of 16"),
        ({"batch_size": 10**12}, "batch_size must be"),
        ({"seed": -1}, "seed must be"),
        ({"seed": 2**64 - 1, "batch_size": 2}, "seed must be"),
        ({"seed": 2**64 - 1}, None),
    ],
)
def test_the_host_is_told_before_anything_runs(comfy: FakeHost, inputs: dict[str, Any], message: str | None) -> None:
    verdict = PACK.NODE_CLASS_MAPPINGS["VortexSchnellSampler"].VALIDATE_INPUTS(**inputs)
    assert verdict is True if message is None else message in verdict


# ---------------------------------------------------------------- hosts of another time


class Elsewhere:
    """What a host has in place of its own progress bar and previews."""

    def __init__(self, *arguments: Any) -> None:
        raise TypeError("another signature")


@pytest.mark.parametrize(
    ("place", "name"), [("comfy.utils", "ProgressBar"), ("latent_preview", "get_previewer"), ("comfy.utils", None)]
)
def test_pictures_are_drawn_where_the_host_shows_things_otherwise(
    comfy: FakeHost, model: Any, place: str, name: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted, _ = sample(model)
    if name is None:
        monkeypatch.delattr(sys.modules[place], "ProgressBar")
    else:
        monkeypatch.setattr(sys.modules[place], name, Elsewhere)
    host._say_once.cache_clear()
    assert torch.equal(sample(model)[0], wanted)


def test_a_preview_that_cannot_be_made_is_said_once(
    comfy: FakeHost, model: Any, caplog: pytest.LogCaptureFixture
) -> None:
    host._say_once.cache_clear()
    comfy.previewer = SimpleNamespace(decode_latent_to_preview_image=Elsewhere)
    sample(model)
    assert comfy.progress[-1] == [(1, 2, None), (2, 2, None)]
    assert len([line for line in caplog.messages if "previews" in line]) == 1


def test_an_interrupt_that_the_progress_bar_raises_gets_through(
    comfy: FakeHost, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stopped(Exception):
        """As hosts before 0.29 had it."""

    def update(self: Any, *arguments: Any) -> None:
        raise Stopped

    monkeypatch.setattr(sys.modules["comfy.model_management"], "InterruptProcessingException", Stopped, raising=False)
    monkeypatch.setattr(fake_host.Bar, "update_absolute", update)
    with pytest.raises(Stopped):
        sample(model)
