"""Checkpoints that cannot be half there: safetensors + JSON, a SHA-256 per file, a commit marker, an atomic rename.

    run/checkpoints/step-00000500/
        <name>.safetensors    one file per group of tensors (model, optimizer, ...)
        state.json            everything that is not a tensor
        COMMIT                sizes and SHA-256 of the files above; a folder without a matching one does not exist

Write order: step-N.tmp/ -> fsync each file -> COMMIT -> fsync folder -> rename to step-N/ -> fsync parent. A step is
never written over, nothing is unpickled, and the newest folder whose COMMIT verifies is the one that is loaded.

On several ranks each writes its share of the tensors, whole ones, to `<name>.rank-1-of-4.safetensors` of one folder
that all of them see; rank 0 commits when every rank has said that its files are on the disk. Any number of ranks loads
it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from vatt_engine.engine.peers import Meeting

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
    meeting: Meeting | None = None,
) -> Path:
    """Write the checkpoint of `step` and remove all but the `keep` newest.

    Args:
        run_dir: run folder; the checkpoint becomes `run_dir/checkpoints/step-<step>`.
        step: number of finished steps.
        tensors: groups of named tensors, any device and dtype; shared or strided storage is written out in full.
        state: JSON values.
        keep: how many checkpoints stay, at least 2 so that a damaged newest one leaves another.
        meeting: of the ranks, all of which then call this, each with its `share` of the tensors; None: one process.

    Returns:
        The folder. A valid checkpoint of the same step is left as it is; a damaged one is put aside as `*.damaged`.

    Raises:
        OSError: the disk is full, not writable, or broken, for any rank; older checkpoints are then untouched.

    >>> save("run", 500, {"model": {"weight": torch.ones(2)}}, {"seed": 0}).name
    'step-00000500'
    """
    folder = Path(run_dir) / "checkpoints"
    final = folder / f"step-{step:08d}"
    if final.exists() and _damage(final) is None:
        return final
    rank, mark, suffix = 0, "", ""
    if meeting is not None:
        rank, mark, suffix = meeting.rank, f".{meeting.name}", f".rank-{meeting.rank}-of-{meeting.size}"
    partial = folder / f"{final.name}{mark}.tmp"
    try:
        if rank == 0:
            if final.exists():
                _put_aside(final)
            for stale in folder.glob("*.tmp"):  # what processes that died had begun
                if meeting is None or stale != partial:
                    shutil.rmtree(stale)
        partial.mkdir(parents=True, exist_ok=True)
        files = _write(partial, tensors, state if rank == 0 else None, suffix)
        if meeting is None:
            _commit(partial, final, files, step, keep)
        else:
            meeting.conclude(files, lambda parts: _commit(partial, final, parts, step, keep))
    except OSError as error:
        if meeting is not None:
            meeting.fail(str(error))
        if rank == 0:
            shutil.rmtree(partial, ignore_errors=True)  # gives a full disk its room back
        raise
    return final


def share(items: Iterable[tuple[str, str, Tensor]], rank: int, size: int) -> dict[str, dict[str, Tensor]]:
    """The tensors that one of `size` ranks writes: each on the one that has least so far, in the order they come in.

    Of `items`, (group, name, tensor), in the same order on all ranks, those of others are let go at once.

    >>> share([("model", "a", torch.ones(4)), ("model", "b", torch.ones(1)), ("model", "c", torch.ones(2))], 1, 2)
    {'model': {'b': tensor([1.]), 'c': tensor([1., 1.])}}
    """
    loads, own = [0] * size, {}
    for group, name, value in items:
        owner = loads.index(min(loads))
        loads[owner] += value.nbytes
        own.setdefault(group, {}).update({name: value} if owner == rank else {})
        del value
    return own


def _write(
    partial: Path, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any] | None, suffix: str
) -> dict[str, dict[str, Any]]:
    """The files of one rank, on the disk when this returns, with their sizes and SHA-256."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    paths = []
    for name, group in tensors.items():
        paths.append(partial / f"{name}{suffix}.safetensors")
        try:
            save_file(_unshared(group), paths[-1], metadata={"format": "pt"})
        except SafetensorError as error:  # what the library makes of a full disk
            raise OSError(f"{partial}: {paths[-1].name} must fit on the disk, got an error: {error}.") from error
    if state is not None:
        paths.append(partial / "state.json")
        paths[-1].write_text(json.dumps(dict(state), allow_nan=False, sort_keys=True) + "\n")
    for path in paths:
        _sync(path)
    return {path.name: {"size": path.stat().st_size, "sha256": _sha256(path)} for path in paths}


def _commit(partial: Path, final: Path, files: Mapping[str, Any], step: int, keep: int) -> None:
    (partial / "COMMIT").write_text(_canonical({"format": FORMAT, "step": step, "files": files}))
    _sync(partial / "COMMIT")
    _sync(partial)
    os.rename(partial, final)
    _sync(final.parent)
    for old in _steps(final.parent)[max(keep, 2) :]:
        os.rename(old, old.with_name(f"{old.name}.tmp"))  # a kill inside rmtree then leaves a .tmp, not a damaged step
        shutil.rmtree(old.with_name(f"{old.name}.tmp"))


def load_latest(run_dir: str | Path, *, device: str = "cpu") -> Checkpoint:
    """Load the newest checkpoint of a run whose every byte is what was written.

    Raises:
        CheckpointError: there is none; the message lists each damaged one with its file and reason.

    >>> _ = save("run", 500, {"model": {"weight": torch.ones(2)}}, {"seed": 0})
    >>> load_latest("run").tensors["model"]["weight"]
    tensor([1., 1.])
    """
    folder = Path(run_dir) / "checkpoints"
    if not Path(run_dir).is_dir():
        raise CheckpointError(f"{run_dir}: the run folder must exist, got no such folder.")
    skipped: list[str] = []
    for path in _steps(folder):
        reason = _damage(path)
        if reason is None:
            try:
                return Checkpoint(int(path.name[len("step-") :]), path, *_read(path, device), tuple(skipped))
            except ValueError as error:
                reason = str(error)
        skipped.append(f"{path}: skipped, {reason}")
    raise CheckpointError(" ".join([f"{folder}: the run must have at least one valid checkpoint, got none.", *skipped]))


def read_tensors(path: str | Path, *, device: str = "cpu") -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        CheckpointError: the file is not intact safetensors.
        OSError: it cannot be read.

    >>> read_tensors("model.safetensors")  # doctest: +SKIP
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path, device=device)
    except (SafetensorError, KeyError, MemoryError) as error:
        raise CheckpointError(
            f"{path}: the file must be intact safetensors, got {error or 'one too large'}."
        ) from error


def saved_names(run_dir: str | Path, group: str) -> set[str]:
    """Names of a group's tensors in the newest checkpoint that has them, read without its numbers.

    >>> _ = save("run", 500, {"model": {"weight": torch.ones(2)}}, {})
    >>> saved_names("run", "model")
    {'weight'}
    """
    from safetensors import SafetensorError, safe_open

    for path in _steps(Path(run_dir) / "checkpoints"):
        names: set[str] = set()
        try:
            for file in path.glob(f"{group}*.safetensors"):
                with safe_open(file, "pt") as tensors:
                    names.update(tensors.keys())
        except (SafetensorError, OSError):  # `load_latest` passes it over too, and says so
            continue
        return names
    return set()


def saved_state(run_dir: str | Path) -> dict[str, Any]:
    """The JSON state of the newest checkpoint whose state can be read, without its tensors; else nothing.

    >>> _ = save("run", 500, {"model": {"weight": torch.ones(2)}}, {"seed": 0})
    >>> saved_state("run")
    {'seed': 0}
    """
    for path in _steps(Path(run_dir) / "checkpoints"):
        try:
            return dict(json.loads((path / "state.json").read_bytes()))
        except (OSError, ValueError, TypeError, RecursionError):  # `load_latest` passes it over too, and says so
            continue
    return {}


def has_checkpoint(run_dir: str | Path) -> bool:
    """Whether the run folder holds any finished checkpoint, valid or not."""
    return bool(_steps(Path(run_dir) / "checkpoints"))


def _steps(folder: Path) -> list[Path]:
    """Finished checkpoints, newest first; .tmp and .damaged folders are not finished ones."""
    found = [path for path in folder.glob("step-*") if STEP_NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name[len("step-") :]), reverse=True)


def _read(path: Path, device: str) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """The groups of tensors, whole whatever number of ranks wrote them, and the JSON state."""
    groups: dict[str, dict[str, Tensor]] = {}
    for file in sorted(path.glob("*.safetensors")):
        group, part = groups.setdefault(file.name.partition(".")[0], {}), read_tensors(file, device=device)
        if twice := sorted(group.keys() & part.keys()):
            raise CheckpointError(f"{file.name} must hold tensors that no other file has, got {twice[0]} again.")
        group.update(part)
    try:
        return groups, json.loads((path / "state.json").read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"state.json must be JSON, got {type(error).__name__}.") from error


def _damage(path: Path) -> str | None:
    """Why a checkpoint folder cannot be trusted, or None if every byte is as committed."""
    try:
        text = (path / "COMMIT").read_text()
        commit = json.loads(text)
    except FileNotFoundError:
        return "COMMIT is missing."
    except (OSError, ValueError, RecursionError) as error:
        return f"COMMIT cannot be read ({type(error).__name__}: {error})."
    if not _is_commit(commit) or text != _canonical(commit) or path.name != f"step-{commit['step']:08d}":
        return "COMMIT is not what was written."
    files = {name: (entry["size"], entry["sha256"]) for name, entry in commit["files"].items()}
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


def _is_commit(value: Any) -> bool:
    """Whether a JSON value has the form of what `save` writes as COMMIT."""
    if not isinstance(value, dict) or value.get("format") != FORMAT or not isinstance(value.get("step"), int):
        return False
    files = value.get("files")
    return isinstance(files, dict) and all(
        isinstance(entry, dict) and entry.keys() >= {"size", "sha256"} for entry in files.values()
    )


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
