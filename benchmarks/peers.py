"""The same training step as others would write it: what `bench_step` sets ours against.

plain: the obvious PyTorch. Bytes become a float video, a strided convolution projects all patches, DropToken is an
index, attention is torch's, the loss stores its matrix of similarities, Adam is torch's. It computes what ours does: it
takes our weights (`plain_weights`), and its embeddings are then ours.
hf: the same stems and heads around encoders of Hugging Face transformers (ViT, T5), with open_clip's loss, which knows
one caption per clip: the mean of its candidates.
"""

from __future__ import annotations

import copy
import importlib.util
import math
import re
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.bench_nce import TEMPERATURE, eager, open_clip
from vatt_engine import Batch, VATTConfig
from vatt_engine.analysis.flops import layer_flops
from vatt_engine.models.config import AudioConfig, PositionConfig, TextConfig, TransformerConfig, VideoConfig

EPS = 1e-6
HAS_HF = all(map(importlib.util.find_spec, ("transformers", "open_clip")))


class Positions(nn.Module):
    """A table per axis, summed and normalised."""

    def __init__(self, grid: tuple[int, ...], dim: int, config: PositionConfig):
        super().__init__()
        self.tables = nn.ParameterList(nn.Parameter(torch.randn(size, dim) * dim**-0.5) for size in grid)
        self.norm = nn.LayerNorm(dim, eps=EPS) if config.norm else nn.Identity()

    def forward(self) -> Tensor:
        total = self.tables[0]
        for table in list(self.tables)[1:]:
            total = total[..., None, :] + table
        return self.norm(total.flatten(0, -2))


class PatchStem(nn.Module):
    """All patches projected, some kept, AGG first."""

    def __init__(self, config: VideoConfig | AudioConfig, dim: int):
        super().__init__()
        conv, channels = (nn.Conv3d, 3) if len(config.patch) == 3 else (nn.Conv1d, 1)
        self.patch = conv(channels, dim, config.patch, stride=config.patch)
        self.pre_projection = nn.Linear(dim, dim) if config.pre_projection else None
        self.position = Positions(config.grid, dim, config.position)
        self.dropout = nn.Dropout(config.position.dropout)
        self.agg = nn.Parameter(torch.randn(dim) * dim**-0.5)
        self.num_kept = config.drop_token.num_kept(math.prod(config.grid))

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        if self.pre_projection is not None:
            x = F.gelu(self.pre_projection(x))
        x = self.dropout(x + self.position())
        if self.training and self.num_kept < x.shape[1]:
            x = x[:, torch.randperm(x.shape[1], device=x.device)[: self.num_kept]]
        return torch.cat([self.agg.expand(len(x), 1, -1), x], 1)


class WordStem(nn.Module):
    """Word vectors to tokens, AGG first: before the projection for a text tower, behind it for a shared transformer."""

    def __init__(self, config: TextConfig, dim: int, *, shared: bool):
        super().__init__()
        width = config.embedding_dim
        self.embedding = nn.Embedding(config.vocabulary_size, width)
        self.pre_projection = nn.Linear(width, dim, bias=shared)
        self.position = Positions((config.max_words,), dim, config.position) if shared else None
        self.agg = nn.Parameter(torch.randn(dim if shared else width) * dim**-0.5)
        self.dropout = nn.Dropout(config.position.dropout if shared else config.transformer.dropout)

    def forward(self, words: Tensor) -> Tensor:
        x, agg = self.embedding(words), self.agg.expand(len(words), 1, -1)
        if self.position is None:
            return self.dropout(F.gelu(self.pre_projection(torch.cat([agg, x], 1))))
        x = F.gelu(self.pre_projection(x)) + self.position()
        return torch.cat([agg, self.dropout(x)], 1)


class Layer(nn.Module):
    """Pre-LN attention and feed-forward."""

    def __init__(self, config: TransformerConfig, norm: Callable[..., nn.Module], scale: float | None):
        super().__init__()
        inner = config.num_heads * config.head_dim
        self.heads, self.scale, self.drop = config.num_heads, scale, config.dropout
        self.attention_norm, self.ff_norm = norm(config.dim, eps=EPS), nn.LayerNorm(config.dim, eps=EPS)
        self.qkv = nn.Linear(config.dim, 3 * inner, bias=config.bias)
        self.out = nn.Linear(inner, config.dim, bias=config.bias)
        self.ff_in = nn.Linear(config.dim, config.ff_dim, bias=config.bias)
        self.ff_out = nn.Linear(config.ff_dim, config.dim, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = self.qkv(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        drop = self.drop if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, mask, dropout_p=drop, scale=self.scale)
        x = x + self.dropout(self.out(y.transpose(1, 2).flatten(2)))
        return x + self.dropout(self.ff_out(self.dropout(F.gelu(self.ff_in(self.ff_norm(x))))))


class Encoder(nn.Module):
    """Layers and a last norm; as a text tower with RMS norms and T5's relative bias."""

    def __init__(self, config: TransformerConfig, text: TextConfig | None = None):
        super().__init__()
        norm, scale = (nn.LayerNorm, None) if text is None else (nn.RMSNorm, 1.0)
        self.layers = nn.ModuleList(Layer(config, norm, scale) for _ in range(config.num_layers))
        self.final_norm, self.dropout = norm(config.dim, eps=EPS), nn.Dropout(config.dropout)
        self.relative_bias = None
        if text is not None:
            self.relative_bias = nn.Parameter(torch.empty(text.num_buckets, config.num_heads).uniform_(-0.05, 0.05))
            position = torch.arange(text.max_words + 1)
            self.register_buffer("bucket", buckets(position - position[:, None], text), persistent=False)

    def forward(self, x: Tensor, seen: Tensor | None = None) -> Tensor:
        """`seen` [B, N] bool: keys that may be seen."""
        mask = None if seen is None else torch.zeros_like(seen, dtype=x.dtype).masked_fill(~seen, -torch.inf)
        mask = None if mask is None else mask[:, None, None]
        if self.relative_bias is not None:
            mask = mask + self.relative_bias[self.bucket].permute(2, 0, 1)
        for layer in self.layers:
            x = layer(x, mask)
        return self.dropout(self.final_norm(x))


def buckets(relative: Tensor, text: TextConfig) -> Tensor:
    """T5's: half for each direction, of these half single distances and the others logarithmic."""
    half = text.num_buckets // 2
    exact, distance = half // 2, relative.abs()
    far = exact + (distance.clamp_min(1) / exact).log() / math.log(text.max_distance / exact) * (half - exact)
    return torch.where(distance < exact, distance, far.long().clamp_max(half - 1)) + half * (relative > 0)


class HFEncoder(nn.Module):
    """ViT's layers of transformers; T5's encoder as a text tower."""

    def __init__(self, config: TransformerConfig, text: TextConfig | None = None):
        from transformers import T5Config, T5EncoderModel, ViTConfig, ViTModel

        super().__init__()
        self.is_text = text is not None
        if text is not None:
            sizes = {"d_model": config.dim, "d_ff": config.ff_dim, "d_kv": config.head_dim, "vocab_size": 2}
            sizes |= {"num_layers": config.num_layers, "num_heads": config.num_heads}
            sizes |= {"relative_attention_num_buckets": text.num_buckets, "feed_forward_proj": "gelu"}
            self.encoder = T5EncoderModel(T5Config(dropout_rate=config.dropout, **sizes))
            return
        sizes = {"hidden_size": config.dim, "intermediate_size": config.ff_dim, "layer_norm_eps": EPS}
        sizes |= {"num_hidden_layers": config.num_layers, "num_attention_heads": config.num_heads}
        drop = {"hidden_dropout_prob": config.dropout, "attention_probs_dropout_prob": config.dropout}
        whole = ViTModel(ViTConfig(image_size=16, attn_implementation="sdpa", **sizes, **drop), add_pooling_layer=False)
        self.layers, self.final_norm = hf_layers(whole), whole.layernorm

    def forward(self, x: Tensor, seen: Tensor | None = None) -> Tensor:
        """All keys are seen: the benchmark's captions have no padding, and ViT's layers know no mask."""
        if self.is_text:
            return self.encoder(inputs_embeds=x).last_hidden_state
        for layer in self.layers:
            x = layer(x)
            x = x if isinstance(x, Tensor) else x[0]
        return self.final_norm(x)


def hf_layers(vit: nn.Module) -> nn.ModuleList:
    """The list of layers, wherever a version of transformers keeps it."""
    return next(module for module in vit.modules() if isinstance(module, nn.ModuleList))


class PeerVATT(nn.Module):
    """Stems, encoders, heads: (video-audio, audio), (video-text, text) embeddings of a batch."""

    def __init__(self, config: VATTConfig, encoder: type[nn.Module] = Encoder):
        super().__init__()
        self.shared, heads = config.backbone == "agnostic", config.heads
        towers = {"video": config.video, "audio": config.audio}
        widths = {m: config.shared.dim if self.shared else t.transformer.dim for m, t in towers.items()}
        widths["text"] = config.shared.dim if self.shared else config.text.transformer.dim
        stems = {m: PatchStem(tower, widths[m]) for m, tower in towers.items()}
        self.stems = nn.ModuleDict(stems | {"text": WordStem(config.text, widths["text"], shared=self.shared)})
        if self.shared:
            self.encoders = nn.ModuleDict({"shared": encoder(config.shared)})
            width = config.shared_projection
            self.projections = nn.ModuleDict({m: nn.Linear(dim, width) for m, dim in widths.items()})
            widths = dict.fromkeys(widths, width)
        else:
            encoders = {m: encoder(tower.transformer) for m, tower in towers.items()}
            self.encoders = nn.ModuleDict(encoders | {"text": encoder(config.text.transformer, config.text)})
        a, t = heads.video_audio_dim, heads.video_text_dim
        self.heads = nn.ModuleDict({"video_hidden": linear_norm(widths["video"], a), "video_audio": linear_norm(a, a)})
        self.heads["video_text"] = linear_norm(a, t)
        self.heads["audio_video"] = nn.Sequential(nn.Linear(widths["audio"], a))
        self.heads["text_video"] = nn.Sequential(nn.Linear(widths["text"], t))

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        video = self.pooled("video", batch.video.permute(0, 4, 1, 2, 3).to(batch.audio) / 127.5 - 1)
        audio = self.pooled("audio", batch.audio[:, None])
        text = self.pooled("text", batch.text.flatten(0, 1)).unflatten(0, batch.text.shape[:2])
        video_audio = self.heads["video_audio"](F.relu(self.heads["video_hidden"](video)))
        video_text = self.heads["video_text"](F.relu(video_audio))
        return video_audio, self.heads["audio_video"](audio), video_text, self.heads["text_video"](text)

    def pooled(self, modality: str, x: Tensor) -> Tensor:
        seen = F.pad(x != 0, (1, 0), value=True) if modality == "text" else None
        y = self.encoders["shared" if self.shared else modality](self.stems[modality](x), seen)[:, 0]
        return F.gelu(self.projections[modality](y)) if self.shared else y


def linear_norm(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, outputs, bias=False), nn.BatchNorm1d(outputs))


def naive_loss(video_audio: Tensor, audio: Tensor, video_text: Tensor, text: Tensor) -> Tensor:
    """NCE and MIL-NCE, each with its matrix of similarities stored."""
    return (eager(None, video_audio, audio[:, None]) + eager(None, video_text, text)) / 2


def clip_loss(video_audio: Tensor, audio: Tensor, video_text: Tensor, text: Tensor) -> Tensor:
    """open_clip's loss of both pairs, a clip's text being the mean of its candidates."""
    pairs = ((video_audio, audio), (video_text, text.mean(1)))
    unit = [[F.normalize(x.float(), dim=-1) for x in pair] for pair in pairs]
    return sum(open_clip().ClipLoss()(*pair, 1 / TEMPERATURE) for pair in unit) / 2


def plain_weights(state: dict[str, Tensor], config: VATTConfig) -> dict[str, Tensor]:
    """Our model's state_dict by the names and in the layouts of a plain `PeerVATT`."""
    renamed = (
        (r"^backbone\.transformer\.", "encoders.shared."),
        (r"^backbone\.post_projections\.", "projections."),
        (r"^backbone\.stems\.", "stems."),
        (r"^(\w+)\.stem\.", r"stems.\1."),
        (r"^(\w+)\.transformer\.", r"encoders.\1."),
        (r"^text\.relative_bias\.table$", "encoders.text.relative_bias"),
        (r"^text\.", "stems.text."),
        (r"\.attention\.", "."),
    )
    found = {}
    for name, value in state.items():
        for pattern, new in renamed:
            name = re.sub(pattern, new, name)
        if name == "stems.video.patch.weight":
            value = value.unflatten(1, (*config.video.patch, 3)).permute(0, 4, 1, 2, 3)
        found[name] = value[:, None] if name == "stems.audio.patch.weight" else value
    return found


def counted_flops(model: PeerVATT, config: VATTConfig, candidates: int) -> float:
    """FLOPs that torch counts in the model's forward and backward pass, per clip; no loss, nothing is computed."""
    clips = 2
    model = copy.deepcopy(model).to("meta")
    video = torch.empty(clips, config.video.num_frames, *config.video.frame_size, 3, dtype=torch.uint8, device="meta")
    audio = torch.empty(clips, config.audio.num_samples, device="meta")
    text = torch.empty(clips, candidates, config.text.max_words, dtype=torch.int64, device="meta")
    with FlopCounterMode(display=False) as counter:
        sum(y.sum() for y in model(Batch(video=video, audio=audio, text=text))).backward()
    return counter.get_total_flops() / clips


def wasted_flops(config: VATTConfig, candidates: int) -> int:
    """What a peer spends per clip, forward and backward, on tokens that it then drops, and behind its last layer."""
    shared = config.shared if config.backbone == "agnostic" else None
    total, last = 0, [(shared or config.text.transformer, config.text.max_words + 1, candidates)]
    for tower, channels in ((config.video, 3), (config.audio, 1)):
        transformer, num_tokens = shared or tower.transformer, math.prod(tower.grid)
        kept = tower.drop_token.num_kept(num_tokens)
        per_token = 4 * channels * math.prod(tower.patch) + 6 * transformer.dim * tower.pre_projection
        total += (num_tokens - kept) * transformer.dim * per_token
        last.append((transformer, kept + 1, 1))
    for transformer, rows, sequences in last:
        of_all, of_agg = (sum(layer_flops(transformer, rows, agg_only=only)) for only in (False, True))
        total += 3 * sequences * (of_all - of_agg)
    return total


class Peer:
    """A model, a loss and Adam, stepped as in a tutorial.

    Args:
        dtype: bfloat16 for autocast around model and loss.
        compiled: "no", "whole" for torch.compile of model and loss, or "layers" for every layer by itself.
    """

    def __init__(
        self,
        model: PeerVATT,
        loss: Callable[..., Tensor],
        dtype: torch.dtype,
        device: str,
        *,
        compiled: str = "no",
    ):
        self.model, self.loss, self.device = model.to(device).train(), loss, device
        self.half = dtype == torch.bfloat16
        self.optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
        self.call = torch.compile(self.model, dynamic=False) if compiled == "whole" else self.model
        if compiled == "whole":
            self.loss = torch.compile(loss, dynamic=False)
        for module in self.model.modules() if compiled == "layers" else ():
            if isinstance(module, Layer):
                module.compile(dynamic=False)

    def step(self, batch: Batch, mark: Callable[[str], None] = lambda phase: None) -> Tensor:
        """One step; `mark` is told the end of each of its phases."""
        batch = batch.to(self.device)
        mark("data")
        self.optimizer.zero_grad()
        with torch.autocast(self.device, torch.bfloat16, enabled=self.half):
            embeddings = self.call(batch)
            mark("forward")
            loss = self.loss(*embeddings)
        mark("loss")
        loss.backward()
        mark("backward")
        self.optimizer.step()
        mark("optimizer")
        return loss.detach()
