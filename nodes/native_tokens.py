"""The host's tokenizer of Flux for an engine: its own vocabulary for the released encoders, else the engine's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from ..vortex_core import Engine
    from ..vortex_core.flux1.spec import ModelSpec


def tokenizer_of(engine: Engine) -> Any:
    """What the host's CLIP splits texts with: weights, chunks and `embedding:` names as it has them."""
    from comfy.text_encoders.flux import FluxTokenizer

    folders = _embeddings()
    if has_released_words(engine.spec):
        return FluxTokenizer(embedding_directory=folders)
    return _own(engine, folders)


def has_released_words(spec: ModelSpec) -> bool:
    """Whether both vocabularies are those of the released encoders, which the host brings."""
    from .types import RELEASED

    found = (spec.clip.vocab_size, spec.t5.vocab_size)
    return found == (RELEASED.clip.vocab_size, RELEASED.t5.vocab_size)


def _own(engine: Engine, folders: list[str]) -> Any:
    """The host's tokenizer over the engine's vocabularies."""
    from comfy.sd1_clip import SDTokenizer
    from comfy.text_encoders.flux import FluxTokenizer

    clip, t5 = (_transformers_like(words) for words in engine.tokenizers)
    made = FluxTokenizer.__new__(FluxTokenizer)  # its own way to begin reads the released vocabularies
    options: dict[str, Any] = {"tokenizer_path": "", "embedding_directory": folders}
    made.clip_l = SDTokenizer(tokenizer_class=clip, embedding_size=engine.spec.clip.hidden_size, **options)
    made.t5xxl = SDTokenizer(
        tokenizer_class=t5, embedding_size=engine.spec.t5.d_model, embedding_key="t5xxl", pad_with_end=False,
        has_start_token=False, pad_to_max_length=False, max_length=99999999, min_length=256, **options,
    )  # fmt: skip
    return made


def _transformers_like(words: Tokenizer) -> type:
    """What the host expects of a tokenizer's class."""
    from ..vortex_core.storage.vocabulary import encode

    class OwnWords:
        @classmethod
        def from_pretrained(cls, path: str, **options: Any) -> OwnWords:
            return cls()

        def __call__(self, text: str) -> dict[str, list[int]]:
            return {"input_ids": list(encode(words, text).ids)}

        def get_vocab(self) -> dict[str, int]:
            return words.get_vocab()

        def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
            return words.decode(list(ids), skip_special_tokens=skip_special_tokens)

    return OwnWords


def _embeddings() -> list[str]:
    """The host's folders of textual inversions: an `embedding:` name is found there, and then refused in words."""
    import folder_paths

    try:
        return [str(folder) for folder in folder_paths.get_folder_paths("embeddings")]
    except KeyError:
        return []
