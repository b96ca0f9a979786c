"""Training losses against a literal pixel-by-pixel oracle and closed forms."""

from __future__ import annotations

import math

import oracles
import pytest
import torch
from tensors import PREDICTIONS, TABLES, images, noise
from torch import Tensor
from torch.testing import assert_close

from ddpm_ext.diffusion.losses import LossOptions, bound_term, min_snr_weight, training_loss, uniform_timesteps
from ddpm_ext.diffusion.process import jump, q_sample, training_target
from ddpm_ext.diffusion.schedules import Tables, make_tables

TIMES = torch.tensor([0, 1, 7, 400, 999])
SMALL = make_tables("squaredcos_cap_v2", 12)


def example(variance_type: str, prediction_type: str, tables: Tables = TABLES, times: Tensor = TIMES):
    """A network that is wrong by 0.02 (0.1 % of the noise's size at the end of the chain, as trained ones are)."""
    x_0, eps = images(shape=(5, 2, 2, 2)), noise(1, (5, 2, 2, 2))
    x_t = q_sample(x_0, times, eps, tables)
    output = training_target(x_0, x_t, eps, times, tables, prediction_type) + 0.02 * noise(2, (5, 2, 2, 2))
    if variance_type == "learned":
        log_var = jump(tables, times.clamp(min=1)).var.log().view(5, 1, 1, 1)
        output = torch.cat([output, log_var + 0.3 * noise(3, (5, 2, 2, 2))], 1)
    elif variance_type == "learned_range":
        output = torch.cat([output, noise(3, (5, 2, 2, 2))], 1)
    return output, x_0, x_t, eps, times


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize(
    ("loss", "variance_type", "gamma"),
    [
        ("simple", "fixed_small", None),
        ("simple", "fixed_large", 5.0),
        ("simple", "fixed_small", 0.3),
        ("vlb", "fixed_small", None),
        ("vlb", "fixed_large", None),
        ("vlb", "learned", None),
        ("vlb", "learned_range", None),
        ("hybrid", "learned", None),
        ("hybrid", "learned_range", None),
        ("hybrid", "learned_range", 5.0),
    ],
)
def test_losses_equal_the_literal_oracle(loss: str, variance_type: str, gamma: float | None, prediction_type: str):
    output, x_0, x_t, eps, t = example(variance_type, prediction_type)
    options = LossOptions(loss, prediction_type, variance_type, gamma)  # pyright: ignore[reportArgumentType]
    ours = training_loss(output, x_0, x_t, eps, t, TABLES, options)
    assert ours.shape == (5,) and ours.dtype == torch.float64
    exact = [
        oracles.training_loss_of_image(
            output[b].numpy(),
            x_0[b].numpy(),
            eps[b].numpy(),
            int(t[b]),
            TABLES.beta.tolist(),
            prediction=prediction_type,
            variance=variance_type,
            loss=loss,
            gamma=gamma,
        )
        for b in range(5)
    ]
    # A perfect answer's target passes through x_t, whose float64 rounding 1/c1 = 7,900 magnifies at t = 999.
    assert_close(ours, torch.tensor(exact, dtype=torch.float64), rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large", "learned_range"])
def test_vlb_over_uniform_t_is_the_bound(variance_type: str, prediction_type: str):
    """The mean of vlb over every t is Σ L_{t-1} + L_0 in bits, computed by another oracle, which knows no T."""
    x_0 = images(shape=(2, 1, 2, 2))
    steps = [noise(i, (2, 1, 2, 2)) for i in range(12)]

    def model(x_t: Tensor, t: int) -> Tensor:
        answer = 0.3 * x_t + 0.01 * t
        return torch.cat([answer, 0.5 * x_t], 1) if variance_type == "learned_range" else answer

    total = torch.zeros(2, dtype=torch.float64)
    for i in range(12):
        t = torch.full((2,), i)
        x_t = q_sample(x_0, t, steps[i], SMALL)
        options = LossOptions("vlb", prediction_type, variance_type)  # pyright: ignore[reportArgumentType]
        total += training_loss(model(x_t, i), x_0, x_t, steps[i], t, SMALL, options)
    _, terms, decoder = oracles.bound_in_bits(
        lambda x, t: model(torch.from_numpy(x), t).numpy(),
        SMALL.beta.numpy(),
        x_0.numpy(),
        list(range(11, -1, -1)),
        [z.numpy() for z in reversed(steps)],
        prediction=prediction_type,
        variance=variance_type,
        clip=False,
    )
    assert_close(total / 12, torch.from_numpy(terms.sum(1) + decoder), rtol=1e-9, atol=0)


def test_hybrid_teaches_the_mean_by_the_simple_loss_alone():
    output, x_0, x_t, eps, t = example("learned_range", "epsilon")
    grads = {}
    for loss in ("hybrid", "vlb"):
        leaf = output.clone().requires_grad_()
        training_loss(leaf, x_0, x_t, eps, t, TABLES, LossOptions(loss, variance_type="learned_range")).sum().backward()
        grads[loss] = leaf.grad
    leaf = output[:, :2].clone().requires_grad_()
    training_loss(leaf, x_0, x_t, eps, t, TABLES).sum().backward()
    assert torch.equal(grads["hybrid"][:, :2], leaf.grad)
    assert_close(grads["hybrid"][:, 2:], grads["vlb"][:, 2:] / 1000)  # λ = 1/1000, whatever T
    assert (grads["vlb"][:, :2] != 0).all() and (grads["vlb"][:, 2:] != 0).all()


def test_hybrid_counts_the_bound_by_T_over_1000():
    times = torch.tensor([0, 1, 5, 8, 11])
    output, x_0, x_t, eps, t = example("learned_range", "epsilon", SMALL, times)
    options = {"variance_type": "learned_range"}
    hybrid = training_loss(output, x_0, x_t, eps, t, SMALL, LossOptions("hybrid", **options))
    simple = training_loss(output[:, :2], x_0, x_t, eps, t, SMALL)
    bound = bound_term(output, x_0, x_t, t, SMALL, **options)
    assert_close(hybrid, simple + 12 / 1000 * bound / math.log(2))


def test_simple_weighted_as_the_bound_is_the_bound():
    """DDPM Eq. (12): with σ² = β̃ the weight of ‖ε - ε̂‖² is b²/(2σ² a b̄), for t > 0."""
    output, x_0, x_t, eps, t = example("fixed_small", "epsilon")
    step = jump(TABLES, t)
    weight = step.b**2 / (2 * step.var * step.a * step.one_minus_alpha_bar_t)
    bound = bound_term(output, x_0, x_t, t, TABLES)
    simple = training_loss(output, x_0, x_t, eps, t, TABLES)
    assert_close(bound[1:], (weight * simple)[1:], rtol=1e-8, atol=0)


def test_min_snr_weights_agree_on_what_they_weigh():
    """γ is a cap on x_0's error: with an error of x̂_0 alone, all four predictions have the same weighted loss."""
    x_0, eps = images(shape=(5, 2, 2, 2)), noise(1, (5, 2, 2, 2))
    x_t = q_sample(x_0, TIMES, eps, TABLES)
    wrong = x_0 + 0.1 * noise(2, (5, 2, 2, 2))
    bar = TABLES.alpha_bar[TIMES].view(5, 1, 1, 1)
    wrong_eps = (x_t - bar.sqrt() * wrong) / (1 - bar).sqrt()
    losses = []
    for prediction_type in PREDICTIONS:
        output = training_target(wrong, x_t, wrong_eps, TIMES, TABLES, prediction_type)
        options = LossOptions(prediction_type=prediction_type, snr_gamma=5.0)  # pyright: ignore[reportArgumentType]
        losses.append(training_loss(output, x_0, x_t, eps, TIMES, TABLES, options))
    snr = TABLES.alpha_bar[TIMES] / TABLES.one_minus_alpha_bar[TIMES]
    expected = snr.clamp(max=5) * ((wrong - x_0) ** 2).flatten(1).mean(1)
    for loss in losses:
        assert_close(loss, expected, rtol=1e-7, atol=0)


def test_min_snr_closed_forms():
    t = torch.arange(1000)
    snr = TABLES.alpha_bar / (1 - TABLES.alpha_bar)
    capped = torch.minimum(snr, torch.tensor(5.0))
    c1 = jump(TABLES, t).c1
    expected = {"epsilon": capped / snr, "sample": capped, "v_prediction": capped / (snr + 1)}
    for word, weight in {**expected, "posterior_mean": capped / c1**2}.items():
        assert_close(min_snr_weight(t, TABLES, word, 5.0), weight, rtol=1e-9, atol=0)  # pyright: ignore
    zero = make_tables(zero_terminal_snr=True)
    last = torch.tensor([999])
    assert [min_snr_weight(last, zero, p, 5.0).item() for p in PREDICTIONS[:3]] == [1, 0, 0]


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_the_bound_keeps_its_digits_in_float32(prediction_type: str):
    """c1 (x_0 - x̂_0) and not the difference of two whole means, which loses all digits where c1 is 1e-4."""
    x_0, eps = images(shape=(5, 2, 8, 8)), noise(1, (5, 2, 8, 8))
    t = torch.tensor([10, 100, 400, 900, 999])
    x_t = q_sample(x_0, t, eps, TABLES)
    output = training_target(x_0, x_t, eps, t, TABLES, prediction_type) + 0.01 * noise(2, (5, 2, 8, 8))
    exact = bound_term(output, x_0, x_t, t, TABLES, prediction_type=prediction_type)
    single = bound_term(output.float(), x_0.float(), x_t.float(), t, TABLES, prediction_type=prediction_type)
    assert single.dtype == torch.float32
    # x_t is rounded to 1e-7, the noise's share of it is 0.03 at t = 10: 2e-4 of an error of 0.01 at the most.
    assert_close(single.double(), exact, rtol=2e-4, atol=0)


def test_half_precision_outputs_are_summed_in_float32():
    output, x_0, x_t, eps, t = example("fixed_small", "sample")
    args = [z.bfloat16() for z in (output, x_0, x_t, eps)]
    loss = training_loss(*args, t, TABLES, LossOptions(prediction_type="sample"))
    assert loss.dtype == torch.float32
    exact = ((args[1].double() - args[0].double()) ** 2).flatten(1).mean(1)
    assert_close(loss.double(), exact, rtol=1e-5, atol=0)


@pytest.mark.parametrize("loss", ["vlb", "hybrid"])
def test_gradients_are_finite_at_every_step(loss: str):
    t = torch.arange(1000)
    x_0, eps = images(shape=(1000, 1, 1, 2)).float(), noise(1, (1000, 1, 1, 2)).float()
    x_t = q_sample(x_0, t, eps, TABLES)
    output = noise(2, (1000, 2, 1, 2)).float().requires_grad_()
    training_loss(output, x_0, x_t, eps, t, TABLES, LossOptions(loss, variance_type="learned_range")).sum().backward()
    assert output.grad is not None and torch.isfinite(output.grad).all()


def test_uniform_timesteps_are_uniform_and_repeatable():
    t = uniform_timesteps(100_000, 10, torch.Generator().manual_seed(0))
    counts = torch.bincount(t, minlength=10)
    assert t.dtype == torch.int64 and len(counts) == 10
    assert ((counts - 10_000).abs() < 4 * (100_000 * 0.1 * 0.9) ** 0.5).all()  # four standard deviations
    assert torch.equal(t, uniform_timesteps(100_000, 10, torch.Generator().manual_seed(0)))
    assert not torch.equal(t, uniform_timesteps(100_000, 10, torch.Generator().manual_seed(1)))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"loss": "mse"}, "loss must be one of 'simple', 'vlb', 'hybrid', got 'mse'"),
        ({"variance_type": "small"}, "variance_type must be one of"),
        ({"prediction_type": "score"}, "prediction_type must be one of"),
        ({"loss": "simple", "variance_type": "learned"}, 'never trains the variance.*Use loss "hybrid"'),
        ({"loss": "hybrid"}, '"fixed_small" has none. Use loss "simple"'),
        ({"loss": "vlb", "snr_gamma": 5.0}, "snr_gamma must be a positive number and weights"),
        ({"snr_gamma": 0.0}, "snr_gamma must be a positive number.*got 0.0"),
        ({"snr_gamma": math.nan}, "snr_gamma must be a positive number.*got nan"),
    ],
)
def test_options_that_do_not_go_together(options: dict, sentence: str):
    with pytest.raises(ValueError, match=sentence):
        LossOptions(**options)


def test_shapes_and_steps_that_do_not_fit():
    output, x_0, x_t, eps, t = example("fixed_small", "epsilon")
    with pytest.raises(ValueError, match="must have the same shape"):
        training_loss(output, x_0, x_t, eps[:1], t, TABLES)  # would broadcast
    with pytest.raises(ValueError, match="must have the same shape"):
        training_loss(output, x_0[:1], x_t, eps, t, TABLES, LossOptions(prediction_type="sample"))
    with pytest.raises(ValueError, match="must have the same shape"):
        training_loss(output, x_0[:1], x_t, eps, t, TABLES, LossOptions("vlb"))
    with pytest.raises(ValueError, match="model_output must have shape"):
        training_loss(output[:, :1], x_0, x_t, eps, t, TABLES)
    for loss in ("simple", "vlb"):
        with pytest.raises(ValueError, match=r"t must lie in 0\.\.999, got values from -1"):
            training_loss(output, x_0, x_t, eps, t - 1, TABLES, LossOptions(loss))
    with pytest.raises(ValueError, match=r"t must lie in 0\.\.999"):
        min_snr_weight(torch.tensor([-1]), TABLES, "sample", 5.0)
