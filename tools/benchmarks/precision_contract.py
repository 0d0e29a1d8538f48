"""Measures the promises about 8 bits at full size, on a GPU, in one process: how coarsely they round, and their speed.

    python tools/benchmarks/full_size.py build /dev/shm/random-schnell
    python tools/benchmarks/precision_contract.py /dev/shm/random-schnell --json precision.json
    python tools/benchmarks/precision_contract.py random --only speed --only budget    # without files: in a minute
    python tools/benchmarks/precision_contract.py tiny --device cpu --size 64 --samples 2        # rehearsal

Parts: `rounding` (a product, a step, and a block whose activations have outliers, each against the same NF4 weights in
fp32), `latents` (of whole pictures, over NF4's own distance to 16 bits), `speed` (int8 beside exact and fast, in
turns), `budget` (8-bit copies of blocks, where the budget has room). A row for each promise as it is checked; ends with
one JSON line, and with 1 if a promise is broken.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from random_engine import random_engine
from speed_contract import in_fp32
from torch import Tensor

from vortex_core import Engine, nf4
from vortex_core.bench.allocator import ALLOCATORS, ensure_allocator
from vortex_core.bench.contest import distance
from vortex_core.bench.machine import machine
from vortex_core.device.select import resolve_device
from vortex_core.flux1 import sampling
from vortex_core.flux1.spec import SINGLE_ROWS, T5_TOKENS
from vortex_core.flux1.step_buffers import StepBuffers
from vortex_core.flux1.transformer import Next, SingleBlock
from vortex_core.kernels import Kernels, ScaledTensor, choose_kernels, reference
from vortex_core.quant.backends import Backend, ReferenceBackend, choose_backend
from vortex_core.quant.linear import NF4Linear, multiply
from vortex_core.quant.precision import EXACT, Fp8, Int8, Precision
from vortex_core.storage.materialize import is_quantized
from vortex_core.utils.timing import Stopwatch

GB = 1e9
DEFAULT, LARGE = 6.5, 16.0  # GB
GOALS = {"int8 over exact": {512: 0.75, 1024: 0.80}, "copies": {512: 0.88, 1024: 0.96}}


class Contract:
    """The promises, and what they are checked on."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.device, self.model, self.samples = resolve_device(arguments.device), arguments.model, arguments.samples
        self.sides = arguments.size or [512, 1024]
        self.rows: list[dict[str, Any]] = []
        self.beyond: dict[tuple[str, str], float] = {}  # by precision and case
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.kernels: Kernels = choose_kernels(self.device)
        self.precisions: tuple[Precision, ...] = (EXACT, Fp8(fp8_attention=True), Int8(self.kernels))

    def check(self, promise: str, found: float, wanted: float | None, *, least: bool = False) -> None:
        """A row: `found` must be at most `wanted`, or with `least` at least that; None: only told."""
        holds = wanted is None or (found >= wanted if least else found <= wanted)
        self.rows.append({"promise": promise, "found": found, "wanted": wanted, "holds": holds})
        bound = "" if wanted is None else f" {'>=' if least else '<='} {wanted:g}"
        said = "told  " if wanted is None else "holds " if holds else "BROKEN"
        print(f"{said} {promise}: {found:.4f}{bound}", flush=True)

    def part(self, work: Callable[[], None]) -> None:
        """Run a part; one that fails breaks a promise."""
        try:
            with torch.inference_mode():
                work()
        except Exception as error:
            traceback.print_exc()
            self.rows.append({"promise": work.__name__, "found": repr(error)[:300], "wanted": None, "holds": False})
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def engine(self, mode: str, **options: Any) -> Engine:
        options = {"vram_budget": DEFAULT, "mode": mode} | options
        if self.model == "random":
            return random_engine(str(self.device), **options)
        return Engine.load(self.model, device=self.device, **options)

    # --- rounding -------------------------------------------------------------------------------------------------

    def rounding(self) -> None:
        self._product()
        with self.engine("exact") as engine:
            self._step(engine)
            for name, outliers in (("plain", None), ("channels", channels), ("spikes", spikes)):
                self._block(engine, name, outliers)
        for kind in ("channels", "spikes"):
            self.check(
                f"int8, one block, {kind}: over plain", self.beyond["int8", kind] / self.beyond["int8", "plain"], 1.5
            )

    def compare(self, what: str, truth: Tensor, found: dict[str, Tensor]) -> None:
        """How far each precision is from the truth beyond exact: errors that do not depend on each other add up as
        squares."""
        off = {name: distance(y, truth) for name, y in found.items()}
        beyond = {name: max(0.0, each**2 - off["exact"] ** 2) ** 0.5 for name, each in off.items()}
        self.beyond |= {(name, what): each for name, each in beyond.items()}
        for name, each in off.items():
            self.check(f"{what}: {name} to fp32", each, None)
        self.check(f"{what}: int8 beyond exact, over fp8 beyond exact", beyond["int8"] / max(beyond["fp8"], 1e-9), 0.5)

    def _product(self) -> None:
        """Of the MLP's narrowing product, whose operand follows the GELU."""
        torch.manual_seed(0)
        n, k, m = 3072, 12288, 1280
        weight = nf4.quantize((torch.randn(n, k, device=self.device) / k**0.5).to(self.dtype))
        x = torch.randn(1, m, k, device=self.device).to(self.dtype)
        active = torch.nn.functional.gelu(x.float(), approximate="tanh").to(self.dtype)
        truth = active.float() @ nf4.dequantize(weight, torch.float32).t()
        found = {}
        for precision in self.precisions:
            linear = NF4Linear(weight, None, choose_backend(self.device))
            linear.use(precision)
            operand = ScaledTensor(active)
            if precision.operand is not None:
                scale = torch.empty(1, m, device=self.device)
                operand = ScaledTensor(torch.empty_like(active, dtype=precision.operand), scale)
                self.kernels.quantize(active, operand)
            out = torch.empty(1, m, n, device=self.device, dtype=self.dtype)
            multiply(linear, operand, out)
            found[precision.name] = out
        self.compare("product", truth, found)

    def _step(self, engine: Engine) -> None:
        side = self.sides[0]
        transformer = engine._model.transformer
        txt, pooled, noise = self.inputs(engine, side)
        table = engine.condition(txt, pooled).modulation[0].to(self.device)
        img = sampling.pack(noise).to(self.device, self.dtype)
        pe = tuple(t.to(self.device) for t in sampling.rope_of(side, side, T5_TOKENS, engine._spec))
        embedded, found = transformer.txt_in(txt.to(self.device, self.dtype)), {}
        for precision in self.precisions:
            transformer.use(self.kernels, precision)
            found[precision.name] = transformer(img, embedded, table, pe).float()
        transformer.use(self.kernels)
        truth = in_fp32(engine, img, txt.to(self.device, self.dtype), pooled.to(self.device, self.dtype), pe)
        self.compare("step", truth, found)

    def _block(self, engine: Engine, what: str, outliers: Callable[[Tensor, Tensor], None] | None) -> None:
        """A single block: adaLN, the wide product, attention, GELU, the narrow product, whose result is compared."""
        spec, side = engine._spec, self.sides[0]
        size = (1, T5_TOKENS, (side // 16) ** 2)
        torch.manual_seed(0)
        x = torch.randn(1, size[1] + size[2], spec.hidden, device=self.device)
        mod = torch.randn(SINGLE_ROWS, spec.hidden, device=self.device) / 4
        if outliers is not None:
            outliers(x, mod)
        pe = tuple(t.to(self.device) for t in sampling.rope_of(side, side, T5_TOKENS, spec))

        def run(dtype: torch.dtype, kernels: Kernels, backend: Backend, precision: Precision) -> Tensor:
            block = as_is(engine, dtype, backend, precision)

            def fresh(name: str, shape: tuple[int, ...], kind: torch.dtype) -> Tensor:
                return torch.empty(shape, dtype=kind, device=self.device)

            step = StepBuffers(spec, kernels, size, dtype, fresh, precision)
            step.place(pe)
            step.joint.x.copy_(x)
            shift, scale, gate = mod.to(dtype)
            kernels.modulate(step.joint.x, shift, scale, step.joint.normal)
            block(step, gate, Next(shift, scale, step.joint.normal))
            return step.joint.y.float()

        truth = run(torch.float32, reference, ReferenceBackend(), EXACT)
        backend = choose_backend(self.device)
        self.compare(what, truth, {p.name: run(self.dtype, self.kernels, backend, p) for p in self.precisions})

    def inputs(self, engine: Engine, side: int) -> tuple[Tensor, Tensor, Tensor]:
        """T5's and CLIP's embeddings, and noise."""
        draw = torch.Generator().manual_seed(side)
        spec = engine._spec
        txt = torch.randn(1, T5_TOKENS, spec.context, generator=draw)
        pooled = torch.randn(1, spec.vec, generator=draw)
        return txt, pooled, torch.randn(1, spec.latent_channels, side // 8, side // 8, generator=draw)

    # --- pictures -------------------------------------------------------------------------------------------------

    def latents(self) -> None:
        """Final latents of each mode from `exact`, over NF4's own distance to 16-bit weights."""
        found: dict[str, list[Tensor]] = {}
        ways = {"16 bits": ("exact", "none"), "exact": ("exact", "nf4"), "fp8": ("fp8", "nf4"), "int8": ("int8", "nf4")}
        for name, (mode, quantization) in ways.items():
            budget = {"vram_budget": 40.0 if quantization == "none" and self.device.type == "cuda" else DEFAULT}
            with self.engine(mode, quantization=quantization, **budget) as engine:
                found[name] = [self._final(engine, side) for side in self.sides]
        for i, side in enumerate(self.sides):
            plain, exact = found["16 bits"][i], found["exact"][i]
            own = float((exact - plain).norm())
            for name, bound in (("fp8", None), ("int8", 0.15)):
                moved = float((found[name][i] - exact).norm())
                self.check(f"{name} {side}: latents from exact's, over NF4's own distance", moved / own, bound)

    def _final(self, engine: Engine, side: int) -> Tensor:
        txt, pooled, _ = self.inputs(engine, side)
        kept: list[Tensor] = []
        engine.generate(
            engine.condition(txt, pooled), seed=1, height=side, width=side,
            on_step=lambda i, n, clean: kept.append(clean.float().cpu()) if i == n else None,
        )  # fmt: skip
        return kept[0]

    def speed(self) -> None:
        """Pictures of each mode in turns, in one process."""
        engines = {mode: self.engine(mode) for mode in ("exact", "fast", "int8")}
        for side in self.sides:
            times = self.in_turns(engines, side)
            for mode, engine in engines.items():
                self.check(f"{mode} {side} ({engine.precision}): a picture, ms", 1e3 * times[mode], None)
            self.check(f"int8 over exact, {side}", times["int8"] / times["exact"], GOALS["int8 over exact"].get(side))
        for mode, engine in engines.items():
            self.within(mode, engine)
            engine.unload()

    def budget(self) -> None:
        """Copies of blocks in 8 bits: the same pictures, bit for bit, in less time."""
        for mode in ("fast", "int8"):
            engines = {str(size): self.engine(mode, vram_budget=size) for size in (DEFAULT, LARGE)}
            packed, copied = engines.values()
            for side in self.sides:
                times = self.in_turns(engines, side)
                goal = GOALS["copies"].get(side) if mode == "fast" else None
                self.check(f"{mode} {side}: {LARGE} GB over {DEFAULT}", times[str(LARGE)] / times[str(DEFAULT)], goal)
                same = all(torch.equal(draw(packed, side, seed), draw(copied, side, seed)) for seed in range(3))
                self.check(f"{mode} {side}: copies draw the same bits", float(same), 1.0, least=True)
                saved = 4e3 * (copied.plan.saved - packed.plan.saved) / 4e12
                print(f"       {len(copied.plan.copies)} copies; planned to save {saved:.1f} ms a picture at 4 TB/s")
            if self.device.type == "cuda":
                self.check(f"{mode}: copies at {DEFAULT} GB", float(len(packed.plan.copies)), 0.0)
            self.within(f"{mode}, {LARGE} GB", copied)
            for engine in engines.values():
                engine.unload()

    def in_turns(self, engines: dict[str, Engine], side: int) -> dict[str, float]:
        """Median seconds of a picture of each engine, which draw one after the other."""
        times: dict[str, list[float]] = {name: [] for name in engines}
        for i in range(-3, self.samples):
            for name, engine in engines.items():
                with Stopwatch(self.device) as watch:
                    draw(engine, side, 1)
                if i >= 0:
                    times[name].append(watch.seconds)
        return {name: statistics.median(each) for name, each in times.items()}

    def within(self, name: str, engine: Engine) -> None:
        """Peak, plan and budget of one engine, with whatever other engines hold subtracted."""
        if self.device.type != "cuda":
            return
        self.check(f"{name}: planned peak over budget", engine.plan.peak / (engine.budget or 1), 1.0)
        engine.offload()
        gc.collect()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        draw(engine, self.sides[-1], 1)
        taken = torch.cuda.max_memory_reserved(self.device) - before
        self.check(f"{name}: reserved at the peak over the plan", taken / engine.plan.peak, 1.0)


def draw(engine: Engine, side: int, seed: int) -> Tensor:
    return engine.generate("a red circle", seed=seed, height=side, width=side)


def channels(x: Tensor, mod: Tensor) -> None:
    """Make 0.5 % of the channels 10 to 100 times as large, after adaLN."""
    chosen = torch.rand(mod.shape[1], device=x.device) < 0.005
    times = 10 + 90 * torch.rand(mod.shape[1], device=x.device)
    mod[1] = torch.where(chosen, times * (1 + mod[1]) - 1, mod[1])


def spikes(x: Tensor, mod: Tensor) -> None:
    """Make 0.1 % of the values 50 times as large."""
    x.mul_(torch.where(torch.rand_like(x) < 0.001, 50.0, 1.0))


def as_is(engine: Engine, dtype: torch.dtype, backend: Backend, precision: Precision) -> SingleBlock:
    """The engine's first single block in another type, backend and precision."""
    like = engine._model.transformer.single_blocks[0]
    with torch.device("meta"):
        block = SingleBlock(engine._spec)
    for path, part in list(like.named_modules()):
        if is_quantized(part, path):
            bias = None if part.bias is None else part.bias.to(dtype)
            linear = NF4Linear(nf4.NF4Weight(part.packed, part.absmax), bias, backend)
            linear.use(precision)
            block.set_submodule(path, linear)
    for path, parameter in like.norm.named_parameters():
        owner, _, name = path.rpartition(".")
        value = torch.nn.Parameter(parameter.to(dtype), requires_grad=False)
        setattr(block.norm.get_submodule(owner), name, value)
    return block


def parts(contract: Contract, names: list[str]) -> Iterator[Callable[[], None]]:
    known = {work.__name__: work for work in (contract.rounding, contract.latents, contract.speed, contract.budget)}
    return (known[name] for name in names or known)


def main() -> None:
    """Parse arguments and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "model", help="a diffusers folder of FLUX.1-schnell; random: its sizes, in no file; tiny: the bundled miniature"
    )
    parser.add_argument("--only", action="append", default=[], choices=("rounding", "latents", "speed", "budget"))
    parser.add_argument("--device")
    parser.add_argument("--size", type=int, action="append", help="sides (default 512 and 1024)")
    parser.add_argument("--samples", type=int, default=15, help="pictures of each engine and size")
    parser.add_argument("--allocator", choices=ALLOCATORS, help="torch's allocator (default: the one it has)")
    parser.add_argument("--json", type=Path, help="write the rows there")
    arguments = parser.parse_args()
    ensure_allocator(arguments.allocator, [sys.executable, *sys.argv])
    contract = Contract(arguments)
    print(machine(contract.device), flush=True)
    for work in parts(contract, arguments.only):
        contract.part(work)
    broken = [row["promise"] for row in contract.rows if not row["holds"]]
    figures = {"machine": machine(contract.device).as_dict(), "rows": contract.rows, "broken": broken}
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(figures, indent=1))
    print(json.dumps({"promises": len(contract.rows), "broken": broken}))
    sys.exit(bool(broken))


if __name__ == "__main__":
    main()
