"""The order of calls: any thread may call, and each call has the painter to itself, until the engine is unloaded."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Self, TypeVar

from ..device.jobs import inside
from ..device.worker import Worker
from ..errors import DeviceLostError, VortexInputError
from ..flux1.conditioning import Conditioner
from .memory_manager import MemoryManager
from .model import Model
from .painter import Painter

Result = TypeVar("Result")


class Turns:
    """A painter and the thread of its device. Work is done on that thread; properties are read on the caller's."""

    def __init__(self, painter: Painter, worker: Worker) -> None:
        self._painter: Painter | None = painter
        self._worker = worker
        self._detach = worker.attach(self)

    def unload(self) -> None:
        """Release every weight and buffer. The engine cannot draw any more; load the model again for a new one.

        Calls that wait end with a `VortexInputError`, which this raises in `on_step`, too. It may be called twice,
        after the device has failed, and in a forked process.
        """
        if self._painter is None:
            return
        self._check_not_inside()

        def close() -> None:
            painter, self._painter = self._painter, None
            if painter is not None:
                painter.close()

        try:
            self._worker.run(close, owner=self)
        except (DeviceLostError, VortexInputError):  # the device's thread is gone, and its memory, too
            with suppress(RuntimeError):
                close()
        self._detach()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.unload()

    def _run(self, work: Callable[[Painter], Result], deadline: float | None = None) -> Result:
        """Do `work` on the device's thread, after the calls that came before."""
        return self._worker.run(partial(self._turn, work), owner=self, deadline=deadline)

    async def _arun(self, work: Callable[[Painter], Result], deadline: float | None = None) -> Result:
        """`_run`, awaited."""
        return await self._worker.arun(partial(self._turn, work), owner=self, deadline=deadline)

    def _turn(self, work: Callable[[Painter], Result]) -> Result:
        painter = self._loaded()  # another thread may have unloaded it meanwhile
        painter.choose_threads()
        return work(painter)

    def _loaded(self) -> Painter:
        if (painter := self._painter) is None:
            raise VortexInputError("This engine was unloaded. Load the model again.")
        return painter

    @property
    def _memory(self) -> MemoryManager:
        return self._loaded().memory

    @property
    def _model(self) -> Model:
        return self._loaded().model

    @property
    def _conditioner(self) -> Conditioner:
        return self._loaded().conditioner

    def _check_usable(self) -> None:
        self._loaded()
        self._check_not_inside()
        self._worker.check()

    def _check_not_inside(self) -> None:
        if inside(self):
            raise VortexInputError(
                "on_step may not use the engine that calls it, which is still drawing. Keep a copy of the latents, and "
                "call the engine when generate has returned."
            )
