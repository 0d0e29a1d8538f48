"""Copies to the GPU through pinned buffers: any size and type, none mixed up with the next."""

import pytest
import torch

from vortex_core.checkpoint.upload import PIECE, Upload

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32, torch.float8_e4m3fn])
def test_copies_are_exact(dtype: torch.dtype) -> None:
    upload = Upload(torch.device("cuda", 0))
    generator = torch.Generator().manual_seed(0)
    sizes = [0, 1, 63, PIECE // dtype.itemsize, PIECE // dtype.itemsize + 1, 5 * PIECE // dtype.itemsize + 7]
    sources = [torch.randint(0, 100, (size,), generator=generator, dtype=torch.uint8).to(dtype) for size in sizes]
    sources.append(torch.tensor(3).to(dtype))
    copies = [upload(source) for source in sources]  # all in flight before the first is looked at
    for source, copy in zip(sources, copies, strict=True):
        assert copy.shape == source.shape
        assert torch.equal(copy.cpu().view(-1).view(torch.uint8), source.view(-1).view(torch.uint8))


def test_without_pinned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = torch.empty

    def refuse(*arguments: object, **options: object) -> torch.Tensor:
        if options.get("pin_memory"):
            raise RuntimeError("no pinned memory")
        return empty(*arguments, **options)

    monkeypatch.setattr(torch, "empty", refuse)
    assert torch.equal(Upload(torch.device("cuda", 0))(torch.arange(9)).cpu(), torch.arange(9))
