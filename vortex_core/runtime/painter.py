"""What a loaded model draws with, on its device's thread: from a prompt to a conditioning to latents to a picture.

`paint` reads as the data flow: prompt to conditioning (prompt time), seed to noise, noise to clean latents (step time),
latents to a picture. Arguments are checked already (runtime/engine.py); memory is planned for each call
(runtime/memory_manager.py).
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
from ..device import threads
from ..device.finite import Verdicts
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
from .memory_manager import MemoryManager, Place

log = logging.getLogger(__name__)

OnStep = Callable[[int, int, Tensor], None]
Result = TypeVar("Result")
NO_MEMORY = ("out of memory", "allocate memory", "ALLOC_FAILED")  # in words of torch's that are no OutOfMemoryError


class Painter:
    """Model, memory and prompts of one engine, until `close`."""

    def __init__(self, bundle: Bundle, setup: ResolvedConfig) -> None:
        """The modules on `meta`, and a plan for them; `load` fills them."""
        self.device, self.model = setup.device, loading.build(bundle, setup)
        blas, streams = blas_of(setup.device), self.model.streams(setup.device)
        blas.ensure(streams)
        first = loading.first_plan(bundle.name, self.model, setup, blas.nbytes(streams))
        self.memory = MemoryManager(self.model, setup, first)
        self.conditioner = Conditioner(
            (bundle.tokenizer, bundle.tokenizer_2),
            self.model.clip,
            self.model.t5,
            self.model.modulation,
            setup.device,
        )
        self._verdicts = Verdicts(setup.device)

    @classmethod
    def load(
        cls, bundle: Bundle, setup: ResolvedConfig, capped: bool, on_progress: OnLoad | None, cache: Cache | None
    ) -> Painter:
        """One with its weights, as `Engine.load` says. Nothing stays behind where that fails."""
        painter = cls(bundle, setup)
        painter.choose_threads()
        first, placement = painter.memory.plan, painter.memory.placement
        for kind, part in bundle.parts.items():
            log.info("%s: %s, %s", kind, part.words, part.tensors.where)
        try:
            if capped:
                painter.memory.cap()
            with _told_as_torch_does():
                loading.fill(painter.model, bundle, setup, first, placement, on_progress, cache)
            return painter
        except torch.OutOfMemoryError as error:
            # the traceback's frames would keep half-loaded tensors alive
            cause = error.with_traceback(None)
            del placement
            painter.close()
            raise loading.out_of_memory("Loading ran out of memory", setup.device, first) from cause
        except BaseException:  # a damaged file, Ctrl-C, an error of on_progress: nothing stays behind either
            painter.close()
            raise

    def choose_threads(self) -> None:
        """Have this thread compute with as many threads as suit the model, where it computes on the CPU."""
        if self.device.type == "cpu":
            threads.use(self.model.flux.hidden)

    def close(self) -> None:
        """Let go of all memory, whoever still has this."""
        try:
            self.memory.cap(on=False)
        finally:
            device = self.device
            self.__dict__.clear()
            gc.collect()
            hand_back(device)

    def encode(self, prompt: str, steps: int) -> Conditioning:
        """The `Conditioning` of a prompt, cached by its tokens."""
        return self._run(
            self.model.prompt_requirements(self.memory.blas),
            lambda place: self.conditioner(prompt, steps, place.prompt),
        )

    def condition(self, txt: Tensor, pooled: Tensor, steps: int) -> Conditioning:
        """That of embeddings `[1, N, context]` and `[1, vec]` made elsewhere."""
        txt, pooled = (values.to(self.device, self.model.dtype) for values in (txt, pooled))
        return self._run(
            self.model.prompt_requirements(self.memory.blas),
            lambda place: self.conditioner.from_embeddings(txt, pooled, steps, place.prompt),
        )

    def paint(self, prompt: str | Conditioning, request: Request, out: Tensor | None, on_step: OnStep | None) -> Tensor:
        """Pictures, float32 `[B, H, W, 3]` in 0..1, in `out` if that is given."""
        tokens = prompt.txt.shape[1] if isinstance(prompt, Conditioning) else T5_TOKENS

        def draw(place: Place) -> Tensor:
            # before libraries work, in whose memory it must not lie
            pictures = torch.empty(request.shape, device=self.device) if out is None else out
            conditioning = self.conditioner(prompt, request.steps, place.prompt) if isinstance(prompt, str) else prompt
            mark("prompt")
            latents = self._denoise(place, conditioning, request, on_step)
            check()
            return self._develop(place, latents, pictures, f"The picture of seed {request.seed}")

        size = (request.height, request.width, request.batch_size, tokens)
        return self._run(self.model.requirements(*size, self.memory.blas), draw)

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures of clean latents `[B, 16, H/8, W/8]` made elsewhere."""
        batch, _, height, width = latents.shape

        def draw(place: Place) -> Tensor:
            pictures = torch.empty(batch, 8 * height, 8 * width, 3, device=self.device)
            (kept,) = place.latents(tuple(latents.shape))
            kept.copy_(latents)
            return self._develop(place, kept, pictures, "The picture of these latents")

        return self._run(self.model.decode_requirements(height, width, batch, self.memory.blas), draw)

    def _denoise(self, place: Place, conditioning: Conditioning, request: Request, on_step: OnStep | None) -> Tensor:
        """Clean latents `[B, 16, H/8, W/8]`, fp32, where they stay while they are decoded."""
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
            # last: the device copies the others while the host draws
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
            decode(self.model.decoder, latents, pictures, place.plan.requirements.rows, place.maps)
            self._verdicts.check(pictures, what)
        return pictures

    def _run(self, requirements: MemoryRequirements, work: Callable[[Place], Result]) -> Result:
        def careful(place: Place) -> Result:
            with _told_as_torch_does():
                return work(place)

        self._verdicts.tell()
        return self.memory.run(requirements, careful)


@contextmanager
def _told_as_torch_does() -> Iterator[None]:
    """What else says that memory ran out is torch's `OutOfMemoryError` outside, after which a call is tried again."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError) or not (
            isinstance(error, MemoryError) or any(words in str(error) for words in NO_MEMORY)
        ):
            raise
        raise torch.OutOfMemoryError(str(error)) from error.with_traceback(None)
