# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Random views of images with any number of bands, for a whole batch on its device."""

import inspect
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from kornia.filters import gaussian_blur2d
from torch import Tensor, nn


def random_crop_grid(
    image: Tensor,
    size: tuple[int, int],
    scale: Sequence[float],
    ratio: Sequence[float],
    horizontal_flip: float = 0.0,
    vertical_flip: float = 0.0,
) -> Tensor:
    """Draw a random resized crop with flips per sample, as a sampling grid.

    The area is uniform in *scale*, the aspect ratio log-uniform in *ratio*, as in
    torchvision's ``RandomResizedCrop``. A side longer than the image is cut to it,
    where torchvision would draw again.

    Args:
        image: Images of shape (B, C, H, W).
        size: Height and width of the crops in pixels.
        scale: Smallest and largest share of the image's area.
        ratio: Smallest and largest width / height.
        horizontal_flip: Probability to mirror left and right.
        vertical_flip: Probability to mirror top and bottom.

    Returns:
        A grid for ``grid_sample(..., align_corners=False)``, shape (B, h, w, 2).
    """
    batch, device = len(image), image.device
    height, width = image.shape[-2:]
    area = torch.empty(batch, device=device).uniform_(*scale) * (height * width)
    log_ratio = torch.empty(batch, device=device).uniform_(*map(math.log, ratio))
    aspect = log_ratio.exp()

    # Extent and centre in grid_sample's coordinates, where the image is [-1, 1]
    extent_x = ((area * aspect).sqrt() / width).clamp(max=1)
    extent_y = ((area / aspect).sqrt() / height).clamp(max=1)
    centre = torch.rand(2, batch, device=device) * 2 - 1
    sign = torch.rand(2, batch, device=device)
    theta = image.new_zeros(batch, 2, 3, dtype=torch.float32)
    theta[:, 0, 0] = extent_x * torch.where(sign[0] < horizontal_flip, -1, 1)
    theta[:, 1, 1] = extent_y * torch.where(sign[1] < vertical_flip, -1, 1)
    theta[:, 0, 2] = centre[0] * (1 - extent_x)
    theta[:, 1, 2] = centre[1] * (1 - extent_y)
    return F.affine_grid(theta, [batch, 1, *size], align_corners=False)


def jitter(image: Tensor, brightness: Tensor, contrast: Tensor) -> Tensor:
    """Change brightness, then contrast, without clipping.

    Brightness multiplies the image, contrast stretches every band about its own mean,
    as in the SSL4EO-S12 recipe. (kornia's operations of these names add and multiply.)
    https://github.com/zhu-xlab/SSL4EO-S12/blob/1dc0c83/src/benchmark/pretrain_ssl/models/rs_transforms_float32.py

    Args:
        image: Images of shape (B, C, H, W). Brightness is meant for values that are 0
            where it is dark, such as reflectance, and less for dB or z-scores.
        brightness: Factors of shape (B,). 1 changes nothing.
        contrast: Factors of shape (B,). 1 changes nothing.

    Returns:
        The changed images, shape (B, C, H, W).
    """
    brightness, contrast = (f.view(-1, 1, 1, 1) for f in (brightness, contrast))
    image = image * brightness
    mean = image.mean((-2, -1), keepdim=True)
    return mean + (image - mean) * contrast


class RandomView(nn.Module):
    """A random view of each image of a batch: crop, flips, jitter, grey, blur.

    Runs on the device of the batch, draws its parameters per sample from PyTorch's
    global generator, takes any number of bands, and neither assumes nor enforces a range
    of values unless *value_range* declares one.

    kornia has operations of these names, but with other meanings (brightness adds,
    contrast multiplies) and clipping; here, crop and flips are one resampling.

    The default strengths are those of the same authors' MoCo runs on SSL4EO-S12; those
    of SoftCon itself are not published. Crops are sampled bilinearly without
    antialiasing, which matters only where the crop is much larger than *size*.

    .. versionadded:: 0.1
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
        for name, value in {
            'horizontal_flip': horizontal_flip,
            'vertical_flip': vertical_flip,
            'jitter_probability': jitter_probability,
            'grey_probability': grey_probability,
            'blur_probability': blur_probability,
        }.items():
            if not 0 <= value <= 1:
                raise ValueError(f'{name} must be in [0, 1], got {value}')
        for name, value in {'brightness': brightness, 'contrast': contrast}.items():
            if not 0 <= value <= 1:
                raise ValueError(f'{name} must be in [0, 1], got {value}')
        for name, limits, top in (
            ('scale', scale, 1.0),
            ('ratio', ratio, math.inf),
            ('blur_sigma', blur_sigma, math.inf),
        ):
            if not 0 < limits[0] <= limits[1] <= top:
                raise ValueError(
                    f'{name} must be a range (low, high) in (0, {top:g}], got {limits}'
                )
        if value_range is not None and not value_range[0] < value_range[1]:
            raise ValueError(f'value_range must be (low, high), got {value_range}')

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

    def extra_repr(self) -> str:
        """Parameters for the module's representation."""
        names = list(inspect.signature(type(self)).parameters)
        return ', '.join(f'{name}={getattr(self, name)}' for name in names)

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
            grid = random_crop_grid(
                image,
                self.size,
                self.scale,
                self.ratio,
                self.horizontal_flip,
                self.vertical_flip,
            )
            # 'border': crops end at the outer edge of the outer pixels, half a pixel
            # beyond their centres
            view = F.grid_sample(
                image, grid, padding_mode='border', align_corners=False
            )
            view = self._change_colours(view)
            view = self._blur(view)
            if self.value_range is not None:
                view = view.clamp_(*self.value_range)
        return view

    def _draw(self, view: Tensor, probability: float) -> Tensor:
        """True for the samples that an operation applies to, shape (B,)."""
        return torch.rand(len(view), device=view.device) < probability

    def _change_colours(self, view: Tensor) -> Tensor:
        """Jitter and grey."""
        factors = torch.rand(2, len(view), device=view.device) * 2 - 1
        factors = factors * self._draw(view, self.jitter_probability)
        view = jitter(
            view, 1 + self.brightness * factors[0], 1 + self.contrast * factors[1]
        )
        grey = self._draw(view, self.grey_probability).view(-1, 1, 1, 1)
        return torch.where(grey, view.mean(1, keepdim=True), view)

    def _blur(self, view: Tensor) -> Tensor:
        """Gaussian blur with a standard deviation per sample."""
        if self.blur_probability == 0:
            return view

        drawn = self._draw(view, self.blur_probability)
        sigma = torch.empty(len(view), device=view.device).uniform_(*self.blur_sigma)
        sigma = sigma[:, None].expand(-1, 2)
        # Taps beyond three standard deviations weigh less than 0.3 %
        taps = 2 * math.ceil(3 * self.blur_sigma[1]) + 1
        taps = min(taps, 2 * ((min(view.shape[-2:]) - 1) // 2) + 1)
        if view.device.type == 'cpu':
            # Only what was drawn. On a GPU the selection would wait for the device.
            view[drawn] = gaussian_blur2d(view[drawn], taps, sigma[drawn])
            return view
        return torch.where(
            drawn.view(-1, 1, 1, 1), gaussian_blur2d(view, taps, sigma), view
        )
