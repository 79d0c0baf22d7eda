"""A training run on paper: memory and traffic of each GPU, and clips per second from measured kernels.

Weights, gradients and moments are exact; activations are what torch keeps for the backward pass, counted per layer of
width d, inner = heads * head_dim and feed-forward width f, per token:

    2 d (inputs of the norms) + 2 d (their outputs) + 4 inner (q, k, v and attention's output) + 2 f (around GELU)

norms' inputs and statistics in float32, the rest in the precision of the products; a byte per dropped-out value. Under
bf16 autocast the bfloat16 copies of the weights live as long. CUDA's context, temporaries and what the allocator
wastes come on top.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from vatt_engine.analysis.flops import layer_tokens, step_flops
from vatt_engine.models import VATTConfig, build_model
from vatt_engine.models.config import TransformerConfig

STRATEGIES = ("single", "ddp", "zero1", "zero2", "zero3")
Precision = Literal["fp32", "bf16"]
ADAM_BYTES = 28  # read and written per parameter: weight, gradient and two moments, all but the gradient twice
DDP_BUCKET = 25 << 20  # bytes of gradients that travel together
ZERO_BUCKET = 50_000_000  # elements, of gradients and of gathered weights
ZERO3_LIVE = 10**9  # parameters that DeepSpeed keeps gathered during a step (stage3_max_live_parameters)


class Memory(NamedTuple):
    """Bytes on one GPU."""

    weights: int  # those of frozen parts and buffers too
    masters: int  # ZeRO's own float32 copy of the part it updates
    gradients: int
    moments: int  # two of Adam
    gathered: int  # communication buffers, and ZeRO-3's weights while a step runs
    activations: int
    batch: int  # the clips themselves


class Traffic(NamedTuple):
    """Bytes that one GPU sends per step, by ring algorithms: (N-1)/N of a tensor per gather or reduce-scatter."""

    gradients: float
    weights: float  # gathered by ZeRO
    embeddings: float  # of the other modality, from all ranks, for the loss
    embedding_gradients: float
    statistics: float  # of BatchNorm and of the loss

    @property
    def total(self) -> float:
        return sum(self)


class Rate(NamedTuple):
    """What a GPU does per second, and where that is from."""

    flops: float
    memory_bytes: float | None
    source: str


class Sizes(NamedTuple):
    """Elements of a model; `products` are the weights that autocast copies."""

    trained: int
    frozen: int
    products: int


@functools.cache
def sizes(config: VATTConfig) -> Sizes:
    """Numbers of parameters by kind, frozen word vectors and buffers apart."""
    with torch.device("meta"):
        model = build_model(config)
    layers = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    others = sum(p.numel() for p in [*model.parameters(), *model.buffers()]) - trained
    return Sizes(trained, others, sum(layer.weight.numel() for layer in layers))


def memory(
    config: VATTConfig,
    strategy: str,
    gpus: int,
    clips: int,
    *,
    precision: Precision = "bf16",
    candidates: int = 5,
    checkpointing: bool = False,
) -> Memory:
    """Memory of one GPU that trains `clips` of a global batch of `gpus * clips`, with Adam.

    ZeRO-1 divides masters and moments by the number of GPUs (and has its part of the gradients twice), ZeRO-2 gradients
    too, ZeRO-3 weights too, but DeepSpeed keeps up to 1e9 of them gathered while a step runs.

    >>> memory(VATTConfig(), "ddp", 8, 32).moments == 8 * sizes(VATTConfig()).trained
    True
    """
    found = sizes(config)
    weights, stage = 4 * found.trained, STRATEGIES.index(strategy) - 1
    part = math.ceil(weights / gpus)
    gathered = {-1: 0, 0: min(DDP_BUCKET, weights)}.get(stage, 2 * 4 * min(ZERO_BUCKET, found.trained))
    return Memory(
        weights=4 * found.frozen + (part if stage == 3 else weights),
        masters=part if stage >= 1 else 0,
        gradients=(part if stage >= 1 else 0) + (weights if stage < 2 else 0),
        moments=2 * (part if stage >= 1 else weights),
        gathered=gathered + (4 * min(ZERO3_LIVE, found.trained) if stage == 3 else 0),
        activations=clips * activation_bytes(config, precision, candidates=candidates, checkpointing=checkpointing)
        + (2 * found.products if precision == "bf16" else 0),
        batch=clips * _clip_bytes(config, candidates),
    )


def activation_bytes(
    config: VATTConfig, precision: Precision = "bf16", *, candidates: int = 5, checkpointing: bool = False
) -> int:
    """Bytes kept for the backward pass of one clip; heads and loss, a thousandth of it, are left out.

    With `checkpointing` that is the input of every layer, and all of the one layer that is being recomputed.
    """
    wide = 4 if precision == "fp32" else 2
    total = largest = 0
    for transformer, tokens, sequences, stem in _sequences(config, candidates):
        d, inner = transformer.dim, transformer.num_heads * transformer.head_dim
        norm = 4 * d + 8  # input, mean and deviation
        row = 2 * norm + wide * (2 * d + 4 * inner + 2 * transformer.ff_dim) + 4 * transformer.num_heads
        row += (2 * d + transformer.ff_dim) * (transformer.dropout > 0)  # masks
        layers = [sequences * n * row for n in tokens[:-1]]
        layers.append(sequences * _last_layer_bytes(transformer, tokens[-1], norm, wide))
        largest = max(largest, *layers)
        total += sequences * sum(tokens) * 4 * d if checkpointing else sum(layers)
        last = norm + d * (transformer.dropout > 0) + 4 * d * (wide == 4)  # heads keep AGG, or a cast of it
        total += sequences * (last + tokens[0] * wide * stem)
    return total + (largest if checkpointing else 0)


def _last_layer_bytes(transformer: TransformerConfig, tokens: int, norm: int, wide: int) -> int:
    """Of one sequence: of all tokens their norm and AGG's probabilities, the rest of AGG alone."""
    d, heads, inner = transformer.dim, transformer.num_heads, transformer.num_heads * transformer.head_dim
    drops = transformer.dropout > 0
    of_token = norm + wide * d + heads * (4 + wide * (wide == 2) + drops)
    of_agg = norm + wide * (d + 2 * inner + 2 * heads * d + 2 * transformer.ff_dim) + 4 * heads
    return tokens * of_token + of_agg + (2 * d + transformer.ff_dim) * drops


def _sequences(config: VATTConfig, candidates: int) -> Iterator[tuple[TransformerConfig, list[int], int, int]]:
    """(transformer, tokens by layer, sequences per clip, elements kept per token before it) of each modality."""
    shared = config.shared if config.backbone == "agnostic" else None
    for tower in (config.video, config.audio):
        transformer = shared or tower.transformer
        stem = 2 * transformer.dim if tower.pre_projection else 0
        yield transformer, layer_tokens(tower, transformer, True), 1, stem
    if shared or config.text.encoder == "t5":
        transformer, text = shared or config.text.transformer, config.text
        stem = text.embedding_dim + transformer.dim if shared or text.style == "code" else 0
        yield transformer, [text.max_words + 1] * transformer.num_layers, candidates, stem


def traffic(
    config: VATTConfig,
    strategy: str,
    gpus: int,
    clips: int,
    *,
    precision: Precision = "bf16",
    candidates: int = 5,
) -> Traffic:
    """Bytes that one of `gpus` GPUs sends per step of `gpus * clips` clips, with the joint loss and gather="all".

    DDP reduces gradients to all, which sends twice their size. So do DeepSpeed's ZeRO-1 and 2 by default, which then
    gather the new weights. ZeRO-3 reduces gradients to their owners and gathers weights before the forward pass, and
    before the backward pass only those that it had to let go. Masks, a byte per clip, are left out.

    >>> traffic(VATTConfig(), "single", 1, 32).total
    0.0
    """
    share = (gpus - 1) / gpus
    trained = sizes(config).trained
    gathers = (0, 0, 1, 1, 1 if trained <= ZERO3_LIVE else 2)[STRATEGIES.index(strategy)]
    heads, wide = config.heads, 4 if precision == "fp32" else 2
    joint = heads.kind == "joint"
    audio, text = heads.video_audio_dim, heads.video_audio_dim if joint else heads.video_text_dim
    rows = gpus * clips
    gathered = rows * wide * (audio + candidates * text)
    norms = [audio] * 3 if joint else [audio, audio, text] + ([audio, text] if heads.style == "paper" else [])
    # BatchNorm: count, sum and squares, and two gradients; the loss, in float64: a column's maximum, sum and its
    # gradient per pair, then [2, 2] sums and their gradient. A reduction to all sends twice the share.
    reduced = sum(4 * (1 + 4 * dim) for dim in norms) + 2 * 3 * 8 * rows + 2 * 32
    return Traffic(
        gradients=share * 4 * trained * (1 if strategy == "zero3" else 2),
        weights=share * 4 * trained * gathers,
        embeddings=share * gathered,
        embedding_gradients=share * gathered,
        statistics=2 * share * reduced,
    )


def _clip_bytes(config: VATTConfig, candidates: int) -> int:
    video = config.video.num_frames * math.prod(config.video.frame_size) * 3
    return video + 4 * config.audio.num_samples + 8 * candidates * config.text.max_words


def step_seconds(
    config: VATTConfig,
    strategy: str,
    gpus: int,
    clips: int,
    rate: Rate,
    bandwidth: float | None,
    *,
    overlap: bool,
    **options: Any,
) -> float:
    """Seconds of a step: products at the measured rate, the optimizer at memory speed, then communication.

    Args:
        bandwidth: bytes per second that a GPU sends; None only for one GPU.
        overlap: gradients and ZeRO-3's weights travel while products are computed, the best there can be (the new
            weights of ZeRO-1 and 2 come after the update); else everything travels after them.
        options: `precision`, `candidates` and `checkpointing`, as for `memory`.
    """
    counted = {name: options[name] for name in ("candidates", "checkpointing") if name in options}
    compute = step_flops(config, clips, **counted).total / rate.flops
    parts = gpus if strategy.startswith("zero") else 1
    if rate.memory_bytes:
        compute += ADAM_BYTES * sizes(config).trained / parts / rate.memory_bytes
    if gpus == 1:
        return compute
    sent = traffic(config, strategy, gpus, clips, **{k: v for k, v in options.items() if k != "checkpointing"})
    hidden = (sent.gradients + (sent.weights if strategy == "zero3" else 0.0)) / bandwidth
    exposed = sent.total / bandwidth - hidden
    return exposed + (max(compute, hidden) if overlap else compute + hidden)


def measured_rate(folder: str | Path, precision: Precision, dim: int, *, device: str = "cuda") -> Rate | None:
    """The rate of a transformer block, forward and backward, from committed benchmark results; None where none is.

    Args:
        folder: of `<machine>/block.jsonl`, as benchmarks write them.
        dim: the block of the nearest width counts, and of its implementations the fastest.

    >>> measured_rate("benchmarks/results", "bf16", 768) is None  # doctest: +SKIP
    True
    """
    found: list[tuple[float, float, Rate]] = []
    for path in sorted(Path(folder).glob("*/block.jsonl")):
        try:
            for row in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
                if (row["device"], row["dtype"], row["pass"]) == (device, precision, "forward+backward"):
                    width, flops = row["sizes"]["dim"], row["flops"] / row["seconds"]
                    source = f"{row['stamp']['machine']}, block of width {width}"
                    rate = Rate(flops, row["ceilings"].get("bytes_per_second"), source)
                    found.append((-abs(math.log(width / dim)), flops, rate))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: every line must be a result of our benchmarks, got {error!r}.") from error
    return max(found, key=lambda one: one[:2], default=(0.0, 0.0, None))[2]
