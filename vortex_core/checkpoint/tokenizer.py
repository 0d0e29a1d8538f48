"""The two tokenizers, found without a network: beside the model, or in the user's Hugging Face cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from ..errors import VortexCheckpointError
from ..storage.vocabulary import END, build, build_clip, guarded, read_pair, read_text

# repository and file; all are looked up in the cache, and `vortex fetch tokenizers` downloads the last of each
CLIP_HOMES = (("openai/clip-vit-large-patch14", "tokenizer.json"),)
T5_HOMES = (
    ("black-forest-labs/FLUX.1-schnell", "tokenizer_2/tokenizer.json"),
    ("black-forest-labs/FLUX.1-dev", "tokenizer_2/tokenizer.json"),
    ("google-t5/t5-base", "tokenizer.json"),  # the same vocabulary
)


def find_tokenizers(folder: Path | None) -> tuple[Tokenizer, Tokenizer]:
    """CLIP's and T5's: from `folder/tokenizer` and `folder/tokenizer_2`, else from the user's Hugging Face cache.

    Nothing is downloaded. Raises `VortexCheckpointError`, which says how to get what is missing.
    """
    found = locate_tokenizers(folder)
    missing = [name for name, path in found.items() if path is None]
    if missing:
        where = f"{folder} has no tokenizer and tokenizer_2 folders, and " if folder is not None else ""
        raise VortexCheckpointError(
            f"{where}the Hugging Face cache does not hold the tokenizer of {' and '.join(missing)}. Run `vortex fetch "
            "tokenizers` once (it downloads about 4 MB), or give a folder with both as `tokenizers`.",
            path=None if folder is None else str(folder),
        )
    clip, t5 = (read_tokenizer(path) for path in found.values() if path is not None)
    return clip, t5


def locate_tokenizers(folder: Path | None) -> dict[str, Path | None]:
    """The paths of CLIP's and T5's tokenizers; None where one is missing. Reads nothing."""
    if folder is not None and has_tokenizers(folder):
        return {"CLIP": folder / "tokenizer", "T5": folder / "tokenizer_2"}
    return {"CLIP": _cached(CLIP_HOMES), "T5": _cached(T5_HOMES)}


def has_tokenizers(folder: Path) -> bool:
    """Whether a model's folder has tokenizers of its own."""
    return (folder / "tokenizer").is_dir() and (folder / "tokenizer_2").is_dir()


def read_tokenizer(path: Path) -> Tokenizer:
    """Read a tokenizer.json, or a folder with one or with CLIP's older pair of vocab.json and merges.txt."""
    file = path if path.is_file() else path / "tokenizer.json"
    if file.is_file():
        return build(read_text(file), file)
    if (path / "vocab.json").is_file() and (path / "merges.txt").is_file():
        return read_pair(path)  # FLUX's released folder has CLIP's tokenizer only in this form
    raise VortexCheckpointError(
        f"{path} holds no tokenizer.json (nor vocab.json and merges.txt). Download it with the model.",
        path=str(path),
    )


def tokenizer_of(theirs: Any, where: str) -> Tokenizer:
    """The tokenizer inside one of transformers (fast or slow, version 4 or 5), which stays as it is.

    Raises `VortexCheckpointError` where it cannot be read.
    """
    with guarded(where):
        backend = getattr(theirs, "backend_tokenizer", None)
        if backend is not None:
            return build(backend.to_str(), where)
        ranks = getattr(theirs, "bpe_ranks", None)
        if ranks is not None and END in theirs.encoder:  # CLIP's slow one
            return build_clip(theirs.encoder, sorted(ranks, key=ranks.__getitem__), where)
        name = getattr(theirs, "name_or_path", None)
        if name and Path(name).is_dir():
            return read_tokenizer(Path(name))
    raise VortexCheckpointError(
        f"{where} is {type(theirs).__name__}, which Vortex cannot read. Load the pipeline with a fast tokenizer, such "
        "as T5TokenizerFast."
    )


def fetch_tokenizers() -> list[Path]:
    """Download both tokenizers into the user's Hugging Face cache; the files. Nothing else uses a network.

    Raises `VortexCheckpointError` where that fails.
    """
    from huggingface_hub import hf_hub_download

    try:
        return [Path(hf_hub_download(*homes[-1])) for homes in (CLIP_HOMES, T5_HOMES)]
    except (OSError, ValueError) as error:
        raise VortexCheckpointError(
            f"The tokenizers could not be downloaded ({str(error).partition(chr(10))[0]}). Check the network, and that "
            "HF_HUB_OFFLINE is not set."
        ) from error


def _cached(homes: tuple[tuple[str, str], ...]) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    for repository, file in homes:
        path = try_to_load_from_cache(repository, file)
        if isinstance(path, str):
            return Path(path)
    return None
