"""What the tests share: devices, backends, a tiny network and a small batch."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from eroseg_ext.ops import backend as backends

# Tests send Ctrl-C to themselves and to what they start; a shell has it ignored in what runs in the background.
signal.signal(signal.SIGINT, signal.default_int_handler)

CLASSES = 4
SIZE = (20, 24)
VOID = 255

# pytest-xdist has a process for each core already: threads of their own would wait for each other.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)

# On a GPU, too, two runs agree to the last bit, and a network's gradients to the rounding of float32.
torch.backends.cudnn.deterministic = True
torch.backends.cudnn.allow_tf32 = False
torch.backends.cuda.matmul.allow_tf32 = False


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> object:
    """Unless ``--dist`` is given, a file's tests go to one process, in which what they share is made once."""
    if config.getvalue("dist") != "load":
        return None
    from xdist.scheduler import LoadFileScheduling

    config.option.loadscopereorder = False  # files of few tests, which would come last, may take the longest
    return LoadFileScheduling(config, log)


DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    """Every device there is: a CUDA test is the CPU test run on another device."""
    return torch.device(request.param)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For whole attacks: images this small gain nothing from threads, and lose much where other processes compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=["fused", "reference"])
def backend(request: pytest.FixtureRequest, device: torch.device) -> str:
    """Both implementations of the operations, as ``attack(backend=...)`` names them."""
    if request.param == "fused" and (why_not := backends.why_not_fused(device)):
        pytest.skip(why_not)
    return request.param


@pytest.fixture
def fused(device: torch.device) -> str:
    """The fused backend alone, for what the reference is not meant to hold."""
    if why_not := backends.why_not_fused(device):
        pytest.skip(why_not)
    return "fused"


@pytest.fixture
def make_net(device: torch.device) -> Callable[..., nn.Sequential]:
    """Two convolutions with BatchNorm and Dropout between them; the same weights for the same arguments."""

    def make(classes: int = CLASSES, channels: int = 3, stride: int = 1) -> nn.Sequential:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            net = nn.Sequential(
                nn.Conv2d(channels, 8, 3, stride, padding=1),
                nn.BatchNorm2d(8),
                nn.ReLU(),
                nn.Dropout(0.2),
                nn.Conv2d(8, classes, 3, padding=1),
            )
            # Logits of a few units, as a trained network's, so that confidences differ between pixels.
            nn.init.normal_(net[-1].weight, std=1.0)
        return net.to(device)

    return make


@pytest.fixture
def net(make_net: Callable[..., nn.Sequential]) -> nn.Sequential:
    """The tiny network, in train mode as a constructor leaves it."""
    return make_net()


@pytest.fixture
def batch(device: torch.device) -> tuple[Tensor, Tensor]:
    """Three images in [0, 1] and labels of 4 classes with void pixels: a band, and scattered ones."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(3, 3, *SIZE, generator=generator)
    labels = torch.randint(CLASSES, (3, *SIZE), generator=generator)
    labels[:, :3] = VOID
    labels[torch.rand(labels.shape, generator=generator) < 0.1] = VOID
    return images.to(device), labels.to(device)


class Pixelwise(nn.Module):
    """Four classes that read one channel each: no sum is long enough for its order to matter.

    An image's result then depends neither on its neighbours in the batch nor on the memory layout, to the last bit,
    which convolutions do not promise.
    """

    gain: Tensor
    bias: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("gain", torch.tensor([4.0, 3.0, 5.0, -2.0]).view(1, 4, 1, 1))
        self.register_buffer("bias", torch.tensor([0.0, 0.25, -0.5, 2.5]).view(1, 4, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        return torch.cat([images, images[:, :1]], 1) * self.gain + self.bias


@pytest.fixture
def pixelwise(device: torch.device) -> nn.Module:
    return Pixelwise().to(device)
