import dataclasses
import json
import math
import typing
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import ROOT, call_within
from isonext.checkpoint import load_checkpoint
from isonext.config import ONLY_OF, Config, apply_overrides, config_from_dict, config_to_dict, load_config
from isonext.errors import UserError

SECTIONS = {entry.name: entry.type for entry in dataclasses.fields(Config)}
KEYS = {f"{name}.{key.name}": key for name, kind in SECTIONS.items() for key in dataclasses.fields(kind)}
HINTS = {f"{name}.{key}": hint for name, kind in SECTIONS.items() for key, hint in typing.get_type_hints(kind).items()}
OPTIONAL = {
    "model.latent_channels",
    "model.num_styles",
    "training.micro_batch_size",
    "data.num_classes",
    "inference.latent_clamp",
}
AUTO = {
    "inference.cfg_scale",
    "training.micro_batch_size",
    "training.gradient_checkpointing",
    "training.anchor_strength",
}
PAIRS = {"training.betas", "training.stage2_scales", "inference.cfg_interval"}
WRONG = {
    int: ["7", 1.5, 4.0, True, [1], {}, math.nan],
    float: ["0.5", True, [0.5], {}, math.nan, math.inf, -math.inf],
    bool: [0, 1, "true", [], 1.0],
    str: [3, True, ["dct"], 1.5, "a\0b", "\ud800"],
}


def with_value(name: str, value) -> Config:
    section, _, entry = name.partition(".")
    kind = {"model": {"type": "dit"}} if entry in ONLY_OF["dit"] else {}
    return config_from_dict(kind | {section: kind.get(section, {}) | {entry: value}})


def wrong_values() -> Iterator[tuple]:
    for name, hint in HINTS.items():
        if name in PAIRS:
            values = [0.5, "x", [0.5], [0.5, 0.6, 0.7], [0.5, "x"], [0.5, True], [math.nan, 0.5], [0.5, None]]
        else:
            values = WRONG[(typing.get_args(hint) or (hint,))[0]]
        yield from (
            (name, value) for value in (values if name in OPTIONAL | {"inference.guidance"} else [*values, None])
        )


def out_of_range() -> Iterator[tuple]:
    for name, entry in KEYS.items():
        low, high = entry.metadata["low"], entry.metadata["high"]
        for beyond in ([low - 1] if low is not None else []) + ([high + 1] if high is not None else []):
            yield name, [beyond, beyond] if name in PAIRS else beyond


def test_every_default_passes_its_own_check():
    assert config_from_dict(config_to_dict(Config())) == Config()


@pytest.mark.parametrize(("name", "value"), list(wrong_values()))
def test_a_wrong_type_is_an_error_with_key_value_and_what_is_allowed(name, value):
    with pytest.raises(UserError) as caught:
        with_value(name, value)
    shown = "" if name in PAIRS else f"{json.dumps(value)}: must be "  # of a pair, the wrong entry may be shown
    assert name in str(caught.value) and f" = {shown}" in str(caught.value)
    assert (
        "must be a" in str(caught.value) or "must be one of" in str(caught.value) or "must be true" in str(caught.value)
    )
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "value"), list(out_of_range()))
def test_a_value_out_of_range_is_an_error_with_key_value_and_what_is_allowed(name, value):
    with pytest.raises(UserError, match="must be") as caught:
        with_value(name, value)
    assert name in str(caught.value) and f" = {'' if name in PAIRS else json.dumps(value)}" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("training.batch_size", 0, "a whole number from 1 to 1000000"),
        ("training.label_drop_prob", 1.01, "a number from 0 to 1"),
        ("training.micro_batch_size", 0, "a whole number, 1 or more, or auto, or null"),
        ("training.micro_batch_size", "Auto", "a whole number, 1 or more, or auto, or null"),
        ("training.gradient_checkpointing", "on", "true or false, or auto"),
        ("training.gradient_checkpointing", None, "true or false, or auto"),
        ("data.num_classes", 0, "a whole number from 1 to 1000000, or null"),
        ("inference.cfg_interval", [0.9], "a list of 2, each a number from 0 to 1"),
        ("training.use_amp", 1, "true or false"),
        ("autoencoder.name", 4, "a text"),
        ("training.coupling", "OT", "one of independent, ot"),
        ("inference.method", "rk5", "one of alf, euler, midpoint, heun, rk4, flowedit, map"),
    ],
)
def test_the_message_says_what_is_allowed(name, value, allowed):
    with pytest.raises(UserError) as caught:
        with_value(name, value)
    assert str(caught.value) == f"config: {name} = {json.dumps(value)}: must be {allowed}"


@pytest.mark.parametrize("name", [name for name, entry in KEYS.items() if entry.metadata["choices"]])
def test_a_text_that_is_no_choice_is_refused_and_every_choice_is_taken(name):
    choices = KEYS[name].metadata["choices"]
    section, _, entry = name.partition(".")
    for choice in choices:
        assert getattr(getattr(with_value(name, choice), section), entry) == choice
    with pytest.raises(UserError, match="one of " + ", ".join(choices)):
        with_value(name, "nonsense")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("training.batch_size", 1),
        ("training.learning_rate", 0),
        ("training.label_drop_prob", 0),
        ("training.label_drop_prob", 1),
        ("data.image_size", 8),
        ("data.image_size", 8192),
        ("data.val_fraction", 0.9),
        ("model.kernel_size", 31),
        ("inference.cfg_scale", 100),
    ],
)
def test_bounds_are_inclusive(name, value):
    section, _, entry = name.partition(".")
    assert getattr(getattr(with_value(name, value), section), entry) == value


@pytest.mark.parametrize("name", sorted(OPTIONAL))
def test_optional_keys_take_null_and_are_the_only_ones(name):
    section, _, entry = name.partition(".")
    assert getattr(getattr(with_value(name, None), section), entry) is None
    assert {key for key, hint in HINTS.items() if type(None) in typing.get_args(hint)} == OPTIONAL


@pytest.mark.parametrize("name", sorted(KEYS))
def test_auto_is_taken_by_those_keys_alone_that_have_it(name):
    section, _, entry = name.partition(".")
    if name in AUTO:
        assert getattr(getattr(load_config(None, [f"{name}=auto"]), section), entry) == "auto"
    elif HINTS[name] is not str or KEYS[name].metadata["choices"]:
        with pytest.raises(UserError, match="must be"):
            with_value(name, "auto")


@pytest.mark.parametrize("values", [(None, False), (16, True), (1, False)])
def test_what_configs_said_before_there_was_auto_still_holds(values):
    training = config_from_dict(
        {"training": dict(zip(("micro_batch_size", "gradient_checkpointing"), values, strict=True))}
    ).training
    assert (training.micro_batch_size, training.gradient_checkpointing) == values


def test_a_whole_number_becomes_a_float_where_a_float_is_meant_and_a_list_becomes_a_tuple():
    config = config_from_dict({"training": {"grad_clip": 2, "betas": [0, 0.5]}})
    assert (config.training.grad_clip, config.training.betas) == (2.0, (0.0, 0.5))
    assert isinstance(config.training.grad_clip, float) and isinstance(config.training.betas, tuple)
    assert all(isinstance(beta, float) for beta in config.training.betas)


@pytest.mark.parametrize(
    ("tree", "named", "hint"),
    [
        ({"training": {"batchsize": 4}}, "training.batchsize", "did you mean training.batch_size?"),
        ({"trainig": {}}, "trainig", "did you mean training?"),
        ({"model": {"hiden_dim": 4}}, "model.hiden_dim", "did you mean model.hidden_dim?"),
        ({"autoencoder": {"zzz": 4}}, "autoencoder.zzz", "known: name"),
        ({"qqq": {}}, "qqq", "known: model, training, data, autoencoder, checkpoint, inference"),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest_known_one(tree, named, hint):
    with pytest.raises(UserError) as caught:
        config_from_dict(tree, where="my.json")
    assert str(caught.value) == f"my.json: unknown key {named}; {hint}"


@pytest.mark.parametrize("tree", [[], 3, "x", None, {"training": 3}, {"training": [1]}, {"training": None}])
def test_what_is_no_object_is_refused(tree):
    with pytest.raises(UserError, match="JSON object"):
        config_from_dict(tree)


@pytest.mark.parametrize(
    ("tree", "named"),
    [
        ({"model": {"hidden_dim": 100, "num_groups": 32}}, "model.num_groups = 32 must divide model.hidden_dim = 100"),
        ({"model": {"kernel_size": 4}}, "model.kernel_size = 4: must be odd"),
        (
            {"model": {"type": "dit", "num_heads": 5}},
            "model.num_heads = 5 must divide model.hidden_dim = 384 into mult",
        ),
        ({"model": {"type": "dit", "hidden_dim": 12}}, "model.num_heads = 6 must divide .* = 12 into multiples of 4"),
        ({"model": {"type": "dit", "num_groups": 8}}, "model.num_groups is a key of model.type isonext; .* dit"),
        ({"model": {"qk_norm": True}}, "model.qk_norm is a key of model.type dit; this one is isonext"),
        ({"model": {"time_dim": 7}}, "model.time_dim = 7: must be even"),
        ({"inference": {"cfg_interval": [0.8, 0.2]}}, r"inference.cfg_interval = \[0.8, 0.2\]"),
    ],
)
def test_keys_that_contradict_each_other_are_an_error(tree, named):
    with pytest.raises(UserError, match=named):
        config_from_dict(tree)


#################################################################################
#                                    The file                                   #
#################################################################################


def test_comments_are_accepted_and_a_url_in_a_string_survives(tmp_path):
    (tmp_path / "c.json").write_text(
        '// head\n{ // after a brace\n  "autoencoder": {"name": "https://x.org//a\\"//b"}, // "quoted" // twice\n'
        '  //"model": {"hidden_dim": 1},\n  "training": {"seed": 7} }\n// tail'
    )
    config = load_config(tmp_path / "c.json")
    assert config.autoencoder.name == 'https://x.org//a"//b'
    assert config.training.seed == 7
    assert config.model == Config().model


def test_a_byte_order_mark_is_accepted(tmp_path):
    (tmp_path / "c.json").write_text('{"training": {"seed": 5}}', encoding="utf-8-sig")
    assert load_config(tmp_path / "c.json").training.seed == 5


@pytest.mark.parametrize(
    ("text", "line"), [('{"model": {},\n "data": {,}}', 2), ("{\n\n// x\n oops }", 4), ("", 1), ('{"a": "b}', 1)]
)
def test_invalid_json_names_file_and_line(tmp_path, text, line):
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(UserError, match=rf"c\.json: not valid JSON at line {line}: "):
        load_config(tmp_path / "c.json")


def test_a_missing_config_a_folder_and_a_binary_file_are_one_line_each(tmp_path):
    with pytest.raises(UserError, match=r"none\.json: no such config file; give one with --config"):
        load_config(tmp_path / "none.json")
    (tmp_path / "b.json").write_bytes(b"\xff\xfe\x00\x80")
    for path in (tmp_path, tmp_path / "b.json"):
        with pytest.raises(UserError, match="not a JSON text file"):
            load_config(path)


def test_errors_in_a_file_name_the_file(tmp_path):
    (tmp_path / "c.json").write_text('{"training": {"seed": -1}}')
    with pytest.raises(UserError) as caught:
        load_config(tmp_path / "c.json")
    assert str(caught.value).startswith(f"{tmp_path / 'c.json'}: training.seed = -1: must be")


PRESETS = sorted((ROOT / "configs").rglob("*.json")) + [p for p in [ROOT / "config.json"] if p.exists()]


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.name)
def test_every_config_of_the_repository_loads(path):
    assert load_config(path) == config_from_dict(config_to_dict(load_config(path)))


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.name)
def test_no_config_of_the_repository_types_what_is_counted(path):
    config = load_config(path)
    assert (config.model.latent_channels, config.model.num_styles, config.data.num_classes) == (None, None, None)


def test_three_styles_preprocess_and_train_by_the_shipped_config(tmp_path, draw):
    for style in ("ink", "oil", "water"):
        for number in range(4):
            draw(tmp_path / "raw_data" / style / f"{number}.png", seed=number + len(style))
    small = {
        "model.hidden_dim": 32, "model.num_layers": 1, "data.image_size": 16, "autoencoder.name": "dct:f4c5",
        "training.stage1_epochs": 1, "training.batch_size": 4, "training.num_workers": 0, "training.compile": "false",
    }  # fmt: skip
    flags = ["--config", ROOT / "config.json", *(f"--set={name}={value}" for name, value in small.items())]
    for command in ("preprocess_latents", "train"):
        status, _, err = call_within(tmp_path, command, *flags)
        assert status == 0, err
    saved = load_checkpoint(tmp_path / "checkpoints" / "stage1_epoch1.pt")
    assert saved.latents.styles == ["ink", "oil", "water"] and saved.latents.channels == 5


#################################################################################
#                                     --set                                     #
#################################################################################


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("training.learning_rate=1e-5", 1e-5),
        ("training.batch_size=32", 32),
        ("training.betas=[0.8, 0.95]", (0.8, 0.95)),
        ("training.use_amp=false", False),
        ("training.micro_batch_size=null", None),
        ("data.data_root=my latents/a=b", "my latents/a=b"),
        ('data.data_root="2024"', "2024"),
        ("autoencoder.name=dct:f4c12", "dct:f4c12"),
        (" training.seed =3", 3),
    ],
)
def test_set_parses_numbers_lists_and_text(text, value):
    config = load_config(None, [text])
    section, entry = text.partition("=")[0].strip().split(".")
    assert getattr(getattr(config, section), entry) == value


@pytest.mark.parametrize("text", ["training.seed", "seed=3", "", "=", "trainingseed=4.5"])
def test_set_without_a_dot_or_an_equals_sign_says_how_it_is_written(text):
    with pytest.raises(UserError, match=r"write it as section\.key=value"):
        load_config(None, [text])


def test_set_beats_the_file_the_last_one_wins_and_the_dict_given_stays_as_it_was(tmp_path):
    (tmp_path / "c.json").write_text('{"training": {"seed": 1, "batch_size": 9}}')
    training = load_config(tmp_path / "c.json", ["training.seed=2", "training.seed=3"]).training
    assert (training.seed, training.batch_size) == (3, 9)
    tree = {"training": {"seed": 1}}
    assert apply_overrides(tree, ["training.seed=2", "data.flip=false"])["training"] == {"seed": 2}
    assert tree == {"training": {"seed": 1}}


@pytest.mark.parametrize("text", ["training.sed=3", "trainin.seed=3"])
def test_set_of_an_unknown_key_names_the_nearest(text):
    with pytest.raises(UserError, match=r"unknown key .*did you mean training"):
        load_config(None, [text])


#################################################################################
#                                  Round trip                                   #
#################################################################################


def values_of(name: str) -> st.SearchStrategy:
    spec, hint = KEYS[name].metadata, HINTS[name]
    if spec["choices"]:
        return st.sampled_from(spec["choices"])
    kind = (typing.get_args(hint) or (hint,))[0]
    low, high = spec["low"], spec["high"]
    by_type = {
        bool: st.booleans(),
        str: st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")),
        int: st.integers(low, high),
        float: st.floats(low, high, allow_nan=False, allow_infinity=False),
    }
    values = st.tuples(by_type[kind], by_type[kind]).map(sorted).map(tuple) if name in PAIRS else by_type[kind]
    values = values | st.just("auto") if name in AUTO else values
    return st.none() | values if name in OPTIONAL else values


# Checked with each other.
TIED = {
    "model.type",
    "model.hidden_dim",
    "model.time_dim",
    *(f"model.{key}" for keys in ONLY_OF.values() for key in keys),
}
FREE = st.fixed_dictionaries({}, optional={name: values_of(name) for name in KEYS if name not in TIED})


@settings(deadline=None)
@given(values=FREE)
def test_config_to_dict_and_back_is_the_identity_through_json_too(values):
    config = Config()
    for name, value in values.items():
        section, _, entry = name.partition(".")
        setattr(getattr(config, section), entry, value)
    tree = config_to_dict(config)
    assert config_from_dict(tree) == config
    assert config_from_dict(json.loads(json.dumps(tree))) == config


@pytest.mark.parametrize(
    "text", ["[1]", "3", '{"model": 3}', "[" * 10**5, '{"training": {"learning_rate": 1' + "0" * 400 + "}}"]
)
def test_any_other_json_is_refused_in_one_line(tmp_path, text):
    path = tmp_path / "odd.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"odd\.json") as caught:
        load_config(path, ["model.hidden_dim=64"])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", [".=3", "training.=3", ".learning_rate=3", "training=3", "training.learning_rate"])
def test_a_set_that_names_no_key_says_how_to_write_it(text):
    with pytest.raises(UserError, match=r"section\.key=value"):
        load_config(None, [text])


def test_the_choice_null_can_be_typed_though_it_is_a_word_of_json():
    assert load_config(None, ["inference.guidance=null"]).inference.guidance == "null"
    assert config_from_dict({"inference": {"guidance": None}}).inference.guidance == "null"
