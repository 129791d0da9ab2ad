"""What a generated sequence may contain.  Shapes: R rows (sequences in work), T tokens, V vocabulary.

Scores pass these stations, left out where nothing is asked of them: repetition penalty, log-probabilities, forbidden
n-grams and tokens, the caller's constraint.

Source: https://kexue.fm/archives/8802 for generation along a prefix tree.  Checked against: `prefix_allowed_tokens_fn`
of transformers.
"""

from collections.abc import Callable, Iterable
from typing import Protocol

import torch
from torch import Tensor

from ...errors import InputError
from . import filters


class Constraint(Protocol):
    """What sequences are allowed, or preferred."""

    def __call__(self, scores: Tensor, tokens: Tensor, prompts: Tensor) -> Tensor:
        """Change the scores of the next token.

        Args:
            scores: log-probabilities `(R, V)`.
            tokens: what was generated so far `(R, T)`, at first `(R, 0)`.
            prompts: number of each row's prompt `(R,)`.

        Returns:
            New scores `(R, V)`, none above 0; -inf is forbidden. Beam search adds them up as they are.
        """
        ...


def prefix_constraint(allowed: Callable[[list[int], int], Iterable[int]], renormalise: bool = True) -> Constraint:
    """Allow only what a function of the tokens so far allows, such as the paths of a prefix tree.

    Args:
        allowed: given the generated tokens and the number of the prompt, the tokens that may follow.
        renormalise: make the probabilities of the allowed tokens sum to 1. Beams through nodes with few children are
            then favoured, as a forced token costs nothing; without it, it costs what the model takes for it.
    """

    def constrain(scores: Tensor, tokens: Tensor, prompts: Tensor) -> Tensor:
        pairs = zip(tokens.tolist(), prompts.tolist(), strict=True)
        places = [(row, token) for row, (prefix, prompt) in enumerate(pairs) for token in allowed(prefix, prompt)]
        rows, children = torch.tensor(places, dtype=torch.long, device=scores.device).view(-1, 2).unbind(1)
        forbidden = torch.ones_like(scores, dtype=torch.bool)
        forbidden[rows, children] = False
        scores = scores.masked_fill(forbidden, -torch.inf)
        # A row without any allowed token has no probabilities: it stays forbidden as a whole.
        return scores.log_softmax(-1).masked_fill(forbidden, -torch.inf) if renormalise else scores

    return constrain


class Rules:
    """From a model's scores to log-probabilities of what is allowed."""

    advice = "loosen the constraint or no_repeat_ngram, and see that the model's scores are finite"

    def __init__(
        self, banned: Iterable[int], constraint: Constraint | None, repetition_penalty: float, no_repeat_ngram: int
    ) -> None:
        if no_repeat_ngram < 0 or repetition_penalty <= 0:
            raise InputError(
                f"generation with no_repeat_ngram={no_repeat_ngram}, repetition_penalty={repetition_penalty}: "
                "use 0 or more (0 is off), and a number above 0 (1 is off)"
            )
        self.banned = sorted(set(banned))
        self.constraint = constraint
        self.repetition_penalty = repetition_penalty
        self.no_repeat_ngram = no_repeat_ngram
        self.may_forbid = constraint is not None or no_repeat_ngram > 0
        self.active = self.may_forbid or bool(self.banned) or repetition_penalty != 1

    def start(self, call: str, logits: Tensor, end_id: int | None) -> None:
        """Compare the ids with the vocabulary, and bring those banned to the device."""
        ids, vocabulary = [*self.banned, *([] if end_id is None else [end_id])], logits.shape[-1]
        if not all(0 <= number < vocabulary for number in ids) or len(self.banned) == vocabulary:
            raise InputError(
                f"{call}(end_id={end_id}, banned={self.banned}): use ids from 0 to {vocabulary - 1}, and leave some"
            )
        self.places = torch.tensor(self.banned, dtype=torch.long, device=logits.device)

    def __call__(self, logits: Tensor, tokens: Tensor, prompts: Tensor) -> Tensor:
        scores = logits.float()
        if self.repetition_penalty != 1:
            scores = filters.repetition_penalty(scores, tokens, self.repetition_penalty)
        scores = scores.log_softmax(-1)
        if self.no_repeat_ngram:
            scores = filters.no_repeat_ngram(scores, tokens, self.no_repeat_ngram)
        if self.banned:
            scores = scores.index_fill(-1, self.places, -torch.inf)
        return scores if self.constraint is None else self.constraint(scores, tokens, prompts)


def check_arguments(
    call: str, prompt: Tensor, max_length: int, min_length: int, min_ends: int, **counts: int | None
) -> None:
    """Refuse a prompt of another form, and numbers out of range."""
    if not isinstance(prompt, Tensor) or prompt.ndim != 2 or not prompt.numel() or prompt.is_floating_point():
        raise InputError(
            f"{call}(prompt=...): give token ids in one tensor (B, T), at least one token each; pad shorter prompts on "
            "the left and give the mask to the decoder"
        )
    for name, value in {"max_length": max_length, "min_ends": min_ends, **counts}.items():
        if value is not None and value < 1:
            raise InputError(f"{call}({name}={value}): use 1 or more")
    if not 0 <= min_length <= max_length:
        raise InputError(f"{call}(min_length={min_length}): use 0 to max_length={max_length}")
