"""Any checkpoint in one form, {parameter: {weight, each entry of the optimiser's state}}, to be divided anew.

A run saved by N processes of one base goes on from it on M processes of another. DeepSpeed's universal format keeps
float32 weights and two moments of Adam only; here every entry is carried, so Lookahead, EMA and any optimiser continue.

Memory: files are mapped, and a process copies out of them what it keeps: its own share under ZeRO, all of it under DDP
and on one device.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from ..errors import InputError
from .checkpoints import KEY, PART, check_parameters, describe, read_file, shapes_of, tensors_only

DEEPSPEED = {
    "module", "buffer_names", "optimizer", "param_shapes", "frozen_param_shapes", "shared_params", "lr_scheduler",
    "frozen_param_fragments", "data_sampler", "random_ltd", "sparse_tensor_module_names", "skipped_steps",
    "global_steps", "global_samples", "dp_world_size", "mp_world_size", "checkpoint_parallel_dimensions", "ds_config",
    "ds_version",
}  # fmt: skip
"""What DeepSpeed puts beside what Lightning saves."""


class Elements:
    """A saved tensor as pieces of mapped files, in order; nothing is read until it is copied out."""

    def __init__(self, shape: Sequence[int], pieces: Iterable[Tensor]) -> None:
        self.shape = torch.Size(shape)
        self.pieces = list(pieces)

    def copy_into(self, out: Tensor, start: int = 0) -> None:
        """Fill a flat tensor with the elements from `start` on."""
        end, position = start + len(out), 0
        for piece in self.pieces:
            low, high = max(start, position), min(end, position + len(piece))
            if low < high:
                out[low - start : high - start].copy_(piece[low - position : high - position])
            position += len(piece)

    def whole(self) -> Tensor:
        """Return a copy of the tensor."""
        result = torch.empty(self.shape, dtype=self.pieces[0].dtype if self.pieces else None)
        self.copy_into(result.view(-1))
        return result


@dataclass(frozen=True)
class Fragment:
    """Where a run of a parameter's elements lies in a flat tensor of ZeRO.

    Attributes:
        name: Of the parameter.
        start: Of its first element, in the parameter.
        count: Number of elements.
        offset: Of its first element, in the flat tensor.
    """

    name: str
    start: int
    count: int
    offset: int


@dataclass
class SavedOptimizer:
    """An optimiser's state, by parameter.

    Attributes:
        groups: Hyperparameters of each group, with the names of its parameters under `params`.
        state: Name to entries: `Elements` for one number per weight, else what the checkpoint has.
    """

    groups: list[dict[str, Any]]
    state: dict[str, dict[str, Any]] = field(default_factory=dict)

    def state_dict(self, optimizer: Optimizer, names: Mapping[int, str]) -> dict[str, Any]:
        """Return a `state_dict` for an optimiser that holds whole parameters.

        Args:
            optimizer: Whose.
            names: `id` of a parameter to its name.

        Raises:
            InputError: If its groups hold other parameters than those saved.
        """
        own = optimizer.state_dict()
        present = [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]
        frozen = {names[id(p)] for group in optimizer.param_groups for p in group["params"] if not p.requires_grad}
        self.check_groups(present, frozen)
        state = {}
        for group, its_names in zip(own["param_groups"], present, strict=True):
            for index, name in zip(group["params"], its_names, strict=True):
                if entries := self.state.get(name):
                    state[index] = {key: _whole(value) for key, value in entries.items()}
        return {"state": state, "param_groups": self.hyperparameters(own["param_groups"])}

    def flat_state_dict(
        self,
        optimizer: Optimizer,
        flats: Sequence[tuple[Tensor, Sequence[Fragment]]],
        weights: Mapping[str, Any],
        copies: Iterable[str],
    ) -> dict[str, Any]:
        """Return a `state_dict` for an optimiser over flat tensors, each a share of several parameters.

        Args:
            optimizer: Whose groups hold the flat tensors.
            flats: The flat tensors in the order of the groups, and what lies in them.
            weights: Saved weights.
            copies: Entries that are copies of weights: the weight stands for one that is missing, else 0.
        """
        state = {
            index: entries
            for index, (flat, fragments) in enumerate(flats)
            if (entries := self._flat_entries(flat, fragments, weights, tuple(copies)))
        }
        return {"state": state, "param_groups": self.hyperparameters(optimizer.state_dict()["param_groups"])}

    def _flat_entries(
        self, flat: Tensor, fragments: Sequence[Fragment], weights: Mapping[str, Any], copies: tuple[str, ...]
    ) -> dict[str, Any]:
        saved = {fragment.name: self.state.get(fragment.name, {}) for fragment in fragments}
        result: dict[str, Any] = {}
        for key in dict.fromkeys(key for entries in saved.values() for key in entries):
            values = [entries[key] for entries in saved.values() if key in entries]
            if not any(isinstance(value, Elements) for value in values):
                result[key] = _common(key, values, saved)
                continue
            result[key] = filled = torch.zeros(flat.shape, dtype=torch.float32)
            for fragment in fragments:
                value = saved[fragment.name].get(key, weights[fragment.name] if key in copies else None)
                if isinstance(value, Elements):
                    value.copy_into(filled[fragment.offset : fragment.offset + fragment.count], fragment.start)
        return result

    def hyperparameters(self, groups: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Return groups with the saved hyperparameters and their own parameters."""
        return [
            {**own, **{key: value for key, value in saved.items() if key != "params"}}
            for own, saved in zip(groups, self.groups, strict=True)
        ]

    def check_groups(self, present: Sequence[Sequence[str]], frozen: Iterable[str] = ()) -> None:
        """Compare the names in each group, except those of frozen parameters, which ZeRO leaves out.

        Raises:
            InputError: If they differ.
        """
        frozen = set(frozen)
        there, here = [set(group["params"]) - frozen for group in self.groups], [set(p) - frozen for p in present]
        if there != here:
            raise InputError(
                f"the checkpoint's optimiser has parameter groups of {[len(g) for g in there]} parameters, this one of "
                f"{[len(g) for g in here]}, or others in them: use the optimizer configuration of the saved run."
            )


@dataclass
class Saved:
    """A checkpoint in the form that any base can go on from.

    Attributes:
        path: Its place.
        weights: The module's `state_dict` in full: `Elements`, in float32 where ZeRO kept that; other things as saved.
        optimizers: The optimisers; none if it holds weights only.
        rest: Everything else: loops, callbacks, schedulers, what the strategies and hyperparameters say.
        loss_scaler: State of ZeRO's loss scaling, for half precision.
    """

    path: Path
    weights: dict[str, Any]
    optimizers: list[SavedOptimizer]
    rest: dict[str, Any]
    loss_scaler: dict[str, Any] = field(default_factory=dict)

    def state_dict(self) -> dict[str, Any]:
        """Return copies of all weights."""
        return {name: _whole(value) for name, value in self.weights.items()}


def check_optimizers(saved: int, present: int) -> None:
    """Compare numbers of optimisers.

    Raises:
        InputError: If they differ.
    """
    if saved != present:
        raise InputError(
            f"the checkpoint has the state of {saved} optimisers, this run has {present}: "
            "use the base it was saved with, or begin anew from its weights."
        )


def read_saved(path: Path, weights_only: bool = True) -> Saved:
    """Read a checkpoint of any strategy; its tensors stay in the mapped files.

    Raises:
        InputError: If it is missing, damaged, incomplete, or holds no weights.
    """
    return _read_directory(path) if path.is_dir() else _read_file(path, weights_only)


def load_weights(path: Path) -> dict[str, Tensor]:
    """Return the module's `state_dict` in full from a checkpoint of any strategy, in float32 where ZeRO kept that.

    Raises:
        InputError: As `read_saved`.
    """
    return read_saved(path).state_dict()


def put_weights(module: nn.Module, path: Path) -> None:
    """Load the weights of any complete checkpoint, of whatever strategy, into a module, strictly.

    Raises:
        InputError: As `load_weights`, and if it is a checkpoint of another model.
    """
    weights = load_weights(path)
    check_parameters(path, shapes_of(weights), shapes_of(module.state_dict()))
    module.load_state_dict(weights)


def _read_file(path: Path, weights_only: bool) -> Saved:
    checkpoint = read_file(path, weights_only=weights_only, mmap=True)
    if "state_dict" not in checkpoint:
        raise InputError(f"{path} holds no state_dict: it is not a checkpoint of a LightningModule.")
    state_dict, states = checkpoint["state_dict"], checkpoint.get("optimizer_states", [])
    weights = {name: _mapped(value) for name, value in state_dict.items()}
    rest = {key: value for key, value in checkpoint.items() if key not in ("state_dict", "optimizer_states")}
    names_of_all = checkpoint.get(KEY, {}).get("optimizers", [])
    optimizers = []
    for state, names_of_groups in zip(states, names_of_all, strict=False):
        groups, by_name = [], {}
        for group, names in zip(state["param_groups"], names_of_groups, strict=True):
            groups.append({**group, "params": names})
            for index, name in zip(group["params"], names, strict=True):
                by_name[name] = state["state"].get(index, {})
        optimizers.append(SavedOptimizer(groups, _elementwise(by_name, weights)))
    return Saved(path, weights, optimizers, rest)


def _elementwise(state: Mapping[str, Mapping[str, Any]], weights: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Mark the entries that hold one number per weight: by their shape or, for a weight of one number, their name."""
    keys = {
        key
        for name, entries in state.items()
        for key, value in entries.items()
        if isinstance(value, Tensor) and value.dim() and value.shape == weights[name].shape
    }

    def mark(name: str, key: str, value: Any) -> Any:
        if key in keys and isinstance(value, Tensor) and value.shape == weights[name].shape:
            return _mapped(value)
        return value

    return {name: {key: mark(name, key, value) for key, value in entries.items()} for name, entries in state.items()}


def _read_directory(path: Path) -> Saved:
    description = describe(path)
    stage, world = description["stage"], description["world_size"]
    holders = range(world) if stage == 3 else [None]  # below stage 3 the first process holds the module in full
    with tensors_only():
        models = [_map(path, "mp_rank_00_model_states.pt", rank) for rank in holders]
        parts = [_map(path, "mp_rank_00_optim_states.pt", rank) for rank in range(world)]
    model, parts = models[0], [part["optimizer_state_dict"] for part in parts]
    shapes = model["param_shapes"]
    weights = {name: Elements(shape, []) for group in shapes for name, shape in group.items()}
    state: dict[str, dict[str, Any]] = {name: {} for name in weights}
    for rank, part in enumerate(parts):
        flats = part["fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"]
        inner = part["optimizer_state_dict" if stage == 3 else "base_optimizer_state"]
        for index, flat in enumerate(flats):
            if stage == 3:
                fragments = shares({name: shape.numel() for name, shape in shapes[index].items()}, rank, world)
            else:
                places = part["param_slice_mappings"][index].items()
                fragments = [Fragment(name, 0, place.numel, place.start) for name, place in places]
            entries = inner["state"].get(index, {})
            for fragment in fragments:
                _add_pieces(fragment, flat, entries, weights, state)
    names = [list(group) for group in shapes]
    groups = [
        # Below stage 3 a group is one flat tensor, at stage 3 one or several.
        {**group, "params": [name for index in group["params"] for name in names[index]]}
        for group in inner["param_groups"]
    ]
    scaler = {key: parts[0][key] for key in ("loss_scaler", "dynamic_loss_scale") if key in parts[0]}
    return Saved(
        path,
        _all_weights(description["parameters"], weights, models, stage),
        [SavedOptimizer(groups, {name: entries for name, entries in state.items() if entries})],
        {key: value for key, value in model.items() if key not in DEEPSPEED},
        scaler,
    )


def _map(path: Path, name: str, rank: int | None) -> dict[str, Any]:
    """Read a part of a directory; DeepSpeed puts the process, and in half precision the dtype, in front of its name."""
    pattern = name if rank is None else f"*zero_pp_rank_{rank}_{name}"
    found = sorted((path / PART).glob(pattern))
    if not found:
        raise InputError(f"{path} is damaged: {PART}/{pattern} is missing; resume from another checkpoint.")
    return read_file(found[0], mmap=True)


def _add_pieces(
    fragment: Fragment,
    flat: Tensor,
    entries: Mapping[str, Any],
    weights: Mapping[str, Elements],
    state: Mapping[str, dict[str, Any]],
) -> None:
    name, place = fragment.name, slice(fragment.offset, fragment.offset + fragment.count)
    weights[name].pieces.append(flat.detach()[place])
    for key, value in entries.items():
        # Padding at the end of a partition is left out of the weights, but not of the state.
        if isinstance(value, Tensor) and value.dim() == 1 and len(value) >= len(flat):
            state[name].setdefault(key, Elements(weights[name].shape, [])).pieces.append(value[place])
        else:
            state[name].setdefault(key, value)


def shares(sizes: Mapping[str, int], rank: int, world: int) -> list[Fragment]:
    """Return what a process holds of the parameters of a flat tensor at stage 3: an equal share of each, in turn."""
    fragments, offset = [], 0
    for name, size in sizes.items():
        share = -(-size // world)
        start = rank * share
        if count := max(0, min(size, start + share) - start):
            fragments.append(Fragment(name, start, count, offset))
        offset += share
    return fragments


def _all_weights(
    names: Iterable[str], trained: Mapping[str, Elements], models: Sequence[Mapping[str, Any]], stage: int
) -> dict[str, Any]:
    """Return the whole `state_dict`: besides what trains, tied names, frozen parameters and buffers."""
    first = models[0]
    frozen = (first["frozen_param_shapes"] or {}) if stage == 3 else {}
    weights: dict[str, Any] = {}
    for name in names:
        source = first["shared_params"].get(name, name)
        if source in trained:
            weights[name] = trained[source]
        elif source in frozen:
            pieces = [model["frozen_param_fragments"][source].reshape(-1) for model in models]
            weights[name] = Elements(frozen[source], pieces)
        elif source in first["module"]:
            weights[name] = _mapped(first["module"][source])
    return weights


def _mapped(value: Any) -> Any:
    return Elements(value.shape, [value.reshape(-1)]) if isinstance(value, Tensor) else value


def _whole(value: Any) -> Any:
    if isinstance(value, Elements):
        return value.whole()
    return value.clone() if isinstance(value, Tensor) else value


def _common(key: str, values: Sequence[Any], owners: Iterable[str]) -> Any:
    """Return what parameters have in common that become one flat tensor, such as their step."""
    if any(isinstance(value, Tensor) and value.dim() for value in values):
        raise InputError(
            f"the optimiser's {key!r} of {next(iter(owners))} has another shape than the weight, so ZeRO cannot divide "
            "it: resume with strategy=ddp or strategy=single."
        )
    if all(value == values[0] for value in values):
        return _whole(values[0])
    rank_zero_warn(
        f"ZeRO keeps one {key!r} for parameters that the checkpoint has different ones of, from {min(values)} to "
        f"{max(values)} (some took no part in every step): the largest counts for all."
    )
    return _whole(max(values))
