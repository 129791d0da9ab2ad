"""Which blocks and operations to recompute so that activations take so many bytes: the cheapest choice, from one step.

Each time a block is applied there are several options: recompute nothing, or keep the results of some of its products
and recompute the rest. Bytes and FLOPs of an option follow from what the step has shown; one option for each call is
chosen by dynamic programming over bytes.

Source: for the trade, T. Chen et al. (arXiv 1604.06174); H. Kellerer, U. Pferschy, D. Pisinger "Knapsack Problems"
(2004), chapter 11, multiple choice.  Checked against: all choices tried one by one, and counts of real steps
(tests/strategies/test_activation_checkpointing_budget.py).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from ..errors import InputError
from .recompute_plan import CallCost, Option, Plan, StepCosts, mib
from .recompute_tape import needed

MOST_ENUMERATED = 10
"""With more products than this in a block, results are dropped one by one, the cheapest for its bytes first."""
CELLS = 4096
FEWEST_BYTES = 1024
"""A number from 1 to this is taken for a mistake, such as a share in percent."""
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def options_of(call: CallCost) -> list[Option]:
    """The options of a call that are worth it: each cheaper than all that keep fewer bytes; the smallest first."""
    needs = [product.needs for product in call.products]
    everything, _ = needed(call.roots, needs, frozenset())
    keepable = frozenset(number for number in everything if call.products[number].keepable)

    def option(kept: frozenset[int]) -> Option:
        again, used = needed(call.roots, needs, kept)
        size = sum(call.products[number].size for number in used)
        flops = sum(call.products[number].flops for number in again)
        keys = frozenset(call.products[number].key for number in used)
        return Option(keys, size, flops, max(call.plain_bytes - size, 0))

    found = [Option(None, call.plain_bytes, 0, 0)]
    if len(keepable) <= MOST_ENUMERATED:
        for chosen in range(2 ** len(keepable)):
            found.append(option(frozenset(n for i, n in enumerate(sorted(keepable)) if chosen >> i & 1)))
    else:
        kept = keepable
        found.append(option(kept))
        while kept:
            now = found[-1]
            kept = min(
                (kept - {number} for number in kept),
                key=lambda fewer: _price(option(fewer), now),
            )
            found.append(option(kept))
    found.sort(key=lambda one: (one.kept_bytes, one.flops, one.again_bytes))
    worth: list[Option] = []
    for one in found:
        if not worth or (one.flops, one.again_bytes) < (worth[-1].flops, worth[-1].again_bytes):
            worth.append(one)
    return worth


def _price(fewer: Option, now: Option) -> tuple[float, int]:
    """FLOPs for each byte that is freed."""
    freed = now.kept_bytes - fewer.kept_bytes
    flops = fewer.flops - now.flops
    return (flops / freed if freed > 0 else math.inf if flops > 0 else 0.0), flops


def cheapest(costs: StepCosts, budget: int) -> Plan:
    """The plan with the fewest FLOPs that keeps no more than `budget` bytes.

    Bytes are rounded up to 1/4096 of what there is to choose; plans that treat all blocks alike are compared exactly,
    so that none of them is cheaper.

    Raises:
        InputError: no plan keeps so few.
    """
    fronts: dict[Any, list[Option]] = {}
    for call in costs.calls:
        if _kind(call) not in fronts:
            fronts[_kind(call)] = options_of(call)
    options = [fronts[_kind(call)] for call in costs.calls]
    smallest = tuple(front[0] for front in options)
    lowest = costs.base_bytes + sum(option.kept_bytes for option in smallest)
    if lowest > budget:
        raise InputError(
            f"ActivationCheckpointing(policy='budget', budget=...): {mib(budget)} MiB is too little, {mib(lowest)} "
            f"MiB is the least of {mib(costs.plain_bytes)} ({mib(costs.base_bytes)} are outside the blocks or their "
            f"inputs); use budget={math.ceil(1000 * lowest / costs.plain_bytes) / 1000} or more, or smaller batches."
        )
    candidates = [smallest, *_uniform(costs, options), _knapsack(options, budget - costs.base_bytes)]
    plans = [Plan(costs, budget, tuple(candidate)) for candidate in candidates]
    fitting = [plan for plan in plans if plan.kept_bytes <= budget]
    best = min(fitting, key=lambda plan: (plan.flops, sum(option.again_bytes for option in plan.options)))
    return Plan(costs, budget, _early_first(costs, best.options))


def _kind(call: CallCost) -> tuple[Any, ...]:
    return call.products, call.roots, call.plain_bytes


def _uniform(costs: StepCosts, options: list[list[Option]]) -> Iterator[list[Option]]:
    """Plans that treat one block in k alike, in every way that is worth it."""
    off = [Option(None, call.plain_bytes, 0, 0) for call in costs.calls]
    yield off
    for place in range(max(map(len, options))):
        inside = [front[min(place, len(front) - 1)] for front in options]
        for every in range(1, len(costs.names) + 1):
            pairs = zip(costs.calls, inside, off, strict=True)
            yield [one if call.block % every == 0 else plain for call, one, plain in pairs]


def _knapsack(options: list[list[Option]], room: int) -> list[Option]:
    """One option for each call, at the fewest FLOPs (then, the fewest bytes made anew) for so many bytes."""
    unit = max(room / CELLS, 1.0)
    cells = int(room / unit)
    flops, again = np.zeros(cells + 1, dtype=np.int64), np.zeros(cells + 1, dtype=np.int64)
    never = np.iinfo(np.int64).max // 2
    chosen = np.zeros((len(options), cells + 1), dtype=np.int16)
    for number, front in enumerate(options):
        best, best_again = np.full(cells + 1, never), np.full(cells + 1, never)
        for place, option in enumerate(front):
            weight = int(np.ceil(option.kept_bytes / unit))
            if weight > cells:
                continue
            cost = np.full(cells + 1, never)
            anew = np.full(cells + 1, never)
            cost[weight:] = np.minimum(flops[: cells + 1 - weight] + option.flops, never)
            anew[weight:] = np.minimum(again[: cells + 1 - weight] + option.again_bytes, never)
            better = (cost < best) | ((cost == best) & (anew < best_again))
            best[better], best_again[better] = cost[better], anew[better]
            chosen[number][better] = place
        flops, again = best, best_again
    if flops[cells] >= never:
        return [front[0] for front in options]
    plan, cell = [], cells
    for number in reversed(range(len(options))):
        option = options[number][chosen[number][cell]]
        cell -= int(np.ceil(option.kept_bytes / unit))
        plan.append(option)
    return plan[::-1]


def _early_first(costs: StepCosts, options: Sequence[Option]) -> tuple[Option, ...]:
    """Of calls that are alike, recompute the early ones: when their turn comes, the later ones have gone."""
    ordered = list(options)
    places: dict[Any, list[int]] = {}
    for place, call in enumerate(costs.calls):
        places.setdefault(_kind(call), []).append(place)
    for alike in places.values():
        for place, option in zip(alike, sorted((options[p] for p in alike), key=lambda o: -o.again_bytes), strict=True):
            ordered[place] = option
    return tuple(ordered)


def parse_budget(budget: float | str) -> float | int:
    """What was allowed: a share of the plain bytes, 0 to 1, as a float; or bytes as an int.

    Raises:
        ValueError: neither.
    """
    if isinstance(budget, str):
        found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]i?B)", budget.strip(), re.IGNORECASE)
        if found is not None and float(found[1]):
            return int(float(found[1]) * UNITS[found[2].upper()])
    elif 0 < budget <= 1 and not isinstance(budget, bool):
        return float(budget)
    elif budget >= FEWEST_BYTES and math.isfinite(budget):
        return int(budget)
    raise ValueError(
        f"ActivationCheckpointing(budget={budget!r}): use bytes, such as '2GiB' or {2 * 2**30}, or a share from "
        "0 to 1, such as 0.3."
    )
