"""A walking human as twelve moving ellipsoids: Boulic's model, and what makes one walker unlike another.

R. Boulic, N. Magnenat-Thalmann, D. Thalmann, "A global human walking model with real-time kinematic personification",
The Visual Computer 6, 1990, pp. 344-358, cited below by its appendices; as a radar target in V. C. Chen, "The
Micro-Doppler Effect in Radar", Artech House 2011. All is periodic in the *phase*, counted in cycles: 0 where the right
heel strikes. Axes of the walker: x forward, y to the left, z up. Lengths in m; angles of the tables in degrees.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.interpolate import PchipInterpolator

Array = NDArray[np.float64]

# Segment lengths in body heights (Chen 2011, after Winter's anthropometry); shoulders and hips from side to side.
HEAD, TORSO, UPPER_ARM, LOWER_ARM = 0.130, 0.288, 0.188, 0.152
THIGH, SHIN, FOOT, ANKLE_HEIGHT = 0.245, 0.246, 0.143, 0.039
SHOULDERS, HIPS = 0.259, 0.191

# The scatterers: half depth and half width in m at girth 1 and a height of 1.75 m. Half the length is the segment's.
PARTS = ("head", "torso", *(f"{side} {part}" for side in ("right", "left") for part in
         ("upper arm", "lower arm", "thigh", "shin", "foot")))  # fmt: skip
THICKNESS = {"head": (0.095, 0.075), "torso": (0.115, 0.165), "upper arm": (0.045, 0.045), "lower arm": (0.04, 0.04),
             "thigh": (0.075, 0.075), "shin": (0.055, 0.055), "foot": (0.045, 0.045)}  # fmt: skip
LENGTH = {"head": HEAD, "torso": TORSO, "upper arm": UPPER_ARM, "lower arm": LOWER_ARM,
          "thigh": THIGH, "shin": SHIN, "foot": FOOT}  # fmt: skip


@dataclass(frozen=True)
class Gait:
    """How somebody walks. The defaults below height and speed are Boulic's average human."""

    height_m: float
    speed_mps: float
    stride: float = 1.0  # length of a cycle over Boulic's at this speed; a longer stride is a slower cadence
    legs: float = 1.0  # swing at the hips,
    knees: float = 1.0  # flexion of the knees
    arms: float = 1.0  # and swing at the shoulders, over Boulic's
    elbows_deg: float = 0.0  # by how much the elbows are bent more
    leg_asymmetry: float = 0.0  # the right leg swings by 1 + this, the left one by 1 - this
    arm_asymmetry: float = 0.0
    lag: float = 0.0  # cycles by which the left side comes after half a cycle
    girth: float = 1.0  # thickness of all parts

    def __post_init__(self) -> None:
        if not 0.5 <= self.relative_speed <= 3:  # slower gaits have tables of their own; faster is running
            raise ValueError(f"relative speed {self.relative_speed:.2f}/s: the model walks at 0.5 to 3 leg lengths a s")

    @property
    def leg_m(self) -> float:
        return (THIGH + SHIN) * self.height_m

    @property
    def relative_speed(self) -> float:
        """RV: leg lengths a second."""
        return self.speed_mps / self.leg_m

    @property
    def cycle_s(self) -> float:
        """Duration of a cycle, which is two steps: 1.346 sqrt(RV) leg lengths long (Boulic, section 3)."""
        return self.stride * 1.346 / self.relative_speed**0.5


@dataclass(frozen=True)
class Body:
    """The scatterers of one walk at T times; the last axis is x, y, z."""

    centres: Array  # (T, 12, 3) in m; x = 0 is where the walk begins, z = 0 the floor
    along: Array  # (T, 12, 3) unit vectors of the long axes
    across: Array  # (T, 12, 3) unit vectors to the left, perpendicular to `along`
    semi_axes: Array  # (12, 3) half depth, half width, half length in m


def cyclic(x: list[float], y: list[float], phase: Array) -> Array:
    """A smooth cycle through control points that are its extremes: monotone cubics, flat at each extreme."""
    points = dict(sorted(zip(np.round(np.mod(x, 1.0), 9).tolist(), y, strict=True)))  # where two meet, they are equal
    knots, values = np.array(list(points)), np.array(list(points.values()))
    curve = PchipInterpolator(np.concatenate([knots - 1, knots, knots + 1]), np.tile(values, 3))
    return curve(np.mod(phase, 1.0))


def leg_angles(gait: Gait, phase: Array, swing: float) -> tuple[Array, Array, Array]:
    """Radians at hip (forward), knee (backward) and ankle (toes up) of a leg that strikes at phase 0: appendix C."""
    fast = max(0.0, gait.relative_speed - 1.3) / 1.7  # the control points rest up to RV 1.3 and shift beyond it
    cycle = 1.346 / gait.relative_speed**0.5
    support = 0.752 - 0.143 / cycle  # relative duration of support
    hip = cyclic([0.2 * fast - 0.1, 0.5, 0.9], [25 + 5 * fast, -15, 25 + 6 * fast], phase)
    knee = cyclic(
        [0.17 - 0.05 * fast, 0.4, 0.75 - 0.05 * fast, 1 - 0.03 * fast],
        [3 + 22 * fast, 3, 70 - 5 * fast, 3 + 3 * fast],
        phase,
    )
    ankle = cyclic(
        [0, 0.08, 0.5 - 0.1 * fast, support, 0.85],
        [-3 + 5 * fast, -18 + 4 * fast, 8 - 3 * fast, -20 - 8 * fast, -3 + 5 * fast],
        phase,
    )
    return np.radians(hip * gait.legs * swing), np.radians(knee * gait.knees * swing), np.radians(ankle)


def arm_angles(gait: Gait, phase: Array, swing: float) -> tuple[Array, Array]:
    """Radians at shoulder and elbow (both forward) of the arm on the side that strikes at phase 0: appendix D."""
    rv = gait.relative_speed
    slow, fast = (min(rv, 1.3) - 0.5) / 0.8, max(0.0, rv - 1.3) / 1.7
    reach = 9.88 * rv * gait.arms * swing
    shoulder = 3 - reach / 2 - reach * np.cos(2 * np.pi * phase)
    elbow = cyclic(
        [0.05, 0.5 + 0.01 * slow + 0.04 * fast, 0.9 - 0.1 * fast],
        [6 + 8 * slow - 6 * fast, 20 + 24 * slow + 26 * fast, 8 + 9 * slow - 6 * fast],
        phase,
    )
    return np.radians(shoulder), np.radians(elbow + gait.elbows_deg)


def spine(gait: Gait, phase: Array) -> tuple[Array, Array, Array, Array]:
    """Of the spine's base the path about steady walking (T, 3) in m: appendix A; then radians (T,): the thorax's
    lean forward, the turns of thorax and pelvis that bring the right side forward: appendices B and D.

    The pelvis's drop towards the swinging leg is left out: it moves no joint by more than a centimetre.
    """
    rv, cycle = gait.relative_speed, 1.346 / gait.relative_speed**0.5
    surge = 0.625 - (0.752 - 0.143 / cycle)
    forward = -0.021 * np.sin(4 * np.pi * (phase + surge))
    left = -0.032 * np.sin(2 * np.pi * (phase - 0.1))
    up = 0.015 * rv * (np.sin(2 * np.pi * (2 * phase - 0.35)) - 1)
    lean = np.radians(2 - 2 * np.sin(2 * np.pi * (2 * phase - 0.1)))
    thorax = cyclic([0.1, 0.4, 0.6, 0.9], [-4 / 3 * rv, 4.5 / 3 * rv, 4 / 3 * rv, -4.5 / 3 * rv], phase)
    pelvis = 4 * rv * np.cos(2 * np.pi * phase)
    return np.stack([forward, left, up], 1) * gait.leg_m, lean, np.radians(thorax), np.radians(pelvis)


def walk(gait: Gait, phase: Array, travelled_m: Array) -> Body:
    """The body at T times, each given by its phase (T,) in cycles and the way travelled (T,) in m."""
    h = gait.height_m
    base, lean, thorax, pelvis = spine(gait, phase)
    base[:, 0] += travelled_m
    base[:, 2] += gait.leg_m + ANKLE_HEIGHT * h
    up, shoulder_line, hip_line = _turned(np.pi - lean, thorax), _left(thorax), _left(pelvis)
    neck = base + TORSO * h * up
    ends = [(neck, neck + HEAD * h * up, shoulder_line), (base, neck, shoulder_line)]  # of every part, and across it
    for side, shift in ((-1, 0.0), (1, 0.5 - gait.lag)):
        hip, knee, ankle = leg_angles(gait, phase + shift, 1 - side * gait.leg_asymmetry)
        shoulder, elbow = arm_angles(gait, phase + shift, 1 - side * gait.arm_asymmetry)
        joints = [neck + side * SHOULDERS / 2 * h * shoulder_line]
        for length, angle in ((UPPER_ARM, shoulder - lean), (LOWER_ARM, shoulder - lean + elbow)):
            joints.append(joints[-1] + length * h * _turned(angle, thorax))
            ends.append((joints[-2], joints[-1], shoulder_line))
        joints = [base + side * HIPS / 2 * h * hip_line]
        for length, angle in ((THIGH, hip), (SHIN, hip - knee), (FOOT, hip - knee + ankle + np.pi / 2)):
            joints.append(joints[-1] + length * h * _turned(angle, pelvis))
            ends.append((joints[-2], joints[-1], hip_line))
    starts, stops, across = (np.stack(each, 1) for each in zip(*ends, strict=True))
    lengths = np.array([LENGTH[_kind(part)] for part in PARTS]) * h
    scale = gait.girth * h / 1.75
    semi_axes = np.array([[side * scale for side in THICKNESS[_kind(part)]] for part in PARTS])
    return Body(
        centres=(starts + stops) / 2,
        along=(stops - starts) / lengths[:, None],
        across=across,
        semi_axes=np.concatenate([semi_axes, lengths[:, None] / 2], 1),
    )


def _kind(part: str) -> str:
    return part.removeprefix("right ").removeprefix("left ")


def _turned(angle: Array, turn: Array) -> Array:
    """(T, 3) unit vectors: straight down, swung forward by `angle`, then turned about the vertical."""
    return np.stack([np.sin(angle) * np.cos(turn), np.sin(angle) * np.sin(turn), -np.cos(angle)], 1)


def _left(turn: Array) -> Array:
    return np.stack([-np.sin(turn), np.cos(turn), np.zeros_like(turn)], 1)
