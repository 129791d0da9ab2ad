"""What watches or steers a run: checkpoints, throughput, memory, the progress bar, plots, and the loggers."""

from .checkpoints import Checkpoints
from .confusion_matrix import ConfusionMatrixPlot
from .exact_schedule import ExactSchedule, exact_schedule
from .gradient_normaliser import GradientNormaliser
from .loggers import CSVMetrics, wandb_logger
from .memory import MemoryPeak
from .non_finite import StopOnNonFinite
from .progress import ProgressBar
from .stall import StopWhenStalled
from .throughput import Throughput

__all__ = [
    "CSVMetrics",
    "Checkpoints",
    "ConfusionMatrixPlot",
    "ExactSchedule",
    "GradientNormaliser",
    "MemoryPeak",
    "ProgressBar",
    "StopOnNonFinite",
    "StopWhenStalled",
    "Throughput",
    "exact_schedule",
    "wandb_logger",
]
