"""The folder of a run: who may write there, and what a start makes of what it finds.

A start looks at the folder before it loads anything, and touches it only when all else is ready to train. So a start
that is refused leaves the folder as it was.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_type_hints

from vatt_engine.analysis.report import read_records
from vatt_engine.collectives import rank
from vatt_engine.engine.checkpoint import has_checkpoint
from vatt_engine.engine.logging import environment, require_log_packages
from vatt_engine.engine.ranks import largest_of_ranks
from vatt_engine.lock import Lock
from vatt_engine.output import say, write_text
from vatt_engine.schema import PATH, ConfigError, dump_yaml, to_dict
from vatt_engine.tasks.config import RunConfig
from vatt_engine.tasks.results import check_writable

# What a start leaves before its first step is done. env.json comes first: where it lies, these are of a start too.
OF_A_START = ("config.yaml", "tokenizer.json", "metrics.jsonl", "events.jsonl", "quarantine*.jsonl", "heldout*.jsonl")
REFUSED = 2  # beside 0 and 1, whether there is a checkpoint


def check_run(config: RunConfig, resume: bool) -> bool:
    """Whether there is a checkpoint to resume, on every rank; nothing is written.

    Raises:
        ConfigError: the folder holds another run or something else, or cannot be written.
        LockedError: another process is at work there.
        ValueError: a package of the log is not installed.
    """
    run_dir = Path(config.out)
    require_log_packages(tensorboard=config.engine.tensorboard, wandb=config.engine.wandb)

    def look() -> int:
        Lock(run_dir, f"vatt {config.verb}").check()
        if not resume:
            _check_new(run_dir, config.verb)
        check_writable(run_dir, f"vatt {config.verb}")
        return resume and has_checkpoint(run_dir)

    return bool(_agreed(look, config))


@contextlib.contextmanager
def opened_run(config: RunConfig, resume: bool) -> Iterator[None]:
    """The run folder for this run alone; all ranks enter it, the first one holds it for them.

    What an earlier start left that finished no step is removed, unless this one resumes.

    Raises:
        ConfigError, LockedError: as `check_run`, should the folder have changed since.
    """
    run_dir = Path(config.out)
    with contextlib.ExitStack() as held:

        def take() -> int:
            held.enter_context(Lock(run_dir, f"vatt {config.verb}"))
            if resume and not has_checkpoint(run_dir):
                say(f"{run_dir}: no checkpoint yet, starting at step 0.")
            if not resume:
                _check_new(run_dir, config.verb)
                _begin_anew(run_dir)
            return 0

        _agreed(take, config)
        yield


def write_start(config: RunConfig) -> None:
    """Write env.json and config.yaml, on the first rank alone: from here on the folder is this run's."""
    if rank() == 0:
        run_dir = Path(config.out)
        # The commands of the run are repeated from where it was started, or its relative paths lead elsewhere.
        found = environment(config.engine.torch_device()) | {"started_in": os.getcwd()}
        write_text(run_dir / "env.json", json.dumps(found, indent=1) + "\n")
        write_text(run_dir / "config.yaml", dump_yaml(to_dict(config)))


def check_places(config: RunConfig) -> None:
    """Refuse to go on from another folder than the run was started in, where its relative paths lead nowhere.

    Raises:
        ConfigError: with the path, and the folder from which it leads somewhere.
    """
    run_dir, here = Path(config.out), os.getcwd()
    start = _started_in(run_dir)
    if start is None or start == here:
        return
    for name, path in paths_of(config):
        if name == "out" or not path or os.path.isabs(path) or not _leads(Path(start) / path):
            continue
        flag = f"--{name.replace('_', '-')}"
        if not _leads(Path(path)):
            raise ConfigError(
                f"{run_dir / 'config.yaml'}: {name} must lead to a file from {here}, got {path!r}, which is relative "
                f"to {start}, where the run was started. Start there, or give {flag}."
            )
        say(f"note: the run was started in {start}; {flag} {path} is now taken from {here}.")


def _started_in(run_dir: Path) -> str | None:
    """The folder in which a run was started, from which the relative paths of its config lead."""
    try:
        found = json.loads((run_dir / "env.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    place = found.get("started_in") if isinstance(found, dict) else None
    return place if isinstance(place, str) else None


def _leads(path: Path) -> bool:
    """Whether something is at a path; of a pattern of tars, `shards/{000..099}.tar`, whether its folder is."""
    return path.exists() or (path.suffix == ".tar" and path.parent.is_dir())


def paths_of(config: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """(dotted name, value) of every field of a config that names a file or a folder."""
    for name, hint in get_type_hints(type(config), include_extras=True).items():
        value = getattr(config, name)
        if dataclasses.is_dataclass(value):
            yield from paths_of(value, f"{prefix}{name}.")
        elif PATH in str(hint):
            values = value if isinstance(value, tuple) else (value,)
            yield from ((f"{prefix}{name}", one) for one in values if one is not None)


def _agreed(action: Callable[[], int], config: RunConfig) -> int:
    """What the first rank finds, on every rank; where it refuses, all raise, and none waits for the others."""
    code, refusal = 0, None
    if rank() == 0:
        try:
            code = int(action())
        except (ValueError, OSError) as error:
            code, refusal = REFUSED, error
    code = largest_of_ranks(code, config.engine.torch_device())
    if refusal is not None:
        raise refusal
    if code == REFUSED:
        raise ConfigError(f"rank {rank()}: {config.out}: rank 0 refuses the run folder; it says why.")
    return code


def _check_new(run_dir: Path, verb: str) -> None:
    """Refuse a folder that holds a run with a finished step, or anything that no start of a run has left.

    Raises:
        ConfigError: with what is there.
    """
    if run_dir.exists() and not run_dir.is_dir():
        raise ConfigError(f"{run_dir}: --out must be a folder, got a file.")
    if has_checkpoint(run_dir) or _has_finished_step(run_dir):
        raise ConfigError(
            f"{run_dir}: --out must be a new run folder, got one that holds a run. "
            f"Continue it with `vatt {verb} --resume {run_dir}`, or choose another --out."
        )
    kept = ["model"] if _is_of_a_start(run_dir) else ["model", *OF_A_START]
    for name in kept:
        for path in run_dir.glob(name):
            raise ConfigError(
                f"{run_dir}: --out must be a new run folder, got one with a {path.name}, which is kept. "
                "Remove it, or choose another --out."
            )


def _is_of_a_start(run_dir: Path) -> bool:
    return (run_dir / "env.json").is_file()


def _has_finished_step(run_dir: Path) -> bool:
    path = run_dir / "metrics.jsonl"
    try:
        return path.exists() and any(record["step"] > 0 for record in read_records(path))
    except ValueError:  # not what a run of ours writes: somebody else's, which is kept
        return True


def _begin_anew(run_dir: Path) -> None:
    """Remove what an earlier start has left that finished no step."""
    left = [path for name in OF_A_START for path in run_dir.glob(name)]
    if left:
        names = ", ".join(path.name for path in left)
        say(f"{run_dir}: an earlier start has finished no step here; this one begins anew, without its {names}.")
    for path in left:
        path.unlink()
