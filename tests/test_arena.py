"""The memory of an engine: one block laid out by offset, and sessions that find all in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from engine_parts import forget_prompts, painter_of
from memory_parts import CPU, asked, draw, narrow, streams
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from vortex_core import Engine
from vortex_core.flux1 import conditioning
from vortex_core.memory.arena import ALIGN, MIB, Region, block
from vortex_core.runtime import memory_manager
from vortex_core.runtime import painter as painter_module
from vortex_core.runtime.graphs import BoundStep

# The arena.


def test_a_region_gives_tensors_apart_and_says_where_it_ends() -> None:
    memory = block(3 * ALIGN + 8, CPU).zero_()
    assert (memory.dtype, memory.shape, block(0, CPU).nbytes) == (torch.uint8, (3 * ALIGN + 8,), 0)
    region = Region(memory, ALIGN)
    first = region.take((2, 3), torch.float32)
    assert region.used == 2 * ALIGN
    second = region.take((ALIGN // 2,), torch.bfloat16)
    last = region.take((8,), torch.uint8)
    for tensor, start in ((first, ALIGN), (second, 2 * ALIGN), (last, 3 * ALIGN)):
        assert tensor.is_contiguous()
        assert tensor.data_ptr() - memory.data_ptr() == start
    first.fill_(1), second.fill_(2), last.fill_(3)
    assert (first.sum(), second.sum(), last.sum()) == (6, ALIGN, 24)
    assert not memory[:ALIGN].any()
    with pytest.raises(ValueError, match=rf"too small: {4 * ALIGN + 1} of {3 * ALIGN + 8} bytes"):
        region.take((1,), torch.uint8)
    whole = Region(memory)
    assert whole.take((3 * ALIGN + 8,), torch.uint8).data_ptr() == memory.data_ptr()


# Sessions.


@pytest.mark.parametrize("tight", [False, True])
@torch.inference_mode()
def test_a_session_lays_everything_out_apart(roomy: Engine, monkeypatch: pytest.MonkeyPatch, tight: bool) -> None:
    if tight:
        narrow(roomy)
    held, took = painter_of(roomy).memory, list[Tensor]()
    take = Region.take

    def taken(region: Region, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        found = take(region, shape, dtype)
        if region.memory.untyped_storage().data_ptr() == held.arena.data_ptr():  # not host memory
            took.append(found)
        return found

    monkeypatch.setattr(Region, "take", taken)
    with held.session(asked(roomy)) as place:
        assert streams(roomy) == tight
        scratch = len(took)
        with place.prompt():
            prompt = took[scratch:]
            apart([*took[:scratch], *prompt], held.arena)
        assert bool(prompt) == tight  # which are staging's
        del took[scratch:]
        with place.steps(64, 96, 256, rounds=4):
            latents = place.latents((1, 16, 8, 12), (1, 24, 64))
            apart(took, held.arena)
            assert sum(tensor.nbytes for tensor in took) > 0.9 * (place.plan.arena - 2 * MIB)
        with pytest.raises(ValueError, match="too small"):
            place.latents((1, 16, 8, 12), (2, 24, 64), (1, 2**20))
        for tensor in latents:  # the decoder has all but them
            assert tensor.data_ptr() >= place.maps.data_ptr() + place.maps.nbytes
        assert place.maps.nbytes >= place.plan.requirements.decode
    assert place.plan.peak <= held.budget


def apart(tensors: list[Tensor], block: Tensor) -> None:
    """Check that none of them overlap, that each lies in the block, and as kernels want it."""
    spans = sorted((tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes) for tensor in tensors)
    assert all(end <= start for (_, end), (start, _) in pairwise(spans))
    assert block.data_ptr() <= spans[0][0]
    assert spans[-1][1] <= block.data_ptr() + block.nbytes
    assert all((start - block.data_ptr()) % ALIGN == 0 for start, _ in spans)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("tight", [False, True])
def test_nothing_is_read_that_this_call_has_not_written(
    roomy: Engine, monkeypatch: pytest.MonkeyPatch, tight: bool, batch: int
) -> None:
    if tight:
        narrow(roomy, batch)
    given: list[Tensor] = []
    expected = draw(roomy, batch_size=batch, on_step=lambda i, n, clean: given.append(clean))
    kept = [clean.clone() for clean in given]
    assert streams(roomy) == tight
    held, phases = painter_of(roomy).memory, []

    @torch.inference_mode()
    def poison(phase: str, memory: Tensor) -> None:
        memory.fill_(0xFF)  # NaN in every type
        phases.append(phase)

    encode, decode = conditioning.Conditioner.__call__, painter_module.decode

    def encoded(*arguments: Any) -> Any:
        poison("prompt", held.arena)
        found = encode(*arguments)
        poison("steps", held.arena)
        return found

    def decoded(decoder: Any, latents: Tensor, pictures: Tensor, rows: int | None, maps: Tensor, *how: Any) -> Tensor:
        poison("decode", maps)
        return decode(decoder, latents, pictures, rows, maps, *how)

    poison("before", held.arena), poison("before", held.library)
    assert torch.equal(draw(roomy, batch_size=batch), expected)
    monkeypatch.setattr(conditioning.Conditioner, "__call__", encoded)
    monkeypatch.setattr(painter_module, "decode", decoded)
    forget_prompts(roomy)
    assert torch.equal(draw(roomy, batch_size=batch), expected)
    assert phases == ["before", "before", "prompt", "steps", "decode"]
    assert all(map(torch.equal, given, kept))  # what callers were handed is theirs
    assert not any(map(torch.equal, given[:-1], given[1:]))


def test_a_smaller_picture_works_in_the_same_arena(roomy: Engine) -> None:
    small, large = draw(roomy, height=64, width=64), draw(roomy, height=128, width=128)
    place = painter_of(roomy).memory.arena.data_ptr()
    with torch.inference_mode():
        painter_of(roomy).memory.arena.fill_(0xFF)
    assert torch.equal(draw(roomy, height=64, width=64), small)
    assert torch.equal(draw(roomy, height=128, width=128), large)
    assert painter_of(roomy).memory.arena.data_ptr() == place


def test_what_libraries_allocate_in_is_lent_while_they_run(roomy: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    held, seen = painter_of(roomy).memory, dict[str, int]()
    encode, denoise, decode = (
        type(painter_of(roomy).conditioner)._table,
        painter_module.sampling.denoise,
        painter_module.decode,
    )

    def look(name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def looked(*arguments: Any) -> Any:
            seen[name] = held.library.nbytes
            return work(*arguments)

        return looked

    monkeypatch.setattr(type(painter_of(roomy).conditioner), "_table", look("prompt", encode))
    monkeypatch.setattr(BoundStep, "run", look("launches", BoundStep.run))
    monkeypatch.setattr(painter_module.sampling, "denoise", look("steps", denoise))
    monkeypatch.setattr(painter_module, "decode", look("decode", decode))
    draw(roomy)
    assert roomy.plan.library > 0
    assert seen == {"prompt": 0, "steps": roomy.plan.library, "launches": 0, "decode": 0}
    assert held.library.nbytes == held.components["libraries"] == roomy.plan.library


def test_after_an_error_the_next_call_takes_it_back(roomy: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, held = draw(roomy), painter_of(roomy).memory

    def broken(*arguments: object) -> Iterator[Tensor]:
        raise ZeroDivisionError

    with monkeypatch.context() as context:
        context.setattr(painter_of(roomy).model.decoder, "forward", broken)
        with pytest.raises(ZeroDivisionError):
            draw(roomy)
    assert held.library.nbytes == 0  # its traceback may keep tensors alive
    assert held.arena.nbytes == roomy.plan.arena
    assert torch.equal(draw(roomy), expected)
    assert held.library.nbytes == roomy.plan.library


def test_inside_a_session_weights_are_decoded_into_the_arena(roomy: Engine) -> None:
    held = painter_of(roomy).memory
    backend = held.backend
    assert backend is not None

    def where() -> int:
        packed, absmax = torch.zeros(64, 32, dtype=torch.uint8), torch.zeros(64, 1)
        return backend.dequantize(packed, absmax, torch.float32).data_ptr()

    with torch.inference_mode(), held.session(asked(roomy)):
        assert where() == held.arena.data_ptr()
    with torch.inference_mode(), held.session(painter_of(roomy).model.decode_requirements(8, 8, 1)):
        assert where() != held.arena.data_ptr()  # there the decoder's maps lie


def test_running_out_of_memory_gives_back_all_before_the_second_try(
    roomy: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, held, hand_back = draw(roomy), painter_of(roomy).memory, memory_manager.hand_back
    first, gone = StorageWeakRef(held.arena.untyped_storage()), []
    forward = painter_of(roomy).model.decoder.forward

    def decode(*arguments: object) -> Iterator[Tensor]:
        if not gone:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(*arguments)

    def handed_back(device: torch.device) -> None:
        gone.append(first.expired())
        hand_back(device)

    monkeypatch.setattr(painter_of(roomy).model.decoder, "forward", decode)
    monkeypatch.setattr(memory_manager, "hand_back", handed_back)
    assert torch.equal(draw(roomy), expected)
    assert all(gone)
    assert gone
