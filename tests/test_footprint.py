"""What a call allocates, told by `meta` tensors: the same as real ones take."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Conv2d
from transformers import T5Config, T5EncoderModel

from vortex_core import Engine, sampling
from vortex_core.allocator import MIB, serves
from vortex_core.conditioning import Conditioning
from vortex_core.footprint import META, footprint, trace
from vortex_core.kernels import shapes
from vortex_core.model import Model
from vortex_core.planner import Plan
from vortex_core.plans import graph_bytes, plan_bytes
from vortex_core.request import Request
from vortex_core.spec import CLIP_L, T5_TOKENS, T5_XXL, FluxSpec, VaeSpec
from vortex_core.text import T5
from vortex_core.transformer import Transformer
from vortex_core.vae import Decoder, decode

KINDS = {"exact": (False, False), "fast": (True, False), "fp8 attention": (True, True)}


def ones(mib: int, device: torch.device = META) -> Tensor:
    return torch.ones(mib * MIB // 4, device=device)


def test_what_lives_together_adds_up_and_what_is_gone_makes_room() -> None:
    def chain() -> Tensor:
        x = ones(10) + 1  # 20: the sum and its source
        x = x * 2  # the source is gone, so 20 again
        return x.view(-1, 2).sum(1)  # a view takes nothing; 15

    assert footprint(chain) == 20 * MIB
    given = ones(100)
    assert footprint(lambda: given.mul_(2)) == 0  # in place, on what was there before
    assert footprint(lambda: given + 1) == 100 * MIB


def test_kernels_own_memory_is_counted_where_it_matters() -> None:
    with META:
        conv = Conv2d(4, 4, 3, padding=1, dtype=torch.bfloat16).requires_grad_(False)
        x = torch.empty(1, 4, 1024, 1024, dtype=torch.bfloat16)  # 8 MiB
        q = torch.empty(1, 24, 4096, 128, dtype=torch.bfloat16)  # 24 MiB
        wide = torch.empty(1, 1, 4096, 512, dtype=torch.bfloat16)  # 4 MiB, 8 in fp32
    assert footprint(lambda: conv(x)) // MIB == 8 + 16 + 2  # the output, and both sides in another layout
    assert footprint(lambda: F.scaled_dot_product_attention(q, q, q)) // MIB == 24 + 4  # small statistics beside it
    assert footprint(lambda: F.scaled_dot_product_attention(wide, wide, wide)) // MIB == 4 + 8


@pytest.mark.parametrize("batch", [1, 2])
def test_meta_tensors_take_what_real_ones_take(engine: Engine, batch: int) -> None:
    spec: FluxSpec = engine._spec

    def steps(device: torch.device) -> int:
        with device:
            transformer = Transformer(spec).requires_grad_(False)

        def draw() -> None:
            with device:
                img, txt = torch.zeros(batch, 1024, spec.in_channels), torch.zeros(1, 256, spec.hidden)
                table = torch.zeros(2, spec.modulation_rows, spec.hidden)
                cos, sin = torch.zeros(2, 1280, spec.head_dim // 2)
            sampling.denoise(transformer, img, txt, table, (cos, sin))

        return footprint(draw)

    assert steps(META) == steps(torch.device("cpu")) > 20 * MIB


def test_kernels_take_as_much_where_channels_are_last() -> None:
    with META:
        conv = Conv2d(4, 4, 3, padding=1, dtype=torch.bfloat16).requires_grad_(False)
        x = torch.empty(1, 4, 1024, 1024, dtype=torch.bfloat16)  # 8 MiB
    conv.weight.data = conv.weight.data.contiguous(memory_format=torch.channels_last)
    assert footprint(lambda: conv(x)) // MIB == 8 + 16 + 2


def test_a_step_of_fused_kernels_takes_its_buffers_and_attention() -> None:
    parts = (FluxSpec(), VaeSpec(), CLIP_L, T5_XXL)
    exact, plain, fast = (
        Model(*parts, torch.bfloat16, quantized=True, fused=True, fast=fast, fp8_attention=fp8_attention)
        for fast, fp8_attention in KINDS.values()
    )
    for model in (exact, plain, fast):
        size = (2, T5_TOKENS, 4096)
        buffers = plan_bytes(model.flux, size, torch.bfloat16, fast=model.fast)
        attention = graph_bytes(model.flux, size, torch.bfloat16, fp8_attention=model.fp8_attention)
        demand = model.demand(1024, 1024, 2)
        assert dict(demand.graphs)[2] == attention
        assert (attention == 0) == model.fp8_attention  # then it is in the buffers
        others = dict(demand.steps)[2] - buffers - attention
        assert 16 * MIB < others < 32 * MIB  # modulation of all steps is 16 MiB; text, latents, velocity, positions
    assert sum(fast.demand(64, 64, 1).fixed) > sum(exact.demand(64, 64, 1).fixed)


CALLS = [  # height, width, pictures, whether each step is previewed
    (512, 512, 8, False),
    (768, 768, 4, True),
    (1024, 1024, 1, True),
    (1024, 1024, 4, False),
    (832, 1216, 8, False),
    (720, 1280, 2, True),
    (2048, 2048, 2, False),
]


@pytest.mark.parametrize(("height", "width", "batch", "watched"), CALLS)
@pytest.mark.parametrize(("fast", "fp8_attention"), KINDS.values(), ids=KINDS)
def test_a_whole_call_fits_the_block_that_is_planned_for_its_stages(
    monkeypatch: pytest.MonkeyPatch,
    height: int,
    width: int,
    batch: int,
    watched: bool,
    fast: bool,
    fp8_attention: bool,
) -> None:
    """What one stage leaves behind must not lie in the way of the next."""
    parts = (FluxSpec(), VaeSpec(), CLIP_L, T5_XXL)
    model = Model(*parts, torch.bfloat16, quantized=True, fused=True, fast=fast, fp8_attention=fp8_attention)
    demand = model.demand(height, width, batch)
    flux = model.flux
    with META:
        decoder = Decoder(model.vae).to(torch.bfloat16).requires_grad_(False)
        text = torch.nn.Linear(flux.context, flux.hidden, dtype=torch.bfloat16).requires_grad_(False)
        pictures = torch.empty(batch, height, width, 3)
    decoder.channels_last()
    decoder.use(shapes)
    sampling.rope_of(height, width, T5_TOKENS, flux, META)  # kept in host memory
    conditioning = Conditioning(
        torch.empty(1, T5_TOKENS, flux.context, dtype=torch.bfloat16),
        torch.empty(4, flux.modulation_rows, flux.hidden, dtype=torch.bfloat16),
    )
    noise = (batch, flux.latent_channels, height // 8, width // 8)
    monkeypatch.setattr(sampling, "noise", lambda *arguments: torch.empty(noise, device=META))

    @contextmanager
    def opened(size: tuple[int, int, int], stager: object) -> Iterator[Callable[..., Tensor]]:
        held = [torch.empty(plan_bytes(flux, size, torch.bfloat16, fast=fast), dtype=torch.uint8, device=META)]
        allocates = model._attention(size)

        def velocity(img: Tensor, *others: Tensor) -> Tensor:
            allocates(img, *others)
            return held[0].view(img.dtype)[: img.numel()].view(img.shape)

        yield velocity
        held.clear()

    on_step = (lambda i, n, clean: None) if watched else None
    for number, _ in demand.steps:
        made = Plan(model.pieces, demand, frozenset(), number)
        room = SimpleNamespace(
            placement=SimpleNamespace(
                steps=SimpleNamespace(open=nullcontext), workspace=SimpleNamespace(outside=nullcontext)
            ),
            plans=SimpleNamespace(open=opened),
        )
        engine: Any = SimpleNamespace(
            _room=room, _transformer=SimpleNamespace(txt_in=text), device=META, dtype=torch.bfloat16, _spec=flux
        )

        def draw(number: int = number, engine: Any = engine) -> None:
            latents = Engine._denoise(
                engine, conditioning, Request(0, height, width, 4, batch), on_step, number, pictures
            )
            decode(decoder, latents, pictures, demand.rows)

        assert serves(made.workspace, trace(draw))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_t5_takes_no_more_than_is_told(attention: str) -> None:
    config = T5Config.from_dict({**T5_XXL, "num_layers": 2}, attn_implementation=attention)
    with META:
        model = T5EncoderModel(config).bfloat16().eval().requires_grad_(False).encoder
        embedded = torch.empty(1, T5_TOKENS, T5_XXL["d_model"], dtype=torch.bfloat16)
    measured = footprint(lambda: model(inputs_embeds=embedded).last_hidden_state)
    assert 0.3 < measured / T5({**T5_XXL, "num_layers": 1}).working_bytes < 0.9
