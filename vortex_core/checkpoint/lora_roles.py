"""What a tensor in a LoRA file is for, by the end of its name: a factor, an alpha, a bias, a magnitude."""

from __future__ import annotations

import re
from collections.abc import Iterable

ROLES = {
    ".lora_up.weight": "up", ".lora_down.weight": "down", ".lora_mid.weight": "mid",
    "_lora.up.weight": "up", "_lora.down.weight": "down",
    ".lora.up.weight": "up", ".lora.down.weight": "down",
    ".lora_linear_layer.up.weight": "up", ".lora_linear_layer.down.weight": "down",
    ".lora_B.weight": "up", ".lora_A.weight": "down", ".lora_B": "up", ".lora_A": "down",
    ".up.weight": "up", ".down.weight": "down",
    ".lora_B.bias": "up_bias", ".lora_up.bias": "up_bias",
    ".alpha": "alpha", ".dora_scale": "dora",
    ".lora_magnitude_vector": "dora", ".lora_magnitude_vector.weight": "dora",
    ".diff": "diff", ".diff_b": "diff_b", ".w_norm": "diff", ".b_norm": "diff_b",
    ".set_weight": "set", ".scale": "set", ".weight": "weight", ".reshape_weight": "reshape",
    ".hada_w1_a": "w1_a", ".hada_w1_b": "w1_b", ".hada_w2_a": "w2_a", ".hada_w2_b": "w2_b",
    ".hada_t1": "t1", ".hada_t2": "t2",
    ".lokr_w1": "k1", ".lokr_w1_a": "k1_a", ".lokr_w1_b": "k1_b",
    ".lokr_w2": "k2", ".lokr_w2_a": "k2_a", ".lokr_w2_b": "k2_b", ".lokr_t2": "kt",
    ".a1.weight": "a1", ".a2.weight": "a2", ".b1.weight": "b1", ".b2.weight": "b2", ".bm.weight": "bm",
    ".oft_blocks": "blocks", ".rescale": "rescale",
}  # fmt: skip
OTHERS = {
    ".oft_R.weight": "OFT of PEFT, which turns inputs", ".oft_R": "OFT of PEFT, which turns inputs",
    ".boft_R": "BOFT of PEFT, which turns inputs", ".boft_s": "BOFT of PEFT, which turns inputs",
    ".on_input": "IA3", ".ia3_l": "IA3", ".lora_E": "AdaLoRA", ".lora_ranknum": "AdaLoRA",
    ".q_layer.weight": "T-LoRA", ".p_layer.weight": "T-LoRA", ".lambda_layer": "T-LoRA",
    ".vera_lambda_b": "VeRA", ".vera_lambda_d": "VeRA", ".hra_u": "HRA", ".fourierft_spectrum": "FourierFT",
    ".lora_embedding_A": "a LoRA of an embedding table", ".lora_embedding_B": "a LoRA of an embedding table",
}  # methods that are refused by name  # fmt: skip
OWN = ("up", "down", "w1_a", "w1_b", "k1", "k2", "k1_a", "k2_a", "a1", "blocks", "diff", "diff_b")
# `lora_A.default.weight`: PEFT puts the adapter's name in the middle while it trains, and some trainers save that
NAMED = re.compile(r"\.(lora_A|lora_B|lora_magnitude_vector)\.(?!weight$|bias$)[^.]{1,64}(\.weight|\.bias|)$")


ENDINGS = sorted(ROLES, key=len, reverse=True)
ANY, OTHER = tuple(ENDINGS), tuple(OTHERS)  # for `endswith`, which takes many at once


def split(key: str) -> tuple[str, str] | None:
    """A key's module and role; None where the end of the name is not known."""
    key = _unnamed(key)
    if not key.endswith(ANY):
        return None
    end = next(end for end in ENDINGS if key.endswith(end))
    return key.removesuffix(end), ROLES[end]


def method(key: str) -> str | None:
    """The method that Vortex does not apply, in words, which a key belongs to."""
    if key.startswith("bundle_emb"):
        return "a learned embedding"
    key = _unnamed(key)
    return next(OTHERS[end] for end in OTHERS if key.endswith(end)) if key.endswith(OTHER) else None


def _unnamed(key: str) -> str:
    """A key without the adapter's name."""
    return NAMED.sub(r".\1\2", key) if ".lora_" in key else key


def is_lora(names: Iterable[str]) -> bool:
    """Whether names are a LoRA file's, and not a model's."""
    return any((found := split(name)) is not None and found[1] in OWN for name in names)
