"""The loader's MODEL inside a real ComfyUI: what its own nodes make of it, beside its own Flux with the same weights.

The tree's Python runs all cases at once (model_by_comfyui.py), on the CPU with the bundled miniature; here their
figures are judged.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy_host
import pytest

pytestmark = [pytest.mark.comfyui, pytest.mark.slow]

# Relative to the host's own latents after all steps, in fp32. Both compute the same products; a table of several
# timesteps, and the order in which fused kernels sum, round otherwise. Found: 4e-7 to 7e-7; guidance doubles it.
ROUNDING = 2e-6
EFFECT = 0.02  # what is meant to change a picture changes it so much
OWN = ["Vortex's own"]
Figures = dict[str, Any]


@pytest.fixture(scope="module", params=comfy_host.trees() or [Path("no tree")], ids=lambda tree: tree.name)
def figures(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Figures:
    return comfy_host.figures(request.param, tmp_path_factory.mktemp("figures"), "model_by_comfyui.py")


def of(figures: Figures, case: str) -> Figures:
    """The figures of a case; skips where the host has nothing of the kind."""
    found = figures[case]
    assert "error" not in found, found["error"]
    if found.get("absent"):
        pytest.skip("this ComfyUI has no such node")
    return found


def check(found: Figures, reason: str | None = None) -> None:
    """The latents are the host's own to rounding, and the route is the engine's, or the host's for this `reason`."""
    assert found["off"] < ROUNDING
    assert found["routes"] == (OWN if reason is None else [f"ComfyUI's code, because of {reason}"])


@pytest.mark.parametrize("case", ["ksampler", "part", "noise_mask", "differential_diffusion", "no_pooled_text"])
def test_a_sampling_is_the_hosts_to_rounding(figures: Figures, case: str) -> None:
    check(of(figures, case))


def test_a_clone_has_its_own_sampling_and_the_original_keeps_its(figures: Figures) -> None:
    found = of(figures, "model_sampling")
    check(found["clone"])
    check(found["original"])
    assert found["the clone's own"] > EFFECT
    assert found["the original's again"]


@pytest.mark.parametrize("which", ["heun", "dpm_2", "dpmpp_sde", "uni_pc", "normal", "sgm_uniform", "beta"])
def test_other_samplers_and_schedules(figures: Figures, which: str) -> None:
    check(of(figures, "off_the_grid")[which])


def test_modulation_of_a_whole_schedule_takes_one_pass(figures: Figures) -> None:
    found = of(figures, "passes")
    assert found == {
        "another text": ["text"],
        "the same": [],
        "more steps": ["schedule"],
        "midpoints": ["schedule"] * 9,  # dpm_2's grid, and 8 between: the last step goes to 0 at once
    }


@pytest.mark.parametrize("which", ["equal", "unequal", "equal, batch", "unequal, batch", "batch"])
def test_guidance_and_batches(figures: Figures, which: str) -> None:
    check(of(figures, "guidance")[which])


def test_sizes_that_the_engine_does_not_draw_are_the_hosts(figures: Figures) -> None:
    found = of(figures, "sizes")
    check(found["odd"])
    check(found["wide"])
    assert found["small"]["off"] < ROUNDING
    assert "because of the size" in found["small"]["routes"][0]


@pytest.mark.parametrize("which", ["full", "None between", "short", "two nets", "guided, batch"])
def test_control_nets(figures: Figures, which: str) -> None:
    found = of(figures, "control")
    check(found[which], "a ControlNet")
    assert found[which].get("effect", 1) > EFFECT
    check(found["after"])


def test_a_control_net_without_residuals_costs_nothing(figures: Figures) -> None:
    check(of(figures, "control")["all None"])


@pytest.mark.parametrize("which", ["kohya", "diffusers", "negative", "two", "eager"])
def test_the_hosts_lora_loader(figures: Figures, which: str) -> None:
    found = of(figures, "lora")[which]
    check(found, "patches_replace of dit" if which == "eager" else None)
    assert found.get("effect", 1) > EFFECT


def test_without_its_loras_a_model_draws_as_before(figures: Figures) -> None:
    found = of(figures, "lora")["removed"]
    check(found)
    assert found["effect"] == 0


def test_bypass_loras(figures: Figures) -> None:
    found = of(figures, "lora_bypassed")
    check(found["bypassed"], "another forward of Linear")
    assert found["bypassed"]["effect"] > EFFECT
    check(found["after"])


def test_loras_of_hooks(figures: Figures) -> None:
    found = of(figures, "hooks")
    for which in ("one", "guided", "after"):
        check(found[which])
    assert found["one"]["effect"] > EFFECT


def test_patches_that_no_engine_can_draw_with_are_refused_in_words(figures: Figures) -> None:
    found = of(figures, "refused_patches")
    check(found["whole"])
    assert "cannot be merged: its weights are in 4 bits" in found["merged"]
    assert "which is no low-rank update" in found["reshaped"]
    assert "cannot be added to 4-bit weights: img_in.weight" in found["wrapped"]
    assert "double_blocks.0.img_attn.proj" in found["whole block"]
    assert "VortexCheckpointError" in found["whole block"]
    check(found["after"])


@pytest.mark.parametrize(
    ("which", "reason"),
    [
        ("DiT", "patches_replace of dit"),
        ("forward_orig", "another forward_orig"),
        ("block", "Larger in place of SingleStreamBlock"),
        ("vec", "patches_replace of dit"),
    ],
)
def test_what_reaches_into_the_model_takes_the_hosts_code(figures: Figures, which: str, reason: str) -> None:
    found = of(figures, "patches")
    check(found[which], reason)
    assert found[which]["effect"] > EFFECT
    check(found[f"after {which}"])
    assert found[f"after {which}"]["effect"] == 0


@pytest.mark.parametrize("which", ["forward_orig", "process_img"])
def test_functions_that_were_replaced_in_the_hosts_class_are_called(figures: Figures, which: str) -> None:
    found = of(figures, "class_patches")
    if which not in found:
        pytest.skip("this ComfyUI has no such function")
    check(found[which], f"another {which} of the class Flux")
    assert found[which]["effect"] > EFFECT
    check(found["after"])


@pytest.mark.parametrize(
    ("which", "reason"), [("whole", None), ("blocks", "OptimizedModule in place of DoubleStreamBlock")]
)
def test_torch_compile(figures: Figures, which: str, reason: str | None) -> None:
    found = of(figures, "compiled")
    check(found[which], reason)
    check(found["after"])


def test_the_hosts_code_with_our_weights_is_its_own_bit_for_bit(figures: Figures) -> None:
    found = of(figures, "eager_is_the_same")
    assert found["no table"]["off"] == 0  # only the modulation of all steps at once rounds otherwise
    for which in ("table", "guided"):
        check(found[which], "patches_replace of dit")


def test_native_attention_guidance(figures: Figures) -> None:
    found = of(figures, "attention_guidance")
    check(found["NAG"], "patches of attn1_output_patch")
    assert found["NAG"]["effect"] > EFFECT
    check(found["after"])


def test_vortex_nag_leads_the_positive_rows(figures: Figures) -> None:
    found = of(figures, "vortex_nag")
    check(found["alone"])
    check(found["with CFG"])
    assert found["effect"] > EFFECT
    assert found["of a clone"] == found["after"] == 0
    assert found["batch"] < ROUNDING
    assert "because of patches_replace of dit. Remove one of both" in found["eager"]
    assert "needs the MODEL of NF4 Flux Loader" in found["another model"]


def test_a_cache_above_skips_steps(figures: Figures) -> None:
    found = of(figures, "cache")
    check(found)
    assert 2 < found["calls"] < 12


def test_the_host_asks_the_plan_for_memory(figures: Figures) -> None:
    found = of(figures, "memory")
    assert found["asked"] == found["peak"] > 0  # on the CPU nothing is on a device before


def test_unloading_changes_no_picture(figures: Figures) -> None:
    assert of(figures, "unloaded") == {"same": True, "loaded again": True, "one model": True}


def test_a_model_is_gone_with_its_last_patcher(figures: Figures) -> None:
    assert of(figures, "freed") == {"while there are any": [True, True], "later": [False, False]}


def test_merging_and_saving_are_refused_in_words(figures: Figures) -> None:
    found = of(figures, "refused")
    for name in ("merge", "merge into"):
        assert "VortexInputError: The MODEL of NF4 Flux Loader cannot be merged" in found[name]
    assert "VortexInputError: The MODEL of NF4 Flux Loader cannot be saved" in found["save"]
    assert not found["saved"]
    check(found["after"])


def test_the_schnell_sampler_draws_as_before(figures: Figures) -> None:
    assert of(figures, "old_route") == {"same": True, "the clone's again": True}
