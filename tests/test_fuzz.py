"""Headers, configs and tokenizers changed at random: read as they are, or refused in words. Never another exception.

100 examples a test here; `pytest tests/test_fuzz.py --hypothesis-profile=nightly` runs 10,000.
"""

from __future__ import annotations

import random
import shutil
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import mutators
import pytest
import specimens
from mutators import DTYPES, NUMBERS, TEXTS, Edit, edited
from specimens import look, read, save, write_gguf

from vortex_core import Engine, VortexCheckpointError
from vortex_core.checkpoint.bundle import Bundle, open_bundle
from vortex_core.flux1.text_encoders import tokenize_prompt

pytest.importorskip("hypothesis")
from hypothesis import given
from hypothesis import strategies as st

GGUF_HEADER = 400  # bytes of the small file's
CONFIGS = tuple(f"{part}/config.json" for part in ("transformer", "vae", "text_encoder", "text_encoder_2"))
TOKENIZERS = ("tokenizer/tokenizer.json", "tokenizer_2/tokenizer.json")
DRAW: dict[str, Any] = {"seed": 1, "height": 64, "width": 64, "steps": 1}
PROMPTS = ("a red circle", "", "Ünï \u2603 \U0001f3a8 ﷺ 'tis", "x " * 300)

SHARES = st.floats(0, 1, exclude_max=True)
JUNK = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**65), 2**65), st.floats(), st.text(max_size=8),
    st.sampled_from(NUMBERS), st.sampled_from(TEXTS),
    st.lists(st.integers(-1, 2**40), max_size=4), st.dictionaries(st.text(max_size=4), st.integers(), max_size=2),
)  # fmt: skip
EDITS = st.one_of(
    st.tuples(st.just("byte"), SHARES, st.integers(0, 255)),
    st.tuples(st.just("cut"), SHARES, st.none()),
    st.tuples(st.just("length"), st.none(), st.integers(0, 2**64 - 1)),
    st.tuples(st.just("drop"), st.integers(0), st.none()),
    st.tuples(st.just("rename"), st.integers(0), st.one_of(st.text(max_size=12), st.sampled_from(mutators.RENAMED))),
    st.tuples(st.just("beside"), st.integers(0), st.sampled_from(mutators.BESIDE)),
    st.tuples(st.just("swap"), st.integers(0), st.integers(0)),
    st.tuples(st.just("dtype"), st.integers(0), st.one_of(st.sampled_from(DTYPES), JUNK)),
    st.tuples(st.just("shape"), st.integers(0), st.one_of(st.lists(st.integers(0, 600), max_size=4), JUNK)),
    st.tuples(st.just("data_offsets"), st.integers(0), st.one_of(st.lists(st.integers(0, 10**7), max_size=3), JUNK)),
    st.tuples(st.just("entry"), st.integers(0), JUNK),
    st.tuples(st.just("data"), st.integers(0), st.integers(0, 255)),
)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of sound files: bf16, NF4 plain and nested, GGUF."""
    np = pytest.importorskip("numpy")
    folder = tmp_path_factory.mktemp("sound")
    save(specimens.plain(), folder / "plain.safetensors")
    save(specimens.packed(False), folder / "nf4.safetensors")
    save(specimens.packed(True), folder / "nested.safetensors")
    names = ("double_blocks.0.img_attn.qkv.weight", "img_in.weight", "txt_in.weight")
    write_gguf(folder / "whole.gguf", "flux", {name: (np.ones((128, 64), dtype=np.float32), None) for name in names})
    return folder


@given(edits=st.lists(EDITS, min_size=1, max_size=3), form=st.sampled_from(["plain", "nf4", "nested"]))
def test_mutated_safetensors(sound: Path, edits: list[Edit], form: str) -> None:
    original = (sound / f"{form}.safetensors").read_bytes()
    read_or_refused(sound / "mutated.safetensors", edited(original, edits))


@given(share=SHARES)
def test_truncated_at_any_byte(sound: Path, share: float) -> None:
    original = (sound / "nf4.safetensors").read_bytes()
    path = sound / "cut.safetensors"
    path.write_bytes(original[: int(share * len(original))])
    with pytest.raises(VortexCheckpointError, match=r"is not a readable safetensors file.*Download it again"):
        look(path)


@given(edits=st.lists(st.tuples(SHARES, st.integers(0, 255)), min_size=1, max_size=4), cut=st.one_of(st.none(), SHARES))
def test_mutated_gguf(sound: Path, edits: list[tuple[float, int]], cut: float | None) -> None:
    data = bytearray((sound / "whole.gguf").read_bytes())
    for where, value in edits:
        data[int(where * GGUF_HEADER)] = value
    read_or_refused(sound / "mutated.gguf", bytes(data if cut is None else data[: int(cut * len(data))]))


@pytest.mark.parametrize("form", ["plain.safetensors", "nested.safetensors", "whole.gguf"])
def test_mutated_by_seed(sound: Path, form: str) -> None:
    """The same inputs each time, each in little time, and of the kinds of tools/hardening/fuzz.py."""
    original, path = (sound / form).read_bytes(), sound / f"seeded.{form}"
    for seed in range(60):
        started = time.process_time()
        dice = random.Random(seed)
        gguf = form.endswith("gguf")
        data = mutators.gguf(dice, original, GGUF_HEADER) if gguf else mutators.safetensors(dice, original)
        read_or_refused(path, data)
        assert time.process_time() - started < 5, f"seed {seed}"


def read_or_refused(path: Path, data: bytes) -> None:
    """`data` in a file is read to its end, or a `VortexCheckpointError` that names the file."""
    path.write_bytes(data)
    refusal = None
    try:
        if look(path):
            read(path)
    except VortexCheckpointError as error:
        refusal = str(error)
    assert refusal is None or str(path) in refusal


@pytest.mark.slow
def test_mutated_configs_and_tokenizers(tmp_path: Path, tiny_dir: Path) -> None:
    """300 of them, always the same; tools/hardening/fuzz.py takes more."""
    trial, dice, found = Trial(tiny_dir, tmp_path / "model"), random.Random(7), Counter[str]()
    for _ in range(150):
        for kind, names in (("config", CONFIGS), ("tokenizer", TOKENIZERS)):
            name = dice.choice(names)
            found[trial(name, mutators.KINDS[kind](dice, (tiny_dir / name).read_bytes()))] += 1
    assert found["refused"] > 150
    assert found["same"] > 30


class Trial:
    """A copy of a model at `folder`, of which one file at a time is exchanged."""

    def __init__(self, model: Path, folder: Path) -> None:
        self.folder = Path(shutil.copytree(model, folder, copy_function=_link))
        self.sound = _seen(open_bundle(model))

    def __call__(self, name: str, data: bytes) -> str:
        """`refused`, `same` or `drawn`. Raises what a load may not raise, and for a picture that is none."""
        path = self.folder / name
        original = path.resolve()
        path.unlink()
        path.write_bytes(data)
        try:
            if _seen(open_bundle(self.folder)) == self.sound:
                return "same"
            with Engine.load(self.folder, device="cpu") as engine:
                picture = engine.generate(PROMPTS[0], **DRAW)
            assert bool(picture.isfinite().all()), f"a picture that is none: {name}"
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
    return bundle.spec, tokens
