"""CUDA's streams around jobs and asked functions, with stand-ins for the streams."""

from __future__ import annotations

import pytest
import torch
from worker_parts import CPU, Thing, until

from vortex_core.device.jobs import ask
from vortex_core.device.streams import Order, blas_of, streams_of
from vortex_core.device.worker import Worker, worker_of


class FakeStream:
    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def wait_stream(self, other: FakeStream) -> None:
        self.log.append(f"{self.name} waits for {other.name}")


@pytest.fixture
def log(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What happens on streams when the caller's is another one than the worker's."""
    log: list[str] = []
    theirs, ours = FakeStream("theirs", log), FakeStream("ours", log)
    monkeypatch.setattr(worker.order, "foreign", lambda: theirs)
    monkeypatch.setattr(worker.order, "default", lambda: ours)
    monkeypatch.setattr(
        torch.Tensor, "record_stream", lambda tensor, stream: log.append(f"{stream.name} keeps {int(tensor[0])}")
    )
    return log


def test_the_streams_wait_for_each_other_around_a_job(worker: Worker, log: list[str]) -> None:
    one, two, three = (torch.tensor([i]) for i in (1, 2, 3))
    far = torch.empty(1, device="meta")
    worker.run(lambda: log.append("job") or (one, [two, (three, far)], {"no": one}, "text"))
    assert log == [
        "ours waits for theirs",
        "job",
        "theirs waits for ours",
        "theirs keeps 1",
        "theirs keeps 2",
        "theirs keeps 3",
    ]


def test_the_streams_wait_around_an_asked_function(worker: Worker, log: list[str]) -> None:
    given, returned = torch.tensor([1]), torch.tensor([2])

    def on_step(latents: torch.Tensor) -> torch.Tensor:
        log.append("asked")
        return returned

    def call() -> None:
        log.append("before")
        ask(on_step, given)
        log.append("after")

    worker.run(call)
    assert log == [
        "ours waits for theirs",
        "before",
        "theirs waits for ours",
        "theirs keeps 1",
        "asked",
        "ours waits for theirs",
        "ours keeps 2",
        "after",
        "theirs waits for ours",
    ]


def test_the_streams_wait_after_an_exception_which_stays_the_one_that_is_raised(
    worker: Worker, log: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ZeroDivisionError):
        worker.run(lambda: divmod(1, 0))
    assert log == ["ours waits for theirs", "theirs waits for ours"]

    def broken(*_: object) -> None:
        raise RuntimeError("no such stream")

    with monkeypatch.context() as patch:
        patch.setattr(worker.order, "lead", broken)
        with pytest.raises(ZeroDivisionError):
            worker.run(lambda: divmod(1, 0))
        with pytest.raises(RuntimeError, match="no such stream"):
            worker.run(lambda: 1)


def test_no_waits_where_the_streams_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    streams = Order(torch.device("cuda:0"))
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: 0)
    assert streams.foreign() is None
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: 1)
    assert streams.foreign() == 1
    assert Order(CPU).foreign() is None


def test_the_device_is_the_threads_in_every_job(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", calls.append)
    streams = Order(torch.device("cuda:0"))
    streams.enter()
    streams.enter()  # another thread may serve by now
    Order(CPU).enter()
    assert calls == [torch.device("cuda:0")] * 2


@pytest.mark.gpu
def test_on_a_gpu_the_streams_wait_and_cleared_workspaces_are_noticed(registry: dict[torch.device, Worker]) -> None:
    device = torch.device("cuda:0")
    worker, engine = worker_of(device), Thing()
    detach = worker.attach(engine)
    streams = streams_of(device)
    assert streams is not None
    blas = blas_of(device)
    worker.run(lambda: blas.ensure(streams))
    first = blas.generation
    assert blas.nbytes(streams) > 0
    worker.run(lambda: blas.ensure(streams))
    assert blas.generation == first
    torch._C._cuda_clearCublasWorkspaces()  # type: ignore[attr-defined]
    worker.run(lambda: blas.ensure(streams))
    assert blas.generation == first + 1
    size = 1 << 26
    seen: list[float] = []
    with torch.cuda.stream(streams.side):
        for i in range(1, 50):
            x = torch.full((size,), float(i), device=device)  # the worker must wait for it
            y = worker.run(lambda x=x: (ask(lambda z: seen.append(z[-1].item()), x * 2), x + 1)[1])
            assert (y[0].item(), y[-1].item(), seen.pop()) == (i + 1, i + 1, 2 * i)
    detach()
    until(lambda: worker._serving is None)
