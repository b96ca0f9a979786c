"""What is pushed is what the index needs: the Hub draws the folder's image, or the lack is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hub_server import Hub
from hub_worker import Client, fixture_client, fixture_hub, make_run, push  # noqa: F401
from safetensors.torch import load_file, save_file

from ddpm_ext import UserError
from ddpm_ext.hub.files import collect, shown_images
from ddpm_ext.hub.pipeline_files import check_weights

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
CARD_IMAGES = ["a.png", "b.PNG", "My Grid.png", "deep/er/c.svg", "d (1).jpg", "é.webp", "e_f.gif", "g&h.png"]


def make_pipeline(folder: str, seed: int = 0, **options: Any) -> None:
    """Save a pipeline alone, with the options of `save_pretrained`."""
    make_run(f"{folder}.run", seed)
    from ddpm_ext import DDPMExtPipeline

    (Path(f"{folder}.run") / "pipeline" / "unet" / "old.bin").unlink()
    DDPMExtPipeline.from_pretrained(f"{folder}.run/pipeline").save_pretrained(folder, **options)
    shutil.rmtree(f"{folder}.run")


def draw(source: str, cache: str, **options: Any) -> tuple[bytes, bytes]:
    """The image that our pipeline and the one that stock draws from a folder or a repository, two steps, seed 0."""
    import torch
    from diffusers import DDPMPipeline

    from ddpm_ext import DDPMExtPipeline

    images = []
    for kind in (DDPMExtPipeline, DDPMPipeline):
        pipe: Any = kind.from_pretrained(source, cache_dir=cache, **options)
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        images.append(pipe(generator=generator, num_inference_steps=2, output_type="np").images.tobytes())
    return images[0], images[1]


def flatten(folder: Path) -> None:
    for part in ("unet", "scheduler"):
        for path in (folder / part).iterdir():
            path.rename(folder / path.name)
        (folder / part).rmdir()


def into_run(folder: Path) -> None:
    """The pipeline as that of a run, whose own config.json must not take the place of a network's."""
    inner = folder.with_name("inner")
    folder.rename(inner)
    inner.rename(folder / "pipeline") if folder.mkdir() is None else None
    (folder / "config.json").write_text('{"config": {}}')


def with_extra_parts(folder: Path) -> None:
    """Parts of other people, deep ones too; a part that is switched off; files that no part needs."""
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"feature_extractor": ["transformers", "CLIPImageProcessor"], "safety_checker": [None, None]}
    (folder / "feature_extractor" / "vocabulary").mkdir(parents=True)
    (folder / "feature_extractor" / "preprocessor_config.json").write_text("{}")
    (folder / "feature_extractor" / "vocabulary" / "words.txt").write_text("a b")
    (folder / "unet" / "notes.txt").write_text("mine")
    (folder / "model_index.json").write_text(json.dumps(index))


LAYOUTS: dict[str, tuple[dict[str, Any], list[Callable[[Path], None]]]] = {
    "folders": ({}, []),
    "flat": ({}, [flatten]),
    "shards": ({"max_shard_size": "5KB"}, []),
    "flat shards": ({"max_shard_size": "5KB"}, [flatten]),
    "a flat pipeline in a run": ({}, [flatten, into_run]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("before", [None, "folders", "flat", "shards"])
def test_what_is_pushed_draws_the_image_of_the_folder(
    hub: Hub, client: Client, tmp_path: Path, layout: str, before: str | None
) -> None:
    if before is not None:  # another network lies there, stored by other clients in another layout
        client(make_pipeline, str(tmp_path / "old"), 1, **LAYOUTS[before][0])
        [change(tmp_path / "old") for change in LAYOUTS[before][1]]
        hub.create("alice/digits")
        files = {p.relative_to(tmp_path / "old").as_posix(): p for p in (tmp_path / "old").rglob("*") if p.is_file()}
        hub.commit("alice/digits", "refs/heads/main", "old", {name: path.read_bytes() for name, path in files.items()})
    folder = tmp_path / "new"
    client(make_pipeline, str(folder), 0, **LAYOUTS[layout][0])
    expected = client(draw, str(folder), str(tmp_path / "none"))
    [change(folder) for change in LAYOUTS[layout][1]]
    assert "error" not in client(push, str(folder), "alice/digits")
    assert client(draw, "alice/digits", str(tmp_path / "cache")) == expected
    names = set(hub.head("alice/digits").files)
    assert sum(name.endswith(".safetensors") for name in names) == (1 if "shards" not in layout else len(names) - 6)
    assert not {name for name in names if name.startswith("diffusion")} and "scheduler_config.json" not in names


def test_parts_of_others_go_with_all_that_they_hold(hub: Hub, client: Client, tmp_path: Path) -> None:
    client(make_pipeline, str(tmp_path / "new"))
    with_extra_parts(tmp_path / "new")
    assert "error" not in client(push, str(tmp_path / "new"), "alice/digits")
    names = set(hub.head("alice/digits").files)
    assert {"feature_extractor/preprocessor_config.json", "feature_extractor/vocabulary/words.txt", WEIGHTS} <= names
    assert "unet/notes.txt" not in names


def lose_tensor(folder: Path, name: str = "conv_out.weight") -> None:
    weights = load_file(folder / WEIGHTS)
    del weights[name]
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


def reshape_tensor(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    save_file({**weights, "conv_in.weight": weights["conv_in.weight"][:4].clone()}, folder / WEIGHTS)


def point(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n")

    return change


def cut(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (path,) = folder.glob(name)
        path.write_bytes(path.read_bytes()[:-9])

    return change


def remove(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (path,) = folder.glob(name)
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return change


def name_part(entry: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        index = json.loads((folder / "model_index.json").read_text())
        (folder / "model_index.json").write_text(json.dumps({**index, "vae": entry}))

    return change


def show_pointer(folder: Path) -> None:
    (folder / "README.md").write_text("![](grid.png)")
    point("grid.png")(folder)


SHARD = "unet/diffusion_pytorch_model-00002-of-*.safetensors"
SHARD_INDEX = "unet/diffusion_pytorch_model.safetensors.index.json"


def other_half(folder: Path) -> None:
    """An fp16 file of an earlier save beside the weights of now."""
    weights = {name: weight.half() + 1 for name, weight in load_file(folder / WEIGHTS).items()}
    save_file(weights, folder / "unet/diffusion_pytorch_model.fp16.safetensors")


@pytest.mark.parametrize(
    ("options", "changes", "sentence"),
    [
        ({}, [remove("unet")], "names 'unet' (UNet2DModel), and its files are missing"),
        ({}, [remove("scheduler")], "names 'scheduler' (DDPMScheduler), and its files are missing"),
        ({}, [remove("unet/config.json")], "unet lacks config.json of 'unet'"),
        ({}, [remove("scheduler/scheduler_config.json")], "scheduler lacks scheduler_config.json"),
        ({}, [flatten, remove("scheduler_config.json")], "names 'scheduler'"),
        ({}, [flatten, remove("diffusion_pytorch_model.safetensors")], "and no weights"),
        ({}, [lose_tensor], "lacks the tensor 'conv_out.weight', shape (1, 8, 3, 3)"),
        ({}, [reshape_tensor], "holds 'conv_in.weight' with the shape (4, 1, 3, 3)"),
        ({}, [point(WEIGHTS)], "is a pointer of Git LFS"),
        ({}, [point("scheduler/scheduler_config.json")], "is a pointer of Git LFS"),
        ({}, [show_pointer], "grid.png is a pointer of Git LFS"),
        ({}, [cut(WEIGHTS)], "is broken"),
        ({}, [cut("model_index.json")], "is broken"),
        ({"max_shard_size": "5KB"}, [remove(SHARD)], "names diffusion_pytorch_model-00002-of-"),
        ({"max_shard_size": "5KB"}, [remove(SHARD_INDEX)], "is one of several shards, and their index"),
        ({"max_shard_size": "5KB"}, [cut(SHARD)], "is broken"),
        ({"safe_serialization": False}, [], "as a pickle (diffusion_pytorch_model.bin)"),
        ({"safe_serialization": False}, [flatten], "as a pickle (diffusion_pytorch_model.bin)"),
        ({}, [name_part(["diffusers", "AutoencoderKL"])], "names 'vae' (AutoencoderKL), and its files are missing"),
        ({}, [flatten, name_part(["diffusers", "AutoencoderKL"])], "names 'vae' (AutoencoderKL)"),
        ({}, [name_part(["transformers", "CLIPTextModel"])], "names 'vae' (CLIPTextModel)"),
        ({}, [other_half], "differs, so it is of an earlier save"),
    ],
)
def test_a_lack_is_named_and_nothing_is_pushed(
    hub: Hub,
    client: Client,
    tmp_path: Path,
    options: dict[str, Any],
    changes: list[Callable[[Path], None]],
    sentence: str,
) -> None:
    client(make_pipeline, str(tmp_path / "good"), 1)
    client(push, str(tmp_path / "good"), "alice/digits")
    client(make_pipeline, str(tmp_path / "new"), 0, **options)
    [change(tmp_path / "new") for change in changes]
    done = client(push, str(tmp_path / "new"), "alice/digits")
    assert sentence in done.get("error", "no error"), done
    assert len(hub.history("alice/digits")) == 2
    done = client(push, str(tmp_path / "new"), "alice/other")
    assert sentence in done["error"] and "alice/other" not in hub.repos


def test_half_weights_alone_do_not_stand_beside_full_ones_of_another_push(
    hub: Hub, client: Client, tmp_path: Path
) -> None:
    client(make_pipeline, str(tmp_path / "half"), variant="fp16")
    assert "error" not in client(push, str(tmp_path / "half"), "alice/half")
    expected = client(draw, str(tmp_path / "half"), str(tmp_path / "none"), variant="fp16")
    assert client(draw, "alice/half", str(tmp_path / "cache"), variant="fp16") == expected
    client(make_pipeline, str(tmp_path / "good"), 1)
    client(push, str(tmp_path / "good"), "alice/digits")
    done = client(push, str(tmp_path / "half"), "alice/digits")
    assert "one index would load two networks" in done["error"] and "--variant fp16" in done["error"]
    assert len(hub.history("alice/digits")) == 2


@pytest.mark.parametrize("change", [lose_tensor, reshape_tensor, cut(WEIGHTS)])
def test_the_check_is_the_one_that_loading_makes(client: Client, tmp_path: Path, change: Any) -> None:
    client(make_pipeline, str(tmp_path / "new"))
    check_weights(tmp_path / "new")
    change(tmp_path / "new")
    with pytest.raises(UserError, match=r"conv_out.weight|conv_in.weight|is broken"):
        check_weights(tmp_path / "new")
    check_weights(tmp_path / "new", passed=["unet"])


def test_old_names_of_attention_are_no_lack(tmp_path: Path) -> None:
    """google/ddpm-* hold query, key, value, proj_attn, which Diffusers renames when it loads."""
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    blocks: Any = {"down_block_types": ("AttnDownBlock2D",), "up_block_types": ("AttnUpBlock2D",)}
    unet = UNet2DModel(8, 1, 1, block_out_channels=(8,), norm_num_groups=4, layers_per_block=1, **blocks)
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path)
    renamed = {}
    for name, weight in load_file(tmp_path / WEIGHTS).items():
        for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            name = name.replace(new, old)
        renamed[name] = weight
    save_file(renamed, tmp_path / WEIGHTS, metadata={"format": "pt"})
    check_weights(tmp_path)
    del renamed["mid_block.attentions.0.query.weight"]
    save_file(renamed, tmp_path / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"mid_block.attentions.0.to_q.weight"):
        check_weights(tmp_path)


def test_every_image_that_a_card_shows_is_found(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in [*CARD_IMAGES, "unshown.png", "samples/1.png", "samples/2.png", "x/a.png", "checkpoints/a.png"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"image")
    (tmp_path / "README.md").write_text(
        "---\nwidget:\n- output:\n    url: b.PNG\n---\n![a](./a.png?raw=true 'title') ![](My%20Grid.png)\n"
        '<img width=9 src="deep/er/c.svg"> ![](<d (1).jpg>) ![ref] <img src="g&amp;h.png">\n[ref]: %C3%A9.webp\n'
        "![](e\\_f.gif) ![](gone/h.png) ![](https://example.org/i.png)\n"
    )
    assert set(shown_images(tmp_path)) == {*CARD_IMAGES, "samples/2.png"}
    assert "gone/h.png, which is not in" in caplog.text and "example.org" not in caplog.text


def test_images_of_a_pulled_folder_are_links_and_go_too(client: Client, tmp_path: Path) -> None:
    client(make_pipeline, str(tmp_path / "new"))
    (tmp_path / "blob").write_bytes(b"image")
    (tmp_path / "new" / "grid.png").symlink_to(tmp_path / "blob")
    (tmp_path / "new" / "README.md").write_text("![](grid.png)")
    assert "grid.png" in collect(tmp_path / "new", tmp_path / "staging")


def convert_pipeline(source: str, folder: str) -> str:
    from ddpm_ext.conversion.config import ConvertOptions
    from ddpm_ext.conversion.convert import convert

    return (convert(ConvertOptions("auto", source, folder)) / "README.md").read_text()


def test_a_pipeline_of_the_hub_keeps_name_and_licence_when_it_is_converted(
    hub: Hub, client: Client, tmp_path: Path
) -> None:
    client(make_pipeline, str(tmp_path / "new"))
    (tmp_path / "new" / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n")
    client(push, str(tmp_path / "new"), "alice/base")
    card = client(convert_pipeline, "alice/base", str(tmp_path / "out"))
    assert "base_model: alice/base\n" in card and "license: cc-by-4.0\n" in card
    card = client(convert_pipeline, str(tmp_path / "new"), str(tmp_path / "out2"))
    assert "license: cc-by-4.0\n" in card and "base_model" not in card and str(tmp_path) not in card
