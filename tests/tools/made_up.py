"""Draws eighteen kinds of captchas that `create_dataset` does not draw in this way, to measure `general` on.

    python tests/tools/made_up.py OUT [--count 500] [--seed 7]        (needs the fonts of Debian's fonts-dejavu)

writes OUT/hollow/<i>_<LABEL>.png and so on. Nothing may be trained on them: they stand in for the captchas of programs
that no model here has seen.
"""

import argparse
import math
import random
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont, ImageOps

CAPITALS, DIGITS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ", "0123456789"
ALL = CAPITALS + CAPITALS.lower() + DIGITS
CLEAR = "ABCDEFGHJKLMNPQRSTUVWXYZ23456789"  # none that looks like another one
WHITE = (255, 255, 255)


def colour(low, high):
    return tuple(random.randint(low, high) for _ in range(3))


def a_text(letters, least=4, most=6):
    return "".join(random.choice(letters) for _ in range(random.randint(least, most)))


def glyph(letter, font, size, ink, turn, hollow=False):
    """A letter on transparent ground, cut to its size."""
    face, image = ImageFont.truetype(font, size), Image.new("RGBA", (2 * size, 2 * size))
    place = size // 2, size // 3
    ImageDraw.Draw(image).text(place, letter, ink, face, stroke_width=int(hollow), stroke_fill=ink)
    if hollow:
        inside = Image.new("L", image.size)
        ImageDraw.Draw(inside).text(place, letter, 255, face)
        image.putalpha(Image.fromarray(np.minimum(np.array(image)[..., 3], 255 - np.array(inside))))
    image = image.rotate(turn, Image.Resampling.BICUBIC)
    return image.crop(image.getbbox())


def write(image, text, font, sizes, inks, turn, gaps, jitter=0, hollow=False):
    """Writes a text from the left on; inks is called for each letter's colour."""
    x = 9
    for letter in text:
        drawn = glyph(letter, font, random.randint(*sizes), inks(), random.uniform(-turn, turn), hollow)
        y = (image.height - drawn.height) // 2 + random.randint(-jitter, jitter)
        image.paste(drawn, (x, max(0, y)), drawn)
        x += drawn.width + random.randint(*gaps)


def waved(image, paper, across, up):
    """Bent by two sines, (pixels, wave length) each."""
    pixels = np.array(image)
    y, x = np.mgrid[:image.height, :image.width].astype(np.float32)
    moved = [here + np.float32(high * np.sin(2 * math.pi * other / length + random.uniform(0, 7)))
             for here, other, (high, length) in ((x, y, across), (y, x, up))]
    return Image.fromarray(cv2.remap(pixels, *moved, cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT,
                                     borderValue=paper))


def hollow(fonts):
    """Outlines of letters in many colours, lines of one pixel."""
    text, image = a_text(ALL, 4, 4), Image.new("RGB", (150, 50), colour(220, 255))
    write(image, text, random.choice(fonts), (30, 38), lambda: colour(0, 180), 18, (1, 6), 4, hollow=True)
    for _ in range(2):
        ImageDraw.Draw(image).line([(x, random.randint(0, 50)) for x in (0, 75, 150)], colour(0, 180))
    return text, image


def distorted(fonts):
    """Bent letters, dark on light or light on dark, circles in their colour."""
    dark, text = random.random() < .5, a_text(ALL)
    paper, ink = (colour(0, 60), colour(170, 255)) if dark else (colour(200, 255), colour(0, 110))
    image = Image.new("RGB", (160, 60), paper)
    write(image, text, random.choice(fonts), (26, 34), lambda: ink, 15, (-2, 2), 5)
    image = waved(image, paper, (random.uniform(1, 3), random.uniform(25, 50)),
                  (random.uniform(2, 4), random.uniform(50, 100)))
    for _ in range(random.randint(1, 3)):
        left, top = random.randint(-60, 159), random.randint(-40, 59)
        right, bottom = 160 + random.randint(0, 60), 60 + random.randint(0, 40)
        ImageDraw.Draw(image).ellipse([left, top, right, bottom], outline=ink)
    return text, image


def of_pixels(fonts, keeps):
    """Bent letters in one font, of which keeps(random numbers (60, 180)) says the pixels that are drawn."""
    text, image = a_text(CAPITALS + DIGITS), Image.new("RGB", (180, 60), WHITE)
    write(image, text, fonts[0], (28, 34), lambda: (0, 0, 0), 12, (0, 2))
    ink = np.array(waved(image, WHITE, (2, 40), (3, 90)))[..., 0] < 128
    chance = np.random.default_rng(random.getrandbits(32)).random(ink.shape)
    pixels = np.full((*ink.shape, 3), 255, np.uint8)
    pixels[ink & keeps(chance)] = colour(0, 120)
    return text, pixels, chance


def sparse(fonts):
    """Letters of which a fifth to nearly a half of the pixels are there, specks."""
    share = random.uniform(.2, .45)
    text, pixels, chance = of_pixels(fonts, lambda chance: chance < share)
    pixels[chance > .985] = colour(0, 120)
    return text, Image.fromarray(pixels)


def dotted(fonts):
    """Letters of single pixels, two or three apart."""
    step, lattice = random.choice((2, 3)), np.zeros((60, 180), bool)
    lattice[::step, ::step] = True
    text, pixels, _ = of_pixels(fonts, lambda _: lattice)
    return text, Image.fromarray(pixels)


def noisy(fonts):
    """35 pixels high, one font, noise all over."""
    text, image = a_text(CAPITALS + DIGITS, 5, 5), Image.new("RGB", (120, 35), WHITE)
    write(image, text, fonts[1], (21, 23), lambda: colour(0, 110), 10, (0, 3), 2)
    noise = np.random.default_rng(random.getrandbits(32))
    pixels = np.array(image) + noise.normal(0, random.uniform(15, 45), (35, 120, 3))
    hit = noise.random((35, 120)) < .08
    pixels[hit] = noise.integers(0, 256, (hit.sum(), 3))
    return text, Image.fromarray(np.uint8(np.clip(pixels, 0, 255)))


def scattered(fonts):
    """Small letters far apart and at any height, on a grid or on circles."""
    text, image, font = a_text(CAPITALS + DIGITS), Image.new("RGB", (200, 70), colour(200, 255)), random.choice(fonts)
    draw, lines = ImageDraw.Draw(image), colour(0, 150)
    if random.random() < .5:
        step = random.randint(8, 14)
        for start in range(random.randint(0, step), 200, step):
            draw.line([(start, 0), (start, 70)], lines)
            draw.line([(0, start), (200, start)], lines)
    else:
        for _ in range(random.randint(8, 16)):
            draw.circle((random.randint(0, 200), random.randint(0, 70)), random.randint(8, 30), outline=lines)
    room = 180 // len(text)
    for place, letter in enumerate(text):
        drawn = glyph(letter, font, random.randint(18, 24), colour(0, 130), random.uniform(-25, 25))
        image.paste(drawn, (10 + place * room + random.randint(0, max(1, room - drawn.width)),
                            random.randint(4, max(5, 66 - drawn.height))), drawn)
    return text, image


def lined(image):
    """Lines from anywhere to anywhere, each in a colour of its own."""
    for _ in range(3):
        ends = [random.randint(0, length) for _ in range(2) for length in image.size]
        ImageDraw.Draw(image).line(ends, colour(0, 180), max(1, image.height // 80))
    return image


def turned(fonts):
    """Letters turned by up to 55 degrees."""
    text, image = a_text(CAPITALS + DIGITS, 4, 5), Image.new("RGB", (220, 60), colour(190, 255))
    write(image, text, random.choice(fonts), (34, 40), lambda: colour(0, 120), 55, (2, 6), 5)
    return text, lined(image)


def uneven(fonts):
    """Letters of which some are twice as large as others, at any height."""
    text, image = a_text(CAPITALS + DIGITS, 4, 5), Image.new("RGB", (220, 70), colour(190, 255))
    write(image, text, random.choice(fonts), (22, 52), lambda: colour(0, 120), 20, (1, 6), 12)
    return text, lined(image)


def square(fonts):
    """As high as wide."""
    text, image = a_text(CAPITALS + DIGITS, 4, 4), Image.new("RGB", (200, 200), colour(190, 255))
    write(image, text, random.choice(fonts), (46, 58), lambda: colour(0, 120), 20, (2, 6), 50)
    return text, lined(image)


def curve(image, ink, width=1):
    """A wave from the left edge to the right one."""
    middle, height = random.uniform(.3, .7) * image.height, random.uniform(.1, .35) * image.height
    length, start = random.uniform(.5, 1.5) * image.width, random.uniform(0, 7)
    ImageDraw.Draw(image).line([(x, middle + height * math.sin(start + 2 * math.pi * x / length))
                                for x in range(-4, image.width + 8, 4)], ink, width, "curve")


def pale(fonts):
    """Outlines of letters, double in places, each in another pale colour, one curve."""
    text, paper = a_text(CLEAR + "abdefhnrt", 4, 5), colour(225, 255)
    image = Image.new("RGB", (170, 50), paper)
    write(image, text, random.choice(fonts), (26, 34), lambda: colour(130, 225), 25, (-4, 2), 6, hollow=True)
    image = ImageChops.darker(image, waved(image, paper, (1.5, 20), (2, 25)))
    curve(image, colour(120, 210), 2)
    return text, image


def outlines(fonts):
    """Overlapping outlines of digits, black and white curves across them."""
    text, image = a_text(DIGITS), Image.new("RGB", (180, 60), WHITE)
    write(image, text, random.choice(fonts), (34, 44), lambda: (0, 0, 0), 20, (-8, -3), 6, hollow=True)
    image = waved(image, WHITE, (1, 20), (2, 60))
    for ink in ((0, 0, 0), WHITE, WHITE):
        curve(image, ink, random.randint(2, 3))
    return text, image


def faint(fonts):
    """Eight to ten shaky small letters, little darker than the noise, which darkens to one side."""
    text, image = a_text(CAPITALS.lower(), 8, 10), Image.new("RGB", (250, 50))
    write(image, text, random.choice(fonts), (24, 28), lambda: WHITE, 12, (0, 3), 3)
    ink = np.array(waved(image, (0, 0, 0), (1, 15), (1, 20)))[..., 0] / 255 * random.uniform(50, 75)
    noise = np.random.default_rng(random.getrandbits(32)).normal(0, 14, ink.shape)
    paper = np.linspace(*random.choice(((225, 110), (110, 225))), image.width) + noise
    return text, Image.fromarray(np.uint8(np.clip(paper - ink, 0, 255)))


def leaving(fonts):
    """Letters turned by up to 50 degrees, cut off at all four edges."""
    text, paper = a_text(CLEAR, 4, 5), colour(190, 255)
    blank, ink = Image.new("RGB", (280, 110), paper), colour(0, 120)
    image = blank.copy()
    write(image, text, random.choice(fonts), (38, 46), lambda: ink, 50, (0, 5), 9)
    left, top, right, bottom = ImageChops.difference(image, blank).getbbox()
    cut = [random.randint(3, 7) for _ in range(4)]
    return text, lined(image.crop((left + cut[0], top + cut[1], right - cut[2], bottom - cut[3])))


def framed(fonts):
    """A thick frame close around the letters, or bars above and below them, in their colour."""
    text, ink, paper = a_text(CLEAR), colour(0, 120), colour(200, 255)
    image = Image.new("RGB", (190, 38), paper)
    write(image, text, random.choice(fonts), (27, 32), lambda: ink, 15, (0, 3), 5)
    width = random.randint(4, 14)
    image = ImageOps.expand(image, random.choice(((0, width), width)), ink)
    return text, ImageOps.expand(image, random.choice((0, 4)), paper)


def thick(fonts):
    """Ellipses, and lines that begin with a hook, as thick as strokes, in the letters' colour or in another."""
    text, ink = a_text(CLEAR), colour(0, 120)
    image = Image.new("RGB", (220, 60), colour(200, 255))
    write(image, text, random.choice(fonts), (32, 38), lambda: ink, 15, (0, 4), 4)
    draw = ImageDraw.Draw(image)
    for other in random.choices((ink, colour(0, 150)), k=2):
        x, y, width = random.randint(-10, 130), random.randint(-15, 45), random.randint(3, 4)
        if random.random() < .4:
            draw.ellipse((x, y, x + random.randint(25, 80), y + random.randint(15, 45)), outline=other, width=width)
        else:
            draw.arc((x, y, x + 18, y + 18), random.randint(120, 250), 90, other, width)
            draw.line((x + 9, y + 17, x + random.choice((150, -150)), random.randint(0, 60)), other, width)
    return text, image


def bitmap(fonts):
    """Letters of 8 to 14 pixels without grey, enlarged."""
    text, image = a_text(CLEAR), Image.new("RGB", (120, 22), colour(200, 255))
    draw, ink, x, times = ImageDraw.Draw(image), colour(0, 120), random.randint(2, 6), random.randint(2, 3)
    small = ImageFont.truetype(random.choice(fonts), random.randint(11, 14))
    face = random.choice((small, small, ImageFont.load_default_imagefont()))
    draw.fontmode = "1"
    for letter in text:
        draw.text((x, random.randint(2, 7)), letter, ink, face)
        x += round(face.getlength(letter)) + random.randint(0, 2)
    for _ in range(30):
        draw.point((random.randint(0, 119), random.randint(0, 21)), colour(0, 150))
    enlarge = random.choice((Image.Resampling.NEAREST, Image.Resampling.BILINEAR))
    return text, image.crop((0, 0, x + 4, 22)).resize(((x + 4) * times, 22 * times), enlarge)


def typewriter(fonts):
    """Letters with thin strokes and serifs, all in rooms of one width, each bent by itself."""
    text, image = a_text(CLEAR), Image.new("RGB", (170, 50), colour(200, 255))
    face = ImageFont.truetype(next(font for font in fonts if "DejaVuSerif.ttf" in font), 100)
    ink = colour(30, 130)
    for place, letter in enumerate(text):
        large = Image.new("L", (120, 180))
        ImageDraw.Draw(large).text((60, 130), letter, 255, face, anchor="ms")
        large = waved(large.filter(ImageFilter.MinFilter(3)), 0, (10, 90), (10, 80))
        drawn = large.resize((32, 48), Image.Resampling.BOX)
        image.paste(ink, (1 + 25 * place, random.randint(-7, 7)), drawn)
    curve(image, ink)
    return text, image


def digits(fonts):
    """Six digits, of which many are the same as the one before, that touch each other."""
    text = random.choice(DIGITS)
    while len(text) < 6:
        text += random.choice((text[-1], text[-1], random.choice(DIGITS)))
    paper, ink = colour(200, 255), colour(0, 120)
    image = Image.new("RGB", (130, 40), paper)
    write(image, text, random.choice(fonts), (22, 30), lambda: ink, 15, (-6, -2), 3)
    image = waved(image, paper, (1, 20), (2, 50))
    curve(image, ink, 2)
    return text, image


KINDS = (hollow, distorted, sparse, dotted, noisy, scattered, turned, uneven, square,
         pale, outlines, faint, leaving, framed, thick, bitmap, typewriter, digits)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--fonts", type=Path, default="/usr/share/fonts/truetype/dejavu")
    arguments = parser.parse_args()
    fonts = [str(path) for path in sorted(arguments.fonts.glob("*.ttf")) if "Math" not in path.name]
    for draw in KINDS:
        random.seed(f"{arguments.seed} {draw.__name__}")
        folder = arguments.out / draw.__name__
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(arguments.count):
            text, image = draw(fonts)
            image.save(folder / f"{number}_{text}.png")


if __name__ == "__main__":
    main()
