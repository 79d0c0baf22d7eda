"""ops.nce and ops.mil_nce: exactness of every implementation, masks, temperatures."""

import math
import sys
from typing import NamedTuple

import pytest
import torch
from torch.nn import functional as F

from vatt_engine.dispatch import use_impl
from vatt_engine.ops import nce_chunked
from vatt_engine.ops.nce import FORMS, Ring, mil_nce, nce, nce_statistics, sample_losses
from vatt_engine.testing import Sum, assert_same_sums, assert_within_budget, impls_of, randn, sum_budget

IMPLS = impls_of("nce")
IMPL_NAMES = [name for name, device in IMPLS if device == "cpu"]
OUTPUTS = ("loss", "d_video", "d_text", "d_temperature")


class Case(NamedTuple):
    rows: int
    candidates: int
    dim: int
    temperature: float = 0.07
    masked: bool = False
    dtype: torch.dtype = torch.float32
    distinct: int | None = None  # samples of which the others are copies

    def __str__(self) -> str:
        mask = ("-masked" if self.masked else "") + (f"-{self.distinct}-distinct" if self.distinct else "")
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.rows}x{self.candidates}x{self.dim}-t{self.temperature}{mask}-{dtype}"


CASES = [
    Case(1, 1, 16),
    Case(1, 5, 256),
    Case(2, 5, 16, 0.02),
    Case(3, 1, 768, 1.0),
    Case(127, 5, 512),
    Case(127, 5, 512, masked=True),
    Case(127, 5, 64, masked=True),
    Case(127, 1, 64, 0.01, masked=True),
    Case(127, 5, 64, distinct=3),
    Case(127, 1, 64, 0.01, masked=True, distinct=40),
    Case(100, 5, 16, distinct=1),
    Case(512, 4, 32, masked=True),  # whole tiles of rows and of columns
    Case(1000, 1, 256, 0.3),
    Case(1000, 5, 16, 0.01, masked=True),
    Case(4096, 1, 16),
    Case(127, 5, 256, masked=True, dtype=torch.bfloat16),
    Case(600, 1, 32, 0.01, dtype=torch.bfloat16),
    Case(127, 5, 64, dtype=torch.float16),
]


def make(case: Case, device: str = "cpu"):
    """Paired rows: each candidate is its video plus noise, so that the positives count."""
    video = randn(case.rows, case.dim, seed=1, dtype=torch.float64)
    text = video[:, None] + 0.7 * randn(case.rows, case.candidates, case.dim, seed=2, dtype=torch.float64)
    if case.distinct:
        video, text = (x[torch.arange(case.rows) % case.distinct] for x in (video, text))
    mask = torch.arange(case.rows, device=device) % 3 != 1 if case.masked else None
    return video.to(case.dtype).to(device), text.to(case.dtype).to(device), mask


def losses_and_gradients(video, text, mask, temperature, form, impl):
    """Each sample's loss; of weighted means of them the gradients in video, text and, over many means, temperature."""
    dtype = torch.promote_types(video.dtype, torch.float32)
    tau = torch.tensor([temperature], dtype=dtype, device=video.device, requires_grad=True)
    inputs = [video.clone().requires_grad_(), text.clone().requires_grad_(), tau]
    with use_impl(nce=impl):
        losses = sample_losses(form, *nce_statistics(*inputs, column_mask=mask), mask)
        gradients = []
        for seed in range(12 if len(video) < 600 else 2):
            weights = randn(len(video), seed=seed, dtype=dtype, device=video.device.type).abs() / len(video)
            gradients.append(torch.autograd.grad((losses * weights).sum(), inputs, retain_graph=True))
    d_video, d_text, _ = gradients[0]
    return losses.detach().to(dtype), d_video, d_text, torch.cat([d_tau for _, _, d_tau in gradients])


def similarity_sum(dim, temperature, size=1.0):
    """Of D products that come to 1 / t; a loss has up to four similarities. A gradient's G is off in proportion."""
    return Sum(dim, 4 * size / temperature)


def sums_of(case, form, video, text, mask):
    """What each output adds up: the loss, the two gradients, and the temperature's gradient.

    A log-sum-exp is as far off as its similarities are, and adds up B P exponentials that come to 1. A gradient adds up
    B P times G, which is off in proportion; G of a sample's own text is a difference of ones, and copies of a sample
    cancel each other. The temperature's gradient is a sum of all G s / t. A GPU that multiplies halves rounds G and
    both of its sides to float16: each term three times.
    """
    t, dim, columns = case.temperature, case.dim, case.rows * case.candidates
    weights = randn(case.rows, seed=0, dtype=torch.float64, device=video.device.type).abs() / case.rows
    a, b = (F.normalize(x.double(), dim=-1) for x in (video, text))
    s = (a @ b.flatten(0, 1).T / t).view(case.rows, case.rows, case.candidates).requires_grad_()
    seen = s if mask is None else s.masked_fill(~mask[:, None], -torch.inf)
    sums = seen.logsumexp((1, 2)), seen.logsumexp((0, 2)), seen.diagonal(0, 0, 1).logsumexp(0)
    loss = (sample_losses(form, *sums, mask) * weights).sum()
    g = torch.autograd.grad(loss, s)[0]
    of_sides, ones = [], 3 / case.rows  # with the largest weight of a sample
    for dims, own, other in (((1, 2), video, b), (0, text, a)):
        size = ((g.abs().sum(dims) + ones) / own.double().norm(dim=-1)).max() * other.abs().max() / t
        of_sides.append([Sum(dim, size.item() / t), Sum(columns, size.item())])
    terms = (g * s).norm().item() / t
    of_tau = [Sum(dim, (terms + ones * case.rows**0.5 / t**2) / t), Sum(columns, terms)]
    if case.dtype != torch.float32:
        of_tau.append(Sum(3, terms, torch.float16))
    return [similarity_sum(dim, t), Sum(columns, 4.0)], *of_sides, of_tau


def against_reference():
    """Every case by every implementation with an offset and with maxima, and the forms, which share both, in turn."""
    for impl, device in IMPLS:
        for i, case in enumerate(CASES):
            if impl == "reference" or (impl == "wgmma" and case.dtype == torch.float32):  # wgmma multiplies halves
                continue
            for n, offset in enumerate(("offset", "maxima")):
                form = FORMS[(i + n) % len(FORMS)]
                yield pytest.param(impl, device, form, case, offset, id=f"{impl}-{device}-{case}-{offset}-{form}")


@pytest.mark.parametrize(("impl", "device", "form", "case", "offset"), against_reference())
def test_matches_reference(impl, device, form, case, offset, monkeypatch):
    monkeypatch.setitem(nce_chunked.TILE, "cpu", (256, 512))
    if offset == "maxima":
        monkeypatch.setattr(sys.modules[nce_statistics.__module__], "MAX_SPREAD", 0)
    video, text, mask = make(case, device)
    given = [(video.double(), text.double(), "reference"), (video, text, "reference"), (video, text, impl)]
    exact, reference, actual = (losses_and_gradients(x, y, mask, case.temperature, form, name) for x, y, name in given)
    sums = sums_of(case, form, video, text, mask)
    for name, *values, added in zip(OUTPUTS, actual, reference, exact, sums):
        assert_within_budget(*values, *added, name=name)


@pytest.mark.parametrize("temperature", [0.02, 0.07])
@pytest.mark.parametrize(
    ("dtype", "distinct"),
    # Copies cancel in the exact gradient, and G is rounded to float16: float16 leaves no room for fewer than 75.
    [*((torch.bfloat16, n) for n in (None, 75, 20, 3, 1)), (torch.float16, None), (torch.float16, 75)],
)
def test_halves_as_on_a_gpu(dtype, temperature, distinct, monkeypatch):
    """The products of halves that a GPU takes, each exact in float32 here as there, inside the same budget."""
    monkeypatch.setitem(nce_chunked.TILE, "cpu", (64, 128))
    monkeypatch.setattr(nce_chunked, "multiplies_halves", lambda x: True)
    monkeypatch.setattr(nce_chunked, "half_product", lambda x, y: x.float() @ y.float())
    case = Case(150, 5, 48, temperature, masked=True, dtype=dtype, distinct=distinct)
    video, text, mask = make(case)
    exact = losses_and_gradients(video.double(), text.double(), mask, temperature, "joint", "reference")
    reference = losses_and_gradients(video, text, mask, temperature, "joint", "reference")
    actual = losses_and_gradients(video, text, mask, temperature, "joint", "chunked")
    sums = sums_of(case, "joint", video, text, mask)
    for name, *values, added in zip(OUTPUTS[:3], actual, reference, exact, sums):
        assert_within_budget(*values, *added, name=name)


@pytest.mark.parametrize("learnable", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("impl", IMPL_NAMES)
def test_is_the_definition(impl, form, masked, learnable):
    """Loops over the formulas in float64, no log-sum-exp; a float temperature takes another path than a tensor."""
    case = Case(5, 3, 4, 0.3, masked, torch.float64)
    video, text, mask = make(case)
    there = [True] * case.rows if mask is None else mask.tolist()

    def similarity(i, j, p):
        v, t = video[i].tolist(), text[j, p].tolist()
        return math.exp(sum(x * y for x, y in zip(v, t)) / math.hypot(*v) / math.hypot(*t) / case.temperature)

    losses = []
    for i in [i for i in range(case.rows) if there[i]]:
        positive = sum(similarity(i, i, p) for p in range(case.candidates))
        row = sum(similarity(i, j, p) for j in range(case.rows) if there[j] for p in range(case.candidates))
        column = sum(similarity(j, i, p) for j in range(case.rows) for p in range(case.candidates))
        losses.append(
            {
                "joint": math.log((row + column) / positive),
                "symmetric": math.log(row / positive) + math.log(column / positive),
                "one_way": math.log(row / positive),
            }[form]
        )
    temperature = torch.tensor([case.temperature], dtype=torch.float64) if learnable else case.temperature
    with use_impl(nce=impl):
        loss = mil_nce(video, text, temperature, mask=mask, form=form)
    assert loss.item() == pytest.approx(sum(losses) / len(losses), rel=1e-12)


@pytest.mark.parametrize("mask", [None, [1, 0, 1, 1, 0], [0, 0, 0, 0, 0]], ids=["all", "some", "none"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("impl", IMPL_NAMES)
def test_gradients_are_those_of_the_value(impl, form, mask, monkeypatch):
    monkeypatch.setitem(nce_chunked.TILE, "cpu", (2, 4))  # 3 x 3 tiles, the last ones ragged
    mask = mask if mask is None else torch.tensor(mask).bool()
    video = randn(5, 4, seed=1, dtype=torch.float64).requires_grad_()
    text = randn(5, 2, 4, seed=2, dtype=torch.float64).requires_grad_()
    learnable = torch.tensor([0.2], dtype=torch.float64, requires_grad=True)
    with use_impl(nce=impl):
        for temperature in (0.2, learnable):
            assert torch.autograd.gradcheck(
                lambda v, t, tau: mil_nce(v, t, tau, mask=mask, form=form), (video, text, temperature)
            )


def test_short_rows_are_divided_by_the_floor():
    """Below a norm of 1e-6 the official l2_normalize is x * 1e6, and so is its gradient."""
    x = randn(4, 3, seed=1, dtype=torch.float64) * torch.tensor([[1e-7], [3e-7], [1.0], [1e-3]], dtype=torch.float64)
    x, y = x.requires_grad_(), x.detach().flip(0).requires_grad_()
    a, b = (v * v.square().sum(-1, keepdim=True).clamp_min(1e-12).rsqrt() for v in (x, y))
    want = torch.nn.functional.cross_entropy(a @ b.T / 0.2, torch.arange(4))
    loss = nce(x, y, 0.2, form="one_way")
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(torch.autograd.grad(loss, (x, y)), torch.autograd.grad(want, (x, y)))


@pytest.mark.parametrize("temperature", [0.07, 0.02])
@pytest.mark.parametrize("impl", IMPL_NAMES)
def test_blocks_of_two_ranks_make_one(impl, temperature, monkeypatch):
    """Rows split over ranks, at every first_sample: the statistics and gradients of the whole matrix."""
    monkeypatch.setitem(nce_chunked.TILE, "cpu", (3, 8))
    video, text, mask = make(Case(7, 3, 8, masked=True, dtype=torch.float64))
    whole = [video.clone().requires_grad_(), text.clone().requires_grad_()]
    parts = [video.clone().requires_grad_(), text.clone().requires_grad_()]
    with use_impl(nce="reference"):
        expected = nce_statistics(*whole, temperature, column_mask=mask)
    with use_impl(nce=impl):
        for cut in range(1, 7):
            blocks = [
                nce_statistics(rows, parts[1], temperature, column_mask=mask, ring=Ring(first))
                for rows, first in ((parts[0][:cut], 0), (parts[0][cut:], cut))
            ]
            column = torch.logaddexp(blocks[0].column[mask], blocks[1].column[mask])
            torch.testing.assert_close(torch.cat([b.row for b in blocks]), expected.row)
            torch.testing.assert_close(torch.cat([b.positive for b in blocks]), expected.positive)
            torch.testing.assert_close(column, expected.column[mask])
            assert (blocks[0].column == -torch.inf).tolist() == (~mask).tolist()
            total = sum(b.row.sum() + 3 * b.positive[b.positive > -torch.inf].sum() for b in blocks) + column.sum()
            want = expected.row.sum() + 3 * expected.positive[mask].sum() + expected.column[mask].sum()
            gradients = torch.autograd.grad(total, parts), torch.autograd.grad(want, whole, retain_graph=True)
            torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("impl", IMPL_NAMES)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("offset", [None, 1 / 0.07])
def test_registration(impl, masked, offset):
    video, text, mask = make(Case(6, 2, 8, masked=masked))
    scales = (video.norm(dim=-1).reciprocal() / 0.07, text.norm(dim=-1).reciprocal())
    shared = (video[2:5], text, scales[0][2:5], scales[1], mask, 2, offset)
    with use_impl(nce=impl):
        statistics = torch.ops.vatt.nce_stats(*shared)
        cotangents = [torch.ones_like(s) for s in statistics]
        torch.library.opcheck(torch.ops.vatt.nce_stats.default, shared)
        torch.library.opcheck(torch.ops.vatt.nce_grad.default, (*shared, *statistics, *cotangents))


@pytest.mark.parametrize(("form", "learnable"), [("joint", False), ("symmetric", True)])
def test_compiles(form, learnable):
    """fullgraph, dynamic batch, forward and backward; aot_eager is all of torch.compile but the code generation."""
    torch.compiler.reset()
    compiled = torch.compile(mil_nce, fullgraph=True, dynamic=True, backend="aot_eager")
    tau = torch.tensor([0.07], requires_grad=True)
    for rows in (4, 9):
        video, text, mask = make(Case(rows, 2, 8, masked=True))
        inputs = [video.requires_grad_(), text.requires_grad_(), *([tau] if learnable else [])]
        temperature = tau if learnable else 0.07
        eager, traced = (f(video, text, temperature, mask=mask, form=form) for f in (mil_nce, compiled))
        assert_same_sums(traced, eager, similarity_sum(8, 0.07))
        for values in zip(torch.autograd.grad(traced, inputs), torch.autograd.grad(eager, inputs)):
            assert_same_sums(*values, similarity_sum(8, 0.07, 1 / 0.07))  # times the other side or s, over t


@pytest.mark.slow
def test_compiles_to_code():
    video, audio = randn(8, 16, seed=1).requires_grad_(), randn(8, 16, seed=2)
    loss = torch.compile(nce, fullgraph=True)(video, audio, 0.07)
    losses = [loss, nce(video, audio, 0.07)]
    assert_same_sums(*losses, similarity_sum(16, 0.07))
    grads = [torch.autograd.grad(x, video)[0] for x in losses]
    assert_same_sums(*grads, similarity_sum(16, 0.07, grads[1].abs().max().item()))


def test_rejects_bad_arguments():
    x, t = torch.ones(4, 8), torch.ones(4, 2, 8)
    bad = [
        (r"nce: a must be \[B, D\] with rows, got shape \[4\]", lambda: nce(x[:, 0], x, 1.0)),
        (r"nce: a must be \[B, D\] with rows, got shape \[0, 8\]", lambda: nce(x[:0], x[:0], 1.0)),
        (r"nce: a must be float32.* got torch.int64", lambda: nce(x.long(), x.long(), 1.0)),
        (r"nce: b must have the shape of a \[4, 8\], got \[3, 8\]", lambda: nce(x, x[:3], 1.0)),
        (r"nce: b must have the dtype of a \(torch.float32\), got torch.float64", lambda: nce(x, x.double(), 1.0)),
        (r"nce: b must have the device of a \(cpu\), got meta", lambda: nce(x, x.to("meta"), 1.0)),
        (r"nce: temperature must be positive, got 0", lambda: nce(x, x, 0)),
        (r"nce: temperature must be positive, got nan", lambda: nce(x, x, math.nan)),
        (r"nce: temperature must be a float or of shape \(1,\), got \[\]", lambda: nce(x, x, torch.tensor(1.0))),
        (r"nce: form must be one of joint, symmetric, one_way, got 'asym'", lambda: nce(x, x, 1.0, form="asym")),
        (r"nce: mask must be bool \[4\], got torch.float32 \[4\]", lambda: nce(x, x, 1.0, mask=torch.ones(4))),
        (r"mil_nce: text must be \[4, P, 8\], got shape \[4, 8\]", lambda: mil_nce(x, x, 1.0)),
        (r"mil_nce: text must be \[4, P, 8\], got shape \[4, 0, 8\]", lambda: mil_nce(x, t[:, :0], 1.0)),
        (r"mil_nce: mask must be bool \[4\], got torch.bool \[3\]", lambda: mil_nce(x, t, 1.0, mask=x[:3, 0] > 0)),
    ]
    for message, call in bad:
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("temperature", [0.01, 0.07, 1.0])
@pytest.mark.parametrize("learnable", [False, True])
@pytest.mark.parametrize("impl", IMPL_NAMES)
class TestEdges:
    """Values known in closed form."""

    @pytest.fixture(autouse=True)
    def _run(self, impl, learnable, temperature):
        self.t = torch.tensor([temperature], requires_grad=True) if learnable else temperature
        with use_impl(nce=impl):
            yield

    def check(self, a, b, expected, *, mask=None):
        a, b = a.detach().requires_grad_(), b.detach().requires_grad_()
        for form, value in expected.items():
            loss = (nce if b.ndim == 2 else mil_nce)(a, b, self.t, mask=mask, form=form)
            rounding = sum_budget(similarity_sum(a.shape[-1], float(self.t)))
            assert loss.item() == pytest.approx(value, rel=torch.finfo(a.dtype).eps, abs=rounding), form
            inputs = [a, b, *([self.t] if isinstance(self.t, torch.Tensor) else [])]
            for gradient in torch.autograd.grad(loss, inputs):
                assert gradient.isfinite().all(), form
        return a, b

    def test_one_row(self):
        self.check(randn(1, 3), randn(1, 3, seed=1), {"joint": math.log(2), "symmetric": 0, "one_way": 0})

    def test_identical_rows(self):
        x = randn(1, 16).expand(6, 16)
        self.check(x, x, {"joint": math.log(12), "symmetric": 2 * math.log(6), "one_way": math.log(6)})

    def test_zero_rows(self):
        x = torch.zeros(4, 8)
        self.check(x, x, {"joint": math.log(8), "symmetric": 2 * math.log(4), "one_way": math.log(4)})

    def test_opposite_rows_are_the_largest_loss(self, temperature):
        x = torch.eye(2)[:, :1] * 2 - 1  # +1, -1: each positive has cosine -1, each negative +1
        worst = 2 / temperature + math.log1p(math.exp(-2 / temperature))
        self.check(x, -x, {"joint": worst + math.log(2), "symmetric": 2 * worst, "one_way": worst})

    def test_nothing_valid(self):
        a, b = self.check(randn(4, 8), randn(4, 2, 8), dict.fromkeys(FORMS, 0.0), mask=torch.zeros(4).bool())
        for form in FORMS:
            loss = mil_nce(a, b, self.t, mask=torch.zeros(4).bool(), form=form)
            for gradient in torch.autograd.grad(loss, (a, b)):
                assert not gradient.any()

    def test_huge_and_tiny_norms(self):
        x, y = randn(5, 8), randn(5, 8, seed=1)
        scale = torch.tensor([1e18, 1e-5, 1.0, 1e-4, 1e10])[:, None]
        for form in FORMS:
            self.check(x * scale, y / scale.clamp(1e-5, 1e5), {form: nce(x, y, self.t, form=form).item()})

    def test_not_contiguous(self):
        x, y = randn(8, 5), randn(3, 8, 5, seed=1)
        for form in FORMS:
            want = mil_nce(x.t().contiguous(), y.permute(2, 0, 1).contiguous(), self.t, form=form).item()
            self.check(x.t(), y.permute(2, 0, 1), {form: want})


@pytest.mark.parametrize("impl", IMPL_NAMES)
def test_a_masked_sample_is_no_ones_text_but_still_a_video(impl):
    video, text, mask = make(Case(6, 2, 8, masked=True))
    with use_impl(nce=impl):
        for form in FORMS:
            changed = text.clone()
            changed[~mask] = 7.0
            before = mil_nce(video, text, 0.07, mask=mask, form=form)
            assert mil_nce(video, changed, 0.07, mask=mask, form=form).item() == before.item()
            moved = video.clone()
            moved[~mask] = text[mask][0, 0]
            after = mil_nce(moved, text, 0.07, mask=mask, form=form)
            assert (after.item() == before.item()) == (form == "one_way")


@pytest.mark.parametrize("impl", IMPL_NAMES)
def test_autocast_does_not_lower_the_precision(impl):
    video, text, mask = make(Case(64, 2, 32, masked=True))
    results = []
    for enabled in (False, True):
        v = video.clone().requires_grad_()
        with use_impl(nce=impl), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = mil_nce(v, text, 0.07, mask=mask)
            results.append((loss.detach(), *torch.autograd.grad(loss, v)))
    assert results[0][0].item() == results[1][0].item()
    assert torch.equal(results[0][1], results[1][1])


def test_repeats_bit_for_bit():
    video, text, mask = make(Case(600, 5, 64, masked=True))
    runs = [losses_and_gradients(video, text, mask, 0.07, "joint", "chunked") for _ in range(2)]
    assert all(torch.equal(x, y) for x, y in zip(*runs))
