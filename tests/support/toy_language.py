"""Language models of a few tokens, small enough to enumerate all they can say; token 0 ends a sequence."""

import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

END = 0


def toy(seed: int, size: int = 3, sharpness: float = 1.5) -> Callable[[Tensor], Tensor]:
    """A language model that knows the last two tokens."""
    table = sharpness * torch.randn(size, size, size, generator=torch.Generator().manual_seed(seed))
    return lambda tokens: table[tokens[:, -2], tokens[:, -1]]


def fixed(*probabilities: float) -> Callable[[Tensor], Tensor]:
    """A model that always says the same."""
    logits = torch.tensor(probabilities).log()
    return lambda tokens: logits.expand(len(tokens), -1)


def prompts(count: int, size: int = 3) -> Tensor:
    return torch.tensor(list(itertools.islice(itertools.product(range(size), repeat=2), count)))


def has_ended(tokens: list[int], min_length: int, min_ends: int) -> bool:
    return tokens[-1] == END and len(tokens) >= min_length and tokens.count(END) >= min_ends


def sequences(
    model: Callable[[Tensor], Tensor], prompt: Tensor, max_length: int, min_length: int = 0, min_ends: int = 1
) -> Iterator[tuple[list[int], float]]:
    """Every sequence that has ended or is full, with its log-probability."""
    stack: list[tuple[list[int], float]] = [([], 0.0)]
    while stack:
        tokens, total = stack.pop()
        if len(tokens) == max_length or (tokens and has_ended(tokens, min_length, min_ends)):
            yield tokens, total
            continue
        scores = model(torch.cat((prompt, torch.tensor(tokens, dtype=torch.long)))[None])[0].log_softmax(-1)
        stack += [([*tokens, token], total + score) for token, score in enumerate(scores.tolist())]


def children(keys: list[tuple[int, ...]], prefix: list[int]) -> set[int]:
    return {key[len(prefix)] for key in keys if len(key) > len(prefix) and list(key[: len(prefix)]) == prefix}
