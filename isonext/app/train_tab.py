"""The tab that trains: what a folder holds, the commands, and how a run is getting on."""

from collections.abc import Callable
from typing import Any

import gradio as gr
from pandas import DataFrame

from isonext.app.options import AppOptions
from isonext.app.parts import DEVICE, NOT_ASKED, choice, chosen_of, number_in, told
from isonext.app.progress import Progress, look_at
from isonext.app.recipes import Recipe, Training, list_configs, list_folders, plan_training
from isonext.app.runs import find_run, find_runs
from isonext.app.studio import Studio
from isonext.app.survey import survey_folder
from isonext.app.trainings import job_of, read_tail, start, stop
from isonext.app.words import say
from isonext.config import DataConfig, TrainingConfig
from isonext.data import images
from isonext.utils.device import pick_device

EVERY_S = 2.0  # that the page looks how a run is getting on
BOUNDS: dict[str, Any] = {
    "epochs": TrainingConfig.__dataclass_fields__["stage1_epochs"].metadata,
    "batch": TrainingConfig.__dataclass_fields__["batch_size"].metadata,
    "side": DataConfig.__dataclass_fields__["image_size"].metadata,
}
MOST = 10**6  # of a number without a bound of its own


class TrainTab:
    """Builds the tab into the page under construction; at the events `looked` it lists what there is to choose."""

    def __init__(self, studio: Studio, words: Callable[[str], Any], options: AppOptions, looked: list) -> None:
        self.studio, self.words, self.options = studio, words, options
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                self._build_recipe()
            with gr.Column(scale=3, min_width=320):
                self._build_progress()
        self._wire(looked)

    def _build_recipe(self) -> None:
        words = self.words
        self.nothing = gr.Markdown(visible=False)
        self.folder = choice(gr.Dropdown([], label=words("folder"), elem_id="folder"))
        self.config = choice(gr.Dropdown([], label=words("config"), elem_id="config"))
        with gr.Row():
            self.epochs = gr.Number(0, label=words("epochs"), precision=0, minimum=0, min_width=140, elem_id="epochs")
            self.batch = gr.Number(0, label=words("batch"), precision=0, minimum=0, min_width=140, elem_id="batch")
        self.side = gr.Number(0, label=words("side"), precision=0, minimum=0, elem_id="side")
        self.dct = gr.Checkbox(False, label=words("dct"), elem_id="dct")
        self.look = gr.Button(words("look"))
        self.found = gr.Textbox(label=words("found"), lines=4, max_lines=24, interactive=False, elem_id="found")
        self.commands = gr.Textbox(
            label=words("commands"), lines=2, interactive=False, buttons=["copy"], elem_id="commands"
        )
        with gr.Row():
            self.start = gr.Button(words("start"), variant="primary", min_width=120)
            self.stop = gr.Button(words("stop"), variant="stop", min_width=120)

    def _build_progress(self) -> None:
        words = self.words
        self.run = choice(gr.Dropdown([], label=words("run"), elem_id="run"))
        self.status = gr.Markdown(elem_id="status")
        self.losses = gr.LinePlot(label=words("losses"), x="step", y="loss", color="t", elem_id="losses")
        self.figures = gr.Markdown(label=words("figures"), show_label=True, container=True, elem_id="figures")
        self.previews = gr.Gallery(
            label=words("previews"), columns=2, object_fit="contain", interactive=False, elem_id="previews"
        )
        self.log = gr.Textbox(label=words("log"), lines=4, max_lines=12, interactive=False, elem_id="log")

    def _wire(self, looked: list) -> None:
        recipe = [self.folder, self.config, self.epochs, self.side, self.batch, self.dct]
        shown, timer = gr.State(None), gr.Timer(EVERY_S, active=False)
        progress = [shown, self.status, self.losses, self.figures, self.previews, self.log]
        lists = [self.nothing, self.folder, self.config, self.run, timer]
        quiet = NOT_ASKED | {"queue": False, "show_progress": "hidden"}
        gr.on(looked, self.list_all, [self.folder, self.config, self.run], lists, **quiet)
        for part in recipe:
            part.change(self.show_commands, recipe, self.commands, **quiet)
        self.look.click(self.survey, recipe, [self.found, self.commands], **DEVICE, **NOT_ASKED)
        self.start.click(self.begin, recipe, [self.run, self.commands], **DEVICE, **NOT_ASKED)
        self.stop.click(self.end, self.run, self.status, **quiet)
        gr.on([timer.tick, self.run.change], self.watch, [self.run, shown], progress, trigger_mode="once", **quiet)
        self.timer = timer

    #############################################################################
    #                                What is done                               #
    #############################################################################

    def list_all(self, folder: str | None, config: str | None, run: str | None, request: gr.Request) -> tuple:
        """What there is to choose; what was chosen stays, if it is still there."""
        root = self.options.pictures
        folders, configs = list_folders(root), [(name, name) for name in list_configs()]
        sentence = "" if folders else say("no_pictures", request.headers, root, root, root)
        return (
            gr.Markdown(sentence, visible=not folders),
            *(
                gr.Dropdown(choices, value=chosen_of(choices, value))
                for choices, value in ((folders, folder), (configs, config), (self._runs(), run))
            ),
            gr.Timer(active=True),
        )

    def show_commands(self, *recipe: Any) -> str:
        """The commands of what is chosen by now; nothing while it is not whole."""
        return told(self._plan, recipe).commands if recipe[0] and recipe[1] else ""

    def survey(self, *recipe: Any) -> tuple[str, str]:
        training = told(self._plan, recipe)
        device = pick_device(self.options.device)
        return told(self.studio.do, survey_folder, training, device), training.commands

    def begin(self, *recipe: Any) -> tuple:
        """Start once the device is free, and give its memory away."""
        training = told(self._plan, recipe)

        def work() -> None:
            self.studio.release()
            start(training)

        told(self.studio.do, work)
        return gr.Dropdown(self._runs(), value=training.name), training.commands

    def _runs(self) -> list[tuple[str, str]]:
        return [(found.title, found.name) for found in find_runs(self.options.runs)]

    def end(self, run: str, request: gr.Request) -> str:
        found = told(find_run, self.options.runs, run)
        told(stop, found.folder)
        return say("stopping" if job_of(found.folder).under_way else "at_rest", request.headers, found.title)

    def watch(self, run: str | None, shown: tuple | None, request: gr.Request) -> tuple:
        """How the run is getting on; what has not changed since is not sent again."""
        found = next((found for found in find_runs(self.options.runs) if found.name == run), None)
        if found is None:
            return (gr.skip(),) * 6
        progress, log = look_at(found, request.headers), read_tail(found.folder)
        now = run, progress, log
        if now == shown:
            return (gr.skip(),) * 6
        return (now, progress.sentence, *self._drawn(progress, shown[1] if shown and shown[0] == run else None), log)

    def _drawn(self, progress: Progress, before: Progress | None) -> tuple:
        """Curves, table and previews, each where it is new."""
        losses, table, sheets = gr.skip(), gr.skip(), gr.skip()
        if before is None or progress.losses != before.losses:
            losses = DataFrame(progress.losses)
        if before is None or progress.validation != before.validation:
            table = progress.validation
        if before is None or progress.previews != before.previews:
            sheets = [(images.open_picture(path), path.stem.removeprefix("preview_")) for path in progress.previews]
        return losses, table, sheets

    def _plan(self, values: tuple) -> Training:
        folder, config, epochs, side, batch, dct = values
        counts = {
            name: int(number_in(name, value or 0, 0, BOUNDS[name]["high"] or MOST)) or None
            for name, value in (("epochs", epochs), ("side", side), ("batch", batch))
        }
        recipe = Recipe(folder, config, counts["epochs"], counts["side"], counts["batch"], dct is True)
        return plan_training(recipe, self.options.pictures, self.options.runs)
