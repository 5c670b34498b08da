"""Reads labelled captchas with this project's models and with ddddocr, the alternative on PyPI, in turns.

    pip install ddddocr==1.6.1     (it is no requirement of this project)
    python tests/tools/compare_ddddocr.py dataset/unseen dataset/django dataset/wheezy --wrong wrong.png

prints a Markdown table for each folder and one for all. The images are called <i>_<LABEL>.<suffix>. Every image counts
for every reader, also if its label has letters that a model does not know; if a reader fails, its reading is wrong.
ddddocr's answers are compared as they are, and with case ignored. (Restricted to capital letters with set_ranges(2),
ddddocr 1.6.1 answers empty strings.) Times are for one image after the other, from its bytes in memory to the text;
each reader uses as many threads as it takes by itself.

dataset/django and dataset/wheezy hold 1,000 captchas each of programs from which no model here has learned. For the
first: pip install django-simple-captcha==0.7.0, where the package `captcha` is not installed (both are imported as
`captcha`), and, as it chooses its own seed, with other captchas in every run:

    settings.configure(SECRET_KEY="x", INSTALLED_APPS=["captcha"], ROOT_URLCONF="captcha.urls", USE_TZ=True,
                       DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}})
    django.setup()
    call_command("migrate", verbosity=0)
    for i in range(1000):
        key = CaptchaStore.generate_key()
        image = captcha_image(RequestFactory().get("/"), key).content
        Path(f"dataset/django/{i}_{CaptchaStore.objects.get(hashkey=key).challenge}.png").write_bytes(image)

For the second: pip install wheezy.captcha==3.2.2, and the chain of its documentation, with the fonts DejaVuSans-Bold,
FreeSerif and LiberationMono-Regular; it draws the same bytes in every run:

    random.seed(1)
    draw = captcha(drawings=[background(), text(fonts=fonts, drawings=[warp(), rotate(), offset()]), curve(), noise(),
                             smooth()])
    for i in range(1000):
        label = random.sample(string.ascii_uppercase + string.digits, 4)
        draw(label).save(f"dataset/wheezy/{i}_{''.join(label)}.jpg", "JPEG", quality=75)

dataset/math holds 500 sums of the first program, such as `7+5=`, `10-4=` and `3*8=`, which is what the labels are. Draw
them as the first, with CAPTCHA_CHALLENGE_FUNCT="captcha.helpers.math_challenge" among the settings, but write the
images to f"dataset/math/{i}.png" and print(f"{i}.png,{challenge}") into dataset/math/labels.csv, as not every file
system takes a `*` in a name. This tool does not read that list; `lstm_ctc_ocr.py test` does.
"""

import argparse
import contextlib
import sys
import time
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

HOME = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(HOME))

from lstm_ctc_ocr import IMAGE_KINDS, LABELLED, LstmCtcOcr, score  # noqa: E402

PRETRAINED = HOME / "my-model" / "pretrained"
SHEET_COLUMNS, SHEET_ROWS = 8, 8  # of the contact sheet; as many rows for each folder
CELL_WIDTH, CELL_HEIGHT, TEXT_HEIGHT = 200, 80, 40  # pixels; the texts' height comes on top


class Refusal(Exception):
    """What is wrong with the call, and what to do."""


def labelled_images(folder, count):
    """The first `count` (path, label) of a folder, in the order of their numbers."""
    if not folder.is_dir():
        raise Refusal(f"no folder {folder}")
    named = [(path, match) for path in folder.iterdir() if (match := LABELLED.fullmatch(path.name))]
    named.sort(key=lambda pair: (int(pair[1][1]), pair[0].name))
    files = [(path, match[2]) for path, match in named if path.suffix.lower() in IMAGE_KINDS]
    if not files:
        raise Refusal(f"no images <i>_<LABEL>.<suffix> in {folder}")
    return files[:count]


def shipped_models():
    return sorted(path.parent.name for path in PRETRAINED.glob("*/config.json"))


def by_name(folders):
    """{the folder's own name: folder}, as the tables call them."""
    folders = list(folders)
    named = {folder.resolve().name: folder for folder in folders}
    if len(named) < len(folders):
        raise Refusal("the tables call folders by their last names, of which two are the same: rename one of "
                      f"{', '.join(map(str, folders))}")
    return named


def our_reader(folder):
    """A function: the bytes of an image file -> (text, confidence)."""
    ocr = LstmCtcOcr(model=str(folder))
    return lambda data: ocr.recognise([data])[0]


def ddddocr_reader(**options):
    """As `our_reader`; ddddocr's `classification` gives no confidence."""
    try:
        import ddddocr
    except ImportError:
        raise Refusal("ddddocr is not installed: pip install ddddocr==1.6.1") from None
    reader = ddddocr.DdddOcr(show_ad=False, **options)
    return lambda data: (reader.classification(data), None)


def build_readers(models):
    """{what the tables call it: its function}, ours first, each of them asked once so that it has loaded everything."""
    readers = {name: our_reader(folder) for name, folder in by_name(map(Path, models)).items()}
    readers |= {"ddddocr, default": ddddocr_reader(), "ddddocr, beta": ddddocr_reader(beta=True)}
    blank = cv2.imencode(".png", np.full((60, 160), 255, np.uint8))[1].tobytes()
    for read in readers.values():
        read(blank)
    return readers


def read_in_turns(readers, paths):
    """Each image with each reader, one after the other; returns {reader: [(text, confidence)]}, {reader: seconds}."""
    readings, seconds = {name: [] for name in readers}, dict.fromkeys(readers, 0.0)
    for path in paths:
        data = path.read_bytes()
        for name, read in readers.items():
            begun = time.perf_counter()
            try:
                reading = read(data)
            except Exception as error:  # ddddocr raises what it likes; no reading is a wrong one
                print(f"{name}: {path}: {error}", file=sys.stderr)
                reading = "", None
            seconds[name] += time.perf_counter() - begun
            readings[name].append(reading)
    return readings, seconds


def score_folded(truths, texts):
    """As `score`, case ignored."""
    return score([truth.upper() for truth in truths], [text.upper() for text in texts])


def markdown(rows):
    head, *body = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([head, "| --- " * len(rows[0]) + "|", *body])


def folder_table(truths, readings, seconds):
    """Accuracies in %; those by length with case ignored, the lengths' numbers of images in the table's head."""
    rows = []
    for name, pairs in readings.items():
        texts = [text for text, _ in pairs]
        folded = score_folded(truths, texts)
        rows.append([name, f"{score(truths, texts)['accuracy']:.1%}", f"{folded['accuracy']:.1%}",
                     *(f"{right / count:.1%}" for right, count in folded["by_length"].values()),
                     f"{seconds[name] / len(truths) * 1e3:.1f}"])
    lengths = [f"{length} ({count})" for length, (_, count) in folded["by_length"].items()]
    return markdown([["reader", "exact", "case ignored", *lengths, "ms an image"], *rows])


def summary_table(accuracies):
    """{folder: {reader: accuracy with case ignored}} as a table; below several folders stands their mean."""
    names = list(next(iter(accuracies.values())))
    rows = [[folder, *(row[name] for name in names)] for folder, row in accuracies.items()]
    if len(rows) > 1:
        rows.append(["mean", *np.mean([row[1:] for row in rows], axis=0)])
    return markdown([["case ignored", *names], *([row[0], *(f"{share:.1%}" for share in row[1:])] for row in rows)])


def bar_chart(accuracies):
    """{folder: {reader: accuracy}} as an SVG: a bar for our first model, one for the better of ddddocr's two."""
    names = list(next(iter(accuracies.values())))
    kinds = [(0, names[0], lambda row: row[names[0]]),
             (1, "ddddocr, the better of its two models", lambda row: max(row[name] for name in names[-2:]))]
    colours, height = ("#0a7d6c", "#b9b9b9"), 40 + 30 * len(accuracies)
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 640 {height}" width="640" height="{height}">'
             "<style>text { font: 13px system-ui, sans-serif; fill: #777 } .end { text-anchor: end }</style>"]
    for number, name, _ in kinds:
        parts.append(f'<rect x="{170 + 130 * number}" y="8" width="12" height="12" fill="{colours[number]}"/>'
                     f'<text x="{188 + 130 * number}" y="19">{name}</text>')
    for place, (folder, row) in enumerate(accuracies.items()):
        top = 36 + 30 * place
        parts.append(f'<text class="end" x="158" y="{top + 16}">{folder}</text>')
        for number, _, share in kinds:
            y, percent = top + 12 * number, 100 * share(row)
            parts.append(f'<rect x="170" y="{y}" width="{4.2 * percent:.1f}" height="11" fill="{colours[number]}"/>'
                         f'<text x="{176 + 4.2 * percent:.1f}" y="{y + 10}">{percent:.0f}</text>')
    return "".join([*parts, "</svg>\n"])


def evenly(items, most):
    """At most so many of them, from all over the list."""
    if len(items) <= most:
        return items
    return [items[i * len(items) // most] for i in range(most)]


def contact_sheet(sections, font):
    """[(title, [(path, truth, text, confidence)])] -> one image to look at."""
    heights = [TEXT_HEIGHT + -(-len(cells) // SHEET_COLUMNS) * (CELL_HEIGHT + TEXT_HEIGHT) for _, cells in sections]
    sheet = Image.new("RGB", (SHEET_COLUMNS * CELL_WIDTH, sum(heights)), "white")
    pen, top = ImageDraw.Draw(sheet), 0
    for (title, cells), height in zip(sections, heights):
        pen.text((4, top + 12), title, "black", font)
        for i, cell in enumerate(cells):
            row, column = divmod(i, SHEET_COLUMNS)
            place = column * CELL_WIDTH, top + TEXT_HEIGHT + row * (CELL_HEIGHT + TEXT_HEIGHT)
            draw_cell(sheet, pen, font, place, *cell)
        top += height
    return sheet


def draw_cell(sheet, pen, font, place, path, truth, text, confidence):
    left, top = place
    with contextlib.suppress(OSError), Image.open(path) as file:
        image = file.convert("RGB")
        scale = min((CELL_WIDTH - 6) / image.width, (CELL_HEIGHT - 4) / image.height)
        sheet.paste(image.resize([max(1, round(side * scale)) for side in image.size]), (left + 3, top + 2))
    confidence = "no reading" if confidence is None else f"{confidence:.3f}"
    pen.text((left + 3, top + CELL_HEIGHT), f"{truth}   {path.name.split('_')[0]}, {confidence}", "black", font)
    pen.text((left + 3, top + CELL_HEIGHT + 17), text, "red", font)


def wrong_section(title, files, readings):
    """What was read wrong with case ignored, for `contact_sheet`: some from all over the folder if there is much."""
    wrong = [(path, truth, *reading) for (path, truth), reading in zip(files, readings)
             if reading[0].upper() != truth.upper()]
    shown = evenly(wrong, SHEET_COLUMNS * SHEET_ROWS)
    return f"{title}: {len(wrong)} of {len(files)} wrong with case ignored, {len(shown)} of them here", shown


def compare(folders, models, count, wrong, chart):
    sets = {name: labelled_images(folder, count) for name, folder in by_name(folders).items()}
    readers = build_readers(models)
    first, accuracies, sections = next(iter(readers)), {}, []
    for folder, files in sets.items():
        truths = [truth for _, truth in files]
        readings, seconds = read_in_turns(readers, [path for path, _ in files])
        print(f"### {folder}: {len(files)} images\n\n{folder_table(truths, readings, seconds)}\n", flush=True)
        accuracies[folder] = {name: score_folded(truths, [text for text, _ in pairs])["accuracy"]
                              for name, pairs in readings.items()}
        sections.append(wrong_section(f"{first}, {folder}", files, readings[first]))
    print(f"### All\n\n{summary_table(accuracies)}")
    if chart:
        Path(chart).write_text(bar_chart(accuracies))
    if wrong:
        contact_sheet(sections, ImageFont.load_default(15)).save(wrong)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="of images <i>_<LABEL>.<suffix>")
    parser.add_argument("--models", nargs="+", default=shipped_models(), metavar="MODEL",
                        help="shipped models' names and model folders (default: all shipped ones)")
    parser.add_argument("--count", type=int, default=1000, metavar="N", help="images of each folder (default: 1000)")
    parser.add_argument("--wrong", metavar="FILE.png", help="a contact sheet of what the first model reads wrong")
    parser.add_argument("--chart", metavar="FILE.svg", help="a bar chart of the accuracies with case ignored")
    arguments = parser.parse_args(argv)
    if arguments.count < 1:
        parser.error("--count must be above 0")
    if arguments.wrong and not (arguments.wrong.endswith(".png") and Path(arguments.wrong).parent.is_dir()):
        parser.error("--wrong must be a .png in a folder that exists")
    try:
        compare(**vars(arguments))
    except (Refusal, LstmCtcOcr.Error, OSError) as error:
        print(f"compare_ddddocr: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
