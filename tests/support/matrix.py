"""The matrix technique x base x module, written once: what each row is made of and what is expected of it.

A cell is a row (one technique, or several) on a base and a module. It is trained three times (`matrix_runs.py`):

- `union`: SGD, no random numbers that depend on the process. Two processes then see in every step what one process sees
  on the union of their batches, and every base is to arrive at the same weights.
- `whole`: AdamW with a schedule, shuffling, dropout in the blocks with masks of each process's own; 4 epochs. The bases
  of two processes are to agree. After 2 epochs, inside a cycle of Lookahead, a checkpoint is saved.
- `resumed`: the same from that checkpoint, which is to arrive at the same weights and state to the last bit.

Single techniques are also added to, and removed from, a run between its epochs 2 and 3, which a warning has to name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

from cells import BASES as TWO_PROCESSES
from matrix_modules import MODULES

from kexue.strategies import (
    EMA,
    FGM,
    ActivationCheckpointing,
    Lookahead,
    LossWeighting,
    MultiSampleDropout,
    RDrop,
    Technique,
)

BASES = ("single", *TWO_PROCESSES)

UNION = 2e-5
"""Largest difference of two processes to one: the mean over a batch is summed in another order."""
ZERO = 1e-6
"""Largest difference of ZeRO to DDP: the same sums, some of them in another order."""
LOOSE = 5e-6
"""The same of adversarial training: larger losses, and stage 3 takes the gradient of the embeddings in its own pass."""
EFFECT = 1e-4
"""Smallest difference to plain training of what is to change it."""

BLOCKS = {name: module.block_names for name, module in MODULES.items()}
HEADS = {"kexue": None, "bert": "bert.classifier", "shared": "out"}

PARTS: dict[str, Callable[[str], Technique]] = {
    "activation_checkpointing": lambda module: ActivationCheckpointing(blocks=BLOCKS[module]),
    "activation_checkpointing, selective": lambda module: ActivationCheckpointing(
        blocks=BLOCKS[module], policy="selective"
    ),
    "activation_checkpointing, offload": lambda module: ActivationCheckpointing(
        blocks=BLOCKS[module], policy="offload"
    ),
    "activation_checkpointing, budget": lambda module: ActivationCheckpointing(blocks=BLOCKS[module], budget=0.6),
    "lookahead": lambda module: Lookahead(k=3),
    "lookahead, pullback": lambda module: Lookahead(k=3, pullback="pullback"),
    "lookahead, fast": lambda module: Lookahead(k=3, evaluate="fast"),
    "ema": lambda module: EMA(decay=0.6),
    "multi_sample_dropout": lambda module: MultiSampleDropout(3, 0.3, head=HEADS[module]),
    "adversarial": lambda module: FGM(0.5),
    "r_drop": lambda module: RDrop(2.0),
    "loss_weighting, uncertainty": lambda module: LossWeighting("uncertainty", smoothing=0.5, lr=0.1),
    "loss_weighting, gradnorm": lambda module: LossWeighting("gradnorm", smoothing=0.5, lr=0.1),
}


@dataclass(frozen=True)
class Row:
    """A row of the matrix.

    Attributes:
        parts: Names of its techniques, in the order in which they are given.
        like: Row whose runs it equals to the last bit; None: it changes what plain training does.
        beside: Row whose losses it has to the last bit, since all it does is to evaluate other weights.
        union: Largest difference of two processes to one.
        apart: Why two processes differ from one; then by more than `UNION`, and no weight by more than `union`.
        zero: Largest difference of ZeRO to DDP.
        modules: Those that it is tried on.
        refused: Where an error explains that it cannot be, as (module, base) to a pattern of the message.
        right: Row that two processes are compared with in its place; None: the row itself.
    """

    parts: tuple[str, ...]
    like: str | None = None
    beside: str | None = None
    union: float = UNION
    apart: str | None = None
    zero: float = ZERO
    modules: tuple[str, ...] = tuple(MODULES)
    refused: Mapping[tuple[str, str], str] = field(default_factory=dict)
    right: str | None = None

    @property
    def name(self) -> str:
        return " + ".join(self.parts) or "none"

    def build(self, module: str) -> list[Technique]:
        return [PARTS[part](module) for part in self.parts]


PAIRED = (
    "activation_checkpointing",
    "lookahead",
    "ema",
    "multi_sample_dropout",
    "adversarial",
    "r_drop",
    "loss_weighting, uncertainty",
    "loss_weighting, gradnorm",
)
MASKS = "multi-sample dropout draws masks of each process's own"
EVERYWHERE = [
    ("activation_checkpointing", "adversarial"),
    ("activation_checkpointing", "r_drop"),
    ("activation_checkpointing", "loss_weighting, gradnorm"),
    ("lookahead, fast", "ema"),
]
"""Pairs that are tried on all modules, since they run blocks again in other orders, or exchange weights twice."""
DIVIDES = r"ZeRO stage 3 divides the parameters, whose gradients this rule looks at; .*strategy=zero_2"
TWICE = r"(FGM|RDrop) runs the training step more than once, .*strategy=zero_2"


def _row(*parts: str) -> Row:
    """The row of these techniques, with what follows from which they are."""
    options: dict[str, Any] = {}
    if "activation_checkpointing" in parts[0]:
        options["like"] = " + ".join(parts[1:]) or "none"
    if "ema" in parts:
        options["beside"] = " + ".join(part for part in parts if part != "ema") or "none"
    if parts == ("lookahead",):
        options["beside"] = "lookahead, fast"
    if "multi_sample_dropout" in parts:
        options |= {"union": 0.5, "apart": MASKS}
    if "loss_weighting, gradnorm" in parts:
        refused = {(module, "zero_3"): DIVIDES for module in ("bert", "shared")}
        if "adversarial" in parts or "r_drop" in parts:
            refused["kexue", "zero_3"] = TWICE
        options["refused"] = refused
    if "adversarial" in parts:
        options["zero"] = LOOSE
    if parts not in EVERYWHERE and (len(parts) == 2 or parts[0].endswith(("offload", "budget"))):
        options["modules"] = ("kexue",)
    return Row(parts, **options)


def _rows() -> Iterable[Row]:
    yield Row((), like="none")
    for part in PARTS:
        yield _row(part)
    for pair in combinations(PAIRED, 2):
        if pair == ("lookahead", "ema"):
            message = r"Lookahead and EMA each bring weights to evaluate, choose one: Lookahead\(evaluate='fast'\)"
            yield Row(pair, modules=("kexue",), refused={("kexue", base): message for base in BASES})
            yield _row("lookahead, fast", "ema")
        elif not all("loss_weighting" in part for part in pair):
            yield _row(*pair)


ROWS = {row.name: row for row in _rows()}
