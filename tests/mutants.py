"""Configs and tokenizers changed at random, and what a load makes of them: the same, another picture, or a refusal.

`mutants` goes on for ever; the tests take a few hundred, tools/fuzz.py as many as it is asked for.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from vortex_core import Engine, VortexCheckpointError
from vortex_core.checkpoint.bundle import Bundle, open_bundle
from vortex_core.text import tokenize_prompt

CONFIGS = tuple(f"{part}/config.json" for part in ("transformer", "vae", "text_encoder", "text_encoder_2"))
TOKENIZERS = ("tokenizer/tokenizer.json", "tokenizer_2/tokenizer.json")
DRAW = {"seed": 1, "height": 64, "width": 64, "steps": 1}
PROMPTS = ("a red circle", "", "Ünï \u2603 \U0001f3a8 ﷺ 'tis", "x " * 300)
NUMBERS = (0, -1, 1, 2, 3, 7, 64, 77, 10**3, 10**6, 10**9, 2**31, 2**63, -(2**63), 10**400)
REALS = (0.0, -0.0, 1e-320, 0.5, 2.0, 1e308, float("nan"), float("inf"), -float("inf"))
WORDS = ("", "x", "gelu", "owner/repo", "owner/repo@main:f", "flash_attention_2", "../..", "\0", "é" * 300, "(a+)+$")
JUNK = (None, True, False, *NUMBERS, *REALS, *WORDS, [], [[]], [1], [-8] * 4, [1e9] * 4, {}, {"a": 1}, {"type": "x"})
DOORS = {
    "_attn_implementation": "owner/repo",
    "attn_implementation": "owner/repo@main:f",
    "_attn_implementation_internal": "owner/repo",
    "_experts_implementation": "owner/repo",
    "auto_map": {"AutoConfig": "owner/repo--module.Config", "AutoModel": "module.Model"},
    "trust_remote_code": True,
    "quantization_config": {"quant_method": "gptq", "modules_to_not_convert": ["x"]},
    "torch_dtype": "os.system",
    "dtype": "x",
    "architectures": ["x.Y"],
    "model_type": "llama",
    "_class_name": ["owner/repo", "Model"],
    "use_kernels": True,
    "num_hidden_layers": 10**6,
    "n_layers": 10**6,
    "text_config": {"num_hidden_layers": 10**6},
    "id2label": {"0": "x"},
    "num_labels": 10**9,
}  # keys through which libraries would do more than build what was asked for


class Mutant(NamedTuple):
    """A file of a model's folder, and what stands in it now."""

    path: str
    data: bytes


def mutants(seed: int, model: Path) -> Iterator[Mutant]:
    """Changed configs and tokenizers of `model`, in turn, without end."""
    random = Random(seed)
    sound = {path: (model / path).read_bytes() for path in (*CONFIGS, *TOKENIZERS)}
    while True:
        for path in (random.choice(CONFIGS), random.choice(TOKENIZERS)):
            if random.random() < 0.2:
                yield Mutant(path, _damaged(random, sound[path]))
            else:
                yield Mutant(path, _changed(random, json.loads(sound[path])))


def _changed(random: Random, said: Any) -> bytes:
    """JSON that means something else."""
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        if random.random() < 0.15:
            key = random.choice(sorted(DOORS))
            said[key] = DOORS[key] if random.random() < 0.7 else random.choice(JUNK)
            continue
        place, key = said, None
        while isinstance(place, dict | list) and place:
            owner, key = place, random.choice(sorted(place) if isinstance(place, dict) else range(len(place)))
            place = owner[key]
            if random.random() < 0.3:
                break
        if key is None:
            continue
        match random.randrange(6):
            case 0:
                del owner[key]
            case 1 if isinstance(place, list):
                owner[key] = place * random.choice((2, 40))
            case 2 if isinstance(owner, dict):
                other = random.choice(sorted(owner))
                owner[key], owner[other] = owner[other], place
            case 3 if type(place) in (int, float) and abs(place) < 2**63:
                owner[key] = random.choice(
                    (place * 2, place // 2, place + 1, -place, float(place), str(place), [place])
                )
            case 4 if isinstance(place, str):
                owner[key] = random.choice((place * 2, place.upper(), place[:1], place + "x", list(place), [place]))
            case _:
                owner[key] = deepcopy(random.choice(JUNK))
    return json.dumps(said).encode()


def _damaged(random: Random, data: bytes) -> bytes:
    """Bytes that may be no JSON any more."""
    at = random.randrange(len(data))
    match random.randrange(8):
        case 0:
            return data[:at]
        case 1:
            return data[:at] + bytes([random.randrange(256)]) + data[at + 1 :]
        case 2:
            return data[:at] + b"\xff\xfe\0" + data[at:]
        case 3:
            return b"[" * 10 ** random.randrange(2, 6)
        case 4:
            return b'{"a":' * 10 ** random.randrange(2, 5) + b"1"
        case 5:
            return random.choice((b"", b"{}", b"[]", b"null", b"0", b'"x"', b"NaN", b"{}" * 9))
        case 6:
            return data.decode().encode(random.choice(("utf-16", "utf-32", "utf-8-sig")))
        case _:
            lines = data.splitlines(keepends=True)
            random.shuffle(lines)
            return b"".join(lines)


class Trial:
    """A copy of a model at `folder`, of which one file at a time is exchanged."""

    def __init__(self, model: Path, folder: Path) -> None:
        self.folder = Path(shutil.copytree(model, folder, copy_function=_link))
        self.sound = _seen(open_bundle(model))

    def __call__(self, mutant: Mutant) -> str:
        """`refused`, `same` or `drawn`. Raises what a load may not raise, and for a picture that is none."""
        path = self.folder / mutant.path
        original = path.resolve()
        path.unlink()
        path.write_bytes(mutant.data)
        try:
            if _seen(open_bundle(self.folder)) == self.sound:
                return "same"
            with Engine.load(self.folder, device="cpu") as engine:
                picture = engine.generate(PROMPTS[0], **DRAW)
            assert bool(picture.isfinite().all()), f"a picture that is none: {mutant.path}"
            return "drawn"
        except VortexCheckpointError:
            return "refused"
        finally:
            path.unlink()
            path.symlink_to(original)


def _link(source: str, target: str) -> None:
    Path(target).symlink_to(source)


def _seen(bundle: Bundle) -> Any:
    """All that a load takes from configs and tokenizers."""
    tokenizers = bundle.tokenizer, bundle.tokenizer_2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one prompt is too long, on purpose
        tokens = [tokenize_prompt(*tokenizers, words) for words in PROMPTS]
    return bundle.spec.flux, bundle.spec.vae, bundle.spec.clip, bundle.spec.t5, tokens
