"""The benchmark harness: what is wrong is not timed, and what is timed is told in full."""

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import bench_step, harness, report, results, sanitize, timing
from benchmarks.bench_attention import BENCH as ATTENTION
from benchmarks.bench_checkpoint import measure as measure_checkpoints
from benchmarks.bench_engine import measure as measure_engine
from benchmarks.bench_tokenize import BENCH as TOKENIZE
from benchmarks.harness import Bench, Case, Options, measure
from benchmarks.shapes import SHAPES
from vatt_engine import VATTLoss, create_model, dispatch

ROOT = Path(__file__).resolve().parents[1]
MIB = 1 << 20


@dataclass(frozen=True)
class Size:
    rows: int


class Recorder:
    """What the harness uses of pytest-benchmark's fixture."""

    disabled = False

    def __init__(self):
        self.extra_info, self.rounds = {}, 0

    def pedantic(self, run, rounds):
        self.rounds = rounds
        for _ in range(rounds):
            run()


def double(_size, x):
    return 2 * x


def bench_of(**changes):
    fields = {
        "name": "double",
        "rivals": {"eager": double},
        "inputs": lambda size, dtype, device: {"x": torch.ones(size.rows, dtype=dtype).requires_grad_()},
        "exact": double,
        "bytes_moved": lambda size, dtype, passes: 2 * size.rows * dtype.itemsize,
        "flops": lambda size, dtype, passes: size.rows,
    }
    return Bench(**{**fields, **changes})


@pytest.fixture
def quick(monkeypatch):
    """Ceilings that are known, and one shape of the test's own."""
    monkeypatch.setitem(SHAPES, "double", {"cpu": {"small": Size(8)}})
    monkeypatch.setattr(harness.machine, "bytes_per_second", lambda device: 1e9)
    monkeypatch.setattr(harness.machine, "flops_per_second", lambda device, dtype: 1e9)


CASE = Case("double", "small", "fp32", "forward+backward", "cpu")


@pytest.mark.parametrize("passes", ["forward", "forward+backward"])
def test_a_wrong_rival_is_told_and_not_timed(quick, passes):
    calls = []

    def wrong(_size, x):
        calls.append(1)
        return 2.01 * x

    recorder = Recorder()
    rivals = {"eager": double, "wrong": wrong}
    rows = measure(bench_of(rivals=rivals), CASE._replace(passes=passes), recorder, Options(seconds=0.0))
    assert recorder.rounds == timing.MIN_ROUNDS > len(calls)
    assert [(row["provider"], "seconds" in row, "error" in row) for row in rows] == [
        ("eager", True, False),
        ("wrong", False, True),
    ]
    assert "y: relative error 0.005 > 0.000345" in rows[1]["error"]


def test_a_wrong_gradient_is_found(quick):
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, dy):
            return dy

    rivals = {"eager": double, "wrong": lambda _size, x: Wrong.apply(x)}
    rows = measure(bench_of(rivals=rivals), CASE, Recorder(), Options(seconds=0.0))
    assert "dx: relative error 0.5" in rows[1]["error"]


def test_ours_must_stay_inside_the_error_budget(quick, monkeypatch):
    """One part in ten thousand passes for a rival's rounding, but not for ours."""
    monkeypatch.setattr(
        harness, "SHAPES", {"attention": {"cpu": {"small": SHAPES["attention"]["sanitizer"]["ragged"]}}}
    )
    known = {impl.name: impl for impl in dispatch._IMPLS["attention"]["attention"]}
    sdpa, reference = known["sdpa"], known["reference"]
    worse = dispatch.Impl("worse", "cpu", lambda *given: reference.target(*given) * 1.0001)
    refusing = dispatch.Impl("refusing", "cpu", reference.target, refuses=lambda *given: "takes nothing")
    monkeypatch.setitem(dispatch._IMPLS["attention"], "attention", [sdpa, worse, refusing, reference])
    recorder = Recorder()
    rows = measure(ATTENTION, Case("attention", "small", "fp32", "forward", "cpu"), recorder, Options(seconds=0.0))
    fate = {row["provider"]: row.get("error", "timed") for row in rows}
    assert fate["sdpa"] == fate["reference"] == fate["bare sdpa"] == "timed"
    assert fate["worse"].startswith("AssertionError: y[")
    assert "refusing" not in fate
    assert recorder.extra_info["refused"]["refusing"].endswith("(refusing: takes nothing).")


def test_a_wrong_reference_stops_all(quick, monkeypatch):
    """It would widen the budget of every other implementation."""
    monkeypatch.setattr(
        harness, "SHAPES", {"attention": {"cpu": {"small": SHAPES["attention"]["sanitizer"]["ragged"]}}}
    )
    known = {impl.name: impl for impl in dispatch._IMPLS["attention"]["attention"]}
    sdpa, reference = known["sdpa"], known["reference"]
    wrong = dispatch.Impl("reference", "any", lambda *given: reference.target(*given) * 1.01)
    monkeypatch.setitem(dispatch._IMPLS["attention"], "attention", [sdpa, wrong])
    with pytest.raises(AssertionError, match="y: relative error"):
        measure(ATTENTION, Case("attention", "small", "fp32", "forward", "cpu"), Recorder(), Options(seconds=0.0))


def test_rows_say_everything(quick, tmp_path):
    bench = bench_of(metrics=lambda size, dtype, seconds: {"rows/s": size.rows / seconds})
    (row,) = measure(bench, CASE, Recorder(), Options(seconds=0.0, results=tmp_path, commit="abc"))
    assert results.case_of(row) == CASE
    assert (row["provider"], row["baseline"], row["sizes"], row["ours"]) == ("eager", "eager", {"rows": 8}, False)
    assert row["rounds"] == timing.MIN_ROUNDS
    assert 0 < row["p20"] <= row["seconds"] <= row["p80"]
    assert (row["bytes"], row["flops"], row["bound"]) == (
        64,
        8,
        "memory",
    )  # 64 B over 1 GB/s against 8 FLOP over 1 GF/s
    assert row["roofline"] == pytest.approx(64e-9 / row["seconds"])
    assert row["metrics"] == {"rows/s": 8 / row["seconds"]}
    stamp = row["stamp"]
    assert stamp["commit"] == "abc"
    assert stamp["torch"] == str(torch.__version__)
    assert {
        "machine",
        "cpu",
        "cores",
        "threads",
        "cuda",
        "triton",
        "python",
        "dirty",
        "sources",
        "date",
    } <= stamp.keys()
    (stored,) = results.read(next(tmp_path.glob("*/double.jsonl")))
    assert stored == json.loads(json.dumps(row))


def test_every_round_runs_every_provider_once():
    ran, entered = [], []

    class Watch:
        def seconds(self, call):
            ran.append(call)
            return 1.0

    def choose(name):
        entered.append(name)
        return nullcontext()

    for index in range(4):
        assert timing.one_round(Watch(), {"a": "A", "b": "B", "c": "C"}, index, choose) == {"a": 1, "b": 1, "c": 1}
    assert "".join(ran) == "ABCBCACABABC"
    assert "".join(entered) == "abcbcacababc"


def test_spread_and_rounds():
    assert timing.spread(range(11)) == (5, 2, 8)
    assert timing.spread([3.0]) == (3, 3, 3)
    assert [timing.num_rounds(s, 1.0) for s in (10, 0.05, 1e-6)] == [timing.MIN_ROUNDS, 20, timing.MAX_ROUNDS]


@pytest.mark.parametrize("held", [True, False], ids=["returned", "freed-inside"])
def test_the_high_water_mark_sees_an_allocation(held):
    def call():
        block = torch.ones(64 * MIB, dtype=torch.uint8)
        return block if held else None

    peak = timing.peak_extra_bytes(call, "cpu")
    if peak is None:
        pytest.skip("this system does not tell a process's high-water mark")
    assert 63 * MIB < peak < 72 * MIB
    assert timing.peak_extra_bytes(lambda: None, "cpu") < 8 * MIB


def row_of(shape, provider, seconds, **more):
    case = {"op": "nce", "shape": shape, "dtype": "bf16", "pass": "forward", "device": "cuda"}
    stamp = {"machine": "GPU X", "cpu": "CPU Y", "threads": 8, "torch": "2.11", "cuda": "13.0", "sources": "d1"}
    stamp |= {"commit": "abc", "dirty": True, "date": "2026-01-31"}
    row = case | {"provider": provider, "baseline": "eager", "sizes": {"batch": 8, "patch": [4, 16]}, "stamp": stamp}
    return row | ({"seconds": seconds, "p20": seconds * 0.9, "p80": seconds * 1.25} if seconds else {}) | more


def test_a_case_measured_again_replaces_itself(tmp_path):
    path = tmp_path / "machine" / "nce.jsonl"
    first, other = [row_of("a", "x", 1.0), row_of("a", "y", 2.0)], [row_of("b", "x", 3.0)]
    results.merge(path, first + other)
    again = [row_of("a", "x", 4.0)]
    assert results.merge(path, again) == again + other == results.read(path)
    case = results.case_of(again[0])
    assert results.is_measured(path, case, "d1")
    assert not results.is_measured(path, case, "d2"), "other sources"
    results.merge(path, [*again, row_of("a", "y", None, error="wrong")])
    assert not results.is_measured(path, case, "d1"), "a provider failed"


GOLDEN = """\
- machine: GPU X; CPU Y, 8 CPU threads
- versions: cuda 13.0, torch 2.11
- sources: commit abc with changes, digest d1, 2026-01-31
- ceilings: copy on cuda 4000 GB/s, bf16 product on cuda 800 TFLOP/s

### nce on cuda

- `a`: batch 8, patch 4 x 16

| shape | dtype | pass    | provider |       median (p20-p80) | x baseline | GB/s | TFLOP/s | % of roofline | peak extra MiB |
|-------|-------|---------|----------|-----------------------:|-----------:|-----:|--------:|--------------:|---------------:|
| a     | bf16  | forward | eager    | 2.000 ms (1.800-2.500) |       1.00 |  500 |     0.5 |          12.5 |           64.0 |
| a     | bf16  | forward | triton   | 400.0 us (360.0-500.0) |       5.00 | 2500 |     2.5 |               |                |
| a     | bf16  | forward | cuda     |                 failed |            |      |         |               |                |

a bf16 forward, cuda failed: y is wrong
"""  # noqa: E501


def test_report_is_a_table_that_can_be_read(tmp_path):
    counted = {"bytes": 1e9, "flops": 1e9}
    ceilings = {"bytes_per_second": 4e12, "flops_per_second": 8e14}
    rows = [
        row_of("a", "eager", 2e-3, **counted, roofline=0.125, peak_extra_bytes=64 * MIB, ceilings=ceilings),
        row_of("a", "triton", 4e-4, **counted, peak_extra_bytes=None),
        row_of("a", "cuda", None, error="y is wrong"),
    ]
    assert report.page(rows) == GOLDEN
    results.merge(tmp_path / "gpu-x" / "nce.jsonl", rows)
    (path,) = report.render(tmp_path)
    assert path.read_text() == f"# nce on GPU X\n\n{GOLDEN}"
    text = "before\n<!-- results gpu-x/nce -->\nold\n<!-- end of results -->\nafter\n"
    filled = f"before\n<!-- results gpu-x/nce -->\n{GOLDEN}<!-- end of results -->\nafter\n"
    assert report.fill(text, tmp_path) == filled == report.fill(filled, tmp_path)


def test_the_counts_are_those_of_the_algorithm():
    """784 of 1568 patches of 3072 bytes to width 768, per clip 3.70 GFLOP and 2.41 MB of pixels."""
    shape = SHAPES["tokenize"]["cpu"]["base"]
    assert shape.tokens == 1568
    assert TOKENIZE.flops(shape, torch.bfloat16, "forward") / shape.batch == 2 * 784 * 3072 * 768
    tokens, weight = 4 * 785 * 768 * 2, 3072 * 768 * 2
    vectors = 2 * (2 * 768 + 784 * 768)
    assert TOKENIZE.bytes_moved(shape, torch.bfloat16, "forward") == 4 * 784 * 3072 + tokens + weight + vectors


def test_the_sanitizer_reaches_every_implementation():
    lines = [line for bench in sanitize.benches() for line in sanitize.run_once(bench, "cpu")]
    ran = {tuple(line.split()[:2]) for line in lines if line.endswith(": ran")}
    assert {("tokenize", "cpp"), ("nce", "chunked"), ("attention", "sdpa"), ("attention_dropout", "cpp")} <= ran
    for bench in sanitize.benches():
        assert SHAPES[bench.name]["sanitizer"], f"{bench.name}: shapes for the sanitizer"


def run(*words, **environment):
    words = [sys.executable, *words]
    inherited = {name: value for name, value in os.environ.items() if "XDIST" not in name}  # which times nothing
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, env={**inherited, **environment})


def test_pytest_benchmark_shows_the_same_numbers(tmp_path):
    out = tmp_path / "out.json"
    words = ["benchmarks/bench_drop_token.py", "-k", "sample_keep and demo", "--seconds", "0.01", "--device", "cpu"]
    command = ["-m", "pytest", "-q", *words, "--results", str(tmp_path), "--benchmark-json", str(out)]
    first = run(*command)
    assert first.returncode == 0, first.stdout + first.stderr
    (bench,) = json.loads(out.read_text())["benchmarks"]
    (path,) = tmp_path.glob("*/drop_token.jsonl")
    rows = results.read(path)
    assert [row["provider"] for row in rows] == [row["provider"] for row in bench["extra_info"]["rows"]]
    preferred = next(row for row in rows if row["provider"] == bench["extra_info"]["provider"])
    assert bench["stats"]["rounds"] == preferred["rounds"]
    assert bench["stats"]["median"] == pytest.approx(preferred["seconds"], rel=1e-6)
    assert "| sample_keep" not in first.stdout
    assert "### sample_keep on cpu" in first.stdout
    before = path.read_text()
    assert "measured already on these sources" in run(*command, "--resume").stdout
    assert path.read_text() == before


def test_model_flops_are_those_that_torch_counts():
    """Of vatt_tiny, in which losses are not negligible."""
    shape = SHAPES["step"]["cpu"]["tiny"]
    model, batch = create_model(shape.model).train(), bench_step.clips(shape, "cpu")
    with FlopCounterMode(display=False) as counter, dispatch.use_impl(attention="reference"):
        VATTLoss()(model(batch, seed=0)).total.backward()
    losses = 8 * shape.batch**2 * (1 + shape.candidates) * model.config.heads.video_audio_dim  # one product, then three
    assert counter.get_total_flops() == bench_step.flops(shape, torch.float32, "step") + losses


def test_the_cost_of_a_checkpoint_is_measured(tmp_path):
    result = measure_checkpoints("vatt_tiny", tmp_path, rounds=2, device="cpu")
    files = max((tmp_path / "checkpoints").glob("step-*")).glob("*.safetensors")
    assert result["megabytes"] == pytest.approx(sum(file.stat().st_size for file in files) / 1e6, rel=0.05)
    assert 0 < result["stall"] < result["write"]


def test_the_cost_of_the_engine_is_measured():
    result = measure_engine("vatt_tiny", 2, rounds=1, device="cpu")
    assert result["overhead"] == pytest.approx(result["engine"] / result["bare"] - 1)
