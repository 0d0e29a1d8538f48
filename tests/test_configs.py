"""A config is data: typed, bounded, in agreement with the tensors, and nothing else of it reaches anybody."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mutators
import pytest
import torch

from vortex_core import Engine, VortexCheckpointError
from vortex_core.checkpoint.bundle import Bundle, open_bundle
from vortex_core.checkpoint.config import FORMS
from vortex_core.flux1.spec import ClipSpec, FluxSpec, T5Spec, VaeSpec
from vortex_core.flux1.text_encoders import T5, Clip
from vortex_core.utils.bounds import bounds_of

DRAW = {"seed": 1, "height": 64, "width": 64, "steps": 1}
NAN, INF = float("nan"), float("inf")


@pytest.fixture(scope="module")
def model(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(tiny_dir, tmp_path_factory.mktemp("configs") / "model"))


@pytest.fixture(scope="module")
def sound(tiny_dir: Path) -> Bundle:
    return open_bundle(tiny_dir)


def opened(model: Path, part: str, text: bytes | None = None, **changes: Any) -> Bundle:
    """The model with another config for a while."""
    path = model / part / "config.json"
    before = path.read_bytes()
    path.write_bytes(json.dumps(json.loads(before) | changes).encode() if text is None else text)
    try:
        return open_bundle(model)
    finally:
        path.write_bytes(before)


# CLIP has the first; the second is refused, and so is FLUX.1-dev, which has the third
DOORS = sorted(mutators.DOORS.keys() - {"num_hidden_layers", "quantization_config", "guidance_embeds"})


@pytest.mark.parametrize("key", DOORS)
@pytest.mark.parametrize("part", ["text_encoder", "text_encoder_2", "transformer", "vae"])
def test_keys_that_ask_for_code_reach_nobody(model: Path, sound: Bundle, part: str, key: str) -> None:
    found = opened(model, part, **{key: mutators.DOORS[key]})
    assert found.spec == sound.spec


def test_transformers_gets_what_the_specs_have_and_attention_is_torchs(sound: Bundle) -> None:
    for spec, encoder in ((sound.spec.clip, Clip(sound.spec.clip)), (sound.spec.t5, T5(sound.spec.t5))):
        config = encoder._model.config
        assert config._attn_implementation in ("sdpa", "eager")
        assert {name: getattr(config, name) for name in asdict(spec)} == asdict(spec)


WRONG = [
    ("transformer", "num_layers", [0, -1, 10**6, 2.0, True, "2", None, NAN, INF, [2], {}]),
    ("transformer", "num_single_layers", [0, 10**9]),
    ("transformer", "num_attention_heads", [0, -2, 10**9]),
    ("transformer", "in_channels", [INF, 10**400, 63]),
    ("transformer", "axes_dims_rope", [[], [16, 56], [16, 56, 57], ["a", 1, 2], [10**9, 2, 2], 128, None]),
    ("transformer", "guidance_embeds", ["no", 0, 2]),
    ("transformer", "patch_size", [2, True]),
    ("text_encoder", "num_hidden_layers", [10**6, 0, True]),
    ("text_encoder", "num_attention_heads", [0, 3, -1, 10**9, NAN]),
    ("text_encoder", "layer_norm_eps", [0, -1, NAN, INF, "x", True]),
    ("text_encoder", "hidden_act", ["owner/repo", "relu", 1, None, ["gelu"]]),
    ("text_encoder_2", "num_layers", [10**6, 10**9, -1, False]),
    ("text_encoder_2", "d_ff", ["x", 10**9, 0]),
    ("text_encoder_2", "vocab_size", [INF, 0, 10**12]),
    ("text_encoder_2", "relative_attention_max_distance", [0, -1, 10**12, NAN]),
    ("text_encoder_2", "feed_forward_proj", ["relu", "gated-owner/repo", 3]),
    ("vae", "norm_num_groups", [0, -8, 7, 10**9]),
    ("vae", "block_out_channels", [[-8] * 4, [32] * 3, [32.0] * 4, 32, [], [10**9] * 4]),
    ("vae", "layers_per_block", [10**9, 0, NAN]),
    ("vae", "scaling_factor", [0, -0.36, NAN, INF, -INF, 1e308, True, "0.36", None]),
    ("vae", "shift_factor", [NAN, INF, None, 1e300]),
    ("vae", "sample_size", [0, 10**9, 100, [128, 128]]),
    ("vae", "act_fn", ["owner/repo", 1]),
    ("vae", "use_post_quant_conv", [True, 1]),
]
SPECS = {"transformer": FluxSpec, "text_encoder": ClipSpec, "text_encoder_2": T5Spec, "vae": VaeSpec}


@pytest.mark.parametrize(("part", "key", "values"), WRONG, ids=lambda value: value if isinstance(value, str) else "")
def test_numbers_that_cannot_be(
    model: Path, part: str, key: str, values: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused before there is a spec, from which everything is built, or a module."""
    spec = SPECS[part].__init__

    def look(self: object, **numbers: Any) -> None:
        spec(self, **numbers)  # which looks at those that hang together
        pytest.fail("a spec of what cannot be")

    monkeypatch.setattr(SPECS[part], "__init__", look)
    monkeypatch.setattr(torch.nn.Module, "__init__", lambda *a, **b: pytest.fail("built before it was looked at"))
    for value in values:
        with pytest.raises(VortexCheckpointError) as refusal:
            opened(model, part, **{key: value})
        assert str(model / part) in str(refusal.value), value
        assert refusal.value.path is not None
        assert len(str(refusal.value)) < 600


@pytest.mark.parametrize(
    ("part", "changes"),
    [
        ("transformer", {"num_layers": 1}),
        ("transformer", {"num_layers": 3}),
        ("transformer", {"num_single_layers": 2}),
        ("transformer", {"joint_attention_dim": 64}),
        ("text_encoder", {"num_hidden_layers": 1}),
        ("text_encoder", {"intermediate_size": 512}),
        ("text_encoder_2", {"num_layers": 2}),
        ("text_encoder_2", {"d_kv": 128, "num_heads": 1}),
        ("vae", {"layers_per_block": 2}),
        ("vae", {"block_out_channels": [32, 64, 64, 128]}),
    ],
    ids=str,
)
def test_a_config_and_tensors_that_disagree(model: Path, part: str, changes: dict[str, Any]) -> None:
    """One block fewer would draw, and another picture."""
    with pytest.raises(VortexCheckpointError, match=r"its config says \w+ .*, and the tensors have .*run it again"):
        opened(model, part, **changes)


TEXTS = {
    "nested lists": b"[" * 100_000,
    "nested objects": b'{"a":' * 100_000,
    "a key twice": b'{"norm_num_groups": 8, "norm_num_groups": 4}',
    "two megabytes": b'{"a": "' + b"x" * 2_000_000 + b'"}',
    "a long number": b'{"norm_num_groups": ' + b"1" * 10_000 + b"}",
    "UTF-16 cut": "{}".encode("utf-16")[:-1],
    "nothing": b"",
    "a list": b"[]",
}


@pytest.mark.parametrize("text", TEXTS)
def test_files_that_are_no_config(model: Path, text: str) -> None:
    with pytest.raises(VortexCheckpointError, match=r"is (missing or not JSON|not a model's config)") as no:
        opened(model, "vae", TEXTS[text])
    assert no.value.path == str(model / "vae" / "config.json")


def test_a_config_that_says_less_still_serves(model: Path, sound: Bundle) -> None:
    """Older configs lack what has a default; whatever a library adds in the future is not looked at."""
    for kind, part in (("clip", "text_encoder"), ("t5", "text_encoder_2"), ("transformer", "transformer")):
        form = FORMS[kind]
        said = json.loads((model / part / "config.json").read_text())
        less = {key: said[key] for name, key in form.keys.items() if name not in form.optional} | {"later": [1]}
        found = opened(model, part, json.dumps(less).encode())
        assert (found.spec.flux, found.spec.clip, found.spec.t5) == (sound.spec.flux, sound.spec.clip, sound.spec.t5)


def test_every_size_has_bounds_and_the_released_model_is_within() -> None:
    for spec in (FluxSpec, VaeSpec, ClipSpec, T5Spec):
        assert all(bounds_of(spec).values())
        spec()


def test_the_scale_of_a_config_is_the_one_that_is_drawn_with(model: Path, engine: Engine) -> None:
    """What the headers cannot tell comes from the config."""
    path = model / "vae" / "config.json"
    before = path.read_bytes()
    path.write_bytes(json.dumps(json.loads(before) | {"scaling_factor": 0.5}).encode())
    try:
        with Engine.load(model, device="cpu") as other:
            assert not torch.equal(other.generate("a", **DRAW), engine.generate("a", **DRAW))
    finally:
        path.write_bytes(before)
