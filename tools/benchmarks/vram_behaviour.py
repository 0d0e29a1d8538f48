"""The promises of the VRAM budget beyond peaks: equal pictures, threads, reloads, backends, errors."""

from __future__ import annotations

import gc
import math
import re
import sys
import threading
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from vram_section import GB, PROMPT, Section
from whole_vae import whole_decode

from vortex_core import Engine, MemoryPressureError, VortexError, VortexInitializationError, VortexInputError
from vortex_core.flux1.vae import Decoder, decode
from vortex_core.runtime import loading, memory_manager


def same(s: Section) -> None:
    """Pictures are the same bit for bit under every placement, and near the same in strips as whole."""
    seen: dict[str, list[Any]] = {}

    def draw(engine: Any, name: str) -> None:
        for side in (512, 1024):
            last: list[Any] = []
            picture = s.draw(engine, side, on_step=lambda i, n, clean: last.append(clean.cpu()) if i == n else None)  # noqa: B023
            seen.setdefault(f"{side} latents", []).append(last[0])
            seen.setdefault(f"{side} pictures", []).append(picture.cpu())
        print(
            f"  {name}: {len(engine.plan.streamed)} groups stream, peak {engine.plan.peak / GB:.2f} GB", file=sys.stderr
        )

    engine = s.load(s.gb(11))
    draw(engine, "all resident")
    for budget in (8, 6.5, 4.5, 3):
        with s.part(f"same: {budget} GB") as name:
            engine.limit(s.gb(budget))
            engine._conditioner._cache.clear()
            draw(engine, name)
    for what, results in seen.items():
        equal = all(torch.equal(results[0], other) for other in results)
        worst = max((results[0] - other).abs().max().item() for other in results)
        s.row(f"same: {what} bit for bit under {len(results)} placements", f"largest difference {worst:.2e}", equal)
    engine.limit(s.gb(8))
    with s.part("same: offload and resume"):
        engine.offload()
        engine._conditioner._cache.clear()
        again = s.draw(engine, 512).cpu()
        s.row("same: after offload and resume", "", torch.equal(again, seen["512 pictures"][0]))
    with s.part("same: strips"), torch.inference_mode():
        latents = seen["512 latents"][0].to(s.device)
        side = latents.shape[-1] * 8
        out = torch.empty(1, side, side, 3, device=s.device)
        exact = Decoder(engine._model.vae).to(s.device)  # in plain torch
        exact.load_state_dict(engine._model.decoder.state_dict())
        truth = whole_decode(exact, latents)
        for decoder, what in ((engine._model.decoder, "in the engine's type"), (exact, "fp32")):
            strips = {rows: decode(decoder, latents, out, rows).clone() for rows in (None, 128, 32)}
            for name, one, other, judged in (
                ("whole against 128 rows", strips[None], strips[128], True),
                ("32 against 128 rows", strips[32], strips[128], True),
                # in fewer bits the difference is rounding: torch's own whole decode, below, is as far off
                ("128 rows against torch's whole in fp32", strips[128], truth, decoder is exact),
            ):
                found, near = apart(one, other)
                s.row(f"same: decoding 512, {what}, {name}", found, near if judged else None)
        found, _ = apart(whole_decode(engine._model.decoder, latents), truth)
        s.row("same: decoding 512, in the engine's type, torch's whole against torch's whole in fp32", found, None)


def apart(one: torch.Tensor, other: torch.Tensor) -> tuple[str, bool]:
    """How far two pictures are from each other, and whether that is near enough."""
    off = (one - other).abs() * 255
    return f"mean {off.mean():.4f}/255, max {off.max():.3f}/255", bool(off.mean() < 1 and off.max() < 4)


def threads(s: Section) -> None:
    """16 threads draw 4 pictures each: the budget holds, pictures are those of one thread, nothing grows."""
    jobs = [(512, 1, i) for i in range(48)] + [(768, 1, i) for i in range(8)] + [(512, 2, i) for i in range(8)]
    jobs = jobs if s.cuda else jobs[44:52]

    def draw(job: tuple[int, int, int]) -> Any:
        side, batch, seed = job
        side = s.size(side)
        return engine.generate(PROMPT, seed=seed, height=side, width=side, batch_size=batch).cpu()

    for budget in (5.0, 6.5):
        s.reset()
        engine = s.load(s.gb(budget))
        kinds = {(side, batch): (side, batch, 0) for side, batch, _ in jobs}
        one = [draw(job) for job in jobs]
        for job in kinds.values():
            draw(job)
        torch.cuda.empty_cache() if s.cuda else None
        gc.collect()
        for job in kinds.values():
            draw(job)
        before = s.allocated(), s.reserved()
        with ThreadPoolExecutor(16) as pool:
            many = list(pool.map(draw, jobs))
        grown = s.allocated() - before[0], s.reserved() - before[1]
        s.row(f"16 threads, {budget} GB: peak within the budget", f"{s.peak() / GB:.3f} GB", s.peak() <= budget * GB)
        s.row(f"16 threads, {budget} GB: pictures are those of one thread", "", all(map(torch.equal, one, many)))
        s.row(f"16 threads, {budget} GB: growth after the first, allocated and reserved", grown, max(grown) <= 0)
        s.row(f"16 threads, {budget} GB: what others hold", f"{engine.ledger.others}", engine.ledger.others < 0.02 * GB)
        engine.unload()


def reload(s: Section) -> None:
    """Load, draw and unload 20 times, each in a new thread: only one set of cuBLAS' workspaces stays."""
    left, held = [], []

    def once(i: int) -> None:
        mode = "fast" if i % 2 == 0 else "exact"
        if i % 10 == 0:  # else the miniature, which needs the same workspaces and loads in a second
            with s.load(s.gb(6.5), mode=mode) as engine:
                s.draw(engine, 512)
        else:
            with Engine.load(device=s.device, mode=mode) as engine:
                engine.generate(PROMPT, seed=1)

    for i in range(20 if s.cuda else 3):
        thread = threading.Thread(target=once, args=(i,))
        thread.start()
        thread.join()
        gc.collect()
        torch.cuda.empty_cache() if s.cuda else None
        left.append(s.allocated())
        held.append(s.reserved())
    s.row("reload: what stays allocated, the same after each of 20", sorted(set(left)), len(set(left)) == 1)
    s.row("reload: and reserved, with graphs", sorted(set(held)), max(held) <= left[0] + 0.09 * GB)
    alive = [thread.name for thread in threading.enumerate() if thread.name.startswith("vortex")]
    s.row("reload: no thread stays", alive, not alive)


def backends(s: Section) -> None:
    """Without Triton, as on Windows: the peak stays within the plan, and nothing warns."""
    for backend in ("nvrtc", "bitsandbytes", "reference"):
        with (
            s.part(f"without Triton, {backend}"),
            patch("vortex_core.kernels.fused_declined", lambda device: "as on Windows"),
            patch("vortex_core.runtime.modes.fused_declined", lambda device: "as on Windows"),
        ):
            engine = s.load(s.gb(6.5), backend=backend)
            for side in (512, 1024):
                s.reset()
                with warnings.catch_warnings(record=True) as told:
                    warnings.simplefilter("always")
                    ms = s.ms(lambda: s.draw(engine, side, prompt=f"{PROMPT} {time.monotonic()}"), repeats=3)  # noqa: B023
                plan = engine.plan
                s.row(
                    f"{backend} {side}: peak <= plan <= budget, no warning",
                    f"{s.peak() / GB:.3f} of {plan.peak / GB:.3f} GB, {ms:.0f} ms with a new prompt, strips of "
                    f"{plan.requirements.rows}; {[str(w.message)[:90] for w in told]}",
                    s.peak() <= plan.peak <= 6.5 * GB and not told and bool(engine.captured),
                )
            engine.unload()


def errors(s: Section) -> None:
    """Budgets and loads that cannot be are refused with numbers; running out of memory is survived."""
    Engine.load(device=s.device).unload()  # one set of cuBLAS' workspaces stays from here on
    before = s.allocated()
    for budget in (0.01, -1, math.nan, 10_000)[: None if s.cuda else 3]:
        with s.part(f"errors: a budget of {budget} GB is refused") as promise:
            load = partial(s.load, budget)
            s.row(promise, *refusal(load, VortexInputError, lambda: s.allocated() == before))
    if not s.cuda:
        return
    held = torch.empty(4 * 10**9, dtype=torch.uint8, device=s.device)
    before = s.allocated()
    s.cap(before + 5 * GB)
    with s.part("errors: a load without room is refused with numbers") as promise:
        s.row(promise, *refusal(lambda: s.load(6.5), VortexInitializationError, lambda: s.allocated() == before))
    with (
        s.part("errors: out of memory while loading releases everything") as promise,
        patch.object(loading, "available", return_value=None),  # the check passes, and memory runs out later
    ):
        s.row(promise, *refusal(lambda: s.load(6.5), VortexInitializationError, lambda: s.allocated() - before < 2**20))
    del held
    torch.cuda.empty_cache()
    s.cap(s.total)
    _out_of_memory(s, s.load(6.5))


def _out_of_memory(s: Section, engine: Engine) -> None:
    """Too little memory while drawing: a tighter plan, or an error after which the engine goes on."""
    expected = s.draw(engine, 1024)
    warnings.simplefilter("ignore")  # warnings of little memory are expected
    with s.part("errors: less room than planned: a tighter plan, the same picture") as promise:
        # as if other programs filled the card: torch gets nothing more
        s.cap(engine.ledger.held - 0.2 * GB)
        tightened = s.draw(engine, 1024)
        found = f"{len(engine.plan.streamed)} groups stream, peak {engine.plan.peak / GB:.2f} GB"
        s.row(promise, found, torch.equal(expected, tightened))
    with s.part("errors: no room at all is an error with a breakdown") as promise:
        s.cap(1.0 * GB)
        torch.cuda.empty_cache()  # else the memory of earlier pictures would do
        s.row(promise, *refusal(lambda: s.draw(engine, 1280), MemoryPressureError, lambda: True))
    with s.part("errors: and the engine goes on") as promise:
        s.cap(s.total)
        s.row(promise, "", torch.equal(expected, s.draw(engine, 1024)))
    with s.part("errors: out of memory in the middle: once more, tighter") as promise:
        decode, full = engine._model.decoder.forward, iter((True,))

        def forward(*arguments: Any) -> Any:
            if next(full, False):
                torch.empty(1 << 46, dtype=torch.uint8, device=s.device)
            return decode(*arguments)

        # no check foresees it
        with (
            patch.object(memory_manager, "available", return_value=None),
            patch.object(engine._model.decoder, "forward", forward),
        ):
            again = s.draw(engine, 1024)
        s.row(promise, "", not any(full) and torch.equal(expected, again))


def refusal(work: Callable[[], object], kind: type[VortexError], after: Callable[[], bool]) -> tuple[str, bool]:
    """What `work` said when it refused with an error of this kind, numbers in it, and whether `after` then holds."""
    try:
        work()
    except kind as error:
        said = str(error)
    else:
        return "it was not refused", False
    gc.collect()
    return said, bool(re.search(r"\d", said)) and after()
