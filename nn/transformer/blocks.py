"""The block of a Transformer: attention and a position-wise network, each in a residual branch.

Source: https://kexue.fm/archives/9009 (pre and post norm), https://kexue.fm/archives/8978 (DeepNorm),
https://kexue.fm/archives/7292 (GPT2_ML).  Checked against: torch.nn.TransformerEncoderLayer and
TransformerDecoderLayer, the models of transformers.
"""

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F

from .attention import Attention, Context
from .cache import LayerCache
from .config import TransformerConfig
from .residual import Projection, ResidualConstants, add_branch, make_norm


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU by its tanh approximation, as ALBERT, GPT-2 and Google's BERT have it."""
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": gelu_tanh,
    "relu": F.relu,
    "silu": F.silu,
    "tanh": F.tanh,
}


class FeedForward(nn.Module):
    """Position-wise network of two layers, `(B, T, D)` to `(B, T, D)`; gated, its inner values meet a second product.

    Args:
        config: sizes and choices.
        beta: initial gain of the matrices.
    """

    def __init__(self, config: TransformerConfig, beta: float = 1.0) -> None:
        super().__init__()
        parts = (config.feedforward_dim,) * (2 if config.gated else 1)
        bias = config.feedforward_bias
        self.inner = Projection(config.dim, parts, config, gains=(beta,) * len(parts), bias=bias)
        self.outer = Projection(config.feedforward_dim, config.dim, config, gains=(beta,), bias=bias)
        self.gated = config.gated
        self.activation = ACTIVATIONS[config.activation]
        self.dropout = nn.Dropout(config.feedforward_dropout)

    def forward(self, hidden: Tensor) -> Tensor:
        inner = self.inner(hidden)
        if self.gated:
            gate, inner = inner.chunk(2, dim=-1)
            return self.outer(self.dropout(self.activation(gate) * inner))
        return self.outer(self.dropout(self.activation(inner)))


class TransformerBlock(nn.Module):
    """Attention, in a decoder also attention to a source, and a position-wise network: the unit of recomputation.

    Args:
        config: sizes and choices.
        constants: weight of the residual stream and initial gain of the branches.
        cross: attend to a source as well.
    """

    def __init__(
        self, config: TransformerConfig, constants: ResidualConstants | None = None, cross: bool = False
    ) -> None:
        super().__init__()
        self.placement = config.norm
        self.alpha, beta = constants or ResidualConstants()
        self.attention = Attention(config, beta)
        self.attention_norm = nn.Identity() if config.norm == "gpt2_ml" else make_norm(config)
        self.cross_attention = Attention(config, beta, cross=True) if cross else None
        self.cross_norm = make_norm(config) if cross else None
        self.feedforward = FeedForward(config, beta)
        self.feedforward_norm = make_norm(config)
        self.output_norm = make_norm(config) if config.norm == "gpt2_ml" else None
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        hidden: Tensor,
        context: Context,
        cache: LayerCache | None = None,
        memory: Tensor | None = None,
        source: Tensor | None = None,
    ) -> Tensor:
        """Map `(B, T, D)` to `(B, T, D)`; the other arguments as in `Attention.forward`."""

        def attend(inputs: Tensor) -> Tensor:
            before = memory
            if memory is not None and self.placement == "pre":
                before = self.attention_norm(memory)
            return self.attention(inputs, context, cache, before)

        if self.placement == "gpt2_ml":
            assert self.output_norm is not None
            hidden = hidden + self.dropout(attend(hidden))
            return self.output_norm(hidden + self.dropout(self.feedforward(self.feedforward_norm(hidden))))
        hidden = self._join(hidden, attend, self.attention_norm)
        if self.cross_attention is not None and self.cross_norm is not None:
            cross = self.cross_attention
            hidden = self._join(hidden, lambda inputs: cross(inputs, context, cache, source=source), self.cross_norm)
        return self._join(hidden, self.feedforward, self.feedforward_norm)

    def _join(self, hidden: Tensor, branch: Callable[[Tensor], Tensor], norm: nn.Module) -> Tensor:
        """One residual branch with its norm before it or after the sum."""
        if self.placement == "pre":
            return hidden + self.dropout(branch(norm(hidden)))
        return norm(add_branch(hidden, self.dropout(branch(hidden)), self.alpha))
