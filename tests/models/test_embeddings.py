"""Positions, spectrograms and patches: what the golden towers do not reach."""

from __future__ import annotations

import math

import pytest
import torch

from vatt_engine.models.config import AudioConfig, PositionConfig, TransformerConfig
from vatt_engine.models.embeddings import PositionEmbedding, SpectrogramPatch, resample_table
from vatt_engine.models.spectrogram import mel_spectrogram
from vatt_engine.models.vatt import PatchEncoder
from vatt_engine.testing import Sum, assert_same_formula, assert_same_sums


@pytest.mark.parametrize(("points", "queries"), [(14, 20), (8, 4), (2, 7), (8, 1), (14, 24), (1, 3)])
def test_resampling_is_the_cubic_polyharmonic_spline(points, queries):
    """Solved directly for each query: phi(r) = r^3 plus a line, the weights orthogonal to lines."""
    table = torch.randn(points, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    resampled = resample_table(table, queries)
    if points == 1:
        assert torch.equal(resampled, table.expand(queries, 3))
        return
    x = [i / points for i in range(points)]
    system = [[abs(a - b) ** 3 for b in x] + [a, 1.0] for a in x]
    system += [[*x, 0.0, 0.0], [1.0] * points + [0.0, 0.0]]
    values = torch.cat([table, torch.zeros(2, 3, dtype=torch.float64)])
    weights = torch.linalg.solve(torch.tensor(system, dtype=torch.float64), values)
    for j in range(queries):
        q = j / queries
        basis = torch.tensor([abs(q - a) ** 3 for a in x] + [q, 1.0], dtype=torch.float64)
        assert_same_formula(resampled[j], basis @ weights)


def test_resampling_keeps_lines_and_extrapolates():
    line = torch.arange(4, dtype=torch.float64)[:, None] / 4
    assert torch.allclose(resample_table(line, 8).flatten(), torch.arange(8, dtype=torch.float64) / 8)


def test_resampling_is_differentiable():
    table = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: resample_table(t, 7), table)


def test_official_spectrogram_positions_are_transposed():
    """The released code numbers positions with time fastest while patches have frequency fastest."""
    time, frequency = 3, 4
    config = PositionConfig(norm=False)
    official = PositionEmbedding((time, frequency), 8, config, axes_reversed=True)
    e_time, e_frequency = official.tables
    position = official((time, frequency))
    for n in range(time * frequency):
        assert torch.allclose(position[n], e_time[n % time] + e_frequency[n // time])
    official.axes_reversed = False
    assert torch.allclose(official((time, frequency))[1 * frequency + 2], e_time[1] + e_frequency[2])


def test_spectrogram_patches_are_a_strided_convolution():
    patch = SpectrogramPatch(AudioConfig(input="spectrogram", patch=(4, 5), num_mels=20), 6)
    spectrogram = torch.randn(2, 18, 20)  # two steps are left over
    kernel = patch.weight.view(6, 1, 4, 5)
    expected = torch.nn.functional.conv2d(spectrogram[:, None], kernel, patch.bias, stride=(4, 5))
    assert_same_sums(patch(spectrogram, None), expected.flatten(2).transpose(1, 2), Sum(4 * 5 + 1))


@pytest.mark.parametrize("num_points", [2, 14, 1200])
def test_spline_goes_through_its_knots_at_any_size(num_points):
    table = torch.randn(num_points, 4, dtype=torch.float64)
    assert_same_sums(resample_table(table, 2 * num_points)[::2], table, Sum(num_points))
    straight = torch.arange(num_points, dtype=torch.float64)[:, None] / num_points
    expected = torch.arange(num_points + 7, dtype=torch.float64)[:, None] / (num_points + 7)
    assert_same_sums(resample_table(straight, num_points + 7), expected, Sum(num_points))


def tone(rate: int, hertz: float, seconds: float = 1.0) -> torch.Tensor:
    return torch.sin(2 * math.pi * hertz * torch.arange(round(seconds * rate)) / rate)[None]


@pytest.mark.parametrize("rate", [16_000, 22_050, 24_000, 44_100, 48_000])
def test_mel_spectrogram_finds_a_tone_at_any_rate(rate):
    spectrogram = mel_spectrogram(tone(rate, 1000.0), sample_rate=rate)
    assert spectrogram.shape == (1, math.ceil(rate / int(0.02134 * rate)), 80)
    assert spectrogram.min() == 0.0
    assert spectrogram.max() == 1.0

    def mel(f: float) -> float:
        return 1127 * math.log(1 + f / 700)

    band = (mel(1000.0) - mel(80)) / (mel(7600) - mel(80)) * 81 - 1
    assert abs(spectrogram[0, 10].argmax().item() - band) <= 1
    assert not mel_spectrogram(torch.zeros(1, 4096), sample_rate=rate).any()


def test_a_spectrogram_tower_follows_its_sample_rate():
    """The same second at another rate is the same picture, and as many tokens."""
    pictures = []
    for rate in (16_000, 48_000):
        config = AudioConfig(input="spectrogram", num_samples=rate, sample_rate=rate, patch=(16, 5))
        picture, grid = SpectrogramPatch(config, 8).prepare(tone(rate, 1000.0))
        assert grid == config.grid == (2, 16)
        pictures.append(picture[0, 5:40].mean(0))
    assert pictures[0].argmax() == pictures[1].argmax()
    with pytest.raises(ValueError, match=r"audio.sample_rate must be at least 15200 for a spectrogram, whose .* 7600"):
        AudioConfig(input="spectrogram", patch=(16, 5), sample_rate=8_000)
    with pytest.raises(ValueError, match=r"mel_spectrogram: sample_rate must be at least 15200, .*got 8000"):
        mel_spectrogram(torch.zeros(1, 4096), sample_rate=8_000)


def test_mel_bands_overlap_to_one():
    """Between the outer centres neighbouring triangles sum to 1, up to the grid of the Fourier bins."""
    from vatt_engine.models.spectrogram import _mel_matrix

    matrix = _mel_matrix(80, 48_000, 80.0, 7600.0)
    inside = matrix.sum(1)[10:300]
    assert torch.allclose(inside, torch.ones_like(inside), atol=1e-9)
    assert not matrix[0].any()


def test_spectrogram_encoder_takes_a_waveform():
    small = TransformerConfig(num_layers=1, dim=16, ff_dim=16, num_heads=2, head_dim=8, dropout=0.0)
    encoder = PatchEncoder(
        AudioConfig(input="spectrogram", num_samples=32 * 1024, patch=(16, 5), transformer=small)
    ).eval()
    wave = torch.randn(2, 32 * 1024)
    assert torch.equal(encoder(wave), encoder(mel_spectrogram(wave)))
    with pytest.raises(ValueError, match=r"audio must be \[B, L\] or \[B, steps, 80\], got shape \(2, 5, 7\)"):
        encoder(torch.randn(2, 5, 7))


@pytest.mark.parametrize("audio", [torch.randn(2, 1, 256), torch.randn(256)])
def test_waveform_shape_is_checked(audio):
    small = TransformerConfig(num_layers=1, dim=16, ff_dim=16, num_heads=2, head_dim=8)
    encoder = PatchEncoder(AudioConfig(num_samples=256, patch=(16,), transformer=small))
    with pytest.raises(ValueError, match=r"audio must be \[B, L\], got shape"):
        encoder(audio)
