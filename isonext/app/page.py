"""The page: the choice of a checkpoint, and a tab for each thing to do."""

from pathlib import Path
from typing import Any

import gradio as gr
from starlette.middleware import Middleware

from isonext.app.options import AppOptions
from isonext.app.parts import NOT_ASKED, choice, chosen_of
from isonext.app.runs import list_checkpoints
from isonext.app.sample_tab import SampleTab
from isonext.app.server import IN_LINE, MOST_BYTES, Gate
from isonext.app.studio import KEEP_S, Studio
from isonext.app.train_tab import TrainTab
from isonext.app.transfer_tab import TransferTab
from isonext.app.words import say, translations

CLEAN_EVERY_S = 600
FONTS = ["system-ui", "Noto Sans CJK SC", "sans-serif"]  # of the system: nothing is fetched
MONO = ["ui-monospace", "monospace"]
STYLE = """
.gradio-container { width: 100%; max-width: 1280px !important; margin: 0 auto; }
#refresh { align-self: center; flex-grow: 0; }
#report textarea, #kept_report textarea, #log textarea, #commands textarea, #found textarea {
  font-family: var(--font-mono); font-size: var(--text-xs); }
#found textarea { white-space: pre; overflow-x: auto; }
#files .empty, #kept_files .empty { min-height: 5rem; }
#figures { overflow-x: auto; }
#figures table, #figures th, #figures td {
  border-color: var(--border-color-primary); padding: 2px 8px; white-space: nowrap; }
"""


def build_page(options: AppOptions, folder: Path) -> gr.Blocks:
    """The page, not served yet; results go to `folder`."""
    studio = Studio(options.runs, folder / "results", options.device)
    words = gr.I18n(**translations())

    def look(chosen: str | None, request: gr.Request) -> tuple:
        """The checkpoints that there are now; what was chosen stays, if it is still there."""
        choices = list_checkpoints(options.runs)
        sentence = "" if choices else say("no_runs", request.headers, options.runs)
        return gr.Dropdown(choices, value=chosen_of(choices, chosen)), gr.Markdown(sentence, visible=not choices)

    with gr.Blocks(title="IsoNext-Flow", analytics_enabled=False, delete_cache=(CLEAN_EVERY_S, KEEP_S)) as page:
        with gr.Row():
            checkpoint = choice(
                gr.Dropdown([], label=words("checkpoint"), scale=4, min_width=240, elem_id="checkpoint")
            )
            refresh = gr.Button(words("refresh"), min_width=120, size="md", elem_id="refresh")
        nothing = gr.Markdown(visible=False, elem_id="nothing")
        with gr.Tabs():
            with gr.Tab(words("transfer"), id="transfer") as transfers:
                first = TransferTab(studio, words, checkpoint)
            with gr.Tab(words("train"), id="train") as training:
                TrainTab(studio, words, options, [training.select, refresh.click])
            with gr.Tab(words("sample"), id="sample"):
                last = SampleTab(studio, words, checkpoint)
        looked, lists = [page.load, refresh.click, transfers.select], [checkpoint, nothing]
        seen = gr.on(looked, look, checkpoint, lists, queue=False, **NOT_ASKED)
        first.settle_late(seen)
        last.settle_late(seen, first.source)
    page.queue(api_open=False, max_size=IN_LINE)
    page.words = words
    return page


def launch(page: gr.Blocks, options: AppOptions) -> Any:
    """Serve the page from a thread; only what it made itself, and what was sent to it, can be asked for."""
    page.launch(
        server_name=options.host,
        server_port=options.port,
        share=options.share,
        prevent_thread_lock=True,
        max_file_size=MOST_BYTES,
        enable_monitoring=False,
        run_history=False,
        mcp_server=False,
        pwa=False,
        ssr_mode=False,
        footer_links=["api", "settings"],
        app_kwargs={"middleware": [Middleware(Gate)]},
        i18n=page.words,
        theme=gr.themes.Default(font=FONTS, font_mono=MONO),
        css=STYLE,
    )
    return page
