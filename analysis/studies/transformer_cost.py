"""When is attention the bottleneck of a Transformer?

Counts the multiplications of every part, the lengths at which one part overtakes another, what linear attention could
save, and the memory of training. Nothing is run.

Source: https://kexue.fm/archives/8610.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from ...errors import InputError
from ...nn.transformer.config import TransformerConfig
from ..crossings import (
    attention_over_feedforward,
    generation_step,
    growth,
    is_feedforward,
    linear_attention_pays,
    quadratic_over_linear,
    speedup_bound,
)
from ..findings import Findings, Table
from ..model_state import FLOAT_ADAM, MIXED_ADAM, model_state
from ..transformer_cost import QUADRATIC, transformer_cost
from ..transformer_parts import Part, Workload

if TYPE_CHECKING:
    from matplotlib.axes import Axes

GIB = 2**30
GROUPS: dict[str, Callable[[Part], bool]] = {
    "feed-forward": is_feedforward,
    "projections": lambda part: part.name in ("projections", "output projection"),
    "scores": lambda part: part.name in QUADRATIC,  # with the sums that they weigh
}

KEPT: dict[str, Callable[[TransformerConfig, int, int], int]] = {
    "unfused": lambda config, batch, n: transformer_cost(config, Workload(batch, n, fused=False)).saved_bytes(),
    "fused": lambda config, batch, n: transformer_cost(config, Workload(batch, n)).saved_bytes(),
    "selective": lambda config, batch, n: transformer_cost(config, Workload(batch, n)).peak_bytes("selective"),
    "full": lambda config, batch, n: transformer_cost(config, Workload(batch, n)).peak_bytes("full"),
}


def study(
    dim: int = 768,
    num_layers: int = 12,
    num_heads: int = 12,
    num_kv_heads: int = 0,
    feedforward_dim: int = 3072,
    gated: bool = False,
    vocab_size: int = 21128,
    batch_size: int = 8,
    length: int = 512,
    lengths: tuple[int, ...] = (128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768),
    ranks: int = 8,
    widening: int = 4,
) -> Findings:
    """Cost of a Transformer encoder of any size; the defaults are those of BERT-base with Chinese tokens.

    Args:
        dim: width of the hidden states, D.
        num_layers: blocks.
        num_heads: attention heads.
        num_kv_heads: key and value heads; 0: as many as heads.
        feedforward_dim: inner width of the position-wise network.
        gated: gated position-wise network.
        vocab_size: rows of the embedding table.
        batch_size: sequences in a training batch of one device.
        length: tokens of each, for the table of parts.
        lengths: tokens, for the table and the figures by length.
        ranks: devices over which ZeRO divides.
        widening: how much wider heads are under linear attention of equal quality.
    """
    for name, value in {"batch_size": batch_size, "length": length, "ranks": ranks, "widening": widening}.items():
        if value < 1:
            raise InputError(f"transformer_cost({name}={value}): use 1 or more")
    if not lengths or min(lengths) < 1:
        raise InputError(f"transformer_cost(lengths={list(lengths)}): give one or more lengths of at least 1")
    config = TransformerConfig(
        vocab_size=vocab_size,
        dim=dim,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        feedforward_dim=feedforward_dim,
        gated=gated,
    )
    lengths = tuple(sorted(set(lengths)))
    tables = [
        _parts(config, batch_size, length),
        _step(config, batch_size, length),
        _by_length(config, lengths),
        _activations(config, batch_size, lengths),
        _crossings(config, widening),
        _states(config, ranks),
        _generation(config, lengths),
    ]
    figures = {
        "shares_by_length": lambda axes: _draw_shares(axes, config, lengths),
        "speedup_bound": lambda axes: _draw_bound(axes, config, lengths),
        "linear_attention": lambda axes: _draw_linear(axes, config, lengths, widening),
        "activations_by_length": lambda axes: _draw_activations(axes, config, batch_size, lengths),
    }
    return Findings(tables, _remarks(config, length, widening), figures)


def _parts(config: TransformerConfig, batch: int, length: int) -> Table:
    cost = transformer_cost(config, Workload(batch, length))
    rows = [(part.name, part.macs, cost.share(part), part.parameters, part.saved_bytes) for part in cost.parts]
    rows.append(("total", cost.macs, 1.0, cost.parameters, cost.saved_bytes()))
    title = f"parts of a forward pass, {batch} x {length} tokens (1 MAC = 2 FLOPs; float32 activations)"
    return Table("parts", title, ("part", "MACs", "share", "parameters", "activations [bytes]"), rows)


def _step(config: TransformerConfig, batch: int, length: int) -> Table:
    cost = transformer_cost(config, Workload(batch, length))
    rows: list[tuple[str, str, int, int]] = [("forward", "", cost.forward_flops(), 0)]
    for recompute in ("off", "selective", "full"):
        rows.append(("forward + backward", recompute, cost.step_flops(recompute), cost.peak_bytes(recompute)))
    title = f"a training step, {batch} x {length} tokens, by what is recomputed"
    return Table("step", title, ("pass", "recomputed", "FLOPs", "activations [bytes]"), rows)


def _by_length(config: TransformerConfig, lengths: Sequence[int]) -> Table:
    rows = []
    for length in lengths:
        cost = transformer_cost(config, Workload(1, length))
        rows.append((length, cost.macs, *_shares(config, length), speedup_bound(cost)))
    title = "shares of one sequence by length, and how many times faster at most without the scores"
    return Table("by_length", title, ("tokens", "MACs", *GROUPS, "at most"), rows)


def _activations(config: TransformerConfig, batch: int, lengths: Sequence[int]) -> Table:
    rows = [(length, *(kept(config, batch, length) for kept in KEPT.values())) for length in lengths]
    title = f"activations of a batch of {batch} in float32 by length, by what is recomputed"
    return Table("activations", title, ("tokens", *(f"{name} [bytes]" for name in KEPT)), rows)


def _shares(config: TransformerConfig, length: int) -> list[float]:
    cost = transformer_cost(config, Workload(1, length))
    return [sum(part.macs for part in cost.parts if belongs(part)) / cost.macs for belongs in GROUPS.values()]


def _crossings(config: TransformerConfig, widening: int) -> Table:
    rows = [
        ("attention costs more than the feed-forward", float(attention_over_feedforward(config))),
        ("the quadratic term costs more than all others", float(quadratic_over_linear(config))),
        ("linear attention with the same heads costs less", float(linear_attention_pays(config))),
        (f"linear attention with heads {widening} times as wide", float(linear_attention_pays(config, widening))),
    ]
    return Table("crossings", "from how many tokens on", ("what", "tokens"), rows)


def _states(config: TransformerConfig, ranks: int) -> Table:
    parameters = transformer_cost(config).parameters
    rows = []
    for name, recipe in (("mixed", MIXED_ADAM), ("float32", FLOAT_ADAM)):
        for stage in (0, 1, 2, 3):
            state = model_state(parameters, stage, ranks, recipe)
            rows.append((name, f"ZeRO {stage}" if stage else "DDP", *state, state.total))
    columns = ("Adam", "strategy", "parameters [bytes]", "gradients [bytes]", "optimiser [bytes]", "total [bytes]")
    title = (
        f"{parameters:,} parameters: bytes on each of {ranks} devices (16 a parameter in all, mixed precision or not)"
    )
    return Table("model_state", title, columns, rows)


def _generation(config: TransformerConfig, lengths: Sequence[int]) -> Table:
    steps = [(length, generation_step(config, length)) for length in lengths]
    rows = [(length, step.macs, step.weight_bytes, step.cache_bytes, step.macs_per_byte) for length, step in steps]
    columns = ("tokens before", "MACs", "weights read [bytes]", "cache read [bytes]", "MACs a byte")
    return Table("generation", "one more token with a cache, batch 1, half precision", columns, rows)


def _remarks(config: TransformerConfig, length: int, widening: int) -> list[str]:
    bound = speedup_bound(transformer_cost(config, Workload(1, length)))
    crossing, pays = float(quadratic_over_linear(config)), float(linear_attention_pays(config, widening))
    return [
        f"At {length} tokens a pass gets at most {bound:.2f} times faster if scores and weighted sum become free.",
        f"Below about {pays:,.0f} tokens linear attention of equal quality saves nothing; the quadratic term is more "
        f"than half of the blocks from {crossing:,.0f} tokens on.",
    ]


def _draw_shares(axes: Axes, config: TransformerConfig, lengths: Sequence[int]) -> None:
    dense = _between(lengths)
    shares = [_shares(config, length) for length in dense]
    bottom = [0.0] * len(dense)
    for index, name in enumerate(GROUPS):
        top = [low + 100 * share[index] for low, share in zip(bottom, shares, strict=True)]
        axes.fill_between(dense, bottom, top, label=name, alpha=0.8)
        bottom = top
    _mark(axes, float(attention_over_feedforward(config)), "attention = feed-forward", lengths)
    _mark(axes, float(quadratic_over_linear(config)), "quadratic = the rest", lengths)
    _lengths_axis(axes, lengths)
    axes.set_ylim(0, 100)
    axes.set_ylabel("share of the multiplications [%]")
    axes.set_title(f"Where the multiplications go, {_name(config)}")
    axes.legend(loc="lower left")


def _draw_bound(axes: Axes, config: TransformerConfig, lengths: Sequence[int]) -> None:
    dense = _between(lengths)
    axes.plot(dense, [speedup_bound(transformer_cost(config, Workload(1, length))) for length in dense])
    axes.axhline(1, color="grey", linewidth=0.8)
    for length in lengths:
        bound = speedup_bound(transformer_cost(config, Workload(1, length)))
        axes.plot(length, bound, "o", color="C0")
        axes.annotate(f"{bound:.2f}", (length, bound), textcoords="offset points", xytext=(-4, 7), ha="right")
    _lengths_axis(axes, lengths)
    axes.set_xlim(min(lengths) / 1.5, max(lengths) * 1.5)
    axes.margins(y=0.1)
    axes.set_ylabel("times faster at most")
    axes.set_title(f"If scores and their weighted sums were free, {_name(config)}")


def _draw_linear(axes: Axes, config: TransformerConfig, lengths: Sequence[int], widening: int) -> None:
    short = (16, *lengths) if min(lengths) > 16 else lengths
    dense = _between(short)
    blocks, mixing = growth(config), growth(config, lambda part: part.name in QUADRATIC)
    axes.plot(dense, [float(mixing.quadratic) * n for n in dense], label="softmax: scores")
    for factor, style in ((1, "-"), (widening, "--")):
        pays = linear_attention_pays(config, factor)
        wide = "the same heads" if factor == 1 else f"heads {factor} times as wide"
        line = float(mixing.quadratic * pays)
        (drawn,) = axes.plot(dense, [line] * len(dense), style, label=f"linear attention, {wide}")
        if min(dense) < pays < max(dense):
            axes.plot(float(pays), line, "o", color=drawn.get_color())
            where = {"textcoords": "offset points", "xytext": (6, -14)}
            axes.annotate(f"{float(pays):,.0f} tokens", (float(pays), line), **where)
    axes.plot(dense, [float(blocks.linear)] * len(dense), ":", label="projections and feed-forward")
    _lengths_axis(axes, short)
    axes.set_yscale("log", base=10)
    axes.set_ylabel("MACs for each token")
    axes.set_title(f"From where linear attention pays, {_name(config)}")
    axes.legend(loc="upper left")


def _draw_activations(axes: Axes, config: TransformerConfig, batch: int, lengths: Sequence[int]) -> None:
    dense = _between(lengths)
    labels = ("tables of scores kept", "fused attention", "selective recomputation", "full recomputation")
    for label, kept in zip(labels, KEPT.values(), strict=True):
        axes.plot(dense, [kept(config, batch, length) / GIB for length in dense], label=label)
    _lengths_axis(axes, lengths)
    axes.set_yscale("log", base=10)
    axes.set_ylabel("activations [GiB]")
    axes.set_title(f"Kept for the backward pass, batch {batch}, float32, {_name(config)}")
    axes.legend(loc="upper left")


def _mark(axes: Axes, length: float, text: str, lengths: Sequence[int]) -> None:
    """A vertical line where two parts cost the same."""
    if min(lengths) < length < max(lengths):
        axes.axvline(length, color="black", linestyle="--", linewidth=1)
        style = {"rotation": 90, "va": "top", "ha": "right", "textcoords": "offset points", "xytext": (-4, 0)}
        axes.annotate(f"{text}: {length:,.0f} tokens", (length, 98), fontsize=9, **style)


def _lengths_axis(axes: Axes, lengths: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    if len(lengths) > 1:
        axes.set_xlim(min(lengths), max(lengths))
    axes.set_xticks(list(lengths), [f"{length:,}" for length in lengths], rotation=30)
    axes.minorticks_off()
    axes.set_xlabel("length [tokens]")


def _between(lengths: Sequence[int]) -> list[int]:
    """Eight lengths from each to the next, evenly on a logarithmic axis."""
    dense = [round(low * (high / low) ** (step / 8)) for low, high in pairwise(lengths) for step in range(8)]
    return sorted({*dense, lengths[-1]})


def _name(config: TransformerConfig) -> str:
    return f"{config.num_layers} layers, D = {config.dim}"
