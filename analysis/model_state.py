"""Bytes that weights, gradients and optimiser hold, whole or divided by ZeRO.

Source: S. Rajbhandari et al. "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models" (arXiv 1910.02054).
"""

from typing import Literal, NamedTuple

Stage = Literal[0, 1, 2, 3]


class Recipe(NamedTuple):
    """Bytes that a trained parameter needs, by purpose.

    Attributes:
        weight: of the parameter itself.
        gradient: of its gradient.
        copy: of the float32 copy that the optimiser works on; 0 where it works on the parameter.
        state: of the optimiser's own state.
    """

    weight: int
    gradient: int
    copy: int
    state: int


MIXED_ADAM = Recipe(weight=2, gradient=2, copy=4, state=8)  # the 16 bytes of the ZeRO paper
FLOAT_ADAM = Recipe(weight=4, gradient=4, copy=0, state=8)


class ModelState(NamedTuple):
    """Bytes on one of the ranks."""

    weights: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self)


def model_state(parameters: int, stage: Stage = 0, ranks: int = 1, recipe: Recipe = MIXED_ADAM) -> ModelState:
    """Bytes of one rank: stage 1 divides the optimiser's state, 2 the gradients as well, 3 the weights as well.

    Args:
        parameters: number of trained parameters of the whole model.
        stage: of ZeRO; 0: every rank holds all, as under DDP.
        ranks: over how many it is divided.
        recipe: bytes a parameter.
    """
    part = -(-parameters // ranks)  # the last part is filled up
    weights, gradients, optimizer = (part if stage >= divided else parameters for divided in (3, 2, 1))
    return ModelState(weights * recipe.weight, gradients * recipe.gradient, optimizer * (recipe.copy + recipe.state))
