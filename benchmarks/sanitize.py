"""Every GPU implementation of every op once over a few small shapes: `compute-sanitizer python -m benchmarks.sanitize`.

Nothing is timed or compared; the tool around it looks for bad accesses, races and reads of what was never written.
"""

import importlib
import sys
from pathlib import Path

import torch

from benchmarks.harness import DTYPES, FORWARD_BACKWARD, Bench, one_pass
from benchmarks.shapes import SHAPES


def benches():
    """The Bench of every op."""
    for path in sorted(Path(__file__).parent.glob("bench_*.py")):
        module = importlib.import_module(f"benchmarks.{path.stem}")
        yield from (value for value in vars(module).values() if isinstance(value, Bench) and value.stem)


def run_once(bench, device):
    """All implementations but the reference, all dtypes, on the bench's "sanitizer" shapes; names what ran."""
    passes = FORWARD_BACKWARD if FORWARD_BACKWARD in bench.passes else bench.passes[0]
    for provider in bench.providers(device):
        for shape, sizes in SHAPES[bench.name]["sanitizer"].items():
            for dtype in () if provider in {"reference", *bench.rivals} else bench.dtypes[device]:
                try:
                    with bench.choose(provider):
                        one_pass(bench.op, sizes, bench.inputs(sizes, DTYPES[dtype], device), passes)()
                    fate = "ran"
                except RuntimeError as error:
                    if not bench.refuses(provider, error):
                        raise
                    fate = f"refused: {error}"
                if device == "cuda":
                    torch.cuda.synchronize()
                yield f"{bench.name} {provider} {shape} {dtype}: {fate}"


def main():
    if not torch.cuda.is_available():
        sys.exit("benchmarks.sanitize: needs a CUDA device: torch.cuda.is_available() is False")
    for bench in benches():
        for line in run_once(bench, "cuda"):
            print(line, flush=True)


if __name__ == "__main__":
    main()
