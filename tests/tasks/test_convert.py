"""Every form of a trained model holds the same numbers, and a run goes on from what comes back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tasks.test_pretrain import config, world  # noqa: F401  (fixtures)

from vatt_engine.engine.checkpoint import load_latest
from vatt_engine.models import from_pretrained
from vatt_engine.schema import replace
from vatt_engine.tasks.convert import main
from vatt_engine.tasks.pretrain import pretrain


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_run_through_deepspeed_and_back_goes_on(config, tmp_path, capsys):  # noqa: F811
    run, universal, back = (str(tmp_path / name) for name in ("run", "universal/t4", "back"))
    pretrain(replace(config, {"engine.steps": 4}))
    straight = load_latest(run)
    assert main([run, universal, "--to", "universal"]) == 0
    assert main([universal, back, "--to", "run"]) == 0
    assert "step 4 -> " in capsys.readouterr().err
    returned = load_latest(back)
    assert returned.step == 4
    assert all(same(returned.tensors[group], straight.tensors[group]) for group in ("model", "optimizer"))
    assert pretrain(replace(config, {"out": back}), resume=True) == 0
    assert load_latest(back).step == 6
    assert main([universal, str(tmp_path / "model"), "--config", f"{run}/config.yaml"]) == 0
    assert same(from_pretrained(tmp_path / "model").state_dict(), straight.tensors["model"])


def test_plain_safetensors_both_ways(config, tmp_path):  # noqa: F811
    run, model, back = (str(tmp_path / name) for name in ("run", "plain", "back"))
    pretrain(replace(config, {"engine.steps": 2}))
    assert main([run, model]) == 0
    assert {path.name for path in Path(model).iterdir()} == {"config.json", "model.safetensors", "tokenizer.json"}
    assert main([model, back, "--to", "run"]) == 0
    assert same(load_latest(back).tensors["model"], load_latest(run).tensors["model"])
    assert pretrain(replace(config, {"out": back, "engine.steps": 1}), resume=True) == 0
    with pytest.raises(ValueError, match=r"must hold Adam's moments for DeepSpeed, got none"):
        main([model, str(tmp_path / "u"), "--to", "universal"])
    with pytest.raises(ValueError, match=r"DESTINATION must be a new folder, got .*plain, which is there"):
        main([run, model])


def test_what_deepspeed_has_no_place_for_is_refused(config, tmp_path, capsys):  # noqa: F811
    """A learned temperature and SGD's velocity; a plain model is made of both."""
    changes = {"engine.steps": 1, "optim.name": "sgd", "loss.learnable_temperature": True}
    pretrain(replace(config, changes))
    with pytest.raises(
        ValueError, match=r"must have no parameters of the loss, .* universal one, got log_temperature\."
    ):
        main([config.out, str(tmp_path / "u"), "--to", "universal"])
    assert main([config.out, str(tmp_path / "m")]) == 0
    assert "note: log_temperature of the loss has no place in a model" in capsys.readouterr().err
    fixed = replace(config, changes | {"loss.learnable_temperature": False, "out": str(tmp_path / "fixed")})
    pretrain(fixed)
    with pytest.raises(ValueError, match="must hold Adam's moments for DeepSpeed, got those of SGD"):
        main([fixed.out, str(tmp_path / "u"), "--to", "universal"])


def test_another_models_weights_are_refused(config, tmp_path):  # noqa: F811
    pretrain(replace(config, {"engine.steps": 1}))
    with pytest.raises(ValueError, match=r"must fit the model of its config, got: .*size mismatch|Missing key"):
        main([config.out, str(tmp_path / "m"), "--config", "demo"])
    with pytest.raises(ValueError, match=r"nowhere: the run folder must exist"):
        main([str(tmp_path / "nowhere"), str(tmp_path / "m")])
    (tmp_path / "u" / "zero").mkdir(parents=True)
    with pytest.raises(ValueError, match="must be a DeepSpeed universal checkpoint"):
        main([str(tmp_path / "u"), str(tmp_path / "m")])
