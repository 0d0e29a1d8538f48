"""Whether ComfyUI can really take Vortex's VRAM back: run on a GPU, with a ComfyUI tree's own model management.

    python tools/comfyui_memory.py ~/comfy/ComfyUI                     # the bundled miniature
    python tools/comfyui_memory.py ~/comfy/ComfyUI /dev/shm/random-schnell

In one process, three times: draw, let the host take the memory (another model's demand, "Unload models", an OOM as
its executor handles it), and draw again. Torch's allocated bytes must fall by what was reported to the host (within
1 %: the allocator rounds each tensor up to 512 bytes), the loader must not run, and the picture must be the same bit
for bit. Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tools"))
PROMPT = "a red circle on a white background"


def main() -> None:
    """Parse arguments and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tree", type=Path, help="a ComfyUI tree")
    parser.add_argument("model", type=Path, nargs="?", help="a model folder (default: the miniature)")
    parser.add_argument("--size", type=int, default=128, help="pixels a side (default 128)")
    parser.add_argument("--dynamic", action="store_true", help="with the host's dynamic VRAM switched on (2026 trees)")
    arguments = parser.parse_args()
    sys.path.insert(0, str(arguments.tree.resolve()))
    sys.argv = [sys.argv[0]]  # the host parses it, too
    if arguments.dynamic:
        import comfy_aimdo.control

        comfy_aimdo.control.init()  # before torch, as the host's main does

    import torch

    from workflows import load_pack

    sys.argv += [] if torch.cuda.is_available() else ["--cpu"]
    import comfy.cli_args
    import comfy.options

    comfy.options.enable_args_parsing()
    comfy.cli_args.args.cpu = not torch.cuda.is_available()
    if arguments.dynamic:
        switch_on_dynamic()
    load_pack()
    figures = {
        "tree": version(arguments.tree),
        "dynamic": arguments.dynamic,
        "torch": torch.__version__,
        **check(arguments.model, arguments.size),
    }
    if torch.cuda.is_available():
        figures["gpu"] = torch.cuda.get_device_name()
        figures["allocator"] = torch.cuda.get_allocator_backend()
    print(json.dumps(figures))
    if not figures["passed"]:
        raise SystemExit(1)


def switch_on_dynamic() -> None:
    """What the host's main does where it supports dynamic VRAM."""
    import comfy.memory_management
    import comfy.model_management
    import comfy.model_patcher
    import comfy_aimdo.control

    if not comfy_aimdo.control.init_device(comfy.model_management.get_torch_device().index):
        raise SystemExit("comfy-aimdo does not work here, so the host would not use dynamic VRAM either.")
    comfy.model_patcher.CoreModelPatcher = comfy.model_patcher.ModelPatcherDynamic
    comfy.memory_management.aimdo_enabled = True


def version(tree: Path) -> str:
    """The tree's version."""
    return (tree / "comfyui_version.py").read_text().partition('__version__ = "')[2].partition('"')[0]


def check(folder: Path | None, size: int) -> dict[str, Any]:
    """Draw, evict, draw again, for each way in which the host takes memory back."""
    import comfy.model_management as management
    import torch
    from vortex_pack.nodes import engines, types
    from vortex_pack.nodes.sampler import SchnellSampler
    from vortex_pack.vortex_core.checkpoint.bundle import TINY

    path = folder or TINY
    model = types.Model(path.name, "tiny" if folder is None else str(path), engines.fingerprint(path), 6.5, "exact")
    device = management.get_torch_device()
    cuda = device.type == "cuda"

    def draw() -> torch.Tensor:
        with torch.inference_mode():
            return SchnellSampler().sample(model, PROMPT, size, size, 1, 7, 4)[0]

    def allocated() -> int:
        return torch.cuda.memory_allocated(device) if cuda else 0

    before = allocated()
    first = draw()
    engine = engines.acquire(model)
    patcher = engines._loaded[model.key].patcher
    loads = 0

    def count(*unused: Any) -> None:
        nonlocal loads
        loads += 1

    engines._load, load = count, engines._load
    evictions: dict[str, Callable[[], object]] = {
        "another model's demand": lambda: demand(management, device),
        "unload_all_models": management.unload_all_models,
        "out of memory": lambda: out_of_memory(management, device),
    }
    result: dict[str, Any] = {"model": model.name, "device": str(device), "loaded_bytes": allocated() - before}
    for name, evict in evictions.items():
        reported, held = patcher.loaded_size(), allocated()
        listed = any(loaded.model is patcher for loaded in management.current_loaded_models)
        evict()
        freed = held - allocated()
        away = not engine.resident or not cuda
        again = draw()
        result[name] = {
            "reported": reported, "freed": freed, "listed": listed, "away": away,
            "same_picture": bool(torch.equal(first, again)), "back": allocated() - held, "loads": loads,
        }  # fmt: skip
    engines._load = load
    result["passed"] = all(
        case["listed"] and case["away"] and case["same_picture"] and not case["loads"]
        and abs(case["freed"] - case["reported"]) <= case["reported"] // 100 and case["back"] == 0
        for case in (result[name] for name in evictions)
    )  # fmt: skip
    return result


def demand(management: Any, device: Any) -> None:
    """A native model that needs all that is free and some of what Vortex holds."""
    import comfy.model_patcher
    import torch

    free = management.get_free_memory(device)
    if device.type != "cuda":
        management.load_models_gpu(
            [comfy.model_patcher.ModelPatcher(torch.nn.Linear(8, 8), device, torch.device("cpu"))]
        )
        return
    # its weights are small; what it says it needs to work in is what counts
    other = comfy.model_patcher.ModelPatcher(torch.nn.Linear(8, 8), device, torch.device("cpu"))
    management.load_models_gpu([other], memory_required=free + 1_000_000)
    management.current_loaded_models[:] = [m for m in management.current_loaded_models if m.model is not other]


def out_of_memory(management: Any, device: Any) -> None:
    """What the host's executor does when a node runs out of memory: it unloads every model."""
    import torch

    try:
        if device.type == "cuda":
            torch.empty(1 << 46, dtype=torch.uint8, device=device)
        raise torch.OutOfMemoryError("as on a GPU")
    except management.OOM_EXCEPTION:
        management.unload_all_models()


if __name__ == "__main__":
    main()
