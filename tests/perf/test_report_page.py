"""report.html and the tables of a report: complete, by themselves, and safe whatever the report holds."""

import shutil
import subprocess
import typing
from collections.abc import Iterator
from html import escape
from html.parser import HTMLParser
from pathlib import Path

import msgspec
import pytest

from perf.compare import compare
from perf.page import page
from perf.plot_style import png
from perf.report import Report
from perf.show import PICTURES
from perf.words import duration, number, stage_table, surety, with_prefix
from tests.support.made_up_report import cpu_report, gpu_report, rate


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


def page_of(report: Report, picture: bytes = b"\x89PNG") -> Page:
    return Page(page(report, dict.fromkeys(PICTURES, picture)))


def flat(text: str) -> str:
    """With the line breaks as a browser shows them."""
    return " ".join(text.split())


def pictures_of(report: Report) -> dict[str, bytes | str]:
    drawn = {name: draw(report) for name, draw in PICTURES.items()}
    return {name: found if isinstance(found, str) else png(found) for name, found in drawn.items()}


def test_page_answers_first_how_fast_what_limits_how_sure_what_to_do():
    report = gpu_report()
    report.verdict.cautions = ["GPU 1 was 6 % slower than GPU 0."]
    text = page_of(report).text
    order = [
        report.verdict.sentence,
        "How fast",
        "5,180 images/s",
        "5,107–5,253",
        "What limits",
        "data wait, of a training step",
        "loader alone, of the step alone",
        "How sure",
        "± 1.4 %",
        "230 steps in 22.7 s, 95 % confidence",
        "the time was up",
        "GPU 1 was 6 % slower than GPU 0.",
        "What to do",
        "--threads 24",
        "cores are idle while the loader is behind",
        "python -m pipeline.prepare",
        "Stages",
        "Configuration",
        "/data/imagenet",
        "Hardware and origin",
        "580.65",
    ]
    # The title comes before the page; what comes first is the verdict.
    body = text[text.index("\n") :]
    places = [
        body.index(part, body.index("Configuration")) if part == "/data/imagenet" else body.index(part)
        for part in order
    ]
    assert places == sorted(places)


def test_page_has_all_that_was_measured():
    text = page_of(gpu_report()).text
    assert flat(text).count("sw power cap 31.0 %") == 6  # GPU 0, the whole run and each stage
    assert "temperature celsius: Not Supported" in text
    assert "Highest SM clock: 1,980 MHz. Enforced power limit: 700 W." in flat(text)
    assert "MFU: 28.3 %. Images per joule: 4.31." in text
    assert "61.0 GiB of 80.0 GiB, head room 19.0 GiB (24 %)" in text
    assert "1,510,298\n98.0 %" in text  # predicted for 512 ranks
    assert "8 devices a machine, 450 GB/s from each to its peers with in-switch reduction" in text
    assert "H100's NVLink, from the table; network 400 Gbit/s assumed" in text
    assert "time\n4 min 7 s\n5 h 5 min\n" in text  # 1,281,167 images at 5,180 a second; 74 times that
    assert "energy of the GPUs, kWh\n0.0826\n6.11\n" in text
    assert "price, --price-per-hour 12\n0.824\n61.0\n" in text
    assert "ncclDevKernel_AllReduce_Sum_f32_RING_LL\n5.80\n5.7 %\n6.00\n" in text
    assert "busy 86.1 ms" in text
    assert "void multi_tensor_apply_kernel<FusedSgdMathFunctor>\n0.310\n" in text
    layer = next(layer for layer in gpu_report().roofline.layers if layer.name == "features.2")
    assert layer.measured_seconds
    cells = [layer.floor_seconds, layer.floor_seconds_unfused, layer.measured_seconds]
    shown = "\n".join(number(1e3 * seconds) for seconds in cells)
    share = f"{100 * layer.measured_seconds / (512 / 6020):.1f} %"
    assert f"{shown}\n× {number(layer.measured_seconds / layer.floor_seconds_unfused)}\n{share}\n" in text


def test_page_tells_settings_that_were_changed_from_the_rest():
    report = cpu_report()
    text = page_of(report).text
    changed, rest = text.index("What differs from the defaults"), text.index("All other settings")
    assert changed < text.index("arch\nA\nbatch size\n32\n") < rest < text.index("prefetch\n2")
    report.changed = []
    assert "Nothing differs from the defaults." in page_of(report).text


@pytest.mark.seconds
def test_page_without_telemetry_links_trace_memory_and_costs():
    report = cpu_report()
    report.roofline.links = report.costs = None
    text = Page(page(report, pictures_of(report))).text
    assert "there is no NVIDIA driver here. So there are no curves of power" in text
    assert "Nothing is predicted for other numbers of ranks: the links between them are not known." in text
    assert "Images per joule: not measured." in text
    assert "Peak memory of the device: not measured." in text
    assert "Idle gaps" not in text
    assert "an epoch" not in text


def test_page_says_what_a_part_of_a_gpu_cannot_tell():
    report = gpu_report()
    assert "MIG" not in page_of(report).text
    report.telemetry.devices[1].is_mig = True
    report.roofline.images_per_joule = None
    text = page_of(report).text
    assert "so there are no images per joule" in flat(text)
    assert "Images per joule: not measured." in text


def test_page_needs_nothing_else():
    found = page_of(gpu_report())
    links = [value for name, value in found.attributes if name in ("src", "href", "srcset", "data", "action", "poster")]
    assert len(links) == 5
    assert all(link.startswith("data:image/png;base64,") for link in links)
    assert not {"script", "link", "iframe", "object", "embed", "base"} & set(found.tags)
    assert not any(name.startswith("on") or "url(" in value for name, value in found.attributes)
    assert "@import" not in found.style
    assert "url(" not in found.style
    assert ("name", "viewport") in found.attributes


HOSTILE = "</title></style><script>alert('1')</script>&amp;\"\x1b[31m\u202e"
SHOWN = "</title></style><script>alert('1')</script>&amp;\"\\x1b[31m\\u202e"


def hostile(value: object) -> object:
    """The same plain value with every text in it replaced, keys of free choice among them."""
    if isinstance(value, str):
        return HOSTILE
    if isinstance(value, list):
        return [hostile(item) for item in value]
    if isinstance(value, dict):
        return {key: hostile(inner) for key, inner in value.items()}
    return value


def test_page_escapes_what_it_is_given():
    """Every text of the report, and the keys that are no fields."""
    plain = typing.cast(dict, hostile(msgspec.json.decode(msgspec.json.encode(gpu_report()))))
    plain["config"][HOSTILE] = HOSTILE
    plain["telemetry"]["stages"][HOSTILE] = plain["telemetry"]["stages"].pop("loader")
    device = plain["telemetry"]["devices"][0]
    device["missing"][HOSTILE] = HOSTILE
    device["throttled_fraction"][HOSTILE] = 0.5
    report = msgspec.convert(plain, Report)
    found = Page(page(report, {**dict.fromkeys(PICTURES, b"\x89PNG"), "telemetry": HOSTILE}))
    assert "script" not in found.tags
    assert found.text.count(SHOWN) >= 40
    assert "\x1b" not in found.text
    assert "\u202e" not in found.text
    for draw in PICTURES.values():
        draw(report)


def test_what_is_missing_is_not_measured_and_never_nought():
    report = cpu_report()
    stages = report.stages
    stages.reading = stages.decoding = stages.loader = stages.training = report.training_parts = None
    stages.step = rate(118.4, 32, relative_ci=None)
    for row in stage_table(report):
        if row["stage"] == "step alone":
            assert (row["images/s"], row["95 % interval"]) == ("118", "too few steps")
        else:
            assert row == {"stage": row["stage"], "images/s": "not measured"}
    assert surety(report) == "unknown"
    report.hardware.ranks = 2
    text = page_of(report).text
    assert "118 images/s" in text
    assert "in the step alone. A step takes 270 ms on average." in text
    assert "unknown\n120 steps in 32.4 s, too few for a confidence interval; the wanted precision was reached." in text
    assert "95 % confidence" not in text
    assert "all-reduce, exposed\nnot measured\nnot measured\n" in text


def optional_fields(value: object) -> Iterator[tuple[msgspec.Struct, str]]:
    """Each field, at any depth, whose type allows None; of lists and tables, those of the first item."""
    if isinstance(value, msgspec.Struct):
        types = typing.get_type_hints(type(value))
        for field in value.__struct_fields__:
            if type(None) in typing.get_args(types[field]) and not value.__struct_config__.frozen:
                yield value, field
            yield from optional_fields(getattr(value, field))
    elif isinstance(value, list | dict):
        for item in list(value.values() if isinstance(value, dict) else value)[:1]:
            yield from optional_fields(item)


@pytest.mark.seconds
def test_whatever_may_be_none_can_be():
    """Each such field by itself, and at the end all of them together."""
    report = gpu_report()
    fields = list(optional_fields(report))
    assert len(fields) > 30

    def check() -> None:
        assert len(page_of(report).parts) > 50
        assert len(compare(report, gpu_report())) == 10

    for owner, field in fields:
        before = getattr(owner, field)
        setattr(owner, field, None)
        check()
        for name in ("steps", "waterfall", "timeline") if owner is report or owner is report.stages else ():
            PICTURES[name](report)
        setattr(owner, field, before)
    for owner, field in fields:
        setattr(owner, field, None)
    check()
    for draw in PICTURES.values():
        draw(report)


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
@pytest.mark.parametrize("make", [cpu_report, gpu_report])
@pytest.mark.seconds
def test_no_page_is_wider_than_a_phone(make, tmp_path: Path):
    """In an iframe of 390 pixels, since a browser's own window is never that narrow; tables scroll by themselves."""
    report = make()
    html = page(report, pictures_of(report))
    (tmp_path / "frame.html").write_text(
        f'<iframe id=f width=390 height=800 srcdoc="{escape(html)}"></iframe><script>f.onload = () => '
        "document.title = 'width ' + f.contentDocument.documentElement.scrollWidth</script>"
    )
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    flags += [
        "--hide-scrollbars",
        "--disable-component-update",
        "--disable-sync",
        "--virtual-time-budget=5000",
        "--dump-dom",
    ]
    command = ["chromium", *flags, f"--user-data-dir={tmp_path / 'profile'}", (tmp_path / "frame.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "<title>width 390</title>" in done.stdout


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


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (None, "not measured"),
        (0.0, "0 s"),
        (12.34, "12.3 s"),
        (59.4, "59.4 s"),
        (59.6, "1 min 0 s"),
        (247.3, "4 min 7 s"),
        (3599.6, "1 h 0 min"),
        (18303.0, "5 h 5 min"),
        (86399.0, "1 d 0 h"),
        (1e7, "115 d 18 h"),
    ],
)
def test_duration(seconds, words):
    assert duration(seconds) == words
