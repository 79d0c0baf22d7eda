"""The native module: what it needs (nothing), what it refuses, and what nvcc made of its kernels."""

import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

import pytest
import torch
from machine_code import dump, needs_machine_code, resources
from torch.utils.dlpack import to_dlpack

import vatt_engine
from vatt_engine import _C

ROOT = Path(__file__).resolve().parents[1]


def test_imports_with_no_torch_no_gpu_and_no_driver():
    code = f"""
import importlib.util, sys
sys.modules['torch'] = None  # importing it raises
spec = importlib.util.spec_from_file_location('vatt_engine._C', {_C.__file__!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
libraries = open('/proc/self/maps').read()
print(module.__version__, [name for name in ('libcuda', 'libcudart', 'libtorch', 'libc10') if name in libraries])
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={"CUDA_VISIBLE_DEVICES": ""})
    assert run.returncode == 0, run.stderr
    assert run.stdout.split(maxsplit=1)[1] == "[]\n"


def test_says_what_it_is():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert _C.__version__ == version, "the native module is from another version: build it again"
    assert vatt_engine.__version__ == version
    assert isinstance(_C.has_cuda, bool)
    assert bool(_C.cuda_archs) == _C.has_cuda


# What runs in clones: tokenize's patches, dropout, attention's softmax and its gradient, the colours of frames.
IN_CLONES = """
import hashlib, torch
from torch.utils.dlpack import to_dlpack
from vatt_engine import _C

def draw(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)

outputs = []
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    x = draw(3, 1001, dtype=dtype)
    outputs.append(torch.empty_like(x))
    _C.dropout(to_dlpack(x), to_dlpack(outputs[-1]), 12345, 1 << 29, 1.25, 1)
scores, grads, lse, seed = draw(2, 37, 37), draw(2, 37, 37) + 1, draw(2, 37), torch.tensor(3)
places = [to_dlpack(x) for x in (scores, grads, lse, draw(2, 37), seed)]
again = scores.clone()
_C.attention_softmax(to_dlpack(again), to_dlpack(torch.empty_like(lse)), places[4], 0, 0.1, 0.25, 1)
_C.attention_gradients(*places, 0, 0.1, 0.25, 1)
frames = (100 * draw(2, 31, 33, 3)).abs().to(torch.uint8)
video, patches = frames.clone()[None], torch.empty(50, 108)
_C.tokenize_patches(to_dlpack(video), None, None, None, to_dlpack(patches), [30, 30], [2, 6, 3], False, 0, 0, 1)
_C.color_jitter(to_dlpack(frames), 0.1, 1.3, 0.7, 0.13)
outputs += [again, scores, grads, frames, patches]
print(_C.cpu_level, *(hashlib.sha256(x.view(torch.uint8).numpy().tobytes()).hexdigest() for x in outputs))
"""


def in_clones(level):
    command = [sys.executable, "-c", IN_CLONES]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"VATT_CPU_LEVEL": level}, cwd=ROOT)


def test_every_level_of_the_instruction_set_gives_the_same_bits():
    """The clones have no fused products and no reordered sums: which one runs is a matter of speed alone."""
    best, *others = (in_clones(level).stdout.split() for level in ("4", "3", "1"))
    assert others[1][0] == "1"
    assert int(others[1][0]) <= int(others[0][0]) <= int(best[0]) <= 4
    assert len(best) == 9
    assert best[1:] == others[0][1:] == others[1][1:]


def test_a_level_that_does_not_exist_is_refused():
    run = in_clones("avx2")
    assert run.returncode != 0
    assert "VATT_CPU_LEVEL must be 4 (AVX-512), 3 (AVX2) or 1, got avx2." in run.stderr


def arguments():
    """A valid call: two frames of 4x4 pixels, patches of 1x2x2, tokens 1 and 0 after a row for AGG."""
    return {
        "video": torch.zeros(1, 2, 4, 4, 3, dtype=torch.uint8),
        "keep": torch.tensor([1, 0]),
        "crop": None,
        "flip": None,
        "out": torch.zeros(3, 12),
        "size": [4, 4],
        "patch": [1, 2, 2],
        "agg": True,
        "row": 0,
        "run": 0,
        "num_threads": 1,
    }


def call(**changes):
    given = {**arguments(), **changes}
    return _C.tokenize_patches(**{k: to_dlpack(v) if isinstance(v, torch.Tensor) else v for k, v in given.items()})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"video": torch.zeros(1, 2, 4, 4, 3).int()}, r"video must be uint8 or float \[B, T, H, W, C\], got"),
        ({"video": torch.zeros(1, 2, 4, 4, 3).half()}, "video must be uint8 or float32"),
        ({"video": torch.zeros(2, 4, 4, 3, dtype=torch.uint8)}, r"got shape \[2, 4, 4, 3\]"),
        (
            {"video": torch.zeros(1, 2, 4, 3, 4, dtype=torch.uint8).mT},
            r"rows \[W, C\] without gaps, got strides \[1, 4\]",
        ),
        ({"keep": torch.tensor([1.0, 0.0])}, r"keep must be int64 \[K\] or \[1, K\], got"),
        ({"keep": torch.tensor([[1], [0]])}, r"keep must be .*, got shape \[2, 1\]"),
        ({"keep": torch.tensor([1, 8])}, r"token numbers in \[0, 8\), got 8"),
        ({"crop": torch.tensor([[0, 0, 0]])}, r"crop must be contiguous int64 \[1, 2\], got shape \[1, 3\]"),
        ({"crop": torch.tensor([[0, 1]])}, r"crop must lie in \[0, 0\] x \[0, 0\], got \[0, 1\]"),
        ({"flip": torch.tensor([True])}, r"flip must be contiguous uint8 \[1\], got"),
        ({"size": [4, 5]}, r"size must lie within the frames of video .*, got \[4, 5\]"),
        ({"row": 1}, r"out must lie within 3 rows of 2 runs, got shape \[3, 12\] from row 1, run 0"),
        ({"run": 1}, r"out must lie within 3 rows of 2 runs, got shape \[3, 12\] from row 0, run 1"),
        ({"out": torch.zeros(12, 3).mT}, "out must be contiguous"),
        ({"out": torch.zeros(3, 12).half()}, "out must be contiguous float32 or bfloat16"),
        ({"out": torch.zeros(3, 11)}, r"out must be contiguous .* \[rows, runs \* 6\], got shape \[3, 11\]"),
        ({"patch": [1, 0, 2]}, r"patch must be positive, got \[1, 0, 2\]"),
        ({"video": torch.zeros([1] * 9, dtype=torch.uint8)}, "at most 8 dimensions, got 9"),
    ],
)
def test_refuses_with_the_value(changes, message):
    with pytest.raises(ValueError, match=message):
        call(**changes)


def test_takes_capsules_only_and_leaves_them_usable():
    call()
    with pytest.raises(TypeError, match="dltensor capsule"):
        _C.tokenize_patches(**arguments())
    capsule = to_dlpack(torch.ones(1, 2, 4, 4, 3, dtype=torch.uint8))
    for _ in range(2):  # borrowed, not consumed
        call(video=capsule)
    assert torch.equal(torch.utils.dlpack.from_dlpack(capsule), torch.ones(1, 2, 4, 4, 3, dtype=torch.uint8))


def test_every_half_rounds_as_torch_does():
    """csrc/dtype.h against torch over every float16 and bfloat16 value, the ties between them and their neighbours."""
    compiler = shutil.which("c++") or shutil.which("g++")
    assert compiler, "the native module was built by some C++ compiler"
    halves = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16)
    for dtype, name in ((torch.float16, "Half"), (torch.bfloat16, "BFloat16")):
        values = halves.view(dtype).float()
        ulps = torch.tensor([0, 1 << 12, (1 << 12) - 1, (1 << 12) + 1, 1 << 15, (1 << 15) - 1, (1 << 15) + 1, 77])
        floats = (values.view(torch.int32)[:, None] + ulps.int()).flatten().view(torch.float32)
        expected = floats.to(dtype)
        actual = run_rounding(compiler, name, floats).view(dtype)
        same = (actual.view(torch.int16) == expected.view(torch.int16)) | (actual.isnan() & expected.isnan())
        assert same.all(), f"{name}: {floats[~same][:5].tolist()}"


def run_rounding(compiler, name, floats):
    source = f"""
#include <cstdio>
#include "{ROOT}/csrc/dtype.h"
int main() {{
  float x;
  while (fread(&x, 4, 1, stdin) == 1) {{
    const auto y = vatt::from_float<vatt::{name}>(x);
    fwrite(&y.bits, 2, 1, stdout);
  }}
}}"""
    with tempfile.TemporaryDirectory() as folder:
        program = f"{folder}/round"
        subprocess.run(
            [compiler, "-O1", "-std=c++17", "-x", "c++", "-", "-o", program], input=source.encode(), check=True
        )
        out = subprocess.run([program], input=floats.numpy().tobytes(), capture_output=True, check=True).stdout
    return torch.frombuffer(bytearray(out), dtype=torch.int16)


@needs_machine_code
def test_cuda_kernels_do_not_spill():
    """For every architecture the module is built for; a file <op>_sm90.cu has kernels for sm_90a alone."""
    found, archs = resources(dump("--dump-resource-usage")), set(_C.cuda_archs.split(","))
    for source in (ROOT / "csrc").glob("*.cu"):
        built = {arch for stem, arch, _ in found if stem == source.stem}
        assert built >= (archs & {"90a"} if source.stem.endswith("_sm90") else archs), source.name
    assert spilling(found) == {}


def spilling(found):
    """Spilled registers lie on the stack, which is local memory."""
    return {name: used for name, used in found.items() if used["STACK"] or used["LOCAL"]}


def test_spills_are_found():
    text = """
Fatbin elf code:
================
arch = sm_90a
identifier = csrc/nce.cu

Resource usage:
 Common:
  GLOBAL:0
 Function _Z1fv:
  REG:40 STACK:0 SHARED:1024 LOCAL:0 CONSTANT[0]:440 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function _Z1gv:
  REG:255 STACK:16 SHARED:1024 LOCAL:0 CONSTANT[0]:440 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
    assert len(resources(text)) == 2
    assert spilling(resources(text)) == {("nce", "90a", "_Z1gv"): {"REG": 255, "STACK": 16, "LOCAL": 0}}
