"""Samples VRAM in the background while the host runs a prompt, so that peaks between nodes are seen."""

from __future__ import annotations

import logging
from functools import partial
from typing import TYPE_CHECKING

from . import host

if TYPE_CHECKING:
    import torch

    from ..vortex_core.device.vram import Snapshot
    from ..vortex_core.utils.timeline import Timeline

log = logging.getLogger(__name__)

INTERVAL = 0.05  # seconds
KEPT = 36_000  # samples, half an hour


class Recorder:
    """The one sampler of the process. It samples until the host's run ends; samples stay until the next reset."""

    def __init__(self) -> None:
        self.timeline: Timeline[Snapshot] | None = None

    @property
    def samples(self) -> list[tuple[float, Snapshot]]:
        """Times in seconds with what was read then, the oldest first."""
        return [(moment.seconds, moment.reading) for moment in self.timeline.moments] if self.timeline else []

    def begin(self, device: torch.device, *, reset: bool) -> None:
        """Start sampling a CUDA device until the host's run ends; with `reset`, forget earlier samples.

        A failure only costs the samples; the log says why.
        """
        if device.type != "cuda":
            return
        try:
            self._begin(device, reset=reset)
        except Exception as error:
            log.warning("VRAM is not sampled over this run: %s", error)

    def _begin(self, device: torch.device, *, reset: bool) -> None:
        import torch

        from ..vortex_core.device.vram import snapshot
        from ..vortex_core.utils.timeline import Timeline

        if self.timeline is None:
            read = partial(snapshot, device)
            self.timeline = Timeline(read, interval=INTERVAL, kept=KEPT, goes_on=host.is_running)
            reset = True
        if reset:
            self.timeline.moments.clear()
            torch.cuda.reset_peak_memory_stats(device)
        self.timeline.start()


recorder = Recorder()
