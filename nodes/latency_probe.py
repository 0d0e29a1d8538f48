"""Latency Probe: how long pictures take here, with percentiles that say what they rest on."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

from ..vortex_core.spec import DEFAULT_STEPS, MAX_STEPS
from . import engines, host, plot
from .sampler import SIDE
from .types import ANY, MODEL, Model

if TYPE_CHECKING:
    from torch import Tensor

    from ..vortex_core.latency import Latency


class LatencyProbe:
    """Draws the same picture many times and reports the distribution of its duration."""

    CATEGORY = "Vortex"
    DESCRIPTION = "Measures how long pictures take: warm-up, device synchronization, percentiles, outliers."
    RETURN_TYPES = ("STRING", "STRING", "IMAGE", ANY)
    RETURN_NAMES = ("report", "json", "histogram", "value")
    OUTPUT_TOOLTIPS = ("The figures as text.", "The figures as JSON.", "How the runs are spread.", "What came in.")
    FUNCTION = "probe"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": (MODEL, {"tooltip": "From NF4 Flux Loader."}),
                "prompt": (
                    "STRING",
                    {
                        "multiline": True,
                        "default": "a red circle on a white background",
                        "tooltip": "Encoded once, before the clock starts: what is measured is sampling and decoding.",
                    },
                ),
                "width": ("INT", SIDE | {"tooltip": "Pixels, a multiple of 16."}),
                "height": ("INT", SIDE | {"tooltip": "Pixels, a multiple of 16."}),
                "steps": (
                    "INT",
                    {"default": DEFAULT_STEPS, "min": 1, "max": MAX_STEPS, "tooltip": "schnell is made for 4."},
                ),
                "runs": (
                    "INT",
                    {
                        "default": 20,
                        "min": 1,
                        "max": 10_000,
                        "tooltip": "Pictures to time. A P99 that rests on several samples needs some hundreds.",
                    },
                ),
                "warmup": (
                    "INT",
                    {"default": 2, "min": 0, "max": 100, "tooltip": "Pictures before the clock starts; not counted."},
                ),
            },
            "optional": {"value": (ANY, {"tooltip": "Anything, passed on: puts the probe after another node."})},
        }

    @classmethod
    def IS_CHANGED(cls, **inputs: Any) -> str:
        return str(time.time_ns())  # the host would hand out the last measurement

    def probe(
        self,
        model: Model,
        prompt: str,
        width: int,
        height: int,
        steps: int,
        runs: int,
        warmup: int,
        value: Any = None,
    ) -> tuple[str, str, Tensor, Any]:
        from ..vortex_core.latency import measure, summarize

        engine = engines.acquire(model)
        conditioning = engine.encode(prompt, steps)

        def draw() -> None:
            engine.generate(
                conditioning, seed=0, width=width, height=height, steps=steps,
                on_step=lambda *step: host.check_interrupt(),
            )  # fmt: skip

        report = host.progress(warmup + runs)
        samples = measure(draw, runs=runs, warmup=warmup, device=engine.device, on_run=lambda done, _: report(done))
        latency = summarize(samples)
        what = f"{model.name}, {width} x {height}, {steps} steps, on {device_name(engine.device)}"
        figures = {"what": what, "seconds": samples, **latency.as_dict()}
        return describe(what, latency), json.dumps(figures), picture(what, samples, latency), value


def device_name(device: Any) -> str:
    """The card's name, or what else it is."""
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"


def describe(what: str, latency: Latency) -> str:
    """The figures as text."""
    lines = [what, f"{latency.count} runs: mean {ms(latency.mean)}, deviation {ms(latency.deviation)}"]
    lines += [
        f"P{p.q:<5g}{ms(p.seconds):>12}   rests on {p.support} of {latency.count} samples" for p in latency.percentiles
    ]
    outliers = ", ".join(f"run {i + 1} ({ms(seconds)})" for i, seconds in latency.outliers)
    lines.append(f"Beyond 3 sigma: {outliers or 'none'}")
    return "\n".join(lines)


def ms(seconds: float) -> str:
    """Milliseconds, as they are read."""
    return f"{seconds * 1e3:.1f} ms"


def picture(what: str, samples: list[float], latency: Latency) -> Tensor:
    """The histogram as IMAGE."""
    marks = [(p.seconds * 1e3, f"P{p.q:g} {ms(p.seconds)}") for p in latency.percentiles if p.q in (50, 95, 99)]
    return plot.histogram(what, [sample * 1e3 for sample in samples], marks, "milliseconds")
