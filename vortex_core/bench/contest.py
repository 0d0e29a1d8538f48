"""Times Vortex and its peers in one process, with the same weights, embeddings, noise and card.

Each contender is alone on the device while it draws. A picture's time is what its user waits for: from the call, with
the prompt already encoded, until the picture is finished on the device.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..checkpoint.bundle import describe
from ..checkpoint.pipeline import part_of
from ..device.vram import graph_memory
from ..flux1 import sampling
from ..flux1.spec import DEFAULT_STEPS, T5_TOKENS, FluxSpec
from ..runtime.engine import Engine
from ..utils.inference_mode import inference_mode
from ..utils.timing import Latency, Stopwatch, summarize
from . import roofline
from .machine import machine
from .peers import (
    Contender,
    Diffusers,
    Job,
    Looped,
    Vortex,
    comfy_velocity,
    diffusers_velocity,
    diffusers_weights,
    nf4_transformer,
)
from .random_model import random_pipeline

if TYPE_CHECKING:
    from diffusers import FluxPipeline

log = logging.getLogger(__name__)

SCHEMA = "vortex.bench.compare/1"
WARMUP = 3
PLAIN = "diffusers, 16 bits"
NF4 = "diffusers, bitsandbytes NF4"
COMFY = "ComfyUI core, 16 bits"
COMPILED, GRAPH = ", compiled blocks", ", CUDA graph"


@dataclass(frozen=True, slots=True)
class Row:
    """One contender at one size: seconds of a picture, of its steps and its decode, and the most torch reserved.

    `off`: the relative error of its final latents against the first contender's, which has 16-bit weights.
    """

    contender: str
    height: int
    width: int
    picture: Latency
    step: Latency
    decode: Latency
    peak: int
    off: float


@dataclass(slots=True)
class Result:
    """The card and every row; `declined` says why a contender did not draw. `latents` by contender and size."""

    machine: dict[str, Any]
    card: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    declined: dict[str, str] = field(default_factory=dict)
    latents: dict[tuple[str, int, int], Tensor] = field(default_factory=dict)

    def find(self, contender: str, side: int) -> Row | None:
        """The row of a square size."""
        return next((row for row in self.rows if (row.contender, row.height) == (contender, side)), None)

    def figures(self) -> dict[str, Any]:
        """Everything but the latents, for JSON."""
        rows = [asdict(row) for row in self.rows]
        return {
            "schema": SCHEMA, "machine": self.machine, "card": self.card, "rows": rows, "declined": self.declined
        }  # fmt: skip


class Contest:
    """Holds the weights that every contender gets, and what was measured. `sizes` are (height, width)."""

    def __init__(
        self, model: str | Path | None, device: torch.device, sizes: list[tuple[int, int]], samples: int
    ) -> None:
        """`model`: a folder in the diffusers layout; None: random weights of the released model's size."""
        self.device, self.samples = device, samples
        self.pipe = _pipeline(model, device)
        self.config = dict(self.pipe.transformer.config)
        self.jobs = [job_of(self.config, height, width, device, self.pipe.vae.dtype) for height, width in sizes]
        spec = describe("transformer", *part_of(self.pipe, "transformer", "transformer"))
        self.result = Result(machine(device).as_dict(), {f"{h} x {w}": card(spec, h, w) for h, w in sizes})
        self.on_row: Callable[[Row], None] = lambda row: None

    def measure(self, name: str, make: Callable[[], Contender], samples: int | None = None) -> None:
        """Time a contender at every size. If it fails, `declined` says why, and the contest goes on."""
        try:
            with inference_mode():
                contender = make()
                for job in self.jobs:
                    self.result.rows.append(self._row(name, contender, job, samples or self.samples))
                    self.on_row(self.result.rows[-1])
        except Exception as error:
            log.warning("%s did not draw: %s", name, error)
            self.result.declined[name] = f"{type(error).__name__}: {error}".partition("\n")[0]
        if self.device.type == "cuda":
            torch._dynamo.reset()
        clean(self.device)

    def _row(self, name: str, contender: Contender, job: Job, samples: int) -> Row:
        clean(self.device)
        for _ in range(WARMUP):
            contender.draw(job)
        latents = contender.latents(job).float().cpu()
        self.result.latents[name, job.height, job.width] = latents
        expected = next(x for (_, *size), x in self.result.latents.items() if size == [job.height, job.width])
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        watches = []
        for _ in range(samples):
            with Stopwatch(self.device) as watch:
                contender.draw(job)
            watches.append(watch)
        steps = [watch.phases[f"step {i + 1}"] for watch in watches for i in range(DEFAULT_STEPS)]
        return Row(
            name,
            job.height,
            job.width,
            summarize([watch.seconds for watch in watches]),
            summarize(steps),
            summarize([watch.phases["decode"] for watch in watches]),
            _peak(self.device),
            distance(latents, expected),
        )

    def plain_peers(self, comfyui: Path | None, eager: int | None = None) -> None:
        """Time diffusers and ComfyUI's core with 16-bit weights; `eager` pictures of plain diffusers, the slowest."""
        self.measure(PLAIN, lambda: Diffusers(self.pipe), eager)
        if self.device.type != "cuda":
            return
        self.measure(PLAIN + COMPILED, lambda: Diffusers(self.pipe, compiled=True))
        if comfyui is not None:
            with self._aside():
                state = self.pipe.transformer.state_dict()
                velocity = partial(comfy_velocity, comfyui, self.config, state, self.device)
                self.measure(COMFY, lambda: Looped(velocity(), self.pipe.vae))

    @contextmanager
    def _aside(self) -> Iterator[None]:
        self.pipe.transformer.to("cpu")
        clean(self.device)
        yield
        self.pipe.transformer.to(self.device)

    def engine(self, mode: str, **options: Any) -> Engine:
        """Vortex on these weights. `options` go to `Engine.from_pipeline`."""
        return Engine.from_pipeline(self.pipe, device=self.device, mode=mode, **options)

    def leave(self, engine: Engine) -> None:
        """Take the peers off the device. The NF4 weights of `engine` stay in host memory, for `return_in_nf4`."""
        rows = {name: tensor.shape[0] for name, tensor in self.pipe.transformer.state_dict().items()}
        self._weights = diffusers_weights([engine._model.transformer, engine._conditioner.modulation], rows)
        self.pipe.transformer = self.pipe.text_encoder = self.pipe.text_encoder_2 = None
        self.pipe.vae.to("cpu")
        clean(self.device)

    def return_in_nf4(self) -> None:
        """Bring diffusers back: its transformer with bitsandbytes' linears over Vortex's NF4 weights."""
        self.pipe.vae.to(self.device)
        self.pipe.transformer = nf4_transformer(self.config, self._weights, self.device, self.pipe.vae.dtype)

    def nf4_peers(self) -> None:
        """Time diffusers with bitsandbytes over the same NF4 weights."""
        self.measure(NF4, lambda: Diffusers(self.pipe))
        if self.device.type == "cuda":
            velocity = diffusers_velocity(self.pipe.transformer)
            self.measure(NF4 + GRAPH, lambda: Looped(velocity, self.pipe.vae, graphed=True))
            self.measure(NF4 + COMPILED, lambda: Diffusers(self.pipe, compiled=True))

    def vortex(self, engine: Engine) -> None:
        """Time an engine."""
        self.measure(f"Vortex {engine.mode}", lambda: Vortex(engine))


def run(
    model: str | Path | None = None,
    *,
    device: torch.device,
    sizes: list[tuple[int, int]],
    samples: int = 30,
    comfyui: Path | None = None,
    on_row: Callable[[Row], None] = lambda row: None,
) -> Result:
    """Time every contender that runs here, `samples` pictures of each of `sizes` (height, width).

    `comfyui`: a ComfyUI tree, to time its core too. `on_row` gets each result as it comes. The peers need diffusers and
    bitsandbytes.
    """
    contest = Contest(model, device, sizes, samples)
    contest.on_row = on_row
    contest.plain_peers(comfyui)
    engines = {}
    for mode in ("exact", "fast"):  # one at a time: the peers' 16-bit weights are still there
        engines[mode] = contest.engine(mode)
        engines[mode].offload()
    contest.leave(engines["exact"])
    for mode, engine in engines.items():
        if engine.mode == mode:
            contest.vortex(engine)
            engine.offload()
        else:
            contest.result.declined[f"Vortex {mode}"] = "not on this device"
    contest.return_in_nf4()
    contest.nf4_peers()
    return contest.result


def distance(a: Tensor, b: Tensor) -> float:
    """Relative error of `a` against `b`."""
    return float((a.float() - b.float()).norm() / b.float().norm())


def card(spec: FluxSpec, height: int, width: int) -> dict[str, float]:
    """What a step takes at least: floating-point operations, and bytes of weights read."""
    work = list(roofline.step_work(spec, height, width))
    weights = roofline.block_weights(spec)
    return {
        "step_flops": sum(one.operations for one in work),
        "attention_flops": sum(one.operations for one in work if one.part == roofline.ATTENTION),
        "nf4_bytes": weights * roofline.NF4,
        "bf16_bytes": weights * roofline.BF16,
    }


def clean(device: torch.device) -> None:
    """Give memory that nothing holds back to the driver."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _pipeline(model: str | Path | None, device: torch.device) -> FluxPipeline:
    if model is None:
        return random_pipeline(device)
    from diffusers import FluxPipeline

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    pipe = FluxPipeline.from_pretrained(model, torch_dtype=dtype)
    pipe.transformer.to(device)
    pipe.vae.to(device)
    return pipe


def job_of(config: dict[str, Any], height: int, width: int, device: torch.device, dtype: torch.dtype) -> Job:
    """A picture with random embeddings, as large as diffusers' `config` of the transformer says."""
    draw = torch.Generator().manual_seed(height + width)
    txt = torch.randn(1, T5_TOKENS, config["joint_attention_dim"], generator=draw) / 4
    pooled = torch.randn(1, config["pooled_projection_dim"], generator=draw)
    noise = sampling.noise(0, 1, height, width)
    return Job(height, width, noise, txt.to(device, dtype), pooled.to(device, dtype))


def _peak(device: torch.device) -> int:
    """Bytes that torch reserved at its peak, and that the driver holds for CUDA graphs."""
    return torch.cuda.max_memory_reserved(device) + graph_memory(device) if device.type == "cuda" else 0
