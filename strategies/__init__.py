"""How a run trains: the bases (one device, DDP, ZeRO) and the techniques that attach to them from outside.

    Trainer(strategy=Zero(stage=2, techniques=[Lookahead(k=5)]), accelerator="cpu", devices=2)

The bases are also registered with Lightning, so that `Trainer(strategy="kexue_zero_2")` works once this package is
imported.
"""

from pytorch_lightning.strategies import StrategyRegistry

from .activation_checkpointing import (
    ActivationCheckpointing,
    checkpoint_blocks,
    follow_plan,
    measured_costs,
    restore_blocks,
)
from .adversarial import FGM, fgm_perturbation, find_embeddings, perturbed, recorded
from .bases import DDP, SingleDevice, auto
from .checkpoints import describe, is_complete, newest
from .ema import EMA, ema_decay, ema_update
from .lookahead import Lookahead, LookaheadOptimizer, lookahead_sync
from .loss_weighting import LossWeighting
from .multi_sample_dropout import MultiSampleDropout, multi_sample_dropout, multi_sample_loss
from .r_drop import RDrop, symmetric_kl
from .recompute_blocks import find_blocks
from .recompute_budget import cheapest
from .recompute_policies import Full, Offload, Selective
from .reshape import load_weights
from .start_from import StartFrom
from .technique import Technique
from .zero import Zero

__all__ = [
    "DDP",
    "EMA",
    "FGM",
    "ActivationCheckpointing",
    "Full",
    "Lookahead",
    "LookaheadOptimizer",
    "LossWeighting",
    "MultiSampleDropout",
    "Offload",
    "RDrop",
    "Selective",
    "SingleDevice",
    "StartFrom",
    "Technique",
    "Zero",
    "auto",
    "cheapest",
    "checkpoint_blocks",
    "describe",
    "ema_decay",
    "ema_update",
    "fgm_perturbation",
    "find_blocks",
    "find_embeddings",
    "follow_plan",
    "is_complete",
    "load_weights",
    "lookahead_sync",
    "measured_costs",
    "multi_sample_dropout",
    "multi_sample_loss",
    "newest",
    "perturbed",
    "recorded",
    "restore_blocks",
    "symmetric_kl",
]


def _register() -> None:
    entries = {
        "kexue_single": (SingleDevice, "One device, with techniques", {}),
        "kexue_ddp": (DDP, "DDP, with techniques", {}),
        **{f"kexue_zero_{n}": (Zero, f"ZeRO stage {n} on GPUs or CPUs", {"stage": n}) for n in (1, 2, 3)},
        "kexue_zero_2_offload": (Zero, "ZeRO stage 2, state in CPU memory", {"stage": 2, "offload_optimizer": True}),
        "kexue_zero_3_offload": (
            Zero,
            "ZeRO stage 3, state and parameters in CPU memory",
            {"stage": 3, "offload_optimizer": True, "offload_parameters": True},
        ),
    }
    for name, (strategy, description, arguments) in entries.items():
        if name not in StrategyRegistry:
            StrategyRegistry.register(name, strategy, description=description, **arguments)


_register()
