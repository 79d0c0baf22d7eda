"""What a background checkpoint costs training: `python -m benchmarks.bench_checkpoint --model vatt_bbs`.

Each round saves a model with its moments without waiting (`stall`, the seconds for which training stands still) and
then waits until it is written and committed (`write`). The first save, which allocates the host copy, is told apart.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch

from vatt_engine.engine import checkpoint
from vatt_engine.engine.writer import CheckpointWriter
from vatt_engine.models import build_model, model_config


def measure(model: str, folder: Path, rounds: int, device: str) -> dict[str, float]:
    """Medians over `rounds`, in seconds; `stall_share` is the median of stall / write."""
    weights = {name: value.to(device) for name, value in build_model(model_config(model)).state_dict().items()}
    moments = {f"{name}/{key}": value.clone() for name, value in weights.items() for key in ("exp_avg", "exp_avg_sq")}
    tensors = {"model": weights, "optimizer": moments}
    writer, written, stalls = CheckpointWriter(), [], []
    save = checkpoint.save

    def timed(*args, **kwargs):
        start = time.perf_counter()
        path = save(*args, **kwargs)
        written.append(time.perf_counter() - start)
        return path

    checkpoint.save = timed
    try:
        for step in range(rounds + 1):
            start = time.perf_counter()
            writer.save(folder, step, tensors, {"step": step})
            stalls.append(time.perf_counter() - start)
            writer.finish()
    finally:
        checkpoint.save = save
    shares = [stall / write for stall, write in zip(stalls[1:], written[1:])]
    return {
        "megabytes": sum(value.nbytes for group in tensors.values() for value in group.values()) / 1e6,
        "stall": statistics.median(stalls[1:]),
        "write": statistics.median(written[1:]),
        "stall_share": statistics.median(shares),
        "first_stall": stalls[0],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="vatt_bbs")
    parser.add_argument("--folder", help="on the disk to be measured; a temporary folder by default")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        result = measure(args.model, Path(folder), args.rounds, args.device)
    print(json.dumps({"model": args.model, "device": args.device, "rounds": args.rounds, **result}))


if __name__ == "__main__":
    main()
