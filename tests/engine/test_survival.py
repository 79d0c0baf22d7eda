"""Several ranks through stops, restarts and other numbers of ranks: the state is the same to the last bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from engine.test_strategies import STEP_TOLERANCE, build, error, flat, losses, same
from ranks import run_ranks

from vatt_engine.collectives import world_size
from vatt_engine.engine.checkpoint import load_latest

STEPS = 20
STRATEGIES = {1: ["single", "zero2"], 2: ["ddp", "zero1", "zero2", "zero3"]}


def on_rank_stopping() -> dict[str, list[int]]:
    """Steps at which a stop and a resume changed anything, by strategy."""
    folder = Path(sys.argv[3])
    stops = json.loads((folder / "stops.json").read_text())
    return {name: _changed(name, folder / name, stops) for name in STRATEGIES[world_size()]}


def _changed(strategy: str, run_dir: Path, stops: list[int]) -> list[int]:
    settings = {"dropout": 0.3, "keep_mode": "sample", "keep_checkpoints": STEPS}
    straight = build(strategy, run_dir=run_dir / "0", **settings)
    states = [flat(straight.strategy.export_state())]
    for step in range(1, STEPS + 1):
        if step - 1 in stops:
            straight.run_dir = run_dir / f"{step - 1}"
            straight.save(wait=False)
        losses(straight, 1)
        states.append(flat(straight.strategy.export_state()))
    straight.writer.finish()
    assert not same(states[0], states[1])
    changed = []
    for stop in stops:
        torch.manual_seed(99)
        resumed = build(strategy, run_dir=run_dir / f"{stop}", **settings)
        assert resumed.resume().step == stop
        if not same(flat(resumed.strategy.export_state()), states[stop]):
            changed.append(stop)
        losses(resumed, 1)
        if not same(flat(resumed.strategy.export_state()), states[stop + 1]):
            changed.append(stop)
    return changed


@pytest.mark.slow
@pytest.mark.parametrize("size", STRATEGIES)
@pytest.mark.parametrize("stops", [[1, 13], pytest.param([*range(1, STEPS)], marks=pytest.mark.soak)], ids=len)
def test_resumes_bit_for_bit_under_every_strategy(tmp_path, size, stops):
    (tmp_path / "stops.json").write_text(json.dumps(stops))
    found = run_ranks("engine.test_survival:on_rank_stopping", size, tmp_path)
    assert found == [{name: [] for name in STRATEGIES[size]}] * size


def on_rank_audited() -> list:
    events, watching = [], True

    def hook(event, args):
        if watching and event.startswith("pickle."):
            events.append([event, *map(str, args[:2])])

    sys.addaudithook(hook)
    for strategy in STRATEGIES[world_size()]:
        engine = build(strategy, run_dir=Path(sys.argv[3]) / strategy)
        losses(engine, 1)
        engine.save()
        engine.resume()
    watching = False
    return events


@pytest.mark.slow
def test_ranks_unpickle_nothing(tmp_path):
    assert run_ranks("engine.test_survival:on_rank_audited", 2, tmp_path) == [[], []]


def on_rank_saving() -> None:
    engine = build(run_dir=Path(sys.argv[3]).parent / f"of-{world_size()}")
    losses(engine, 3)
    engine.save()


def on_rank_loading() -> list:
    """For each number of ranks that saved: whether every bit is there, and the losses from there on."""
    found = []
    for saved in json.loads((Path(sys.argv[3]).parent / "sizes.json").read_text()):
        for strategy in ("zero3", "auto") if world_size() > 1 else ("single",):
            engine = build(strategy, run_dir=Path(sys.argv[3]).parent / f"of-{saved}")
            tensors = engine.resume().tensors
            whole = same(flat(engine.strategy.export_state()), flat(tensors))
            found.append([saved, whole, losses(engine, 3)])
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("saved", "loaded"), [([4], [2]), pytest.param([1, 2, 4], [1, 2, 4], marks=pytest.mark.soak)], ids=str
)
def test_any_number_of_ranks_goes_on_from_any_other(tmp_path, saved, loaded):
    (tmp_path / "sizes.json").write_text(json.dumps(saved))
    for size in saved:
        (tmp_path / f"save-{size}").mkdir()
        run_ranks("engine.test_survival:on_rank_saving", size, tmp_path / f"save-{size}")
    names = {path.name for path in load_latest(tmp_path / "of-4").path.glob("model*")}
    assert names == {f"model.rank-{r}-of-4.safetensors" for r in range(4)}
    straight = build("single")
    losses(straight, 3)
    wanted = losses(straight, 3)
    for size in loaded:
        (tmp_path / f"load-{size}").mkdir()
        for found in run_ranks("engine.test_survival:on_rank_loading", size, tmp_path / f"load-{size}"):
            for of, whole, got in found:
                assert whole, (of, size)
                assert error(got, wanted) < STEP_TOLERANCE, (of, size, got, wanted)


OUT_OF_MEMORY = """
import json, sys, torch
from pathlib import Path
from engine.test_strategies import build, losses, flat
from fleet import launch, reap
from vatt_engine.collectives import rank
from vatt_engine.engine.checkpoint import has_checkpoint
from vatt_engine.engine.peers import Peers

folder, size = Path(sys.argv[1]), int(sys.argv[2])

def work():
    with Peers(silence=2.0):
        engine = build(run_dir=folder / "run", halve_on_oom=True)
        features = engine.trained.compute
        def short_of_memory(batch, seed):
            if rank() == size - 1 and len(batch) > 3 and engine.finished >= 2:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return features(batch, seed=seed)
        engine.trained.compute = short_of_memory
        if has_checkpoint(folder / "run"):
            engine.resume()
        engine.save()
        found = losses(engine, 5 - engine.finished)
        engine.save()
        print("LOSSES", json.dumps([engine.parts, found]))

torch.set_num_threads(1)
for attempt in range(4):
    (folder / f"{attempt}").mkdir()
    codes = reap(launch(size, work, folder / f"{attempt}"))
    print(codes, file=sys.stderr)
    texts = [(folder / f"{attempt}" / f"{r}.txt").read_text() for r in range(size)]
    if codes == [0] * size:
        break
print(json.dumps([attempt, texts]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2])
def test_out_of_memory_halves_the_parts_and_keeps_the_batch(tmp_path, size):
    here = Path(__file__).parents[1]
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(here), str(here.parent)]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", OUT_OF_MEMORY, str(tmp_path), str(size)]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    attempts, texts = json.loads(done.stdout)
    straight = build("single")
    wanted = losses(straight, 5)
    assert attempts == (1 if size == 2 else 0), done.stderr  # 12 rows: 6 a rank, then parts of 3; alone 12, 6, 3
    for text in texts:
        [line] = [line for line in text.splitlines() if line.startswith("LOSSES ")]
        parts, found = json.loads(line.removeprefix("LOSSES "))
        assert parts == 4 // size
        assert error(found, wanted[-len(found) :]) < STEP_TOLERANCE
    before = load_latest(tmp_path / "run")
    assert before.step == 5
    moments = flat(straight.strategy.export_state())
    for name, value in flat(before.tensors).items():
        torch.testing.assert_close(value, moments[name], rtol=1e-4, atol=1e-6)
