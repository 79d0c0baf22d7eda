"""The preferred precision follows what the hardware multiplies fast."""

import pytest
import torch

from vatt_engine.engine.precision import preferred_precision


@pytest.mark.parametrize(("amx", "precision"), [(True, "bf16"), (False, "fp32")])
def test_a_cpu_needs_amx(monkeypatch, amx, precision):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert preferred_precision("cpu") == precision


@pytest.mark.parametrize(("capability", "precision"), [((7, 5), "fp32"), ((8, 0), "bf16"), ((9, 0), "bf16")])
def test_a_gpu_needs_its_tensor_cores(monkeypatch, capability, precision):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert preferred_precision("cuda:1") == precision
