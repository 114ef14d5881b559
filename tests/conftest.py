import functools
import gc
import inspect
import os
import random
import re
import subprocess
import tempfile
import types
from collections.abc import Callable

import numpy as np
import pytest
import torch

_SLOW_SECONDS = 3600  # those in CI have the limit of pyproject.toml
_MEASURES = re.compile(
    r"tests/(benchmarks|perf)/|tests/runs/test_(planted|profile|lost_peers)\.py|\[docs/performance\.md"
)
"""Matches the names of tests that assert something of measured times, and of the page whose commands measure for long."""
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
        if _MEASURES.search(item.nodeid):
            item.add_marker(pytest.mark.alone)
        fixtures = item._fixtureinfo.name2fixturedefs.values()  # type: ignore[attr-defined]
        functions = [item.function, *(last.func for *_, last in fixtures)]  # type: ignore[attr-defined]
        if any(_starts_processes(function) for function in functions):
            item.add_marker(pytest.mark.processes)


@functools.cache
def _starts_processes(function: Callable) -> bool:
    """Whether a function of the tests uses the module subprocess, or a function of theirs that does."""
    function = inspect.unwrap(function)
    if not isinstance(function, types.FunctionType):
        return False
    used = [function.__globals__.get(name) for name in _names_in(function.__code__)]
    return subprocess in used or any(
        _starts_processes(other)
        for other in used
        if isinstance(other, types.FunctionType) and other.__module__.startswith("tests.") and other is not function
    )


def _names_in(code: types.CodeType) -> set[str]:
    inner = (constant for constant in code.co_consts if isinstance(constant, types.CodeType))
    return set(code.co_names).union(*map(_names_in, inner))


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """The user's cache folder is left alone; child processes inherit the tests' own. What is compiled is kept for all tests."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", os.path.join(tempfile.gettempdir(), f"vgg-tests-{os.getuid()}"))
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def own_warnings(recwarn):
    """The warnings of this test, without those of files that tests before it have left to the garbage collection."""
    gc.collect()
    recwarn.clear()
    return recwarn


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
