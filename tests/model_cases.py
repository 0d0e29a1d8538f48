"""What is tried with the pack's MODEL inside a ComfyUI tree; see model_by_comfyui.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model_by_comfyui import ROOT, SIDE, decoded, find, node, part, words

if TYPE_CHECKING:
    from model_by_comfyui import Bench


# ---------------------------------------------------------------- plain sampling


def case_ksampler(bench: Bench) -> dict[str, Any]:
    return bench.both()


def case_memory(bench: Bench) -> dict[str, Any]:
    asked = bench.ours.memory_required([2, 16, SIDE, SIDE])
    return {"asked": asked, "peak": bench.engine.peak_bytes(8 * SIDE, 8 * SIDE, 2)}


def case_model_sampling(bench: Bench) -> dict[str, Any]:
    def shifted(model: Any) -> Any:
        return node("nodes_model_advanced", "ModelSamplingFlux", model, 1.15, 0.5, 512, 512)

    before = bench.sample(bench.ours)
    clone = shifted(bench.ours)
    found = {"clone": bench.both(shifted), "original": bench.both()}
    drawn = bench.sample(clone)
    again = bench.sample(bench.ours)
    same = bool((again == before).all())
    return found | {"the original's again": same, "the clone's own": bench.off(drawn, before)}


def case_part(bench: Bench) -> dict[str, Any]:
    return bench.both(denoise=0.5, latent=bench.latent(seed=5))


def mask(bench: Bench) -> Any:
    return bench.torch.linspace(0, 1, 8 * SIDE).expand(1, 1, 8 * SIDE, -1)


def case_noise_mask(bench: Bench) -> dict[str, Any]:
    return bench.both(denoise=0.75, latent=bench.latent(seed=5) | {"noise_mask": mask(bench)})


def case_differential_diffusion(bench: Bench) -> dict[str, Any]:
    def differential(model: Any) -> Any:
        return node("nodes_differential_diffusion", "DifferentialDiffusion", model)

    return bench.both(differential, latent=bench.latent(seed=5) | {"noise_mask": mask(bench)})


def case_off_the_grid(bench: Bench) -> dict[str, Any]:
    samplers = ("heun", "dpm_2", "dpmpp_sde", "uni_pc")
    found = {sampler: bench.both(sampler=sampler, steps=5) for sampler in samplers}
    schedulers = ("normal", "sgm_uniform", "beta")
    return found | {scheduler: bench.both(scheduler=scheduler, steps=5) for scheduler in schedulers}


def case_passes(bench: Bench) -> dict[str, Any]:
    """How often modulation is computed."""
    passes, engine = [], type(bench.engine)
    kept = engine.condition, engine.schedule
    engine.condition = lambda self, *args, **options: passes.append("text") or kept[0](self, *args, **options)
    engine.schedule = lambda self, *args, **options: passes.append("schedule") or kept[1](self, *args, **options)
    try:
        found = {}
        for name, options in {
            "another text": {"positive": bench.text(77)},
            "the same": {"positive": bench.text(77)},
            "more steps": {"positive": bench.text(77), "steps": 9},
            "midpoints": {"positive": bench.text(77), "steps": 9, "sampler": "dpm_2"},
        }.items():
            bench.sample(bench.ours, **options)
            found[name], passes[:] = list(passes), []
        return found
    finally:
        engine.condition, engine.schedule = kept


def case_guidance(bench: Bench) -> dict[str, Any]:
    long, short = bench.text(2, tokens=300), bench.text(3, tokens=40)
    return {
        "equal": bench.both(cfg=2.0),
        "unequal": bench.both(cfg=2.0, positive=long, negative=short),
        "equal, batch": bench.both(cfg=2.0, latent=bench.latent(2)),
        "unequal, batch": bench.both(cfg=2.0, positive=long, negative=short, latent=bench.latent(2)),
        "batch": bench.both(latent=bench.latent(2)),
    }


def case_no_pooled_text(bench: Bench) -> dict[str, Any]:
    text = [[bench.text(2)[0][0], {}]]
    if words(lambda: bench.sample(bench.theirs, positive=text)):
        return {"absent": True}
    return bench.both(positive=text)


def case_sizes(bench: Bench) -> dict[str, Any]:
    def latent(*sides: int) -> dict[str, Any]:
        return {"samples": bench.torch.zeros(1, 16, *sides)}

    return {
        "odd": bench.both(latent=latent(17, 12)),
        "small": bench.both(latent=latent(6, 6)),  # smaller than the engine draws
        "wide": bench.both(latent=latent(10, 30)),
    }


# ---------------------------------------------------------------- ControlNet


def with_control(bench: Bench, *residuals: dict[str, list[Any]]) -> Any:
    """A conditioning with one net for each of `residuals`, chained."""
    import comfy.controlnet

    class Net(comfy.controlnet.ControlBase):  # type: ignore[misc]
        def get_control(self, x_noisy: Any, t: Any, cond: Any, batched_number: int, *options: Any) -> Any:
            before = self.previous_controlnet
            before = before and before.get_control(x_noisy, t, cond, batched_number, *options)
            mine = {
                kind: [one if one is None else one.clone() for one in several] for kind, several in self.mine.items()
            }
            return self.control_merge(mine, before, x_noisy.dtype)

        def copy(self) -> Any:
            made = Net()
            made.mine = self.mine
            self.copy_to(made)
            return made

        def get_models(self) -> list[Any]:
            return []

    chain = None
    for each in residuals:
        net = Net()
        net.mine = each
        net.set_previous_controlnet(chain)
        chain = net
    (text,) = bench.text(0)
    return [[text[0], text[1] | {"control": chain, "control_apply_to_uncond": True}]]


def residual(bench: Bench, seed: int, tokens: int = SIDE * SIDE // 4) -> Any:
    dice = bench.torch.Generator().manual_seed(seed)
    return bench.torch.randn(1, tokens, bench.engine.spec.flux.hidden, generator=dice) / 4


def case_control(bench: Bench) -> dict[str, Any]:
    def control(*seeds: int | None) -> list[Any]:
        return [None if seed is None else residual(bench, seed) for seed in seeds]

    plain = bench.sample(bench.ours)
    full = {"input": control(1, 2), "output": control(3, 4)}
    found = {}
    for name, nets in {
        "full": [full],
        "None between": [{"input": control(None, 2), "output": control(3, None)}],
        "short": [{"input": control(1), "output": []}],
        "two nets": [full, {"input": control(5), "output": control(None, 6)}],
        "all None": [{"input": control(None, None), "output": []}],
    }.items():
        text = with_control(bench, *nets)
        found[name] = bench.both(positive=text)
        found[name]["effect"] = bench.off(bench.sample(bench.ours, positive=text), plain)
    text = with_control(bench, full)
    found["guided, batch"] = bench.both(
        positive=text, negative=with_control(bench, full), cfg=2.0, latent=bench.latent(2)
    )
    found["after"] = bench.both()
    return found


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

    return {"bypassed": bench.both(change), "after": bench.both()}


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
    return found


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

    return {"NAG": bench.both(change, cfg=1.5), "after": bench.both()}


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


# ---------------------------------------------------------------- the model as a whole


def case_unloaded(bench: Bench) -> dict[str, Any]:
    import comfy.model_management

    engines = part("nodes.engines")
    before = bench.sample(bench.ours)
    comfy.model_management.unload_all_models()
    same = bool((bench.sample(bench.ours) == before).all())
    clone = bench.ours.clone()
    engines._unload(bench.handle.key)  # as when two other models are loaded
    again = bool((bench.sample(clone) == before).all())
    bench.engine = bench.ours.model.vortex.engine
    one = engines._loaded[bench.handle.key].patcher.model is bench.ours.model
    return {"same": same, "loaded again": again, "one model": one}


def case_refused(bench: Bench) -> dict[str, Any]:
    import comfy.sd

    merging = find("nodes_model_merging", "ModelMergeSimple")
    target = str(bench.folder / "saved.safetensors")
    return {
        "merge": words(lambda: merging().merge(bench.ours, bench.theirs, 0.5)),
        "merge into": words(lambda: merging().merge(bench.theirs, bench.ours, 0.5)),
        "save": words(lambda: comfy.sd.save_checkpoint(target, bench.ours)),
        "saved": Path(target).exists(),
        "after": bench.both(),
    }


def case_old_route(bench: Bench) -> dict[str, Any]:
    """The Schnell Sampler draws the same, whatever MODEL was sampled with last."""
    write_loras(bench)

    def draw() -> Any:
        sampler = part("nodes").NODE_CLASS_MAPPINGS["VortexSchnellSampler"]()
        return sampler.sample(bench.handle, "a red circle", 128, 128, 1, 3, 4)[0]

    before = draw()
    clone = replaced(with_loras(("kohya", 0.75))(bench.ours))
    drawn = bench.sample(clone)
    same = bool((draw() == before).all())
    return {"same": same, "the clone's again": bool((bench.sample(clone) == drawn).all())}
