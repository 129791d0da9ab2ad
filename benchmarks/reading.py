"""Reading comprehension trained from scratch, beside the sentence with the highest character overlap, on the same rows.

The baseline answers with the sentence of the passages that has most characters of the question. Where questions may
have no answer, it withholds answers below a share of overlap that is chosen on the validation rows, as the model does
with its own threshold. With `--run`, a run that exists is evaluated instead of training one.

    KEXUE_DATA=FOLDER python benchmarks/reading.py EXPERIMENT [--run DIR] [--json FILE] [KEY=VALUE ...]
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import report

from kexue.cli.config import compose_run, plain
from kexue.cli.main import main as kexue
from kexue.cli.targets import build
from kexue.data.baselines import SentenceOverlap
from kexue.data.records import ReadingRecord
from kexue.nn.decoding import AnswerScores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("experiment")
    parser.add_argument("--run", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args()
    root = os.environ.get("KEXUE_DATA") or parser.error("set KEXUE_DATA to the folder of the data sets")
    words = [f"experiment={options.experiment}", f"data.root={root}", *options.overrides]
    run, seconds = options.run, None
    if run is None:
        run = Path(tempfile.mkdtemp(prefix=f"{options.experiment}-")) / "run"
        start = time.process_time()
        if kexue(["fit", *words, "logger=csv", f"run_dir={run}"]):
            raise SystemExit(1)
        seconds = time.process_time() - start
    metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    config = plain(compose_run(words), run)
    found = {"sentence with the highest overlap": baseline(config), options.experiment: model(metrics)}
    columns = dict.fromkeys(name for scores in found.values() for name in scores)
    rows = [{"system": system, **{name: scores.get(name, "") for name in columns}} for system, scores in found.items()]
    rows[0]["processor minutes"] = 0.0
    rows[1]["processor minutes"] = "" if seconds is None else seconds / 60
    report(f"{options.experiment}: real rows, trained from scratch", rows, options.json)


def model(metrics: dict[str, float]) -> dict[str, float]:
    """The test figures of a run."""
    kept = ("exact_match", "f1", "average", "answerable_f1", "unanswerable_accuracy")
    return {name: metrics[f"test/{name}"] for name in kept if f"test/{name}" in metrics}


def baseline(config: dict[str, Any]) -> dict[str, float]:
    """The figures of the baseline on the test rows of an experiment."""
    data = build(config["data"], "data")
    scores = AnswerScores(config["model"]["counting"], config["model"].get("abstains", False))
    if scores.abstains:
        score(scores, data.records("val"))
        scores.threshold = float(scores.compute()["threshold"])
        scores.reset()
    score(scores, data.records("test"))
    return {name: float(value) for name, value in scores.compute().items() if name != "threshold"}


def score(scores: AnswerScores, records: Sequence[ReadingRecord]) -> None:
    """Take in what the baseline says of records."""
    for record in records:
        answer, overlap = SentenceOverlap().find(record)
        scores.update(["" if answer is None else answer.text], [record.texts], [overlap])


if __name__ == "__main__":
    main()
