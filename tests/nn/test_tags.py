"""Spans to tags and back, for both schemes, and tags that contradict each other."""

import random

import pytest
import torch

from kexue.errors import InputError
from kexue.nn.decoding import TagScheme, TypedScores
from kexue.nn.decoding.tags import SchemeName, apart


def random_spans(rng: random.Random, length: int, num_types: int) -> list[tuple[int, int, int]]:
    """Spans that do not overlap, neighbours among them."""
    spans, place = [], 0
    while place < length:
        size = rng.randint(1, 3)
        if rng.random() < 0.5 and place + size <= length:
            spans.append((rng.randrange(num_types), place, place + size - 1))
        place += size
    return spans


@pytest.mark.parametrize("name", ["BIO", "BIOS", "BIOES"])
def test_spans_come_back(name: SchemeName) -> None:
    rng, scheme = random.Random(0), TagScheme(3, name)
    gold = [random_spans(rng, 10, 3) for _ in range(200)]
    most = max(map(len, gold))
    cells = torch.tensor([spans + [(-1, -1, -1)] * (most - len(spans)) for spans in gold])
    tags = scheme.tags(cells, 10)
    assert scheme.spans(tags) == gold
    follows, begins, ends = scheme.allowed()
    assert begins[tags[:, 0]].all()
    assert ends[tags[:, -1]].all()
    assert follows[tags[:, :-1], tags[:, 1:]].all()


def test_tags_by_hand() -> None:
    cells = torch.tensor([[(1, 0, 0), (0, 2, 4), (1, 5, 6)]])
    assert TagScheme(2, "BIO").tags(cells, 8).tolist() == [[3, 0, 1, 2, 2, 3, 4, 0]]
    assert TagScheme(2, "BIOS").tags(cells, 8).tolist() == [[6, 0, 1, 2, 2, 4, 5, 0]]
    assert TagScheme(2, "BIOES").tags(cells, 8).tolist() == [[8, 0, 1, 2, 3, 5, 7, 0]]


@pytest.mark.parametrize(
    ("name", "num_types", "num_pairs"), [("BIO", 1, 8), ("BIO", 2, 19), ("BIOS", 1, 11), ("BIOES", 1, 13)]
)
def test_how_many_pairs_are_allowed(name: SchemeName, num_types: int, num_pairs: int) -> None:
    """BIO: all into O and B, and into I from B and I of its type."""
    assert TagScheme(num_types, name).allowed()[0].sum() == num_pairs


def test_contradictions_are_read_as_scorers_read_them() -> None:
    bio, bioes = TagScheme(2, "BIO"), TagScheme(1, "BIOES")  # O, B0, I0, B1, I1 and O, B, I, E, S
    assert bio.spans(torch.tensor([[2, 2, 0, 1, 4, 4]])) == [[(0, 0, 1), (0, 3, 3), (1, 4, 5)]]
    assert bioes.spans(torch.tensor([[1, 1, 0, 3, 2, 4, 2]])) == [
        [(0, 0, 0), (0, 1, 1), (0, 3, 3), (0, 4, 4), (0, 5, 5), (0, 6, 6)]
    ]


@pytest.mark.parametrize("name", ["BIO", "BIOS", "BIOES"])
def test_a_span_of_one_token_is_counted_in_every_scheme(name: SchemeName) -> None:
    """Scores by tags are those of sets of spans: nothing of one token is dropped, whether it is tagged B or S."""
    rng, scheme = random.Random(1), TagScheme(3, name)
    gold, found = ([random_spans(rng, 10, 3) for _ in range(100)] for _ in range(2))

    def by_tags(rows: list[list[tuple[int, int, int]]]) -> list[list[tuple[str, int, int]]]:
        cells = torch.tensor([spans + [(-1, -1, -1)] * (10 - len(spans)) for spans in rows])
        return [[(str(kind), a, b) for kind, a, b in row] for row in scheme.spans(scheme.tags(cells, 10))]

    scores = TypedScores(["0", "1", "2"])
    scores.update(by_tags(found), by_tags(gold))
    right = sum(len(set(a) & set(b)) for a, b in zip(found, gold, strict=True))
    assert scores.compute()["f1"].item() == pytest.approx(2 * right / sum(map(len, found + gold)))
    lone = torch.tensor([[0, 1, 0]])  # B without a token after it
    assert scheme.spans(lone) == [[(0, 1, 1)]]


def test_wrong_schemes_are_explained() -> None:
    with pytest.raises(InputError, match="use one of BIO, BIOS, BIOES"):
        TagScheme(1, "IOB")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="use 1 or more"):
        TagScheme(0)


def test_any_tag_that_begins_nothing_goes_on() -> None:
    """The I of another type goes on with a span, and an I without a beginning is none."""
    bio, bioes = TagScheme(2, "BIO"), TagScheme(1, "BIOES")
    rows = torch.tensor([[2, 1, 4, 2, 0, 4, 3, 1, 2], [0, 0, 2, 4, 0, 0, 0, 0, 3]])
    assert bio.spans(rows, "any") == [[(0, 1, 3), (1, 6, 6), (0, 7, 8)], [(1, 8, 8)]]
    assert bioes.spans(torch.tensor([[3, 1, 2, 3, 2, 4, 1, 0]]), "any") == [[(0, 1, 3), (0, 5, 5), (0, 6, 6)]]


@pytest.mark.parametrize("name", ["BIO", "BIOES"])
def test_tags_without_contradictions_are_read_alike(name: SchemeName) -> None:
    rng, scheme = random.Random(1), TagScheme(3, name)
    for _ in range(50):
        gold = random_spans(rng, 10, 3)
        tags = scheme.tags(torch.tensor([gold or [(-1, -1, -1)]]), 10)
        assert scheme.spans(tags, "any") == [gold]


def test_of_spans_that_overlap_the_longest_stay() -> None:
    """Against sets of tokens, with and without layers."""
    rng = random.Random(2)
    for num_layers in (1, 3):
        rows = [[(rng.randrange(3), a := rng.randrange(8), rng.randrange(a, 8)) for _ in range(6)] for _ in range(100)]
        cells = torch.tensor([[*row, (-1, -1, -1)] for row in rows])
        kept = apart(cells, 8, cells[..., 0] if num_layers > 1 else None, num_layers)
        assert not kept[:, -1].any()
        for row, found in zip(rows, kept.tolist(), strict=True):
            taken: dict[int, set[int]] = {}
            right = [False] * 7
            for number in sorted(range(6), key=lambda number: row[number][1] - row[number][2]):
                kind, first, last = row[number]
                used, places = taken.setdefault(kind if num_layers > 1 else 0, set()), set(range(first, last + 1))
                right[number] = not used & places
                used |= places if right[number] else set()
            assert found == right
