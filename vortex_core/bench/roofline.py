"""What a picture takes on a card that is not at hand: a prediction, from a model's sizes and a card's published rates.

Each piece of work takes the longer of two times: its operations at the card's rate, or its bytes at the speed of its
memory. At full rates that is a floor: nothing is faster. The prediction takes the shares of those rates that were
reached where these kernels were measured, on Hopper; on other cards they are an assumption. Left out are launches (a
step is one graph), weights that stream (`vortex plan` has them), and what heat takes from a card's clock.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..flux1.sampling import image_tokens
from ..flux1.spec import CLIP_TOKENS, DEFAULT_STEPS, T5_TOKENS, FluxSpec, ModelSpec, VaeSpec
from ..nf4 import BLOCK
from ..quant.precision import EXACT, Fp8, Int8, Precision
from .cards import HOPPER, Card

PRODUCTS, ATTENTION, DECODING, ROWS, VAE = "products", "attention", "decoding NF4", "row kernels", "VAE"
PROMPT = "a new prompt"  # comes on top of a picture
PICTURE = (PRODUCTS, ATTENTION, DECODING, ROWS, VAE)  # what a picture is made of
BF16, NF4 = 2.0, 0.5 + 4 / BLOCK  # bytes a value
# For each kind of work: the rate of the card that bounds it, and the share of that rate that was reached: the lower end
# of what was measured. Together they give the H200's pictures within 6 % (tests/test_roofline.py).
SHARES = {
    "exact": ("bf16", 0.71),  # products: 700 to 800 of 989 T (H100, decision 2026-11-24, a step as a fixed sequence)
    "fp8": ("fp8", 0.63),  # products: 1,240 to 1,400 of 1,979 T (the same)
    "int8": ("int8", 0.40),  # products: 790 to 1,100 of 1,979 T in Triton, with the launch in it (H200, 2026-11-29)
    "attention": ("bf16", 0.53),  # 38.6 and 374 us at 1280 and 4352 tokens: 521 and 622 of 989 T (H100, 2026-11-24)
    "fp8 attention": ("fp8", 0.33),  # 30.9 and 292 us: 651 and 797 of 1,979 T (the same)
    "VAE": ("bf16", 0.35),  # 2.1 and 8.9 T in 5.8 and 25.9 ms: 368 and 345 of 989 T (H200, docs/performance.md)
}
MEMORY = 0.72  # of its speed: decoding NF4 moved 2.4 to 2.9 of 3.35 TB/s (H100, a step as a fixed sequence)


class Work(NamedTuple):
    """Work for a `part`: `operations` of a `kind`, a key of `SHARES`, and bytes `moved` from and to device memory."""

    part: str
    kind: str
    operations: float
    moved: float

    def seconds(self, card: Card, *, floor: bool) -> float:
        """What it takes on `card`; `floor`: at full rates."""
        rate, share = SHARES[self.kind]
        memory = MEMORY
        if floor:
            share = memory = 1.0
        return max(self.operations / (card.rates[rate] * share), self.moved / (card.memory * memory))


class Times(NamedTuple):
    """Seconds: predicted, and at least."""

    seconds: float
    floor: float


@dataclass(frozen=True, slots=True)
class Prediction:
    """Times of one call of `steps` steps, by part; and of a new prompt."""

    card: Card
    precision: str
    parts: dict[str, Times]
    steps: int

    @property
    def picture(self) -> Times:
        """A picture whose prompt is cached."""
        return _sum(self.parts[part] for part in PICTURE)

    @property
    def step(self) -> float:
        """Predicted seconds of one step."""
        return (self.picture.seconds - self.parts[VAE].seconds) / self.steps

    def figures(self) -> dict[str, Any]:
        """Everything, for JSON."""
        times = {part: found._asdict() for part, found in (*self.parts.items(), ("picture", self.picture))}
        return {"measured": False, "card": self.card.name, "precision": self.precision, "times": times}


def predict(
    card: Card,
    spec: ModelSpec,
    height: int,
    width: int,
    precision: str,
    *,
    steps: int = DEFAULT_STEPS,
    pictures: int = 1,
    copied: float = 0.0,
) -> Prediction:
    """The times of `pictures` at once on `card`, in one of `card.precisions`.

    `copied`: the share of the blocks that stay decoded to 8 bits, so that a step in 8 bits need not decode them.
    """
    kinds: dict[str, Precision] = {"exact": EXACT, "int8": Int8(), "fp8": Fp8(card.capability == HOPPER)}
    how = kinds[precision]
    step = step_work(spec.flux, height, width, how, pictures)
    work = [(steps * (1 - copied * (how.scaled and one.part == DECODING)), one) for one in step]
    work += [(pictures, one) for one in decoder_work(spec.vae, height, width)] + [(1, one) for one in prompt_work(spec)]

    def times(part: str) -> Times:
        mine = [(count, one) for count, one in work if one.part == part]
        return Times(*(sum(count * one.seconds(card, floor=floor) for count, one in mine) for floor in (False, True)))

    return Prediction(card, precision, {part: times(part) for part in (*PICTURE, PROMPT)}, steps)


def block_weights(spec: FluxSpec) -> int:
    """Values in the weights of all blocks."""
    one = 4 * spec.hidden**2 + 2 * spec.hidden * spec.mlp  # of one stream of a double block, and of a single block
    return one * (2 * spec.double_blocks + spec.single_blocks)


def step_work(
    spec: FluxSpec, height: int, width: int, precision: Precision = EXACT, pictures: int = 1
) -> Iterator[Work]:
    """The work of one step: that of flux1/transformer.py."""
    hidden, mlp, each = spec.hidden, spec.mlp, _bytes(precision)
    img, txt = pictures * image_tokens(height, width), pictures * T5_TOKENS
    for tokens in (img, txt):
        for k, n in ((hidden, 3 * hidden), (hidden, hidden), (hidden, mlp), (mlp, hidden)):
            yield from _product(PRODUCTS, tokens, k, n, precision, spec.double_blocks)
        yield _rows(spec, tokens, precision, spec.double_blocks, norms=2)
    tokens = img + txt
    for k, n in ((hidden, 3 * hidden + mlp), (hidden + mlp, hidden)):
        yield from _product(PRODUCTS, tokens, k, n, precision, spec.single_blocks)
    yield _rows(spec, tokens, precision, spec.single_blocks, norms=1)
    blocks = spec.double_blocks + spec.single_blocks
    kind, heads = ("fp8 attention", each) if precision.fp8_attention else ("attention", BF16)
    operations = 4.0 * pictures * (tokens // pictures) ** 2 * hidden  # two products of all queries with all keys
    yield Work(ATTENTION, kind, blocks * operations, blocks * tokens * hidden * (3 * heads + BF16))
    for k, n in ((spec.in_channels, hidden), (hidden, spec.in_channels)):
        yield from _product(PRODUCTS, img, k, n, EXACT, 1, packed=False)


def _bytes(precision: Precision) -> float:
    """Bytes of a value of an operand."""
    return float(precision.operand.itemsize) if precision.operand is not None else BF16


def _product(
    part: str, rows: int, k: int, n: int, precision: Precision, times: int, *, packed: bool = True
) -> Iterator[Work]:
    """`times` products of `[rows, K]` by a weight `[N, K]`, which is decoded first where it is `packed` in NF4."""
    each = _bytes(precision)
    yield Work(part, str(precision), times * 2.0 * rows * k * n, times * ((rows + n) * k * each + rows * n * BF16))
    if packed:
        yield Work(DECODING if part == PRODUCTS else part, "exact", 0, times * k * n * (NF4 + each))


def _rows(spec: FluxSpec, tokens: int, precision: Precision, times: int, *, norms: int) -> Work:
    """What the row kernels of one stream of `times` blocks move. `norms`: gated sums with the adaLN after them."""
    moved = norms * (3 * BF16 + _bytes(precision)) * spec.hidden  # two read; the sum and the next operand written
    # queries and keys are rotated in place; for attention in fp8 the values are packed, too
    moved += (3 * (BF16 + 1) if precision.fp8_attention else 4 * BF16) * spec.hidden
    if precision.scaled:  # attention's output and the MLP are rounded; in 16 bits the product applies the GELU
        moved += (BF16 + 1) * (spec.hidden + spec.mlp)
    return Work(ROWS, "exact", 0, times * tokens * moved)


def decoder_work(spec: VaeSpec, height: int, width: int, *, taps: int = 4) -> Iterator[Work]:
    """The work of decoding one picture: that of flux1/vae.py.

    `taps`: of a convolution of a doubled map; 9 where the map is doubled first, as other decoders do.
    """
    places, wide = height // 8 * (width // 8), spec.channels[-1]

    def convolution(inside: int, outside: int, taps: int = 9, *, normed: bool = True) -> Work:
        # a norm reads and writes the input, the convolution reads it and a skip, and writes
        moved = places * BF16 * ((3 if normed else 1) * inside + 2 * outside)
        return Work(VAE, VAE, 2.0 * taps * inside * outside * places, moved)

    yield convolution(spec.latent_channels, wide, normed=False)
    yield from (convolution(wide, wide) for _ in range(4))
    yield from (convolution(wide, wide, 1, normed=False) for _ in range(4))  # around the mid block's attention
    yield Work(VAE, VAE, 4.0 * places**2 * wide, 4 * BF16 * places * wide)
    arriving = wide
    for level, channels in enumerate(reversed(spec.channels)):
        for inside in (arriving, *[channels] * spec.layers):
            yield from (convolution(inside, channels), convolution(channels, channels))
            if inside != channels:
                yield convolution(inside, channels, 1, normed=False)
        if level + 1 < len(spec.channels):
            places *= 4
            yield convolution(channels, channels, taps, normed=False)
        arriving = channels
    yield convolution(arriving, 3)


def prompt_work(spec: ModelSpec) -> Iterator[Work]:
    """The work of a new prompt, in 16 bits: T5, CLIP, and the modulation of all steps."""
    t5, clip, flux = spec.t5, spec.clip, spec.flux
    width, inner, wide = t5.d_model, t5.d_kv * t5.num_heads, t5.d_ff
    for k, n in (*[(width, inner)] * 3, (inner, width), *[(width, wide)] * 2, (wide, width)):
        yield from _product(PROMPT, T5_TOKENS, k, n, EXACT, t5.num_layers)
    yield Work(PROMPT, "attention", 4.0 * T5_TOKENS**2 * inner * t5.num_layers, 0)
    width, wide = clip.hidden_size, clip.intermediate_size
    for k, n in (*[(width, width)] * 4, (width, wide), (wide, width)):
        yield from _product(PROMPT, CLIP_TOKENS, k, n, EXACT, clip.num_hidden_layers, packed=False)
    yield from _product(PROMPT, DEFAULT_STEPS, flux.hidden, flux.modulation_rows * flux.hidden, EXACT, 1)


def _sum(times: Iterable[Times]) -> Times:
    return Times(*map(sum, zip(*times, strict=True)))
