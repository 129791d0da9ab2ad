"""Models of relations trained from scratch on DuIE, beside dictionaries of its training rows, on the same dev rows.

The first baseline predicts a relation of training whose spans all occur in the sentence; the second one a predicate
between any word that was its subject in training and any that was its object. With `--run`, a run that exists is
evaluated instead of training one.

    KEXUE_DATA=FOLDER python benchmarks/relation_duie.py [--run DIR] [--json FILE] [KEY=VALUE ...]
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

from common import report

from kexue.cli.main import main as kexue
from kexue.data.baselines import RelationDictionary, RelationWords
from kexue.data.relations import RelationDataModule
from kexue.lightning_modules.extraction.relations import plain_relations
from kexue.nn.decoding import TypedScores

COLUMNS = ("f1", "precision", "recall")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args()
    root = os.environ.get("KEXUE_DATA") or parser.error("set KEXUE_DATA to the folder of the data sets")
    run, seconds = options.run, None
    if run is None:
        run = Path(tempfile.mkdtemp(prefix="relation_duie-")) / "run"
        start = time.process_time()
        arguments = ["fit", "experiment=relation_extraction_duie", f"data.root={root}", "logger=csv", f"run_dir={run}"]
        if kexue([*arguments, *options.overrides]):
            raise SystemExit(1)
        seconds = time.process_time() - start
    metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    data = RelationDataModule(root=root)
    data.prepare()
    rows = []
    for name, kind in (("known relations", RelationDictionary), ("known words", RelationWords)):
        baseline = kind.fit(data.records("train"))
        scores = TypedScores([predicate for predicate, _ in data.labels])
        for record in data.records("test"):
            scores.update([plain_relations(baseline.predict(record))], [plain_relations(record)])
        found = scores.compute()
        rows.append({"system": name, **{column: found[column].item() for column in COLUMNS}, "processor minutes": 0.0})
    model = next((word.removeprefix("model=") for word in options.overrides if word.startswith("model=")), None)
    rows.append(
        {
            "system": model or "gplinker_relation",
            **{column: metrics[f"test/{column}"] for column in COLUMNS},
            "processor minutes": "" if seconds is None else seconds / 60,
        }
    )
    report("relation extraction on DuIE's dev sample", rows, options.json)


if __name__ == "__main__":
    main()
