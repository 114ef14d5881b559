"""A hook of mkdocs: README, CONTRIBUTING and others at the repository's root are pages of the site, too.

They stay where people and GitHub look for them. Links between them and docs/ are written as GitHub wants them, and
rewritten here to where the pages are on the site.
"""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
PLACES = {
    "README.md": "guide.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "LICENSE": "LICENSE",
}

_TARGET = re.compile(r"(?<=\]\()[^)#\s]+")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for name, place in PLACES.items():
        files.append(File.generated(config, place, content=(ROOT / name).read_text()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    at_root = page.file.src_uri in PLACES.values()
    return _TARGET.sub(lambda target: _on_site(target[0], at_root=at_root), markdown)


def _on_site(target: str, *, at_root: bool) -> str:
    """Where a link's target is on the site, seen from docs/, where all pages are."""
    if at_root:
        return PLACES.get(target, target.removeprefix("docs/"))
    return PLACES.get(target.removeprefix("../"), target) if target.startswith("../") else target
