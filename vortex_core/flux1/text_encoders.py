"""The two text encoders: tokens in, T5 embeddings and CLIP's pooled vector out.

The models are those of transformers, built on `meta` and filled here, so that all of T5's linears are NF4 (also `wo`,
which the 4-bit path of transformers leaves out). Embedding tables stay in host memory: a prompt needs a few hundred
rows, and copying these costs less than keeping a third of a GB on the device.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import Embedding

from ..device.jobs import warn
from ..errors import SHOWN, PromptSyntaxWarning, PromptTruncatedWarning, quoted
from ..storage.materialize import Target, materialize
from ..storage.tensors import Tensors
from ..storage.vocabulary import encode
from .embeddings import kept
from .spec import CLIP_TOKENS, T5_TOKENS, ClipSpec, T5Spec

HOST = torch.device("cpu")
T5_PAD = 0
ENOUGH = 20_000  # characters; a million take seconds, and most of their tokens are lost
# what ComfyUI and other programs do not read as words
SYNTAX = tuple(
    re.compile(pattern)
    for pattern in (r"(?<!\\)\([^()]*:\s*[-+]?\d{0,4}\.?\d{1,4}\s*\)", r"\bembedding:\S{1,200}", r"\bBREAK\b")
)
# pooling is done here; with its own defaults transformers warns about small vocabularies
UNUSED = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}


@dataclass(frozen=True, slots=True)
class Tokens:
    """Token ids, cut and padded to an encoder's length, and the text that did not fit."""

    ids: tuple[int, ...]
    lost: str


def tokenize(tokenizer: Tokenizer, prompt: str, length: int, pad: int | None = None) -> Tokens:
    """Exactly `length` ids of `prompt`, with the end token last; padded with `pad`, by default the end token."""
    encoding = encode(tokenizer, prompt[:ENOUGH])
    if len(prompt) > ENOUGH and len(encoding.ids) < 2 * length:
        encoding = encode(tokenizer, prompt)
    end = encoding.ids[-1]
    if len(encoding.ids) <= length:
        fill = end if pad is None else pad
        return Tokens((*encoding.ids, *[fill] * (length - len(encoding.ids))), lost="")
    return Tokens((*encoding.ids[: length - 1], end), lost=prompt[encoding.offsets[length - 1][0] :].strip())


def tokenize_prompt(clip: Tokenizer, t5: Tokenizer, prompt: str) -> tuple[Tokens, Tokens]:
    """CLIP's 77 and T5's 256 tokens of a prompt. Warns (`PromptTruncatedWarning`) if text is lost, and quotes it."""
    clip_tokens = tokenize(clip, prompt, CLIP_TOKENS)
    t5_tokens = tokenize(t5, prompt, T5_TOKENS, pad=T5_PAD)
    if t5_tokens.lost:
        _warn(f"The prompt is longer than the {T5_TOKENS} tokens FLUX.1-schnell reads. Lost: {_ends(t5_tokens.lost)}")
    elif clip_tokens.lost:
        _warn(
            f"The prompt is longer than CLIP's {CLIP_TOKENS} tokens. T5 still reads all of it, but the pooled "
            f"vector is made without: {_ends(clip_tokens.lost)}"
        )
    return clip_tokens, t5_tokens


def note_syntax(prompt: str) -> None:
    """Warn (`PromptSyntaxWarning`) of each kind of syntax that other programs would not read as words."""
    for found in (pattern.search(prompt) for pattern in SYNTAX):
        if found is not None:
            warn(
                f"{quoted(found[0])} is taken literally, as words of the prompt: FLUX's encoders know neither weights "
                "such as (word:1.2), nor embedding: names, nor BREAK.",
                PromptSyntaxWarning,
            )


class _Encoder:
    """A model of transformers with linears that may stream, and embedding tables in host memory."""

    _model: Any
    _device = HOST

    @property
    def norm(self) -> nn.Module:
        """The last norm, which never streams."""
        return self._model.final_layer_norm


class T5(_Encoder):
    """T5's encoder. `groups`: its blocks, each of which may stream."""

    def __init__(self, spec: T5Spec) -> None:
        from transformers import T5Config, T5EncoderModel

        with torch.device("meta"):
            model = T5EncoderModel(T5Config(**asdict(spec), **_ours(T5EncoderModel))).eval()
        self._model = model.encoder
        self._model.embed_tokens = None  # the same as `shared`, which is `_table` here
        self._table = Embedding(model.config.vocab_size, model.config.d_model, device="meta")

    @property
    def groups(self) -> list[nn.Module]:
        """The blocks, in the order they run."""
        return list(self._model.block)

    @property
    def modules(self) -> list[tuple[nn.Module, str]]:
        """Its modules, each with the prefix of its tensors' names."""
        return [(self._model, "encoder."), (self._table, "shared.")]

    @property
    def working_bytes(self) -> int:
        """`working_bytes_of` a prompt."""
        return self.working_bytes_of(T5_TOKENS)

    def working_bytes_of(self, tokens: int) -> int:
        """About what a text takes on the device besides weights: attention scores and the wide layer, in fp32."""
        config = self._model.config
        return int(4 * tokens * (config.num_heads * tokens * 4 + config.d_ff * 4))

    def load_table(self, tensors: Tensors, target: Target) -> None:
        """Fill the embedding table, in host memory; the rest runs on `target.device`."""
        self._device = target.device
        materialize(self._table, tensors, target, prefix="shared.", home=HOST)

    def __call__(self, ids: tuple[int, ...], layer: int | None = None) -> Tensor:
        """Embeddings `[1, N, context]` on the device. FLUX uses no mask, so padding tokens count.

        `layer`: the block whose output is taken, normalized as the last one's is; default the last.
        """
        embedded = F.embedding(torch.tensor([ids]), self._table.weight).to(self._device)
        if layer is None:
            return self._model(inputs_embeds=embedded).last_hidden_state
        with kept(self.groups, layer) as found:
            self._model(inputs_embeds=embedded)
        return self.norm(found[0])


class Clip(_Encoder):
    """CLIP's text encoder, for its pooled vector. `groups`: its layers, each of which may stream."""

    def __init__(self, spec: ClipSpec) -> None:
        from transformers import CLIPTextConfig, CLIPTextModel

        with torch.device("meta"):
            model = CLIPTextModel(CLIPTextConfig(**asdict(spec), **_ours(CLIPTextModel), **UNUSED)).eval()
        self._model = getattr(model, "text_model", model)  # transformers 4 nests it

    @property
    def groups(self) -> list[nn.Module]:
        """The layers, in the order they run."""
        return list(self._model.encoder.layers)

    @property
    def modules(self) -> list[tuple[nn.Module, str]]:
        """Its module, with the prefix of its tensors' names."""
        return [(self._model, "")]

    def load_table(self, tensors: Tensors, target: Target) -> None:
        """Fill the embedding tables, in host memory; the rest runs on `target.device`."""
        self._device = target.device
        embeddings = self._model.embeddings
        materialize(embeddings, tensors, target, prefix="embeddings.", home=HOST)
        positions = embeddings.position_embedding.num_embeddings
        embeddings.position_ids = torch.arange(positions)[None]  # a buffer that no checkpoint carries
        embeddings.register_forward_hook(lambda module, inputs, output: output.to(self._device))

    def __call__(self, ids: tuple[int, ...]) -> Tensor:
        """The pooled vector `[1, vec]` on the device."""
        states = self._model(input_ids=torch.tensor([ids])).last_hidden_state
        return states[:, ids.index(ids[-1])]  # at the first end token; it also pads

    def states(self, ids: tuple[int, ...], layer: int | None = None) -> tuple[Tensor, Tensor]:
        """Normalized states `[1, N, vec]` of a layer, by default the last, and the pooled vector, of the last."""
        with kept(self.groups, -1 if layer is None else layer) as found:
            states = self._model(input_ids=torch.tensor([ids])).last_hidden_state
        pooled = states[:, ids.index(ids[-1])]
        return states if layer is None else self.norm(found[0]), pooled


def _ours(model: Any) -> dict[str, Any]:
    """Options for a model of transformers: attention is torch's, whatever a config says."""
    return {"attn_implementation": "sdpa" if model._supports_sdpa else "eager"}


def _ends(text: str) -> str:
    return repr(text if len(text) <= SHOWN else f"{text[: SHOWN // 2]} ... {text[-SHOWN // 2 :]}")


def _warn(message: str) -> None:
    warn(message, PromptTruncatedWarning)
