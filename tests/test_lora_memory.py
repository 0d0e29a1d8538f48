"""LoRAs whose tensors another program has read: the same as the file's, or refused in the same words."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lora_parts
import pytest
import torch
from lora_parts import CONTEXT, LINEARS, MINI, MLP, PROJ, D, M, random
from torch import Tensor

from vortex_core.checkpoint.lora_memory import Change, lora_of
from vortex_core.checkpoint.lora_reader import read_lora
from vortex_core.errors import VortexCheckpointError
from vortex_core.quant.adapters import LoraFile, LoraPart

W = lora_parts.weights()
WHERE = "A LoRA of a test"


def made(*changes: Change) -> LoraFile:
    return lora_of(changes, WHERE, MINI)


def part(*changes: Change) -> LoraPart:
    return made(*changes).parts["transformer"]


def low(rows: int = D, columns: int = D, rank: int = 3, **more: Tensor) -> dict[str, Tensor]:
    return {"up": random(rows, rank), "down": random(rank, columns, seed=1), **more}


def refusal(module: str, tensors: Mapping[str, Tensor], **more: Any) -> str:
    with pytest.raises(VortexCheckpointError) as caught:
        made(Change(module, tensors, **more))
    assert caught.value.path == WHERE
    return str(caught.value)


def test_every_linear_is_as_from_a_file(tmp_path: Path) -> None:
    factors = lora_parts.factors(4)
    read = read_lora(lora_parts.save(tmp_path / "a.safetensors", lora_parts.WRITERS["kohya"](factors)), MINI)
    alpha = torch.tensor(8.0)
    found = made(*(Change(name, {"up": up, "down": down / 2, "alpha": alpha}) for name, (up, down) in factors.items()))
    assert (found.ranks, found.refused, found.ignored) == ((4,), {}, {})
    there, here = read.parts["transformer"], found.parts["transformer"]
    assert here.modules() == there.modules() == LINEARS.keys()
    for name in LINEARS:
        assert torch.equal(here.delta(name, W[f"{name}.weight"]), there.delta(name, W[f"{name}.weight"]))


def test_parts_of_text_encoders() -> None:
    clip, t5 = "encoder.layers.0.mlp.fc1", "encoder.block.1.layer.1.DenseReluDense.wo"
    tensors = {clip: low(256, 64), t5: low(64, 192)}
    found = made(
        Change(PROJ, low()), Change(clip, tensors[clip], part="clip"), Change(t5, tensors[t5], part="t5")
    ).parts
    assert {name: part.modules() for name, part in found.items()} == {
        "transformer": {PROJ}, "clip": {clip}, "t5": {t5},
    }  # fmt: skip
    delta = found["t5"].delta(t5, random(64, 192))
    torch.testing.assert_close(delta, tensors[t5]["up"] @ tensors[t5]["down"])
    assert "which this model does not have" in refusal(t5, tensors[t5], part="clip")


def test_it_knows_how_many_bytes_it_was_made_of() -> None:
    assert made(Change(PROJ, low())).nbytes == 4 * 3 * (D + D)


def test_a_change_of_some_rows_leaves_the_others() -> None:
    tensors = low()
    delta = part(Change("double_blocks.0.img_attn.qkv", tensors, slice(D, 2 * D))).delta(
        "double_blocks.0.img_attn.qkv", W["double_blocks.0.img_attn.qkv.weight"]
    )
    torch.testing.assert_close(delta[D : 2 * D], tensors["up"] @ tensors["down"])
    assert not delta[:D].any()
    assert not delta[2 * D :].any()


def test_halves_change_places() -> None:
    name, tensors = "final_layer.adaLN_modulation.1", low(2 * D)
    straight, swapped = (part(Change(name, tensors, swapped=by)).delta(name, W[f"{name}.weight"]) for by in (0, 1))
    assert torch.equal(swapped, torch.cat([straight[D:], straight[:D]]))


def test_biases_norms_and_whole_matrices() -> None:
    bias, norm, whole = random(D), random(D, seed=1), random(M, D, seed=2)
    query, key = (f"double_blocks.0.img_attn.norm.{kind}_norm" for kind in ("query", "key"))
    found = part(
        Change(PROJ, {"diff_b": bias}),
        Change(query, {"diff": norm}),
        Change(key, {"set": norm}),
        Change(MLP, {"diff": whole}),
    )
    assert torch.equal(found.biases[PROJ], bias)
    assert torch.equal(found.norms[query].delta(W[f"{query}.scale"]), norm)
    torch.testing.assert_close(W[f"{key}.scale"] + found.norms[key].delta(W[f"{key}.scale"]), norm)
    assert torch.equal(found.delta(MLP, W[f"{MLP}.weight"]), whole)
    assert found.whole() == {MLP}


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_types_of_other_programs(kind: torch.dtype) -> None:
    tensors = {role: tensor.to(kind) for role, tensor in low().items()}
    delta = part(Change(PROJ, tensors)).delta(PROJ, W[f"{PROJ}.weight"])
    torch.testing.assert_close(delta, tensors["up"].float() @ tensors["down"].float())


@pytest.mark.parametrize(
    ("module", "tensors", "words"),
    [
        ("double_blocks.9.img_attn.proj", low(), "double_blocks.9.img_attn.proj, which this model does not have"),
        ("encoder.block.0.layer.0.SelfAttention.q", low(128, 64), "which this model does not have"),
        (PROJ, low(columns=CONTEXT), f"{PROJ} is {D} x {D}, its update {D} x {CONTEXT}"),
        (PROJ, low(rows=3 * D), f"{PROJ} is {D} x {D}, its update {3 * D} x {D}"),
        (PROJ, {"up": random(D, 3)}, "lora_down"),
        (PROJ, low(down=random(4, D)), "whose ranks differ"),
        (PROJ, {"diff_b": random(2 * D)}, f"{PROJ} is {D} x {D}, its update {2 * D} x {D}"),
        ("single_blocks.0.norm.key_norm", {"diff": random(2 * D)}, "its update 256 x 1"),
        ("single_blocks.0.norm.key_norm", low(), "is a norm, which has no matrix"),
    ],
)
def test_what_does_not_fit_is_refused(module: str, tensors: dict[str, Tensor], words: str) -> None:
    assert words in refusal(module, tensors)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(value: float) -> None:
    tensors = low()
    tensors["up"][1, 2] = value
    assert refusal(PROJ, tensors) == f"{WHERE} has values that are not finite, for {PROJ}."
