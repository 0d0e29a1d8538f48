"""The VRAM budget at full size, on a GPU: every promise measured, each budget in a process of its own that is capped.

    python tools/full_size.py build /dev/shm/random-schnell
    python tools/vram_contract.py /dev/shm/random-schnell                 # everything, about 4 minutes
    python tools/vram_contract.py /dev/shm/random-schnell --only default,tight --json figures.json
    python tools/vram_contract.py tiny --device cpu                       # a rehearsal: logic, no figures

Sections: `default` (6.5 GB: 512 to 1024, batch 4, host memory, the ledger), `card8` (an 8 GB card), `card12` (12 GB,
everything resident), `tight` (4.5 GB, blocks streamed), `grid` (predicted against measured peaks), `soak` (200
pictures), `same` (bit for bit under every placement; strips against whole), `errors` (refusals, running out of
memory). Prints a row for each promise as it is checked, a table, and one JSON line; exits with 1 where one is broken.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from vram_promises import SECTIONS
from vram_section import MARK, Section

LONGEST = 150  # seconds a section may take


def run(name: str, arguments: argparse.Namespace, cache: str) -> list[dict[str, Any]]:
    """A section in a process of its own; its rows."""
    command = [
        sys.executable,
        __file__,
        arguments.model,
        "--device",
        arguments.device,
        "--section",
        name,
        "--cache",
        cache,
    ]
    search = os.pathsep.join(filter(None, (str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"PYTHONPATH": search, "PYTHONWARNINGS": "default"}
    rows: list[dict[str, Any]] = []
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    watch = threading.Timer(LONGEST, process.kill)
    watch.start()
    for line in process.stdout:
        if line.startswith(MARK):
            rows.append({"section": name, **json.loads(line.removeprefix(MARK))})
            shown = {True: "holds ", False: "BROKEN", None: "-     "}[rows[-1]["holds"]]
            print(f"{shown} {rows[-1]['promise']}: {rows[-1]['found']}", flush=True)
        else:
            print(line, end="", flush=True)
    if process.wait():
        found = f"exit {process.returncode} after {time.perf_counter() - started:.0f} s"
        rows.append({"section": name, "promise": f"section {name}", "found": found, "holds": False})
    watch.cancel()
    print(f"== {name}: {time.perf_counter() - started:.0f} s", flush=True)
    return rows


def main() -> None:
    """Parse arguments and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a full-size model (tools/full_size.py build), or tiny")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, with commas")
    parser.add_argument("--cache", help="where quantized weights are kept (default: beside the model)")
    parser.add_argument("--json", type=Path, help="write all rows here")
    parser.add_argument("--section", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.section:
        SECTIONS[arguments.section](Section(arguments.model, arguments.device, arguments.cache))
        return
    cache = arguments.cache
    if cache is None:
        cache = tempfile.mkdtemp() if arguments.model == "tiny" else str(Path(arguments.model).with_suffix(".cache"))
    rows: list[dict[str, Any]] = []
    for name in arguments.only.split(","):
        rows += run(name, arguments, cache)
        if arguments.json:
            arguments.json.write_text(json.dumps(rows, indent=1))
    broken = [row for row in rows if row["holds"] is False]
    print(f"{sum(row['holds'] is True for row in rows)} hold, {len(broken)} broken, of {len(rows)}")
    print(json.dumps({"rows": rows}))
    if broken:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
