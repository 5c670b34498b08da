"""Trains the shipped `general` further, while other processes render varied captchas for it.

    python tests/tools/train_general.py unpack general start.npz
    python tests/tools/train_general.py train start.npz end.npz --seconds 6000
    python tests/tools/train_general.py mean mean.npz start.npz 0.6 end.npz 0.4
    python tests/tools/train_general.py signs mean.npz all.npz
    python tests/tools/train_general.py pack all.npz my-model/general --held FOLDER
    python tests/tools/train_general.py publish my-model/lstm my-model/pretrained/lstm

`publish` makes any model that `lstm_ctc_ocr.py train` wrote ready to ship: it leaves out what only training needs.

`mean` writes the weighted mean of weights, and the counts of the last ones. Signs are rare, and lose most by a mean:
`signs` fits their classes anew, to sums, and leaves everything else as it is. `unpack` gives a model of one ink zeros
for the second.

`train` ends after the given time, so another machine makes another number of steps. Images are (64, 256, 2) uint8 ink,
as `load_image` returns them. Labels are (12,) int8: 10 classes, the blank after the last letter, then the number of
letters, and whether the captcha is a plain one.
"""

import argparse
import json
import math
import mmap
import multiprocessing
import os
import random
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import lstm_ctc_ocr  # noqa: E402
from lstm_ctc_ocr import CAPITALS, DIGITS, LstmCtcOcr  # noqa: E402

WORDS = CAPITALS + CAPITALS.lower() + DIGITS + lstm_ctc_ocr.SIGNS
HEIGHT, WIDTH, INKS, LONGEST, CELLS, BLANK = 64, 256, 2, 10, 320, len(WORDS)
WARM_UP = 200  # steps
# In (1 - exp(-TURNING * loss)) / TURNING (Zhang and Sabuncu, 2018): leaves alone what is hopeless; at first only a
# quarter of it, so that kinds of images that are new to the network are not left out.
TURNING = 0.12
DISTORTED = 0.35  # of the images of a batch
RESIZED = 0.1  # of them, so that letters of any size are read
PLAIN = 0.1  # of the images that are drawn
CAPITALISED = 0.85  # of plain captchas with other letters: they get capitals instead
FIRST_IMAGES = 10_000  # that are there before the first step
UNSEEN_LOSS = 4.0  # that an image is taken to have until it is drawn
SAVE_EVERY = 500  # steps
MOMENTUM = .02  # of the mean and variance that batch normalisation keeps
STATISTICS_BATCHES = 60  # that batch normalisation's final statistics are taken from


# ---------------------------------------------------------------------- rendering

class Renderer:
    """A process that renders into the shared arrays `images` and `labels`; the first `done` rows are ready."""

    def __init__(self, number, most, seed, fonts, sums=0):
        """sums: at least this share of the labels are sums."""
        context = multiprocessing.get_context("fork")  # it shares the memory
        shape = HEIGHT, WIDTH, INKS
        self.images = np.frombuffer(mmap.mmap(-1, most * math.prod(shape)), np.uint8).reshape(-1, *shape)
        self.labels = np.frombuffer(mmap.mmap(-1, most * 12), np.int8).reshape(-1, 12)
        self.done = context.Value("l", 0, lock=False)
        self.process = context.Process(target=self.render, args=[number, seed, fonts, sums], daemon=True)
        self.process.start()

    def render(self, number, seed, fonts, sums):
        os.nice(5)  # the training comes first
        lstm_ctc_ocr.cv2.setNumThreads(1)
        ocr = LstmCtcOcr(net="wide_cnn_lstm", words=WORDS, words_max_num=LONGEST, im_width=WIDTH, im_height=HEIGHT,
                         look="varied", fonts=fonts).resolve()
        for row in range(len(self.images)):
            random.seed(f"{seed}-{number}-{row}")
            plain, text = ocr._draw_label()
            if random.random() < sums:
                while not set(text) & set(lstm_ctc_ocr.SIGNS):
                    plain, text = ocr._draw_label()
            if plain and not set(text) <= set(CAPITALS) and random.random() < CAPITALISED:
                length = max(len(text), random.randint(1, LONGEST))  # the longest are the hardest
                text = "".join(random.choices(CAPITALS, k=length))
            self.images[row] = ocr.load_image(ocr._draw(plain, text))
            self.labels[row] = [*map(WORDS.index, text), *[BLANK] * (LONGEST - len(text)), len(text), plain]
            self.done.value = row + 1

    def ready(self):
        """Returns how many rows are rendered."""
        if self.process.exitcode:
            sys.exit("a renderer ended, see above")
        return self.done.value


# ---------------------------------------------------------------------- training

class Pool:
    """All images so far, and the loss that each had when it was last drawn."""

    def __init__(self, renderers):
        self.renderers = renderers
        self.each = len(renderers[0].images)  # at most, of a renderer
        self.losses = np.full(self.each * len(renderers), UNSEEN_LOSS, np.float32)

    @property
    def rows(self):
        """The rows of the images that are drawn already."""
        return np.concatenate([number * self.each + np.arange(renderer.ready())
                               for number, renderer in enumerate(self.renderers)])

    def take(self, rows):
        """Returns images (n, H, W, 2), labels (n, LONGEST), their lengths, and whether they are plain captchas."""
        places = [(self.renderers[row // self.each], row % self.each) for row in rows]
        images, labels = (np.stack([getattr(renderer, name)[row] for renderer, row in places])
                          for name in ("images", "labels"))
        return images, labels[:, :LONGEST], labels[:, LONGEST], labels[:, -1] > 0

    def draw(self, count, noise):
        """Draws rows by importance, what is neither known nor hopeless the most; returns them and weights of mean 1."""
        rows = self.rows
        losses = self.losses[rows]
        chances = .05 + np.exp(-TURNING * losses) * (1 - np.exp(-losses))
        plain = np.concatenate([renderer.labels[:renderer.ready(), -1] for renderer in self.renderers])[:len(rows)] > 0
        share = chances[plain].sum() / chances.sum()
        chances *= np.where(plain, PLAIN / share, (1 - PLAIN) / (1 - share))
        chances /= chances.sum()
        places = noise.choice(len(rows), count, replace=len(rows) < 2 * count, p=chances)
        weights = (chances[places] * len(rows)).clip(.02) ** -.5  # not -1: that is too rough
        return rows[places], weights / weights.mean()


class Learner:
    """The network in training."""

    def __init__(self, start, batch):
        tf = lstm_ctc_ocr._tensorflow()
        ocr = LstmCtcOcr(net="wide_cnn_lstm", n_hidden=CELLS, words=WORDS, words_max_num=LONGEST, im_width=WIDTH,
                         im_height=HEIGHT, batch_size=batch).resolve()
        self.images = ocr._build_input(batch)
        self.sequences = tf.sparse_placeholder(tf.int32, [batch, None])
        self.weights, self.turning, self.rate = (tf.placeholder(tf.float32, shape) for shape in ([batch], [], []))
        self.losses = ocr.ctc_loss(self.sequences, ocr.logits(self.images, training=True))
        turned = (1 - tf.exp(-self.turning * self.losses)) / self.turning
        variables = tf.trainable_variables()
        gradients, _ = tf.clip_by_global_norm(
            tf.gradients(tf.reduce_mean(self.weights * turned), variables), ocr.MAX_GRADIENT_NORM)
        # Each part of the batch has its own statistics; those of the last part are taken.
        self.statistics = dict(tf.get_collection(ocr.STATISTICS))
        step = tf.train.AdamOptimizer(self.rate).apply_gradients(zip(gradients, variables))
        self.train = tf.group(step, *(tf.assign_add(variable, MOMENTUM * (value - variable))
                                      for variable, value in self.statistics.items()))
        self.session = tf.Session(config=lstm_ctc_ocr._session_config())
        self.session.run(tf.global_variables_initializer())
        self.variables = {variable.op.name: variable for variable in (*variables, *self.statistics)}
        arrays = np.load(start)
        for name, variable in self.variables.items():
            variable.load(arrays[name], self.session)

    def step(self, images, labels, lengths, weights, turning, rate):
        """Makes a step; returns the loss of each image."""
        sequences = LstmCtcOcr.sequences_to_sparse([label[:length] for label, length in zip(labels, lengths)])
        return self.session.run([self.losses, self.train], {
            self.images: images, self.sequences: sequences, self.weights: weights, self.turning: turning,
            self.rate: rate})[0]

    def take_statistics(self, batches):
        """Takes batch normalisation's statistics anew, as plain means over batches of images."""
        values = [self.session.run([*self.statistics.values()], {self.images: images}) for images in batches]
        with self.session.graph.as_default():
            for variable, *each in zip(self.statistics, *values):
                variable.load(np.mean(each, axis=0), self.session)

    def save(self, path, **counts):
        """Writes the weights and the counts as an .npz file, whole or not at all."""
        with open(f"{path}.part", "wb") as file:
            np.savez(file, **dict(zip(self.variables, self.session.run([*self.variables.values()]))), **counts)
        os.replace(f"{path}.part", path)


def resized(ocr, ink, noise):
    """Draws an image (H, W, 2) uint8 larger, smaller or as from afar; it stays whole."""
    if noise.random() < .3:
        return ocr._filled(ocr._from_afar(ink))
    rows = np.flatnonzero(ink[..., 0].max(axis=1) > 60)
    reach = max(HEIGHT / 2 - rows.min(initial=HEIGHT), rows.max(initial=0) - HEIGHT / 2 + 1, 1)
    largest = max(1, .95 * HEIGHT / 2 / reach)
    return ocr._filled(ocr._zoomed(noise.uniform(.6, min(1.7, largest)), ink))


def train(arguments):
    ocr = LstmCtcOcr(net="wide_cnn_lstm", words=WORDS, look="varied", fonts=arguments.fonts).resolve()
    ocr._fonts_found()  # raises an error now if the fonts lack a letter
    processes = arguments.processes or lstm_ctc_ocr._cores()
    renderers = [Renderer(number, arguments.images // processes, arguments.seed, arguments.fonts)
                 for number in range(processes)]  # forked before this process has threads
    pool, batch, noise = Pool(renderers), arguments.batch_size, np.random.default_rng(arguments.seed)
    with lstm_ctc_ocr._tensorflow().Graph().as_default():
        learner = Learner(arguments.start, batch)
    while len(pool.rows) < min(FIRST_IMAGES, arguments.images // 2):
        time.sleep(.5)
    begun = time.time()

    def batches():  # made while the step before is under way
        while True:
            rows, weights = pool.draw(40 * batch, noise)
            for rows, weights in zip(rows.reshape(-1, batch), weights.reshape(-1, batch)):
                images, labels, lengths, _ = pool.take(rows)
                count = int(DISTORTED * batch)
                for row in np.flatnonzero(noise.random(batch) < RESIZED):
                    images[row] = resized(ocr, images[row], noise)
                images[:count] = lstm_ctc_ocr.distort(images[:count], noise)
                yield rows, images, labels, lengths, weights

    means = []
    for step, (rows, *fed) in enumerate(lstm_ctc_ocr._one_ahead(batches()), 1):
        share = (time.time() - begun) / arguments.seconds
        if share >= 1:
            break
        turning, rate = TURNING * max(.25, share), arguments.lr * min(1, step / WARM_UP) * (1 - share)
        pool.losses[rows] = losses = learner.step(*fed, turning, rate)
        means.append(losses.mean())
        counts = {"steps": step, "images_seen": step * batch, "images": len(pool.rows)}
        if step % SAVE_EVERY == 0:
            print(f"{time.time() - begun:.0f} s, step {step}, {len(pool.rows)} images, loss {np.mean(means):.3f}",
                  file=sys.stderr, flush=True)
            means.clear()
            learner.save(arguments.end, **counts)
    rows = pool.rows
    learner.take_statistics(pool.take(noise.choice(rows, batch))[0] for _ in range(STATISTICS_BATCHES))
    learner.save(arguments.end, **counts)


# ---------------------------------------------------------------------- means, and the classes of signs

def mean(arguments):
    """Writes the weighted mean of weights, with the statistics of batch normalisation taken anew."""
    batch = 64
    renderer = Renderer(0, STATISTICS_BATCHES * batch, arguments.seed, arguments.fonts)
    files, shares = arguments.weights[::2], map(float, arguments.weights[1::2])
    parts = [(dict(np.load(file)), share) for file, share in zip(files, shares, strict=True)]
    arrays = {name: array if array.ndim == 0 else sum(share * part[name] for part, share in parts)
              for name, array in parts[-1][0].items()}
    np.savez(arguments.end, **arrays)
    while renderer.ready() < len(renderer.images):
        time.sleep(1)
    with lstm_ctc_ocr._tensorflow().Graph().as_default():
        learner = Learner(arguments.end, batch)
        learner.take_statistics(np.split(renderer.images, STATISTICS_BATCHES))
        learner.save(arguments.end, **{name: array for name, array in arrays.items() if array.ndim == 0})


class Features(LstmCtcOcr):
    """A network without its last layer."""

    def dense(self, x, units, name="dense"):
        return x if name == "dense" else super().dense(x, units, name)


def signs(arguments):
    """Fits the classes of SIGNS to images of which most are sums: the last layer's, the rest stays."""
    tf, batch, noise = lstm_ctc_ocr._tensorflow(), 64, np.random.default_rng(arguments.seed)
    processes = lstm_ctc_ocr._cores()
    count = arguments.images // processes
    pool = Pool([Renderer(number, count, arguments.seed, arguments.fonts, sums=.6) for number in range(processes)])
    while len(pool.rows) < count * processes:
        time.sleep(1)
    arrays, features, labels, lengths = dict(np.load(arguments.start)), [], [], []
    with tf.Graph().as_default(), tf.Session(config=lstm_ctc_ocr._session_config()) as session:
        ocr = Features(net="wide_cnn_lstm", n_hidden=CELLS, words=WORDS, words_max_num=LONGEST, im_width=WIDTH,
                       im_height=HEIGHT).resolve()
        network = ocr.logits(ocr._build_input(batch))
        for variable in tf.global_variables():
            variable.load(arrays[variable.op.name], session)
        for rows in pool.rows[:count * processes // batch * batch].reshape(-1, batch):
            images, *known, _ = pool.take(rows)
            distorted = noise.random(batch) < DISTORTED
            if distorted.any():
                images[distorted] = lstm_ctc_ocr.distort(images[distorted], noise)
            features.append(np.float16(session.run(network, {"images:0": images})))  # (T, B, N)
            labels.append(known[0])
            lengths.append(known[1])
    features, labels, lengths = np.concatenate(features, axis=1), np.concatenate(labels), np.concatenate(lengths)
    kernel, bias = arrays["dense/kernel"], arrays["dense/bias"]
    own = slice(BLANK - len(lstm_ctc_ocr.SIGNS), BLANK)  # the signs' classes
    with tf.Graph().as_default(), tf.Session() as session:
        seen, rate = tf.placeholder(tf.float32, [len(features), batch, CELLS]), tf.placeholder(tf.float32, [])
        sequences = tf.sparse_placeholder(tf.int32, [batch, None])
        fitted = tf.Variable(kernel[:, own]), tf.Variable(bias[own])
        logits = tf.concat([tf.einsum("tbn,nc->tbc", seen, weights) + offsets for weights, offsets in (
            (kernel[:, :own.start], bias[:own.start]), fitted, (kernel[:, BLANK:], bias[BLANK:]))], axis=2)
        losses = ocr.ctc_loss(sequences, logits)
        turned = tf.reduce_mean((1 - tf.exp(-TURNING * losses)) / TURNING) + 1e-4 * tf.reduce_sum(fitted[0] ** 2)
        train = tf.train.AdamOptimizer(rate).minimize(turned)
        session.run(tf.global_variables_initializer())
        epochs = [noise.permutation(len(labels)).reshape(-1, batch) for _ in range(30)]
        steps = np.concatenate(epochs)
        for step, rows in enumerate(steps):
            known = LstmCtcOcr.sequences_to_sparse([labels[row][:lengths[row]] for row in rows])
            loss, _ = session.run([turned, train], {
                seen: features[:, rows], sequences: known, rate: arguments.lr * (1 - step / len(steps))})
            if step % SAVE_EVERY == 0:
                print(f"step {step} of {len(steps)}, loss {loss:.3f}", file=sys.stderr, flush=True)
        kernel[:, own], bias[own] = session.run(fitted)
    np.savez(arguments.end, **arrays)


# ---------------------------------------------------------------------- from and to a model folder

def save_weights(weights, folder, step):
    """Writes {name: array} as the checkpoint of a step, the only one in the folder."""
    tf = lstm_ctc_ocr._tensorflow()
    with tf.Graph().as_default(), tf.Session() as session:
        variables = {name + LstmCtcOcr.AVERAGE: tf.Variable(value) for name, value in weights.items()}
        session.run(tf.global_variables_initializer())
        prefix = tf.train.Saver(variables, save_relative_paths=True).save(
            session, str(folder / "LstmCtcOcr"), step, write_meta_graph=False)
    for path in folder.glob("LstmCtcOcr-*"):
        if path.stem != Path(prefix).name:
            path.unlink()


def publish(model, folder):
    """Copies the best weights of a model folder into another one, without what only training needs."""
    ocr, config, weights = LstmCtcOcr()._load_model(lstm_ctc_ocr._model_folder(model))
    config = {name: value for name, value in config.items() if name not in ("curve", "samples")}
    step, folder = config.get("best_step", config["step"]), Path(folder)
    if (folder / "config.json").exists():  # what users are told of it stays
        config["about"] = LstmCtcOcr()._load_config(folder).get("about", config["net"])
    share = step / max(1, config["step"])
    config.update(step=step, images_seen=round(config["images_seen"] * share),
                  epoch=round(config["epoch"] * share, 3))
    with ocr._alone_in(folder):
        save_weights(weights, folder, step)
        ocr._save_config(folder, config)


def unpack(arguments):
    """Writes the weights of a model folder, with classes for WORDS, as an .npz file."""
    np.savez(arguments.start, **LstmCtcOcr(start_from=arguments.model, words=WORDS)._start_weights())


def pack(arguments):
    """Writes a model folder with the config.json of `general`, but for the counts, the accuracy and the temperature.

    With that temperature the labels of the held-out images are the most probable, further views included.
    """
    arrays = dict(np.load(arguments.end))
    counts = {name: int(arrays.pop(name)) for name in ("steps", "images_seen", "images")}
    config = json.loads((lstm_ctc_ocr.MODELS / "pretrained" / "general" / "config.json").read_text())
    config.update(words=WORDS, letters=WORDS.removesuffix(lstm_ctc_ocr.SIGNS))
    ocr = LstmCtcOcr(**{name: config[name] for name in lstm_ctc_ocr.ARCHITECTURE}).resolve()
    folder, (paths, texts) = Path(arguments.model), zip(*ocr.labelled_files(arguments.held))
    step = config["step"] + counts["steps"]
    config.update(step=step, best_step=step, images_seen=config["images_seen"] + counts["images_seen"],
                  images=config["images"] + counts["images"], validated_on=len(paths))
    folder.mkdir(parents=True, exist_ok=True)
    save_weights(arrays, folder, step)

    def trial(temperature):  # whether each is read right, and the confidences
        ocr._save_config(folder, config | {"temperature": temperature})
        _, readings, confidences, _ = zip(*LstmCtcOcr(model=str(folder)).recognise_files(map(str, paths)))
        return np.array(readings) == np.array(texts), confidences

    right, confidences = map(np.array, zip(*map(trial, lstm_ctc_ocr.TEMPERATURES)))
    config["temperature"] = lstm_ctc_ocr.fit_temperature(right, confidences)
    config["accuracy"] = round(float(right[lstm_ctc_ocr.TEMPERATURES.index(config["temperature"])].mean()), 3)
    ocr._save_config(folder, config)
    print(f"{folder}: {config['accuracy']:.1%} of {len(paths)}, temperature {config['temperature']}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("unpack")
    command.add_argument("model")
    command.add_argument("start", metavar="start.npz")
    command.set_defaults(run=unpack)
    command = commands.add_parser("train")
    command.add_argument("start", metavar="start.npz")
    command.add_argument("end", metavar="end.npz")
    command.add_argument("--seconds", type=float, default=6000, help="of training (6,000)")
    command.add_argument("--images", type=int, default=100_000, help="the most to render, 32 KB each (100,000)")
    command.add_argument("--batch-size", type=int, default=64)
    command.add_argument("--lr", type=float, default=7e-4, help="Adam's learning rate at the start (7e-4)")
    command.add_argument("--processes", type=int, help="that render; if not given, one a core")
    command.add_argument("--fonts", default="", help="as in create_dataset")
    command.add_argument("--seed", type=int, default=200)
    command.set_defaults(run=train)
    command = commands.add_parser("mean")
    command.add_argument("end", metavar="mean.npz")
    command.add_argument("weights", nargs="+", metavar="weights.npz SHARE")
    command.add_argument("--fonts", default="", help="as in create_dataset")
    command.add_argument("--seed", type=int, default=200)
    command.set_defaults(run=mean)
    command = commands.add_parser("signs")
    command.add_argument("start", metavar="start.npz")
    command.add_argument("end", metavar="end.npz")
    command.add_argument("--images", type=int, default=20_000, help="to render (20,000)")
    command.add_argument("--lr", type=float, default=4e-3, help="Adam's learning rate at the start (4e-3)")
    command.add_argument("--fonts", default="", help="as in create_dataset")
    command.add_argument("--seed", type=int, default=200)
    command.set_defaults(run=signs)
    command = commands.add_parser("pack")
    command.add_argument("end", metavar="end.npz")
    command.add_argument("model")
    command.add_argument("--held", type=Path, required=True, help="a folder of varied captchas not trained on")
    command.set_defaults(run=pack)
    command = commands.add_parser("publish")
    command.add_argument("model", help="a model folder that `train` wrote")
    command.add_argument("folder", help="where to write what ships of it")
    command.set_defaults(run=lambda arguments: publish(arguments.model, arguments.folder))
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
