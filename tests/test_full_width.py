"""One double and one single block at FLUX's real widths, in every dialect, by its real writers.

The miniature cannot show what real widths do: how `linear1` splits, where nested scales end in a fused matrix.
"""

from __future__ import annotations

from pathlib import Path

import bitsandbytes.functional as bnb
import pytest
import torch
from safetensors.torch import save_file
from specimens import write_gguf
from torch import Tensor

from vortex_core import nf4
from vortex_core.checkpoint.bundle import describe, find_parts
from vortex_core.checkpoint.dialects import Part, find_part
from vortex_core.checkpoint.key_maps import flux_sources
from vortex_core.flux1.conditioning import Modulation
from vortex_core.flux1.spec import FluxSpec
from vortex_core.flux1.transformer import Transformer
from vortex_core.storage.files import StateDict, open_file
from vortex_core.storage.materialize import check

pytestmark = pytest.mark.slow
ONE_BLOCK = FluxSpec(double_blocks=1, single_blocks=1)
# one of each way that rows are joined: thirds, 1:1:1:4, swapped halves, alone
QKV = "double_blocks.0.txt_attn.qkv.weight"
LINEAR1 = "single_blocks.0.linear1.weight"
FINAL = "final_layer.adaLN_modulation.1.weight"
PROJ = "double_blocks.0.img_attn.proj.weight"
JOINED = (QKV, LINEAR1, FINAL)
ALONE = (FINAL, PROJ)  # what BFL names need no joining for
WITNESS = "double_blocks.0.img_attn.qkv.weight"
K_QUANTS = {"Q4_K": (4, 144), "Q5_K": (4, 176)}  # bytes of a block's two fp16 scales, and of the block


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sharded folder, as diffusers saves it. The weights repeat with a period that no row has."""
    from diffusers import FluxTransformer2DModel

    with torch.device("meta"):
        model = FluxTransformer2DModel(num_layers=1, num_single_layers=1).bfloat16()
    noise = torch.randn(1_000_003, generator=torch.Generator().manual_seed(0)).bfloat16()
    state, first = {}, 0
    for name, parameter in model.state_dict().items():
        copies = noise.roll(first).repeat(parameter.numel() // noise.numel() + 1)
        state[name] = copies[: parameter.numel()].view(parameter.shape)
        first += 7919
    model.load_state_dict(state, assign=True)
    path = tmp_path_factory.mktemp("wide")
    model.save_pretrained(path / "transformer", max_shard_size="400MB")
    return path


@pytest.fixture(scope="module")
def wide(folder: Path) -> Part:
    return find_parts(folder, {})[0]["transformer"]


def part_of(path: Path) -> Part:
    part = find_part(open_file(path), "transformer")
    assert part is not None
    return part


def requantizes(part: Part, name: str) -> None:
    """What loading makes of a tensor is the quantized form of its dequantized source."""
    assert not part.tensors.is_nf4(name)
    once, again = nf4.quantize(part.tensors.read(name)), nf4.quantize_reference(part.tensors.read(name))
    assert torch.equal(once.packed, again.packed)
    assert torch.equal(once.absmax, again.absmax)


def test_a_diffusers_folder_and_a_bfl_file(folder: Path, wide: Part, tmp_path: Path) -> None:
    from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers

    parts, configs = find_parts(folder, {})
    assert len(list((folder / "transformer").glob("*.safetensors"))) > 1
    assert describe("transformer", parts["transformer"], configs["transformer"]) == ONE_BLOCK
    with torch.device("meta"):
        halves = (Transformer(ONE_BLOCK), Modulation(ONE_BLOCK))
    assert sum(check(half, wide.tensors) for half in halves) == wide.nbytes
    names = [name for half in halves for name, _ in half.named_parameters()]
    path = tmp_path / "flux1-schnell.safetensors"
    save_file({name: wide.tensors.read(name).contiguous() for name in names}, path)
    single = part_of(path)
    assert describe("transformer", single) == ONE_BLOCK
    theirs = convert_flux_transformer_checkpoint_to_diffusers({name: single.tensors.read(name) for name in names})
    assert theirs.keys() == set(wide.stored.names())
    assert all(torch.equal(tensor, wide.stored.read(name)) for name, tensor in theirs.items())
    requantizes(wide, QKV)


def test_plain_nf4_as_bitsandbytes_writes_it(wide: Part) -> None:
    """Packed apart and joined, or packed whole: bit for bit."""
    apart: dict[str, Tensor] = {"transformer_blocks.0.attn.to_q.weight": torch.zeros(64, 64)}
    whole: dict[str, Tensor] = {WITNESS: torch.zeros(64, 64)}
    for name in JOINED:
        for source in flux_sources(name):
            apart |= pack(wide.stored.read(source), source, nested=False)[0]
        whole |= pack(wide.tensors.read(name), name, nested=False)[0]
    for state in (apart, whole):
        part = find_part(StateDict(state, "a state dict"), "transformer")
        assert part is not None
        for name in JOINED:
            part.tensors.check(name)
            ours = part.tensors.read_nf4(name)
            assert torch.equal(ours.packed.view(-1, 1), whole[name])
            assert torch.equal(ours.absmax.flatten(), whole[f"{name}.absmax"])


def test_nested_nf4_as_bitsandbytes_writes_it(wide: Part) -> None:
    """Packed apart, each with scales of its own, and joined: what bitsandbytes decodes them to."""
    packed: dict[str, Tensor] = {"transformer_blocks.0.attn.to_q.weight": torch.zeros(64, 64)}
    expected = {}
    for name in JOINED:
        decoded = []
        for source in flux_sources(name):
            state, quantized = pack(wide.stored.read(source), source, nested=True)
            packed |= state
            decoded.append(bnb.dequantize_4bit(state[source], quantized))
        if name == FINAL:
            decoded = [*decoded[0].chunk(2)[::-1]]
        expected[name] = torch.cat(decoded)
    part = find_part(StateDict(packed, "a state dict"), "transformer")
    assert part is not None
    for name in JOINED:
        part.tensors.check(name)
        assert torch.equal(nf4.dequantize(part.tensors.read_nf4(name), torch.float32), expected[name])


def pack(weight: Tensor, name: str, *, nested: bool) -> tuple[dict[str, Tensor], bnb.QuantState]:
    """bitsandbytes' state dict of a weight, and its own state to decode it to fp32 with."""
    packed, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=nested)
    parts = {f"{name}.{key}": value.contiguous() for key, value in state.as_dict(packed=True).items()}
    state.dtype = torch.float32
    return parts | {name: packed}, state


@pytest.mark.parametrize("scaled", [False, True])
def test_fp8(wide: Part, tmp_path: Path, scaled: bool) -> None:
    tensors, expected = {WITNESS: torch.zeros(64, 64).to(torch.float8_e4m3fn)}, {}
    for name in ALONE:
        weight = wide.tensors.read(name).float()
        scale = weight.abs().max() / 448 if scaled else torch.tensor(1.0)
        tensors[name] = (weight / scale).to(torch.float8_e4m3fn)
        expected[name] = tensors[name].float() * scale
        if scaled:
            tensors[name.replace(".weight", ".scale_weight")] = scale
    save_file(tensors, tmp_path / "fp8.safetensors")
    part = part_of(tmp_path / "fp8.safetensors")
    for name in ALONE:
        part.tensors.check(name)
        assert torch.equal(part.tensors.read(name).float(), expected[name])
    requantizes(part, PROJ)


@pytest.mark.parametrize("kind", ["F16", "Q8_0", "Q4_0", *K_QUANTS])
def test_gguf(wide: Part, tmp_path: Path, kind: str) -> None:
    gguf = pytest.importorskip("gguf")
    np = pytest.importorskip("numpy")
    quantization = gguf.GGMLQuantizationType[kind]
    tensors = {WITNESS: (np.zeros((64, 64), dtype=np.float32), None)}
    expected = {}
    for name in ALONE:
        n, k = wide.tensors.shape(name)
        if (
            kind in K_QUANTS
        ):  # the package reads these and has no writer: any bytes are blocks, if the scales are numbers
            scales, size = K_QUANTS[kind]
            data = np.random.default_rng(0).integers(0, 256, (n * k // 256, size), dtype=np.uint8)
            data[:, :scales] = np.full(scales // 2, 0.01, dtype=np.float16).view(np.uint8)
            data = data.reshape(n, -1)
        else:
            data = gguf.quantize(wide.tensors.read(name).float().numpy(), quantization)
        expected[name] = torch.from_numpy(gguf.dequantize(data, quantization).copy()).view(n, k)
        tensors[name] = data, quantization
    part = part_of(write_gguf(tmp_path / "flux.gguf", "flux", tensors))
    assert kind in part.words
    for name in ALONE:
        part.tensors.check(name)
        assert part.tensors.shape(name) == wide.tensors.shape(name)
        assert torch.equal(part.tensors.read(name), expected[name])
    requantizes(part, PROJ)
