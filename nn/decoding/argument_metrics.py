"""How much of the arguments of events was found, by their texts: what LIC 2020 counts, exact on any number of ranks.

An argument is an event type, a role and a text; where it stands does not count. A text that is nearly right earns a
part, in whole units of 2^-32, so that the scores do not depend on how sentences were dealt out.

Source: the rules of the event task of LIC 2020; the dev score of https://kexue.fm/archives/7321.
"""

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torchmetrics import Metric

from .typed_metrics import figures

PlainArgument = tuple[str, str, str]
"""(event type, role, text)."""
UNIT = 1 << 32


def character_f1(one: str, other: str) -> float:
    """F1 of the characters that two texts have in common, however they are ordered."""
    common = sum((Counter(one) & Counter(other)).values())
    return 2 * common / max(1, len(one) + len(other))


def subsequence_share(one: str, other: str) -> float:
    """Twice the length of the longest common subsequence over the length of both texts."""
    row = [0] * (len(other) + 1)
    for character in one:
        before = row[:]
        for place, same in enumerate(other, 1):
            row[place] = before[place - 1] + 1 if character == same else max(before[place], row[place - 1])
    return 2 * row[-1] / max(1, len(one) + len(other))


def earned(predicted: Iterable[str], gold: Iterable[str]) -> float:
    """What predicted texts earn of the gold ones of the same type and role.

    Each earns `character_f1` with one gold text at most and each gold text pays once, in the way that earns most; a
    text counts once however often it is predicted.
    """
    found, wanted = sorted(set(predicted)), sorted(set(gold))
    table = np.array([[character_f1(one, other) for other in wanted] for one in found]).reshape(len(found), len(wanted))
    return float(table[linear_sum_assignment(table, maximize=True)].sum())


class ArgumentScores(Metric):
    """Precision, recall and F1 of arguments and of event types.

    Args:
        types: the event types; any other found or wanted is an error.
        trigger_role: role of the trigger, which names a type but is no argument.
    """

    higher_is_better = True
    full_state_update = False
    counts: Tensor
    subsequences: Tensor
    kinds: Tensor

    def __init__(self, types: Sequence[str], trigger_role: str | None = None) -> None:
        super().__init__()
        self.types = {name: number for number, name in enumerate(dict.fromkeys(types))}
        self.trigger_role = trigger_role
        # Columns: earned in units, predicted, gold.
        self.add_state("counts", torch.zeros(len(self.types), 3, dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("subsequences", torch.zeros(3, dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("kinds", torch.zeros(3, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, predicted: Iterable[Iterable[PlainArgument]], gold: Iterable[Iterable[PlainArgument]]) -> None:
        """Take in the arguments of a batch, one group for each sentence, in the order of the text."""
        counts = np.zeros((len(self.types), 3), dtype=np.int64)
        others = np.zeros((2, 3), dtype=np.int64)
        for groups in zip(predicted, gold, strict=True):
            items = [list(group) for group in groups]
            kinds = [{kind for kind, _, _ in group} for group in items]
            others[0] += [len(kinds[0] & kinds[1]) * UNIT, len(kinds[0]), len(kinds[1])]
            found, wanted = ([item for item in group if item[1] != self.trigger_role] for group in items)
            others[1] += _subsequences(found, wanted)
            for kind, role in {item[:2] for item in (*found, *wanted)}:
                texts = [{text for *where, text in group if where == [kind, role]} for group in (found, wanted)]
                counts[self.types[kind]] += [round(earned(*texts) * UNIT), len(texts[0]), len(texts[1])]
        self.counts += torch.from_numpy(counts).to(self.counts.device)
        self.kinds += torch.from_numpy(others[0]).to(self.counts.device)
        self.subsequences += torch.from_numpy(others[1]).to(self.counts.device)

    def compute(self) -> dict[str, Tensor]:
        """Scores, 0 where undefined.

        Returns:
            `f1`, `precision` and `recall` of LIC 2020, see `earned`; `lcs_f1` and so on, where of each type and role
            the last text alone counts and earns its `subsequence_share`; `type_f1` and so on of event types;
            `f1/TYPE` and so on of the arguments of each type that was found or wanted.
        """
        scores = _scores(self.counts.sum(0))
        scores |= {f"lcs_{name}": value for name, value in _scores(self.subsequences).items()}
        scores |= {f"type_{name}": value for name, value in _scores(self.kinds).items()}
        for kind, number in self.types.items():
            if self.counts[number, 1:].any():
                scores |= {f"{name}/{kind}": value for name, value in _scores(self.counts[number]).items()}
        return scores


def _subsequences(found: Iterable[PlainArgument], wanted: Iterable[PlainArgument]) -> list[int]:
    texts, right = ({(kind, role): text for kind, role, text in group} for group in (found, wanted))
    shares = [subsequence_share(texts[pair], right[pair]) for pair in texts.keys() & right.keys()]
    return [sum(round(share * UNIT) for share in shares), len(texts), len(right)]


def _scores(counts: Tensor) -> dict[str, Tensor]:
    share = counts.double() / torch.tensor([UNIT, 1, 1], device=counts.device)
    return {name: value.float() for name, value in figures(share).items()}
