"""The base strategies, each with the same mixin that carries techniques and writes checkpoints that resume exactly."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from pytorch_lightning.strategies import DDPStrategy, SingleDeviceStrategy, Strategy
from pytorch_lightning.trainer.states import TrainerFn, TrainerStatus

from ..errors import InputError
from .checkpoints import KEY, AtomicCheckpointIO, check_parameters, reason_of, shapes_of, unwritten
from .last_metrics import last_metrics, let_schedulers_look_after_validation
from .positions import PositionMixin
from .reshape import SavedOptimizer, check_optimizers, read_saved
from .technique import Technique, check_techniques


class TechniqueMixin(PositionMixin):
    """What all base strategies share: techniques, and checkpoints that know their own position.

    Put it in front of a Lightning strategy. It calls the touch points of each `Technique`, restores the position inside
    an epoch and every random number generator on resume, and checks a checkpoint before it is loaded.
    """

    name: str
    techniques: tuple[Technique, ...]

    def _carry(self, techniques: Iterable[Technique]) -> None:
        self.techniques = check_techniques(type(self).__name__, techniques)
        self._begin_positions()
        self._states: dict[str, Any] = {}
        self._attached: pl.LightningModule | None = None
        self._exchanged = False

    # Techniques

    def setup(self, trainer: pl.Trainer) -> None:
        """Attach the techniques before anything wraps the module; evaluation runs without them."""
        self.attach_techniques(trainer)
        super().setup(trainer)

    def attach_techniques(self, trainer: pl.Trainer) -> None:
        """Call `attach` of each technique, once a run, for runs that train."""
        module = self.lightning_module
        if trainer.state.fn != TrainerFn.FITTING or module is None or self._attached is not None:
            return
        self._attached = module
        self._exchanged = False
        for technique in self.techniques:
            technique.attach(module)
        self._restore_techniques()

    def _restore_techniques(self) -> None:
        """Hand the states that a checkpoint has brought to their techniques, as soon as both are there."""
        if self._attached is None:
            return
        states, self._states = self._states, {}
        for technique in self.techniques:
            if state := states.get(type(technique).__name__):
                technique.load_state_dict(state)

    def wrap_optimizer(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """Pass an optimiser through the techniques."""
        for technique in self.techniques:
            optimizer = technique.wrap_optimizer(optimizer)
        return optimizer

    def setup_optimizers(self, trainer: pl.Trainer) -> None:
        """Make the optimisers and wrap them."""
        super().setup_optimizers(trainer)
        self.optimizers = [self.wrap_optimizer(optimizer) for optimizer in self.optimizers]

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's `training_step`, with the techniques combining its losses inside the wrapped forward."""
        with self._combining():
            return super().training_step(*args, **kwargs)

    @contextmanager
    def _combining(self) -> Iterator[None]:
        module = self.lightning_module
        combining = [t for t in self.techniques if type(t).combine is not Technique.combine]
        if not combining or module is None:
            yield
            return
        step, own = module.training_step, vars(module).get("training_step")

        @wraps(step)
        def combined(*args: Any, **kwargs: Any) -> Any:
            outputs = step(*args, **kwargs)
            for technique in combining:
                outputs = technique.combine(outputs, module)
            return outputs

        module.training_step = combined
        try:
            yield
        finally:
            del module.__dict__["training_step"]
            if own is not None:  # set by a technique that runs the step twice
                module.training_step = own

    def teardown(self) -> None:
        """Leave the module with the weights to evaluate, and detach the techniques in the reverse order."""
        module, self._attached = self._attached, None
        if module is not None:
            # Not after an error, which the other processes may not share: carrying weights over asks for all of them.
            if module.trainer.state.status == TrainerStatus.RUNNING:
                self._exchange(True)
            for technique in reversed(self.techniques):
                technique.detach(module)
        super().teardown()

    # Weights to evaluate, where a technique has some

    @property
    def _evaluating(self) -> Technique | None:
        return next((technique for technique in self.techniques if technique.evaluates), None)

    def _exchange(self, evaluate: bool) -> None:
        """Let the module hold the weights to evaluate, or those that train."""
        if evaluate != self._exchanged and self._evaluating is not None:
            self._exchanged = evaluate
            self._exchange_now(self._evaluating)

    def _exchange_now(self, technique: Technique) -> None:
        assert self.lightning_module is not None
        technique.exchange(self.lightning_module)
        self.carry_weights_over()

    def carry_weights_over(self) -> None:
        """Bring the optimiser's weights into the module; nothing to do where they are the module's own parameters."""

    @contextmanager
    def weights_to_save(self) -> Iterator[None]:
        """Let the module hold the weights to evaluate for as long as a checkpoint is written."""
        before = self._exchanged
        self._exchange(True)
        try:
            yield
        finally:
            self._exchange(before)

    def on_validation_start(self) -> None:
        """Validate the weights to evaluate."""
        super().on_validation_start()
        if self._attached is not None:
            self._exchange(True)

    def on_validation_end(self) -> None:
        """Go on with the weights that train."""
        super().on_validation_end()
        if self._attached is not None:
            self._exchange(False)
            assert self._trainer is not None
            let_schedulers_look_after_validation(self._trainer)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Load the optimisers, and with them the second set of weights."""
        states = checkpoint["optimizer_states"]
        if states and isinstance(states[0], SavedOptimizer):  # a directory that ZeRO wrote
            check_optimizers(len(states), len(self.optimizers))
            names = self._parameter_names()
            states = [saved.state_dict(own, names) for saved, own in zip(states, self.optimizers, strict=True)]
        super().load_optimizer_state_dict({**checkpoint, "optimizer_states": states})
        if KEY in checkpoint:
            self.restore_exchange(checkpoint[KEY]["description"])

    def restore_exchange(self, description: dict[str, Any]) -> None:
        """Put the weights that train back into the module, after reading a checkpoint that was saved exchanged.

        Also say which techniques came or went, since what they kept in the optimiser starts anew or is left unused.
        """
        saved, own = description.get("evaluates"), [type(technique).__name__ for technique in self.techniques]
        for technique in self.techniques:
            if type(technique).__name__ == saved:
                self._exchange_now(technique)
        before = [text.partition("(")[0] for text in description["techniques"]]
        if sorted(before) == sorted(own):
            return
        rank_zero_warn(
            f"The checkpoint was saved with techniques {', '.join(before) or 'none'}, now {', '.join(own) or 'none'}: "
            "what came starts anew, what went leaves its state unused"
            + (f", and training goes on from the weights that {saved} evaluated." if saved not in (None, *own) else ".")
        )

    # Checkpoints

    @property
    def checkpoint_io(self) -> Any:
        """Atomic unless the trainer was given a `CheckpointIO` plugin of its own."""
        if self._checkpoint_io is None:
            self._checkpoint_io = AtomicCheckpointIO()
        return self._checkpoint_io

    @checkpoint_io.setter
    def checkpoint_io(self, io: Any) -> None:
        self._checkpoint_io = io

    def describe_run(self) -> dict[str, Any]:
        """Return what a checkpoint says of itself, see `checkpoints.describe`."""
        module, trainer = self.lightning_module, self._trainer
        assert module is not None
        assert trainer is not None
        return {
            "base": self.name,
            "stage": getattr(self, "stage", None),
            "world_size": self.world_size,
            "step": trainer.global_step,
            "epoch": trainer.current_epoch,
            "module": f"{type(module).__module__}.{type(module).__qualname__}",
            "techniques": [repr(technique) for technique in self.techniques],
            "evaluates": None if self._evaluating is None else type(self._evaluating).__name__,
            "loggers": {type(logger).__name__: logger.version for logger in trainer.loggers if logger.version},
            "parameters": self.parameter_shapes(),
        }

    def parameter_shapes(self) -> dict[str, list[int]]:
        """Return name and full shape of each entry of the module's `state_dict`."""
        assert self.lightning_module is not None
        # keep_vars: a parameter that ZeRO-3 has divided is empty and carries its full shape as an attribute.
        return shapes_of(self.lightning_module.state_dict(keep_vars=True))

    def annotate(self, checkpoint: dict[str, Any]) -> dict[str, Any]:
        """Return the checkpoint with its description and the position of every process added."""
        trainer = self._trainer
        assert trainer is not None
        positions, loops = self.note_positions(checkpoint.get("loops"))
        own_states = {type(technique).__name__: technique.state_dict() for technique in self.techniques}
        checkpoint = {
            **checkpoint,
            KEY: {
                "description": self.describe_run(),
                "position": positions,
                "techniques": own_states,
                "metrics": last_metrics(trainer),
            },
        }
        return checkpoint if loops is None else {**checkpoint, "loops": loops}

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """Save, whole or not at all; a failure on the writing process is raised on every process.

        Raises:
            OSError: If the checkpoint could not be written; what was there before is untouched.
        """
        checkpoint = self.annotate(checkpoint)
        names = self._parameter_names()
        checkpoint[KEY]["optimizers"] = [
            [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]
            for optimizer in self.optimizers
        ]
        failure: OSError | None = None
        with self.weights_to_save():
            if self.is_global_zero:
                try:
                    self.checkpoint_io.save_checkpoint(checkpoint, filepath, storage_options=storage_options)
                except (OSError, RuntimeError) as error:  # torch turns a full disk into a RuntimeError
                    failure = reason_of(error)
        failure = self.broadcast(failure)
        if failure is not None:
            raise unwritten(filepath, failure)

    def _parameter_names(self) -> dict[int, str]:
        assert self.lightning_module is not None
        return {id(parameter): name for name, parameter in self.lightning_module.named_parameters()}

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Load a checkpoint of any base and number of processes, after checking that it belongs to this model.

        Raises:
            InputError: If it is missing, damaged, incomplete, or of another model.
        """
        path = Path(checkpoint_path)
        if path.is_dir():
            saved = read_saved(path)
            checkpoint = {**saved.rest, "state_dict": saved.state_dict(), "optimizer_states": saved.optimizers}
        else:
            checkpoint = super().load_checkpoint(path, weights_only=weights_only is not False)
        check_parameters(path, shapes_of(checkpoint.get("state_dict", {})), self.parameter_shapes())
        own = checkpoint.get(KEY)
        if own is not None and self._trainer is not None and self._trainer.state.fn == TrainerFn.FITTING:
            self.restore_run(path, own)
        return checkpoint

    def restore_run(self, path: Path, own: dict[str, Any]) -> None:
        """Go on from what the strategy has put into a checkpoint: position, metrics, each technique's state."""
        self.restore_position(path, own["position"])
        self._metrics = own.get("metrics")
        self._states = dict(own.get("techniques", {}))
        self._restore_techniques()


class SingleDevice(TechniqueMixin, SingleDeviceStrategy):
    """One process on one device, the one that the Trainer was given.

    Example:
        `Trainer(strategy=SingleDevice(techniques=[Lookahead(k=5)]), accelerator="cpu", devices=1)`

    Args:
        techniques: What attaches to the run, in this order.
    """

    name = "single"

    def __init__(self, techniques: Iterable[Technique] = (), **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._carry(techniques)

    @property
    def parallel_devices(self) -> list[torch.device]:
        """Empty until the Trainer says which device to use."""
        return []

    @parallel_devices.setter
    def parallel_devices(self, devices: list[torch.device]) -> None:
        if len(devices) > 1:
            raise InputError(
                f"SingleDevice runs on one device, Trainer(devices=...) gives {len(devices)}: "
                "use strategy=ddp or strategy=zero_2, or devices=1."
            )
        self._root_device = devices[0]


class DDP(TechniqueMixin, DDPStrategy):
    """One process per device, gradients averaged over them.

    Args:
        techniques: What attaches to the run, in this order.
        **kwargs: Arguments of Lightning's `DDPStrategy`, such as `find_unused_parameters`.
    """

    name = "ddp"

    def __init__(self, techniques: Iterable[Technique] = (), **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._carry(techniques)


def auto(techniques: Iterable[Technique] = (), devices: int | str | Sequence[int] = 1, num_nodes: int = 1) -> Strategy:
    """Return `SingleDevice` for one device and `DDP` for more.

    Args:
        techniques: What attaches to the run.
        devices: The Trainer's `devices`.
        num_nodes: The Trainer's `num_nodes`.
    """
    if devices in ("auto", -1, "-1"):
        count = max(1, torch.cuda.device_count())
    elif isinstance(devices, int | str):
        count = len(devices.split(",")) if isinstance(devices, str) and "," in devices else int(devices)
    else:
        count = len(devices)
    return SingleDevice(techniques) if count * num_nodes == 1 else DDP(techniques)
