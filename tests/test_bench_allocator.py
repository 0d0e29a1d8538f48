"""A benchmark under the allocator that it names: it goes on, starts again, or says why not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from vortex_core import VortexInputError
from vortex_core.bench.allocator import again, ensure_allocator, environment
from vortex_core.cli.main import app

CONFIGURED = "PYTORCH_CUDA_ALLOC_CONF"
COMMAND = ["vortex", "bench"]


class Started:
    """A card with torch's own allocator, and what was started instead."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, code: int = 0) -> None:
        self.calls: list[tuple[Any, dict[str, str]]] = []

        def call(command: Any, env: dict[str, str]) -> int:
            self.calls.append((command, env))
            return code

        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: "native")
        monkeypatch.setattr(subprocess, "call", call)


def test_an_unknown_allocator_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    started = Started(monkeypatch)
    with pytest.raises(VortexInputError, match=r"'mimalloc'; choose from native, cudaMallocAsync\."):
        ensure_allocator("mimalloc", COMMAND)
    assert started.calls == []


def test_without_a_gpu_there_is_none_to_choose(monkeypatch: pytest.MonkeyPatch) -> None:
    started = Started(monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: pytest.fail("asked"))
    ensure_allocator(None, COMMAND)
    with pytest.raises(VortexInputError, match="on a GPU only"):
        ensure_allocator("native", COMMAND)
    assert started.calls == []


def test_under_the_right_one_it_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    started = Started(monkeypatch)
    ensure_allocator("native", COMMAND)
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: "cudaMallocAsync")
    ensure_allocator("cudaMallocAsync", COMMAND)
    ensure_allocator(None, COMMAND)
    assert started.calls == []


@pytest.mark.parametrize("code", [0, 3])
def test_under_the_other_the_command_starts_again_and_its_code_is_ours(
    monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    started = Started(monkeypatch, code)
    monkeypatch.setenv(CONFIGURED, "backend:native")
    monkeypatch.setenv("VORTEX_TEST", "kept")
    with pytest.raises(SystemExit) as end:
        ensure_allocator("cudaMallocAsync", COMMAND)
    assert end.value.code == code
    ((command, env),) = started.calls
    assert command == COMMAND
    assert (env[CONFIGURED], env["VORTEX_TEST"]) == ("backend:cudaMallocAsync", "kept")
    assert os.environ[CONFIGURED] == "backend:native"


def test_the_environment_is_the_process_own_but_for_the_allocator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(CONFIGURED, raising=False)
    assert environment(None) == dict(os.environ)
    assert environment("native") == {**os.environ, CONFIGURED: "backend:native"}


def test_the_command_that_runs_is_the_one_that_starts_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    arguments = ["bench", "compare", "--allocator", "cudaMallocAsync", "--model", "tiny"]
    started = Started(monkeypatch, 7)
    monkeypatch.setattr(sys, "argv", ["vortex", *arguments])
    assert again() == [sys.executable, "-m", "vortex_core", *arguments]
    assert CliRunner().invoke(app, arguments).exit_code == 7
    assert [command for command, _ in started.calls] == [again()]


def test_the_command_says_what_is_wrong_with_an_allocator() -> None:
    for name, words in (("other", "Unknown allocator 'other'"), ("native", "on a GPU only")):
        if name == "native" and torch.cuda.is_available():
            continue
        result = CliRunner().invoke(app, ["bench", "compare", "--allocator", name])
        assert result.exit_code == 2
        assert words in result.output
