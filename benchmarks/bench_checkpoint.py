"""What a background checkpoint costs training: `python -m benchmarks.bench_checkpoint --model vatt_bbs`.

Each round takes a few quiet steps, saves without waiting, and takes steps until the checkpoint is committed. `stall` is
for how long training stands still: in `save`, and where a step waits for the copy before it updates the weights;
`write` is how long the thread took. `slowdown` is what the steps beside it took longer than quiet ones, together: where
the device is the CPU, the thread takes part of it. The first save, which allocates the host copy, is told apart.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import torch

from benchmarks.bench_step import clips
from vatt_engine import VATTLoss, create_model
from vatt_engine.engine import Engine, EngineConfig, OptimConfig, ScheduleConfig, checkpoint

QUIET = 3  # steps per round


def timed(call, seconds: list[float]):
    """`call`, with the seconds of each use of it added to the list."""

    def wrapped(*args, **kwargs):
        start = time.perf_counter()
        try:
            return call(*args, **kwargs)
        finally:
            seconds.append(time.perf_counter() - start)

    return wrapped


def measure(model: str, folder: Path, rounds: int, device: str, batch_size: int = 8) -> dict[str, float]:
    """Medians over `rounds`, in seconds; shares are medians of the rounds' shares of `write`."""
    loss, save = VATTLoss(), checkpoint.save
    batch = clips(SimpleNamespace(model=model, batch=batch_size, candidates=1, keep_rate=0.5, layers=0), device)
    config = EngineConfig(device=device, strategy="single", keep_checkpoints=2)
    net = create_model(model)
    engine = Engine(net, lambda x, _: loss(x), config, OptimConfig(), ScheduleConfig(), run_dir=folder)
    quiet, written, stalls, slowdowns = [], [], [], []
    step, waits = timed(engine.step, steps := []), []
    checkpoint.save, engine.writer.settle = timed(save, written), timed(engine.writer.settle, waits)
    try:
        for _ in range(rounds + 1):
            steps.clear()
            for _ in range(QUIET + (not stalls)):
                step(batch)
            quiet.append(statistics.median(steps))
            waits.clear()
            steps.clear()
            timed(engine.save, stall := [])(wait=False)
            while not engine.writer.news():
                step(batch)
            stalls.append(stall[0] + sum(waits))
            slowdowns.append(sum(steps) - len(steps) * quiet[-1])
    finally:
        checkpoint.save = save
    state = engine.strategy.export_state()
    shares = {"stall": stalls, "slowdown": slowdowns}
    return {
        "megabytes": sum(value.nbytes for group in state.values() for value in group.values()) / 1e6,
        "step": statistics.median(quiet[1:]),
        "stall": statistics.median(stalls[1:]),
        "slowdown": statistics.median(slowdowns[1:]),
        "write": statistics.median(written[1:]),
        **{f"{n}_share": statistics.median([x / w for x, w in zip(v[1:], written[1:])]) for n, v in shares.items()},
        "first_stall": stalls[0],
        "first_write": written[0],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="vatt_bbs")
    parser.add_argument("--folder", help="on the disk to be measured; a temporary folder by default")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        result = measure(args.model, Path(folder), args.rounds, args.device, args.batch_size)
    print(json.dumps({"model": args.model, "device": args.device, "rounds": args.rounds, **result}))


if __name__ == "__main__":
    main()
