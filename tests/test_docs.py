"""What the documents tell a reader to type works: their Python and shell snippets, and the examples in docstrings."""

import doctest
import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in (ROOT / "vatt_engine").rglob("*.py")
    if ">>> " in path.read_text()
)
VATT = "import sys; from vatt_engine.cli import main; sys.exit(main())"


def snippets(text):
    """(language, code, reason not to run or None) of every fenced block; the reason stands in a comment above."""
    pattern = r"(?:<!-- not run: (?P<reason>[^\n]+?) -->\n)?^```(?P<language>\w+)\n(?P<code>.*?)^```$"
    for found in re.finditer(pattern, text, flags=re.MULTILINE | re.DOTALL):
        yield found["language"], found["code"], found["reason"]


def commands(code):
    """The words of every command of a shell snippet, continued lines joined, comments and prompts left out."""
    for line in code.replace("\\\n", " ").splitlines():
        words = shlex.split(line.removeprefix("$ "), comments=True)
        if words:
            yield words


def make_targets():
    return set(re.findall(r"^([a-z][\w-]*):(?!=)", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))


def run_command(words, folder):
    """Run a `vatt` command, look up a `make` one; others (cd, pip, git) are the reader's own. Says whether it did."""
    if words[0] == "make":
        goals = [word for word in words[1:] if "=" not in word]
        assert set(goals) <= make_targets(), f"{shlex.join(words)}: not a target of the Makefile"
        return bool(goals)
    if words[0] == "vatt":
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        run = subprocess.run(
            [sys.executable, "-c", VATT, *words[1:]],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": path},
            capture_output=True,
            text=True,
        )
        assert run.returncode == 0, f"{shlex.join(words)}\n{run.stdout[-2000:]}\n{run.stderr[-2000:]}"
        return True
    return False


@pytest.mark.slow
@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_snippets_run(document, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace, ran = {"__name__": "__main__"}, 0
    for language, code, reason in snippets(document.read_text()):
        if language == "python":
            assert reason is None, "a Python snippet always runs"
            exec(compile(code, document.name, "exec"), namespace)
            ran += 1
        elif language in ("bash", "sh", "shell", "console") and reason is None:
            ran += sum(run_command(words, tmp_path) for words in commands(code))
    assert ran, f"{document.name} has no snippet that this test can run"


def test_snippets_are_found():
    text = "```python\nx = 1\n```\n\n<!-- not run: needs the network -->\n```bash\ngit clone x\n```\n"
    assert list(snippets(text)) == [("python", "x = 1\n", None), ("bash", "git clone x\n", "needs the network")]
    assert list(commands("# first\n$ vatt a \\\n  --b 'c d'  # why\n")) == [["vatt", "a", "--b", "c d"]]


def test_a_wrong_target_is_found(tmp_path):
    assert {"demo", "test", "lint", "bench", "gpu", "clean"} <= make_targets()
    assert run_command(["make", "gpu", "PART=test"], tmp_path)
    with pytest.raises(AssertionError, match="make tset: not a target"):
        run_command(["make", "tset"], tmp_path)


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(name)
    result = doctest.testmod(
        module, extraglobs={"torch": torch}, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    )
    assert result.failed == 0
