"""Token ids to embeddings by the engine, against transformers with the same weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_parts import painter_of
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from vortex_core import Engine, MemoryPressureError, VortexInputError, load_flux_schnell
from vortex_core.flux1.embeddings import MOST_TOKENS
from vortex_core.flux1.text_encoders import tokenize_prompt
from vortex_core.nf4 import NF4Weight, dequantize
from vortex_core.quant.adapters import LoraFile, LoraPart, LowRank
from vortex_core.quant.linear import NF4Linear

END, PAD = 1, 0
CHUNK = [0, 5, 6, 7, END, *[END] * 72]


@pytest.fixture(scope="module")
def engine(tiny_dir: Path) -> Iterator[Engine]:
    with load_flux_schnell(tiny_dir, device="cpu", vram_budget=2) as engine:
        yield engine


def decoded(modules: list[tuple[nn.Module, str]]) -> dict[str, Tensor]:
    """Copies of all weights, NF4 decoded."""
    found = {}
    for module, prefix in modules:
        found |= {prefix + name: tensor.detach().clone() for name, tensor in module.named_parameters()}
        for name, inner in module.named_modules():
            if isinstance(inner, NF4Linear):
                found[f"{prefix}{name}.weight"] = dequantize(NF4Weight(inner.packed, inner.absmax), torch.float32)
    return found


def theirs(engine: Engine, folder: Path) -> tuple[Any, Any]:
    """T5 and CLIP of transformers, with the engine's weights."""
    model = painter_of(engine).model
    t5 = T5EncoderModel(T5Config.from_pretrained(folder / "text_encoder_2")).eval()
    clip = CLIPTextModel(CLIPTextConfig.from_pretrained(folder / "text_encoder")).eval()
    t5.load_state_dict(decoded(model.t5.modules), strict=False)
    getattr(clip, "text_model", clip).load_state_dict(decoded(model.clip.modules), strict=False)
    return t5, clip


def text(length: int, seed: int = 0) -> list[int]:
    dice = torch.Generator().manual_seed(seed)
    return [*torch.randint(2, 380, (length - 1,), generator=dice).tolist(), END]


@pytest.mark.parametrize("length", [1, 7, 256, 771, 1024])
def test_t5_of_any_length_is_that_of_transformers(engine: Engine, tiny_dir: Path, length: int) -> None:
    t5, _ = theirs(engine, tiny_dir)
    found = engine.embed([text(length), text(length, 1)])
    assert found.txt.shape == (2, length, 128)
    assert found.states.shape == (0, 0, 128)
    for one, ids in zip(found.txt, (text(length), text(length, 1)), strict=True):
        with torch.inference_mode():
            expected = t5(input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, length))
        assert torch.allclose(one, expected.last_hidden_state[0], rtol=1e-4, atol=1e-5)


def test_clip_in_chunks_is_that_of_transformers(engine: Engine, tiny_dir: Path) -> None:
    _, clip = theirs(engine, tiny_dir)
    full = [0, *text(76)]
    found = engine.embed(clip=[CHUNK, full])
    assert found.txt.shape == (0, 0, 128)
    with torch.inference_mode():
        expected = clip(input_ids=torch.tensor([CHUNK, full])).last_hidden_state
    assert torch.allclose(found.states, expected, rtol=1e-4, atol=1e-5)
    assert torch.allclose(found.pooled, expected[torch.arange(2), [4, 76]], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layer", [0, 1, -1, -2])
def test_a_layer_is_normalized_as_the_last(engine: Engine, tiny_dir: Path, layer: int) -> None:
    t5, clip = theirs(engine, tiny_dir)
    ids = text(20)
    found = engine.embed([ids], [CHUNK], layer=layer)
    with torch.inference_mode():
        of_t5 = t5(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states
        of_clip = clip(input_ids=torch.tensor([CHUNK]), output_hidden_states=True).hidden_states
        inner = getattr(clip, "text_model", clip)
        blocks = {kind: (layer if layer >= 0 else depth + layer) for kind, depth in (("t5", 3), ("clip", 2))}
        txt = of_t5[-1] if blocks["t5"] == 2 else t5.encoder.final_layer_norm(of_t5[blocks["t5"] + 1])
        states = inner.final_layer_norm(of_clip[blocks["clip"] + 1])
    assert torch.allclose(found.txt, txt, rtol=1e-4, atol=1e-5)
    assert torch.allclose(found.states, states, rtol=1e-4, atol=1e-5)
    assert torch.equal(found.pooled, engine.embed(clip=[CHUNK]).pooled)


def test_a_prompts_own_tokens_give_its_conditioning(engine: Engine) -> None:
    clip, t5 = tokenize_prompt(*engine.tokenizers, "a red circle")
    found, conditioning = engine.embed([t5.ids], [clip.ids]), engine.encode("a red circle")
    assert torch.equal(found.txt, conditioning.txt)
    assert torch.equal(found.pooled, conditioning.pooled)


def lora(part: str) -> LoraFile:
    low = LowRank(slice(0, 128), torch.randn(128, 4), torch.randn(4, 128))
    modules = {
        "t5": LoraPart(updates={"encoder.block.0.layer.0.SelfAttention.q": (low,)}),
        "clip": LoraPart(updates={"encoder.layers.0.self_attn.v_proj": (low,)}),
        "transformer": LoraPart(updates={"img_in": (LowRank(slice(0, 256), torch.randn(256, 4), torch.randn(4, 64)),)}),
    }
    return LoraFile(f"{part}.safetensors", "test", {part: modules[part]}, {}, {}, (4,), 1000)


def test_loras_of_texts_count_and_leave(engine: Engine) -> None:
    torch.manual_seed(0)
    before, ids = engine.embed([text(20)], [CHUNK]), [text(20)]
    with_t5 = engine.embed(ids, [CHUNK], [(lora("t5"), 1.0)])
    assert not torch.allclose(with_t5.txt, before.txt, atol=1e-2)
    assert torch.equal(with_t5.pooled, before.pooled)
    with_clip = engine.embed(ids, [CHUNK], [(lora("clip"), 1.0)])
    assert torch.equal(with_clip.txt, before.txt)
    assert not torch.allclose(with_clip.pooled, before.pooled, atol=1e-2)
    after = engine.embed(ids, [CHUNK])
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


def test_loras_of_steps_stay_where_they_are(engine: Engine) -> None:
    of_steps = lora("transformer")
    conditioning = engine.encode("a red circle", loras=[(of_steps, 0.5)])
    engine.embed([text(20)], loras=[(lora("clip"), 1.0)])
    assert [file.path for file, _ in painter_of(engine).loras.chosen] == ["transformer.safetensors", "clip.safetensors"]
    engine.embed([text(20)], loras=())
    assert [file.path for file, _ in painter_of(engine).loras.chosen] == ["transformer.safetensors"]
    assert torch.equal(engine.encode("a red circle", loras=[(of_steps, 0.5)]).txt, conditioning.txt)
    engine.embed([text(20)], loras=[(lora("t5"), 1.0)])
    engine.encode("a red circle", loras=())
    assert painter_of(engine).loras.chosen == ()


def test_the_memory_of_long_texts_is_planned(engine: Engine) -> None:
    sizes = [engine.embed_peak_bytes(tokens) for tokens in (1, 256, 512, 1024)]
    assert sizes[0] == sizes[1] < sizes[2] < sizes[3]
    engine.embed([text(1024)])
    model = painter_of(engine).model
    assert engine.plan.requirements == model.prompt_requirements(painter_of(engine).memory.blas, 1024)
    assert engine.plan.peak == sizes[3]


def test_a_text_that_does_not_fit_the_budget_is_refused_with_figures(tiny_dir: Path) -> None:
    with load_flux_schnell(tiny_dir, device="cpu", vram_budget=0.5) as small:
        before = small.embed([text(20)])
        assert small.embed_peak_bytes(MOST_TOKENS) == small.budget
        with pytest.raises(MemoryPressureError, match="GB") as caught:
            small.embed([text(MOST_TOKENS)])
        assert caught.value.needed > caught.value.available
        assert torch.equal(small.embed([text(20)]).txt, before.txt)


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        ({}, "needs texts"),
        ({"t5": "words"}, "list of texts"),
        ({"t5": ["words"]}, "list of token ids"),
        ({"t5": [[1, 2], [1]]}, "pad them to one length"),
        ({"t5": [[]]}, "1 to 4096 tokens"),
        ({"t5": [[1] * (MOST_TOKENS + 1)]}, "1 to 4096 tokens"),
        ({"clip": [[1] * 78]}, "1 to 77 tokens"),
        ({"t5": [[389]]}, "from 0 to 388"),
        ({"clip": [[-1]]}, "from 0 to 689"),
        ({"t5": [[True]]}, "whole number"),
        ({"t5": [[1]], "layer": 3}, "from -3 to 2"),
        ({"t5": [[1]], "clip": [[1]], "layer": -3}, "from -2 to 1"),
        ({"t5": [[1]], "layer": 0.5}, "whole number"),
    ],
)
def test_what_is_no_text_is_refused(engine: Engine, texts: dict[str, Any], words: str) -> None:
    with pytest.raises(VortexInputError, match=words):
        engine.embed(**texts)


def test_an_unloaded_engine_says_so(tiny_dir: Path) -> None:
    engine = load_flux_schnell(tiny_dir, device="cpu")
    assert engine.loaded
    engine.unload()
    assert not engine.loaded
    with pytest.raises(VortexInputError, match="unloaded"):
        engine.embed([[1]])


@pytest.mark.parametrize(("height", "width"), [(8, 8), (136, 72), (24, 2056)])
def test_pictures_of_multiples_of_8_are_encoded(engine: Engine, height: int, width: int) -> None:
    latents = engine.encode_image(torch.rand(1, height, width, 3))
    assert latents.shape == (1, 16, height // 8, width // 8)
    assert latents.isfinite().all()


@pytest.mark.parametrize(("height", "width"), [(12, 16), (2056, 2048)])
def test_pictures_that_are_not_encoded(engine: Engine, height: int, width: int) -> None:
    with pytest.raises(VortexInputError, match="multiples of 8, with 4,194,304 pixels at most"):
        engine.encode_image(torch.rand(1, height, width, 3))
