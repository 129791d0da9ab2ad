"""Checkpoints: whole or not at all, described, refused with a reason, readable without their processes."""

from __future__ import annotations

import resource
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cells import MODULES, RANK, WORLD, full_weights, loader, make_strategy, train
from ranks import run_ranks

from kexue.errors import InputError
from kexue.strategies import describe, is_complete, load_weights, newest


def save_and_return_weights(base: str, path: str, **options: Any) -> dict[str, np.ndarray]:
    return train(base, epochs=1, save=path, **options)["weights"]


def resume_errors(base: str, paths: list[str]) -> list[str]:
    """Return the messages of resuming runs, which are expected to fail."""
    messages = []
    for path in paths:
        try:
            train(base, epochs=2, resume=path)
            messages.append("no error")
        except InputError as error:
            messages.append(str(error))
    return messages


@pytest.mark.parametrize("base", ["ddp", "zero_2", "zero_3"])
def test_weights_are_read_back_without_the_processes(base: str, tmp_path: Path) -> None:
    path = tmp_path / "checkpoints" / "step=6.ckpt"
    weights = run_ranks(save_and_return_weights, 2, base, str(path), module="shared")[0]
    read = load_weights(path)
    for name, value in weights.items():
        np.testing.assert_array_equal(read[name].numpy(), value)
    described = describe(path)
    assert described["world_size"] == 2
    assert described["step"] == 6
    assert described["parameters"]["embed.weight"] == [50, 16]
    assert newest(path.parent) == path


def test_zero_says_what_it_cannot_go_on_from(tmp_path: Path) -> None:
    expected = {
        "foreign": "Begin anew from its weights",
        "weights": "Begin anew from its weights",
        "two": "2 optimisers, this run has 1",
        "incomplete": "not a complete checkpoint",
    }
    for kind in expected:
        path = tmp_path / kind
        if kind == "incomplete":
            path.mkdir()
            continue
        train("single", epochs=1, save=str(path))
        saved = torch.load(path, weights_only=True)
        if kind == "foreign":
            del saved["kexue"]
        elif kind == "weights":
            del saved["optimizer_states"], saved["lr_schedulers"]
        else:
            saved["optimizer_states"] *= 2
            saved["kexue"]["optimizers"] *= 2
        torch.save(saved, path)
    messages = run_ranks(resume_errors, 1, "zero_2", [str(tmp_path / kind) for kind in expected])[0]
    for message, text in zip(messages, expected.values(), strict=True):
        assert text in message


def test_a_checkpoint_of_another_model_is_named(tmp_path: Path) -> None:
    path = str(tmp_path / "plain.ckpt")
    train("single", epochs=1, save=path)
    with pytest.raises(InputError, match=r"another model: .*bert\.bert\.embeddings"):
        train("single", module="bert", epochs=2, resume=path)
    with pytest.raises(InputError, match="weights have no place"):
        train("single", module="shared", epochs=2, resume=path)


@pytest.mark.parametrize("kind", ["missing", "truncated", "text", "empty", "directory"])
def test_bad_checkpoint_files_are_explained(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.ckpt"
    if kind == "truncated":
        train("single", epochs=1, save=str(path))
        path.write_bytes(path.read_bytes()[:1000])
    elif kind == "text":
        path.write_text("not a checkpoint\n")
    elif kind == "empty":
        path.touch()
    elif kind == "directory":
        path.mkdir()
    with pytest.raises(InputError) as caught:
        load_weights(path) if kind == "directory" else train("single", epochs=2, resume=str(path))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


class Payload:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("owned"),))


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "evil.ckpt"
    torch.save({"state_dict": {}, "payload": Payload()}, path)
    with pytest.raises(InputError, match="could run code"):
        load_weights(path)
    assert not (tmp_path / "owned").exists()


def save_then_fail(base: str, folder: str) -> str:
    """Save one checkpoint, then another with no room for it, on every rank or on the last alone."""
    import pytorch_lightning as pl

    warnings.filterwarnings("ignore")
    model = MODULES["plain"]()
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=WORLD,
        strategy=make_strategy(base, []),
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(model, loader(RANK, WORLD, 24, 4))
    trainer.save_checkpoint(f"{folder}/step=1.ckpt")
    if base == "ddp" or RANK == WORLD - 1:
        # A file size limit stands in for a full disk: the write fails with an OSError after so many bytes.
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))
    try:
        trainer.save_checkpoint(f"{folder}/step=2.ckpt")
        message = "no error"
    except OSError as error:
        message = str(error)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    full_weights(model)
    return message


@pytest.mark.parametrize("base", ["ddp", "zero_2"])
def test_a_full_disk_leaves_the_checkpoint_before_it(base: str, tmp_path: Path) -> None:
    messages = run_ranks(save_then_fail, 2, base, str(tmp_path))
    assert all("could not be written" in message for message in messages), messages
    if base == "zero_2":
        assert all("process 1" in message for message in messages), messages
    assert [path.name for path in tmp_path.iterdir()] == ["step=1.ckpt"]
    assert newest(tmp_path) == tmp_path / "step=1.ckpt"
    assert len(load_weights(tmp_path / "step=1.ckpt")) == len(MODULES["plain"]().state_dict())


def test_saving_over_a_checkpoint_replaces_it(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    for epochs in (1, 2):
        run_ranks(train, 2, "zero_1", epochs=epochs, save=str(path))
        assert describe(path)["step"] == 6 * epochs
    assert [entry.name for entry in tmp_path.iterdir()] == ["last.ckpt"]


def test_incomplete_directories_do_not_count(tmp_path: Path) -> None:
    whole = tmp_path / "step=1.ckpt"
    train("single", epochs=1, save=str(whole))
    (tmp_path / "step=2.ckpt").mkdir()
    (tmp_path / ".step=3.ckpt.partial").write_bytes(b"half")
    assert not is_complete(tmp_path / "step=2.ckpt")
    assert newest(tmp_path) == whole
    with pytest.raises(InputError, match="not a complete checkpoint"):
        describe(tmp_path / "step=2.ckpt")
