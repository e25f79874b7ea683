"""The report opens offline, is safe, and its pictures exist."""

import re
from html.parser import HTMLParser

import pytest
from eval_cases import Scenario, synthetic_measure

from eval.compare import compare
from eval.points import Contender, Evaluator, PointSettings
from eval.report import write_report
from eval.store import read_json


class Page(HTMLParser):
    """Collects what a browser would fetch or run, and the text."""

    def __init__(self, html):
        super().__init__()
        self.outside, self.text, self.pictures = [], [], 0
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        if tag in ("script", "iframe", "object", "link"):
            self.outside.append(tag)
        if tag == "svg":
            self.pictures += 1
        for key in ("src", "href", "xlink:href"):
            if key in found and not found[key].startswith("#"):
                self.outside.append(found[key])

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(params=["goodput", "rates"])
def result(request):
    contenders = [Contender("x1"), Contender("x1.2", label="<b>bold</b> & co", tuned=True)]
    rates = [20.0, 30.0] if request.param == "rates" else None
    with Evaluator(Scenario(), PointSettings(n_requests=500), measure=synthetic_measure) as evaluator:
        compared = compare(evaluator, contenders, [0, 1], rates=rates, start=8.0, resamples=200)
    settings = {"scenario": "tiny", "seeds": [0, 1], "warmup": 0.05, "drain": 0.0, "commit": "abc123"}
    return compared | {"settings": settings | {"scenario_yaml": "name: <script>alert(1)</script>\n"}}


def test_report_is_one_offline_file_with_all_numbers(result, tmp_path):
    written = write_report(result, tmp_path)
    html = written["report"].read_text()
    page = Page(html)
    assert page.outside == []
    assert page.pictures == len(written) - 2
    text = " ".join(page.text)
    for needed in ("<b>bold</b> & co", "abc123", "<script>alert(1)</script>", "95 % interval", "beats"):
        assert needed in text
    assert len(html) < 2_000_000
    assert read_json(written["result"]) == result


def test_pictures_lie_beside_the_report_and_ids_do_not_clash(result, tmp_path):
    written = write_report(result, tmp_path)
    for name, path in written.items():
        if path.suffix == ".png":
            assert path.read_bytes().startswith(b"\x89PNG"), name
    html = written["report"].read_text()
    for reference in set(re.findall(r'(?:url\(|href=")#([^)"]+)', html)):
        assert html.count(f'id="{reference}"') == 1, reference
