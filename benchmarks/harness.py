"""The one harness of all op benchmarks. A bench file says what to run; this file how it is checked and timed.

For each (shape, dtype, pass, device), one pytest test:

1. Every provider runs once and is compared with float64. Ours must stay inside `vatt_engine.testing`'s error budget, a
   rival (another way to compute the same, as eager or compiled PyTorch) within half of its dtype's digits. One that is
   wrong is not timed, and fails the test; one that refuses these inputs is left out.
2. All others are warmed up and timed round by round, each once per round: what slows the machine for a moment slows
   them alike. pytest-benchmark shows the provider that the dispatcher prefers; all are in its `extra_info`.
3. Memory is measured in a call of its own, and the time set against the roofline: the bytes and FLOPs that the pass
   needs at least, counted in the bench file, over what a large copy and a large product reach here in the same run.
"""

from __future__ import annotations

import functools
import gc
import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from benchmarks import machine, results
from benchmarks.shapes import SHAPES
from benchmarks.timing import Call, Stopwatch, num_rounds, one_round, peak_extra_bytes, spread
from vatt_engine.dispatch import use_impl
from vatt_engine.testing import Sum, assert_within_budget, devices, impls_of, randn

FORWARD, FORWARD_BACKWARD = "forward", "forward+backward"
DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "int64": torch.int64,
    "uint8": torch.uint8,
}

Function = Callable[..., Any]  # (shape, **inputs) -> Tensor


class Case(NamedTuple):
    """What one test measures, by name."""

    op: str
    shape: str
    dtype: str
    passes: str
    device: str

    def __str__(self) -> str:
        return "-".join(self[1:])


@dataclass(frozen=True)
class Options:
    """What the command line asks for; see conftest.py."""

    results: Path | None = None
    resume: bool = False
    stop_at: float = math.inf  # time.monotonic()
    seconds: float = 1.0  # of timed rounds per case
    commit: str | None = None


class Checked(NamedTuple):
    """Which providers may be timed; why the others are not."""

    calls: dict[str, Call]
    failed: dict[str, str]
    refused: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Bench:
    """One benchmark.

    Args:
        name: of its shapes (`SHAPES[name]`) and its rows.
        stem: the op as `use_impl` and the file of results call it; None if there are only rivals.
        op: (shape, **inputs) -> Tensor, through the public function: runs once per implementation.
        rivals: other ways to compute the same, by name; the first is the baseline, which without any is the reference.
        inputs: (shape, dtype, device) -> tensors by name; those that require grad are differentiated.
        exact: (shape, **inputs in float64) -> the right result.
        sums: (shape, name) -> what the output "y", or the gradient "d<input>", adds up; needed for implementations of
            ours whose results are floating-point.
        bytes_moved, flops: (shape, dtype, passes) -> what a pass needs at least.
        passes: "forward" runs without autograd, "forward+backward" with all gradients; any other name runs as it is.
        dtypes: names by device.
        check: (bench, case, inputs) -> Checked; by default the one described above.
        metrics: (shape, dtype, seconds) -> further columns of the report.
        columns: (case, provider, inputs) -> still further ones, that are measured after the timing.
    """

    name: str
    inputs: Callable[..., dict[str, Any]]
    bytes_moved: Callable[..., float]
    flops: Callable[..., float]
    stem: str | None = None
    op: Function | None = None
    rivals: Mapping[str, Function] = field(default_factory=dict)
    exact: Function | None = None
    sums: Callable[[Any, str], Sequence[Sum]] = lambda shape, name: ()
    passes: tuple[str, ...] = (FORWARD, FORWARD_BACKWARD)
    dtypes: Mapping[str, tuple[str, ...]] = field(
        default_factory=lambda: {"cpu": ("fp32", "bf16"), "cuda": ("bf16", "fp32")}
    )
    check: Callable[..., Checked] | None = None
    metrics: Callable[..., dict[str, float]] | None = None
    columns: Callable[..., dict[str, float]] | None = None

    def cases(self) -> list[Case]:
        """Every case of this machine."""
        return [
            Case(self.name, shape, dtype, passes, device)
            for device in devices()
            for shape in SHAPES[self.name].get(device, {})
            for dtype in self.dtypes[device]
            for passes in self.passes
        ]

    def providers(self, device: str) -> dict[str, Function]:
        """Ours in the dispatcher's order of preference, then the rivals."""
        ours = [name for name, where in impls_of(self.stem) if where == device] if self.stem else []
        return dict.fromkeys(ours, self.op) | dict(self.rivals)

    @property
    def baseline(self) -> str:
        """The provider that ratios refer to."""
        return next(iter(self.rivals), "reference")

    def choose(self, name: str) -> AbstractContextManager[None]:
        """What must be entered around a call of this provider, its backward included."""
        return nullcontext() if name in self.rivals else use_impl(**{self.stem: name})

    def refuses(self, name: str, error: Exception) -> bool:
        """Whether this is how the dispatcher says that an implementation does not take these arguments."""
        return str(error).startswith(f"{self.stem}: no implementation {name!r}")


class _PreferredClock:
    seconds = 0.0


def preferred_seconds() -> float:
    """The clock that pytest-benchmark reads: it goes on by what the harness measured of the preferred provider."""
    return _PreferredClock.seconds


def cases(bench: Bench) -> Callable[[Function], Function]:
    """Decorates the test of a bench file: one test per case."""

    def decorate(test: Function) -> Function:
        test = pytest.mark.benchmark(timer=preferred_seconds)(test)
        return pytest.mark.parametrize("case", bench.cases(), ids=str)(test)

    return decorate


def compiled(name: str, function: Function) -> dict[str, Function]:
    """`function` under torch.compile as a rival of that name, or none where there is no C++ compiler for it."""
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        return {}

    @functools.cache
    def once() -> Function:
        return torch.compile(function, fullgraph=True, dynamic=False)

    return {name: lambda shape, **given: once()(shape, **given)}


def one_pass(function: Function, shape: Any, given: dict[str, Any], passes: str) -> Call:
    """A call without arguments that runs one pass and returns a list: the output, then any gradients."""
    if passes != FORWARD_BACKWARD:

        def call() -> list[Any]:
            with torch.set_grad_enabled(passes != FORWARD):
                return [function(shape, **given)]

        return call

    leaves = [value for value in given.values() if isinstance(value, Tensor) and value.requires_grad]
    with torch.no_grad():
        y = function(shape, **given)
    # The same numbers in every dtype that is timed, and so in the float64 they are compared with.
    dy = randn(*y.shape, seed=99, dtype=torch.bfloat16).to(y) if y.ndim else torch.ones_like(y)

    def call() -> list[Any]:
        y = function(shape, **given)
        return [y, *torch.autograd.grad(y, leaves, dy)]

    return call


def in_double(given: dict[str, Any]) -> dict[str, Any]:
    """The same inputs in float64; bytes and indices stay."""

    def double(value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point():
            return value.detach().double().requires_grad_(value.requires_grad)
        return value

    return {name: double(value) for name, value in given.items()}


def check_values(bench: Bench, case: Case, given: dict[str, Any]) -> Checked:
    """Compare every provider with float64, as the head of this file says."""
    shape = SHAPES[case.op][case.device][case.shape]
    names = ["y", *(f"d{name}" for name, v in given.items() if isinstance(v, Tensor) and v.requires_grad)]
    exact = one_pass(bench.exact, shape, in_double(given), case.passes)()
    low = None
    if bench.stem:
        with bench.choose("reference"):
            low = one_pass(bench.op, shape, given, case.passes)()
        assert_close(names, low, exact)  # a wrong reference would allow any error
    checked = Checked({}, {}, {})
    for provider, function in bench.providers(case.device).items():
        try:
            with bench.choose(provider):
                call = one_pass(function, shape, given, case.passes)
                actual = call()
            if provider in bench.rivals:
                assert_close(names, actual, exact)
            else:
                sums = [bench.sums(shape, name) for name in names]
                assert_equal_or_within_budget(names, actual, low, exact, sums)
            checked.calls[provider] = call
        except Exception as error:  # of whatever kind: it is told, and fails the test once the others are timed
            fate = checked.refused if bench.refuses(provider, error) else checked.failed
            fate[provider] = f"{type(error).__name__}: {error}"
    return checked


def assert_equal_or_within_budget(
    names: list[str],
    actual: list[Tensor],
    low: list[Tensor],
    exact: list[Tensor],
    sums: list[Sequence[Sum]],
) -> None:
    """Ours: to the bit for whole numbers, else inside the error budget of what they add up."""
    for name, got, same_dtype, want, added in zip(names, actual, low, exact, sums):
        if got.is_floating_point():
            assert_within_budget(got, same_dtype, want, *added, name=name)
        else:
            assert torch.equal(got, want), f"{name} differs from the definition"


def assert_close(names: list[str], actual: list[Tensor], exact: list[Tensor]) -> None:
    """Rivals: |actual - exact| <= sqrt(eps) |exact| in the 2-norm, half of the dtype's digits.

    How they round is theirs; what they compute must be the same.
    """
    for name, got, want in zip(names, actual, exact):
        assert got.shape == want.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(want.shape)}"
        if not got.is_floating_point():
            assert torch.equal(got, want), f"{name} differs from the definition"
            continue
        error, size = ((x.double()).norm().item() for x in (got.double() - want, want))
        allowed = torch.finfo(got.dtype).eps ** 0.5
        assert error <= allowed * size, f"{name}: relative error {error / (size or 1):.3g} > {allowed:.3g}"


def measure(bench: Bench, case: Case, benchmark: Any, options: Options) -> list[results.Row]:
    """Check, time, store; fails the test if a provider failed. Returns the rows."""
    path = options.results / machine.slug() / f"{bench.stem or bench.name}.jsonl" if options.results else None
    if options.resume and path and results.is_measured(path, tuple(case), machine.sources_digest()):
        pytest.skip("measured already on these sources")
    if time.monotonic() > options.stop_at:
        pytest.skip("no time left: run again")
    torch.compiler.reset()  # a compiled rival would give up after eight shapes
    torch.cuda.empty_cache()
    shape = SHAPES[case.op][case.device][case.shape]
    given = bench.inputs(shape, DTYPES[case.dtype], case.device)
    checked = (bench.check or check_values)(bench, case, given)
    times: dict[str, list[float]] = {}
    if checked.calls:
        times = _times(bench, case, checked.calls, benchmark, options.seconds)
    rows = []
    for name, seconds in times.items():
        with bench.choose(name):
            peak = peak_extra_bytes(checked.calls[name], case.device)
            more = bench.columns(case, name, given) if bench.columns else {}
        row = _row(bench, case, name, options.commit) | _numbers(bench, case, seconds) | {"peak_extra_bytes": peak}
        row["metrics"] |= more
        rows.append(row)
    rows += [_row(bench, case, name, options.commit) | {"error": text} for name, text in checked.failed.items()]
    benchmark.extra_info["rows"] = [{k: v for k, v in row.items() if k != "stamp"} for row in rows]
    benchmark.extra_info["refused"] = checked.refused
    if path and not benchmark.disabled:
        results.merge(path, rows)
    return rows


def _times(bench: Bench, case: Case, calls: dict[str, Call], benchmark: Any, budget: float) -> dict[str, list[float]]:
    """Seconds of every call in every round."""
    stopwatch = Stopwatch(case.device)
    warm = 0.0
    for name, call in calls.items():
        with bench.choose(name):
            warm += stopwatch.warm_up(call)
    times: dict[str, list[float]] = {name: [] for name in calls}
    preferred = next(iter(calls))

    def run() -> None:
        seconds = one_round(stopwatch, calls, len(times[preferred]), bench.choose)
        for name, value in seconds.items():
            times[name].append(value)
        _PreferredClock.seconds += seconds[preferred]

    benchmark.group = f"{case.op} {case}"
    benchmark.extra_info["provider"] = preferred
    gc.collect()
    gc.disable()
    try:
        benchmark.pedantic(run, rounds=num_rounds(warm, budget))
    finally:
        gc.enable()
    return times


def _row(bench: Bench, case: Case, provider: str, commit: str | None) -> results.Row:
    sizes = asdict(SHAPES[case.op][case.device][case.shape])
    row = dict(zip(results.CASE, case)) | {"provider": provider, "ours": provider not in bench.rivals}
    return row | {"baseline": bench.baseline, "sizes": sizes, "stamp": machine.stamp(commit)}


def _numbers(bench: Bench, case: Case, seconds: list[float]) -> results.Row:
    """Seconds, what they came to, and how near the roofline that is."""
    shape, dtype = SHAPES[case.op][case.device][case.shape], DTYPES[case.dtype]
    median, p20, p80 = spread(seconds)
    num_bytes, flops = bench.bytes_moved(shape, dtype, case.passes), bench.flops(shape, dtype, case.passes)
    ceilings: dict[str, float] = {"bytes_per_second": machine.bytes_per_second(case.device)}
    floors = {"memory": num_bytes / ceilings["bytes_per_second"], "compute": 0.0}
    if flops:
        ceilings["flops_per_second"] = machine.flops_per_second(case.device, dtype)
        floors["compute"] = flops / ceilings["flops_per_second"]
    bound = max(floors, key=floors.__getitem__)
    return {
        "rounds": len(seconds),
        "seconds": median,
        "p20": p20,
        "p80": p80,
        "bytes": num_bytes,
        "flops": flops,
        "ceilings": ceilings,
        "bound": bound,
        "roofline": floors[bound] / median,
        "metrics": bench.metrics(shape, dtype, median) if bench.metrics else {},
    }
