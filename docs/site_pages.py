"""python docs/site_pages.py DIR: the site's pages as its builder wants them: docs/ and what stands at the repository's root.

README, CONTRIBUTING and others stay where people and GitHub look for them, and are copied to a place beside the other pages.
Links are written as GitHub wants them, and rewritten in the copies to where the pages are on the site. DIR is made anew.
"""

import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
PLACES = {
    "README.md": "guide.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "LICENSE": "LICENSE",
}

_TARGET = re.compile(r"(?<=\]\()[^)#\s]+")


def main(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(ROOT / "docs", folder, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    for page in folder.glob("*.md"):
        page.write_text(with_links(page.read_text(), at_root=False))
    for name, place in PLACES.items():
        (folder / place).write_text(with_links((ROOT / name).read_text(), at_root=True))


def with_links(text: str, *, at_root: bool) -> str:
    """The page's text, its links leading to where the pages are on the site. at_root: whether it stands at the root."""
    return _TARGET.sub(lambda target: _on_site(target[0], at_root=at_root), text)


def _on_site(target: str, *, at_root: bool) -> str:
    """Where a link's target is on the site, seen from the folder in which all pages are."""
    if at_root:
        return PLACES.get(target, target.removeprefix("docs/"))
    return PLACES.get(target.removeprefix("../"), target) if target.startswith("../") else target


if __name__ == "__main__":
    main(Path(sys.argv[1]))
