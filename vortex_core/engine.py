"""The engine: load a model once, draw many pictures.

`generate` reads as the data flow: prompt to conditioning (prompt time), seed to noise, noise to clean latents
(step time), latents to a picture.
"""

from __future__ import annotations

import gc
import logging
import secrets
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import sampling
from .checkpoint.bundle import Bundle, open_bundle, open_pipeline
from .checkpoint.cache import Cache
from .checkpoint.materialize import Target, check, materialize
from .checkpoint.tensors import Tensors
from .conditioning import Conditioner, Conditioning
from .device import resolve_device
from .errors import NoEffectWarning, VortexInitializationError, VortexInputError
from .latency import mark
from .linear import Backend, NF4Linear, choose_backend
from .request import Request, check_prompt, check_steps
from .residency import nbytes
from .spec import DEFAULT_STEPS, T5_TOKENS
from .transformer import Rope, Transformer
from .vae import Decoder, decode
from .vram import snapshot

if TYPE_CHECKING:
    from diffusers import FluxPipeline

log = logging.getLogger(__name__)

OnStep = Callable[[int, int, Tensor], None]
OnLoad = Callable[[int, int], None]
QUANTIZATIONS = ("nf4", "none")
ROPES = 8  # sizes whose rotary tables stay on the device, at most 2.2 MB each


class Engine:
    """FLUX.1-schnell, resident: `Engine.load(...)` once, `generate(...)` many times.

    Step-time weights stay on the device until `unload`. Prompt-time weights stay in pinned host memory on a CUDA
    device and stream through one staging buffer when a prompt is new. Calls from several threads take turns.

    Attributes: `name`, `device`, `dtype`, `quantization`, `native_size` (side in pixels the model was trained at),
    `last_seed`, `resident` (False while offloaded).
    """

    def __init__(self, bundle: Bundle, *, quantization: str, dtype: torch.dtype, backend: Backend | None) -> None:
        """Not for callers: builds the modules on `meta`. Use `Engine.load` or `Engine.from_pipeline`."""
        self.name = bundle.name
        self.dtype = dtype
        self.quantization = quantization
        self.native_size = bundle.vae.sample_size
        self.last_seed: int | None = None
        self._spec = bundle.flux
        self._backend = backend
        self._conditioner = Conditioner(bundle)
        with torch.device("meta"):
            self._transformer = Transformer(bundle.flux)
            self._decoder = Decoder(bundle.vae)
        self.resident = False
        self._ropes: OrderedDict[tuple[int, int, int], Rope] = OrderedDict()
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
        default the first CUDA device, else the CPU. `quantization`: `"nf4"`, or `"none"` to keep 16-bit weights.
        `dtype`: of the products; default bf16 on CUDA, fp32 on the CPU. `backend`: `"bitsandbytes"` or
        `"reference"`; default the fastest that works. `cache_dir`: where quantized weights are kept; default
        `$VORTEX_CACHE` or the user's cache folder. `on_progress(done, total)` is told bytes.

        Raises `VortexInputError`, `VortexDeviceError` and `VortexCheckpointError` before any device memory is
        taken, and `VortexInitializationError` (with figures) when memory runs out; then nothing stays behind.
        """
        where = resolve_device(device)
        _check_choice("quantization", quantization, QUANTIZATIONS)
        chosen = choose_backend(where, backend) if quantization == "nf4" else None
        bundle = open_bundle(model, clip=clip, t5=t5, vae=vae, tokenizers=tokenizers)
        cache = Cache(None if cache_dir is None else Path(cache_dir).expanduser())
        return cls._load(bundle, where, quantization, dtype, chosen, on_progress, cache)

    @classmethod
    def from_pipeline(
        cls,
        pipe: FluxPipeline,
        *,
        device: str | torch.device | None = None,
        quantization: str = "nf4",
        dtype: torch.dtype | None = None,
        backend: str | None = None,
        on_progress: OnLoad | None = None,
    ) -> Engine:
        """The door from diffusers: take the weights of a `FluxPipeline`, which stays as it is. Else as `load`."""
        where = resolve_device(device)
        _check_choice("quantization", quantization, QUANTIZATIONS)
        chosen = choose_backend(where, backend) if quantization == "nf4" else None
        return cls._load(open_pipeline(pipe), where, quantization, dtype, chosen, on_progress, None)

    @classmethod
    def _load(
        cls,
        bundle: Bundle,
        device: torch.device,
        quantization: str,
        dtype: torch.dtype | None,
        backend: Backend | None,
        on_progress: OnLoad | None,
        cache: Cache | None,
    ) -> Engine:
        dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
        engine = cls(bundle, quantization=quantization, dtype=dtype, backend=backend)
        for kind, part in bundle.parts.items():
            log.info("%s: %s, %s", kind, part.words, part.tensors.where)
        try:
            with torch.inference_mode():
                engine._fill(bundle, device, on_progress, cache if backend is not None else None)
            return engine
        except torch.OutOfMemoryError as error:
            needed = nbytes(engine._transformer, engine._decoder)
            engine.unload()
            failure = _out_of_memory(device, needed)
            # the traceback's frames would keep half-loaded tensors alive
            raise failure from error.with_traceback(None)

    def _fill(self, bundle: Bundle, device: torch.device, on_progress: OnLoad | None, cache: Cache | None) -> None:
        self.device = device
        sources = {kind: part.tensors for kind, part in bundle.parts.items()}
        done, total = 0, self._check(sources)

        def progress(count: int) -> None:
            nonlocal done
            done += count
            if on_progress is not None:
                on_progress(min(done, total), total)

        target = Target(device, self.dtype, self._backend, progress)
        if cache is not None:
            # a part that must be quantized first is read once for that, and its result once more
            total += sum(part.nbytes for kind, part in bundle.parts.items() if cache.lacks(part, kind))
            for kind, modules in (("transformer", self._modules()), ("t5", self._conditioner.t5.modules)):
                sources[kind] = cache.quantized(bundle.parts[kind], kind, modules, target)
            total = done + self._check(sources)
        materialize(self._transformer, sources["transformer"], target)
        materialize(self._decoder, sources["vae"], Target(device, self.dtype, None, progress))
        self._conditioner.load(sources, target)
        self.resident = True
        self._reserve()
        if device.type == "cuda":
            torch.cuda.empty_cache()  # what quantizing left cached is nobody's, and counts against the card
        memory = snapshot(device)
        log.info(
            "Loaded %s: %.2f GB of step-time weights on %s, torch reserved %.2f GB",
            self.name,
            self.step_time_bytes / 1e9,
            device,
            memory.reserved / 1e9,
        )

    def _check(self, sources: Mapping[str, Tensors]) -> int:
        """Compare every part with its source's headers; the bytes to read."""
        return (
            self._conditioner.check(sources)
            + check(self._transformer, sources["transformer"])
            + check(self._decoder, sources["vae"])
        )

    def _modules(self) -> list[tuple[nn.Module, str]]:
        """What the transformer's file holds: its step-time and its prompt-time half."""
        return [(self._transformer, ""), (self._conditioner.modulation, "")]

    @property
    def step_time_bytes(self) -> int:
        """Bytes of the weights that stay on the device for every step: the transformer without modulation."""
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
            self.resume()
            return self._conditioner(prompt, steps)

    @torch.inference_mode()
    def condition(self, txt: Tensor, pooled: Tensor, steps: int = DEFAULT_STEPS) -> Conditioning:
        """A `Conditioning` from embeddings made elsewhere: T5's `[1, N, context]` and CLIP's pooled `[1, vec]`.

        Raises `VortexInputError` for other shapes, or steps out of 1 to 8.
        """
        self._check_loaded()
        check_steps(steps)
        if txt.ndim != 3 or txt.shape[0] != 1 or txt.shape[2] != self._spec.context:
            raise VortexInputError(
                f"txt must be [1, tokens, {self._spec.context}] (T5 embeddings), not {list(txt.shape)}."
            )
        if tuple(pooled.shape) != (1, self._spec.vec):
            raise VortexInputError(f"pooled must be [1, {self._spec.vec}] (from CLIP), not {list(pooled.shape)}.")
        with self._lock:
            self.resume()
            return self._conditioner.from_embeddings(
                txt.to(self.device, self.dtype), pooled.to(self.device, self.dtype), steps
            )

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
        `negative_prompt` has no effect at guidance 0 and says so. `out`: a buffer the caller owns; it is checked,
        written in place and returned. `on_step(i, n, latents)` is called after step i of n with the clean latents
        predicted so far, `[B, 16, H/8, W/8]`; it may raise to cancel, and the next call works.

        Raises `VortexInputError` before any work.
        """
        self._check_loaded()
        if seed is None:
            seed = secrets.randbits(32)
            log.info("seed %d", seed)
        height = self.native_size if height is None else height
        width = self.native_size if width is None else width
        request = Request(seed, height, width, steps, batch_size)
        if isinstance(prompt, Conditioning):
            prompt.check(steps)
        else:
            check_prompt(prompt)
        if out is None:
            out = torch.empty(request.shape, device=self.device)
        else:
            request.check_out(out, self.device)
        if negative_prompt:
            warnings.warn(
                "negative_prompt has no effect: FLUX.1-schnell draws at guidance 0, without a second pass.",
                NoEffectWarning,
                stacklevel=3,
            )
        with self._lock:
            self.resume()
            self.last_seed = seed
            conditioning = self._conditioner(prompt, steps) if isinstance(prompt, str) else prompt
            mark("prompt")
            noise = sampling.noise(seed, batch_size, request.height, request.width, self._spec.latent_channels)
            latents = self._denoise(conditioning, noise, on_step)
            return decode(self._decoder, latents, out)

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Tensor:
        """Pictures, float32 `[B, H, W, 3]` in 0..1, of clean latents `[B, 16, H/8, W/8]` in the model's scale.

        Raises `VortexInputError` for another shape.
        """
        self._check_loaded()
        if latents.ndim != 4 or latents.shape[1] != self._spec.latent_channels:
            raise VortexInputError(
                f"latents must be [B, {self._spec.latent_channels}, H/8, W/8], not {list(latents.shape)}."
            )
        batch, _, rows, columns = latents.shape
        with self._lock:
            self.resume()
            out = torch.empty(batch, rows * 8, columns * 8, 3, device=self.device)
            return decode(self._decoder, latents.to(self.device, torch.float32), out)

    def _denoise(self, conditioning: Conditioning, noise: Tensor, on_step: OnStep | None) -> Tensor:
        """Noise `[B, 16, H/8, W/8]` to clean latents of that shape, fp32 on the device."""
        batch, _, rows, columns = noise.shape
        height, width = rows * 8, columns * 8
        txt = conditioning.txt.to(self.device, self.dtype)
        modulation = conditioning.modulation.to(self.device, self.dtype)
        txt = self._transformer.txt_in(txt).expand(batch, -1, -1)
        pe = self._rope(height, width, txt.shape[1])

        def report(i: int, n: int, clean: Tensor) -> None:
            if on_step is not None:
                on_step(i, n, sampling.unpack(clean, height, width))

        img = sampling.pack(noise).to(self.device)
        mark("prepare")
        sampling.denoise(self._transformer, img, txt, modulation, pe, report if on_step else None)
        return sampling.unpack(img, height, width)

    @property
    def device_bytes(self) -> int:
        """Bytes on a CUDA device between calls, and so what `offload` frees: weights, staging buffer, workspace."""
        if self.device.type != "cuda" or not self.resident:
            return 0
        staging = self._conditioner.staging.nbytes if self._conditioner.staging else 0
        ropes = sum(table.numel() * table.element_size() for rope in self._ropes.values() for table in rope)
        return nbytes(*self._on_device()) + staging + (self._backend.nbytes if self._backend else 0) + ropes

    def offload(self) -> int:
        """Move everything to host memory and hand the VRAM back to the driver; the bytes freed.

        The next `generate` or `encode` brings it back (`resume`), and draws the same pictures, bit for bit.
        Nothing happens on the CPU, or when it is offloaded already.
        """
        with self._lock:
            freed = self.device_bytes
            if freed:
                self._move(torch.device("cpu"))
                if self._conditioner.staging:
                    self._conditioner.staging.release()
                if self._backend is not None:
                    self._backend.release()
                self._ropes.clear()
                self.resident = False
                torch.cuda.empty_cache()
            return freed

    def resume(self) -> None:
        """Bring an offloaded engine back to its device. Raises torch's `OutOfMemoryError`, still offloaded."""
        with self._lock:
            self._check_loaded()
            if self.resident:
                return
            self.resident = True
            try:
                with torch.inference_mode():
                    self._move(self.device)
                    if self._conditioner.staging:
                        self._conditioner.staging.allocate()
                    self._reserve()
            except torch.OutOfMemoryError:
                self.offload()
                raise

    def _on_device(self) -> list[nn.Module]:
        return [self._transformer, self._decoder, *self._conditioner.resident]

    def _move(self, device: torch.device) -> None:
        for module in self._on_device():
            module.to(device)

    def _reserve(self) -> None:
        """Make the buffers that every picture needs: the decode workspace and the native size's positions."""
        if self._backend is not None:
            self._backend.reserve(self._largest_linear(), self.dtype)
        self._rope(self.native_size, self.native_size, T5_TOKENS)

    def unload(self) -> None:
        """Release every weight and buffer; the engine cannot draw any more. Loading again makes a new one."""
        with self._lock:
            cuda = hasattr(self, "device") and self.device.type == "cuda"
            for name in ("_transformer", "_decoder", "_conditioner", "_backend", "_ropes"):
                self.__dict__.pop(name, None)
            gc.collect()
            if cuda:
                torch.cuda.empty_cache()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exception: object) -> None:
        self.unload()

    def _rope(self, height: int, width: int, tokens: int) -> Rope:
        key = (height, width, tokens)
        if key not in self._ropes:
            ids = sampling.positions(height, width, tokens)
            self._ropes[key] = sampling.rope(ids, self._spec, self.device)
            if len(self._ropes) > ROPES:
                self._ropes.popitem(last=False)
        self._ropes.move_to_end(key)
        return self._ropes[key]

    def _largest_linear(self) -> int:
        modules = (self._transformer, self._conditioner.modulation, *self._conditioner.t5.units)
        linears = (part for module in modules for part in module.modules() if isinstance(part, NF4Linear))
        return max(2 * linear.packed.numel() for linear in linears)

    def _check_loaded(self) -> None:
        if not hasattr(self, "_transformer"):
            raise VortexInputError("This engine was unloaded. Load the model again with Engine.load(...).")


def load_flux_schnell(model: str | Path = "tiny", **options: Any) -> Engine:
    """Short form of `Engine.load`, where every option is explained."""
    return Engine.load(model, **options)


def _out_of_memory(device: torch.device, needed: int) -> VortexInitializationError:
    memory = snapshot(device)
    return VortexInitializationError(
        f"Loading ran out of memory on {device}",
        needed=needed,
        free=memory.free,
        total=memory.total,
        allocated=memory.allocated,
        remedy="Close other programs that use the card (`nvidia-smi` lists them) or unload other models, and retry.",
    )


def _check_choice(what: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise VortexInputError(f"Unknown {what} {value!r}; choose from {', '.join(choices)}.")
