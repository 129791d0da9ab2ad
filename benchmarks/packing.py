"""Tokens/s of training on texts of real lengths: padded random batches, length buckets, and packed rows.

One step is forward, a masked-token loss on 15 % of the tokens, backward and fused AdamW, on one Transformer. The random
batches of 32 are the same texts in the same order for the padded and the packed way, and their losses are compared
before anything is timed (without dropout). Texts are the training sentences of DuEE and DuIE and the sentences of
LCQMC, one token a character with [CLS] and [SEP]. A packed row holds `--budget` tokens at most, or the longest text
where that is more: without a kernel for variable lengths, longer rows cost more attention than they save padding.
As many batches are timed as bring their padding near that of the whole set, which stands beside it: one long question
decides how wide a batch of LCQMC is, so its batches differ from 1.5 to 2.5 and a few of them say little.

    KEXUE_DATA=FOLDER python benchmarks/packing.py [--json FILE] [--shape small] [--batches N] [--budget 256]
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from common import in_turn, median_and_spread, report
from torch.nn import functional as F

from kexue.data.packing import PackingCollator, padding_ratio
from kexue.data.sampling import LengthBucketSampler
from kexue.nn.transformer import Transformer, TransformerConfig

SHAPES = {"small": (384, 6, 6, 1536), "bert_base": (768, 12, 12, 3072)}
BUDGETS = {"DuEE": 256, "DuIE": 256, "LCQMC": 96}
BATCHES = {"DuEE": 6, "DuIE": 6, "LCQMC": 40}
VOCABULARY, BATCH, IGNORED = 21128, 32, -100
Batch = dict[str, Any]


def texts_of(name: str, folder: Path) -> list[str]:
    """The training texts of one data set."""
    if name == "DuEE":
        lines = (folder / "event_extraction_duee" / "duee_train.json").read_text(encoding="utf-8").splitlines()
        return [json.loads(line)["text"] for line in lines]
    if name == "DuIE":
        with gzip.open(folder / "relation_extraction_duie" / "duie_train.json.gz", "rt", encoding="utf-8") as file:
            return [json.loads(line)["text"] for line in file]
    with gzip.open(folder / "text_similarity" / "lcqmc_train.txt.gz", "rt", encoding="utf-8") as file:
        return [sentence for line in file for sentence in line.split("\t")[:2]]


def examples_of(texts: Iterable[str]) -> list[dict[str, list[int]]]:
    """Ids of the characters, and as labels those of every seventh token or so: what a masked-token loss is taken on."""
    examples = []
    for text in texts:
        ids = [101, *(ord(character) % (VOCABULARY - 200) + 200 for character in text), 102]
        labels = [token if place % 7 == 1 else IGNORED for place, token in enumerate(ids)]
        examples.append({"ids": ids, "labels": labels})
    return examples


def lengths_of(batches: list[list[dict[str, list[int]]]]) -> list[list[int]]:
    """Tokens of each sequence of each batch."""
    return [[len(example["ids"]) for example in batch] for batch in batches]


def padded(examples: list[dict[str, list[int]]]) -> Batch:
    """One row for each sequence."""
    longest = max(len(example["ids"]) for example in examples)
    batch = {
        name: torch.tensor([example[name] + [fill] * (longest - len(example[name])) for example in examples])
        for name, fill in (("ids", 0), ("labels", IGNORED))
    }
    return batch | {"mask": batch["ids"] != 0}


def packed(examples: list[dict[str, list[int]]], budget: int) -> Batch:
    """Rows of several sequences, none longer than the budget or the longest text."""
    longest = max(len(example["ids"]) for example in examples)
    return PackingCollator(max(budget, longest), {"ids": 0, "labels": IGNORED})(examples)  # type: ignore[arg-type]


def loss_of(model: Transformer, batch: Batch) -> torch.Tensor:
    """Mean loss of the masked tokens."""
    if "sequences" in batch:
        hidden = model(batch["ids"], sequences=batch["sequences"], positions=batch["positions"])
    else:
        hidden = model(batch["ids"], batch["mask"])
    chosen = batch["labels"] != IGNORED
    return F.cross_entropy(model.logits(hidden[chosen]), batch["labels"][chosen])


def make_model(shape: str, dropout: float) -> Transformer:
    torch.manual_seed(0)
    dim, layers, heads, inner = SHAPES[shape]
    return Transformer(
        TransformerConfig(
            VOCABULARY,
            dim,
            layers,
            heads,
            inner,
            dropout,
            positions="learned",
            norm="post",
            num_segments=2,
            initialisation="normal",
            heads=("masked_lm",),
        )
    )


def stepper(model: Transformer, batches: list[Batch]) -> Callable[[], float]:
    """A function that takes one step on each batch and returns the seconds."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def run() -> float:
        start = time.perf_counter()
        for batch in batches:
            loss_of(model, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
        return time.perf_counter() - start

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json")
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--batches", type=int, help="batches of 32; by default 6, and 40 for LCQMC")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--budget", type=int, help="tokens of a row; by default 256, and 96 for LCQMC")
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--data", nargs="+", default=["DuEE", "DuIE", "LCQMC"])
    arguments = parser.parse_args()
    rows = []
    for name in arguments.data:
        every = examples_of(texts_of(name, Path(os.environ["KEXUE_DATA"])))
        order = torch.randperm(len(every), generator=torch.Generator().manual_seed(0)).tolist()
        count = arguments.batches or BATCHES[name]
        shuffled = [[every[i] for i in order[b : b + BATCH]] for b in range(0, len(order) - BATCH + 1, BATCH)]
        random = shuffled[:count]
        sampler = LengthBucketSampler([len(example["ids"]) for example in every], BATCH, num_replicas=1, rank=0)
        buckets = [[every[i] for i in indices] for indices, _ in zip(sampler, range(count), strict=False)]
        exact = make_model(arguments.shape, 0.0)
        budget = arguments.budget or BUDGETS[name]
        losses = [loss_of(exact, batch).item() for batch in (padded(random[0]), packed(random[0], budget))]
        ways = {
            "padded": (random, [padded(examples) for examples in random]),
            "buckets": (buckets, [padded(examples) for examples in buckets]),
            "packed": (random, [packed(examples, budget) for examples in random]),
        }
        runs = {way: stepper(make_model(arguments.shape, arguments.dropout), made) for way, (_, made) in ways.items()}
        for run in runs.values():
            run()
        seconds = in_turn(runs, arguments.repeats)
        speed = {}
        for way, (examples, _) in ways.items():
            tokens = sum(len(example["ids"]) for batch in examples for example in batch)
            speed[way] = [tokens / second for second in seconds[way]]
        plain = median_and_spread(speed["padded"])[0]
        for way, (examples, _) in ways.items():
            middle, spread = median_and_spread(speed[way])
            lengths = lengths_of(examples)
            rows.append(
                {
                    "data": name,
                    "shape": arguments.shape,
                    "batches": way,
                    "with padding / real": padding_ratio(
                        lengths, max(budget, max(map(max, lengths))) if way == "packed" else None
                    ),
                    "of the whole set": padding_ratio(lengths_of(shuffled)) if way == "padded" else "",
                    "tokens/s": middle,
                    "+-": spread,
                    "x padded": middle / plain,
                    "loss difference": abs(losses[0] - losses[1]) if way == "packed" else "",
                }
            )
    report("packing: training on real lengths, batches of 32", rows, arguments.json)


if __name__ == "__main__":
    main()
