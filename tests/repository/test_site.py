"""docs/site_pages.py, and what the site's builder does not look for: pictures that are not there, pages that no menu has."""

import re

import pytest
import yaml

from docs.site_pages import main, with_links
from tests.support.repository import ROOT


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site") / "pages"
    main(folder)
    return folder


@pytest.mark.parametrize(
    ("text", "at_root", "expected"),
    [
        ("[a](docs/faq.md#x) [b](LICENSE)", True, "[a](faq.md#x) [b](LICENSE)"),
        ("![a](docs/pictures/curves.png) [b](CHANGELOG.md)", True, "![a](pictures/curves.png) [b](changelog.md)"),
        ("[a](../README.md#start) [b](design.md) [c](#here)", False, "[a](guide.md#start) [b](design.md) [c](#here)"),
        ("[a](https://example.org/docs/README.md)", False, "[a](https://example.org/docs/README.md)"),
    ],
)
def test_links_lead_to_the_copies(text, at_root, expected):
    assert with_links(text, at_root=at_root) == expected


def test_it_is_made_anew(pages):
    (pages / "old.md").touch()
    main(pages)
    assert not (pages / "old.md").exists()
    assert not list(pages.rglob("*.py"))


def test_every_picture_is_there(pages):
    shown = {
        (page, target)
        for page in pages.glob("*.md")
        for target in re.findall(r"!\[[^]]*\]\(([^)]+)\)", page.read_text())
    }
    assert len(shown) > 5
    assert not {(page.name, target) for page, target in shown if not (pages / target).is_file()}


def test_every_page_is_in_the_menu(pages):
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    menu = set(re.findall(r"[\w-]+\.md", str(settings["nav"])))
    assert menu == {page.name for page in pages.glob("*.md")}


def test_readme_is_short():
    """What a reader needs once stands in docs/."""
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200
