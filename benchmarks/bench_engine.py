"""What `Engine.step` costs over a bare PyTorch loop of the same model: `python -m benchmarks.bench_engine`.

Both take steps in turn, in alternating order, on one batch that lies in memory: forward, loss, backward, Keras' Adam.
The engine's seeds, rate, norm, finiteness check and copies of the buffers come on top.
"""

import argparse
import json
import statistics
import time
from types import SimpleNamespace

import torch

from benchmarks.bench_step import clips
from vatt_engine import VATTLoss, create_model
from vatt_engine.engine import Engine, EngineConfig, OptimConfig, ScheduleConfig, build_optimizer


def bare_step(model, loss, optimizer, batch, seed):
    terms = loss(model(batch, seed=seed))
    optimizer.zero_grad(set_to_none=True)
    terms.total.backward()
    optimizer.step()


def measure(model: str, batch_size: int, rounds: int, device: str) -> dict[str, float]:
    """Medians over `rounds` in seconds; `overhead` is the median over rounds of engine / bare - 1."""
    batch = clips(SimpleNamespace(model=model, batch=batch_size, candidates=1, keep_rate=0.5, layers=0), device)
    torch.manual_seed(0)
    bare, loss = create_model(model).to(device).train(), VATTLoss()
    optimizer = build_optimizer(bare.named_parameters(), OptimConfig())
    torch.manual_seed(0)
    config = EngineConfig(device=device, strategy="single")
    engine = Engine(create_model(model), lambda x, _: loss(x), config, OptimConfig(), ScheduleConfig())
    steps = {
        "bare": lambda seed: bare_step(bare, loss, optimizer, batch, seed),
        "engine": lambda seed: engine.step(batch),
    }
    seconds = {name: [] for name in steps}
    for count in range(rounds + 2):
        for name in sorted(steps, reverse=count % 2 == 1):
            if device != "cpu":
                torch.cuda.synchronize()
            start = time.perf_counter()
            steps[name](count)
            if device != "cpu":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
    warm = {name: values[2:] for name, values in seconds.items()}
    ratios = [ours / theirs - 1 for ours, theirs in zip(warm["engine"], warm["bare"])]
    return {name: statistics.median(values) for name, values in warm.items()} | {"overhead": statistics.median(ratios)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="vatt_tiny")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    print(json.dumps(vars(args) | measure(**vars(args))))


if __name__ == "__main__":
    main()
