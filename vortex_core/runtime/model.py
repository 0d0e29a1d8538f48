"""All of FLUX as modules on `meta`, in the groups that the planner places, and the memory that drawing takes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from math import prod

import torch
from torch import nn

from ..checkpoint.key_maps import ENCODER
from ..checkpoint.write import Named
from ..device.streams import Streams
from ..errors import VortexCheckpointError
from ..flux1 import sampling
from ..flux1.conditioning import Modulation
from ..flux1.decoder_memory import DecoderLayout
from ..flux1.encoder_memory import EncoderLayout
from ..flux1.spec import MAX_STEPS, T5_TOKENS, ModelSpec
from ..flux1.step_buffers import StepSize
from ..flux1.text_encoders import T5, Clip
from ..flux1.transformer import Transformer
from ..flux1.vae import Decoder, library_bytes
from ..flux1.vae_blocks import StripModule
from ..flux1.vae_encoder import Encoder, encoder_library_bytes
from ..kernels import Kernels, reference
from ..memory.arena import Shape, aligned, laid_out, round_up
from ..memory.offload import WeightGroup
from ..memory.planner import BLOCKS, SLACK, MemoryRequirements, StepRequirements, WeightGroupSize
from ..quant.backends import Backend
from ..quant.linear import NF4Linear
from ..quant.precision import EXACT, Precision
from ..storage.materialize import Target, check, materialize, pack
from ..storage.tensors import Tensors
from .graphs import POOL, activation_bytes, attention_bytes, inputs, step_bytes

Sources = Mapping[str, Tensors]  # the canonical tensors of `transformer`, `clip`, `t5` and `vae`
Origin = tuple[str, str]  # where a module's tensors are: one of these four, and the prefix of their names

MOST_AT_ONCE = 8  # pictures; a card is busy with these
STRIPS = (None, 256, 128, 64)  # rows of a strip of the VAE, at most (None: one strip); lower ones take more launches
TALL = 700_000_000  # bytes; a decode that takes more is cut into lower strips


class Model:
    """The modules of one FLUX.1-schnell: `groups` in the order they run, and their `sizes` for the planner.

    Linears are NF4 where there is a `backend`. Products are in `dtype`, those of blocks in `precision`. `fused`: plan
    for Triton's kernels, which allocate nothing, whatever `kernels` are. `allocates`: the bytes that a step takes
    besides its buffers and attention. `cuda_streams`: those that products run on, besides the default one.

    `encoder` is the VAE's, and `encoder_group` its weights. They are in no plan but that of an encode: they stay in
    host memory. `no_encoder` says why there is none, if so.
    """

    def __init__(
        self,
        spec: ModelSpec,
        dtype: torch.dtype,
        backend: Backend | None,
        kernels: Kernels = reference,
        streams: Streams | None = None,
        precision: Precision = EXACT,
        *,
        fused: bool = False,
    ) -> None:
        self.flux, self.vae, self.dtype = spec.flux, spec.vae, dtype
        self.precision = precision
        self.captured = fused or streams is not None
        self._vae_kernels = kernels if self.vae.powers_of_two else reference
        self._fused = fused
        # Triton's kernels are launched faster than they run; the library's convolutions are not
        self.captures_decodes = streams is not None and self._vae_kernels.strip_bytes(8, 8, 8, 2) > 0
        self.cuda_streams = (streams.capture, streams.side)[: 1 + precision.scaled] if streams else ()
        self.clip, self.t5 = Clip(spec.clip), T5(spec.t5)
        with torch.device("meta"):
            self.transformer, self.modulation = Transformer(self.flux), Modulation(self.flux)
            self.decoder, self.encoder = Decoder(self.vae), Encoder(self.vae)
        flux: list[Named] = [(self.transformer, ""), (self.modulation, "")]
        self.modules = {"clip": self.clip.modules, "t5": self.t5.modules, "transformer": flux}
        self.modules["vae"] = [(self.decoder, "")]
        # on `meta`, but with the final types, so that sizes can be measured; CLIP and the VAE are small and stay plain
        packed = (*flux, *self.t5.modules)
        for module in (
            *(module for module, _ in packed),
            *self.clip.groups,
            self.clip.norm,
            self.decoder,
            self.encoder,
        ):
            module.to(dtype)
        if backend is not None:
            for module, prefix in packed:
                pack(module, prefix, backend)
        side = streams.side if streams and precision.scaled else None
        self.transformer.use(kernels, precision, side=side)
        self.decoder.use(self._vae_kernels)
        self.encoder.use(self._vae_kernels)
        self.no_encoder: str | None = None
        self.origins: dict[str, tuple[Origin, ...]] = {}
        self.groups = list(self._groups())
        self.encoder_group = self._group("encoder", "encoder", {("vae", ENCODER): self.encoder})
        self.sizes = self.measure()
        self.encoder_group.measure()
        self.scratch = self._scratch()
        self._largest = _most(self.transformer, self.modulation)
        # to dequantize; cudaMallocAsync leaves up to 0.17 GB between the small tensors that are allocated (H200)
        self._plain = 0 if backend is None or (fused and dtype != torch.float32) else backend.allocates(dtype)
        self.allocates = self._plain if fused else kernels.step_bytes(self.flux.hidden) + self._plain
        self._slack = SLACK + 5 * POOL if self.allocates else SLACK
        self._known: dict[tuple[int, ...], MemoryRequirements] = {}

    def _scratch(self) -> tuple[int, ...]:
        """Bytes of the buffers that weights are dequantized into; in 8 bits there is a second one, for the text."""
        size = self.dtype.itemsize
        blocks, prompt = _most(self.transformer), _most(self.modulation, *self.t5.groups)
        text = self.flux.hidden * self.flux.mlp  # bytes; the largest weight for the text of a double block, in 8 bits
        sizes = (max(blocks, prompt * size), text) if self.precision.scaled else (max(blocks, prompt) * size,)
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
        kinds = ("double_blocks", "single_blocks")
        blocks = [f"{kind}.{i}" for kind in kinds for i in range(len(getattr(transformer, kind)))]
        for i, path in enumerate([*blocks, "final_layer"]):
            part = modulation.get_submodule(path)
            yield self._group(f"modulation.{i}", "modulation", {("transformer", f"{path}."): part})
        for path in blocks:
            yield self._group(path, BLOCKS, {("transformer", f"{path}."): transformer.get_submodule(path)})

    def measure(self) -> tuple[WeightGroupSize, ...]:
        """The sizes of all groups, as their modules are now."""
        measured = ((group, group.measure()) for group in self.groups)
        return tuple(WeightGroupSize(group.name, group.part, nbytes, group.copied) for group, nbytes in measured)

    def _group(self, name: str, part: str, modules: Mapping[Origin, nn.Module]) -> WeightGroup:
        self.origins[name] = tuple(modules)
        return WeightGroup(name, part, *modules.values())

    def check(self, sources: Sources) -> int:
        """Compare every part with the headers of its file; the bytes to read. Raises `VortexCheckpointError`.

        A VAE may lack its encoder, which only drawing from a picture needs.
        """
        named = ((kind, *one) for kind, modules in self.modules.items() for one in modules)
        return sum(check(module, sources[kind], prefix) for kind, module, prefix in named) + self._check_encoder(
            sources["vae"]
        )

    def _check_encoder(self, vae: Tensors) -> int:
        if f"{ENCODER}conv_in.weight" not in vae:
            self.no_encoder = f"{vae.where} has no encoder."
            return 0
        try:
            nbytes = check(self.encoder, vae, ENCODER)
        except VortexCheckpointError as error:
            self.no_encoder = f"The encoder cannot be used: {error}"
            return 0
        self.no_encoder = None
        return nbytes

    def check_encoder(self) -> None:
        """Raise `VortexCheckpointError` where this model cannot encode pictures."""
        if self.no_encoder is not None:
            raise VortexCheckpointError(
                f"{self.no_encoder} To begin from a picture, give a VAE with both halves, such as FLUX.1-schnell's "
                "ae.safetensors, as `vae`."
            )

    def read(self, group: WeightGroup, sources: Sources, target: Target, home: torch.device | None = None) -> None:
        """Fill a group's modules on `home`, by default `target.device`."""
        for module, (source, prefix) in zip(group.modules, self.origins[group.name], strict=True):
            materialize(module, sources[source], target, prefix=prefix, home=home)
            if isinstance(module, StripModule):
                module.channels_last()

    def call_inputs(self, height: int, width: int, tokens: int, away: int = 0) -> dict[str, Shape]:
        """Shapes and types of what all steps of a call read besides latents: text, modulation, positions, NAG's terms.

        `tokens`: of text, of which `away` are of one to avoid.
        """
        flux, dtype = self.flux, self.dtype
        given = inputs(flux, StepSize(1, tokens, sampling.image_tokens(height, width), away), dtype)
        del given["img"]  # each slice has its own
        embeddings, table = (1, tokens, flux.context), (MAX_STEPS, *given["modulation"][0])
        return {**given, "embeddings": (embeddings, dtype), "modulation": (table, dtype)}

    def requirements(
        self,
        height: int,
        width: int,
        batch: int,
        tokens: int = T5_TOKENS,
        blas: int = 0,
        more: int = 0,
        given: int = 0,
        away: int = 0,
    ) -> MemoryRequirements:
        """The memory of one request besides weights. `tokens`: of text, of which `away` are of one to avoid. `blas`:
        bytes of cuBLAS' workspaces. `more` and `given`: see `MemoryRequirements`.
        """
        key = (height, width, batch, tokens, blas, more, given, away)
        if key in self._known:  # every picture asks
            return self._known[key]
        at_once = sorted({min(MOST_AT_ONCE, -(-batch // parts)) for parts in (1, 2, 4, 8, batch)}, reverse=True)
        latent = (height // 8, width // 8)
        rows, decode = self._strips(*latent)
        decoder = self.decoder_bytes(*latent)
        self._known[key] = MemoryRequirements(
            height,
            width,
            batch,
            scratch=sum(self.scratch),
            steps=tuple(self._steps(height, width, StepSize(number, tokens, 0, away)) for number in at_once),
            decode=decode,
            rows=rows,
            # unpacked (noise, later clean latents), packed for the steps, and as predicted for `on_step`
            latents=(3 + more) * aligned(batch * self.flux.latent_channels * prod(latent) * 4),
            library=max(self.t5.working_bytes + self._plain, decoder),
            blas=blas,
            slack=self._slack,
            more=more,
            given=given,
        )
        return self._known[key]

    def prompt_requirements(self, blas: int = 0, tokens: int = T5_TOKENS) -> MemoryRequirements:
        """The memory of encoding a prompt of so many `tokens`, without a picture."""
        library = self.t5.working_bytes_of(max(tokens, T5_TOKENS)) + self._plain
        return MemoryRequirements(0, 0, 0, sum(self.scratch), library=library, blas=blas, slack=self._slack)

    def lent_requirements(
        self, height: int, width: int, batch: int, tokens: int = T5_TOKENS, blas: int = 0
    ) -> MemoryRequirements:
        """The memory of a step by code of others with these weights, which are dequantized in 16 bits."""
        number = batch * (tokens + sampling.image_tokens(height, width))
        return MemoryRequirements(
            height,
            width,
            batch,
            scratch=max(sum(self.scratch), aligned(self._largest * self.dtype.itemsize)),
            library=activation_bytes(self.flux, number, self.dtype) + self._plain,
            blas=blas,
            slack=SLACK + 5 * POOL,
            packed=True,
        )

    def decode_requirements(self, height: int, width: int, batch: int, blas: int = 0) -> MemoryRequirements:
        """The memory of decoding latents `[batch, 16, height, width]`."""
        asked = self.requirements(8 * height, 8 * width, batch, blas=blas)
        return replace(asked, scratch=0, steps=(StepRequirements(1, graph=self._decoder_graph(height, width)),))

    def with_encode(self, asked: MemoryRequirements) -> MemoryRequirements:
        """`asked`, with the encode of pictures of that size before it: the encoder's weights and maps."""
        height, width = asked.height // 8, asked.width // 8
        layout = EncoderLayout(self.vae, height, width, asked.rows, self.dtype)
        kernels = None if self._fused else self._vae_kernels
        library = encoder_library_bytes(self.vae, height, width, self.dtype, kernels)
        encode = aligned(self.encoder_group.nbytes) + layout.nbytes
        return replace(asked, encode=encode, library=max(asked.library, library))

    def encode_requirements(self, height: int, width: int, batch: int, blas: int = 0) -> MemoryRequirements:
        """The memory of encoding pictures `[batch, height, width, 3]`."""
        asked = self.with_encode(self.requirements(height, width, batch, blas=blas))
        return replace(asked, scratch=0, decode=0, latents=0, steps=(StepRequirements(1),))

    def decoder_bytes(self, height: int, width: int) -> int:
        """Bytes that torch allocates at most while latents of this size are decoded, besides the maps."""
        return library_bytes(self.vae, height, width, self.dtype, None if self._fused else self._vae_kernels)

    def _decoder_graph(self, height: int, width: int) -> int:
        return round_up(self.decoder_bytes(height, width), POOL) if self.captures_decodes else 0

    def _steps(self, height: int, width: int, size: StepSize) -> StepRequirements:
        """`size`: but for the image."""
        size = size._replace(img=sampling.image_tokens(height, width))
        library = attention_bytes(self.flux, size, self.dtype, self.precision) + self.allocates
        return StepRequirements(
            size.pictures,
            buffers=step_bytes(self.flux, size, self.dtype, self.precision)
            + laid_out(self.call_inputs(height, width, size.txt, size.away).values()),
            library=library,
            graph=self._decoder_graph(height // 8, width // 8) + (round_up(library, POOL) if self.captured else 0),
        )

    def _strips(self, height: int, width: int) -> tuple[int | None, int]:
        """Rows of the VAE's strips for latents of this size, and the bytes that decoding lays out with them."""
        for rows in STRIPS:
            nbytes = DecoderLayout(self.vae, height, width, rows, self.dtype).nbytes
            if nbytes <= TALL:
                break
        return rows, nbytes


def _most(*modules: nn.Module) -> int:
    """Values of the largest weight in NF4."""
    parts = (part for module in modules for part in module.modules())
    return max((prod(part.shape) for part in parts if isinstance(part, NF4Linear)), default=0)
