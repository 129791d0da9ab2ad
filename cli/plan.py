"""Predict which strategies fit into memory, and how fast they are.

usage: kexue plan [experiment=NAME] [devices=N] [memory=80GB] [device=NAME] [GROUP=NAME ...] [KEY=VALUE ...]

  kexue plan experiment=gplinker_event devices=8 device=h100
  kexue plan experiment=gplinker_event devices=2 memory=16GB device=rtx4090 trainer.precision=bf16-mixed
  kexue plan data.batch_size=512                  groups and keys as in kexue fit

devices: how many work together, 1 unless given. memory: of each; that of the device unless given. device: a100, h100
(unless given), h200, rtx4090 or cpu. The batch is that of one device.

A step of the experiment is counted, on tensors without data where the module permits, else really on the CPU. The
table has what each strategy needs on a device, with nothing, all but products, and whole blocks recomputed in the
backward pass; the best that fits is marked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import InputError

if TYPE_CHECKING:
    import pytorch_lightning as pl
    from torch import Tensor
    from torch.optim import Optimizer

    from ..analysis.findings import Table
    from ..analysis.plan import Forecast, Job
    from ..analysis.step_cost import Recompute, StepCost
    from ..data.base import KexueDataModule

BATCHES_LOOKED_AT = 64


def run(args: list[str]) -> int:
    """Count a step and print the plan; see the module's help."""
    from .arguments import take
    from .config import compose_run, plain, validate

    words, overrides = take(args, {"devices": "1", "memory": "auto", "device": "h100"})
    devices, memory, device = _resources(**words)
    composed = compose_run(overrides)
    config = plain(composed, composed.run_dir or "runs")
    validate(config)
    _plan(config, devices, memory, device)
    return 0


def _resources(devices: str, memory: str, device: str) -> tuple[int, float, str]:
    from ..analysis.plan import DEVICES, parse_memory
    from .errors import suggest

    if device not in DEVICES:
        raise InputError(f"device={device}: no such device; {suggest(device, DEVICES)}")
    if not devices.isdecimal() or int(devices) < 1:
        raise InputError(f"devices={devices}: use a whole number of 1 or more")
    return int(devices), DEVICES[device].memory if memory == "auto" else parse_memory(memory), device


def _plan(config: Mapping[str, Any], devices: int, memory: float, device: str) -> None:
    from ..analysis.plan import ASSUMPTIONS, DEVICES, PRECISIONS, best, forecasts, why_not, without_offload
    from .study import readable_bytes, readable_count, show

    precision = str(config["trainer"]["precision"])
    if precision not in PRECISIONS:
        raise InputError(f"trainer.precision={precision}: kexue plan knows {', '.join(PRECISIONS)}")
    job, remarks = count_quietly(config, on_gpu=device != "cpu")
    about, meaning = DEVICES[device], PRECISIONS[precision]
    options = forecasts(job, devices, about, meaning)
    chosen = best(options, memory)
    each = f"{devices} x {device}" if devices > 1 else device
    frozen = f" and {readable_count(job.frozen)} frozen" if job.frozen else ""
    title = (
        f"{config['name']} on {each} with {readable_bytes(memory)}: {readable_count(job.trained)} parameters{frozen}"
    )
    show(_costs(job))
    show(_table(title, options, chosen, memory))
    if chosen is None:
        print(why_not(job, devices, about, meaning, memory))
    else:
        print(_command(chosen, devices))
        if chosen.strategy.offload:
            print(without_offload(job, devices, about, meaning, memory))
    peak = getattr(about, meaning.products)
    print("Counted and assumed:")
    for line in (
        *remarks,
        f"{device}: {peak / 1e12:g} TFLOP/s for {precision}, memory {about.bandwidth / 1e9:g} GB/s, link "
        f"{about.link / 1e9:g} GB/s, host {about.host_link / 1e9:g} GB/s in one direction ({about.source})",
        *ASSUMPTIONS,
    ):
        print(f"- {line}")


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Lightning from telling which devices this machine has, and that a step runs without a Trainer."""
    import logging
    import warnings

    level = logging.root.manager.disable
    logging.disable(logging.INFO)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def _table(title: str, options: list[Forecast], chosen: Forecast | None, memory: float) -> Table:
    from ..analysis.findings import Table

    unit, name = (2**30, "GiB") if memory >= 2**30 else (2**20, "MiB")
    rows = [
        (
            option.strategy.name,
            option.recompute,
            *(f"{size / unit:.2f}" for size in (*option.parts.values(), option.total)),
            1000 * option.seconds,
            "best" if option is chosen else "yes" if option.total <= memory else "no",
        )
        for option in options
    ]
    parts = ("parameters", "gradients", "optimiser", "activations", "buffers", "allowance", "total")
    return Table("plan", f"{title} ({name})", ("strategy", "recomputed", *parts, "ms", "fits"), rows)


def _costs(job: Job) -> Table:
    from ..analysis.findings import Table

    rows = [(name, cost.flops, cost.saved_bytes, cost.again_bytes) for name, cost in job.costs.items()]
    columns = ("recomputed", "FLOPs", "activations kept [bytes]", "of a block again [bytes]")
    return Table("costs", "a step of one device, forward and backward pass", columns, rows)


def command_words(chosen: Forecast, devices: int) -> list[str]:
    """The words of `kexue fit` that choose a forecast's strategy and recomputation."""
    words = [f"strategy={chosen.strategy.name}", f"trainer.devices={devices}"]
    if chosen.recompute != "off":
        words.append("technique=[activation_checkpointing]")
    if chosen.recompute == "selective":
        words.append("technique.activation_checkpointing.policy=selective")
    return words


def _command(chosen: Forecast, devices: int) -> str:
    host = f"; {chosen.host / 2**30:.3g} GiB of host memory for each device" if chosen.host else ""
    return f"best: kexue fit ... {' '.join(command_words(chosen, devices))}{host}"


def count_quietly(config: Mapping[str, Any], on_gpu: bool = True) -> tuple[Job, list[str]]:
    """`count_job` without what Lightning says of devices and of a step without a Trainer."""
    with _quiet():
        return count_job(config, on_gpu)


def count_job(config: Mapping[str, Any], on_gpu: bool = True) -> tuple[Job, list[str]]:
    """Build the experiment and count a step of it.

    Args:
        config: the whole plain config.
        on_gpu: whether attention is fused with its dropout.

    Returns:
        The counts, and remarks on how they were made.
    """
    from . import session

    data = session.make_data(config, None)
    data.setup("fit")
    batch = _largest_batch(data)
    remarks = [f"the largest of the first {BATCHES_LOOKED_AT} training batches: {_shapes(batch)}"]
    try:
        job, blocks = _count_fake(config, data, batch, on_gpu)
        remarks.append("counted on tensors without data")
    except InputError:
        raise
    except Exception as error:  # whatever a module does that needs numbers
        from .errors import one_line

        job, blocks = _count_real(config, data, batch, on_gpu)
        remarks.append(f"counted in a real step on the CPU (without data: {one_line(error, 120)})")
    if blocks:
        remarks.append(blocks)
    return job, remarks


def _largest_batch(data: KexueDataModule) -> Any:
    """Of the first training batches the one with the most bytes: it decides what fits."""
    from itertools import islice

    return max(islice(data.train_dataloader(), BATCHES_LOOKED_AT), key=lambda batch: sum(map(_bytes, _tensors(batch))))


def _tensors(batch: Any) -> list[Tensor]:
    """All tensors in nested dicts and lists."""
    from torch import Tensor

    if isinstance(batch, Mapping):
        batch = list(batch.values())
    if isinstance(batch, list | tuple):
        return [tensor for item in batch for tensor in _tensors(item)]
    return [batch] if isinstance(batch, Tensor) else []


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _shapes(batch: Any) -> str:
    """The shapes in a batch, in words."""
    return ", ".join(" x ".join(map(str, tensor.shape)) or "a number" for tensor in _tensors(batch))


def _count_fake(config: Mapping[str, Any], data: KexueDataModule, batch: Any, on_gpu: bool) -> tuple[Job, str]:
    """Count on tensors that have shapes and no data: no time, no memory, any size."""
    from lightning_utilities.core.apply_func import apply_to_collection
    from torch import Tensor
    from torch._subclasses.fake_tensor import FakeTensorMode

    from . import session

    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        model = session.make_model(config, data)
        model.configure_model()
        batch = apply_to_collection(batch, Tensor, mode.from_tensor)
        batch, context = _in_precision(str(config["trainer"]["precision"]), model, batch)

        def step() -> None:
            with context:
                outputs: Any = model.training_step(batch, 0)
            (outputs["loss"] if isinstance(outputs, Mapping) else outputs).backward()

        counts = _count(model, step, on_gpu)
        optimizers = _optimizers(model)
    return _job(config, model, optimizers, counts), counts.remark


def _count_real(config: Mapping[str, Any], data: KexueDataModule, batch: Any, on_gpu: bool) -> tuple[Job, str]:
    """Count in steps of a Trainer on the CPU, which can do whatever the module asks for."""
    from pytorch_lightning import Trainer
    from torch.utils.data import DataLoader

    from . import session

    model = session.make_model(config, data)
    model.configure_model()
    loader: Any = DataLoader([batch], batch_size=None)  # type: ignore[arg-type]

    def step() -> None:
        trainer = Trainer(
            accelerator="cpu",
            devices=1,
            precision=config["trainer"]["precision"],
            max_steps=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(model, loader)

    counts = _count(model, step, on_gpu)
    return _job(config, model, _optimizers(model), counts), counts.remark


class _Counts(NamedTuple):
    costs: dict[Recompute, StepCost]
    remark: str


def _count(model: pl.LightningModule, step: Callable[[], None], on_gpu: bool) -> _Counts:
    """The counts of a step, and why nothing can be recomputed, if so."""
    from ..analysis.step_cost import count_steps
    from ..strategies import find_blocks

    remark = ""
    try:
        blocks = find_blocks(model)
    except InputError:
        blocks, remark = [], f"{type(model).__name__} has no blocks(), so nothing is recomputed"
    model.train()
    return _Counts(count_steps(step, model, blocks, fused_dropout=on_gpu), remark)


def _job(config: Mapping[str, Any], model: pl.LightningModule, optimizers: list[Optimizer], counts: _Counts) -> Job:
    from ..analysis.plan import Job
    from ..analysis.step_cost import state_values
    from . import session

    def wrap(optimizer: Optimizer) -> Optimizer:
        for technique in session.make_parts(config, "technique"):
            optimizer = technique.wrap_optimizer(optimizer)
        return optimizer

    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    return Job(trained, frozen, sum(map(_bytes, model.buffers())), state_values(optimizers, wrap), counts.costs)


def _optimizers(model: pl.LightningModule) -> list[Optimizer]:
    """Those that `configure_optimizers` returns, in whichever of Lightning's forms."""
    from pytorch_lightning import Trainer
    from torch.optim import Optimizer

    model.trainer = Trainer(max_steps=1000, max_epochs=-1, logger=False, enable_checkpointing=False, accelerator="cpu")
    try:
        made = model.configure_optimizers()
    finally:
        model.trainer = None

    def found(value: Any) -> list[Optimizer]:
        if isinstance(value, Mapping):
            value = list(value.values())
        if isinstance(value, list | tuple):
            return [optimizer for item in value for optimizer in found(item)]
        return [value] if isinstance(value, Optimizer) else []

    return found(made)


def _in_precision(precision: str, model: pl.LightningModule, batch: Any) -> tuple[Any, AbstractContextManager]:
    """Bring the model to the Trainer's precision; return the batch in it, and the context of a step."""
    import torch
    from lightning_utilities.core.apply_func import apply_to_collection

    if precision == "32-true":
        return batch, nullcontext()
    dtype = torch.bfloat16 if precision.startswith("bf16") else torch.float16
    if precision.endswith("mixed"):
        return batch, torch.autocast("cpu", dtype)

    def cast(tensor: Tensor) -> Tensor:
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    model.to(dtype)
    return apply_to_collection(batch, torch.Tensor, cast), nullcontext()
