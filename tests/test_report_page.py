"""report.html and the tables of a report: complete, by themselves, and safe whatever the report holds."""

import copy
from collections.abc import Iterator
from html.parser import HTMLParser

import pytest

from perf.compare_reports import compare
from perf.report_format import check_report
from perf.report_page import page
from perf.report_words import number, stage_table, with_prefix
from perf.show import PICTURES
from tests.made_up_report import cpu_report, gpu_report


class Page(HTMLParser):
    """Checks that tags close in order; keeps tags, attributes and text."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.parts: list[str] = []
        self.style = ""
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "style":
            self.style += data
        elif data.strip():
            self.parts.append(data.strip())

    @property
    def text(self) -> str:
        return "\n".join(self.parts)


def page_of(report: dict, picture: bytes = b"\x89PNG") -> Page:
    return Page(page(report, dict.fromkeys(PICTURES, picture)))


def test_page_leads_with_the_verdict_its_figures_and_the_flags():
    report = gpu_report()
    text = page_of(report).text
    order = [
        report["verdict"]["sentence"],
        "11.4 %",
        "loader alone, of the step alone",
        "--threads 24",
        "cores are idle while the loader is behind",
        "python -m pipeline.prepare",
        "Stages",
        "4,973–5,491",  # of training
        "Pictures",
        "Configuration",
        "/data/imagenet",
        "Hardware",
        "580.65",
    ]
    # The title comes before the page; what comes first is the verdict.
    body = text[text.index("\n") :]
    places = [
        body.index(part, body.index("Configuration")) if part == "/data/imagenet" else body.index(part)
        for part in order
    ]
    assert places == sorted(places)
    assert body.count("sw power cap 31.0 %") == 6  # GPU 0, the whole run and each stage
    assert "temperature celsius: Not Supported" in body
    assert "MFU: 28.3 %. Images per joule: 4.31." in body
    assert "1,510,298" in body  # predicted for 512 ranks


def test_page_needs_nothing_else():
    found = page_of(gpu_report())
    links = [value for name, value in found.attributes if name in ("src", "href", "srcset", "data", "action", "poster")]
    assert len(links) == 4
    assert all(link.startswith("data:image/png;base64,") for link in links)
    assert not {"script", "link", "iframe", "object", "embed", "base"} & set(found.tags)
    assert not any(name.startswith("on") or "url(" in value for name, value in found.attributes)
    assert "@import" not in found.style
    assert "url(" not in found.style
    assert ("name", "viewport") in found.attributes


def test_page_escapes_what_it_is_given():
    report = gpu_report()
    hostile = "</title></style><script>alert('1')</script>&amp;\"\x1b[31m\u202e"
    shown = "</title></style><script>alert('1')</script>&amp;\"\\x1b[31m\\u202e"
    report["config"]["data"] = report["hardware"]["cpu"] = report["verdict"]["sentence"] = hostile
    report["config"][hostile] = hostile
    report["verdict"]["try"][0] = {"flags": hostile, "why": hostile}
    report["verdict"]["evidence"][0] = {"name": hostile, "value": 1.0, "unit": hostile}
    report["ceiling"]["why_not"] = report["ceiling"]["set_by"] = hostile
    report["telemetry"]["reason"] = report["git_revision"] = report["created"] = hostile
    report["telemetry"]["stages"][hostile] = report["telemetry"]["stages"].pop("loader")
    device = report["telemetry"]["devices"][0]
    device["name"] = device["missing"][hostile] = hostile
    device["throttled_fraction"][hostile] = 0.5
    found = page_of(report)
    assert "script" not in found.tags
    assert found.text.count(shown) >= 15
    assert "\x1b" not in found.text


def test_what_is_null_is_not_measured_and_never_nought():
    report = cpu_report()
    report["stages"] |= {"reading": None, "decoding": None, "loader": None, "training": None}
    report["training_parts"] = None
    report["stages"]["step"]["images_per_second"] |= {"p5": None, "relative_ci": None}
    _, rows = stage_table(report)
    for name, *cells in rows:
        if name == "step alone":
            assert cells[:2] == ["118", "not measured"]
            assert cells[-1] == "not measured"
        else:
            assert [cell for cell in cells if cell] == ["not measured"]
    report["hardware"]["ranks"] = 2
    text = page_of(report).text
    assert "Images per joule: not measured." in text
    assert "all-reduce, exposed\nnot measured\nnot measured\n" in text


def paths_of(value: object, depth: int, path: tuple = ()) -> Iterator[tuple]:
    if isinstance(value, dict) and depth:
        for key, inner in value.items():
            yield (*path, key)
            yield from paths_of(inner, depth - 1, (*path, key))


def test_any_value_may_be_null():
    report = gpu_report()
    step = report["stages"]["step"]
    for path in (*paths_of(report, depth=2), *(("stages", "step", *path) for path in paths_of(step, depth=2))):
        if path[0] in ("program", "format"):
            continue
        changed = copy.deepcopy({name: part for name, part in report.items() if name == path[0]})
        inner = changed
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = None
        changed = report | changed
        check_report(changed, "changed")
        assert len(page_of(changed).parts) > 50
        assert len(compare(report, changed)) == 10
        for draw in PICTURES.values():
            draw(changed)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (None, "not measured"),
        (0.0, "0"),
        (7, "7"),
        (12345, "12,345"),
        (1234.5, "1,234"),
        (78.94, "78.9"),
        (4.561, "4.56"),
        (0.9997, "1.00"),
        (0.01234, "0.0123"),
        (-2.5, "-2.50"),
        (1.5e-9, "1.50e-09"),
    ],
)
def test_number(value, words):
    assert number(value) == words


def test_with_prefix():
    assert with_prefix(9.89e14, "FLOP/s") == "989 TFLOP/s"
    assert with_prefix(24e9, "B/s") == "24.0 GB/s"
    assert with_prefix(999.7e9, "B/s") == "1.00 TB/s"
    assert with_prefix(None, "B/s") == "not measured"
