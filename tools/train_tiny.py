"""Trains the bundled miniature from nothing: generated scenes in, a FLUX-shaped 4-step model out.

Three stages, each by the clock, each resumable from the directory it left:

1. vae      L1 on pixels and on their differences; the decoder sees noisy latents, so small errors of the flow
            do not show. No GAN, no learned prior: per-channel moments are pulled to FLUX's constants, then folded.
2. flow     rectified flow (x_t = (1 - t) x_0 + t noise, v = noise - x_0) on stored latents, T5 and CLIP trained
            jointly, one caption in ten dropped. Short text padding first, the served padding of 256 at the end.
3. distill  the student starts as the teacher and walks its own 4 steps; at each the teacher continues from the
            student's state in finer steps, with guidance, and the student learns that jump. Its forward pass sees
            weights rounded to NF4 (straight-through), so that it is trained as it is served.

All arithmetic is bf16 as served; float32 masters take the steps (masters.py). Every random choice is seeded, but
a stage's length is in seconds, so two machines do not make the same bits.
"""

from __future__ import annotations

import copy
import math
import random
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated

import judge
import numpy as np
import scenes
import tiny_model as tm
import torch
import torch.nn.functional as F
import typer
from einops import rearrange
from masters import Captured, Masters, ticks
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

CAPTIONS = 3  # ways of saying each stored scene
SHORT = 40  # text padding of the first part of `flow`; the longest caption has 31 tokens
SERVED = (1.0, 0.75, 0.5, 0.25)


# ---------------------------------------------------------------- data


@dataclass
class Data:
    """Scenes as numbers, and their captions as token ids (short form; pads are added when used)."""

    things: Tensor  # [N, 2, 7]
    background: Tensor  # [N, 2, 3]
    t5_ids: Tensor  # [N, CAPTIONS, SHORT]
    clip_ids: Tensor  # [N, CAPTIONS, SHORT]

    def to(self, device: str) -> Data:
        return Data(*(getattr(self, f).to(device) for f in ("things", "background", "t5_ids", "clip_ids")))


def _chunk(seed: int, count: int, never_seen: int) -> tuple[list[scenes.Scene], list[str]]:
    """Scenes and their captions: for training, or (never_seen = number of things) for evaluation."""
    rng = random.Random(seed)
    drawn = [scenes.sample_held_out(rng, never_seen) if never_seen else scenes.sample_training(rng)
             for _ in range(count)]  # fmt: skip
    return drawn, [scenes.caption(s, rng) for s in drawn for _ in range(1 if never_seen else CAPTIONS)]


def _packed_chunk(seed: int, count: int) -> tuple[Tensor, Tensor, list[str]]:
    drawn, captions = _chunk(seed, count, 0)
    return *scenes.pack(drawn), captions


def make_data(tiny: tm.Tiny, count: int, seed: int, workers: ProcessPoolExecutor) -> Data:
    chunk = min(1024, count)
    chunks = count // chunk
    parts = list(workers.map(_packed_chunk, (seed * 1_000_003 + i for i in range(chunks)), [chunk] * chunks))
    things, background = (torch.cat([p[i] for p in parts]) for i in (0, 1))
    t5_ids, clip_ids = ids_of(tiny, [c for p in parts for c in p[2]], SHORT, SHORT)
    ids = (rearrange(i.short(), "(n c) l -> n c l", c=CAPTIONS) for i in (t5_ids, clip_ids))
    return Data(things, background, *ids)


def ids_of(tiny: tm.Tiny, captions: list[str], t5_length: int, clip_length: int) -> tuple[Tensor, Tensor]:
    clip_pad = tiny.text_encoder.config.pad_token_id
    return (tm.tokenize(tiny.tokenizer_2, captions, t5_length, 0),
            tm.tokenize(tiny.tokenizer, captions, clip_length, clip_pad))  # fmt: skip


# ---------------------------------------------------------------- 1. vae


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
    """Random squares of stored pictures, bf16 in -1..1; all on the device, so that it can be captured."""
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
    """Scale the latents' channels to mean 0 and std 1 under FLUX's constants, inside the weights. Small by then."""
    some = painted[: plan.batch * 4].split(plan.vae_batch)
    latents = torch.cat([normalised(vae, pixels_of(p)).float() for p in some])
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3)).clamp(min=0.05)
    print(f"fold: channel means {mean.abs().max():.3f} at most, std {std.min():.3f} to {std.max():.3f}")
    out, first = vae.encoder.conv_out, vae.decoder.conv_in
    weight, bias = out.weight[:16].float(), out.bias[:16].float()
    shift = ((bias - tm.SHIFT) * tm.SCALING - mean) / std / tm.SCALING + tm.SHIFT
    out.weight[:16], out.bias[:16] = weight / std[:, None, None, None], shift
    # A posterior of constant, small variance: nothing samples from it, but the file should say something true.
    out.weight[16:], out.bias[16:] = 0, 2 * math.log(0.1 / tm.SCALING)
    weight = first.weight.float()
    offset = (mean / tm.SCALING + tm.SHIFT) - std * tm.SHIFT
    first.bias += torch.einsum("oikl,i->o", weight, offset)
    first.weight.copy_(weight * std[None, :, None, None])


@torch.no_grad()
def encode(tiny: tm.Tiny, painted: Tensor, plan: Plan, path: Path) -> Tensor:
    """Every stored scene as packed latents [N, S, 64] in bf16; shows at `path` what the VAE loses."""
    packed = torch.cat([tm.patchify(normalised(tiny.vae, pixels_of(p))) for p in painted.split(plan.batch)])
    before = rearrange(painted[:12].float() / 255, "b c h w -> b h w c")
    after = tm.decode(tiny, packed[:12])
    psnr = -10 * (after - before).square().mean().log10().item()
    print(f"encoded {len(packed)} scenes, PSNR {psnr:.1f} dB, std {packed[:512].float().std():.3f}", flush=True)
    save_grid(torch.cat([before, after]), path)
    return packed


# ---------------------------------------------------------------- 2. flow


def captions_at(tiny: tm.Tiny, data: Data, rows: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Token ids of one caption a row, T5's padded to `length`. CLIP is causal: its pads change nothing."""
    which = torch.randint(CAPTIONS, rows.shape, device=rows.device)
    t5_ids, clip_ids = data.t5_ids[rows, which].long(), data.clip_ids[rows, which].long()
    return F.pad(t5_ids, (0, length - t5_ids.shape[1]), value=0), clip_ids


def unsaid(tiny: tm.Tiny, t5_ids: Tensor, clip_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Ids of the empty caption in the same shapes."""
    t5, clip = torch.zeros_like(t5_ids), torch.full_like(clip_ids, tiny.text_encoder.config.pad_token_id)
    t5[:, 0] = tiny.text_encoder_2.config.eos_token_id
    clip[:, 0] = tiny.text_encoder.config.bos_token_id
    return t5, clip


def start_small(transformer: nn.Module) -> None:
    """Blocks start as the identity and the output as zero: modulation and last layer at zero."""
    for name, module in transformer.named_modules():
        zeroed = ("norm1.linear", "norm1_context.linear", "norm.linear", "norm_out.linear")
        if name.endswith(zeroed) or name == "proj_out":
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)


def vectors_of(tiny: tm.Tiny) -> list[nn.Parameter]:
    """What AdamW trains: embeddings, and the first and last layers of each part."""
    names = ("shared", "embed", "relative_attention_bias", "x_embedder", "context_embedder", "linear_1", "proj_out")
    chosen = []
    for module in (tiny.transformer, tiny.text_encoder, tiny.text_encoder_2):
        for name, parameter in module.named_parameters():
            if any(n in name for n in names) and "single_transformer_blocks" not in name:
                chosen.append(parameter)
    return chosen


def train_flow(tiny: tm.Tiny, data: Data, latents: Tensor, plan: Plan, seconds: float, short: float) -> None:
    """Train transformer and text encoders; `short` is the share of the time spent with short padding."""
    modules = (tiny.transformer, tiny.text_encoder, tiny.text_encoder_2)
    masters = Masters((p for m in modules for p in m.parameters()), 1e-3, 0.01, vectors=vectors_of(tiny),
                      rounded=tm.nf4_parameters(tiny), rounding=tm.nf4_round)  # fmt: skip

    def work(length: int, count: int) -> Tensor:
        masters.forget()
        rows = torch.randint(len(latents), (count,), device=plan.device)
        ids = captions_at(tiny, data, rows, length)
        dropped = torch.rand(count, 1, device=plan.device) < 0.1
        ids = tuple(torch.where(dropped, e, i) for e, i in zip(unsaid(tiny, *ids), ids, strict=True))
        t = torch.randn(count, device=plan.device).sigmoid()
        t = torch.where(torch.rand_like(t) < 0.25, torch.rand_like(t), t).to(torch.bfloat16)
        clean = latents[rows]
        noise = torch.randn_like(clean)
        img = torch.lerp(clean.float(), noise.float(), t.float()[:, None, None]).to(torch.bfloat16)
        v = tm.velocity(tiny, img, t, *tm.embed(tiny, *ids))
        loss = F.mse_loss(v.float(), noise.float() - clean.float())
        loss.backward()
        masters.step()
        return loss.detach()

    first = Captured(lambda: work(SHORT, plan.batch), "flow, short text")
    last = Captured(lambda: work(tm.T5_LENGTH, plan.batch // 2), "flow, served text")
    for step, progress, report in ticks("flow", seconds, plan.limit):
        masters.schedule(progress, step)
        report(first() if progress < short else last())
    masters.show(average=True, rounded=False)


# ---------------------------------------------------------------- 3. distill


@torch.no_grad()
def guided(tiny: tm.Tiny, img: Tensor, t: Tensor, said: tuple, empty: tuple, guidance: float) -> Tensor:
    v = tm.velocity(tiny, img, t, *said)
    return v if guidance == 1 else torch.lerp(tm.velocity(tiny, img, t, *empty), v, guidance)


@torch.no_grad()
def walk(step: Callable[[Tensor, Tensor], Tensor], img: Tensor, start: float, stop: float, count: int) -> Tensor:
    """Euler steps from time `start` to `stop` along a velocity."""
    for i in range(count):
        t = torch.full((len(img),), start + (stop - start) * i / count, device=img.device)
        img = (img.float() + (stop - start) / count * step(img, t).float()).to(img.dtype)
    return img


def distill(
    student: tm.Tiny,
    teacher: tm.Tiny,
    data: Data,
    plan: Plan,
    seconds: float,
    guidance: float,
    substeps: int,
    short: float,
) -> Masters:
    """Train the student on its own four steps; each step's target is where the teacher goes from there."""
    modules = (student.transformer, student.text_encoder, student.text_encoder_2)
    masters = Masters((p for m in modules for p in m.parameters()), 3e-4, 0.003, vectors=vectors_of(student),
                      rounded=tm.nf4_parameters(student), rounding=tm.nf4_round)  # fmt: skip
    tokens, batch = (plan.side // 16) ** 2, plan.batch // 2

    def work(length: int) -> Tensor:
        masters.forget()
        rows = torch.randint(len(data.things), (batch,), device=plan.device)
        ids = captions_at(student, data, rows, length)
        with torch.no_grad():
            said, empty = tm.embed(teacher, *ids), tm.embed(teacher, *unsaid(student, *ids))
        img = torch.randn(batch, tokens, 64, device=plan.device).to(torch.bfloat16)
        total = torch.zeros((), device=plan.device)
        for start in SERVED:
            target = walk(lambda x, t: guided(teacher, x, t, said, empty, guidance), img, start, start - 0.25, substeps)
            t = torch.full((batch,), start, device=plan.device)
            v = tm.velocity(student, img, t, *tm.embed(student, *ids))
            loss = F.mse_loss(v.float(), (img.float() - target.float()) * 4)
            loss.backward()
            total = total + loss.detach() / len(SERVED)
            img = (img.float() - 0.25 * v.detach().float()).to(torch.bfloat16)
        masters.step()
        return total

    first = Captured(lambda: work(SHORT), "distill, short text")
    last = Captured(lambda: work(tm.T5_LENGTH), "distill, served text")
    for step, progress, report in ticks("distill", seconds, plan.limit):
        masters.schedule(progress, step)
        report(first() if progress < short else last())
    return masters


# ---------------------------------------------------------------- scores on the way


@torch.no_grad()
def draw(tiny: tm.Tiny, captions: list[str], plan: Plan, steps: int, guidance: float = 1.0, seed: int = 0) -> Tensor:
    """Pictures [B, H, W, 3] on the CPU, in batches of half the training batch."""
    batch, tokens = plan.batch // 2, (plan.side // 16) ** 2
    noise = torch.randn(-(-len(captions) // batch) * batch, tokens, 64, generator=torch.Generator().manual_seed(seed))
    out = []
    for at in range(0, len(captions), batch):
        full = captions[at : at + batch] + [""] * (at + batch - len(captions))  # one shape, one compilation
        ids = tuple(i.to(plan.device) for i in ids_of(tiny, full, tm.T5_LENGTH, tm.CLIP_LENGTH))
        said, empty = tm.embed(tiny, *ids), tm.embed(tiny, *unsaid(tiny, *ids))
        img = noise[at : at + batch].to(plan.device, torch.bfloat16)
        img = walk(lambda x, t: guided(tiny, x, t, said, empty, guidance), img, 1.0, 0.0, steps)  # noqa: B023
        out += [tm.decode(tiny, part).cpu() for part in img[: len(captions) - at].split(32)]
    return torch.cat(out)


def score(
    tiny: tm.Tiny, plan: Plan, workers: ProcessPoolExecutor, name: str, steps: int, guidance: float = 1.0
) -> float:
    """Judge pictures of captions never seen in training; prints both scores and why pictures fail."""
    count, shares, why = plan.batch // 2, [], Counter()
    for things in (1, 2):
        drawn, captions = _chunk(77 + things, count, things)
        seen = draw(tiny, captions, plan, steps, guidance)
        verdicts = list(workers.map(judge.matches, list(seen.numpy()), drawn, chunksize=max(1, count // 64)))
        shares.append(sum(v.ok for v in verdicts) / count)
        why.update(r.split(" is ")[0] for v in verdicts for r in v.reasons[:1])
    reasons = dict(why.most_common(6))
    print(f"score {name}: one {shares[0]:.3f}, two {shares[1]:.3f} of {count} each; {reasons}", flush=True)
    return sum(shares) / 2


def sheet(tiny: tm.Tiny, plan: Plan, path: Path, steps: int, guidance: float = 1.0) -> None:
    """A quick look: 12 pictures of one thing and 12 of two, never seen in training."""
    captions = [c for things in (1, 2) for c in _chunk(77 + things, 12, things)[1]]
    save_grid(draw(tiny, captions, plan, steps, guidance), path)


def save_grid(seen: Tensor, path: Path) -> None:
    from PIL import Image

    grid = (rearrange(seen.cpu(), "(r c) h w k -> (r h) (c w) k", c=6) * 255).round().byte().numpy()
    Image.fromarray(grid).save(path)


# ---------------------------------------------------------------- command


@dataclass
class Plan:
    """Sizes of a run: on a GPU as published, in the smoke mode as small as will do."""

    device: str
    side: int = tm.SIDE
    scenes: int = 65_536
    batch: int = 512
    vae_batch: int = 64
    limit: int | None = None


def main(
    out: Annotated[Path, typer.Argument(help="Directory for the results: OUT/teacher and OUT/student.")],
    start: Annotated[
        Path | None, typer.Option("--from", help="Directory of an earlier run, or a model directory, to continue.")
    ] = None,
    seconds: Annotated[float, typer.Option(help="Training time, shared out by the next three.")] = 240.0,
    until: Annotated[float, typer.Option(help="Or: be done at this time (seconds since 1970).")] = 0.0,
    vae: Annotated[float, typer.Option(help="Share of the time for the VAE; 0 keeps the one in --from.")] = 0.27,
    flow: Annotated[float, typer.Option(help="Share for the teacher; 0 keeps the one in --from.")] = 0.5,
    distill_: Annotated[float, typer.Option("--distill", help="Share for the student; 0 skips it.")] = 0.23,
    stored: Annotated[Path | None, typer.Option("--data", help="File for the prepared scenes: read, or made.")] = None,
    guidance: Annotated[float, typer.Option(help="Guidance of the teacher.")] = 2.0,
    short: Annotated[float, typer.Option(help="Share of each stage's time with short text padding.")] = 0.75,
    fresh_vae: Annotated[bool, typer.Option(help="Start the VAE anew, whatever is in --from.")] = False,
    substeps: Annotated[int, typer.Option(help="Teacher's steps for each of the student's.")] = 2,
    workers: Annotated[int, typer.Option(help="Processes for scenes and judging.")] = 16,
    seed: Annotated[int, typer.Option(help="Seed of weights, scenes and noise.")] = 0,
    smoke: Annotated[bool, typer.Option(help="All stages at trivial size on the CPU: does it run?")] = False,
) -> None:
    """Train the miniature: VAE, teacher, student. Needs one large GPU for about ten minutes.

    \b
    python tools/train_tiny.py runs/a                                   the whole of it
    python tools/train_tiny.py runs/b --from runs/a --vae 0 --flow 0 --distill 1    only the student again
    python tools/train_tiny.py runs/smoke --smoke                       seconds, on the CPU
    """
    plan = Plan("cuda")
    if smoke:
        plan, workers = Plan("cpu", side=64, scenes=12, batch=4, vae_batch=2, limit=1), 1
    torch.backends.cuda.enable_cudnn_sdp(False)
    out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        warm = [pool.submit(judge.judge, np.zeros((32, 32, 3))) for _ in range(workers)]
        tiny = tm.load(start / "teacher" if (start / "teacher").exists() else start) if start else tm.build(seed)
        if not start:
            start_small(tiny.transformer)
        if fresh_vae:
            tiny.vae = tm.build(seed).vae
        if fresh_vae or not start:
            start_vae(tiny.vae)
        torch.manual_seed(seed + (1 if start else 0))
        ready = stored is not None and stored.exists()
        data = Data(**load_file(stored)) if ready else make_data(tiny, plan.scenes, seed, pool)
        if stored and not ready:
            save_file({k: v.contiguous() for k, v in vars(data).items()}, stored)
        data, tiny = data.to(plan.device), tiny.to(plan.device, torch.bfloat16)
        total = until - time.time() if until else seconds
        print(
            f"{len(data.things)} scenes after {time.monotonic() - began:.0f} s; {total:.0f} s to train",
            flush=True,
        )
        deadline = time.monotonic() + total
        if vae or flow:
            painted = paint(data, plan)
        if vae:
            train_vae(tiny, painted, plan, vae * total)
            tm.save(tiny, out / "teacher")
        if flow:
            latents = encode(tiny, painted, plan, out / "vae.png")
            train_flow(tiny, data, latents, plan, flow * total, short)
            del latents, painted
            tm.save(tiny, out / "teacher")
        if distill_:
            student = copy.deepcopy(tiny)
            if start and (start / "student").exists() and not flow:
                student = tm.load(start / "student").to(plan.device, torch.bfloat16)
            left = deadline - time.monotonic() if until else distill_ * total
            masters = distill(student, tiny, data, plan, max(left, 10.0), guidance, substeps, short)
            masters.show(average=True, rounded=False)
            tm.save(student, out / "student")
            sheet(student, plan, out / "student.png", 4)
        for started in warm:
            started.result()
        if distill_:
            score(student, plan, pool, "student bf16, 4 steps", 4)
            score(tm.quantize(student), plan, pool, "student NF4, 4 steps", 4)
        sheet(tiny, plan, out / "teacher.png", 16, guidance)
        score(tiny, plan, pool, f"teacher, 16 steps, guidance {guidance}", 16, guidance)
    print(f"done in {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    typer.run(main)
