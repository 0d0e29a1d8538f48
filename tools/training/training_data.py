"""The training data of the miniature: scenes as numbers, and their captions as token ids."""

from __future__ import annotations

import hashlib
import random
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import scenes
import tiny_model as tm
import torch
import typer
from einops import rearrange
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

CAPTIONS = 3  # ways of saying each stored scene
SHORT = 32  # text padding of most of the training; the longest caption has 31 tokens


@dataclass
class Data:
    """Scenes as numbers, and their captions as token ids (short form; pads are added when used)."""

    things: Tensor  # [N, 2, 7]
    background: Tensor  # [N, 2, 3]
    meaning: Tensor  # [N, 10]
    jitter: Tensor  # [N, 6]
    t5_ids: Tensor  # [N, CAPTIONS, SHORT]
    clip_ids: Tensor  # [N, CAPTIONS, SHORT]

    def to(self, device: str) -> Data:
        return Data(**{name: tensor.to(device) for name, tensor in vars(self).items()})

    def save(self, path: Path, tiny: tm.Tiny) -> None:
        tensors = {name: tensor.contiguous() for name, tensor in vars(self).items()}
        save_file(tensors, path, metadata={"tokenizers": tokenizers_of(tiny)})

    @classmethod
    def load(cls, path: Path, tiny: tm.Tiny) -> Data:
        """Read what `save` wrote. Its ids are valid only with the same tokenizers, which is checked."""
        with safe_open(path, "pt") as file:
            if (file.metadata() or {}).get("tokenizers") != tokenizers_of(tiny):
                raise typer.BadParameter(f"{path} was made with other tokenizers; delete it, and it is made anew.")
        return cls(**load_file(path))


def tokenizers_of(tiny: tm.Tiny) -> str:
    """A checksum of both tokenizers."""
    return hashlib.sha256((tiny.tokenizer.to_str() + tiny.tokenizer_2.to_str()).encode()).hexdigest()


def captioned(seed: int, count: int, never_seen: int) -> tuple[list[scenes.Scene], list[str]]:
    """Scenes and their captions: for training, or (never_seen = number of things) for evaluation."""
    rng = random.Random(seed)
    drawn = [scenes.sample_held_out(rng, never_seen) if never_seen else scenes.sample_training(rng)
             for _ in range(count)]  # fmt: skip
    return drawn, [scenes.caption(s, rng) for s in drawn for _ in range(1 if never_seen else CAPTIONS)]


def _packed(seed: int, count: int) -> tuple[list[Tensor], list[str]]:
    drawn, captions = captioned(seed, count, 0)
    return [*scenes.pack(drawn), scenes.meaning(drawn).byte(), scenes.jitter(drawn)], captions


def make_data(tiny: tm.Tiny, count: int, seed: int, workers: ProcessPoolExecutor) -> Data:
    chunk = min(1024, count)
    chunks = count // chunk
    parts = list(workers.map(_packed, (seed * 1_000_003 + i for i in range(chunks)), [chunk] * chunks))
    numbers = (torch.cat(column) for column in zip(*(p[0] for p in parts), strict=True))
    ids = ids_of(tiny, [c for p in parts for c in p[1]], SHORT, SHORT)
    return Data(*numbers, *(rearrange(i.short(), "(n c) l -> n c l", c=CAPTIONS) for i in ids))


def ids_of(tiny: tm.Tiny, captions: list[str], t5_length: int, clip_length: int) -> tuple[Tensor, Tensor]:
    clip_pad = tiny.text_encoder.config.pad_token_id
    return (tm.tokenize(tiny.tokenizer_2, captions, t5_length, 0),
            tm.tokenize(tiny.tokenizer, captions, clip_length, clip_pad))  # fmt: skip
