# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Random views of images with any number of bands, for a whole batch on its device."""

import inspect
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from kornia.filters import filter2d_separable, get_gaussian_kernel1d
from torch import Tensor, nn


def check_fractions(**values: float) -> None:
    """Check that options are in [0, 1].

    Args:
        **values: Values by the name of the option.

    Raises:
        ValueError: If one is not.
    """
    for name, value in values.items():
        if not 0 <= value <= 1:
            raise ValueError(f'{name} must be in [0, 1], got {value}')


def check_range(name: str, limits: Sequence[float], top: float = math.inf) -> None:
    """Check that an option is an ordered range of positive numbers.

    Args:
        name: Name of the option.
        limits: Smallest and largest value.
        top: Largest value allowed.

    Raises:
        ValueError: If it is not.
    """
    if len(limits) != 2 or not 0 < limits[0] <= limits[1] <= top:
        raise ValueError(
            f'{name} must be a range (low, high) in (0, {top:g}], got {limits}'
        )


def draw(image: Tensor, probability: float) -> Tensor:
    """Choose samples.

    Args:
        image: Images of shape (B, ...).
        probability: Probability to choose a sample.

    Returns:
        True for the chosen samples, shape (B,).
    """
    return torch.rand(len(image), device=image.device) < probability


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


def jitter(
    image: Tensor,
    brightness: Tensor,
    contrast: Tensor,
    saturation: Tensor | None = None,
) -> Tensor:
    """Change brightness, then contrast, then saturation, without clipping.

    Brightness multiplies the image, contrast stretches every band about its own mean,
    as in the SSL4EO-S12 recipe. (kornia's operations of these names add and multiply.)
    Saturation stretches every pixel about the mean of its bands.
    https://github.com/zhu-xlab/SSL4EO-S12/blob/1dc0c83/src/benchmark/pretrain_ssl/models/rs_transforms_float32.py

    Args:
        image: Images of shape (B, C, H, W). Brightness is meant for values that are 0
            where it is dark, such as reflectance, and less for dB or z-scores.
        brightness: Factors of shape (B,), or of shape (B, C) for each band its own.
            1 changes nothing.
        contrast: Factors of shape (B,). 1 changes nothing.
        saturation: Factors of shape (B,). 1 changes nothing, 0 gives grey.

    Returns:
        The changed images, shape (B, C, H, W).
    """
    image = image * brightness.to(image).view(len(image), -1, 1, 1)
    mean = image.mean((-2, -1), keepdim=True)
    image.lerp_(mean, 1 - contrast.to(image).view(-1, 1, 1, 1))
    if saturation is not None:
        grey = image.mean(1, keepdim=True)
        image.lerp_(grey, 1 - saturation.to(image).view(-1, 1, 1, 1))
    return image


def random_blur(
    image: Tensor, probability: float, sigma: tuple[float, float]
) -> Tensor:
    """Gaussian blur of some samples, with a standard deviation each.

    Args:
        image: Images of shape (B, C, H, W), floating point. May be modified.
        probability: Probability that a sample is blurred.
        sigma: Range of the standard deviation in pixels.

    Returns:
        The images, shape (B, C, H, W).
    """
    if probability == 0:
        return image

    drawn = draw(image, probability)
    sigmas = torch.empty(len(image), device=image.device).uniform_(*sigma)
    if image.device.type == 'cpu':
        # Only what was drawn. On a GPU the selection would wait for the device.
        for i in drawn.nonzero().flatten().tolist():
            taps = _taps(image, float(sigmas[i]))
            kernel = get_gaussian_kernel1d(taps, sigmas[i].view(1, 1))
            image[i] = _blur(image[i], kernel[0].tolist())
        return image
    kernel = get_gaussian_kernel1d(_taps(image, sigma[1]), sigmas[:, None])
    # Not gaussian_blur2d: it looks at sigma, and waits for the device to do so
    blurred = filter2d_separable(image, kernel, kernel)
    return torch.where(drawn.view(-1, 1, 1, 1), blurred, image)


def _taps(image: Tensor, sigma: float) -> int:
    """Number of taps of a Gaussian kernel, at most what reflection can pad."""
    # Taps beyond three standard deviations weigh less than 0.3 %
    radius = min(math.ceil(3 * sigma), min(image.shape[-2:]) - 1)
    return 2 * radius + 1


def _blur(image: Tensor, kernel: list[float]) -> Tensor:
    """Blur one image (C, H, W) by shifted sums.

    Several times faster on a CPU than convolutions, which are made for many channels.
    """
    height, width = image.shape[-2:]
    radius = len(kernel) // 2
    padded = F.pad(image, (radius,) * 4, mode='reflect')
    rows = padded[..., :width] * kernel[0]
    for tap, weight in enumerate(kernel[1:], 1):
        rows.add_(padded[..., tap : tap + width], alpha=weight)
    blurred = rows[..., :height, :] * kernel[0]
    for tap, weight in enumerate(kernel[1:], 1):
        blurred.add_(rows[..., tap : tap + height, :], alpha=weight)
    return blurred


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

    Attributes:
        boxes: What the views of the last call show: left, top, right and bottom in pixels,
            shape (B, 4). None before the first call.

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
        check_fractions(
            horizontal_flip=horizontal_flip,
            vertical_flip=vertical_flip,
            jitter_probability=jitter_probability,
            grey_probability=grey_probability,
            blur_probability=blur_probability,
            brightness=brightness,
            contrast=contrast,
        )
        check_range('scale', scale, 1)
        check_range('ratio', ratio)
        check_range('blur_sigma', blur_sigma)
        if value_range is not None and (
            len(value_range) != 2 or not value_range[0] < value_range[1]
        ):
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
        self._corners: Tensor | None = None
        self._image_size = (0, 0)

    @property
    def boxes(self) -> Tensor | None:
        """What the views of the last call show."""
        if self._corners is None:
            return None
        # From the centres of the outer pixels of a view to their outer edges
        steps = self._corners.new_tensor([max(side - 1, 1) for side in self.size[::-1]])
        low, high = self._corners.amin(1), self._corners.amax(1)  # (B, 2)
        edge = (high - low) / steps / 2
        sides = self._corners.new_tensor(self._image_size[::-1])
        return torch.cat([(low - edge + 1) * sides, (high + edge + 1) * sides], 1) / 2

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
            # Copies: a view of the grid would keep all of it in memory
            self._corners = torch.stack([grid[:, 0, 0], grid[:, -1, -1]], 1)
            self._image_size = (image.shape[-2], image.shape[-1])
            # 'border': crops end at the outer edge of the outer pixels, half a pixel
            # beyond their centres
            view = F.grid_sample(
                image, grid, padding_mode='border', align_corners=False
            )
            view = self._change_colours(view)
            view = random_blur(view, self.blur_probability, self.blur_sigma)
            if self.value_range is not None:
                view = view.clamp_(*self.value_range)
        return view

    def _change_colours(self, view: Tensor) -> Tensor:
        """Jitter and grey."""
        factors = torch.rand(2, len(view), device=view.device) * 2 - 1
        factors = factors * draw(view, self.jitter_probability)
        return jitter(
            view,
            1 + self.brightness * factors[0],
            1 + self.contrast * factors[1],
            saturation=~draw(view, self.grey_probability),
        )
