"""Loss weighting from the gradients: weights as functions of their Gram matrix.  Shapes: T tasks.

`gram[i, j]` is the inner product of the gradients of losses i and j on what the tasks share, parameters or features;
every function returns the weights of the losses `(T,)`. The functions compute in the matrix's dtype, best float64, and
on its device. A task without a gradient (missing from the batch, or behind a head of zeros) gets weight 0.

Source: Su Jianlin, kexue.fm/archives/8870, 8896 and 8907 (gradient norm, MGDA, priority); Sener and Koltun, arXiv
1810.04650 (MGDA); Yu et al., arXiv 2001.06782 (PCGrad); Liu et al., arXiv 2110.14048 (CAGrad); Liu et al., "Towards
Impartial Multi-Task Learning", ICLR 2021 (IMTL); Chen et al., arXiv 1711.02257 (GradNorm); Lawson and Hanson, "Solving
Least Squares Problems", 1974 (the active set).  Checked against: scipy's nnls and SLSQP, and torchjd.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def cosines(gram: Tensor) -> Tensor:
    """Return the cosines `(T, T)` between the gradients; NaN beside a gradient of zero."""
    norms = gram.diagonal().sqrt()
    return gram / (norms[:, None] * norms)


def nonnegative_minimum(matrix: Tensor, vector: Tensor) -> Tensor:
    """Return the x >= 0 that minimises `x·matrix·x / 2 - vector·x`, exactly, by an active set.

    With `matrix = AᵀA` and `vector = Aᵀb` these are nonnegative least squares. Every round solves one linear system in
    which the variables held at 0 are masked, so that a GPU is never waited for; on a CPU, where looking is free, the
    rounds end early, and there are none where all variables turn out above 0.

    Args:
        matrix: Symmetric and positive semidefinite `(T, T)`, entries of similar size.
        vector: `(T,)`.
    """
    identity = torch.eye(len(vector), dtype=matrix.dtype, device=matrix.device)
    matrix = matrix + 1e-14 * identity  # two equal gradients in the active set leave a system that can be solved
    sizes, order = matrix.abs(), torch.arange(len(vector), device=matrix.device)
    on_cpu = matrix.device.type == "cpu"
    if on_cpu:
        inside = torch.linalg.solve_ex(matrix, vector)[0]
        error = (vector - matrix @ inside).abs() - 1e-12 * (vector.abs() + sizes @ inside)
        if bool(((inside > 0) & (error <= 0)).all()):
            return inside
    x, free = torch.zeros_like(vector), torch.zeros_like(vector, dtype=torch.bool)
    for _ in range(4 * len(vector)):
        system = torch.where(free[:, None] & free, matrix, identity)
        target = torch.linalg.solve_ex(system, torch.where(free, vector, 0.0))[0]
        blocked = free & (target <= 0)
        # The share of the way to the target at which each variable reaches 0; the first to do so is held there.
        reach = torch.where(blocked, torch.where(x > 0, x / (x - target), 0.0), math.inf)
        share = reach.min().clamp(max=1.0)
        free = free & ~(blocked & (reach <= share))
        x = torch.where(free, x + share * (target - x), 0.0)
        # At the minimum over the free variables, the one that falls fastest is set free.
        slope = vector - matrix @ x
        noise = 1e-12 * (vector.abs() + sizes @ x)
        gain = torch.where(free | (slope <= noise), 0.0, slope)
        held = blocked.any()
        enters = (order == gain.argmax()) & (gain > 0) & ~held
        free = free | enters
        if on_cpu and not held and not enters.any():
            break
    return x


def priority_weights(gram: Tensor, main: Sequence[int]) -> Tensor:
    """Return the weights of the shortest `sum of alpha_i g_i + sum of lambda_j g_j`, main tasks i, auxiliaries j.

    The alphas lie on the simplex, the lambdas are nonnegative. The direction raises no auxiliary loss, and lowers the
    main ones as far as that allows; with one main task its weight is 1.

    Args:
        gram: `(T, T)`.
        main: Indices of the main tasks, one or more.
    """
    norms = gram.diagonal().sqrt()
    active = norms > 0
    inverse = torch.where(active, 1 / norms, 0.0)  # of gradients of length 1, the solver sees cosines only
    is_main = torch.zeros_like(norms).index_fill(0, torch.tensor(list(main), device=gram.device), 1.0) * active
    # The simplex becomes a penalty (1 - sum of alphas)^2: the solution is a multiple of the one on the simplex.
    side = is_main * inverse
    side = side / side.max().clamp(min=torch.finfo(gram.dtype).tiny)
    x = nonnegative_minimum(gram * inverse * inverse[:, None] + side * side[:, None], side) * inverse
    return x / (x * is_main).sum().clamp(min=torch.finfo(gram.dtype).tiny)


def min_norm_weights(gram: Tensor) -> Tensor:
    """Return the weights on the simplex of the shortest combination of the gradients (MGDA).

    Every gradient has at least the square of its length as inner product with it; where it is 0, no step lowers all.
    """
    return priority_weights(gram, range(len(gram)))


def gradient_norm_weights(gram: Tensor, keep_length: bool = False) -> Tensor:
    """Return 1 / norm for each gradient.

    Args:
        gram: `(T, T)`.
        keep_length: Multiply by the mean norm, for optimisers that are sensitive to the length of a step.
    """
    norms = gram.diagonal().sqrt()
    weights = torch.where(norms > 0, 1 / norms, 0.0)
    return weights * (norms.sum() / (norms > 0).sum().clamp(min=1)) if keep_length else weights


def pcgrad_weights(gram: Tensor, generator: torch.Generator) -> Tensor:
    """Return the weights that PCGrad comes to: each gradient loses what opposes the others, in random order, then sum.

    Args:
        gram: `(T, T)`.
        generator: On the CPU; source of the orders.
    """
    count = len(gram)
    squares = gram.diagonal()
    inverse = torch.where(squares > 0, 1 / squares, 0.0)
    total = torch.zeros_like(squares)
    for i in range(count):
        weights = torch.zeros_like(squares)
        weights[i] = 1.0
        for j in torch.randperm(count, generator=generator).tolist():
            if j != i:
                weights[j] -= (gram[j] @ weights).clamp(max=0.0) * inverse[j]
        total = total + weights
    return total * (squares > 0)


def cagrad_weights(gram: Tensor, c: float = 0.4) -> Tensor:
    """Return the weights of the direction within `c * norm(mean)` of the mean gradient that serves the worst task best.

    It is `mean + c * norm(mean) * v / norm(v)`, where v on the simplex minimises `v·mean + c * norm(mean) * norm(v)`.
    For a given norm r, v is the point of the hull nearest to `-mean * r / (c * norm(mean))`; for given tasks in v, r
    has a closed form. So the two are found in turn, within bounds that shrink.

    Args:
        gram: `(T, T)`.
        c: 0 is the mean; the larger, the nearer to MGDA's direction. Below 1 it converges to a minimum of the mean.
    """
    active = gram.diagonal() > 0
    mean = active.to(gram.dtype) / active.sum().clamp(min=1)
    products = gram @ mean
    length = (mean @ products).clamp(min=0.0).sqrt()
    largest = gram.diagonal().max().sqrt()
    radius = c * length
    if c == 0 or length <= 1e-12 * largest:
        return mean
    low, high, r = 1e-8 * largest, largest, length
    weights, norm = mean, length
    for _ in range(50):
        shift = r / radius
        shifted = gram + shift * (products[:, None] + products) + (shift * length) ** 2
        weights = min_norm_weights(torch.where(active[:, None] & active, shifted, 0.0))
        norm = (weights @ gram @ weights).clamp(min=0.0).sqrt()
        if (norm - r).abs() <= 1e-9 * r:
            break
        low, high = (r, high) if norm > r else (low, r)
        r = _norm_on(weights > 0, gram, products, radius)
        if not low < r < high:
            r = (low * high).sqrt()
    # A hull that holds 0 has no such direction: no step lowers all losses.
    return mean + torch.where(norm > 1e-7 * largest, radius / norm, 0.0) * weights


def _norm_on(support: Tensor, gram: Tensor, products: Tensor, radius: Tensor) -> Tensor:
    """Return the norm of CAGrad's v if these are the tasks in it; NaN where they cannot be."""
    identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    right = torch.stack([support.to(gram.dtype), torch.where(support, products, 0.0)], 1)
    solved = torch.linalg.solve_ex(torch.where(support[:, None] & support, gram, identity), right)[0]
    (ones, cross), (_, own) = right.T @ solved
    return radius / (cross**2 - ones * (own - radius**2)).sqrt()


def imtl_g_weights(gram: Tensor) -> Tensor:
    """Return the weights, of sum 1 and any sign, whose combination has the same projection on every gradient."""
    norms = gram.diagonal().sqrt()
    active = (norms > 0).to(gram.dtype)
    inverse = torch.where(norms > 0, 1 / norms, 0.0)
    scaled = gram * inverse * inverse[:, None]
    solution = torch.linalg.pinv(scaled, hermitian=True) @ active * inverse
    total = solution.sum()
    # Gradients whose hull holds 0 have equal projections on no other combination, and none of the form above.
    largest = inverse.max().clamp(min=torch.finfo(gram.dtype).tiny)
    bordered = torch.zeros(len(gram) + 1, len(gram) + 1, dtype=gram.dtype, device=gram.device)
    bordered[:-1, :-1], bordered[:-1, -1], bordered[-1, :-1] = scaled, -active, inverse / largest
    other = torch.linalg.pinv(bordered)[:-1, -1] * inverse / largest
    regular = total.abs() > 1e-9 * solution.abs().sum()
    return torch.where(regular, solution / torch.where(regular, total, 1.0), other)


def gradnorm(s: Tensor, norms: Tensor, rates: Tensor, alpha: float = 1.5) -> Tensor:
    """Return GradNorm's loss of the scores s `(T,)`, of which the weights are `T * softmax(s)`.

    Args:
        s: What is learned.
        norms: Norms of the gradients `(T,)`; 0 for a task that is missing from the batch.
        rates: `losses / initial losses` `(T,)`; the slower a task learns, the larger.
        alpha: How much more gradient a slower task gets.
    """
    present = (norms > 0).to(s.dtype)
    count = present.sum().clamp(min=1)
    weighted = len(s) * s.softmax(0) * norms
    target = weighted.sum() / count * (rates * count / (rates * present).sum()) ** alpha
    return ((weighted - target.detach()) * present).abs().sum()
