"""`_target_`: what may be named, what is checked before anything is built, and what comes of it."""

from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from kexue.cli.targets import build, check, fits, resolve
from kexue.errors import InputError
from kexue.strategies import Lookahead


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "builtins.eval",
        "subprocess.Popen",
        "torch.load",
        "torchvision.ops.nms",
        "kexuex.strategies.Zero",
        "kexue.cli.main.sys.exit",  # allowed by its name, belongs to another module
        "kexue.cli.errors.re.compile",
        "kexue.cli.run_dir.os.system",
        "kexue.cli.run_dir.Path.unlink",
        "kexue.errors.__builtins__",
        "kexue.errors.InputError.__init__.__globals__",
        "torch.nn.modules.module.torch.load",
        "pytorch_lightning.callbacks.early_stopping.torch.load",
        "functools.partial",
    ],
)
def test_refused(target: str) -> None:
    with pytest.raises(InputError, match=r"data\._target_: .* is outside kexue, torch.optim.*KEXUE_ALLOW_TARGETS="):
        resolve(target, "data")


@pytest.mark.parametrize(
    "target",
    [
        "kexue.strategies.Zero",
        "torch.optim.AdamW",
        "torch.optim.lr_scheduler.StepLR",
        "torch.nn.GELU",
        "pytorch_lightning.callbacks.EarlyStopping",
        "pytorch_lightning.loggers.TensorBoardLogger",
        "torchmetrics.classification.MulticlassAccuracy",
    ],
)
def test_allowed(target: str) -> None:
    assert resolve(target, "x").__name__ == target.split(".")[-1]


def test_own_packages_can_be_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEXUE_ALLOW_TARGETS", "fractions, mine.models")
    assert build({"_target_": "fractions.Fraction", "numerator": 3}) == 3
    with pytest.raises(InputError, match="outside"):
        resolve("fractionsx.Fraction", "x")


@pytest.mark.parametrize(
    ("node", "message"),
    [
        ({"_target_": "kexue.strategies.Zeroo"}, "no Zeroo in kexue.strategies; did you mean Zero?"),
        ({"_target_": "kexue.strategies"}, "kexue.strategies is not a class or function"),
        ({"_target_": 3}, "a._target_: 3 is not the dotted path of a class"),
        ({"_target_": "kexue.strategies.Lookahead", "kk": 3}, "a.kk: no such key; did you mean a.k?"),
        ({"_target_": "kexue.strategies.Lookahead", "k": "three"}, "a.k='three': expected a whole number"),
        ({"_target_": "kexue.strategies.Lookahead", "k": True}, "a.k=True: expected a whole number"),
        ({"_target_": "torch.nn.Linear", "in_features": 3}, "a.out_features: missing; type a.out_features=VALUE"),
        ({"_target_": "torch.optim.AdamW", "_partial_": "yes"}, "a._partial_='yes': use true or false"),
        ({"b": [{"_target_": "os.system"}]}, r"a.b.0._target_: os.system is outside"),
    ],
)
def test_check_names_the_key(node: object, message: str) -> None:
    with pytest.raises(InputError) as caught:
        check(node, "a")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_the_program_supplies_is_neither_missing_nor_allowed() -> None:
    node = {"_target_": "torch.nn.Linear", "in_features": 3}
    check(node, "a", {"a": ("out_features",)})
    check(node, "a", {"a": ("*",)})
    with pytest.raises(InputError, match="kexue sets this itself"):
        check({**node, "out_features": 3}, "a", {"a": ("out_features",)})


def test_build_makes_objects_factories_and_plain_values() -> None:
    node = {
        "one": {"_target_": "kexue.strategies.Lookahead", "k": 3},
        "many": [{"_target_": "torch.nn.Linear", "in_features": 2, "out_features": 1}],
        "factory": {"_target_": "torch.optim.SGD", "_partial_": True, "lr": 0.5},
        "plain": {"a": [1, None]},
    }
    check(node)
    made = build(node)
    assert isinstance(made["one"], Lookahead)
    assert made["one"].k == 3
    assert made["plain"] == {"a": [1, None]}
    assert isinstance(made["factory"], partial)
    assert made["factory"](made["many"][0].parameters()).param_groups[0]["lr"] == 0.5


def test_a_constructor_that_refuses_a_value_is_named() -> None:
    with pytest.raises(InputError, match=r"^strategy: Zero\(stage=7\): use 1, 2 or 3\.$"):
        build({"_target_": "kexue.strategies.Zero", "stage": 7}, "strategy")


@pytest.mark.parametrize(
    ("value", "hint", "expected"),
    [
        (1, float, True),
        (True, float, False),
        ("x", float | None, False),
        (None, float | None, True),
        ("min", Literal["min", "max"], True),
        ("mean", Literal["min", "max"], False),
        ([1], list[int], True),
        ([1], tuple[int, ...], True),
        ("x", list[str], False),
        ({"a": 1}, dict[str, int], True),
        ("x", Path, True),
        (0.1, float | torch.Tensor, True),
        ("x", Any, True),
        ({"_target_": "torch.nn.GELU"}, torch.nn.Module, True),
        ("gelu", torch.nn.Module, False),
    ],
)
def test_fits(value: object, hint: Any, expected: bool) -> None:
    assert fits(value, hint) is expected
