"""The true count against torch's FLOP counter on real and on fake tensors, and the paper's against its tables."""

from __future__ import annotations

import functools
import json

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from vatt_engine import Batch, cli, create_model, dispatch
from vatt_engine.analysis.flops import module_flops, paper_cells, step_flops
from vatt_engine.models import VATTConfig, list_models, model_config
from vatt_engine.models.transformer import Block

TINY = {
    "as it is": {},
    "kept whole": {"video": {"drop_token": {"keep_rate": 1.0}}, "audio": {"drop_token": {"keep_rate": 1.0}}},
    "progressive": {"video": {"transformer": {"keep_rates": (0.9, 1.0, 0.5, 0.4)}}},
    "frozen linear text": {"text": {"encoder": "linear", "freeze_embedding": True}},
    "T5's own text": {"text": {"style": "t5", "embedding_dim": 128}},
    "joint heads": {"heads": {"kind": "joint"}},
    "agnostic": {
        "backbone": "agnostic",
        "video": {"pre_projection": True},
        "audio": {"pre_projection": True},
        "text": {"freeze_embedding": True},
        "shared": {"num_layers": 2, "dim": 64, "ff_dim": 96, "num_heads": 3, "head_dim": 16},
        "shared_projection": 80,
    },
    "projected behind": {"video": {"post_projection": 24, "pre_projection": True}},
}


def clips(config, batch, candidates):
    """Zeros of the shapes that a model takes."""
    words = (batch, candidates, config.text.max_words)
    return Batch(
        video=torch.zeros(batch, config.video.num_frames, *config.video.frame_size, 3, dtype=torch.uint8),
        audio=torch.zeros(batch, config.audio.num_samples),
        text=torch.ones(words, dtype=torch.int64),
    )


def counted(call):
    """FLOPs of a forward pass and of the backward pass from all its outputs, as torch counts them."""
    with FlopCounterMode(display=False) as counter, dispatch.use_impl(attention="reference"):
        outputs = call()
        forward = counter.get_total_flops()
        sum(y.sum() for y in outputs).backward()
    return forward, counter.get_total_flops() - forward


@pytest.mark.parametrize("name", TINY)
def test_torch_counts_the_same(name):
    model = create_model("vatt_tiny", **TINY[name]).train()
    found = step_flops(model.config, 3, candidates=2)
    assert counted(lambda: model(clips(model.config, 3, 2), seed=0)) == (found.forward, found.backward)
    with FlopCounterMode(display=False) as counter, dispatch.use_impl(attention="reference"), torch.no_grad():
        model.eval()(clips(model.config, 3, 2))
    assert counter.get_total_flops() == step_flops(model.config, 3, candidates=2, training=False).total


@pytest.mark.parametrize("name", ["vatt_mbs", "vatt_ma_medium"])
def test_torch_counts_the_same_at_full_size(name):
    """On fake tensors: the shapes of the paper's models, and no arithmetic."""
    with torch.device("meta"):
        model = create_model(name).train()
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        found = step_flops(model.config, 2)
        assert counted(lambda: model(clips(model.config, 2, 5), seed=0)) == (found.forward, found.backward)


@pytest.mark.parametrize("name", ["vit_base", "wat_base", "spt_base", "t5_small", "linear_text"])
def test_torch_counts_the_same_of_encoders(name):
    with torch.device("meta"):
        model = create_model(name, **({} if name in ("t5_small", "linear_text") else {"num_classes": 7})).train()
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        config = model.config
        signal = getattr(clips(config, 2, 1), config.modality)
        found = step_flops(config, 2)
        if config.modality == "text":
            assert counted(lambda: [model(signal[:, 0])]) == (found.forward, found.backward)
        elif config.audio.input == "spectrogram":  # its filter bank is no part of the model's cost
            steps = torch.zeros(2, 150, config.audio.num_mels)
            assert counted(lambda: [model(steps)]) == (found.forward, found.backward)
        else:
            assert counted(lambda: [model(signal, seed=0)]) == (found.forward, found.backward)


def test_checkpointing_computes_every_block_twice():
    model = create_model("vatt_tiny", video={"transformer": {"dropout": 0.1}}).train()
    for block in model.video.transformer.layers:
        block.forward = functools.partial(checkpoint, functools.partial(Block.forward, block), use_reentrant=False)
    video = torch.zeros(2, 8, 48, 48, 3, dtype=torch.uint8)
    forward, backward = counted(lambda: [model.video(video, seed=0, agg_only=True)])
    parts = {part.name: part for part in module_flops(model.config) if part.name.startswith("video")}
    blocks = 2 * (parts["video attention"].forward + parts["video MLP"].forward)
    assert backward == 2 * sum(part.backward for part in parts.values()) + blocks
    assert forward == 2 * sum(part.forward for part in parts.values())
    found = step_flops(model.config, 2, checkpointing=True)
    every = [part for part in module_flops(model.config) if part.name.split()[1] in ("attention", "MLP")]
    assert found.recomputed == 2 * sum(part.forward for part in every)
    assert found.total == found.model + found.recomputed


@pytest.mark.parametrize("cell", paper_cells(), ids=lambda c: f"{c.table}-{c.model}-{c.frames}-{c.size}-{c.keep_rate}")
def test_the_papers_tables_are_reproduced(cell):
    assert cell.reproduced == pytest.approx(cell.paper, rel=0.01)


def test_true_counts_of_the_towers():
    """As worked out by hand from the official graph, in GFLOPs: 364.7, 604.7 and 1199.5 at 224, 1490.4 at 320."""
    for name, size, true in (
        ("base", 224, 364.7),
        ("medium", 224, 604.7),
        ("large", 224, 1199.5),
        ("medium", 320, 1490.4),
    ):
        config = model_config(f"vit_{name}", video={"frame_size": (size, size)})
        assert round(step_flops(config, training=False).forward / 1e9, 1) == true


@pytest.mark.parametrize("name", list_models())
def test_parts_hold_every_parameter(name):
    parts = module_flops(model_config(name))
    with torch.device("meta"):
        assert sum(part.parameters for part in parts) == sum(p.numel() for p in create_model(name).parameters())
    assert all(part.parameters for part in parts)  # none is named by a cost alone
    assert sum(part.forward for part in parts) == step_flops(model_config(name)).forward


def test_command(capsys):
    assert cli.main(["flops"]) == 0
    assert "vit_large   32 x 320^2, 12 views" in capsys.readouterr().out
    assert cli.main(["flops", "--json", "true"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["paper"] == 188.1
    assert cli.main(["flops", "vatt-tiny", "--keep-rate", "0.25", "--frame-size", "32", "--json", "true"]) == 0
    changes = {"keep_rate": 0.25}
    config = model_config(
        "vatt_tiny", video={"frame_size": (32, 32), "drop_token": changes}, audio={"drop_token": changes}
    )
    parts = json.loads(capsys.readouterr().out)["parts"]
    assert sum(part["forward"] for part in parts) == step_flops(config).forward
    assert sum(part["evaluation"] for part in parts) == step_flops(config, training=False).forward


def test_rejects_bad_arguments(capsys):
    for argument in ({"batch": 0}, {"candidates": -1}):
        with pytest.raises(ValueError, match=f"step_flops: {next(iter(argument))} must be at least 1"):
            step_flops(VATTConfig(), **argument)
    assert cli.main(["flops", "vatt_tini"]) == 2
    assert "Did you mean 'vatt_tiny'?" in capsys.readouterr().err
    assert cli.main(["flops", "vatt_tiny", "--candidates", "0"]) == 2
    assert "vatt flops: --candidates must be at least 1, got 0." in capsys.readouterr().err
