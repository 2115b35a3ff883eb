"""A small convolutional network, for examples and tests that run on a laptop."""

from torch import Tensor, nn


class SmallCNN(nn.Module):
    """Three 3x3 convolutions of 32, 64 and 64 channels, each with batch normalisation and ReLU, and a linear head.

    The first two are followed by 2x2 max-pooling, the last by the mean over all pixels, so any image of at least 4x4
    pixels fits. It has ``288 C + 55616 + 65 K`` parameters for C image channels and K classes: 56,554 on digits.

    Args:
        num_classes: Number of logits.
        in_channels: Channels of the images.
    """

    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *conv_bn_relu(in_channels, 32),
            nn.MaxPool2d(2),
            *conv_bn_relu(32, 64),
            nn.MaxPool2d(2),
            *conv_bn_relu(64, 64),
        )
        self.head = nn.Linear(64, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (N, C, H, W) to logits (N, K)."""
        logits: Tensor = self.head(self.features(images).mean(dim=(2, 3)))
        return logits


def conv_bn_relu(in_channels: int, out_channels: int) -> tuple[nn.Module, nn.Module, nn.Module]:
    """Return a 3x3 convolution that keeps the image size, its batch normalisation and a ReLU."""
    conv = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1, bias=False)
    return conv, nn.BatchNorm2d(out_channels), nn.ReLU()
