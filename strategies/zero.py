"""DeepSpeed ZeRO on GPUs and, over gloo, on CPU processes, with the results of DDP.

Lightning's own DeepSpeed strategy refuses CPUs, divides accumulated gradients twice, carries a last partial window into
the next epoch and turns bf16-mixed into bf16 parameters; README.md has a table with the figures of both.
"""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.seed import reset_seed
from lightning_utilities.core.rank_zero import rank_zero_warn
from pytorch_lightning.accelerators.cuda import CUDAAccelerator
from pytorch_lightning.plugins.precision.deepspeed import DeepSpeedPrecision
from pytorch_lightning.strategies import DeepSpeedStrategy
from pytorch_lightning.trainer.states import TrainerFn

from ..errors import InputError
from .bases import TechniqueMixin
from .checkpoints import synced_checkpoint_engine
from .gloo import suit_deepspeed, without_shared_memory
from .loss_scale import LossScale
from .technique import Technique
from .zero_checkpoints import ZeroCheckpoints


class ZeroPrecision(DeepSpeedPrecision):
    """Precision of a ZeRO run: `*-mixed` is autocast over float32 parameters, as everywhere else in Lightning."""

    def forward_context(self) -> AbstractContextManager:
        """Run steps under autocast for the mixed precisions."""
        if "mixed" not in self.precision:
            return nullcontext()
        return torch.autocast(_deepspeed_device(), dtype=self._desired_dtype)

    def convert_input(self, data: Any) -> Any:
        """Leave inputs to autocast for the mixed precisions; cast them for the others."""
        return data if "mixed" in self.precision else super().convert_input(data)

    def backward(self, tensor: torch.Tensor, model: pl.LightningModule, _: Any, *args: Any, **kwargs: Any) -> None:
        """Run the engine's backward pass on a loss that Lightning has already divided by the accumulated batches."""
        engine: Any = model.trainer.strategy.model
        if model.automatic_optimization:
            engine.set_gradient_accumulation_boundary(not model.trainer.fit_loop._should_accumulate())
        engine.backward(tensor, *args, scale_wrt_gas=False, **kwargs)

    def optimizer_step(self, optimizer: Any, model: pl.LightningModule, closure: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """Let the engine take a step; the scale of the loss follows what became of it."""
        result = super().optimizer_step(optimizer, model, closure, **kwargs)
        scale: LossScale | None = model.trainer.strategy.loss_scale  # type: ignore[attr-defined]
        if scale is not None:
            scale.update()
        return result


class Zero(ZeroCheckpoints):
    """ZeRO: each process keeps 1/N of the optimiser state (stage 1), the gradients (2) and the parameters (3).

    Example:
        `Trainer(strategy=Zero(stage=2, techniques=[Lookahead(k=5)]), accelerator="cpu", devices=2)`

    Args:
        stage: 1, 2 or 3.
        techniques: What attaches to the run, in this order.
        offload_optimizer: Keep the optimiser state in CPU memory.
        offload_parameters: Keep the parameters in CPU memory between uses; stage 3 only.
        config: Sections of a DeepSpeed configuration that are laid over the one made here.
        **kwargs: Arguments of Lightning's `DeepSpeedStrategy`, such as `reduce_bucket_size`.

    Raises:
        ValueError: If the stage is not 1, 2 or 3, or parameters are to be offloaded below stage 3.
        ImportError: If DeepSpeed is not installed.
    """

    name = "zero"

    def __init__(
        self,
        stage: int = 2,
        techniques: Iterable[Technique] = (),
        *,
        offload_optimizer: bool = False,
        offload_parameters: bool = False,
        config: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if stage not in (1, 2, 3):
            raise ValueError(f"Zero(stage={stage}): use 1, 2 or 3.")
        if offload_parameters and stage != 3:
            raise ValueError(f"Zero(stage={stage}, offload_parameters=True): only stage 3 can offload parameters.")
        if not torch.cuda.is_available():
            os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed looks for others, and says so at length
        try:
            import deepspeed  # noqa: F401
        except ImportError as error:
            raise ImportError("Zero needs DeepSpeed: pip install 'deepspeed>=0.19.8,<0.20'") from error
        kwargs.setdefault("logging_level", logging.ERROR)
        super().__init__(
            stage=stage, offload_optimizer=offload_optimizer, offload_parameters=offload_parameters, **kwargs
        )
        self.stage = stage
        for flag in ("partition_activations", "cpu_checkpointing"):
            if kwargs.get(flag):
                rank_zero_warn(
                    f"Zero({flag}=True) speaks to modules that call deepspeed.checkpointing themselves, and to no "
                    "other; ActivationCheckpointing(policy='offload') keeps inputs of blocks in the host's memory."
                )
        assert isinstance(self.config, dict)
        # The optimiser is the module's own (torch's, perhaps wrapped), not DeepSpeed's CPU Adam.
        self.config["zero_force_ds_cpu_optimizer"] = False
        self._chosen = {*kwargs, *(config or {}).get("zero_optimization", {})}
        self.config = _overlay(self.config, config or {})
        self._bucket = self.config["zero_optimization"]["reduce_bucket_size"]
        self._carry(techniques)

    # The process: GPUs as in Lightning, CPU processes besides

    @property
    def root_device(self) -> torch.device:
        """The device of this process; a CPU has an index too, which the engine asks for."""
        device = super().root_device
        return torch.device("cpu", self.local_rank) if device.type == "cpu" else device

    def setup_environment(self) -> None:
        """Start the process group, on CPUs as well."""
        if isinstance(self.accelerator, CUDAAccelerator):
            super().setup_environment()
        else:
            super(DeepSpeedStrategy, self).setup_environment()

    def setup_distributed(self) -> None:
        """Join the process group."""
        if isinstance(self.accelerator, CUDAAccelerator):
            super().setup_distributed()
            return
        if _deepspeed_device() != "cpu":
            raise InputError(
                f"Zero on CPUs: DeepSpeed has chosen {_deepspeed_device()!r}; "
                "set DS_ACCELERATOR=cpu in the environment, or use trainer.accelerator=gpu."
            )
        reset_seed()
        self.set_world_ranks()
        without_shared_memory()
        self._init_deepspeed_distributed()
        suit_deepspeed()

    # Precision and accumulation: what DDP does

    @property
    def precision_plugin(self) -> Any:
        """The precision of the run, `ZeroPrecision`."""
        return super().precision_plugin

    @precision_plugin.setter
    def precision_plugin(self, plugin: Any) -> None:
        if isinstance(plugin, DeepSpeedPrecision) and not isinstance(plugin, ZeroPrecision):
            plugin = ZeroPrecision(plugin.precision)  # type: ignore[arg-type]
        self._precision_plugin = plugin

    @property
    def handles_gradient_accumulation(self) -> bool:
        """False: Lightning decides when a window ends, so a last partial window steps as it does under DDP."""
        return False

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Nothing to block: the engine was told by `ZeroPrecision.backward` whether a window ends."""
        yield

    def _format_config(self) -> None:
        config, module = self.config, self.lightning_module
        assert isinstance(config, dict)
        assert module is not None
        trainer = module.trainer
        precision = self.precision_plugin.precision
        if precision.endswith("-true") and precision != "32-true":
            config.setdefault("bf16" if precision.startswith("bf16") else "fp16", {"enabled": True})
        elif precision.endswith("-mixed"):
            # No module is listed as safe to reduce in low precision: gradients travel in float32, as under DDP.
            section = {"enabled": True, "dtype": "bfloat16" if precision.startswith("bf16") else "float16"}
            config.setdefault("torch_autocast", {**section, "lower_precision_safe_modules": []})
        self._suit_settings(config["zero_optimization"], clip=bool(trainer.gradient_clip_val))
        config.setdefault("train_micro_batch_size_per_gpu", 1)  # only used for DeepSpeed's own throughput log
        config.setdefault("gradient_clipping", trainer.gradient_clip_val or 0.0)
        if module.automatic_optimization:
            config["gradient_accumulation_steps"] = trainer.accumulate_grad_batches
        else:
            # Only the module knows when it will step, so every engine step ends a window. DeepSpeed keeps sums of
            # offloaded gradients only where more than one batch is announced.
            config["managed_gradient_accumulation"] = False
            config["gradient_accumulation_steps"] = 2
            if self.stage != 2:
                config["zero_optimization"]["overlap_comm"] = False

    def _suit_settings(self, zero: dict[str, Any], clip: bool) -> None:
        """Choose what the user has not: settings that cost nothing where Lightning's defaults cost time."""
        chosen: dict[str, Any] = {}
        if not isinstance(self.accelerator, CUDAAccelerator):
            # Buckets that stay in the cache; a CPU has no second stream to overlap with.
            chosen = {"reduce_bucket_size": 4_000_000, "overlap_comm": False}
        if (
            self.stage < 3
            and not clip
            and "offload_optimizer" not in zero
            and "16-" not in self.precision_plugin.precision
        ):
            # Nobody asks for the norm, and with it DeepSpeed skips steps whose gradients are not finite, silently.
            chosen["compute_grad_norm"] = False
        trained = self._trained()
        if trained:  # a bucket is memory, whether it is filled or not
            chosen["reduce_bucket_size"] = min(chosen.get("reduce_bucket_size", self._bucket), trained)
        zero.update({key: value for key, value in chosen.items() if key not in self._chosen})

    def _trained(self) -> int:
        """Number of weights that are trained, on all processes together; 0 while the module is not built."""
        module = self.lightning_module
        assert module is not None
        return sum(getattr(p, "ds_numel", p.numel()) for p in module.parameters() if p.requires_grad)

    # Techniques

    def setup(self, trainer: pl.Trainer) -> None:
        """Attach the techniques, then wrap the module in the engine."""
        if trainer.state.fn == TrainerFn.FITTING:
            self._config_initialized = False
        super().setup(trainer)

    def setup_optimizers(self, trainer: pl.Trainer) -> None:
        """Nothing yet: the engine makes them, see `_init_optimizers`."""
        super(TechniqueMixin, self).setup_optimizers(trainer)

    def _init_optimizers(self) -> Any:
        optimizer, scheduler = super()._init_optimizers()
        return self.wrap_optimizer(optimizer), scheduler

    def init_deepspeed(self) -> None:
        """Make the engine, as if it were the first of this process."""
        from deepspeed.runtime import torch_autocast

        # DeepSpeed remembers the autocast of an engine for all that come after it.
        torch_autocast.TORCH_AUTOCAST_INITIALIZED, torch_autocast.TORCH_AUTOCAST_DTYPE = False, None
        module = self.lightning_module
        assert module is not None
        if any(hasattr(parameter, "ds_id") for parameter in module.parameters()):
            # A former run has divided it, and Lightning has left it on the CPU, with what DeepSpeed expects on the GPU.
            module.to(self.root_device)
        self.loss_scale = None
        super().init_deepspeed()

    def _setup_model_and_optimizer(self, model: Any, optimizer: Any, lr_scheduler: Any | None = None) -> Any:
        engine, optimizer = super()._setup_model_and_optimizer(model, optimizer, lr_scheduler)
        engine.checkpoint_engine = synced_checkpoint_engine()
        if self.precision_plugin.precision == "16-mixed":
            self.loss_scale = LossScale(engine.optimizer)
        for buffer in model.buffers():  # the engine does so for parameters, DDP for both
            torch.distributed.broadcast(buffer, src=0)
        return engine, optimizer

    def teardown(self) -> None:
        """Take DeepSpeed's hooks off the parameters: they would go on gathering gradients in another engine's run."""
        super().teardown()
        for hook in getattr(getattr(self.model, "optimizer", None), "_grad_acc_hooks", ()):
            hook.remove()

    def _initialize_deepspeed_inference(self, model: Any) -> None:
        if self.stage < 3:
            # Every process holds all parameters: nothing to gather, so nothing to wrap.
            self.model_to_device()
            return
        import deepspeed
        from pytorch_lightning.strategies.deepspeed import remove_module_hooks

        assert isinstance(self.config, dict)
        keys = ("zero_allow_untested_optimizer", "zero_optimization", "fp16", "bf16", "torch_autocast")
        config = {key: self.config[key] for key in keys if key in self.config}
        remove_module_hooks(model)
        self.model, *_ = deepspeed.initialize(
            args=argparse.Namespace(device_rank=self.root_device.index),
            config={"train_micro_batch_size_per_gpu": 1, **config},
            model=model,
            model_parameters=[],  # type: ignore[arg-type]
            dist_init_required=False,
        )

    def carry_weights_over(self) -> None:
        """Copy the float32 partitions into the module, as DeepSpeed does at the end of a step."""
        optimizer: Any = self.deepspeed_engine.optimizer
        if self.stage < 3:
            optimizer.update_lp_params()
            return
        # Stage 3 has no function for it. Gathered parameters hold old values: let go of them, then fetch those anew
        # that are never let go of.
        optimizer._partition_all_parameters()
        for sub_group in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(sub_group)
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)

    @classmethod
    def register_strategies(cls, strategy_registry: Any) -> None:
        """Register nothing here; `kexue.strategies` registers all bases."""


def _deepspeed_device() -> str:
    """Return the kind of device that DeepSpeed has chosen for this process, "cpu" or "cuda"."""
    from deepspeed.accelerator import get_accelerator

    accelerator: Any = get_accelerator()
    return accelerator.device_name()


def _overlay(base: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, value in above.items():
        below = result.get(key)
        result[key] = _overlay(below, value) if isinstance(value, Mapping) and isinstance(below, Mapping) else value
    return result
