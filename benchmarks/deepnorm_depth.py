"""A Transformer of 1000 layers: how far one update moves its output, and whether it trains, by the place of the norm.

Update: the root mean square change of the normalised hidden states after the first step of Adam, which has the size of
the learning rate in every weight, for depths from 6 to 1000 layers. The analysis behind DeepNorm is of matrices: with
the constants for Adam, a step in those alone moves the output as far at any depth. The shifts of the norms stand behind
alpha, add up over the layers, and are what is seen when all weights move.

Training: next-character prediction on the project's own generated sentences, with Adam, all weights trained. The norms
have the rate over their number, since what one step does to them adds up over the layers; nothing is warmed up. "one
rate" has one small rate for all weights, reached in 20 steps. A network that carries nothing from its input to its
output can learn how often characters occur, and stalls at the entropy of that; what one character says of the next
allows the second figure.

    python benchmarks/deepnorm_depth.py --part updates [--json FILE]
    python benchmarks/deepnorm_depth.py --part training [--json FILE] [--plot FILE] [--layers 1000] [--steps 200]

The plot takes the updates from benchmarks/results.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
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
TRAINED = ("post", "deepnorm (paper)", "post, one rate", "deepnorm (paper), one rate")
UPDATES = Path(__file__).parent / "results" / "deepnorm_depth.json"
DEPTHS = (6, 12, 24, 48, 96, 192, 384, 1000)
DIM, CHARACTERS, SENTENCES = 16, 64, 2000
BATCH, LENGTH = 8, 16
RATE, ONE_RATE, SMALL_RATE = 3e-3, 2e-4, 1e-4
WARMUP, MEAN = 20, 20


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


def update_rows() -> list[dict[str, Any]]:
    """Update sizes by depth, in all weights and in matrices."""
    ids, rows = stream(), []
    for weights in ("all", "matrices"):
        for depth in DEPTHS:
            seeds = range(3 if depth < 100 else 1)
            sizes = {k: statistics.fmean(update_size(k, depth, ids, seed, weights) for seed in seeds) for k in KINDS}
            rows.append({"weights": weights, "layers": depth, **sizes})
    return rows


def losses(name: str, layers: int, ids: Tensor, steps: int, seed: int = 0) -> list[float]:
    """The loss of every step of one of `TRAINED`."""
    kind, one_rate = name.removesuffix(", one rate"), name.endswith(", one rate")
    module, generator = make(kind, layers, seed), torch.Generator().manual_seed(seed)
    norms = [part for part in module.modules() if isinstance(part, nn.LayerNorm)]
    shares: dict[bool, list[nn.Parameter]] = {False: [], True: []}
    of_norms = {id(parameter) for norm in norms for parameter in norm.parameters()}
    for parameter in module.parameters():
        shares[id(parameter) in of_norms].append(parameter)
    rates = (ONE_RATE, ONE_RATE) if one_rate else (RATE, RATE / len(norms))
    groups: list[dict[str, Any]] = [{"params": shares[of], "lr": rates[of]} for of in (False, True)]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.98), fused=True)
    warmup = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / WARMUP) if one_rate else 1.0
    )
    found = []
    for _ in range(steps):
        loss = loss_of(module, *batch_of(ids, generator))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        warmup.step()
        found.append(loss.item())
    return found


def training_rows(layers: int, steps: int, processes: int) -> list[dict[str, Any]]:
    """Mean losses of all `TRAINED`, and the two entropies, by step."""
    ids = stream()
    single, pair = entropies(ids)
    with ProcessPoolExecutor(processes) as pool:
        runs = {name: pool.submit(losses, name, layers, ids, steps) for name in TRAINED}
        curves = {name: run.result() for name, run in runs.items()}
    return [
        {
            "until step": end,
            **{name: statistics.fmean(curve[end - MEAN : end]) for name, curve in curves.items()},
            "entropy": single,
            "given one": pair,
        }
        for end in range(MEAN, steps + 1, MEAN)
    ]


def draw(path: str, updates: Sequence[dict[str, Any]], training: Sequence[dict[str, Any]], layers: int) -> None:
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
    places = [row["until step"] for row in training]
    for name in TRAINED:
        colour, style = colours[name.removesuffix(", one rate")], "o--" if name.endswith(", one rate") else "o-"
        right.plot(places, [row[name] for row in training], style, color=colour, label=name, markersize=4)
    for column, words in (("entropy", ""), ("given one", ", given the one before")):
        height = training[0][column]
        right.axhline(height, color="grey", linestyle=":", linewidth=1)
        right.annotate(
            f"entropy of a character{words}", (places[0], height), (0, -3), textcoords="offset points", va="top",
            color="grey",
        )  # fmt: skip
    title = f"{layers} layers, Adam, all weights trained"
    right.set(xlabel="step", ylabel=f"mean loss of {MEAN} steps (nats a character)", title=title, ylim=(1.75, None))
    right.legend(loc="lower left", bbox_to_anchor=(0, 0.12))
    right.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("updates", "training"), required=True)
    parser.add_argument("--json")
    parser.add_argument("--plot")
    parser.add_argument("--layers", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    if arguments.part == "updates":
        title = f"DeepNorm: change of the output by the first step of Adam, rate {SMALL_RATE:g}"
        report(title, update_rows(), arguments.json)
        return
    rows = training_rows(arguments.layers, arguments.steps, arguments.processes)
    title = f"DeepNorm: mean loss of {MEAN} steps at {arguments.layers} layers, Adam {RATE:g}, or {ONE_RATE:g} for all"
    report(title, rows, arguments.json)
    if arguments.plot:
        updates = json.loads(UPDATES.read_text(encoding="utf-8"))["rows"]
        draw(arguments.plot, updates, rows, arguments.layers)


if __name__ == "__main__":
    main()
