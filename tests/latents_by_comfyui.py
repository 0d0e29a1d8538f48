"""Runs inside a ComfyUI tree's own Python: draws with its own Flux, LoRA loader and KSampler. Argument: a folder.

`weights.safetensors` in the folder is the transformer in fp32 under BFL's names, `inputs.safetensors` has `txt`,
`pooled` and `empty` latents, and `chains.json` a seed and for each picture its files and strengths. The clean latents
are written to `latents.safetensors`, by the same names.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main(folder: Path) -> None:
    sys.argv = ["x", "--cpu"]
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.model_detection
    import comfy.model_patcher
    import comfy.supported_models
    import folder_paths
    import torch
    from safetensors.torch import load_file, save_file

    import nodes

    weights, inputs = load_file(folder / "weights.safetensors"), load_file(folder / "inputs.safetensors")
    task = json.loads((folder / "chains.json").read_text())
    folder_paths.add_model_folder_path("loras", str(folder))

    hidden, context = weights["txt_in.weight"].shape
    config = comfy.model_detection.detect_unet_config(weights, "")
    config |= {"hidden_size": hidden, "num_heads": hidden // 128, "context_in_dim": context, "dtype": torch.float32}
    flux = comfy.supported_models.FluxSchnell(config).get_model({}).load_model_weights(weights)
    plain = comfy.model_patcher.ModelPatcher(flux, torch.device("cpu"), torch.device("cpu"))
    prompt = [[inputs["txt"], {"pooled_output": inputs["pooled"]}]]

    made = {}
    for name, chain in task["chains"].items():
        model = plain
        for file, strength in chain:
            (model,) = nodes.LoraLoaderModelOnly().load_lora_model_only(model, file, strength)
        with torch.inference_mode():  # as the host runs its nodes
            (latent,) = nodes.KSampler().sample(
                model, task["seed"], 4, 1.0, "euler", "simple", prompt, prompt, {"samples": inputs["empty"]}
            )
        made[name] = flux.process_latent_in(latent["samples"]).contiguous()
    save_file(made, folder / "latents.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
