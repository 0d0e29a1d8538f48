"""Runs `vortex` and `python -m vortex_core`. Handles interrupts and broken pipes while the command still imports."""

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
        if not isinstance(error, BrokenPipeError):  # the reader of a pipe may close it early
            print(f"error: {error}", file=sys.stderr)
        _forget(sys.stdout)
        return EXIT_ERROR


def _whole(stream: TextIO | None) -> TextIO:
    """`stream`, able to write every character in any encoding; for a closed one, a stream that discards."""
    if stream is None:
        return open(os.devnull, "w")
    if hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="backslashreplace")
    return stream


def _forget(stream: TextIO) -> None:
    """Discard what could not be written: the interpreter would try to write it again when it ends."""
    with suppress(OSError, ValueError), open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), stream.fileno())


if __name__ == "__main__":
    main()
