"""Named entities by the command line: fit with either model, errors beside gold, answers in CLUENER's format."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kexue.cli.main import main

SMALL = [
    "data.root=null",
    "data.num_generated=200",
    "data.max_length=40",
    "data.stride=20",
    "model.dim=32",
    "model.num_heads=2",
    "model.num_layers=1",
    "model.feedforward_dim=64",
    "model.dropout=0.0",
    "model.warmup_steps=0",
    "model.optimizer.lr=1e-2",
    "trainer.max_epochs=6",
    "trainer.accelerator=cpu",
    "trainer.enable_model_summary=false",
    "logger=csv",
]


@pytest.fixture(scope="module", params=["ner_crf", "ner_global_pointer"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param) / "run"
    assert main(["fit", "experiment=ner_cluener", f"model={request.param}", *SMALL, f"run_dir={folder}"]) == 0
    return folder


def test_testing_again_gives_scores_by_type_and_the_errors(run: Path) -> None:
    before = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    assert before["test/f1"] > 0.3
    (run / "predictions" / "test.jsonl").unlink()
    assert main(["test", f"run={run}"]) == 0
    after = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    for key in ("f1", "macro_f1", "f1/company", "recall/name"):
        assert after[f"test/{key}"] == pytest.approx(before[f"test/{key}"])
    counts, *rows = map(json.loads, (run / "predictions" / "test.jsonl").read_text(encoding="utf-8").splitlines())
    assert counts["wrong"] + counts["right"] == 20
    assert set(rows[0]) == {"right", "input", "gold", "predicted"}
    assert [row["right"] for row in rows] == sorted(row["right"] for row in rows)


def test_answers_in_the_order_of_the_inputs(run: Path, tmp_path: Path) -> None:
    source, output = tmp_path / "in.json", tmp_path / "out.json"
    texts = {7: "李伟出任蓝海达科技公司总经理。", "b": "短" * 300, 0: "x"}
    lines = [json.dumps({"id": key, "text": text}, ensure_ascii=False) + "\n" for key, text in texts.items()]
    source.write_text("".join(lines), encoding="utf-8")
    assert main(["predict", f"run={run}", f"input={source}", f"output={output}"]) == 0
    rows = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert [row["id"] for row in rows] == list(texts)
    assert all(set(row) == {"id", "label"} for row in rows)
    assert rows[0]["label"], "nothing found in a sentence like those of the training"
    for row in rows:
        for spans in row["label"].values():
            for surface, places in spans.items():
                assert all(texts[row["id"]][start : end + 1] == surface for start, end in places)


def test_wrong_inputs_end_with_2_and_one_line(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "in.json"
    source.write_text('{"id": 1, "text": "a"}\n{"id": 1, "text": "b"}\n', encoding="utf-8")
    assert main(["predict", f"run={run}", f"input={source}", f"output={tmp_path / 'out.json'}"]) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("kexue:")]
    assert len(said) == 1
    assert "in.json:2: '1' stands in line 1 already" in said[0]
