"""What the source of `vortex_core` may not say.

Nothing rests on which allocator torch has, or on how it works; and sentences speak of things, not of Python.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from inspect import signature
from pathlib import Path

import pytest

import vortex_core
from vortex_core import Engine
from vortex_core.cli.terminal import OPTIONS

CORE = Path(vortex_core.__file__).parent
BENCH = (CORE / "bench", CORE / "cli" / "compare.py")  # measure under each allocator, and say which it was
SOURCES = [path for path in sorted(CORE.rglob("*.py")) if not {path, *path.parents} & set(BENCH)]

# torch's private pools and its allocator's state, the allocators' names and how one is chosen, and tracing on `meta`
FORBIDDEN = (
    *("MemPool", "use_mem_pool", "MemPoolContext", "_use_cuda_memory_pool", "_cuda_beginAllocateToPool"),
    *("get_allocator_backend", "_cuda_getAllocatorBackend", "CUDAPluggableAllocator", "change_current_allocator"),
    *("memory_snapshot", "_cuda_memorySnapshot", "cudaMallocAsync", "ALLOC_CONF", "expandable_segments"),
    *("TorchDispatchMode", "_python_dispatch", "FakeTensorMode"),
)


def words(source: str) -> Iterator[tuple[int, str]]:
    """Names, attributes, imports and strings of a module by line; neither comments nor docstrings."""
    tree = ast.parse(source)
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, documented) and ast.get_docstring(node) is not None and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name) | ast.Attribute(attr=name) | ast.keyword(arg=str(name)) | ast.arg(arg=name):
                yield node.lineno, name
            case ast.alias(name=name, asname=other):
                yield node.lineno, f"{name} {other or ''}"
            case ast.ImportFrom(module=str(name)):
                yield node.lineno, name
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                yield node.lineno, name
            case ast.Constant(value=str(text)) if id(node) not in docstrings:
                yield node.lineno, text


def offences(source: str) -> list[tuple[int, str]]:
    """Lines, and what they should not say."""
    return [(line, word) for line, text in words(source) for word in FORBIDDEN if word.lower() in text.lower()]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(CORE)))
def test_nothing_depends_on_torchs_allocator(path: Path) -> None:
    assert offences(path.read_text()) == []


def test_every_part_is_read() -> None:
    names = {str(path.relative_to(CORE)) for path in SOURCES}
    assert {
        "memory/arena.py",
        "runtime/engine.py",
        "runtime/graphs.py",
        "runtime/memory_manager.py",
        "device/vram.py",
        "kernels/reference.py",
    } <= names
    assert not any(name.startswith("bench") for name in names)


def test_comments_and_docstrings_may_speak_of_it() -> None:
    allowed = '''
"""With cudaMallocAsync."""
class A:
    """No MemPool."""
    def f(self):
        """No TorchDispatchMode."""
        return 1  # get_allocator_backend
    async def g(self):
        "use_mem_pool"
'''
    assert offences(allowed) == []


@pytest.mark.parametrize(
    "line",
    [
        "pool = torch.cuda.MemPool()",
        "from torch.cuda import MemPool",
        "from torch.cuda import memory as m, use_mem_pool as u",
        "import torch.utils._python_dispatch",
        "from torch.utils._python_dispatch import x",
        "with torch.cuda.use_mem_pool(p): pass",
        "getattr(torch.cuda, 'get_allocator_backend')()",
        "if name == 'cudaMallocAsync': pass",
        "print(f'{a} cudaMallocAsync {b}')",
        "os.environ['PYTORCH_CUDA_ALLOC_CONF'] = 'x'",
        "class Trace(TorchDispatchMode): pass",
        "def f(mempool): pass",
        "f(mempool=1)",
        "def f():\n    x = 1\n    'MemPool'",  # no docstring: it does not come first
    ],
)
def test_code_may_not(line: str) -> None:
    assert offences(line)


ARGUMENTS = "|".join(
    name
    for call in (Engine.load, Engine.generate, Engine.encode)
    for name in signature(call).parameters
    if name != "self"
)
CALL = re.compile(rf"\b(?:{ARGUMENTS})=|\bEngine\.\w+\(")


def sentences() -> Iterator[tuple[str, str]]:
    """What is said to people, by file: texts of several words, those of formatted ones piece by piece."""
    for path in SOURCES:
        for line, text in words(path.read_text()):
            if len(re.findall(r"[A-Za-z]+", text)) > 2:
                yield f"{path.relative_to(CORE)}:{line}", text


def test_sentences_can_be_followed_in_a_node_and_in_a_terminal() -> None:
    """A ComfyUI node shows them as they are, so none asks for what only Python can type."""
    assert [(where, text) for where, text in sentences() if CALL.search(text)] == []


def test_arguments_in_sentences_are_options_of_the_command() -> None:
    named = {name for _, text in sentences() for name in re.findall(r"`([a-z_]+)`", text)}
    assert named & set(ARGUMENTS.split("|")) <= OPTIONS.keys()
    assert "mode" in named
