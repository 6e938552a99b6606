"""The tab that makes pictures from noise."""

from collections.abc import Callable
from typing import Any

import gradio as gr

from isonext.app.parts import DEVICE, NOT_ASKED, choice, number_in, told
from isonext.app.studio import MOST_SAMPLES, MOST_STEPS, Studio
from isonext.app.transfer_tab import BUTTONS, LARGEST_SCALE, METHODS, guidance_flags
from isonext.errors import UserError

SOLVERS = [method for method in METHODS if method != "flowedit"]  # which changes pictures, and here is none
LARGEST_SEED = 2**31


class SampleTab:
    """Builds the tab into the page under construction; `checkpoint` is the choice above the tabs."""

    def __init__(self, studio: Studio, words: Callable[[str], Any], checkpoint: gr.Dropdown) -> None:
        self.studio = studio
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                styles = choice(gr.Dropdown([], multiselect=True, label=words("styles"), elem_id="styles"))
                count = gr.Slider(1, 16, 4, step=1, label=words("count"), elem_id="count")
                seed = gr.Number(0, label=words("seed"), precision=0, minimum=0, elem_id="seed")
                scale = gr.Slider(0, LARGEST_SCALE, 2, step=0.1, label=words("scale"), info=words("scale_info"))
                with gr.Accordion(words("more"), open=False):
                    method = gr.Dropdown(SOLVERS, value=SOLVERS[0], label=words("method"))
                    steps = gr.Slider(1, MOST_STEPS, 20, step=1, label=words("steps"))
                go = gr.Button(words("generate"), variant="primary", elem_id="generate")
            with gr.Column(scale=3, min_width=320):
                grid = gr.Image(
                    label=words("grid"),
                    show_label=False,
                    type="filepath",
                    interactive=False,
                    buttons=BUTTONS,
                    elem_id="grid",
                )
                singles = gr.Gallery(label=words("singles"), columns=4, object_fit="contain", elem_id="singles")
        inputs = [checkpoint, styles, count, seed, scale, method, steps]
        go.click(self.sample, inputs, [grid, singles], api_name="sample", **DEVICE)
        self.checkpoint, self.settings = checkpoint, [styles, scale, method, steps]
        checkpoint.change(self.settle, checkpoint, self.settings, **DEVICE, **NOT_ASKED)

    def settle_late(self, looked: Any, source: gr.Dropdown) -> None:
        """As in the tab of transfers, where `source` tells whether it was settled."""

        def settle(source: str | None, checkpoint: str | None) -> tuple:
            return (gr.skip(),) * 4 if source else self.settle(checkpoint)

        looked.then(settle, [source, self.checkpoint], self.settings, **DEVICE, **NOT_ASKED)

    def sample(
        self,
        checkpoint: str,
        styles: list[str] | None = None,
        count: int = 4,
        seed: int = 0,
        scale: float = 2.0,
        method: str = SOLVERS[0],
        steps: int = 20,
    ) -> tuple:
        """Pictures from noise, some of each style: the sheet, [(picture, style), ...]."""

        def work() -> tuple:
            flags = guidance_flags(scale, False) | {"method": method}
            flags["num_steps"] = int(number_in("steps", steps, 1, MOST_STEPS))
            numbers = int(number_in("count", count, 1, MOST_SAMPLES)), int(number_in("seed", seed, 0, LARGEST_SEED))
            return self.studio.do(self.studio.sample, checkpoint, list(map(str, styles or [])), *numbers, flags)

        sheet, samples = told(work)
        return str(sheet), [(str(path), style) for path, style in samples]

    def settle(self, checkpoint: str | None) -> tuple:
        """The styles and the settings of a checkpoint that was chosen."""
        try:
            loaded = self.studio.do(self.studio.open, checkpoint)
        except UserError:  # the tab of transfers says why
            return (gr.skip(),) * 4
        inference = loaded.trained["inference"]
        scale = 2.0 if inference["cfg_scale"] == "auto" else inference["cfg_scale"]
        method = inference["method"] if inference["method"] in SOLVERS else SOLVERS[0]
        steps = min(MOST_STEPS, inference["num_steps"])
        return gr.Dropdown(loaded.styles, value=[]), min(LARGEST_SCALE, scale), method, steps
