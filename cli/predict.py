"""Predict on a file with a trained run, in the answer format of its data set.

usage: kexue predict run=FOLDER input=FILE output=FILE [checkpoint=best|last|PATH] [KEY=VALUE ...]

  kexue predict run=runs/gplinker_event/1234 input=duee_test.json output=answers.json

FOLDER is the run directory of `kexue fit`, whatever strategy trained it; the training data are not needed. The output
appears whole or not at all.
"""

from __future__ import annotations


def run(args: list[str]) -> int:
    """Predict; see the module's help."""
    from pathlib import Path

    from .arguments import take
    from .logs import log_to
    from .saved import open_saved

    words, overrides = take(args, {"run": None, "input": None, "output": None, "checkpoint": "best"})
    source, output = Path(words["input"]).expanduser(), Path(words["output"]).expanduser()
    saved = open_saved(words["run"], words["checkpoint"], overrides)
    with log_to(saved.folder):
        from .session import Predictions

        predictions = Predictions()
        data, model, trainer = saved.prepare(predictions)
        data.read_inputs(source)
        output.parent.mkdir(parents=True, exist_ok=True)
        trainer.predict(model, datamodule=data, return_predictions=False)
        rows = data.write_answers(predictions.records, output)
    print(f"{rows} rows in {output}")
    return 0
