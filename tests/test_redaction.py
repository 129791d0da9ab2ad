"""Secrets of a config or the environment reach no file that a run writes."""

from __future__ import annotations

from pathlib import Path

import pytest

from kexue.cli import main as cli
from kexue.redaction import HIDDEN, hide, is_secret, secrets_in, without_secrets

VALUE = "5f4dcc3b5aa765d61d83"


@pytest.mark.parametrize(
    ("name", "value", "secret"),
    [
        ("api_key", "abc", True),
        ("WANDB_API_KEY", "abc", True),
        ("apiKey", "abc", True),
        ("password", "abc", True),
        ("db_passwd", "abc", True),
        ("client_secret", "abc", True),
        ("hf_token", "abc", True),
        ("token", "abc", True),
        ("credentials", "abc", True),
        ("some_key", VALUE, True),
        ("pad_token", "[PAD]", False),
        ("eos_token", "</s>", False),
        ("sort_key", "length", False),
        ("monitor_key", "val/argument_precision", False),
        ("max_tokens", 4096, False),
        ("key_size", 64, False),
        ("tokenizer", "character", False),
        ("api_key", None, False),
        ("api_key", "", False),
    ],
)
def test_names_and_values(name: str, value: object, secret: bool) -> None:
    assert is_secret(name, value) is secret


def test_values_of_the_environment_are_hidden_wherever_they_stand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_TOKEN", VALUE)
    monkeypatch.setenv("SHORT_KEY", "true")
    monkeypatch.setenv("KEY_FOLDER", "/home/me/keys")
    assert hide(f"GET /?key={VALUE} true /home/me/keys") == f"GET /?key={HIDDEN} true /home/me/keys"
    config = {"data": {"url": f"https://me:{VALUE}@host"}, "list": [{"password": "x"}, VALUE], "lr": 0.1}
    assert list(secrets_in(config)) == ["data.url", "list.0.password", "list.1"]
    assert without_secrets(config) == {"data": {"url": HIDDEN}, "list": [{"password": HIDDEN}, HIDDEN], "lr": 0.1}
    assert config["lr"] == 0.1
    assert "password" in config["list"][0]  # the original stays


@pytest.mark.parametrize(
    "word", ["++logger.wandb.api_key=abc", f"name={VALUE}", "++data.password=abc", "name=${oc.env:WANDB_API_KEY}"]
)
def test_a_config_with_a_secret_is_refused_before_anything_is_written(
    word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", VALUE)
    assert cli.main(["fit", "debug=fast", f"run_dir={tmp_path / 'run'}", word]) == 2
    line = capsys.readouterr().err
    assert "a secret would be written to config.yaml" in line
    assert VALUE not in line
    assert not (tmp_path / "run").exists()


def test_an_error_that_quotes_a_secret_reaches_neither_log_nor_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError(f"request to https://host?key={VALUE} failed")

    monkeypatch.setenv("WANDB_API_KEY", VALUE)
    monkeypatch.setattr("kexue.cli.session.make_model", fail)
    assert cli.main(["fit", "debug=fast", "trainer.accelerator=cpu", f"run_dir={tmp_path}"]) == 1
    everything = capsys.readouterr().err + "".join(
        path.read_text(errors="replace") for path in tmp_path.rglob("*") if path.is_file()
    )
    assert f"https://host?key={HIDDEN} failed" in (tmp_path / "log.txt").read_text()
    assert VALUE not in everything
