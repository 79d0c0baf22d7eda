"""Monitors show what they are for."""

from __future__ import annotations

import math
import mmap

import pytest
import torch

from vatt_engine.engine.monitors import memory, peak_flops, spread


def test_spread_shows_collapse():
    torch.manual_seed(0)
    healthy = torch.randn(512, 16)
    assert spread(healthy)["rank"] > 15.5
    assert spread(healthy)["std"] == pytest.approx(1 / math.sqrt(16), rel=0.02)
    one_point = spread(torch.randn(1, 16).expand(64, 16) * torch.rand(64, 1))
    assert one_point["rank"] == pytest.approx(1.0, abs=2e-3)
    assert one_point["std"] == pytest.approx(0.0, abs=1e-6)
    plane = torch.randn(512, 2) @ torch.randn(2, 16)  # dimensional collapse, which the loss does not show
    assert 1.5 < spread(plane)["rank"] < 2.01


def test_effective_rank_is_the_definition():
    x = torch.tensor([[3.0, 0.0], [0.0, 1.0], [0.0, 2.0]])  # rows of length 1: singular values 1 and sqrt(2)
    p = torch.tensor([1.0, math.sqrt(2)]) / (1 + math.sqrt(2))
    assert spread(x)["rank"] == pytest.approx(float(torch.exp(-(p * p.log()).sum())), abs=1e-3)
    assert spread(x.reshape(3, 1, 2)) == spread(x)


def test_a_sum_that_is_no_number_is_shown_as_such():
    assert all(map(math.isnan, spread(torch.tensor([[1.0, math.nan], [1.0, 2.0]])).values()))


def test_peak_flops_go_by_the_name_of_the_gpu(monkeypatch):
    found = {}
    for name in ("NVIDIA H200", "NVIDIA A100-SXM4-80GB", "NVIDIA GH200 480GB", "Tesla T4"):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _, name=name: name)
        found[name] = peak_flops(torch.device("cuda")) / 1e12
    assert list(found.values()) == [989, 312, 989, 0]


def test_memory_sees_what_is_allocated():
    before = memory(torch.device("cpu"))["rss_mb"]
    block = torch.frombuffer(mmap.mmap(-1, 64 << 20), dtype=torch.uint8).fill_(1)  # not what the heap may have left
    assert 50 < memory(torch.device("cpu"))["rss_mb"] - before < 80
    assert block[-1] == 1
