"""Reading comprehension by the command line: fit, test and predict in the answer formats of the sets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kexue.cli.main import main

COMMON = [
    "data.root=null",
    "data.num_generated=40",
    "data.on_bad_row=raise",
    "model.warmup_steps=0",
    "trainer.max_epochs=1",
    "trainer.accelerator=cpu",
    "trainer.enable_model_summary=false",
    "logger=csv",
]
SMALL = {
    "mrc_dureader_checklist": [
        "model.dim=32",
        "model.num_heads=2",
        "model.num_layers=1",
        "model.feedforward_dim=64",
        "data.batches.max_length=120",
        "trainer.check_val_every_n_epoch=1",
    ],
    "dgcnn_webqa": ["model.dim=16"],
}
CONTEXT = "白云山在广州，主峰海拔382米。" * 20
INPUTS = {
    "mrc_dureader_checklist": {
        "data": [
            {
                "paragraphs": [
                    {"context": CONTEXT, "qas": [{"id": "b", "question": "在哪？"}, {"id": "a", "question": ""}]},
                    {"context": "", "qas": [{"id": "c", "question": "谁？"}]},
                ]
            }
        ]
    },
    "dgcnn_webqa": {
        "b": {"question": "在哪？", "evidences": {"1": {"evidence": CONTEXT}, "2": {"evidence": ""}}},
        "a": {"question": "", "evidences": {"1": {"evidence": "短"}}},
        "c": {"question": "谁？", "evidences": {"1": {"evidence": ""}}},
    },
}


@pytest.mark.parametrize("experiment", SMALL)
def test_from_training_to_answers(experiment: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, source, output = tmp_path / "run", tmp_path / "in.json", tmp_path / "answers" / "out"
    assert main(["fit", f"experiment={experiment}", *COMMON, *SMALL[experiment], f"run_dir={run}"]) == 0
    before = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    assert {"test/loss", "test/exact_match", "test/f1", "test/average"} <= set(before)

    capsys.readouterr()
    assert main(["test", f"run={run}"]) == 0
    printed = capsys.readouterr().out
    assert "exact_match" in printed
    assert "predictions" in printed
    after = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    assert {key: after[key] for key in before if key.startswith("test/")} == pytest.approx(
        {key: before[key] for key in before if key.startswith("test/")}, rel=1e-4
    )
    first, *rows = (run / "predictions" / "test.jsonl").read_text(encoding="utf-8").splitlines()
    counts, errors = json.loads(first), [json.loads(row) for row in rows]
    assert counts["wrong"] + counts["right"] == len(rows) == 4
    assert [row["right"] for row in errors] == [False] * counts["wrong"] + [True] * counts["right"]
    assert all(set(row) == {"right", "input", "gold", "predicted"} and " | " in row["input"] for row in errors)

    source.write_text(json.dumps(INPUTS[experiment], ensure_ascii=False), encoding="utf-8")
    assert main(["predict", f"run={run}", f"input={source}", f"output={output}"]) == 0
    text = output.read_text(encoding="utf-8")
    if experiment == "dgcnn_webqa":
        answers = dict(line.split("\t") for line in text.splitlines())
        none = ""
    else:
        answers, none = json.loads(text), "no answer"
    assert list(answers) == ["b", "a", "c"]
    assert answers["c"] == none
    assert all(answer == none or answer in CONTEXT or answer == "短" for answer in answers.values())

    source.write_bytes(b'{"data": [{"paragraphs": [{"context": "x", "qas": [{"id": "q"}]}]}]}')
    assert main(["predict", f"run={run}", f"input={source}", f"output={output}"]) == 2
    (said,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("kexue:")]
    assert f"{source}: question '{'data' if experiment == 'dgcnn_webqa' else 'q'}': " in said
    assert output.read_text(encoding="utf-8") == text
