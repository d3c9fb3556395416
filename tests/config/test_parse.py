"""YAML files, flags and environment become one checked configuration."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from engine.config import options as option_groups
from engine.config.options import SftConfig
from engine.config.parse import ALIASES, NOT_BUILT, build, flatten, help_text, options_of, parse
from engine.errors import ConfigError

WriteYaml = Callable[[str], str]


@pytest.fixture
def write_yaml(tmp_path: Path) -> WriteYaml:
    def write(text: str) -> str:
        path = tmp_path / "run.yaml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def sft(*argv: str, environment: dict[str, str] | None = None) -> dict[str, Any]:
    return flatten(parse(SftConfig, argv, environment)[0])


def message(*argv: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(SftConfig, argv)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@dataclass(kw_only=True)
class Flat:
    """Options without groups, as `braid convert` has them."""

    to: Literal["a", "b"] | None = None
    """Direction."""

    count: int = 1


def test_nothing_given_is_the_defaults() -> None:
    config, given = parse(SftConfig, [])
    assert config == SftConfig()
    assert given == set()


@pytest.mark.parametrize(
    ("argv", "name", "value"),
    [
        (["--learning_rate", "3e-4"], "learning_rate", 3e-4),
        (["--learning_rate=3e-4"], "learning_rate", 3e-4),
        (["--learning-rate", "3e-4"], "learning_rate", 3e-4),
        (["--min_lr", "1"], "min_lr", 1.0),
        (["--max_steps", "10"], "max_steps", 10),
        (["--max_steps", "1e3"], "max_steps", 1000),
        (["--max_steps", "none"], "max_steps", None),
        (["--seed", "-1"], "seed", -1),
        (["--dry_run"], "dry_run", True),
        (["--dry_run", "--seed", "1"], "dry_run", True),
        (["--dry_run", "true"], "dry_run", True),
        (["--use_distributed_optimizer", "false"], "use_distributed_optimizer", False),
        (["--use_distributed_optimizer=False"], "use_distributed_optimizer", False),
        (["--use_distributed_optimizer", "0"], "use_distributed_optimizer", False),
        (["--sequence_parallel"], "sequence_parallel", True),
        (["--sequence_parallel", "no"], "sequence_parallel", False),
        (["--dataset", "a.jsonl"], "dataset", ["a.jsonl"]),
        (["--dataset", "a.jsonl", "b.jsonl#3"], "dataset", ["a.jsonl", "b.jsonl#3"]),
        (["--dataset", "a.jsonl", "--dataset=b.jsonl"], "dataset", ["a.jsonl", "b.jsonl"]),
        (["--dataset", "with space.jsonl"], "dataset", ["with space.jsonl"]),
        (["--decoder_layers_per_stage", "7", "9"], "decoder_layers_per_stage", [7, 9]),
        (["--system", "You are = terse."], "system", "You are = terse."),
        (["--system=a=b"], "system", "a=b"),
        (["--system", ""], "system", None),
        (["--torch_dtype", "bfloat16"], "torch_dtype", "bfloat16"),
        (["--model", "123"], "model", "123"),
    ],
)
def test_flags(argv: list[str], name: str, value: Any) -> None:
    config, given = parse(SftConfig, argv)
    flat = flatten(config)
    assert flat[name] == value
    assert type(flat[name]) is type(value)
    assert name in given
    untouched = flatten(SftConfig())
    changed = {key for key in flat if flat[key] != untouched[key]}
    assert changed <= given


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("learning_rate: 1e-5", "learning_rate", 1e-5),  # YAML 1.1 reads this as a string
        ("learning_rate: 0.5", "learning_rate", 0.5),
        ("learning_rate: 1", "learning_rate", 1.0),
        ("max_steps: 10", "max_steps", 10),
        ("max_steps: 10.0", "max_steps", 10),
        ("max_steps: null", "max_steps", None),
        ("max_steps:", "max_steps", None),
        ("sequence_parallel: on", "sequence_parallel", True),
        ("dry_run: 'true'", "dry_run", True),
        ("dataset: a.jsonl", "dataset", ["a.jsonl"]),
        ("dataset: with space.jsonl", "dataset", ["with space.jsonl"]),
        ("dataset: [a.jsonl, b.jsonl]", "dataset", ["a.jsonl", "b.jsonl"]),
        ("dataset:\n- a.jsonl\n- b.jsonl", "dataset", ["a.jsonl", "b.jsonl"]),
        ("dataset: []", "dataset", []),
        ("decoder_layers_per_stage: [3, 5]", "decoder_layers_per_stage", [3, 5]),
        ("system: 你好", "system", "你好"),
        ("model: 123", "model", "123"),
        ("micro_batch_size: 4", "per_device_train_batch_size", 4),
    ],
)
def test_yaml(write_yaml: WriteYaml, text: str, name: str, value: Any) -> None:
    flat = sft("--config", write_yaml(text))
    assert flat[name] == value
    assert type(flat[name]) is type(value)


def test_an_empty_yaml_file_changes_nothing(write_yaml: WriteYaml) -> None:
    assert sft("--config", write_yaml("# nothing yet\n")) == flatten(SftConfig())


def test_later_sources_win(write_yaml: WriteYaml) -> None:
    config = ["--config", write_yaml("nproc_per_node: 2\nnnodes: 2\nnode_rank: 2\nseed: 2")]
    flat = sft(
        *config,
        "--nproc_per_node",
        "4",
        environment={"nproc_per_node": "3", "nnodes": "3", "master_addr": ""},
    )
    assert flat["nproc_per_node"] == 4  # flag over environment over YAML
    assert flat["nnodes"] == 3  # environment over YAML
    assert flat["node_rank"] == 2  # YAML over default
    assert flat["seed"] == 2
    assert flat["master_addr"] is None  # an empty variable is none
    assert flat["logging_steps"] == 1


def test_the_place_of_the_config_flag_does_not_matter(write_yaml: WriteYaml) -> None:
    path = write_yaml("seed: 2")
    assert sft("--seed", "3", "--config", path)["seed"] == sft(f"--config={path}", "--seed", "3")["seed"] == 3


@pytest.mark.parametrize("alias", [a for a in ALIASES if ALIASES[a] in options_of(SftConfig)])
def test_aliases_mean_the_option(alias: str) -> None:
    name = ALIASES[alias]
    value = {"train_type": "lora", "lr_scheduler_type": "linear", "per_device_train_batch_size": "4"}.get(
        name, "0.25"
    )
    config, given = parse(SftConfig, [f"--{alias}", value])
    assert str(flatten(config)[name]) == value
    assert given == {name}


def test_an_alias_overrides_the_name_in_the_file(write_yaml: WriteYaml) -> None:
    assert sft("--config", write_yaml("learning_rate: 1"), "--lr", "2")["learning_rate"] == 2.0


def test_alias_and_name_together_are_refused(write_yaml: WriteYaml) -> None:
    assert "--learning_rate and --lr are the same" in message("--learning_rate", "1", "--lr", "2")
    assert "--lr and --learning_rate are the same" in message("--lr", "2", "--learning_rate", "1")
    text = message("--config", write_yaml("micro_batch_size: 1\nper_device_train_batch_size: 1"))
    assert "run.yaml: micro_batch_size and per_device_train_batch_size are the same" in text


def test_an_unknown_flag_gets_the_nearest_name() -> None:
    assert "--learning_rat; did you mean --learning_rate?" in message("--learning_rat", "1")
    assert "--tensor_parallel_size; did you mean --tensor_model_parallel_size?" in message(
        "--tensor_parallel_size", "2"
    )
    text = message("--zzzz", "1")
    assert "unknown option --zzzz" in text
    assert "--help" in text


def test_an_unknown_key_names_the_file(write_yaml: WriteYaml) -> None:
    text = message("--config", write_yaml("max_step: 3"))
    assert "run.yaml" in text
    assert "unknown option max_step; did you mean max_steps?" in text


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--max_steps", "ten"], "max_steps must be a whole number, not 'ten'"),
        (["--max_steps", "1.5"], "max_steps must be a whole number, not '1.5'"),
        (["--max_steps", "inf"], "max_steps must be a whole number, not 'inf'"),
        (["--max_steps", "nan"], "max_steps must be a whole number, not 'nan'"),
        (["--learning_rate", "fast"], "learning_rate must be a number, not 'fast'"),
        (["--learning_rate", "nan"], "learning_rate must be a number, not 'nan'"),
        (["--learning_rate", "inf"], "learning_rate must be a number, not 'inf'"),
        (["--learning_rate"], "learning_rate needs a value"),
        (["--model"], "model needs a value"),
        (["--dry_run", "maybe"], "dry_run must be true or false, not 'maybe'"),
        (["--train_type", "half"], "train_type must be one of full, lora, not 'half'"),
        (["--train_type"], "train_type must be one of full, lora"),
        (["--device", "tpu"], "device must be one of auto, cuda, cpu, not 'tpu'"),
        (
            ["--decoder_layers_per_stage", "1", "x"],
            "decoder_layers_per_stage must be a whole number, not 'x'",
        ),
        (["--seed", "1", "2"], "--seed takes one value, not 2: 1 2"),
        (["seed", "1"], "unexpected argument 'seed'"),
        (["--config"], "--config takes one YAML file"),
        (["--config", "a.yaml", "b.yaml"], "--config takes one value, not 2"),
    ],
)
def test_wrong_values_name_option_and_value(argv: list[str], named: str) -> None:
    assert named in message(*argv)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("max_steps: [1]", "max_steps needs a value of type int, not [1]"),
        ("max_steps: true", "max_steps needs a value of type int, not True"),
        ("seed: null", "seed needs a value of type int, not None"),
        ("learning_rate: .nan", "learning_rate must be a number, not nan"),
        ("model: {a: 1}", "model needs a value of type str"),
        ("dataset:", "dataset needs at least one value"),
        ("dataset: {a: 1}", "dataset needs a value of type str"),
        ("report_to: [[a]]", "report_to needs a value of type str"),
        ("1: 2", "unknown option 1"),
    ],
)
def test_wrong_yaml_values_name_option_and_value(write_yaml: WriteYaml, text: str, named: str) -> None:
    assert named in message("--config", write_yaml(text))


@pytest.mark.parametrize("name", NOT_BUILT)
def test_what_is_not_built_is_refused_by_name(write_yaml: WriteYaml, name: str) -> None:
    assert name not in options_of(SftConfig), "it is built now: take it out of NOT_BUILT"
    for text in (message(f"--{name}", "8"), message("--config", write_yaml(f"{name}: 8"))):
        assert f"{name}: {NOT_BUILT[name]} is not available in this version" in text


def test_what_is_not_built_may_be_switched_off(write_yaml: WriteYaml) -> None:
    assert sft("--use_dora", "false", "--config", write_yaml("streaming: false")) == flatten(SftConfig())


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("- a\n- b\n", "must hold a mapping"),
        ("just words", "must hold a mapping"),
        ("a: [1, 2", "is not YAML"),
        ("a: b: c", "is not YAML"),
        ("a: !!python/object/apply:os.getcwd []", "is not YAML"),
    ],
)
def test_a_file_that_is_no_configuration(write_yaml: WriteYaml, text: str, named: str) -> None:
    path = write_yaml(text)
    found = message("--config", path)
    assert path in found
    assert named in found


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    assert "No such file" in message("--config", str(tmp_path / "none.yaml"))
    assert "directory" in message("--config", str(tmp_path))
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    assert "is not YAML" in message("--config", str(tmp_path / "binary.yaml"))


def test_flatten_and_build_are_inverse() -> None:
    config, _ = parse(
        SftConfig, ["--dataset", "a", "b", "--seed", "7", "--report_to", "none", "--max_steps", "3"]
    )
    assert build(SftConfig, flatten(config)) == config


def test_no_option_name_is_used_twice() -> None:
    names = [
        option.name for group in dataclasses.fields(SftConfig) for option in _options_of_group(group.name)
    ]
    assert len(names) == len(set(names)) == len(options_of(SftConfig))


def _options_of_group(name: str) -> list[dataclasses.Field[Any]]:
    return list(dataclasses.fields(getattr(SftConfig(), name)))


def test_help_explains_every_option_once() -> None:
    text = help_text(SftConfig)
    for name, option in options_of(SftConfig).items():
        assert option.help, f"{name} has no help"
        assert text.count(f"--{name} ") == 1
        assert option.help in text
    assert "--torch_dtype bfloat16|float16|float32\n" in text
    assert "--dataset STR ...\n" in text
    assert "(default: 1e-08)" in text
    assert option_groups.RunOptions().seed == 42
    assert "(default: 42)" in text


def test_options_may_stand_in_the_config_itself() -> None:
    config, given = parse(Flat, ["--to", "b"])
    assert config == Flat(to="b", count=1)
    assert given == {"to"}
    assert "--to a|b\n        Direction.\n" in help_text(Flat)
