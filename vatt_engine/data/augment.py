"""Random crops, flips, colours and noise of one clip, the same for all its frames; all from one torch.Generator."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.utils.dlpack import to_dlpack

from vatt_engine.dispatch import native_missing

OFFICIAL_NOISE = 0.01  # audio_noise of official vatt/configs, for pre-training and fine-tuning


@dataclass(frozen=True, kw_only=True, slots=True)
class AugmentConfig:
    """Which augmentations training uses; the defaults are the official code's (DMVR processors).

    Args:
        crop: "vgg" (official) stretches the clip at random, then takes the largest square that fits, at a random
            place; "inception" (the paper, A.2.1) takes a random box and resizes it to a square; "none" takes the
            centre square.
        scale_jitter: probability that "vgg" stretches.
        scale: range of the two factors, of the height and of the width.
        area: range of the share of the frame that an "inception" box covers; the official code's min_object_covered
            raises the paper's 0.08 to 0.1 in effect.
        aspect: range of an "inception" box' width over height.
        flip: probability of a left-right mirror.
        color_jitter: probability of the four colour changes below.
        brightness: largest amount added or taken, in 0..1 colours.
        saturation: range of the factor on the saturation.
        contrast: range of the factor on the distance from each frame's mean colour.
        hue: largest turn of the hue, in whole turns.
        audio_noise: standard deviation of the noise added to a waveform, relative to the waveform's peak. None is the
            official 0.01; the tasks take it as 0 for a tower that sees a spectrogram, see `docs/tasks.md`.

    Raises:
        ValueError: a value is out of its range.

    >>> AugmentConfig(crop="inception").area
    (0.08, 1.0)
    """

    crop: Literal["vgg", "inception", "none"] = "vgg"
    scale_jitter: float = 0.8
    scale: tuple[float, float] = (0.8, 1.2)
    area: tuple[float, float] = (0.08, 1.0)
    aspect: tuple[float, float] = (0.5, 2.0)
    flip: float = 0.5
    color_jitter: float = 0.8
    brightness: float = 32 / 255
    saturation: tuple[float, float] = (0.6, 1.4)
    contrast: tuple[float, float] = (0.6, 1.4)
    hue: float = 0.2
    audio_noise: float | None = None

    def __post_init__(self) -> None:
        if self.crop not in ("vgg", "inception", "none"):
            raise ValueError(f"augment: crop must be vgg, inception or none, got {self.crop!r}.")
        for name in ("scale_jitter", "flip", "color_jitter"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"augment: {name} must be a probability in [0, 1], got {getattr(self, name)}.")
        for name, lowest, highest in (
            ("scale", 1e-3, math.inf),
            ("area", 1e-6, 1),
            ("aspect", 1e-3, math.inf),
            ("saturation", 0, math.inf),
            ("contrast", 0, math.inf),
        ):
            value = getattr(self, name)
            if len(value) != 2 or not lowest <= value[0] <= value[1] <= highest or math.isinf(value[1]):
                raise ValueError(f"augment: {name} must be a rising range within [{lowest}, {highest}], got {value}.")
        for name, highest in (("brightness", 1), ("hue", 0.5), ("audio_noise", math.inf)):
            value = getattr(self, name)
            if value is not None and (not 0 <= value <= highest or math.isinf(value)):
                raise ValueError(f"augment: {name} must be in [0, {highest}], got {value}.")


def augment_video(frames: Tensor, size: int, config: AugmentConfig, generator: torch.Generator) -> Tensor:
    """A random square view of a clip: crop and resize, then mirror, then colours; one choice for all frames.

    The box is cut out of the source at whole pixels and resized once, which equals the official order (resize, then
    crop) up to a fraction of a source pixel. Colours are changed in the official order - brightness, saturation,
    contrast, hue - in float32, and clipped once at the end. The same state of the generator gives the same view; it
    advances alike whichever stages are on, except for "inception" boxes.

    Args:
        frames: [T, H, W, 3], uint8, on any device.
        size: side of the result in pixels.
        config: what to do and how strongly.
        generator: a CPU generator.

    Returns:
        [T, size, size, 3], uint8, contiguous; never a view of `frames`' memory.

    Raises:
        ValueError: `frames` or `size` is not as above.

    Source: paper A.2.1; DMVR processors.py (scale_jitter_augm, color_default_augm).

    >>> frames = torch.zeros(8, 64, 80, 3, dtype=torch.uint8)
    >>> augment_video(frames, 48, AugmentConfig(), torch.Generator().manual_seed(0)).shape
    torch.Size([8, 48, 48, 3])
    """
    _check_frames(frames, size)
    draw = torch.rand(11, generator=generator, dtype=torch.float64).tolist()
    height, width = frames.shape[1:3]
    if config.crop == "vgg":
        box = _vgg_box(height, width, config, draw[:5])
    elif config.crop == "inception":
        box = _inception_box(height, width, config, generator)
    else:
        box = _center_box(height, width)
    view = _resize_box(frames, box, size)
    if draw[5] < config.flip:
        view = view.flip(2)
    if draw[6] < config.color_jitter:
        view = _jitter_color(view, config, draw[7:])
    return view


def center_crop(frames: Tensor, size: int) -> Tensor:
    """The centre square of a clip for evaluation: shortest side to `size`, then the middle of the other side.

    Bilinear with antialiasing, so that large frames do not alias; the official pipeline samples without it, which is
    the same where a frame is enlarged and close where it is a little larger than `size`, as its stored clips are.

    Args:
        frames: [T, H, W, 3], uint8.
        size: side of the result in pixels.

    Returns:
        [T, size, size, 3], uint8, contiguous.

    Raises:
        ValueError: `frames` or `size` is not as above.

    >>> center_crop(torch.zeros(8, 64, 80, 3, dtype=torch.uint8), 48).shape
    torch.Size([8, 48, 48, 3])
    """
    return side_crop(frames, size)


def side_crop(frames: Tensor, size: int, index: int = 0, count: int = 1) -> Tensor:
    """Square `index` of `count` that stand evenly along the long side, from its start to its end; 1: the centre.

    Arguments, result, errors and scaling as center_crop (official: 3 squares in the evaluation of fine-tuned models).

    >>> wide = torch.arange(80, dtype=torch.uint8).expand(2, 48, 80)[..., None].expand(2, 48, 80, 3)
    >>> [side_crop(wide, 48, index, 3)[0, 0, 0, 0].item() for index in range(3)]
    [0, 16, 32]
    """
    _check_frames(frames, size)
    height, width = frames.shape[1:3]
    top, left, side, _ = _center_box(height, width)
    if count > 1:
        top, left = ((length - side) * index // (count - 1) for length in (height, width))
    return _resize_box(frames, (top, left, side, side), size)


def augment_audio(wave: Tensor, config: AugmentConfig, generator: torch.Generator) -> Tensor:
    """A waveform with Gaussian noise: x + audio_noise * max|x| * N(0, 1); not clipped, as in the official code.

    Args:
        wave: [L], float32, on any device.
        config: `audio_noise` is used.
        generator: a CPU generator.

    Raises:
        ValueError: `wave` is not float [L].

    Source: official vatt/data/processing.py (add_gaussian); not in the paper.

    >>> augment_audio(torch.zeros(4), AugmentConfig(), torch.Generator())
    tensor([0., 0., 0., 0.])
    """
    if wave.ndim != 1 or not wave.is_floating_point():
        raise ValueError(f"augment_audio: wave must be float [L], got {wave.dtype} {list(wave.shape)}.")
    strength = OFFICIAL_NOISE if config.audio_noise is None else config.audio_noise
    if strength == 0 or not len(wave):
        return wave.clone()
    noise = torch.randn(len(wave), generator=generator, dtype=wave.dtype).to(wave.device)
    return noise.mul_(wave.abs().max() * strength).add_(wave)


def adjust_saturation(rgb: Tensor, factor: float) -> Tensor:
    """Multiply the HSV saturation of [3, ...] colours, at most to 1; hue and value (the largest channel) stay.

        s = (max - min) / max;   x -> max - (max - x) * clip(s * factor, 0, 1) / s

    Colours may lie outside 0..1 and have any scale; where max <= 0 the saturation counts as 0, as in
    `tf.image.adjust_saturation`.
    """
    high, low = _extremes(rgb)
    # clip(s * factor, 0, 1) / s = min(factor, 1 / s); a grey pixel has 1 / s = inf or nan and no difference to scale.
    ratio = (high / (high - low)).nan_to_num_(0.0, posinf=factor).clamp_(0.0, factor)
    return (high - rgb).mul_(ratio).neg_().add_(high)


def adjust_contrast(rgb: Tensor, factor: float) -> Tensor:
    """Scale the distance from the mean of each channel of each frame: (x - mean) * factor + mean, for [3, T, H, W]."""
    mean = rgb.mean((-2, -1), keepdim=True)
    return torch.lerp(mean, rgb, factor)


def adjust_hue(rgb: Tensor, turn: float) -> Tensor:
    """Turn the HSV hue of [3, ...] colours by a part of a whole turn; the largest and smallest channel values stay.

    With the hue h in sixths of a turn, red is full for |h| <= 1, none for |h| >= 2 and linear between; green and blue
    are the same around h = 2 and h = 4. Colours may have any scale (`tf.image.adjust_hue`).
    """
    red, green, blue = rgb
    high, low = _extremes(rgb)
    span = high - low
    scale = torch.where(span > 0, span, 1.0).reciprocal_()
    hue = (red - green).mul_(scale).add_(4.0)
    hue = torch.where(high == green, (blue - red).mul_(scale).add_(2.0), hue)
    hue = torch.where(high == red, (green - blue).mul_(scale), hue)
    hue = hue.add_(6.0 * turn)
    hue = hue.sub_((hue / 6.0).floor_().mul_(6.0))  # modulo 6; torch.remainder takes four times as long
    turned = torch.empty_like(rgb)
    torch.sub(hue, 3.0, out=turned[0]).abs_().sub_(1.0)
    torch.sub(hue, 2.0, out=turned[1]).abs_().neg_().add_(2.0)
    torch.sub(hue, 4.0, out=turned[2]).abs_().neg_().add_(2.0)
    return turned.clamp_(0.0, 1.0).mul_(span).add_(low)


def _extremes(rgb: Tensor) -> tuple[Tensor, Tensor]:
    red, green, blue = rgb
    return torch.maximum(torch.maximum(red, green), blue), torch.minimum(torch.minimum(red, green), blue)


def change_colors(rgb: Tensor, brightness: float, saturation: float, contrast: float, hue: float) -> Tensor:
    """The four changes of colours [3, T, H, W] of scale 0..255, one after the other, neither rounded nor clipped.

    `brightness` is added, in 0..1 colours; `saturation` and `contrast` are factors; `hue` is a part of a turn.
    """
    rgb = rgb + 255 * brightness
    if saturation != 1:
        rgb = adjust_saturation(rgb, saturation)
    if contrast != 1:
        rgb = adjust_contrast(rgb, contrast)
    return adjust_hue(rgb, hue) if hue else rgb


def _jitter_color(frames: Tensor, config: AugmentConfig, draw: list[float]) -> Tensor:
    """Colours of [T, H, W, 3] uint8 changed; on a CPU by the native module, in place."""
    change = (
        _between(draw[0], (-config.brightness, config.brightness)),
        _between(draw[1], config.saturation),
        _between(draw[2], config.contrast),
        _between(draw[3], (-config.hue, config.hue)),
    )
    if frames.device.type == "cpu" and native_missing() is None:
        from vatt_engine import _C

        _C.color_jitter(to_dlpack(frames), *change)
        return frames
    rgb = frames.permute(3, 0, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    return torch.stack(change_colors(rgb, *change).round_().clamp_(0.0, 255.0).to(torch.uint8).unbind(), dim=-1)


def _vgg_box(height: int, width: int, config: AugmentConfig, draw: list[float]) -> tuple[int, int, int, int]:
    """Top, left, height, width of the source pixels that fill a square of the stretched clip's shortest side."""
    tall, wide = 1.0, 1.0
    if draw[0] < config.scale_jitter:
        tall, wide = _between(draw[1], config.scale), _between(draw[2], config.scale)
    side = min(height * tall, width * wide)
    box_height, box_width = max(1, round(side / tall)), max(1, round(side / wide))
    return _place(height, width, box_height, box_width, draw[3:])


def _inception_box(height: int, width: int, config: AugmentConfig, generator: torch.Generator):
    """A box as `tf.image.sample_distorted_bounding_box` draws it: aspect, then height, then place, all uniform."""
    for _ in range(100):
        draw = torch.rand(4, generator=generator, dtype=torch.float64).tolist()
        aspect = _between(draw[0], config.aspect)
        smallest, largest = (math.sqrt(share * height * width / aspect) for share in config.area)
        largest = min(largest, height, width / aspect)
        if smallest > largest:
            continue  # no box of this aspect is large enough and inside
        box_height = _between(draw[1], (smallest, largest))
        rounded = max(1, round(box_height)), min(width, max(1, round(box_height * aspect)))
        return _place(height, width, *rounded, draw[2:])
    return 0, 0, height, width


def _place(height: int, width: int, box_height: int, box_width: int, draw: list[float]) -> tuple[int, int, int, int]:
    return int(draw[0] * (height - box_height + 1)), int(draw[1] * (width - box_width + 1)), box_height, box_width


def _center_box(height: int, width: int) -> tuple[int, int, int, int]:
    side = min(height, width)
    return (height - side) // 2, (width - side) // 2, side, side


def _resize_box(frames: Tensor, box: tuple[int, int, int, int], size: int) -> Tensor:
    top, left, height, width = box
    view = frames[:, top : top + height, left : left + width]
    if (height, width) == (size, size):
        return view.clone(memory_format=torch.contiguous_format)
    view = view.permute(0, 3, 1, 2)
    if view.device.type != "cpu":  # PyTorch resizes bytes on the CPU alone
        view = view.float()
    resized = torch.nn.functional.interpolate(view, (size, size), mode="bilinear", antialias=True, align_corners=False)
    if resized.is_floating_point():
        resized = resized.round_().to(torch.uint8)
    return resized.permute(0, 2, 3, 1).contiguous()


def _between(draw: float, bounds: tuple[float, float]) -> float:
    return bounds[0] + draw * (bounds[1] - bounds[0])


def _check_frames(frames: Tensor, size: int) -> None:
    if frames.dtype != torch.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or 0 in frames.shape:
        raise ValueError(f"augment: frames must be uint8 [T, H, W, 3], got {frames.dtype} {list(frames.shape)}.")
    if size < 1:
        raise ValueError(f"augment: size must be at least 1, got {size}.")
