"""Measures the promises about LoRAs at full size, on a GPU: what they cost a picture, another strength, another file.

    python tools/benchmarks/lora_contract.py                              # random weights, in a minute or two
    python tools/benchmarks/lora_contract.py --tiny --device cpu --size 64 --samples 2        # rehearsal

The LoRAs change every NF4 linear of the transformer's blocks. Pictures without and with them are drawn in turns, in one
process for each mode. A row for each promise as it is checked; ends with one JSON line, and with 1 if one is broken.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from precision_contract import draw
from random_engine import random_engine
from safetensors.torch import save_file

from vortex_core import Engine, load_flux_schnell
from vortex_core.bench.allocator import ALLOCATORS, ensure_allocator
from vortex_core.bench.machine import machine
from vortex_core.device.select import resolve_device
from vortex_core.quant.linear import NF4Linear
from vortex_core.utils.timing import Stopwatch

# of a picture with the set over one without; `five` is to cost no more than one of their ranks together
GOALS = {"rank 16": {512: 1.04, 1024: 1.02}, "rank 64": {512: 1.08, 1024: 1.05}}
CHANGE = {"exact": 5.0, "fast": 40.0, "int8": 40.0}  # ms, of another strength
READ = 300.0  # ms, of another file, whose pages are in memory


def write(path: Path, engine: Engine, rank: int, seed: int) -> str:
    """A LoRA of random factors for all linears of the blocks, by BFL's names."""
    dice = torch.Generator(engine.device).manual_seed(seed)
    tensors = {}
    for name, linear in engine._model.transformer.named_modules():
        if isinstance(linear, NF4Linear) and "blocks" in name:
            n, k = linear.shape
            factors = {"A": (rank, k, k**-0.5), "B": (n, rank, 0.02)}
            for letter, (rows, columns, size) in factors.items():
                values = torch.randn(rows, columns, generator=dice, device=engine.device) * size
                tensors[f"diffusion_model.{name}.lora_{letter}.weight"] = values.bfloat16().cpu()
    save_file(tensors, path)
    return str(path)


class Contract:
    """The promises of one run."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments, self.device = arguments, resolve_device(arguments.device)
        self.rows: list[dict[str, Any]] = []

    def check(self, promise: str, value: float, bound: float | None) -> None:
        """Compare a figure with its bound, None for one that is only told; print and keep the row."""
        holds = bound is None or value <= bound
        word = "told  " if bound is None else "holds " if holds else "BROKEN"
        print(f"{word} {promise}: {value:.4f}" + ("" if bound is None else f" <= {bound:g}"), flush=True)
        self.rows.append({"promise": promise, "value": value, "bound": bound, "holds": holds})

    def mode(self, mode: str, folder: Path) -> None:
        """One engine: pictures with each set in turns, then changes, then removal."""
        options: dict[str, Any] = {"mode": mode}
        tiny = self.arguments.tiny
        engine = load_flux_schnell("tiny", device=self.device, **options) if tiny else self._random(options)
        with engine:
            names = {16: 6, 64: 1, 80: 1}
            files = {
                rank: [write(folder / f"{mode}-{rank}-{i}.safetensors", engine, rank, i) for i in range(count)]
                for rank, count in names.items()
            }
            one, other = files[16][0], files[16][-1]
            sets: dict[str, list[tuple[str, float]]] = {"none": [], "rank 16": [(one, 0.8)]}
            if not self.arguments.short:
                sets |= {"rank 64": [(files[64][0], 0.8)], "rank 80": [(files[80][0], 0.8)]}
                sets["five of 16"] = [(path, 0.2) for path in files[16][:5]]
            before = {side: draw(engine, side, 1) for side in self.arguments.size}
            for side in self.arguments.size:
                times = self._in_turns(engine, sets, side)
                for name, seconds in times.items():
                    self.check(f"{mode} {side}, {name}: a picture, ms", 1e3 * seconds, None)
                for name, goals in GOALS.items():
                    if name in times:
                        self.check(f"{mode} {side}: {name} over none", times[name] / times["none"], goals.get(side))
                if "five of 16" in times:
                    many = times["five of 16"] / times["rank 80"]
                    self.check(f"{mode} {side}: five of rank 16 over one of 80", many, 1.02)
            self._changes(engine, mode, one, other)
            engine.set_loras([])
            for side, picture in before.items():
                same = torch.equal(draw(engine, side, 1), picture)
                self.check(f"{mode} {side}: pictures that differ once it is removed", float(not same), 0.0)

    def _random(self, options: dict[str, Any]) -> Engine:
        return random_engine(str(self.device), **options)

    def _in_turns(self, engine: Engine, sets: dict[str, list[tuple[str, float]]], side: int) -> dict[str, float]:
        """Median seconds of a picture with each set: two rounds, so that all see the same clocks."""
        times: dict[str, list[float]] = {name: [] for name in sets}
        for _ in range(2):
            for name, chosen in sets.items():
                engine.set_loras(chosen)
                for i in range(-2, self.arguments.samples):
                    with Stopwatch(self.device) as watch:
                        draw(engine, side, 1)
                    if i >= 0:
                        times[name].append(watch.seconds)
        return {name: statistics.median(each) for name, each in times.items()}

    def _changes(self, engine: Engine, mode: str, one: str, other: str) -> None:
        engine.set_loras([(one, 0.5)])
        times, reads = [], []
        for i in range(7):
            with Stopwatch(self.device) as watch:
                engine.set_loras([(one, 0.6 + i / 100)])
            times.append(watch.seconds)
        for path in (other, one) * 3:
            with Stopwatch(self.device) as watch:
                engine.set_loras([(path, 0.5)])
            reads.append(watch.seconds)
        self.check(f"{mode}: another strength, ms", 1e3 * statistics.median(times), CHANGE[mode])
        self.check(f"{mode}: another file, ms", 1e3 * statistics.median(reads), READ)
        if self.device.type == "cuda":
            engine.offload()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
            draw(engine, self.arguments.size[-1], 1)
            taken = torch.cuda.max_memory_reserved(self.device)
            self.check(f"{mode}: reserved at the peak over the plan", taken / engine.plan.peak, 1.0)


def main() -> None:
    """Parse arguments and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mode", action="append", choices=tuple(CHANGE), help="default: all")
    parser.add_argument("--short", action="store_true", help="rank 16 alone")
    parser.add_argument("--tiny", action="store_true", help="the bundled miniature")
    parser.add_argument("--device")
    parser.add_argument("--size", type=int, action="append", help="sides (default 512 and 1024)")
    parser.add_argument("--samples", type=int, default=5, help="pictures of each set, size and round")
    parser.add_argument("--allocator", choices=ALLOCATORS, help="torch's allocator (default: the one it has)")
    parser.add_argument("--json", type=Path, help="write the rows there")
    arguments = parser.parse_args()
    arguments.size = arguments.size or [512, 1024]
    ensure_allocator(arguments.allocator, [sys.executable, *sys.argv])
    contract = Contract(arguments)
    print(machine(contract.device), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for mode in arguments.mode or list(CHANGE):
            contract.mode(mode, Path(folder))
    broken = [row["promise"] for row in contract.rows if not row["holds"]]
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({"machine": machine(contract.device).as_dict(), "rows": contract.rows}))
    print(json.dumps({"promises": len(contract.rows), "broken": broken}))
    sys.exit(bool(broken))


if __name__ == "__main__":
    main()
