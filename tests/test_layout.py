"""Rules of the repository that no type checker knows."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Who may import whom: the arrows of the design, top to bottom.
ALLOWED = {
    "common": set(),
    "pipeline": {"common"},
    "model": {"common"},
    "engine": {"common", "pipeline", "model"},
    "perf": {"common", "pipeline", "model", "engine"},
    "benchmarks": {"common", "pipeline", "model", "engine", "perf"},
    "profile": {"common", "perf"},
}
PROGRAMS = ("train", "evaluate", "features", "export", "predict")
OWN = {*ALLOWED, *PROGRAMS}


def imported_packages(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide where things come from"
            names.add(str(node.module).split(".")[0])
    return names


@pytest.mark.parametrize("package", ALLOWED)
def test_imports_go_one_way(package):
    files = sorted((ROOT / package).glob("*.py"))
    assert files
    for path in files:
        assert imported_packages(path) & OWN <= ALLOWED[package] | {package}, path


def test_profile_never_shadows_a_module():
    assert not (ROOT / "profile/__init__.py").exists()
    taken = set(sys.stdlib_module_names) | {"torch", "torchvision", "numpy", "pynvml", "nvidia", "tyro", "tqdm", "yaml"}
    assert not {path.stem for path in (ROOT / "profile").glob("*.py")} & taken
    code = "import cProfile, profile; assert 'lib/python' in profile.__file__, profile.__file__"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize("program", PROGRAMS)
def test_command_line_starts_without_torch(program):
    code = f"import sys, {program}; assert 'torch' not in sys.modules and 'nvidia.dali' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
