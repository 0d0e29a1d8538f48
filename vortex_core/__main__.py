"""`vortex` and `python -m vortex_core`: what surrounds the command, up before its own modules are there."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import TextIO

from .cli import interrupt

EXIT_ERROR = 1


def main() -> None:
    """Run the command that `sys.argv` names, and exit."""
    interrupt.install()
    code = _run()
    interrupt.ignore()
    sys.exit(code)


def _run() -> int:
    sys.stdout, sys.stderr = _whole(sys.stdout), _whole(sys.stderr)
    try:
        from .cli.main import run

        code = run()
        sys.stdout.flush()
        return code
    except OSError as error:
        if not isinstance(error, BrokenPipeError):  # whoever reads a pipe may have seen enough
            print(f"error: {error}", file=sys.stderr)
        _forget(sys.stdout)
        return EXIT_ERROR


def _whole(stream: TextIO | None) -> TextIO:
    """A stream that takes every character, whatever its encoding; closed ones swallow what they get."""
    if stream is None:
        return open(os.devnull, "w")
    if hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="backslashreplace")
    return stream


def _forget(stream: TextIO) -> None:
    """Drop what could not be written, which the interpreter would try again when it ends."""
    with suppress(OSError, ValueError), open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), stream.fileno())


if __name__ == "__main__":
    main()
