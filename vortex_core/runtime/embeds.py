"""An engine's text encoders by themselves: from token ids to embeddings."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer

from ..errors import VortexInputError, quoted
from ..flux1.embeddings import MOST_TOKENS, Embeddings, check_layer, check_tokens
from ..flux1.spec import ModelSpec
from ..memory.planner import make_plan
from .lora_files import LoraFiles, Pairs
from .loras import Chosen
from .turns import Turns


class Embeds(Turns):
    """What an engine does with tokens."""

    spec: ModelSpec
    _lora_files: LoraFiles
    _loras: Chosen

    @property
    def tokenizers(self) -> tuple[Tokenizer, Tokenizer]:
        """CLIP's and T5's, as the model brought them or as they were named."""
        return self._conditioner.tokenizers

    @property
    def loaded(self) -> bool:
        """False after `unload`."""
        return self._painter is not None

    def embed_peak_bytes(self, tokens: int) -> int:
        """Bytes on the device at the peak of `embed` with texts of so many tokens for T5, weights included; at most
        the budget. Raises `VortexInputError` after `unload`.
        """
        memory = self._memory
        plan = make_plan(memory.model.sizes, memory.model.prompt_requirements(memory.blas, tokens), memory.budget)
        return int(memory.budget if plan is None else plan.peak)

    def embed(
        self,
        t5: Sequence[Sequence[int]] = (),
        clip: Sequence[Sequence[int]] = (),
        loras: Pairs | None = None,
        *,
        layer: int | None = None,
    ) -> Embeddings:
        """Embeddings of token ids, for a program with a tokenizer of its own: `txt`, `states` and `pooled`.

        `t5`: texts of one length, from 1 to 4096 ids each, to `txt` `[T, N, context]`. `clip`: texts of one length, at
        most 77 ids each, to `states` `[C, M, vec]` and `pooled` `[C, vec]`. A text for CLIP ends with its end token,
        which also pads; the vector of the first one is taken. Every id counts: there is no mask. All are in host
        memory. `layer`: of the encoders, whose states are taken; negative ones count from the end. Default the last;
        pooled vectors are always of that. `loras` as in `generate`. Nothing is cached, and the memory of long texts is
        planned into the budget.

        Raises `VortexInputError` for other ids, lengths or layers; `MemoryPressureError` where a text does not fit the
        budget; and as `set_loras`.
        """
        self._check_usable()
        of_t5, of_clip = self.spec.t5, self.spec.clip
        texts = check_tokens("t5", t5, MOST_TOKENS, of_t5.vocab_size)
        chunks = check_tokens("clip", clip, of_clip.max_position_embeddings, of_clip.vocab_size)
        if not texts and not chunks:
            raise VortexInputError(f"embed needs texts for t5 or for clip, not {quoted(t5)} and {quoted(clip)}.")
        number = check_layer(layer, of_t5, of_clip, of_t5=bool(texts), of_clip=bool(chunks))
        chosen = self._lora_files.of_call(loras, self._loras)
        return self._run(lambda painter: painter.embed(texts, chunks, number, chosen))
