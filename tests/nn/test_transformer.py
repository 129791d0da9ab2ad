"""The Transformer against PyTorch's layers, and what padding, packing, caches, sharing and precision may not change."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kexue.errors import InputError
from kexue.nn.transformer import (
    Context,
    EncoderDecoder,
    Memory,
    Transformer,
    TransformerBlock,
    TransformerConfig,
    sinusoids,
    unshared,
    visibility,
)

CPU = torch.device("cpu")
CLOSE: dict[str, Any] = {"atol": 1e-5, "rtol": 1e-5}
EXACT: dict[str, Any] = {"atol": 1e-10, "rtol": 1e-10}
SIZES: dict[str, Any] = {
    "dim": 16,
    "num_layers": 2,
    "num_heads": 2,
    "feedforward_dim": 32,
    "dropout": 0.0,
    "max_length": 12,
}
LENGTHS = (9, 5, 1)
REAL = torch.arange(9) < torch.tensor(LENGTHS)[:, None]
IDS = torch.randint(30, (3, 9), generator=torch.Generator().manual_seed(0))

EVERY_MASK: list[dict[str, Any]] = [  # options that go with any mask
    {},
    {"positions": "learned", "norm": "post"},
    {"positions": "sinusoidal", "norm": "deepnorm"},
    {"positions": "none", "norm": "gpt2_ml"},
    {"positions": "relative"},
    {"positions": "relative", "talking_heads": "both", "clamp_length": 3},
    {"positions": "learned", "first_position": 2},
    {"attention_scale": "log_n", "scale_floor": 2},
    {"num_kv_heads": 1, "gated": True, "norm_kind": "rms"},
    {"key_size": 12, "head_size": 6},
    {"talking_heads": "both", "num_key_heads": 3, "num_value_heads": 4},
    {"sharing": "all", "group_size": 2, "embedding_dim": 8},
    {"sharing": "attention", "num_segments": 2},
    {"sharing": "feedforward", "attention_bias": False, "feedforward_bias": False, "output_projection": False},
]
BY_PLACE: list[dict[str, Any]] = [  # scores of a place in the row
    {"attention": "dense", "positions": "none"},
    {"attention": "factorised_random", "positions": "learned"},
    {"attention": "mixture", "mixture": ("softmax", "random", "factorised_dense")},
]
KERNELS: list[dict[str, Any]] = [{"attention": kind} for kind in ("elu", "favor", "taylor", "limit")]
PREFIX: dict[str, Any] = {"mask": "prefix", "num_segments": 2}


def name(options: dict[str, Any]) -> str:
    return "-".join(str(value) for value in options.values()) or "default"


def small(**options: Any) -> TransformerConfig:
    values: dict[str, Any] = {**SIZES, **options}
    return TransformerConfig(30, **values)


def make(dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """A network in which also what starts at zero or one is random."""
    torch.manual_seed(0)
    return disturb(Transformer(small(**options))).to(dtype).eval()


def disturb(module: Any) -> Any:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return module


def segments_of(prefixes: tuple[int, ...], length: int = 9) -> Tensor:
    return (torch.arange(length) >= torch.tensor(prefixes)[:, None]).long()


def encoder_layer(block: TransformerBlock, config: TransformerConfig) -> nn.TransformerEncoderLayer:
    """PyTorch's layer with the weights of the block."""
    sizes = (config.dim, config.num_heads, config.feedforward_dim, 0.0, config.activation)
    layer = nn.TransformerEncoderLayer(*sizes, batch_first=True, norm_first=config.norm == "pre")
    layer.load_state_dict(renamed(block, ENCODER))
    return layer


def decoder_layer(block: TransformerBlock, config: TransformerConfig) -> nn.TransformerDecoderLayer:
    sizes = (config.dim, config.num_heads, config.feedforward_dim, 0.0, config.activation)
    layer = nn.TransformerDecoderLayer(*sizes, batch_first=True, norm_first=config.norm == "pre")
    layer.load_state_dict(renamed(block, DECODER))
    return layer


ENCODER = {
    "self_attn.in_proj_": "attention.projection.",
    "self_attn.out_proj.": "attention.output.",
    "linear1.": "feedforward.inner.",
    "linear2.": "feedforward.outer.",
    "norm1.": "attention_norm.",
    "norm2.": "feedforward_norm.",
}
DECODER = {
    **ENCODER,
    "multihead_attn.out_proj.": "cross_attention.output.",
    "norm2.": "cross_norm.",
    "norm3.": "feedforward_norm.",
}


def renamed(block: TransformerBlock, names: dict[str, str], grad: bool = False) -> dict[str, Tensor]:
    """Weights of a block, or their gradients, under PyTorch's names."""
    values = {key: value.grad if grad else value for key, value in block.named_parameters()}
    found = {there + end: values[here + end] for there, here in names.items() for end in ("weight", "bias")}
    if "cross_attention.query.weight" in values:
        for end in ("weight", "bias"):
            parts = [values[f"cross_attention.{part}.{end}"] for part in ("query", "projection")]
            found[f"multihead_attn.in_proj_{end}"] = torch.cat(parts)  # type: ignore[arg-type]
    return found  # type: ignore[return-value]


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("activation", ["gelu", "relu"])
@pytest.mark.parametrize("kind", ["full", "causal"])
def test_block_equals_pytorch_with_gradients(norm: Any, activation: Any, kind: Any) -> None:
    config = small(norm=norm, activation=activation)
    torch.manual_seed(0)
    block = disturb(TransformerBlock(config))
    layer = encoder_layer(block, config)
    hidden, weight = torch.randn(3, 9, 16), torch.randn(3, 9, 16) * REAL[..., None]
    ours, theirs = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    triangle = torch.ones(9, 9, dtype=torch.bool).triu(1) if kind == "causal" else None
    expected = layer(theirs, src_mask=triangle, src_key_padding_mask=~REAL)
    found = block(ours, Context(visibility(kind, 9, CPU, mask=REAL)))
    torch.testing.assert_close(found[REAL], expected[REAL], **CLOSE)
    (found * weight).sum().backward()
    (expected * weight).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, **CLOSE)
    gradients = {key: parameter.grad for key, parameter in layer.named_parameters()}
    torch.testing.assert_close(renamed(block, ENCODER, grad=True), gradients, **CLOSE)


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_block_of_a_decoder_equals_pytorch_with_gradients(norm: Any) -> None:
    config = small(norm=norm, num_decoder_layers=2)
    torch.manual_seed(0)
    block = disturb(TransformerBlock(config, cross=True))
    layer = decoder_layer(block, config)
    hidden, source, weight = torch.randn(3, 5, 16), torch.randn(3, 9, 16), torch.randn(3, 5, 16)
    triangle = torch.ones(5, 5, dtype=torch.bool).triu(1)
    expected = layer(hidden, source, tgt_mask=triangle, memory_key_padding_mask=~REAL)
    seen = Context(visibility("causal", 5, CPU), source_visible=visibility("full", 9, CPU, mask=REAL))
    found = block(hidden, seen, source=source)
    torch.testing.assert_close(found, expected, **CLOSE)
    (found * weight).sum().backward()
    (expected * weight).sum().backward()
    gradients = {key: parameter.grad for key, parameter in layer.named_parameters()}
    torch.testing.assert_close(renamed(block, DECODER, grad=True), gradients, **CLOSE)


def embedded(module: Transformer | EncoderDecoder, ids: Tensor) -> Tensor:
    embedding, config = module.embedding, module.config
    hidden = embedding.tokens.weight[ids]
    if config.positions == "learned":
        assert embedding.positions is not None
        hidden = hidden + embedding.positions.weight[: ids.shape[1]]
    elif config.positions == "sinusoidal":
        hidden = hidden * 4 + sinusoids(ids.shape[1], 16)
    return hidden if embedding.norm is None else embedding.norm(hidden)


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("positions", ["learned", "sinusoidal"])
def test_stack_is_embedding_positions_blocks_and_norm(norm: Any, positions: Any) -> None:
    module = make(norm=norm, positions=positions)
    states = [embedded(module, IDS)]
    for block in module.blocks():
        states.append(encoder_layer(block, module.config)(states[-1]))
    if norm == "pre":
        assert module.layers.norm is not None
        states[-1] = module.layers.norm(states[-1])
    torch.testing.assert_close(module.hidden_states(IDS), states, **CLOSE)
    assert torch.equal(module(IDS), module.hidden_states(IDS)[-1])


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_encoder_decoder_equals_pytorch_layers_and_its_cache(norm: Any) -> None:
    torch.manual_seed(0)
    config = small(norm=norm, positions="learned", num_decoder_layers=3, heads=("lm",))
    module = disturb(EncoderDecoder(config)).eval()
    target = torch.randint(30, (3, 6))
    source, hidden = embedded(module, IDS), embedded(module, target)
    for block in module.encoder.blocks:
        source = encoder_layer(block, config)(source, src_key_padding_mask=~REAL)
    source = source if norm == "post" else module.encoder.norm(source)
    triangle = torch.ones(6, 6, dtype=torch.bool).triu(1)
    for block in module.decoder.blocks:
        layer = decoder_layer(block, config)
        hidden = layer(hidden, source, tgt_mask=triangle, memory_key_padding_mask=~REAL)
    hidden = hidden if norm == "post" else module.decoder.norm(hidden)
    found = module(IDS, target, REAL)
    torch.testing.assert_close(found, hidden, **CLOSE)
    torch.testing.assert_close(module.logits(found), found @ module.embedding.tokens.weight.T, **CLOSE)
    with torch.no_grad():
        cache, states = module.new_cache(), module.encode(IDS, REAL)
        parts = [module.decode(part, states, REAL, cache=cache) for part in target.split((3, 1, 2), dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), found, **CLOSE)
    assert len(module.blocks()) == 5


@pytest.mark.parametrize("options", [*EVERY_MASK, *BY_PLACE, *KERNELS], ids=name)
@pytest.mark.parametrize("mask", ["full", "causal", "prefix"])
def test_padding_changes_nothing(options: dict[str, Any], mask: str) -> None:
    if mask == "prefix" and options in KERNELS:
        pytest.skip("linear attention has no prefix mask")
    module = make(**{**options, **(PREFIX if mask == "prefix" else {"mask": mask})})
    segments = segments_of((4, 3, 1)) if module.config.num_segments else None
    found = module(IDS, REAL, segments)
    assert found.isfinite().all()
    for row, length in enumerate(LENGTHS):
        alone = module(IDS[row : row + 1, :length], None, None if segments is None else segments[row, None, :length])
        torch.testing.assert_close(found[row, None, :length], alone, atol=3e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"positions": "relative"},
        {"positions": "none", "attention_scale": "log_n", "scale_floor": 2},
        {"positions": "learned", "first_position": 2},
        {"attention": "favor", "positions": "none"},
        {"attention": "elu"},
    ],
    ids=name,
)
@pytest.mark.parametrize("mask", ["full", "causal"])
def test_padding_on_the_left_changes_nothing_where_only_distances_count(options: dict[str, Any], mask: str) -> None:
    module = make(**options, mask=mask)
    found = module(IDS.flip(1), REAL.flip(1))
    assert found.isfinite().all()
    for row, length in enumerate(LENGTHS):
        alone = module(IDS[row : row + 1, :length].flip(1))
        torch.testing.assert_close(found[row, None, -length:], alone, atol=3e-5, rtol=1e-4)


@pytest.mark.parametrize("options", [*EVERY_MASK, *BY_PLACE, *KERNELS], ids=name)
def test_no_gradient_comes_from_later_tokens(options: dict[str, Any]) -> None:
    module = make(**options, mask="causal")
    inputs: list[Tensor] = []
    module.embedding.register_forward_hook(lambda *call: inputs.append(call[-1]))
    found = module(IDS)
    for place in (0, 3, 7):
        (gradient,) = torch.autograd.grad(found[:, place].square().sum(), inputs[0], retain_graph=True)
        assert gradient[:, place + 1 :].eq(0).all()
        assert gradient[:, : place + 1].ne(0).any(-1).all()


def test_a_prefix_mask_is_the_plain_rule() -> None:
    """A token of segment 0 sees all of segment 0; one of segment 1 sees that, and segment 1 up to itself."""
    segments = segments_of((4, 9, 0))
    allowed = visibility("prefix", 9, CPU, segments=segments).allowed
    assert allowed is not None
    for row in range(3):
        for query in range(9):
            for key in range(9):
                seen = segments[row, key] == 0 or (segments[row, query] == 1 and key <= query)
                assert allowed[row, 0, query, key] == seen


@pytest.mark.parametrize("options", [*EVERY_MASK, *BY_PLACE], ids=name)
def test_a_prefix_mask_lets_no_gradient_through(options: dict[str, Any]) -> None:
    module = make(**{**options, **PREFIX})
    inputs: list[Tensor] = []
    module.embedding.register_forward_hook(lambda *call: inputs.append(call[-1]))
    found = module(IDS[:1], segments=segments_of((4,)))
    for place, last in ((0, 3), (3, 3), (4, 4), (6, 6)):
        (gradient,) = torch.autograd.grad(found[:, place].square().sum(), inputs[0], retain_graph=True)
        assert gradient[:, last + 1 :].eq(0).all()
        assert gradient[:, : last + 1].ne(0).any(-1).all()


def packed_row(rows: list[Tensor], length: int) -> Tensor:
    return F.pad(torch.cat(rows), (0, length - sum(len(row) for row in rows)))[None]


@pytest.mark.parametrize("options", EVERY_MASK, ids=name)
@pytest.mark.parametrize("mask", ["full", "causal", "prefix"])
def test_packed_rows_equal_single_sequences_with_gradients(options: dict[str, Any], mask: str) -> None:
    """Two rows: sequences of 5, 1 and 4 tokens and two of padding; and one of 9 tokens."""
    module = make(torch.float64, **{**options, **(PREFIX if mask == "prefix" else {"mask": mask})})
    lengths, borders = ((5, 1, 4), (9,)), (3, 1, 0, 4)
    generator = torch.Generator().manual_seed(1)
    sequences = [torch.randint(30, (length,), generator=generator) for length in sum(lengths, ())]
    segments = [(torch.arange(len(s)) >= border).long() for s, border in zip(sequences, borders, strict=True)]
    weights = [torch.randn(len(s), 16, generator=generator, dtype=torch.float64) for s in sequences]
    with_segments = module.config.num_segments > 0

    alone = [
        module(s[None], None, kinds[None] if with_segments else None)[0]
        for s, kinds in zip(sequences, segments, strict=True)
    ]
    loss = sum((out * weight).sum() for out, weight in zip(alone, weights, strict=True))
    expected = torch.autograd.grad(loss, list(module.parameters()))  # type: ignore[arg-type]

    def rows(values: list[Tensor]) -> Tensor:
        return torch.cat((packed_row(values[:3], 12), packed_row(values[3:], 12)))

    found = module(
        rows(sequences),
        None,
        rows(segments) if with_segments else None,
        positions=rows([torch.arange(len(s)) for s in sequences]),
        sequences=rows([torch.full_like(s, number + 1) for number, s in enumerate(sequences)]),
    )
    assert found.isfinite().all()
    places = [found[0, :5], found[0, 5:6], found[0, 6:10], found[1, :9]]
    # Angles and counts are float32 numbers; all the rest is float64.
    torch.testing.assert_close(places, alone, atol=1e-9, rtol=1e-9)
    loss = sum((out * weight).sum() for out, weight in zip(places, weights, strict=True))
    gradients = torch.autograd.grad(loss, list(module.parameters()))  # type: ignore[arg-type]
    torch.testing.assert_close(gradients, expected, atol=1e-8, rtol=1e-8)


CACHED = [options for options in EVERY_MASK if options.get("positions") != "relative"]


@pytest.mark.parametrize("options", [*CACHED, *BY_PLACE, *KERNELS], ids=name)
@pytest.mark.parametrize("parts", [(1,) * 9, (4, 1, 3, 1)], ids=str)
def test_a_cache_changes_nothing(options: dict[str, Any], parts: tuple[int, ...]) -> None:
    module = make(**options, mask="causal")
    with torch.no_grad():
        cache = module.new_cache()
        found = torch.cat([module(part, cache=cache) for part in IDS.split(parts, dim=1)], dim=1)
        torch.testing.assert_close(found, module(IDS), atol=3e-5, rtol=1e-4)


@pytest.mark.parametrize("options", [*CACHED, *KERNELS], ids=name)
def test_a_cache_changes_nothing_for_prompts_padded_on_the_left(options: dict[str, Any]) -> None:
    """Prompts of 5, 4 and 1 tokens, and four tokens after each; every row equals that row alone without a cache."""
    module = make(**options, mask="causal")
    lengths = (5, 4, 1)
    real = torch.arange(5) >= 5 - torch.tensor(lengths)[:, None]
    positions = (real.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        cache = module.new_cache()
        found = [module(IDS[:, :5], real, positions=positions, cache=cache)]
        for step in range(4):
            place = (positions[:, -1:] + step + 1).clone()
            found.append(module(IDS[:, 5 + step, None], positions=place, cache=cache))
        for row, length in enumerate(lengths):
            alone = module(IDS[row : row + 1, 5 - length :])
            torch.testing.assert_close(torch.cat(found, 1)[row, None, 5 - length :], alone, atol=3e-5, rtol=1e-4)


@pytest.mark.parametrize("options", [*CACHED, BY_PLACE[1]], ids=name)
def test_a_cache_behind_a_prefix_changes_nothing(options: dict[str, Any]) -> None:
    """The first pass holds the prefix and the first token after it, then one by one."""
    module = make(**{**options, **PREFIX})
    segments = segments_of((4, 4, 4))
    with torch.no_grad():
        cache = module.new_cache()
        parts = zip(IDS.split((5, 1, 2, 1), 1), segments.split((5, 1, 2, 1), 1), strict=True)
        found = torch.cat([module(ids, segments=kinds, cache=cache) for ids, kinds in parts], dim=1)
        torch.testing.assert_close(found, module(IDS, segments=segments), **CLOSE)


def test_a_cache_keeps_rows_apart_when_they_change_places() -> None:
    module, order = make(mask="causal"), torch.tensor([2, 0, 0])
    with torch.no_grad():
        cache = module.new_cache()
        module(IDS[:, :6], REAL[:, :6].flip(1), cache=cache)
        cache.reorder(order)
        found = module(IDS[:, 6:], cache=cache)
        whole = torch.cat((IDS[order, :6], IDS[:, 6:]), 1)
        mask = torch.cat((REAL[order, :6].flip(1), torch.ones(3, 3, dtype=torch.bool)), 1)
        torch.testing.assert_close(found, module(whole, mask)[:, 6:], **CLOSE)


@pytest.mark.parametrize(
    ("options", "blocks"),
    [
        ({"sharing": "all"}, 1),
        ({"sharing": "all", "num_groups": 2}, 2),
        ({"sharing": "all", "num_groups": 2, "group_size": 2}, 4),
        ({"sharing": "attention", "num_groups": 2}, 4),
        ({"sharing": "feedforward"}, 4),
        ({"sharing": "feedforward", "group_size": 2}, 8),
    ],
    ids=str,
)
def test_shared_layers_are_the_unrolled_ones_with_summed_gradients(options: dict[str, Any], blocks: int) -> None:
    module = make(num_layers=4, **options)
    copied = unshared(module).double()
    module.double()
    depth = 4 * options.get("group_size", 1)
    assert (len(module.blocks()), len(copied.blocks())) == (blocks, depth)
    assert len({id(p) for p in copied.parameters()}) == sum(1 for _ in copied.parameters())
    found, expected = module(IDS, REAL), copied(IDS, REAL)
    assert torch.equal(found, expected)
    weight = torch.randn_like(found)
    (found * weight).sum().backward()
    (expected * weight).sum().backward()
    sums: dict[Tensor, Tensor] = {}
    for layer, index in enumerate(module.layers.order):
        unrolled = dict(copied.blocks()[layer].named_parameters())
        for key, parameter in module.blocks()[index].named_parameters(remove_duplicate=False):
            sums[parameter] = sums.get(parameter, torch.zeros_like(parameter)) + unrolled[key].grad
    for parameter, total in sums.items():
        torch.testing.assert_close(parameter.grad, total, **EXACT)
    assert {id(p) for p in sums} == {id(p) for p in module.blocks().parameters()}


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_counts_of_parameters() -> None:
    norm, attention, feedforward = 2 * 16, 4 * (16 * 16 + 16), 16 * 32 + 32 + 32 * 16 + 16
    block = attention + feedforward + 2 * norm
    ends = 30 * 16 + norm
    assert count(make()) == ends + 2 * block
    assert count(make(sharing="all")) == ends + block
    assert count(make(sharing="attention")) == ends + 2 * block - attention
    assert count(make(sharing="feedforward")) == ends + 2 * block - feedforward
    assert count(make(sharing="all", num_layers=6, num_groups=3, group_size=2)) == ends + 6 * block
    assert count(make(embedding_dim=4)) == ends + 2 * block - 30 * 12 + 4 * 16 + 16
    assert count(make(gated=True)) == ends + 2 * (block + 16 * 32 + 32)
    assert count(make(norm_kind="rms")) == ends + 2 * block - 5 * 16
    assert count(make(num_kv_heads=1)) == ends + 2 * (block - 2 * (8 * 16 + 8))
    assert count(make(attention_bias=False, feedforward_bias=False)) == ends + 2 * (block - 4 * 16 - 48)
    assert count(make(talking_heads="both")) == ends + 2 * (block + 8)
    assert count(make(positions="relative")) == ends + 2 * (block + 16 * 16) + 2 * 16
    assert count(make(positions="learned", num_segments=2)) == ends + 2 * block + (12 + 2) * 16


def test_factorised_embeddings_are_a_product() -> None:
    module = make(embedding_dim=4, positions="learned", num_segments=2, heads=("lm",))
    embedding, segments = module.embedding, segments_of((4, 9, 0))
    assert embedding.positions is not None
    assert embedding.segments is not None
    assert embedding.projection is not None
    assert module.token_head is not None
    assert module.token_head.layer is not None
    table = embedding.tokens.weight[IDS] + embedding.segments.weight[segments] + embedding.positions.weight[:9]
    found = module.hidden_states(IDS, None, segments)
    torch.testing.assert_close(found[0], table @ embedding.projection.weight.T + embedding.projection.bias)
    expected = found[-1] @ module.token_head.layer.weight.T @ embedding.tokens.weight.T
    torch.testing.assert_close(module.logits(found[-1]), expected)


def test_gated_network_and_root_mean_square_norm_are_the_formulas() -> None:
    config = small(gated=True, activation="silu", norm_kind="rms", norm_eps=0.1)
    torch.manual_seed(0)
    block, hidden = disturb(TransformerBlock(config)).double(), torch.randn(2, 5, 16, dtype=torch.float64)
    inner = hidden @ block.feedforward.inner.weight.T + block.feedforward.inner.bias
    gate, value = inner[..., :32], inner[..., 32:]
    expected = (gate * gate.sigmoid() * value) @ block.feedforward.outer.weight.T + block.feedforward.outer.bias
    torch.testing.assert_close(block.feedforward(hidden), expected, **EXACT)
    expected = hidden / (hidden.square().mean(-1, keepdim=True) + 0.1).sqrt() * block.attention_norm.weight
    torch.testing.assert_close(block.attention_norm(hidden), expected, **EXACT)


def test_gpt2_ml_block_is_its_formula() -> None:
    module = make(norm="gpt2_ml", mask="causal", positions="learned")
    hidden, context = torch.randn(2, 5, 16), Context(visibility("causal", 5, CPU))
    block: Any = module.blocks()[0]
    middle = hidden + block.attention(hidden, context)
    expected = block.output_norm(middle + block.feedforward(block.feedforward_norm(middle)))
    torch.testing.assert_close(block(hidden, context), expected)


def test_heads() -> None:
    module = make(heads=("pooler", "sentence", "masked_lm"), activation="relu")
    hidden = module(IDS)
    masked, pooler, sentence = module.masked_token_head, module.pooler, module.sentence_head
    assert masked is not None
    assert pooler is not None
    assert sentence is not None
    pooled = torch.tanh(hidden[:, 0] @ pooler.layer.weight.T + pooler.layer.bias)
    torch.testing.assert_close(module.pooled(hidden), pooled)
    torch.testing.assert_close(module.sentence_logits(hidden), pooled @ sentence.weight.T + sentence.bias)
    inner = F.layer_norm(masked.layer(hidden).relu(), (16,), masked.norm.weight, masked.norm.bias)
    expected = inner @ module.embedding.tokens.weight.T + masked.bias
    torch.testing.assert_close(module.logits(hidden), expected)
    some = hidden[REAL][:4]
    torch.testing.assert_close(module.logits(some), expected[REAL][:4])
    tied = make(heads=("lm",))
    torch.testing.assert_close(tied.logits(hidden), hidden @ tied.embedding.tokens.weight.T)
    assert count(tied) == count(make())


@pytest.mark.parametrize("options", [*EVERY_MASK, *BY_PLACE, *KERNELS], ids=name)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_finite_with_a_row_of_padding(options: dict[str, Any], dtype: torch.dtype) -> None:
    module = make(dtype, **options).train()
    mask = REAL & torch.tensor([[True], [True], [False]])
    found = module(IDS, mask)
    found[mask].float().square().mean().backward()
    assert found.dtype == dtype
    assert found.isfinite().all()
    assert all(p.grad.isfinite().all() for p in module.parameters() if p.grad is not None)


@pytest.mark.parametrize("options", [*EVERY_MASK, *BY_PLACE, *KERNELS], ids=name)
def test_every_parameter_is_trained(options: dict[str, Any]) -> None:
    module = make(**options).train()
    module(IDS, REAL)[REAL].square().sum().backward()
    assert [key for key, parameter in module.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("options", [{}, {"positions": "relative"}, {"attention_scale": "log_n"}], ids=name)
def test_autocast_keeps_positions_in_float32(options: dict[str, Any]) -> None:
    module = Transformer(small(dim=64, max_length=60, **options)).eval()
    ids = torch.randint(30, (2, 40))
    with torch.autocast("cpu", torch.bfloat16):
        half = module(ids)
    torch.testing.assert_close(half.float(), module(ids), atol=0.1, rtol=0.1)


@pytest.mark.parametrize(
    "options", [{"dropout": 0.3}, {"feedforward_dropout": 0.3}, {"attention_dropout": 0.3}], ids=name
)
def test_dropout_is_off_in_evaluation(options: dict[str, Any]) -> None:
    module = make(**{"attention_dropout": 0.0, **options})
    assert torch.equal(module(IDS), module(IDS))
    module.train()
    assert not torch.equal(module(IDS), module(IDS))


def test_order_matters_only_through_positions() -> None:
    order = torch.randperm(9)
    for positions in ("none", "rope", "learned", "sinusoidal", "relative"):
        module = make(positions=positions)
        same = torch.allclose(module(IDS[:, order]), module(IDS)[:, order], atol=1e-4)
        assert same == (positions == "none")


SOFTMAX = [{}, {"talking_heads": "both"}, {"positions": "relative"}, {"attention_scale": "log_n"}, {"num_kv_heads": 1}]


@pytest.mark.parametrize("options", SOFTMAX, ids=name)
@pytest.mark.parametrize("mask", ["full", "causal"])
def test_a_compiled_graph_is_equal(options: dict[str, Any], mask: str) -> None:
    """Forward and backward, with padding."""
    module = make(**options, mask=mask).train()
    compiled = torch.compile(module, backend="aot_eager")
    results = []
    for call in (module, compiled):
        module.zero_grad()
        found = call(IDS, REAL)
        found[REAL].square().sum().backward()
        results.append([found.detach(), *(p.grad.clone() for p in module.parameters() if p.grad is not None)])
    torch.testing.assert_close(results[1], results[0], **CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize("options", SOFTMAX, ids=name)
def test_compiled_code_is_equal(options: dict[str, Any]) -> None:
    module = make(**options, mask="causal")
    compiled = torch.compile(module)
    with torch.no_grad():
        torch.testing.assert_close(compiled(IDS, REAL), module(IDS, REAL), **CLOSE)
        torch.testing.assert_close(compiled(IDS[:, :7], REAL[:, :7]), module(IDS[:, :7], REAL[:, :7]), **CLOSE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"positions": "rotary"}, "use one of rope, learned, sinusoidal, relative, none"),
        ({"norm": "deep"}, "use one of pre, post, deepnorm, gpt2_ml"),
        ({"activation": "elu"}, "use one of gelu, gelu_tanh, relu, silu, tanh"),
        ({"attention": "flash"}, "use one of softmax, dense"),
        ({"heads": ("pooler", "nsp")}, r"heads='nsp'\): use one of pooler, masked_lm, lm, sentence"),
        ({"num_heads": 3}, "must divide dim"),
        ({"num_layers": 0}, r"num_layers=0\): use 1 or more"),
        ({"num_kv_heads": -1}, r"num_kv_heads=-1\): use 0 or more"),
        ({"dropout": 1.0}, "less than 1"),
        ({"attention_dropout": -0.1}, "0 or more and less than 1"),
        ({"feedforward_dropout": 1.5}, "0 or more and less than 1"),
        ({"dim": 16, "num_heads": 4, "num_kv_heads": 3}, "num_kv_heads must divide num_heads"),
        ({"talking_heads": "pre", "num_kv_heads": 1}, "leave num_kv_heads out"),
        ({"num_key_heads": 4}, "only with talking_heads='pre' or 'both'"),
        ({"talking_heads": "post", "num_key_heads": 4}, "only with talking_heads='pre' or 'both'"),
        ({"num_value_heads": 4}, "only with talking_heads='post' or 'both'"),
        ({"talking_heads": "pre", "num_value_heads": 4}, "only with talking_heads='post' or 'both'"),
        ({"attention": "elu", "talking_heads": "pre"}, "linear attention has no scores to mix"),
        ({"attention": "favor", "mask": "prefix"}, "use mask='full' or 'causal'"),
        ({"attention": "taylor", "positions": "relative"}, "linear attention has no scores to add to"),
        ({"attention": "dense"}, "synthetic scores have no queries and keys"),
        ({"attention": "random", "positions": "relative"}, "synthetic scores have no queries and keys"),
        ({"attention": "dense", "positions": "none", "attention_scale": "log_n"}, "use 'sqrt'"),
        ({"attention": "elu", "attention_scale": "log_n"}, "use 'sqrt'"),
        ({"attention": "dense", "positions": "none", "num_kv_heads": 1}, "synthetic scores have no keys to share"),
        ({"attention": "dense", "positions": "none", "num_decoder_layers": 2}, "use one stack"),
        ({"attention": "favor", "num_decoder_layers": 2}, "use attention='softmax' in an encoder-decoder"),
        ({"attention": "mixture", "positions": "none"}, "give at least two kinds"),
        ({"mixture": ("softmax", "dense")}, "give at least two kinds with attention='mixture', and none otherwise"),
        ({"attention": "mixture", "mixture": ("softmax",)}, "use two or more of softmax"),
        ({"attention": "mixture", "mixture": ("softmax", "elu")}, "use two or more of softmax"),
        ({"synthesizer_factors": (5, 2)}, r"give two factors of max_length, such as \(3, 4\)"),
        ({"kernel_degree": 3}, "an odd degree gives negative weights"),
        ({"key_size": 5}, "key_size must be even"),
        ({"dim": 15, "num_heads": 1, "positions": "sinusoidal"}, "dim must be even"),
        ({"dim": 15, "num_heads": 1, "positions": "relative"}, "dim must be even"),
        ({"embedding_dim": 5, "positions": "sinusoidal"}, "embedding_dim must be even"),
        ({"positions": "relative", "num_decoder_layers": 2}, "in an encoder-decoder"),
        ({"first_position": 2}, "needs positions='learned'"),
        ({"output_projection": False, "head_size": 5}, r"num_value_heads \* head_size must be dim"),
        ({"norm": "gpt2_ml", "num_decoder_layers": 2}, "no place for cross-attention"),
        ({"mask": "causal", "num_decoder_layers": 2}, "use mask='full'"),
        ({"sharing": "all", "num_layers": 4, "num_groups": 3}, "num_groups must divide num_layers"),
        ({"group_size": 2}, "groups need sharing="),
        ({"num_groups": 2}, "groups need sharing="),
        ({"sharing": "all", "num_decoder_layers": 2}, "groups are for a single stack"),
        ({"heads": ("sentence",)}, "'sentence' stands on 'pooler'"),
    ],
    ids=str,
)
def test_wrong_values_are_explained(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        small(**change)
    text = str(error.value)
    assert text.startswith("TransformerConfig(")
    assert "\n" not in text
    assert any(key in text for key in change)


def test_wrong_calls_are_explained() -> None:
    decoder = small(num_decoder_layers=2)
    causal, learned = make(mask="causal"), make(positions="learned")
    calls: list[tuple[Any, str]] = [
        (lambda: Transformer(decoder), "use EncoderDecoder"),
        (lambda: EncoderDecoder(small()), "use 1 or more, or Transformer"),
        (lambda: learned(torch.zeros(1, 13, dtype=torch.long)), r"13 tokens .*\(max_length=12\)"),
        (lambda: make().new_cache(), "a cache needs mask='causal' or 'prefix'"),
        (lambda: make(mask="causal", positions="relative").new_cache(), "generate with a Memory"),
        (lambda: causal(IDS, cache=causal.new_cache()), r"torch\.no_grad\(\) or inference_mode\(\)"),
        (lambda: causal(IDS, memory=Memory(4)), "a memory needs 'relative'"),
        (lambda: Memory(-1), "use 0 or more"),
        (lambda: causal(IDS, sequences=torch.ones_like(IDS)), "packed rows need positions="),
        (lambda: make(attention="elu")(IDS, sequences=IDS, positions=IDS), "use length buckets"),
        (lambda: make(**BY_PLACE[0])(IDS, sequences=IDS, positions=IDS), "use length buckets"),
        (lambda: causal.logits(causal(IDS)), "'masked_lm' or 'lm' gives scores of tokens"),
        (lambda: causal.pooled(causal(IDS)), "'pooler' gives a vector"),
        (lambda: causal.sentence_logits(causal(IDS)), "'sentence' gives scores"),
        (lambda: EncoderDecoder(decoder).logits(torch.zeros(1, 16)), "'lm' gives scores of tokens"),
    ]
    for call, message in calls:
        with pytest.raises(InputError, match=message):
            call()
    assert make()(torch.zeros(1, 13, dtype=torch.long)).shape == (1, 13, 16)
