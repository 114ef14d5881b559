"""The command blocks of the documentation, and how a reader's shell would run them.

A comment that begins with "needs" says what a machine must have that this one need not: at the end of a command it holds for
that command, on a line of its own for the rest of the block. One that begins with "takes" marks what CI has no time for.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from tests.support.repository import ROOT, files

PAGES = ("README.md", "CONTRIBUTING.md", "docs/*.md")

_BLOCK = re.compile(r"^```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_MARK = re.compile(r"(?:^|\s)# (needs|takes) (?!no\b)(.*)$")


class Command(NamedTuple):
    """A command of a block, with what is written behind it or above it."""

    text: str
    needs: str
    takes: str


class Block(NamedTuple):
    """A command block of a page."""

    page: str
    line: int
    commands: tuple[Command, ...]


def blocks_of(page: Path) -> list[Block]:
    """The ```sh blocks of a Markdown file, in its order."""
    text = page.read_text()
    return [
        Block(str(page.relative_to(ROOT)), text.count("\n", 0, found.start()) + 1, tuple(commands_in(found[1])))
        for found in _BLOCK.finditer(text)
    ]


def all_blocks() -> list[Block]:
    """The blocks of all pages, in an order that a newcomer might read them in."""
    return [block for pattern in PAGES for page in files(pattern) for block in blocks_of(page)]


def commands_in(block: str) -> list[Command]:
    """The commands of a block's text: its lines, indented as they are, since a here-document may hold Python."""
    commands, of_the_rest = [], {"needs": "", "takes": ""}
    for line in block.replace("\\\n", "").splitlines():
        mark = _MARK.search(line)
        if mark and line.startswith("#"):
            of_the_rest[mark[1]] = mark[2]
        elif line.strip() and not line.startswith("#"):
            marks = {**of_the_rest, mark[1]: mark[2]} if mark else of_the_rest
            commands.append(Command(line.rstrip(), needs=marks["needs"], takes=marks["takes"]))
    return commands


def copy_of_the_project(folder: Path) -> Path:
    """A copy of the repository's files in `folder`, with a home of its own beside it. Returns the copy."""
    copy = folder / "project"
    for path in files():
        target = copy / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, target)
    (folder / "home").mkdir()
    return copy


def run_commands(commands: list[Command], copy: Path, *, limit_seconds: float) -> None:
    """Run commands one after the other in bash. Raises AssertionError: one fails, or all together take longer."""
    environment = {**os.environ, "HOME": str(copy.parent / "home")}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    for name in ("XDG_CACHE_HOME", "VGG_DATA", "MAKEFLAGS", "MAKELEVEL"):  # a reader's shell has none of them
        environment.pop(name, None)
    process = subprocess.Popen(
        ["bash", "-euxo", "pipefail", "-c", "\n".join(command.text for command in commands)],
        cwd=copy,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=limit_seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        raise AssertionError(f"not done after {limit_seconds:.0f} s:\n{output[-4000:]}") from None
    assert process.returncode == 0, f"exit code {process.returncode}:\n{output[-4000:]}"
