"""Beam search against enumeration of all sequences, and along prefix trees."""

import math
from typing import Any

import pytest
import torch
from toy_language import END, children, prompts, sequences, toy

from kexue.errors import InputError
from kexue.nn.decoding import FunctionDecoder, beam_search, greedy, prefix_constraint, sample


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(
    ("min_length", "min_ends", "length_penalty"),
    [(0, 1, 0.0), (3, 1, 0.0), (0, 2, 0.0), (2, 2, 0.6), (0, 1, 1.0), (0, 1, 2.0), (0, 1, -0.7)],
)
def test_a_beam_of_full_width_finds_the_best_of_all(
    min_length: int, min_ends: int, length_penalty: float, seed: int
) -> None:
    model, prompt = toy(seed), prompts(4)
    found = beam_search(
        FunctionDecoder(model),
        prompt,
        num_beams=3**4,
        max_length=4,
        end_id=END,
        min_length=min_length,
        min_ends=min_ends,
        length_penalty=length_penalty,
    )
    for row, (tokens, score) in zip(prompt, found, strict=True):
        every = sequences(model, row, 4, min_length, min_ends)
        best, value = max(((one, total / len(one) ** length_penalty) for one, total in every), key=lambda pair: pair[1])
        assert tokens.tolist() == best
        assert score == pytest.approx(value, abs=1e-5)


@pytest.mark.parametrize("num_beams", [1, 2, 3, 5])
def test_scores_belong_to_the_sequences_and_prompts_do_not_mix(num_beams: int) -> None:
    model, prompt = toy(7, size=6), prompts(20, size=6)
    options: dict[str, Any] = {"num_beams": num_beams, "max_length": 8, "end_id": END, "min_length": 2}
    together = beam_search(FunctionDecoder(model), prompt, **options)
    for row, (tokens, score) in zip(prompt, together, strict=True):
        ((alone, _),) = beam_search(FunctionDecoder(model), row[None], **options)
        assert torch.equal(alone, tokens)
        text = torch.cat((row, tokens))
        steps = [model(text[None, :place])[0].log_softmax(-1)[text[place]] for place in range(len(row), len(text))]
        assert score == pytest.approx(float(sum(steps)), abs=1e-5)
    if num_beams == 1:
        expected = greedy(FunctionDecoder(model), prompt, max_length=8, end_id=END, min_length=2)
        assert all(torch.equal(tokens, other) for (tokens, _), other in zip(together, expected, strict=True))


def test_a_finished_hypothesis_is_kept_though_another_looked_better() -> None:
    """Its rival starts with 0.5 against 0.4 and then 0.2 at most; dropping what has ended would leave no better."""
    table = torch.tensor([[0.4, 0.5, 0.1], [0.2, 0.4, 0.4], [0.2, 0.4, 0.4]]).log()
    decoder = FunctionDecoder(lambda tokens: table[tokens[:, -1]])
    ((tokens, score),) = beam_search(
        decoder, torch.zeros(1, 1, dtype=torch.long), num_beams=2, max_length=9, end_id=END
    )
    assert tokens.tolist() == [END]
    assert math.exp(score) == pytest.approx(0.4)
    assert decoder.tokens is not None
    assert decoder.tokens.shape[1] == 2  # after one step more, nothing could beat it


KEYS = [(1, 2, END), (1, 2, 3, END), (4, END), (4, 4, 4, END)]


@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize("num_beams", [1, 4, 10])
def test_a_prefix_tree_yields_its_keys_only_and_a_wide_beam_the_best(num_beams: int, renormalise: bool) -> None:
    """One key begins another, and each prompt has its own tree; most beams of the wide search have nothing to do."""
    model, prompt = toy(8, size=5), prompts(10, size=5)
    trees = [KEYS[number % 2 :] for number in range(10)]

    def allowed(prefix: list[int], number: int) -> set[int]:
        assert children(trees[number], prefix), "asked beyond the tree"
        return children(trees[number], prefix)

    constraint = prefix_constraint(allowed, renormalise)
    found = beam_search(
        FunctionDecoder(model), prompt, num_beams=num_beams, max_length=6, end_id=END, constraint=constraint
    )
    for row, tree, (tokens, score) in zip(prompt, trees, found, strict=True):
        totals = {}
        for key in tree:
            text, total = row.tolist(), 0.0
            for place, token in enumerate(key):
                step = model(torch.tensor([text]))[0].log_softmax(-1)
                among = list(children(tree, list(key[:place]))) if renormalise else list(range(5))
                total += float(step[token] - step[among].logsumexp(-1))
                text.append(token)
            totals[key] = total
        assert tuple(tokens.tolist()) in tree
        assert score == pytest.approx(totals[tuple(tokens.tolist())], abs=1e-5)
        if num_beams >= len(tree):
            assert tuple(tokens.tolist()) == max(totals, key=totals.__getitem__)
    drawn = sample(
        FunctionDecoder(model),
        prompt,
        max_length=6,
        end_id=END,
        num_samples=20,
        constraint=constraint,
        generator=torch.Generator().manual_seed(0),
    )
    assert all(tuple(tokens.tolist()) in trees[row // 20] for row, tokens in enumerate(drawn))
    assert len({tuple(tokens.tolist()) for tokens in drawn}) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 0}, "num_beams=0"),
        ({"end_id": 7}, "end_id=7"),
        (
            {"constraint": prefix_constraint(lambda prefix, number: [2] if number == 0 or not prefix else [])},
            r"prompts \[1\]",
        ),
    ],
)
def test_wrong_input_of_beam_search_is_explained(options: dict, message: str) -> None:
    options = {"num_beams": 2, "max_length": 4, "end_id": END, **options}
    with pytest.raises(InputError, match=message):
        beam_search(FunctionDecoder(toy(0)), prompts(2), **options)
