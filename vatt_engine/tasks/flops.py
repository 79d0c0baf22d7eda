"""`vatt flops MODEL`: parameters and GFLOPs by module; without a model, every FLOP figure of the paper beside ours."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vatt_engine.analysis.flops import ModelConfig, module_flops, paper_cells
from vatt_engine.analysis.report import table
from vatt_engine.models import model_config
from vatt_engine.tasks.flags import parse_flags


@dataclass(frozen=True, kw_only=True)
class FlopsConfig:
    """Parameters and GFLOPs of one clip by module, by a true count and by the paper's; see docs/flops.md.

    Args:
        model: name of a model; "" compares the paper's Tables 1, 5 and 6 with ours.
        keep_rate: share of picture and sound tokens that training keeps; None for the model's own.
        num_frames: of a clip; None for the model's own.
        frame_size: height and width of a frame; None for the model's own.
        candidates: sentences per clip.
        json: print JSON, in FLOPs.
    """

    model: str = ""
    keep_rate: float | None = None
    num_frames: int | None = None
    frame_size: int | None = None
    candidates: int = 5
    json: bool = False

    def __post_init__(self) -> None:
        if self.candidates < 1:
            raise ValueError(f"FlopsConfig: candidates must be at least 1, got {self.candidates}.")


def main(argv: Sequence[str]) -> int:
    config = parse_flags(FlopsConfig, argv, prog="vatt flops", positional=("model",))
    if not config.model:
        print(json.dumps([cell._asdict() for cell in paper_cells()], indent=1) if config.json else paper_table())
        return 0
    found = count(config)
    print(json.dumps(found, indent=1) if config.json else part_table(found))
    return 0


def count(config: FlopsConfig) -> dict[str, Any]:
    """{"model", "parts": [{"part", "parameters", "forward", "backward", "paper", "evaluation", "paper evaluation"}]},
    in FLOPs per clip; "forward", "backward" and "paper" are those of training.

    Raises:
        ValueError: no such model, or a size it cannot have.

    >>> count(FlopsConfig(model="vit_base"))["parts"][0]["part"]
    'video stem'
    """
    model = named_model(config)
    trained = module_flops(model, candidates=config.candidates)
    evaluated = module_flops(model, candidates=config.candidates, training=False)
    parts = []
    for train, test in zip(trained, evaluated):
        values = train._asdict()
        parts.append(
            {"part": values.pop("name")} | values | {"evaluation": test.forward, "paper evaluation": test.paper}
        )
    return {"model": config.model, "parts": parts}


def named_model(config: FlopsConfig) -> ModelConfig:
    """The model's config with the sizes that flags ask for."""
    changes: dict[str, Any] = {}
    if config.keep_rate is not None:
        changes |= {f"{modality}.drop_token.keep_rate": config.keep_rate for modality in ("video", "audio")}
    if config.num_frames is not None:
        changes["video.num_frames"] = config.num_frames
    if config.frame_size is not None:
        changes["video.frame_size"] = (config.frame_size, config.frame_size)
    return model_config(config.model.replace("-", "_"), **changes)


def part_table(found: dict[str, Any]) -> str:
    rows = [{key: part[key] for key in part if key != "part"} for part in found["parts"]]
    total = {key: sum(row[key] for row in rows) for key in rows[0]}
    lines = []
    for name, row in zip([*(part["part"] for part in found["parts"]), "sum"], [*rows, total]):
        scaled = {key: value / 1e9 for key, value in row.items() if key != "parameters"}
        lines.append({"part": name, "M parameters": row["parameters"] / 1e6} | scaled)
    notes = "GFLOPs per clip, 2 x multiply-adds; forward, backward: training, on the tokens that DropToken keeps;"
    return f"{table(lines)}\n{notes}\npaper: a forward pass by the count of the paper's tables."


def paper_table() -> str:
    rows = []
    for cell in paper_cells():
        clip = f"{cell.frames} x {cell.size}^2" + (f", {cell.views} views" if cell.views > 1 else "")
        off = f"{100 * (cell.reproduced / cell.paper - 1):+.2f} %"
        rows.append(
            {"table": cell.table, "model": cell.model, "clip": clip, "dropped %": round(100 * (1 - cell.keep_rate))}
            | {"paper": cell.paper, "its count here": cell.reproduced, "off": off, "true": cell.true}
        )
    return f"{table(rows)}\nGFLOPs of a forward pass; the paper's count leaves out q k^T, true is 2 x multiply-adds."
