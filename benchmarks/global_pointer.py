"""A training step of GlobalPointer's heads and loss against bert4torch's, without an encoder.

Hidden states (batch 16, 128 tokens, 384 features) and two spans of each of three types in a sentence are the
same; so are the weights, and losses and gradients are compared before anything is timed. Memory is what the graph
keeps for the backward pass, each storage once, in MiB.

    pip install --no-deps bert4torch==0.5.3 torch4keras==0.2.8 six     # newer ones need torchvision
    OMP_NUM_THREADS=1 python benchmarks/global_pointer.py [--json FILE] [--repeats 3]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from bert4torch.layers.global_point import EfficientGlobalPointer as TheirEfficient
from bert4torch.layers.global_point import GlobalPointer as TheirStandard
from bert4torch.losses import SparseMultilabelCategoricalCrossentropy
from common import in_turn, median_and_spread, report
from torch import Tensor, nn

from kexue.nn.heads import HEADS
from kexue.nn.losses import multilabel_pointer_loss

BATCH, LENGTH, DIM, HEAD_SIZE = 16, 128, 384, 64
KINDS, POSITIVES = 3, 2  # types that a sentence has, and spans of each: more than in CLUENER
THEIRS: dict[str, type[nn.Module]] = {"standard": TheirStandard, "efficient": TheirEfficient}


def same_weights(kind: str, ours: nn.Module, theirs: nn.Module) -> None:
    """Bring our weights into the order of theirs: queries before keys, where the efficient form alternates."""
    state = dict(ours.named_parameters())
    with torch.no_grad():
        if kind == "standard":
            theirs.dense.weight.copy_(state["projection.weight"])
            theirs.dense.bias.copy_(state["projection.bias"])
            return
        order = torch.cat((torch.arange(0, 2 * HEAD_SIZE, 2), torch.arange(1, 2 * HEAD_SIZE, 2)))
        theirs.p_dense.weight.copy_(state["projection.weight"][order])
        theirs.p_dense.bias.copy_(state["projection.bias"][order])
        # Theirs adds the even bias to rows (starts) and the odd one to columns; ours has ends first.
        pairs = torch.arange(state["bias.weight"].shape[0]).view(-1, 2).flip(1).flatten()
        theirs.q_dense.weight.copy_(state["bias.weight"][pairs][:, order])
        theirs.q_dense.bias.copy_(state["bias.bias"][pairs])


def labels_of(num_types: int) -> tuple[Tensor, Tensor]:
    """Positive cells as ours, rows (type, start, end) `(B, P, 3)`, and as theirs, flat ones `(B, H, P)`, 0 for none."""
    generator = torch.Generator().manual_seed(0)
    ours = torch.zeros(BATCH, KINDS * POSITIVES, 3, dtype=torch.long)
    theirs = torch.zeros(BATCH, num_types, POSITIVES, dtype=torch.long)
    for row in range(BATCH):
        for place, kind in enumerate(torch.randperm(num_types, generator=generator)[:KINDS].tolist()):
            for number in range(POSITIVES):
                start = int(torch.randint(1, LENGTH - 8, (1,), generator=generator))
                end = start + number + 1  # no cell twice
                ours[row, place * POSITIVES + number] = torch.tensor([kind, start, end])
                theirs[row, kind, number] = start * LENGTH + end
    return ours, theirs


def kept_bytes(step: Callable[[], Tensor]) -> int:
    """Bytes that a forward pass keeps for the backward pass."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = step()
    del loss
    return sum(kept.values())


def measure(kind: str, num_types: int, repeats: int) -> dict[str, object]:
    """One row of the table."""
    torch.manual_seed(0)
    hidden = torch.randn(BATCH, LENGTH, DIM, requires_grad=True)
    mask = torch.ones(BATCH, LENGTH, dtype=torch.long)
    ours: nn.Module = HEADS[kind](DIM, num_types, HEAD_SIZE)  # type: ignore[index]
    theirs = THEIRS[kind](DIM, num_types, HEAD_SIZE)
    same_weights(kind, ours, theirs)
    our_labels, their_labels = labels_of(num_types)
    their_loss = SparseMultilabelCategoricalCrossentropy(mask_zero=True)

    def us() -> Tensor:
        return multilabel_pointer_loss(ours.compact(hidden, mask), our_labels)  # type: ignore[operator]

    def them() -> Tensor:
        return their_loss(theirs(hidden, mask).flatten(2), their_labels).sum(1).mean()

    def gradient(step: Callable[[], Tensor]) -> Tensor:
        hidden.grad = None
        step().backward()
        assert hidden.grad is not None
        return hidden.grad

    def seconds(step: Callable[[], Tensor]) -> float:
        begin = time.process_time()
        step().backward()
        return time.process_time() - begin

    torch.testing.assert_close(us(), them(), rtol=1e-4, atol=1e-4)
    # One entry in 700 differs in the fourth digit at 200 heads; ours are those of float64 to 1e-6.
    torch.testing.assert_close(gradient(us), gradient(them), rtol=1e-3, atol=2e-3)
    times = in_turn({"kexue": lambda: seconds(us), "bert4torch": lambda: seconds(them)}, repeats)
    (our_time, spread), (their_time, _) = (median_and_spread(times[name]) for name in ("kexue", "bert4torch"))
    our_bytes, their_bytes = kept_bytes(us), kept_bytes(them)
    return {
        "head": kind,
        "types": num_types,
        "kexue, ms": 1000 * our_time,
        "spread": 1000 * spread,
        "bert4torch, ms": 1000 * their_time,
        "ratio": f"{their_time / our_time:.1f}",
        "kexue, MiB": our_bytes / 2**20,
        "bert4torch, MiB": their_bytes / 2**20,
        "share of memory": f"{our_bytes / their_bytes:.2f}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="file to write the figures to")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = [measure(kind, types, options.repeats) for types in (10, 200) for kind in ("standard", "efficient")]
    report("GlobalPointer, heads and loss", rows, options.json)


if __name__ == "__main__":
    main()
