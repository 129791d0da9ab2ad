"""Activation checkpointing: keep less of a block, run what is missing again in the backward pass.

Source: Chen et al., "Training Deep Nets with Sublinear Memory Cost" (arXiv 1604.06174);
Su Jianlin, kexue.fm/archives/7367.
"""

from __future__ import annotations

import fnmatch
import json
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import pytorch_lightning as pl
import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import nn

from ..errors import InputError
from .overrides import Override, override_training_step
from .recompute_budget import cheapest, parse_budget
from .recompute_plan import Measurement, Plan, StepCosts
from .recompute_policies import Full, Measured, Offload, Planned, Policy, Recompute, Selective
from .technique import Technique

Blocks = str | type[nn.Module]
PolicyName = Literal["full", "selective", "offload", "budget"]
PLAN_FILE = "plan.json"


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


def find_blocks(module: nn.Module, blocks: Blocks | Sequence[Blocks] | None = None) -> list[nn.Module]:
    """Find the repeated units of a module, each once, outermost only.

    Args:
        module: Any module.
        blocks: A class, a class name (`"BertLayer"`), a pattern of module names (`"encoder.layer.*"`), or several of
            these. None asks `module.blocks()`.

    Returns:
        The matching modules in the order of `named_modules`; a block inside another one is left to the outer.

    Raises:
        InputError: If nothing matches; the message lists the repeated classes of the module.
    """
    if blocks is None:
        if not callable(getattr(module, "blocks", None)):
            raise InputError(
                f"ActivationCheckpointing(blocks=None): {type(module).__name__} has no blocks(); name them, "
                f"such as ActivationCheckpointing(blocks={_suggestion(module)})."
            )
        return list(dict.fromkeys(module.blocks()))  # type: ignore[operator]
    wanted = [blocks] if isinstance(blocks, str | type) else list(blocks)
    found: list[nn.Module] = []
    inside: set[nn.Module] = set()
    for name, child in module.named_modules():
        if name and child not in inside and any(_matches(name, child, which) for which in wanted):
            found.append(child)
            inside.update(child.modules())
    if not found:
        raise InputError(
            f"ActivationCheckpointing(blocks={blocks!r}): nothing in {type(module).__name__} matches; "
            f"use a class, a class name or a pattern of module names, such as {_suggestion(module)}."
        )
    return found


def _matches(name: str, child: nn.Module, which: Blocks) -> bool:
    if isinstance(which, type):
        return isinstance(child, which)
    return type(child).__name__ == which or fnmatch.fnmatchcase(name, which)


def _suggestion(module: nn.Module) -> str:
    """Name the class most likely meant: the repeated one that holds the most parameters of its own kind."""
    sizes: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for child in module.modules():
        if child is not module and any(True for _ in child.children()):
            counts[type(child).__name__] += 1
            sizes[type(child).__name__] += sum(p.numel() for p in child.parameters())
    repeated = [name for name, _ in sizes.most_common() if counts[name] > 1]
    return repr(repeated[0]) if repeated else '"net.layers.*"'


class ActivationCheckpointing(Technique):
    """Recompute blocks, or most of them, in the backward pass. Card: docs/cards/activation_checkpointing.md.

    Losses and gradients stay the same numbers; stored activations shrink, for up to one more forward pass of the
    blocks.

    Args:
        blocks: Class, class name, pattern of module names, or a list of these; None asks the module's `blocks()`.
        policy: "full" recomputes whole blocks; "selective" all but the results named by `keep`; "offload" whole blocks,
            whose inputs wait in the host's memory; "budget" whatever meets `budget` at the fewest FLOPs.
        every: Recompute one block in so many; not with a budget, which chooses itself.
        keep: For "selective": "products", "narrow" products, or a list of operations, see `Selective`.
        budget: For "budget": what activations may take on a device, as bytes ("2GiB"), or as a share of what they take
            if nothing is recomputed (0.3). The first training step is measured, with whole blocks recomputed; the plan
            is printed and written to `plan.json` in the Trainer's `default_root_dir`.

    Raises:
        ValueError: If an argument is out of range, or has no effect with this policy.
    """

    def __init__(
        self,
        blocks: Blocks | Sequence[Blocks] | None = None,
        policy: PolicyName = "full",
        every: int = 1,
        keep: str | Sequence[str] | None = None,
        budget: float | str | None = None,
    ) -> None:
        if policy not in get_args(PolicyName):
            raise ValueError(
                f"ActivationCheckpointing(policy={policy!r}): use {', '.join(map(repr, get_args(PolicyName)))}."
            )
        if every < 1 or (every > 1 and policy == "budget"):
            raise ValueError(f"ActivationCheckpointing(every={every}): use 1 or more, and 1 with policy='budget'.")
        if keep is not None and policy != "selective":
            raise ValueError(f"ActivationCheckpointing(keep={keep!r}): needs policy='selective'.")
        if (budget is None) == (policy == "budget"):
            raise ValueError(
                f"ActivationCheckpointing(policy={policy!r}, budget={budget!r}): "
                "policy='budget' and budget=0.3 or budget='2GiB' go together."
            )
        self.blocks = blocks
        self.policy: PolicyName = policy
        self.every = every
        self.keep = keep
        self.budget = budget
        self._policy = {"full": Full(), "offload": Offload()}.get(policy) or _selective(keep)
        self._allowed = None if budget is None else parse_budget(budget)
        self._attached: list[nn.Module] = []
        self._override: Override | None = None
        self._plan: Plan | None = None

    def attach(self, module: pl.LightningModule) -> None:
        self._attached = find_blocks(module, self.blocks)[:: self.every]
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
        allowed = self._allowed * costs.plain_bytes if self._allowed <= 1 else self._allowed
        self._plan = cheapest(costs, int(allowed))
        follow_plan(self._attached, self._plan)
        del self._measurement
        if module.trainer.is_global_zero:
            print(self._plan.table())
            path = Path(module.trainer.default_root_dir) / PLAN_FILE
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(self._plan.as_dict(), indent=2) + "\n", encoding="utf-8")
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


def _runs_on_cpu(module: pl.LightningModule) -> bool:
    trainer = module._trainer
    return trainer is not None and trainer.strategy.root_device.type == "cpu"


def _selective(keep: str | Sequence[str] | None) -> Selective:
    return Selective() if keep is None else Selective(keep if isinstance(keep, str) else tuple(keep))
