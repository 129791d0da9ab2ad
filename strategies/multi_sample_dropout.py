"""Multi-sample dropout: several dropout masks over the features of one forward pass, all through the same head.

Shapes: M samples, B batch, C classes.

Two different things go by this name.  The paper averages the M losses: the expected loss and gradient stay those of
plain dropout, and the noise of the masks in the gradient falls to 1/M.  Much NLP code averages the M logits instead:
as M grows that approaches no dropout at all, so it regularises less.

Source: Inoue, "Multi-Sample Dropout for Accelerated Training and Better Generalization" (arXiv 1905.09788).
Checked against: plain dropout run M times, and the closed forms of mean and variance
(tests/strategies/test_multi_sample_dropout.py).
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, get_args

import pytorch_lightning as pl
import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import InputError
from .overrides import Override, override_training_step
from .technique import Technique

Reduction = Literal["mean_loss", "mean_logits", "mean_prob"]


def multi_sample_dropout(
    features: Tensor, num_samples: int, p: float, generator: torch.Generator | None = None
) -> Tensor:
    """Drop features under independent masks, all drawn in one call.

    Args:
        features: What the head takes, `(B, ...)`.
        num_samples: M.
        p: Share of the features to drop, from 0 to below 1.
        generator: Source of the masks, 16 random bits a feature, on a CPU some ten times as fast as dropout. None:
            torch's own, and the masks that as many calls of `dropout` would draw.

    Returns:
        The samples one after another, folded into the batch, `(M * B, ...)`.

    Raises:
        ValueError: If `num_samples` or `p` is out of range.
    """
    _check("multi_sample_dropout", num_samples, p)
    shape = (num_samples, *features.shape)
    if generator is None:
        kept, share = torch.empty(shape, dtype=torch.bool, device=features.device).bernoulli_(1 - p), 1 - p
    else:
        kept, share = _keep(shape, p, generator)
    return (features * (1 / share) * kept).flatten(0, 1)


def _keep(shape: Sequence[int], p: float, generator: torch.Generator) -> tuple[Tensor, float]:
    """Which features stay, and the exact share that does on average: a multiple of 2 ** -16."""
    count = max(1, round((1 - p) * 2**16))
    size = math.prod(shape)
    words = torch.empty(-(-size // 4), dtype=torch.int64, device=generator.device)
    words.random_(-(2**63), None, generator=generator)  # all 64 bits
    kept = words.view(torch.int16)[:size] <= count - 2**15 - 1
    return kept.view(shape), count / 2**16


def multi_sample_loss(
    loss_fn: Callable[[Tensor, Tensor], Tensor], logits: Tensor, target: Tensor, reduction: Reduction = "mean_loss"
) -> Tensor:
    """Compute one loss from the logits of all samples, in float32.

    `loss_fn` sees one sample, or one average, at a time, so a sum, a mean over tokens that are not ignored, or a loss
    that compares the rows of a batch mean what they mean without samples.

    Args:
        loss_fn: Loss of logits `(B, ..., C)` and target.
        logits: `(M * B, ..., C)`, as a head makes them from `multi_sample_dropout`; `(B, ..., C)` is one sample.
        target: `(B, ...)`.
        reduction: "mean_loss": the mean of the M losses (the paper); "mean_logits": the loss of the mean logits;
            "mean_prob": the loss of the logarithm of the mean of `softmax(logits, -1)`.

    Raises:
        InputError: If the rows of `logits` are not a multiple of those of `target`, or for another reduction.
    """
    if reduction not in get_args(Reduction):
        raise InputError(f"multi_sample_loss(reduction={reduction!r}): use one of {', '.join(get_args(Reduction))}.")
    if len(logits) % len(target):
        raise InputError(
            f"multi_sample_loss: {len(logits)} rows of logits are not a multiple of {len(target)} rows of target; "
            "give the logits of all samples and the target once."
        )
    samples = _in_float32(logits).unflatten(0, (-1, len(target)))
    if reduction == "mean_loss":
        return torch.stack([loss_fn(sample, target) for sample in samples]).mean(0)
    return loss_fn(_average(samples, reduction), target)


def _in_float32(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _average(samples: Tensor, reduction: Reduction) -> Tensor:
    """One set of logits `(B, ..., C)` of the samples' `(M, B, ..., C)`."""
    if reduction == "mean_logits":
        return samples.mean(0)
    return samples.log_softmax(-1).logsumexp(0) - math.log(len(samples))


class MultiSampleDropout(Technique):
    """Several dropout masks over the features in front of the head. Card: docs/cards/multi_sample_dropout.md.

    A module that offers `head` and `task_losses(features, batch)` gets the mean of its losses over the samples. Any
    other module, and any head that is named, gets one head call on all samples and the mean of their logits. The rest
    of the module runs once. Evaluation is the plain head.

    Args:
        num_samples: Masks per step, 1 or more.
        p: Share of the features to drop, from 0 to below 1; 0 is no dropout.
        head: Pattern of module names (`"bert.classifier"`, `"*_head"`); None: the module's `head`.
        reduction: "mean_loss" by `task_losses`; "mean_logits" or "mean_prob" by the output of the head; None: the
            first where the module offers it and no head is named, else the second.

    Raises:
        ValueError: If an argument is out of range, or "mean_loss" is asked of a named head.
    """

    def __init__(
        self, num_samples: int = 8, p: float = 0.5, head: str | None = None, reduction: Reduction | None = None
    ) -> None:
        _check("MultiSampleDropout", num_samples, p)
        if reduction is not None and reduction not in get_args(Reduction):
            raise ValueError(f"MultiSampleDropout(reduction={reduction!r}): use {', '.join(get_args(Reduction))}.")
        if reduction == "mean_loss" and head is not None:
            raise ValueError(
                f"MultiSampleDropout(head={head!r}, reduction='mean_loss'): losses come from the module's "
                "task_losses and its own head; leave one of the two out."
            )
        self.num_samples = num_samples
        self.p = p
        self.head = head
        self.reduction: Reduction | None = reduction
        self._undo: list[Callable[[], None]] = []
        self._used = False

    def attach(self, module: pl.LightningModule) -> None:
        if self.p == 0:
            rank_zero_warn("MultiSampleDropout(p=0) drops nothing: all samples are equal, so the plain head runs.")
            return
        offers_losses = callable(getattr(module, "task_losses", None))
        reduction = self.reduction or ("mean_loss" if offers_losses and self.head is None else "mean_logits")
        if reduction == "mean_loss" and not offers_losses:
            raise InputError(
                f"MultiSampleDropout(reduction='mean_loss'): {type(module).__name__} has no task_losses(features, "
                "batch); add it, or use reduction='mean_logits'."
            )
        heads = self._heads(module)
        self._used = False
        if reduction == "mean_loss":
            losses = partial(self._mean_losses, module, module.task_losses)  # type: ignore[arg-type]
            self._undo.append(Override(module, "task_losses", losses).undo)
        else:
            for head in heads:
                before = head.register_forward_pre_hook(partial(self._drop_inputs, module), with_kwargs=True)
                after = head.register_forward_hook(partial(self._average_outputs, reduction))
                self._undo += [before.remove, after.remove]
        self._undo.append(override_training_step(module, partial(self._check_used, module)).undo)

    def detach(self, module: pl.LightningModule) -> None:
        while self._undo:
            self._undo.pop()()

    def _heads(self, module: pl.LightningModule) -> dict[nn.Module, str]:
        """The heads with their names."""
        heads: dict[nn.Module, str] = {}
        inside: set[nn.Module] = set()
        if self.head is None and isinstance(getattr(module, "head", None), nn.Module):
            heads[module.head] = "head"  # type: ignore[index]
        elif self.head is not None:
            for name, part in module.named_modules():
                if part not in inside and fnmatch.fnmatchcase(name, self.head):
                    heads[part] = name
                    inside.update(part.modules())
        if not heads:
            linear = [name for name, part in module.named_modules() if isinstance(part, nn.Linear)]
            missing = "has no head" if self.head is None else f"has no module of that name (head={self.head!r})"
            raise InputError(
                f"MultiSampleDropout: {type(module).__name__} {missing}; name it, such as "
                f"MultiSampleDropout(head={(linear or ['classifier'])[-1]!r})."
            )
        for head, name in heads.items():
            if any(isinstance(part, _BatchNorm) for part in head.modules()):
                raise InputError(
                    f"MultiSampleDropout: the head {name!r} holds a BatchNorm, which would mix the samples and count "
                    "every batch several times; use LayerNorm or GroupNorm there, or name the part after it."
                )
        return heads

    def _drop(self, module: pl.LightningModule, features: Tensor) -> Tensor:
        # Lightning gives all processes one seed, and each its own masks are wanted. The seed of the masks comes from
        # torch's generator, which every process draws from alike, and which checkpoints hold.
        seed = int(torch.randint(2**62, ())) + module.global_rank
        generator = torch.Generator(features.device).manual_seed(seed)
        return multi_sample_dropout(features, self.num_samples, self.p, generator)

    def _mean_losses(
        self,
        module: pl.LightningModule,
        task_losses: Callable[[Tensor, Any], Mapping[str, Tensor]],
        features: Tensor,
        batch: Any,
    ) -> Mapping[str, Tensor]:
        """Stand for `task_losses`: called for every sample, so that any loss over a batch stays what it is."""
        self._used = True
        if not module.training:
            return task_losses(features, batch)
        samples = self._drop(module, features).unflatten(0, (self.num_samples, -1))
        losses = [task_losses(sample, batch) for sample in samples]
        return {task: torch.stack([each[task] for each in losses]).mean(0) for task in losses[0]}

    def _drop_inputs(
        self, module: pl.LightningModule, head: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Fold the samples into the batch of every tensor that the head takes, the first of them dropped."""
        self._used = True
        if not head.training:
            return None
        names = [*range(len(args)), *kwargs]
        values = dict(zip(names, [*args, *kwargs.values()], strict=True))
        tensors = [name for name in names if isinstance(values[name], Tensor)]
        if not tensors or not values[tensors[0]].is_floating_point():
            raise InputError(
                f"MultiSampleDropout: the first tensor that the head {type(head).__name__} takes are not features; "
                "name a module that takes them first."
            )
        rows = len(values[tensors[0]])
        folded = {name: self._repeat(head, value, rows) for name, value in values.items()}
        folded[tensors[0]] = self._drop(module, values[tensors[0]])
        return tuple(folded[place] for place in range(len(args))), {name: folded[name] for name in kwargs}

    def _repeat(self, head: nn.Module, value: Any, rows: int) -> Any:
        """Another argument for all samples; a tensor that has no batch, and is not broadcast, could mean anything."""
        if isinstance(value, list | tuple | dict) or (
            isinstance(value, Tensor) and value.ndim > 0 and len(value) not in (1, rows)
        ):
            what = f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
            raise InputError(
                f"MultiSampleDropout: the head {type(head).__name__} also takes {what}, which is not one row for each "
                f"of the batch's {rows}; name a part of the head that takes the features alone."
            )
        if not isinstance(value, Tensor) or value.ndim == 0 or len(value) != rows:
            return value
        return value.expand(self.num_samples, *value.shape).flatten(0, 1)

    def _average_outputs(self, reduction: Reduction, head: nn.Module, args: Any, output: Any) -> Any:
        """Make one output of the samples'."""
        if not head.training:
            return output
        if isinstance(output, tuple | list):
            return type(output)(self._average_outputs(reduction, head, args, part) for part in output)
        if isinstance(output, dict):
            return {name: self._average_outputs(reduction, head, args, part) for name, part in output.items()}
        if not isinstance(output, Tensor):
            raise InputError(
                f"MultiSampleDropout(reduction={reduction!r}): the head {type(head).__name__} returns a "
                f"{type(output).__name__}, of which there is no mean; name a part of it that returns tensors."
            )
        samples = _in_float32(output).unflatten(0, (self.num_samples, -1))
        return _average(samples, reduction).to(output.dtype)

    def _check_used(self, module: pl.LightningModule, step: Callable[[], Any]) -> Any:
        outputs = step()
        if not self._used:
            raise InputError(
                f"MultiSampleDropout: the training_step of {type(module).__name__} called neither task_losses nor the "
                "head, so nothing was dropped; name the module that it calls, MultiSampleDropout(head=...)."
            )
        return outputs


def _check(owner: str, num_samples: int, p: float) -> None:
    if num_samples < 1:
        raise ValueError(f"{owner}(num_samples={num_samples}): use 1 or more.")
    if not 0.0 <= p < 1.0:
        raise ValueError(f"{owner}(p={p}): use a number from 0 to below 1.")
