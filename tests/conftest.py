"""Settings that must hold before torch is imported, and one seed for every test."""

from __future__ import annotations

import os

# One thread: with a second busy process two threads are many times slower. Offline: no test may look for a hub.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["MPLBACKEND"] = "agg"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed() -> int:
    """The same random numbers for a test whether it runs alone, in another order or in another process."""
    torch.manual_seed(0)
    return 0
