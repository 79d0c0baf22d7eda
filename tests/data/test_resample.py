import math

import pytest
import torch

from vatt_engine.data.resample import area_scaled, resampled


def test_area_scaled_is_the_mean_of_areas():
    frames = torch.randint(0, 256, (2, 12, 9, 3), dtype=torch.uint8)
    tiles = frames.double().view(2, 4, 3, 3, 3, 3).mean((2, 4))
    assert torch.equal(area_scaled(frames, 3, 4), tiles.round().byte())
    row = torch.tensor([0, 90, 30], dtype=torch.uint8).view(1, 1, 3, 1)
    assert area_scaled(row, 2, 1).flatten().tolist() == [30, 50]
    assert area_scaled(frames, 9, 12) is frames


def libswresample(wave, old, new):
    av = pytest.importorskip("av")
    resampler = av.AudioResampler("flt", "mono", new)
    frame = av.AudioFrame.from_ndarray(wave[None].numpy(), format="flt", layout="mono")
    frame.sample_rate = old
    pieces = resampler.resample(frame) + resampler.resample(None)
    return torch.cat([torch.from_numpy(piece.to_ndarray()[0]) for piece in pieces])


RATES = [(48_000, 12_000), (48_000, 16_000), (48_000, 44_100), (44_100, 48_000), (48_000, 11_025)]


@pytest.mark.parametrize(("old", "new"), RATES)
def test_resampled_is_libswresamples(old, new):
    """55 dB, of white noise, away from the ends, beyond which that sees a mirror."""
    wave = torch.randn(20_000)
    ours, theirs = resampled(wave, old, new, 0, 10**6), libswresample(wave, old, new)
    assert len(ours) == len(theirs) == math.ceil(20_000 * new / old)
    error = (ours - theirs)[50:-50]
    assert 10 * torch.log10(theirs.square().mean() / error.square().mean()) > 55


@pytest.mark.parametrize(("old", "new"), [*RATES, (48_000, 48_000)])
def test_a_window_is_cut_from_the_whole(old, new):
    wave = torch.randn(20_000)
    whole = resampled(wave, old, new, 0, 10**6)
    for first, count in ((0, 3), (1, 200), (777, 1000), (len(whole) - 5, 50), (len(whole), 4), (len(whole) + 9, 4)):
        window = resampled(wave, old, new, first, count)
        assert len(window) == min(count, max(len(whole) - first, 0))
        torch.testing.assert_close(window, whole[first : first + count], rtol=0, atol=1e-5)


def test_what_lies_above_the_new_nyquist_rate_is_gone():
    for hertz, level in ((5_000, 1.0), (7_000, 1e-3), (20_000, 1e-3)):
        wave = torch.sin(2 * torch.pi * hertz / 48_000 * torch.arange(24_000, dtype=torch.float64)).float()
        rms = resampled(wave, 48_000, 12_000, 100, 5_000).square().mean().sqrt() * 2**0.5
        assert abs(rms - level) < 0.01 if level == 1 else rms < level
