"""LoHa, LoKr, GLoRA, DoRA, OFT, whole updates, biases and norms, against a few dense lines each."""

from __future__ import annotations

from pathlib import Path

import lora_parts
import pytest
import torch
from lora_parts import LINEARS, MINI, MLP, PROJ, SQUARE, D, M, random
from torch import Tensor

from vortex_core.checkpoint.lora_reader import read_lora
from vortex_core.errors import VortexCheckpointError
from vortex_core.quant.adapters import Full, Hadamard, Kronecker, LoraPart

W = lora_parts.weights()


def key(module: str) -> str:
    return "lora_unet_" + module.replace(".", "_")


def part(tmp_path: Path, state: dict[str, Tensor]) -> LoraPart:
    file = read_lora(lora_parts.save(tmp_path / "a.safetensors", state), MINI)
    assert not file.refused
    return file.parts["transformer"]


def check(found: LoraPart, module: str, expected: Tensor, weight: Tensor | None = None) -> None:
    weight = W[f"{module}.weight"] if weight is None else weight
    torch.testing.assert_close(found.delta(module, weight), expected, atol=2e-5, rtol=2e-5)


def hada(state: dict[str, Tensor], name: str, tucker: bool) -> Tensor:
    sides = []
    for number in (1, 2):
        first, second = state[f"{name}.hada_w{number}_a"], state[f"{name}.hada_w{number}_b"]
        sides.append(first.T @ state[f"{name}.hada_t{number}"] @ second if tucker else first @ second)
    return sides[0] * sides[1]


@pytest.mark.parametrize("tucker", [False, True])
@pytest.mark.parametrize(
    ("rank", "form"), [(1, "updates"), (3, "updates"), (10, "updates"), (11, "dense"), (40, "dense")]
)
def test_loha(tmp_path: Path, rank: int, form: str, tucker: bool) -> None:
    state = lora_parts.loha(key(MLP), M, D, rank, tucker=tucker)
    found = part(tmp_path, state)
    check(found, MLP, hada(state, key(MLP), tucker) / 2)
    assert found.modules() == set(getattr(found, form)) == {MLP}
    if form == "updates":
        assert found.rank(MLP) == rank**2
    else:
        assert isinstance(found.dense[MLP][0], Hadamard)
        assert found.whole() == {MLP}


@pytest.mark.parametrize(
    ("left", "right", "ranks", "rank"),
    [
        ((8, 8), (16, 16), (None, 2), 16),
        ((4, 2), (32, 64), (None, 3), 6),
        ((2, 4), (64, 32), (None, 3), 6),
        ((16, 16), (8, 8), (2, 2), 4),
        ((4, 4), (32, 32), (3, 1), 3),
        ((2, 2), (64, 64), (3, 4), 8),
        ((8, 8), (16, 16), (None, None), None),
        ((4, 4), (32, 32), (None, 20), None),
        ((4, 4), (32, 32), (3, None), None),
    ],
)
def test_lokr(
    tmp_path: Path,
    left: tuple[int, int],
    right: tuple[int, int],
    ranks: tuple[int | None, int | None],
    rank: int | None,
) -> None:
    name = key(PROJ)
    state = lora_parts.lokr(name, left, right, ranks)
    sides = [
        state[f"{name}.lokr_w{number}"]
        if one is None
        else state[f"{name}.lokr_w{number}_a"] @ state[f"{name}.lokr_w{number}_b"]
        for number, one in zip((1, 2), ranks, strict=True)
    ]
    last = next((one for one in reversed(ranks) if one is not None), None)
    found = part(tmp_path, state)
    check(found, PROJ, torch.kron(*sides) * (1.0 if last is None else 2 / last))
    if rank is None:
        assert isinstance(found.dense[PROJ][0], Kronecker)
    else:
        assert found.rank(PROJ) == rank


def test_lokr_with_a_core(tmp_path: Path) -> None:
    name = key(PROJ)
    w1, a, b, core = random(8, 8), random(2, 16, seed=1), random(2, 16, seed=2), random(2, 2, seed=3)
    state = {f"{name}.lokr_w1": w1, f"{name}.lokr_w2_a": a, f"{name}.lokr_w2_b": b, f"{name}.lokr_t2": core}
    check(part(tmp_path, state), PROJ, torch.kron(w1, a.T @ core @ b))


@pytest.mark.parametrize("module", [PROJ, MLP])
@pytest.mark.parametrize("old", [False, True])
def test_glora_needs_the_weight(tmp_path: Path, module: str, old: bool) -> None:
    n, k, _ = LINEARS[module]
    state = lora_parts.glora(key(module), n, k, 4, old=old)
    newer = lora_parts.glora("x", n, k, 4)
    a1, a2, b1, b2 = (newer[f"x.{name}.weight"] for name in ("a1", "a2", "b1", "b2"))
    found = part(tmp_path, state)
    check(found, module, (W[f"{module}.weight"] @ a1 @ a2 + b1 @ b2) * 3 / 4)
    assert found.rank(module) == 8
    (before,) = found.inputs[module]
    assert before.of(W[f"{module}.weight"]).up.shape == (n, 4)


def test_glora_of_a_part_takes_its_rows(tmp_path: Path) -> None:
    state = lora_parts.glora("transformer.transformer_blocks.0.attn.to_k", D, D, 2)
    a1, a2, b1, b2 = (
        state[f"transformer.transformer_blocks.0.attn.to_k.{name}.weight"] for name in ("a1", "a2", "b1", "b2")
    )
    module = "double_blocks.0.img_attn.qkv"
    expected = torch.zeros(3 * D, D)
    expected[D : 2 * D] = (W[f"{module}.weight"][D : 2 * D] @ a1 @ a2 + b1 @ b2) * 1.5
    check(part(tmp_path, state), module, expected)


def dora(weight: Tensor, change: Tensor, scale: Tensor, dim: int) -> Tensor:
    merged = weight + change
    return merged * scale / merged.norm(dim=dim, keepdim=True) - weight


@pytest.mark.parametrize("shape", [(M, 1), (M,)])
@pytest.mark.parametrize("end", ["dora_scale", "lora_magnitude_vector", "lora_magnitude_vector.weight"])
def test_dora_of_rows(tmp_path: Path, shape: tuple[int, ...], end: str) -> None:
    state = lora_parts.lora(key(MLP), M, D, 4)
    change = state[f"{key(MLP)}.lora_up.weight"] @ state[f"{key(MLP)}.lora_down.weight"] / 4
    scale = random(M, 1, by=1).abs() + 1
    found = part(tmp_path, state | {f"{key(MLP)}.{end}": scale.view(shape)})
    check(found, MLP, dora(W[f"{MLP}.weight"], change, scale, 1))
    (one,) = found.row_scales[MLP]
    assert one.axis == "output"
    assert not found.whole()  # a scale of rows and an update
    gains = one.gains(W[f"{MLP}.weight"] + change)
    strength = 0.6
    rows = 1 - strength + strength * gains
    check(found, MLP, (rows * W[f"{MLP}.weight"] + strength * gains * change - W[f"{MLP}.weight"]) / strength)


def test_dora_of_columns(tmp_path: Path) -> None:
    state = lora_parts.lora(key(MLP), M, D, 4)
    change = state[f"{key(MLP)}.lora_up.weight"] @ state[f"{key(MLP)}.lora_down.weight"] / 4
    scale = random(1, D, by=1).abs() + 1
    found = part(tmp_path, state | {f"{key(MLP)}.dora_scale": scale})
    check(found, MLP, dora(W[f"{MLP}.weight"], change, scale, 0))
    assert found.row_scales[MLP][0].axis == "input"
    assert found.whole() == {MLP}


def test_dora_of_split_parts_and_swapped_halves(tmp_path: Path) -> None:
    block = "transformer.transformer_blocks.0.attn"
    state, expected = {}, W["double_blocks.0.img_attn.qkv.weight"].clone() * 0
    for number, name in enumerate(("to_q", "to_v")):
        own = lora_parts.lora(f"{block}.{name}", D, D, 2)
        scale = random(D, 1, seed=number, by=1).abs() + 1
        state |= own | {f"{block}.{name}.dora_scale": scale}
        rows = slice(0, D) if name == "to_q" else slice(2 * D, 3 * D)
        change = own[f"{block}.{name}.lora_up.weight"] @ own[f"{block}.{name}.lora_down.weight"] / 2
        expected[rows] = dora(W["double_blocks.0.img_attn.qkv.weight"][rows], change, scale, 1)
    own, scale = lora_parts.lora("norm_out.linear", 2 * D, D, 2), random(2 * D, 1, by=1).abs() + 1
    found = part(tmp_path, state | own | {"norm_out.linear.dora_scale": scale})
    check(found, "double_blocks.0.img_attn.qkv", expected)
    ours = "final_layer.adaLN_modulation.1"
    theirs = torch.cat(W[f"{ours}.weight"].chunk(2)[::-1])
    change = own["norm_out.linear.lora_up.weight"] @ own["norm_out.linear.lora_down.weight"] / 2
    check(found, ours, torch.cat(dora(theirs, change, scale, 1).chunk(2)[::-1]))


def cayley(blocks: Tensor, limit: float = 0.0) -> Tensor:
    q = blocks - blocks.transpose(-1, -2)
    if limit and q.norm() > limit:
        q = q * limit / (q.norm() + 1e-8)
    one = torch.eye(blocks.shape[-1])
    return (one + q) @ (one - q).inverse()


@pytest.mark.parametrize(("alpha", "rescaled"), [(0.0, False), (0.0, True), (1e-3, False)])
def test_oft(tmp_path: Path, alpha: float, rescaled: bool) -> None:
    name, blocks = key(PROJ), random(16, 8, 8)
    state = {f"{name}.oft_blocks": blocks, f"{name}.alpha": torch.tensor(alpha)}
    turned = torch.block_diag(*cayley(blocks, alpha * D)).T @ W[f"{PROJ}.weight"]
    if rescaled:
        state[f"{name}.rescale"] = random(D, 1, by=1)
        turned = turned * state[f"{name}.rescale"]
    found = part(tmp_path, state)
    check(found, PROJ, turned - W[f"{PROJ}.weight"])
    assert found.whole() == {PROJ}


def test_oft_of_swapped_halves(tmp_path: Path) -> None:
    blocks, ours = random(32, 8, 8), "final_layer.adaLN_modulation.1"
    theirs = torch.cat(W[f"{ours}.weight"].chunk(2)[::-1])
    turned = torch.block_diag(*cayley(blocks)).T @ theirs - theirs
    found = part(tmp_path, {"lycoris_norm_out_linear.oft_blocks": blocks})
    check(found, ours, torch.cat(turned.chunk(2)[::-1]))


def test_boft_turns_neighbours_first(tmp_path: Path) -> None:
    """One stage of blocks of 4: rows 2 apart are interleaved, then turned by blocks."""
    name, blocks = key(PROJ), random(1, 32, 4, 4)
    order = torch.tensor([4 * i + j for i in range(32) for j in (0, 2, 1, 3)])
    turned = torch.block_diag(*cayley(blocks[0])) @ W[f"{PROJ}.weight"][order]
    expected = torch.empty_like(turned)
    expected[order] = turned
    check(part(tmp_path, {f"{name}.oft_blocks": blocks}), PROJ, expected - W[f"{PROJ}.weight"])


def test_whole_updates_biases_and_norms(tmp_path: Path) -> None:
    diff, bias, norm, other = random(D, D), random(D), random(D, seed=1), random(D, seed=2)
    state = {
        f"{key(PROJ)}.diff": diff, f"{key(PROJ)}.diff_b": bias,
        f"{key(MLP)}.diff_b": random(M),
        "lora_unet_double_blocks_0_img_attn_norm_query_norm.diff": norm,
        "lora_unet_double_blocks_0_img_attn_norm_key_norm.w_norm": other,
        "diffusion_model.single_blocks.0.norm.key_norm.set_weight": norm,
        "diffusion_model.single_blocks.1.norm.key_norm.scale.set_weight": norm,
    }  # fmt: skip
    found = part(tmp_path, state)
    check(found, PROJ, diff)
    assert isinstance(found.dense[PROJ][0], Full)
    assert torch.equal(found.biases[PROJ], bias)
    assert torch.equal(found.biases[MLP], state[f"{key(MLP)}.diff_b"])
    scale = torch.ones(D)
    assert torch.equal(found.norms["double_blocks.0.img_attn.norm.query_norm"].delta(scale), norm)
    assert torch.equal(found.norms["double_blocks.0.img_attn.norm.key_norm"].delta(scale), other)
    for block in range(2):
        assert torch.equal(found.norms[f"single_blocks.{block}.norm.key_norm"].delta(scale), norm - 1)


def test_biases_of_parts(tmp_path: Path) -> None:
    state = lora_parts.lora("transformer.transformer_blocks.0.attn.to_v", D, D, 4)
    state["transformer.transformer_blocks.0.attn.to_v.lora_B.bias"] = bias = random(D)
    state |= {"transformer.norm_out.linear.diff_b": (swapped := random(2 * D))}
    found = part(tmp_path, state)
    expected = torch.cat([torch.zeros(2 * D), bias / 4])
    assert torch.allclose(found.biases["double_blocks.0.img_attn.qkv"], expected)
    assert torch.equal(found.biases["final_layer.adaLN_modulation.1"], torch.cat(swapped.chunk(2)[::-1]))


def test_bfl_control_without_a_wider_img_in(tmp_path: Path) -> None:
    """The writer's own names: biases of lora_B, and norms that are replaced."""
    made = lora_parts.factors(2)
    state = lora_parts.WRITERS["BFL"](made)
    state |= {f"{name}.lora_B.bias": random(up.shape[0]) for name, (up, _) in made.items()}
    norms = {f"{name}": tensor for name, tensor in W.items() if name.endswith("_norm.scale")}
    found = part(tmp_path, state | norms)
    assert found.biases.keys() == made.keys()
    assert {f"{name}.scale" for name in found.norms} == norms.keys()
    assert all(one.replaces for one in found.norms.values())


def test_layer_norms_of_clip(tmp_path: Path) -> None:
    name = "lora_te1_text_model_encoder_layers_1_layer_norm1"
    state = {f"{name}.w_norm": random(64), f"{name}.b_norm": random(64, seed=1)}
    file = read_lora(lora_parts.save(tmp_path / "a.safetensors", state), MINI)
    clip = file.parts["clip"]
    assert torch.equal(clip.norms["encoder.layers.1.layer_norm1"].values, state[f"{name}.w_norm"])
    assert torch.equal(clip.biases["encoder.layers.1.layer_norm1"], state[f"{name}.b_norm"])


def test_a_mid_is_multiplied_in(tmp_path: Path) -> None:
    name = key(SQUARE)
    up, mid, down = random(D, 4), random(4, 4, 1, 1), random(4, D, 1, 1)
    state = {
        f"{name}.lora_up.weight": up[..., None, None],
        f"{name}.lora_mid.weight": mid,
        f"{name}.lora_down.weight": down,
    }
    check(part(tmp_path, state), SQUARE, up @ mid.view(4, 4) @ down.view(4, D))


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"x_embedder.lora_A.weight": torch.ones(2, 16), "x_embedder.reshape_weight": torch.ones(2)}, "reshape_weight"),
        ({"diffusion_model.img_in.set_weight": torch.ones(D, 16)}, "a whole weight"),
        ({f"{key(PROJ)}.on_input": torch.tensor(1), f"{key(PROJ)}.weight": torch.ones(D)}, "IA3"),
        ({"transformer.transformer_blocks.0.attn.to_q.oft_R.weight": torch.ones(8, 120)}, "OFT of PEFT"),
        ({"lora_te1_text_model_embeddings_token_embedding.lora_up.weight": torch.ones(99, 2)}, "embedding table"),
        ({"bundle_emb.cat.t5": torch.ones(1, 64)}, "a learned embedding"),
        ({"lora_te3_encoder_block_0_layer_0_SelfAttention_q.diff_b": torch.ones(128)}, "T5 has no biases"),
        ({"lycoris_norm_out_linear.oft_blocks": torch.ones(1, 256, 256)}, "halves"),
    ],
)  # fmt: skip
def test_refused_by_name(tmp_path: Path, state: dict[str, Tensor], words: str) -> None:
    good = lora_parts.lora("lora_unet_txt_in", D, 64, 2)
    file = read_lora(lora_parts.save(tmp_path / "a.safetensors", state | good), MINI)
    assert any(words in why for why in file.refused.values())
    assert file.refused.keys() <= state.keys()
    assert file.parts["transformer"].modules() == {"txt_in"}


@pytest.mark.parametrize("ends", [("hada_w1_a", "lora_up.weight"), ("diff", "lokr_w1")])
def test_two_methods_at_once(tmp_path: Path, ends: tuple[str, str]) -> None:
    state = {f"{key(PROJ)}.{end}": torch.ones(D, D) for end in ends}
    with pytest.raises(VortexCheckpointError, match="at once"):
        part(tmp_path, state)
