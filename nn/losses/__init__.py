"""Losses, all computed in float32 at least."""

from .multilabel import dense_multilabel_pointer_loss, multilabel_pointer_loss

__all__ = ["dense_multilabel_pointer_loss", "multilabel_pointer_loss"]
