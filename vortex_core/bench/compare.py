"""`vortex bench compare`: Vortex beside its peers, in one process: the same weights, embeddings, noise and card.

Each contender is alone on the device while it draws. A picture's time is what its user waits for: from the call,
with the prompt's embeddings at hand, until the picture is finished on the device. Steps and decode are read off events
in the same pictures.
"""

from __future__ import annotations

import gc
import json
import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.table import Table
from torch import Tensor

from .. import sampling
from ..engine import Engine
from ..latency import Latency, summarize
from ..spec import DEFAULT_STEPS, T5_TOKENS, FluxSpec
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

GB = 1e9
WARMUP = 3
MODES = ("exact", "fast")


@dataclass(frozen=True, slots=True)
class Row:
    """One contender at one size: seconds of a picture, of its steps and its decode, and the most torch reserved.

    `off`: how far its picture is from the first contender's, the relative error of the pixels.
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
    """The card and every row; `declined` says why a contender did not draw."""

    device: str
    torch: str
    card: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    declined: dict[str, str] = field(default_factory=dict)

    def as_json(self) -> str:
        """One line."""
        return json.dumps(asdict(self))


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

    `model`: a folder in the diffusers layout; None draws with random weights of the released model's size.
    `on_row` is told each result as it comes. Needs diffusers and bitsandbytes for the peers.
    """
    cuda = device.type == "cuda"
    result = Result(
        torch.cuda.get_device_name(device) if cuda else device.type,
        torch.__version__,
        {f"{height} x {width}": card(FluxSpec(), height, width) for height, width in sizes} if model is None else {},
    )
    pipe = _pipeline(model, device)
    config = dict(pipe.transformer.config)
    jobs = [_job(config, height, width, device, pipe.vae.dtype) for height, width in sizes]

    first: dict[tuple[int, int], Tensor] = {}

    def measure(name: str, make: Callable[[], Contender]) -> None:
        try:
            with torch.inference_mode():
                contender = make()
                for job in jobs:
                    _clean(cuda)
                    result.rows.append(_measure(contender, job, samples, cuda, first))
                    on_row(result.rows[-1])
        except Exception as error:  # a peer that fails is a result, not the end of the comparison
            log.warning("%s did not draw: %s", name, error)
            result.declined[name] = f"{type(error).__name__}: {error}".partition("\n")[0]
        if cuda:
            torch._dynamo.reset()

    def bf16(name: str, **options: bool) -> None:
        measure(name, lambda: Diffusers(name, pipe, **options))

    bf16("diffusers, 16 bits")
    if cuda:
        bf16("diffusers, 16 bits, compiled blocks", compiled=True)
        pipe.transformer.to("cpu")
        state = pipe.transformer.state_dict()
        if comfyui is not None:
            name = "ComfyUI core, 16 bits"
            measure(name, lambda: Looped(name, comfy_velocity(comfyui, config, state, device), pipe.vae))
            _clean(cuda)

    engine = Engine.from_pipeline(pipe, device=device)
    rows = {name: tensor.shape[0] for name, tensor in pipe.transformer.state_dict().items()}
    weights = diffusers_weights([engine._transformer, engine._conditioner.modulation], rows)
    engine.offload()
    pipe.transformer = None
    _clean(cuda)
    pipe.transformer = nf4_transformer(config, weights, device, pipe.vae.dtype)
    nf4 = "diffusers, bitsandbytes NF4"
    measure(nf4, lambda: Diffusers(nf4, pipe))
    if cuda:
        graph = f"{nf4}, CUDA graph"
        measure(graph, lambda: Looped(graph, diffusers_velocity(pipe.transformer), pipe.vae, graphed=True))
        compiled = f"{nf4}, compiled blocks"
        measure(compiled, lambda: Diffusers(compiled, pipe, compiled=True))
    pipe.transformer = None
    pipe.vae.to("cpu")
    _clean(cuda)
    for mode in MODES:
        measure(f"Vortex {mode}", partial(Vortex, engine, mode))
    return result


def table(result: Result) -> Table:
    """Milliseconds and GB, a row for each contender and size."""
    columns = ("contender", "size", "picture P50", "P99", "step", "decode", "peak GB", "off")
    made = Table(*columns, title=f"{result.device}, torch {result.torch}")
    for row in result.rows:
        figures = (_at(row.picture, 50), _at(row.picture, 99), _at(row.step, 50), _at(row.decode, 50))
        made.add_row(
            row.contender,
            f"{row.width} x {row.height}",
            *(f"{1e3 * seconds:.1f}" for seconds in figures),
            f"{row.peak / GB:.2f}",
            f"{row.off:.4f}",
        )
    for name, why in result.declined.items():
        made.add_row(name, "did not draw: " + why)
    return made


def _at(latency: Latency, q: float) -> float:
    return next(p.seconds for p in latency.percentiles if p.q == q)


def card(spec: FluxSpec, height: int, width: int) -> dict[str, float]:
    """What a picture takes at least: floating-point operations of 4 steps, and bytes of weights read in each."""
    image = height // 16 * width // 16
    tokens = image + T5_TOKENS
    hidden, mlp = spec.hidden, spec.mlp
    block = 4 * hidden * hidden + 2 * hidden * mlp  # weights of one stream of a double block, and of a single block
    products = 2 * tokens * block * (spec.double_blocks + spec.single_blocks)
    attention = 4 * tokens * tokens * hidden * (spec.double_blocks + spec.single_blocks)
    weights = block * (2 * spec.double_blocks + spec.single_blocks)
    return {
        "step_flops": products + attention,
        "attention_flops": attention,
        "nf4_bytes": weights * 0.5625,
        "bf16_bytes": weights * 2.0,
    }


def _pipeline(model: str | Path | None, device: torch.device) -> FluxPipeline:
    if model is None:
        return random_pipeline(device)
    from diffusers import FluxPipeline

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    pipe = FluxPipeline.from_pretrained(model, torch_dtype=dtype)
    pipe.transformer.to(device)
    pipe.vae.to(device)
    return pipe


def _job(config: dict[str, Any], height: int, width: int, device: torch.device, dtype: torch.dtype) -> Job:
    draw = torch.Generator().manual_seed(height + width)
    txt = torch.randn(1, T5_TOKENS, config["joint_attention_dim"], generator=draw) / 4
    pooled = torch.randn(1, config["pooled_projection_dim"], generator=draw)
    noise = sampling.noise(0, 1, height, width)
    return Job(height, width, noise, txt.to(device, dtype), pooled.to(device, dtype))


def _measure(contender: Contender, job: Job, samples: int, cuda: bool, first: dict[tuple[int, int], Tensor]) -> Row:
    for _ in range(WARMUP):
        picture = contender.draw(job, lambda: None)
    expected = first.setdefault((job.height, job.width), picture.float().cpu())
    off = float((picture.float().cpu() - expected).norm() / expected.norm())
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    drawn = [_timed(contender, job, cuda) for _ in range(samples)]
    return Row(
        contender.name,
        job.height,
        job.width,
        summarize([picture for picture, _ in drawn]),
        summarize([step for _, spans in drawn for step in spans[:DEFAULT_STEPS]]),
        summarize([spans[DEFAULT_STEPS] for _, spans in drawn]),
        torch.cuda.max_memory_reserved() if cuda else 0,
        off,
    )


def _timed(contender: Contender, job: Job, cuda: bool) -> tuple[float, list[float]]:
    """Seconds of a picture, and of its steps and decode."""
    marks: list[Any] = []

    def mark() -> None:
        if cuda:
            marks.append(torch.cuda.Event(enable_timing=True))
            marks[-1].record()
        else:
            marks.append(time.perf_counter())

    if cuda:
        torch.cuda.synchronize()
    started = time.perf_counter()
    mark()
    contender.draw(job, mark)
    mark()
    if cuda:
        torch.cuda.synchronize()
    picture = time.perf_counter() - started
    return picture, [a.elapsed_time(b) / 1e3 if cuda else b - a for a, b in pairwise(marks)]


def _clean(cuda: bool) -> None:
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
