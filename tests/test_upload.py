"""Files to the GPU through pinned buffers: any size, type and place, none mixed up with the next."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from vortex_core.errors import VortexCheckpointError, VortexWarning
from vortex_core.storage import upload
from vortex_core.storage.files import SafetensorsFiles, open_file
from vortex_core.storage.upload import PIECE, FileBytes, Upload, upload_to

SIZES = (0, 1, 63, PIECE, PIECE + 1, 20 * PIECE + 7)  # more pieces than there are buffers


class Event:
    """Of a device that has done everything at once."""

    def __init__(self, *, blocking: bool) -> None: ...

    def synchronize(self) -> None: ...

    def record(self) -> None: ...


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """A GPU; or the CPU in place of one, where there is no pinned memory either."""
    if request.param == "cpu":
        for name in ("device", "stream", "current_stream"):
            monkeypatch.setattr(torch.cuda, name, nullcontext)
        monkeypatch.setattr(torch.cuda, "Event", Event)
    yield torch.device(request.param, 0)
    assert not upload._uploads  # nobody holds on to the buffers


@pytest.fixture
def sender(device: torch.device) -> Upload:
    if device.type == "cuda":
        return Upload(device)
    with pytest.warns(VortexWarning, match="No pinned host memory"):
        return Upload(device)


@pytest.fixture(scope="module")
def content() -> Tensor:
    return torch.randint(0, 256, (30 * PIECE,), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


@pytest.fixture(scope="module")
def path(content: Tensor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("upload") / "bytes"
    path.write_bytes(content.numpy().data)
    return path


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32, torch.float8_e4m3fn])
def test_what_arrives_is_what_the_file_holds(
    sender: Upload, device: torch.device, path: Path, content: Tensor, dtype: torch.dtype
) -> None:
    file, sent = FileBytes(path), []
    for i, size in enumerate(SIZES):  # all in flight before the first is looked at
        with torch.inference_mode(i % 2 == 1):
            sent.append(torch.empty(size // dtype.itemsize, dtype=dtype, device=device))
        sender(file, 1001 * i, sent[-1])
    scalar = torch.empty((), dtype=dtype, device=device)
    sender(file, 5, scalar)
    assert torch.equal(scalar.cpu().view(-1).view(torch.uint8), content[5 : 5 + dtype.itemsize])
    for i, tensor in enumerate(sent):
        assert torch.equal(tensor.cpu().view(torch.uint8), content[1001 * i :][: tensor.nbytes])


def test_several_threads_at_once(sender: Upload, device: torch.device, path: Path, content: Tensor) -> None:
    file = FileBytes(path)

    def send(i: int) -> bool:
        target = torch.empty(3 * PIECE + i, dtype=torch.uint8, device=device)
        sender(file, i * PIECE, target)
        return torch.equal(target.cpu(), content[i * PIECE :][: target.numel()])

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(send, range(24)))


def test_a_file_that_ends_early(sender: Upload, device: torch.device, path: Path, content: Tensor) -> None:
    target = torch.empty(20 * PIECE, dtype=torch.uint8, device=device)
    for _ in range(3):  # every buffer comes back
        with pytest.raises(OSError, match="bytes ends before byte"):
            sender(FileBytes(path), 20 * PIECE, target)
    sender(FileBytes(path), 10 * PIECE, target)
    assert torch.equal(target.cpu(), content[10 * PIECE :])


def test_where_files_have_one_position(monkeypatch: pytest.MonkeyPatch, path: Path, content: Tensor) -> None:
    monkeypatch.delattr(os, "preadv", raising=False)
    memory = torch.zeros(PIECE, dtype=torch.uint8)
    FileBytes(path).read(77, memory.numpy().data)
    assert torch.equal(memory, content[77 : 77 + PIECE])
    with pytest.raises(OSError, match=f"bytes ends before byte {content.numel() + PIECE - 5}"):
        FileBytes(path).read(content.numel() - 5, memory.numpy().data)


@pytest.fixture
def shards(tmp_path: Path) -> SafetensorsFiles:
    for name, first in (("a", 0.0), ("b", 100.0)):
        tensors = {f"{name}.{i}": torch.full((i + 1, 700), first + i, dtype=torch.bfloat16) for i in range(5)}
        save_file(tensors | {f"{name}.scalar": torch.tensor(first)}, tmp_path / f"{name}.safetensors")
    return SafetensorsFiles(tmp_path, sorted(tmp_path.glob("*.safetensors")))


@pytest.mark.filterwarnings("ignore:No pinned host memory")
def test_tensors_are_found_in_their_shard(shards: SafetensorsFiles, device: torch.device) -> None:
    for name in shards.names():
        mapped, sent = shards.read(name), shards._uploaded(name, device)
        assert (sent.dtype, sent.device.type) == (mapped.dtype, device.type)
        assert torch.equal(sent.cpu(), mapped)
    assert upload_to(device) is shards._upload  # one for all files
    del shards._upload


@pytest.mark.filterwarnings("ignore:No pinned host memory")
def test_a_file_cut_while_it_is_open(tmp_path: Path, device: torch.device) -> None:
    path = tmp_path / "cut.safetensors"
    save_file({"weight": torch.ones(PIECE)}, path)
    opened = open_file(path)
    assert isinstance(opened, SafetensorsFiles)
    assert opened._uploaded("weight", device).sum() == PIECE
    os.truncate(path, path.stat().st_size - 9)
    with pytest.raises(VortexCheckpointError, match=r"cut\.safetensors ends before"):
        opened._uploaded("weight", device)
