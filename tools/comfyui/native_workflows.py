"""Workflows that begin from pictures, and those of ComfyUI's own nodes over Vortex's MODEL, CLIP and VAE."""

from __future__ import annotations

from typing import Any

from workflow_format import Node, Workflow

SIDE = 128  # pixels; what the miniature was trained at
Y = 80  # below a group's title
RESULT = (440, 580)
CIRCLE, BLUE = "a large red circle on a white background", "a large blue circle on a white background"
PAIR, OTHER = "a red circle left of a blue square", "a red circle left of a green star"
PLAIN, GRAY = "a circle on a white background", "a gray circle on a white background"
RING = "a green ring in the center of a yellow background"
CONTROL_NET = "https://huggingface.co/Shakker-Labs/FLUX.1-dev-ControlNet-Union-Pro-2.0"


def _sampler(x: int, prompt: str, seed: int, **inputs: Any) -> Node:
    given = {"model": (1, "model"), "prompt": prompt, "width": SIDE, "height": SIDE, "seed": seed, **inputs}
    return Node("VortexSchnellSampler", (x, Y), (400, 700), given)


def _loader(**inputs: Any) -> Node:
    return Node("VortexFluxLoader", (0, Y), (340, 230), inputs)


def _save(x: int, name: str, source: tuple[int, str]) -> Node:
    return Node("SaveImage", (x, Y), RESULT, {"images": source, "filename_prefix": f"vortex/{name}"})


def _columns(*titles: tuple[str, int, int]) -> tuple[tuple[str, int, int, int, int], ...]:
    """Groups by title, x and width."""
    return tuple((title, x - 20, 0, width + 40, 820) for title, x, width in titles)


def _ksampler(x: int, positive: tuple[int, str], negative: tuple[int, str], **inputs: Any) -> Node:
    given = {"model": (1, "native_model"), "seed": 7, "steps": 4, "cfg": 1.0, "latent_image": (6, "LATENT"), **inputs}
    return Node("KSampler", (x, Y), (320, 480), given | {"positive": positive, "negative": negative})


def _texts(positive: str, negative: str, x: int = 400, clip: tuple[int, str] = (1, "clip")) -> dict[int, Node]:
    """The two prompts, 4 and 5, and an empty latent, 6."""
    texts = {4: ("Prompt", positive, Y), 5: ("Negative prompt", negative, Y + 260)}
    found = {
        number: Node("CLIPTextEncode", (x, y), (360, 200), {"text": text, "clip": clip}, title)
        for number, (title, text, y) in texts.items()
    }
    return found | {6: Node("EmptySD3LatentImage", (x, Y + 520), (360, 130), {"width": SIDE, "height": SIDE})}


def _decode(x: int) -> Node:
    return Node("VAEDecode", (x, Y + 540), (320, 60), {"samples": (2, "LATENT"), "vae": (1, "vae")})


NATIVE: dict[str, Workflow] = {
    "img2img": Workflow(
        {
            1: _loader(),
            2: _sampler(400, CIRCLE, 7),
            3: _save(1280, "img2img", (4, "image")),
            4: _sampler(840, BLUE, 8, image=(2, "image"), strength=0.6),
        },
        _columns(
            ("1. The model", 0, 340),
            ("2. A picture", 400, 400),
            ("3. Drawn anew", 840, 400),
            ("4. The result", 1280, 440),
        ),
        "## From a picture\n\nPress **Run**. The second sampler begins from the picture of the first: the circle stays "
        "in its place, and takes another colour.\n\n**strength** says how much is drawn anew: more of it follows the "
        "prompt, less of it the picture.\n\nFor a picture of yours, connect **Load Image** to *image*.",
    ),
    "inpainting": Workflow(
        {
            1: _loader(),
            2: _sampler(400, PAIR, 3),
            3: _save(1660, "inpainting", (4, "image")),
            4: _sampler(1220, OTHER, 5, image=(2, "image"), mask=(7, "MASK"), strength=1.0),
            5: Node("SolidMask", (840, Y), (340, 130), {"value": 0.0, "width": SIDE, "height": SIDE}, "Keep all"),
            6: Node("SolidMask", (840, 270), (340, 130), {"width": SIDE // 2, "height": SIDE}, "Draw anew"),
            7: Node(
                "MaskComposite",
                (840, 460),
                (340, 170),
                {"destination": (5, "MASK"), "source": (6, "MASK"), "x": SIDE // 2, "operation": "add"},
            ),
        },
        _columns(
            ("1. The model", 0, 340),
            ("2. A picture", 400, 400),
            ("3. A mask: the right half", 840, 340),
            ("4. Drawn anew", 1220, 400),
            ("5. The result", 1660, 440),
        ),
        "## Inside a mask\n\nPress **Run**. The right half of the first picture is drawn anew. The left half stays as "
        "it is, to the bit.\n\nFor a picture of yours, connect **Load Image** to *image* and *mask*, and paint it "
        "in ComfyUI's mask editor.",
    ),
    "ksampler": Workflow(
        {
            1: _loader(),
            2: _ksampler(800, (4, "CONDITIONING"), (5, "CONDITIONING")),
            3: _save(1160, "ksampler", (7, "IMAGE")),
            **_texts(RING, ""),
            7: _decode(800),
        },
        _columns(
            ("1. The model", 0, 340),
            ("2. The prompts", 400, 360),
            ("3. ComfyUI's sampler", 800, 320),
            ("4. The result", 1160, 440),
        ),
        "## With ComfyUI's KSampler\n\nPress **Run**. The loader's *native_model*, *clip* and *vae* are ComfyUI's own "
        "kinds: what fits Load Checkpoint fits here.\n\nTake **4** steps, **cfg 1**, *euler* and *simple*. With cfg "
        "above 1 the negative prompt counts, and a step takes twice as long; Vortex NAG is faster.",
    ),
    "nag": Workflow(
        {
            1: _loader(),
            2: _ksampler(1160, (4, "CONDITIONING"), (5, "CONDITIONING"), model=(8, "model")),
            3: _save(1520, "nag", (7, "IMAGE")),
            **_texts(PLAIN, GRAY),
            7: _decode(1160),
            8: Node("VortexNAG", (800, Y), (320, 150), {"model": (1, "native_model"), "negative": (5, "CONDITIONING")}),
        },
        _columns(
            ("1. The model", 0, 340),
            ("2. The prompts", 400, 360),
            ("3. Keep away", 800, 320),
            ("4. ComfyUI's sampler", 1160, 320),
            ("5. The result", 1520, 440),
        ),
        "## A negative prompt in 4 steps\n\nPress **Run**. Without a colour in the prompt, the miniature draws gray "
        "circles. Vortex NAG keeps away from them.\n\nBypass Vortex NAG to see the picture without it.",
    ),
    "lora-by-comfyui": Workflow(
        {
            1: _loader(),
            2: _ksampler(1160, (4, "CONDITIONING"), (5, "CONDITIONING"), model=(8, "MODEL")),
            3: _save(1520, "lora-by-comfyui", (7, "IMAGE")),
            **_texts("a large blue square on a white background", "", 800, (8, "CLIP")),
            7: _decode(1160),
            8: Node("LoraLoader", (400, Y), (340, 150), {"model": (1, "native_model"), "clip": (1, "clip")}),
        },
        _columns(
            ("1. The model", 0, 340),
            ("2. A LoRA", 400, 340),
            ("3. The prompts", 800, 360),
            ("4. ComfyUI's sampler", 1160, 320),
            ("5. The result", 1520, 440),
        ),
        "## A LoRA by ComfyUI's loader\n\nCopy **tiny-outlines-lora.safetensors** from this pack's folder "
        "*vortex_core/assets* to **models/loras**, and press **R**. Or choose a LoRA for FLUX.1 and a real "
        "checkpoint.\n\nPress **Run**. ComfyUI's loaders work on *native_model* and *clip*. Nothing is loaded again.",
    ),
    "controlnet": Workflow(
        {
            1: _loader(),
            2: _ksampler(1560, (9, "positive"), (9, "negative")),
            3: _save(1920, "controlnet", (7, "IMAGE")),
            **_texts("a bottle on a wooden table, morning light, oil painting", ""),
            7: _decode(1560),
            8: Node("ControlNetLoader", (800, Y), (340, 60)),
            9: Node(
                "ControlNetApplyAdvanced",
                (1180, Y),
                (340, 190),
                {
                    "positive": (4, "CONDITIONING"),
                    "negative": (5, "CONDITIONING"),
                    "image": (11, "IMAGE"),
                    "control_net": (8, "CONTROL_NET"),
                    "vae": (1, "vae"),
                    "strength": 0.7,
                    "end_percent": 0.8,
                },
            ),
            10: Node("LoadImage", (800, Y + 120), (340, 330)),
            11: Node("Canny", (800, Y + 520), (340, 110), {"image": (10, "IMAGE")}),
        },
        _columns(
            ("1. The model", 0, 340),
            ("2. The prompts", 400, 360),
            ("3. A picture's edges", 800, 340),
            ("4. ControlNet", 1180, 340),
            ("5. ComfyUI's sampler", 1560, 320),
            ("6. The result", 1920, 440),
        ),
        f"## ControlNet\n\nChoose a real checkpoint in the loader, and 1024 x 1024. Put a ControlNet for FLUX.1 into "
        f"**models/controlnet**, such as [this one]({CONTROL_NET}), and press **R**. Most are made for FLUX.1-dev, and "
        "work with schnell at a lower strength.\n\nA ControlNet needs ComfyUI's own code for each step, over Vortex's "
        "weights: it is slower than Vortex's steps, and the log says so.",
    ),
}
NEED_FILES = ("lora-by-comfyui", "controlnet")  # that are not bundled
