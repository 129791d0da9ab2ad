"""Adversarial training on embeddings by the fast gradient method (FGM).  Shapes: B batch, T tokens, D features.

The loss of a batch, plus the loss of the same batch with each example's embedding vectors moved a distance of epsilon
in the direction that raises the loss fastest.

Source: Miyato et al., "Adversarial Training Methods for Semi-Supervised Text Classification" (arXiv 1605.07725);
Su Jianlin, kexue.fm/archives/7234.  Checked against: the formula on a small network in float64, derivatives by hand
(tests/strategies/test_adversarial.py).
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from ..errors import InputError
from .second_pass import SecondPass, combined, loss_of, without_logging

SCALE = 4096.0
"""Factor of the loss whose gradient is taken: r = epsilon g / |g| loses it again, and float16 does not lose g."""


def fgm_perturbation(gradient: Tensor, epsilon: float) -> Tensor:
    """Return `epsilon * g / |g|`, the norm taken over each example: its tokens and features together.

    So the perturbation of an example does not depend on what else is in the batch, nor on how many processes share it.

    Args:
        gradient: Of the loss with respect to the embedding vectors, `(B, ...)`, times any factor.
        epsilon: Length of each example's perturbation.

    Returns:
        `(B, ...)`, detached; 0 where the gradient is 0 or not finite.
    """
    gradient = gradient.detach()
    rows = gradient.flatten(1).to(torch.promote_types(gradient.dtype, torch.float32))
    norm = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    usable = norm.isfinite() & (norm > 0)
    return (epsilon * rows / norm).where(usable, torch.zeros_like(rows)).view_as(gradient).to(gradient.dtype)


@contextmanager
def recorded(embeddings: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """Collect what these modules make of token ids, in the order of the calls, as tensors to differentiate for.

    A table that also serves as the output layer is called with vectors there; those calls are left alone.
    """
    outputs: list[Tensor] = []

    def record(embedding: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if not _takes_ids(args):
            return None
        outputs.append(output if output.requires_grad else output.detach().requires_grad_())  # a frozen table
        return outputs[-1]

    handles = [embedding.register_forward_hook(record) for embedding in embeddings]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def perturbed(embeddings: Sequence[nn.Module], perturbations: Sequence[Tensor]) -> Iterator[None]:
    """Add these to what `recorded` has collected, in the same order; no parameter is touched."""
    remaining = list(perturbations)

    def add(embedding: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        return output + remaining.pop(0) if _takes_ids(args) else None

    handles = [embedding.register_forward_hook(add) for embedding in embeddings]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _takes_ids(args: tuple[Any, ...]) -> bool:
    return not (args and args[0].is_floating_point())


class FGM(SecondPass):
    """Add the loss under the worst small change of the embedding vectors. Card: docs/cards/adversarial.md.

    Args:
        epsilon: Length of the change of each example, above 0.
        embedding: Pattern of module names (`"*word_embeddings"`); None: the embedding table with the most rows.

    Raises:
        ValueError: If epsilon is not above 0.
    """

    def __init__(self, epsilon: float = 1.0, embedding: str | None = None) -> None:
        if not epsilon > 0:
            raise ValueError(f"FGM(epsilon={epsilon}): use a number above 0.")
        self.epsilon = epsilon
        self.embedding = embedding
        self._embeddings: list[nn.Module] = []

    def attach(self, module: pl.LightningModule) -> None:
        self._embeddings = find_embeddings(module, self.embedding)
        super().attach(module)

    def run(self, module: pl.LightningModule, step: Callable[[], Any]) -> Any:
        # ZeRO stage 3 counts the passes through each module and gathers its parameters once for each: the graph of one
        # forward pass cannot be walked twice. There the gradient gets a pass of its own, with the same random numbers.
        divided = any(hasattr(parameter, "ds_id") for parameter in module.parameters())
        devices = [module.device] if module.device.type == "cuda" else []
        with torch.random.fork_rng(devices, enabled=divided), recorded(self._embeddings) as vectors:
            outputs = step()
        if outputs is None:
            return None
        if not vectors:
            raise InputError(
                f"FGM(embedding={self.embedding!r}): training_step of {type(module).__name__} called no embedding "
                "with token ids; name the one that it calls."
            )
        loss = loss_of(outputs)
        gradients = torch.autograd.grad(
            loss, vectors, torch.full_like(loss, SCALE), retain_graph=not divided, materialize_grads=True
        )
        with without_logging(module):
            if divided:
                outputs = step()
            with perturbed(self._embeddings, [fgm_perturbation(gradient, self.epsilon) for gradient in gradients]):
                adversarial = step()
        module.log("train/adversarial_loss", loss_of(adversarial).detach())
        return combined(outputs, adversarial, torch.add)


def find_embeddings(module: nn.Module, pattern: str | None = None) -> list[nn.Module]:
    """Find the embedding to perturb.

    Args:
        module: Any module.
        pattern: Of module names; None: the `nn.Embedding` with the most rows, which is that of the tokens.

    Raises:
        InputError: If there is none, or two tables have the most rows.
    """
    if pattern is not None:
        found = [part for name, part in module.named_modules() if fnmatch.fnmatchcase(name, pattern)]
        if found:
            return found
    tables = {name: part for name, part in module.named_modules() if isinstance(part, nn.Embedding)}
    rows = max((table.num_embeddings for table in tables.values()), default=0)
    largest = [name for name, table in tables.items() if table.num_embeddings == rows]
    if pattern is None and len(largest) == 1:
        return [tables[largest[0]]]
    name = type(module).__name__
    if not tables:
        raise InputError(
            f"FGM(embedding={pattern!r}): {name} has no nn.Embedding; FGM is for models of token ids, so leave it out, "
            "or name the module that makes vectors of ids."
        )
    why = "nothing has this name" if pattern is not None else f"{len(largest)} tables have the most rows"
    raise InputError(
        f"FGM(embedding={pattern!r}): {why} in {name}; name the embedding of the tokens, one of {', '.join(tables)}."
    )
