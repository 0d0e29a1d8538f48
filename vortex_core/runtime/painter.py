"""How a loaded model draws, on the thread of its device.

`paint` shows the data flow: prompt to conditioning (prompt time), seed to noise, noise to clean latents (step time),
latents to a picture. Arguments were checked before (runtime/engine.py). Each call gets its memory from
runtime/memory_manager.py.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
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
from ..errors import MemoryPressureError, VortexInputError
from ..flux1 import sampling
from ..flux1.conditioning import Conditioner, Conditioning, in_fp32
from ..flux1.embeddings import Embeddings, Ids, stacked
from ..flux1.request import Request
from ..flux1.spec import T5_TOKENS
from ..flux1.start import Start
from ..flux1.texts import Texts
from ..flux1.vae import decode
from ..flux1.vae_encoder import encode
from ..memory.planner import MemoryRequirements
from ..utils.timing import mark
from . import loading
from .lending import Lent
from .loading import OnLoad, ResolvedConfig
from .loras import Chosen, Loras
from .memory_manager import MemoryManager, Place

log = logging.getLogger(__name__)

OnStep = Callable[[int, int, Tensor], None]
Prompts = Sequence[str | Conditioning]
Result = TypeVar("Result")
TEXTS = {"clip", "t5"}  # parts that read texts
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

    def encode(self, prompt: str, sigmas: Sequence[float], loras: Chosen = ()) -> Conditioning:
        """The `Conditioning` of a prompt, cached by its tokens."""
        return self._at_prompt_time(lambda place: self.conditioner(prompt, sigmas, place.prompt), loras)

    def condition(self, txt: Tensor, pooled: Tensor, sigmas: Sequence[float], loras: Chosen = ()) -> Conditioning:
        """The `Conditioning` of embeddings `[1, N, context]` and `[1, vec]`."""
        txt, pooled = (values.to(self.device, self.model.dtype) for values in (txt, pooled))
        return self._at_prompt_time(
            lambda place: self.conditioner.from_embeddings(txt, pooled, sigmas, place.prompt), loras
        )

    def schedule(self, conditioning: Conditioning, sigmas: Sequence[float], loras: Chosen = ()) -> Conditioning:
        """The `Conditioning` of the same text for other noise levels."""
        return self._at_prompt_time(lambda place: self.conditioner.at(conditioning, sigmas, place.prompt), loras)

    def embed(self, t5: Ids, clip: Ids, layer: int | None, loras: Chosen = ()) -> Embeddings:
        """The embeddings of token ids, in host memory; LoRAs of the steps stay as they are."""
        self._use_at_texts(loras)
        asked = self.model.prompt_requirements(self.memory.blas, max(map(len, t5), default=0))

        def with_encoders(place: Place) -> Embeddings:
            with place.prompt():
                txt = [self.model.t5(ids, layer).cpu() for ids in t5]
                pairs = [[part.cpu() for part in self.model.clip.states(ids, layer)] for ids in clip]
            states, pooled = ([pair[i] for pair in pairs] for i in (0, 1))
            flux, dtype = self.model.flux, self.model.dtype
            return Embeddings(
                stacked(txt, 0, 0, flux.context, dtype=dtype),
                stacked(states, 0, 0, flux.vec, dtype=dtype),
                stacked(pooled, 0, flux.vec, dtype=dtype),
            )

        return self._run(asked, with_encoders)

    def _use_at_texts(self, loras: Chosen) -> None:
        """Read texts with these LoRAs. Those that change only steps are kept where there is room: they do not matter
        here, and bringing them back for the next picture takes time.
        """
        of_steps = tuple(one for one in self.loras.chosen if not TEXTS & set(one[0].parts))
        try:
            self.use_loras((*of_steps, *loras))
        except (MemoryPressureError, VortexInputError):  # no room, or too many
            if not of_steps:
                raise
            self.use_loras(loras)

    def _at_prompt_time(self, work: Callable[[Place], Conditioning], loras: Chosen) -> Conditioning:
        self.use_loras(loras)
        return self._run(self.model.prompt_requirements(self.memory.blas), work)

    def paint(
        self,
        prompts: Prompts,
        request: Request,
        out: Tensor | None,
        on_step: OnStep | None,
        start: Start | None = None,
    ) -> Tensor:
        """Pictures, float32 `[B, H, W, 3]` in 0..1, in `out` if that is given. `prompts`: one for all, or one for each
        picture; where the request avoids something, the last one is that.
        """
        lengths = [prompt.txt.shape[1] if isinstance(prompt, Conditioning) else T5_TOKENS for prompt in prompts]

        def draw(place: Place) -> Tensor:
            # allocated now, so that they do not lie in the block for libraries
            pictures = torch.empty(request.shape, device=self.device) if out is None else out
            sigmas = request.schedule[:-1]
            wanted = [self._conditioned(prompt, sigmas, place) for prompt in prompts]
            avoided = wanted.pop() if request.avoids else None
            texts = Texts(wanted, avoided, request.guidance, request.nag)
            mark("prompt")
            image = None if start is None else self._encoded(place, start.image)
            latents = self._denoise(place, texts, request, on_step, start, image)
            check()
            found = self._develop(place, latents, pictures, f"The picture of seed {request.seed}")
            return found if start is None else start.compose(found)

        away = 0 if request.nag is None else lengths.pop()
        size = (request.height, request.width, request.batch_size, max(lengths) + away)
        more, given = (0, 0) if start is None else (start.more, start.nbytes)
        asked = self.model.requirements(*size, self.memory.blas, more + request.guided, given, away)
        return self._run(asked if start is None else self.model.with_encode(asked), draw)

    def _conditioned(self, prompt: str | Conditioning, sigmas: Sequence[float], place: Place) -> Conditioning:
        if isinstance(prompt, str):
            return self.conditioner(prompt, sigmas, place.prompt)
        return self.conditioner.at(prompt, sigmas, place.prompt)

    def velocity(self, latents: Tensor, sigma: float, texts: Texts, loras: Chosen = ()) -> Tensor:
        """The velocity of latents `[B, 16, H/8, W/8]`, fp32."""
        batch, _, height, width = latents.shape
        size = (8 * height, 8 * width)

        def step(place: Place) -> Tensor:
            found = torch.empty(latents.shape, device=self.device)
            (level,) = in_fp32((sigma,))
            (known,) = texts.wanted
            if level not in known.sigmas:
                known = self.conditioner.at(known, (level,), place.prompt)
            here = replace(texts, wanted=[known])
            tokens = (batch, sampling.image_tokens(*size), self.model.flux.in_channels)
            slices = -(-batch // place.plan.slice)
            with place.steps(*size, here.tokens, slices, here.away) as denoiser:
                here.enter(denoiser, (level,))
                denoiser.place(sampling.rope_of(*size, here.tokens, self.model.flux, self.device))
                (img,) = place.latents(tokens)
                sampling.as_patches(img, *size).copy_(sampling.patches(latents.to(self.device)))
                for part in img.split(place.plan.slice):
                    part.copy_(denoiser(part, level, known))
                sampling.patches(found).copy_(sampling.as_patches(img, *size))
            return found

        self.use_loras(loras)
        asked = self.model.requirements(*size, batch, texts.tokens, self.memory.blas, away=texts.away)
        return self._run(asked, step)

    def lend(
        self, work: Callable[[Lent], Result], height: int, width: int, batch: int, tokens: int, loras: Chosen
    ) -> Result:
        """Do `work` with the weights, with room for its activations; see `Engine.lend`."""
        self.use_loras(loras)

        def with_weights(place: Place) -> Result:
            with place.lent() as lent:
                return work(lent)

        return self._run(self.model.lent_requirements(height, width, batch, tokens, self.memory.blas), with_weights)

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures of clean latents `[B, 16, H/8, W/8]`."""
        batch, _, height, width = latents.shape

        def draw(place: Place) -> Tensor:
            pictures = torch.empty(batch, 8 * height, 8 * width, 3, device=self.device)
            (kept,) = place.latents(tuple(latents.shape))
            kept.copy_(latents)
            return self._develop(place, kept, pictures, "The picture of these latents")

        return self._run(self.model.decode_requirements(height, width, batch, self.memory.blas), draw)

    def encode_image(self, pictures: Tensor) -> Tensor:
        """Latents, float32 `[B, 16, H/8, W/8]`, of pictures `[B, H, W, 3]` in 0..1."""
        batch, height, width, _ = pictures.shape
        asked = self.model.encode_requirements(height, width, batch, self.memory.blas)
        return self._run(asked, lambda place: self._encoded(place, pictures))

    def _encoded(self, place: Place, pictures: Tensor) -> Tensor:
        batch, height, width, _ = pictures.shape
        # allocated now, so that they do not lie in the block for libraries
        latents = torch.empty(batch, self.model.flux.latent_channels, height // 8, width // 8, device=self.device)
        pictures = pictures.to(self.device, torch.float32)
        with place.encoder() as maps:
            encode(self.model.encoder, pictures, latents, place.plan.requirements.rows, maps)
        return latents

    def _denoise(
        self,
        place: Place,
        texts: Texts,
        request: Request,
        on_step: OnStep | None,
        start: Start | None,
        image: Tensor | None,
    ) -> Tensor:
        """Clean latents `[B, 16, H/8, W/8]`, fp32, in memory that the VAE leaves alone."""
        batch, height, width = request.batch_size, request.height, request.width
        flux = self.model.flux
        shape = (batch, flux.latent_channels, height // 8, width // 8)
        packed = (batch, sampling.image_tokens(height, width), flux.in_channels)
        latents, img, clean, *more = place.latents(shape, *[packed] * (2 + place.plan.requirements.more))
        parts = [1] * batch if len(texts.wanted) > 1 else [len(part) for part in img.split(place.plan.slice)]

        def report(i: int, n: int, clean: Tensor) -> None:
            if on_step is not None:
                ask(on_step, i, n, sampling.unpack(clean, height, width))
                self.memory.check_workspaces()

        rounds = (len(request.schedule) - 1) * len(parts) * (1 + request.guided)
        with place.steps(height, width, texts.tokens, rounds, texts.away) as denoiser:
            texts.enter(denoiser, request.schedule[:-1])
            denoiser.place(sampling.rope_of(height, width, texts.tokens, flux, self.device))
            # last: the device copies the other inputs while the host draws noise
            noise = sampling.noise(request.seed, batch, height, width, flux.latent_channels, self.device)
            latents.copy_(noise, non_blocking=True)
            in_patches = sampling.as_patches(img, height, width)
            in_patches.copy_(sampling.patches(latents))
            kept = None
            if image is not None and start is not None:
                kept = start.enter(img, image, more[request.guided :], request.schedule[0])
            mark("prepare")
            watched = None if on_step is None else report
            velocity = texts.velocity(denoiser, more[0] if request.guided else None)
            sampling.denoise(velocity, img, request.schedule, watched, parts, clean, kept)
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
