# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Views of images with any number of bands, for a whole batch on its device."""

import inspect
import math

import torch
import torchvision.transforms.v2.functional as F
from torch import Tensor, nn
from torchvision.transforms.v2 import InterpolationMode

from .._checks import check_fractions, check_types, require
from .colours import colour_map
from .interpolation import bilinear_matrices
from .resample import means, resample
from .sampling import choose, random_blurs, random_crop_axes, uniform


class ViewModule(nn.Module):
    """Random views of batches, with an attribute for each option."""

    value_range: tuple[float, float] | None

    def extra_repr(self) -> str:
        """Return the options for the module's representation."""
        names = inspect.signature(type(self)).parameters
        return ', '.join(f'{name}={getattr(self, name)}' for name in names)

    def _check(self, kind: type['ViewModule']) -> None:
        """Check options of a class by types: numbers are fractions, pairs are ranges."""
        for name, option in inspect.signature(kind).parameters.items():
            value = getattr(self, name)
            if option.annotation is float:
                check_fractions(**{name: value})
            elif option.annotation == tuple[float, float]:
                top = 1 if name.endswith('scale') else math.inf
                require(
                    0 < value[0] <= value[1] <= top,
                    f'{name} must be a range (low, high) in (0, {top:g}], got {value}',
                )
        limits = self.value_range
        require(
            limits is None or limits[0] < limits[1],
            f'value_range must be (low, high) with low < high, got {limits}',
        )


class RandomView(ViewModule):
    """A random view of each image of a batch: crop, flips, jitter, grey, blur.

    Runs on the device of the batch, draws its parameters per sample from PyTorch's
    global generator, takes any number of bands, and neither assumes nor enforces a range
    of values unless *value_range* declares one.

    All operations are one product with small matrices. On a GPU,
    ``torch.set_float32_matmul_precision('high')`` makes it faster, and moves values by a
    few thousandths of their magnitude. Pixels must be finite: one that is not may spoil
    the whole view. On a CPU, crop images that are several times larger than the view.

    The default strengths are those of the same authors' MoCo runs on SSL4EO-S12; those
    of SoftCon itself are not published. Crops are sampled bilinearly without
    antialiasing, which matters only where the crop is much larger than *size*.

    Attributes:
        boxes: Left, top, right and bottom of the views of the last call in pixels of the
            image, shape (B, 4). None before the first call.
    """

    def __init__(
        self,
        size: int | tuple[int, int] = 224,
        scale: tuple[float, float] = (0.2, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        horizontal_flip: float = 0.5,
        vertical_flip: float = 0.0,
        brightness: float = 0.4,
        contrast: float = 0.4,
        jitter_probability: float = 0.8,
        grey_probability: float = 0.2,
        blur_probability: float = 0.5,
        blur_sigma: tuple[float, float] = (0.1, 2.0),
        value_range: tuple[float, float] | None = None,
    ) -> None:
        """Initialize a new RandomView instance.

        Args:
            size: Side of the view in pixels, or its height and width.
            scale: Range of the crop's share of the image's area.
            ratio: Range of the crop's aspect ratio.
            horizontal_flip: Probability to mirror left and right.
            vertical_flip: Probability to mirror top and bottom. 0 as in the paper's
                recipe, although satellite images have no upright position.
            brightness: Brightness factors are uniform in 1 ± this.
            contrast: Contrast factors are uniform in 1 ± this.
            jitter_probability: Probability of a change of brightness and contrast.
            grey_probability: Probability to replace all bands by their mean.
            blur_probability: Probability of a Gaussian blur.
            blur_sigma: Range of the blur's standard deviation in pixels of the view.
            value_range: Smallest and largest value that images can have, such as
                (0, 1). Views are clipped to it. None clips nothing.

        Raises:
            ValueError: If an option is out of range.
        """
        check_types(RandomView.__init__, locals())
        super().__init__()
        self.size = (size, size) if isinstance(size, int) else (size[0], size[1])
        self.scale = scale
        self.ratio = ratio
        self.horizontal_flip = horizontal_flip
        self.vertical_flip = vertical_flip
        self.brightness = brightness
        self.contrast = contrast
        self.jitter_probability = jitter_probability
        self.grey_probability = grey_probability
        self.blur_probability = blur_probability
        self.blur_sigma = blur_sigma
        self.value_range = value_range
        self._check(RandomView)
        self._centres: tuple[Tensor, Tensor] | None = None
        self._sides = (0, 0)

    @property
    def boxes(self) -> Tensor | None:
        """Boxes of the views of the last call, shape (B, 4), or None before it."""
        if self._centres is None:
            return None
        edges = []
        for centres, side in zip(self._centres, self._sides, strict=True):
            # From the centres of the outer pixels of a view to their outer edges
            low, high = torch.aminmax(centres, dim=1)
            half = (high - low) / max(centres.shape[1] - 1, 1) / 2
            edges.append((torch.stack([low - half, high + half]) + 1) * side / 2)
        return torch.stack(edges, 1).flatten(0, 1).T

    @torch.no_grad()
    def forward(self, image: Tensor) -> Tensor:
        """Draw one view of each image.

        Args:
            image: Images of shape (B, C, H, W). Not modified.

        Returns:
            Views of shape (B, C, h, w), float32.

        Raises:
            ValueError: If *image* has another number of dimensions.
        """
        if image.ndim != 4:
            raise ValueError(
                f'image must have the shape (B, C, H, W), got {tuple(image.shape)}'
            )

        # Half precision would move pixel values by more than one grey level
        with torch.autocast(image.device.type, enabled=False):
            image = image.float()
            flips = self.horizontal_flip, self.vertical_flip
            y, x = random_crop_axes(image, self.size, self.scale, self.ratio, *flips)
            self._centres, self._sides = (x, y), (image.shape[-1], image.shape[-2])
            # Crops end at the outer edge of the outer pixels, half a pixel beyond their
            # centres: there, values are those of the outer pixels
            rows = bilinear_matrices(y, image.shape[-2])
            columns = bilinear_matrices(x, image.shape[-1])
            colours = self._draw_colours(means(image, rows, columns))
            blur = [self.blur_probability], self.blur_sigma
            (crop,) = random_blurs([(rows, columns)], *blur)
            view = resample(image, *crop, colours)
            if self.value_range is not None:
                view = view.clamp_(*self.value_range)
        return view

    def _draw_colours(self, means: Tensor) -> tuple[Tensor, Tensor]:
        """Draw jitter and grey, for views with these means (B, C)."""
        factors = uniform(means, 2, len(means)) * 2 - 1
        factors = factors * choose(means, self.jitter_probability)
        return colour_map(
            means,
            1 + self.brightness * factors[0],
            1 + self.contrast * factors[1],
            saturation=~choose(means, self.grey_probability),
        )


def center_view(image: Tensor, size: int) -> Tensor:
    """Resize images (..., C, H, W) and cut out their centre, as in evaluations of DINO.

    The shorter side becomes 8 / 7 of *size* (256 for 224), by bicubic interpolation. It
    may go beyond the range of values by a little.
    https://github.com/facebookresearch/dino/blob/main/eval_linear.py
    """
    larger = F.resize(image, [round(size * 8 / 7)], InterpolationMode.BICUBIC)
    return F.center_crop(larger, [size, size])
