# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Random land cover through the year."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import yaml

Floats = npt.NDArray[np.float64]

#: Land cover that occurs, by the order of codes. The file explains its keys.
LAND_COVER: list[dict[str, Any]] = yaml.safe_load(
    Path(__file__).with_name('land_cover.yaml').read_text(encoding='utf-8')
)

#: Days of the year of the values in ``seasons``.
_DAYS = (18, 109, 200, 291)


def random_field(
    rng: np.random.Generator,
    shape: tuple[int, ...],
    pixel: tuple[float, float],
    sigma: float,
) -> Floats:
    """Draw smooth random numbers of shape (H, W), with mean 0 and standard deviation 1.

    *pixel* is the height and width of a pixel, *sigma* the standard deviation of the
    Gaussian filter, all in metres.
    """
    # The filter wraps around, so that opposite edges would be alike: cut them off
    padded = [size + round(3 * sigma / p) for size, p in zip(shape, pixel, strict=True)]
    noise = np.fft.rfft2(rng.standard_normal(padded))
    rows = np.fft.fftfreq(padded[0], pixel[0])[:, None]
    cols = np.fft.rfftfreq(padded[1], pixel[1])
    noise *= np.exp(-2 * (np.pi * sigma) ** 2 * (rows**2 + cols**2))
    field = np.fft.irfft2(noise, padded)
    return np.asarray(field / field.std())[: shape[0], : shape[1]]


@dataclasses.dataclass(frozen=True)
class Landscape:
    """Land cover of some pixels.

    Attributes:
        codes: WorldCover code of every pixel, (H, W).
        kind: Which of the kinds of its class a pixel has, in [0, 1), (H, W).
        vigour: How green a pixel is within its kind, (H, W), around 0.
    """

    codes: npt.NDArray[np.uint8]
    kind: Floats
    vigour: Floats

    @classmethod
    def random(
        cls,
        rng: np.random.Generator,
        shape: tuple[int, int],
        pixel: tuple[float, float],
    ) -> 'Landscape':
        """Draw patches, a river and fields, on pixels with a height and width in metres."""
        fields = []
        for cover in LAND_COVER:
            # A wide field on top lets a class be common here and rare there
            wide = random_field(rng, shape, pixel, 600)
            narrow = random_field(rng, shape, pixel, cover['patch'])
            fields.append(narrow + 2 * wide + 1.8 * cover['bias'])
        codes = np.array([cover['code'] for cover in LAND_COVER], np.uint8)
        land = codes[np.argmax(fields, 0)]

        # A line of equal height winds like a river, 80 to 120 m wide, with wet banks
        height = np.abs(random_field(rng, shape, pixel, 700) - 0.4)
        wet = random_field(rng, shape, pixel, 120)
        land[(height < 0.16) & (wet > 0.6)] = 90
        land[height < 0.06 + 0.015 * wet] = 80

        # Fields are rectangles along one direction, cut at two random distances
        angle = rng.uniform(0, np.pi)
        y, x = np.indices(shape) * np.array(pixel)[:, None, None]
        along = x * np.cos(angle) + y * np.sin(angle)
        across = y * np.cos(angle) - x * np.sin(angle)
        strip = np.floor(across / rng.uniform(110, 160)).astype(int)
        strip -= strip.min()
        shift = rng.uniform(0, 300, strip.max() + 1)
        parcel = np.floor((along + shift[strip]) / rng.uniform(180, 280)).astype(int)
        parcel -= parcel.min()
        kinds = rng.random((strip.max() + 1, parcel.max() + 1))
        vigour = rng.normal(0, 0.07, kinds.shape)
        return cls(land, kinds[strip, parcel], vigour[strip, parcel])

    def take(self, *pixels: npt.NDArray[Any]) -> 'Landscape':
        """Return the landscape at the rows and columns of other pixels."""
        return Landscape(self.codes[pixels], self.kind[pixels], self.vigour[pixels])

    def of_classes(self, values: Floats) -> Floats:
        """Return the value of each pixel's class, from one per LAND_COVER."""
        codes = [cover['code'] for cover in LAND_COVER]
        return values[np.searchsorted(codes, self.codes)]

    def green(self, day: int) -> Floats:
        """Return the share of the green state on a day of the year, (H, W)."""
        out = np.zeros(self.codes.shape)
        for cover in LAND_COVER:
            kinds = [np.interp(day, _DAYS, s, period=365) for s in cover['seasons']]
            there = self.codes == cover['code']
            out[there] = np.take(kinds, (self.kind[there] * len(kinds)).astype(int))
        # Only plants have vigour
        plants = ~np.isin(self.codes, (50, 60, 80))
        return np.clip(out + plants * self.vigour, 0, 1)
