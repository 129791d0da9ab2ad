"""Products with weight matrices.  Shapes: R rows, D features, V outputs."""

import torch
from torch import Tensor
from torch.nn import functional as F

FEW = 4


def linear(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Map `(..., D)` to `(..., V)` with a weight `(V, D)`: `torch.nn.functional.linear`, quick for few rows as well.

    Generation on a CPU multiplies one row, or a few, with every matrix. Computed as `x W^T`, BLAS libraries read the
    matrix slowly then; `(W x^T)^T` takes down to a fifth of the time (benchmarks/transformer.py, part products). That
    pays for two and three rows always, and for one and four before a wide matrix. One row counts twice: alone, it
    would take their path for vectors, as slow as the first.
    """
    if not inputs.is_cpu or torch.is_grad_enabled() or inputs.dtype != torch.float32:
        return F.linear(inputs, weight, bias)
    rows = inputs.numel() // inputs.shape[-1]
    if not (rows in (2, 3) or (1 <= rows <= FEW and weight.shape[0] >= 2 * weight.shape[1])):
        return F.linear(inputs, weight, bias)
    left = inputs.reshape(rows, -1)
    right = left if rows > 1 else torch.cat((left, left))
    products = torch.mm(weight, right.t())[:, :rows].t().contiguous()
    if bias is not None:
        products += bias
    return products.view(*inputs.shape[:-1], -1)
