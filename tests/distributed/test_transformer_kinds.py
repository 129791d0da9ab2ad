"""Every kind of Transformer under ZeRO stage 3 on two processes, where no parameter is whole outside its module."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from cells import differences, run_all
from ranks import run_ranks

pytestmark = pytest.mark.slow

KINDS: dict[str, dict[str, Any]] = {
    "softmax": {},
    "learned_post": {"positions": "learned", "norm": "post", "num_segments": 2},
    "sinusoidal": {"positions": "sinusoidal"},
    "relative": {"positions": "relative", "mask": "causal"},
    "grouped_queries": {"num_kv_heads": 1, "key_size": 4, "gated": True, "norm_kind": "rms"},
    "log_n": {"attention_scale": "log_n", "mask": "causal"},
    "talking_heads": {"talking_heads": "both", "num_key_heads": 4, "num_value_heads": 1, "head_size": 16},
    "dense": {"attention": "dense", "positions": "learned"},
    "factorised_dense": {"attention": "factorised_dense", "positions": "learned"},
    "random": {"attention": "random", "positions": "learned"},
    "fixed_random": {"attention": "random", "positions": "learned", "trainable_scores": False},
    "factorised_random": {"attention": "factorised_random", "positions": "learned"},
    "mixture": {"attention": "mixture", "mixture": ("softmax", "random", "dense"), "positions": "learned"},
    "elu": {"attention": "elu", "mask": "causal"},
    "favor": {"attention": "favor", "num_features": 16},
    "taylor": {"attention": "taylor", "mask": "causal"},
    "limit": {"attention": "limit"},
    "deepnorm": {"norm": "deepnorm"},
    "gpt2_ml": {"norm": "gpt2_ml", "mask": "causal", "positions": "learned"},
    "albert": {"sharing": "all", "embedding_dim": 8, "norm": "post", "positions": "learned", "heads": ("masked_lm",)},
    "shared_attention": {"sharing": "attention"},
    "encoder_decoder": {"num_decoder_layers": 2, "norm": "deepnorm"},
}
STEPS = {"max_steps": 2, "epochs": 1, "optimizer": "sgd"}


@pytest.fixture(scope="module")
def ranks() -> list[dict[Any, Any]]:
    cells = {
        (base, name): ((base, "activation_checkpointing", "transformer"), {"config": config, **STEPS})
        for name, config in KINDS.items()
        for base in ("ddp", "zero_3")
    }
    fixed = {"config": KINDS["fixed_random"], "seed_by_rank": True}
    cells |= {("zero_2", "unseeded"): (("zero_2", "none", "transformer"), {**fixed, **STEPS})}
    return run_ranks(run_all, 2, cells)


@pytest.fixture(scope="module")
def runs(ranks: list[dict[Any, Any]]) -> dict[Any, Any]:
    return ranks[0]


@pytest.mark.parametrize("name", KINDS)
def test_stage_3_takes_the_steps_of_ddp(name: str, runs: dict[Any, Any]) -> None:
    losses, weights = differences(runs["zero_3", name], runs["ddp", name])
    assert losses <= 1e-6 * max(runs["ddp", name]["losses"])
    assert weights <= 1e-6
    assert runs["zero_3", name]["step"] == 2


def test_initial_gains_survive_stage_3(runs: dict[Any, Any]) -> None:
    """DeepNorm's gains are set inside each layer's constructor, before its weights are cut into shards."""
    weights = runs["zero_3", "deepnorm"]["weights"]
    deviation = {part: np.std(weights[f"net.layers.blocks.0.feedforward.{part}.weight"]) for part in ("inner", "outer")}
    expected = (8 * 2) ** -0.25 * (2 / (16 + 32)) ** 0.5
    assert deviation["inner"] == pytest.approx(expected, rel=0.15)
    assert deviation["outer"] == pytest.approx(expected, rel=0.15)


def test_what_is_drawn_and_not_trained_is_the_same_on_all_processes(ranks: list[dict[Any, Any]]) -> None:
    name = "net.layers.blocks.0.attention.scores.random.table"
    first, second = (rank["zero_2", "unseeded"]["buffers"][name] for rank in ranks)
    np.testing.assert_array_equal(first, second)
