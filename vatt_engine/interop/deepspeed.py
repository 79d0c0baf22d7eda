"""DeepSpeed's universal checkpoints, read without trusting them, and written.

    <folder>/zero/<parameter>/{fp32,exp_avg,exp_avg_sq,step}.pt      one tensor each, or a dict with it as "param"
    <folder>/zero/optimizer_state.pt                                 DeepSpeed's own objects: never read here
    <folder>/mp_rank_00_model_states.pt                              shapes, buffers, steps (ZeRO 1 and 2)
    <folder>/zero_pp_rank_0_mp_rank_00_model_states.pt               the same (ZeRO 3)

These files are pickles. They are read by torch's restricted unpickler (`weights_only=True`), which knows tensors and
plain containers, in a process of its own; there is no second way if that refuses one. This is the only file of the
package that calls torch.load or torch.save, and nothing but `vatt convert` comes here.

Source: deepspeed 0.19.8, checkpoint/ds_to_universal.py and runtime/base_optimizer.py.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

VERSION = "0.19.8"  # of DeepSpeed, whose layout this is
MOMENTS = ("exp_avg", "exp_avg_sq")


class Universal(NamedTuple):
    """What a universal checkpoint holds.

    `weights` are parameters and buffers by name, `moments` Adam's state by `<parameter>/<moment>` ("step" is a float32
    scalar), `step` the finished steps.
    """

    weights: dict[str, Tensor]
    moments: dict[str, Tensor]
    step: int


def is_universal(folder: str | Path) -> bool:
    """Whether a folder looks like a universal checkpoint."""
    return (Path(folder) / "zero").is_dir()


def read_universal(folder: str | Path) -> Universal:
    """Read a folder that DeepSpeed's `ds_to_universal` wrote, from ZeRO 1, 2 or 3.

    Raises:
        ValueError: a file is missing, damaged, or holds more than tensors and plain containers.

    >>> read_universal("checkpoints/step3_universal").step  # doctest: +SKIP
    3
    """
    from safetensors.torch import load_file

    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, "-m", __name__, str(folder), out]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            reason = " ".join((done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1].split())[:400]
            raise ValueError(f"{folder}: the folder must be a DeepSpeed universal checkpoint, got: {reason}")
        weights, moments = (load_file(f"{out}/{name}.safetensors") for name in ("weights", "moments"))
        return Universal(weights, moments, int(Path(out, "step").read_text()))


def write_universal(folder: str | Path, checkpoint: Universal, *, buffers: set[str]) -> None:
    """Write what `load_checkpoint` of a DeepSpeed engine with `{"checkpoint": {"load_universal": true}}` reads.

    Args:
        folder: `<load_dir>/<tag>`; made if missing.
        checkpoint: parameters without moments are frozen ones.
        buffers: which of its weights are buffers.

    >>> write_universal("out/step3", universal, buffers={"norm.running_mean"})  # doctest: +SKIP
    """
    folder, (weights, moments, step) = Path(folder), checkpoint
    trained = [name for name in weights if f"{name}/exp_avg" in moments]
    for name in trained:
        place = folder / "zero" / name
        place.mkdir(parents=True, exist_ok=True)
        torch.save({"cat_dim": 0, "param": weights[name].float()}, place / "fp32.pt")
        for key in MOMENTS:
            torch.save({"cat_dim": 0, "param": moments[f"{name}/{key}"]}, place / f"{key}.pt")
        torch.save(moments[f"{name}/step"], place / "step.pt")
    taken = moments[f"{trained[0]}/step"]
    states = {"state": {0: {"step": taken}}, "param_groups": [{}]}
    document = {"ds_version": VERSION, "param_groups": [{}], "optimizer_state_dict": states}
    torch.save(document, folder / "zero" / "optimizer_state.pt")
    shapes = {name: weights[name].shape for name in weights if name not in buffers}
    document = {
        "module": weights,
        "buffer_names": sorted(buffers),
        "param_shapes": [{name: shapes[name] for name in trained}],
        "frozen_param_shapes": {name: shape for name, shape in shapes.items() if name not in trained},
        "shared_params": {},
        "optimizer": None,
        "lr_scheduler": None,
        "skipped_steps": 0,
        "global_steps": step,
        "global_samples": 0,
        "dp_world_size": 1,
        "mp_world_size": 1,
        "ds_config": {},
        "ds_version": VERSION,
    }
    torch.save(document, folder / "mp_rank_00_model_states.pt")
    kept = {name: value if name in buffers else value.new_empty(0) for name, value in weights.items()}
    torch.save(document | {"module": kept}, folder / "zero_pp_rank_0_mp_rank_00_model_states.pt")
    (folder.parent / "latest_universal").write_text(folder.name)


def _load(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def _tensor(path: Path) -> Tensor:
    value = _load(path)
    value = value["param"] if isinstance(value, Mapping) else value
    if not isinstance(value, Tensor):
        raise ValueError(f"{path} holds a {type(value).__name__} instead of a tensor")
    return value


def _read(folder: Path) -> Universal:
    found = sorted(folder.glob("mp_rank_00_model_states.pt")) or sorted(folder.glob("zero_pp_rank_0_*_model_states.pt"))
    if not found or not is_universal(folder):
        raise ValueError("no zero/ or no *_model_states.pt in it; make one with `ds_to_universal`")
    document = _load(found[0])
    shapes = {name: shape for group in document["param_shapes"] for name, shape in group.items()}
    step = document["global_steps"]
    weights = {name: value for name, value in document["module"].items() if name not in shapes}
    empty = [name for name, value in weights.items() if name not in document["buffer_names"] and not value.numel()]
    if empty:
        raise ValueError(f"{empty[0]} is frozen, and ZeRO 3 leaves frozen parameters out")
    moments: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        place = folder / "zero" / name
        weights[name] = _tensor(place / "fp32.pt").reshape(shape)
        for key in MOMENTS:
            moments[f"{name}/{key}"] = _tensor(place / f"{key}.pt").reshape(shape)
        taken = _tensor(place / "step.pt") if (place / "step.pt").exists() else step - document["skipped_steps"]
        moments[f"{name}/step"] = torch.tensor(float(taken))
    return Universal(weights, moments, step)


def _main(folder: str, out: str) -> int:
    from safetensors.torch import save_file

    try:
        weights, moments, step = _read(Path(folder))
        for name, group in (("weights", weights), ("moments", moments)):
            save_file({key: value.contiguous().clone() for key, value in group.items()}, f"{out}/{name}.safetensors")
        Path(out, "step").write_text(json.dumps(step))
    except Exception as error:  # any file of any making; the other side turns the last line into a message
        print(f"{type(error).__name__}: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(_main(*sys.argv[1:]))
