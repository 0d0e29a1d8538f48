"""Vortex LoRA on a stand-in for ComfyUI: what it lists, what it refuses and when, and that pictures have the LoRAs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import judge as filled
import judge_outlines
import pytest
import tiny_loras
import torch
from fake_host import PACK, FakeHost, module, node
from safetensors.torch import load_file, save_file
from scenes import Scene, Thing

PROMPT = "a red circle on a white background"
SIDE = 64
NODE = PACK.NODE_CLASS_MAPPINGS["VortexLoRA"]

engines, errors, files = module("nodes.engines"), module("vortex_core.errors"), module("nodes.files")
loras, models, places, types = (module(f"nodes.{name}") for name in ("loras", "models", "places", "types"))


@pytest.fixture
def shelf(comfy: FakeHost) -> Iterator[Path]:
    """The host's folder of LoRAs, with two for the miniature."""
    comfy.folders["loras"] = [str(comfy.models / "loras")]
    folder = comfy.models / "loras"
    tiny_loras.write(folder / "a.safetensors", 1)
    tiny_loras.write(folder / "style/b.safetensors", 2)
    for memory in (places._said, places._known):
        memory.clear()
    yield folder
    del comfy.folders["loras"]
    shutil.rmtree(folder)


def sample(model: Any, **more: Any) -> Any:
    return node("VortexSchnellSampler").sample(model, PROMPT, SIDE, SIDE, 1, 7, 2, **more)[0]


def add(model: Any, name: str, strength: float = 1.0) -> Any:
    (handle,) = node("VortexLoRA").apply(model, name, strength)
    return handle


def listed() -> list[str]:
    """What the node offers, without the bundled one."""
    return [name for name in NODE.INPUT_TYPES()["required"]["lora_name"][0] if name != loras.BUNDLED]


# ---------------------------------------------------------------- pictures


def test_pictures_are_those_of_the_engine_with_the_same_loras(comfy: FakeHost, shelf: Path, model: Any) -> None:
    plain = sample(model)
    both = add(add(model, "a.safetensors", 0.8), "style/b.safetensors", -0.5)
    assert [(lora.name, lora.strength) for lora in both.loras] == [
        ("a.safetensors", 0.8),
        ("style/b.safetensors", -0.5),
    ]
    drawn = sample(both)
    pairs = [(shelf / "a.safetensors", 0.8), (shelf / "style/b.safetensors", -0.5)]
    engine = engines.acquire(model)
    expected = engine.generate(PROMPT, seed=7, height=SIDE, width=SIDE, steps=2, loras=pairs)
    assert torch.equal(drawn, expected)
    assert not torch.equal(drawn, plain)
    assert not torch.equal(drawn, sample(add(model, "a.safetensors", 0.8)))
    assert torch.equal(sample(model), plain)  # a handle without LoRAs, after one with
    assert torch.equal(sample(add(model, "a.safetensors", 0.0)), plain)


def test_one_engine_draws_with_every_set(comfy: FakeHost, shelf: Path, model: Any) -> None:
    handle = add(model, "a.safetensors")
    assert handle.key == model.key
    assert engines.acquire(handle) is engines.acquire(model)
    assert len(engines._loaded) == 1
    assert handle != model  # what the host and other nodes compare
    assert model.loras == ()


def test_loras_stay_when_the_host_takes_the_vram_back(comfy: FakeHost, shelf: Path, model: Any) -> None:
    handle = add(model, "a.safetensors", 0.7)
    expected = sample(handle)
    engines.patcher(model).detach(True)
    assert torch.equal(sample(handle), expected)


def test_conditioning_has_the_loras_of_the_model(comfy: FakeHost, shelf: Path, model: Any) -> None:
    torch.manual_seed(0)
    txt, pooled = torch.randn(1, 30, 128), torch.randn(1, 128)
    native = [[txt, {"pooled_output": pooled}]]
    handle, pairs = add(model, "a.safetensors"), [(str(shelf / "a.safetensors"), 1.0)]
    drawn = sample(handle, conditioning=native)
    engine = engines.acquire(model)
    size = {"seed": 7, "height": SIDE, "width": SIDE, "steps": 2, "loras": pairs}
    with_lora, without = (engine.condition(txt, pooled, 2, chosen) for chosen in (pairs, []))
    assert not torch.equal(with_lora.modulation, without.modulation)
    assert torch.equal(drawn, engine.generate(with_lora, **size))
    assert not torch.equal(drawn, engine.generate(without, **size))


def test_the_probe_measures_with_the_loras(comfy: FakeHost, shelf: Path, model: Any) -> None:
    handle = add(model, "a.safetensors", 0.5)
    text, figures, _, _ = node("VortexLatencyProbe").probe(handle, PROMPT, SIDE, SIDE, 1, 2, 1)
    assert "tiny-schnell, a.safetensors x 0.5, 64 x 64" in text
    assert len(json.loads(figures)["seconds"]) == 2
    used = engines.acquire(model)._painter.loras.chosen
    assert [(Path(file.path).name, strength) for file, strength in used] == [("a.safetensors", 0.5)]
    many = add(add(handle, "a.safetensors"), "a.safetensors")
    assert many.words == "tiny-schnell, 3 LoRAs"


@pytest.mark.parametrize("where", ["generate", "condition"])
def test_loras_that_do_not_fit_make_the_host_unload(
    comfy: FakeHost, shelf: Path, model: Any, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    def refuse(*arguments: Any, **options: Any) -> None:
        raise errors.MemoryPressureError("With these LoRAs", needed=2, available=1, breakdown={})

    monkeypatch.setattr(engines.acquire(model), where, refuse)
    native = [[torch.zeros(1, 8, 128), {"pooled_output": torch.zeros(1, 128)}]]
    with pytest.raises(torch.OutOfMemoryError, match="With these LoRAs"):
        sample(add(model, "a.safetensors"), **({"conditioning": native} if where == "condition" else {}))


def test_the_bundled_lora_is_listed_first_and_draws_outlines(comfy: FakeHost, model: Any) -> None:
    assert NODE.INPUT_TYPES()["required"]["lora_name"][0][0] == loras.BUNDLED
    assert NODE.VALIDATE_INPUTS(loras.BUNDLED, 1.0) is True
    scene, prompt = Scene((Thing("square", "blue", size="large"),)), "a large blue square on a white background"
    for handle, judge in ((add(model, loras.BUNDLED), judge_outlines.matches), (model, filled.matches)):
        picture, _ = node("VortexSchnellSampler").sample(handle, prompt, 128, 128, 1, 7, 4)
        assert judge(picture[0], scene).reasons == ()


def test_a_copy_without_the_bundled_lora_does_not_list_it(comfy: FakeHost, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loras, "bundled", lambda: None)
    assert loras.BUNDLED not in NODE.INPUT_TYPES()["required"]["lora_name"][0]
    assert "There is no LoRA 'tiny-outlines' here" in NODE.VALIDATE_INPUTS(loras.BUNDLED, 1.0)


# ---------------------------------------------------------------- the list, and what changes


def test_files_are_listed_by_their_names_below_the_folder(comfy: FakeHost, shelf: Path) -> None:
    (shelf / "notes.txt").touch()
    (shelf / "model.gguf").touch()
    (shelf / "OLD.SFT").touch()
    assert listed() == ["OLD.SFT", "a.safetensors", "style/b.safetensors"]


def test_a_host_without_loras_offers_none(comfy: FakeHost) -> None:
    places._known.clear()
    assert listed() == []


def test_the_host_runs_again_when_the_file_changes(comfy: FakeHost, shelf: Path, model: Any) -> None:
    before = NODE.IS_CHANGED(lora_name="a.safetensors", strength=1.0, model=None)
    assert before == NODE.IS_CHANGED(lora_name="a.safetensors", strength=0.5, model=None)  # the host sees the widget
    old = sample(add(model, "a.safetensors"))
    tiny_loras.write(shelf / "a.safetensors", 3)
    assert NODE.IS_CHANGED(lora_name="a.safetensors", strength=1.0, model=None) != before
    new = sample(add(model, "a.safetensors"))
    assert not torch.equal(new, old)
    tiny_loras.write(shelf / "c.safetensors", 3)  # what only the prompt's part tells apart is drawn anew, too
    assert torch.equal(new, sample(add(model, "c.safetensors")))


def test_a_linked_name_is_looked_at_each_time(comfy: FakeHost) -> None:
    assert NODE.VALIDATE_INPUTS(None, None) is True
    assert NODE.VALIDATE_INPUTS() is True
    assert NODE.IS_CHANGED(lora_name=None, strength=1.0, model=None) != NODE.IS_CHANGED(lora_name=None)


# ---------------------------------------------------------------- refused


def test_a_missing_file_says_what_to_do(comfy: FakeHost, shelf: Path, model: Any) -> None:
    verdict = NODE.VALIDATE_INPUTS("gone.safetensors", 1.0)
    assert "There is no LoRA 'gone.safetensors' here" in verdict
    assert "a.safetensors, style/b.safetensors" in verdict
    assert "Put the file into models/loras and press R, or choose another" in verdict
    with pytest.raises(errors.VortexInputError, match="not in list"):
        add(model, "gone.safetensors")
    handle = add(model, "a.safetensors")
    (shelf / "a.safetensors").unlink()  # while the host keeps the handle
    with pytest.raises(errors.VortexCheckpointError, match="There is no LoRA at"):
        sample(handle)


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "/etc/passwd",
        "../outside.safetensors",
        "style/../a.safetensors",
        "C:\\a.safetensors",
        "a\0b",
        7,
        [],
    ],
)
def test_only_names_below_the_folder_are_taken(comfy: FakeHost, shelf: Path, name: Any) -> None:
    tiny_loras.write(shelf.parent / "outside.safetensors")
    assert "not in list" in NODE.VALIDATE_INPUTS(name, 1.0)
    with pytest.raises(errors.VortexInputError, match="not in list"):
        loras.find(name)


def test_a_link_out_of_the_folder_is_not_followed(
    comfy: FakeHost, shelf: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tiny_loras.write(tmp_path / "outside.safetensors")
    (shelf / "link.safetensors").symlink_to(tmp_path / "outside.safetensors")
    (shelf / "inside.safetensors").symlink_to(shelf / "a.safetensors")
    assert listed() == ["a.safetensors", "inside.safetensors", "style/b.safetensors"]
    assert "leads out" in NODE.VALIDATE_INPUTS("link.safetensors", 1.0)
    assert "extra_model_paths.yaml" in caplog.text


def test_what_cannot_be_used_is_said_before_a_run(comfy: FakeHost, shelf: Path, model: Any) -> None:
    (shelf / "half.safetensors").write_bytes((shelf / "a.safetensors").read_bytes()[:-1000])
    (shelf / "evil.pt").write_bytes(b"\x80\x04")
    (shelf / "folder").mkdir()
    save_file({"lora_unet_down_blocks_0.lora_up.weight": torch.zeros(8, 4)}, shelf / "sdxl.safetensors")
    tiny_loras.write(shelf / "flux2.safetensors", width=6144, rank=1)
    factors = load_file(shelf / "a.safetensors")
    save_file(factors | {"diffusion_model.img_in.ia3_l": torch.zeros(256, 1)}, shelf / "ia3.safetensors")
    whole = {"diffusion_model.double_blocks.0.img_attn.proj.diff": torch.zeros(256, 256)}
    save_file(factors | whole, shelf / "whole.safetensors")
    for name, reason in {
        "half.safetensors": "half", "evil.pt": "pickle", "folder": "is a folder",
        "sdxl.safetensors": "Stable Diffusion", "flux2.safetensors": "a LoRA of FLUX.2",
        "ia3.safetensors": "it is IA3, which Vortex does not apply", "whole.safetensors": "no low-rank update",
    }.items():  # fmt: skip
        verdict = NODE.VALIDATE_INPUTS(name, 1.0)
        assert reason in str(verdict), name
        with pytest.raises(errors.VortexCheckpointError, match=reason):
            add(model, name)
        with pytest.raises(errors.VortexCheckpointError, match=reason):  # nothing is refused that the engine takes
            engines.acquire(model).set_loras([(shelf / name, 1.0)])


def test_a_whole_change_of_what_is_not_in_4_bits_is_used(comfy: FakeHost, shelf: Path, model: Any) -> None:
    save_file({"diffusion_model.img_in.diff": torch.ones(256, 64) / 8}, shelf / "img_in.safetensors")
    assert not torch.equal(sample(add(model, "img_in.safetensors")), sample(model))


def test_a_lora_of_another_size_is_refused_by_the_model_that_it_meets(comfy: FakeHost, shelf: Path, model: Any) -> None:
    tiny_loras.write(shelf / "large.safetensors", width=3072)
    assert NODE.VALIDATE_INPUTS("large.safetensors", 1.0) is True  # the released model's, which may be linked
    with pytest.raises(errors.VortexCheckpointError, match="does not fit this model"):
        add(model, "large.safetensors")


def test_the_models_that_were_named_are_what_is_checked_before_a_run(
    comfy: FakeHost, shelf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "known", ())
    assert "does not fit this model" in NODE.VALIDATE_INPUTS("a.safetensors", 1.0)
    for _ in range(3):  # the host asks the loader first
        assert PACK.NODE_CLASS_MAPPINGS["VortexFluxLoader"].VALIDATE_INPUTS("tiny-schnell") is True
    assert NODE.VALIDATE_INPUTS("a.safetensors", 1.0) is True
    assert len(models.known) == 1


@pytest.mark.parametrize("strength", [float("nan"), float("inf"), 10.05, -11, "1", [], True])
def test_a_strength_that_is_no_number_in_range_is_refused(
    comfy: FakeHost, shelf: Path, model: Any, strength: Any
) -> None:
    assert "strength must be a number from -10 to 10" in NODE.VALIDATE_INPUTS("a.safetensors", strength)
    with pytest.raises(errors.VortexInputError, match="strength must be"):
        add(model, "a.safetensors", strength)
