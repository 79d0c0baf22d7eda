"""Raw signals to tokens: patch projections, position tables, and the stem that joins them with DropToken and AGG."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vatt_engine import ops
from vatt_engine.models import init
from vatt_engine.models.config import AudioConfig, DropTokenConfig, PatchInit, PositionConfig, VideoConfig
from vatt_engine.models.spectrogram import mel_spectrogram
from vatt_engine.models.transformer import Dropout, Seed, layer_norm


class VoxelPatch(nn.Module):
    """Linear projection of voxel patches [t, h, w, 3] -> D, a strided convolution without the convolution."""

    def __init__(self, config: VideoConfig, dim: int) -> None:
        super().__init__()
        self.patch = config.patch
        volume = config.patch[0] * config.patch[1] * config.patch[2]
        self.weight = nn.Parameter(torch.empty(dim, volume * 3))
        self.bias = nn.Parameter(torch.zeros(dim))
        _init_patch(self.weight, volume, config.patch_init)

    def prepare(self, video: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """The video itself, and its token grid."""
        if video.ndim != 5 or video.shape[-1] != 3:
            raise ValueError(f"video must be [B, T, H, W, 3], got shape {tuple(video.shape)}.")
        return video, tuple(size // step for size, step in zip(video.shape[1:4], self.patch))

    def forward(
        self, video: Tensor, keep: Tensor | None, pos: Tensor | None = None, agg: Tensor | None = None
    ) -> Tensor:
        return ops.tokenize_video(video, self.weight, self.bias, pos=pos, agg=agg, keep=keep, patch=self.patch)


class WaveformPatch(nn.Module):
    """Linear projection of `patch` consecutive samples -> D."""

    def __init__(self, config: AudioConfig, dim: int) -> None:
        super().__init__()
        (self.patch,) = config.patch
        self.weight = nn.Parameter(torch.empty(dim, self.patch))
        self.bias = nn.Parameter(torch.zeros(dim))
        _init_patch(self.weight, self.patch, config.patch_init)

    def prepare(self, wave: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """The waveform itself, and its number of tokens."""
        if wave.ndim != 2:
            raise ValueError(f"audio must be [B, L], got shape {tuple(wave.shape)}.")
        return wave, (wave.shape[1] // self.patch,)

    def forward(
        self, wave: Tensor, keep: Tensor | None, pos: Tensor | None = None, agg: Tensor | None = None
    ) -> Tensor:
        return ops.tokenize_waveform(wave, self.weight, self.bias, pos=pos, agg=agg, keep=keep, patch=self.patch)


class SpectrogramPatch(nn.Module):
    """Linear projection of [steps, mels] patches of a log-mel spectrogram -> D."""

    def __init__(self, config: AudioConfig, dim: int) -> None:
        super().__init__()
        self.patch, self.num_mels, self.sample_rate = config.patch, config.num_mels, config.sample_rate
        volume = config.patch[0] * config.patch[1]
        self.weight = nn.Parameter(torch.empty(dim, volume))
        self.bias = nn.Parameter(torch.zeros(dim))
        _init_patch(self.weight, volume, config.patch_init)

    def prepare(self, audio: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """The spectrogram [B, steps, mels] of a waveform [B, L] (or itself), and its token grid."""
        spectrogram = audio
        if audio.ndim == 2:
            spectrogram = mel_spectrogram(audio, num_mels=self.num_mels, sample_rate=self.sample_rate)
        if spectrogram.ndim != 3 or spectrogram.shape[2] != self.num_mels:
            raise ValueError(f"audio must be [B, L] or [B, steps, {self.num_mels}], got shape {tuple(audio.shape)}.")
        return spectrogram, tuple(size // step for size, step in zip(spectrogram.shape[1:], self.patch))

    def forward(
        self, spectrogram: Tensor, keep: Tensor | None, pos: Tensor | None = None, agg: Tensor | None = None
    ) -> Tensor:
        batch = spectrogram.shape[0]
        (steps, mels), (time, frequency) = self.patch, self.prepare(spectrogram)[1]
        patches = spectrogram[:, : time * steps, : frequency * mels].reshape(batch, time, steps, frequency, mels)
        patches = patches.transpose(2, 3).reshape(batch, time * frequency, steps * mels)
        if keep is not None:
            patches = ops.drop_token(patches, keep)
        tokens = F.linear(patches.to(self.weight.dtype), self.weight, self.bias)
        if pos is not None:
            tokens = tokens + (pos if keep is None else pos[keep])
        return tokens if agg is None else prepend(agg, tokens)


def _init_patch(weight: Tensor, volume: int, kind: PatchInit) -> None:
    """Glorot-uniform [D, volume * channels]; a convolution's output fan counts every place of the kernel."""
    dim, fan_in = weight.shape
    init.glorot_uniform_(weight, fan_in, dim * volume if kind == "conv" else dim)


class PositionEmbedding(nn.Module):
    """One learned table per axis: position[t, h, w] = LN(E_t[t] + E_h[h] + E_w[w]), or LN(E_t[t] + E_hw[h, w]).

    Another grid than the tables' is met by resampling each table with a cubic polyharmonic spline, as the official
    code does (the paper calls it bi-cubic).

    Args:
        grid: tokens along each axis.
        axes_reversed: attach positions in the order of the released spectrogram model, see `AudioConfig`.
    """

    def __init__(self, grid: Sequence[int], dim: int, config: PositionConfig, *, axes_reversed: bool = False) -> None:
        super().__init__()
        self.frame = tuple(grid[1:]) if config.tables == "frame" else None  # the grid of the second table
        sizes = grid if self.frame is None else (grid[0], math.prod(self.frame))
        self.tables = nn.ParameterList(nn.Parameter(torch.empty(size, dim)) for size in sizes)
        for table in self.tables:
            init.truncated_normal_(table, dim**-0.5)
        self.norm = layer_norm(dim) if config.norm else nn.Identity()
        self.axes_reversed = axes_reversed

    def forward(self, grid: Sequence[int]) -> Tensor:
        """Positions [N, D] of every token of `grid`, flattened with the last axis fastest."""
        if self.frame is not None:
            places = resample_frame(self.tables[1], self.frame, grid[1:])
            return self.norm((resample_table(self.tables[0], grid[0])[:, None] + places).flatten(0, 1))
        axes = range(len(self.tables))
        total: Tensor | float = 0.0
        for axis in axes:
            table = resample_table(self.tables[axis], grid[axis])
            shape = [grid[axis] if other == axis else 1 for other in axes] + [-1]
            total = total + table.view(shape)
        if self.axes_reversed:
            total = total.transpose(0, 1)
        return self.norm(total.reshape(-1, total.shape[-1]))

    def resampled(self, tables: Sequence[Tensor], grid: Sequence[int]) -> list[Tensor]:
        """The tables of another grid at the sizes of these, to be loaded (official: once, where fine-tuning starts)."""
        if self.frame is not None:
            return [resample_table(tables[0], len(self.tables[0])), resample_frame(tables[1], grid[1:], self.frame)]
        return [resample_table(table, len(own)) for table, own in zip(tables, self.tables)]


def resample_table(table: Tensor, size: int) -> Tensor:
    """Resample a position table [n, D] to [size, D] by the spline of tfa.image.interpolate_spline(order=3).

    The table's rows stand at i/n and the queries at j/size, so the last queries extrapolate. Linear in the table and
    differentiable; solved in float64.

    >>> resample_table(torch.tensor([[0.0], [1.0]]), 4).flatten().tolist()
    [0.0, 0.5, 1.0, 1.5]
    """
    if size == table.shape[0]:
        return table
    return _spline_matrix(table.shape[0], size).to(table) @ table


def resample_frame(table: Tensor, grid: Sequence[int], new: Sequence[int]) -> Tensor:
    """Resample a table [h * w, D] over the places of a `grid` to [h' * w', D], rows and then columns by the spline."""
    columns = resample_table(table.reshape(grid[0], -1), new[0]).view(new[0], grid[1], -1).transpose(0, 1)
    rows = resample_table(columns.reshape(grid[1], -1), new[1]).view(new[1], new[0], -1)
    return rows.transpose(0, 1).reshape(new[0] * new[1], -1)


@functools.lru_cache(maxsize=64)
def _spline_matrix(num_points: int, num_queries: int) -> Tensor:
    """M with spline(queries) = M @ values.

    On one axis the spline s(x) = sum_i w_i |x - x_i|^3 + a x + b, with w orthogonal to lines, is the natural cubic one,
    a straight line beyond the ends. Its curvatures solve a system that stays well-conditioned: that of the w_i loses
    11 of 16 digits at 1200 points.
    """
    values = torch.eye(num_points, dtype=torch.float64, device="cpu")
    if num_points == 1:
        return values.expand(num_queries, 1)
    curvatures = torch.zeros_like(values)  # second derivatives at a knot spacing of 1; 0 at both ends
    if num_points > 2:
        inner = values[1:-1, 1:-1]
        neighbours = values[1:-1, :-2] + values[1:-1, 2:]
        curvatures[1:-1] = torch.linalg.solve(4 * inner + neighbours, 6 * values.diff(n=2, dim=0))
    query = torch.arange(num_queries, dtype=torch.float64, device="cpu") * num_points / num_queries
    left = query.floor().clamp_max(num_points - 2).long()
    t = (query - left)[:, None]
    inside = t.clamp_max(1.0)
    of_left = (1 - inside) ** 3 - (1 - t)
    of_right = inside**3 - inside
    cubic = (of_left * curvatures[left] + of_right * curvatures[left + 1]) / 6
    return (1 - t) * values[left] + t * values[left + 1] + cubic


class PatchStem(nn.Module):
    """patches -> [Dense + GELU] -> + position, dropout -> DropToken -> AGG first.

    Only the patches that DropToken keeps are projected: dropping commutes with everything before it.
    """

    def __init__(self, config: VideoConfig | AudioConfig, dim: int) -> None:
        super().__init__()
        is_video = isinstance(config, VideoConfig)
        patches = VoxelPatch if is_video else WaveformPatch if config.input == "waveform" else SpectrogramPatch
        reversed_axes = patches is SpectrogramPatch and config.spectrogram_positions == "official"
        self.patch = patches(config, dim)
        self.pre_projection = init.linear(dim, dim) if config.pre_projection else None
        self.position = PositionEmbedding(config.grid, dim, config.position, axes_reversed=reversed_axes)
        self.dropout = Dropout(config.position.dropout)
        self.agg = init.agg_token(dim)
        self.drop_token: DropTokenConfig = config.drop_token
        self.num_buckets = torch.Size(config.grid).numel()

    def sample_keep(self, num_tokens: int, x: Tensor, seed: Seed, sample_id: Tensor | None) -> Tensor | None:
        """The positions this step trains on, or None for all: all in evaluation, and at keep_rate 1.

        The count comes from the tables' size, not from the input's, as in the official code.
        """
        if not self.training or self.drop_token.keep_rate == 1.0:
            return None
        if seed is None:
            seed = torch.randint(2**62, (1,), device=x.device)
        num_kept = min(self.drop_token.num_kept(self.num_buckets), num_tokens)
        ids = self.drawn_by(x, sample_id)
        return ops.sample_keep(num_tokens, num_kept, seed=seed, sample_id=ids, device=x.device)

    def drawn_by(self, x: Tensor, sample_id: Tensor | None) -> Tensor | None:
        """[B] the ids that samples draw their own positions by, or None where one draw serves the batch."""
        if self.drop_token.keep_mode == "batch":
            return None
        return torch.arange(x.shape[0], device=x.device) if sample_id is None else sample_id

    def forward(self, x: Tensor, *, seed: Seed = None, sample_id: Tensor | None = None) -> Tensor:
        """A raw signal -> [B, 1 + K, D], AGG at 0."""
        x, grid = self.patch.prepare(x)
        keep = self.sample_keep(torch.Size(grid).numel(), x, seed, sample_id)
        position = self.position(grid)
        drops_out = self.training and self.dropout.p > 0
        if self.pre_projection is None and not drops_out:
            return self.patch(x, keep, position, self.agg)
        if self.pre_projection is None:
            return prepend(self.agg, self.dropout(self.patch(x, keep, position, None)))
        tokens = F.gelu(self.pre_projection(self.patch(x, keep, None, None)))
        return prepend(self.agg, self.dropout(tokens + (position if keep is None else position[keep])))


def prepend(agg: Tensor, tokens: Tensor) -> Tensor:
    """AGG [D] as row 0 of every sample's tokens [B, N, D]."""
    return torch.cat([agg.to(tokens.dtype).expand(tokens.shape[0], 1, -1), tokens], dim=1)
