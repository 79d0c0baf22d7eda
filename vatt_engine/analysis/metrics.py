"""Classification metrics of the paper's section 4: top-k, and mAP, AUC and d' of many labels at once.

Scores may be logits or probabilities: every metric here depends on their order alone. Retrieval is in `similarity`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def top_k_accuracy(scores: Tensor, labels: Tensor, ks: Sequence[int] = (1, 5)) -> dict[str, float]:
    """Share of samples whose class is among their k best, in percent; among tied scores torch's topk decides.

    Args:
        scores: [N, C], finite.
        labels: [N], int64, in 0..C-1.
        ks: each in 1..C.

    Raises:
        ValueError: a shape or a value is not as above.

    >>> top_k_accuracy(torch.tensor([[0.1, 0.7, 0.2], [0.5, 0.3, 0.2]]), torch.tensor([2, 0]), ks=(1, 2))
    {'top-1': 50.0, 'top-2': 100.0}
    """
    from torchmetrics.functional.classification import multiclass_accuracy

    check_matrix("top_k_accuracy: scores", "[samples, classes]", scores)
    check_columns("top_k_accuracy: labels", labels, scores)
    num_classes = scores.shape[1]
    for k in ks:
        if not 1 <= k <= num_classes:
            raise ValueError(f"top_k_accuracy: ks must be in 1..{num_classes}, got {k}.")
    if num_classes == 1:
        return {f"top-{k}": 100.0 for k in ks}  # torchmetrics knows no single class
    options = {"num_classes": num_classes, "average": "micro"}
    return {f"top-{k}": 100 * multiclass_accuracy(scores, labels, top_k=k, **options).item() for k in ks}


def average_precision(scores: Tensor, targets: Tensor) -> Tensor:
    """Average precision of each class, sum_n (R_n - R_n-1) P_n over its distinct scores; NaN without a positive.

    Args:
        scores: [N, C], finite.
        targets: [N, C], bool or of 0 and 1.

    Returns:
        [C], float64, in 0..1.

    Raises:
        ValueError: a shape or a value is not as above.

    >>> average_precision(torch.tensor([[0.9], [0.8], [0.1]]), torch.tensor([[1], [0], [1]])).tolist()
    [0.83333...]
    """
    from torchmetrics.functional.classification import binary_average_precision

    return _by_class(binary_average_precision, scores, targets, lambda positives, _: positives > 0)


def roc_auc(scores: Tensor, targets: Tensor) -> Tensor:
    """Area under the ROC curve of each class: how often a positive is above a negative, ties counted half.

    NaN for a class without a positive or without a negative. Arguments and result as for `average_precision`.

    >>> roc_auc(torch.tensor([[0.9], [0.5], [0.5]]), torch.tensor([[1], [1], [0]])).tolist()
    [0.75]
    """
    from torchmetrics.functional.classification import binary_auroc

    return _by_class(binary_auroc, scores, targets, lambda positives, negatives: positives > 0 and negatives > 0)


def d_prime(auc: Tensor) -> Tensor:
    """sqrt(2) Phi^-1(AUC): how far apart two unit normals are whose ROC has this area; infinite at 0 and 1.

    >>> d_prime(torch.tensor([0.5, 0.958], dtype=torch.float64)).tolist()
    [0.0, 2.44366...]
    """
    return math.sqrt(2) * torch.special.ndtri(auc.double())


def multi_label_metrics(scores: Tensor, targets: Tensor) -> dict[str, float]:
    """AudioSet's metrics: means over the classes for which each is defined.

    Both readings of d' stand side by side: `d'` is the mean of the classes' own (the official code's, and 2.895 of the
    paper's Table 2), `d' of AUC` that of the mean AUC (the table's other rows: 95.8 -> 2.444). They are not comparable.

    Args:
        scores, targets: [N, C], as for `average_precision`.

    Returns:
        mAP and AUC in percent, d' (infinite where a class is separated perfectly), d' of AUC, and how many classes had
        a positive (mAP) and both kinds (AUC, d'); NaN where there are none.

    Source: official vatt/utils/eval/measures.py (scikit-learn's functions, where every class has both kinds).

    >>> scores = torch.tensor([[0.9, 0.2], [0.6, 0.7], [0.4, 0.4], [0.1, 0.3]])
    >>> multi_label_metrics(scores, torch.tensor([[1, 0], [0, 1], [1, 0], [0, 1]]))["AUC"]
    75.0
    """
    precisions, areas = average_precision(scores, targets), roc_auc(scores, targets)
    mean_area = areas.nanmean()
    return {
        "mAP": 100 * precisions.nanmean().item(),
        "AUC": 100 * mean_area.item(),
        "d'": d_prime(areas).nanmean().item(),
        "d' of AUC": d_prime(mean_area).item(),
        "classes with a positive": int((~precisions.isnan()).sum()),
        "classes with both": int((~areas.isnan()).sum()),
    }


def check_matrix(where: str, form: str, matrix: Tensor) -> None:
    """Refuse what is no finite matrix; `form` says what its two axes are."""
    if matrix.ndim != 2 or 0 in matrix.shape:
        raise ValueError(f"{where} must be {form}, got {list(matrix.shape)}.")
    if not matrix.isfinite().all():
        bad = int((~matrix.isfinite()).sum())
        raise ValueError(f"{where} must be finite, got {bad} NaN or infinite values.")


def check_columns(where: str, indices: Tensor, matrix: Tensor) -> None:
    """Refuse what does not name a column for each row of a matrix."""
    rows, columns = matrix.shape
    if indices.shape != (rows,) or indices.dtype != torch.int64:
        raise ValueError(f"{where} must be int64 [{rows}], got {indices.dtype} {list(indices.shape)}.")
    if indices.min() < 0 or indices.max() >= columns:
        found = f"{int(indices.min())}..{int(indices.max())}"
        raise ValueError(f"{where} must be in 0..{columns - 1}, got {found}.")


def _by_class(
    metric: Callable[[Tensor, Tensor], Tensor],
    scores: Tensor,
    targets: Tensor,
    defined: Callable[[int, int], bool],
) -> Tensor:
    """`metric` of every class's own column, NaN where it is not `defined` by its numbers of positives and negatives.

    torchmetrics is given ranks, equal for tied scores: of values outside 0..1 it would take a sigmoid, which in float32
    makes all large logits equal.
    """
    check_matrix("multi_label_metrics: scores", "[samples, classes]", scores)
    if targets.shape != scores.shape:
        expected = list(scores.shape)
        raise ValueError(f"multi_label_metrics: targets must be {expected}, got {list(targets.shape)}.")
    if not ((targets == 0) | (targets == 1)).all():
        raise ValueError("multi_label_metrics: targets must be 0 or 1, got another value.")
    found = torch.full((scores.shape[1],), math.nan, dtype=torch.float64)
    for index, (column, target) in enumerate(zip(scores.T, targets.T.long())):
        positives = int(target.sum())
        if defined(positives, len(target) - positives):
            ranks = column.unique(return_inverse=True)[1].double() / len(column)
            found[index] = metric(ranks, target).item()
    return found
