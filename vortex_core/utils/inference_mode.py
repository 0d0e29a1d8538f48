"""torch's inference mode, which an interrupt does not leave on."""

from contextlib import AbstractContextManager

import torch


def inference_mode(on: bool = True) -> AbstractContextManager[None]:
    """`torch.inference_mode`, also for the main thread, in which a KeyboardInterrupt may come. Use it in a `with` only.

    torch's own enters and leaves in Python. An interrupt in there skips the rest, and the thread stays in the mode.
    This is the guard inside it, in C, where none is raised. One that comes before `with` has taken the guard (until
    Python 3.13 that is before its `__enter__`, from 3.14 on also just after it) frees it, and that ends the mode, too.
    """
    return torch._C._InferenceMode(on)
