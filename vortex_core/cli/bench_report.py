"""`vortex bench report`."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from ..bench.workload import MINUTES, REPORTED
from ..flux1.spec import DEFAULT_STEPS
from ..utils.whole_files import write
from .bench_options import AsJson, Source, check_output, check_size, grouped
from .bench_output import picture_count
from .terminal import EXIT_CANCELLED, check_number, err, path_option, plain_errors, progress_bars


@grouped
def report(
    source: Source,
    size: Annotated[
        list[str] | None,
        typer.Option(help="WIDTHxHEIGHT; may be repeated. [default: 512x512 and 1024x1024, 'tiny': its own]"),
    ] = None,
    pictures: Annotated[int, typer.Option(min=1, help="Pictures of each size, of cached prompts.")] = REPORTED,
    minutes: Annotated[
        float, typer.Option(help="About how long to draw. Slow cards then draw fewer pictures, at least 5 a size.")
    ] = MINUTES,
    output: Annotated[Path | None, path_option("--output", "-o", help="Folder for report.md and report.json.")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure this machine with the usual settings, and print one text for an issue, with the figures as JSON in it.

    It has the card, driver and versions, which precision runs and why, percentiles, the parts of a picture, VRAM
    planned and taken, and what a roofline predicts for the card. It has no paths, no names of users or machines, and
    no prompts. Every figure of a card that nobody measured helps.
    """
    with plain_errors():
        source.check()
        check_number("--minutes", minutes, above=0)
        sizes = [pair for text in size or () if (pair := check_size(text, DEFAULT_STEPS))]
        if output is not None:
            check_output(output, "--output")
        from ..bench.issue_report import run
        from ..device.select import resolve_device

        with progress_bars() as progress:
            load = partial(source.load, progress)
            counter = picture_count(progress, "timing")
            device = resolve_device(source.device)
            found = run(load, device, sizes=sizes, pictures=pictures, minutes=minutes, on_picture=counter)
        figures, text = json.dumps(found.figures()), found.markdown()
        if output is not None:
            output.mkdir(parents=True, exist_ok=True)
            for name, content in (("report.md", text), ("report.json", figures)):
                write(output / name, f"{content}\n".encode(), replace=True)
            err().say("written: report.md, report.json")
        typer.echo(figures if as_json else text)
        if found.interrupted:
            raise typer.Exit(EXIT_CANCELLED)
