"""Every command that README.md, CONTRIBUTING.md and docs/ show is run as it stands, or says what it needs.

A long one that several pages show runs once. What is skipped is listed at the end of pytest's output, with the reason.
"""

import pytest

from tests.support.documented import Command, all_blocks, commands_in, copy_of_the_project, run_commands
from tests.support.repository import ROOT

OF_CI = ("make lint", "make test", "make docs")
# What checks the repository is not run from within its tests.
CHECKS = (*OF_CI, "make quick", "make test-slow", "make format", "pre-commit run --all-files")

QUICK_SECONDS = 120
SLOW_SECONDS = 3000  # beside other slow tests; below the limit of tests/conftest.py


def _without_comment(command: Command) -> str:
    return command.text.split(" #")[0].strip()


def _reason_to_skip(command: Command) -> str:
    if _without_comment(command) in CHECKS:
        return "is a check itself"
    return f"needs {command.needs}" if command.needs else ""


def _parameters() -> list:
    """Of each block, what can be run, in one test, and what cannot, in one for each reason."""
    parameters = []
    shown: set[str] = set()  # what takes long, on the pages before
    for block in all_blocks():
        name, reasons = f"{block.page}:{block.line}", [_reason_to_skip(command) for command in block.commands]
        run = [
            command
            for command, reason in zip(block.commands, reasons, strict=True)
            if not reason and _without_comment(command) not in shown
        ]
        shown.update(_without_comment(command) for command in run if command.takes)
        if run:
            marks = [pytest.mark.xdist_group(block.page)]
            if any(command.takes for command in run):
                marks.append(pytest.mark.slow)
            if any("hour" in command.takes for command in run):  # on all cores: beside others, more than SLOW_SECONDS
                marks.append(pytest.mark.alone)
            parameters.append(pytest.param(run, id=name, marks=marks))
        for reason in sorted({f"{name}: {reason}" for reason in reasons if reason}):
            parameters.append(pytest.param([], id=f"{name}-rest", marks=pytest.mark.skip(reason=reason)))
    return parameters


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """One for all blocks: a reader goes on where the block before has ended. Pages need nothing of each other's."""
    return copy_of_the_project(tmp_path_factory.mktemp("documented"))


@pytest.mark.parametrize("commands", _parameters())
def test_runs_as_documented(commands, copy):
    slow = any(command.takes for command in commands)
    run_commands(commands, copy, limit_seconds=SLOW_SECONDS if slow else QUICK_SECONDS)


def test_ci_runs_the_checks():
    of_ci = (ROOT / ".ci/run").read_text().splitlines()
    assert set(OF_CI) <= set(of_ci)
    workflow = (ROOT / ".github/workflows/ci.yml").read_text()
    assert all(f"run: {command}\n" in workflow for command in OF_CI)


def test_marks():
    """A comment behind a command marks it alone, one above marks the rest; "needs no GPU" is no need."""
    marked = commands_in(
        "a   # needs X\nb \\\n    --c  # needs no GPU\n# takes long\nd\n# needs Y, and Z\ne # says f\n"
    )
    assert [(command.text.split()[0], command.needs, command.takes) for command in marked] == [
        ("a", "X", ""),
        ("b", "", ""),
        ("d", "", "long"),
        ("e", "Y, and Z", "long"),
    ]
