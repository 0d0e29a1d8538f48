"""Checks that requirements.txt installs beside a ComfyUI's packages without changing one. Needs a package index.

    python tools/comfyui/host_requirements.py ~/comfy/ComfyUI/requirements.txt --until 2025-10-15
    python tools/comfyui/host_requirements.py ~/comfy/ComfyUI/requirements.txt                      # as installed today

It installs, in a temporary environment, what the host lists as of that day, and then this pack's requirements as
ComfyUI-Manager does. `pip check` must be clean, and every package of the host must keep its version. Today's CPU build
of torch stands in for the host's. Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
TORCH = ("torch==2.13.0", "torchvision==0.28.0", "torchaudio==2.11.0")
OTHER_SOURCES = ("PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS")  # they do not say when a file was uploaded


def main() -> None:
    """Parse arguments, install, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("requirements", type=Path, help="the host's requirements.txt")
    parser.add_argument("--until", metavar="DAY", help="its packages as they were on that day (YYYY-MM-DD)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = check(Path(folder), arguments.requirements, arguments.until)
    print(json.dumps({"host": str(arguments.requirements), "until": arguments.until, **figures}))
    if figures["changed"] or figures["complaints"]:
        raise SystemExit(1)


def check(folder: Path, requirements: Path, until: str | None) -> dict[str, Any]:
    """Install the host's packages, then the pack's, into `folder`. Returns the changes, and what `pip check` finds."""
    venv.create(folder, with_pip=True)
    pip(folder, "install", "--quiet", "--upgrade", "pip>=26")
    pip(folder, "install", "--quiet", "--no-deps", *TORCH)
    pip(folder, "install", "--quiet", TORCH[0])  # and what it needs
    constraints = folder / "torch.txt"
    constraints.write_text("\n".join(TORCH))
    dated = ("--prefer-binary", "--uploaded-prior-to", until) if until else ()
    pip(folder, "install", "--quiet", "--constraint", constraints, *dated, "--requirement", requirements)
    before, faults = packages(folder), complaints(folder)
    pip(folder, "install", "--quiet", "--requirement", ROOT / "requirements.txt")
    after = packages(folder)
    return {
        "packages": len(before),
        "changed": {name: [version, after.get(name)] for name, version in before.items() if after.get(name) != version},
        "added": {name: version for name, version in after.items() if name not in before},
        "complaints": [line for line in complaints(folder) if line not in faults],
        "complaints_of_the_host": faults,
    }


def pip(folder: Path, *arguments: str | Path, fails: bool = False) -> str:
    """Run the environment's pip. Returns what it printed."""
    environment = dict(os.environ)
    if "--uploaded-prior-to" in arguments:
        environment = {name: value for name, value in environment.items() if name not in OTHER_SOURCES}
        environment["PIP_CONFIG_FILE"] = os.devnull
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    done = subprocess.run([python, "-m", "pip", *arguments], env=environment, capture_output=True, text=True)
    if done.returncode and not fails:
        sys.exit(f"pip {' '.join(map(str, arguments))} failed:\n{done.stderr[-4000:]}")
    return done.stdout


def packages(folder: Path) -> dict[str, str]:
    """Versions by name."""
    return {item["name"]: item["version"] for item in json.loads(pip(folder, "list", "--format", "json"))}


def complaints(folder: Path) -> list[str]:
    """What `pip check` finds broken."""
    return [line for line in pip(folder, "check", fails=True).splitlines() if line != "No broken requirements found."]


if __name__ == "__main__":
    main()
