"""Files of the real writers and converters: diffusers' always, PEFT's and LyCORIS' where they are installed.

PEFT and LyCORIS are no dependencies: `pip install --target FOLDER peft lycoris-lora`, and FOLDER in PYTHONPATH.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lora_parts
import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.loaders import lora_conversion_utils as conversion
from lora_parts import LINEARS, MINI, D, random
from torch import Tensor, nn

from vortex_core.checkpoint.key_maps import modulation_shapes, step_shapes
from vortex_core.checkpoint.lora_reader import read_lora
from vortex_core.flux1.spec import ModelSpec
from vortex_core.quant.adapters import LoraPart

FULL = ModelSpec()
SHAPES = {
    name.removesuffix(".weight"): shape
    for name, shape in (step_shapes(FULL.flux) | modulation_shapes(FULL.flux)).items()
    if len(shape) == 2
}


def probe(part: LoraPart) -> dict[str, Tensor]:
    """Each D times a vector; a whole D of the released model has 66 M values."""
    found = {}
    for name, updates in part.updates.items():
        x = torch.linspace(-1, 1, SHAPES[name][1])
        found[name] = torch.zeros(SHAPES[name][0])
        for one in updates:
            found[name][one.rows] += one.up.float() @ (one.down.float() @ x)
    return found


def full_size(tmp_path: Path, state: dict[str, Tensor]) -> LoraPart:
    return read_lora(lora_parts.save(tmp_path / "a.safetensors", state), FULL).parts["transformer"]


def same(before: LoraPart, after: LoraPart) -> None:
    found, expected = probe(after), probe(before)
    assert found.keys() == expected.keys()
    for name, each in expected.items():
        torch.testing.assert_close(found[name], each, rtol=1e-4, atol=1e-4)
    assert before.biases.keys() == after.biases.keys()
    assert all(torch.equal(after.biases[name], bias) for name, bias in before.biases.items())


Converter = Callable[[dict[str, Tensor]], dict[str, Tensor]]


def converted(state: dict[str, Tensor], convert: Converter) -> dict[str, Tensor]:
    return convert({key: tensor.clone() for key, tensor in state.items()})


def test_diffusers_converter_of_kohya(tmp_path: Path) -> None:
    modules = [
        "double_blocks.0.img_attn.qkv", "double_blocks.18.txt_attn.qkv", "double_blocks.3.img_mod.lin",
        "double_blocks.7.txt_mlp.2", "single_blocks.37.linear1", "single_blocks.0.linear2",
        "single_blocks.5.modulation.lin", "img_in", "txt_in", "time_in.in_layer", "vector_in.out_layer",
    ]  # fmt: skip
    state = {}
    for module in modules:
        state |= lora_parts.lora("lora_unet_" + module.replace(".", "_"), *SHAPES[module], 2)
    for module in ("final_layer.linear", "final_layer.adaLN_modulation.1"):  # the converter drops their alphas
        own = lora_parts.lora("lora_unet_" + module.replace(".", "_"), *SHAPES[module], 2)
        state |= {key: tensor for key, tensor in own.items() if not key.endswith(".alpha")}
    after = converted(state, conversion._convert_kohya_flux_lora_to_diffusers)
    same(full_size(tmp_path, state), full_size(tmp_path, after))


def test_diffusers_converter_of_xlabs(tmp_path: Path) -> None:
    state = {}
    for block in (0, 18):
        for number in (1, 2):
            for name, rows in (("qkv", 9216), ("proj", 3072)):
                key = f"double_blocks.{block}.processor.{name}_lora{number}"
                state |= {f"{key}.up.weight": random(rows, 3), f"{key}.down.weight": random(3, 3072, seed=1)}
    state |= {
        "single_blocks.37.processor.qkv_lora.up.weight": random(9216, 3),
        "single_blocks.37.processor.qkv_lora.down.weight": random(3, 3072, seed=1),
        "single_blocks.37.processor.proj_lora.up.weight": random(3072, 3),
        "single_blocks.37.processor.proj_lora.down.weight": random(3, 15360),
    }
    after = converted(state, conversion._convert_xlabs_flux_lora_to_diffusers)
    same(full_size(tmp_path, state), full_size(tmp_path, after))


def whole(prefix: str, leave: tuple[str, ...] = ()) -> Iterator[tuple[str, Tensor]]:
    for number, (name, (n, k)) in enumerate(SHAPES.items()):
        if not name.startswith(leave):
            yield f"{prefix}{name}.lora_B.weight", random(n, 1, seed=number)
            yield f"{prefix}{name}.lora_A.weight", random(1, k, seed=number)


@pytest.mark.slow
def test_diffusers_converter_of_bfl_control(tmp_path: Path) -> None:
    """But for `norm_out`, of which the converter swaps halves of lora_A's ranks, too."""
    state = dict(whole(""))
    state |= {f"{name}.lora_B.bias": random(n) for name, (n, _) in SHAPES.items()}
    norms = {name: torch.ones(shape) for name, shape in step_shapes(FULL.flux).items() if name.endswith("scale")}
    swapped = [f"final_layer.adaLN_modulation.1.lora_{half}.weight" for half in "AB"]
    two = {key: torch.cat([state[key]] * 2, dim=number) for number, key in enumerate(swapped)}
    after = converted(state | norms | two, conversion._convert_bfl_flux_control_lora_to_diffusers)
    found = full_size(tmp_path, {key: tensor for key, tensor in after.items() if "norm_out" not in key})
    same(full_size(tmp_path, {key: tensor for key, tensor in state.items() if "adaLN" not in key}), found)
    assert {f"{name}.scale" for name in found.norms} == norms.keys()


@pytest.mark.slow
def test_diffusers_converter_of_fals_kontext(tmp_path: Path) -> None:
    outside = ("img_in", "txt_in", "time_in", "vector_in", "final_layer.adaLN")
    state = dict(whole("base_model.model.", outside))
    after = converted(state, conversion._convert_fal_kontext_lora_to_diffusers)
    same(full_size(tmp_path, state), full_size(tmp_path, after))


# ---------------------------------------------------------------- where they are installed


def transformer() -> FluxTransformer2DModel:
    torch.manual_seed(0)
    return FluxTransformer2DModel(
        in_channels=MINI.flux.in_channels,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=D,
        num_attention_heads=1,
        joint_attention_dim=MINI.flux.context,
        pooled_projection_dim=MINI.flux.vec,
        axes_dims_rope=MINI.flux.axes,
    )


def canonical(model: nn.Module, kind: str = "weight") -> dict[str, Tensor]:
    """A diffusers transformer's matrices or biases under BFL's names, by the table of the tests."""
    state = model.state_dict()
    found = {}
    for name, (_, _, sources) in LINEARS.items():
        parts = [state[f"{source}.{kind}"] for source, _ in sources]
        found[name] = torch.cat(parts[0].chunk(2)[::-1]) if sources[0][0] == "norm_out.linear" else torch.cat(parts)
    return found


def randomize(module: nn.Module, words: tuple[str, ...]) -> None:
    for number, (name, tensor) in enumerate([*module.named_parameters(), *module.named_buffers()]):
        if any(word in name for word in words):
            tensor.data = tensor.data + random(*tensor.shape, seed=number, by=0.05)


@pytest.mark.filterwarnings("ignore:Adapter 'default'")  # PEFT warns of its own lora_B.bias
@pytest.mark.parametrize(
    "options", [{}, {"use_rslora": True}, {"use_dora": True}, {"lora_bias": True}, {"alpha_pattern": {"proj_mlp": 3}}]
)
def test_peft_by_diffusers(tmp_path: Path, options: dict[str, Any]) -> None:
    peft = pytest.importorskip("peft")
    model = transformer()
    before = canonical(model), canonical(model, "bias")
    names = [source for _, _, sources in LINEARS.values() for source, _ in sources]
    model.add_adapter(peft.LoraConfig(r=6, lora_alpha=9, target_modules=names, **options))
    randomize(model, ("lora_A", "lora_B", "magnitude"))
    model.save_lora_adapter(str(tmp_path))
    part = read_lora(tmp_path / "pytorch_lora_weights.safetensors", MINI).parts["transformer"]
    model.fuse_lora()
    model.unload_lora()
    weights, biases = canonical(model), canonical(model, "bias")
    assert part.modules() == weights.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(before[0][name] + part.delta(name, before[0][name]), weight, rtol=1e-4, atol=1e-4)
        bias = before[1][name] + part.biases.get(name, torch.zeros(1))
        torch.testing.assert_close(bias, biases[name], rtol=1e-4, atol=1e-4)


LYCORIS = {
    "lora": {},
    "lora with dora": {"dora_wd": True},
    "lora with dora of columns": {"dora_wd": True, "wd_on_output": False},
    "loha": {},
    "loha of rank 3": {"linear_dim": 3},
    "lokr": {},
    "lokr of factor 4": {"factor": 4, "linear_dim": 2},
    "lokr, both sides": {"factor": 8, "decompose_both": True, "linear_dim": 2},
    "lokr, whole": {"full_matrix": True},
    "lokr with dora": {"dora_wd": True},
    "glora": {},
    "full": {},
    "diag-oft": {"linear_dim": 8},
    "diag-oft, rescaled": {"linear_dim": 8, "rescaled": True},
    "diag-oft, bounded": {"linear_dim": 8, "constraint": 1e-4},
    "boft": {"linear_dim": 8},
}


@pytest.mark.parametrize("case", LYCORIS)
def test_lycoris(tmp_path: Path, case: str) -> None:
    """What the layers compute while they are trained; LyCORIS' own merge takes alpha of LoHa and LoKr twice."""
    lycoris = pytest.importorskip("lycoris")
    model = transformer()
    before = canonical(model)
    options = {"linear_dim": 4, "linear_alpha": 2} | LYCORIS[case]
    network = lycoris.create_lycoris(model, 1.0, algo=case.split(",")[0].split(" ")[0], **options)
    network.apply_to()
    randomize(network, ("lora_", "hada_", "lokr_", "dora_", "oft_", "rescale", "a1.", "a2.", "b1.", "b2.", ".weight"))
    path = tmp_path / "a.safetensors"
    network.save_weights(str(path), torch.float32, {})
    file = read_lora(path, MINI)
    part = file.parts["transformer"]
    assert set(LINEARS) - part.modules() == ({"final_layer.adaLN_modulation.1"} if file.refused else set())
    assert bool(file.refused) == (case == "boft")
    for name in part.modules():
        after = [trained(model.get_submodule(source)) for source, _ in LINEARS[name][2]]
        weight = torch.cat(after[0].chunk(2)[::-1] if LINEARS[name][2][0][0] == "norm_out.linear" else after)
        found = before[name] + part.delta(name, before[name])
        torch.testing.assert_close(found, weight, rtol=1e-3, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


def trained(linear: nn.Module) -> Tensor:
    """The matrix that a layer multiplies with."""
    with torch.no_grad():
        return (linear(torch.eye(linear.in_features)) - linear(torch.zeros(1, linear.in_features))).T


@pytest.mark.parametrize(
    ("config", "options"),
    [
        ("LoraConfig", {"r": 6, "lora_alpha": 9}),
        ("LoraConfig", {"r": 6, "lora_alpha": 9, "use_rslora": True, "rank_pattern": {"to_q": 3}}),
        ("LoHaConfig", {"r": 3, "alpha": 5}),
        ("LoKrConfig", {"r": 2, "alpha": 5}),
        ("LoKrConfig", {"r": 2, "alpha": 5, "decompose_both": True, "decompose_factor": 8}),
        ("LoKrConfig", {"r": 900, "alpha": 450}),
    ],
)
def test_peft_alone(tmp_path: Path, config: str, options: dict[str, Any]) -> None:
    """A folder of PEFT's own, with alphas in `adapter_config.json`."""
    peft = pytest.importorskip("peft")
    model = transformer()
    before = canonical(model)
    names = [source for _, _, sources in LINEARS.values() for source, _ in sources]
    wrapped = peft.get_peft_model(model, getattr(peft, config)(target_modules=names, **options))
    randomize(wrapped, ("lora_A", "lora_B", "hada_", "lokr_"))
    wrapped.save_pretrained(str(tmp_path))
    part = read_lora(tmp_path / "adapter_model.safetensors", MINI).parts["transformer"]
    weights = canonical(wrapped.merge_and_unload())
    assert part.modules() == weights.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(before[name] + part.delta(name, before[name]), weight, rtol=1e-4, atol=1e-4)
