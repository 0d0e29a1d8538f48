"""Runs inside a ComfyUI tree's own Python: the pack's MODEL beside the host's own Flux with the same weights.

Arguments: a folder, the tree, and names of cases; without names, all. Each function of model_cases.py,
model_nag_cases.py and model_patch_cases.py whose name begins with `case_` gives figures by name. All are written to
`figures.json` in the folder, and the traceback of one that failed. Nothing here imports pytest: the tree's Python may
have none.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import logging
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PACK = "vortex_pack"
SIDE = 16  # of a latent: 128 pixels


def start(tree: Path) -> Any:
    """Have the host's modules and this pack imported; the pack."""
    sys.argv = ["x", "--cpu"]  # so that the host reads no options of ours
    sys.path.insert(0, str(tree))
    import comfy.options

    comfy.options.enable_args_parsing()
    import nodes  # noqa: F401

    spec = importlib.util.spec_from_file_location(PACK, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    assert spec is not None
    assert spec.loader is not None
    sys.modules[PACK] = pack = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pack)
    return pack


def part(name: str) -> Any:
    return importlib.import_module(f"{PACK}.{name}")


class Routes(logging.Handler):
    """What the log says of routes."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.getMessage().startswith("MODEL: steps are "):
            self.lines.append(record.getMessage().removeprefix("MODEL: steps are "))

    def taken(self) -> list[str]:
        lines, self.lines = self.lines, []
        return lines


class Bench:
    """The two MODELs, and what samples with them."""

    def __init__(self, folder: Path) -> None:
        import comfy.model_patcher
        import torch

        self.folder, self.torch = folder, torch
        self.routes = Routes()
        log = logging.getLogger(f"{PACK}.nodes.native_steps")
        log.setLevel(logging.INFO)
        log.addHandler(self.routes)
        (handle, _, self.ours, *_) = (
            part("nodes").NODE_CLASS_MAPPINGS["VortexFluxLoader"]().load("tiny-schnell", 6.5, "exact")
        )
        self.handle = handle
        self.engine = self.ours.model.vortex.engine
        flux = self._flux()
        self.theirs = comfy.model_patcher.ModelPatcher(flux, torch.device("cpu"), torch.device("cpu"))
        self.width, self.vec = self.engine.spec.flux.context, self.engine.spec.flux.vec

    def _flux(self) -> Any:
        """The host's Flux with the engine's weights, dequantized."""
        import comfy.model_detection
        import comfy.supported_models

        model = self.engine._painter.model
        weights = decoded(model.transformer) | decoded(model.modulation)
        hidden, context = weights["txt_in.weight"].shape
        config = comfy.model_detection.detect_unet_config(weights, "")
        config |= {"hidden_size": hidden, "num_heads": hidden // 128, "context_in_dim": context}
        config |= {"dtype": self.torch.float32}
        return comfy.supported_models.FluxSchnell(config).get_model({}).load_model_weights(weights)

    def text(self, seed: int, tokens: int = 256, **more: Any) -> Any:
        dice = self.torch.Generator().manual_seed(seed)
        txt = self.torch.randn(1, tokens, self.width, generator=dice) / 4
        return [[txt, {"pooled_output": self.torch.randn(1, self.vec, generator=dice), **more}]]

    def latent(self, batch: int = 1, seed: int | None = None) -> dict[str, Any]:
        if seed is None:
            return {"samples": self.torch.zeros(batch, 16, SIDE, SIDE)}
        dice = self.torch.Generator().manual_seed(seed)
        return {"samples": self.torch.randn(batch, 16, SIDE, SIDE, generator=dice)}

    def sample(
        self, model: Any, positive: Any = None, negative: Any = None, latent: Any = None, sampler: str = "euler",
        scheduler: str = "simple", steps: int = 4, cfg: float = 1.0, denoise: float = 1.0, seed: int = 1,
    ) -> Any:  # fmt: skip
        import nodes

        positive = self.text(0) if positive is None else positive
        negative = self.text(1) if negative is None else negative
        latent = self.latent() if latent is None else latent
        with self.torch.inference_mode():  # as the host runs its nodes
            (found,) = nodes.KSampler().sample(
                model, seed, steps, cfg, sampler, scheduler, positive, negative, latent, denoise
            )
        return found["samples"]

    def off(self, ours: Any, theirs: Any) -> float:
        return float((ours - theirs).norm() / theirs.norm())

    def both(self, change: Callable[[Any], Any] = lambda model: model, **options: Any) -> dict[str, Any]:
        """How far both are from each other, and the routes; `change` makes the clone that is sampled with."""
        theirs = self.sample(change(self.theirs), **options)
        self.routes.taken()
        ours = self.sample(change(self.ours), **options)
        return {"off": self.off(ours, theirs), "routes": self.routes.taken()}


def decoded(module: Any) -> dict[str, Any]:
    """All tensors of a module of the pack in fp32, NF4 decoded."""
    import torch

    nf4, linear = part("vortex_core.nf4"), part("vortex_core.quant.linear")
    tensors = {name: parameter.float() for name, parameter in module.named_parameters()}
    for name, inner in module.named_modules():
        if isinstance(inner, linear.NF4Linear):
            weight = nf4.NF4Weight(inner.packed, inner.absmax)
            tensors[f"{name}.weight"] = nf4.dequantize(weight, torch.float32)
            if inner.bias is not None:
                tensors[f"{name}.bias"] = inner.bias.float()
    return tensors


def words(act: Callable[[], Any]) -> str:
    """The type and the words of the error that `act` raises; empty where it raises none."""
    try:
        act()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def find(module: str, name: str) -> Any:
    """A node class of the host's extras; None where it has none."""
    try:
        return getattr(importlib.import_module(f"comfy_extras.{module}"), name, None)
    except ImportError:
        return None


def node(module: str, name: str, *inputs: Any) -> Any:
    """The first output of a node of the host's extras, in either of its two styles."""
    kind = find(module, name)
    if hasattr(kind, "define_schema"):
        return kind.execute(*inputs).args[0]
    return getattr(kind(), kind.FUNCTION)(*inputs)[0]


def main(folder: Path, tree: Path, only: list[str]) -> None:
    start(tree)
    import model_cases
    import model_nag_cases
    import model_patch_cases
    import torch

    torch.set_num_threads(1)  # as the engine does for the miniature: sums in another order round otherwise
    every = vars(model_cases) | vars(model_nag_cases) | vars(model_patch_cases)
    run_cases(Bench(folder), every, folder, only)


def run_cases(bench: Bench, every: dict[str, Any], folder: Path, only: list[str]) -> None:
    """Write the figures of the cases among `every`; `only` names some."""
    cases = {name.removeprefix("case_"): case for name, case in every.items() if name.startswith("case_")}
    figures: dict[str, Any] = {}
    for name, case in cases.items():
        if only and name not in only:
            continue
        try:
            figures[name] = case(bench)
        except Exception:
            figures[name] = {"error": traceback.format_exc()}
        bench.routes.taken()
    (folder / "figures.json").write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
