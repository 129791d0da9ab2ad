"""A masked language model: an encoder learns to guess what it does not see.  Shapes: B batch, T tokens, V ids.

What is masked is another choice in every epoch, and a function of the seed, the epoch and the row alone: the same on
any number of processes and after a resume. Validation always masks the same. What is learnt is taken over by
`technique=[start_from]`, under the name `encoder`.

Source: BERT (arXiv 1810.04805), without its second task.  Checked against: the loss written plainly.
Expected: see conf/experiment/daguan_2019_pretraining.yaml.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...nn.masking import Masking
from ...nn.optim import OptimizerFactory, with_rates
from ...nn.transformer import Transformer, TransformerConfig, encode
from ...nn.transformer.config import Norm, Positions
from ..schedules import Schedule, check_schedule, scheduled


class MaskedLM(pl.LightningModule):
    """An encoder and scores of the tokens at masked places, by its own table of tokens.

    Args:
        vocab_size: number of token ids.
        mask_id: of [MASK].
        special_ids: tokens that are never masked, [MASK] among them.
        dim: width of the encoder.
        num_layers: blocks of the encoder.
        num_heads: attention heads of a block.
        feedforward_dim: inner width of the position-wise networks.
        dropout: rate everywhere in the encoder.
        max_length: longest input, for positions other than "rope".
        positions: "rope", "learned" or "sinusoidal".
        norm: "pre" or "post".
        mask_rate, max_targets, run_shares: rate, most targets of a sequence and shares of runs, see `Masking`.
        seed: of the masks.
        warmup_steps: steps over which the learning rate rises to its full value.
        schedule: what it does afterwards: "constant", or "linear" down to 0 at the trainer's last step.
        optimizer: how to make the optimizer; AdamW with learning rate 5e-4 when None. Not saved in checkpoints.
            Biases and norms have no weight decay.

    Raises:
        InputError: a value out of range.
    """

    encoder: Transformer

    def __init__(
        self,
        vocab_size: int,
        mask_id: int,
        special_ids: list[int],
        dim: int = 256,
        num_layers: int = 4,
        num_heads: int = 4,
        feedforward_dim: int = 1024,
        dropout: float = 0.1,
        max_length: int = 512,
        positions: Positions = "rope",
        norm: Norm = "pre",
        mask_rate: float = 0.15,
        max_targets: int = 20,
        run_shares: list[float] | None = None,
        seed: int = 0,
        warmup_steps: int = 0,
        schedule: Schedule = "constant",
        *,
        optimizer: OptimizerFactory | None = None,
    ) -> None:
        super().__init__()
        check_schedule("MaskedLM", schedule)
        self.save_hyperparameters(ignore=["optimizer"])
        self.masking = Masking(
            vocab_size, mask_id, tuple(special_ids), mask_rate, max_targets, tuple(run_shares or (1.0,))
        )
        self.config = TransformerConfig(
            vocab_size,
            dim,
            num_layers,
            num_heads,
            feedforward_dim,
            dropout,
            max_length,
            positions,
            norm,
            feedforward_dropout=dropout,
            heads=("masked_lm",),
        )
        self.seed = seed
        self.warmup_steps = warmup_steps
        self.schedule: Schedule = schedule
        self._optimizer = optimizer or (lambda parameters: torch.optim.AdamW(parameters, lr=5e-4))

    def configure_model(self) -> None:
        if not hasattr(self, "encoder"):
            self.encoder = Transformer(self.config)

    def blocks(self) -> Iterable[nn.Module]:
        """The repeated units of the encoder."""
        return self.encoder.blocks()

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Scores of all tokens `(B, T, V)` for token ids `(B, T)`."""
        return self.encoder.logits(self.encoder(ids, mask))

    def masked(self, batch: dict[str, Any], epoch: int) -> tuple[Tensor, Tensor]:
        """What is seen of a batch in an epoch `(B, T)`, and where there is something to guess `(B, T)`."""
        rows = zip(batch["ids"].cpu().numpy(), batch["mask"].cpu().numpy(), batch["row_keys"].tolist(), strict=True)
        seen, targets = [], []
        for ids, mask, key in rows:
            length = int(mask.sum())
            row, places = self.masking.mask(ids[:length], np.random.default_rng([self.seed, epoch, key]))
            seen.append(np.concatenate([row, ids[length:]]))
            targets.append(np.pad(places, (0, len(ids) - length)))
        device = batch["ids"].device
        return torch.from_numpy(np.stack(seen)).to(device), torch.from_numpy(np.stack(targets)).to(device)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        loss, _ = self._step(batch, self.current_epoch + 1)
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=len(batch["ids"]))
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self._evaluate(batch, "val")

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self._evaluate(batch, "test")

    def configure_optimizers(self) -> Any:
        optimizer = with_rates(self._optimizer, self.named_parameters(), spare_biases=True)
        return scheduled(self, optimizer, self.schedule, self.warmup_steps)

    def _evaluate(self, batch: dict[str, Any], stage: str) -> None:
        loss, accuracy = self._step(batch, 0)
        found = {f"{stage}/loss": loss, f"{stage}/accuracy": accuracy}
        self.log_dict(found, on_epoch=True, sync_dist=True, batch_size=len(batch["ids"]))

    def _step(self, batch: dict[str, Any], epoch: int) -> tuple[Tensor, Tensor]:
        """Mean over masked tokens of `-log p(token)`, and how many of them are guessed."""
        seen, targets = self.masked(batch, epoch)
        hidden, wanted = encode(self.encoder, {**batch, "ids": seen}), batch["ids"][targets]
        logits = self.encoder.logits(hidden[targets]).float()
        return F.cross_entropy(logits, wanted), (logits.argmax(-1) == wanted).float().mean()
