"""Trains the shipped `general` further with PyTorch, on a GPU, while all cores but one render varied captchas for it.

    python tests/tools/train_general.py unpack general start.npz                     (needs TensorFlow)
    python tests/tools/train_general.py train start.npz end.npz --seconds 760        (needs PyTorch, and a GPU)
    python tests/tools/train_general.py pack end.npz my-model/general --held FOLDER  (needs TensorFlow)
    python tests/tools/train_general.py publish my-model/lstm my-model/pretrained/lstm

`publish` makes any model that `lstm_ctc_ocr.py train` wrote ready to ship: it leaves out what only training needs.

`train` needs of this project's packages only those that render. Its network is a copy of `wide_cnn_lstm`, because cuDNN
has no BlockLSTM. It ends after the given time, so another machine makes another number of steps. `--students 0111` also
trains a network with one residual block less, which learns from what the first network says.

Images are (64, 256, 3) uint8 inks, as `load_image` returns them. Labels are (12,) int8: 10 classes, the blank after the
last letter, then the number of letters, and whether the captcha is a plain one.
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
from lstm_ctc_ocr import CAPITALS, DIGITS, NETWORKS, LstmCtcOcr  # noqa: E402

WORDS = CAPITALS + CAPITALS.lower() + DIGITS + lstm_ctc_ocr.SIGNS
HEIGHT, WIDTH, INKS, LONGEST, CELLS, BLANK = 64, 256, 3, 10, 160, len(WORDS)
LAYERS, FEATURES = NETWORKS["wide_cnn_lstm"].convolutions, NETWORKS["wide_cnn_lstm"].projection
BLOCKS = "".join(str(blocks) for *_, blocks in LAYERS)
GATES = np.concatenate([np.arange(CELLS) + CELLS * gate for gate in (0, 2, 1, 3)])  # i, c, f, o <-> i, f, c, o
WARM_UP = 200  # steps
# In (1 - exp(-TURNING * loss)) / TURNING (Zhang and Sabuncu, 2018): leaves alone what is hopeless; at first only a
# quarter of it, so that kinds of images that are new to the network are not left out.
TURNING = 0.12
DISTORTED = 0.35  # of the images of a batch
PLAIN = 0.1  # of the images that are drawn
CAPITALISED = 0.85  # of plain captchas with other letters: they get capitals instead
FIRST_IMAGES = 10_000  # that are there before the first step
UNSEEN_LOSS = 4.0  # that an image is taken to have until it is drawn
SAVE_EVERY = 500  # steps
STATISTICS_BATCHES = 60  # that batch normalisation's final statistics are taken from


# ---------------------------------------------------------------------- rendering

class Renderer:
    """A process that renders into the shared arrays `images` and `labels`; the first `done` rows are ready."""

    def __init__(self, number, most, seed, fonts):
        context = multiprocessing.get_context("fork")  # it shares the memory
        shape = HEIGHT, WIDTH, INKS
        self.images = np.frombuffer(mmap.mmap(-1, most * math.prod(shape)), np.uint8).reshape(-1, *shape)
        self.labels = np.frombuffer(mmap.mmap(-1, most * 12), np.int8).reshape(-1, 12)
        self.done = context.Value("l", 0, lock=False)
        self.taken = 0
        self.process = context.Process(target=self.render, args=[number, seed, fonts], daemon=True)
        self.process.start()

    def render(self, number, seed, fonts):
        os.nice(5)  # the training comes first
        lstm_ctc_ocr.cv2.setNumThreads(1)
        ocr = LstmCtcOcr(net="wide_cnn_lstm", words=WORDS, words_max_num=LONGEST, im_width=WIDTH, im_height=HEIGHT,
                         look="varied", fonts=fonts).resolve()
        for row in range(len(self.images)):
            random.seed(f"{seed}-{number}-{row}")
            plain, text = ocr._draw_label()
            if plain and not set(text) <= set(CAPITALS) and random.random() < CAPITALISED:
                length = max(len(text), random.randint(1, LONGEST))  # the longest are the hardest
                text = "".join(random.choices(CAPITALS, k=length))
            self.images[row] = ocr.load_image(ocr._draw(plain, text))
            self.labels[row] = [*map(WORDS.index, text), *[BLANK] * (LONGEST - len(text)), len(text), plain]
            self.done.value = row + 1

    def new(self):
        """Returns the images and labels that are new since the last call."""
        if self.process.exitcode:
            sys.exit("a renderer ended, see above")
        rows = slice(self.taken, self.done.value)
        self.taken = rows.stop
        return self.images[rows], self.labels[rows]


# ---------------------------------------------------------------------- the twin of the network

def twin(torch, blocks=BLOCKS):
    """Returns the network, a module from inks (B, 3, H, W), 0 to 255, to logits (T, B, C).

    Its `load` and `arrays` use the names and shapes of TensorFlow's variables. blocks: for each convolution a digit,
    the number of residual blocks behind it.
    """
    functional = torch.nn.functional

    class Convolution(torch.nn.Module):
        def __init__(self, inputs, channels, size, *strides):
            super().__init__()
            self.size, self.strides = size, strides
            self.convolution = torch.nn.Conv2d(inputs, channels, size, strides, bias=False,
                                               padding=size // 2 if strides == (1, 1) else 0)
            self.normalisation = torch.nn.BatchNorm2d(channels, eps=1e-3, momentum=.02)

        def forward(self, x):
            if self.strides != (1, 1):
                pads = []  # TensorFlow's SAME: where it is odd, more of it comes behind
                for length, stride in zip(x.shape[:1:-1], self.strides[::-1]):
                    pad = max((math.ceil(length / stride) - 1) * stride + self.size - length, 0)
                    pads += [pad // 2, pad - pad // 2]
                x = functional.pad(x, pads)
            return self.normalisation(self.convolution(x))

        def variables(self):
            norm = self.normalisation
            return {"kernel": (self.convolution.weight, (2, 3, 1, 0)), "scale": (norm.weight, None),
                    "offset": (norm.bias, None), "mean": (norm.running_mean, None),
                    "variance": (norm.running_var, None)}

    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.convolutions, channels = torch.nn.ModuleDict(), INKS
            for number, (outputs, size, down, across, _) in enumerate(LAYERS, 1):
                self.convolutions[f"convolution{number}"] = Convolution(channels, outputs, size, down, across)
                for block in range(1, int(blocks[number - 1]) + 1):
                    for half in "ab":
                        name = f"convolution{number}/residual{block}{half}"
                        self.convolutions[name] = Convolution(outputs, outputs, 3, 1, 1)
                channels = outputs
            height = HEIGHT // math.prod(down for _, _, down, _, _ in LAYERS)
            self.projection = torch.nn.Linear(height * channels, FEATURES)
            self.lstm = torch.nn.LSTM(FEATURES, CELLS, bidirectional=True)
            self.dense = torch.nn.Linear(2 * CELLS, BLANK + 1)
            for name, bias in self.lstm.named_parameters():  # PyTorch adds two; of one there is no need
                bias.requires_grad_("bias_hh" not in name)

        def forward(self, x):
            x = (x * (3 / 255)).contiguous(memory_format=torch.channels_last)
            with torch.autocast(x.device.type, dtype=torch.bfloat16, cache_enabled=False):
                for name, convolution in self.convolutions.items():
                    if name.endswith("a"):
                        y = functional.relu(convolution(x))
                    else:
                        x = functional.relu(x + convolution(y) if name.endswith("b") else convolution(x))
                x = x.permute(3, 0, 2, 1).flatten(2)  # (T, B, H * C)
                x, _ = self.lstm(functional.relu(self.projection(x)))
            return self.dense(x.float())

        def variables(self):
            """(tensor, axes to transpose it by) of each variable but the LSTM's."""
            each = {f"{name}/{kind}": variable for name, convolution in self.convolutions.items()
                    for kind, variable in convolution.variables().items()}
            for name, layer in (("projection", self.projection), ("dense", self.dense)):
                each |= {f"{name}/kernel": (layer.weight, (1, 0)), f"{name}/bias": (layer.bias, None)}
            return each

        def lstms(self):
            """(name, weights of the inputs, of the recurrence, bias, the other bias) of each direction."""
            for name, suffix in (("forward", ""), ("backward", "_reverse")):
                yield name, *(getattr(self.lstm, f"{part}_l0{suffix}")
                              for part in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))

        @torch.no_grad()
        def load(self, arrays):
            """Takes the weights {name: array} of TensorFlow's variables.

            A convolution that is not among them becomes the end of a residual block that changes nothing; a kernel for
            fewer channels does not look at the others.
            """
            for name, (tensor, axes) in self.variables().items():
                if name in arrays:
                    array = np.transpose(arrays[name], axes and np.argsort(axes))
                    tensor.zero_()
                    tensor[tuple(map(slice, array.shape))].copy_(torch.from_numpy(np.ascontiguousarray(array)))
                elif name.endswith("b/scale"):
                    tensor.zero_()
            for name, inputs, recurrence, bias, other in self.lstms():
                kernel, gates = arrays[f"{name}/kernel"].T[GATES], arrays[f"{name}/bias"].copy()
                gates[2 * CELLS:3 * CELLS] += 1  # BlockLSTM's forget_bias
                inputs.copy_(torch.tensor(kernel[:, :FEATURES]))
                recurrence.copy_(torch.tensor(kernel[:, FEATURES:]))
                bias.copy_(torch.tensor(gates[GATES]))
                other.zero_()

        def arrays(self):
            arrays = {name: (tensor.permute(axes) if axes else tensor).detach().cpu().numpy()
                      for name, (tensor, axes) in self.variables().items()}
            for name, *parts in self.lstms():
                inputs, recurrence, bias, _ = (part.detach().cpu().numpy()[GATES] for part in parts)
                bias[2 * CELLS:3 * CELLS] -= 1
                arrays |= {f"{name}/kernel": np.concatenate([inputs.T, recurrence.T]), f"{name}/bias": bias}
            return arrays

    return Network()


def distort(torch, x):
    """As `lstm_ctc_ocr.distort`, and a little more, on the GPU: x (n, C, H, W) float32 of 0 to 255."""
    functional, n, device = torch.nn.functional, len(x), x.device

    def between(low, high):
        return torch.rand(n, 1, 1, 1, device=device) * (high - low) + low

    def some(share):
        return (torch.rand(n, 1, 1, 1, device=device) < share).float()

    def grains():  # (n, 1, H, W) of 0 to 1, in squares of up to three pixels
        coarse = torch.rand(n, 1, *random.choice(((64, 256), (32, 128), (24, 96))), device=device)
        return functional.interpolate(coarse, (HEIGHT, WIDTH))

    ink = (x.amax(dim=(1, 2)) > 40) * torch.arange(1, WIDTH + 1, device=device)
    end = ink.amax(dim=1).float().clamp(min=1).view(n, 1, 1, 1)
    down, right = (axis[None, None] for axis in torch.meshgrid(
        torch.arange(float(HEIGHT), device=device), torch.arange(float(WIDTH), device=device), indexing="ij"))
    # moved, scaled, sheared, turned, bent
    u, v = right - end / 2 + between(-6, 6), down - HEIGHT / 2 + between(-4, 4)
    u, v = (between(.89, 1.13) * u + between(-.15, .15) * v + end / 2,
            between(-.04, .04) * u + between(.89, 1.13) * v + HEIGHT / 2)
    dents = functional.interpolate(torch.randn(n, 2, 4, 9, device=device) * 1.5, (HEIGHT, WIDTH), mode="bicubic")
    u, v = torch.split(torch.cat([u, v], dim=1) + dents * some(.5), 1, dim=1)
    places = torch.cat([(u + .5) * (2 / WIDTH) - 1, (v + .5) * (2 / HEIGHT) - 1], dim=1).permute(0, 2, 3, 1)
    x = functional.grid_sample(x, places, align_corners=False)
    # blurred, coarser, fatter, thinner
    kernel = torch.tensor([.0614, .2448, .3877, .2448, .0614], device=device)
    blurred = functional.conv2d(functional.pad(x.flatten(0, 1)[:, None], [2] * 4), (kernel[:, None] * kernel)[None, None])
    blurred = blurred.view_as(x)
    x = torch.lerp(x, blurred, some(.3) * between(.2, 1))
    rows = random.choice((20, 24, 28, 34, 40))
    coarse = functional.interpolate(functional.interpolate(x, (rows, 4 * rows), mode="area"), (HEIGHT, WIDTH))
    x = torch.lerp(x, coarse, some(.15))
    x = torch.lerp(x, functional.max_pool2d(x, 3, 1, 1), some(.08))
    x = torch.lerp(x, -functional.max_pool2d(-x, 3, 1, 1), some(.06))
    # pixels missing, pixels too many, noise
    x = x * (1 - some(.1) * (grains() < between(.05, .45)))
    x = torch.lerp(x, between(60, 255).expand_as(x), some(.1) * (grains() < between(.01, .12)))
    x = (x + some(.3) * between(3, 20) * torch.randn_like(x)).clamp(0, 255)
    # paler or darker, black and white
    x = torch.where(some(.5) > 0, 255 * (x / 255) ** between(.7, 1.4), x)
    x = torch.lerp(x, 255 * torch.sigmoid((x - between(70, 150)) / 8), some(.06))
    for _ in range(3):  # holes
        top, left = between(0, HEIGHT), between(0, 1) * end
        hole = (down >= top) & (down < top + between(0, 14)) & (right >= left) & (right < left + between(0, 14))
        x = torch.lerp(x, 128 * some(.33).expand_as(x), hole * some(.15))
    return x


# ---------------------------------------------------------------------- training

class Pool:
    """All images so far, on the GPU, and the loss that each had when it was last drawn."""

    def __init__(self, torch, renderers, device):
        self.torch, self.renderers, self.count = torch, renderers, 0
        most = sum(len(each.images) for each in renderers)
        self.images = torch.empty((most, INKS, HEIGHT, WIDTH), dtype=torch.uint8, device=device)
        self.labels = torch.empty((most, 12), dtype=torch.int8, device=device)
        self.losses = torch.full((most,), UNSEEN_LOSS, device=device)

    def collect(self):
        for renderer in self.renderers:
            images, labels = renderer.new()
            rows = slice(self.count, self.count + len(images))
            self.images[rows] = self.torch.from_numpy(images.transpose(0, 3, 1, 2))
            self.labels[rows] = self.torch.from_numpy(labels)
            self.count = rows.stop

    def draw(self, count):
        """Rows (count,) by importance, what is neither known nor hopeless the most, their weights, the mean 1, and the
        lengths of their labels."""
        torch, losses = self.torch, self.losses[:self.count]
        chances = .05 + torch.exp(-TURNING * losses) * (1 - torch.exp(-losses))
        plain = self.labels[:self.count, -1] > 0
        share = chances[plain].sum() / chances.sum()
        chances = chances * torch.where(plain, PLAIN / share, (1 - PLAIN) / (1 - share))
        rows = torch.multinomial(chances, count, replacement=self.count < 2 * count)
        rows = rows[torch.randperm(count, device=rows.device)]  # they come sorted, more or less
        weights = (chances[rows] / chances.mean()).clamp(min=.02) ** -.5  # not -1: that is too rough
        return rows, weights / weights.mean(), self.labels[rows, LONGEST].tolist()


def take_statistics(torch, net, pool, batch_size):
    """Takes batch normalisation's statistics anew, as plain means over batches that are not distorted."""
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None
            module.reset_running_stats()
    with torch.no_grad():
        for _ in range(STATISTICS_BATCHES):
            rows = torch.randint(pool.count, (batch_size,), device=pool.images.device)
            type(net).forward(net, pool.images[rows].float())  # not the graph: momentum is a constant there


class Learner:
    """A network in training, on a GPU as a graph of kernels: to launch each by itself takes longer than they do."""

    def __init__(self, torch, arguments, blocks, device):
        self.torch, self.net, self.losses = torch, twin(torch, blocks), []
        self.end = arguments.end if blocks == BLOCKS else f"{arguments.end.removesuffix('.npz')}-{blocks}"
        self.net.load(np.load(arguments.start))
        self.net.to(device).train()
        self.parameters = [parameter for parameter in self.net.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.Adam(self.parameters, fused=device == "cuda")
        if device == "cuda":
            like = torch.zeros(arguments.batch_size, INKS, HEIGHT, WIDTH, device=device)
            torch.cuda.make_graphed_callables(self.net, (like,))

    def step(self, loss, rate):
        self.optimizer.param_groups[0]["lr"] = rate
        self.optimizer.zero_grad()
        loss.backward()
        self.torch.nn.utils.clip_grad_norm_(self.parameters, LstmCtcOcr.MAX_GRADIENT_NORM)
        self.optimizer.step()


def train(arguments):
    import torch
    torch.manual_seed(arguments.seed)
    torch.backends.cudnn.benchmark = True
    # Raises an error now if the fonts lack a letter.
    LstmCtcOcr(words=WORDS, look="varied", fonts=arguments.fonts)._fonts_found()
    processes = arguments.processes or max(1, lstm_ctc_ocr._cores() - 1)
    renderers = [Renderer(number, arguments.images // processes, arguments.seed, arguments.fonts)
                 for number in range(processes)]  # forked before this process opens a GPU
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pool, batch = Pool(torch, renderers, device), arguments.batch_size
    learners = [Learner(torch, arguments, blocks, device) for blocks in (BLOCKS, *arguments.students)]

    def save():
        for learner in learners:
            np.savez(learner.end, **learner.net.arrays(), steps=step, images_seen=step * batch, images=pool.count)

    while pool.count < min(FIRST_IMAGES, arguments.images // 2):
        time.sleep(.5)
        pool.collect()
    begun, step, rows = time.time(), 0, ()
    while (share := (time.time() - begun) / arguments.seconds) < 1:
        if len(rows) < batch:
            pool.collect()
            rows, weights, lengths = pool.draw(40 * batch)
        now, rows, weight, weights = rows[:batch], rows[batch:], weights[:batch], weights[batch:]
        length, lengths = lengths[:batch], lengths[batch:]
        x, labels, distorted = pool.images[now].float(), pool.labels[now].long(), int(DISTORTED * batch)
        x[:distorted] = distort(torch, x[:distorted])
        turning, rate = TURNING * max(.25, share), arguments.lr * min(1, (step + 1) / WARM_UP) * (1 - share)
        teacher = None
        for learner in learners:
            scores = learner.net(x).log_softmax(2)
            loss = torch.nn.functional.ctc_loss(scores, labels[:, :LONGEST], [len(scores)] * batch, length, BLANK,
                                                "none")
            learner.losses.append(loss.detach().mean())
            turned = (1 - torch.exp(-turning * loss)) / turning
            if teacher is None:
                teacher = scores.detach()
                pool.losses[now] = loss.detach()
            else:  # to say in each step what the teacher says of it (Hinton et al., 2015, arXiv:1503.02531)
                turned = turned / 2 + (teacher.exp() * (teacher - scores)).sum(dim=(0, 2))
            learner.step((weight * turned).mean(), rate)
        step += 1
        if step % SAVE_EVERY == 0:
            means = [f"{torch.stack(learner.losses).mean():.3f}" for learner in learners]
            print(f"{time.time() - begun:.0f} s, step {step}, {pool.count} images, loss {', '.join(means)}",
                  file=sys.stderr, flush=True)
            for learner in learners:
                learner.losses.clear()
            save()
    for learner in learners:
        take_statistics(torch, learner.net, pool, batch)
    save()


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
    config = {name: value for name, value in config.items() if name not in ("curve", "idle")}
    step, folder = config.get("best_step", config["step"]), Path(folder)
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
    command.add_argument("--students", nargs="*", default=(), metavar="BLOCKS",
                         help="networks to train beside it, by the residual blocks behind each of their convolutions "
                              f"(its own are {BLOCKS}); they are written as end-BLOCKS.npz")
    command.add_argument("--seconds", type=float, default=760, help="of training (760)")
    command.add_argument("--images", type=int, default=1_650_000, help="the most to render, 16 KB each (1,650,000)")
    command.add_argument("--batch-size", type=int, default=384)
    command.add_argument("--lr", type=float, default=2e-3, help="Adam's learning rate at the start (2e-3)")
    command.add_argument("--processes", type=int, help="that render; if not given, one a core but one")
    command.add_argument("--fonts", default="", help="as in create_dataset")
    command.add_argument("--seed", type=int, default=200)
    command.set_defaults(run=train)
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
