"""Synthetic scores against the formulas: what they depend on, their ranks, sizes and places."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kexue.errors import InputError
from kexue.nn.transformer import TransformerConfig
from kexue.nn.transformer.config import SYNTHESIZERS
from kexue.nn.transformer.synthesizer import ScoreMixture, SynthesizerScores, synthesizer_parameters

SEES_TOKENS = ("dense", "factorised_dense")
LENGTH = 12


def config(kind: str, **options: object) -> TransformerConfig:
    sizes = {"dim": 16, "num_heads": 2, "max_length": LENGTH, "synthesizer_dim": 5, "synthesizer_rank": 2}
    return TransformerConfig(10, **{**sizes, "init_std": 0.5, "positions": "none", "attention": kind, **options})


def scores_of(kind: str, **options: object) -> SynthesizerScores:
    torch.manual_seed(0)
    return SynthesizerScores(config(kind, **options), kind).double()


def tokens(batch: int = 3, length: int = 9) -> Tensor:
    return torch.randn(batch, length, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("kind", SYNTHESIZERS)
def test_a_row_depends_on_its_own_token_at_most(kind: str) -> None:
    scores, hidden = scores_of(kind), tokens(1).requires_grad_()
    table = scores(hidden, 9)
    assert table.shape == (1, 2, 9, 9)
    for row in range(9):
        if kind not in SEES_TOKENS:
            assert torch.autograd.grad(table.sum(), hidden, retain_graph=True, allow_unused=True)[0] is None
            continue
        (gradient,) = torch.autograd.grad(table[0, :, row].square().sum(), hidden, retain_graph=True)
        others = torch.arange(9) != row
        assert torch.equal(gradient[0, others], torch.zeros(8, 16).double())
        assert gradient[0, row].abs().min() > 0


@pytest.mark.parametrize("kind", SYNTHESIZERS)
def test_one_pass_is_the_steps_of_a_generation(kind: str) -> None:
    scores, hidden = scores_of(kind), tokens()
    whole = scores(hidden, 9)
    assert whole.shape == (3 if kind in SEES_TOKENS else 1, 2, 9, 9)
    for start, end in ((0, 4), (4, 5), (5, 9)):
        part = scores(hidden[:, start:end], end, offset=start)
        torch.testing.assert_close(part, whole[:, :, start:end, :end])
    torch.testing.assert_close(scores(hidden[:, :7], 7), whole[:, :, :7, :7])  # shorter inputs use a corner


def test_dense_scores_are_the_formula() -> None:
    scores, hidden = scores_of("dense"), tokens()
    torch.nn.init.normal_(scores.bias)
    for head in range(2):
        rows = slice(5 * head, 5 * head + 5)
        inner = (hidden @ scores.inner.weight[rows].T + scores.inner.bias[rows]).relu()
        expected = inner @ scores.weight[head] + scores.bias[head]
        torch.testing.assert_close(scores(hidden, 9)[:, head], expected[..., :9])


def test_dense_scores_are_those_of_frozen_keys() -> None:
    """Where the ReLU lets all through, a row is the product of a query and constant keys."""
    scores, hidden, value = scores_of("dense"), tokens(), torch.randn(3, 2, 9, 4, dtype=torch.float64)
    torch.nn.init.constant_(scores.inner.bias, 100.0)
    query = scores.inner(hidden).unflatten(-1, (2, 5)).transpose(1, 2)
    assert (query > 0).all()
    keys = scores.weight.mT[:, :9].expand(3, -1, -1, -1)
    expected = F.scaled_dot_product_attention(query, keys, value, scale=1.0)
    torch.testing.assert_close(scores(hidden, 9).softmax(-1) @ value, expected)


@pytest.mark.parametrize("factors", [(3, 4), (4, 3), (2, 6), (12, 1)])
def test_factorised_dense_rows_are_outer_products_with_distinct_columns(factors: tuple[int, int]) -> None:
    scores, hidden = scores_of("factorised_dense", synthesizer_factors=factors), tokens()
    table = scores(hidden, LENGTH)
    first, second = scores.inner(hidden).unflatten(-1, (2, -1)).transpose(1, 2).split(factors, -1)
    torch.testing.assert_close(table, torch.einsum("bntu,bntw->bntuw", first, second).flatten(-2))
    torch.testing.assert_close(scores(hidden, 7), table[..., :7])
    ranks = torch.linalg.matrix_rank(table.unflatten(-1, factors), rtol=1e-10)
    assert torch.equal(ranks, torch.ones_like(ranks))
    columns = table.flatten(0, 2).T
    distances = torch.cdist(columns, columns) + 10 * torch.eye(LENGTH)
    assert distances.min() > 1e-2


def test_random_scores_are_the_table() -> None:
    scores = scores_of("random")
    assert torch.equal(scores(tokens(), 9), scores.table[None, :, :9, :9])
    assert scores.table.std().item() == pytest.approx(0.5, rel=0.1)


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_factorised_random_scores_have_a_low_rank(rank: int) -> None:
    scores = scores_of("factorised_random", synthesizer_rank=rank)
    table = scores(tokens(1, LENGTH), LENGTH)[0]
    assert torch.linalg.matrix_rank(table, rtol=1e-10).tolist() == [rank, rank]


def test_factors_start_so_that_their_product_is_as_large_as_a_table() -> None:
    shape = TransformerConfig(10, dim=64, num_heads=4, max_length=200, positions="none", attention="factorised_random")
    scores = SynthesizerScores(shape, "factorised_random")
    assert scores(torch.zeros(1, 200, 64), 200).std().item() == pytest.approx(shape.init_std, rel=0.1)


@pytest.mark.parametrize("kind", SYNTHESIZERS)
@pytest.mark.parametrize("trainable", [True, False])
def test_counts_of_parameters(kind: str, trainable: bool) -> None:
    options = config(kind, trainable_scores=trainable)
    scores = SynthesizerScores(options, kind)
    a_head = {
        "dense": 16 * 5 + 5 + (5 + 1) * LENGTH,
        "factorised_dense": (16 + 1) * (3 + 4),
        "random": LENGTH**2 if trainable else 0,
        "factorised_random": 2 * 2 * LENGTH if trainable else 0,
    }[kind]
    assert sum(parameter.numel() for parameter in scores.parameters()) == 2 * a_head
    assert synthesizer_parameters(options, kind) == 2 * a_head


@pytest.mark.parametrize("kind", ["random", "factorised_random"])
def test_frozen_tables_are_saved_moved_and_not_trained(kind: str) -> None:
    frozen, trained = scores_of(kind, trainable_scores=False), scores_of(kind)
    assert list(frozen.state_dict()) == list(trained.state_dict())
    assert not list(frozen.parameters())
    assert not frozen(tokens(), 9).requires_grad
    assert trained(tokens(), 9).requires_grad
    assert frozen.to(torch.float16)(tokens().half(), 9).dtype == torch.float16
    assert all(buffer.is_meta for buffer in frozen.to("meta").buffers())
    other = SynthesizerScores(config(kind, trainable_scores=False), kind).double()
    other.load_state_dict(trained.state_dict())
    assert torch.equal(other(tokens(), 9), trained(tokens(), 9))


@pytest.mark.parametrize("kind", SYNTHESIZERS)
def test_longer_than_the_tables_is_an_error(kind: str) -> None:
    scores = scores_of(kind)
    for length, offset in ((LENGTH + 1, 0), (1, LENGTH)):
        with pytest.raises(InputError, match=rf"max_length={LENGTH}\): 13 tokens have no {kind} scores"):
            scores(tokens(1, length), LENGTH + 1, offset)


@pytest.mark.parametrize("kind", SYNTHESIZERS)
def test_gradients_reach_every_parameter(kind: str) -> None:
    scores = scores_of(kind)
    weights = scores(tokens(length=LENGTH), LENGTH).softmax(-1)
    weights.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in scores.parameters())


@pytest.mark.parametrize("kind", SYNTHESIZERS)
def test_autocast(kind: str) -> None:
    scores, hidden = scores_of(kind).float(), tokens().float()
    expected = scores(hidden, 9)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = scores(hidden, 9)
    torch.testing.assert_close(found.float(), expected, atol=0.1, rtol=0.1)


def test_a_mixture_that_chooses_one_kind_is_that_kind() -> None:
    torch.manual_seed(0)
    mixture = ScoreMixture(2).double()
    query, key, value = torch.randn(3, 2, 2, 9, 4, dtype=torch.float64)
    plain, random = query @ key.mT / 2, scores_of("random")(tokens(), 9)
    torch.testing.assert_close(mixture([plain, random]), (plain + random) / 2)
    with torch.no_grad():
        mixture.logits.copy_(torch.tensor([1000.0, -1000.0]))
    assert mixture.weights().tolist() == [1, 0]
    assert torch.equal(mixture([plain, random]), plain)
    expected = F.scaled_dot_product_attention(query, key, value)
    torch.testing.assert_close(mixture([plain, random]).softmax(-1) @ value, expected)


def test_weights_of_a_mixture_sum_to_one_while_they_are_trained() -> None:
    mixture = ScoreMixture(3)
    optimiser = torch.optim.SGD(mixture.parameters(), lr=0.5)
    parts = [torch.randn(1, 2, 5, 5, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    for _ in range(20):
        optimiser.zero_grad()
        (mixture(parts) - parts[1]).square().sum().backward()
        optimiser.step()
        assert mixture.weights().sum().item() == pytest.approx(1, abs=1e-6)
    assert mixture.weights()[1] > 0.9
    assert mixture([part.bfloat16() for part in parts]).dtype == torch.bfloat16
