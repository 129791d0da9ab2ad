"""How a branch joins the residual stream, and with which initial gains.

DeepNorm weighs the stream by alpha and starts values, outputs and position-wise matrices at a gain beta, so that one
update changes the output by an amount that does not grow with depth.

Source: https://kexue.fm/archives/8978, and H. Wang et al. "DeepNet" (arXiv 2203.00555).
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from .config import TransformerConfig
from .products import linear

Stack = Literal["encoder", "decoder"]


class ResidualConstants(NamedTuple):
    """Weight of the residual stream, and gain of the initial weights in the branches (queries and keys excepted)."""

    alpha: float = 1.0
    beta: float = 1.0


def residual_constants(config: TransformerConfig, stack: Stack = "encoder") -> ResidualConstants:
    """Constants of DeepNorm for one stack, (1, 1) for other norms.

    `deepnorm_constants="paper"` follows the paper: each stack has its own, the encoder's depend on both depths. The
    variants by optimiser bound the change of one step under SGD, Adam, or LAMB and Adafactor, whose steps are of the
    order of the gradient, of its sign, and of the weights: the number of branches K enters as alpha^2 / beta^2 = K,
    alpha / beta = K, and alpha = 1, beta^2 = 1 / K.
    """
    if config.norm != "deepnorm":
        return ResidualConstants()
    n, m = config.depth, config.num_decoder_layers
    if config.deepnorm_constants == "paper":
        if not m:
            return ResidualConstants((2 * n) ** 0.25, (8 * n) ** -0.25)
        if stack == "encoder":
            return ResidualConstants(0.81 * (n**4 * m) ** (1 / 16), 0.87 * (n**4 * m) ** (-1 / 16))
        return ResidualConstants((3 * m) ** 0.25, (12 * m) ** -0.25)
    branches = 2 * n if stack == "encoder" else 3 * m
    if config.deepnorm_constants == "sgd":
        return ResidualConstants(branches**0.25, branches**-0.25)
    if config.deepnorm_constants == "adam":
        return ResidualConstants(branches**0.5, branches**-0.5)
    return ResidualConstants(1.0, branches**-0.5)


class Projection(nn.Linear):
    """A linear layer that knows how its rows start.

    The rows may belong to several projections that are computed in one product: each part has its own gain and its
    own fan-out. Weights are drawn in `reset_parameters`, which runs inside the constructor: under ZeRO stage 3 they are
    cut into shards when it returns.

    Args:
        inputs: width of the input.
        outputs: width of the output, or of each part of it.
        config: which initialisation.
        gains: initial gain of each part; 1 where not given. Used by Xavier and normal initialisation.
        bias: add a bias, zero at first unless PyTorch's own initialisation is used.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int | tuple[int, ...],
        config: TransformerConfig,
        *,
        gains: tuple[float, ...] = (),
        bias: bool = True,
    ) -> None:
        self.parts = (outputs,) if isinstance(outputs, int) else outputs
        self.gains = gains or (1.0,) * len(self.parts)
        self.scheme = "xavier" if config.norm == "deepnorm" else config.initialisation
        self.std = config.init_std
        super().__init__(inputs, sum(self.parts), bias=bias)

    def reset_parameters(self) -> None:
        """Draw new weights."""
        if self.scheme == "uniform":
            super().reset_parameters()
            return
        with torch.no_grad():
            for rows, gain in zip(self.weight.split(self.parts), self.gains, strict=True):
                if self.scheme == "normal":
                    rows.normal_(std=self.std * gain)
                else:
                    nn.init.xavier_normal_(rows, gain)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        """Map `(..., inputs)` to `(..., outputs)`."""
        return linear(input, self.weight, self.bias)


def add_branch(stream: Tensor, branch: Tensor, alpha: float) -> Tensor:
    """The residual sum, `alpha * stream + branch`."""
    return stream + branch if alpha == 1.0 else torch.add(branch, stream, alpha=alpha)


def make_norm(config: TransformerConfig, width: int | None = None) -> nn.Module:
    """LayerNorm or RMSNorm over the features."""
    norm = nn.LayerNorm if config.norm_kind == "layer" else nn.RMSNorm
    return norm(width or config.dim, eps=config.norm_eps)
