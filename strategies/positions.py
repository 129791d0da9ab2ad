"""Where a run is inside an epoch: noted in its checkpoints, restored when it goes on, on any number of processes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from pytorch_lightning.strategies import Strategy
from pytorch_lightning.trainer.states import TrainerFn

from .last_metrics import let_schedulers_look, recall
from .resume import (
    Position,
    ResumableLoader,
    another_random_state,
    random_state,
    repeat_validation,
    rewind,
    set_random_state,
)


class PositionMixin(Strategy):
    """The part of a base that knows the next batch of each training loader, and the random numbers to go on with.

    A checkpoint of a run in the middle of an accumulation window, or of a validation, continues at its start.
    """

    world_size: int
    global_rank: int

    def _begin_positions(self) -> None:
        self._positions: list[Position] = []
        self._pending: list[dict[str, Any]] = []
        self._inexact: list[str] = []
        self._metrics: dict[str, torch.Tensor] | None = None
        self._before_validation: dict[str, Any] | None = None
        self._validation_open = False

    @property
    def _trainer(self) -> pl.Trainer | None:
        module = self.lightning_module
        return None if module is None else module._trainer

    @property
    def positions(self) -> list[Position]:
        """The position in each of the training loaders; there is one unless the module trains on several."""
        combined = None if self._trainer is None else self._trainer.fit_loop._combined_loader
        # Loaders may have been made anew during the run: the last ones count.
        return self._positions[-len(combined.flattened) :] if combined is not None else []

    def process_dataloader(self, dataloader: object) -> object:
        """Make the training loader resumable; other loaders stay as they are."""
        dataloader = super().process_dataloader(dataloader)
        trainer = self._trainer
        if trainer is None or trainer.state.fn != TrainerFn.FITTING or not trainer.training:
            return dataloader
        position = Position(self.world_size, self.global_rank)
        if self._pending:
            inexact = position.go_on(dataloader, self._pending.pop(0))
            self._inexact += [inexact] if inexact else []
        if self._metrics is not None:  # Lightning has forgotten all metrics before, and asks for no loader later
            recall(trainer, self._metrics)
        self._positions.append(position)
        return ResumableLoader(dataloader, position)

    def on_train_start(self) -> None:
        """Set Lightning's count of batches to where the run goes on, and say once what does not go on exactly."""
        super().on_train_start()
        self._count_from_position()
        if self._metrics is not None:
            assert self._trainer is not None
            let_schedulers_look(self._trainer)
            self._metrics = None
        cut_off = next((p.pending for p in self.positions if p.pending and p.pending.get("validating")), None)
        if cut_off is not None:  # a validation, which starts again from the random numbers it had
            set_random_state(cut_off["random"])
        if self._inexact:
            reasons, self._inexact = dict.fromkeys(self._inexact), []
            rank_zero_warn(
                "The run goes on elsewhere. Weights, optimiser, techniques, schedulers and counters are as saved; "
                f"not exact: {'; '.join(reasons)}."
            )

    def _count_from_position(self) -> None:
        trainer = self._trainer
        assert trainer is not None
        positions, combined = self.positions, trainer.fit_loop._combined_loader
        if combined is None or all(position.resumed_at is None for position in positions):
            return
        # The loader that decides how long an epoch is.
        lengths = [len(loader) if hasattr(loader, "__len__") else 0 for loader in combined.flattened]
        longest = lengths.index(min(lengths) if combined._mode == "min_size" else max(lengths))
        count = positions[longest].resumed_at or 0
        if trainer.num_training_batches != float("inf"):
            count = min(count, int(trainer.num_training_batches) - 1)
        for position in positions:
            position.offset += count - (position.resumed_at or 0)
        progress: Any = trainer.fit_loop.epoch_loop.batch_progress
        moved = count - progress.current.processed
        for name in ("ready", "started", "processed", "completed"):
            setattr(progress.current, name, getattr(progress.current, name) + moved)
        if moved and count % trainer.accumulate_grad_batches:
            self._inexact.append("the first window of accumulated batches is shorter")

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Remember where each window of accumulated batches starts."""
        super().on_train_batch_start(batch, batch_idx)
        batches = 1 if self._trainer is None else self._trainer.accumulate_grad_batches
        if batches > 1 and batch_idx % batches == 0:
            for position in self.positions:
                position.start_window(batch_idx)

    def validation_follows(self) -> None:
        """Note the random numbers that the validation after this step starts from, in case it is cut off."""
        self._before_validation = random_state()

    @contextmanager
    def cut_off_validation(self) -> Iterator[None]:
        """Let checkpoints saved here continue at the start of the validation that runs, or is about to."""
        self._validation_open = True
        try:
            yield
        finally:
            self._validation_open = False

    def note_positions(self, loops: dict[str, Any] | None) -> tuple[list[Any], dict[str, Any] | None]:
        """Return the position of every process, and a checkpoint's `loops` as they are at that place.

        Gradients of an open accumulation window are not saved: such a checkpoint resumes at the window's first batch.
        """
        trainer = self._trainer
        assert trainer is not None
        progress = trainer.fit_loop.epoch_loop.batch_progress
        done = 0 if progress.is_last_batch else progress.current.processed  # type: ignore[attr-defined]
        open_batches = done % trainer.accumulate_grad_batches
        own = [position.state(done, open_batches) for position in self.positions or [Position()]]
        if loops is not None and open_batches:
            loops = rewind(loops, done, done - open_batches)
        if self._validation_open and not open_batches:  # a window goes again, and the validation after it
            random = self._before_validation or random_state()
            own = [{**state, "random": random, "validating": True} for state in own]
            loops = None if loops is None else repeat_validation(loops)
        if self.world_size == 1:
            return [own], loops
        positions: list[Any] = [None] * self.world_size
        torch.distributed.all_gather_object(positions, own)
        return positions, loops

    def restore_position(self, path: Path, positions: Sequence[list[dict[str, Any]]]) -> None:
        """Continue where each process was, or, on other processes, where all of them were together."""
        if len(positions) == self.world_size:
            self._pending = list(positions[self.global_rank])
            return
        rank, first = self.global_rank, positions[0]
        own = positions[rank] if rank < len(positions) else first
        states = [state["random"] for state in own]
        if rank >= len(positions):
            states = [another_random_state(state, rank) for state in states]
        # How the rows were divided, and how far that went, is the same in every process' words; a batch that one had
        # fetched ahead is no longer the one that comes next.
        self._pending = [
            {**state, "random": random, "before_fetch": None} for state, random in zip(first, states, strict=True)
        ]
        self._inexact.append(
            f"{path.name} was saved by {len(positions)} processes, now {self.world_size}, so random numbers (dropout, "
            "augmentation) are others"
        )
