"""What a command lacks is told at once, before it starts."""

import subprocess
import sys

import pytest

from vatt_engine.cli import main
from vatt_engine.refusals import Refusals
from vatt_engine.schema import ConfigError


@pytest.mark.parametrize(
    ("argv", "lacking"),
    [
        (
            "pretrain demo --data.train a.jsonl b.csv --heldout c.jsonl --text.vocabulary d.json --text.vectors e.bin",
            ["a.jsonl", "b.csv", "c.jsonl", "d.json", "e.bin"],
        ),
        ("finetune demo --data.train a.jsonl --test b.jsonl --init c", ["a.jsonl", "b.jsonl", "c"]),
        ("finetune demo --resume none --data.train a.jsonl --test b.jsonl --init c", ["a.jsonl", "b.jsonl", "c"]),
        ("probe r --train a.jsonl b.jsonl --test c.jsonl d.jsonl", ["a.jsonl", "c.jsonl", "b.jsonl", "d.jsonl", "r"]),
        ("retrieve r --data a.jsonl", ["r", "a.jsonl"]),
        ("data check a.jsonl --out no/b.jsonl", ["a.jsonl", "vatt data check"]),
    ],
)
def test_all_that_is_not_there_is_told_at_once(tmp_path, monkeypatch, capsys, argv, lacking):
    monkeypatch.chdir(tmp_path)
    assert main(argv.split()) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(": ")[0].removesuffix("/config.yaml") for line in lines] == lacking
    assert list(tmp_path.iterdir()) == []


def test_the_same_refusal_is_told_once():
    refusals = Refusals()
    assert refusals.of(open, "/nowhere") is None
    refusals.of(open, "/nowhere")
    refusals.of(int, "7")
    with pytest.raises(ConfigError) as error:
        refusals.settle()
    assert str(error.value) == "/nowhere: No such file or directory."
    with pytest.raises(ZeroDivisionError):
        refusals.of(lambda: 1 / 0)


def test_flags_are_told_at_once(capsys):
    assert main(["data", "import", "--mdia", "x", "--splt", "y"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert "--mdia must be a flag of this command" in lines[0]
    assert "--splt must be a flag of this command" in lines[1]
    assert main(["data", "import", "esc50"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(" must ")[0] for line in lines] == ["vatt data import: --media", "vatt data import: --out"]
    assert lines[0].endswith(", got nothing.")


QUICK = (["--help"], ["data", "--help"], ["data", "import", "--help"], ["data", "merge", "--help"])


def test_help_that_needs_no_torch_does_not_import_it():
    code = f"""
import sys
from vatt_engine.cli import main
for argv in {QUICK!r}:
    try:
        main(argv)
    except SystemExit:
        pass
    assert "torch" not in sys.modules, argv
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
