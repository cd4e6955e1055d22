from __future__ import annotations

import pytest
import torch


@pytest.fixture
def ids() -> torch.Tensor:
    """(2, 10) token ids for the models of `tiny_models`."""
    return torch.randint(3, 99, (2, 10), generator=torch.Generator().manual_seed(3))
