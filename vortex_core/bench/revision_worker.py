"""One side of `vortex bench baseline compare --against`: draws when told to and says how long it took.

Started by path, with a revision's root as PYTHONPATH, so that one worker times any revision: all it uses of
`vortex_core` is `load_flux_schnell` and `generate`. One JSON object a line in, one a line out.
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
