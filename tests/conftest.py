import os
import random
import re

import numpy as np
import pytest
import torch

_SLOW_SECONDS = 3600  # those in CI have the limit of pyproject.toml
_MAY_BE_SKIPPED = re.compile(
    "GPU|NCCL|needs .*chromium"  # what no CI machine has
    "|^README|^[A-Z]+\\.md|^docs/"  # a documented command that says what it needs
)
"""Reasons for which a test may be skipped where NO_SKIPS=1 says that nothing else may be missing."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--seed", type=int, default=0, help="of all random numbers for which a test takes no seed of its own"
    )


def pytest_report_header(config: pytest.Config) -> str:
    return f"seed of random numbers: {config.getoption('--seed')} (another one: --seed N)"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(_SLOW_SECONDS))


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """The user's cache folder is left alone; child processes inherit the tests' own."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def same_random_numbers(request):
    """In each test, whichever ran before it."""
    seed = request.config.getoption("--seed")
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    for reason in _wrong_skips(terminalreporter):
        terminalreporter.write_line(f"a skip that hides a test in CI: {reason}", red=True)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workerinput"):
        return  # the controller sees the reports of all
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter and _wrong_skips(reporter):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def _wrong_skips(terminalreporter) -> list[str]:
    """Reasons of tests that were skipped in CI though they could have run there."""
    if not os.environ.get("NO_SKIPS"):
        return []
    reasons = {report.longrepr[2].removeprefix("Skipped: ") for report in terminalreporter.stats.get("skipped", ())}
    return sorted(reason for reason in reasons if not _MAY_BE_SKIPPED.search(reason))
