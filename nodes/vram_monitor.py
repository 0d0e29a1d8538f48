"""VRAM Monitor: what the run took, against limits. It passes any value on, so it can stand anywhere in a workflow."""

from __future__ import annotations

import json
import logging
import time
from typing import TYPE_CHECKING, Any

from ..vortex_core.bench import plot_style
from ..vortex_core.errors import GB
from . import host, plot
from .recorder import recorder
from .types import ANY

if TYPE_CHECKING:
    import torch
    from matplotlib.figure import Figure
    from torch import Tensor

    from ..vortex_core.device.vram import Snapshot

log = logging.getLogger(__name__)

COUNTERS = {
    "allocated": "torch allocated",
    "reserved": "torch reserved",
    "process": "this process (NVML)",
    "device": "whole card",
}
LIMIT = {"default": 0.0, "min": 0.0, "max": 1000.0, "step": 0.1}


class VRAMMonitor:
    """Reports VRAM now and at its peak, and stops a run that took too much."""

    CATEGORY = "Vortex"
    DESCRIPTION = "Passes a value on and reports VRAM: now, at its peak, and over the run. Warns, or stops the run."
    RETURN_TYPES = (ANY, "STRING", "STRING", "IMAGE")
    RETURN_NAMES = ("value", "report", "json", "timeline")
    OUTPUT_TOOLTIPS = ("What came in.", "The figures as text.", "The figures as JSON.", "VRAM over the run.")
    FUNCTION = "monitor"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "value": (ANY, {"tooltip": "Anything. The monitor reports once this is there, and passes it on."}),
                "soft_limit": (
                    "FLOAT",
                    LIMIT | {"tooltip": "GB. A higher peak of torch reserved is a warning. 0: no limit."},
                ),
                "hard_limit": (
                    "FLOAT",
                    LIMIT | {"tooltip": "GB. A higher peak of torch reserved stops the run. 0: no limit."},
                ),
                "reset_peak": (
                    "BOOLEAN",
                    {
                        "default": True,
                        "tooltip": "On: peaks and timeline start anew with each run. Off: they go on over all runs.",
                    },
                ),
            }
        }

    @classmethod
    def IS_CHANGED(cls, reset_peak: bool = True, **others: Any) -> str:
        # the host asks this of every node before the first one runs, so sampling covers the whole run
        recorder.begin(host.device(), reset=reset_peak)
        return str(time.time_ns())

    def monitor(
        self, value: Any, soft_limit: float, hard_limit: float, reset_peak: bool
    ) -> dict[str, Any] | tuple[Any, str, str, Tensor]:
        from ..vortex_core.errors import VortexError
        from ..vortex_core.utils.packages import first_line

        device = host.device()
        if device.type != "cuda":
            text = f"No NVIDIA GPU: ComfyUI computes on {where(device)} here, so there is no VRAM to measure."
            return unmeasured(value, device, "no gpu", text)
        try:
            figures, samples = read(device, soft_limit, hard_limit)
        except Exception as error:  # the pictures of the run must not be lost
            log.warning("%s does not tell its memory", device, exc_info=True)
            return unmeasured(value, device, "unknown", f"{device} does not tell its memory: {first_line(error)}")
        text = report(figures)
        if figures["status"] == "over the hard limit":
            raise VortexError(f"VRAM Monitor stops the run.\n{text}")
        if figures["status"] != "ok":
            log.warning(text)
        text, timeline = plot.beside(text, lambda: picture(figures, samples, soft_limit, hard_limit))
        return value, text, json.dumps(figures), timeline


def where(device: torch.device) -> str:
    """What the host computes on, if not on CUDA."""
    from ..vortex_core.device.select import device_words

    return "the CPU" if device.type == "cpu" else device_words(device.type)


def unmeasured(value: Any, device: torch.device, status: str, text: str) -> tuple[Any, str, str, Tensor]:
    """The outputs of a run without figures."""
    text, timeline = plot.beside(text, lambda: plot_style.timeline("VRAM: nothing to measure", {}))
    return value, text, json.dumps({"device": str(device), "status": status, "report": text}), timeline


def read(
    device: torch.device, soft_limit: float, hard_limit: float
) -> tuple[dict[str, Any], list[tuple[float, Snapshot]]]:
    """The figures of the run, and its samples. The last sample is now."""
    from ..vortex_core.device.vram import snapshot

    recorder.begin(device, reset=False)  # a host that does not call IS_CHANGED is sampled from here on
    samples = [*recorder.samples, (time.perf_counter(), snapshot(device))]
    return measure(device, [counters(sample) for _, sample in samples], soft_limit, hard_limit), samples


def counters(sample: Snapshot) -> dict[str, int | None]:
    """Bytes by the names of `COUNTERS`."""
    return {
        "allocated": sample.allocated,
        "reserved": sample.reserved,
        "process": sample.process,
        "device": sample.total - sample.free,
    }


def measure(
    device: torch.device, samples: list[dict[str, int | None]], soft_limit: float, hard_limit: float
) -> dict[str, Any]:
    """All figures in bytes, and the verdict on limits in GB. The last of `samples` is now."""
    import torch

    peak = {name: max(sample[name] or 0 for sample in samples) or None for name in COUNTERS}
    # torch's own peaks; samples at intervals can miss one
    peak["allocated"] = torch.cuda.max_memory_allocated(device)
    peak["reserved"] = torch.cuda.max_memory_reserved(device)
    return {
        "device": torch.cuda.get_device_name(device),
        "total": torch.cuda.mem_get_info(device)[1],
        "now": samples[-1],
        "peak": peak,
        "samples": len(samples),
        "soft_limit": soft_limit * GB,
        "hard_limit": hard_limit * GB,
        "status": judge(peak["reserved"], soft_limit, hard_limit),
    }


def judge(peak: int, soft_limit: float, hard_limit: float) -> str:
    """Compare a peak in bytes with limits in GB. A limit of 0 is none."""
    if hard_limit and peak > hard_limit * GB:
        return "over the hard limit"
    if soft_limit and peak > soft_limit * GB:
        return "over the soft limit"
    return "ok"


def report(figures: dict[str, Any]) -> str:
    """The figures as text."""

    def gb(value: int | None) -> str:
        return "unknown" if value is None else f"{value / GB:.2f} GB"

    lines = [f"VRAM of {figures['device']}, {gb(figures['total'])}", f"{'':22}{'now':>10}{'peak':>12}"]
    lines += [f"{name:22}{gb(figures['now'][key]):>10}{gb(figures['peak'][key]):>12}" for key, name in COUNTERS.items()]
    limits = [f"{kind} {gb(figures[f'{kind}_limit'])}" for kind in ("soft", "hard") if figures[f"{kind}_limit"]]
    lines.append(f"Peak of torch reserved: {figures['status']} ({', '.join(limits) or 'no limits'})")
    return "\n".join(lines)


def picture(
    figures: dict[str, Any], samples: list[tuple[float, Snapshot]], soft_limit: float, hard_limit: float
) -> Figure:
    """The timeline of the run."""
    start = samples[0][0]
    read = [(seconds - start, counters(sample)) for seconds, sample in samples]
    series = {
        name: [(seconds, value / GB) for seconds, taken in read if (value := taken[key]) is not None]
        for key, name in COUNTERS.items()
    }
    limits = ((soft_limit, "soft limit", plot_style.WARN), (hard_limit, "hard limit", plot_style.STOP))
    return plot_style.timeline(f"VRAM of {figures['device']}", series, [level for level in limits if level[0]])
