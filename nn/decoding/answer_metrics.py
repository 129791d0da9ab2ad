"""How good short answers are: exact match and F1 over characters, exact on any number of ranks.

Two ways to count are in use. "common_string" is that of CMRC 2018, which DuReader took over: without some punctuation
marks, F1 of the longest string that both have. "characters" is that of SogouQA: half-width, without punctuation and
blanks, F1 of the characters in any order.

Source: `cmrc2018_evaluate.py` of CMRC 2018 (words of other scripts are cut by a pattern here, by NLTK there), the
evaluation tool of SogouQA that https://kexue.fm/archives/6906 uses.
"""

import re
from collections import Counter
from collections.abc import Sequence
from difflib import SequenceMatcher
from typing import Literal

import torch
from torch import Tensor
from torchmetrics import Metric

Counting = Literal["common_string", "characters"]
_CMRC_MARKS = frozenset("-:_*^/\\~`+=，。：？！“”；’《》·、「」（）－～『』")
_SOGOU_MARKS = frozenset(
    "`^~<=>|_-,;:!?/.'\"()[]{}@$*\\&#%+…‰※•—‖‘’“”№←↑→↓∴∨∵∶∩∈∑√∞≯≡≮≤≥≈≌⊥⊙⌒□◆◇◎●★☆♀♂¨°·§¤±\u3000、。〃々〈〉《》「」『』【】〓〔〕〖〗"
    "÷×′▲″△∠≠■ˇˉ￣￥＿！＄（），．：；？～﹑￠"
)
_PIECES = re.compile(r"[\u4e00-\u9fa5]|[^\W\u4e00-\u9fa5]+(?:[.,'][^\W\u4e00-\u9fa5]+)*|[^\w\s]")


def exact_match(predicted: str, gold: Sequence[str], counting: Counting = "common_string") -> float:
    """1 where a predicted answer is one of the right ones, or where both say that there is none; else 0."""
    if not gold or not predicted:
        return float(not gold and not predicted)
    if counting == "common_string":
        return float(_without_marks(predicted) in {_without_marks(text) for text in gold})
    if _plain(predicted) in {form for text in gold for form in (text, _plain(text))}:
        return 1.0
    return float(any(_words(predicted) == _words(text) for text in gold[:1]))


def answer_f1(predicted: str, gold: Sequence[str], counting: Counting = "common_string") -> float:
    """The highest F1 with one of the right answers; 1 where both say that there is none."""
    if not gold or not predicted:
        return float(not gold and not predicted)
    return max(_f1(predicted, text, counting) for text in gold)


class AnswerScores(Metric):
    """Exact match and F1 of answers, averaged over questions.

    An answer that is less sure than the threshold counts as "no answer". The rows of all ranks are kept, so the scores
    do not depend on how questions were dealt out, and the threshold can be chosen after the fact.

    Args:
        counting: see the module.
        abstains: whether questions may have no answer; if not, there is no threshold.
    """

    higher_is_better = True
    full_state_update = False
    rows: list[Tensor]

    def __init__(self, counting: Counting = "common_string", abstains: bool = False) -> None:
        super().__init__(compute_with_cache=False)  # another threshold gives other scores
        self.counting: Counting = counting
        self.abstains = abstains
        self.threshold: float | None = None
        """Answers with a margin of it or less are withheld; None: where F1 is highest."""
        self.add_state("rows", [], dist_reduce_fx="cat")

    def update(self, predicted: Sequence[str], gold: Sequence[Sequence[str]], margins: Sequence[float]) -> None:
        """Take in questions: the best answer of each, all right ones (none: no answer), how sure the best one is."""
        found = [
            [
                margin,
                float(not texts),
                exact_match(text, texts, self.counting),
                answer_f1(text, texts, self.counting),
                float(not text),
            ]
            for text, texts, margin in zip(predicted, gold, margins, strict=True)
        ]
        self.rows.append(torch.tensor(found, dtype=torch.float64, device=self.device).reshape(-1, 5))

    def compute(self) -> dict[str, Tensor]:
        """`exact_match`, `f1`, their mean `average`; with `abstains` also `answerable_f1`, `unanswerable_accuracy` and
        `threshold`."""
        rows = torch.cat(list(self.rows)) if isinstance(self.rows, list) else self.rows
        margin, none, exact, f1, silent = rows.T
        threshold = -float("inf")
        if self.abstains:
            threshold = best_threshold(margin, f1, none) if self.threshold is None else self.threshold
        withheld = (margin <= threshold) & (threshold > -float("inf"))
        exact, f1 = (torch.where(withheld, none, values) for values in (exact, f1))
        scores = {"exact_match": exact.mean(), "f1": f1.mean(), "average": (exact.mean() + f1.mean()) / 2}
        if self.abstains:
            scores["answerable_f1"] = (f1 * (1 - none)).sum() / (1 - none).sum().clamp(min=1)
            said_none = torch.where(withheld, torch.ones_like(silent), silent)
            scores["unanswerable_accuracy"] = (said_none * none).sum() / none.sum().clamp(min=1)
            scores["threshold"] = torch.tensor(threshold, dtype=torch.float64)
        return {name: value.float() for name, value in scores.items()}


def best_threshold(margins: Tensor, answered: Tensor, withheld: Tensor) -> float:
    """The threshold with the highest sum of scores: `answered` where the margin is above it, `withheld` elsewhere.

    It lies in the middle between two margins, or 1 beyond the outermost; of equally good ones it is the lowest.
    """
    order = margins.argsort()
    sums = answered.sum() + torch.cat((margins.new_zeros(1), (withheld - answered)[order].cumsum(0)))
    values = margins[order]
    finite = values[values.isfinite()]
    if not len(finite):
        return 0.0
    values = values.clamp(min=float(finite[0]) - 2, max=float(finite[-1]) + 2)
    borders = torch.cat((values[:1] - 1, (values[1:] + values[:-1]) / 2, values[-1:] + 1))
    # Equal margins cannot be parted: nothing lies between them.
    possible = torch.cat((values.new_ones(1, dtype=torch.bool), values[1:] > values[:-1], values.new_ones(1).bool()))
    return float(borders[sums.masked_fill(~possible, -torch.inf).argmax()])


def _f1(predicted: str, gold: str, counting: Counting) -> float:
    if counting == "common_string":
        found, wanted = _pieces(predicted), _pieces(gold)
        match = SequenceMatcher(None, found, wanted, autojunk=False)
        common = match.find_longest_match(0, len(found), 0, len(wanted)).size
    else:
        found, wanted = list(_plain(predicted)), list(_plain(gold))
        common = sum((Counter(found) & Counter(wanted)).values())
    return 2 * common / (len(found) + len(wanted)) if common else 0.0


def _without_marks(text: str) -> str:
    return "".join(character for character in text.lower().strip() if character not in _CMRC_MARKS)


def _pieces(text: str) -> list[str]:
    """Chinese characters, words of other scripts, and the marks that are kept."""
    return _PIECES.findall(_without_marks(text))


def _plain(text: str) -> str:
    text = "".join(_half_width(character) for character in text).lower()
    return "".join(character for character in text if character not in _SOGOU_MARKS and not character.isspace())


def _words(text: str) -> set[str]:
    spaced = "".join(" " if character in _SOGOU_MARKS else character for character in text).lower()
    return {_plain(word) for word in spaced.split(" ")}


def _half_width(character: str) -> str:
    code = ord(character)
    return " " if code == 0x3000 else chr(code - 0xFEE0) if 0xFF01 <= code <= 0xFF5E else character
