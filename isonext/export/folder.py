"""What export.py does: a folder with the network, its config and its card, whole or not at all."""

from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

from isonext.checkpoint import Checkpoint, export_checkpoint, load_checkpoint
from isonext.config import apply_overrides, config_from_dict, config_to_dict
from isonext.data.model_folder import CARD, CONFIG, WEIGHTS
from isonext.errors import UserError
from isonext.export.card import Card, draw_samples
from isonext.export.options import ExportOptions
from isonext.utils.distributed import refuse_several
from isonext.utils.io import folder_written_whole


def export(options: ExportOptions) -> int:
    """Returns the exit status: 1 where the autoencoder's halves could not be had in the format."""
    refuse_several("export.py")
    if options.format == "onnx":
        from isonext.export import onnx_files  # a missing package is told before any work

        onnx_files.check_packages(options.opset)
    checkpoint, status = load_checkpoint(options.checkpoint), 0
    if checkpoint.stage == 2 and options.format == "onnx":
        raise UserError(
            f"{options.checkpoint}: is of stage 2, which --format onnx does not know; leave that out, or give stage 1's"
        )
    config = config_to_share(checkpoint, options.overrides)
    with folder_written_whole(options.output) as folder:
        card = Card(options, checkpoint, config)
        if options.format == "onnx":
            card.onnx = onnx_files.write_parts(options, checkpoint, config, folder)
            status = int(any(f"{name}.onnx" not in card.onnx for name in onnx_files.OF_THE_AUTOENCODER))
        else:
            export_checkpoint(checkpoint, options.checkpoint, folder, config)
        why_not = draw_samples(options, checkpoint, config, folder)
        card.samples = not why_not
        (folder / CARD).write_text(card.text(), encoding="utf-8")
        sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    if options.format == "safetensors":
        print(f"{WEIGHTS}: {sizes[WEIGHTS] / 1e6:.3g} MB, step {checkpoint.step}; {CONFIG}, {CARD}")
    if why_not:
        print(f"no sample transfers: {why_not}")
    print(f"written to {options.output}")
    return status


def config_to_share(checkpoint: Checkpoint, overrides: tuple[str, ...]) -> dict[str, Any]:
    """What a transfer needs of the config. The other sections say where things lie on this machine."""
    own = config_to_dict(checkpoint.config)
    changed = config_to_dict(config_from_dict(apply_overrides(own, overrides), where="--set"))
    shared = {"model": own["model"], "training": own["training"], "inference": changed["inference"]}
    return shared | {"autoencoder": {"name": public_name(checkpoint.latents.autoencoder)}}


def public_name(autoencoder: str) -> str:
    """A hub id, dct:f4c12 or a relative path as it is; of a path from a root or a home, the last part."""
    rooted = PurePosixPath(autoencoder).is_absolute() or PureWindowsPath(autoencoder).is_absolute()
    if rooted or autoencoder.startswith("~"):
        return PureWindowsPath(autoencoder).name or "autoencoder"
    return autoencoder
