"""What watches or steers a run: checkpoints, throughput, memory, the progress bar, plots, and the loggers."""

from .checkpoints import Checkpoints
from .confusion_matrix import ConfusionMatrixPlot
from .loggers import CSVMetrics, wandb_logger
from .memory import MemoryPeak
from .progress import ProgressBar
from .throughput import Throughput

__all__ = [
    "CSVMetrics",
    "Checkpoints",
    "ConfusionMatrixPlot",
    "MemoryPeak",
    "ProgressBar",
    "Throughput",
    "wandb_logger",
]
