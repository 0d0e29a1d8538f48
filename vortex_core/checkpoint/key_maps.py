"""Which tensors of other layouts make a canonical one: diffusers' transformer and VAE, llama.cpp's T5.

BFL's layout is canonical: fused, so fewer and larger products.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..flux1.spec import FluxSpec

_TOP = {
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    "time_in.in_layer": ("time_text_embed.timestep_embedder.linear_1",),
    "time_in.out_layer": ("time_text_embed.timestep_embedder.linear_2",),
    "vector_in.in_layer": ("time_text_embed.text_embedder.linear_1",),
    "vector_in.out_layer": ("time_text_embed.text_embedder.linear_2",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
    "final_layer.linear": ("proj_out",),
}
_DOUBLE = {
    "img_mod.lin": ("norm1.linear",),
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "img_attn.norm.query_norm": ("attn.norm_q",),
    "img_attn.norm.key_norm": ("attn.norm_k",),
    "img_attn.proj": ("attn.to_out.0",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "txt_mod.lin": ("norm1_context.linear",),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "txt_attn.norm.query_norm": ("attn.norm_added_q",),
    "txt_attn.norm.key_norm": ("attn.norm_added_k",),
    "txt_attn.proj": ("attn.to_add_out",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
}
_SINGLE = {
    "modulation.lin": ("norm.linear",),
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
    "norm.query_norm": ("attn.norm_q",),
    "norm.key_norm": ("attn.norm_k",),
}
_BLOCKS = {
    "double_blocks": ("transformer_blocks", _DOUBLE),
    "single_blocks": ("single_transformer_blocks", _SINGLE),
}
_VAE_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
_T5 = {
    ("0", "q"): "attn_q",
    ("0", "k"): "attn_k",
    ("0", "v"): "attn_v",
    ("0", "o"): "attn_o",
    ("0", "relative_attention_bias"): "attn_rel_b",
    ("0", "layer_norm"): "attn_norm",
    ("1", "wi_0"): "ffn_gate",
    ("1", "wi_1"): "ffn_up",
    ("1", "wo"): "ffn_down",
    ("1", "layer_norm"): "ffn_norm",
}  # by sublayer and module
VAE_LEVELS = 4
TIME = 256  # sinusoids of a timestep
SWAPPED = ("final_layer.adaLN_modulation.1",)  # diffusers stores (scale, shift), BFL (shift, scale)


def step_shapes(spec: FluxSpec) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what `Transformer(spec)` is filled with, for those who look at a file without torch."""
    d, m = spec.hidden, spec.mlp
    shapes = dict([*_linear("img_in", d, spec.in_channels), *_linear("txt_in", d, spec.context)])
    for i in range(spec.double_blocks):
        for stream in ("img", "txt"):
            block = f"double_blocks.{i}.{stream}"
            shapes |= dict([*_linear(f"{block}_attn.qkv", 3 * d, d), *_linear(f"{block}_attn.proj", d, d)])
            shapes |= dict([*_linear(f"{block}_mlp.0", m, d), *_linear(f"{block}_mlp.2", d, m)])
            shapes |= {f"{block}_attn.norm.{kind}_norm.scale": (spec.head_dim,) for kind in ("query", "key")}
    for i in range(spec.single_blocks):
        block = f"single_blocks.{i}"
        shapes |= dict([*_linear(f"{block}.linear1", 3 * d + m, d), *_linear(f"{block}.linear2", d, d + m)])
        shapes |= {f"{block}.norm.{kind}_norm.scale": (spec.head_dim,) for kind in ("query", "key")}
    return shapes | dict(_linear("final_layer.linear", spec.in_channels, d))


def modulation_shapes(spec: FluxSpec) -> dict[str, tuple[int, ...]]:
    """As `step_shapes`, of `Modulation(spec)`."""
    d = spec.hidden
    linears = {"time_in.in_layer": (d, TIME), "time_in.out_layer": (d, d)}
    linears |= {"vector_in.in_layer": (d, spec.vec), "vector_in.out_layer": (d, d)}
    doubles = (f"double_blocks.{i}.{stream}_mod.lin" for i in range(spec.double_blocks) for stream in ("img", "txt"))
    linears |= dict.fromkeys(doubles, (6 * d, d))
    linears |= {f"single_blocks.{i}.modulation.lin": (3 * d, d) for i in range(spec.single_blocks)}
    linears |= {"final_layer.adaLN_modulation.1": (2 * d, d)}
    return dict(pair for name, shape in linears.items() for pair in _linear(name, *shape))


def _linear(name: str, rows: int, columns: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (rows, columns)
    yield f"{name}.bias", (rows,)


def flux_sources(name: str) -> tuple[str, ...]:
    """The diffusers names, in row order, of a canonical transformer tensor such as `single_blocks.0.linear1.weight`.

    Modules in `SWAPPED` also need their halves swapped.
    """
    module, _, kind = name.rpartition(".")
    kind = "weight" if kind == "scale" else kind
    family, _, rest = module.partition(".")
    if family in _BLOCKS:
        theirs, table = _BLOCKS[family]
        index, _, inner = rest.partition(".")
        return tuple(f"{theirs}.{index}.{source}.{kind}" for source in table[inner])
    return tuple(f"{source}.{kind}" for source in _TOP[module])


def source_rows(sources: Sequence[str], rows: int) -> Iterator[tuple[str, int]]:
    """How many of a canonical tensor's `rows` each of its `sources` has, in order: `qkv` thirds, `linear1` 1:1:1:4."""
    share = rows // (7 if len(sources) == 4 else len(sources))
    for source in sources[:-1]:
        yield source, share
    yield sources[-1], rows - share * (len(sources) - 1)


def t5_gguf_sources(name: str) -> tuple[str, ...]:
    """llama.cpp's name of a T5 encoder tensor such as `encoder.block.0.layer.0.SelfAttention.q.weight`."""
    part = name.split(".")
    match part:
        case ["encoder", "block", block, "layer", layer, *rest]:
            inner = "layer_norm" if rest[0] == "layer_norm" else rest[1]
            theirs = f"enc.blk.{block}.{_T5[layer, inner]}"
        case ["encoder", "final_layer_norm", _]:
            theirs = "enc.output_norm"
        case _:
            theirs = "token_embd"
    return (f"{theirs}.{part[-1]}",)


def vae_sources(name: str) -> tuple[str, ...]:
    """The diffusers name of a canonical VAE decoder tensor such as `up.3.block.0.conv1.weight`."""
    part = name.split(".")
    match part:
        case ["mid", "attn_1", inner, kind]:
            theirs = f"mid_block.attentions.0.{_VAE_ATTENTION[inner]}.{kind}"
        case ["mid", block, *rest]:
            theirs = f"mid_block.resnets.{int(block.removeprefix('block_')) - 1}.{'.'.join(rest)}"
        case ["up", level, "block", *rest]:
            theirs = f"up_blocks.{VAE_LEVELS - 1 - int(level)}.resnets.{'.'.join(rest)}"
        case ["up", level, "upsample", *rest]:
            theirs = f"up_blocks.{VAE_LEVELS - 1 - int(level)}.upsamplers.0.{'.'.join(rest)}"
        case ["norm_out", kind]:
            theirs = f"conv_norm_out.{kind}"
        case _:
            theirs = name
    return (f"decoder.{theirs.replace('nin_shortcut', 'conv_shortcut')}",)
