"""Text token by token from any model: greedy choice and sampling.  Shapes: B prompts, R rows, T tokens, V vocabulary.

A row is a sequence in work; a prompt may have several. A model comes as a `Decoder`, which is fed each token once and
keeps what it computes of it. Its scores pass `rules.Rules`, if any are set, then temperature, top-k and top-p.

Source: https://kexue.fm/archives/7292 with the decoder of bert4keras, the rules of which for minimum length and end
tokens are kept.  Checked against: `generate` of transformers.
"""

from collections.abc import Callable, Iterable
from typing import Protocol

import torch
from torch import Tensor

from ...errors import InputError
from . import filters
from .rules import Constraint, Rules, check_arguments


class Decoder(Protocol):
    """A language model that remembers what it was fed."""

    def __call__(self, tokens: Tensor) -> Tensor:
        """Take in the next tokens `(R, T)`, first those of the prompt; return scores of the one after, `(R, V)`."""
        ...

    def reorder(self, rows: Tensor) -> None:
        """Keep these rows, in this order; one may be named more than once."""
        ...


class FunctionDecoder:
    """A `Decoder` for a model without a cache: it computes everything anew from all tokens so far.

    Args:
        function: from tokens `(R, T)` to scores of the next one `(R, V)`.
    """

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        self.function = function
        self.tokens: Tensor | None = None

    def __call__(self, tokens: Tensor) -> Tensor:
        self.tokens = tokens if self.tokens is None else torch.cat((self.tokens, tokens), dim=1)
        return self.function(self.tokens)

    def reorder(self, rows: Tensor) -> None:
        if self.tokens is not None:
            self.tokens = self.tokens[rows]


def greedy(
    decoder: Decoder,
    prompt: Tensor,
    *,
    max_length: int,
    end_id: int | None = None,
    min_length: int = 0,
    min_ends: int = 1,
) -> list[Tensor]:
    """The most probable token at every step: `sample` with `top_k=1`."""
    return sample(
        decoder, prompt, max_length=max_length, top_k=1, end_id=end_id, min_length=min_length, min_ends=min_ends
    )


@torch.no_grad()
def sample(
    decoder: Decoder,
    prompt: Tensor,
    *,
    max_length: int,
    top_k: int | None = None,
    top_p: float | None = None,
    temperature: float = 1.0,
    num_samples: int = 1,
    end_id: int | None = None,
    min_length: int = 0,
    min_ends: int = 1,
    generator: torch.Generator | None = None,
    banned: Iterable[int] = (),
    constraint: Constraint | None = None,
    repetition_penalty: float = 1.0,
    no_repeat_ngram: int = 0,
) -> list[Tensor]:
    """Draw continuations of prompts.

    A sequence ends with an end token when it has the minimum length and enough end tokens, the last one included; an
    earlier end token is a token like any other. What has ended leaves the batch.

    Args:
        decoder: the model, not fed yet.
        prompt: token ids `(B, T)`. Prompts of different lengths are padded on the left, which the decoder has to know.
        max_length: generate at most so many tokens.
        top_k: draw among so many most probable tokens; 1 is greedy.
        top_p: draw among the most probable tokens that together reach this probability, of what top_k has left.
        temperature: below 1 sharpens the distribution, above 1 flattens it.
        num_samples: draw so many for each prompt, which is computed once.
        end_id: token that ends a sequence; None: all get the maximum length.
        min_length: go on after end tokens until so many tokens.
        min_ends: so many end tokens make an end.
        generator: source of randomness, on the device of the scores.
        banned: tokens that never come.
        constraint: what else is allowed, see `Constraint`.
        repetition_penalty: see `filters.repetition_penalty`; counts generated tokens, not those of the prompt.
        no_repeat_ngram: never generate so many tokens in a row twice; 0: no such rule.

    Returns:
        The generated tokens of each sequence, the end token included; first all samples of the first prompt.

    Raises:
        InputError: an argument is out of range, or nothing is left to draw.
    """
    check_arguments("sample", prompt, max_length, min_length, min_ends, num_samples=num_samples, top_k=top_k)
    if temperature <= 0 or not 0 < (1 if top_p is None else top_p) <= 1:
        raise InputError(
            f"sample(temperature={temperature}, top_p={top_p}): use a temperature above 0 (top_k=1 is greedy) "
            "and a top_p above 0 and at most 1"
        )
    rules = Rules(banned, constraint, repetition_penalty, no_repeat_ngram)
    logits = decoder(prompt)
    rules.start("sample", logits, end_id)
    rows = torch.arange(len(prompt) * num_samples, device=prompt.device)
    if num_samples > 1:
        logits = logits.repeat_interleave(num_samples, dim=0)
        decoder.reorder(rows // num_samples)
    written = torch.empty(len(rows), max_length, dtype=torch.long, device=prompt.device)
    results: dict[int, Tensor] = {}
    for length in range(1, max_length + 1):
        if rules.active:
            logits = rules(logits, written[:, : length - 1], rows // num_samples)
            if rules.may_forbid and not bool((logits.amax(-1) > -torch.inf).all()):
                raise InputError(f"sample: no token is allowed at step {length}: {rules.advice}")
        tokens = _draw(logits, top_k, top_p, temperature, generator)
        written[:, length - 1 : length] = tokens
        if length == max_length:
            break
        if end_id is not None and length >= min_length:
            ended = tokens[:, 0] == end_id
            if min_ends > 1:
                ended &= (written[:, :length] == end_id).sum(-1) >= min_ends
            if bool(ended.any()):
                results.update(zip(rows[ended].tolist(), written[ended, :length], strict=True))
                stay = (~ended).nonzero()[:, 0]
                rows, written, tokens = rows[stay], written[stay], tokens[stay]
                if not len(rows):
                    break
                decoder.reorder(stay)
        logits = decoder(tokens)
    results.update(zip(rows.tolist(), written, strict=True))
    return [results[row] for row in range(len(results))]


def _draw(
    logits: Tensor, top_k: int | None, top_p: float | None, temperature: float, generator: torch.Generator | None
) -> Tensor:
    """One token of each row `(R, 1)`."""
    if top_k == 1:
        return logits.argmax(-1, keepdim=True)
    scores, order = logits.float(), None
    if temperature != 1:
        scores = (scores - scores.amax(-1, keepdim=True)) / temperature  # the largest stays 0 at any temperature
    if top_k is not None:  # what follows has to do with k tokens only
        scores, order = scores.topk(min(top_k, scores.shape[-1]))
    if top_p is not None:
        scores = filters.top_p_filter(scores, top_p)
    # In double precision, as sums in single would lose tokens of small probability. Much faster than multinomial.
    mass = scores.softmax(-1, dtype=torch.float64).cumsum(-1)
    point = torch.rand(len(mass), 1, dtype=mass.dtype, device=mass.device, generator=generator) * mass[:, -1:]
    tokens = torch.searchsorted(mass, point, right=True)
    return tokens if order is None else order.gather(-1, tokens)
