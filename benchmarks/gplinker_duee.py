"""A model of events trained from scratch on DuEE's rows, beside dictionaries of training, on the same dev rows.

The baselines predict an event type when one of its training triggers occurs in the sentence; the second also names the
words that played a role in such an event in training. Beside the tagger stand its right tags, read as its answers are:
more than they say it cannot reach. With `--run`, a run that exists is evaluated instead of training one.

    KEXUE_DATA=FOLDER python benchmarks/gplinker_duee.py [--experiment lic2020_event] [--run DIR] [--json FILE]
        [KEY=VALUE ...]
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
from kexue.data.baselines import ArgumentDictionary, TriggerDictionary
from kexue.data.events import EventDataModule
from kexue.data.records import TRIGGER_ROLE, EventRecord
from kexue.lightning_modules.extraction.gplinker import plain_events
from kexue.lightning_modules.extraction.lic2020_event import Lic2020Event, plain_arguments
from kexue.nn.decoding import ArgumentScores, EventScores

FIGURES = {
    "gplinker_event": ("type_f1", "type_precision", "type_recall", "argument_f1", "event_f1"),
    "lic2020_event": ("f1", "precision", "recall", "lcs_f1", "type_f1", "type_precision", "type_recall"),
}


def measure(
    found: list[tuple[EventRecord, EventRecord]], data: EventDataModule, columns: tuple[str, ...]
) -> dict[str, float]:
    """Figures of predicted and gold records."""
    if "event_f1" in columns:
        events = EventScores(trigger_role=TRIGGER_ROLE)
        events.update([plain_events(one) for one, _ in found], [plain_events(gold) for _, gold in found])
        scores = events.compute()
    else:
        arguments = ArgumentScores([kind for kind, _ in data.labels], trigger_role=TRIGGER_ROLE)
        arguments.update([plain_arguments(one) for one, _ in found], [plain_arguments(gold) for _, gold in found])
        scores = arguments.compute()
    return {column: float(scores[column]) for column in columns}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--experiment", choices=FIGURES, default="gplinker_event")
    parser.add_argument("--run", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args()
    root = os.environ.get("KEXUE_DATA") or parser.error("set KEXUE_DATA to the folder of the data sets")
    run, seconds = options.run, None
    if run is None:
        run = Path(tempfile.mkdtemp(prefix=f"{options.experiment}-")) / "run"
        start = time.process_time()
        arguments = ["fit", f"experiment={options.experiment}", f"data.root={root}", "logger=csv", f"run_dir={run}"]
        if kexue([*arguments, *options.overrides]):
            raise SystemExit(1)
        seconds = time.process_time() - start
    metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    data = EventDataModule(root=root)
    data.prepare()
    columns = FIGURES[options.experiment]
    rows = []
    for name, kind in (("dictionary of triggers", TriggerDictionary), ("and of arguments", ArgumentDictionary)):
        dictionary = kind.fit(data.records("train"))
        found = [(dictionary.predict(record), record) for record in data.records("test")]
        rows.append({"system": name, **measure(found, data, columns), "processor minutes": 0.0})
    for output in ("unique", "multi") if options.experiment == "lic2020_event" else ():
        module, found = Lic2020Event(**data.model_arguments(), output=output), []
        for batch in data.test_dataloader():
            found += zip(module.records_of(module.gold_tags(batch), batch), batch["records"], strict=True)
        rows.append({"system": f"right tags, {output}", **measure(found, data, columns), "processor minutes": 0.0})
    rows.append(
        {
            "system": options.experiment,
            **{column: metrics[f"test/{column}"] for column in columns},
            "processor minutes": "" if seconds is None else seconds / 60,
        }
    )
    report("event extraction on DuEE's dev sample", rows, options.json)


if __name__ == "__main__":
    main()
