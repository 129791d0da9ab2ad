"""How many events, arguments and event types were found: precision, recall and F1, exact on any number of ranks.

Source: the evaluation described in https://kexue.fm/archives/8926.
"""

from collections.abc import Hashable, Iterable, Sequence
from typing import cast

import torch
from torch import Tensor
from torchmetrics import Metric

PlainEvent = tuple[str, Iterable[tuple[str, Hashable, Hashable]]]
"""(event type, arguments), an argument being (role, start, end)."""
LEVELS = ("event", "argument", "type")


def count_matches(
    predicted: Iterable[PlainEvent], gold: Iterable[PlainEvent], trigger_role: str | None = None
) -> list[list[int]]:
    """Counts of one sentence at each level of `LEVELS`: [correct, predicted, gold].

    An event is right when its type and the exact set of its arguments are, the trigger among them; an argument, when
    event type, role and span are; triggers are no arguments here. Repetitions count once.
    """
    pairs = list(zip(_items(predicted, trigger_role), _items(gold, trigger_role), strict=True))
    return [[len(found & wanted), len(found), len(wanted)] for found, wanted in pairs]


def _items(events: Iterable[PlainEvent], trigger_role: str | None) -> tuple[set[Hashable], ...]:
    whole = {(event_type, frozenset(arguments)) for event_type, arguments in events}
    arguments = {(kind, *argument) for kind, group in whole for argument in group if argument[0] != trigger_role}
    return cast(set[Hashable], whole), cast(set[Hashable], arguments), {kind for kind, _ in whole}


class EventScores(Metric):
    """Precision, recall and F1 of events, arguments and event types.

    Only whole counts are kept, and they are summed over ranks, so the scores do not depend on how sentences were dealt
    out.

    Args:
        trigger_role: role of the trigger, which counts in events but is no argument.
    """

    higher_is_better = True
    full_state_update = False
    counts: Tensor

    def __init__(self, trigger_role: str | None = None) -> None:
        super().__init__()
        self.trigger_role = trigger_role
        self.add_state("counts", torch.zeros(len(LEVELS), 3, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, predicted: Sequence[Iterable[PlainEvent]], gold: Sequence[Iterable[PlainEvent]]) -> None:
        """Take in the events of a batch, one group for each sentence."""
        for found, wanted in zip(predicted, gold, strict=True):
            matches = count_matches(found, wanted, self.trigger_role)
            self.counts += torch.tensor(matches, device=self.counts.device)

    def compute(self) -> dict[str, Tensor]:
        """`event_f1`, `event_precision`, `event_recall`, and the same for `argument` and `type`; 0 where undefined."""
        scores: dict[str, Tensor] = {}
        for level, (correct, predicted, gold) in zip(LEVELS, self.counts.double(), strict=True):
            scores[f"{level}_f1"] = (2 * correct / (predicted + gold).clamp(min=1)).float()
            scores[f"{level}_precision"] = (correct / predicted.clamp(min=1)).float()
            scores[f"{level}_recall"] = (correct / gold.clamp(min=1)).float()
        return scores
