"""Test a trained run again, on one device.

usage: kexue test run=FOLDER [checkpoint=best|last|PATH] [KEY=VALUE ...]

  kexue test run=runs/digits_multitask/2026-01-31_12-00-00
  kexue test run=FOLDER checkpoint=last data.eval_batch_size=64

FOLDER is the run directory of `kexue fit`, whatever strategy trained it. KEY=VALUE changes its config.yaml for this
test. The metrics are merged into FOLDER/metrics.json.
"""

from __future__ import annotations


def run(args: list[str]) -> int:
    """Test; see the module's help."""
    from .arguments import take
    from .logs import log_to
    from .run_dir import write_metrics
    from .saved import open_saved

    words, overrides = take(args, {"run": None, "checkpoint": "best"})
    saved = open_saved(words["run"], words["checkpoint"], overrides)
    with log_to(saved.folder):
        from ..errors import InputError
        from .report import print_report
        from .session import has_test, numbers

        data, model, trainer = saved.prepare()
        if not has_test(model, data):
            raise InputError(f"run={saved.folder}: this experiment has no test")
        trainer.test(model, datamodule=data, verbose=False)
        print_report(write_metrics(saved.folder, numbers(trainer.callback_metrics)), saved.folder)
    return 0
