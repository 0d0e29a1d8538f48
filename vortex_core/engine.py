"""The engine: load a model once, draw many pictures.

`generate` reads as the data flow: prompt to conditioning (prompt time), seed to noise, noise to clean latents
(step time), latents to a picture. How a model is loaded is told in loading.py, where its weights are in placement.py.
"""

from __future__ import annotations

import gc
import logging
import secrets
import threading
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import loading, sampling
from .allocator import round_up
from .checkpoint.bundle import Bundle, open_bundle, open_pipeline
from .checkpoint.cache import Cache
from .conditioning import Conditioner, Conditioning
from .errors import NoEffectWarning, VortexInputError
from .latency import mark
from .loading import OnLoad, Setup
from .planner import Demand, Plan
from .request import Request, check_embeddings, check_latents, check_prompt, check_steps
from .residency import nbytes
from .room import Room
from .spec import DEFAULT_STEPS, SIZE_MULTIPLE, T5_TOKENS
from .vae import decode
from .vram import Ledger, snapshot

if TYPE_CHECKING:
    from diffusers import FluxPipeline

log = logging.getLogger(__name__)

OnStep = Callable[[int, int, Tensor], None]


class Engine:
    """FLUX.1-schnell, resident: `Engine.load(...)` once, `generate(...)` many times.

    On a CUDA device torch never reserves more for it than `budget`: what does not fit stays in pinned host memory and
    streams, large pictures are decoded in strips, batches drawn in slices. Calls from several threads take turns.

    Attributes: `name`, `device`, `dtype`, `quantization`, `mode` as it runs, `native_size` (side in pixels the model
    was trained at), `last_seed`.
    """

    def __init__(self, bundle: Bundle, setup: Setup) -> None:
        """Not for callers: builds the modules on `meta`. Use `Engine.load` or `Engine.from_pipeline`."""
        self.name, self.mode = bundle.name, setup.mode
        self.device, self.dtype, self.quantization = setup.device, setup.dtype, setup.quantization
        self.native_size = bundle.vae.sample_size
        self.last_seed: int | None = None
        self._spec = bundle.flux
        self._backend = setup.backend
        self._model = loading.build(bundle, setup)
        self._transformer, self._decoder = self._model.transformer, self._model.decoder
        self._room = Room(self._model, setup)
        self._conditioner = Conditioner(
            (bundle.tokenizer, bundle.tokenizer_2),
            self._model.clip,
            self._model.t5,
            self._model.modulation,
            setup.device,
            staged=lambda: self._room.placement.prompt.open(),
        )
        self._lock = threading.RLock()

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
        setup = Setup.check(device, quantization, dtype, backend, vram_budget, mode)
        bundle = open_bundle(model, clip=clip, t5=t5, vae=vae, tokenizers=tokenizers)
        cache = Cache(None if cache_dir is None else Path(cache_dir).expanduser())
        return cls._load(bundle, setup, cap_process, on_progress, cache)

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
        setup = Setup.check(device, quantization, dtype, backend, vram_budget, mode)
        return cls._load(open_pipeline(pipe), setup, cap_process, on_progress, None)

    @classmethod
    def _load(
        cls, bundle: Bundle, setup: Setup, capped: bool, on_progress: OnLoad | None, cache: Cache | None
    ) -> Engine:
        engine = cls(bundle, setup)
        made = engine._room.plan = loading.first_plan(bundle.name, engine._model, setup)
        for kind, part in bundle.parts.items():
            log.info("%s: %s, %s", kind, part.words, part.tensors.where)
        try:
            if capped:
                engine._room.cap()
            with torch.inference_mode():
                loading.fill(engine._model, bundle, setup, made, engine._room.placement, on_progress, cache)
                engine._room.arrived()
            return engine
        except torch.OutOfMemoryError as error:
            engine.unload()
            # the traceback's frames would keep half-loaded tensors alive
            cause = error.with_traceback(None)
            raise loading.out_of_memory("Loading ran out of memory", setup.device, made) from cause
        except BaseException:  # a damaged file, Ctrl-C, an error of on_progress: nothing stays behind either
            engine.unload()
            raise

    @property
    def step_time_bytes(self) -> int:
        """Bytes of the weights that every step needs: the transformer without modulation."""
        return nbytes(self._transformer)

    @torch.inference_mode()
    def encode(self, prompt: str, steps: int = DEFAULT_STEPS) -> Conditioning:
        """The `Conditioning` of a prompt, cached by its tokens; pass it to `generate` in place of the prompt.

        Raises `VortexInputError` for an empty prompt or steps out of 1 to 8.
        """
        self._check_loaded()
        check_prompt(prompt)
        check_steps(steps)
        with self._lock:
            demand = self._model.prompt_demand(self._backend)
            return self._room.use(demand, lambda made: self._conditioner(prompt, steps))

    @torch.inference_mode()
    def condition(self, txt: Tensor, pooled: Tensor, steps: int = DEFAULT_STEPS) -> Conditioning:
        """A `Conditioning` from embeddings made elsewhere: T5's `[1, N, context]` and CLIP's pooled `[1, vec]`.

        Raises `VortexInputError` for other shapes, or steps out of 1 to 8.
        """
        self._check_loaded()
        check_steps(steps)
        check_embeddings(txt, pooled, self._spec.context, self._spec.vec)

        def condition(made: Plan | None) -> Conditioning:
            return self._conditioner.from_embeddings(
                txt.to(self.device, self.dtype), pooled.to(self.device, self.dtype), steps
            )

        with self._lock:
            return self._room.use(self._model.prompt_demand(self._backend), condition)

    @torch.inference_mode()
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
    ) -> Tensor:
        """Draw `batch_size` pictures; float32 `[B, H, W, 3]` in 0..1 on the engine's device.

        `seed`: None draws one, logs it and leaves it in `last_seed`; picture i starts from the noise of `seed + i`.
        `height`, `width`: pixels, multiples of 16 from 64 to 2048; default the model's native size. `steps`: 1 to 8.
        `negative_prompt` has no effect at guidance 0 and says so. `out`: a contiguous buffer the caller owns; it is
        checked, written in place and returned. `on_step(i, n, latents)` is called after step i of n with the clean
        latents predicted so far, `[B, 16, H/8, W/8]`; it may raise to cancel, and the next call works. It may not call
        this engine.

        Raises `VortexInputError` before any work, and `MemoryPressureError` where the pictures do not fit the budget,
        or the card's memory ran out twice; the engine stays usable.
        """
        self._check_loaded()
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
            warnings.warn(
                "negative_prompt has no effect: FLUX.1-schnell draws at guidance 0, without a second pass.",
                NoEffectWarning,
                stacklevel=3,
            )

        def draw(made: Plan | None) -> Tensor:
            pictures = self._buffer(*request.shape) if out is None else out
            conditioning = self._conditioner(prompt, steps) if isinstance(prompt, str) else prompt
            mark("prompt")
            latents = self._denoise(conditioning, request, on_step, made.slice if made else None, pictures)
            return decode(self._decoder, latents, pictures, made.demand.rows if made else None)

        with self._lock:
            self.last_seed = seed
            return self._room.use(self._demand(height, width, batch_size, tokens), draw)

    def warmup(self, height: int | None = None, width: int | None = None, batch_size: int = 1) -> None:
        """Draw once, for nothing: kernels are then compiled, and the step of this size is captured.

        So the first picture takes what later ones take. Sizes and errors as in `generate`.
        """
        with self._lock:
            seed = self.last_seed
            self.generate("warm-up", seed=0, height=height, width=width, batch_size=batch_size, steps=1)
            self.last_seed = seed

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Tensor:
        """Pictures, float32 `[B, H, W, 3]` in 0..1, of clean latents `[B, 16, H/8, W/8]` in the model's scale.

        Raises `VortexInputError` for another shape.
        """
        self._check_loaded()
        check_latents(latents, self._spec.latent_channels)
        batch, height, width = latents.shape[0], latents.shape[2] * 8, latents.shape[3] * 8

        def draw(made: Plan | None) -> Tensor:
            pictures = self._buffer(batch, height, width, 3)
            on_device = latents.to(self.device, torch.float32)
            return decode(self._decoder, on_device, pictures, made.demand.rows if made else None)

        with self._lock:
            # latents from elsewhere may have sizes that no picture of ours has
            demand = self._demand(round_up(height, SIZE_MULTIPLE), round_up(width, SIZE_MULTIPLE), batch)
            return self._room.use(demand and replace(demand, prompt=0, steps=((1, 0),), graphs=()), draw)

    def _denoise(
        self,
        conditioning: Conditioning,
        request: Request,
        on_step: OnStep | None,
        at_once: int | None,
        pictures: Tensor,
    ) -> Tensor:
        """Clean latents `[B, 16, H/8, W/8]`, fp32, at the start of the memory of `pictures`, which are still to come.

        In the workspace they would lie behind the buffers of the steps, in the middle of what decoding needs.
        """
        batch, height, width = request.batch_size, request.height, request.width
        place, tokens, at_once = self._room.placement, conditioning.txt.shape[1], at_once or batch

        def report(i: int, n: int, clean: Tensor) -> None:
            if on_step is not None:
                with place.workspace.outside():
                    on_step(i, n, sampling.unpack(clean, height, width))

        size = (at_once, tokens, sampling.image_tokens(height, width))
        rounds = conditioning.steps * -(-batch // at_once)
        with place.steps.open(rounds), self._room.plans.open(size, place.steps) as velocity:
            txt = self._transformer.txt_in(conditioning.txt.to(self.device, self.dtype, non_blocking=True))
            modulation = conditioning.modulation.to(self.device, self.dtype, non_blocking=True)
            cos, sin = sampling.rope_of(height, width, tokens, self._spec, self.device)
            pe = cos.to(self.device, non_blocking=True), sin.to(self.device, non_blocking=True)
            # last: the device copies the others while the host draws
            noise = sampling.noise(request.seed, batch, height, width, self._spec.latent_channels, self.device)
            img = sampling.pack(noise.to(self.device, non_blocking=True))
            mark("prepare")
            sampling.denoise(velocity, img, txt, modulation, pe, report if on_step else None, at_once)
            latents = sampling.unpack(img, height, width)
            return pictures.view(-1)[: latents.numel()].view(latents.shape).copy_(latents)

    def _buffer(self, *shape: int) -> Tensor:
        """A buffer that is handed out, so not in the workspace."""
        with self._room.placement.workspace.outside():
            return torch.empty(shape, device=self.device)

    def _demand(self, height: int, width: int, batch: int, tokens: int = T5_TOKENS) -> Demand | None:
        if self._room.budget is None:
            return None
        return self._model.demand(height, width, batch, tokens, self._backend)

    def limit(self, vram_budget: float) -> None:
        """Keep within another budget, in GB, from the next call on. Raises `VortexInputError` as `load` does."""
        self._check_loaded()
        if self._room.budget is not None:
            self._room.budget = loading.check_budget(vram_budget, snapshot(self.device, process=False).total or None)

    @property
    def budget(self) -> int | None:
        """Bytes that torch may reserve for this engine; None on the CPU."""
        self._check_loaded()
        return self._room.budget

    @property
    def plan(self) -> Plan | None:
        """The latest plan: where weights are, slices and strips, the predicted peak. None without a budget."""
        self._check_loaded()
        return self._room.plan

    @property
    def resident(self) -> bool:
        """False while everything is offloaded, and once it is unloaded."""
        return hasattr(self, "_room") and self._room.resident

    @property
    def ledger(self) -> Ledger:
        """Who holds what torch has reserved on the device."""
        self._check_loaded()
        return self._room.ledger

    @property
    def device_bytes(self) -> int:
        """Bytes on a CUDA device between calls, and so what `offload` frees: weights and working memory."""
        return self._room.nbytes if self.device.type == "cuda" and self.resident else 0

    @property
    def pinned_bytes(self) -> int:
        """Bytes of pinned host memory."""
        self._check_loaded()
        return self._room.placement.pinned_bytes

    def offload(self) -> int:
        """Move everything to host memory and hand the VRAM back to the driver; the bytes freed.

        The next `generate` or `encode` brings it back (`resume`), and draws the same pictures, bit for bit.
        Nothing happens on the CPU, or when it is offloaded already. Raises `VortexInputError` in `on_step`.
        """
        with self._lock:
            if self.resident:
                self._room.check_idle()
            freed = self.device_bytes
            if freed:
                self._room.offload()
            return freed

    def resume(self) -> None:
        """Bring an offloaded engine back to its device. Raises torch's `OutOfMemoryError`, still offloaded."""
        with self._lock:
            self._check_loaded()
            if not self.resident:
                self._room.resume()

    def unload(self) -> None:
        """Release every weight and buffer; the engine cannot draw any more. Loading again makes a new one."""
        with self._lock:
            if hasattr(self, "_room"):
                self._room.uncap()
            for name in ("_transformer", "_decoder", "_conditioner", "_backend", "_model", "_room"):
                self.__dict__.pop(name, None)
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exception: object) -> None:
        self.unload()

    def _check_loaded(self) -> None:
        if not hasattr(self, "_transformer"):
            raise VortexInputError("This engine was unloaded. Load the model again with Engine.load(...).")


def load_flux_schnell(model: str | Path = "tiny", **options: Any) -> Engine:
    """Short form of `Engine.load`, where every option is explained."""
    return Engine.load(model, **options)
