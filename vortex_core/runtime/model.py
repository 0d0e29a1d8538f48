"""All of FLUX as modules on `meta`, cut into the groups that the planner places, and what drawing with them takes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from math import prod

import torch
from torch import nn

from ..device.streams import streams_of
from ..flux1 import sampling
from ..flux1.conditioning import Modulation
from ..flux1.spec import MAX_STEPS, T5_TOKENS, ModelSpec
from ..flux1.strips import DecoderLayout
from ..flux1.text_encoders import T5, Clip
from ..flux1.transformer import Transformer
from ..flux1.vae import Decoder, library_bytes
from ..kernels import reference
from ..memory.arena import Shape, aligned, laid_out, round_up
from ..memory.offload import WeightGroup
from ..memory.planner import BLOCKS, SLACK, MemoryRequirements, StepRequirements, WeightGroupSize
from ..nf4 import DEQUANTIZE_BYTES
from ..quant.backends import Backend
from ..quant.linear import NF4Linear
from ..storage.materialize import Target, check, materialize, pack
from ..storage.tensors import Tensors
from .graphs import POOL, attention_bytes, inputs, step_bytes

Sources = Mapping[str, Tensors]  # the canonical tensors of `transformer`, `clip`, `t5` and `vae`
Origin = tuple[str, str]  # the source of a module's tensors, and the prefix of their names there

META = torch.device("meta")
KINDS = ("double_blocks", "single_blocks")
MOST_AT_ONCE = 8  # pictures; more fill the card no better
STRIPS = (None, 256, 128, 64)  # most rows of a strip of the VAE, None: whole; the lower, the more launches
TALL = 700_000_000  # bytes; what decoding may take before it is cut into lower strips


class Model:
    """The modules of one FLUX.1-schnell; `groups` of them in the order they run, `sizes` as the planner sees those.

    Products are in `dtype`, linears in NF4 where there is a `backend`; the blocks' products in fp8 where `fast`, their
    attention where `fp8_attention`. `fused`: with Triton's kernels, which allocate nothing in a step that is captured.
    """

    def __init__(
        self,
        spec: ModelSpec,
        dtype: torch.dtype,
        backend: Backend | None,
        *,
        fast: bool = False,
        fp8_attention: bool = False,
        fused: bool = False,
    ) -> None:
        self.flux, self.vae, self.dtype = spec.flux, spec.vae, dtype
        self.fast, self.fp8_attention, self.fused = fast, fp8_attention, fused
        self.decodes_fused = fused and self.vae.powers_of_two
        self.clip, self.t5 = Clip(spec.clip), T5(spec.t5)
        with META:
            self.transformer, self.modulation = Transformer(self.flux), Modulation(self.flux)
            self.decoder = Decoder(self.vae)
        # all as it will be, but on `meta`, so that it can be measured; CLIP and the VAE are small, and stay as they are
        packed = ((self.transformer, ""), (self.modulation, ""), *self.t5.modules)
        for module in (*(module for module, _ in packed), *self.clip.groups, self.clip.norm, self.decoder):
            module.to(dtype)
        if backend is not None:
            for module, prefix in packed:
                pack(module, prefix, backend)
        for linear in self.transformer.linears() if fast else ():
            linear.prepare_fp8()
        self.origins: dict[str, tuple[Origin, ...]] = {}
        self.groups = list(self._groups())
        self.sizes = tuple(WeightGroupSize(group.name, group.part, group.measure()) for group in self.groups)
        self.scratch = self._scratch()
        self._plain = DEQUANTIZE_BYTES if self.scratch and not fused else 0  # what plain torch allocates for that
        # many small tensors come and go there, and cudaMallocAsync leaves up to 0.17 GB between them (H200)
        self._slack = SLACK if fused else SLACK + 5 * POOL
        self._known: dict[tuple[int, ...], MemoryRequirements] = {}

    def _scratch(self) -> tuple[int, ...]:
        """Bytes of the buffers that weights are decoded into; in `fast` one more, for the text."""

        def most(*modules: nn.Module) -> int:  # values of a weight
            parts = (part for module in modules for part in module.modules())
            return max((prod(part.shape) for part in parts if isinstance(part, NF4Linear)), default=0)

        size = self.dtype.itemsize
        blocks, prompt = most(self.transformer), most(self.modulation, *self.t5.groups)
        text = self.flux.hidden * self.flux.mlp  # values; the largest of a double block's text, in 8 bits
        sizes = (max(blocks, prompt * size), text) if self.fast else (max(blocks, prompt) * size,)
        return tuple(aligned(nbytes) for nbytes in sizes if nbytes)

    def _groups(self) -> Iterator[WeightGroup]:
        transformer, modulation = self.transformer, self.modulation
        embedders: dict[Origin, nn.Module] = {
            ("transformer", "img_in."): transformer.img_in,
            ("transformer", "txt_in."): transformer.txt_in,
            ("transformer", "final_layer."): transformer.final_layer,
            ("transformer", "time_in."): modulation.time_in,
            ("transformer", "vector_in."): modulation.vector_in,
            ("clip", "final_layer_norm."): self.clip.norm,
            ("t5", "encoder.final_layer_norm."): self.t5.norm,
        }
        yield self._group("embedders", "embedders", embedders)
        yield self._group("vae", "vae", {("vae", ""): self.decoder})
        layers = (("t5", "encoder.block", self.t5.groups), ("clip", "encoder.layers", self.clip.groups))
        for encoder, path, groups in layers:
            for i, layer in enumerate(groups):
                yield self._group(f"{encoder}.{i}", encoder, {(encoder, f"{path}.{i}."): layer})
        blocks = [f"{kind}.{i}" for kind in KINDS for i in range(len(getattr(transformer, kind)))]
        for i, path in enumerate([*blocks, "final_layer"]):
            part = modulation.get_submodule(path)
            yield self._group(f"modulation.{i}", "modulation", {("transformer", f"{path}."): part})
        for path in blocks:
            yield self._group(path, BLOCKS, {("transformer", f"{path}."): transformer.get_submodule(path)})

    def _group(self, name: str, part: str, modules: Mapping[Origin, nn.Module]) -> WeightGroup:
        self.origins[name] = tuple(modules)
        return WeightGroup(name, part, *modules.values())

    def check(self, sources: Sources) -> int:
        """Compare every part with its source's headers; the bytes to read. Raises `VortexCheckpointError`."""
        plain = ((self.transformer, "transformer"), (self.modulation, "transformer"), (self.decoder, "vae"))
        encoders = self.clip.check(sources["clip"]) + self.t5.check(sources["t5"])
        return encoders + sum(check(module, sources[kind]) for module, kind in plain)

    def read(self, group: WeightGroup, sources: Sources, target: Target) -> None:
        """Fill a group's modules on `target.device`."""
        for module, (source, prefix) in zip(group.modules, self.origins[group.name], strict=True):
            materialize(module, sources[source], target, prefix=prefix)
        if group.part == "vae":
            self.decoder.channels_last()

    def streams(self, device: torch.device) -> tuple[torch.cuda.Stream, ...]:
        """The streams that products run on besides the default one: captured steps', and in `fast` the text's."""
        streams = streams_of(device)
        if streams is None or not self.fused:
            return ()
        return (streams.capture, streams.side) if self.fast else (streams.capture,)

    def call_inputs(self, height: int, width: int, tokens: int) -> dict[str, Shape]:
        """Shapes and types of what steps of a call read besides latents: text, modulation of all steps, positions."""
        flux, dtype = self.flux, self.dtype
        given = inputs(flux, (1, tokens, sampling.image_tokens(height, width)), dtype)
        del given["img"]  # of each slice, in a place of its own
        embeddings, table = (1, tokens, flux.context), (MAX_STEPS, *given["modulation"][0])
        return {**given, "embeddings": (embeddings, dtype), "modulation": (table, dtype)}

    def requirements(
        self, height: int, width: int, batch: int, tokens: int = T5_TOKENS, blas: int = 0
    ) -> MemoryRequirements:
        """What one request takes besides weights; `tokens` of text, `blas` bytes of cuBLAS' workspaces."""
        key = (height, width, batch, tokens, blas)
        if key in self._known:  # every picture asks
            return self._known[key]
        at_once = sorted({min(MOST_AT_ONCE, -(-batch // parts)) for parts in (1, 2, 4, 8, batch)}, reverse=True)
        latent = (height // 8, width // 8)
        rows, decode = self._decoding(*latent)
        decoder = library_bytes(self.vae, *latent, self.dtype, fused=self.decodes_fused)
        self._known[key] = MemoryRequirements(
            height,
            width,
            batch,
            scratch=sum(self.scratch),
            steps=tuple(self._steps(height, width, tokens, number) for number in at_once),
            decode=decode,
            rows=rows,
            # noise and later clean latents, what steps move, and what they predict
            latents=3 * aligned(batch * self.flux.latent_channels * prod(latent) * 4),
            library=max(self.t5.working_bytes + self._plain, decoder),
            blas=blas,
            slack=self._slack,
        )
        return self._known[key]

    def prompt_requirements(self, blas: int = 0) -> MemoryRequirements:
        """What a prompt takes without a picture."""
        library = self.t5.working_bytes + self._plain
        return MemoryRequirements(0, 0, 0, sum(self.scratch), library=library, blas=blas, slack=self._slack)

    def decode_requirements(self, height: int, width: int, batch: int, blas: int = 0) -> MemoryRequirements:
        """What decoding takes of latents `[batch, 16, height, width]` made elsewhere."""
        asked = self.requirements(8 * height, 8 * width, batch, blas=blas)
        return replace(asked, scratch=0, steps=(StepRequirements(1),))

    def _steps(self, height: int, width: int, tokens: int, batch: int) -> StepRequirements:
        size = (batch, tokens, sampling.image_tokens(height, width))
        attention = 0 if self.fp8_attention else attention_bytes(self.flux, size, self.dtype)
        return StepRequirements(
            batch,
            buffers=step_bytes(self.flux, size, self.dtype, fast=self.fast)
            + laid_out(self.call_inputs(height, width, tokens).values()),
            library=attention if self.fused else attention + reference.step_bytes(self.flux.hidden) + self._plain,
            graph=round_up(attention, POOL) if self.fused else 0,
        )

    def _decoding(self, height: int, width: int) -> tuple[int | None, int]:
        """Rows of the strips that latents of this size are decoded in, and what that lays out."""
        for rows in STRIPS:
            nbytes = DecoderLayout(self.vae, height, width, rows, self.dtype).nbytes
            if nbytes <= TALL:
                break
        return rows, nbytes
