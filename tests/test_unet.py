"""The papers' networks: counts and configurations as published, first weights as in the papers."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DModel
from torch import nn

from ddpm_ext.models.unet import (
    UNET_PRESETS,
    build_unet,
    check_resolution,
    count_parameters,
    init_ddpm_,
    last_layers,
    unet_config,
)

# google/ddpm-cifar10-32 on the Hub, every field of its config.json.
PUBLISHED_CIFAR10 = {
    "act_fn": "silu",
    "attention_head_dim": None,
    "block_out_channels": (128, 256, 256, 256),
    "center_input_sample": False,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "in_channels": 3,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-06,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 32,
    "time_embedding_type": "positional",
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
}


@pytest.fixture(scope="module")
def cifar10() -> UNet2DModel:
    return build_unet("cifar10", seed=0).eval()


@pytest.mark.parametrize("name", sorted(UNET_PRESETS))
def test_presets_have_the_published_number_of_weights(name: str) -> None:
    with torch.device("meta"):  # counting needs no memory
        unet = UNet2DModel(**unet_config(name))
    assert count_parameters(unet) == UNET_PRESETS[name].num_parameters


def test_counts_printed_by_the_papers() -> None:
    assert UNET_PRESETS["cifar10"].num_parameters == 35_746_307
    assert UNET_PRESETS["lsun256"].num_parameters == UNET_PRESETS["celebahq256"].num_parameters == 113_673_219
    with torch.device("meta"):
        assert count_parameters(UNet2DModel(**unet_config("cifar10", out_channels=6))) == 35_749_766


def test_cifar10_is_the_published_configuration_with_dropout(cifar10: UNet2DModel) -> None:
    assert {key: cifar10.config[key] for key in PUBLISHED_CIFAR10} == PUBLISHED_CIFAR10
    assert cifar10.config["dropout"] == 0.1
    assert cifar10.down_blocks[0].resnets[0].dropout.p == 0.1  # pyright: ignore


def test_scale_shift_network_keeps_the_norm_of_its_middle_attention() -> None:
    with torch.device("meta"):
        unet = UNet2DModel(**unet_config("iddpm-cifar10"))
    assert isinstance(unet.mid_block.attentions[0].group_norm, nn.GroupNorm)


def test_ddpm_initialisation_is_xavier_with_vanishing_ends(cifar10: UNet2DModel) -> None:
    ends = last_layers(cifar10)
    names = {id(module): name for name, module in cifar10.named_modules()}
    assert len(ends) == 29
    assert sum(names[id(layer)].endswith("conv2") for layer in ends) == 22
    assert sum(names[id(layer)].endswith("to_out.0") for layer in ends) == 6
    assert [names[id(layer)] for layer in ends][-1] == "conv_out"
    for layer in (module for module in cifar10.modules() if isinstance(module, (nn.Conv2d, nn.Linear))):
        receptive = layer.weight[0, 0].numel()
        fans = (layer.weight.shape[0] + layer.weight.shape[1]) * receptive
        bound = math.sqrt(6 / fans) * (1e-5 if any(layer is end for end in ends) else 1)
        largest, std = layer.weight.abs().max().item(), layer.weight.std().item()
        # The largest of n uniform draws misses the bound by a factor 1 - 5/n about once in e^5 layers.
        assert bound * (1 - 5 / layer.weight.numel()) * 0.99 < largest <= bound * (1 + 1e-6)
        assert std == pytest.approx(bound / math.sqrt(3), rel=5 / math.sqrt(layer.weight.numel()))
        assert layer.bias is None or not layer.bias.any()


def test_ddpm_initialisation_starts_at_a_loss_of_one(cifar10: UNet2DModel) -> None:
    x_t, eps = torch.randn(4, 3, 32, 32), torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        eps_hat = cifar10(x_t, torch.tensor([0, 300, 700, 999])).sample
    assert 2e-6 < eps_hat.std() < 2e-5  # about 8e-6 with other draws
    loss = (eps - eps_hat).square().mean()
    torch.testing.assert_close(loss, eps.square().mean(), rtol=1e-4, atol=0.0)
    assert loss == pytest.approx(1, abs=0.05)  # 12,288 squares of unit normals: deviation 0.013


def test_iddpm_initialisation_predicts_exactly_zero() -> None:
    unet = build_unet("digits", init="iddpm").eval()
    with torch.no_grad():
        assert not unet(torch.randn(2, 1, 8, 8), 5).sample.any()


def test_torch_initialisation_is_left_alone() -> None:
    unet = build_unet("digits", init="torch").eval()
    with torch.no_grad():
        assert unet(torch.randn(2, 1, 8, 8), 5).sample.std() > 0.05


@pytest.mark.parametrize("init", ["ddpm", "iddpm", "torch"])
def test_the_seed_alone_decides_the_weights_and_the_global_generator_is_left(init: str) -> None:
    def weights(seed: int) -> torch.Tensor:
        unet = build_unet("digits", seed=seed, init=init, num_class_embeds=3)  # pyright: ignore
        return torch.cat([weight.flatten() for weight in unet.parameters()])

    torch.manual_seed(7)
    before = torch.get_rng_state()
    first = weights(1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(5)
    assert torch.equal(weights(1), first)
    assert not torch.equal(weights(2), first)


def test_first_weights_without_a_generator_come_from_the_global_one() -> None:
    unet = build_unet("digits")
    before = torch.get_rng_state()
    init_ddpm_(unet)
    assert not torch.equal(torch.get_rng_state(), before)


def test_what_is_built_saves_and_loads_as_a_stock_network(tmp_path: Path) -> None:
    unet = build_unet("digits", sample_size=(8, 16), in_channels=2, out_channels=4, num_class_embeds=5, dropout=0.25)
    unet.eval().save_pretrained(tmp_path)
    again = UNet2DModel.from_pretrained(tmp_path)
    assert tuple(again.config["sample_size"]) == (8, 16)
    assert again.config["dropout"] == 0.25
    x_t, t, classes = torch.randn(3, 2, 8, 16), torch.tensor([1, 2, 3]), torch.tensor([0, 4, 2])
    with torch.no_grad():
        expected = unet(x_t, t, class_labels=classes).sample
        assert expected.shape == (3, 4, 8, 16)
        assert torch.equal(again(x_t, t, class_labels=classes).sample, expected)
    loaded = build_unet(UNet2DModel.load_config(tmp_path), seed=3)  # a saved configuration is taken as it is
    assert count_parameters(loaded) == count_parameters(unet)


def test_dropout_reaches_every_residual_block() -> None:
    unet = build_unet("digits", dropout=0.5)
    blocks = [name for name, module in unet.named_modules() if isinstance(module, nn.Dropout) and module.p == 0.5]
    assert len(blocks) == sum(name.endswith("conv2") for name, _ in unet.named_modules())
    assert unet.config["dropout"] == 0.5
    x_t = torch.randn(1, 1, 8, 8)
    init_ddpm_(unet)
    nn.init.ones_(unet.conv_out.weight)  # let the branches' randomness through
    for layer in last_layers(unet):
        layer.weight.data.normal_(std=0.1)
    with torch.no_grad():
        assert not torch.equal(unet.train()(x_t, 3).sample, unet(x_t, 3).sample)
        assert torch.equal(unet.eval()(x_t, 3).sample, unet(x_t, 3).sample)


@pytest.mark.parametrize("size", [(32, 30), (33, 32), (4, 32), (0, 32)])
def test_a_size_that_cannot_be_halved_is_refused(size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"multiples of 8.*nearest size that fits is \((8|32), 32\)"):
        check_resolution(unet_config("cifar10"), size)
    with pytest.raises(ValueError, match="multiples of 8"):
        build_unet("cifar10", sample_size=size)


def test_a_size_is_that_of_the_configuration_and_changes_no_weight() -> None:
    unet, square = (build_unet("digits", init="torch", sample_size=size).eval() for size in ((6, 10), None))
    assert tuple(unet.config["sample_size"]) == (6, 10)
    x_t = torch.randn(1, 1, 6, 10)
    with torch.no_grad():
        assert torch.equal(unet(x_t, 0).sample, square(x_t, 0).sample)


def test_unknown_words_are_refused() -> None:
    with pytest.raises(ValueError, match="unet must be one of"):
        build_unet("cifar")
    with pytest.raises(ValueError, match="init must be one of"):
        build_unet("digits", init="xavier")  # pyright: ignore
    with pytest.raises(ValueError, match="no argument"):
        build_unet({"sample_size": 8, "blok_out_channels": (32, 32)})
