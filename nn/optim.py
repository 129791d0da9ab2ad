"""How a module is told which optimizer to make, and how it gives parts of itself rates of their own."""

from collections.abc import Callable, Iterable
from typing import Any

from torch.nn import Parameter
from torch.optim import Optimizer

OptimizerFactory = Callable[[Iterable[Parameter]], Optimizer]
"""From parameters to their one optimizer, such as `functools.partial(torch.optim.AdamW, lr=1e-3)`."""


def with_rates(
    factory: OptimizerFactory,
    named: Iterable[tuple[str, Parameter]],
    rate_of: Callable[[str], float] = lambda name: 1.0,
    *,
    spare_biases: bool = False,
) -> Optimizer:
    """Make one optimizer whose groups have learning rates of their own; every parameter is in exactly one.

    Args:
        factory: makes it.
        named: the parameters with their names.
        rate_of: from a name to its learning rate, in units of the factory's.
        spare_biases: no weight decay for vectors: biases and the gains of norms.
    """
    groups: dict[tuple[float, bool], list[Parameter]] = {}
    for name, parameter in named:
        # ZeRO stage 3 leaves a parameter without its shape, and keeps that elsewhere.
        vector = len(getattr(parameter, "ds_shape", parameter.shape)) == 1
        if parameter.requires_grad:
            groups.setdefault((rate_of(name), spare_biases and vector), []).append(parameter)
    given: Any = [
        {"params": members, **({"weight_decay": 0.0} if spared else {})} for (_, spared), members in groups.items()
    ]
    optimizer = factory(given)
    for group, (rate, _) in zip(optimizer.param_groups, groups, strict=True):
        group["lr"] *= rate
    return optimizer
