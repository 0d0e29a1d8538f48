"""The miniature's parts: sizes, tokenizers, modules, and the directory that holds them.

It is FLUX.1-schnell's architecture at toy size, built from diffusers' and transformers' own classes, so that the
trained model is the served model. Everything fits 24 MB in bf16. Every linear has in-features that are a multiple of 64
(one NF4 block), and every square one a multiple of 256 blocks, so packed weights split as FLUX's do.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from einops import rearrange
from safetensors.torch import load_file
from scenes import words
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast, T5Config, T5EncoderModel

SIDE = 128  # native picture side, pixels
CLIP_LENGTH, T5_LENGTH = 77, 256
SCALING, SHIFT = 0.3611, 0.1159
PARTS = ("transformer", "text_encoder", "text_encoder_2", "vae")

TRANSFORMER = dict(
    patch_size=1, in_channels=64, num_layers=2, num_single_layers=3, attention_head_dim=128, num_attention_heads=2,
    joint_attention_dim=128, pooled_projection_dim=128, guidance_embeds=False, axes_dims_rope=(16, 56, 56),
)  # fmt: skip
VAE = dict(
    in_channels=3, out_channels=3, latent_channels=16, block_out_channels=(32, 32, 64, 128), layers_per_block=1,
    down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, norm_num_groups=8,
    sample_size=SIDE, scaling_factor=SCALING, shift_factor=SHIFT, force_upcast=False,
    use_quant_conv=False, use_post_quant_conv=False,
)  # fmt: skip
T5 = dict(
    d_model=128, d_kv=64, d_ff=256, num_layers=3, num_heads=2, feed_forward_proj="gated-gelu",
    relative_attention_num_buckets=32, relative_attention_max_distance=128, dropout_rate=0.0,
    pad_token_id=0, eos_token_id=1, use_cache=False, is_encoder_decoder=False, tie_word_embeddings=False,
)  # fmt: skip
CLIP = dict(
    hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2, projection_dim=128,
    max_position_embeddings=CLIP_LENGTH, hidden_act="quick_gelu",
)  # fmt: skip
SCHEDULER = dict(num_train_timesteps=1000, shift=1.0, use_dynamic_shifting=False, base_image_seq_len=256,
                 max_image_seq_len=4096, base_shift=0.5, max_shift=1.15)  # fmt: skip

# ---------------------------------------------------------------- tokenizers


def t5_tokenizer() -> Tokenizer:
    """Unigram over the captions' words, with bytes below them so that nothing is unknown. Ignores case."""
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    vocabulary += [(f"<0x{byte:02X}>", -20.0) for byte in range(256)]
    vocabulary += [("\u2581", -8.0)] + [(f"\u2581{word}", -4.0) for word in words()]
    vocabulary += [(chr(c), -12.0) for c in range(33, 127) if not chr(c).isupper()]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=2, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(replacement="\u2581", prepend_scheme="always")]
    )
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(), decoders.Fuse()])
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>"])
    return tokenizer


def clip_tokenizer() -> Tokenizer:
    """Byte-level BPE with CLIP's conventions, merged until each word of the captions is one token.

    The merges are found here, ties in alphabetical order: the trainer of `tokenizers` numbers some tokens by the
    order of a hash map, so two runs of it disagree, and stored ids mean something else in the next run.
    """
    start, end, suffix = "<|startoftext|>", "<|endoftext|>", "</w>"
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges, splits = [], [[*word[:-1], word[-1] + suffix] for word in words()]
    while pairs := Counter(pair for split in splits for pair in itertools.pairwise(split)):
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        splits = [_merged(split, best) for split in splits]
    tokens = [start, end, *alphabet, *(letter + suffix for letter in alphabet), *map("".join, merges)]
    ids = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=merges, unk_token=end, end_of_word_suffix=suffix))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    pattern = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}", special_tokens=[(start, ids[start]), (end, ids[end])]
    )
    tokenizer.add_special_tokens([start, end])
    return tokenizer


def _merged(split: list[str], pair: tuple[str, str]) -> list[str]:
    """A word's symbols with each occurrence of `pair` joined, from the left."""
    out: list[str] = []
    for symbol in split:
        if out and (out[-1], symbol) == pair:
            out[-1] += symbol
        else:
            out.append(symbol)
    return out


# ---------------------------------------------------------------- modules


@dataclass
class Tiny:
    """The whole miniature: modules, and tokenizers as plain `tokenizers.Tokenizer`."""

    transformer: FluxTransformer2DModel
    text_encoder: CLIPTextModel
    text_encoder_2: T5EncoderModel
    vae: AutoencoderKL
    tokenizer: Tokenizer
    tokenizer_2: Tokenizer

    def modules(self) -> Iterator[nn.Module]:
        return (getattr(self, part) for part in PARTS)

    def to(self, *args: Any) -> Tiny:
        for module in self.modules():
            module.to(*args)
        return self


def build(seed: int = 0) -> Tiny:
    """A randomly initialised miniature, float32."""
    torch.manual_seed(seed)
    clip, t5 = clip_tokenizer(), t5_tokenizer()
    ends = {f"{name}_token_id": clip.token_to_id(f"<|{name_}oftext|>") for name, name_ in
            (("bos", "start"), ("eos", "end"), ("pad", "end"))}  # fmt: skip
    return Tiny(
        transformer=FluxTransformer2DModel(**TRANSFORMER),
        text_encoder=CLIPTextModel(CLIPTextConfig(vocab_size=clip.get_vocab_size(), **ends, **CLIP)).eval(),
        text_encoder_2=T5EncoderModel(T5Config(vocab_size=t5.get_vocab_size(), **T5)).eval(),
        vae=AutoencoderKL(**VAE),
        tokenizer=clip,
        tokenizer_2=t5,
    )


def load(path: Path) -> Tiny:
    """Read a directory that `save` wrote, in float32."""
    classes = dict(zip(PARTS, (FluxTransformer2DModel, CLIPTextModel, T5EncoderModel, AutoencoderKL), strict=True))
    parts = {p: c.from_pretrained(path / p, **{"torch_dtype": torch.float32}) for p, c in classes.items()}
    tokenizers = {p: Tokenizer.from_file(str(path / p / "tokenizer.json")) for p in ("tokenizer", "tokenizer_2")}
    return Tiny(**parts, **tokenizers)


def save(tiny: Tiny, path: Path) -> None:
    """Write the diffusers directory layout, weights in bf16."""
    for part in PARTS:
        module = getattr(tiny, part)
        dtype = next(module.parameters()).dtype
        module.to(torch.bfloat16).save_pretrained(path / part)
        module.to(dtype)
    specials = {
        "tokenizer": dict(bos_token="<|startoftext|>", eos_token="<|endoftext|>", pad_token="<|endoftext|>",
                          unk_token="<|endoftext|>", model_max_length=CLIP_LENGTH),
        "tokenizer_2": dict(eos_token="</s>", pad_token="<pad>", unk_token="<unk>", model_max_length=512),
    }  # fmt: skip
    for part, special in specials.items():
        (path / part).mkdir(parents=True, exist_ok=True)
        tokenizer = getattr(tiny, part)
        tokenizer.no_padding()
        tokenizer.no_truncation()
        tokenizer.save(str(path / part / "tokenizer.json"))
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            **special,
        }
        (path / part / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    FlowMatchEulerDiscreteScheduler(**SCHEDULER).save_pretrained(path / "scheduler")
    index = {
        "_class_name": "FluxPipeline", "_diffusers_version": "0.30.0",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", PreTrainedTokenizerFast.__name__],
        "tokenizer_2": ["transformers", PreTrainedTokenizerFast.__name__],
        "transformer": ["diffusers", "FluxTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }  # fmt: skip
    (path / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    for file in path.rglob("*.safetensors"):
        file.chmod(0o644)


# ---------------------------------------------------------------- pure steps


def tokenize(tokenizer: Tokenizer, prompts: list[str], length: int, pad: int) -> Tensor:
    """Token ids [B, length], padded and cut (the end token survives the cut)."""
    encoded = [e.ids for e in tokenizer.encode_batch(prompts)]
    rows = [ids if len(ids) <= length else [*ids[: length - 1], ids[-1]] for ids in encoded]
    return torch.tensor([ids + [pad] * (length - len(ids)) for ids in rows])


def embed(tiny: Tiny, t5_ids: Tensor, clip_ids: Tensor) -> tuple[Tensor, Tensor]:
    """T5's hidden states [B, L, 128] without a mask, as FLUX has it, and CLIP's pooled vector [B, 128]."""
    table = tiny.text_encoder_2.shared.weight
    # A product with one-hot rows: its gradient is a plain product, too. A lookup would sum millions of pads.
    embeds = F.one_hot(t5_ids, table.shape[0]).to(table.dtype) @ table
    txt = tiny.text_encoder_2(inputs_embeds=embeds).last_hidden_state
    return txt, tiny.text_encoder(input_ids=clip_ids).pooler_output


def patchify(latents: Tensor) -> Tensor:
    """[B, 16, H, W] -> [B, H/2 * W/2, 64]"""
    return rearrange(latents, "b c (h ph) (w pw) -> b (h w) (c ph pw)", ph=2, pw=2)


def unpatchify(img: Tensor, rows: int) -> Tensor:
    """[B, rows * columns, 64] -> [B, 16, 2 rows, 2 columns]"""
    return rearrange(img, "b (h w) (c ph pw) -> b c (h ph) (w pw)", h=rows, ph=2, pw=2)


def image_ids(rows: int, columns: int, device: torch.device) -> Tensor:
    """Positions (0, y, x) of image tokens, [rows * columns, 3]."""
    y, x = torch.meshgrid(torch.arange(rows, device=device), torch.arange(columns, device=device), indexing="ij")
    return rearrange(torch.stack([torch.zeros_like(y), y, x], -1), "h w i -> (h w) i").float()


def velocity(tiny: Tiny, img: Tensor, t: Tensor, txt: Tensor, vec: Tensor) -> Tensor:
    """The transformer's velocity [B, S, 64] at time t [B] in 0..1; pictures are square."""
    side = round(img.shape[1] ** 0.5)
    txt_ids = torch.zeros(txt.shape[1], 3, device=img.device)
    return tiny.transformer(
        hidden_states=img, timestep=t.to(img.dtype), encoder_hidden_states=txt, pooled_projections=vec,
        img_ids=image_ids(side, side, img.device), txt_ids=txt_ids, return_dict=False,
    )[0]  # fmt: skip


def decode(tiny: Tiny, img: Tensor) -> Tensor:
    """Packed, normalised latents [B, S, 64] to pictures [B, H, W, 3] in 0..1."""
    latents = unpatchify(img, round(img.shape[1] ** 0.5))
    pixels = tiny.vae.decode(latents / SCALING + SHIFT, return_dict=False)[0]
    return rearrange((pixels.float() / 2 + 0.5).clamp(0, 1), "b c h w -> b h w c")


# ---------------------------------------------------------------- NF4

NF4 = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
])  # fmt: skip


@cache
def _levels(device: torch.device) -> Tensor:
    return NF4.to(device)  # once a device: a copy from the host cannot be captured in a CUDA graph


def nf4_round(weight: Tensor) -> Tensor:
    """What NF4 (block size 64, absmax in float32) keeps of a weight."""
    code = _levels(weight.device)
    blocks = weight.float().reshape(-1, 64)
    absmax = blocks.abs().amax(1, keepdim=True).clamp(min=1e-12)
    index = torch.bucketize(blocks / absmax, (code[1:] + code[:-1]) / 2)
    return (code[index] * absmax).view_as(weight).to(weight.dtype)


def nf4_parameters(tiny: Tiny) -> Iterator[nn.Parameter]:
    """The weights that are served in NF4: linears of the blocks (modulation too) and of T5."""
    transformer = tiny.transformer
    for module in (
        transformer.transformer_blocks,
        transformer.single_transformer_blocks,
        tiny.text_encoder_2,
    ):
        yield from (m.weight for m in module.modules() if isinstance(m, nn.Linear))


def quantize(tiny: Tiny) -> Tiny:
    """Round every weight that is served in NF4, in place."""
    with torch.no_grad():
        for weight in nf4_parameters(tiny):
            weight.copy_(nf4_round(weight))
    return tiny


# ---------------------------------------------------------------- LoRA


@torch.no_grad()
def add_lora(transformer: FluxTransformer2DModel, path: Path, strength: float = 1.0) -> None:
    """Add the updates of a LoRA file in diffusers' names to the weights, in float32: alpha / rank times up @ down."""
    tensors = load_file(path)
    for key in [k for k in tensors if k.endswith(".lora_A.weight")]:
        name = key.removesuffix(".lora_A.weight")
        down, up = tensors[key].float(), tensors[f"{name}.lora_B.weight"].float()
        scale = strength * float(tensors[f"{name}.alpha"]) / len(down)
        weight = transformer.get_submodule(name.removeprefix("transformer.")).weight
        weight.copy_((weight.float() + scale * (up @ down).to(weight.device)).to(weight.dtype))
