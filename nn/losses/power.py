"""Binary cross entropy of a power of the sigmoid, for labels of which few are positive.

With `p = sigmoid(x)^n` an untrained model starts at 0.5^n, near the share of positives, and positives weigh n times as
much as negatives: no weights of classes are needed.

Source: https://kexue.fm/archives/6671, https://kexue.fm/archives/7161.
"""

import math

import torch
from torch import Tensor

from ...errors import InputError


def power_binary_cross_entropy(logits: Tensor, targets: Tensor, power: float) -> Tensor:
    """Cross entropy of each of `sigmoid(logits) ** power`, in float32 at least; no reduction.

    Finite for all logits: `log p = n logsigmoid(x)`, and `log(1 - p) = log(-expm1(log p))`, which is exact until log p
    itself is lost; well before, its limit `log n - x` takes over.

    Args:
        logits: any shape.
        targets: between 0 and 1, of the same shape.
        power: n, 1 or more.

    Raises:
        InputError: `power` is below 1.
    """
    if power < 1:
        raise InputError(f"power_binary_cross_entropy(power={power}): use 1 or more")
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    log_p = power * torch.nn.functional.logsigmoid(logits)
    far = logits > _FAR
    # Each form sees only logits that it is finite for: torch.where lets a gradient of 0 times infinity through.
    near = torch.log(-torch.expm1(log_p.masked_fill(far, -1.0)))
    log_rest = torch.where(far, math.log(power) - logits, near)
    return -(targets * log_p + (1 - targets) * log_rest)


def power_sigmoid(logits: Tensor, power: float) -> Tensor:
    """The probabilities that go with this loss."""
    return torch.sigmoid(logits) ** power


_FAR = 30.0
"""From here on `log n - x` is exact to within e^-30."""
