# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Images that Sentinel-2 and Sentinel-1 would take of a landscape."""

import numpy as np
import numpy.typing as npt

from .landscape import LAND_COVER, Floats, Landscape, random_field

#: Light that the air scatters into the sensor, and the part of the ground's light that
#: it lets through. B9 is a band of water vapour, B10 sees little of the ground.
_PATH = np.array([100, 75, 45, 30, 25, 20, 15, 13, 12, 4, 1, 3, 2]) / 1000
_THROUGH = np.array([84, 86, 89, 92, 93, 94, 95, 95, 96, 25, 0.3, 96, 95]) / 100

#: Resolution of the bands in pixels of 10 m.
_PIXELS = (6, 1, 1, 1, 2, 2, 2, 1, 2, 6, 6, 2, 2)


def optical(
    rng: np.random.Generator, ground: Landscape, relief: Floats, day: int
) -> npt.NDArray[np.uint16]:
    """Take a Sentinel-2 Level-1C image: reflectance at the top of the atmosphere.

    Land cover and *relief* (height in units of its deviation) are on pixels of 10 m, *day*
    is of the year. Returns digital numbers (13, H, W), reflectance times 10,000, >= 1.
    """
    shape = ground.codes.shape
    green = ground.green(day)
    brightness = _sunlight(relief, day) * _texture(rng, ground)
    haze = np.exp(0.25 * rng.normal() + 0.12 * random_field(rng, shape, (10, 10), 500))
    gain = rng.normal(1, 0.02)

    image = np.empty((len(_PIXELS), *shape), np.uint16)
    for band, pixels in enumerate(_PIXELS):
        surface = brightness * _mix(ground, green, 'reflectance', band, 1000)

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
    """Take a Sentinel-1 GRD image, VV and VH in dB of shape (2, H, W)."""
    green = ground.green(day)
    slope = np.gradient(relief, axis=1) * 60  # towards or away from the sensor
    image = np.empty((2, *ground.codes.shape), np.float32)
    for band in range(2):
        offset = rng.normal(0, 0.3)
        decibel = offset - slope + _mix(ground, green, 'backscatter', band)
        power = _blur(10 ** (decibel / 10))
        # Speckle of about five looks
        power *= rng.gamma(5, 1 / 5, power.shape)
        image[band] = 10 * np.log10(power)
    return image


def _mix(
    ground: Landscape, green: Floats, kind: str, band: int, unit: float = 1
) -> Floats:
    """Mix what each pixel looks like in the green and in the dormant state."""
    high, low = (
        np.array([cover[state][kind][band] / unit for cover in LAND_COVER])
        for state in ('green', 'dormant')
    )
    return ground.of_classes(low) + ground.of_classes(high - low) * green


def _sunlight(relief: Floats, day: int) -> Floats:
    """Return the light on slopes, 1 on average, in the late morning at 46 degrees north."""
    declination = np.radians(-23.4 * np.cos(2 * np.pi * (day + 10) / 365))
    height = np.pi / 2 - np.radians(46) + declination - np.radians(4)
    south, east = np.gradient(relief * 25, 10)  # hills of 25 m
    # Sun in the south-south-east: slopes that fall to the south and east are bright
    facing = -(0.9 * south + 0.4 * east) / np.tan(height)
    lit = (1 + facing).clip(0.35, 1.8)
    return np.asarray(lit * (0.9 + 0.1 * np.sin(height)), np.float64)


def _texture(rng: np.random.Generator, ground: Landscape) -> Floats:
    """Return the brightness inside of the classes, around 1."""
    shape = ground.codes.shape
    coarse = random_field(rng, shape, (10, 10), 25)
    fine = rng.standard_normal(shape)
    texture = np.array([cover['texture'] for cover in LAND_COVER]).T
    wide, narrow = (ground.of_classes(values) for values in texture)
    return np.asarray((1 + (wide * coarse + narrow * fine)).clip(0.3))


def _blur(values: Floats) -> Floats:
    """Mix neighbours as the optics do, weights 1 6 1 along each axis."""
    padded = np.pad(values, 1, mode='edge')
    rows = (padded[:-2] + 6 * padded[1:-1] + padded[2:]) / 8
    return np.asarray((rows[:, :-2] + 6 * rows[:, 1:-1] + rows[:, 2:]) / 8)


def _pool(values: Floats, pixels: int) -> Floats:
    """Return the mean of square blocks, the last ones filled up with their edge."""
    height, width = values.shape
    padded = np.pad(values, ((0, -height % pixels), (0, -width % pixels)), mode='edge')
    rows, cols = (size // pixels for size in padded.shape)
    return np.asarray(padded.reshape(rows, pixels, cols, pixels).mean((1, 3)))
