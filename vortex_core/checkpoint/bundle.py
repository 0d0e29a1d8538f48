"""All parts of one model, from any source: a folder, single files, the bundled miniature, a pipeline."""

from __future__ import annotations

import stat
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from ..errors import VortexCheckpointError, VortexWarning, quoted
from ..flux1.spec import FluxSpec, ModelSpec
from ..storage.files import SAFETENSORS, Raw, open_file, unreadable
from ..storage.refused_formats import READ, config_format
from ..storage.vocabulary import token_count
from ..utils.paths import expanded
from .config import read_config, sizes
from .dialects import Part, check_depth, depth, find_part, is_cut
from .folders import open_folder, whole_of
from .tokenizer import find_tokenizers, read_tokenizer, tokenizer_of

if TYPE_CHECKING:
    from diffusers import FluxPipeline

TINY = Path(__file__).parent.parent / "assets" / "tiny-schnell"
SUBFOLDERS = {"transformer": "transformer", "clip": "text_encoder", "t5": "text_encoder_2", "vae": "vae"}
WORDS = {
    "transformer": "the transformer",
    "clip": "CLIP's text encoder (such as clip_l.safetensors)",
    "t5": "the T5 encoder (such as t5xxl_fp16.safetensors)",
    "vae": "the VAE (such as ae.safetensors)",
}


@dataclass(frozen=True, slots=True)
class Bundle:
    """A FLUX.1-schnell model, opened but not yet read."""

    name: str
    spec: ModelSpec
    parts: Mapping[str, Part]
    tokenizer: Tokenizer
    tokenizer_2: Tokenizer


def open_bundle(
    model: str | Path,
    *,
    clip: str | Path | None = None,
    t5: str | Path | None = None,
    vae: str | Path | None = None,
    tokenizers: str | Path | tuple[Path, Path] | None = None,
) -> Bundle:
    """Open a model by name (`"tiny"`, bundled), diffusers folder or single file; reads configs and headers only.

    `clip`, `t5` and `vae`: files or folders for parts that the model lacks, or instead of its own. `tokenizers`: a
    folder with `tokenizer/` and `tokenizer_2/`, or the pair of CLIP's and T5's folders.

    Raises `VortexCheckpointError`, which says what is missing, unsafe, or of another model.
    """
    path = path_of(model)
    parts, configs = find_parts(path, {"clip": clip, "t5": t5, "vae": vae})
    missing = [WORDS[kind] for kind in SUBFOLDERS if kind not in parts]
    if missing:
        options = ", ".join(f"`{kind}`" for kind in SUBFOLDERS if kind not in parts and kind != "transformer")
        raise VortexCheckpointError(
            f"{path} lacks {'; '.join(missing)}."
            + (f" Give files for them as {options}." if options else "")
            + _files_in(path),
            path=str(path),
        )
    name = "tiny-schnell" if model == "tiny" else path.stem
    if isinstance(tokenizers, tuple):
        return _bundle(name, parts, configs, *map(read_tokenizer, tokenizers))
    folder = expanded(tokenizers) if tokenizers is not None else path if path.is_dir() else None
    return _bundle(name, parts, configs, *find_tokenizers(folder))


def path_of(model: str | Path) -> Path:
    """The path of a model that is given by name (`"tiny"`) or path. Nothing need be there."""
    return TINY if model == "tiny" else _snapshot(expanded(model))


def open_pipeline(pipe: FluxPipeline) -> Bundle:
    """The parts of a diffusers `FluxPipeline` (16 or 32 bits, or bitsandbytes NF4), which keeps its own copy.

    Raises `VortexCheckpointError` for FLUX.1-dev, another quantization, and a missing part.
    """
    from .pipeline import member, part_of  # imports torch, which headers do not need

    found = {kind: part_of(pipe, name, kind) for kind, name in SUBFOLDERS.items()}
    tokenizers = (tokenizer_of(member(pipe, name), f"The pipeline's {name}") for name in ("tokenizer", "tokenizer_2"))
    return _bundle(
        Path(str(getattr(pipe, "name_or_path", None) or "pipeline")).name,
        {kind: part for kind, (part, _) in found.items()},
        {kind: config for kind, (_, config) in found.items()},
        *tokenizers,
    )


def find_parts(
    path: Path, others: Mapping[str, str | Path | None]
) -> tuple[dict[str, Part], dict[str, dict[str, Any]]]:
    """The parts at `path` and in the `others`, and the configs beside them. Reads headers only.

    Raises `VortexCheckpointError` where nothing is there or it cannot be read.
    """
    for place in (path, *(expanded(other) for other in others.values() if other is not None)):
        _check_readable(place)
    path = _snapshot(path)
    parts: dict[str, Part] = {}
    configs: dict[str, dict[str, Any]] = {}
    opened = None if path.is_dir() else _open_file(path)
    for kind, subfolder in SUBFOLDERS.items():
        given = others.get(kind)
        if given is not None:
            raw, folder = _open(expanded(given), subfolder)
        elif opened is not None:
            raw, folder = opened
        elif (path / subfolder).is_dir() or (kind == "transformer" and (path / "config.json").is_file()):
            raw, folder = _open(path, subfolder)
        else:
            continue
        beside = None if folder is None else folder / "config.json"
        config = read_config(beside) if beside is not None and beside.is_file() else None
        if config is not None and (words := config_format(config)) is not None:
            raise VortexCheckpointError(
                f"{folder} is {words}, as its config.json says, which Vortex does not read. {READ}", path=str(folder)
            )
        part = find_part(raw, kind)
        if part is not None:
            parts[kind] = part
            if config is not None:
                configs[kind] = config
        elif given is not None:
            raise VortexCheckpointError(f"{given} does not hold {WORDS[kind]}.", path=str(given))
    return parts, configs


def _check_readable(path: Path) -> None:
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError) as error:
        raise VortexCheckpointError(
            f"There is no model at {path}. Give 'tiny' (bundled), a FLUX.1-schnell folder in the diffusers layout "
            "or a .safetensors or .gguf file; Vortex never downloads by itself.",
            path=str(path),
        ) from error
    except OSError as error:
        raise unreadable(path, "model", error) from error
    except ValueError as error:
        raise VortexCheckpointError(f"{quoted(str(path))} cannot be a path ({error}).") from error
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise VortexCheckpointError(f"{path} is a pipe or a device, neither a file nor a folder.", path=str(path))


def _snapshot(path: Path) -> Path:
    """The model in a Hugging Face cache's folder `models--OWNER--NAME`: the one that `main` names, or the only one."""
    if not path.name.startswith("models--") or not (path / "snapshots").is_dir():
        return path
    revisions = [folder for folder in (path / "snapshots").iterdir() if folder.is_dir()]
    main = path / "refs" / "main"
    if main.is_file():
        named = main.read_bytes()[:64].decode("ascii", "replace").strip()
        revisions = [folder for folder in revisions if folder.name == named] or revisions
    return revisions[0] if len(revisions) == 1 else path


def _files_in(path: Path) -> str:
    if not path.is_dir():
        return ""
    files = sorted(
        file.name for file in path.iterdir()
        if file.suffix.lower() in (*SAFETENSORS, ".gguf") and not file.name.startswith(".") and file.is_file()
    )  # fmt: skip
    return f" It is a folder; perhaps you mean the file {files[0]} in it." if files else ""


def _open(path: Path, subfolder: str) -> tuple[Raw, Path | None]:
    if not path.is_dir():
        return _open_file(path)
    folder = path / subfolder if (path / subfolder).is_dir() else path
    return open_folder(folder), folder


def _open_file(path: Path) -> tuple[Raw, Path | None]:
    """A file, and the folder of its config. A shard or an index stands for the whole model beside it."""
    whole_model = whole_of(path)
    return (open_file(path), None) if whole_model is None else (whole_model, path.parent)


def _bundle(
    name: str,
    parts: Mapping[str, Part],
    configs: Mapping[str, Mapping[str, Any]],
    tokenizer: Tokenizer,
    tokenizer_2: Tokenizer,
) -> Bundle:
    described = {kind: describe(kind, part, configs.get(kind)) for kind, part in parts.items()}
    _check_fit(described, parts, {"clip": tokenizer, "t5": tokenizer_2})
    if is_cut(described["transformer"]):
        warnings.warn(
            f"{name} has {depth(described['transformer'])}. Unless it was trained so, its pictures are noise.",
            VortexWarning,
            stacklevel=3,
        )
    return Bundle(
        name=name,
        spec=ModelSpec(described["transformer"], described["vae"], described["clip"], described["t5"]),
        parts=parts,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
    )


def _check_fit(described: Mapping[str, Any], parts: Mapping[str, Part], tokenizers: Mapping[str, Tokenizer]) -> None:
    """Raise `VortexCheckpointError` where parts belong to different models."""
    for kind in ("clip", "t5", "vae"):
        where, found = parts[kind].tensors.where, width(kind, described[kind])
        wanted = wanted_width(kind, described["transformer"])
        if found != wanted:
            raise VortexCheckpointError(
                f"{where} does not fit this transformer, which takes {wanted} channels and not {found}. "
                f"Give {WORDS[kind]}.",
                path=where,
            )
        if kind in tokenizers and (tokens := token_count(tokenizers[kind])) > described[kind].vocab_size:
            raise VortexCheckpointError(
                f"{where} has embeddings for {described[kind].vocab_size} tokens and its tokenizer has {tokens}: "
                "it is another model's."
                + (" Give the model's own, a folder with both." if parts[kind].stored.raw.files else ""),
                path=where,
            )


def describe(kind: str, part: Part, config: Mapping[str, Any] | None = None) -> Any:
    """A part's sizes, from its tensors and the config beside them: `FluxSpec`, `ClipSpec`, `T5Spec` or `VaeSpec`.

    Raises `VortexCheckpointError` for another model, and where tensors and config disagree.
    """
    where = part.tensors.where
    try:
        described = sizes(kind, part.tensors, config)
    except VortexCheckpointError as error:
        if error.path is not None:
            raise
        raise VortexCheckpointError(f"{where}: {error}", path=where) from error
    check_depth(kind, part, described)
    return described


def width(kind: str, described: Any) -> int:
    """The width of a part's output: of CLIP's pooled vector, T5's embeddings, or the VAE's latents."""
    if kind == "vae":
        return int(described.latent_channels)
    return int(described.hidden_size if kind == "clip" else described.d_model)


def wanted_width(kind: str, flux: FluxSpec) -> int:
    """The width that a transformer takes from `clip`, `t5` or `vae`."""
    return {"clip": flux.vec, "t5": flux.context, "vae": flux.latent_channels}[kind]
