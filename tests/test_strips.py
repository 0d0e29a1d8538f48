"""Decoding in strips of any height draws what decoding whole draws, in memory whose size is known before."""

import pytest
import torch
from engine_parts import painter_of
from hypothesis import given
from hypothesis import strategies as st
from kernel_parts import ChannelsLast
from whole_vae import whole_decode

from vortex_core import Engine, load_flux_schnell
from vortex_core.flux1.decoder_memory import DecoderLayout, Span
from vortex_core.flux1.spec import VaeSpec
from vortex_core.flux1.vae import Decoder, decode, library_bytes
from vortex_core.kernels import Kernels, Moments, choose_kernels, compiled, reference
from vortex_core.memory.arena import aligned

SMALL = VaeSpec(channels=(24, 36, 36, 48), layers=1, groups=12)
POISON = 0xFF  # NaN in every type


def random_decoder(spec: VaeSpec = SMALL) -> Decoder:
    torch.manual_seed(0)
    decoder = Decoder(spec).requires_grad_(False)
    for parameter in decoder.parameters():
        if parameter.ndim == 1:
            parameter.add_(torch.randn(parameter.shape), alpha=0.1)
    decoder.channels_last()
    return decoder


def in_strips(
    decoder: Decoder, latents: torch.Tensor, rows: int | None, memory: torch.Tensor | None = None
) -> torch.Tensor:
    batch, _, height, width = latents.shape
    out = torch.full((batch, height * 8, width * 8, 3), torch.nan, device=latents.device)
    return decode(decoder, latents, out, rows, memory)


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("size", [(9, 11), (10, 6), (1, 1)])
@pytest.mark.parametrize("rows", [1, 2, 3, 8, 16, 200, None])
def test_strips_are_the_whole(rows: int | None, size: tuple[int, int]) -> None:
    """In memory that is full of NaN, and then of what the decode before has left."""
    decoder, latents = random_decoder(), noise(2, 16, *size)
    memory = torch.full((DecoderLayout(SMALL, *size, rows, torch.float32).nbytes,), POISON, dtype=torch.uint8)
    with torch.inference_mode():
        found = in_strips(decoder, latents, rows, memory)
        assert (whole_decode(decoder, latents) - found).abs().max() < 1e-4  # nothing but the order of sums
        assert torch.equal(found, in_strips(decoder, latents, rows, memory))
        assert torch.equal(found, in_strips(decoder, latents, rows))


@pytest.mark.parametrize("rows", [3, None])
def test_strips_of_the_miniature_are_the_whole(engine: Engine, rows: int | None) -> None:
    latents = noise(2, 16, 10, 6)
    with torch.inference_mode():
        distance = (
            (
                whole_decode(painter_of(engine).model.decoder, latents)
                - in_strips(painter_of(engine).model.decoder, latents, rows)
            )
            .abs()
            .max()
        )
    assert distance < 1e-4


def test_strips_at_flux_widths_are_the_whole() -> None:
    decoder, latents = random_decoder(VaeSpec()), noise(1, 16, 8, 12)
    with torch.inference_mode():
        whole = whole_decode(decoder, latents)
        assert (whole - in_strips(decoder, latents, 12)).abs().max() < 1e-4
        decoder.bfloat16()
        distance = (in_strips(decoder, latents, None) - in_strips(decoder, latents, 12)).abs() * 255
        rounding = (in_strips(decoder, latents, 12) - whole).abs() * 255
    print(f"\nbf16, /255: strips against whole mean {distance.mean():.3f}, max {distance.max():.3f}; ", end="")
    print(f"bf16 against fp32 mean {rounding.mean():.3f}, max {rounding.max():.3f}", end="")
    assert distance.mean() < 1
    assert distance.max() < 4
    assert rounding.mean() < 1


def test_latents_may_have_any_strides_and_memory_may_be_a_part() -> None:
    decoder, latents = random_decoder(), noise(2, 5, 16, 4).transpose(1, 2)
    layout = DecoderLayout(SMALL, 5, 4, 16, torch.float32)
    memory = torch.full((layout.nbytes + 512,), POISON, dtype=torch.uint8)
    with torch.inference_mode():
        found = in_strips(decoder, latents, 16, memory[256:-256])
        assert torch.equal(found, in_strips(decoder, latents.contiguous(), 16))
    assert (memory[:256] == POISON).all()
    assert (memory[-256:] == POISON).all()


def test_too_little_memory_is_refused() -> None:
    nbytes = DecoderLayout(SMALL, 5, 4, 16, torch.float32).nbytes
    with pytest.raises(ValueError, match=f"takes {nbytes} bytes of memory; these are {nbytes - 1}"):
        in_strips(random_decoder(), noise(1, 16, 5, 4), 16, torch.empty(nbytes - 1, dtype=torch.uint8))


@pytest.mark.parametrize("rows", [3, 8, 12, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_kernel_sees_its_channels_last(rows: int | None, dtype: torch.dtype) -> None:
    """And aligned: kernels would be compiled anew for each other alignment, and the copy engine takes none."""
    decoder = random_decoder(VaeSpec(channels=(16, 32, 32, 64), layers=1, groups=8)).to(dtype)
    latents = noise(1, 16, 7, 5)
    with torch.inference_mode():
        expected = in_strips(decoder, latents, rows)
        decoder.use(ChannelsLast())
        assert torch.equal(expected, in_strips(decoder, latents, rows))


def test_a_decoder_on_meta_may_be_told_its_layout() -> None:
    with torch.device("meta"):
        decoder = Decoder(VaeSpec())
    decoder.channels_last()
    assert decoder.conv_out.weight.is_contiguous(memory_format=torch.channels_last)


def test_moments_have_room_for_every_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where plain torch takes them row by row."""
    monkeypatch.setattr("vortex_core.kernels.scaled_tensor.CHUNK", 100)
    most, take = [], Moments.take
    monkeypatch.setattr(Moments, "take", lambda moments, count: most.append(moments.parts) or take(moments, count))
    with torch.inference_mode():
        in_strips(random_decoder(), noise(1, 16, 9, 3), 8)
    assert max(most) + 1 == 72  # rows


class Memory:
    """Which bytes hold what is still to be read."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes, self.alive = nbytes, {}

    def write(self, name: str, span: Span) -> None:
        """Raises where something lies that is not to be written over."""
        begin, end = span
        assert 0 <= begin < end <= self.nbytes
        for other, (first, last) in self.alive.items():
            assert other == name or last <= begin or end <= first, f"{name} at {span} over {other} at {first, last}"
        self.alive[name] = span

    def done(self, *names: str) -> None:
        for name in names:
            del self.alive[name]


SIDES = st.integers(1, 40)
WIDTHS = st.lists(st.sampled_from([3, 4, 8, 16, 24]), min_size=4, max_size=4).map(tuple)


@given(SIDES, SIDES, st.one_of(st.none(), st.integers(1, 80)), WIDTHS, st.sampled_from([torch.float32, torch.bfloat16]))
def test_nothing_is_written_over_that_is_still_read(
    height: int, width: int, rows: int | None, channels: tuple[int, ...], dtype: torch.dtype
) -> None:
    layout = DecoderLayout(VaeSpec(channels=channels, groups=1), height, width, rows, dtype)
    memory, size = Memory(layout.maps_bytes), dtype.itemsize
    lowest, last = layout.levels[0], len(layout.levels) - 1
    one = height * width * channels[-1] * size
    memory.write("x", (lowest.residual(0)[0], lowest.residual(len(lowest.heights) - 1)[1]))
    assert memory.alive["x"][1] - memory.alive["x"][0] == one  # all strips, without gaps: the mid block takes them so
    memory.write("h", (lowest.other(0)[0], lowest.other(0)[0] + one))
    memory.done("h")
    for i in range(4):
        begin = layout.attention + i * aligned(one)
        memory.write(f"matrix {i}", (begin, begin + one))
    memory.alive.clear()
    for i in range(len(lowest.heights)):
        memory.write(f"0 a {i}", lowest.arrival(i))
    for k, level in enumerate(layout.levels):
        strips = range(len(level.heights))
        assert sum(level.heights) == height << k
        assert rows is None or max(level.heights) <= max(rows + 1, 2**k)  # an odd strip is cut into uneven ones
        for i, rows_here in enumerate(level.heights):
            spans = (level.arrival(i), level.arriving), (level.residual(i), channels[3 - k])
            spans += ((level.other(i), channels[3 - k]),)
            for (begin, end), wide in spans:
                assert end - begin == rows_here * level.width * wide * size
                assert begin % size == 0
        for i in strips:  # the first block's shortcut and first convolution
            if not level.widens:
                memory.done(f"{k} a {i}")
            memory.write(f"{k} x {i}", level.residual(i))
            if level.widens:
                memory.done(f"{k} a {i}")
            memory.write(f"{k} h {i}", level.other(i))
        memory.done(*(f"{k} h {i}" for i in strips))
        if k == last:
            for i in strips:  # the picture
                memory.write(f"{k} c {i}", level.other(i))
            break
        above = layout.levels[k + 1]
        assert sorted(above.sources) == list(above.sources)
        for i in strips:
            memory.done(f"{k} x {i}")  # with its neighbours' rows it is in a buffer
            for j, source in enumerate(above.sources):
                if source == i:
                    memory.write(f"{k + 1} a {j}", above.arrival(j))
        assert {f"{k + 1} a {j}" for j in range(len(above.heights))} == set(memory.alive)


@pytest.mark.parametrize(
    ("side", "rows", "megabytes"), [(512, None, 348), (1024, 128, 656), (1024, 64, 605), (2048, 64, 2373)]
)
def test_what_a_decode_takes(side: int, rows: int | None, megabytes: int) -> None:
    """One map of 1024 x 1024 pixels and 256 channels has 537 MB."""
    nbytes = DecoderLayout(VaeSpec(), side // 8, side // 8, rows, torch.bfloat16).nbytes
    assert megabytes - 5 < nbytes / 1e6 <= megabytes


@pytest.mark.parametrize("kernels", [None, reference, compiled])
def test_what_libraries_take_is_small(kernels: Kernels | None) -> None:
    most = [library_bytes(VaeSpec(), side // 8, side // 8, torch.bfloat16, kernels) for side in (64, 1024, 2048)]
    assert most == sorted(most)
    assert most[1] < 55e6
    assert most[2] < 210e6


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [64, None])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kernels", [None, reference, compiled])
def test_a_decode_allocates_no_more_than_it_says(rows: int | None, dtype: torch.dtype, kernels: Kernels | None) -> None:
    device = torch.device("cuda")
    kernels = kernels or choose_kernels(device)
    decoder, latents = random_decoder(VaeSpec()).to(device, dtype), noise(1, 16, 64, 48).to(device)
    decoder.channels_last()
    decoder.use(kernels)
    out = torch.empty(1, 512, 384, 3, device=device)
    memory = torch.empty(DecoderLayout(VaeSpec(), 64, 48, rows, dtype).nbytes, dtype=torch.uint8, device=device)
    limit = library_bytes(VaeSpec(), 64, 48, dtype, kernels)
    with torch.inference_mode():
        decode(decoder, latents, out, rows, memory)  # libraries take their workspaces
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        decode(decoder, latents, out, rows, memory)
        taken = torch.cuda.max_memory_allocated() - before
    print(f"\n{taken / 1e6:.1f} of {limit / 1e6:.1f} MB", end="")
    assert taken <= limit


@pytest.mark.gpu
def test_an_engine_on_a_gpu_decodes_with_the_fused_kernels() -> None:
    latents = noise(2, 16, 16, 16)
    with load_flux_schnell("tiny", device="cuda") as engine, torch.inference_mode():
        assert painter_of(engine).model.decoder.norm_out.kernels is not reference
        whole = whole_decode(painter_of(engine).model.decoder, latents.to(engine.device, engine.dtype))
        off = (engine.decode(latents) - whole.float()).abs() * 255
    print(f"\nfused kernels against torch's: mean {off.mean():.3f}, max {off.max():.3f} of 255", end="")
    assert off.mean() < 1
    assert off.max() < 4


def test_independent_tiles_would_not_pass(engine: Engine) -> None:
    latents = noise(1, 16, 16, 8)
    with torch.inference_mode():
        whole = whole_decode(painter_of(engine).model.decoder, latents)
        tiles = torch.cat(
            [whole_decode(painter_of(engine).model.decoder, tile) for tile in latents.chunk(2, dim=2)], dim=1
        )
    assert (whole - tiles).abs().mean() * 255 > 1


def test_strips_take_less_memory() -> None:
    for latents in (64, 128):
        whole, tall, low = (
            DecoderLayout(VaeSpec(), latents, latents, rows, torch.bfloat16).nbytes for rows in (None, 64, 32)
        )
        assert low < tall < whole / 2
