"""From training to answers by the command line: fit, test, predict, and inputs that are wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kexue.cli.main import main
from kexue.data.generators.event_sentences import SCHEMA

SMALL = [
    "experiment=gplinker_event",
    "data.root=null",
    "data.num_generated=40",
    "model.dim=32",
    "model.num_heads=2",
    "model.num_layers=1",
    "model.feedforward_dim=64",
    "model.warmup_steps=0",
    "trainer.max_epochs=1",
    "trainer.accelerator=cpu",
    "trainer.enable_model_summary=false",
    "logger=csv",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("events") / "run"
    assert main(["fit", *SMALL, f"run_dir={folder}"]) == 0
    return folder


def test_the_run_directory_is_complete(run: Path) -> None:
    metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    assert {"test/loss", "test/event_f1", "test/argument_f1", "test/type_f1"} <= set(metrics)
    for name in ("config.yaml", "metrics.csv", "log.txt", "checkpoints/last.ckpt", "assets/vocab.txt"):
        assert (run / name).exists(), name


def test_testing_again_gives_the_same_figures(run: Path) -> None:
    before = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    assert main(["test", f"run={run}"]) == 0
    after = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    assert after["test/loss"] == pytest.approx(before["test/loss"], rel=1e-5)


def test_predict_writes_the_answer_format_in_the_order_of_the_inputs(run: Path, tmp_path: Path) -> None:
    source, output = tmp_path / "in.json", tmp_path / "answers" / "out.json"
    texts = {"b": "昨天，小王加入了公司。", "a": "短" * 700, "c": "x"}
    source.write_text(
        "".join(json.dumps({"id": key, "text": text}, ensure_ascii=False) + "\n" for key, text in texts.items()),
        encoding="utf-8",
    )
    assert main(["predict", f"run={run}", f"input={source}", f"output={output}"]) == 0
    rows = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert [row["id"] for row in rows] == list(texts)
    for row in rows:
        assert set(row) == {"id", "event_list"}
        for event in row["event_list"]:
            assert event["event_type"] in SCHEMA
            assert all(argument["argument"] in texts[row["id"]] for argument in event["arguments"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"id": "1", "text": "a"}\n{"id": "2", "te', r":2: "),
        (b"", "no rows"),
        ('{"id": "1", "text": "caf\u00e9"}\n'.encode("latin-1"), "UTF-8"),
        (b'{"id": "1"}\n', r":1: .*text"),
        (None, "directory|folder"),
    ],
    ids=["truncated", "empty", "latin-1", "no text", "directory"],
)
def test_wrong_inputs_end_with_2_and_one_line(
    run: Path, tmp_path: Path, content: bytes | None, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    import re

    source = tmp_path / "in.json"
    if content is None:
        source.mkdir()
    else:
        source.write_bytes(content)
    assert main(["predict", f"run={run}", f"input={source}", f"output={tmp_path / 'out.json'}"]) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("kexue:")]
    assert len(said) == 1
    assert re.search(message, said[0]), said[0]
    assert not (tmp_path / "out.json").exists()
