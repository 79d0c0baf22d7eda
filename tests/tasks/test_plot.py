"""`vatt plot` draws what a run has logged, and says why not."""

from __future__ import annotations

import json

import pytest

from vatt_engine.cli import main


def test_draws_loss_and_monitors(tmp_path, capsys):
    records = [{"step": n, "total": 2.0 / n, "lr": 1e-3, "video_audio_rank": 3.0, "rss_mb": 500} for n in (1, 2)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert main(["plot", str(tmp_path)]) == 0
    paths = [tmp_path / "plots" / name for name in ("loss.png", "monitors.png")]
    assert capsys.readouterr().out.split() == [str(path) for path in paths]
    assert all(path.stat().st_size > 5000 for path in paths)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["a", "b"], "vatt plot: the arguments before the flags must be RUN, got ['a', 'b']."),
        (["--what"], "vatt plot: --what must be a flag of this command, got an unknown one."),
        (["nowhere"], "nowhere/metrics.jsonl: metrics must be a readable file of a run"),
        (["."], "vatt plot: . must have logged a step, got an empty metrics.jsonl."),
    ],
)
def test_refuses(tmp_path, monkeypatch, capsys, argv, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("")
    assert main(["plot", *argv]) == 2
    assert message in capsys.readouterr().err
