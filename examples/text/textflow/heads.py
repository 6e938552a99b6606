"""Heads between the flow's latents and the frozen decoder: an MLP, a VQ codebook, a refiner; each can be left out.

    x (B, 64, L) -> x + LayerNorm(Linear(dropout(GELU(LayerNorm(Linear x))))) -> nearest code -> + MLP -> (B, 64, L)

`Heads.forward` is the one way from a flow's latents to what the decoder reads: training and generation both call it.
The codebook is that of VQ-VAE (van den Oord et al., arXiv:1711.00937, eq. 3) with straight-through gradients.
"""

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isonext.errors import UserError

COMMITMENT = 0.25  # beta of VQ-VAE's eq. 3
RESTART_AFTER = 100  # steps without use, after which a code is dead


@dataclass
class HeadConfig:
    """Which parts there are, and their sizes; the names are those of train_text.py's flags."""

    use_text_decoder_head: bool = False
    use_vq_codebook: bool = False
    use_latent_refiner: bool = False
    text_decoder_head_dim: int = 64
    text_decoder_head_hidden_dim: int = 4096
    dropout: float = 0.1
    vq_codes: int = 8192
    latent_refiner_hidden_dim: int = 256
    latent_refiner_layers: int = 2

    def check(self, width: int) -> None:
        """UserError for what cannot be built on latents of this width."""
        if not (self.use_text_decoder_head or self.use_latent_refiner):
            raise UserError("a head without parts: give --use_text_decoder_head, --use_latent_refiner or both")
        if self.use_vq_codebook and not self.use_text_decoder_head:
            raise UserError("--use_vq_codebook quantises the head's outputs: give --use_text_decoder_head as well")
        if self.text_decoder_head_dim != width:
            raise UserError(
                f"--text_decoder_head_dim {self.text_decoder_head_dim}: the latents are {width} wide, and the head's "
                f"output is added to them and read by a decoder that is frozen: only {width} is possible"
            )

    @property
    def name(self) -> str:
        """For people and tables: "VQ head + refiner"."""
        first = "VQ head" if self.use_vq_codebook else "MLP head" if self.use_text_decoder_head else ""
        return " + ".join(part for part in (first, "refiner" if self.use_latent_refiner else "") if part)


class MlpHead(nn.Module):
    """(..., 64) -> (..., 64), added to the input; the last norm's gain is 0 at start, so that it begins as nothing."""

    def __init__(self, width: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width, hidden),
            nn.LayerNorm(hidden),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, width),
            nn.LayerNorm(width),
        )
        nn.init.zeros_(self.layers[-1].weight)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class Refiner(nn.Module):
    """(..., 64) -> (..., 64), added to the input: `layers` hidden layers of the same width; nothing at start."""

    def __init__(self, width: int, hidden: int, layers: int) -> None:
        super().__init__()
        sizes = [width] + [hidden] * layers
        hidden_layers = [part for a, b in pairwise(sizes) for part in (nn.Linear(a, b), nn.GELU())]
        self.layers = nn.Sequential(*hidden_layers, nn.Linear(hidden, width))
        nn.init.zeros_(self.layers[-1].weight)
        nn.init.zeros_(self.layers[-1].bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class Codebook(nn.Module):
    """Every vector becomes the nearest of `codes` learnt ones."""

    def __init__(self, width: int, codes: int) -> None:
        super().__init__()
        self.codes = nn.Parameter(torch.randn(codes, width))
        self.register_buffer("unused", torch.zeros(codes, dtype=torch.int64))  # steps since a code was last taken

    @torch.no_grad()
    def start_from(self, x: Tensor) -> None:
        """x (N, width): the codes begin as vectors of the kind that they will stand for."""
        chosen = torch.randperm(len(x))[: len(self.codes)]
        if len(chosen) < len(self.codes):
            chosen = torch.cat([chosen, torch.randint(len(x), (len(self.codes) - len(chosen),))])
        self.codes.copy_(x[chosen])

    def nearest(self, x: Tensor) -> Tensor:
        """x (N, width) -> (N,) indices. |x - c|^2 without |x|^2, which is the same for all codes."""
        return (self.codes.square().sum(1) - 2 * x @ self.codes.T).argmin(1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (N, width) -> its codes, with gradients straight through to x; their indices (N,); the loss, a scalar."""
        index = self.nearest(x.detach())
        codes = F.embedding(index, self.codes)
        loss = F.mse_loss(codes, x.detach()) + COMMITMENT * F.mse_loss(x, codes.detach())
        return x + (codes - x).detach(), index, loss

    @torch.no_grad()
    def restart_dead(self, x: Tensor, index: Tensor) -> int:
        """After a step on vectors x (N, width): codes not taken for long become some of them; returns how many."""
        self.unused += 1
        self.unused[index] = 0
        dead = (self.unused >= RESTART_AFTER).nonzero().flatten()
        if len(dead):
            self.codes[dead] = x[torch.randint(len(x), (len(dead),))]
            self.unused[dead] = 0
        return len(dead)


@dataclass
class Decoded:
    """What the heads made of a flow's latents."""

    latents: Tensor  # (B, 64, L), for the decoder
    outputs: Tensor  # (B L, 64) of the MLP head, which the codes stand for
    codes: Tensor | None  # (B L,) the codes taken, None without a codebook
    vq_loss: Tensor  # a scalar; 0 without a codebook


class Heads(nn.Module):
    """The parts of a HeadConfig in a row, on each latent by itself."""

    def __init__(self, config: HeadConfig, width: int) -> None:
        super().__init__()
        config.check(width)
        self.config, c = config, config
        self.head = MlpHead(width, c.text_decoder_head_hidden_dim, c.dropout) if c.use_text_decoder_head else None
        self.codebook = Codebook(width, c.vq_codes) if c.use_vq_codebook else None
        layers = c.latent_refiner_layers
        self.refiner = Refiner(width, c.latent_refiner_hidden_dim, layers) if c.use_latent_refiner else None

    def forward(self, latents: Tensor) -> Decoded:
        """latents (B, 64, L) standardised."""
        outputs = latents.mT.flatten(0, 1)  # (B L, 64)
        outputs = self.head(outputs) if self.head else outputs
        x, codes, loss = self.codebook(outputs) if self.codebook else (outputs, None, outputs.new_zeros(()))
        x = self.refiner(x) if self.refiner else x
        return Decoded(x.view(len(latents), -1, x.shape[1]).mT, outputs, codes, loss)

    def without(self, parts: list[str]) -> "Heads":
        """These heads with some of `codes`, `refiner` switched off: what a part does to the text."""
        for part in parts:
            name = {"codes": "codebook", "refiner": "refiner"}[part]
            if getattr(self, name) is None:
                raise UserError(f"--without {part}: this checkpoint's head has none ({self.config.name})")
            setattr(self, name, None)
        return self


def usage(codes: Tensor, count: int) -> dict[str, float]:
    """How many of `count` codes are taken, and the perplexity exp(H) of how often: `count` where all are equally."""
    share = torch.bincount(codes, minlength=count).double() / len(codes)
    taken = share[share > 0]
    return {"codes_used": len(taken), "perplexity": math.exp(-(taken * taken.log()).sum())}
