"""Run the whole matrix and write what was measured to docs/matrix.md.

OMP_NUM_THREADS=1 python tests/support/write_matrix.py
"""

from __future__ import annotations

import datetime
import platform
import tempfile
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from matrix import BASES, LOOSE, ROWS, UNION, ZERO, Row
from matrix_modules import MODULES
from matrix_runs import changed, everything, measure, problems
from matrix_wrong import WRONG

PAGE = Path(__file__).parents[2] / "docs" / "matrix.md"
HEADINGS = {
    "kexue": "A module that keeps kexue's contract: a Transformer, `blocks()`, `head`, `task_losses`",
    "bert": "A plain module around `transformers`' BertForSequenceClassification",
    "shared": "A module that uses one block three times; it offers `blocks()` only",
}


def main() -> None:
    """Run, then write the page."""
    with tempfile.TemporaryDirectory() as folder:
        runs = everything(Path(folder))
    PAGE.write_text(page(runs), encoding="utf-8")
    print(f"{PAGE}: {len(runs)} runs")


def page(runs: Mapping[Any, Any]) -> str:
    """Return the document."""
    messages: list[str] = []
    tables = []
    for module, heading in HEADINGS.items():
        rows = [row for row in ROWS.values() if module in row.modules]
        lines = [[row.name, relation(runs, row, module), *cells(runs, row, module, messages)] for row in rows]
        tables.append(f"## {heading}\n\n" + table(["techniques", "to other rows", *BASES], lines))
    cell_count = sum(len(row.modules) * len(BASES) for row in ROWS.values())
    versions = ", ".join(
        f"{name} {version(name)}" for name in ("torch", "pytorch-lightning", "deepspeed", "transformers")
    )
    return f"""# The matrix: techniques x bases x modules

{datetime.date.today().isoformat()}, {platform.machine()}, CPU, {versions}, float32. Written by

    OMP_NUM_THREADS=1 python tests/support/write_matrix.py

from {len(runs)} trainings: {len(ROWS)} rows, {len(MODULES)} modules, {len(BASES)} bases, {cell_count} cells.
`tests/distributed/test_matrix_full.py` (marked long) holds every cell to its bound,
`tests/distributed/test_matrix.py` the core of it, with accumulation and clipping. Rows and bounds are stated in
`tests/support/matrix.py`.

**A cell** holds the largest difference of a loss or a final weight to its reference, then whether resuming is exact.

- The reference of `ddp` (two processes) is one process on the union of their batches, trained by SGD with momentum;
  bound {number(UNION)}. Masks of dropout follow the rows there, so that they do not depend on how a batch is divided.
- The reference of `zero_1`, `zero_2` and `zero_3` (two processes, parameters divided) is `ddp`; bound {number(ZERO)},
  or {number(LOOSE)} with `adversarial`, whose losses are larger. That is of these runs and of runs by AdamW with a
  schedule, shuffling, and dropout in the blocks, whose masks every process draws for itself.
- *apart*: {next(row.apart for row in ROWS.values() if row.apart)}, which no single process
  does. No weight may differ by more than {number(max(row.union for row in ROWS.values()))} for it.
- *exact*: 2 + 2 epochs equal 4 to the last bit, saved by two processes (`single`: one) inside a cycle of Lookahead and
  resumed by as many: losses, weights, and on every process the state of techniques and of the optimisers they wrap.
- In every cell, all processes end with the same weights to the last bit.
- **To other rows**: *equals* to the last bit on every base; or *losses of*, equal to the last bit, with other weights
  to evaluate; and else how far it ends from plain training in a single process.

**On a GPU** (`make gpu`; one process, NCCL, an H200 with torch 2.11, 26 November 2026) the 210 cells of the first table
hold too, with sums in a fixed order (`CUBLAS_WORKSPACE_CONFIG=:4096:8`): `ddp`, `zero_1` and `zero_2` equal a single
device to the last bit, `zero_3` to 3.9e-06, and resuming is exact. So do those of the other two tables, except that
selective recomputation was mended after their run: of it only the shared block under `ddp` and `zero_3` was run again.

{(chr(10) * 2).join(tables)}

## Refused

An error says so before the first step is taken.

{chr(10).join(f"{number}. `{message}`" for number, message in enumerate(messages, 1))}

## Added or removed between runs

A checkpoint after 2 epochs, resumed with one technique more or less, on every base, with the module that keeps the
contract. The run goes on, after a warning that names what came and went. Largest difference of the next two losses to a
run that goes on unchanged:

{table(["technique", "added", "removed", "what the warning says of removing it"], [change(runs, n) for n in single()])}

## Deliberately wrong

Each is trained as the right one is, and `test_wrong_variant_is_found_out` of `tests/distributed/test_matrix_full.py`
wants the same comparison to find it out, with these words; where there are none, it is right by chance.

{table(["wrong", *BASES], [[name, *wrong_cells(runs, row)] for name, row in WRONG.items()])}

Found out by other tests: the reentrant form on a block whose input needs no gradient, and results to keep that are
drawn at random (`tests/strategies/test_activation_checkpointing_policies.py`); one counter of Lookahead for all parts
that ZeRO makes of the parameters (`tests/distributed/test_lookahead_evaluation.py`); rules by gradients that go by
those of one process (`tests/distributed/test_loss_weighting.py`).
"""


def number(value: float) -> str:
    """`3e-7`; a 0 is to the last bit."""
    if value >= 1 or not value:
        return f"{value:.0f}"
    return f"{value:.0e}".replace("e-0", "e-")


def cells(runs: Mapping[Any, Any], row: Row, module: str, messages: list[str]) -> list[str]:
    """Return the cells of a row; messages of refusals are collected."""
    texts = []
    for base in BASES:
        found = measure(runs, row, module, base)
        if (module, base) in row.refused:
            message = (found.error or "none").partition("Error: ")[2]
            if message not in messages:
                messages.append(message)
            texts.append(f"refused, {messages.index(message) + 1}")
        elif found.error is not None:
            texts.append("fails")
        else:
            parts = (
                [] if base == "single" else [number(found.difference) + " apart" * (base == "ddp" and bool(row.apart))]
            )
            texts.append(", ".join([*parts, "exact" if found.resumed == 0 else f"resumed {number(found.resumed)} off"]))
    return texts


def relation(runs: Mapping[Any, Any], row: Row, module: str) -> str:
    """Return what a row is to other rows, over all bases."""
    found = [measure(runs, row, module, base) for base in BASES if (module, base) not in row.refused]
    if not found or row.name == "none":
        return ""
    if row.like is not None:
        off = max(each.like or 0.0 for each in found)
        return f"equals {row.like}" + f" but for {number(off)}" * bool(off)
    effect = f"{number(found[0].effect)} from none"
    return effect if row.beside is None else f"losses of {row.beside}; {effect}"


def single() -> list[str]:
    return [name for name, row in ROWS.items() if len(row.parts) == 1]


def change(runs: Mapping[Any, Any], name: str) -> list[str]:
    """Return the line of a technique that comes or goes."""
    found = [changed(runs, name, base) for base in BASES]
    added, removed = (number(max(pair[which].difference for pair in found)) for which in (0, 1))
    return [name, added, removed, found[0][1].warning.partition(": ")[2]]


def wrong_cells(runs: Mapping[Any, Any], row: Row) -> Sequence[str]:
    """Return what the comparison says of a wrong row on every base."""
    (module,) = row.modules
    found = [problems(measure(runs, row, module, base), row, module, base) for base in BASES]
    texts = [" ".join("; ".join(each).removeprefix("union: ").replace("|", "/").split()) for each in found]
    return [text if len(text) < 100 else f"{text[:96]} ..." for text in texts]


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, ["---"] * len(header), *lines])


if __name__ == "__main__":
    main()
