"""What is to be done to every picture: the network opened, its settings resolved, the styles found."""

import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from isonext.config import OF_THE_LEGS, config_to_dict, load_config
from isonext.errors import UserError
from isonext.flow.certificate import Certificate
from isonext.flow.transfer import EXACT, TransferSettings
from isonext.inference.inputs import Compiles, never
from isonext.inference.options import (
    NetworkOptions,
    RestyleOptions,
    SettingsOptions,
    TargetOptions,
    TransferOptions,
)
from isonext.inference.structure_file import SUFFIX, Structure, refuse_other_bits, refuse_other_shape
from isonext.models.cost import forward_flops
from isonext.pipeline import Pipeline, front_line, load_pipeline, settled, transfer_settings
from isonext.utils import distributed
from isonext.utils.device import allow_tf32, pick_device
from isonext.utils.schema import placed

# What compiling costs and saves at worst, so that `auto` is not slower: an empty cache, the device's best rate without
# it, a small gain. Fixed numbers and no clock, so that a second run takes the same kernels.
COMPILING_S = 45  # seconds a size
SAVED = 0.1  # of the time of the legs
CPU_RATE, GPU_RATE = 2e11, 1e14  # operations a second, of a CPU's thread and of any other device


@dataclass
class Target:
    """A style to make."""

    label: str  # end of its file's name
    title: str  # of its column in a sheet
    style: int | Tensor  # an id, or an embedding (1, style_dim) between two
    is_frame: bool = False  # of an interpolation: frames have a folder to themselves

    def path(self, output: Path) -> Path:
        """Where it goes, beside the sheet `output`."""
        folder = output.with_name(f"{output.stem}_frames") if self.is_frame else output.parent
        return placed(folder, f"{output.stem}_{self.label}{output.suffix}")


@dataclass
class Plan:
    """A transfer of any number of pictures to one style or several."""

    pipeline: Pipeline
    source: int
    targets: list[Target]
    settings: TransferSettings
    min_structure: float | None = None
    compiles: Compiles = never
    compare: bool = False  # also write the picture beside its transfer
    save_structure: Path | None = None
    certificate: Certificate | None = None
    bits: dict[str, str | bool | int] | None = None  # of `fixed_bits`, where a caller keeps a pipeline and knows them


def plan_transfer(options: TransferOptions) -> Plan:
    """Everything that can be wrong with the options is found here, before the first picture."""
    return plan_with(*open_pipeline(options.network), options)


def plan_with(pipeline: Pipeline, trained: dict, options: TransferOptions) -> Plan:
    """The same with a pipeline that is open already; `trained` is the checkpoint's config."""
    settings = resolve_settings(options.settings, trained, options.network.checkpoint, front=pipeline.front)
    pipeline.check_settings(settings)
    if settings.inversion == "fixed_point" and options.network.precision == "bf16":
        raise UserError("--inversion fixed_point works in float32: BF16 is too coarse to be solved for")
    source = pipeline.spec.style_id(options.source_style)
    plan = Plan(
        pipeline, source, find_targets(options.targets, pipeline, settings.method), settings, options.min_structure
    )
    evaluations = settings.num_steps * (len(plan.targets) + (settings.method != "map"))  # a picture, at least
    plan.compiles = compile_rule(options.network.compile, trained, pipeline, evaluations)
    plan.compare, plan.save_structure = options.compare, options.save_structure
    plan.certificate = Certificate() if options.certify else None
    if plan.save_structure and plan.save_structure.suffix != SUFFIX:
        raise UserError(f"--save_structure {plan.save_structure}: give a file name ending in {SUFFIX}")
    if settings.method == "flowedit" and (options.certify or options.min_structure is not None):
        raise UserError("--method flowedit has no inversion, so neither --certify nor --min_structure applies to it")
    if plan.save_structure and settings.method not in EXACT:
        raise UserError(f"--save_structure: {settings.method} leaves none that is exact; use --method alf")
    return plan


def plan_restyle(options: RestyleOptions, structure: Structure) -> Plan:
    """The same for a structure that was kept, whose file says where it came from."""
    return plan_restyle_with(*open_pipeline(options.network, structure), options, structure)


def plan_restyle_with(pipeline: Pipeline, trained: dict, options: RestyleOptions, structure: Structure) -> Plan:
    """The same with a pipeline that is open already; UserError where the structure is not one of its checkpoint."""
    refuse_other_bits(structure, pipeline, options.structure, ("checkpoint", "autoencoder"))
    refuse_other_shape(structure, pipeline, options.structure)
    checkpoint, front = options.network.checkpoint, pipeline.front
    settings = resolve_settings(options.settings, trained, checkpoint, structure.settings, front)
    pipeline.check_settings(settings)
    source = pipeline.spec.style_id(structure.source)
    plan = Plan(pipeline, source, find_targets(options.targets, pipeline, settings.method), settings)
    plan.certificate = Certificate() if options.certify else None
    return plan


def open_pipeline(options: NetworkOptions, structure: Structure | None = None) -> tuple[Pipeline, dict]:
    """The pipeline in the precision asked for (that of a kept structure, if there is one), and its config as a tree."""
    pipeline, config = load_pipeline(options.checkpoint, pick_device(options.device), options.autoencoder)
    precision = structure.bits["precision"] if structure and options.precision == "auto" else options.precision
    if precision != "auto":
        pipeline.bf16 = precision == "bf16"
    allow_tf32(config.training.tf32)
    pipeline.tile = options.tile or None
    if structure:
        compile_where_it_pays(pipeline, options.compile, bool(structure.bits["compiled"]))
    return pipeline, config_to_dict(config)


def compile_where_it_pays(pipeline: Pipeline, asked: str, pays: bool) -> None:
    """`asked` is on, off, or auto; auto is `pays`."""
    if asked == "on" or (asked == "auto" and pays):
        pipeline.compile()


def compile_rule(asked: str, trained: dict, pipeline: Pipeline, evaluations: int) -> Compiles:
    """`asked` is on, off, or auto: the sizes whose full batches pay, of a network that was compiled in training."""

    def compiles(size: tuple[int, int], pictures: int) -> bool:
        space = tuple(math.ceil(side / pipeline.codec.factor) for side in size[::-1])
        return asked == "on" or (
            asked == "auto" and is_worth_compiling(trained, pipeline, space, pictures * evaluations)
        )

    return compiles


def is_worth_compiling(trained: dict, pipeline: Pipeline, space: tuple[int, ...], evaluations: int) -> bool:
    """Whether a network that was compiled in training is so for that many evaluations of one picture each, on latents
    of `space` cells: where what each process saves makes up for compiling, and the more for not knowing it exactly."""
    if not trained["training"]["compile"]:
        return False
    rate = CPU_RATE * torch.get_num_threads() if pipeline.device.type == "cpu" else GPU_RATE
    seconds = forward_flops(pipeline.model, evaluations, space) / rate / distributed.world()
    return SAVED * seconds >= COMPILING_S


def resolve_settings(
    options: SettingsOptions,
    trained: dict,  # the checkpoint's config
    checkpoint: str,  # its name, for a message
    legs: TransferSettings | None = None,  # of a kept structure
    front: dict | None = None,  # of the checkpoint
    tell: bool = True,  # print what a scale of auto came to
) -> TransferSettings:
    """The checkpoint's (or --config's) inference section, under --set, under the flags; checked like any config.

    A kept structure brings the settings of its legs along; only the guidance of a new generation leg is free.
    """
    tree = config_to_dict(load_config(options.config)) if options.config else trained
    flags = options.flags | ({name: getattr(legs, name) for name in OF_THE_LEGS} if legs else {})
    inference = settled(tree, options.overrides, flags, "inference settings").inference
    settings = transfer_settings(inference, options.strength, options.seed, front)
    if tell and front and inference.cfg_scale == "auto":
        print(front_line(front))
    if legs:
        settings = replace(settings, strength=legs.strength, skip=legs.skip)
    if settings.guidance == "null" and settings.cfg_scale != 1 and trained["training"]["label_drop_prob"] == 0:
        raise UserError(
            f"{checkpoint}: trained with label_drop_prob 0, so it has no null style to guide against; "
            "use --guidance source or --cfg_scale 1"
        )
    return settings


def find_targets(options: TargetOptions, pipeline: Pipeline, method: str) -> list[Target]:
    styles = pipeline.spec.styles
    if options.interpolate:
        a, b = (pipeline.spec.style_id(style) for style in options.interpolate)
        shares = [number / (options.frames - 1) for number in range(options.frames)]
        digits = len(str(options.frames - 1))
        return [
            Target(f"{number:0{digits}}", f"{share:.2f}", pipeline.between(a, b, share, method), is_frame=True)
            for number, share in enumerate(shares)
        ]
    if options.style == "all" and "all" not in styles:
        return [Target(style, style, number) for number, style in enumerate(styles)]
    assert options.style is not None  # the one or the other was given
    number = pipeline.spec.style_id(options.style)
    return [Target(styles[number], styles[number], number)]
