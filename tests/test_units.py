"""What weight groups and their prefetcher hold at each moment: whose memory tensors lie in, and what stays."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from test_residency import Runtime, Script, hosted, modules, staging
from torch import Tensor, nn
from torch.nn import Linear

from vortex_core.errors import VortexWarning
from vortex_core.memory import host_memory, offload
from vortex_core.memory.host_memory import HostMemory
from vortex_core.memory.offload import Prefetcher, WeightGroup

CPU = torch.device("cpu")


def lies_in(module: nn.Module, buffer: Tensor | None) -> bool:
    """Whether every tensor of a module is a view of `buffer`."""
    assert buffer is not None
    tensors = [*module.parameters(), *module.buffers()]
    return {tensor.untyped_storage().data_ptr() for tensor in tensors} == {buffer.untyped_storage().data_ptr()}


def test_a_unit_is_where_it_was_put_last() -> None:
    (module,) = modules(1)
    group = WeightGroup("group", "blocks", module)
    assert (group.nbytes, group.streams, group.device, group.host) == (0, False, None, None)
    group.settle(device=torch.empty(group.measure(), dtype=torch.uint8))
    assert group.streams is False
    assert lies_in(module, group.device)
    group.to_host()
    assert group.host is not None
    assert (group.host.dtype, len(group.host)) == (torch.uint8, group.nbytes)
    assert lies_in(module, group.host)
    before = group.host
    group.to_host()  # twice is once
    assert group.host is before
    group.to_device(CPU)
    assert lies_in(module, group.device)
    assert group.host is None
    memory = HostMemory(group.nbytes, pin=False)
    group.to_host(memory)
    assert group.streams is True
    assert lies_in(module, memory._region.memory)


def test_a_unit_that_was_only_offloaded_comes_to_stream() -> None:
    (module,) = modules(1)
    group = WeightGroup("group", "blocks", module)
    expected = [tensor.clone() for tensor in module.state_dict().values()]
    group.settle(device=torch.empty(group.measure(), dtype=torch.uint8))
    group.to_host()
    memory = HostMemory(group.nbytes, pin=False)
    group.to_host(memory)
    assert group.streams
    assert lies_in(module, memory._region.memory)
    assert all(map(torch.equal, module.state_dict().values(), expected))
    (streaming,) = hosted(modules(1))
    assert streaming.streams is True
    streaming.to_device(CPU)
    assert streaming.host is not None


def test_a_stager_leaves_every_unit_at_home_and_no_hook() -> None:
    made = modules(3)
    groups = hosted(made)
    prefetcher = Prefetcher(groups, CPU)
    x = torch.randn(3, 5)
    expected = [module(x) for module in modules(3)]
    region = staging(groups)
    with prefetcher.open(region):
        assert all(lies_in(module, region.memory) for module in made)
        assert torch.equal(made[0](x), expected[0])
    assert all(lies_in(module, group.host) for module, group in zip(made, groups, strict=True))
    prefetcher.close()
    assert all(torch.equal(module(x), result) for module, result in zip(made, expected, strict=True))


@pytest.mark.parametrize("ran", [0, 1, 2])
def test_a_round_that_is_given_up_waits_for_its_copies(ran: int) -> None:
    made = modules(3)
    groups, lane = hosted(made), Script()
    prefetcher = Prefetcher(groups, CPU, lane)

    def begin() -> None:
        with prefetcher.open(staging(groups), rounds=3):
            for module in made[:ran]:
                module(torch.randn(3, 5))
            assert lane.pending  # ahead of what ran
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        begin()
    assert not lane.pending
    with prefetcher.open(staging(groups)):
        pass
    assert not lane.pending


def test_one_round_is_the_default_and_acts_are_done_at_once_again() -> None:
    made = modules(3)
    groups, lane = hosted(made), Script()
    prefetcher = Prefetcher(groups, CPU, lane)
    with prefetcher.open(staging(groups)):
        with prefetcher.deferred(lambda act: None):
            made[0](torch.randn(3, 5))
        assert len(lane.told) == 2
        for module in made:
            module(torch.randn(3, 5))
    assert len(lane.told) == 3


def test_units_of_any_sizes_share_buffers() -> None:
    torch.manual_seed(0)
    sizes = (64, 8, 4, 100, 1)
    made = [Linear(5, n).requires_grad_(False) for n in sizes]
    x = torch.randn(3, 5)
    expected = [module(x) for module in made]
    groups = hosted(list(made))
    assert len({group.nbytes for group in groups}) > 2
    prefetcher = Prefetcher(groups, CPU)
    with prefetcher.open(staging(groups), rounds=2):
        for _ in range(2):
            assert all(torch.equal(module(x), result) for module, result in zip(made, expected, strict=True))


def test_pinning_that_fails_leaves_no_error_for_the_next_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[object] = []

    def zeros(count: int, *, device: str) -> SimpleNamespace:
        return SimpleNamespace(add_=lambda value: launched.append((count, device, value)))

    monkeypatch.setattr(offload.torch.cuda, "cudart", lambda: Runtime(error=2))
    monkeypatch.setattr(offload.torch, "zeros", zeros)
    with pytest.warns(
        VortexWarning, match=r"^No pinned host memory for 0.02 GB \(error 2\); copies to a GPU are slower.$"
    ):
        HostMemory(20 * 10**6, pin=True)
    assert launched == [(1, "cuda", 1)]


def test_nothing_is_pinned_where_nothing_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload.torch.cuda, "cudart", lambda: pytest.fail("asked to pin nothing"))
    assert HostMemory(0, pin=True).pinned == 0


def test_memory_is_given_back_after_the_last_copy_and_a_lost_device_is_no_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: list[str] = []
    runtime = SimpleNamespace(cudaHostUnregister=lambda pointer: told.append("unregistered"))
    monkeypatch.setattr(offload.torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(offload.torch.cuda, "synchronize", lambda: told.append("synchronized"))
    host_memory._unregister(torch.empty(8, dtype=torch.uint8))
    assert told == ["synchronized", "unregistered"]

    def lost() -> None:
        raise RuntimeError("CUDA error: unspecified launch failure")

    monkeypatch.setattr(offload.torch.cuda, "synchronize", lost)
    host_memory._unregister(torch.empty(8, dtype=torch.uint8))
