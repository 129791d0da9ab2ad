"""The dictionary of names beside a Python dict of all prefixes: time to build, texts searched a second, memory.

Names are put together from the project's word lists, texts are its generated sentences with a name in each. Both find
the same occurrences, which is checked first. The dict is searched as it usually is: from each character on, for as long
as the characters so far are a prefix. `numbers` looks up whole names.

Memory is what two processes that have loaded the names and searched all texts take together (proportional set size,
which divides shared pages among those who share them), less what they took before, and halved. The dict is built in
each, our file is mapped by both.

    python benchmarks/entity_dictionary.py [--json FILE] [--names 1000000] [--texts 5000] [--repeats 3]
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import psutil
from common import in_turn, median_and_spread, report

from kexue.data.arrays import open_arrays, save_arrays
from kexue.data.dictionary import NameDictionary
from kexue.data.generators import words
from kexue.data.generators.event_sentences import event_sentences

KIND = {"holds": "names"}
KINDS: list[Callable[[Random], str]] = [
    words.person,
    lambda random: words.place(random) + words.company(random),
    lambda random: words.place(random) + words.organisation(random),
    lambda random: words.company(random) + words.product(random),
]
Prefixes = dict[str, int]


def some_names(count: int) -> list[str]:
    random, names = Random("names"), set()
    while len(names) < count:
        names.add(random.choice(KINDS)(random))
    return sorted(names)


def some_texts(count: int, names: Sequence[str]) -> list[str]:
    random = Random("texts")
    return [record.text + random.choice(names) + "。" for record in islice(event_sentences(), count)]


def prefixes_of(names: Sequence[str]) -> Prefixes:
    prefixes: Prefixes = {}
    for number, name in enumerate(names):
        for size in range(1, len(name)):
            prefixes.setdefault(name[:size], -1)
        prefixes[name] = number
    return prefixes


def search(prefixes: Prefixes, texts: Sequence[str]) -> list[tuple[int, int, int, int]]:
    found = []
    for row, text in enumerate(texts):
        for start in range(len(text)):
            for end in range(start + 1, len(text) + 1):
                number = prefixes.get(text[start:end])
                if number is None:
                    break
                if number >= 0:
                    found.append((row, start, end, number))
    return found


def search_arrays(dictionary: NameDictionary, texts: Sequence[str], batch: int) -> int:
    return sum(len(dictionary.find(texts[first : first + batch])) for first in range(0, len(texts), batch))


def timed(function: Callable[[], Any]) -> float:
    """Seconds of one call, by the processor's clock."""
    gc.collect()
    start = time.process_time()
    function()
    return time.process_time() - start


def hold(system: str, path: str, names: Sequence[str], texts: Sequence[str], steps: Any, results: Any) -> None:
    """Load, search, and say how much memory that takes while the other process does the same."""
    gc.collect()
    steps.wait()
    before = psutil.Process().memory_full_info().pss
    steps.wait()
    if system == "dict":
        held: Any = prefixes_of(names)
        search(held, texts)
    else:
        held = NameDictionary(open_arrays(path, KIND))
        search_arrays(held, texts, 64)
    gc.collect()
    steps.wait()
    results.put(psutil.Process().memory_full_info().pss - before)
    steps.wait()


def memory(system: str, path: Path, names: Sequence[str], texts: Sequence[str]) -> float:
    """MB a process, of two."""
    context = multiprocessing.get_context("spawn")
    steps, results = context.Barrier(2), context.Queue()
    given = list(names) if system == "dict" else []
    arguments = (system, str(path), given, list(texts), steps, results)
    processes = [context.Process(target=hold, args=arguments) for _ in range(2)]
    for process in processes:
        process.start()
    taken = [results.get() for _ in processes]
    for process in processes:
        process.join()
    return sum(taken) / len(taken) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="file to write the figures to")
    parser.add_argument("--names", type=int, default=1_000_000)
    parser.add_argument("--texts", type=int, default=5000)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    names = some_names(options.names)
    texts = some_texts(options.texts, names)
    dictionary, prefixes = NameDictionary.build(names), prefixes_of(names)
    found = dictionary.find(texts[:500])
    columns = (part.tolist() for part in (found.text, found.start, found.end, found.name))
    assert list(zip(*columns, strict=True)) == search(prefixes, texts[:500])

    runs = {
        "arrays, texts/s": lambda: len(texts) / timed(lambda: search_arrays(dictionary, texts, 64)),
        "arrays, texts/s alone": lambda: 1000 / timed(lambda: search_arrays(dictionary, texts[:1000], 1)),
        "arrays, names/s": lambda: 100_000 / timed(lambda: dictionary.numbers(names[:100_000])),
        "dict, texts/s": lambda: len(texts) / timed(lambda: search(prefixes, texts)),
        "dict, names/s": lambda: 100_000 / timed(lambda: [prefixes.get(name, -1) for name in names[:100_000]]),
    }
    speeds = in_turn(runs, options.repeats)
    builds = in_turn(
        {
            "arrays": lambda: timed(lambda: NameDictionary.build(names)),
            "dict": lambda: timed(lambda: prefixes_of(names)),
        },
        options.repeats,
    )
    nodes, size = len(dictionary.arrays["names"]), dictionary.num_bytes / 1e6
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "names.safetensors"
        save_arrays(dictionary.arrays, path, KIND)
        opening = timed(lambda: NameDictionary(open_arrays(path, KIND)))
        held = {system: memory(system, path, names, texts) for system in ("arrays", "dict")}

    def row(title: str, system: str, ready: float | None) -> dict[str, Any]:
        speed, spread = median_and_spread(speeds[f"{system}, texts/s"])
        own = system == "arrays"
        return {
            "system": title,
            "names": len(names),
            "nodes": nodes if own else len(prefixes),
            "build, s": median_and_spread(builds[system])[0],
            "open, ms": "" if ready is None else 1000 * ready,
            "texts/s": round(speed),
            "spread": round(spread),
            "one text at a time": round(median_and_spread(speeds["arrays, texts/s alone"])[0]) if own else round(speed),
            "whole names/s": round(median_and_spread(speeds[f"{system}, names/s"])[0]),
            "file, MB": round(size, 1) if own else "",
            "MB a process, of two": round(held[system], 1),
        }

    rows = [row("mapped arrays, batches of 64", "arrays", opening), row("dict of prefixes", "dict", None)]
    report("dictionary of names", rows, options.json)
    print(
        f"\ntexts/s {rows[0]['texts/s'] / rows[1]['texts/s']:.1f} times, memory 1/{held['dict'] / held['arrays']:.0f}"
    )


if __name__ == "__main__":
    main()
