"""What an install exposes, what it costs, and whether ComfyUI can load the folder."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import vortex_core
from vortex_core.utils import packages

ROOT = Path(__file__).parent.parent
CORE = ROOT / "vortex_core"

# What ComfyUI installs for itself, and what would change the host's packages on its way in.
HOST = {
    *("torch", "torchvision", "torchaudio", "torchsde", "numpy", "einops", "transformers", "tokenizers"),
    *("sentencepiece", "safetensors", "aiohttp", "yarl", "pyyaml", "pillow", "scipy", "tqdm", "psutil"),
    *("alembic", "sqlalchemy", "av", "kornia", "spandrel", "soundfile", "pydantic", "pydantic-settings"),
    *("huggingface-hub", "diffusers", "accelerate", "triton", "xformers"),
}


def python(code: str, *args: str, cwd: Path = ROOT) -> str:
    """Run code in a fresh interpreter and return what it prints."""
    return subprocess.run(
        [sys.executable, "-c", code, *args], cwd=cwd, check=True, stdout=subprocess.PIPE, text=True
    ).stdout


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    # Built from a copy: setuptools leaves build/ behind, and a stale one would end up in the next wheel.
    source = tmp_path_factory.mktemp("wheel") / "source"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "build", "*.egg-info", "__pycache__"))
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-index", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--wheel-dir", source.parent, source], check=True)
    (built,) = source.parent.glob("*.whl")
    return zipfile.ZipFile(built)


def test_wheel_holds_vortex_core_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    metadata = f"vortex_flux-{vortex_core.__version__}.dist-info"
    names = set(wheel.namelist())
    assert {name.partition("/")[0] for name in names} == {"vortex_core", metadata}
    assert f"{metadata}/licenses/LICENSE" in names

    sources = [path for path in CORE.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    assert {name for name in names if name.startswith("vortex_core/")} == {
        path.relative_to(ROOT).as_posix() for path in sources
    }


def test_wheel_brings_the_one_command(wheel: zipfile.ZipFile) -> None:
    (entry_points,) = (name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    assert wheel.read(entry_points).decode().strip() == "[console_scripts]\nvortex = vortex_core.__main__:main"


def test_install_exposes_no_other_folder(tmp_path: Path) -> None:
    code = """
import importlib.util, sys
for name in sys.argv[1:]:
    spec = importlib.util.find_spec(name)
    print(spec and (spec.origin or list(spec.submodule_search_locations)))
"""
    assert str(ROOT) not in python(code, "nodes", "tests", "tools", "workflows", cwd=tmp_path)


def test_requirements_leave_the_host_alone() -> None:
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    requirements = [Requirement(line) for line in lines if line and not line.startswith("#")]
    assert requirements
    assert not HOST & {canonicalize_name(requirement.name) for requirement in requirements}
    for requirement in requirements:
        assert [bound.operator for bound in requirement.specifier] == [">="], requirement


def test_requirements_agree_with_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    ours = {*project["dependencies"], *project["optional-dependencies"]["plots"]}  # the nodes that measure draw plots
    assert {line for line in lines if line and not line.startswith("#")} <= ours


def test_each_extra_is_named_where_its_package_is_missing() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = {extra: {package} for package, extra in packages.EXTRAS.items()}
    assert named == {
        extra: {Requirement(line).name for line in lines}
        for extra, lines in extras.items()
        if extra not in ("all", "dev")
    }
    assert extras["all"] == [f"vortex-flux[{','.join(sorted(named))}]"]
    assert "vortex-flux[all]" in extras["dev"]


def test_a_picture_and_a_plan_need_no_extra(tmp_path: Path) -> None:
    code = """
import sys
for package in sys.argv[1].split(","):
    sys.modules[package] = None
from vortex_core.cli.main import app
app(sys.argv[2:])
"""
    hidden = ",".join([*packages.EXTRAS, "accelerate", "hypothesis", "pytest", "setuptools"])
    path = tmp_path / "picture.png"
    python(code, hidden, "generate", "a red circle", "--size", "64x64", "--device", "cpu", "-o", str(path))
    assert path.stat().st_size
    assert "peak of torch reserved" in python(code, hidden, "plan")
    assert "transformer" in python(code, hidden, "inspect", str(CORE / "assets/tiny-schnell"))


def test_import_is_light() -> None:
    heavy = {"torch", "numpy", "transformers", "diffusers", "bitsandbytes", "tokenizers", "matplotlib", "scipy", "PIL"}
    loaded = set(python("import sys, vortex_core; print(*sys.modules)").split())
    assert not heavy & loaded


@pytest.mark.parametrize("path", sorted(CORE.rglob("*.py")), ids=lambda path: str(path.relative_to(CORE)))
def test_module_imports_work_inside_comfyui(path: Path) -> None:
    # The pack's folder is not on sys.path there, so vortex_core can only reach itself relatively.
    forbidden = {"vortex_core", "comfy", "comfy_api", "comfy_execution", "folder_paths", "nodes", "server"}
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module or ""]
        assert not forbidden & {name.partition(".")[0] for name in names}, f"line {node.lineno}"


def test_comfyui_loads_the_pack_from_a_hyphenated_folder(tmp_path: Path) -> None:
    # The steps of ComfyUI's own loader (nodes.py, load_custom_node), with vortex_core hidden as it is there.
    code = """
import importlib, importlib.util, sys
folder = sys.argv[1]
name = folder.replace(".", "_x_")
sys.modules["vortex_core"] = None
spec = importlib.util.spec_from_file_location(name, folder + "/__init__.py")
module = importlib.util.module_from_spec(spec)
sys.modules[name] = module
spec.loader.exec_module(module)
assert isinstance(module.NODE_CLASS_MAPPINGS, dict)
assert "torch" not in sys.modules
engine = importlib.import_module(name + ".vortex_core.runtime.engine")
print(engine.__name__)
"""
    pack = tmp_path / "ComfyUI-Vortex"
    pack.symlink_to(ROOT, target_is_directory=True)
    assert python(code, str(pack), cwd=tmp_path).strip().endswith("ComfyUI-Vortex.vortex_core.runtime.engine")
