"""The command `vortex`."""

from __future__ import annotations

import json
import secrets
from pathlib import Path
from typing import Annotated

import typer

from .. import __version__
from ..errors import VortexInputError
from ..flux1.nag import check_nag
from ..flux1.request import DEFAULT_STRENGTH, Request, check_choice, check_prompt
from ..flux1.spec import DEFAULT_STEPS, MAX_STEPS, MIN_SIZE, MODES, QUANTIZATIONS
from ..utils.packages import need
from ..utils.printable import printable, printable_lines
from ..utils.whole_files import check_folder
from . import interrupt
from .bench import app as bench
from .loras import check_loras, parse_lora
from .pictures import Pictures, check_new, output_paths
from .start import read_start
from .terminal import (
    T5,
    CacheDir,
    Clip,
    Device,
    Lora,
    Mode,
    Model,
    Quantization,
    Size,
    Tokenizers,
    Vae,
    Vram,
    as_options,
    byte_count,
    check_number,
    check_text,
    err,
    grid,
    load_engine,
    log_to_stderr,
    out,
    parse_size,
    path_option,
    plain_errors,
    progress_bars,
    user_path,
)

MAX_BATCH = 10_000
BUDGETS = {"above": 0.0, "most": 1e6}  # GB

Output = Annotated[
    Path | None,
    path_option(
        "--output", "-o", help="PNG to write; a batch adds -1, -2, ... [default: vortex-SEED.png]", show_default=False
    ),
]

# no markup: help texts have brackets of their own
app = typer.Typer(
    help="FLUX.1-schnell pictures with resident NF4 weights, in 4 steps.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
cache = typer.Typer(help="The quantized weights that Vortex keeps on disk.", no_args_is_help=True)
fetch = typer.Typer(help="Download what Vortex needs; nothing else ever uses the network.", no_args_is_help=True)
app.add_typer(bench, name="bench")
app.add_typer(cache, name="cache")
app.add_typer(fetch, name="fetch")


def run() -> int:
    """Run the command that `sys.argv` names. Returns its exit code."""
    try:
        return app(prog_name="vortex", standalone_mode=False) or 0
    except Exception as error:
        if not hasattr(error, "format_message"):  # bad usage is click's error; typer may bring a click of its own
            raise
        error.message = printable_lines(error.message)  # type: ignore[attr-defined]
        error.show()  # type: ignore[attr-defined]
        return int(error.exit_code)  # type: ignore[attr-defined]


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"vortex {__version__}")
        raise typer.Exit()


@app.callback()
def vortex(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Say what is chosen and why.")] = False,
) -> None:
    """Options that every command takes."""
    log_to_stderr(verbose)


@app.command(
    epilog='Examples:\n\n  vortex generate "a red circle on a white background"\n\n'
    '  vortex generate "a lighthouse at dusk" --model ~/models/FLUX.1-schnell --size 1024x1024 -o lighthouse.png\n\n'
    '  vortex generate "a lighthouse" --model ~/models/FLUX.1-schnell --lora ink.safetensors:0.8\n\n'
    '  vortex generate "a blue circle" --image circle.png --strength 0.75 -o blue.png\n\n'
    '  vortex generate "a street" --negative "cars" --nag 5'
)
def generate(
    prompt: Annotated[str, typer.Argument(help="What the picture shows, in words.", show_default=False)],
    model: Model = "tiny",
    clip: Clip = None,
    t5: T5 = None,
    vae: Vae = None,
    tokenizers: Tokenizers = None,
    cache_dir: CacheDir = None,
    output: Output = None,
    seed: Annotated[
        int | None,
        typer.Option(help="Same seed, same picture. Picture i of a batch has seed + i. [default: drawn]"),
    ] = None,
    size: Size = None,
    steps: Annotated[int, typer.Option(help=f"1 to {MAX_STEPS}; schnell is made for 4.")] = DEFAULT_STEPS,
    batch: Annotated[int, typer.Option(help=f"How many pictures, up to {MAX_BATCH}.")] = 1,
    negative_prompt: Annotated[
        str | None,
        typer.Option("--negative", "--negative-prompt", help="What to keep away from. Needs --nag or --guidance."),
    ] = None,
    nag: Annotated[
        float, typer.Option(help="How far to keep away from --negative, inside attention: 5 is usual, 0 is off.")
    ] = 0.0,
    guidance: Annotated[
        float, typer.Option(help="The same by classifier-free guidance: twice the time. From 1 on; 0 is off.")
    ] = 0.0,
    image: Annotated[
        Path | None,
        typer.Option(help="A picture to begin from. Without --size it keeps its own, cut to multiples of 16."),
    ] = None,
    strength: Annotated[
        float | None,
        typer.Option(
            help=f"How much of --image is drawn anew, above 0 to 1. [default: {DEFAULT_STRENGTH:g}, with a mask 1]"
        ),
    ] = None,
    mask: Annotated[
        Path | None, typer.Option(help="A picture as large as --image: white is drawn anew, black stays as it is.")
    ] = None,
    lora: Lora = None,
    device: Device = None,
    vram: Vram = None,
    mode: Mode = "fast",
    quantization: Quantization = "nf4",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files that exist.")] = False,
) -> None:
    """Draw a prompt and write it as PNG. The file says how it was made, in the form that other programs read."""
    with plain_errors():
        check_text("The prompt", prompt)
        check_prompt(prompt)
        if not 1 <= batch <= MAX_BATCH:
            raise VortexInputError(f"--batch must be at least 1 and at most {MAX_BATCH}, not {batch}.")
        seed = secrets.randbits(32) if seed is None else seed
        width, height = parse_size(size)
        led = {"strength": 1.0 if strength is None else strength, "guidance": guidance, "nag": check_nag(nag)}
        Request(seed, height or MIN_SIZE, width or MIN_SIZE, steps, batch, **led)  # type: ignore[arg-type]
        check_choice("mode", mode, MODES)
        check_choice("quantization", quantization, QUANTIZATIONS)
        check_number("--vram", vram, **BUDGETS)
        need("PIL.PngImagePlugin", "Writing a picture")
        paths = output_paths(output or Path(f"vortex-{seed}.png"), batch, overwrite)
        loras = [parse_lora(text) for text in lora or ()]
        begin = read_start(image, mask, strength, width, height)
        wishes = (*begin, strength, nag, guidance)
        pictures = Pictures(prompt, negative_prompt, seed, steps, height, width, paths, overwrite, loras, *wishes)
        with progress_bars() as progress:
            parts = {"clip": clip, "t5": t5, "vae": vae, "tokenizers": tokenizers, "cache_dir": cache_dir}
            limits = {"vram_budget": vram, "cap_process": True}  # the process is ours
            how = {"device": device, "mode": mode, "quantization": quantization}
            if loras:
                check_loras(loras, _model(model), **parts)
            engine = load_engine(progress, _model(model), **how, **limits, **parts)
            pictures.draw(engine, progress)


@app.command(
    epilog="Examples:\n\n  vortex plan --vram 8 --size 1024x1024\n\n"
    "  vortex plan --vram 4.5 --size 512x512 --step-ms 180\n\n"
    '  vortex plan --card "RTX 3060" --size 512x512'
)
def plan(
    vram: Annotated[float, typer.Option("--vram", help="VRAM budget in GB (10^9 bytes).")] = 6.5,
    size: Size = None,
    batch: Annotated[int, typer.Option(help="How many pictures.")] = 1,
    model: Annotated[
        str | None, typer.Option(help="'tiny', a folder or a file. [default: FLUX.1-schnell's own sizes]")
    ] = None,
    clip: Clip = None,
    t5: T5 = None,
    vae: Vae = None,
    tokenizers: Tokenizers = None,
    pcie: Annotated[float, typer.Option(help="GB/s from pinned host memory to the card.")] = 12.0,
    step_ms: Annotated[
        float,
        typer.Option(
            help="Milliseconds of a step with all weights on the card; copies run meanwhile. With --card, what is "
            "predicted counts where this is 0."
        ),
    ] = 0.0,
    card: Annotated[
        str | None,
        typer.Option(help="Also predict times on a card, such as 'RTX 3060'; another name lists those that are known."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say where weights would live on any card, the peak of VRAM, and what streaming costs. Needs no GPU.

    With --card also what a picture takes there, in parts: a roofline of operations and bytes with the shares of full
    rates that were measured on Hopper. That is a prediction.
    """
    with plain_errors():
        check_number("--vram", vram, **BUDGETS)
        check_number("--pcie", pcie, above=0)
        check_number("--step-ms", step_ms, least=0)
        width, height = parse_size(size)
        Request(0, height or MIN_SIZE, width or MIN_SIZE, DEFAULT_STEPS, batch)
        from .plan_report import known_card, parts_table, prediction_table, propose

        known = None if card is None else known_card(card, vram)
        others = {"clip": clip, "t5": t5, "vae": vae, "tokenizers": tokenizers}
        made = propose(vram, height, width, batch, None if model is None else _model(model), others)
        predictions = [] if known is None else made.predictions(known)
        step_ms = step_ms or (1e3 * predictions[0].step if predictions else 0)
        costs = made.costs(pcie * 1e9, step_ms)
        if as_json:
            told = {"predictions": [found.figures() for found in predictions]} if predictions else {}
            typer.echo(json.dumps(made.figures | costs | told))
            return
        out().print(parts_table(made))
        for sentence in made.sentences:
            out().say(sentence)
        bound = "" if step_ms else "at most "
        out().say(
            f"streaming at {pcie:g} GB/s adds {bound}{costs['prompt_ms']:.0f} ms to a new prompt, "
            f"{bound}{costs['picture_ms']:.0f} ms to a picture of {DEFAULT_STEPS} steps"
        )
        if predictions:
            out().print(prediction_table(predictions, made.plan.slice))


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for scripts and bug reports.")] = False,
) -> None:
    """Say what this machine can do, and what to fix. Exits with 1 where something keeps Vortex from working."""
    from dataclasses import asdict

    from .doctor import examine

    findings = list(examine())
    if as_json:
        typer.echo(json.dumps({"vortex": __version__, "findings": [asdict(f) for f in findings]}))
    else:
        from rich.text import Text

        table = grid("", "what", "found", "to do")
        marks = {"ok": "green", "note": "yellow", "fault": "red"}
        for finding in findings:
            state = Text(finding.state, marks[finding.state])
            table.add_row(state, finding.name, finding.detail, as_options(finding.fix))
        out().print(table)
    if any(finding.state == "fault" for finding in findings):
        raise typer.Exit(1)


@app.command()
def inspect(
    path: Annotated[
        Path, typer.Argument(help="A file or folder; a LoRA too.", parser=user_path, metavar="PATH", show_default=False)
    ],
    clip: Clip = None,
    t5: T5 = None,
    vae: Vae = None,
    tokenizers: Tokenizers = None,
    budget: Annotated[float, typer.Option(help="VRAM budget in GB (10^9 bytes) to compare with.")] = 6.5,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what a model file or a LoRA is, what it lacks, and what it takes on the GPU. Reads headers only."""
    from dataclasses import asdict

    with plain_errors():
        check_number("--budget", budget, **BUDGETS)
        from .inspection import inspect as look
        from .lora_inspection import inspect_lora, show

        lora = inspect_lora(path)
        if lora is not None:
            if as_json:
                typer.echo(json.dumps({"lora": asdict(lora) | {"path": str(path)}}))
            else:
                show(lora)
            return
        seen = look(path, {"clip": clip, "t5": t5, "vae": vae}, tokenizers)
        if as_json:
            typer.echo(json.dumps(asdict(seen) | {"path": str(path), "resident": seen.resident}))
            return
        table = grid("part", "written as", "tensors", "in the file")
        for part in seen.found:
            table.add_row(part.kind, part.words, str(part.tensors), f"{part.nbytes / 1e9:.2f} GB")
        out().print(table)
        for missing in seen.missing:
            out().say(("lacks", "yellow"), f" {missing}")
        for what, size in seen.placement.items():
            out().say(f"{size / 1e9:6.2f} GB  {what}")
        if seen.placement:
            left = budget - seen.resident / 1e9
            verdict = f"leaves {left:.2f} GB for activations" if left > 0 else f"is {-left:.2f} GB over"
            out().say(f"{seen.resident / 1e9:6.2f} GB  on the GPU between pictures; a budget of {budget} GB {verdict}")


@app.command()
def quantize(
    source: Annotated[
        Path,
        typer.Argument(
            help="A FLUX.1-schnell transformer: folder or file.", parser=user_path, metavar="PATH", show_default=False
        ),
    ],
    target: Annotated[
        Path,
        typer.Argument(
            help="The .safetensors file to write, or a folder for diffusers.",
            parser=user_path,
            metavar="PATH",
            show_default=False,
        ),
    ],
    device: Device = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file that exists.")] = False,
) -> None:
    """Write a transformer in NF4: one file under BFL's names, or a folder that diffusers loads."""
    with plain_errors():
        check_folder(target.parent)
        if target.is_dir() and not overwrite:
            from ..checkpoint.quantize import is_unfinished

            overwrite = is_unfinished(target)
        check_new([target], overwrite)
        from ..checkpoint.quantize import quantize_file

        interrupt.raises()
        with progress_bars() as progress:
            quantize_file(source, target, device=device, on_progress=byte_count(progress, "writing"))
        files = [target] if target.is_file() else target.iterdir()
        err().say((str(target), "green"), f"  {sum(file.stat().st_size for file in files) / 1e9:.2f} GB")


@cache.command("list")
def cache_list(cache_dir: CacheDir = None) -> None:
    """Show what is kept, the latest used first."""
    from ..checkpoint.cache import Cache

    with plain_errors():
        kept = Cache(cache_dir)
        table = grid("part", "of", "size", "file")
        for entry in kept.entries():
            table.add_row(entry.kind, entry.source, f"{entry.nbytes / 1e9:.2f} GB", entry.path.name)
        out().print(table if table.row_count else f"nothing is kept in {kept.folder}")


@cache.command("clear")
def cache_clear(cache_dir: CacheDir = None) -> None:
    """Remove everything that is kept; the next load quantizes again."""
    from ..checkpoint.cache import Cache

    with plain_errors():
        typer.echo(f"freed {Cache(cache_dir).clear() / 1e9:.2f} GB")


@cache.command("verify")
def cache_verify(cache_dir: CacheDir = None) -> None:
    """Read everything that is kept and compare it with what was written. Exits with 1 where it differs."""
    from ..checkpoint.cache import Cache

    damaged = False
    with plain_errors():
        for entry, differs in Cache(cache_dir).damaged():
            typer.echo(printable(f"{'DAMAGED' if differs else 'ok'}  {entry.path}"))
            damaged = damaged or differs
    if damaged:
        raise typer.Exit(1)


@fetch.command("tokenizers")
def fetch_tokenizers() -> None:
    """Download CLIP's and T5's tokenizers (4 MB) into the Hugging Face cache, for single-file models."""
    from ..checkpoint.tokenizer import fetch_tokenizers as download

    with plain_errors():
        for path in download():
            typer.echo(printable(path))


def _model(model: str) -> str | Path:
    return model if model == "tiny" else user_path(model)
