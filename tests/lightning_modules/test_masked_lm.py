"""The masked language model: its loss is the formula, it learns, its masks hang on seed, epoch and row alone."""

import functools
import inspect
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import yaml
from ner_models import trainer
from torch.nn import functional as F

from kexue.data.daguan_2019 import DaguanCorpusDataModule, DaguanDataModule
from kexue.errors import InputError
from kexue.lightning_modules.extraction import DaguanIE
from kexue.lightning_modules.pretraining import MaskedLM
from kexue.strategies import SingleDevice, StartFrom

CONF = Path(__file__).parents[2] / "conf"
TINY: dict[str, Any] = {"dim": 32, "num_layers": 1, "num_heads": 2, "feedforward_dim": 64, "dropout": 0.0}


def corpus(rows: int = 40, batch_size: int = 20, **options: Any) -> DaguanCorpusDataModule:
    module = DaguanCorpusDataModule(batch_size, num_generated=rows, **options)
    module.setup("fit")
    return module


def language_model(source: DaguanCorpusDataModule, **options: Any) -> MaskedLM:
    pl.seed_everything(0, verbose=False)
    optimizer = functools.partial(torch.optim.AdamW, lr=5e-3)
    return MaskedLM(**source.model_arguments(), **{**TINY, **options}, optimizer=optimizer)


def test_masks_hang_on_seed_epoch_and_row_alone() -> None:
    source = corpus()
    module = language_model(source, run_shares=[0.5, 0.5])
    records = list(source.records("train"))[:8]
    together, apart = source.collator()(records), [source.collator()([record]) for record in records]
    seen, targets = module.masked(together, 3)
    for row, single in enumerate(apart):
        length = single["ids"].shape[1]
        alone = module.masked(single, 3)
        assert torch.equal(seen[row, :length], alone[0][0])
        assert torch.equal(targets[row, :length], alone[1][0])
        assert not targets[row, length:].any()
    assert not torch.equal(seen, module.masked(together, 4)[0])
    assert not torch.equal(seen, language_model(source, run_shares=[0.5, 0.5], seed=1).masked(together, 3)[0])
    assert torch.equal(seen[~targets], together["ids"][~targets])


@pytest.mark.parametrize("options", [{}, {"row_budget": 128}], ids=["padded", "packed"])
def test_the_loss_is_the_formula(options: dict[str, Any]) -> None:
    source = corpus(**options)
    module = language_model(source)
    module.configure_model()
    batch = next(iter(source.train_dataloader()))
    seen, targets = module.masked(batch, 1)
    logits = module(seen, batch["mask"])
    expected = F.cross_entropy(logits[targets], batch["ids"][targets])
    torch.testing.assert_close(module._step(batch, 1)[0], expected, rtol=1e-4, atol=1e-5)
    assert ("starts" in batch) == bool(options)


def test_it_learns_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    source = corpus(60)
    whole = language_model(source, dropout=0.1)
    runner = trainer(tmp_path, max_epochs=12, strategy=SingleDevice())
    runner.fit(whole, datamodule=source)
    untrained = trainer(tmp_path, max_epochs=1).validate(language_model(source), datamodule=source, verbose=False)
    assert runner.callback_metrics["val/loss"] < untrained[0]["val/loss"] - 0.3
    half = trainer(tmp_path, max_epochs=6, strategy=SingleDevice())
    half.fit(language_model(source, dropout=0.1), datamodule=source)
    half.save_checkpoint(tmp_path / "half.ckpt")
    rest = language_model(source, dropout=0.1)
    again = trainer(tmp_path, max_epochs=12, strategy=SingleDevice())
    again.fit(rest, datamodule=source, ckpt_path=tmp_path / "half.ckpt")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), rest.parameters(), strict=True))
    assert MaskedLM.load_from_checkpoint(tmp_path / "half.ckpt").masking == whole.masking


def test_a_tagger_starts_from_it(tmp_path: Path) -> None:
    source = corpus()
    source.save_assets(tmp_path)
    runner = trainer(tmp_path, max_epochs=1)
    before = language_model(source)
    runner.fit(before, datamodule=source)
    runner.save_checkpoint(tmp_path / "pre.ckpt")
    learnt = {name: tensor.clone() for name, tensor in before.encoder.state_dict().items()}
    rows = DaguanDataModule(10, num_generated=20, vocab_file=str(tmp_path / "vocab.txt"), dictionary=True)
    rows.setup("fit")

    def start(path: Path = tmp_path / "pre.ckpt", resume: Path | None = None, **options: Any) -> DaguanIE:
        chosen = {"new": ["encoder.embedding.segments.*"], **options}
        # With a rate of next to nothing, what is there after a step is what was there before it.
        module = DaguanIE(
            **rows.model_arguments(), **TINY, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1e-30)
        )
        strategy = SingleDevice(techniques=[StartFrom(str(path), **chosen)])
        begun = trainer(tmp_path, max_epochs=1 if resume is None else 2, strategy=strategy, limit_val_batches=0)
        begun.fit(module, datamodule=rows, ckpt_path=resume)
        begun.save_checkpoint(tmp_path / "tagger.ckpt")
        return module

    module = start()
    for name, tensor in module.encoder.state_dict().items():
        assert name.startswith("embedding.segments") or torch.equal(tensor, learnt[name])
    start(tmp_path / "gone.ckpt", resume=tmp_path / "tagger.ckpt")  # the first run is not needed any more
    with pytest.raises(InputError, match=r"weights of the model are not in it.*embedding\.segments"):
        start(new=[])
    with pytest.raises(InputError, match=r"no weights of these names; name parts such as 'encoder"):
        start(parts=["bert.*"])
    with pytest.raises(InputError, match=r"StartFrom\(run='.*gone\.ckpt'\): no complete checkpoint there"):
        start(tmp_path / "gone.ckpt")
    with pytest.raises(InputError, match=r"technique\.start_from\.run=runs/NAME/JOB"):
        StartFrom()
    rows = DaguanDataModule(10, num_generated=20, dictionary=True, min_count=1)
    rows.setup("fit")
    with pytest.raises(InputError, match=r"another vocabulary; use data\.vocab_file=RUN/assets/vocab\.txt"):
        start()


def test_config_binds_to_the_constructor() -> None:
    config = yaml.safe_load((CONF / "model" / "masked_lm.yaml").read_text(encoding="utf-8"))
    assert config.pop("_target_") == f"{MaskedLM.__module__}.{MaskedLM.__name__}"
    assert set(config) <= set(inspect.signature(MaskedLM).parameters)
    with pytest.raises(InputError, match=r"MaskedLM\(schedule='cosine'\)"):
        MaskedLM(10, 4, [0, 4], schedule="cosine")  # type: ignore[arg-type]
