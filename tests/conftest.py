"""Seeds, threads, and the reasons for which marked tests are skipped."""

import os

import pytest
import torch


def pytest_configure(config):
    threads = 1 if "PYTEST_XDIST_WORKER" in os.environ else 2  # small tensors gain nothing from more
    torch.set_num_threads(min(threads, torch.get_num_threads()))


def pytest_collection_modifyitems(config, items):
    # Files go to processes as a whole. Those with slow tests come first, so that none is left to a single process.
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device: torch.cuda.is_available() is False")
    for item in items:
        if item.get_closest_marker("cuda"):  # `keywords` would hold the folders of the path too
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
