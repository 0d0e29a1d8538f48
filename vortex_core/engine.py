"""The engine: load a model once, draw many pictures.

`generate` reads as the data flow: prompt to conditioning (prompt time), seed to noise, noise to clean latents
(step time), latents to a picture. How a model is loaded is told in loading.py, what it works in in memory.py, and on
which thread in worker.py.
"""

from __future__ import annotations

import gc
import logging
import secrets
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from . import loading, sampling, threads
from .checkpoint.bundle import Bundle, open_bundle, open_pipeline
from .checkpoint.cache import Cache
from .conditioning import Conditioner, Conditioning
from .device import resolve_device
from .errors import NoEffectWarning, VortexInputError
from .kernels import Operand
from .latency import mark
from .linear import multiply
from .loading import OnLoad, Setup
from .memory import MemoryManager, Place
from .planner import MemoryPlan
from .request import Request, check_embeddings, check_latents, check_prompt, check_steps
from .residency import nbytes
from .spec import DEFAULT_STEPS, T5_TOKENS
from .streams import blas_of
from .vae import decode
from .vram import Ledger, hand_back, snapshot
from .worker import Worker, ask, check, inside, warn, worker_of

if TYPE_CHECKING:
    from diffusers import FluxPipeline

log = logging.getLogger(__name__)

OnStep = Callable[[int, int, Tensor], None]
Result = TypeVar("Result")


class Engine:
    """FLUX.1-schnell, resident: `Engine.load(...)` once, `generate(...)` many times.

    On a CUDA device torch never reserves more for it than `budget`: what does not fit stays in pinned host memory and
    streams, large pictures are decoded in strips, batches drawn in slices. All engines of a device work on one thread
    of its own: calls from any number of threads are served in the order in which they come.

    Attributes: `name`, `device`, `dtype`, `quantization`, `mode` as it runs, `native_size` (side in pixels the model
    was trained at), `last_seed`.
    """

    def __init__(self, bundle: Bundle, setup: Setup, worker: Worker) -> None:
        """Not for callers: builds the modules on `meta`. Use `Engine.load` or `Engine.from_pipeline`."""
        self.name, self.mode = bundle.name, setup.mode
        self.device, self.dtype, self.quantization = setup.device, setup.dtype, setup.quantization
        self.native_size = bundle.vae.sample_size
        self.last_seed: int | None = None
        self._spec = bundle.flux
        self._budgeted = setup.budget is not None
        self._model = loading.build(bundle, setup)
        self._transformer, self._decoder = self._model.transformer, self._model.decoder
        self._worker = worker
        blas, streams = blas_of(setup.device), self._model.streams(setup.device)
        blas.ensure(streams)
        first = loading.first_plan(bundle.name, self._model, setup, blas.nbytes(streams))
        self._memory = MemoryManager(self._model, setup, first)
        self._conditioner = Conditioner(
            (bundle.tokenizer, bundle.tokenizer_2),
            self._model.clip,
            self._model.t5,
            self._model.modulation,
            setup.device,
        )
        self._detach = worker.attach(self)

    @classmethod
    def load(
        cls,
        model: str | Path = "tiny",
        *,
        clip: str | Path | None = None,
        t5: str | Path | None = None,
        vae: str | Path | None = None,
        tokenizers: str | Path | tuple[Path, Path] | None = None,
        device: str | torch.device | None = None,
        vram_budget: float | None = None,
        cap_process: bool = False,
        mode: str = "fast",
        quantization: str = "nf4",
        dtype: torch.dtype | None = None,
        backend: str | None = None,
        cache_dir: str | Path | None = None,
        on_progress: OnLoad | None = None,
    ) -> Engine:
        """Read a model and make it resident.

        `model`: `"tiny"` (bundled), a folder in the diffusers layout, or a .safetensors or .gguf file. `clip`, `t5`,
        `vae`: files or folders for what the model lacks. `tokenizers`: a folder with `tokenizer/` and `tokenizer_2/`,
        or the pair of CLIP's and T5's folders; default the model's own, else the Hugging Face cache's. `device`:
        default the first CUDA device, else the CPU. `vram_budget`: GB (10^9 bytes) that torch may reserve for this
        engine at its peak, everything included; default 6.5, or what a smaller card has but 1. `cap_process`: have
        torch refuse more to the whole process, so that the budget holds whatever happens; only for a process that is
        yours. `mode`: `"fast"` multiplies in fp8 where the card can (compute capability 8.9); elsewhere, and the log
        says why, it is `"exact"`, with 16-bit products. It attends in fp8, too, where that is known to be faster (9.0).
        `quantization`: `"nf4"`, or `"none"` to keep 16-bit weights. `dtype`: of the products; default bf16 on CUDA,
        fp32 on the CPU. `backend`: `"triton"`, `"bitsandbytes"` or `"reference"`; default the fastest that works.
        `cache_dir`: where quantized weights are kept; default `$VORTEX_CACHE` or the user's cache folder.
        `on_progress(done, total)` is told bytes.

        Raises `VortexInputError`, `VortexDeviceError` and `VortexCheckpointError` before any device memory is
        taken, and `VortexInitializationError` (with figures) when memory runs out; then nothing stays behind.
        """
        cache = Cache(cache_dir)
        return cls._load(
            lambda: open_bundle(model, clip=clip, t5=t5, vae=vae, tokenizers=tokenizers),
            (device, quantization, dtype, backend, vram_budget, mode),
            cap_process,
            on_progress,
            cache,
        )

    @classmethod
    def from_pipeline(
        cls,
        pipe: FluxPipeline,
        *,
        device: str | torch.device | None = None,
        vram_budget: float | None = None,
        cap_process: bool = False,
        mode: str = "fast",
        quantization: str = "nf4",
        dtype: torch.dtype | None = None,
        backend: str | None = None,
        on_progress: OnLoad | None = None,
    ) -> Engine:
        """The door from diffusers: take the weights of a `FluxPipeline`, which stays as it is. Else as `load`."""
        options = (device, quantization, dtype, backend, vram_budget, mode)
        return cls._load(lambda: open_pipeline(pipe), options, cap_process, on_progress, None)

    @classmethod
    def _load(
        cls,
        opened: Callable[[], Bundle],
        options: tuple[Any, ...],
        capped: bool,
        on_progress: OnLoad | None,
        cache: Cache | None,
    ) -> Engine:
        worker = worker_of(resolve_device(options[0]))

        def load() -> Engine:
            blas_of(worker.device).ensure(())  # before samples are multiplied, to see what it takes
            setup = Setup.check(*options)
            bundle = opened()
            engine = cls(bundle, setup, worker)
            engine._choose_threads()
            first, placement = engine.plan, engine._memory.placement
            for kind, part in bundle.parts.items():
                log.info("%s: %s, %s", kind, part.words, part.tensors.where)
            try:
                if capped:
                    engine._memory.cap()
                loading.fill(engine._model, bundle, setup, first, placement, on_progress, cache)
                return engine
            except torch.OutOfMemoryError as error:
                # the traceback's frames would keep half-loaded tensors alive
                cause = error.with_traceback(None)
                del placement
                engine.unload()
                raise loading.out_of_memory("Loading ran out of memory", setup.device, first) from cause
            except BaseException:  # a damaged file, Ctrl-C, an error of on_progress: nothing stays behind either
                engine.unload()
                raise

        release = worker.attach(load)  # so that the thread ends if the load fails
        try:
            return worker.run(load)
        finally:
            release()

    @property
    def step_time_bytes(self) -> int:
        """Bytes of the weights that every step needs: the transformer without modulation."""
        return nbytes(self._transformer)

    def encode(self, prompt: str, steps: int = DEFAULT_STEPS) -> Conditioning:
        """The `Conditioning` of a prompt, cached by its tokens; pass it to `generate` in place of the prompt.

        Raises `VortexInputError` for a prompt that is no text, or steps out of 1 to 8.
        """
        self._check_usable()
        check_prompt(prompt)
        check_steps(steps)
        return self._run(
            lambda memory: memory.run(
                self._model.prompt_requirements(memory.blas),
                lambda place: self._conditioner(prompt, steps, place.prompt),
            )
        )

    def condition(self, txt: Tensor, pooled: Tensor, steps: int = DEFAULT_STEPS) -> Conditioning:
        """A `Conditioning` from embeddings made elsewhere: T5's `[1, N, context]` and CLIP's pooled `[1, vec]`.

        Raises `VortexInputError` for other shapes, or steps out of 1 to 8.
        """
        self._check_usable()
        check_steps(steps)
        check_embeddings(txt, pooled, self._spec.context, self._spec.vec)

        def condition(place: Place) -> Conditioning:
            return self._conditioner.from_embeddings(
                txt.to(self.device, self.dtype), pooled.to(self.device, self.dtype), steps, place.prompt
            )

        return self._run(lambda memory: memory.run(self._model.prompt_requirements(memory.blas), condition))

    def generate(
        self,
        prompt: str | Conditioning,
        negative_prompt: str | None = None,
        *,
        seed: int | None = None,
        height: int | None = None,
        width: int | None = None,
        steps: int = DEFAULT_STEPS,
        batch_size: int = 1,
        out: Tensor | None = None,
        on_step: OnStep | None = None,
        deadline: float | None = None,
    ) -> Tensor:
        """Draw `batch_size` pictures; float32 `[B, H, W, 3]` in 0..1 on the engine's device.

        `seed`: None draws one, logs it and leaves it in `last_seed`; picture i starts from the noise of `seed + i`.
        `height`, `width`: pixels, multiples of 16 from 64 to 2048; default the model's native size. `steps`: 1 to 8.
        `negative_prompt` has no effect at guidance 0 and says so. `out`: a contiguous buffer the caller owns; it is
        checked, written in place and returned. `on_step(i, n, latents)` is called after step i of n, on the caller's
        own thread, with the clean latents predicted so far, `[B, 16, H/8, W/8]`; it may raise to cancel, and the next
        call works. It may not call this engine, nor wait for a thread or a call that does. `deadline`: seconds from
        now; a picture that is not done by then is given up at the next step, and one that still waits leaves the queue.

        Raises `VortexInputError` before any work, `BusyError` where too many calls wait already, `DeadlineError`, and
        `MemoryPressureError` where the pictures do not fit the budget, or the card's memory ran out twice; the engine
        stays usable.
        """
        job = self._drawing(prompt, negative_prompt, seed, height, width, steps, batch_size, out, on_step)
        return self._run(job, deadline)

    async def agenerate(
        self,
        prompt: str | Conditioning,
        negative_prompt: str | None = None,
        *,
        deadline: float | None = None,
        **options: Any,
    ) -> Tensor:
        """`generate`, awaited: the event loop goes on meanwhile, and a task that is cancelled stops its picture.

        Options and errors as there. `on_step` is called on the engine's thread, in a copy of the caller's context; it
        may not wait for the loop to do something with an engine of this device.
        """
        job = self._drawing(prompt, negative_prompt, **options)
        return await self._worker.arun(partial(self._turn, job), owner=self, deadline=deadline)

    def _drawing(
        self,
        prompt: str | Conditioning,
        negative_prompt: str | None,
        seed: int | None = None,
        height: int | None = None,
        width: int | None = None,
        steps: int = DEFAULT_STEPS,
        batch_size: int = 1,
        out: Tensor | None = None,
        on_step: OnStep | None = None,
    ) -> Callable[[MemoryManager], Tensor]:
        """Check what `generate` was given; the work that is to be done for it."""
        self._check_usable()
        if seed is None:
            seed = secrets.randbits(32)
            log.info("seed %d", seed)
        height = self.native_size if height is None else height
        width = self.native_size if width is None else width
        request = Request(seed, height, width, steps, batch_size)
        tokens = T5_TOKENS
        if isinstance(prompt, Conditioning):
            prompt.check(steps)
            tokens = prompt.txt.shape[1]
        else:
            check_prompt(prompt)
        if out is not None:
            request.check_out(out, self.device)
        if negative_prompt:
            warn(
                "negative_prompt has no effect: FLUX.1-schnell draws at guidance 0, without a second pass.",
                NoEffectWarning,
            )

        def draw(place: Place) -> Tensor:
            # before libraries work, in whose memory it must not lie
            pictures = torch.empty(request.shape, device=self.device) if out is None else out
            conditioning = self._conditioner(prompt, steps, place.prompt) if isinstance(prompt, str) else prompt
            mark("prompt")
            latents = self._denoise(place, conditioning, request, on_step)
            check()
            with place.libraries():
                return decode(self._decoder, latents, pictures, place.plan.requirements.rows, place.maps)

        def job(memory: MemoryManager) -> Tensor:
            self.last_seed = request.seed
            requirements = self._model.requirements(request.height, request.width, batch_size, tokens, memory.blas)
            return memory.run(requirements, draw)

        return job

    def _denoise(self, place: Place, conditioning: Conditioning, request: Request, on_step: OnStep | None) -> Tensor:
        """Clean latents `[B, 16, H/8, W/8]`, fp32, where they stay while they are decoded."""
        batch, height, width = request.batch_size, request.height, request.width
        tokens, channels = conditioning.txt.shape[1], self._spec.latent_channels
        shape = (batch, channels, height // 8, width // 8)

        def report(i: int, n: int, clean: Tensor) -> None:
            if on_step is not None:
                ask(on_step, i, n, sampling.unpack(clean, height, width))
                self._memory.check_workspaces()

        rounds = conditioning.steps * -(-batch // place.plan.slice)
        with place.steps(height, width, tokens, rounds) as (velocity, inputs):
            inputs["embeddings"].copy_(conditioning.txt, non_blocking=True)
            multiply(self._transformer.txt_in, Operand(inputs["embeddings"]), inputs["txt"])
            modulation = inputs["modulation"][: conditioning.steps].copy_(conditioning.modulation, non_blocking=True)
            tables = sampling.rope_of(height, width, tokens, self._spec, self.device)
            pe = inputs["cos"].copy_(tables[0], non_blocking=True), inputs["sin"].copy_(tables[1], non_blocking=True)
            # last: the device copies the others while the host draws
            noise = sampling.noise(request.seed, batch, height, width, channels, self.device)
            tokens_shape = (batch, sampling.image_tokens(height, width), self._spec.in_channels)
            latents, img, clean = place.latents(shape, tokens_shape, tokens_shape)
            latents.copy_(noise, non_blocking=True)
            in_patches = sampling.as_patches(img, height, width)
            in_patches.copy_(sampling.patches(latents))
            mark("prepare")
            watched = None if on_step is None else report
            sampling.denoise(velocity, img, inputs["txt"], modulation, pe, watched, place.plan.slice, clean)
            sampling.patches(latents).copy_(in_patches)
            return latents

    def warmup(self, height: int | None = None, width: int | None = None, batch_size: int = 1) -> None:
        """Draw once, for nothing: kernels are then compiled, and the step of this size is captured.

        So the first picture takes what later ones take. Sizes and errors as in `generate`.
        """

        def draw(memory: MemoryManager) -> None:
            seed = self.last_seed
            try:
                self.generate("warm-up", seed=0, height=height, width=width, batch_size=batch_size, steps=1)
            finally:
                self.last_seed = seed

        self._run(draw)

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures, float32 `[B, H, W, 3]` in 0..1, of clean latents `[B, 16, H/8, W/8]` in the model's scale.

        Raises `VortexInputError` for another shape.
        """
        self._check_usable()
        check_latents(latents, self._spec.latent_channels)
        batch, height, width = latents.shape[0], latents.shape[2], latents.shape[3]

        def draw(place: Place) -> Tensor:
            pictures = torch.empty(batch, 8 * height, 8 * width, 3, device=self.device)
            (kept,) = place.latents(tuple(latents.shape))
            kept.copy_(latents)
            with place.libraries():
                return decode(self._decoder, kept, pictures, place.plan.requirements.rows, place.maps)

        return self._run(
            lambda memory: memory.run(self._model.decode_requirements(height, width, batch, memory.blas), draw)
        )

    def limit(self, vram_budget: float) -> None:
        """Keep within another budget, in GB, from the next call on. Raises `VortexInputError` as `load` does."""
        self._check_loaded()
        if self._budgeted:
            total = snapshot(self.device, process=False).total or None
            self._memory.limit(loading.check_budget(vram_budget, total) or 0)

    @property
    def budget(self) -> int | None:
        """Bytes that torch may reserve for this engine; None on the CPU, unless one was given."""
        self._check_loaded()
        return int(self._memory.budget) if self._budgeted else None

    @property
    def plan(self) -> MemoryPlan:
        """The latest plan: where weights are, the arena's stages, slices and strips, the predicted peak."""
        self._check_loaded()
        return self._memory.plan

    @property
    def captured(self) -> tuple[tuple[int, int, int], ...]:
        """The sizes whose step is captured as a CUDA graph: pictures at once, text tokens, image tokens."""
        self._check_loaded()
        return self._memory.graphs.sizes

    @property
    def resident(self) -> bool:
        """False while everything is offloaded, and once it is unloaded."""
        memory = self.__dict__.get("_memory")
        return memory is not None and memory.placement.streamed is not None

    @property
    def ledger(self) -> Ledger:
        """Who holds what is reserved on the device, and pinned host memory."""
        self._check_loaded()
        ledger = self._memory.ledger
        return replace(ledger, pinned={**ledger.pinned, "prompts": self._conditioner.pinned_bytes})

    @property
    def device_bytes(self) -> int:
        """Bytes on a CUDA device between calls, and so what `offload` frees: weights and working memory."""
        memory = self.__dict__.get("_memory")
        return memory.nbytes if memory is not None and self.device.type == "cuda" else 0

    @property
    def pinned_bytes(self) -> int:
        """Bytes of pinned host memory."""
        return sum(self.ledger.pinned.values())

    def offload(self) -> int:
        """Move everything to host memory and hand the VRAM back to the driver; the bytes freed.

        The next `generate` or `encode` brings it back (`resume`), and draws the same pictures, bit for bit.
        Nothing happens on the CPU, or when it is offloaded already. Raises `VortexInputError` in `on_step`.
        """

        def offload() -> int:
            freed = self.device_bytes
            if freed:
                self._memory.offload()
            return freed

        if not hasattr(self, "_memory"):
            return 0
        self._check_usable()
        return self._worker.run(offload, owner=self) if self.device_bytes else 0

    def resume(self) -> None:
        """Bring an offloaded engine back to its device. Raises torch's `OutOfMemoryError`, still offloaded."""
        self._check_loaded()
        if not self.resident:
            self._run(lambda memory: None if self.resident else memory.resume())

    def unload(self) -> None:
        """Release every weight and buffer; the engine cannot draw any more. Loading again makes a new one.

        Raises `VortexInputError` in `on_step`.
        """
        if not hasattr(self, "_memory"):
            return

        def unload() -> None:
            if hasattr(self, "_memory"):
                self._memory.cap(on=False)
            for name in ("_transformer", "_decoder", "_conditioner", "_model", "_memory"):
                self.__dict__.pop(name, None)
            gc.collect()
            hand_back(self.device)

        self._check_usable()
        self._worker.run(unload, owner=self)
        self._detach()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exception: object) -> None:
        self.unload()

    def _run(self, work: Callable[[MemoryManager], Result], deadline: float | None = None) -> Result:
        """Do `work` on the device's thread, when it is this call's turn."""
        return self._worker.run(partial(self._turn, work), owner=self, deadline=deadline)

    def _turn(self, work: Callable[[MemoryManager], Result]) -> Result:
        self._check_loaded()  # somebody may have unloaded it meanwhile
        self._choose_threads()
        return work(self._memory)

    def _choose_threads(self) -> None:
        if self.device.type == "cpu":
            threads.use(self._spec.hidden)

    def _check_usable(self) -> None:
        self._check_loaded()
        if inside(self):
            raise VortexInputError(
                "on_step may not use the engine that calls it, which is still drawing. Keep a copy of the latents, and "
                "call the engine when generate has returned."
            )

    def _check_loaded(self) -> None:
        if not hasattr(self, "_memory"):
            raise VortexInputError("This engine was unloaded. Load the model again with Engine.load(...).")


def load_flux_schnell(model: str | Path = "tiny", **options: Any) -> Engine:
    """Short form of `Engine.load`, where every option is explained."""
    return Engine.load(model, **options)
