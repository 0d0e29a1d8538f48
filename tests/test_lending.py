"""An engine's weights, lent to code of others: products against plain matrices, wherever the weights are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_loras
import torch
import torch.nn.functional as F
from engine_parts import painter_of
from memory_parts import AMPLE, GB, draw, streams
from safetensors.torch import load_file
from torch import Tensor, nn

from vortex_core import Engine, MemoryPressureError, VortexInputError, load_flux_schnell
from vortex_core.flux1.conditioning import timestep_embedding
from vortex_core.memory.planner import make_plan, smallest_budget
from vortex_core.nf4 import NF4Weight, dequantize
from vortex_core.quant.linear import NF4Linear
from vortex_core.runtime.lending import Lent, modulation_rows

SIZE = (64, 96)  # pixels of a picture
TOKENS = 12
NORM = "double_blocks.0.img_attn.norm.query_norm"


def linears(engine: Engine) -> dict[str, nn.Module]:
    model = painter_of(engine).model
    every = {name: one for module in (model.transformer, model.modulation) for name, one in module.named_modules()}
    return {name: one for name, one in every.items() if isinstance(one, NF4Linear | nn.Linear)}


def inputs(engine: Engine) -> dict[str, Tensor]:
    dice = torch.Generator().manual_seed(0)
    return {name: torch.randn(2, 3, _columns(one), generator=dice) for name, one in linears(engine).items()}


def _columns(linear: nn.Module) -> int:
    return int((linear.shape if isinstance(linear, NF4Linear) else linear.weight.shape)[1])


def products(engine: Engine, order: Callable[[list[str]], list[str]] = list) -> Callable[[Lent], dict[str, Tensor]]:
    x = inputs(engine)
    return lambda lent: {name: lent.linear(name, x[name]) for name in order(list(x))}


def lend(engine: Engine, work: Callable[[Lent], Any], **more: Any) -> Any:
    return engine.lend(work, *SIZE, 1, TOKENS, **more)


def narrowest(engine: Engine, height: int, width: int, batch: int = 1, tokens: int = TOKENS) -> int:
    """The smallest budget that lends for these pictures."""
    model = painter_of(engine).model
    return int(smallest_budget(model.sizes, model.lent_requirements(height, width, batch, tokens)))


# ---------------------------------------------------------------- products


def test_products_are_those_of_plain_matrices_bit_for_bit(roomy: Engine) -> None:
    found, x = lend(roomy, products(roomy)), inputs(roomy)
    kinds = set()
    for name, one in linears(roomy).items():
        kinds.add(type(one))
        packed = isinstance(one, NF4Linear)
        weight = dequantize(NF4Weight(one.packed, one.absmax), torch.float32) if packed else one.weight
        assert torch.equal(found[name], F.linear(x[name], weight, one.bias)), name
    assert kinds == {NF4Linear, nn.Linear}  # the smallest are not quantized


def test_weights_that_are_not_quantized_are_lent_as_they_are(tiny_dir: Path) -> None:
    with load_flux_schnell(tiny_dir, device="cpu", quantization="none") as engine:
        found, x = lend(engine, products(engine)), inputs(engine)
        for name, one in linears(engine).items():
            assert isinstance(one, nn.Linear)
            assert torch.equal(found[name], F.linear(x[name], one.weight, one.bias)), name


def test_the_type_is_that_of_what_is_multiplied(roomy: Engine) -> None:
    found = lend(roomy, lambda lent: lent.linear("img_in", torch.ones(1, 64, dtype=torch.bfloat16)))
    assert found.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "order",
    [list, lambda names: names[::-1], lambda names: names[::2] + names[1::2] + names[:5]],
    ids=["forward", "back", "mixed"],
)
def test_streamed_weights_give_the_same_in_any_order(roomy: Engine, order: Callable[[list[str]], list[str]]) -> None:
    expected = lend(roomy, products(roomy))
    painter_of(roomy).memory.budget = narrowest(roomy, *SIZE)
    found = lend(roomy, products(roomy, order))
    assert streams(roomy)
    for name, product in expected.items():
        assert torch.equal(found[name], product), name


def test_norms(roomy: Engine) -> None:
    expected = painter_of(roomy).model.transformer.get_parameter(f"{NORM}.scale").clone()
    assert torch.equal(lend(roomy, lambda lent: lent.norm(NORM).clone()), expected)
    painter_of(roomy).memory.budget = narrowest(roomy, *SIZE)
    assert torch.equal(lend(roomy, lambda lent: lent.norm(NORM).clone()), expected)


def test_loras_of_a_call_are_in_its_products_and_in_no_others(roomy: Engine, tmp_path: Path) -> None:
    plain = lend(roomy, products(roomy))
    path = tiny_loras.write(tmp_path / "a.safetensors")
    tensors, x = load_file(path), inputs(roomy)
    found = lend(roomy, products(roomy), loras=[(path, 0.5)])
    changed = tiny_loras.STEP_TIME | tiny_loras.PROMPT_TIME
    for name, product in plain.items():
        if name not in changed:
            assert torch.equal(found[name], product), name
            continue
        up, down = (tensors[f"diffusion_model.{name}.lora_{factor}.weight"] for factor in "BA")
        torch.testing.assert_close(found[name], product + 0.5 * x[name] @ down.T @ up.T, atol=1e-4, rtol=1e-4)
    assert all(torch.equal(product, plain[name]) for name, product in lend(roomy, products(roomy)).items())


def test_rows_of_the_table_are_what_modulation_linears_give(roomy: Engine) -> None:
    """In fp32; a table of several timesteps is summed in another order."""
    flux, sigmas = roomy.spec.flux, (1.0, 0.25)
    dice = torch.Generator().manual_seed(1)
    txt, pooled = torch.randn(1, TOKENS, flux.context, generator=dice), torch.randn(1, flux.vec, generator=dice)
    conditioning, rows = roomy.condition(txt, pooled, sigmas=sigmas), modulation_rows(flux)

    def modulation(lent: Lent) -> list[dict[str, Tensor]]:
        def embedded(name: str, x: Tensor) -> Tensor:
            return lent.linear(f"{name}.out_layer", F.silu(lent.linear(f"{name}.in_layer", x)))

        text = embedded("vector_in", pooled)
        times = [F.silu(text + embedded("time_in", timestep_embedding(torch.tensor([1000 * t])))) for t in sigmas]
        return [{name: lent.linear(name, vec) for name in rows} for vec in times]

    for sigma, found in zip(sigmas, lend(roomy, modulation), strict=True):
        table = conditioning.rows(sigma)
        assert sorted((part.start, part.stop) for part in rows.values())[-1][1] == len(table)
        for name, part in rows.items():
            torch.testing.assert_close(table[part].flatten(), found[name].flatten(), atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------- as a call of the engine


def test_a_picture_after_it_is_as_before(roomy: Engine) -> None:
    expected = draw(roomy)
    lend(roomy, products(roomy))
    assert torch.equal(draw(roomy), expected)


def test_errors_of_the_work_come_through_and_the_engine_goes_on(roomy: Engine) -> None:
    def fail(lent: Lent) -> None:
        lent.linear("img_in", torch.ones(1, 64))
        raise LookupError("mine")

    with pytest.raises(LookupError, match="mine"):
        lend(roomy, fail)
    assert lend(roomy, lambda lent: 5) == 5


def test_work_that_runs_out_of_memory_is_done_once_more(roomy: Engine) -> None:
    tries = []

    def work(lent: Lent) -> Tensor:
        tries.append(lent)
        if len(tries) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return lent.linear("img_in", torch.ones(1, 64))

    expected = lend(roomy, lambda lent: lent.linear("img_in", torch.ones(1, 64)))
    assert torch.equal(lend(roomy, work), expected)
    assert len(tries) == 2


def test_activations_that_do_not_fit_are_refused(roomy: Engine) -> None:
    painter_of(roomy).memory.budget = narrowest(roomy, *SIZE)
    with pytest.raises(MemoryPressureError):
        roomy.lend(lambda lent: None, 2048, 2048, 8)


def test_an_offloaded_engine_lends(roomy: Engine) -> None:
    expected = lend(roomy, products(roomy))
    roomy.offload()
    found = lend(roomy, products(roomy))
    assert all(torch.equal(found[name], product) for name, product in expected.items())


def test_after_unload_there_is_nothing_to_lend(tiny_dir: Path) -> None:
    engine = load_flux_schnell(tiny_dir, device="cpu")
    engine.unload()
    with pytest.raises(VortexInputError):
        lend(engine, lambda lent: None)
    with pytest.raises(VortexInputError):
        engine.peak_bytes(*SIZE)


# ---------------------------------------------------------------- peaks


def test_the_peak_is_the_larger_of_both_plans(roomy: Engine) -> None:
    model = painter_of(roomy).model
    for height, width, batch, tokens in ((64, 96, 1, 256), (256, 128, 3, 40)):
        asked = (kind(height, width, batch, tokens) for kind in (model.requirements, model.lent_requirements))
        plans = [make_plan(model.sizes, one, AMPLE * GB) for one in asked]
        assert roomy.peak_bytes(height, width, batch, tokens) == max(plan.peak for plan in plans if plan is not None)


def test_the_peak_is_what_such_a_step_plans(roomy: Engine) -> None:
    dice = torch.Generator().manual_seed(1)
    flux = roomy.spec.flux
    text = roomy.condition(
        torch.randn(1, TOKENS, flux.context, generator=dice), torch.randn(1, flux.vec, generator=dice)
    )
    roomy.velocity(torch.randn(2, 16, 8, 12, generator=dice), 1.0, text)
    own = roomy.plan.peak
    roomy.lend(lambda lent: None, *SIZE, 2, TOKENS)
    assert roomy.peak_bytes(*SIZE, 2, TOKENS) == max(own, roomy.plan.peak)


def test_the_peak_grows_with_pictures_and_stops_at_the_budget(roomy: Engine) -> None:
    peaks = [roomy.peak_bytes(*SIZE, batch) for batch in (1, 2, 4)]
    assert peaks == sorted(set(peaks))
    budget = painter_of(roomy).memory.budget = narrowest(roomy, *SIZE)
    assert roomy.peak_bytes(*SIZE, 1, TOKENS) <= budget
    assert roomy.peak_bytes(2048, 2048, 8) == budget
