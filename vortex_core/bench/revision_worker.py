"""One side of `vortex bench baseline compare --against`: it draws on request and answers how long it took.

It is started by path, with a revision's root as PYTHONPATH. So one worker times any revision: all it uses of
`vortex_core` is `load_flux_schnell` and `generate`. Requests and answers are JSON, one object a line.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time


def main() -> None:
    """Load what the first line asks for, then draw one picture a line until the input ends."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not get between the replies
    load = importlib.import_module("vortex_core").load_flux_schnell
    torch = importlib.import_module("torch")
    requests = map(json.loads, sys.stdin)
    engine = load(**next(requests))

    def reply(**fields: object) -> None:
        print(json.dumps(fields), file=replies, flush=True)

    def synchronize() -> None:
        if engine.device.type == "cuda":
            torch.cuda.synchronize(engine.device)

    reply(name=engine.name, native_size=engine.native_size)
    for request in requests:
        synchronize()
        started = time.perf_counter()
        engine.generate(**request).cpu()
        synchronize()
        reply(seconds=time.perf_counter() - started)


if __name__ == "__main__":
    main()
