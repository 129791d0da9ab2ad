"""Named entities by a score for every span under every type.  Shapes: W windows, T tokens, D features, K types.

Spans may overlap and lie in each other. Those with a score above 0 are found.

Source: https://kexue.fm/archives/8373 (GlobalPointer), https://kexue.fm/archives/8877 (its efficient form).  Checked
against: the formulas written plainly.  Expected: see conf/experiment/ner_*.yaml.
"""

from typing import Any

from torch import Tensor

from ...errors import InputError
from ...nn.decoding import positive_spans
from ...nn.decoding.tags import Cells
from ...nn.heads import HEADS, EfficientGlobalPointer, GlobalPointer, HeadKind
from ...nn.losses import SpanLoss, multilabel_pointer_loss
from ...nn.optim import OptimizerFactory
from ...nn.transformer.config import Norm, Positions
from ..schedules import Schedule
from .encoder_module import encoder_config, span_loss
from .ner import EntityModule, inner_places


class NerGlobalPointer(EntityModule):
    """Named entities by GlobalPointer.

    Args:
        vocab_size: number of token ids.
        types: names of the types.
        dim: width of the encoder.
        num_layers: blocks of the encoder.
        num_heads: attention heads of a block.
        feedforward_dim: inner width of the position-wise networks.
        dropout: rate everywhere in the encoder.
        max_length: longest input, for positions other than "rope".
        positions: "rope", "learned" or "sinusoidal".
        norm: "pre" or "post".
        num_segments: what the data say of a token besides its id, such as the tags of a dictionary; 0: nothing.
        head_size: width of a pointer's queries and keys.
        head: "efficient" or "standard" pointer.
        max_spans: spans of one type that are kept in a window, the best-scoring ones.
        warmup_steps: steps over which the learning rate rises to its full value.
        schedule: what it does afterwards: "constant", or "linear" down to 0 at the trainer's last step.
        optimizer: how to make the optimizer; AdamW with learning rate 5e-4 when None. Not saved in checkpoints.
        loss: what the pointer trains on, with a method `spans`; the multi-label loss when None, and for validation in
            any case. Not saved in checkpoints.

    Raises:
        InputError: a value out of range; types that are empty or repeated.
    """

    overlapping = True
    head: GlobalPointer | EfficientGlobalPointer

    def __init__(
        self,
        vocab_size: int,
        types: list[str],
        dim: int = 256,
        num_layers: int = 4,
        num_heads: int = 4,
        feedforward_dim: int = 1024,
        dropout: float = 0.1,
        max_length: int = 512,
        positions: Positions = "rope",
        norm: Norm = "pre",
        num_segments: int = 0,
        head_size: int = 64,
        head: HeadKind = "efficient",
        max_spans: int = 100,
        warmup_steps: int = 0,
        schedule: Schedule = "constant",
        *,
        optimizer: OptimizerFactory | None = None,
        loss: SpanLoss | None = None,
    ) -> None:
        config = encoder_config(
            vocab_size, dim, num_layers, num_heads, feedforward_dim, dropout, max_length, positions, norm, num_segments
        )
        super().__init__(types, config, warmup_steps, schedule, optimizer)
        if head not in HEADS:
            raise InputError(f"NerGlobalPointer(head={head!r}): use one of {', '.join(HEADS)}")
        if max_spans < 1:
            raise InputError(f"NerGlobalPointer(max_spans={max_spans}): use 1 or more")
        self.save_hyperparameters(ignore=["optimizer", "loss"])
        self._loss = span_loss("NerGlobalPointer", loss)
        self.head_size = head_size
        self.head_kind: HeadKind = head
        self.max_spans = max_spans

    def make_head(self) -> GlobalPointer | EfficientGlobalPointer:
        """A pointer with a head for each type."""
        return HEADS[self.head_kind](self.config.dim, len(self.types), self.head_size)

    def losses(self, features: Tensor, batch: dict[str, Any], training: bool) -> dict[str, Tensor]:
        """Multi-label loss of the spans, or in training the one that was chosen."""
        loss = self._loss if training else multilabel_pointer_loss
        return {"spans": loss(self.head.compact(features, batch["mask"]), batch["span_labels"])}

    def find(self, features: Tensor, batch: dict[str, Any]) -> list[Cells]:
        """Spans with a score above 0."""
        scores = self.head.compact(features, batch["mask"])
        return positive_spans(scores, inner_places(batch), self.max_spans)
