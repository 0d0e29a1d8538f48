"""Quantized once in a file's life: the cache, the NF4 writer, and the commands over them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from engine_parts import painter_of
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from vortex_core import Engine, VortexCheckpointError, VortexInputError, load_flux_schnell, nf4
from vortex_core.checkpoint import cache as cache_module
from vortex_core.checkpoint.bundle import find_parts
from vortex_core.checkpoint.cache import Cache, identity
from vortex_core.checkpoint.quantize import quantize_file
from vortex_core.cli.inspection import inspect
from vortex_core.cli.main import app
from vortex_core.errors import VortexWarning
from vortex_core.flux1.conditioning import Modulation
from vortex_core.flux1.spec import FluxSpec
from vortex_core.flux1.transformer import Transformer

runner = CliRunner()
DRAW = {"seed": 1, "height": 64, "width": 64, "steps": 1}
PROMPT = "a red circle"


@pytest.fixture
def cached(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A cache folder that takes the miniature too."""
    monkeypatch.setattr(cache_module, "SMALLEST", 0)
    return tmp_path / "cache"


def test_the_second_load_quantizes_nothing(
    cached: Path, tiny_dir: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = engine.generate(PROMPT, **DRAW)
    calls = []
    first = load_flux_schnell(tiny_dir, device="cpu", cache_dir=cached, on_progress=lambda *call: calls.append(call))
    assert torch.equal(first.generate(PROMPT, **DRAW), expected)
    assert calls[-1][0] == calls[-1][1]
    kinds = sorted(entry.kind for entry in Cache(cached).entries())
    assert kinds == ["t5", "transformer"]
    monkeypatch.setattr(nf4, "quantize", lambda *a: pytest.fail("quantized again"))
    second = load_flux_schnell(tiny_dir, device="cpu", cache_dir=cached)
    assert torch.equal(second.generate(PROMPT, **DRAW), expected)


TWICE = """
import sys
from vortex_core import load_flux_schnell
from vortex_core.checkpoint import cache
cache.SMALLEST = 0
load_flux_schnell("tiny", device="cpu", cache_dir=sys.argv[1])
"""


@pytest.mark.slow
def test_two_processes_at_once(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "error", "-c", TWICE, str(tmp_path)]
    both = [subprocess.Popen(command, cwd=Path(__file__).parents[1]) for _ in range(2)]
    assert [process.wait(timeout=300) for process in both] == [0, 0]
    assert len(Cache(tmp_path).entries()) == 2
    assert not any(differs for _, differs in Cache(tmp_path).damaged())
    assert not list(tmp_path.glob(".*.part"))


def test_small_models_are_not_kept(tmp_path: Path, tiny_dir: Path) -> None:
    load_flux_schnell(tiny_dir, device="cpu", cache_dir=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_identity_follows_content_not_place(tmp_path: Path, tiny_dir: Path) -> None:
    source = tiny_dir / "vae" / "diffusion_pytorch_model.safetensors"
    copy = tmp_path / "other name.safetensors"
    shutil.copy2(source, copy)
    assert identity([copy]) == identity([source])
    data = bytearray(copy.read_bytes())
    data[-1] ^= 1
    copy.write_bytes(data)
    os.utime(copy, ns=(source.stat().st_atime_ns, source.stat().st_mtime_ns))
    assert identity([copy]) != identity([source])


def test_a_cache_that_cannot_be_written_costs_only_time(
    cached: Path, tiny_dir: Path, monkeypatch: pytest.MonkeyPatch, engine: Engine
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache_module, "write_nf4", full)
    with pytest.warns(VortexWarning, match="No space left on device.*VORTEX_CACHE can name"):
        drawn = load_flux_schnell(tiny_dir, device="cpu", cache_dir=cached).generate(PROMPT, **DRAW)
    assert torch.equal(drawn, engine.generate(PROMPT, **DRAW))
    assert not list(cached.glob("*.part"))


def test_a_crash_leaves_nothing_half_written(tmp_path: Path, tiny_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count = iter(range(5))

    def crash(*arguments: object) -> None:
        if next(count) == 3:
            raise KeyboardInterrupt
        return real(*arguments)

    real = nf4.quantize
    monkeypatch.setattr(nf4, "quantize", crash)
    with pytest.raises(KeyboardInterrupt):
        quantize_file(tiny_dir, tmp_path / "out.safetensors", device="cpu")
    assert not list(tmp_path.iterdir())


def test_the_least_used_go_first(cached: Path, tiny_dir: Path) -> None:
    load_flux_schnell(tiny_dir, device="cpu", cache_dir=cached)
    kept = Cache(cached, limit=0)
    entries = kept.entries()
    keep = entries[-1].path
    os.utime(keep, (time.time(), time.time() - 1000))
    kept.shrink(keep=keep)
    assert [entry.path for entry in kept.entries()] == [keep]


def test_cache_commands(cached: Path, tiny_dir: Path) -> None:
    load_flux_schnell(tiny_dir, device="cpu", cache_dir=cached)
    at = ["--cache-dir", str(cached)]
    assert "transformer" in runner.invoke(app, ["cache", "list", *at]).output
    assert runner.invoke(app, ["cache", "verify", *at]).exit_code == 0
    path = Cache(cached).entries()[0].path
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    damaged = runner.invoke(app, ["cache", "verify", *at])
    assert damaged.exit_code == 1
    assert "DAMAGED" in damaged.output
    assert "freed 0.01 GB" in runner.invoke(app, ["cache", "clear", *at]).output
    assert "nothing is kept" in runner.invoke(app, ["cache", "list", *at]).output


def test_quantize_writes_a_file_that_draws_the_same(tmp_path: Path, tiny_dir: Path, engine: Engine) -> None:
    target = tmp_path / "nf4.safetensors"
    said = runner.invoke(app, ["quantize", str(tiny_dir), str(target), "--device", "cpu"])
    assert said.exit_code == 0, said.output
    parts = {"clip": tiny_dir / "text_encoder", "t5": tiny_dir / "text_encoder_2", "vae": tiny_dir / "vae"}
    with load_flux_schnell(target, device="cpu", tokenizers=tiny_dir, **parts) as other:
        assert torch.equal(other.generate(PROMPT, **DRAW), engine.generate(PROMPT, **DRAW))
    again = tmp_path / "again.safetensors"
    quantize_file(target, again, device="cpu")
    first, second = load_file(target), load_file(again)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    refused = runner.invoke(app, ["quantize", str(tiny_dir), str(target)])
    assert refused.exit_code == 2
    assert "add --overwrite" in refused.output
    assert runner.invoke(app, ["quantize", str(tiny_dir), str(tmp_path / "x.bin")]).exit_code == 2
    with pytest.raises(VortexCheckpointError, match="does not hold the transformer"):
        quantize_file(tiny_dir / "vae" / "diffusion_pytorch_model.safetensors", tmp_path / "y.safetensors")


KILLED = """
import os, signal, sys
from vortex_core import quantize
from vortex_core.checkpoint import write
put = write._Writer.put
write._Writer.put = lambda writer, chunk: (put(writer, chunk), os.kill(os.getpid(), signal.SIGKILL))
quantize.quantize_file(sys.argv[1], sys.argv[2], device="cpu")
"""


def test_a_killed_quantize_can_be_run_again(tmp_path: Path, tiny_dir: Path) -> None:
    folder, arguments = tmp_path / "nf4", [str(tiny_dir), str(tmp_path / "nf4")]
    killed = subprocess.run([sys.executable, "-c", KILLED, *arguments], cwd=Path(__file__).parents[1])
    assert killed.returncode == -9
    (left,) = folder.iterdir()  # a half of the weights

    def again() -> tuple[int, set[str]]:
        code = runner.invoke(app, ["quantize", *arguments, "--device", "cpu"]).exit_code
        return code, {path.name for path in folder.iterdir()}

    (folder / "config.json").write_text("{}")  # killed between the two renames
    (folder / "notes.txt").touch()
    assert again()[0] == 2  # somebody's
    (folder / "notes.txt").unlink()
    alive = folder / left.name.replace(left.name.split("-")[2], str(os.getpid()))
    alive.touch()
    assert again()[0] == 2  # another process is at it
    alive.unlink()
    assert again() == (0, {"config.json", "diffusion_pytorch_model.safetensors"})
    assert again()[0] == 2  # whole
    for path in folder.iterdir():
        path.unlink()
    (folder / "config.json").write_text("{}")
    assert again() == (2, {"config.json"})  # nothing of ours beside it
    (folder / "config.json").unlink()
    assert again()[0] == 0


def test_a_failed_quantize_leaves_nothing_of_its_own(
    tmp_path: Path, tiny_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        (tmp_path / "nf4" / "notes.txt").touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vortex_core.checkpoint.quantize.check_unchanged", fail)
    with pytest.raises(OSError, match="No space left"):
        quantize_file(tiny_dir, tmp_path / "nf4", device="cpu")
    assert [path.name for path in (tmp_path / "nf4").iterdir()] == ["notes.txt"]  # which somebody put there


def test_quantize_writes_a_folder_for_diffusers(tmp_path: Path, tiny_dir: Path) -> None:
    """Its names, its packed modules and no others, and back into Vortex bit for bit."""
    from diffusers import BitsAndBytesConfig, FluxTransformer2DModel
    from diffusers.quantizers.bitsandbytes.utils import replace_with_bnb_linear

    folder = tmp_path / "FLUX.1-schnell-nf4"
    said = runner.invoke(app, ["quantize", str(tiny_dir), str(folder), "--device", "cpu"])
    assert said.exit_code == 0, said.output
    written = load_file(folder / "diffusion_pytorch_model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    quantization = BitsAndBytesConfig.from_dict(config.pop("quantization_config"))
    with torch.device("meta"):
        model = FluxTransformer2DModel.from_config(config)
        kept = quantization.llm_int8_skip_modules
        model = replace_with_bnb_linear(model, modules_to_not_convert=kept, quantization_config=quantization)
    named = dict(model.named_modules())
    packed = {name for name in named if type(named[name]).__name__ == "Linear4bit"}
    assert {key.partition(".weight.quant_state")[0] for key in written if "quant_state" in key} == packed
    parts = (".absmax", ".quant_map", ".bitsandbytes__nf4")
    assert {key for key in written if not key.endswith(parts)} == model.state_dict().keys()
    single = quantize_file(tiny_dir, tmp_path / "single.safetensors", device="cpu")
    ours, theirs = (find_parts(path, {})[0]["transformer"].tensors for path in (single, folder))
    for name in (n for n in ours.names() if not n.startswith("final_layer.linear.weight")):
        assert torch.equal(ours.read(name), theirs.read(name))
    with pytest.raises(VortexInputError, match="holds other files"):
        quantize_file(single, tiny_dir, device="cpu")


def test_bitsandbytes_reads_what_we_write(tmp_path: Path, tiny_dir: Path) -> None:
    from bitsandbytes.functional import QuantState, dequantize_4bit

    path = quantize_file(tiny_dir, tmp_path / "nf4.safetensors", device="cpu")
    tensors, name = load_file(path), "single_blocks.0.linear1.weight"
    parts = {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}
    state = QuantState.from_dict(parts, device=torch.device("cpu"))
    packed = nf4.NF4Weight(tensors[name].view(state.shape[0], -1), tensors[f"{name}.absmax"].view(state.shape[0], -1))
    assert torch.equal(dequantize_4bit(tensors[name], state), nf4.dequantize(packed, torch.bfloat16))


def test_inspect_says_what_it_is(tmp_path: Path, tiny_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vortex_core.checkpoint.tokenizer._cached", lambda homes: None)
    said = runner.invoke(app, ["inspect", str(tiny_dir)]).output
    for words in ("diffusers names, bf16", "step-time weights, on the GPU", "a budget of 6.5 GB leaves"):
        assert words in " ".join(said.split())
    report = json.loads(runner.invoke(app, ["inspect", str(tiny_dir), "--json"]).stdout)
    assert report["missing"] == []
    vae = inspect(tiny_dir / "vae" / "diffusion_pytorch_model.safetensors")
    assert [part.kind for part in vae.found] == ["vae"]
    assert [what.partition(" (")[0] for what in vae.missing] == [
        "the transformer", "CLIP's text encoder", "the T5 encoder", "CLIP's tokenizer", "T5's tokenizer"
    ]  # fmt: skip
    assert vae.placement == {}
    file = str(tiny_dir / "vae" / "diffusion_pytorch_model.safetensors")
    for tokenizers, lacks in ((str(tiny_dir), False), ("", True), (str(tmp_path), True)):
        said = runner.invoke(app, ["inspect", file, "--tokenizers", tokenizers, "--json"]).stdout
        assert ("tokenizer" in str(json.loads(said)["missing"])) is lacks
    assert not any("tokenizer" in what for what in inspect(file, tokenizers=tiny_dir).missing)
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(VortexCheckpointError, match="no part of FLUX"):
        inspect(tmp_path / "other.safetensors")
    assert runner.invoke(app, ["inspect", str(tmp_path / "missing")]).exit_code == 1


@pytest.mark.parametrize("form", ["bf16", "fp8", "NF4", "GGUF"])
def test_inspect_reads_headers_only(tmp_path: Path, form: str, bytes_read: list[int]) -> None:
    """A file of the real sizes that is all holes: its bytes are not there to be read."""
    with torch.device("meta"):
        halves = (Transformer(FluxSpec()), Modulation(FluxSpec()))
    tensors = {name: tuple(p.shape) for half in halves for name, p in half.named_parameters()}
    path = tmp_path / f"flux1-schnell.{'gguf' if form == 'GGUF' else 'safetensors'}"
    (sparse_gguf if form == "GGUF" else sparse_safetensors)(path, tensors, form)
    assert path.stat().st_size > 6e9
    assert path.stat().st_blocks * 512 < 50e6
    seen = inspect(path)
    assert sum(bytes_read) < 2e6
    (found,) = seen.found
    assert form in found.words
    assert found.nbytes == pytest.approx(path.stat().st_size, rel=0.01)
    assert seen.placement["step-time weights, on the GPU"] == pytest.approx(4.87e9, rel=0.01)


def sparse_safetensors(path: Path, tensors: dict[str, tuple[int, ...]], form: str) -> None:
    entries: list[tuple[str, str, list[int], bytes | int]] = []
    for name, shape in tensors.items():
        values = torch.Size(shape).numel()
        if form == "NF4" and len(shape) == 2:
            state = json.dumps({"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": shape}).encode()
            entries.append((name, "U8", [values // 2, 1], values // 2))
            entries.append((f"{name}.absmax", "F32", [values // 64], values // 16))
            entries.append((f"{name}.quant_map", "F32", [16], 64))
            entries.append((f"{name}.quant_state.bitsandbytes__nf4", "U8", [len(state)], state))
        elif form == "fp8" and len(shape) == 2:
            entries.append((name, "F8_E4M3", [*shape], values))
        else:
            entries.append((name, "BF16", [*shape], values * 2))
    header, offset, filled = {}, 0, {}
    for name, dtype, shape, data in entries:
        size = data if isinstance(data, int) else len(data)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + size]}
        if isinstance(data, bytes):
            filled[offset] = data
        offset += size
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for at, data in filled.items():
            file.seek(8 + len(text) + at)
            file.write(data)
        file.truncate(8 + len(text) + offset)


def sparse_gguf(path: Path, tensors: dict[str, tuple[int, ...]], form: str) -> None:
    gguf, np = pytest.importorskip("gguf"), pytest.importorskip("numpy")
    writer = gguf.GGUFWriter(path, "flux")
    for name, shape in tensors.items():
        values, is_linear = torch.Size(shape).numel(), len(shape) == 2
        kind = gguf.GGMLQuantizationType["Q8_0" if is_linear else "F32"]
        bytes_a_row = shape[-1] // 32 * 34 if is_linear else shape[-1] * 4
        nbytes = values // shape[-1] * bytes_a_row
        writer.add_tensor_info(name, [*shape[:-1], bytes_a_row], np.dtype(np.uint8), nbytes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    size = sum(torch.Size(s).numel() * (34 / 32 if len(s) == 2 else 4) // 32 * 32 + 32 for s in tensors.values())
    os.truncate(path, path.stat().st_size + int(size))


def test_the_plan_is_what_loading_takes(tiny_dir: Path, engine: Engine) -> None:
    planned = inspect(tiny_dir).placement["step-time weights, on the GPU"]
    plain = sum(p.numel() * 2 for p in painter_of(engine).model.transformer.parameters())  # fp32 here, counted in bf16
    actual = engine.step_time_bytes - plain
    assert planned == pytest.approx(actual, rel=0.01)


def test_fetch_downloads_only_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked = []
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *file: asked.append(file) or f"cache/{file[1]}")
    said = runner.invoke(app, ["fetch", "tokenizers"])
    assert said.exit_code == 0
    assert len(asked) == 2
