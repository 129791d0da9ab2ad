"""Decoding relations: gold to score matrices and back, with the cases that are easily got wrong; and their scores."""

import warnings

import pytest
import torch
from ranks import run_ranks
from torch import Tensor

from kexue.errors import InputError
from kexue.nn.decoding import TypedScores, decode_relation_batch, merge_slots
from kexue.nn.decoding.relations import PlainRelation
from kexue.nn.heads import FactoredScores

LABELS = [("plays", "value"), ("plays", "work"), ("plays", "year"), ("wrote", "value")]
LINKS = {1: 4, 2: 5}


def gold_scores(relations: list[PlainRelation], length: int = 12) -> tuple[Tensor, Tensor, Tensor]:
    """Score matrices of a model that is never wrong."""
    entities, heads, tails = (-torch.ones(number, length, length) for number in (2, 6, 6))
    for predicate, subject, slots in relations:
        entities[0, subject[0], subject[1]] = 1
        for slot, span in slots:
            entities[1, span[0], span[1]] = 1
            label = LABELS.index((predicate, slot))
            links = [(label, subject)] + ([(LINKS[label], slots[0][1])] if label in LINKS else [])
            for number, origin in links:
                heads[number, origin[0], span[0]] = tails[number, origin[1], span[1]] = 1
    return entities, heads, tails


def decode(scores: tuple[Tensor, Tensor, Tensor], **options) -> list[PlainRelation]:
    return decode_relation_batch(*(part[None] for part in scores), LABELS, LINKS, **options)[0]


def plays(subject: tuple[int, int], value: tuple[int, int], **slots: tuple[int, int]) -> PlainRelation:
    return "plays", subject, (("value", value), *slots.items())


def wrote(subject: tuple[int, int], value: tuple[int, int]) -> PlainRelation:
    return "wrote", subject, (("value", value),)


CASES = {
    "none": [],
    "one": [wrote((1, 2), (4, 6))],
    "both ways": [wrote((1, 2), (4, 6)), wrote((4, 6), (1, 2))],
    "shared subject and shared object": [wrote((1, 1), (3, 3)), wrote((1, 1), (5, 5)), wrote((7, 7), (5, 5))],
    "a span with itself": [wrote((2, 3), (2, 3))],
    "nested": [wrote((0, 4), (2, 3)), wrote((0, 4), (2, 6))],
    "two predicates of one pair": [wrote((1, 1), (3, 3)), plays((1, 1), (3, 3))],
    "several slots": [plays((0, 0), (2, 3), work=(5, 6), year=(8, 9))],
    "two objects of one subject, slots apart": [
        plays((0, 0), (2, 2), work=(4, 4)),
        plays((0, 0), (6, 6), work=(8, 8), year=(10, 10)),
    ],
    "one value, two spans of a slot": [plays((0, 0), (2, 2), year=(4, 4)), plays((0, 0), (2, 2), year=(6, 6))],
    "two subjects of one value, slots apart": [
        plays((0, 0), (5, 5), work=(2, 2)),
        plays((8, 8), (5, 5), work=(10, 10)),
    ],
    "some with slots, some without": [plays((0, 0), (2, 2)), plays((0, 0), (6, 6), work=(8, 8))],
    "last cell": [wrote((11, 11), (0, 0))],
}


@pytest.mark.parametrize("name", CASES)
def test_gold_matrices_decode_to_gold_relations(name: str) -> None:
    found = decode(gold_scores(CASES[name]))
    assert len(found) == len(CASES[name])
    assert set(found) == set(CASES[name])


def test_sentences_of_a_batch_stay_apart() -> None:
    scores = [torch.stack(parts) for parts in zip(*map(gold_scores, CASES.values()), strict=True)]
    found = decode_relation_batch(*scores, LABELS, LINKS)
    assert [set(relations) for relations in found] == [set(case) for case in CASES.values()]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_scores_in_any_precision_and_factored(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    entities = gold_scores(CASES["nested"])[0].to(dtype)[None]
    parts = torch.randn(1, 12, 12), torch.randn(1, 6, 12), torch.randn(1, 6, 12)
    factored = FactoredScores(*parts).to(dtype)
    found = decode_relation_batch(entities, factored, factored, LABELS, LINKS)
    assert found[0]
    assert found == decode_relation_batch(entities, factored.dense(), factored.dense(), LABELS, LINKS)


def test_both_links_and_both_entities_are_needed() -> None:
    scores = gold_scores(CASES["one"])
    for part in range(3):
        wrong = [score.clone() for score in scores]
        wrong[part][0 if part == 0 else 3] = -1
        assert decode(tuple(wrong)) == []


def test_a_slot_without_its_value_says_nothing() -> None:
    entities, heads, tails = gold_scores(CASES["several slots"])
    heads[0] = -1
    assert decode((entities, heads, tails)) == []


def test_places_hide_special_tokens() -> None:
    places = torch.ones(1, 12, dtype=torch.bool)
    places[0, 11] = False
    assert decode(gold_scores(CASES["last cell"]), places=places) == []


def test_an_untrained_model_does_not_explode() -> None:
    torch.manual_seed(0)
    scores = torch.randn(2, 100, 100), torch.randn(6, 100, 100), torch.randn(6, 100, 100)
    with pytest.warns(UserWarning, match="more candidate spans .* than max_spans=20"):
        found = decode(scores, max_spans=20, max_relations=50)
    assert 0 < len(found) <= 50


def test_the_best_relations_are_kept() -> None:
    entities, heads, tails = gold_scores(CASES["shared subject and shared object"])
    heads[3, 1, 5] = tails[3, 1, 5] = 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decode((entities, heads, tails), max_relations=1) == [wrote((1, 1), (5, 5))]


def test_wrong_values_are_explained() -> None:
    scores = gold_scores([])
    with pytest.raises(InputError, match=r"max_spans=0\): use 1 or more"):
        decode(scores, max_spans=0)
    with pytest.raises(InputError, match="4 labels and 2 links for scores of 5"):
        decode((scores[0], scores[1][:5], scores[2][:5]))


def test_slots_without_links_are_merged() -> None:
    """A lone value takes all that is there; of several each takes the nearest; every part comes back where it can."""
    several = [("plays", slot, (0, 0), span) for slot, span in CASES["several slots"][0][2]]
    assert merge_slots(several, "value") == CASES["several slots"]
    apart = [(p, slot, s, span) for p, s, slots in CASES["some with slots, some without"] for slot, span in slots]
    assert merge_slots(apart, "value") == [plays((0, 0), (2, 2), work=(8, 8)), plays((0, 0), (6, 6), work=(8, 8))]
    years = [("plays", "value", (0, 0), (2, 2)), *(("plays", "year", (0, 0), (at, at)) for at in (4, 6))]
    assert merge_slots(years, "value") == CASES["one value, two spans of a slot"]
    assert merge_slots([("plays", "year", (0, 0), (4, 4))], "value") == []


def scores_of_this_rank(world: int) -> dict[str, float]:
    """Each rank sees every `world`-th sentence."""
    rank = 0
    if world > 1:
        torch.distributed.init_process_group("gloo")
        rank = torch.distributed.get_rank()
    sentences = [([("a", 1), ("a", 1)], [("a", 1), ("a", 2)]), ([("b", 1)], []), ([("a", 2)], [("a", 1)])][rank::world]
    scores = TypedScores(["a", "b", "never"])
    scores.update([found for found, _ in sentences], [wanted for _, wanted in sentences])
    return {name: value.item() for name, value in scores.compute().items()}


def test_scores_together_and_by_type() -> None:
    """Three items predicted (one of them twice, which earns once), three annotated, one right."""
    assert scores_of_this_rank(1) == pytest.approx(
        {
            "f1": 1 / 3,
            "precision": 1 / 3,
            "recall": 1 / 3,
            "macro_f1": 1 / 5,
            "macro_precision": 1 / 4,
            "macro_recall": 1 / 6,
            "f1/a": 2 / 5,
            "precision/a": 1 / 2,
            "recall/a": 1 / 3,
            "f1/b": 0,
            "precision/b": 0,
            "recall/b": 0,
        }
    )


def test_two_ranks_count_as_one() -> None:
    alone = scores_of_this_rank(1)
    assert run_ranks(scores_of_this_rank, 2, 2) == [alone, alone]
