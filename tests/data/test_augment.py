import colorsys
import math

import pytest
import torch
from torch.utils.dlpack import to_dlpack

from vatt_engine import _C
from vatt_engine.data.augment import (
    AugmentConfig,
    _inception_box,
    _vgg_box,
    adjust_contrast,
    adjust_hue,
    adjust_saturation,
    augment_audio,
    augment_video,
    center_crop,
    change_colors,
)
from vatt_engine.testing import Sum, error_budget

STILL = AugmentConfig(crop="none", flip=0, color_jitter=0)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def clip(*shape, seed=0):
    return torch.randint(0, 256, (*shape, 3), generator=seeded(seed), dtype=torch.uint8)


def smooth_clip(frames, height, width):
    """Colours that rise to the right (red), downwards (green) and with time (blue), so a place can be read off."""
    red = torch.linspace(0, 255, width).expand(frames, height, width)
    green = torch.linspace(0, 255, height)[:, None].expand(frames, height, width)
    blue = torch.linspace(0, 255, frames)[:, None, None].expand(frames, height, width)
    return torch.stack([red, green, blue], -1).round().to(torch.uint8)


def colors(count=400, low=0.0, high=1.0):
    """Random colours with greys, black, white, primaries and ties of two channels: [3, count], float64."""
    special = torch.tensor([[a, b, c] for a in (0, 0.5, 1) for b in (0, 0.5, 1) for c in (0, 0.5, 1)]).double()
    return torch.cat([special, torch.rand(count, 3, generator=seeded(), dtype=torch.float64)]).T * (high - low) + low


@pytest.mark.parametrize("turn", [-0.2, -0.03, 0.0, 0.1, 0.2, 0.5])
def test_hue_matches_colorsys(turn):
    rgb = colors()
    expected = []
    for color in rgb.T.tolist():
        hue, saturation, value = colorsys.rgb_to_hsv(*color)
        expected.append(colorsys.hsv_to_rgb((hue + turn) % 1.0, saturation, value))
    expected = torch.tensor(expected, dtype=torch.float64).T
    torch.testing.assert_close(adjust_hue(rgb, turn), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(adjust_hue(rgb.float() * 255, turn) / 255, expected.float(), rtol=0, atol=4e-6)


@pytest.mark.parametrize("factor", [0.0, 0.6, 1.0, 1.4, 50.0])
def test_saturation_matches_colorsys(factor):
    rgb = colors()
    expected = []
    for color in rgb.T.tolist():
        hue, saturation, value = colorsys.rgb_to_hsv(*color)
        expected.append(colorsys.hsv_to_rgb(hue, min(1.0, saturation * factor), value))
    expected = torch.tensor(expected, dtype=torch.float64).T
    torch.testing.assert_close(adjust_saturation(rgb, factor), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(adjust_saturation(rgb.float() * 255, factor) / 255, expected.float(), rtol=0, atol=4e-6)


@pytest.mark.parametrize("factor", [0.6, 1.4])
def test_saturation_outside_the_unit_range_follows_tensorflow(factor):
    """Brightness takes colours out of 0..1; s = (max - min) / max goes on to hold there, clipped once scaled."""
    rgb = colors(low=-0.15, high=1.15)
    expected = []
    for color in rgb.T.tolist():
        high, span = max(color), max(color) - min(color)
        saturation = span / high if high > 0 else 0.0
        wanted = min(1.0, max(0.0, saturation * factor))
        scale = high * wanted / span if span > 0 else 0.0
        expected.append([high - (high - channel) * scale for channel in color])
    expected = torch.tensor(expected, dtype=torch.float64).T
    torch.testing.assert_close(adjust_saturation(rgb, factor), expected, rtol=0, atol=1e-12)


def test_contrast_uses_each_frames_own_channel_means():
    rgb = torch.rand(3, 4, 5, 6, generator=seeded(), dtype=torch.float64)
    changed = adjust_contrast(rgb, 1.3)
    for channel in range(3):
        for frame in range(4):
            plane = rgb[channel, frame]
            mean = sum(plane.flatten().tolist()) / plane.numel()
            torch.testing.assert_close(changed[channel, frame], (plane - mean) * 1.3 + mean)


def test_colour_stage_is_brightness_saturation_contrast_hue_then_clip():
    frames = clip(3, 8, 8)
    fixed = {"brightness": 0.0, "saturation": (1.0, 1.0), "contrast": (1.0, 1.0), "hue": 0.0}
    still = AugmentConfig(crop="none", flip=0, color_jitter=1, **fixed)
    assert torch.equal(augment_video(frames, 8, still, seeded()), frames)

    # With ranges of one point the parameters are known; brightness is the one drawn, the same draw in both configs.
    strong = {"saturation": (1.4, 1.4), "contrast": (1.3, 1.3), "hue": 0.0, "brightness": 0.2}
    config = AugmentConfig(crop="none", flip=0, color_jitter=1, **strong)
    grey = torch.full((1, 8, 8, 3), 100, dtype=torch.uint8)
    delta = augment_video(grey, 8, config, seeded(5))[0, 0, 0, 0].item() - 100
    assert 1 <= abs(delta) <= 51
    rgb = adjust_saturation(frames.permute(3, 0, 1, 2).double() + delta, 1.4)
    expected = adjust_contrast(rgb, 1.3).clamp(0, 255).permute(1, 2, 3, 0)
    result = augment_video(frames, 8, config, seeded(5)).double()
    assert (result - expected).abs().max() < 2.5  # delta is known to half a level, times 1.4 and 1.3, and rounding


def test_same_colours_and_box_for_all_frames():
    frames = clip(1, 40, 50).expand(6, -1, -1, -1)
    for seed in range(10):
        for crop in ("vgg", "inception"):
            view = augment_video(frames, 24, AugmentConfig(crop=crop, color_jitter=1), seeded(seed))
            assert torch.equal(view, view[:1].expand_as(view))


CHANGES = [
    (0.1, 1.3, 0.7, 0.13),
    (-32 / 255, 0.6, 1.4, -0.2),
    (1.0, 1.4, 1.4, 0.5),
    (-1.0, 0.0, 0.0, -0.5),
    (0.0, 50.0, 1.0, 0.0),
    (0.0, 1.0, 1.3, 0.0),
    (0.0, 1.0, 1.0, 1e-6),
]


def in_colors(frames, change, dtype):
    return change_colors(frames.permute(3, 0, 1, 2).to(dtype), *change).permute(1, 2, 3, 0)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 7, 13), (2, 16, 32), (2, 31, 33), (1, 224, 224)])
def test_native_colours_are_those_of_float64(shape, change):
    """Half a level, and what float32 costs PyTorch: greys, primaries and ties among them."""
    frames = clip(*shape)
    special = colors(0).T.mul(255).round().to(torch.uint8)
    frames.view(-1, 3)[: len(special)] = special[: frames.numel() // 3]
    exact, single = (in_colors(frames, change, dtype).clamp(0, 255) for dtype in (torch.float64, torch.float32))
    native = frames.clone()
    _C.color_jitter(to_dlpack(native), *change)
    mean = Sum(shape[1] * shape[2], 255.0)  # of a frame, from which contrast is the distance
    assert (native - exact).abs().max() <= 0.5 + error_budget(single, exact, mean)


def test_colours_without_the_native_module(monkeypatch):
    """PyTorch alone gives the same view, but for colours that lie halfway between two levels."""
    config = AugmentConfig(crop="none", flip=0, color_jitter=1)
    native = augment_video(clip(5, 200, 200), 200, config, seeded(3)).int()
    monkeypatch.setattr("vatt_engine.data.augment.native_missing", lambda: "not built")
    view = augment_video(clip(5, 200, 200), 200, config, seeded(3)).int()
    assert (view - native).abs().max() <= 1
    assert (view != native).float().mean() < 1e-4


def test_every_frame_of_a_clip_is_coloured_as_it_would_be_alone():
    frames = clip(5, 200, 200)
    config = AugmentConfig(crop="none", flip=0, color_jitter=1)
    together = augment_video(frames, 200, config, seeded(3))
    singly = [augment_video(frame[None], 200, config, seeded(3)) for frame in frames]
    assert torch.equal(together, torch.cat(singly))


@pytest.mark.parametrize(
    "frames", [clip(2, 4, 4).float(), clip(2, 4, 4)[..., :2], clip(2, 4, 4).transpose(1, 2), clip(4, 4)]
)
def test_native_colours_refuse_what_is_no_clip(frames):
    with pytest.raises(ValueError, match=r"color_jitter: frames must be contiguous uint8 \[T, H, W, 3\] on the cpu"):
        _C.color_jitter(to_dlpack(frames), 0, 1, 1, 0)


def test_flip_mirrors_left_and_right():
    frames = clip(2, 16, 16)
    always = AugmentConfig(crop="none", flip=1, color_jitter=0)
    assert torch.equal(augment_video(frames, 16, always, seeded()), frames.flip(2))
    config = AugmentConfig(crop="none", flip=0.3, color_jitter=0)
    generator = seeded()
    flipped = sum(torch.equal(augment_video(frames, 16, config, generator), frames.flip(2)) for _ in range(1_000))
    assert 300 - 4 * 15 < flipped < 300 + 4 * 15  # four standard deviations of the binomial


@pytest.mark.parametrize("crop", ["vgg", "inception", "none"])
def test_same_generator_same_view_and_input_is_untouched(crop):
    frames = clip(4, 30, 40)
    before = frames.clone()
    config = AugmentConfig(crop=crop)
    views = [augment_video(frames, 24, config, seeded(seed)) for seed in (1, 1, 2)]
    assert torch.equal(views[0], views[1])
    assert not torch.equal(views[0], views[2])
    assert torch.equal(frames, before)
    for view in views:
        assert view.shape == (4, 24, 24, 3)
        assert view.dtype == torch.uint8
        assert view.is_contiguous()
        assert view.data_ptr() != frames.data_ptr()


def test_stages_draw_their_own_numbers():
    """Switching one stage off leaves the others as they were, so ablations compare like with like."""
    frames = smooth_clip(2, 60, 80)
    with_color = AugmentConfig(color_jitter=1, brightness=0, saturation=(1, 1), contrast=(1, 1), hue=0)
    without = AugmentConfig(color_jitter=0)
    generators = seeded(7), seeded(7)
    for _ in range(5):
        views = [augment_video(frames, 32, c, g) for c, g in zip((with_color, without), generators)]
        assert torch.equal(*views)


def test_result_never_shares_memory_with_its_source():
    frames = clip(2, 16, 16)
    view = augment_video(frames, 16, STILL, seeded())
    assert torch.equal(view, frames)
    view.zero_()
    assert frames.any()
    crop = center_crop(frames, 16)
    crop.zero_()
    assert frames.any()


@pytest.mark.parametrize("shape", [(64, 64), (48, 200), (200, 48), (1, 1), (3, 1000)])
def test_vgg_boxes_stay_inside_and_are_squares_of_the_stretched_clip(shape):
    height, width = shape
    config, generator = AugmentConfig(scale_jitter=1), seeded()
    low, high = config.scale
    tops, lefts = [], []
    for _ in range(2_000):
        draw = torch.rand(5, generator=generator, dtype=torch.float64).tolist()
        top, left, box_height, box_width = _vgg_box(height, width, config, draw)
        assert top >= 0
        assert left >= 0
        assert box_height >= 1
        assert box_width >= 1
        assert top + box_height <= height
        assert left + box_width <= width
        assert box_height == height or box_width == width  # the stretched clip's shortest side is used whole
        tall, wide = (low + draw[i] * (high - low) for i in (1, 2))
        assert abs(box_height * tall - box_width * wide) <= 0.5 * (tall + wide) or min(shape) == 1
        tops.append(top / max(1, height - box_height))
        lefts.append(left / max(1, width - box_width))
    if max(shape) > 100 and min(shape) > 1:
        places = tops if height > width else lefts
        assert sum(places) / len(places) == pytest.approx(0.5, abs=0.03)
        assert min(places) < 0.02
        assert max(places) > 0.98


def test_vgg_without_jitter_takes_the_whole_short_side():
    draw = [0.9, 0.3, 0.7, 0.5, 0.5]  # 0.9 is above the probability
    assert _vgg_box(40, 60, AugmentConfig(scale_jitter=0.8), draw) == (0, 10, 40, 40)
    assert _vgg_box(40, 60, AugmentConfig(scale_jitter=1.0), draw) == (0, 13, 40, round(40 * 0.92 / 1.08))


def test_inception_boxes_keep_area_aspect_and_bounds():
    config, generator = AugmentConfig(crop="inception"), seeded()
    height, width = 240, 320
    areas, aspects, tops = [], [], []
    for _ in range(3_000):
        top, left, box_height, box_width = _inception_box(height, width, config, generator)
        assert top >= 0
        assert left >= 0
        assert top + box_height <= height
        assert left + box_width <= width
        areas.append(box_height * box_width / (height * width))
        aspects.append(box_width / box_height)
        tops.append(top / max(1, height - box_height))
    slack = 1 / 60  # half a pixel of the smallest side
    assert min(areas) > 0.08 * (1 - slack)
    assert max(areas) <= 1.0
    assert min(areas) < 0.09
    assert max(areas) > 0.85
    assert min(aspects) > 0.5 * (1 - slack)
    assert max(aspects) < 2.0 * (1 + slack)
    assert min(aspects) < 0.52
    assert max(aspects) > 1.9
    assert sum(tops) / len(tops) == pytest.approx(0.5, abs=0.03)
    assert 0.30 < sum(areas) / len(areas) < 0.45


def test_inception_takes_the_frame_where_no_box_fits():
    assert _inception_box(10, 1000, AugmentConfig(crop="inception", area=(0.5, 1.0)), seeded()) == (0, 0, 10, 1000)
    assert _inception_box(1, 1, AugmentConfig(crop="inception"), seeded()) == (0, 0, 1, 1)


def test_crop_cuts_out_the_box_it_says():
    """On a clip whose colours are its coordinates the view's corner colours give the box back."""
    frames = smooth_clip(2, 256, 256)
    config = AugmentConfig(flip=0, color_jitter=0, scale_jitter=1)
    for seed in range(20):
        draw = torch.rand(11, generator=seeded(seed), dtype=torch.float64).tolist()
        top, left, height, width = _vgg_box(256, 256, config, draw[:5])
        view = augment_video(frames, 64, config, seeded(seed)).float()
        corner, opposite = view[0, 0, 0], view[0, -1, -1]
        edge_y, edge_x = height / 64 / 2 - 0.5, width / 64 / 2 - 0.5  # centre of the first output pixel
        assert corner[0] == pytest.approx(left + edge_x, abs=1)
        assert corner[1] == pytest.approx(top + edge_y, abs=1)
        assert opposite[0] == pytest.approx(left + width - 1 - edge_x, abs=1)
        assert opposite[1] == pytest.approx(top + height - 1 - edge_y, abs=1)
        assert view[..., 2].unique().tolist() == [0, 255]


def test_resize_is_bilinear():
    frames = torch.tensor([[0, 100], [100, 200]], dtype=torch.uint8)[None, :, :, None].expand(1, 2, 2, 3)
    enlarged = center_crop(frames, 4)[0, ..., 0]
    assert enlarged.tolist() == [[0, 25, 75, 100], [25, 50, 100, 125], [75, 100, 150, 175], [100, 125, 175, 200]]
    stripes = torch.zeros(1, 64, 64, 3, dtype=torch.uint8)
    stripes[:, :, ::2] = 200
    assert (center_crop(stripes, 8).int() - 100).abs().max() <= 8  # antialiased: the mean, not one stripe or the other


def test_center_crop_takes_the_middle():
    frames = smooth_clip(2, 100, 201)
    view = center_crop(frames, 100)
    assert torch.equal(view, frames[:, :, 50:150])
    assert torch.equal(center_crop(frames.transpose(1, 2), 100), frames.transpose(1, 2)[:, 50:150])
    assert torch.equal(augment_video(frames, 100, STILL, seeded()), view)


@pytest.mark.parametrize(
    ("frames", "size", "message"),
    [
        (torch.zeros(2, 8, 8, 3), 4, r"frames must be uint8 \[T, H, W, 3\], got torch.float32 \[2, 8, 8, 3\]"),
        (torch.zeros(8, 8, 3, dtype=torch.uint8), 4, r"frames must be uint8 \[T, H, W, 3\], got .*\[8, 8, 3\]"),
        (torch.zeros(2, 8, 8, 4, dtype=torch.uint8), 4, "frames must be uint8"),
        (torch.zeros(0, 8, 8, 3, dtype=torch.uint8), 4, "frames must be uint8"),
        (torch.zeros(2, 8, 8, 3, dtype=torch.uint8), 0, "size must be at least 1, got 0"),
    ],
)
def test_rejects_bad_frames(frames, size, message):
    with pytest.raises(ValueError, match=message):
        augment_video(frames, size, AugmentConfig(), seeded())
    with pytest.raises(ValueError, match=message):
        center_crop(frames, size)


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 1, 9), (3, 7, 1), (1, 2, 3)])
@pytest.mark.parametrize("crop", ["vgg", "inception", "none"])
def test_smallest_frames_work(shape, crop):
    config = AugmentConfig(crop=crop, color_jitter=1)
    for seed in range(20):
        assert augment_video(clip(*shape), 5, config, seeded(seed)).shape == (shape[0], 5, 5, 3)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"crop": "random"}, "crop must be vgg, inception or none, got 'random'"),
        ({"flip": 1.5}, r"flip must be a probability in \[0, 1\], got 1.5"),
        ({"color_jitter": math.nan}, "color_jitter must be a probability"),
        ({"scale": (1.2, 0.8)}, r"scale must be a rising range .* got \(1.2, 0.8\)"),
        ({"scale": (0.0, 1.0)}, "scale must be a rising range"),
        ({"area": (0.1, 1.1)}, "area must be a rising range"),
        ({"aspect": (1.0, math.inf)}, "aspect must be a rising range"),
        ({"contrast": (-0.1, 1.0)}, "contrast must be a rising range"),
        ({"saturation": (1.0,)}, "saturation must be a rising range"),
        ({"hue": 0.6}, r"hue must be in \[0, 0.5\], got 0.6"),
        ({"brightness": math.nan}, "brightness must be in"),
        ({"audio_noise": math.inf}, "audio_noise must be in"),
    ],
)
def test_rejects_bad_configs(values, message):
    with pytest.raises(ValueError, match=message):
        AugmentConfig(**values)


def test_audio_noise_is_the_official_one_unless_told():
    wave = torch.sin(torch.arange(480) / 7.0)
    assert torch.equal(
        augment_audio(wave, AugmentConfig(), seeded()), augment_audio(wave, AugmentConfig(audio_noise=0.01), seeded())
    )


def test_audio_noise_has_the_waveforms_peak_as_its_scale():
    wave = torch.sin(torch.arange(50_000) * 0.01) * 0.3
    wave[100] = -0.5
    noisy = augment_audio(wave, AugmentConfig(audio_noise=0.01), seeded())
    noise = noisy - wave
    assert noise.std().item() == pytest.approx(0.01 * 0.5, rel=0.02)
    assert abs(noise.mean().item()) < 4 * 0.005 / math.sqrt(50_000)
    assert torch.equal(noisy, augment_audio(wave, AugmentConfig(audio_noise=0.01), seeded()))
    assert not torch.equal(noisy, augment_audio(wave, AugmentConfig(audio_noise=0.01), seeded(1)))


def test_audio_edges():
    wave = torch.rand(10, generator=seeded())
    same = augment_audio(wave, AugmentConfig(audio_noise=0), seeded())
    assert torch.equal(same, wave)
    assert same.data_ptr() != wave.data_ptr()
    assert torch.equal(augment_audio(torch.zeros(10), AugmentConfig(), seeded()), torch.zeros(10))
    assert augment_audio(torch.zeros(0), AugmentConfig(), seeded()).shape == (0,)
    for bad in (torch.zeros(2, 10), torch.zeros(10, dtype=torch.int16)):
        with pytest.raises(ValueError, match=r"wave must be float \[L\]"):
            augment_audio(bad, AugmentConfig(), seeded())
