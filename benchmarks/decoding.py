"""A thousand sentences from text to records with trained runs, end to end: reading in, encoder, heads and decoding.

The sentences are the first training rows of each run's own data. Times are of the processor, one thread; batches are
those of `kexue predict`, and so is decoding: windows, scores, spans, and records with offsets of characters.

    python benchmarks/decoding.py RUN [RUN ...] [--rows 1000] [--repeats 3] [--json FILE]
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from common import median_and_spread, report

from kexue.cli.saved import open_saved


def timed(data: Any, model: Any) -> dict[str, float]:
    """Milliseconds of each part, and the number of records that came out."""
    parts = {"batches": 0.0, "encoder": 0.0, "heads and decoding": 0.0}
    begun = [0.0]

    def start(*_: Any) -> None:
        begun[0] = time.process_time()

    def stop(*_: Any) -> None:
        parts["encoder"] += time.process_time() - begun[0]

    hooks = [model.encoder.register_forward_pre_hook(start), model.encoder.register_forward_hook(stop)]
    records, clock = 0, time.process_time()
    for index, batch in enumerate(data.predict_dataloader()):
        fetched = time.process_time()
        records += len(list(model.predict_step(batch, index)))
        done = time.process_time()
        parts["batches"] += fetched - clock
        parts["heads and decoding"] += done - fetched
        clock = done
    parts["heads and decoding"] -= parts["encoder"]
    for hook in hooks:
        hook.remove()
    return {"records": float(records), **{name: 1000 * value for name, value in parts.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for run in options.runs:
        saved = open_saved(run, "best", [])
        data, model, _ = saved.prepare()
        data.set_records("predict", list(data.records("train"))[: options.rows])  # type: ignore[attr-defined]
        model.eval()
        with torch.inference_mode():
            turns = [timed(data, model) for _ in range(options.repeats)]
        middle = {name: median_and_spread([turn[name] for turn in turns])[0] for name in turns[0]}
        records = middle.pop("records")
        rows.append(
            {
                "experiment": saved.config["name"],
                "model": type(model).__name__,
                "sentences": round(records),
                **{f"{name}, ms": value for name, value in middle.items()},
                "sentences/s": 1000 * records / sum(middle.values()),
            }
        )
    report("a thousand sentences from text to records", rows, options.json)


if __name__ == "__main__":
    main()
