"""python -m tests.mutate [MODULE …] [--most N] [--jobs N]: how many single-line faults the quick tests notice.

Each fault is one change of one expression of a module (< becomes <=, + becomes -, a number grows, a call is left out …), made in
a copy of the repository, whose tests of that module then run until one fails. A fault that none notices is printed with its
line. What cannot be noticed, since the program does the same, stands in tests/equivalent_mutants.txt. MODULE: a path, as
pipeline/plan/training.py; all of TESTS if none is given. The last line on stdout is one line of JSON with the figures.

A tool of our own, since the kept ones start a process for each fault, which imports torch and DALI for as long as the tests
take: here they are imported once, and the process is forked.
"""

import argparse
import ast
import copy
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

from tests.support.repository import ROOT, files

PLAN = ["tests/pipeline/test_plan.py"]
TESTS = {
    "pipeline/plan/random_numbers.py": ["tests/pipeline/test_random_numbers.py", *PLAN],
    "pipeline/plan/permutations.py": ["tests/pipeline/test_permutations.py", *PLAN],
    "pipeline/plan/samples.py": [*PLAN, "tests/pipeline/test_graph.py"],
    "pipeline/plan/training.py": PLAN,
    "pipeline/plan/validation.py": PLAN,
    "pipeline/dali/graph.py": ["tests/pipeline/test_graph.py", "tests/pipeline/test_loader.py"],
    "engine/training/mixing.py": ["tests/engine/test_mixing.py"],
    "engine/training/schedule.py": ["tests/engine/test_schedule.py"],
    "engine/training/optimizer.py": ["tests/engine/test_optimizer.py"],
    "engine/training/step.py": ["tests/engine/test_step.py", "tests/engine/test_mixing.py"],
    "engine/checkpoint.py": ["tests/engine/test_checkpoint.py"],
    "engine/evaluation/accuracy.py": ["tests/engine/test_accuracy.py"],
    "engine/evaluation/posteriors.py": ["tests/engine/test_protocols.py"],
    "engine/evaluation/protocols.py": ["tests/engine/test_protocols.py"],
}
"""Module → the tests that are there for it."""

EQUIVALENT = Path(__file__).with_name("equivalent_mutants.txt")
_IMPORTS = (
    "matplotlib.figure",
    "nvidia.dali.fn",
    "PIL.Image",
    "pytest",
    "scipy.stats",
    "sklearn.datasets",
    "torchvision",
)
_LIMIT_SECONDS = 150  # of one fault: one that makes a test wait for ever is noticed
_OWN = ("common", "engine", "model", "perf", "pipeline", "tests", "benchmarks", "train")

_COMPARISONS = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
_ARITHMETIC = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult, ast.BitOr: ast.BitAnd, ast.BitAnd: ast.BitOr, ast.BitXor: ast.BitOr, ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
}  # fmt: skip
_NAMES = {"any": "all", "all": "any", "min": "max", "max": "min", "floor": "ceil", "ceil": "floor"}


class Mutant(NamedTuple):
    """A fault, and the module's source with it."""

    module: str
    line: int
    before: str
    after: str
    source: str

    def __str__(self) -> str:
        return f"{self.module}: {self.before} → {self.after}"


def mutants_of(module: str) -> Iterator[Mutant]:
    """All faults of a module, in the order of its lines."""
    tree = ast.parse((ROOT / module).read_text())
    skipped = set(_not_for_mutation(tree))
    for position, node in enumerate(ast.walk(tree)):
        for change in range(2):
            if node in skipped:
                continue
            changed = copy.deepcopy(tree)
            other = next(found for number, found in enumerate(ast.walk(changed)) if number == position)
            before = ast.unparse(_statement_of(changed, other)).splitlines()[0]
            if not _change(other, change):
                continue
            after = ast.unparse(_statement_of(changed, other)).splitlines()[0]
            if after != before:
                yield Mutant(module, getattr(node, "lineno", 0), before, after, ast.unparse(changed))


def _not_for_mutation(tree: ast.Module) -> Iterator[ast.AST]:
    """Types, texts for people, and what only states what holds anyway."""
    for node in ast.walk(tree):
        parts: list[ast.AST | None] = []
        match node:
            case ast.Assert() | ast.Raise() | ast.Import() | ast.ImportFrom() | ast.JoinedStr():
                parts = [node]
            case ast.Call(func=ast.Name(id="say" | "cast" | "TypeVar")) | ast.Expr(value=ast.Constant()):
                parts = [node]
            case ast.Assign(value=ast.BinOp(op=ast.BitOr())):  # a type
                parts = [node]
            case ast.AnnAssign(annotation=kind) | ast.arg(annotation=kind):
                parts = [kind]
            case ast.FunctionDef(returns=kind, decorator_list=decorators):
                parts = [kind, *decorators]
            case ast.ClassDef(decorator_list=decorators):
                parts = list(decorators)
        for part in parts:
            yield from ast.walk(part) if part else ()


def _statement_of(tree: ast.AST, wanted: ast.AST) -> ast.AST:
    """The innermost statement around a node."""
    found = tree
    for node in ast.walk(tree):
        if isinstance(node, ast.stmt) and any(child is wanted for child in ast.walk(node)):
            found = node
    return found


def _change(node: ast.AST, number: int) -> bool:
    """Make the so-manyeth change of a node, if there is one."""
    match number, node:
        case 0, ast.Compare(ops=[op, *_]) if type(op) in _COMPARISONS:
            node.ops[0] = _COMPARISONS[type(op)]()
        case 0, ast.BinOp(op=op) | ast.AugAssign(op=op) if type(op) in _ARITHMETIC:
            node.op = _ARITHMETIC[type(op)]()
        case 0, ast.BoolOp(op=op):
            node.op = ast.Or() if isinstance(op, ast.And) else ast.And()
        case 0, ast.UnaryOp(op=ast.USub()):
            node.op = ast.UAdd()
        case 0, ast.UnaryOp(op=ast.Not(), operand=operand):
            node.operand = ast.UnaryOp(ast.Not(), operand)
        case 0, ast.Constant(value=bool(value)):
            node.value = not value
        case 0, ast.Constant(value=int() | float() as value):
            node.value = value + 1
        case 0, ast.Name(id=name) if name in _NAMES:
            node.id = _NAMES[name]
        case 0, ast.Attribute(attr=name) if name in _NAMES:
            node.attr = _NAMES[name]
        case 0, ast.Expr(value=ast.Call()) | ast.Return(value=ast.expr()):
            node.value = ast.Constant(None)
        case 1, ast.Constant(value=float(value)) if value:
            node.value = -value
        case 1, ast.If(test=test) | ast.IfExp(test=test) | ast.While(test=test) if not isinstance(test, ast.Compare):
            node.test = ast.UnaryOp(ast.Not(), test)
        case _:
            return False
    return True


def run(mutant: Mutant, folder: Path) -> int:
    """Start the module's tests in a copy of the repository that has the fault. Returns the process id."""
    (folder / mutant.module).write_text(mutant.source)
    process = os.fork()
    if process:
        return process
    os.setsid()
    os.chdir(folder)
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in range(3):
        os.dup2(null, descriptor)
    for name in [name for name in sys.modules if name.split(".")[0] in _OWN]:
        del sys.modules[name]
    sys.path[:] = [str(folder), *(entry for entry in sys.path if entry not in ("", str(ROOT)))]
    sys.dont_write_bytecode = True
    import pytest

    flags = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", "not slow", f"--rootdir={folder}"]
    os._exit(int(pytest.main([*flags, *TESTS[mutant.module]])))


def survivors_of(mutants: list[Mutant], jobs: int) -> list[Mutant]:
    """Those that no test notices. Raises AssertionError where the tests fail without a fault."""
    with tempfile.TemporaryDirectory() as work:
        folders = [_copy(Path(work, str(number))) for number in range(jobs)]
        for module in dict.fromkeys(mutant.module for mutant in mutants):
            untouched = Mutant(module, 0, "", "", (ROOT / module).read_text())
            _, status = os.waitpid(run(untouched, folders[0]), 0)
            assert status == 0, f"{module}: its tests fail without a fault"
        waiting, survivors, done = list(mutants), [], 0
        running: dict[int, tuple[Mutant, Path, float]] = {}
        free = list(folders)
        while waiting or running:
            while waiting and free:
                mutant, folder = waiting.pop(0), free.pop()
                running[run(mutant, folder)] = mutant, folder, time.monotonic()
            for process, (mutant, folder, began) in list(running.items()):
                ended, status = os.waitpid(process, os.WNOHANG)
                if not ended and time.monotonic() - began > _LIMIT_SECONDS:
                    os.killpg(process, signal.SIGKILL)
                    ended, status = os.waitpid(process, 0)
                if ended:
                    del running[process]
                    free.append(folder)
                    shutil.copy2(ROOT / mutant.module, folder / mutant.module)
                    done += 1
                    if status == 0:
                        survivors.append(mutant)
                        print(f"{done}/{len(mutants)} not noticed: {mutant.module}:{mutant.line}", file=sys.stderr)
                        print(f"    {mutant.before}\n    {mutant.after}", file=sys.stderr, flush=True)
            time.sleep(0.02)
    return survivors


def _copy(folder: Path) -> Path:
    for path in files():
        target = folder / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, target)
    return folder


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.mutate", description="Plant faults, and see whether tests notice."
    )
    parser.add_argument("modules", nargs="*", default=list(TESTS), metavar="MODULE")
    parser.add_argument("--most", type=int, help="faults of each module, drawn at random")
    parser.add_argument("--jobs", type=int, default=2, help="faults at a time (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the drawing")
    arguments = parser.parse_args()
    known = set(EQUIVALENT.read_text().splitlines())
    mutants = []
    for module in arguments.modules:
        found = [mutant for mutant in mutants_of(module) if str(mutant) not in known]
        if arguments.most and len(found) > arguments.most:
            found = random.Random(arguments.seed).sample(found, arguments.most)
        mutants += found
    for name in _IMPORTS:
        import_module(name)
    survivors = survivors_of(mutants, arguments.jobs)
    by_module = {module: sum(mutant.module == module for mutant in mutants) for module in arguments.modules}
    missed = {module: sum(mutant.module == module for mutant in survivors) for module in arguments.modules}
    for mutant in survivors:
        print(mutant)
    noticed = 1 - len(survivors) / max(1, len(mutants))
    print(json.dumps({"faults": len(mutants), "noticed": round(noticed, 4), "of": by_module, "not_noticed": missed}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
