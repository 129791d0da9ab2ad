"""Recomputation of a Transformer encoder: bytes and FLOPs counted, seconds measured, beside transformers and torch.

Twelve blocks of width 768 on 128 tokens (or as many as given), forward and backward pass, no embeddings and no head.
Attention has no dropout: the CPU's fused kernel has none, and the tables of scores that it would take are not made on
GPUs.

MB kept: storages that the forward pass has made and that are alive when it has ended, the input added and the result
left out: whatever keeps them. Parameters and their gradients are no part of them. "bytes x": so many times fewer than
in plain training. MB at most: storages made and alive at any time of the step, what is between operations included.
FLOPs: of matrix products and attention in both passes, whatever runs again included. "FLOPs x": over plain training;
a backward pass takes twice the forward pass, so running all of it again is 4/3.
MB allocated: what CUDA's allocator held at most in a step beyond parameters and gradients, on GPUs.
of budget: bytes kept over bytes allowed. best uniform: the fewest FLOPs, over plain training, of the rows of "plain",
"full" and "selective" that keep no more than is allowed.

Peers: `activation_checkpointing_enable` of transformers on BERT's encoder with as many weights, and torch.compile's own
memory budget (`torch._functorch.config.activation_memory_budget`) on our blocks: its partitioner, whose graphs run
without a code generator, so that seconds say what is recomputed and not what is fused.

    python benchmarks/recompute.py [--json FILE] [--plot FILE] [--repeats 3] [--kinds pre post pre_without_dropout]

`--repeats 0` counts only: that is exact on a busy machine, too.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from common import add_device, device, in_turn, median_and_spread, now, on_gpu, report, use_device
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertConfig, BertModel

from kexue.nn.flops import flops_of, is_product
from kexue.nn.transformer import Transformer, TransformerConfig
from kexue.nn.transformer.attention import Context
from kexue.nn.transformer.masks import visibility
from kexue.strategies import (
    Full,
    Selective,
    cheapest,
    checkpoint_blocks,
    follow_plan,
    measured_costs,
    restore_blocks,
)

DIM, LAYERS, HEADS = 768, 12, 12
BATCH, LENGTH = 1, 128  # see --batch and --tokens
KINDS: dict[str, dict[str, Any]] = {
    "pre": {"norm": "pre", "dropout": 0.1},
    "post": {"norm": "post", "dropout": 0.1},
    "pre_without_dropout": {"norm": "pre", "dropout": 0.0},
}
BUDGETS = (0.1, 0.2, 0.333, 0.5, 0.7)
COMPILED_BUDGETS = (0.0, 0.25, 0.5, 0.75)


class Counter(TorchDispatchMode):
    """FLOPs of what runs inside, and the storages it makes, as long as they live.

    Attributes:
        flops: so far.
        most: bytes that were alive at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.most = 0
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if is_product(func):
            self.flops += flops_of(func, args, kwargs or {}, result)
        given = {tensor.untyped_storage()._cdata for tensor in args if isinstance(tensor, Tensor)}
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in given:
                storage = tensor.untyped_storage()
                self.made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.made = {key: (ref, size) for key, (ref, size) in self.made.items() if not ref.expired()}
        self.most = max(self.most, sum(size for _, size in self.made.values()))
        return result

    def kept(self, given: Tensor, result: Tensor) -> int:
        """Bytes alive now, with what was given and without the result."""
        left_out = {tensor.untyped_storage()._cdata for tensor in (given, result)}
        alive = (size for key, (ref, size) in self.made.items() if key not in left_out and not ref.expired())
        return sum(alive) + given.nbytes


class Counts(NamedTuple):
    """Of a step: bytes kept for the backward pass, bytes at most, FLOPs."""

    kept: int
    most: int
    flops: int


class Way:
    """A way to run the blocks.

    Args:
        name: of it.
        module: whose blocks.
        forward: `(B, T, D)` to `(B, T, D)`.
        apply: prepares the module; what it returns undoes that.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        forward: Callable[[Tensor], Tensor],
        apply: Callable[[], Callable[[], None]],
    ) -> None:
        self.name, self.module, self.forward, self.apply = name, module, forward, apply

    def count(self) -> Counts:
        """Count a step."""
        undo, hidden, counter = self.apply(), _hidden(), Counter()
        with counter:
            result = self.forward(hidden)
            kept = counter.kept(hidden, result)
            result.square().mean().backward()
        undo()
        return Counts(kept, counter.most, counter.flops)

    def allocated(self) -> int:
        """Bytes that CUDA's allocator held at most in a step, beyond what it held before."""
        undo, hidden = self.apply(), _hidden()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        self.forward(hidden).square().mean().backward()
        most = torch.cuda.max_memory_allocated() - before
        undo()
        return most

    def seconds(self) -> float:
        """Of a step."""
        undo, hidden = self.apply(), _hidden()
        start = now()
        self.forward(hidden).square().mean().backward()
        taken = now() - start
        undo()
        return taken


class Compiled(Way):
    """The blocks under torch's partitioner with a memory budget; counts are taken inside the graphs."""

    def __init__(self, name: str, module: nn.Module, forward: Callable[[Tensor], Tensor], budget: float) -> None:
        super().__init__(name, module, forward, lambda: lambda: None)
        from functorch.compile import min_cut_rematerialization_partition
        from torch._dynamo.backends.common import aot_autograd
        from torch.fx.graph import _BoxedCodeGen

        self.counter: Counter | None = None

        def compiler(graph: Any, _: Any) -> Any:
            graph.graph.set_codegen(_BoxedCodeGen())  # lets go of its inputs as it runs
            graph.recompile()

            def run(inputs: list[Any]) -> Any:
                with self.counter or nullcontext():
                    return graph.forward(inputs)

            run._boxed_call = True  # type: ignore[attr-defined]
            return run

        backend = aot_autograd(fw_compiler=compiler, partition_fn=min_cut_rematerialization_partition)
        compiled = torch.compile(forward, backend=backend, fullgraph=True)
        # Graphs are made in the first call.
        with torch._functorch.config.patch(activation_memory_budget=budget):  # pyright: ignore[reportAttributeAccessIssue]
            compiled(_hidden()).square().mean().backward()
        self.forward = compiled

    def count(self) -> Counts:
        hidden, counter = _hidden(), Counter()
        self.counter = counter
        result = self.forward(hidden)
        kept = counter.kept(hidden, result)
        result.square().mean().backward()
        self.counter = None
        return Counts(kept, counter.most, counter.flops)


def _hidden() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(BATCH, LENGTH, DIM, device=device(), requires_grad=True)


def _ready(module: Any) -> Any:
    """With gradients to add to: none is counted as made."""
    module.to(device())
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return module.train()


def ours(kind: str, compiled: bool) -> list[Way]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    config = TransformerConfig(
        vocab_size=10,
        dim=DIM,
        num_layers=LAYERS,
        num_heads=HEADS,
        feedforward_dim=4 * DIM,
        positions="learned",
        attention_dropout=0.0,
        **KINDS[kind],
    )
    module = _ready(Transformer(config))
    blocks = list(module.blocks())

    def forward(hidden: Tensor) -> Tensor:
        context = Context(visibility("full", LENGTH, hidden.device))
        for block in blocks:
            hidden = block(hidden, context)
        return hidden

    def under(policy: Any = None, every: int = 1) -> Callable[[], Callable[[], None]]:
        def apply() -> Callable[[], None]:
            checkpoint_blocks(blocks[::every], policy)
            return lambda: restore_blocks(blocks)

        return apply

    costs = measured_costs(blocks, module, lambda: forward(_hidden()).square().mean().backward())

    outside = _hidden().nbytes  # the result, which the loss keeps and `Counter.kept` leaves out

    def planned(share: float) -> Callable[[], Callable[[], None]]:
        plan = cheapest(costs, int(share * (costs.plain_bytes - outside)) + outside)

        def apply() -> Callable[[], None]:
            checkpoint_blocks(blocks)
            follow_plan(blocks, plan)
            return lambda: restore_blocks(blocks)

        return apply

    ways = [
        Way("plain", module, forward, lambda: lambda: None),
        Way("full", module, forward, under(Full())),
        Way("full, every second block", module, forward, under(Full(), every=2)),
        Way("selective, products", module, forward, under(Selective())),
        Way("selective, narrow", module, forward, under(Selective("narrow"))),
    ]
    ways += [Way(f"budget {share}", module, forward, planned(share)) for share in BUDGETS]
    for budget in COMPILED_BUDGETS if compiled else ():
        ways.append(Compiled(f"torch.compile, budget {budget}", module, forward, budget))
    return ways


def theirs() -> list[Way]:
    config = BertConfig(
        vocab_size=10,
        hidden_size=DIM,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=4 * DIM,
        attention_probs_dropout_prob=0.0,
        attn_implementation="sdpa",  # pyright: ignore[reportCallIssue]
    )
    torch.manual_seed(0)
    module = _ready(BertModel(config, add_pooling_layer=False))

    def forward(hidden: Tensor) -> Tensor:
        return module.encoder(hidden).last_hidden_state

    def apply() -> Callable[[], None]:
        name = "activation" if hasattr(module, "activation_checkpointing_enable") else "gradient"
        getattr(module, f"{name}_checkpointing_enable")()
        return getattr(module, f"{name}_checkpointing_disable")

    return [
        Way("transformers, plain", module, forward, lambda: lambda: None),
        Way("transformers, checkpointing", module, forward, apply),
    ]


def rows_of(kind: str, repeats: int, compiled: bool) -> list[dict[str, Any]]:
    ways = ours(kind, compiled) + (theirs() if kind == "post" else [])
    counts = {way.name: way.count() for way in ways}
    for way in ways if on_gpu() else ():
        way.seconds()  # kernels are loaded when they are first needed
    times = in_turn({way.name: way.seconds for way in ways}, repeats)
    allocated = {way.name: way.allocated() for way in ways} if on_gpu() else {}
    uniform = [one for name, one in counts.items() if name.startswith(("plain", "full", "selective"))]
    rows = []
    for name, (kept, most, flops) in counts.items():
        base = "transformers, plain" if name.startswith("transformers") else "plain"
        first = counts[base]
        row = {
            "blocks": kind,
            "policy": name,
            "MB kept": kept / 1e6,
            "bytes x": first.kept / kept,
            "MB at most": most / 1e6,
            "GFLOPs": flops / 1e9,
            "FLOPs x": flops / first.flops,
        }
        if repeats:
            middle, spread = median_and_spread(times[name])
            row |= {"s a step": middle, "+-": spread, "time x": middle / median_and_spread(times[base])[0]}
        if allocated:
            row |= {"MB allocated": allocated[name] / 1e6}
        row |= {"of budget": "", "best uniform": ""}
        if name.startswith("budget"):
            allowed = float(name.split()[1]) * first.kept
            row["of budget"] = kept / allowed
            row["best uniform"] = min((one.flops / first.flops for one in uniform if one.kept <= allowed), default="-")
        rows.append(row)
    return rows


def plot(rows: list[dict[str, Any]], path: str) -> None:
    """Bytes kept against FLOPs, a panel for each kind of block."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    kinds = list(dict.fromkeys(row["blocks"] for row in rows))
    figure = Figure(figsize=(5.2 * len(kinds), 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
    for axes, kind in zip(panels, kinds, strict=True):
        here = [row for row in rows if row["blocks"] == kind]
        for start, label, style in (
            ("budget", "budget", "o-"),
            ("torch.compile", "torch.compile's budget", "s--"),
            ("transformers", "transformers", "D:"),
        ):
            points = sorted((100 / row["bytes x"], row["FLOPs x"]) for row in here if row["policy"].startswith(start))
            if points:
                axes.plot(*zip(*points, strict=True), style, label=label, markersize=5)
        for row in here:
            if row["policy"].startswith(("plain", "full", "selective")):
                place = (100 / row["bytes x"], row["FLOPs x"])
                axes.plot(*place, "k^", markersize=5)
                axes.annotate(row["policy"], place, xytext=(6, 5), textcoords="offset points", fontsize=8)
        axes.set_title(f"{kind.replace('_', ' ')}: 12 blocks, width 768")
        axes.set_xlabel("bytes kept for the backward pass [% of plain training]")
        axes.set_xlim(0, 119)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("FLOPs of a step over plain training")
    panels[min(1, len(panels) - 1)].legend(loc="upper right")
    figure.savefig(path, dpi=110)


def main() -> None:
    global BATCH, LENGTH
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json")
    parser.add_argument("--plot")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batch", type=int, default=BATCH, help="rows of tokens")
    parser.add_argument("--tokens", type=int, default=LENGTH, help="of each row")
    parser.add_argument("--without-compiler", action="store_true", help="leave torch's memory budget out")
    add_device(parser)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    arguments = parser.parse_args()
    use_device(arguments.device)
    BATCH, LENGTH = arguments.batch, arguments.tokens
    rows = [row for kind in arguments.kinds for row in rows_of(kind, arguments.repeats, not arguments.without_compiler)]
    report(f"Recomputation: 12 blocks of width 768, {BATCH * LENGTH} tokens", rows, arguments.json)
    if arguments.plot:
        plot(rows, arguments.plot)


if __name__ == "__main__":
    main()
