"""DDPMExtSolverScheduler: Diffusers' contract for multistep schedulers, its portable folder, and what it refuses."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor
from torch.testing import assert_close

from ddpm_ext.diffusion.solvers import Estimate, Solver, estimate, estimate_weights, solve
from ddpm_ext.pipelines.ddpm import DDPMExtPipeline
from ddpm_ext.schedulers.config import GuidanceSetting
from ddpm_ext.schedulers.ddpm import DDPMExtScheduler
from ddpm_ext.schedulers.solver import DDPMExtSolverScheduler, fitted_solvers, is_portable_solver, solver_record

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # stock and NumPy 2

TIMES = {2: (999, 300), 4: (999, 700, 350, 40), 12: tuple(range(999, 0, -83))[:12]}


def random_solver(times: tuple[int, ...], order: int) -> Solver:
    generator = torch.Generator().manual_seed(len(times))
    rows = 0.1 * torch.randn(len(times), 2 * order - 1, generator=generator, dtype=torch.float64)
    return Solver(times, rows)


def make(reference: Any = "clipped", order: int = 3, **options: Any) -> Any:
    base = DDPMExtScheduler(**options)
    solvers = {K: random_solver(times, order) for K, times in TIMES.items()}
    record = solver_record(reference, solvers, base, {2: {"squared_distance": 0.5}})
    return DDPMExtSolverScheduler.from_config(base.config, _ddpm_ext={"solver": record})


def network(x: Tensor, t: Any) -> Tensor:
    return torch.tanh(2 * x) + 0.3 * x.flip(-1)


def run(scheduler: Any, x: Tensor, head: bool = False) -> Tensor:
    for t in scheduler.timesteps:
        output = network(x, t)
        output = torch.cat([output, torch.zeros_like(output)], 1) if head else output
        x = scheduler.step(output, t, x).prev_sample
    return x


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


OPTIONS: list[dict[str, Any]] = [
    {},
    {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
    {"prediction_type": "sample", "beta_schedule": "squaredcos_cap_v2", "clip_sample_range": 0.7},
    {"prediction_type": "posterior_mean", "variance_type": "learned_range"},
]


@pytest.mark.parametrize("reference", ["clipped", "clipped_raw", "unclipped"])
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_run_is_what_the_formula_says(options: dict[str, Any], order: int, reference: Any):
    """Step by step through the scheduler, against `diffusion.solvers.solve`; every image by itself gives the same."""
    scheduler = make(reference, order, **options)
    head = options.get("variance_type") == "learned_range"
    clip = None if reference == "unclipped" else options.get("clip_sample_range", 1.0)
    prediction = options.get("prediction_type", "epsilon")

    def predict(x: Tensor, t: int) -> Estimate:
        weights = estimate_weights(scheduler.tables, t, prediction, reference)
        return estimate(network(x, t), x, weights, clip)

    for K in (4, 2, 12, 2):  # whatever was chosen before leaves no trace
        scheduler.set_timesteps(K)
        fitted = fitted_solvers(scheduler.config)
        assert fitted is not None and scheduler.timesteps.tolist() == list(TIMES[K])
        x = noise(3, 1, 4, 4)
        *_, expected = solve(predict, x, fitted.solvers[K], scheduler.tables)
        found = run(scheduler, x, head)
        assert_close(found, expected, rtol=1e-12, atol=1e-12)
        assert_close(run(scheduler, x, head), expected, rtol=1e-12, atol=1e-12)  # once more without set_timesteps
        assert_close(torch.cat([run(scheduler, one[None], head) for one in x]), found, rtol=1e-12, atol=1e-12)


def test_x_0_and_dtype_are_as_in_ddpm():
    scheduler = make()
    scheduler.set_timesteps(4)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        x = noise(2, 1, 4, 4).to(dtype)
        out = scheduler.step(network(x, 999), 999, x)
        x_0 = DDPMExtScheduler().step(network(x, 999), 999, x, return_dict=False)[1]
        assert out.prev_sample.dtype == out.pred_original_sample.dtype == dtype
        assert_close(out.pred_original_sample, x_0)
    assert len(scheduler.step(x, 999, x, return_dict=False)) == 2


def test_a_network_that_reuses_the_memory_of_its_output_does_no_harm():
    for reference in ("clipped", "clipped_raw", "unclipped"):
        scheduler = make(reference)
        scheduler.set_timesteps(4)
        x = y = noise(2, 1, 4, 4)
        memory = torch.empty_like(x)
        for t in scheduler.timesteps:
            x = scheduler.step(memory.copy_(network(x, t)), t, x).prev_sample
        assert_close(x, run(scheduler, y), rtol=0, atol=0)


# -- what it refuses --------------------------------------------------------------------------------------------------


def test_numbers_of_calls_that_were_not_fitted_are_refused():
    scheduler = make()
    scheduler.set_timesteps(4)
    for K in (3, 1000, 0, True, None, 4.5, 4.0, [4], "4"):
        with pytest.raises(ValueError, match="2, 4, 12"):
            scheduler.set_timesteps(K)  # pyright: ignore[reportArgumentType]
    for K in (np.int64(4), torch.tensor(4)):
        scheduler.set_timesteps(K)  # pyright: ignore[reportArgumentType]
        assert len(scheduler.timesteps) == 4
    for more in ({"timesteps": [999, 0]}, {"num_inference_steps": 4, "trajectory": "even"}):
        with pytest.raises(ValueError, match="steps of its own"):
            scheduler.set_timesteps(**more)
    with pytest.raises(ValueError, match="calibrate"):
        DDPMExtSolverScheduler().set_timesteps(5)
    x = noise(1, 1, 4, 4)
    with pytest.raises(ValueError, match="set_timesteps"):
        DDPMExtSolverScheduler().step(x, 999, x)


def test_steps_out_of_turn_are_refused():
    """Starting elsewhere, skipping, repeating, another batch, one step per image: never a wrong image."""
    x = noise(2, 1, 4, 4)
    scheduler = make()
    scheduler.set_timesteps(4)
    with pytest.raises(ValueError, match="999 has to come now"):
        scheduler.step(x, 700, x)  # as an img2img pipeline would
    scheduler.step(x, 999, x)
    for t, image in ((350, x), (40, x), (700, x[:1])):
        with pytest.raises(ValueError, match="700 has to come now"):
            scheduler.step(image, t, image)
    with pytest.raises(ValueError, match="not in the current schedule"):
        scheduler.step(x, 699, x)
    with pytest.raises(ValueError, match="one for all"):
        scheduler.step(x, torch.tensor([700, 700]), x)
    with pytest.raises(ValueError, match="one per image"):
        scheduler.step(x, 700, x, generator=[torch.Generator()] * 3)
    with pytest.raises(ValueError, match="shape"):
        scheduler.step(x[:, :, :2], 700, x)
    scheduler.step(x, torch.tensor([700]), x, generator=[torch.Generator()] * 2)
    scheduler.set_timesteps(4)
    scheduler.step(x[:1], 999, x[:1])  # other images, from the start


ONE_FIT = {"2": {"timesteps": [999, 0], "coefficients": [[0.0, 0.0]] * 2}}


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ([], '"reference" and "steps"'),
        ({"reference": "clipped"}, '"reference" and "steps"'),
        ({"reference": "raw", "steps": {}}, "reference must be"),
        ({"reference": "clipped", "steps": {}}, "number of calls"),
        ({"reference": "clipped", "steps": {}, "more": 1}, "a field of"),
        (
            {"reference": "clipped", "steps": {"two": {"timesteps": [999, 0], "coefficients": [[0.0, 0.0]] * 2}}},
            "'two'",
        ),
        ({"reference": "clipped", "steps": ONE_FIT, "setting": "abc"}, "setting of a fitted solver"),
        *(
            ({"reference": "clipped", "steps": {"2": one}}, "descending")
            for one in (
                {"timesteps": [999], "coefficients": [[0.0]]},
                {"timesteps": [0, 999], "coefficients": [[0.0]] * 2},
                {"timesteps": [999, 999], "coefficients": [[0.0]] * 2},
                {"timesteps": [1000, 0], "coefficients": [[0.0]] * 2},
                {"timesteps": [998, 0], "coefficients": [[0.0, 0.0]] * 2},  # x_T would be taken for x_998
                {"timesteps": [999, -1], "coefficients": [[0.0]] * 2},
                {"timesteps": [999, 0.5], "coefficients": [[0.0]] * 2},
                {"timesteps": [999, 0], "coefficients": [[0.0]]},
                {"timesteps": [999, 0], "coefficients": [[]] * 2},
                {"timesteps": [999, 0], "coefficients": [[float("nan")]] * 2},
                {"timesteps": [999, 0], "coefficients": [["a"]] * 2},
                {"timesteps": [999, 0]},
                None,
            )
        ),
    ],
    ids=str,
)
def test_broken_records_are_told(record: Any, words: str):
    with pytest.raises(ValueError, match=words):
        DDPMExtSolverScheduler.from_config(DDPMExtScheduler().config, _ddpm_ext={"solver": record})


@pytest.mark.filterwarnings("error")
def test_a_record_without_d_0_draws_what_it_drew():
    """Records once held c_0 .. c_{m-1}, d_1 .. d_{m-1}: the missing d_0 is 0."""
    rows = torch.linspace(-0.2, 0.3, 15, dtype=torch.float64).reshape(3, 5)
    of_both = [rows.tolist(), torch.cat([rows[:, :3], torch.zeros(3, 1), rows[:, 3:]], 1).tolist()]
    drawn = []
    for coefficients in of_both:
        steps = {"3": {"timesteps": [999, 500, 100], "coefficients": coefficients}}
        scheduler = DDPMExtSolverScheduler(_ddpm_ext={"solver": {"reference": "clipped_raw", "steps": steps}})
        scheduler.set_timesteps(3)
        x = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
        for t in scheduler.timesteps:
            x = scheduler.step(torch.tanh(x), t, x).prev_sample
        drawn.append(x)
    assert torch.equal(*drawn)


def test_other_options_than_the_fitted_ones_warn():
    scheduler = make()
    scheduler.set_timesteps(4)
    for changes in ({"clip_sample": False}, {"prediction_type": "v_prediction"}, {"beta_end": 0.01}):
        changed = DDPMExtSolverScheduler.from_config({**scheduler.config, **changes})
        with pytest.warns(UserWarning, match=f"other options \\({'mean_alpha_bar' if 'beta_end' in changes else ''}"):
            changed.set_timesteps(4)
    scheduler.warn_of_guidance(GuidanceSetting())
    with pytest.warns(UserWarning, match="fitted with no guidance, .* with guidance_scale 3"):
        scheduler.warn_of_guidance(GuidanceSetting(3.0))


# -- on disk, and in the place of others ------------------------------------------------------------------------------


def differing(a: Any, b: Any) -> dict[str, Any]:
    """Options of a that b has lost or changed, but for Diffusers' notes."""
    names = a.config.keys() - {"_use_default_values", "_class_name", "_diffusers_version", "_name_or_path"}
    return {name: (a.config[name], b.config.get(name)) for name in names if a.config[name] != b.config.get(name)}


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(
    "other", [DDPMExtScheduler, DDPMScheduler, DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler]
)
def test_other_schedulers_and_back_lose_nothing(other: Any, options: dict[str, Any]):
    scheduler = make(**options)
    if options.get("prediction_type") == "posterior_mean" and other is DPMSolverMultistepScheduler:
        pytest.skip("stock knows no such word")
    swapped = other.from_config(scheduler.config)
    back = DDPMExtSolverScheduler.from_config(swapped.config)
    assert differing(scheduler, back) == {}
    back.set_timesteps(4)
    scheduler.set_timesteps(4)
    x = noise(2, 1, 4, 4)
    head = options.get("variance_type") == "learned_range"
    assert torch.equal(run(back, x, head), run(scheduler, x, head))


def test_heun_and_back_keeps_the_betas():
    """Its own defaults are 0.00085 and 0.012; ours are not at ours."""
    scheduler = make(beta_start=2e-4, beta_end=0.03)
    heun: Any = HeunDiscreteScheduler.from_config(scheduler.config)
    back = DDPMExtSolverScheduler.from_config(heun.config)
    assert differing(scheduler, back) == {}


@pytest.mark.parametrize("options", OPTIONS[:3], ids=str)
def test_the_saved_scheduler_is_stocks_best_and_ours_again(options: dict[str, Any], tmp_path: Path):
    scheduler = make(**options)
    scheduler.save_pretrained(tmp_path)
    on_disk = json.loads((tmp_path / "scheduler_config.json").read_text())
    assert (on_disk["_class_name"], on_disk["use_lu_lambdas"]) == ("DPMSolverMultistepScheduler", True)
    cosine = options.get("beta_schedule") == "squaredcos_cap_v2"
    assert on_disk.get("lambda_min_clipped") == (-5.1 if cosine else None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stock: Any = DPMSolverMultistepScheduler.from_pretrained(tmp_path)
        ours: Any = DDPMExtSolverScheduler.from_pretrained(tmp_path)
        plain: Any = DDPMExtScheduler.from_pretrained(tmp_path)
    assert is_portable_solver(stock.config) and differing(scheduler, ours) == {}
    assert type(plain) is DDPMExtScheduler and plain.config["prediction_type"] == scheduler.config["prediction_type"]
    again = DDPMExtSolverScheduler.from_config(stock.config)
    assert differing(scheduler, again) == {}
    if not options.get("rescale_betas_zero_snr"):  # there stock itself fails: λ of ᾱ = 0
        stock.set_timesteps(5)
    stock.save_pretrained(tmp_path / "resaved")  # by stock, unknowing
    assert differing(scheduler, DDPMExtSolverScheduler.from_pretrained(tmp_path / "resaved")) == {}


def test_stock_and_our_pipelines_load_the_folder(tiny_unet: Any, tmp_path: Path):
    pipe = DDPMExtPipeline(tiny_unet, make())
    pipe.save_pretrained(tmp_path)
    ours, stock = DDPMExtPipeline.from_pretrained(tmp_path), DDPMPipeline.from_pretrained(tmp_path)
    assert type(ours.scheduler) is DDPMExtSolverScheduler
    assert type(stock.scheduler) is DPMSolverMultistepScheduler

    def images(pipeline: Any) -> Any:
        pipeline.set_progress_bar_config(disable=True)
        generator = [torch.Generator().manual_seed(i) for i in range(3)]
        return pipeline(batch_size=3, generator=generator, num_inference_steps=4, output_type="np").images

    assert np.array_equal(images(ours), images(pipe))
    assert np.array_equal(images(DDPMPipeline(tiny_unet, make())), images(pipe))  # stock's own __call__
    assert np.isfinite(images(stock)).all() and not np.array_equal(images(stock), images(pipe))
    chosen: Any = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    assert type(DDPMExtPipeline(tiny_unet, chosen).scheduler) is DPMSolverMultistepScheduler  # by a user, on purpose
    for way in (lambda: ours.continue_from(torch.zeros(1, 8, 8), 500), lambda: ours(timesteps=[999, 0])):
        with pytest.raises(ValueError, match=r"DDPMExtScheduler\.from_config"):
            way()


# -- compiled, and on an accelerator ----------------------------------------------------------------------------------


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("reference", ["clipped", "clipped_raw", "unclipped"])
def test_step_is_one_graph_for_all_steps(reference: Any, backend: str):
    scheduler, eager, x = make(reference), make(reference), noise(2, 1, 4, 4)
    graphs: list[Any] = []

    def count(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    def step(output: Tensor, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return scheduler.step(output, t, x, return_dict=False)

    compiled = torch.compile(step, fullgraph=True, backend=count if backend == "eager" else backend)
    for K in (12, 4):
        scheduler.set_timesteps(K)
        eager.set_timesteps(K)
        for _ in range(2):  # the second run starts with what the first one left behind
            x = y = noise(2, 1, 4, 4)
            for t in scheduler.timesteps:
                x, x_0 = compiled(network(x, t), t, x)
                found = eager.step(network(y, t), t, y)
                y = found.prev_sample
                assert_close(x, y, rtol=1e-9, atol=1e-9)
                assert_close(x_0, found.pred_original_sample, rtol=1e-9, atol=1e-9)
        assert torch.isnan(compiled(network(x, 0), scheduler.timesteps[2], x)[0]).all()  # out of turn
        scheduler.set_timesteps(K)
        assert torch.isnan(compiled(network(x, 0), torch.tensor(5), x)[0]).all()  # not visited
    assert len(graphs) <= 2  # without estimates of before, and with them


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
def test_step_compiles_with_inductor():
    scheduler, eager = make(), make()
    compiled = torch.compile(lambda o, t, x: scheduler.step(o, t, x, return_dict=False), fullgraph=True)
    scheduler.set_timesteps(4)
    eager.set_timesteps(4)
    x = y = noise(2, 1, 4, 4).float()
    for t in scheduler.timesteps:
        x, y = compiled(network(x, t), t, x)[0], eager.step(network(y, t), t, y).prev_sample
        assert_close(x, y, rtol=1e-4, atol=1e-4)
