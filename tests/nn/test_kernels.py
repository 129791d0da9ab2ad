"""Linear attention against the formulas: features, errors, the three ways to sum, masks, precision."""

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F

from kexue.nn.transformer import TransformerConfig, position_angles, rotate
from kexue.nn.transformer.cache import LayerCache
from kexue.nn.transformer.config import KERNELS
from kexue.nn.transformer.kernels import (
    CHUNK,
    LinearKernel,
    elu_features,
    limit_features,
    limit_relative_error,
    linear_attention,
    linear_attention_step,
    num_features,
    orthogonal_gaussian,
    random_features,
    taylor_error_bound,
    taylor_features,
)


def assert_equal(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-10)


def draw(*shape: int, scale: float = 1.0, seed: int = 0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def kernel(kind: str, degree: int = 2, m: int = 24) -> LinearKernel:
    config = TransformerConfig(10, dim=16, num_heads=2, attention=kind, kernel_degree=degree, num_features=m)
    return LinearKernel(config)


def taylor(x: Tensor, degree: int) -> Tensor:
    return sum((x**j / math.factorial(j) for j in range(degree + 1)), torch.zeros_like(x))


def limit(x: Tensor, degree: int) -> Tensor:
    return (1 + x / degree) ** degree


def tensor_power(x: Tensor, degree: int) -> Tensor:
    """All products of `degree` factors, `(..., K)` to `(..., K^degree)`."""
    power = torch.ones_like(x[..., :1])
    for _ in range(degree):
        power = (power[..., :, None] * x[..., None, :]).flatten(-2)
    return power


def taylor_tensor_features(x: Tensor, degree: int) -> Tensor:
    return torch.cat([tensor_power(x, j) / math.sqrt(math.factorial(j)) for j in range(degree + 1)], dim=-1)


def limit_tensor_features(x: Tensor, degree: int) -> Tensor:
    return tensor_power(F.pad(x / math.sqrt(degree), (1, 0), value=1.0), degree)


def table(query: Tensor, key: Tensor, value: Tensor, causal: bool = False) -> Tensor:
    """Attention with all weights written out."""
    weights = query @ key.mT
    weights = weights.tril() if causal else weights
    return weights / weights.sum(-1, keepdim=True) @ value


@pytest.mark.parametrize("degree", range(1, 6))
@pytest.mark.parametrize(
    ("features", "tensor_features", "polynomial"),
    [(taylor_features, taylor_tensor_features, taylor), (limit_features, limit_tensor_features, limit)],
)
def test_products_of_features_are_the_polynomial(
    features: Callable, tensor_features: Callable, polynomial: Callable, degree: int
) -> None:
    query, key = draw(6, 3), draw(5, 3, seed=1)
    expected = polynomial(query @ key.T, degree)
    few, many = (f(query, degree) @ f(key, degree).T for f in (features, tensor_features))
    torch.testing.assert_close(few, expected, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(many, expected, atol=1e-12, rtol=1e-12)
    kind = "taylor" if features is taylor_features else "limit"
    assert features(query, degree).shape == (6, num_features(kind, 3, degree, 0))


def test_sizes_and_errors_of_the_article() -> None:
    """In three dimensions with vectors of about 0.9: scores up to 0.763."""
    vector = draw(3)
    vector = vector / vector.norm() * 0.763**0.5
    expected = {
        taylor_tensor_features: {1: (4, 0.38), 2: (13, 0.091), 4: (121, 2.5e-3), 6: (1093, 3.3e-5)},
        limit_tensor_features: {1: (4, 0.38), 2: (16, 0.24), 4: (256, 0.13), 6: (4096, 0.094)},
    }
    for features, rows in expected.items():
        for degree, (size, error) in rows.items():
            found = features(vector, degree)
            assert found.shape == (size,)
            assert (math.exp(0.763) - found @ found).item() == pytest.approx(error, rel=0.05)
    assert [num_features("taylor", 3, degree, 0) for degree in (1, 2, 4, 6)] == [4, 10, 35, 84]
    assert (num_features("elu", 64, 2, 256), num_features("favor", 64, 2, 256)) == (64, 256)
    assert num_features("limit", 64, 2, 256) == 2145


@pytest.mark.parametrize("degree", [1, 2, 3, 4, 6, 8])
def test_error_bounds(degree: int) -> None:
    x = torch.linspace(-6, 6, 241, dtype=torch.float64)
    assert ((x.exp() - taylor(x, degree)).abs() <= taylor_error_bound(x, degree) + 1e-12).all()
    relative = 1 - limit(x, degree) / x.exp()
    assert (relative[x >= 0] <= limit_relative_error(x, degree)[x >= 0] + 1e-12).all()
    small = torch.linspace(-0.1, 0.1, 20, dtype=torch.float64)
    relative = 1 - limit(small, degree) / small.exp()
    torch.testing.assert_close(relative, limit_relative_error(small, degree), rtol=0.07, atol=0)


@pytest.mark.parametrize("degree", range(1, 9))
def test_even_degrees_are_not_negative_and_odd_ones_are(degree: int) -> None:
    query = torch.linspace(-30, 30, 601, dtype=torch.float64)[:, None]
    key = torch.ones(1, 1, dtype=torch.float64)
    series = (taylor_features(query, degree) @ taylor_features(key, degree).T).min()
    power = (limit_features(query, degree) @ limit_features(key, degree).T).min()
    if degree % 2 == 0:
        assert series > 0
        assert power >= -1e-9
    else:
        assert series < 0
        assert power < 0
    if degree == 1:
        x = torch.tensor([-3.0])
        assert (taylor_features(x, 1) @ taylor_features(torch.ones(1), 1)).item() == pytest.approx(-2)


@pytest.mark.parametrize("kind", ["taylor", "limit"])
def test_attention_tends_to_softmax_attention(kind: str) -> None:
    query, key, value = (draw(2, 2, 12, 4, scale=0.5, seed=seed) for seed in range(3))
    x = query @ key.mT
    exact = F.scaled_dot_product_attention(query, key, value, scale=1.0)
    features, errors = {"taylor": taylor_features, "limit": limit_features}[kind], []
    for degree in (2, 4, 6, 8):
        found = linear_attention(features(query, degree), features(key, degree), value)
        errors.append((found - exact).abs().amax(-1))
        if kind == "taylor":  # weights off by the bound each move the mean by twice their sum, relative to the total
            bound = 2 * taylor_error_bound(x, degree).sum(-1) / x.exp().sum(-1)
            assert (errors[-1] <= bound * value.abs().max()).all()
    largest = [error.max().item() for error in errors]
    assert largest == sorted(largest, reverse=True)
    assert largest[-1] < (1e-3 if kind == "taylor" else 0.1)


def test_orthogonal_gaussian_vectors() -> None:
    vectors = orthogonal_gaussian(70, 16, torch.Generator().manual_seed(0))
    assert vectors.shape == (70, 16)
    for block in vectors.split(16):
        gram = block @ block.T
        assert (gram - gram.diagonal().diag()).abs().max() < 1e-12
    many = orthogonal_gaussian(160_000, 16, torch.Generator().manual_seed(1))
    assert many.mean(0).abs().max() < 4 / 400  # four standard errors: each coordinate is standard normal
    torch.testing.assert_close(many.T @ many / len(many), torch.eye(16).double(), atol=0.02, rtol=0)
    torch.testing.assert_close(many.norm(dim=-1).square().var(), torch.tensor(32.0).double(), rtol=0.05, atol=0)
    assert (many**4).mean().item() == pytest.approx(3, abs=0.05)
    assert torch.equal(vectors, orthogonal_gaussian(70, 16, torch.Generator().manual_seed(0)))


def test_random_features_are_unbiased_and_vary_less_when_many_or_orthogonal() -> None:
    generator = torch.Generator().manual_seed(0)
    size, draws = 8, 20_000
    query, key = draw(size, scale=0.3), draw(size, scale=0.3, seed=1)
    exact = (query @ key).exp()

    def estimates(m: int, orthogonal: bool) -> Tensor:
        if orthogonal:
            projections = orthogonal_gaussian(draws * m, size, generator)
        else:
            projections = torch.randn(draws * m, size, generator=generator, dtype=torch.float64)
        products = random_features(query, projections) * random_features(key, projections) * len(projections)
        return products.view(draws, m).mean(-1)

    variance = {}
    for m, orthogonal in itertools.product((8, 32), (False, True)):
        found = estimates(m, orthogonal)
        assert (found > 0).all()
        assert (found.mean() - exact).abs() < 4 * found.std() / math.sqrt(draws)
        variance[m, orthogonal] = found.var().item()
    for orthogonal in (False, True):
        assert variance[8, orthogonal] / variance[32, orthogonal] == pytest.approx(4, rel=0.1)
    for m in (8, 32):
        assert variance[m, True] < variance[m, False]


def test_shifts_cancel() -> None:
    query, key, value = (draw(1, 2, 9, 8, scale=0.25, seed=seed) for seed in range(3))
    module = kernel("favor", m=4096).double()
    projection = module.projection
    expected = linear_attention(random_features(query, projection), random_features(key, projection), value)
    shifted = random_features(query, projection, draw(1, 2, 9, 1, seed=4)), random_features(key, projection, 3.0)
    assert_equal(linear_attention(*shifted, value), expected)
    assert_equal(module(query, key, value), expected)
    exact = F.scaled_dot_product_attention(query, key, value, scale=1.0)
    assert (expected - exact).square().mean().sqrt() < 0.06 * exact.std()


@pytest.mark.parametrize("length", [1, 5, CHUNK, CHUNK + 1, 3 * CHUNK - 7])
@pytest.mark.parametrize("rotated", [False, True])
def test_chunks_steps_and_the_full_table_agree(length: int, rotated: bool) -> None:
    query, key = (elu_features(draw(2, 3, length, 6, seed=seed)) for seed in (0, 1))
    value, numerator, weights = draw(2, 3, length, 5, seed=2), None, query @ key.mT
    if rotated:
        angles = position_angles(length, 6).double()
        numerator = rotate(query, angles), rotate(key, angles)
    signed = weights if numerator is None else numerator[0] @ numerator[1].mT
    expected = (signed.tril() @ value) / weights.tril().sum(-1, keepdim=True)
    found = linear_attention(query, key, value, numerator=numerator, causal=True)
    assert_equal(found, expected)
    full = linear_attention(query, key, value, numerator=numerator)
    assert_equal(full, signed @ value / weights.sum(-1, keepdim=True))

    state, parts = None, []
    for tokens in (slice(0, 3), *(slice(i, i + 1) for i in range(3, min(length, 9))), slice(9, None)):
        if not (new := query[:, :, tokens]).shape[2]:
            continue
        turned = None if numerator is None else (numerator[0][:, :, tokens], numerator[1][:, :, tokens])
        out, state = linear_attention_step(new, key[:, :, tokens], value[:, :, tokens], state, numerator=turned)
        parts.append(out)
    assert_equal(torch.cat(parts, dim=2), expected)


@pytest.mark.parametrize("kind", KERNELS)
@pytest.mark.parametrize("causal", [False, True])
def test_a_cache_gives_what_the_whole_sequence_gives(kind: str, causal: bool) -> None:
    """With padding on the left, and keys whose size grows, so that the shift of random features has to follow."""
    module = kernel(kind).double()
    query, key, value = (draw(2, 2, 20, 8, seed=seed) for seed in range(3))
    key = key * torch.linspace(0.1, 1.5, 20).double()[:, None]
    keys = torch.ones(2, 20, dtype=torch.bool)
    keys[1, :6] = False
    angles = position_angles(20, 8).double()
    cache, steps = LayerCache(), [slice(0, 4), slice(4, 5), slice(5, 12), *(slice(i, i + 1) for i in range(12, 20))]
    for step in steps:
        turn = (lambda x, step=step: rotate(x, angles[step])) if kind == "elu" else None
        found = module(
            query[:, :, step], key[:, :, step], value[:, :, step],
            keys=keys[:, step], causal=causal, rotation=turn, cache=cache,
        )  # fmt: skip
        seen = slice(0, step.stop)
        turn = (lambda x, seen=seen: rotate(x, angles[seen])) if kind == "elu" else None
        whole = module(
            query[:, :, seen], key[:, :, seen], value[:, :, seen], keys=keys[:, seen], causal=causal, rotation=turn
        )
        assert_equal(found, whole[:, :, step])
    assert cache.state is not None
    assert all(len(part) == 2 for part in cache.state)
    cache.reorder(torch.tensor([1, 1]))
    assert torch.equal(cache.state[0][0], cache.state[0][1])


@pytest.mark.parametrize("kind", KERNELS)
def test_module_is_the_table_of_its_features(kind: str) -> None:
    module = kernel(kind, degree=4).double()
    query, key, value = (draw(2, 2, 9, 8, seed=seed) for seed in range(3))
    for causal in (False, True):
        query_features, key_features, _ = module.features(query, key)
        assert query_features.shape[-1] == num_features(module.kind, 8, 4, 24)
        expected = table(query_features, key_features, value, causal)
        assert_equal(module(query, key, value, causal=causal), expected)


@pytest.mark.parametrize("kind", KERNELS)
@pytest.mark.parametrize("causal", [False, True])
def test_padding_and_the_rest_of_the_batch_do_not_matter(kind: str, causal: bool) -> None:
    module = kernel(kind).double()
    query, key, value = (draw(3, 2, 11, 8, seed=seed) for seed in range(3))
    keys = torch.arange(11) < torch.tensor([11, 7, 4])[:, None]
    key = torch.where(keys[:, None, :, None], key, 50 * key)
    found = module(query, key, value, keys=keys, causal=causal)
    for row, length in enumerate((11, 7, 4)):
        part = (slice(row, row + 1), slice(None), slice(0, length))
        alone = module(query[part], key[part], value[part], causal=causal)
        assert_equal(found[part], alone)


@pytest.mark.parametrize("kind", KERNELS)
def test_causal_outputs_have_no_gradient_of_later_tokens(kind: str) -> None:
    module = kernel(kind).double()
    inputs = [draw(1, 2, 70, 8, seed=seed).requires_grad_() for seed in range(3)]
    module(*inputs, causal=True)[:, :, :66].sum().backward()
    for leaf in inputs:
        assert leaf.grad is not None
        assert torch.equal(leaf.grad[:, :, 66:], torch.zeros_like(leaf[:, :, 66:]))
        assert leaf.grad[:, :, 1:66].abs().sum(-1).min() > 0  # the first query sees one key, whatever its weight


@pytest.mark.parametrize("kind", KERNELS)
@pytest.mark.parametrize("causal", [False, True])
def test_gradients(kind: str, causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kexue.nn.transformer.kernels.CHUNK", 3)
    module = kernel(kind, m=6).double()
    inputs = [draw(1, 2, 4, size, scale=0.5, seed=size).requires_grad_() for size in (8, 8, 2)]
    keys = torch.tensor([[True, True, False, True]])
    angles = position_angles(4, 8).double()
    rotation = (lambda x: rotate(x, angles)) if kind == "elu" else None

    def attend(*tensors: Tensor) -> Tensor:
        return module(*tensors, keys=keys, causal=causal, rotation=rotation)

    assert torch.autograd.gradcheck(attend, inputs)


@pytest.mark.parametrize("kind", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("scale", [1.0, 30.0, 1000.0])
def test_large_inputs_and_queries_that_see_nothing_stay_finite(kind: str, dtype: torch.dtype, scale: float) -> None:
    module = kernel(kind)
    leaves = [draw(3, 2, 70, 8, scale=s, seed=i).to(dtype).requires_grad_() for i, s in enumerate((scale, scale, 1))]
    keys = torch.ones(3, 70, dtype=torch.bool)
    keys[0, 5:], keys[1, :9], keys[2] = False, False, False
    for causal in (False, True):
        found = module(*leaves, keys=keys, causal=causal)
        assert found.dtype == dtype
        assert found.isfinite().all()
        assert torch.equal(found[2], torch.zeros_like(found[2]))
        for grad in torch.autograd.grad(found.float().square().sum(), leaves):
            assert not grad.isnan().any()
            assert dtype == torch.float16 or grad.isfinite().all()


@pytest.mark.parametrize("kind", KERNELS)
def test_autocast_does_not_reach_the_sums(kind: str) -> None:
    module = kernel(kind)
    query, key, value = (draw(1, 2, 80, 8, seed=seed).float() for seed in range(3))
    expected = module(query, key, value, causal=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(module(query, key, value, causal=True), expected)


@pytest.mark.parametrize(("mode", "size"), [(torch.inference_mode, 5), (FakeTensorMode, 6)])
def test_a_size_first_met_in_another_mode_can_be_trained(mode: Callable, size: int) -> None:
    with mode():
        taylor_features(torch.randn(2, size), 2)
    leaf = torch.randn(2, size, requires_grad=True)
    taylor_features(leaf, 2).square().sum().backward()  # 1 + x.x + (x.x)^2 / 2
    torch.testing.assert_close(leaf.grad, 2 * leaf.detach() * (1 + leaf.detach().square().sum(-1, keepdim=True)))


def test_a_weight_of_zero_does_not_explode() -> None:
    """A query that sees one key, at which the kernel vanishes: the quotient of two rounding errors."""
    module = kernel("limit")
    query = F.normalize(draw(500, 2, 1, 8).float(), dim=-1)
    assert module(2 * query, -query, torch.ones(500, 2, 1, 3)).abs().max() < 10


def test_rank_of_the_weights() -> None:
    """Weights by few features have a low rank; those of softmax are generically full, even for keys of one number."""
    query, key = draw(40, 4), draw(40, 4, seed=1)
    rank = torch.linalg.matrix_rank
    assert rank(elu_features(query) @ elu_features(key).T) <= 4
    assert rank(taylor_features(query, 2) @ taylor_features(key, 2).T) == num_features("taylor", 4, 2, 0) == 15
    line = torch.linspace(-2, 2, 8, dtype=torch.float64)[torch.randperm(8, generator=torch.Generator().manual_seed(0))]
    assert rank((line[:, None] * (line + 0.05)).exp(), rtol=1e-13) == 8


def test_random_vectors_are_saved_and_the_same_everywhere() -> None:
    torch.manual_seed(1)
    first = kernel("favor")
    torch.manual_seed(2)
    second = kernel("favor")
    assert list(first.state_dict()) == ["projection"]
    assert not list(first.parameters())
    assert torch.equal(first.projection, second.projection)
    second.redraw(torch.Generator().manual_seed(5))
    assert not torch.equal(first.projection, second.projection)
    first.load_state_dict(second.state_dict())
    assert torch.equal(first.projection, second.projection)
    assert not kernel("taylor").state_dict()
