"""Where the norm stands: what the layers of a pre- or post-norm stack add up to, and the constants of DeepNorm."""

import math
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kexue.nn.transformer import (
    Context,
    EncoderDecoder,
    ResidualConstants,
    Transformer,
    TransformerBlock,
    TransformerConfig,
    residual_constants,
    visibility,
)

CPU = torch.device("cpu")
EXACT: dict[str, Any] = {"atol": 1e-10, "rtol": 1e-10}


def config(norm: Any, layers: int = 12, **options: Any) -> TransformerConfig:
    sizes: dict[str, Any] = {"dim": 64, "num_heads": 4, "feedforward_dim": 128, "dropout": 0.0, "positions": "none"}
    return TransformerConfig(30, num_layers=layers, norm=norm, **{**sizes, "initialisation": "xavier", **options})


def make(norm: Any, layers: int, seed: int = 0, **options: Any) -> Any:
    torch.manual_seed(seed)
    return Transformer(config(norm, layers, **options))


def context(length: int) -> Context:
    return Context(visibility("full", length, CPU))


@pytest.mark.parametrize(
    ("options", "stack", "alpha", "beta"),
    [
        ({"layers": 12}, "encoder", 2.2134, 0.3195),
        ({"layers": 100}, "encoder", 3.7606, 0.1880),
        ({"layers": 1000}, "encoder", 6.6874, 0.1057),
        ({"layers": 12, "num_decoder_layers": 12}, "encoder", 0.81 * 12 ** (5 / 16), 0.87 * 12 ** (-5 / 16)),
        ({"layers": 12, "num_decoder_layers": 12}, "decoder", 36**0.25, 144**-0.25),
        (
            {"layers": 18, "num_decoder_layers": 6},
            "encoder",
            0.81 * (18**4 * 6) ** 0.0625,
            0.87 / (18**4 * 6) ** 0.0625,
        ),
        ({"layers": 18, "num_decoder_layers": 6}, "decoder", 18**0.25, 72**-0.25),
        ({"layers": 12, "deepnorm_constants": "sgd"}, "encoder", 24**0.25, 24**-0.25),
        ({"layers": 12, "deepnorm_constants": "adam"}, "encoder", 24**0.5, 24**-0.5),
        ({"layers": 12, "deepnorm_constants": "lamb"}, "encoder", 1.0, 24**-0.5),
        ({"layers": 12, "num_decoder_layers": 4, "deepnorm_constants": "adam"}, "decoder", 12**0.5, 12**-0.5),
        ({"layers": 6, "sharing": "all", "group_size": 2}, "encoder", 2.2134, 0.3195),
    ],
    ids=str,
)
def test_constants(options: dict[str, Any], stack: Any, alpha: float, beta: float) -> None:
    assert residual_constants(config("deepnorm", **options), stack) == pytest.approx((alpha, beta), abs=5e-5)


@pytest.mark.parametrize("norm", ["pre", "post", "gpt2_ml"])
def test_other_norms_have_no_constants(norm: Any) -> None:
    assert residual_constants(config(norm)) == (1.0, 1.0)


def assert_gains(block: Any, beta: float) -> None:
    """Deviation of each part is gain * sqrt(2 / (inputs + outputs)), within 2 %; biases 0; norms 1 and 0."""
    attention, cross, feedforward = block.attention, block.cross_attention, block.feedforward
    parts = list(zip(attention.projection.weight.split(attention.widths), (1.0, 1.0, beta), strict=True))
    parts += [(attention.output.weight, beta), (feedforward.outer.weight, beta)]
    parts += [(half, beta) for half in feedforward.inner.weight.split(block.feedforward.inner.parts)]
    if cross is not None:
        assert cross.query is not None
        parts += [(cross.query.weight, 1.0), (cross.output.weight, beta)]
        parts += zip(cross.projection.weight.split(cross.widths), (1.0, beta), strict=True)
    for weight, gain in parts:
        rows, columns = weight.shape
        assert weight.std().item() == pytest.approx(gain * math.sqrt(2 / (rows + columns)), rel=0.02)
        assert abs(weight.mean().item()) < 0.02 * weight.std().item() * math.sqrt(40000 / weight.numel())
    for name, parameter in block.named_parameters():
        if parameter.dim() == 1:
            assert parameter.eq(float("norm" in name and name.endswith("weight"))).all()


WIDE: dict[str, Any] = {"dim": 256, "feedforward_dim": 512}


@pytest.mark.parametrize(
    "options",
    [{}, {"num_kv_heads": 2}, {"gated": True}, {"deepnorm_constants": "adam"}, {"key_size": 96, "head_size": 48}],
    ids=str,
)
def test_deepnorm_starts_with_its_gains(options: dict[str, Any]) -> None:
    """Also those parts that are computed in one product, and also when drawn again."""
    module = make("deepnorm", 12, **WIDE, **{"initialisation": "normal", **options})
    beta = residual_constants(module.config).beta
    assert beta < 0.35
    assert_gains(module.layers.blocks[3], beta)
    for part in module.modules():
        if isinstance(part, nn.Linear):
            part.reset_parameters()
    assert_gains(module.layers.blocks[11], beta)


def test_both_stacks_of_an_encoder_decoder_have_their_own_gains() -> None:
    torch.manual_seed(0)
    module = EncoderDecoder(config("deepnorm", 3, num_decoder_layers=2, **WIDE))
    for stack, layers in (("encoder", module.encoder), ("decoder", module.decoder)):
        constants = residual_constants(module.config, stack)
        assert_gains(layers.blocks[1], constants.beta)
        assert all(block.alpha == constants.alpha for block in layers.blocks)


def test_without_deepnorm_all_gains_are_one() -> None:
    assert_gains(make("post", 2, **WIDE).layers.blocks[0], 1.0)


@pytest.mark.parametrize("cross", [False, True])
def test_constants_of_one_are_post_norm_bit_for_bit(cross: bool) -> None:
    blocks = []
    for norm in ("deepnorm", "post"):
        torch.manual_seed(0)
        blocks.append(TransformerBlock(config(norm), ResidualConstants(1.0, 1.0), cross))
    hidden, source = torch.randn(2, 5, 64), torch.randn(2, 7, 64)
    deep, post = (block(hidden, context(5), source=source if cross else None) for block in blocks)
    assert torch.equal(deep, post)


@pytest.mark.parametrize("cross", [False, True])
def test_deepnorm_block_is_its_formula(cross: bool) -> None:
    """torchscale's layer: x <- LN(F(x) + alpha * x) for every branch, that to a source included."""
    torch.manual_seed(0)
    block = TransformerBlock(config("deepnorm", activation="relu"), ResidualConstants(2.5, 0.3), cross)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3)
    hidden, source = torch.randn(2, 5, 64), torch.randn(2, 7, 64)
    peer = nn.MultiheadAttention(64, 4, batch_first=True)
    peer.load_state_dict(
        {f"in_proj_{name}": value for name, value in block.attention.projection.state_dict().items()}
        | {f"out_proj.{name}": value for name, value in block.attention.output.state_dict().items()}
    )
    expected = block.attention_norm(peer(hidden, hidden, hidden)[0] + 2.5 * hidden)
    if block.cross_attention is not None and block.cross_norm is not None:
        branch = block.cross_attention(expected, context(5), source=source)
        expected = block.cross_norm(branch + 2.5 * expected)
    inner, outer = block.feedforward.inner, block.feedforward.outer
    branch = F.linear(F.linear(expected, inner.weight, inner.bias).relu(), outer.weight, outer.bias)
    expected = block.feedforward_norm(branch + 2.5 * expected)
    found = block(hidden, context(5), source=source if cross else None)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_alpha_may_be_folded_into_the_branches() -> None:
    """LN(alpha x + F) = LN(x + F / alpha), but for epsilon."""
    torch.manual_seed(0)
    deep = TransformerBlock(config("deepnorm", norm_eps=1e-12), ResidualConstants(3.0, 1.0))
    post = TransformerBlock(config("post", norm_eps=1e-12))
    post.load_state_dict(deep.state_dict())
    with torch.no_grad():
        for branch in (post.attention.output, post.feedforward.outer):
            branch.weight /= 3.0
    hidden = torch.randn(2, 5, 64)
    torch.testing.assert_close(post(hidden, context(5)), deep(hidden, context(5)), atol=1e-5, rtol=1e-5)


def recorded(module: Transformer) -> list[Tensor]:
    """The outputs of all branches of the next pass, in order."""
    outputs: list[Tensor] = []
    for block in module.blocks():
        for branch in (block.attention, block.feedforward):
            branch.register_forward_hook(lambda *call: outputs.append(call[-1]))
    return outputs


def test_a_pre_norm_stack_is_the_sum_of_its_branches() -> None:
    module = make("pre", 6)
    branches = recorded(module)
    states = module.hidden_states(torch.randint(30, (2, 7)))
    assert len(branches) == 12
    assert module.layers.norm is not None
    total = states[0] + torch.stack(branches).sum(0)
    torch.testing.assert_close(states[-1], module.layers.norm(total), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(states[3] - states[0], torch.stack(branches[:6]).sum(0), atol=1e-6, rtol=1e-6)


class Noise(nn.Module):
    """A branch of independent normal numbers, those of a layer with whitened output."""

    def __init__(self) -> None:
        super().__init__()
        self.drawn = torch.empty(0)

    def forward(self, hidden: Tensor, *_: Any) -> Tensor:
        self.drawn = torch.randn_like(hidden)
        return self.drawn


def noisy(norm: Any, blocks: int) -> Transformer:
    module = make(norm, blocks, init_std=1.0)
    for block in module.blocks():
        block.attention, block.feedforward = Noise(), Noise()
    return module.double()


def test_a_post_norm_stack_forgets_its_first_layers() -> None:
    """Weights of input and branches in the output, by regression: 2^(-l/2), and 2^(-(l-s)/2) of branch s of l."""
    module = noisy("post", 4)
    states = module.hidden_states(torch.randint(30, (64, 50)))
    drawn = [branch.drawn for block in module.blocks() for branch in (block.attention, block.feedforward)]
    terms = torch.stack([states[0], *drawn], dim=-1).flatten(0, 2)
    weights = torch.linalg.lstsq(terms, states[-1].flatten()[:, None]).solution[:, 0]
    expected = [2**-4.0] + [2 ** (-(8 - s) / 2) for s in range(8)]
    assert weights.tolist() == pytest.approx(expected, rel=0.1)


def test_the_skip_of_deepnorm_is_kept() -> None:
    """With branches of size beta^2 and weight alpha of the stream, the paper's constants keep most of the input."""
    similarities = {}
    for norm in ("post", "deepnorm"):
        module = make(norm, 96)
        states = module.hidden_states(torch.randint(30, (4, 20)))
        similarities[norm] = F.cosine_similarity(states[0], states[-1], dim=-1).mean().item()
    assert similarities["deepnorm"] > 0.98
    assert similarities["post"] < 0.3


class Zero(nn.Module):
    """A branch that adds nothing."""

    def forward(self, hidden: Tensor, *_: Any) -> Tensor:
        return torch.zeros_like(hidden)


def states_of_networks(norm: Any, layers: int = 64) -> list[Tensor]:
    """The input and what each of many random position-wise networks leaves."""
    module = make(norm, layers, dim=128, feedforward_dim=512, init_std=1.0)
    module.layers.norm = None
    for block in module.blocks():
        block.attention = Zero()
    with torch.no_grad():
        return module.hidden_states(torch.randint(30, (4, 16)))


def test_the_stream_of_pre_norm_grows_with_the_number_of_layers() -> None:
    """Squared norm less that of the input, by layer: slope 1 in log-log. Post-norm: the same size everywhere."""
    sizes = [state.square().mean().item() for state in states_of_networks("pre")]
    layers = torch.arange(4, 65).double()
    growth = torch.tensor([sizes[layer] - sizes[0] for layer in range(4, 65)]).double()
    design = torch.stack((layers.log(), torch.ones_like(layers)), dim=1)
    slope = torch.linalg.lstsq(design, growth.log()[:, None]).solution[0].item()
    assert 0.9 < slope < 1.1
    assert all(state.square().mean().item() == pytest.approx(1.0, abs=0.01) for state in states_of_networks("post")[1:])


def test_late_layers_of_pre_norm_change_little() -> None:
    """Cosine of the normalised input and output of a block: tends to 1 in pre-norm, stays in post-norm."""

    def cosines(norm: Any) -> list[float]:
        states = [F.layer_norm(state, (128,)) for state in states_of_networks(norm)]
        return [F.cosine_similarity(a, b, dim=-1).mean().item() for a, b in pairwise(states)]

    pre, post = cosines("pre"), cosines("post")
    steps = [pre[layer] for layer in (0, 2, 6, 14, 30, 62)]
    assert steps == sorted(steps)
    assert pre[0] < 0.9
    assert pre[62] > 0.98
    assert 0.85 < min(post) < max(post) < 0.95


def change_by_merging(norm: Any, layers: int) -> float:
    """Relative change of the output when the last two position-wise networks become one of double width."""
    module = make(norm, layers, init_std=1.0)
    for block in module.blocks():
        block.attention = Zero()
    *_, before_last, last = module.blocks()
    ids = torch.randint(30, (4, 16))
    with torch.no_grad():
        expected = module(ids)
        inners, outers = zip(*((b.feedforward.inner, b.feedforward.outer) for b in (before_last, last)), strict=True)
        feedforward: Any = before_last.feedforward
        feedforward.inner = nn.Linear(64, 256)
        feedforward.outer = nn.Linear(256, 64)
        feedforward.inner.weight.copy_(torch.cat([part.weight for part in inners]))
        feedforward.inner.bias.copy_(torch.cat([part.bias for part in inners]))
        feedforward.outer.weight.copy_(torch.cat([part.weight for part in outers], dim=1))
        feedforward.outer.bias.copy_(outers[0].bias + outers[1].bias)
        last.feedforward = Zero()
        return ((module(ids) - expected).norm() / expected.norm()).item()


def test_two_late_layers_of_pre_norm_are_one_of_double_width() -> None:
    """The article's point: depth adds width there, and does not in post-norm."""
    pre, post = ([change_by_merging(norm, layers) for layers in (4, 16, 64)] for norm in ("pre", "post"))
    assert pre[0] > 1.5 * pre[1] > 2.25 * pre[2]
    assert post[2] > 0.8 * post[0]
    assert post[2] > 3 * pre[2]


def gradients(norm: Any, layers: int, **options: Any) -> list[float]:
    """Norm of the gradient of all matrices of each block, for a random linear function of the output."""
    module = make(norm, layers, **options)
    out = module(torch.randint(30, (4, 16)))
    (out * torch.randn_like(out)).mean().backward()
    squares = ([p.grad.square().sum() for p in block.parameters() if p.dim() == 2] for block in module.blocks())
    return [torch.stack(parts).sum().sqrt().item() for parts in squares]


def test_gradients_of_pre_norm_are_largest_at_the_bottom() -> None:
    for seed in range(3):
        torch.manual_seed(seed)
        of_layers = gradients("pre", 24, seed=seed)
        assert of_layers[0] > 2 * of_layers[-1]


def test_the_gradient_of_deepnorm_is_bounded_at_any_depth() -> None:
    """All matrices together: with the constants for SGD its size does not depend on depth."""
    totals = {
        name: [math.hypot(*gradients(norm, layers, **options)) for layers in (6, 24, 96)]
        for name, norm, options in (
            ("pre", "pre", {}),
            ("post", "post", {}),
            ("paper", "deepnorm", {}),
            ("sgd", "deepnorm", {"deepnorm_constants": "sgd"}),
        )
    }
    for name in ("paper", "sgd"):
        assert max(totals[name]) < 1.3 * min(totals[name])
    assert totals["pre"][2] > 3 * totals["paper"][2]


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    """benchmarks/deepnorm_depth.py, which runs the same at 1000 layers."""
    folder = Path(__file__).parents[2] / "benchmarks"
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "deepnorm_depth", raising=False)
    import deepnorm_depth  # type: ignore[import-not-found]

    return deepnorm_depth


def test_one_step_of_adam_moves_the_output_as_far_at_any_depth(benchmark: Any) -> None:
    """In matrices: constant with the constants for Adam, the root of the depth with the paper's."""
    ids = benchmark.stream()

    def sizes(kind: str, weights: str) -> list[float]:
        return [benchmark.update_size(kind, layers, ids, 0, weights) for layers in (6, 24, 96)]

    adam, paper, pre = (sizes(kind, "matrices") for kind in ("deepnorm (adam)", "deepnorm (paper)", "pre"))
    assert max(adam) < 1.15 * min(adam)
    assert [paper[1] / paper[0], paper[2] / paper[1]] == pytest.approx([2.0, 2.0], rel=0.15)
    assert pre[2] > 8 * paper[2] > 50 * adam[2]
    everything = sizes("deepnorm (paper)", "all")
    assert everything[2] < 20 * everything[0]


@pytest.mark.slow
def test_200_layers_train_with_deepnorm_where_post_norm_stalls(benchmark: Any) -> None:
    """60 steps of Adam without warmup, mean of the last 10: seed 0; 1000 layers are in the benchmark."""
    ids = benchmark.stream()
    single, _ = benchmark.entropies(ids)
    deep, post = (sum(benchmark.losses(kind, 200, ids, 60)[-10:]) / 10 for kind in ("deepnorm (paper)", "post"))
    assert post > single - 0.05
    assert deep < single - 0.4
