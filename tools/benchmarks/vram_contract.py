"""Measures every promise of the VRAM budget at full size, on a GPU, each section in a process of its own.

    python tools/benchmarks/full_size.py build /dev/shm/random-schnell
    python tools/benchmarks/vram_contract.py /dev/shm/random-schnell                 # everything, about 6 minutes
    python tools/benchmarks/vram_contract.py /dev/shm/random-schnell --only default,tight --json figures.json
    python tools/benchmarks/vram_contract.py /dev/shm/random-schnell --allocator cudaMallocAsync --only default,same
    python tools/benchmarks/vram_contract.py tiny --device cpu                       # a rehearsal: logic, no figures

Sections: `default` (6.5 GB: 512 to 1024, batch 4, host memory, the ledger), `card8` (an 8 GB card), `card12` (12 GB,
everything resident), `tight` (4.5 GB, blocks streamed), `grid` (predicted against measured peaks), `soak` (200
pictures), `same` (equal bits under every placement; strips against whole), `threads` (16 that draw), `reload` (20
times), `backends` (without Triton), `errors` (refusals, running out of memory), `speed` (what streaming costs, against
the plan). All sections but `speed` may share the GPU with other programs.

Prints a row for each promise as it is checked, and writes it to `--json`. Ends with one JSON line; exits with 1 if a
promise is broken. A section that fails or takes longer than `--seconds` is a broken promise; the others still run.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vram_promises import SECTIONS
from vram_section import MARK, Section

from vortex_core.bench.allocator import ALLOCATORS, environment
from vortex_core.bench.machine import machine


def run(name: str, arguments: argparse.Namespace, cache: str) -> Iterator[dict[str, Any]]:
    """Run a section in a process of its own, and yield its rows as they come."""
    command = [sys.executable, __file__, arguments.model, "--section", name, "--cache", cache]
    command += ["--device", arguments.device, "--seconds", str(arguments.seconds)]
    search = os.pathsep.join(filter(None, (str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH"))))
    surroundings = environment(arguments.allocator) | {"PYTHONPATH": search, "PYTHONWARNINGS": "default"}
    print(f"== {name}", flush=True)
    started = time.perf_counter()
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=surroundings
    ) as process:
        watch = threading.Timer(arguments.seconds, process.kill)
        watch.start()
        for line in process.stdout or ():
            if line.startswith(MARK):
                row = {"section": name, **json.loads(line.removeprefix(MARK))}
                shown = {True: "holds ", False: "BROKEN", None: "-     "}[row["holds"]]
                print(f"{shown} {row['promise']}: {row['found']}", flush=True)
                yield row
            else:
                print(line, end="", flush=True)
        code = process.wait()
        watch.cancel()
    taken = time.perf_counter() - started
    if code:
        yield {
            "section": name,
            "promise": f"section {name}",
            "found": f"exit {code} after {taken:.0f} s",
            "holds": False,
        }
    print(f"== {name}: exit {code} after {taken:.0f} s", flush=True)


def main() -> None:
    """Parse arguments and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a full-size model (tools/benchmarks/full_size.py build), or tiny")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, with commas")
    parser.add_argument("--cache", help="where quantized weights are kept (default: beside the model)")
    parser.add_argument("--seconds", type=float, default=150, help="at most, for one section (default 150)")
    parser.add_argument("--allocator", choices=ALLOCATORS, help="torch's, of every section (default: as it is)")
    parser.add_argument("--json", type=Path, help="write all rows here")
    parser.add_argument("--section", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.section:
        # shows where it is when the time is nearly up
        faulthandler.dump_traceback_later(0.9 * arguments.seconds, file=sys.stdout)
        section = Section(arguments.model, arguments.device, arguments.cache)
        here = machine(section.device)
        what = f"{here.device}, driver {here.driver}, torch {here.torch}, allocator {here.allocator}"
        section.row("measured on", what, None)
        SECTIONS[arguments.section](section)
        return
    names = arguments.only.split(",")
    if unknown := set(names) - set(SECTIONS):
        parser.error(f"there is no section {', '.join(sorted(unknown))}; choose from {', '.join(SECTIONS)}")
    cache = arguments.cache
    if cache is None:
        cache = tempfile.mkdtemp() if arguments.model == "tiny" else str(Path(arguments.model).with_suffix(".cache"))
    rows: list[dict[str, Any]] = []
    for name in names:
        for row in run(name, arguments, cache):
            rows.append(row)
            if arguments.json:
                arguments.json.write_text(json.dumps(rows, indent=1))
    broken = [row for row in rows if row["holds"] is False]
    print(f"{sum(row['holds'] is True for row in rows)} hold, {len(broken)} broken, of {len(rows)}")
    print(json.dumps({"rows": rows}))
    if broken:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
