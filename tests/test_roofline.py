"""What is predicted for cards that are not here: the counts against what really runs, and against what was measured."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from vortex_core.bench import cards
from vortex_core.bench.roofline import (
    ATTENTION,
    DECODING,
    MEMORY,
    PICTURE,
    PRODUCTS,
    PROMPT,
    ROWS,
    SHARES,
    Prediction,
    Work,
    block_weights,
    decoder_work,
    predict,
    prompt_work,
    step_work,
)
from vortex_core.cli.main import app
from vortex_core.errors import VortexInputError
from vortex_core.flux1.conditioning import Modulation
from vortex_core.flux1.spec import FluxSpec, ModelSpec, VaeSpec
from vortex_core.flux1.text_encoders import T5, Clip
from vortex_core.flux1.transformer import Transformer
from vortex_core.flux1.vae import Decoder, decode
from vortex_core.quant.precision import EXACT, Fp8, Int8, Precision

ROOT = Path(__file__).parent.parent
SPEC, SIDES = ModelSpec(), (512, 1024)
SMALL = FluxSpec(hidden=128, heads=2, double_blocks=2, single_blocks=3, context=64, vec=64, axes=(16, 24, 24))
runner = CliRunner()


def operations(work: Iterable[Work], part: str | None = None) -> float:
    return sum(one.operations for one in work if part in (None, one.part))


def moved(work: Iterable[Work], part: str) -> float:
    return sum(one.moved for one in work if one.part == part)


def card(name: str, precision: str, side: int, **options: float) -> Prediction:
    return predict(cards.get(name), SPEC, side, side, precision, **options)


# counts


@pytest.mark.parametrize(("side", "step", "vae"), [(512, 17.67e12, 2.51e12), (1024, 69.45e12, 10.47e12)])
def test_the_counts_of_flux_at_its_real_size(side: int, step: float, vae: float) -> None:
    assert operations(step_work(SPEC.flux, side, side)) == pytest.approx(step, rel=1e-3)
    assert operations(decoder_work(SPEC.vae, side, side, taps=9)) == pytest.approx(vae, rel=2e-3)
    assert operations(prompt_work(SPEC)) == pytest.approx(2.44e12, rel=2e-3)


def test_a_step_is_counted_as_it_runs() -> None:
    """torch counts the products and the attention of a real step."""
    transformer = Transformer(SMALL)
    txt = torch.zeros(1, 256, SMALL.hidden)
    img, table = torch.zeros(1, 30, SMALL.in_channels), torch.zeros(SMALL.modulation_rows, SMALL.hidden)
    positions = torch.zeros(286, SMALL.head_dim // 2)
    # the plain form of attention, since torch does not count the CPU's own
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        transformer(img, txt, table, (positions, positions))
    assert operations(step_work(SMALL, 80, 96)) == counter.get_total_flops()


def test_a_batch_is_counted_as_pictures_that_attend_to_themselves() -> None:
    one, three = (list(step_work(SMALL, 80, 96, pictures=n)) for n in (1, 3))
    for part in (PRODUCTS, ATTENTION):
        assert operations(three, part) == 3 * operations(one, part)
    assert moved(three, DECODING) == moved(one, DECODING)  # weights are decoded once for all
    assert moved(three, ROWS) == 3 * moved(one, ROWS)


def test_the_decoder_is_counted_as_it_runs() -> None:
    """The reference doubles a map before it convolves it, two columns wider than it is."""
    spec = VaeSpec(channels=(16, 32, 32, 64), layers=1, groups=8)
    decoder = Decoder(spec).eval()
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        decode(decoder, torch.zeros(1, 16, 10, 12), torch.empty(1, 80, 96, 3))
    wider = sum(2 * 9 * width**2 * rows * 2 for width, rows in ((64, 20), (32, 40), (32, 80)))
    assert operations(decoder_work(spec, 80, 96, taps=9)) + wider == counter.get_total_flops()
    folded = sum(2 * 5 * width**2 * rows * rows * 6 / 5 for width, rows in ((64, 20), (32, 40), (32, 80)))
    assert operations(decoder_work(spec, 80, 96)) + folded == operations(decoder_work(spec, 80, 96, taps=9))


def test_weights_are_counted_as_they_are() -> None:
    with torch.device("meta"):
        transformer, modulation = Transformer(SPEC.flux), Modulation(SPEC.flux)

    def values(*modules: nn.Module) -> int:
        linears = (part for module in modules for part in module.modules() if isinstance(part, nn.Linear))
        return sum(linear.weight.numel() for linear in linears)

    blocks = values(transformer.double_blocks, transformer.single_blocks)
    assert block_weights(SPEC.flux) == blocks
    assert moved(step_work(SPEC.flux, 512, 512, EXACT), DECODING) == blocks * (0.5625 + 2)
    assert moved(step_work(SPEC.flux, 512, 512, Int8()), DECODING) == blocks * (0.5625 + 1)
    large = values(*T5(SPEC.t5).groups, *(modulation.double_blocks, modulation.single_blocks, modulation.final_layer))
    read = sum(one.moved for one in prompt_work(SPEC) if not one.operations)
    assert read == pytest.approx(large * (0.5625 + 2))
    assert values(*Clip(SPEC.clip).groups) * 77 * 2 < operations(prompt_work(SPEC))


def test_a_precision_moves_what_its_operands_take() -> None:
    def rows(precision: Precision) -> float:
        return moved(step_work(SMALL, 64, 64, precision), ROWS) / 272 / SMALL.hidden / 7  # streams with an adaLN

    # a double block's stream: two norms, rotary embedding, and in 8 bits two roundings; a single block's has one norm
    doubles, singles, mlp = 2, 3, SMALL.mlp_ratio
    for precision, norm, rounded in ((EXACT, 8, 0), (Int8(), 7, 3 * (1 + mlp)), (Fp8(), 7, 3 * (1 + mlp))):
        expected = doubles * (2 * norm + 8 + rounded) + singles * (norm + 8 + rounded)
        assert rows(precision) * 7 == pytest.approx(expected)
    packed = doubles * (2 * 7 + 9 + 3 * (1 + mlp)) + singles * (7 + 9 + 3 * (1 + mlp))
    assert rows(Fp8(fp8_attention=True)) * 7 == pytest.approx(packed)


# times


@pytest.mark.parametrize(("mode", "precision"), [("fast", "fp8"), ("exact", "exact")])
@pytest.mark.parametrize("side", SIDES)
def test_the_prediction_gives_what_was_measured_on_hopper(mode: str, precision: str, side: int) -> None:
    report = json.loads((ROOT / "docs/reports/speed/report.json").read_text())
    row = next(r for r in report["rows"] if (r["contender"], int(r["height"])) == (f"Vortex {mode}", side))
    measured = next(p["seconds"] for p in row["picture"]["percentiles"] if p["q"] == 50)
    found = card(report["machine"]["device"], precision, side)
    assert found.picture.seconds == pytest.approx(measured, rel=0.06)
    assert found.picture.floor < measured


@pytest.mark.parametrize(("precision", "floors"), [("exact", (2.8, 10.9)), ("int8", (0.83, 4.3))])
def test_the_floors_of_products_and_attention_on_an_rtx_3060(precision: str, floors: tuple[float, float]) -> None:
    for side, floor in zip(SIDES, floors, strict=True):
        parts = card("RTX 3060", precision, side).parts
        assert parts[PRODUCTS].floor + parts[ATTENTION].floor == pytest.approx(floor, rel=0.02)


def test_a_p99_below_12_seconds_is_predicted_for_an_rtx_3060_with_a_margin() -> None:
    for precision, margin in (("int8", 4.5), ("exact", 2.5)):
        found = card("RTX 3060", precision, 512)
        assert found.picture.seconds * 1.03 * margin < 12
    assert found.picture.seconds == sum(found.parts[part].seconds for part in PICTURE)
    assert found.step * 4 + found.parts["VAE"].seconds == pytest.approx(found.picture.seconds)


def test_copies_in_8_bits_need_no_decoding() -> None:
    for precision in ("int8", "exact"):
        none, half, all_ = (card("RTX 3060", precision, 512, copied=share).parts for share in (0.0, 0.5, 1.0))
        assert none[DECODING].seconds > 0
        left = (0.5, 0.0) if precision == "int8" else (1.0, 1.0)
        assert half[DECODING].seconds == pytest.approx(left[0] * none[DECODING].seconds)
        assert all_[DECODING].seconds == pytest.approx(left[1] * none[DECODING].seconds)
        assert half[PRODUCTS] == none[PRODUCTS]


def test_a_time_is_the_longer_of_two() -> None:
    slow, rates = cards.get("RTX 3060"), {"bf16": 1e12}
    made = replace(slow, rates=rates, memory=1e9)
    assert Work("x", "exact", 2e12, 1e9).seconds(made, floor=True) == 2
    assert Work("x", "exact", 1e12, 3e9).seconds(made, floor=True) == 3
    assert Work("x", "exact", 2e12, 0).seconds(made, floor=False) == pytest.approx(2 / 0.71)


# cards


@pytest.mark.parametrize(
    ("name", "bf16", "int8", "memory"),
    [
        ("RTX 3060", 25.5e12, 102e12, 360e9),
        ("RTX 4070", 58.3e12, 233e12, 504e9),
        ("RTX 4090", 165.2e12, 660.6e12, 1008e9),
        ("RTX 5090", 209.5e12, 838e12, 1792e9),
    ],
)
def test_rates_are_the_vendors(name: str, bf16: float, int8: float, memory: float) -> None:
    found = cards.get(name)
    assert found.rates["bf16"] == pytest.approx(bf16, rel=2e-3)
    assert found.rates["int8"] == pytest.approx(int8, rel=2e-3)
    assert found.memory == memory
    assert ("fp8" in found.rates) == (name != "RTX 3060")


def test_cards_are_found_by_any_of_their_names() -> None:
    known = cards.get("RTX 3060")
    for name in ("NVIDIA GeForce RTX 3060", "rtx 3060", "GeForce RTX 3060"):
        assert cards.find(name) is known
    assert cards.find("NVIDIA GeForce RTX 3060", 12.6e9) is known
    assert cards.find("NVIDIA GeForce RTX 3060", 8.4e9) is None  # another card of that name, with slower memory
    assert cards.find("NVIDIA GeForce RTX 3060 Laptop GPU") is None
    ti = [cards.find("RTX 4060 Ti", vram) for vram in (8.3e9, 17e9)]
    assert [round(found.vram / 2**30) for found in ti if found] == [8, 16]
    assert cards.find("NVIDIA H100 80GB HBM3") is cards.get("H100")
    with pytest.raises(VortexInputError, match=r"'GTX 970' are not known\. Known are: RTX 3060, .*RTX 4070, .*H200\."):
        cards.get("GTX 970")


def test_fast_comes_first() -> None:
    found = {name: cards.get(name).precisions for name in ("RTX 3060", "RTX 4070", "H200", "RTX 5090")}
    assert found["RTX 3060"] == ("int8", "exact")
    assert found["RTX 4070"] == found["RTX 5090"] == ("int8", "fp8", "exact")
    assert found["H200"] == ("fp8", "int8", "exact")


# the command


def test_plan_predicts_for_a_card() -> None:
    figures = json.loads(runner.invoke(app, ["plan", "--card", "RTX 3060", "--size", "512x512", "--json"]).stdout)
    int8, exact = figures["predictions"]
    assert (int8["precision"], exact["precision"]) == ("int8", "exact")
    assert not int8["measured"]
    assert int8["times"]["picture"] == card("RTX 3060", "int8", 512).picture._asdict()
    assert PROMPT in int8["times"]
    said = " ".join(runner.invoke(app, ["plan", "--card", "RTX 3060", "--size", "512x512"]).stdout.split())
    assert "RTX 3060, PREDICTED, not measured: 4 steps" in said
    assert "in all 2.52 s 4.64 s at least, at the card's full rates 1.14 s 3.15 s" in said


def test_the_docs_have_what_the_command_says() -> None:
    page = (ROOT / "docs/performance.md").read_text()
    for name in ("RTX 3060", "RTX 4070"):
        for side in SIDES:
            said = runner.invoke(app, ["plan", "--card", name, "--size", f"{side}x{side}", "--json"]).stdout
            for found in json.loads(said)["predictions"]:
                if found["precision"] != "fp8":
                    row = next(
                        line for line in page.splitlines() if f"| {name} | {side} | `{found['precision']}`" in line
                    )
                    picture = found["times"]["picture"]
                    assert f"| **{picture['seconds']:.2f}** | {picture['floor']:.2f} |" in row


def test_the_docs_tell_the_shares_and_what_follows() -> None:
    page = " ".join((ROOT / "docs/performance.md").read_text().split())
    share = {name: f"{found:.2f}" for name, (_, found) in SHARES.items()}
    assert (
        f"products {share['exact']} (16 bits) and {share['int8']} (int8), attention {share['attention']}, "
        f"the VAE {share['VAE']}, memory {MEMORY:.2f}." in page
    )
    found = card("RTX 3060", "int8", 512)
    assert f"predicted to take about {found.picture.seconds:.1f} s in int8" in page
    assert f"A new prompt adds {found.parts[PROMPT].seconds:.2f} s of work on that card" in page


def test_copies_of_weights_hide_behind_a_predicted_step() -> None:
    def added(*more: str) -> float:
        arguments = ["plan", "--vram", "4.5", "--size", "1024x1024", "--json", *more]
        return json.loads(runner.invoke(app, arguments).stdout)["picture_ms"]

    assert added("--card", "RTX 3060") == 0 < added()
    assert added("--card", "RTX 3060", "--step-ms", "0.001") > 0


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--card", "RTX 9999"], "The figures of 'RTX 9999' are not known"),
        (["--card", "RTX 3070", "--vram", "11"], "--vram is 11 GB, but the RTX 3070 has 8.6 GB"),
    ],
)
def test_a_card_that_does_not_fit_is_refused(arguments: list[str], sentence: str) -> None:
    result = runner.invoke(app, ["plan", *arguments])
    assert result.exit_code == 2
    assert sentence in " ".join(result.output.split())
