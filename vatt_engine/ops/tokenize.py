"""Tokens of raw video and raw waveforms: a linear projection of the patches that DropToken keeps.

y[b, A + k] = weight @ patch(x[b], keep[b, k]) + bias + pos[keep[b, k]],    y[b, 0] = agg if it is given (A = 1)

Only kept patches are read, uint8 pixels scaled to [-1, 1] by x * 2 / 255 - 1 on the way. A waveform is a video of one
row of pixels, so that both share one op.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vatt_engine.dispatch import Impl, define_op, native_missing, triton_missing, wgmma_missing
from vatt_engine.ops.tokenize_reference import tokenize_bwd_reference, tokenize_reference, video_bwd_reference


def tokenize_video(
    video: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    pos: Tensor | None = None,
    agg: Tensor | None = None,
    keep: Tensor | None = None,
    patch: tuple[int, int, int] = (4, 16, 16),
    size: tuple[int, int] | None = None,
    crop: Tensor | None = None,
    flip: Tensor | None = None,
) -> Tensor:
    """Project the kept voxel patches of a video and place them: the sum above, from pixels to tokens in one op.

    The N tokens (T over t times H' over h times W' over w) are numbered in the order time, then vertical, then
    horizontal; frames, rows and columns that do not fill a patch are ignored (VALID). Elements of a patch are ordered
    (t, y, x, c), as the TF kernel [t, h, w, c, D] flattens to. The product runs in weight's dtype, or in autocast's.

    Args:
        video: [B, T, H, W, C]; uint8 (0..255) is scaled to [-1, 1], float is used as it is.
        weight: [D, t*h*w*C].
        bias: [D] or None.
        pos: [N, D], one position embedding for every token of the grid, or None.
        agg: [D], written as row 0 of every sample, or None.
        keep: int64 token numbers, [K] for all samples or [B, K] per sample; None keeps all.
        patch: (t, h, w), in frames and pixels.
        size: (H', W'), the window of each frame that is cut into patches, in pixels; None takes the whole frame.
        crop: int64 [B, 2], vertical and horizontal pixel at which each sample's window starts; None starts at (0, 0).
        flip: bool [B], which samples' windows are mirrored left to right; None mirrors none.

    Returns:
        [B, K (+ 1 with agg), D] in the dtype of the product, or what that and pos promote to; differentiable in weight,
        bias, pos, agg and float video.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, the window is smaller than a patch, or (on the CPU; a GPU
            kernel stops the run) a token number lies outside the grid or a window outside the frame.

    Source: paper section 3.1; official vatt/modeling/backbones/video/vitx3d.py (Conv3D, VALID).
    Implementations: cpp (CPU), reference (plain PyTorch); on GPUs triton, cuda (sm_80 and newer), wgmma (sm_90a).

    >>> video = torch.zeros(1, 8, 32, 32, 3, dtype=torch.uint8)
    >>> tokenize_video(video, torch.ones(2, 3072), agg=torch.zeros(2), keep=torch.tensor([5, 0]))[0, :, 0].tolist()
    [0.0, -3072.0, -3072.0]
    """
    where = "tokenize_video"
    if video.ndim != 5:
        raise ValueError(f"{where}: video must be [B, T, H, W, C], got shape {tuple(video.shape)}.")
    if video.dtype != torch.uint8 and not video.is_floating_point():
        raise ValueError(f"{where}: video must be uint8 or float, got {video.dtype}.")
    if len(patch) != 3 or min(patch) < 1:
        raise ValueError(f"{where}: patch must be three positive sizes (t, h, w), got {tuple(patch)}.")
    size = _check_window(where, video, size, crop, flip)
    if any(have < step for have, step in zip((video.shape[1], *size), patch)):
        raise ValueError(
            f"{where}: video must hold at least one patch {tuple(patch)}, got [T, H, W] {(video.shape[1], *size)}."
        )
    return _tokenize(where, video, weight, bias, pos, agg, keep, crop, flip, size, patch)


def tokenize_waveform(
    wave: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    pos: Tensor | None = None,
    agg: Tensor | None = None,
    keep: Tensor | None = None,
    patch: int = 128,
) -> Tensor:
    """Project the kept patches of a waveform, y[b, k] = weight @ wave[b, patch * keep[b, k] : ...] + bias + pos.

    Args:
        wave: [B, L], float, used as it is; samples that do not fill one of the N = L over patch patches are ignored.
        weight: [D, patch]; the product runs in its dtype, or in autocast's.
        bias: [D] or None.
        pos: [N, D], one position embedding for every patch, or None.
        agg: [D], written as row 0 of every sample, or None.
        keep: int64 token numbers, [K] for all samples or [B, K] per sample; None keeps all.
        patch: samples per token.

    Returns:
        [B, K (+ 1 with agg), D], as `tokenize_video`; differentiable in wave, weight, bias, pos and agg.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, the waveform is shorter than a patch, or (on the CPU) a token
            number lies outside the grid.

    Source: paper section 3.1; official vatt/modeling/backbones/audio/autx1d.py (Conv1D, VALID).
    Implementations: those of `tokenize_video`.

    >>> tokenize_waveform(torch.ones(1, 300), torch.ones(2, 128))[0, 1].tolist()
    [128.0, 128.0]
    """
    where = "tokenize_waveform"
    if wave.ndim != 2 or not wave.is_floating_point():
        raise ValueError(f"{where}: wave must be float [B, L], got {wave.dtype} {list(wave.shape)}.")
    if patch < 1:
        raise ValueError(f"{where}: patch must be positive, got {patch}.")
    if wave.shape[1] < patch:
        raise ValueError(f"{where}: wave must hold at least {patch} samples, got {wave.shape[1]}.")
    video, size = wave[:, None, None, :, None], (1, wave.shape[1])
    return _tokenize(where, video, weight, bias, pos, agg, keep, None, None, size, (1, 1, patch))


def _tokenize(
    where: str,
    video: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pos: Tensor | None,
    agg: Tensor | None,
    keep: Tensor | None,
    crop: Tensor | None,
    flip: Tensor | None,
    size: Sequence[int],
    patch: Sequence[int],
) -> Tensor:
    _check_parameters(where, video, weight, bias, pos, agg, size, patch)
    batch = video.shape[0]
    if keep is not None and keep.dtype != torch.int64:
        raise ValueError(f"{where}: keep must be int64, got {keep.dtype}.")
    if keep is not None and (keep.ndim not in (1, 2) or (keep.ndim == 2 and keep.shape[0] != batch)):
        raise ValueError(f"{where}: keep must be [K] or [{batch}, K], got shape {tuple(keep.shape)}.")
    others = {"weight": weight, "bias": bias, "pos": pos, "agg": agg, "keep": keep, "crop": crop, "flip": flip}
    for name, tensor in others.items():
        if tensor is not None and tensor.device != video.device:
            raise ValueError(f"{where}: {name} must be on {video.device} like the input, got {tensor.device}.")
    dtype = weight.dtype
    if dtype != torch.float64 and torch.is_autocast_enabled(video.device.type):
        dtype = torch.get_autocast_dtype(video.device.type)
    return _Tokenize.apply(video, weight, bias, pos, agg, keep, crop, flip, list(size), list(patch), dtype)


def _check_parameters(
    where: str,
    video: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pos: Tensor | None,
    agg: Tensor | None,
    size: Sequence[int],
    patch: Sequence[int],
) -> None:
    volume = patch[0] * patch[1] * patch[2] * video.shape[4]
    if weight.ndim != 2 or weight.shape[1] != volume or not weight.is_floating_point():
        raise ValueError(
            f"{where}: weight must be float [D, {volume}], got {weight.dtype} {list(weight.shape)}. "
            "The second size is that of a flattened patch."
        )
    dim, num_tokens = weight.shape[0], _num_tokens(video.shape[1], size, patch)
    for name, tensor, shape in (("bias", bias, (dim,)), ("pos", pos, (num_tokens, dim)), ("agg", agg, (dim,))):
        if tensor is not None and (tensor.shape != shape or not tensor.is_floating_point()):
            raise ValueError(f"{where}: {name} must be float {list(shape)}, got {tensor.dtype} {list(tensor.shape)}.")


def _check_window(
    where: str, video: Tensor, size: Sequence[int] | None, crop: Tensor | None, flip: Tensor | None
) -> tuple[int, int]:
    height, width = video.shape[2:4]
    if size is None:
        size = (height, width)
    if len(size) != 2 or not (0 < size[0] <= height and 0 < size[1] <= width):
        raise ValueError(f"{where}: size must lie within the frame {(height, width)}, got {tuple(size)}.")
    batch = video.shape[0]
    if crop is not None and (crop.dtype != torch.int64 or crop.shape != (batch, 2)):
        raise ValueError(f"{where}: crop must be int64 [{batch}, 2], got {crop.dtype} {list(crop.shape)}.")
    if flip is not None and (flip.dtype != torch.bool or flip.shape != (batch,)):
        raise ValueError(f"{where}: flip must be bool [{batch}], got {flip.dtype} {list(flip.shape)}.")
    return size[0], size[1]


def _num_tokens(frames: int, size: Sequence[int], patch: Sequence[int]) -> int:
    return (frames // patch[0]) * (size[0] // patch[1]) * (size[1] // patch[2])


def _fwd_fake(
    video: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pos: Tensor | None,
    agg: Tensor | None,
    keep: Tensor | None,
    crop: Tensor | None,
    flip: Tensor | None,
    size: Sequence[int],
    patch: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    kept = _num_tokens(video.shape[1], size, patch) if keep is None else keep.shape[-1]
    out_dtype = dtype if pos is None else torch.promote_types(dtype, pos.dtype)
    return video.new_empty(video.shape[0], kept + int(agg is not None), weight.shape[0], dtype=out_dtype)


def _bwd_fake(
    grad: Tensor,
    video: Tensor,
    keep: Tensor | None,
    crop: Tensor | None,
    flip: Tensor | None,
    size: Sequence[int],
    patch: Sequence[int],
    agg: bool,
    dtype: torch.dtype,
    weight_dtype: torch.dtype,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dim, volume = grad.shape[2], patch[0] * patch[1] * patch[2] * video.shape[4]
    shapes = [(dim, volume), (dim,), (_num_tokens(video.shape[1], size, patch), dim), (dim,)]
    sums = torch.promote_types(grad.dtype, torch.float32)
    dtypes = [weight_dtype, sums, sums, sums]
    return tuple(grad.new_empty(s if need else (0,), dtype=d) for s, d, need in zip(shapes, dtypes, needs))


def _fwd_flops(
    _video: object,
    weight: torch.Size,
    _bias: object,
    _pos: object,
    agg: torch.Size | None,
    *_: object,
    out_shape: torch.Size,
) -> int:
    batch, rows, _dim = out_shape
    return 2 * batch * (rows - int(agg is not None)) * weight.numel()


def _bwd_flops(grad: torch.Size, *rest: object, out_shape: tuple[torch.Size, ...]) -> int:
    """The product for dweight, where it is wanted: its shape is [0] elsewhere."""
    batch, rows, _dim = grad
    return 2 * batch * (rows - rest[6]) * out_shape[0].numel()


def _refuses(video: Tensor, patch: Sequence[int], dtype: torch.dtype, dtypes: Sequence[torch.dtype]) -> str | None:
    """What every native and Triton implementation asks of its input."""
    if dtype not in dtypes:
        return f"multiplies {', '.join(map(str, dtypes))}, got {dtype}"
    if video.dtype == torch.float64:
        return "reads uint8 or float of at most 32 bits, got torch.float64"
    _, _, _, width, channels = video.shape
    if (channels > 1 and video.stride(4) != 1) or (width > 1 and video.stride(3) != channels):
        return f"reads rows [W, C] without gaps, got strides {video.stride()[3:]}"
    span = (patch[0] - 1) * video.stride(1) + (patch[1] - 1) * video.stride(2) + patch[2] * channels
    if span >= 2**31:
        return f"counts the elements that a patch spans in 32 bits, got {span}"
    return None


def _impls(pass_: str, refuses: Callable[[Sequence[torch.dtype]], Callable[..., str | None]]) -> list[Impl]:
    """The table of both passes, on a GPU in the order of their speed on an H200."""
    low = (torch.bfloat16, torch.float16)
    every = (torch.float32, *low)
    native, cuda = "vatt_engine.ops.tokenize_native", lambda: native_missing(cuda=True)
    reference = tokenize_reference if pass_ == "fwd" else tokenize_bwd_reference
    return [
        Impl("cpp", "cpu", f"{native}:{pass_}_cpp", missing=native_missing, refuses=refuses(every)),
        Impl(
            "triton",
            "cuda",
            f"vatt_engine.kernels.tokenize:tokenize_{pass_}",
            missing=triton_missing,
            refuses=refuses(every),
        ),
        Impl("wgmma", "cuda", f"{native}:{pass_}_wgmma", missing=wgmma_missing, refuses=refuses(low)),
        Impl("cuda", "cuda", f"{native}:{pass_}_mma", missing=cuda, refuses=refuses(every)),
        Impl("reference", "any", reference),
    ]


_fwd = define_op(
    "tokenize",
    "tokenize_fwd(Tensor video, Tensor weight, Tensor? bias, Tensor? pos, Tensor? agg, Tensor? keep, Tensor? crop, "
    "Tensor? flip, SymInt[] size, int[] patch, ScalarType dtype) -> Tensor",
    fake=_fwd_fake,
    impls=_impls("fwd", lambda dtypes: lambda *args: _refuses(args[0], args[9], args[10], dtypes)),
    flops=_fwd_flops,
)
_bwd = define_op(
    "tokenize",
    "tokenize_bwd(Tensor grad, Tensor video, Tensor? keep, Tensor? crop, Tensor? flip, SymInt[] size, int[] patch, "
    "bool agg, ScalarType dtype, ScalarType weight_dtype, bool[] needs) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_bwd_fake,
    impls=_impls("bwd", lambda dtypes: lambda *args: _refuses(args[1], args[6], args[8], dtypes)),
    flops=_bwd_flops,
)


class _Tokenize(torch.autograd.Function):
    @staticmethod
    def forward(ctx, video, weight, bias, pos, agg, keep, crop, flip, size, patch, dtype):
        ctx.save_for_backward(video, weight, keep, crop, flip)
        ctx.geometry, ctx.dtype, ctx.agg = (size, patch), dtype, agg is not None
        ctx.dtypes = [None if x is None else x.dtype for x in (bias, pos, agg)]
        return _fwd(video, weight, bias, pos, agg, keep, crop, flip, size, patch, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        video, weight, keep, crop, flip = ctx.saved_tensors
        where = (keep, crop, flip, *ctx.geometry)
        needs = list(ctx.needs_input_grad[1:5])
        dvideo, sums = None, [None] * 4
        if any(needs):
            sums = _bwd(grad.contiguous(), video, *where, ctx.agg, ctx.dtype, weight.dtype, needs)
            sums = [x.to(dtype) if need else None for x, dtype, need in zip(sums, (weight.dtype, *ctx.dtypes), needs)]
        if ctx.needs_input_grad[0]:
            dvideo = video_bwd_reference(grad[:, int(ctx.agg) :], weight.to(ctx.dtype), video.shape, *where)
            dvideo = dvideo.to(video.dtype)
        return dvideo, *sums, None, None, None, None, None, None
