"""The page: what its buttons do, without and with a browser, and its upload as a Space."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hub_server import Hub
from hub_worker import Client, fixture_client, fixture_hub  # noqa: F401
from PIL import Image

from ddpm_ext import DDPMExtPipeline, DDPMExtScheduler
from ddpm_ext.demo import SHOWN_STEPS, SIDE, Studio, in_a_row, space_files

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def model(tiny_unet: Any, tmp_path: Path) -> str:
    scheduler = DDPMExtScheduler(num_train_timesteps=100, beta_start=1e-3, beta_end=0.2)
    DDPMExtPipeline(tiny_unet, scheduler).save_pretrained(tmp_path / "pipeline")
    return str(tmp_path / "pipeline")


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_generate_ends_with_what_the_pipeline_draws(model: str, sampler: Any) -> None:
    from ddpm_ext.measure import make_scheduler

    studio = Studio(model)
    shown = list(studio.generate(60, sampler, seed=3, count=2))
    assert len(shown) <= 60 // (60 // SHOWN_STEPS) + 1
    assert shown[-1][1].endswith("step 60 of 60")
    assert shown[-1][0].size == (2 * SIDE, SIDE)

    pipe: Any = DDPMExtPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = make_scheduler(pipe.scheduler, sampler)
    generator = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    x_0 = pipe(2, generator, num_inference_steps=60, output_type="latent").images
    assert np.array_equal(shown[-1][0], in_a_row(x_0))
    assert isinstance(studio.pipeline.scheduler, DDPMExtScheduler)


def test_an_interpolation_ends_at_its_pictures(model: str) -> None:
    studio = Studio(model)
    a, b = (Image.fromarray(np.full((8, 8), value, np.uint8)) for value in (0, 255))
    ends = [np.asarray(studio.interpolate(a, b, 0, weight, seed=0)) for weight in (0, 1)]
    assert ends[0].mean() < 40 < 215 < ends[1].mean()  # one step's noise is 0.1% of the variance
    small = studio.interpolate(a.resize((20, 20)).convert("RGB"), b, 50, 0.5, seed=0)  # brought to size and channels
    assert small.size == (SIDE, SIDE)


def test_bits_of_an_uploaded_picture(model: str) -> None:
    words = Studio(model).bits(Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)), 5)
    assert words.startswith("at most ") and "±" in words and words.endswith("bits/dim (5 steps sampled)")


def test_loading_another_model(model: str) -> None:
    studio = Studio(model)
    former = studio.pipeline
    assert "cannot be loaded" in studio.load("/no/such/folder")
    assert studio.pipeline is former
    assert studio.load(model).endswith("pictures of 8, 100 steps of training.")
    assert studio.pipeline is not former


def push_page(repo_id: str, staging: str) -> tuple[str, bool]:
    from ddpm_ext.hub import push_space

    Path(staging).mkdir(exist_ok=True)
    push = push_space(space_files("alice/digits", repo_id, Path(staging)), repo_id, token="tok-alice")
    return push.url, push.changed


def test_the_page_is_pushed_as_a_space(hub: Hub, client: Client, tmp_path: Path) -> None:
    pushed = client(push_page, "alice/digits-demo", str(tmp_path / "staging"))
    assert tuple(pushed) == (f"{hub.url}/spaces/alice/digits-demo", True)
    files = hub.head("alice/digits-demo").files
    assert b"sdk: gradio" in files["README.md"] and b"app_file: app.py" in files["README.md"]
    assert b"Studio('alice/digits')" in files["app.py"]
    assert {"gradio"} < {line.split(">")[0] for line in files["requirements.txt"].decode().split()}
    assert {f"ddpm_ext/{path.name}" for path in (ROOT / "ddpm_ext").glob("*.py")} < files.keys()
    assert hub.requests("POST", "/api/spaces/alice/digits-demo/commit")
    assert client(push_page, "alice/digits-demo", str(tmp_path / "staging"))[1] is False
    assert len(hub.history("alice/digits-demo")) == 2


class Browser:
    """A headless Chromium, driven over the WebDriver protocol."""

    def __init__(self, port: int) -> None:
        self.base = f"http://127.0.0.1:{port}"
        chrome = {"args": ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]}
        capabilities = {"alwaysMatch": {"browserName": "chrome", "goog:chromeOptions": chrome}}
        self.base += "/session/" + self("POST", "/session", capabilities=capabilities)["sessionId"]

    def __call__(self, method: str, path: str, **body: Any) -> Any:
        data = json.dumps(body).encode() if method == "POST" else None
        request = urllib.request.Request(self.base + path, data, {"Content-Type": "application/json"}, method=method)
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60) as answer:
            return json.load(answer)["value"]

    def run(self, script: str) -> Any:
        return self("POST", "/execute/sync", script=script, args=[])

    def wait(self, script: str, seconds: float = 60) -> Any:
        """The first true value of a script."""
        end = time.monotonic() + seconds
        while not (value := self.run(script)):
            assert time.monotonic() < end, f"{script} did not become true: {self.run('return document.body.innerText')}"
            time.sleep(0.3)
        return value


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(port: int, process: subprocess.Popen[bytes]) -> None:
    for _ in range(600):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        assert process.poll() is None, "the process ended before it listened"
        time.sleep(0.2)
    raise TimeoutError(f"nothing listens on port {port}")


@pytest.fixture
def browser() -> Iterator[Browser]:
    driver = shutil.which("chromedriver")
    if driver is None or shutil.which("chromium") is None:
        pytest.skip("no chromium and chromedriver (Debian: apt install chromium chromium-driver)")
    port = free_port()
    process = subprocess.Popen([driver, f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(port, process)
        opened = Browser(port)
        yield opened
        opened("DELETE", "")
    finally:
        process.terminate()
        process.wait(timeout=20)


@pytest.mark.slow
def test_a_click_on_generate_shows_an_image(browser: Browser, model: str) -> None:
    if importlib.util.find_spec("gradio") is None:
        pytest.skip("no gradio (pip install ddpm-ext[demo])")
    port = free_port()
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "GRADIO_ANALYTICS_ENABLED": "False"}
    command = [sys.executable, "scripts/demo.py", "--model", model, "--port", str(port)]
    process = subprocess.Popen(command, cwd=ROOT, env=env)
    try:
        wait_for(port, process)
        browser("POST", "/url", url=f"http://127.0.0.1:{port}")
        button = "document.querySelector('button#generate, #generate button')"
        shown = "document.querySelector('#generated img')"
        browser.wait(f"return {button} !== null")
        assert browser.run(f"return {shown}") is None
        browser.run(f"{button}.click()")
        browser.wait("return document.body.innerText.includes('step 100 of 100')")
        width = browser.wait(f"return {shown} && {shown}.complete && {shown}.naturalWidth")
        assert width == 4 * SIDE
    finally:
        process.terminate()
        process.wait(timeout=20)
