"""Trains the bundled miniature from nothing: generated scenes in, a FLUX-shaped 4-step model out.

Three stages, each by the clock:

1. vae   L1 on pixels and on their differences; the decoder sees noisy latents, so small errors of the transformer
         do not show. No GAN, no learned prior: per-channel moments are pulled to FLUX's constants, then folded.
2. read  T5 and CLIP alone: what a caption means must be read off their outputs.
3. walk  all of it but the VAE: the model walks its own four steps from noise, and from each state that it reaches
         learns the way to the picture's latents x_0, (x_t - x_0) / t.

Four steps are enough without a teacher, because the noise decides what a caption leaves open: where exactly a thing
stands is a function of the noise (`coupled`), so that caption and noise have one picture, its path is straight, and
there is nothing to average over. That is what reflow learns from a trained model; here it is known beforehand.

Weights that are served in NF4 are rounded to it in the forward pass (straight-through), so that the model is trained
as it is served. All arithmetic is bf16; float32 masters take the steps (masters.py). Every random choice is seeded,
but a stage's length is in seconds, so two machines do not make the same bits.
"""

from __future__ import annotations

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
from torch import Tensor, nn
from torch.nn import Linear
from training_data import CAPTIONS, SHORT, Data, captioned, ids_of, make_data

SERVED = (1.0, 0.75, 0.5, 0.25)
READING = 0.1  # weight of the reader's loss


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


# ---------------------------------------------------------------- 2. read, 3. walk


def captions_at(data: Data, rows: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Token ids of one caption a row, T5's padded to `length`. CLIP is causal: its pads change nothing."""
    which = torch.randint(CAPTIONS, rows.shape, device=rows.device)
    t5_ids, clip_ids = data.t5_ids[rows, which].long(), data.clip_ids[rows, which].long()
    return F.pad(t5_ids, (0, length - t5_ids.shape[1]), value=0), clip_ids


def coupled(noise: Tensor, jitter: Tensor, things: Tensor) -> Tensor:
    """Noise [B, S, 64] that means the jitter [B, 6] of things [B, 2, 7]: channel k's mean is the k-th, as a Gaussian.

    The jitter is uniform, so the means are as those of plain noise, and so is the noise as a whole.
    """
    there = (things[:, :, 0] >= 0).repeat_interleave(3, 1)
    wanted = torch.special.ndtri((jitter + 1) / 2).clamp(-3, 3) / noise.shape[1] ** 0.5
    means = noise[:, :, : jitter.shape[1]].mean(1)
    noise[:, :, : jitter.shape[1]] += torch.where(there, wanted - means, 0.0)[:, None]
    return noise


class Reader(nn.Module):
    """Reads what a caption means off both encoders: trains them faster than pictures do, and is dropped."""

    def __init__(self, width: int, questions: int = 10) -> None:
        super().__init__()
        self.questions = questions
        self.from_t5, self.from_clip = (Linear(width, questions * (scenes.ABSENT + 1)) for _ in range(2))

    def forward(self, txt: Tensor, vec: Tensor, t5_ids: Tensor, meaning: Tensor) -> Tensor:
        """The losses of T5 and of CLIP, [2]."""
        said = (t5_ids != 0).to(txt.dtype)[..., None]
        read = (self.from_t5((txt * said).sum(1) / said.sum(1)), self.from_clip(vec))
        answers = (rearrange(r.float(), "b (q c) -> b c q", q=self.questions) for r in read)
        return torch.stack([F.cross_entropy(answer, meaning) for answer in answers])


def start_small(transformer: nn.Module) -> None:
    """Blocks start as the identity and the output as zero: modulation and last layer at zero."""
    for name, module in transformer.named_modules():
        zeroed = ("norm1.linear", "norm1_context.linear", "norm.linear", "norm_out.linear")
        if name.endswith(zeroed) or name == "proj_out":
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)


def start_t5(module: nn.Module) -> None:
    """One head looks at what is before a token, the other behind it, near ones first.

    Only this bias tells T5 the order of words. It starts near zero in transformers, moves little at a rate that suits
    the rest, and T5 stays a bag of words.
    """
    bias = module.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight
    bucket = torch.arange(len(bias))
    distance, behind = bucket % (len(bias) // 2), bucket >= len(bias) // 2
    with torch.no_grad():
        for head, wanted in enumerate((~behind, behind | (bucket == 0))):
            bias[:, head] = torch.where(wanted, -0.7 * distance, -3.0)


def vectors_of(tiny: tm.Tiny) -> list[nn.Parameter]:
    """What AdamW trains: embeddings, the first and last layers of each part, and T5's queries and keys.

    T5 does not scale its attention's logits. Muon's steps make them so large that the softmax is stuck at one token,
    its gradient zero, and T5 a bag of words.
    """
    names = ("shared", "embed", "relative_attention_bias", "SelfAttention.q", "SelfAttention.k", "x_embedder",
             "context_embedder", "linear_1", "proj_out")  # fmt: skip
    chosen = []
    for module in (tiny.transformer, tiny.text_encoder, tiny.text_encoder_2):
        for name, parameter in module.named_parameters():
            if any(n in name for n in names) and "single_transformer_blocks" not in name:
                chosen.append(parameter)
    return chosen


class Trainer:
    """The model, its masters and the reader; both stages are steps of it."""

    def __init__(self, tiny: tm.Tiny, data: Data, latents: Tensor, plan: Plan, seed: int) -> None:
        self.tiny, self.data, self.latents, self.plan = tiny, data, latents, plan
        self.reader = Reader(tm.T5["d_model"]).to(plan.device, torch.bfloat16)
        self.times = torch.tensor([*SERVED, 0.0], device=plan.device)  # of the next walk; a captured step reads it
        self.rng = random.Random(seed)
        modules = (tiny.transformer, tiny.text_encoder, tiny.text_encoder_2, self.reader)
        self.masters = Masters(
            (p for m in modules for p in m.parameters()), 1e-3, 0.01,
            vectors=[*vectors_of(tiny), *self.reader.parameters()],
            quick=[p for n, p in tiny.text_encoder_2.named_parameters() if "relative_attention_bias" in n],
            rounded=tm.nf4_parameters(tiny), rounding=tm.nf4_round,
        )  # fmt: skip

    def embed(self, rows: Tensor, length: int) -> tuple[Tensor, Tensor, Tensor]:
        """Embeddings of one caption a row, and the reader's losses."""
        t5_ids, clip_ids = captions_at(self.data, rows, length)
        txt, vec = tm.embed(self.tiny, t5_ids, clip_ids)
        return txt, vec, self.reader(txt, vec, t5_ids, self.data.meaning[rows].long())

    def read(self, count: int, length: int) -> Tensor:
        """One step of the encoders alone."""
        self.masters.forget()
        reading = self.embed(torch.randint(len(self.latents), (count,), device=self.plan.device), length)[2]
        reading.sum().backward()
        self.masters.step()
        return reading.detach()

    def walk(self, count: int, length: int) -> Tensor:
        """One step on the states that a walk from noise reaches. Every error counts as it does in the picture."""
        self.masters.forget()
        rows = torch.randint(len(self.latents), (count,), device=self.plan.device)
        clean = self.latents[rows].float()
        img = coupled(torch.randn_like(clean), self.data.jitter[rows], self.data.things[rows])
        txt, vec, reading = self.embed(rows, length)
        leaves = [txt.detach().requires_grad_(), vec.detach().requires_grad_()]
        losses = []
        for i in range(len(SERVED)):
            state, t = img.to(torch.bfloat16), self.times[i].expand(count)
            v = tm.velocity(self.tiny, state, t, *leaves).float()
            loss = F.mse_loss(self.times[i] * v, state.float() - clean)
            loss.backward()
            losses.append(loss.detach())
            img = img + (self.times[i + 1] - self.times[i]) * v.detach()
        torch.autograd.backward([txt, vec, READING * reading.sum()], [*(leaf.grad for leaf in leaves), None])
        self.masters.step()
        return torch.stack([losses[0], losses[-1], *reading.detach()])

    def choose_times(self) -> None:
        """Four even steps for the most part; else four of any length, so that other step counts work too."""
        if self.rng.random() < 0.75:
            inner = list(SERVED[1:])
        else:
            inner = sorted((self.rng.random() for _ in SERVED[1:]), reverse=True)
        self.times.copy_(torch.tensor([1.0, *inner, 0.0]))

    def train(self, name: str, work: Callable[[int, int], Tensor], seconds: float, short: float) -> None:
        """By the clock; `short` is the share of the time with short text padding, before that which is served."""
        first = Captured(lambda: work(self.plan.batch, SHORT), f"{name}, short text")
        last = Captured(lambda: work(self.plan.batch, tm.T5_LENGTH), f"{name}, served text")
        for step, progress, report in ticks(name, seconds, self.plan.limit):
            self.choose_times()
            self.masters.schedule(progress, step)
            report(first() if progress < short else last())


# ---------------------------------------------------------------- scores on the way


@torch.no_grad()
def draw(tiny: tm.Tiny, captions: list[str], plan: Plan, seed: int = 0) -> Tensor:
    """Pictures [B, H, W, 3] on the CPU, 4 steps as served."""
    tokens, out = (plan.side // 16) ** 2, []
    noise = torch.randn(len(captions), tokens, 64, generator=torch.Generator().manual_seed(seed)).to(plan.device)
    ids = (i.to(plan.device) for i in ids_of(tiny, captions, tm.T5_LENGTH, tm.CLIP_LENGTH))
    for img, *part in zip(noise.split(128), *(i.split(128) for i in ids), strict=True):
        txt, vec = tm.embed(tiny, *part)
        for time_ in SERVED:
            t = torch.full((len(img),), time_, device=plan.device)
            img = img - 0.25 * tm.velocity(tiny, img.to(torch.bfloat16), t, txt, vec).float()
        out.append(tm.decode(tiny, img.to(torch.bfloat16)).cpu())
    return torch.cat(out)


def score(tiny: tm.Tiny, plan: Plan, workers: ProcessPoolExecutor, name: str) -> None:
    """Judge pictures of captions never seen in training; prints both scores and why pictures fail."""
    count, shares, why = plan.batch // 2, [], Counter()
    for things in (1, 2):
        drawn, captions = captioned(77 + things, count, things)
        seen = draw(tiny, captions, plan)
        verdicts = list(workers.map(judge.matches, list(seen.numpy()), drawn, chunksize=max(1, count // 64)))
        shares.append(sum(v.ok for v in verdicts) / count)
        why.update(r.split(" is ")[0] for v in verdicts for r in v.reasons[:1])
    reasons = dict(why.most_common(6))
    print(f"score {name}: one {shares[0]:.3f}, two {shares[1]:.3f} of {count} each; {reasons}", flush=True)


def sheet(tiny: tm.Tiny, plan: Plan, path: Path) -> None:
    """A quick look: 12 pictures of one thing and 12 of two, never seen in training."""
    captions = [c for things in (1, 2) for c in captioned(77 + things, 12, things)[1]]
    save_grid(draw(tiny, captions, plan), path)


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
    scenes: int = 131_072
    batch: int = 256
    vae_batch: int = 64
    limit: int | None = None


def begun(seed: int, start: Path | None, fresh: list[str]) -> tm.Tiny:
    """A model before training, or the one at `start` with the parts in `fresh` anew."""
    built = tm.build(seed)
    start_small(built.transformer)
    start_vae(built.vae)
    start_t5(built.text_encoder_2)
    tiny = tm.load(start) if start else built
    for part in fresh:
        setattr(tiny, part, getattr(built, part))
    return tiny


def prepared(stored: Path | None, tiny: tm.Tiny, make: Callable[[], Data]) -> Data:
    """The scenes in the file `stored`, or made, and put there."""
    if stored is not None and stored.exists():
        return Data.load(stored, tiny)
    data = make()
    if stored is not None:
        data.save(stored, tiny)
    return data


def main(
    out: Annotated[Path, typer.Argument(help="Directory for the model.")],
    start: Annotated[Path | None, typer.Option("--from", help="Model directory to continue.")] = None,
    seconds: Annotated[float, typer.Option(help="Training time, shared out by the next three.")] = 600.0,
    until: Annotated[float, typer.Option(help="Or: be done at this time (seconds since 1970).")] = 0.0,
    vae: Annotated[float, typer.Option(help="Share of the time for the VAE; 0 keeps the one in --from.")] = 0.25,
    read: Annotated[float, typer.Option(help="Share for the encoders alone; the rest is the walk's.")] = 0.03,
    fresh: Annotated[list[str] | None, typer.Option(help="Part to start anew, such as text_encoder_2.")] = None,
    stored: Annotated[Path | None, typer.Option("--data", help="File for the prepared scenes: read, or made.")] = None,
    short: Annotated[float, typer.Option(help="Share of the walk's time with short text padding.")] = 0.7,
    compiled: Annotated[bool, typer.Option("--compile/--eager", help="torch.compile the blocks.")] = True,
    workers: Annotated[int, typer.Option(help="Processes for scenes and judging.")] = 16,
    seed: Annotated[int, typer.Option(help="Seed of weights, scenes and noise.")] = 0,
    smoke: Annotated[bool, typer.Option(help="All stages at trivial size on the CPU: does it run?")] = False,
) -> None:
    """Train the miniature: VAE, text encoders, transformer. Needs one large GPU for a quarter of an hour.

    \b
    python tools/training/train_tiny.py runs/a                           the whole of it
    python tools/training/train_tiny.py runs/b --from runs/a --vae 0     train runs/a's further
    python tools/training/train_tiny.py runs/smoke --smoke               a minute, on the CPU
    """
    plan = Plan("cuda")
    if smoke:
        plan, workers, compiled = Plan("cpu", side=64, scenes=12, batch=4, vae_batch=2, limit=1), 1, False
    torch.backends.cuda.enable_cudnn_sdp(False)
    out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        warm = [pool.submit(judge.judge, np.zeros((32, 32, 3))) for _ in range(workers)]
        tiny = begun(seed, start, fresh or [])
        torch.manual_seed(seed + (1 if start else 0))
        data = prepared(stored, tiny, lambda: make_data(tiny, plan.scenes, seed, pool))
        data, tiny = data.to(plan.device), tiny.to(plan.device, torch.bfloat16)
        painted = paint(data, plan)
        total = until - time.time() if until else seconds
        print(f"{len(data.things)} scenes after {time.monotonic() - began:.0f} s; {total:.0f} s to train", flush=True)
        deadline = time.monotonic() + total
        if vae:
            train_vae(tiny, painted, plan, vae * total)
            tm.save(tiny, out)
        latents = encode(tiny, painted, plan, out / "vae.png")
        del painted
        if compiled:
            tiny.transformer.compile_repeated_blocks(fullgraph=True, dynamic=False)
        trainer = Trainer(tiny, data, latents, plan, seed)
        if read:
            trainer.train("read", trainer.read, read * total, 1.0)
        trainer.train("walk", trainer.walk, max(deadline - time.monotonic(), 10.0), short)
        trainer.masters.show(average=True, rounded=False)
        tm.save(tiny, out)
        print(f"saved after {time.monotonic() - began:.0f} s", flush=True)
        for started in warm:
            started.result()
        tiny = tm.load(out).to(plan.device, torch.bfloat16)  # what was saved, without its compiled blocks
        sheet(tiny, plan, out / "sheet.png")
        score(tiny, plan, pool, "bf16, 4 steps")
        score(tm.quantize(tiny), plan, pool, "NF4, 4 steps")
    print(f"done in {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    typer.run(main)
