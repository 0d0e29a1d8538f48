"""How a loaded model draws, on the thread of its device.

`paint` shows the data flow: prompt to conditioning (prompt time), seed to noise, noise to clean latents (step time),
latents to a picture. Arguments were checked before (runtime/engine.py). Each call gets its memory from
runtime/memory_manager.py.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor

from ..checkpoint.bundle import Bundle
from ..checkpoint.cache import Cache
from ..device import cpu_threads
from ..device.finite_pictures import Verdicts
from ..device.jobs import ask, check
from ..device.streams import blas_of
from ..device.vram import hand_back
from ..flux1 import sampling
from ..flux1.conditioning import Conditioner, Conditioning
from ..flux1.request import Request
from ..flux1.spec import T5_TOKENS
from ..flux1.vae import decode
from ..kernels import ScaledTensor
from ..memory.planner import MemoryRequirements
from ..quant.linear import multiply
from ..utils.timing import mark
from . import loading
from .loading import OnLoad, ResolvedConfig
from .loras import Chosen, Loras
from .memory_manager import MemoryManager, Place

log = logging.getLogger(__name__)

OnStep = Callable[[int, int, Tensor], None]
Result = TypeVar("Result")
NO_MEMORY = ("out of memory", "allocate memory", "ALLOC_FAILED")  # in torch's errors besides OutOfMemoryError


class Painter:
    """Model, memory and prompts of one engine, until `close`."""

    def __init__(self, bundle: Bundle, setup: ResolvedConfig) -> None:
        """The modules on `meta`, and the first plan; `load` reads the weights."""
        self.device, self.model = setup.device, loading.build(bundle.spec, setup)
        blas, streams = blas_of(setup.device), self.model.cuda_streams
        blas.ensure(streams)
        first = loading.first_plan(bundle.name, self.model, setup, blas.nbytes(streams))
        self.memory = MemoryManager(self.model, setup, first)
        encoders = (self.model.clip, self.model.t5, self.model.modulation)
        self.conditioner = Conditioner((bundle.tokenizer, bundle.tokenizer_2), *encoders, setup.device)
        self.loras = Loras(self.model, self.memory)
        self._verdicts = Verdicts(setup.device)

    @classmethod
    def load(
        cls, bundle: Bundle, setup: ResolvedConfig, capped: bool, on_progress: OnLoad | None, cache: Cache | None
    ) -> Painter:
        """A painter with its weights; see `Engine.load`. Nothing stays in memory where that fails."""
        painter = cls(bundle, setup)
        painter.choose_threads()
        first, placement = painter.memory.plan, painter.memory.placement
        for kind, part in bundle.parts.items():
            log.info("%s: %s, %s", kind, part.words, part.tensors.where)
        try:
            if capped:
                painter.memory.cap()
            with _as_out_of_memory():
                loading.fill(painter.model, bundle, setup, first, placement, on_progress, cache)
            return painter
        except torch.OutOfMemoryError as error:
            # the traceback's frames would keep half-loaded tensors alive
            cause = error.with_traceback(None)
            del placement
            painter.close()
            raise loading.out_of_memory("Loading ran out of memory", setup.device, first) from cause
        except BaseException:  # a damaged file, Ctrl-C, an error of on_progress
            painter.close()
            raise

    def choose_threads(self) -> None:
        """On the CPU: let this thread compute with as many threads as suit the model."""
        if self.device.type == "cpu":
            cpu_threads.use(self.model.flux.hidden)

    def close(self) -> None:
        """Release all memory, even if other code still holds this object."""
        try:
            self.memory.cap(on=False)
        finally:
            device = self.device
            self.__dict__.clear()
            gc.collect()
            hand_back(device)

    def use_loras(self, chosen: Chosen) -> None:
        """Draw with these LoRAs from now on. Raises as `Loras.use`."""
        try:
            with _as_out_of_memory():
                self.loras.use(chosen)
        except torch.OutOfMemoryError:
            self.memory.release()
            try:
                with _as_out_of_memory():
                    self.loras.use(chosen)
            except torch.OutOfMemoryError as error:
                raise self.memory.ran_out("Memory ran out with these LoRAs") from error.with_traceback(None)
        self.conditioner.adapters = self.loras.at_prompt_time

    def encode(self, prompt: str, steps: int, loras: Chosen = ()) -> Conditioning:
        """The `Conditioning` of a prompt, cached by its tokens."""
        self.use_loras(loras)
        return self._run(
            self.model.prompt_requirements(self.memory.blas),
            lambda place: self.conditioner(prompt, steps, place.prompt),
        )

    def condition(self, txt: Tensor, pooled: Tensor, steps: int, loras: Chosen = ()) -> Conditioning:
        """The `Conditioning` of embeddings `[1, N, context]` and `[1, vec]`."""
        self.use_loras(loras)
        txt, pooled = (values.to(self.device, self.model.dtype) for values in (txt, pooled))
        return self._run(
            self.model.prompt_requirements(self.memory.blas),
            lambda place: self.conditioner.from_embeddings(txt, pooled, steps, place.prompt),
        )

    def paint(self, prompt: str | Conditioning, request: Request, out: Tensor | None, on_step: OnStep | None) -> Tensor:
        """Pictures, float32 `[B, H, W, 3]` in 0..1, in `out` if that is given."""
        tokens = prompt.txt.shape[1] if isinstance(prompt, Conditioning) else T5_TOKENS

        def draw(place: Place) -> Tensor:
            # allocated now, so that they do not lie in the block for libraries
            pictures = torch.empty(request.shape, device=self.device) if out is None else out
            conditioning = self.conditioner(prompt, request.steps, place.prompt) if isinstance(prompt, str) else prompt
            mark("prompt")
            latents = self._denoise(place, conditioning, request, on_step)
            check()
            return self._develop(place, latents, pictures, f"The picture of seed {request.seed}")

        size = (request.height, request.width, request.batch_size, tokens)
        return self._run(self.model.requirements(*size, self.memory.blas), draw)

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures of clean latents `[B, 16, H/8, W/8]`."""
        batch, _, height, width = latents.shape

        def draw(place: Place) -> Tensor:
            pictures = torch.empty(batch, 8 * height, 8 * width, 3, device=self.device)
            (kept,) = place.latents(tuple(latents.shape))
            kept.copy_(latents)
            return self._develop(place, kept, pictures, "The picture of these latents")

        return self._run(self.model.decode_requirements(height, width, batch, self.memory.blas), draw)

    def _denoise(self, place: Place, conditioning: Conditioning, request: Request, on_step: OnStep | None) -> Tensor:
        """Clean latents `[B, 16, H/8, W/8]`, fp32, in memory that the VAE leaves alone."""
        batch, height, width = request.batch_size, request.height, request.width
        flux, transformer, tokens = self.model.flux, self.model.transformer, conditioning.txt.shape[1]
        shape = (batch, flux.latent_channels, height // 8, width // 8)

        def report(i: int, n: int, clean: Tensor) -> None:
            if on_step is not None:
                ask(on_step, i, n, sampling.unpack(clean, height, width))
                self.memory.check_workspaces()

        rounds = conditioning.steps * -(-batch // place.plan.slice)
        with place.steps(height, width, tokens, rounds) as (velocity, inputs):
            inputs["embeddings"].copy_(conditioning.txt, non_blocking=True)
            multiply(transformer.txt_in, ScaledTensor(inputs["embeddings"]), inputs["txt"])
            modulation = inputs["modulation"][: conditioning.steps].copy_(conditioning.modulation, non_blocking=True)
            tables = sampling.rope_of(height, width, tokens, flux, self.device)
            pe = inputs["cos"].copy_(tables[0], non_blocking=True), inputs["sin"].copy_(tables[1], non_blocking=True)
            # last: the device copies the other inputs while the host draws noise
            noise = sampling.noise(request.seed, batch, height, width, flux.latent_channels, self.device)
            tokens_shape = (batch, sampling.image_tokens(height, width), flux.in_channels)
            latents, img, clean = place.latents(shape, tokens_shape, tokens_shape)
            latents.copy_(noise, non_blocking=True)
            in_patches = sampling.as_patches(img, height, width)
            in_patches.copy_(sampling.patches(latents))
            mark("prepare")
            watched = None if on_step is None else report
            sampling.denoise(velocity, img, inputs["txt"], modulation, pe, watched, place.plan.slice, clean)
            sampling.patches(latents).copy_(in_patches)
            return latents

    def _develop(self, place: Place, latents: Tensor, pictures: Tensor, what: str) -> Tensor:
        with place.libraries():
            launch = place.launcher(*latents.shape[2:])
            decode(self.model.decoder, latents, pictures, place.plan.requirements.rows, place.maps, launch)
            self._verdicts.check(pictures, what)
        return pictures

    def _run(self, requirements: MemoryRequirements, work: Callable[[Place], Result]) -> Result:
        def careful(place: Place) -> Result:
            with _as_out_of_memory():
                return work(place)

        self._verdicts.tell()
        return self.memory.run(requirements, careful)


@contextmanager
def _as_out_of_memory() -> Iterator[None]:
    """Turn other errors that say that memory ran out into torch's `OutOfMemoryError`, after which a call is retried."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError) or not (
            isinstance(error, MemoryError) or any(words in str(error) for words in NO_MEMORY)
        ):
            raise
        raise torch.OutOfMemoryError(str(error)) from error.with_traceback(None)
