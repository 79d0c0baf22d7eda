"""What a model costs: parameters and FLOPs by module, by a true count and by the paper's.

True: 2 x multiply-adds of every matrix product, on the tokens really computed (DropToken's kept ones + AGG). Per layer
of width d, inner = heads * head_dim, feed-forward width f, on n tokens,

    forward = 2 n (4 d inner) + 4 n^2 inner  (attention)  +  2 n (2 d f)  (MLP)

and, where a model takes AGG alone from the last layer, 2 (4 d inner) + 4 n heads d + 2 (2 d f) there;
2 K P d for the projection of K kept patches of P values. Backward is twice forward, once where the input needs no
gradient (pixels, samples, frozen word vectors). The loss is left out: under 0.1 % of a step even at 65,536 clips.

The paper's tables: what TensorFlow 1's profiler makes of the official graph. It does not see the product q k^T, which
is an einsum there, but does count softmax, norms and residuals, and patches are projected before DropToken:

    2 n L (4 d^2 + 2 d f) + 2 n^2 d L + 2 N P d + L (6 h n^2 + 24 n d)         h heads, L layers, N tokens before it

without heads and without the Dense layers around the modality-agnostic transformer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from vatt_engine.models import EncoderConfig, VATTConfig, build_model, model_config
from vatt_engine.models.config import AudioConfig, HeadConfig, TextConfig, TransformerConfig, VideoConfig

ModelConfig = VATTConfig | EncoderConfig


class ModuleFlops(NamedTuple):
    """One part of a model: its parameters, and the FLOPs of one clip; `paper` is the forward pass by their count."""

    name: str  # "<tower> <part>", such as "video attention"
    parameters: int
    forward: int
    backward: int
    paper: int


class StepFlops(NamedTuple):
    """True FLOPs of a step; `model` is what MFU divides by time, `total` what a machine computes."""

    forward: int
    backward: int
    recomputed: int

    @property
    def model(self) -> int:
        return self.forward + self.backward

    @property
    def total(self) -> int:
        return self.model + self.recomputed


class _Cost(NamedTuple):
    name: str
    forward: int
    passes: int = 2  # backward, in units of forward
    paper: int = 0


def step_flops(
    config: ModelConfig, batch: int = 1, *, candidates: int = 5, training: bool = True, checkpointing: bool = False
) -> StepFlops:
    """FLOPs of one step of `batch` clips: the one count behind MFU, benchmarks and predictions.

    Args:
        config: of a whole model or an encoder.
        batch: clips with picture, sound and text.
        candidates: sentences per clip.
        training: DropToken's kept tokens, forward and backward; else all tokens, forward alone.
        checkpointing: every block is recomputed in the backward pass, which adds its forward to `recomputed`.

    Raises:
        ValueError: a number is not positive.

    >>> round(step_flops(model_config("vatt_bbs")).model / 1e9)
    763
    """
    for name, value in (("batch", batch), ("candidates", candidates)):
        if value < 1:
            raise ValueError(f"step_flops: {name} must be at least 1, got {value}.")
    costs = list(_costs(config, candidates, training))
    forward = batch * sum(cost.forward for cost in costs)
    if not training:
        return StepFlops(forward, 0, 0)
    backward = batch * sum(cost.passes * cost.forward for cost in costs)
    blocks = batch * sum(cost.forward for cost in costs if cost.name.split()[1] in ("attention", "MLP"))
    return StepFlops(forward, backward, blocks if checkpointing else 0)


def module_flops(config: ModelConfig, *, candidates: int = 5, training: bool = True) -> list[ModuleFlops]:
    """Parameters (word vectors too) and FLOPs per clip of every part of a model; arguments as for `step_flops`.

    A modality-agnostic model's "shared" parts are its one transformer, on the tokens of all modalities.

    >>> sum(part.parameters for part in module_flops(model_config("vit_base")))
    87446016
    """
    rows: dict[str, list[int]] = {}
    with torch.device("meta"):
        model = build_model(config)
    for name, parameter in model.named_parameters():
        rows.setdefault(_part(name, config), [0, 0, 0, 0])[0] += parameter.numel()
    for cost in _costs(config, candidates, training):
        row = rows.setdefault(cost.name, [0, 0, 0, 0])
        for index, value in enumerate((cost.forward, cost.passes * cost.forward * training, cost.paper), 1):
            row[index] += value
    return [ModuleFlops(name, *row) for name, row in rows.items()]


def paper_flops(config: ModelConfig, *, candidates: int = 5, training: bool = True) -> int:
    """Forward FLOPs of one clip by the paper's count; arguments as for `step_flops`.

    >>> round(paper_flops(model_config("vit_medium"), training=False) / 1e9, 1)
    547.5
    """
    return sum(cost.paper for cost in _costs(config, candidates, training))


def _part(name: str, config: ModelConfig) -> str:
    """The part that a parameter belongs to."""
    words = name.split(".")
    if words[0] in ("heads", "head"):
        return "all heads"
    if isinstance(config, EncoderConfig):
        tower = config.modality
    elif config.backbone == "specific":
        tower = words[0]
    else:
        tower = next((word for word in words if word in ("video", "audio", "text")), "shared")
    kinds = {"attention": "attention", "ff_in": "MLP", "ff_out": "MLP", "attention_norm": "norms", "ff_norm": "norms"}
    kinds |= {"final_norm": "norms", "post_projection": "projection", "post_projections": "projection"}
    return f"{tower} {next((kinds[word] for word in words if word in kinds), 'stem')}"


def _costs(config: ModelConfig, candidates: int, training: bool) -> Iterator[_Cost]:
    if isinstance(config, EncoderConfig):
        tower = getattr(config, config.modality)
        if config.modality == "text":
            yield from _text(tower, None, 1, agg_only=False)
        else:
            pooled = {"agg_only": bool(config.num_classes)}
            yield from _patches(config.modality, tower, tower.transformer, config.modality, training, **pooled)
            if config.num_classes:
                yield _Cost("all heads", 2 * (tower.post_projection or tower.transformer.dim) * config.num_classes)
        return
    shared = config.shared if config.backbone == "agnostic" else None
    widths = []
    for modality, tower in (("video", config.video), ("audio", config.audio)):
        transformer, label = (shared, "shared") if shared else (tower.transformer, modality)
        yield from _patches(modality, tower, transformer, label, training, agg_only=True)
        widths.append(tower.post_projection or transformer.dim)
    yield from _text(config.text, shared, candidates, agg_only=True)
    if shared:
        for modality, rows in (("video", 1), ("audio", 1), ("text", candidates)):
            yield _Cost(f"{modality} projection", 2 * rows * shared.dim * config.shared_projection)
        widths = [config.shared_projection] * 3
    else:
        widths.append(config.text.linear_dim if config.text.encoder == "linear" else config.text.transformer.dim)
    yield _Cost("all heads", _head_flops(config.heads, widths, candidates))


def _patches(
    modality: str,
    tower: VideoConfig | AudioConfig,
    transformer: TransformerConfig,
    label: str,
    training: bool,
    *,
    agg_only: bool,
) -> Iterator[_Cost]:
    """Stem, transformer and projection of one clip's picture or sound."""
    dim, total = transformer.dim, math.prod(tower.grid)
    kept = tower.drop_token.num_kept(total) if training else total
    values = math.prod(tower.patch) * (3 if modality == "video" else 1)
    yield _Cost(f"{modality} stem", 2 * kept * values * dim, 1, paper=2 * total * values * dim)
    if tower.pre_projection:
        yield _Cost(f"{modality} stem", 2 * kept * dim * dim)
    tokens = layer_tokens(tower, transformer, training)
    yield from _transformer(label, transformer, tokens, agg_only=agg_only)
    if label == modality and tower.post_projection:
        rows = 1 if agg_only else tokens[-1]
        yield _Cost(f"{modality} projection", 2 * rows * dim * tower.post_projection)


def layer_tokens(tower: VideoConfig | AudioConfig, transformer: TransformerConfig, training: bool) -> list[int]:
    """Tokens that each layer computes on, AGG included."""
    total = math.prod(tower.grid)
    tokens, others = [], tower.drop_token.num_kept(total) if training else total
    for rate in transformer.keep_rates or (1.0,) * transformer.num_layers:
        others = max(1, int(rate * others)) if training else others
        tokens.append(others + 1)
    return tokens


def _text(config: TextConfig, shared: TransformerConfig | None, sentences: int, *, agg_only: bool) -> Iterator[_Cost]:
    """Stem and transformer of the sentences of one clip."""
    frozen = 1 if config.freeze_embedding else 2
    if shared is None and config.encoder == "linear":
        yield _Cost("text stem", 2 * sentences * config.max_words * config.embedding_dim * config.linear_dim, frozen)
        return
    transformer = shared or config.transformer
    n, per_row = config.max_words + 1, 2 * sentences * config.embedding_dim * transformer.dim
    if shared:
        yield _Cost("text stem", config.max_words * per_row, frozen, paper=config.max_words * per_row)
    elif config.style == "code":  # AGG goes through the projection too, so that its input always needs a gradient
        yield _Cost("text stem", n * per_row, paper=n * per_row)
    tokens = [n] * transformer.num_layers
    yield from _transformer("shared" if shared else "text", transformer, tokens, sentences, agg_only=agg_only)


def _transformer(
    label: str, config: TransformerConfig, tokens: Sequence[int], sequences: int = 1, *, agg_only: bool
) -> Iterator[_Cost]:
    """The blocks over `tokens` per layer, AGG included."""
    d, heads, inner = config.dim, config.num_heads, config.num_heads * config.head_dim
    rows, pairs = sequences * sum(tokens), sequences * sum(n * n for n in tokens)
    layers = [layer_flops(config, n, agg_only=agg_only and i == len(tokens) - 1) for i, n in enumerate(tokens)]
    attention, mlp = (sequences * sum(part) for part in zip(*layers))
    linear = 2 * rows * 4 * d * inner
    yield _Cost(f"{label} attention", attention, paper=linear + 2 * pairs * d + 6 * heads * pairs)
    yield _Cost(f"{label} MLP", mlp, paper=2 * rows * 2 * d * config.ff_dim)
    yield _Cost(f"{label} norms", 0, paper=24 * rows * d)


def layer_flops(config: TransformerConfig, tokens: int, *, agg_only: bool = False) -> tuple[int, int]:
    """Forward FLOPs of one layer on one sequence, attention and MLP; with agg_only of all that AGG's row needs.

    >>> layer_flops(TransformerConfig(dim=2, ff_dim=3, num_heads=1, head_dim=2), 10)
    (1120, 240)
    """
    d, inner = config.dim, config.num_heads * config.head_dim
    rows = 1 if agg_only else tokens
    pairs = tokens * config.num_heads * d if agg_only else tokens**2 * inner
    return 2 * rows * 4 * d * inner + 4 * pairs, 2 * rows * 2 * d * config.ff_dim


def _head_flops(config: HeadConfig, widths: Sequence[int], candidates: int) -> int:
    video, audio, text = widths
    a, t = config.video_audio_dim, config.video_text_dim
    if config.kind == "joint":
        return 2 * a * (video + audio + candidates * text)
    return 2 * (a * (video + a + t + audio) + candidates * text * t)


class PaperCell(NamedTuple):
    """A number of the paper's tables beside ours, in GFLOPs."""

    table: str
    model: str
    frames: int
    size: int
    views: int
    keep_rate: float
    paper: float
    reproduced: float
    true: float


def paper_cells() -> list[PaperCell]:
    """Every FLOP figure of the paper (Tables 1, 5 and 6; forward passes) by its own count and by the true one.

    >>> cell = paper_cells()[0]
    >>> cell.paper, round(cell.reproduced, 1)
    (188.1, 189.1)
    """
    rates = (0.25, 0.5, 0.75, 1.0)
    rows = [("5", "vatt_mbs", 32, 224, 1, r, x) for r, x in zip(rates, (188.1, 375.4, 574.2, 784.8))]
    rows += [("6", "vit_medium", 32, 224, 1, 1.0, 548.1), ("6", "vit_medium", 64, 224, 1, 1.0, 1222.1)]
    rows += [("6", "vit_medium", 32, 320, 1, r, x) for r, x in zip(rates, (279.8, 572.5, 898.9, 1252.3))]
    views = (("vit_base", 9090.0), ("vit_medium", 15020.0), ("vit_large", 29800.0))
    rows += [("1", model, 32, 320, 12, 1.0, x) for model, x in views]
    cells = []
    for table, model, frames, size, views, rate, paper in rows:
        changes = {"num_frames": frames, "frame_size": (size, size), "drop_token": {"keep_rate": rate}}
        config = model_config(model, video=changes)
        if isinstance(config, VATTConfig):
            config = model_config(model, video=changes, audio={"drop_token": {"keep_rate": rate}})
        ours = views * paper_flops(config) / 1e9, views * step_flops(config).forward / 1e9
        cells.append(PaperCell(table, model, frames, size, views, rate, paper, *ours))
    return cells
