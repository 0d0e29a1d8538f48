"""Checks that ComfyUI can take Vortex's VRAM back, on a GPU, with a ComfyUI tree's own model management.

    python tools/comfyui/comfyui_memory.py ~/comfy/ComfyUI                                    # the bundled miniature
    python tools/comfyui/comfyui_memory.py ~/comfy/ComfyUI /dev/shm/random-schnell --size 512 --json figures.json

Three times in one process: draw, let the host take the memory back (another model needs it, "Unload models", an OOM as
its executor handles it), and draw again. Torch's allocated bytes and the bytes of captured steps must fall by what was
reported to the host (within 1 %: the allocator rounds each tensor up to 512 bytes). The loader must not run, and the
picture must be the same bit for bit.

This is done once for each setup of the host, in a process of its own: with torch's own allocator, with cudaMallocAsync
(the host's default), and with dynamic VRAM if the tree has it and comfy-aimdo is installed. What an allocator does not
support is listed and is no failure. Prints each action, and ends with one JSON line.

Each setup loads the model, which takes 10 to 30 s from a filled cache. So fill it first (any load with the same
`--cache` does), or make `--seconds` long enough for quantizing. Other programs may use the GPU meanwhile.
"""

from __future__ import annotations

import argparse
import faulthandler
import importlib.util
import json
import logging
import os
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))
PROMPT = "a red circle on a white background"
RESULT = "RESULT "  # before the line that a setup's process ends with
NATIVE, ASYNC, DYNAMIC = "native", "cudaMallocAsync", "cudaMallocAsync and dynamic VRAM"
MB = 1 << 20
STARTED = time.monotonic()


def main() -> None:
    """Parse arguments, and run each setup in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tree", type=Path, help="a ComfyUI tree")
    parser.add_argument("model", type=Path, nargs="?", help="a model folder or file (default: the miniature)")
    parser.add_argument("--size", type=int, default=128, help="pixels a side (default 128)")
    parser.add_argument("--cache", type=Path, help="where quantized weights are kept (default: beside the model)")
    parser.add_argument("--seconds", type=float, default=100, help="at most, for one setup (default 100)")
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--setup", choices=(NATIVE, ASYNC, DYNAMIC), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.setup:
        sys.argv = [sys.argv[0]]  # the host parses it, too
        print(RESULT + json.dumps(run(arguments)), flush=True)
        return
    figures: dict[str, Any] = {"tree": version(arguments.tree), "model": str(arguments.model or "tiny-schnell")}
    for setup in setups(arguments.tree):
        print(f"\n== ComfyUI {figures['tree']}, {setup}", flush=True)
        figures[setup] = apart(setup, arguments.seconds)
        if arguments.json:
            arguments.json.write_text(json.dumps(figures, indent=1))
    print(json.dumps(figures))
    if not all(found.get("passed") for found in figures.values() if isinstance(found, dict)):
        raise SystemExit(1)


def version(tree: Path) -> str:
    """The tree's version."""
    return (tree / "comfyui_version.py").read_text().partition('__version__ = "')[2].partition('"')[0]


def setups(tree: Path) -> list[str]:
    """The setups in which a host of this tree can run here."""
    import torch

    if not torch.cuda.is_available():
        return [NATIVE]
    dynamic = (tree / "comfy" / "memory_management.py").exists() and importlib.util.find_spec("comfy_aimdo")
    return [NATIVE, ASYNC, *([DYNAMIC] if dynamic else [])]


def apart(setup: str, seconds: float) -> dict[str, Any]:
    """The findings of one setup's process, or its error if it crashed or hung."""
    environment = {name: value for name, value in os.environ.items() if not name.endswith("ALLOC_CONF")}
    if setup != NATIVE:
        environment["PYTORCH_CUDA_ALLOC_CONF"] = "backend:cudaMallocAsync"  # as the host's cuda_malloc.py does
    command = [sys.executable, __file__, *sys.argv[1:], "--setup", setup]
    started = time.monotonic()
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as process:
        timer = threading.Timer(seconds, process.kill)
        timer.start()
        found = None
        for line in process.stdout or ():
            if line.startswith(RESULT):
                found = json.loads(line.removeprefix(RESULT))
            else:
                print(line, end="", flush=True)
        timer.cancel()
    taken = round(time.monotonic() - started, 1)
    return {**(found or {"error": f"no result after {taken} s, exit {process.wait()}"}), "seconds": taken}


# ---------------------------------------------------------------- in the process of a setup


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Start as the host starts, then check evictions and the allocator."""
    faulthandler.dump_traceback_later(0.9 * arguments.seconds, file=sys.stdout)  # where it hangs, before it is killed
    sys.path.insert(0, str(arguments.tree.resolve()))
    say("importing torch")
    if arguments.setup == DYNAMIC:
        import comfy_aimdo.control

        comfy_aimdo.control.init()  # before torch, as the host's main does

    import torch
    from workflow_format import load_pack

    cuda = torch.cuda.is_available()
    sys.argv += [] if cuda else ["--cpu"]
    say(f"importing the host and the pack, torch {torch.__version__}")
    import comfy.cli_args
    import comfy.options

    comfy.options.enable_args_parsing()
    comfy.cli_args.args.cpu = not cuda
    if arguments.setup == DYNAMIC:
        switch_on_dynamic()
    load_pack()
    logging.basicConfig(format="  %(message)s")
    for name in ("vortex_pack", "vortex_core"):
        logging.getLogger(name).setLevel(logging.INFO)
    figures: dict[str, Any] = {"torch": torch.__version__}
    if cuda:
        figures |= {"gpu": torch.cuda.get_device_name(), "allocator": torch.cuda.get_allocator_backend()}
    try:
        figures |= evictions(arguments.model, arguments.size, arguments.cache)
    except Exception:  # the other part still counts
        figures |= {"passed": False, "error": traceback.format_exc()}
        print(figures["error"], flush=True)
    if cuda:
        say("asking what the allocator supports")
        figures["unsupported"] = unsupported(torch.device("cuda", torch.cuda.current_device()))
        print("not supported by this allocator:", json.dumps(figures["unsupported"]), flush=True)
    return figures


def say(what: str) -> None:
    """Print what comes next, with the seconds since the start."""
    print(f"  {time.monotonic() - STARTED:5.1f} s  {what}", flush=True)


def switch_on_dynamic() -> None:
    """Do what the host's main does if it supports dynamic VRAM."""
    import comfy.memory_management
    import comfy.model_management
    import comfy.model_patcher
    import comfy_aimdo.control

    if not comfy_aimdo.control.init_device(comfy.model_management.get_torch_device().index):
        raise SystemExit("comfy-aimdo does not work here, so the host would not use dynamic VRAM either.")
    comfy.model_patcher.CoreModelPatcher = comfy.model_patcher.ModelPatcherDynamic
    comfy.memory_management.aimdo_enabled = True


def counters(device: Any) -> dict[str, int]:
    """Bytes that torch has on a device, and bytes that are free there."""
    import torch

    if device.type != "cuda":
        return {"allocated": 0, "reserved": 0, "free": 0}
    torch.cuda.synchronize()
    return {
        "allocated": torch.cuda.memory_allocated(device),
        "reserved": torch.cuda.memory_reserved(device),
        "free": torch.cuda.mem_get_info(device)[0],
    }


def progress() -> Callable[..., None]:
    """Print the host's progress every 3 seconds."""
    told = 0.0

    def report(done: int, total: int, *unused: Any, **ignored: Any) -> None:
        nonlocal told
        if time.monotonic() > told + 3:
            told = time.monotonic()
            say(f"{done}/{total}")

    return report


def evictions(model: Path | None, size: int, cache: Path | None) -> dict[str, Any]:
    """Draw, evict, draw again, for each way in which the host takes memory back."""
    import comfy.model_management as management
    import comfy.utils
    import torch
    from vortex_pack.nodes import engines, files, host, types
    from vortex_pack.nodes.sampler import SchnellSampler
    from vortex_pack.vortex_core.checkpoint.bundle import TINY

    path = model or TINY
    if model is not None:
        kept = cache or model.parent / "vortex-cache"
        host.cache_folder = lambda: kept
    handle = types.Model(path.name, str(path), files.fingerprint(path), 6.5, "exact")
    device = management.get_torch_device()

    def draw() -> torch.Tensor:
        with torch.inference_mode():
            return SchnellSampler().sample(handle, PROMPT, size, size, 1, 7, 4)[0]

    comfy.utils.set_progress_bar_global_hook(progress())
    before, started = counters(device), time.monotonic()
    say(f"loading {path}" + ("" if model is None else f", quantized weights in {kept}") + ", and drawing")
    first = draw()
    result: dict[str, Any] = {"device": str(device), "load_seconds": round(time.monotonic() - started, 1)}
    result["loaded"] = {name: value - before[name] for name, value in counters(device).items()}
    print("loaded", json.dumps(result), flush=True)
    engine = engines.acquire(handle)
    patcher = engines._loaded[handle.key].patcher
    loads: list[object] = []
    engines._load, load = loads.append, engines._load
    ways: dict[str, Callable[[], object]] = {
        "another model's demand": lambda: demand(management, device, patcher.loaded_size()),
        "unload_all_models": management.unload_all_models,
        "out of memory": lambda: out_of_memory(management, device),
    }
    for name, evict in ways.items():
        say(f"{name}, and drawing again")
        reported, held, graphs = patcher.loaded_size(), counters(device), engine.ledger.graphs
        listed = any(loaded.model is patcher for loaded in management.current_loaded_models)
        evict()
        gone = counters(device)
        away = not engine.resident or device.type != "cuda"
        again = draw()
        result[name] = case = {
            "reported": reported, "freed": held["allocated"] - gone["allocated"], "graphs": graphs,
            "reserved_freed": held["reserved"] - gone["reserved"], "driver_free": gone["free"] - held["free"],
            "listed": listed, "away": away, "same_picture": bool(torch.equal(first, again)),
            "back": counters(device)["allocated"] - held["allocated"], "loads": len(loads),
        }  # fmt: skip
        case["passed"] = bool(
            listed and away and case["same_picture"] and not loads and case["back"] == 0
            and abs(case["freed"] + graphs - reported) <= reported // 100
        )  # fmt: skip
        print(name, json.dumps(case), flush=True)
    engines._load = load
    result["passed"] = all(result[name]["passed"] for name in ways)
    return result


def demand(management: Any, device: Any, held: int) -> None:
    """Load a native model that needs all free memory and half of Vortex's `held` bytes."""
    import torch
    from comfy.model_patcher import ModelPatcher

    # its weights are small; the working memory that it asks for counts
    other = ModelPatcher(torch.nn.PReLU(), device, torch.device("cpu"))
    # by so much that it still is where another program frees memory in between
    needed = management.get_free_memory(device) + held // 2 if device.type == "cuda" else 0
    management.load_models_gpu([other], memory_required=needed)
    management.current_loaded_models[:] = [m for m in management.current_loaded_models if m.model is not other]


def out_of_memory(management: Any, device: Any) -> None:
    """Do what the host's executor does when a node runs out of memory: unload every model."""
    import torch

    try:
        if device.type == "cuda":
            torch.empty(1 << 46, dtype=torch.uint8, device=device)
        raise torch.OutOfMemoryError("as on a GPU")
    except management.OOM_EXCEPTION:
        management.unload_all_models()


class Probes:
    """Checks of an allocator, by name. Each raises if the allocator fails it."""

    def __init__(self, device: Any) -> None:
        self.device = device

    def block(self, megabytes: int) -> Any:
        import torch

        return torch.empty(megabytes * MB, dtype=torch.uint8, device=self.device)

    def peaks(self) -> None:
        import torch

        torch.cuda.reset_peak_memory_stats(self.device)
        self.block(64)
        if (
            torch.cuda.max_memory_reserved(self.device) < 64 * MB
            or torch.cuda.max_memory_allocated(self.device) < 64 * MB
        ):
            raise RuntimeError("a peak of 64 MB was not seen")

    def fraction(self) -> None:
        import torch

        total = torch.cuda.get_device_properties(self.device).total_memory
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(
            (torch.cuda.memory_reserved(self.device) + 256 * MB) / total, self.device
        )
        try:
            self.block(1024)
        except torch.OutOfMemoryError:
            return
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, self.device)
        raise RuntimeError("1024 MB were allocated under a limit of 256")

    def giving_back(self) -> None:
        import torch
        from vortex_pack.vortex_core.device.vram import process_memory

        torch.cuda.empty_cache()
        before = process_memory(self.device)
        self.block(1024)
        torch.cuda.empty_cache()
        after = process_memory(self.device)
        if before is None or after is None:
            raise RuntimeError("NVML does not tell what the process has")
        if after - before > 64 * MB:
            raise RuntimeError("empty_cache left the driver short")

    def snapshot(self) -> None:
        import torch

        torch.cuda.memory_snapshot()

    def history(self) -> None:
        import torch

        torch.cuda.memory._record_memory_history()
        torch.cuda.memory._record_memory_history(enabled=None)

    def graphs(self) -> None:
        import torch

        source = torch.ones(1024, device=self.device)
        graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            source * 2 + 1  # warm-up
        torch.cuda.current_stream(self.device).wait_stream(stream)
        with torch.cuda.graph(graph):
            result = source * 2 + 1
        source.fill_(3)
        graph.replay()
        torch.cuda.synchronize(self.device)
        if result.ne(7).any():
            raise RuntimeError("a replayed graph gave other numbers")


def unsupported(device: Any) -> dict[str, str]:
    """The checks that this allocator fails, by name, with the reason."""
    probes = Probes(device)
    found = {}
    for name, probe in {
        "peak counters": probes.peaks, "memory fraction": probes.fraction, "giving back": probes.giving_back,
        "memory_snapshot": probes.snapshot, "memory history": probes.history, "CUDA graphs": probes.graphs,
    }.items():  # fmt: skip
        try:
            probe()
        except Exception as error:
            found[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return found


if __name__ == "__main__":
    main()
