"""What watches or steers a run: checkpoints, throughput, memory, preemption, progress, plots, and the loggers."""

from .checkpoints import Checkpoints
from .confusion_matrix import ConfusionMatrixPlot
from .exact_schedule import ExactSchedule, exact_schedule
from .gradient_normaliser import GradientNormaliser
from .loggers import CSVMetrics, wandb_logger
from .memory import MemoryPeak
from .preemption import Preemption
from .progress import ProgressBar
from .throughput import Throughput

__all__ = [
    "CSVMetrics",
    "Checkpoints",
    "ConfusionMatrixPlot",
    "ExactSchedule",
    "GradientNormaliser",
    "MemoryPeak",
    "Preemption",
    "ProgressBar",
    "Throughput",
    "exact_schedule",
    "wandb_logger",
]
