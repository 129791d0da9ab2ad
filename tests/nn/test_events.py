"""Decoding: gold events to score matrices and back, with the cases that other decoders get wrong."""

import gc
import warnings

import pytest
import torch
from torch import Tensor

from kexue.errors import InputError
from kexue.nn.decoding import decode_event_batch, decode_events
from kexue.nn.decoding.events import DecodedEvent

ROLES = {"arrest": ["trigger", "who", "term"], "meet": ["trigger", "a", "b"]}
LABELS = [[kind, role] for kind, roles in ROLES.items() for role in roles]


def gold_scores(events: list[DecodedEvent], length: int = 12) -> tuple[Tensor, Tensor, Tensor]:
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


def as_sets(events: list[DecodedEvent]) -> set[tuple[str, frozenset]]:
    assert len(events) == len({(kind, frozenset(spans)) for kind, spans in events})
    return {(kind, frozenset(spans)) for kind, spans in events}


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
    assert as_sets(decode_events(*gold_scores(CASES[name]), LABELS)) == as_sets(CASES[name])


def test_same_span_in_two_unlinked_roles_is_two_events() -> None:
    """A node is no neighbour of another on its span unless the diagonal cell says so."""
    arguments, heads, tails = gold_scores([])
    arguments[4, 2, 4] = arguments[5, 2, 4] = 1
    events = decode_events(arguments, heads, tails, LABELS)
    assert as_sets(events) == {("meet", frozenset({("a", 2, 4)})), ("meet", frozenset({("b", 2, 4)}))}


def test_sentences_of_a_batch_stay_apart() -> None:
    cases = list(CASES.values())
    scores = [torch.stack(parts) for parts in zip(*map(gold_scores, cases), strict=True)]
    found = decode_event_batch(*scores, LABELS)
    assert [as_sets(events) for events in found] == [as_sets(case) for case in cases]


def test_labels_in_any_order() -> None:
    order = [5, 0, 3, 1, 4, 2]
    labels = [LABELS[number] for number in order]
    for case in CASES.values():
        arguments, heads, tails = gold_scores(case)
        assert as_sets(decode_events(arguments[order], heads, tails, labels)) == as_sets(case)
    with pytest.warns(UserWarning, match="max_nodes"):
        decode_events(arguments[order], heads, tails, labels, max_nodes=1)


def test_both_links_are_needed() -> None:
    case = CASES["nested spans"]
    arguments, heads, tails = gold_scores(case)
    alone = {("meet", frozenset({span})) for span in case[0][1]}
    assert as_sets(decode_events(arguments, heads, -torch.ones_like(tails), LABELS)) == alone


def test_required_role() -> None:
    case = [*CASES["one span alone in two roles"], ("arrest", [("trigger", 6, 6), ("who", 8, 8)])]
    assert as_sets(decode_events(*gold_scores(case), LABELS, required_role="trigger")) == as_sets(case[1:])


def test_places_hide_special_tokens_and_backward_spans() -> None:
    arguments, heads, tails = gold_scores(CASES["last cell"])
    arguments[0, 5, 3] = 1
    places = torch.ones(1, 12, dtype=torch.bool)
    places[0, 11] = False
    found = decode_event_batch(arguments[None], heads[None], tails[None], LABELS, places)
    assert found == [[("meet", (("a", 0, 0),))]]


def test_the_best_nodes_are_kept_and_it_is_said() -> None:
    arguments, heads, tails = gold_scores([])
    arguments[1] = torch.linspace(1, 2, 144).view(12, 12)
    with pytest.warns(UserWarning, match="more candidate arguments .* than max_nodes"):
        events = decode_events(arguments, heads, tails, LABELS, max_nodes=3)
    assert as_sets(events) == {
        ("arrest", frozenset({("who", start, end)})) for start, end in ((10, 10), (10, 11), (11, 11))
    }


def test_a_noisy_type_leaves_room_for_the_others() -> None:
    case = CASES["nested spans"]
    arguments, heads, tails = gold_scores(case)
    arguments[1] = torch.linspace(5, 6, 144).view(12, 12)
    arguments[2] = torch.linspace(6, 7, 144).view(12, 12)
    with pytest.warns(UserWarning, match="max_nodes"):
        events = decode_events(arguments, heads, tails, LABELS, max_nodes=3)
    assert as_sets([event for event in events if event[0] == "meet"]) == as_sets(case)
    spans = {span for kind, arguments in events if kind == "arrest" for span in arguments}
    assert spans == {("term", start, end) for start, end in ((10, 10), (10, 11), (11, 11))}


def test_the_best_are_kept_of_several_matrices_and_places() -> None:
    arguments, heads, tails = gold_scores([])
    arguments[0, 3, 5], arguments[1, 4, 4], arguments[2, 6, 7], arguments[2, 8, 8] = 2, 4, 3, 1
    arguments[1, 11, 11] = 9
    places = torch.ones(1, 12, dtype=torch.bool)
    places[0, 11] = False
    with pytest.warns(UserWarning, match="max_nodes"):
        found = decode_event_batch(arguments[None], heads[None], tails[None], LABELS, places, max_nodes=2)
    assert as_sets(found[0]) == {("arrest", frozenset({span})) for span in (("who", 4, 4), ("term", 6, 7))}


@pytest.mark.parametrize("enabled", [True, False])
def test_the_garbage_collector_is_left_as_it_was(enabled: bool) -> None:
    before = gc.isenabled()
    try:
        (gc.enable if enabled else gc.disable)()
        decode_events(*gold_scores(CASES["nested spans"]), LABELS)
        assert gc.isenabled() == enabled
        with pytest.raises(InputError):
            decode_events(*gold_scores([]), LABELS, max_nodes=0)
        assert gc.isenabled() == enabled
    finally:
        (gc.enable if before else gc.disable)()


def test_an_untrained_model_does_not_explode() -> None:
    torch.manual_seed(0)
    scores = torch.randn(2, 6, 100, 100), torch.randn(2, 100, 100), torch.randn(2, 100, 100)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        events = decode_event_batch(*scores, LABELS, max_nodes=30, max_events=50)
    assert [{kind: sum(k == kind for k, _ in row) for kind in ("arrest", "meet")} for row in events] == [
        {"arrest": 50, "meet": 50}
    ] * 2


def test_wrong_values_are_explained() -> None:
    scores = gold_scores([])
    with pytest.raises(InputError, match="max_nodes=65"):
        decode_events(*scores, LABELS, max_nodes=65)
    with pytest.raises(InputError, match="5 labels for scores of 6"):
        decode_events(*scores, LABELS[:5])
