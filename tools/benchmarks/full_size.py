"""Builds FLUX.1-schnell at its real size with random weights, loads it in the ordinary way, and measures it.

    python tools/benchmarks/full_size.py build /dev/shm/random-schnell      # 34 GB, needs a GPU to be quick
    python tools/benchmarks/full_size.py measure /dev/shm/random-schnell --peer --json figures.json
    python tools/benchmarks/full_size.py files /dev/shm/random-schnell      # what reading and quantizing takes

Memory and speed do not depend on the values of weights, so random ones give the real figures. `--peer` draws with
diffusers and bitsandbytes NF4 from the same folder in the same run.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import platform
import shutil
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import file_speed
import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from torch import nn

from vortex_core.bench.random_model import configs, modules
from vortex_core.checkpoint.bundle import TINY

GB = 1e9
SHARD = 4 * GB
SIZES = (512, 1024)
PROMPTS = ("a red circle on a white background", "a blue square above a green star", "a small yellow ring")
console = Console()


def build(folder: Path, seed: int = 0) -> None:
    """Write a whole diffusers folder of random bf16 weights, 34 GB."""
    if folder.exists():
        raise SystemExit(f"{folder} exists; remove it or choose another name.")
    config = configs()
    shutil.copytree(TINY, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(seed)
    for part, module in modules(config).items():
        (folder / part / "config.json").write_text(json.dumps(config[part], indent=2))
        started = time.perf_counter()
        stem = "diffusion_pytorch_model" if part in ("transformer", "vae") else "model"
        written = write_random(module, folder / part, stem, generator)
        console.print(f"{part}: {written / GB:.1f} GB in {time.perf_counter() - started:.0f} s")


def write_random(module: nn.Module, folder: Path, stem: str, generator: torch.Generator) -> int:
    """Random weights that keep activations finite (std 1/sqrt(fan in)), in shards with an index, as on the Hub."""
    shard: dict[str, torch.Tensor] = {}
    weight_map: dict[str, str] = {}
    total = 0
    last = [name for name, _ in module.named_parameters()][-1]
    for name, parameter in module.named_parameters():
        weight = torch.ones(parameter.shape) if name.endswith("weight") else torch.zeros(parameter.shape)
        if parameter.ndim > 1:
            weight = torch.randn(parameter.shape, generator=generator, device=generator.device, dtype=torch.bfloat16)
            weight *= parameter[0].numel() ** -0.5
        shard[name] = weight.bfloat16().cpu()
        total += weight.numel() * 2
        if name == last or sum(t.numel() * 2 for t in shard.values()) > SHARD:
            # one shard in memory at a time
            file = f"{stem}-{len(set(weight_map.values())) + 1:05d}.safetensors"
            save_file(shard, folder / file, metadata={"format": "pt"})
            weight_map.update(dict.fromkeys(shard, file))
            shard = {}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index))
    return total


def measure_vortex(folder: Path, repeats: int) -> dict[str, Any]:
    """Load and draw with Vortex. Returns seconds and bytes."""
    from vortex_core import load_flux_schnell

    started = time.perf_counter()
    engine = load_flux_schnell(folder, device="cuda")
    result: dict[str, Any] = {"load_seconds": time.perf_counter() - started, "loaded": memory()}
    result["step_time_weights"] = engine.step_time_bytes
    result["first_prompt_seconds"] = seconds(lambda: engine.encode(PROMPTS[0]))
    result["new_prompt_seconds"] = statistics.median(seconds(lambda p=p: engine.encode(p)) for p in PROMPTS[1:])
    for size in SIZES:
        result[str(size)] = measure_pictures(
            lambda size=size: engine.generate(PROMPTS[0], seed=1, height=size, width=size), repeats
        )
    engine.unload()
    return result


def measure_diffusers(folder: Path, repeats: int) -> dict[str, Any]:
    """The peer: diffusers with bitsandbytes NF4 for transformer and T5, everything resident, eager."""
    from diffusers import FluxPipeline, PipelineQuantizationConfig

    nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}
    quantization = PipelineQuantizationConfig(
        quant_backend="bitsandbytes_4bit",
        quant_kwargs=nf4,
        components_to_quantize=["transformer", "text_encoder_2"],
    )
    started = time.perf_counter()
    pipe = FluxPipeline.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=quantization)
    pipe.to(device="cuda").set_progress_bar_config(disable=True)
    torch.cuda.empty_cache()
    result: dict[str, Any] = {"load_seconds": time.perf_counter() - started, "loaded": memory()}
    encode = lambda prompt: pipe.encode_prompt(prompt, None, max_sequence_length=256)  # noqa: E731
    with torch.inference_mode():
        result["first_prompt_seconds"] = seconds(lambda: encode(PROMPTS[0]))
        result["new_prompt_seconds"] = statistics.median(seconds(lambda p=p: encode(p)) for p in PROMPTS[1:])
        embeds, pooled, _ = encode(PROMPTS[0])
    for size in SIZES:
        result[str(size)] = measure_pictures(
            lambda size=size: pipe(
                prompt_embeds=embeds, pooled_prompt_embeds=pooled, height=size, width=size, num_inference_steps=4,
                guidance_scale=0.0, generator=torch.Generator().manual_seed(1), output_type="pt",
            ),
            repeats,
        )  # fmt: skip
    return result


def measure_pictures(draw: Callable[[], object], repeats: int) -> dict[str, Any]:
    """Warm up twice, then time `repeats` pictures of a cached prompt, synchronized; memory peaks of all of them."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    for _ in range(2):
        draw()
    times = [seconds(draw) for _ in range(repeats)]
    return {
        "seconds_median": statistics.median(times),
        "seconds_min": min(times),
        "seconds_max": max(times),
        "pictures": repeats,
        "added_allocated": torch.cuda.max_memory_allocated() - before,
        "peak_allocated": torch.cuda.max_memory_allocated(),
        "peak_reserved": torch.cuda.max_memory_reserved(),
        "process": memory()["process"],
    }


def seconds(work: Callable[[], object]) -> float:
    """Wall time of `work`, with the device synchronized before and after."""
    torch.cuda.synchronize()
    started = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - started


def memory() -> dict[str, Any]:
    """The counters of `vortex_core.device.vram`, as a dictionary."""
    from vortex_core.device.vram import snapshot

    return asdict(snapshot(torch.device("cuda", 0)))


def machine() -> dict[str, str]:
    """The machine that the figures were measured on."""
    from importlib.metadata import PackageNotFoundError, version

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    found = {"gpu": gpu, "python": platform.python_version(), "torch": torch.__version__}
    for package in ("bitsandbytes", "diffusers", "transformers"):
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def report(figures: dict[str, Any]) -> None:
    """Print the figures as a table."""
    table = Table("", *figures["systems"], title=", ".join(f"{k} {v}" for k, v in figures["machine"].items()))

    def row(name: str, pick: Callable[[dict[str, Any]], float | None], form: str = "{:.2f}") -> None:
        values = [pick(system) for system in figures["systems"].values()]
        table.add_row(name, *["unknown" if value is None else form.format(value) for value in values])

    def gb(value: int | None) -> float | None:
        return None if value is None else value / GB

    row("load, s", lambda s: s["load_seconds"], "{:.1f}")
    row("new prompt, ms", lambda s: s["new_prompt_seconds"] * 1e3, "{:.0f}")
    row("step-time weights, GB", lambda s: gb(s.get("step_time_weights")))
    for counter in ("allocated", "reserved", "process"):
        row(f"loaded, {counter}, GB", lambda s, c=counter: gb(s["loaded"][c]))
    for size in map(str, SIZES):
        row(f"{size}: picture, ms", lambda s, n=size: s[n]["seconds_median"] * 1e3, "{:.0f}")
        for counter in ("added_allocated", "peak_allocated", "peak_reserved", "process"):
            row(f"{size}: {counter.replace('_', ' ')}, GB", lambda s, n=size, c=counter: gb(s[n][c]))
    console.print(table)


def main() -> None:
    """Parse arguments and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    make = commands.add_parser("build", help="write the random model (34 GB of disk or /dev/shm)")
    make.add_argument("folder", type=Path)
    look = commands.add_parser("measure", help="load it, draw at 512 and 1024, print memory and seconds")
    look.add_argument("folder", type=Path)
    look.add_argument("--repeats", type=int, default=10, help="timed pictures a size (default 10)")
    look.add_argument("--peer", action="store_true", help="also diffusers with bitsandbytes NF4, in the same run")
    look.add_argument("--json", type=Path, help="write all figures here")
    read = commands.add_parser("files", help="seconds and host memory of quantizing, caching and reading, with peers")
    read.add_argument("folder", type=Path)
    read.add_argument("--work", type=Path, help="a new folder to use and remove (default FOLDER-work; 16 GB)")
    read.add_argument("--only", nargs="+", default=(), metavar="MEASURE", help="such as quantize load engine")
    read.add_argument("--json", type=Path, help="write all figures here")
    arguments = parser.parse_args()
    if arguments.command == "build":
        build(arguments.folder)
        return
    figures: dict[str, Any] = {"machine": machine()}
    if arguments.command == "files":
        work = arguments.work or arguments.folder.with_name(f"{arguments.folder.name}-work")
        figures |= file_speed.measure_files(arguments.folder, work, arguments.only)
        file_speed.report(figures)
        finish(figures, arguments.json)
        return
    figures["systems"] = {}
    figures["systems"]["vortex nf4, eager"] = measure_vortex(arguments.folder, arguments.repeats)
    if arguments.peer:
        gc.collect()
        torch.cuda.empty_cache()
        figures["systems"]["diffusers + bitsandbytes nf4, eager"] = measure_diffusers(
            arguments.folder, arguments.repeats
        )
    report(figures)
    finish(figures, arguments.json)


def finish(figures: dict[str, Any], path: Path | None) -> None:
    """Print all figures as one line, and write them to `path`."""
    if path:
        path.write_text(json.dumps(figures, indent=1))
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
