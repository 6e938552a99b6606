"""A continuous-wave radar at the origin: echo of moving ellipsoids, spectrogram, picture, and the way back.

Power is a spectrogram's (..., S, S): rows are Doppler, the fastest approach on top; columns are time. dB are relative
to the picture's own strongest cell, from -RANGE_DB to 0.
"""

import functools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import KDTree

from isonext.errors import UserError
from walker import Body

Array = NDArray[np.float64]

LIGHT_MPS = 299_792_458.0
PICTURE_S = 3.0  # two to three cycles
WINDOW = 256  # pulses: 128 ms at 2 kHz, in which a limb hardly changes its speed; 0.05 m/s apart at 24 GHz
CELLS = 256  # rows and columns of the full picture
SIZES = (16, 32, 64, 128, 256)  # of pictures: what divides the cells; smaller ones hold no gait
RANGE_DB = 45.0
RADAR_HEIGHT_M = 1.0


@dataclass(frozen=True)
class Radar:
    carrier_hz: float = 24e9
    prf_hz: float = 2000.0  # pulses a second

    @property
    def wavelength_m(self) -> float:
        return LIGHT_MPS / self.carrier_hz

    @property
    def fastest_mps(self) -> float:
        """The radial speed above which Doppler folds over: 2 v / wavelength = PRF / 2."""
        return self.prf_hz * self.wavelength_m / 4

    @property
    def picture_pulses(self) -> int:
        return round(PICTURE_S * self.prf_hz)

    def row_speeds(self, size: int) -> Array:
        """(size,) m/s of a picture's rows, top to bottom; a row of a smaller picture is the mean of several."""
        rows = (CELLS / 2 - 1 - np.arange(CELLS)) * 2 * self.fastest_mps / CELLS
        return rows.reshape(size, -1).mean(1)

    def column_s(self, size: int) -> float:
        """Seconds between the columns of a picture."""
        return (PICTURE_S - WINDOW / self.prf_hz) / (CELLS - 1) * CELLS / size


def ellipsoid_rcs(semi_axes: Array, direction: Array) -> Array:
    """Radar cross-section in m^2 of ellipsoids (..., 3) seen from unit vectors (..., 3) in their own axes.

    sigma = pi a^2 b^2 c^2 / (a^2 x^2 + b^2 y^2 + c^2 z^2)^2, geometrical optics (Chen 2011, section 2.5; Trott, IEEE
    TAP 55, 2007); a sphere has pi r^2 from everywhere.
    """
    squared = semi_axes**2
    return np.pi * squared.prod(-1) / (squared * direction**2).sum(-1) ** 2


def check_aliasing(radar: Radar, centres: Array) -> None:
    """Refuse paths (T, ..., 3) on which something moves faster than the radar can tell."""
    speed = np.sqrt((np.diff(centres, axis=0) ** 2).sum(-1).max()) * radar.prf_hz
    if speed > radar.fastest_mps:
        raise UserError(
            f"--prf {radar.prf_hz:g}: a limb moves at {speed:.2f} m/s, and above PRF x wavelength / 4 = "
            f"{radar.fastest_mps:.2f} m/s its echo folds over; take a PRF of "
            f"{4 * speed / radar.wavelength_m:.0f} Hz or more, or a lower --carrier_ghz"
        )


def echo(radar: Radar, body: Body) -> NDArray[np.complex128]:
    """(T,) complex baseband of a body whose coordinates have the radar at their origin: the radar equation's
    sqrt(sigma) / R^2 and the phase of the way there and back, exp(-4 pi i R / wavelength). No part hides another."""
    check_aliasing(radar, body.centres)
    distance = np.sqrt((body.centres**2).sum(-1))  # (T, 12)
    sight = body.centres / distance[..., None]
    along, across = (sight * body.along).sum(-1), (sight * body.across).sum(-1)
    ahead = np.sqrt(np.maximum(0, 1 - along**2 - across**2))
    amplitude = np.sqrt(ellipsoid_rcs(body.semi_axes, np.stack([ahead, across, along], -1))) / distance**2
    return (amplitude * np.exp(-4j * np.pi / radar.wavelength_m * distance)).sum(1)


#################################################################################
#                            Echo -> picture -> dB                              #
#################################################################################


def spectrogram(signal: NDArray[np.complex128]) -> Array:
    """(T,) pulses -> power (256, 256): 256 Hann windows, evenly spread from the first pulse to the last."""
    starts = np.round(np.linspace(0, len(signal) - WINDOW, CELLS)).astype(int)
    frames = signal[starts[:, None] + np.arange(WINDOW)] * np.hanning(WINDOW + 1)[:-1]
    return np.abs(np.fft.fftshift(np.fft.fft(frames), 1)[:, ::-1].T) ** 2


def reduced(power: Array, size: int) -> Array:
    """The mean power of blocks: (256, 256) -> (size, size), where size divides 256."""
    blocks = CELLS // size
    return power.reshape(size, blocks, size, blocks).mean((1, 3))


def decibels(power: Array) -> Array:
    return 10 * np.log10(np.maximum(power / power.max(), 10 ** (-RANGE_DB / 10)))


@functools.lru_cache(maxsize=1)
def colours() -> NDArray[np.uint8]:
    """(256, 3) RGB from -RANGE_DB to 0. Inferno: no colour twice, luminance grows throughout, and its way through
    the colour cube is long, so that an autoencoder's blur costs few dB (jet's is longer, but its luminance is not
    monotone, and codecs keep luminance best)."""
    import matplotlib

    return np.round(matplotlib.colormaps["inferno"](np.arange(256))[:, :3] * 255).astype(np.uint8)


@functools.lru_cache(maxsize=1)
def _nearest() -> KDTree:
    return KDTree(colours().astype(float))


def to_rgb(db: Array) -> NDArray[np.uint8]:
    """dB (S, S) -> (S, S, 3), to the nearest of 256 steps of 0.18 dB."""
    return colours()[np.round((db / RANGE_DB + 1) * 255).clip(0, 255).astype(int)]


def from_rgb(rgb: NDArray[np.uint8]) -> tuple[Array, float]:
    """(S, S, 3) -> dB (S, S) of the nearest colour of the map, and how far from it the picture's colours are on
    average, in 8-bit steps: 0 for a picture of `to_rgb`."""
    packed = (rgb.astype(np.int64) << [16, 8, 0]).sum(-1)
    found, place = np.unique(packed, return_inverse=True)
    distance, level = _nearest().query(np.stack([found >> 16, found >> 8 & 255, found & 255], 1))
    db = (level[place].reshape(packed.shape) / 255 - 1) * RANGE_DB
    return db, float(distance[place].mean())


#################################################################################
#                            What a picture tells                               #
#################################################################################


def ridge_speeds(db: Array, radar: Radar) -> Array:
    """(S,) m/s of the strongest echo, the torso's, in every column: the power's centre about its peak."""
    power, speeds = 10 ** (db / 10), radar.row_speeds(len(db))
    peaks = power.argmax(0)
    near = np.abs(np.arange(len(db))[:, None] - peaks) <= 1
    weights = power * near
    return (weights * speeds[:, None]).sum(0) / weights.sum(0)


def step_rate(db: Array, radar: Radar) -> float:
    """Steps a second, between 1.2 and 2.8: the strongest rhythm of the echo that is faster than the torso by 0.7 m/s.

    A leg swings forward at each step, so this is two over the cycle.
    """
    speeds = radar.row_speeds(len(db))
    fast = speeds > np.median(ridge_speeds(db, radar)) + 0.7
    swing = (db[fast] + RANGE_DB).sum(0) if fast.any() else np.zeros(len(db))
    swing = (swing - swing.mean()) * np.hanning(len(swing))
    rates = np.linspace(1.2, 2.8, 321)
    times = np.arange(len(swing)) * radar.column_s(len(db))
    return float(rates[np.abs(np.exp(-2j * np.pi * rates[:, None] * times) @ swing).argmax()])
