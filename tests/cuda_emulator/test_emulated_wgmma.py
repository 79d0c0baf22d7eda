"""The emulator's wgmma multiplies, by descriptors of either kind, and notices what a kernel forgets."""

import pytest
import torch

from cuda_emulator import HERE, Guarded, build
from vatt_engine.testing import Sum, assert_same_sums

ORDERS = (0, 1, 7)  # of the warps: ascending, descending, shuffled


@pytest.fixture(scope="module")
def faults():
    return build(HERE / "wgmma_faults.cu")


def product(faults, name, across=(False, False), order=0):
    a, b = (Guarded(torch.randn(rows, 64).bfloat16()) for rows in (128, 256))
    out = Guarded(torch.zeros(128, 256))
    faults.set_order(order)
    faults.run(name, a.tensor.data_ptr(), b.tensor.data_ptr(), out.tensor.data_ptr(), *across)
    return out.tensor, a.tensor.float() @ b.tensor.float().T


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("across", [(False, False), (False, True), (True, False), (True, True)])
def test_it_multiplies(faults, across, order):
    assert_same_sums(*product(faults, "right", across, order), Sum(64))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    "fault",
    [
        "without a fence",
        "without a proxy fence",
        "without a commit",
        "without a wait",
        "with a group in flight",
        "overwritten too early",
        "copied to too early",
        "without a barrier",
    ],
)
def test_what_is_forgotten_shows(faults, fault, order):
    out, _ = product(faults, fault, order=order)
    assert out.isnan().any()
