"""Where weights live changes nothing of what they compute: no copy is used before it is there, or after it is gone."""

import gc
import itertools
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Conv2d, LayerNorm, Linear

from vortex_core.errors import VortexWarning
from vortex_core.memory import offload
from vortex_core.memory.arena import Region
from vortex_core.memory.host_memory import HostMemory
from vortex_core.memory.offload import Prefetcher, WeightGroup, nbytes
from vortex_core.memory.weights import Placement

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def modules(count: int) -> list[nn.Module]:
    torch.manual_seed(0)
    made: list[nn.Module] = []
    for i in range(count):
        mixed = nn.Sequential(Linear(5, 5 + i), LayerNorm(5 + i), Linear(5 + i, 5)).requires_grad_(False)
        mixed.register_buffer("bytes", torch.arange(3 + i, dtype=torch.uint8))
        made.append(mixed)
    return made


def staging(groups: list[WeightGroup], device: torch.device | None = None) -> Region:
    """Memory for the pair of buffers, and with what was there before."""
    size = 2 * max(group.nbytes for group in groups)
    return Region(torch.full((size,), 255, dtype=torch.uint8, device=device))


def hosted(made: list[nn.Module], *, pin: bool = False) -> list[WeightGroup]:
    groups = [WeightGroup(f"group.{i}", "blocks", module) for i, module in enumerate(made)]
    memory = HostMemory(sum(group.measure() for group in groups), pin=pin)
    for group in groups:
        group.settle(host=memory.take(group.nbytes))
    return groups


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_streamed_units_compute_what_they_computed_at_home(device: str, count: int) -> None:
    where, home, moved = torch.device(device), modules(count), modules(count)
    groups = hosted(moved, pin=device == "cuda")
    prefetcher = Prefetcher(groups, where)
    x = torch.randn(3, 5)
    expected = [group(x) for group in home]
    for rounds in (1, 3):
        with prefetcher.open(staging(groups, where), rounds):
            for _ in range(rounds):
                for module, result in zip(moved, expected, strict=True):
                    torch.testing.assert_close(module(x.to(where)).cpu(), result)
            assert torch.equal(moved[-1].bytes.cpu(), torch.arange(2 + count, dtype=torch.uint8))
        assert all(tensor.device.type == "cpu" for module in moved for tensor in module.parameters())
    with prefetcher.open(staging(groups, where)):  # another order works, too
        for module, result in reversed(list(zip(moved, expected, strict=True))):
            torch.testing.assert_close(module(x.to(where)).cpu(), result)
    prefetcher.close()


def test_what_was_offloaded_streams_from_memory_that_is_made_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    take = HostMemory.take
    monkeypatch.setattr(HostMemory, "take", lambda memory, size: (taken.append(size), take(memory, size))[1])
    groups = [WeightGroup(f"group.{i}", "blocks", module) for i, module in enumerate(modules(2))]
    expected = [tensor.clone() for tensor in groups[0].modules[0].parameters()]
    for group in groups:
        group.settle(device=torch.empty(group.measure(), dtype=torch.uint8))
    placement = Placement(groups, torch.device("cpu"))
    placement.start(frozenset())
    placement.offload()
    assert not taken
    placement.place(frozenset({"group.0"}))
    assert taken == [groups[0].nbytes]
    assert (groups[0].streams, groups[1].streams) == (True, False)
    assert all(map(torch.equal, groups[0].modules[0].parameters(), expected))


def test_a_unit_keeps_the_layout_of_its_tensors() -> None:
    """Convolutions' weights with their channels last stay so, wherever they move."""
    conv = Conv2d(6, 4, 3).requires_grad_(False)
    conv.weight.data = conv.weight.data.contiguous(memory_format=torch.channels_last)
    expected = conv.weight.clone()
    group = WeightGroup("vae", "vae", conv)
    group.settle(device=torch.full((group.measure(),), 255, dtype=torch.uint8))
    group.to_host()
    group.to_device(torch.device("cpu"))
    assert torch.equal(conv.weight, expected)
    assert conv.weight.is_contiguous(memory_format=torch.channels_last)


class Script:
    """A lane that tells where it was asked to copy, and copies as late as it may: when it is waited for."""

    def __init__(self) -> None:
        self.told: list[int] = []
        self.pending: dict[int, tuple[Tensor, Tensor]] = {}
        self.tokens = itertools.count()

    def copy(self, target: Tensor, source: Tensor) -> int:
        token = next(self.tokens)
        self.pending[token] = (target, source)
        self.told.append(target.data_ptr())
        return token

    def wait(self, token: int) -> None:
        target, source = self.pending.pop(token, (None, None))
        if target is not None:
            target.copy_(source)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("rounds", [1, 3])
def test_copies_run_one_unit_ahead_and_no_more_often_than_needed(count: int, rounds: int) -> None:
    made = modules(count)
    groups, lane = hosted(made), Script()
    prefetcher = Prefetcher(groups, torch.device("cpu"), lane)
    x = torch.randn(3, 5)
    expected = [module(x) for module in modules(count)]
    asked: list[int] = []
    for module in made:
        module.register_forward_pre_hook(lambda *_: asked.append(len(lane.told)))
    with prefetcher.open(staging(groups), rounds):
        for _ in range(rounds):
            for module, result in zip(made, expected, strict=True):
                before = len(lane.told)
                assert torch.equal(module(x), result)
                assert asked[-1] == before  # it was asked for already
                # a copy is asked for once its buffer's last group has run: it goes where that one just was
                assert lane.told[before:] in ([], [next(module.parameters()).data_ptr()])
    copies = count if count <= 2 else rounds * count - (rounds - 1) * (count == 3)
    assert len(lane.told) == copies
    assert not lane.pending  # the buffers are free when they are given back


def test_what_is_due_between_units_can_be_done_later() -> None:
    made = modules(3)
    groups, lane = hosted(made), Script()
    prefetcher = Prefetcher(groups, torch.device("cpu"), lane)
    x = torch.randn(3, 5)
    expected = [module(x) for module in modules(3)]
    acts: list[Callable[[], None]] = []
    with prefetcher.open(staging(groups), rounds=2):
        with prefetcher.deferred(acts.append):
            for module in made:
                module(x)
        assert len(lane.told) == 2  # only those that were fetched ahead
        assert len(acts) == 6
        for _ in range(2):
            due = iter(acts)
            for module, result in zip(made, expected, strict=True):
                next(due)()
                assert torch.equal(module.forward(x), result)  # without hooks, as a captured step runs
                next(due)()
    assert len(lane.told) == 5


@pytest.mark.parametrize("device", DEVICES)
def test_a_unit_comes_and_goes_bit_for_bit(device: str) -> None:
    (module,) = modules(1)
    group = WeightGroup("group", "blocks", module)
    expected = [tensor.clone() for tensor in module.state_dict().values()]
    where = torch.device(device)
    group.measure()
    group.settle(device=torch.empty(group.nbytes, dtype=torch.uint8, device=where))
    memory = HostMemory(group.nbytes, pin=False)
    for keeps in (False, True, True):
        group.to_host(memory if keeps else None)
        assert group.device is None
        group.to_device(where)
        assert (group.host is not None) is keeps  # what streams once stays in host memory, what is only offloaded not
        found = [tensor.cpu() for tensor in module.state_dict().values()]
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
        assert all(tensor.device.type == device for tensor in module.parameters())


class Runtime:
    """The CUDA runtime, as far as pinning goes."""

    def __init__(self, error: int) -> None:
        self.error = error
        self.registered: dict[int, int] = {}

    def cudaHostRegister(self, pointer: int, size: int, flags: int) -> int:
        assert flags == 1  # portable: pinned for every card's context
        if not self.error:
            self.registered[pointer] = size
        return self.error

    def cudaHostUnregister(self, pointer: int) -> None:
        del self.registered[pointer]

    def cudaGetErrorString(self, error: int) -> str:
        return f"error {error}"


def test_pinned_memory_is_exact_and_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = Runtime(error=0)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    memory = HostMemory(1000, pin=True)
    assert list(runtime.registered.values()) == [1000]
    assert memory.pinned == 1000
    first, second = memory.take(512), memory.take(488)
    assert first.data_ptr() + 512 == second.data_ptr()
    del memory
    gc.collect()
    assert not runtime.registered


def test_no_pinned_memory_warns_and_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "cudart", lambda: Runtime(error=2))
    with pytest.warns(VortexWarning, match=r"No pinned host memory for 0.00 GB \(error 2\)"):
        memory = HostMemory(1000, pin=True)
    assert memory.pinned == 0
    assert memory.take(1000).fill_(7).sum() == 7000

    def broken() -> SimpleNamespace:
        raise RuntimeError("no accelerator\nlong\nstory")

    monkeypatch.setattr(torch.cuda, "cudart", broken)
    with pytest.warns(VortexWarning, match=r"\(no accelerator\)"):
        HostMemory(1000, pin=True)


def test_nbytes_counts_parameters_and_buffers() -> None:
    assert nbytes(Linear(3, 2)) == (6 + 2) * 4
    assert nbytes(nn.BatchNorm1d(4)) == (4 * 4) * 4 + 8


def test_addresses_tell_whose_they_are() -> None:
    """A graph that reads one group's weights is not to be found where another of its size lies in their place."""
    groups, buffer = hosted(modules(1) + modules(1)), torch.empty(4096, dtype=torch.uint8)
    found = []
    for here, away in (groups, reversed(groups)):
        here.device, away.device = buffer, None
        placement = Placement(groups, torch.device("cpu"))
        placement.start(frozenset({away.name}))
        found.append(placement.addresses)
    assert found[0] != found[1]


def test_a_unit_goes_where_it_is_sent() -> None:
    (module,) = modules(1)
    group = WeightGroup("group", "blocks", module)
    group.settle(device=torch.empty(group.measure(), dtype=torch.uint8))
    memory = HostMemory(group.nbytes, pin=False)
    group.to_host(memory)
    assert group.streams
    assert group.host is not None
    assert group.host.untyped_storage().data_ptr() == memory._region.memory.untyped_storage().data_ptr()
    bound: list[Tensor] = []
    group.bind = bound.append  # type: ignore[method-assign]  # a tensor cannot change its device to this one
    group.to_device(torch.device("meta"))
    assert [buffer.device.type for buffer in bound] == ["meta"]
    assert bound == [group.device]


def test_a_copy_waits_for_the_products_before_it_and_they_for_the_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked of CUDA, and in which order, told without a card."""
    told: list[object] = []

    class Stream:
        def __init__(self, name: str) -> None:
            self.name = name

        def wait_stream(self, other: object) -> None:
            told.append((self.name, "waits for", getattr(other, "name", other)))

        def wait_event(self, event: object) -> None:
            told.append((self.name, "waits for", event))

        def record_event(self) -> str:
            told.append((self.name, "records"))
            return "event"

    class Inside:
        def __init__(self, stream: Stream) -> None:
            self.name = stream.name

        def __enter__(self) -> None:
            told.append(("on", self.name))

        def __exit__(self, *exception: object) -> None:
            told.append(("off", self.name))

    class Target:
        def copy_(self, source: object, *, non_blocking: bool) -> None:
            told.append(("copy", source, non_blocking))

    card = torch.device("cuda", 1)
    monkeypatch.setattr(offload, "streams_of", lambda device: SimpleNamespace(copy=Stream("copies")))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream(f"products of {device}"))
    monkeypatch.setattr(torch.cuda, "stream", Inside)
    copies = offload.CopyStream(card)
    token = copies.copy(Target(), "weights")  # type: ignore[arg-type]
    copies.wait(token)
    assert told == [
        ("copies", "waits for", "products of cuda:1"),
        ("on", "copies"),
        ("copy", "weights", True),
        ("copies", "records"),
        ("off", "copies"),
        ("products of cuda:1", "waits for", "event"),
    ]
    told.clear()
    copies.wait(None)
    assert told == []
