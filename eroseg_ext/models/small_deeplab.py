"""A small DeepLab-like segmentation network, for the demo, the benchmarks and the tests.

It is meant to be trained on a CPU in seconds to minutes, not to be good at segmentation: a residual encoder down to
an eighth of the input, parallel dilated convolutions and a global pool for context, and a decoder that joins the
context with the encoder's features at a quarter of the input (the output stride), as DeepLabv3+ does. The logits are
upsampled bilinearly to the input's size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FULL_WIDTH = 32
"""Width of the network that the benchmarks train: about 1.06 M parameters."""
DEMO_WIDTH = 12
"""Width of the network that the demo trains within a minute: about 0.15 M parameters."""

_CONTEXT_RATES = (1, 3, 6)


def _conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, dilation: int = 1) -> nn.Sequential:
    """Convolution that keeps the size (but for its stride), batch normalisation, ReLU."""
    padding = dilation * (kernel // 2)
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, padding, dilation, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


class _Residual(nn.Module):
    """Two 3x3 convolutions around an identity path."""

    def __init__(self, channels: int, dilation: int = 1) -> None:
        super().__init__()
        self.first = _conv(channels, channels, dilation=dilation)
        self.second = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=dilation, dilation=dilation, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.second(self.first(x)))


class _Context(nn.Module):
    """The same features seen at several dilation rates and as one global mean, joined by a 1x1 convolution."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        branch = outputs * 3 // 8
        self.point = _conv(inputs, branch, kernel=1)
        self.dilated = nn.ModuleList(_conv(inputs, branch, dilation=rate) for rate in _CONTEXT_RATES)
        # No batch normalisation on the pooled branch: it has one value per image and channel, and a batch may
        # hold a single image.
        self.pooled = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(inputs, branch, 1), nn.ReLU(inplace=True))
        self.join = _conv(branch * (2 + len(_CONTEXT_RATES)), outputs, kernel=1)

    def forward(self, x: Tensor) -> Tensor:
        parts = [self.point(x), *(branch(x) for branch in self.dilated)]
        parts.append(self.pooled(x).expand_as(parts[0]))
        joined: Tensor = self.join(torch.cat(parts, dim=1))
        return joined


class SmallDeepLab(nn.Module):
    """Semantic segmentation network of encoder, dilated context and decoder, output stride 4.

    Args:
        classes: number of classes C, at least 1.
        width: channels of the first layer; the others follow (2x at a quarter, 4x at an eighth of the input). The
            number of parameters grows with its square: 32 (``FULL_WIDTH``, the default) gives about 1.06 M,
            12 (``DEMO_WIDTH``) about 0.15 M. At least 4 and divisible by 4.

    Input: images [B, 3, H, W] with values in [0, 1]; they need no normalisation. Output: logits [B, C, H, W] of the
    dtype that the weights (or autocast) give. In training mode a batch must hold more than one value per channel,
    which any batch of images larger than 8x8 does.

    Raises:
        ValueError: classes or width out of range.
    """

    def __init__(self, classes: int, width: int = FULL_WIDTH) -> None:
        super().__init__()
        if classes < 1:
            raise ValueError(f"classes must be at least 1, got {classes}")
        if width < 4 or width % 4:
            raise ValueError(f"width must be a positive multiple of 4, got {width}")
        self.classes = classes
        self.width = width
        half, quarter, eighth = width, 2 * width, 4 * width
        self.stem = _conv(3, half, stride=2)
        self.fine = nn.Sequential(_conv(half, quarter, stride=2), _Residual(quarter))
        self.coarse = nn.Sequential(_conv(quarter, eighth, stride=2), _Residual(eighth), _Residual(eighth, dilation=2))
        self.context = _Context(eighth, eighth)
        self.skip = _conv(quarter, half, kernel=1)
        self.decoder = _conv(eighth + half, quarter)
        self.classifier = nn.Conv2d(quarter, classes, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, C, H, W] of images [B, 3, H, W]."""
        # Centred here, so that the caller's images, and with them the attack's budget, stay in [0, 1].
        fine = self.fine(self.stem(images - 0.5))
        context = self.context(self.coarse(fine))
        context = F.interpolate(context, size=fine.shape[-2:], mode="bilinear", align_corners=False)
        logits = self.classifier(self.decoder(torch.cat([context, self.skip(fine)], dim=1)))
        return F.interpolate(logits, size=images.shape[-2:], mode="bilinear", align_corners=False)
