"""Policies of recomputation: each gives the numbers of plain training, bit for bit, and costs what it says."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from kexue.errors import InputError
from kexue.nn.transformer import Transformer, TransformerConfig
from kexue.strategies import (
    ActivationCheckpointing,
    Full,
    Offload,
    Selective,
    cheapest,
    checkpoint_blocks,
    follow_plan,
    measured_costs,
    restore_blocks,
)
from kexue.strategies.recompute_policies import to_device, to_host
from kexue.strategies.recompute_regions import Region

POLICIES = {
    "full": Full(),
    "products": Selective("products"),
    "narrow": Selective("narrow"),
    "named": Selective(("addmm", "gelu")),
    "offload": Offload(),
    "budget": None,
}
KINDS = ("plain", "shared", "batch_norm", "frozen", "nested", "in_place")


class Inner(nn.Module):
    """A module of a block that recomputes itself with torch's own function."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(dim, dim), nn.Dropout(0.2), nn.Linear(dim, dim), nn.Tanh())

    def forward(self, x: Tensor) -> Any:
        return checkpoint(self.net, x, use_reentrant=False)


class Block(nn.Module):
    """Norm, attention, a wide layer; dropout after the last product; a tuple out, a None and keyword arguments in."""

    def __init__(self, dim: int, kind: str = "plain") -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(8) if kind == "batch_norm" else nn.LayerNorm(dim)
        self.mixed, self.up, self.down = nn.Linear(dim, 3 * dim), nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.inner = Inner(dim) if kind == "nested" else nn.Identity()
        self.activation = nn.ReLU(inplace=True) if kind == "in_place" else nn.GELU()
        self.dropout = nn.Dropout(0.3)
        self.calls = 0

    def forward(
        self, x: Tensor, bias: Tensor | None, *, scale: float = 1.0, mask: Tensor | None = None
    ) -> tuple[Tensor, None, int]:
        self.calls += 1
        query, key, value = (part.unsqueeze(1) for part in self.mixed(self.norm(x)).chunk(3, -1))
        if mask is not None:
            value = value * mask
        x = x + nn.functional.scaled_dot_product_attention(query, key, value, dropout_p=self.dropout.p / 3).squeeze(1)
        hidden = self.dropout(self.activation(self.up(x)))
        return x + scale * self.dropout(self.inner(self.down(hidden))), None, 7


class Net(nn.Module):
    def __init__(self, kind: str = "plain", depth: int = 3) -> None:
        super().__init__()
        self.embed = nn.Linear(16, 16).requires_grad_(kind != "frozen")
        self.layers = nn.ModuleList(Block(16, kind) for _ in range(1 if kind == "shared" else depth))
        self.depth = depth

    def blocks(self) -> list[nn.Module]:
        return list(self.layers)

    def forward(self, x: Tensor) -> Tensor:
        x, mask = self.embed(x), torch.ones(16)
        for i in range(self.depth):
            x, nothing, seven = self.layers[i % len(self.layers)](x, None, scale=0.5, mask=mask)
            assert (nothing, seven) == (None, 7)
        return x


def apply(net: Any, policy: str, share: float = 0.5) -> None:
    """Checkpoint the blocks of a net; for a budget, after measuring a step."""
    blocks = list(net.blocks())
    if POLICIES[policy] is not None:
        checkpoint_blocks(blocks, POLICIES[policy])
        return
    trial = copy.deepcopy(net)
    costs = measured_costs(list(trial.blocks()), trial, lambda: step(trial))
    checkpoint_blocks(blocks)
    follow_plan(blocks, cheapest(costs, int(share * costs.plain_bytes)))


def pair(kind: str, policy: str) -> tuple[Net, Net]:
    torch.manual_seed(0)
    plain = Net(kind)
    recomputed = copy.deepcopy(plain)
    apply(recomputed, policy)
    return plain, recomputed


def step(net: nn.Module, dtype: torch.dtype | None = None, backward: Callable[[Tensor], None] = Tensor.backward) -> Any:
    torch.manual_seed(5)
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        hidden = net(torch.randn(4, 8, 16))
    backward(hidden.float().square().mean())
    return {
        "output": hidden.detach(),
        "gradients": [p.grad.clone() for p in net.parameters() if p.grad is not None],
        "buffers": [buffer.clone() for buffer in net.buffers()],
        "noise": [torch.rand(3)],  # the stream of random numbers goes on where it would have
    }


def assert_equal(a: dict[str, Any], b: dict[str, Any]) -> None:
    for name in a:
        assert len(a[name]) == len(b[name]) > 0 or name == "buffers"
        assert all(torch.equal(x, y) for x, y in zip(a[name], b[name], strict=True)), name


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["float32", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("policy", POLICIES)
def test_equal_to_plain_training(policy: str, kind: str, dtype: torch.dtype | None) -> None:
    """Two steps whose gradients add up."""
    plain, recomputed = pair(kind, policy)
    for _ in range(2):
        assert_equal(step(plain, dtype), step(recomputed, dtype))


@pytest.mark.parametrize("kind", ["plain", "shared", "batch_norm", "nested"])
@pytest.mark.parametrize("policy", POLICIES)
def test_two_backward_passes_through_one_forward_pass(policy: str, kind: str) -> None:
    def twice(loss: Tensor) -> None:
        (2 * loss).backward(retain_graph=True)
        loss.sqrt().backward()

    plain, recomputed = pair(kind, policy)
    assert_equal(step(plain, backward=twice), step(recomputed, backward=twice))


@pytest.mark.parametrize("policy", POLICIES)
def test_gradients_of_inputs_alone(policy: str) -> None:
    plain, recomputed = pair("plain", policy)
    found = []
    for net in (plain, recomputed):
        torch.manual_seed(1)
        x = torch.randn(4, 8, 16, requires_grad=True)
        found.append(torch.autograd.grad(net(x).square().mean(), x)[0])
    assert torch.equal(*found)


@pytest.mark.parametrize("policy", POLICIES)
def test_nothing_is_renamed_and_copies_recompute_on_their_own(policy: str) -> None:
    plain, recomputed = pair("plain", policy)
    assert list(plain.state_dict()) == list(recomputed.state_dict())
    assert [n for n, _ in plain.named_parameters()] == [n for n, _ in recomputed.named_parameters()]
    assert [n for n, _ in plain.named_modules()] == [n for n, _ in recomputed.named_modules()]
    recomputed.load_state_dict(plain.state_dict(), strict=True)
    for clone in (copy.deepcopy(recomputed), pickle.loads(pickle.dumps(recomputed))):
        assert_equal(step(clone), step(plain))
        assert clone.layers[0].calls == recomputed.layers[0].calls + 2
        plain.zero_grad()
    restore_blocks(recomputed.blocks())
    assert not any("forward" in vars(block) for block in recomputed.blocks())


@pytest.mark.parametrize("policy", set(POLICIES) - {"budget"})
def test_two_calls_in_training_and_one_otherwise(policy: str) -> None:
    _, net = pair("plain", policy)
    step(net)
    assert [block.calls for block in net.layers] == [2, 2, 2]
    with torch.no_grad():
        net(torch.randn(2, 8, 16))
    net.eval()(torch.randn(2, 8, 16)).sum().backward()
    assert [block.calls for block in net.layers] == [4, 4, 4]


def test_every_second_block() -> None:
    net = Net(depth=5)
    technique = ActivationCheckpointing(policy="selective", every=2)
    technique.attach(net)  # type: ignore[arg-type]
    step(net)
    assert [block.calls for block in net.layers] == [2, 1, 2, 1, 2]
    technique.detach(net)  # type: ignore[arg-type]
    step(net)
    assert [block.calls for block in net.layers] == [3, 2, 3, 2, 3]


# Deliberately wrong


def wrong_without_random_state(block: nn.Module) -> Callable[..., Any]:
    forward = block.forward
    return lambda *a, **k: checkpoint(forward, *a, use_reentrant=False, preserve_rng_state=False, **k)


def wrong_reentrant(block: nn.Module) -> Callable[..., Any]:
    forward = block.forward
    return lambda x, bias, **k: checkpoint(lambda x: forward(x, bias, **k), x, use_reentrant=True)


@pytest.mark.parametrize(("wrong", "kind"), [(wrong_without_random_state, "plain"), (wrong_reentrant, "frozen")])
def test_wrong_variants_fail_the_same_test(wrong: Any, kind: str) -> None:
    """The reentrant one loses all gradients of a block whose input needs none."""
    plain, recomputed = pair(kind, "full")
    restore_blocks(recomputed.blocks())
    for block in recomputed.layers[: 1 if kind == "frozen" else 3]:
        block.forward = wrong(block)
    with pytest.raises(AssertionError):
        assert_equal(step(plain), step(recomputed))


def test_without_passing_over_random_numbers_the_same_test_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kept result that was drawn at random: what follows it has to draw as it did the first time."""

    class Drawing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            kept, _ = torch.native_dropout(x, 0.5, True)
            return nn.functional.dropout(kept * x, 0.5) * x

    def run(recomputed: bool) -> Tensor:
        net = Drawing()
        if recomputed:
            checkpoint_blocks([net], Selective(("native_dropout",)))
        torch.manual_seed(2)
        x = torch.randn(50, requires_grad=True)
        return torch.autograd.grad(net(x).sum(), x)[0]

    assert torch.equal(run(True), run(False))
    monkeypatch.setattr("kexue.strategies.recompute_regions._Random.restore", lambda self: None)
    assert not torch.equal(run(True), run(False))


def test_left_out_products_show_if_they_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the wrong products left out, gradients are no numbers: never wrong ones that look right."""
    plain, recomputed = pair("plain", "full")
    assert_equal(step(plain), step(recomputed))
    monkeypatch.setattr("kexue.strategies.recompute_regions.needed", lambda *_: (set(), set()))
    assert any(gradient.isnan().any() for gradient in step(recomputed)["gradients"])


# Costs


ENCODER = {"vocab_size": 50, "dim": 32, "num_layers": 4, "num_heads": 4, "feedforward_dim": 128}


def encoder(**changes: Any) -> Transformer:
    torch.manual_seed(0)
    return Transformer(TransformerConfig(**(ENCODER | {"attention_dropout": 0.0} | changes))).train()


def counts(module: Transformer) -> tuple[int, int]:
    """FLOPs of a step, and bytes of all storages that autograd keeps, without parameters."""
    own = {p.untyped_storage().data_ptr() for p in module.parameters()}
    saved: dict[int, tuple[int, Tensor]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes(), tensor
        return tensor

    with (
        FlopCounterMode(display=False) as flops,
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        module(torch.randint(0, 50, (2, 16))).square().mean().backward()
    return flops.get_total_flops(), sum(size for size, _ in saved.values())


TOKENS, DIM, LAYERS = 32, 32, 4
FORWARD = LAYERS * TOKENS * (24 * DIM**2 + 4 * 16 * DIM)  # of the blocks, FLOPs
LAST = LAYERS * TOKENS * 8 * DIM**2  # of their last products


@pytest.mark.parametrize(
    ("norm", "dropout", "policy", "again"),
    [
        ("pre", 0.0, "full", FORWARD - LAST),  # ends before the last product, whose result nobody needs
        ("pre", 0.1, "full", FORWARD - LAST),  # leaves it out also where a mask is drawn after it
        ("post", 0.1, "full", FORWARD),  # a norm needs it
        ("pre", 0.1, "products", 0),
        ("pre", 0.1, "narrow", LAYERS * TOKENS * 8 * DIM**2),  # the inner product
    ],
)
def test_recomputed_flops(norm: Any, dropout: float, policy: str, again: int) -> None:
    plain, recomputed = (encoder(norm=norm, dropout=dropout, attention_dropout=0.0) for _ in range(2))
    apply(recomputed, policy)
    assert counts(recomputed)[0] - counts(plain)[0] == again


def test_saved_bytes() -> None:
    _, everything = counts(encoder())
    module = encoder()
    saved = {}
    for policy in ("products", "narrow", "full"):
        apply(module, policy)
        _, saved[policy] = counts(module)
        restore_blocks(list(module.blocks()))
    hidden = TOKENS * DIM * 4
    # Scores and their weighted sum, projections to 3, 1 and 4 times the width; the last product is not needed again.
    scores = 4 * 2 * 16 * 16 * 4
    assert saved["products"] - saved["full"] == LAYERS * (9 * hidden + scores)
    assert saved["products"] - saved["narrow"] == LAYERS * 4 * hidden
    assert everything > saved["products"]


def test_kept_results_go_with_the_graph() -> None:
    """Without a collector of cycles: memory is free as soon as the backward pass has been there."""
    net = Net()
    checkpoint_blocks(net.blocks(), Selective())
    kept: list[weakref.ref[Region]] = []
    finish = Region.finish

    def remember(region: Region) -> None:
        finish(region)
        kept.append(weakref.ref(region))

    gc.disable()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Region, "finish", remember)
            loss = net(torch.randn(4, 8, 16)).sum()
            assert all(region() is not None for region in kept)
            assert len(kept) == 3
            loss.backward()
            assert all(region() is None for region in kept)
    finally:
        gc.enable()


def test_a_result_changed_after_the_block_is_noticed() -> None:
    linear = nn.Linear(8, 8)
    net = nn.Sequential(nn.LayerNorm(8), linear, nn.Flatten())
    checkpoint_blocks([net], Selective())
    hidden = net(torch.randn(2, 8))
    loss = hidden.sigmoid().sum()
    with torch.no_grad():
        hidden.add_(1)
    loss.backward()  # the block's own result: nobody asks for it
    head = nn.Sequential(nn.Linear(8, 8), nn.Sigmoid())
    checkpoint_blocks([head], Selective(("sigmoid",)))
    outputs = head(torch.randn(2, 8))
    loss = outputs.sum()
    with torch.no_grad():
        outputs.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_kernels_that_are_not_seen_leave_nothing_out() -> None:
    """A result filled behind torch's back: the product before it has to run."""

    class Unseen(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            y = torch.empty_like(x)
            y.numpy()[...] = x.detach().numpy() * 2
            ctx.save_for_backward(y)
            return y

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
            (y,) = ctx.saved_tensors
            return gradient * y

    class Net(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return Unseen.apply(self[0](x))

    found = []
    for recomputed in (False, True):
        torch.manual_seed(0)
        net = Net(nn.Linear(4, 4))
        if recomputed:
            checkpoint_blocks([net], Selective(()))
        net(torch.randn(3, 4)).sum().backward()
        found.append(net[0].weight.grad)
    assert torch.equal(*found)


class Biased(nn.Module):
    """Products changed in place: by a bias, at once; by a scale, after they were read."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(8, 8))
        self.bias = nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        first = x @ self.first
        first += self.bias
        read = x @ self.second
        total = read.sum()
        read.mul_(2)
        return (first.sigmoid() * read.exp()) * total


@pytest.mark.parametrize(("keep", "again"), [("products", 1), ((), 2)])
def test_products_changed_in_place(keep: Any, again: int) -> None:
    """Kept as what the bias makes of it; one that was read before runs again."""
    torch.manual_seed(0)
    plain = Biased()
    recomputed = copy.deepcopy(plain)
    checkpoint_blocks([recomputed], Selective(keep))
    x, flops = torch.randn(4, 8), []
    for net in (plain, recomputed):
        with FlopCounterMode(display=False) as counter:
            net(x).sum().backward()
        flops.append(counter.get_total_flops())
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(plain.parameters(), recomputed.parameters(), strict=True))
    assert flops[1] - flops[0] == again * 2 * 4 * 8 * 8


# Where it does not go


def test_a_cache_is_refused_in_training_and_no_matter_otherwise() -> None:
    module = encoder(mask="causal", positions="learned", dropout=0.0)
    expected = _generated(module)
    checkpoint_blocks(list(module.blocks()), Selective())
    assert torch.equal(_generated(module), expected)
    module.train()
    block = next(iter(module.blocks()))
    with pytest.raises(InputError, match=r"was given a LayerCache while training.*use_cache=False"):
        block(torch.randn(1, 2, 32), None, cache=module.new_cache().layers[0])


def _generated(module: Transformer) -> Tensor:
    module.eval()
    cache, ids = module.new_cache(), torch.arange(6)[None]
    with torch.no_grad():
        return torch.cat([module(ids[:, :4], cache=cache), module(ids[:, 4:], cache=cache)], 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"policy": "half"}, r"policy='half'\): use 'full', 'selective', 'offload', 'budget'; modules"),
        ({"every": 0}, r"every=0\): use 1 or more"),
        ({"every": 2, "policy": "budget", "budget": 0.5}, r"every=2\): use 1 or more, and 1 with a budget"),
        ({"every": 2, "budget": 0.5}, r"every=2\): use 1 or more, and 1 with a budget"),
        ({"keep": ["mm"]}, r"keep=\['mm'\]\): needs policy='selective'"),
        ({"policy": "selective", "keep": "wide"}, r"keep='wide'\): use 'products', 'narrow', or a list"),
        ({"policy": "selective", "keep": ["mn"]}, r"torch.ops has no operation mn"),
        ({"policy": "budget"}, r"policy='budget'\): say how much, budget=0.3 or budget='2GiB'"),
        ({"policy": "offload", "budget": 0.3}, r"budget=0.3\): a budget chooses .* leave out policy or budget"),
        ({"budget": 30}, r"budget=30\): use bytes, such as '2GiB' or \d+, or a share"),
        ({"budget": float("nan")}, r"budget=nan\): use bytes"),
        ({"budget": -0.5}, r"budget=-0.5\): use bytes"),
        ({"policy": "budget", "budget": 1.5}, r"budget=1.5\): use bytes, such as '2GiB' or \d+, or a share"),
        (
            {"policy": "budget", "budget": "much"},
            r"budget='much'\): use bytes, such as '2GiB' or \d+, or a share",
        ),
        ({"policy": "budget", "budget": 0}, r"budget=0\): use bytes, such as '2GiB' or \d+, or a share"),
    ],
)
def test_arguments_are_explained(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ActivationCheckpointing(**arguments)


def test_tensors_of_a_cpu_stay_where_they_are() -> None:
    tensor = torch.randn(64, 64)
    kept = to_host(tensor)
    assert kept[1] is tensor
    assert to_device(kept) is tensor


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_inputs_wait_in_the_hosts_memory() -> None:
    net = Net().cuda()
    checkpoint_blocks(net.blocks(), Offload())
    x = torch.randn(4096, 8, 16, device="cuda", requires_grad=True)
    device, kept = to_host(x.detach())
    assert kept.is_pinned()
    assert torch.equal(to_device((device, kept)), x)
    net(x).sum().backward()
    assert x.grad is not None


@pytest.mark.slow
@pytest.mark.parametrize("order", ["attach, compile", "compile, attach", "attach, compile all"])
@pytest.mark.parametrize("policy", POLICIES)
def test_compiled_blocks(policy: str, order: str) -> None:
    torch.manual_seed(0)
    plain = Net()
    for module in plain.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    recomputed = copy.deepcopy(plain)
    for what in order.split(", "):
        if what == "attach":
            apply(recomputed, policy)
        elif what == "compile all":
            recomputed.compile(backend="aot_eager")
        else:
            for block in recomputed.layers:
                block.compile(backend="aot_eager")
    for a, b in zip(step(plain)["gradients"], step(recomputed)["gradients"], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)
