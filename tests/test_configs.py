"""Every YAML file of `conf` binds to what it configures, and every experiment can be built from it."""

from pathlib import Path

import pytest

import kexue
from kexue.cli import session
from kexue.cli.config import compose_run, plain, validate
from kexue.cli.list import experiments
from kexue.cli.targets import resolve

CONF = Path(kexue.__file__).parent / "conf"
FILES = sorted(path.relative_to(CONF).with_suffix("") for path in CONF.glob("*/*.yaml"))


def override(file: Path) -> str:
    group, name = file.parts
    return f"{group}=[{name}]" if group == "technique" else f"{group}={name}"


@pytest.mark.parametrize("file", FILES, ids=str)
def test_every_file_binds_to_constructors(file: Path) -> None:
    """Keys beside each `_target_` are arguments of that constructor with values of their types, after composition."""
    config = plain(compose_run([override(file)]), "run")
    validate(config)
    if file.parts[0] in ("strategy", "data", "model"):
        assert callable(resolve(config[file.parts[0]]["_target_"], file.parts[0]))
    if file.parts[0] == "technique":
        assert list(config["technique"]) == [file.name]


def test_files_are_found() -> None:
    groups = {file.parts[0] for file in FILES}
    assert groups == {folder.name for folder in CONF.iterdir() if (folder / "__init__.py").exists()}


def test_techniques_keep_the_order_in_which_they_are_given() -> None:
    words = ["lookahead", "activation_checkpointing"]
    for order in (words, words[::-1]):
        assert list(plain(compose_run([f"technique=[{','.join(order)}]"]), "run")["technique"]) == order


@pytest.mark.parametrize("experiment", experiments())
def test_every_experiment_is_described_and_can_be_built(experiment: str, tmp_path: Path) -> None:
    """Without any data: the data module falls back to its built-in source, and decides what the model leaves open."""
    composed = compose_run([f"experiment={experiment}", "debug=fast"])
    if "root" in composed.data:
        composed.data.root = None
        composed.data.num_generated = 40
    config = plain(composed, tmp_path)
    assert experiments()[experiment]
    assert config["name"] == experiment
    validate(config)
    data = session.make_data(config, None)
    model = session.make_model(config, data)
    trainer = session.make_trainer(
        config,
        tmp_path,
        strategy=session.make_strategy(config),
        callbacks=session.make_parts(config, "callbacks"),
        loggers=session.make_parts(config, "logger"),
    )
    model.configure_model()
    assert sum(parameter.numel() for parameter in model.parameters()) > 0
    assert trainer.max_epochs == 1
    assert list(tmp_path.iterdir()) == [], "building writes nothing"
