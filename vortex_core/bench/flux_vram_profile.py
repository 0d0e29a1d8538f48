"""`python -m vortex_core.bench.flux_vram_profile` is `vortex bench vram`."""

import typer

from ..cli.bench import vram

if __name__ == "__main__":
    typer.run(vram)
