"""The loader's CLIP and VAE inside a real ComfyUI: what its own nodes make of them, beside its own text encoders.

The tree's Python runs all cases at once (clip_by_comfyui.py), on the CPU with the bundled miniature; here their
figures are judged.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy_host
import pytest

pytestmark = [pytest.mark.comfyui, pytest.mark.slow]

# Relative, in fp32. The miniature's T5 amplifies rounding: transformers in fp32 is up to 1.4e-5 off itself in fp64.
# Found: 6e-7 to 2.1e-5 for T5, up to 3e-7 for the pooled vector.
ROUNDING, POOLED = 5e-5, 1e-6
EFFECT = 0.02  # what is meant to change a text changes it so much
KIND = ["torch.float32", "cpu", "torch.float32"]
Figures = dict[str, Any]


@pytest.fixture(scope="module", params=comfy_host.trees() or [Path("no tree")], ids=lambda tree: tree.name)
def figures(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Figures:
    return comfy_host.figures(request.param, tmp_path_factory.mktemp("figures"), "clip_by_comfyui.py")


def of(figures: Figures, case: str) -> Figures:
    """The figures of a case."""
    found = figures[case]
    assert "error" not in found, found["error"]
    return found


def check(found: Figures, tokens: int | None = None) -> None:
    """The conditioning is the host's own to rounding, in the type and on the device that it expects."""
    assert found["off"] < ROUNDING
    assert found["pooled"] < POOLED
    assert found["kind"] == KIND
    if tokens is not None:
        assert found["shape"][1] == tokens


@pytest.mark.parametrize(
    ("text", "tokens"), [("plain", 256), ("weights", 256), ("empty", 256), ("long", 771), ("long weights", 794)]
)
def test_a_text_is_the_hosts_to_rounding(figures: Figures, text: str, tokens: int) -> None:
    check(of(figures, "texts")[text], tokens)


def test_they_are_of_the_hosts_classes(figures: Figures) -> None:
    assert all(of(figures, "kinds").values())


def test_what_the_engine_reads_is_the_same_bit_for_bit(figures: Figures) -> None:
    assert of(figures, "as_the_engine")["same"]


def test_the_released_vocabularies_are_the_hosts(figures: Figures) -> None:
    found = of(figures, "released_words")
    assert found["kind"]
    assert all(found["same"])


@pytest.mark.parametrize("layer", ["-1", "-2", "-3", "-20"])
def test_skipped_layers(figures: Figures, layer: str) -> None:
    found = of(figures, "skipped_layers")
    check(found[layer])
    assert found["effect"] > EFFECT
    check(found["after"])


def test_a_prompt_for_each_encoder(figures: Figures) -> None:
    found = of(figures, "two_prompts")
    check(found, 771)
    assert found["guidance"] == 3.5


@pytest.mark.parametrize("which", ["one", "zeroed", "concat", "combine", "average"])
def test_both_models_draw_from_its_conditioning(figures: Figures, which: str) -> None:
    found = of(figures, "drawn")[which]
    assert max(found.values()) < 10 * ROUNDING  # four steps amplify it


@pytest.mark.parametrize("which", ["one", "negative", "two"])
def test_the_hosts_lora_loader(figures: Figures, which: str) -> None:
    found = of(figures, "lora")[which]
    check(found)
    assert found["effect"]["off"] > EFFECT
    assert found["effect"]["pooled"] > EFFECT


def test_without_its_loras_a_clip_reads_as_before_and_clones_are_independent(figures: Figures) -> None:
    found = of(figures, "lora")
    check(found["removed"])
    assert found["removed"]["same"]
    assert all(found["clones"].values())


def test_loras_of_steps_stay_while_a_text_is_read(figures: Figures) -> None:
    assert of(figures, "loras_of_steps_stay") == {"kept": True, "same": True, "two": 2, "again": True, "text": True}


def test_loras_of_hooks(figures: Figures) -> None:
    found = of(figures, "hooks")
    check(found)
    assert found["effect"] > EFFECT
    assert found["after"]


def test_the_vae_decodes_as_the_engine(figures: Figures) -> None:
    found = of(figures, "vae")
    assert found["sizes"] == [[2, 128, 128, 3], [2, 136, 72, 3]]
    assert found["same"]
    assert found["odd"]
    assert found["tiled"]
    assert found["raw"] < 1e-6  # through the stage model
    assert found["inherited tiles"] < 0.01  # blended by the host: not the same picture, but near


def test_the_vae_encodes_as_the_engine(figures: Figures) -> None:
    found = of(figures, "vae_encodes")
    assert found["same"]
    assert found["tiled"]
    assert found["raw"] < 1e-6
    assert found["kind"] == KIND[:2]
    assert [found[name] for name in ("shape", "inpaint", "conditioned")] == [[2, 16, 16, 9]] * 3


def test_a_vae_without_an_encoder_decodes_and_says_what_it_lacks(figures: Figures) -> None:
    found = of(figures, "vae_without_an_encoder")
    assert found["decodes"]
    assert "has no encoder" in found["encodes"]


def test_the_vae_has_what_other_packs_read(figures: Figures) -> None:
    assert of(figures, "vae_attributes") == {
        "latent_channels": 16, "downscale_ratio": 8, "upscale_ratio": 8, "latent_dim": 2, "output_channels": 3,
        "crop_input": True, "spacial_compression_encode": 8, "spacial_compression_decode": 8,
        "temporal_compression_decode": None, "is_dynamic": False, "patcher": True, "device": "cpu",
        "output_device": "cpu", "process_input": -0.5, "process_output": 0.25, "size": 0, "parameters": 0,
        "dtype": "torch.float32", "memory": [0, 0],
    }  # fmt: skip


def test_unloading_changes_no_text_and_no_picture(figures: Figures) -> None:
    assert all(of(figures, "unloaded").values())


def test_an_engine_is_one_entry_in_the_hosts_list(figures: Figures) -> None:
    assert of(figures, "one_entry") == {"CLIP": 1, "MODEL": 1, "VAE": 1, "one size": True, "after its clone died": 1}


def test_what_needs_the_weights_is_refused_in_words(figures: Figures) -> None:
    found = of(figures, "refused")
    for name, words in {
        "merge": "CLIP of NF4 Flux Loader cannot be merged", "merge into": "CLIP of NF4 Flux Loader cannot be merged",
        "save": "CLIP of NF4 Flux Loader cannot be saved", "state": "CLIP of NF4 Flux Loader cannot be saved",
        "embedding": "textual inversions", "too long": "1 to 4096 tokens", "VAE": "cannot be saved or merged",
    }.items():  # fmt: skip
        assert words in found[name]
    assert found["no such embedding"] == 0
    check(found["after"])


def test_the_schnell_sampler_draws_as_before(figures: Figures) -> None:
    assert of(figures, "old_route") == {"same": True}
