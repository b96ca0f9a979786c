"""Options: presets, YAML, flags, and the refusal of whatever would be accepted and ignored."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shlex
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from ddpm_ext.cli.arguments import parse_train_config, to_yaml
from ddpm_ext.models.unet import UNET_PRESETS
from ddpm_ext.training.config import NEUTRAL, TrainConfig, config_changes, recorded
from ddpm_ext.training.presets import PRESETS

# Flags of Diffusers 0.42.1's examples/unconditional_image_generation/train_unconditional.py, but for those of its
# launcher (local_rank) and of 16-bit pictures (preserve_input_precision).
STOCK_COMMAND = shlex.split(
    "--dataset_name huggan/flowers-102-categories --dataset_config_name default --cache_dir cache --resolution 64 "
    "--center_crop --random_flip --output_dir ddpm-ema-flowers-64 --overwrite_output_dir --train_batch_size 16 "
    "--eval_batch_size 9 --dataloader_num_workers 2 --num_epochs 100 --save_images_epochs 5 --save_model_epochs 7 "
    "--gradient_accumulation_steps 2 --learning_rate 1e-4 --lr_scheduler cosine --lr_warmup_steps 500 "
    "--adam_beta1 0.9 --adam_beta2 0.99 --adam_weight_decay 1e-5 --adam_epsilon 1e-7 --use_ema --ema_inv_gamma 2.0 "
    "--ema_power 0.7 --ema_max_decay 0.999 --push_to_hub --hub_token secret --hub_model_id me/flowers "
    "--hub_private_repo --logger tensorboard --logging_dir tb --mixed_precision no --prediction_type sample "
    "--ddpm_num_steps 500 --ddpm_num_inference_steps 250 --ddpm_beta_schedule linear --checkpointing_steps 300 "
    "--checkpoints_total_limit 3 --resume_from_checkpoint latest"
)


def test_a_command_of_diffusers_script_is_understood_word_by_word() -> None:
    config = dataclasses.asdict(parse_train_config(STOCK_COMMAND))
    options = [option.split() for option in " ".join(STOCK_COMMAND).split("--")[1:]]
    given = {words[0]: words[1] if len(words) > 1 else "True" for words in options}
    assert len(given) == 40
    given["report_to"] = given.pop("logger")
    for name, value in given.items():
        word = str(config[name])
        assert word == value or float(word) == float(value), name


def test_without_data_the_digits_are_trained_and_with_data_diffusers_defaults_hold() -> None:
    assert parse_train_config([]) == PRESETS["digits"].config
    stock = parse_train_config(["--dataset_name", "user/pictures"])
    # The defaults of train_unconditional.py, read from its parser.
    expected = {"resolution": "64", "train_batch_size": 16, "num_epochs": 100, "learning_rate": 1e-4}
    expected |= {
        "adam_beta1": 0.95,
        "lr_scheduler": "cosine",
        "lr_warmup_steps": 500,
        "adam_weight_decay": 1e-6,
        "ema_power": 0.75,
    }
    assert {name: getattr(stock, name) for name in expected} == expected


def test_the_paper_stands_in_the_cifar10_preset() -> None:
    config = PRESETS["cifar10"].config
    paper = {"learning_rate": 2e-4, "lr_warmup_steps": 5000, "max_grad_norm": 1.0, "ema_max_decay": 0.9999}
    paper |= {"global_batch_size": 128, "max_train_steps": 800_000, "dropout": 0.1, "random_flip": True}
    paper |= {"adam_beta1": 0.9, "adam_beta2": 0.999, "adam_weight_decay": 0.0, "variance_type": "fixed_large"}
    assert {name: getattr(config, name) for name in paper} == paper
    assert PRESETS["lsun256"].config.learning_rate == 2e-5 and PRESETS["lsun256"].config.dropout == 0.0


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_names_a_network_and_says_what_it_reaches(name: str) -> None:
    preset = PRESETS[name]
    assert preset.config.unet is None or preset.config.unet in UNET_PRESETS
    assert len(preset.expected) > 20
    config = parse_train_config(["--preset", name])
    assert config == preset.config


def test_preset_below_yaml_below_flags(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    lines = (
        "preset: cifar10",
        "learning_rate: 1e-3",
        "lr_warmup_steps: 7",
        "max_grad_norm: null",
        "random_flip: false",
    )
    file.write_text("\n".join(lines))
    config = parse_train_config(["--config", str(file), "--lr_warmup_steps", "9"])
    assert (config.unet, config.learning_rate, config.lr_warmup_steps) == ("cifar10", 1e-3, 9)
    assert config.max_grad_norm is None and config.random_flip is False


@pytest.mark.parametrize("name", PRESETS)
def test_a_configuration_survives_yaml_and_the_run_folders_json(name: str, tmp_path: Path) -> None:
    config = PRESETS[name].config
    (tmp_path / "a.yaml").write_text(to_yaml(config))
    (tmp_path / "config.json").write_text(json.dumps({"config": recorded(config), "seed": 0}))
    for file in ("a.yaml", "config.json"):
        assert parse_train_config([f"--config={tmp_path / file}"]) == config


@pytest.mark.parametrize(
    ("spelling", "value"),
    [("--no_random_flip", False), ("--no-random-flip", False), ("--random_flip=false", False), ("--random-flip", True)],
)
def test_switches_have_every_spelling(spelling: str, value: bool) -> None:
    assert parse_train_config(["--preset", "cifar10", spelling]).random_flip is value


def test_an_option_by_hand_replaces_the_presets_other_way_of_saying_it() -> None:
    assert parse_train_config(["--num_epochs", "3"]).max_train_steps is None
    assert parse_train_config(["--train_batch_size", "4"]).global_batch_size is None
    both = parse_train_config(["--train_batch_size", "4", "--global_batch_size", "8"])
    assert both.global_batch_size == 8
    assert parse_train_config(["--preset", "cifar10", "--train_data_dir", "pictures"]).dataset_name is None
    assert parse_train_config(["--ema_power", "0.5"]).ema == "warmup"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--lerning_rate 1", "no option --lerning_rate. Did you mean --learning_rate?"),
        ("--max_train_st 4", "Did you mean --max_train_steps?"),
        ("--learning_rate fast", "invalid float value: 'fast'"),
        ("--loss hybird", "invalid choice: 'hybird', did you mean hybrid?"),
        ("--forecast H100", "invalid choice: 'H100', did you mean h100? (choose from h100, h200, "),
        ("--forecast tpu", "cpu, none)"),
        ("--preset cifr10", "got 'cifr10'. Did you mean cifar10?"),
        ("--config missing.yaml", "there is none at missing.yaml"),
        ("--preset", "--preset needs a value"),
        ("--learning_rate 0", "learning_rate must be above 0, got 0"),
        ("--train_batch_size 0", "train_batch_size must be at least 1, got 0"),
        ("--ema_max_decay 1.0", "ema_max_decay must be in [0, 1), got 1.0"),
        ("--resolution 8x", "resolution must be like 32 or 24x32"),
        ("--ema_sigma_rel 0.3 --ema power_function", "ema_sigma_rel must lie in (0, 0.28)"),
        ("--dataset_name a --train_data_dir b", "both name the data"),
        ("--max_train_steps 4 --num_epochs 4", "both give the length"),
        ("--loss vlb --snr_gamma 5", 'weights loss "simple" or "hybrid"'),
        ("--variance_type learned_range", 'Use loss "hybrid" or "vlb"'),
        ("--ema_power 0.5 --ema constant", '--ema_power has an effect only with ema "warmup"'),
        ("--ema_sigma_rel 0.1", '--ema_sigma_rel has an effect only with ema "power_function"'),
        ("--ema constant --ema_power 0.75", '--ema_power has an effect only with ema "warmup"'),
        ("--no_use_ema --ema_max_decay 0.99", "--ema_max_decay has an effect only with use_ema true"),
        ("--no_use_ema --ema_power 0.75 --ema warmup", "has an effect only with use_ema true"),
        ("--logging_dir logs", '--logging_dir has an effect only with report_to "tensorboard"'),
        ("--logging_dir logs --report_to wandb", "--logging_dir has an effect only with report_to"),
        ("--dataset_config_name plain", "--dataset_config_name has an effect only with --dataset_name"),
        ("--price_per_hour 2", "--price_per_hour has an effect only with dry_run true"),
        ("--eval_metric fid", "--eval_metric has an effect only with --eval_steps"),
        ("--loss hybrid", 'loss "hybrid" trains a variance head'),
        ("--local_rank 1", "no launcher has started this one"),
        ("--hub_model_id me/it", "--hub_model_id has an effect only with push_to_hub true"),
        ("--beta_end 0.03 --ddpm_beta_schedule squaredcos_cap_v2", "--beta_end has an effect only with"),
        ("--double --mixed_precision bf16", "float64"),
        ("--learning_rate inf", "learning_rate must be a finite number, got inf"),
        ("--adam_weight_decay nan", "adam_weight_decay must be"),
        ("--max_grad_norm inf", "max_grad_norm must be a finite number"),
        ("--save_images_steps 5 --save_images_epochs 1", "both say when grids are drawn"),
        ("--allow_config_change lerning_rate", "there is no lerning_rate. Did you mean learning_rate?"),
        ("--ddpm_num_steps 50 --ddpm_num_inference_steps 60", "must be at most ddpm_num_steps, 50, got 60"),
    ],
)
def test_what_is_wrong_or_idle_is_refused_with_a_sentence(words: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=re.escape(sentence)):
        parse_train_config(words.split())


def test_words_of_other_scripts_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse_train_config(["--local_rank=-1"]) == parse_train_config([])
    monkeypatch.setenv("LOCAL_RANK", "1")  # as torch.distributed.launch sets it beside its --local_rank
    config = parse_train_config(["--local_rank", "1", "--preserve_input_precision"])
    assert "local_rank" not in recorded(config) and config.preserve_input_precision
    assert (
        parse_train_config(["--snr_gamma", "5", "--loss", "hybrid", "--variance_type", "learned_range"]).snr_gamma == 5
    )
    assert parse_train_config(["--ddpm_beta_schedule", "laplace"]).ddpm_beta_schedule == "laplace"


def is_refused(name: str, value: float) -> bool:
    """Whether the range of a number is what a value is refused for."""
    from_weights = {"init_from": "pipeline"} if name == "max_train_steps" else {}  # 0 updates export what is there
    try:
        TrainConfig(**{"max_train_steps": 1, **from_weights, name: value})
    except ValueError as error:
        return str(error).startswith(f"{name} must be")
    return False


def test_the_range_of_every_number_stands_at_its_field_and_is_checked() -> None:
    kinds = get_type_hints(TrainConfig)
    numbers = {name for name, kind in kinds.items() if {int, float} & {kind, *get_args(kind)}}
    elsewhere = {"bits", "channel_axis", "max_unreadable", "beta_end", "local_rank", "ema_sigma_rel"}
    ranges = {f.name: f.metadata for f in dataclasses.fields(TrainConfig) if f.name in numbers - elsewhere}
    assert len(ranges) > 40
    for name, rules in ranges.items():
        ends = {rule: rules[rule] for rule in ("at_least", "above", "below") if rule in rules}
        assert ends, name
        for rule, end in ends.items():
            assert is_refused(name, end) == (rule != "at_least"), (name, rule)
            assert is_refused(name, end + (1 if rule == "below" else -1)), (name, rule)
        assert is_refused(name, math.inf) and is_refused(name, math.nan)


def test_the_presets_inference_steps_follow_a_shorter_process() -> None:
    assert parse_train_config(["--ddpm_num_steps", "50"]).ddpm_num_inference_steps == 50
    assert (
        TrainConfig(max_train_steps=1, ddpm_num_steps=50).ddpm_num_inference_steps == 1000
    )  # the default: all of them


def test_what_options_lead_to_may_be_allowed_to_change_by_name() -> None:
    assert TrainConfig(max_train_steps=1, allow_config_change=["network", "data", "seed"]).allow_config_change


@pytest.mark.parametrize(
    ("words", "equal", "resolution"),
    [
        ("--train_data_dir pictures", True, "64"),
        ("--train_data_dir pictures --resolution 32", False, "32"),
        ("--train_data_dir pictures --unet cifar10", False, None),
        ("--train_data_dir pictures --model_config_name_or_path net.json", False, None),
        ("--train_data_dir pictures --preset unconditional", False, "64"),
        ("--train_data_dir pictures --preset lsun256", False, None),
    ],
)
def test_several_sizes_are_refused_where_nobody_named_one(words: str, equal: bool, resolution: str | None) -> None:
    config = parse_train_config(words.split())
    assert (config.equal_sizes, config.resolution) == (equal, resolution)


def test_a_word_is_checked_without_the_parser_too() -> None:
    with pytest.raises(ValueError, match="loss must be one of 'simple', 'vlb', 'hybrid', got 'l2'"):
        TrainConfig(max_train_steps=1, loss="l2")  # pyright: ignore[reportArgumentType]


def test_the_token_is_written_nowhere() -> None:
    config = parse_train_config(["--push_to_hub", "--hub_token", "hf_secret"])
    assert "hf_secret" not in to_yaml(config) + json.dumps(recorded(config))


def test_changes_that_alter_the_weights_are_found_and_others_are_not() -> None:
    old = recorded(PRESETS["digits"].config)
    new = {**old, "learning_rate": 1.0, "logging_steps": 1, "output_dir": "elsewhere"}
    assert config_changes(old, new) == {"learning_rate": (old["learning_rate"], 1.0)}
    assert NEUTRAL <= {f.name for f in dataclasses.fields(TrainConfig)}


def test_every_option_has_a_help_text_that_argparse_can_print(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        parse_train_config(["--help"])
    assert leaving.value.code == 0
    text = capsys.readouterr().out
    for option in dataclasses.fields(TrainConfig):
        if option.metadata.get("hidden"):
            assert f"--{option.name}" not in text
            continue
        assert f"--{option.name}" in text and option.metadata["help"]
