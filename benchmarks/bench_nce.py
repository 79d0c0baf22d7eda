"""mil_nce (nce is its case of one candidate): similarities by tiles against a stored matrix.

s = a @ b.T / temperature [B, B P],  loss = mean_i(logsumexp(row i and column i of s) - logsumexp(positives of i))
"""

import functools
import importlib.util
import json
import math
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from benchmarks import machine
from benchmarks.harness import FORWARD_BACKWARD, Bench, Checked, assert_close, cases, compiled, in_double, one_pass
from benchmarks.shapes import NCE_LARGEST, NCE_MEMORY, SHAPES
from benchmarks.timing import peak_extra_bytes
from vatt_engine.ops import mil_nce
from vatt_engine.testing import Sum, devices, randn

TEMPERATURE = 0.07


def inputs(shape, dtype, device):
    video = randn(shape.batch, shape.dim, seed=1, dtype=dtype, device=device)
    text = randn(shape.batch, shape.candidates, shape.dim, seed=2, dtype=dtype, device=device)
    return {"video": video.requires_grad_(), "text": text.requires_grad_()}


def op(_shape, video, text):
    return mil_nce(video, text, TEMPERATURE)


def eager(_shape, video, text):
    """The joint loss as one writes it down: normalise, one matrix, both directions side by side, autograd."""
    dtype = torch.promote_types(video.dtype, torch.float32)
    video, text = F.normalize(video.to(dtype), dim=-1), F.normalize(text.to(dtype), dim=-1)
    s = (video @ text.flatten(0, 1).T).view(len(video), len(text), -1) / TEMPERATURE
    both = torch.cat([s.flatten(1), s.transpose(0, 1).flatten(1)], dim=1)
    return (both.logsumexp(1) - s.diagonal().logsumexp(0)).mean()


def bytes_moved(shape, dtype, passes):
    """Both embeddings read once per pass, their gradients written: the matrix need not touch memory."""
    embeddings = shape.batch * (1 + shape.candidates) * shape.dim * dtype.itemsize
    return embeddings * (3 if passes == FORWARD_BACKWARD else 1)


def sums(shape, name):
    """A loss has up to four similarities of size 1 / t; a gradient, the mean of G / (t |row|), is off as they are."""
    columns = shape.batch * shape.candidates
    size = 1.0 if name == "y" else 1 / (TEMPERATURE * shape.dim**0.5 * shape.batch)
    return [Sum(shape.dim, 4 * size / TEMPERATURE), Sum(columns, 4 * size)]


def flops(shape, _dtype, passes):
    """One product for the statistics; backward makes s again and multiplies its gradient with both sides."""
    product = 2 * shape.batch**2 * shape.candidates * shape.dim
    return product * (4 if passes == FORWARD_BACKWARD else 1)


BENCH = Bench(
    name="nce",
    stem="nce",
    op=op,
    rivals={"eager": eager, **compiled("eager compiled", eager)},
    inputs=inputs,
    exact=eager,
    sums=sums,
    bytes_moved=bytes_moved,
    flops=flops,
)


@cases(BENCH)
def test_nce(measure, case):
    measure(BENCH, case)


def symmetric(_shape, video, text):
    return mil_nce(video, text, TEMPERATURE, form="symmetric")


def one_matrix(_shape, video, text):
    """CLIP's loss as one writes it down: a cross-entropy of the matrix and one of its transpose."""
    s = F.normalize(video, dim=-1) @ F.normalize(text.squeeze(1), dim=-1).T / TEMPERATURE
    own = torch.arange(len(s), device=s.device)
    return F.cross_entropy(s, own) + F.cross_entropy(s.T, own)


def two_matrices(_shape, video, text):
    """The same with a product for each direction, as CLIP and open_clip have it."""
    video, text = F.normalize(video, dim=-1), F.normalize(text.squeeze(1), dim=-1)
    own = torch.arange(len(video), device=video.device)
    one = F.cross_entropy(video @ text.T / TEMPERATURE, own)
    return one + F.cross_entropy(text @ video.T / TEMPERATURE, own)


@functools.cache
def open_clip():
    """open_clip's file of losses, by itself: the package imports torchvision, which the CPU's torch may not have."""
    package = Path(importlib.util.find_spec("open_clip").origin).parent
    spec = importlib.util.spec_from_file_location("open_clip_loss", package / "loss.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def open_clip_loss(_shape, video, text):
    video, text = F.normalize(video, dim=-1), F.normalize(text.squeeze(1), dim=-1)
    return 2 * open_clip().ClipLoss()(video, text, 1 / TEMPERATURE)


def check_large(bench, case, given):
    """Every provider within half of its digits of float64 by tiles; where the reference fits, tests ask for more."""
    shape = SHAPES[case.op][case.device][case.shape]
    exact = one_pass(bench.exact, shape, in_double(given), case.passes)()
    checked = Checked({}, {}, {})
    for provider, function in bench.providers(case.device).items():
        try:
            with bench.choose(provider):
                call = one_pass(function, shape, given, case.passes)
                assert_close(["y", "dvideo", "dtext"], call(), exact)
            checked.calls[provider] = call
        except torch.OutOfMemoryError as error:
            checked.refused[provider] = str(error)
        except AssertionError as error:
            checked.failed[provider] = str(error)
    return checked


SYMMETRIC = Bench(
    name="nce_symmetric",
    stem="nce",
    op=symmetric,
    rivals={
        "two matrices": two_matrices,
        "one matrix": one_matrix,
        **compiled("one matrix compiled", one_matrix),
        **({"open_clip": open_clip_loss} if importlib.util.find_spec("open_clip") else {}),
    },
    inputs=inputs,
    exact=symmetric,  # in float64 by tiles: the matrix would not fit
    check=check_large,
    bytes_moved=bytes_moved,
    flops=flops,
    passes=(FORWARD_BACKWARD,),
    dtypes={"cpu": ("fp32",), "cuda": ("bf16",)},
)


@pytest.mark.timeout(1800)
@cases(SYMMETRIC)
def test_nce_symmetric(measure, case):
    measure(SYMMETRIC, case)


@pytest.mark.parametrize("device", devices())
def test_memory_grows_with_the_batch_alone(request, device):
    """Extra bytes of forward and backward over B: a line, whose slope is a few rows of float32; with a plot of it."""
    batches, points = [shape.batch for shape in NCE_MEMORY], []
    for shape in NCE_MEMORY:
        call = one_pass(symmetric, shape, inputs(shape, torch.float32, device), FORWARD_BACKWARD)
        points.append(peak_extra_bytes(call, device))
    slope, intercept = statistics.linear_regression(batches, points)
    row_bytes = 2 * NCE_MEMORY[0].dim * 4  # one row of either side in float32
    found = {"device": device, "dim": NCE_MEMORY[0].dim, "batch": batches, "extra_bytes": points}
    found |= {"slope": slope, "slope_in_rows": slope / row_bytes, "intercept": intercept, "stamp": machine.stamp()}
    if (path := keep(request, f"nce_memory_{device}", found)) is not None:
        plot_memory(found, path.with_suffix(".png"))
    worst = max(abs(slope * x + intercept - y) for x, y in zip(batches, points))
    assert worst < 0.05 * points[-1], found
    assert slope < 5 * row_bytes, found


LARGEST = """
import json, resource, time, torch
from vatt_engine.ops import nce
a, b = (torch.randn({batch}, {dim}, generator=torch.Generator().manual_seed(i)).requires_grad_() for i in (1, 2))
start = time.perf_counter()
loss = nce(a, b, {temperature}, form="symmetric")
loss.backward()
finite = bool(a.grad.isfinite().all() & b.grad.isfinite().all())
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
found = dict(loss=loss.item(), finite=finite, process_bytes=peak, seconds=time.perf_counter() - start)
print(json.dumps(found))
"""


@pytest.mark.timeout(3600)
def test_a_batch_whose_matrix_takes_64_gib(request):
    """On a CPU, forward and backward, the whole process under 4 GB; the loss is that of unrelated embeddings."""
    batch, dim = NCE_LARGEST.batch, NCE_LARGEST.dim
    code = LARGEST.format(batch=batch, dim=dim, temperature=TEMPERATURE)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found = {"batch": batch, "dim": dim, **json.loads(run.stdout), "stamp": machine.stamp()}
    keep(request, "nce_largest_cpu", found)
    # Cosines are N(0, 1/D): the mean over them of exp(s) is exp(1 / 2 D t^2), of s itself 0.
    expected = 2 * (math.log(batch) + 1 / (2 * dim * TEMPERATURE**2))
    assert abs(found["loss"] - expected) < 0.01 * expected, (found, expected)
    assert found["finite"]
    assert found["process_bytes"] < 4e9, found


def keep(request, name, found):
    """Print what was found, and leave it among the results where they are kept; the path of it, or None."""
    print(json.dumps(found))
    if (folder := request.config.getoption("--results")) is None:
        return None
    path = folder / machine.slug() / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")
    return path


def plot_memory(found, path):
    """The measured points, the line through them, and what one stored float32 matrix would take."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    batches = found["batch"]
    line = [(found["slope"] * b + found["intercept"]) / 2**20 for b in batches]
    axes.plot(batches, [4 * b * b / 2**20 for b in batches], "--", color="#6f7680", label="one B x B matrix, float32")
    axes.plot(batches, line, color="#1f77b4", label=f"{found['slope']:.0f} B + {found['intercept'] / 2**20:.0f} MiB")
    axes.plot(batches, [y / 2**20 for y in found["extra_bytes"]], "o", color="#1b1b1b", label="measured")
    axes.set(
        xscale="log", yscale="log", xlabel="B", ylabel="extra MiB", title=f"nce, D = {found['dim']}, {found['device']}"
    )
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)
