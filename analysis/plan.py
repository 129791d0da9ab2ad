"""Memory and time of a training step on several devices, predicted from its counts, for every strategy.

What is counted (`step_cost`) and what a device can do (`DEVICES`) go in; what each strategy keeps and sends is put
together here. Every assumption is in `ASSUMPTIONS`, and printed beside the figures.

Source: S. Rajbhandari et al. "ZeRO" (arXiv 1910.02054) for what is divided and sent; bytes of DeepSpeed's engine as
measured in the tests.
"""

import re
from dataclasses import dataclass
from typing import Literal, NamedTuple

from ..errors import InputError
from .model_state import Recipe, Stage, model_state
from .step_cost import Recompute, StepCost

GIB = 2**30
Kind = Literal["float32", "half"]


class Device(NamedTuple):
    """Peak figures of a device, without sparsity.

    Attributes:
        memory: bytes.
        float32: FLOP/s of float32 products (not TF32, which is off by default in PyTorch).
        half: FLOP/s of bfloat16 and float16 products, summed in float32.
        bandwidth: bytes/s of its memory.
        link: bytes/s to other devices, in one direction.
        host_link: bytes/s to the host's memory, in one direction.
        source: where the figures are from.
        bucket: values that ZeRO gathers before it sends them, at most: Lightning's default, or all that are trained.
        buckets: how many of them, to fill one while the other is sent (stages 1 and 2).
    """

    memory: float
    float32: float
    half: float
    bandwidth: float
    link: float
    host_link: float
    source: str = "vendor data sheet"
    bucket: int = 200_000_000
    buckets: int = 2


DEVICES = {
    "a100": Device(80e9, 19.5e12, 312e12, 2039e9, 300e9, 32e9),
    "h100": Device(80e9, 67e12, 989e12, 3350e9, 450e9, 64e9),
    "h200": Device(141e9, 67e12, 989e12, 4800e9, 450e9, 64e9),
    "rtx4090": Device(24e9, 82.6e12, 165.2e12, 1008e9, 32e9, 32e9),
    "cpu": Device(64e9, 1e12, 1e12, 50e9, 1.25e9, 50e9, "assumed: 16 cores, 10-gigabit Ethernet", 4_000_000, 1),
}
UTILISATION = 0.4
NEARLY, MILLISECOND = 0.05, 1e-3  # times so close are no reason to take the more complicated strategy
HOST_BANDWIDTH = 100e9
CONTEXT_BYTES = GIB
FRAGMENTATION = 0.05
LIVE_PARAMETERS = (
    500_000_000  # half of DeepSpeed's `max_reuse_distance`: from a last use in forward to that in backward
)
ASSUMPTIONS = (
    f"products reach {UTILISATION:.0%} of the device's peak; other work is hidden in that share",
    "gradients are sent while the backward pass runs, stage 3 gathers weights while it computes; ZeRO 1 and 2 gather "
    "the new weights after the step, with nothing beside it",
    "the optimiser reads and writes its state at the full bandwidth of the memory; an offloaded one at "
    f"{HOST_BANDWIDTH / 1e9:.0f} GB/s of the host's",
    "memory is the sum of all parts, as if all gradients met all activations: an upper bound",
    f"the best is the first in the table within {NEARLY:.0%} and a millisecond of the fastest that fits",
    "selective recomputation keeps the results of all products, also of those that nobody asks for again",
    f"{CONTEXT_BYTES / GIB:.0f} GiB for the device's context and libraries, and {FRAGMENTATION:.0%} for fragmentation",
)


class Strategy(NamedTuple):
    """A way to train on several devices: its name in `kexue fit strategy=NAME`, the stage of ZeRO, and offloading."""

    name: str
    stage: Stage
    offload: bool = False


STRATEGIES = (
    Strategy("ddp", 0),
    Strategy("zero_1", 1),
    Strategy("zero_2", 2),
    Strategy("zero_3", 3),
    Strategy("zero_3_offload", 3, offload=True),
)
ALONE = (Strategy("single", 0), Strategy("zero_3_offload", 3, offload=True))


class Precision(NamedTuple):
    """What a precision of the Trainer means: bytes of a weight, and at which peak products run."""

    weight: int
    products: Kind


PRECISIONS = {
    "32-true": Precision(4, "float32"),
    "bf16-mixed": Precision(4, "half"),
    "16-mixed": Precision(4, "half"),
    "bf16-true": Precision(2, "half"),
    "16-true": Precision(2, "half"),
}


@dataclass(frozen=True)
class Job:
    """What is trained, counted.

    Attributes:
        trained: number of parameters with a gradient.
        frozen: number of those without.
        buffer_bytes: of the module's buffers.
        state_values: values that the optimiser keeps for each trained parameter, 2 for Adam.
        costs: of a step of one device, by what is recomputed.
    """

    trained: int
    frozen: int
    buffer_bytes: int
    state_values: float
    costs: dict[Recompute, StepCost]


@dataclass(frozen=True)
class Forecast:
    """One strategy: bytes on each device, on its host, and time.

    Attributes:
        strategy: how the devices share the work.
        recompute: what is computed again.
        weights: the parameters, as far as they are kept.
        gradients: of the trained ones.
        optimizer: its state, and its float32 copy of the weights where it has one.
        activations: kept for the backward pass, and those of the block that is computed again.
        buffers: of communication, weights gathered for use, buffers of the module.
        allowance: context of the device and fragmentation.
        host: bytes in the host's memory for each device.
        flops: of one device.
        seconds: of a step.
    """

    strategy: Strategy
    recompute: Recompute
    weights: int
    gradients: int
    optimizer: int
    activations: int
    buffers: int
    allowance: int
    host: int
    flops: int
    seconds: float

    @property
    def parts(self) -> dict[str, int]:
        """Bytes on the device by purpose."""
        names = ("weights", "gradients", "optimizer", "activations", "buffers", "allowance")
        return {name: getattr(self, name) for name in names}

    @property
    def total(self) -> int:
        """Bytes on the device."""
        return sum(self.parts.values())


def recipe(precision: Precision, strategy: Strategy, state_values: float) -> Recipe:
    """Bytes a parameter: DeepSpeed's optimiser works on a float32 copy, the others on the parameters themselves."""
    own = 4 if strategy.stage else precision.weight
    copy = 4 if strategy.stage else 0
    return Recipe(precision.weight, precision.weight, copy, round(own * state_values))


def forecast(
    job: Job, strategy: Strategy, recompute: Recompute, devices: int, device: Device, precision: Precision
) -> Forecast:
    """Predict memory and time of a step."""
    cost, weight = job.costs[recompute], precision.weight
    state = model_state(job.trained, strategy.stage, devices, recipe(precision, strategy, job.state_values))
    every = job.trained + job.frozen
    weights = state.weights + job.frozen * weight // (devices if strategy.stage == 3 else 1)
    activations = cost.peak_bytes
    buffers, host = job.buffer_bytes + _communication_buffers(job, strategy, devices, device, weight), 0
    gradients, optimizer = state.gradients, state.optimizer
    if strategy.stage == 3:
        buffers += min(every, LIVE_PARAMETERS) * weight
    if strategy.offload:
        host, weights, gradients, optimizer = weights + gradients + optimizer, 0, 0, 0
    held = weights + gradients + optimizer + activations + buffers
    return Forecast(
        strategy,
        recompute,
        weights,
        gradients,
        optimizer,
        activations,
        buffers,
        CONTEXT_BYTES + int(FRAGMENTATION * held),
        host,
        cost.flops,
        _seconds(job, cost, strategy, devices, device, precision),
    )


def _communication_buffers(job: Job, strategy: Strategy, devices: int, device: Device, weight: int) -> int:
    """Where gradients are gathered before they are sent."""
    if devices == 1 and not strategy.stage:
        return 0
    if not strategy.stage:
        return job.trained * weight  # DDP's buckets hold all gradients once more
    return min(device.bucket, job.trained) * weight * (1 if strategy.stage == 3 else device.buckets)


def _seconds(job: Job, cost: StepCost, strategy: Strategy, devices: int, device: Device, precision: Precision) -> float:
    """Time of a step: products, messages beside them or after them, and the optimiser."""
    weight, others = precision.weight, (devices - 1) / devices
    compute = cost.flops / (getattr(device, precision.products) * UTILISATION)
    sent = others * job.trained * weight / device.link  # all gradients once, or all trained weights
    gathered = others * (job.trained + job.frozen) * weight / device.link
    share = devices if strategy.stage else 1
    own = recipe(precision, strategy, job.state_values)
    touched = job.trained / share * (2 * (own.weight + own.copy + own.state) + own.gradient)
    update = touched / (HOST_BANDWIDTH if strategy.offload else device.bandwidth)
    backward = 2 / 3 * compute
    if not strategy.stage:
        return compute - backward + max(backward, 2 * sent) + update
    if strategy.stage < 3:
        return compute - backward + max(backward, sent) + update + sent
    messages = 2 * gathered + sent
    if strategy.offload:
        # Each part of the weights comes from the host twice, its gradients go there once.
        messages += (3 * job.trained + 2 * job.frozen) * weight / devices / device.host_link
    return max(compute, messages) + update


def forecasts(job: Job, devices: int, device: Device, precision: Precision) -> list[Forecast]:
    """All strategies with all that may be recomputed; for a device alone, those that divide nothing."""
    return [
        forecast(job, strategy, recompute, devices, device, precision)
        for strategy in (STRATEGIES if devices > 1 else ALONE)
        for recompute in job.costs
    ]


def best(options: list[Forecast], memory: float) -> Forecast | None:
    """Of those that fit and are about as fast as the fastest of them, the first: the simplest; None where none fits."""
    fitting = [option for option in options if option.total <= memory]
    quickest = min((option.seconds for option in fitting), default=0.0)
    return next((option for option in fitting if option.seconds <= quickest * (1 + NEARLY) + MILLISECOND), None)


def why_not(job: Job, devices: int, device: Device, precision: Precision, memory: float) -> str:
    """Say which part is too large in the smallest forecast, and what would help."""
    smallest = min(forecasts(job, devices, device, precision), key=lambda option: option.total)
    name, size = max(smallest.parts.items(), key=lambda item: item[1])
    where = f"{smallest.strategy.name} with recomputation {smallest.recompute}"
    reason = (
        f"nothing fits: the smallest, {where}, needs {smallest.total / 1e9:.3g} GB of {memory / 1e9:.3g} GB, "
        f"most of it {name} ({size / 1e9:.3g} GB)"
    )
    rest = (memory - CONTEXT_BYTES) / (1 + FRAGMENTATION) - (smallest.total - smallest.allowance - smallest.activations)
    if rest > 0:
        return f"{reason}; a batch of {rest / smallest.activations:.0%} of this one would fit (data.batch_size)"
    return f"{reason}; take a device with more memory, a smaller model, or bf16-true"


def without_offload(job: Job, devices: int, device: Device, precision: Precision, memory: float) -> str:
    """Say how many devices would do without the slow way to the host's memory."""
    for more in (devices * 2**power for power in range(1, 13)):
        options = [option for option in forecasts(job, more, device, precision) if not option.strategy.offload]
        found = best(options, memory)
        if found is not None:
            return f"without offloading: {found.strategy.name} with devices={more}"
    return "without offloading it fits on no number of devices"


def parse_memory(text: str) -> float:
    """Bytes from "80GB", "80 GiB" or "512MiB".

    Raises:
        InputError: not a size.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([MGT])(i?)B", text.strip(), re.IGNORECASE)
    if found is None or not float(found[1]):
        raise InputError(f"memory={text}: not a size; write it like memory=80GB or memory=24GiB")
    thousand = 1024 if found[3] else 1000
    return float(found[1]) * thousand ** (2 + "MGT".index(found[2].upper()))
