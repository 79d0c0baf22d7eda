"""The page holds what it was given, as text and never as markup, and asks nothing of anybody."""

import base64
import io
from html.parser import HTMLParser

import pytest
import torch
from matplotlib.image import imread

from vatt_engine.analysis.report_page import Answer, RunReport, page, thumbnail

EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)> \"'&{title} $\\frac$"


class Reader(HTMLParser):
    """Tags with their attributes, and all text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self.open = [], "", []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def run_report(name, **changes):
    image = thumbnail(torch.arange(12 * 8 * 3, dtype=torch.uint8).view(12, 8, 3))
    answers = {EVIL: [Answer(image, EVIL, 0.93, True), Answer(image, "other", -0.5, False)]}
    records = [{"step": step, "total": 2.0 / step, "video_audio": None, "video_text": 0.0} for step in (1, 2, 3)]
    fields = {
        "facts": {EVIL: EVIL, "step": 3},
        "records": records,
        "results": {EVIL: [{"task": EVIL, "R@1": 12.5, "queries": 8}]},
        "answers": answers,
        "plots": {EVIL: image},
    }
    return RunReport(name=name, **(fields | changes))


def test_names_and_captions_stay_text():
    read = Reader(page(EVIL, [run_report(EVIL), run_report("second", facts={"step": 7})]))
    assert read.open == []
    assert {tag for tag, _ in read.tags}.isdisjoint({"script", "iframe", "object", "link", "a", "form"})
    assert [name for _, attributes in read.tags for name in attributes if name.startswith("on")] == []
    assert read.text.count(EVIL) >= 9, "title, heading, facts, table, task, query, captions"
    images = [attributes for tag, attributes in read.tags if tag == "img"]
    assert len(images) == 1 + 2 * 2 + 2  # curves; two answers in each run; a plot of each
    for attributes in images:
        assert base64.b64decode(attributes["src"].removeprefix("data:image/png;base64,")).startswith(b"\x89PNG")
    assert next(a["content"] for _, a in read.tags if "content" in a).startswith("default-src 'none'; img-src data:;")


def test_what_is_not_there_has_no_section():
    bare = run_report("bare", records=[], results={}, answers={}, plots={})
    read = Reader(page("one", [bare]))
    assert [tag for tag, _ in read.tags].count("h2") == 1
    assert "12.5" not in read.text
    assert "12.5" in Reader(page("two", [bare, run_report("full")])).text


def test_right_answers_are_framed():
    read = Reader(page("one", [run_report("full")]))
    assert [
        a["class"] for tag, a in read.tags if a.get("class", "").startswith("clip ") or a.get("class") == "clip"
    ] == [
        "clip right",
        "clip",
    ]
    assert "0.93-0.50" in read.text


@pytest.mark.parametrize(("height", "width", "expected"), [(48, 48, (48, 48)), (224, 320, (56, 80)), (97, 1, (49, 1))])
def test_thumbnails_fit(height, width, expected):
    frame = torch.randint(0, 256, (height, width, 3), dtype=torch.uint8)
    found = imread(io.BytesIO(thumbnail(frame)))
    assert found.shape[:2] == expected
    assert tuple((found[0, 0, :3] * 255).round()) == tuple(frame[0, 0].tolist())
