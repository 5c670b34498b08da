"""Measures this project's speed as ratios of figures taken in one run: python tests/benchmark.py [train|read|render].

Machines differ, and one machine differs from hour to hour; a ratio of two things that took turns does not. Run it on an
otherwise idle machine.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tensorflow.compat.v1 as tf  # noqa: E402

import lstm_ctc_ocr  # noqa: E402
from lstm_ctc_ocr import LstmCtcOcr  # noqa: E402

ROUNDS = 7


def take_turns(*jobs):
    """Median seconds of each job, run in turns so that a slow moment of the machine meets them all."""
    for job in jobs:
        job()
    times = [[] for _ in jobs]
    for _ in range(ROUNDS):
        for job, taken in zip(jobs, times):
            begun = time.perf_counter()
            job()
            taken.append(time.perf_counter() - begun)
    return [statistics.median(taken) for taken in times]


def rendered(ocr, count, folder):
    """The (path, text) of `count` captchas."""
    LstmCtcOcr(dataset=folder, im_total_num=count, seed=5).create_dataset()
    return ocr._labelled_files(Path(folder))[:count]


def article_step(ocr, batch_size, images, texts):
    """Returns a function that runs the article's own training step, and the batch size.

    A plain cell in a while_loop, TensorFlow's gradient of it, TensorFlow's default threads.
    """
    cells, classes = ocr.n_hidden, len(ocr.words) + 1
    with tf.Graph().as_default():
        pixels = tf.constant(images[:batch_size])
        columns = tf.transpose(tf.cast(pixels, tf.float32) / 255, [2, 0, 1])
        kernel = tf.get_variable("kernel", [ocr.im_height + cells, 4 * cells])
        bias = tf.get_variable("bias", [4 * cells], initializer=tf.zeros_initializer())
        projection = tf.get_variable("projection", [cells, classes])

        def step(t, h, c, outputs):
            i, g, f, o = tf.split(tf.matmul(tf.concat([columns[t], h], axis=1), kernel) + bias, 4, axis=1)
            c = tf.sigmoid(f + 1) * c + tf.sigmoid(i) * tf.tanh(g)
            h = tf.sigmoid(o) * tf.tanh(c)
            return t + 1, h, c, outputs.write(t, h)

        zero = tf.zeros([batch_size, cells])
        outputs = tf.while_loop(lambda t, *_: t < ocr.im_width, step,
                                (0, zero, zero, tf.TensorArray(tf.float32, ocr.im_width)))[-1].stack()
        logits = tf.einsum("tbn,nc->tbc", outputs, projection)
        labels = tf.SparseTensor(*ocr.sequences_to_sparse([ocr.text_to_sequence(text) for text in texts[:batch_size]]))
        loss = tf.reduce_mean(tf.nn.ctc_loss(labels, logits, tf.fill([batch_size], ocr.im_width)))
        train = tf.train.AdamOptimizer(5e-5).minimize(loss)
        session = tf.Session()
        session.run(tf.global_variables_initializer())
    return lambda: session.run(train)


def our_step(ocr, images, texts):
    """Returns a function that runs this project's training step."""
    with tf.Graph().as_default():
        net = ocr._build_training()
        session = tf.Session(config=lstm_ctc_ocr._session_config())
        session.run(tf.global_variables_initializer())
    batch = {net.images: images[:ocr.batch_size], net.lr: 1e-3, net.sequences: ocr.sequences_to_sparse(
        [ocr.text_to_sequence(text) for text in texts[:ocr.batch_size]])}
    return lambda: session.run([net.loss, net.gradient_norm, net.train], batch)


def matrix_product():
    """Returns a function that multiplies two 2048-cubes with TensorFlow's default threads, and its operations."""
    with tf.Graph().as_default():
        cube = tf.get_variable("cube", [2048, 2048])
        product = tf.reduce_sum(tf.matmul(cube, cube))
        session = tf.Session()
        session.run(tf.global_variables_initializer())
    return lambda: session.run(product), 2 * 2048 ** 3


def multiplications(ocr):
    """Of a training step, an image: forward, and two as large backward, but none is passed back into the image."""
    def lstm(inputs, cells, passed_back):
        return ocr.steps * 4 * cells * ((2 + passed_back) * inputs + 3 * cells)

    classes = len(ocr.words) * ocr.label_parts + 1
    dense = 3 * ocr.steps * ocr.n_hidden * classes
    if ocr.net != "cnn_lstm":
        return lstm(ocr.im_height, ocr.n_hidden, False) + dense
    height, width, channels, total = ocr.im_height, ocr.im_width, 1, dense
    for number, (outputs, size, down, across) in enumerate(lstm_ctc_ocr.CONVOLUTIONS):
        height, width = -(-height // down), -(-width // across)
        total += (3 if number else 2) * height * width * size ** 2 * channels * outputs
        channels = outputs
    total += 3 * ocr.steps * height * channels * lstm_ctc_ocr.PROJECTION
    return total + 2 * lstm(lstm_ctc_ocr.PROJECTION, ocr.n_hidden // 2, True)


def benchmark_train(ocr, folder):
    images, texts = ocr.load_images(rendered(ocr, max(16, ocr.batch_size), folder))
    product, operations = matrix_product()
    theirs, ours, peak = take_turns(article_step(ocr, 16, images, texts), our_step(ocr, images, texts), product)
    rate = 2 * multiplications(ocr) * ocr.batch_size / ours
    return {"train_images_per_second": ocr.batch_size / ours, "article_images_per_second": 16 / theirs,
            "train_vs_article": ocr.batch_size / ours / (16 / theirs), "train_gflops": rate / 1e9,
            "peak_gflops": operations / peak / 1e9, "train_share_of_peak": rate / (operations / peak)}


def benchmark_read(ocr, folder):
    """Milliseconds an image with the model loaded: decoding of the file, network and beam search."""
    paths = [path for path, _ in rendered(ocr, 256, folder)]
    one, many = take_turns(lambda: [ocr.recognise([path]) for path in paths[:16]],
                           lambda: list(ocr.recognise_files(paths)))
    return {"read_ms_batch1": one / 16 * 1e3, "read_ms_batch64": many / 256 * 1e3,
            "read_images_per_second_batch1": 16 / one, "read_images_per_second_batch64": 256 / many}


def benchmark_render(_, folder):
    """Images a second with one worker and with two, the start of the workers left out."""
    def seconds(workers, count):
        with tempfile.TemporaryDirectory(dir=folder) as target:
            begun = time.perf_counter()
            LstmCtcOcr(dataset=target, im_total_num=count, workers=workers).create_dataset()
            return time.perf_counter() - begun

    speeds = {}
    for workers in (1, 2):
        speeds[workers] = 2000 / (seconds(workers, 2050) - seconds(workers, 50))
    return {"render_images_per_second_1": speeds[1], "render_images_per_second_2": speeds[2],
            "render_speedup": speeds[2] / speeds[1]}


BENCHMARKS = {"train": benchmark_train, "read": benchmark_read, "render": benchmark_render}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("which", nargs="?", choices=BENCHMARKS, help="one of them; all by default")
    parser.add_argument("--net", default="lstm")
    parser.add_argument("--json", action="store_true", help="print one object, last")
    arguments = parser.parse_args()
    figures = {}
    for name in [arguments.which] if arguments.which else BENCHMARKS:
        with tempfile.TemporaryDirectory() as folder:
            figures.update(BENCHMARKS[name](LstmCtcOcr(net=arguments.net), folder))
    if arguments.json:
        print(json.dumps({key: round(value, 3) for key, value in figures.items()}))
    else:
        for key, value in figures.items():
            print(f"{key:32} {value:10.2f}")


if __name__ == "__main__":
    main()
