"""A node for ComfyUI: a picture in another style, by a model of export.py.

Copy this file to ComfyUI/custom_nodes/, and install the program into the Python that runs ComfyUI:
pip install FOLDER_OF_THIS_REPOSITORY. The node then is under image/style.
"""

import functools
import os

import numpy as np
import torch
from PIL import Image


@functools.lru_cache(maxsize=1)  # a workflow that runs again has its model still
def load(model: str, autoencoder: str, changed: float):
    from isonext import FlowStylePipeline

    return FlowStylePipeline.from_pretrained(model, autoencoder=autoencoder or None)


def to_picture(image: torch.Tensor) -> Image.Image:
    """(H, W, C) in [0, 1], the first three channels -> 8-bit RGB."""
    values = image[..., :3].cpu().float().clamp(0, 1).mul(255).round().to(torch.uint8)
    return Image.fromarray(values.numpy())


class IsoNextStyleTransfer:
    """Images (B, H, W, C) in [0, 1] -> the same in the target style, (B, H, W, 3), on the CPU as ComfyUI has them."""

    CATEGORY = "image/style"
    FUNCTION = "transfer"
    RETURN_TYPES = ("IMAGE",)
    RETURN_NAMES = ("image",)
    DESCRIPTION = "Style transfer by flow matching that keeps the picture"

    @classmethod
    def INPUT_TYPES(cls):
        own = "the model's own"
        return {
            "required": {
                "image": ("IMAGE",),
                "model": ("STRING", {"default": "models/isonext/painter", "tooltip": "a folder of export.py"}),
                "source": ("STRING", {"default": "photo", "tooltip": "the image's style, by name or id"}),
                "target": ("STRING", {"default": "painting", "tooltip": "the style to give it, by name or id"}),
                "strength": ("FLOAT", {"default": 1.0, "min": 0.0, "max": 1.0, "step": 0.05}),
                "cfg_scale": (
                    "FLOAT",
                    {"default": -1.0, "min": -1.0, "max": 20.0, "step": 0.1, "tooltip": f"-1: {own}"},
                ),
                "num_steps": ("INT", {"default": 0, "min": 0, "max": 1000, "tooltip": f"0: {own}"}),
            },
            "optional": {
                "autoencoder": ("STRING", {"default": "", "tooltip": "its folder, where the model does not find it"}),
            },
        }

    def transfer(self, image, model, source, target, strength, cfg_scale, num_steps, autoencoder=""):
        changed = os.path.getmtime(model) if os.path.exists(model) else 0.0  # a model exported anew is loaded anew
        pipeline = load(model, autoencoder, changed)
        settings = {
            "strength": strength,
            "cfg_scale": None if cfg_scale < 0 else cfg_scale,
            "num_steps": num_steps or None,
        }
        results = [pipeline(to_picture(one), source, target, **settings) for one in image]
        return (torch.stack([torch.from_numpy(np.asarray(result).astype(np.float32) / 255) for result in results]),)


NODE_CLASS_MAPPINGS = {"IsoNextStyleTransfer": IsoNextStyleTransfer}
NODE_DISPLAY_NAME_MAPPINGS = {"IsoNextStyleTransfer": "IsoNext Style Transfer"}
