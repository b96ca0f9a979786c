"""Fine-tuning from a name on the Hub, and the licence on its way: converted, fine-tuned, pushed, fine-tuned again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hub_server import Hub
from hub_worker import Client, environment, fixture_client, fixture_hub  # noqa: F401
from training import TORCHRUN, assert_bitwise_equal, finish, options, start

FROM: dict[str, Any] = {"model_config_name_or_path": None, "max_train_steps": 2, "checkpointing_steps": 1}


# Called in the process whose Hub is the fixture's ---------------------------------------------------------------------


def save_stock(folder: str) -> None:
    from diffusers import DDPMPipeline, DDPMScheduler
    from networks import tiny_unet

    pipeline: Any = DDPMPipeline(tiny_unet(7), DDPMScheduler(prediction_type="v_prediction"))  # pyright: ignore
    pipeline.save_pretrained(folder)


def save_original(folder: str) -> None:
    """A checkpoint of ermongroup/ddim, of grey images of 8 x 8."""
    import torch
    from other_networks import HoNetwork

    torch.save(HoNetwork(channels=1, mults=(1,), attend=(), n=1).state_dict(), f"{folder}/ckpt.pt")


def fine_tune(folder: str, **options: Any) -> str:
    """Exit code, or the sentence."""
    from training import run_here

    from ddpm_ext.errors import UserError

    try:
        return str(run_here(Path(folder), **{**FROM, **options}))
    except UserError as error:
        return str(error)


def command(name: str, *words: str) -> str:
    """A subcommand of ddpm-ext; "" or the sentence."""
    from ddpm_ext.cli import commands
    from ddpm_ext.errors import UserError

    try:
        assert getattr(commands, name)(list(words)) == 0
    except UserError as error:
        return str(error)
    return ""


def equal_weights(a: str, b: str) -> bool:
    import torch
    from diffusers import DDPMPipeline

    left, right = (DDPMPipeline.from_pretrained(folder).unet.state_dict() for folder in (a, b))
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


# In this process ------------------------------------------------------------------------------------------------------


def push(client: Client, folder: Path, name: str, *words: str) -> str:
    return client(command, "push", "--model", str(folder), "--hub_model_id", name, "--hub_token", "tok-alice", *words)


def card(hub: Hub, name: str) -> dict[str, Any]:
    import yaml

    return yaml.safe_load(hub.head(name).files["README.md"].decode().split("---\n")[1])


def test_a_hub_name_starts_a_run_from_the_cache_when_the_hub_is_away(hub: Hub, client: Client, tmp_path: Path) -> None:
    client(save_stock, str(tmp_path / "stock"))
    assert push(client, tmp_path / "stock", "alice/base", "--license", "mit") == ""
    runs = [tmp_path / name / "run" for name in ("online", "offline")]
    assert client(fine_tune, str(runs[0]), init_from="alice/base", max_train_steps=0) == "0"
    assert client(equal_weights, str(runs[0] / "pipeline"), str(tmp_path / "stock"))
    for method in ("GET", "HEAD", "POST"):
        hub.fail(method, ".", "reset", times=10_000)
    assert client(fine_tune, str(runs[1]), init_from="alice/base", max_train_steps=0) == "0"
    assert client(equal_weights, str(runs[1] / "pipeline"), str(tmp_path / "stock"))
    assert client(fine_tune, str(runs[1]), init_from="alice/base", max_train_steps=1) == "0"
    before = len(hub.log)
    assert client(fine_tune, str(runs[1]), init_from="alice/base", max_train_steps=2) == "0"  # asks nobody
    assert len(hub.log) == before
    record = json.loads((runs[1] / "config.json").read_text())["init_from"]
    assert record["base_model"] == "alice/base" and record["new"] == []
    assert "alice/nowhere" in client(fine_tune, str(tmp_path / "no" / "run"), init_from="alice/nowhere")


def test_the_licence_of_a_converted_checkpoint_comes_through_two_fine_tunes(
    hub: Hub, client: Client, tmp_path: Path
) -> None:
    """convert -> fine-tune -> push -> fine-tune from the Hub -> push: licence, base model and relation of each."""
    client(save_original, str(tmp_path))
    words = ["--source", "ddim", "--checkpoint", str(tmp_path / "ckpt.pt"), "--resolution", "8"]
    words += ["--prediction_type", "epsilon", "--variance_type", "fixed_large", "--noise_schedule", "linear"]
    words += ["--num_timesteps", "1000"]
    for name, more in (("bare", []), ("converted", ["--license", "cc-by-4.0"])):
        assert client(command, "convert", *words, "--output_dir", str(tmp_path / name), *more) == ""
    told = push(client, tmp_path / "bare", "alice/bare")
    assert "bare was converted from a checkpoint whose licence is not known" in told and "--license" in told
    assert client(fine_tune, str(tmp_path / "0" / "run"), init_from=str(tmp_path / "bare")) == "0"
    told = push(client, tmp_path / "0" / "run", "alice/bare")
    assert "run was fine-tuned from bare, whose card names no licence" in told and "alice/bare" not in hub.repos
    told = client(
        fine_tune,
        str(tmp_path / "00" / "run"),
        init_from=str(tmp_path / "bare"),
        push_to_hub=True,
        hub_token="tok-alice",
    )
    assert "whose card names no licence" in told and not hub.repos  # before the first update
    assert push(client, tmp_path / "bare", "alice/bare", "--license", "mit") == ""
    assert card(hub, "alice/bare")["license"] == "mit" and b"Fingerprint" in hub.head("alice/bare").files["README.md"]

    assert client(fine_tune, str(tmp_path / "1" / "run"), init_from=str(tmp_path / "converted")) == "0"
    assert push(client, tmp_path / "1" / "run", "alice/first") == ""
    first = card(hub, "alice/first")  # of a base that is on no Hub
    assert first["license"] == "cc-by-4.0" and not {"base_model", "base_model_relation"} & first.keys()
    shutil.rmtree(tmp_path / "converted")
    assert client(fine_tune, str(tmp_path / "2" / "run"), init_from="alice/first") == "0"
    assert push(client, tmp_path / "2" / "run", "alice/second") == ""
    second = card(hub, "alice/second")
    assert [second[key] for key in ("license", "base_model", "base_model_relation")] == [
        *("cc-by-4.0", "alice/first", "finetune"),
    ]
    assert push(client, tmp_path / "2" / "run", "alice/told", "--license", "mit") == ""
    assert card(hub, "alice/told")["license"] == "mit"
    assert push(client, tmp_path / "2" / "run", "alice/told") == "" and card(hub, "alice/told")["license"] == "mit"


def test_a_licence_is_written_where_we_render_the_card_and_refused_where_we_do_not(
    hub: Hub, client: Client, tmp_path: Path
) -> None:
    client(save_stock, str(tmp_path / "stock"))
    (tmp_path / "stock" / "README.md").write_text("---\nlicense: mit\n---\nMine.\n")
    told = push(client, tmp_path / "stock", "alice/stock", "--license", "apache-2.0")
    assert "was written by hand and is pushed as it is: write license: apache-2.0 into its front" in told
    assert not hub.repos
    assert push(client, tmp_path / "stock", "alice/stock", "--license", "mit") == ""
    (tmp_path / "stock" / "README.md").unlink()
    other = ["--license", "other", "--license_name", "own", "--license_link", "https://example.org/own"]
    assert push(client, tmp_path / "stock", "alice/plain", *other) == ""
    assert card(hub, "alice/plain")["license_name"] == "own"


@pytest.mark.slow
def test_two_processes_start_from_a_hub_name_and_offline_from_the_cache(
    hub: Hub, client: Client, tmp_path: Path
) -> None:
    """Real processes: from an empty cache, from that cache offline, and a resume without either."""
    client(save_stock, str(tmp_path / "stock"))
    assert push(client, tmp_path / "stock", "alice/base", "--license", "mit") == ""
    there = {name: value for name, value in environment(hub, "").items() if name.startswith(("HF_", "NO_PROXY"))}
    given = {**FROM, "init_from": "alice/base", "checkpoints_total_limit": "none"}
    launcher = [*TORCHRUN, "2"]

    def train(name: str, cache: str, offline: bool, **more: Any) -> None:
        words = options(tmp_path / name, **{**given, **more})
        where = {**there, "HF_HOME": str(tmp_path / cache), "HF_HUB_OFFLINE": str(int(offline))}
        code, said = finish(start(words, launcher, **where))
        assert code == 0, said

    train("online", "cache", False)
    train("offline", "cache", True)
    shutil.copytree(tmp_path / "online", tmp_path / "resumed")
    (tmp_path / "resumed" / "status.json").unlink()
    train("resumed", "empty", True, resume_from_checkpoint="step-00000001")
    for name in ("offline", "resumed"):
        assert_bitwise_equal(tmp_path / "online", tmp_path / name, 2)
