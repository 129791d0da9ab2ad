"""The Python examples of the guides run as they stand, one after another."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def test_transformer_guide(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    transformers.BertModel(transformers.BertConfig(vocab_size=30, **sizes)).save_pretrained(tmp_path / "FOLDER")
    guide = (ROOT / "docs" / "transformer.md").read_text(encoding="utf-8")
    examples = re.findall(r"```python\n(.*?)```", guide, re.DOTALL)
    assert len(examples) == 3
    script = tmp_path / "example.py"
    check = "assert (tuple(hidden.shape), len(new)) == ((2, 10, 384), 2)"
    script.write_text("\n".join([*examples, check]), encoding="utf-8")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert transformers.BertModel.from_pretrained(tmp_path / "OUTPUT").config.hidden_size == 16
