"""benchmarks/few_steps.py: a recorded forward pass answers as the network does."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from diffusers import UNet2DModel

from benchmarks.few_steps import GraphedForward


class Recording:
    """A CUDA graph without CUDA: what was recorded is computed again from the memory that was read then."""

    graphed: GraphedForward

    def replay(self) -> None:
        (entry,) = [one for one in self.graphed.graphs.values() if one.graph is self]
        x_t, t, labels = entry.inputs
        entry.output.copy_(self.graphed.forward(x_t, t, class_labels=labels, return_dict=False)[0])


class Stream:
    def wait_stream(self, _: Any) -> None:
        pass


@pytest.fixture
def without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recording)
    monkeypatch.setattr(torch.cuda, "graph", lambda _: nullcontext())


@pytest.mark.parametrize("classes", [None, 3])
def test_a_recorded_pass_answers_as_the_network_does(without_cuda: None, classes: int | None) -> None:
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        num_class_embeds=classes,
    ).eval()
    options: dict[str, Any] = {} if classes is None else {"class_labels": torch.tensor([2, 1])}
    asked = [(torch.randn(2, 3, 8, 8), t) for t in (999, torch.tensor(7), torch.tensor([7]))]
    with torch.no_grad():
        wanted = [unet(x, t, **options).sample for x, t in asked]
    graphed = GraphedForward(unet)
    Recording.graphed, unet.forward = graphed, graphed
    found = [unet(x, t, **options).sample for x, t in asked]
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)  # each in memory of its own: the first is kept
    torch.testing.assert_close(unet(*asked[1], **options, return_dict=False)[0], wanted[1], rtol=0, atol=0)
    few = {name: value[:1] for name, value in options.items()}
    assert unet(asked[0][0][:1], 3, **few).sample.shape == (1, 3, 8, 8)
    assert len(graphed.graphs) == 2
