"""What may be drawn: filters of next-token scores, none of which changes its input.  Shapes: T tokens, V vocabulary.

Source: N. S. Keskar et al. (arXiv 1909.05858) for the repetition penalty, A. Holtzman et al. (arXiv 1904.09751) for
top-p.  Checked against: the logits processors of transformers.
"""

import torch
from torch import Tensor

from ...errors import InputError

NUCLEUS = 1024
"""So many tokens mostly hold the mass of top-p; to find them takes a twentieth of the time of sorting 20,000."""


def top_k_filter(logits: Tensor, k: int) -> Tensor:
    """Leave the k largest scores of `(..., V)`, exactly k also among equal ones; the others become -inf."""
    if k < 1:
        raise InputError(f"top_k_filter(k={k}): use 1 or more")
    best, order = logits.topk(min(k, logits.shape[-1]))
    return torch.full_like(logits, -torch.inf).scatter(-1, order, best)


def top_p_filter(logits: Tensor, p: float, keep_crossing: bool = True) -> Tensor:
    """Leave the most probable tokens up to a mass of p; the scores of the others become -inf.

    Args:
        logits: scores `(..., V)`.
        p: mass to keep, above 0; 1 keeps all tokens.
        keep_crossing: keep the token with which the mass reaches p, as usual. Without it the mass stays below p, as in
            the GPT2_ML of imcaspar; the first token is kept in any case.

    Returns:
        Scores `(..., V)`.

    Raises:
        InputError: p is out of range.
    """
    if not 0 < p <= 1:
        raise InputError(f"top_p_filter(p={p}): use a mass above 0 and at most 1")
    if p == 1:
        return logits
    probabilities = logits.softmax(-1, dtype=torch.float32)
    mass, order = probabilities.topk(min(NUCLEUS, logits.shape[-1]))
    reached = mass.cumsum(-1) >= p
    if not bool(reached[..., -1].all()):
        mass, order = probabilities.sort(descending=True)
        reached = mass.cumsum(-1) >= p
    inside = torch.ones_like(reached)
    inside[..., 1:] = ~(reached[..., :-1] if keep_crossing else reached[..., 1:])
    kept = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, inside)
    return logits.masked_fill(~kept, -torch.inf)


def repetition_penalty(logits: Tensor, tokens: Tensor, penalty: float) -> Tensor:
    """Make tokens that occurred less probable: divide their scores by the penalty, or multiply those below zero.

    Args:
        logits: scores `(B, V)`.
        tokens: the tokens so far `(B, T)`.
        penalty: above 1 to discourage, below 1 to encourage.

    Returns:
        Scores `(B, V)`.

    Raises:
        InputError: the penalty is not positive.
    """
    if penalty <= 0:
        raise InputError(f"repetition_penalty(penalty={penalty}): use a number above 0; 1 changes nothing")
    scores = logits.gather(-1, tokens)
    return logits.scatter(-1, tokens, torch.where(scores < 0, scores * penalty, scores / penalty))


def no_repeat_ngram(logits: Tensor, tokens: Tensor, n: int) -> Tensor:
    """Forbid every token that would repeat n tokens in a row, given scores `(B, V)` and the tokens so far `(B, T)`."""
    if n < 1:
        raise InputError(f"no_repeat_ngram(n={n}): use 1 or more")
    if tokens.shape[1] < n:
        return logits
    ngrams = tokens.unfold(1, n, 1)
    repeats = (ngrams[..., :-1] == tokens[:, None, tokens.shape[1] - n + 1 :]).all(-1)
    limits = torch.where(repeats, -torch.inf, torch.inf).to(logits.dtype)
    return logits.scatter_reduce(-1, ngrams[..., -1], limits, "amin")
