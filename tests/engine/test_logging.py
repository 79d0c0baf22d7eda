"""A run folder can be read by a person, by json, and after a crash."""

from __future__ import annotations

import io
import json
import math
import sys
import types

import pytest

from vatt_engine.engine.logging import NoLog, RunLog, environment


def records(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_one_json_object_per_record(tmp_path):
    log = RunLog(tmp_path / "run", 100, stream=io.StringIO())
    log.write(10, {"total": 2.5, "video_audio": math.nan, "lr": 1e-4}, clips=640)
    log.write(20, {"total": 2.25, "lr": 1e-4}, clips=640)
    log.close()
    first, second = records(tmp_path / "run")
    assert (first["step"], first["total"], first["video_audio"], first["lr"]) == (10, 2.5, None, 1e-4)
    assert first["clips_per_second"] > 0
    assert first["eta_seconds"] == pytest.approx(first["seconds"] / 10 * 90)
    assert second["eta_seconds"] == pytest.approx(second["seconds"] / 20 * 80)


def test_resume_drops_what_a_dead_process_wrote_after_its_checkpoint(tmp_path):
    lines = [json.dumps({"step": step, "total": 1.0}) for step in (10, 20, 30)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 40, "to')
    log = RunLog(tmp_path, 100, resume_step=20, stream=io.StringIO())
    record = log.write(30, {"total": 0.5}, clips=64)
    log.close()
    assert [(r["step"], r["total"]) for r in records(tmp_path)] == [(10, 1.0), (20, 1.0), (30, 0.5)]
    assert record["eta_seconds"] == pytest.approx(record["seconds"] / 10 * 70)


def test_progress_is_a_line_each_or_one_rewritten(tmp_path):
    plain, terminal = io.StringIO(), Terminal()
    for stream in (plain, terminal):
        log = RunLog(tmp_path, 100, stream=stream)
        log.write(10, {"total": 12.5, "skipped": 0}, clips=64)
        log.write(20, {"total": 2.5, "skipped": 0}, clips=64)
        log.say("saved")
        log.close()
    assert plain.getvalue().startswith("step 10/100  total 12.5  ")
    assert "clips/s  eta 0:00" in plain.getvalue()
    assert "skipped" not in plain.getvalue()
    assert plain.getvalue().count("\n") == 3
    assert terminal.getvalue().count("\r") == 2
    assert terminal.getvalue().endswith("\nsaved\n")


def test_a_run_goes_on_when_nobody_watches(tmp_path):
    class Gone(io.StringIO):
        def flush(self):
            raise BrokenPipeError

    with RunLog(tmp_path, 100, stream=Gone()) as log:
        log.say("start")
        log.write(10, {"total": 2.5}, clips=64)
    assert records(tmp_path)[0]["total"] == 2.5


def test_tensorboard_gets_the_same_numbers(tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    log = RunLog(tmp_path, 100, tensorboard=True, stream=io.StringIO())
    log.write(10, {"total": 2.5}, clips=64)
    log.close()
    read = events.EventAccumulator(str(tmp_path / "tb"))
    read.Reload()
    assert [(event.step, event.value) for event in read.Scalars("total")] == [(10, 2.5)]


def test_missing_tensorboard_is_a_clear_error(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(
        ValueError, match=r"engine\.tensorboard: tensorboard must be installed.*pip install tensorboard"
    ):
        RunLog(tmp_path, 100, tensorboard=True)


def test_wandb_gets_the_same_numbers_and_goes_on_in_the_same_run(tmp_path, monkeypatch):
    calls, ids = [], []

    class Run:
        def log(self, values, step):
            calls.append((step, values["total"]))

        def finish(self):
            calls.append("finished")

    def init(**settings):
        ids.append(settings["id"])
        assert (settings["project"], settings["name"]) == ("vatt_engine", tmp_path.name)
        return Run()

    fake = types.ModuleType("wandb")
    fake.init = init
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for step in (10, 20):
        with RunLog(tmp_path, 100, wandb=True, stream=io.StringIO(), resume_step=step - 10) as log:
            log.write(step, {"total": step / 10}, clips=64)
    assert calls == [(10, 1.0), "finished", (20, 2.0), "finished"]
    assert ids[0] == ids[1]
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"engine\.wandb: wandb must be installed.*pip install wandb"):
        RunLog(tmp_path, 100, wandb=True)


def test_mfu_is_model_flops_over_the_devices(tmp_path):
    with RunLog(tmp_path, 100, stream=io.StringIO(), flops_per_clip=2e9, peak_flops=1e12) as log:
        record = log.write(10, {"total": 1.0}, clips=64)
    assert record["mfu"] == pytest.approx(record["clips_per_second"] * 2e9 / 1e12)


def test_going_back_drops_the_records_and_leaves_an_event(tmp_path):
    out = io.StringIO()
    with RunLog(tmp_path, 100, stream=out) as log:
        for step in (10, 20, 30):
            log.write(step, {"total": 1.0}, clips=64)
        log.go_back(10)
        log.event(30, "the loss jumps", to=10)
        log.write(20, {"total": 0.5}, clips=64)
    assert [(r["step"], r["total"]) for r in records(tmp_path)] == [(10, 1.0), (20, 0.5)]
    assert json.loads((tmp_path / "events.jsonl").read_text()) == {"step": 30, "event": "the loss jumps", "to": 10}
    assert "step 30: the loss jumps, to 10" in out.getvalue()


def test_a_rank_with_nothing_to_say_has_the_same_calls():
    with NoLog() as log:
        assert log.write(1, {"total": 2.0}, clips=3) is None
        with pytest.raises(AttributeError, match="evaluate"):
            log.evaluate(1, {})


def test_logs_that_cannot_be_written_end_nothing(tmp_path, capsys):
    class Broken:
        name, faults = "Board", (OSError,)

        def write(self, step, values):
            raise OSError("quota exceeded")

        close = write

    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")  # a log in an encoding that has few characters
    with RunLog(tmp_path, 100, stream=out) as log:
        log.sinks = [Broken()]
        (tmp_path / "file").write_text("")
        kept, log.records.path = log.records.path, tmp_path / "file" / "metrics.jsonl"
        log.write(10, {"total": 2.5}, clips=64)
        log.say("saved caf\xe9 \U0001f600")
        log.go_back(5)
        log.records.path = kept
        log.write(20, {"total": 2.0}, clips=64)
    assert [record["step"] for record in records(tmp_path)] == [10, 20]
    assert capsys.readouterr().err.count("file/metrics.jsonl must be written, got: ") == 1
    shown = out.buffer.getvalue().decode("ascii")
    assert shown.count("Board must take the records, got: quota exceeded") == 1
    assert "saved caf? ?" in shown


def test_environment_is_an_allow_list(monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    found = environment("cpu")
    assert set(found) == {
        "python",
        "system",
        "machine",
        "cpus",
        "usable_cpus",
        "threads",
        "device",
        "gpu",
        "cuda",
        "versions",
        "commit",
    }
    assert found["versions"]["torch"]
    assert "hunter2" not in json.dumps(found)
