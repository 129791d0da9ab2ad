"""What Lookahead costs: per step, per synchronisation, and as a share of a training step.

100 M parameters in 200 square layers, AdamW fused and foreach, k = 5. A synchronisation reads and writes the fast and
the slow weights once, 16 bytes a parameter; beside it stands a lerp and a copy over all tensors, one after the other.
Peers are measured where they are installed (`pip install --no-deps pytorch_optimizer timm`; of timm one file is read).

The bookkeeping between synchronisations is microseconds beside the milliseconds of an inner step: it is timed on 200
tensors of 8 numbers, as the difference of a step with and without the wrapper.

    python benchmarks/lookahead.py [--part steps | syncs] [--json FILE] [--layers 200] [--dim 707] [--repeats 7]
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import in_turn, median_and_spread, report
from torch import nn

from kexue.strategies import LookaheadOptimizer, lookahead_sync

K, BATCH = 5, 64
INNER: dict[str, dict[str, Any]] = {"fused": {"fused": True}, "foreach": {"foreach": True}}


class Layers(nn.Module):
    """Square layers around which the input passes, so that any depth trains."""

    def __init__(self, dim: int, layers: int) -> None:
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(torch.randn(dim, dim) / dim) for _ in range(layers)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for weight in self.weights:
            x = x + torch.tanh(x @ weight)
        return x


def milliseconds(run: Callable[[], Any]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) * 1e3


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
        return [torch.randn(dim, dim) for _ in range(layers)]

    fast, slow = weights(), weights()

    def one_after_the_other() -> None:
        torch._foreach_lerp_(slow, fast, 0.5)  # pyright: ignore[reportPrivateImportUsage]
        torch._foreach_copy_(fast, slow)  # pyright: ignore[reportPrivateImportUsage]

    runs: dict[str, Callable[[], Any]] = {
        "kexue": lambda: lookahead_sync(fast, slow, 0.5),
        "a lerp and a copy of all": one_after_the_other,
        "the copy alone, 8 bytes": lambda: torch._foreach_copy_(fast, slow),  # pyright: ignore[reportPrivateImportUsage]
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
        moved = (8 if "alone" in name else 16) * layers * dim * dim
        rows.append(
            {
                "synchronisation by": name,
                "ms": median,
                "+-": spread,
                "least": min(values),
                "GB/s": moved / median / 1e6,
            }
        )
    return rows + [{"synchronisation by": f"{name} (not installed)"} for name in missing]


def bookkeeping(options: dict[str, Any], tensors: int) -> float:
    """Milliseconds that the wrapper adds to a step without synchronisation."""

    def step(wrapped: bool) -> Callable[[], float]:
        ps = [nn.Parameter(torch.randn(8)) for _ in range(tensors)]
        for p in ps:
            p.grad = torch.randn(8)
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(ps, **options)
        if wrapped:
            optimizer = LookaheadOptimizer(optimizer, k=10**9)
        optimizer.step()
        return lambda: milliseconds(optimizer.step)

    times = in_turn({"plain": step(False), "wrapped": step(True)}, 200)
    return statistics.median(times["wrapped"]) - statistics.median(times["plain"])


def steps(dim: int, layers: int, repeats: int) -> list[dict[str, Any]]:
    """Time a training step, its optimiser's part, and what Lookahead adds to it on average over a cycle."""
    torch.manual_seed(0)
    model, x = Layers(dim, layers), torch.randn(BATCH, dim)
    fast = list(model.parameters())
    slow = [p.detach().clone() for p in fast]

    def sync() -> None:
        lookahead_sync(fast, slow, 0.5)

    rows = []
    for name, options in INNER.items():
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, **options)

        def train(optimizer: torch.optim.Optimizer = optimizer) -> tuple[float, float]:
            optimizer.zero_grad()
            first = milliseconds(lambda: model(x).square().mean().backward())
            second = milliseconds(optimizer.step)
            return first + second, second

        train()
        results: dict[str, list[Any]] = in_turn({"train": train, "sync": lambda: milliseconds(sync)}, repeats)
        whole, spread = median_and_spread([total for total, _ in results["train"]])
        inner = statistics.median(part for _, part in results["train"])
        one = statistics.median(results["sync"])
        each = bookkeeping(options, layers)
        rows.append(
            {
                "AdamW": name,
                "training step, ms": whole,
                "+-": spread,
                "of it AdamW, ms": inner,
                "one sync, ms": one,
                "bookkeeping a step, ms": each,
                f"Lookahead(k={K}), % of training": 100 * (each + one / K) / whole,
                "% of AdamW": 100 * (each + one / K) / inner,
            }
        )
    return rows


def main() -> None:
    """Measure what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=["steps", "syncs"], default="syncs")
    parser.add_argument("--layers", type=int, default=200)
    parser.add_argument("--dim", type=int, default=707)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json")
    arguments = parser.parse_args()
    measure = {"steps": steps, "syncs": syncs}[arguments.part]
    rows = measure(arguments.dim, arguments.layers, arguments.repeats)
    report(f"Lookahead: {arguments.part}", rows, arguments.json)


if __name__ == "__main__":
    main()
