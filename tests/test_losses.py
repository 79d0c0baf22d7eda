"""VATTLoss: the official numbers, one global batch on any number of ranks, its configuration."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import run_ranks
from torch import distributed as dist
from torch import nn

from vatt_engine.batch import Embeddings
from vatt_engine.collectives import all_reduce_sum
from vatt_engine.dispatch import use_impl
from vatt_engine.losses import LossConfig, VATTLoss
from vatt_engine.ops.nce import FORMS
from vatt_engine.testing import Sum, assert_same_sums, impls_of, randn, sum_budget

GOLDEN = dict(np.load(Path(__file__).parent / "golden" / "e_objectives_nce_milnce.npz"))
OFFICIAL = {"asym": "joint", "sym": "symmetric"}
CASES = ("none", "all_valid", "some", "one_replica_empty", "all_empty")
IMPLS = [name for name, device in impls_of("nce") if device == "cpu"]
NAMES = ("v_a", "a_v", "v_t", "t_v")

WORLD, ROWS = 4, 8
MASKS = {
    "all": None,
    "uneven": [1, 1, 1, 0, 1, 0, 0, 1],
    "empty_rank": [1, 0, 1, 1, 0, 0, 1, 0],  # nothing for the third of four ranks
    "empty": [0] * ROWS,
}


def rounding(dim, temperature, size=1.0, dtype=torch.float32):
    """What two ways to compute a loss may differ by: four similarities, each a sum of D products that comes to 1 / t,
    and the exponentials of a row and a column, which come to 1. A gradient's G is off in proportion to its size.
    """
    sums = Sum(2 * dim, 4 * size / temperature), Sum(2 * 8 * ROWS, size)
    return sum_budget(*sums, dtype=dtype)


def golden(key):
    return torch.from_numpy(GOLDEN[key])


def golden_inputs():
    """v_a, a_v [2, 4, 16], v_t [2, 4, 8], t_v [2, 4, 5, 8]."""
    inputs = [golden(f"in/{name}") for name in NAMES]
    return [*inputs[:3], inputs[3].view(2, 4, 5, 8)]


# ------------------------------------------------------------------------------- what runs on each of four ranks


def on_rank() -> dict[str, float]:
    """Errors of this rank against the recorded numbers, and against the same batch on one process."""
    groups = {n: [dist.new_group(list(range(i, i + n))) for i in range(0, WORLD, n)] for n in (1, 2, 4)}
    groups = {n: every[dist.get_rank() // n] for n, every in groups.items()}
    errors = {}
    for impl in IMPLS:
        with use_impl(nce=impl):
            for official, form in OFFICIAL.items():
                for case in CASES:
                    errors |= golden_errors(groups[2], impl, official, form, case)
            for n, group in groups.items():
                for form in FORMS:
                    for name in MASKS:
                        errors[f"one batch/{impl}/{n}/{form}/{name}"] = one_batch_error(group, groups[1], form, name)
    for official, form in OFFICIAL.items():
        for case in CASES:
            errors |= golden_errors(groups[2], "ring", official, form, case, "ring")
    for n, group in groups.items():
        for form in FORMS:
            for name in MASKS:
                errors[f"one batch/ring/{n}/{form}/{name}"] = one_batch_error(group, groups[1], form, name, "ring")
    errors["ring saves"] = largest_saved_by_a_ring()
    errors["ddp"] = ddp_error(groups[1])
    return errors


def golden_errors(group, impl, official, form, case, gather="all") -> dict[str, float]:
    replica, prefix = dist.get_rank(group), f"{official}/{case}"
    inputs = [x[replica].requires_grad_() for x in golden_inputs()]
    mask = golden(f"{prefix}/text_mask")[replica].bool() if case != "none" else None
    terms = VATTLoss(LossConfig(form=form, average="rank", gather=gather), group=group)(
        Embeddings(*inputs), text_mask=mask
    )
    errors = {}
    for name, key in (("total", "loss"), ("video_audio", "vidaud"), ("video_text", "vidtxt")):
        want = golden(f"{prefix}/{key}_per_replica")[replica]
        errors[f"golden/{impl}/{prefix}/{name}"] = (getattr(terms, name) - want).abs().item()
    # Backward gives the gradient of the sum over replicas; the recorded one is of their mean.
    for name, gradient in zip(NAMES, torch.autograd.grad(terms.total, inputs)):
        every = golden(f"{prefix}/grad_{name}")
        difference = (gradient.flatten() / 2 - every[replica].flatten()).abs().max()
        scale = every.abs().max() if every.any() else 1.0
        errors[f"golden/{impl}/{prefix}/grad_{name}"] = (difference / scale).item()
    return errors


def split_loss(group, mask_name, form, gather="all"):
    """This rank's part of one batch of 8 in float64: its rows, the terms, and the gradients as DDP averages them."""
    world, rank = dist.get_world_size(group), dist.get_rank(group)
    mine = slice(rank * ROWS // world, (rank + 1) * ROWS // world)
    video, text = randn(ROWS, 6, seed=1, dtype=torch.float64), randn(ROWS, 3, 6, seed=2, dtype=torch.float64)
    audio = video + randn(ROWS, 6, seed=3, dtype=torch.float64)
    inputs = [x[mine].clone().requires_grad_() for x in (video, audio, video.flip(1), text)]
    text_mask = None if MASKS[mask_name] is None else torch.tensor(MASKS[mask_name]).bool()
    audio_mask = None if text_mask is None else text_mask.flip(0)[mine]
    config = LossConfig(form=form, learnable_temperature=True, temperature=0.1, video_text_weight=2.0, gather=gather)
    loss = VATTLoss(config, group=group).double()
    terms = loss(Embeddings(*inputs), audio_mask=audio_mask, text_mask=None if text_mask is None else text_mask[mine])
    *gradients, d_temperature = torch.autograd.grad(terms.total, [*inputs, loss.log_temperature])
    d_temperature = all_reduce_sum(d_temperature, group) / world
    return mine, torch.stack([*terms]).detach(), d_temperature, [gradient / world for gradient in gradients]


def one_batch_error(group, alone, form, mask_name, gather="all") -> float:
    """The largest difference between `group` with the batch split over it and this process with all of it."""
    mine, terms, d_temperature, gradients = split_loss(group, mask_name, form, gather)
    _, want_terms, want_d_temperature, want_gradients = split_loss(alone, mask_name, form)
    pairs = [(terms, want_terms), (d_temperature, want_d_temperature)]
    pairs += [(got, want[mine]) for got, want in zip(gradients, want_gradients)]
    return max((got - want).abs().max().item() for got, want in pairs)


def largest_saved_by_a_ring() -> int:
    """Elements of the largest tensor that autograd saves, with 4 rows of 2 candidates of 32 on each of four ranks."""
    sizes = []

    def pack(x):
        sizes.append(x.untyped_storage().nbytes() // x.element_size())
        return x

    inputs = randn(4, 32, seed=1).requires_grad_(), randn(4, 2, 32, seed=2).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        VATTLoss(LossConfig(gather="ring"))(Embeddings(video_text=inputs[0], text_video=inputs[1])).total.backward()
    return max(sizes)


class Towers(nn.Module):
    """One linear layer a modality."""

    def __init__(self):
        super().__init__()
        self.video, self.audio, self.text = (nn.Linear(6, 4, dtype=torch.float64) for _ in range(3))
        for seed, parameter in enumerate(self.parameters()):
            parameter.data = randn(*parameter.shape, seed=seed, dtype=torch.float64)

    def forward(self, video, audio, text):
        video = self.video(video)
        return Embeddings(video, self.audio(audio), video, self.text(text))


def ddp_error(alone) -> float:
    """Parameter gradients of torch's DDP on four ranks against those of one process with the whole batch."""
    shapes = ((ROWS, 6), (ROWS, 6), (ROWS, 3, 6))
    batch = [randn(*shape, seed=seed, dtype=torch.float64) for seed, shape in enumerate(shapes)]
    mask = torch.tensor(MASKS["empty_rank"]).bool()
    rows = slice(dist.get_rank() * ROWS // WORLD, (dist.get_rank() + 1) * ROWS // WORLD)
    whole, towers = Towers(), nn.parallel.DistributedDataParallel(Towers())
    VATTLoss(group=alone)(whole(*batch), text_mask=mask).total.backward()
    VATTLoss()(towers(*(x[rows] for x in batch)), text_mask=mask[rows]).total.backward()
    pairs = zip(towers.parameters(), whole.parameters(), strict=True)
    return max((got.grad - want.grad).abs().max().item() for got, want in pairs)


# ------------------------------------------------------------------------------------------------- several ranks


@pytest.fixture(scope="module")
def errors(tmp_path_factory):
    """The largest error of any rank, by name."""
    ranks = run_ranks("test_losses:on_rank", WORLD, tmp_path_factory.mktemp("ranks"))
    return {name: max(rank[name] for rank in ranks) for name in ranks[0]}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("official", OFFICIAL)
@pytest.mark.parametrize("impl", [*IMPLS, "ring"])
def test_official_numbers_on_two_ranks(errors, impl, official, case):
    found = {name: e for name, e in errors.items() if name.startswith(f"golden/{impl}/{official}/{case}/")}
    assert len(found) == 7
    of_losses, of_gradients = rounding(16, 0.07), rounding(16, 0.07, 1.0)  # these are relative to the largest
    assert all(error <= (of_gradients if "grad" in name else of_losses) for name, error in found.items()), found


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("impl", [*IMPLS, "ring"])
def test_any_number_of_ranks_is_one_batch(errors, impl, world, form, mask):
    largest = 1 / 0.1  # of a gradient: G and a row of size 1 over t
    assert errors[f"one batch/{impl}/{world}/{form}/{mask}"] < rounding(6, 0.1, largest, torch.float64)


def test_a_ring_holds_no_other_ranks_side(errors):
    assert errors["ring saves"] == 4 * 2 * 32


def test_averaged_parameter_gradients_are_those_of_the_global_loss(errors):
    assert errors["ddp"] < rounding(6, 0.07, 1 / 0.07, torch.float64)


# --------------------------------------------------------------------------------------------------- one process


@pytest.mark.parametrize("average", ["global", "rank"])
@pytest.mark.parametrize("case", ["none", "some"])
@pytest.mark.parametrize("official", OFFICIAL)
@pytest.mark.parametrize("impl", IMPLS)
def test_official_numbers_on_one_process(impl, official, case, average):
    embeddings = Embeddings(*(x.flatten(0, 1) for x in golden_inputs()))
    mask = golden(f"{official}/some/text_mask").flatten().bool() if case == "some" else None
    with use_impl(nce=impl):
        terms = VATTLoss(LossConfig(form=OFFICIAL[official], average=average))(embeddings, text_mask=mask)
    for name, key in (("total", "loss"), ("video_audio", "vidaud"), ("video_text", "vidtxt")):
        want = golden(f"{official}_single_replica/{case}/{key}")
        assert (getattr(terms, name) - want).abs() <= rounding(16, 0.07), name


def embeddings(dtype=torch.float32):
    return Embeddings(
        randn(4, 8, seed=1, dtype=dtype),
        randn(4, 8, seed=2, dtype=dtype),
        randn(4, 6, seed=3, dtype=dtype),
        randn(4, 3, 6, seed=4, dtype=dtype),
    )


def test_total_is_the_weighted_mean_of_the_pairs_that_are_there():
    whole = embeddings()
    terms = VATTLoss(LossConfig(video_audio_weight=3.0, video_text_weight=1.0))(whole)
    assert terms.total.item() == pytest.approx((3 * terms.video_audio.item() + terms.video_text.item()) / 4)
    no_text = VATTLoss()(whole._replace(text_video=None))
    assert no_text.total.item() == no_text.video_audio.item() == terms.video_audio.item()
    assert no_text.video_text.item() == 0
    text_alone = VATTLoss(LossConfig(video_audio_weight=0.0))(whole)
    assert text_alone.total.item() == text_alone.video_text.item() == terms.video_text.item()
    nothing_valid = VATTLoss()(whole, text_mask=torch.zeros(4).bool())
    assert nothing_valid.total.item() == pytest.approx(terms.video_audio.item() / 2)


def test_audio_mask_hides_samples_without_audio():
    whole, mask = embeddings(), torch.tensor([True, False, True, True])
    masked = VATTLoss()(whole, audio_mask=mask).video_audio
    other = whole._replace(audio_video=whole.audio_video.index_fill(0, torch.tensor([1]), 7.0))
    assert VATTLoss()(other, audio_mask=mask).video_audio.item() == masked.item()
    assert VATTLoss()(other).video_audio.item() != VATTLoss()(whole).video_audio.item()


def test_half_precision_embeddings_give_float32_terms():
    terms, half = VATTLoss()(embeddings()), VATTLoss()(embeddings(torch.bfloat16))
    assert half.total.dtype == torch.float32
    assert half.total.item() == pytest.approx(terms.total.item(), rel=0.02)


def test_learnable_temperature():
    loss = VATTLoss(LossConfig(learnable_temperature=True, temperature=0.2))
    assert [tuple(p.shape) for p in loss.parameters()] == [(1,)]
    assert loss.temperature().item() == pytest.approx(0.2)
    fixed = VATTLoss(LossConfig(temperature=0.2))
    assert list(fixed.parameters()) == []
    assert loss(embeddings()).total.item() == pytest.approx(fixed(embeddings()).total.item(), abs=rounding(8, 0.2))
    low, high = (VATTLoss(LossConfig(temperature=0.2 * factor))(embeddings()).total for factor in (0.999, 1.001))
    slope = (high - low).item() / (math.log(1.001) - math.log(0.999))
    loss(embeddings()).total.backward()
    assert loss.log_temperature.grad.item() == pytest.approx(slope, rel=1e-2)


@pytest.mark.parametrize(("start", "bound"), [(-9.0, 0.01), (3.0, 1.0)])
def test_a_temperature_out_of_bounds_returns_and_keeps_its_gradient(start, bound):
    loss = VATTLoss(LossConfig(learnable_temperature=True))
    loss.log_temperature.data.fill_(start)
    loss(embeddings()).total.backward()
    assert loss.log_temperature.item() == pytest.approx(math.log(bound))
    assert loss.log_temperature.grad.item() != 0


def test_learning_a_temperature_lowers_the_loss():
    loss = VATTLoss(LossConfig(learnable_temperature=True, temperature=0.01))
    optimizer = torch.optim.SGD(loss.parameters(), lr=0.05)
    history = []
    for _ in range(20):
        optimizer.zero_grad()
        history.append(loss(embeddings()).total)
        history[-1].backward()
        optimizer.step()
    assert history[-1].item() < 0.5 * history[0].item()


def test_compiles():
    torch.compiler.reset()
    for learnable in (False, True):
        loss = VATTLoss(LossConfig(learnable_temperature=learnable))
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        mask = torch.tensor([True, True, False, True])
        for got, want in zip(compiled(embeddings(), text_mask=mask), loss(embeddings(), text_mask=mask)):
            assert_same_sums(got, want, Sum(8, 4 / 0.07))


def test_rejects_a_bad_configuration():
    bad = [
        ({"form": "asym"}, r"LossConfig: form must be one of joint, symmetric, one_way, got 'asym'"),
        ({"average": "mean"}, r"LossConfig: average must be one of global, rank, got 'mean'"),
        ({"gather": "some"}, r"LossConfig: gather must be one of all, ring, got 'some'"),
        ({"temperature": 0.0}, r"LossConfig: temperature must be positive, got 0.0"),
        ({"temperature": math.nan}, r"LossConfig: temperature must be positive, got nan"),
        ({"temperature": 2.0, "learnable_temperature": True}, r"temperature must be in \[0.01, 1.0\], got 2.0"),
        ({"video_text_weight": -1.0}, r"video_text_weight must be finite and not negative, got -1.0"),
        ({"video_audio_weight": 0.0, "video_text_weight": 0.0}, r"video_audio_weight must .*, got 0.0"),
    ]
    for values, message in bad:
        with pytest.raises(ValueError, match=message):
            LossConfig(**values)


def test_rejects_bad_embeddings():
    whole, loss = embeddings(), VATTLoss()
    bad = [
        ({"audio_video": whole.audio_video[:3]}, {}, r"VATTLoss: audio_video must have the shape of video_audio"),
        ({"text_video": whole.text_video[:, 0]}, {}, r"VATTLoss: text_video must be \[4, P, 6\], got shape \[4, 6\]"),
        ({}, {"text_mask": torch.ones(4)}, r"VATTLoss: text_mask must be bool \[4\], got torch.float32 \[4\]"),
        ({}, {"audio_mask": torch.ones(3).bool()}, r"VATTLoss: audio_mask must be bool \[4\], got torch.bool \[3\]"),
        ({"video_audio": None, "text_video": None}, {}, r"VATTLoss: embeddings must hold a pair of positive weight"),
    ]
    for fields, masks, message in bad:
        with pytest.raises(ValueError, match=message):
            loss(whole._replace(**fields), **masks)
