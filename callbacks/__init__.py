"""What watches or steers a run: checkpoints, preemption, throughput, memory, alerts, pictures, tables, and loggers."""

from .alerts import Alerts, alert
from .checkpoints import Checkpoints
from .confusion_matrix import ConfusionMatrixPlot
from .csv_metrics import CSVMetrics
from .exact_schedule import ExactSchedule, exact_schedule
from .gradient_normaliser import GradientNormaliser
from .light_loop import LightLoop
from .memory import MemoryPeak
from .non_finite import StopOnNonFinite
from .pictures import Pictures, log_picture
from .prediction_table import PredictionTable
from .preemption import Preemption
from .progress import ProgressBar
from .second_stage import SecondStage, second_stage_begins
from .stall import StopWhenStalled
from .tensorboard import tensorboard_logger
from .throughput import Throughput
from .wandb_start import wandb_logger

__all__ = [
    "Alerts",
    "CSVMetrics",
    "Checkpoints",
    "ConfusionMatrixPlot",
    "ExactSchedule",
    "GradientNormaliser",
    "LightLoop",
    "MemoryPeak",
    "Pictures",
    "PredictionTable",
    "Preemption",
    "ProgressBar",
    "SecondStage",
    "StopOnNonFinite",
    "StopWhenStalled",
    "Throughput",
    "alert",
    "exact_schedule",
    "log_picture",
    "second_stage_begins",
    "tensorboard_logger",
    "wandb_logger",
]
