"""Latency Probe: how long pictures take here, as percentiles with the number of samples that each rests on."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from ..vortex_core.bench.verdict import milliseconds as ms
from . import engines, host, plot
from .sampler import MODEL_INPUT, SIDE, STEPS, SchnellSampler, check
from .types import ANY, Model

if TYPE_CHECKING:
    from torch import Tensor

    from ..vortex_core.bench.latency_report import Series


class LatencyProbe:
    """Draws a prompt many times, each with another seed, and reports the distribution of how long it takes."""

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
                "model": MODEL_INPUT,
                "prompt": (
                    "STRING",
                    {
                        "multiline": True,
                        "default": "a red circle on a white background",
                        "tooltip": "Encoded once, before the clock starts. Only sampling and decoding are measured.",
                    },
                ),
                "width": SIDE,
                "height": SIDE,
                "steps": STEPS,
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
            "optional": {"value": (ANY, {"tooltip": "Anything. It is passed on; the probe runs after its node."})},
        }

    @classmethod
    def VALIDATE_INPUTS(cls, width: int | None = None, height: int | None = None) -> str | bool:
        """Whether pictures of this size can be drawn, before a model is loaded. A linked input is None."""
        return SchnellSampler.VALIDATE_INPUTS(width, height)

    @classmethod
    def IS_CHANGED(cls, **inputs: Any) -> str:
        return str(time.time_ns())  # else the host would give the last measurement again

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
        from ..vortex_core.bench.latency_report import summarize_series
        from ..vortex_core.bench.plots import spread
        from ..vortex_core.bench.samples import measure
        from ..vortex_core.bench.workload import Workload
        from ..vortex_core.flux1.request import check_prompt

        check(width, height, steps=steps)
        check_prompt(prompt)
        engine = engines.acquire(model)
        workload = Workload(width, height, steps, iterations=runs, warmup=warmup, cold=0, prompts=(prompt,))
        report = host.progress(workload.total)
        options = {"loras": model.pairs, "on_step": lambda *step: host.check_interrupt()}
        with engines.torchs_own_memory_errors():
            samples = list(measure(engine, workload, lambda done, total: report(done), **options))
        series = summarize_series(samples)
        what = f"{model.words}, {width} x {height}, {steps} steps, on {device_name(engine.device)}"
        figures = {
            "what": what,
            "seconds": [sample.seconds for sample in samples],
            **series.whole.as_dict(),
            "phases": {name: phase.as_dict() for name, phase in series.phases.items()},
        }
        text, plotted = plot.beside(describe(what, series), lambda: spread(what, figures["seconds"], series.whole))
        return text, json.dumps(figures), plotted, value


def device_name(device: Any) -> str:
    """The card's name, or the device in words."""
    import torch

    if device.type == "cpu":
        return "the CPU"
    with suppress(Exception):  # it is only for the report
        return torch.cuda.get_device_name(device)
    return str(device)


def describe(what: str, series: Series) -> str:
    """The figures as text."""
    latency = series.whole
    lines = [what, f"{latency.count} runs: mean {ms(latency.mean)}, deviation {ms(latency.deviation)}"]
    for p in latency.percentiles:
        remark = "" if p.supported else ", too few to tell"
        lines.append(f"P{p.q:<5g}{ms(p.seconds):>12}   rests on {p.support} of {latency.count} samples{remark}")
    outliers = ", ".join(f"run {i + 1} ({ms(seconds)})" for i, seconds in latency.outliers)
    lines.append(f"Beyond 3 sigma: {outliers or 'none'}")
    lines.append("Medians: " + ", ".join(f"{name} {ms(p.percentile(50).seconds)}" for name, p in series.phases.items()))
    return "\n".join(lines)
