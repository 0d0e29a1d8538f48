"""An engine that is called in every way at once."""

from __future__ import annotations

import asyncio
import os
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from vortex_core import DeadlineError, Engine, VortexInputError, load_flux_schnell

TIMES = int(os.environ.get("VORTEX_STORM", "40"))  # calls of all at once, about
PROMPTS = [f"a picture of {n}" for n in range(4)]
SMALL = {"height": 64, "width": 64, "steps": 1}


class Crowd:
    """Seeded callers of an engine, what each call has to give, and what was wrong."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.wrong = engine, list[object]()
        self.known = {prompt: engine.encode(prompt, 1) for prompt in PROMPTS}
        self.latents = [torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(n)) for n in range(4)]
        self.pictures = {
            (prompt, seed): engine.generate(prompt, seed=seed, **SMALL) for prompt in PROMPTS for seed in (1, 2)
        }
        self.decoded = [engine.decode(some) for some in self.latents]

    def same(self, found: Tensor, expected: Tensor) -> None:
        if not torch.equal(found, expected):
            self.wrong.append("another's")

    def one(self, rng: random.Random) -> None:
        """A call of any kind."""
        engine, same = self.engine, self.same
        prompt, seed, n = rng.choice(PROMPTS), rng.choice((1, 2)), rng.randrange(4)
        kind, expected = rng.randrange(9), self.pictures[prompt, seed]
        options: dict[str, Any] = {**SMALL, "seed": seed}
        if kind in (0, 1):
            out = torch.empty_like(expected) if kind else None
            same(engine.generate(rng.choice((prompt, self.known[prompt])), out=out, **options), expected)
        elif kind == 2:
            same(engine.decode(self.latents[n]), self.decoded[n])
        elif kind == 3:
            same(engine.encode(prompt, 1).modulation, self.known[prompt].modulation)
        elif kind == 4:
            engine.limit(rng.choice((0.33, 0.5, 3.0)))
        elif kind == 5:
            engine.offload()
            engine.resume()
        elif kind == 6:
            with suppress(DeadlineError):
                same(engine.generate(prompt, deadline=rng.uniform(1e-5, 0.3), **options), expected)
        elif kind == 7:

            def on_step(*step: Any) -> None:
                raise ZeroDivisionError(seed)

            with pytest.raises(ZeroDivisionError):
                engine.generate(prompt, on_step=on_step, **options)
        else:
            with pytest.raises(VortexInputError):
                engine.generate(prompt, seed=-1)

    def several(self, name: int) -> None:
        rng = random.Random(name)
        for _ in range(max(1, TIMES // 16)):
            try:
                self.one(rng)
            except BaseException as error:
                self.wrong.append(error)

    async def task(self, rng: random.Random) -> None:
        prompt, seed = rng.choice(PROMPTS), rng.choice((1, 2))
        call = asyncio.ensure_future(self.engine.agenerate(prompt, seed=seed, **SMALL))
        if rng.random() < 0.5:
            await asyncio.sleep(rng.uniform(0, 0.2))
            call.cancel()
        with suppress(asyncio.CancelledError):
            self.same(await call, self.pictures[prompt, seed])

    async def tasks(self) -> None:
        rng = random.Random(99)
        await asyncio.gather(*(self.task(rng) for _ in range(max(4, TIMES // 4))))


@pytest.mark.slow
def test_whatever_happens_at_once_each_result_is_its_own(tiny_dir: Path) -> None:
    """16 threads and a loop of tasks, seeded: every kind of call, cancelled, late and broken at random moments."""
    with load_flux_schnell(tiny_dir, device="cpu", vram_budget=0.5) as engine:
        crowd = Crowd(engine)
        threads = [threading.Thread(target=crowd.several, args=(name,)) for name in range(16)]
        for thread in threads:
            thread.start()
        asyncio.run(crowd.tasks())
        for thread in threads:
            thread.join(300)
            assert not thread.is_alive()
        assert crowd.wrong == []
        assert engine._worker._stack == engine._worker._queue == []
        prompt = PROMPTS[0]
        assert torch.equal(engine.generate(prompt, seed=1, **SMALL), crowd.pictures[prompt, 1])
        pool = ThreadPoolExecutor(16)
        last = [pool.submit(engine.generate, prompt, seed=1, **SMALL) for _ in range(16)]
    for call in last:  # unloaded meanwhile
        error = call.exception(30)
        if error is None:
            assert torch.equal(call.result(), crowd.pictures[prompt, 1])
        else:
            assert isinstance(error, VortexInputError), error
    pool.shutdown()
