import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from matplotlib.image import imread

from vatt_engine.analysis import report
from vatt_engine.analysis.report import plot_losses, plot_monitors, plot_similarity, table


def record(step, **values):
    losses = {"total": 4.0 / step, "video_audio": 5.0 / step, "video_text": 3.0 / step}
    return {"step": step, **losses, "lr": 1e-4, "grad_norm": 1.0, "clips_per_second": 90.0} | values


def write_run(run_dir, records, tail=""):
    run_dir.mkdir(exist_ok=True)
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records) + tail)
    return run_dir


@pytest.fixture
def figures(monkeypatch):
    """The figures drawn, so that tests can read what they show; files are written all the same."""
    drawn = []
    figure = report.new_figure
    monkeypatch.setattr(report, "new_figure", lambda *size: drawn.append(figure(*size)) or drawn[-1])
    return drawn


def lines_of(axes):
    return {line.get_label(): line for line in axes.lines}


def test_losses_are_drawn_as_recorded(tmp_path, figures):
    steps = range(10, 310, 10)
    path = plot_losses(write_run(tmp_path / "run", [record(step) for step in steps]))
    assert path == tmp_path / "run" / "plots" / "loss.png"
    losses, rates, norms = figures[0].axes
    lines = lines_of(losses)
    assert set(lines) == {"total", "video-audio NCE", "video-text MIL-NCE"}
    for label, value in (("total", 4.0), ("video-audio NCE", 5.0), ("video-text MIL-NCE", 3.0)):
        assert lines[label].get_xdata().tolist() == list(steps)
        assert lines[label].get_ydata().tolist() == [value / step for step in steps]
    assert rates.lines[0].get_ydata().tolist() == [1e-4] * 30
    assert norms.lines[0].get_ydata().tolist() == [1.0] * 30
    assert [axes.get_ylabel() for axes in (losses, rates, norms)] == ["loss (nats)", "learning rate", "gradient norm"]
    picture = imread(path)
    assert picture.shape[:2] == (810, 1200)
    assert picture[..., :3].std() > 0.02  # something is drawn


def test_a_missing_modality_is_left_out_and_null_is_a_gap(tmp_path, figures):
    records = [record(1, video_text=0.0, video_audio=None), record(2, video_text=0.0), record(3, video_text=0.0)]
    plot_losses(write_run(tmp_path, records))
    lines = lines_of(figures[0].axes[0])
    assert set(lines) == {"total", "video-audio NCE"}
    assert np.isnan(lines["video-audio NCE"].get_ydata()).tolist() == [True, False, False]


def test_a_record_cut_short_is_ignored_and_no_record_gives_no_picture(tmp_path, figures):
    plot_losses(write_run(tmp_path, [record(1), record(2)], tail='{"step": 3, "tot'))
    assert lines_of(figures[0].axes[0])["total"].get_xdata().tolist() == [1, 2]
    assert plot_losses(write_run(tmp_path / "new", [])) is None
    assert not (tmp_path / "new" / "plots").exists()
    assert plot_losses(write_run(tmp_path / "bare", [{"step": 1}])).exists()


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ('{"step": 1}\n{"step": 2, \n{"step": 3}\n', r"metrics.jsonl:2: line must be JSON"),
        ('{"step": 1}\n[1, 2]\n', r"metrics.jsonl:2: line must be an object with a step, got '\[1, 2\]'"),
        ('{"total": 1}\n', r"metrics.jsonl:1: line must be an object with a step"),
    ],
)
def test_bad_metrics_name_the_line(tmp_path, lines, message):
    (tmp_path / "metrics.jsonl").write_text(lines)
    with pytest.raises(ValueError, match=message):
        plot_losses(tmp_path)


def test_missing_metrics(tmp_path):
    with pytest.raises(ValueError, match="must be a readable file of a run"):
        plot_losses(tmp_path)


def test_similarity_is_drawn_as_given(tmp_path, figures):
    matrix = torch.rand(12, 20, generator=torch.Generator().manual_seed(0), requires_grad=True)
    path = plot_similarity(matrix, tmp_path / "plots" / "s.png", "text -> video", query="text", candidate="video")
    axes = figures[0].axes[0]
    assert torch.equal(torch.from_numpy(np.asarray(axes.images[0].get_array())), matrix.detach().double())
    assert (axes.get_ylabel(), axes.get_xlabel()) == ("text (query)", "video (candidate)")
    assert axes.get_title(loc="left") == "text -> video"
    assert figures[0].axes[1].get_ylabel() == "cosine similarity"
    assert imread(path).shape[:2] == (810, 960)
    for bad in (torch.zeros(3), torch.full((2, 2), torch.nan), torch.zeros(0, 2)):
        with pytest.raises(ValueError, match=r"matrix must be finite \[Nq, Nc\]"):
            plot_similarity(bad, path, "bad")


def test_table_is_aligned():
    rows = [
        {"task": "text -> video", "R@1": 12.54, "MedR": 11.0, "clips": 256},
        {"task": "audio", "R@1": 100.0, "MedR": None, "note": "own"},
    ]
    assert table(rows).split("\n") == [
        "task             R@1  MedR  clips  note",
        "-------------  -----  ----  -----  ----",
        "text -> video   12.5  11.0    256  -",
        "audio          100.0     -      -  own",
    ]
    assert table([]) == ""


def test_matplotlib_is_imported_only_to_draw(tmp_path):
    """Importing the room, reading records and printing tables work without it; drawing says what is missing."""
    write_run(tmp_path, [record(1)])
    code = f"""
import sys
sys.modules["matplotlib"] = None
from vatt_engine.analysis.report import plot_losses, table
print(table([{{"a": 1}}]))
try:
    plot_losses({str(tmp_path)!r})
except RuntimeError as error:
    print(error)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split("\n")[:3] == ["a", "-", "1"]
    assert "matplotlib must be installed for plots" in result.stdout


def test_monitors_are_drawn_by_kind(tmp_path, figures):
    records = [record(n, video_audio_rank=9.0, audio_video_rank=8.0, rss_mb=300 + n, mfu=None) for n in (1, 2, 3)]
    records[1]["video_audio_rank"] = None
    path = plot_monitors(write_run(tmp_path, records))
    assert path == tmp_path / "plots" / "monitors.png"
    panels = {axes.get_title(loc="left"): lines_of(axes) for axes in figures[0].axes}
    assert list(panels) == ["effective rank of the embeddings (1: collapsed)", "clips per second", "memory (MB)"]
    ranks, _, memory = panels.values()
    assert list(ranks) == ["audio_video_rank", "video_audio_rank"]
    np.testing.assert_array_equal(ranks["video_audio_rank"].get_ydata(), [9.0, np.nan, 9.0])
    assert memory["rss_mb"].get_ydata().tolist() == [301.0, 302.0, 303.0]
    assert plot_monitors(write_run(tmp_path / "none", [{"step": 1, "total": 1.0}])) is None
