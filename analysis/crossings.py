"""Lengths at which one part of a Transformer overtakes another, and what a faster part could gain at most.

With n tokens the blocks cost a n + b n^2 multiplications: a for projections and position-wise networks, b for scores
and weighted sums. At D features, a feed-forward ratio of 4 and n tokens: attention costs more than the feed-forward
from n = 2D on, the quadratic term more than all others from n = 6D on.

Source: https://kexue.fm/archives/8610.
"""

from collections.abc import Callable
from fractions import Fraction
from typing import NamedTuple

from ..errors import InputError
from ..nn.transformer.config import KERNELS, TransformerConfig
from .transformer_cost import TransformerCost, transformer_cost
from .transformer_parts import Part, Workload


class Growth(NamedTuple):
    """Multiplications of one sequence of n tokens: `linear` * n + `quadratic` * n^2."""

    linear: Fraction
    quadratic: Fraction


def growth(config: TransformerConfig, counts: Callable[[Part], bool] = lambda part: part.in_blocks) -> Growth:
    """How the parts that count grow with the length; by default all parts of the blocks.

    Raises:
        InputError: linear attention, which has no quadratic part.
    """
    if config.attention in KERNELS:
        raise InputError(
            f"growth(attention={config.attention!r}): linear attention does not grow with the square of the length; "
            "compare transformer_cost at the lengths that matter"
        )
    one, two = (
        sum(part.macs for part in transformer_cost(config, Workload(length=n)).parts if counts(part)) for n in (1, 2)
    )
    quadratic = Fraction(two - 2 * one, 2)
    return Growth(one - quadratic, quadratic)


def is_feedforward(part: Part) -> bool:
    """Whether a part belongs to the position-wise networks."""
    return part.name.startswith("feed-forward")


def attention_over_feedforward(config: TransformerConfig) -> Fraction:
    """The length from which attention costs more than the position-wise network; 0 or less: it always does."""
    attention = growth(config, lambda part: part.in_blocks and not is_feedforward(part))
    return (growth(config, is_feedforward).linear - attention.linear) / attention.quadratic


def quadratic_over_linear(config: TransformerConfig) -> Fraction:
    """The length from which the quadratic term costs more than everything else in the blocks."""
    blocks = growth(config)
    return blocks.linear / blocks.quadratic


def linear_attention_pays(config: TransformerConfig, widening: int = 1) -> Fraction:
    """The length from which sums over keys, K V multiplications a head and token, twice, cost less than scores.

    Args:
        config: of softmax attention.
        widening: how much wider the heads of linear attention are. About 4 are needed for equal quality, since the
            rank of its weights is at most its feature size; that moves the crossing from d to 16 d.
    """
    key, value = config.key_size, config.head_size
    return Fraction(2 * widening**2 * key * value, key + value)


def speedup_bound(cost: TransformerCost) -> float:
    """How much faster a pass gets at most when its quadratic parts become free (Amdahl)."""
    return cost.macs / (cost.macs - cost.quadratic_macs)


class GenerationStep(NamedTuple):
    """What one more token costs with a cache.

    Attributes:
        macs: multiplications for all sequences of the batch.
        weight_bytes: weights of the blocks, read once for the whole batch.
        cache_bytes: keys and values of all earlier tokens, read once.
    """

    macs: int
    weight_bytes: int
    cache_bytes: int

    @property
    def macs_per_byte(self) -> float:
        """Arithmetic for each byte read: GPUs need some hundreds to be busy."""
        return self.macs / (self.weight_bytes + self.cache_bytes)


def generation_step(
    config: TransformerConfig, position: int, batch: int = 1, bytes_per_value: int = 2
) -> GenerationStep:
    """The blocks' work for the token after `position` others, in softmax attention: 12 D^2 + 2 t D a layer."""
    config = config.changed(heads=())
    blocks, parts = growth(config), transformer_cost(config).parts
    weights = sum(part.parameters for part in parts if part.in_blocks)
    cache = position * config.depth * config.num_kv_heads * (config.key_size + config.head_size)
    macs = batch * (blocks.linear + blocks.quadratic * position)
    return GenerationStep(int(macs), weights * bytes_per_value, batch * cache * bytes_per_value)
