"""The docs say what is true: paths, flags, keys, links and anchors exist; twins agree; the config pages are fresh."""

import argparse
import dataclasses
import functools
import importlib
import itertools
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

import isonext
from helpers import ROOT
from isonext.config import DOCS, Config, config_page

PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "docs/*.md", "examples/*/*.md")
    for path in ROOT.glob(pattern)
)
TWINS = [page for page in PAGES if (ROOT / page).with_name(Path(page).stem + "_zh.md").exists()]
KEYS = {
    f"{section.name}.{entry.name}"
    for section in dataclasses.fields(Config)
    for entry in dataclasses.fields(section.type)
}
COMMANDS = sorted(
    path.relative_to(ROOT).with_suffix("").as_posix()
    for pattern in ("*.py", "benchmarks/*.py", "examples/*.py", "examples/*/*.py")
    for path in ROOT.glob(pattern)
    if "def build_parser" in path.read_text(encoding="utf-8")
)
# What users have, and what commands write: no file of the repository.
USERS = {"raw_data", "test_data", "latents", "checkpoints", "outputs", "report", "out", "models", "holiday"}
USERS |= {"holiday_painted", "photo", "painting", "tensorboard", "NAME_frames", ".venv", "data_root", "~"}
WRITTEN = {
    "app.json",
    "meta.json",
    "samples.json",
    "transfers.json",
    "metrics_before_1.jsonl",
    "run_before_1.json",
    "run.json",
    "metrics.json",
    "report.md",
    "users.json",
    "report.json",
    "predictions.json",
    "results.json",
}
WRITTEN |= {"data_config.json", "lines.txt"}  # the last two of the text example
# Other projects' files and flags, from which two examples say how to come.
FOREIGN = {"stage1_extract_features.py", "stage2_train_dit.py", "stage3_inference.py", "scripts/batch_sample.py"}
FOREIGN |= {"run_complete_pipeline.py", "download_models.py", "dataset/download_data.py", "scripts/train_text.py"}
FOREIGN |= {"scripts/generate_text.py", "scripts/eval_text.py"}
SUFFIXES = (".py", ".ckpt", ".pt", ".md", ".json", ".safetensors")  # of files called as a section is
LAUNCHERS = {"--nproc_per_node", "--standalone", "--nnodes", "--rdzv_backend", "--rdzv_id", "--rdzv_endpoint"}
LAUNCHERS |= {"--multi_gpu", "--num_processes", "--help", "--local-dir"}
PATH = re.compile(r"(?<![\w./<>{}*-])(?:[\w.-]+/)*[\w.-]+\.(?:py|md|json|toml|txt|yaml|cff)\b(?![\w/*])")
FOLDER = re.compile(r"(?<![\w./<>{}*:-])(?:[\w.-]+/)+(?![\w.*<{/-])")


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def code_blocks(text: str) -> list[str]:
    return re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def without_blocks(text: str) -> str:
    return re.sub(r"^```\w*\n.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


def paragraphs(text: str) -> list[str]:
    """Paragraphs; of a table, its rows."""
    return [part for block in text.split("\n\n") for part in (block.splitlines() if "| ---" in block else [block])]


def spans(text: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", text)


@functools.cache
def parser_of(command: str) -> argparse.ArgumentParser:
    return importlib.import_module(command.replace("/", ".")).build_parser()


def options_of(command: str) -> set[str]:
    return {option for action in parser_of(command)._actions for option in action.option_strings}


def command_lines(text: str) -> Iterator[tuple[str, str]]:
    """The commands of a text, joined over continued lines: (`benchmarks/plan`, its flags)."""
    pattern = r"(?:^|[ `])((?:[\w-]+/)*\w+)\.py((?: [^\n`#]*)?)"
    for name, flags in re.findall(pattern, text.replace("\\\n", " "), re.MULTILINE):
        if name in COMMANDS:
            yield name, flags


#################################################################################
#                       Paths, commands, flags, keys and links                  #
#################################################################################


@pytest.mark.parametrize("page", PAGES)
def test_paths_exist(page):
    text = read(page)
    groups = [[block] for block in code_blocks(text)]
    groups += [spans(paragraph) for paragraph in paragraphs(without_blocks(text))]
    for group in groups:
        folders = [found for span in group for found in FOLDER.findall(span)]
        near = [ROOT, (ROOT / page).parent, *(ROOT / folder for folder in folders)]
        for found in [*folders, *(found for span in group for found in PATH.findall(span))]:
            if found.split("/")[0] in USERS or found in WRITTEN | FOREIGN or found.startswith("data/text/"):
                continue
            assert any((folder / found).exists() for folder in near), f"{page}: {found}"


@pytest.mark.parametrize("page", PAGES)
def test_commands_parse(page):
    for block in code_blocks(read(page)):
        for name, flags in command_lines(block):
            try:
                parser_of(name).parse_args(shlex.split(flags))
            except SystemExit:
                pytest.fail(f"{page}: {name}.py{flags}")


@pytest.mark.parametrize("page", PAGES)
def test_flags_of_a_command_named_in_a_line_exist(page):
    for span in spans(without_blocks(read(page))):
        for name, flags in command_lines(span):
            unknown = set(re.findall(r"(?<!\S)--[\w-]+", flags)) - options_of(name) - {"--help"}
            assert not unknown, f"{page}: {span}"


@pytest.mark.parametrize("page", [page for page in PAGES if not page.startswith("examples/")])
def test_flags_that_stand_alone_are_some_command_s(page):
    known = set().union(*map(options_of, COMMANDS)) | LAUNCHERS
    for span in spans(without_blocks(read(page))):
        for flag in re.findall(r"^--[\w-]+", span):
            assert flag in known, f"{page}: {span}"


@pytest.mark.parametrize("page", PAGES)
def test_config_keys_exist(page):
    text = read(page)
    sections = "|".join(section.name for section in dataclasses.fields(Config))
    for code in [*code_blocks(text), *spans(without_blocks(text))]:
        for key in re.findall(rf"(?<![\w./-])(?:{sections})\.[a-z]\w*", code):
            assert key in KEYS or key.endswith(SUFFIXES), f"{page}: {key}"


@pytest.mark.parametrize("page", PAGES)
def test_requirements_are_installed_by_files_that_exist(page):
    for name in re.findall(r"pip install -r ([\w./-]+)", read(page)):
        assert (ROOT / name).exists(), f"{page}: {name}"


@pytest.mark.parametrize("page", PAGES)
def test_make_targets_exist(page):
    text = read(page)
    targets = set(re.findall(r"^([\w-]+):", read("Makefile"), re.MULTILINE))
    for code in [*code_blocks(text), *spans(without_blocks(text))]:
        for name in re.findall(r"^make ([\w-]+)", code, re.MULTILINE):
            assert name in targets, f"{page}: make {name}"


def anchors(path: Path) -> set[str]:
    """Of headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", without_blocks(path.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES)
def test_links_and_their_anchors_resolve(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", without_blocks(read(page))):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        path = (ROOT / page).parent / name if name else ROOT / page
        assert path.exists(), f"{page}: {target}"
        assert not anchor or anchor in anchors(path), f"{page}: {target}"


#################################################################################
#                         Twins, lengths, generated pages                       #
#################################################################################


def without_comments(block: str) -> str:
    return re.sub(r" *#[^\n]*", "", block)


def table_rows(text: str) -> list[str]:
    return [line for line in without_blocks(text).splitlines() if line.startswith("|")]


@pytest.mark.parametrize("page", TWINS)
def test_twins_have_the_same_headings_code_and_tables(page):
    texts = [read(page), read(page.replace(".md", "_zh.md"))]
    levels = [re.findall(r"^#+(?= )", without_blocks(text), re.MULTILINE) for text in texts]
    assert levels[0] == levels[1]
    blocks = [list(map(without_comments, code_blocks(text))) for text in texts]
    assert blocks[0] == blocks[1]
    rows = [table_rows(text) for text in texts]
    assert len(rows[0]) == len(rows[1])
    for english, chinese in zip(*rows, strict=True):
        numbers = [re.findall(r"(?<![A-Za-z\d.])\d+(?:\.\d+)?", row) for row in (english, chinese)]  # not that of BF16
        assert numbers[0] == numbers[1], f"{english}\n{chinese}"
        assert english.count("|") == chinese.count("|"), chinese


def test_what_a_user_reads_first_has_a_twin():
    assert {"README.md", "USAGE_GUIDE.md", "docs/config.md"} <= set(TWINS)


@pytest.mark.parametrize(("page", "most"), [("README", 120), ("USAGE_GUIDE", 270)])
def test_pages_are_short(page, most):
    for name in (f"{page}.md", f"{page}_zh.md"):
        assert len(read(name).splitlines()) <= most, name


def test_the_first_transfer_is_by_style_names_and_the_default_method():
    for page in ("README.md", "README_zh.md", "USAGE_GUIDE.md", "USAGE_GUIDE_zh.md"):
        first = next(flags for name, flags in command_lines(read(page)) if name == "inference")
        args = parser_of("inference").parse_args(shlex.split(first))
        assert args.method is None, page
        assert not any(style.isdigit() for style in (args.source_style, args.target_style)), page


def test_held_out_pictures_lie_outside_the_folder_of_styles():
    for page in PAGES:
        assert not re.search(r"raw_data/(test|val)\b", read(page)), page


def test_config_pages_are_fresh():
    """Run `make docs` where this fails."""
    chinese = json.loads((DOCS / "config_zh.json").read_text(encoding="utf-8"))
    assert chinese["why"].keys() == KEYS
    assert read("docs/config.md") == config_page()
    assert read("docs/config_zh.md") == config_page(chinese)


def test_config_page_in_chinese_leaves_no_english_range():
    rows = [row.split(" | ")[2] for row in table_rows(read("docs/config_zh.md"))]
    assert not [row for row in rows if re.search(r"\b(a|of|or|more|from|each|number|text)\b", row.replace("或", ""))]


def test_a_key_without_a_reason_in_chinese_is_an_error():
    chinese = json.loads((DOCS / "config_zh.json").read_text(encoding="utf-8"))
    del chinese["why"]["training.seed"]
    with pytest.raises(KeyError, match=r"training\.seed"):
        config_page(chinese)


def test_version_is_the_same_wherever_it_stands():
    assert re.search(r"^version: (.*)$", read("CITATION.cff"), re.MULTILINE)[1] == isonext.__version__
    released = (version for version in re.findall(r"^## \[([\d.]+)\]", read("CHANGELOG.md"), re.MULTILINE))
    assert next(itertools.islice(released, 1)) == isonext.__version__
