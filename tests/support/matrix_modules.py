"""The modules of the matrix: with kexue's contract, around a model of `transformers`, and with one block used thrice.

Shapes: B batch, T tokens, D features. All three have two tasks whose losses differ by an order of magnitude, and may
drop features under masks that belong to the rows of a batch, however many processes share it.
"""

from __future__ import annotations

from typing import Any

import torch
from cells import RANK, Block, Classifier, Rows
from torch import Tensor, nn

from kexue.nn.transformer import Transformer, TransformerConfig

DIM = 16


class TaskRows(Rows):
    """The rows with a number to predict, and each with its own number."""

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        number = (self.ids[index].float().mean() - 26) / 3
        return {**super().__getitem__(index), "number": number, "row": torch.tensor(index)}


class RowDropout(nn.Module):
    """Dropout whose masks follow from the row and from one number a pass, which all processes draw alike.

    So two processes drop what one drops on the union of their batches, and a second pass drops something else.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p
        self.rows: list[int] = []

    def forward(self, features: Tensor) -> Tensor:
        """Features `(B, D)`, some of them 0."""
        if not self.p or not self.training:
            return features
        start = int(torch.randint(2**31, ()))
        generators = [torch.Generator().manual_seed(start + row) for row in self.rows]
        kept = torch.stack([torch.rand(features.shape[1], generator=generator) for generator in generators]) >= self.p
        return features * kept.to(features.device) / (1 - self.p)


class TwoTasks(Classifier):
    """What the three have in common.

    Args:
        row_dropout: Share of the features to drop by rows, with all processes drawing alike; 0: the processes draw
            masks of their own from torch's generator, as they do in a real run.
    """

    block_names: Any = None
    rows = TaskRows

    def __init__(self, row_dropout: float = 0.0, **kwargs: Any) -> None:
        super().__init__(lr=0.01, **kwargs)
        self.noise = RowDropout(row_dropout)

    def on_train_start(self) -> None:
        torch.manual_seed(100 + (0 if self.noise.p else RANK))

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.noise.rows = batch["row"].tolist()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(outputs["loss"].item())  # what was trained on, techniques included

    def losses_of(self, scores: Tensor, batch: Any) -> dict[str, Tensor]:
        """Both losses of scores `(B, 4)`: three classes and a number."""
        kind = nn.functional.cross_entropy(scores[:, :3], batch["labels"])
        return {"kind": kind, "number": nn.functional.mse_loss(scores[:, 3], batch["number"])}

    def scores(self, batch: Any) -> Tensor:
        """Scores `(B, 4)`."""
        raise NotImplementedError

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        scores = self.scores(batch)
        return self.outputs(self.losses_of(scores, batch), scores)

    @staticmethod
    def outputs(losses: dict[str, Tensor], scores: Tensor) -> dict[str, Any]:
        return {"loss": torch.stack(list(losses.values())).sum(), "losses": losses, "logits": scores[:, :3]}


class KexueModule(TwoTasks):
    """kexue's contract: networks built in `configure_model`, `blocks()`, `head`, `task_losses(features, batch)`."""

    def __init__(self, dropout: float = 0.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.config = TransformerConfig(
            vocab_size=50, dim=DIM, num_layers=2, num_heads=2, feedforward_dim=32, max_length=8, dropout=dropout
        )
        self.net: Transformer | None = None

    def configure_model(self) -> None:
        if self.net is None:
            torch.manual_seed(5)  # here: under ZeRO stage 3 the engine has drawn other numbers before
            self.net = Transformer(self.config)
            self.head = nn.Linear(DIM, 4)

    def blocks(self) -> Any:
        assert self.net is not None
        return self.net.blocks()

    def task_losses(self, features: Tensor, batch: Any) -> dict[str, Tensor]:
        return self.losses_of(self.head(features), batch)

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        assert self.net is not None
        features = self.noise(self.net(batch["ids"]).mean(1))
        return self.outputs(self.task_losses(features, batch), self.head(features))


class BertModule(TwoTasks):
    """A model of `transformers`, and no method for kexue at all: blocks and head are found by name."""

    block_names = "BertLayer"

    def __init__(self, dropout: float = 0.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        from transformers import BertConfig, BertForSequenceClassification

        config = BertConfig(
            vocab_size=50,
            hidden_size=DIM,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=8,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
            num_labels=4,
        )
        self.bert = BertForSequenceClassification(config)
        if self.noise.p:
            self.bert.dropout = self.noise

    def scores(self, batch: Any) -> Tensor:
        return self.bert(input_ids=batch["ids"], attention_mask=torch.ones_like(batch["ids"])).logits


class SharedModule(TwoTasks):
    """One block used three times, as in ALBERT; offers `blocks()` only."""

    def __init__(self, dropout: float = 0.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.embed = nn.Embedding(50, DIM)
        self.block = Block(DIM, dropout)
        self.out = nn.Linear(DIM, 4)

    def blocks(self) -> list[nn.Module]:
        return [self.block]

    def scores(self, batch: Any) -> Tensor:
        hidden = self.embed(batch["ids"])
        for _ in range(3):
            hidden = self.block(hidden)
        return self.out(self.noise(hidden.mean(1)))


MODULES = {"kexue": KexueModule, "bert": BertModule, "shared": SharedModule}
