"""The encoder against PyTorch's own layer, and what padding, positions and precision may not change."""

import dataclasses

import pytest
import torch
from torch import nn

from kexue.errors import InputError
from kexue.nn.transformer import Encoder, TransformerBlock, TransformerConfig, attention_mask, sinusoids

SMALL = TransformerConfig(vocab_size=30, dim=16, num_layers=2, num_heads=2, feedforward_dim=32, max_length=12)


def reference_layer(block: TransformerBlock, config: TransformerConfig) -> nn.TransformerEncoderLayer:
    """PyTorch's layer with the weights of the block."""
    layer = nn.TransformerEncoderLayer(
        config.dim,
        config.num_heads,
        config.feedforward_dim,
        config.dropout,
        config.activation,
        batch_first=True,
        norm_first=config.norm == "pre",
    )
    names = {
        "self_attn.in_proj_": "attention.projection.",
        "self_attn.out_proj.": "attention.output.",
        "linear1.": "feedforward.inner.",
        "linear2.": "feedforward.outer.",
        "norm1.": "attention_norm.",
        "norm2.": "feedforward_norm.",
    }
    ours = block.state_dict()
    layer.load_state_dict(
        {there + end: ours[here + end] for there, here in names.items() for end in ("weight", "bias")}, strict=True
    )
    return layer.eval()


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_block_equals_pytorch(norm: str, activation: str) -> None:
    config = dataclasses.replace(SMALL, norm=norm, activation=activation)
    torch.manual_seed(0)
    block = TransformerBlock(config).eval()
    hidden, mask = torch.randn(3, 7, 16), torch.arange(7) < torch.tensor([[7], [4], [1]])
    expected = reference_layer(block, config)(hidden, src_key_padding_mask=~mask)
    found = block(hidden, mask=attention_mask(mask))
    torch.testing.assert_close(found[mask], expected[mask], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("positions", ["learned", "sinusoidal"])
def test_encoder_is_embedding_positions_blocks_and_norm(norm: str, positions: str) -> None:
    config = dataclasses.replace(SMALL, norm=norm, positions=positions)
    torch.manual_seed(0)
    encoder = Encoder(config).eval()
    ids = torch.randint(30, (2, 9))
    if positions == "learned":
        hidden = encoder.embedding.weight[ids] + encoder.positions.weight[:9]
    else:
        hidden = encoder.embedding.weight[ids] * 4 + sinusoids(9, 16)
    if norm == "post":
        hidden = encoder.norm(hidden)
    for block in encoder.layers:
        hidden = reference_layer(block, config)(hidden)
    expected = encoder.norm(hidden) if norm == "pre" else hidden
    torch.testing.assert_close(encoder(ids), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("positions", ["rope", "learned", "sinusoidal"])
@pytest.mark.parametrize("norm", ["pre", "post"])
def test_padding_changes_nothing(positions: str, norm: str) -> None:
    torch.manual_seed(0)
    encoder = Encoder(dataclasses.replace(SMALL, positions=positions, norm=norm)).eval()
    ids = torch.randint(30, (1, 7))
    padded = torch.cat((ids, torch.zeros(1, 5, dtype=torch.long)), 1)
    found = encoder(padded, torch.arange(12)[None] < 7)
    torch.testing.assert_close(found[:, :7], encoder(ids), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_row_of_padding_is_finite(dtype: torch.dtype) -> None:
    encoder = Encoder(SMALL).to(dtype).eval()
    mask = torch.tensor([[True] * 6, [False] * 6])
    output = encoder(torch.randint(30, (2, 6)), mask)
    output[0].float().sum().backward()
    assert output.dtype == dtype
    assert torch.isfinite(output).all()
    assert all(torch.isfinite(p.grad).all() for p in encoder.parameters() if p.grad is not None)


def test_autocast_keeps_positions_in_float32() -> None:
    encoder = Encoder(dataclasses.replace(SMALL, dim=64)).eval()
    ids = torch.randint(30, (2, 40))
    with torch.autocast("cpu", torch.bfloat16):
        half = encoder(ids)
    torch.testing.assert_close(half.float(), encoder(ids), atol=0.1, rtol=0.1)


def test_order_matters_only_through_positions() -> None:
    """Without positions a permuted sentence gives the permuted output; with them it does not."""
    torch.manual_seed(0)
    block = TransformerBlock(SMALL).eval()
    hidden, order = torch.randn(1, 6, 16), torch.randperm(6)
    torch.testing.assert_close(block(hidden[:, order]), block(hidden)[:, order], atol=1e-5, rtol=1e-5)
    encoder = Encoder(SMALL).eval()
    ids = torch.arange(6)[None]
    assert not torch.allclose(encoder(ids[:, order]), encoder(ids)[:, order], atol=1e-3)


def test_every_parameter_is_trained() -> None:
    encoder = Encoder(dataclasses.replace(SMALL, positions="learned"))
    encoder(torch.randint(30, (2, 12))).square().sum().backward()
    assert [name for name, p in encoder.named_parameters() if p.grad is None] == []


def test_dropout_is_off_in_evaluation() -> None:
    encoder = Encoder(SMALL)
    ids = torch.randint(30, (1, 8))
    assert not torch.equal(encoder(ids), encoder(ids))
    encoder.eval()
    assert torch.equal(encoder(ids), encoder(ids))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"positions": "rotary"}, "rope, learned, sinusoidal"),
        ({"norm": "deep"}, "pre, post"),
        ({"activation": "tanh"}, "gelu, relu, silu"),
        ({"num_heads": 3}, "must divide dim"),
        ({"dim": 6, "num_heads": 2}, "must be even, not 3"),
        ({"dropout": 1.0}, "less than 1"),
        ({"num_layers": 0}, "num_layers=0"),
        ({"dim": 15, "num_heads": 1, "positions": "sinusoidal"}, "dim must be even"),
    ],
)
def test_wrong_values_are_explained(change: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        dataclasses.replace(SMALL, **change)


def test_too_long_an_input_is_explained() -> None:
    encoder = Encoder(dataclasses.replace(SMALL, positions="learned"))
    with pytest.raises(InputError, match=r"13 tokens .*\(max_length=12\)"):
        encoder(torch.zeros(1, 13, dtype=torch.long))
    assert Encoder(SMALL)(torch.zeros(1, 13, dtype=torch.long)).shape == (1, 13, 16)
