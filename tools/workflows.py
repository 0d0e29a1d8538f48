"""The pack's workflows, said once: writes each as a template for ComfyUI's browser and as its API twin.

    python tools/workflows.py write     # after a change here, or of a node's inputs
    python tools/workflows.py check     # what the tests run

Inputs, their order and their defaults are read from the node classes, so a template cannot fall behind its nodes.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "workflows"
PACKAGE = "vortex_pack"
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN")
TINY_SIDE = 128  # pixels; what the miniature was trained at
CHECKPOINT = "flux1-schnell-fp8.safetensors"  # transformer, encoders and VAE in one file of 17 GB
DOWNLOAD = {
    "name": CHECKPOINT,
    "url": f"https://huggingface.co/Comfy-Org/flux1-schnell/resolve/main/{CHECKPOINT}?download=true",
    "directory": "checkpoints",
}
# The host's own nodes that the workflows use: inputs and outputs, as ComfyUI declares them.
CORE: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "SaveImage": ({"images": ("IMAGE",), "filename_prefix": ("STRING", {"default": "ComfyUI"})}, {}),
    "PreviewImage": ({"images": ("IMAGE",)}, {}),
    "PreviewAny": ({"source": ("*",)}, {}),
    "VAEDecode": ({"samples": ("LATENT",), "vae": ("VAE",)}, {"IMAGE": "IMAGE"}),
    "ImageScaleBy": (
        {
            "image": ("IMAGE",),
            "upscale_method": (["nearest-exact", "bilinear", "area", "bicubic", "lanczos"], {}),
            "scale_by": ("FLOAT", {"default": 1.0}),
        },
        {"IMAGE": "IMAGE"},
    ),
}


@dataclass(frozen=True, slots=True)
class Node:
    """One node: where it stands, and what differs from its defaults. A link is `(node id, output name)`."""

    type: str
    at: tuple[int, int]
    size: tuple[int, int]
    inputs: dict[str, Any] = field(default_factory=dict)
    title: str | None = None
    models: tuple[dict[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Workflow:
    """Nodes by id from 1, groups as `(title, x, y, width, height)`, and the note that says what to do."""

    nodes: dict[int, Node]
    groups: tuple[tuple[str, int, int, int, int], ...]
    note: str


def load_pack() -> ModuleType:
    """The pack as ComfyUI imports it: a package of any name, from its folder."""
    if PACKAGE not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            PACKAGE, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
        )
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[PACKAGE] = module
        spec.loader.exec_module(module)
    return sys.modules[PACKAGE]


# ---------------------------------------------------------------- the workflows

Y = 80  # below a group's title
MODEL_AT, PICTURE_AT, RESULT_AT = (0, Y), (400, Y), (880, Y)
MODEL_SIZE, PICTURE_SIZE, RESULT_SIZE = (340, 230), (420, 580), (440, 580)
NOTE_AT = (0, Y + 270)  # below the loader, down to the group's end
FILE_NOTE_HEIGHT = 100  # with its title


def loader(**inputs: Any) -> Node:
    """NF4 Flux Loader in the first column."""
    return Node("VortexFluxLoader", MODEL_AT, MODEL_SIZE, inputs)


def sampler(**inputs: Any) -> Node:
    """Schnell Sampler in the second column."""
    return Node("VortexSchnellSampler", PICTURE_AT, PICTURE_SIZE, {"model": (1, "model"), **inputs})


def save(name: str) -> Node:
    """Save Image in the third column."""
    return Node("SaveImage", RESULT_AT, RESULT_SIZE, {"images": (2, "image"), "filename_prefix": f"vortex/{name}"})


def columns(*titles: str, height: int = 680, last: int = 480) -> tuple[tuple[str, int, int, int, int], ...]:
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
}

# ---------------------------------------------------------------- writing


class Schemas:
    """Inputs and outputs of every node type, ours read from the classes."""

    def __init__(self) -> None:
        sys.modules.setdefault("folder_paths", no_folders())
        self.ours = load_pack().NODE_CLASS_MAPPINGS

    def inputs(self, kind: str) -> dict[str, Any]:
        if kind in CORE:
            return CORE[kind][0]
        types = self.ours[kind].INPUT_TYPES()
        return {**types["required"], **types.get("optional", {})}

    def required(self, kind: str) -> set[str]:
        return set(CORE[kind][0] if kind in CORE else self.ours[kind].INPUT_TYPES()["required"])

    def outputs(self, kind: str) -> dict[str, str]:
        if kind in CORE:
            return CORE[kind][1]
        node = self.ours[kind]
        return dict(zip(node.RETURN_NAMES, map(str, node.RETURN_TYPES), strict=True))


def no_folders() -> Any:
    """Enough of ComfyUI's `folder_paths` to ask a node for its inputs: no folder is registered."""
    return SimpleNamespace(
        models_dir="models", add_model_folder_path=lambda *folder: None, get_folder_paths=lambda kind: []
    )


def is_widget(spec: Any) -> bool:
    """Whether an input is set on the node rather than linked."""
    return isinstance(spec[0], list) or spec[0] in WIDGETS


def values(schemas: Schemas, node: Node) -> dict[str, Any]:
    """All inputs of a node by name, defaults filled in. Raises `ValueError` where node and class disagree."""
    specs = schemas.inputs(node.type)
    unknown = set(node.inputs) - set(specs)
    if unknown:
        raise ValueError(f"{node.type} has no input {', '.join(sorted(unknown))}")
    found = {}
    for name, spec in specs.items():
        options = spec[1] if len(spec) > 1 else {}
        if name in node.inputs:
            found[name] = node.inputs[name]
        elif is_widget(spec):
            found[name] = options.get("default", spec[0][0] if isinstance(spec[0], list) else None)
        elif name in schemas.required(node.type):
            raise ValueError(f"{node.type} lacks its input {name}")
    return found


def api(schemas: Schemas, workflow: Workflow) -> dict[str, Any]:
    """The format that `POST /prompt` takes."""
    prompt = {}
    for number, node in workflow.nodes.items():
        inputs = {
            name: [str(value[0]), list(schemas.outputs(workflow.nodes[value[0]].type)).index(value[1])]
            if isinstance(value, tuple)
            else value
            for name, value in values(schemas, node).items()
        }
        prompt[str(number)] = {
            "class_type": node.type, "inputs": inputs, "_meta": {"title": node.title or title(schemas, node.type)},
        }  # fmt: skip
    return prompt


def title(schemas: Schemas, kind: str) -> str:
    """What ComfyUI calls a node."""
    names = load_pack().NODE_DISPLAY_NAME_MAPPINGS
    own = {"SaveImage": "Save Image", "PreviewImage": "Preview Image", "PreviewAny": "Preview Any"}
    return names.get(kind) or own.get(kind) or {"VAEDecode": "VAE Decode", "ImageScaleBy": "Upscale Image By"}[kind]


def ui(schemas: Schemas, workflow: Workflow) -> dict[str, Any]:
    """The format that the template browser opens, version 0.4."""
    links: list[list[Any]] = []
    nodes = []
    for number, node in workflow.nodes.items():
        specs, given = schemas.inputs(node.type), values(schemas, node)
        inputs, widgets = [], []
        for name, spec in specs.items():
            if is_widget(spec):
                widgets.append(given[name])
                if len(spec) > 1 and spec[1].get("control_after_generate"):
                    widgets.append("randomize")
                continue
            link = None
            if name in given:
                source, output = given[name]
                outputs = schemas.outputs(workflow.nodes[source].type)
                kind = outputs[output] if str(spec[0]) == "*" else str(spec[0])
                link = len(links) + 1
                links.append([link, source, list(outputs).index(output), number, len(inputs), kind])
            required = name in schemas.required(node.type)
            inputs.append({"name": name, "type": str(spec[0]), "link": link} | ({} if required else {"shape": 7}))
        nodes.append(
            {
                "id": number, "type": node.type, "pos": list(node.at), "size": list(node.size), "flags": {},
                "order": number - 1, "mode": 0, "inputs": inputs,
                "outputs": [
                    {"name": name, "type": kind, "links": []} for name, kind in schemas.outputs(node.type).items()
                ],
                "properties": properties(node), "widgets_values": widgets,
            }
            | ({"title": node.title} if node.title else {})
        )  # fmt: skip
    for link, source, slot, *_ in links:
        nodes[source - 1]["outputs"][slot]["links"].append(link)
    (x, y), width = NOTE_AT, MODEL_SIZE[0]
    notes: list[Any] = []
    for file in [file for node in workflow.nodes.values() for file in node.models]:
        where = f"The file for models/{file['directory']}"
        notes.append(note(len(nodes) + 2, "Note", where, file["name"], (x, y, width, 60), {"models": [file]}))
        y += FILE_NOTE_HEIGHT
    box = (x, y, width, workflow.groups[0][4] - y - 20)
    text = note(len(nodes) + 1, "MarkdownNote", "What to do", workflow.note, box, {})
    return {
        "last_node_id": len(nodes) + 1 + len(notes),
        "last_link_id": len(links),
        # front ends to 1.41 look a file up by what the first node that names its address calls it, below its folder
        "nodes": [*notes, *nodes, text],
        "links": links,
        "groups": [
            {"id": i, "title": name, "bounding": list(box), "color": "#3f789e", "font_size": 24, "flags": {}}
            for i, (name, *box) in enumerate(workflow.groups, 1)
        ],
        "config": {},
        "extra": {"ds": {"scale": 0.75, "offset": [80, 120]}},
        "version": 0.4,
    }


def note(number: int, kind: str, title: str, text: str, box: tuple[int, ...], properties: dict[str, Any]) -> Any:
    """A note at `(x, y, width, height)`."""
    return {
        "id": number, "type": kind, "pos": list(box[:2]), "size": list(box[2:]), "flags": {}, "order": number - 1,
        "mode": 0, "inputs": [], "outputs": [], "title": title, "properties": properties, "widgets_values": [text],
        "color": "#432", "bgcolor": "#653",
    }  # fmt: skip


def properties(node: Node) -> dict[str, Any]:
    """What ComfyUI and its Manager know a node by, and the files it needs, each called as the widget calls it."""
    project = (ROOT / "vortex_core" / "__init__.py").read_text()
    version = project.partition('__version__ = "')[2].partition('"')[0]
    pack = {"cnr_id": "comfy-core", "ver": "0.3.40"} if node.type in CORE else {"cnr_id": "vortex-flux", "ver": version}
    named = [file | {"name": f"{file['directory']}/{file['name']}"} for file in node.models]
    models = {"models": named} if named else {}
    return {"Node name for S&R": node.type, **pack, **models}


def files() -> dict[Path, str]:
    """Every file this writes, and what it says."""
    schemas = Schemas()
    found = {}
    for name, workflow in WORKFLOWS.items():
        for path, content in ((FOLDER / f"{name}.json", ui), (FOLDER / "api" / f"{name}.json", api)):
            found[path] = json.dumps(content(schemas, workflow), indent=2, ensure_ascii=False) + "\n"
    return found


def stale() -> list[str]:
    """Names of files that are missing, old, or that nobody writes."""
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
            raise SystemExit(f"Stale: {', '.join(wrong)}. Run: python tools/workflows.py write")
    else:
        raise SystemExit(__doc__)


if __name__ == "__main__":
    main()
