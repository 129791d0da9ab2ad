"""The entity linker trained from scratch, beside the dictionary with the most frequent entity, on the same dev rows.

The dictionary takes every name that covers the text for a mention, of all names and of those that pruning leaves; both
are learnt from the training rows alone. With `--run`, a run that exists is evaluated instead of training one. Without
KEXUE_DATA the generated texts are used, whose names are ambiguous.

    KEXUE_DATA=FOLDER python benchmarks/entity_linking.py [--run DIR] [--json FILE] [KEY=VALUE ...]
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import report

from kexue.cli.main import main as kexue
from kexue.data.baselines import EntityDictionary
from kexue.data.lexicon import MentionLexicon
from kexue.data.linking import LinkDataModule
from kexue.lightning_modules.extraction.entity_linking import NO_TYPE, mentions, typed_links
from kexue.nn.decoding import TypedScores

FIGURES = ("f1", "precision", "recall")


def dictionary_scores(data: LinkDataModule, prune_ratio: float | None) -> dict[str, float]:
    """The dictionary's scores on the test rows."""
    knowledge = data.collator().lexicon.knowledge
    dictionary = EntityDictionary(MentionLexicon.fit(knowledge, data.records("train"), prune_ratio))
    links, spans = TypedScores([*knowledge.types, NO_TYPE]), TypedScores(["mention"])
    for record in data.records("test"):
        found = dictionary.predict(record)
        links.update([typed_links(found)], [typed_links(record)])
        spans.update([mentions(found)], [mentions(record)])
    linked, found = links.compute(), spans.compute()
    return {**{name: float(linked[name]) for name in FIGURES}, **{f"mention_{n}": float(found[n]) for n in FIGURES}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args()
    torch.set_num_threads(1)
    root = os.environ.get("KEXUE_DATA")
    run, seconds = options.run, None
    if run is None:
        run = Path(tempfile.mkdtemp(prefix="entity_linking-")) / "run"
        start = time.process_time()
        source = f"data.root={root or 'null'}"
        arguments = ["fit", "experiment=entity_linking", source, "logger=csv", f"run_dir={run}"]
        if kexue([*arguments, *options.overrides]):
            raise SystemExit(1)
        seconds = time.process_time() - start
    metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    data = LinkDataModule(root=root)
    data.prepare()
    systems: dict[str, dict[str, Any]] = {
        "dictionary, all names": dictionary_scores(data, None),
        "dictionary, pruned": dictionary_scores(data, 5.0),
        "entity_linking": {name.removeprefix("test/"): value for name, value in metrics.items()},
    }
    columns = (*FIGURES, "mention_precision", "mention_recall")
    rows = [{"system": name, **{column: scores[column] for column in columns}} for name, scores in systems.items()]
    for row in rows:
        row["processor minutes"] = "" if seconds is None or row["system"] != "entity_linking" else seconds / 60
    report(f"entity linking on {'the dev sample' if root else 'generated texts'}", rows, options.json)


if __name__ == "__main__":
    main()
