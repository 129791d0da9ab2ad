"""Analytic counts against torch's own, for every kind of attention and every option that changes a product."""

from fractions import Fraction
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from kexue.analysis.crossings import (
    attention_over_feedforward,
    generation_step,
    growth,
    linear_attention_pays,
    quadratic_over_linear,
    speedup_bound,
)
from kexue.analysis.model_state import FLOAT_ADAM, MIXED_ADAM, model_state
from kexue.analysis.step_cost import StepCounter, flop_counter
from kexue.analysis.transformer_cost import TransformerCost, transformer_cost
from kexue.analysis.transformer_parts import Workload
from kexue.errors import InputError
from kexue.nn.transformer import EncoderDecoder, Transformer, TransformerConfig

SMALL: dict[str, Any] = {
    "vocab_size": 60, "dim": 32, "num_layers": 2, "num_heads": 4, "feedforward_dim": 80, "dropout": 0.0,
    "max_length": 48, "positions": "learned",
}  # fmt: skip
WORK = Workload(batch=2, length=24)
KINDS: dict[str, dict[str, Any]] = {
    "softmax": {},
    "rope": {"positions": "rope"},
    "causal": {"mask": "causal"},
    "post": {"norm": "post"},
    "deepnorm": {"norm": "deepnorm", "positions": "rope"},
    "gpt2_ml": {"norm": "gpt2_ml", "mask": "causal", "heads": ("lm",), "embedding_dim": 16},
    "rms, gated": {"norm_kind": "rms", "gated": True, "activation": "silu", "feedforward_bias": False},
    "grouped keys": {"num_kv_heads": 2, "positions": "rope", "attention_bias": False},
    "log_n": {"attention_scale": "log_n", "positions": "rope"},
    "sinusoidal": {"positions": "sinusoidal", "num_segments": 2},
    "roberta": {"norm": "post", "first_position": 2, "heads": ("masked_lm",)},
    "heads": {"heads": ("pooler", "sentence", "masked_lm"), "embedding_dim": 16},
    "no output projection": {"output_projection": False},
    "relative": {"positions": "relative"},
    "relative, causal, clamped": {"positions": "relative", "mask": "causal", "clamp_length": 8, "key_size": 16},
    "relative, talking": {"positions": "relative", "talking_heads": "both"},
    "talking": {"talking_heads": "both", "num_key_heads": 6, "num_value_heads": 2},
    "talking before": {"talking_heads": "pre", "num_key_heads": 2, "positions": "rope"},
    "talking after": {"talking_heads": "post", "num_value_heads": 8, "head_size": 4},
    "dense": {"attention": "dense", "synthesizer_dim": 12},
    "factorised dense": {"attention": "factorised_dense", "synthesizer_factors": (4, 12)},
    "random": {"attention": "random"},
    "fixed random, talking": {"attention": "random", "trainable_scores": False, "talking_heads": "both"},
    "factorised random": {"attention": "factorised_random", "synthesizer_rank": 3},
    "fixed random, talking after": {"attention": "random", "trainable_scores": False, "talking_heads": "post"},
    "fixed factorised random": {"attention": "factorised_random", "trainable_scores": False},
    "mixture": {"attention": "mixture", "mixture": ("softmax", "dense", "random"), "positions": "rope"},
    "mixture of random": {"attention": "mixture", "mixture": ("random", "factorised_random"), "talking_heads": "pre"},
    "elu": {"attention": "elu"},
    "elu, rope": {"attention": "elu", "positions": "rope", "num_kv_heads": 2},
    "elu, rope, causal": {"attention": "elu", "positions": "rope", "mask": "causal"},
    "favor": {"attention": "favor", "num_features": 12, "positions": "rope"},
    "favor, causal": {"attention": "favor", "num_features": 12, "mask": "causal", "head_size": 12},
    "taylor": {"attention": "taylor", "key_size": 6},
    "taylor, causal": {"attention": "taylor", "key_size": 6, "mask": "causal", "attention_scale": "log_n"},
    "limit": {"attention": "limit", "key_size": 3, "kernel_degree": 4},
    "all shared": {"sharing": "all", "num_groups": 2, "num_layers": 4, "group_size": 2},
    "attention shared": {"sharing": "attention", "num_layers": 3},
    "feed-forward shared": {"sharing": "feedforward", "num_groups": 2, "num_layers": 4},
    "decoder": {"num_decoder_layers": 3, "heads": ("lm",)},
    "decoder, grouped keys": {"num_decoder_layers": 1, "num_kv_heads": 2, "norm": "post", "gated": True},
}


def build(config: TransformerConfig) -> Transformer | EncoderDecoder:
    torch.manual_seed(0)
    return (EncoderDecoder if config.num_decoder_layers else Transformer)(config).train()


def forward(module: Transformer | EncoderDecoder, work: Workload) -> torch.Tensor:
    """Everything the module has, summed up."""
    ids = torch.randint(0, module.config.vocab_size, (work.batch, work.length))
    if isinstance(module, EncoderDecoder):
        source = torch.randint(0, module.config.vocab_size, (work.batch, work.source_length or work.length))
        hidden = module(source, ids)
    else:
        hidden = module(ids)
    total = hidden.sum()
    if "pooler" in module.config.heads:
        assert isinstance(module, Transformer)
        total = total + module.sentence_logits(hidden).sum()
    if {"lm", "masked_lm"} & set(module.config.heads):
        wanted = hidden.flatten(0, 1) if work.predictions is None else hidden.flatten(0, 1)[: work.predictions]
        total = total + module.logits(wanted).sum()
    return total


@pytest.mark.parametrize("name", KINDS)
def test_counts_are_those_of_torch(name: str) -> None:
    work = WORK._replace(source_length=20 if "decoder" in name else 0)
    config = TransformerConfig(**{**SMALL, **KINDS[name]})
    module, cost = build(config), transformer_cost(config, work)
    assert cost.parameters == sum(parameter.numel() for parameter in module.parameters())
    with flop_counter() as counter:
        forward(module, work)
    assert cost.forward_flops() == counter.get_total_flops()
    for recompute in ("off", "selective", "full"):
        with StepCounter(module, module.blocks(), recompute) as step:
            forward(module, work).backward()
        assert cost.step_flops(recompute) == step.flops, recompute


@pytest.mark.parametrize("name", ["softmax", "rope", "grouped keys", "decoder"])
def test_unfused_counts_are_those_of_torchs_own_counter(name: str) -> None:
    """Without the formula for the CPU's kernel, which the project registers itself."""
    config, work = TransformerConfig(**{**SMALL, **KINDS[name]}), WORK._replace(fused=False)
    module = build(config)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        forward(module, work).backward()
    assert transformer_cost(config, work).step_flops() == counter.get_total_flops()


@pytest.mark.parametrize("name", ["elu, rope, causal", "taylor, causal", "favor, causal", "elu"])
@pytest.mark.parametrize("length", [1, 64, 130])
def test_linear_attention_in_chunks(name: str, length: int) -> None:
    config = TransformerConfig(**{**SMALL, **KINDS[name], "max_length": 130})
    work = WORK._replace(length=length)
    module, cost = build(config), transformer_cost(config, work)
    with StepCounter(module) as step:
        forward(module, work).backward()
    assert cost.step_flops() == step.flops


def test_predictions_at_some_places() -> None:
    config, work = TransformerConfig(**SMALL, heads=("masked_lm",)), WORK._replace(predictions=5)
    module = build(config)
    with StepCounter(module) as step:
        forward(module, work).backward()
    assert transformer_cost(config, work).step_flops() == step.flops


def test_dropout_lengthens_the_second_pass_of_a_block() -> None:
    config = TransformerConfig(**{**SMALL, "dropout": 0.1, "attention_dropout": 0.0})
    module, cost = build(config), transformer_cost(config, WORK)
    with StepCounter(module, module.blocks(), "full") as step:
        forward(module, WORK).backward()
    assert cost.step_flops("full") == step.flops
    assert cost.step_flops("full") - cost.step_flops() == 2 * sum(part.macs for part in cost.parts if part.in_blocks)


@pytest.mark.parametrize(
    ("name", "tolerance"),
    [
        ("softmax", 0.03), ("rope", 0.03), ("post", 0.03), ("grouped keys", 0.05), ("relative", 0.1), ("dense", 0.1),
        ("mixture", 0.1), ("talking after", 0.15), ("elu", 0.05), ("favor", 0.05), ("taylor", 0.1),
        ("all shared", 0.03), ("random", 0.2), ("decoder", 0.05),
    ],
)  # fmt: skip
def test_activations_are_about_those_measured(name: str, tolerance: float) -> None:
    config = TransformerConfig(**{**SMALL, **KINDS[name], "heads": ()})
    module, cost = build(config), transformer_cost(config, WORK)
    for recompute, within in (("off", tolerance), ("full", 0.15)):
        with StepCounter(module, module.blocks(), recompute) as step:
            forward(module, WORK).backward()
        assert cost.saved_bytes(recompute) == pytest.approx(step.saved_bytes, rel=within)


def test_parameters_of_bert_base() -> None:
    transformers = pytest.importorskip("transformers")
    config = TransformerConfig(
        vocab_size=21128, dim=768, num_layers=12, num_heads=12, feedforward_dim=3072, positions="learned", norm="post",
        num_segments=2, heads=("pooler",),
    )  # fmt: skip
    with torch.device("meta"):
        bert = transformers.BertModel(transformers.BertConfig(vocab_size=21128))
    assert transformer_cost(config).parameters == sum(parameter.numel() for parameter in bert.parameters())


def encoder(dim: int = 768, **changes: Any) -> TransformerConfig:
    return TransformerConfig(
        **{"vocab_size": 100, "dim": dim, "num_heads": 12, "feedforward_dim": 4 * dim, "num_layers": 12, **changes}
    )


def group(cost: TransformerCost, *names: str) -> int:
    return sum(part.macs for part in cost.parts if part.name.startswith(names))


def test_a_layer_of_base_as_in_the_article() -> None:
    assert transformer_cost(encoder(num_layers=1), Workload(length=100)).macs == 723_148_800
    cost = transformer_cost(encoder(), Workload(length=512))
    assert cost.quadratic_macs / cost.macs == 512 / (6 * 768 + 512)
    assert speedup_bound(cost) == pytest.approx(1 + 512 / (6 * 768))


@pytest.mark.parametrize("dim", [48, 768, 1200])
def test_crossing_lengths(dim: int) -> None:
    config = encoder(dim)
    assert attention_over_feedforward(config) == 2 * dim
    assert quadratic_over_linear(config) == 6 * dim
    assert linear_attention_pays(config) == dim // 12
    assert linear_attention_pays(config, widening=4) == 16 * (dim // 12)
    at = transformer_cost(config, Workload(length=2 * dim))
    attention = group(at, "projections", "scores", "weighted", "output")
    assert attention == group(at, "feed-forward")
    at = transformer_cost(config, Workload(length=6 * dim))
    assert 2 * at.quadratic_macs == at.macs


@pytest.mark.parametrize("ratio", [1, 3, 8])
def test_crossing_lengths_of_other_ratios(ratio: int) -> None:
    config = encoder(feedforward_dim=ratio * 768)
    assert attention_over_feedforward(config) == (ratio - 2) * 768
    assert quadratic_over_linear(config) == (2 + ratio) * 768


def test_crossing_lengths_of_grouped_keys_and_gates() -> None:
    config = encoder(num_kv_heads=4, gated=True)
    projections = 2 * 768**2 + 2 * 768 * 4 * 64
    assert growth(config).linear == 12 * (projections + 3 * 4 * 768**2)
    assert quadratic_over_linear(config) == Fraction(projections + 12 * 768**2, 2 * 768)


def test_linear_attention_has_no_crossing() -> None:
    with pytest.raises(InputError, match="does not grow with the square"):
        quadratic_over_linear(encoder(attention="elu"))


def test_linear_in_batch_and_layers_and_quadratic_in_length() -> None:
    one = transformer_cost(encoder(num_layers=1), Workload(1, 128))
    many = transformer_cost(encoder(num_layers=5), Workload(3, 128))
    assert many.macs == 15 * one.macs
    twice = transformer_cost(encoder(num_layers=1), Workload(1, 256))
    assert twice.quadratic_macs == 4 * one.quadratic_macs
    assert twice.macs - twice.quadratic_macs == 2 * (one.macs - one.quadratic_macs)


def test_backward_is_twice_the_forward_without_fused_kernels() -> None:
    cost = transformer_cost(encoder(), Workload(2, 64, fused=False))
    assert cost.step_flops() == 3 * cost.forward_flops()
    assert cost.step_flops("selective") == cost.step_flops()


def test_generation_step() -> None:
    step = generation_step(encoder(), position=100, batch=3)
    assert step.macs == 3 * 12 * (12 * 768**2 + 2 * 100 * 768)
    assert step.cache_bytes == 3 * 12 * 2 * 100 * 768 * 2
    assert generation_step(encoder(num_kv_heads=3), 100).cache_bytes * 12 == step.cache_bytes
    assert step.macs_per_byte < 3


@pytest.mark.parametrize(("stage", "mixed", "plain"), [(0, 16, 16), (1, 4 + 12 / 8, 8 + 1), (2, 2 + 14 / 8, 4 + 1.5)])
def test_model_state(stage: Any, mixed: float, plain: float) -> None:
    assert model_state(8000, stage, 8, MIXED_ADAM).total == 8000 * mixed
    assert model_state(8000, stage, 8, FLOAT_ADAM).total == 8000 * plain


def test_model_state_is_divided_wholly_at_stage_3() -> None:
    assert model_state(8000, 3, 8).total == 16000
    assert model_state(8001, 3, 8).total == 16 * 1001
