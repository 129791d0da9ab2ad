"""`kexue study`: listing, options, tables and files."""

import csv
import json
from pathlib import Path

import pytest

from kexue.cli import main as cli


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["study"]) == 0
    assert "transformer_cost  When is attention the bottleneck of a Transformer?" in capsys.readouterr().out


def test_keys(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["study", "transformer_cost", "keys"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["dim=768", "width", "of", "the", "hidden", "states,", "D."]
    assert all(len(line.split(maxsplit=1)) == 2 for line in lines)


def test_tables(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["study", "transformer_cost"]) == 0
    printed = capsys.readouterr().out
    assert all(f" {length} " in printed for length in ("1,536", "4,608", "64", "1,024"))
    assert "101,282,304 parameters" in printed
    assert "1.11 times faster" in printed


def test_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "new" / "study"
    words = ["dim=64", "num_layers=2", "num_heads=4", "feedforward_dim=256", "lengths=[32,256]", "gated=true"]
    assert cli.main(["study", "transformer_cost", *words, f"output={folder}"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"everything lies in {folder}: findings.json")
    findings = json.loads((folder / "findings.json").read_text(encoding="utf-8"))
    assert findings["options"] == {
        "study": "transformer_cost", "dim": 64, "num_layers": 2, "num_heads": 4, "feedforward_dim": 256, "gated": True,
        "lengths": [32, 256],
    }  # fmt: skip
    for name, records in findings["tables"].items():
        with (folder / f"{name}.csv").open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        assert [list(row) for row in rows] == [list(record) for record in records]
    shares = findings["tables"]["by_length"]
    assert [row["tokens"] for row in shares] == [32, 256]
    assert all(row["feed-forward"] + row["projections"] + row["scores"] == pytest.approx(1) for row in shares)
    pictures = sorted(path.name for path in folder.glob("*.png"))
    assert pictures == [
        "activations_by_length.png", "linear_attention.png", "shares_by_length.png", "speedup_bound.png",
    ]  # fmt: skip
    assert all((folder / name).read_bytes().startswith(b"\x89PNG") for name in pictures)


def test_one_length(tmp_path: Path) -> None:
    assert cli.main(["study", "transformer_cost", "lengths=[512]", f"output={tmp_path}"]) == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["transfomer_cost"], "transfomer_cost: no such study; did you mean transformer_cost?"),
        (["transformer_cost", "dimm=3"], "transformer_cost.dimm: no such key; did you mean transformer_cost.dim?"),
        (["transformer_cost", "dim=wide"], "transformer_cost.dim='wide': expected a whole number"),
        (["transformer_cost", "dim=[1"], "transformer_cost.dim=[1: not a value"),
        (["transformer_cost", "gated=3"], "transformer_cost.gated=3: expected true or false"),
        (["transformer_cost", "lengths=512"], "transformer_cost.lengths=512: expected a list of whole numbers"),
        (["transformer_cost", "lengths=[a]"], "expected a list of whole numbers, such as transformer_cost.lengths="),
        (["transformer_cost", "lengths=[]"], "give one or more lengths of at least 1"),
        (["transformer_cost", "length=0"], "transformer_cost(length=0): use 1 or more"),
        (["transformer_cost", "num_heads=7"], "num_heads must divide dim"),
        (["transformer_cost", "fast"], "give KEY=VALUE words; `kexue study transformer_cost keys` lists them"),
        (["transformer_cost", "output="], "give KEY=VALUE words"),
    ],
)
def test_wrong_input(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["study", *words]) == 2
    line = capsys.readouterr().err
    assert message in line
    assert line.count("\n") == 1
