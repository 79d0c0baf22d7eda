"""drop_token and sample_keep: gather with gradient, and positions that depend on the seed alone."""

from __future__ import annotations

import sys
import warnings

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.dlpack import to_dlpack

from vatt_engine import dispatch, ops
from vatt_engine.dispatch import available_impls, use_impl
from vatt_engine.ops.drop_token import _bwd, _fwd, _sample, drop_token_reference
from vatt_engine.splitmix import splitmix64
from vatt_engine.testing import Sum, assert_within_budget, gradients, impls_of, randn

# batch, tokens, width, kept: the first rows fill 16-byte units, the others do not
CASES = [(2, 1568, 16, 784), (1, 1, 1, 1), (3, 37, 5, 37), (2, 13, 7, 1), (2, 70, 33, 64), (0, 3, 4, 2)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
IMPLS = impls_of("drop_token")


def keep_for(case, per_sample):
    batch, tokens, _, kept = case
    ids = torch.arange(batch) if per_sample else None
    return ops.sample_keep(tokens, kept, seed=1, sample_id=ids)


def check_against_reference(impl, x, keep):
    """y and dx of one implementation inside the budget of the reference in the same dtype."""
    x, exact = x.detach().requires_grad_(), x.detach().double().requires_grad_()
    with use_impl(drop_token=impl):
        y = ops.drop_token(x, keep)
        (dx,) = gradients(y, [x])
    with use_impl(drop_token="reference"):
        low, want = ops.drop_token(x, keep), ops.drop_token(exact, keep)
        low_dx, want_dx = gradients(low, [x])[0], gradients(want, [exact])[0]
    assert torch.equal(y, drop_token_reference(x, keep))  # nothing is computed, so nothing is rounded
    assert_within_budget(dx, low_dx, want_dx, Sum(keep.shape[-1]), name="dx")  # rows that may all be one token's


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(("impl", "device"), IMPLS)
def test_matches_reference(impl, device, case, dtype, per_sample):
    check_against_reference(impl, randn(*case[:3], dtype=dtype, device=device), keep_for(case, per_sample).to(device))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("impl", "device"), IMPLS)
def test_positions_kept_often_add_up_in_float32(impl, device, dtype):
    """200 gradients of 1 + 1/64 on one row: a half-precision running sum would lose the small part."""
    keep = torch.tensor([[5] * 200 + [0, 64], [64] * 100 + [3] * 102], device=device)
    grad = torch.full((2, 202, 9), 1 + 1 / 64, dtype=dtype, device=device)
    want = torch.zeros(2, 65, 9, dtype=torch.float64)
    for b, n, count in ((0, 5, 200), (0, 0, 1), (0, 64, 1), (1, 64, 100), (1, 3, 102)):
        want[b, n] = count * (1 + 1 / 64)
    with use_impl(drop_token=impl):
        dx = _bwd(grad, keep, 65)
    if impl == "reference":  # adds in the dtype it is given, and is no better than that
        want = torch.zeros_like(dx).scatter_add_(1, keep.unsqueeze(-1).expand_as(grad), grad).double().cpu()
    assert torch.equal(dx.cpu(), want.to(dtype))


@pytest.mark.parametrize(("impl", "device"), IMPLS)
def test_any_strides(impl, device):
    wide = randn(4, 3, 2 * 24, device=device)
    keep = torch.tensor([[2, 0, 9, 9, 1]] * 6, device=device).t()[:2].t()  # [6, 2], columns of another matrix
    for x in (
        wide.transpose(0, 1),  # samples and tokens exchanged
        wide[:, :, 1:25],  # rows that start off alignment
        wide[:, :, ::2],  # gaps between values
        wide[:, :, :1].expand(4, 3, 8),  # one value for a row
        wide[:1].expand(6, 3, 48),  # one sample for all
    ):
        check_against_reference(impl, x, torch.tensor([2, 0], device=device))
        check_against_reference(impl, x, torch.tensor([0, 7, 2, 7], device=device)[::2])
        check_against_reference(impl, x, keep[: x.shape[0]])


@pytest.mark.parametrize(("impl", "device"), IMPLS)
def test_the_gradient_is_the_same_every_time(impl, device):
    keep = torch.randint(50, (3, 400), generator=torch.Generator().manual_seed(0)).to(device)
    grad = randn(3, 400, 40, dtype=torch.bfloat16, device=device)
    with use_impl(drop_token=impl):
        first = _bwd(grad, keep, 50)
        assert all(torch.equal(_bwd(grad, keep, 50), first) for _ in range(5)) or impl == "reference"


@pytest.mark.parametrize("seed", [0, 7, -1, 2**63 - 1, -(2**63)])
@pytest.mark.parametrize("size", [(1, 1), (2, 1), (2, 2), (31, 31), (100, 50), (1568, 784), (1200, 1), (5000, 4999)])
@pytest.mark.parametrize(("impl", "device"), IMPLS)
def test_every_implementation_draws_the_same(impl, device, size, seed):
    ids = torch.tensor([0, 1, -1, 2**62, 12345], device=device)
    with use_impl(drop_token=impl):
        one = ops.sample_keep(*size, seed=seed, device=device)
        each = ops.sample_keep(*size, seed=torch.tensor([seed], device=device), sample_id=ids)
        none = ops.sample_keep(*size, seed=seed, sample_id=ids[:0])
    assert one.dtype == each.dtype == torch.int64
    assert torch.equal(one.cpu(), smallest_hashes(*size, seed))
    assert torch.equal(each.cpu(), torch.stack([smallest_hashes(*size, seed, i) for i in ids.tolist()]))
    assert none.shape == (0, size[1])


def smallest_hashes(num_tokens, num_kept, seed, sample_id=None):
    """The definition in integers of Python: positions by their whole hash, which settles ties as the keys do."""
    stream = splitmix(seed)
    if sample_id is not None:
        stream = splitmix(stream ^ splitmix(sample_id))
    hashes = [splitmix(stream ^ splitmix(n)) for n in range(num_tokens)]
    signed = [h - (1 << 64) if h >> 63 else h for h in hashes]
    return torch.tensor(sorted(range(num_tokens), key=signed.__getitem__)[:num_kept])


def splitmix(x):
    mask = (1 << 64) - 1
    x = (x + 0x9E3779B97F4A7C15) & mask
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & mask
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & mask
    return x ^ (x >> 31)


def test_the_most_tokens_there_may_be():
    most = 1 << 20
    drawn = {}
    for impl in ("cpp", "reference"):
        with use_impl(drop_token=impl):
            drawn[impl] = ops.sample_keep(most, most, seed=3)
    assert torch.equal(drawn["cpp"], drawn["reference"])
    assert torch.equal(drawn["cpp"].sort().values, torch.arange(most))
    with pytest.raises(ValueError, match="num_tokens must be at most 1048576, got 1048577"):
        ops.sample_keep(most + 1, 1, seed=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_beside_the_output_is_written(dtype):
    from vatt_engine import _C

    def untouched(whole):
        return (torch.cat([whole[:32], whole[-32:]]) == 77).all()

    def guarded(*shape, dtype):
        whole = torch.full((torch.Size(shape).numel() + 64,), 77, dtype=dtype)
        return whole, whole[32:-32].view(shape)

    x, keep = randn(2, 11, 7, dtype=dtype), torch.tensor([[10, 0, 3], [3, 3, 3]])
    for rows, scatter, expected in ((x, False, _fwd(x, keep)), (x[:, :3], True, _bwd(x[:, :3], keep, 11))):
        whole, out = guarded(*expected.shape, dtype=dtype)
        _C.drop_token(to_dlpack(rows), to_dlpack(keep), to_dlpack(out), scatter, 2, 0)
        assert torch.equal(out, expected)
        assert untouched(whole)
    whole, out = guarded(3, 5, dtype=torch.int64)
    ids = torch.arange(3)
    _C.sample_keep(to_dlpack(torch.tensor(4)), to_dlpack(ids), 9, to_dlpack(out), 2, 0)
    assert torch.equal(out, ops.sample_keep(9, 5, seed=4, sample_id=ids))
    assert untouched(whole)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_change_nothing(threads):
    """Rows enough for several threads, whose pieces begin in the middle of a sample."""
    x = randn(3, 501, 1024)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        ids = torch.arange(97)
        with use_impl(drop_token="cpp"):
            keep = ops.sample_keep(501, 333, seed=0, sample_id=ids)
            results = [(_fwd(x, k), _bwd(x[:, :333], k, 501)) for k in (keep[:3], keep[0])]
    finally:
        torch.set_num_threads(before)
    with use_impl(drop_token="reference"):
        assert torch.equal(keep, ops.sample_keep(501, 333, seed=0, sample_id=ids))
        for (y, dx), k in zip(results, (keep[:3], keep[0])):
            assert torch.equal(y, _fwd(x, k))
            assert torch.equal(dx, _bwd(x[:, :333], k, 501))


def test_a_missing_extension_degrades_with_one_warning(monkeypatch):
    x, keep = randn(2, 5, 3), torch.tensor([4, 0])
    expected = [_fwd(x, keep), _bwd(x[:, :2], keep, 5), ops.sample_keep(9, 4, seed=2)]
    monkeypatch.setitem(sys.modules, "vatt_engine._C", None)  # importing it raises
    monkeypatch.setattr(dispatch, "_WARNED", set())
    dispatch.native_missing.cache_clear()
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            actual = [_fwd(x, keep), _bwd(x[:, :2], keep, 5), ops.sample_keep(9, 4, seed=2)]
        with use_impl(drop_token="cpp"), pytest.raises(RuntimeError, match="is not built"):
            _fwd(x, keep)
    finally:
        dispatch.native_missing.cache_clear()
    assert ["drop_token: cpp is not available" in str(w.message) for w in caught] == [True]
    assert all(torch.equal(a, b) for a, b in zip(actual, expected))


def test_the_door_never_waits_for_the_device():
    """A seed is filled in, not copied; nothing is read back."""
    called = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            called.append(str(func))
            return func(*args, **(kwargs or {}))

    seed, ids = torch.tensor([5]), torch.arange(3)
    with Record():
        ops.sample_keep(9, 4, seed=5)
        ops.sample_keep(9, 4, seed=seed, sample_id=ids)
    assert called[:2] == ["aten.full.default", "vatt.sample_keep.default"]
    assert not {"aten._local_scalar_dense.default", "aten._to_copy.default"} & set(called)


def test_what_exists_and_in_which_order():
    assert list(available_impls("drop_token", "cpu")) == ["cpp", "cuda", "triton", "reference"]
    if not torch.cuda.is_available():
        assert available_impls("drop_token", "cuda")["triton"] is not None
        with use_impl(drop_token="triton"), pytest.raises(RuntimeError, match="triton: runs on cuda"):
            ops.sample_keep(4, 2, seed=0)
    x = torch.zeros(1, 2, 3, dtype=torch.float64)
    with use_impl(drop_token="cpp"), pytest.raises(RuntimeError, match=r"cpp: moves .*, got torch.float64"):
        ops.drop_token(x, torch.tensor([1]))


@pytest.mark.parametrize("keep", [torch.tensor([2, 0, 2]), torch.tensor([[2, 0, 1], [1, 1, 1]])])
def test_reference_is_the_definition(keep):
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    y = drop_token_reference(x, keep)
    for b in range(2):
        for i in range(3):
            position = keep[i] if keep.ndim == 1 else keep[b, i]
            assert torch.equal(y[b, i], x[b, position])
    assert torch.autograd.gradcheck(lambda t: ops.drop_token(t, keep), x)  # positions kept twice add up


def test_registration():
    x, keep = torch.randn(2, 5, 3), torch.tensor([[4, 0], [1, 1]])
    torch.library.opcheck(_fwd, (x, keep))
    torch.library.opcheck(_bwd, (x[:, :2], keep, 5))
    torch.library.opcheck(_sample, (torch.tensor(3), None, 7, 2))
    torch.library.opcheck(_sample, (torch.tensor(3), torch.arange(2), 7, 7))


def test_compiles():
    def op(x, seed, ids):
        return ops.drop_token(x, ops.sample_keep(x.shape[1], 2, seed=seed, sample_id=ids))

    compiled = torch.compile(op, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens, seed, ids in ((5, 3, None), (6, 4, None), (6, torch.tensor(4), torch.arange(2))):
        x = torch.randn(2, tokens, 3, requires_grad=True)
        assert torch.equal(compiled(x, seed, ids), op(x, seed, ids))
        assert torch.equal(gradients(compiled(x, seed, ids), [x])[0], gradients(op(x, seed, ids), [x])[0])


@pytest.mark.parametrize(
    ("tokens", "keep", "message"),
    [
        (torch.zeros(2, 3), torch.tensor([0]), r"tokens must be \[B, N, D\], got shape \(2, 3\)"),
        (torch.zeros(2, 3, 4), torch.tensor([0.0]), "keep must be int64, got torch.float32"),
        (torch.zeros(2, 3, 4), torch.zeros(3, 1).long(), r"keep must be \[K\] or \[2, K\], got shape \(3, 1\)"),
        (torch.zeros(2, 3, 4, device="meta"), torch.tensor([0]), "keep must be on the device of tokens, meta, got cpu"),
    ],
)
def test_rejects_bad_arguments(tokens, keep, message):
    with pytest.raises(ValueError, match=message):
        ops.drop_token(tokens, keep)
    with pytest.raises(ValueError, match=r"num_kept must be in 1\.\.8, got 9"):
        ops.sample_keep(8, 9, seed=0)
    with pytest.raises(ValueError, match=r"sample_id must be int64 \[B\], got torch.float32 \[2\]"):
        ops.sample_keep(8, 4, seed=0, sample_id=torch.zeros(2))


@pytest.mark.parametrize("impl", [impl for impl, device in IMPLS if device == "cpu"])
@pytest.mark.parametrize("keep", [torch.tensor([0, 5]), torch.tensor([[1], [-1]])])
def test_positions_outside_the_tokens(impl, keep):
    wrong = 5 if keep.ndim == 1 else -1
    with use_impl(drop_token=impl), pytest.raises(ValueError, match=rf"positions in \[0, 5\), got {wrong}"):
        ops.drop_token(torch.zeros(2, 5, 3), keep)
    with use_impl(drop_token=impl), pytest.raises(ValueError, match=rf"positions in \[0, 5\), got {wrong}"):
        _bwd(torch.zeros(2, keep.shape[-1], 3), keep, 5)


def test_positions_depend_on_seed_and_sample_alone():
    everyone = ops.sample_keep(100, 50, seed=7, sample_id=torch.tensor([11, 12, 13]))
    alone = ops.sample_keep(100, 50, seed=7, sample_id=torch.tensor([13]))
    assert torch.equal(everyone[2], alone[0])
    assert not torch.equal(everyone[0], everyone[1])
    assert torch.equal(ops.sample_keep(100, 50, seed=torch.tensor([7])), ops.sample_keep(100, 50, seed=7))
    assert not torch.equal(ops.sample_keep(100, 50, seed=8), ops.sample_keep(100, 50, seed=7))


def test_positions_are_uniform():
    """Every position is kept equally often, and in every place: chi-square of 10,000 draws of 4 of 8."""
    ids = torch.arange(10_000)
    keep = ops.sample_keep(8, 4, seed=0, sample_id=ids)
    for place in range(4):
        counts = torch.bincount(keep[:, place], minlength=8).double()
        chi_square = ((counts - 1250) ** 2 / 1250).sum().item()
        assert chi_square < 24.3  # 99.9 % of chi-square with 7 degrees of freedom
    pairs = torch.bincount(keep[:, 0] * 8 + keep[:, 1], minlength=64).double()
    assert ((pairs[pairs > 0] - 10_000 / 56) ** 2 / (10_000 / 56)).sum().item() < 93.2  # 55 degrees of freedom


def test_hash_is_splitmix64():
    """The published first outputs of splitmix64 seeded with 1234567."""
    seed = torch.tensor(1234567)
    golden = 0x9E3779B97F4A7C15 - (1 << 64)
    outputs = [splitmix64(seed + i * golden).item() % (1 << 64) for i in range(2)]
    assert outputs == [6457827717110365317, 3203168211198807973]
