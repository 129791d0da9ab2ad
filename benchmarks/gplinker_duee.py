"""GPLinker trained from scratch on DuEE's rows, beside the dictionary of training triggers, on the same dev rows.

The baseline predicts an event type when one of its training triggers occurs in the sentence; it names no arguments.
With `--run`, a run that exists is evaluated instead of training one.

    KEXUE_DATA=FOLDER python benchmarks/gplinker_duee.py [--run DIR] [--json FILE] [KEY=VALUE ...]
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
from kexue.data.baselines import TriggerDictionary
from kexue.data.events import EventDataModule
from kexue.data.records import TRIGGER_ROLE
from kexue.lightning_modules.extraction.gplinker import plain_events
from kexue.nn.decoding import EventScores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args()
    root = os.environ.get("KEXUE_DATA") or parser.error("set KEXUE_DATA to the folder of the data sets")
    run, seconds = options.run, None
    if run is None:
        run = Path(tempfile.mkdtemp(prefix="gplinker_duee-")) / "run"
        start = time.perf_counter()
        arguments = ["fit", "experiment=gplinker_event", f"data.root={root}", "logger=csv", f"run_dir={run}"]
        if kexue([*arguments, *options.overrides]):
            raise SystemExit(1)
        seconds = time.perf_counter() - start
    metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    data = EventDataModule(root=root)
    data.prepare()
    dictionary = TriggerDictionary.fit(data.records("train"))
    scores = EventScores(trigger_role=TRIGGER_ROLE)
    for record in data.records("test"):
        scores.update([plain_events(dictionary.predict(record))], [plain_events(record)])
    baseline = {name: float(value) for name, value in scores.compute().items()}
    columns = ("type_f1", "type_precision", "type_recall", "argument_f1", "event_f1")
    rows = [
        {"system": "dictionary of triggers", **{name: baseline[name] for name in columns}, "minutes": 0.0},
        {
            "system": "gplinker_event",
            **{name: metrics[f"test/{name}"] for name in columns},
            "minutes": "" if seconds is None else seconds / 60,
        },
    ]
    report("event extraction on DuEE's dev sample", rows, options.json)


if __name__ == "__main__":
    main()
