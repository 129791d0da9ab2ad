"""The scale of the loss at 16-mixed under ZeRO: what torch's GradScaler does, with one decision for all processes.

DeepSpeed 0.19 gives each engine a GradScaler that looks at the gradients of one process and one parameter group at a
time. Clipping then takes scaled gradients for plain ones (at a scale of 65536 next to nothing is left of a step), a
norm that is not finite discards the step and leaves the scale as it is, and processes may decide differently. Its ZeRO
optimisers can also follow a scale from outside, which they take out of norms and gradients; that is what is used here.

Source: P. Micikevicius et al. "Mixed Precision Training" (arXiv 1710.03740), section 3.2; rates as in
`torch.amp.GradScaler`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class LossScale:
    """A scale that halves when gradients overflow and doubles after 2,000 steps without.

    Args:
        optimizer: DeepSpeed's ZeRO optimiser, which it takes over.

    Attributes:
        scale: by which losses are multiplied.
        steps: since it last changed.
    """

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer
        self.scale, self.steps = 2.0**16, 0
        self.growth, self.backoff, self.interval = 2.0, 0.5, 2000
        optimizer.torch_autocast_gradscaler = None
        optimizer.custom_loss_scaler = True
        optimizer.external_loss_scale = self.scale

    def update(self) -> None:
        """Follow a step that the optimiser has taken, or discarded for gradients that are not finite."""
        self.steps += 1
        if self.optimizer.overflow:
            self.scale, self.steps = self.scale * self.backoff, 0
        elif self.steps == self.interval:
            self.scale, self.steps = self.scale * self.growth, 0
        self.optimizer.external_loss_scale = self.scale

    def state_dict(self) -> dict[str, Any]:
        """Return the state in the form of `torch.amp.GradScaler`, which the other bases save."""
        return {
            "scale": self.scale,
            "growth_factor": self.growth,
            "backoff_factor": self.backoff,
            "growth_interval": self.interval,
            "_growth_tracker": self.steps,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state of this or of `torch.amp.GradScaler`; of one turned off it is empty, and left out."""
        if not state:
            return
        self.scale, self.steps = float(state["scale"]), int(state["_growth_tracker"])
        self.growth, self.backoff = state["growth_factor"], state["backoff_factor"]
        self.interval = state["growth_interval"]
        self.optimizer.external_loss_scale = self.scale
