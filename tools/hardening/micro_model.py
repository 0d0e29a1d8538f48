"""The smallest model that Vortex takes, with random weights: for faults and fuzzing, where a thousand are loaded.

python tools/hardening/micro_model.py FOLDER         # 0.6 MB; draws noise
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from vortex_core.bench.random_model import modules
from vortex_core.checkpoint.bundle import TINY

SIZES: dict[str, dict[str, Any]] = {
    "transformer": {
        "num_layers": 1, "num_single_layers": 1, "num_attention_heads": 1, "joint_attention_dim": 64,
        "pooled_projection_dim": 64,
    },
    "vae": {"block_out_channels": [16, 16, 16, 16], "sample_size": 64},
    "text_encoder": {
        "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1,
        "projection_dim": 64,
    },
    "text_encoder_2": {"d_model": 64, "d_ff": 64, "num_layers": 1, "num_heads": 1},
}  # fmt: skip
FILES = {"transformer": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model"}


def write(folder: Path) -> Path:
    """Write a folder in the diffusers layout, the same at each call. Returns its path."""
    shutil.copytree(TINY, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    config = {part: json.loads((TINY / part / "config.json").read_text()) | sizes for part, sizes in SIZES.items()}
    generator = torch.Generator().manual_seed(0)
    for part, module in modules(config).items():
        (folder / part / "config.json").write_text(json.dumps(config[part], indent=2))
        tensors = {}
        for name, parameter in module.named_parameters():
            if parameter.ndim > 1:  # values keep their size from layer to layer
                made = torch.randn(parameter.shape, generator=generator) * parameter[0].numel() ** -0.5
            else:
                made = torch.full(parameter.shape, float(name.endswith("weight")))
            tensors[name] = made.bfloat16()
        save_file(tensors, folder / part / f"{FILES.get(part, 'model')}.safetensors", metadata={"format": "pt"})
    return folder


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        raise SystemExit(__doc__)
    print(write(Path(sys.argv[1])))
