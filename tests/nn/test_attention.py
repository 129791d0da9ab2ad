"""Attention against torch.nn.MultiheadAttention, against the formulas in float64, and what it may not depend on."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kexue.nn.transformer import Attention, Context, TransformerConfig, visibility
from kexue.nn.transformer.attention import HeadMix

CPU = torch.device("cpu")
CLOSE: dict[str, Any] = {"atol": 1e-5, "rtol": 1e-5}
EXACT: dict[str, Any] = {"atol": 1e-10, "rtol": 1e-10}
REAL = torch.arange(7) < torch.tensor([[7], [4], [1]])
MIXES: list[dict[str, Any]] = [
    {"talking_heads": "pre"},
    {"talking_heads": "post"},
    {"talking_heads": "both"},
    {"talking_heads": "pre", "num_key_heads": 2},
    {"talking_heads": "post", "num_value_heads": 8, "head_size": 3},
    {"talking_heads": "both", "num_key_heads": 6, "num_value_heads": 3, "key_size": 5, "head_size": 7},
]


def make(dtype: torch.dtype = torch.float64, seed: int = 0, **options: Any) -> Any:
    """A layer without dropout and positions whose parameters, also mixes and biases, are all random."""
    torch.manual_seed(seed)
    config = TransformerConfig(10, **{"dim": 16, "num_heads": 4, "dropout": 0.0, "positions": "none", **options})
    layer = Attention(config).to(dtype)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.4)
    return layer.eval()


def context(length: int, kind: Any = "full", mask: Tensor | None = None) -> Context:
    return Context(visibility(kind, length, CPU, mask=mask))


def heads(x: Tensor, size: int) -> Tensor:
    return x.unflatten(-1, (-1, size)).transpose(1, 2)


def formula(layer: Attention, hidden: Tensor, allowed: Tensor | None = None) -> Tensor:
    """The article's layer, head by head; `allowed` is True where a query sees a key, `(B, T, S)`."""
    config = layer.config
    query, key, value = layer.projection(hidden).split(layer.widths, dim=-1)
    query, key, value = heads(query, config.key_size), heads(key, config.key_size), heads(value, config.head_size)
    scores = torch.einsum("bnik,bnjk->bnij", query, key) / math.sqrt(config.key_size)
    if layer.mix_scores is not None:
        scores = torch.einsum("hn,bnij->bhij", layer.mix_scores.weight, scores)
    if allowed is not None:
        scores = scores.masked_fill(~allowed[:, None], -torch.inf)
    weights = scores.softmax(-1)
    if layer.mix_weights is not None:
        weights = torch.einsum("vh,bhij->bvij", layer.mix_weights.weight, weights)
    return layer.output(torch.einsum("bvij,bvjs->bivs", weights, value).flatten(-2))


def reference(layer: Attention, bias: bool) -> nn.MultiheadAttention:
    """PyTorch's layer with the same weights; the identity where there is no output projection."""
    peer = nn.MultiheadAttention(16, 4, bias=bias, batch_first=True).to(layer.projection.weight.dtype)
    state = {"in_proj_weight": layer.projection.weight, "out_proj.weight": torch.eye(16)}
    if layer.config.output_projection:
        state["out_proj.weight"] = layer.output.weight
    if bias:
        state["in_proj_bias"] = layer.projection.bias
        state["out_proj.bias"] = layer.output.bias if layer.config.output_projection else torch.zeros(16)
    peer.load_state_dict(state)
    return peer


@pytest.mark.parametrize("kind", ["full", "causal"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("output", [False, True])
def test_equals_pytorch_with_gradients(kind: str, padded: bool, bias: bool, output: bool) -> None:
    layer = make(torch.float32, attention_bias=bias, output_projection=output)
    peer = reference(layer, bias)
    hidden, weight = torch.randn(3, 7, 16), torch.randn(3, 7, 16) * REAL[..., None]
    ours, theirs = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    found = layer(ours, context(7, kind, REAL if padded else None))
    forbidden = torch.ones(7, 7, dtype=torch.bool).triu(1) if kind == "causal" else None
    expected, _ = peer(theirs, theirs, theirs, key_padding_mask=~REAL if padded else None, attn_mask=forbidden)
    torch.testing.assert_close(found[REAL], expected[REAL], **CLOSE)
    (found * weight).sum().backward()
    (expected * weight).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, **CLOSE)
    torch.testing.assert_close(layer.projection.weight.grad, peer.in_proj_weight.grad, **CLOSE)
    if bias:
        torch.testing.assert_close(layer.projection.bias.grad, peer.in_proj_bias.grad, **CLOSE)


def test_attention_to_a_source_equals_pytorch() -> None:
    torch.manual_seed(0)
    config = TransformerConfig(10, dim=16, num_heads=4, dropout=0.0, num_decoder_layers=1)
    layer = Attention(config, cross=True)
    peer = nn.MultiheadAttention(16, 4, batch_first=True)
    state = {"in_proj_weight": torch.cat((layer.query.weight, layer.projection.weight))}
    state |= {"in_proj_bias": torch.cat((layer.query.bias, layer.projection.bias))}
    peer.load_state_dict(state | {f"out_proj.{name}": value for name, value in layer.output.state_dict().items()})
    hidden, source = torch.randn(3, 5, 16), torch.randn(3, 7, 16)
    seen = visibility("full", 7, CPU, mask=REAL)
    found = layer(hidden, Context(visibility("causal", 5, CPU), source_visible=seen), source=source)
    torch.testing.assert_close(found, peer(hidden, source, source, key_padding_mask=~REAL)[0], **CLOSE)


@pytest.mark.parametrize(
    "options",
    [{}, {"key_size": 6}, {"key_size": 6, "head_size": 3}, {"dim": 20, "key_size": 4, "head_size": 6}, *MIXES],
)
@pytest.mark.parametrize("kind", ["full", "causal"])
def test_equals_the_formula(options: dict[str, Any], kind: str) -> None:
    layer = make(**options)
    hidden = torch.randn(3, 7, layer.config.dim, dtype=torch.float64)
    allowed = REAL[:, None] & (torch.ones(7, 7).tril().bool() if kind == "causal" else True)
    found = layer(hidden, context(7, kind, REAL))
    torch.testing.assert_close(found, formula(layer, hidden, allowed.expand(3, 7, 7)), **EXACT)


@pytest.mark.parametrize("talking_heads", ["pre", "post", "both"])
@pytest.mark.parametrize("sizes", [{}, {"key_size": 8}, {"key_size": 3, "head_size": 5}])
def test_mixes_that_are_the_identity_change_nothing(talking_heads: Any, sizes: dict[str, int]) -> None:
    """A new layer has such mixes, so it may replace a trained one; plain heads go through the fused kernel."""
    config = TransformerConfig(10, dim=16, num_heads=4, positions="none", **sizes)
    plain = Attention(config).double().eval()
    mixed = Attention(replace(config, talking_heads=talking_heads)).double().eval()
    missing, unexpected = mixed.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected
    assert all(name.startswith("mix_") for name in missing)
    hidden = torch.randn(3, 7, 16, dtype=torch.float64)
    torch.testing.assert_close(mixed(hidden, context(7, mask=REAL)), plain(hidden, context(7, mask=REAL)), **EXACT)


@pytest.mark.parametrize("options", [{"num_kv_heads": 2}, {"num_kv_heads": 1}, {"num_kv_heads": 2, "key_size": 6}])
def test_shared_keys_and_values_equal_repeated_ones(options: dict[str, Any]) -> None:
    shared = make(**options)
    whole = make(**{**options, "num_kv_heads": 0})
    repeats = 4 // options["num_kv_heads"]
    sizes = (shared.config.key_size, shared.config.key_size, shared.config.head_size)
    for name in ("weight", "bias"):
        query, *others = getattr(shared.projection, name).data.split(shared.widths)
        parts = [
            part.unflatten(0, (-1, size)).repeat_interleave(repeats, 0).flatten(0, 1)
            for part, size in zip(others, sizes[1:], strict=True)
        ]
        getattr(whole.projection, name).data = torch.cat((query, *parts))
    whole.output.load_state_dict(shared.output.state_dict())
    hidden = torch.randn(3, 7, 16, dtype=torch.float64)
    for kind in ("full", "causal"):
        seen = context(7, kind, REAL)
        torch.testing.assert_close(shared(hidden, seen), whole(hidden, seen), **EXACT)


def scores_of(layer: Attention, hidden: Tensor) -> Tensor:
    """Scores of all heads before the softmax, `(B, N, T, S)`."""
    query, key, _ = layer.projection(hidden).split(layer.widths, dim=-1)
    scores = heads(query, layer.config.key_size) @ heads(key, layer.config.key_size).mT
    return scores if layer.mix_scores is None else layer.mix_scores(scores)


def test_rank_of_the_scores() -> None:
    """A head alone has the rank of its key size; mixed, it reaches min(tokens, width, heads * key size)."""
    hidden = torch.randn(1, 32, 16, dtype=torch.float64)
    for key_size in (1, 2, 4, 8):
        ranks = torch.linalg.matrix_rank(scores_of(make(key_size=key_size, attention_bias=False), hidden))
        assert ranks.eq(key_size).all()
    mixed = scores_of(make(talking_heads="pre", attention_bias=False), hidden)
    assert torch.linalg.matrix_rank(mixed).eq(16).all()
    wide = make(talking_heads="pre", attention_bias=False, dim=64, key_size=4)
    ranks = torch.linalg.matrix_rank(scores_of(wide, torch.randn(1, 32, 64, dtype=torch.float64)))
    assert ranks.eq(4 * 4).all()


def test_mixed_heads_and_wide_keys_fit_what_narrow_heads_cannot() -> None:
    """A random table of weights, 24 x 24, for the first of eight heads of key size 2."""
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(24, 24, generator=generator).mul(2).softmax(-1)
    losses = {}
    for name, options in {"narrow": {}, "wide": {"key_size": 24}, "mixed": {"talking_heads": "pre"}}.items():
        torch.manual_seed(0)
        size: dict[str, Any] = {
            "dim": 32,
            "num_heads": 8,
            "key_size": 2,
            "head_size": 4,
            "attention_bias": False,
            "positions": "none",
        }
        layer = Attention(TransformerConfig(10, **{**size, **options}))
        hidden = torch.randn(1, 24, 32, generator=torch.Generator().manual_seed(1))
        optimizer = torch.optim.Adam(layer.parameters(), lr=2e-2)
        for _ in range(300):
            loss = -(target * scores_of(layer, hidden)[0, 0].log_softmax(-1)).sum(-1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses[name] = loss.item() + (target * target.log()).sum(-1).mean().item()
    assert losses["mixed"] < 0.05 * losses["narrow"]
    assert losses["wide"] < 0.05 * losses["narrow"]


@pytest.mark.parametrize("options", [{}, {"num_kv_heads": 2}, *MIXES])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_masked_keys_weigh_exactly_nothing(options: dict[str, Any], dtype: torch.dtype) -> None:
    """With mixes of any sign, whatever stands in the padding: a mask that was mixed as well would let it through."""
    layer = make(dtype, **options)
    hidden = torch.randn(3, 7, 16).to(dtype)
    padding = ~REAL[..., None]
    seen = context(7, mask=REAL)
    changed = layer(torch.where(padding, 50 * torch.randn(3, 7, 16).to(dtype), hidden), seen)
    assert torch.equal(changed[REAL], layer(hidden, seen)[REAL])
    assert changed.isfinite().all()


def test_permuted_heads_change_nothing() -> None:
    layer = make(talking_heads="both", num_key_heads=3, num_value_heads=5, key_size=4, head_size=6)
    hidden = torch.randn(2, 7, 16, dtype=torch.float64)
    expected = layer(hidden, context(7))
    config, keys, softmax, values = layer.config, torch.randperm(3), torch.randperm(4), torch.randperm(5)
    orders, sizes = (keys, keys, values), (config.key_size, config.key_size, config.head_size)
    with torch.no_grad():
        for name in ("weight", "bias"):
            parts = getattr(layer.projection, name).split(layer.widths)
            parts = [
                part.unflatten(0, (-1, size))[order].flatten(0, 1)
                for part, size, order in zip(parts, sizes, orders, strict=True)
            ]
            getattr(layer.projection, name).copy_(torch.cat(parts))
        assert isinstance(layer.mix_scores, HeadMix)
        assert isinstance(layer.mix_weights, HeadMix)
        layer.mix_scores.weight.copy_(layer.mix_scores.weight[softmax][:, keys])
        layer.mix_weights.weight.copy_(layer.mix_weights.weight[values][:, softmax])
        columns = layer.output.weight.unflatten(1, (5, 6))[:, values].flatten(1)
        layer.output.weight.copy_(columns)
    torch.testing.assert_close(layer(hidden, context(7)), expected, **EXACT)


@pytest.mark.parametrize("options", [{}, {"talking_heads": "both"}, {"num_kv_heads": 2}, {"attention_scale": "log_n"}])
def test_without_positions_order_means_nothing(options: dict[str, Any]) -> None:
    layer = make(**options)
    hidden, order = torch.randn(2, 7, 16, dtype=torch.float64), torch.randperm(7)
    torch.testing.assert_close(layer(hidden[:, order], context(7)), layer(hidden, context(7))[:, order], **EXACT)


def test_permuted_keys_and_values_change_nothing() -> None:
    config = TransformerConfig(10, dim=16, num_heads=4, num_decoder_layers=1)
    layer = Attention(config, cross=True).double().eval()
    hidden, source = torch.randn(2, 5, 16, dtype=torch.float64), torch.randn(2, 7, 16, dtype=torch.float64)
    found = layer(hidden, context(5), source=source[:, torch.randperm(7)])
    torch.testing.assert_close(found, layer(hidden, context(5), source=source), **EXACT)


@pytest.mark.parametrize("options", [{}, {"talking_heads": "post"}])
@pytest.mark.parametrize("constant", [1.0, 10.0, 1000.0])
def test_a_constant_added_to_all_scores_changes_nothing(options: dict[str, Any], constant: float) -> None:
    """A feature that is 1 in every token, which keys alone read with a weight that any query multiplies by the same."""
    layer = make(torch.float32, dim=16, **options)
    with torch.no_grad():
        query, key, _ = layer.projection.weight.split(layer.widths)
        query_bias, key_bias, _ = layer.projection.bias.split(layer.widths)
        for head in range(4):  # the last number of a head's queries and keys is constant
            for part in (query, key):
                part[4 * head + 3] = 0
            query_bias[4 * head + 3] = 2.0
            key_bias[4 * head + 3] = 0.0
        hidden = torch.randn(2, 7, 16)
        expected = layer(hidden, context(7))
        for head in range(4):
            key_bias[4 * head + 3] = constant  # adds 2 * constant / sqrt(4) to every score
    spacing = constant * torch.finfo(torch.float32).eps  # of float32 numbers near the scores
    torch.testing.assert_close(layer(hidden, context(7)), expected, atol=max(1e-5, 4 * spacing), rtol=0)


@pytest.mark.parametrize("options", [{}, {"num_kv_heads": 1}, *MIXES[2:]])
@pytest.mark.parametrize("kind", ["full", "causal"])
def test_gradients(options: dict[str, Any], kind: str) -> None:
    layer = make(**options)
    hidden = torch.randn(2, 4, 16, dtype=torch.float64, requires_grad=True)
    seen = context(4, kind, REAL[1:, :4])
    names, values = zip(*layer.named_parameters(), strict=True)

    def call(hidden: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (hidden, seen))

    assert torch.autograd.gradcheck(call, (hidden, *values), fast_mode=True)


@pytest.mark.parametrize("options", [{}, {"talking_heads": "both"}])
def test_dropout_is_of_the_weights_and_only_in_training(options: dict[str, Any]) -> None:
    layer = make(torch.float32, **{"attention_dropout": 0.5, **options})
    hidden = torch.randn(2, 7, 16)
    assert torch.equal(layer(hidden, context(7)), layer(hidden, context(7)))
    layer.train()
    assert not torch.equal(layer(hidden, context(7)), layer(hidden, context(7)))


def test_zero_padded_keys_keep_the_scores_when_rescaled() -> None:
    """Enlarging the key size of a trained layer: new columns are zero, the others times (new / old)^(1/4)."""
    narrow, wide = make(), make(key_size=12)
    scale = (12 / 4) ** 0.25
    with torch.no_grad():
        for name in ("weight", "bias"):
            query, key, value = getattr(narrow.projection, name).split(narrow.widths)
            grown = []
            for part in (query, key):
                cells = part.unflatten(0, (4, 4)) * scale
                room = [0, 0] * (cells.dim() - 2) + [0, 8]
                grown.append(F.pad(cells, room).flatten(0, 1))
            getattr(wide.projection, name).copy_(torch.cat((*grown, value)))
        wide.output.load_state_dict(narrow.output.state_dict())
    hidden = torch.randn(2, 7, 16, dtype=torch.float64)
    torch.testing.assert_close(wide(hidden, context(7)), narrow(hidden, context(7)), **EXACT)
