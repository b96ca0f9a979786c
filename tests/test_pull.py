"""Pull: what arrives is what was pushed, bit by bit, or the true cause is told. The real client against loopback."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hub_server import Hub
from hub_worker import Client, environment, fixture_client, fixture_hub, fixture_run, make_run, pull, push, weights  # noqa: F401

from ddpm_ext.errors import UserError

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def pushed(client: Client, run: Path) -> Path:
    """A run whose files are on the Hub as alice/digits."""
    assert "error" not in client(push, str(run), "alice/digits", variant="fp16", tags=["v1.0"])
    return run


def cache(tmp_path: Path) -> str:
    return str(tmp_path / "cache")


def test_what_is_pulled_is_bitwise_what_was_pushed(client: Client, pushed: Path, tmp_path: Path) -> None:
    loaded = client(pull, "alice/digits", cache(tmp_path))
    assert loaded["unet"] == weights(str(pushed / "pipeline"))
    assert loaded["scheduler"] == "DDPMExtScheduler"


def test_revisions_and_variants(hub: Hub, client: Client, pushed: Path, tmp_path: Path) -> None:
    old, first = weights(str(pushed / "pipeline")), hub.head("alice/digits").oid
    client(make_run, str(pushed), seed=1)
    client(push, str(pushed), "alice/digits", variant="fp16")
    new = weights(str(pushed / "pipeline"))
    assert old != new
    assert client(pull, "alice/digits", cache(tmp_path))["unet"] == new
    for revision in ("v1.0", first):
        assert client(pull, "alice/digits", cache(tmp_path), revision=revision)["unet"] == old
    half = client(pull, "alice/digits", cache(tmp_path), variant="fp16")["unet"]
    assert half.keys() == new.keys() and half != new


def test_a_missing_variant_or_revision_is_named(client: Client, pushed: Path, tmp_path: Path) -> None:
    missing = client(pull, "alice/digits", cache(tmp_path), variant="bf16")["error"]
    assert "no weights of the variant 'bf16'" in missing and "it has fp16" in missing
    wrong = client(pull, "alice/digits", cache(tmp_path), revision="v9")["error"]
    assert "no branch, tag or commit 'v9'" in wrong


def test_a_cached_pipeline_loads_without_the_hub(hub: Hub, client: Client, pushed: Path, tmp_path: Path) -> None:
    online = client(pull, "alice/digits", cache(tmp_path))["unet"]
    hub.fail("GET", "", "reset", times=1000)
    hub.fail("HEAD", "", "reset", times=1000)
    down = client(pull, "alice/digits", cache(tmp_path))
    assert down["unet"] == online
    hub.faults.clear()
    for status in (503, 429):  # stock Diffusers loads it then, too
        fault = hub.fail("GET", "", status=status, times=1000)
        assert client(pull, "alice/digits", cache(tmp_path))["unet"] == online
        variant = client(pull, "alice/digits", cache(tmp_path), variant="bf16")["error"]
        assert "alice/digits with the variant 'bf16' is not in the cache in full" in variant
        hub.faults.remove(fault)
    hub.fail("GET", "", "reset", times=1000)
    hub.log.clear()
    assert client(pull, "alice/digits", cache(tmp_path), local_files_only=True)["unet"] == online
    assert hub.log == []
    empty = client(pull, "alice/digits", str(tmp_path / "empty"), local_files_only=True)["error"]
    assert "is not in the cache in full" in empty and "DDPMExtPipeline.from_pretrained" in empty


def spoil(cache_dir: str) -> str:
    """Flip a bit of the cached weights; their file."""
    blob = next(Path(cache_dir).rglob("diffusion_pytorch_model.safetensors")).resolve()
    content = bytearray(blob.read_bytes())
    content[-1] ^= 1
    blob.write_bytes(content)
    return str(blob)


def test_a_bit_flipped_on_the_way_is_seen_and_mended(hub: Hub, client: Client, pushed: Path, tmp_path: Path) -> None:
    fault = hub.fail("GET", r"\?sign=1", "flip")
    assert client(pull, "alice/digits", cache(tmp_path))["unet"] == weights(str(pushed / "pipeline"))
    assert fault.met == 1


def test_a_bit_flipped_in_the_cache_is_seen_and_mended(client: Client, pushed: Path, tmp_path: Path) -> None:
    good = client(pull, "alice/digits", cache(tmp_path))["unet"]
    spoil(cache(tmp_path))
    assert client(pull, "alice/digits", cache(tmp_path))["unet"] == good
    blob = spoil(cache(tmp_path))
    offline = client(pull, "alice/digits", cache(tmp_path), local_files_only=True)["error"]
    assert WEIGHTS in offline and "corrupt" in offline and Path(blob).exists()


def test_a_file_that_is_always_corrupt_is_told(hub: Hub, client: Client, pushed: Path, tmp_path: Path) -> None:
    hub.fail("GET", r"\?sign=1", "flip", times=1000)
    error = client(pull, "alice/digits", cache(tmp_path))["error"]
    assert f"corrupt in {WEIGHTS}" in error and "also after a second download" in error


@pytest.mark.parametrize(
    ("path", "kind", "status"),
    [
        (r"/api/models/alice/digits$", "status", 503),  # to resolve the revision, and our own question
        (r"blobs=", "status", 503),
        (r"/api/models/alice/digits/revision", "status", 500),
        (r"/tree/", "status", 503),
        (r"/resolve/.*model_index", "status", 502),
        (r"\?sign=1", "status", 503),
        (r"\?sign=1", "half", 0),
        (r"\?sign=1", "reset", 0),
        (r"/resolve/.*scheduler_config", "half", 0),
    ],
)
def test_one_fault_on_the_way_is_survived(
    hub: Hub, client: Client, pushed: Path, tmp_path: Path, path: str, kind: Any, status: int
) -> None:
    fault = hub.fail("GET", path, kind, status=status)
    assert client(pull, "alice/digits", cache(tmp_path))["unet"] == weights(str(pushed / "pipeline"))
    assert fault.met == 1


def test_retry_after_is_honoured(hub: Hub, client: Client, pushed: Path, tmp_path: Path) -> None:
    hub.fail("GET", r"blobs=", status=429, headers={"Retry-After": "7"})
    assert 7.0 in client(pull, "alice/digits", cache(tmp_path))["waits"]


@pytest.mark.parametrize(
    ("status", "sentence"),
    [
        (403, "may not read alice/digits"),
        (429, "limits the number of requests"),
        (503, "The Hub is in trouble: the Hub answered 503"),
    ],
)
def test_the_true_cause_is_told(
    hub: Hub, client: Client, pushed: Path, tmp_path: Path, status: int, sentence: str
) -> None:
    hub.fail("GET", "", status=status, times=1000)
    error = client(pull, "alice/digits", cache(tmp_path))["error"]
    assert sentence in error and "DDPMExtPipeline.from_pretrained" in error
    assert "fully cached" not in error


def test_private_missing_and_unreadable_repositories(hub: Hub, client: Client, run: Path, tmp_path: Path) -> None:
    client(push, str(run), "alice/secret", private=True)
    anonymous = client(pull, "alice/secret", cache(tmp_path), token=False)["error"]
    assert "does not exist, or it is private and no token was given" in anonymous and "hf auth login" in anonymous
    assert "your token may not see it" in client(pull, "alice/secret", cache(tmp_path), token="tok-bob")["error"]
    assert "does not accept this token" in client(pull, "alice/secret", cache(tmp_path), token="tok-typo")["error"]
    assert "unet" in client(pull, "alice/secret", cache(tmp_path), token="tok-alice-read")
    assert "does not exist" in client(pull, "alice/nothing", cache(tmp_path))["error"]
    with pytest.raises(UserError, match="no folder alice/--, and a model of the Hub is named user/model"):
        client(pull, "alice/--", cache(tmp_path))
    hub.create("alice/empty")
    assert "holds no model_index.json" in client(pull, "alice/empty", cache(tmp_path))["error"]


def pull_stock(repo_id: str, cache_dir: str) -> list[Any]:
    """Shape of a sample from ours, and the warnings that loading made."""
    import warnings

    import torch

    from ddpm_ext import DDPMExtPipeline

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pipe = DDPMExtPipeline.from_pretrained(repo_id, cache_dir=cache_dir)
    pipe.set_progress_bar_config(disable=True)
    image = pipe(generator=torch.Generator().manual_seed(0), num_inference_steps=2, output_type="pt").images
    return [list(image.shape), type(pipe.scheduler).__name__, [str(w.message) for w in caught]]


def stock_repository(folder: str, layout: str) -> None:
    """A DDPM repository as others publish it: saved by stock Diffusers, with a pickle, or flat as google/ddpm-*."""
    import shutil

    import torch
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    unet = UNet2DModel.from_pretrained(f"{folder}/pipeline/unet")
    target = Path(folder) / layout
    DDPMPipeline(unet, DDPMScheduler(variance_type="fixed_large")).save_pretrained(target)
    safe = target / "unet" / "diffusion_pytorch_model.safetensors"
    if layout == "pickled":
        torch.save(unet.state_dict(), safe.with_suffix(".bin"))
        safe.unlink()
    if layout == "flat":
        for path in (*(target / "unet").iterdir(), *(target / "scheduler").iterdir()):
            shutil.move(path, target / path.name)
        (target / "unet").rmdir(), (target / "scheduler").rmdir()


@pytest.mark.parametrize("layout", ["nested", "pickled", "flat"])
def test_every_stock_ddpm_repository_loads(hub: Hub, client: Client, run: Path, tmp_path: Path, layout: str) -> None:
    client(stock_repository, str(run), layout)
    hub.create("google/ddpm")
    target = run / layout
    files = {str(path.relative_to(target)): path.read_bytes() for path in target.rglob("*") if path.is_file()}
    hub.commit("google/ddpm", "refs/heads/main", "theirs", files)
    shape, scheduler, _ = client(pull_stock, "google/ddpm", cache(tmp_path))
    assert shape == [1, 1, 8, 8]
    assert scheduler == "DDPMExtScheduler"


def ask_for_remote_code(cache_dir: str) -> str:
    from ddpm_ext import DDPMExtPipeline

    try:
        DDPMExtPipeline.from_pretrained("alice/digits", cache_dir=cache_dir, trust_remote_code=True)
    except ValueError as error:
        return str(error)
    return "loaded"


def test_code_of_a_repository_is_never_run(hub: Hub, client: Client, pushed: Path, tmp_path: Path) -> None:
    assert "no DDPM needs it" in client(ask_for_remote_code, cache(tmp_path))
    (pushed / "pipeline" / "evil.py").write_text("raise SystemExit('run')")
    client(push, str(pushed), "alice/digits")
    assert not [name for name in hub.head("alice/digits").files if name.endswith(".py")]


STOCK = """
import json, sys
sys.modules["ddpm_ext"] = None  # as where it is not installed: any import of it fails
import torch
from diffusers import DDPMPipeline, DiffusionPipeline
shapes = []
for kind in (DDPMPipeline, DiffusionPipeline):
    pipe = kind.from_pretrained("alice/digits")
    pipe.set_progress_bar_config(disable=True)
    image = pipe(generator=torch.Generator().manual_seed(0), num_inference_steps=3, output_type="np").images
    shapes.append([list(image.shape), type(pipe).__name__, type(pipe.scheduler).__name__])
print(json.dumps(shapes))
"""


def test_stock_diffusers_loads_and_samples_without_this_package(hub: Hub, pushed: Path, tmp_path: Path) -> None:
    env = environment(hub, str(tmp_path / "fresh"))
    done = subprocess.run([sys.executable, "-c", STOCK], env=env, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    expected = [[1, 8, 8, 1], "DDPMPipeline", "DDPMScheduler"]
    assert json.loads(done.stdout.splitlines()[-1]) == [expected, expected]
    assert "not expected" not in done.stderr and "ignored" not in done.stderr, done.stderr


def pixels_of(name: str, cache_dir: str) -> list[Any]:
    """Number, shape and sum of a data set's pictures."""
    from ddpm_ext.data.dataset import load_images

    images = load_images(name, cache_dir=cache_dir)
    batch = images.batch(list(range(len(images)))).pixels
    return [len(images), list(batch.shape), int(batch.long().sum())]


def test_a_data_set_of_the_hub_is_the_one_on_disk(hub: Hub, client: Client, tmp_path: Path) -> None:
    digits = Path(__file__).parent.parent / "ddpm_ext" / "data" / "digits"
    hub.create("alice/digits-data")
    files = {f"data/{split}-00000-of-00001.parquet": digits / f"{split}.parquet" for split in ("train", "test")}
    hub.commit(
        "alice/digits-data", "refs/heads/main", "data", {name: path.read_bytes() for name, path in files.items()}
    )
    loaded = client(pixels_of, "alice/digits-data", cache(tmp_path))
    assert loaded == client(pixels_of, "digits", cache(tmp_path))
    assert hub.requests("GET", r"\?sign=1")
