"""Reads labelled captchas with ddddocr, what one would pick from PyPI instead, and with this project, in turns.

    pip install ddddocr==1.6.1     (it is no requirement of this project)
    python tests/compare_ddddocr.py dataset/unseen [COUNT]

Its answers are upper-cased before they are judged. (Restricted to capital letters with set_ranges(2), 1.6.1 answers
empty strings.)
"""

import sys
import time
from pathlib import Path

import ddddocr

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lstm_ctc_ocr import LstmCtcOcr, score  # noqa: E402


def main(folder, count=1000):
    paths = [path for path, _ in LstmCtcOcr()._labelled_files(Path(folder))[:int(count)]]
    truths = [path.stem.split("_")[1] for path in paths]
    readers = {f"ddddocr {name}": ddddocr.DdddOcr(show_ad=False, **options)
               for name, options in {"default": {}, "beta": {"beta": True}}.items()}
    jobs = {name: lambda data, reader=reader: reader.classification(data).upper() for name, reader in readers.items()}
    for net in ("lstm", "cnn_lstm"):
        ocr = LstmCtcOcr(net=net)
        jobs[f"this project, {net}"] = lambda data, ocr=ocr: ocr.recognise([data])[0][0]
    readings, seconds = {name: [] for name in jobs}, dict.fromkeys(jobs, 0.0)
    for name, job in jobs.items():
        job(paths[0].read_bytes())  # whatever is loaded at the first call
    for path in paths:
        data = path.read_bytes()
        for name, job in jobs.items():
            begun = time.perf_counter()
            readings[name].append(job(data))
            seconds[name] += time.perf_counter() - begun
    for name in jobs:
        print(f"{name:24} {score(truths, readings[name])['accuracy']:7.2%} of {len(paths)}, "
              f"{seconds[name] / len(paths) * 1e3:5.1f} ms an image")


if __name__ == "__main__":
    main(*sys.argv[1:])
