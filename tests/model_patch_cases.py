"""What is tried with LoRAs and with what reaches into the pack's MODEL; see model_by_comfyui.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from model_by_comfyui import ROOT, decoded, find, node, part, words

if TYPE_CHECKING:
    from model_by_comfyui import Bench


# ---------------------------------------------------------------- LoRAs


def write_loras(bench: Bench) -> None:
    """Files of rank 4 that change every linear, as kohya (with alpha) and diffusers name them."""
    import folder_paths
    from safetensors.torch import load_file, save_file

    tiny = next((ROOT / "vortex_core/assets/tiny-schnell/transformer").glob("*.safetensors"))
    model = bench.engine._painter.model
    for file, weights in {
        "kohya": decoded(model.transformer) | decoded(model.modulation),
        "diffusers": load_file(tiny),
    }.items():
        state = {}
        for name, weight in weights.items():
            if weight.ndim == 2:
                dice, bare = bench.torch.Generator().manual_seed(sum(name.encode())), name.removesuffix(".weight")
                size = 0.1 * weight.float().std() / 2 * (2 if file == "kohya" else 1)
                up = size * bench.torch.randn(len(weight), 4, generator=dice)
                down = bench.torch.randn(4, weight.shape[1], generator=dice)
                if file == "kohya":
                    key = "lora_unet_" + bare.replace(".", "_")
                    state |= {f"{key}.lora_up.weight": up, f"{key}.lora_down.weight": down}
                    state[f"{key}.alpha"] = bench.torch.tensor(2.0)
                else:
                    state |= {f"transformer.{bare}.lora_B.weight": up, f"transformer.{bare}.lora_A.weight": down}
        save_file(state, bench.folder / f"{file}.safetensors")
    folder_paths.add_model_folder_path("loras", str(bench.folder))


def with_loras(*chain: tuple[str, float]) -> Callable[[Any], Any]:
    import nodes

    def change(model: Any) -> Any:
        for file, strength in chain:
            (model,) = nodes.LoraLoaderModelOnly().load_lora_model_only(model, f"{file}.safetensors", strength)
        return model

    return change


def case_lora(bench: Bench) -> dict[str, Any]:
    write_loras(bench)
    plain = bench.sample(bench.ours)
    found = {}
    for name, chain in {
        "kohya": [("kohya", 0.75)],
        "diffusers": [("diffusers", 0.75)],
        "negative": [("kohya", -0.5)],
        "two": [("kohya", 0.75), ("diffusers", -0.5)],
    }.items():
        found[name] = bench.both(with_loras(*chain))
        found[name]["effect"] = bench.off(bench.sample(with_loras(*chain)(bench.ours)), plain)
    found["removed"] = bench.both()
    found["removed"]["effect"] = bench.off(bench.sample(bench.ours), plain)
    lora = with_loras(("kohya", 0.75), ("diffusers", -0.5))
    found["eager"] = bench.both(lambda model: replaced(lora(model)))
    return found


def case_lora_bypassed(bench: Bench) -> dict[str, Any]:
    write_loras(bench)
    bypass = find("nodes_lora_debug", "LoraLoaderBypassModelOnly")
    if bypass is None:
        return {"absent": True}

    def change(model: Any) -> Any:
        return bypass().load_lora_model_only(model, "kohya.safetensors", 0.75)[0]

    plain = bench.sample(bench.ours)
    effect = bench.off(bench.sample(change(bench.ours)), plain)
    return {"bypassed": bench.both(change) | {"effect": effect}, "after": bench.both()}


def case_hooks(bench: Bench) -> dict[str, Any]:
    import comfy.hooks
    from safetensors.torch import load_file

    write_loras(bench)
    plain = bench.sample(bench.ours)
    hooks = comfy.hooks.create_hook_lora(load_file(bench.folder / "kohya.safetensors"), 0.75, 0.0)
    text = comfy.hooks.set_hooks_for_conditioning(bench.text(0), hooks)
    found = {"one": bench.both(positive=text), "guided": bench.both(positive=text, cfg=2.0), "after": bench.both()}
    found["one"]["effect"] = bench.off(bench.sample(bench.ours, positive=text), plain)
    return found


def case_refused_patches(bench: Bench) -> dict[str, Any]:
    """What no engine can draw with."""
    torch, key = bench.torch, "diffusion_model.img_in.weight"
    full = bench.theirs.model.state_dict()[key]
    found = {"whole": bench.both(lambda model: patched(model, {key: ("diff", (full * 0.1,))}))}
    for name, patch in {
        "merged": lambda: bench.ours.clone().add_patches({key: (full,)}, 0.5, 0.5),
        "reshaped": lambda: bench.ours.clone().add_patches({key: ("model_as_lora", (full,))}),
        "wrapped": lambda: bench.ours.clone().add_weight_wrapper(key, torch.abs),
    }.items():
        found[name] = words(patch)
    block = "diffusion_model.double_blocks.0.img_attn.proj.weight"
    whole = {block: ("diff", (bench.theirs.model.state_dict()[block] * 0.1,))}
    found["whole block"] = words(lambda: bench.sample(patched(bench.ours, whole)))
    return found | {"after": bench.both()}


def patched(model: Any, patches: dict[str, Any]) -> Any:
    model = model.clone()
    model.add_patches(patches)
    return model


# ---------------------------------------------------------------- what reaches into the model


def replaced(model: Any) -> Any:
    """A clone with a block that is replaced by itself, a little larger."""
    model = model.clone()

    def patch(args: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
        out = extra["original_block"](args)
        return out | {"img": out["img"] * 1.1}

    model.set_model_patch_replace(patch, "dit", "double_block", 0)
    return model


def case_patches(bench: Bench) -> dict[str, Any]:
    import types

    import torch

    def another_forward(model: Any) -> Any:
        model, flux = model.clone(), model.model.diffusion_model
        original = type(flux).forward_orig

        def forward_orig(self: Any, img: Any, *args: Any, **options: Any) -> Any:
            return original(self, img * 1.1, *args, **options)

        model.add_object_patch("diffusion_model.forward_orig", types.MethodType(forward_orig, flux))
        return model

    class Larger(torch.nn.Module):
        def __init__(self, block: Any) -> None:
            super().__init__()
            self.block = block

        def forward(self, *args: Any, **options: Any) -> Any:
            return self.block(*args, **options) * 1.1

    def another_block(model: Any) -> Any:
        model, flux = model.clone(), model.model.diffusion_model
        model.add_object_patch("diffusion_model.single_blocks.0", Larger(flux.single_blocks[0]))
        return model

    def another_vec(model: Any) -> Any:
        model = model.clone()

        def patch(args: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
            return extra["original_block"](args | {"vec": args["vec"] * 0.9})

        model.set_model_patch_replace(patch, "dit", "single_block", 0)
        return model

    plain = bench.sample(bench.ours)
    found = {}
    for name, change in {
        "DiT": replaced, "forward_orig": another_forward, "block": another_block, "vec": another_vec,
    }.items():  # fmt: skip
        found[name] = bench.both(change)
        found[name]["effect"] = bench.off(bench.sample(change(bench.ours)), plain)
        found[f"after {name}"] = bench.both()
        found[f"after {name}"]["effect"] = bench.off(bench.sample(bench.ours), plain)
    return found


def case_class_patches(bench: Bench) -> dict[str, Any]:
    """As packs do that replace functions of the host's class, for every model."""
    kind, found = type(bench.ours.model.diffusion_model), {}
    plain = bench.sample(bench.ours)
    for name in ("forward_orig", "process_img"):
        if not hasattr(kind, name):
            continue
        original = getattr(kind, name)
        for model in (bench.ours, bench.theirs):  # cases before this one may have left a bound original there
            vars(model.model.diffusion_model).pop(name, None)

        def larger(self: Any, x: Any, *args: Any, original: Any = original, **options: Any) -> Any:
            return original(self, x * 1.1, *args, **options)

        setattr(kind, name, larger)
        try:
            found[name] = bench.both()
            found[name]["effect"] = bench.off(bench.sample(bench.ours), plain)
        finally:
            setattr(kind, name, original)
    found["after"] = bench.both()
    return found


def case_compiled(bench: Bench) -> dict[str, Any]:
    """By the host's node, and block by block as other packs do it. Compilers leave the engine's work alone."""
    import torch

    def blocks(model: Any) -> Any:
        model, flux = model.clone(), model.model.diffusion_model
        for i, block in enumerate(flux.double_blocks):
            model.add_object_patch(f"diffusion_model.double_blocks.{i}", torch.compile(block, backend="eager"))
        return model

    plain = bench.sample(bench.theirs)
    bench.routes.taken()
    compiled = bench.sample(node("nodes_torch_compile", "TorchCompileModel", bench.ours, "inductor"))
    found = {"whole": {"off": bench.off(compiled, plain), "routes": bench.routes.taken()[:1]}}
    found["blocks"] = {"off": bench.off(bench.sample(blocks(bench.ours)), plain), "routes": bench.routes.taken()}
    return found | {"after": bench.both()}


def case_eager_is_the_same(bench: Bench) -> dict[str, Any]:
    """The host's code with the engine's weights, without any patch of effect."""

    def through(args: dict[str, Any], extra: dict[str, Any]) -> Any:
        return extra["original_block"](args)

    def change(model: Any) -> Any:
        model = model.clone()
        model.set_model_patch_replace(through, "dit", "double_block", 0)
        return model

    found = {"table": bench.both(change), "guided": bench.both(change, cfg=2.0, latent=bench.latent(2))}
    eager = part("nodes.native_eager").Eager
    kept = eager._is_known
    eager._is_known = lambda self, x: False
    try:
        found["no table"] = bench.both(change)
    finally:
        eager._is_known = kept
    return found


def case_attention_guidance(bench: Bench) -> dict[str, Any]:
    if find("nodes_nag", "NAGuidance") is None:
        return {"absent": True}

    def change(model: Any) -> Any:
        return node("nodes_nag", "NAGuidance", model, 5.0, 0.5, 1.5)

    plain = bench.sample(bench.ours, cfg=1.5)
    effect = bench.off(bench.sample(change(bench.ours), cfg=1.5), plain)
    return {"NAG": bench.both(change, cfg=1.5) | {"effect": effect}, "after": bench.both()}


def case_cache(bench: Bench) -> dict[str, Any]:
    if find("nodes_easycache", "EasyCacheNode") is None:
        return {"absent": True}

    def change(model: Any) -> Any:
        return node("nodes_easycache", "EasyCacheNode", model, 0.8, 0.1, 0.95, False)

    calls, steps = [], part("nodes.native_steps").Steps
    kept = steps._fast
    steps._fast = lambda self, *args: calls.append(1) or kept(self, *args)
    try:
        found = bench.both(change, steps=12)
    finally:
        steps._fast = kept
    return found | {"calls": len(calls)}
