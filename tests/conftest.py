"""Fixtures that several test files ask for by name."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def seeded() -> None:
    """Draw the same random numbers in every test: `pytestmark = pytest.mark.usefixtures("seeded")`."""
    torch.manual_seed(0)
