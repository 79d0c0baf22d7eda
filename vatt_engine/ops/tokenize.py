"""Tokens of raw video and raw waveforms: a linear projection of the patches that DropToken keeps.

y[b, k] = weight @ patch(x[b], keep[k]) + bias,    uint8 pixels scaled to [-1, 1] by x * 2 / 255 - 1

Only kept patches are read. A waveform is a video of one pixel, so that both share one extraction op.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from vatt_engine.dispatch import Impl, define_op, native_missing


def tokenize_video(
    video: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    keep: Tensor | None = None,
    patch: tuple[int, int, int] = (4, 16, 16),
) -> Tensor:
    """Project the kept voxel patches of a video, y[b, k] = weight @ patch(video[b], keep[b, k]) + bias.

    The tokens number t * h * w (h, w: frame size over patch size) in the order time, then vertical, then horizontal;
    frames, rows and columns that do not fill a patch are ignored (VALID). Elements of a patch are ordered (t, y, x, c),
    as the TF kernel [t, h, w, c, D] flattens to.

    Args:
        video: [B, T, H, W, C]; uint8 (0..255) is scaled to [-1, 1], float is used as it is.
        weight: [D, t*h*w*C]; its dtype is the output's, unless autocast chooses another.
        bias: [D] or None.
        keep: int64 token numbers, [K] for all samples or [B, K] per sample; None keeps all.
        patch: (t, h, w), in frames and pixels.

    Returns:
        [B, K, D], differentiable in weight, bias and float video.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, the video is smaller than a patch, or (on the CPU) a token
            number lies outside the grid.

    Source: paper section 3.1; official vatt/modeling/backbones/video/vitx3d.py (Conv3D, VALID).
    Implementations of the extraction: cpp (uint8), reference (plain PyTorch), cuda (uint8, unmeasured).

    >>> video = torch.zeros(1, 8, 32, 32, 3, dtype=torch.uint8)
    >>> tokenize_video(video, torch.ones(2, 3072), keep=torch.tensor([5, 0])).shape
    torch.Size([1, 2, 2])
    """
    if video.ndim != 5:
        raise ValueError(f"tokenize_video: video must be [B, T, H, W, C], got shape {tuple(video.shape)}.")
    if len(patch) != 3 or min(patch) < 1:
        raise ValueError(f"tokenize_video: patch must be three positive sizes (t, h, w), got {tuple(patch)}.")
    if any(size < step for size, step in zip(video.shape[1:4], patch)):
        raise ValueError(
            f"tokenize_video: video must hold at least one patch {tuple(patch)}, got [T, H, W] "
            f"{tuple(video.shape[1:4])}."
        )
    if video.dtype != torch.uint8 and not video.is_floating_point():
        raise ValueError(f"tokenize_video: video must be uint8 or float, got {video.dtype}.")
    _check("tokenize_video", "video", video, weight, bias, keep, patch[0] * patch[1] * patch[2] * video.shape[4])
    return _project(video, weight, bias, keep, patch)


def tokenize_waveform(
    wave: Tensor, weight: Tensor, bias: Tensor | None = None, *, keep: Tensor | None = None, patch: int = 128
) -> Tensor:
    """Project the kept patches of a waveform, y[b, k] = weight @ wave[b, keep[b, k] * patch : ... + patch] + bias.

    Args:
        wave: [B, L], float, used as it is; samples that do not fill a patch are ignored (VALID).
        weight: [D, patch]; its dtype is the output's, unless autocast chooses another.
        bias: [D] or None.
        keep: int64 token numbers, [K] for all samples or [B, K] per sample; None keeps all.
        patch: samples per token.

    Returns:
        [B, K, D], differentiable in wave, weight and bias.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, the waveform is shorter than a patch, or (on the CPU) a token
            number lies outside the grid.

    Source: paper section 3.1; official vatt/modeling/backbones/audio/autx1d.py (Conv1D, VALID).
    Implementations of the extraction: reference (plain PyTorch).

    >>> tokenize_waveform(torch.ones(1, 300), torch.ones(2, 128))[0, 1].tolist()
    [128.0, 128.0]
    """
    if wave.ndim != 2 or not wave.is_floating_point():
        raise ValueError(f"tokenize_waveform: wave must be float [B, L], got {wave.dtype} {list(wave.shape)}.")
    if patch < 1:
        raise ValueError(f"tokenize_waveform: patch must be positive, got {patch}.")
    if wave.shape[1] < patch:
        raise ValueError(f"tokenize_waveform: wave must hold at least {patch} samples, got {wave.shape[1]}.")
    _check("tokenize_waveform", "wave", wave, weight, bias, keep, patch)
    return _project(wave[:, :, None, None, None], weight, bias, keep, (patch, 1, 1))


def patches_reference(video: Tensor, keep: Tensor | None, patch: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The meaning of the extraction: cut the grid, take the kept patches, scale. [B, K, t*h*w*C] of `dtype`."""
    cells = _cut(video, patch)
    if keep is None:
        patches = cells.flatten(1, 3)
    else:
        _check_token_numbers(keep, cells.shape[1] * cells.shape[2] * cells.shape[3])
        patches = cells[_cell_index(keep, cells)]
    patches = patches.flatten(2)
    if video.dtype == torch.uint8:
        patches = patches.to(torch.promote_types(dtype, torch.float32)) * 2 / 255 - 1
    # All patches of a waveform lie in its memory as they are; an op's output must have its own.
    own = patches.untyped_storage().data_ptr() != video.untyped_storage().data_ptr()
    return patches.to(dtype, copy=not own)


def patches_bwd_reference(
    grad: Tensor, keep: Tensor | None, patch: Sequence[int], shape: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """The gradient of float video: every patch back to its place, zero where nothing was read."""
    video_grad = grad.new_zeros(shape, dtype=dtype)
    cells = _cut(video_grad, patch)
    size = cells.shape[4:]
    grad = grad.to(dtype).unflatten(2, size)
    if keep is None:
        cells.copy_(grad.unflatten(1, cells.shape[1:4]))
    else:
        cells.index_put_(_cell_index(keep, cells), grad, accumulate=True)
    return video_grad


def _cut(video: Tensor, patch: Sequence[int]) -> Tensor:
    """A view of [B, T, H, W, C] as [B, grid_t, grid_h, grid_w, t, h, w, C]; what fills no patch is left out."""
    for axis, size in zip((1, 3, 5), patch):
        count = video.shape[axis] // size
        video = video.narrow(axis, 0, count * size).unflatten(axis, (count, size))
    return video.permute(0, 1, 3, 5, 2, 4, 6, 7)


def _cell_index(keep: Tensor, cells: Tensor) -> tuple[Tensor, ...]:
    """Indices into the first four axes of `cells` that pick the kept tokens of every sample, each [B, K]."""
    batch, _, rows, columns = cells.shape[:4]
    sample = torch.arange(batch, device=keep.device)[:, None]
    row = torch.div(keep, columns, rounding_mode="floor")
    return sample, torch.div(row, rows, rounding_mode="floor"), row % rows, keep % columns


def _check_token_numbers(keep: Tensor, num_tokens: int) -> None:
    """On a GPU this would need a synchronisation: there the index kernel's own bound check stops the run."""
    if keep.is_cpu and keep.numel():
        low, high = (int(bound) for bound in keep.aminmax())
        if low < 0 or high >= num_tokens:
            wrong = low if low < 0 else high
            raise ValueError(f"tokenize: keep must hold token numbers in [0, {num_tokens}), got {wrong}.")


def _check(
    where: str, name: str, x: Tensor, weight: Tensor, bias: Tensor | None, keep: Tensor | None, patch_size: int
) -> None:
    if weight.ndim != 2 or weight.shape[1] != patch_size or not weight.is_floating_point():
        raise ValueError(
            f"{where}: weight must be float [D, {patch_size}], got {weight.dtype} {list(weight.shape)}. "
            "The second size is that of a flattened patch."
        )
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != weight.dtype):
        raise ValueError(
            f"{where}: bias must be {weight.dtype} [{weight.shape[0]}], got {bias.dtype} {list(bias.shape)}."
        )
    if keep is not None:
        if keep.dtype != torch.int64:
            raise ValueError(f"{where}: keep must be int64, got {keep.dtype}.")
        if keep.ndim not in (1, 2) or (keep.ndim == 2 and keep.shape[0] != x.shape[0]):
            raise ValueError(f"{where}: keep must be [K] or [{x.shape[0]}, K], got shape {tuple(keep.shape)}.")
    for other, tensor in {"weight": weight, "bias": bias, "keep": keep}.items():
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{where}: {other} must be on the device of {name}, {x.device}, got {tensor.device}.")


def _project(x: Tensor, weight: Tensor, bias: Tensor | None, keep: Tensor | None, patch: Sequence[int]) -> Tensor:
    dtype = weight.dtype
    if dtype == torch.float32 and torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)  # what F.linear would cast to, without the copy between
    patches = _Patches.apply(x, keep, list(patch), dtype)
    return F.linear(patches, weight, bias)


def _patches_native(video: Tensor, keep: Tensor | None, patch: Sequence[int], dtype: torch.dtype) -> Tensor:
    from torch.utils.dlpack import to_dlpack

    from vatt_engine import _C

    out = _patches_fake(video, keep, patch, dtype)
    stream = torch.cuda.current_stream(video.device).cuda_stream if video.is_cuda else 0
    kept = None if keep is None else to_dlpack(keep)
    _C.tokenize_patches(to_dlpack(video), kept, to_dlpack(out), list(patch), torch.get_num_threads(), stream)
    return out


def _native_refuses(video: Tensor, keep: Tensor | None, patch: Sequence[int], dtype: torch.dtype) -> str | None:
    if video.dtype != torch.uint8:
        return f"reads uint8 video, got {video.dtype}"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"writes float32, bfloat16 or float16, got {dtype}"
    _, _, _, width, channels = video.shape
    if (channels > 1 and video.stride(4) != 1) or (width > 1 and video.stride(3) != channels):
        return f"reads rows [W, C] without gaps, got strides {video.stride()[3:]}"
    return None


def _patches_fake(video: Tensor, keep: Tensor | None, patch: Sequence[int], dtype: torch.dtype) -> Tensor:
    batch, frames, height, width, channels = video.shape
    t, h, w = patch
    kept = (frames // t) * (height // h) * (width // w) if keep is None else keep.shape[-1]
    return video.new_empty(batch, kept, t * h * w * channels, dtype=dtype)


_patches_fwd = define_op(
    "tokenize",
    "patches_fwd(Tensor video, Tensor? keep, int[] patch, ScalarType dtype) -> Tensor",
    fake=_patches_fake,
    impls=[
        Impl("cpp", "cpu", _patches_native, missing=native_missing, refuses=_native_refuses),
        Impl("reference", "any", patches_reference),
        Impl(
            "cuda",
            "cuda",
            _patches_native,
            missing=lambda: native_missing(cuda=True),
            refuses=_native_refuses,
            unmeasured=True,
        ),
    ],
)


class _Patches(torch.autograd.Function):
    @staticmethod
    def forward(ctx, video: Tensor, keep: Tensor | None, patch: list[int], dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(keep)
        ctx.patch, ctx.shape, ctx.dtype = patch, video.shape, video.dtype
        return _patches_fwd(video, keep, patch, dtype)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (keep,) = ctx.saved_tensors
        return patches_bwd_reference(grad, keep, ctx.patch, ctx.shape, ctx.dtype), None, None, None
