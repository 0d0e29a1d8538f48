"""Writes a workflow in ComfyUI's two formats: the one that its browser opens, and the one that its API takes.

Inputs, their order and their defaults are read from the node classes, so a file cannot fall behind its nodes.
"""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

ROOT = Path(__file__).parents[2]
PACKAGE = "vortex_pack"
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN")
FILE_NOTE_HEIGHT = 100  # with its title
# The host's own nodes that the workflows use: inputs and outputs, as ComfyUI declares them.
CORE: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "SaveImage": ({"images": ("IMAGE",), "filename_prefix": ("STRING", {"default": "ComfyUI"})}, {}),
    "PreviewImage": ({"images": ("IMAGE",)}, {}),
    "PreviewAny": ({"source": ("*",)}, {}),
    "KSampler": (
        {
            "model": ("MODEL",),
            "seed": ("INT", {"default": 0, "control_after_generate": True}),
            "steps": ("INT", {"default": 20}),
            "cfg": ("FLOAT", {"default": 8.0}),
            "sampler_name": (["euler"], {}),
            "scheduler": (["simple"], {}),
            "positive": ("CONDITIONING",),
            "negative": ("CONDITIONING",),
            "latent_image": ("LATENT",),
            "denoise": ("FLOAT", {"default": 1.0}),
        },
        {"LATENT": "LATENT"},
    ),
    "CLIPTextEncode": ({"text": ("STRING", {"default": ""}), "clip": ("CLIP",)}, {"CONDITIONING": "CONDITIONING"}),
    "EmptySD3LatentImage": (
        {
            "width": ("INT", {"default": 1024}),
            "height": ("INT", {"default": 1024}),
            "batch_size": ("INT", {"default": 1}),
        },
        {"LATENT": "LATENT"},
    ),
    "LoraLoader": (
        {
            "model": ("MODEL",),
            "clip": ("CLIP",),
            "lora_name": (["tiny-outlines-lora.safetensors"], {}),
            "strength_model": ("FLOAT", {"default": 1.0}),
            "strength_clip": ("FLOAT", {"default": 1.0}),
        },
        {"MODEL": "MODEL", "CLIP": "CLIP"},
    ),
    "LoadImage": ({"image": (["example.png"], {})}, {"IMAGE": "IMAGE", "MASK": "MASK"}),
    "Canny": (
        {
            "image": ("IMAGE",),
            "low_threshold": ("FLOAT", {"default": 0.4}),
            "high_threshold": ("FLOAT", {"default": 0.8}),
        },
        {"IMAGE": "IMAGE"},
    ),
    "ControlNetLoader": (
        {"control_net_name": (["FLUX.1-dev-ControlNet-Union-Pro-2.0.safetensors"], {})},
        {"CONTROL_NET": "CONTROL_NET"},
    ),
    "ControlNetApplyAdvanced": (
        {
            "positive": ("CONDITIONING",),
            "negative": ("CONDITIONING",),
            "control_net": ("CONTROL_NET",),
            "image": ("IMAGE",),
            "vae": ("VAE",),
            "strength": ("FLOAT", {"default": 1.0}),
            "start_percent": ("FLOAT", {"default": 0.0}),
            "end_percent": ("FLOAT", {"default": 1.0}),
        },
        {"positive": "CONDITIONING", "negative": "CONDITIONING"},
    ),
    "SolidMask": (
        {
            "value": ("FLOAT", {"default": 1.0}),
            "width": ("INT", {"default": 512}),
            "height": ("INT", {"default": 512}),
        },
        {"MASK": "MASK"},
    ),
    "MaskComposite": (
        {
            "destination": ("MASK",),
            "source": ("MASK",),
            "x": ("INT", {"default": 0}),
            "y": ("INT", {"default": 0}),
            "operation": (["multiply", "add", "subtract", "and", "or", "xor"], {}),
        },
        {"MASK": "MASK"},
    ),
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

TITLES = {
    "SaveImage": "Save Image",
    "PreviewImage": "Preview Image",
    "PreviewAny": "Preview Any",
    "VAEDecode": "VAE Decode",
    "ImageScaleBy": "Upscale Image By",
    "CLIPTextEncode": "CLIP Text Encode (Prompt)",
    "LoraLoader": "Load LoRA",
    "LoadImage": "Load Image",
    "ControlNetLoader": "Load ControlNet Model",
    "ControlNetApplyAdvanced": "Apply ControlNet",
}


@dataclass(frozen=True, slots=True)
class Node:
    """One node: its place, and inputs that differ from its defaults. A link is `(node id, output name)`."""

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
    """The pack as ComfyUI imports it: from its folder, as a package of another name."""
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
    """The name that ComfyUI shows for a node."""
    names = load_pack().NODE_DISPLAY_NAME_MAPPINGS
    return str(names.get(kind) or TITLES.get(kind, kind))


def ui(schemas: Schemas, workflow: Workflow, place: tuple[int, int, int]) -> dict[str, Any]:
    """The format that the template browser opens, version 0.4; `place`: where notes begin, and how wide they are."""
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
    x, y, width = place
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
        # front ends up to 1.41 look a file up below its folder, by the name in the first node that has its address
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
    """How ComfyUI and its Manager identify a node, and the files it needs, each by the name in its widget."""
    project = (ROOT / "vortex_core" / "__init__.py").read_text()
    version = project.partition('__version__ = "')[2].partition('"')[0]
    pack = {"cnr_id": "comfy-core", "ver": "0.3.40"} if node.type in CORE else {"cnr_id": "vortex-flux", "ver": version}
    named = [file | {"name": f"{file['directory']}/{file['name']}"} for file in node.models]
    models = {"models": named} if named else {}
    return {"Node name for S&R": node.type, **pack, **models}
