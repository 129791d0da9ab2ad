"""Parts of two-stage models: conditional layer norm, power of the sigmoid, nearest ends, the encoder's last norm."""

import pytest
import torch
from torch import nn

from kexue.errors import InputError
from kexue.nn.decoding import pair_nearest
from kexue.nn.heads import ConditionalLayerNorm
from kexue.nn.losses import power_binary_cross_entropy, power_sigmoid
from kexue.nn.transformer import Transformer, TransformerConfig, take_last_norm


def test_an_untrained_conditional_norm_is_a_layer_norm() -> None:
    torch.manual_seed(0)
    norm, plain = ConditionalLayerNorm(8, 5, eps=1e-6), nn.LayerNorm(8, eps=1e-6)
    hidden = torch.randn(3, 4, 8)
    assert torch.equal(norm(hidden, 100 * torch.randn(3, 5)), plain(hidden))


def test_a_trained_conditional_norm_is_the_formula() -> None:
    torch.manual_seed(0)
    norm = ConditionalLayerNorm(8, 5, eps=1e-6).double()
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    hidden, condition = torch.randn(3, 4, 8, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    found = norm(hidden, condition)
    for row in range(3):
        weight = norm.weight + norm.to_weight.weight @ condition[row]
        bias = norm.bias + norm.to_bias.weight @ condition[row]
        for place in range(4):
            vector = hidden[row, place]
            normal = (vector - vector.mean()) / torch.sqrt(vector.var(correction=0) + 1e-6)
            torch.testing.assert_close(found[row, place], weight * normal + bias)


def test_the_condition_gets_a_gradient_after_one_step() -> None:
    torch.manual_seed(0)
    norm = ConditionalLayerNorm(8, 5)
    optimizer = torch.optim.SGD(norm.parameters(), lr=0.1)
    condition = torch.randn(3, 5, requires_grad=True)
    gradients = []
    for _ in range(2):
        condition.grad = None
        norm(torch.randn(3, 4, 8), condition).pow(3).sum().backward()
        gradients.append(condition.grad.abs().max().item())
        optimizer.step()
    assert gradients[0] == 0
    assert gradients[1] > 0


@pytest.mark.parametrize("power", [1, 2, 4])
def test_power_loss_is_the_formula(power: int) -> None:
    logits = torch.linspace(-20, 20, 81, dtype=torch.float64)
    p = torch.sigmoid(logits) ** power
    # 1 - p loses its digits near 1; from 1 - sigmoid(x) = sigmoid(-x) it follows in full.
    rest = sum(torch.sigmoid(-logits) * torch.sigmoid(logits) ** n for n in range(power))
    for target in (0.0, 0.3, 1.0):
        expected = -(target * p.log() + (1 - target) * rest.log())
        targets = torch.full_like(logits, target)
        torch.testing.assert_close(power_binary_cross_entropy(logits, targets, power), expected, atol=1e-12, rtol=1e-10)
    assert torch.equal(power_sigmoid(logits, power), p)


def test_power_1_is_the_usual_loss() -> None:
    torch.manual_seed(0)
    logits, targets = 10 * torch.randn(50), torch.rand(50)
    usual = nn.functional.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    torch.testing.assert_close(power_binary_cross_entropy(logits, targets, 1), usual)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_power_loss_is_finite_with_finite_gradients(dtype: torch.dtype) -> None:
    logits = torch.tensor([-1e3, -90, -30, 0, 18, 29.5, 30.5, 90, 1e3], dtype=dtype, requires_grad=True)
    for target in (0.0, 1.0):
        loss = power_binary_cross_entropy(logits, torch.full(logits.shape, target), 4)
        (gradient,) = torch.autograd.grad(loss.sum(), logits)
        assert torch.isfinite(loss).all()
        assert torch.isfinite(gradient).all()
        assert (loss >= 0).all() or target == 0
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert power_binary_cross_entropy(torch.tensor([1e3]), torch.tensor([0.0]), 4).item() == pytest.approx(
        1e3, rel=1e-2
    )


def test_power_loss_gradients_match_finite_differences() -> None:
    logits = torch.linspace(-25, 35, 13, dtype=torch.float64, requires_grad=True)
    targets = torch.linspace(0, 1, 13, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: power_binary_cross_entropy(x, targets, 4), logits)
    with pytest.raises(InputError, match=r"power=0.5\): use 1 or more"):
        power_binary_cross_entropy(logits, targets, 0.5)


def test_each_start_takes_the_nearest_end() -> None:
    starts = torch.tensor([[1, 0, 1, 0, 0, 1], [0, 0, 0, 0, 0, 0]], dtype=torch.bool)
    ends = torch.tensor([[0, 1, 0, 1, 1, 0], [1, 1, 1, 1, 1, 1]], dtype=torch.bool)
    assert pair_nearest(starts, ends).tolist() == [[0, 0, 0, 1], [0, 0, 2, 3]]
    both = torch.stack((ends, starts), -1), torch.stack((starts, ends), -1)
    found = pair_nearest(*both).tolist()
    assert [row[:1] + row[2:] for row in found if row[1] == 1] == [[0, 0, 1], [0, 2, 3]]
    assert [row for row in found if row[0] == 0 and row[1] == 0] == [[0, 0, 1, 2], [0, 0, 3, 5], [0, 0, 4, 5]]


@pytest.mark.parametrize("norm", ["pre", "post", "deepnorm"])
def test_the_last_norm_taken_out_gives_what_it_gave(norm: str) -> None:
    torch.manual_seed(0)
    sizes = {"dim": 8, "num_layers": 2, "num_heads": 2, "feedforward_dim": 16}
    module = Transformer(TransformerConfig(20, **sizes, norm=norm)).eval()
    ids = torch.randint(20, (2, 5))
    with torch.no_grad():
        before = module(ids)
        last = take_last_norm(module)
        assert not torch.equal(module(ids), before)
        assert torch.equal(last(module(ids)), before)


@pytest.mark.parametrize("options", [{"norm": "gpt2_ml"}, {"norm": "post", "sharing": "all"}])
def test_a_last_norm_that_cannot_be_taken_out_is_explained(options: dict) -> None:
    config = TransformerConfig(20, dim=8, num_layers=2, num_heads=2, feedforward_dim=16, **options)
    with pytest.raises(InputError, match=r"take_last_norm: .*use norm='pre' or 'post'"):
        take_last_norm(Transformer(config))
