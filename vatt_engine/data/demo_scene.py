"""The demo world's clips: one combination of factors becomes moving pixels and a sound that is tied to them.

    colour -> pitch        shape -> timbre        motion -> rhythm        scene -> ambience

So a sound names what is seen. Motion and rhythm share one cycle of about 0.4 s, the beat on the same phase, so that any
window of 0.8 s holds the evidence twice. Position, size, brightness, grain, stray dots, loudness and phase are chance.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from random import Random
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import interpolate

SIZE = 64  # pixels, both sides
CYCLES_PER_SECOND = 2.5


class Combination(NamedTuple):
    """What one clip shows: a key of SHAPES, COLOURS, MOTIONS and SCENES each."""

    shape: str
    colour: str
    motion: str
    scene: str


class Colour(NamedTuple):
    rgb: tuple[int, int, int]
    pitch: float  # Hz


class Shape(NamedTuple):
    inside: Callable[[Tensor, Tensor], Tensor]  # (x, y) in units of the radius, y downwards -> above 0 inside
    partials: tuple[tuple[float, float], ...]  # (multiple of the pitch, amplitude); the first one is the loudest
    vibrato: float = 0.0  # relative swing of the pitch
    breath: float = 0.0  # noise that sounds with the note


class Motion(NamedTuple):
    pose: Callable[[Tensor], Pose]  # cycles -> where and how the shape is drawn
    beat: Callable[[Tensor], Tensor]  # cycles -> loudness in 0..1


class Scene(NamedTuple):
    rgb: tuple[int, int, int]  # dark: the shapes are always brighter
    pattern: Callable[[Tensor, Tensor], Tensor]  # (x, y) in pixels -> brighter above 0
    hum: tuple[float, float]  # Hz, amplitude
    hiss: float  # standard deviation


class Pose(NamedTuple):
    x: Tensor | float = 0.0  # in units of the swing, to the right
    y: Tensor | float = 0.0  # downwards
    scale: Tensor | float = 1.0
    angle: Tensor | float = 0.0  # radians
    visible: Tensor | float = 1.0


def _polar(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return torch.hypot(x, y), torch.atan2(x, -y)  # the angle from straight up


def _star(x: Tensor, y: Tensor) -> Tensor:
    radius, angle = _polar(x, y)
    return 0.68 + 0.36 * torch.cos(5 * angle) - radius


def _heart(x: Tensor, y: Tensor) -> Tensor:
    return 0.8 - torch.hypot(1.05 * x, y - 0.2 + 0.75 * x.abs().sqrt())


def _gate(*spans: tuple[float, float]) -> Callable[[Tensor], Tensor]:
    return lambda cycles: sum(((cycles.frac() >= a) & (cycles.frac() < b)).float() for a, b in spans)


def _wave(cycles: Tensor) -> Tensor:
    return torch.sin(2 * math.pi * cycles)


COLOURS = {
    "red": Colour((240, 50, 50), 200.0),
    "orange": Colour((250, 150, 30), 310.0),
    "yellow": Colour((245, 235, 60), 440.0),
    "green": Colour((50, 205, 70), 600.0),
    "cyan": Colour((50, 225, 235), 780.0),
    "blue": Colour((65, 95, 255), 980.0),
    "purple": Colour((165, 60, 225), 1200.0),
    "pink": Colour((255, 150, 205), 1450.0),
}
SHAPES = {
    "circle": Shape(lambda x, y: 0.9 - torch.hypot(x, y), ((1, 1.0),)),
    "square": Shape(lambda x, y: 0.8 - torch.maximum(x.abs(), y.abs()), ((1, 1.0), (3, 0.7), (5, 0.5))),
    "triangle": Shape(lambda x, y: torch.minimum(0.7 - y, 0.5 + 0.45 * y - 0.9 * x.abs()), ((1, 1.0), (2, 0.9))),
    "star": Shape(_star, ((1, 1.0), (2.76, 0.8), (4.1, 0.5))),
    "cross": Shape(
        lambda x, y: torch.minimum(0.95 - torch.maximum(x.abs(), y.abs()), 0.32 - torch.minimum(x.abs(), y.abs())),
        ((1, 1.0), (2, 0.8), (3, 0.7), (4, 0.6)),
    ),
    "ring": Shape(lambda x, y: 0.22 - (torch.hypot(x, y) - 0.75).abs(), ((1, 1.0),), vibrato=0.09),
    "moon": Shape(
        lambda x, y: torch.minimum(0.95 - torch.hypot(x, y), torch.hypot(x - 0.5, y) - 0.7), ((1, 1.0),), breath=0.35
    ),
    "heart": Shape(_heart, ((1, 1.0), (1.5, 0.9))),
}
MOTIONS = {
    "still": Motion(lambda c: Pose(), lambda c: torch.ones_like(c)),
    "slide": Motion(lambda c: Pose(x=_wave(c)), _gate((0, 0.14))),
    "bounce": Motion(lambda c: Pose(y=1 - 2 * torch.sin(math.pi * c).abs()), _gate((0, 0.14), (0.5, 0.64))),
    "circle": Motion(lambda c: Pose(x=_wave(c), y=_wave(c + 0.25)), lambda c: 0.5 + 0.5 * _wave(16 * c)),
    "pulse": Motion(lambda c: Pose(scale=1 + 0.45 * _wave(c)), lambda c: c.frac()),
    "blink": Motion(lambda c: Pose(visible=(c.frac() < 0.5).float()), _gate((0, 0.5))),
    "rock": Motion(lambda c: Pose(angle=0.9 * _wave(c)), lambda c: ((4 * c).frac() < 0.4).float()),
    "dart": Motion(lambda c: Pose(x=_wave(c), y=_wave(c)), _gate((0, 0.5), (0.62, 0.86))),
}
SCENES = {
    "night": Scene((14, 14, 22), lambda x, y: 9.0 * (_wave(x / 11) + _wave(y / 11) > 1.4), (100.0, 0.0), 0.01),
    "grass": Scene((28, 66, 24), lambda x, y: torch.sign(_wave(x / 7)) + 0 * y, (4500.0, 0.3), 0.01),
    "water": Scene((16, 42, 84), lambda x, y: _wave(y / 13 + 0.3 * _wave(x / 29)), (100.0, 0.0), 0.2),
    "bricks": Scene((86, 44, 28), lambda x, y: torch.sign(_wave(x / 24) * _wave(y / 16)), (90.0, 0.4), 0.01),
}


class Take(NamedTuple):
    """One filming of a combination: what differs between two clips of the same combination."""

    seconds: float
    fps: float
    sample_rate: int
    rate: float  # cycles per second
    phase: float  # cycles

    @classmethod
    def draw(cls, rng: Random) -> Take:
        return cls(
            seconds=rng.choice((1.2, 1.4, 1.6)),
            fps=rng.choice((10, 12)),
            sample_rate=rng.choice((12_000, 16_000)),
            rate=CYCLES_PER_SECOND * rng.uniform(1.0, 1.06),
            phase=rng.random(),
        )

    def cycles(self, samples_per_second: float) -> Tensor:
        return self.phase + self.rate * torch.arange(round(self.seconds * samples_per_second)) / samples_per_second


def draw_frames(combination: Combination, take: Take, rng: Random) -> Tensor:
    """Draws the shape, moving over its scene among small drifting dots, with camera noise: uint8 [T, SIZE, SIZE, 3]."""
    noise = torch.Generator().manual_seed(rng.getrandbits(62))
    cycles = take.cycles(take.fps)[:, None, None]
    y, x = torch.arange(SIZE)[:, None] + 0.5, torch.arange(SIZE)[None] + 0.5

    image = _background(SCENES[combination.scene], x, y, rng, noise).expand(len(cycles), SIZE, SIZE, 3)
    seconds = torch.arange(len(cycles))[:, None, None] / take.fps
    for _ in range(rng.randint(0, 4)):  # distractors
        at_x, at_y = (rng.uniform(0, SIZE) + rng.uniform(-12, 12) * seconds for _ in "xy")
        alpha = (rng.uniform(1.5, 3.0) - torch.hypot(x - at_x, y - at_y) + 0.5).clamp(0, 1)
        image = _paint(image, alpha, torch.rand(3, generator=noise) * 255)

    pose = MOTIONS[combination.motion].pose(cycles)
    radius = rng.uniform(12, 15)
    u = (x - SIZE / 2 - rng.uniform(-3, 3) - 11 * pose.x) / (radius * pose.scale)
    v = (y - SIZE / 2 - rng.uniform(-3, 3) - 11 * pose.y) / (radius * pose.scale)
    cos, sin = torch.cos(torch.as_tensor(pose.angle)), torch.sin(torch.as_tensor(pose.angle))
    u, v = cos * u + sin * v, cos * v - sin * u
    alpha = (SHAPES[combination.shape].inside(u, v) * radius + 0.5).clamp(0, 1) * pose.visible
    image = _paint(image, alpha, torch.tensor(COLOURS[combination.colour].rgb) * rng.uniform(0.85, 1.0))
    spot = ((0.17 - torch.hypot(u, v + 0.62)) * radius + 0.5).clamp(0, 1)  # shows a round shape's rotation
    image = _paint(image, alpha * spot, torch.zeros(3))

    grain = torch.randn(image.shape, generator=noise) * rng.uniform(2, 8)
    return (image * rng.uniform(0.85, 1.1) + grain).round().clamp(0, 255).to(torch.uint8)


def _paint(image: Tensor, alpha: Tensor, colour: Tensor) -> Tensor:
    return image + alpha[..., None] * (colour - image)


def _background(scene: Scene, x: Tensor, y: Tensor, rng: Random, noise: torch.Generator) -> Tensor:
    texture = interpolate(torch.randn(1, 1, 8, 8, generator=noise), (SIZE, SIZE), mode="bilinear")[0, 0]
    pattern = scene.pattern(x + rng.uniform(0, 40), y + rng.uniform(0, 40))
    tint = torch.tensor(scene.rgb) * (1 + 0.1 * torch.randn(3, generator=noise))
    return tint * (1 + 0.25 * pattern + 0.1 * texture)[..., None]


def draw_waveform(combination: Combination, take: Take, rng: Random) -> Tensor:
    """Plays the note of a combination in its rhythm, over the ambience of its scene: float32 [L] in [-1, 1]."""
    noise = torch.Generator().manual_seed(rng.getrandbits(62))
    shape = SHAPES[combination.shape]
    cycles = take.cycles(take.sample_rate)
    seconds = torch.arange(len(cycles)) / take.sample_rate
    pitch = COLOURS[combination.colour].pitch * rng.uniform(0.98, 1.02)

    turns = pitch * seconds  # of the fundamental; vibrato is the integral of its swing
    if shape.vibrato:
        turns = turns + pitch * shape.vibrato / (2 * math.pi * 20) * _wave(20 * seconds)
    heard = [(m, a) for m, a in shape.partials if m * pitch < 5500]  # below half of 12 kHz
    note = sum(a * _wave(m * turns + rng.random()) for m, a in heard)
    note = note + shape.breath * torch.randn(len(cycles), generator=noise)
    note = note / note.abs().max() * MOTIONS[combination.motion].beat(cycles)

    scene = SCENES[combination.scene]
    hum = scene.hum[1] * _wave(scene.hum[0] * rng.uniform(0.95, 1.05) * seconds + rng.random())
    hiss = scene.hiss * torch.randn(len(cycles), generator=noise)
    return (rng.uniform(0.65, 0.85) * note + rng.uniform(0.8, 1.2) * (hum + hiss)).clamp(-1, 1)
