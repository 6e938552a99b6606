"""Transfers in a few lines of Python, of what export.py wrote or of a checkpoint.

from isonext import FlowStylePipeline

pipeline = FlowStylePipeline.from_pretrained("my_model")
pipeline("cat.jpg", source="photo", target="painting").save("painted.png")
"""

from pathlib import Path
from typing import Any

import torch
from PIL import Image

from isonext.data import images
from isonext.inference.options import NetworkOptions, SettingsOptions
from isonext.inference.plan import open_pipeline, resolve_settings
from isonext.pipeline import Pipeline


class FlowStylePipeline:
    """Picture in, picture out: what inference.py does with one, with the same bits. Errors are `UserError`s."""

    def __init__(self, pipeline: Pipeline, trained: dict[str, Any]) -> None:
        """`trained`: the config of the network, as a tree."""
        self.pipeline, self.trained = pipeline, trained

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,  # of export.py; or a checkpoint
        device: str = "auto",  # or cpu, cuda, cuda:1, mps
        autoencoder: str | None = None,  # where it lies here, if its name in the model does not lead to it
    ) -> "FlowStylePipeline":
        return cls(*open_pipeline(NetworkOptions(str(folder), device, autoencoder=autoencoder)))

    @property
    def styles(self) -> list[str]:
        """The names, in the order of their ids."""
        return self.pipeline.spec.styles

    def __call__(
        self,
        picture: Image.Image | str | Path,  # of any size
        source: str,  # its style, by name or by id
        target: str,
        strength: float = 1.0,  # 0 keeps the picture, 1 is the full transfer
        cfg_scale: float | str | None = None,  # guidance, 1 is none; "auto": as measured; None: the model's own
        num_steps: int | None = None,  # solver steps a leg; None: the model's own
    ) -> Image.Image:
        """The picture in the target style, 8-bit RGB of the same size."""
        asked = {"cfg_scale": cfg_scale, "num_steps": num_steps}
        flags = {name: value for name, value in asked.items() if value is not None}
        options, pipeline = SettingsOptions(flags=flags, strength=strength), self.pipeline
        settings = resolve_settings(options, self.trained, str(pipeline.path), front=pipeline.front, tell=False)
        pipeline.check_settings(settings)
        styles = pipeline.spec.style_id(str(source)), pipeline.spec.style_id(str(target))
        if isinstance(picture, Image.Image):
            path, rgb = Path("the picture"), images.convert_picture(picture)
        else:
            path, rgb = Path(picture), images.open_picture(picture)
        pipeline.check_size(path, rgb.size)
        latents = pipeline.encode(images.to_pixels(torch.stack([images.to_bytes(rgb)])))
        done = pipeline.transfer(latents, *styles, settings)
        return images.to_picture(pipeline.decode(done.latents, rgb.height, rgb.width)[0])
