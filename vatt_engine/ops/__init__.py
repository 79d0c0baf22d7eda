"""The ops of the engine: one door each, implementations behind `vatt_engine.dispatch`."""

from vatt_engine.ops.attention import attention
from vatt_engine.ops.drop_token import drop_token, sample_keep
from vatt_engine.ops.dropout import dropout
from vatt_engine.ops.linear import linear
from vatt_engine.ops.nce import mil_nce, nce
from vatt_engine.ops.tokenize import tokenize_video, tokenize_waveform

__all__ = [
    "attention",
    "drop_token",
    "dropout",
    "linear",
    "mil_nce",
    "nce",
    "sample_keep",
    "tokenize_video",
    "tokenize_waveform",
]
