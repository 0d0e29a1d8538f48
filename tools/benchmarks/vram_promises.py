"""The promises of the VRAM budget, section by section; tools/benchmarks/vram_contract.py runs them.

Peaks, speed and growth are here. vram_behaviour.py has the others.
"""

from __future__ import annotations

import gc
import sys
import time

import torch
from vram_behaviour import backends, errors, reload, same, threads
from vram_section import GB, PROMPT, HostPeak, Section, copy_rate, host_memory

from vortex_core import Engine
from vortex_core.device.vram import Sampler, peak, snapshot
from vortex_core.memory.planner import cost


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
        "load RSS peak <= 7.5 GB (pinned at most 5.0, and 2.5)",
        f"{host.resident:.2f} GB, of which anonymous {host.anonymous:.2f}; {host_memory()}",
        0 < host.resident <= 7.5,
    )
    sizes(s, engine)
    s.cap(s.total)  # the checks below take memory of their own
    instruments(s, engine)
    print(f"  {snapshot(s.device)}", file=sys.stderr)


def sizes(s: Section, engine: Engine) -> None:
    """Pictures of every size within 6.5 GB."""
    for side, batch in ((512, 1), (768, 1), (1024, 1), (1024, 4)):
        with s.part(f"6.5 GB: {side} x {side}, batch {batch}") as what:
            s.reset()
            before = s.allocated()
            with Sampler(s.device) as sampler:
                s.draw(engine, side, batch, prompt=f"{PROMPT} {side} {batch}")
            process = sampler.most("process")
            s.row(
                f"{what}: reserved peak <= 6.5 GB",
                f"{s.peak() / GB:.3f} GB",
                s.peak() <= 6.5 * GB,
            )
            s.row(
                f"{what}: NVML process <= 7.0 GB + context",
                f"{(process or 0) / GB:.3f} GB; context about {s.context / GB:.2f} GB",
                None if process is None else process <= 7.0 * GB + s.context,
            )
            s.predicted(what, engine.plan, budget=6.5, process=process)
            if (side, batch) == (1024, 1):
                s.row(f"{what}: reserved peak <= 6.2 GB", f"{s.peak() / GB:.3f} GB", s.peak() <= 6.2 * GB)
                s.row(
                    f"{what}: whole process on the card, context included, < 7.0 GB",
                    f"{(process or 0) / GB:.3f} GB",
                    None if process is None else process < 7.0 * GB,
                )
            if (side, batch) == (512, 1):
                added = s.peak("allocated") - min(before, s.allocated())
                held = engine.ledger.components["arena"] + engine.ledger.components["libraries"]
                s.row(
                    "generation adds < 0.5 GB at 512",
                    f"{(s.peak('allocated') - before) / GB:.3f} GB the first time, in blocks {held / GB:.3f} GB",
                    max(added, s.peak("allocated") - before) < 0.5 * GB,
                )


def instruments(s: Section, engine: Engine) -> None:
    """The instruments that measure memory agree with each other."""
    with s.part("default: instruments"):
        ledger = engine.ledger
        s.row(
            "the ledger adds up to torch's reserved",
            {k: round(v / GB, 3) for k, v in ledger.rows.items()},
            0 <= ledger.others < 0.02 * GB and ledger.cached >= 0 and sum(ledger.rows.values()) == s.reserved(),
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


def card8(s: Section) -> None:
    """An 8 GB card with the default budget: 1 GB stays free."""
    context = s.context
    s.cap(8 * GB - context)  # the card's memory but for the context
    s.reset()
    engine = s.load(s.gb(6.5))
    with Sampler(s.device) as sampler:
        s.draw(engine, 1024)
    process = sampler.most("process") or s.peak() + context
    s.predicted("8 GB card, 6.5 GB budget", engine.plan, budget=6.5, card=8, process=process)
    s.row(
        "8 GB card: 1024 completes with 1 GB left",
        f"process {process / GB:.3f} GB, so {8 - process / GB:.3f} GB left",
        process <= 7.0 * GB,
    )


def card12(s: Section) -> None:
    """A 12 GB card: everything resident, so that a new prompt streams nothing."""
    context = s.context
    s.cap(12 * GB - context)
    s.reset()
    engine = s.load(s.gb(11))
    with Sampler(s.device) as sampler:
        s.draw(engine, 1024)
    s.row(
        "12 GB card, 11 GB budget: everything resident",
        f"{len(engine.plan.streamed)} groups stream, pinned {engine.pinned_bytes / GB:.2f} GB, "
        f"peak {s.peak() / GB:.3f} GB",
        not engine.plan.streamed and s.peak() <= 11 * GB,
    )
    s.predicted("12 GB card, 11 GB budget", engine.plan, budget=11, card=12, process=sampler.most("process"))


def tight(s: Section) -> None:
    """4.5 GB: blocks stream, and the budget holds."""
    s.reset()
    with HostPeak() as host:
        engine = s.load(s.gb(4.5))
    with Sampler(s.device) as sampler:
        s.draw(engine, 512)
    plan = engine.plan
    blocks = [group for group in plan.groups if group.part == "blocks" and group.name in plan.streamed]
    s.row(
        "4.5 GB: 512 completes with blocks streamed",
        f"{len(blocks)} blocks, {sum(p.nbytes for p in blocks) / GB:.2f} GB; "
        f"pinned {engine.pinned_bytes / GB:.2f}, RSS {host.resident:.2f} GB",
        bool(blocks),
    )
    s.row("4.5 GB: reserved <= 4.5 GB, load included", f"{s.peak() / GB:.3f} GB", s.peak() <= 4.5 * GB)
    s.predicted("4.5 GB", plan, budget=4.5, process=sampler.most("process"))
    captured = dict(engine._memory.graphs._graphs)
    s.draw(engine, 512)
    same = bool(captured) and captured == engine._memory.graphs._graphs
    s.row("4.5 GB: the next picture replays what was captured", f"{len(captured)} size", same if s.cuda else None)


def speed(s: Section) -> None:
    """What streaming costs, against the plan. It measures times: nothing else may use the card meanwhile."""
    engine = s.load(s.gb(11))
    count = iter(range(1000))
    pictures: dict[float, float] = {}
    for budget in (11, 6.5, 4.5):
        with s.part(f"{budget} GB: times"):
            engine.limit(s.gb(budget))
            pictures[budget] = s.ms(lambda: s.draw(engine, 512), repeats=8)
            prompt = s.ms(lambda: engine.encode(f"{PROMPT} {next(count)}"))
            found = cost(engine.plan, rate=copy_rate(s), steps=4)
            s.row(
                f"{budget} GB: a new prompt, ms",
                f"{prompt:.1f}, where the plan has {found[0]:.1f} at {copy_rate(s) / GB:.1f} GB/s",
                None,
                budget=budget,
                what="a new prompt",
                ms=prompt,
                plan_ms=found[0],
            )
            picture = {"budget": budget, "what": "a picture at 512", "ms": pictures[budget]}
            s.row(f"{budget} GB: a picture at 512, ms", f"{pictures[budget]:.1f}", None, **picture)
    with s.part("4.5 GB: the slowdown is the plan's within 25%") as promise:
        s.draw(engine, 512)
        tight = engine.plan
        engine.limit(s.gb(6.5))
        step_ms = s.step_ms(engine, 512)
        expected = cost(tight, rate=copy_rate(s), steps=4, step_ms=step_ms)[1]
        resident, streamed = pictures[6.5], pictures[4.5]
        slower, told = streamed / resident, (resident + expected) / resident
        s.row(
            promise,
            f"x{slower:.3f} against x{told:.3f} ({resident:.1f} ms resident, {streamed:.1f} streamed, "
            f"plan +{expected:.1f} at {copy_rate(s) / GB:.1f} GB/s, step {step_ms:.1f} ms)",
            abs(slower / told - 1) <= 0.25,
            extra_ms=streamed - resident,
            plan_ms=expected,
        )
    with s.part("6.5 GB: a picture at 1024, ms") as what:
        ms = s.ms(lambda: s.draw(engine, 1024))
        s.row(what, f"{ms:.1f}", None, budget=6.5, what="a picture at 1024", ms=ms)


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
            s.draw(engine, side, batch, steps=1)  # weights move to where this plan has them
            if s.cuda:
                engine._memory.release()  # as if it were the first picture
            s.reset()
            s.draw(engine, side, batch, prompt=f"{PROMPT} {side} {batch}")
            worst.append(s.predicted(f"grid: {side} x {side}, batch {batch}", engine.plan, budget=8))
    s.row(
        "grid: predicted peaks, all", f"{min(worst):+.2%} to {max(worst):+.2%}", 0.03 >= max(worst) >= min(worst) >= 0
    )


def soak(s: Section) -> None:
    """200 pictures of mixed sizes, batches and prompts: nothing grows. One step takes as much memory as four."""
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
        print(f"  {drawn} calls: {snapshot(s.device)}", file=sys.stderr)
    s.row(
        "soak: reserved grows by 0 after the first cycle",
        f"{drawn} calls: first {reserved[0]}, last {reserved[-1]}, most {max(reserved)}",
        max(reserved) == reserved[0],
    )
    s.row(
        "soak: the peak does not grow after the first cycle", f"first {most[0]}, last {most[-1]}", most[-1] == most[0]
    )
    s.row("soak: allocated returns to the same byte", f"{sorted(set(allocated))}", len(set(allocated)) == 1)


ORDER = (default, card8, card12, tight, grid, soak, same, threads, reload, backends, errors, speed)
SECTIONS = {section.__name__: section for section in ORDER}
