"""Throughput, memory, the progress bar and the confusion matrix, without a trainer and in a short run."""

import io
import re
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from ranks import run_ranks
from rich.console import Console
from torch.utils.data import DataLoader

from kexue.callbacks import Checkpoints, ConfusionMatrixPlot, CSVMetrics, MemoryPeak, ProgressBar, Throughput
from kexue.callbacks.memory import peak_memory
from kexue.callbacks.throughput import count_samples
from kexue.errors import InputError


class Rows(CSVMetrics):
    """Keeps what is logged."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.seen: list[tuple[int | None, dict[str, float]]] = []

    def log_metrics(self, metrics, step=None) -> None:
        self.seen.append((step, dict(metrics)))

    def values(self, key: str) -> list[tuple[int | None, float]]:
        return [(step, metrics[key]) for step, metrics in self.seen if key in metrics]


class Clock:
    """A clock that the work itself moves on."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def perf_counter(self) -> float:
        return self.seconds


CLOCK = Clock()


class Timed(pl.LightningModule):
    """Ten milliseconds a step, fifty a validation batch; classifies by parity and is wrong for 3."""

    def __init__(self, fail: bool = False) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.fail = fail

    def training_step(self, batch, batch_idx):
        CLOCK.seconds += 0.01
        if self.fail and self.global_step == 3:
            raise RuntimeError("broken")
        return self.layer(batch["x"]).square().mean()

    def validation_step(self, batch, batch_idx):
        CLOCK.seconds += 0.05
        self.log("val/loss", self.layer(batch["x"]).square().mean())

    def test_step(self, batch, batch_idx):
        number = batch["number"]
        return {"prediction": torch.where(number == 3, 0, number % 2), "target": number % 2}

    def predict_step(self, batch, batch_idx):
        return batch["number"]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def collate(numbers: list[int]) -> dict[str, Any]:
    return {"text": ["a"] * 2, "x": torch.ones(len(numbers), 1), "number": torch.tensor(numbers), "num_tokens": 7}


def run(folder: Path, *callbacks: pl.Callback, epochs: int = 2, fn: str = "fit", **options) -> tuple[pl.Trainer, Any]:
    data = DataLoader(list(range(12)), batch_size=2, collate_fn=collate)
    has_bar = any(isinstance(callback, ProgressBar) for callback in callbacks)
    module = Timed(options.pop("fail", False))
    options = {"logger": Rows(folder), "enable_checkpointing": False, "log_every_n_steps": 3} | options
    trainer = pl.Trainer(
        max_epochs=epochs, accelerator="cpu", default_root_dir=folder, callbacks=list(callbacks),
        enable_progress_bar=has_bar, enable_model_summary=False, **options,
    )  # fmt: skip
    arguments = (data, data) if fn == "fit" else (data,)
    getattr(trainer, fn)(module, *arguments)
    return trainer, options["logger"]


def test_samples_are_counted_by_the_first_tensor() -> None:
    assert count_samples(torch.zeros(5, 2)) == 5
    assert count_samples({"names": ["a", "b"], "n": 3, "x": [torch.zeros(4), torch.zeros(9)]}) == 4
    assert count_samples(["only", "text"]) == count_samples(torch.tensor(1.0)) == 0


def test_throughput_leaves_out_validation_and_saving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class SlowDisk(pl.Callback):
        def on_save_checkpoint(self, trainer, pl_module, checkpoint) -> None:
            CLOCK.seconds += 1.0

    monkeypatch.setattr("kexue.callbacks.throughput.time", CLOCK)
    saver = Checkpoints(tmp_path / "c", every_n_steps=2)
    _, rows = run(tmp_path, Throughput(), SlowDisk(), saver, enable_checkpointing=True)
    expected = {"step_seconds": 0.01, "samples_per_second": 200.0, "tokens_per_second": 700.0}
    for key, value in expected.items():
        steps, values = zip(*rows.values(f"throughput/{key}"), strict=True)
        assert steps == (2, 5, 8, 11)  # where Lightning logs
        assert values == pytest.approx([value] * 4)


def test_throughput_of_a_step_whose_checkpoint_comes_before_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class SaveAtOnce(pl.Callback):
        def on_train_batch_end(self, trainer, *_: Any) -> None:
            trainer.save_checkpoint(tmp_path / "a.ckpt")
            CLOCK.seconds += 1.0

    monkeypatch.setattr("kexue.callbacks.throughput.time", CLOCK)
    _, rows = run(tmp_path, SaveAtOnce(), Throughput(), log_every_n_steps=1)
    assert rows.values("throughput/step_seconds") == [(step, pytest.approx(0.01)) for step in range(12)]


def test_throughput_with_accumulation_logs_once_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kexue.callbacks.throughput.time", CLOCK)
    _, rows = run(tmp_path, Throughput(), MemoryPeak(), accumulate_grad_batches=2, log_every_n_steps=1)
    assert rows.values("throughput/step_seconds") == [(step, pytest.approx(0.02)) for step in range(6)]
    assert len(rows.values("memory/peak_gib")) == 6


def test_memory_peak_is_that_of_the_process(tmp_path: Path) -> None:
    block = torch.ones(2**27)  # half a GiB of float32, touched
    after = peak_memory(torch.device("cpu"))
    del block
    assert after > 0.5
    _, rows = run(tmp_path, MemoryPeak())
    assert [value >= after for _, value in rows.values("memory/peak_gib")] == [True] * 4


def terminal() -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=160, color_system=None)


def text_of(console: Console) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue())  # type: ignore[attr-defined]


def test_bar_on_a_terminal(tmp_path: Path) -> None:
    console = terminal()
    run(tmp_path, ProgressBar(seconds=0.0, console=console))
    text = text_of(console)
    assert "epoch 2/2" in text
    assert "6/6" in text
    assert "validation" in text
    assert re.search(r"it/s  0:00:0\d left  loss [\d.]+", text)
    assert re.search(r"epoch 2 validation: loss [\d.]+", text)
    assert console.file.getvalue().endswith("\x1b[?25h")  # type: ignore[attr-defined]  # the cursor is back


def test_bar_draws_by_the_clock(tmp_path: Path) -> None:
    often, seldom = terminal(), terminal()
    run(tmp_path, ProgressBar(seconds=0.0, console=often))
    run(tmp_path, ProgressBar(seconds=60.0, console=seldom))
    assert text_of(often).count("it/s") > 12
    assert text_of(seldom).count("it/s") <= 4


def test_a_line_an_epoch_elsewhere(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=20)
    run(tmp_path, ProgressBar(console=console))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert len(lines) == 2
    assert re.fullmatch(r"epoch 2/2  step 12  0:00:0\d  [\d.]+ it/s  val/loss [\d.]+", lines[1])


@pytest.mark.parametrize("fn", ["test", "predict", "validate"])
def test_bar_alone(tmp_path: Path, fn: str) -> None:
    console = terminal()
    run(tmp_path, ProgressBar(seconds=0.0, console=console), fn=fn)
    assert "6/6" in text_of(console)


def test_bar_ends_with_the_run_that_fails(tmp_path: Path) -> None:
    console = terminal()
    with pytest.raises(RuntimeError, match="broken"):
        run(tmp_path, ProgressBar(seconds=0.0, console=console), fail=True)
    assert console.file.getvalue().endswith("\x1b[?25h")  # type: ignore[attr-defined]
    assert console._live_stack == []


def test_confusion_matrix_is_drawn(tmp_path: Path) -> None:
    run(tmp_path, ConfusionMatrixPlot(class_names=["even", "odd"]), fn="test")
    picture = (tmp_path / "plots" / "confusion_matrix.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 5000


def test_confusion_matrix_asks_for_what_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="1 names, but class 1 occurs"):
        run(tmp_path, ConfusionMatrixPlot(class_names=["even"]), fn="test")
    monkeypatch.setattr(Timed, "test_step", lambda self, batch, batch_idx: None)
    with pytest.raises(InputError, match="test_step must return"):
        run(tmp_path, ConfusionMatrixPlot(), fn="test")


def two_ranks(folder: str) -> Any:
    """On one of two processes: the matrix that is drawn, and the samples a second beside this process's own pace."""
    drawn = []
    import kexue.callbacks.confusion_matrix as module

    module.plot_confusion_matrix = lambda matrix, names: drawn.append(matrix.tolist())  # type: ignore[assignment]
    module.log_picture = lambda *_: None
    run(Path(folder), ConfusionMatrixPlot(), fn="test", strategy="ddp", devices=2)
    _, rows = run(Path(folder), Throughput(), MemoryPeak(), strategy="ddp", devices=2)
    return drawn, rows.values("throughput/samples_per_second"), rows.values("throughput/step_seconds")


def test_two_processes_count_together(tmp_path: Path) -> None:
    (drawn, samples, steps), (drawn_elsewhere, *_) = run_ranks(two_ranks, 2, str(tmp_path))
    assert drawn == [[[6, 0], [1, 5]]]
    assert drawn_elsewhere == []
    assert [v for _, v in samples] == pytest.approx([4 / seconds for _, seconds in steps])
