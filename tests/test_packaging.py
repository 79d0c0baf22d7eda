"""Source archive -> wheel -> import, as an installer does it, without the network."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("csrc", "kernels", "vatt_engine", "setup.py", "CMakeLists.txt", "pyproject.toml", "MANIFEST.in", "LICENSE")


def build(command, folder, out):
    """One hook of the build backend, with the tools beside this interpreter first on the path."""
    environment = {**os.environ, "VATT_CUDA": "OFF"}
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment["PATH"]])
    code = f"from setuptools import build_meta; build_meta.{command}({str(out)!r})"
    run = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]


@pytest.mark.slow
def test_source_archive_to_wheel_to_import(tmp_path):
    tree, out = tmp_path / "tree", tmp_path / "out"
    tree.mkdir(), out.mkdir()
    subprocess.run(["cp", "-a", *(ROOT / part for part in PARTS), tree], check=True)  # links stay links
    for built in (tree / "vatt_engine").glob("_C.*.so"):
        built.unlink()

    build("build_sdist", tree, out)
    with tarfile.open(next(out.glob("*.tar.gz"))) as archive:
        files = {name.partition("/")[2] for name in archive.getnames()}
        archive.extractall(tmp_path / "unpacked", filter="data")
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").iterdir()}
    assert sources | {"CMakeLists.txt", "LICENSE", "vatt_engine/kernels/README.md"} <= files

    (unpacked,) = (tmp_path / "unpacked").iterdir()
    build("build_wheel", unpacked, out)
    with zipfile.ZipFile(next(out.glob("*.whl"))) as wheel:
        files = set(wheel.namelist())
        wheel.extractall(tmp_path / "site")
    kernels = {f"vatt_engine/{path.relative_to(ROOT)}" for path in (ROOT / "kernels").glob("*.py")}
    assert kernels | {"vatt_engine/kernels/README.md", "vatt_engine/ops/tokenize.py"} <= files
    assert {name.partition("/")[0] for name in files if ".dist-info" not in name} == {"vatt_engine"}

    code = "from vatt_engine import _C; print(_C.has_cuda, _C.__file__)"
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path / "site", capture_output=True, text=True)
    assert run.stdout.startswith(f"False {tmp_path / 'site'}"), run.stderr
