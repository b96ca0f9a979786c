"""Class guidance against a Gaussian mixture whose scores are known, and what a network with a null label is."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers.guiders
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, EulerDiscreteScheduler
from mixture import CLASSES, Mixture, conditional_eps, guided_pipeline, network_with_classes, unconditional_eps
from torch import Tensor
from torch.testing import assert_close

from ddpm_ext.demo import Studio
from ddpm_ext.diffusion.process import eps_weights
from ddpm_ext.errors import UserError
from ddpm_ext.evaluation.config import EvalConfig
from ddpm_ext.models.classes import check_labels, class_options, classes_of
from ddpm_ext.pipelines.config import SampleConfig
from ddpm_ext.pipelines.ddpm import DDPMExtPipeline
from ddpm_ext.pipelines.guidance import guided_prediction, make_guidance, rescaled
from ddpm_ext.pipelines.sampling import sample_to_folder
from ddpm_ext.schedulers.ddpm import DDPMExtScheduler


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction", "posterior_mean"])
@pytest.mark.parametrize(("w", "rescale"), [(0.5, 0.0), (2.0, 0.0), (4.0, 0.0), (2.0, 0.7), (4.0, 1.0)])
def test_the_guided_score_is_the_mixture_of_the_exact_scores(kind: Any, w: float, rescale: float) -> None:
    """(1+w) ε(x|c) - w ε(x) to rounding, rescaled or not, whatever the network predicts, in one call."""
    scheduler = DDPMExtScheduler(prediction_type=kind)
    network, config = Mixture(scheduler), class_options(CLASSES, with_null_label=True)
    guidance = make_guidance(config, 1000, guidance_scale=w, guidance_rescale=rescale)
    assert guidance is not None
    x, labels = torch.randn(CLASSES, 1, 4, 4, dtype=torch.float64), torch.arange(CLASSES)
    for t in (1, 300, 999):
        network.calls = 0
        call = guided_prediction(guidance, lambda x, c, t=t: network(x, t, c), x, labels, t, (0, 10), scheduler)
        weights = eps_weights(scheduler.tables, torch.tensor(t), kind)
        eps = weights.of_x_t * x + weights.of_output * call
        alpha_bar = scheduler.tables.alpha_bar[t].item()
        with_class = torch.stack([conditional_eps(x[c], alpha_bar, c) for c in range(CLASSES)])
        without = torch.stack([unconditional_eps(one, alpha_bar) for one in x])
        exact = (1 + w) * with_class - w * without
        if rescale:  # Lin et al. 2023, Eqs. (15)-(16), image by image
            pairs = zip(with_class.numpy(), exact.numpy(), strict=True)
            ratio = torch.tensor([np.std(a, ddof=1) / np.std(b, ddof=1) for a, b in pairs], dtype=torch.float64)
            exact = rescale * ratio.reshape(-1, 1, 1, 1) * exact + (1 - rescale) * exact
        assert_close(eps, exact, rtol=1e-9, atol=1e-9)
        assert network.calls == 1


def guided_chain(
    chain: DDPMExtScheduler,
    times: list[int],
    noise: Iterator[np.ndarray],
    v: float,
    w: float,
    interval: tuple[int, int],
) -> list[np.ndarray]:
    """x_T, ..., x_0 of one image of class 2 by the formulas of the papers, in NumPy; v is the variance head."""
    alpha_bar = chain.alphas_cumprod.double().numpy()
    x, images = next(noise), []
    for t, s in zip(times, [*times[1:], None], strict=True):
        images.append(x)
        a, b = alpha_bar[t], 1.0 if s is None else alpha_bar[s]
        eps = conditional_eps(torch.from_numpy(x), float(a), 2).numpy()
        if interval[0] <= t <= interval[1]:
            eps = (1 + w) * eps - w * unconditional_eps(torch.from_numpy(x), float(a)).numpy()
        x_0 = (x - (1 - a) ** 0.5 * eps) / a**0.5
        if chain.config["thresholding"]:  # Saharia et al. 2022, §2.3
            threshold = min(max(np.quantile(abs(x_0), chain.config["dynamic_thresholding_ratio"]), 1.0), 1.5)
            x_0 = x_0.clip(-threshold, threshold) / threshold
        elif chain.config["clip_sample"]:
            x_0 = x_0.clip(-1, 1)
        beta = 1 - a / b
        mean = b**0.5 * beta / (1 - a) * x_0 + (a / b) ** 0.5 * (1 - b) / (1 - a) * x
        if s is None:
            return [*images, mean]
        small, fraction = beta * (1 - b) / (1 - a), (v + 1) / 2  # Nichol & Dhariwal 2021, Eq. (15)
        x = mean + np.exp((fraction * np.log(beta) + (1 - fraction) * np.log(small)) / 2) * next(noise)
    raise AssertionError


@pytest.mark.parametrize("bounded", ["clipped", "thresholded", "free"])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("interval", [(200, 700), (0, 999)])
def test_a_guided_chain_is_that_of_the_papers_formulas(
    kind: Any, bounded: str, interval: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With interval, prediction type, learned variance and bounds of x̂_0 all at once, image and each step."""
    bounds = {"clip_sample": bounded == "clipped", "thresholding": bounded == "thresholded", "sample_max_value": 1.5}
    scheduler = DDPMExtScheduler(
        prediction_type=kind, variance_type="learned_range", dynamic_thresholding_ratio=0.9, **bounds
    )
    pipeline, network = guided_pipeline(scheduler, heads=2), Mixture(scheduler)
    pipeline.unet.double()

    def perfect(x: Tensor, t: Tensor, class_labels: Tensor) -> Any:
        """Its head is 0.3 with a class and -1 without."""
        head = torch.where(class_labels == CLASSES, -1.0, 0.3).reshape(-1, 1, 1, 1).expand_as(x)
        return SimpleNamespace(sample=torch.cat([network(x, int(t), class_labels), head.double()], dim=1))

    monkeypatch.setattr(pipeline.unet, "forward", perfect)
    times = [990, 700, 450, 200, 60, 0]
    asked: Any = {"timesteps": times, "class_labels": 2, "guidance_scale": 3.0, "guidance_interval": interval}
    steps = list(pipeline.progressive(1, torch.Generator().manual_seed(5), **asked))
    drawn = torch.Generator().manual_seed(5)
    noise = (torch.randn(1, 1, 8, 8, generator=drawn, dtype=torch.float64).numpy() for _ in times)
    expected = guided_chain(scheduler, times, noise, 0.3, 3.0, interval)
    for step, x_t in zip(steps, expected[:-1], strict=True):
        assert_close(step.x_t.numpy(), x_t, rtol=1e-4, atol=1e-4)  # the tables of the chain are float32
    found: Any = pipeline(1, torch.Generator().manual_seed(5), output_type="latent", **asked)
    assert_close(found.images.numpy(), expected[-1], rtol=1e-4, atol=1e-4)
    assert len(steps) == len(times)


def test_a_chain_without_a_guided_step_is_bitwise_unguided_and_says_so() -> None:
    pipeline = guided_pipeline()
    plain = draw(pipeline)
    ask: Any = {"guidance_scale": 2.0, "guidance_interval": (401, 599)}
    words = r"guidance_interval \(401, 599\) holds none of the steps of this chain, 800, 600, 400, 200, 0: it draws"
    with pytest.warns(UserWarning, match=words):
        assert torch.equal(draw(pipeline, **ask), plain)
    with pytest.warns(UserWarning, match=r"holds none of the steps of this chain, 300, 150, 0"):
        pipeline.continue_from(plain[:1], 300, num_inference_steps=3, class_labels=0, **ask)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw(pipeline, guidance_scale=2.0, guidance_interval=(400, 400))


def draw(pipeline: DDPMExtPipeline, **options: Any) -> Tensor:
    generator = [torch.Generator().manual_seed(i) for i in range(2)]
    options = {"batch_size": 2, "num_inference_steps": 5, "class_labels": [0, 2], "output_type": "latent", **options}
    found: Any = pipeline(generator=generator, **options)
    return found.images


def test_no_guidance_is_bitwise_the_chain_without_it_and_calls_half_as_large() -> None:
    pipeline = guided_pipeline()
    sizes: list[int] = []
    pipeline.unet.register_forward_pre_hook(lambda _module, args: sizes.append(len(args[0])))
    plain = draw(pipeline)
    assert torch.equal(draw(pipeline, guidance_scale=0), plain) and sizes == [2] * 10
    guided = draw(pipeline, guidance_scale=2.0)
    assert sizes[10:] == [4] * 5 and not torch.allclose(guided, plain, atol=1e-3)


def test_an_interval_guides_at_its_steps_alone() -> None:
    pipeline = guided_pipeline()
    sizes: list[int] = []
    pipeline.unet.register_forward_pre_hook(lambda _module, args: sizes.append(len(args[0])))
    draw(pipeline, guidance_scale=2.0, guidance_interval=(200, 600))  # steps 800, 600, 400, 200, 0
    assert sizes == [2, 4, 4, 4, 2]
    whole = draw(pipeline, guidance_scale=2.0)
    assert torch.equal(draw(pipeline, guidance_scale=2.0, guidance_interval=(0, 999)), whole)
    steps = list(
        pipeline.progressive(
            2, [torch.Generator().manual_seed(i) for i in range(2)], 5, class_labels=[0, 2], guidance_scale=2.0
        )
    )
    assert steps[-1].x_0 is not None
    assert_close(steps[-1].x_0, whole, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "scheduler", [DDPMExtScheduler(variance_type="learned_range"), DDIMScheduler()], ids=["ours", ""]
)
def test_the_variance_is_that_of_the_conditional_head(scheduler: Any) -> None:
    """The head's channels come through unmixed; x̂_0 is clipped after the mixture."""
    pipeline = guided_pipeline(scheduler, heads=2)
    guidance = make_guidance(pipeline.unet.config, 1000, guidance_scale=3.0)
    assert guidance is not None
    x, labels = torch.randn(2, 1, 8, 8), torch.tensor([0, 2])
    with torch.no_grad():
        network = lambda x, c: pipeline.unet(x, 500, class_labels=c).sample  # noqa: E731
        found = guided_prediction(guidance, network, x, labels, 500, (0, 5), scheduler)
        assert_close(found[:, 1:], network(x, labels)[:, 1:], rtol=1e-4, atol=1e-5)
    images = draw(pipeline, guidance_scale=30.0)
    assert images.abs().max() <= 1


def test_rescaling_brings_the_deviation_back() -> None:
    conditional = torch.randn(3, 1, 8, 8, dtype=torch.float64)
    guided = 4 * conditional + torch.randn(3, 1, 8, 8, dtype=torch.float64)
    deviation = lambda x: x.flatten(1).std(1)  # noqa: E731
    assert_close(deviation(rescaled(guided, conditional, 1.0)), deviation(conditional))
    assert torch.equal(rescaled(guided, conditional, 0.0), guided)
    half = rescaled(guided, conditional, 0.5)
    assert_close(deviation(half), (deviation(guided) + deviation(conditional)) / 2)


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_diffusers_guiders_give_what_their_formula_gives(kind: Any, rescale: float) -> None:
    """Diffusers' 1 + w and its rescaling on ε̂."""
    pipeline = guided_pipeline(DDPMExtScheduler(prediction_type=kind))
    guider = diffusers.guiders.ClassifierFreeGuidance(guidance_scale=3.0, guidance_rescale=rescale)
    theirs, ours = draw(pipeline, guider=guider), draw(pipeline, guidance_scale=2.0, guidance_rescale=rescale)
    assert_close(theirs, ours, rtol=0, atol=1e-4)


def test_other_guiders_run_where_their_interface_fits_and_are_refused_elsewhere() -> None:
    pipeline = guided_pipeline()
    for name in ("AdaptiveProjectedGuidance", "ClassifierFreeZeroStarGuidance", "TangentialClassifierFreeGuidance"):
        guider = getattr(diffusers.guiders, name)()
        assert torch.isfinite(draw(pipeline, guider=guider)).all(), name
    layers = SimpleNamespace(guidance_scale=3.0)
    for guider in (diffusers.guiders.SkipLayerGuidance(skip_layer_guidance_layers=[0]), layers):
        with pytest.raises(UserError, match=r"guider must be one of diffusers.guiders that mixes"):
            draw(pipeline, guider=guider)


@pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # Diffusers' Euler
def test_stock_schedulers_are_guided_too() -> None:
    pipeline = guided_pipeline(EulerDiscreteScheduler())
    assert not torch.allclose(draw(pipeline, guidance_scale=2.0), draw(pipeline), atol=1e-3)
    pipeline = guided_pipeline(EulerDiscreteScheduler(prediction_type="v_prediction"))
    with pytest.raises(UserError, match=r"does not tell of a v_prediction network. Use DDPMExtScheduler"):
        draw(pipeline, guidance_scale=2.0, guidance_rescale=0.5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"guidance_scale": -1}, "guidance_scale must be a number of at least 0"),
        *(
            ({"guidance_scale": odd}, "guidance_scale must be a number of at least 0, where 0 is no guidance, got ")
            for odd in ("2", True, None, [1.0], (2,), {}, 1j, math.nan, math.inf, -math.inf, -1e-9, torch.ones(1))
        ),
        *(
            ({"guidance_scale": 1, "guidance_rescale": odd}, "guidance_rescale must lie between 0 and 1, got ")
            for odd in ("0.5", True, None, [0.5], -0.1, 1.1, math.nan)
        ),
        *(
            ({"guidance_scale": 1, "guidance_interval": odd}, r"guidance_interval must be \(low, high\), two steps")
            for odd in (5, "ab", (1,), (1, 2, 3), ("1", "2"), (True, 9), (1, None), (math.nan, 3), {1, 2}, [3, 2.9])
        ),
        *(
            ({"guidance_scale": 1, "guidance_interval": odd}, r"must hold steps of the process, 0\.\.999, got ")
            for odd in ((1000, 2000), [-9, -1])
        ),
        ({"guidance_rescale": 0.5}, "need a guidance_scale above 0"),
        ({"guidance_scale": 1, "guider": diffusers.guiders.ClassifierFreeGuidance()}, "brings its own scale"),
    ],
    ids=str,
)
def test_options_without_sense_or_effect_are_refused(options: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        draw(guided_pipeline(), **options)


def test_numbers_of_numpy_guide_as_pythons() -> None:
    pipeline = guided_pipeline()
    expected = draw(pipeline, guidance_scale=2.0, guidance_interval=(200, 600), guidance_rescale=0.5)
    numbers: Any = {"guidance_scale": np.float32(2), "guidance_rescale": np.float64(0.5)}
    interval = (np.int64(200), np.float32(600))
    labels = np.array([0, 2])
    assert torch.equal(draw(pipeline, **numbers, guidance_interval=interval, class_labels=labels), expected)


def test_a_network_without_a_null_label_cannot_be_guided() -> None:
    pipeline = DDPMExtPipeline(network_with_classes(null=False), DDPMExtScheduler())
    with pytest.raises(TypeError, match="no option guidance_scal of guidance"):
        draw(pipeline, guidance_scal=1.0)
    with pytest.raises(UserError, match=r"trained with a class for every image. Train with --class_conditional"):
        draw(pipeline, guidance_scale=1.0)


def test_measured_variances_warn_under_another_guidance() -> None:
    scheduler = DDPMExtScheduler(variance_type="analytic")
    scheduler.register_to_config(_ddpm_ext={"mse_eps": [0.5] * 1000, "guidance_scale": 2.0})
    pipeline = guided_pipeline(scheduler)
    draw(pipeline, guidance_scale=2.0)
    with pytest.warns(UserWarning, match="measured with guidance_scale 2, and .* with no guidance"):
        draw(pipeline)


# Labels ---------------------------------------------------------------------------------------------------------------


def test_the_null_label_survives_stock_and_its_labels_keep_their_meaning(tmp_path: Path) -> None:
    pipeline = guided_pipeline(names=["cat", "dog", "ship"])
    pipeline.save_pretrained(tmp_path / "ours")
    stock = DDPMPipeline.from_pretrained(tmp_path / "ours")
    stock.save_pretrained(tmp_path / "stock")
    again = DDPMExtPipeline.from_pretrained(tmp_path / "stock")
    again.set_progress_bar_config(disable=True)
    assert classes_of(again.unet.config) == (CLASSES, CLASSES, ("cat", "dog", "ship"))
    assert torch.equal(draw(again, guidance_scale=1.0), draw(pipeline, guidance_scale=1.0))
    x = torch.randn(1, 1, 8, 8)
    with torch.no_grad():
        for label in range(CLASSES):
            a, b = (u(x, 3, class_labels=torch.tensor([label])).sample for u in (stock.unet, pipeline.unet))
            assert_close(a, b, rtol=0, atol=1e-6)


def test_labels_by_number_or_name() -> None:
    config = class_options(3, ["cat", "dog", "ship"], with_null_label=True)
    numpy = (np.int64(2), np.array(2), np.array([2, 2], dtype=np.uint8), [np.int32(2), 2])
    tensors = (torch.tensor(2), torch.tensor([2, 2]), [torch.tensor(2), torch.tensor(2)])
    for given in (2, "ship", [2], ["ship"], [2, "ship"], range(2, 3), *numpy, *tensors):
        labels = check_labels(given, 2, config)
        assert labels is not None and labels.tolist() == [2, 2] and labels.dtype == torch.int64
    assert check_labels(None, 2, {}) is None


ODD_LABELS: list[Any] = [
    *(1.0, True, 1j, b"1", 2**70, -1, 3, math.nan, object(), {0, 1}, {0: 1}, iter([0, 1])),
    *([], [0, 1, 2], [-1, 0], [0.5, 1.0], [None, 1], [True, 0], [[0, 1]], [[0], [1]], [[0], [1, 2]]),
    *(np.float32(1), np.bool_(True), np.array([0.0, 1.0]), np.array([[0, 1]]), np.array(["a", "b"])),
    *(torch.tensor([0.0, 1.0]), torch.tensor([[0, 1]]), torch.tensor([True, False]), torch.tensor([0, 1, 2])),
]


@pytest.mark.parametrize(
    ("labels", "config", "words"),
    [
        ("ship", class_options(3), "got 'ship': this network does not record the names"),
        ("ship", class_options(2, ["cat", "dog"]), r"2 ints in 0\.\.1 or of the names cat, dog, got 'ship'"),
        (3, class_options(3, with_null_label=True), r"ints in 0\.\.2, got 3: 3 stands for no class\."),
        ([0, 3], class_options(3, with_null_label=True), r"ints in 0\.\.2, got \[0, 3\]: 3 stands for no class\."),
        (4, class_options(3, with_null_label=True), r"ints in 0\.\.2, got 4\."),
        *((odd, class_options(3), "class_labels must be 2 ints") for odd in ODD_LABELS),
        *((odd, {}, "was not trained with class labels") for odd in ODD_LABELS),
        (0, {}, "was not trained with class labels"),
        (None, class_options(3), "class-conditional: pass class_labels .--class_label."),
        (0, {"num_class_embeds": 4, "_ddpm_ext": {"null_label": 1}}, "null_label must be the last"),
        (0, {"num_class_embeds": 4, "_ddpm_ext": {"class_names": ["a"]}}, "class_names must name 4 classes"),
    ],
    ids=lambda value: re.sub(" at 0x[0-9a-f]+", "", str(value)),  # the same in every worker
)
def test_labels_that_are_none_are_a_sentence(labels: Any, config: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        check_labels(labels, 2, config)


# Sampling, evaluation, demo -------------------------------------------------------------------------------------------


def test_samples_of_another_guidance_are_other_samples(tmp_path: Path) -> None:
    guided_pipeline().save_pretrained(tmp_path / "model")
    options: Any = {"model": str(tmp_path / "model"), "num_samples": 2, "num_inference_steps": 2, "class_label": 1}
    options |= {"output_dir": str(tmp_path / "out"), "cpu": True}
    assert sample_to_folder(SampleConfig(**options)) == 0
    for guided in ({"guidance_scale": 2.0}, {"guidance_scale": 2.0, "guidance_interval": [0, 500]}):
        with pytest.raises(UserError, match=r"holds images of other settings \(guidance None -> "):
            sample_to_folder(SampleConfig(**options, **guided))
    plain = (tmp_path / "out" / "000000.png").read_bytes()
    assert sample_to_folder(SampleConfig(**{**options, "output_dir": str(tmp_path / "2")}, guidance_scale=9.0)) == 0
    assert (tmp_path / "2" / "000000.png").read_bytes() != plain
    with pytest.raises(UserError, match="need a guidance_scale above 0"):
        sample_to_folder(SampleConfig(**{**options, "output_dir": str(tmp_path / "3")}, guidance_rescale=0.5))


def test_the_bound_of_a_guided_chain_is_refused_with_the_reason() -> None:
    with pytest.raises(UserError, match="bpd of a guided chain are not measured: guidance draws from no distribution"):
        EvalConfig(guidance_scale=1.0)
    assert EvalConfig(guidance_scale=1.0, metrics="fid").guidance is not None
    assert EvalConfig().guidance is None


def test_the_page_draws_with_guidance_where_the_network_knows_no_class(tmp_path: Path) -> None:
    guided_pipeline(DDPMExtScheduler(num_train_timesteps=1000)).save_pretrained(tmp_path)
    studio = Studio(str(tmp_path))
    assert studio.ranges(10, 5)[3] == {"visible": True, "value": 0}
    plain, guided = (list(studio.generate(4, "ddim", 0, 1, w, count=1))[-1][0].tobytes() for w in (0.0, 3.0))
    assert plain != guided
