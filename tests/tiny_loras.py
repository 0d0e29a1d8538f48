"""LoRA files for the miniature, under the names that ComfyUI itself writes."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors.torch import save_file

WIDTH = 256
STEP_TIME = {"double_blocks.0.img_attn.qkv": 3 * WIDTH, "single_blocks.1.linear1": 7 * WIDTH}
PROMPT_TIME = {"single_blocks.0.modulation.lin": 3 * WIDTH}  # these act in a Conditioning


def write(path: Path, seed: int = 0, *, width: int = WIDTH, prompt_time: bool = True, rank: int = 4) -> Path:
    """A LoRA of random factors, for a model of this width. A file that was there gets another time."""
    dice = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, rows in (STEP_TIME | (PROMPT_TIME if prompt_time else {})).items():
        tensors[f"diffusion_model.{name}.lora_A.weight"] = torch.randn(rank, width, generator=dice) / 4
        tensors[f"diffusion_model.{name}.lora_B.weight"] = torch.randn(rows * width // WIDTH, rank, generator=dice) / 4
    path.parent.mkdir(parents=True, exist_ok=True)
    before = path.stat().st_mtime_ns if path.exists() else 0
    save_file(tensors, path)
    if path.stat().st_mtime_ns <= before:  # a clock that stands still
        os.utime(path, ns=(before + 10**6, before + 10**6))
    return path
