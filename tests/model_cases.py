"""What is tried with the pack's MODEL inside a ComfyUI tree; see model_by_comfyui.py."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from model_by_comfyui import SIDE, find, node, part, words
from model_patch_cases import replaced, with_loras, write_loras

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


def case_freed(bench: Bench) -> dict[str, Any]:
    """Without its patchers the host's model is gone at once: the host takes one that waits for Python for a leak."""
    import gc
    import weakref

    engines = part("nodes.engines")
    loader = part("nodes").NODE_CLASS_MAPPINGS["VortexFluxLoader"]()
    handle, vae, model, clip = loader.load("tiny-schnell", 6.5, "fast")
    bench.sample(replaced(model), positive=clip.encode_from_tokens_scheduled(clip.tokenize("a red circle")))
    found = [weakref.ref(model.model), weakref.ref(clip.cond_stage_model)]
    gc.disable()
    try:
        engines._unload(handle.key)
        kept = [one() is not None for one in found]
        del model, clip, vae
        return {"while there are any": kept, "later": [one() is not None for one in found]}
    finally:
        gc.enable()


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
