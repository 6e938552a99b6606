"""IsoNext: an isotropic ConvNeXt with adaptive group norm, the velocity field `v = model(x, t, style)`.

    x (B, C, h, w) -> 3x3 conv -> N blocks at full resolution -> AdaGN -> 3x3 conv -> v (B, C, h, w)

Fully convolutional: a model trained on one size runs on any other. The blocks follow ConvNeXt (Liu et al.,
"A ConvNet for the 2020s", arXiv:2201.03545), the adaptive norm follows Dhariwal & Nichol (arXiv:2105.05233).
"""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

#################################################################################
#                            Time and style -> condition                        #
#################################################################################


class TimestepEmbedding(nn.Module):
    """t (B,) in [0, 1] -> (B, width): a sinusoid of 1000 t, `dim` wide, then a two-layer MLP, all in float32."""

    frequencies: Tensor

    def __init__(self, dim: int, width: int | None = None) -> None:
        super().__init__()
        width = width or dim
        # Periods from 2 pi to 10^4 * 2 pi in units of 1/1000: from the finest step of t to all of it.
        frequencies = torch.exp(-math.log(10_000) * torch.arange(dim // 2) / (dim // 2))
        self.register_buffer("frequencies", 1000 * frequencies, persistent=False)
        self.mlp = nn.Sequential(nn.Linear(dim, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        angles = t.float()[:, None] * self.frequencies  # (B, dim / 2)
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=1))


class AdaGN(nn.Module):
    """GroupNorm without affine, then `(1 + scale) * x + shift`; scale and shift (B, 2 D) are `affine(condition)`.

    Statistics in float32: sums over the positions of each channel, then over the channels of a group, so that in
    channels_last memory every pass runs along it. There `F.group_norm` is slow on a CPU where a group has few channels,
    and has no forward-mode derivative.
    """

    def __init__(self, dim: int, cond_dim: int, num_groups: int) -> None:
        super().__init__()
        self.num_groups = num_groups
        self.affine = nn.Linear(cond_dim, 2 * dim)

    def forward(self, x: Tensor, scale_shift: Tensor) -> Tensor:
        b, d, h, w = x.shape
        y = x.permute(0, 2, 3, 1).reshape(b, h * w, d).float()
        mean = self._by_group(y.mean(1))  # (B, G, 1)
        variance = (self._by_group(y.square().mean(1)) - mean.square()).clamp(min=0)  # 0 but for rounding
        scale, shift = scale_shift.view(b, 2, self.num_groups, -1).unbind(1)  # (B, G, D / G) each
        slope = (1 + scale) * (variance + 1e-5).rsqrt()
        offset = shift - slope * mean
        y = torch.addcmul(offset.view(b, 1, d), slope.view(b, 1, d), y)
        return y.to(x.dtype).view(b, h, w, d).permute(0, 3, 1, 2)

    def _by_group(self, channels: Tensor) -> Tensor:
        """(B, D) -> the mean of each group's (B, G, 1)."""
        return channels.view(len(channels), self.num_groups, -1).mean(2, keepdim=True)


#################################################################################
#                           A depthwise convolution                             #
#################################################################################


@torch.library.custom_op("isonext::depthwise", mutates_args=())
def depthwise(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A depthwise convolution whose weight gradient is fast in BF16 on a CPU.

    The gradient of channel c is the correlation of its input with its output gradient, summed over the batch: a
    grouped convolution of B * D single maps whose kernels are the output gradients. PyTorch's own route takes several
    times as long and would be a fifth of a training step. Forward and input gradient are PyTorch's. (An operator, not
    an autograd.Function, so that torch.compile finds what it compiled at the last start.) It has no forward-mode rule,
    and PyTorch offers none: its tangent would be zero without a word.
    """
    return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2, groups=len(weight))


@depthwise.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.empty_like(x)


def _keep_inputs(ctx, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])


def _depthwise_gradients(ctx, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x, weight = ctx.saved_tensors
    (b, d, h, w), pad = x.shape, weight.shape[-1] // 2
    options = ([d], [1, 1], [pad, pad], [1, 1], False, [0, 0], d, [True, False, False])
    x_gradient = torch.ops.aten.convolution_backward(gradient, x, weight, *options)[0]
    maps, kernels = x.reshape(1, b * d, h, w), gradient.reshape(b * d, 1, h, w)
    correlation = F.conv2d(maps, kernels, padding=pad, groups=b * d)  # (1, B * D, k, k)
    return x_gradient, correlation.view(b, d, 1, *weight.shape[2:]).sum(0), gradient.sum((0, 2, 3))


depthwise.register_autograd(_depthwise_gradients, setup_context=_keep_inputs)


def in_forward_mode() -> bool:
    """Whether derivatives are taken forwards just now, as by torch.func.jvp."""
    return torch.autograd.forward_ad._current_level >= 0


class DepthwiseConv(nn.Conv2d):
    """(B, D, h, w) -> the same shape; every channel has a kernel of its own."""

    def __init__(self, dim: int, kernel_size: int) -> None:
        super().__init__(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        backward = torch.is_grad_enabled() and not in_forward_mode()
        if x.device.type == "cpu" and backward and torch.is_autocast_enabled("cpu"):
            assert self.bias is not None
            x, weight, bias = (tensor.to(torch.bfloat16) for tensor in (x, self.weight, self.bias))
            return depthwise(x, weight, bias)
        return super().forward(x)


#################################################################################
#                         What every velocity network has                       #
#################################################################################

ARITHMETIC = 2  # goes up when other sums give the same velocity other bits: a structure is restored by its own alone

# What the backward pass of a block computes again (`recompute`), in place of keeping it from the forward pass.
#   none        nothing: autograd keeps all that it needs
#   selective   all but the products of convolutions, matrices and attention: half the memory, at little cost
#   full        all, from the block's input: a sixth of the memory, for a second forward pass (gradient checkpointing)
Recompute = Literal["none", "selective", "full"]
_aten = torch.ops.aten
PRODUCTS = [_aten.mm.default, _aten.addmm.default, _aten.linear.default, _aten.convolution.default]
PRODUCTS += [torch.ops.isonext.depthwise.default, _aten._scaled_dot_product_flash_attention_for_cpu.default]
PRODUCTS += [_aten._scaled_dot_product_flash_attention.default, _aten._scaled_dot_product_efficient_attention.default]
PRODUCTS += [_aten._scaled_dot_product_cudnn_attention.default]
SELECTIVE = {"context_fn": functools.partial(create_selective_checkpoint_contexts, PRODUCTS)}


def run_block(recompute: Recompute, block: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """`block(*inputs)`, of which the backward pass computes again what `recompute` says."""
    if recompute == "none" or not torch.is_grad_enabled():
        return block(*inputs)
    options: dict[str, Any] = SELECTIVE if recompute == "selective" else {}
    return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False, **options)


class VelocityNetwork(nn.Module):
    """What IsoNext and DiT share: N `blocks`, and a `style` embedding whose last row is that of a dropped label.

    forward: x (B, latent_channels, *space), t (B,) in [0, 1], style (B,) int64 -> v like x, in float32; zero at start.
    In place of ids, `style` may be embeddings (B, width) made with `embed`, such as those between two styles.
    """

    blocks: nn.ModuleList
    style: nn.Embedding | None  # None: a DiT of one style
    stem: nn.Module
    head: nn.Conv2d | nn.Linear
    hidden_dim: int
    size: tuple[int, ...] | None = None  # the only space that it takes, in cells; None: any
    patch_size = 1  # side of a token, in cells
    attends = False

    def __init__(self, num_styles: int, recompute: Recompute) -> None:
        super().__init__()
        self.null_style, self.recompute = num_styles, recompute

    def embed(self, style: Tensor) -> Tensor:
        """Style ids (B,) int64 -> their embeddings (B, width)."""
        assert self.style is not None
        return self.style(style)

    def compile(self, **options) -> None:
        """torch.compile for the blocks alone: what is compiled for one serves all N, so that N does not cost time."""
        for block in self.blocks:
            block.compile(**options)

    def uncompile(self) -> None:
        for block in self.blocks:
            block._compiled_call_impl = None


#################################################################################
#                                    IsoNext                                    #
#################################################################################


class Block(nn.Module):
    """7x7 depthwise -> AdaGN -> pointwise D to 4D -> GELU -> pointwise 4D to D -> gated residual."""

    def __init__(self, dim: int, cond_dim: int, kernel_size: int, num_groups: int, expansion: int) -> None:
        super().__init__()
        self.depthwise = DepthwiseConv(dim, kernel_size)
        self.norm = AdaGN(dim, cond_dim, num_groups)
        self.widen = nn.Linear(dim, expansion * dim)
        self.narrow = nn.Linear(expansion * dim, dim)
        self.gate = nn.Parameter(torch.empty(dim))

    def forward(self, x: Tensor, scale_shift: Tensor, recompute: Recompute = "none") -> Tensor:
        return run_block(recompute, self._forward, x, scale_shift)

    def _forward(self, x: Tensor, scale_shift: Tensor) -> Tensor:
        y = self.norm(self.depthwise(x), scale_shift)
        y = y.permute(0, 2, 3, 1)  # (B, h, w, D): in channels_last memory a view, so a pointwise conv is one matmul
        y = self.gate * self.narrow(F.gelu(self.widen(y)))
        return x + y.permute(0, 3, 1, 2).to(x.dtype)


class IsoNext(VelocityNetwork):
    """The velocity of the flow for every style at once, on latents (B, latent_channels, h, w) of any size."""

    def __init__(
        self,
        latent_channels: int,  # C, from the latent store
        num_styles: int,  # the null style comes on top
        hidden_dim: int = 384,  # D
        num_layers: int = 12,  # N
        kernel_size: int = 7,  # odd
        style_dim: int = 256,
        time_dim: int = 256,  # even
        num_groups: int = 32,  # divides hidden_dim
        expansion: int = 4,
        recompute: Recompute = "selective",
    ) -> None:
        super().__init__(num_styles, recompute)
        self.time = TimestepEmbedding(time_dim)
        self.style = nn.Embedding(num_styles + 1, style_dim)
        self.join = nn.Linear(time_dim + style_dim, time_dim)
        self.stem = nn.Conv2d(latent_channels, hidden_dim, 3, padding=1)
        self.blocks = nn.ModuleList(
            Block(hidden_dim, time_dim, kernel_size, num_groups, expansion) for _ in range(num_layers)
        )
        self.norm = AdaGN(hidden_dim, time_dim, num_groups)
        self.head = nn.Conv2d(hidden_dim, latent_channels, 3, padding=1)
        self.initialize_weights()

    def initialize_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            if isinstance(module, AdaGN):  # a plain GroupNorm at start
                nn.init.zeros_(module.affine.weight)
            if isinstance(module, DepthwiseConv):  # each channel begins by seeing itself
                with torch.no_grad():
                    middle = module.kernel_size[0] // 2
                    module.weight[:, :, middle, middle] += 1
            if isinstance(module, Block):  # near the identity at start, whatever the depth
                nn.init.constant_(module.gate, 0.1)
        for parameter in self.head.parameters():
            nn.init.zeros_(parameter)  # v = 0 at start: the loss begins at the data's own variance

    def condition(self, t: Tensor, style: Tensor) -> list[Tensor]:
        """t (B,), style ids or embeddings -> scale and shift (B, 2 D) of each AdaGN, in float32 whatever autocast says.

        All of it here and none in the blocks: a block without autocast of its own is one that torch.compile can find
        again at the next start.
        """
        with torch.autocast(t.device.type, enabled=False):
            embedding = style if style.is_floating_point() else self.embed(style)
            cond = F.silu(self.join(torch.cat([self.time(t), embedding], dim=1)))
            norms = (*(block.norm for block in self.blocks), self.norm)
            return [norm.affine(cond) for norm in norms]  # type: ignore[union-attr, operator]  # they are AdaGN

    def forward(self, x: Tensor, t: Tensor, style: Tensor) -> Tensor:
        *scale_shifts, last = self.condition(t, style)
        h = self.stem(x)  # (B, D, h, w)
        for block, scale_shift in zip(self.blocks, scale_shifts, strict=True):
            h = block(h, scale_shift, self.recompute)
        return self.head(self.norm(h, last)).float()


def count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
