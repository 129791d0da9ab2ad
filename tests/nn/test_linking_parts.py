"""The parts of entity linking against plain formulas: masked BiLSTM, half pointers, cross attention, decoding."""

import math

import pytest
import torch
from torch import Tensor, nn

from kexue.errors import InputError
from kexue.nn.decoding import pair_nearest
from kexue.nn.embeddings import MixedEmbedding
from kexue.nn.heads import CrossAttention, CrossMatch, HalfPointer, bordered_loss
from kexue.nn.recurrent import BiLSTM, turned_round

LENGTHS = [5, 1, 7, 3]
MASK = torch.arange(7) < torch.tensor(LENGTHS)[:, None]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def test_the_bilstm_is_that_of_packed_sequences() -> None:
    """torch's own layer on packed sequences, with the same weights: outputs and gradients."""
    ours, theirs = BiLSTM(6, 8), nn.LSTM(6, 4, batch_first=True, bidirectional=True)
    with torch.no_grad():
        for name, parameter in ours.ahead.named_parameters():
            getattr(theirs, name).copy_(parameter)
        for name, parameter in ours.back.named_parameters():
            getattr(theirs, f"{name}_reverse").copy_(parameter)
    inputs = torch.randn(4, 7, 6).requires_grad_()
    packed = nn.utils.rnn.pack_padded_sequence(inputs, torch.tensor(LENGTHS), batch_first=True, enforce_sorted=False)
    expected = nn.utils.rnn.pad_packed_sequence(theirs(packed)[0], batch_first=True)[0]
    found = ours(inputs, MASK)
    torch.testing.assert_close(found, expected)
    assert (found[~MASK] == 0).all()
    weights = torch.randn_like(found)
    (wanted,) = torch.autograd.grad((expected * weights).sum(), inputs, retain_graph=True)
    (got,) = torch.autograd.grad((found * weights).sum(), inputs)
    torch.testing.assert_close(got, wanted)


def test_padding_is_not_seen_by_the_bilstm() -> None:
    layer, inputs = BiLSTM(6, 8), torch.randn(4, 7, 6)
    padded = torch.cat([inputs.masked_fill(~MASK[..., None], 9.0), torch.full((4, 3, 6), 7.0)], 1)
    longer = torch.cat([MASK, torch.zeros(4, 3, dtype=torch.bool)], 1)
    torch.testing.assert_close(layer(padded, longer)[:, :7], layer(inputs, MASK))
    assert torch.equal(turned_round(MASK)[0], torch.tensor([4, 3, 2, 1, 0, 5, 6]))
    with pytest.raises(InputError, match="even number"):
        BiLSTM(6, 7)


def test_words_are_added_to_characters() -> None:
    layer = MixedEmbedding(9, 4, word_dim=3)
    ids, words, vectors = torch.tensor([[3, 4, 0]]), torch.tensor([[1, 1, 0]]), torch.randn(2, 3)
    vectors[0] = 0
    assert layer.words is not None
    expected = (
        layer.characters.weight[ids[0]] + torch.stack([vectors[1], vectors[1], vectors[0]]) @ layer.words.weight.T
    )
    torch.testing.assert_close(layer(ids, words, vectors)[0], expected)
    assert (layer(ids, words, vectors)[0, 2] == 0).all()
    torch.testing.assert_close(layer(ids), layer.characters(ids))


def test_half_pointers_are_a_convolution_and_two_scores() -> None:
    head, hidden = HalfPointer(4), torch.randn(2, 5, 4)
    padded = nn.functional.pad(hidden, (0, 0, 1, 1))
    for place in range(5):
        inner = sum(padded[:, place + k] @ head.inner.weight[:, :, k].T for k in range(3)) + head.inner.bias
        torch.testing.assert_close(head(hidden)[:, place], torch.relu(inner) @ head.outer.weight.T + head.outer.bias)


def test_the_loss_counts_valid_places_and_stays_finite() -> None:
    """Mean cross-entropy of p = sigmoid(score) * border over valid places; a label where p is 0 costs nothing."""
    scores, labels = torch.randn(4, 7, 2).requires_grad_(), torch.rand(4, 7, 2) < 0.3
    borders = torch.rand(4, 7, 2) < 0.5
    labels &= borders & MASK[..., None]
    p = scores.sigmoid() * borders
    plain = nn.functional.binary_cross_entropy(p, labels.float(), reduction="none")
    expected = (plain * MASK[..., None]).sum((0, 1)) / MASK.sum()
    torch.testing.assert_close(torch.stack(bordered_loss(scores, labels, borders, MASK)), expected)
    everywhere = torch.ones_like(labels)  # gold outside the dictionary: 0 * log 0
    losses = torch.stack(bordered_loss(scores, everywhere, borders, MASK))
    assert torch.isfinite(losses).all()
    losses.sum().backward()
    assert scores.grad is not None
    assert torch.isfinite(scores.grad).all()
    assert (scores.grad[~borders] == 0).all()
    assert (scores.grad[~MASK] == 0).all()
    nothing = torch.stack(bordered_loss(scores, everywhere, torch.zeros_like(borders), MASK))
    assert nothing.tolist() == [0.0, 0.0]


def plain_attention(layer: CrossAttention, queries: Tensor, keys: Tensor, valid: int) -> Tensor:
    """One query after the other, one head after the other."""
    size = queries.shape[-1] // layer.num_heads
    query, key, value = (
        part(states).split(size, -1)
        for part, states in ((layer.query, queries), (layer.key, keys[:valid]), (layer.value, keys[:valid]))
    )
    heads = []
    for q, k, v in zip(query, key, value, strict=True):
        heads.append(torch.stack([torch.softmax(k @ one / math.sqrt(size), 0) @ v for one in q]))
    return torch.cat(heads, -1)


def test_the_match_is_that_of_the_formula() -> None:
    match = CrossMatch(8, num_heads=2).eval()
    one, other, more = torch.randn(4, 7, 8), torch.randn(4, 6, 8), torch.randn(4, 8)
    other_lengths = [6, 2, 1, 4]
    other_mask = torch.arange(6) < torch.tensor(other_lengths)[:, None]
    scores = match(one, other, MASK, other_mask, more)
    for row, (length, size) in enumerate(zip(LENGTHS, other_lengths, strict=True)):
        left = plain_attention(match.left, one[row, :length], other[row], size).amax(0)
        right = plain_attention(match.right, other[row, :size], one[row], length).amax(0)
        torch.testing.assert_close(scores[row], match.judge(torch.cat([left, right, more[row]]))[0])
    assert not any("bias" in name for name, _ in match.left.named_parameters())
    seen = match.left(one, other, MASK, other_mask)
    assert (seen[~MASK] == 0).all()
    with pytest.raises(InputError, match="num_heads must divide dim"):
        CrossAttention(8, 3)


def bits(*rows: str) -> Tensor:
    return torch.tensor([[letter == "x" for letter in row] for row in rows])


@pytest.mark.parametrize(
    ("starts", "ends", "expected"),
    [
        (["x...."], ["..x.x"], [(0, 0, 2)]),
        (["xx..."], ["..x.x"], [(0, 0, 2), (0, 1, 2)]),  # two starts, one end
        (["x.x.."], [".x..x"], [(0, 0, 1), (0, 2, 4)]),
        (["..x.."], [".x..."], []),  # no end any more
        (["..x.."], ["..x.."], [(0, 2, 2)]),
        (["...x.", "....."], [".....", "x...."], []),  # the end of another text
        (["x....", "..x.."], [".....", "...x."], [(1, 2, 3)]),
        ([".....", "x...."], ["x....", "....."], []),
    ],
)
def test_starts_take_the_nearest_end(starts: list[str], ends: list[str], expected: list) -> None:
    found = pair_nearest(bits(*starts), bits(*ends))
    assert [(row, first, last) for row, _, first, last in found.tolist()] == expected
