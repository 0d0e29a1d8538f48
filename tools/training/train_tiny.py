"""Trains the bundled miniature from nothing: generated scenes in, a FLUX-shaped 4-step model out.

Three stages, each by the clock:

1. vae   (train_vae.py) L1 on pixels and on their differences. The decoder sees noisy latents, so small errors of the
         transformer do not show. No GAN, no learned prior: per-channel moments are pulled to FLUX's constants, and the
         rest is folded into the weights.
2. read  T5 and CLIP alone: a small reader must find a caption's meaning in their outputs.
3. walk  all parts but the VAE. The model walks its own four steps from noise. From each state that it reaches it
         learns the way to the picture's latents x_0: (x_t - x_0) / t.

Four steps are enough without a teacher, because the noise decides what a caption leaves open. Where exactly a thing
stands is a function of the noise (`coupled`). So a caption and its noise have one picture, the path to it is straight,
and there is nothing to average over. Reflow learns this from a trained model; here it is known beforehand.

Weights that are served in NF4 are rounded to NF4 in the forward pass (straight-through): the model is trained as it is
served. All arithmetic is bf16; float32 masters take the steps (masters.py). Every random choice is seeded, but a
stage's length is in seconds, so two machines do not make the same bits.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
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
from train_vae import Plan, encode, paint, save_grid, start_vae, train_vae
from training_data import CAPTIONS, SHORT, Data, captioned, ids_of, make_data

SERVED = (1.0, 0.75, 0.5, 0.25)
READING = 0.1  # weight of the reader's loss


# ---------------------------------------------------------------- 2. read, 3. walk


def captions_at(data: Data, rows: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Token ids of one caption a row, T5's padded to `length`. CLIP is causal: its pads change nothing."""
    which = torch.randint(CAPTIONS, rows.shape, device=rows.device)
    t5_ids, clip_ids = data.t5_ids[rows, which].long(), data.clip_ids[rows, which].long()
    return F.pad(t5_ids, (0, length - t5_ids.shape[1]), value=0), clip_ids


def coupled(noise: Tensor, jitter: Tensor, things: Tensor) -> Tensor:
    """Noise [B, S, 64] that holds the jitter [B, 6] of things [B, 2, 7]: channel k's mean is jitter k as a Gaussian.

    The jitter is uniform, so the means are distributed like those of plain noise, and so is the whole noise.
    """
    there = (things[:, :, 0] >= 0).repeat_interleave(3, 1)
    wanted = torch.special.ndtri((jitter + 1) / 2).clamp(-3, 3) / noise.shape[1] ** 0.5
    means = noise[:, :, : jitter.shape[1]].mean(1)
    noise[:, :, : jitter.shape[1]] += torch.where(there, wanted - means, 0.0)[:, None]
    return noise


class Reader(nn.Module):
    """Reads a caption's meaning from both encoders. It trains them faster than pictures do, and is dropped later."""

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
    """One head looks at the tokens before a token, the other at those behind it, near ones first.

    Only this bias tells T5 the order of words. In transformers it starts near zero, and at a rate that suits the other
    weights it moves little: T5 then stays a bag of words.
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
    with a gradient of zero. T5 then stays a bag of words.
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
    """The model, its masters and the reader. `read` and `walk` are one step of the stages 2 and 3."""

    def __init__(self, tiny: tm.Tiny, data: Data, latents: Tensor, plan: Plan, seed: int) -> None:
        self.tiny, self.data, self.latents, self.plan = tiny, data, latents, plan
        self.reader = Reader(tm.T5["d_model"]).to(plan.device, torch.bfloat16)
        self.times = torch.tensor([*SERVED, 0.0], device=plan.device)  # of the next walk; captured steps read them here
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
        """Choose four even steps, three times of four; else four of any length, so that other step counts work too."""
        if self.rng.random() < 0.75:
            inner = list(SERVED[1:])
        else:
            inner = sorted((self.rng.random() for _ in SERVED[1:]), reverse=True)
        self.times.copy_(torch.tensor([1.0, *inner, 0.0]))

    def train(self, name: str, work: Callable[[int, int], Tensor], seconds: float, short: float) -> None:
        """Train by the clock. Text is padded to `SHORT` for the share `short` of the time, then as it is served."""
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
    """Judge pictures of captions never seen in training, and print both scores and why pictures fail."""
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


# ---------------------------------------------------------------- command


def begun(seed: int, start: Path | None, fresh: list[str]) -> tm.Tiny:
    """A model before training, or the one at `start` with new weights for the parts in `fresh`."""
    built = tm.build(seed)
    start_small(built.transformer)
    start_vae(built.vae)
    start_t5(built.text_encoder_2)
    tiny = tm.load(start) if start else built
    for part in fresh:
        setattr(tiny, part, getattr(built, part))
    return tiny


def prepared(stored: Path | None, tiny: tm.Tiny, make: Callable[[], Data]) -> Data:
    """The scenes from the file `stored`; if there is none, they are made and saved there."""
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
    smoke: Annotated[bool, typer.Option(help="All stages at trivial size on the CPU, to see that they run.")] = False,
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
