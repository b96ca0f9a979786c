"""Extractors with small random networks and stand-ins of the same interface, and the road of an image into them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
import transformers
from torch import Tensor
from torch.testing import assert_close

from ddpm_ext.evaluation.features import extractors
from ddpm_ext.evaluation.features.extractors import (
    Features,
    Preprocessing,
    extract,
    inception,
    make_extractor,
    quantize,
)
from ddpm_ext.pipelines.identity import weights_hash


def images(n: int = 6, channels: int = 3, size: int = 8) -> Tensor:
    return torch.rand((n, channels, size, size), generator=torch.Generator().manual_seed(0))


class StandIn(torch.nn.Module):
    """A network of torch-fidelity's interface: uint8 (B, 3, H, W) -> (features, logits)."""

    def __init__(self, name: str = "", features_list: list[str] | None = None, weights: str | None = None) -> None:
        super().__init__()
        assert features_list in (None, ["2048", "logits_unbiased"])
        if weights == "broken.pth":
            raise RuntimeError("no such file")
        self.scale = torch.nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        assert x.dtype == torch.uint8 and x.shape[1] == 3
        flat = x.float().flatten(1) * self.scale
        return flat[:, :5], flat[:, 5:9]


# The hand-off ---------------------------------------------------------------------------------------------------------


def test_the_hand_off_rounds_or_does_not() -> None:
    x = torch.tensor([-0.2, 0.0, 0.5001, 100.4 / 255, 1.3])
    assert_close(quantize(x, "uint8") * 255, torch.tensor([0.0, 0.0, 128.0, 100.0, 255.0]))
    assert_close(quantize(x, "float"), torch.tensor([0.0, 0.0, 0.5001, 100.4 / 255, 1.0]))
    pixels = torch.arange(256, dtype=torch.uint8)
    for kind in ("uint8", "float"):
        assert torch.equal((quantize(pixels, kind) * 255).round().to(torch.uint8), pixels)  # type: ignore[arg-type]


def test_pixels_are_the_image_itself() -> None:
    x = images()
    found = extract(make_extractor("pixels"), x.split(4), "float")
    assert torch.equal(found.features, x.flatten(1))
    assert found.logits is None
    assert torch.equal(extract(make_extractor("pixels"), [x]).features, ((x * 255).round() / 255).flatten(1))


# Inception ------------------------------------------------------------------------------------------------------------


def test_inception_gets_three_8_bit_channels() -> None:
    extractor = inception(StandIn())
    x = images(channels=1)
    found = extract(extractor, x.split(4))
    expected = (x * 255).round().expand(-1, 3, -1, -1).flatten(1) * 2
    assert_close(found.features, expected[:, :5])
    assert found.logits is not None
    assert_close(found.logits, expected[:, 5:9])
    with pytest.raises(
        ValueError, match='"inception" takes 8-bit images only: quantization must be "uint8", got \'float\''
    ):
        extract(extractor, [x], "float")


def test_inception_is_loaded_through_torch_fidelity(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    module.FeatureExtractorInceptionV3 = StandIn  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch_fidelity", ModuleType("torch_fidelity"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    extractor = make_extractor("inception")
    assert extractor.description["weights"] == weights_hash(StandIn())
    with pytest.raises(ValueError, match=r"cannot be read or downloaded \(no such file\)"):
        make_extractor("inception", weights="broken.pth")


def test_inception_that_cannot_be_had_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)  # as if not installed
    with pytest.raises(ValueError, match=r"needs torch-fidelity .* pip install ddpm-ext\[fid\]"):
        make_extractor("inception")


# transformers ---------------------------------------------------------------------------------------------------------


def save(model: transformers.PreTrainedModel, folder: Path, **options: object) -> str:
    model.save_pretrained(folder)
    if options:
        (folder / "preprocessor_config.json").write_text(json.dumps(options))
    return str(folder)


def small_resnet(**more: object) -> transformers.ResNetConfig:
    return transformers.ResNetConfig(
        embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", num_labels=3, **more
    )


def test_a_classifier_gives_its_pooled_output_and_logits(tmp_path: Path) -> None:
    model = transformers.ResNetForImageClassification(small_resnet()).eval()
    extractor = make_extractor(save(model, tmp_path), size=16)
    x = images()
    found = extract(extractor, x.split(4), "float")
    scaled = torch.nn.functional.interpolate(x, (16, 16), mode="bilinear", align_corners=False)
    with torch.no_grad():
        expected = model.resnet(scaled * 2 - 1).pooler_output.flatten(1)
        logits = model(scaled * 2 - 1).logits
    assert_close(found.features, expected, rtol=1e-4, atol=1e-5)  # batches of 4 and 2 against one of 6
    assert found.logits is not None
    assert_close(found.logits, logits, rtol=1e-4, atol=1e-5)
    assert extractor.description["input"].startswith("3 channels, 16x16 bilinear")
    assert extractor.description["weights"] == weights_hash(model)


def test_a_plain_model_of_one_channel_takes_its_preprocessing_from_its_folder(tmp_path: Path) -> None:
    model = transformers.ResNetModel(small_resnet(num_channels=1)).eval()
    options = {"size": {"height": 8, "width": 8}, "resample": 3, "image_mean": [0.2], "image_std": [0.3]}
    extractor = make_extractor(save(model, tmp_path, **options))
    x = images(channels=1)
    with torch.no_grad():
        expected = model((x - 0.2) / 0.3).pooler_output.flatten(1)
    found = extract(extractor, [x], "float")
    assert_close(found.features, expected, rtol=1e-4, atol=1e-5)
    assert found.logits is None
    with pytest.raises(ValueError, match="takes 1 channels, got images with 3"):
        extractor(images())


def test_dinov2_gives_its_class_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = transformers.Dinov2Config(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=4
    )
    model = transformers.Dinov2Model(config).eval()
    options = {
        "do_center_crop": True,
        "crop_size": {"height": 16, "width": 16},
        "size": {"shortest_edge": 20},
        "resample": 3,
        "image_mean": [0.4, 0.5, 0.6],
        "image_std": [0.2, 0.3, 0.4],
    }
    monkeypatch.setitem(extractors.HUB_NAMES, "dinov2", save(model, tmp_path, **options))
    extractor = make_extractor("dinov2")
    x = images(size=16)
    mean, std = (torch.tensor(options[key]).reshape(3, 1, 1) for key in ("image_mean", "image_std"))
    with torch.no_grad():
        expected = model((x - mean) / std).last_hidden_state[:, 0]
    assert_close(extract(extractor, [x], "float").features, expected, rtol=1e-4, atol=1e-5)
    assert extractor.description["name"] == "dinov2"


def test_clip_gives_embeddings_of_unit_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 16, "patch_size": 8, "projection_dim": 6}
    model = transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**vision)).eval()
    whole = transformers.CLIPConfig(vision_config=vision, projection_dim=6)
    model.save_pretrained(tmp_path)
    whole.save_pretrained(tmp_path)  # a CLIP repository carries the config of both towers
    monkeypatch.setitem(extractors.HUB_NAMES, "clip", str(tmp_path))
    x = images(size=16)
    found = extract(make_extractor("clip"), [x], "float").features
    with torch.no_grad():
        embeddings = model(x * 2 - 1).image_embeds  # without a preprocessor_config: own size, values in [-1, 1]
    assert_close(found, embeddings / embeddings.norm(dim=1, keepdim=True), rtol=1e-4, atol=1e-5)
    assert_close(found.norm(dim=1), torch.ones(6))


def test_without_a_pooled_output_the_class_token_stands_in() -> None:
    tokens = torch.randn(2, 5, 3)
    output = SimpleNamespace(last_hidden_state=tokens, pooler_output=None)
    assert torch.equal(extractors.pooled(output, output, "x"), tokens[:, 0])


def test_a_name_that_is_no_model_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match='is neither "pixels", "inception", "dinov2", "clip" nor a transformers'):
        make_extractor(str(tmp_path / "nothing"))


@pytest.mark.parametrize(("name", "meant"), [("pixel", "pixels"), ("Inception", "inception"), ("dino2", "dinov2")])
def test_a_name_near_a_known_word_is_refused_before_the_hub_is_asked(
    name: str, meant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", lambda *_: pytest.fail("the Hub was asked"))
    with pytest.raises(ValueError, match=rf'got "{name}"\. Did you mean {meant}\?'):
        make_extractor(name)


def test_large_images_are_scaled_down_with_antialiasing_and_small_ones_as_plain_bilinear() -> None:
    prepare = Preprocessing(1, (4, 4), "bilinear", (0.0,), (1.0,))
    dots = torch.zeros((1, 1, 1, 32))
    dots[..., ::8] = 1  # where no plain bilinear sample looks
    assert prepare.apply(dots.expand(1, 1, 32, 32)).mean().item() == pytest.approx(1 / 8, abs=0.02)
    x = images(channels=1, size=2)
    plain = torch.nn.functional.interpolate(x, (4, 4), mode="bilinear", align_corners=False)
    assert_close(prepare.apply(x), plain)


# Input ----------------------------------------------------------------------------------------------------------------


def test_the_weights_hash_sees_every_value_and_name() -> None:
    first, second = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    second.load_state_dict(first.state_dict())
    assert weights_hash(first) == weights_hash(second)
    with torch.no_grad():
        second.bias[1] += 1e-7
    assert weights_hash(first) != weights_hash(second)
    assert weights_hash(first) != weights_hash(torch.nn.Sequential(first))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: make_extractor("pixels")(images() * 255), r"lie in \[0, 1\], got values from"),
        (lambda: make_extractor("pixels")(images() * float("nan")), "got values from nan"),
        (lambda: make_extractor("pixels")(images()[0]), r"shape \(B, C, H, W\), got \(3, 8, 8\)"),
        (lambda: make_extractor("pixels", size=8), "size is the input side of a transformers model"),
        (lambda: make_extractor("pixels", weights="x.pth"), 'weights are those of "inception"'),
        (lambda: extract(make_extractor("pixels"), []), "There are no images"),
        (lambda: extract(make_extractor("pixels"), [images(), images(size=4)]), "one size: .* have 48, of others 192"),
        (lambda: quantize(images(), "png"), "quantization must be one of 'uint8', 'float', got 'png'"),  # type: ignore[arg-type]
        (lambda: inception(StandIn())(images(channels=2)), "takes 3 channels, got images with 2"),
        (lambda: extractors.pooled(Features(images(), None), images(), "x"), "has no pooled output"),
    ],
)
def test_bad_input_is_a_sentence(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
