"""How a run trains: the bases (one device, DDP, ZeRO) and the techniques that attach to them from outside.

    Trainer(strategy=Zero(stage=2, techniques=[Lookahead(k=5)]), accelerator="cpu", devices=2)

The bases are also registered with Lightning, so that `Trainer(strategy="kexue_zero_2")` works once this package is
imported.
"""

from pytorch_lightning.strategies import StrategyRegistry

from .activation_checkpointing import ActivationCheckpointing, checkpoint_blocks, find_blocks, restore_blocks
from .bases import DDP, SingleDevice, auto
from .checkpoints import describe, is_complete, load_weights, newest
from .lookahead import Lookahead, LookaheadOptimizer, lookahead_sync
from .technique import Technique
from .zero import Zero

__all__ = [
    "DDP",
    "ActivationCheckpointing",
    "Lookahead",
    "LookaheadOptimizer",
    "SingleDevice",
    "Technique",
    "Zero",
    "auto",
    "checkpoint_blocks",
    "describe",
    "find_blocks",
    "is_complete",
    "load_weights",
    "lookahead_sync",
    "newest",
    "restore_blocks",
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
