"""What a training step costs, computed from the network before anything runs: operations, and bytes of memory.

Memory is counted on one step of the real network with *fake* tensors, which have a shape and a type and no data: every
storage that the step makes is added when it appears and taken off when the last tensor lets go of it. So the peak has
in it what autograd saves, the largest passing tensors of the backward, and a checkpointed block that is recomputed. It
is that of eager PyTorch; what a kernel uses inside, a compiler saves and an allocator wastes, it cannot see.
"""

import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from isonext.flow.loss import flow_loss
from isonext.models.dit import Attention
from isonext.models.flow_map import FlowMap, Pair
from model import Recompute, VelocityNetwork, count_parameters

COPIES = 5  # of the parameters, in float32: themselves, gradients, AdamW's two moments, the average
COUNTED = 4, 64  # micro-batches that are counted; between and beyond them memory is a straight line


@dataclass(frozen=True)
class Footprint:
    """Bytes of a training step's peak: a line over the pictures that are on the device at once."""

    parameters: int
    state: int  # bytes of parameters, gradients, moments, average
    fixed: float  # bytes of a step whatever the pictures, such as weights in BF16
    picture: float  # bytes that each picture adds

    def peak(self, pictures: int) -> float:
        return self.state + self.fixed + pictures * self.picture

    def largest(self, limit: float) -> int:
        """The most pictures whose peak stays within `limit` bytes; 0 where not one does."""
        return max(0, int((limit - self.state - self.fixed) / self.picture))


def footprint(
    network: Callable[..., VelocityNetwork],  # makes it, of `recompute`: what blocks compute again backwards
    sample: tuple[int, ...],  # the shape of one latent: channels, and sides in cells
    bf16: bool,
    channels_last: bool,
    recompute: Recompute,
    on_cpu: bool = True,  # else on a GPU, where attention is in BF16 like the rest
) -> Footprint:
    """Of the training step of that network."""
    with FakeTensorMode():
        model = network(recompute=recompute)
        for part in model.modules():  # the tensors that are counted are a CPU's, whatever the estimate is for
            if isinstance(part, Attention):
                part.cpu_in_float32 = on_cpu
        for parameter in model.parameters():  # as in all micro-batches but the first
            parameter.grad = torch.empty_like(parameter)
        few, many = COUNTED
        low, high = (_step_bytes(model, (n, *sample), bf16, channels_last) for n in COUNTED)
    picture, parameters = (high - low) / (many - few), count_parameters(model)
    return Footprint(parameters, 4 * COPIES * parameters, low - few * picture, picture)


def _step_bytes(model: VelocityNetwork, shape: tuple[int, ...], bf16: bool, channels_last: bool) -> int:
    """Peak bytes of forward, loss and backward, without those of the state."""
    pictures, layout = shape[0], torch.channels_last if channels_last else torch.contiguous_format

    def network(*inputs: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):  # saves what a GPU's saves
            return model(*inputs)

    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    state = [*model.parameters(), *gradients]
    with _LiveBytes(state) as live:
        x0, x1 = (torch.empty(shape, memory_format=layout) for _ in range(2))
        t, style = torch.empty(pictures), torch.empty(pictures, dtype=torch.int64)
        condition = Pair(style, style, t) if isinstance(model, FlowMap) else style
        flow_loss(network, x0, x1, t, condition).mean().backward()
    return live.peak


def call_bytes(make: Callable[[], Callable[[Tensor], object]], shape: tuple[int, ...]) -> int:
    """Peak bytes of a call without gradients on a float32 tensor of that shape: the tensor and all that is made of it.

    `make` gives what is called; its weights, be they real or made on the spot, do not count.
    """
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        call = make()
        with _LiveBytes([]) as live, _NormsOfCuda():
            call(torch.empty(shape))
    return live.peak


class _NormsOfCuda(TorchFunctionMode):
    """Within, group norm takes and gives float32 whatever autocast says, as on CUDA."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__name__", "") != "group_norm":
            return function(*args, **kwargs or {})
        with torch.autocast("cpu", enabled=False):
            return function(args[0].float(), *args[1:], **kwargs or {})


class _LiveBytes(TorchDispatchMode):
    """Within, `now` is the bytes of all storages that operations made and somebody still holds; `peak`, the most."""

    def __init__(self, known: list[Tensor]) -> None:
        """`known`: tensors from before, which an operation in place also returns; they do not count."""
        super().__init__()
        self.now = self.peak = 0
        self.alive = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        results = operation(*args, **kwargs or {})
        for tensor in tree_leaves(results):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self.alive:
                self._add(tensor.untyped_storage())
        return results

    def _add(self, storage: torch.UntypedStorage) -> None:
        self.alive.add(storage._cdata)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, storage._cdata, storage.nbytes())

    def _drop(self, key: int, size: int) -> None:
        self.alive.discard(key)
        self.now -= size


def call_flops(call: Callable[[Tensor], object], shape: tuple[int, ...], device: torch.device) -> int:
    """Floating-point operations of a call without gradients on a float32 tensor of that shape: those of its matrix
    products and convolutions. `device`: where the call's weights are."""
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), FlopCounterMode(display=False) as counter:
        call(torch.empty(shape, device=device))
    return counter.get_total_flops()


def step_flops(
    network: VelocityNetwork,  # on the meta device, if it is only to be counted
    pictures: int,
    space: tuple[int, ...],  # of the latents, cells
    recompute: bool = False,  # gradient checkpointing
) -> int:
    """Floating-point operations of one training step: forward, and twice that backward, less the gradient of the
    input, which nobody asks for. (PyTorch's FlopCounterMode counts the backward of a depthwise convolution as if it
    were dense, and a CPU's attention not at all.)
    """
    stem, blocks, head = _multiply_adds(network, space)
    return 2 * pictures * (3 * (stem + blocks + head) - stem + recompute * blocks)


def forward_flops(network: VelocityNetwork, pictures: int, space: tuple[int, ...]) -> int:
    """Floating-point operations of one evaluation."""
    return 2 * pictures * sum(_multiply_adds(network, space))


def _multiply_adds(network: VelocityNetwork, space: tuple[int, ...]) -> tuple[int, int, int]:
    """Of one picture's convolutions, matrix products and attention, forward: in the stem, the blocks and the head.

    Every weight is used once a token (a cell, or a patch of them), those of time and style once a picture and not
    counted; attention multiplies T x T scores of D numbers twice.
    """
    tokens = math.prod(math.ceil(side / network.patch_size) for side in space)
    stem, blocks, head = (tokens * _weights(part) for part in (network.stem, network.blocks, network.head))
    if network.attends:
        blocks += len(network.blocks) * 2 * tokens**2 * network.hidden_dim
    return stem, blocks, head


def _weights(part: nn.Module) -> int:
    named = part.named_parameters()
    return sum(weight.numel() for name, weight in named if weight.ndim > 1 and "affine" not in name)
