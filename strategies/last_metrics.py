"""The last metrics of a run in its checkpoints: schedulers that wait for a plateau look at them after the save.

Lightning saves no metrics (2.6). So a resumed run leaves out the look that the interrupted one had still to take, and
one that was interrupted after its last validation ends without that validation's metrics.
"""

from __future__ import annotations

from collections.abc import Mapping

import pytorch_lightning as pl
from torch import Tensor


def last_metrics(trainer: pl.Trainer) -> dict[str, Tensor]:
    """Return what has been logged so far, as callbacks and schedulers see it, to be put into a checkpoint."""
    return {key: value.detach().cpu() for key, value in trainer.callback_metrics.items()}


def recall(trainer: pl.Trainer, metrics: Mapping[str, Tensor]) -> None:
    """Let callbacks and schedulers of a resumed run see what was logged before."""
    device = trainer.strategy.root_device
    trainer._logger_connector._callback_metrics.update({key: value.to(device) for key, value in metrics.items()})


def let_schedulers_look(trainer: pl.Trainer) -> None:
    """At the start of a resumed run whose metrics were recalled: take up the looks of schedulers that are missing.

    In the middle of an epoch, and after the validation at its end, Lightning comes to them by itself once it does not
    know that it resumes. Those after a step or an epoch that counts as done are taken here.
    """
    fit, epoch = trainer.fit_loop, trainer.fit_loop.epoch_loop
    fit._restarting = False
    if epoch.restarted_on_train_batch_end:
        epoch.update_lr_schedulers("step", update_plateau_schedulers=True)
    if fit.resumed_on_epoch_end:
        progress = fit.epoch_progress.current
        progress.completed -= 1  # the epoch that is looked back on decides whether it is a scheduler's turn
        epoch.update_lr_schedulers("epoch", update_plateau_schedulers=True)
        progress.completed += 1


def let_schedulers_look_after_validation(trainer: pl.Trainer) -> None:
    """In an epoch resumed without metrics (a checkpoint of Lightning's own): look if this validation has given them."""
    watched = [config.monitor for config in trainer.lr_scheduler_configs if config.reduce_on_plateau]
    if watched and all(key in trainer.callback_metrics for key in watched):
        trainer.fit_loop._restarting = False
