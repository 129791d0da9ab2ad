"""Loss weighting: rules by the losses and by their gradients, as functions and as a technique."""

from .gradients import (
    cagrad_weights,
    gradient_norm_weights,
    gradnorm,
    imtl_g_weights,
    min_norm_weights,
    nonnegative_minimum,
    pcgrad_weights,
    priority_weights,
)
from .losses import (
    dynamic_weight_average,
    generalised_mean,
    generalised_mean_weights,
    imtl_l,
    initial_cross_entropy,
    initial_squared_error,
    inverse_weights,
    prior_cross_entropy,
    prior_squared_error,
    random_weights,
    real_time,
    uncertainty,
)
from .technique import LossWeighting

__all__ = [
    "LossWeighting",
    "cagrad_weights",
    "dynamic_weight_average",
    "generalised_mean",
    "generalised_mean_weights",
    "gradient_norm_weights",
    "gradnorm",
    "imtl_g_weights",
    "imtl_l",
    "initial_cross_entropy",
    "initial_squared_error",
    "inverse_weights",
    "min_norm_weights",
    "nonnegative_minimum",
    "pcgrad_weights",
    "prior_cross_entropy",
    "prior_squared_error",
    "priority_weights",
    "random_weights",
    "real_time",
    "uncertainty",
]
