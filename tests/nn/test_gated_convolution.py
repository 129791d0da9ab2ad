"""Gated convolutions, pooling and focal loss against their formulas; likely spans against a search over all."""

from itertools import product

import pytest
import torch
from torch import nn

from kexue.errors import InputError
from kexue.nn.decoding import likely_spans
from kexue.nn.gated_convolution import AttentionPooling, GatedBlock, GatedStack
from kexue.nn.losses.focal import focal_loss


def masked(rows: int = 3, length: int = 9, width: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    lengths = torch.tensor([length, length - 4, 1])
    return torch.randn(rows, length, width), torch.arange(length) < lengths[:, None]


def test_a_closed_gate_lets_pass_and_an_open_one_convolves() -> None:
    inputs, mask = masked()
    block = GatedBlock(4, dilation=2).eval()
    for bias, wanted in ((-1e4, inputs * mask[..., None]), (1e4, None)):
        with torch.no_grad():
            block.convolution.weight[4:] = 0
            block.convolution.bias[4:] = bias
        if wanted is None:
            plain = nn.Conv1d(4, 4, 3, padding=2, dilation=2)
            plain.load_state_dict({"weight": block.convolution.weight[:4], "bias": block.convolution.bias[:4]})
            wanted = plain((inputs * mask[..., None]).transpose(1, 2)).transpose(1, 2) * mask[..., None]
        torch.testing.assert_close(block(inputs, mask), wanted)


@pytest.mark.parametrize("project", [True, False])
def test_a_block_by_the_formula(project: bool) -> None:
    inputs, mask = masked()
    block = GatedBlock(4, 6, project=project).eval()
    clean = inputs * mask[..., None]
    found, logits = block.convolution(clean.transpose(1, 2)).transpose(1, 2).split(6, -1)
    gate = 1 / (1 + torch.exp(-logits))
    wanted = found * gate
    if project:
        assert block.projection is not None
        wanted = wanted + (clean @ block.projection.weight.T) * (1 - gate)
    torch.testing.assert_close(block(inputs, mask), wanted * mask[..., None])


@pytest.mark.parametrize("noise", ["dropout", "uniform"])
def test_the_gate_is_noisy_in_training_alone(noise: str) -> None:
    torch.manual_seed(0)
    block = GatedBlock(4, noise=noise, rate=0.25)
    logits = torch.full((200, 50, 4), 3.0)
    noisy = block._noisy(logits)
    assert noisy.mean() == pytest.approx(3.0, rel=0.02)
    if noise == "dropout":
        assert set(noisy.unique().tolist()) == {0.0, 4.0}
        assert (noisy == 0).float().mean() == pytest.approx(0.25, abs=0.02)
    else:
        assert 2.25 <= noisy.min() < 2.3
        assert 3.7 < noisy.max() <= 3.75
    assert block.eval()._noisy(logits) is logits


def test_padding_changes_nothing() -> None:
    inputs, mask = masked()
    stack = GatedStack(4, 6, dilations=(1, 2, 4)).eval()
    pooling = AttentionPooling(6).eval()
    more = torch.nn.functional.pad(inputs, (0, 0, 0, 5), value=7.0), torch.nn.functional.pad(mask, (0, 5))
    short, long = stack(inputs, mask), stack(*more)
    torch.testing.assert_close(long[:, :9], short)
    assert (long[:, 9:] == 0).all()
    torch.testing.assert_close(pooling(long, more[1]), pooling(short, mask))


def test_the_receptive_field_is_65() -> None:
    stack = GatedStack(2, dilations=(1, 2, 4, 8, 16, 1)).eval()
    inputs = torch.randn(1, 129, 2, requires_grad=True)
    stack(inputs, torch.ones(1, 129).bool())[0, 64].sum().backward()
    assert inputs.grad is not None
    seen = inputs.grad[0].abs().sum(-1).nonzero().flatten()
    assert (int(seen.min()), int(seen.max()), len(seen)) == (32, 96, 65)


def test_pooling_by_the_formula() -> None:
    inputs, mask = masked()
    pooling = AttentionPooling(4)
    mask[2] = False
    found = pooling(inputs, mask)
    for row in range(2):
        tokens = inputs[row][mask[row]]
        scores = torch.stack([pooling.score.weight[0] @ torch.tanh(pooling.layer.weight @ token) for token in tokens])
        weights = scores.exp() / scores.exp().sum()
        torch.testing.assert_close(found[row], (weights[:, None] * tokens).sum(0))
    assert found[2].tolist() == [0] * 4


def test_focal_loss_by_the_formula_and_as_half_of_cross_entropy() -> None:
    torch.manual_seed(0)
    p, targets, mask = torch.rand(5, 7).double(), (torch.rand(5, 7) < 0.4).double(), torch.rand(5, 7) < 0.7
    p[0, 0], p[0, 1], targets[0, :2], mask[0, :2] = 1.0, 0.0, torch.tensor([0.0, 1.0]), True
    clipped = p.clamp(1e-8, 1 - 1e-8)
    each = (
        -0.25 * targets * clipped.log() * (1 - clipped) ** 2 - 0.75 * (1 - targets) * (1 - clipped).log() * clipped**2
    )
    assert focal_loss(p.log(), targets, mask).item() == pytest.approx((each[mask].sum() / mask.sum()).item())
    entropy = nn.functional.binary_cross_entropy(clipped[mask], targets[mask])
    assert focal_loss(p.log(), targets, mask, gamma=0, alpha=0.5).item() == pytest.approx(entropy.item() / 2)


def test_focal_loss_is_finite_where_the_model_is_sure() -> None:
    logits = torch.tensor([-200.0, -20.0, 0.0, 20.0, 200.0], requires_grad=True)
    for target in (0.0, 1.0):
        loss = focal_loss(nn.functional.logsigmoid(logits), torch.full((5,), target), torch.ones(5).bool())
        loss.backward()
        assert logits.grad is not None
        assert loss.isfinite()
        assert logits.grad.isfinite().all()


@pytest.mark.parametrize("seed", range(5))
def test_likely_spans_are_those_of_a_search_over_all(seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    first, last = torch.rand(2, 3, 15, generator=random) ** 2
    places = torch.rand(3, 15, generator=random) < 0.8
    lengths = torch.where(torch.rand(3, 15, generator=random) < 0.4, 0.5, 1.0)
    for longest, weights in ((4, None), (3, lengths), (40, lengths)):
        parts = likely_spans(first, last, places, longest, 0.1, weights)
        found = list(zip(*(part.tolist() for part in parts), strict=True))
        wanted = [
            (row, i, j, float(first[row, i] * last[row, j]))
            for row, i, j in product(range(3), range(15), range(15))
            if i <= j
            and places[row, i]
            and places[row, j]
            and first[row, i] > 0.1
            and last[row, j] > 0.1
            and (j + 1 - i if weights is None else float(weights[row, i : j + 1].sum())) <= longest
        ]
        assert [span[:3] for span in found] == [span[:3] for span in wanted]
        assert [span[3] for span in found] == pytest.approx([span[3] for span in wanted])


@pytest.mark.parametrize("options", [{"kernel": 2}, {"dilation": 0}, {"noise": "none"}, {"rate": 1.0}])
def test_wrong_options_are_explained(options: dict) -> None:
    with pytest.raises(InputError, match=f"{next(iter(options))}={next(iter(options.values()))!r}"):
        GatedBlock(4, **options)
