"""How a module is told which optimizer to make."""

from collections.abc import Callable, Iterable

from torch.nn import Parameter
from torch.optim import Optimizer

OptimizerFactory = Callable[[Iterable[Parameter]], Optimizer]
"""From parameters to their one optimizer, such as `functools.partial(torch.optim.AdamW, lr=1e-3)`."""
