"""The model card: README.md of an exported folder, and the sheet of sample transfers that it shows."""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from isonext import __version__
from isonext.checkpoint import Checkpoint
from isonext.data import images
from isonext.data.dataset import split_digest
from isonext.data.model_folder import CONFIG
from isonext.data.store import StoreMeta, read_meta
from isonext.errors import UserError
from isonext.export.options import ExportOptions
from isonext.inference.flow_style import FlowStylePipeline
from isonext.training.folder import METRICS, read_run
from isonext.training.log import read_metrics

SAMPLES = "samples.png"
SHOWN = 3  # transfers
FIGURES = {
    "val_style_success": "style success (a classifier's answer on the transfers)",
    "val_ssim": "SSIM to the source",
    "val_score": "score: sqrt(style success x SSIM)",
    "val_leakage": "leakage: how well a probe tells the style from x0",
    "val_loss": "validation loss",
}
USE_OF_ONE = "`python sample.py --checkpoint {folder} --output out` of IsoNext Flow makes pictures from noise."
USE = """```python
from isonext import FlowStylePipeline

pipeline = FlowStylePipeline.from_pretrained({folder})
picture = pipeline("picture.jpg", source={source}, target={target})
picture.save("result.png")
```

The folder also serves as `--checkpoint` of `inference.py`, `evaluate.py` and `sample.py`."""


@dataclass
class Card:
    options: ExportOptions
    checkpoint: Checkpoint
    config: dict[str, Any]  # as it is given away
    onnx: dict[str, str] = field(default_factory=dict)  # file -> what was measured of it
    samples: bool = False

    def text(self) -> str:
        spec, name = self.checkpoint.latents, self.options.output.absolute().name
        head = {"library_name": "isonext-flow", "pipeline_tag": "image-to-image"}
        head |= {"license": self.options.license} if self.options.license else {}
        parts = ["\n".join(["---", *(f"{key}: {json.dumps(value)}" for key, value in head.items()), "---"])]
        parts += [f"# {escaped(name)}", "Unpaired style transfer by flow matching, trained with IsoNext Flow."]
        parts += [self._styles(), f"![source and transfer]({SAMPLES})" if self.samples else ""]
        use = USE if len(spec.styles) > 1 else USE_OF_ONE
        use = use.format(folder=_quoted(name), source=_quoted(spec.styles[0]), target=_quoted(spec.styles[-1]))
        parts += ["## Use", self._files() if self.onnx else use]
        parts += ["## The model", self._model(), self._figures(), self._front(), "## Licence"]
        parts.append(escaped(self.options.license) or "None was stated by the one who exported it.")
        return "\n\n".join(filter(None, parts)) + "\n"

    def _styles(self) -> str:
        spec, meta = self.checkpoint.latents, store_of_training(self.checkpoint)
        if meta is None:
            rows = [f"| {number} | {escaped(style)} |" for number, style in enumerate(spec.styles)]
            return "\n".join(["| id | style |", "| --- | --- |", *rows])
        rows = [
            f"| {number} | {escaped(style)} | {meta.counts[style]['train']} | {meta.counts[style]['val']} |"
            for number, style in enumerate(spec.styles)
        ]
        head = ["| id | style | training pictures | held-out pictures |", "| --- | --- | --- | --- |"]
        return "\n".join([*head, *rows])

    def _model(self) -> str:
        checkpoint, spec, model = self.checkpoint, self.checkpoint.latents, self.config["model"]
        count = sum(weight.numel() for weight in checkpoint.ema.values())
        made = f"{checkpoint.step} steps, batch {checkpoint.config.training.batch_size}"
        digest = f" (SHA-256 of its weights {spec.autoencoder_digest})" if spec.autoencoder_digest else ""
        return "\n".join(
            [
                f"- network: {model['type']}, {count / 1e6:.2f} million parameters, averaged over {made}",
                f"- training squares: {spec.image_size} x {spec.image_size} pixels",
                f"- latents: {spec.channels} channels, {spec.factor} pixels a cell, of the autoencoder "
                f"`{self.config['autoencoder']['name'].replace('`', '')}`{digest}, which is not in this folder",
                f"- trained with version {checkpoint.version or 'before 0.2.0'}, exported with {__version__}",
            ]
        )

    def _figures(self) -> str:
        """Those of the last validation up to the checkpoint's step, where the log beside it is of its run."""
        folder, step = Path(self.options.checkpoint).parent, self.checkpoint.step
        if Path(self.options.checkpoint).is_dir() or read_run(folder) != self.checkpoint.run:
            return ""
        found: dict[str, tuple[int, float]] = {}
        for line in read_metrics(folder / METRICS):
            if line["step"] <= step:
                found |= {name: (line["step"], line[name]) for name in FIGURES if name in line}
        rows = [f"| {FIGURES[name]} | {found[name][1]:.4g} | {found[name][0]} |" for name in FIGURES if name in found]
        if not rows:
            return ""
        head = ["Measured in training on held-out pictures:", "", "| figure | value | at step |", "| --- | --- | --- |"]
        return "\n".join([*head, *rows])

    def _front(self) -> str:
        front = self.checkpoint.front
        if not front:
            return ""
        points = (
            f"| {point['cfg_scale']:g} | {point['style_success']:.3f} | {point['ssim']:.3f} |"
            for point in front["points"]
        )
        said = f"Scales of guidance, on {front['pictures']} held-out pictures; `auto` is {front['scale']:g}:"
        head = [said, "", "| cfg_scale | style success | SSIM |", "| --- | --- | --- |"]
        return "\n".join([*head, *points])

    def _files(self) -> str:
        rows = [f"| `{name}` | {said} |" for name, said in self.onnx.items()]
        said = f"`{CONFIG}` has the styles in the order of their ids, the latents' statistics and the settings."
        return "\n".join(["| file | what it is |", "| --- | --- |", *rows, "", said])


def escaped(text: str) -> str:
    """A text of others in Markdown: shown as it is."""
    return re.sub(r"([\\`*_{}\[\]<>#|~!&])", r"\\\1", text)


def _quoted(text: str) -> str:
    """As a text of Python that ends no block of code."""
    return json.dumps(text, ensure_ascii="`" in text).replace("`", "\\u0060")


def store_of_training(checkpoint: Checkpoint) -> StoreMeta | None:
    """The latent store that the checkpoint was trained on, if it lies there still and is the same."""
    root = Path(checkpoint.config.data.data_root)
    try:
        meta = read_meta(root)
    except (UserError, OSError):
        return None
    if meta is None or not meta.complete:
        return None
    crops = meta.crops_in("train")
    digest = split_digest(meta.squares * (1 + crops), meta.split["train"], crops)
    return meta if checkpoint.store == digest and meta.latents.styles == checkpoint.latents.styles else None


#################################################################################
#                                    Samples                                    #
#################################################################################


def draw_samples(options: ExportOptions, checkpoint: Checkpoint, config: dict[str, Any], folder: Path) -> str:
    """Writes the sheet of some transfers to `folder`; returns why not, where there is none. UserError where pictures
    were given for it."""
    styles, size = checkpoint.latents.styles, checkpoint.latents.image_size
    try:
        chosen = find_samples(options.pictures, checkpoint)
        if len(styles) == 1:
            raise UserError("there is one style alone")
        if not chosen and options.pictures:
            raise UserError(f"--pictures {options.pictures}: no pictures in folders called {', '.join(styles)}"[:400])
        if not chosen:
            raise UserError("no held-out pictures were found; give --pictures FOLDER, with a folder a style")
        pipeline = FlowStylePipeline.from_pretrained(options.checkpoint, autoencoder=options.autoencoder)
        pipeline.trained |= {"inference": config["inference"]}
        rows, names = [], []
        for style, path in chosen:
            target = (style + 1) % len(styles)
            picture = images.open_square(path, size)
            rows.append([picture, pipeline(picture, styles[style], styles[target])])
            names.append(f"{styles[style]} to {styles[target]}")
    except UserError as error:
        if options.pictures:
            raise
        return str(error)
    images.save_picture(images.contact_sheet(rows, ("source", "transfer"), names=names), folder / SAMPLES)
    return ""


def find_samples(given: Path | None, checkpoint: Checkpoint) -> list[tuple[int, Path]]:
    """Style ids and pictures, the styles in turn: of the folder given, or those held out from training."""
    styles = checkpoint.latents.styles
    if given:
        found = [[given / style / name for name in images.find_pictures(given / style)] for style in styles]
    else:
        meta, raw = store_of_training(checkpoint), Path(checkpoint.config.data.raw_data_root)
        held = [entry.removesuffix(".pt") for entry in (meta.split["val"] if meta else [])]
        held = [entry for entry in held if (raw / entry).is_file()]
        found = [[raw / entry for entry in held if entry.partition("/")[0] == style] for style in styles]
    turns = [(number, paths[turn]) for turn in range(SHOWN) for number, paths in enumerate(found) if turn < len(paths)]
    return turns[:SHOWN]
