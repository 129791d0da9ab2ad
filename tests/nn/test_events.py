"""Decoding: gold events to score matrices and back, with the cases that other decoders get wrong."""

import warnings

import pytest
import torch
from torch import Tensor

from kexue.errors import InputError
from kexue.nn.decoding import decode_event_batch, decode_events
from kexue.nn.decoding.events import Events, Span

ROLES = {"arrest": ["trigger", "who", "term"], "meet": ["trigger", "a", "b"]}
LABELS = [[kind, role] for kind, roles in ROLES.items() for role in roles]


def gold_scores(events: list[tuple[str, list[Span]]], length: int = 12) -> tuple[Tensor, Tensor, Tensor]:
    """Score matrices of a model that is never wrong."""
    arguments, heads, tails = -torch.ones(6, length, length), -torch.ones(length, length), -torch.ones(length, length)
    for event_type, spans in events:
        for role, start, end in spans:
            arguments[LABELS.index([event_type, role]), start, end] = 1
        for one, (_, start, end) in enumerate(spans):
            for _, other_start, other_end in spans[:one]:
                heads[min(start, other_start), max(start, other_start)] = 1
                tails[min(end, other_end), max(end, other_end)] = 1
    return arguments, heads, tails


def as_sets(events: list[tuple[str, list[Span]]]) -> set[tuple[str, frozenset]]:
    return {(kind, frozenset(spans)) for kind, spans in events}


def found_sets(events: Events) -> set[tuple[str, frozenset]]:
    found = [(kind, frozenset(spans)) for kind, group in events.items() for spans in group]
    assert len(found) == len(set(found))
    assert all(events.values()), "a type without events"
    return set(found)


CASES = {
    "none": [],
    "trigger alone": [("arrest", [("trigger", 3, 4)])],
    "one trigger, two persons, two terms": [
        ("arrest", [("trigger", 5, 6), ("who", 0, 1), ("term", 7, 8)]),
        ("arrest", [("trigger", 5, 6), ("who", 2, 3), ("term", 9, 10)]),
    ],
    "cliques of 4 and 5 that share a node": [
        ("arrest", [("trigger", 0, 0), ("who", 1, 1), ("who", 2, 2), ("term", 3, 3)]),
        ("arrest", [("trigger", 0, 0), ("who", 4, 4), ("who", 5, 5), ("term", 6, 6), ("term", 7, 7)]),
    ],
    "two roles on one span": [("meet", [("trigger", 0, 0), ("a", 2, 4), ("b", 2, 4)])],
    "one span alone in two roles": [("meet", [("a", 2, 4), ("b", 2, 4)])],
    "one span in two types": [
        ("meet", [("trigger", 1, 1), ("a", 2, 4)]),
        ("arrest", [("trigger", 6, 6), ("who", 2, 4)]),
    ],
    "nested spans": [("meet", [("trigger", 0, 0), ("a", 2, 6), ("b", 2, 4)])],
    "last cell": [("meet", [("a", 0, 0), ("b", 11, 11)])],
}


@pytest.mark.parametrize("name", CASES)
def test_gold_matrices_decode_to_gold_events(name: str) -> None:
    assert found_sets(decode_events(*gold_scores(CASES[name]), LABELS)) == as_sets(CASES[name])


def test_same_span_in_two_unlinked_roles_is_two_events() -> None:
    """A node is no neighbour of another on its span unless the diagonal cell says so."""
    arguments, heads, tails = gold_scores([])
    arguments[4, 2, 4] = arguments[5, 2, 4] = 1
    events = decode_events(arguments, heads, tails, LABELS)
    assert found_sets(events) == {("meet", frozenset({("a", 2, 4)})), ("meet", frozenset({("b", 2, 4)}))}


def test_sentences_of_a_batch_stay_apart() -> None:
    cases = list(CASES.values())
    scores = [torch.stack(parts) for parts in zip(*map(gold_scores, cases), strict=True)]
    found = decode_event_batch(*scores, LABELS)
    assert [found_sets(events) for events in found] == [as_sets(case) for case in cases]


def test_labels_in_any_order() -> None:
    order = [5, 0, 3, 1, 4, 2]
    labels = [LABELS[number] for number in order]
    for case in CASES.values():
        arguments, heads, tails = gold_scores(case)
        assert found_sets(decode_events(arguments[order], heads, tails, labels)) == as_sets(case)
    with pytest.warns(UserWarning, match="more candidate spans of one type"):
        decode_events(arguments[order], heads, tails, labels, max_nodes=1)


def test_both_links_are_needed() -> None:
    case = CASES["nested spans"]
    arguments, heads, tails = gold_scores(case)
    alone = {("meet", frozenset({span})) for span in case[0][1]}
    assert found_sets(decode_events(arguments, heads, -torch.ones_like(tails), LABELS)) == alone


def test_required_role() -> None:
    case = [*CASES["one span alone in two roles"], ("arrest", [("trigger", 6, 6), ("who", 8, 8)])]
    assert found_sets(decode_events(*gold_scores(case), LABELS, required_role="trigger")) == as_sets(case[1:])


def test_places_hide_special_tokens_and_backward_spans() -> None:
    arguments, heads, tails = gold_scores(CASES["last cell"])
    arguments[0, 5, 3] = 1
    places = torch.ones(1, 12, dtype=torch.bool)
    places[0, 11] = False
    found = decode_event_batch(arguments[None], heads[None], tails[None], LABELS, places)
    assert found == [{"meet": [(("a", 0, 0),)]}]


def test_the_best_nodes_are_kept_and_it_is_said() -> None:
    arguments, heads, tails = gold_scores([])
    arguments[1] = torch.linspace(1, 2, 144).view(12, 12)
    with pytest.warns(UserWarning, match="more candidate spans .* than max_nodes=3"):
        events = decode_events(arguments, heads, tails, LABELS, max_nodes=3)
    assert found_sets(events) == {
        ("arrest", frozenset({("who", start, end)})) for start, end in ((10, 10), (10, 11), (11, 11))
    }


def test_a_noisy_type_leaves_room_for_the_others() -> None:
    case = CASES["nested spans"]
    arguments, heads, tails = gold_scores(case)
    arguments[1] = torch.linspace(5, 6, 144).view(12, 12)
    arguments[2] = torch.linspace(6, 7, 144).view(12, 12)
    with pytest.warns(UserWarning, match="more candidate spans of one type"):
        events = decode_events(arguments, heads, tails, LABELS, max_nodes=3)
    assert found_sets({"meet": events["meet"]}) == as_sets(case)
    spans = {span for arguments in events["arrest"] for span in arguments}
    assert spans == {("term", start, end) for start, end in ((10, 10), (10, 11), (11, 11))}


def test_the_best_are_kept_of_several_matrices_and_places() -> None:
    arguments, heads, tails = gold_scores([])
    arguments[0, 3, 5], arguments[1, 4, 4], arguments[2, 6, 7], arguments[2, 8, 8] = 2, 4, 3, 1
    arguments[1, 11, 11] = 9
    places = torch.ones(1, 12, dtype=torch.bool)
    places[0, 11] = False
    with pytest.warns(UserWarning, match="more candidate spans of one type"):
        found = decode_event_batch(arguments[None], heads[None], tails[None], LABELS, places, max_nodes=2)
    assert found_sets(found[0]) == {("arrest", frozenset({span})) for span in (("who", 4, 4), ("term", 6, 7))}


def test_arguments_stand_in_the_order_of_the_text() -> None:
    spans = [("a", 7, 8), ("b", 2, 6), ("trigger", 2, 4), ("b", 2, 4), ("a", 0, 9)]
    in_order = (("a", 0, 9), ("trigger", 2, 4), ("b", 2, 4), ("b", 2, 6), ("a", 7, 8))
    assert decode_events(*gold_scores([("meet", spans)]), LABELS) == {"meet": [in_order]}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_scores_in_any_precision(dtype: torch.dtype) -> None:
    case = CASES["one span in two types"]
    scores = [part.to(dtype) for part in gold_scores(case)]
    assert found_sets(decode_events(*scores, LABELS)) == as_sets(case)


def test_an_untrained_model_does_not_explode() -> None:
    torch.manual_seed(0)
    scores = torch.randn(2, 6, 100, 100), torch.randn(2, 100, 100), torch.randn(2, 100, 100)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        events = decode_event_batch(*scores, LABELS, max_nodes=30, max_events=50)
    assert [{kind: len(group) for kind, group in row.items()} for row in events] == [{"arrest": 50, "meet": 50}] * 2


def test_wrong_values_are_explained() -> None:
    scores = gold_scores([])
    with pytest.raises(InputError, match="max_nodes=65"):
        decode_events(*scores, LABELS, max_nodes=65)
    with pytest.raises(InputError, match="5 labels for scores of 6"):
        decode_events(*scores, LABELS[:5])
