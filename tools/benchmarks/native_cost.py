"""Times what attaches to Vortex: KSampler over its MODEL beside the Schnell Sampler, CFG, NAG, pictures to begin from.

    python tools/benchmarks/native_cost.py --comfyui TREE --model FOLDER           # full size, on a GPU
    python tools/benchmarks/native_cost.py --comfyui TREE --tiny                   # rehearsal: miniature, on the CPU
    PYTORCH_CUDA_ALLOC_CONF=backend:cudaMallocAsync python tools/benchmarks/native_cost.py ...  # the other allocator

One process with the nodes of a real ComfyUI tree; ways are timed in turns, medians are compared. Prints a row for each
promise and one JSON line; exits with 1 if a promise is broken.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PACK = "vortex_pack"
KSAMPLER = {512: 1.10, 1024: 1.05}  # over the Schnell Sampler
CFG, NAG, IMAGE = 2.1, 1.6, 0.6  # over a plain picture; the last without the time of the encoder
GB = 1e9


def host(tree: Path, cpu: bool) -> None:
    """Have the host's modules and this pack imported."""
    sys.argv = ["x", *(["--cpu"] if cpu else [])]  # so that the host reads no options of ours
    sys.path.insert(0, str(tree))
    import comfy.options

    comfy.options.enable_args_parsing()
    import nodes  # noqa: F401

    spec = importlib.util.spec_from_file_location(PACK, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    assert spec is not None
    assert spec.loader is not None
    sys.modules[PACK] = pack = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pack)


def part(name: str) -> Any:
    """A module of the pack."""
    return importlib.import_module(f"{PACK}.{name}")


class Costs:
    """One mode: its model, and the promises about it."""

    def __init__(self, arguments: argparse.Namespace, mode: str) -> None:
        import torch

        import nodes

        self.torch, self.arguments, self.mode = torch, arguments, mode
        self.rows: list[dict[str, Any]] = []
        kinds = part("nodes").NODE_CLASS_MAPPINGS
        if arguments.tiny:
            self.handle = part("nodes.models").find("tiny-schnell", 6.5, mode)
        else:
            spec = part("vortex_core.checkpoint.bundle").open_bundle(arguments.model).spec
            self.handle = part("nodes.types").Model(
                "random", arguments.model, "random", arguments.vram, mode, spec=spec
            )
        self.model = part("nodes.engines").native(self.handle)
        self.engine = self.model.model.vortex.engine
        self.vae = part("nodes.vae").Decoder(self.handle)
        self.sampler, self.ksampler = kinds["VortexSchnellSampler"](), nodes.KSampler()
        flux = self.engine.spec.flux
        dice = torch.Generator().manual_seed(0)

        def text() -> Any:
            txt, pooled = torch.randn(1, 256, flux.context, generator=dice), torch.randn(1, flux.vec, generator=dice)
            return [[txt / 4, {"pooled_output": pooled}]]

        self.positive, self.negative = text(), text()
        self.wanted, self.avoided = (
            self.engine.condition(pair[0][0], pair[0][1]["pooled_output"]) for pair in (self.positive, self.negative)
        )

    def by_ksampler(self, side: int, cfg: float = 1.0) -> Any:
        empty = {"samples": self.torch.zeros(1, 16, side // 8, side // 8)}
        given = (4, cfg, "euler", "simple", self.positive, self.negative, empty)
        (latent,) = self.ksampler.sample(self.model, 7, *given)
        return self.vae.decode(latent["samples"])

    def by_sampler(self, side: int) -> Any:
        return self.sampler.sample(self.handle, "", side, side, 1, 7, 4, conditioning=self.positive)[0]

    def by_engine(self, side: int, **options: Any) -> Any:
        away = self.avoided if options.get("nag") or options.get("guidance") else None
        size = {} if "image" in options else {"height": side, "width": side}
        return self.engine.generate(self.wanted, away, seed=7, **size, **options).cpu()

    def in_turns(self, ways: dict[str, Callable[[], Any]]) -> dict[str, float]:
        """Seconds, medians: each way warmed up twice, then all in turns."""
        times: dict[str, list[float]] = {name: [] for name in ways}
        for way in ways.values():
            way()
            way()
        for _ in range(self.arguments.samples):
            for name, way in ways.items():
                begun = time.perf_counter()
                way()
                times[name].append(time.perf_counter() - begun)
        return {name: statistics.median(found) for name, found in times.items()}

    def check(self, promise: str, value: float, bound: float | None = None) -> None:
        """Compare a figure with its bound, None for one that is only told; print and keep the row."""
        holds = bound is None or value <= bound
        word = "told  " if bound is None else "holds " if holds else "BROKEN"
        print(f"{word} {self.mode} {promise}: {value:.4f}" + ("" if bound is None else f" <= {bound:g}"), flush=True)
        self.rows.append({"mode": self.mode, "promise": promise, "value": value, "bound": bound, "holds": holds})

    def side(self, side: int) -> None:
        """All promises at one size."""
        torch, engine = self.torch, self.engine
        same = (self.by_ksampler(side) - self.by_sampler(side)).abs().mean().item()
        self.check(f"{side}: KSampler's picture is off the Schnell Sampler's by, of 1", same)
        nodes = {"sampler": lambda: self.by_sampler(side), "ksampler": lambda: self.by_ksampler(side)}
        times = self.in_turns(nodes | {"cfg": lambda: self.by_ksampler(side, 2.0)})
        for name, seconds in times.items():
            self.check(f"{side}: {name}, ms", 1e3 * seconds)
        self.check(f"{side}: KSampler over Schnell Sampler", times["ksampler"] / times["sampler"], KSAMPLER.get(side))
        self.check(f"{side}: KSampler with CFG 2 over without", times["cfg"] / times["ksampler"], CFG)
        ways = {"plain": {}, "nag": {"nag": 5.0}, "guidance": {"guidance": 2.0}}
        drawn = {name: (lambda more=more: self.by_engine(side, **more)) for name, more in ways.items()}
        encodes = engine._model.no_encoder is None
        if encodes:
            picture = engine.generate(self.wanted, seed=1, height=side, width=side)
            drawn["image"] = lambda: self.by_engine(side, image=picture, strength=0.5)
            drawn["encode"] = lambda: engine.encode_image(picture).cpu()
        times = self.in_turns(drawn)
        for name, seconds in times.items():
            self.check(f"{side}: {name}, ms", 1e3 * seconds)
        self.check(f"{side}: NAG over none", times["nag"] / times["plain"], NAG)
        self.check(f"{side}: guidance over none", times["guidance"] / times["plain"], CFG)
        if encodes:
            begun = (times["image"] - times["encode"]) / times["plain"]
            self.check(f"{side}: from a picture at 0.5, without its encode, over none", begun, IMAGE)
        asked = self.model.model.memory_required([1, 16, side // 8, side // 8])
        planned = engine.peak_bytes(side, side)
        self.check(f"{side}: asked of the host beyond the plan, GB", (asked + engine.device_bytes - planned) / GB, 0.1)
        if engine.device.type == "cuda":
            self.check(f"{side}: reserved at the peak, GB", torch.cuda.max_memory_reserved() / GB, self.arguments.vram)


def main() -> int:
    """Measure and tell; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfyui", type=Path, required=True, metavar="TREE")
    parser.add_argument("--model", metavar="FOLDER", help="FLUX.1-schnell, or a random model of its size")
    parser.add_argument("--tiny", action="store_true", help="rehearse with the miniature on the CPU")
    parser.add_argument("--mode", action="append", help="default: fast and exact")
    parser.add_argument("--size", action="append", type=int, help="default: 512 and 1024")
    parser.add_argument("--samples", type=int, default=9)
    parser.add_argument("--vram", type=float, default=6.5)
    arguments = parser.parse_args()
    if not (arguments.tiny or arguments.model):
        parser.error("name a --model, or rehearse with --tiny")
    host(arguments.comfyui, arguments.tiny)
    import torch

    rows: list[dict[str, Any]] = []
    with torch.inference_mode():  # as the host runs its nodes
        for mode in arguments.mode or ["fast", "exact"]:
            costs = Costs(arguments, mode)
            for side in arguments.size or [512, 1024]:
                costs.side(side)
            rows += costs.rows
            costs.engine.unload()
            part("nodes.engines")._loaded.clear()
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    print(json.dumps({"device": where, "torch": torch.__version__, "rows": rows}))
    return int(not all(row["holds"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
