"""Zero-shot retrieval metrics from a similarity matrix: recall at k and median rank, in which ties never help."""

from __future__ import annotations

import torch
from torch import Tensor

from vatt_engine.analysis.metrics import check_columns, check_matrix


def target_ranks(similarity: Tensor, targets: Tensor | None = None) -> Tensor:
    """Rank of each query's target among all candidates, 1 for the best.

        rank_i = number of candidates j with s[i, j] >= s[i, target_i]

    The target counts itself, and every tie counts against it: the rank does not depend on a sorting algorithm, and a
    collapsed model, whose similarities are all equal, ranks everything last instead of first.

    Args:
        similarity: [Nq, Nc], finite; row i holds query i's similarity to each candidate.
        targets: [Nq], int64, the right candidate of each query; None means candidate i for query i.

    Returns:
        [Nq], int64, in 1..Nc.

    Raises:
        ValueError: a shape, an index or a value is not as above.

    >>> target_ranks(torch.tensor([[0.9, 0.1], [0.5, 0.5]])).tolist()
    [1, 2]
    """
    check_matrix("retrieval: similarity", "[queries, candidates]", similarity)
    if targets is None:
        if similarity.shape[0] != similarity.shape[1]:
            shape = list(similarity.shape)
            raise ValueError(f"retrieval: similarity must be square where there are no targets, got {shape}.")
        targets = torch.arange(len(similarity), device=similarity.device)
    check_columns("retrieval: targets", targets, similarity)
    own = similarity.gather(1, targets[:, None])
    return (similarity >= own).sum(1)


def retrieval_metrics(similarity: Tensor, targets: Tensor | None = None) -> dict[str, float]:
    """Recall, median rank, and what guessing would give.

    R@1, R@5 and R@10 are the shares in percent of the queries whose target is among the best 1, 5 and 10; `chance` is
    the R@10 of guessing. MedR is the median of the 1-based ranks, the mean of the two middle ones for an even number.

    Args:
        similarity: [Nq, Nc], see target_ranks.
        targets: [Nq], int64, or None for the diagonal.

    Raises:
        ValueError: see target_ranks.

    Source: official vatt/utils/eval/measures.py (there fractions, and ties in the order of a sort).

    >>> retrieval_metrics(torch.eye(20))
    {'R@1': 100.0, 'R@5': 100.0, 'R@10': 100.0, 'MedR': 1.0, 'chance': 50.0}
    """
    ranks = target_ranks(similarity, targets)
    metrics = {f"R@{k}": 100 * (ranks <= k).double().mean().item() for k in (1, 5, 10)}
    median = ranks.double().quantile(0.5).item()
    return metrics | {"MedR": median, "chance": 100 * min(1.0, 10 / similarity.shape[1])}
