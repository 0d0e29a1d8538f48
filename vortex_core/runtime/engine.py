"""The engine: load a model once, draw many pictures.

This file checks arguments. runtime/painter.py draws, runtime/loading.py loads, runtime/memory_manager.py manages the
memory, runtime/turns.py orders the calls, and device/worker.py has the thread that they run on.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
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
from ..errors import NoEffectWarning, VortexInputError
from ..flux1.conditioning import Conditioning, check_conditioning
from ..flux1.nag import Nag, check_nag
from ..flux1.request import (
    DEFAULT_STRENGTH,
    Request,
    check_callback,
    check_embeddings,
    check_latents,
    check_prompt,
    check_sigmas,
    check_size,
    check_steps,
)
from ..flux1.schedule import timesteps
from ..flux1.spec import DEFAULT_STEPS, T5_TOKENS
from ..flux1.start import check_encodable, check_start
from ..flux1.texts import Texts
from ..memory.offload import nbytes
from ..memory.planner import MemoryPlan, make_plan
from . import loading
from .embeds import Embeds
from .lending import Lent
from .loading import OnLoad, ResolvedConfig
from .lora_files import LoraFiles, Pairs
from .painter import OnStep, Painter
from .turns import Result

if TYPE_CHECKING:
    from diffusers import FluxPipeline

log = logging.getLogger(__name__)

Prompt = str | Conditioning


class Engine(Embeds):
    """FLUX.1-schnell, resident: `Engine.load(...)` once, `generate(...)` many times.

    On a CUDA device torch never reserves more for it than `budget`: weights that do not fit stay in pinned host memory
    and stream, large pictures are decoded in strips, batches are drawn in slices. All engines of a device share one
    thread. Calls may come from any number of threads and are served in the order of arrival.

    Attributes: `name`, `device`, `dtype`, `quantization`, `mode` (the one in use), `precision` (what that means here:
    `"exact"`, `"int8"` or `"fp8"`), `precision_reason` (why that one and no other), `native_size` (the side in pixels
    that the model was trained at), `spec` (all sizes of the model), `last_seed`.
    """

    def __init__(self, bundle: Bundle, setup: ResolvedConfig, painter: Painter, worker: Worker) -> None:
        """Not for callers: use `Engine.load` or `Engine.from_pipeline`."""
        super().__init__(painter, worker)
        self.name, self.mode = bundle.name, setup.mode
        self.precision, self.precision_reason = setup.precision.name, setup.choice.reason
        self.device, self.dtype, self.quantization = setup.device, setup.dtype, setup.quantization
        self.native_size = bundle.spec.vae.sample_size
        self.last_seed: int | None = None
        self.spec, self._spec = bundle.spec, bundle.spec.flux
        self._lora_files, self._loras = LoraFiles(bundle.spec), ()
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
        engine at its peak, everything included; default 6.5, or on a smaller card its size less 1. `cap_process`:
        torch then refuses more to the whole process, so that the budget always holds; use it only if the process is
        yours. `mode`: `"fast"` multiplies in the fastest 8 bits of the card: int8 on compute capability 8.0 to 8.9 (RTX
        30 and 40), fp8 on 9.0, with attention in fp8, and what is faster on a sample elsewhere. Where neither can run,
        the mode is `"exact"` (16-bit products), and the log says why. `"int8"` and `"fp8"` ask for one by name, and are
        refused where it cannot run; on the CPU they run in plain torch, slowly. `quantization`: `"nf4"`, or `"none"` to
        keep 16-bit weights. `dtype`: that of the products; default bf16 on CUDA, fp32 on the CPU. `backend`:
        `"triton"`, `"nvrtc"`, `"bitsandbytes"` or `"reference"`; default the fastest that works. `cache_dir`: where
        quantized weights are kept; default `$VORTEX_CACHE` or the user's cache folder. `on_progress(done, total)` gets
        bytes.

        Raises `VortexInputError`, `VortexDeviceError` and `VortexCheckpointError` before it takes device memory, and
        `VortexInitializationError` (with figures) when memory runs out; then nothing stays in memory.
        """
        cache, options = Cache(cache_dir), (device, quantization, dtype, backend, vram_budget, mode)
        bundle = partial(open_bundle, model, clip=clip, t5=t5, vae=vae, tokenizers=tokenizers)
        return cls._load(bundle, options, cap_process, on_progress, cache)

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
        """Take the weights of a diffusers `FluxPipeline`, which stays as it is. Options and errors as in `load`."""
        options = (device, quantization, dtype, backend, vram_budget, mode)
        return cls._load(partial(open_pipeline, pipe), options, cap_process, on_progress, None)

    @classmethod
    def _load(
        cls,
        open_model: Callable[[], Bundle],
        options: tuple[Any, ...],
        capped: bool,
        on_progress: OnLoad | None,
        cache: Cache | None,
    ) -> Engine:
        check_callback("on_progress", on_progress)
        worker = worker_of(resolve_device(options[0]))

        def load() -> Engine:
            loading.check_options(worker.device, *options[1:])
            bundle = open_model()  # before any memory is taken
            blas_of(worker.device).ensure(())  # before the kernels are tried, to measure what a workspace takes
            setup = ResolvedConfig.check(*options)
            return cls(bundle, setup, Painter.load(bundle, setup, capped, on_progress, cache), worker)

        release = worker.attach(load)  # the thread ends if the load fails
        try:
            return worker.run(load)
        finally:
            release()

    @property
    def step_time_bytes(self) -> int:
        """Bytes of the weights that every step needs: the transformer without modulation."""
        return nbytes(self._model.transformer)

    def encode(
        self,
        prompt: str,
        steps: int = DEFAULT_STEPS,
        loras: Pairs | None = None,
        *,
        sigmas: Sequence[float] | None = None,
    ) -> Conditioning:
        """The `Conditioning` of a prompt, cached by its tokens; `generate` takes it in place of the prompt.

        `sigmas`: noise levels from 0 to 1, in place of those of `steps`. `loras` as in `generate`. Raises as
        `set_loras`, and `VortexInputError` for another prompt, steps or sigmas.
        """
        self._check_usable()
        check_prompt(prompt)
        levels, chosen = _levels(steps, sigmas), self._lora_files.of_call(loras, self._loras)
        return self._run(lambda painter: painter.encode(prompt, levels, chosen))

    def condition(
        self,
        txt: Tensor,
        pooled: Tensor,
        steps: int = DEFAULT_STEPS,
        loras: Pairs | None = None,
        *,
        sigmas: Sequence[float] | None = None,
    ) -> Conditioning:
        """A `Conditioning` from embeddings made elsewhere: T5's `[1, N, context]` and CLIP's pooled `[1, vec]`.

        `sigmas` and `loras` as in `encode`. Raises `VortexInputError` for other shapes, steps or sigmas, and values
        that are not finite.
        """
        self._check_usable()
        levels, chosen = _levels(steps, sigmas), self._lora_files.of_call(loras, self._loras)
        check_embeddings(txt, pooled, self._spec.context, self._spec.vec)
        return self._run(lambda painter: painter.condition(txt, pooled, levels, chosen))

    def schedule(self, conditioning: Conditioning, sigmas: Sequence[float], loras: Pairs | None = None) -> Conditioning:
        """The same text for other noise levels, from 0 to 1: one pass of modulation. The latest few are kept.

        `loras`: those that the Conditioning was encoded with; default those of `set_loras`. Raises `VortexInputError`
        for other sigmas, and a Conditioning of another model.
        """
        self._check_usable()
        levels, chosen = check_sigmas(sigmas), self._lora_files.of_call(loras, self._loras)
        check_conditioning(conditioning, self._spec, self.dtype)
        return self._run(lambda painter: painter.schedule(conditioning, levels, chosen))

    def velocity(
        self,
        latents: Tensor,
        sigma: float,
        conditioning: Conditioning,
        loras: Pairs | None = None,
        *,
        negative: Conditioning | None = None,
        nag: float | Nag = 0.0,
    ) -> Tensor:
        """What the transformer says of noisy latents: one step of a sampler of one's own.

        `latents` `[B, 16, H/8, W/8]` in the model's scale, all at the noise level `sigma` (0 to 1), which are noise
        times sigma plus clean latents times 1 - sigma. The velocity, fp32, of the same shape on the engine's device, is
        noise less clean latents. A level that the Conditioning has not is computed first: `schedule` does that for all
        steps in one pass. `loras` as in `generate`; so is `nag`, which leads away from `negative`. Raises
        `VortexInputError` for other shapes or levels, and as `generate`.
        """
        self._check_usable()
        check_latents(latents, self._spec.latent_channels)
        check_size(8 * latents.shape[2], 8 * latents.shape[3])
        (level,) = check_sigmas((sigma,))
        strength = check_nag(nag)
        if (strength is None) != (negative is None):
            raise VortexInputError("nag needs a negative Conditioning to lead away from, and that needs nag.")
        for text in (conditioning, *([] if negative is None else [negative])):
            check_conditioning(text, self._spec, self.dtype)
        chosen = self._lora_files.of_call(loras, self._loras)
        texts = Texts([conditioning], negative, nag=strength)
        return self._run(lambda painter: painter.velocity(latents, level, texts, chosen))

    @property
    def loras(self) -> tuple[tuple[str, float], ...]:
        """The LoRAs that pictures are drawn with by default: paths and strengths."""
        return tuple((file.path, strength) for file, strength in self._loras) if self._loaded() else ()

    def unload(self) -> None:
        """See `Turns.unload`; the files of LoRAs, too."""
        super().unload()
        self._loras = self._lora_files.forget()

    def set_loras(self, loras: Pairs) -> None:
        """Draw with these from now on: pairs of a file and a strength; after none as before, bit for bit.

        Raises `VortexInputError`; `VortexCheckpointError` for a file that is damaged, of another model, or not
        understood; `MemoryPressureError` where they do not fit the budget. Then all stays as it was.
        """
        self._check_usable()
        chosen = self._lora_files.choose(loras)
        self._run(lambda painter: painter.use_loras(chosen))
        self._loras = chosen

    def generate(
        self,
        prompt: Prompt | Sequence[Prompt],
        negative_prompt: Prompt | None = None,
        *,
        seed: int | None = None,
        height: int | None = None,
        width: int | None = None,
        steps: int = DEFAULT_STEPS,
        batch_size: int | None = None,
        out: Tensor | None = None,
        on_step: OnStep | None = None,
        loras: Pairs | None = None,
        deadline: float | None = None,
        image: Tensor | None = None,
        strength: float | None = None,
        mask: Tensor | None = None,
        guidance: float = 0.0,
        nag: float | Nag = 0.0,
        sigmas: Sequence[float] | None = None,
    ) -> Tensor:
        """Draw `batch_size` pictures; float32 `[B, H, W, 3]` in 0..1 on the engine's device.

        `prompt`: a text or a Conditioning, or a list with one for each picture. `seed`: picture i starts from the noise
        of `seed + i`; None draws a seed, logs it and keeps it in `last_seed`. `height`, `width`: pixels, multiples of
        16 from 64 to 2048; default those of `image`, else the model's native size. `steps`: 1 to 8, evenly spaced;
        `sigmas`: other noise levels, which fall from at most 1 to 0. `out`: the caller's contiguous buffer, which is
        checked, written in place and returned. `on_step(i, n, latents)` is called after step i of n, on the caller's
        own thread, with the clean latents `[B, 16, H/8, W/8]` predicted so far. It may raise to cancel; the next call
        works. It must not call this engine, nor wait for a thread or a call that does: such a call ends with a
        `BusyError` once `on_step` has run for 10 seconds. `deadline`: seconds from now. A picture that is not done by
        then stops at the next step; a call that still waits leaves the queue. `loras`: those for this call alone, in
        place of `set_loras`; a Conditioning has those that it was encoded with.

        `image` `[1 or B, H, W, 3]` in 0..1: a picture to begin from. `strength`: how much of it is drawn anew, above 0
        to 1: it begins at this noise level, and takes that share of `steps`, rounded up. Default 0.6, with a mask 1.
        `mask` `[H, W]` or `[1 or B, H, W]` in 0..1: where the image is drawn anew; where it is 0, the image stays as it
        is, bit for bit. `guidance` above 1: each step runs twice, and is led away from `negative_prompt` (which may be
        empty) by that factor; twice the time. `nag`: normalized attention guidance, which does the same inside
        attention and in a part of that time; schnell heeds it in 4 steps. A scale from 1 to 50, such as 5, or a `Nag`.
        schnell is made without either, and then `negative_prompt` has no effect, and a warning says so.

        Raises `VortexInputError` before any work, also in a forked process; `BusyError` where too many calls wait
        already; `DeadlineError`; `MemoryPressureError` where the pictures do not fit the budget, or memory ran out
        twice; `NotFiniteError` on the CPU. A GPU still draws when this returns: there the log reports values that are
        not finite at the next call. The engine stays usable, except after a `DeviceLostError`.
        """
        job = self._job(
            prompt, negative_prompt, seed=seed, height=height, width=width, steps=steps, batch_size=batch_size,
            out=out, on_step=on_step, loras=loras, image=image, strength=strength, mask=mask, guidance=guidance,
            nag=nag, sigmas=sigmas,
        )  # fmt: skip
        return self._run(job, deadline)

    async def agenerate(
        self,
        prompt: Prompt | Sequence[Prompt],
        negative_prompt: Prompt | None = None,
        *,
        deadline: float | None = None,
        **options: Any,
    ) -> Tensor:
        """`generate`, awaited: the event loop runs meanwhile. A task that is cancelled stops its picture.

        Options and errors as in `generate`. `on_step` is called on the engine's thread, in a copy of the caller's
        context. It must not wait until the event loop has used an engine of this device.
        """
        return await self._arun(self._job(prompt, negative_prompt, **options), deadline)

    def _job(
        self,
        prompt: Prompt | Sequence[Prompt],
        negative_prompt: Prompt | None,
        *,
        seed: int | None = None,
        height: int | None = None,
        width: int | None = None,
        steps: int = DEFAULT_STEPS,
        batch_size: int | None = None,
        out: Tensor | None = None,
        on_step: OnStep | None = None,
        loras: Pairs | None = None,
        image: Tensor | None = None,
        strength: float | None = None,
        mask: Tensor | None = None,
        guidance: float = 0.0,
        nag: float | Nag = 0.0,
        sigmas: Sequence[float] | None = None,
    ) -> Callable[[Painter], Tensor]:
        """Check the arguments of `generate`; the work to do for it."""
        self._check_usable()
        if seed is None:
            seed = secrets.randbits(32)
            log.info("seed %d", seed)
        prompts = self._prompts(prompt)
        if batch_size is None:
            batch_size = len(prompts)
        start = check_start(image, mask, strength, height, width, batch_size)
        if start is not None:
            self._model.check_encoder()
        size = (self.native_size,) * 2 if start is None else start.size
        height, width = (own if side is None else side for own, side in zip(size, (height, width), strict=True))
        if strength is None:
            strength = 1.0 if start is None or mask is not None or sigmas is not None else DEFAULT_STRENGTH
        led = guidance, check_nag(nag)
        request = Request(seed, height, width, steps, batch_size, sigmas, strength, *led)  # type: ignore[arg-type]
        if len(prompts) not in (1, request.batch_size):
            raise VortexInputError(f"{len(prompts)} prompts for {request.batch_size} pictures: give one, or one each.")
        if out is not None:
            request.check_out(out, self.device)
        check_callback("on_step", on_step)
        if request.avoids:
            prompts += self._prompts("" if negative_prompt is None else negative_prompt)
        elif negative_prompt is not None:
            self._prompts(negative_prompt)
            if negative_prompt:
                warn(
                    "negative_prompt has no effect without guidance, as schnell is made. With nag at 5 it has, or with "
                    "guidance above 1, where each step runs twice.",
                    NoEffectWarning,
                )
        chosen = self._lora_files.of_call(loras, self._loras)

        def job(painter: Painter) -> Tensor:
            self.last_seed = request.seed
            painter.use_loras(chosen)
            return painter.paint(prompts, request, out, on_step, start)

        return job

    def _prompts(self, prompt: Prompt | Sequence[Prompt]) -> list[Prompt]:
        """A caller's prompt or prompts, checked."""
        prompts: list[Prompt] = list(prompt) if isinstance(prompt, list | tuple) else [prompt]  # type: ignore[list-item]
        if not prompts:
            raise VortexInputError("The list of prompts is empty.")
        for one in prompts:
            if isinstance(one, Conditioning):
                check_conditioning(one, self._spec, self.dtype)
            else:
                check_prompt(one)
        return prompts

    def warmup(self, height: int | None = None, width: int | None = None, batch_size: int = 1) -> None:
        """Draw one picture and drop it, which compiles the kernels and captures the step of this size.

        The first picture then takes as long as later ones. Sizes and errors as in `generate`.
        """
        job = self._job("warm-up", None, seed=0, height=height, width=width, batch_size=batch_size, steps=1)

        def draw(painter: Painter) -> None:
            seed = self.last_seed
            try:
                job(painter)
            finally:
                self.last_seed = seed

        self._run(draw)

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures, float32 `[B, H, W, 3]` in 0..1, of clean latents `[B, 16, H/8, W/8]` in the model's scale.

        Raises `VortexInputError` for another shape, and latents on the host that are not finite; else as `generate`.
        """
        self._check_usable()
        check_latents(latents, self._spec.latent_channels)
        return self._run(lambda painter: painter.decode(latents))

    def encode_image(self, pictures: Tensor) -> Tensor:
        """Latents, float32 `[B, 16, H/8, W/8]` in the model's scale, of pictures `[B, H, W, 3]` in 0..1.

        They are on the engine's device, and what `decode` takes; the same picture always has the same ones. Height and
        width: multiples of 8, and at most as many pixels as 2048 x 2048 have. Raises `VortexInputError` for other
        pictures, and `VortexCheckpointError` where the model's VAE has no encoder; else as `generate`.
        """
        self._check_usable()
        given = check_encodable(pictures)
        self._model.check_encoder()
        return self._run(lambda painter: painter.encode_image(given))

    def lend(
        self,
        work: Callable[[Lent], Result],
        height: int,
        width: int,
        batch_size: int = 1,
        tokens: int = T5_TOKENS,
        loras: Pairs | None = None,
    ) -> Result:
        """Do `work(lent)` on the engine's thread, where it can multiply by the transformer's weights; its result.

        `lent` (runtime/lending.py) gives products and norms by canonical names, and is of no use once `work` returns.
        `height` and `width` in pixels, `tokens` of text: those of the pictures whose activations `work` allocates,
        which are planned into the budget. `loras` as in `generate`. Where memory runs out, `work` is called once more.
        Raises what `work` raises; `VortexInputError` for other LoRAs and after `unload`;
        `MemoryPressureError` where the activations do not fit the budget.
        """
        self._check_usable()
        chosen = self._lora_files.of_call(loras, self._loras)
        return self._run(lambda painter: painter.lend(work, height, width, batch_size, tokens, chosen))

    def peak_bytes(self, height: int, width: int, batch_size: int = 1, tokens: int = T5_TOKENS) -> int:
        """Bytes on the device at the peak of steps of these pictures, weights included; at most the budget.

        `height` and `width` in pixels, `tokens` of text. The larger of two plans: that of `velocity`, and that of code
        which `lend` calls. Raises `VortexInputError` after `unload`.
        """
        memory, sizes = self._memory, (height, width, batch_size, tokens)
        model, groups = memory.model, memory.model.sizes
        asked = (model.requirements(*sizes, memory.blas), model.lent_requirements(*sizes, memory.blas))
        plans = [make_plan(groups, each, memory.budget) for each in asked]
        return int(max(memory.budget if plan is None else plan.peak for plan in plans))

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
        """The latest plan: where the weights are, the arena's stages, slices, strips, the predicted peak."""
        return self._memory.plan

    @property
    def captured(self) -> tuple[tuple[int, int, int], ...]:
        """The sizes whose step is captured as a CUDA graph: pictures at a time, text tokens, image tokens."""
        return self._memory.graphs.sizes

    @property
    def resident(self) -> bool:
        """False while everything is offloaded, and after `unload`."""
        painter = self._painter
        return painter is not None and painter.memory.placement.streamed is not None

    @property
    def ledger(self) -> Ledger:
        """What holds the memory reserved on the device, and pinned host memory."""
        ledger = (painter := self._loaded()).memory.ledger
        return replace(ledger, pinned={**ledger.pinned, "prompts": painter.conditioner.pinned_bytes})

    @property
    def device_bytes(self) -> int:
        """Bytes that `offload` frees on a CUDA device: weights and working memory."""
        painter = self._painter
        return painter.memory.nbytes if painter is not None and self.device.type == "cuda" else 0

    @property
    def pinned_bytes(self) -> int:
        """Bytes of pinned host memory."""
        return sum(self.ledger.pinned.values())

    def offload(self) -> int:
        """Move everything to host memory and give the VRAM back to the driver; the bytes freed.

        The next `generate` or `encode` brings everything back, as `resume` does; pictures stay the same, bit for bit.
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
        """Bring an offloaded engine back to its device. Raises `MemoryPressureError`; then it stays offloaded."""
        self._loaded()
        if not self.resident:
            self._run(lambda painter: None if self.resident else painter.memory.resume())


def load_flux_schnell(model: str | Path = "tiny", **options: Any) -> Engine:
    """`Engine.load`, where every option is explained."""
    return Engine.load(model, **options)


def _levels(steps: int, sigmas: Sequence[float] | None) -> tuple[float, ...]:
    """The noise levels of a schedule's steps."""
    return timesteps(check_steps(steps))[:-1] if sigmas is None else check_sigmas(sigmas)
