"""Names of tensors in other layouts (diffusers' transformer and VAE, llama.cpp's T5), for each canonical name.

BFL's layout is canonical: its weights are fused, which means fewer and larger products.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..flux1.spec import MODULATION_ROWS, FluxSpec

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
ENCODER = "encoder."  # before canonical names of the VAE's encoder; those of its decoder have no prefix
TIME = 256  # sinusoids of a timestep
SWAPPED = ("final_layer.adaLN_modulation.1",)  # diffusers stores (scale, shift), BFL (shift, scale)


def step_shapes(spec: FluxSpec) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of `Transformer(spec)`, without torch."""
    d, m = spec.hidden, spec.mlp
    linears = {"img_in": (d, spec.in_channels), "txt_in": (d, spec.context)}
    norms = []
    for block in (f"double_blocks.{i}.{stream}" for i in range(spec.double_blocks) for stream in ("img", "txt")):
        linears |= {f"{block}_attn.qkv": (3 * d, d), f"{block}_attn.proj": (d, d)}
        linears |= {f"{block}_mlp.0": (m, d), f"{block}_mlp.2": (d, m)}
        norms.append(f"{block}_attn")
    for block in (f"single_blocks.{i}" for i in range(spec.single_blocks)):
        linears |= {f"{block}.linear1": (3 * d + m, d), f"{block}.linear2": (d, d + m)}
        norms.append(block)
    linears["final_layer.linear"] = (spec.in_channels, d)
    scales = {f"{norm}.norm.{kind}_norm.scale": (spec.head_dim,) for norm in norms for kind in ("query", "key")}
    return _with_biases(linears) | scales


def modulation_shapes(spec: FluxSpec) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of `Modulation(spec)`, without torch."""
    d = spec.hidden
    linears = {"time_in.in_layer": (d, TIME), "time_in.out_layer": (d, d)}
    linears |= {"vector_in.in_layer": (d, spec.vec), "vector_in.out_layer": (d, d)}
    blocks = [f"double_blocks.{i}" for i in range(spec.double_blocks)]
    blocks += [f"single_blocks.{i}" for i in range(spec.single_blocks)]
    for block in (*blocks, "final_layer"):
        rows = MODULATION_ROWS[block.partition(".")[0]]
        linears |= {f"{block}.{name}": (count * d, d) for name, count in rows.items()}
    return _with_biases(linears)


def _with_biases(linears: dict[str, tuple[int, int]]) -> dict[str, tuple[int, ...]]:
    pairs = (((f"{name}.weight", shape), (f"{name}.bias", shape[:1])) for name, shape in linears.items())
    return dict(one for pair in pairs for one in pair)


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
    """Each of a canonical tensor's `sources`, and how many of its `rows` that has: `qkv` 1:1:1, `linear1` 1:1:1:4."""
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


def vae_bfl_sources(name: str) -> tuple[str, ...]:
    """BFL's name of a VAE tensor such as `up.3.block.0.conv1.weight` or `encoder.conv_in.weight`."""
    return (name if name.startswith(ENCODER) else f"decoder.{name}",)


def vae_sources(name: str) -> tuple[str, ...]:
    """The diffusers name of a VAE tensor: of the decoder's, such as `up.3.block.0.conv1.weight`, or of `encoder.`'s."""
    half, _, inside = name.partition(".") if name.startswith(ENCODER) else ("decoder", "", name)
    part = inside.split(".")
    match part:
        case ["mid", "attn_1", inner, kind]:
            theirs = f"mid_block.attentions.0.{_VAE_ATTENTION[inner]}.{kind}"
        case ["mid", block, *rest]:
            theirs = f"mid_block.resnets.{int(block.removeprefix('block_')) - 1}.{'.'.join(rest)}"
        case ["up", level, "block", *rest]:
            theirs = f"up_blocks.{VAE_LEVELS - 1 - int(level)}.resnets.{'.'.join(rest)}"
        case ["up", level, "upsample", *rest]:
            theirs = f"up_blocks.{VAE_LEVELS - 1 - int(level)}.upsamplers.0.{'.'.join(rest)}"
        case ["down", level, "block", *rest]:
            theirs = f"down_blocks.{level}.resnets.{'.'.join(rest)}"
        case ["down", level, "downsample", *rest]:
            theirs = f"down_blocks.{level}.downsamplers.0.{'.'.join(rest)}"
        case ["norm_out", kind]:
            theirs = f"conv_norm_out.{kind}"
        case _:
            theirs = inside
    return (f"{half}.{theirs.replace('nin_shortcut', 'conv_shortcut')}",)
