"""Pictures for the demo, drawn by code: a small world of toys, seen by a painter and by a pen.

The seed alone composes a scene; both styles then read the same parts and the same layers of colour and
tone. So a pair differs in its hand and in nothing else, and a kind added to the table appears in both.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import chain
from pathlib import Path

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFilter

from isonext.data.images import BadPicture, open_picture, save_picture

STYLES = ("shaded", "ink")  # soft painted volumes; a pen on warm paper, hatching, a pale wash of colour
SUPERSAMPLE = 4  # PIL's polygons have hard edges: draw this many times larger, then reduce

INK, PAPER = np.array([44, 35, 48]), np.array([250, 242, 224])
SHADOW_TINT = np.array([0.30, 0.25, 0.46])  # what is left of a colour where no light falls
LIGHT_TINT = np.array([1.14, 1.09, 0.97])
LIGHT = (-0.52, -0.58, 0.63)  # towards the lamp: x right, y down, z towards the viewer
SHADOW_LEAN = (0.62, 0.2)  # a point at height 1 drops its shadow this far to the right and back
FLAT_TONES = {"lit": 0.86, "plain": 0.66, "dim": 0.42, "dark": 0.24}  # 0 black, 0.72 neutral, 1 highlight
PAINTS = "#d63e36 #ee8030 #f6be38 #80b042 #2a8e6a #2696ac #3468be #7654b0 #ce4e8c #f29296 #f0e2c0"
FIXED = {"cream": "#f6ecd2", "wood": "#8e5c3c", "green": "#4c9650", "gold": "#ffd060", "black": "#342630"}
BACKDROPS = [  # sky above, sky at the horizon, ground far, ground near, hills
    "#68aad6 #e2ecde #b6ca78 #70a04e #86b48c",  # meadow
    "#5c5ca0 #fab896 #ce9678 #945a62 #8a6a96",  # dusk
    "#a8cec4 #e6ead6 #dcb078 #b07648 #bcd0bc",  # wooden table
    "#f2c68a #fcead0 #84aab4 #4e7c96 #eeb48e",  # blue cloth
    "#d698a6 #f8dad0 #ecd4ba #c69e88 #dcaab0",  # rose room
    "#24386a #6e88b4 #6c7ca6 #3c4a78 #4c6292",  # night
    "#78bcc2 #f2eed0 #f4dca4 #dcae6c #9cc8bc",  # beach
]
# Every kind of object: name, greatest tilt (radians) and lift (its heights), then "|" and its parts, each
# over those before: colour ("main" and "accent" are the object's own), shade ("round", "tube", a flat tone,
# "decal": lit as what lies beneath, "line": solid ink), curve, x y ... and, after a comma, more such areas.
# It stands on y = 0, y up, centred on x = 0, about 1 high. A knot written twice makes a corner.
KINDS_TABLE = """
sun 0 0 | main lit ellipse 0 .5 .5 .5
hill 0 0 | main plain smooth -1 0 -1 0 1 0 1 0 .55 .26 .15 .52 -.2 .5 -.6 .22
ball .7 0 | main round ellipse 0 .5 .5 .5 | accent decal lathe 0 .27 .49 .4 .49 .4 .47 .67 .47 .67 0 .55
present 0 0 | main lit sharp -.55 .62 -.05 .8 .52 .66 0 .46 | main plain sharp -.55 .62 0 .46 0 -.04 -.52 .12
  | main dark sharp 0 .46 .52 .66 .5 .16 0 -.04
  | accent decal sharp -.33 .556 -.2 .518 -.19 .02 -.31 .056, .21 .54 .33 .59 .31 .08 .2 .04
  | accent lit sharp .21 .54 .33 .59 -.23 .735 -.35 .69, -.33 .556 -.2 .518 .31 .711 .18 .744
  | accent lit smooth 0 .63 0 .63 -.2 .66 -.3 .88 -.1 .9 | accent dim smooth 0 .63 0 .63 .2 .68 .28 .9 .08 .9
vase .04 0 | green line sharp -.03 .5 .02 .5 -.19 .98 -.24 .98, -.02 .5 .03 .5 .26 .9 .21 .9
  | accent round ellipse -.26 .94 .18 .17, .28 .88 .17 .16, .02 1.08 .19 .18
  | gold line ellipse -.26 .94 .05 .05, .28 .88 .05 .05, .02 1.08 .05 .05
  | main tube lathe 0 -.02 .2 0 .37 .24 .3 .46 .15 .58 .2 .7 | main dark ellipse 0 .7 .2 .045
mug 0 0 | main dim smooth .3 .7 .56 .66 .64 .44 .54 .2 .3 .12 .3 .26 .44 .32 .49 .44 .44 .54 .3 .56
  | main tube lathe 0 -.04 .3 0 .38 .08 .38 .8 .38 .8 | main lit ellipse 0 .8 .38 .1
  | accent decal lathe 0 .22 .38 .28 .38 .28 .38 .5 .38 .5 0 .44 | black line ellipse 0 .79 .28 .055
apple .2 0 | main round lathe 0 .04 .18 0 .4 .2 .49 .56 .36 .8 .16 .86 0 .78 | main dark ellipse 0 .78 .12 .04
  | wood line sharp -.03 .78 .03 .78 .09 1 .02 1 | green lit smooth .05 .88 .05 .88 .2 1.1 .48 1.06 .32 .88
pear .2 0 | main round lathe .12 0 .33 .07 .41 .28 .29 .54 .18 .78 .08 .93
  | wood line sharp -.03 .9 .03 .9 .07 1.12 0 1.12 | green plain smooth .02 1 .02 1 -.12 1.16 -.4 1.1 -.24 .95
mushroom .12 0 | cream tube lathe 0 -.02 .2 0 .17 .06 .13 .3 .15 .55 | cream dark ellipse 0 .47 .4 .07
  | main round lathe 0 .47 .44 .42 .55 .5 .46 .78 .2 .98
  | cream decal ellipse -.2 .8 .11 .085, .16 .86 .08 .06, .3 .63 .1 .085, -.4 .57 .065 .075, -.02 .6 .075 .055
house 0 0 | accent plain sharp .22 .8 .36 .82 .36 1.1 .22 1.1 | cream dim sharp .06 -.04 .54 .06 .54 .5 .06 .5
  | cream lit sharp -.5 .03 .06 -.04 .06 .5 -.22 .88 -.5 .52 | gold lit sharp .22 .19 .42 .22 .42 .41 .22 .39
  | main plain sharp -.22 .93 .36 .95 .64 .5 .1 .43 | main lit sharp -.22 .93 -.58 .48 -.5 .45 -.22 .8
  | accent dim sharp -.3 0 -.12 -.02 -.12 .32 -.3 .33
tree 0 0 | wood tube lathe 0 -.02 .13 0 .13 0 .07 .2 .1 .5
  | main round ellipse .3 .54 .23 .2, -.3 .56 .24 .2, 0 .5 .22 .17, .22 .8 .23 .2, -.16 .84 .27 .23
pine 0 0 | wood tube sharp -.09 0 .09 0 .09 .25 -.09 .25
  | green tube lathe 0 .1 .48 .2 .48 .2 0 .72, 0 .39 .4 .48 .4 .48 0 .94, 0 .67 .3 .75 .3 .75 0 1.15 0 1.15
fish .35 .35 | accent plain smooth -.12 .58 -.12 .58 -.02 .86 .26 .78 .24 .54 .24 .54
  | accent dim smooth .28 .4 .28 .4 .64 .7 .64 .7 .55 .4 .64 .1 .64 .1
  | main round smooth -.54 .38 -.32 .62 .04 .67 .4 .43 .4 .37 .04 .13 -.32 .16
  | accent decal smooth -.08 .67 -.08 .67 0 .4 -.08 .13 -.08 .13 .08 .14 .08 .14 .16 .4 .08 .66 .08 .66
  | cream lit ellipse -.32 .46 .1 .1 | black line ellipse -.34 .46 .045 .045
star .3 .15 | main lit sharp 0 1.03 -.14 .67 -.52 .65 -.23 .41 -.32 .03 0 .24 .32 .03 .23 .41 .52 .65 .14 .67
  | main dim sharp 0 .48 0 1.03 .14 .67, 0 .48 -.32 .03 0 .24
  | main plain sharp 0 .48 -.52 .65 -.23 .41, 0 .48 .32 .03 0 .24
  | main dark sharp 0 .48 .32 .03 .23 .41, 0 .48 .52 .65 .23 .41
boat .1 0 | wood line sharp -.03 .3 .03 .3 .025 1.14 -.02 1.14
  | cream lit smooth 0 1.04 0 1.04 -.2 .6 -.48 .4 -.48 .4 0 .36 0 .36
  | accent plain smooth 0 1.04 0 1.04 .3 .64 .42 .4 .42 .4 0 .36 0 .36
  | main tube smooth -.62 .32 -.62 .32 0 .28 .62 .34 .62 .34 .44 .04 .3 0 -.36 0 -.48 .06
  | cream decal smooth -.62 .32 -.62 .32 0 .28 .62 .34 .62 .34 .58 .22 .58 .22 0 .16 -.57 .2 -.57 .2
duck .12 0 | main round smooth -.34 .12 0 0 .36 .06 .54 .3 .6 .6 .6 .6 .38 .46 .1 .48 -.2 .46 -.42 .3
  | main plain smooth -.02 .36 .2 .4 .46 .4 .46 .4 .36 .18 .1 .14 | main round ellipse -.2 .7 .27 .26
  | accent plain smooth -.38 .74 -.38 .74 -.66 .68 -.62 .58 -.38 .58 | black line ellipse -.27 .78 .045 .055
cactus .05 0 | green round smooth .1 .5 .24 .46 .26 .74 .36 .84 .44 .72 .42 .42 .28 .34 .1 .38
  | green round smooth -.1 .62 -.22 .6 -.22 .8 -.32 .9 -.4 .8 -.38 .54 -.26 .46 -.1 .5
  | green tube lathe .16 .2 .16 .2 .17 .8 .1 1.02 | main tube sharp -.24 0 .24 0 .3 .3 -.3 .3
  | accent round ellipse .02 1.04 .1 .07 | main lit sharp -.34 .28 .34 .28 .34 .38 -.34 .38
"""


@dataclass(frozen=True)
class Part:
    """One area of an object, in the object's frame; once placed, of the picture (in its sides, y down)."""

    outline: np.ndarray  # (n, 2), closed
    colour: str  # a name; once placed, a PIL colour
    shade: str


def _outline(curve: str, numbers: list[float]) -> np.ndarray:
    """A closed outline (n, 2), in steps short enough for a pen to wobble along."""
    if curve == "ellipse":
        turn = np.linspace(0, 2 * np.pi, 36, endpoint=False)
        return np.stack([np.cos(turn), np.sin(turn)], axis=1) * numbers[2:] + numbers[:2]
    knots = np.reshape(numbers, (-1, 2))
    if curve == "lathe":  # the right half, from the bottom up, of something symmetric
        knots = np.concatenate([knots, knots[::-1][knots[::-1, 0] > 0] * [-1, 1]])
    if curve == "sharp":
        knots = np.repeat(knots, 2, axis=0)
    before, start, end, after = (np.roll(knots, shift, axis=0)[:, None] for shift in (1, 0, -1, -2))
    t = np.linspace(0, 1, 6, endpoint=False)[:, None]
    bend = (2 * before - 5 * start + 4 * end - after) * t**2 + (3 * (start - end) + after - before) * t**3
    arcs = start + 0.5 * ((end - before) * t + bend)  # Catmull-Rom
    return arcs[np.any(start != end, axis=(1, 2))].reshape(-1, 2)  # a doubled knot has no arc of its own


def _read_kinds(table: str) -> dict[str, tuple[float, float, list[Part]]]:
    """Kind -> greatest tilt, greatest lift, parts."""
    kinds: dict[str, tuple[float, float, list[Part]]] = {}
    for entry in table.replace("\n ", " ").strip().splitlines():
        head, *groups = entry.split("|")
        name, tilt, lift = head.split()
        kinds[name] = (float(tilt), float(lift), [])
        for colour, shade, curve, areas in (group.split(maxsplit=3) for group in groups):
            outlines = [_outline(curve, [float(n) for n in area.split()]) for area in areas.split(",")]
            kinds[name][2].extend(Part(outline, colour, shade) for outline in outlines)
    return kinds


KINDS = _read_kinds(KINDS_TABLE)
SCENERY = ("sun", "hill")


@dataclass(frozen=True)
class Thing:
    """One object of the scene. Lengths in sides of the picture, y down."""

    kind: str
    x: float
    y: float  # where it, or at least its shadow, touches the ground
    size: float
    stretch: float  # width over the kind's own width
    tilt: float  # radians
    lift: float  # height above the ground
    main: str
    accent: str

    @cached_property
    def parts(self) -> list[Part]:
        """Its parts, placed, from back to front."""
        colours = FIXED | {"main": self.main, "accent": self.accent}
        cos, sin = self.size * np.cos(self.tilt), self.size * np.sin(self.tilt)
        middle = np.array([self.x, self.y - self.lift - 0.45 * self.size])  # it turns about its middle
        placed = []
        for part in KINDS[self.kind][2]:
            local = (part.outline - [0, 0.45]) * [self.stretch, -1]
            placed.append(Part(local @ [[cos, sin], [-sin, cos]] + middle, colours[part.colour], part.shade))
        return placed


@dataclass(frozen=True)
class Scene:
    """Everything both styles need to know."""

    stage: np.ndarray  # (4, 3): sky above, sky at the horizon, ground far, ground near
    horizon: float
    things: list[Thing]  # from far to near: a sun and hills, perhaps, then the objects


def _compose(rng: np.random.Generator) -> Scene:
    """A stage, and one to four objects, each in a column of its own, in colours unlike the ground's."""
    *colours, hill = BACKDROPS[rng.integers(len(BACKDROPS))].split()
    stage = np.array([ImageColor.getrgb(colour) for colour in colours], np.float32)
    horizon = rng.uniform(0.5, 0.66)
    things = []
    if rng.random() < 0.5:
        x, y, size = rng.uniform([0.12, 0.18, 0.12], [0.88, 0.36, 0.22])
        things.append(Thing("sun", x, y, size, 1, 0, 0, "#fff0b8", hill))
    for _ in range(rng.integers(0, 3)):
        x, size, stretch = rng.uniform([-0.1, 0.2, 1.2], [1.1, 0.45, 2.2])
        things.append(Thing("hill", x, horizon, size, stretch, 0, 0, hill, hill))
    ground = stage[2:].mean(axis=0)
    paints = [p for p in PAINTS.split() if np.abs(ImageColor.getrgb(p) - ground).sum() > 110]
    paints = rng.permutation(paints).tolist()
    count = int(rng.integers(1, 5))
    kinds = rng.choice([kind for kind in KINDS if kind not in SCENERY], count, replace=False).tolist()
    for column, kind in enumerate(kinds):
        max_tilt, max_lift, _ = KINDS[kind]
        depth, shift, scale, stretch = rng.uniform([0, -0.15, 0.86, 0.88], [1, 0.15, 1.14, 1.14])
        size = (0.58, 0.49, 0.42, 0.36)[count - 1] * scale * (0.85 + 0.3 * depth)
        tilt, lift = rng.uniform(-max_tilt, max_tilt), rng.uniform(0, max_lift) * size
        x = 0.5 + (column + 0.5 - count / 2 + shift) / count * 0.84
        y = max(horizon + 0.08 + (0.86 - horizon) * depth, 1.15 * size + lift)  # its top stays in sight
        main, accent = paints[column], paints[-1 - column]
        things.append(Thing(kind, x, y, size, stretch, tilt, lift, main, accent))
    return Scene(stage, horizon, sorted(things, key=lambda thing: thing.y))


@lru_cache
def _tone_stamp(shade: str) -> Image.Image:
    """How light falls on a shade that fills its bounding box, as an 'L' image to be resized."""
    v, u = np.mgrid[-1:1:96j, -1:1:96j]
    if shade in FLAT_TONES:
        tone = FLAT_TONES[shade] - 0.06 * (u + v)
    else:
        upright = {"round": 1.0, "tube": 0.25}[shade]  # a tube hardly turns towards the sky
        away = u**2 + upright**2 * v**2
        facing = u * LIGHT[0] + upright * v * LIGHT[1] + np.sqrt(np.clip(1 - away, 0, 1)) * LIGHT[2]
        bounce = 0.14 * np.clip(away - 0.55, 0, 1) * (facing < 0.2)  # light thrown back by the ground
        tone = 0.16 + 0.84 * np.clip(0.28 + 0.74 * facing, 0, 1) ** 1.25 + bounce
    return Image.fromarray(np.uint8(np.clip(tone, 0, 1) * 255))


def _layers(scene: Scene, side: int) -> tuple[Image.Image, Image.Image]:
    """What both styles share: local colour (RGB) and tone (L), `side` pixels square."""
    y, x = (np.arange(side)[:, None] + 0.5) / side, np.linspace(0, 1, side)
    is_sky = y < scene.horizon
    along = np.where(is_sky, y / scene.horizon, (y - scene.horizon) / (1 - scene.horizon))
    above, low, far, near = scene.stage
    column = np.where(is_sky, above + (low - above) * along, far + (near - far) * along)
    colour = Image.fromarray(np.uint8(column)[:, None]).resize((side, side))
    ground = (0.84 - 0.12 * along - 0.1 * along * x) * (1 - 0.72 * _cast_shadows(scene, side))
    tone = Image.fromarray(np.uint8(np.where(is_sky, 0.74, ground) * 255))
    for part in chain.from_iterable(thing.parts for thing in scene.things):
        xy = part.outline * side
        ImageDraw.Draw(colour).polygon(xy.ravel().tolist(), fill=part.colour)
        if part.shade not in ("decal", "line"):
            left, top = np.floor(xy.min(axis=0)).astype(int).tolist()
            right, bottom = np.ceil(xy.max(axis=0)).astype(int).tolist()
            mask = Image.new("L", (right - left + 1, bottom - top + 1))
            ImageDraw.Draw(mask).polygon((xy - [left, top]).ravel().tolist(), fill=255)
            tone.paste(_tone_stamp(part.shade).resize(mask.size), (left, top), mask)
    return colour, tone


def _cast_shadows(scene: Scene, side: int) -> np.ndarray:
    """Every object's silhouette laid along the ground, away from the light: (side, side), 1 in shadow."""
    small = side // 4  # soft anyway, and sixteen times cheaper
    shadow = Image.new("L", (small, small))
    for thing in (thing for thing in scene.things if thing.kind not in SCENERY):
        foot = _outline("ellipse", [thing.x, thing.y, 0.36 * thing.size, 0.06 * thing.size])
        for outline in [foot] + [part.outline for part in thing.parts]:
            height = thing.y - outline[:, 1:]
            cast = np.hstack([outline[:, :1] + SHADOW_LEAN[0] * height, thing.y - SHADOW_LEAN[1] * height])
            ImageDraw.Draw(shadow).polygon((cast * small).ravel().tolist(), fill=255)
    shadow = shadow.filter(ImageFilter.GaussianBlur(small / 64))
    return np.asarray(shadow.resize((side, side), Image.Resampling.BILINEAR), np.float32) / 255


def _noise(rng: np.random.Generator, rows: int, columns: int, side: int) -> np.ndarray:
    """A smooth random field (side, side) with that many bumps down and across."""
    field = Image.fromarray(rng.standard_normal((rows, columns)).astype(np.float32))
    return np.asarray(field.resize((side, side), Image.Resampling.BICUBIC))


def _reduced(image: Image.Image, size: int) -> np.ndarray:
    """(size, size, channels) in [0, 1]."""
    pixels = np.asarray(image.resize((size, size), Image.Resampling.LANCZOS), np.float32) / 255
    return pixels.reshape(size, size, -1)


def _render_shaded(scene: Scene, size: int, rng: np.random.Generator) -> np.ndarray:
    """Colour times light: shadows turn cool, highlights warm, and a brush leaves its streaks. In [0, 255]."""
    colour, tone = (_reduced(layer, size) for layer in _layers(scene, size * SUPERSAMPLE))
    tone = tone + 0.025 * _noise(rng, 1 + size // 3, 1 + size // 9, size)[..., None]
    gloom = np.clip(1 - tone / 0.72, 0, 1) ** 1.1
    glow = np.clip((tone - 0.72) / 0.28, 0, 1)
    shine = np.clip((tone - 0.92) / 0.08, 0, 1) ** 1.5
    lit = colour * (1 + gloom * (SHADOW_TINT - 1)) * (1 + glow * (LIGHT_TINT - 1))
    return 255 * (lit + 0.55 * shine * (1 - lit))


def _render_ink(scene: Scene, size: int, rng: np.random.Generator) -> np.ndarray:
    """Paper, a pale wash of colour, hatching, and the pen's outlines. In [0, 255]."""
    side = size * SUPERSAMPLE
    nib = 1.4 * SUPERSAMPLE * (size / 64) ** 0.75  # a larger sheet gets a relatively finer pen
    clear = scene.stage * 250 / scene.stage.max(axis=1, keepdims=True)
    colour_layer, tone_layer = _layers(replace(scene, stage=clear + 0.35 * (255 - clear)), side)
    hatching = _hatching(np.asarray(tone_layer, np.float32) / 255, nib, rng)
    lines = _pen_lines(scene, side, nib, rng)
    ink = _reduced(Image.fromarray(np.maximum(lines, hatching)), size)
    colour, tone = _reduced(colour_layer, size), _reduced(tone_layer, size)
    colour = colour / np.maximum(colour.max(axis=2, keepdims=True), 0.2) ** 0.6  # dark paint, clear wash
    load = 0.62 + 0.07 * _noise(rng, 6, 6, size)[..., None]  # pigment pools here and there
    wash = 1 - load * np.clip(1.7 - tone, 0.5, 1) * (1 - colour)  # and a highlight is left bare
    paper = wash * (PAPER + 2.2 * rng.standard_normal((size, size, 1)))
    return paper + 0.94 * ink * (INK - paper)


def _hatching(tone: np.ndarray, nib: float, rng: np.random.Generator) -> np.ndarray:
    """Slanted strokes where the tone is dark, crossed where it is darker; (side, side) uint8."""
    y, x = np.mgrid[: len(tone), : len(tone)].astype(np.float32)
    waver = _noise(rng, 7, 7, len(tone))
    tone = tone + 0.025 * waver
    ink = np.zeros(tone.shape, bool)
    for across, limit in ((x + y, 0.54), (x - y, 0.32)):
        from_middle = np.abs((across / (3.7 * nib) + 0.12 * waver) % 1 - 0.5)
        half_width = np.where(tone < limit, 0.11 + 0.22 * (1 - tone / limit), 0)  # the darker, the wider
        ink |= from_middle < half_width
    return np.uint8(ink * 235)


def _pen_lines(scene: Scene, side: int, nib: float, rng: np.random.Generator) -> np.ndarray:
    """Visible outlines, (side, side) uint8: bolder the nearer, and silhouettes bolder than what is inside."""
    sheet = Image.new("L", (side, side))
    draw = ImageDraw.Draw(sheet)
    ground = _outline("sharp", [-0.1, scene.horizon, 1.1, scene.horizon, 1.1, 1.2, -0.1, 1.2])
    _trace(draw, ground * side, 0.65 * nib, rng)
    for thing in scene.things:
        width = nib * min(1, 0.5 + 0.6 * thing.y)
        for part in thing.parts:
            draw.polygon(_offset(part.outline * side, 0.75 * width), fill=255)
        for part in thing.parts:
            if part.shade == "line":
                draw.polygon((part.outline * side).ravel().tolist(), fill=255)
            else:
                _trace(draw, part.outline * side, 0.7 * width, rng)
    return np.asarray(sheet)


def _trace(draw: ImageDraw.ImageDraw, xy: np.ndarray, width: float, rng: np.random.Generator) -> None:
    """A wobbly line that swells and thins, and nothing inside it: what lies behind is wiped out."""
    turn = np.linspace(0, 2 * np.pi, len(xy), endpoint=False)
    wave = np.sin([[2], [5], [3], [7]] * turn + rng.uniform(0, 2 * np.pi, (4, 1)))
    wobble = width * (0.2 * wave[0] + 0.15 * wave[1])
    swell = width * (0.5 + 0.14 * wave[2] + 0.08 * wave[3])
    draw.polygon(_offset(xy, wobble + swell), fill=255)
    draw.polygon(_offset(xy, wobble - swell), fill=0)


def _offset(xy: np.ndarray, distance: np.ndarray | float) -> list[float]:
    """The closed outline moved outwards, flat as PIL likes it."""
    after = np.roll(xy, -1, axis=0)
    along = after - np.roll(xy, 1, axis=0)
    turning = np.sign(np.sum(xy[:, 0] * after[:, 1] - xy[:, 1] * after[:, 0]))  # clockwise or not
    step = turning * distance / np.maximum(np.hypot(along[:, 0], along[:, 1]), 1e-6)
    return (xy + np.stack([along[:, 1] * step, -along[:, 0] * step], axis=1)).ravel().tolist()


def draw_scene(seed: int, style: str, size: int = 64) -> Image.Image:
    """The scene of this seed in this style, RGB, `size` pixels square; ValueError for an unknown style."""
    if style not in STYLES:
        raise ValueError(f"unknown style {style!r}: the styles are {', '.join(STYLES)}")
    scene = _compose(np.random.default_rng(seed))
    render = _render_shaded if style == "shaded" else _render_ink
    pixels = render(scene, size, np.random.default_rng([seed, STYLES.index(style)]))
    return Image.fromarray(np.uint8(np.clip(np.rint(pixels), 0, 255)))


def draw_folders(
    root: Path,
    *,
    num_train: int,  # pictures a style, none of a scene the other style shows
    num_test: int,  # pairs: one number, one scene
    size: int,  # pixels a side
    progress: Callable[[int], None] | None = None,  # called with 1 after each picture drawn or found
) -> None:
    """Write root/{train,test}/<style>/00001.png ...; whole pictures already there are kept."""
    for index, style in enumerate(STYLES):
        for split, count, residue in (("train", num_train, index + 1), ("test", num_test, 0)):
            folder = root / split / style
            for number in range(1, count + 1):
                path = folder / f"{number:05d}.png"
                if not _is_whole(path, size):
                    seed = number * (len(STYLES) + 1) + residue  # residues keep the seeds disjoint
                    save_picture(draw_scene(seed, style, size), path)
                if progress is not None:
                    progress(1)


def _is_whole(path: Path, size: int) -> bool:
    """Whether a complete picture of this size is there already."""
    try:
        return open_picture(path).size == (size, size)
    except BadPicture:  # absent, cut short, or no picture
        return False
