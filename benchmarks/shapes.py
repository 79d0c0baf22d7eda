"""The sizes that benchmarks run at, by name: bench files hold none of their own.

`SHAPES[bench][place]` with three places: "cpu" and "cuda" are timed there; "sanitizer" are small and ragged, each run
once on a GPU by benchmarks/sanitize.py, under tools that slow a kernel down a hundred times.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Tokenize:
    """A batch of uint8 clips and the tokens kept of each."""

    batch: int
    frames: int = 32
    size: int = 224
    dim: int = 768
    kept: int = 784
    patch: tuple[int, int, int] = (4, 16, 16)

    @property
    def grid(self) -> tuple[int, int, int]:
        t, h, w = self.patch
        return self.frames // t, self.size // h, self.size // w

    @property
    def tokens(self) -> int:
        t, h, w = self.grid
        return t * h * w

    @property
    def patch_size(self) -> int:
        t, h, w = self.patch
        return t * h * w * 3


@dataclass(frozen=True, kw_only=True)
class DropToken:
    """Tokens to choose from, and how many stay."""

    batch: int
    tokens: int
    kept: int
    dim: int = 768
    per_sample: bool = False  # each sample keeps tokens of its own


@dataclass(frozen=True, kw_only=True)
class Attention:
    """Heads of one layer over the tokens of a batch, AGG included; each sample keeps `kept` of them, or all."""

    batch: int
    tokens: int
    heads: int = 12
    head_dim: int = 64
    kept: int = 0

    @property
    def rows(self) -> int:
        return self.batch * (self.kept or self.tokens)

    @property
    def pairs(self) -> int:
        return self.batch * (self.kept or self.tokens) ** 2


@dataclass(frozen=True, kw_only=True)
class AttentionPacked:
    """The sequences of a batch of clips at 50 % of the video and audio tokens, packed one after the other."""

    batch: int
    video: int = 785
    audio: int = 601
    text: int = 17
    candidates: int = 5
    heads: int = 12
    head_dim: int = 64

    @property
    def runs(self) -> list[tuple[int, int]]:
        """(sequences, their length) of each modality."""
        return [(self.batch, self.video), (self.batch, self.audio), (self.batch * self.candidates, self.text)]

    @property
    def cu_seqlens(self) -> list[int]:
        return [0, *itertools.accumulate(length for count, length in self.runs for _ in range(count))]

    @property
    def rows(self) -> int:
        return sum(count * length for count, length in self.runs)

    @property
    def pairs(self) -> int:
        return sum(count * length**2 for count, length in self.runs)


@dataclass(frozen=True, kw_only=True)
class Block(Attention):
    """One block of a transformer."""

    dim: int = 768
    ff_dim: int = 3072


@dataclass(frozen=True, kw_only=True)
class Backbone(AttentionPacked):
    """A modality-agnostic model cut to `layers`, and its clips per step."""

    model: str = "vatt_ma_base"
    layers: int = 2
    dim: int = 768

    @property
    def weights(self) -> int:
        """Of the shared transformer."""
        return self.layers * 12 * self.dim**2

    @property
    def flops(self) -> int:
        """Forward and backward of the shared transformer alone, whose last layer computes one row of each sequence."""
        sequences = sum(count for count, _ in self.runs)
        layer = 2 * self.rows * 12 * self.dim**2 + 4 * self.pairs * self.dim
        last = 2 * sequences * 12 * self.dim**2 + 4 * self.rows * self.heads * self.dim
        return 3 * ((self.layers - 1) * layer + last)


@dataclass(frozen=True, kw_only=True)
class NCE:
    """Pairs of embeddings, with `candidates` texts each."""

    batch: int
    dim: int
    candidates: int = 1


@dataclass(frozen=True, kw_only=True)
class Step:
    """A model of `vatt_engine.list_models()` and its clips per step, each with `candidates` captions.

    `keep_rate` is DropToken's; `layers` cuts every tower to so many, 0 leaves them.
    """

    model: str
    batch: int
    candidates: int = 5
    keep_rate: float = 0.5
    layers: int = 0


@dataclass(frozen=True, kw_only=True)
class Data:
    """Media files of `seconds`, and what the loader makes of them."""

    files: int
    source: tuple[int, int]  # height and width of the files, in pixels, multiples of 8
    batch: int
    size: int
    fps: int
    frames: int
    seconds: float
    samples: int
    sample_rate: int
    file_fps: int = 0  # of the files; 0: as the clips
    codecs: tuple[str, ...] = ()  # of the shards that the files are prepared into
    epochs: int = 1  # of one measured call


# A model at each share of dropped tokens, with as many clips as its step on 80 GB should hold.
STEPS = {
    f"{model.removeprefix('vatt_').replace('_', '-')}-drop{dropped}": Step(
        model=model, batch=batch, keep_rate=1 - dropped / 100
    )
    for model, batches in {
        "vatt_bbs": (32, 64, 128, 128),
        "vatt_mbs": (32, 32, 64, 128),
        "vatt_lbs": (16, 32, 32, 64),
        "vatt_ma_medium": (32, 32, 64, 128),
    }.items()
    for dropped, batch in zip((0, 25, 50, 75), batches)
}
SHAPES: dict[str, dict[str, dict[str, object]]] = {
    "tokenize": {
        "cpu": {
            "demo": Tokenize(batch=16, frames=8, size=48, dim=128, kept=36, patch=(4, 8, 8)),
            "base": Tokenize(batch=4),
        },
        "cuda": {"base": Tokenize(batch=4), "base-64": Tokenize(batch=64), "medium-64": Tokenize(batch=64, dim=1024)},
        "sanitizer": {
            "aligned": Tokenize(batch=2, frames=8, size=32, dim=128, kept=4, patch=(4, 16, 16)),
            "ragged": Tokenize(batch=3, frames=9, size=37, dim=67, kept=5, patch=(4, 8, 8)),
            "one": Tokenize(batch=1, frames=4, size=16, dim=1, kept=1, patch=(4, 16, 16)),
        },
    },
    "drop_token": {
        "cpu": {
            "demo": DropToken(batch=16, tokens=72, kept=36, dim=128),
            "video": DropToken(batch=4, tokens=1568, kept=784),
        },
        "cuda": {
            "video-64": DropToken(batch=64, tokens=1568, kept=784),
            "video-64-each": DropToken(batch=64, tokens=1568, kept=784, per_sample=True),
            "audio-64": DropToken(batch=64, tokens=1200, kept=600),
        },
        "sanitizer": {
            "ragged": DropToken(batch=3, tokens=37, kept=13, dim=67, per_sample=True),
            "one": DropToken(batch=1, tokens=1, kept=1, dim=1),
        },
    },
    "attention": {
        "cpu": {"demo": Attention(batch=4, tokens=37, heads=4, head_dim=32), "video": Attention(batch=8, tokens=785)},
        "cuda": {
            **{f"{tokens}-64": Attention(batch=64, tokens=tokens) for tokens in (576, 601, 640, 768, 785)},
            **{f"{tokens}-32": Attention(batch=32, tokens=tokens) for tokens in (1201, 1569)},
        },
        "sanitizer": {"ragged": Attention(batch=1, tokens=37, heads=2), "one": Attention(batch=1, tokens=1, heads=1)},
    },
    "attention_dropout": {
        "cpu": {"demo": Attention(batch=64, tokens=37, heads=4, head_dim=32), "video": Attention(batch=4, tokens=785)},
        "cuda": {"785-64": Attention(batch=64, tokens=785)},
        "sanitizer": {"ragged": Attention(batch=1, tokens=37, heads=2)},
    },
    "attention_text": {
        "cpu": {"text": Attention(batch=40, tokens=17, heads=8)},
        "cuda": {"text": Attention(batch=640, tokens=17, heads=8)},
        "sanitizer": {
            "ragged": Attention(batch=3, tokens=37, heads=2),
            "words": Attention(batch=3, tokens=17, heads=2),
        },
    },
    "attention_packed": {
        "cpu": {"1": AttentionPacked(batch=1), "4": AttentionPacked(batch=4)},
        "cuda": {"8": AttentionPacked(batch=8), "128": AttentionPacked(batch=128)},
        "sanitizer": {"ragged": AttentionPacked(batch=2, video=70, audio=37, text=5, candidates=2, heads=2)},
    },
    "attention_keep": {
        "cpu": {"video": Attention(batch=2, tokens=1569, kept=785)},
        "cuda": {"video-32": Attention(batch=32, tokens=1569, kept=785)},
        "sanitizer": {"ragged": Attention(batch=3, tokens=90, kept=67, heads=2)},
    },
    "block": {
        "cpu": {"video": Block(batch=2, tokens=785)},
        "cuda": {
            "video-64": Block(batch=64, tokens=785),
            "video-64-medium": Block(batch=64, tokens=785, dim=1024, ff_dim=4096, heads=16),
        },
    },
    "progressive": {
        "cpu": {"half": Block(batch=2, tokens=785, kept=393), "most": Block(batch=2, tokens=785, kept=707)},
        "cuda": {"half-64": Block(batch=64, tokens=785, kept=393), "most-64": Block(batch=64, tokens=785, kept=707)},
    },
    "packed": {
        "cpu": {str(batch): Backbone(batch=batch) for batch in (1, 2, 4, 8)},
        "cuda": {str(batch): Backbone(batch=batch, layers=12) for batch in (1, 2, 4, 8, 32, 128)},
    },
    "nce": {
        "cpu": {
            "demo": NCE(batch=64, dim=128, candidates=5),
            "video-audio": NCE(batch=1024, dim=512),
            "video-text": NCE(batch=1024, dim=256, candidates=5),
            "large": NCE(batch=4096, dim=512),
        },
        "cuda": {
            "video-audio": NCE(batch=1024, dim=512),
            "video-text": NCE(batch=1024, dim=256, candidates=5),
            "large": NCE(batch=16384, dim=512),
        },
        "sanitizer": {"ragged": NCE(batch=37, dim=67, candidates=3), "one": NCE(batch=1, dim=16)},
    },
    "nce_symmetric": {
        "cpu": {"16k": NCE(batch=16384, dim=512)},
        "cuda": {"64k": NCE(batch=65536, dim=512), "64k-768": NCE(batch=65536, dim=768)},
        "sanitizer": {"ragged": NCE(batch=131, dim=24)},
    },
    "step": {
        "cpu": {"tiny": Step(model="vatt_tiny", batch=16), "base-2": Step(model="vatt_bbs", batch=4, layers=2)},
        "cuda": {"tiny": Step(model="vatt_tiny", batch=16), **STEPS},
    },
    "data": {
        "cpu": {
            "demo": Data(
                files=64,
                source=(64, 64),
                batch=16,
                size=48,
                fps=10,
                frames=8,
                seconds=1.4,
                samples=9600,
                sample_rate=12000,
            ),
            "base": Data(
                files=16,
                source=(256, 336),
                batch=8,
                size=224,
                fps=10,
                frames=32,
                seconds=4.0,
                samples=153_600,
                sample_rate=48_000,
            ),
            "720p": Data(
                files=4,
                source=(720, 1280),
                batch=4,
                size=224,
                fps=10,
                frames=32,
                seconds=24.0,
                samples=153_600,
                sample_rate=48_000,
                file_fps=30,
                epochs=6,
                codecs=("h264", "vp9", "mjpeg"),
            ),
        },
    },
}
NCE_MEMORY = [NCE(batch=batch << 10, dim=64) for batch in (4, 8, 16, 32, 64)]  # of one curve
NCE_LARGEST = NCE(batch=131_072, dim=512)  # that a CPU is asked for
SHAPES["sample_keep"] = SHAPES["drop_token"]
