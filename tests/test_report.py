"""deploy.report: the page says what report.json says, for whole and for sparse reports."""

import copy
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from deploy import report
from deploy.report import count, ms, percent, plain, render
from nas.errors import NasctlError


def make_report():
    front = [
        {
            "arch_text": f"net {k}",
            "genes": [k],
            "macs": 10**6 * k,
            "params": 1000 * k,
            "val_ce": 1.0 / k,
            "val_accuracy": 0.7 + 0.05 * k,
            "latency_ms": float(k),
            "low_ms": 0.9 * k,
            "high_ms": 1.2 * k,
            "source": "calibrated",
            "measured_ms": 1.05 * k if k == 2 else None,
        }
        for k in (1, 2, 3)
    ]
    return {
        "nasctl": "0.1.0",
        "created": "2026-01-01",
        "spec": {"data": "digits", "space": "resnet", "seed": 3, "storage": None},
        "device": {"name": "jetson", "runtime": "onnxruntime"},
        "chosen": {
            "arch": {"widths": [16, 24], "resolution": 32},
            "genes": [2],
            "macs": 2_000_000,
            "params": 2000,
            "val_ce": 0.5,
            "val_accuracy": 0.8,
            "torch_test_accuracy": 0.7912,
            "test_accuracy": 0.7913,
            "latency": {
                "predicted": {
                    "value_ms": 2.0,
                    "low_ms": 1.8,
                    "high_ms": 2.4,
                    "source": "calibrated",
                    "shares": {"calibrated": 1.0},
                },
                "measured": {
                    "median_ms": 2.11,
                    "p95_ms": 2.34,
                    "spread_ms": 0.1,
                    "n": 20,
                    "noisy": "",
                    "on": "board 7",
                },
            },
            "file": {"path": "model.onnx", "sha256": "c0ffee", "bytes": 1234},
            "parity": {"max_abs_error": 1.5e-6},
        },
        "budget": {"latency_ms": 2.5},
        "front": front,
        "evaluated": [[1.0, 1.0, 0.75], [1.5, 1.2, 0.7], [None, 0.9, 0.8]],
        "stages": [{"name": "train", "seconds": 61.25}],
        "not_measured": ["energy per inference"],
        "environment": {"cpu": "a processor", "torch": "2.6"},
    }


@pytest.fixture(scope="module")
def html():
    """The page of the whole report; drawing it is what takes time."""
    return render(make_report())


class Page(HTMLParser):
    """Text, tags and what is fetched; fails on tags that do not nest."""

    VOID = {"meta", "br"}

    def __init__(self, html):
        super().__init__()
        self.stack, self.texts, self.tags, self.links = [], [], [], []
        self.feed(html)
        self.close()
        assert self.stack == []
        self.text = " ".join(" ".join(self.texts).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [v for k, v in attrs if k in ("src", "href", "xlink:href") and v[0] != "#"]
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.stack.pop()

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        if "style" not in self.stack:
            self.texts.append(data)


def test_every_fact_is_on_the_page(html):
    text = Page(html).text
    for fact in (
        "resnet on jetson",
        "inside the budget of 2.5 ms",
        "3 networks were evaluated",
        "interval 1.80 ms to 2.40 ms calibrated",
        "2.11 ms median; p95 2.34 ms, 20 rounds. board 7",
        "79.13 % of the exported file; 79.12 % before export",
        "2 MMACs",
        "widths 16, 24 · resolution 32",
        "energy per inference",
        "c0ffee",
        "1.5e-06",
        "a processor",
        "seed 3",
        "61.2 s",
    ):
        assert fact in text, fact


def test_the_page_stands_alone(html):
    page = Page(html)
    assert page.links == []
    assert "script" not in page.tags
    assert "svg" in page.tags


def test_the_chosen_row_is_marked_once(html):
    row = re.search(r'<tr class="pick">(.*?)</tr>', html, re.DOTALL)
    assert "net 2" in row.group(1)
    assert html.count('<tr class="pick">') == 1


def test_the_chosen_row_is_found_by_its_cost_where_rows_have_no_genes():
    given = make_report()
    for row in given["front"]:
        del row["genes"]
    given["chosen"]["val_ce"] = given["front"][1]["val_ce"]
    assert 'class="pick"' in render(given)
    given["chosen"]["val_ce"] = 0.1234  # fine-tuned, say: no row is it, none is marked
    assert 'class="pick"' not in render(given)


def test_without_measurements_it_says_so():
    bare = make_report()
    bare["chosen"]["latency"]["measured"] = None
    bare["chosen"] |= {"test_accuracy": None, "torch_test_accuracy": None, "parity": None}
    text = Page(render(bare)).text
    assert "Measured latency not measured The exported file was not run on jetson." in text
    assert "Test accuracy not measured" in text
    assert "not checked" in text
    assert "2.11" not in text


def test_a_noisy_measurement_is_flagged():
    noisy = make_report()
    noisy["chosen"]["latency"]["measured"]["noisy"] = "the reference moved by 9 %"
    assert "in doubt: the reference moved by 9 %" in Page(render(noisy)).text


def test_without_a_budget_the_page_names_the_knee():
    free = make_report() | {"budget": None}
    text = Page(render(free)).text
    assert "No budget was given: this is the knee" in text
    assert "budget of" not in text


def test_the_least_report_renders_without_a_plot():
    least = {
        "nasctl": "0.1.0",
        "created": "2026-01-01",
        "spec": {},
        "device": {},
        "chosen": {"arch": {}, "macs": 1, "params": 1},
    }
    page = Page(render(least))
    assert "svg" not in page.tags
    assert "not predicted" in page.text


def test_a_front_without_latency_is_drawn_over_macs():
    by_macs = make_report() | {"budget": {"macs": 2.5e6}}
    for row in by_macs["front"]:
        row["latency_ms"] = row["low_ms"] = row["high_ms"] = None
    assert "million MACs" in Page(render(by_macs)).text


def test_a_budget_far_off_does_not_press_the_networks_into_a_corner(html):
    far = render(make_report() | {"budget": {"latency_ms": 500.0}})
    assert "budget 500, far to the right" in Page(far).text
    assert "far to the right" not in html
    ticks = re.findall(r">([0-9.]+)</text>", far)
    assert max(map(float, ticks)) < 10


def test_the_plot_shows_what_the_front_is_a_front_in(html):
    given = make_report()
    assert "cross-entropy (nats)" in Page(html).text
    for row in given["front"]:
        row["val_ce"] = None
    assert "validation accuracy (%)" in Page(render(given)).text


def test_names_are_escaped_everywhere():
    evil = "<script>alert('x')</script>"
    hostile = make_report()
    hostile["device"]["name"] = evil
    hostile["spec"]["data"] = evil
    hostile["spec"][evil] = [evil]
    hostile["chosen"]["arch"] = {"classes": [evil]}
    hostile["front"][1]["arch_text"] = evil
    hostile["not_measured"] = [evil]
    hostile["environment"] = {evil: evil}
    page = Page(render(hostile))
    assert "script" not in page.tags
    assert page.text.count(evil) >= 8


def test_same_report_same_page_and_the_report_is_not_changed(html):
    given = make_report()
    before = copy.deepcopy(given)
    assert render(given) == html
    assert given == before


def test_plot_colours_follow_the_page(html):
    svg = html[html.index("<svg") : html.index("</svg>")]
    assert "var(--front)" in svg and "var(--pick)" in svg and "var(--limit)" in svg
    assert not re.search(r"#0[1-7]0[1-7]0[1-7]", svg)


def test_a_hundred_thousand_networks_make_a_small_page():
    many = make_report()
    rng = np.random.default_rng(0)
    many["evaluated"] = rng.uniform(0.1, 1.0, (100_000, 3)).tolist()
    dots = report._evaluated(many["evaluated"], report._axes(many["front"]))
    assert 1_000 < len(dots) <= 401 * 251
    spread = report._evaluated([[1.0, 0.5, 0.5]] * 10, report._axes(many["front"]))
    assert len(spread) == 1


def test_an_older_report_is_a_clear_error():
    old = make_report()
    del old["chosen"]
    with pytest.raises(NasctlError, match="lacks chosen"):
        render(old)


def test_written_whole(tmp_path, html):
    report.write(make_report(), tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text() == html


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (ms(0.0123), "0.0123 ms"),
        (ms(1.2345), "1.23 ms"),
        (ms(12.345), "12.3 ms"),
        (ms(1234.5), "1,234 ms"),
        (ms(0), "0.00 ms"),
        (ms(None), "–"),
        (count(1_234_567), "1.23 M"),
        (count(999), "999"),
        (count(2.5e9), "2.5 G"),
        (count(999, "B"), "999 B"),
        (count(1_234_567, "B"), "1.23 MB"),
        (percent(0.98765), "98.77 %"),
        (plain({"a": [1, 2], "b": None}), "a 1, 2 · b –"),
        (plain([[24, 32], [48]]), "24-32, 48"),
    ],
)
def test_numbers_as_text(shown, expected):
    assert shown == expected
