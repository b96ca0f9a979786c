"""torch.compile(fullgraph=True) of `step`: one graph, the same numbers as eager."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler
from tensors import noise
from torch import Tensor
from torch.testing import assert_close

from ddpm_ext.schedulers.ddpm import DDPMExtScheduler

SHAPE = (3, 2, 4, 4)
OPTIONS: list[dict[str, Any]] = [
    {},
    {"variance_type": "fixed_large_log", "clip_sample": False},
    {"prediction_type": "posterior_mean", "variance_type": "learned_range"},
    {"prediction_type": "v_prediction", "variance_type": "learned", "thresholding": True},
    {"prediction_type": "sample", "timestep_spacing": "trailing"},
]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    with warnings.catch_warnings():  # inductor's own modules
        warnings.simplefilter("ignore", DeprecationWarning)
        yield
    torch._dynamo.reset()


def compiled_step(scheduler: DDPMExtScheduler, backend: str) -> Callable[..., tuple[Tensor, Tensor]]:
    def step(output: Tensor, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return scheduler.step(output, t, x, generator=None, return_dict=False)

    return torch.compile(step, fullgraph=True, backend=backend)


def inputs(options: dict[str, Any], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    learned = options.get("variance_type") in ("learned", "learned_range")
    return noise(1, (3, 4 if learned else 2, 4, 4)).to(dtype), noise(2, SHAPE).to(dtype)


def assert_compiled_equals_eager(options: dict[str, Any], dtype: torch.dtype, backend: str, same_random: bool) -> None:
    """On the last jump, where no noise is drawn, and before it: with the same noise, or by what is free of noise."""
    scheduler = DDPMExtScheduler(**options)
    scheduler.set_timesteps(10)
    step = compiled_step(scheduler, backend)
    output, x = inputs(options, dtype)
    last, middle = scheduler.timesteps[-1], scheduler.timesteps[5]
    for t in (last, last.expand(3).clone(), middle, torch.stack([middle, last, middle])):
        torch.manual_seed(0)
        compiled = step(output, t, x)
        torch.manual_seed(0)
        eager = scheduler.step(output, t, x, return_dict=False)
        assert [z.dtype for z in compiled] == [dtype, dtype]
        tolerance = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-5}
        assert_close(compiled[1], eager[1], **tolerance)  # x̂_0
        quiet = (t == last).expand(3)
        assert_close(compiled[0][quiet], eager[0][quiet], **tolerance)
        assert torch.isfinite(compiled[0]).all()
        if same_random:
            assert_close(compiled[0], eager[0], **tolerance)
        elif not quiet.all():
            assert not torch.equal(step(output, t, x)[0], compiled[0])  # fresh noise at every call


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_step_is_one_graph(options: dict[str, Any]):
    assert_compiled_equals_eager(options, torch.float64, "eager", same_random=True)


def test_step_survives_functionalisation():
    """aot_eager rewrites the in-place operations, as inductor does, and needs no C++ compiler."""
    assert_compiled_equals_eager({"variance_type": "learned_range"}, torch.float32, "aot_eager", same_random=True)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_step_compiles_with_inductor(options: dict[str, Any], dtype: torch.dtype):
    if dtype == torch.bfloat16:
        scheduler, (output, x) = DDPMExtScheduler(**options), inputs(options, dtype)
        compiled = compiled_step(scheduler, "inductor")(output, torch.tensor([0, 0, 0]), x)
        # Kept in float32 between steps, one rounding to 8 bits at the end.
        assert_close(compiled, scheduler.step(output, 0, x, return_dict=False), rtol=2**-7, atol=1e-3)
    else:
        assert_compiled_equals_eager(options, dtype, "inductor", same_random=False)


@pytest.mark.slow
def test_noise_drawn_inside_the_graph_is_standard_normal():
    scheduler = DDPMExtScheduler(variance_type="fixed_large")
    step = compiled_step(scheduler, "inductor")
    output, x = inputs({}, torch.float32)
    assert_close(step(output, torch.tensor([0, 0, 0]), x), scheduler.step(output, 0, x, return_dict=False))
    t = torch.tensor([0, 1, 999])
    p = scheduler.p_mean_variance(output, t, x)
    prev, _ = step(output, t, x)
    assert_close(prev[0], p.mean[0])
    z = ((prev - p.mean) / p.var.sqrt())[1:]  # standard normal: 64 numbers, none of them 0 or beyond 6
    assert z.abs().max() < 6 and 0.5 < z.std() < 1.5


@pytest.mark.parametrize("road", ["from_pretrained", "from_config", "registered", "trained_betas"])
def test_schedulers_of_every_road_compile(road: str, tmp_path: Path):
    """`from_config` registers options after construction: the weights must not be made inside the graph."""
    if road == "from_pretrained":
        DDPMExtScheduler(variance_type="fixed_large_log").save_pretrained(tmp_path)
        scheduler = DDPMExtScheduler.from_pretrained(tmp_path)
    elif road == "from_config":
        scheduler = DDPMExtScheduler.from_config(DDPMScheduler().config)
    elif road == "registered":
        scheduler = DDPMExtScheduler()
        scheduler.register_to_config(variance_type="fixed_large")
    else:
        scheduler = DDPMExtScheduler(trained_betas=[0.01] * 1000)
    output, x = inputs({}, torch.float32)
    compiled = compiled_step(scheduler, "eager")(output, torch.tensor(0), x)
    assert_close(compiled, scheduler.step(output, 0, x, return_dict=False))


def test_one_graph_serves_every_timestep_of_a_chain():
    """0-d timesteps do not recompile: the whole chain runs in one graph."""
    scheduler = DDPMExtScheduler()
    scheduler.set_timesteps(20)
    counter = torch._dynamo.testing.CompileCounter()
    step = torch.compile(
        lambda output, t, x: scheduler.step(output, t, x, return_dict=False), fullgraph=True, backend=counter
    )
    output, x = inputs({}, torch.float32)
    for t in scheduler.timesteps:
        x, _ = step(output, t, x)
    assert counter.frame_count == 1 and torch.isfinite(x).all()


@pytest.mark.parametrize("t", [torch.tensor([5, 6]), torch.tensor([5.0]), torch.tensor([[5]])], ids=repr)
def test_timesteps_that_do_not_fit_are_refused_in_a_graph_too(t: Tensor):
    """Shapes and types are known while compiling; one image with two timesteps would broadcast to two images."""
    scheduler = DDPMExtScheduler()
    output, x = (z[:1] for z in inputs({}, torch.float32))
    with pytest.raises(Exception, match=r"(?s)Observed exception.*UserError"):
        compiled_step(scheduler, "eager")(output, t, x)


def test_add_noise_and_velocity_compile():
    scheduler = DDPMExtScheduler()
    x_0, eps = noise(1, SHAPE), noise(2, SHAPE)
    for name in ("add_noise", "get_velocity"):
        call = getattr(scheduler, name)
        compiled = torch.compile(lambda x, e, t, call=call: call(x, e, t), fullgraph=True, backend="eager")
        for t in (torch.tensor([0, 5, 999]), torch.tensor(7)):
            assert_close(compiled(x_0, eps, t), call(x_0, eps, t))


def test_a_training_loss_compiles():
    from ddpm_ext.diffusion.losses import LossOptions, training_loss
    from ddpm_ext.diffusion.process import q_sample

    tables, options = DDPMExtScheduler().tables, LossOptions(snr_gamma=5.0)
    x_0, eps, t = noise(1, SHAPE).tanh(), noise(2, SHAPE), torch.tensor([0, 5, 999])
    weight = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)

    def loss(x_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        x_t = q_sample(x_0, t, eps, tables)
        return training_loss(weight * x_t, x_0, x_t, eps, t, tables, options).mean()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    a, b = (torch.autograd.grad(f(x_0, eps, t), weight)[0] for f in (compiled, loss))
    assert_close(a, b)
