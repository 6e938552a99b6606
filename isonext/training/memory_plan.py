"""How a training step fits the memory: what `auto` comes to, and the table of `train.py --plan`."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from isonext.checkpoint import build_model, network_of
from isonext.config import Config, TrainingConfig
from isonext.data.autoencoder import Autoencoder, DiffusersAutoencoder, load_autoencoder
from isonext.data.external import survey
from isonext.data.preprocess import BATCH
from isonext.data.store import LatentSpec, StoreMeta, read_meta, shown
from isonext.errors import UserError
from isonext.models.cost import COPIES, Footprint, call_bytes, footprint, step_flops
from isonext.pipeline import load_codec
from isonext.training.watching import MOST_PREVIEWED, MOST_ROWS, MOST_TRANSFERRED
from isonext.utils.device import has_bf16
from model import Recompute, VelocityNetwork, count_parameters

GIB = 2**30
USABLE = 0.8  # of the free memory: the estimate knows no kernel's workspace, no allocator's gap, and not the compiler
LARGEST_CARD = 100_000  # GiB
CONTEXT = GIB // 2  # of a card, taken by CUDA before the first tensor
INFERRED = 8  # pictures that inference.py takes at once
MIN_AT_ONCE = 8  # pictures that keep a device busy

Needs = Callable[[Recompute], Footprint]  # of a training step, by what blocks compute again for the backward pass

#################################################################################
#                            What `auto` comes to                               #
#################################################################################


@dataclass(frozen=True)
class MicroBatch:
    """How a process goes through its share of a batch."""

    pictures: int  # at once
    recompute: Recompute  # what blocks compute again for the backward pass

    def smaller(self, training: TrainingConfig) -> "MicroBatch | None":
        """What to try where this one ran out of memory; None where nothing is left that the config allows."""
        if self.recompute == "none":
            return MicroBatch(self.pictures, "selective")
        if self.pictures > 1:
            return MicroBatch(math.ceil(self.pictures / 2), self.recompute)
        if training.gradient_checkpointing == "auto" and self.recompute == "selective":
            return MicroBatch(1, "full")
        return None


def choose_micro_batch(
    training: TrainingConfig,
    share: int,  # pictures of a batch that this process has
    limit: float,  # bytes for the state and a step
    needs: Needs,
) -> MicroBatch:
    """What the config says, and where it says auto:

    blocks are recomputed from their input only where fewer than 8 pictures (or the micro-batch asked for, or the
    share) would fit otherwise; the micro-batch is the largest that then fits, or somewhat smaller where that cuts equal
    pieces. Blocks that are not recomputed from their input are so selectively, or not at all where there is room.
    """
    asked, from_input = training.micro_batch_size, training.gradient_checkpointing
    size = min(share, (MIN_AT_ONCE if asked == "auto" else asked) or share)
    if from_input == "auto":
        from_input = needs("selective").largest(limit) < size
    recompute: Recompute = "full" if from_input else "selective"
    if asked == "auto":
        size = equal_pieces(share, needs(recompute).largest(limit))
    if recompute == "selective" and needs("none").largest(limit) >= size:
        recompute = "none"
    return MicroBatch(size, recompute)


def refuse_too_large(network: Callable[..., VelocityNetwork], free: float) -> None:
    """UserError where the parameters, and what training keeps of each, are more than `free` bytes: a system that hands
    out memory it has not would end the process without a word."""
    with torch.device("meta"):
        parameters = count_parameters(network())
    held = 4 * COPIES * parameters
    if held > free:
        raise UserError(
            f"the network's {parameters / 1e6:.0f} M parameters take {held / GIB:.1f} GiB in training, "
            f"and {free / GIB:.1f} GiB are free; lower model.hidden_dim or model.num_layers (see train.py --plan)"
        )


def equal_pieces(share: int, most: int) -> int:
    """The size of the fewest pieces of at most `most` (or 1); of equal ones, where that is not twice as many."""
    fewest = math.ceil(share / max(1, most))
    count = next((count for count in range(fewest, 2 * fewest) if share % count == 0), fewest)
    return math.ceil(share / count)


def count_needs(
    network: Callable[..., VelocityNetwork], spec: LatentSpec, bf16: bool, channels_last: bool, on_cpu: bool = True
) -> Needs:
    """Footprints, each counted when it is first asked for; `network` makes one, of `recompute`."""
    sample = (spec.channels, *spec.space)
    return functools.cache(lambda recompute: footprint(network, sample, bf16, channels_last, recompute, on_cpu))


def describe_reduction(training: TrainingConfig, chosen: MicroBatch, share: int) -> str:
    """For the line at the start of a run: what auto had to cut, or nothing."""
    parts = []
    if training.micro_batch_size == "auto" and chosen.pictures < share:
        parts.append(f", {chosen.pictures} pictures at once")
    if training.gradient_checkpointing == "auto" and chosen.recompute == "full":
        parts.append(", blocks recomputed backwards")
    return "".join(parts)


#################################################################################
#                             The table of --plan                               #
#################################################################################


def print_plan(config: Config, vram: float | None, stage: int = 1) -> None:
    print("\n".join(plan_lines(config, vram, stage)))


def plan_lines(config: Config, vram: float | None = None, stage: int = 1) -> list[str]:
    """What training a stage by this config costs, and the flags that make it fit `vram` GiB; nothing is run."""
    if vram is not None and not 0 < vram <= LARGEST_CARD:  # written so that NaN fails
        raise UserError(f"--vram {vram:g}: the memory of a card in GiB, a number above 0 and at most {LARGEST_CARD}")
    card = torch.cuda.is_available()
    if vram is None:
        vram = torch.cuda.mem_get_info()[1] / GIB if card else 8.0
    bf16 = config.training.use_amp and (not card or has_bf16(torch.device("cuda")))
    root = Path(config.data.data_root)
    meta = read_meta(root) or survey(root, config)
    spec = meta.latents if meta else assumed_latents(config)
    needs = count_needs(network_of(config, spec, stage), spec, bf16, config.training.channels_last, on_cpu=False)
    limit = USABLE * (vram * GIB - CONTEXT)
    lines = [*_known_lines(config, spec, meta, needs, bf16), *_memory_lines(config, spec, needs, vram, limit)]
    lines += [*_beside_lines(config, spec, needs("full"), bf16), ""]
    if needs("full").largest(limit):
        free = replace(config.training, micro_batch_size="auto", gradient_checkpointing="auto")
        chosen = choose_micro_batch(free, config.training.batch_size, limit, needs)
        from_input = str(chosen.recompute == "full").lower()
        flags = f"--set training.micro_batch_size={chosen.pictures} --set training.gradient_checkpointing={from_input}"
        lines.append(f"for {vram:.3g} GiB: {flags}")
    else:
        lines.append(
            f"not one picture fits {vram:.3g} GiB: lower model.hidden_dim, model.num_layers or data.image_size"
        )
    return lines


def assumed_latents(config: Config) -> LatentSpec:
    """What the latents will be where there is no store yet: the autoencoder's, or where that is not on this machine,
    those of Stable Diffusion's, or in a file, of a VA-VAE."""
    name, model = config.autoencoder.name, config.model
    try:
        codec = load_autoencoder(name, torch.device("cpu"), download=False)
        channels, factor = codec.channels, codec.factor
    except UserError:
        if name.partition(":")[0] == "dct":
            raise
        channels, factor = (32, 16) if Path(name).suffix else (4, 8)
        channels = model.latent_channels or channels
    styles = model.num_styles or config.data.num_classes or 2
    return LatentSpec(name, channels, factor, config.data.image_size, [str(number) for number in range(styles)])


def _known_lines(config: Config, spec: LatentSpec, meta: StoreMeta | None, needs: Needs, bf16: bool) -> list[str]:
    """What no card changes."""
    root = config.data.data_root
    if meta:
        count = sum(len(names) * meta.squares * (1 + meta.crops_in(split)) for split, names in meta.split.items())
        more = "mirrored ones and crops" if meta.crops else "mirrored ones"
        stored = f"{4 * count * spec.channels * math.prod(spec.space) / GIB:.3g} GiB of RAM, {count} with {more}"
        source = f"from {root}" if meta.complete else f"from {root}, which preprocess_latents.py has not finished"
    else:
        stored = "not known yet"
        source = f"from the config: no store at {root} yet, run python preprocess_latents.py"
    model, precision = config.model, "BF16" if bf16 else "float32"
    return [
        f"{model.type}, D {model.hidden_dim}, N {model.num_layers}, {precision}; "
        f"latents {shown((spec.channels, *spec.space))} of {len(spec.styles)} styles, {source}",
        f"parameters           {needs('full').parameters / 1e6:.2f} M",
        f"latents in memory    {stored}",
    ]


def _memory_lines(config: Config, spec: LatentSpec, needs: Needs, vram: float, limit: float) -> list[str]:
    """The table: a step, by what blocks compute again."""
    batch, asked = config.training.batch_size, config.training.micro_batch_size
    at_once = min(batch, asked if isinstance(asked, int) else batch)
    with torch.device("meta"):
        network = build_model(config, spec)

    def row(name: str, cell: Callable[[Recompute], str]) -> str:
        return f"{name:30s}" + "".join(f"{cell(recompute):>14s}" for recompute in ("none", "selective", "full"))

    def operations(recompute: Recompute) -> str:
        return f"{step_flops(network, batch, spec.space, recompute == 'full') / 1e12:.3g} TFLOP"

    return [
        "",
        row("recomputed backwards", str),
        row("gradient checkpointing", lambda recompute: "on" if recompute == "full" else "off"),
        row(f"operations a step of {batch}", operations),
        row(f"peak memory, {at_once} at once", lambda recompute: f"{needs(recompute).peak(at_once) / GIB:.2f} GiB"),
        row(f"most at once in {vram:.3g} GiB", lambda recompute: str(min(batch, needs(recompute).largest(limit)))),
        "",
    ]


#################################################################################
#                            What goes on beside the steps                      #
#################################################################################


def _beside_lines(config: Config, spec: LatentSpec, step: Footprint, bf16: bool) -> list[str]:
    """Peak memory, weights included, of the other work, by the batches that it takes.

    An autoencoder that is not on this machine is not fetched, and its part not guessed.
    """
    codec, reason = None, ""
    try:
        codec = load_codec(spec, torch.device("cpu"), "the plan", download=False)
    except UserError as error:
        reason = str(error).partition(";")[0]
    weights = _weight_bytes(codec) if codec else 0
    parts = _passing_bytes(config, spec, codec, bf16)
    styles = len(spec.styles)
    validated = max(math.ceil(MOST_TRANSFERRED / styles), MOST_ROWS * min(styles, MOST_PREVIEWED))
    lines = ["beside the steps              peak memory"]
    for name, pictures, held, done in (  # held: bytes that are there all the time; done: one after another
        ("preprocessing", BATCH, 0, ("encode",)),
        ("validation", validated, step.state, ("legs", "decode")),
        ("inference", INFERRED, 4 * step.parameters, ("encode", "legs", "decode")),
    ):
        counts = [parts[part](pictures) for part in done if part in parts]
        size = f"{(held + weights + max(counts)) / GIB:.2f} GiB" if counts else "unknown"
        more = " and the autoencoder's" if counts and not codec else ""
        lines.append(f"{f'{name}, {pictures} at once':30s}{size}{more}")
    return [*lines, f"what the autoencoder takes is unknown: {reason}"] if reason else lines


def _passing_bytes(
    config: Config, spec: LatentSpec, codec: Autoencoder | None, bf16: bool
) -> dict[str, Callable[[int], int]]:
    """What is done to pictures -> the bytes that so many of them take at most, beside the weights."""
    guided = 1 if config.inference.cfg_scale == 1 else 2

    def evaluation(rows: int) -> Callable[[], Callable[[Tensor], Tensor]]:
        def make() -> Callable[[Tensor], Tensor]:
            network = network_of(config, spec)()
            t, style = torch.empty(rows), torch.empty(rows, dtype=torch.int64)

            def evaluate(x: Tensor) -> Tensor:
                with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                    return network(x, t, style)

            return evaluate

        return make

    latent = (spec.channels, *spec.space)
    parts = {"legs": lambda n: call_bytes(evaluation(guided * n), (guided * n, *latent))}
    if codec:
        encode, decode = codec.encode, codec.decode
        pixels = (3, *(side * codec.factor for side in spec.space))
        parts["encode"] = lambda n: call_bytes(lambda: encode, (n, *pixels))
        parts["decode"] = lambda n: call_bytes(lambda: decode, (n, *latent))
    return parts


def _weight_bytes(codec: Autoencoder) -> int:
    """Of the autoencoder; a VAE counts from here on as on a card, in BF16."""
    assert isinstance(codec, torch.nn.Module)  # as all of them are
    if isinstance(codec, DiffusersAutoencoder):
        codec.bf16_encode = codec.bf16_decode = True
    return sum(tensor.numel() * tensor.element_size() for tensor in (*codec.parameters(), *codec.buffers()))
