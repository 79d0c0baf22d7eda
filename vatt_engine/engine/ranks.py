"""The processes of one run: joined as `torchrun` or `deepspeed` started them, alone otherwise."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import distributed as dist

from vatt_engine.collectives import all_reduce_max, world_size


@contextmanager
def joined_ranks(device: torch.device) -> Iterator[None]:
    """Join the other processes of the launch, by NCCL where they train on GPUs and gloo elsewhere, and leave them.

    A launcher says so by the environment: RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT. Without them, or
    in a process group that is there already, nothing happens.

    Args:
        device: of this process, see `EngineConfig.torch_device`.

    >>> with joined_ranks(torch.device("cpu")):
    ...     world_size()
    1
    """
    if dist.is_initialized() or "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    store, number, size = next(dist.rendezvous("env://"))
    # torchrun's store outlives a restart, and in it the addresses of ranks that are dead.
    store = dist.PrefixStore(f"start-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=number, world_size=size)
    yield
    dist.destroy_process_group()  # not after an error: it would wait for ranks that wait for this one


# What schedulers call the number of processes that one command of theirs has started.
NUMBERS_OF_TASKS = {"SLURM_NTASKS": "Slurm", "OMPI_COMM_WORLD_SIZE": "mpirun", "PMI_SIZE": "mpiexec"}


def alone_among_tasks() -> str | None:
    """What to tell a user whose scheduler runs several tasks while this process trains alone; None where all is well.

    Each of the tasks then trains a run of its own, the whole of it. torchrun, one per node, makes ranks of them.
    """
    if "RANK" in os.environ or dist.is_initialized():
        return None
    for name, scheduler in NUMBERS_OF_TASKS.items():
        number = os.environ.get(name, "")
        if number.isdecimal() and int(number) > 1:
            return (
                f"{scheduler} counts {number} tasks ({name}), but this process trains alone, without RANK and "
                "WORLD_SIZE. To train with all of them as one run start torchrun, one task per node: "
                "`srun --ntasks-per-node=1 torchrun --nnodes N --nproc-per-node GPUS ... -m vatt_engine.cli`."
            )
    return None


def largest_of_ranks(value: int, device: torch.device) -> int:
    """The largest `value` of all ranks: what they agree on before the next step.

    >>> largest_of_ranks(1, torch.device("cpu"))
    1
    """
    if world_size() == 1:
        return value
    return int(all_reduce_max(torch.tensor(value, device=device)))
