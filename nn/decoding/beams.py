"""Beam search over any model.  Shapes: B prompts, R rows (beams of all prompts), T tokens, V vocabulary.

Source: https://kexue.fm/archives/7292 with the decoder of bert4keras.  Checked against: enumeration of all sequences of
a small model, `generate` of transformers.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from ...errors import InputError
from .generation import Decoder
from .rules import Constraint, Rules, check_arguments


@torch.no_grad()
def beam_search(
    decoder: Decoder,
    prompt: Tensor,
    *,
    num_beams: int,
    max_length: int,
    end_id: int,
    min_length: int = 0,
    min_ends: int = 1,
    length_penalty: float = 0.0,
    banned: Iterable[int] = (),
    constraint: Constraint | None = None,
    repetition_penalty: float = 1.0,
    no_repeat_ngram: int = 0,
) -> list[tuple[Tensor, float]]:
    """The most probable continuation of each prompt, as far as a search of limited width finds it.

    Of the `num_beams` best hypotheses of a step, those that have ended (see `sample`), or have the maximum length, are
    candidates; the best `num_beams` of the others go on. The search of a prompt is over when none of these can still
    beat the best candidate. The author of the source differs in this: a hypothesis that ends without being the best of
    its step is dropped and the beam gets narrower, which loses the answer when the better ones decline later.

    Args:
        decoder: the model, not fed yet.
        prompt: token ids `(B, T)`. Prompts of different lengths are padded on the left, which the decoder has to know.
        num_beams: width of the search; with 1 and no length penalty it is greedy.
        max_length: generate at most so many tokens.
        end_id: token that ends a sequence.
        min_length: go on after end tokens until so many tokens.
        min_ends: so many end tokens make an end.
        length_penalty: divide the sum of log-probabilities by the number of tokens to this power: above 0 favours long
            sequences.
        banned: tokens that never come.
        constraint: what else is allowed, see `Constraint`.
        repetition_penalty: see `filters.repetition_penalty`; counts generated tokens, not those of the prompt.
        no_repeat_ngram: never generate so many tokens in a row twice; 0: no such rule.

    Returns:
        The generated tokens of each prompt, the end token included, and their score.

    Raises:
        InputError: an argument is out of range, or every hypothesis of a prompt runs into a forbidden end.
    """
    check_arguments("beam_search", prompt, max_length, min_length, min_ends, num_beams=num_beams)
    rules = Rules(banned, constraint, repetition_penalty, no_repeat_ngram)
    logits = decoder(prompt)
    rules.start("beam_search", logits, end_id)
    vocabulary = logits.shape[-1]
    written = torch.empty(len(prompt), max_length, dtype=torch.long, device=prompt.device)
    prompts = torch.arange(len(prompt), device=prompt.device)
    sums = torch.zeros(len(prompt), 1, device=logits.device)  # of the hypotheses in work, the best first
    best = torch.full_like(sums[:, 0], -torch.inf)  # score of the best candidate
    answers: dict[int, tuple[Tensor, float]] = {}
    for length in range(1, max_length + 1):
        width = sums.shape[1]
        before = written[:, : length - 1]
        scores = rules(logits, before, prompts.repeat_interleave(width))
        # At most half of so many end, as a hypothesis ends in one way only: a whole beam remains.
        sums, places = (sums.view(-1, 1) + scores).view(len(prompts), -1).topk(min(2 * num_beams, width * vocabulary))
        tokens = places % vocabulary
        parents = places // vocabulary + width * torch.arange(len(prompts), device=places.device)[:, None]
        ended = tokens == end_id
        if length == max_length:
            ended.fill_(True)
        elif length < min_length:
            ended.fill_(False)
        elif min_ends > 1:
            ended &= (before == end_id).sum(-1)[parents] + 1 >= min_ends

        new = sums[:, :num_beams].masked_fill(~ended[:, :num_beams], -torch.inf) / length**length_penalty
        score, which = new.max(-1)
        better = score > best
        best = torch.maximum(best, score)
        sums, slots = sums.masked_fill(ended, -torch.inf).topk(min(num_beams, sums.shape[1]))
        done = best >= sums[:, 0] / max(length**length_penalty, max_length**length_penalty)
        improved, over = torch.stack((better, done)).tolist()
        for row in [row for row, found in enumerate(improved) if found]:
            sequence = torch.cat((before[parents[row, which[row]]], tokens[row, which[row], None]))
            answers[int(prompts[row])] = sequence, float(score[row])
        if length == max_length or all(over):
            break

        # A place in the beam that nothing can fill repeats the best hypothesis, without a chance.
        slots = torch.where(sums > -torch.inf, slots, slots[:, :1])
        parents, tokens = parents.gather(1, slots), tokens.gather(1, slots)
        if any(over):
            stay = (~done).nonzero()[:, 0]
            sums, parents, tokens, prompts, best = (part[stay] for part in (sums, parents, tokens, prompts, best))
        rows = parents.flatten()
        decoder.reorder(rows)
        written = written[rows]
        written[:, length - 1] = tokens.flatten()
        logits = decoder(tokens.view(-1, 1))
    if lost := [number for number in range(len(prompt)) if number not in answers]:
        raise InputError(f"beam_search: no allowed sequence was found for prompts {lost}: {rules.advice}")
    return [answers[number] for number in range(len(prompt))]
