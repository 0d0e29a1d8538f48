"""The engine: load a model once, draw many pictures.

Here arguments are checked. What a call does is told in runtime/painter.py, how a model is loaded in runtime/loading.py,
what it works in in runtime/memory_manager.py, whose turn it is in runtime/turns.py, and on which thread in
device/worker.py.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..checkpoint.bundle import Bundle, open_bundle, open_pipeline
from ..checkpoint.cache import Cache
from ..device.jobs import warn
from ..device.select import resolve_device
from ..device.streams import blas_of
from ..device.vram import Ledger, snapshot
from ..device.worker import Worker, worker_of
from ..errors import NoEffectWarning, VortexInputError, quoted
from ..flux1.conditioning import Conditioning
from ..flux1.request import Request, check_callback, check_embeddings, check_latents, check_prompt, check_steps
from ..flux1.spec import DEFAULT_STEPS
from ..memory.offload import nbytes
from ..memory.planner import MemoryPlan
from . import loading
from .loading import OnLoad, ResolvedConfig
from .painter import OnStep, Painter
from .turns import Turns

if TYPE_CHECKING:
    from diffusers import FluxPipeline

log = logging.getLogger(__name__)


class Engine(Turns):
    """FLUX.1-schnell, resident: `Engine.load(...)` once, `generate(...)` many times.

    On a CUDA device torch never reserves more for it than `budget`: what does not fit stays in pinned host memory and
    streams, large pictures are decoded in strips, batches drawn in slices. All engines of a device work on one thread
    of its own: calls from any number of threads are served in the order in which they come.

    Attributes: `name`, `device`, `dtype`, `quantization`, `mode` as it runs, `native_size` (side in pixels the model
    was trained at), `last_seed`.
    """

    def __init__(self, bundle: Bundle, setup: ResolvedConfig, painter: Painter, worker: Worker) -> None:
        """Not for callers: use `Engine.load` or `Engine.from_pipeline`."""
        super().__init__(painter, worker)
        self.name, self.mode = bundle.name, setup.mode
        self.device, self.dtype, self.quantization = setup.device, setup.dtype, setup.quantization
        self.native_size = bundle.spec.vae.sample_size
        self.last_seed: int | None = None
        self._spec = bundle.spec.flux
        self._budgeted = setup.budget is not None

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
        check_callback("on_progress", on_progress)
        worker = worker_of(resolve_device(options[0]))

        def load() -> Engine:
            loading.check_options(worker.device, *options[1:])
            bundle = opened()  # before any memory is taken
            blas_of(worker.device).ensure(())  # before samples are multiplied, to see what it takes
            setup = ResolvedConfig.check(*options)
            return cls(bundle, setup, Painter.load(bundle, setup, capped, on_progress, cache), worker)

        release = worker.attach(load)  # so that the thread ends if the load fails
        try:
            return worker.run(load)
        finally:
            release()

    @property
    def step_time_bytes(self) -> int:
        """Bytes of the weights that every step needs: the transformer without modulation."""
        return nbytes(self._model.transformer)

    def encode(self, prompt: str, steps: int = DEFAULT_STEPS) -> Conditioning:
        """The `Conditioning` of a prompt, cached by its tokens; pass it to `generate` in place of the prompt.

        Raises `VortexInputError` for a prompt that is no text, or steps out of 1 to 8.
        """
        self._check_usable()
        check_prompt(prompt)
        number = check_steps(steps)
        return self._run(lambda painter: painter.encode(prompt, number))

    def condition(self, txt: Tensor, pooled: Tensor, steps: int = DEFAULT_STEPS) -> Conditioning:
        """A `Conditioning` from embeddings made elsewhere: T5's `[1, N, context]` and CLIP's pooled `[1, vec]`.

        Raises `VortexInputError` for other shapes, values that are not finite, or steps out of 1 to 8.
        """
        self._check_usable()
        number = check_steps(steps)
        check_embeddings(txt, pooled, self._spec.context, self._spec.vec)
        return self._run(lambda painter: painter.condition(txt, pooled, number))

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
        call works. It may not call this engine, nor wait for a thread or a call that does: such a call is given up
        with a `BusyError` when `on_step` has not returned for 10 seconds. `deadline`: seconds from now; a picture that
        is not done by then is given up at the next step, and one that still waits leaves the queue.

        Raises `VortexInputError` before any work, in a forked process too; `BusyError` where too many calls wait
        already; `DeadlineError`; `NotFiniteError` on the CPU, while on a GPU, which draws on when this returns, the log
        tells at the next call; and `MemoryPressureError` where the pictures do not fit the budget, or the card's memory
        ran out twice. The engine stays usable, but after a `DeviceLostError`.
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
        return await self._arun(job, deadline)

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
    ) -> Callable[[Painter], Tensor]:
        """Check what `generate` was given; the work that is to be done for it."""
        self._check_usable()
        if seed is None:
            seed = secrets.randbits(32)
            log.info("seed %d", seed)
        height = self.native_size if height is None else height
        width = self.native_size if width is None else width
        request = Request(seed, height, width, steps, batch_size)
        if isinstance(prompt, Conditioning):
            prompt.check(request.steps, self._spec, self.dtype)
        else:
            check_prompt(prompt)
        if out is not None:
            request.check_out(out, self.device)
        check_callback("on_step", on_step)
        if not isinstance(negative_prompt, str | None):
            raise VortexInputError(f"negative_prompt is a text, without effect, not {quoted(negative_prompt)}.")
        if negative_prompt:
            warn(
                "negative_prompt has no effect: FLUX.1-schnell draws at guidance 0, without a second pass.",
                NoEffectWarning,
            )

        def job(painter: Painter) -> Tensor:
            self.last_seed = request.seed
            return painter.paint(prompt, request, out, on_step)

        return job

    def warmup(self, height: int | None = None, width: int | None = None, batch_size: int = 1) -> None:
        """Draw once, for nothing: kernels are then compiled, and the step of this size is captured.

        So the first picture takes what later ones take. Sizes and errors as in `generate`.
        """

        job = self._drawing("warm-up", None, seed=0, height=height, width=width, batch_size=batch_size, steps=1)

        def draw(painter: Painter) -> None:
            seed = self.last_seed
            try:
                job(painter)
            finally:
                self.last_seed = seed

        self._run(draw)

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures, float32 `[B, H, W, 3]` in 0..1, of clean latents `[B, 16, H/8, W/8]` in the model's scale.

        Raises `VortexInputError` for another shape, or values in host memory that are not finite, and else as
        `generate`.
        """
        self._check_usable()
        check_latents(latents, self._spec.latent_channels)
        return self._run(lambda painter: painter.decode(latents))

    def limit(self, vram_budget: float) -> None:
        """Keep within another budget, in GB, from the next call on. Raises `VortexInputError` as `load` does."""
        memory = self._memory
        total = snapshot(self.device, process=False).total or None
        budget = loading.check_budget(vram_budget, total)
        if budget is None or vram_budget is None:
            raise VortexInputError("vram_budget is a number of GB (10^9 bytes), such as 6.5, not None.")
        if self._budgeted:
            memory.limit(budget)

    @property
    def budget(self) -> int | None:
        """Bytes that torch may reserve for this engine; None on the CPU, unless one was given."""
        memory = self._memory
        return int(memory.budget) if self._budgeted else None

    @property
    def plan(self) -> MemoryPlan:
        """The latest plan: where weights are, the arena's stages, slices and strips, the predicted peak."""
        return self._memory.plan

    @property
    def captured(self) -> tuple[tuple[int, int, int], ...]:
        """The sizes whose step is captured as a CUDA graph: pictures at once, text tokens, image tokens."""
        return self._memory.graphs.sizes

    @property
    def resident(self) -> bool:
        """False while everything is offloaded, and once it is unloaded."""
        painter = self._painter
        return painter is not None and painter.memory.placement.streamed is not None

    @property
    def ledger(self) -> Ledger:
        """Who holds what is reserved on the device, and pinned host memory."""
        painter = self._loaded()
        ledger = painter.memory.ledger
        return replace(ledger, pinned={**ledger.pinned, "prompts": painter.conditioner.pinned_bytes})

    @property
    def device_bytes(self) -> int:
        """Bytes on a CUDA device between calls, and so what `offload` frees: weights and working memory."""
        painter = self._painter
        return painter.memory.nbytes if painter is not None and self.device.type == "cuda" else 0

    @property
    def pinned_bytes(self) -> int:
        """Bytes of pinned host memory."""
        return sum(self.ledger.pinned.values())

    def offload(self) -> int:
        """Move everything to host memory and hand the VRAM back to the driver; the bytes freed.

        The next `generate` or `encode` brings it back (`resume`), and draws the same pictures, bit for bit.
        Nothing happens on the CPU, or when it is offloaded already. Raises `VortexInputError` in `on_step`.
        """

        if self._painter is None:
            return 0
        self._check_usable()

        def offload() -> int:
            freed = self.device_bytes
            if freed:
                self._memory.offload()
            return freed

        return self._worker.run(offload, owner=self) if self.device_bytes else 0

    def resume(self) -> None:
        """Bring an offloaded engine back to its device. Raises `MemoryPressureError`, still offloaded."""
        self._loaded()
        if not self.resident:
            self._run(lambda painter: None if self.resident else painter.memory.resume())


def load_flux_schnell(model: str | Path = "tiny", **options: Any) -> Engine:
    """Short form of `Engine.load`, where every option is explained."""
    return Engine.load(model, **options)
