"""DDPMExtPipeline against closed forms of analytic networks and against stock pipelines on the same noise."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    UNet2DModel,
    UniPCMultistepScheduler,
)
from diffusers.models.unets.unet_2d import UNet2DOutput
from PIL import Image
from torch import Tensor

from ddpm_ext import DDPMExtPipeline, DDPMExtScheduler

# Diffusers' sigma schedulers call np.array on a tensor, of which NumPy 2 warns.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

TINY: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 3,
    "out_channels": 3,
    "layers_per_block": 1,
    "block_out_channels": (4, 8),
    "norm_num_groups": 2,
    "attention_head_dim": 4,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}
Formula = Callable[[Tensor, Tensor, Tensor | None], Tensor]


class Analytic(UNet2DModel):
    """A network whose output is a formula of (x_t, t, labels)."""

    formula: Formula

    def forward(self, sample: Tensor, timestep: Any, class_labels: Any = None, return_dict: bool = True) -> Any:
        assert not self.training, "sampling must put the network into eval mode"
        output = self.formula(sample, torch.as_tensor(timestep), class_labels)
        return UNet2DOutput(sample=output) if return_dict else (output,)


def analytic(formula: Formula, **config: Any) -> Analytic:
    network = Analytic(**{**TINY, **config})
    network.formula = formula
    return network


def tiny_unet(**config: Any) -> UNet2DModel:
    torch.manual_seed(0)
    return UNet2DModel(**{**TINY, **config}).eval()


def pipeline(unet: UNet2DModel, scheduler: Any = None, **options: Any) -> DDPMExtPipeline:
    pipe = DDPMExtPipeline(unet, scheduler or DDPMExtScheduler(**options))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(pipe: DDPMExtPipeline, seed: int = 0, **options: Any) -> Any:
    return pipe(generator=seeded(seed), **{"num_inference_steps": 4, "output_type": "latent", **options}).images


# -- the same samples as stock ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_same_noise_same_samples_as_the_stock_pipeline(variance_type: str, prediction_type: str) -> None:
    unet = tiny_unet()
    options = {"variance_type": variance_type, "prediction_type": prediction_type}
    stock = DDPMPipeline(unet, DDPMScheduler(**options))
    stock.set_progress_bar_config(disable=True)
    expected = stock(2, generator=seeded(), num_inference_steps=8, output_type="np").images
    actual = pipeline(unet, **options)(2, generator=seeded(), num_inference_steps=8, output_type="np").images
    # Stock's float32 tables are off by up to 5e-4 relative in the last steps' weights of small residues.
    np.testing.assert_allclose(actual, expected, atol=2e-4)


def test_without_a_generator_the_global_one_decides() -> None:
    unet = tiny_unet()
    stock = DDPMPipeline(unet, DDPMScheduler())
    stock.set_progress_bar_config(disable=True)
    torch.manual_seed(5)
    expected = stock(num_inference_steps=3, output_type="np").images
    torch.manual_seed(5)
    actual = pipeline(unet)(num_inference_steps=3, output_type="np").images
    np.testing.assert_allclose(actual, expected, atol=2e-4)


def test_a_stock_scheduler_becomes_ours_with_the_same_options() -> None:
    options = {"beta_schedule": "squaredcos_cap_v2", "variance_type": "fixed_large", "num_train_timesteps": 500}
    pipe = DDPMExtPipeline(tiny_unet(), DDPMScheduler(**options))
    assert type(pipe.scheduler) is DDPMExtScheduler
    assert {key: pipe.scheduler.config[key] for key in options} == options


# -- closed forms -----------------------------------------------------------------------------------------------------


def test_a_network_that_knows_the_image_ends_exactly_there() -> None:
    image = torch.rand(2, 3, 8, 8, generator=seeded(1)) * 2 - 1
    pipe = pipeline(analytic(lambda x_t, t, _: image), prediction_type="sample")
    torch.testing.assert_close(pictures(pipe, batch_size=2), image, atol=1e-6, rtol=0)  # c1 = 1, c2 = 0 at s = -1


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
def test_gaussian_data_gives_the_mean_and_variance_of_its_chain(variance_type: str) -> None:
    # x_0 ~ N(m, v): the best network is linear in x_t, so every x_t of the chain is Gaussian with known moments.
    m, v, K = 0.3, 0.04, 25
    alpha_bar = DDPMExtScheduler().tables.alpha_bar

    def x_0_weights(ab: float) -> tuple[float, float]:  # E[x_0 | x_t] = g x_t + h
        g = v * ab**0.5 / (v * ab + 1 - ab)
        return g, m - g * ab**0.5 * m

    def network(x_t: Tensor, t: Tensor, _: Tensor | None) -> Tensor:
        g, h = x_0_weights(float(alpha_bar[int(t)]))
        return g * x_t + h

    unet = analytic(network, in_channels=1, out_channels=1, sample_size=32)
    pipe = pipeline(unet, prediction_type="sample", variance_type=variance_type, clip_sample=False)
    samples = pictures(pipe, batch_size=32, num_inference_steps=K).double()

    mean, var = 0.0, 1.0
    times = [1000 // K * i for i in reversed(range(K))]  # leading
    for t, s in zip(times, [*times[1:], None], strict=True):
        ab_t, ab_s = float(alpha_bar[t]), 1.0 if s is None else float(alpha_bar[s])
        a = ab_t / ab_s
        g, h = x_0_weights(ab_t)
        c1, c2 = ab_s**0.5 * (1 - a) / (1 - ab_t), a**0.5 * (1 - ab_s) / (1 - ab_t)
        small = (1 - ab_s) / (1 - ab_t) * (1 - a)
        sigma2 = 0.0 if s is None else (small if variance_type == "fixed_small" else 1 - a)
        mean, var = (c1 * g + c2) * mean + c1 * h, (c1 * g + c2) ** 2 * var + sigma2
    n = samples.numel()  # 32768 independent numbers: five standard errors
    assert abs(float(samples.mean()) - mean) < 5 * (var / n) ** 0.5
    assert abs(float(samples.var()) / var - 1) < 5 * (2 / n) ** 0.5


# -- output ------------------------------------------------------------------------------------------------------------


def test_the_four_output_types_show_the_same_pictures() -> None:
    pipe = pipeline(tiny_unet(sample_size=(8, 16)), clip_sample=False)
    latent = pictures(pipe, batch_size=2)
    assert latent.shape == (2, 3, 8, 16)
    assert latent.abs().max() > 1  # so that clamping is seen
    unit = (latent.double() / 2 + 0.5).clamp(0, 1)
    pt, arrays, pil = (pictures(pipe, batch_size=2, output_type=word) for word in ("pt", "np", "pil"))
    torch.testing.assert_close(pt.double(), unit, atol=1e-6, rtol=0)
    assert arrays.shape == (2, 8, 16, 3)
    np.testing.assert_allclose(arrays, unit.permute(0, 2, 3, 1).numpy(), atol=1e-6)
    assert [image.size for image in pil] == [(16, 8), (16, 8)]  # Pillow says (width, height)
    shown = np.stack([np.asarray(image, dtype=np.float64) for image in pil])
    assert np.abs(shown - 255 * arrays).max() <= 0.5 + 1e-4  # the nearest 8-bit value
    np.testing.assert_array_equal(pictures(pipe, batch_size=2, output_type="numpy"), arrays)  # stock's older word


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (2, "LA"), (3, "RGB"), (4, "RGBA")])
def test_one_to_four_channels_are_pictures(channels: int, mode: str) -> None:
    image = torch.rand(1, channels, 8, 8, generator=seeded()) * 2 - 1
    unet = analytic(lambda x_t, t, _: image, in_channels=channels, out_channels=channels)
    pipe = pipeline(unet, prediction_type="sample")
    (picture,) = pictures(pipe, output_type="pil")
    assert (picture.mode, picture.size) == (mode, (8, 8))
    values = np.asarray(picture).reshape(8, 8, channels)
    np.testing.assert_array_equal(values, np.rint((image[0].permute(1, 2, 0).numpy() + 1) * 127.5))


def test_more_channels_than_a_picture_holds_are_arrays() -> None:
    pipe = pipeline(tiny_unet(in_channels=7, out_channels=7))
    assert pictures(pipe, output_type="np").shape == (1, 8, 8, 7)
    with pytest.raises(ValueError, match=r'"pil" shows 1 to 4 channels, this network has 7. Use "np" or "pt"'):
        pipe()


def test_latents_choose_the_size_and_are_the_start() -> None:
    seen: list[Tensor] = []

    def network(x_t: Tensor, t: Tensor, _: Tensor | None) -> Tensor:
        seen.append(x_t)
        return x_t

    pipe = pipeline(analytic(network))
    x_T = torch.randn(2, 3, 16, 24, generator=seeded())
    assert pictures(pipe, batch_size=2, latents=x_T).shape == x_T.shape
    assert torch.equal(seen[0], x_T)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_sample(dtype: torch.dtype) -> None:
    # Stock's step draws its noise in half precision too, so both chains see the same numbers.
    unet = tiny_unet().to(dtype)
    x_T = torch.randn(1, 3, 8, 8, generator=seeded()).to(dtype)
    pipe = pipeline(unet)
    latent = pipe(latents=x_T, generator=seeded(1), num_inference_steps=6, output_type="latent").images
    assert latent.dtype == dtype
    stock, x_t, generator = DDPMScheduler(), x_T, seeded(1)
    stock.set_timesteps(6)
    with torch.no_grad():
        for t in stock.timesteps:
            x_t = stock.step(unet(x_t, t).sample, t, x_t, generator=generator).prev_sample
    torch.testing.assert_close(latent, x_t, atol=0.1, rtol=0)  # stock rounds each term to half, we only the result
    assert pipe(num_inference_steps=2, output_type="np").images.dtype == np.float32
    assert pipe(num_inference_steps=2).images[0].mode == "RGB"


# -- generators and batches --------------------------------------------------------------------------------------------


def test_one_generator_per_image_makes_an_image_independent_of_its_batch() -> None:
    pipe = pipeline(tiny_unet())
    options = {"num_inference_steps": 5, "output_type": "latent"}
    together = pipe(3, generator=[seeded(i) for i in range(3)], **options).images
    alone = torch.cat([pipe(generator=[seeded(i)], **options).images for i in range(3)])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=0)  # convolutions of a batch round differently
    assert (together[0] - together[1]).abs().max() > 0.1


# -- modes and failures ------------------------------------------------------------------------------------------------


def modes(unet: UNet2DModel) -> list[bool]:
    return [module.training for module in unet.modules()]


def half_training(unet: UNet2DModel) -> list[bool]:
    unet.train()
    unet.mid_block.eval()  # a frozen part: it must stay so
    return modes(unet)


def test_sampling_is_in_eval_mode_and_every_module_returns_to_its_own() -> None:
    unet = tiny_unet(dropout=0.5)
    pipe = pipeline(unet)
    expected = pictures(pipe)
    before = half_training(unet)
    assert torch.equal(pictures(pipe), expected)  # dropout was off
    assert modes(unet) == before
    unet.eval()
    pictures(pipe)
    assert not any(modes(unet))


def test_the_mode_returns_after_an_exception_and_an_abandoned_view() -> None:
    unet = tiny_unet()
    pipe = pipeline(unet)
    before = half_training(unet)

    def stumble(*_: Any) -> dict[str, Tensor]:
        raise RuntimeError("stumbled")

    with pytest.raises(RuntimeError, match="stumbled"):
        pipe(num_inference_steps=3, callback_on_step_end=stumble)
    assert modes(unet) == before
    for _ in pipe.progressive(num_inference_steps=3):
        assert not any(modes(unet))
        break
    assert modes(unet) == before


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_is_an_error_that_names_the_step(value: float) -> None:
    called: list[int] = []

    def network(x_t: Tensor, t: Tensor, _: Tensor | None) -> Tensor:
        output = torch.zeros_like(x_t)
        if int(t) == 500:
            output[0, 0, 0, 0] = value
        return output

    def callback(pipe: Any, i: int, t: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        called.append(int(t))
        return tensors

    unet = analytic(network)
    unet.train()
    pipe = pipeline(unet)
    with pytest.raises(FloatingPointError, match=r"not finite at t = 500 \(step 2 of 4\).*bfloat16 or float32"):
        pipe(num_inference_steps=4, callback_on_step_end=callback)
    assert called == [750]
    assert unet.training


def test_latents_that_a_callback_spoils_are_no_picture() -> None:
    pipe = pipeline(analytic(lambda x_t, t, _: torch.zeros_like(x_t)))

    def spoil(pipe: Any, i: int, t: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"latents": tensors["latents"] * float("nan")} if int(t) == 0 else {}

    with pytest.raises(FloatingPointError, match="not finite after the last step, t = 0"):
        pipe(num_inference_steps=4, callback_on_step_end=spoil)


# -- other schedulers --------------------------------------------------------------------------------------------------

SWAPPED = {
    "DDIMScheduler": DDIMScheduler(),
    "DPMSolverMultistepScheduler": DPMSolverMultistepScheduler(algorithm_type="dpmsolver++"),
    "PNDMScheduler": PNDMScheduler(),
    "EulerDiscreteScheduler": EulerDiscreteScheduler(),
    "EulerDiscreteScheduler, leading": EulerDiscreteScheduler(timestep_spacing="leading"),
    "UniPCMultistepScheduler": UniPCMultistepScheduler(),
    "DDPMScheduler": DDPMScheduler(),
}


def known_image() -> tuple[Tensor, Analytic]:
    """One image and the exact network of a data set that is only this image: ε = (x_t - √ᾱ x_0) / √(1-ᾱ)."""
    image = torch.rand(1, 3, 8, 8, generator=seeded(3)) * 1.8 - 0.9
    alpha_bar = DDPMExtScheduler().tables.alpha_bar

    def network(x_t: Tensor, t: Tensor, _: Tensor | None) -> Tensor:
        low, high = int(np.floor(float(t))), int(np.ceil(float(t)))  # Euler's times lie between the table's
        ab = (alpha_bar[low] + alpha_bar[high]) / 2
        return ((x_t.double() - ab.sqrt() * image) / (1 - ab).sqrt()).float()

    return image, analytic(network)


@pytest.mark.parametrize("name", SWAPPED)
def test_any_scheduler_can_be_swapped_in(name: str, tmp_path: Path) -> None:
    image, unet = known_image()
    pipe = pipeline(unet)
    words = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
    pipe.scheduler = type(SWAPPED[name]).from_config({**SWAPPED[name].config, **words})
    result = pipe(2, generator=seeded(), num_inference_steps=20, output_type="latent").images
    # PNDM ends at ᾱ_0 and not at the clean image: √(1-ᾱ_0) = 0.01 of its noise stays.
    torch.testing.assert_close(result, image.expand(2, -1, -1, -1), atol=0.06 if "PNDM" in name else 5e-3, rtol=0)

    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["scheduler"] == ["diffusers", name.split(",")[0]]
    assert json.loads((tmp_path / "scheduler/scheduler_config.json").read_text())["_class_name"] == name.split(",")[0]


@pytest.mark.parametrize("spacing", ["leading", "linspace"])
def test_the_first_latents_have_the_scale_of_the_chosen_timesteps(spacing: str) -> None:
    seen: list[Tensor] = []

    def network(x_t: Tensor, t: Tensor, _: Tensor | None) -> Tensor:
        seen.append(x_t)
        return torch.zeros_like(x_t)

    pipe = pipeline(analytic(network), EulerDiscreteScheduler(timestep_spacing=spacing))
    pictures(pipe, num_inference_steps=5)
    noise = torch.randn(1, 3, 8, 8, generator=seeded())
    torch.testing.assert_close(seen[0], noise, atol=1e-4, rtol=1e-4)  # linspace: σ/√(σ²+1) = 0.99998


def test_ddim_gives_the_pictures_of_the_stock_ddim_pipeline() -> None:
    unet = tiny_unet()
    stock = DDIMPipeline(unet, DDIMScheduler())
    stock.set_progress_bar_config(disable=True)
    expected = stock(2, generator=seeded(), num_inference_steps=6, output_type="np").images
    actual = pictures(pipeline(unet, DDIMScheduler()), batch_size=2, num_inference_steps=6, output_type="np")
    np.testing.assert_allclose(actual, expected, atol=1e-4)


def test_a_variance_head_is_dropped_for_a_scheduler_that_knows_none() -> None:
    unet = tiny_unet(out_channels=6)
    assert pictures(pipeline(unet, DDIMScheduler())).shape == (1, 3, 8, 8)
    assert pictures(pipeline(unet, variance_type="learned_range")).shape == (1, 3, 8, 8)
    with pytest.raises(ValueError, match='needs variance_type "learned" or "learned_range"'):
        pictures(pipeline(unet))


# -- views -------------------------------------------------------------------------------------------------------------


def test_progressive_shows_the_chain_of_the_call() -> None:
    pipe = pipeline(tiny_unet())
    latents: list[Tensor] = []

    def keep(pipe: Any, i: int, t: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        latents.append(tensors["latents"])
        return {}

    final = pictures(pipe, batch_size=2, callback_on_step_end=keep)
    steps = list(pipe.progressive(2, generator=seeded(), num_inference_steps=4))
    assert [step.t for step in steps] == [750, 500, 250, 0]
    for step, before in zip(steps[1:], latents, strict=False):
        assert torch.equal(step.x_t, before)
    assert torch.equal(steps[0].x_t, torch.randn(2, 3, 8, 8, generator=seeded()))
    assert torch.equal(steps[-1].x_0, final)  # the x̂_0 of the last step is the image
    chosen = list(pipe.progressive(2, generator=seeded(), num_inference_steps=4, at=[500, 0]))
    assert [step.t for step in chosen] == [500, 0]
    assert torch.equal(chosen[0].x_t, steps[1].x_t)
    assert not any(step.x_t.requires_grad for step in chosen)


def test_progressive_predicts_the_clean_image_of_the_formula() -> None:
    image, unet = known_image()
    for step in pipeline(unet).progressive(generator=seeded(), num_inference_steps=10):
        assert step.x_0 is not None
        # ε is rounded to float32 and multiplied by √((1-ᾱ)/ᾱ), 116 at t = 900.
        torch.testing.assert_close(step.x_0, image, atol=1e-4, rtol=0)


def test_progressive_checks_at_the_call_and_not_at_the_first_step() -> None:
    pipe = pipeline(tiny_unet())
    with pytest.raises(ValueError, match=r"at must hold steps of the chain, got \[3\]"):
        pipe.progressive(num_inference_steps=4, at=[500, 3])
    with pytest.raises(ValueError, match="batch_size must be an int of at least 1, got 0"):
        pipe.progressive(0)


def identity_pipeline(T: int = 20) -> DDPMExtPipeline:
    """x̂_0(x_t) = x_t: after one step the picture is the latent itself."""
    options = {"prediction_type": "sample", "clip_sample": False, "num_train_timesteps": T, "beta_end": 0.6}
    return pipeline(analytic(lambda x_t, t, _: x_t), **options)


def test_interpolate_mixes_after_noising_with_shared_noise() -> None:
    pipe = identity_pipeline()
    a, b = (torch.rand(3, 8, 8, generator=seeded(i)) * 2 - 1 for i in (1, 2))
    weights = (0.0, 0.3, 1.0)
    mixed = pipe.interpolate(a, b, 12, weights, generator=seeded(), num_inference_steps=1, output_type="latent").images
    eps = torch.randn(1, 3, 8, 8, generator=seeded())
    ab = pipe.scheduler.tables.alpha_bar[12]
    for image, weight in zip(mixed, weights, strict=True):
        expected = ab.sqrt() * ((1 - weight) * a + weight * b) + (1 - ab).sqrt() * eps[0]
        torch.testing.assert_close(image, expected.float(), atol=1e-6, rtol=0)


def test_the_way_back_of_an_interpolation_shares_its_noise() -> None:
    # Every step is linear in x_t here, so the pictures lie on a line exactly where the noise is the same for all λ.
    pipe = identity_pipeline()
    a, b = (torch.rand(3, 8, 8, generator=seeded(i)) * 2 - 1 for i in (1, 2))
    first, middle, last = pipe.interpolate(a, b, 12, (0.0, 0.4, 1.0), seeded(), output_type="latent").images
    torch.testing.assert_close(middle, 0.6 * first + 0.4 * last, atol=1e-5, rtol=0)
    assert (first - last).abs().max() > 0.1
    again = pipe.interpolate(a, b, 12, (0.4,), seeded(), output_type="latent").images[0]
    torch.testing.assert_close(again, middle, atol=1e-6, rtol=0)


def test_interpolate_takes_pictures_and_the_global_seed() -> None:
    pipe = identity_pipeline()
    pixels = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    tensors = [torch.from_numpy(p / 127.5 - 1).permute(2, 0, 1).float() for p in pixels]
    torch.manual_seed(3)
    expected = pipe.interpolate(*tensors, 5, output_type="pt").images
    torch.manual_seed(3)
    actual = pipe.interpolate(*(Image.fromarray(p) for p in pixels), 5, output_type="pt").images
    torch.testing.assert_close(actual, expected, atol=1e-6, rtol=0)
    assert expected.shape == (5, 3, 8, 8)
    shown = pipe.interpolate(*tensors, 5, weights=[0.5]).images
    assert isinstance(shown[0], Image.Image)


def test_continue_from_a_latent_goes_on_as_the_chain_did() -> None:
    pipe = pipeline(tiny_unet(), num_train_timesteps=12, beta_end=0.6)
    generator = seeded()
    steps, states = [], []
    for step in pipe.progressive(generator=generator, num_inference_steps=12):
        steps.append(step)
        states.append(generator.clone_state())  # step t has drawn its noise when it is shown
    middle = steps[5]  # t = 6; its latent was drawn before the state that step 4 (t = 7) left
    images = pipe.continue_from(middle.x_t[0], middle.t, generator=states[4], output_type="latent").images
    torch.testing.assert_close(images, steps[-1].x_0, atol=1e-4, rtol=0)


def test_samples_of_one_latent_share_it_and_differ() -> None:
    pipe = identity_pipeline()
    x_t = torch.randn(1, 3, 8, 8, generator=seeded())
    once = pipe.continue_from(x_t, 7, 3, num_inference_steps=1, output_type="latent").images
    torch.testing.assert_close(once, x_t.expand(3, -1, -1, -1), atol=1e-6, rtol=0)
    each = pipe.continue_from(x_t, 7, 3, generator=[seeded(i) for i in range(3)], output_type="latent").images
    assert (each[0] - each[1]).abs().max() > 0.01
    alone = pipe.continue_from(x_t, 7, generator=[seeded(2)], output_type="latent").images
    torch.testing.assert_close(each[2:], alone, atol=1e-6, rtol=0)
    assert pipe.num_timesteps == 8  # every step from 7 to 0


def test_views_refuse_a_scheduler_with_other_latents_and_take_dpm_solver() -> None:
    image, unet = known_image()
    x_t = torch.randn(3, 8, 8, generator=seeded())
    pipe = pipeline(unet, EulerDiscreteScheduler())
    with pytest.raises(ValueError, match=r"EulerDiscreteScheduler keeps latents in other units.*Use DDPMExtScheduler"):
        pipe.continue_from(x_t, 600, num_inference_steps=10)
    with pytest.raises(ValueError, match="DDIMScheduler takes no custom timesteps"):
        pipeline(unet, DDIMScheduler()).continue_from(x_t, 600, num_inference_steps=10)
    words = {"beta_start": 1e-4, "beta_end": 0.02}
    pipe = pipeline(unet, DPMSolverMultistepScheduler(algorithm_type="dpmsolver++", **words))
    result = pipe.interpolate(image[0], image[0], 600, (0.0, 1.0), num_inference_steps=10, output_type="latent").images
    torch.testing.assert_close(result, image.expand(2, -1, -1, -1), atol=5e-3, rtol=0)


# -- class labels ------------------------------------------------------------------------------------------------------


def test_class_labels_reach_the_network() -> None:
    colours = torch.tensor([-0.5, 0.0, 0.5])

    def network(x_t: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        assert labels is not None
        return colours[labels].reshape(-1, 1, 1, 1).expand_as(x_t)

    pipe = pipeline(analytic(network, num_class_embeds=3), prediction_type="sample")
    each = pictures(pipe, batch_size=3, class_labels=[2, 0, 1]).mean((1, 2, 3))
    torch.testing.assert_close(each, torch.tensor([0.5, -0.5, 0.0]), atol=1e-6, rtol=0)
    for one in (2, [2], torch.tensor(2)):
        assert pictures(pipe, batch_size=2, class_labels=one).mean().item() == pytest.approx(0.5, abs=1e-6)
    view = pipe.continue_from(torch.zeros(3, 8, 8), 10, 2, class_labels=[0, 2], output_type="latent").images
    torch.testing.assert_close(view.mean((1, 2, 3)), torch.tensor([-0.5, 0.5]), atol=1e-6, rtol=0)
    a = torch.zeros(3, 8, 8)
    view = pipe.interpolate(a, a, 10, (0.0, 1.0), class_labels=2, output_type="latent").images
    assert view.mean().item() == pytest.approx(0.5, abs=1e-6)
    (step,) = pipe.progressive(num_inference_steps=4, class_labels=0, at=[250])
    assert step.x_0 is not None
    assert step.x_0.mean().item() == pytest.approx(-0.5, abs=1e-6)


def test_a_class_conditional_unet_draws_by_class() -> None:
    pipe = pipeline(tiny_unet(num_class_embeds=4))
    zero, one = (pictures(pipe, class_labels=label) for label in (0, 1))
    assert (zero - one).abs().max() > 1e-3


# -- bad input ---------------------------------------------------------------------------------------------------------

A = torch.zeros(3, 8, 8)
BAD_CALLS: list[tuple[dict[str, Any], str]] = [
    ({"batch_size": 0}, "batch_size must be an int of at least 1, got 0"),
    ({"batch_size": 2.0}, "batch_size must be an int of at least 1, got 2.0"),
    ({"batch_size": True}, "batch_size must be an int of at least 1, got True"),
    ({"output_type": "jpeg"}, "output_type must be one of 'pil', 'np', 'pt', 'latent', got 'jpeg'"),
    ({"num_inference_steps": 0}, "num_inference_steps"),
    ({"num_inference_steps": 1001}, "num_inference_steps"),
    ({"num_inference_steps": 2.5}, "num_inference_steps"),
    ({"num_inference_steps": None}, "num_inference_steps or timesteps"),
    ({"timesteps": [0, 5]}, "strictly descending, got 5 before|strictly descending, got 0 before 5"),
    ({"timesteps": []}, "at least one step"),
    ({"latents": torch.zeros(2, 3, 8, 8)}, r"latents must have shape \(1, 3, H, W\), got \(2, 3, 8, 8\)"),
    ({"latents": torch.zeros(1, 1, 8, 8)}, r"latents must have shape \(1, 3, H, W\), got \(1, 1, 8, 8\)"),
    ({"generator": [torch.Generator()] * 2}, "a list of one per image, 1 here, got a list of 2"),
    ({"class_labels": 1}, "was not trained with class labels: leave class_labels .--class_label. out"),
    ({"callback_on_step_end_tensor_inputs": ["sample"]}, "callback_on_step_end_tensor_inputs must be"),
]


@pytest.mark.parametrize(("options", "sentence"), BAD_CALLS)
def test_bad_input_is_refused_before_the_first_step(options: dict[str, Any], sentence: str) -> None:
    def network(*_: Any) -> Tensor:
        raise AssertionError("the network was called")

    pipe = pipeline(analytic(network))
    timesteps = pipe.scheduler.timesteps.clone()
    with pytest.raises(ValueError, match=sentence):
        pipe(**options)
    assert torch.equal(pipe.scheduler.timesteps, timesteps)


@pytest.mark.parametrize(
    ("labels", "sentence"),
    [
        (None, "class-conditional: pass class_labels .--class_label."),
        (4, r"class_labels must be 2 ints in 0\.\.3, got 4"),
        (-1, r"class_labels must be 2 ints in 0\.\.3, got -1"),
        ([0, 1, 2], r"class_labels must be 2 ints in 0\.\.3"),
        ([0.5, 1.0], r"class_labels must be 2 ints in 0\.\.3"),
    ],
)
def test_bad_labels_are_refused(labels: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        pipeline(tiny_unet(num_class_embeds=4))(2, class_labels=labels)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((A, A, 1000), r"timestep must be an int in 0\.\.999, got 1000"),
        ((A, A, -1), r"timestep must be an int in 0\.\.999, got -1"),
        ((A, A, 2.0), r"timestep must be an int in 0\.\.999, got 2.0"),
        ((A, A, 5, ()), "weights must hold at least one number, got none"),
        ((torch.zeros(1, 8, 8), A, 5), r"An image must have shape \(3, 8, 8\) and values in \[-1, 1\]"),
        ((A + 3, A, 5), r"values in \[-1, 1\], got shape \(3, 8, 8\) and values up to 3"),
        ((Image.new("RGB", (9, 8)), A, 5), r"got shape \(3, 8, 9\)"),
    ],
)
def test_bad_interpolations_are_refused(arguments: tuple[Any, ...], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        pipeline(tiny_unet()).interpolate(*arguments)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((torch.zeros(2, 3, 8, 8), 5), "one latent and num_samples of at least 1, got 2 and 1"),
        ((A, 5, 0), "one latent and num_samples of at least 1, got 1 and 0"),
        ((A, 1000), r"timestep must be an int in 0\.\.999, got 1000"),
        ((torch.zeros(1, 8, 8), 5), r"latents must have shape \(1, 3, H, W\)"),
        ((A, 5, 1, None, 7), "num_inference_steps"),
    ],
)
def test_bad_continuations_are_refused(arguments: tuple[Any, ...], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        pipeline(tiny_unet()).continue_from(*arguments)


def test_a_network_without_a_size_asks_for_latents() -> None:
    pipe = pipeline(tiny_unet(sample_size=None))
    with pytest.raises(ValueError, match="names no sample_size: pass latents of the size you want"):
        pipe()
    assert pictures(pipe, latents=torch.zeros(1, 3, 8, 8)).shape == (1, 3, 8, 8)
