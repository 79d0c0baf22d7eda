"""Checkpoints that cannot be half there: safetensors + JSON, a SHA-256 per file, a commit marker, an atomic rename.

    run/checkpoints/step-00000500/
        <name>.safetensors    one file per group of tensors (model, optimizer, ...)
        state.json            everything that is not a tensor
        COMMIT                sizes and SHA-256 of the files above; a folder without a matching one does not exist

Write order: step-N.tmp/ -> fsync each file -> COMMIT -> fsync folder -> rename to step-N/ -> fsync parent. A step is
never written over, nothing is unpickled, and the newest folder whose COMMIT verifies is the one that is loaded.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

FORMAT = "vatt_engine checkpoint 1"
STEP_NAME = re.compile(r"step-(\d{8,})")


class CheckpointError(ValueError):
    """A checkpoint is missing or cannot be trusted; the message names the file and the reason."""


class Checkpoint(NamedTuple):
    """A verified checkpoint.

    `tensors` maps a group's name ("model", "optimizer") to its tensors by name, `state` is the JSON state, `skipped`
    says which newer folders were passed over and why.
    """

    step: int
    path: Path
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]
    skipped: tuple[str, ...]


def save(
    run_dir: str | Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    *,
    keep: int = 2,
) -> Path:
    """Write the checkpoint of `step` and remove all but the `keep` newest.

    Args:
        run_dir: run folder; the checkpoint becomes `run_dir/checkpoints/step-<step>`.
        step: number of finished steps.
        tensors: groups of named tensors, any device and dtype; shared or strided storage is written out in full.
        state: JSON values.
        keep: how many checkpoints stay, at least 2 so that a damaged newest one leaves another.

    Returns:
        The folder. A valid checkpoint of the same step is left as it is; a damaged one is put aside as `*.damaged`.

    Raises:
        OSError: the disk is full, not writable, or broken; older checkpoints are then untouched.

    >>> save("run", 500, {"model": {"weight": torch.ones(2)}}, {"seed": 0}).name
    'step-00000500'
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    folder = Path(run_dir) / "checkpoints"
    final = folder / f"step-{step:08d}"
    if final.exists():
        if _damage(final) is None:
            return final
        _put_aside(final)
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob("*.tmp"):
        shutil.rmtree(stale)
    partial = folder / f"{final.name}.tmp"
    partial.mkdir()
    for name, group in tensors.items():
        try:
            save_file(_unshared(group), partial / f"{name}.safetensors", metadata={"format": "pt"})
        except SafetensorError as error:  # what the library makes of a full disk
            raise OSError(f"{partial}: {name}.safetensors must fit on the disk, got an error: {error}.") from error
    (partial / "state.json").write_text(json.dumps(dict(state), allow_nan=False, sort_keys=True) + "\n")
    files = {}
    for path in sorted(partial.iterdir()):
        _sync(path)
        files[path.name] = {"size": path.stat().st_size, "sha256": _sha256(path)}
    (partial / "COMMIT").write_text(_canonical({"format": FORMAT, "step": step, "files": files}))
    _sync(partial / "COMMIT")
    _sync(partial)
    os.rename(partial, final)
    _sync(folder)
    for old in _steps(folder)[max(keep, 2) :]:
        os.rename(old, folder / f"{old.name}.tmp")  # a kill inside rmtree then leaves a .tmp, not a damaged step
        shutil.rmtree(folder / f"{old.name}.tmp")
    return final


def load_latest(run_dir: str | Path, *, device: str = "cpu") -> Checkpoint:
    """Load the newest checkpoint of a run whose every byte is what was written.

    Raises:
        CheckpointError: there is none; the message lists each damaged one with its file and reason.

    >>> _ = save("run", 500, {"model": {"weight": torch.ones(2)}}, {"seed": 0})
    >>> load_latest("run").tensors["model"]["weight"]
    tensor([1., 1.])
    """
    from safetensors.torch import load_file

    folder = Path(run_dir) / "checkpoints"
    if not Path(run_dir).is_dir():
        raise CheckpointError(f"{run_dir}: the run folder must exist, got no such folder.")
    skipped: list[str] = []
    for path in _steps(folder):
        reason = _damage(path)
        if reason is None:
            tensors = {file.stem: load_file(file, device=device) for file in sorted(path.glob("*.safetensors"))}
            state = json.loads((path / "state.json").read_bytes())
            return Checkpoint(int(path.name[len("step-") :]), path, tensors, state, tuple(skipped))
        skipped.append(f"{path}: skipped, {reason}")
    raise CheckpointError(" ".join([f"{folder}: the run must have at least one valid checkpoint, got none.", *skipped]))


def has_checkpoint(run_dir: str | Path) -> bool:
    """Whether the run folder holds any finished checkpoint, valid or not."""
    return bool(_steps(Path(run_dir) / "checkpoints"))


def _steps(folder: Path) -> list[Path]:
    """Finished checkpoints, newest first; .tmp and .damaged folders are not finished ones."""
    found = [path for path in folder.glob("step-*") if STEP_NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name[len("step-") :]), reverse=True)


def _damage(path: Path) -> str | None:
    """Why a checkpoint folder cannot be trusted, or None if every byte is as committed."""
    try:
        text = (path / "COMMIT").read_text()
        commit = json.loads(text)
        files = {name: (entry["size"], entry["sha256"]) for name, entry in commit["files"].items()}
        if text != _canonical(commit) or commit["format"] != FORMAT or path.name != f"step-{commit['step']:08d}":
            return "COMMIT is not what was written."
    except FileNotFoundError:
        return "COMMIT is missing."
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        return f"COMMIT cannot be read ({type(error).__name__}: {error})."
    present = {file.name for file in path.iterdir()} - {"COMMIT"}
    if "state.json" not in files or present != files.keys():
        odd = sorted(present ^ files.keys()) or ["state.json"]
        return f"{odd[0]} is {'not in COMMIT' if odd[0] in present else 'missing'}."
    for name, (size, digest) in files.items():
        try:
            actual = (path / name).stat().st_size
            if actual != size:
                return f"{name} has {actual} bytes instead of {size}."
            if _sha256(path / name) != digest:
                return f"{name} does not have the SHA-256 of its COMMIT."
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})."
    return None


def _put_aside(path: Path) -> None:
    number = 0
    while (target := path.with_name(f"{path.name}.damaged{number or ''}")).exists():
        number += 1
    os.rename(path, target)


def _unshared(group: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each tensor on the CPU, contiguous and with storage of its own, as safetensors wants it."""
    result: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in group.items():
        tensor = tensor.detach().cpu().contiguous()
        pointer = tensor.untyped_storage().data_ptr()
        result[name] = tensor.clone() if pointer in seen else tensor
        seen.add(pointer)
    return result


def _canonical(value: Any) -> str:
    return json.dumps(value, indent=1, sort_keys=True) + "\n"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
