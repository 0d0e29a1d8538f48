"""Runs inside a ComfyUI tree's own Python: patches weights with the host's own loader. Arguments: a folder, a strength.

`weights.safetensors` in the folder is W under BFL's names, and each `*.lora.safetensors` is a LoRA; the results are
written beside them as `*.out.safetensors`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any


def main(folder: Path, strength: float) -> None:
    sys.argv = ["x", "--cpu"]
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.lora
    import comfy.lora_convert
    import comfy.model_base
    import comfy.utils
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "weights.safetensors")

    class Unet(comfy.model_base.Flux):  # type: ignore[misc]
        def __init__(self) -> None: ...

        def state_dict(self) -> dict[str, Any]:
            return {f"diffusion_model.{name}": tensor for name, tensor in weights.items()}

    model = Unet()
    config = {"depth": 2, "depth_single_blocks": 2, "hidden_size": weights["img_in.weight"].shape[0]}
    object.__setattr__(model, "model_config", type("Config", (), {"unet_config": config}))
    names = comfy.lora.model_lora_keys_unet(model, {})
    for path in sorted(folder.glob("*.lora.safetensors")):
        loaded = comfy.lora.load_lora(comfy.lora_convert.convert_lora(load_file(path)), names)
        patches: dict[str, list[Any]] = {}
        for key, value in loaded.items():
            name, offset, function = (*key, None, None)[:3] if isinstance(key, tuple) else (key, None, None)
            patches.setdefault(name, []).append((strength, value, 1.0, offset, function))
        made = {}
        for name, each in patches.items():
            bare = name.removeprefix("diffusion_model.")
            made[bare] = comfy.lora.calculate_weight(each, weights[bare].clone(), name).contiguous()
        save_file(made, str(path).replace(".lora.", ".out."))


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]))
