"""What ops.mil_nce keeps for its backward pass."""

import torch

from vatt_engine.ops.nce import FORMS, mil_nce
from vatt_engine.testing import randn


def test_saves_no_matrix():
    """Autograd keeps the inputs and vectors: O(B D), no tensor of the size of the similarities."""
    saved = {}
    rows, candidates, dim = 256, 2, 8
    video, text = randn(rows, dim).requires_grad_(), randn(rows, candidates, dim, seed=1).requires_grad_()
    mask = torch.arange(rows) % 2 == 0

    def pack(x):
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes() // x.element_size()
        return x

    for form in FORMS:
        saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            loss = mil_nce(video, text, torch.tensor([0.07], requires_grad=True), mask=mask, form=form)
        assert max(saved.values()) == text.numel()
        assert sum(saved.values()) <= video.numel() + text.numel() + 32 * rows
        loss.backward()
