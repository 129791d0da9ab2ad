"""The Daguan cup by the command line: pretraining, a tagger for each fold that starts from it, one answer by vote."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import pytest

from kexue.cli.main import main
from kexue.data.daguan import read_daguan, write_daguan
from kexue.data.generators.anonymous_sentences import anonymous_sentences
from kexue.data.records import SpanRecord

SMALL = [
    "data.root=null",
    "data.num_generated=100",
    "model.dim=32",
    "model.num_heads=2",
    "model.num_layers=1",
    "model.feedforward_dim=64",
    "model.dropout=0.0",
    "model.warmup_steps=0",
    "model.optimizer.lr=1e-2",
    "trainer.accelerator=cpu",
    "trainer.enable_model_summary=false",
    "logger=csv",
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("daguan")
    before = folder / "before"
    words = ["fit", "experiment=daguan_2019_pretraining", "trainer.max_epochs=2"]
    assert main([*words, *SMALL, f"run_dir={before}"]) == 0
    words = [
        "fit",
        "experiment=daguan_2019",
        "technique=[start_from,lookahead]",
        f"technique.start_from.run={before}",
        f"data.vocab_file={before}/assets/vocab.txt",
        "data.num_folds=2",
        "trainer.max_epochs=5",
        *SMALL,
    ]
    for fold in range(2):
        assert main([*words, f"data.fold={fold}", f"run_dir={folder / f'fold_{fold}'}"]) == 0
    before.rename(folder / "gone")  # to predict, the first run is not needed any more
    return [folder / f"fold_{fold}" for fold in range(2)]


def test_several_runs_give_one_answer_in_the_format_of_the_contest(runs: list[Path], tmp_path: Path) -> None:
    gold = list(islice(anonymous_sentences(5), 12))
    source = tmp_path / "in.txt"
    source.write_text("".join(f"{record.text}\n" for record in gold), encoding="utf-8")
    found = {}
    joined = ",".join(map(str, runs))
    for name, run in {"one": runs[0], "same": f"{runs[0]},{runs[0]}", "both": joined}.items():
        assert main(["predict", f"run={run}", f"input={source}", f"output={tmp_path / name}"]) == 0
        found[name] = list(read_daguan(tmp_path / name, "abc"))
        assert [record.text for record in found[name]] == [record.text for record in gold]
    assert found["same"] == found["one"]
    assert any(record.spans for record in found["both"])
    assert write_daguan(found["both"], tmp_path / "again") == 12
    assert (tmp_path / "again").read_text("utf-8") == (tmp_path / "both").read_text("utf-8")


def test_figures_by_type_and_errors_beside_gold(runs: list[Path]) -> None:
    metrics = json.loads((runs[0] / "metrics.json").read_text(encoding="utf-8"))
    assert {"test/f1", "test/f1/a", "test/recall/b", "test/macro_f1"} <= set(metrics)
    lines = (runs[0] / "predictions" / "test.jsonl").read_text(encoding="utf-8").splitlines()
    counts = json.loads(lines[0])
    assert counts["right"] + counts["wrong"] == 10


def test_a_run_that_is_not_there_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str], runs: list[Path]) -> None:
    source = tmp_path / "in.txt"
    write_daguan([SpanRecord(0, "1_2")], source)
    wrong = f"{runs[0]},{tmp_path / 'nowhere'}"
    assert main(["predict", f"run={wrong}", f"input={source}", f"output={tmp_path / 'out'}"]) == 2
    assert "nowhere" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
