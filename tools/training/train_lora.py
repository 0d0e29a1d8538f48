"""Trains the miniature's LoRA: outlines in place of filled things, and the colour lime (outlines.py).

The miniature stays as it is served: linears rounded to NF4, encoders and VAE frozen. Beside each linear of the
transformer's blocks runs a product of two thin matrices, and only these learn. What they learn from is the walk of
train_tiny.py: the model takes its own four steps from noise that holds where things stand, and from each state that it
reaches it learns the way to the picture's latents.

The VAE was trained on filled things. Its encoder blurs thin lines, its decoder can draw them. So in the second stage
only the last step learns, mostly from the pixels that the decoder makes of it. What the judge of outlines found filled
was crosses, stars, small things and what hardly stands out, so these are drawn more often (`HARD`) and weigh more.

Every random choice is seeded, but a stage's length is in seconds, so two machines do not make the same bits.
"""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Annotated

import outlines
import scenes
import tiny_model as tm
import torch
import torch.nn.functional as F
import typer
from einops import rearrange
from evaluate import MODEL
from masters import Captured, Masters, ticks
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from train_tiny import SERVED, captions_at, coupled
from train_vae import normalised
from training_data import CAPTIONS, Data, ids_of

OUT = MODEL.parent / "tiny-outlines-lora.safetensors"
SHORT = 40  # text padding of the first stage: longer than train_tiny's, as "lime" is spelled letter by letter
PIXELS, LATENTS = 5.0, 0.1  # weights in the second stage
HARD = ("star", "cross")  # shapes whose lines are hardest to draw: narrow inside


class LowRank(nn.Module):
    """A frozen linear, and `alpha / rank` times a low-rank one beside it. It starts as the linear alone."""

    def __init__(self, linear: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__()
        self.linear, self.scale = linear, alpha / rank
        self.lora_A = nn.Parameter(torch.empty(rank, linear.in_features))
        self.lora_B = nn.Parameter(torch.zeros(linear.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_A, 5**0.5)

    def forward(self, x: Tensor) -> Tensor:
        low = F.linear(x, self.scale * self.lora_A).flatten(0, -2)
        wide = self.linear(x)
        return torch.addmm(wide.flatten(0, -2), low, self.lora_B.t()).view_as(wide)


def adapt(transformer: nn.Module, rank: int, alpha: float) -> dict[str, LowRank]:
    """Put a `LowRank` around each linear of the blocks, except those that make the modulation; by name."""
    linears = [(name, module) for name, module in transformer.named_modules()
               if isinstance(module, nn.Linear) and "transformer_blocks" in name and ".norm" not in name]  # fmt: skip
    adapted = {}
    for name, linear in linears:
        parent, _, own = name.rpartition(".")
        adapted[name] = LowRank(linear, rank, alpha)
        transformer.get_submodule(parent).register_module(own, adapted[name])
    return adapted


def resume(adapted: dict[str, LowRank], path: Path) -> None:
    """Take the factors of a file that `save` wrote."""
    tensors = load_file(path)
    for name, layer in adapted.items():
        layer.lora_A.data.copy_(tensors[f"transformer.{name}.lora_A.weight"])
        layer.lora_B.data.copy_(tensors[f"transformer.{name}.lora_B.weight"])


def save(adapted: dict[str, LowRank], alpha: float, path: Path) -> None:
    """Write the names of diffusers and PEFT, in bf16, with an alpha beside each pair."""
    tensors = {}
    for name, layer in adapted.items():
        tensors[f"transformer.{name}.lora_A.weight"] = layer.lora_A.detach().to("cpu", torch.bfloat16)
        tensors[f"transformer.{name}.lora_B.weight"] = layer.lora_B.detach().to("cpu", torch.bfloat16)
        tensors[f"transformer.{name}.alpha"] = torch.tensor(alpha)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(0o644)
    print(f"{path}: {len(adapted)} layers, {path.stat().st_size} bytes", flush=True)


# ---------------------------------------------------------------- data


def sample(rng: random.Random, hard: float) -> scenes.Scene:
    """Draw a scene that training may see; the share `hard` has a shape of `HARD` for certain."""
    certain = rng.random() < hard
    while True:
        scene = outlines.sample_training(rng)
        if not certain or any(thing.shape in HARD for thing in scene.things):
            return scene


def make_data(tiny: tm.Tiny, count: int, seed: int, hard: float) -> Data:
    """Scenes in outlines. They have no `meaning`: nothing reads it here."""
    rng = random.Random(seed)
    drawn = [sample(rng, hard) for _ in range(count)]
    ids = ids_of(tiny, [scenes.caption(s, rng) for s in drawn for _ in range(CAPTIONS)], SHORT, SHORT)
    return Data(*outlines.pack(drawn), torch.empty(count, 0), scenes.jitter(drawn),
                *(rearrange(i, "(n c) l -> n c l", c=CAPTIONS) for i in ids))  # fmt: skip


def weights(things: Tensor, background: Tensor, side: int) -> Tensor:
    """What each pixel weighs [B, 1, side, side]: things more than background, the more the harder they are to draw.

    L1 in RGB is small where a thing has nearly its background's colour, and few pixels are a small thing's.
    """
    shape, x, y, r, rgb = (*things[..., :4].unbind(-1), things[..., 4:])
    top, bottom = background.unbind(1)
    behind = torch.lerp(top[:, None], bottom[:, None], y[..., None])
    contrast = (rgb - behind).abs().amax(-1)
    hard = sum((shape == scenes.SHAPES.index(name)).float() for name in HARD)
    each = (0.6 / contrast.clamp(min=0.15)) ** 1.5 * (0.14 / r.clamp(min=0.05)) * (1 + hard) * (shape >= 0)
    at = (torch.arange(side, device=things.device) + 0.5) / side
    across, down = (((at - c[..., None]).abs() < 1.25 * r[..., None]).float() for c in (x, y))
    return 0.3 + torch.einsum("bt,bth,btw->bhw", each, down, across)[:, None]


@torch.no_grad()
def painted(tiny: tm.Tiny, data: Data) -> tuple[Tensor, Tensor]:
    """Each scene's pixels [N, 3, side, side] in -1..1, and its packed latents [N, S, 64], in the model's type."""
    pixels, latents = [], []
    dtype = tiny.vae.dtype
    for things, background in zip(data.things.split(64), data.background.split(64), strict=True):
        seen = scenes.render_packed(things, background, tm.SIDE, outlines.LINES)
        seen = rearrange(seen, "b h w c -> b c h w").contiguous(memory_format=torch.channels_last)
        pixels.append((seen * 2 - 1).to(dtype))
        latents.append(tm.patchify(normalised(tiny.vae, pixels[-1])))
    return torch.cat(pixels), torch.cat(latents)


# ---------------------------------------------------------------- training


class Trainer:
    """The frozen model with its `LowRank` layers. `walk` is one step of training."""

    def __init__(self, tiny: tm.Tiny, adapted: dict[str, LowRank], data: Data, batch: int, lr: float) -> None:
        self.tiny, self.data, self.batch = tiny, data, batch
        self.pixels, self.latents = painted(tiny, data)
        factors = [p for layer in adapted.values() for p in (layer.lora_A, layer.lora_B)]
        for factor in factors:
            factor.requires_grad_()
        self.masters = Masters(factors, lr, 0.0, vectors=factors)

    def walk(self, length: int, in_pixels: bool) -> Tensor:
        """One step on the states that a walk from noise reaches."""
        self.masters.forget()
        rows = torch.randint(len(self.latents), (self.batch,), device=self.latents.device)
        clean = self.latents[rows].float()
        img = coupled(torch.randn_like(clean), self.data.jitter[rows], self.data.things[rows])
        with torch.no_grad():
            txt, vec = tm.embed(self.tiny, *captions_at(self.data, rows, length))
        losses = []
        for i, now in enumerate(SERVED):
            state, t = img.to(self.latents.dtype), torch.full((self.batch,), now, device=img.device)
            learns = i == len(SERVED) - 1 or not in_pixels
            with torch.set_grad_enabled(learns):
                v = tm.velocity(self.tiny, state, t, txt, vec).float()
            if learns:
                loss = F.mse_loss(now * v, state.float() - clean)
                if in_pixels:
                    loss = LATENTS * loss + PIXELS * self.wrong_pixels(state.float() - now * v, rows)
                loss.backward()
                losses.append(loss.detach())
            img = img - 0.25 * v.detach()
        self.masters.step()
        return torch.stack([losses[0], losses[-1]])

    def wrong_pixels(self, img: Tensor, rows: Tensor) -> Tensor:
        """L1 on pixels and edges of what is drawn, as the VAE was trained, but weighed by `weights`."""
        latents = tm.unpatchify(img, round(img.shape[1] ** 0.5)).to(self.pixels.dtype)
        latents = latents.contiguous(memory_format=torch.channels_last)
        drawn = self.tiny.vae.decode(latents / tm.SCALING + tm.SHIFT, return_dict=False)[0]
        wrong = (drawn - self.pixels[rows]).float()
        weight = weights(self.data.things[rows], self.data.background[rows], wrong.shape[-1])
        down, across = wrong.diff(dim=2).abs() * weight[:, :, 1:], wrong.diff(dim=3).abs() * weight[..., 1:]
        return (wrong.abs() * weight).mean() + down.mean() + across.mean()

    def train(self, seconds: float, short: float, in_pixels: float, limit: int | None) -> None:
        """Train by the clock. Text is short for the share `short`; pixels count in the last share `in_pixels`."""
        kinds = {(length, pixels): Captured(lambda n=length, p=pixels: self.walk(n, p), f"{length} {pixels}")
                 for length in (SHORT, tm.T5_LENGTH) for pixels in (False, True)}  # fmt: skip
        for step, progress, report in ticks("lora", seconds, limit):
            self.masters.schedule(progress, step)
            report(kinds[SHORT if progress < short else tm.T5_LENGTH, progress >= 1 - in_pixels]())


def main(
    out: Annotated[Path, typer.Argument(help="File to write.")] = OUT,
    start: Annotated[Path | None, typer.Option("--from", help="LoRA to continue.")] = None,
    model: Annotated[Path, typer.Option(help="Model directory in diffusers' layout.")] = MODEL,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    seconds: Annotated[float, typer.Option(help="Training time.")] = 1200.0,
    until: Annotated[float, typer.Option(help="Or: be done at this time (seconds since 1970).")] = 0.0,
    short: Annotated[float, typer.Option(help="Share of the time with short text padding.")] = 0.6,
    in_pixels: Annotated[float, typer.Option("--pixels", help="Last share of the time, judged in pixels.")] = 0.4,
    compiled: Annotated[bool, typer.Option("--compile/--eager", help="torch.compile the blocks.")] = False,
    batch: Annotated[int, typer.Option(help="Pictures a step; 256 suit a large GPU.")] = 16,
    count: Annotated[int, typer.Option("--scenes", help="Scenes to learn from.")] = 4096,
    hard: Annotated[float, typer.Option(help="Share of scenes with a star or a cross for certain.")] = 0.4,
    rank: Annotated[int, typer.Option(help="Rank of each update.")] = 6,
    alpha: Annotated[float, typer.Option(help="Updates are scaled by alpha / rank.")] = 12.0,
    lr: Annotated[float, typer.Option(help="AdamW's rate.")] = 2e-3,
    seed: Annotated[int, typer.Option(help="Seed of factors, scenes and noise.")] = 0,
    smoke: Annotated[bool, typer.Option(help="Four steps at trivial size, to see that they run.")] = False,
) -> None:
    """Train the miniature's LoRA.

    \b
    python tools/training/train_lora.py                                     on two CPU cores
    python tools/training/train_lora.py --device cuda --batch 256 --seconds 40
    """
    if smoke:
        batch, count = 2, 4
    began = time.monotonic()
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.manual_seed(seed)
    tiny = tm.quantize(tm.load(model))
    for module in tiny.modules():
        module.requires_grad_(False)
    adapted = adapt(tiny.transformer, rank, alpha)
    if start is not None:
        resume(adapted, start)
    data = make_data(tiny, count, seed, hard).to(device)
    tiny.to(device, torch.bfloat16 if device == "cuda" else torch.float32)
    tiny.vae.to(memory_format=torch.channels_last)
    if compiled:
        tiny.transformer.compile_repeated_blocks(fullgraph=True, dynamic=False)
    trainer = Trainer(tiny, adapted, data, batch, lr)
    total = until - time.time() if until else seconds
    print(f"{count} scenes after {time.monotonic() - began:.0f} s; {total:.0f} s to train", flush=True)
    trainer.train(total, short, in_pixels, 4 if smoke else None)
    save(adapted, alpha, out)
    print(f"done in {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    typer.run(main)
