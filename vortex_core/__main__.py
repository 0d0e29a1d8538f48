"""`python -m vortex_core` is the command `vortex`."""

from .cli import app

app(prog_name="vortex")
