"""--format onnx: the network and the autoencoder's halves as files of ONNX, each checked against PyTorch.

    velocity.onnx   x (batch, C, height, width), t (batch,), style (batch,) int64 -> v: one evaluation of the network
    encoder.onnx    pixels (batch, 3, H, W) in [-1, 1], sides that the factor divides -> standardised latents
    decoder.onnx    standardised latents -> pixels, not clipped

All numbers are float32; all sizes are free, but those that the network or the autoencoder has fixed. What else a
receiver needs, such as the styles, stands in config.json, under "latents".
"""

import contextlib
import importlib.util
import json
import logging
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from isonext.checkpoint import Checkpoint, load_model
from isonext.data.autoencoder import Autoencoder, DiffusersAutoencoder
from isonext.data.model_folder import CONFIG
from isonext.data.store import LatentSpec
from isonext.errors import UserError, first_line
from isonext.export.options import ExportOptions
from isonext.pipeline import load_codec
from isonext.utils.device import device_name
from model import VelocityNetwork

OF_THE_AUTOENCODER = ("encoder", "decoder")
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
OLDEST_OPSET = 18  # that torch has operators for
MOST_OFF = 1e-3  # rms of the difference to PyTorch
TIMED_S = 0.5
TRACED, CHECKED = (8, 6), (5, 9)  # cells of the examples
Axes = dict[int, str]  # of a tensor: which may have any length, and what it is called
SPACE: Axes = {0: "batch", 2: "height", 3: "width"}


@dataclass
class Part:
    """One file: what is in it, and what goes in. Another network of a leg is one more of these."""

    name: str
    says: str  # for the card
    module: nn.Module
    inputs: Callable[[int, tuple[int, ...]], dict[str, Tensor]]  # an example of so many pictures, of so many cells
    axes: dict[str, Axes]
    output: str


class Encoder(nn.Module):
    def __init__(self, codec: Autoencoder, spec: LatentSpec) -> None:
        super().__init__()
        # Without its splitting of large batches, which depends on memory and cannot be traced.
        self.work = codec._encode if isinstance(codec, DiffusersAutoencoder) else codec.encode
        self.codec, self.spec = codec, spec

    def forward(self, pixels: Tensor) -> Tensor:
        return self.spec.standardise(self.work(pixels))


class Decoder(nn.Module):
    def __init__(self, codec: Autoencoder, spec: LatentSpec) -> None:
        super().__init__()
        self.work = codec._decode if isinstance(codec, DiffusersAutoencoder) else codec.decode
        self.codec, self.spec = codec, spec

    def forward(self, latents: Tensor) -> Tensor:
        return self.work(self.spec.restore(latents))


def check_packages(opset: int | None) -> None:
    """UserError where one is missing, or the opset is none that there could be."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"--format onnx needs {', '.join(missing)}: pip install -r requirements/export.txt")
    import onnx

    newest = onnx.defs.onnx_opset_version()
    if opset is not None and not OLDEST_OPSET <= opset <= newest:
        raise UserError(f"--opset {opset}: there is {OLDEST_OPSET} to {newest} here; leave it out for the usual one")


def write_parts(options: ExportOptions, checkpoint: Checkpoint, config: dict[str, Any], folder: Path) -> dict[str, str]:
    """File -> what it is and what was measured of it. What of the autoencoder cannot be had is told, and left out."""
    cpu, spec = torch.device("cpu"), checkpoint.latents
    model = load_model(checkpoint, options.checkpoint, cpu)
    codec = load_codec(spec, cpu, options.checkpoint, options.autoencoder)
    if isinstance(codec, DiffusersAutoencoder):
        codec.bf16_encode = codec.bf16_decode = False
    known = {"latents": asdict(spec) | {"autoencoder": config["autoencoder"]["name"]}, "step": checkpoint.step}
    written = {}
    for part in (network_part(model, spec), *autoencoder_parts(codec, spec)):
        path = folder / f"{part.name}.onnx"
        try:
            measured = write_part(part, path, options.opset, spec.space)
        except Exception as error:
            reason = first_line(error).removeprefix(f"{path.name}: ")
            if part.name not in OF_THE_AUTOENCODER:
                raise UserError(f"{path.name}: cannot be had as ONNX ({reason})") from error
            path.unlink(missing_ok=True)
            print(f"{path.name}: cannot be had as ONNX ({reason}); left out")
            continue
        print(f"{path.name}: {measured}")
        written[path.name] = f"{part.says}; {measured}"
    (folder / CONFIG).write_text(json.dumps(config | known, indent=2) + "\n", encoding="utf-8")
    return written


def network_part(model: VelocityNetwork, spec: LatentSpec) -> Part:
    """One evaluation of the network, on latents of any size where the network takes any."""
    free = SPACE if model.size is None else {0: "batch"}

    def inputs(batch: int, cells: tuple[int, ...]) -> dict[str, Tensor]:
        x = torch.randn(batch, spec.channels, *(model.size or cells))
        return {"x": x, "t": torch.rand(batch), "style": torch.arange(batch) % len(spec.styles)}

    axes = {"x": free, "t": {0: "batch"}, "style": {0: "batch"}}
    return Part("velocity", "v of x, t and style: one evaluation of the network", model, inputs, axes, "v")


def autoencoder_parts(codec: Autoencoder, spec: LatentSpec) -> list[Part]:
    """Pixels in [-1, 1] to the network's standardised latents, and back."""
    free = SPACE if codec.side is None else {0: "batch"}
    fixed = None if codec.side is None else (codec.side // codec.factor,) * 2

    def pixels(batch: int, cells: tuple[int, ...]) -> dict[str, Tensor]:
        sides = (side * codec.factor for side in fixed or cells)
        return {"pixels": torch.rand(batch, 3, *sides) * 2 - 1}

    def latents(batch: int, cells: tuple[int, ...]) -> dict[str, Tensor]:
        return {"latents": torch.randn(batch, codec.channels, *(fixed or cells))}

    there = f"pixels in [-1, 1], of sides that {codec.factor} divides, to the network's latents"
    encoder = Part("encoder", there, Encoder(codec, spec), pixels, {"pixels": free}, "latents")
    back = "the network's latents to pixels, not clipped"
    return [encoder, Part("decoder", back, Decoder(codec, spec), latents, {"latents": free}, "pixels")]


def write_part(part: Part, path: Path, opset: int | None, space: tuple[int, ...]) -> str:
    """Export, check and time; returns what was measured. UserError where ONNX Runtime gives other numbers."""
    with quiet(), torch.no_grad():
        example = part.inputs(2, TRACED)
        program = torch.onnx.export(
            part.module,
            tuple(example.values()),
            input_names=list(example),
            output_names=[part.output],
            dynamic_shapes=tuple(part.axes.values()),
            opset_version=opset,
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    got = program.model.opset_imports[""]
    if opset not in (None, got):
        raise UserError(f"--opset {opset}: torch cannot write {part.name} with it, but with {got}; leave it out")
    forget_sources(program.model)
    program.save(path)
    session = open_session(path)
    off = difference(session, part)
    if not off < MOST_OFF:
        raise UserError(f"{path.name}: ONNX Runtime is {off:.1e} (rms) off PyTorch, at most {MOST_OFF} is allowed")
    megabytes = sum(file.stat().st_size for file in path.parent.glob(f"{path.name}*")) / 1e6
    said = f"{megabytes:.3g} MB, opset {got}, {off:.1e} (rms) off PyTorch"
    return f"{said}, {rate(session, part, space):.3g} pictures a second ({device_name(torch.device('cpu'))})"


def forget_sources(model: Any) -> None:
    """Take out where on this machine the lines of code lie that an operator comes from."""
    graphs = [model.graph, *(function.graph for function in model.functions.values())]
    for graph in graphs:
        graph.metadata_props.clear()
        for node in graph.all_nodes():
            node.metadata_props.clear()
            node.doc_string = None


def open_session(path: Path) -> Any:
    import onnxruntime

    try:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 3
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise UserError(
            f"{path.name}: ONNX Runtime does not take it ({first_line(error)}); try another --opset"
        ) from None


def difference(session: Any, part: Part) -> float:
    """The rms between ONNX Runtime and PyTorch, of another batch and size than the traced ones."""
    with torch.no_grad():
        inputs = part.inputs(3, CHECKED)
        expected = part.module(*inputs.values())
    found = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})[0]
    return (torch.from_numpy(found) - expected).double().square().mean().sqrt().item()


def rate(session: Any, part: Part, space: tuple[int, ...]) -> float:
    """Pictures of the training size a second, one at a time."""
    inputs = {name: tensor.numpy() for name, tensor in part.inputs(1, space).items()}
    session.run(None, inputs)
    count, started = 0, time.perf_counter()
    while (passed := time.perf_counter() - started) < TIMED_S:
        session.run(None, inputs)
        count += 1
    return count / passed


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Within, the exporters do not tell of their ways; what comes of them is checked."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
