# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Global and local crops of several sizes, for a whole batch on its device."""

import warnings
from collections.abc import Sequence
from itertools import groupby
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from .._checks import check_counts, check_not_negative, check_types, require
from .colours import colour_map, jitter_rgb
from .interpolation import Crop, Interpolation, crop_matrices, identity
from .resample import means, resample
from .sampling import choose, constant, random_blurs, random_boxes, uniform
from .views import ViewModule

#: Strengths of brightness, contrast, saturation and hue.
Strengths: TypeAlias = tuple[float, float, float, float]
MultiCropViews: TypeAlias = Literal['multi_crop', 'temporal']


class MultiCropView(ViewModule):
    """Two or three global crops and several local crops of each image of a batch.

    The views of `DINO-MC and DINO-TP <https://arxiv.org/abs/2303.06670>`_: local crops
    have a size each. Devices, draws, bands, precision and pixels that are not finite are
    as of :class:`RandomView`.

    *multi_crop* (DINO-MC) crops one image, of several seasons one drawn per sample. All
    crops are flipped, jittered, turned grey and blurred at random, the second global crop
    is solarised, too.

    *temporal* (DINO-TP) draws three seasons. The local crops show the first, without
    flips and colours. The global crops show the second, augmented as a whole
    image, the third as it is, and the first, augmented as a whole image. Of two
    seasons, one is also the third.

    Images of 3 bands with a *value_range* are RGB images: jitter is that of torchvision
    with its four operations in an order that is drawn per view, grey is the luma. For all
    others, see :func:`.colour_map`; grey is the mean of the bands, and instead of a shift
    of the hue each band gets a gain, with a mean of 1 over the bands.

    The defaults are those of the papers' code,
    https://github.com/WennyXY/DINO-MC/blob/4f8e519/data_process/dino_augmentation.py

    Attributes:
        sizes: Side of each view in pixels, the global ones first.
        num_global: Number of global views.
        boxes: Boxes of the views of the last call as of :func:`random_boxes`, each of
            shape (B, 4).
    """

    def __init__(
        self,
        global_size: int = 224,
        local_sizes: Sequence[int] = (184, 164, 144, 124, 104, 84),
        num_local_crops: int | None = None,
        views: MultiCropViews = 'multi_crop',
        global_scale: tuple[float, float] = (0.32, 1.0),
        local_scale: tuple[float, float] = (0.05, 0.32),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        global_interpolation: Interpolation = 'bicubic',
        local_interpolation: Interpolation = 'bilinear',
        horizontal_flip: float = 0.5,
        vertical_flip: float = 0.0,
        global_jitter: Strengths | None = None,
        local_jitter: Strengths = (0.8, 0.8, 0.8, 0.2),
        jitter_probability: float = 0.8,
        grey_probability: float = 0.2,
        global_blur: tuple[float, float] | None = None,
        local_blur: float = 0.5,
        blur_sigma: tuple[float, float] = (0.1, 2.0),
        global_solarize: tuple[float, float] | None = None,
        value_range: tuple[float, float] | None = None,
    ) -> None:
        """Initialize a new MultiCropView instance.

        Args:
            global_size: Side of the global crops in pixels.
            local_sizes: Sides of the local crops in pixels.
            num_local_crops: Number of local crops. Of more sizes, the last ones are
                taken. Defaults to one crop of each size.
            views: DINO-MC or DINO-TP, see above.
            global_scale: Range of the global crop's share of the image's area.
            local_scale: Range of the local crop's share of the image's area.
            ratio: Range of the crop's aspect ratio.
            global_interpolation: Interpolation of the global crops.
            local_interpolation: Interpolation of the local crops.
            horizontal_flip: Probability to mirror left and right.
            vertical_flip: Probability to mirror top and bottom. 0 as in the papers,
                although satellite images have no upright position.
            global_jitter: Strengths of brightness, contrast, saturation and hue:
                factors are uniform in 1 ± this, shifts of the hue in ± this share of the
                circle. Defaults to (0.4, 0.4, 0.2, 0.1), for *temporal* to
                (0.4, 0.4, 0.4, 0.1).
            local_jitter: The same for local crops, not used by *temporal*.
            jitter_probability: Probability of the jitter.
            grey_probability: Probability to make all bands equal.
            global_blur: Probabilities of a Gaussian blur for the two augmented global
                views. Defaults to (1, 0.1), for *temporal* to (0.5, 0.5).
            local_blur: The same for each local crop, not used by *temporal*.
            blur_sigma: Range of the blur's standard deviation in pixels of the view, for
                *temporal* of the image.
            global_solarize: Probabilities to reflect values above the middle of the
                range for the two augmented global views. Defaults to (0, 0.2), and to
                (0, 0) for *temporal* or without *value_range*.
            value_range: Smallest and largest value that images can have, such as
                (0, 1). Values beyond are clipped. None clips nothing.

        Raises:
            ValueError: If an option is out of range.
        """
        check_types(MultiCropView.__init__, locals())
        temporal = views == 'temporal'
        if global_jitter is None:
            global_jitter = (0.4, 0.4, 0.4 if temporal else 0.2, 0.1)
        if global_blur is None:
            global_blur = (0.5, 0.5) if temporal else (1.0, 0.1)
        if global_solarize is None:
            plain = temporal or value_range is None
            global_solarize = (0.0, 0.0) if plain else (0.0, 0.2)
        if num_local_crops is None:
            num_local_crops = len(local_sizes)
        check_not_negative(num_local_crops=num_local_crops)

        super().__init__()
        self.global_size = global_size
        self.local_sizes = tuple(local_sizes)
        self.num_local_crops = num_local_crops
        self.views = views
        self.global_scale = global_scale
        self.local_scale = local_scale
        self.ratio = ratio
        self.global_interpolation = global_interpolation
        self.local_interpolation = local_interpolation
        self.horizontal_flip = horizontal_flip
        self.vertical_flip = vertical_flip
        self.global_jitter = global_jitter
        self.local_jitter = local_jitter
        self.jitter_probability = jitter_probability
        self.grey_probability = grey_probability
        self.global_blur = global_blur
        self.local_blur = local_blur
        self.blur_sigma = blur_sigma
        self.global_solarize = global_solarize
        self.value_range = value_range
        self._check_options()

        self.num_global = 3 if temporal else 2
        first = len(self.local_sizes) - num_local_crops
        self._crop_sizes = self.local_sizes[first:]
        self.sizes = (*[global_size] * self.num_global, *self._crop_sizes)
        self.boxes: list[Tensor] = []
        self._warned = False

    def _check_options(self) -> None:
        """Check the options."""
        self._check(MultiCropView)
        require(
            self.num_local_crops <= len(self.local_sizes),
            f'num_local_crops = {self.num_local_crops} crops need as many sizes, got '
            f'local_sizes = {self.local_sizes}. Give a size for each crop',
        )
        smallest = min(self.local_sizes, default=None)
        check_counts(global_size=self.global_size, local_sizes=smallest)
        for name in ('global_jitter', 'local_jitter', 'global_blur', 'global_solarize'):
            values = getattr(self, name)
            require(
                all(0 <= value <= 1 for value in values),
                f'{name} must be {len(values)} numbers in [0, 1], got {values}',
            )
            require(
                len(values) == 2 or values[3] <= 0.5,
                f'the hue of {name} must be in [0, 0.5], got {values[-1]}',
            )
        require(
            self.value_range is not None or not any(self.global_solarize),
            f'global_solarize = {self.global_solarize} needs the middle of the range of '
            'values: declare value_range, or set (0, 0)',
        )

    @torch.no_grad()
    def forward(self, image: Tensor) -> list[Tensor]:
        """Draw the views of each image.

        Args:
            image: Images of shape (B, C, H, W), or of several seasons (B, T, C, H, W).
                Not modified.

        Returns:
            Views of shape (B, C, h, w), float32, with the sides of :attr:`sizes`.

        Raises:
            ValueError: If *image* has another number of dimensions, or has one season
                where *views* is *temporal*.
        """
        if image.ndim not in (4, 5):
            raise ValueError(
                'image must have the shape (B, C, H, W) or (B, T, C, H, W), got '
                f'{tuple(image.shape)}'
            )
        self._warn_of_upsampling(image)
        self.boxes = []
        # Half precision would move pixel values by more than one grey level
        with torch.autocast(image.device.type, enabled=False):
            make = self._temporal if self.views == 'temporal' else self._multi_crop
            views = make(image)
            return [self._finish(view) for view in views]

    def _warn_of_upsampling(self, image: Tensor) -> None:
        """Warn once of crops that are larger than the image."""
        height, width = image.shape[-2:]
        sizes = self.global_size, *self._crop_sizes
        large = dict.fromkeys(size for size in sizes if size > min(height, width))
        if large and not self._warned:
            self._warned = True
            warnings.warn(
                f'Crops of {", ".join(map(str, large))} pixels are larger than the '
                f'images of {height} x {width} pixels, which are therefore magnified. '
                'Choose smaller local_sizes and a smaller global_size (size of DINOMCTask).',
                stacklevel=3,
            )

    def _multi_crop(self, image: Tensor) -> list[Tensor]:
        """Make the views of one image, or of one season of several."""
        if image.ndim == 5:
            seasons = uniform(image, *image.shape[:2]).argmax(1)
            image = _pick_season(image, seasons)
        image = self._prepare(image)
        crops = [*self._draw_global(image, 2), *self._draw_local(image)]
        number = len(self._crop_sizes)
        return self._augment(
            [image] * len(crops),
            crops,
            [self.global_jitter] * 2 + [self.local_jitter] * number,
            [*self.global_blur, *[self.local_blur] * number],
            [*self.global_solarize, *[0] * number],
        )

    def _temporal(self, image: Tensor) -> list[Tensor]:
        """Make the views of three seasons."""
        if image.ndim == 4 or image.shape[1] < 2:
            raise ValueError(
                "views = 'temporal' needs images of at least two seasons, shape "
                f'(B, T, C, H, W), got {tuple(image.shape)}. Choose a dataset with '
                "seasons, or views = 'multi_crop'"
            )
        order = uniform(image, *image.shape[:2]).argsort(1)
        if image.shape[1] == 2:
            again = order.gather(1, choose(image, 0.5).long()[:, None])
            order = torch.cat([order, again], 1)
        first, second, third = (
            self._prepare(_pick_season(image, order[:, i])) for i in range(3)
        )
        augmented = self._augment(
            [second, first],
            None,
            [self.global_jitter] * 2,
            self.global_blur,
            self.global_solarize,
        )
        # To mirror a random crop is to mirror the image before
        shown = [
            *zip(augmented[:1], self._draw_global(first, 1), strict=True),
            *zip([third], self._draw_global(first, 1, flip=False), strict=True),
            *zip(augmented[1:], self._draw_global(first, 1), strict=True),
            *((first, crop) for crop in self._draw_local(first, flip=False)),
        ]
        return [resample(season, *crop) for season, crop in shown]

    def _prepare(self, image: Tensor) -> Tensor:
        """Convert to float32, and a declared range to [0, 1]."""
        image = image.float()
        if self.value_range is None:
            return image
        low, high = self.value_range
        return ((image - low) / (high - low)).clamp_(0, 1)

    def _finish(self, view: Tensor) -> Tensor:
        """Convert back to the declared range."""
        if self.value_range is None:
            return view
        low, high = self.value_range
        if (low, high) != (0, 1):
            view = view.mul_(high - low).add_(low)
        return view.clamp_(low, high)

    def _draw_global(self, image: Tensor, number: int, flip: bool = True) -> list[Crop]:
        """Draw global crops of each image."""
        kind = self.global_scale, self.global_interpolation
        return self._draw(image, [self.global_size] * number, *kind, flip)

    def _draw_local(self, image: Tensor, flip: bool = True) -> list[Crop]:
        """Draw the local crops of each image."""
        kind = self.local_scale, self.local_interpolation
        return self._draw(image, self._crop_sizes, *kind, flip)

    def _draw(
        self,
        image: Tensor,
        sizes: Sequence[int],
        scale: tuple[float, float],
        interpolation: Interpolation,
        flip: bool,
    ) -> list[Crop]:
        """Draw crops of each image, all at once: a GPU is asked for less."""
        if not sizes:
            return []
        batch, number = len(image), len(sizes) * len(image)
        every = image[:1].expand(number, -1, -1, -1)  # only its shape is read
        boxes = random_boxes(every, scale, self.ratio)
        self.boxes += boxes.split(batch)
        flips = torch.zeros(2, number, dtype=torch.bool, device=image.device)
        if flip:
            probabilities = self.horizontal_flip, self.vertical_flip
            flips = torch.stack([choose(every, p) for p in probabilities])
        crops: list[Crop] = []
        for size, group in groupby(sizes):
            end = len(crops) + len(list(group))
            own = slice(len(crops) * batch, end * batch)
            rows, columns = crop_matrices(
                image, boxes[own], (size, size), flips[:, own], interpolation
            )
            crops += zip(rows.split(batch), columns.split(batch), strict=True)
        return crops

    def _augment(
        self,
        images: Sequence[Tensor],
        crops: Sequence[Crop] | None,
        strengths: Sequence[Strengths],
        blurs: Sequence[float],
        solarize: Sequence[float],
    ) -> list[Tensor]:
        """Crop, jitter, grey, blur and solarise images (B, C, H, W) of V views.

        All arguments have an element for each view; *crops* None keeps whole images. Does
        not modify *images*.
        """
        rgb = images[0].shape[1] == 3 and self.value_range is not None
        if crops is not None and rgb:
            # Jitter clips, which is not linear: no single product with the blur
            pairs = zip(images, crops, strict=True)
            images, crops = [resample(image, *crop) for image, crop in pairs], None

        # All draws at once, shape (V, B)
        like, shape = images[0], (len(images), len(images[0]))
        jittered = uniform(like, *shape) < self.jitter_probability
        grey = uniform(like, *shape) < self.grey_probability
        scale = constant(tuple(map(tuple, strengths)), like.device)
        scale = scale.T[..., None]  # (4, V, 1)
        factors = (uniform(like, 4, *shape) * 2 - 1) * (scale * jittered)
        colours: Sequence[Any] = [None] * len(images)
        if rgb:
            changes = zip(images, *(1 + factors[:3]), factors[3], grey, strict=True)
            images = [jitter_rgb(*change) for change in changes]
        else:
            if crops is None:
                mean = [image.mean((-2, -1)) for image in images]
            else:
                pairs = zip(images, crops, strict=True)
                mean = [means(image, *crop) for image, crop in pairs]
            strength = scale[3] * jittered
            colours = _draw_colours(torch.stack(mean), factors, strength, grey)
        if crops is None:
            crops = [identity(image) for image in images]
        crops = random_blurs(crops, blurs, self.blur_sigma)
        triples = zip(images, crops, colours, strict=True)
        views = [resample(image, *crop, colour) for image, crop, colour in triples]
        for i, probability in enumerate(solarize):
            if probability:
                view = views[i]
                chosen = choose(view, probability).view(-1, 1, 1, 1)
                views[i] = torch.where(chosen & (view >= 0.5), 1 - view, view)
        return views


def _pick_season(image: Tensor, seasons: Tensor) -> Tensor:
    """Pick one season (B,) of each sample (B, T, C, H, W)."""
    return image[torch.arange(len(image), device=image.device), seasons]


def _draw_colours(
    mean: Tensor, factors: Tensor, strength: Tensor, grey: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """Draw jitter and grey of images that are not RGB, as :func:`resample` takes them.

    Takes the means of the bands (V, B, C), factors of brightness, contrast, saturation
    and, not used, hue (4, V, B), the strength of the gain of single bands (V, B), and
    whether to make all bands equal (V, B).
    """
    brightness, contrast, saturation, _ = 1 + factors
    gain = 1 + strength[..., None] * (uniform(mean, *mean.shape) * 2 - 1)
    gain = brightness[..., None] * gain / gain.mean(-1, keepdim=True)
    # Grey is a saturation of 0
    changes = (mean, gain, contrast, saturation * ~grey)
    matrix, offset = colour_map(*(x.flatten(0, 1) for x in changes))
    batch = mean.shape[1]
    return [*zip(matrix.split(batch), offset.split(batch), strict=True)]
