"""Relations by the command line: fit, test by predicate, errors beside what is right, answers in DuIE's format."""

import json
from pathlib import Path

import pytest

from kexue.cli.main import main
from kexue.data.generators.relation_sentences import SCHEMA

SMALL = [
    "experiment=relation_extraction_duie",
    "data.root=null",
    "data.num_generated=60",
    "data.max_length=60",
    "data.stride=30",
    "model.dim=32",
    "model.num_heads=2",
    "model.num_layers=1",
    "model.feedforward_dim=64",
    "model.warmup_steps=0",
    "trainer.max_epochs=1",
    "trainer.check_val_every_n_epoch=1",
    "trainer.accelerator=cpu",
    "trainer.enable_model_summary=false",
    "logger=csv",
]


@pytest.mark.parametrize("model", ["gplinker_relation", "lic2020_relation"])
def test_from_training_to_answers(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert main(["fit", *SMALL, f"model={model}", f"run_dir={run}"]) == 0
    assert main(["test", f"run={run}"]) == 0
    metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    by_predicate = {key.split("/")[2] for key in metrics if key.startswith("test/f1/")}
    assert by_predicate
    assert by_predicate <= set(SCHEMA)
    assert all(f"recall/{predicate}" in capsys.readouterr().out for predicate in sorted(by_predicate)[:1])
    counts, *rows = [json.loads(line) for line in (run / "predictions" / "test.jsonl").read_text("utf-8").splitlines()]
    assert counts["wrong"] + counts["right"] == 6
    assert any(row["gold"] for row in rows)

    source, output = tmp_path / "in.json", tmp_path / "out.json"
    texts = ["李青在《青衣》中饰演青衣。", "长" * 200 + "短", "李青在《青衣》中饰演青衣。", "x"]
    source.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts), "utf-8")
    assert main(["predict", f"run={run}", f"input={source}", f"output={output}"]) == 0
    answers = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert [answer["text"] for answer in answers] == texts
    for answer in answers:
        assert set(answer) == {"text", "spo_list"}
        for relation in answer["spo_list"]:
            assert set(relation) == {"predicate", "subject", "subject_type", "object", "object_type"}
            assert relation["object"].keys() == relation["object_type"].keys()
            assert all(span in answer["text"] for span in (relation["subject"], *relation["object"].values()))

    source.write_text('{"text": ""}\n', "utf-8")
    assert main(["predict", f"run={run}", f"input={source}", f"output={tmp_path / 'other.json'}"]) == 2
    assert "in.json:1: 'text' is empty" in capsys.readouterr().err
