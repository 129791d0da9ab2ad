"""How many items of each type were found: precision, recall and F1 over all, by type, and their mean over types.

Only whole counts are kept and summed over ranks, so that the scores do not depend on how sentences were dealt out.
"""

from collections.abc import Hashable, Iterable, Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

TypedItem = tuple[Hashable, ...]
"""The type, then what it is: start and end of a span, or a relation's subject and object under its predicate."""


class TypedScores(Metric):
    """Precision, recall and F1 of items that have a type; an item is right when its type and all else are.

    An item of a sentence counts once, however often it is predicted or annotated.

    Args:
        types: the types; any other found or wanted is an error.
    """

    higher_is_better = True
    full_state_update = False
    counts: Tensor

    def __init__(self, types: Sequence[str]) -> None:
        super().__init__()
        self.types: dict[Hashable, int] = {name: number for number, name in enumerate(dict.fromkeys(types))}
        self.add_state("counts", torch.zeros(len(self.types), 3, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, predicted: Sequence[Iterable[TypedItem]], gold: Sequence[Iterable[TypedItem]]) -> None:
        """Take in the items of a batch, one group for each sentence."""
        counts = [[0, 0, 0] for _ in self.types]
        for found, wanted in zip(predicted, gold, strict=True):
            items = set(found), set(wanted)
            for column, group in enumerate((items[0] & items[1], *items)):
                for item in group:
                    counts[self.types[item[0]]][column] += 1
        self.counts += torch.tensor(counts, device=self.counts.device)

    def compute(self) -> dict[str, Tensor]:
        """Scores, 0 where undefined.

        Returns:
            `f1`, `precision` and `recall` of all items together; `macro_f1` and so on, the mean over the types that
            were found or wanted; `f1/TYPE` and so on of each of these types.
        """
        scores = {name: value.float() for name, value in figures(self.counts.sum(0)).items()}
        by_type = figures(self.counts)
        seen = self.counts.sum(-1) > 0
        for name, values in by_type.items():
            scores[f"macro_{name}"] = ((values * seen).sum() / seen.sum().clamp(min=1)).float()
        for number in seen.nonzero().flatten().tolist():
            kind = list(self.types)[number]
            scores |= {f"{name}/{kind}": values[number].float() for name, values in by_type.items()}
        return scores


def figures(counts: Tensor) -> dict[str, Tensor]:
    """Precision, recall and F1 `(...)` of counts right, predicted, gold `(..., 3)`."""
    correct, predicted, gold = counts.double().unbind(-1)
    return {
        "f1": 2 * correct / (predicted + gold).clamp(min=1),
        "precision": correct / predicted.clamp(min=1),
        "recall": correct / gold.clamp(min=1),
    }
