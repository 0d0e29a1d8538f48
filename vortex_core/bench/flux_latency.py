"""`python -m vortex_core.bench.flux_latency` is `vortex bench latency`."""

import typer

from ..cli.bench import latency

if __name__ == "__main__":
    typer.run(latency)
