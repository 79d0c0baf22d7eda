"""The doctor says what is there, why the rest is not, and never fails."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import torch

from vatt_engine import dispatch
from vatt_engine.cli import main
from vatt_engine.tasks import doctor


def test_reports_every_section(capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    sections = ("machine", "packages", "GPU", "native module", "ops (first that can run is used)", "media")
    for title in (*sections, "DALI (prepared shards)"):
        assert f"\n{title}\n" in f"\n{out}"
    assert torch.__version__.split("+")[0] in out
    for op in dispatch.list_ops():
        assert f"{op} on cpu" in out
    assert "reference: can run" in out


def test_says_why_a_gpu_is_missing(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert dict(doctor.report()["GPU"])["devices"] == "none: this torch is a CPU build; install a CUDA build of torch"


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    [(name, text)] = doctor.report()["media"]
    assert name == "PyAV"
    assert "cannot be imported" in text
    assert "pip install av" in text


def test_missing_codecs_are_named(monkeypatch):
    monkeypatch.setattr(doctor, "DECODERS", ("h264", "nonsense"))
    lines = dict(doctor.report()["media"])
    assert (lines["decodes"], lines["does not decode"]) == ("h264", "nonsense")


def test_a_broken_part_does_not_stop_the_rest(monkeypatch):
    def broken(*args, **kwargs):
        raise OSError("broken driver")

    monkeypatch.setattr(dispatch, "list_ops", broken)
    found = doctor.report("/nowhere/at/all")
    assert found["ops (first that can run is used)"] == [("could not be examined", "OSError: broken driver")]
    assert found["machine"][0][0] == "could not be examined"
    assert dict(found["packages"])["torch"]


def test_dali_says_what_it_lacks(monkeypatch):
    monkeypatch.setattr(doctor, "dali_missing", lambda device: None if device == "cpu" else "no decoder here.")
    monkeypatch.setattr(doctor.importlib, "import_module", lambda name: SimpleNamespace(__version__="9.9"))
    assert dict(doctor.report()["DALI (prepared shards)"])["on the GPU"] == "no decoder here."
    monkeypatch.setattr(doctor, "dali_missing", lambda device: "not installed.")
    assert doctor.report()["DALI (prepared shards)"] == [("DALI", "not installed.")]
