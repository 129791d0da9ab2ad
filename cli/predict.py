"""Predict on a file with a trained run, in the answer format of its data set.

usage: kexue predict run=FOLDER[,FOLDER ...] input=FILE output=FILE [checkpoint=best|last|PATH] [KEY=VALUE ...]

  kexue predict run=runs/gplinker_event/1234 input=duee_test.json output=answers.json
  kexue predict run=runs/fold_0,runs/fold_1,runs/fold_2 input=test.txt output=answers.txt

FOLDER is the run directory of `kexue fit`, whatever strategy trained it; the training data are not needed. Of several
runs, such as those of several folds, the answers are put together as the data set says: taggers vote on each token.
The output appears whole or not at all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from ..data.base import KexueDataModule
    from .saved import SavedRun


def run(args: list[str]) -> int:
    """Predict; see the module's help."""
    from pathlib import Path

    from .arguments import take
    from .logs import log_to
    from .saved import open_saved

    words, overrides = take(args, {"run": None, "input": None, "output": None, "checkpoint": "best"})
    source, output = Path(words["input"]).expanduser(), Path(words["output"]).expanduser()
    # All of them are checked before the first one is built.
    first, *others = [open_saved(run, words["checkpoint"], overrides) for run in words["run"].split(",")]
    with log_to(first.folder):
        data, records = _predicted(first, source)
        if others:
            records = data.combine([records, *(_predicted(saved, source)[1] for saved in others)])
        output.parent.mkdir(parents=True, exist_ok=True)
        rows = data.write_answers(records, output)
    print(f"{rows} rows in {output}")
    return 0


def _predicted(saved: SavedRun, source: Path) -> tuple[KexueDataModule, list[Any]]:
    """The data module of a run, and the records with what its model finds in them."""
    from .session import Predictions

    predictions = Predictions()
    data, model, trainer = saved.prepare(predictions)
    data.read_inputs(source)
    trainer.predict(model, datamodule=data, return_predictions=False)
    return data, predictions.records
