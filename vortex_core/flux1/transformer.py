"""Step time: FLUX's double and single blocks, from packed latents and modulation to a velocity.

Legend: B pictures, S image tokens, N text tokens, L = N + S, D hidden, H heads, C = D / H, M width of the MLP.
Names and fused layout are BFL's (`qkv`, `linear1`, `linear2`), so a released checkpoint maps one to one. Time, pooled
text and modulation linears depend on the prompt alone and run at prompt time (flux1/conditioning.py); a block gets its
shifts, scales and gates as rows of the modulation table. Linears are `nn.Linear` here; loading puts NF4 in their place
(storage/materialize.py).

A step is a fixed sequence of products and kernels between buffers (flux1/step_buffers.py), so that it can be replayed.
Text and image share one residual stream and one qkv buffer, each in its own rows: nothing is concatenated or split. A
block ends with the gated sum *and* the adaLN of the next block: one pass over memory instead of two.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import Linear

from ..kernels import Kernels, ScaledTensor, reference
from ..quant.linear import NF4Linear, multiply
from ..quant.precision import EXACT, Precision
from .attention import attend
from .spec import DOUBLE_ROWS, FINAL_ROWS, SINGLE_ROWS, FluxSpec
from .step_buffers import Rope, Size, StepBuffers, Take, TokenStream

HALF = DOUBLE_ROWS // 2  # modulation rows of one stream of a double block


class Next(NamedTuple):
    """The adaLN that a block ends with, for what follows: shift and scale `[D]`, and where the result goes."""

    shift: Tensor
    scale: Tensor
    out: ScaledTensor


class RMSNorm(nn.Module):
    """The weight of an RMS norm, with BFL's name."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.empty(dim))


class QKNorm(nn.Module):
    """Norms of queries and keys over the channels of a head."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.query_norm = RMSNorm(head_dim)
        self.key_norm = RMSNorm(head_dim)


class SelfAttention(nn.Module):
    """The attention weights of one stream of a double block."""

    def __init__(self, spec: FluxSpec) -> None:
        super().__init__()
        self.qkv = Linear(spec.hidden, 3 * spec.hidden)
        self.norm = QKNorm(spec.head_dim)
        self.proj = Linear(spec.hidden, spec.hidden)


class DoubleBlock(nn.Module):
    """Image and text have weights of their own and meet in attention."""

    def __init__(self, spec: FluxSpec) -> None:
        super().__init__()
        self.img_attn = SelfAttention(spec)
        self.txt_attn = SelfAttention(spec)
        self.img_mlp = mlp(spec)
        self.txt_mlp = mlp(spec)

    def forward(self, step: StepBuffers, mod: Tensor, img_next: Next, txt_next: Next) -> None:
        """From `normal` of both streams to the next block's. `mod` `[12, D]`: image, then text."""
        img, txt = step.img, step.txt
        with step.beside():
            multiply(self.txt_attn.qkv, txt.normal, txt.qkv.flatten(2), step.txt_scratch)
        multiply(self.img_attn.qkv, img.normal, img.qkv.flatten(2))
        step.meet()
        out = attend(step, step.qkv, ((txt, self.txt_attn.norm), (img, self.img_attn.norm)))
        with step.beside():
            branch(step.kernels, txt, out, self.txt_attn, self.txt_mlp, mod[HALF:], step.txt_scratch)
        branch(step.kernels, img, out, self.img_attn, self.img_mlp, mod[:HALF])
        step.meet()
        # both after the last use of `normal`: the next block's may be the joint one, which is laid out differently
        step.kernels.residual_modulate(img.x, img.y, mod[HALF - 1], *img_next)
        step.kernels.residual_modulate(txt.x, txt.y, mod[-1], *txt_next)


class SingleBlock(nn.Module):
    """Text and image as one sequence; attention and MLP side by side behind one wide linear."""

    def __init__(self, spec: FluxSpec) -> None:
        super().__init__()
        self.linear1 = Linear(spec.hidden, 3 * spec.hidden + spec.mlp)
        self.linear2 = Linear(spec.hidden + spec.mlp, spec.hidden)
        self.norm = QKNorm(spec.head_dim)

    def forward(self, step: StepBuffers, gate: Tensor, following: Next) -> None:
        """From `normal` of all tokens to what follows, which may take fewer: the last ones. `gate` `[D]`."""
        joint, last = step.joint, following.out.values.shape[1]
        multiply(self.linear1, joint.normal, step.linear1, gelu=joint.active is None)
        out = attend(step, joint.qkv, ((joint, self.norm),))
        multiply(self.linear2, joint.activate(step.kernels, out), joint.y)
        step.kernels.residual_modulate(joint.x[:, -last:], joint.y[:, -last:], gate, *following)


class FinalLayer(nn.Module):
    """The last norm and the projection to packed latents."""

    def __init__(self, spec: FluxSpec) -> None:
        super().__init__()
        self.linear = Linear(spec.hidden, spec.in_channels)


class Transformer(nn.Module):
    """The part of FLUX that runs for every token in every step."""

    def __init__(self, spec: FluxSpec) -> None:
        super().__init__()
        self.spec = spec
        self.kernels: Kernels = reference
        self.precision: Precision = EXACT
        self.side: torch.cuda.Stream | None = None
        self.img_in = Linear(spec.in_channels, spec.hidden)
        self.txt_in = Linear(spec.context, spec.hidden)
        self.double_blocks = nn.ModuleList(DoubleBlock(spec) for _ in range(spec.double_blocks))
        self.single_blocks = nn.ModuleList(SingleBlock(spec) for _ in range(spec.single_blocks))
        self.final_layer = FinalLayer(spec)

    def use(self, kernels: Kernels, precision: Precision = EXACT, *, side: torch.cuda.Stream | None = None) -> None:
        """Compute with `kernels`, and multiply in `precision`; 8 bits need NF4 weights.

        `side`: a CUDA stream for the text of double blocks, which uses what the image's last tiles leave idle.
        """
        self.kernels, self.precision, self.side = kernels, precision, side
        for linear in self.linears():
            linear.use(precision)

    @property
    def on_card(self) -> bool:
        """Whether the weights lie on a CUDA device."""
        return self.img_in.weight.is_cuda

    def linears(self) -> Iterator[NF4Linear]:
        """Every quantized linear."""
        return (part for part in self.modules() if isinstance(part, NF4Linear))

    def step(self, size: Size, take: Take | None = None) -> StepBuffers:
        """Buffers for a step of `size`, from `take`; default fresh ones."""
        weight = self.img_in.weight

        def fresh(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=weight.device)

        how = (self.spec, self.kernels, size, weight.dtype, take or fresh)
        return StepBuffers(*how, self.precision, side=self.side)

    def forward(
        self,
        img: Tensor,
        txt: Tensor,
        modulation: Tensor,
        pe: Rope,
        nag: Tensor | None = None,
        step: StepBuffers | None = None,
    ) -> Tensor:
        """The velocity `[B, S, 64]` of packed latents `img [B, S, 64]` at one step.

        `txt` `[B, N, D]`: T5's embeddings after `txt_in`, which is the same in every step, so the caller runs it once.
        `modulation` `[rows, D]`: the table of one step. `nag`: the terms of `reference.guide`, where `step` has a text
        to avoid. `step`: the buffers to work in, default fresh ones; one of them is returned.
        """
        step = step or self.step((img.shape[0], txt.shape[1], img.shape[1]))
        step.place(pe)
        step.nag = nag
        step.txt.x.copy_(txt)
        multiply(self.img_in, ScaledTensor(img.to(self.img_in.weight.dtype)), step.img.x)

        def following(row: int, out: ScaledTensor) -> Next:
            return Next(modulation[row], modulation[row + 1], out)

        streams = (step.img, step.txt)
        for row, stream in zip((0, HALF), streams, strict=True):
            step.kernels.modulate(stream.x, *following(row, stream.normal))
        row, singles = 0, DOUBLE_ROWS * len(self.double_blocks)
        for double in self.double_blocks:
            mod, row = modulation[row : row + DOUBLE_ROWS], row + DOUBLE_ROWS
            if row < singles:
                double(step, mod, following(row, step.img.normal), following(row + HALF, step.txt.normal))
            else:
                parts = (step.joint.normal.tokens(stream.start, stream.stop) for stream in streams)
                double(step, mod, *(following(row, part) for part in parts))
        for single in self.single_blocks:
            gate, row = modulation[row + SINGLE_ROWS - 1], row + SINGLE_ROWS
            out = step.joint.normal if row + FINAL_ROWS < len(modulation) else step.final
            single(step, gate, following(row, out))
        multiply(self.final_layer.linear, step.final, step.velocity)
        return step.velocity


def mlp(spec: FluxSpec) -> nn.Sequential:
    """FLUX's MLP; entries 0 and 2 carry the weights, as in the checkpoint's names."""
    return nn.Sequential(Linear(spec.hidden, spec.mlp), nn.GELU(approximate="tanh"), Linear(spec.mlp, spec.hidden))


def branch(
    kernels: Kernels,
    stream: TokenStream,
    out: Tensor,
    attn: SelfAttention,
    mlp: nn.Module,
    mod: Tensor,
    scratch: int = 0,
) -> None:
    """One stream of a double block, from attention's output to the MLP's. `mod` `[6, D]`."""
    _, _, gate, shift, scale, _ = mod
    wide, _, narrow = mlp.children()
    multiply(attn.proj, stream.pack(out, kernels), stream.y, scratch)
    kernels.residual_modulate(stream.x, stream.y, gate, shift, scale, stream.normal)
    multiply(wide, stream.normal, stream.wide, scratch, gelu=stream.active is None)
    multiply(narrow, stream.activate(kernels), stream.y, scratch)
