"""Write the weights of a trained run where nothing but torch is needed to read them.

usage: kexue export run=FOLDER output=FOLDER [checkpoint=best|last|PATH] [KEY=VALUE ...]

  kexue export run=runs/gplinker_event/1234 output=exported

The run may have been trained by any strategy, on any number of processes. The output folder appears whole or not at
all, and holds
  model.safetensors  all weights, in float32 where ZeRO kept that
  model.ckpt         the same with the model's arguments: Module.load_from_checkpoint("exported/model.ckpt"), without
                     DeepSpeed
  config.yaml        the run's config, and assets/ with its vocabulary and labels
  transformers/      what the library of that name opens, with the vocabulary, where it has a model like the encoder
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pytorch_lightning as pl

TRAINING = ("loops", "callbacks", "lr_schedulers", "kexue")
"""What a checkpoint holds besides the model."""


def run(args: list[str]) -> int:
    """Export; see the module's help."""
    from ..strategies.checkpoints import partial_path, remove, sync_file
    from ..strategies.reshape import read_saved
    from .arguments import take
    from .saved import open_saved
    from .targets import resolve

    words, overrides = take(args, {"run": None, "output": None, "checkpoint": "best"})
    output = _free(Path(words["output"]).expanduser().absolute())
    found = open_saved(words["run"], words["checkpoint"], overrides)
    saved = read_saved(found.checkpoint)
    partial = partial_path(output)
    remove(partial)
    partial.mkdir(parents=True)
    try:
        _write_weights(partial, saved.state_dict(), saved.rest)
        _copy(found.folder, partial, ("config.yaml", "assets"))
        kind: Any = resolve(found.config["model"]["_target_"], "model")
        model = kind.load_from_checkpoint(partial / "model.ckpt", map_location="cpu", weights_only=True)
        said = write_transformers(model, partial)
        for path in partial.rglob("*"):
            sync_file(path)
        if output.is_dir():
            output.rmdir()
        partial.rename(output)
        sync_file(output.parent)
    except BaseException:
        remove(partial)
        raise
    print(f"{len(saved.weights)} weights of step {saved.rest['global_step']} in {output}; {said}")
    return 0


def _free(output: Path) -> Path:
    from ..errors import InputError

    if output.is_file() or (output.is_dir() and any(output.iterdir())):
        raise InputError(f"output={output} is there already; choose a folder that is new or empty")
    return output


def _write_weights(folder: Path, weights: dict[str, Any], rest: dict[str, Any]) -> None:
    import torch
    from safetensors.torch import save_file

    # Each name has a tensor of its own, also where two were one parameter: the file says all that `state_dict` does.
    tensors = {name: tensor.contiguous() for name, tensor in weights.items() if isinstance(tensor, torch.Tensor)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    torch.save({**{k: v for k, v in rest.items() if k not in TRAINING}, "state_dict": weights}, folder / "model.ckpt")


def _copy(source: Path, target: Path, names: tuple[str, ...]) -> None:
    import shutil

    for name in names:
        if (source / name).is_dir():
            shutil.copytree(source / name, target / name)
        elif (source / name).is_file():
            shutil.copy2(source / name, target / name)


def write_transformers(model: pl.LightningModule, folder: Path) -> str:
    """Write `transformers/` into a folder if the model holds one Transformer of a published layout; say what was done.

    Args:
        model: With whole parameters.
        folder: Holds the run's `assets`.
    """
    from ..errors import InputError
    from ..nn.transformer import Transformer
    from ..nn.transformer.weights import to_pretrained

    encoders = {name: module for name, module in model.named_modules() if isinstance(module, Transformer)}
    if len(encoders) != 1:
        return f"no transformers/, since the model holds {len(encoders)} encoders of kexue.nn.transformer"
    [(name, encoder)] = encoders.items()
    try:
        # No layout can say this rate, and it is no part of the weights.
        to_pretrained(encoder, folder / "transformers", feedforward_dropout=0.0)
    except InputError as error:
        return f"no transformers/, since no layout there fits {name}: {error}"
    _copy(folder / "assets", folder / "transformers", ("vocab.txt", "tokenizer.json"))
    return f"{name} for the transformers library in transformers/"
