"""What is tried with the node Vortex NAG inside a ComfyUI tree; see model_by_comfyui.py."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

from model_by_comfyui import part, words
from model_patch_cases import replaced

if TYPE_CHECKING:
    from model_by_comfyui import Bench

TERMS = (5.0, 1.5, 0.5)


def led(bench: Bench, model: Any) -> Any:
    (made,) = part("nodes").NODE_CLASS_MAPPINGS["VortexNAG"]().apply(model, bench.text(2), *TERMS)
    return made


def by_hand(bench: Bench, cfg: float) -> Any:
    """Euler's steps over `Engine.velocity`; the uncond of CFG is not led."""
    engine, texts = bench.engine, [bench.text(number) for number in range(3)]
    wanted, uncond, avoided = (engine.condition(text[0][0], text[0][1]["pooled_output"]) for text in texts)
    nag = part("vortex_core.flux1.nag").Nag(*TERMS)
    noise = bench.torch.randn(1, 16, 16, 16, generator=bench.torch.Generator().manual_seed(1))
    latents, sigmas = noise, (1.0, 0.75, 0.5, 0.25, 0.0)
    for sigma, following in pairwise(sigmas):
        velocity = engine.velocity(latents, sigma, wanted, negative=avoided, nag=nag)
        if cfg != 1:
            plain = engine.velocity(latents, sigma, uncond)
            velocity = plain + cfg * (velocity - plain)
        latents = latents + (following - sigma) * velocity
    return part("nodes.host").to_native(latents)


def case_vortex_nag(bench: Bench) -> dict[str, Any]:
    plain = bench.sample(bench.ours)
    found: dict[str, Any] = {}
    for name, cfg in {"alone": 1.0, "with CFG": 2.0}.items():
        bench.routes.taken()
        drawn = bench.sample(led(bench, bench.ours), cfg=cfg)
        found[name] = {"off": bench.off(drawn, by_hand(bench, cfg)), "routes": bench.routes.taken()}
    batch = bench.sample(led(bench, bench.ours), latent=bench.latent(2))
    alone = bench.sample(led(bench, bench.ours))
    return found | {
        "effect": bench.off(alone, plain),
        "batch": bench.off(batch[:1], alone),
        "of a clone": bench.off(bench.sample(led(bench, bench.ours).clone()), alone),
        "after": bench.off(bench.sample(bench.ours), plain),
        "eager": words(lambda: bench.sample(replaced(led(bench, bench.ours)))),
        "another model": words(lambda: led(bench, bench.theirs)),
    }
