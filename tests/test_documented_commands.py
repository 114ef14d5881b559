"""Every command that README.md, CONTRIBUTING.md and docs/ show is run as it stands, or says what it needs.

What is skipped is listed at the end of pytest's output, with the reason.
"""

import pytest

from tests.documented import ROOT, Block, Command, all_blocks, copy_of_the_project, run_commands

# Not run from within the tests: the checks themselves.
CHECKS = ("make test", "make test-slow", "make lint", "make format", "make docs")
OF_CI = ("make test", "make lint", "make docs")

QUICK_SECONDS = 60
SLOW_SECONDS = 1800

BLOCKS = all_blocks()


def _name(block: Block) -> str:
    return f"{block.page}:{block.line}"


def _is_check(command: Command) -> bool:
    return command.text.split("#")[0].strip() in CHECKS


def _can_run(block: Block) -> list[Command]:
    return [command for command in block.commands if not command.needs and not _is_check(command)]


def _parameters() -> list:
    return [
        pytest.param(block, id=_name(block), marks=[pytest.mark.slow] if any(c.takes for c in _can_run(block)) else [])
        for block in BLOCKS
    ]


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """One for all blocks: a reader goes on where the block before has ended."""
    return copy_of_the_project(tmp_path_factory.mktemp("documented"))


@pytest.mark.parametrize("block", _parameters())
def test_runs_as_documented(block, copy):
    commands = _can_run(block)
    if not commands:
        reasons = {
            "is a check itself" if _is_check(command) else f"needs {command.needs}" for command in block.commands
        }
        pytest.skip("; ".join(sorted(reasons)))
    slow = any(command.takes for command in commands)
    run_commands(commands, copy, limit_seconds=SLOW_SECONDS if slow else QUICK_SECONDS)


def test_ci_runs_the_checks():
    of_ci = (ROOT / ".ci/run").read_text().splitlines()
    assert set(OF_CI) <= set(of_ci)
    workflow = (ROOT / ".github/workflows/ci.yml").read_text()
    assert all(f"run: {command}\n" in workflow for command in OF_CI)


def test_marks(tmp_path):
    """A comment behind a command marks it alone, one above marks the rest; "needs no GPU" is no need."""
    from tests.documented import _commands

    marked = _commands("a   # needs X\nb \\\n    --c  # needs no GPU\n# takes long\nd\n# needs Y, and Z\ne # says f\n")
    assert [(command.text.split()[0], command.needs, command.takes) for command in marked] == [
        ("a", "X", ""),
        ("b", "", ""),
        ("d", "", "long"),
        ("e", "Y, and Z", "long"),
    ]
