"""Run directories: their names, what a run continues from, and files that appear whole."""

import json
import os
from pathlib import Path

import pytest
import torch

from kexue.cli.ranks import inherited_run_dir, is_main_process, leave_message, shared_run_dir, take_message
from kexue.cli.run_dir import Place, open_run, saved_checkpoint, write_config, write_metrics
from kexue.errors import InputError


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith(("SLURM_", "KEXUE_RUN")) or "RANK" in name]:
        monkeypatch.delenv(name)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.chdir(tmp_path)


def checkpoint(folder: Path, step: int) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step={step:08d}.ckpt"
    torch.save({"state_dict": {}}, path)
    return path


def test_the_clock_names_a_new_folder_each_time(tmp_path: Path) -> None:
    first, second = open_run(None, "mine", "auto"), open_run(None, "mine", "auto")
    assert first.folder.parent == tmp_path / "runs" / "mine"
    assert first.folder.is_dir()
    assert first.folder != second.folder
    assert first.checkpoint is None


def test_a_job_comes_back_to_its_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    assert open_run(None, "mine", "auto").folder == open_run(None, "mine", "auto").folder == tmp_path / "runs/mine/17"
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "16")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    assert open_run(None, "mine", "auto").folder.name == "16_3"
    monkeypatch.setenv("SLURM_JOB_NAME", "bash")
    assert open_run(None, "mine", "auto").folder.name not in ("17", "16_3")


def test_other_ranks_use_the_folder_of_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with shared_run_dir(tmp_path / "shared"):
        assert inherited_run_dir() is None
        monkeypatch.setenv("LOCAL_RANK", "1")
        assert not is_main_process()
        assert open_run(None, "mine", None).folder == tmp_path / "shared"
    assert "KEXUE_RUN_DIR" not in os.environ


def test_ranks_started_from_outside_must_be_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(InputError, match="type run_dir=PATH"):
        open_run(None, "mine", "auto")


def test_resume(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert open_run(str(folder), "mine", "auto") == Place(folder)
    write_config(folder, {"name": "mine"})
    with pytest.raises(InputError, match="continue it with resume=auto or choose another run_dir"):
        open_run(str(folder), "mine", None)
    assert open_run(str(folder), "mine", "auto").checkpoint is None
    old, new = checkpoint(folder / "checkpoints", 10), checkpoint(folder / "checkpoints", 20)
    os.utime(old, (1, 1))
    (folder / "checkpoints" / ".step=00000030.ckpt.partial").write_bytes(b"cut short")
    (folder / "assets").mkdir()
    assert open_run(str(folder), "mine", "auto") == Place(folder, new, folder / "assets")
    assert open_run(str(tmp_path / "other"), "mine", str(old)) == Place(tmp_path / "other", old, folder / "assets")
    with pytest.raises(InputError, match=r"resume=gone\.ckpt: no complete checkpoint there"):
        open_run(str(folder), "mine", "gone.ckpt")


def test_a_file_is_no_run_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file; give a folder"):
        open_run(str(tmp_path / "file"), "mine", "auto")


def test_checkpoints_of_a_saved_run(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="checkpoint=best: no complete checkpoint there"):
        saved_checkpoint(tmp_path, "best")
    old, new = checkpoint(tmp_path / "checkpoints", 10), checkpoint(tmp_path / "checkpoints", 20)
    os.utime(old, (1, 1))
    assert saved_checkpoint(tmp_path, "best") == new
    (tmp_path / "checkpoints" / "best.ckpt").symlink_to(old.name)
    assert saved_checkpoint(tmp_path, "best") == old
    assert saved_checkpoint(tmp_path, "last") == new
    assert saved_checkpoint(tmp_path, str(old)) == old


def test_metrics_are_merged_sorted_and_valid_json(tmp_path: Path) -> None:
    write_metrics(tmp_path, {"val/loss": 1.0, "train/loss": float("nan")})
    assert write_metrics(tmp_path, {"test/loss": 2, "val/loss": 0.5}) == {
        "test/loss": 2.0,
        "train/loss": None,
        "val/loss": 0.5,
    }
    assert list(json.loads((tmp_path / "metrics.json").read_text())) == ["test/loss", "train/loss", "val/loss"]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.json"]


def test_a_message_is_handed_over_once(tmp_path: Path) -> None:
    with shared_run_dir(tmp_path):
        leave_message("row 7 is wrong")
        assert take_message(os.getpid()) == "row 7 is wrong"
        assert take_message(os.getpid()) is None
    assert list(tmp_path.iterdir()) == []
