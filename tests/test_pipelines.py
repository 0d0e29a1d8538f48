"""Pipelines as people prepare them for diffusers: read all the same, or refused in words."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from vortex_core import Engine, VortexCheckpointError
from vortex_core.checkpoint.bundle import Bundle, open_bundle, open_pipeline

pytest.importorskip("accelerate")
from diffusers import FluxPipeline

DRAW = {"seed": 1, "height": 64, "width": 64, "steps": 1}
CPU = torch.device("cpu")
MODULES = ("transformer", "vae", "text_encoder", "text_encoder_2")


@pytest.fixture
def pipe(tiny_dir: Path) -> FluxPipeline:
    return FluxPipeline.from_pretrained(tiny_dir, dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def sound(tiny_dir: Path) -> Bundle:
    return open_bundle(tiny_dir)


def compiled(pipe: Any) -> None:
    for name in MODULES:
        setattr(pipe, name, torch.compile(getattr(pipe, name), backend="eager"))


def on_disk(pipe: Any) -> None:
    from accelerate import disk_offload

    disk_offload(pipe.transformer, tempfile.mkdtemp(), execution_device=CPU)


def grouped(pipe: Any, **options: Any) -> None:
    pipe.transformer.enable_group_offload(onload_device=CPU, offload_device=CPU, offload_type="leaf_level", **options)


PREPARED: dict[str, Callable[[Any], Any]] = {
    "sequential offload": lambda pipe: pipe.enable_sequential_cpu_offload(device="cpu"),
    "offload to disk": on_disk,
    "group offload": grouped,
    "compiled": compiled,
    "compiled in place": lambda pipe: pipe.transformer.compile(backend="eager"),
    "another attention": lambda pipe: setattr(pipe.text_encoder.config, "_attn_implementation", "owner/repo"),
}


@pytest.mark.parametrize("how", PREPARED)
def test_prepared_pipelines_have_the_same_tensors(pipe: FluxPipeline, sound: Bundle, how: str) -> None:
    PREPARED[how](pipe)
    found = open_pipeline(pipe)
    assert found.spec == sound.spec
    for kind, part in found.parts.items():
        for name in part.stored.names():
            theirs = sound.parts[kind].stored
            if name in theirs:  # transformers writes tables twice
                assert torch.equal(part.stored.read(name).to(theirs.read(name).dtype), theirs.read(name)), name


def test_a_pipeline_of_64_bits_draws_the_same(pipe: FluxPipeline, engine: Engine) -> None:
    pipe.transformer.double()
    with Engine.from_pipeline(pipe, device="cpu") as other:
        assert torch.equal(other.generate("a red circle", **DRAW), engine.generate("a red circle", **DRAW))


@pytest.mark.parametrize("name", [*MODULES, "tokenizer", "tokenizer_2"])
def test_a_part_that_was_left_out(pipe: FluxPipeline, name: str) -> None:
    setattr(pipe, name, None)
    with pytest.raises(VortexCheckpointError, match=rf"has no {name}\..*with all of its parts"):
        open_pipeline(pipe)


WRONG: dict[str, tuple[Callable[[Any], Any], str]] = {
    "meta": (lambda pipe: pipe.vae.to("meta"), "tensors that are not in memory.*remove_all_hooks"),
    "groups on disk": (
        lambda pipe: grouped(pipe, offload_to_disk_path=tempfile.mkdtemp()),
        "tensors that are not in memory",
    ),
    "a foreign wrapper": (
        lambda pipe: setattr(pipe, "transformer", torch.nn.DataParallel(pipe.transformer)),
        "is DataParallel, which Vortex cannot read",
    ),
    "encoders swapped": (
        lambda pipe: setattr(pipe, "text_encoder", pipe.text_encoder_2),
        "not FLUX's text_encoder",
    ),
    "quantized": (lambda pipe: setattr(pipe.transformer, "quantization_method", "gptq"), "is quantized .'gptq'"),
    "a million layers": (lambda pipe: setattr(pipe.text_encoder_2.config, "num_layers", 10**6), "from 1 to 256"),
    "a scale of NaN": (lambda pipe: pipe.vae.register_to_config(scaling_factor=float("nan")), "should be a number"),
}


@pytest.mark.parametrize("case", WRONG)
def test_pipelines_that_cannot_be_read(pipe: FluxPipeline, case: str) -> None:
    change, sentence = WRONG[case]
    change(pipe)
    with pytest.raises(VortexCheckpointError, match=sentence):
        open_pipeline(pipe)


@pytest.mark.parametrize("thing", [None, "black-forest-labs/FLUX.1-schnell", torch.nn.Linear(2, 2)])
def test_what_is_no_pipeline(thing: Any) -> None:
    with pytest.raises(VortexCheckpointError, match="has no transformer"):
        Engine.from_pipeline(thing, device="cpu")
