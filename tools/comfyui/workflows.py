"""The pack's workflows, each defined once: writes them as templates for ComfyUI's browser and as files for its API.

python tools/comfyui/workflows.py write     # after a change here, or of a node's inputs
python tools/comfyui/workflows.py check     # what the tests run
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from native_workflows import NATIVE
from workflow_format import ROOT, Node, Schemas, Workflow, api, ui

FOLDER = ROOT / "workflows"
TINY_SIDE = 128  # pixels; what the miniature was trained at
CHECKPOINT = "flux1-schnell-fp8.safetensors"  # transformer, encoders and VAE in one file of 17 GB
DOWNLOAD = {
    "name": CHECKPOINT,
    "url": f"https://huggingface.co/Comfy-Org/flux1-schnell/resolve/main/{CHECKPOINT}?download=true",
    "directory": "checkpoints",
}
# ---------------------------------------------------------------- the workflows

Y = 80  # below a group's title
MODEL_AT, PICTURE_AT, RESULT_AT = (0, Y), (400, Y), (880, Y)
MODEL_SIZE, PICTURE_SIZE, RESULT_SIZE = (340, 230), (420, 700), (440, 580)
NOTES = (0, Y + 270, MODEL_SIZE[0])  # x, y and width: below the loader, down to the group's end


def loader(**inputs: Any) -> Node:
    """NF4 Flux Loader in the first column."""
    return Node("VortexFluxLoader", MODEL_AT, MODEL_SIZE, inputs)


def sampler(**inputs: Any) -> Node:
    """Schnell Sampler in the second column."""
    return Node("VortexSchnellSampler", PICTURE_AT, PICTURE_SIZE, {"model": (1, "model"), **inputs})


def save(name: str) -> Node:
    """Save Image in the third column."""
    return Node("SaveImage", RESULT_AT, RESULT_SIZE, {"images": (2, "image"), "filename_prefix": f"vortex/{name}"})


def columns(*titles: str, height: int = 820, last: int = 480) -> tuple[tuple[str, int, int, int, int], ...]:
    """Groups side by side, the last one `last` wide."""
    widths = [380, 460, last]
    return tuple(
        (title, x - 20, 0, width, height) for title, x, width in zip(titles, (0, 400, 880), widths, strict=True)
    )


def schnell(side: int, prompt: str, seed: int, seconds: str) -> Workflow:
    """A real checkpoint at one size."""
    name = f"schnell-{side}"
    return Workflow(
        {
            1: Node(
                "VortexFluxLoader", MODEL_AT, MODEL_SIZE, {"model": f"checkpoints/{CHECKPOINT}"}, models=(DOWNLOAD,)
            ),
            2: sampler(prompt=prompt, width=side, height=side, seed=seed),
            3: save(name),
        },
        columns("1. The model", "2. The picture", "3. The result"),
        f"## FLUX.1-schnell at {side} x {side}\n\n"
        f"Needs one file of 17 GB in **models/checkpoints**: [{CHECKPOINT}]({DOWNLOAD['url']}). Press **R** once it "
        f"is there. Any other FLUX.1-schnell does too: pick it in the loader.\n\n{seconds}\n\n"
        "Write what you want to see, and press **Run**. 4 steps are right; guidance is 0 by design, so a negative "
        "prompt has no effect.",
    )


WORKFLOWS: dict[str, Workflow] = {
    "first-picture": Workflow(
        {
            1: loader(),
            2: sampler(
                prompt="a green ring in the center of a yellow background", width=TINY_SIDE, height=TINY_SIDE, seed=7
            ),
            3: save("first-picture"),
        },
        columns("1. The model", "2. The picture", "3. The result"),
        "## Your first picture\n\nPress **Run**. Nothing is downloaded: tiny-schnell comes with Vortex. It is a "
        "trained miniature of FLUX.1-schnell that knows coloured shapes.\n\n"
        "Then try\n- *a blue star above a yellow ring*\n- *a large green heart on a black background*\n\n"
        "Keep it at 128 x 128, the size it was trained at.",
    ),
    "schnell-512": schnell(
        512,
        "a lighthouse on a cliff at dusk, warm light in its windows, long exposure of the sea",
        7,
        "The first time, it is quantized to NF4 and kept in models/vortex/cache.",
    ),
    "schnell-1024": schnell(
        1024,
        "a still life of pears and a blue glass bottle on a wooden table, morning light, oil painting",
        11,
        "1024 x 1024 is the size that FLUX draws best.",
    ),
    "lora": Workflow(
        {
            1: loader(),
            2: Node(
                "VortexSchnellSampler",
                (800, Y),
                PICTURE_SIZE,
                {
                    "model": (4, "model"),
                    "prompt": "a large blue square on a white background",
                    "width": TINY_SIDE,
                    "height": TINY_SIDE,
                    "seed": 7,
                },
            ),
            3: Node("SaveImage", (1280, Y), RESULT_SIZE, {"images": (2, "image"), "filename_prefix": "vortex/lora"}),
            4: Node("VortexLoRA", (400, Y), (340, 110), {"model": (1, "model"), "lora_name": "tiny-outlines"}),
        },
        (
            ("1. The model", -20, 0, 380, 820),
            ("2. A LoRA", 380, 0, 380, 820),
            ("3. The picture", 780, 0, 460, 820),
            ("4. The result", 1260, 0, 480, 820),
        ),
        "## With a LoRA\n\nPress **Run**. tiny-outlines comes with Vortex: a LoRA for tiny-schnell. The miniature then "
        "draws outlines. It half knows one more colour: try *a large lime circle on a black background*.\n\n"
        "Set **strength** to 0, and run again: that is the miniature without it. A LoRA or a strength that you change "
        "loads nothing again.\n\n"
        "With a real checkpoint: put LoRAs for FLUX.1 into **models/loras** and press **R**. Several Vortex LoRA nodes "
        "in a row add up.",
    ),
    "batch-vram-monitor": Workflow(
        {
            1: loader(),
            2: sampler(
                prompt="a green triangle on a white background", width=TINY_SIDE, height=TINY_SIDE, batch_size=4, seed=1
            ),
            3: Node(
                "VortexVRAMMonitor",
                (880, Y),
                (340, 170),
                {"value": (2, "image"), "soft_limit": 6.5, "hard_limit": 8.0},
            ),
            4: Node("SaveImage", (880, 310), (340, 350), {"images": (3, "value"), "filename_prefix": "vortex/batch"}),
            5: Node("PreviewAny", (1240, Y), (440, 200), {"source": (3, "report")}, "Report"),
            6: Node("PreviewImage", (1240, 340), (440, 320), {"images": (3, "timeline")}, "Timeline"),
        },
        columns("1. The model", "2. Four pictures", "3. What they took", last=840),
        "## A batch, and what it takes\n\nPress **Run**: four pictures, from seed to seed + 3.\n\n"
        "The VRAM Monitor passes them on and reports the peak of the whole run. Above the soft limit it warns, "
        "above the hard limit it stops the run. Without an NVIDIA GPU it says so.",
    ),
    "latency-probe": Workflow(
        {
            1: loader(),
            2: sampler(prompt="a blue square on a white background", width=TINY_SIDE, height=TINY_SIDE, seed=3),
            3: Node(
                "VortexLatencyProbe",
                (880, Y),
                (340, 330),
                {"model": (1, "model"), "width": TINY_SIDE, "height": TINY_SIDE, "runs": 10, "value": (2, "image")},
            ),
            4: Node("SaveImage", (880, 470), (340, 330), {"images": (3, "value"), "filename_prefix": "vortex/probe"}),
            5: Node("PreviewAny", (1240, Y), (440, 330), {"source": (3, "report")}, "Report"),
            6: Node("PreviewImage", (1240, 470), (440, 330), {"images": (3, "histogram")}, "Histogram"),
        },
        columns("1. The model", "2. A picture", "3. How long it takes", height=820, last=840),
        "## How long does a picture take?\n\nPress **Run**. The probe warms up, draws the same picture 10 times with "
        "the device synchronized, and reports percentiles.\n\nEach percentile says how many samples it rests on: "
        "for a P99 that means something, set **runs** to 500 or more.",
    ),
    "native-interop": Workflow(
        {
            1: loader(),
            2: sampler(prompt="a yellow star on a blue background", width=TINY_SIDE, height=TINY_SIDE, seed=5),
            3: Node("VAEDecode", (880, Y), (300, 60), {"samples": (2, "latent"), "vae": (1, "vae")}),
            4: Node(
                "ImageScaleBy",
                (880, 200),
                (300, 100),
                {"image": (3, "IMAGE"), "upscale_method": "lanczos", "scale_by": 2.0},
            ),
            5: Node("SaveImage", (1200, Y), RESULT_SIZE, {"images": (4, "IMAGE"), "filename_prefix": "vortex/interop"}),
        },
        columns("1. The model", "2. The latent", "3. ComfyUI's own nodes", last=800),
        "## With ComfyUI's own nodes\n\nPress **Run**. The latent has the scale of ComfyUI's own Flux latents, so its "
        "VAE Decode, upscalers and Save Latent work with it.\n\nThe decoder comes with the model; **Load VAE** with "
        "FLUX's ae.safetensors does as well for a real checkpoint.",
    ),
    **NATIVE,
}

# ---------------------------------------------------------------- writing


def files() -> dict[Path, str]:
    """Every file that this writes, with its text."""
    schemas = Schemas()
    found = {}
    for name, workflow in WORKFLOWS.items():
        for path, content in (
            (FOLDER / f"{name}.json", ui(schemas, workflow, NOTES)),
            (FOLDER / "api" / f"{name}.json", api(schemas, workflow)),
        ):
            found[path] = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    return found


def stale() -> list[str]:
    """Names of files that are missing or old, or that are not written here."""
    wanted = files()
    wrong = [path for path, text in wanted.items() if not path.is_file() or path.read_text() != text]
    extra = [path for path in FOLDER.rglob("*.json") if path not in wanted]
    return [str(path.relative_to(ROOT)) for path in (*wrong, *extra)]


def main() -> None:
    """Write the files, or say which are stale."""
    if sys.argv[1:] == ["write"]:
        for path, text in files().items():
            path.parent.mkdir(exist_ok=True, parents=True)
            path.write_text(text)
    elif sys.argv[1:] == ["check"]:
        if wrong := stale():
            raise SystemExit(f"Stale: {', '.join(wrong)}. Run: python tools/comfyui/workflows.py write")
    else:
        raise SystemExit(__doc__)


if __name__ == "__main__":
    main()
