"""Entity linking by the command line: fit, test with its table of errors, and answers in CCKS 2019's format."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kexue.cli.main import main
from kexue.data.generators.linked_sentences import linked_entities, linked_sentences

SMALL = [
    "experiment=entity_linking",
    "data.root=null",
    "data.num_generated=200",
    "data.batch_size=16",
    "model.dim=32",
    "trainer.max_epochs=3",
    "model.optimizer.lr=0.005",
    "trainer.accelerator=cpu",
    "trainer.enable_model_summary=false",
    "logger=csv",
]


def test_from_training_to_answers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, source, output = tmp_path / "run", tmp_path / "in.json", tmp_path / "out.json"
    assert main(["fit", *SMALL, f"run_dir={run}"]) == 0
    assert {"vocab.txt", "lexicon.json", "knowledge.safetensors"} <= {path.name for path in (run / "assets").iterdir()}
    before = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    assert before["test/mention_f1"] > 0.8
    capsys.readouterr()
    assert main(["test", f"run={run}"]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in ("f1", "precision", "recall", "mention_recall", "f1/人物", "recall/作品"))
    after = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    assert after["test/f1"] == before["test/f1"]

    counts, *rows = map(json.loads, (run / "predictions" / "test.jsonl").read_text(encoding="utf-8").splitlines())
    assert counts["wrong"] + counts["right"] == len(rows) == 20
    assert [row["right"] for row in rows] == sorted(row["right"] for row in rows)
    assert any(" (1" in row["gold"] for row in rows)
    assert not any("NIL" in row["gold"] for row in rows)

    texts = {
        "b": "《没有这部》",
        "a": "比赛" * 700,
        **{row.id: row.text for row, _ in zip(linked_sentences(9), range(20), strict=False)},
    }
    lines = [json.dumps({"text_id": key, "text": text}, ensure_ascii=False) for key, text in texts.items()]
    source.write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert main(["predict", f"run={run}", f"input={source}", f"output={output}"]) == 0
    answers = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert {row["text_id"]: row["text"] for row in answers} == texts
    assert [row["text_id"] for row in answers] == list(texts)
    ids = {entity.id for entity in linked_entities()}
    found = [(row["text"], mention) for row in answers for mention in row["mention_data"]]
    assert found
    for text, mention in found:
        assert set(mention) == {"kb_id", "mention", "offset"}
        assert mention["kb_id"] in ids
        assert text.startswith(mention["mention"], int(mention["offset"]))

    source.write_text('{"text_id": "1"}\n', encoding="utf-8")
    output.unlink()
    assert main(["predict", f"run={run}", f"input={source}", f"output={output}"]) == 2
    assert not output.exists()
