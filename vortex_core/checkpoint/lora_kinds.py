"""Who wrote a LoRA file, by what method, and for which model, in words. From names and metadata alone."""

from __future__ import annotations

import json
from collections import Counter

from .lora_header import LoraHeader

# the first whose text stands in some name counts: from the rare to the common
NAMES = (
    (".processor.qkv_lora", "XLabs"),
    ("lora_transformer_", "OneTrainer"),
    ("lycoris_", "LyCORIS (SimpleTuner)"),
    ("lora_unet_transformer_blocks_", "kohya with diffusers' names"),
    ("lora_unet_single_transformer_blocks_", "kohya with diffusers' names"),
    ("lora_unet_", "kohya"),
    ("base_model.model.", "PEFT"),
    ("diffusion_model.", "ComfyUI"),
    ("transformer.transformer_blocks.", "diffusers"),
    ("transformer.single_transformer_blocks.", "diffusers"),
    ("text_encoders.", "ComfyUI"),
    ("lora_te", "kohya"),
    ("text_encoder", "diffusers"),
    ("transformer_blocks.", "bare diffusers names"),
    ("blocks.", "BFL"),
)
TRAINERS = (
    ("ai-toolkit", "ai-toolkit"), ("simpletuner", "SimpleTuner"), ("onetrainer", "OneTrainer"),
    ("fluxgym", "FluxGym"), ("lycoris.kohya", "LyCORIS, in kohya's scripts"), ("networks.lora_flux", "kohya's scripts"),
    ("sd-scripts", "kohya's scripts"), ("peft", "PEFT"),
)  # texts in metadata, and the trainers that they give away  # fmt: skip
BASES = (("schnell", "FLUX.1-schnell"), ("kontext", "FLUX.1 Kontext"), ("krea", "FLUX.1 Krea"), ("dev", "FLUX.1-dev"))
BASE_KEYS = (
    *("modelspec.architecture", "ss_base_model_version", "ss_sd_model_name", "base_model", "ot_base_model"),
    *("sshs_base_model", "modelspec.title"),
)
LONGEST = 100_000  # characters of metadata that are looked at


def kind_of(header: LoraHeader) -> str:
    """Format, methods and trainer, such as `kohya names, LoRA, by ai-toolkit`."""
    found = [name for layer in header.layers for name in layer.keys.values()] or [*header.refused, *header.ignored]
    text = "\n".join(found)
    names = next((words for mark, words in NAMES if mark in text), "bare names")
    if "names" not in names:
        names += " names"
    trainer = trainer_of(header)
    return ", ".join((names, *methods(header), *([f"by {trainer}"] if trainer else [])))


def methods(header: LoraHeader) -> list[str]:
    """The methods of its layers, the most frequent first."""
    counts = Counter(layer.label for layer in header.layers)
    return sorted(counts, key=lambda label: (-counts[label], label))


def trainer_of(header: LoraHeader) -> str | None:
    """The trainer that its metadata names."""
    text = " ".join(f"{key} {value[:LONGEST]}" for key, value in header.raw.metadata.items()).lower()[:LONGEST]
    return next((words for mark, words in TRAINERS if mark in text), None)


def base_of(header: LoraHeader) -> str | None:
    """The model that it was trained on, as its metadata or its guidance layers say."""
    metadata = header.raw.metadata
    said = [metadata[key] for key in BASE_KEYS if key in metadata] + [_adapter_base(header)]
    text = " ".join(said)[:LONGEST].lower()
    found = next((words for mark, words in BASES if mark in text), None)
    if found is None and any("guidance" in why for why in header.ignored.values()):
        found = "FLUX.1-dev"
    return found


def _adapter_base(header: LoraHeader) -> str:
    try:
        table = json.loads(header.raw.metadata.get("lora_adapter_metadata", "{}"))
        return " ".join(str(value) for key, value in table.items() if key.endswith("base_model_name_or_path"))
    except (ValueError, RecursionError, AttributeError):
        return ""


def acts_at_prompt_time(part: str, module: str) -> bool:
    """Whether a matrix is used once for a prompt: of the text encoders, or for the modulation table."""
    return part != "transformer" or "mod" in module or module.startswith(("time_in.", "vector_in."))
