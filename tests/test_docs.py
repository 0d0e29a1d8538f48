"""The pages, run: Python snippets as they stand, commands parsed or run, links followed, quoted messages found."""

from __future__ import annotations

import ast
import importlib.util
import itertools
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer
from typer.testing import CliRunner

from vortex_core.cli.main import app

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "web/docs").glob("*.md")], key=lambda path: path.parts
)
# What a page may call besides our own: programs that are there on a machine that develops, and need no check of ours.
OTHERS = {"apt", "cd", "comfy", "comfy-test", "export", "git", "hf", "issues", "nvidia-smi", "pip", "pre-commit"}
HERE = ("doctor", "plan", "cache list")  # commands that run here; `generate` with the miniature does, too
FENCE = re.compile(r"^ {0,3}```(\w*)\n(.*?)^ {0,3}```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#{1,6} +(.+?)\s*$", re.MULTILINE)


class Block(NamedTuple):
    """Fenced text of a page."""

    page: Path
    line: int
    language: str
    text: str


def blocks(*languages: str) -> Iterator[Block]:
    for page in PAGES:
        text = page.read_text()
        for found in FENCE.finditer(text):
            if found[1] in languages:
                yield Block(page, text[: found.start()].count("\n") + 2, found[1], found[2])


def named(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_a_block_says_its_language() -> None:
    known = {"bash", "python", "", "json", "yaml", "text", "toml"}
    assert {found[1] for page in PAGES for found in FENCE.finditer(page.read_text())} <= known


# Python


def python_pages() -> list[Any]:
    """The snippets of each page; they go on where the one before ended."""
    grouped = itertools.groupby(blocks("python"), key=lambda block: block.page)
    return [pytest.param(list(found), id=named(page)) for page, found in grouped]


@pytest.mark.parametrize("snippets", python_pages())
def test_python_runs(snippets: list[Block], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)  # the miniature, on the CPU
    names: dict[str, Any] = {"__name__": "__page__"}
    for block in snippets:
        code = "\n" * (block.line - 1) + block.text  # so that a traceback names the page's own line
        exec(compile(code, named(block.page), "exec"), names)


# commands


def commands() -> list[Any]:
    found = []
    for block in blocks("bash", "sh"):
        text = block.text.replace("\\\n", " ")
        for line in text.splitlines():
            words = shlex.split(line, comments=True)
            if words:
                where = f"{named(block.page)}: {shlex.join(words)}"
                found.append(pytest.param(words, id=where[:120]))
    return found


@pytest.mark.parametrize("words", commands())
def test_commands_parse(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    while re.fullmatch(r"[A-Z][A-Z_]*=.*", words[0]):  # of the environment
        words = words[1:]
    match words[0].removeprefix(".venv/bin/"), *words[1:]:
        case "vortex", *arguments:
            check_vortex(arguments)
            if runs_here(arguments):
                monkeypatch.chdir(tmp_path)
                monkeypatch.setenv("VORTEX_CACHE", str(tmp_path / "cache"))
                monkeypatch.setattr("torch.cuda.is_available", lambda: False)
                result = CliRunner().invoke(app, arguments)
                assert result.exit_code == 0, result.output
        case "make", *targets:
            known = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
            assert set(targets) <= set(known)
        case "python", "-m", "pytest", *arguments:
            assert all((ROOT / path).exists() for path in arguments if path.startswith("tests"))
        case "python", "-m", module, *_:
            assert importlib.util.find_spec(module) is not None
        case "python", script, *arguments:
            check_script(ROOT / script, arguments)
        case ((".ci/run" | "bash"), *_):
            pass
        case program, *_:
            assert program in OTHERS, f"{program} is none of the programs that pages may call"


def check_vortex(arguments: list[str]) -> None:
    """Raise where the command does not take these arguments. Nothing of it runs."""
    command, context, rest = typer.main.get_command(app), None, arguments
    name = "vortex"
    while True:
        try:
            context = command.make_context(name, list(rest), parent=context)
        except Exception as error:
            if type(error).__name__ == "Exit":  # --help and --version end here
                return
            told = error.format_message() if hasattr(error, "format_message") else repr(error)
            raise AssertionError(f"{shlex.join(arguments)}: {told}") from error
        if not hasattr(command, "resolve_command"):
            return
        name, command, rest = command.resolve_command(context, [*context._protected_args, *context.args])


def runs_here(arguments: list[str]) -> bool:
    plain = [word for word in arguments if word != "--verbose"]
    line = " ".join(plain)
    return line.startswith(HERE) or (plain[0] == "generate" and "--model" not in plain and "--help" not in plain)


def check_script(script: Path, arguments: list[str]) -> None:
    """Raise where a script is missing, or takes none of these options. What it defines is read, not run."""
    assert script.is_file(), f"{script} is missing"
    options, choices = declared(script)
    for word in arguments:
        if word.startswith("--") and word != "--help":
            assert word.partition("=")[0] in options, f"{script.name} has no {word}"
    if choices:
        first = next((word for word in arguments if not word.startswith("-")), None)
        assert first is None or first in choices, f"{script.name} has no {first}"


@cache
def declared(script: Path) -> tuple[frozenset[str], frozenset[str]]:
    """Options, and names of subcommands, that a script declares, itself or in a module beside it that it imports."""
    options, choices = set[str](), set[str]()
    tree = ast.parse(script.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            texts = [arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
            if node.func.attr == "add_argument":
                options.update(text for text in texts if text.startswith("-"))
            elif node.func.attr == "add_parser":
                choices.update(texts)
        if isinstance(node, ast.FunctionDef):
            options.update(typer_options(node))
        if isinstance(node, ast.ImportFrom) and node.module:
            beside = script.with_name(f"{node.module}.py")
            if beside.is_file() and beside != script:
                options |= declared(beside)[0]
    return frozenset(options), frozenset(choices)


def typer_options(function: ast.FunctionDef) -> Iterator[str]:
    for argument in (*function.args.args, *function.args.kwonlyargs):
        for call in ast.walk(argument.annotation) if argument.annotation else ():
            if isinstance(call, ast.Call) and ast.unparse(call.func) == "typer.Option":
                given = [part for arg in call.args if isinstance(arg, ast.Constant) for part in arg.value.split("/")]
                yield from given or [f"--{argument.arg.replace('_', '-')}"]


# links


@pytest.mark.parametrize("page", [pytest.param(page, id=named(page)) for page in PAGES])
def test_links_lead_somewhere(page: Path) -> None:
    text = FENCE.sub("", page.read_text())
    for link in LINK.findall(text):
        if "://" in link or link.startswith("mailto:"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{link}: there is no {path}"
        assert ROOT in target.parents, f"{link} leads out of the repository"
        if anchor:
            assert anchor in anchors(target), f"{link}: {path or page.name} has no such heading"


@cache
def anchors(page: Path) -> frozenset[str]:
    """As GitHub makes them: lower case, without punctuation, hyphens for blanks."""
    found = (re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading) for heading in HEADING.findall(page.read_text()))
    return frozenset(re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in found)


def test_the_index_of_decisions_is_whole() -> None:
    index = (ROOT / "docs/decisions/README.md").read_text()
    for record in (ROOT / "docs/decisions").glob("20*.md"):
        title, said = record.read_text().split("\n\n", 2)[:2]
        date = record.name[:10]
        assert f"| {date} | [{title.removeprefix('# ')}]({record.name}) | " in index
        assert said.startswith(f"Date: {date}. Status: "), f"{record.name} does not say its date and status"


# what pages say of the tree


def test_the_scripts_that_pages_name_are_there() -> None:
    for page in PAGES:
        for path in re.findall(r"`(?:python )?((?:tools|tests|nodes|workflows)/[\w./]+\.\w+)", page.read_text()):
            if page.name != "CHANGELOG.md":
                assert (ROOT / path).exists(), f"{named(page)} names {path}, which is not there"


HOUSE = ("checkpoint", "flux1", "runtime", "storage", "quant", "memory", "kernels", "cli", "bench", "device", "utils")


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "docs/architecture.md"])
def test_the_modules_that_pages_name_are_there(page: str) -> None:
    text = (ROOT / page).read_text()
    for path in re.findall(rf"`(?:vortex_core/)?((?:{'|'.join(HOUSE)})(?:/\w+\.py)?/?)`", text):
        assert (ROOT / "vortex_core" / path).exists(), f"{page} names {path}, which is not there"
    if page == "README.md":
        packages = {path.parent.name for path in (ROOT / "vortex_core").glob("*/__init__.py")}
        assert packages <= set(re.findall(r"`vortex_core/(\w+)`", text)), "the README has a line for each package"


def test_quoted_messages_are_ours() -> None:
    said = messages()
    for line in (ROOT / "docs/troubleshooting.md").read_text().splitlines():
        if line.startswith("> "):
            for part in line.removeprefix("> ").replace('"', "").split("..."):
                assert part.strip(" .,") in said, f"nothing says {part!r}"


def messages() -> str:
    """All texts of the code, each in one piece; what is filled in is left out."""
    found = []
    for path in [*(ROOT / "vortex_core").rglob("*.py"), *(ROOT / "nodes").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(str(part.value) if isinstance(part, ast.Constant) else "" for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found).replace('"', "")
