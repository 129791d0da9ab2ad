"""What the models that answer questions share: how their answers are counted, withheld and given back."""

from abc import abstractmethod
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from torch import Tensor

from ...data.records import Answer, ReadingRecord
from ...nn.decoding import AnswerScores, vote
from ...nn.decoding.answer_metrics import Counting
from ...nn.decoding.voting import Voting
from .predictions import Predictions

Finding = tuple[Answer | None, float]
"""The best answer to a question, if there is any, and its margin: how much more is for it than for "no answer"."""


def elect(
    groups: Iterable[Iterable[tuple[float, Answer]]], within: Literal["sum", "max"], how: Voting
) -> tuple[Answer | None, float]:
    """The answer that several groups of candidates agree upon, by their text.

    Args:
        groups: probabilities and candidates of each passage, or window of one.
        within: what candidates of a group with the same text have together: the sum of their probabilities, where these
            are of one distribution; or the highest.
        how: see `vote`.

    Returns:
        The answer, at the most probable of its places, and its score; None and 0 where there are no candidates.
    """
    places: dict[str, tuple[float, Answer]] = {}
    found: list[dict[str, float]] = []
    for group in groups:
        scores: dict[str, float] = defaultdict(float)
        for probability, answer in group:
            text = answer.text
            scores[text] = scores[text] + probability if within == "sum" else max(scores[text], probability)
            if text not in places or probability > places[text][0]:
                places[text] = probability, answer
        found.append(scores)
    for text, score in vote(found, how).items():
        return places[text][1], score
    return None, 0.0


class ReadingModule(pl.LightningModule):
    """Questions are answered, and answers that are not sure enough are withheld.

    A subclass gives `features`, `task_losses` and `find`. How sure is enough is chosen on the validation questions,
    where F1 is highest, and kept in the checkpoint.

    Args:
        counting: how answers are compared, see `AnswerScores`.
        abstains: whether questions may have no answer; if not, the best answer is always given.
    """

    threshold: Tensor

    def __init__(self, counting: Counting, abstains: bool) -> None:
        super().__init__()
        self.abstains = abstains
        self.scores = AnswerScores(counting, abstains)
        if abstains:
            self.register_buffer("threshold", torch.zeros(()))

    @abstractmethod
    def features(self, batch: dict[str, Any]) -> Tensor:
        """What losses and answers are made of."""

    @abstractmethod
    def task_losses(self, features: Tensor, batch: dict[str, Any]) -> dict[str, Tensor]:
        """The losses of a batch, to be summed."""

    @abstractmethod
    def find(self, features: Tensor, batch: dict[str, Any]) -> list[Finding]:
        """The best answer to each question of a batch."""

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        losses = self.task_losses(self.features(batch), batch)
        loss = torch.stack(list(losses.values())).sum()
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=len(batch["records"]))
        return {"loss": loss, "losses": losses}

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self._evaluate(batch, "val")

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self._evaluate(batch, "test")

    def predict_step(self, batch: dict[str, Any], batch_idx: int = 0) -> Predictions[ReadingRecord]:
        """The records of the batch with the answer that the model gives to each, or none where it withholds it."""
        least = float(self.threshold) if self.abstains else -float("inf")
        return Predictions(
            replace(record, answers=(answer,) if answer is not None and margin > least else ())
            for record, (answer, margin) in zip(batch["records"], self.find(self.features(batch), batch), strict=True)
        )

    def on_validation_epoch_start(self) -> None:
        self.scores.reset()
        self.scores.threshold = None

    def on_test_epoch_start(self) -> None:
        self.scores.reset()
        self.scores.threshold = float(self.threshold) if self.abstains else None

    def on_validation_epoch_end(self) -> None:
        found = self._log_scores("val")
        if self.abstains:
            self.threshold.fill_(found["threshold"])

    def on_test_epoch_end(self) -> None:
        self._log_scores("test")

    def _evaluate(self, batch: dict[str, Any], stage: str) -> None:
        features = self.features(batch)
        loss = torch.stack(list(self.task_losses(features, batch).values())).sum()
        self.log(f"{stage}/loss", loss, on_epoch=True, sync_dist=True, batch_size=len(batch["records"]))
        found = self.find(features, batch)
        self.scores.update(
            ["" if answer is None else answer.text for answer, _ in found],
            [record.texts for record in batch["records"]],
            [margin for _, margin in found],
        )

    def _log_scores(self, stage: str) -> dict[str, Tensor]:
        scores = self.scores.compute()
        # Every rank has the same figures already; sync_dist only tells Lightning so.
        self.log_dict({f"{stage}/{name}": value for name, value in scores.items()}, sync_dist=True)
        return scores
