"""Streaming: a unit that visits the staging buffer computes what it computed at home."""

import pytest
import torch
from torch import nn

from vortex_core import residency
from vortex_core.errors import VortexWarning
from vortex_core.residency import Staging, nbytes


def units() -> list[nn.Module]:
    torch.manual_seed(0)
    mixed = nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 5)).requires_grad_(False)
    mixed.register_buffer("bytes", torch.arange(3, dtype=torch.uint8))
    return [mixed, nn.Linear(5, 5, bias=False, dtype=torch.float32).requires_grad_(False)]


def devices() -> list[object]:
    return ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", devices())
@pytest.mark.filterwarnings("ignore:No pinned host memory")
def test_streamed_units_compute_what_they_computed_at_home(device: str) -> None:
    home, moved = units(), units()
    x = torch.randn(3, 5)
    expected = [unit(x) for unit in home]
    staging = Staging(moved, torch.device(device))
    for again in (False, True):
        if again:
            staging.release()
            assert all(tensor.device.type == "cpu" for unit in moved for tensor in unit.parameters())
            staging.allocate()
        buffer = staging.units[0].buffer.untyped_storage()
        assert buffer.nbytes() == staging.nbytes == max(unit.nbytes for unit in staging.units)
        for unit, result in zip(moved, expected, strict=True):
            buffer.fill_(255)  # each visit overwrites the other's
            torch.testing.assert_close(unit(x.to(device)).cpu(), result)
        for unit in moved:
            assert all(tensor.untyped_storage().data_ptr() == buffer.data_ptr() for tensor in unit.parameters())
    moved[0](x.to(device))
    assert torch.equal(moved[0].bytes.cpu(), torch.arange(3, dtype=torch.uint8))


def test_no_pinned_memory_warns_and_works(monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.empty

    def refuse(*size: object, **options: object) -> torch.Tensor:
        if options.get("pin_memory"):
            raise RuntimeError("no accelerator\nlong story")
        return real(*size, **options)

    monkeypatch.setattr(residency.torch, "empty", refuse)
    with pytest.warns(VortexWarning, match=r"No pinned host memory.*\(no accelerator\)"):
        Staging(units(), torch.device("cpu"))


def test_nbytes_counts_parameters_and_buffers() -> None:
    assert nbytes(nn.Linear(3, 2)) == (6 + 2) * 4
    assert nbytes(nn.BatchNorm1d(4)) == (4 * 4) * 4 + 8
