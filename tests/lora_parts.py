"""One update in the words of every trainer: the same factors, written as each of them names its tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from vortex_core.flux1.spec import ClipSpec, FluxSpec, ModelSpec, T5Spec

D, M, K_IN, CONTEXT, VEC = 128, 512, 16, 64, 64
MINI = ModelSpec(
    flux=FluxSpec(hidden=D, heads=1, double_blocks=2, single_blocks=2, in_channels=K_IN, context=CONTEXT, vec=VEC),
    clip=ClipSpec(vocab_size=99, hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=1),
    t5=T5Spec(vocab_size=99, d_model=64, d_kv=16, d_ff=192, num_layers=2, num_heads=8),
)
# BFL's name: sizes, and diffusers' names with their rows. Written by hand, so that it is no copy of the key maps.
QKV, ADD = ("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj")


def linears() -> dict[str, tuple[int, int, list[tuple[str, int]]]]:
    """Every linear of the miniature's transformer."""
    table = {
        "img_in": (D, K_IN, [("x_embedder", D)]),
        "txt_in": (D, CONTEXT, [("context_embedder", D)]),
        "time_in.in_layer": (D, 256, [("time_text_embed.timestep_embedder.linear_1", D)]),
        "time_in.out_layer": (D, D, [("time_text_embed.timestep_embedder.linear_2", D)]),
        "vector_in.in_layer": (D, VEC, [("time_text_embed.text_embedder.linear_1", D)]),
        "vector_in.out_layer": (D, D, [("time_text_embed.text_embedder.linear_2", D)]),
        "final_layer.linear": (K_IN, D, [("proj_out", K_IN)]),
        "final_layer.adaLN_modulation.1": (2 * D, D, [("norm_out.linear", 2 * D)]),
    }
    for i in range(2):
        ours, theirs = f"double_blocks.{i}", f"transformer_blocks.{i}"
        table |= {
            f"{ours}.img_mod.lin": (6 * D, D, [(f"{theirs}.norm1.linear", 6 * D)]),
            f"{ours}.txt_mod.lin": (6 * D, D, [(f"{theirs}.norm1_context.linear", 6 * D)]),
            f"{ours}.img_attn.qkv": (3 * D, D, [(f"{theirs}.attn.{name}", D) for name in QKV]),
            f"{ours}.txt_attn.qkv": (3 * D, D, [(f"{theirs}.attn.{name}", D) for name in ADD]),
            f"{ours}.img_attn.proj": (D, D, [(f"{theirs}.attn.to_out.0", D)]),
            f"{ours}.txt_attn.proj": (D, D, [(f"{theirs}.attn.to_add_out", D)]),
            f"{ours}.img_mlp.0": (M, D, [(f"{theirs}.ff.net.0.proj", M)]),
            f"{ours}.img_mlp.2": (D, M, [(f"{theirs}.ff.net.2", D)]),
            f"{ours}.txt_mlp.0": (M, D, [(f"{theirs}.ff_context.net.0.proj", M)]),
            f"{ours}.txt_mlp.2": (D, M, [(f"{theirs}.ff_context.net.2", D)]),
        }
        ours, theirs = f"single_blocks.{i}", f"single_transformer_blocks.{i}"
        split = [(f"{theirs}.attn.{name}", D) for name in QKV] + [(f"{theirs}.proj_mlp", M)]
        table |= {
            f"{ours}.linear1": (3 * D + M, D, split),
            f"{ours}.linear2": (D, D + M, [(f"{theirs}.proj_out", D)]),
            f"{ours}.modulation.lin": (3 * D, D, [(f"{theirs}.norm.linear", 3 * D)]),
        }
    return table


LINEARS = linears()
CLIP = {
    f"encoder.layers.{i}.{name}": size
    for i in range(2)
    for name, size in {
        **{f"self_attn.{part}_proj": (64, 64) for part in ("q", "k", "v", "out")},
        "mlp.fc1": (256, 64),
        "mlp.fc2": (64, 256),
    }.items()
}
T5 = {
    f"encoder.block.{i}.layer.{name}": size
    for i in range(2)
    for name, size in {
        **{f"0.SelfAttention.{part}": (128, 64) for part in "qkv"},
        "0.SelfAttention.o": (64, 128),
        "1.DenseReluDense.wi_0": (192, 64),
        "1.DenseReluDense.wi_1": (192, 64),
        "1.DenseReluDense.wo": (64, 192),
    }.items()
}
Factors = dict[str, tuple[Tensor, Tensor]]  # up and down by BFL's name


def factors(rank: int, names: Mapping[str, tuple[int, ...]] | None = None, seed: int = 0) -> Factors:
    """Random factors of every linear, in multiples of 1/64, so that 16 bits hold them exactly."""
    dice = torch.Generator().manual_seed(seed)

    def some(*shape: int) -> Tensor:
        return torch.randint(-64, 65, shape, generator=dice) / 64

    sizes = {name: (n, k) for name, (n, k, _) in LINEARS.items()} if names is None else names
    return {name: (some(size[0], rank), some(rank, size[1])) for name, size in sizes.items()}


def deltas(made: Factors, scale: float = 1.0) -> dict[str, Tensor]:
    """What the factors add to each matrix."""
    return {name: up @ down * scale for name, (up, down) in made.items()}


def split(made: Factors) -> Iterator[tuple[str, Tensor, Tensor]]:
    """The factors under diffusers' names: rows cut, the halves of `norm_out` swapped."""
    for name, (up, down) in made.items():
        start = 0
        for theirs, rows in LINEARS[name][2]:
            part = up[start : start + rows]
            if theirs == "norm_out.linear":
                part = torch.cat([part[rows // 2 :], part[: rows // 2]])
            yield theirs, part.contiguous(), down.clone()
            start += rows


def fused(made: Factors) -> Iterator[tuple[str, Tensor, Tensor]]:
    """The factors under BFL's names."""
    for name, (up, down) in made.items():
        yield name, up, down


Written = dict[str, Tensor]
Writer = Callable[[Factors], Written]


def writer(
    naming: Callable[[Factors], Iterator[tuple[str, Tensor, Tensor]]],
    key: Callable[[str], str],
    ends: tuple[str, str],
    alpha: bool,
) -> Writer:
    """Writes with keys `key(name) + end`. With an alpha that is twice the rank, and `down` halved for it."""

    def write(made: Factors) -> Written:
        state = {}
        for name, up, down in naming(made):
            state[key(name) + ends[0]] = up
            state[key(name) + ends[1]] = down / 2 if alpha else down
            if alpha:
                state[f"{key(name)}.alpha"] = torch.tensor(2.0 * down.shape[0])
        return state

    return write


def flat(prefix: str) -> Callable[[str], str]:
    """Names with underscores."""
    return lambda name: prefix + name.replace(".", "_")


def dotted(prefix: str) -> Callable[[str], str]:
    """Names with dots."""
    return lambda name: prefix + name


def processor(name: str) -> str:
    """diffusers' old names of attention."""
    return name.replace(".attn.", ".attn.processor.").removesuffix(".0") if ".attn." in name else name


KOHYA, PEFT = (".lora_up.weight", ".lora_down.weight"), (".lora_B.weight", ".lora_A.weight")
WRITERS: dict[str, Writer] = {
    "kohya": writer(fused, flat("lora_unet_"), KOHYA, True),
    "kohya, diffusers names": writer(split, flat("lora_unet_"), KOHYA, True),
    "diffusers": writer(split, dotted("transformer."), PEFT, False),
    "diffusers with alphas": writer(split, dotted("transformer."), PEFT, True),
    "diffusers, both": writer(split, dotted("transformer."), KOHYA, False),
    "ai-toolkit": writer(split, dotted("transformer."), PEFT, False),
    "PEFT": writer(split, dotted("base_model.model."), PEFT, False),
    "PEFT, as it trains": writer(
        split, dotted("base_model.model."), (".lora_B.default.weight", ".lora_A.default.weight"), False
    ),
    "fal": writer(fused, dotted("base_model.model."), PEFT, False),
    "bare diffusers": writer(split, dotted(""), PEFT, False),
    "DiffSynth": writer(split, dotted(""), (".lora_B.default.weight", ".lora_A.default.weight"), False),
    "BFL": writer(fused, dotted(""), PEFT, False),
    "ComfyUI": writer(fused, dotted("diffusion_model."), KOHYA, True),
    "ComfyUI, PEFT": writer(fused, dotted("diffusion_model."), PEFT, False),
    "OneTrainer": writer(split, flat("lora_transformer_"), KOHYA, True),
    "LyCORIS": writer(split, flat("lycoris_"), KOHYA, True),
    "old diffusers": writer(split, dotted("unet."), ("_lora.up.weight", "_lora.down.weight"), False),
    "old processors": writer(
        split, lambda name: f"transformer.{processor(name)}", (".lora.up.weight", ".lora.down.weight"), False
    ),
    "old linear layers": writer(
        split, dotted("transformer."), (".lora_linear_layer.up.weight", ".lora_linear_layer.down.weight"), False
    ),
    "without weight": writer(split, dotted("transformer."), (".lora_B", ".lora_A"), False),
}


def xlabs(made: Factors) -> Written:
    """XLabs' names, of attention alone; a single block's down of `linear1` has q, k and v only."""
    state = {}
    for i in range(2):
        for number, stream in ((1, "img"), (2, "txt")):
            for theirs, ours in (("qkv", "qkv"), ("proj", "proj")):
                up, down = made[f"double_blocks.{i}.{stream}_attn.{ours}"]
                state[f"double_blocks.{i}.processor.{theirs}_lora{number}.up.weight"] = up
                state[f"double_blocks.{i}.processor.{theirs}_lora{number}.down.weight"] = down
        up, down = made[f"single_blocks.{i}.linear1"]
        state[f"single_blocks.{i}.processor.qkv_lora.up.weight"] = up[: 3 * D].clone()
        state[f"single_blocks.{i}.processor.qkv_lora.down.weight"] = down
        up, down = made[f"single_blocks.{i}.linear2"]
        state[f"single_blocks.{i}.processor.proj_lora.up.weight"] = up
        state[f"single_blocks.{i}.processor.proj_lora.down.weight"] = down
    return state


def save(path: Path, state: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    """Write a LoRA; the path."""
    save_file({key: tensor.clone().contiguous() for key, tensor in state.items()}, path, metadata)
    return path


# ---------------------------------------------------------------- other methods, as LyCORIS writes them

PROJ, MLP, SQUARE = "double_blocks.0.img_attn.proj", "double_blocks.0.img_mlp.0", "double_blocks.1.txt_attn.proj"


def random(*shape: int, seed: int = 0, by: float = 0.1) -> Tensor:
    """Normal numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))) * by


def loha(key: str, n: int, k: int, rank: int, *, tucker: bool = False) -> Written:
    """A LoHa with alpha half its rank."""
    state = {f"{key}.alpha": torch.tensor(rank / 2)}
    for number in (1, 2):
        first, second = random(n, rank, seed=number), random(rank, k, seed=number)
        state |= {f"{key}.hada_w{number}_a": first.T if tucker else first, f"{key}.hada_w{number}_b": second}
        if tucker:
            state[f"{key}.hada_t{number}"] = random(rank, rank, seed=number, by=1)
    return state


def lokr(key: str, left: tuple[int, int], right: tuple[int, int], ranks: tuple[int | None, int | None]) -> Written:
    """A LoKr with alpha 2, its sides whole (None) or in factors of a rank."""
    state = {f"{key}.alpha": torch.tensor(2.0)}
    for number, (n, k), rank in zip((1, 2), (left, right), ranks, strict=True):
        if rank is None:
            state[f"{key}.lokr_w{number}"] = random(n, k, seed=number)
        else:
            state[f"{key}.lokr_w{number}_a"] = random(n, rank, seed=number)
            state[f"{key}.lokr_w{number}_b"] = random(rank, k, seed=number)
    return state


def glora(key: str, n: int, k: int, rank: int, *, old: bool = False) -> Written:
    """A GLoRA with alpha 3, in LyCORIS' newer or older order of factors."""
    a1, a2, b1, b2 = random(k, rank, seed=1), random(rank, k, seed=2), random(n, rank, seed=3), random(rank, k, seed=4)
    parts = (a2, a1, b2, b1) if old else (a1, a2, b1, b2)
    state = {f"{key}.{name}.weight": part for name, part in zip(("a1", "a2", "b1", "b2"), parts, strict=True)}
    return state | {f"{key}.alpha": torch.tensor(3.0)}


def lora(key: str, n: int, k: int, rank: int) -> Written:
    """A kohya LoRA with alpha 1."""
    return {
        f"{key}.lora_up.weight": random(n, rank, seed=5),
        f"{key}.lora_down.weight": random(rank, k, seed=6),
        f"{key}.alpha": torch.tensor(1.0),
    }


def weights() -> dict[str, Tensor]:
    """A W for each linear of the miniature, and its biases and norms, under BFL's names."""
    state = {}
    for number, (name, (n, k, _)) in enumerate(LINEARS.items()):
        state |= {f"{name}.weight": random(n, k, seed=number, by=1), f"{name}.bias": random(n, seed=number, by=1)}
    for block in [f"double_blocks.{i}.{stream}_attn" for i in range(2) for stream in ("img", "txt")] + [
        f"single_blocks.{i}" for i in range(2)
    ]:
        for kind in ("query", "key"):
            state[f"{block}.norm.{kind}_norm.scale"] = random(D, seed=len(block), by=1)
    return state
