"""Lightning's own DeepSpeed strategy, the peer of `Zero`: unchanged but for its refusal of CPUs."""

from __future__ import annotations

import torch
from lightning_fabric.utilities.seed import reset_seed
from pytorch_lightning.strategies import DeepSpeedStrategy


class StockOnCPU(DeepSpeedStrategy):
    """Lightning's strategy as it is, allowed to run on CPUs."""

    @property
    def root_device(self) -> torch.device:
        return torch.device("cpu", self.local_rank)

    def setup_environment(self) -> None:
        super(DeepSpeedStrategy, self).setup_environment()

    def setup_distributed(self) -> None:
        reset_seed()
        self.set_world_ranks()
        self._init_deepspeed_distributed()
