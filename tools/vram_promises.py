"""The promises of the VRAM budget, section by section; tools/vram_contract.py runs them."""

from __future__ import annotations

import gc
import math
import re
import statistics
import sys
import time
import warnings
from copy import deepcopy
from itertools import pairwise
from typing import Any

import torch
from vram_section import GB, PROMPT, HostPeak, Section, compared, copy_rate, host_memory, plan_cost
from whole_vae import whole_decode

from vortex_core import MemoryPressureError, VortexInitializationError, VortexInputError, loading, room
from vortex_core.planner import cost
from vortex_core.vae import decode
from vortex_core.vram import Sampler, peak, snapshot


def default(s: Section) -> None:
    """6.5 GB, the default budget."""
    s.cap(6.5 * GB)  # torch's own cap: more than the budget is refused, whoever asks
    budget = s.gb(6.5)
    s.reset()
    with HostPeak() as host, peak(s.device) as whole:
        started = time.perf_counter()
        engine = s.load(budget)
        loaded = time.perf_counter() - started
    s.row(
        "6.5 GB: load within the budget",
        f"{whole.reserved / GB:.3f} GB reserved, {loaded:.1f} s",
        whole.reserved <= budget * GB,
    )
    s.row(
        "6.5 GB: resident after load <= 5.3 GB",
        f"allocated {s.allocated() / GB:.3f}, reserved {s.reserved() / GB:.3f} GB",
        s.reserved() <= 5.3 * GB,
    )
    pinned = engine.pinned_bytes / GB
    s.row("pinned host memory <= 5.0 GB", f"{pinned:.2f} GB", 0 < pinned <= 5.0)
    s.row(
        "load RSS peak <= pinned + 2.5 GB",
        f"{host.resident:.2f} GB, of which anonymous {host.anonymous:.2f}; {host_memory()}",
        host.resident <= pinned + 2.5,
    )
    with s.part("default: sizes"):
        for side, batch in ((512, 1), (768, 1), (1024, 1), (1024, 4)):
            s.reset()
            before = s.allocated()
            with Sampler(s.device) as sampler:
                s.draw(engine, side, batch, prompt=f"{PROMPT} {side} {batch}")
            plan = engine.plan
            what = f"6.5 GB: {side} x {side}, batch {batch}"
            process = sampler.most("process")
            s.row(
                f"{what}: reserved peak <= 6.5 GB",
                f"{s.peak() / GB:.3f} GB, NVML process {(process or 0) / GB:.3f} GB, "
                f"slices of {plan.slice}, strips of {plan.demand.rows}",
                s.peak() <= 6.5 * GB,
            )
            s.row(
                f"{what}: NVML process <= 7.0 GB + context",
                f"{(process or 0) / GB:.3f} GB; context about {s.context / GB:.2f} GB",
                None if process is None else process <= 7.0 * GB + s.context,
            )
            s.row(
                f"{what}: predicted 0 to 3% above",
                compared(plan, s.peak()),
                s.peak() <= plan.peak <= 1.03 * s.peak(),
            )
            if (side, batch) == (512, 1):
                added = s.peak("allocated") - min(before, s.allocated())
                held = engine._room.components["workspace"]
                s.row(
                    "generation adds < 0.5 GB at 512",
                    f"{(s.peak('allocated') - before) / GB:.3f} GB the first time, workspace {held / GB:.3f} GB",
                    max(added, s.peak("allocated") - before) < 0.5 * GB,
                )
    with s.part("default: instruments"):
        ledger = engine.ledger
        s.row(
            "the ledger adds up to torch's reserved",
            {k: round(v / GB, 3) for k, v in ledger.rows.items()},
            sum(ledger.rows.values()) == s.reserved() and 0 <= ledger.others < 0.05 * GB,
        )
        before = s.peak()
        with peak(s.device) as outer:
            if s.cuda:
                x = torch.empty(2**28, dtype=torch.uint8, device=s.device)
                with peak(s.device) as inner:
                    y = torch.empty(2**28, dtype=torch.uint8, device=s.device)
                    del y
                del x
        s.row(
            "scoped peaks nest and reset nothing",
            f"{outer}, {inner if s.cuda else ''}",
            s.peak() >= before and outer.reserved >= inner.reserved if s.cuda else None,
        )
    with s.part("default: new prompt"):
        count = iter(range(1000))
        s.row(
            "6.5 GB: a new prompt, ms",
            f"{s.ms(lambda: engine.encode(f'{PROMPT} {next(count)}')):.1f}",
            True,
            plan=plan_cost(s, engine),
        )
    with s.part("default: pictures"):
        for side in (512, 1024):
            s.row(f"6.5 GB: a picture at {side}, ms", f"{s.ms(lambda side=side: s.draw(engine, side)):.1f}", True)
        print(f"  {snapshot(s.device)}", file=sys.stderr)


def card8(s: Section) -> None:
    """An 8 GB card with the default budget: 1 GB stays free."""
    context = s.context
    s.cap(8 * GB - context)  # the card's memory but for the context
    engine = s.load(s.gb(6.5))
    with Sampler(s.device) as sampler:
        s.draw(engine, 1024)
    process = sampler.most("process") or s.peak() + context
    s.row(
        "8 GB card: 1024 completes with 1 GB left",
        f"process {process / GB:.3f} GB, so {8 - process / GB:.3f} GB left",
        process <= 7.0 * GB,
    )


def card12(s: Section) -> None:
    """A 12 GB card: everything resident, a new prompt streams nothing."""
    context = s.context
    s.cap(12 * GB - context)
    s.reset()
    engine = s.load(s.gb(11))
    s.draw(engine, 1024)
    s.row(
        "12 GB card, 11 GB budget: everything resident",
        f"{len(engine.plan.streamed)} units stream, pinned {engine.pinned_bytes / GB:.2f} GB, "
        f"peak {s.peak() / GB:.3f} GB",
        not engine.plan.streamed and s.peak() <= 11 * GB,
    )
    plan = engine.plan
    s.row(
        "12 GB card: predicted 0 to 3% above",
        compared(plan, s.peak()),
        s.peak() <= plan.peak <= 1.03 * s.peak(),
    )
    count = iter(range(1000))
    s.row("12 GB card: a new prompt, ms", f"{s.ms(lambda: engine.encode(f'{PROMPT} {next(count)}')):.1f}", True)


def tight(s: Section) -> None:
    """4.5 GB: blocks stream, and the slowdown is the plan's."""
    s.reset()
    with HostPeak() as host:
        engine = s.load(s.gb(4.5))
    s.draw(engine, 512)
    plan = engine.plan
    blocks = [piece for piece in plan.pieces if piece.group == "blocks" and piece.name in plan.streamed]
    s.row(
        "4.5 GB: 512 completes with blocks streamed",
        f"{len(blocks)} blocks, {sum(p.nbytes for p in blocks) / GB:.2f} GB; "
        f"pinned {engine.pinned_bytes / GB:.2f}, RSS {host.resident:.2f} GB",
        bool(blocks),
    )
    s.row("4.5 GB: reserved <= 4.5 GB, load included", f"{s.peak() / GB:.3f} GB", s.peak() <= 4.5 * GB)
    s.row(
        "4.5 GB: predicted 0 to 3% above",
        compared(plan, s.peak()),
        s.peak() <= plan.peak <= 1.03 * s.peak(),
    )
    streamed = s.ms(lambda: s.draw(engine, 512), repeats=8)
    stamps: list[float] = []

    def stamp(*step: Any) -> None:
        if s.cuda:
            torch.cuda.synchronize(s.device)
        stamps.append(time.perf_counter())

    # the same engine with room for its blocks: they come back
    engine._room.budget = int(s.gb(6.5) * GB)
    resident = s.ms(lambda: s.draw(engine, 512), repeats=8)
    for _ in range(3):
        s.draw(engine, 512, on_step=stamp)
    steps = [later - earlier for i, (earlier, later) in enumerate(pairwise(stamps)) if i % 4 != 3]
    step_ms = statistics.median(steps) * 1e3
    expected = cost(plan, rate=copy_rate(s), steps=4, step_ms=step_ms).picture
    found, told = streamed / resident, (resident + expected) / resident
    s.row(
        "4.5 GB: the slowdown is the plan's within 25%",
        f"x{found:.3f} against x{told:.3f} ({resident:.1f} ms resident, {streamed:.1f} streamed, "
        f"plan +{expected:.1f} at {copy_rate(s) / GB:.1f} GB/s, step {step_ms:.1f} ms)",
        abs(found / told - 1) <= 0.25,
        extra_ms=streamed - resident,
        plan_ms=expected,
    )


def grid(s: Section) -> None:
    """Predicted and measured peaks over sizes and batches, smallest first, at a budget that keeps weights resident."""
    engine = s.load(s.gb(8))
    worst: list[float] = []
    for side, batch in (
        (256, 1),
        (512, 1),
        (512, 2),
        (768, 1),
        (512, 4),
        (1024, 1),
        (768, 2),
        (1024, 2),
        (1280, 1),
        (1024, 4),
        (1536, 1),
    ):
        with s.part(f"grid: {side} x {side}, batch {batch}"):
            if s.cuda:
                engine._room.placement.workspace.release()  # as if it were the first picture
                torch.cuda.empty_cache()
            s.reset()
            s.draw(engine, side, batch, prompt=f"{PROMPT} {side} {batch}")
            plan, measured = engine.plan, max(1, s.peak())
            worst.append(plan.peak / measured - 1)
            s.row(
                f"grid: {side} x {side}, batch {batch}: predicted 0 to 3% above",
                f"{compared(plan, measured)}; slices of {plan.slice}, strips of {plan.demand.rows}, "
                f"{len(plan.streamed)} units stream",
                0 <= worst[-1] <= 0.03,
            )
    s.row(
        "grid: predicted peaks, all", f"{min(worst):+.2%} to {max(worst):+.2%}", 0.03 >= max(worst) >= min(worst) >= 0
    )


def soak(s: Section) -> None:
    """200 pictures over mixed sizes, batches and prompts: nothing grows. One step each, which takes the same memory."""
    engine = s.load(s.gb(6.5))
    cycle = [
        (512, 1, 0),
        (256, 2, 1),
        (768, 1, 2),
        (512, 2, 3),
        (256, 1, 0),
        (1024, 1, 4),
        (512, 1, 5),
        (384, 3, 1),
        (256, 4, 6),
        (512, 1, 7),
    ]
    reserved, allocated, most = [], [], []
    drawn = 0
    while drawn < (200 if s.cuda else 20):
        for side, batch, prompt in cycle:
            s.draw(engine, side, batch, prompt=f"{PROMPT} {prompt}", steps=1)
            drawn += 1
        gc.collect()
        reserved.append(s.reserved())
        allocated.append(s.allocated())
        most.append(s.peak())
    s.row(
        "soak: reserved grows by 0 after the first cycle",
        f"{drawn} calls: first {reserved[0]}, last {reserved[-1]}, most {max(reserved)}",
        max(reserved) == reserved[0],
    )
    s.row(
        "soak: the peak does not grow after the first cycle", f"first {most[0]}, last {most[-1]}", most[-1] == most[0]
    )
    s.row("soak: allocated returns to the same byte", f"{sorted(set(allocated))}", len(set(allocated)) == 1)


def same(s: Section) -> None:
    """Bit for bit under every placement; strips against whole; within the budget or not."""
    seen: dict[str, list[Any]] = {}

    def draw(engine: Any, name: str) -> None:
        for side in (512, 1024):
            last: list[Any] = []
            picture = s.draw(engine, side, on_step=lambda i, n, clean: last.append(clean.cpu()) if i == n else None)  # noqa: B023
            seen.setdefault(f"{side} latents", []).append(last[0])
            seen.setdefault(f"{side} pictures", []).append(picture.cpu())
        print(
            f"  {name}: {len(engine.plan.streamed)} units stream, peak {engine.plan.peak / GB:.2f} GB", file=sys.stderr
        )

    engine = s.load(s.gb(11))
    draw(engine, "all resident")
    for budget in (8, 6.5, 4.5, 3):
        engine._room.budget = int(s.gb(budget) * GB)
        engine._conditioner._cache.clear()
        draw(engine, f"{budget} GB")
    for what, results in seen.items():
        equal = all(torch.equal(results[0], other) for other in results)
        worst = max((results[0] - other).abs().max().item() for other in results)
        s.row(f"same: {what} bit for bit under {len(results)} placements", f"largest difference {worst:.2e}", equal)
    engine._room.budget = int(s.gb(8) * GB)
    with s.part("same: offload and resume"):
        engine.offload()
        engine._conditioner._cache.clear()
        again = s.draw(engine, 512).cpu()
        s.row("same: after offload and resume", "", torch.equal(again, seen["512 pictures"][0]))
    with s.part("same: strips"), torch.inference_mode():
        latents = seen["512 latents"][0].to(s.device)
        side = latents.shape[-1] * 8
        out = torch.empty(1, side, side, 3, device=s.device)
        for decoder, what in ((engine._decoder, "in the engine's type"), (deepcopy(engine._decoder).float(), "fp32")):
            strips = {rows: decode(decoder, latents, out, rows).clone() for rows in (None, 32, 16)}
            others = {"16 against 32 rows": strips[16], "an eighth against 32 rows": strips[None]}
            others["whole, torch's GroupNorm, against 32 rows"] = whole_decode(decoder, latents)
            for name, other in others.items():
                off = (other - strips[32]).abs() * 255
                found = f"mean {off.mean():.4f}/255, max {off.max():.3f}/255"
                s.row(f"same: decoding 512, {what}, {name}", found, off.mean() < 1 and off.max() < 4)


def errors(s: Section) -> None:
    """Refusals with numbers, and running out of memory."""

    for budget in (0.01, -1, math.nan, 10_000)[: None if s.cuda else 3]:
        with s.part(f"errors: budget {budget}"):
            before = s.allocated()
            try:
                s.load(budget).unload()
                s.row(f"errors: a budget of {budget} GB is refused", "it was not", False)
            except VortexInputError as error:
                s.row(
                    f"errors: a budget of {budget} GB is refused",
                    error,
                    s.allocated() == before and re.search(r"\d", str(error)),
                )
    if not s.cuda:
        return
    with s.part("errors: loading without room"):
        held = torch.empty(int(s.total * 0.5), dtype=torch.uint8, device=s.device)
        s.cap(held.numel() + 5 * GB)
        try:
            s.load(6.5)
            s.row("errors: a load without room", "it loaded", False)
        except VortexInitializationError as error:
            s.row("errors: a load without room is refused with numbers", error, s.allocated() == held.numel())
        # the check is passed, and memory runs out on the way
        check, loading.available = loading.available, lambda device, own=0: None
        try:
            s.load(6.5)
            s.row("errors: out of memory while loading", "it loaded", False)
        except VortexInitializationError as error:
            gc.collect()
            s.row(
                "errors: out of memory while loading releases everything",
                f"{s.allocated() - held.numel()} bytes left; {error}",
                s.allocated() - held.numel() < 2**20,
            )
        loading.available = check
        del held
        torch.cuda.empty_cache()
        s.cap(s.total)
    with s.part("errors: out of memory while generating"):
        engine = s.load(6.5)
        expected = s.draw(engine, 1024)
        taken = engine.ledger.reserved
        # the card fills up behind its back: torch may have nothing beyond what it has
        s.cap(taken - 0.2 * GB)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tightened = s.draw(engine, 1024)
        s.row(
            "errors: less room than planned: a tighter plan, the same picture",
            f"{len(engine.plan.streamed)} units stream, peak {engine.plan.peak / GB:.2f} GB",
            torch.equal(expected, tightened),
        )
        s.cap(1.0 * GB)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                s.draw(engine, 1024)
            s.row("errors: no room at all", "it drew", False)
        except MemoryPressureError as error:
            s.row("errors: no room at all is an error with a breakdown", error, bool(error.breakdown))
        s.cap(s.total)
        s.row("errors: and the engine goes on", "", torch.equal(expected, s.draw(engine, 1024)))
        # memory that runs out in the middle, where no check sees it coming
        check, room.available = room.available, lambda device, own=0: None
        decode, calls = engine._decoder.forward, iter((True, False))

        def full(*arguments: Any) -> Any:
            if next(calls, False):
                torch.empty(1 << 46, dtype=torch.uint8, device=s.device)
            return decode(*arguments)

        engine._decoder.forward = full
        s.row(
            "errors: out of memory in the middle: once more, tighter", "", torch.equal(expected, s.draw(engine, 1024))
        )
        engine._decoder.forward, room.available = decode, check


SECTIONS = {section.__name__: section for section in (default, card8, card12, tight, grid, soak, same, errors)}
