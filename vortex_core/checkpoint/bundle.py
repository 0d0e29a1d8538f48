"""Everything one model is made of, wherever it came from: a diffusers folder, the bundled miniature, a pipeline."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from ..errors import VortexCheckpointError
from ..spec import FluxSpec, VaeSpec, dev_checkpoint_message
from .layout import flux_sources, vae_sources
from .tensors import PICKLES, Renamed, SafetensorsFiles, StateDict, Tensors, open_folder, pickle_message

if TYPE_CHECKING:
    from diffusers import FluxPipeline

TINY = Path(__file__).parent.parent / "assets" / "tiny-schnell"
FOLDERS = ("transformer", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "vae")


@dataclass(frozen=True, slots=True)
class Bundle:
    """A FLUX.1-schnell model, opened but not yet read. `clip` and `t5` are transformers' own config dictionaries."""

    name: str
    flux: FluxSpec
    vae: VaeSpec
    clip: Mapping[str, Any]
    t5: Mapping[str, Any]
    transformer: Tensors
    decoder: Tensors
    text_encoder: Tensors
    text_encoder_2: Tensors
    tokenizer: Tokenizer
    tokenizer_2: Tokenizer


def open_bundle(model: str | Path) -> Bundle:
    """Open a diffusers folder, or the bundled miniature for `"tiny"`; reads configs and headers only.

    Raises `VortexCheckpointError` that says what is missing, unsafe, or another model's.
    """
    path = TINY if model == "tiny" else Path(model).expanduser()
    if path.is_file():
        raise VortexCheckpointError(_file_message(path), path=str(path))
    if not path.is_dir():
        raise VortexCheckpointError(
            f"There is no model at {path}. Give 'tiny' (bundled) or a FLUX.1-schnell folder in the diffusers "
            "layout; Vortex never downloads by itself.",
            path=str(path),
        )
    missing = [name for name in FOLDERS if not (path / name).is_dir()]
    if missing:
        raise VortexCheckpointError(
            f"{path} is not a whole diffusers folder: it lacks {', '.join(missing)}. Expected the folders "
            f"{', '.join(FOLDERS)}.",
            path=str(path),
        )
    transformer = open_folder(path / "transformer")
    if any(name.startswith(("guidance_in.", "time_text_embed.guidance_embedder.")) for name in transformer.names()):
        raise VortexCheckpointError(dev_checkpoint_message(), path=str(path))
    return Bundle(
        name="tiny-schnell" if model == "tiny" else path.name,
        flux=FluxSpec.from_diffusers(_config(path / "transformer")),
        vae=VaeSpec.from_diffusers(_config(path / "vae")),
        clip=_config(path / "text_encoder"),
        t5=_config(path / "text_encoder_2"),
        transformer=Renamed(transformer, flux_sources),
        decoder=Renamed(open_folder(path / "vae"), vae_sources),
        text_encoder=_clip_names(open_folder(path / "text_encoder")),
        text_encoder_2=open_folder(path / "text_encoder_2"),
        tokenizer=_tokenizer(path / "tokenizer"),
        tokenizer_2=_tokenizer(path / "tokenizer_2"),
    )


def open_pipeline(pipe: FluxPipeline) -> Bundle:
    """The parts of a diffusers `FluxPipeline` (bf16, fp16 or fp32 weights), which keeps its own copy.

    Raises `VortexCheckpointError` for FLUX.1-dev and for weights that are already quantized.
    """
    for part in (pipe.transformer, pipe.text_encoder_2):
        if getattr(part, "quantization_method", None) is not None:
            raise VortexCheckpointError(
                "This pipeline's weights are already quantized; Vortex quantizes bf16, fp16 or fp32 weights itself. "
                "Load the pipeline without a quantization_config."
            )
    where = "the pipeline's "
    return Bundle(
        name=Path(getattr(pipe, "name_or_path", "") or "pipeline").name,
        flux=FluxSpec.from_diffusers(pipe.transformer.config),
        vae=VaeSpec.from_diffusers(pipe.vae.config),
        clip=pipe.text_encoder.config.to_dict(),
        t5=pipe.text_encoder_2.config.to_dict(),
        transformer=Renamed(StateDict(pipe.transformer.state_dict(), where + "transformer"), flux_sources),
        decoder=Renamed(StateDict(pipe.vae.state_dict(), where + "vae"), vae_sources),
        text_encoder=_clip_names(StateDict(pipe.text_encoder.state_dict(), where + "text_encoder")),
        text_encoder_2=StateDict(pipe.text_encoder_2.state_dict(), where + "text_encoder_2"),
        tokenizer=_whole(Tokenizer.from_str(pipe.tokenizer.backend_tokenizer.to_str())),
        tokenizer_2=_whole(Tokenizer.from_str(pipe.tokenizer_2.backend_tokenizer.to_str())),
    )


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        config: dict[str, Any] = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise VortexCheckpointError(f"{path} is missing or not JSON ({error}).", path=str(path)) from error
    return config


def _tokenizer(folder: Path) -> Tokenizer:
    if (folder / "tokenizer.json").is_file():
        return _whole(Tokenizer.from_file(str(folder / "tokenizer.json")))
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        # the released folder has CLIP's tokenizer only in this older form; transformers knows how to join it
        from transformers import CLIPTokenizerFast

        fast = CLIPTokenizerFast.from_pretrained(str(folder), local_files_only=True)
        return _whole(Tokenizer.from_str(fast.backend_tokenizer.to_str()))
    raise VortexCheckpointError(
        f"{folder} holds no tokenizer.json (nor vocab.json and merges.txt). Download it with the model.",
        path=str(folder),
    )


def _whole(tokenizer: Tokenizer) -> Tokenizer:
    # a tokenizer file stores the padding and truncation of whoever used it last
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _clip_names(source: Tensors) -> Tensors:
    # transformers 4 writes CLIP's text model under `text_model.`, transformers 5 without
    prefixed = any(name.startswith("text_model.") for name in source.names())
    return Renamed(source, lambda name: (f"text_model.{name}" if prefixed else name,))


def _file_message(path: Path) -> str:
    if path.suffix in PICKLES:
        return pickle_message(path)
    if path.suffix == ".safetensors":
        names = SafetensorsFiles(path, [path]).names()
        if any("guidance_in." in name for name in names):
            return dev_checkpoint_message()
    return (
        f"{path} is a single file. Vortex reads FLUX.1-schnell as a folder in the diffusers layout "
        f"({', '.join(FOLDERS)})."
    )
