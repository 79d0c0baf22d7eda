"""The demo world: a small, learnable audio-visual world of real encoded files, with captions, made in a minute."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from random import Random
from typing import NamedTuple

import torch

from vatt_engine.cpus import usable_cpus
from vatt_engine.lock import NAME, Lock

from .demo_scene import COLOURS, MOTIONS, SCENES, SHAPES, Combination, Take, draw_frames, draw_waveform
from .demo_words import write_captions
from .encode import write_media

MAX_TRAIN = 1_000_000
MAX_HELDOUT = 384  # of the 512 triples of shape, colour and motion; the others are left to train on
ANY = "any"  # a factor that is chance, and of which nothing is told
_ENCODERS = {  # options of the video and of the audio encoder: the fastest that keep textures and tones
    ".mp4": (
        {"preset": "ultrafast", "crf": "23", "threads": "1"},
        {"b": "40000", "aac_coder": "fast"},
    ),
    ".webm": (
        {"deadline": "realtime", "cpu-used": "8", "crf": "24", "b": "0", "threads": "1"},
        {"b": "32000", "compression_level": "0"},
    ),
}


class WorldSummary(NamedTuple):
    """What make_world made: both manifests, and what they hold."""

    train: Path
    heldout: Path
    num_train: int
    num_heldout: int
    num_train_combinations: int
    num_bytes: int


class _Clip(NamedTuple):
    path: str  # relative to the world's folder
    combination: Combination


def make_world(
    directory: str | os.PathLike,
    *,
    num_train: int = 2048,
    num_heldout: int = 256,
    untold: bool = False,
    seed: int = 0,
    num_threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> WorldSummary:
    """Makes the demo world: train/, heldout/, train.jsonl, heldout.jsonl and world.json (the factors of each clip).

    Each clip shows a shape of a colour that moves in one of eight ways over a scene, for 1.2 to 1.6 s of 64 x 64 pixels
    at 10 or 12 fps. Its sound has a pitch by the colour, a timbre by the shape, a rhythm by the motion and an ambience
    by the scene; seven captions say it, or something else. One file in eight is VP9 + Opus in webm, the others are
    H.264 + AAC in mp4. Every held-out clip has a triple (shape, colour, motion) of its own, which no training clip has,
    and a first caption that is a full description. The manifests' label is the motion (its place in MOTIONS).

    Args:
        directory: an empty or new folder, or a world of the same arguments, which is then completed.
        num_train: training clips, at most 1,000,000; from about 500 on, they show every value of every factor.
        num_heldout: held-out clips, at most 384, or 48 of an untold world.
        untold: colours and scenes are chance that no sound or caption tells; all sounds have one pitch, over silence or
            a whistle. What is left to learn are shapes and motions, timbres and rhythms.
        seed: the same seed makes the same clips and captions.
        num_threads: clips made at once; None: one per CPU that may be used.
        progress: called with (clips done, clips in all).

    Raises:
        ValueError: a bad count, a folder that holds something else, or in which another process is at work.

    >>> make_world("world", num_train=8, num_heldout=4).num_heldout
    4
    """
    if not 1 <= num_train <= MAX_TRAIN:
        raise ValueError(f"make_world: num_train must be in 1..{MAX_TRAIN}, got {num_train}.")
    most = MAX_HELDOUT // len(COLOURS) if untold else MAX_HELDOUT
    if not 1 <= num_heldout <= most:
        raise ValueError(f"make_world: num_heldout must be in 1..{most}, got {num_heldout}.")
    root = Path(directory)
    clips = plan_world(num_train, num_heldout, seed, untold)
    settings = {"num_train": num_train, "num_heldout": num_heldout, "seed": seed} | ({"untold": True} if untold else {})
    _check_same(root, settings)
    with Lock(root, "vatt demo-data"):
        _claim(root, settings, clips)
        rows = {}
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # the clips themselves run in parallel
        try:
            with ThreadPoolExecutor(num_threads or usable_cpus()) as pool:
                for clip, row in zip(clips, pool.map(lambda clip: _make_clip(root, clip, seed), clips)):
                    rows[clip.path] = row
                    if progress:
                        progress(len(rows), len(clips))
        finally:
            torch.set_num_threads(threads)
        manifests = {split: _write_manifest(root, split, rows) for split in ("train", "heldout")}
    return WorldSummary(
        **manifests,
        num_train=num_train,
        num_heldout=num_heldout,
        num_train_combinations=len({c.combination for c in clips if c.path.startswith("train/")}),
        num_bytes=sum((root / c.path).stat().st_size for c in clips),
    )


def plan_world(num_train: int, num_heldout: int, seed: int, untold: bool = False) -> list[_Clip]:
    """Deals the combinations: each held-out clip gets a (shape, colour, motion) of its own, training the rest."""
    rng = Random(f"{seed}/plan")
    colours, scenes = ([ANY], [ANY]) if untold else (list(COLOURS), list(SCENES))
    triples = list(product(SHAPES, colours, MOTIONS))
    rng.shuffle(triples)
    heldout = [Combination(*triple, rng.choice(scenes)) for triple in triples[:num_heldout]]
    rest = [Combination(*triple, scene) for triple in triples[num_heldout:] for scene in scenes]
    rng.shuffle(rest)
    train = [rest[i % len(rest)] for i in range(num_train)]
    return [
        _Clip(f"{split}/{i:05d}.{'webm' if rng.random() < 1 / 8 else 'mp4'}", combination)
        for split, combinations in (("train", train), ("heldout", heldout))
        for i, combination in enumerate(combinations)
    ]


def _check_same(root: Path, settings: dict) -> None:
    """Refuse a folder that is another world's or something else's."""
    world = root / "world.json"
    if root.exists() and not root.is_dir():
        raise ValueError(f"make_world: directory must be a folder, got the file '{root}'.")
    if world.exists():
        try:
            document = json.loads(world.read_text(encoding="utf-8"))
        except ValueError:
            document = None
        found = document.get("settings") if isinstance(document, dict) else "an unreadable world.json"
        if found != settings:
            raise ValueError(f"make_world: directory must hold {settings}, got {found} in '{root}'. Name another one.")
    elif root.exists() and any(path.name != NAME for path in root.iterdir()):  # a lock alone: a start that was killed
        raise ValueError(
            f"make_world: directory must be new or empty, got '{root}' with other files. Name another one."
        )


def _claim(root: Path, settings: dict, clips: list[_Clip]) -> None:
    """Makes the folder this world's, unless it has become another's meanwhile."""
    _check_same(root, settings)
    for folder in ("train", "heldout"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    factors = {clip.path: clip.combination._asdict() for clip in clips}
    _write_text(root / "world.json", json.dumps({"settings": settings, "clips": factors}, indent=0))


def _make_clip(root: Path, clip: _Clip, seed: int) -> dict:
    """Encodes one clip, unless it is there already (files appear whole or not at all); returns its manifest row."""
    rng = Random(f"{seed}/{clip.path}")
    take = Take.draw(rng)
    other = Combination(*(rng.choice(list(f)) for f in (SHAPES, COLOURS, MOTIONS, SCENES)))
    if clip.combination.colour == ANY:
        other = other._replace(colour=ANY, scene=ANY)
    captions = write_captions(clip.combination, other, take.seconds, rng)
    path = root / clip.path
    if not path.exists():
        options, audio_options = _ENCODERS[path.suffix]
        write_media(
            path,
            draw_frames(_seen(clip.combination, rng), take, rng),
            fps=take.fps,
            waveform=draw_waveform(_heard(clip.combination, rng), take, rng),
            sample_rate=take.sample_rate,
            options=options,
            audio_options=audio_options,
        )
    return {"path": clip.path, "captions": captions, "label": list(MOTIONS).index(clip.combination.motion)}


def _seen(combination: Combination, rng: Random) -> Combination:
    if combination.colour != ANY:
        return combination
    return combination._replace(colour=rng.choice(list(COLOURS)), scene=rng.choice(list(SCENES)))


def _heard(combination: Combination, rng: Random) -> Combination:
    if combination.colour != ANY:
        return combination
    return combination._replace(colour="green", scene=rng.choice(("night", "grass")))  # 600 Hz; silence or a whistle


def _write_manifest(root: Path, split: str, rows: dict[str, dict]) -> Path:
    lines = [json.dumps(row) + "\n" for path, row in rows.items() if path.startswith(f"{split}/")]
    _write_text(root / f"{split}.jsonl", "".join(lines))
    return root / f"{split}.jsonl"


def _write_text(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}-{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
