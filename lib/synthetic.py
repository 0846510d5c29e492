"""A generated image set with CIFAR-10's array shapes and ten other classes, for `make demo`.

Each 32x32 image shows one figure, or a texture in a disc or a square, of random size, place,
direction and colours on a background of changing brightness, with small rectangles behind it and
one in front, and noise. The class depends on the shape; colours and single pixels say little about
it. Mirrored images and images shifted by a few pixels stay in their class.

Measured on make(6000, 1000), where one test image is 0.1 percentage points (torch 2.14.1, AMD EPYC,
2 shared cores):
  - logistic regression on normalized pixels, L-BFGS: 35.1% at the best of six weight decays (0.3);
  - torchvision's MobileNetV2 at width 0.35, 32x32 down to 4x4 (strides in blocks 2, 4 and 7, 8.3M
    MACs, no dropout), random crop and flip, SGD Nesterov at batch 64, one cycle to 0.1 and linearly
    down, decay 5e-4, fp32: 98.4% after 10 epochs (940 steps, seed 0), 98.6% after 8 epochs on
    5,400 of the images (672 steps, seed 1); at batch 128, 10 epochs of 5,400 (420 steps): 96.9%;
  - the weights of the first network quantized per tensor, symmetric, clipped at the largest one:
    98.5% at 8 bits, 98.4% at 6, 95.8% at 4, 36.7% at 3, 10.0% at 2;
  - drawing these 7,000 images takes 1 to 2 s, on one core.
"""

import numpy as np

SIDE = 32  # pixels
UNIT = 16  # lengths are integers in 1/16 pixel
SUB = 2  # a pixel's coverage is counted on SUB x SUB points

# Ranges of uniform draws; "+-" means both signs.
RADIUS = (7, 13)  # of a figure, pixels
SHIFT = 3  # +- pixels between the centres of the figure and of the image
GROUND = (10, 150)  # level of the darker colour, per channel
CONTRAST = (20, 110)  # what the lighter colour adds to it, per channel
INVERTED = 2  # percent of the images with the darker colour in front
SLOPE = 24  # +- of the background, in 1/16 level per pixel
SPECKS = 4  # rectangles behind the figure; one more lies in front
TINT = 70  # +- levels of a speck against the background
NOISE = 26  # +- levels, per pixel and channel

TURN = 64  # directions in a full turn
COS = np.rint(256 * np.cos(2 * np.pi * np.arange(TURN) / TURN)).astype(np.int32)  # in 1/256
SIN = np.roll(COS, TURN // 4)


# Each function takes coordinates u, v of points relative to the figure's centre, and its radius r;
# it returns which points the figure covers. All are integers in 1/16 pixel, so that every machine
# draws the same pixels.


def _disc(u, v, r):
    return u * u + v * v < r * r


def _square(u, v, r):
    return np.maximum(abs(u), abs(v)) < r * 14 // 16


def _ring(u, v, r):
    return _disc(u, v, r) & ~_disc(u, v, r * 9 // 16)


def _frame(u, v, r):
    return _square(u, v, r) & ~_square(u, v, r * 9 // 16)


def _triangle(u, v, r):
    return (v < r * 10 // 16) & ((abs(u) * 222 >> 7) - v < r * 20 // 16)  # 222 / 128: sqrt(3)


def _cross(u, v, r):
    return (np.maximum(abs(u), abs(v)) < r) & (np.minimum(abs(u), abs(v)) < r * 5 // 16)


def _crescent(u, v, r):
    return _disc(u, v, r) & ~_disc(u - r // 2, v, r * 12 // 16)


def _stripes(u, v, r):
    return v % (r * 10 // 16) < r * 5 // 16


def _checks(u, v, r):
    return (u // (r // 2) + v // (r // 2)) % 2 == 1


def _dots(u, v, r):
    pitch = r * 12 // 16
    return _disc(u % pitch - pitch // 2, v % pitch - pitch // 2, pitch * 6 // 16)


FIGURES = {"disc": _disc, "ring": _ring, "square": _square, "frame": _frame,
           "triangle": _triangle, "cross": _cross, "crescent": _crescent}
TEXTURES = {"stripes": _stripes, "checks": _checks, "dots": _dots}
CLASSES = (*FIGURES, *TEXTURES)


def make(
    train: int = 6000, test: int = 1000, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return x_train, y_train, x_test, y_test: images uint8 (n, 32, 32, 3), labels uint8 (n,).

    train, test: the numbers of images. Labels are indices of CLASSES, as many of each as possible.
    The two splits are separate random streams: neither changes with the other's size.
    """
    return *_draw(train, [seed, 0]), *_draw(test, [seed, 1])


def _draw(n: int, stream: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Return n images and their labels. stream: the seed of the random numbers."""
    rng = np.random.Generator(np.random.PCG64(stream))

    def draw(low, high, *shape):  # integers from low to high, both included
        return rng.integers(low, high, (n, *shape), np.int32, endpoint=True)

    labels = rng.permutation(np.arange(n) % len(CLASSES)).astype(np.uint8)
    cover = _cover(
        labels,
        radius=draw(RADIUS[0] * UNIT, RADIUS[1] * UNIT),
        centre=SIDE * UNIT // 2 + draw(-SHIFT * UNIT, SHIFT * UNIT, 2),
        turn=draw(0, TURN - 1),
        outline=draw(0, 1),
    )[..., None]
    dark = draw(*GROUND, 3)
    light = dark + draw(*CONTRAST, 3)
    inverted = draw(0, 99, 1) < INVERTED
    back = np.where(inverted, light, dark)[:, None, None]
    front = np.where(inverted, dark, light)[:, None, None]

    slope, axis = draw(-SLOPE, SLOPE, 2), np.arange(SIDE) - SIDE // 2
    ramp = (slope[:, :1] * axis)[:, None, :] + (slope[:, 1:] * axis)[:, :, None]
    images = back + (ramp >> 4)[..., None]
    for k in range(SPECKS + 1):
        if k == SPECKS:  # the last one lies over the figure
            images += (front - back) * cover // SUB**2
        near = abs(np.arange(SIDE) - draw(0, SIDE - 1, 2, 1)) < draw(1, 3, 2, 1)
        speck = near[:, 0, None, :] & near[:, 1, :, None]
        images = np.where(speck[..., None], back + draw(-TINT, TINT, 1, 1, 3), images)
    images += draw(-NOISE, NOISE, SIDE, SIDE, 3)
    return images.clip(0, 255).astype(np.uint8), labels


def _cover(labels, radius, centre, turn, outline) -> np.ndarray:
    """Count how many of each pixel's SUB x SUB points the figure covers: int32 (n, 32, 32).

    All arguments have first dimension n; radius and centre are in 1/16 pixel, turn is in 1/TURN of
    a full turn, outline says whether a texture fills a disc (1) or a square (0).
    """
    cover = np.empty((len(labels), SIDE, SIDE), np.int32)
    step = UNIT // SUB
    points = np.arange(SIDE * SUB, dtype=np.int32) * step + step // 2
    for label, name in enumerate(CLASSES):
        which = np.flatnonzero(labels == label)
        x, y = points - centre[which, :1], points - centre[which, 1:]
        cos, sin, r = COS[turn[which], None], SIN[turn[which], None], radius[which, None, None]
        u = (cos * x)[:, None, :] + (sin * y)[:, :, None] >> 8
        v = (cos * y)[:, :, None] - (sin * x)[:, None, :] >> 8
        if name in FIGURES:
            inside = FIGURES[name](u, v, r)
        else:
            disc = outline[which, None, None] == 1
            inside = TEXTURES[name](u, v, r) & np.where(disc, _disc(u, v, r), _square(u, v, r))
        cover[which] = inside.reshape(-1, SIDE, SUB, SIDE, SUB).sum((2, 4))
    return cover
