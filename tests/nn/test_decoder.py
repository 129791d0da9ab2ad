"""Generation step by step against the whole sequence at once, for everything that can generate."""

from typing import Any

import pytest
import torch
from torch import Tensor

from kexue.errors import InputError
from kexue.nn.transformer import CachedDecoder, EncoderDecoder, Transformer, TransformerConfig

SIZES: dict[str, Any] = {"vocab_size": 40, "dim": 32, "num_layers": 2, "num_heads": 4, "feedforward_dim": 48}
IDS = torch.randint(40, (3, 9), generator=torch.Generator().manual_seed(1))


def make(**options: Any) -> Transformer:
    torch.manual_seed(0)
    config = TransformerConfig(**SIZES, **{"mask": "causal", "heads": ("lm",), **options})
    module = Transformer(config).eval()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return module


def stepped(decoder: CachedDecoder, ids: Tensor, prompt: int) -> Tensor:
    """Scores after the prompt and after each further token, `(B, T - prompt + 1, V)`."""
    scores = [decoder(ids[:, :prompt])]
    scores += [decoder(ids[:, place : place + 1]) for place in range(prompt, ids.shape[1])]
    return torch.stack(scores, dim=1)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"positions": "learned", "norm": "gpt2_ml"},
        {"positions": "sinusoidal", "norm": "post", "num_kv_heads": 2},
        {"attention_scale": "log_n", "scale_floor": 2},
        {"talking_heads": "both", "positions": "none"},
        {"sharing": "all", "group_size": 2, "embedding_dim": 16},
        {"positions": "relative"},
        {"attention": "elu"},
        {"attention": "favor", "num_features": 64},
        {"attention": "taylor", "positions": "none"},
        {"attention": "limit", "key_size": 4},
        {"attention": "dense", "positions": "learned", "max_length": 12},
        {"attention": "factorised_dense", "positions": "none", "max_length": 12},
        {"attention": "random", "positions": "none", "max_length": 12},
        {"attention": "factorised_random", "positions": "none", "max_length": 12},
        {"attention": "mixture", "mixture": ("softmax", "random", "dense"), "max_length": 12},
    ],
    ids=str,
)
def test_steps_equal_the_whole(options: dict[str, Any]) -> None:
    module = make(**options)
    whole = module.logits(module(IDS))[:, 3:].detach()
    found = stepped(CachedDecoder(module, memory_length=20), IDS, 4)
    torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("positions", ["rope", "learned"])
def test_prompts_of_different_lengths_do_not_disturb_each_other(positions: str) -> None:
    module, mask = make(positions=positions, attention_scale="log_n"), torch.ones(3, 5, dtype=torch.bool)
    mask[0, :3] = mask[1, :1] = False
    found = stepped(CachedDecoder(module, mask=mask), IDS, 5)
    for row, padding in enumerate((3, 1, 0)):
        alone = stepped(CachedDecoder(module), IDS[row : row + 1, padding:], 5 - padding)
        torch.testing.assert_close(found[row], alone[0], rtol=1e-4, atol=1e-4)


def test_a_prefix_is_seen_whole_and_what_follows_is_causal() -> None:
    module = make(mask="prefix", num_segments=2)
    segments = (torch.arange(9) >= 4).long().expand(3, 9)
    whole = module.logits(module(IDS, None, segments))[:, 3:].detach()
    found = stepped(CachedDecoder(module, segments=segments[:, :4], next_segment=1), IDS, 4)
    torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-4)


def test_an_encoder_decoder_reads_its_source_once() -> None:
    torch.manual_seed(0)
    module = EncoderDecoder(TransformerConfig(**SIZES, num_decoder_layers=2, heads=("lm",))).eval()
    source, mask = IDS[:, :6], torch.ones(3, 6, dtype=torch.bool)
    mask[1, 4:] = False
    whole = module.logits(module(source, IDS, mask)).detach()
    decoder = CachedDecoder(module, source=source, source_mask=mask)
    torch.testing.assert_close(stepped(decoder, IDS, 1), whole, rtol=1e-4, atol=1e-4)
    decoder = CachedDecoder(module, source=source, source_mask=mask)
    decoder(IDS[:, :3])
    decoder.reorder(torch.tensor([1, 1]))
    torch.testing.assert_close(decoder(IDS[[1, 1], 3:4]), whole[[1, 1], 3], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"positions": "relative"}, {"attention": "favor"}], ids=str)
def test_rows_leave_and_change_places(options: dict[str, Any]) -> None:
    module, rows = make(**options), torch.tensor([2, 0])
    decoder = CachedDecoder(module, memory_length=20)
    decoder(IDS[:, :4])
    decoder.reorder(rows)
    found = decoder(IDS[rows, 4:5])
    torch.testing.assert_close(found, module.logits(module(IDS))[rows, 4].detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: CachedDecoder(make(mask="full")), "mask='causal'"),
        (lambda: CachedDecoder(make(), source=IDS), "EncoderDecoder"),
        (lambda: CachedDecoder(make(), mask=torch.tensor([[1, 0]])), "on the left"),
        (lambda: CachedDecoder(make(heads=()))(IDS), "'lm'"),
        (lambda: make()(IDS, cache=make().new_cache()), "no_grad"),
        (lambda: make(positions="relative").new_cache(), "Memory"),
        (lambda: CachedDecoder(make(positions="learned", max_length=5))(IDS), "max_length"),
    ],
)
def test_errors(call: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        call()
