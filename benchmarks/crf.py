"""Our CRF against pytorch-crf: a training step (loss and gradients) and decoding, over full sentences.

Emissions, tags and weights are the same; losses and best paths are compared before anything is timed.

    OMP_NUM_THREADS=1 python benchmarks/crf.py [--json FILE] [--repeats 5]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from common import in_turn, median_and_spread, report
from torchcrf import CRF

from kexue.nn.heads import LinearChainCRF

LENGTH = 128


def milliseconds(function: Callable[[], object]) -> float:
    """Of one call, by the processor's clock: other processes do not count."""
    begin = time.process_time()
    function()
    return 1000 * (time.process_time() - begin)


def measure(batch: int, num_tags: int, repeats: int) -> list[dict[str, object]]:
    """Two rows of the table."""
    torch.manual_seed(0)
    ours, theirs = LinearChainCRF(num_tags), CRF(num_tags, batch_first=True)
    theirs.load_state_dict(
        {"transitions": ours.transitions, "start_transitions": ours.start, "end_transitions": ours.end}
    )
    emissions = torch.randn(batch, LENGTH, num_tags, requires_grad=True)
    mask, tags = torch.ones(batch, LENGTH, dtype=torch.bool), torch.randint(0, num_tags, (batch, LENGTH))
    with torch.no_grad():
        torch.testing.assert_close(ours(emissions, mask, tags).mean(), -theirs(emissions, tags, mask, "mean"))
        assert ours(emissions, mask).tolist() == theirs.decode(emissions, mask)
    parts = {
        "loss and gradients": (
            lambda: ours(emissions, mask, tags).mean().backward(),
            lambda: (-theirs(emissions, tags, mask, "mean")).backward(),
        ),
        "best paths": (lambda: ours(emissions, mask), lambda: theirs.decode(emissions, mask)),
    }
    rows = []
    for name, (us, them) in parts.items():
        runs = {"kexue": lambda us=us: milliseconds(us), "pytorch-crf": lambda them=them: milliseconds(them)}
        in_turn(runs, 1)
        times = in_turn(runs, repeats)
        (our_time, spread), (their_time, _) = (median_and_spread(times[key]) for key in runs)
        rows.append(
            {
                "what": name,
                "batch": batch,
                "tags": num_tags,
                "kexue, ms": our_time,
                "spread": spread,
                "pytorch-crf, ms": their_time,
                "ratio": f"{their_time / our_time:.1f}",
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="file to write the figures to")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = [row for batch in (32, 256) for tags in (20, 100) for row in measure(batch, tags, options.repeats)]
    report("CRF, sentences of 128 tokens", rows, options.json)


if __name__ == "__main__":
    main()
