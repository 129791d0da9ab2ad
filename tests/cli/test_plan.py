"""`kexue plan` on the project's own experiments."""

from typing import Any

import pytest

from kexue.analysis.plan import DEVICES, PRECISIONS, Job, forecasts
from kexue.analysis.step_cost import StepCost
from kexue.cli import main as cli
from kexue.cli import session
from kexue.cli.config import compose_run, plain
from kexue.cli.plan import _command, _count_real, _largest_batch, count_job

GPLINKER = ["experiment=gplinker_event", "data.root=null", "data.num_generated=60"]


pytestmark = pytest.mark.filterwarnings("ignore:.*self.log.*", "ignore:.*FakeTensor.*")


def config(*words: str) -> dict[str, Any]:
    return plain(compose_run(list(words)), "runs")


def test_every_strategy_and_recomputation(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", *GPLINKER, "devices=8", "memory=80GB"]) == 0
    printed = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in printed.splitlines() if line.startswith("│")]
    plans = {(row[0], row[1]): row for row in rows if len(row) == 11}
    strategies = ("ddp", "zero_1", "zero_2", "zero_3", "zero_3_offload")
    assert set(plans) == {(name, again) for name in strategies for again in ("off", "selective", "full")}
    assert [row[-1] for row in plans.values()].count("best") == 1
    assert plans["ddp", "off"][-1] == "best"
    assert "best: kexue fit ... strategy=ddp trainer.devices=8" in printed
    assert "67 TFLOP/s for 32-true" in printed
    assert "vendor data sheet" in printed


def test_counts_without_data_are_those_of_a_real_step() -> None:
    chosen = config()
    job, remarks = count_job(chosen)
    assert "counted on tensors without data" in remarks
    data = session.make_data(chosen, None)
    data.setup("fit")
    real, _ = _count_real(chosen, data, _largest_batch(data), on_gpu=True)
    assert real == job
    model = session.make_model(chosen, data)
    model.configure_model()
    assert job.trained == sum(parameter.numel() for parameter in model.parameters())
    assert job.state_values == 2
    assert job.costs["full"].saved_bytes < job.costs["off"].saved_bytes


def test_techniques_and_precision_count() -> None:
    plain_job, _ = count_job(config())
    lookahead, _ = count_job(config("technique=[lookahead]"))
    assert lookahead.state_values == plain_job.state_values + 1
    half, _ = count_job(config("trainer.precision=bf16-true"))
    assert half.costs["off"].saved_bytes < 0.7 * plain_job.costs["off"].saved_bytes
    mixed, _ = count_job(config("trainer.precision=bf16-mixed"))
    assert mixed.costs["off"].flops == plain_job.costs["off"].flops


def test_larger_batches_keep_more() -> None:
    small, large = (count_job(config(f"data.batch_size={size}"))[0].costs["off"] for size in (32, 64))
    assert large.saved_bytes == pytest.approx(2 * small.saved_bytes, rel=0.05)
    assert large.flops == pytest.approx(2 * small.flops, rel=0.05)


def test_one_device_and_nothing_that_fits(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "memory=1GiB", "device=rtx4090"]) == 0
    printed = capsys.readouterr().out
    assert "zero_1" not in printed
    assert "nothing fits: the smallest, zero_3_offload with recomputation full" in printed


def test_modules_that_cannot_be_counted_without_data(capsys: pytest.CaptureFixture[str]) -> None:
    """GPLinker's loss takes as many cells as the labels name, which no shape says."""
    assert cli.main(["plan", *GPLINKER, "device=cpu"]) == 0
    assert "counted in a real step on the CPU" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["devices=0"], "devices=0: use a whole number of 1 or more"),
        (["devices=two"], "devices=two: use a whole number of 1 or more"),
        (["memory=80"], "memory=80: not a size; write it like memory=80GB or memory=24GiB"),
        (["device=h10"], "device=h10: no such device; did you mean h100?"),
        (["trainer.precision=64-true"], "trainer.precision=64-true: kexue plan knows 32-true"),
        (["experiment=nothing"], "experiment=nothing: no such experiment"),
        (["data.batch_sise=3"], "data.batch_sise: no such key; did you mean data.batch_size?"),
    ],
)
def test_wrong_input(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", *words]) == 2
    line = capsys.readouterr().err
    assert message in line
    assert line.count("\n") == 1


@pytest.mark.parametrize(
    ("recompute", "words"),
    [
        ("off", "best: kexue fit ... strategy=ddp trainer.devices=2"),
        ("selective", " technique=[activation_checkpointing] technique.activation_checkpointing.policy=selective"),
        ("full", " technique=[activation_checkpointing]"),
    ],
)
def test_the_command_names_what_is_recomputed(recompute: Any, words: str) -> None:
    job = Job(10, 0, 0, 2, {recompute: StepCost(10, 10)})
    options = forecasts(job, 2, DEVICES["h100"], PRECISIONS["32-true"])
    assert _command(options[0], 2).endswith(words)
