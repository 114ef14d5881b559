"""The repository's files, as git sees them, or all but what .gitignore names where there is no git."""

import fnmatch
import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]


def files(*patterns: str) -> list[Path]:
    """Those that git has or would take and that match one of git's patterns (all, if none is given), sorted."""
    names = sorted(_of_git() or _of_folder())
    wanted = [pattern for pattern in patterns if not pattern.startswith(":!")]
    unwanted = [pattern.removeprefix(":!") for pattern in patterns if pattern.startswith(":!")]
    return [
        ROOT / name
        for name in names
        if (not wanted or any(_matches(name, pattern) for pattern in wanted))
        and not any(_matches(name, pattern) for pattern in unwanted)
        and (ROOT / name).is_file()  # not, where it was removed and git was not told
    ]


def programs() -> list[Path]:
    """The files that are run, by their paths in the repository."""
    sources = {path: path.read_text() for path in files("*.py", ":!tests", ":!deploy")}
    return sorted(
        path.relative_to(ROOT)
        for path, source in sources.items()
        if '\nif __name__ == "__main__":\n' in source and "\n    end(" in source
    )


def main_elsewhere(program: Path) -> str | None:
    """The module from which a thin program takes its main; None where it has one of its own."""
    found = re.search(r"^ *from ([\w.]+) import main$", (ROOT / program).read_text(), re.M)
    return found and found[1]


def _matches(name: str, pattern: str) -> bool:
    """As git has it: a folder stands for all that is in it, and * for slashes too."""
    return fnmatch.fnmatchcase(name, pattern) or name.startswith(f"{pattern}/")


def _of_git() -> set[str]:
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    except (FileNotFoundError, subprocess.CalledProcessError):
        return set()
    return set(filter(None, listed.stdout.split("\0")))


def _of_folder() -> set[str]:
    rules = (ROOT / ".gitignore").read_text().split()
    at_the_top = {rule.strip("/") for rule in rules if rule.startswith("/")} | {".git"}
    anywhere = [rule.rstrip("/") for rule in rules if not rule.startswith("/")]
    names = (path.relative_to(ROOT) for path in ROOT.rglob("*") if path.is_file())
    return {
        str(name)
        for name in names
        if name.parts[0] not in at_the_top
        and not any(fnmatch.fnmatchcase(part, rule) for part in name.parts for rule in anywhere)
    }
