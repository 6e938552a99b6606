"""What stage 2 learns from: pictures and their transfers by stage 1, the teacher; and what a step draws of them.

The teacher's pairs are made once and kept in a file beside the checkpoints, so that a resume draws the same.
"""

import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from isonext.config import Config, InferenceConfig, TrainingConfig
from isonext.data.dataset import LatentSplit
from isonext.errors import UserError, first_line
from isonext.flow.loss import map_loss
from isonext.flow.transfer import TransferSettings
from isonext.models.flow_map import Pair
from isonext.pipeline import Pipeline, transfer_settings
from isonext.training.batches import ALL, Batch, Samples, balanced_order, epoch_order, spread_times
from isonext.utils import distributed
from isonext.utils.io import written_whole
from isonext.utils.seeding import seeded

FILE = "stage2_pairs.safetensors"
AT_ONCE = 32  # transfers of the teacher, all at one scale
AT_START, AT_END = 0.4, 0.2  # of the times: a leg of one step begins at t = 0, and its way back at t = 1
IDENTITY = 0.1  # of a batch: pairs of a picture and itself
HELD = 128  # held-out pairs at most


@dataclass
class Pairs:
    """Pictures of a split, each with a target style, a scale of guidance, and the teacher's transfer."""

    split: LatentSplit
    picture: Tensor  # (P,) int64, places in the split
    mirrored: Tensor  # (P,) bool
    crop: Tensor  # (P,) int64
    target: Tensor  # (P,) int64, never the picture's own style
    scale: Tensor  # (P,) float32, one for every AT_ONCE of them
    result: Tensor | None = None  # (P, C, h, w) float16, standardised latents; None before the teacher made them

    def __len__(self) -> int:
        return len(self.picture)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the result."""
        return len(self), *self.split.latents.shape[2:]

    def sources(self, index: Tensor | slice) -> tuple[Tensor, Tensor]:
        """The latents (B, C, h, w) of those pictures, and their styles (B,)."""
        return self.split.batch(self.picture[index], self.mirrored[index], self.crop[index])

    def batch(self, index: Tensor, t: Tensor, identity: Tensor) -> Batch:
        """The pairs `index` (B,) at times t (B,); where `identity` (B,) is set each is of the picture and itself."""
        assert self.result is not None
        x0, source = self.sources(index)
        x1 = torch.where(identity[:, None, None, None], x0, self.result[index].float())
        target = torch.where(identity, source, self.target[index])
        return Batch(x0, x1, t, Pair(source, target, self.scale[index]))


def choose_pairs(split: LatentSplit, training: TrainingConfig, order: Tensor, name: str) -> Pairs:
    """Which pictures, in that order, are transferred and how; a function of the seed and of `name`."""
    count, generator = len(order), seeded(training.seed, f"pairs {name}", 0)
    styles, (low, high) = len(split.spec.styles), training.stage2_scales
    mirrored = torch.rand(count, generator=generator) < 0.5
    crop = torch.randint(1 + split.crops, (count,), generator=generator)
    onwards = torch.randint(1, styles, (count,), generator=generator)
    scale = low + (high - low) * torch.rand(-(-count // AT_ONCE), generator=generator)
    target = (split.styles[order] + onwards) % styles
    return Pairs(split, order, mirrored, crop, target, scale.repeat_interleave(AT_ONCE)[:count])


def choose_all(train: LatentSplit, val: LatentSplit, training: TrainingConfig) -> dict[str, Pairs]:
    """Those to learn from, of every style as many, no picture again before all of its style; and held-out ones."""
    styles = len(train.spec.styles)
    if styles < 2:
        raise UserError("stage 2 learns transfers between styles, and this store has one")
    order = train.by_style[balanced_order(training.seed, 0, training.stage2_pairs, train.counts)]
    held = torch.randperm(len(val), generator=seeded(training.seed, "validation", 0))[:HELD]
    return {"train": choose_pairs(train, training, order, "train"), "val": choose_pairs(val, training, held, "val")}


def draw_pairs(pairs: Pairs, training: TrainingConfig, step: int, rows: slice = ALL) -> Batch:
    """The batch of optimiser step `step`, or those `rows` of it; a function of (seed, step)."""
    size = training.batch_size
    epoch, place = divmod(step, len(pairs) // size)
    index = epoch_order(training.seed, epoch, len(pairs))[place * size : (place + 1) * size]
    kind, t, identity = torch.rand(3, size, generator=seeded(training.seed, "pairs", step))
    t = torch.where(kind < AT_START, 0.0, torch.where(kind < AT_START + AT_END, 1.0, t))
    return pairs.batch(index[rows], t[rows], (identity < IDENTITY)[rows])


def pair_samples(pairs: dict[str, Pairs], training: TrainingConfig) -> Samples:
    """What stage 2 is trained and validated on."""

    def held_out(count: int) -> Batch:
        chosen = torch.arange(count)
        return pairs["val"].batch(chosen, spread_times(count), torch.zeros_like(chosen, dtype=torch.bool))

    def draw(step: int, rows: slice) -> Batch:
        return draw_pairs(pairs["train"], training, step, rows)

    return Samples(draw, held_out, len(pairs["val"]), map_loss)


#################################################################################
#                                  The teacher                                  #
#################################################################################


def taught_samples(
    config: Config,
    train: LatentSplit,
    val: LatentSplit,
    path: Path,  # of the pairs' file
    weights: dict[str, Tensor],  # of the teacher
    make_teacher: Callable[[], Pipeline],
    accelerator: Accelerator,
) -> Samples:
    """What stage 2 is trained on: from the file, or where there is none that fits, made and written to it."""
    training, settings = config.training, teacher_settings(config)
    pairs = choose_all(train, val, training)
    digest = pairs_digest(pairs, weights, settings)
    reason = distributed.from_main(read_results(path, pairs, digest))
    if reason:
        if accelerator.is_main_process:
            if path.exists():
                print(f"{path} {reason}: its pairs are made anew")
            write_results(path, pairs, digest, make_teacher(), settings)
        accelerator.wait_for_everyone()
        if (reason := read_results(path, pairs, digest)) is not None:
            raise UserError(f"{path} {reason}")
    return pair_samples(pairs, training)


def teacher_settings(config: Config) -> TransferSettings:
    """Of the teacher's transfers, but for the scale, which each batch has of its own."""
    if config.inference.method == "map":
        raise UserError("inference.method map: is what stage 2 learns; its teacher needs another, such as alf")
    return transfer_settings(config.inference, front={"scale": 1.0})


def map_inference(config: Config) -> InferenceConfig:
    """The inference section of stage 2's checkpoints: one step of the map, unless flags say otherwise."""
    scale, (low, high) = config.inference.cfg_scale, config.training.stage2_scales
    if scale != "auto" and not low <= scale <= high:
        raise UserError(
            f"inference.cfg_scale = {scale:g}: stage 2 is taught scales from {low:g} to {high:g}; "
            "change it, or training.stage2_scales"
        )
    return replace(config.inference, method="map", num_steps=1, inversion="explicit")


def pairs_digest(pairs: dict[str, Pairs], teacher: dict[str, Tensor], settings: TransferSettings) -> str:
    """Of all that the results come from: the teacher, its settings, the store, and what was chosen of it."""
    digest = hashlib.sha256(repr(asdict(settings)).encode())
    for name in sorted(teacher):
        digest.update(name.encode() + teacher[name].detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    for chosen in pairs.values():
        spec = chosen.split.spec
        digest.update(f"{chosen.split.digest} {spec.styles} {spec.mean} {spec.std}".encode())
        for tensor in (chosen.picture, chosen.mirrored, chosen.crop, chosen.target, chosen.scale):
            digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def read_results(path: Path, pairs: dict[str, Pairs], digest: str) -> str | None:
    """Fill in the results that the file holds; a reason where it cannot be used."""
    try:
        with safe_open(path, "pt") as file:
            if (file.metadata() or {}).get("digest") != digest:
                return "is of another teacher, other settings or another store"
            found = {name: file.get_tensor(name) for name in pairs}
    except Exception as error:  # safetensors stumbles over many things in a damaged file
        return f"is damaged ({first_line(error)})"
    for name, tensor in found.items():
        if tensor.shape != pairs[name].shape or tensor.dtype != torch.float16 or not tensor.isfinite().all():
            return f"is damaged (its results of {name} are no latents)"
        pairs[name].result = tensor
    return None


def write_results(
    path: Path, pairs: dict[str, Pairs], digest: str, teacher: Pipeline, settings: TransferSettings
) -> None:
    """The teacher's transfers of all pairs, in one file."""
    with tqdm(total=sum(map(len, pairs.values())), unit="pair", desc="teacher", disable=None) as bar:
        made = {name: transfer_all(teacher, chosen, settings, bar) for name, chosen in pairs.items()}
    with written_whole(path) as beside:
        save_file(made, beside, {"digest": digest})


def transfer_all(teacher: Pipeline, pairs: Pairs, settings: TransferSettings, bar: tqdm) -> Tensor:
    """(P, C, h, w) float16, the teacher's transfers."""
    parts = [torch.empty(0, *pairs.shape[1:], dtype=torch.float16)]
    for start in range(0, len(pairs), AT_ONCE):
        part = slice(start, start + AT_ONCE)
        x0, source = pairs.sources(part)
        scaled = replace(settings, cfg_scale=pairs.scale[start].item())
        parts.append(teacher.transfer(x0, source, pairs.target[part], scaled).latents.half().cpu())
        bar.update(len(x0))
    return torch.cat(parts)
