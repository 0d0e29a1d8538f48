"""Times a step of Vortex and of ComfyUI's own 8-bit formats with rotation: same process, card and weights.

    python tools/benchmarks/comfyui_int8.py --comfyui TREE                           # all modes and formats, full size
    python tools/benchmarks/comfyui_int8.py --comfyui TREE --mode int8 --modulation  # the peers' modulation in 8 bits
    python tools/benchmarks/comfyui_int8.py --comfyui TREE --tiny                    # rehearsal: miniature, on the CPU

A peer is ComfyUI's Flux forward over its quantized linears, which multiply with comfy-kitchen's kernels: the weights of
its blocks are made and declared as in a checkpoint of that format, and loaded by ComfyUI. Its step is replayed as a
CUDA graph, which spares it what launching costs its users. Needs a tree of 0.33 or later, comfy-kitchen and diffusers.
Prints a table, the promises that hold or not, and one JSON line; exits with 1 if a promise is broken.
"""

from __future__ import annotations

import argparse
import json
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vortex_core import Engine
from vortex_core.bench.contest import Contest, Result, Row
from vortex_core.bench.peers import Looped, Velocity, Vortex, comfy_flux, comfy_module, flux_tensor, flux_velocity
from vortex_core.checkpoint.bundle import TINY
from vortex_core.device.select import resolve_device

# Each format as a checkpoint declares it for a linear, in its tensor `comfy_quant`; None: 16 bits.
FORMATS: dict[str, dict[str, Any] | None] = {
    "bf16": None,
    "int8": {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 256},
    "w4a8": {"format": "asym_w4a8_int8", "group_size": 16, "convrot_groupsize": 256},
    "w4a8-64": {"format": "convrot_w4a4", "linear_dtype": "int8", "convrot_groupsize": 256},  # a scale for 64 weights
}
BLOCKS = ("double_blocks.", "single_blocks.")
GOALS = {512: 1.6, 1024: 1.5}  # how many times faster a step of int8 is than that of the fastest 8-bit peer
GB = 1e9


def quantized_velocity(
    tree: Path, config: dict[str, Any], state: dict[str, Tensor], device: torch.device, name: str, modulation: bool
) -> Velocity:
    """The velocity of ComfyUI's Flux with the linears of its blocks in the format `name`, over diffusers' `state`.

    `modulation`: those that make scales and shifts of a block too. They have one row, so only their bytes count.
    """
    quant, declared = comfy_module(tree, "comfy.quant_ops"), FORMATS[name]
    algorithm = quant.QUANT_ALGOS[declared["format"]] if declared else {}
    operations = comfy_module(tree, "comfy.ops").mixed_precision_ops({}, torch.bfloat16)
    model = comfy_flux(tree, config, operations, device)
    loaded = {
        name: flux_tensor(state, name).to(device, torch.bfloat16).view(parameter.shape)
        for name, parameter in model.named_parameters()
    }
    for path, part in model.named_modules():
        if not isinstance(part, operations.Linear):
            continue
        weight = flux_tensor(state, f"{path}.weight").to(device, torch.bfloat16)
        if declared and path.startswith(BLOCKS) and (modulation or not path.endswith(".lin")):
            options = {key: value for key, value in declared.items() if key != "format"} | {"per_channel": True}
            made = quant.QuantizedTensor.from_float(weight, algorithm["comfy_tensor_layout"], **options)
            loaded |= made.state_dict(f"{path}.weight")
            loaded[f"{path}.comfy_quant"] = torch.tensor(list(json.dumps(declared).encode()), dtype=torch.uint8)
        else:
            loaded[f"{path}.weight"] = weight
    model.load_state_dict(loaded)
    return flux_velocity(model.requires_grad_(False))


def peer(name: str) -> str:
    """The name of a peer's row."""
    return f"ComfyUI {name}"


def measure_peers(contest: Contest, tree: Path, names: list[str], modulation: bool) -> None:
    """Time ComfyUI in each format. The first is what `off` of the others counts from."""
    state, graphed = contest.pipe.transformer.state_dict(), contest.device.type == "cuda"
    for name in names:

        def make(name: str = name) -> Looped:
            velocity = quantized_velocity(tree, contest.config, state, contest.device, name, modulation)
            return Looped(velocity, contest.pipe.vae, graphed=graphed)

        contest.measure(peer(name), make)


def measure_vortex(contest: Contest, mode: str) -> None:
    """Time Vortex in a mode. Where the mode does not run here, `declined` says so."""
    engines: list[Engine] = []

    def make() -> Vortex:
        engines.append(contest.engine(mode))
        if engines[0].mode != mode:
            raise RuntimeError("not on this device")
        return Vortex(engines[0])

    contest.measure(f"Vortex {mode}", make)
    for engine in engines:
        engine.unload()


def step(row: Row) -> float:
    """Milliseconds of a step, the median."""
    return 1e3 * row.step.percentile(50).seconds


def ratios(result: Result) -> list[dict[str, Any]]:
    """For each row of Vortex and each peer of that size: how many times as long the peer's step takes."""
    return [
        {"mode": ours.contender, "peer": row.contender, "side": ours.height, "ratio": step(row) / step(ours)}
        for ours in result.rows
        if ours.contender.startswith("Vortex")
        for row in result.rows
        if row.contender.startswith("ComfyUI") and row.height == ours.height
    ]


def promises(found: list[dict[str, Any]], sides: list[int]) -> list[dict[str, Any]]:
    """int8 over the fastest 8-bit peer at the sides that have a goal. What was not measured does not hold."""
    rows = []
    for side in (side for side in sides if side in GOALS):
        of = {r["peer"]: r["ratio"] for r in found if (r["mode"], r["side"]) == ("Vortex int8", side)}
        peers = {name: ratio for name, ratio in of.items() if name != peer("bf16")}
        least = min(peers.values(), default=0.0)
        holds = least >= GOALS[side]
        rows.append({"side": side, "peers": sorted(peers), "ratio": least, "wanted": GOALS[side], "holds": holds})
    return rows


def tell(row: Row) -> None:
    """Print a row as it comes."""
    print(
        f"{row.contender:16s} {row.height:5d}  a step {step(row):8.2f} ms ({1e3 * row.step.minimum:.2f} to "
        f"{1e3 * row.step.maximum:.2f}, {row.step.count})  peak {row.peak / GB:6.2f} GB  off {row.off:.4f}",
        flush=True,
    )


def report(result: Result, found: list[dict[str, Any]], kept: list[dict[str, Any]]) -> None:
    """Print what did not run, the ratios as a table, and the promises."""
    for name, reason in result.declined.items():
        print(f"{name} did not run: {reason}")
    names = list(dict.fromkeys(r["peer"] for r in found))
    print(f"\n{'times faster than':24s}" + "".join(f"{name:>18s}" for name in names))
    for mode, side in dict.fromkeys((r["mode"], r["side"]) for r in found):
        of = {r["peer"]: r["ratio"] for r in found if (r["mode"], r["side"]) == (mode, side)}
        print(f"{mode + f' {side}':24s}" + "".join(f"{of[name]:18.2f}" if name in of else " " * 18 for name in names))
    for row in kept:
        said = "holds " if row["holds"] else "BROKEN"
        peers = ", ".join(row["peers"]) or "a peer that ran"
        print(f"{said} int8 {row['side']}: times faster than {peers}: {row['ratio']:.2f} >= {row['wanted']:.2f}")


def host(tree: Path) -> dict[str, Any]:
    """Which ComfyUI and comfy-kitchen this is, and which of its backends compute."""
    kitchen = comfy_module(tree, "comfy.quant_ops").ck.list_backends()
    used = sorted(name for name, state in kitchen.items() if state["available"] and not state["disabled"])
    version = comfy_module(tree, "comfyui_version").__version__
    return {"comfyui": version, "comfy-kitchen": metadata.version("comfy-kitchen"), "backends": used}


def main() -> None:
    """Parse arguments and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfyui", type=Path, required=True, help="a ComfyUI tree, 0.33 or later")
    parser.add_argument("--model", type=Path, help="a diffusers folder (default: random weights of the real size)")
    parser.add_argument("--tiny", action="store_true", help="the miniature on the CPU, 64 x 64: a rehearsal")
    parser.add_argument("--mode", action="append", help="of Vortex (default int8, fast and exact)")
    parser.add_argument("--format", action="append", choices=FORMATS, help="of ComfyUI (default all)")
    parser.add_argument("--modulation", action="store_true", help="the peers' modulation in 8 bits too")
    parser.add_argument("--size", type=int, action="append", help="sides (default 512 and 1024)")
    parser.add_argument("--samples", type=int, default=16, help="steps to time, in fours (default 16)")
    parser.add_argument("--json", type=Path, help="write all figures here")
    arguments = parser.parse_args()
    if not (arguments.comfyui / "comfy" / "quant_ops.py").exists():
        parser.error(f"{arguments.comfyui} is no ComfyUI of 0.33 or later")
    device = resolve_device("cpu" if arguments.tiny else None)
    model = arguments.model or (TINY if arguments.tiny else None)
    sides = arguments.size or ([64] if arguments.tiny else [512, 1024])
    about = host(arguments.comfyui)
    print(", ".join(f"{name} {value}" for name, value in about.items()), flush=True)
    contest = Contest(model, device, [(side, side) for side in sides], -(-arguments.samples // 4))
    contest.on_row = tell
    measure_peers(contest, arguments.comfyui, arguments.format or list(FORMATS), arguments.modulation)
    for mode in arguments.mode or ["int8", "fast", "exact"]:
        measure_vortex(contest, mode)
    found = ratios(contest.result)
    kept = promises(found, sides)
    report(contest.result, found, kept)
    figures = contest.result.figures() | {"host": about, "ratios": found, "promises": kept}
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1))
    steps = [(row.contender, row.height, step(row), row.peak, row.off) for row in contest.result.rows]
    print(json.dumps({"host": about, "steps": steps, "ratios": found, "promises": kept}))
    raise SystemExit(0 if all(row["holds"] for row in kept) else 1)


if __name__ == "__main__":
    main()
