# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Random land cover, and what Sentinel-2 and Sentinel-1 would see of it."""

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

#: Land cover that occurs: WorldCover code, size of its patches and how common it is.
#: Sizes are standard deviations of a filter in metres: patches are 2 to 4 times larger.
_CLASSES = (
    (10, 110, 0.35),
    (20, 60, -0.5),
    (30, 90, 0.15),
    (40, 160, 0.55),
    (50, 120, 0.0),
    (60, 60, -0.45),
    (80, 120, -0.6),
    (90, 80, -0.3),
)

#: Surface reflectance in green and in dormant state, B1 to B8, B8A, B9 to B12, times
#: 1,000. Chosen by hand to look like central Europe, not measured.
_SPECTRA = {
    10: (
        (15, 20, 40, 25, 70, 220, 290, 310, 330, 330, 300, 150, 70),
        (25, 35, 50, 60, 90, 140, 160, 180, 200, 200, 200, 200, 130),
    ),
    20: (
        (25, 35, 60, 55, 100, 200, 240, 260, 280, 280, 280, 220, 130),
        (35, 50, 75, 85, 120, 160, 180, 200, 220, 220, 220, 260, 180),
    ),
    30: (
        (25, 35, 75, 40, 110, 280, 350, 370, 390, 390, 380, 240, 130),
        (40, 55, 85, 100, 140, 180, 200, 220, 240, 240, 240, 300, 210),
    ),
    40: (
        (20, 30, 70, 30, 100, 340, 430, 450, 470, 470, 450, 220, 110),
        (60, 80, 110, 140, 160, 180, 190, 210, 230, 230, 230, 300, 250),
    ),
    50: ((90, 110, 130, 145, 160, 170, 180, 190, 200, 200, 200, 220, 200),) * 2,
    60: ((110, 140, 190, 240, 260, 280, 290, 310, 320, 320, 300, 390, 360),) * 2,
    80: (
        (40, 48, 55, 32, 25, 18, 15, 12, 10, 6, 4, 4, 3),
        (40, 45, 42, 24, 20, 15, 12, 10, 8, 5, 4, 4, 3),
    ),
    90: (
        (25, 30, 55, 40, 75, 160, 200, 210, 220, 200, 200, 110, 55),
        (30, 40, 60, 60, 80, 100, 110, 120, 120, 120, 120, 120, 70),
    ),
}

#: Share of the green state on days 18, 109, 200 and 291 of the year. Cropland is of
#: three kinds: winter cereals, maize and clover.
_PHENOLOGY = {
    10: ((0.15, 0.75, 1.0, 0.6),),
    20: ((0.3, 0.7, 0.8, 0.5),),
    30: ((0.35, 0.95, 0.7, 0.55),),
    40: ((0.4, 0.95, 0.2, 0.1), (0.0, 0.1, 0.95, 0.3), (0.3, 0.8, 0.85, 0.7)),
    50: ((0.5, 0.5, 0.5, 0.5),),
    60: ((0.5, 0.5, 0.5, 0.5),),
    80: ((0.2, 0.9, 0.6, 0.3),),
    90: ((0.2, 0.6, 0.95, 0.6),),
}
_DAYS = (18, 109, 200, 291)

#: Texture inside of a class: relative brightness of patches of 50 m, and of pixels.
_TEXTURE = {
    10: (0.06, 0.09),
    20: (0.10, 0.09),
    30: (0.07, 0.03),
    40: (0.03, 0.02),
    50: (0.10, 0.22),
    60: (0.09, 0.06),
    80: (0.08, 0.02),
    90: (0.14, 0.07),
}

#: Light that the air scatters into the sensor, and the part of the ground's light that
#: it lets through. B9 is a band of water vapour, B10 sees little of the ground.
_PATH = np.array([100, 75, 45, 30, 25, 20, 15, 13, 12, 4, 1, 3, 2]) / 1000
_THROUGH = np.array([84, 86, 89, 92, 93, 94, 95, 95, 96, 25, 0.3, 96, 95]) / 100

#: Resolution of the bands in pixels of 10 m.
_PIXELS = (6, 1, 1, 1, 2, 2, 2, 1, 2, 6, 6, 2, 2)

#: Backscatter in dB, VV and VH, in green and dormant state.
_BACKSCATTER = {
    10: ((-9.0, -14.5), (-10.0, -16.5)),
    20: ((-11.0, -17.5), (-11.5, -18.5)),
    30: ((-12.5, -19.5), (-12.0, -21.0)),
    40: ((-10.5, -16.5), (-12.0, -20.0)),
    50: ((-4.5, -11.5), (-4.5, -11.5)),
    60: ((-14.0, -23.0), (-14.0, -23.0)),
    80: ((-20.0, -28.0), (-19.0, -27.5)),
    90: ((-12.0, -18.5), (-9.5, -19.0)),
}


def random_field(
    rng: np.random.Generator,
    shape: tuple[int, ...],
    pixel: tuple[float, float],
    sigma: float,
) -> Floats:
    """Smooth random numbers with mean 0 and standard deviation 1.

    Args:
        rng: Source of random numbers.
        shape: Height and width in pixels.
        pixel: Height and width of a pixel in metres.
        sigma: Standard deviation of the Gaussian filter in metres.

    Returns:
        Field of shape (H, W).
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
    """Cover of the ground.

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
        """Draw a landscape: patches, a river and fields.

        Args:
            rng: Source of random numbers.
            shape: Height and width in pixels.
            pixel: Height and width of a pixel in metres.
        """
        fields = []
        for _, sigma, bias in _CLASSES:
            # A wide field on top lets a class be common here and rare there
            wide = random_field(rng, shape, pixel, 600)
            fields.append(
                random_field(rng, shape, pixel, sigma) + 2 * wide + 1.8 * bias
            )
        codes = np.array([code for code, _, _ in _CLASSES], np.uint8)
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

    def take(self, row: npt.NDArray[Any], col: npt.NDArray[Any]) -> 'Landscape':
        """The landscape at other pixels."""
        return Landscape(
            self.codes[row, col], self.kind[row, col], self.vigour[row, col]
        )

    def green(self, day: int) -> Floats:
        """Share of the green state on a day of the year, (H, W), in [0, 1]."""
        out = np.zeros(self.codes.shape)
        for code, kinds in _PHENOLOGY.items():
            which = (self.kind * len(kinds)).astype(int)
            for i, values in enumerate(kinds):
                value = np.interp(day, _DAYS, values, period=365)
                out[(self.codes == code) & (which == i)] = value
        # Only plants have vigour
        plants = ~np.isin(self.codes, (50, 60, 80))
        return np.clip(out + plants * self.vigour, 0, 1)


def optical(
    rng: np.random.Generator, ground: Landscape, relief: Floats, day: int
) -> npt.NDArray[np.uint16]:
    """Sentinel-2 Level-1C image: reflectance at the top of the atmosphere.

    Args:
        rng: Source of random numbers.
        ground: What is there, on pixels of 10 m.
        relief: Height of the ground on the same pixels, in units of its deviation.
        day: Day of the year.

    Returns:
        Digital numbers of 13 bands, shape (13, H, W), reflectance times 10,000, >= 1.
    """
    shape = ground.codes.shape
    green = ground.green(day)
    light = _sunlight(relief, day)
    brightness = light * _texture(rng, ground)
    haze = np.exp(0.25 * rng.normal() + 0.12 * random_field(rng, shape, (10, 10), 500))
    gain = rng.normal(1, 0.02)

    image = np.empty((len(_PIXELS), *shape), np.uint16)
    for band, pixels in enumerate(_PIXELS):
        surface = np.zeros(shape)
        for code, states in _SPECTRA.items():
            there = ground.codes == code
            high, low = (state[band] / 1000 for state in states)
            surface[there] = (low + (high - low) * green[there]) * brightness[there]

        # What is scattered towards the sensor is lost to the ground
        through = _THROUGH[band] - _PATH[band] * (haze - 1)
        # Soils, species and moisture differ within a class, and from band to band
        surface *= 1 + 0.08 * random_field(rng, shape, (10, 10), 60)
        values = _blur(surface) * through.clip(0) + _PATH[band] * haze
        values = _pool(gain * values, pixels)
        values += rng.standard_normal(values.shape) * (0.0006 + 0.008 * values)
        values = np.repeat(np.repeat(values, pixels, 0), pixels, 1)
        digital = np.round(values[: shape[0], : shape[1]] * 10_000)
        image[band] = np.clip(digital, 1, 65535)  # 0 is no data
    return image


def radar(
    rng: np.random.Generator, ground: Landscape, relief: Floats, day: int
) -> npt.NDArray[np.float32]:
    """Sentinel-1 GRD image: backscatter.

    Args:
        rng: Source of random numbers.
        ground: What is there, on pixels of 10 m.
        relief: Height of the ground on the same pixels, in units of its deviation.
        day: Day of the year.

    Returns:
        VV and VH in dB, shape (2, H, W).
    """
    green = ground.green(day)
    slope = np.gradient(relief, axis=1) * 60  # towards or away from the sensor
    image = np.empty((2, *ground.codes.shape), np.float32)
    for band in range(2):
        decibel = rng.normal(0, 0.3) - slope
        for code, states in _BACKSCATTER.items():
            there = ground.codes == code
            high, low = (state[band] for state in states)
            decibel[there] += low + (high - low) * green[there]
        power = _blur(10 ** (decibel / 10))
        # Speckle of about five looks
        power *= rng.gamma(5, 1 / 5, power.shape)
        image[band] = 10 * np.log10(power)
    return image


def _sunlight(relief: Floats, day: int) -> Floats:
    """Light on the slopes, 1 on average, in the late morning at 46 degrees north."""
    declination = np.radians(-23.4 * np.cos(2 * np.pi * (day + 10) / 365))
    height = np.pi / 2 - np.radians(46) + declination - np.radians(4)
    south, east = np.gradient(relief * 25, 10)  # hills of 25 m
    # Sun in the south-south-east: slopes that fall to the south and east are bright
    facing = -(0.9 * south + 0.4 * east) / np.tan(height)
    lit = (1 + facing).clip(0.35, 1.8)
    return np.asarray(lit * (0.9 + 0.1 * np.sin(height)), np.float64)


def _texture(rng: np.random.Generator, ground: Landscape) -> Floats:
    """Brightness inside of the classes, around 1."""
    shape = ground.codes.shape
    coarse = random_field(rng, shape, (10, 10), 25)
    fine = rng.standard_normal(shape)
    out = np.ones(shape)
    for code, (wide, narrow) in _TEXTURE.items():
        there = ground.codes == code
        out[there] += wide * coarse[there] + narrow * fine[there]
    return np.asarray(out.clip(0.3))


def _blur(values: Floats) -> Floats:
    """Mix neighbours as the optics do, weights 1 6 1 along each axis."""
    padded = np.pad(values, 1, mode='edge')
    rows = (padded[:-2] + 6 * padded[1:-1] + padded[2:]) / 8
    return np.asarray((rows[:, :-2] + 6 * rows[:, 1:-1] + rows[:, 2:]) / 8)


def _pool(values: Floats, pixels: int) -> Floats:
    """Mean of square blocks, the last ones filled up with their edge."""
    height, width = values.shape
    padded = np.pad(values, ((0, -height % pixels), (0, -width % pixels)), mode='edge')
    rows, cols = (size // pixels for size in padded.shape)
    return np.asarray(padded.reshape(rows, pixels, cols, pixels).mean((1, 3)))
