"""The library behind the commands, in storeys: flow and models; data; evaluation, inference and training."""

__version__ = "0.2.0"
