"""The command line: the one place that knows Hydra, the configs and every other part of the package."""
