"""A trained flow made ready for pictures: autoencoder, statistics and network behind a few calls.

encode: pixels -> standardised latents;   transfer: latents -> latents;   decode: latents -> pixels
"""

import contextlib
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from isonext.checkpoint import load_checkpoint, load_map, load_model
from isonext.config import Config, InferenceConfig, apply_overrides, config_from_dict
from isonext.data.autoencoder import Autoencoder, DctCodec, load_autoencoder, tiled
from isonext.data.images import pad_to_multiple
from isonext.data.store import LatentSpec
from isonext.errors import UserError, first_line, is_out_of_memory
from isonext.flow import transfer
from isonext.flow.base import Base
from isonext.flow.solvers import LatticeState
from isonext.flow.transfer import EXACT, Inverted, State, Transfer, TransferSettings
from isonext.models.flow_map import FlowMap, Pair
from isonext.utils.device import allow_tf32, autocast, has_bf16
from model import VelocityNetwork

GRAPHS = 64  # shapes that one network may be compiled for; torch would stop at 8, guided and not guided counting twice
Style = int | Tensor  # an id for all pictures, ids (B,), or one embedding (1, style_dim) for all


@dataclass
class Pipeline:
    model: VelocityNetwork
    codec: Autoencoder
    spec: LatentSpec
    device: torch.device
    bf16: bool  # the network under BF16 autocast; as trained, where the device has it, unless changed
    path: Path | None = None  # of the checkpoint
    base: Base = field(default_factory=Base)  # where the flow starts
    compiled: bool = False
    front: dict = field(default_factory=dict)  # what the checkpoint knows of guidance's scales
    tile: int | None = None  # pixels: larger pictures go through the autoencoder in tiles of this side
    map: FlowMap | None = None  # of stage 2, whose teacher `model` then is
    scales: tuple[float, float] = (1.0, 1.0)  # of guidance, that the map has learnt

    @property
    def null_style(self) -> int:
        return self.model.null_style

    def embed(self, style: Tensor) -> Tensor:
        return self.model.embed(style)

    def x0(self, noise: Tensor, x1: Tensor, style: Tensor) -> Tensor:
        return self.base.x0(noise, x1, style)

    def __call__(self, x: Tensor, t: Tensor, style: Tensor) -> Tensor:
        """The flow's network, as `guidance.GuidedField` wants it."""
        return self._run(self.model, x, t, style)

    def map_velocity(self, x: Tensor, t: Tensor, source: Tensor, target: Tensor, scale: Tensor) -> Tensor:
        """Stage 2's network, as `guidance.MapField` wants it."""
        return self._run(self.trained_map, x, t, Pair(source, target, scale))

    def map_embed(self, style: Tensor) -> Tensor:
        return self.trained_map.embed(style)

    def check_settings(self, settings: TransferSettings) -> None:
        """UserError where the method is map, and there is none, or none of such a scale."""
        low, high = self.scales
        if settings.method == "map" and self.trained_map and not low <= settings.cfg_scale <= high:
            raise UserError(
                f"cfg_scale {settings.cfg_scale:g}: the map of {self.path} has learnt scales from {low:g} to {high:g}; "
                "give one of those, or --method alf"
            )

    @property
    def trained_map(self) -> FlowMap:
        """UserError where there is none."""
        if self.map is None:
            raise UserError(f"method map: {self.path} is of stage 1; give a checkpoint of stage 2, or another method")
        return self.map

    def _run(self, network: VelocityNetwork, x: Tensor, t: Tensor, style: Tensor | Pair) -> Tensor:
        """One memory layout always: another would choose other kernels, and those other bits. Where torch.compile turns
        out not to work: a warning, and on without it."""
        inputs = x.contiguous(memory_format=torch.channels_last), t, style
        with autocast(self.device, self.bf16):
            try:
                return network(*inputs)
            except Exception as error:  # no compiler, an unsupported platform: many types, one answer
                if is_out_of_memory(error) or not self.compiled:
                    raise
                self.compiled = False
                for each in self._networks:
                    each.uncompile()
                reason = first_line(error)
                print(f"warning: torch.compile does not work here ({reason}); going on without it", file=sys.stderr)
                return network(*inputs)

    @property
    def _networks(self) -> list[VelocityNetwork]:
        return [self.model] if self.map is None else [self.model, self.map]

    @contextlib.contextmanager
    def _fit_for(self, settings: TransferSettings) -> Iterator[None]:
        """Within, true float32 where a fixed point is solved for: BF16 and TF32 are too coarse to converge."""
        before = self.bf16, torch.backends.cuda.matmul.allow_tf32
        if settings.inversion == "fixed_point":
            self.bf16 = False
            allow_tf32(False)
        try:
            yield
        finally:
            self.bf16 = before[0]
            allow_tf32(before[1])

    def compile(self) -> None:
        """torch.compile at the next call: one graph for all steps of a leg, once for each size of batch and latent."""
        torch._dynamo.config.recompile_limit = GRAPHS
        for network in self._networks:
            network.compile(dynamic=False)
        self.compiled = True

    @contextlib.contextmanager
    def compiled_or_not(self, wanted: bool) -> Iterator[None]:
        """Within, the network runs without what was compiled, unless that is wanted: for one batch from its start to
        its certificate, since other kernels give other bits."""
        if wanted or not self.compiled:
            yield
            return
        self.compiled = False
        try:
            with torch.compiler.set_stance("force_eager"):
                yield
        finally:
            self.compiled = True

    #############################################################################
    #                            Pixels <-> latents                             #
    #############################################################################

    def encode(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1], any size -> standardised latents, padded to whole latent cells."""
        padded = pad_to_multiple(pixels.to(self.device), self.codec.factor)
        return self.spec.standardise(self._in_tiles(self.codec.encode, padded, 1, Fraction(1, self.codec.factor)))

    def decode(self, latents: Tensor, height: int, width: int) -> Tensor:
        """Standardised latents -> (B, 3, height, width), the padding cut off, not clipped."""
        factor = self.codec.factor
        pixels = self._in_tiles(self.codec.decode, self.spec.restore(latents), factor, Fraction(factor))
        return pixels[..., :height, :width]

    def check_size(self, path: Path, size: tuple[int, int]) -> None:
        """UserError where the network or the autoencoder cannot take a picture of this width and height; IsoNext and
        all autoencoders but one class take any."""
        cells, side = tuple(math.ceil(length / self.codec.factor) for length in size[::-1]), self.spec.image_size
        only = None
        if self.model.size not in (None, cells):
            only = "network (dit)"
        elif self.codec.side and any(count * self.codec.factor != self.codec.side for count in cells):
            only, side = "autoencoder", self.codec.side
        if only:
            raise UserError(
                f"{path}: is {size[0]} x {size[1]} pixels, but this checkpoint's {only} takes {side} x {side} "
                f"alone; crop it to a square and give --size {side}"
            )

    def _in_tiles(self, work: Callable[[Tensor], Tensor], x: Tensor, pixels_a_cell: int, ratio: Fraction) -> Tensor:
        """`work` on x as a whole, or in tiles of `self.tile` pixels that overlap by three eighths.

        At 1024 pixels a tile's edge is then 144 pixels from where its part begins to count: all that the small VAE
        `taesd` sees, so that it cannot tell.
        """
        if self.tile is None or isinstance(self.codec, DctCodec) or max(x.shape[-2:]) * pixels_a_cell <= self.tile:
            return work(x)
        factor = self.codec.factor
        cells = max(4, self.tile // factor), max(1, self.tile // factor * 3 // 8)  # latent cells, whole ones
        tile, overlap = (int(count * factor // pixels_a_cell) for count in cells)
        return tiled(work, x, tile, overlap, ratio)

    #############################################################################
    #                            Latents -> latents                             #
    #############################################################################

    def transfer(self, latents: Tensor, source: Style, target: Style, settings: TransferSettings) -> Transfer:
        """Standardised latents -> standardised latents."""
        with self._fit_for(settings):
            return transfer.transfer(
                self, latents.to(self.device), *self._styles(len(latents), source, target), settings
            )

    def invert(self, latents: Tensor, source: Style, settings: TransferSettings) -> Inverted:
        with self._fit_for(settings):
            return transfer.invert(self, latents.to(self.device), self._style(len(latents), source), settings)

    def generate(self, inverted: Inverted, source: Style, target: Style, settings: TransferSettings) -> Transfer:
        with self._fit_for(settings):
            return transfer.generate(self, inverted, *self._styles(_count(inverted.state), source, target), settings)

    def sample(self, noise: Tensor, place: Tensor, style: Tensor, settings: TransferSettings) -> Tensor:
        """White noise and places (see `Base.sample` for both) -> standardised latents of styles (B,)."""
        with self._fit_for(settings):
            x0 = self.base.sample(noise, place, style).to(self.device)
            return transfer.sample(self, x0, style.to(self.device), settings)

    def undo(self, done: Transfer, source: Style, target: Style, settings: TransferSettings) -> tuple[State, State]:
        """The structure and the picture that a transfer started from, by running it backwards."""
        with self._fit_for(settings):
            return transfer.undo(self, done, *self._styles(len(done.latents), source, target), settings)[:2]

    def restore(self, structure: State, source: Style, settings: TransferSettings, target: Style) -> State:
        """The picture of a structure of style `source`, by running its inversion backwards; for map, of the end of a
        transfer to `target`."""
        with self._fit_for(settings):
            styles = self._styles(_count(structure), source, target)
            return transfer.restore(self, structure, styles[0], settings, styles[1])

    def keep_structure(
        self,
        latents: Tensor,  # (1, C, h, w)
        source: Style,
        target: Style,
        settings: TransferSettings,
        score: Callable[[Tensor], float],
        floor: float,
    ) -> tuple[Transfer, TransferSettings, list[tuple[float, float]]]:
        """The strongest transfer whose score is `floor` or more: see `transfer.keep_structure`."""
        with self._fit_for(settings):
            styles = self._styles(1, source, target)
            return transfer.keep_structure(self, latents.to(self.device), *styles, settings, score, floor)

    def between(self, a: int, b: int, share: float, method: str) -> Tensor:
        """The embedding (1, style_dim) at `share` of the way from style a to style b, both ends hit exactly; of the
        network of the method."""
        embed = self.map_embed if method == "map" else self.embed
        ends = embed(torch.tensor([a, b], device=self.device))
        return torch.lerp(ends[:1], ends[1:], share)

    def _style(self, count: int, style: Style) -> Tensor:
        tensor = torch.as_tensor(style, device=self.device)
        return tensor.expand(count, *tensor.shape[1:])

    def _styles(self, count: int, source: Style, target: Style) -> tuple[Tensor, Tensor]:
        return self._style(count, source), self._style(count, target)


def _count(state: State) -> int:
    return len(state.position if isinstance(state, LatticeState) else state)


def load_codec(
    spec: LatentSpec, device: torch.device, where: str, name: str | None = None, download: bool = True
) -> Autoencoder:
    """The autoencoder of a model's latents, or the one that `name` says in its place; a UserError that starts with
    `where` if it is not one of such latents."""
    codec = load_autoencoder(name or spec.autoencoder, device, download)
    if codec.channels != spec.channels:
        raise UserError(
            f"{where}: trained on {spec.channels}-channel latents, autoencoder {codec.name} gives {codec.channels}"
        )
    if codec.factor != spec.factor:  # only latents of another program, see data/external.py
        raise UserError(
            f"{where}: trained on latents of {spec.factor} pixels a cell, autoencoder {codec.name} has {codec.factor}: "
            "data.image_size was not the size of the pictures that the latents were computed from"
        )
    if spec.autoencoder_digest not in ("", codec.digest):
        raise UserError(
            f"{where}: trained on latents of the autoencoder {spec.autoencoder} (sha256 "
            f"{spec.autoencoder_digest[:12]}), but {codec.name} holds other weights (sha256 {codec.digest[:12]}); give "
            "those of training by --set autoencoder.name=FOLDER"
        )
    return codec


def load_pipeline(path: str | Path, device: torch.device, autoencoder: str | None = None) -> tuple[Pipeline, Config]:
    """The averaged network of a checkpoint with its statistics and its autoencoder, and the config it was made by.

    `autoencoder`: where that lies now, if not where it lay in training.
    """
    checkpoint = load_checkpoint(path)
    codec = load_codec(checkpoint.latents, device, str(path), autoencoder)
    spec = replace(checkpoint.latents, autoencoder=codec.name, autoencoder_digest=codec.digest)
    model = load_model(checkpoint, path, device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub lacks memory_format
    bf16 = checkpoint.config.training.use_amp and has_bf16(device)
    pipeline = Pipeline(model, codec, spec, device, bf16, Path(path), checkpoint.base, front=checkpoint.front)
    if (few_steps := load_map(checkpoint, path, device)) is not None:
        pipeline.scales = checkpoint.config.training.stage2_scales
        pipeline.map = few_steps.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # as above
    return pipeline, checkpoint.config


def settled(
    tree: dict, overrides: Iterable[str], flags: dict[str, Any] | None = None, where: str = "settings"
) -> Config:
    """The config dict of a checkpoint under --set, under flags of its inference section.

    Where those take another method than the map of stage 2, it is its teacher's, see `of_teacher`.
    """

    def change(tree: dict) -> Config:
        tree = apply_overrides(tree, overrides)
        return config_from_dict(tree | {"inference": tree["inference"] | (flags or {})}, where=where)

    config = change(tree)
    if tree["inference"]["method"] == "map" != config.inference.method:
        return change(tree | {"inference": of_teacher(tree["inference"])})
    return config


def of_teacher(inference: dict) -> dict:
    """The inference section of a checkpoint of stage 2 for its teacher: the usual method and steps, and the usual scale
    where "auto" is the map's."""
    scale = InferenceConfig.cfg_scale if inference["cfg_scale"] == "auto" else inference["cfg_scale"]
    usual = {"method": InferenceConfig.method, "num_steps": InferenceConfig.num_steps, "cfg_scale": scale}
    return inference | usual


def transfer_settings(
    config: InferenceConfig,
    strength: float = 1.0,
    seed: int = 0,
    front: dict | None = None,  # of the checkpoint, which says what a scale of auto is; None: there can be none
) -> TransferSettings:
    if config.inversion == "fixed_point" and config.method in (*EXACT, "flowedit"):
        why = "is exactly reversible already" if config.method in EXACT else "has no inversion"
        raise UserError(
            f"inversion fixed_point is for the methods euler, midpoint, heun and rk4; {config.method} {why}"
        )
    values = asdict(config)
    if config.cfg_scale == "auto":
        if front is None:
            raise UserError(
                "inference.cfg_scale auto: is measured for transfers alone; give a number in its place, such as 2"
            )
        if not front:
            raise UserError(
                "inference.cfg_scale auto: the checkpoint has no measured front, which the last one of a training with "
                "auto has; give a number in its place, such as 2"
            )
        values["cfg_scale"] = front["scale"]
    return TransferSettings(strength=strength, seed=seed, **values)


def front_line(front: dict) -> str:
    """What `auto` came to, and why."""
    found = next((point for point in front["points"] if point["cfg_scale"] == front["scale"]), None)
    figures = f"style success {found['style_success']:.2f}, SSIM {found['ssim']:.2f} " if found else ""
    return (
        f"cfg_scale auto: {front['scale']:g} ({figures}on {front['pictures']} held-out pictures; the classifier's own "
        f"accuracy {front['ceiling']:.2f})"
    )
