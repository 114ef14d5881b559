"""python deploy/check_versions.py: whether the packages that are installed are those that requirements.txt asks for.

An image that brings its own torch may bring an old one; better said while it is built than by a run.
"""

import re
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from packaging.requirements import Requirement

# Images bring DALI for the CUDA that they have.
_SAME = {"nvidia-dali-cuda120": ("nvidia-dali-cuda120", "nvidia-dali-cuda130")}


def missing(requirements: str) -> list[str]:
    """One sentence for each requirement, in the lines of a requirements file, that is not met."""
    problems = []
    for line in requirements.splitlines():
        if not (line := re.sub(r"\s*#.*", "", line)):
            continue
        requirement = Requirement(line)
        found = {name: _version(name) for name in _SAME.get(requirement.name, (requirement.name,))}
        # What images build themselves is called a pre-release, as 2.12.0a0+1234abc.
        if not any(own and requirement.specifier.contains(own, prereleases=True) for own in found.values()):
            have = ", ".join(f"{name} {own or 'is not installed'}" for name, own in found.items())
            problems.append(f"{line} is needed: {have}")
    return problems


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    problems = missing((Path(__file__).parent.parent / "requirements.txt").read_text())
    sys.exit("\n".join(f"error: {problem}" for problem in problems) or 0)
