"""Scores of attention that are no inner products of tokens: Synthesizers, and their mixture with plain scores.

Shapes: B batch, T queries, S keys, D features, N heads, H hidden width, L longest length, R rank, (P, Q) factors of L.

A dense score row is a function of its query alone, a random one of its position alone. Both cover places up to L, of
which the first S are used. The host masks them, and does not divide them by the root of the key size.

Source: https://kexue.fm/archives/7430; Y. Tay et al. "Synthesizer" (arXiv 2005.00743).  Checked against: the formulas,
scaled_dot_product_attention with frozen keys.
"""

import math

import torch
from torch import Tensor, nn

from ...errors import InputError
from .config import Attention, TransformerConfig
from .residual import Projection


def synthesizer_parameters(config: TransformerConfig, kind: Attention) -> int:
    """How many parameters the scores of one layer have, all heads."""
    dim, hidden, length = config.dim, config.synthesizer_dim, config.max_length
    of_a_head = {
        "dense": (dim + 1) * hidden + (hidden + 1) * length,
        "factorised_dense": (dim + 1) * sum(config.synthesizer_factors),
        "random": length**2 if config.trainable_scores else 0,
        "factorised_random": 2 * config.synthesizer_rank * length if config.trainable_scores else 0,
    }
    return config.num_key_heads * of_a_head[kind]


class SynthesizerScores(nn.Module):
    """Scores of one kind.

    Dense: two layers with a ReLU between them map a token to its row. Factorised dense: two linear maps of a token give
    P and Q numbers, whose products are its row. Random: a table `(N, L, L)`. Factorised random: the product of two
    tables `(N, L, R)`. Random tables that are not trained are buffers, which checkpoints hold.

    Args:
        config: sizes and choices.
        kind: dense, factorised_dense, random or factorised_random.
    """

    table: Tensor
    left: Tensor
    right: Tensor

    def __init__(self, config: TransformerConfig, kind: Attention) -> None:
        super().__init__()
        self.kind = kind
        self.max_length = config.max_length
        self.factors = config.synthesizer_factors
        heads, length, std = config.num_key_heads, config.max_length, config.init_std
        if kind == "dense":
            self.inner = Projection(config.dim, heads * config.synthesizer_dim, config)
            self.weight = nn.Parameter(torch.randn(heads, config.synthesizer_dim, length) * std)
            self.bias = nn.Parameter(torch.zeros(heads, 1, length))
        elif kind == "factorised_dense":
            self.inner = Projection(config.dim, heads * sum(self.factors), config)
        else:
            names, width = ("table",), length
            if not config.trainable_scores:
                std = 1.0  # nothing will widen them: narrow scores would stay a plain mean
            if kind == "factorised_random":
                names, width = ("left", "right"), config.synthesizer_rank
                std = math.sqrt(std / math.sqrt(width))  # so that the product has the deviation of a full table
            for name in names:
                table = torch.randn(heads, length, width) * std
                if config.trainable_scores:
                    self.register_parameter(name, nn.Parameter(table))
                else:
                    self.register_buffer(name, table)

    def forward(self, hidden: Tensor, num_keys: int, offset: int = 0) -> Tensor:
        """Score the keys for each query.

        Args:
            hidden: the queries' tokens `(B, T, D)`.
            num_keys: S, counted from the first position.
            offset: position of the first query.

        Returns:
            `(B, N, T, S)`; `(1, N, T, S)` where scores do not depend on the tokens.
        """
        end = offset + hidden.shape[1]
        if max(end, num_keys) > self.max_length:
            raise InputError(
                f"TransformerConfig(max_length={self.max_length}): {max(end, num_keys)} tokens have no {self.kind} "
                "scores; give shorter inputs, or train with a larger max_length"
            )
        if self.kind == "random":
            return self.table[None, :, offset:end, :num_keys]
        if self.kind == "factorised_random":
            return (self.left[:, offset:end] @ self.right[:, :num_keys].mT)[None]
        if self.kind == "dense":
            inner = self.inner(hidden).relu().unflatten(-1, (self.weight.shape[0], -1)).transpose(1, 2)
            return inner @ self.weight[..., :num_keys] + self.bias[..., :num_keys]
        first, second = self.factors
        rows, columns = self.inner(hidden).unflatten(-1, (-1, first + second)).transpose(1, 2).split(self.factors, -1)
        # One factor is repeated and the other tiled: expanded alike they would give equal columns.
        rows = rows[..., : math.ceil(num_keys / second), None]
        return (rows * columns[..., None, :]).flatten(-2)[..., :num_keys]


class ScoreMixture(nn.Module):
    """A weighted sum of scores, by trained weights that are positive and sum to 1; equal at first.

    Args:
        count: how many kinds of scores.
    """

    def __init__(self, count: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(count))

    def weights(self) -> Tensor:
        """The weight of each kind, `(count,)`."""
        return self.logits.softmax(dim=0, dtype=torch.float32)

    def forward(self, scores: list[Tensor]) -> Tensor:
        """Add scores `(B or 1, N, T, S)` of all kinds."""
        weighted = [weight * score for weight, score in zip(self.weights().unbind(), scores, strict=True)]
        return sum(weighted[1:], weighted[0])
