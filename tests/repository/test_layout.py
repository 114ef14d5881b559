"""Rules of the repository that no type checker knows."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import repository
from tests.support.repository import ROOT, files

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
"""None of them imports tests."""
PROGRAMS = ("train", "evaluate", "features", "export", "predict")
OWN = {*ALLOWED, *PROGRAMS, "tests"}


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
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    for path in files:
        assert imported_packages(path) & OWN <= ALLOWED[package] | {package}, path


# And within them: each folder may import those before it. "" is what lies beside the folders.
FOLDERS = {
    "pipeline": ("dataset", "shards", "plan", "dali", "preparation", ""),
    "engine": ("", "evaluation", "monitoring", "training"),
}


@pytest.mark.parametrize("package", FOLDERS)
def test_folders_are_imported_one_way(package):
    order = FOLDERS[package]

    def place(module: str) -> int:
        inner = module.split(".")[1:]
        return order.index(inner[0]) if inner and inner[0] in order else order.index("")

    for path in sorted((ROOT / package).rglob("*.py")):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        if path.name == "__init__.py" or "\n    end(main)\n" in path.read_text():
            continue  # commands, which lie beside the folders and use them all
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] == package:
                for name in node.names if node.module == package else [None]:
                    imported = f"{node.module}.{name.name}" if name else str(node.module)
                    assert place(imported) <= place(module), f"{module} imports {imported}"


# What brings a module of another name than its own.
DISTRIBUTIONS = {
    "PIL": "pillow",
    "kubernetes_validate": "kubernetes-validate",
    "nvidia": "nvidia-dali-cuda120",
    "pynvml": "nvidia-ml-py",
    "sklearn": "scikit-learn",
    "yaml": "pyyaml",
}
OPTIONAL = {"ffcv", "onnx", "onnxruntime", "safetensors", "timm", "torchcodec", "wandb"}
"""What the programs do without, or ask for in a sentence: imported inside of functions only."""


def modules(node: ast.AST) -> set[str]:
    if isinstance(node, ast.Import):
        return {alias.name.split(".")[0] for alias in node.names}
    return {str(node.module).split(".")[0]} if isinstance(node, ast.ImportFrom) else set()


def of_others(nodes: Iterator[ast.AST]) -> set[str]:
    found = set().union(*map(modules, nodes))
    return found - OWN - {"docs", "deploy"} - sys.stdlib_module_names


def declared(name: str) -> set[str]:
    """The distributions of a requirements file, and of those that it takes in."""
    found: set[str] = set()
    for line in (ROOT / name).read_text().splitlines():
        if line.startswith("-r "):
            found |= declared(line.removeprefix("-r "))
        elif not line.startswith("#"):
            found.add(re.match(r"[\w.-]*", line)[0].lower())  # type: ignore[index]
    return found


def undeclared(sources: list[Path], requirements: str) -> dict[str, str]:
    """By module that is imported without being declared: a file that does."""
    known = declared(requirements)
    return {
        module: str(path.relative_to(ROOT))
        for path in sources
        for module in of_others(ast.walk(ast.parse(path.read_text()))) - OPTIONAL
        if DISTRIBUTIONS.get(module, module).lower() not in known
    }


def test_what_the_programs_import_is_declared():
    assert not undeclared(files("*.py", ":!tests", ":!docs"), "requirements.txt")


def test_what_the_tests_import_is_declared():
    assert not undeclared(files("tests/*.py"), "requirements-dev.txt")


def test_what_is_declared_is_imported():
    """But for what torch.compile, TensorBoard's writer and others load by themselves."""
    sources = files("*.py", ":!tests", ":!docs")
    imported = set().union(*(of_others(ast.walk(ast.parse(path.read_text()))) for path in sources))
    names = {DISTRIBUTIONS.get(module, module).lower() for module in imported}
    assert not declared("requirements.txt") - names - {"tensorboard", ""}


def test_what_is_optional_is_imported_where_it_is_used():
    for path in files("*.py", ":!tests"):
        assert not of_others(iter(ast.parse(path.read_text()).body)) & OPTIONAL, path


def test_without_git_the_repository_has_the_same_files(monkeypatch):
    """A release's archive has no .git, and its tests read the sources too."""
    patterns = [(), ("*.py", ":!tests", ":!docs"), ("docs/*.md",), ("sweeps",)]
    of_git = [files(*pattern) for pattern in patterns]
    monkeypatch.setattr(repository, "_of_git", set)
    assert [files(*pattern) for pattern in patterns] == of_git
    assert all(of_git)


def test_profile_never_shadows_a_module():
    assert not (ROOT / "profile/__init__.py").exists()
    taken = set(sys.stdlib_module_names) | {"torch", "torchvision", "numpy", "pynvml", "nvidia", "tyro", "yaml"}
    assert not {path.stem for path in (ROOT / "profile").glob("*.py")} & taken
    code = "import cProfile, profile; assert 'lib/python' in profile.__file__, profile.__file__"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize("program", PROGRAMS)
def test_command_line_starts_without_torch(program):
    code = f"import sys, {program}; assert 'torch' not in sys.modules and 'nvidia.dali' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
