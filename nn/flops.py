"""FLOPs of operations while they run, and which operations are products.

Source: torch.utils.flop_counter.  Checked against: hand counts, and torch's own counter on attention computed plainly
(tests/analysis/test_step_cost.py, test_transformer_cost.py).
"""

import math
from functools import cache
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

aten = torch.ops.aten

KEPT_PRODUCTS = [
    aten.mm.default,
    aten.addmm.default,
    aten.bmm.default,
    aten.baddbmm.default,
    aten.convolution.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
    aten._flash_attention_forward.default,
    aten._efficient_attention_forward.default,
]
"""Matrix products, convolutions and attention kernels: what selective recomputation keeps the results of."""


def attention_flops(query: torch.Size, key: torch.Size, value: torch.Size, *_: Any, **__: Any) -> int:
    """FLOPs of softmax attention, the whole square: scores and weighted sum."""
    *tables, queries, size = query
    return 2 * math.prod(tables) * queries * key[-2] * (size + value[-1])


def attention_backward_flops(
    _: torch.Size, query: torch.Size, key: torch.Size, value: torch.Size, *__: Any, **___: Any
) -> int:
    """FLOPs of its backward pass: the scores again, and gradients of weights, queries, keys and values."""
    *tables, queries, size = query
    return 2 * math.prod(tables) * queries * key[-2] * (3 * size + 2 * value[-1])


# torch's counter knows the attention kernels of GPUs only.
CPU_ATTENTION = {
    aten._scaled_dot_product_flash_attention_for_cpu: attention_flops,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward_flops,
}


def flop_counter() -> FlopCounterMode:
    """torch's counter of FLOPs, which also knows the attention kernel of CPUs."""
    return FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION)


@cache
def is_product(operation: Any) -> bool:
    """Whether this operation counts FLOPs: a matrix product, a convolution, or attention."""
    return getattr(operation, "overloadpacket", None) in _formulas()


def flops_of(operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> int:
    """FLOPs of a product that has run."""
    return _formulas()[operation.overloadpacket](*args, **kwargs, out_val=result)


@cache
def _formulas() -> dict[Any, Any]:
    return flop_counter().flop_registry
