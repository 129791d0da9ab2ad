"""Checkpoints of ZeRO: a directory with a part of each process, read by any base and number of processes."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
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
    tensors_only,
    unwritten,
)
from .loss_scale import LossScale
from .reshape import Elements, Fragment, Saved, check_optimizers, load_weights, put_weights, read_saved, shares

LOSS_SCALE = "MixedPrecision"
"""Where Lightning keeps the scale of the loss in checkpoints of the other bases."""


class ZeroCheckpoints(TechniqueMixin, DeepSpeedStrategy):
    """The part of `Zero` that writes its checkpoints, and divides those of others among its processes."""

    stage: int
    loss_scale: LossScale | None = None  # at 16-mixed, once the engine is there

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
        if self.loss_scale is not None:
            client_state[LOSS_SCALE] = self.loss_scale.state_dict()
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
        if self.loss_scale is not None and LOSS_SCALE in checkpoint:
            self.loss_scale.load_state_dict(checkpoint[LOSS_SCALE])
        return checkpoint

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
