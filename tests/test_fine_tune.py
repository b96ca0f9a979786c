"""--init_from: what a run begins with is the source's, to the last bit; what contradicts it is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, DPMSolverMultistepScheduler, UNet2DModel
from mixture import guided_pipeline
from pictures import save_pictures
from training import TINY_UNET, assert_bitwise_equal, run_here, stopping_after, weights

from ddpm_ext.cli.arguments import parse_train_config
from ddpm_ext.distributed import forget_accelerator
from ddpm_ext.pipelines.ddpm import DDPMExtPipeline
from ddpm_ext.run_dir import RunError
from ddpm_ext.schedulers.ddpm import DDPMExtScheduler
from ddpm_ext.signals import PREEMPTED
from ddpm_ext.training.fine_tune import merged
from ddpm_ext.training.run import run_training
from ddpm_ext.training.trainer import Trainer

FROM: dict[str, Any] = {"model_config_name_or_path": None}


def save(
    folder: Path, network: dict[str, Any] | None = None, safetensors: bool = True, **schedule: Any
) -> dict[str, torch.Tensor]:
    """Save a stock pipeline of random weights; return them."""
    torch.manual_seed(7)
    unet = UNet2DModel(**{**TINY_UNET, **(network or {})})
    pipeline = DDPMPipeline(unet, DDPMScheduler(**schedule))  # pyright: ignore[reportArgumentType]
    pipeline.save_pretrained(folder, safe_serialization=safetensors)
    return unet.state_dict()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "stock"
    save(folder, beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", variance_type="fixed_small")
    return folder


@pytest.fixture(scope="module")
def half_trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "half"
    assert run_here(folder, max_train_steps=4, ema_max_decay=0.5) == 0
    return folder


def exported(run: Path) -> dict[str, torch.Tensor]:
    return DDPMPipeline.from_pretrained(run / "pipeline").unet.state_dict()


def test_after_no_update_the_export_is_the_source(source: Path, tmp_path: Path) -> None:
    assert run_here(tmp_path / "run", **FROM, init_from=source, max_train_steps=0) == 0
    there = DDPMPipeline.from_pretrained(source)
    for name, tensor in exported(tmp_path / "run").items():
        assert torch.equal(tensor, there.unet.state_dict()[name]), name
    ours = json.loads((tmp_path / "run" / "pipeline" / "scheduler" / "scheduler_config.json").read_text())
    for name, value in DDPMPipeline.from_pretrained(tmp_path / "run" / "pipeline").scheduler.config.items():
        if not name.startswith("_"):
            assert value == there.scheduler.config[name], name
    assert ours["beta_schedule"] == "squaredcos_cap_v2"
    record = json.loads((tmp_path / "run" / "config.json").read_text())
    assert record["config"]["prediction_type"] == "v_prediction" and record["config"]["variance_type"] == "fixed_small"
    assert record["init_from"]["source"] == str(source) and record["init_from"]["new"] == []
    assert len(record["init_from"]["weights_sha256"]) == 64


@pytest.mark.parametrize("kind", ["run", "pipeline", "checkpoint", "unfinished run"])
def test_a_run_and_its_parts_are_sources(kind: str, half_trained: Path, tmp_path: Path) -> None:
    given = {"run": half_trained, "pipeline": half_trained / "pipeline"}
    given["checkpoint"] = half_trained / "checkpoints" / "step-00000004"
    given["unfinished run"] = Path(shutil.copytree(half_trained, tmp_path / "copy"))
    shutil.rmtree(tmp_path / "copy" / "pipeline")
    assert run_here(tmp_path / "run", **FROM, init_from=given[kind], max_train_steps=0) == 0
    averaged = weights(half_trained, 4, "ema")
    assert all(torch.equal(tensor, averaged[name]) for name, tensor in exported(tmp_path / "run").items())


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"prediction_type": "epsilon"}, "prediction_type: 'v_prediction' there, 'epsilon' asked for"),
        ({"ddpm_beta_schedule": "linear"}, "ddpm_beta_schedule: 'squaredcos_cap_v2' there, 'linear' asked for"),
        ({"ddpm_num_steps": 500}, "ddpm_num_steps: 1000 there, 500 asked for"),
        ({"variance_type": "fixed_large"}, "variance_type: 'fixed_small' there"),
        ({"variance_type": "learned_range", "loss": "hybrid"}, "added with --init_new_head"),
        ({"unet": "digits"}, "init_from brings its own network"),
        ({"freeze": ["nothing.*"]}, "fits no weight that is trained; its parts are conv_in.*"),
        ({"freeze": ["*"]}, "leaves nothing to train"),
        ({"init_from": "runs/nowhere"}, "There is no folder runs/nowhere"),
        ({"lora_rank": 2, "ema": "power_function"}, "not of the adapters"),
        ({"class_dropout": 0.1}, "class_dropout: the network knows no classes, add them with --class_conditional"),
    ],
)
def test_what_contradicts_the_source_is_refused_and_leaves_nothing(
    changes: dict[str, Any], line: str, source: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=line.replace("*", r"\*").replace("(", r"\(")):
        run_here(tmp_path / "run", **{**FROM, "init_from": source, **changes})
    assert not any((tmp_path / "run").iterdir())


def test_a_solver_that_names_no_variance_needs_a_word_for_it(tmp_path: Path) -> None:
    solver = DPMSolverMultistepScheduler(use_karras_sigmas=True)
    pipeline = DDPMPipeline(UNet2DModel(**TINY_UNET), solver)  # pyright: ignore[reportArgumentType]
    pipeline.save_pretrained(tmp_path / "source")
    given: dict[str, Any] = {**FROM, "init_from": tmp_path / "source", "max_train_steps": 0}
    words = "is a DPMSolverMultistepScheduler, which names no variance_type, .* give --variance_type fixed_small or"
    with pytest.raises(RunError, match=words):
        run_here(tmp_path / "run", **given)
    for word in ("fixed_small", "fixed_large"):
        assert run_here(tmp_path / word, **given, variance_type=word) == 0
        assert json.loads((tmp_path / word / "config.json").read_text())["config"]["variance_type"] == word


def test_steps_of_the_samples_that_the_offset_leaves_no_room_for_are_refused_before_the_run(tmp_path: Path) -> None:
    scheduler = DDIMScheduler(num_train_timesteps=50, steps_offset=1, beta_schedule="squaredcos_cap_v2")
    pipeline = DDPMPipeline(UNet2DModel(**TINY_UNET), scheduler)  # pyright: ignore[reportArgumentType]
    pipeline.save_pretrained(tmp_path / "source")
    given: dict[str, Any] = {**FROM, "init_from": tmp_path / "source", "max_train_steps": 0}
    with pytest.raises(ValueError, match=r"or take 49 steps .*of a training ddpm_num_inference_steps"):
        run_here(tmp_path / "run", **given, ddpm_num_inference_steps=1000)
    assert not any((tmp_path / "run").iterdir())
    assert run_here(tmp_path / "run", **given, ddpm_num_inference_steps=49) == 0


def test_a_learned_variance_is_grown_when_asked_for_and_begins_in_the_middle(source: Path, tmp_path: Path) -> None:
    learned = {"variance_type": "learned_range", "loss": "hybrid", "init_new_head": True, "max_train_steps": 0}
    assert run_here(tmp_path / "run", **FROM, init_from=source, **learned) == 0
    there, here = DDPMPipeline.from_pretrained(source).unet.state_dict(), weights(tmp_path / "run", 0)
    for name, tensor in here.items():
        kept = tensor[:1] if name.startswith("conv_out") else tensor
        assert torch.equal(kept, there[name]), name
    assert here["conv_out.weight"].shape[0] == 2 and not here["conv_out.weight"][1:].any()
    record = json.loads((tmp_path / "run" / "config.json").read_text())
    assert record["init_from"]["new"] == ["conv_out.bias", "conv_out.weight"]


RGB: dict[str, Any] = {"in_channels": 3, "out_channels": 3}
LEARNED: dict[str, Any] = {"network": {"out_channels": 2}, "variance_type": "learned_range"}


@pytest.mark.parametrize(
    ("stock", "asked"),
    [
        ({"safetensors": False}, {}),  # diffusion_pytorch_model.bin
        ({"prediction_type": "sample"}, {"streaming": True}),
        ({"network": RGB}, {}),  # grey images are read as three equal channels
        (LEARNED, {"loss": "hybrid"}),
        (LEARNED, {"loss": "vlb", "init_new_head": True, "variance_type": "learned_range"}),
        ({"network": LEARNED["network"]}, {"loss": "hybrid", "init_new_head": True, "variance_type": "learned_range"}),
    ],
    ids=["bin", "stream", "three channels", "learned", "learned again", "learned, not said"],
)
def test_stock_repositories_of_every_kind_are_sources(stock: Any, asked: Any, tmp_path: Path) -> None:
    there = save(tmp_path / "source", **stock)
    assert run_here(tmp_path / "run", **FROM, init_from=tmp_path / "source", max_train_steps=0, **asked) == 0
    here = exported(tmp_path / "run")
    assert here.keys() == there.keys() and all(torch.equal(here[name], there[name]) for name in there)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["init_from"]["new"] == []
    shutil.rmtree(tmp_path / "source")
    assert run_here(tmp_path / "run", **FROM, init_from=tmp_path / "source", max_train_steps=1, **asked) == 0


def test_a_head_of_which_the_schedule_does_not_know_is_refused_before_the_run(tmp_path: Path) -> None:
    save(tmp_path / "source", LEARNED["network"])
    words = r"gives 2 channels for 1, and its schedule says variance_type 'fixed_small'\. If it has a"
    with pytest.raises(RunError, match=words):
        run_here(tmp_path / "run", **FROM, init_from=tmp_path / "source")
    assert not any((tmp_path / "run").iterdir())


def test_a_network_that_takes_labels_without_a_table_asks_for_the_option(tmp_path: Path) -> None:
    from ddpm_ext.training.fine_tune import _adopt

    options: Any = {**TINY_UNET, "class_embed_type": "timestep"}
    config = parse_train_config(["--dataset_name", "digits", "--output_dir", str(tmp_path)])
    with pytest.raises(RunError, match="the network takes class labels, give --class_conditional"):
        _adopt(config, DDPMExtScheduler().config, options)


def test_three_channels_become_one_when_asked_for(tmp_path: Path) -> None:
    there = save(tmp_path / "source", RGB)
    given = {"init_from": tmp_path / "source", "init_new_head": True, "max_train_steps": 0}
    assert run_here(tmp_path / "run", **FROM, **given) == 0
    here, new = exported(tmp_path / "run"), ["conv_in.weight", "conv_out.bias", "conv_out.weight"]
    assert json.loads((tmp_path / "run" / "config.json").read_text())["init_from"]["new"] == new
    assert here["conv_in.weight"].shape[1] == here["conv_out.weight"].shape[0] == 1
    assert all(torch.equal(here[name], there[name]) for name in there if name not in new)


def test_what_was_measured_for_the_source_is_left_behind(tmp_path: Path) -> None:
    scheduler = DDPMExtScheduler(timestep_spacing="trailing")
    measured = {
        "mse_eps": [0.5] * 1000,
        "trajectories": {"2": [0, 999]},
        "trajectory": "optimal",
        "guidance_scale": 2.0,
    }
    scheduler.register_to_config(_ddpm_ext={**measured, "eta": 0.5})
    DDPMExtPipeline(UNet2DModel(**TINY_UNET), scheduler).save_pretrained(tmp_path / "source")
    assert run_here(tmp_path / "run", **FROM, init_from=tmp_path / "source", max_train_steps=1) == 0
    found: Any = DDPMExtPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    assert found.scheduler.config["_ddpm_ext"] == {"eta": 0.5}
    assert found.scheduler.config["timestep_spacing"] == "trailing"


def test_weights_that_begin_anew_are_trained_whatever_else_is_not(tmp_path: Path) -> None:
    there = save(tmp_path / "source")
    data = {"train_data_dir": pictures(tmp_path / "data", ["a", "b"]), "class_conditional": True}
    given = {**FROM, "init_from": tmp_path / "source", "init_new_head": True, "max_train_steps": 2, **data}
    with pytest.raises(ValueError, match=r"would leave class_embedding.weight as drawn"):
        run_here(tmp_path / "run", **given, freeze=["class_*"])
    pytest.importorskip("peft", reason="peft is not installed")
    attention = {
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
        "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    }
    there = save(tmp_path / "source", attention)
    given |= {"lora_rank": 2, "lr_warmup_steps": 0}
    assert run_here(tmp_path / "first", **{**given, "max_train_steps": 0}) == 0
    assert run_here(tmp_path / "second", **given) == 0
    before, after = exported(tmp_path / "first"), exported(tmp_path / "second")
    new = json.loads((tmp_path / "second" / "config.json").read_text())["init_from"]["new"]
    moved = {name for name in after if not torch.equal(before[name], after[name])}
    assert {"class_embedding.weight", "conv_in.weight"} < set(new) <= moved
    assert all(name in new or ".to_" in name for name in moved) and set(there) <= set(after)
    with pytest.raises(ValueError, match="fits no weight that is trained"):
        run_here(tmp_path / "third", **given, freeze=["mid_block.resnets.*"])


def test_a_null_row_that_is_kept_and_not_trained_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    guided_pipeline(classes=10).save_pretrained(tmp_path / "source")
    for dropout in (0.0, 0.1):
        dropped = {"class_conditional": True, "class_dropout": dropout} if dropout else {}
        given = {"init_from": tmp_path / "source", "max_train_steps": 1, **dropped}
        assert run_here(tmp_path / str(dropout), **FROM, **given) == 0
        said = "what it draws without a class is not trained" in capsys.readouterr().out
        assert said == (dropout == 0)
        network = json.loads((tmp_path / str(dropout) / "pipeline" / "unet" / "config.json").read_text())
        assert network["_ddpm_ext"]["null_label"] == 10


def test_a_folder_with_a_variant_alone_says_so(tmp_path: Path) -> None:
    pipeline = DDPMPipeline(UNet2DModel(**TINY_UNET), DDPMScheduler())  # pyright: ignore[reportArgumentType]
    pipeline.save_pretrained(tmp_path / "source", variant="fp16")
    with pytest.raises(ValueError, match=r'weights of the variant fp16 alone: load it with .*variant="fp16"'):
        run_here(tmp_path / "run", **FROM, init_from=tmp_path / "source")


def test_a_source_of_other_values_is_said_at_the_start(source: Path, tmp_path: Path, capsys: Any) -> None:
    assert run_here(tmp_path / "run", **FROM, init_from=source, max_train_steps=0) == 0
    assert "was trained on" not in capsys.readouterr().err
    assert run_here(tmp_path / "deep", **FROM, init_from=tmp_path / "run", bits=12, max_train_steps=0) == 0
    assert f"{tmp_path / 'run'} was trained on 8 bits, and these images are read as 12 bits" in capsys.readouterr().err


def pictures(folder: Path, classes: list[str]) -> Path:
    """Save 4 colour images of each class."""
    numbers = np.random.default_rng(0)
    for name in classes:
        save_pictures(folder / name, 4, (8, 8, 3), numbers)
    return folder


def test_other_channels_and_classes_need_a_word_and_the_rest_is_loaded(source: Path, tmp_path: Path) -> None:
    data = {"train_data_dir": pictures(tmp_path / "data", ["a", "b"]), "class_conditional": True, "max_train_steps": 0}
    with pytest.raises(RunError, match=r"class_embedding.weight: none there, \(2, 32\) needed"):
        run_here(tmp_path / "run", **FROM, init_from=source, **data)
    assert run_here(tmp_path / "run", **FROM, init_from=source, **data, init_new_head=True) == 0
    there, here = DDPMPipeline.from_pretrained(source).unet.state_dict(), weights(tmp_path / "run", 0)
    record = json.loads((tmp_path / "run" / "config.json").read_text())
    new = ["class_embedding.weight", "conv_in.weight", "conv_out.bias", "conv_out.weight"]
    assert record["init_from"]["new"] == new and record["network"]["in_channels"] == 3
    assert all(torch.equal(here[name], there[name]) for name in there if name not in new)
    other = {**data, "train_data_dir": pictures(tmp_path / "other", ["a", "c"])}
    with pytest.raises(RunError, match="was trained on the classes a, b, and these images have a, c"):
        run_here(tmp_path / "next", **FROM, init_from=tmp_path / "run", **other)
    other |= {"seed": 1, "init_new_head": True}  # as many rows of another meaning
    assert run_here(tmp_path / "next", **FROM, init_from=tmp_path / "run", **other) == 0
    anew = weights(tmp_path / "next", 0)
    differing = [name for name, tensor in here.items() if not torch.equal(tensor, anew[name])]
    record = json.loads((tmp_path / "next" / "config.json").read_text())
    assert differing == record["init_from"]["new"] == ["class_embedding.weight"]


@pytest.mark.parametrize("kind", ["run", "checkpoint"])
def test_that_it_knows_classes_and_what_is_no_class_comes_from_the_source(kind: str, tmp_path: Path) -> None:
    assert run_here(tmp_path / "source", max_train_steps=1, class_conditional=True, seed=1) == 0

    def from_there(folder: Path, name: str, **more: Any) -> dict[str, torch.Tensor]:
        update = max(int(path.name[-8:]) for path in (folder / "checkpoints").iterdir())
        given = folder if kind == "run" else folder / "checkpoints" / f"step-{update:08d}"
        here = tmp_path / name
        assert run_here(here, **FROM, init_from=given, max_train_steps=0, **more) == 0
        assert json.loads((here / "pipeline" / "unet" / "config.json").read_text())["num_class_embeds"] == 11
        return weights(here, 0)

    with pytest.raises(RunError, match=r"class_embedding.weight: \(10, 32\) there, \(11, 32\) needed"):
        from_there(tmp_path / "source", "refused", class_dropout=0.1)
    rows = weights(tmp_path / "source", 1, "ema")["class_embedding.weight"]
    grown = from_there(tmp_path / "source", "grown", class_dropout=0.1, init_new_head=True)["class_embedding.weight"]
    assert torch.equal(grown[:10], rows) and grown.shape == (11, 32)
    for number, more in enumerate(({}, {"class_dropout": 0.2})):  # none of whom needs a word more
        assert torch.equal(from_there(tmp_path / "grown", str(number), **more)["class_embedding.weight"], grown)
    scratch = {"max_train_steps": 1, "class_conditional": True, "class_dropout": 0.5, "seed": 2}
    assert run_here(tmp_path / "scratch", **scratch) == 0
    averaged = weights(tmp_path / "scratch", 1, "ema")["class_embedding.weight"]
    assert torch.equal(from_there(tmp_path / "scratch", "last")["class_embedding.weight"], averaged)


@pytest.mark.parametrize(
    "changes",
    [{"ema": "constant"}, {"ema": "warmup"}, {"ema": "power_function"}, {"freeze": ["down_blocks.*", "conv_in.*"]}],
    ids=lambda changes: str(next(iter(changes.values()))),
)
def test_a_stopped_fine_tune_goes_on_bitwise_without_its_source(
    changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "source"
    there = save(source, prediction_type="v_prediction")
    given = {**FROM, "init_from": source, "max_train_steps": 4, "checkpointing_steps": 100, **changes}
    assert run_here(tmp_path / "whole", **given) == 0
    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "update", stopping_after(2))
        assert run_here(tmp_path / "stopped", **given) == PREEMPTED
    source.rename(tmp_path / "gone")
    assert run_here(tmp_path / "stopped", **given) == 0
    assert_bitwise_equal(tmp_path / "whole", tmp_path / "stopped", 4)
    for name, tensor in weights(tmp_path / "whole", 4).items():
        frozen = "freeze" in changes and name.startswith(("down_blocks.", "conv_in."))
        assert torch.equal(tensor, there[name]) == frozen, name


def test_averages_start_at_the_given_weights(tmp_path: Path) -> None:
    there = save(tmp_path / "source")
    given = {"init_from": tmp_path / "source", "max_train_steps": 1, "ema_max_decay": 0.75, "lr_warmup_steps": 0}
    assert run_here(tmp_path / "run", **FROM, **given) == 0
    averaged, raw = weights(tmp_path / "run", 1, "ema"), weights(tmp_path / "run", 1)
    for name, tensor in averaged.items():  # 0.75 θ_0 + 0.25 θ_1, and not a copy of θ_1
        torch.testing.assert_close(tensor, 0.75 * there[name] + 0.25 * raw[name], rtol=0, atol=1e-6)


def test_options_of_a_folder_with_weights_are_said_to_be_its_options_alone(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_here(tmp_path / "run", model_config_name_or_path=source, max_train_steps=1) == 0
    assert f"of the options of {source} alone; --init_from {source} would start" in capsys.readouterr().out


def test_adapters_alone_are_trained_and_merged_into_the_export(tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="peft is not installed")
    attention = {
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
        "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    }
    there = save(tmp_path / "source", attention)
    given = {**FROM, "init_from": tmp_path / "source", "max_train_steps": 3, "lora_rank": 2, "lr_warmup_steps": 0}
    assert run_here(tmp_path / "run", **given) == 0
    here = exported(tmp_path / "run")
    assert here.keys() == there.keys()
    moved = {name for name, tensor in here.items() if not torch.equal(tensor, there[name])}
    assert moved and all(name.rsplit(".", 1)[0].endswith(("to_q", "to_k", "to_v", "to_out.0")) for name in moved)
    averaged = weights(tmp_path / "run", 3, "ema")
    name = next(iter(sorted(moved))).removesuffix(".weight")
    a, b = (averaged[f"{name}.lora_{part}.default.weight"] for part in "AB")
    torch.testing.assert_close(here[f"{name}.weight"], there[f"{name}.weight"] + b @ a, rtol=0, atol=1e-6)
    assert torch.linalg.matrix_rank(here[f"{name}.weight"].double() - there[f"{name}.weight"].double(), atol=1e-6) <= 2
    assert run_here(tmp_path / "run", **{**given, "max_train_steps": 4}) == 0  # goes on
    with pytest.raises(RunError, match="cannot change lora_rank: 2 -> 3, since its checkpoints hold other tensors"):
        run_here(
            tmp_path / "run", **{**given, "max_train_steps": 5, "lora_rank": 3, "allow_config_change": ["lora_rank"]}
        )
    assert run_here(tmp_path / "next", **FROM, init_from=tmp_path / "run", max_train_steps=0) == 0


def test_adapters_need_peft_and_an_attention(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = "ddpm_ext.training.fine_tune.importlib.util.find_spec"
    monkeypatch.setattr(found, lambda name: None)
    with pytest.raises(RunError, match="needs peft"):
        run_here(tmp_path / "run", **FROM, init_from=source, lora_rank=2)
    monkeypatch.setattr(found, lambda name: name)
    save(tmp_path / "plain", {"add_attention": False})
    with pytest.raises(RunError, match="this one has none"):
        run_here(tmp_path / "run", **FROM, init_from=tmp_path / "plain", lora_rank=2)


def test_merging_is_the_sum() -> None:
    a, b, w = torch.randn(2, 5), torch.randn(4, 2), torch.randn(4, 5)
    named = {"q.base_layer.weight": w, "q.base_layer.bias": w[:, 0], "q.lora_A.default.weight": a}
    plain = merged({**named, "q.lora_B.default.weight": b, "x.weight": w})
    assert plain.keys() == {"q.weight", "q.bias", "x.weight"}
    torch.testing.assert_close(plain["q.weight"], w + b @ a)


@pytest.mark.slow
def test_from_a_half_trained_network_the_digits_are_good_in_fewer_updates_than_from_scratch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From scratch 0.10 is not reached in 500 updates; from there in at most 200. About 4 minutes of one core."""
    monkeypatch.setattr("ddpm_ext.evaluation.features.reference.default_cache", lambda: tmp_path / "references")
    measured = ["--eval_samples", "1000", "--eval_num_inference_steps", "100", "--eval_max_images", "1500"]
    small = ["--cpu", "--num_threads", "1", "--ddpm_num_inference_steps", "10", "--eval_batch_size", "4"]

    def distances(name: str, *words: str) -> tuple[int, list[float]]:
        """Exit code, and the Fréchet distance of 1,000 samples of 100 steps at each evaluation."""
        forget_accelerator()
        folder = tmp_path / name
        code = run_training(parse_train_config([*words, *measured, *small, "--output_dir", str(folder)]))
        lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        return code, [line["eval/fid"] for line in lines if "eval/fid" in line]

    with monkeypatch.context() as patched:  # half of 1200 updates would be good already, at the edge
        patched.setattr(Trainer, "update", stopping_after(501))  # after the evaluation
        code, scratch = distances(
            "scratch", "--preset", "digits", "--checkpointing_steps", "500", "--eval_steps", "500"
        )
    assert code == PREEMPTED and scratch[0] > 0.10
    half = ["--init_from", str(tmp_path / "scratch" / "checkpoints" / "step-00000500"), "--train_batch_size", "128"]
    rate = ["--learning_rate", "1e-3", "--lr_scheduler", "cosine", "--lr_warmup_steps", "20", "--ema_max_decay", "0.99"]
    code, tuned = distances("tuned", *half, *rate, "--max_train_steps", "200", "--eval_steps", "100")
    assert code == 0 and min(tuned) <= 0.10
