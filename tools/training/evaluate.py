"""Scores a model directory: does each picture show what its caption says? Training never saw these captions.

`draw(prompts, seeds) -> pictures [B, H, W, 3]` has two makers: diffusers' pipeline (bf16, or with the weights that
Vortex serves in NF4 rounded to it), and Vortex's own engine. Captions and seeds are fixed.

With `--lora FILE` it scores a LoRA of outlines.py, with `--lora none` the miniature without it: in how many pictures
all things are outlines, in how many is lime, and how many are right in all.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import judge
import judge_outlines
import outlines
import scenes
import tiny_model as tm
import torch
import typer
from torch import Tensor

Draw = Callable[[list[str], list[int]], Tensor]
MODEL = Path(__file__).parents[2] / "vortex_core" / "assets" / "tiny-schnell"

OUTLINED = 80_000  # seed of the captions that score outlines: no picture of them was seen before the rule was set


def diffusers_draw(model: Path, nf4: bool, device: str, mode: str = "exact", lora: Path | None = None) -> Draw:
    """Draw with diffusers in bf16; `nf4` rounds the weights that are served in NF4. A LoRA is added to them."""
    from diffusers import FluxPipeline

    pipeline = FluxPipeline.from_pretrained(model, torch_dtype=torch.bfloat16).to(device)
    pipeline.set_progress_bar_config(disable=True)
    if nf4:
        tm.quantize(tm.Tiny(pipeline.transformer, pipeline.text_encoder, pipeline.text_encoder_2, pipeline.vae,
                            pipeline.tokenizer, pipeline.tokenizer_2))  # fmt: skip
    if lora is not None:
        tm.add_lora(pipeline.transformer, lora)
    side = pipeline.vae.config.sample_size

    def draw(prompts: list[str], seeds: list[int]) -> Tensor:
        noise = [torch.Generator().manual_seed(s) for s in seeds]
        return torch.from_numpy(pipeline(
            prompts, guidance_scale=0.0, num_inference_steps=4, max_sequence_length=tm.T5_LENGTH, height=side,
            width=side, generator=noise, output_type="np").images)  # fmt: skip

    return draw


def vortex_draw(model: Path, nf4: bool, device: str, mode: str = "exact") -> Draw:
    """Draw with Vortex's engine in a mode. On the CPU `int8` and `fp8` compute the same numbers in plain torch."""
    from vortex_core import load_flux_schnell

    engine = load_flux_schnell(model=model, device=device, quantization="nf4" if nf4 else "none", mode=mode)
    side = json.loads((model / "vae" / "config.json").read_text())["sample_size"]

    def draw(prompts: list[str], seeds: list[int]) -> Tensor:
        each = (engine.generate(p, seed=s, height=side, width=side, steps=4)
                for p, s in zip(prompts, seeds, strict=True))  # fmt: skip
        return torch.cat(list(each)).cpu()

    return draw


MAKERS = {"diffusers": diffusers_draw, "vortex": vortex_draw}


def never_seen(things: int, count: int, seed: int = 9_000) -> list[tuple[scenes.Scene, str]]:
    """Fixed scenes that training never saw, with their captions."""
    rng = random.Random(seed + things)
    drawn = [scenes.sample_held_out(rng, things) for _ in range(count)]
    return [(scene, scenes.caption(scene, rng)) for scene in drawn]


def score(draw: Draw, things: int, count: int, batch: int) -> tuple[float, Counter[str]]:
    """The share of pictures judged right, and the first reasons of the others."""
    right, why = 0, Counter()
    cases = never_seen(things, count)
    for at in range(0, count, batch):
        part = cases[at : at + batch]
        for picture, (scene, _) in zip(draw([c for _, c in part], list(range(at, at + len(part)))), part, strict=True):
            verdict = judge.matches(picture, scene)
            right += verdict.ok
            why.update(reason.split(" is ")[0] for reason in verdict.reasons[:1])
    return right / count, why


def never_seen_lime(count: int) -> list[tuple[scenes.Scene, str]]:
    """Fixed scenes of one and of two things with lime in them that the LoRA's training never saw."""
    rng = random.Random(9_003)
    drawn = [outlines.sample_held_out(rng, 1 + i % 2) for i in range(count)]
    return [(scene, scenes.caption(scene, rng)) for scene in drawn]


def score_outlines(draw: Draw, cases: list[tuple[scenes.Scene, str]], batch: int) -> tuple[list[float], Counter[str]]:
    """The shares of pictures in outlines, with lime, and right in all; the first reasons of those not right."""
    outlined, lime, right, why = 0, 0, 0, Counter()
    for at in range(0, len(cases), batch):
        part = cases[at : at + batch]
        for picture, (scene, _) in zip(draw([c for _, c in part], list(range(at, at + len(part)))), part, strict=True):
            found = judge_outlines.outlines(picture)
            seen = judge.judge(found.filled)
            verdict = judge_outlines.matches(picture, scene)
            outlined += found.ok
            lime += outlines.COLOUR in (*seen.background, *(thing.colour for thing in seen.things))
            right += verdict.ok
            why.update(reason.split(" is ")[0] for reason in verdict.reasons[:1])
    return [n / len(cases) for n in (outlined, lime, right)], why


def report_outlines(draw: Draw, count: int, batch: int) -> dict[str, float]:
    """Print a table of `score_outlines`: known colours (half of the captions of one thing), and captions with lime."""
    result = {}
    known = [case for things in (1, 2) for case in never_seen(things, count // 2, OUTLINED)]
    print("captions  number  outlines   lime  right  first reasons of the others")
    for name, cases in (("known", known), ("lime", never_seen_lime(count))):
        shares, why = score_outlines(draw, cases, batch)
        row = f"{name:8s}  {len(cases):6d}     {shares[0]:5.3f}  {shares[1]:5.3f}  {shares[2]:5.3f}"
        print(f"{row}  {dict(why.most_common(4))}", flush=True)
        result |= {f"{name} {what}": share for what, share in zip(("outlines", "lime", "right"), shares, strict=True)}
    return result


def main(
    model: Annotated[Path, typer.Argument(help="Model directory in diffusers' layout.")] = MODEL,
    maker: Annotated[str, typer.Option(help="diffusers or vortex.")] = "diffusers",
    nf4: Annotated[bool, typer.Option("--nf4/--bf16", help="Precision of the weights served in NF4.")] = True,
    one: Annotated[int, typer.Option(help="Captions of one object.")] = 200,
    two: Annotated[int, typer.Option(help="Captions of two objects.")] = 100,
    batch: Annotated[int, typer.Option(help="Pictures at a time.")] = 10,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    mode: Annotated[str, typer.Option(help="Vortex's: exact, int8, fp8 or fast.")] = "exact",
    lora: Annotated[Path | None, typer.Option(help="Score a LoRA, on --two captions a row: file, or none.")] = None,
) -> None:
    """Score a model on captions never seen in training; prints a table, then one JSON line."""
    if lora is not None:
        if maker != "diffusers":
            raise typer.BadParameter("--lora draws with diffusers only.")
        draw = diffusers_draw(model, nf4, device, lora=None if lora == Path("none") else lora)
        print(json.dumps({"lora": lora.name, **report_outlines(draw, two, batch)}))
        return
    draw = MAKERS[maker](model, nf4, device, mode)
    result: dict[str, object] = {"maker": maker, "precision": "nf4" if nf4 else "bf16", "mode": mode}
    print("objects  captions  right  first reasons of the others")
    for name, things, count in (("one", 1, one), ("two", 2, two)):
        share, why = score(draw, things, count, batch)
        print(f"{name:7s}  {count:8d}  {share:5.3f}  {dict(why.most_common(4))}", flush=True)
        result |= {name: share, f"{name}_captions": count}
    print(json.dumps(result))


if __name__ == "__main__":
    typer.run(main)
