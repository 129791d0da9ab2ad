"""From span and link scores to relations.  Shapes: B batch, T tokens, H labels, K links beside them, P pairs of spans.

A label is a predicate with one slot of its object. For every subject and object of a sentence, a label holds when their
first tokens and their last tokens are both linked under it. Where an object has several slots, the further ones are
joined to the value that they are linked to, so that two objects of one subject and predicate stay apart.

Source: https://kexue.fm/archives/8888; the links between slots are this project's own.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice, product

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...errors import InputError
from ..heads.scores import CompactScores
from .spans import best_of, best_positive_cells

Span = tuple[int, int]
"""(first token, last token), the last one inclusive."""
PlainRelation = tuple[str, Span, tuple[tuple[str, Span], ...]]
"""(predicate, subject, object), the object being (slot, span) of each slot, the value first."""
SUBJECT, OBJECT = 0, 1


@torch.no_grad()
def decode_relation_batch(
    entity_scores: Tensor | CompactScores,
    head_scores: Tensor | CompactScores,
    tail_scores: Tensor | CompactScores,
    labels: Sequence[tuple[str, str]],
    links: Mapping[int, int],
    places: Tensor | None = None,
    *,
    max_spans: int = 30,
    max_relations: int = 100,
) -> list[list[PlainRelation]]:
    """Relations of every sentence of a batch; a cell counts when its score is above 0.

    Args:
        entity_scores: `(B, 2, T, T)`, in full or factored: subjects, objects.
        head_scores: scores `(B, H + K, T, T)` of pairs of first tokens.
        tail_scores: the same for last tokens.
        labels: (predicate, slot) of each of the H labels.
        links: label of a slot that is not the value -> which of the H + K links joins the value to it.
        places: True where a token may be part of a span, `(B, T)`: special tokens and padding may not.
        max_spans: keep this many subjects, and objects, of a sentence, the best-scoring ones.
        max_relations: keep this many (subject, label, object) of a sentence, the best-scoring ones, and give at most
            this many relations.

    Raises:
        InputError: a limit below 1, or not as many labels and links as scores.
    """
    for name, value in (("max_spans", max_spans), ("max_relations", max_relations)):
        if value < 1:
            raise InputError(f"decode_relation_batch({name}={value}): use 1 or more")
    if head_scores.shape[1] != len(labels) + len(links):
        raise InputError(
            f"decode_relation_batch: {len(labels)} labels and {len(links)} links for scores of {head_scores.shape[1]}"
        )
    group, start, end, _ = best_positive_cells(
        entity_scores, places, np.array([SUBJECT, OBJECT]), max_spans, "max_spans"
    )
    sentence, kind = np.divmod(group, 2)
    one, other = _pairs(sentence, kind == SUBJECT, kind == OBJECT, len(entity_scores))
    scores = _link_scores((head_scores, start), (tail_scores, end), sentence, one, other)
    pair, label = (scores[:, : len(labels)] > 0).nonzero().cpu().numpy().T
    best = best_of(sentence[one[pair]], scores.cpu().float().numpy()[pair, label], max_relations)
    one, other, label = one[pair[best]], other[pair[best]], label[best]

    # What is left is short: a trained model finds a few, an untrained one max_relations.
    spans = list(zip(start.tolist(), end.tolist(), strict=True))
    stated = list(zip(sentence[one].tolist(), one.tolist(), other.tolist(), label.tolist(), strict=True))
    values: dict[tuple[int, str], dict[int, dict[str, list[int]]]] = {}
    for _, subject, value, number in stated:
        if number not in links:
            values.setdefault((subject, labels[number][0]), {})[value] = {}
    joins = [
        (subject, value, further, number)
        for _, subject, further, number in stated
        if number in links
        for value in values.get((subject, labels[number][0]), ())
    ]
    if joins:
        froms, tos = (np.array([join[part] for join in joins]) for part in (1, 2))
        scores = _link_scores((head_scores, start), (tail_scores, end), sentence, froms, tos).cpu()
        for row, (subject, value, further, number) in enumerate(joins):
            if scores[row, links[number]] > 0:
                predicate, slot = labels[number]
                values[subject, predicate][value].setdefault(slot, []).append(further)

    value_slots = {predicate: slot for number, (predicate, slot) in enumerate(labels) if number not in links}
    decoded: list[list[PlainRelation]] = [[] for _ in range(len(entity_scores))]
    for (subject, predicate), objects in values.items():
        found = decoded[sentence[subject]]
        for value, slots in objects.items():
            choices = product(*([(slot, spans[number]) for number in numbers] for slot, numbers in slots.items()))
            for others in islice(choices, max_relations - len(found)):
                found.append((predicate, spans[subject], ((value_slots[predicate], spans[value]), *others)))
    return decoded


def _pairs(sentence: NDArray, first: NDArray, second: NDArray, batch: int) -> tuple[NDArray, NDArray]:
    """All pairs within a sentence of a span of the first kind and one of the second; spans are sorted by sentence."""
    ones, others = np.flatnonzero(first), np.flatnonzero(second)
    counts = np.bincount(sentence[others], minlength=batch)
    begins = np.cumsum(counts) - counts
    repeats = counts[sentence[ones]]
    ends = np.cumsum(repeats)
    within = np.arange(repeats.sum()) - np.repeat(ends - repeats, repeats)
    return np.repeat(ones, repeats), others[np.repeat(begins[sentence[ones]], repeats) + within]


def _link_scores(
    heads: tuple[Tensor | CompactScores, NDArray],
    tails: tuple[Tensor | CompactScores, NDArray],
    sentence: NDArray,
    one: NDArray,
    other: NDArray,
) -> Tensor:
    """The lower of the scores of the first and of the last tokens of each pair of spans, `(P, H)`."""
    parts = []
    for scores, tokens in (heads, tails):
        cells = [torch.from_numpy(part).to(scores.device) for part in (sentence[one], tokens[one], tokens[other])]
        rows, i, j = cells
        parts.append(scores[rows, :, i, j] if isinstance(scores, Tensor) else scores.cells(rows, i, j))
    return torch.minimum(*parts)


def merge_slots(
    triples: Iterable[tuple[str, str, Span, Span]], value_slot: str, most: int = 100
) -> list[PlainRelation]:
    """Join (predicate, slot, subject, object) of equal predicate and subject to relations of several slots.

    Nothing says which spans belong together: a lone value takes every combination of the spans of its slots, `most` of
    them; of several values each takes the nearest span of each slot. Slots without a value say nothing.
    """
    slots: dict[tuple[str, Span], dict[str, list[Span]]] = {}
    for predicate, slot, subject, span in triples:
        slots.setdefault((predicate, subject), {}).setdefault(slot, []).append(span)
    merged: list[PlainRelation] = []
    for (predicate, subject), found in slots.items():
        values = found.pop(value_slot, [])
        for value in values:
            near = [spans if len(values) == 1 else [min(spans, key=_distance_to(value))] for spans in found.values()]
            for spans in islice(product(*near), most):
                merged.append((predicate, subject, ((value_slot, value), *zip(found, spans, strict=True))))
    return merged


def _distance_to(value: Span) -> Callable[[Span], int]:
    """Tokens between a span and this one, 0 where they touch or overlap."""
    return lambda span: max(0, span[0] - value[1], value[0] - span[1])
