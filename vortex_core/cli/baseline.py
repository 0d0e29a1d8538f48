"""`vortex bench baseline`: keep a run, and judge later ones against it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from ..bench.rank_tests import THRESHOLD, Comparison, compare, compare_pairs
from ..bench.verdict import milliseconds
from ..utils.packages import need
from . import interrupt
from .bench_options import EXIT_CODES, AsJson, Results, Source, Work, check_output, grouped
from .bench_output import picture_count, write_folder
from .terminal import check_number, check_text, grid, plain_errors, progress_bars, source_option

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..bench.baseline import Run
    from ..bench.latency_report import LatencyReport

SCHEMA = "vortex.bench.comparison/1"
app = typer.Typer(help="Keep a run, and judge later ones against it.", no_args_is_help=True)
Folder = Annotated[
    Path | None,
    source_option(help="Where runs are kept. [default: $VORTEX_BASELINES or ~/.local/share/vortex/baselines]"),
]


@app.command(epilog=EXIT_CODES)
@grouped
def save(source: Source, work: Work, folder: Folder = None, as_json: AsJson = False) -> None:
    """Measure, and keep the run: later ones on this machine are compared with it. Ends with one JSON line."""
    with plain_errors():
        source.check()
        work.check()
        from ..bench import latency_report
        from ..bench.baseline import History, default_folder

        check_output(folder or default_folder(), "--folder")
        with progress_bars() as progress:
            engine = source.load(progress)
            workload = work.workload(engine.native_size)
            report = latency_report.run(engine, workload, on_picture=picture_count(progress, "timing"))
        history = History(folder, report.machine, report.model, workload)
        whole = report.series["cached"].whole
        table = grid("pictures", "P50", "P95", "kept in", title=report.title)
        p50, p95 = (milliseconds(whole.percentile(q).seconds) for q in (50, 95))
        if not report.interrupted:
            history.add(report, baseline=True)
        table.add_row(str(whole.count), p50, p95, "nowhere: interrupted" if report.interrupted else str(history.path))
        found = report.figures() | {"file": str(history.path)}
        Results(as_json=as_json).finish(found, [table], [], report.interrupted)


@app.command("compare", epilog=EXIT_CODES)
@grouped
def compare_command(
    source: Source,
    work: Work,
    results: Results,
    folder: Folder = None,
    against: Annotated[
        str | None,
        typer.Option(help="A git revision to compare with, in turns, not with the baseline. Both engines are loaded."),
    ] = None,
    threshold: Annotated[
        float, typer.Option(min=0, help="The smallest slow-down to fail for, 0.02 for 2 %.")
    ] = THRESHOLD,
) -> None:
    """Measure, and fail for a slow-down that is neither chance (p < 0.005) nor small. Ends with one JSON line.

    The run is compared with the last saved baseline and joins the history. With --against REV two revisions take turns
    in one run and are compared picture by picture, so a change of the machine affects both.
    """
    with plain_errors():
        source.check()
        need("scipy.stats", "A comparison")
        work.check()
        results.check()
        check_number("--threshold", threshold, least=0)
        from ..bench import latency_report, plots
        from ..bench.baseline import History, default_folder
        from ..bench.machine import machine
        from ..bench.samples import describe

        if against is not None:
            check_text("--against", against)
            interrupt.raises()
            _compare_revision(against, source, work, threshold, results)
        check_output(folder or default_folder(), "--folder")
        with progress_bars() as progress:
            engine = source.load(progress)
            workload = work.workload(engine.native_size)
            history = History(folder, machine(engine.device), describe(engine), workload)
            baseline = history.baseline()
            report = latency_report.run(engine, workload, on_picture=picture_count(progress, "timing"))
        if not report.interrupted:
            history.add(report, baseline=False)
        comparison = compare(baseline.seconds, [sample.seconds for sample in report.samples])
        about = {"title": report.title, "baseline": baseline.when, "phases": _phase_changes(baseline, report)}
        shown = partial(plots.trend_plot, report.title)
        _finish(comparison, about, threshold, lambda: {"trend": shown(history.runs())}, results, report.interrupted)


def _compare_revision(revision: str, source: Source, work: Work, threshold: float, results: Results) -> None:
    from ..bench import plots
    from ..bench.revisions import alternate, workers

    load = {k: str(v) if isinstance(v, Path) else v for k, v in source.options.items() if v is not None}
    pairs: list[tuple[float, float]] = []
    interrupted = False
    with progress_bars() as progress, workers(revision, load) as (before, after):
        workload = work.workload(after.model["native_size"])
        try:
            for pair in alternate(before.draw, after.draw, workload, picture_count(progress, "timing")):
                pairs.append(pair)
        except KeyboardInterrupt:
            if not pairs:
                raise
            interrupted = True
    old, new = zip(*pairs, strict=True)
    title = f"{after.model['name']}, {workload.words}, against {revision}"
    shown = partial(plots.pairs_plot, title, revision, old, new)
    about = {"title": title, "against": revision, "pairs": pairs}
    _finish(compare_pairs(old, new), about, threshold, lambda: {"pairs": shown()}, results, interrupted)


def _phase_changes(baseline: Run, report: LatencyReport) -> dict[str, float]:
    """The change of each phase's median, which shows where the time went. It is not judged."""
    now = report.series["cached"].phases
    return {
        name: now[name].percentile(50).seconds / seconds - 1
        for name, seconds in baseline.phases.items()
        if name in now and seconds
    }


def _finish(
    comparison: Comparison,
    about: Mapping[str, Any],
    threshold: float,
    shown: Callable[[], Mapping[str, Figure]],
    results: Results,
    interrupted: bool,
) -> NoReturn:
    verdict = comparison.verdict(threshold)
    found = {"schema": SCHEMA, **about, **asdict(comparison), "threshold": threshold, "verdicts": [asdict(verdict)]}
    if results.output:
        write_folder(results.output, found, shown)
    table = grid("before", "after", "change", "95 % interval", "p", "slower", title=about["title"])
    interval = f"{comparison.low:+.1%} to {comparison.high:+.1%}"
    table.add_row(
        str(comparison.before), str(comparison.after), f"{comparison.change:+.1%}", interval,
        f"{comparison.p_value:.2g}", f"{comparison.slower:.0%}",
    )  # fmt: skip
    results.finish(found, [table], [verdict], interrupted)
