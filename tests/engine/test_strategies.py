"""Every strategy on any number of ranks, with any number of parts, is one process with the whole batch."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from ranks import run_ranks

from vatt_engine.batch import Batch
from vatt_engine.collectives import rank, world_size
from vatt_engine.engine import strategies, strategies_zero
from vatt_engine.engine.checkpoint import load_latest
from vatt_engine.engine.engine import ZERO_FROM, Engine, EngineConfig
from vatt_engine.engine.optim import OptimConfig
from vatt_engine.engine.schedule import ScheduleConfig
from vatt_engine.engine.strategies_zero import DEEPSPEED, PRIVATE, PRIVATE_OFFLOADED, check_private
from vatt_engine.losses import LossConfig, VATTLoss
from vatt_engine.models import create_model
from vatt_engine.testing import Sum, sum_budget, transformer_terms

ROWS, STEPS = 12, 10
# What a gradient of `model` adds up: in forward and again in backward a patch of 4 x 8 x 8 pixels, a layer and three
# heads, and then the rows of all samples. Two ways to do so may differ by this share of the largest gradient.
ONE_WAY = 768 + transformer_terms(layers=1, dim=32, ff_dim=48, tokens=17) + 3 * 32
GRADIENT_TOLERANCE = sum_budget(Sum(2 * (2 * ONE_WAY + ROWS * 17)))
# A loss is about 3, and the mean over samples of cosines over a temperature of 0.5: about a millionth of it.
STEP_TOLERANCE = sum_budget(Sum(2 * ONE_WAY, 1 / 0.5 / ROWS**0.5)) / 3
# (strategy, parts, clip norm, offload) by number of ranks
CASES = {
    1: [("single", 2, 0.0), ("single", 3, 0.5), ("zero2", 3, 0.5, True)],
    2: [
        *[("ddp", 1, 0.0), ("ddp", 2, 0.5), ("ddp", 3, 0.0), ("zero1", 1, 0.5), ("zero1", 2, 0.0)],
        *[("zero2", 1, 0.0), ("zero2", 3, 0.5), ("zero2", 2, 0.0, True), ("zero3", 1, 0.5), ("zero3", 2, 0.0, True)],
    ],
    4: [("ddp", 3, 0.5), ("zero2", 1, 0.0), ("zero3", 2, 0.0)],
}


class Loss(VATTLoss):
    """With the batch's masks; infinite, but of finite gradient, where a row has the id 666."""

    def forward(self, embeddings, batch):
        terms = super().forward(embeddings, audio_mask=batch.audio_mask, text_mask=batch.text_mask)
        return terms._replace(total=terms.total + torch.inf) if (batch.sample_id == 666).any() else terms


def model(*, dropout=0.0, keep_mode="batch"):
    """Small, with everything that ranks could disagree on: BatchNorm in all heads, DropToken, masks, word vectors."""
    transformer = {"num_layers": 1, "dim": 32, "ff_dim": 48, "num_heads": 2, "head_dim": 16, "dropout": dropout}
    tower = {"transformer": transformer, "position": {"dropout": dropout}}
    patches = tower | {"drop_token": {"keep_rate": 0.5, "keep_mode": keep_mode}}
    torch.manual_seed(0)
    return create_model(
        "vatt_tiny",
        video=patches | {"num_frames": 4, "frame_size": (32, 32)},
        audio=patches | {"num_samples": 1024},
        text=tower | {"embedding_dim": 16, "vocabulary_size": 50},
        heads={"video_audio_dim": 25, "video_text_dim": 19, "style": "paper"},  # not divisible by the ranks
    )


def batch(step: int) -> Batch:
    """The whole batch of a step; the first quarter of it, one of four ranks' whole share, has no text."""
    draw = torch.Generator().manual_seed(step)
    return Batch(
        video=torch.randint(256, (ROWS, 4, 32, 32, 3), generator=draw, dtype=torch.uint8),
        audio=torch.randn(ROWS, 1024, generator=draw).clamp(-1, 1),
        text=torch.randint(1, 50, (ROWS, 3, 16), generator=draw),
        audio_mask=torch.arange(ROWS) != ROWS - 2,
        text_mask=torch.arange(ROWS) >= ROWS // 4,
        sample_id=torch.arange(ROWS) + 1000 * step,
    )


def share(whole: Batch) -> Batch:
    return whole.split(world_size())[rank()]


def build(
    strategy="auto", parts=1, clip_norm=0.0, offload=False, *, run_dir=None, keep_mode="batch", dropout=0.0, **kw
):
    config = EngineConfig(device="cpu", strategy=strategy, accumulate=parts, offload=offload, **kw)
    loss = Loss(LossConfig(learnable_temperature=True, temperature=0.5))
    optim = OptimConfig(lr=2e-5, clip_norm=clip_norm)
    schedule = ScheduleConfig(warmup_steps=2, total_steps=STEPS)
    return Engine(model(dropout=dropout, keep_mode=keep_mode), loss, config, optim, schedule, run_dir=run_dir)


def losses(engine: Engine, steps: int) -> list[float]:
    return [engine.step(share(batch(engine.finished))).terms["total"].item() for _ in range(steps)]


def flat(state) -> dict[str, torch.Tensor]:
    return {f"{group}.{name}": tensor.clone() for group, tensors in state.items() for name, tensor in tensors.items()}


def error(got: list[float], wanted: list[float]) -> float:
    return max(abs(a - b) / abs(b) for a, b in zip(got, wanted, strict=True))


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---------------------------------------------------------------------------------------------- what each rank runs


def on_rank() -> dict:
    """Errors by case against what the one process left in the folder."""
    folder = Path(sys.argv[3]).parent
    strategies.BUCKET_BYTES = 4096  # DDP: many buckets
    return {name_of(case): one_case(case, folder) for case in CASES[world_size()]}


def name_of(case: tuple) -> str:
    return "-".join(map(str, case))


def one_case(case: tuple, folder: Path) -> dict:
    wanted = json.loads((folder / "reference.json").read_text())[f"{case[2]}"]
    engine = build(*case)
    first = losses(engine, 1)
    moments = flat(engine.strategy.export_state())
    results = {"losses": error(first + losses(engine, STEPS - 1), wanted)}
    if not case[2]:
        gradients = load_latest(folder / "1").tensors["optimizer"]
        names = [name for name in gradients if name.endswith("/exp_avg")]
        scale = max(gradients[name].abs().max() for name in names)
        off = [(moments[f"optimizer.{name}"] - gradients[name]).abs().max() / scale for name in names]
        results["gradients"] = max(off).item()
    if case[0] == "ddp":
        reference = json.loads((folder / "reference.json").read_text())["silent"]
        results["graph that changes"] = error(silent_between(build(*case[:2])), reference)
    results |= skips(engine)
    engine.run_dir = folder / "2"
    found = engine.resume()
    state = flat(engine.strategy.export_state())
    results["resumed"] = same(state, flat(found.tensors))
    after = losses(engine, 2)
    results["goes on"] = error(after, wanted[2:4]) if not case[2] else 0.0  # the saved run did not clip
    engine.run_dir = folder / f"from-{world_size()}-{name_of(case)}"
    engine.save()
    state = flat(engine.strategy.export_state())
    results["saved"] = same(state, flat(load_latest(engine.run_dir).tensors))
    straight = losses(engine, 2), flat(engine.strategy.export_state())
    engine.resume()
    again = losses(engine, 2), flat(engine.strategy.export_state())
    results["bit for bit"] = again[0] == straight[0] and same(again[1], straight[1])
    return results


def silent_between(engine: Engine) -> list[float]:
    """Losses of batches of which every other one has no text: what backward reaches is not what it reached before."""
    totals = []
    for step in range(5):
        whole = batch(step)
        if step % 2 == 0:
            whole = dataclasses.replace(whole, text=None, text_mask=None)
        totals.append(engine.step(share(whole)).terms["total"].item())
    return totals


def skips(engine: Engine) -> dict:
    """NaN in one rank's sound, then an infinite loss of finite gradient on one rank: nothing may change anywhere."""
    results = {}
    for name in ("nan", "inf"):
        before = flat(engine.strategy.export_state())
        whole = batch(engine.finished)
        if name == "nan":
            whole.audio[-1] = torch.nan
        else:
            whole.sample_id[0] = 666
        out = engine.step(share(whole))
        after = flat(engine.strategy.export_state())
        results[name] = out.skipped and same(after, before)
    results["after"] = not engine.step(share(batch(engine.finished))).skipped
    return results


# ------------------------------------------------------------------------------------------------------- the tests


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> tuple[Path, dict]:
    """The run of one process: its losses by clip norm, and checkpoints after the first and the second step."""
    folder = tmp_path_factory.mktemp("reference")
    engine = build("single")
    wanted = {"0.0": [], "0.5": losses(build("single", clip_norm=0.5), STEPS)}
    wanted["silent"] = silent_between(build("single"))
    for step in range(STEPS):
        wanted["0.0"] += losses(engine, 1)
        if step < 2:
            engine.run_dir = folder / f"{step + 1}"
            engine.save()
    assert error(wanted["0.5"], wanted["0.0"]) > 1e-5  # clipping matters
    (folder / "reference.json").write_text(json.dumps(wanted))
    return folder, wanted


@pytest.fixture(scope="module", params=[1, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 4))])
def ranks(request, reference) -> list[dict]:
    folder = reference[0] / f"{request.param}-ranks"
    folder.mkdir()
    return run_ranks("engine.test_strategies:on_rank", request.param, folder)


def test_ranks_and_parts_are_one_batch(ranks):
    for every in zip(*(r.items() for r in ranks), strict=True):
        for name, found in every:
            assert found["losses"] < STEP_TOLERANCE, (name, found)
            assert found.get("gradients", 0.0) < GRADIENT_TOLERANCE, (name, found)
            assert found.get("graph that changes", 0.0) < STEP_TOLERANCE, (name, found)


def test_a_rank_that_is_not_finite_changes_nothing_on_any(ranks):
    assert [(name, f) for r in ranks for name, f in r.items() if not (f["nan"] and f["inf"] and f["after"])] == []


def test_a_state_goes_into_any_strategy_and_comes_out_again(ranks, reference):
    folder, wanted = reference
    for found in ranks:
        for name, case in found.items():
            assert case["resumed"], name
            assert case["saved"], name
            assert case["bit for bit"], name
            assert case["goes on"] < STEP_TOLERANCE, (name, case)
    for name in ranks[0]:
        back = build("single", run_dir=folder / f"from-{len(ranks)}-{name}")
        assert back.resume().step == 4
        if "-0.0" in name:
            assert error(losses(back, 1), wanted["0.0"][4:5]) < STEP_TOLERANCE, name


# --------------------------------------------------------------------------------------------- options, one process


def gradients(engine: Engine) -> dict[str, torch.Tensor]:
    engine.step(batch(0))
    return {name: p.grad for name, p in engine.strategy.parameters.items() if p.grad is not None}


def test_drop_token_knows_no_parts():
    by_mode = {}
    for mode in ("batch", "sample"):
        by_mode[mode] = losses(build(keep_mode=mode), 3)
        assert error(losses(build(parts=3, keep_mode=mode), 3), by_mode[mode]) < STEP_TOLERANCE
    assert error(by_mode["batch"], by_mode["sample"]) > 1e-4


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpointed_activations_give_the_same_gradients(parts, dropout):
    options = {"parts": parts, "dropout": dropout}
    wanted, saved = gradients(build(**options)), []
    engine = build(**options, checkpoint_activations=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        got = gradients(engine)
    assert got.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(got[name], wanted[name])] == []
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        gradients(build(**options))
    assert sum(saved) < sum(kept)


def test_compiled_features_give_the_same_losses(monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager", fullgraph=True))
    compiled = build(compile="default")
    assert error(losses(compiled, 4), losses(build(), 4)) < STEP_TOLERANCE


@pytest.mark.parametrize("strategy", ["single", "zero2", "zero3"])
def test_bf16_keeps_float32_weights_moments_and_loss(strategy):
    engine = build(strategy, precision="bf16", parts=2)
    dtypes = []
    engine.module.video.transformer.layers[0].ff_in.register_forward_hook(lambda m, a, out: dtypes.append(out.dtype))
    first, wanted = losses(engine, 4), losses(build(), 4)
    assert set(dtypes) == {torch.bfloat16}
    assert {x.dtype for x in flat(engine.strategy.export_state()).values()} == {torch.float32}
    assert 0 < error(first, wanted) < 0.03


def test_learnable_temperature_stays_in_its_bounds_under_zero():
    """The loss moves it back in place; DeepSpeed's own copy of the weights must hear of it."""
    ends = []
    for strategy in ("single", "zero2", "zero3"):
        engine = build(strategy, parts=2)
        state = {group: {n: x.clone() for n, x in v.items()} for group, v in engine.strategy.export_state().items()}
        state["loss"]["log_temperature"].fill_(0.5)  # a temperature above 1
        engine.strategy.import_state(state)
        losses(engine, 3)
        ends.append(engine.strategy.export_state()["loss"]["log_temperature"].item())
    assert ends[0] < 1e-4
    assert ends[1:] == pytest.approx(ends[:1] * 2, abs=1e-7)


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="compile must be off with strategy zero3, got 'default'"):
        EngineConfig(compile="default", strategy="zero3")
    tower = torch.nn.Linear(2, 2)
    options = {"device": "cpu", "strategy": "single"}
    for changed, message in (
        ({"accumulate": 2}, "module must have features and heads to accumulate, got a Linear"),
        ({"checkpoint_activations": True}, "module must have a part that can checkpoint its activations, got none"),
    ):
        with pytest.raises(ValueError, match=message):
            Engine(tower, len, EngineConfig(**options, **changed), OptimConfig(), ScheduleConfig())


def test_what_is_used_of_deepspeeds_inside_is_listed_and_exists():
    """Its optimizer's own names, which a release may change; what else is used of DeepSpeed is documented."""
    used = set(re.findall(r"self\.sharded\.(\w+)", Path(strategies_zero.__file__).read_text()))
    listed = {name for table in (PRIVATE, PRIVATE_OFFLOADED) for names in table.values() for name in names}
    assert used == listed
    for stage, offload in ((1, False), (2, True), (3, True)):
        optimizer = build(f"zero{stage}", offload=offload).strategy.sharded
        wanted = PRIVATE[stage] + (PRIVATE_OFFLOADED[stage] if offload else ())
        assert [name for name in wanted if not hasattr(optimizer, name)] == []
    message = (
        r"DeepSpeed must be >=.* for ZeRO 3, got 1\.2\.3, whose optimizer has no fp32_part.*, grad_part.*\. Run `pip"
    )
    with pytest.raises(ValueError, match=message):
        check_private(SimpleNamespace(_global_grad_norm=0.0), 3, False, "1.2.3")
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert project["optional-dependencies"]["deepspeed"] == [f"deepspeed{DEEPSPEED}"]


def test_auto_is_zero_for_the_large_models_alone():
    """By what would be trained with loaded word vectors, and without."""
    large = {"vatt_lbs", "vatt_ma_large"}
    for name in ("vatt_bbs", "vatt_mbs", "vatt_lbs", "vatt_ma_base", "vatt_ma_medium", "vatt_ma_large"):
        with torch.device("meta"):
            sizes = {name: p.numel() for name, p in create_model(name).named_parameters()}
        words = next(size for name, size in sizes.items() if name.endswith("embedding.weight"))
        assert (sum(sizes.values()) >= ZERO_FROM) == (sum(sizes.values()) - words >= ZERO_FROM) == (name in large), name
