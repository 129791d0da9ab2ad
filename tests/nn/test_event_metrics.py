"""Counts of events, arguments and types: by hand, and the same however the sentences are dealt out to ranks."""

import pytest
import torch
from ranks import run_ranks

from kexue.nn.decoding import EventScores, count_matches

WON = ("win", [("trigger", 0, 1), ("who", 2, 3), ("prize", 5, 6)])
LOST = ("lose", [("trigger", 8, 9), ("who", 2, 3)])
PARTLY = ("win", [("trigger", 0, 1), ("who", 2, 3)])


def test_counts_by_hand() -> None:
    assert count_matches([WON, LOST], [WON, LOST], "trigger") == [[2, 2, 2], [3, 3, 3], [2, 2, 2]]
    assert count_matches([PARTLY], [WON, LOST], "trigger") == [[0, 1, 2], [1, 1, 3], [1, 1, 2]]
    assert count_matches([PARTLY], [WON])[1] == [2, 2, 3]  # without a trigger role every role is an argument
    assert count_matches([], [], "trigger") == [[0, 0, 0]] * 3


def test_an_argument_belongs_to_its_type() -> None:
    assert count_matches([("lose", WON[1])], [WON], "trigger") == [[0, 1, 1], [0, 2, 2], [0, 1, 1]]


def test_repetitions_earn_once() -> None:
    repeated = [WON, (WON[0], list(reversed(WON[1]))), WON]
    assert count_matches(repeated, [WON], "trigger") == [[1, 1, 1], [2, 2, 2], [1, 1, 1]]


def test_sentences_stay_apart() -> None:
    """The right events in the wrong sentences earn nothing."""
    scores = EventScores("trigger")
    scores.update([[WON], [LOST]], [[LOST], [WON]])
    assert {name: value.item() for name, value in scores.compute().items() if name.endswith("f1")} == {
        "event_f1": 0,
        "argument_f1": 0,
        "type_f1": 0,
    }


def test_precision_recall_f1() -> None:
    scores = EventScores("trigger")
    scores.update([[PARTLY]], [[WON, LOST]])
    scores.update([[WON]], [[WON]])
    found = {name: value.item() for name, value in scores.compute().items()}
    assert found == pytest.approx(
        {
            "event_precision": 1 / 2,
            "event_recall": 1 / 3,
            "event_f1": 2 / 5,
            "argument_precision": 1.0,
            "argument_recall": 3 / 5,
            "argument_f1": 6 / 8,
            "type_precision": 1.0,
            "type_recall": 2 / 3,
            "type_f1": 4 / 5,
        }
    )
    scores.reset()
    assert scores.compute()["event_f1"] == 0


def scores_of_this_rank(world: int) -> dict[str, float]:
    """Each rank sees every `world`-th sentence."""
    rank = 0
    if world > 1:
        torch.distributed.init_process_group("gloo")
        rank = torch.distributed.get_rank()
    sentences = [([WON], [WON]), ([PARTLY], [WON, LOST]), ([LOST, WON], [LOST])][rank::world]
    scores = EventScores("trigger")
    scores.update([found for found, _ in sentences], [wanted for _, wanted in sentences])
    return {name: value.item() for name, value in scores.compute().items()}


def test_two_ranks_count_as_one() -> None:
    alone = scores_of_this_rank(1)
    assert run_ranks(scores_of_this_rank, 2, 2) == [alone, alone]
