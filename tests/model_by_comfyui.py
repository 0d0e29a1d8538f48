"""Runs inside a ComfyUI tree's own Python: the pack's MODEL and the host's own Flux with the same weights, side by side.

Argument: a folder. Each function whose name begins with `case_` gives figures by name; all are written to
`figures.json` there, and for one that failed its traceback. It imports no pytest: the tree's Python may have none.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import logging
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PACK = "vortex_pack"
SIDE = 16  # of a latent: 128 pixels


def start(tree: Path) -> Any:
    """Have the host's modules and this pack imported; the pack."""
    sys.argv = ["x", "--cpu"]
    sys.path.insert(0, str(tree))
    import comfy.options

    comfy.options.enable_args_parsing()
    import nodes  # noqa: F401

    spec = importlib.util.spec_from_file_location(PACK, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    assert spec is not None
    assert spec.loader is not None
    sys.modules[PACK] = pack = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pack)
    return pack


def part(name: str) -> Any:
    return importlib.import_module(f"{PACK}.{name}")


class Routes(logging.Handler):
    """What the log says of routes."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.getMessage().startswith("MODEL: steps are "):
            self.lines.append(record.getMessage().removeprefix("MODEL: steps are "))

    def taken(self) -> list[str]:
        lines, self.lines = self.lines, []
        return lines


class Bench:
    """The two MODELs, and what samples with them."""

    def __init__(self, folder: Path) -> None:
        import comfy.model_patcher
        import torch

        self.folder, self.torch = folder, torch
        self.routes = Routes()
        log = logging.getLogger(f"{PACK}.nodes.native_steps")
        log.setLevel(logging.INFO)
        log.addHandler(self.routes)
        (handle, _, self.ours, *_) = part("nodes").NODE_CLASS_MAPPINGS["VortexFluxLoader"]().load(
            "tiny-schnell", 6.5, "exact"
        )
        self.handle = handle
        self.engine = self.ours.model.vortex.engine
        flux = self._flux()
        self.theirs = comfy.model_patcher.ModelPatcher(flux, torch.device("cpu"), torch.device("cpu"))
        self.width, self.vec = self.engine.spec.flux.context, self.engine.spec.flux.vec

    def _flux(self) -> Any:
        """The host's Flux with the engine's weights, dequantized."""
        import comfy.model_detection
        import comfy.supported_models

        model = self.engine._painter.model
        weights = decoded(model.transformer) | decoded(model.modulation)
        hidden, context = weights["txt_in.weight"].shape
        config = comfy.model_detection.detect_unet_config(weights, "")
        config |= {"hidden_size": hidden, "num_heads": hidden // 128, "context_in_dim": context}
        config |= {"dtype": self.torch.float32}
        return comfy.supported_models.FluxSchnell(config).get_model({}).load_model_weights(weights)

    def text(self, seed: int, tokens: int = 256, **more: Any) -> Any:
        dice = self.torch.Generator().manual_seed(seed)
        txt = self.torch.randn(1, tokens, self.width, generator=dice) / 4
        return [[txt, {"pooled_output": self.torch.randn(1, self.vec, generator=dice), **more}]]

    def latent(self, batch: int = 1, seed: int | None = None) -> dict[str, Any]:
        if seed is None:
            return {"samples": self.torch.zeros(batch, 16, SIDE, SIDE)}
        dice = self.torch.Generator().manual_seed(seed)
        return {"samples": self.torch.randn(batch, 16, SIDE, SIDE, generator=dice)}

    def sample(
        self, model: Any, positive: Any = None, negative: Any = None, latent: Any = None, sampler: str = "euler",
        scheduler: str = "simple", steps: int = 4, cfg: float = 1.0, denoise: float = 1.0, seed: int = 1,
    ) -> Any:  # fmt: skip
        import nodes

        positive = self.text(0) if positive is None else positive
        negative = self.text(1) if negative is None else negative
        latent = self.latent() if latent is None else latent
        with self.torch.inference_mode():  # as the host runs its nodes
            (found,) = nodes.KSampler().sample(
                model, seed, steps, cfg, sampler, scheduler, positive, negative, latent, denoise
            )
        return found["samples"]

    def off(self, ours: Any, theirs: Any) -> float:
        return float((ours - theirs).norm() / theirs.norm())

    def both(self, change: Callable[[Any], Any] = lambda model: model, **options: Any) -> dict[str, Any]:
        """How far both are from each other, and the routes; `change` makes the clone that is sampled with."""
        theirs = self.sample(change(self.theirs), **options)
        self.routes.taken()
        ours = self.sample(change(self.ours), **options)
        return {"off": self.off(ours, theirs), "routes": self.routes.taken()}


def decoded(module: Any) -> dict[str, Any]:
    """All tensors of a module of the pack in fp32, NF4 decoded."""
    import torch

    nf4, linear = part("vortex_core.nf4"), part("vortex_core.quant.linear")
    tensors = {name: parameter.float() for name, parameter in module.named_parameters()}
    for name, inner in module.named_modules():
        if isinstance(inner, linear.NF4Linear):
            weight = nf4.NF4Weight(inner.packed, inner.absmax)
            tensors[f"{name}.weight"] = nf4.dequantize(weight, torch.float32)
            if inner.bias is not None:
                tensors[f"{name}.bias"] = inner.bias.float()
    return tensors


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
        "no pooled text": bench.both(positive=[[bench.text(2)[0][0], {}]]),
    }


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
            mine = {kind: [one if one is None else one.clone() for one in several] for kind, several in self.mine.items()}
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
    found["guided, batch"] = bench.both(positive=text, negative=with_control(bench, full), cfg=2.0, latent=bench.latent(2))
    found["after"] = bench.both()
    return found


# ---------------------------------------------------------------- LoRAs


def write_loras(bench: Bench) -> None:
    """Files of rank 4 that change every linear, as kohya (with alpha) and diffusers name them."""
    import folder_paths
    from safetensors.torch import load_file, save_file

    tiny = next((ROOT / "vortex_core/assets/tiny-schnell/transformer").glob("*.safetensors"))
    model = bench.engine._painter.model
    for file, weights in {"kohya": decoded(model.transformer) | decoded(model.modulation), "diffusers": load_file(tiny)}.items():
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


def words(act: Callable[[], Any]) -> str:
    """The type and the words of the error that `act` raises; empty where it raises none."""
    try:
        act()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def find(module: str, name: str) -> Any:
    """A node class of the host's extras; None where it has none."""
    try:
        return getattr(importlib.import_module(f"comfy_extras.{module}"), name, None)
    except ImportError:
        return None


def node(module: str, name: str, *inputs: Any) -> Any:
    """The first output of a node of the host's extras, in either of its two styles."""
    kind = find(module, name)
    if hasattr(kind, "define_schema"):
        return kind.execute(*inputs).args[0]
    return getattr(kind(), kind.FUNCTION)(*inputs)[0]


def main(folder: Path, tree: Path, only: list[str]) -> None:
    start(tree)
    bench = Bench(folder)
    cases = {name.removeprefix("case_"): case for name, case in globals().items() if name.startswith("case_")}
    figures: dict[str, Any] = {}
    for name, case in cases.items():
        if only and name not in only:
            continue
        try:
            figures[name] = case(bench)
        except Exception:
            figures[name] = {"error": traceback.format_exc()}
        bench.routes.taken()
    (folder / "figures.json").write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
