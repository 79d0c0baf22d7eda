"""The peers of bench_step: the plain one computes what ours does, and one that does not is told."""

import dataclasses

import pytest
import torch

from benchmarks import bench_step, peers
from benchmarks.harness import Case
from benchmarks.shapes import SHAPES, Step
from vatt_engine import VATTLoss, create_model
from vatt_engine.testing import assert_same_formula

SMALL = Step(model="vatt_tiny", batch=3, layers=1)
AGNOSTIC = {
    "backbone": "agnostic",
    "shared": {"num_layers": 1, "dim": 128, "ff_dim": 256, "num_heads": 4, "head_dim": 32, "dropout": 0.0},
    "video.pre_projection": True,
    "audio.pre_projection": True,
    "text.position.dropout": 0.0,
}


@pytest.mark.parametrize("changes", [{}, AGNOSTIC], ids=["specific", "agnostic"])
def test_the_plain_peer_has_our_loss_and_gradients(changes):
    everything = {f"{modality}.drop_token.keep_rate": 1.0 for modality in ("video", "audio")}
    ours = create_model("vatt_tiny", **changes, **everything).double().train()
    plain = peers.PeerVATT(ours.config).double().train()
    missing = plain.load_state_dict(peers.plain_weights(ours.state_dict(), ours.config), strict=False)
    assert [name for name in missing.missing_keys if "num_batches_tracked" not in name] == []
    assert missing.unexpected_keys == []
    batch = bench_step.clips(SMALL, "cpu")
    batch.text[:, :, 9:] = 0
    batch = dataclasses.replace(batch, audio=batch.audio.double())
    exact, found = VATTLoss()(ours(batch, seed=0)).total, peers.naive_loss(*plain(batch))
    assert_same_formula(found, exact)
    exact.backward()
    found.backward()
    gradients = {name: p.grad for name, p in ours.named_parameters()}
    largest = max(gradient.abs().max().item() for gradient in gradients.values())
    for name, gradient in peers.plain_weights(gradients, ours.config).items():
        assert_same_formula(plain.get_parameter(name).grad, gradient, size=largest, name=name)


def given_for(*names):
    return {"batch": bench_step.clips(SMALL, "cpu")} | {
        "steppers": {name: bench_step.STEPPERS[name](SMALL, torch.float32, "cpu") for name in names}
    }


def test_a_peer_that_computes_something_else_is_told(monkeypatch):
    monkeypatch.setitem(SHAPES["step"]["cpu"], "small", SMALL)
    case, given = Case("step", "small", "fp32", "step", "cpu"), given_for("plain", "ours")
    assert list(bench_step.check(None, case, given).calls) == ["plain", "ours"]
    given = given_for("plain", "ours")  # with the weights of before those steps
    with torch.no_grad():
        given["steppers"]["plain"].model.stems["video"].agg.mul_(-1)
    failed = bench_step.check(None, case, given).failed
    assert list(failed) == ["plain"]
    assert failed["plain"].startswith("video_audio: relative error")
    deeper = dataclasses.replace(SMALL, layers=2)
    given["steppers"]["plain"] = bench_step.STEPPERS["plain"](deeper, torch.float32, "cpu")
    assert "parameters, ours" in bench_step.check(None, case, given).failed["plain"]


def test_phases_add_up_to_the_step(monkeypatch):
    """On a clock that goes on by one at every look: each phase is what lies between its ends, none is left out."""
    ticks = iter(range(10**6))
    monkeypatch.setattr(bench_step.time, "perf_counter", lambda: next(ticks))
    monkeypatch.setattr(bench_step, "PHASE_ROUNDS", 1)
    given = given_for("plain", "ours")
    for name in ("plain", "ours"):
        found = bench_step.phases(Case("step", "small", "fp32", "step", "cpu"), name, given)
        assert list(found) == ["data ms", "forward ms", "loss ms", "backward ms", "optimizer ms"]
        looks = 5 if name == "plain" else 7  # our Adam's step tells its begin and its end twice
        assert sum(found.values()) == 1e3 * looks


@pytest.mark.skipif(not peers.HAS_HF, reason="needs transformers and open_clip")
def test_hugging_face_towers_are_of_our_size_and_learn():
    given = given_for("hf", "ours")
    assert bench_step.peer_fault("hf", SMALL, given) is None
    losses = [given["steppers"]["hf"].step(given["batch"]).item() for _ in range(12)]
    assert losses[-1] < losses[0]


def test_a_compiled_form_of_ours_that_computes_something_else_is_told():
    name = "ours, layers compiled"
    given = given_for("ours")
    given["steppers"][name] = bench_step.engine(SMALL, torch.float32, "cpu")
    assert bench_step.own_fault(name, given) is None
    with torch.no_grad():
        given["steppers"][name].module.heads.text_video[0].weight.mul_(-1)
    assert bench_step.own_fault(name, given).startswith("the first loss is")
