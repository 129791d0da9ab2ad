"""The rules of loss weighting as functions: closed forms, invariances, and what others compute."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from scipy.optimize import minimize, nnls
from torch import Tensor

from kexue.strategies.loss_weighting import (
    cagrad_weights,
    dynamic_weight_average,
    generalised_mean,
    generalised_mean_weights,
    gradient_norm_weights,
    gradnorm,
    imtl_g_weights,
    imtl_l,
    initial_cross_entropy,
    initial_squared_error,
    inverse_weights,
    min_norm_weights,
    nonnegative_minimum,
    pcgrad_weights,
    prior_cross_entropy,
    prior_squared_error,
    priority_weights,
    random_weights,
    real_time,
    uncertainty,
)

LOSSES = torch.tensor([0.7, 2.3, 41.0], dtype=torch.float64)
GAMMAS = [-math.inf, -2.0, 0.0, 0.5, 1.0, 3.0, math.inf]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gradients(tasks: int, dim: int, seed: int = 0, spread: float = 0.0) -> Tensor:
    """Random gradients, the norms of which lie `spread` powers of ten apart."""
    rows = torch.randn(tasks, dim, generator=generator(seed), dtype=torch.float64)
    return rows * torch.logspace(-spread / 2, spread / 2, tasks, dtype=torch.float64)[:, None]


PROBLEMS = [
    (2, 5, 0.0), (3, 3, 0.0), (4, 2, 0.0), (3, 8, 4.0), (5, 4, 3.0), (8, 6, 1.0), (16, 40, 2.0), (16, 5, 0.0),
]  # fmt: skip
CASES = [gradients(*sizes[:2], seed, sizes[2]) for sizes in PROBLEMS for seed in range(3)]


def slope(function: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    at = at.clone().requires_grad_()
    return torch.autograd.grad(function(at), at)[0]


# By the losses


def test_real_time_is_the_sum_of_logarithms_and_a_multiple_of_the_geometric_mean() -> None:
    assert torch.allclose(slope(real_time, LOSSES), slope(lambda x: x.log().sum(), LOSSES), rtol=1e-12)
    assert torch.equal(slope(real_time, LOSSES), inverse_weights(LOSSES))
    geometric = slope(lambda x: generalised_mean(x, 0.0), LOSSES)
    mean = LOSSES.prod() ** (1 / 3)
    assert torch.allclose(geometric, mean / 3 * inverse_weights(LOSSES), rtol=1e-12)


@pytest.mark.parametrize("gamma", GAMMAS)
def test_weights_of_the_generalised_mean_are_its_gradient(gamma: float) -> None:
    expected = slope(lambda x: generalised_mean(x, gamma), LOSSES)
    assert torch.allclose(generalised_mean_weights(LOSSES, gamma), expected, rtol=1e-12)


def test_the_generalised_mean_rises_from_the_smallest_to_the_largest_loss() -> None:
    values = [generalised_mean(LOSSES, gamma).item() for gamma in GAMMAS]
    assert values == sorted(values)
    assert (values[0], values[-1]) == (0.7, 41.0)
    assert values[4] == pytest.approx(LOSSES.mean().item(), rel=1e-12)
    for gamma, limit in ((1e-7, 0.0), (1e4, math.inf), (-1e4, -math.inf)):
        near, at = generalised_mean(LOSSES, gamma).item(), generalised_mean(LOSSES, limit).item()
        assert near == pytest.approx(at, rel=1e-3)


@pytest.mark.parametrize("gamma", GAMMAS)
def test_a_missing_task_gets_nothing_and_changes_nothing(gamma: float) -> None:
    with_gap = torch.tensor([0.7, math.nan, 2.3, 41.0], dtype=torch.float64)
    for function in (inverse_weights, lambda x: generalised_mean_weights(x, gamma)):
        weights, expected = function(with_gap), function(LOSSES)
        assert weights[1] == 0
        assert torch.allclose(weights[[0, 2, 3]], expected, rtol=1e-12)


def test_means_of_many_large_losses_do_not_overflow() -> None:
    losses = torch.full((16,), 1e30)
    assert generalised_mean(losses, 0.0).item() == pytest.approx(1e30, rel=1e-4)
    assert torch.allclose(generalised_mean_weights(losses, 0.0), torch.full((16,), 1 / 16), rtol=1e-4)


def test_uncertainty_at_its_optimum_is_the_real_time_rule() -> None:
    s = LOSSES.log()
    assert torch.allclose(slope(lambda x: uncertainty(LOSSES, x), s), torch.zeros(3, dtype=torch.float64), atol=1e-12)
    assert uncertainty(LOSSES, s).item() == pytest.approx((0.5 + LOSSES.log() / 2).sum().item(), rel=1e-12)
    assert torch.allclose(slope(lambda x: uncertainty(x, s), LOSSES), inverse_weights(LOSSES) / 2, rtol=1e-12)


def test_imtl_l_is_twice_uncertainty() -> None:
    s = torch.tensor([0.3, -1.2, 4.0], dtype=torch.float64)
    assert imtl_l(LOSSES, s).item() == pytest.approx(2 * uncertainty(LOSSES, -s).item(), rel=1e-12)


def test_dwa_weights_sum_to_the_number_of_tasks_and_favour_the_slow() -> None:
    weights = dynamic_weight_average(torch.tensor([0.5, 0.9, 3.0]), torch.tensor([1.0, 1.0, 3.0]))
    assert weights.sum().item() == pytest.approx(3, rel=1e-6)
    assert weights.tolist() == sorted(weights.tolist())
    assert torch.allclose(dynamic_weight_average(LOSSES / 2, LOSSES), torch.ones(3, dtype=torch.float64))


def test_random_weights_follow_their_generator() -> None:
    first, again, other = (random_weights(4, generator(seed)) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.sum().item() == pytest.approx(1)


def test_initial_and_prior_losses_are_those_of_constant_predictions() -> None:
    labels = torch.tensor([0] * 5 + [1] * 3 + [2] * 2)
    zero_head = torch.nn.functional.cross_entropy(torch.zeros(10, 3), labels)
    assert initial_cross_entropy(3) == pytest.approx(zero_head.item(), rel=1e-6)
    counts = labels.bincount().double()
    best = torch.nn.functional.cross_entropy((counts / 10).log().expand(10, 3), labels)
    assert prior_cross_entropy(counts) == pytest.approx(best.item(), rel=1e-6)
    assert prior_cross_entropy(torch.tensor([4.0, 0.0])) == 0
    targets = torch.randn(50, generator=generator()) + 3
    assert initial_squared_error(targets) == pytest.approx(targets.square().mean().item(), rel=1e-6)
    assert prior_squared_error(targets) == pytest.approx(targets.var(correction=0).item(), rel=1e-6)


# By the gradients


@pytest.mark.parametrize("seed", range(20))
def test_nonnegative_minimum_equals_scipys_nnls(seed: int) -> None:
    matrix = torch.randn(6, 4 + seed % 4, generator=generator(seed), dtype=torch.float64)
    target = torch.randn(6, generator=generator(100 + seed), dtype=torch.float64)
    x = nonnegative_minimum(matrix.T @ matrix, matrix.T @ target)
    assert (x >= 0).all()
    # More variables than equations: the minimum is not unique, its value is.
    residual = nnls(matrix.numpy(), target.numpy())[1]
    assert torch.linalg.norm(matrix @ x - target).item() == pytest.approx(residual, abs=1e-7)


@pytest.mark.parametrize("rows", CASES, ids=range(len(CASES)))
def test_min_norm_weights_are_on_the_simplex_and_shortest(rows: Tensor) -> None:
    gram = rows @ rows.T
    weights = min_norm_weights(gram)
    assert (weights >= 0).all()
    assert weights.sum().item() == pytest.approx(1, abs=1e-9)
    direction = weights @ rows
    # The exact condition of the minimum, which no solver needs to be asked for.
    assert ((rows @ direction) >= direction @ direction - 1e-7 * gram.diagonal().min()).all()


@pytest.mark.parametrize("rows", [rows for rows in CASES if len(rows) <= 5][:16])
def test_min_norm_equals_slsqp(rows: Tensor) -> None:
    rows = rows / rows.norm(dim=1).mean()
    gram, count = (rows @ rows.T).numpy(), len(rows)
    found = minimize(
        lambda a: a @ gram @ a,
        [1 / count] * count,
        jac=lambda a: 2 * gram @ a,
        bounds=[(0, 1)] * count,
        constraints={"type": "eq", "fun": lambda a: a.sum() - 1},
        method="SLSQP",
        options={"ftol": 1e-15, "maxiter": 1000},
    )
    weights = min_norm_weights(torch.tensor(gram))
    assert (weights @ torch.tensor(gram) @ weights).item() <= found.fun + 1e-9
    assert (weights @ torch.tensor(gram) @ weights).item() == pytest.approx(found.fun, abs=1e-6)


@pytest.mark.parametrize("seed", range(10))
def test_two_tasks_have_a_closed_form(seed: int) -> None:
    rows = gradients(2, 3, seed, spread=float(seed % 3))
    first, second = rows
    alpha = ((second - first) @ second / (first - second).square().sum()).clamp(0, 1)
    assert torch.allclose(min_norm_weights(rows @ rows.T), torch.stack([alpha, 1 - alpha]), atol=1e-9)
    # One main task and one auxiliary: PCGrad's projection of the main gradient.
    share = (-(first @ second)).clamp(min=0) / second.square().sum()
    assert torch.allclose(priority_weights(rows @ rows.T, [0]), torch.stack([torch.ones_like(share), share]))


def test_orthogonal_gradients_get_one_over_their_squares() -> None:
    weights = min_norm_weights(torch.diag(torch.tensor([1.0, 4.0, 1e6], dtype=torch.float64)))
    expected = torch.tensor([1.0, 0.25, 1e-6], dtype=torch.float64)
    assert torch.allclose(weights, expected / expected.sum(), rtol=1e-9)


def test_opposed_gradients_are_at_rest() -> None:
    rows = torch.tensor([[1.0, 0.0], [-3.0, 0.0]], dtype=torch.float64)
    assert torch.allclose(min_norm_weights(rows @ rows.T), torch.tensor([0.75, 0.25], dtype=torch.float64))


@pytest.mark.parametrize("rows", CASES, ids=range(len(CASES)))
def test_priority_equals_scipys_nnls(rows: Tensor) -> None:
    weights = priority_weights(rows @ rows.T, [0])
    assert weights[0].item() == pytest.approx(1, abs=1e-9)
    assert (weights >= 0).all()
    length = nnls(rows[1:].T.numpy(), -rows[0].numpy())[1]
    direction = weights @ rows
    assert direction.norm().item() == pytest.approx(length, abs=1e-6 * rows[0].norm().item())
    # No auxiliary loss rises.
    bound = 1e-6 * rows[0].norm() * rows.norm(dim=1)
    assert ((rows @ direction) >= -bound)[1:].all()


def test_priority_where_picking_the_worst_auxiliary_in_turn_stalls() -> None:
    rows = torch.tensor([[-1.0, 2.0], [3.0, -1.0], [1.0, -1.0]], dtype=torch.float64)
    stalled = rows[0].clone()
    shares = [0.0, 0.0]
    for _ in range(100):  # as published: refit the weight of the auxiliary that is opposed most
        worst = int((rows[1:] @ stalled).argmin())
        rest = stalled - shares[worst] * rows[1 + worst]
        shares[worst] = max(0.0, float(-(rest @ rows[1 + worst]) / rows[1 + worst].square().sum()))
        stalled = rest + shares[worst] * rows[1 + worst]
    weights = priority_weights(rows @ rows.T, [0])
    assert torch.allclose(weights, torch.tensor([1.0, 0.0, 1.5], dtype=torch.float64))
    assert torch.allclose(weights @ rows, torch.tensor([0.5, 0.5], dtype=torch.float64))
    assert stalled.norm() > 1.9 * (weights @ rows).norm()


def test_several_main_tasks() -> None:
    for seed in range(10):
        rows = gradients(5, 6, seed)
        weights = priority_weights(rows @ rows.T, [0, 3])
        assert (weights >= 0).all()
        assert weights[[0, 3]].sum().item() == pytest.approx(1)
        direction = weights @ rows
        square = direction @ direction
        assert ((rows @ direction)[[0, 3]] >= square - 1e-9).all()
        assert ((rows @ direction)[[1, 2, 4]] >= -1e-9).all()
    assert torch.equal(priority_weights(rows @ rows.T, range(5)), min_norm_weights(rows @ rows.T))


def test_descent_for_features_need_not_be_descent_for_parameters() -> None:
    """The bound that gradients of features give: x·y >= 0 does not carry over to x·M·y."""
    x, y = torch.tensor([[1.0, -2.0], [1.0, 1.0]], dtype=torch.float64)
    inner = torch.diag(torch.tensor([3.0, 1.0], dtype=torch.float64))  # J Jᵀ of an encoder
    assert x @ y < 0 < x @ inner @ y
    raised = 0
    for seed in range(200):
        rows, jacobian = gradients(2, 3, seed), gradients(3, 9, 1000 + seed)
        inner = jacobian @ jacobian.T
        own = min_norm_weights(rows @ inner @ rows.T) @ rows @ inner @ rows.T
        assert (own >= -1e-9).all()
        raised += bool((min_norm_weights(rows @ rows.T) @ rows @ inner @ rows.T < -1e-9).any())
    assert 5 < raised < 50  # of 200


def test_normalised_gradients_serve_two_tasks_but_not_three() -> None:
    bad = 0
    for seed in range(200):
        for count in (2, 3):
            rows = gradients(count, 3, seed)
            lowered = rows @ (gradient_norm_weights(rows @ rows.T) @ rows) >= -1e-12
            bad += count == 3 and not lowered.all()
            assert count == 3 or lowered.all()
    assert 0.3 < bad / 200 < 0.45


@pytest.mark.parametrize("rows", [rows for rows in CASES if len(rows) <= 5])
def test_cagrad_equals_slsqp(rows: Tensor) -> None:
    rows = rows / rows.norm(dim=1).mean()
    gram, count, c = rows @ rows.T, len(rows), 0.4
    mean = rows.mean(0)
    radius = c * mean.norm()

    def objective(v: Any) -> float:
        point = torch.as_tensor(v) @ rows
        return float(point @ mean + radius * point.norm())

    weights = cagrad_weights(gram, c)
    change = weights - 1 / count
    direction = weights @ rows
    if change.abs().sum() < 1e-9:  # at rest: the hull holds 0
        assert (min_norm_weights(gram) @ rows).norm() < 1e-6 * rows.norm(dim=1).max()
        return
    assert (direction - mean).norm().item() == pytest.approx(radius.item(), rel=1e-6)
    starts = [[1 / count] * count, *torch.eye(count, dtype=torch.float64).mul(0.9).add(0.1 / count).tolist()]
    best = min(
        minimize(
            objective,
            start,
            bounds=[(0, 1)] * count,
            constraints={"type": "eq", "fun": lambda v: v.sum() - 1},
            method="SLSQP",
            options={"ftol": 1e-14, "maxiter": 500},
        ).fun
        for start in starts
    )
    assert objective((change / change.sum()).clamp(min=0)) <= best + 1e-6
    # The dual problem: no direction in that ball serves the worst task better.
    assert (rows @ direction).min().item() == pytest.approx(objective(change / change.sum()), abs=1e-5)


def test_cagrad_goes_from_the_mean_to_mgda() -> None:
    rows = gradients(3, 6, 1)
    gram = rows @ rows.T
    assert torch.equal(cagrad_weights(gram, 0.0), torch.full((3,), 1 / 3, dtype=torch.float64))
    far, shortest = cagrad_weights(gram, 1e5) @ rows, min_norm_weights(gram) @ rows
    assert torch.cosine_similarity(far, shortest, dim=0).item() == pytest.approx(1, abs=1e-6)


def test_pcgrad_without_conflict_is_the_sum() -> None:
    rows = gradients(4, 6).abs()
    assert torch.equal(pcgrad_weights(rows @ rows.T, generator()), torch.ones(4, dtype=torch.float64))


@pytest.mark.parametrize("rows", CASES[::3])
def test_pcgrad_equals_projections_of_the_gradients_themselves(rows: Tensor) -> None:
    orders, expected = generator(5), torch.zeros_like(rows[0])
    for i, row in enumerate(rows):
        own = row.clone()
        for j in torch.randperm(len(rows), generator=orders).tolist():
            if j != i and own @ rows[j] < 0:
                own -= own @ rows[j] / rows[j].square().sum() * rows[j]
        expected += own
    weights = pcgrad_weights(rows @ rows.T, generator(5))
    assert torch.allclose(weights @ rows, expected, atol=1e-8 * rows.norm(dim=1).max().item())


@pytest.mark.parametrize("rows", [rows for rows in CASES if len(rows) <= rows.shape[1]])
def test_imtl_g_projects_equally(rows: Tensor) -> None:
    weights = imtl_g_weights(rows @ rows.T)
    assert weights.sum().item() == pytest.approx(1)
    projections = rows @ (weights @ rows) / rows.norm(dim=1)
    assert torch.allclose(projections, projections.mean(), rtol=1e-6)


def test_gradient_norm_can_keep_the_length() -> None:
    rows = gradients(3, 5, spread=2)
    gram = rows @ rows.T
    assert torch.allclose((gradient_norm_weights(gram)[:, None] * rows).norm(dim=1), torch.ones(3).double())
    kept = (gradient_norm_weights(gram, keep_length=True)[:, None] * rows).norm(dim=1)
    assert torch.allclose(kept, rows.norm(dim=1).mean().expand(3))


def test_gradnorm_moves_towards_the_slower_task() -> None:
    s = torch.zeros(2, dtype=torch.float64)
    norms = torch.ones(2, dtype=torch.float64)
    step = -slope(lambda x: gradnorm(x, norms, torch.tensor([0.5, 1.0]).double()), s)
    assert step[1] > 0 > step[0]
    assert torch.allclose(slope(lambda x: gradnorm(x, norms, norms), s), torch.zeros(2).double())


GRADIENT_RULES: dict[str, Callable[[Tensor], Tensor]] = {
    "mgda": min_norm_weights,
    "priority": lambda gram: priority_weights(gram, range(len(gram))),
    "gradient_norm": gradient_norm_weights,
    "pcgrad": lambda gram: pcgrad_weights(gram, generator(3)),
    "cagrad": cagrad_weights,
    "imtl_g": imtl_g_weights,
}


@pytest.mark.parametrize("rule", GRADIENT_RULES)
def test_equal_orthogonal_gradients_get_equal_weights(rule: str) -> None:
    weights = GRADIENT_RULES[rule](2 * torch.eye(4, dtype=torch.float64))
    assert torch.allclose(weights, weights.mean())
    assert (weights > 0).all()


@pytest.mark.parametrize("rule", GRADIENT_RULES)
def test_one_task_is_plain_training(rule: str) -> None:
    weights = GRADIENT_RULES[rule](torch.tensor([[4.0]], dtype=torch.float64))
    expected = {"gradient_norm": 0.5, "cagrad": 1.4}.get(rule, 1.0)
    assert weights.tolist() == [pytest.approx(expected)]


@pytest.mark.parametrize("rule", GRADIENT_RULES)
def test_a_task_without_gradient_gets_nothing_and_changes_nothing(rule: str) -> None:
    rows = gradients(3, 5, 2)
    if rule == "pcgrad":  # whose order would differ
        rows = rows.abs()
    gap = torch.cat([rows[:1], torch.zeros(1, 5).double(), rows[1:]])
    weights, expected = (GRADIENT_RULES[rule](rows @ rows.T) for rows in (gap, rows))
    assert weights[1] == 0
    assert torch.allclose(weights[[0, 2, 3]], expected, atol=1e-9)


@pytest.mark.parametrize("rule", ["gradient_norm", "imtl_g"])
def test_scaling_a_loss_leaves_the_direction(rule: str) -> None:
    rows = gradients(3, 6, 4)
    scaled = rows * torch.tensor([1.0, 1000.0, 1.0]).double()[:, None]
    before, after = (GRADIENT_RULES[rule](rows @ rows.T) @ rows for rows in (rows, scaled))
    assert torch.cosine_similarity(before, after, dim=0).item() == pytest.approx(1, abs=1e-9)


def test_scaling_a_loss_changes_nothing_for_inverse_losses_only() -> None:
    scale = torch.tensor([1.0, 1000.0, 1.0], dtype=torch.float64)
    assert torch.allclose(inverse_weights(LOSSES * scale) * scale, inverse_weights(LOSSES))
    for gamma, same in ((0.0, True), (0.5, False), (1.0, False)):
        before = generalised_mean_weights(LOSSES, gamma)
        after = generalised_mean_weights(LOSSES * scale, gamma) * scale
        assert torch.allclose(before / before.sum(), after / after.sum()) is same
