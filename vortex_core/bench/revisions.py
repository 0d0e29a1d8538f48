"""Times two revisions in one run. Each has a worker, and they take turns: a change of the machine affects both."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from ..errors import VortexError, VortexInputError
from .workload import Workload

ROOT = Path(__file__).parents[2]


class Worker:
    """A process that draws with the `vortex_core` found in `root`. Raises `VortexError` when it dies."""

    def __init__(self, root: Path, load: dict[str, Any]) -> None:
        self._root = root
        # -P: the worker's own folder must not shadow the standard library
        self._process = subprocess.Popen(
            [sys.executable, "-P", Path(__file__).with_name("revision_worker.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(root)},
            start_new_session=True,  # Ctrl-C is for this process, which then ends the worker
        )
        self.model = self._ask(load)

    def draw(self, **options: Any) -> float:
        """Seconds of one picture; `options` are those of `Engine.generate`."""
        return float(self._ask(options)["seconds"])

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            print(json.dumps(request), file=self._process.stdin, flush=True)
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            self.close()
            raise VortexError(f"The worker that draws with {self._root} ended; what it wrote is above.")
        return dict(json.loads(answer))


@contextmanager
def checkout(revision: str) -> Iterator[Path]:
    """A temporary work tree of a git revision. Raises `VortexInputError` outside a checkout or for another name."""
    try:
        commit = _git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}")
    except (subprocess.CalledProcessError, FileNotFoundError) as error:
        raise VortexInputError(f"--against needs a git checkout of Vortex that knows {revision!r}.") from error
    with tempfile.TemporaryDirectory() as scratch:
        tree = Path(scratch) / "revision"
        _git("worktree", "add", "--detach", str(tree), commit)
        try:
            yield tree
        finally:
            _git("worktree", "remove", "--force", str(tree))


@contextmanager
def workers(revision: str, load: dict[str, Any]) -> Iterator[tuple[Worker, Worker]]:
    """A worker that draws with `revision`, and one that draws with the code that runs now."""
    with (
        checkout(revision) as tree,
        closing(Worker(tree, load)) as before,
        closing(Worker(ROOT, load)) as after,
    ):
        yield before, after


def alternate(
    before: Callable[..., float],
    after: Callable[..., float],
    workload: Workload,
    on_pair: Callable[[int, int], None] | None = None,
) -> Iterator[tuple[float, float]]:
    """Pairs of seconds, before and after, of the same prompt and seed. Who draws first changes with each pair."""
    total = workload.warmup + workload.iterations
    for i in range(total):
        prompt = workload.prompts[i % len(workload.prompts)]
        options = {"width": workload.width, "height": workload.height, "steps": workload.steps}
        request = {"prompt": prompt, "seed": i, **options}
        if i % 2:
            later = after(**request)
            pair = before(**request), later
        else:
            pair = before(**request), after(**request)
        if i >= workload.warmup:
            yield pair
        if on_pair is not None:
            on_pair(i + 1, total)


def _git(*arguments: str) -> str:
    return subprocess.run(["git", "-C", ROOT, *arguments], check=True, capture_output=True, text=True).stdout.strip()
