"""What Lookahead costs: per step, per synchronisation, and as a share of a training step.

syncs: 100 M parameters in 200 square tensors. A synchronisation reads and writes the fast and the slow weights once, 16
bytes a parameter: its floor is what an operation in place takes that does so and no more. Beside it stands a lerp and a
copy over all tensors, one after the other. Peers are measured where they are installed
(`pip install --no-deps pytorch_optimizer timm`; of timm one file is read).

steps: a Transformer encoder of 101 M parameters in 149 tensors that learns classes of sentences, AdamW fused and
foreach, k = 5. A synchronisation is far smaller than the variation of such a step, so it is timed alone, in turn with
the steps.

The bookkeeping between synchronisations is microseconds beside the milliseconds of an inner step: it is timed on 200
tensors of 8 numbers, as the difference of a step with and without the wrapper.

    python benchmarks/lookahead.py [--part steps | syncs] [--json FILE] [--repeats 7] [--rows 8] [--tokens 128]
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import add_device, device, in_turn, median_and_spread, now, report, use_device
from torch import nn
from torch.nn import functional as F

from kexue.nn.transformer import Transformer, TransformerConfig
from kexue.strategies import LookaheadOptimizer, lookahead_sync

K, CLASSES = 5, 10
FLOOR = "both sets in place, the floor"
INNER: dict[str, dict[str, Any]] = {"fused": {"fused": True}, "foreach": {"foreach": True}}


class Sentences(nn.Module):
    """A Transformer encoder and a linear map from the mean of the tokens to classes."""

    def __init__(self) -> None:
        super().__init__()
        config = TransformerConfig(21128, dim=768, num_layers=12, num_heads=12, feedforward_dim=3072, dropout=0.1)
        self.encoder = Transformer(config)
        self.head = nn.Linear(config.dim, CLASSES)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(ids).mean(1))


def milliseconds(run: Callable[[], Any]) -> float:
    """Wall time of one call."""
    start = now()
    run()
    return (now() - start) * 1e3


def peers() -> dict[str, Any]:
    """The `Lookahead` classes of other packages, None where one is not installed."""
    found: dict[str, Any] = {"pytorch_optimizer": None, "timm": None}
    if importlib.util.find_spec("pytorch_optimizer") is not None:
        from pytorch_optimizer import Lookahead  # pyright: ignore[reportMissingImports]

        found["pytorch_optimizer"] = Lookahead
    package = importlib.util.find_spec("timm")
    if package is not None and package.submodule_search_locations:
        # The package as a whole asks for torchvision.
        file = Path(package.submodule_search_locations[0]) / "optim" / "lookahead.py"
        spec = importlib.util.spec_from_file_location("timm_lookahead", file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        found["timm"] = module.Lookahead
    return found


def syncs(dim: int, layers: int, repeats: int) -> list[dict[str, Any]]:
    """Time one synchronisation of all weights, by several hands, each with tensors of its own."""

    def weights() -> list[torch.Tensor]:
        return [torch.randn(dim, dim, device=device()) for _ in range(layers)]

    fast, slow = weights(), weights()

    def one_after_the_other() -> None:
        torch._foreach_lerp_(slow, fast, 0.5)  # pyright: ignore[reportPrivateImportUsage]
        torch._foreach_copy_(fast, slow)  # pyright: ignore[reportPrivateImportUsage]

    def in_place() -> None:
        for weight in (*fast, *slow):
            weight.neg_()

    runs: dict[str, Callable[[], Any]] = {
        FLOOR: in_place,
        "kexue": lambda: lookahead_sync(fast, slow, 0.5),
        "a lerp and a copy of all": one_after_the_other,
    }
    missing = []
    for name, cls in peers().items():
        if cls is None:
            missing.append(name)
            continue
        own = [nn.Parameter(weight) for weight in weights()]
        for p in own:
            p.grad = p.detach()  # the peers look whether there is one; no memory of its own
        optimizer = cls(torch.optim.SGD(own, lr=0.1), k=K, alpha=0.5)
        update = optimizer.update if name == "pytorch_optimizer" else optimizer.update_slow
        runs[name] = lambda update=update, optimizer=optimizer: update(optimizer.param_groups[0])
    times = in_turn({name: lambda run=run: milliseconds(run) for name, run in runs.items()}, repeats)
    rows: list[dict[str, Any]] = []
    for name, values in times.items():
        median, spread = median_and_spread(values)
        rows.append(
            {
                "synchronisation by": name,
                "ms": median,
                "+-": spread,
                "least": min(values),
                "GB/s": 16 * layers * dim * dim / median / 1e6,
                "times the floor": statistics.median(a / b for a, b in zip(values, times[FLOOR], strict=True)),
            }
        )
    return rows + [{"synchronisation by": f"{name} (not installed)"} for name in missing]


def bookkeeping(options: dict[str, Any], tensors: int) -> float:
    """Milliseconds that the wrapper adds to a step without synchronisation."""

    def step(wrapped: bool) -> Callable[[], float]:
        ps = [nn.Parameter(torch.randn(8, device=device())) for _ in range(tensors)]
        for p in ps:
            p.grad = torch.randn_like(p)
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(ps, **options)
        if wrapped:
            optimizer = LookaheadOptimizer(optimizer, k=10**9)
        optimizer.step()
        return lambda: milliseconds(optimizer.step)

    times = in_turn({"plain": step(False), "wrapped": step(True)}, 200)
    return statistics.median(times["wrapped"]) - statistics.median(times["plain"])


def steps(rows: int, tokens: int, repeats: int) -> list[dict[str, Any]]:
    """Time a training step, its optimiser's part, and what Lookahead adds to it on average over a cycle."""
    torch.manual_seed(0)
    with device():
        model = Sentences()
        ids, labels = torch.randint(0, 21128, (rows, tokens)), torch.randint(0, CLASSES, (rows,))
    fast = list(model.parameters())
    slow = [p.detach().clone() for p in fast]

    def sync() -> None:
        lookahead_sync(fast, slow, 0.5)

    table = []
    for name, options in INNER.items():
        optimizer = torch.optim.AdamW(fast, lr=1e-6, **options)

        def train(optimizer: torch.optim.Optimizer = optimizer) -> tuple[float, float]:
            optimizer.zero_grad()
            first = milliseconds(lambda: F.cross_entropy(model(ids), labels).backward())
            second = milliseconds(optimizer.step)
            return first + second, second

        train()
        results: dict[str, list[Any]] = in_turn({"train": train, "sync": lambda: milliseconds(sync)}, repeats)
        whole, spread = median_and_spread([total for total, _ in results["train"]])
        inner = statistics.median(part for _, part in results["train"])
        one = statistics.median(results["sync"])
        each = bookkeeping(options, len(fast))
        table.append(
            {
                "AdamW": name,
                "parameters, M": sum(p.numel() for p in fast) / 1e6,
                "tensors": len(fast),
                "training step, ms": whole,
                "+-": spread,
                "of it AdamW, ms": inner,
                "one sync, ms": one,
                "bookkeeping a step, ms": each,
                f"Lookahead(k={K}), % of training": 100 * (each + one / K) / whole,
                "% of AdamW": 100 * (each + one / K) / inner,
            }
        )
    return table


def main() -> None:
    """Measure what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=["steps", "syncs"], default="syncs")
    parser.add_argument("--layers", type=int, default=200, help="tensors of the synchronisations")
    parser.add_argument("--dim", type=int, default=707, help="their rows and columns")
    parser.add_argument("--rows", type=int, default=8, help="sentences of a training step")
    parser.add_argument("--tokens", type=int, default=128, help="of each sentence")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json")
    add_device(parser)
    arguments = parser.parse_args()
    use_device(arguments.device)
    if arguments.part == "syncs":
        what = f"{arguments.layers} tensors of {arguments.dim} x {arguments.dim}"
        rows = syncs(arguments.dim, arguments.layers, arguments.repeats)
    else:
        what = f"encoder of 12 layers of 768, {arguments.rows} x {arguments.tokens} tokens a step"
        rows = steps(arguments.rows, arguments.tokens, arguments.repeats)
    report(f"Lookahead: {arguments.part}, {what}", rows, arguments.json)


if __name__ == "__main__":
    main()
