"""Small file systems of a test's own."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def small_disk(folder: Path, mebibytes: int) -> Iterator[Path]:
    """A file system of so many MiB at `folder`, in memory; skips the test where we may not mount."""
    folder.mkdir()
    done = mount("-t", "tmpfs", "-o", f"size={mebibytes}m", "tmpfs", str(folder))
    if done.returncode:
        pytest.skip(f"needs the right to mount a tmpfs ({done.stderr.strip()})")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def remount(folder: Path, options: str) -> None:
    mount("-o", f"remount,{options}", str(folder)).check_returncode()


def mount(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(["mount", *arguments], capture_output=True, text=True, check=False)
