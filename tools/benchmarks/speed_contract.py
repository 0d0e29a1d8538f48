"""Measures every promise about speed and fidelity at full size, on a GPU, in one process, with random weights.

    python tools/benchmarks/speed_contract.py docs/reports/speed                        # about 9 minutes on an H100
    python tools/benchmarks/speed_contract.py docs/reports/speed/load --load  # after it: Triton's cache is warm
    python tools/benchmarks/speed_contract.py OUT --allocator cudaMallocAsync           # as ComfyUI has it
    python tools/benchmarks/speed_contract.py OUT --model FOLDER --device cpu --size 64 --samples 2  # rehearsal

The most important come first: the peer with 16-bit weights (compiled), Vortex in both modes, fidelity, NF4 peers.
Prints a row for each promise as it is checked. `report.json` is written after every contender and the plot after every
part, so an interrupted run leaves what it had. Ends with one JSON line; exits with 1 if a promise is broken.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vortex_core import Engine
from vortex_core.bench.allocator import ALLOCATORS, ensure_allocator
from vortex_core.bench.contest import COMFY, COMPILED, GRAPH, NF4, PLAIN, Contest, Row, clean, distance
from vortex_core.bench.peers import diffusers_velocity
from vortex_core.bench.plots import compare_plot
from vortex_core.cli.bench_output import write_folder
from vortex_core.device.select import resolve_device
from vortex_core.flux1 import sampling
from vortex_core.flux1.conditioning import Modulation
from vortex_core.flux1.spec import T5_TOKENS, FluxSpec
from vortex_core.flux1.transformer import Transformer
from vortex_core.nf4 import NF4Weight
from vortex_core.quant.backends import ReferenceBackend
from vortex_core.quant.linear import NF4Linear
from vortex_core.utils.timing import Stopwatch

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GATE = 1.5e-2  # relative error of one transformer call in bf16, on the same NF4 weights
GOALS = {"exact": {512: 0.155, 1024: 0.490}, "fast": {512: 0.090, 1024: 0.300}}  # seconds of a picture
RATIOS = {  # how many times faster `fast` is than the best of these, by side
    "eager bitsandbytes": ((NF4,), {512: 6.5, 1024: 2.8}),
    "best of bitsandbytes": ((NF4 + GRAPH, NF4 + COMPILED), {512: 2.7, 1024: 2.1}),
    "16 bits compiled": ((PLAIN + COMPILED,), {512: 2.3, 1024: 2.0}),
    "ComfyUI core": ((COMFY,), {512: 2.5, 1024: 2.2}),
}
GB = 1e9


class Contract:
    """The contest, and the promises checked on it."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.device, self.folder, self.comfyui = resolve_device(arguments.device), arguments.folder, arguments.comfyui
        self.sides = arguments.size or [512, 1024]
        self.contest = Contest(arguments.model, self.device, [(s, s) for s in self.sides], arguments.samples)
        self.contest.on_row = self._tell
        self.many = arguments.many
        self.rows: list[dict[str, Any]] = []
        self.engines: dict[str, Engine] = {}

    def _tell(self, row: Row) -> None:
        print(
            f"{row.contender} {row.width}: {1e3 * row.picture.percentile(50).seconds:.1f} ms, a step "
            f"{1e3 * row.step.percentile(50).seconds:.2f}, decode {1e3 * row.decode.percentile(50).seconds:.2f}, "
            f"{row.peak / GB:.2f} GB, off {row.off:.4f}",
            flush=True,
        )
        self._write({})

    def _write(self, plots: dict[str, Figure]) -> None:
        write_folder(self.folder, self.contest.result.figures() | {"promises": self.rows}, lambda: plots)

    def check(self, promise: str, found: float, wanted: float, *, least: bool = False, form: str = "{:.3f}") -> None:
        """Write a row: `found` must be at most `wanted`, or with `least` at least `wanted`."""
        holds = found >= wanted if least else found <= wanted
        self.rows.append({"promise": promise, "found": found, "wanted": wanted, "holds": holds})
        sign = ">=" if least else "<="
        print(
            f"{'holds ' if holds else 'BROKEN'} {promise}: {form.format(found)} {sign} {form.format(wanted)}",
            flush=True,
        )

    def missing(self, contender: str) -> None:
        """Note a contender without figures: none of its promises holds."""
        self.check(f"{contender}: draws", 0.0, 1.0, least=True, form="{:.0f}")

    def part(self, work: Callable[[], None]) -> None:
        """Run a part, print its time, and write the results so far. A part that fails breaks a promise."""
        started = time.perf_counter()
        try:
            with torch.inference_mode():
                work()
        except Exception as error:
            traceback.print_exc()
            self.rows.append({"promise": work.__name__, "found": repr(error)[:300], "wanted": None, "holds": False})
        print(f"== {work.__name__}: {time.perf_counter() - started:.0f} s", flush=True)
        self._write({"compare": compare_plot(self.contest.result)})

    def seconds(self, work: Callable[[], object]) -> float:
        """Seconds of one run."""
        with Stopwatch(self.device) as watch:
            work()
        return watch.seconds

    def median(self, work: Callable[[], object], repeats: int = 10) -> float:
        return statistics.median(self.seconds(work) for _ in range(repeats))

    def plain(self) -> None:
        self.contest.plain_peers(self.comfyui, eager=3)

    def load(self) -> None:
        """Both engines, and what the first picture costs: kernels are compiled (or read from Triton's cache), a step
        is captured."""
        side = self.sides[0]
        for mode in ("exact", "fast"):
            engine = self.engines[mode] = self.contest.engine(mode)
            draw = lambda e=engine: e.generate("a red circle", seed=1, height=side, width=side)  # noqa: E731
            engine.encode("a red circle")
            first, second = self.seconds(draw), self.seconds(draw)
            self.check(f"{engine.mode}: first picture after the second, s", first - second, 5.0)
            engine.offload()
            if engine.mode != mode:
                del self.engines[mode]
                if self.device.type == "cuda":
                    self.missing(f"Vortex {mode}")
        self.contest.leave(self.engines["exact"])

    def vortex(self) -> None:
        """Pictures, memory, new prompts, batches."""
        for engine in self.engines.values():
            self.contest.vortex(engine)
            self._pictures(engine)
            for side in self.sides:
                self._memory(engine, side)
            engine.offload()

    def _pictures(self, engine: Engine) -> None:
        mode, small, large = engine.mode, self.sides[0], self.sides[-1]
        rows = [self.contest.result.find(f"Vortex {mode}", side) for side in self.sides]
        medians = {row.height: row.picture.percentile(50).seconds for row in rows if row}
        for side, goal in GOALS[mode].items():
            if side in medians:
                self.check(f"{mode} {side}: a picture, ms", 1e3 * medians[side], 1e3 * goal, form="{:.1f}")
        flops = {side: self.contest.result.card[f"{side} x {side}"]["step_flops"] for side in self.sides}
        grown = medians[large] / medians[small]
        self.check(f"{mode}: time of {large} over {small}, against FLOPs", grown, flops[large] / flops[small])

        def draw(prompt: str = "a ring", batch: int = 1) -> Tensor:
            return engine.generate(prompt, seed=1, height=small, width=small, batch_size=batch)

        draw()
        once = self.median(draw)
        new = statistics.median(self.seconds(lambda i=i: draw(f"a ring, number {i}")) for i in range(8))
        self.check(f"{mode}: a new prompt adds, ms", 1e3 * (new - once), 250.0, form="{:.0f}")
        draw(batch=4)
        four = self.median(lambda: draw(batch=4))
        self.check(f"{mode} {small}: batch 4 over one picture", four / once, 3.6, form="{:.2f}")
        draw()
        times = sorted(self.seconds(draw) for _ in range(self.many))
        p99 = times[-(-99 * self.many // 100) - 1]
        self.check(f"{mode} {small}: P99 / P50 of {self.many}", p99 / statistics.median(times), 1.10)

    def _memory(self, engine: Engine, side: int) -> None:
        """The peak of a picture with a new prompt: text, steps and decoding. vram_contract.py checks predictions."""
        if self.device.type != "cuda":
            return
        clean(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        engine.generate(f"never seen, {side}", seed=1, height=side, width=side)
        peak = torch.cuda.max_memory_reserved(self.device) / GB
        self.check(f"{engine.mode} {side}: peak reserved, text and decode included, GB", peak, 6.5, form="{:.2f}")

    def replay(self) -> None:
        """Captured steps draw the same as launched ones, with prompts, seeds and sizes in turns."""
        for mode, engine in self.engines.items() if self.device.type == "cuda" else ():
            self._drawn(engine)
            replayed, again = self._drawn(engine), self._drawn(engine)
            graphs = engine._memory.graphs
            graphs.clear()
            graphs._capture = lambda *arguments: None
            launched = self._drawn(engine)
            del graphs._capture
            same = all(map(torch.equal, replayed, again)) and all(map(torch.equal, replayed, launched))
            self.check(f"{mode}: replayed pictures equal launched ones bit for bit", float(same), 1.0, least=True)
            engine.offload()

    def _drawn(self, engine: Engine) -> list[Tensor]:
        jobs = [(p, s, side) for s, side in enumerate(self.sides) for p in ("a blue square", "two red circles")]
        return [engine.generate(p, seed=s, height=n, width=n).cpu() for p, s, n in jobs]

    def fidelity(self) -> None:
        """One transformer call against diffusers with bitsandbytes and fp32. Wrong tables must fail the gate."""
        self.contest.return_in_nf4()
        engine, job = self.engines["exact"], self.contest.jobs[0]
        engine.resume()
        txt, pooled = job.txt.to(engine.dtype), job.pooled.to(engine.dtype)
        table = engine.condition(txt, pooled).modulation[0].to(self.device)
        img = sampling.pack(job.noise).to(self.device, engine.dtype)
        pe = tuple(t.to(self.device) for t in sampling.rope_of(job.height, job.width, T5_TOKENS, engine._spec))
        transformer = engine._model.transformer
        embedded = transformer.txt_in(txt)
        call = lambda table: transformer(img, embedded, table, pe).float()  # noqa: E731
        ours = call(table)
        peer = diffusers_velocity(self.contest.pipe.transformer)(job, img, img.new_ones(1)).float()
        self.check("exact against bitsandbytes, one call", distance(ours, peer), GATE, form="{:.5f}")
        truth = in_fp32(engine, img, txt, pooled, pe)
        mine, theirs = distance(ours, truth), distance(peer, truth)
        print(f"       against fp32: ours {mine:.5f}, the peer's {theirs:.5f}")
        self.check("exact against fp32, over the peer's error", mine / theirs, 1.05)
        worst = 1.0
        for wrong in mistakes(engine._spec, table):
            worst = min(worst, distance(call(wrong), ours))
        self.check("teeth: the smallest error of a missing block or exchanged modulation", worst, GATE, least=True)
        engine.offload()
        latents = self.contest.result.latents
        for side in self.sides if "fast" in self.engines else ():
            exact, fast, plain = (latents[name, side, side] for name in ("Vortex exact", "Vortex fast", PLAIN))
            own = distance(exact, plain)
            moved = float((fast - exact).norm() / plain.norm())
            self.check(f"fast {side}: latents from exact's, over NF4's own distance", moved / own, 0.5)

    def peers(self) -> None:
        self.contest.nf4_peers()
        result = self.contest.result
        for contender in result.declined if self.device.type == "cuda" else ():
            self.missing(contender)
        for name, (contenders, goals) in RATIOS.items():
            for side, goal in goals.items():
                rows = [row for contender in contenders if (row := result.find(contender, side))]
                ours = result.find("Vortex fast", side)
                if rows and ours:
                    best = min(row.picture.percentile(50).seconds for row in rows)
                    times = best / ours.picture.percentile(50).seconds
                    self.check(f"fast {side}: times faster than {name}", times, goal, least=True, form="{:.2f}")


def in_fp32(engine: Engine, img: Tensor, txt: Tensor, pooled: Tensor, pe: Any) -> Tensor:
    """The velocity at the first step with the same NF4 weights and fp32 everywhere else."""
    with torch.device("meta"):
        transformer, modulation = Transformer(engine._spec), Modulation(engine._spec)
    for module, like in ((transformer, engine._model.transformer), (modulation, engine._conditioner.modulation)):
        for path, part in list(like.named_modules()):
            if isinstance(part, NF4Linear):
                bias = None if part.bias is None else part.bias.to(img.device).float()
                weight = NF4Weight(part.packed.to(img.device), part.absmax.to(img.device))
                module.set_submodule(path, NF4Linear(weight, bias, ReferenceBackend()))
        for path, parameter in like.named_parameters():
            owner, _, name = path.rpartition(".")
            value = torch.nn.Parameter(parameter.to(img.device).float(), requires_grad=False)
            setattr(module.get_submodule(owner), name, value)
    table = modulation(torch.ones(1, device=img.device), pooled.float())[0]
    return transformer(img.float(), transformer.txt_in(txt.float()), table, pe)


def mistakes(spec: FluxSpec, table: Tensor) -> Iterator[Tensor]:
    """Modulation tables with one block left out, then with two blocks of a kind exchanged."""
    doubles = [(slice(12 * i, 12 * i + 12), [2, 5, 8, 11]) for i in range(spec.double_blocks)]
    start = 12 * spec.double_blocks
    singles = [(slice(start + 3 * i, start + 3 * i + 3), [2]) for i in range(spec.single_blocks)]
    for place, gates in (*doubles, *singles):
        wrong = table.clone()
        wrong[place][gates] = 0  # what a block adds is multiplied by its gates
        yield wrong
    for kind in (doubles, singles):
        for (one, _), (two, _) in pairwise(kind):
            wrong = table.clone()
            wrong[one], wrong[two] = table[two], table[one]
            yield wrong


def main() -> None:
    """Parse arguments and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="for report.json and the plot")
    parser.add_argument("--model", type=Path, help="a diffusers folder (default: random weights of the real size)")
    parser.add_argument("--comfyui", type=Path, help="a ComfyUI tree, to time its core too")
    parser.add_argument("--device")
    parser.add_argument("--size", type=int, action="append", help="sides (default 512 and 1024)")
    parser.add_argument("--samples", type=int, default=30, help="pictures of each contender and size")
    parser.add_argument("--many", type=int, default=100, help="pictures for P99 over P50")
    parser.add_argument("--allocator", choices=ALLOCATORS, help="torch's (default: as it is)")
    parser.add_argument(
        "--load", action="store_true", help="only the first pictures; a second run finds Triton's cache warm"
    )
    arguments = parser.parse_args()
    ensure_allocator(arguments.allocator, [sys.executable, *sys.argv])
    contract = Contract(arguments)
    parts = (contract.plain, contract.load, contract.vortex, contract.replay, contract.fidelity, contract.peers)
    for work in (contract.load,) if arguments.load else parts:
        contract.part(work)
    broken = [row["promise"] for row in contract.rows if not row["holds"]]
    print(json.dumps({"promises": contract.rows, "broken": broken}))
    raise SystemExit(1 if broken else 0)


if __name__ == "__main__":
    main()
