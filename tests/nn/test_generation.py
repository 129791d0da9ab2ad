"""Sampling: the frequencies of what is drawn, where a sequence ends, and the rules it has to keep."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from toy_language import END, fixed, has_ended, prompts, toy

from kexue.errors import InputError
from kexue.nn.decoding import FunctionDecoder, greedy, prefix_constraint, sample, top_p_filter


def plain_greedy(model: Callable[[Tensor], Tensor], prompt: Tensor, length: int) -> Tensor:
    tokens = prompt
    for _ in range(length):
        tokens = torch.cat((tokens, model(tokens).argmax(-1, keepdim=True)), dim=1)
    return tokens[:, prompt.shape[1] :]


def test_greedy_is_top_k_1_and_the_limit_of_low_temperature() -> None:
    model, prompt = toy(1, size=7), prompts(9, size=7)
    expected = plain_greedy(model, prompt, 12)
    assert torch.equal(torch.stack(greedy(FunctionDecoder(model), prompt, max_length=12)), expected)
    settings: list[dict[str, Any]] = [
        {"top_k": 1, "temperature": 3.0},
        {"temperature": 1e-5},
        {"temperature": 1e-30},
        {"top_p": 1e-6},
    ]
    for options in settings:
        drawn = sample(FunctionDecoder(model), prompt, max_length=12, **options)
        assert torch.equal(torch.stack(drawn), expected), options


def test_seeded_runs_repeat() -> None:
    def run(seed: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(seed)
        drawn = sample(
            FunctionDecoder(toy(2, size=9)),
            prompts(4, size=9),
            max_length=15,
            num_samples=3,
            end_id=END,
            generator=generator,
        )
        return [tokens.tolist() for tokens in drawn]

    assert run(5) == run(5)
    assert run(5) != run(6)
    assert len(run(5)) == 12


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0.4, 0.3, 0.2, 0.1, 0.0]),
        ({"top_k": 2}, [4 / 7, 3 / 7, 0, 0, 0]),
        ({"top_p": 0.8}, [4 / 9, 3 / 9, 2 / 9, 0, 0]),
        ({"top_k": 3, "top_p": 0.7}, [4 / 7, 3 / 7, 0, 0, 0]),
        ({"temperature": 0.5}, [16 / 30, 9 / 30, 4 / 30, 1 / 30, 0]),
        ({"banned": [0]}, [0, 3 / 6, 2 / 6, 1 / 6, 0]),
        (
            {"constraint": lambda scores, tokens, prompts: top_p_filter(scores, 0.8, keep_crossing=False)},
            [4 / 7, 3 / 7, 0, 0, 0],
        ),
    ],
)
def test_frequencies_are_the_probabilities(options: dict, expected: list[float]) -> None:
    count = 20_000
    drawn = sample(
        FunctionDecoder(fixed(0.4, 0.3, 0.2, 0.1, 0.0)),
        prompts(1),
        max_length=1,
        num_samples=count,
        generator=torch.Generator().manual_seed(0),
        **options,
    )
    found = torch.cat(drawn).bincount(minlength=5) / count
    for frequency, probability in zip(found.tolist(), expected, strict=True):
        assert abs(frequency - probability) <= 4 * math.sqrt(probability * (1 - probability) / count)


@pytest.mark.parametrize("point", [0.0, 0.25, 1 - 2**-53])
def test_what_has_no_probability_is_never_drawn(point: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "rand", lambda *shape, generator, **options: torch.full(shape, point, **options))
    (tokens,) = sample(FunctionDecoder(fixed(0.0, 0.2, 0.0, 0.6, 0.2, 0.0)), prompts(1), max_length=1)
    assert tokens.tolist() == [{0.0: 1, 0.25: 3}.get(point, 4)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_scores_are_drawn_in_full_precision(dtype: torch.dtype) -> None:
    """60000 equal tokens: their sum and their probabilities are beyond half precision."""
    drawn = sample(
        FunctionDecoder(lambda tokens: torch.zeros(len(tokens), 60_000, dtype=dtype)),
        prompts(1),
        max_length=1,
        num_samples=60,
        temperature=0.7,
        top_p=0.9,
        generator=torch.Generator().manual_seed(0),
    )
    assert len(torch.cat(drawn).unique()) > 55
    assert torch.cat(drawn).float().std() > 10_000


@pytest.mark.parametrize(("min_length", "min_ends"), [(0, 1), (6, 1), (0, 3), (5, 2)])
def test_a_sequence_ends_at_the_first_end_that_counts(min_length: int, min_ends: int) -> None:
    drawn = sample(
        FunctionDecoder(toy(3)),
        prompts(9),
        max_length=10,
        num_samples=30,
        end_id=END,
        min_length=min_length,
        min_ends=min_ends,
        generator=torch.Generator().manual_seed(0),
    )
    lengths = {len(tokens) for tokens in drawn}
    assert max(lengths) == 10
    assert min(lengths) == max(min_length, min_ends)
    for tokens in (row.tolist() for row in drawn):
        ends = [length for length in range(1, 11) if has_ended(tokens[:length], min_length, min_ends)]
        assert len(tokens) == (ends[0] if ends else 10)


def test_finished_rows_leave_the_batch_and_every_token_is_fed_once() -> None:
    model, prompt = toy(4, size=4), prompts(16, size=4)
    shapes = []

    class Recorder(FunctionDecoder):
        def __call__(self, tokens: Tensor) -> Tensor:
            shapes.append(tuple(tokens.shape))
            return super().__call__(tokens)

    together = greedy(Recorder(model), prompt, max_length=8, end_id=END)
    rows = [count for count, _ in shapes]
    assert shapes[0] == (16, 2)
    assert {width for _, width in shapes[1:]} == {1}
    assert rows == [16, *(sum(len(tokens) > step for tokens in together) for step in range(1, len(rows)))]
    assert rows[-1] < 16
    for row, tokens in zip(prompt, together, strict=True):
        assert torch.equal(greedy(FunctionDecoder(model), row[None], max_length=8, end_id=END)[0], tokens)

    shapes.clear()
    sample(Recorder(model), prompt, max_length=3, num_samples=5)
    assert shapes == [(16, 2), (80, 1), (80, 1)]


def test_rules_hold_in_what_is_drawn() -> None:
    drawn = sample(
        FunctionDecoder(toy(5, size=6, sharpness=4.0)),
        prompts(6, size=6),
        max_length=20,
        num_samples=4,
        banned=[5, 2],
        no_repeat_ngram=3,
        generator=torch.Generator().manual_seed(0),
    )
    for tokens in (row.tolist() for row in drawn):
        ngrams = list(zip(tokens, tokens[1:], tokens[2:], strict=False))
        assert len(set(ngrams)) == len(ngrams) == 18
        assert not {5, 2} & set(tokens)


def test_repetition_penalty_counts_generated_tokens() -> None:
    model = FunctionDecoder(lambda tokens: torch.tensor([2.0, 1.9, 0.5, -1.0]).expand(len(tokens), -1))
    (tokens,) = sample(model, torch.tensor([[1, 1]]), max_length=3, top_k=1, repetition_penalty=1.5)
    assert tokens.tolist() == [0, 1, 0]


def test_scores_of_the_model_stay_as_they_are() -> None:
    logits = torch.randn(9, 3)
    before = logits.clone()
    decoder = FunctionDecoder(lambda tokens: logits[: len(tokens)])
    sample(
        decoder,
        prompts(9),
        max_length=3,
        temperature=0.5,
        top_k=3,
        top_p=0.9,
        banned=[2],
        repetition_penalty=2.0,
        no_repeat_ngram=4,
    )
    assert torch.equal(logits, before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 0}, "max_length=0"),
        ({"min_length": 5}, r"min_length=5.*max_length=4"),
        ({"min_ends": 0}, "min_ends=0"),
        ({"num_samples": 0}, "num_samples=0"),
        ({"top_k": 0}, "top_k=0"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_p": 1.2}, "top_p=1.2"),
        ({"temperature": 0.0}, "top_k=1 is greedy"),
        ({"banned": [3]}, "from 0 to 2"),
        ({"banned": [0, 1, 2]}, "leave some"),
        ({"end_id": -1}, "from 0 to 2"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0"),
        ({"no_repeat_ngram": -1}, "no_repeat_ngram=-1"),
        ({"no_repeat_ngram": 1}, "step 4"),
        ({"constraint": prefix_constraint(lambda prefix, _: [2] if not prefix else [])}, "step 2"),
        ({"prompt": [[1, 2], [1]]}, "one tensor"),
        ({"prompt": torch.zeros(2, 0, dtype=torch.long)}, "at least one token"),
        ({"prompt": torch.zeros(1, 2)}, "token ids"),
    ],
)
def test_wrong_input_of_sample_is_explained(options: dict, message: str) -> None:
    options = {"prompt": prompts(2), "max_length": 4, **options}
    with pytest.raises(InputError, match=message) as caught:
        sample(FunctionDecoder(toy(0)), **options)
    assert "\n" not in str(caught.value)
