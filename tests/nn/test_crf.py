"""The CRF against all paths enumerated and against pytorch-crf: losses, gradients, best paths, hard cases."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torchcrf import CRF

from kexue.errors import InputError
from kexue.nn.decoding import TagScheme, best_paths
from kexue.nn.heads import LinearChainCRF
from kexue.nn.heads.crf import negative_log_likelihood


def chain(num_tags: int, scale: float = 1.0, dtype: torch.dtype = torch.float64, **tables: Any) -> LinearChainCRF:
    module = LinearChainCRF(num_tags, **tables).to(dtype)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=scale)
    return module


def sentences(batch: int, length: int, num_tags: int, scale: float = 1.0, dtype: torch.dtype = torch.float64) -> Any:
    emissions = (torch.randn(batch, length, num_tags, dtype=torch.float64) * scale).to(dtype).requires_grad_()
    lengths = torch.randint(1, length + 1, (batch,))
    lengths[0] = length
    return emissions, torch.arange(length) < lengths[:, None], torch.randint(0, num_tags, (batch, length))


def all_paths(module: LinearChainCRF, emissions: Tensor) -> dict[tuple[int, ...], Tensor]:
    """Score of every path of one sentence `(T, L)`."""
    links, start, end = (
        getattr(module, name) + getattr(module, f"{name}_penalty") for name in ("transitions", "start", "end")
    )
    found = {}
    for path in itertools.product(range(module.num_tags), repeat=len(emissions)):
        score = start[path[0]] + end[path[-1]] + sum(emissions[t, tag] for t, tag in enumerate(path))
        found[path] = score + sum(links[i, j] for i, j in itertools.pairwise(path))
    return found


def gradients(module: torch.nn.Module, emissions: Tensor) -> list[Tensor]:
    order = sorted(module.named_parameters(), key=lambda item: item[0].removesuffix("_transitions"))
    found = [emissions.grad, *(parameter.grad for _, parameter in order)]
    emissions.grad = None
    module.zero_grad()
    return found  # type: ignore[return-value]


@pytest.mark.parametrize("constrained", [False, True])
def test_all_paths_enumerated(constrained: bool) -> None:
    torch.manual_seed(0)
    tables = TagScheme(1, "BIOES").allowed() if constrained else ()
    module = chain(5, **dict(zip(("allowed", "allowed_start", "allowed_end"), tables, strict=False)))
    emissions, mask, tags = sentences(4, 5, 5)
    loss = module(emissions, mask, tags)
    (loss * torch.tensor([1.0, 2.0, -0.5, 3.0])).sum().backward()
    ours = gradients(module, emissions)
    plain = []
    for row, length in enumerate(mask.sum(-1).tolist()):
        paths = all_paths(module, emissions[row, :length])
        total = torch.stack(list(paths.values())).logsumexp(0)
        plain.append(total - paths[tuple(tags[row, :length].tolist())])
        assert torch.stack([(score - total).exp() for score in paths.values()]).sum().item() == pytest.approx(1)
        best = max(paths, key=lambda path: paths[path].item())
        assert module(emissions, mask)[row].tolist() == [*best, *[0] * (5 - length)]
    torch.testing.assert_close(loss, torch.stack(plain))
    (torch.stack(plain) * torch.tensor([1.0, 2.0, -0.5, 3.0])).sum().backward()
    torch.testing.assert_close(ours, gradients(module, emissions))


@pytest.mark.parametrize("scale", [1.0, 30.0, 1000.0])
def test_parity_with_pytorch_crf(scale: float) -> None:
    """Ours in float32, theirs in float64: hundreds apart, scaled probabilities end and logarithms take over."""
    torch.manual_seed(1)
    ours, theirs = chain(9, dtype=torch.float32), CRF(9, batch_first=True).double()
    weights = {"transitions": ours.transitions, "start_transitions": ours.start, "end_transitions": ours.end}
    theirs.load_state_dict({name: weight.double() for name, weight in weights.items()})
    emissions, mask, tags = sentences(16, 40, 9, scale, torch.float32)
    exact = emissions.detach().double().requires_grad_()
    loss, other = ours(emissions, mask, tags), -theirs(exact, tags, mask=mask, reduction="none")
    torch.testing.assert_close(loss, other.float(), rtol=1e-6, atol=1e-5)
    loss.mean().backward()
    other.mean().backward()
    expected = [grad.float() for grad in gradients(theirs, exact)]
    torch.testing.assert_close(gradients(ours, emissions), expected, rtol=1e-4, atol=1e-5)
    paths = ours(emissions, mask).tolist()
    assert [path[:n] for path, n in zip(paths, mask.sum(-1).tolist(), strict=True)] == theirs.decode(exact, mask)


def test_without_boundaries_as_pytorch_crf_without() -> None:
    """Nothing scores the first and the last tag, and nothing of it is learnt or saved."""
    torch.manual_seed(0)
    ours, theirs = LinearChainCRF(7, boundaries=False).double(), CRF(7, batch_first=True).double()
    assert list(ours.state_dict()) == ["transitions"]
    theirs.transitions.data = ours.transitions.data.clone()
    for boundary in (theirs.start_transitions, theirs.end_transitions):
        torch.nn.init.zeros_(boundary)
    emissions, mask, tags = sentences(6, 9, 7)
    torch.testing.assert_close(ours(emissions, mask, tags), -theirs(emissions, tags, mask, reduction="none"))
    expected = [path + [0] * (9 - len(path)) for path in theirs.decode(emissions, mask)]
    assert ours(emissions, mask).tolist() == expected


def test_gradient_by_differences() -> None:
    torch.manual_seed(2)
    module = chain(3)
    emissions, mask, tags = sentences(2, 4, 3)
    weights = torch.tensor([1.0, 2.0], dtype=torch.float64)

    def loss(emissions: Tensor, links: Tensor, start: Tensor, end: Tensor) -> Tensor:
        return (negative_log_likelihood(emissions, mask.sum(-1), tags, links, start, end) * weights).sum()

    assert torch.autograd.gradcheck(loss, (emissions, module.transitions, module.start, module.end))


def test_padding_does_not_matter() -> None:
    torch.manual_seed(3)
    module = chain(4)
    emissions, mask, tags = sentences(3, 6, 4)
    loss = module(emissions, mask, tags)
    loss.sum().backward()
    ours = gradients(module, emissions)
    assert (ours[0][~mask] == 0).all()
    changed = emissions.detach().masked_fill(~mask[..., None], float("nan")).requires_grad_()
    again = module(changed, mask, tags.masked_fill(~mask, -100))
    torch.testing.assert_close(again, loss)
    again.sum().backward()
    torch.testing.assert_close(gradients(module, changed), ours)


def test_what_probabilities_would_lose_is_exact() -> None:
    """The way to the right tag leads through one 300 below the others: its probability is 0 in float32."""
    module = LinearChainCRF(2, allowed=torch.tensor([[True, False], [True, True]]))
    emissions = torch.zeros(2, 3, 2)
    emissions[0, 0, 1], emissions[0, 1, 1], emissions[0, 2, 1] = -300.0, 0.0, 700.0
    emissions.requires_grad_()
    mask, tags = torch.ones(2, 3, dtype=torch.bool), torch.ones(2, 3, dtype=torch.long)
    loss = module(emissions, mask, tags)
    paths = all_paths(module, emissions[0])
    expected = torch.stack(list(paths.values())).logsumexp(0) - paths[1, 1, 1]
    torch.testing.assert_close(loss[0], expected, atol=1e-4, rtol=1e-5)
    loss.sum().backward()
    found = gradients(module, emissions)
    total = sum(
        torch.stack(list(paths.values())).logsumexp(0) - paths[1, 1, 1]
        for paths in (all_paths(module, emissions[row]) for row in (0, 1))
    )
    total.backward()  # type: ignore[union-attr]
    torch.testing.assert_close(found, gradients(module, emissions), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_forbidden_paths_stay_finite(dtype: torch.dtype) -> None:
    """Long padding, and tags none of which may follow: every path is forbidden."""
    never = torch.zeros(5, 5, dtype=torch.bool)
    module = LinearChainCRF(5, never, never[0], never[0]).to(dtype)
    emissions = (torch.randn(2, 300, 5) * 20).to(dtype).requires_grad_()
    mask = torch.arange(300) < torch.tensor([[300], [2]])
    tags = torch.randint(0, 5, (2, 300))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = module(emissions, mask, tags)
    assert loss.dtype == torch.float32
    loss.sum().backward()
    assert torch.isfinite(loss).all()
    assert all(torch.isfinite(grad).all() for grad in gradients(module, emissions))
    assert module(emissions, mask).shape == (2, 300)


def test_long_padding_behind_what_probabilities_lose() -> None:
    """Sums over padding go beyond float64 where there are many tags; they are of no sentence."""
    torch.manual_seed(6)
    scheme = TagScheme(20, "BIO")
    module = LinearChainCRF(scheme.num_tags, *scheme.allowed())
    emissions = (torch.randn(2, 400, scheme.num_tags) * 60).requires_grad_()
    mask, tags = torch.arange(400) < torch.tensor([[400], [9]]), torch.zeros(2, 400, dtype=torch.long)
    module(emissions, mask, tags)[1].backward()
    long = gradients(module, emissions)
    assert torch.isfinite(torch.stack([gradient.sum() for gradient in long])).all()
    module(emissions[1:, :9], mask[1:, :9], tags[1:, :9]).sum().backward()
    torch.testing.assert_close(long, gradients(module, emissions))


def test_autocast_changes_nothing() -> None:
    torch.manual_seed(4)
    module = chain(7, dtype=torch.float32)
    emissions, mask, tags = sentences(3, 30, 7, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = module(emissions, mask, tags)
    assert torch.equal(inside, module(emissions, mask, tags))


def test_learning_overcomes_no_rule() -> None:
    """Constrained decoding obeys the rules whatever the emissions say."""
    scheme = TagScheme(3, "BIOES")
    module = LinearChainCRF(scheme.num_tags, *scheme.allowed())
    emissions = torch.randn(50, 12, scheme.num_tags) * 50
    mask = torch.arange(12) < torch.randint(1, 13, (50, 1))
    follows, begins, ends = scheme.allowed()
    for path, length in zip(module(emissions, mask).tolist(), mask.sum(-1).tolist(), strict=True):
        assert begins[path[0]]
        assert ends[path[length - 1]]
        assert all(follows[i, j] for i, j in itertools.pairwise(path[:length]))


def test_scores_of_best_paths() -> None:
    torch.manual_seed(5)
    module = chain(4)
    emissions, mask, _ = sentences(3, 4, 4)
    _, scores = best_paths(emissions, mask.sum(-1), module.transitions, module.start, module.end)
    for row, length in enumerate(mask.sum(-1).tolist()):
        assert scores[row].item() == pytest.approx(max(all_paths(module, emissions[row, :length]).values()).item())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask": torch.tensor([[True, False, True]])}, "padding before a token"),
        ({"mask": torch.tensor([[False, False, False]])}, "a sentence without a token"),
        ({"mask": torch.ones(1, 2)}, r"mask \(1, 2\); give \(1, 3\)"),
        ({"tags": torch.zeros(2, 3)}, r"tags \(2, 3\); give \(1, 3\)"),
        ({"emissions": torch.zeros(1, 3, 4)}, r"give \(B, T, 2\)"),
    ],
)
def test_wrong_input_is_explained(change: dict[str, Tensor], message: str) -> None:
    arguments = {"emissions": torch.zeros(1, 3, 2), "mask": torch.ones(1, 3), "tags": torch.zeros(1, 3).long()}
    with pytest.raises(InputError, match=message):
        LinearChainCRF(2)(**(arguments | change))
    with pytest.raises(InputError, match="use 1 or more"):
        LinearChainCRF(0)
    with pytest.raises(InputError, match=r"a table \(3, 3\) of allowed transitions; give \(2, 2\)"):
        LinearChainCRF(2, torch.ones(3, 3))
