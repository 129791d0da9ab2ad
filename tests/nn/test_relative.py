"""Relative positions and the memory of Transformer-XL against the formulas, and against what a cut may not change."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kexue.nn.transformer import Attention, Context, Memory, Transformer, TransformerConfig, visibility
from kexue.nn.transformer.positions import distance_vectors, relative_shift

CPU = torch.device("cpu")
EXACT: dict[str, Any] = {"atol": 1e-10, "rtol": 1e-10}
HEADS, SIZE, DIM = 2, 8, 16
IDS = torch.randint(30, (2, 12), generator=torch.Generator().manual_seed(0))


def make_layer(**options: Any) -> tuple[Any, Tensor]:
    """A layer and the two biases, all random, in float64."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"dim": DIM, "num_heads": HEADS, "dropout": 0.0, "positions": "relative"}
    layer = Attention(TransformerConfig(10, **{**sizes, **options})).double().eval()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    return layer, torch.randn(2, HEADS, SIZE, dtype=torch.float64)


def make(dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "dim": DIM,
        "num_layers": 3,
        "num_heads": HEADS,
        "feedforward_dim": 32,
        "dropout": 0.0,
        "mask": "causal",
    }
    module = Transformer(TransformerConfig(30, **{**sizes, "positions": "relative", **options}))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return module.to(dtype).eval()


def attend(layer: Any, biases: Tensor, hidden: Tensor, memory: Tensor | None = None, kind: Any = "full") -> Tensor:
    past = 0 if memory is None else memory.shape[1]
    length = hidden.shape[1]
    visible = visibility(kind, length, CPU, past=past)
    clamp = layer.config.clamp_length
    distances = distance_vectors(length, past + length, DIM, both_ways=kind != "causal", clamp=clamp).double()
    return layer(hidden, Context(visible, distances=distances, biases=biases), memory=memory)


def sinusoid(distance: int) -> Tensor:
    angles = torch.tensor([distance / 10000 ** (2 * plane / DIM) for plane in range(DIM // 2)])
    return torch.cat((angles.sin(), angles.cos())).double()


def four_terms(layer: Any, biases: Tensor, hidden: Tensor, joined: Tensor, causal: bool, clamp: int) -> Tensor:
    """Content and distance, each met by the query and by a bias: one score at a time."""
    weight, bias = layer.projection.weight.split(layer.widths), layer.projection.bias.split(layer.widths)
    length, past = hidden.shape[1], joined.shape[1] - hidden.shape[1]
    rows = []
    for row in range(len(hidden)):
        outputs = []
        for head in range(HEADS):
            cut = slice(head * SIZE, (head + 1) * SIZE)
            inputs = zip((hidden[row], joined[row], joined[row]), weight, bias, strict=True)
            query, key, value = (x @ w[cut].T + b[cut] for x, w, b in inputs)
            scores = torch.full((length, past + length), -torch.inf, dtype=torch.float64)
            for i in range(length):
                for j in range(past + length):
                    distance = past + i - j
                    if causal and distance < 0:
                        continue
                    if clamp:
                        distance = max(-clamp, min(clamp, distance))
                    place = layer.relative.weight[cut] @ sinusoid(distance)
                    content, far = biases[0, head], biases[1, head]
                    terms = query[i] @ key[j], query[i] @ place, content @ key[j], far @ place
                    scores[i, j] = sum(terms) / math.sqrt(SIZE)
            outputs.append(scores.softmax(-1) @ value)
        rows.append(torch.cat(outputs, -1))
    return layer.output(torch.stack(rows))


@pytest.mark.parametrize("kind", ["full", "causal"])
@pytest.mark.parametrize("past", [0, 3])
@pytest.mark.parametrize("clamp", [0, 2])
def test_scores_are_the_four_terms(kind: str, past: int, clamp: int) -> None:
    layer, biases = make_layer(clamp_length=clamp)
    joined = torch.randn(2, past + 5, DIM, dtype=torch.float64)
    memory, hidden = joined[:, :past], joined[:, past:]
    found = attend(layer, biases, hidden, memory if past else None, kind)
    expected = four_terms(layer, biases, hidden, joined, kind == "causal", clamp)
    # Sinusoids are float32 numbers here as there; their last bit may differ.
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(("queries", "keys"), [(5, 5), (5, 9), (1, 4), (1, 1)])
def test_the_shift_maps_distances_to_keys(queries: int, keys: int) -> None:
    """Entry (i, j) is column T - 1 - i + j of the scores by distance, that of distance S - T + i - j."""
    both = torch.randn(2, 3, queries, keys + queries - 1)
    one = torch.randn(2, 3, queries, keys)
    shifted, causal = relative_shift(both, keys), relative_shift(one, keys)
    assert shifted.shape == causal.shape == (2, 3, queries, keys)
    distances = torch.arange(keys - 1, -queries, -1)
    for i in range(queries):
        for j in range(keys):
            column = queries - 1 - i + j
            assert distances[column] == keys - queries + i - j
            assert torch.equal(shifted[..., i, j], both[..., i, column])
            if j <= i + keys - queries:
                assert torch.equal(causal[..., i, j], one[..., i, column])


@pytest.mark.parametrize("mask", ["full", "causal"])
def test_only_distances_count(mask: str) -> None:
    """A sentence behind padding, however much, has the states that it has alone."""
    module = make(mask=mask)
    alone = module(IDS[:, :5])
    for room in (1, 4, 7):
        ids = torch.cat((IDS[:, :room], IDS[:, :5]), 1)
        real = torch.arange(room + 5).expand(2, -1) >= room
        torch.testing.assert_close(module(ids, real)[:, room:], alone, **EXACT)
    reordered = IDS[:, :5].flip(1)
    assert not torch.allclose(module(reordered).flip(1), alone, atol=1e-3)


CUTS = [(12,), (6, 6), (1, 11), (11, 1), (5, 4, 3), (1,) * 12, (2, 1, 7, 2)]


@pytest.mark.parametrize("cut", CUTS, ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"norm": "post"},
        {"norm": "deepnorm", "num_kv_heads": 1},
        {"norm": "gpt2_ml", "talking_heads": "both"},
        {"sharing": "all", "group_size": 2},
        {"attention_scale": "log_n", "scale_floor": 2},
        {"clamp_length": 4},
    ],
    ids=str,
)
def test_segments_with_memory_are_one_pass(cut: tuple[int, ...], options: dict[str, Any]) -> None:
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        module, memory = make(dtype, **options), Memory(12)
        with torch.no_grad():
            found = torch.cat([module(part, memory=memory) for part in IDS.split(cut, dim=1)], dim=1)
            torch.testing.assert_close(found, module(IDS), atol=tolerance, rtol=tolerance)
        assert memory.size == 12


def test_memory_takes_up_padding_and_changed_rows() -> None:
    """A segment with padding after one without; then other rows, as beams have them."""
    module, memory = make(), Memory(12)
    real = torch.arange(5) < torch.tensor([[5], [3]])
    with torch.no_grad():
        module(IDS[:, :4], memory=memory)
        memory.reorder(torch.tensor([1, 1]))
        found = module(IDS[:, 4:9], real, memory=memory)
        whole = torch.cat((IDS[[1, 1], :4], IDS[:, 4:9]), 1)
        expected = module(whole, torch.cat((torch.ones(2, 4, dtype=torch.bool), real), 1))[:, 4:]
    torch.testing.assert_close(found[real], expected[real], **EXACT)


def test_padding_is_not_remembered_as_tokens() -> None:
    """A segment that is padded on the left, then another: the states of the second are those without padding."""
    module, memory = make(), Memory(12)
    real = torch.arange(7).expand(2, -1) >= 3
    with torch.no_grad():
        module(IDS[:, :7], real, memory=memory)
        found = module(IDS[:, 7:], memory=memory)
        torch.testing.assert_close(found, module(IDS[:, 3:])[:, 4:], **EXACT)


def test_no_gradient_reaches_an_earlier_segment() -> None:
    module, memory = make(), Memory(12)
    inputs: list[Tensor] = []
    module.embedding.register_forward_hook(lambda *call: inputs.append(call[-1]))
    module(IDS[:, :6], memory=memory)
    assert not any(state.requires_grad for state in memory.states)
    second = module(IDS[:, 6:], memory=memory)
    first, later = torch.autograd.grad(second.square().sum(), inputs, allow_unused=True)
    assert first is None
    assert later is not None
    assert later.ne(0).any(-1).all()


def test_each_segment_is_trained_by_itself() -> None:
    """Backward passes one after another; gradients are those of constant memories."""
    module, memory = make(), Memory(12)
    for part in IDS.split(4, dim=1):
        constant = Memory(12)
        constant.states = [state.clone() for state in memory.states]
        found = torch.autograd.grad(module(part, memory=memory).square().sum(), list(module.parameters()))
        expected = torch.autograd.grad(module(part, memory=constant).square().sum(), list(module.parameters()))
        torch.testing.assert_close(found, expected, **EXACT)


def test_a_memory_of_nothing_is_none() -> None:
    module, memory = make(), Memory(0)
    for part in IDS.split(4, dim=1):
        torch.testing.assert_close(module(part, memory=memory), module(part), **EXACT)
    assert memory.size == 0


def test_tokens_beyond_the_reach_of_all_layers_change_nothing() -> None:
    """Segments of one token and a memory of 2: three layers reach 6 tokens back, and no further."""
    module = make()

    def last(ids: Tensor) -> Tensor:
        memory = Memory(2)
        with torch.no_grad():
            return [module(part, memory=memory) for part in ids.split(1, dim=1)][-1]

    expected = last(IDS)
    for place in range(12):
        changed = IDS.clone()
        changed[:, place] = (changed[:, place] + 1) % 30
        same = torch.equal(last(changed), expected)
        assert same == (place < 11 - 3 * 2)


def test_same_length_hides_far_keys() -> None:
    """Every query sees 4 keys, itself included, wherever the cut is; else the later ones of a segment see more."""
    module = make(num_layers=1)
    with torch.no_grad():
        singles = Memory(3)
        expected = torch.cat([module(part, memory=singles) for part in IDS.split(1, dim=1)], dim=1)
        for cut in ((6, 6), (4, 4, 4), (5, 7)):
            memory, free = Memory(4, same_length=True), Memory(4)
            found = torch.cat([module(part, memory=memory) for part in IDS.split(cut, dim=1)], dim=1)
            torch.testing.assert_close(found, expected, **EXACT)
            others = torch.cat([module(part, memory=free) for part in IDS.split(cut, dim=1)], dim=1)
            assert not torch.allclose(others, expected, atol=1e-4)


def test_clamped_distances_count_alike() -> None:
    """Tokens beyond the limit are all as far away: swapping two of them changes nothing."""
    vectors = distance_vectors(3, 12, DIM, both_ways=True, clamp=4)
    assert vectors.shape == (14, DIM)
    far, near = vectors[:8], vectors[8:]
    assert torch.equal(far, far[:1].expand(8, DIM))
    assert torch.equal(near, distance_vectors(3, 12, DIM, both_ways=True)[8:])
    layer, biases = make_layer(clamp_length=2)
    hidden = torch.randn(1, 6, DIM, dtype=torch.float64)
    swapped = hidden[:, [1, 0, 2, 3, 4, 5]]
    found, other = (attend(layer, biases, x, kind="causal") for x in (hidden, swapped))
    torch.testing.assert_close(found[:, 4:], other[:, 4:], **EXACT)
    assert not torch.allclose(found[:, 2], other[:, 2], atol=1e-4)


@pytest.mark.parametrize("past", [0, 3])
def test_equals_xlnet(past: int) -> None:
    """The attention core of XLNet, which kept that of Transformer-XL, without segments; keys on both sides."""
    xlnet = pytest.importorskip("transformers.models.xlnet.modeling_xlnet")
    settings: dict[str, Any] = {"d_model": DIM, "n_head": HEADS, "d_inner": 32, "dropout": 0.0, "vocab_size": 10}
    peer = xlnet.XLNetRelativeAttention(xlnet.XLNetConfig(**settings)).double().eval()
    layer, biases = make_layer(attention_bias=False, output_projection=False)
    query, key, value = layer.projection.weight.data.split(layer.widths)
    assert layer.relative is not None
    for name, weight in {"q": query, "k": key, "v": value, "r": layer.relative.weight.data}.items():
        getattr(peer, name).data = weight.T.reshape(DIM, HEADS, SIZE).clone()
    peer.r_w_bias.data, peer.r_r_bias.data = biases
    joined = torch.randn(2, past + 5, DIM, dtype=torch.float64)
    hidden = joined[:, past:]
    distances = distance_vectors(5, past + 5, DIM, both_ways=True).double()
    # XLNet starts with a distance that no key has.
    places = torch.cat((torch.zeros(1, DIM, dtype=torch.float64), distances))
    keys, values = (torch.einsum("sbd,dnk->sbnk", joined.transpose(0, 1), x) for x in (peer.k, peer.v))
    queries = torch.einsum("tbd,dnk->tbnk", hidden.transpose(0, 1), peer.q)
    far = torch.einsum("pbd,dnk->pbnk", places[:, None].expand(-1, 2, -1), peer.r)
    found = peer.rel_attn_core(queries, keys, values, far)
    expected = (found[0] if isinstance(found, tuple) else found).permute(1, 0, 2, 3).flatten(2)
    torch.testing.assert_close(attend(layer, biases, hidden, joined[:, :past] if past else None), expected, **EXACT)


@pytest.mark.parametrize("kind", ["full", "causal"])
def test_gradients(kind: Any) -> None:
    layer, biases = make_layer()
    hidden = torch.randn(1, 3, DIM, dtype=torch.float64, requires_grad=True)
    memory = torch.randn(1, 2, DIM, dtype=torch.float64)
    inputs = (hidden, biases.requires_grad_(), *layer.parameters())
    names = [name for name, _ in layer.named_parameters()]

    def call(hidden: Tensor, biases: Tensor, *values: Tensor) -> Tensor:
        visible = visibility(kind, 3, CPU, past=2)
        distances = distance_vectors(3, 5, DIM, both_ways=kind != "causal").double()
        context = Context(visible, distances=distances, biases=biases)
        weights = dict(zip(names, values, strict=True))
        return torch.func.functional_call(layer, weights, (hidden, context), {"memory": memory})

    assert torch.autograd.gradcheck(call, inputs, fast_mode=True)
