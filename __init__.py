"""kexue: a distributed-training plugin for PyTorch Lightning.

Import what you need from `kexue.strategies`, `kexue.callbacks` and `kexue.lightning_modules`; this module stays free of
heavy imports, so that `kexue list` and shell completion answer at once.
"""

__version__ = "0.1.0"
