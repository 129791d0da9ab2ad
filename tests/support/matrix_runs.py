"""Run cells of the matrix, compare them, and say what is not as expected."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from cells import ACCELERATOR, differences, freeze_libraries, make_strategy, train
from matrix import BASES, EFFECT, ROWS, UNION, Row
from matrix_modules import MODULES
from matrix_wrong import WRONG
from ranks import run_ranks

# Small parameters would stay whole at stage 3, and nothing would be shown.
DIVIDED = {"config": {"zero_optimization": {"stage3_param_persistence_threshold": 0, "stage3_max_live_parameters": 0}}}

SAVED_AT = 4
"""Step after 2 epochs of 2 steps, inside a cycle of Lookahead with k = 3."""
COMMON: dict[str, Any] = {"rows": 8, "batch": 4}
RUNS: dict[str, dict[str, Any]] = {
    "union": {**COMMON, "optimizer": "momentum", "epochs": 2, "row_dropout": 0.3},
    "whole": {**COMMON, "optimizer": "adamw", "epochs": 4, "scheduler": True, "shuffle": True, "dropout": 0.2},
}


def plan(
    rows: Iterable[Row], bases: Iterable[str], folder: Path, modules: Container[str] = tuple(MODULES)
) -> dict[Any, dict[str, Any]]:
    """Return the runs of these rows: (row, module, base, run) to what they are trained with, in an order that works."""
    cells: dict[Any, dict[str, Any]] = {}
    for base in bases:
        for row in rows:
            for module in filter(modules.__contains__, row.modules):
                cells[row.name, module, base, "union"] = RUNS["union"]
                if (module, base) in row.refused:
                    continue
                path = str(folder / f"{base}-{module}-{row.name}.ckpt".replace(" ", ""))
                cells[row.name, module, base, "whole"] = {**RUNS["whole"], "save": path, "save_at_step": SAVED_AT}
                cells[row.name, module, base, "resumed"] = {**RUNS["whole"], "resume": path}
                if len(row.parts) == 1 and row.right is None and module == "kexue":
                    plain = str(folder / f"{base}-{module}-none.ckpt")
                    some = {**RUNS["whole"], "max_steps": SAVED_AT + 2}
                    cells[row.name, module, base, "added"] = {**some, "resume": plain}
                    cells[row.name, module, base, "removed"] = {**some, "resume": path}
    return cells


def everything(folder: Path) -> dict[Any, Any]:
    """Train all cells, right ones and wrong ones."""
    runs: dict[Any, Any] = {}
    for rows in (ROWS, WRONG):  # wrong ones in processes of their own, which they may leave in any state
        for bases in (BASES[:1], BASES[1:]):
            ranks = run_ranks(run, len(bases[:2]), plan(rows.values(), bases, folder), str(folder), timeout=1800)
            runs |= _merged(ranks)
    return runs


def _merged(ranks: list[dict[Any, Any]]) -> dict[Any, Any]:
    """The results of the first rank with the states of all; an error on any rank is one."""
    runs: dict[Any, Any] = {}
    for key in ranks[0]:
        found = [results[key] for results in ranks]
        errors = [one for one in found if isinstance(one, str)]
        runs[key] = errors[0] if errors else {**found[0], "state": [one["state"] for one in found]}
    return runs


def run(cells: Mapping[Any, dict[str, Any]], folder: str) -> dict[Any, Any]:
    """Train these cells in this process, one after another; a cell that fails leaves its error as text."""
    freeze_libraries()
    if ACCELERATOR != "cpu":
        torch.use_deterministic_algorithms(True, warn_only=True)
    results: dict[Any, Any] = {}
    for key, options in cells.items():
        name, module, base, kind = key
        try:
            techniques = [] if kind == "removed" else (ROWS | WRONG)[name].build(module)
            strategy = make_strategy(base, techniques, **(DIVIDED if base == "zero_3" else {}))
            results[key] = train(base, module=MODULES[module], stock=strategy, folder=folder, **options)
        except Exception as error:
            results[key] = f"{type(error).__name__}: {error}"
    return results


# Comparing


@dataclass(frozen=True)
class Measured:
    """What was found in a cell; differences are the largest of a loss or a final weight.

    Attributes:
        error: What stopped it.
        difference: To a single process under DDP, to DDP under ZeRO; 0 for a single process.
        drift: Of a weight between the two processes.
        effect: To plain training.
        like: To the row that it is to equal.
        beside: Of the losses, to the row beside which it evaluates other weights.
        resumed: Of the resumed run to the uninterrupted one; infinity where techniques hold another state.
    """

    error: str | None = None
    difference: float = 0.0
    drift: float = 0.0
    effect: float = 0.0
    like: float | None = None
    beside: float | None = None
    resumed: float = 0.0


def measure(runs: Mapping[Any, Any], row: Row, module: str, base: str) -> Measured:
    """Compare the runs of a cell with each other and with those of other cells."""
    reference = "single" if base == "ddp" else "ddp"
    own = {kind: runs.get((row.name, module, base, kind)) for kind in ("union", "whole", "resumed")}
    errors = [f"{kind}: {found}" for kind, found in own.items() if isinstance(found, str)]
    if errors:
        return Measured(error=errors[0])

    def gap(kind: str, name: str, at: str) -> tuple[float, float]:
        return differences(own[kind], runs[name, module, at, kind])

    # Masks in the blocks are those of DDP, not of a single process.
    compared = {"single": (), "ddp": ("union",)}.get(base, ("union", "whole"))
    found = [gap(kind, row.right or row.name, reference) for kind in compared]
    if row.apart and base == "ddp":  # the loss of a batch under other masks says nothing of the weights
        found = [(0.0, weights) for _, weights in found]
    return Measured(
        difference=max((max(pair) for pair in found), default=0.0),
        drift=max(own[kind]["drift"] for kind in own),
        effect=max(gap("union", "none", base)),
        like=None if row.like is None else max(*gap("union", row.like, base), *gap("whole", row.like, base)),
        beside=None if row.beside is None else gap("whole", row.beside, base)[0],
        resumed=resumed_difference(own["resumed"], own["whole"]),
    )


def resumed_difference(resumed: dict[str, Any], whole: dict[str, Any]) -> float:
    """Return how far a resumed run ends from the uninterrupted one; infinity for another number of steps or state."""
    same_steps = len(resumed["losses"]) == len(whole["losses"]) - SAVED_AT and resumed["step"] == whole["step"]
    if not same_steps or resumed["state"] != whole["state"]:
        return float("inf")
    return max(differences(resumed, whole))


def problems(found: Measured, row: Row, module: str, base: str) -> list[str]:
    """Return what was not expected; empty for a cell as it should be."""
    pattern = row.refused.get((module, base))
    if pattern is not None:
        return [] if re.search(pattern, found.error or "") else [f"refusal {pattern!r} expected, found {found.error}"]
    if found.error is not None:
        return [found.error]
    bound = {"single": 0.0, "ddp": row.union}.get(base, row.zero)
    checks = {
        f"differs by {found.difference:.2g}, bound {bound}": found.difference <= bound,
        "masks of the processes' own make no difference": base != "ddp" or not row.apart or found.difference > UNION,
        f"the processes drift apart by {found.drift:.2g}": found.drift == 0,
        f"differs from {row.like} by {found.like or 0:.2g}": not found.like,
        f"losses differ from {row.beside} by {found.beside or 0:.2g}": not found.beside,
        f"differs from plain training by {found.effect:.2g} only": row.like is not None or found.effect > EFFECT,
        f"resumed differs by {found.resumed:.2g}": found.resumed == 0,
    }
    return [text for text, holds in checks.items() if not holds]


@dataclass(frozen=True)
class Changed:
    """A run that went on from a checkpoint with another list of techniques.

    Attributes:
        warning: What was said of it.
        steps: Steps taken in all.
        difference: Of the losses, to the run that went on unchanged.
    """

    warning: str
    steps: int
    difference: float


def changed(runs: Mapping[Any, Any], name: str, base: str) -> tuple[Changed, Changed]:
    """Return what became of runs to which a technique was added, and from which it was removed."""
    found = []
    for kind, before in (("added", "none"), ("removed", name)):
        run, unchanged = runs[name, "kexue", base, kind], runs[before, "kexue", base, "whole"]
        assert not isinstance(run, str), run
        warning = next((text for text in run["warnings"] if "saved with techniques" in text), "none")
        losses = zip(run["losses"], unchanged["losses"][SAVED_AT:], strict=False)
        found.append(Changed(warning, run["step"], max(abs(a - b) for a, b in losses)))
    return found[0], found[1]
