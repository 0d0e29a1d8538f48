"""All of FLUX as modules on `meta`, cut into the units that the planner places, and what drawing with them takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import nf4, sampling
from .allocator import MIB
from .checkpoint.materialize import Target, check, is_quantized, materialize
from .checkpoint.tensors import Tensors
from .conditioning import Modulation
from .footprint import META, footprint
from .kernels import Kernels, shapes
from .linear import Backend, NF4Linear
from .nf4 import BLOCK, NF4Weight
from .planner import BLOCKS, Demand, Piece
from .plans import Plan, Velocity, graph_bytes, plan_bytes
from .residency import Unit, aligned
from .spec import MAX_STEPS, T5_TOKENS, FluxSpec, VaeSpec
from .text import T5, Clip
from .transformer import Rope, Transformer
from .vae import Decoder, decode

Sources = Mapping[str, Tensors]  # the canonical tensors of `transformer`, `clip`, `t5` and `vae`
Origin = tuple[str, str]  # the source of a module's tensors, and the prefix of their names there

BLAS = 32 * MIB  # cuBLAS' workspace on Hopper; earlier cards take 8 MiB
MOST_AT_ONCE = 8  # pictures; more fill the card no better
STRIPS = (None, 256, 128, 64)  # most rows of a strip of the VAE, None: whole; the lower, the more launches
TALL = 750_000_000  # bytes; what decoding may take, even where nothing else takes as much


class Model:
    """The modules of one FLUX.1-schnell; `units` of them in the order they run, `pieces` as the planner sees those.

    Products are in `dtype`, linears in NF4 where `quantized`; the blocks' products in fp8 where `fast`, and their
    attention where `fp8_attention`. `fused`: with Triton's kernels, which allocate nothing in a step, and a step that
    is captured.
    """

    def __init__(
        self,
        flux: FluxSpec,
        vae: VaeSpec,
        clip: Mapping[str, Any],
        t5: Mapping[str, Any],
        dtype: torch.dtype,
        *,
        quantized: bool,
        fast: bool = False,
        fp8_attention: bool = False,
        fused: bool = False,
    ) -> None:
        self.flux, self.vae, self.dtype, self.quantized = flux, vae, dtype, quantized
        self.fast, self.fp8_attention, self.fused = fast, fp8_attention, fused
        self.decodes_fused = fused and vae.powers_of_two
        self.clip, self.t5 = Clip(clip), T5(t5)
        with META:
            self.transformer, self.modulation, self.decoder = Transformer(flux), Modulation(flux), Decoder(vae)
        self.origins: dict[str, tuple[Origin, ...]] = {}
        self.units = list(self._units())
        self.pieces = tuple(Piece(unit.name, unit.group, self._nbytes(unit)) for unit in self.units)
        linears = (part for unit in self.units for module in unit.modules for part in module.modules())
        self.largest_linear = max(part.weight.numel() for part in linears if isinstance(part, nn.Linear))  # values
        self.text_linear = flux.hidden * flux.mlp  # values; the largest of a double block's
        self._footprints: dict[tuple[str | int | None, ...], int] = {}

    def _units(self) -> Iterator[Unit]:
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
        yield self._unit("embedders", "embedders", embedders)
        yield self._unit("vae", "vae", {("vae", ""): self.decoder})
        for i, block in enumerate(self.t5.units):
            yield self._unit(f"t5.{i}", "t5", {("t5", f"encoder.block.{i}."): block})
        for i, layer in enumerate(self.clip.units):
            yield self._unit(f"clip.{i}", "clip", {("clip", f"encoder.layers.{i}."): layer})
        for i, part in enumerate(modulation.double_blocks):
            yield self._unit(f"modulation.{i}", "modulation", {("transformer", f"double_blocks.{i}."): part})
        doubles = len(modulation.double_blocks)
        for i, part in enumerate(modulation.single_blocks):
            yield self._unit(f"modulation.{doubles + i}", "modulation", {("transformer", f"single_blocks.{i}."): part})
        yield self._unit("modulation.final", "modulation", {("transformer", "final_layer."): modulation.final_layer})
        for kind in ("double_blocks", "single_blocks"):
            for i, block in enumerate(getattr(transformer, kind)):
                yield self._unit(f"{kind}.{i}", BLOCKS, {("transformer", f"{kind}.{i}."): block})

    def _unit(self, name: str, group: str, modules: Mapping[Origin, nn.Module]) -> Unit:
        self.origins[name] = tuple(modules)
        return Unit(name, group, *modules.values())

    def check(self, sources: Sources) -> int:
        """Compare every part with its source's headers; the bytes to read. Raises `VortexCheckpointError`."""
        return (
            self.clip.check(sources["clip"])
            + self.t5.check(sources["t5"])
            + sum(check(module, sources["transformer"]) for module in (self.transformer, self.modulation))
            + check(self.decoder, sources["vae"])
        )

    def read(self, unit: Unit, sources: Sources, target: Target) -> None:
        """Fill a unit's modules on `target.device`."""
        for module, (source, prefix) in zip(unit.modules, self.origins[unit.name], strict=True):
            # CLIP and the VAE are small, and stay as they are
            how = target if source in ("transformer", "t5") else replace(target, backend=None)
            materialize(module, sources[source], how, prefix=prefix)
        if self.decodes_fused and unit.group == "vae":
            self.decoder.channels_last()
        if self.fast and unit.group == BLOCKS:
            for linear in (part for module in unit.modules for part in module.modules()):
                if isinstance(linear, NF4Linear):
                    linear.prepare_fp8()

    def _nbytes(self, unit: Unit) -> int:
        size, total = self.dtype.itemsize, 0
        for module, (source, prefix) in zip(unit.modules, self.origins[unit.name], strict=True):
            quantized = self.quantized and source in ("transformer", "t5")
            packed = {
                f"{path}.weight".lstrip(".")
                for path, part in module.named_modules()
                if quantized and is_quantized(part, prefix + path)
            }
            for name, parameter in module.named_parameters():
                values = parameter.numel()
                if name in packed:
                    total += aligned(values // 2) + aligned(values // BLOCK * 4)
                    if self.fast and unit.group == BLOCKS:
                        total += aligned(parameter.shape[0] * 4)  # a scale for each row
                else:
                    total += aligned(values * size)
        return total

    def demand(
        self, height: int, width: int, batch: int, tokens: int = T5_TOKENS, backend: Backend | None = None
    ) -> Demand:
        """What one request takes besides weights; `tokens` of text."""
        fixed, decoding = self._buffers(backend)
        slices = sorted({min(MOST_AT_ONCE, -(-batch // parts)) for parts in (1, 2, 4, 8, batch)}, reverse=True)
        steps = tuple(
            (number, decoding + self._remember(self._steps, height, width, tokens, number)) for number in slices
        )
        graphs: tuple[tuple[int, int], ...] = ()
        if self.fused:
            sizes = {number: (number, tokens, sampling.image_tokens(height, width)) for number in slices}
            graphs = tuple(
                (number, graph_bytes(self.flux, size, self.dtype, fp8_attention=self.fp8_attention))
                for number, size in sizes.items()
            )
        # with its encoders streaming, whether they do or not: the height of strips is to depend on sizes alone
        prompt = self.t5.working_bytes + decoding
        room = max(TALL, steps[-1][1], prompt + 2 * max(piece.nbytes for piece in self.pieces if piece.group == "t5"))
        for rows in STRIPS:
            decode = self._remember(self._decode, height, width, rows)
            if decode <= room:
                break
        # noise, latents, velocity and clean latents, fp32
        latents = 4 * batch * self.flux.latent_channels * (height // 8) * (width // 8) * 4
        return Demand(height, width, batch, prompt, steps, decode, rows, latents, fixed, graphs)

    def prompt_demand(self, backend: Backend | None = None) -> Demand:
        """What a prompt takes without a picture."""
        fixed, decoding = self._buffers(backend)
        return Demand(0, 0, 0, self.t5.working_bytes + decoding, ((1, 0),), 0, None, fixed=fixed)

    def _buffers(self, backend: Backend | None) -> tuple[tuple[int, ...], int]:
        """Buffers that are always there, and what decoding a weight takes for a moment."""
        # one more for the stream that graphs are captured on, and one for that of the text
        blas = (BLAS,) * (1 + self.fused + self.fast)
        if not self.quantized:
            return blas, 0
        if backend is None or backend.name in ("triton", "bitsandbytes"):
            text = (self.text_linear,) if self.fast else ()  # in fp8
            return (*blas, self.largest_linear * self.dtype.itemsize, *text), 0
        return blas, self._remember(self._decoding)

    def _remember(self, measure: Callable[..., int], *sizes: int | None) -> int:
        key = (measure.__name__, *sizes)
        if key not in self._footprints:
            with torch.inference_mode(False):
                self._footprints[key] = measure(*sizes)
        return self._footprints[key]

    def _steps(self, height: int, width: int, tokens: int, batch: int) -> int:
        """Of the steps: two blocks of each kind, since all blocks of a kind take the same."""
        few = {kind: min(2, getattr(self.flux, kind)) for kind in ("double_blocks", "single_blocks")}
        with META:
            transformer = Transformer(replace(self.flux, **few)).to(self.dtype).requires_grad_(False)

        def steps() -> None:
            with META:
                count = sampling.image_tokens(height, width)
                img = torch.empty(batch, count, self.flux.in_channels)
                txt = torch.empty(1, tokens, self.flux.context, dtype=self.dtype)
                table = torch.empty(MAX_STEPS, self.flux.modulation_rows, self.flux.hidden, dtype=self.dtype)
                cos, sin = (torch.empty(tokens + count, self.flux.head_dim // 2) for _ in range(2))
                size = (batch, tokens, count)
                buffer = torch.empty(plan_bytes(self.flux, size, self.dtype, fast=self.fast), dtype=torch.uint8)
            txt = transformer.txt_in(txt)
            velocity = self._attention(size) if self.fused else Plan(transformer, size, buffer)
            rows = transformer.spec.modulation_rows
            sampling.denoise(velocity, img, txt, table[:2, :rows], (cos, sin))
            sampling.unpack(img, height, width).contiguous()

        return footprint(steps)

    def _attention(self, size: tuple[int, int, int]) -> Velocity:
        """A step's own allocations where kernels are fused: the library's attention."""
        batch, txt_tokens, img_tokens = size

        def velocity(img: Tensor, txt: Tensor, modulation: Tensor, pe: Rope) -> Tensor:
            if self.fp8_attention:
                return img
            q = torch.empty(batch, self.flux.heads, 1, self.flux.head_dim, dtype=self.dtype, device=META)
            q = q.expand(-1, -1, txt_tokens + img_tokens, -1)
            F.scaled_dot_product_attention(q, q, q)
            return img

        return velocity

    def _decode(self, height: int, width: int, rows: int | None) -> int:
        with META:
            decoder = Decoder(self.vae).to(self.dtype).requires_grad_(False)
            if self.decodes_fused:
                decoder.channels_last()
                decoder.use(cast(Kernels, shapes))
            latents = torch.empty(1, self.flux.latent_channels, height // 8, width // 8)
            out = torch.empty(1, height, width, 3)
        return footprint(lambda: decode(decoder, latents, out, rows))

    def _decoding(self) -> int:
        """Of decoding the largest weight in plain torch."""
        n, k = self.largest_linear // BLOCK, BLOCK
        with META:
            weight = NF4Weight(torch.empty(n, k // 2, dtype=torch.uint8), torch.empty(n, k // BLOCK))
        return footprint(lambda: nf4.dequantize(weight, self.dtype))
