"""Prints a row of tests/RESULTS.md's table of variants for each model folder: python tests/variants.py DATASET MODEL...

DATASET: labelled captchas that none of the models was trained on. MODEL: folders that `train` has written. CPU minutes
are those of all cores together, validations included; loading the images (about one for 100,000) is not, nor are pauses
and other work on the machine.
"""

import json
import math
import sys
import tempfile
from pathlib import Path

import tensorflow.compat.v1 as tf
from benchmark import benchmark_read

from lstm_ctc_ocr import LstmCtcOcr, score

COLUMNS = ("model", "parameters", "images seen", "images/CPU minute", "CPU minutes to 84 %", "to 95 %", "to the best",
           "accuracy, %", "on repeats", "by length 1 to 10", "ms at batch 1", "at 64")


def curve(folder):
    """[(CPU minutes, accuracy on the held-out images)] of a training, in the order of time."""
    rows = {}
    for path in (folder / "events").glob("events.out*"):
        for event in tf.train.summary_iterator(str(path)):
            values = {value.tag: value.simple_value for value in event.summary.value}
            if "cpu_minutes" in values:
                rows[event.step] = values["cpu_minutes"], values["validation/accuracy"]
    return [rows[step] for step in sorted(rows)]


def minutes_to(accuracy, points):
    return next((f"{minutes:.1f}" for minutes, reached in points if reached >= accuracy), "-")


def row(folder, dataset):
    config, points = json.loads((folder / "config.json").read_text()), curve(folder)
    checkpoint = str(folder / f"LstmCtcOcr-{config['best_step']}")
    parameters = sum(math.prod(shape) for name, shape in tf.train.list_variables(checkpoint) if "Exponential" in name)
    ocr = LstmCtcOcr(model=str(folder))
    files = ocr._labelled_files(dataset)
    readings = [text for _, text, *_ in ocr.recognise_files([path for path, _ in files])]
    scores = score([text for _, text in files], readings)
    repeated = [sum(column) for column in zip(*scores["by_repeat"].values())]
    with tempfile.TemporaryDirectory() as rendered:
        speed = benchmark_read(ocr, rendered)
    minutes, best = config.get("cpu_minutes", math.nan), max((accuracy for _, accuracy in points), default=2)
    return (folder.name, f"{parameters:,}", f"{config['images_seen']:,}", f"{config['images_seen'] / minutes:.0f}",
            minutes_to(0.84, points), minutes_to(0.95, points), minutes_to(best, points),
            f"{scores['accuracy']:.2%}", f"{repeated[0] / repeated[1]:.2%}",
            " ".join(f"{right / count:.1%}"[:-1] for right, count in scores["by_length"].values()),
            f"{speed['read_ms_batch1']:.1f}", f"{speed['read_ms_batch64']:.2f}")


def main(dataset, *folders):
    print("| " + " | ".join(COLUMNS) + " |\n" + "| --- " * len(COLUMNS) + "|")
    for folder in folders:
        print("| " + " | ".join(row(Path(folder), Path(dataset))) + " |", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
