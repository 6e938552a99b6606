"""The processes of a run: how they join, and the memory that one of them takes."""

import psutil
import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import DistributedDataParallelKwargs, GradientAccumulationPlugin

from isonext.utils import distributed


def join_processes() -> Accelerator:
    """This process, and those that it was launched with."""
    # Autocast wraps the network alone, not accelerate's; without GPUs it must be told of several processes.
    many_on_cpu = distributed.world() > 1 and not torch.cuda.is_available()
    patience = InitProcessGroupKwargs(timeout=distributed.PATIENCE)
    # A launcher's variables would cut the gradients (accumulation) or compile once more (dynamo); the config decides.
    return Accelerator(
        cpu=many_on_cpu,
        mixed_precision="no",
        dynamo_backend="no",
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        kwargs_handlers=[patience, DistributedDataParallelKwargs(gradient_as_bucket_view=True)],  # no second copy
    )


def peak_memory_gb(device: torch.device) -> float:
    """CUDA's peak of reserved memory; elsewhere what the process occupies now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / 2**30
    return psutil.Process().memory_info().rss / 2**30
