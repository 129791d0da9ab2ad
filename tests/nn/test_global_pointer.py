"""Pointer scores against the formulas, cell by cell."""

import math

import pytest
import torch
from torch import Tensor

from kexue.errors import InputError
from kexue.nn.heads import EfficientGlobalPointer, FactoredScores, GlobalPointer, ProductScores

KINDS = [GlobalPointer, EfficientGlobalPointer]


def turned(vector: Tensor, position: int) -> Tensor:
    """RoPE, written plainly over complex numbers."""
    size = len(vector)
    pairs = torch.view_as_complex(vector.reshape(-1, 2))
    theta = torch.tensor([10000 ** (-2 * i / size) for i in range(size // 2)], dtype=torch.float64)
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(theta), theta * position)).flatten()


@pytest.mark.parametrize("rope", [True, False])
def test_standard_score_is_the_formula(rope: bool) -> None:
    torch.manual_seed(0)
    head = GlobalPointer(10, 3, head_size=4, rope=rope, triangular=False).double()
    hidden = torch.randn(2, 6, 10, dtype=torch.float64)
    scores = head(hidden)
    for a in range(3):
        rows = slice(a * 8, a * 8 + 8)
        pairs = hidden @ head.projection.weight[rows].T + head.projection.bias[rows]
        for i in range(6):
            for j in range(6):
                query, key = pairs[1, i, :4], pairs[1, j, 4:]
                if rope:
                    query, key = turned(query, i), turned(key, j)
                assert scores[1, a, i, j].item() == pytest.approx((query @ key / 2).item(), abs=1e-6)


@pytest.mark.parametrize("rope", [True, False])
def test_efficient_score_is_the_formula(rope: bool) -> None:
    torch.manual_seed(0)
    head = EfficientGlobalPointer(10, 3, head_size=6, rope=rope, triangular=False).double()
    torch.nn.init.normal_(head.bias.bias)
    hidden = torch.randn(2, 5, 10, dtype=torch.float64)
    scores = head(hidden)
    both = head.projection(hidden)[1]
    bias = both @ head.bias.weight.T + head.bias.bias
    for i in range(5):
        for j in range(5):
            query, key = both[i, 0::2], both[j, 1::2]
            if rope:
                query, key = turned(query.contiguous(), i), turned(key.contiguous(), j)
            for a in range(3):
                expected = query @ key / math.sqrt(6) + bias[i, 2 * a + 1] / 2 + bias[j, 2 * a] / 2
                assert scores[1, a, i, j].item() == pytest.approx(expected.item(), abs=1e-6)


def test_parameter_counts() -> None:
    """2 D d a type against 4 d a type (and one shared 2 D d), biases apart."""

    def weights(head: torch.nn.Module) -> int:
        return sum(p.numel() for p in head.parameters() if p.dim() > 1)

    assert weights(GlobalPointer(768, 49)) == 49 * 2 * 768 * 64 == 4_816_896
    assert weights(EfficientGlobalPointer(768, 49)) == 2 * 768 * 64 + 49 * 4 * 64 == 110_848


@pytest.mark.parametrize("kind", KINDS)
def test_hidden_cells_hold_the_minimum(kind: type) -> None:
    mask = torch.arange(7) < torch.tensor([[7], [5], [0]])
    scores = kind(8, 4, head_size=4)(torch.randn(3, 7, 8), mask)
    visible = (mask[:, :, None] & mask[:, None, :]).triu()[:, None].expand_as(scores)
    assert (scores[~visible] == torch.finfo(torch.float32).min).all()
    assert (scores[visible].abs() < 100).all()


@pytest.mark.parametrize("kind", KINDS)
def test_padding_changes_nothing(kind: type) -> None:
    head = kind(8, 4, head_size=4)
    hidden = torch.randn(1, 9, 8)
    short = head(hidden[:, :6])
    torch.testing.assert_close(head(hidden, torch.arange(9)[None] < 6)[:, :, :6, :6], short, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_scores_depend_on_length_only_with_rope(kind: type) -> None:
    """The same vector everywhere: scores are equal along diagonals, and all equal without rotation."""
    hidden = torch.randn(1, 1, 8).expand(1, 9, 8)
    rotated = kind(8, 2, head_size=4, triangular=False)(hidden)[0, 0]
    assert all((rotated.diagonal(k) - rotated.diagonal(k)[0]).abs().max() < 1e-5 for k in range(-8, 9))
    assert (rotated[0] - rotated[0, 0]).abs().max() > 1e-3
    plain = kind(8, 2, head_size=4, rope=False, triangular=False)(hidden)[0, 0]
    assert (plain - plain[0, 0]).abs().max() < 1e-5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_finite_where_visible(kind: type, dtype: torch.dtype) -> None:
    head = kind(8, 4, head_size=4).to(dtype)
    mask = torch.tensor([[True] * 4 + [False] * 2])
    scores = head(30 * torch.randn(1, 6, 8).to(dtype), mask)
    assert scores.dtype == dtype
    assert not scores.isnan().any()
    assert torch.isfinite(scores[:, :, 0, :4]).all()
    assert (scores[:, :, 4:] < -30000).all()


@pytest.mark.parametrize("kind", KINDS)
def test_starts_lecun_normal_without_bias(kind: type) -> None:
    torch.manual_seed(0)
    weight, bias = kind(400, 20).projection.weight, kind(400, 20).projection.bias
    assert weight.std().item() == pytest.approx(1 / math.sqrt(400), rel=0.02)
    assert not bias.any()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_compact_scores_are_the_full_ones(kind: type, masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr("kexue.nn.heads.scores.MATRICES_AT_ONCE", 3 * 36)
    mask = torch.arange(6) < torch.tensor([[6], [4]]) if masked else None
    head = kind(8, 5, head_size=4).double()
    hidden = torch.randn(2, 6, 8, dtype=torch.float64, requires_grad=True)
    full, parts = head(hidden, mask), head.compact(hidden, mask)
    assert parts.shape == full.shape
    torch.testing.assert_close(torch.stack(list(parts)), full)
    torch.testing.assert_close(parts.rows(slice(1, 2)).dense(), full[1:])
    rows, heads = torch.tensor([0, 1, 1]), torch.tensor([4, 0, 2])
    torch.testing.assert_close(parts.select(rows, heads), full[rows, heads])
    found, expected = parts.logsumexp(), full.flatten(2).logsumexp(-1)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)
    weights, leaves = torch.randn_like(found), [hidden, *head.parameters()]
    for one, other in zip(
        torch.autograd.grad((found * weights).sum(), leaves, retain_graph=True),
        torch.autograd.grad((expected * weights).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("rope", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_sums_and_matrices_in_one_pass(kind: type, rope: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one after the other, gradients too, with a matrix chosen twice and with none."""
    torch.manual_seed(0)
    monkeypatch.setattr("kexue.nn.heads.scores.MATRICES_AT_ONCE", 2 * 36)
    mask = torch.arange(6) < torch.tensor([[6], [4]])
    head = kind(8, 5, head_size=4, rope=rope, triangular=rope).double()
    hidden = torch.randn(2, 6, 8, dtype=torch.float64, requires_grad=True)
    leaves = [hidden, *head.parameters()]
    for rows, heads in (([0, 1, 1, 0], [4, 0, 2, 4]), ([], [])):
        places = torch.tensor(rows, dtype=torch.long), torch.tensor(heads, dtype=torch.long)
        sums, chosen = head.compact(hidden, mask).logsumexp_and_select(*places)
        full = head(hidden, mask)
        expected = full.flatten(2).logsumexp(-1), full[places]
        torch.testing.assert_close((sums, chosen), expected, atol=1e-12, rtol=1e-12)
        seen = (expected[1] > -1e9).double()
        weights, shares = torch.randn_like(sums), torch.randn_like(chosen)
        found = torch.autograd.grad((sums * weights).sum() + (chosen * seen * shares).sum(), leaves)
        wanted = (expected[0] * weights).sum() + (expected[1] * seen * shares).sum()
        torch.testing.assert_close(found, torch.autograd.grad(wanted, leaves), atol=1e-11, rtol=1e-11)


def test_products_are_not_rounded_by_autocast() -> None:
    torch.manual_seed(0)
    scores = ProductScores(torch.randn(1, 2, 2, 4, 8), torch.ones(4, 4).bool().triu())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = scores.logsumexp(), scores.dense()
    assert torch.equal(inside[0], scores.logsumexp())
    assert torch.equal(inside[1], scores.dense())


def test_factored_sum_holds_far_apart_scores() -> None:
    """The largest parts stand in different cells: in float32 their product would vanish beside the largest of each."""
    shared = torch.full((1, 3, 3), -90.0)
    shared[0, 0, 0] = 0.0
    parts = FactoredScores(shared, torch.tensor([[[-80.0, 0.0, -80.0]]]), torch.tensor([[[-60.0, -60.0, 50.0]]]))
    torch.testing.assert_close(parts.logsumexp(), parts.dense().flatten(2).logsumexp(-1))


def test_wrong_values_are_explained() -> None:
    with pytest.raises(InputError, match=r"GlobalPointer\(num_heads=0\)"):
        GlobalPointer(8, 0)
    with pytest.raises(InputError, match="even head_size"):
        EfficientGlobalPointer(8, 2, head_size=5)
