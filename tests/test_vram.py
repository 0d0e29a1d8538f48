"""The VRAM counters."""

import logging

import pytest
import torch

from vortex_core import clear_cuda_cache
from vortex_core.vram import snapshot

GB = 1e9


def test_the_cpu_has_no_vram() -> None:
    assert snapshot(torch.device("cpu")).allocated == 0


def test_clear_cuda_cache_logs_what_it_did(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "vortex_core")
    freed = clear_cuda_cache()
    assert "clear_cuda_cache" in caplog.text
    assert freed >= 0


@pytest.mark.gpu
def test_the_counters_see_an_allocation() -> None:
    device = torch.device("cuda", 0)
    before = snapshot(device)
    held = torch.empty(2**30, dtype=torch.uint8, device=device)
    after = snapshot(device)
    assert after.allocated - before.allocated == 2**30
    assert after.reserved - before.reserved >= 2**30
    assert before.free - after.free >= 2**30
    if before.process is not None and after.process is not None:
        assert after.process - before.process >= 2**30
    del held
    assert clear_cuda_cache() >= 2**30
    assert snapshot(device).reserved <= before.reserved
