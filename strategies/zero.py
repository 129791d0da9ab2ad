"""DeepSpeed ZeRO on GPUs and, over gloo, on CPU processes, with the results of DDP.

Lightning's own DeepSpeed strategy refuses CPUs, divides accumulated gradients twice, carries a last partial window into
the next epoch and turns bf16-mixed into bf16 parameters; README.md has a table with the figures of both.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.seed import reset_seed
from pytorch_lightning.accelerators.cuda import CUDAAccelerator
from pytorch_lightning.plugins.precision.deepspeed import DeepSpeedPrecision
from pytorch_lightning.strategies import DeepSpeedStrategy
from pytorch_lightning.trainer.states import TrainerFn

from ..errors import InputError
from .bases import TechniqueMixin
from .checkpoints import (
    KEY,
    MANIFEST,
    PART,
    check_parameters,
    describe,
    partial_path,
    publish,
    reason_of,
    remove,
    shapes_of,
    sync_file,
    synced_checkpoint_engine,
    tensors_only,
    unwritten,
)
from .gloo import suit_deepspeed, without_shared_memory
from .reshape import Elements, Fragment, Saved, check_optimizers, load_weights, put_weights, read_saved, shares
from .technique import Technique

LOSS_SCALE = "MixedPrecision"
"""Where Lightning keeps the scale of the loss in checkpoints of the other bases."""


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


class Zero(TechniqueMixin, DeepSpeedStrategy):
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
        assert isinstance(self.config, dict)
        # The optimiser is the module's own (torch's, perhaps wrapped), not DeepSpeed's CPU Adam.
        self.config["zero_force_ds_cpu_optimizer"] = False
        self._chosen = {*kwargs, *(config or {}).get("zero_optimization", {})}
        self.config = _overlay(self.config, config or {})
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
        zero.update({key: value for key, value in chosen.items() if key not in self._chosen})

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

    def _setup_model_and_optimizer(self, model: Any, optimizer: Any, lr_scheduler: Any | None = None) -> Any:
        engine, optimizer = super()._setup_model_and_optimizer(model, optimizer, lr_scheduler)
        engine.checkpoint_engine = synced_checkpoint_engine()
        for buffer in model.buffers():  # the engine does so for parameters, DDP for both
            torch.distributed.broadcast(buffer, src=0)
        return engine, optimizer

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

    # Checkpoints

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """Save a directory, one part per process, whole or not at all.

        Raises:
            OSError: On every process, if one of them could not write; what was there before is untouched.
        """
        if storage_options is not None:
            raise TypeError("Zero.save_checkpoint(storage_options=...) is not supported: leave it out.")
        path = Path(self.broadcast(str(filepath)))
        partial = partial_path(path)
        ours = {"state_dict", "optimizer_states"}  # the engine writes these, divided
        client_state = {key: value for key, value in self.annotate(checkpoint).items() if key not in ours}
        if self._loss_scale is not None:
            client_state[LOSS_SCALE] = self._loss_scale.state_dict()
        engine: Any = self.deepspeed_engine
        engine.checkpoint_engine.failure = None
        if self.is_global_zero:
            remove(partial)
        self.barrier()
        with self.weights_to_save():
            engine.save_checkpoint(
                str(partial),
                client_state=client_state,
                tag=PART,
                exclude_frozen_parameters=self.exclude_frozen_parameters,
            )
        failures: list[Any] = [None] * self.world_size
        torch.distributed.all_gather_object(failures, engine.checkpoint_engine.failure)
        if self.is_global_zero and not any(failures):
            try:
                self._finish(partial, path, client_state[KEY]["description"])
            except OSError as error:
                failures[0] = reason_of(error)
        failures = self.broadcast(failures)
        for rank, failure in enumerate(failures):
            if failure:
                if self.is_global_zero:
                    remove(partial)
                raise unwritten(path, failure, f" by process {rank}")

    @staticmethod
    def _finish(partial: Path, path: Path, description: dict[str, Any]) -> None:
        with (partial / MANIFEST).open("w", encoding="utf-8") as file:
            json.dump(description, file, indent=1, ensure_ascii=False)
            file.flush()
            os.fsync(file.fileno())
        for folder in (partial / PART, partial):
            sync_file(folder)
        publish(partial, path)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Continue from a checkpoint of any base, stage and number of processes; for evaluation, take its weights.

        Raises:
            InputError: If it is missing, damaged, incomplete, of another model, or holds weights only.
        """
        path = Path(self.broadcast(str(checkpoint_path)))
        trainer = self._trainer
        assert trainer is not None
        assert self.lightning_module is not None
        if trainer.state.fn != TrainerFn.FITTING:
            self.load_weights(path)
            return {"state_dict": {}, "pytorch-lightning_version": version("pytorch-lightning")}
        description = describe(path)
        if path.is_dir() and (description["world_size"], description["stage"]) == (self.world_size, self.stage):
            check_parameters(path, description["parameters"], self.parameter_shapes())
            with tensors_only():
                _, checkpoint = self.deepspeed_engine.load_checkpoint(
                    str(path),
                    tag=PART,
                    load_lr_scheduler_states=False,
                    load_module_strict=self.lightning_module.strict_loading,
                )
            assert checkpoint is not None
        else:
            saved = read_saved(path, weights_only=weights_only is not False)
            check_parameters(path, shapes_of(saved.weights), self.parameter_shapes())
            if not description or "lr_schedulers" not in saved.rest:
                raise InputError(
                    f"{path} does not say what ZeRO has to know of its optimiser: it was not saved by kexue, or holds "
                    "weights only. Begin anew from its weights, or resume with strategy=ddp or strategy=single."
                )
            self._divide(saved, description)
            checkpoint = saved.rest
        self.restore_run(path, checkpoint[KEY])
        self.restore_exchange(description)
        if self._loss_scale is not None and LOSS_SCALE in checkpoint:
            self._loss_scale.load_state_dict(checkpoint[LOSS_SCALE])
        return checkpoint

    @property
    def _loss_scale(self) -> torch.amp.GradScaler | None:
        """What scales the loss at 16-mixed; DeepSpeed itself does not save it."""
        return getattr(self.deepspeed_engine.optimizer, "torch_autocast_gradscaler", None)

    def _divide(self, saved: Saved, description: Mapping[str, Any]) -> None:
        """Put this process' share of the weights and of the optimiser's state into the engine."""
        check_optimizers(len(saved.optimizers), 1)
        module, engine = self.lightning_module, self.deepspeed_engine
        assert module is not None
        optimizer: Any = engine.optimizer
        parameters = dict(module.named_parameters())
        names = {id(parameter): name for name, parameter in parameters.items()}
        if self.stage == 3:
            groups = [[] for _ in optimizer.optimizer.param_groups]
            for index, part in enumerate(optimizer.fp16_groups):
                groups[optimizer.sub_group_to_group_id[index]] += part
        else:
            groups = optimizer.bit16_groups
        frozen = [name for name, parameter in parameters.items() if not parameter.requires_grad]
        saved.optimizers[0].check_groups([[names[id(p)] for p in group] for group in groups], frozen)
        flats = self._flats(names)
        with torch.no_grad():
            for flat, fragments in flats:
                flat.zero_()  # padding too
                for fragment in fragments:
                    place = flat[fragment.offset : fragment.offset + fragment.count]
                    saved.weights[fragment.name].copy_into(place, fragment.start)
            self._load_others(saved, {id(p) for group in groups for p in group})
        if self.stage == 3:
            optimizer._set_fp32_optimizer_param_groups()
        copies = [key for technique in self.techniques for key in technique.copies]
        state = saved.optimizers[0].flat_state_dict(optimizer.optimizer, flats, saved.weights, copies)
        optimizer.optimizer.load_state_dict(state)
        if self.stage == 3:
            optimizer._clear_fp32_optimizer_param_groups()
        self.carry_weights_over()
        engine.global_steps = description["step"]
        if engine.fp16_enabled():
            vars(optimizer).update(saved.loss_scaler)

    def _flats(self, names: Mapping[int, str]) -> list[tuple[torch.Tensor, list[Fragment]]]:
        """Return the float32 tensors that this process steps, in the order of the optimiser's groups, with what lies
        in them."""
        optimizer: Any = self.deepspeed_engine.optimizer
        if self.stage == 3:
            sizes = [{names[id(p)]: p.ds_numel for p in part} for part in optimizer.fp16_groups]
            fragments = [shares(its_sizes, self.global_rank, self.world_size) for its_sizes in sizes]
            return list(zip(optimizer.fp32_partitioned_groups_flat, fragments, strict=True))
        fragments = [
            [
                Fragment(names[id(p)], place.lp_fragment_address.start, address.numel, address.start)
                for p in group
                if (place := p._hp_mapping) is not None and (address := place.hp_fragment_address)
            ]
            for group in optimizer.bit16_groups
        ]
        return list(zip(optimizer.single_partition_of_fp32_groups, fragments, strict=True))

    def _load_others(self, saved: Saved, optimized: set[int]) -> None:
        """Load what the optimiser does not step: frozen parameters and buffers."""
        assert self.lightning_module is not None
        for name, tensor in self.lightning_module.state_dict(keep_vars=True).items():
            value = saved.weights[name]
            if id(tensor) in optimized or not isinstance(value, Elements):
                continue
            if not hasattr(tensor, "ds_shape"):
                tensor.copy_(value.whole())
                continue
            import deepspeed

            with deepspeed.zero.GatheredParameters([tensor], modifier_rank=0):
                if self.is_global_zero:
                    tensor.copy_(value.whole())

    def load_weights(self, path: Path) -> None:
        """Load the weights of any complete checkpoint into the module, also where its parameters are divided."""
        assert self.lightning_module is not None
        if self.stage < 3:
            put_weights(self.lightning_module, path)
            return
        weights = load_weights(path)
        check_parameters(path, shapes_of(weights), self.parameter_shapes())
        self._restore_zero_state({"state_dict": weights}, strict=True)

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
