"""Activation checkpointing: keep less of a block, run what is missing again in the backward pass.

Source: Chen et al., "Training Deep Nets with Sublinear Memory Cost" (arXiv 1604.06174);
Su Jianlin, kexue.fm/archives/7367.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import pytorch_lightning as pl
import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import nn

from .overrides import Override, override_training_step
from .recompute_blocks import Blocks, find_blocks
from .recompute_budget import cheapest, parse_budget
from .recompute_plan import Measurement, Plan, StepCosts
from .recompute_policies import Full, Measured, Offload, Planned, Policy, Recompute, Selective
from .technique import Technique

PolicyName = Literal["full", "selective", "offload", "budget"]
PLAN_FILE = "recompute_plan.json"


def checkpoint_blocks(blocks: Sequence[nn.Module], policy: Policy | None = None) -> None:
    """Recompute each of these modules in the backward pass, from now on.

    Only `forward` of the instance changes: names, `state_dict` keys and classes stay. Random numbers are drawn again
    alike, BatchNorm statistics are updated once, evaluation and `no_grad` run as before, and a module used several
    times (shared layers) is one entry here. Undo with `restore_blocks`.

    Args:
        blocks: Modules, none of them twice.
        policy: What is recomputed: `Full()`, the default, `Selective(keep)` or `Offload()`.

    Raises:
        ValueError: If one of them is checkpointed already.
    """
    for block in blocks:
        if isinstance(block.__dict__.get("forward"), Recompute):
            name = type(block).__name__
            raise ValueError(f"checkpoint_blocks: a {name} is checkpointed already; call restore_blocks first.")
        block.forward = Recompute(block, policy or Full())


def restore_blocks(blocks: Sequence[nn.Module]) -> None:
    """Undo `checkpoint_blocks`; modules that are not checkpointed are left alone."""
    for block in blocks:
        recompute = block.__dict__.get("forward")
        if isinstance(recompute, Recompute):
            del block.__dict__["forward"]
            if recompute.forward != block.forward:  # the instance had a forward of its own
                block.forward = recompute.forward


class ActivationCheckpointing(Technique):
    """Recompute blocks, or most of them, in the backward pass. Card: docs/cards/activation_checkpointing.md.

    Losses and gradients stay the same numbers; stored activations shrink, for up to one more forward pass of the
    blocks.

    Args:
        policy: "full" recomputes whole blocks; "selective" all but the results named by `keep`; "offload" whole blocks,
            whose inputs wait in the host's memory; "budget" whatever meets `budget` at the fewest FLOPs.
        every: Recompute one block in so many; not with a budget, which chooses itself.
        budget: What may be kept for the backward pass on each device: bytes ("2GiB", or a whole number), or a share of
            what is kept if nothing is recomputed (0.3). It makes "budget" the policy. The first training step is
            measured, with whole blocks recomputed; the plan is printed, and written to `recompute_plan.json` in the
            Trainer's `default_root_dir`, the run directory.
        blocks: Class, class name, pattern of module names, or a list of these; None asks the module's `blocks()`.
        keep: For "selective": "products", the default, "narrow" products, or a list of operations, see `Selective`.

    Raises:
        ValueError: If an argument is out of range, or has no effect with this policy.
    """

    def __init__(
        self,
        policy: PolicyName = "full",
        every: int = 1,
        budget: float | str | None = None,
        blocks: Blocks | Sequence[Blocks] | None = None,
        keep: str | Sequence[str] | None = None,
    ) -> None:
        if policy not in get_args(PolicyName):
            raise ValueError(
                f"ActivationCheckpointing(policy={policy!r}): use {', '.join(map(repr, get_args(PolicyName)))}; "
                "modules are chosen with blocks=, such as blocks='BertLayer'."
            )
        if budget is not None and policy == "full":
            policy = "budget"
        if budget is None and policy == "budget":
            raise ValueError("ActivationCheckpointing(policy='budget'): say how much, budget=0.3 or budget='2GiB'.")
        if budget is not None and policy != "budget":
            raise ValueError(
                f"ActivationCheckpointing(policy={policy!r}, budget={budget!r}): "
                "a budget chooses what is recomputed; leave out policy or budget."
            )
        if every < 1 or (every > 1 and policy == "budget"):
            raise ValueError(f"ActivationCheckpointing(every={every}): use 1 or more, and 1 with a budget.")
        if keep is not None and policy != "selective":
            raise ValueError(f"ActivationCheckpointing(keep={keep!r}): needs policy='selective'.")
        self.policy: PolicyName = policy
        self.every = every
        self.budget = budget
        self.blocks = blocks
        self.keep = keep
        self._policy = {"full": Full(), "offload": Offload()}.get(policy) or _selective(keep)
        self._allowed = None if budget is None else parse_budget(budget)
        self._attached: list[nn.Module] = []
        self._override: Override | None = None
        self._plan: Plan | None = None

    def attach(self, module: pl.LightningModule) -> None:
        self._attached = find_blocks(module, self.blocks)[:: self.every]
        _warn_of_one_region(module, self._attached)
        if self._allowed is None:
            if self.policy == "offload" and _runs_on_cpu(module):
                rank_zero_warn(
                    "ActivationCheckpointing(policy='offload') has no effect beyond policy='full' on CPUs: inputs of "
                    "blocks are in the host's memory already."
                )
            checkpoint_blocks(self._attached, self._policy)
            return
        self._plan = None
        self._measurement = Measurement(_named(module, self._attached))
        checkpoint_blocks(self._attached, Measured(self._measurement.note))
        self._override = override_training_step(module, partial(self._step, module))

    def detach(self, module: pl.LightningModule) -> None:
        if self._override is not None:
            self._override.undo()
            self._override = None
        restore_blocks(self._attached)
        self._attached = []

    def _step(self, module: pl.LightningModule, step: Callable[[], Any]) -> Any:
        """Run a training step; the first is measured."""
        if self._plan is not None:
            return step()
        with self._measurement.counting(module):
            outputs = step()
        costs = _largest(self._measurement.costs())
        if not costs.calls:
            return outputs  # the step used none of the blocks
        assert self._allowed is not None
        share = isinstance(self._allowed, float)
        self._plan = cheapest(costs, int(self._allowed * costs.plain_bytes) if share else int(self._allowed))
        follow_plan(self._attached, self._plan)
        del self._measurement
        if module.trainer.is_global_zero:
            path = Path(module.trainer.default_root_dir) / PLAN_FILE
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(self._plan.as_dict(), indent=2) + "\n", encoding="utf-8")
            print(f"{self._plan.table()}\nThe plan lies in {path}.")
        return outputs


def follow_plan(blocks: Sequence[nn.Module], plan: Plan) -> None:
    """Recompute checkpointed blocks as a plan says, from now on; one that the plan does not call, wholly."""
    for number, block in enumerate(blocks):
        calls = plan.of_block(number)
        block.__dict__["forward"].policy = Planned(calls) if calls else Full()


def measured_costs(blocks: Sequence[nn.Module], module: nn.Module, step: Callable[[], Any]) -> StepCosts:
    """What a step of blocks that are not checkpointed costs, found by running it with all of them recomputed.

    Args:
        blocks: Of the module.
        module: Whose parameters and buffers are no activations.
        step: Runs a forward pass, and a backward pass if there is to be one.
    """
    measurement = Measurement(_named(module, blocks))
    checkpoint_blocks(blocks, Measured(measurement.note))
    try:
        with measurement.counting(module):
            step()
    finally:
        restore_blocks(blocks)
    return measurement.costs()


def _largest(costs: StepCosts) -> StepCosts:
    """Of what all processes have measured, that with the most bytes: all of them make the same plan of it."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return costs
    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, costs)
    return max(found, key=lambda one: (bool(one.calls), one.plain_bytes))


def _named(module: nn.Module, blocks: Sequence[nn.Module]) -> dict[str, nn.Module]:
    names = {child: name for name, child in module.named_modules()}
    return {names[block]: block for block in blocks}


def _warn_of_one_region(module: nn.Module, blocks: list[nn.Module]) -> None:
    """Say that recomputing everything at once saves nothing: its activations are all there again in the second run."""
    every = {id(parameter) for parameter in module.parameters()}
    if len(blocks) == 1 and every and every == {id(parameter) for parameter in blocks[0].parameters()}:
        name = next(name for name, child in module.named_modules() if child is blocks[0])
        rank_zero_warn(
            f"ActivationCheckpointing: the one block {name!r} holds all of {type(module).__name__}, so all of its "
            "activations are there at once when it runs again; name the repeated blocks inside it."
        )


def _runs_on_cpu(module: pl.LightningModule) -> bool:
    trainer = module._trainer
    return trainer is not None and trainer.strategy.root_device.type == "cpu"


def _selective(keep: str | Sequence[str] | None) -> Selective:
    return Selective() if keep is None else Selective(keep if isinstance(keep, str) else tuple(keep))
