"""Drawing: fixed cameras with a background each, things that stand in front of it, daylight, night, sensor noise.

Everything is float32 RGB from 0 to 255, shape (HEIGHT, WIDTH, 3), until `expose` makes a picture of it. A thing is drawn
through its coverage mask (0 to 1), and its true box is the mask's extent, so that boxes fit what can be seen.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import cv2
import numpy as np
from numpy.typing import NDArray

from haechi.components.shared.dataset import Box

__all__ = ["CAMERAS", "CLASSES", "DISTRACTORS", "HEIGHT", "WIDTH", "Scene", "Thing", "paint", "random_scene"]

Floats = NDArray[np.float32]
Pixels = NDArray[np.uint8]

WIDTH, HEIGHT = 320, 240
CAMERAS = ("gate-east", "yard-north", "dock-2", "corridor-b", "boiler-room")
CLASSES = ("smoke", "fire", "person_down")
DISTRACTORS = ("person_standing", "crate", "cart")
_VISIBLE = 0.3  # coverage from which a pixel belongs to a thing's box
_SIZES = {  # width and height in pixels, from and to
    "smoke": ((70, 110), (60, 95)),
    "fire": ((34, 60), (46, 80)),
    "person_down": ((74, 104), (26, 38)),
    "person_standing": ((22, 30), (66, 88)),
    "crate": ((36, 56), (34, 50)),
    "cart": ((60, 84), (34, 46)),
}


@dataclass(frozen=True)
class Thing:
    """One thing in a scene: kind, centre and size in pixels, and the seed of its looks."""

    kind: str
    x: float
    y: float
    width: float
    height: float
    seed: int


@dataclass(frozen=True)
class Scene:
    """What one camera sees for a moment.

    Attributes:
        camera: one of CAMERAS.
        night: lamps and flames give the only light.
        things: what stands there, back to front.
        seed: of the light: the sun's strength, clouds' and lamps' places.
    """

    camera: str
    night: bool
    things: tuple[Thing, ...]
    seed: int


def random_scene(rng: np.random.Generator, camera: str, night: bool, wanted: int, distractors: int) -> Scene:
    """A scene with up to `wanted` things of the safety classes and some harmless ones, none hiding another."""
    kinds = [str(kind) for kind in rng.choice(CLASSES, wanted)] + [str(k) for k in rng.choice(DISTRACTORS, distractors)]
    things: list[Thing] = []
    for kind in kinds:
        for _ in range(20):
            thing = _random_thing(rng, kind)
            if all(_apart(thing, other) for other in things):
                things.append(thing)
                break
    return Scene(camera, night, tuple(things), int(rng.integers(2**31)))


def _random_thing(rng: np.random.Generator, kind: str) -> Thing:
    (narrow, wide), (low, tall) = _SIZES[kind]
    width, height = rng.uniform(narrow, wide), rng.uniform(low, tall)
    top = 60 if kind == "smoke" else 120
    x = rng.uniform(width / 2 + 4, WIDTH - width / 2 - 4)
    y = rng.uniform(max(top, height / 2 + 4), HEIGHT - height / 2 - 6)
    return Thing(kind, float(x), float(y), float(width), float(height), int(rng.integers(2**31)))


def _apart(a: Thing, b: Thing) -> bool:
    return abs(a.x - b.x) > (a.width + b.width) / 2 + 3 or abs(a.y - b.y) > (a.height + b.height) / 2 + 3


def paint(scene: Scene, moment: int) -> tuple[Pixels, tuple[Box, ...]]:
    """The picture of a scene and the true boxes of its safety classes.

    Args:
        scene: what is there.
        moment: seed of sensor noise; two moments of one scene are near-duplicates.

    Returns:
        uint8 RGB (HEIGHT, WIDTH, 3), and boxes in pixels.
    """
    lit, boxes = _view(scene)
    return _expose(lit, scene.night, np.random.default_rng([scene.seed, moment])), boxes


@lru_cache(maxsize=4)  # the frames of a burst come one after another
def _view(scene: Scene) -> tuple[Floats, tuple[Box, ...]]:
    canvas = _background(scene.camera).copy()
    flames: list[Floats] = []
    boxes = []
    for thing in scene.things:
        mask, colour = _DRAWN[thing.kind](thing, np.random.default_rng(thing.seed))
        if thing.kind == "fire":
            flames.append(mask[..., None] * colour)
        canvas += mask[..., None] * (colour - canvas)
        if thing.kind in CLASSES:
            boxes.append(_extent(thing.kind, mask))
    return _light(canvas, scene, flames), tuple(boxes)


def _extent(kind: str, mask: Floats) -> Box:
    rows, columns = np.flatnonzero(mask.max(axis=1) > _VISIBLE), np.flatnonzero(mask.max(axis=0) > _VISIBLE)
    return Box(kind, float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1))


# ---- what stands there: coverage mask (HEIGHT, WIDTH) and colour, one or one a pixel


def _smoke(thing: Thing, rng: np.random.Generator) -> tuple[Floats, Floats]:
    mask = np.zeros((HEIGHT, WIDTH), np.float32)
    for _ in range(16):
        x = thing.x + rng.uniform(-0.30, 0.30) * thing.width
        y = thing.y + rng.uniform(-0.30, 0.30) * thing.height
        cv2.circle(mask, _point(x, y), int(thing.width * rng.uniform(0.12, 0.2)), 1.0, -1)
    mask = np.asarray(cv2.GaussianBlur(mask, (0, 0), 4), np.float32) * 0.85
    grey = rng.uniform(175, 215) + 22 * _clouds(rng, 9)
    return mask, np.repeat(grey[..., None], 3, axis=2).astype(np.float32)


def _fire(thing: Thing, rng: np.random.Generator) -> tuple[Floats, Floats]:
    mask = np.zeros((HEIGHT, WIDTH), np.float32)
    base, left = thing.y + thing.height / 2, thing.x - thing.width / 2
    tongues = int(rng.integers(3, 5))
    outline = [(left, base)]
    for index in range(tongues):
        middle = left + thing.width * (index + 0.5) / tongues
        peak = thing.height * (1.0 if index == tongues // 2 else rng.uniform(0.5, 0.85))
        valley = left + thing.width * (index + 1) / tongues
        outline += [(middle + rng.uniform(-3, 3), base - peak), (valley, base - thing.height * 0.25)]
    outline.append((left + thing.width, base))
    cv2.fillPoly(mask, [np.array(outline, np.int32)], 1.0)
    mask = np.asarray(cv2.GaussianBlur(mask, (0, 0), 1.2), np.float32)
    heat = np.clip(cv2.GaussianBlur(mask, (0, 0), thing.width / 9) * 1.5 - 0.5, 0, 1)[..., None]
    colour = np.array([250, 90, 15], np.float32) * (1 - heat) + np.array([255, 235, 110], np.float32) * heat
    return mask, np.asarray(colour, np.float32)


def _person(thing: Thing, rng: np.random.Generator) -> tuple[Floats, Floats]:
    """A figure along the longer side: head at one end, then trunk, then legs."""
    mask = np.zeros((HEIGHT, WIDTH), np.float32)
    colour = np.zeros((HEIGHT, WIDTH, 3), np.float32)
    lying = thing.width > thing.height
    length, girth = max(thing.width, thing.height), min(thing.width, thing.height)
    side = int(rng.choice([-1, 1])) if lying else -1
    clothes = [(30, 60, 150), (170, 40, 40), (35, 110, 60), (240, 200, 40), (60, 40, 90)]
    shirt, trousers = clothes[int(rng.integers(len(clothes)))], (45, 45, 60)

    def at(along: float, across: float) -> tuple[int, int]:
        a, b = side * along * length / 2, across * girth / 2
        return _point(thing.x + a, thing.y + b) if lying else _point(thing.x + b, thing.y + a)

    for tone, start, end, across, width in (
        (trousers, -0.9, -0.1, -0.35, 0.36),
        (trousers, -0.9, -0.1, 0.35, 0.36),
        (shirt, -0.1, 0.45, 0.0, 0.85),
        (shirt, 0.0, 0.3, 0.8 if lying else 0.7, 0.25),
    ):
        for target, value in ((mask, 1.0), (colour, tone)):
            cv2.line(target, at(start, across), at(end, across), value, max(3, int(girth * width)))
    for target, value in ((mask, 1.0), (colour, (214, 165, 130))):
        cv2.circle(target, at(0.78, 0.0), max(5, int(girth * 0.32)), value, -1)
    return mask, colour


def _crate(thing: Thing, rng: np.random.Generator) -> tuple[Floats, Floats]:
    mask, (left, top), (right, bottom) = _block(thing)
    colour = np.full((HEIGHT, WIDTH, 3), (150, 110, 65), np.float32) * np.float32(rng.uniform(0.8, 1.2))
    for y in range(top, bottom, 10):
        cv2.line(colour, (left, y), (right, y), (85, 60, 35), 2)
    return mask, colour


def _cart(thing: Thing, rng: np.random.Generator) -> tuple[Floats, Floats]:
    mask, (left, top), (right, bottom) = _block(thing)
    paint_colour = [(60, 130, 170), (190, 190, 60), (120, 120, 125)][int(rng.integers(3))]
    colour = np.full((HEIGHT, WIDTH, 3), paint_colour, np.float32)
    colour[top : top + 6] = 40
    for x in (left + 12, right - 12):
        for target, value in ((mask, 1.0), (colour, (20, 20, 20))):
            cv2.circle(target, (x, bottom), 7, value, -1)
    return mask, colour


def _block(thing: Thing) -> tuple[Floats, tuple[int, int], tuple[int, int]]:
    mask = np.zeros((HEIGHT, WIDTH), np.float32)
    low = _point(thing.x - thing.width / 2, thing.y - thing.height / 2)
    high = _point(thing.x + thing.width / 2, thing.y + thing.height / 2)
    cv2.rectangle(mask, low, high, 1.0, -1)
    return mask, low, high


_DRAWN: dict[str, Callable[[Thing, np.random.Generator], tuple[Floats, Floats]]] = {
    "smoke": _smoke,
    "fire": _fire,
    "person_down": _person,
    "person_standing": _person,
    "crate": _crate,
    "cart": _cart,
}


def _point(x: float, y: float) -> tuple[int, int]:
    return round(x), round(y)


# ---- backgrounds and light


@lru_cache(maxsize=16)
def _background(camera: str) -> Floats:
    """The camera's fixed view: wall, floor, openings and poles; drawn from its name, the same in every run."""
    rng = np.random.default_rng(zlib.crc32(camera.encode()))
    horizon = int(rng.integers(85, 125))
    wall, floor = _muted(rng, 80, 180), _muted(rng, 65, 135)
    canvas = np.empty((HEIGHT, WIDTH, 3), np.float32)
    canvas[:horizon], canvas[horizon:] = wall, floor
    _tiles(canvas, horizon, rng)
    for _ in range(int(rng.integers(3, 6))):
        x, width = int(rng.integers(0, WIDTH - 40)), int(rng.integers(22, 60))
        top, bottom = int(rng.integers(10, horizon - 30)), horizon - int(rng.integers(0, 12))
        cv2.rectangle(canvas, (x, top), (x + width, bottom), _muted(rng, 45, 200).tolist(), -1)
        cv2.rectangle(canvas, (x, top), (x + width, bottom), (35, 35, 35), 2)
    for x in rng.integers(10, WIDTH - 10, 2):
        cv2.rectangle(canvas, (int(x), 0), (int(x) + 6, horizon + 25), _muted(rng, 30, 80).tolist(), -1)
    return canvas + 10 * _clouds(rng, 5)[..., None]


def _muted(rng: np.random.Generator, low: float, high: float) -> NDArray[np.float64]:
    """A colour that is mostly grey, as buildings are."""
    return rng.uniform(low, high) + rng.uniform(-22, 22, 3)


def _tiles(canvas: Floats, horizon: int, rng: np.random.Generator) -> None:
    """Lines on wall and floor, so that the view has texture to be sharp in."""
    step = int(rng.integers(14, 26))
    for y in range(step, horizon, step):
        cv2.line(canvas, (0, y), (WIDTH, y), (canvas[y, 0] * 0.8).tolist(), 1)
    vanishing = int(rng.integers(60, WIDTH - 60))
    for x in range(-WIDTH, 2 * WIDTH, 48):
        cv2.line(canvas, (vanishing, horizon - 40), (x, HEIGHT), (canvas[-1, 0] * 0.75).tolist(), 1)


def _clouds(rng: np.random.Generator, cells: int) -> Floats:
    """Smooth noise from -1 to 1 with about `cells` lumps over the width."""
    coarse = rng.uniform(-1, 1, (max(2, cells * HEIGHT // WIDTH), cells)).astype(np.float32)
    return np.asarray(cv2.resize(coarse, (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC), np.float32)


def _light(canvas: Floats, scene: Scene, flames: list[Floats]) -> Floats:
    rng = np.random.default_rng(scene.seed)
    if scene.night:
        lamps = [_glow(rng.uniform(0, WIDTH), rng.uniform(20, 200), rng.uniform(60, 110)) for _ in range(2)]
        strength = (0.24 + 0.5 * np.minimum(np.sum(lamps, axis=0), 1.0))[..., None]
        tint = np.array([0.85, 0.92, 1.12], np.float32)
    else:
        # Clouds' shadows wander: no two bursts of a camera have the same light.
        shade = _clouds(rng, 4)
        strength = (rng.uniform(0.78, 1.08) + 0.26 * shade)[..., None]
        tint = np.array([1.03, 1.0, 0.95], np.float32)
    lit = canvas * strength * tint
    for flame in flames:
        # A flame shines by itself and reddens what is around it, most of all at night.
        own = flame.max(axis=2, keepdims=True) / 255
        lit = lit * (1 - own) + flame * own
        # A blur this wide looks the same from a quarter of the pixels.
        small = cv2.GaussianBlur(cv2.resize(flame, None, fx=0.25, fy=0.25, interpolation=cv2.INTER_AREA), (0, 0), 5.5)
        halo = cv2.resize(small, (WIDTH, HEIGHT)) * (0.9 if scene.night else 0.35)
        lit = lit + halo * (1 - own)
    return np.asarray(lit, np.float32)


def _glow(x: float, y: float, radius: float) -> Floats:
    across, down = np.meshgrid(np.arange(WIDTH), np.arange(HEIGHT))
    return np.exp(-((across - x) ** 2 + (down - y) ** 2) / (2 * radius**2)).astype(np.float32)


def _expose(lit: Floats, night: bool, rng: np.random.Generator) -> Pixels:
    """Sensor: a flicker of the exposure, noise (more of it at night), and 8 bits."""
    noise = rng.normal(0, 6.0 if night else 3.5, lit.shape)
    return np.clip(lit * rng.uniform(0.985, 1.015) + noise, 0, 255).astype(np.uint8)
