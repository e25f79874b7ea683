"""The report opens offline, is safe, and its pictures exist."""

import re
from html.parser import HTMLParser

import pytest
from eval_cases import Scenario, synthetic_measure

from engine.common.files import read_json
from env.measure.contender import Contender, PointSettings
from env.measure.evaluator import Evaluator
from eval.compare.paired import compare
from eval.report.page import write_report


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
    return compared.having(settings=settings | {"scenario_yaml": "name: <script>alert(1)</script>\n"})


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
    assert read_json(written["result"]) == result.to_json()


WATCHED = {
    "subject": "x1.2 <i>",
    "rival": "x1",
    "rate": 30.0,
    "seed": 1,
    "timeline": {
        "at_s": [0.0, 1.0, 2.0],
        "roles": {"prefill": [2, 1, 1], "decode": [2, 3, 3]},
        "decode_sm_share": [0.5, 0.25, 0.5],
        "attained_at_s": [0.5, 1.5],
        "subject": [1.0, 0.25],
        "rival": [1.0, None],
        "arrivals_per_s": [3.0, 5.0],
    },
    "kinds": {"PLACE_PREFILL": {"decisions": 1000, "differing": 250}},
    "differing": {
        "groups": {
            "placed differently": {"requests": 250, "good": 200, "good_under_rival": 190, "gained": 17, "lost": 7}
        },
        "ways": {
            "hold instead of a mixed instance": {
                "requests": 9,
                "good": 1,
                "good_under_rival": 8,
                "gained": 0,
                "lost": 7,
            }
        },
    },
}


def test_a_watched_run_is_told_with_its_losses(result, tmp_path):
    written = write_report(result.having(shadow=WATCHED), tmp_path)
    page = Page(written["report"].read_text())
    text = " ".join(" ".join(page.text).split())
    assert page.outside == []
    assert {"timeline", "decisions"} <= set(written)
    for needed in (
        "250 of 1,000 decisions differ (25.0 %)",
        "17 gained, 7 lost",
        "hold instead of a mixed instance",
        "x1.2 <i>",
        "longest wait for a first token",
    ):
        assert needed in text, needed


def test_scaled_targets_stand_in_the_title(result, tmp_path):
    result.settings["slo_scale"] = 0.5
    assert "targets times 0.5</h1>" in write_report(result, tmp_path)["report"].read_text()


def test_the_worst_class_is_named(result, tmp_path):
    for side in result.policies:
        for point in side.points:
            shares = {"slo_attainment": 0.25, "ttft": 0.5, "tpot": 0.5}
            point["slo_attainment_by_class"] = {"chat": shares | {"slo_attainment": 0.9}, "batch <b>": shares}
    text = " ".join(Page(write_report(result, tmp_path)["report"].read_text()).text)
    assert "its worst class, batch <b>, meets its targets for 25.0 %" in text


def test_pictures_lie_beside_the_report_and_ids_do_not_clash(result, tmp_path):
    written = write_report(result, tmp_path)
    for name, path in written.items():
        if path.suffix == ".png":
            assert path.read_bytes().startswith(b"\x89PNG"), name
    html = written["report"].read_text()
    for reference in set(re.findall(r'(?:url\(|href=")#([^)"]+)', html)):
        assert html.count(f'id="{reference}"') == 1, reference
