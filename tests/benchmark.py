"""Measures the speed of this project, mostly as ratios of figures taken in one run.

    python tests/benchmark.py [train|read|start|render|serve|cluster|soak] [--net lstm|cnn_lstm]
                              [--model MODEL] [--json]

Machines differ, and one machine differs from hour to hour. A ratio of two things that took turns
does not. Nothing else should run meanwhile.
"""

import argparse
import collections
import contextlib
import functools
import importlib.util
import json
import os
import re
import selectors
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# Each session has threads of its own: TensorFlow's default ones, or this project's.
os.environ["TF_OVERRIDE_GLOBAL_THREADPOOL"] = "1"

import numpy as np  # noqa: E402
import tensorflow.compat.v1 as tf  # noqa: E402

import lstm_ctc_ocr  # noqa: E402
from lstm_ctc_ocr import LstmCtcOcr  # noqa: E402

ROUNDS = 7
POST = (b"POST /captchaOcr HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: image/png\r\n"
        b"Content-Length: %d\r\n\r\n")


def take_turns(*jobs):
    """Returns the median seconds of each job. They take turns, so that a slow moment meets all."""
    for job in jobs:
        job()
    times = [[] for _ in jobs]
    for _ in range(ROUNDS):
        for job, taken in zip(jobs, times):
            begun = time.perf_counter()
            job()
            taken.append(time.perf_counter() - begun)
    return [statistics.median(taken) for taken in times]


def rendered(count, folder):
    """Renders captchas; returns the (path, text) of `count` of them."""
    LstmCtcOcr(dataset=folder, im_total_num=count, seed=5).create_dataset()
    paths = sorted(Path(folder).glob("*_*.png"))[:count]
    return [(path, path.stem.split("_")[1]) for path in paths]


def article_step(ocr, batch_size, images, texts):
    """Returns a function that runs the article's own training step.

    It is a plain cell in a while_loop, with the gradient and the threads that TensorFlow gives it.
    """
    cells, classes = ocr.n_hidden, len(ocr.words) + 1
    with tf.Graph().as_default():
        pixels = tf.constant(images[:batch_size])
        columns = tf.transpose(tf.cast(pixels, tf.float32) / 255, [2, 0, 1])
        kernel = tf.get_variable("kernel", [ocr.im_height + cells, 4 * cells])
        bias = tf.get_variable("bias", [4 * cells], initializer=tf.zeros_initializer())
        projection = tf.get_variable("projection", [cells, classes])

        def step(t, h, c, outputs):
            gates = tf.matmul(tf.concat([columns[t], h], axis=1), kernel) + bias
            i, g, f, o = tf.split(gates, 4, axis=1)
            c = tf.sigmoid(f + 1) * c + tf.sigmoid(i) * tf.tanh(g)
            h = tf.sigmoid(o) * tf.tanh(c)
            return t + 1, h, c, outputs.write(t, h)

        zero = tf.zeros([batch_size, cells])
        first = 0, zero, zero, tf.TensorArray(tf.float32, ocr.im_width)
        outputs = tf.while_loop(lambda t, *_: t < ocr.im_width, step, first)[-1].stack()
        logits = tf.einsum("tbn,nc->tbc", outputs, projection)
        sequences = [ocr.text_to_sequence(text) for text in texts[:batch_size]]
        labels = tf.SparseTensor(*ocr.sequences_to_sparse(sequences))
        steps = tf.fill([batch_size], ocr.im_width)
        loss = tf.reduce_mean(tf.nn.ctc_loss(labels, logits, steps))
        train = tf.train.AdamOptimizer(5e-5).minimize(loss)
        session = tf.Session()
        session.run(tf.global_variables_initializer())
    return lambda: session.run(train)


def our_step(ocr, images, texts):
    """Returns a function that runs this project's training step."""
    with tf.Graph().as_default():
        net = ocr._build_training(1000, LstmCtcOcr._Place())
        session = tf.Session(config=lstm_ctc_ocr._session_config())
        session.run(tf.global_variables_initializer())
    sequences = [ocr.text_to_sequence(text) for text in texts[:ocr.batch_size]]
    batch = {net.images: images[:ocr.batch_size],
             net.sequences: ocr.sequences_to_sparse(sequences)}
    return lambda: session.run([net.loss, net.gradient_norm, net.train], batch)


def matrix_product():
    """Returns a function that multiplies two matrices of 2048 x 2048, and its operations."""
    with tf.Graph().as_default():
        cube = tf.get_variable("cube", [2048, 2048])
        product = tf.reduce_sum(tf.matmul(cube, cube))
        session = tf.Session()
        session.run(tf.global_variables_initializer())
    return lambda: session.run(product), 2 * 2048 ** 3


def multiplications(ocr):
    """Returns how many multiplications a training step needs for an image.

    The way back takes twice as many as the way forward, but for the image: it needs no gradient.
    """
    def lstm(inputs, cells, passed_back):
        return ocr.steps * 4 * cells * ((2 + passed_back) * inputs + 3 * cells)

    classes = len(ocr.words) * ocr.label_parts + 1
    dense = 3 * ocr.steps * ocr.n_hidden * classes
    network = lstm_ctc_ocr.NETWORKS[ocr.net]
    if not network.convolutions:
        return lstm(ocr.im_height, ocr.n_hidden, False) + dense
    height, width, channels, total = ocr.im_height, ocr.im_width, 1, dense
    for number, (outputs, size, down, across, blocks) in enumerate(network.convolutions):
        height, width = -(-height // down), -(-width // across)
        total += (3 if number else 2) * height * width * size ** 2 * channels * outputs
        total += blocks * 2 * 3 * height * width * 3 ** 2 * outputs ** 2
        channels = outputs
    features = network.projection
    total += 3 * ocr.steps * height * channels * features
    return total + 2 * lstm(features, ocr.n_hidden // 2, True)


def benchmark_train(ocr, folder):
    """A training step against the article's, and against the machine's matrix products."""
    ocr = ocr.resolve()
    paths, texts = zip(*rendered(max(16, ocr.batch_size), folder))
    images = np.stack([ocr.load_image(path) for path in paths])
    product, operations = matrix_product()
    theirs, ours, peak = take_turns(
        article_step(ocr, 16, images, texts), our_step(ocr, images, texts), product)
    rate = 2 * multiplications(ocr) * ocr.batch_size / ours
    return {"train_images_per_second": ocr.batch_size / ours,
            "article_images_per_second": 16 / theirs,
            "train_vs_article": ocr.batch_size / ours / (16 / theirs), "train_gflops": rate / 1e9,
            "peak_gflops": operations / peak / 1e9,
            "train_share_of_peak": rate / (operations / peak)}


def exported(ocr, folder):
    """Writes the same model as an ONNX file; returns its path."""
    path = str(Path(folder) / "reader.onnx")
    ocr.export(path)
    return path


def benchmark_read(ocr, folder):
    """Milliseconds an image with TensorFlow and with ONNX Runtime, from the file to the text."""
    paths = [path for path, _ in rendered(256, folder)]

    def one_by_one(reader):
        return lambda: [reader.recognise([path]) for path in paths[:16]]

    def in_batches(reader):
        return lambda: list(reader.recognise_files(paths))

    onnx = LstmCtcOcr(model=exported(ocr, folder))
    one, many, onnx_one, onnx_many = take_turns(
        one_by_one(ocr), in_batches(ocr), one_by_one(onnx), in_batches(onnx))
    return {"read_ms_batch1": one / 16 * 1e3, "read_ms_batch64": many / 256 * 1e3,
            "read_images_per_second_batch1": 16 / one,
            "read_images_per_second_batch64": 256 / many,
            "onnx_ms_batch1": onnx_one / 16 * 1e3, "onnx_ms_batch64": onnx_many / 256 * 1e3}


def benchmark_start(ocr, folder):
    """Seconds from the start of a process to the text of one image, with either library."""
    def start(model):
        subprocess.run([sys.executable, "lstm_ctc_ocr.py", "test", "dataset/test/0_PIY.png",
                        "--model", model], cwd=ROOT, check=True, capture_output=True)

    path = exported(ocr, folder)
    tensorflow, onnx = take_turns(lambda: start(ocr.model or ocr.net), lambda: start(path))
    return {"start_seconds": tensorflow, "start_seconds_onnx": onnx}


def benchmark_render(_, folder):
    """Images a second with one worker and with two, without the start of the workers."""
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


@contextlib.contextmanager
def serving(ocr, change="pass", model=""):
    """Starts a server; yields its process and port.

    change: a line of Python that the server runs first, or "gunicorn" for two processes of it.
    model: what it reads with; if not given, that of `ocr`.
    """
    model = str(model or ocr.model or ocr.net)
    flags = ["start", "--port", "0", "--model", model]
    command = ["-c", f"import lstm_ctc_ocr\n{change}\nlstm_ctc_ocr.main({flags})"]
    if change == "gunicorn":
        command = ["-m", "gunicorn", "--workers", "2", "--threads", "32", "--bind", "127.0.0.1:0",
                   f"lstm_ctc_ocr:create_app(model={model!r})"]
    process = subprocess.Popen([sys.executable, *command], cwd=ROOT, stderr=subprocess.PIPE,
                               text=True)
    addresses = (re.search(r"127.0.0.1:(\d+)", line) for line in process.stderr)
    port = int(next(filter(None, addresses))[1])
    # Its further messages are read and dropped, or it would wait for a reader.
    threading.Thread(target=lambda: collections.deque(process.stderr, 0), daemon=True).start()
    try:
        yield process, port
    finally:
        process.terminate()
        process.wait()


def load(port, bodies, clients=16):
    """Posts (body, expected text, or None if it must be refused), by 16 clients at once.

    Each client waits for its answer. Returns requests a second, and the seconds of each. One
    thread plays all clients, for they must not take much of the machine that they measure. Raises
    AssertionError for an answer that is not the expected one.
    """
    waiting, taken, start = collections.deque(bodies), [], time.perf_counter()
    with selectors.DefaultSelector() as selector, contextlib.ExitStack() as stack:
        def post(connection):
            body, text = waiting.popleft()
            connection.sendall(POST % len(body) + body)
            data = bytearray(), text, time.perf_counter()
            selector.register(connection, selectors.EVENT_READ, data)

        for _ in range(min(clients, len(bodies))):
            post(stack.enter_context(socket.create_connection(("127.0.0.1", port))))
        while selector.get_map():
            for key, _ in selector.select():
                (answer, text, begun), connection = key.data, key.fileobj
                answer += connection.recv(65536)
                head, _, content = answer.partition(b"\r\n\r\n")
                length = re.search(rb"(?i)content-length: *(\d+)", head)
                if length and len(content) == int(length[1]):
                    taken.append(time.perf_counter() - begun)
                    selector.unregister(connection)
                    check(int(head.split()[1]), json.loads(content), text)
                    if waiting:
                        post(connection)
    return len(bodies) / (time.perf_counter() - start), taken


def check(status, answer, text):
    if text is None:
        assert 400 <= status < 500 and list(answer) == ["error"], answer
    else:
        assert status == 200 and answer["ocr_ret"] == text, answer


def posted(ocr, folder, count):
    """Returns (PNG, the text that the model reads in it) of `count` captchas."""
    paths = [path for path, _ in rendered(count, folder)]
    return [(Path(path).read_bytes(), text) for path, text, *_ in ocr.recognise_files(paths)]


# The end of a figure's name: the line of Python by which its server differs.
SERVERS = {"": "pass", "_unbatched": "lstm_ctc_ocr.LstmCtcOcr.SERVE_BATCH = 1",
           "_onnx": "assert 'tensorflow' not in lstm_ctc_ocr.sys.modules"}
if importlib.util.find_spec("gunicorn"):
    SERVERS |= {"_gunicorn": "gunicorn", "_gunicorn_onnx": "gunicorn"}


def benchmark_serve(ocr, folder):
    """16 clients against a server as it is, one without batches, and one without TensorFlow.

    If gunicorn is installed, two processes of it too. Returns requests a second, the latency of
    the slowest hundredth, and the CPU milliseconds a request and the memory of the server alone.
    """
    bodies, speeds, costs, latencies = posted(ocr, folder, 128), {}, {}, {}
    models = dict.fromkeys(("_onnx", "_gunicorn_onnx"), exported(ocr, folder))
    with contextlib.ExitStack() as stack:
        servers = {name: stack.enter_context(serving(ocr, change, models.get(name)))
                   for name, change in SERVERS.items()}
        other = stack.enter_context(ProcessPoolExecutor(1))
        for part in range(4):
            for name, (process, port) in servers.items():
                asked = bodies * (8 if part else 1)
                before = cpu_seconds(process)
                speed, taken = other.submit(load, port, asked).result()
                if part:  # after the first, which only warms up
                    speeds.setdefault(name, []).append(speed)
                    used = (cpu_seconds(process) - before) / len(asked)
                    costs.setdefault(name, []).append(used * 1e3)
                    latencies.setdefault(name, []).extend(taken)
        memory = {name: resident_mb(process) for name, (process, _) in servers.items()}
    figures = {}
    for name in servers:
        figures["serve_p99_ms" + name] = statistics.quantiles(latencies[name], n=100)[98] * 1e3
        figures["serve_mb" + name] = memory[name]
        figures["serve_requests_per_second" + name] = statistics.median(speeds[name])
        figures["serve_cpu_ms" + name] = statistics.median(costs[name])
    speed = {name: figures["serve_requests_per_second" + name] for name in servers}
    return {**figures, "serve_vs_unbatched": speed[""] / speed["_unbatched"],
            **{"serve_onnx_vs_tensorflow" + name: speed[name + "_onnx"] / speed[name]
               for name in ("", "_gunicorn") if name in speed}}


def family(process):
    """Returns the ids of a process and of those that it has started."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [process.pid, *children.read_text().split()]


def cpu_seconds(process):
    """Returns the CPU time of a process and its children so far, of all cores together."""
    ticks = 0
    for pid in family(process):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])  # of the user, of the system
    return ticks / os.sysconf("SC_CLK_TCK")


def resident_mb(process):
    """Returns the memory of a process and its children, in megabytes."""
    statuses = (Path(f"/proc/{pid}/status").read_text() for pid in family(process))
    return sum(int(re.search(r"VmRSS:\s+(\d+)", status)[1]) for status in statuses) / 1024


def benchmark_soak(ocr, folder):
    """The memory of a server after 2,000 requests and after 20,000, a fifth of them bad."""
    bodies = posted(ocr, folder, 128)
    bodies += [(body[:draw], None) for draw, (body, _) in enumerate(bodies[:32], 20)]
    with serving(ocr) as (process, port), ProcessPoolExecutor(1) as other:
        memory = []
        for requests in (2000, 18000):
            asked = (bodies * (requests // len(bodies) + 1))[:requests]
            other.submit(load, port, asked).result()
            memory.append(resident_mb(process))
    return {"soak_mb_after_2000": memory[0], "soak_mb_after_20000": memory[1],
            "soak_growth": memory[1] / memory[0] - 1}


def cluster_task(net, dataset, model, workers, cluster, job, index=0, core=None):
    """Starts one process of a cluster, pinned to a core if one is given."""
    images, batch_size = 400 // workers, LstmCtcOcr.batch_size
    task = {"cluster": cluster, "task": {"type": job, "index": index}}
    return subprocess.Popen(
        [sys.executable, "lstm_ctc_ocr.py", "train", "--net", net, "--dataset", dataset,
         "--model", model, "--epoch-max", str(200 / (images // batch_size)), "--val-num", "8",
         "--save-epoch", "99"],
        cwd=ROOT, text=True, env={**os.environ, "TF_CONFIG": json.dumps(task)},
        stderr=subprocess.PIPE if job == "chief" else subprocess.DEVNULL,
        preexec_fn=None if core is None else lambda: os.sched_setaffinity(0, [core]))


def cluster_speed(net, dataset, model, workers):
    """Trains 200 steps with one parameter server, and each worker on a core of its own.

    Returns images a second of all workers together over the last 100 steps, and bytes a step.
    """
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(workers + 1)]
    server, chief, *others = [f"127.0.0.1:{each.getsockname()[1]}" for each in sockets]
    cluster = {"ps": [server], "chief": [chief], **({"worker": others} if others else {})}
    for each in sockets:
        each.close()
    start = functools.partial(cluster_task, net, dataset, model, workers, cluster)
    cores = sorted(os.sched_getaffinity(0))
    tasks = [start("chief", core=cores[0]), start("ps"),
             *(start("worker", index, cores[index + 1]) for index in range(len(others)))]
    moments = []
    for line in tasks[0].stderr:
        if found := re.match(r"epoch .* step (\d+) ", line):
            sent = int(re.search(r"lo: *(\d+)", Path("/proc/net/dev").read_text())[1])
            moments.append((int(found[1]), time.perf_counter(), sent))
    if tasks[0].wait():
        for task in tasks:
            task.kill()
        raise RuntimeError("the chief of the cluster has failed")
    for task in tasks:
        task.wait()
    (step, begun, sent), (last, ended, received) = moments[0], moments[-1]
    images = (last - step) * LstmCtcOcr.batch_size * workers
    return images / (ended - begun), (received - sent) / (last - step)


def benchmark_cluster(ocr, folder):
    """One worker against two, each on a core of its own."""
    LstmCtcOcr(dataset=f"{folder}/train", im_total_num=400 + 8 + 8, seed=5).create_dataset()
    speeds, traffic = {}, {}
    for workers in (1, 2):
        with tempfile.TemporaryDirectory(dir=folder) as model:
            speeds[workers], traffic[workers] = cluster_speed(
                ocr.resolve().net, f"{folder}/train", model, workers)
    one, two, sent = speeds[1], speeds[2], traffic[1]
    seconds = LstmCtcOcr.batch_size / one  # of a step
    return {"cluster_images_per_second_1": one, "cluster_images_per_second_2": two,
            "cluster_efficiency": two / one / 2,
            "cluster_megabytes_a_step": sent / 1e6,  # of one worker, both ways together
            "cluster_workers_at_10_gbit": 1.25e9 / (sent / 2 / seconds)}


BENCHMARKS = {"train": benchmark_train, "read": benchmark_read, "start": benchmark_start,
              "render": benchmark_render, "serve": benchmark_serve, "cluster": benchmark_cluster}
ON_REQUEST = {"soak": benchmark_soak}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("which", nargs="?", choices=[*BENCHMARKS, *ON_REQUEST],
                        help="one of them; by default all but soak")
    parser.add_argument("--net", default="lstm", choices=lstm_ctc_ocr.NETWORKS)
    parser.add_argument("--model", default="", help="to read and serve with, instead of --net's")
    parser.add_argument("--json", action="store_true", help="print one object, last")
    arguments = parser.parse_args()
    chosen = {"model": arguments.model} if arguments.model else {"net": arguments.net}
    figures = {}
    for name in [arguments.which] if arguments.which else BENCHMARKS:
        with tempfile.TemporaryDirectory() as folder:
            figures.update({**BENCHMARKS, **ON_REQUEST}[name](LstmCtcOcr(**chosen), folder))
    if arguments.json:
        print(json.dumps({key: round(value, 3) for key, value in figures.items()}))
    else:
        for key, value in figures.items():
            print(f"{key:32} {value:10.2f}")


if __name__ == "__main__":
    main()
