"""The command line from outside: exit codes, one line for wrong input, and a run from fit to test."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from kexue.cli import main as cli
from kexue.errors import InputError

FAST = ["debug=fast", "trainer.enable_model_summary=false", "trainer.accelerator=cpu"]


@pytest.fixture(autouse=True)
def _folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "run"
    assert cli.main(["fit", *FAST, f"run_dir={folder}"]) == 0
    return folder


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    line = capsys.readouterr().err
    assert line.startswith("kexue: ")
    assert line.count("\n") == 1
    return line


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == cli.main(["--help"]) == cli.main(["--version"]) == 0
    printed = capsys.readouterr().out
    assert all(f"\n  {command} " in printed for command in cli.COMMANDS)
    for command in cli.COMMANDS:
        assert cli.main([command, "--help"]) == 0
        assert f"usage: kexue {command}" in capsys.readouterr().out


@pytest.mark.parametrize("words", ["--help", "list"])
def test_a_reader_that_leaves_is_no_bug(words: str) -> None:
    command = f"{sys.executable} -m kexue.cli {words} | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", f"sleep 0.2; {command}"], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("141\n", "")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["fitt"], "fitt: no such command; did you mean fit?"),
        (["list", "all"], "list takes no arguments"),
        (["fit", "trainer.max_epoch=3"], "trainer.max_epoch: no such key; did you mean trainer.max_epochs?"),
        (["fit", "experiment=nothing"], "experiment=nothing: no such experiment; kexue list shows them"),
        (["fit", "resume=gone.ckpt"], "resume=gone.ckpt: no complete checkpoint there"),
        (["fit", "experiment=gplinker_event", "data.root=/nowhere"], "data.root=/nowhere: no such folder"),
        (["fit", "debug=fast", "trainer.accelerator=abacus"], "trainer: "),
        (["fit", "debug=fast", "trainer.devices=2", "strategy=single"], "SingleDevice runs on one device"),
        (["test"], "run=FOLDER is missing; see --help"),
        (["test", "run=nowhere"], "run=nowhere: no config.yaml there, so it is not a run directory"),
        (["predict", "run=nowhere", "input=a.json"], "output=FILE is missing"),
    ],
)
def test_wrong_input_is_one_line_and_exit_2(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words) == 2
    captured = capsys.readouterr().err
    assert message in captured
    assert captured.splitlines()[-1].startswith("kexue: ")
    assert "Traceback" not in captured


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InputError("a row is wrong"), 2),
        (FileNotFoundError(2, "No such file or directory", "data.json"), 2),
        (OSError(28, "No space left on device", "x.ckpt"), 2),
        (KeyError("a bug"), 1),
        (FileNotFoundError("without a name: a bug"), 1),
        (KeyboardInterrupt(), 130),
    ],
)
def test_exit_codes(
    error: BaseException, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(args: list[str]) -> int:
        raise error

    monkeypatch.setattr("kexue.cli.list.run", fail)
    assert cli.main(["list"]) == code
    assert ("Traceback" in capsys.readouterr().err) is (code == 1)


def test_interrupted_training_is_130_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning catches Ctrl-C and leaves with 1."""

    def leave(args: list[str]) -> int:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            raise SystemExit(1)  # noqa: B904

    monkeypatch.setattr("kexue.cli.list.run", leave)
    assert cli.main(["list"]) == 130


def test_another_rank_is_silent_but_leaves_its_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("KEXUE_RUN_DIR", str(tmp_path))
    assert cli.main(["list", "all"]) == 2
    assert capsys.readouterr().err == ""
    assert [path.read_text() for path in tmp_path.iterdir()] == ["kexue list all: list takes no arguments"]


def test_fit_writes_the_run_directory(trained: Path) -> None:
    names = {path.name for path in trained.iterdir()}
    assert {"config.yaml", "metrics.csv", "metrics.json", "checkpoints", "plots", "log.txt", "assets"} <= names
    metrics = json.loads((trained / "metrics.json").read_text())
    assert {"train/loss", "val/digit_accuracy", "test/loss", "test/digit_accuracy"} <= set(metrics)
    assert all(isinstance(value, float) for value in metrics.values())
    log = (trained / "log.txt").read_text()
    assert "kexue.fit: digits_multitask in" in log
    assert "`max_epochs=1` reached" in log


def test_testing_again_gives_the_same_numbers_also_after_a_move(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = json.loads((trained / "metrics.json").read_text())
    moved = tmp_path / "moved"
    shutil.copytree(trained, moved, symlinks=True)
    (moved / "metrics.json").unlink()
    (moved / "plots" / "confusion_matrix.png").unlink()
    assert cli.main(["test", f"run={moved}"]) == 0
    after = json.loads((moved / "metrics.json").read_text())
    assert after == {key: value for key, value in before.items() if key.startswith("test/")}
    assert (moved / "plots" / "confusion_matrix.png").is_file()
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"everything lies in {moved}: config.yaml, ")


def test_resume(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    shutil.copytree(trained, folder, symlinks=True)
    words = ["fit", *FAST, f"run_dir={folder}"]
    assert cli.main(words) == 0
    assert "the run was finished: step 3; train on with a greater trainer.max_epochs" in capsys.readouterr().err
    assert cli.main([*words, "trainer.max_epochs=2"]) == 0
    assert (folder / "checkpoints" / "last.ckpt").resolve().name == "step=00000006.ckpt"
    branch = tmp_path / "branch"
    assert cli.main(["fit", *FAST, f"run_dir={branch}", f"resume={trained}/checkpoints/last.ckpt"]) == 0
    assert {"config.yaml", "assets", "metrics.json"} <= {path.name for path in branch.iterdir()}
    capsys.readouterr()
    assert cli.main([*words, "resume=null"]) == 2
    assert "continue it with resume=auto" in one_line(capsys)


def test_a_checkpoint_of_another_model(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    shutil.copytree(trained, folder, symlinks=True)
    config = (folder / "config.yaml").read_text()
    for words in (
        ["fit", *FAST, f"run_dir={folder}", "model.channels=32"],
        ["test", f"run={folder}", "model.channels=32"],
    ):
        assert cli.main(words) == 2
        assert "is a checkpoint of another model: " in capsys.readouterr().err.splitlines()[-1]
    assert (folder / "config.yaml").read_text() == config, "the run that is there stays usable"


def test_a_checkpoint_with_code_inside_is_not_run(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Touch:
        def __reduce__(self) -> tuple[Callable, tuple]:
            return (tmp_path / "pwned").touch, ()

    path = tmp_path / "bad.ckpt"
    torch.save({"state_dict": Touch()}, path)
    assert cli.main(["test", f"run={trained}", f"checkpoint={path}"]) == 2
    assert "bad.ckpt" in capsys.readouterr().err
    assert not (tmp_path / "pwned").exists()


def test_without_a_progress_bar(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["fit", *FAST, f"run_dir={tmp_path}", "trainer.enable_progress_bar=false", "logger=csv"]) == 0
    assert "epoch 1/" not in capsys.readouterr().out


def test_a_traceback_reaches_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("a bug in building")

    monkeypatch.setattr("kexue.cli.session.make_model", fail)
    assert cli.main(["fit", *FAST, f"run_dir={tmp_path}"]) == 1
    assert "RuntimeError: a bug in building" in capsys.readouterr().err
    assert "RuntimeError: a bug in building" in (tmp_path / "log.txt").read_text()
