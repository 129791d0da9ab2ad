"""Overrides: what composes, and the one line for what does not."""

from pathlib import Path

import pytest
import yaml

from kexue.cli.config import compose_run, load_run, plain, validate
from kexue.errors import InputError


def checked(words: list[str]) -> dict:
    config = plain(compose_run(words), "run")
    validate(config)
    return config


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("trainer.max_epoch=3", "trainer.max_epoch: no such key; did you mean trainer.max_epochs?"),
        ("max_epochs=3", "max_epochs: no such key; did you mean trainer.max_epochs?"),
        ("strategyy=ddp", "strategyy: no such key; did you mean strategy?"),
        ("~callbacks.memori", "callbacks.memori: no such key; did you mean callbacks.memory?"),
        (
            "experiment=digit_multitask",
            "experiment=digit_multitask: no such experiment; did you mean digits_multitask?",
        ),
        ("strategy=zero", "strategy=zero: no such strategy; did you mean zero_3?"),
        ("technique=[look_ahead]", "technique=look_ahead: no such technique; did you mean lookahead?"),
        ("trainer.max_epochs", "trainer.max_epochs: not a KEY=VALUE word (missing EQUAL at '<EOF>')"),
        ("name=a,b", "name=a,b: several values; write KEY=[A,B] for a list"),
        ("trainer.callbacks=[1,", "trainer.callbacks=[1,: not a KEY=VALUE word"),
        ("--devices=2", "--devices=2: no such option; kexue takes KEY=VALUE words"),
        ("trainer.max_epochs=many", "trainer.max_epochs='many': expected a whole number or null"),
        ("trainer.precision=31", "trainer.precision=31: expected"),
        ("+trainer.logger=false", "trainer.logger: kexue sets this itself; remove the key"),
        ("+model.chanels=8", "model.chanels: no such key; did you mean model.channels?"),
        ("model.optimizer.lr=fast", "model.optimizer.lr='fast': expected a number"),
        ("+model.optimizer.decay=1", "model.optimizer.decay: no such key"),
        ("strategy=5", "strategy=5: no such strategy; choose from: auto, ddp"),
        ("callbacks.memory._target_=os.system", "callbacks.memory._target_: os.system is outside kexue"),
        ("mode=largest", "mode='largest': not a value for mode"),
        ("seed=soon", "seed='soon': not a value for seed"),
        ("monitor=${nothing.there}", "monitor: Interpolation key 'nothing.there' not found"),
        ("name=${oc.env:SOME_API_KEY}", "a secret would be written to config.yaml"),
        ("name=${oc.env:my_token,none}", "a secret would be written to config.yaml"),
        ("+logger.wandb.notes=x-${oc.env:DB_PASSWORD}-y", "a secret would be written to config.yaml"),
    ],
)
def test_wrong_words_are_explained(word: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", "hidden")
    monkeypatch.setenv("DB_PASSWORD", "hidden")
    with pytest.raises(InputError) as caught:
        checked([word])
    assert message in str(caught.value)
    assert "hidden" not in str(caught.value)


def test_other_words_do_not_hide_the_wrong_one() -> None:
    with pytest.raises(InputError, match=r"model\.head_sizes: no such key; did you mean model\.head_size\?"):
        checked(["experiment=gplinker_event", "trainer.devices=2", "model.head_sizes=3"])


def test_debug_wins_over_the_experiment() -> None:
    config = checked(["debug=fast"])
    assert config["trainer"]["max_epochs"] == 1
    assert config["name"] == "digits_multitask"
    assert list(config["logger"]) == ["csv"]


def test_environment_without_secrets_is_welcome(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEXUE_NAME_IN_TEST", "mine")
    assert checked(["name=${oc.env:KEXUE_NAME_IN_TEST}"])["name"] == "mine"


def test_experiments_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\n# Mine\nname: mine\n", encoding="utf-8")
    assert checked([f"hydra.searchpath=[{tmp_path}]", "experiment=mine"])["name"] == "mine"


def test_a_run_is_read_back_and_may_have_been_moved(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    new.mkdir()
    config = plain(compose_run(["debug=fast"]), old)
    (new / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    back = plain(load_run(new, ["data.batch_size=5", "trainer.devices=1"]), new)
    validate(back)
    assert back["data"]["batch_size"] == 5
    assert back["callbacks"]["checkpoints"]["folder"] == str(new / "checkpoints")
    assert str(old) not in str(back)
    with pytest.raises(InputError, match=r"data\.batch_sise: no such key; did you mean data\.batch_size\?"):
        load_run(new, ["data.batch_sise=5"])


def test_a_run_that_names_a_foreign_class_is_refused(tmp_path: Path) -> None:
    config = plain(compose_run([]), tmp_path)
    config["data"] = {"_target_": "os.system", "command": "touch pwned"}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    with pytest.raises(InputError, match=r"data\._target_: os\.system is outside"):
        validate(plain(load_run(tmp_path, []), tmp_path))
