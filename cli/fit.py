"""Train an experiment, then test its best checkpoint.

usage: kexue fit [experiment=NAME] [GROUP=NAME ...] [KEY=VALUE ...]

  kexue fit                                       the built-in default, digits_multitask
  kexue fit experiment=gplinker_event data.root=FOLDER
  kexue fit strategy=zero_2 trainer.devices=2 technique=[activation_checkpointing,lookahead]
  kexue fit debug=fast                            a few batches of everything
  kexue fit run_dir=FOLDER                        continues the run in FOLDER if there is one

groups: experiment, model, loss, data, trainer, strategy, technique, callbacks, logger, debug
keys:   run_dir=FOLDER     default runs/NAME/JOB: the cluster's job id, or the clock
        resume=auto        continue from the newest complete checkpoint of run_dir; null: never; PATH: from that one
        trainer.KEY=VALUE  any argument of Lightning's Trainer, and so on for every group

Your own experiments lie in FOLDER/experiment/NAME.yaml: kexue fit hydra.searchpath=[FOLDER] experiment=NAME
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..errors import InputError
from ..signals import Preempted, caught, installed


def run(args: list[str]) -> int:
    """Train and test; see the module's help."""
    with caught():  # from the start: what loads for seconds must not die of a signal that asks to save
        _run(args)
    return 0


def _run(args: list[str]) -> None:
    from .config import compose_run, plain, validate
    from .logs import log_to
    from .ranks import adopt_processes, shared_run_dir
    from .run_dir import open_run

    composed = compose_run(args)
    config = plain(composed, composed.run_dir or "runs")
    validate(config)  # before a directory is made or anything is started
    if config["cluster"]:
        raise InputError("cluster=... chooses where kexue submit sends a run; kexue fit runs it here")
    adopt_processes(config["trainer"])
    place = open_run(composed.run_dir, config["name"], config["resume"])
    with shared_run_dir(place.folder), log_to(place.folder):
        _fit(plain(composed, place.folder), place)


def _fit(config: dict[str, Any], place: Any) -> None:
    import logging

    from pytorch_lightning import seed_everything

    from ..strategies.checkpoints import describe
    from . import session
    from .config import CONFIG_FILE
    from .exhausted import advised
    from .launcher import supervised
    from .ranks import is_main_process
    from .report import print_report
    from .run_dir import write_config, write_metrics

    log = logging.getLogger("kexue.fit")
    log.info("%s in %s, %s", config["name"], place.folder, f"from {place.checkpoint}" if place.checkpoint else "new")
    if config["seed"] is not None:
        seed_everything(config["seed"], workers=True, verbose=False)
    data = session.make_data(config, place.assets)
    model = session.make_model(config, data)
    # A run that continues in its own folder keeps what is there until its checkpoint has been accepted.
    if is_main_process() and not (place.checkpoint and (place.folder / CONFIG_FILE).exists()):
        write_config(place.folder, config)
        assets = place.folder / "assets"
        assets.mkdir(exist_ok=True)
        data.save_assets(assets)
    callbacks = session.make_parts(config, "callbacks")
    _listen(callbacks)
    trainer = session.make_trainer(
        config,
        place.folder,
        strategy=session.make_strategy(config),
        callbacks=[*callbacks, session.RunRecord(config, place.folder)],
        loggers=session.make_parts(config, "logger"),
    )
    step_before = describe(place.checkpoint).get("step") if place.checkpoint else None
    with supervised(trainer), advised(trainer, config), _naming_the_dead(callbacks), _leaving_together():
        trainer.fit(model, datamodule=data, ckpt_path=place.checkpoint)
        metrics = session.numbers(trainer.callback_metrics)
        if trainer.global_step == step_before:
            log.info("the run was finished: step %d; train on with a greater trainer.max_epochs", trainer.global_step)
        if session.has_test(model, data):
            best = trainer.strategy.broadcast(_best(place.folder))
            trainer.test(model, datamodule=data, ckpt_path=best, verbose=False)
            metrics |= session.numbers(trainer.callback_metrics)
        if trainer.is_global_zero:
            print_report(write_metrics(place.folder, metrics), place.folder)


@contextmanager
def _leaving_together() -> Iterator[None]:
    """Close the process group at the end of the run, also of one that was asked to stop; not after an error."""
    from .ranks import leave_group

    try:
        yield
    except Preempted:
        leave_group()
        raise
    leave_group()


@contextmanager
def _naming_the_dead(callbacks: list[Any]) -> Iterator[None]:
    """Where a collective fails because a process has died, say which one instead of what the network noticed.

    Raises:
        ProcessDied: in place of the error.
    """
    from ..callbacks import StopWhenStalled

    try:
        yield
    except Exception as error:
        watches = [callback for callback in callbacks if isinstance(callback, StopWhenStalled)]
        died = next((watch.died for watch in watches if watch.died is not None), None)
        if died is None:
            raise
        raise died from error


def _listen(callbacks: list[Any]) -> None:
    """Let signals do what they do elsewhere, unless a callback answers them."""
    from ..callbacks import Preemption

    request = installed()
    if request is not None and not any(isinstance(callback, Preemption) for callback in callbacks):
        request.restore()
        if request.received:
            raise Preempted(f"asked to stop ({request.received}) before the run began")


def _best(folder: Any) -> str | None:
    """The best checkpoint, or the last; None where the callbacks wrote none, then the weights in memory are tested."""
    checkpoints = folder / "checkpoints"
    return next(
        (str(path.resolve()) for name in ("best", "last") if (path := checkpoints / f"{name}.ckpt").exists()), None
    )
