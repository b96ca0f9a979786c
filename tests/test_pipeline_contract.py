"""What Diffusers asks of every pipeline, in our own words: saving, loading, dtypes, variants, callbacks, outputs."""

from __future__ import annotations

import inspect
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, DiffusionPipeline, UNet2DModel
from diffusers.utils import logging as diffusers_logging
from networks import tiny_unet
from safetensors.torch import load_file

from ddpm_ext import DDPMExtPipeline, DDPMExtScheduler, UserError


def unet() -> UNet2DModel:
    """The small network of Diffusers' own DDPM test, from its seed."""
    return tiny_unet(
        in_channels=3,
        out_channels=3,
        block_out_channels=(4, 8),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )


def quiet(pipe: DDPMExtPipeline) -> DDPMExtPipeline:
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pipe() -> DDPMExtPipeline:
    return quiet(DDPMExtPipeline(unet(), DDPMExtScheduler()))


def run(pipe: DDPMExtPipeline, **options: Any) -> Any:
    options = {"num_inference_steps": 2, "output_type": "np", "generator": torch.Generator().manual_seed(0), **options}
    return pipe(**options)


@contextmanager
def diffusers_log(level: int) -> Iterator[list[str]]:
    """The messages that Diffusers logs inside."""
    lines: list[str] = []
    handler = logging.Handler(level)
    handler.emit = lambda record: lines.append(record.getMessage())
    logger = diffusers_logging.get_logger("diffusers")
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(level)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


@pytest.mark.parametrize("scheduler", [DDPMScheduler, DDPMExtScheduler])
def test_the_picture_printed_in_diffusers_tests(scheduler: type) -> None:
    image = run(quiet(DDPMExtPipeline(unet(), scheduler()))).images
    assert image.shape == (1, 8, 8, 3)
    printed = [0.0, 0.9996672, 0.00329116, 1.0, 0.9995991, 1.0, 0.0060907, 0.00115037, 0.0]
    np.testing.assert_allclose(image[0, -3:, -3:, -1].flatten(), printed, atol=1e-5)


def test_sample_prediction_runs_twice_alike() -> None:
    pipe = quiet(DDPMExtPipeline(unet(), DDPMScheduler(prediction_type="sample")))
    np.testing.assert_array_equal(run(pipe).images, run(pipe)[0])


def test_every_option_of_the_call_has_a_default() -> None:
    parameters = dict(inspect.signature(DDPMExtPipeline.__call__).parameters)
    del parameters["self"]
    parameters = {name: one for name, one in parameters.items() if one.kind is not inspect.Parameter.VAR_KEYWORD}
    assert all(parameter.default is not inspect.Parameter.empty for parameter in parameters.values())
    defaults = {name: parameter.default for name, parameter in parameters.items()}
    assert {"generator", "latents", "timesteps", "class_labels", "callback_on_step_end"} <= set(defaults)
    assert defaults["batch_size"] == 1
    assert defaults["num_inference_steps"] == 1000
    assert defaults["output_type"] == "pil"
    assert defaults["return_dict"] is True
    assert list(defaults["callback_on_step_end_tensor_inputs"]) == ["latents"]


def test_the_tuple_holds_what_the_record_holds(pipe: DDPMExtPipeline) -> None:
    record, bare = run(pipe), run(pipe, return_dict=False)
    assert isinstance(bare, tuple)
    assert len(bare) == 1
    np.testing.assert_array_equal(bare[0], record.images)
    np.testing.assert_array_equal(record[0], record.images)


def test_batches_have_their_size_and_the_first_of_three_is_the_single_one(pipe: DDPMExtPipeline) -> None:
    generators = [torch.Generator().manual_seed(i) for i in range(3)]
    three = run(pipe, batch_size=3, generator=generators).images
    assert len(three) == 3
    np.testing.assert_allclose(three[0], run(pipe).images[0], atol=1e-4)
    assert len(run(pipe, batch_size=2).images) == 2


def test_components_are_what_the_constructor_takes(pipe: DDPMExtPipeline) -> None:
    assert set(pipe.components) == {"unet", "scheduler"}
    again = quiet(DDPMExtPipeline(**pipe.components))
    np.testing.assert_array_equal(run(again).images, run(pipe).images)


def test_saved_and_loaded_it_draws_the_same_and_says_what_it_loads(pipe: DDPMExtPipeline, tmp_path: Path) -> None:
    expected = run(pipe).images
    for safe in (True, False):
        pipe.save_pretrained(tmp_path / str(safe), safe_serialization=safe)
        with diffusers_log(logging.INFO) as lines:
            loaded = DDPMExtPipeline.from_pretrained(tmp_path / str(safe))
        for name in loaded.components:
            assert any(name in line for line in lines)
        # The loaded weights lie elsewhere in memory: convolutions may sum in another order.
        np.testing.assert_allclose(run(quiet(loaded)).images, expected, atol=1e-5)


def test_nothing_is_optional(pipe: DDPMExtPipeline) -> None:
    assert pipe._optional_components == []


def test_to_dtype_reaches_the_network(pipe: DDPMExtPipeline) -> None:
    assert pipe.dtype == torch.float32
    pipe.to(dtype=torch.float16)
    assert {parameter.dtype for parameter in pipe.unet.parameters()} == {torch.float16}
    assert pipe.dtype == torch.float16


@pytest.mark.parametrize("chosen", [torch.bfloat16, {"unet": torch.bfloat16, "default": torch.float16}])
def test_the_dtype_of_loading_is_the_networks(pipe: DDPMExtPipeline, tmp_path: Path, chosen: Any) -> None:
    pipe.save_pretrained(tmp_path)
    loaded = DDPMExtPipeline.from_pretrained(tmp_path, dtype=chosen)
    assert loaded.unet.dtype == torch.bfloat16


def test_attention_slicing_changes_nothing(pipe: DDPMExtPipeline) -> None:
    expected = run(pipe).images
    for size in (1, 2):
        pipe.enable_attention_slicing(slice_size=size)
        np.testing.assert_allclose(run(pipe).images, expected, atol=1e-4)


def test_a_cpu_pipeline_has_no_offload_hooks_and_offloading_frees_them(pipe: DDPMExtPipeline) -> None:
    run(pipe)
    assert not getattr(pipe, "_all_hooks", [])
    assert not hasattr(pipe.unet, "_hf_hook")
    assert pipe.model_cpu_offload_seq == "unet"
    freed: list[bool] = []
    pipe.maybe_free_model_hooks = lambda: freed.append(True)  # type: ignore[method-assign]
    run(pipe)
    assert freed == [True]
    with pytest.raises(RuntimeError, match="stop"):
        run(pipe, callback_on_step_end=_raise)
    assert freed == [True, True]


def _raise(*_: Any) -> dict[str, Any]:
    raise RuntimeError("stop")


# -- variants ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("variant", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_a_half_variant_is_half_on_disk(
    pipe: DDPMExtPipeline, tmp_path: Path, variant: str, dtype: torch.dtype
) -> None:
    pipe.save_pretrained(tmp_path, variant=variant)
    assert pipe.unet.dtype == torch.float32  # the pipeline itself is as it was
    assert [path.name for path in (tmp_path / "unet").glob("*.safetensors")] == [
        f"diffusion_pytorch_model.{variant}.safetensors"
    ]
    stored = load_file(tmp_path / "unet" / f"diffusion_pytorch_model.{variant}.safetensors")
    for name, weight in pipe.unet.state_dict().items():
        assert torch.equal(stored[name], weight.to(dtype))
    loaded = DDPMExtPipeline.from_pretrained(tmp_path, variant=variant, dtype=dtype)
    assert loaded.unet.dtype == dtype


def test_a_variant_loads_bitwise_where_half_holds_the_weights(pipe: DDPMExtPipeline, tmp_path: Path) -> None:
    torch.nn.Module.to(pipe.unet, torch.float16)
    torch.nn.Module.to(pipe.unet, torch.float32)
    pipe.save_pretrained(tmp_path, variant="fp16")
    loaded = DDPMExtPipeline.from_pretrained(tmp_path, variant="fp16")
    for before, after in zip(pipe.unet.parameters(), loaded.unet.parameters(), strict=True):
        assert torch.equal(before, after)


def test_another_word_only_names_the_files(pipe: DDPMExtPipeline, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path, variant="ema")
    stored = load_file(tmp_path / "unet/diffusion_pytorch_model.ema.safetensors")
    assert {weight.dtype for weight in stored.values()} == {torch.float32}


def test_a_variant_that_is_not_there_is_an_error(pipe: DDPMExtPipeline, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="You are trying to load the model files of the `variant=fp16`"):
        DDPMExtPipeline.from_pretrained(tmp_path, variant="fp16")


def test_a_failed_save_of_a_variant_leaves_the_network(pipe: DDPMExtPipeline, tmp_path: Path) -> None:
    before = pipe.unet
    with pytest.raises(TypeError):
        pipe.save_pretrained(tmp_path, variant="fp16", max_shard_size=object())
    assert pipe.unet is before
    assert pipe.unet.dtype == torch.float32


# -- callbacks ---------------------------------------------------------------------------------------------------------


def test_a_callback_sees_every_step_and_only_the_tensors_it_asked_for(pipe: DDPMExtPipeline) -> None:
    seen: list[tuple[int, int, list[str]]] = []

    def callback(_: Any, i: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append((i, int(t), sorted(tensors)))
        return tensors

    run(pipe, num_inference_steps=3, callback_on_step_end=callback)
    assert seen == [(0, 666, ["latents"]), (1, 333, ["latents"]), (2, 0, ["latents"])]
    seen.clear()
    names = pipe._callback_tensor_inputs
    run(pipe, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=names)
    assert [entry[2] for entry in seen] == [sorted(names)] * 2
    assert pipe.num_timesteps == 2


def test_a_callback_replaces_the_latents(pipe: DDPMExtPipeline) -> None:
    def zero_at_last(pipe: Any, i: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        last = i == pipe.num_timesteps - 1
        return {"latents": torch.zeros_like(tensors["latents"])} if last else tensors

    assert not run(pipe, output_type="latent", callback_on_step_end=zero_at_last).images.any()
    plain = run(pipe, output_type="latent").images
    changed = run(
        pipe,
        output_type="latent",
        callback_on_step_end=lambda _, i, t, tensors: {"latents": tensors["latents"] + 1} if i == 0 else {},
    ).images
    assert not torch.equal(changed, plain)  # the chain went on from the replaced latents


def test_a_callback_can_end_the_chain(pipe: DDPMExtPipeline) -> None:
    latents: list[torch.Tensor] = []

    def stop(pipe: Any, i: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        latents.append(tensors["latents"])
        pipe._interrupt = i == 1
        return {}

    images = run(pipe, num_inference_steps=5, output_type="latent", callback_on_step_end=stop).images
    assert len(latents) == 2
    assert torch.equal(images, latents[1])
    latents.clear()
    run(pipe, callback_on_step_end=lambda *a: latents.append(a[3]["latents"]) or {})
    assert len(latents) == 2  # the next call runs to its end


# -- the progress bar --------------------------------------------------------------------------------------------------


def test_the_progress_bar_counts_the_steps_and_can_be_off(
    pipe: DDPMExtPipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    run(pipe, num_inference_steps=7)
    assert capsys.readouterr().err == ""
    pipe.set_progress_bar_config(disable=False)
    run(pipe, num_inference_steps=7)
    assert "7/7" in capsys.readouterr().err


# -- what the index says -----------------------------------------------------------------------------------------------


def test_the_index_is_stocks_and_says_nothing_of_this_machine(pipe: DDPMExtPipeline, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path / "once")
    loaded = DDPMExtPipeline.from_pretrained(tmp_path / "once")
    loaded.save_pretrained(tmp_path / "twice")
    texts = {path.name: path.read_text() for path in (tmp_path / "twice").rglob("*.json")}
    index = json.loads(texts["model_index.json"])
    assert index["_class_name"] == "DDPMPipeline"
    assert index["scheduler"] == ["diffusers", "DDPMScheduler"]
    assert index["unet"] == ["diffusers", "UNet2DModel"]
    assert json.loads(texts["scheduler_config.json"])["_class_name"] == "DDPMScheduler"
    assert str(tmp_path) not in texts["model_index.json"] + texts["scheduler_config.json"]
    assert not [name for name, text in texts.items() if "DDPMExt" in text]


def test_a_subclass_keeps_its_own_name(pipe: DDPMExtPipeline, tmp_path: Path) -> None:
    class Other(DDPMExtPipeline):
        pass

    Other(**pipe.components).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["_class_name"] == "Other"


def test_it_is_a_diffusion_pipeline() -> None:
    assert issubclass(DDPMExtPipeline, DiffusionPipeline)
    assert DDPMExtPipeline._get_signature_types()["scheduler"]


# Sizes ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(9, 9), (8, 9), (7, 8), (1, 2)], ids=str)
@pytest.mark.parametrize("road", ["call", "progressive", "continue_from", "sample_size", "interpolate"])
def test_sizes_that_the_network_cannot_halve_are_refused_before_the_first_step(
    size: tuple[int, int], road: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = DDPMExtPipeline(tiny_unet(), DDPMExtScheduler())
    monkeypatch.setattr(UNet2DModel, "forward", lambda *_args, **_options: pytest.fail("a step was taken"))
    x = torch.randn(1, 1, *size)
    if road in ("sample_size", "interpolate"):
        pipe.unet.register_to_config(sample_size=list(size))
    roads: dict[str, Any] = {
        "call": lambda: pipe(latents=x, num_inference_steps=2),
        "progressive": lambda: pipe.progressive(latents=x, num_inference_steps=2),
        "continue_from": lambda: pipe.continue_from(x, 5),
        "sample_size": lambda: pipe(num_inference_steps=2),
        "interpolate": lambda: pipe.interpolate(x[0].clamp(-1, 1), x[0].clamp(-1, 1), 5),
    }
    with pytest.raises(UserError, match=r"(?i)halve|multiple|divis"):
        roads[road]()


@pytest.mark.parametrize("name", ["runs/nothing", "./nothing", "/nothing", "nothing", "tests/nothing", "a/b/c"])
def test_a_name_that_looks_local_is_answered_at_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DDPMExtPipeline, "download", lambda *_args, **_options: pytest.fail("the Hub was asked"))
    with pytest.raises(UserError, match="There is no folder"):
        DDPMExtPipeline.from_pretrained(name)
