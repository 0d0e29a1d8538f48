"""`vortex bench`: latency, VRAM and leaks, measured so that a figure can be trusted."""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..bench.verdict import milliseconds
from ..bench.workload import COLD, ITERATIONS
from ..errors import GB
from ..flux1.spec import DEFAULT_STEPS
from ..utils.packages import need
from ..utils.whole_files import write
from .baseline import app as baseline
from .bench_options import (
    EXIT_CODES,
    Iterations,
    Log,
    Prometheus,
    Results,
    Source,
    Steps,
    Work,
    check_files,
    check_size,
    grouped,
)
from .bench_output import picture_count, write_folder
from .bench_report import report
from .compare import compare
from .terminal import Size, check_number, grid, path_option, plain_errors, progress_bars

if TYPE_CHECKING:
    from ..bench.latency_report import LatencyReport
    from ..bench.vram_report import VramReport
    from .console import Grid

app = typer.Typer(help="Measure latency and memory, and judge them.", no_args_is_help=True)
app.add_typer(baseline, name="baseline")
app.command()(compare)
app.command(
    epilog="Examples:\n\n  vortex bench report --model ~/models/FLUX.1-schnell\n\n"
    "  vortex bench report --model ~/models/FLUX.1-schnell --mode exact -o exact"
)(report)

Target = Annotated[float | None, typer.Option(help="The most seconds that this percentile may take.", min=0)]


@app.command(epilog=EXIT_CODES)
@grouped
def latency(
    source: Source,
    work: Work,
    results: Results,
    cold: Annotated[int, typer.Option(min=0, help="Pictures of new prompts, after the others.")] = COLD,
    target_p50: Target = None,
    target_p90: Target = None,
    target_p95: Target = None,
    target_p99: Target = None,
    trace: Annotated[Path | None, path_option(help="File for a Chrome trace (ui.perfetto.dev reads it).")] = None,
    prometheus: Prometheus = None,
    log: Log = None,
) -> None:
    """Time pictures by phase: percentiles with intervals, outliers with their cause, targets. Ends with one JSON line.

    A percentile is supported if, with 95 % confidence, some picture took longer. P90 needs 29 pictures, P95 59, P99
    299. A target on one that is not supported is undecided, unless a lower percentile breaks it.
    """
    with plain_errors():
        source.check()
        work.check()
        results.check()
        check_files(trace, prometheus, log)
        wanted = {50.0: target_p50, 90.0: target_p90, 95.0: target_p95, 99.0: target_p99}
        for q, target in wanted.items():
            check_number(f"--target-p{q:g}", target, least=0)
        from ..bench import exports, latency_report, plots
        from ..bench.trace import chrome_trace

        with progress_bars() as progress:
            engine = source.load(progress)
            report = latency_report.run(
                engine,
                work.workload(engine.native_size, cold),
                targets={q: target for q, target in wanted.items() if target is not None},
                on_picture=picture_count(progress, "timing"),
                on_sample=None if log is None else lambda s: exports.append_json(log, "picture", asdict(s)),
            )
        found = report.figures()
        if log:
            exports.append_json(log, "report", found)
        if trace:
            write(trace, json.dumps(chrome_trace(report.samples)).encode(), replace=True)
        if prometheus:
            what = "Seconds that a picture or one of its phases takes."
            exports.write_prometheus(exports.latency_metrics(found), "summary", what, prometheus)
        if results.output:
            samples = [asdict(sample) for sample in report.samples]
            write_folder(results.output, found | {"samples": samples}, lambda: plots.latency_plots(report))
            exports.write_csv(report.samples, results.output / "samples.csv")
        results.finish(found, latency_tables(report), report.verdicts, report.interrupted)


def latency_tables(report: LatencyReport) -> list[Grid]:
    """Percentiles, phases and outliers."""
    from rich.text import Text

    whole = grid("prompt", "", "took", "95 % interval", "", title=report.title)
    parts = grid("prompt", "phase", "P50", "P95", "slowest")
    for kind, series in report.series.items():
        found = series.whole
        whole.add_row(f"{kind}, {found.count}", "mean", milliseconds(found.mean), f"± {milliseconds(found.deviation)}")
        for p in found.percentiles:
            remark = "" if p.supported else Text("unsupported", "yellow")
            interval = f"{milliseconds(p.low)} to {milliseconds(p.high)}"
            whole.add_row("", f"P{p.q:g}", milliseconds(p.seconds), interval, remark)
        for name, phase in series.phases.items():
            p50, p95 = (milliseconds(phase.percentile(q).seconds) for q in (50, 95))
            parts.add_row(kind, name, p50, p95, milliseconds(phase.maximum))
    tables = [whole, parts]
    if report.outliers:
        far = grid("beyond 3 sigma", "took", "phase", "excess", "clock", "temperature", "throttle", "load")
        for o in report.outliers:
            took, excess = milliseconds(o.seconds), milliseconds(o.excess)
            far.add_row(f"picture {o.index}", took, o.phase, excess, *o.reading.words)
        tables.append(far)
    whole.caption = f"measuring adds {report.overhead * 1e6:.0f} us to a picture, {report.overhead_share:.3%}"
    if report.disagreements:
        whole.caption += f"; the device's clock and the host's differ for {report.disagreements} pictures"
    return tables


@app.command(epilog=EXIT_CODES)
@grouped
def vram(
    source: Source,
    results: Results,
    size: Size = None,
    steps: Steps = DEFAULT_STEPS,
    prometheus: Prometheus = None,
) -> None:
    """Profile VRAM: baseline, loaded, peak, after clean-up, each with a verdict. Ends with one JSON line.

    Without a GPU the verdicts are undecided, and the host's memory is shown.
    """
    with plain_errors():
        source.check()
        chosen = check_size(size, steps)
        results.check()
        check_files(prometheus)
        from ..bench import exports, plots
        from ..bench.vram_report import run
        from ..device.select import resolve_device

        with progress_bars() as progress:
            report = run(
                partial(source.load, progress),
                resolve_device(source.device),
                size=chosen,
                on_picture=picture_count(progress, "drawing"),
                steps=steps,
            )
        found = report.figures()
        if prometheus:
            what = "Bytes at a stage of an engine's life."
            exports.write_prometheus(exports.vram_metrics(found), "gauge", what, prometheus)
        if results.output:
            timeline = [asdict(moment) for moment in report.timeline]
            write_folder(results.output, found | {"timeline": timeline}, lambda: {"vram": plots.vram_plot(report)})
        results.finish(found, vram_tables(report), report.verdicts)


def vram_tables(report: VramReport) -> list[Grid]:
    """The counters of each stage, and who holds what once the engine is loaded."""
    stages = grid("", *report.stages[0].counters, title=report.title)
    for stage in report.stages:
        values = stage.counters.values()
        stages.add_row(stage.name, *("unknown" if value is None else f"{value / GB:.2f} GB" for value in values))
    ledger = grid("loaded", "")
    for component, taken in report.ledger.items():
        ledger.add_row(component, f"{taken / GB:.2f} GB")
    return [stages, ledger]


@app.command(epilog=EXIT_CODES)
@grouped
def leak(
    source: Source,
    results: Results,
    size: Annotated[
        list[str] | None,
        typer.Option(help="WIDTHxHEIGHT; may be repeated. [default: the model's own, half of it, and a wide one]"),
    ] = None,
    steps: Steps = DEFAULT_STEPS,
    iterations: Iterations = ITERATIONS,
    prometheus: Prometheus = None,
) -> None:
    """Draw over mixed sizes and judge whether memory grows. Ends with one JSON line.

    Fails where a counter's slope is above 0.1 MB a picture with 99.9 % confidence, or 10 pictures in a row
    add more than 50 MB.
    """
    with plain_errors():
        source.check()
        need("scipy.stats", "The leak check")
        sizes = [pair for text in size or () if (pair := check_size(text, steps))]
        results.check()
        check_files(prometheus)
        from ..bench import exports, plots
        from ..bench.leak import MB, mixed, run

        with progress_bars() as progress:
            engine = source.load(progress)
            counter = picture_count(progress, "drawing")
            report = run(engine, sizes or mixed(engine.native_size), iterations, on_picture=counter, steps=steps)
        found = report.figures()
        if prometheus:
            metrics = (("vortex_memory_slope_bytes", {"counter": t.counter}, t.slope) for t in report.trends)
            exports.write_prometheus(metrics, "gauge", "Bytes by which a counter grows with each picture.", prometheus)
        if results.output:
            write_folder(results.output, found, lambda: {"leak": plots.leak_plot(report)})
        table = grid("counter", "MB a picture", "99.9 % interval", "10 pictures add at most", title=report.title)
        for t in report.trends:
            interval = f"{t.low / MB:+.3f} to {t.high / MB:+.3f}"
            table.add_row(t.counter, f"{t.slope / MB:+.3f}", interval, f"{t.growth / MB:.1f} MB")
        results.finish(found, [table], report.verdicts, report.interrupted)
