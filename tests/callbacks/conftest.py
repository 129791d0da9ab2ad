"""What one test leaves behind, the next one must not find."""

import sys
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def _no_open_run() -> Iterator[None]:
    """Close a run of W&B that a test has left open: it would be taken for that of the next logger in this process."""
    yield
    wandb = sys.modules.get("wandb")
    if wandb is not None and wandb.run is not None:
        wandb.finish()
