"""`kexue export`: everything beside the weights, read back without DeepSpeed, and wrong input in one line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from safetensors.torch import load_file

from kexue.cli.export import write_transformers
from kexue.cli.main import main
from kexue.nn.transformer import Transformer, TransformerConfig
from kexue.strategies import load_weights

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

READ = """
import sys
sys.modules["deepspeed"] = None  # importing it fails
import torch
from kexue.lightning_modules.extraction.gplinker import EventGPLinker
model = EventGPLinker.load_from_checkpoint(sys.argv[1] + "/model.ckpt", map_location="cpu")
from safetensors.torch import load_file
expected = load_file(sys.argv[1] + "/model.safetensors")
state = model.state_dict()
assert set(state) == set(expected)
assert all(torch.equal(state[name], expected[name]) for name in state)
assert "deepspeed" not in {name for name, module in sys.modules.items() if module is not None}
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run under ZeRO stage 3, in a process of its own."""
    folder = tmp_path_factory.mktemp("export") / "run"
    words = ["fit", *SMALL, "strategy=zero_3", "technique=[ema]", f"run_dir={folder}"]
    done = subprocess.run([sys.executable, "-m", "kexue.cli", *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (folder / "checkpoints" / "last.ckpt").resolve().is_dir()
    return folder


def test_all_is_there_and_opens_without_deepspeed(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    output = tmp_path / "out"
    assert main(["export", f"run={run}", f"output={output}", "checkpoint=last"]) == 0
    said = capsys.readouterr().out
    assert "weights of step" in said
    assert "no transformers/, since no layout there fits encoder" in said
    assert {path.name for path in output.iterdir()} == {"model.safetensors", "model.ckpt", "config.yaml", "assets"}
    weights, saved = load_file(output / "model.safetensors"), load_weights(run / "checkpoints" / "last.ckpt")
    assert set(weights) == set(saved)
    assert all(torch.equal(weights[name], saved[name]) for name in saved)
    done = subprocess.run([sys.executable, "-c", READ, str(output)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    # Again into the same folder: it is not overwritten.
    assert main(["export", f"run={run}", f"output={output}"]) == 2
    assert "is there already" in capsys.readouterr().err


def test_transformers_opens_its_folder(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 30, "dim": 16, "num_layers": 2, "num_heads": 2, "feedforward_dim": 32, "max_length": 8}
    kinds = {"positions": "learned", "norm": "post", "num_segments": 2, "feedforward_dropout": 0.3}
    torch.manual_seed(0)
    model = pl.LightningModule()
    model.encoder = encoder = Transformer(TransformerConfig(**sizes, **kinds, heads=()))  # type: ignore[arg-type]
    (tmp_path / "assets").mkdir()
    (tmp_path / "assets" / "vocab.txt").write_text("[PAD]\n")
    assert "encoder for the transformers library" in write_transformers(model, tmp_path)
    assert (tmp_path / "transformers" / "vocab.txt").read_text() == "[PAD]\n"
    theirs = transformers.AutoModel.from_pretrained(tmp_path / "transformers").eval()
    ids = torch.randint(30, (2, 7))
    with torch.no_grad():
        found = theirs(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
        assert torch.allclose(found, encoder.eval()(ids), atol=1e-5)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run=nowhere"], "not a run directory"),
        (["checkpoint=missing.ckpt"], "no complete checkpoint"),
        ([], "output=FILE is missing"),
        (["output=FILE"], "is there already"),
    ],
)
def test_wrong_input_ends_with_2_and_one_line(
    words: list[str], message: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    file = tmp_path / "file"
    file.touch()
    words = [word.replace("FILE", str(file)) for word in words]
    if not any(word.startswith("run=") for word in words):
        words.append(f"run={run}")
    if message != "output=FILE is missing" and not any(word.startswith("output=") for word in words):
        words.append(f"output={tmp_path / 'out'}")
    capsys.readouterr()
    assert main(["export", *words]) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("kexue:")]
    assert len(said) == 1
    assert message in said[0]
    assert not (tmp_path / "out").exists()
