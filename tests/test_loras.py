"""LoRAs of a whole engine: against plain matrices, in every precision and placement, and back to the bits of before."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from engine_parts import forget_prompts, painter_of
from torch import Tensor, nn

from vortex_core import Engine, MemoryPressureError, VortexCheckpointError, VortexInputError, load_flux_schnell
from vortex_core.memory.planner import BLOCKS, smallest_budget
from vortex_core.nf4 import NF4Weight, dequantize
from vortex_core.quant.adapters import Full, LoraFile, LoraPart, LowRank, LowRankInput, Magnitude, NormChange
from vortex_core.quant.linear import NF4Linear
from vortex_core.quant.low_rank import adapter_of, bucket, extent, largest, owners

pytestmark = pytest.mark.usefixtures("seeded")

SIZE = {"height": 64, "width": 96, "steps": 2}
PROMPT = "a green ring"
QKV, WIDE, NARROW = "double_blocks.0.img_attn.qkv", "single_blocks.1.linear1", "double_blocks.1.txt_mlp.2"


def lora(name: str = "a.safetensors", **parts: LoraPart) -> LoraFile:
    return LoraFile(name, "test", parts, {}, {}, (4,), 1000)


def low(rows: tuple[int, int], k: int, rank: int = 4, size: float = 0.1) -> LowRank:
    start, stop = rows
    return LowRank(slice(start, stop), torch.randn(stop - start, rank) * size, torch.randn(rank, k) * size)


def step_lora(seed: int = 0, rank: int = 4) -> LoraFile:
    """Changes at step time: a split qkv, a fused and a partial matrix, biases, norms, and small linears."""
    torch.manual_seed(seed)
    part = LoraPart(
        updates={
            QKV: (low((0, 256), 256, rank), low((512, 768), 256, rank + 3)),
            WIDE: (low((0, 1792), 256, rank),),
            NARROW: (low((0, 256), 1024, rank),),
            "img_in": (low((0, 256), 64),),
            "final_layer.linear": (low((0, 64), 256),),
        },
        biases={WIDE: torch.randn(1792) / 10, "txt_in": torch.randn(256) / 10},
        norms={
            "double_blocks.0.img_attn.norm.query_norm": NormChange(torch.randn(128) / 10),
            "single_blocks.0.norm.key_norm": NormChange(1 + torch.randn(128) / 10, replaces=True),
        },
    )
    return lora(f"{seed}.safetensors", transformer=part)


@pytest.fixture(scope="module")
def shared(tiny_dir: Path) -> Iterator[Engine]:
    with load_flux_schnell(tiny_dir, device="cpu", vram_budget=2) as engine:
        yield engine


@pytest.fixture
def bare(shared: Engine) -> Iterator[Engine]:
    yield shared
    forget_prompts(shared)
    painter_of(shared).memory.budget = 2e9
    use(shared)


def use(engine: Engine, *chosen: tuple[LoraFile, float]) -> None:
    """As `engine.set_loras`, of files that are in memory alone."""
    engine._run(lambda painter: painter.use_loras(chosen))
    engine._loras = chosen


def drawn(engine: Engine) -> Tensor:
    forget_prompts(engine)
    return engine.generate(PROMPT, seed=1, **SIZE)


def merged(engine: Engine, *chosen: tuple[LoraFile, float]) -> dict[str, Tensor]:
    """Every tensor of transformer and modulation in plain matrices, the LoRAs added by other means."""
    found: dict[str, Tensor] = {}
    for module, prefix in painter_of(engine).model.modules["transformer"]:
        for path, child in module.named_modules():
            if isinstance(child, NF4Linear):
                found[f"{prefix}{path}.weight"] = dequantize(NF4Weight(child.packed, child.absmax), torch.float32)
        found |= {prefix + name: value.clone() for name, value in module.named_parameters()}
    for file, strength in chosen:
        part = file.parts["transformer"]
        for name in part.modules():
            found[f"{name}.weight"] = found[f"{name}.weight"] + strength * part.delta(name, merged_of[f"{name}.weight"])
        for name, bias in part.biases.items():
            found[f"{name}.bias"] = found[f"{name}.bias"] + strength * bias
        for name, change in part.norms.items():
            found[f"{name}.scale"] = found[f"{name}.scale"] + strength * change.delta(merged_of[f"{name}.scale"])
    return found


merged_of: dict[str, Tensor] = {}


@pytest.fixture(autouse=True)
def base(bare: Engine) -> None:
    use(bare)
    merged_of.clear()
    merged_of.update(merged(bare))


def in_plain_matrices(engine: Engine, weights: dict[str, Tensor]) -> Tensor:
    """A picture by the same modules, whose NF4 linears are replaced by plain ones for it."""
    replaced: list[tuple[nn.Module, str, nn.Module]] = []
    kept: list[tuple[nn.Module, str, nn.Parameter]] = []
    for module, prefix in painter_of(engine).model.modules["transformer"]:
        for path, child in list(module.named_modules()):
            if isinstance(child, NF4Linear):
                plain = nn.Linear(child.shape[1], child.shape[0])
                plain.weight, plain.bias = (
                    nn.Parameter(weights[f"{prefix}{path}.{kind}"], requires_grad=False) for kind in ("weight", "bias")
                )
                replaced.append((module, path, child))
                module.set_submodule(path, plain)
                continue
            for kind, parameter in list(child.named_parameters(recurse=False)):
                kept.append((child, kind, parameter))
                name = f"{prefix}{path}.{kind}" if path else prefix + kind
                setattr(child, kind, nn.Parameter(weights[name], requires_grad=False))
    try:
        return drawn(engine)
    finally:
        for module, path, child in replaced:
            module.set_submodule(path, child)
        for owner, kind, parameter in kept:
            setattr(owner, kind, parameter)


@pytest.mark.parametrize("strengths", [(1.0,), (-0.5,), (0.7, 0.4), (1.0, 0.3, -0.2, 0.1, 0.5)])
def test_a_picture_is_that_of_merged_matrices(bare: Engine, strengths: tuple[float, ...]) -> None:
    plain = drawn(bare)
    chosen = [(step_lora(seed, 4 + 3 * seed), strength) for seed, strength in enumerate(strengths)]
    expected = in_plain_matrices(bare, merged(bare, *chosen))
    use(bare, *chosen)
    found = drawn(bare)
    assert (found - expected).abs().max() < 2e-3
    assert (found - plain).abs().max() > 0.02
    use(bare)
    assert torch.equal(drawn(bare), plain)
    assert {name: t for name, t in merged(bare).items() if not torch.equal(t, merged_of[name])} == {}


def modulation_lora() -> LoraFile:
    part = LoraPart(
        updates={
            "double_blocks.1.img_mod.lin": (low((0, 1536), 256),),
            "time_in.in_layer": (low((0, 256), 256),),
            "final_layer.adaLN_modulation.1": (low((0, 512), 256),),
        }
    )
    return lora("m.safetensors", transformer=part)


def test_time_and_modulation_change_what_a_prompt_becomes(bare: Engine) -> None:
    before = bare.encode(PROMPT)
    chosen = (modulation_lora(), 0.8)
    expected = in_plain_matrices(bare, merged(bare, chosen))
    use(bare, chosen)
    assert not torch.equal(bare.encode(PROMPT).modulation, before.modulation)
    assert (drawn(bare) - expected).abs().max() < 2e-3
    use(bare)
    assert torch.equal(bare.encode(PROMPT).modulation, before.modulation)
    known = bare.encode(PROMPT)
    use(bare, (step_lora(), 1.0))
    assert bare.encode(PROMPT) is known  # what acts at step time alone leaves prompts cached


def test_text_encoders_change_what_a_prompt_becomes(bare: Engine) -> None:
    before = bare.encode(PROMPT)
    names = painter_of(bare).loras._modules["t5"]
    name = next(name for name, module in names.items() if isinstance(module, NF4Linear))
    n, k = names[name].shape
    t5 = lora("t.safetensors", t5=LoraPart(updates={name: (low((0, n), k),)}))
    linears = painter_of(bare).loras._modules["clip"]
    name, linear = next((name, module) for name, module in linears.items() if isinstance(module, nn.Linear))
    clip = lora("c.safetensors", clip=LoraPart(updates={name: (low((0, linear.out_features), linear.in_features),)}))
    use(bare, (t5, 1.0))
    assert not torch.equal(bare.encode(PROMPT).txt, before.txt)
    use(bare, (clip, 1.0))
    with_clip = bare.encode(PROMPT)
    assert torch.equal(with_clip.txt, before.txt)
    assert not torch.equal(with_clip.modulation, before.modulation)
    use(bare)
    forget_prompts(bare)
    after = bare.encode(PROMPT)
    assert torch.equal(after.txt, before.txt)
    assert torch.equal(after.modulation, before.modulation)


def test_what_depends_on_the_weight_is_right(bare: Engine) -> None:
    """DoRA's magnitudes, GLoRA's A, alone and beside others, at several strengths."""
    plain = drawn(bare)
    norms = merged_of[f"{WIDE}.weight"].norm(dim=1)
    dora = LoraPart(
        updates={WIDE: (low((0, 1792), 256),)},
        row_scales={WIDE: (Magnitude(slice(0, 1792), norms * (1 + torch.rand(1792) / 5), "output"),)},
    )
    glora = LoraPart(
        updates={NARROW: (low((0, 256), 1024),)},
        inputs={NARROW: (LowRankInput(slice(0, 256), torch.randn(1024, 4) / 30, torch.randn(4, 1024) / 30),)},
    )
    files = lora("d.safetensors", transformer=dora), lora("g.safetensors", transformer=glora), step_lora()
    for strengths in ((1.0, 1.0, 0.5), (0.4, -0.6, 0.5), (1.0, 0.0, 0.0)):
        chosen = [(file, strength) for file, strength in zip(files, strengths, strict=True) if strength]
        expected = in_plain_matrices(bare, merged(bare, *chosen) if use(bare) is None else {})
        use(bare, *chosen)
        assert (drawn(bare) - expected).abs().max() < 2e-3
    use(bare)
    assert torch.equal(drawn(bare), plain)


def test_another_strength_and_another_file_keep_their_place(bare: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a captured step goes on being valid."""
    use(bare, (step_lora(1), 0.5))
    drawn(bare)
    memory, layouts = painter_of(bare).memory, []
    monkeypatch.setattr(type(memory.placement), "relayout", lambda self, groups: layouts.append(groups))
    address = memory.address()
    linear = painter_of(bare).model.transformer.get_submodule(QKV)
    factors = [factor.data_ptr() for factor in linear.adapter]
    for chosen in ((step_lora(1), 0.9), (step_lora(2, rank=5), 0.9)):
        before = drawn(bare)
        use(bare, chosen)
        assert not torch.equal(drawn(bare), before)
        assert memory.address() == address
        assert [factor.data_ptr() for factor in linear.adapter] == factors
    assert not layouts


@pytest.mark.parametrize("mode", ["exact", "int8", "fp8"])
def test_placements_and_copies_draw_the_same_bits(tiny_dir: Path, mode: str) -> None:
    chosen = (step_lora(), 0.8), (step_lora(3), 0.4)
    with load_flux_schnell(tiny_dir, device="cpu", mode=mode, vram_budget=2) as engine:
        plain = drawn(engine)
        use(engine, *chosen)
        expected = drawn(engine)
        assert not torch.equal(expected, plain)
        assert bool(engine.plan.copies) == (mode != "exact")
        least = smallest_budget(engine.plan.groups, engine.plan.requirements)
        for budget in (least, least + 4 * 2**20, engine.plan.peak - 2**21, 2e9):
            engine.limit(budget / 1e9)
            assert torch.equal(drawn(engine), expected)
        engine.limit(least / 1e9)
        drawn(engine)
        assert any(group.part == BLOCKS and group.name in engine.plan.streamed for group in engine.plan.groups)
        use(engine)  # while blocks stream
        assert torch.equal(drawn(engine), plain)
        use(engine, *chosen)
        assert torch.equal(drawn(engine), expected)
        use(engine, (chosen[0][0], 0.1), chosen[1])
        use(engine, *chosen)
        assert torch.equal(drawn(engine), expected)
        engine.limit(2)
        painter_of(engine).memory.offload()
        use(engine, (step_lora(5), 1.0))
        use(engine, *chosen)
        assert torch.equal(drawn(engine), expected)


def test_what_does_not_fit_is_refused_and_nothing_changes(bare: Engine) -> None:
    use(bare, (step_lora(), 1.0))
    expected = drawn(bare)
    least = smallest_budget(bare.plan.groups, bare.plan.requirements)
    bare.limit((least + 2**20) / 1e9)
    assert torch.equal(drawn(bare), expected)
    wide = LoraPart(updates={NARROW: (low((0, 256), 1024, rank=1024),), QKV: (low((0, 768), 256, rank=1024),)})
    with pytest.raises(MemoryPressureError, match="With these LoRAs this does not fit"):
        use(bare, (lora(transformer=wide), 1.0))
    assert torch.equal(drawn(bare), expected)


def test_what_cannot_be_used_is_named(bare: Engine, tiny_dir: Path) -> None:
    whole = lora(transformer=LoraPart(dense={QKV: (Full(slice(0, 768), torch.randn(768, 256)),)}))
    with pytest.raises(VortexCheckpointError, match=r"1 weights as a whole, such as double_blocks\.0\.img_attn\.qkv"):
        use(bare, (whole, 1.0))
    with pytest.raises(VortexCheckpointError, match=r"changes double_blocks\.77\.img_attn\.qkv, which this model"):
        use(bare, (lora(transformer=LoraPart(updates={"double_blocks.77.img_attn.qkv": (low((0, 768), 256),)})), 1.0))
    with pytest.raises(VortexInputError, match="33 LoRAs are too many"):
        use(bare, *[(step_lora(), 0.1)] * 33)
    with (
        load_flux_schnell(tiny_dir, device="cpu", quantization="none") as engine,
        pytest.raises(VortexInputError, match="LoRAs are added to NF4 weights"),
    ):
        use(engine, (step_lora(), 1.0))


def test_ranks_lie_in_buckets_side_by_side() -> None:
    assert [bucket(rank) for rank in (0, 1, 16, 17, 48, 64, 65, 128, 129, 256)] == [
        16, 16, 16, 32, 48, 64, 128, 128, 192, 256
    ]  # fmt: skip
    one, two = low((0, 64), 128, 5, size=1e-3), low((64, 192), 128, 9)
    two = LowRank(two.rows, two.up * 1e-6, two.down * 1e6)
    for dtype, near in ((torch.float32, 1e-6), (torch.float16, 2e-3)):
        updates = [[one], [two, low((128, 192), 128, 3)]]
        adapter = adapter_of(updates, (192, 128), torch.device("cpu"), dtype)
        adapter.scale.copy_(torch.tensor([1.0, 1.0, 0.0])[owners(updates, 192)].view(extent(updates, 192)))
        assert adapter.up.shape == (192, 16)
        assert adapter.down.shape == (3, 16, 128)
        for update in (one, two):
            rows = slice(update.rows.start, min(update.rows.stop, 128))
            expected = update.delta()[: rows.stop - rows.start]
            assert (adapter.rows(rows.start, rows.stop) - expected).norm() < near * expected.norm()
    with pytest.raises(VortexCheckpointError, match="begins at row 10 of"):
        adapter_of([[low((10, 64), 128)]], (192, 128), torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_largest_magnitude_is_exact_and_shows_what_is_not_finite(dtype: torch.dtype) -> None:
    values = torch.randn(5, 70).to(dtype)
    for tensor in (values, values.abs(), -values.abs(), values * 0, -values * 0, values.T, values[1:, ::3]):
        assert largest(tensor) == float(tensor.abs().max())
    assert largest(values[:0]) == 0
    assert math.isfinite(largest(torch.full((3,), torch.finfo(dtype).min, dtype=dtype)))
    for bad in (math.nan, -math.nan, math.inf, -math.inf):
        values[3, 4] = bad
        assert not math.isfinite(largest(values))


def test_what_no_lora_changes_is_not_written(bare: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    loras = painter_of(bare).loras
    one, two = step_lora(), modulation_lora()
    use(bare, (one, 0.5), (two, 0.5))
    assert {place[1:] for place in loras._originals} == {
        ("img_in", "weight"),
        ("time_in.in_layer", "weight"),
        ("final_layer.linear", "weight"),
        (WIDE, "bias"),
        ("txt_in", "bias"),
        ("double_blocks.0.img_attn.norm.query_norm", "scale"),
        ("single_blocks.0.norm.key_norm", "scale"),
    }
    monkeypatch.setattr(type(painter_of(bare).model), "measure", lambda model: pytest.fail("nothing has moved"))
    use(bare, (one, 0.7), (two, 0.5))
    use(bare, (step_lora(1), 0.7), (modulation_lora(), 0.5))
    monkeypatch.undo()
    use(bare, (two, 0.5))
    assert [place[1:] for place in loras._originals] == [("time_in.in_layer", "weight")]
    use(bare)
    assert not loras._originals


def test_another_strength_finds_scales_of_what_is_changed_alone(
    tiny_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = lora(transformer=LoraPart(updates={QKV: (low((0, 768), 256),)}))
    two = lora(transformer=LoraPart(updates={NARROW: (low((0, 256), 1024),)}))
    with load_flux_schnell(tiny_dir, device="cpu", mode="fp8", vram_budget=2) as engine:
        names = {linear: name for name, linear in painter_of(engine).model.transformer.named_modules()}
        found, rescale = [], NF4Linear.rescale
        monkeypatch.setattr(NF4Linear, "rescale", lambda self: (found.append(names[self]), rescale(self))[1])
        for chosen, expected in ((((one, 0.5),), [QKV]), (((one, 0.7),), [QKV]), (((two, 1.0),), [QKV, NARROW])):
            found.clear()
            use(engine, *chosen)
            assert found == expected
