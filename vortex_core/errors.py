"""The errors and warnings of Vortex: one root each, data as attributes, and a message that says what to do.

People read the same message in Python, in a terminal and in a ComfyUI node. So it names an argument in backticks: the
node's widget has the same name, and the command shows its option instead. All classes here are public.
"""

from __future__ import annotations

from collections.abc import Mapping

GB = 1e9  # bytes; GB is 10^9 everywhere in Vortex
SHOWN = 200  # characters of a caller's value that an error repeats


def quoted(value: object) -> str:
    """`value` as errors show it: at most 200 characters of its `repr`, or its type where `repr` fails."""
    if isinstance(value, str | bytes | bytearray):
        value = value[: SHOWN + 1]  # the repr of 2 MB is slow
    try:
        text = repr(value)
    except Exception:  # a class of the caller's
        text = f"<{type(value).__name__}>"
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."


class VortexError(Exception):
    """Root of every error Vortex raises on purpose."""


class VortexInputError(VortexError, ValueError):
    """An argument is out of range or does not fit; nothing was done."""


class VortexCheckpointError(VortexError):
    """A file is missing, unsafe, damaged or of another model. `path` names it where it is one file."""

    def __init__(self, message: str, *, path: str | None = None) -> None:
        super().__init__(message)
        self.path = path


class VortexDeviceError(VortexError):
    """The device that was asked for does not exist or cannot run FLUX (no native bf16)."""


class DeviceLostError(VortexDeviceError):
    """The device failed while it worked for Vortex. What was on it is lost, and engines there cannot draw any more.

    Unload them and load the model again. Most CUDA errors stay until the process ends; then loading raises this, too.
    """


class NotFiniteError(VortexError):
    """A result is NaN or infinite: weights are damaged, or values left their type's range. No picture is returned."""


class VortexInitializationError(VortexError):
    """Loading ran out of memory. Everything half-loaded was released before this was raised.

    `needed`, `free`, `total` and `allocated` are bytes on the device (`None` where unknown); `remedy` says what to do.
    """

    def __init__(
        self,
        message: str,
        *,
        needed: int | None,
        free: int | None,
        total: int | None,
        allocated: int | None,
        remedy: str,
    ) -> None:
        figures = {"needed": needed, "free": free, "total": total, "allocated by this process": allocated}
        table = ", ".join(f"{name} {'unknown' if n is None else f'{n / GB:.2f} GB'}" for name, n in figures.items())
        super().__init__(f"{message} ({table}). {remedy}")
        self.needed = needed
        self.free = free
        self.total = total
        self.allocated = allocated
        self.remedy = remedy


class MemoryPressureError(VortexError):
    """A picture needs more VRAM than the budget, or than the card has left. The engine stays usable.

    `needed` and `available` are bytes; `breakdown` says what the need is made of, by component.
    """

    def __init__(
        self, message: str, *, needed: int, available: int, breakdown: Mapping[str, int], remedy: str = ""
    ) -> None:
        table = ", ".join(f"{name} {n / GB:.2f}" for name, n in breakdown.items() if n >= GB / 200)
        super().__init__(
            f"{message}: needed {needed / GB:.2f} GB ({table}), available {available / GB:.2f} GB. {remedy}".rstrip()
        )
        self.needed = needed
        self.available = available
        self.breakdown = dict(breakdown)
        self.remedy = remedy


class BusyError(VortexError):
    """Too many calls wait for the device, or an `on_step` does not return. Nothing was done. `waiting`: how many."""

    def __init__(self, message: str, *, waiting: int) -> None:
        super().__init__(message)
        self.waiting = waiting


class DeadlineError(VortexError, TimeoutError):
    """The deadline of a call has passed. The engine stays usable. `deadline` is in seconds."""

    def __init__(self, message: str, *, deadline: float | None) -> None:
        super().__init__(message)
        self.deadline = deadline


class VortexWarning(UserWarning):
    """Root of every warning Vortex gives."""


class PromptTruncatedWarning(VortexWarning):
    """Part of a prompt does not reach an encoder; the message quotes the text that was lost."""


class PromptSyntaxWarning(VortexWarning):
    """A prompt uses syntax of other programs, which Vortex reads as plain words; the message quotes it."""


class NoEffectWarning(VortexWarning):
    """An argument was accepted but cannot change the picture."""


class MemoryPressureWarning(VortexWarning):
    """VRAM is nearly full, or more of it was used than planned; the message says by what."""
