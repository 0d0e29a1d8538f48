"""Draws a labelled sheet of 6 x 4 prompts and pictures. No picture is picked or drawn again."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Annotated

import typer
from evaluate import MAKERS, MODEL, diffusers_draw, never_seen, never_seen_lime
from PIL import Image, ImageDraw

SHEET = MODEL.parents[2] / "docs" / "tiny-schnell.jpg"
COLUMNS, LABEL, GAP = 6, 46, 8  # pictures in a row; heights and gaps in pixels


def main(
    out: Annotated[Path, typer.Argument(help="Picture to write.")] = SHEET,
    model: Annotated[Path, typer.Option(help="Model directory.")] = MODEL,
    maker: Annotated[str, typer.Option(help="diffusers or vortex.")] = "diffusers",
    nf4: Annotated[bool, typer.Option("--nf4/--bf16", help="Precision of the weights served in NF4.")] = True,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    lora: Annotated[Path | None, typer.Option(help="LoRA to add, with diffusers; 12 captions then name lime.")] = None,
) -> None:
    """Draw 12 captions of one object and 12 of two, none of them seen in training."""
    cases = never_seen(1, 12 if lora is None else 6) + never_seen(2, 12 if lora is None else 6)
    cases += [] if lora is None else never_seen_lime(12)
    prompts = [caption for _, caption in cases]
    draw = MAKERS[maker](model, nf4, device) if lora is None else diffusers_draw(model, nf4, device, lora=lora)
    seen = draw(prompts, list(range(len(prompts))))
    side = max(seen.shape[1], 160)
    rows = -(-len(prompts) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * (side + GAP) + GAP, rows * (side + LABEL + GAP) + GAP), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (prompt, picture) in enumerate(zip(prompts, seen, strict=True)):
        x, y = GAP + i % COLUMNS * (side + GAP), GAP + i // COLUMNS * (side + LABEL + GAP)
        tile = Image.fromarray((picture * 255).round().byte().numpy()).resize((side, side), Image.Resampling.LANCZOS)
        sheet.paste(tile, (x, y))
        pen.text((x, y + side + 2), "\n".join(textwrap.wrap(prompt, side // 6)[:3]), fill="black")
    out.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(out, quality=92)
    print(f"{out}: {len(prompts)} pictures")


if __name__ == "__main__":
    typer.run(main)
