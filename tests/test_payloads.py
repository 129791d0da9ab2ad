"""Pickled code in the place of a file that is read as data: it does not run, and the file is named."""

import pickle
from collections.abc import Callable
from pathlib import Path

import pytest

from kexue.cli import main as cli
from kexue.data.ccks_linking import entity_row
from kexue.data.files import write_rows
from kexue.data.generators.linked_sentences import linked_entities
from kexue.data.knowledge import KnowledgeBase
from kexue.errors import InputError


class Touch:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable, tuple]:
        return self.path.touch, ()


@pytest.fixture
def payload(tmp_path: Path) -> bytes:
    pickled = pickle.dumps(Touch(tmp_path / "ran"))
    pickle.loads(pickled)
    assert (tmp_path / "ran").exists(), "what it would do"
    (tmp_path / "ran").unlink()
    return pickled


def test_in_a_vocabulary(payload: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "vocab.txt"
    file.write_bytes(payload)
    words = ["experiment=ner_cluener", "debug=fast", "data.root=null", f"data.vocab_file={file}", "logger=csv"]
    assert cli.main(["fit", *words, f"run_dir={tmp_path / 'run'}"]) == 2
    assert "vocab.txt" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "ran").exists()


def test_in_a_data_cache(payload: bytes, tmp_path: Path) -> None:
    source, cache = tmp_path / "kb.json", tmp_path / "cache"
    entities = [entity for entity, _ in zip(linked_entities(), range(5), strict=False)]
    write_rows((entity_row(entity) for entity in entities), source)
    KnowledgeBase.cached(source, cache)
    files = [path for path in cache.rglob("*") if path.is_file()]
    assert files
    for path in files:
        path.chmod(0o644)
        path.write_bytes(payload)
    with pytest.raises(InputError, match="delete it, it is made again"):
        KnowledgeBase.cached(source, cache)
    assert not (tmp_path / "ran").exists()
