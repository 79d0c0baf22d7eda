"""Predictions of a run against what can be measured on a CPU: tensors, what autograd keeps, collectives, kernels."""

from __future__ import annotations

import functools
import json
import math
import os
from pathlib import Path

import pytest
import torch
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from tests.ranks import run_ranks
from vatt_engine import Batch, VATTLoss, cli, create_model
from vatt_engine.analysis.scale import Rate, activation_bytes, measured_rate, memory, sizes, step_seconds, traffic
from vatt_engine.engine import OptimConfig, build_optimizer
from vatt_engine.models import model_config
from vatt_engine.models.transformer import Block, SelfAttention

ROOT = Path(__file__).resolve().parents[2]
CLIPS, CANDIDATES = 3, 2


def clips(config):
    words = (CLIPS, CANDIDATES, config.text.max_words)
    return Batch(
        video=torch.zeros(CLIPS, config.video.num_frames, *config.video.frame_size, 3, dtype=torch.uint8),
        audio=torch.rand(CLIPS, config.audio.num_samples),
        text=torch.randint(1, config.text.vocabulary_size, words),
    )


def num_bytes(tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def test_weights_gradients_and_moments_are_those_of_a_run():
    model = create_model("vatt_tiny", text={"freeze_embedding": True}).train()
    optimizer = build_optimizer([x for x in model.named_parameters() if x[1].requires_grad], OptimConfig())
    batch = clips(model.config)
    VATTLoss()(model(batch, seed=0)).total.backward()
    optimizer.step()
    found = memory(model.config, "single", 1, CLIPS, precision="fp32", candidates=CANDIDATES)
    assert found.weights == num_bytes(model.state_dict().values())
    assert found.gradients == num_bytes(p.grad for p in model.parameters() if p.grad is not None)
    moments = [x for state in optimizer.state.values() for name, x in state.items() if name != "step"]
    assert found.moments == num_bytes(moments)
    assert found.batch == num_bytes(batch.tensors().values())


def kept(model, given, precision="fp32"):
    """Bytes that autograd keeps of `model(given)`, of a tower's pooled AGG; weights and the clips themselves apart."""
    inputs = given.tensors().values() if isinstance(given, Batch) else [given]
    own = {tensor.untyped_storage().data_ptr() for tensor in [*model.state_dict().values(), *inputs]}
    seen = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"),
    ):
        pooled = {} if isinstance(given, Batch) else {"agg_only": True}
        outputs = model(given, seed=0, **pooled)  # alive until all is counted: no address is used twice
    assert outputs is not None
    return sum(seen.values())


def tower_bytes(config, precision="fp32"):
    """Of one clip without text: what a second sentence costs is known."""
    one, two = (activation_bytes(config, precision, candidates=n) for n in (1, 2))
    return 2 * one - two


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "changes", [{}, {"frame_size": (96, 96)}, {"drop_token": {"keep_rate": 0.2}}, {"transformer": {"head_dim": 16}}]
)
def test_activations_of_picture_and_sound_are_what_autograd_keeps(precision, changes, monkeypatch):
    """To the byte, of one clip more; the first also brings an index, the norm of positions, and bf16 weights."""
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)  # or linear keeps no such weights
    model = create_model("vatt_tiny", video=changes).train()
    batch = clips(model.config)
    found, weights, outputs = 0, 0, 0
    for name in ("video", "audio"):
        tower, x = getattr(model, name), getattr(batch, name)
        one, two = (kept(tower, x[:n], precision) for n in (1, 2))
        found += two - one
        weights += 2 * one - two
        outputs += num_bytes([tower(x[:1], seed=0, agg_only=True)]) * (precision == "fp32")  # which heads would keep
    assert found + outputs == tower_bytes(model.config, precision)
    products = [sum(p.numel() for p in t.transformer.parameters() if p.ndim > 1) for t in (model.video, model.audio)]
    positions = sum(tower.stem.num_buckets for tower in (model.video, model.audio))
    rest = 2 * 4 * 128 * positions  # two rows of each at most: the norm's input and statistics, DropToken's index
    assert 0 < weights - (2 * sum(products) if precision == "bf16" else 0) < rest


def test_activations_of_a_modality_agnostic_model_are_what_autograd_keeps():
    """Within 1.5 %: rows that heads and last projections see are left out, and AGG has no part in the first ones."""
    model = create_model(
        "vatt_tiny",
        backbone="agnostic",
        video={"pre_projection": True},
        audio={"pre_projection": True},
        shared={"num_layers": 3, "dim": 64, "ff_dim": 96, "num_heads": 3, "head_dim": 16, "dropout": 0.0},
        shared_projection=80,
    ).train()
    batch = clips(model.config)
    signals = (Batch(video=batch.video), Batch(audio=batch.audio))
    parts = [Batch(**{name: x[:n] for name, x in given.tensors().items()}) for given in signals for n in (1, 2)]
    one_video, two_videos, one_audio, two_audios = (kept(model, part) for part in parts)
    found = two_videos - one_video + two_audios - one_audio
    assert found == pytest.approx(tower_bytes(model.config), rel=0.015)


def test_activations_of_a_whole_model_are_what_autograd_keeps():
    """Within 20 %: torch's CPU keeps the probabilities of attention with a learned bias, and more of an RMS norm."""
    model = create_model("vatt_tiny").train()
    batch = clips(model.config)
    found = kept(model, batch)
    expected = CLIPS * activation_bytes(model.config, "fp32", candidates=CANDIDATES)
    assert expected < found < 1.2 * expected


def test_masks_are_predicted_as_bytes_and_made_again_here():
    """A GPU's eager code keeps a byte per element; a CPU the key of each mask: four per layer, one behind the last."""
    found, predicted = [], []
    for dropout in (0.0, 0.1):
        model = create_model("vatt_tiny", video={"transformer": {"dropout": dropout}}).train()
        for module in model.modules():
            if isinstance(module, SelfAttention):
                module.dropout = 0.0  # whose masks flash attention draws again
        video = clips(model.config).video
        found.append(kept(model.video, video))
        predicted.append(activation_bytes(model.config))
    assert found[1] - found[0] == 8 * (3 * 4 + 1)
    tokens, dim, ff_dim, heads = 37, 128, 256, 4
    masks = 3 * tokens * (2 * dim + ff_dim) + (2 * dim + ff_dim + dim) + tokens * heads
    assert predicted[1] - predicted[0] == masks


def test_checkpointing_keeps_the_inputs_of_layers_and_one_layer():
    found = 0
    model = create_model("vatt_tiny").train()
    for block in model.modules():
        if isinstance(block, Block):
            block.forward = functools.partial(checkpoint, functools.partial(Block.forward, block), use_reentrant=False)
    batch = clips(model.config)
    for name in ("video", "audio"):
        tower, x = getattr(model, name), getattr(batch, name)
        one, two = (kept(tower, x[:n]) for n in (1, 2))
        found += two - one + num_bytes([tower(x[:1], seed=0, agg_only=True)])
    inputs = [activation_bytes(model.config, "fp32", candidates=n, checkpointing=True) for n in (1, 2)]
    shorter = model_config("vatt_tiny", **{"audio.transformer.num_layers": 3})
    layer = tower_bytes(model.config) - tower_bytes(shorter)  # of audio, whose 38 tokens are the most
    assert 2 * inputs[0] - inputs[1] == found + layer


def counted_traffic():
    """Of one rank: what each collective would send by a ring, per strategy, and ZeRO's float32 partition."""
    os.environ |= {"DS_ACCELERATOR": "cpu", "LOCAL_RANK": str(dist.get_rank())}
    sent = {}

    def count(name, of, times=1, *, also=None):
        inner = getattr(dist, also or name)

        def call(*args, **options):
            tensor = [*args, *options.values()][of]
            share = (dist.get_world_size() - 1) / dist.get_world_size()
            sent[name] = sent.get(name, 0) + times * share * tensor.numel() * tensor.element_size()
            return inner(*args, **options)

        setattr(dist, also or name, call)

    count("all_reduce", 0, 2)
    count("all_gather_into_tensor", 0)
    count("reduce_scatter_tensor", 1)
    if hasattr(dist, "all_gather_single"):  # their newer names
        count("all_gather_into_tensor", 0, also="all_gather_single")
        count("reduce_scatter_tensor", 1, also="reduce_scatter_single")
    found = {}
    for strategy in ("single", "ddp", "zero1", "zero2", "zero3"):
        torch.manual_seed(0)
        model = create_model("vatt_tiny").train()
        run, step = wrapped(model, strategy)
        batch = clips(model.config)
        for _ in range(2):  # in its first step ZeRO-3 gathers twice, to see what is used when
            sent.clear()
            step(VATTLoss()(run(batch, seed=0)).total)
        found[strategy] = dict(sent)
    return found


def wrapped(model, strategy):
    """(what to call, what to do with the loss); with "single" ranks share a loss and nothing else."""
    if strategy == "single":
        return model, lambda loss: loss.backward()
    if strategy == "ddp":
        run = DistributedDataParallel(model, broadcast_buffers=False)

        def hook(_, bucket):
            dist.all_reduce(bucket.buffer())
            done = torch.futures.Future()
            done.set_result(bucket.buffer() / dist.get_world_size())
            return done

        run.register_comm_hook(None, hook)
        return run, lambda loss: loss.backward()
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # compiled at first use, for inference alone
    zero = {"stage": int(strategy[-1]), "overlap_comm": False, "stage3_param_persistence_threshold": 0}
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero, "zero_allow_untested_optimizer": True}
    options = {"model": model, "config": config | {"zero_force_ds_cpu_optimizer": False}}
    run, *_ = deepspeed.initialize(**options, optimizer=build_optimizer(model.named_parameters(), OptimConfig()))

    def step(loss):
        run.backward(loss)
        run.step()

    return run, step


@pytest.mark.slow
def test_traffic_is_that_of_counted_collectives(tmp_path):
    """Within 0.1 % for weights and gradients, which DeepSpeed pads; to the byte without them."""
    config = model_config("vatt_tiny")
    options = {"precision": "fp32", "candidates": CANDIDATES}
    for rank in run_ranks("analysis.test_scale:counted_traffic", 2, tmp_path):
        alone = traffic(config, "ddp", 2, CLIPS, **options)
        # gloo has no reduce-scatter in our gathers' backward pass: reduced to all, which sends twice as much.
        assert rank["single"]["all_gather_into_tensor"] == alone.embeddings
        assert rank["single"]["all_reduce"] == 2 * alone.embedding_gradients + alone.statistics
        for strategy in ("ddp", "zero1", "zero2", "zero3"):
            predicted = traffic(config, strategy, 2, CLIPS, **options)
            found = {name: rank[strategy].get(name, 0) - rank["single"].get(name, 0) for name in rank[strategy]}
            gathered = found.pop("all_gather_into_tensor")
            assert sum(found.values()) == pytest.approx(predicted.gradients, rel=1e-3)
            assert gathered == pytest.approx(predicted.weights, rel=1e-3)


def test_what_zero_divides():
    config = model_config("vatt_lbs")
    found = {name: memory(config, name, 8, 4) for name in ("ddp", "zero1", "zero2", "zero3")}
    weights = 4 * sizes(config).trained
    part = math.ceil(weights / 8)
    assert [m.moments for m in found.values()] == [2 * weights, 2 * part, 2 * part, 2 * part]
    assert [m.gradients for m in found.values()] == [weights, weights + part, part, part]
    assert [m.masters for m in found.values()] == [0, part, part, part]
    assert found["zero2"].weights - found["zero3"].weights == weights - part
    assert found["zero3"].gathered - found["zero2"].gathered == weights  # below 1e9 parameters all stay gathered


def test_a_step_is_predicted_from_the_measured_block():
    """Committed results of one CPU: backbones of two layers, forward and backward, take 8 to 13 % longer than that.

    One clip takes 26 %: half of its FLOPs went with the last layer's other rows, and what is not counted stayed.
    """
    results = ROOT / "benchmarks" / "results"
    rate = measured_rate(results, "fp32", 768, device="cpu")
    rows = (results / "intel-xeon-processor-2-cores" / "packed.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, rows) if row["dtype"] == "fp32" and row["provider"] == "three passes"]
    assert len(rows) >= 4
    for row in rows:
        size = row["sizes"]
        config = model_config(size["model"], **{"shared.num_layers": size["layers"]})
        no_optimizer = rate._replace(memory_bytes=None)
        predicted = step_seconds(
            config, "single", 1, size["batch"], no_optimizer, None, overlap=False, candidates=size["candidates"]
        )
        assert 1.0 <= row["seconds"] / predicted < (1.2 if size["batch"] > 1 else 1.3)


def test_seconds_add_up():
    config, rate = model_config("vatt_bbs"), Rate(4e14, 2e12, "assumed")
    place = (config, "ddp", 8, 32, rate)
    apart, behind = (step_seconds(*place, 2e10, overlap=overlap) for overlap in (False, True))
    alone = step_seconds(config, "single", 1, 32, rate, None, overlap=False)
    sent = traffic(config, "ddp", 8, 32)
    assert apart == pytest.approx(alone + sent.total / 2e10)
    assert behind == pytest.approx(max(alone, sent.gradients / 2e10) + (sent.total - sent.gradients) / 2e10)
    checkpointed = step_seconds(*place, 2e10, overlap=False, checkpointing=True)
    assert checkpointed > apart


def test_command(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["scale", "vatt-bbs", "--batch", "64"]) == 0
    out = capsys.readouterr().out
    assert out.count("needs `make gpu` results") == 4
    assert "8 x 8 clips, bf16" in out
    assert cli.main(["scale", "vatt-bbs", "--tflops", "400"]) == 0
    assert capsys.readouterr().out.count("needs --bandwidth") == 4
    assert cli.main(["scale", "vatt_bbs", "--tflops", "400", "--bandwidth", "50", "--json", "true"]) == 0
    found = json.loads(capsys.readouterr().out)
    low, high = found["strategies"]["ddp"]["clips per second"]
    assert 0 < low < high
    assert found["rate"]["source"] == "--tflops, an assumption"
    assert cli.main(["scale", "vatt_bbs", "--gpus", "1", "--batch", "8", "--memory", "2"]) == 0
    assert "too large" in capsys.readouterr().out
    row = {"device": "cuda", "dtype": "bf16", "pass": "forward+backward", "flops": 4e14, "seconds": 1.0}
    row |= {"sizes": {"dim": 768}, "ceilings": {"bytes_per_second": 3e12}, "stamp": {"machine": "a GPU"}}
    (tmp_path / "results/gpu").mkdir(parents=True)
    (tmp_path / "results/gpu/block.jsonl").write_text(json.dumps(row) + "\n")
    assert cli.main(["scale", "vatt_bbs", "--gpus", "1", "--batch", "128", "--results", "results"]) == 0
    assert "clips/s from 400 TFLOP/s (a GPU, block of width 768)" in capsys.readouterr().out
    (tmp_path / "results/gpu/block.jsonl").write_text("{}\n")
    assert cli.main(["scale", "vatt_bbs", "--results", "results"]) == 2
    assert "block.jsonl: every line must be a result of our benchmarks" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["vit_base"], "model must be a whole model, vatt_*, got 'vit_base'"),
        (["vatt_bbs", "--gpus", "3"], "--batch must be a multiple of gpus 3, got 2048"),
        (["vatt_bbs", "--gpus", "0"], "--gpus must be at least 1, got 0"),
        (["vatt_bbs", "--tflops", "-1"], "--tflops must be above 0, got -1"),
        ([], "--model must be a string, got nothing"),
    ],
)
def test_refusals(capsys, flags, message):
    assert cli.main(["scale", *flags]) == 2
    assert message in capsys.readouterr().err
