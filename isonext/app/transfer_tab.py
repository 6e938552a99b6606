"""The tab that transfers pictures."""

import html
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr

from isonext.app.parts import DEVICE, NOT_ASKED, choice, number_in, sent, told
from isonext.app.studio import MOST_STEPS, Order, Outcome, Studio
from isonext.app.words import say
from isonext.config import InferenceConfig
from isonext.errors import UserError
from isonext.inference.options import LARGEST_SIDE

METHODS = InferenceConfig.__dataclass_fields__["method"].metadata["choices"]
LARGEST_SCALE = 10.0
BUTTONS = ["download", "fullscreen"]  # and none to share it with a hub


class TransferTab:
    """Builds the tab into the page under construction; `checkpoint` is the choice above the tabs."""

    def __init__(self, studio: Studio, words: Callable[[str], Any], checkpoint: gr.Dropdown) -> None:
        self.studio, self.words, self.checkpoint = studio, words, checkpoint
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                self._build_inputs()
            with gr.Column(scale=3, min_width=320):
                self._build_outputs()
        with gr.Accordion(words("kept"), open=False):
            self._build_kept()
        self._wire()

    def _build_inputs(self) -> None:
        words = self.words
        self.picture = sent(
            gr.Image(label=words("picture"), sources=["upload", "clipboard"], height=260, elem_id="picture")
        )
        with gr.Row():
            self.source = choice(gr.Dropdown([], label=words("source"), min_width=140))
            self.target = choice(gr.Dropdown([], label=words("target"), min_width=140))
        self.guessed = gr.Markdown()
        self.strength = gr.Slider(0, 1, 1, step=0.01, label=words("strength"), info=words("strength_info"))
        self.scale = gr.Slider(
            0, LARGEST_SCALE, 2, step=0.1, label=words("scale"), info=words("scale_info"), elem_id="scale"
        )
        self.auto = gr.Checkbox(label=words("auto"), visible=False)
        with gr.Accordion(words("more"), open=False):
            self.method = gr.Dropdown(list(METHODS), value=METHODS[0], label=words("method"))
            self.steps = gr.Slider(1, MOST_STEPS, 20, step=1, label=words("steps"))
            self.floor = gr.Slider(0, 1, 0, step=0.01, label=words("floor"))
            self.size = gr.Number(0, label=words("size"), precision=0, minimum=0, maximum=LARGEST_SIDE)
            self.certify = gr.Checkbox(True, label=words("certify"))
            self.deep = gr.Checkbox(False, label=words("deep"))
        with gr.Row():
            self.go = gr.Button(words("go"), variant="primary", min_width=120)
            self.all = gr.Button(words("all_styles"), min_width=120)

    def _build_outputs(self) -> None:
        words = self.words
        self.slider = gr.ImageSlider(
            label=words("before_after"), type="filepath", interactive=False, max_height=640, elem_id="slider"
        )
        self.report = gr.Textbox(
            label=words("report"), lines=2, max_lines=8, interactive=False, buttons=["copy"], elem_id="report"
        )
        self.files = gr.File(label=words("files"), file_count="multiple", interactive=False, elem_id="files")
        self.gallery = gr.Gallery(
            label=words("gallery"), columns=3, object_fit="contain", visible=False, elem_id="gallery"
        )

    def _build_kept(self) -> None:
        words = self.words
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                self.structure = sent(
                    gr.File(label=words("structure"), file_types=[".safetensors"], height=140, elem_id="structure")
                )
                with gr.Row():
                    self.onward = gr.Button(words("onward"), min_width=120)
                    self.back = gr.Button(words("back"), min_width=120)
            with gr.Column(scale=3, min_width=320):
                self.kept = gr.Image(
                    label=words("kept_result"), type="filepath", interactive=False, buttons=BUTTONS, elem_id="kept"
                )
                self.kept_report = gr.Textbox(
                    label=words("report"), lines=2, interactive=False, buttons=["copy"], elem_id="kept_report"
                )
                self.kept_files = gr.File(
                    label=words("files"), file_count="multiple", interactive=False, elem_id="kept_files"
                )

    def _wire(self) -> None:
        guidance = [self.scale, self.auto]
        inputs = [self.checkpoint, self.picture, self.source, self.target, self.strength, *guidance]
        inputs += [self.method, self.steps, self.floor, self.size, self.certify, self.deep]
        of_all = [part for part in inputs if part is not self.target]
        outputs = [self.slider, self.report, self.files]
        shown = gr.State(False)
        done = self.go.click(self.transfer, inputs, outputs, api_name="transfer", **DEVICE)
        done.success(lambda: True, None, shown, **NOT_ASKED)
        self.all.click(
            lambda: gr.Gallery(visible=True), None, self.gallery, queue=False, **NOT_ASKED
        ).then(self.all_styles, of_all, [self.gallery, self.report], api_name="all_styles", **DEVICE)  # fmt: skip
        followed = (self.strength, self.scale, self.auto, self.steps, self.floor, self.target, self.source, self.method)
        moved = [part.input for part in followed]
        gr.on(moved, self.follow, [shown, *inputs], outputs, trigger_mode="always_last", **DEVICE, **NOT_ASKED)
        settings = [self.source, self.target, self.method, self.steps, self.scale, self.auto, self.guessed]
        self.checkpoint.change(self.settle, [self.checkpoint, self.picture], settings, **DEVICE, **NOT_ASKED)
        self.settings = settings
        dropped = [self.checkpoint, self.picture, self.target]
        guessed = [self.source, self.target, self.guessed, shown]
        self.picture.change(self.guess, dropped, guessed, show_progress_on=self.guessed, **DEVICE, **NOT_ASKED)
        kept = [self.kept, self.kept_report, self.kept_files]
        of_file = [self.checkpoint, self.structure, self.target, *guidance, self.deep]
        self.onward.click(self.restyle, of_file, kept, api_name="restyle", **DEVICE)
        self.back.click(self.restore, [self.checkpoint, self.structure, self.deep], kept, api_name="restore", **DEVICE)

    #############################################################################
    #                                What is done                               #
    #############################################################################

    def transfer(
        self,
        checkpoint: str,
        picture: Path,
        source: str,
        target: str,
        strength: float = 1.0,
        scale: float = 2.0,
        auto: bool = False,
        method: str = METHODS[0],
        steps: int = 20,
        floor: float = 0.0,
        size: int = 0,
        certify: bool = True,
        deep: bool = False,
        request: gr.Request | None = None,
    ) -> tuple:
        """Transfer a picture: [the picture and the result], what was done, [the result, its structure file]."""
        values = (checkpoint, picture, source, target, strength, scale, auto, method, steps, floor, size, certify, deep)
        return self._shown(values, request)

    def follow(self, shown: bool, request: gr.Request, *values: Any) -> Any:
        """The same where a setting was moved under a picture that was transferred already."""
        return self._shown(values, request) if shown and values[1] else (gr.skip(),) * 3

    def _shown(self, values: tuple, request: gr.Request | None) -> tuple:
        outcome, lines = told(self._run, values, request)
        files = [outcome.after[0][0], *([outcome.structure] if outcome.structure else [])]
        return (str(outcome.before), str(outcome.after[0][0])), "\n".join(lines), list(map(str, files))

    def all_styles(
        self,
        checkpoint: str,
        picture: Path,
        source: str,
        strength: float = 1.0,
        scale: float = 2.0,
        auto: bool = False,
        method: str = METHODS[0],
        steps: int = 20,
        floor: float = 0.0,
        size: int = 0,
        certify: bool = True,
        deep: bool = False,
        request: gr.Request | None = None,
    ) -> tuple:
        """A picture in all styles: [(result, style), ...], what was done."""
        values = (checkpoint, picture, source, "all", strength, scale, auto, method, steps, floor, size, certify, deep)
        outcome, lines = told(self._run, values, request)
        return [(str(path), style) for path, style in outcome.after], "\n".join(lines)

    def _run(self, values: tuple, request: gr.Request | None) -> tuple[Outcome, list[str]]:
        checkpoint, picture, source, target, strength, scale, auto, method, steps, floor, size, certify, deep = values
        headers = request.headers if request else None
        if picture is None:
            raise UserError(say("give_picture", headers))
        flags = {**guidance_flags(scale, auto), "method": method}
        flags["num_steps"] = int(number_in("steps", steps, 1, MOST_STEPS))
        floor = number_in("structure", floor or 0, 0, 1)
        order = Order(
            *(checkpoint, picture, str(source), str(target), number_in("strength", strength, 0, 1)),
            *(int(number_in("size", size or 0, 0, LARGEST_SIDE)) or None, flags, floor or None),
            *(certify is True, deep is True),
        )
        started = time.perf_counter()
        outcome = self.studio.do(self.studio.transfer, order)
        lines = [say("evaluations", headers, outcome.nfe, time.perf_counter() - started), *outcome.lines]
        if certify and not any(line.startswith("certificate") for line in lines):
            lines.append(say("no_certificate", headers, method))
        return outcome, lines

    def restyle(
        self,
        checkpoint: str,
        structure: Path,
        target: str,
        scale: float = 2.0,
        auto: bool = False,
        deep: bool = False,
        request: gr.Request | None = None,
    ) -> tuple:
        """A structure file in another style: the result, what was done, [the result]."""

        def work() -> Outcome:
            flags = guidance_flags(scale, auto)
            return self.studio.do(
                *(self.studio.restyle, checkpoint, self._given(structure, request), str(target), flags, deep is True)
            )

        return _kept(told(work))

    def restore(self, checkpoint: str, structure: Path, deep: bool = False, request: gr.Request | None = None) -> tuple:
        """A structure file back to the picture that it was made of: the picture, the certificate, [the picture]."""

        def work() -> Outcome:
            return self.studio.do(self.studio.restore, checkpoint, self._given(structure, request), deep is True)

        return _kept(told(work))

    def _given(self, structure: Path | None, request: gr.Request | None) -> Path:
        if structure is None:
            raise UserError(say("give_structure", request.headers if request else None))
        return structure

    #############################################################################
    #                        What the page fills in by itself                   #
    #############################################################################

    def settle(self, checkpoint: str | None, picture: Path | None, request: gr.Request) -> tuple:
        """The styles and the settings of a checkpoint that was chosen; why not, in place of the guess."""
        if not checkpoint:
            return (gr.skip(),) * 7
        try:
            loaded = self.studio.do(self.studio.open, checkpoint)
            guessed = self._guess(checkpoint, picture, request)
        except UserError as error:
            return *(gr.skip(),) * 6, html.escape(str(error))
        styles, inference, front = loaded.styles, loaded.trained["inference"], loaded.pipeline.front
        auto = inference["cfg_scale"] == "auto"
        scale = front.get("scale", 2.0) if auto else inference["cfg_scale"]
        return (
            gr.Dropdown(styles, value=guessed[0] or styles[0]),
            gr.Dropdown(styles, value=guessed[1] or styles[-1]),
            inference["method"],
            min(MOST_STEPS, inference["num_steps"]),
            min(LARGEST_SCALE, scale),
            gr.Checkbox(visible=bool(front), value=auto and bool(front)),
            guessed[2],
        )

    def settle_late(self, looked: Any) -> None:
        """Behind the event `looked`, settle what could not be when the checkpoint was chosen, for a training."""

        def settle(source: str | None, checkpoint: str | None, picture: Path | None, request: gr.Request) -> tuple:
            return (gr.skip(),) * 7 if source else self.settle(checkpoint, picture, request)

        looked.then(settle, [self.source, self.checkpoint, self.picture], self.settings, **DEVICE, **NOT_ASKED)

    def guess(self, checkpoint: str | None, picture: Path | None, target: str | None, request: gr.Request) -> tuple:
        """The style of a picture that was dropped, how sure that is, and another one to give it; results are not for
        this picture any more."""
        if not (checkpoint and picture):
            return gr.skip(), gr.skip(), "", False
        try:
            style, other, sentence = self._guess(checkpoint, picture, request)
        except UserError as error:
            return gr.skip(), gr.skip(), html.escape(str(error)), False
        return style or gr.skip(), other if other and style == target else gr.skip(), sentence, False

    def _guess(self, checkpoint: str, picture: Path | None, request: gr.Request) -> tuple[str | None, str | None, str]:
        """The likeliest style, the next, and a sentence."""
        if picture is None:
            return None, None, ""
        losses = self.studio.do(self.studio.guess, checkpoint, picture)
        if len(losses) < 2:
            return None, None, say("not_guessed", request.headers)
        return losses[0][0], losses[1][0], say("guessed", request.headers, *losses[0], *losses[1])


def guidance_flags(scale: Any, auto: Any) -> dict[str, Any]:
    return {"cfg_scale": "auto" if auto is True else number_in("scale", scale, 0, LARGEST_SCALE)}


def _kept(outcome: Outcome) -> tuple:
    path = str(outcome.after[0][0])
    return path, "\n".join(outcome.lines), [path]
