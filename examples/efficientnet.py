"""EfficientNet-Lite0 as a plain `torch.nn.Module`: ordinary, depthwise and 1x1 convolutions with batch normalisation.

It depends on torch alone and is built of stock `nn.Conv2d`, `nn.BatchNorm2d` and `nn.Linear` modules, so that adapters
can be put on every one of them. The attributes carry the names of the published weights, which load strictly.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

IMAGE_SIZE = 224
MEAN, STD = 0.498, 0.502  # of pixels scaled to [0, 1], in each of the three channels

# Each stage: expansion, channels, number of blocks, kernel size, stride of the first block.
STAGES = (
    (1, 16, 1, 3, 1),
    (6, 24, 2, 3, 2),
    (6, 40, 2, 5, 2),
    (6, 80, 3, 3, 2),
    (6, 112, 3, 5, 1),
    (6, 192, 4, 5, 2),
    (6, 320, 1, 3, 1),
)


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01)


def _strided(conv: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    """Apply a convolution without padding of its own so that it gives `ceil(size / stride)` outputs.

    The weights come from a framework that puts the odd row and column of padding at the bottom right.
    """
    padding: list[int] = []
    for axis in (1, 0):  # F.pad starts at the last dimension
        size, kernel, stride = x.shape[2 + axis], conv.kernel_size[axis], conv.stride[axis]
        total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
        padding += [total // 2, total - total // 2]
    return conv(F.pad(x, padding))


class Block(nn.Module):
    """Inverted residual block: widen by a 1x1 convolution, filter each channel by itself, narrow by a 1x1 convolution.

    Args:
        inputs: Channels of the input.
        outputs: Channels of the output.
        expansion: How many times wider the block is inside; with 1 there is no widening convolution.
        kernel: Size of the depthwise kernel.
        stride: Stride of the depthwise convolution.
    """

    def __init__(self, inputs: int, outputs: int, expansion: int, kernel: int, stride: int) -> None:
        super().__init__()
        inside = inputs * expansion
        self.widens = expansion != 1
        self.has_shortcut = stride == 1 and inputs == outputs
        if self.widens:
            self._expand_conv = nn.Conv2d(inputs, inside, 1, bias=False)
            self._bn0 = _norm(inside)
        self._depthwise_conv = nn.Conv2d(inside, inside, kernel, stride, groups=inside, bias=False)
        self._bn1 = _norm(inside)
        self._project_conv = nn.Conv2d(inside, outputs, 1, bias=False)
        self._bn2 = _norm(outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the block's feature map."""
        y = F.relu6(self._bn0(self._expand_conv(x))) if self.widens else x
        y = F.relu6(self._bn1(_strided(self._depthwise_conv, y)))
        y = self._bn2(self._project_conv(y))
        return x + y if self.has_shortcut else y


class EfficientNetLite0(nn.Module):
    """The smallest EfficientNet-Lite: 4.65 million parameters, 49 convolutions and a linear classifier.

    Args:
        num_classes: Outputs of the classifier `_fc`.
    """

    def __init__(self, num_classes: int = 1000) -> None:
        super().__init__()
        self._conv_stem = nn.Conv2d(3, 32, 3, stride=2, bias=False)
        self._bn0 = _norm(32)
        blocks, width = [], 32
        for expansion, channels, repeats, kernel, stride in STAGES:
            for i in range(repeats):
                blocks.append(Block(width, channels, expansion, kernel, stride if i == 0 else 1))
                width = channels
        self._blocks = nn.Sequential(*blocks)
        self._conv_head = nn.Conv2d(width, 1280, 1, bias=False)
        self._bn1 = _norm(1280)
        self._dropout = nn.Dropout(0.2)
        self._fc = nn.Linear(1280, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits of a batch of images `(batch, 3, height, width)`, normalised by `MEAN` and `STD`."""
        x = F.relu6(self._bn0(_strided(self._conv_stem, x)))
        x = F.relu6(self._bn1(self._conv_head(self._blocks(x))))
        return self._fc(self._dropout(x.mean((2, 3))))
