"""A Transformer of 1000 layers: how far one update moves its output, and whether it trains, by the place of the norm.

Update: the root mean square change of the normalised hidden states after the first step of Adam, which has the size of
the learning rate in every weight, for depths from 6 to 1000 layers. The analysis behind DeepNorm is of matrices: with
the constants for Adam, a step in those alone moves the output as far at any depth. The shifts of the norms stand behind
alpha, add up over the layers, and are what is seen when all weights move.

Training: next-character prediction on the project's own generated sentences, with Adam and without warmup, the norms
held at weight 1 and shift 0, and once with norms that train. A network that carries nothing from its input to its
output can learn how often characters occur, and stalls at the entropy of that; what one character says of the next
allows the second figure.

    python benchmarks/deepnorm_depth.py [--json FILE] [--plot FILE] [--layers 1000] [--steps 160]

With `--json results/deepnorm_depth.json` the losses go to `results/deepnorm_depth_training.json`.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections import Counter
from collections.abc import Sequence
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import torch
from common import report
from torch import Tensor, nn
from torch.nn import functional as F

from kexue.data.generators.event_sentences import event_sentences
from kexue.nn.transformer import Transformer, TransformerConfig

KINDS: dict[str, dict[str, Any]] = {
    "post": {"norm": "post"},
    "pre": {"norm": "pre"},
    "deepnorm (paper)": {"norm": "deepnorm"},
    "deepnorm (adam)": {"norm": "deepnorm", "deepnorm_constants": "adam"},
}
TRAINED = {"post": True, "deepnorm (paper)": True, "deepnorm (paper), norms train": False}  # whether norms are held
DEPTHS = (6, 12, 24, 48, 96, 192, 384, 1000)
DIM, CHARACTERS, SENTENCES = 16, 64, 2000
BATCH, LENGTH = 8, 16
RATE, SMALL_RATE = 3e-3, 1e-4


def stream() -> Tensor:
    """Ids of the most frequent characters of the generated sentences, in the order of the text."""
    text = "。".join(record.text for record in islice(event_sentences(), SENTENCES))
    ids = {character: number for number, (character, _) in enumerate(Counter(text).most_common(CHARACTERS))}
    return torch.tensor([ids[character] for character in text if character in ids])


def entropies(ids: Tensor) -> tuple[float, float]:
    """Entropy of a character, and of a character given the one before it."""
    single = _entropy(Counter(ids.tolist()))
    return single, _entropy(Counter(pairwise(ids.tolist()))) - single


def _entropy(counts: Counter[Any]) -> float:
    total = counts.total()
    return -sum(count / total * math.log(count / total) for count in counts.values())


def make(kind: str, layers: int, seed: int = 0) -> Transformer:
    """A narrow causal network; queries, keys and, without DeepNorm, all else start with Xavier's deviation."""
    torch.manual_seed(seed)
    config = TransformerConfig(
        CHARACTERS,
        dim=DIM,
        num_layers=layers,
        num_heads=2,
        feedforward_dim=2 * DIM,
        dropout=0.0,
        max_length=LENGTH,
        positions="learned",
        activation="relu",
        mask="causal",
        heads=("lm",),
        initialisation="xavier",
        init_std=DIM**-0.5,
        **KINDS[kind],
    )
    return Transformer(config)


def batch_of(ids: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Inputs and next characters, `(B, T)` each."""
    starts = torch.randint(len(ids) - LENGTH, (BATCH, 1), generator=generator)
    places = starts + torch.arange(LENGTH + 1)
    return ids[places[:, :-1]], ids[places[:, 1:]]


def loss_of(module: Transformer, inputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(module.logits(module(inputs)).flatten(0, 1), targets.flatten())


def update_size(kind: str, layers: int, ids: Tensor, seed: int, weights: str = "all") -> float:
    """Root mean square change of the output, whose own is 1, by a small step of Adam in all weights or in matrices."""
    module = make(kind, layers, seed)
    if weights == "matrices":
        matrices = {id(parameter) for parameter in module.layers.blocks.parameters() if parameter.dim() == 2}
        for parameter in module.parameters():
            parameter.requires_grad_(id(parameter) in matrices)
    inputs, targets = batch_of(ids, torch.Generator().manual_seed(seed))
    with torch.no_grad():
        before = module(inputs)
    loss_of(module, inputs, targets).backward()
    torch.optim.Adam((p for p in module.parameters() if p.requires_grad), lr=SMALL_RATE, fused=True).step()
    with torch.no_grad():
        return float((module(inputs) - before).square().mean().sqrt())


def losses(kind: str, layers: int, ids: Tensor, steps: int, hold_norms: bool = True, seed: int = 0) -> list[float]:
    """The loss of every step."""
    module, generator = make(kind, layers, seed), torch.Generator().manual_seed(seed)
    for part in module.modules():
        if isinstance(part, nn.LayerNorm):
            part.requires_grad_(not hold_norms)
    optimizer = torch.optim.Adam((p for p in module.parameters() if p.requires_grad), lr=RATE, fused=True)
    found = []
    for _ in range(steps):
        loss = loss_of(module, *batch_of(ids, generator))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


def draw(
    path: str, updates: Sequence[dict[str, Any]], curves: dict[str, list[float]], layers: int, ids: Tensor
) -> None:
    """Three panels: update size by depth in all weights and in matrices, and losses of the deep networks."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (*panels, right) = plt.subplots(1, 3, figsize=(15, 4.4), layout="constrained")
    colours = dict(zip(KINDS, ("tab:red", "tab:orange", "tab:blue", "tab:green"), strict=True))
    for panel, weights, words in zip(panels, ("all", "matrices"), ("in all weights", "in matrices"), strict=True):
        rows = [row for row in updates if row["weights"] == weights]
        for kind, colour in colours.items():
            panel.loglog([row["layers"] for row in rows], [row[kind] for row in rows], "o-", color=colour, label=kind)
        title = f"First step of Adam, rate {SMALL_RATE:g}, {words}"
        panel.set(xlabel="layers", ylabel="RMS change of the output", title=title, ylim=(3e-4, 20))
        panel.legend(loc="upper left")
        panel.grid(alpha=0.3)
    for name, curve in curves.items():
        colour, style = (colours[name], "-") if name in colours else ("tab:purple", "--")
        right.plot(curve, color=colour, alpha=0.25, linewidth=1)
        right.plot(range(9, len(curve)), _running(curve, 10), style, color=colour, label=name)
    for height, words in zip(entropies(ids), ("", ", given the one before"), strict=True):
        right.axhline(height, color="grey", linestyle="--", linewidth=1)
        right.annotate(
            f"entropy of a character{words}", (0, height), (0, -3), textcoords="offset points", va="top", color="grey"
        )
    title = f"{layers} layers, Adam {RATE:g}, no warmup, norms held"
    right.set(xlabel="step", ylabel="loss (nats a character)", title=title, ylim=(1.75, None))
    right.legend(loc="upper right")
    right.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def _running(values: Sequence[float], width: int) -> list[float]:
    return [statistics.fmean(values[end - width : end]) for end in range(width, len(values) + 1)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json")
    parser.add_argument("--plot")
    parser.add_argument("--layers", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=160)
    arguments = parser.parse_args()
    ids = stream()

    updates = []
    for weights in ("all", "matrices"):
        for depth in DEPTHS:
            seeds = range(3 if depth < 100 else 1)
            sizes = {k: statistics.fmean(update_size(k, depth, ids, seed, weights) for seed in seeds) for k in KINDS}
            updates.append({"weights": weights, "layers": depth, **sizes})
    report(f"DeepNorm: change of the output by the first step of Adam, rate {SMALL_RATE:g}", updates, arguments.json)

    curves = {}
    for name, hold_norms in TRAINED.items():
        kind = name.removesuffix(", norms train")
        curves[name] = losses(kind, arguments.layers, ids, arguments.steps, hold_norms)
    single, pair = entropies(ids)
    rows = [
        {
            "steps": f"{end - 20} to {end}",
            **{name: statistics.fmean(curve[end - 20 : end]) for name, curve in curves.items()},
            "entropy": single,
            "given one": pair,
        }
        for end in range(20, arguments.steps + 1, 20)
    ]
    second = None
    if arguments.json:
        path = Path(arguments.json)
        second = path.with_name(f"{path.stem}_training{path.suffix}")
    report(f"DeepNorm: mean loss at {arguments.layers} layers, Adam {RATE:g} without warmup", rows, second)
    if arguments.plot:
        draw(arguments.plot, updates, curves, arguments.layers, ids)


if __name__ == "__main__":
    main()
