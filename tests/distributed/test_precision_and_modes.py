"""bf16-mixed, 16-mixed, manual optimisation, offload, and several runs in one process, on every base."""

from __future__ import annotations

from typing import Any

import pytest
from cells import BASES, differences, run_all
from ranks import run_ranks
from several_runs import many_runs

FP16 = {"precision": "16-mixed", "optimizer": "sgd", "accumulate": 2, "clip": 0.3}
OFFLOAD = {"offload_optimizer": True}
CELLS: dict[Any, Any] = {
    **{(base, "bf16"): ((base, "both"), {"precision": "bf16-mixed", "optimizer": "sgd"}) for base in BASES},
    **{(base, "bf16_fp32"): ((base, "both"), {"optimizer": "sgd"}) for base in BASES[:1]},
    **{(base, "fp16"): ((base, "both"), FP16) for base in BASES},
    **{(base, "spiky"): ((base, "both", "spiky"), FP16) for base in BASES},
    **{(base, "spiky offload"): ((base, "both", "spiky"), {**FP16, "strategy": OFFLOAD}) for base in BASES[2:]},
    **{(base, "manual fp16"): ((base, "both", "manual"), {"precision": "16-mixed"}) for base in BASES},
    **{(base, "manual"): ((base, "both", "manual"), {"optimizer": "sgd"}) for base in BASES},
    **{(base, "plain"): ((base, "both"), {"accumulate": 2, "clip": 0.3}) for base in BASES},
    ("zero_2", "offload"): (
        ("zero_2", "both"),
        {"accumulate": 2, "clip": 0.3, "strategy": {"offload_optimizer": True}},
    ),
    ("zero_3", "offload"): (
        ("zero_3", "both"),
        {"accumulate": 2, "clip": 0.3, "strategy": {"offload_optimizer": True, "offload_parameters": True}},
    ),
    ("zero_2", "offload_manual"): (
        ("zero_2", "both", "manual"),
        {"optimizer": "sgd", "strategy": {"offload_optimizer": True}},
    ),
    ("zero_3", "offload_manual"): (
        ("zero_3", "both", "manual"),
        {"optimizer": "sgd", "strategy": {"offload_optimizer": True}},
    ),
}


@pytest.fixture(scope="module")
def runs() -> dict[Any, Any]:
    return run_ranks(run_all, 2, CELLS)[0]


@pytest.mark.parametrize("base", BASES[1:])
def test_bf16_mixed_is_autocast_on_every_base(base: str, runs: dict[Any, Any]) -> None:
    """Float32 parameters under autocast, so the runs agree within bf16's rounding, 2^-8 of a value; stages 1 and 2 to
    the last bit. Stage 3 replaces the linear function by one that keeps no copy of the weight, and rounds elsewhere."""
    losses, weights = differences(runs[base, "bf16"], runs["ddp", "bf16"])
    assert losses <= (2**-8 if base == "zero_3" else 0.0)
    assert weights <= (2**-8 if base == "zero_3" else 0.0)


def test_bf16_mixed_is_not_float32(runs: dict[Any, Any]) -> None:
    assert differences(runs["ddp", "bf16"], runs["ddp", "bf16_fp32"])[0] > 1e-5


@pytest.mark.parametrize("base", BASES[1:])
def test_16_mixed_scales_the_loss_as_a_grad_scaler_does(base: str, runs: dict[Any, Any]) -> None:
    """Gradients are clipped as they are without the scale; no step is lost, and none is taken where one process alone
    has gradients that are not finite, once in each of two epochs. Stage 3 rounds elsewhere, as above."""
    for kind in ("fp16", "spiky", "spiky offload", "manual fp16"):
        if (base, kind) not in runs:
            continue
        run, reference = runs[base, kind], runs["ddp", kind.removesuffix(" offload")]
        losses, weights = differences(run, reference)
        assert losses <= (2**-8 if base == "zero_3" else 2e-6), kind
        assert weights <= (2**-8 if base == "zero_3" else 2e-6), kind
        assert run["scale"] == reference["scale"] == (2**14 if "spiky" in kind else 2**16), kind
        assert run["drift"] == 0, kind
    assert differences(runs[base, "fp16"], runs[base, "spiky"])[1] > 1e-3


@pytest.mark.parametrize("base", BASES[1:])
def test_a_run_does_not_depend_on_the_precision_of_the_one_before(base: str, runs: dict[Any, Any]) -> None:
    """These came after 16-mixed in the same processes; DeepSpeed would go on scaling, and skip the first step."""
    losses, weights = differences(runs[base, "plain"], runs["ddp", "plain"])
    assert losses <= 1e-6
    assert weights <= 1e-6
    assert runs[base, "plain"]["scale"] is None


@pytest.mark.parametrize("base", BASES[1:])
def test_a_bucket_is_no_larger_than_what_is_trained(base: str, runs: dict[Any, Any]) -> None:
    run = runs[base, "plain"]
    assert run["bucket"] == sum(weight.size for weight in run["weights"].values())


@pytest.mark.parametrize("base", BASES[1:])
def test_manual_optimisation_with_its_own_accumulation(base: str, runs: dict[Any, Any]) -> None:
    losses, weights = differences(runs[base, "manual"], runs["ddp", "manual"])
    assert losses <= 1e-6
    assert weights <= 1e-6
    assert runs[base, "manual"]["step"] == 6


@pytest.mark.parametrize(
    ("key", "reference"),
    [
        (("zero_2", "offload"), ("ddp", "plain")),
        (("zero_3", "offload"), ("ddp", "plain")),
        (("zero_2", "offload_manual"), ("ddp", "manual")),
        (("zero_3", "offload_manual"), ("ddp", "manual")),
    ],
    ids=str,
)
def test_offload_changes_nothing(key: Any, reference: Any, runs: dict[Any, Any]) -> None:
    losses, weights = differences(runs[key], runs[reference])
    assert losses <= 1e-6
    assert weights <= 1e-6


def test_fit_validate_test_predict_and_fit_again(tmp_path: Any) -> None:
    results = run_ranks(many_runs, 2, str(tmp_path))[0]
    for base in BASES:
        found, reference = results[base], results["ddp"]
        assert found["validate"] == pytest.approx(found["fit"], abs=1e-6), base
        assert found["test"] == pytest.approx(found["fit"], abs=1e-6), base
        assert found["predictions"] == reference["predictions"], base
        assert found["fit_on"] == pytest.approx(reference["fit_on"], abs=1e-6), base
        assert found["fit_on"] < found["fit"], base
        assert found["weights"] == pytest.approx(reference["weights"], abs=1e-5), base
        assert found["test_saved"] == pytest.approx(found["fit"], abs=1e-6), base
