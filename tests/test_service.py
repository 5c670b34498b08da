"""The real server, over a socket; what would be slow there, through Flask's client."""

import base64
import contextlib
import functools
import http.client
import io
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote

import cv2
import numpy as np
import pytest
import schemathesis
from conftest import ROOT, SHIPPED, spawn
from hypothesis import HealthCheck, given, settings
from PIL import Image
from schemathesis.specs.openapi.checks import positive_data_acceptance

import lstm_ctc_ocr
from lstm_ctc_ocr import LstmCtcOcr

SAMPLES = {path.stem.split("_")[1]: path.read_bytes() for path in (ROOT / "dataset" / "test").glob("*.png")}
PNG = {"Content-Type": "image/png"}


@contextlib.contextmanager
def serving(*flags, **kwargs):
    """A server as a process; yields it and its port, once it says that it is ready."""
    process = spawn("start", "--port", 0, "--model", SHIPPED, *flags, **kwargs)
    for line in process.stderr:
        if ready := re.match(r"http://.*:(\d+)/captchaOcr", line):
            break
    yield process, int(ready[1])
    threading.Thread(target=process.stderr.read).start()  # so that it cannot block on a full pipe
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0


@pytest.fixture(scope="module")
def server(tmp_path_factory, engine):
    """The port of a server of the shipped model, by each engine, started from another folder than the script's."""
    with serving("--model", engine(SHIPPED), cwd=tmp_path_factory.mktemp("elsewhere")) as (process, port):
        threading.Thread(target=process.stderr.read, daemon=True).start()  # its log, lest it wait for a reader
        yield port


def ask(port, method, target, body=None, headers=()):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request(method, target, body, dict(headers))
    response = connection.getresponse()
    return response.status, json.loads(response.read())


def get(port, img_path):
    return ask(port, "GET", "/captchaOcr?img_path=" + quote(img_path))


def as_form(*images):
    """A multipart body and its headers."""
    part = b'--b\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n%s\r\n'
    body = b"".join(part % image for image in images) + b"--b--\r\n"
    return body, {"Content-Type": "multipart/form-data; boundary=b"}


# ---------------------------------------------------------------------- ways in

def test_it_answers_as_in_the_article(server):
    for text, path in [("PIY", "./dataset/test/0_PIY.png"), ("BCAVDPXT", "dataset/test/1_BCAVDPXT.png"),
                       ("N", "test/2_N.png"), ("PIY", str(ROOT / "dataset" / "test" / "0_PIY.png"))]:
        status, answer = get(server, path)
        assert status == 200 and list(answer) == ["img_path", "ocr_ret", "confidence"]
        assert answer["img_path"] == path and answer["ocr_ret"] == text and 0.5 < answer["confidence"] <= 1


def test_an_image_can_be_posted_in_three_ways(server):
    for text, data in SAMPLES.items():
        encoded = json.dumps({"image": base64.b64encode(data).decode()})
        js, url = {"Content-Type": "application/json"}, f"data:image/png;base64,{base64.encodebytes(data).decode()}"
        for body, headers in [(data, PNG), (encoded, js), (json.dumps({"image": url}), js), as_form(data)]:
            status, answer = ask(server, "POST", "/captchaOcr", body, headers)
            assert status == 200 and list(answer) == ["ocr_ret", "confidence"] and answer["ocr_ret"] == text


def test_what_is_known_of_a_text_comes_with_the_request(server):
    encoded, js = base64.b64encode(SAMPLES["PIY"]).decode(), {"Content-Type": "application/json"}
    form, headers = as_form(SAMPLES["PIY"])
    field = b'--b\r\nContent-Disposition: form-data; name="length"\r\n\r\n2\r\n'
    for method, target, body, kind, length in [
            ("GET", "?img_path=test/0_PIY.png&length=2", None, {}, 2), ("POST", "?length=4-5", SAMPLES["PIY"], PNG, 4),
            ("POST", "", field + form, headers, 2), ("POST", "?length=4", form, headers, 4),
            ("POST", "", json.dumps({"image": encoded, "length": "2"}), js, 2),
            ("POST", "", json.dumps({"image": encoded, "length": 2, "letters": "ABC"}), js, 2)]:
        status, answer = ask(server, method, "/captchaOcr" + target, body, kind)
        assert status == 200 and len(answer["ocr_ret"]) == length and answer["confidence"] < 0.1
    assert set(answer["ocr_ret"]) <= set("ABC")
    status, answer = ask(server, "POST", "/captchaOcr?letters=piy&length=", SAMPLES["PIY"], PNG)
    assert status == 200 and answer["ocr_ret"] == "piy" and answer["confidence"] > 0.9


def test_concurrent_requests_are_each_read_under_their_own_restriction(server):
    lengths = [1, 2, 3, 4] * 20
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda length: ask(server, "POST", f"/captchaOcr?length={length}", SAMPLES["PIY"], PNG),
                                lengths))
    assert [len(answer["ocr_ret"]) for _, answer in answers] == lengths


def test_the_settings_hold_where_a_request_says_nothing(root):
    client = application(root, letters="piy")[1].test_client()
    ask = {query: client.post(f"/captchaOcr?{query}", data=SAMPLES["PIY"], headers=PNG).json["ocr_ret"]
           for query in ("", "letters=IPY", "length=2")}
    assert ask[""] == "piy" and ask["letters=IPY"] == "PIY"
    assert len(ask["length=2"]) == 2 and set(ask["length=2"]) <= set("piy")


def test_several_images_are_answered_in_order(server):
    texts = [*SAMPLES] * 20  # more than are read at once
    status, answer = ask(server, "POST", "/captchaOcr", *as_form(*(SAMPLES[text] for text in texts)))
    assert status == 200 and [reading["ocr_ret"] for reading in answer["results"]] == texts


def test_concurrent_requests_are_not_mixed_up(server):
    texts = [*SAMPLES] * 40
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda text: ask(server, "POST", "/captchaOcr", SAMPLES[text], PNG), texts))
    assert [answer["ocr_ret"] for _, answer in answers] == texts


@pytest.mark.parametrize("change", [
    lambda text: text.rstrip("="), lambda text: text.translate(str.maketrans("+/", "-_")),
    lambda text: text.translate(str.maketrans("+/", "-_")).rstrip("=")], ids=["unpadded", "URL alphabet", "both"])
def test_base64_of_any_kind_is_taken(client, change):
    data = next(image + bytes(more) for image in SAMPLES.values() for more in (0, 1) if len(image + bytes(more)) % 3)
    encoded = base64.b64encode(data).decode()
    assert encoded.endswith("=") and {*"+/"} <= {*encoded}
    for text in change(encoded), "data:image/png;base64," + change(encoded):
        assert client.post("/captchaOcr", json={"image": text}).json["confidence"] > 0.9


# ---------------------------------------------------------------------- refusals

@pytest.mark.parametrize("img_path", [
    "../lstm_ctc_ocr.py", "./dataset/../README.md", "/etc/passwd", "dataset/test/../../../etc/passwd", "/dev/zero",
    "%2e%2e/README.md", "....//....//etc/passwd", "/proc/self/environ", "dataset/test", "dataset/test/none.png", "~",
    "file:///etc/passwd", "a\0b", "x" * 5000, "..", "/", " "])
def test_nothing_outside_the_image_root_can_be_named(server, img_path):
    """The same answer for what is forbidden and for what does not exist, so that nobody learns which it is."""
    assert get(server, img_path) == (404, {"error": "no such image under the image root"})


def header_of_a_bomb():
    """A PNG of a few hundred bytes that claims 60,000 x 60,000 pixels."""
    file = io.BytesIO()
    Image.new("L", (8, 8)).save(file, "PNG")
    data = bytearray(file.getvalue())
    data[16:24] = (60000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


@pytest.mark.parametrize("method, target, body, kind, status", [
    ("GET", "/captchaOcr", None, None, 400), ("GET", "/captchaOcr?img_path=", None, None, 400),
    ("GET", "/nothing", None, None, 404), ("DELETE", "/captchaOcr", None, None, 405),
    ("OPTIONS", "/captchaOcr", None, None, 405), ("POST", "/healthz", b"", None, 405),
    ("POST", "/captchaOcr", b"a captcha", "text/plain", 400), ("POST", "/captchaOcr", b"", None, 400),
    ("POST", "/captchaOcr", b"<svg/>", "image/svg+xml", 415), ("POST", "/captchaOcr", b"", "image/png", 415),
    ("POST", "/captchaOcr", SAMPLES["PIY"][:3000], "image/png", 422),
    ("GET", "/captchaOcr?img_path=test/2_N.png&letters=%C3%A4", None, None, 422),
    ("POST", "/captchaOcr?length=11", SAMPLES["N"], "image/png", 422),
    ("POST", "/captchaOcr", json.dumps({"image": base64.b64encode(SAMPLES["N"]).decode(), "length": ["2"]}),
     "application/json", 422),
    ("POST", "/captchaOcr", header_of_a_bomb(), "image/png", 413),
    ("POST", "/captchaOcr", bytes(LstmCtcOcr.MAX_BODY + 1), "image/png", 413),
    ("POST", "/captchaOcr", b"{", "application/json", 400), ("POST", "/captchaOcr", b"[]", "application/json", 400),
    ("POST", "/captchaOcr", b'{"image": 7}', "application/json", 400),
    ("POST", "/captchaOcr", b'{"image": "?"}', "application/json", 415),
    ("POST", "/captchaOcr", b"--b--", "multipart/form-data; boundary=b", 400),
    ("POST", "/captchaOcr", as_form(*[SAMPLES["N"]] * 65)[0], "multipart/form-data; boundary=b", 400),
])
def test_a_wrong_request_is_a_json_error_and_the_next_one_works(server, method, target, body, kind, status):
    code, answer = ask(server, method, target, body, {"Content-Type": kind} if kind else {})
    assert code == status and list(answer) == ["error"] and str(ROOT) not in answer["error"]
    assert get(server, "test/2_N.png")[1]["ocr_ret"] == "N"


def send_no_http(port):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.putrequest("GET", "/healthz")
    connection.putheader("Content-Length", "many")
    connection.endheaders()
    return connection.getresponse()


def test_what_is_no_http_is_a_json_error_too(server):
    response = send_no_http(server)
    assert response.status == 400 and list(json.loads(response.read())) == ["error"]


@functools.cache
def application(root, **settings):
    ocr = LstmCtcOcr(model=str(SHIPPED), image_root=str(root), **settings)
    return ocr, ocr.create_app()


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder to serve, with things in and beside it that must not be served."""
    parent = tmp_path_factory.mktemp("served")
    root = parent / "root"
    root.mkdir()
    (root / "good.png").write_bytes(SAMPLES["PIY"])
    (root / "broken.png").write_bytes(SAMPLES["PIY"][:3000])
    (root / "secret.txt").write_text("nothing to see")
    (root / "large.png").write_bytes(SAMPLES["PIY"] + bytes(LstmCtcOcr.MAX_BODY))
    (parent / "outside.png").write_bytes(SAMPLES["PIY"])
    (root / "link.png").symlink_to(parent / "outside.png")
    (root / "inner.png").symlink_to(root / "good.png")
    os.mkfifo(root / "fifo.png")
    return root


@pytest.fixture
def client(root):
    return application(root)[1].test_client()


@pytest.mark.parametrize("name, status", [
    ("good.png", 200), ("inner.png", 200), ("root/good.png", 200), ("broken.png", 422), ("secret.txt", 415),
    ("large.png", 413), ("link.png", 404), ("fifo.png", 404), ("root/../outside.png", 404)])
def test_links_are_resolved_and_only_regular_files_opened(client, name, status):
    response = client.get("/captchaOcr", query_string={"img_path": name})
    assert response.status_code == status
    assert response.json.get("ocr_ret" if status == 200 else "error")
    assert str(ROOT) not in response.text and "tmp" not in response.text


def test_a_model_of_another_size_can_be_served(trained, dataset):
    path = next(dataset.glob("*.png"))
    response = LstmCtcOcr(model=str(trained)).create_app().test_client().post(
        "/captchaOcr", data=path.read_bytes(), headers=PNG)
    assert response.status_code == 200 and set(response.json["ocr_ret"]) <= set("AX")


def test_fuzzed_images_and_paths_are_answered_or_refused(client):
    """1,000 of each: never a 500, and no word of what is outside the image root."""
    draw = random.Random(0)
    files = [*SAMPLES.values(), *(cv2.imencode(kind, np.zeros((40, 160, 3), np.uint8))[1].tobytes()
                                  for kind in (".jpg", ".bmp", ".webp", ".tiff", ".gif"))]
    words = ["..", ".", "/", "//", "good.png", "root", "outside.png", "etc", "passwd", "~", "\\", "%2e", "\0", "é",
             "\n", "link.png", "proc", "self", "root/..", "C:", "file:"]
    for _ in range(1000):
        data = bytearray(draw.choice(files))
        for _ in range(draw.randint(1, 8)):
            data[draw.randrange(min(len(data), draw.choice((32, 200, len(data)))))] = draw.randrange(256)
        data = bytes(data[:draw.choice((None, draw.randrange(len(data))))])
        response = client.post("/captchaOcr", data=data, headers=PNG)
        assert response.status_code in (200, 413, 415, 422), response.text
        path = "/".join(draw.choices(words, k=draw.randint(1, 6)))
        response = client.get("/captchaOcr", query_string={"img_path": path})
        assert response.status_code == (200 if "ocr_ret" in response.json else 404), path
        assert response.status_code == 404 or "good.png" in path  # the one image that these words can name


def test_the_queue_is_bounded(root):
    ocr, app = application(root)
    service = app.extensions["lstm_ctc_ocr"]
    service.jobs.extend([None] * LstmCtcOcr.QUEUE)
    try:
        response = app.test_client().post("/captchaOcr", data=SAMPLES["N"], headers=PNG)
        assert app.test_client().get("/healthz").json["waiting"] == LstmCtcOcr.QUEUE
    finally:
        service.jobs.clear()
    assert response.status_code == 503 and response.headers["Retry-After"] == "1" and response.json["error"]
    assert app.test_client().post("/captchaOcr", data=SAMPLES["N"], headers=PNG).status_code == 200


def test_a_fault_while_reading_is_told_and_the_next_one_works(root, monkeypatch):
    ocr, app = application(root)
    with monkeypatch.context() as broken:
        broken.setattr(LstmCtcOcr, "_read", lambda *_: 1 / 0)
        response = app.test_client().post("/captchaOcr", data=SAMPLES["N"], headers=PNG)
    assert response.status_code == 500 and list(response.json) == ["error"]
    assert not app.extensions["lstm_ctc_ocr"].jobs
    assert app.test_client().post("/captchaOcr", data=SAMPLES["N"], headers=PNG).json["ocr_ret"] == "N"


def test_one_bad_image_of_a_form_has_its_error_in_its_place(client):
    body, headers = as_form(SAMPLES["N"], b"no image", SAMPLES["PIY"][:99], SAMPLES["PIY"])
    response = client.post("/captchaOcr", data=body, headers=headers)
    assert response.status_code == 200
    assert [list(result) for result in response.json["results"]] == [
        ["ocr_ret", "confidence"], ["error"], ["error"], ["ocr_ret", "confidence"]]
    assert [result.get("ocr_ret") for result in response.json["results"]] == ["N", None, None, "PIY"]
    for first, status in (b"no image", 415), (SAMPLES["PIY"][:99], 422):  # if none can be read, that of the first
        body, headers = as_form(first, b"nor this")
        response = client.post("/captchaOcr", data=body, headers=headers)
        assert response.status_code == status and list(response.json) == ["error"]


def test_json_without_end_is_refused(client):
    response = client.post("/captchaOcr", data="[" * 100_000, headers={"Content-Type": "application/json"})
    assert response.status_code == 400 and "base64" in response.json["error"]


@pytest.mark.parametrize("when", ["before", "after"])
def test_it_answers_although_the_working_directory_was_deleted(when, root, tmp_path, monkeypatch):
    folder = tmp_path / "gone"
    folder.mkdir()
    monkeypatch.chdir(folder)
    app = application(root)[1] if when == "after" else None
    folder.rmdir()
    app = app or application(root)[1]
    assert app.test_client().get("/captchaOcr?img_path=good.png").status_code == 200


def test_the_threads_that_read_end_with_the_service(root):
    app = LstmCtcOcr(model=str(SHIPPED), image_root=str(root)).create_app()
    before = {*threading.enumerate()}
    assert app.test_client().get("/captchaOcr?img_path=good.png").status_code == 200
    assert {*threading.enumerate()} - before
    app.extensions["lstm_ctc_ocr"].pool.shutdown()
    assert not {*threading.enumerate()} - before
    assert app.test_client().get("/captchaOcr?img_path=good.png").status_code == 503


def test_a_process_that_is_forked_before_the_first_request_answers(root):
    """As with gunicorn --preload, which makes the application once and then forks."""
    client = LstmCtcOcr(model=str(SHIPPED), image_root=str(root), label=str(root)).create_app().test_client()
    if not (process := os.fork()):
        signal.alarm(60)  # ends a process that hangs
        try:
            status = client.get("/captchaOcr?img_path=good.png").status_code
        finally:
            os._exit(status != 200)
    assert os.waitpid(process, 0)[1] == 0


def test_a_token_guards_everything_but_health(root):
    client = application(root, token="öffne")[1].test_client()
    sent = {"Authorization": "Bearer öffne".encode().decode("latin-1")}  # as it comes over a socket
    assert client.get("/captchaOcr", headers=sent).status_code == 400
    client = application(root, token="open=sesame:")[1].test_client()
    basic = base64.b64encode(b"anybody:open=sesame:").decode()
    for path in ("/", "/openapi.json", "/captchaOcr?img_path=good.png", "/captchaOcr?img_path=none.png"):
        response = client.get(path)
        assert response.status_code == 401 and response.headers["WWW-Authenticate"].startswith("Basic")
        assert client.get(path, headers={"Authorization": "Bearer open"}).status_code == 401
        assert client.get(path, headers={"Authorization": "Bearer open=sesame:"}).status_code in (200, 404)
        assert client.get(path, headers={"Authorization": f"Basic {basic}"}).status_code in (200, 404)
    assert client.get("/healthz").status_code == 200


# ---------------------------------------------------------------------- description, health, page

@pytest.mark.parametrize("method, path", [("GET", "/captchaOcr"), ("POST", "/captchaOcr"), ("GET", "/healthz"),
                                          ("GET", "/openapi.json"), ("GET", "/")])
def test_the_description_is_true(root, method, path):
    """Whatever schemathesis makes of the OpenAPI description, the answers are those that it promises."""
    operation = schemathesis.openapi.from_wsgi("/openapi.json", application(root)[1])[path][method]

    @settings(max_examples=25, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(operation.as_strategy())
    def promises(case):
        case.call_and_validate(excluded_checks=[positive_data_acceptance])  # no schema tells an image from other bytes

    promises()


def test_health_says_which_model_reads(client):
    health = client.get("/healthz").json
    assert health["status"] == "ok" and health["model"]["net"] == "cnn_lstm" and health["waiting"] == 0


def test_the_page_takes_nothing_from_elsewhere(client):
    response = client.get("/")
    assert response.mimetype == "text/html" and not re.search(r"(src|href)=\"?(https?:)?//", response.text)
    assert re.search(r"script-src 'nonce-[\w-]{20,}';", response.headers["Content-Security-Policy"])
    assert response.headers["X-Frame-Options"] == "DENY" and response.headers["X-Content-Type-Options"] == "nosniff"


def test_the_page_shows_whatever_lies_among_the_samples(client, tmp_path, monkeypatch):
    folder = tmp_path / "dataset" / "test"
    folder.mkdir(parents=True)
    for name in ("0.png", "<b>&.png", "broken.png"):
        (folder / name).write_bytes(SAMPLES["N"] if "broken" not in name else b"no image")
    monkeypatch.setattr("lstm_ctc_ocr.HOME", tmp_path)
    response = client.get("/")
    assert response.status_code == 200 and response.text.count('class="sample"') == 3 and "<b>" not in response.text


def test_a_browser_reads_what_is_dropped_chosen_and_clicked(server, browser):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    browser.get(f"http://127.0.0.1:{server}/")

    def newest(text, count):
        WebDriverWait(browser, 30).until(lambda _: len(browser.find_elements(By.TAG_NAME, "output")) == count and (
            browser.find_element(By.TAG_NAME, "output").text.startswith(text)))

    browser.find_element(By.CSS_SELECTOR, ".sample").click()
    newest("PIY", 1)
    browser.find_element(By.TAG_NAME, "input").send_keys(str(ROOT / "dataset" / "test" / "2_N.png"))
    newest("N", 2)
    browser.execute_script("""
        const bytes = Uint8Array.from(atob(arguments[0]), letter => letter.charCodeAt()), data = new DataTransfer();
        data.items.add(new File([bytes], "captcha.png", {type: "image/png"}));
        document.querySelector("#drop").dispatchEvent(new DragEvent("drop", {dataTransfer: data, bubbles: true}));
    """, base64.b64encode(SAMPLES["BCAVDPXT"]).decode())
    newest("BCAVDPXT", 3)
    assert browser.find_element(By.CSS_SELECTOR, "output:first-of-type span.sure").text == "BCAVDPXT"
    assert "confidence" in browser.find_element(By.TAG_NAME, "output").text
    complaints = [entry for entry in browser.get_log("browser") if "favicon" not in entry["message"]]
    assert not complaints  # such as of the content security policy


# ---------------------------------------------------------------------- life

def test_what_is_under_way_is_finished_before_it_stops():
    """SIGTERM while a request of 64 images is being read: the answer is whole, the exit code 0."""
    with serving() as (process, port), ThreadPoolExecutor(1) as pool:
        answer = pool.submit(ask, port, "POST", "/captchaOcr", *as_form(*[SAMPLES["PIY"]] * 64))
        while not answer.done() and not ask(port, "GET", "/healthz")[1]["waiting"]:
            pass
        process.send_signal(signal.SIGTERM)
        status, body = answer.result()
        assert process.wait(60) == 0
    assert status == 200 and [reading["ocr_ret"] for reading in body["results"]] == ["PIY"] * 64


def test_a_signal_that_another_thread_catches_stops_it_too():
    """As when it comes while the main thread begins to wait: nothing wakes that thread."""
    code = ("import lstm_ctc_ocr, signal, threading; "
            "threading.Thread(target=threading.Event().wait, daemon=True).start(); "
            "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM]); "
            f"lstm_ctc_ocr.main(['start', '--port', '0', '--model', {str(SHIPPED)!r}])")
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert process.stderr.readline().startswith("http")
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == 0


def test_a_large_form_is_admitted_under_load(server):
    """While more images are asked for than may wait, one by one, each of ten forms comes in after a few tries."""
    stop = threading.Event()

    def load():
        while not stop.is_set():
            assert ask(server, "POST", "/captchaOcr", SAMPLES["N"], PNG)[0] in (200, 503)

    form = as_form(*[SAMPLES["PIY"]] * 64)
    with ThreadPoolExecutor(16) as pool:
        loads = [pool.submit(load) for _ in range(16)]
        try:
            for _ in range(10):
                answers = (ask(server, "POST", "/captchaOcr", *form) for _ in range(200))
                status, body = next(answer for answer in answers if answer[0] != 503)
                assert status == 200 and [reading["ocr_ret"] for reading in body["results"]] == ["PIY"] * 64
        finally:
            stop.set()
        assert [each.result() for each in loads] == [None] * 16


@pytest.fixture(scope="module")
def poor(tmp_path_factory):
    """A server's process and its port, where there is no folder for temporary files."""
    patches = tmp_path_factory.mktemp("patches")
    (patches / "sitecustomize.py").write_text("import tempfile; tempfile._candidate_tempdir_list = lambda: ['/none']")
    with serving(env={**os.environ, "PYTHONPATH": str(patches)}) as (process, port):
        threading.Thread(target=process.stderr.read, daemon=True).start()
        yield process, port


def begin(port, length, sent=b"", **headers):
    """A connection that has sent the head of a POST request, and of its body so much."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.putrequest("POST", "/captchaOcr")
    for name, value in {**PNG, "Content-Length": str(length), **headers}.items():
        connection.putheader(name, value)
    connection.endheaders(sent)
    return connection


def test_a_large_image_needs_no_folder_for_temporary_files(poor):
    noise = np.random.default_rng(0).integers(0, 256, (600, 1000, 3), np.uint8)
    image = cv2.imencode(".png", noise)[1].tobytes()
    assert 1_500_000 < len(image) < LstmCtcOcr.MAX_BODY
    for body, headers in (image, PNG), as_form(image):
        assert ask(poor[1], "POST", "/captchaOcr", body, headers)[0] == 200


def test_what_is_announced_to_be_too_large_is_refused_before_it_is_sent(server):
    response = begin(server, LstmCtcOcr.MAX_SENT + 1).getresponse()
    assert response.status == 413 and str(LstmCtcOcr.MAX_SENT) in json.loads(response.read())["error"]


@pytest.mark.parametrize("size", [3_000_000, 20_000_000])
def test_who_sends_too_much_gets_the_answer(server, size):
    """The answer comes when all is sent, or the client's system would drop it."""
    assert ask(server, "POST", "/captchaOcr", bytes(size), PNG)[0] == 413
    assert ask(server, "POST", "/captchaOcr", iter([bytes(2 ** 16)] * (size >> 16)), PNG)[0] == 413  # in chunks
    request = urllib.request.Request(f"http://127.0.0.1:{server}/captchaOcr", bytes(size), PNG)
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=60)
    assert refused.value.code == 413 and list(json.loads(refused.value.read())) == ["error"]
    with socket.create_connection(("127.0.0.1", server), timeout=60) as connection:  # waits for the end
        head = b"POST /captchaOcr HTTP/1.0\r\nContent-Type: image/png\r\nContent-Length: %d\r\n\r\n" % size
        connection.sendall(head + bytes(size))
        assert b"".join(iter(lambda: connection.recv(9999), b"")).startswith(b"HTTP/1.0 413")


def test_idle_and_slow_connections_are_in_nobodys_way(server):
    """More of them than may be open at once: the idlest make room, and no request is refused or cut off."""
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(24) as pool:
        def stranger(number):
            connection = stack.enter_context(socket.create_connection(("127.0.0.1", server)))
            begun = b"", b"GET /heal", b"POST /captchaOcr HTTP/1.1\r\nContent-Length: 99\r\n\r\na"
            connection.sendall(begun[number % 3])
            return connection

        strangers = [stranger(number) for number in range(LstmCtcOcr.CONNECTIONS + 100)]
        busy = [pool.submit(ask, server, "POST", "/captchaOcr", SAMPLES["PIY"], PNG) for _ in range(240)]
        for connection in strangers[-100:]:
            with contextlib.suppress(OSError):  # dropped already
                connection.send(b"a")
        assert {each.result()[1].get("ocr_ret") for each in busy} == {"PIY"}
        assert strangers[0].recv(1) == b""  # it was dropped


def memory(process):
    """How many bytes of memory a process takes."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) * 1000


def test_strangers_cannot_fill_the_memory(poor):
    """400 MB are sent in requests that never end; the others are answered all the same."""
    process, port = poor
    before, strangers = memory(process), []
    for _ in range(160):
        with contextlib.suppress(OSError):  # it may be dropped before it has sent all
            strangers.append(begin(port, LstmCtcOcr.MAX_SENT - 1, bytes(2_500_000)))
        assert memory(process) - before < 300_000_000
    assert ask(port, "POST", "/captchaOcr", SAMPLES["N"], PNG)[1]["ocr_ret"] == "N"
    for connection in strangers:
        connection.close()


def test_nothing_is_kept_of_a_body_that_comes_without_the_token():
    with serving("--token", "sesame") as (process, port):
        assert ask(port, "POST", "/captchaOcr", SAMPLES["N"], {**PNG, "Authorization": "Bearer sesame"})[0] == 200
        before = memory(process)
        strangers = [begin(port, 2_000_000, bytes(1_900_000), Authorization="Bearer open") for _ in range(50)]
        assert memory(process) - before < 30_000_000
        for stranger in strangers:
            stranger.send(bytes(100_000))
            response = stranger.getresponse()
            assert response.status == 401 and list(json.loads(response.read())) == ["error"]


def test_a_server_that_fails_ends_the_command(monkeypatch, capfd):
    def fail(*_, **__):
        raise OSError("too many open files")

    monkeypatch.setattr("waitress.wasyncore.loop", fail)
    assert lstm_ctc_ocr.main(["start", "--port", "0", "--model", str(SHIPPED)]) == 2
    assert capfd.readouterr().err.splitlines()[-1] == "lstm_ctc_ocr: too many open files"


def test_a_port_in_use_is_one_line(server):
    process = spawn("start", "--port", server, "--model", SHIPPED)
    _, messages = process.communicate()
    assert process.returncode == 2 and len(messages.splitlines()) == 1 and "choose another --port" in messages


def test_requests_are_logged_and_a_public_address_is_announced():
    with serving("--host", "0.0.0.0", env={**os.environ, "LSTM_CTC_OCR_TOKEN": "x"}) as (process, port):
        assert process.stderr.readline().startswith("reading with my-model/pretrained/cnn_lstm")
        assert get(port, "no\nsuch\x1b[31m.png")[0] == 401
        assert re.fullmatch(r'127\.0\.0\.1 "GET /captchaOcr\?[ -~]+" 401 [\d.]+ ms\n', process.stderr.readline())
        assert send_no_http(port).status == 400
        assert re.fullmatch(r'- "Bad Request" 400\n', process.stderr.readline())
