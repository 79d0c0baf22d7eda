"""Seeds, threads, and the reasons for which marked tests are skipped."""

import pytest
import torch


def pytest_configure(config):
    torch.set_num_threads(min(2, torch.get_num_threads()))  # small tensors gain nothing from more


def pytest_collection_modifyitems(config, items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device: torch.cuda.is_available() is False")
    for item in items:
        if item.get_closest_marker("cuda"):  # `keywords` would hold the folders of the path too
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
