"""Named entities trained from scratch on the real rows, beside the dictionary of training spans, on the same dev rows.

The baseline finds, from left to right, the longest piece of text that was a span in training. With `--run`, a run that
exists is evaluated instead of training one.

    KEXUE_DATA=FOLDER python benchmarks/ner.py --set cluener --model ner_crf [--run DIR] [--json FILE] [KEY=VALUE ...]

The sets are those of the experiments ner_SET, and daguan (daguan_2019, `--model daguan_ie`).
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

from common import report

from kexue.cli.config import load_run, plain
from kexue.cli.main import main as kexue
from kexue.cli.session import make_data
from kexue.data.ner import NerDataModule
from kexue.data.span_dictionary import SpanDictionary
from kexue.lightning_modules.extraction.ner import plain_spans
from kexue.nn.decoding import TypedScores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--set", choices=["cluener", "resume", "weibo", "daguan"], required=True)
    parser.add_argument("--model", choices=["ner_crf", "ner_global_pointer", "daguan_ie"], required=True)
    parser.add_argument("--run", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args()
    root = os.environ.get("KEXUE_DATA") or parser.error("set KEXUE_DATA to the folder of the data sets")
    run, seconds = options.run, None
    if run is None:
        run = Path(tempfile.mkdtemp(prefix="ner-")) / "run"
        start = time.process_time()
        experiment = "daguan_2019" if options.set == "daguan" else f"ner_{options.set}"
        chosen = [f"experiment={experiment}", f"model={options.model}", f"data.root={root}", f"run_dir={run}"]
        if kexue(["fit", *chosen, "logger=csv", *options.overrides]):
            raise SystemExit(1)
        seconds = time.process_time() - start
    metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    data = make_data(plain(load_run(run, []), run), None)
    types = data.model_arguments()["types"]
    assert isinstance(data, NerDataModule)
    dictionary, scores = SpanDictionary.fit(data.records("train"), data.parts.separator), TypedScores(types)
    for record in data.records("test"):
        scores.update([plain_spans(dictionary.predict(record))], [plain_spans(record)])
    baseline = {name: float(value) for name, value in scores.compute().items()}
    columns = ("f1", "precision", "recall", "macro_f1", *(f"f1/{kind}" for kind in types))
    rows = [
        {
            "system": "dictionary of training spans",
            **{name: baseline.get(name, "") for name in columns},
            "processor minutes": 0.0,
        },
        {
            "system": options.model,
            **{name: metrics.get(f"test/{name}", "") for name in columns},
            "processor minutes": "" if seconds is None else seconds / 60,
        },
    ]
    report(f"named entities on the dev rows of {options.set}", rows, options.json)


if __name__ == "__main__":
    main()
