"""LoRAs of other models, told from their names, widths and depths, so that an error can name the model.

FLUX.1's own relatives share its names: a LoRA of FLUX.1-dev or Kontext fits schnell; one of the control models does
not where its `img_in` is wider.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from ..flux1.spec import FluxSpec

# parts of names, with dots and underscores alike, that only this model's LoRAs have; the first that is found counts
MARKS = (
    (r"lora_te2_text_model|text_encoder_2\.text_model|conditioner\.embedders", "Stable Diffusion XL"),
    (r"(down|up|input|output|middle|mid)_blocks?[._]", "Stable Diffusion (1, 2 or XL)"),
    (r"joint_transformer_blocks", "AuraFlow"),
    (r"joint_blocks[._]\d", "Stable Diffusion 3"),
    (r"context_block[._]|x_block[._]", "Stable Diffusion 3"),
    (r"double_stream_modulation|single_stream_modulation|to_qkv_mlp_proj", "FLUX.2"),
    (r"distilled_guidance_layer", "Chroma"),
    (r"double_stream_blocks|single_stream_blocks", "HiDream"),
    (r"transformer_blocks[._]\d{1,4}[._](img_mlp|txt_mlp|img_mod|txt_mod)[._]", "Qwen-Image"),
    (r"blocks\.\d{1,4}\.(img|txt)_attn_(qkv|proj)\.|individual_token_refiner", "HunyuanVideo"),
    (r"blocks[._]\d{1,4}[._](self_attn|cross_attn|ffn)[._]", "Wan"),
    (r"transformer_blocks[._]\d{1,4}[._]attn[12][._]", "LTX-Video, PixArt or another video or picture model"),
    (r"layers[._]\d{1,4}[._](attention|feed_forward|adaLN_modulation)[._]", "Lumina 2 or Z-Image"),
    (r"noise_refiner|context_refiner", "Lumina 2 or Z-Image"),
    (r"(qkv_proj|mlp_fc[12]|qkv_proj_context|out_proj_context)\.(lora_|smooth)", "a LoRA in Nunchaku's own format"),
    (r"ip_adapter", "an IP-Adapter"),
    (r"controlnet_|control_|input_hint_block", "a ControlNet"),
)  # fmt: skip
WIDTHS = {
    1536: "Stable Diffusion 3 or 3.5 medium",
    2432: "Stable Diffusion 3.5 large",
    4096: "FLUX.2 klein 9B",
    5120: "Wan",
    6144: "FLUX.2",
}  # of the width of a transformer with diffusers' or BFL's names of blocks
CONTROLS = {96: "Fill's kin", 128: "Canny or Depth", 320: "Fill's kin", 384: "Fill"}  # input channels of `img_in`
BLOCK = re.compile(
    r"(double_blocks|single_blocks|(?<!single_)transformer_blocks|single_transformer_blocks)[._](\d{1,6})[._]"
)
FAMILIES = {"transformer_blocks": "double_blocks", "single_transformer_blocks": "single_blocks"}
DEPTHS = {
    ("double_blocks", 20): "HunyuanVideo",
    ("double_blocks", 24): "Stable Diffusion 3 or 3.5 medium",
    ("double_blocks", 38): "Stable Diffusion 3.5 large",
    ("double_blocks", 60): "Qwen-Image",
    ("single_blocks", 40): "HunyuanVideo",
    ("single_blocks", 48): "FLUX.2",
}  # how many blocks such a file numbers


def by_names(names: Iterable[str]) -> str | None:
    """What a file is by its names, such as `a LoRA of FLUX.2`; None where they do not tell."""
    text = "\n".join(names)
    words = next((words for mark, words in MARKS if re.search(mark, text)), None)
    return words if words is None or words.startswith(("a ", "an ")) else f"a LoRA of {words}"


def by_depth(names: Iterable[str], spec: FluxSpec) -> str | None:
    """What a file with more blocks than this transformer is; None where there are none."""
    deepest: dict[str, int] = {}
    for name in names:
        for family, number in BLOCK.findall(name):
            ours = FAMILIES.get(family, family)
            deepest[ours] = max(deepest.get(ours, 0), int(number) + 1)
    for family, count in deepest.items():
        has = getattr(spec, family)
        if count > has:
            words = family.replace("_", " ")
            guess = DEPTHS.get((family, count))
            return f"a LoRA of {f'{guess}, with' if guess else 'a model with'} {count} {words} where this one has {has}"
    return None


def by_widths(wrong: Mapping[str, tuple[tuple[int, int], tuple[int, int]]], spec: FluxSpec) -> str:
    """What a file is whose shapes do not fit: of canonical modules, what it has and what is wanted."""
    module, (found, wanted) = next(iter(wrong.items()))
    if set(wrong) == {"img_in"} and found[0] == wanted[0] and found[1] > wanted[1]:
        which = f" ({CONTROLS[found[1]]})" if found[1] in CONTROLS else ""
        return (
            f"a LoRA of one of FLUX.1's control models{which}: its img_in takes {found[1]} channels, and "
            f"FLUX.1-schnell's {wanted[1]}"
        )
    guess = next(
        (
            WIDTHS[have[1]]
            for have, want in wrong.values()
            if want[1] == spec.hidden and have[1] != want[1] and have[1] in WIDTHS
        ),
        None,
    )
    sizes = f"{module} is {' x '.join(map(str, found))} in it and {' x '.join(map(str, wanted))} here"
    return f"a LoRA of {guess or 'another model'}: {sizes}"
