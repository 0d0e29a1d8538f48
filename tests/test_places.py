"""Whatever lies in the host's model folders: lists are made in a moment, and what is passed over has its reason."""

from __future__ import annotations

import logging
import os
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import stand_in
import torch
from fake_host import PACK, FakeHost, module, node
from safetensors.torch import load_file, save_file

files, host, models = module("nodes.files"), module("nodes.host"), module("nodes.models")
places, errors = module("nodes.places"), module("vortex_core.errors")
LOADER = PACK.NODE_CLASS_MAPPINGS["VortexFluxLoader"]
FILE = "diffusion_models/flux1-schnell.safetensors"


@pytest.fixture
def shelf(comfy: FakeHost, tiny_dir: Path) -> Iterator[Path]:
    """The host's model folders with the parts of a model in single files."""
    folders = {kind: list(paths) for kind, paths in comfy.folders.items()}
    stand_in.write_parts(tiny_dir, comfy.models)
    for memory in (places._said, places._known, files._known):
        memory.clear()
    yield comfy.models
    comfy.folders.clear()
    comfy.folders.update(folders)
    remove(comfy.models)


def remove(folder: Path) -> None:
    """`shutil.rmtree` recurses as deep as folders do."""
    while (deep := folder / "checkpoints/deep").is_dir():
        below = deep / "deep"
        if not below.is_dir():
            deep.rmdir()
            break
        below.rename(deep.parent / "next")
        deep.rmdir()
        (deep.parent / "next").rename(deep)
    shutil.rmtree(folder)


def listed() -> list[str]:
    """What the loader offers for `model`."""
    return LOADER.INPUT_TYPES()["required"]["model"][0]


def test_odd_files_and_folders_are_passed_over_and_spoken_of_once(
    comfy: FakeHost, shelf: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = shelf / "checkpoints"
    folder.mkdir()
    (folder / "itself.safetensors").symlink_to("itself.safetensors")
    (folder / "itself").symlink_to("itself")
    (folder / "circle").symlink_to(".")
    (folder / "nothing.safetensors").symlink_to("nowhere")
    os.mkfifo(folder / "pipe.gguf")
    here = os.getcwd()
    os.chdir(folder)
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind("socket.safetensors")
        for _ in range(1_500):
            os.mkdir("deep")
            os.chdir("deep")
    finally:
        os.chdir(here)
    for name in (b"half\xff.safetensors", b"folder\xff"):
        os.mkdir(os.path.join(os.fsencode(folder), name))
    (folder / "._mac.safetensors").write_bytes(b"\0\5\x16\7")
    (folder / "empty.safetensors").touch()
    shut = folder / "shut"
    shut.mkdir(mode=0)
    started = time.process_time()
    assert listed() == [models.BUNDLED, FILE]
    assert time.process_time() - started < 0.5
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    expected = {
        "itself.safetensors": "symbolic links", "nothing.safetensors": "No such file", "pipe.gguf": "no regular file",
        "socket.safetensors": "no regular file", "deep/deep": "folders deep", r"half\udcff.safetensors": "not text",
        r"folder\udcff": "not text",
    }  # fmt: skip
    if os.getuid():  # nothing is shut to root
        expected["shut"] = "Permission denied"
    for name, reason in expected.items():
        assert [line for line in said if name in line and reason in line], name
    assert len(said) == len(expected)
    count = len(caplog.records)
    listed()
    assert len(caplog.records) == count
    with pytest.raises(errors.VortexCheckpointError, match="no regular file"):
        models.find("checkpoints/pipe.gguf", 6.5, "exact")
    with pytest.raises(errors.VortexCheckpointError, match="symbolic links"):
        models.find("checkpoints/itself.safetensors", 6.5, "exact")


def test_a_flood_of_files_does_not_hide_the_others(
    comfy: FakeHost, shelf: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name, value in {"ENTRIES": 300, "FOLDERS": 100}.items():
        monkeypatch.setattr(places, name, value)
    flood = shelf / "diffusion_models/a-flood"
    flood.mkdir()
    for i in range(400):
        (flood / f"{i}.png").touch()
    assert listed() == [models.BUNDLED, FILE]
    assert "holds more than 300 files" in caplog.text
    for i in range(150):
        (shelf / f"diffusion_models/z{i}").mkdir()
    assert listed() == [models.BUNDLED, FILE]
    assert "more than 100 folders" in caplog.text


def test_what_is_not_read_in_a_moment_is_read_for_the_next_list(
    comfy: FakeHost, shelf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"PATIENCE": -60.0, "AT_LEAST": 1}.items():  # the moment is over before it begins
        monkeypatch.setattr(files, name, value)
    for i in range(5):
        shutil.copy(shelf / FILE, shelf / f"diffusion_models/more{i}.safetensors")
    assert len(listed()) == 2
    files._reader.join(10)
    assert len(listed()) == 7
    assert models.find(FILE, 6.5, "exact").parts  # a part is found whatever the list could read


def test_folders_are_looked_through_again_only_where_one_changed(comfy: FakeHost, shelf: Path) -> None:
    long_ago = time.time() - 60
    for folder in (shelf, *shelf.rglob("*")):
        os.utime(folder, (long_ago, long_ago))
    listed()
    walks = dict(places._known)
    listed()
    assert all(places._known[key] is walk for key, walk in walks.items())
    shutil.copy(shelf / FILE, shelf / "diffusion_models/another.safetensors")
    assert "diffusion_models/another.safetensors" in listed()  # and so it is while its clock may stand still
    shutil.copy(shelf / FILE, shelf / "diffusion_models/third.safetensors")
    assert "diffusion_models/third.safetensors" in listed()


# ---------------------------------------------------------------- the host's folders


def test_folders_are_registered_once(comfy: FakeHost, shelf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []

    def forgetful(kind: str, path: str) -> None:
        told.append(kind)
        comfy.folders.setdefault(kind, []).append(path + "/.")  # a host that writes paths in its own way, each time

    monkeypatch.setattr(sys.modules["folder_paths"], "add_model_folder_path", forgetful)
    comfy.folders.pop("vortex", None)
    for _ in range(200):
        listed()
    assert told == ["vortex"]
    assert len(comfy.folders["vortex"]) == 1
    del comfy.folders["vortex"]  # as a host that reads its configuration anew
    assert host.cache_folder() == shelf / "vortex/cache"
    assert told == ["vortex"] * 2
    comfy.folders["checkpoints"] *= 50
    assert host.model_folders("checkpoints") == [shelf / "checkpoints"]


def test_a_kind_of_folder_that_the_host_does_not_know_is_empty(
    comfy: FakeHost, shelf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["folder_paths"], "get_folder_paths", lambda kind: comfy.folders[kind])
    del comfy.folders["diffusers"]
    assert listed() == [models.BUNDLED, FILE]


@pytest.mark.parametrize("named", ["hub", "hub/models--black-forest-labs--FLUX.1-schnell/snapshots"])
def test_a_hugging_face_cache_that_the_host_names_is_a_model_folder(
    comfy: FakeHost, shelf: Path, tiny_dir: Path, tmp_path: Path, named: str
) -> None:
    repo = tmp_path / "hub/models--black-forest-labs--FLUX.1-schnell"
    hug(tiny_dir, repo)
    comfy.folders["diffusers"].append(str(tmp_path / named))
    name = "diffusers/" + str((repo / "snapshots/abc").relative_to(tmp_path / named))
    assert name in listed()
    handle = models.find(name, 6.5, "exact")
    assert LOADER.VALIDATE_INPUTS(name) is True
    (repo / "blobs/0").write_bytes(b"{}")
    assert models.find(name, 6.5, "exact").fingerprint != handle.fingerprint
    secret = tmp_path / "secret"
    secret.mkdir()
    shutil.rmtree(repo / "snapshots/abc/vae")
    (repo / "snapshots/abc/vae").symlink_to(secret)
    with pytest.raises(errors.VortexCheckpointError, match="leads out"):
        models.find(name, 6.5, "exact")


def hug(model: Path, repo: Path) -> None:
    """A model as huggingface_hub keeps it: links to blobs."""
    (repo / "blobs").mkdir(parents=True)
    for i, file in enumerate(sorted(path for path in model.rglob("*") if path.is_file())):
        shutil.copy(file, repo / "blobs" / str(i))
        link = repo / "snapshots/abc" / file.relative_to(model)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(repo / "blobs" / str(i), link.parent))


def test_a_link_to_another_model_folder_is_followed(comfy: FakeHost, shelf: Path) -> None:
    (shelf / "checkpoints").mkdir()
    (shelf / "checkpoints/linked").symlink_to(shelf / "diffusion_models")
    (shelf / "vae/linked.safetensors").symlink_to(shelf / "vae/ae.safetensors")
    assert listed() == [models.BUNDLED, FILE, "checkpoints/linked/flux1-schnell.safetensors"]
    assert models.choices("vae") == [models.OWN, "ae.safetensors", "linked.safetensors"]


# ---------------------------------------------------------------- refused, with the reason


def test_what_is_there_but_refused_gives_its_own_reason(
    comfy: FakeHost, shelf: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    folder = shelf / "checkpoints"
    folder.mkdir()
    weights = load_file(shelf / FILE)
    save_file(weights | {"guidance_in.in_layer.weight": torch.zeros(1)}, folder / "dev.safetensors")
    save_file({"conv_in.weight": torch.zeros(1)}, folder / "sdxl.safetensors")
    (folder / "half.safetensors").write_bytes((shelf / FILE).read_bytes()[:-1000])
    (folder / "half.safetensors.part").write_bytes(b"")
    (folder / "evil.ckpt").write_bytes(b"\x80\x04")
    (folder / "folder").mkdir()
    shutil.copy(shelf / FILE, tmp_path / "outside.safetensors")
    (folder / "link.safetensors").symlink_to(tmp_path / "outside.safetensors")
    assert listed() == [models.BUNDLED, FILE]
    for name, reason in {
        "dev.safetensors": "FLUX.1-dev", "sdxl.safetensors": "no part of FLUX.1-schnell", "half.safetensors": "half",
        "half.safetensors.part": "reads nothing else", "evil.ckpt": "pickle", "link.safetensors": "leads out",
        "folder": "no part of FLUX.1-schnell",
    }.items():  # fmt: skip
        assert reason in str(LOADER.VALIDATE_INPUTS(f"checkpoints/{name}")), name
        with pytest.raises(errors.VortexCheckpointError, match=reason):
            node("VortexFluxLoader").load(f"checkpoints/{name}", 6.5, "exact")
    for name in ("dev", "sdxl", "half", "link"):
        assert [record for record in caplog.records if f"{name}.safetensors'" in record.getMessage()], name
    assert "not in list" in LOADER.VALIDATE_INPUTS("checkpoints/missing.safetensors")
    vae = {"model": FILE, "vae": "ae.safetensors"}
    assert LOADER.VALIDATE_INPUTS(**vae) is True
    save_file({"conv_in.weight": torch.zeros(1)}, shelf / "vae/other.safetensors")
    assert "no part of FLUX.1-schnell" in LOADER.VALIDATE_INPUTS(**vae | {"vae": "other.safetensors"})
    shutil.copy(shelf / "text_encoders/clip_l.safetensors", shelf / "vae/clip.safetensors")
    assert "does not hold the VAE" in LOADER.VALIDATE_INPUTS(**vae | {"vae": "clip.safetensors"})


def test_what_is_linked_is_checked_when_it_is_known(comfy: FakeHost) -> None:
    assert LOADER.VALIDATE_INPUTS(None, None, None, None) is True
    assert LOADER.VALIDATE_INPUTS() is True


def test_gguf_of_another_architecture_is_named(
    comfy: FakeHost, shelf: Path, tiny_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    from specimens import write_gguf

    tensors = {name: (t.float().numpy(), None) for name, t in stand_in.transformer(tiny_dir).items()}
    (shelf / "unet").mkdir()
    for name, architecture in (("language", "qwen2vl"), ("converted", "pig"), ("plain", "flux")):
        write_gguf(shelf / f"unet/{name}.gguf", architecture, tensors)
    assert listed() == [models.BUNDLED, *(f"diffusion_models/{name}.gguf" for name in ("converted", "plain")), FILE]
    assert "'language.gguf' is a GGUF file of 'qwen2vl'" in caplog.text
    assert "qwen2vl" in LOADER.VALIDATE_INPUTS("diffusion_models/language.gguf")


@pytest.mark.parametrize("follows", [b"\x32" + bytes(7) + b"x" * 50, b"", b"a"])
def test_an_architecture_ends_where_its_length_says(tmp_path: Path, follows: bytes) -> None:
    # the length of the key that follows was read as a letter
    start = b"GGUF" + bytes(20) + (20).to_bytes(8, "little") + b"general.architecture"
    (tmp_path / "x.gguf").write_bytes(start + (8).to_bytes(4, "little") + (4).to_bytes(8, "little") + b"flux" + follows)
    assert files._architecture(tmp_path / "x.gguf") == "flux"


@pytest.mark.parametrize("budget", [float("nan"), float("inf"), 0.0, -1.0])
def test_a_budget_that_is_no_size_is_refused(comfy: FakeHost, budget: float) -> None:
    with pytest.raises(errors.VortexInputError, match="vram_budget"):
        models.find(models.BUNDLED, budget, "exact")


def test_a_model_folder_full_of_other_things_is_refused(
    comfy: FakeHost, tiny_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = comfy.models / "vortex/full"
    shutil.copytree(tiny_dir, folder)
    (folder / "broken").symlink_to("nowhere")
    models.find("vortex/full", 6.5, "exact")
    monkeypatch.setattr(files, "MODEL_FILES", 10)
    with pytest.raises(errors.VortexCheckpointError, match="more than 10 files"):
        models.find("vortex/full", 6.5, "exact")
    shutil.rmtree(comfy.models / "vortex")
