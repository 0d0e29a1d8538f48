"""Vortex and its peers as contenders: diffusers and ComfyUI draw with the same weights, in the way of their users.

A contender draws one job again and again, and is alone on the device meanwhile.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from ..checkpoint.key_maps import SWAPPED, flux_sources
from ..flux1 import sampling
from ..flux1.conditioning import Conditioning
from ..flux1.schedule import timesteps
from ..flux1.spec import DEFAULT_STEPS
from ..nf4 import BLOCK, LEVELS, NF4Weight
from ..quant.linear import NF4Linear
from ..utils.timing import mark

if TYPE_CHECKING:
    from diffusers import FluxPipeline, FluxTransformer2DModel

    from ..runtime.engine import Engine

Velocity = Callable[["Job", Tensor, Tensor], Tensor]  # (job, packed latents [1, S, 64], t [1]) to [1, S, 64]


@dataclass(frozen=True, slots=True, eq=False)
class Job:
    """One picture: noise `[1, 16, H/8, W/8]` in fp32, T5 embeddings `[1, N, context]`, CLIP's pooled `[1, vec]`."""

    height: int
    width: int
    noise: Tensor
    txt: Tensor
    pooled: Tensor


class Contender(Protocol):
    """Draws pictures. Each phase ends with `timing.mark`: `step 1` to `step 4`, `decode`."""

    def draw(self, job: Job) -> Tensor:
        """The picture in 0..1 on the device."""
        ...

    def latents(self, job: Job) -> Tensor:
        """The clean latents `[1, 16, H/8, W/8]` that `draw` decodes."""
        ...


class Vortex:
    """The engine with a cached prompt, as when a user tries another seed."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._cache: dict[Job, Conditioning] = {}

    def draw(self, job: Job, **options: Any) -> Tensor:
        """See `Contender.draw`. `options` go to `Engine.generate`."""
        if job not in self._cache:
            self._cache[job] = self.engine.condition(job.txt, job.pooled)
        return self.engine.generate(self._cache[job], seed=0, height=job.height, width=job.width, **options)

    def latents(self, job: Job) -> Tensor:
        """See `Contender.latents`."""
        seen: list[Tensor] = []
        self.draw(job, on_step=lambda i, n, clean: seen.append(clean.clone()))
        return seen[-1]


class Diffusers:
    """`FluxPipeline` with given embeddings, so that it does not encode the prompt again."""

    def __init__(self, pipe: FluxPipeline, *, compiled: bool = False) -> None:
        self._pipe = pipe
        pipe.set_progress_bar_config(disable=True)
        if compiled:
            pipe.transformer.compile_repeated_blocks(fullgraph=True)

    def draw(self, job: Job) -> Tensor:
        """See `Contender.draw`."""
        picture = self._run(job, "pt")
        mark("decode")
        return picture

    def latents(self, job: Job) -> Tensor:
        """See `Contender.latents`."""
        return sampling.unpack(self._run(job, "latent"), job.height, job.width)

    def _run(self, job: Job, output: str) -> Tensor:
        def stepped(pipe: object, i: int, t: object, values: dict[str, Any]) -> dict[str, Any]:
            mark(f"step {i + 1}")
            return values

        dtype = self._pipe.vae.dtype
        return self._pipe(
            prompt_embeds=job.txt.to(dtype),
            pooled_prompt_embeds=job.pooled.to(dtype),
            height=job.height,
            width=job.width,
            num_inference_steps=DEFAULT_STEPS,
            guidance_scale=0.0,
            latents=sampling.pack(job.noise).to(job.txt.device, dtype),
            output_type=output,
            callback_on_step_end=stepped,
        ).images


class Looped:
    """A peer's transformer with the four Euler steps around it and a diffusers VAE; `graphed` replays a CUDA graph."""

    def __init__(self, velocity: Velocity, vae: Any, *, graphed: bool = False) -> None:
        self._velocity, self._vae, self._graphed = velocity, vae, graphed
        self._graphs: dict[Job, tuple[torch.cuda.CUDAGraph, Tensor, Tensor, Tensor]] = {}

    def draw(self, job: Job) -> Tensor:
        """See `Contender.draw`."""
        latents = self.latents(job).to(job.txt.dtype)
        scaled = latents / self._vae.config.scaling_factor + self._vae.config.shift_factor
        picture = self._vae.decode(scaled).sample.float().mul(0.5).add(0.5).clamp(0, 1)
        mark("decode")
        return picture

    def latents(self, job: Job) -> Tensor:
        """See `Contender.latents`."""
        img = sampling.pack(job.noise).to(job.txt.device)
        for i, (now, following) in enumerate(pairwise(timesteps(DEFAULT_STEPS))):
            given = img.to(job.txt.dtype)
            img = img + (following - now) * self._step(job, given, torch.full((1,), now).to(given)).float()
            mark(f"step {i + 1}")
        return sampling.unpack(img, job.height, job.width)

    def _step(self, job: Job, img: Tensor, t: Tensor) -> Tensor:
        if not self._graphed:
            return self._velocity(job, img, t)
        if job not in self._graphs:
            self._velocity(job, img, t)
            torch.cuda.synchronize()
            graph, given, at = torch.cuda.CUDAGraph(), img.clone(), t.clone()
            with torch.cuda.graph(graph):
                velocity = self._velocity(job, given, at)
            self._graphs[job] = (graph, given, at, velocity)
        graph, given, at, velocity = self._graphs[job]
        given.copy_(img)
        at.copy_(t)
        graph.replay()
        return velocity


def diffusers_velocity(transformer: FluxTransformer2DModel) -> Velocity:
    """The velocity of a diffusers transformer."""
    ids: dict[tuple[int, int], Tensor] = {}

    def velocity(job: Job, img: Tensor, t: Tensor) -> Tensor:
        size = (job.height, job.width)
        if size not in ids:
            ids[size] = sampling.positions(*size, job.txt.shape[1]).to(img.device)
        return transformer(
            hidden_states=img,
            encoder_hidden_states=job.txt,
            pooled_projections=job.pooled,
            timestep=t,
            txt_ids=ids[size][: job.txt.shape[1]],
            img_ids=ids[size][job.txt.shape[1] :],
            return_dict=False,
        )[0]

    return velocity


def nf4_transformer(
    config: dict[str, Any], weights: dict[str, NF4Weight | Tensor], device: torch.device, dtype: torch.dtype
) -> FluxTransformer2DModel:
    """diffusers' transformer with bitsandbytes' `Linear4bit` over `weights`, by diffusers' names, on `device`."""
    from bitsandbytes.functional import QuantState
    from bitsandbytes.nn import Linear4bit, Params4bit
    from diffusers import FluxTransformer2DModel

    with torch.device("meta"):
        model = FluxTransformer2DModel.from_config(config)
    code = torch.tensor(LEVELS, device=device)
    for path, child in list(model.named_modules()):
        weight = weights.get(f"{path}.weight")
        if isinstance(child, nn.Linear) and isinstance(weight, NF4Weight):
            linear = Linear4bit(
                child.in_features, child.out_features, child.bias is not None, dtype, False, "nf4", device="meta"
            )
            state = QuantState(weight.absmax.to(device).view(-1), torch.Size(weight.shape), code, BLOCK, "nf4", dtype)
            linear.weight = Params4bit(
                weight.packed.to(device).view(-1, 1), False, state, BLOCK, False, "nf4", module=linear,
                bnb_quantized=True,
            )  # fmt: skip
            model.set_submodule(path, linear)
    for path, parameter in list(model.named_parameters()):
        if parameter.is_meta:
            owner = model.get_submodule(path.rpartition(".")[0])
            value = weights[path]
            assert isinstance(value, Tensor)
            setattr(owner, path.rpartition(".")[2], nn.Parameter(value.to(device, dtype), requires_grad=False))
    return model.eval()


def diffusers_weights(modules: list[nn.Module], rows: dict[str, int]) -> dict[str, NF4Weight | Tensor]:
    """Vortex's transformer in host memory, by diffusers' names, with fused matrices cut into diffusers' `rows`."""
    weights: dict[str, NF4Weight | Tensor] = {}
    for module in modules:
        tensors: dict[str, NF4Weight | Tensor] = dict(module.named_parameters())
        for path, part in module.named_modules():
            if isinstance(part, NF4Linear):
                tensors[f"{path}.weight"] = NF4Weight(part.packed, part.absmax)
                if part.bias is not None:
                    tensors[f"{path}.bias"] = part.bias
        for name, tensor in tensors.items():
            sources = flux_sources(name)
            sizes = [rows[source] for source in sources]
            swapped = name.startswith(SWAPPED)
            if isinstance(tensor, NF4Weight):
                pieces = zip(tensor.packed.cpu().split(sizes), tensor.absmax.cpu().split(sizes), strict=True)
                parts: list[NF4Weight | Tensor] = [NF4Weight(*_swap(piece, swapped)) for piece in pieces]
            else:
                parts = [_swap((piece,), swapped)[0] for piece in tensor.cpu().split(sizes)]
            weights.update(zip(sources, parts, strict=True))
    return weights


def _swap(tensors: tuple[Tensor, ...], swapped: bool) -> list[Tensor]:
    return [torch.cat(t.chunk(2)[::-1]) if swapped else t for t in tensors]


def comfy_module(tree: Path, name: str) -> Any:
    """A module of the user's ComfyUI `tree`, by name: Vortex itself never imports ComfyUI."""
    if str(tree) not in sys.path:
        sys.path.insert(0, str(tree))
    if not torch.cuda.is_available():
        import_module("comfy.cli_args").args.cpu = True  # its memory manager looks for a GPU as it is imported
    return import_module(name)


def comfy_flux(tree: Path, config: dict[str, Any], operations: Any, device: torch.device | None = None) -> nn.Module:
    """ComfyUI's own Flux, from `tree`, in bf16, without weights; `config` is diffusers'."""
    flux = comfy_module(tree, "comfy.ldm.flux.model")
    heads = config["num_attention_heads"]
    newer: dict[str, Any] = {"txt_ids_dims": []}  # arguments that only newer versions know
    known = {field.name for field in fields(flux.FluxParams)}
    return flux.Flux(
        **{name: value for name, value in newer.items() if name in known},
        in_channels=config["in_channels"] // 4, out_channels=config["in_channels"] // 4, patch_size=2,
        vec_in_dim=config["pooled_projection_dim"], context_in_dim=config["joint_attention_dim"],
        hidden_size=heads * config["attention_head_dim"], mlp_ratio=4.0, num_heads=heads,
        depth=config["num_layers"], depth_single_blocks=config["num_single_layers"],
        axes_dim=list(config["axes_dims_rope"]), theta=10_000, qkv_bias=True, guidance_embed=False,
        dtype=torch.bfloat16, device=device, operations=operations,
    )  # fmt: skip


def flux_velocity(model: nn.Module) -> Velocity:
    """The velocity of ComfyUI's Flux."""

    def velocity(job: Job, img: Tensor, t: Tensor) -> Tensor:
        latents = sampling.unpack(img, job.height, job.width)
        return sampling.pack(model(latents, t, job.txt, job.pooled, guidance=None))

    return velocity


def comfy_velocity(tree: Path, config: dict[str, Any], state: dict[str, Tensor], device: torch.device) -> Velocity:
    """The velocity of ComfyUI's own Flux forward, from `tree`, in bf16 over diffusers' `state`."""
    with torch.device("meta"):
        model = comfy_flux(tree, config, comfy_module(tree, "comfy.ops").disable_weight_init)
    for name, parameter in list(model.named_parameters()):
        owner = model.get_submodule(name.rpartition(".")[0])
        tensor = flux_tensor(state, name).to(device, torch.bfloat16).view(parameter.shape)
        setattr(owner, name.rpartition(".")[2], nn.Parameter(tensor, requires_grad=False))
    return flux_velocity(model)


def flux_tensor(state: dict[str, Tensor], name: str) -> Tensor:
    """A tensor of ComfyUI's Flux by its `name` there, from diffusers' `state`."""
    pieces = tuple(state[source] for source in flux_sources(name))
    return torch.cat(_swap(pieces, name.startswith(SWAPPED)))
