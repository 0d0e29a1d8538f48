"""Writes the example reports in docs/reports: latency and the VRAM profile at some sizes, and the leak check.

    python tools/benchmarks/example_reports.py tiny docs/reports/tiny-cpu --device cpu --size 128
    python tools/benchmarks/example_reports.py /dev/shm/random-schnell docs/reports/full-size --mode exact --mode fast
                                                                                # 3 minutes; a quiet GPU

`vortex bench latency -o` and `vortex bench vram -o` write the same folders, one at a time.
"""

from __future__ import annotations

import argparse
import json
import time
import traceback
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from vortex_core import load_flux_schnell
from vortex_core.bench import exports, latency_report, leak, plots, vram_report
from vortex_core.bench.workload import Workload
from vortex_core.cli.bench_output import write_folder
from vortex_core.device.select import resolve_device

console = Console()


def measure(model: str, folder: Path, sizes: list[int], iterations: int, cold: int, options: dict[str, Any]) -> None:
    """Write two folders a size, and `leak`. A part that fails says so, and the others go on."""
    load = partial(load_flux_schnell, model, **options)
    started = time.perf_counter()
    with load() as engine:
        print(json.dumps({"part": "load", "seconds": round(time.perf_counter() - started, 1)}), flush=True)
        for size in sizes:
            attempt(partial(latency, engine, Workload(size, size, iterations=iterations, cold=cold), folder))
        attempt(partial(leaks, engine, sizes[0], iterations, folder))
    for size in sizes:
        attempt(partial(vram, load, resolve_device(options.get("device")), size, folder))


def latency(engine: Any, workload: Workload, folder: Path) -> dict[str, Any]:
    report = latency_report.run(engine, workload)
    figures = report.figures()
    target = folder / f"latency-{workload.width}"
    samples = [asdict(sample) for sample in report.samples]
    write_folder(target, figures | {"samples": samples}, lambda: plots.latency_plots(report))
    exports.write_csv(report.samples, target / "samples.csv")
    whole = report.series["cached"].whole
    return {"size": workload.width, "overhead": report.overhead_share} | {
        f"P{q:g}": whole.percentile(q).seconds for q in (50, 90)
    }


def leaks(engine: Any, size: int, iterations: int, folder: Path) -> dict[str, Any]:
    report = leak.run(engine, leak.mixed(size), iterations)
    write_folder(folder / "leak", report.figures(), lambda: {"leak": plots.leak_plot(report)})
    return {verdict.what: verdict.detail for verdict in report.verdicts}


def vram(load: Any, device: Any, size: int, folder: Path) -> dict[str, Any]:
    report = vram_report.run(load, device, size=(size, size))
    write_folder(folder / f"vram-{size}", report.figures(), lambda: {"vram": plots.vram_plot(report)})
    return {verdict.what: f"{verdict.state}, {verdict.detail}" for verdict in report.verdicts}


def attempt(part: partial[dict[str, Any]]) -> None:
    started = time.perf_counter()
    try:
        figures = part()
    except Exception:
        console.print(f"[red]{part.func.__name__} failed[/]\n{traceback.format_exc()}", markup=True)
        return
    taken = round(time.perf_counter() - started, 1)
    print(json.dumps({"part": part.func.__name__, "seconds": taken, **figures}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", type=int, action="append", help="side in pixels (default 512 and 1024)")
    parser.add_argument("--device")
    parser.add_argument(
        "--mode", action="append", help="exact or fast: a folder each (default: one, the engine's own choice)"
    )
    parser.add_argument("--iterations", type=int, default=50)
    parser.add_argument("--cold", type=int, default=5)
    arguments = parser.parse_args()
    options = {} if arguments.device is None else {"device": arguments.device}
    sizes = arguments.size or [512, 1024]
    for mode in arguments.mode or [None]:
        chosen, folder = (
            (options, arguments.folder) if mode is None else (options | {"mode": mode}, arguments.folder / mode)
        )
        measure(arguments.model, folder, sizes, arguments.iterations, arguments.cold, chosen)


if __name__ == "__main__":
    main()
