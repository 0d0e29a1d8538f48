"""The loader and what stands behind it, without ComfyUI: the models it finds, the engines it keeps, their VRAM."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import pytest
import stand_in
import torch
from fake_host import PACK, FakeHost, module, node
from safetensors.torch import load_file, save_file

from vortex_core import load_flux_schnell

engines, files, host = module("nodes.engines"), module("nodes.files"), module("nodes.host")
models, types, errors = module("nodes.models"), module("nodes.types"), module("vortex_core.errors")
look, TINY = files.look, module("vortex_core.checkpoint.bundle").TINY


def test_loading_again_does_not_load_again(comfy: FakeHost, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "_load", lambda model: pytest.fail("loaded again"))
    again, *_ = node("VortexFluxLoader").load(models.BUNDLED, 8.0, "exact")
    assert again.key == model.key
    assert engines.acquire(model) is engines.acquire(again)


def test_loading_reports_progress(comfy: FakeHost, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "_loaded", type(engines._loaded)())
    engines.acquire(models.find(models.BUNDLED, 6.5, "exact"))
    steps = [done for done, _, _ in comfy.progress[-1]]
    assert steps == sorted(steps)
    assert steps[-1] == 1000


@pytest.mark.slow
def test_two_models_alternate_and_a_third_replaces_the_oldest(
    comfy: FakeHost, model: Any, tiny_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads = []
    load = engines._load
    monkeypatch.setattr(engines, "_load", lambda model: (loads.append(model.name), load(model))[1])
    for name in ("one", "two"):
        shutil.copytree(tiny_dir, comfy.models / "vortex" / name)
    one, two = (models.find(f"vortex/{name}", 6.5, "exact") for name in ("one", "two"))
    for handle in (one, model, one, model):
        engines.acquire(handle)
    assert loads == ["vortex/one"]
    engines.acquire(two)
    assert list(engines._loaded) == [model.key, two.key]
    engines.acquire(one)
    assert loads == ["vortex/one", "vortex/two", "vortex/one"]
    shutil.rmtree(comfy.models / "vortex")
    engines.acquire(model)


def test_a_changed_file_is_another_model(comfy: FakeHost, tiny_dir: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny_dir, tmp_path / "copy")
    before = files.fingerprint(copy)
    assert files.fingerprint(copy) == before
    (copy / "vae" / "config.json").write_text("{}")
    assert files.fingerprint(copy) != before


HOSTILE = (
    "..", "../..", "/etc", "/etc/passwd", "vortex/../../..", "vortex/..", "diffusers//etc", "C:\\Windows", "C:/Windows",
    "\\\\server\\share", "vortex\\..\\..", "vortex/NUL", "CON", "a\0b", "vortex/one\0", "~", "~root", "file:///etc/passwd",
    "", " ", "tiny", "tiny-schnell/..", "$HOME", "%2e%2e%2f", "vortex/\N{FULLWIDTH FULL STOP}\N{FULLWIDTH FULL STOP}",
)  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("where", ["model", "clip_l", "t5xxl", "vae"])
def test_no_name_leads_out_of_the_list(comfy: FakeHost, name: str, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = {"model": models.BUNDLED, "vram_budget": 6.5, "mode": "exact", where: name}
    monkeypatch.setattr(files, "look", lambda path: pytest.fail(f"read {path}") if path != TINY else look(path))
    for ask in (node("VortexFluxLoader").load, PACK.NODE_CLASS_MAPPINGS["VortexFluxLoader"].IS_CHANGED):
        with pytest.raises(errors.VortexInputError, match=r"There is no (model|file)"):
            ask(**inputs)


# ---------------------------------------------------------------- files


@pytest.fixture
def shelf(comfy: FakeHost, tiny_dir: Path) -> Iterator[Path]:
    """The host's model folders with the parts of a model in single files, and the host's tokenizers."""
    stand_in.write_parts(tiny_dir, comfy.models)
    for source, target in (("tokenizer", "sd1_tokenizer"), ("tokenizer_2", "text_encoders/t5_tokenizer")):
        shutil.copytree(tiny_dir / source, comfy.comfy / target)
    yield comfy.models
    shutil.rmtree(comfy.models)
    shutil.rmtree(comfy.comfy)


FILE = "diffusion_models/flux1-schnell.safetensors"


def test_a_single_file_takes_the_parts_that_fit_and_the_hosts_tokenizers(
    comfy: FakeHost, shelf: Path, tiny_dir: Path
) -> None:
    assert models.available() == [models.BUNDLED, FILE]
    assert [models.choices(part) for part in ("clip", "t5", "vae")] == [
        [models.OWN, "clip_l.safetensors"], [models.OWN, "t5xxl_fp16.safetensors"], [models.OWN, "ae.safetensors"],
    ]  # fmt: skip
    handle, *_ = node("VortexFluxLoader").load(FILE, 6.5, "exact")
    chosen, *_ = node("VortexFluxLoader").load(
        FILE, 6.5, "exact", "clip_l.safetensors", "t5xxl_fp16.safetensors", "ae.safetensors"
    )
    assert handle == chosen
    own = load_flux_schnell(
        shelf / FILE, clip=shelf / "text_encoders/clip_l.safetensors", t5=shelf / "clip/t5xxl_fp16.safetensors",
        vae=shelf / "vae/ae.safetensors", tokenizers=tiny_dir, device="cpu",
    )  # fmt: skip
    draw = {"seed": 7, "height": 64, "width": 64, "steps": 1}
    assert torch.equal(engines.acquire(handle).generate("a ring", **draw), own.generate("a ring", **draw))
    (shelf / "vae/ae.safetensors").touch()
    assert models.find(FILE, 6.5, "exact").fingerprint != handle.fingerprint


def test_all_in_one_files_and_folders_are_found_where_people_put_them(
    comfy: FakeHost, shelf: Path, tiny_dir: Path
) -> None:
    whole = "checkpoints/flux/flux1-schnell-fp8.safetensors"
    stand_in.write_checkpoint(tiny_dir, shelf / whole)
    shutil.copytree(tiny_dir, shelf / "vortex/sub/folder")
    for place in ("unet/other.safetensors", "vortex/third.safetensors", "vortex/cache/transformer-0.safetensors"):
        (shelf / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(shelf / FILE, shelf / place)
    assert models.available() == [
        *(models.BUNDLED, "vortex/sub/folder", "vortex/third.safetensors", "diffusion_models/other.safetensors"),
        *(FILE, whole),
    ]  # fmt: skip
    assert models.find(whole, 6.5, "exact").parts == ()
    given = models.find(whole, 6.5, "exact", vae="ae.safetensors")
    assert given.parts == (("vae", shelf / "vae/ae.safetensors"),)
    assert given.key != models.find(whole, 6.5, "exact").key


def test_files_of_other_models_are_not_listed(comfy: FakeHost, shelf: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    folder = shelf / "diffusion_models"
    weights = load_file(shelf / FILE)
    save_file(weights | {"guidance_in.in_layer.weight": torch.zeros(1)}, folder / "flux1-dev.safetensors")
    save_file({name: t for name, t in weights.items() if "vector_in" not in name}, folder / "chroma.safetensors")
    save_file({"conv_in.weight": torch.zeros(1)}, folder / "sdxl.safetensors")
    (folder / "half.safetensors").write_bytes((shelf / FILE).read_bytes()[:5000])
    (folder / "evil.ckpt").write_bytes(b"\x80\x04")
    (folder / "weird.safetensors").write_bytes(b"")
    assert models.available() == [models.BUNDLED, FILE]
    assert "FLUX.1-dev" in caplog.text
    said = len(caplog.records)
    models.available()
    assert len(caplog.records) == said  # headers are read once, and each is spoken of once


def test_headers_are_read_again_only_when_a_file_changes(
    comfy: FakeHost, shelf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models.available()
    read = []
    monkeypatch.setattr(files, "look", lambda path: (read.append(path.name), look(path))[1])
    models.available()
    assert read == []
    (shelf / FILE).touch()
    models.available()
    assert read == ["flux1-schnell.safetensors"]


def test_a_part_that_is_missing_or_not_certain_is_asked_for_in_words(comfy: FakeHost, shelf: Path) -> None:
    shutil.copy(shelf / "clip/t5xxl_fp16.safetensors", shelf / "text_encoders/t5xxl_other.safetensors")
    with pytest.raises(errors.VortexInputError, match=r"T5 encoder.*t5xxl_other.*t5xxl_fp16.*choose one"):
        models.find(FILE, 6.5, "exact")
    models.find(FILE, 6.5, "exact", t5="t5xxl_other.safetensors")
    (shelf / "vae/ae.safetensors").unlink()
    with pytest.raises(errors.VortexInputError, match=r"VAE.*Put it into models/vae"):
        models.find(FILE, 6.5, "exact", t5="t5xxl_other.safetensors")


def test_parts_of_another_size_are_no_candidates_and_are_refused_in_words(comfy: FakeHost, shelf: Path) -> None:
    other = load_file(shelf / "vae/ae.safetensors")
    other["decoder.conv_in.weight"] = other["decoder.conv_in.weight"][:, :4].contiguous()  # as SD's VAE has
    save_file(other, shelf / "vae/sd.safetensors")
    assert models.find(FILE, 6.5, "exact").parts[-1] == ("vae", shelf / "vae/ae.safetensors")
    handle = models.find(FILE, 6.5, "exact", vae="sd.safetensors")
    with pytest.raises(errors.VortexCheckpointError, match="takes 16 channels and not 4"):
        engines.acquire(handle)


def write_gguf(path: Path, architecture: str, tensors: dict[str, torch.Tensor]) -> None:
    writer = gguf.GGUFWriter(path, architecture)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf_is_listed_by_its_header_and_says_what_it_needs(
    comfy: FakeHost, shelf: Path, tiny_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (shelf / "unet").mkdir()
    write_gguf(shelf / "unet/schnell.gguf", "flux", stand_in.transformer(tiny_dir))
    write_gguf(shelf / "unet/qwen.gguf", "qwen2", stand_in.transformer(tiny_dir))  # as if it were a language model
    name = "diffusion_models/schnell.gguf"
    assert models.available() == [models.BUNDLED, name, FILE]
    models.find(name, 6.5, "exact")
    monkeypatch.setitem(sys.modules, "gguf", None)
    monkeypatch.setattr(files, "find_spec", lambda name: None)
    files._known.clear()
    assert models.available() == [models.BUNDLED, name, FILE]
    with pytest.raises(errors.VortexCheckpointError, match=r"pip install 'vortex-flux\[gguf\]'"):
        models.find(name, 6.5, "exact")


def test_quantized_weights_are_kept_in_the_hosts_folder(
    comfy: FakeHost, shelf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module("vortex_core.checkpoint.cache"), "SMALLEST", 0)
    engines.acquire(models.find(FILE, 6.5, "exact"))
    kept = [path.name for path in (shelf / "vortex/cache").glob("*.safetensors")]
    assert sorted(name.partition("-")[0] for name in kept) == ["t5", "transformer"]
    assert models.available() == [models.BUNDLED, FILE]
    monkeypatch.setenv("VORTEX_CACHE", "")
    assert host.cache_dir() == shelf / "vortex/cache"
    monkeypatch.setenv("VORTEX_CACHE", "~/elsewhere")
    assert host.cache_dir() is None  # which is `Engine.load`'s way to ask for it


def test_links_do_not_lead_out_of_the_model_folders(
    comfy: FakeHost, tiny_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = comfy.models / "vortex"
    folder.mkdir(parents=True)
    (folder / "outside").symlink_to(tiny_dir, target_is_directory=True)
    real = shutil.copytree(tiny_dir, folder / "real")
    (folder / "inside").symlink_to(real, target_is_directory=True)
    (folder / "empty").mkdir()
    (folder / "empty" / "again").symlink_to(folder, target_is_directory=True)  # a circle
    (tmp_path / "outside.safetensors").write_bytes(b"")
    (folder / "file.safetensors").symlink_to(tmp_path / "outside.safetensors")
    assert models.available() == [models.BUNDLED, "vortex/inside", "vortex/real"]
    warned = [record.getMessage().split("'")[1] for record in caplog.records]
    assert warned == [str(folder / "file.safetensors"), str(folder / "outside")]
    assert "extra_model_paths.yaml" in caplog.text
    models.available()
    assert len(caplog.records) == 2  # said once

    secret = tmp_path / "secret.json"
    secret.write_text("{}")
    (real / "vae" / "config.json").unlink()
    (real / "vae" / "config.json").symlink_to(secret)
    with pytest.raises(errors.VortexCheckpointError, match="leads out of its model folder"):
        models.find("vortex/real", 6.5, "exact")
    shutil.rmtree(folder)


def test_a_budget_larger_than_the_card_is_refused_before_others_make_room(
    comfy: FakeHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *device: (10**9, 8 * 10**9))
    card = SimpleNamespace(type="cuda")
    engines.check_budget(types.Model("big", "tiny", "", 6.5, "exact"), card)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *device: (10**9, 4 * 10**9))
    with pytest.raises(errors.VortexInputError, match=r"6\.5 GB, but the card has 4\.00 GB"):
        engines.check_budget(types.Model("big", "tiny", "", 6.5, "exact"), card)


def test_another_budget_reaches_the_engine_without_loading_again(
    comfy: FakeHost, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engines.acquire(model)
    told: list[float] = []
    monkeypatch.setattr(engine, "limit", told.append, raising=False)
    assert engines.acquire(replace(model, vram_budget=5.0)) is engine
    assert engines.acquire(replace(model, vram_budget=5.0)) is engine
    assert told == [5.0]
    engines.acquire(model)


def test_the_least_recently_used_leaves_the_card_where_budgets_do_not_fit(
    comfy: FakeHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone: list[str] = []

    def stub(name: str, budget: float) -> Any:
        engine = SimpleNamespace(name=name, resident=True, offload=lambda: gone.append(name))
        return engines.Loaded(engine, None, int(budget * 1e9))

    table = {(name, "exact"): stub(name, budget) for name, budget in (("a", 6), ("b", 6), ("c", 6))}
    monkeypatch.setattr(engines, "_loaded", type(engines._loaded)(table))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *device: (0, 16 * 10**9))
    engines._offload_others(types.Model("c", "", "c", 6.0, "exact"), SimpleNamespace(type="cuda"))
    assert gone == ["a"]


def test_out_of_memory_reaches_the_host_as_torchs_own(comfy: FakeHost, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*arguments: Any, **options: Any) -> None:
        raise errors.VortexInitializationError(
            "Loading ran out of memory", needed=1, free=0, total=1, allocated=0, remedy="Close something."
        ) from torch.OutOfMemoryError()

    monkeypatch.setattr(engines, "_loaded", type(engines._loaded)())
    monkeypatch.setattr(module("vortex_core.runtime.engine").Engine, "load", load)
    with pytest.raises(torch.OutOfMemoryError, match="Close something"):
        engines.acquire(models.find(models.BUNDLED, 6.5, "exact"))
    assert not engines._loaded


# ---------------------------------------------------------------- residency


class StubEngine:
    """An engine that only counts."""

    def __init__(self) -> None:
        self.resident, self.size, self.moves = True, 1000, []
        self.device = torch.device("cpu")

    @property
    def device_bytes(self) -> int:
        return self.size if self.resident else 0

    def offload(self) -> int:
        freed, self.resident = self.device_bytes, False
        self.moves.append("offload")
        return freed

    def resume(self) -> None:
        self.resident = True
        self.moves.append("resume")


def test_the_host_moves_an_engine_whole_and_hears_its_true_size(comfy: FakeHost) -> None:
    engine = StubEngine()
    patcher = host.register(engine)
    assert (patcher.model_size(), patcher.loaded_size()) == (1000, 1000)
    assert patcher.partially_unload(torch.device("cpu"), 10) == 0  # so that the host asks for all of it
    assert patcher.detach(False) is patcher.model
    assert engine.moves == []  # each repeated load asks this
    patcher.detach()
    assert (patcher.model_size(), patcher.loaded_size()) == (1000, 0)
    assert patcher.current_loaded_device() == patcher.offload_device
    assert patcher.partially_load(torch.device("cpu"), 10, force_patch_weights=False) == 1000
    assert engine.moves == ["offload", "resume"]
    engine.size = 1200  # a new picture size
    assert patcher.model_size() == 1200


def test_every_use_asks_the_host_for_what_the_budget_leaves(comfy: FakeHost, model: Any) -> None:
    engines.acquire(model)
    assert [working for _, working in comfy.asked[-1:]] == [int(6.5e9)]  # nothing is on a device here
