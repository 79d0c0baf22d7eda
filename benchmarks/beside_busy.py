"""How fast training stays beside another busy program: `python -m benchmarks.beside_busy`.

On two CPUs a child trains the demo's model on one synthetic batch, once as `vatt` starts it and once with OpenMP's own
way of waiting. A loop that only counts holds one of the CPUs in every second window of the child's steps. Idle and busy
windows take turns in one process, so their ratio says nothing about how fast the machine is; 2/3 is a fair share of two
CPUs for two threads beside a third.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence

from vatt_engine.cpus import CHOICES_OF_WAITING, openmp_settings

CPUS = 2
TRAIN = "from benchmarks.beside_busy import train; train()"
BUSY = "while True: pass"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.beside_busy", description=__doc__.partition("\n")[0])
    parser.add_argument("--windows", type=int, default=3, help="idle and busy windows of each child")
    parser.add_argument("--seconds", type=float, default=5.0, help="length of a window")
    parser.add_argument("--nice", type=int, default=0, help="of all processes: -20, as root, on a machine with others")
    parser.add_argument("--try", nargs="*", default=(), dest="more", help="further settings, such as GOMP_SPINCOUNT=9")
    given = parser.parse_args(argv)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CPUS])
    os.nice(given.nice)
    plain = {name: value for name, value in os.environ.items() if name not in CHOICES_OF_WAITING}
    plain.pop("OMP_NUM_THREADS", None)
    children = {"as vatt starts it": plain | openmp_settings(plain), "OpenMP's default": plain}
    children |= {setting: plain | dict([setting.split("=", 1)]) for setting in given.more}
    print(f"{'':<26}{'idle':>8}{'busy':>8}{'ratio':>8}   clips/s, medians of {given.windows} windows")
    for name, environment in children.items():
        idle, busy = measure(environment, given.windows, given.seconds)
        print(f"{name:<26}{idle:8.1f}{busy:8.1f}{busy / idle:8.2f}", flush=True)
    return 0


def measure(environment: dict[str, str], windows: int, seconds: float) -> tuple[float, float]:
    """Clips per second of a training child, alone and beside a busy loop: medians over windows that take turns."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", TRAIN], env=environment, **pipes) as child:
        assert child.stdout.readline() == "warm\n"

        def speed() -> float:
            child.stdin.write(f"{seconds}\n")
            child.stdin.flush()
            return float(child.stdout.readline())

        speeds: dict[bool, list[float]] = {False: [], True: []}
        for _ in range(windows):
            speeds[False].append(speed())
            with subprocess.Popen([sys.executable, "-c", BUSY]) as loop:
                speeds[True].append(speed())
                loop.kill()
        child.stdin.close()
    return statistics.median(speeds[False]), statistics.median(speeds[True])


def train() -> None:
    """The child: for each number of seconds that comes in, trains that long and says how many clips per second."""
    import torch

    from vatt_engine import Batch
    from vatt_engine.engine.engine import Engine
    from vatt_engine.models import build_model
    from vatt_engine.tasks.config import load_config
    from vatt_engine.tasks.pretrain import PretrainLoss

    config = load_config("demo")
    data, size = config.data, config.data.batch_size
    batch = Batch(
        video=torch.randint(256, (size, data.num_frames, data.frame_size, data.frame_size, 3), dtype=torch.uint8),
        audio=torch.randn(size, data.num_samples),
        text=torch.randint(4, 100, (size, data.num_candidates, data.max_words)),
        audio_mask=torch.ones(size, dtype=torch.bool),
        text_mask=torch.ones(size, dtype=torch.bool),
    )
    loss = PretrainLoss(config.loss)
    engine = Engine(build_model(config.model), loss, config.engine, config.optim, config.schedule)
    for _ in range(2):
        engine.step(batch)
    print("warm", flush=True)
    for line in sys.stdin:
        start, steps = time.perf_counter(), 0
        while time.perf_counter() - start < float(line):
            engine.step(batch)
            steps += 1
        print(steps * size / (time.perf_counter() - start), flush=True)


if __name__ == "__main__":
    sys.exit(main())
