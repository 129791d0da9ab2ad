"""A linear-chain conditional random field.  Shapes: B batch, T tokens, L tags.

The score of a path is the sum of its emissions and transitions; the loss is `log Z - score`, Z summing `e^score` over
all paths. Most code sums over `(B, L, L)` logarithms at every token. Here every step is a matrix product of scaled
probabilities, `(B, L)` by `(L, L)`, and the gradient is written down: expected minus observed tags and transitions,
from one pass forward and one back. A number that is lost to rounding must not matter: where a sum is so small that one
could, the sentence is done again with logarithms, in float64.

Source: https://kexue.fm/archives/5542; Lafferty et al., "Conditional Random Fields" (2001).  Checked against: all paths
enumerated, pytorch-crf.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ...errors import InputError
from ..decoding.viterbi import best_paths

FORBIDDEN = -1e4
"""Score of what must not be: finite in half precision and over the sum of a long sentence, so that no loss is infinite,
and below anything that learnt scores make up for."""
TABLES = ("transitions", "start", "end")
SMALLEST = {torch.float32: 1e-30, torch.float64: 1e-280}
"""A sum below it may have lost terms that count (the dtypes themselves end at 1e-38 and 1e-308)."""


class LinearChainCRF(nn.Module):
    """Scores of neighbouring tags, trained and decoded over whole sentences.

    Args:
        num_tags: L.
        allowed: whether tag j may follow tag i `(L, L)`; None allows all.
        allowed_start: which tags a sentence may begin with `(L,)`; None allows all.
        allowed_end: which tags it may end with `(L,)`; None allows all.
        boundaries: also learn a score of the first tag and of the last one; else these are 0.

    Raises:
        InputError: `num_tags` below 1, or a table of another shape.
    """

    start: Tensor
    end: Tensor

    def __init__(
        self,
        num_tags: int,
        allowed: Tensor | None = None,
        allowed_start: Tensor | None = None,
        allowed_end: Tensor | None = None,
        boundaries: bool = True,
    ) -> None:
        super().__init__()
        if num_tags < 1:
            raise InputError(f"LinearChainCRF(num_tags={num_tags}): use 1 or more")
        self.num_tags = num_tags
        self.transitions = nn.Parameter(torch.empty(num_tags, num_tags))
        for name in TABLES[1:]:
            if boundaries:
                self.register_parameter(name, nn.Parameter(torch.empty(num_tags)))
            else:
                self.register_buffer(name, torch.zeros(num_tags), persistent=False)
        for name, table in zip(TABLES, (allowed, allowed_start, allowed_end), strict=True):
            shape = getattr(self, name).shape
            if table is not None and table.shape != shape:
                raise InputError(f"LinearChainCRF: a table {tuple(table.shape)} of allowed {name}; give {tuple(shape)}")
            penalty = torch.zeros(shape) if table is None else torch.zeros(shape).masked_fill(~table.bool(), FORBIDDEN)
            self.register_buffer(f"{name}_penalty", penalty, persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Small scores around 0."""
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -0.1, 0.1)

    def forward(self, emissions: Tensor, mask: Tensor, tags: Tensor | None = None) -> Tensor:
        """Loss of the given tags, or the best tags where none are given.

        Args:
            emissions: score of each tag at each token `(B, T, L)`; half precision is taken to float32 first.
            mask: True where a token is real `(B, T)`; the real ones come first, and there is at least one.
            tags: the right tags `(B, T)`, any number at padding.

        Returns:
            With tags: `-log p(tags)` of each sentence `(B,)`, float32 (float64 for float64 emissions). Without: the
            tags of the best path `(B, T)`, 0 at padding.

        Raises:
            InputError: shapes that do not fit, a sentence without a token, or with padding before one.
        """
        lengths = self._check(emissions, mask, tags)
        dtype = torch.promote_types(emissions.dtype, torch.float32)
        scores = [getattr(self, name).to(dtype) + getattr(self, f"{name}_penalty") for name in TABLES]
        if tags is None:
            return best_paths(emissions, lengths, *scores)[0]
        return negative_log_likelihood(emissions, lengths, tags, *scores)

    def _check(self, emissions: Tensor, mask: Tensor, tags: Tensor | None) -> Tensor:
        """Tokens of each sentence."""
        if emissions.dim() != 3 or emissions.shape[-1] != self.num_tags:
            raise InputError(f"LinearChainCRF: emissions {tuple(emissions.shape)}; give (B, T, {self.num_tags})")
        for name, table in (("mask", mask), ("tags", tags)):
            if table is not None and table.shape != emissions.shape[:2]:
                raise InputError(f"LinearChainCRF: {name} {tuple(table.shape)}; give {tuple(emissions.shape[:2])}")
        lengths = mask.bool().sum(-1)
        if not bool((mask.bool() == (torch.arange(mask.shape[1], device=mask.device) < lengths[:, None])).all()):
            raise InputError("LinearChainCRF: padding before a token; fill sentences up on the right")
        if not bool((lengths > 0).all()):
            raise InputError("LinearChainCRF: a sentence without a token; leave it out")
        return lengths


def negative_log_likelihood(
    emissions: Tensor, lengths: Tensor, tags: Tensor, transitions: Tensor, start: Tensor, end: Tensor
) -> Tensor:
    """`log Z - score(tags)` of each sentence `(B,)`; arguments as in `best_paths`, `tags` `(B, T)`.

    Once differentiable, in all but lengths and tags.
    """
    dtype = torch.promote_types(emissions.dtype, torch.float32)
    parts = [part.to(dtype) for part in (emissions, transitions, start, end)]
    value: Any = _NegativeLogLikelihood.apply(lengths, tags, *parts)
    return value


class _NegativeLogLikelihood(torch.autograd.Function):
    """The loss and its written-out gradient, in the precision that comes in, whatever autocast says."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        lengths: Tensor,
        tags: Tensor,
        emissions: Tensor,
        transitions: Tensor,
        start: Tensor,
        end: Tensor,
    ) -> Tensor:
        with torch.autocast(emissions.device.type, enabled=False):
            real = torch.arange(emissions.shape[1], device=emissions.device)[:, None] < lengths
            scores = emissions.transpose(0, 1).masked_fill(~real[..., None], 0)
            tags = tags.t().masked_fill(~real, 0)
            chain = _Chain(scores, lengths, real, transitions, start, end)
            loss = chain.log_partition() - chain.score(tags)
        ctx.chain = chain
        ctx.save_for_backward(tags)
        return loss.to(emissions.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, weights: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (tags,) = ctx.saved_tensors
        chain: _Chain = ctx.chain
        with torch.autocast(weights.device.type, enabled=False):
            nodes, edges = chain.expected(weights)
            observed = torch.where(chain.real, weights, torch.zeros_like(weights))
            nodes.scatter_add_(-1, tags[..., None], -observed[..., None])
            pairs = (tags[:-1] * len(edges) + tags[1:]).flatten()
            edges.view(-1).index_add_(0, pairs, -observed[1:].flatten())
        return None, None, nodes.transpose(0, 1), edges, nodes[0].sum(0), nodes[chain.last, chain.row].sum(0)


class _Chain:
    """The sums over all paths of a batch.  Token-major: `(T, B, L)`."""

    def __init__(
        self, scores: Tensor, lengths: Tensor, real: Tensor, transitions: Tensor, start: Tensor, end: Tensor
    ) -> None:
        self.scores, self.real, self.last = scores, real, lengths - 1
        self.transitions, self.start, self.end = transitions, start, end
        self.row = torch.arange(len(lengths), device=scores.device)
        # e^score with the largest of each column, and of each token, taken out: nothing is above 1.
        largest = transitions.amax(0)
        self.links = (transitions - largest).exp()
        shifted = scores + largest
        shifted[0] = scores[0] + start
        self.shift = shifted.amax(-1, keepdim=True)
        self.tokens = shifted.sub_(self.shift).exp_()
        self.ends = (end - end.amax()).exp()
        self.smallest = SMALLEST[scores.dtype]

    def score(self, tags: Tensor) -> Tensor:
        """Score of one path of each sentence `(B,)`, float64."""
        tokens = self.scores.gather(-1, tags[..., None])[..., 0].double()
        links = self.transitions[tags[:-1], tags[1:]].double().masked_fill(~self.real[1:], 0)
        return tokens.sum(0) + links.sum(0) + self.start[tags[0]] + self.end[tags[self.last, self.row]]

    def log_partition(self) -> Tensor:
        """`log Z` of each sentence `(B,)`, float64.

        Keeps `alphas`, the probability of a token's tag given all tokens so far, and `scale`, which made it one.
        """
        self.alphas, sums = torch.empty_like(self.tokens), torch.empty_like(self.tokens)
        self.scale = torch.empty_like(self.shift)
        torch.sum(self.tokens[0], -1, keepdim=True, out=self.scale[0])
        torch.div(self.tokens[0], self.scale[0], out=self.alphas[0])
        rows = zip(self.alphas[:-1], self.alphas[1:], sums[1:], self.tokens[1:], self.scale[1:], strict=True)
        for before, alpha, total, token, size in rows:
            torch.mm(before, self.links, out=total)
            torch.mul(total, token, out=alpha)
            torch.sum(alpha, -1, keepdim=True, out=size)
            alpha.div_(size)
        logs = (self.shift.double() + self.scale.double().log())[..., 0].masked_fill(~self.real, 0)
        ending = self.alphas[self.last, self.row] @ self.ends
        total = logs.sum(0) + ending.double().log() + self.end.amax()
        self.lost = ((sums[1:].amin(-1) < self.smallest) & self.real[1:]).any(0) | (ending < self.smallest)
        rows = self.lost.nonzero()[:, 0]
        if len(rows):
            total[rows] = _LogChain(self, rows).total
        return total

    def expected(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """How often each tag is expected at each token `(T, B, L)`, and each transition `(L, L)`, times the weights."""
        betas, after = torch.empty_like(self.alphas), torch.empty_like(self.alphas)
        sums = torch.ones_like(self.alphas)
        back, last_steps = self.links.t().contiguous(), set(self.last.tolist())
        betas[-1] = self.ends
        for place in range(len(betas) - 1, 0, -1):
            beta, total = betas[place - 1], sums[place - 1]
            torch.mul(self.tokens[place], betas[place], out=after[place])
            torch.mm(after[place], back, out=total)
            torch.div(total, total.amax(-1, keepdim=True), out=beta)
            if place - 1 in last_steps:
                beta[self.last == place - 1] = self.ends
        nodes = self.alphas * betas
        sizes = nodes.sum(-1, keepdim=True)
        inner = self.real.clone()
        inner[self.last, self.row] = False
        scales = self.scale * sizes
        lost = self.lost | ((scales[..., 0] < self.smallest) & self.real).any(0)
        lost |= ((sums.amin(-1) < self.smallest) & inner).any(0)
        share = torch.where(self.real & ~lost, weights, torch.zeros_like(weights))[..., None]
        counted = share != 0
        nodes = torch.where(counted, nodes * (share / sizes), torch.zeros_like(nodes))
        # The sum over all neighbours is one product; each token brings its own scale.
        after = torch.where(counted, after * (share / scales), torch.zeros_like(after))[1:]
        rows = lost.nonzero()[:, 0]
        if len(rows):
            self.alphas[:, rows] = 0  # where all probabilities are lost they are no numbers
        edges = (self.alphas[:-1].flatten(0, 1).t() @ after.flatten(0, 1)) * self.links
        if len(rows):
            exact_nodes, exact_edges = _LogChain(self, rows).expected(weights[rows])
            nodes[:, rows] = exact_nodes.to(nodes.dtype)
            edges += exact_edges.to(edges.dtype)
        return nodes, edges


class _LogChain:
    """The same sums for some sentences as logarithms, in float64: slow, and exact whatever the scores."""

    def __init__(self, chain: _Chain, rows: Tensor) -> None:
        self.scores, self.transitions = chain.scores[:, rows].double(), chain.transitions.double()
        self.last, self.row = chain.last[rows], chain.row[: len(rows)]
        self.ends = chain.end.double()
        alphas = [self.scores[0] + chain.start]
        for scores in self.scores[1:]:
            alphas.append(scores + (alphas[-1][:, :, None] + self.transitions).logsumexp(1))
        self.alphas = torch.stack(alphas)
        self.total = (self.alphas[self.last, self.row] + self.ends).logsumexp(-1)

    def expected(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """As `_Chain.expected`."""
        nodes, edges = torch.zeros_like(self.alphas), torch.zeros_like(self.transitions)
        beta = self.ends.expand_as(self.scores[0])
        for place in range(len(self.alphas) - 1, -1, -1):
            beta = torch.where((self.last <= place)[:, None], self.ends, beta)
            after_end = (self.last < place)[:, None]  # sums over padding grow beyond all bounds
            expected = (self.alphas[place] + beta - self.total[:, None]).exp() * weights.double()[:, None]
            nodes[place] = expected.masked_fill(after_end, 0)
            if place:
                after = self.transitions + (self.scores[place] + beta)[:, None]
                pairs = (self.alphas[place - 1][:, :, None] + after - self.total[:, None, None]).exp()
                edges += (pairs * weights.double()[:, None, None]).masked_fill(after_end[..., None], 0).sum(0)
                beta = after.logsumexp(-1)
        return nodes, edges
