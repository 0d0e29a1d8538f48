"""Token ids to embeddings, without a prompt: for programs that split, weight and pad texts in their own way."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import VortexInputError, quoted
from ..utils.numeric import whole
from .spec import ClipSpec, T5Spec

MOST_TOKENS = 4096  # of one text for T5: its attention takes 4 GB and more there
Ids = tuple[tuple[int, ...], ...]


class Embeddings(NamedTuple):
    """What `Engine.embed` makes, in host memory, in the engine's type.

    `txt` `[T, N, context]`: T5's. `states` `[C, M, vec]`: CLIP's last states. `pooled` `[C, vec]`: those of the first
    end token. T and C are the numbers of texts, and may be 0.
    """

    txt: Tensor
    states: Tensor
    pooled: Tensor


def check_tokens(name: str, given: object, most: int, vocabulary: int) -> Ids:
    """Texts as token ids, all of one length. Raises `VortexInputError` for anything else; `name` says of which."""
    if isinstance(given, str | bytes) or not isinstance(given, Sequence):
        raise VortexInputError(f"{name} is a list of texts, each a list of token ids, not {quoted(given)}.")
    texts = tuple(_ids(name, text, vocabulary) for text in given)
    lengths = sorted({len(text) for text in texts})
    if len(lengths) > 1:
        raise VortexInputError(f"The texts of {name} have {lengths} tokens; pad them to one length.")
    if lengths and not 1 <= lengths[0] <= most:
        raise VortexInputError(f"A text of {name} has 1 to {most} tokens, not {lengths[0]}.")
    return texts


def check_layer(layer: object, t5: T5Spec, clip: ClipSpec, *, of_t5: bool, of_clip: bool) -> int | None:
    """The number of a layer, None for the last; negative ones count from the end. Raises `VortexInputError`."""
    if layer is None:
        return None
    depths = [t5.num_layers] * of_t5 + [clip.num_hidden_layers] * of_clip
    found, most = whole(layer), min(depths, default=0)
    if found is None or not -most <= found < most:
        raise VortexInputError(f"layer is a whole number from {-most} to {most - 1}, or None, not {quoted(layer)}.")
    return found


@contextmanager
def kept(layers: Sequence[nn.Module], layer: int) -> Iterator[list[Tensor]]:
    """Inside, what comes out of one of `layers` is copied to the list."""
    found: list[Tensor] = []

    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        found.append((output[0] if isinstance(output, tuple) else output).clone())

    hook = layers[layer].register_forward_hook(keep)
    try:
        yield found
    finally:
        hook.remove()


def stacked(parts: Sequence[Tensor], *shape: int, dtype: torch.dtype) -> Tensor:
    """`[1, ...]` each to one tensor; an empty one of `shape` where there are none."""
    return torch.cat(list(parts)) if parts else torch.empty(shape, dtype=dtype)


def _ids(name: str, text: object, vocabulary: int) -> tuple[int, ...]:
    if isinstance(text, str | bytes) or not isinstance(text, Sequence):
        raise VortexInputError(f"A text of {name} is a list of token ids, not {quoted(text)}.")
    ids = tuple(whole(token) for token in text)
    for token, found in zip(text, ids, strict=True):
        if found is None or not 0 <= found < vocabulary:
            raise VortexInputError(f"A token of {name} is a whole number from 0 to {vocabulary - 1}: {quoted(token)}.")
    return ids  # type: ignore[return-value]
