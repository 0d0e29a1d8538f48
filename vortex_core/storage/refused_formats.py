"""Files that Vortex does not read, recognized by their first bytes, their tensors' names or their metadata.

The tables say what a file is and what to do, so that an error names its kind, and calls only damaged files damaged.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import quoted

READ = "Use the model's bf16, fp8, NF4 (bitsandbytes) or GGUF file."


@dataclass(frozen=True, slots=True)
class Format:
    """A way to quantize, in words; endings of tensors' names that only it has; words for it in metadata."""

    words: str
    endings: tuple[str, ...] = ()
    keywords: tuple[str, ...] = ()


FORMATS = (
    Format(
        "quantized by SVDQuant (Nunchaku)",
        (".wscales", ".smooth_factor", ".smooth_factor_orig", ".wtscale", ".wcscales"),
        ("svdquant", "nunchaku"),
    ),
    Format("quantized by SDNQ", (".zero_point", ".svd_up", ".svd_down"), ("sdnq",)),
    Format(
        "quantized by torchao",
        ("_qdata", ":qdata", ".tensor_impl"),
        ("torchao", "affinequantizedtensor", "float8tensor", "int8tensor", "int4tensor", "int4tilepackedto4dtensor"),
    ),
    Format("in bitsandbytes' LLM.int8", (".SCB", ".weight_format"), ("llm.int8", "llm_int8", "load_in_8bit")),
    Format("in FP4 of bitsandbytes", (".quant_state.bitsandbytes__fp4",)),
    Format("in mxfp8", (), ("mxfp8",)),
    Format("in int8 with rotated weights (convrot)", (), ("convrot",)),
    Format("in int8", (), ("int8",)),
    Format("in NVFP4", (".weight_scale_2",), ("nvfp4", "fp4")),
    Format(
        "quantized by ModelOpt (TensorRT)",
        ("_quantizer._scale", "_quantizer._amax", "_quantizer._pre_quant_scale"),
        ("modelopt",),
    ),
    Format("quantized by quanto", ("._data", "._scale", "._shift"), ("quanto",)),
    Format("in fp8 with scales by blocks", (".weight_scale_inv",), ("fp8", "fbgemm_fp8", "finegrained_fp8")),
    Format("quantized by GPTQ or AWQ", (".qzeros", ".g_idx", ".qweight"), ("gptq", "awq", "auto-round")),
    Format("quantized by HQQ", (".W_q",), ("hqq",)),
    Format(
        "quantized by compressed-tensors", (".weight_packed", ".weight_shape", ".weight_zero_point"),
        ("compressed-tensors",),
    ),
    Format("quantized by AQLM", (".codebooks", ".codes"), ("aqlm",)),
)  # fmt: skip
FP8 = {"float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2"}  # ComfyUI's names of the layer formats that Vortex reads
HARMLESS = ("format", "full_precision_matrix_mult")  # other keys of such a layer, which change nothing
LAYERS = "_quantization_metadata"
ARCHITECTURES = ("flux", "pig", "t5", "t5encoder")  # `pig`: one public converter writes it for every model
BEGINNINGS = (
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself. Fetch that with `git lfs pull`."),
    (b"\x00\x05\x16\x07", "macOS' companion of a file, not the file itself, whose name lacks the leading `._`."),
    (b"PK\x03\x04", "a zip file or a pickle, which can run code when it is opened. Use the .safetensors version."),
    (b"\x80\x02", "a pickle, which can run code when it is opened. Use the .safetensors version."),
    (b"\x80\x04", "a pickle, which can run code when it is opened. Use the .safetensors version."),
    (b"\x1f\x8b", "an archive. Unpack it first."),
    (b"7z\xbc\xaf", "an archive. Unpack it first."),
    (b"Rar!", "an archive. Unpack it first."),
)
PAGES = (b"<!doctype", b"<html", b"<?xml", b"<head", b"<error")
ZEROS = bytes(64)


def beginning(head: bytes) -> str | None:
    """What a file with these first bytes is, and what to do; None where it may be a file of weights."""
    for start, words in BEGINNINGS:
        if head.startswith(start):
            return words
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith(PAGES):
        return "a web page: the server wanted a login or an accepted licence. Download it again."
    if text.startswith((b"{", b"[")):
        return "a text of JSON, not weights. Give the file of weights."
    if head.startswith(ZEROS):
        return "nothing but zeros where it begins: its download did not end. Download it again."
    return None


def format_of(names: Iterable[str], metadata: Mapping[str, str]) -> str | None:
    """A file's quantization in words, by its tensors' names and metadata; None where Vortex may read it."""
    endings = {ending for form in FORMATS for ending in form.endings}
    found = tuple(endings)
    seen = {ending for name in names if name.endswith(found) for ending in endings if name.endswith(ending)}
    for form in FORMATS:
        if seen.intersection(form.endings):
            return form.words
    for key in ("quantization_config", "quantization_format", "model_class", "quant_method", "quantization"):
        if key in metadata and (words := method(_parsed(metadata[key]))):
            return words
    if any('"_type"' in value and "Tensor" in value for value in metadata.values()):
        return "quantized by torchao"
    return None


def config_format(config: Mapping[str, Any]) -> str | None:
    """How weights are quantized by their config.json, in words; None for bitsandbytes' NF4 and for none."""
    found = {key: config[key] for key in ("quantization_config", "quant_method") if config.get(key)}
    return next((words for value in found.values() if (words := method(value))), None)


def method(description: object) -> str | None:
    """A quantization in words, by its description in any writer's form; None for NF4 and for none."""
    if isinstance(description, Mapping):
        keys = ("quant_method", "method", "quant_type", "format")
        name = next((description[key] for key in keys if description.get(key)), description)
        if isinstance(name, str) and name.lower().startswith("bitsandbytes"):
            if description.get("load_in_8bit"):
                return method("llm.int8")
            kind = description.get("bnb_4bit_quant_type", "nf4")
            return None if kind == "nf4" else f"in bitsandbytes' {quoted(kind)}"
        return method(name if isinstance(name, str) else repr(name))
    text = str(description).lower()
    if text in ("", "none", "null", "nf4", "bitsandbytes_4bit", *FP8, "fluxtransformer2dmodel"):
        return None
    return _known(text) or f"quantized, it says, by {quoted(description)}"


def _known(text: str) -> str | None:
    return next((form.words for form in FORMATS if any(word in text for word in form.keywords)), None)


def layer_format(description: object) -> tuple[str | None, str | None]:
    """A layer's type by ComfyUI's description of it, or else, in words, why Vortex does not read it."""
    if not isinstance(description, Mapping):
        return None, f"described as {quoted(description)}"
    form = description.get("format")
    other = [key for key, value in description.items() if key not in HARMLESS and value]
    if isinstance(form, str) and form in FP8 and not other:
        return FP8[form], None
    return None, _known(repr(description).lower()) or f"described as {quoted(description)}"


def layers_of(metadata: Mapping[str, str]) -> Mapping[str, Any]:
    """ComfyUI's table of quantized layers in a file's metadata. Raises `ValueError` where it is none."""
    if LAYERS not in metadata:
        return {}
    table = _parsed(metadata[LAYERS])
    layers = table.get("layers") if isinstance(table, Mapping) else None
    if not isinstance(layers, Mapping):
        raise ValueError(f"its {LAYERS} is {quoted(metadata[LAYERS])}")
    return layers


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
