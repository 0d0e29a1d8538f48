"""The host's patches of weights, translated to LoRAs: what they add, what is shared, what is refused."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import lora_parts
import pytest
import torch
from fake_host import module
from lora_parts import MLP, PROJ, SQUARE, D, M, random
from torch import Tensor

native, errors = module("nodes.native_patches"), module("vortex_core.errors")
spec = module("vortex_core.flux1.spec")
MINI = spec.ModelSpec(flux=spec.FluxSpec(
    hidden=D, heads=1, double_blocks=2, single_blocks=2, in_channels=16, context=64, vec=64,
))  # fmt: skip
W = lora_parts.weights()
QKV, ADALN, NORM = "double_blocks.0.img_attn.qkv", "final_layer.adaLN_modulation.1", "single_blocks.0.norm.key_norm"
Patches = dict[str, list[tuple[Any, ...]]]


def swap_scale_shift(weight: Tensor) -> Tensor:
    raise AssertionError("the host's function is known by its name")


def key(name: str, kind: str = "weight") -> str:
    return f"diffusion_model.{name}.{kind}"


def adapter(name: str, *weights: Any) -> Any:
    """As the host's `weight_adapter` has them."""
    return SimpleNamespace(name=name, weights=weights)


def lora(rows: int = D, columns: int = D, *, alpha: float | None = None, seed: int = 0) -> Any:
    up, down = random(rows, 4, seed=seed), random(4, columns, seed=seed + 1)
    return adapter("lora", up, down, alpha, None, None, None)


def entry(what: Any, strength: float = 1.0, *, offset: Any = None, function: Any = None) -> tuple[Any, ...]:
    return strength, what, 1.0, offset, function


@pytest.fixture
def translate() -> Callable[[Patches], Any]:
    return native.Translator(MINI)


def added(translate: Callable[[Patches], Any], patches: Patches, name: str) -> Tensor:
    """What all LoRAs together add to the weight of a module."""
    made = [
        strength * file.parts["transformer"].delta(name, W[f"{name}.weight"]) for file, strength in translate(patches)
    ]
    return torch.stack(made).sum(0)


# ---------------------------------------------------------------- what they add


@pytest.mark.parametrize(("alpha", "scale"), [(None, 1.0), (2.0, 0.5), (8.0, 2.0)])
def test_a_lora_adds_strength_times_alpha_over_rank(translate: Any, alpha: float | None, scale: float) -> None:
    what = lora(alpha=alpha)
    up, down, *_ = what.weights
    torch.testing.assert_close(added(translate, {key(PROJ): [entry(what, 0.75)]}, PROJ), 0.75 * scale * up @ down)


def test_loha_lokr_and_glora(translate: Any) -> None:
    a, b, c, d = random(D, 3), random(3, D, seed=1), random(D, 3, seed=2), random(3, D, seed=3)
    loha = adapter("loha", a, b, None, c, d, None, None, None)
    torch.testing.assert_close(added(translate, {key(PROJ): [entry(loha)]}, PROJ), (a @ b) * (c @ d))
    left, right = random(8, 4), random(D // 8, D // 4, seed=1)
    lokr = adapter("lokr", left, right, *[None] * 7)
    torch.testing.assert_close(added(translate, {key(PROJ): [entry(lokr)]}, PROJ), torch.kron(left, right))
    glora = adapter("glora", a, b, c, d, 6.0, None)  # a is [K, r], b [r, K], c [N, r], d [r, K]
    expected = 2 * (W[f"{PROJ}.weight"] @ a @ b + c @ d)
    torch.testing.assert_close(added(translate, {key(PROJ): [entry(glora)]}, PROJ), expected, atol=1e-5, rtol=1e-5)


def test_rows_of_a_fused_matrix(translate: Any) -> None:
    parts = [lora(seed=seed) for seed in range(3)]
    patches = {key(QKV): [entry(part, 0.5, offset=(0, i * D, D)) for i, part in enumerate(parts)]}
    expected = torch.cat([0.5 * part.weights[0] @ part.weights[1] for part in parts])
    torch.testing.assert_close(added(translate, patches, QKV), expected)
    assert len(translate(patches)) == 1


def test_swapped_halves(translate: Any) -> None:
    what = lora(2 * D)
    up, down, *_ = what.weights
    found = added(translate, {key(ADALN): [entry(what, function=swap_scale_shift)]}, ADALN)
    torch.testing.assert_close(found, torch.cat([up[D:], up[:D]]) @ down)


def test_biases_norms_and_whole_matrices(translate: Any) -> None:
    bias, scale, whole = random(D), random(D, seed=1), random(M, D, seed=2)
    patches = {
        key(PROJ, "bias"): [entry(("diff", (bias,)))],
        key(NORM): [entry(("diff", (scale,)))],  # named `weight` since 0.14
        key("single_blocks.1.norm.key_norm", "scale"): [entry(("diff", (scale,)))],
        key(MLP): [entry((whole,))],
    }
    ((file, strength),) = translate(patches)
    part = file.parts["transformer"]
    assert strength == 1
    assert torch.equal(part.biases[PROJ], bias)
    for norm in (NORM, "single_blocks.1.norm.key_norm"):
        assert torch.equal(part.norms[norm].delta(W[f"{norm}.scale"]), scale)
    assert torch.equal(part.delta(MLP, W[f"{MLP}.weight"]), whole)


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
def test_a_norm_is_set_whatever_the_strength_is(translate: Any, strength: float) -> None:
    scale = random(D)
    ((file, found),) = translate({key(NORM, "scale"): [entry(("set", (scale,)), strength)]})
    before = W[f"{NORM}.scale"]
    torch.testing.assert_close(before + found * file.parts["transformer"].norms[NORM].delta(before), scale)


def test_nothing_is_made_of_nothing(translate: Any) -> None:
    assert translate({}) == ()
    assert translate({key(PROJ): [entry(lora(), 0.0)]}) == ()


# ---------------------------------------------------------------- which LoRAs become of them


def test_patches_of_one_strength_are_one_lora_and_others_are_others(translate: Any) -> None:
    one, two, three = (lora(seed=seed) for seed in range(3))
    made = translate({key(PROJ): [entry(one), entry(two, -0.5)], key(SQUARE): [entry(three, -0.5)]})
    assert [strength for _, strength in made] == [1.0, -0.5]
    assert [file.parts["transformer"].modules() for file, _ in made] == [{PROJ}, {PROJ, SQUARE}]


def test_patches_of_the_same_rows_add_up(translate: Any) -> None:
    one, two = lora(), lora(seed=5)
    patches = {key(PROJ): [entry(one), entry(two), entry(one)]}
    expected = 2 * one.weights[0] @ one.weights[1] + two.weights[0] @ two.weights[1]
    torch.testing.assert_close(added(translate, patches, PROJ), expected)
    assert len(translate(patches)) == 3


def test_a_weight_and_its_bias_do_not_meet(translate: Any) -> None:
    patches = {key(PROJ): [entry(lora())], key(PROJ, "bias"): [entry(("diff", (random(D),)))]}
    assert len(translate(patches)) == 1


def test_another_strength_reads_nothing_again(translate: Any) -> None:
    what = lora()
    ((first, _),) = translate({key(PROJ): [entry(what)]})
    ((again, strength),) = translate({key(PROJ): [entry(what, 0.25)]})
    assert again is first
    assert strength == 0.25


def test_other_tensors_are_read(translate: Any) -> None:
    what = lora()
    ((first, _),) = translate({key(PROJ): [entry(what)]})
    for other in (
        {key(PROJ): [entry(lora())]},
        {key(SQUARE): [entry(what)]},
        {key(QKV): [entry(what, offset=(0, D, D))]},
        {key(PROJ): [entry(lora(alpha=2.0))]},
    ):
        assert translate(other)[0][0] is not first
    assert translate({key(PROJ): [entry(what)]})[0][0] is not first  # of several it was the oldest


def test_more_than_are_kept_work_at_once(translate: Any) -> None:
    patches = {key(PROJ): [entry(lora(seed=seed), 1 + seed) for seed in range(native.KEPT + 2)]}
    made = translate(patches)
    assert [file for file, _ in translate(patches)] == [file for file, _ in made]


# ---------------------------------------------------------------- what is refused


def refusal(act: Callable[[], Any]) -> str:
    with pytest.raises(errors.VortexInputError) as caught:
        act()
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "what", "words"),
    [
        (key(PROJ), adapter("oft", random(2, 4, 4)), "double_blocks.0.img_attn.proj.weight: it is 'oft'"),
        (key(PROJ), ("model_as_lora", (random(D, D),)), "it is 'model_as_lora', which is no low-rank update"),
        (key(PROJ), ("set", (random(D, D),)), "it is 'set', which is no low-rank update"),
        (key(PROJ), 5, "it is 'int', which is no low-rank update"),
        (key(PROJ), adapter("lora", *lora().weights[:5], (D, D)), "changes the shape of a weight"),
        (key(PROJ, "bias"), lora(), "it is 'lora' of what is no matrix"),
        (key(PROJ, "bias"), ("set", (random(D),)), "it is 'set' of what is no matrix"),
        (key(NORM, "scale"), lora(), "it is 'lora' of what is no matrix"),
        ((key(QKV), (1, 0, D)), lora(), "changes some columns of a weight"),
        ((key(QKV), (0, 0, D), torch.abs), lora(), "would turn it by 'abs'"),
    ],
)
def test_what_cannot_be_drawn_with_is_refused_when_it_is_added(name: Any, what: Any, words: str) -> None:
    found = refusal(lambda: native.check({name: what}, 1.0))
    assert found.startswith("A LoRA from ComfyUI's loader cannot be added to 4-bit weights: ")
    assert words in found


@pytest.mark.parametrize(("what", "strength"), [(lora(), 0.5), ([(1.0, lora(), 1.0)], 1.0)])
def test_merging_is_refused(what: Any, strength: float) -> None:
    assert "The MODEL of NF4 Flux Loader cannot be merged" in refusal(lambda: native.check({key(PROJ): what}, strength))


def test_what_can_be_drawn_with_is_not_refused() -> None:
    native.check(
        {key(PROJ): lora(), (key(QKV), (0, D, D)): lora(), (key(ADALN), None, swap_scale_shift): lora(2 * D)}, 1.0
    )


def test_a_lora_of_another_model_is_refused_by_name(translate: Any) -> None:
    with pytest.raises(errors.VortexCheckpointError, match="does not fit this model: double_blocks"):
        translate({key(PROJ): [entry(lora(2 * D))]})


def test_patches_of_both_text_encoders_and_of_steps_become_one_lora(translate: Callable[[Patches], Any]) -> None:
    wide = MINI.clip.hidden_size
    q = "encoder.block.0.layer.0.SelfAttention.q"
    patches: Patches = {
        f"clip_l.transformer.text_model.{name}.weight": [entry(lora(wide, wide, seed=i), 0.5)]
        for i, name in enumerate(("encoder.layers.0.self_attn.v_proj", "encoder.layers.1.self_attn.out_proj"))
    }
    patches |= {
        "clip_l.transformer.text_model.encoder.layers.0.layer_norm1.weight": [entry(("diff", (random(wide),)), 0.5)],
        "clip_l.transformer.text_model.final_layer_norm.bias": [entry(("diff", (random(wide),)), 0.5)],
        "clip_l.transformer.text_projection.weight": [entry(lora(wide, wide), 0.5)],  # which FLUX does not use
        f"t5xxl.transformer.{q}.weight": [entry(lora(4096, 4096), 0.5)],
        key("img_in"): [entry(lora(D, 16), 0.5)],
    }
    ((file, strength),) = translate(patches)
    assert strength == 0.5
    assert {part: sorted({*what.modules(), *what.norms, *what.biases}) for part, what in file.parts.items()} == {
        "clip": [
            "encoder.layers.0.layer_norm1", "encoder.layers.0.self_attn.v_proj", "encoder.layers.1.self_attn.out_proj",
            "final_layer_norm",
        ],
        "t5": [q],
        "transformer": ["img_in"],
    }  # fmt: skip


def test_what_text_encoders_do_not_have_is_refused_by_name(translate: Callable[[Patches], Any]) -> None:
    table = {"t5xxl.transformer.shared.weight": [entry(lora(8, 4096))]}
    with pytest.raises(errors.VortexCheckpointError, match="changes shared, which this model does not have"):
        translate(table)
