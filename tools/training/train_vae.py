"""The first stage of train_tiny.py, the VAE, and what it shares with the later ones: the sizes of a run, and a grid."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import scenes
import tiny_model as tm
import torch
from einops import rearrange
from masters import Captured, Masters, ticks
from torch import Tensor, nn
from training_data import Data


@dataclass
class Plan:
    """Sizes of a run: on a GPU as published, with --smoke as small as possible."""

    device: str
    side: int = tm.SIDE
    scenes: int = 131_072
    batch: int = 256
    vae_batch: int = 64
    limit: int | None = None


def normalised(vae: nn.Module, pixels: Tensor) -> Tensor:
    """Pictures [B, 3, H, W] in -1..1 to normalised latents [B, 16, H/8, W/8]."""
    mean = vae.encoder(pixels).chunk(2, 1)[0]
    return (mean - tm.SHIFT) * tm.SCALING


def vae_loss(vae: nn.Module, pixels: Tensor, level: Tensor) -> Tensor:
    """L1 on pixels and edges, of pictures drawn from latents with noise of up to `level` on them."""
    latents = normalised(vae, pixels)
    moments = latents.float()
    mean, std = moments.mean((0, 2, 3)), moments.std((0, 2, 3))
    level = level * torch.rand(len(pixels), 1, 1, 1, device=pixels.device)
    noise = (level * torch.randn_like(moments)).to(latents.dtype)
    drawn = vae.decoder((latents + noise) / tm.SCALING + tm.SHIFT)
    difference = (drawn - pixels).float()
    edges = difference.diff(dim=2).abs().mean() + difference.diff(dim=3).abs().mean()
    return difference.abs().mean() + edges + 0.1 * (mean.square().mean() + (std - 1).square().mean())


@torch.no_grad()
def paint(data: Data, plan: Plan) -> Tensor:
    """Every stored scene, rendered once: [N, 3, side, side] in 0..255."""
    out = []
    for rows in torch.arange(len(data.things), device=plan.device).split(plan.batch * 2):
        painted = scenes.render_packed(data.things[rows], data.background[rows], plan.side)
        out.append(rearrange((painted * 255).round().to(torch.uint8), "b h w c -> b c h w"))
    return torch.cat(out)


def pixels_of(painted: Tensor) -> Tensor:
    """Stored bytes to bf16 in -1..1."""
    return (painted.float() / 127.5 - 1).to(torch.bfloat16)


def start_vae(vae: nn.Module) -> None:
    """Residual branches start at zero, so that the net starts as a short chain of convolutions and learns faster."""
    for name, module in vae.named_modules():
        if name.endswith(("conv2", "to_out.0")):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)


def crops(painted: Tensor, count: int, side: int) -> Tensor:
    """Random squares of stored pictures, bf16 in -1..1. All work is on the device, so that a graph can capture it."""
    device, room = painted.device, painted.shape[2] - side + 1
    span = torch.arange(side, device=device)
    rows = torch.randint(room, (count, 1), device=device) + span
    columns = torch.randint(room, (count, 1), device=device) + span
    which = torch.randint(len(painted), (count, 1, 1), device=device)
    return pixels_of(rearrange(painted[which, :, rows[:, :, None], columns[:, None]], "b h w c -> b c h w"))


def train_vae(tiny: tm.Tiny, painted: Tensor, plan: Plan, seconds: float) -> None:
    """Crops of half the side for most of the time (four times as many steps), whole pictures at the end."""
    vae = tiny.vae
    ends = (vae.encoder.conv_in.weight, vae.decoder.conv_out.weight)
    masters = Masters(vae.parameters(), 1e-3, 0.02, vectors=ends)
    level = torch.tensor(0.0, device=plan.device)

    def work(side: int, count: int) -> Tensor:
        masters.forget()
        loss = vae_loss(vae, crops(painted, count, side), level)
        loss.backward()
        masters.step()
        return loss.detach()

    small = Captured(lambda: work(plan.side // 2, plan.vae_batch), "vae, crops")
    whole = Captured(lambda: work(plan.side, plan.vae_batch // 2), "vae, whole")
    for step, progress, report in ticks("vae", seconds, plan.limit):
        masters.schedule(progress, step)
        level.fill_(0.25 * min(1.0, 2 * progress))  # first learn to draw, then to forgive
        report(small() if progress < 0.7 else whole())
    masters.show(average=True)
    fold(vae, painted, plan)


@torch.no_grad()
def fold(vae: nn.Module, painted: Tensor, plan: Plan) -> None:
    """Change the weights so that latents have mean 0 and std 1 under FLUX's constants. The change is small by then."""
    some = painted[: plan.batch * 4].split(plan.vae_batch)
    latents = torch.cat([normalised(vae, pixels_of(p)).float() for p in some])
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3)).clamp(min=0.05)
    print(f"fold: channel means {mean.abs().max():.3f} at most, std {std.min():.3f} to {std.max():.3f}")
    out, first = vae.encoder.conv_out, vae.decoder.conv_in
    weight, bias = out.weight[:16].float(), out.bias[:16].float()
    shift = ((bias - tm.SHIFT) * tm.SCALING - mean) / std / tm.SCALING + tm.SHIFT
    out.weight[:16], out.bias[:16] = weight / std[:, None, None, None], shift
    # The posterior gets a constant, small variance. Nothing samples from it, but the file should be correct.
    out.weight[16:], out.bias[16:] = 0, 2 * math.log(0.1 / tm.SCALING)
    weight = first.weight.float()
    offset = (mean / tm.SCALING + tm.SHIFT) - std * tm.SHIFT
    first.bias += torch.einsum("oikl,i->o", weight, offset)
    first.weight.copy_(weight * std[None, :, None, None])


@torch.no_grad()
def encode(tiny: tm.Tiny, painted: Tensor, plan: Plan, path: Path) -> Tensor:
    """Every stored scene as packed latents [N, S, 64] in bf16. The picture at `path` shows what the VAE loses."""
    packed = torch.cat([tm.patchify(normalised(tiny.vae, pixels_of(p))) for p in painted.split(plan.batch)])
    before = rearrange(painted[:12].float() / 255, "b c h w -> b h w c")
    after = tm.decode(tiny, packed[:12])
    psnr = -10 * (after - before).square().mean().log10().item()
    print(f"encoded {len(packed)} scenes, PSNR {psnr:.1f} dB, std {packed[:512].float().std():.3f}", flush=True)
    save_grid(torch.cat([before, after]), path)
    return packed


def save_grid(seen: Tensor, path: Path) -> None:
    """Write pictures [B, H, W, 3] in rows of six."""
    from PIL import Image

    grid = (rearrange(seen.cpu(), "(r c) h w k -> (r h) (c w) k", c=6) * 255).round().byte().numpy()
    Image.fromarray(grid).save(path)
