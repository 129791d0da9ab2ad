"""Generation with whole models: beside `generate` of transformers, and with a cache beside without."""

from typing import Any

import pytest
import torch
from torch import Tensor
from toy_language import END, children

from kexue.nn.decoding import FunctionDecoder, beam_search, greedy, prefix_constraint, sample
from kexue.nn.transformer import CachedDecoder, Transformer, TransformerConfig


@pytest.fixture(scope="module")
def gpt2() -> torch.nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=23, n_embd=16, n_layer=2, n_head=2, n_positions=64, initializer_range=0.6)
    return GPT2LMHeadModel(config).eval()


def continuations(gpt2: torch.nn.Module, prompt: Tensor, **options: Any) -> list[list[int]]:
    """What transformers generates, cut after the end token."""
    options = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": END, "pad_token_id": END, **options}
    texts = gpt2.generate(prompt, attention_mask=torch.ones_like(prompt), **options)  # type: ignore[operator]
    rows = texts[:, prompt.shape[1] :].tolist()
    return [row[: row.index(END) + 1] if END in row else row for row in rows]


GPT2_PROMPTS = torch.randint(1, 23, (6, 5), generator=torch.Generator().manual_seed(1))


def test_greedy_matches_transformers(gpt2: torch.nn.Module) -> None:
    decoder = FunctionDecoder(lambda tokens: gpt2(tokens).logits[:, -1])
    ours = greedy(decoder, GPT2_PROMPTS, max_length=10, end_id=END)
    assert [tokens.tolist() for tokens in ours] == continuations(gpt2, GPT2_PROMPTS)


@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
def test_beam_search_matches_transformers(gpt2: torch.nn.Module, length_penalty: float) -> None:
    decoder = FunctionDecoder(lambda tokens: gpt2(tokens).logits[:, -1])
    options: dict[str, Any] = {"num_beams": 4, "length_penalty": length_penalty}
    ours = beam_search(decoder, GPT2_PROMPTS, max_length=10, end_id=END, **options)
    theirs = continuations(gpt2, GPT2_PROMPTS, early_stopping="never", **options)
    assert [tokens.tolist() for tokens, _ in ours] == theirs
    assert len({len(row) for row in theirs}) > 1


def test_a_prefix_tree_matches_transformers(gpt2: torch.nn.Module) -> None:
    """The tree is at least as wide as the beam, which transformers would else fill up with forbidden tokens."""
    tree = [(first, second, END) for first in range(1, 8) for second in range(8, 12)]
    decoder = FunctionDecoder(lambda tokens: gpt2(tokens).logits[:, -1])
    constraint = prefix_constraint(lambda prefix, _: children(tree, prefix), renormalise=False)
    ours = beam_search(decoder, GPT2_PROMPTS, num_beams=3, max_length=10, end_id=END, constraint=constraint)
    theirs = continuations(
        gpt2,
        GPT2_PROMPTS,
        num_beams=3,
        length_penalty=0.0,
        early_stopping="never",
        prefix_allowed_tokens_fn=lambda _, text: list(children(tree, text[5:].tolist())) or [END],
    )
    assert [tokens.tolist() for tokens, _ in ours] == theirs


def test_a_cache_changes_nothing() -> None:
    torch.manual_seed(0)
    config = TransformerConfig(
        vocab_size=20,
        dim=16,
        num_layers=2,
        num_heads=2,
        feedforward_dim=32,
        max_length=40,
        mask="causal",
        heads=("lm",),
    )
    model = Transformer(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5)
    prompt = torch.randint(20, (5, 4))

    def anew() -> FunctionDecoder:
        return FunctionDecoder(lambda tokens: model.logits(model(tokens)[:, -1]))

    def run(decoder: FunctionDecoder | CachedDecoder) -> list[list[int]]:
        generator = torch.Generator().manual_seed(0)
        drawn = sample(decoder, prompt, max_length=12, top_p=0.9, num_samples=3, end_id=END, generator=generator)
        return [tokens.tolist() for tokens in drawn]

    assert run(CachedDecoder(model)) == run(anew())
    assert len({len(tokens) for tokens in run(anew())}) > 1
    for one, other in zip(
        beam_search(CachedDecoder(model), prompt, num_beams=4, max_length=12, end_id=END),
        beam_search(anew(), prompt, num_beams=4, max_length=12, end_id=END),
        strict=True,
    ):
        assert torch.equal(one[0], other[0])
        assert one[1] == pytest.approx(other[1], abs=1e-4)
