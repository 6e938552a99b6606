"""What the tests of solvers and of transfers share: fields with known answers, a small network, states."""

import torch

from isonext.models.flow_map import FlowMap, Pair
from model import IsoNext

ORDER = {"euler": 1, "midpoint": 2, "heun": 2, "rk4": 4, "alf": 2}
EVALUATIONS = {"euler": lambda n: n, "midpoint": lambda n: 2 * n, "heun": lambda n: 2 * n, "rk4": lambda n: 4 * n}
EVALUATIONS["alf"] = lambda n: n + 1  # and one for the defect, where it is asked for


class Zero:
    null_style = 2

    def __call__(self, x, t, style):
        return torch.zeros_like(x)


CHANNELS, SIZE, PICTURES = 3, 5, 2
A, B, C = (torch.full((PICTURES,), style) for style in range(3))


class Bf16:
    """A small IsoNext with random weights, none of them zero, run under bf16 autocast."""

    def __init__(self):
        torch.manual_seed(0)
        self.net = IsoNext(CHANNELS, 3, hidden_dim=16, num_layers=2, style_dim=8, time_dim=16, num_groups=4).eval()
        for parameter in self.net.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        self.null_style = self.net.null_style
        self.map = FlowMap(CHANNELS, 3, hidden_dim=16, num_layers=2, style_dim=8, time_dim=16, num_groups=4).eval()
        for parameter in self.map.parameters():
            torch.nn.init.normal_(parameter, std=0.2)

    @torch.inference_mode()
    def __call__(self, x, t, style):
        with torch.autocast("cpu", torch.bfloat16):
            return self.net(x, t, style)

    @torch.inference_mode()
    def embed(self, style):
        return self.net.embed(style)

    @torch.inference_mode()
    def map_velocity(self, x, t, source, target, scale):
        with torch.autocast("cpu", torch.bfloat16):
            return self.map(x, t, Pair(source, target, scale))

    @torch.inference_mode()
    def map_embed(self, style):
        return self.map.embed(style)

    def x0(self, noise, x1, style):
        return noise


MODEL = Bf16()


def picture(seed):
    return torch.randn(PICTURES, CHANNELS, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


def same(a, b):
    return torch.equal(a.position, b.position) and torch.equal(a.defect, b.defect)
