"""Labelling on the page /label: the real server, over a socket and in a browser."""

import contextlib
import csv
import http.client
import json
import os
import re
import threading
import time

import pytest
import schemathesis
from conftest import ROOT, SHIPPED, main, spawn
from hypothesis import HealthCheck, given, settings
from schemathesis.specs.openapi.checks import positive_data_acceptance

from lstm_ctc_ocr import LstmCtcOcr

SAMPLES = {path.stem.split("_")[1]: path.read_bytes() for path in (ROOT / "dataset" / "test").glob("*.png")}
NAMES = {"0.png": "PIY", "1.png": "BCAVDPXT", "deep/er/2.png": "N", "deep/3.png": "PIY"}  # and what they say


@pytest.fixture
def folder(tmp_path):
    """Four images to label, and beside them what is not to be shown."""
    folder = tmp_path / "mine"
    for name, text in NAMES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(SAMPLES[text])
    (tmp_path / "outside.png").write_bytes(SAMPLES["N"])
    (folder / "link.png").symlink_to(tmp_path / "outside.png")
    (folder / "broken.png").write_bytes(b"no image")
    (folder / "notes.txt").write_text("nothing to see")
    return folder


@contextlib.contextmanager
def labelling(folder, *flags):
    """A server with --label that is killed in the end, with kill -9; yields its port."""
    process = spawn("start", "--port", 0, "--model", SHIPPED, "--label", folder, *flags)
    for line in process.stderr:
        if ready := re.match(r"label .* on http://.*:(\d+)/label$", line):
            break
    threading.Thread(target=process.stderr.read, daemon=True).start()
    try:
        yield int(ready[1])
    finally:
        process.kill()
        process.wait()


def ask(port, method, target, body=None, **headers):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    headers = {"Content-Type": "application/json", **{name.replace("_", "-"): text for name, text in headers.items()}}
    connection.request(method, target, body if body is None else json.dumps(body), headers)
    response = connection.getresponse()
    return response.status, json.loads(response.read())


def client_of(folder, **settings):
    app = LstmCtcOcr(model=str(SHIPPED), label=str(folder), **settings).create_app()
    return app.test_client(), app.extensions["lstm_ctc_ocr"]


def lines(folder):
    with open(folder / "labels.csv", newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


# ---------------------------------------------------------------------- in a browser

def test_labelling_in_a_browser_goes_on_after_kill_9(folder, browser):
    """One guess is taken, one corrected, one skipped and come back to; a new server shows the fourth."""
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import WebDriverWait

    def shown(*before, count):
        """The image that is shown, once it is another than `before` and so many are labelled."""
        def settled(_):
            note = browser.find_element(By.ID, "note").text.partition(":")[0]
            progress = browser.find_element(By.ID, "progress").text
            return note in NAMES and note not in before and progress.startswith(f"{count} of ") and note
        return WebDriverWait(browser, 60).until(settled)

    with labelling(folder) as port:
        browser.get(f"http://127.0.0.1:{port}/label")
        taken = shown(count=0)
        field = browser.find_element(By.TAG_NAME, "input")
        assert field.get_attribute("value") == NAMES[taken]  # the model's guess
        assert browser.execute_script("return document.querySelector('img').naturalWidth") > 0
        field.send_keys(Keys.ENTER)
        corrected = shown(taken, count=1)
        field.send_keys("OTHER", Keys.ENTER)
        skipped = shown(taken, corrected, count=2)
        field.send_keys(Keys.ESCAPE)
        fourth = shown(taken, corrected, skipped, count=2)
        field.send_keys(Keys.BACKSPACE, Keys.BACKSPACE)  # empties the field, goes back
        assert shown(fourth, count=2) == skipped
        field.send_keys(Keys.ENTER)
        assert shown(skipped, count=3) == fourth
        assert not [entry for entry in browser.get_log("browser") if "favicon" not in entry["message"]]
    assert lines(folder) == [[taken, NAMES[taken]], [corrected, "OTHER"], [skipped, NAMES[skipped]]]
    with labelling(folder) as port:
        browser.get(f"http://127.0.0.1:{port}/label")
        assert shown(count=3) == fourth
        browser.find_element(By.TAG_NAME, "input").send_keys(Keys.ENTER)
        WebDriverWait(browser, 60).until(lambda _: "Every image" in browser.find_element(By.ID, "note").text)
    assert sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.png")) == sorted(
        [*NAMES, "link.png", "broken.png"])


# ---------------------------------------------------------------------- over a socket

def test_over_a_socket_strangers_are_refused_and_a_correction_wins(folder):
    with labelling(folder, "--token", "sesame") as port:
        key, label = {"Authorization": "Bearer sesame"}, {"path": "0.png", "label": "A"}
        for headers, status in [
                ({}, 401), ({"Authorization": "Bearer open"}, 401), ({**key, "Origin": "http://evil.example"}, 403),
                ({**key, "Origin": "null"}, 403), ({**key, "Origin": f"http://127.0.0.1:{port + 1}"}, 403),
                ({**key, "Content_Type": "text/plain"}, 400)]:
            code, answer = ask(port, "POST", "/label", label, **headers)
            assert code == status and list(answer) == ["error"]
        for name in ("../outside.png", "link.png", "/etc/passwd", str(folder / "0.png"), "notes.txt", "labels.csv", ""):
            assert ask(port, "POST", "/label", {"path": name, "label": "A"}, **key)[0] == 400
            assert ask(port, "GET", f"/label/image?path={name}", **key)[1]["path"] in {*NAMES} - {name}
        for text in ("A\nB", "A\0", "\ud800", 101 * "A"):
            assert ask(port, "POST", "/label", {"path": "0.png", "label": text}, **key)[0] == 400
        assert not (folder / "labels.csv").exists()
        for text in ("", "  "):  # no label: the image is skipped
            assert ask(port, "POST", "/label", {"path": "0.png", "label": text}, **key)[1]["labelled"] == 0
        assert not (folder / "labels.csv").exists()
        same = {**key, "Origin": f"http://127.0.0.1:{port}"}
        for text in (" A ", 'b,"ß', "C"):
            assert ask(port, "POST", "/label", {"path": "0.png", "label": text}, **same)[1]["labelled"] == 1
        assert ask(port, "GET", "/label/image?path=0.png", **key)[1]["text"] == "C"
    assert lines(folder) == [["0.png", "A"], ["0.png", 'b,"ß'], ["0.png", "C"]]
    client, service = client_of(folder)
    service.pool.shutdown()
    assert service.labelling.labels == {"0.png": "C"}  # the correction wins after a start too


@pytest.mark.parametrize("site, status", [("same-origin", 200), ("cross-site", 403), ("same-site", 403), (None, 403)])
def test_behind_a_proxy_a_browser_says_whose_page_it_is(folder, site, status):
    """The Host that comes is the one that the proxy names, not that of the page."""
    client, service = client_of(folder)
    headers = {"Origin": "https://labels.example", **({"Sec-Fetch-Site": site} if site else {})}
    answer = client.post("/label", json={"path": "0.png", "label": "A"}, headers=headers)
    service.pool.shutdown()
    assert answer.status_code == status and (status == 200 or "proxy_set_header Host" in answer.json["error"])


def test_nothing_is_read_before_the_first_request(folder):
    """A thread that reads while the process is forked would leave its locks held in the new one."""
    before = threading.active_count()
    client, service = client_of(folder)
    assert threading.active_count() == before
    assert client.get("/label").status_code == 200 and threading.active_count() > before
    service.pool.shutdown()


def test_without_the_flag_there_is_no_such_route(folder):
    client = LstmCtcOcr(model=str(SHIPPED)).create_app().test_client()
    for method, path in ("GET", "/label"), ("POST", "/label"), ("GET", "/label/image"):
        assert client.open(path, method=method, json={"path": "0.png", "label": "A"}).status_code == 404
    assert "/label" not in client.get("/openapi.json").json["paths"]


@pytest.mark.parametrize("method, path", [("GET", "/label"), ("POST", "/label"), ("GET", "/label/image")])
def test_the_description_is_true(folder, method, path):
    client, service = client_of(folder)
    operation = schemathesis.openapi.from_wsgi("/openapi.json", client.application)[path][method]

    @settings(max_examples=25, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(operation.as_strategy())
    def promises(case):
        case.call_and_validate(excluded_checks=[positive_data_acceptance])  # no schema knows which images there are

    promises()
    service.pool.shutdown()


# ---------------------------------------------------------------------- order and faults

def test_what_is_read_least_surely_comes_first_and_what_is_skipped_last(folder, monkeypatch):
    sure = {"0.png": .9, "1.png": .2, "deep/er/2.png": .5, "deep/3.png": .7}

    def read(self, sources, *_):
        return [self.Error("no image") if "broken" in str(source) else
                ("X", next((c for name, c in sure.items() if str(source).endswith(name)), 1)) for source in sources]

    with monkeypatch.context() as patched:
        patched.setattr(LstmCtcOcr, "_read_each", read)
        client, service = client_of(folder)
        client.get("/label")  # from then on it reads
        while LstmCtcOcr.UNREAD in service.labelling.guesses.values():
            time.sleep(0.01)  # until it has read all
        answers = [client.get("/label/image").json]
        for body in ({}, {"label": "A"}, {"label": "B"}, {}, {}, {"label": "C"}, {"label": "D"}):
            answers.append(client.post("/label", json={"path": answers[-1]["path"], **body}).json)
        service.pool.shutdown()
    assert [answer["path"] for answer in answers] == [
        "1.png", "deep/er/2.png", "deep/3.png", "0.png", "1.png", "0.png", "1.png", ""]
    assert [(answer["labelled"], answer["images"]) for answer in answers] == [
        (0, 4), (0, 4), (1, 4), (2, 4), (2, 4), (2, 4), (3, 4), (4, 4)]


def test_a_last_line_without_an_end_is_kept(folder):
    """Such lists people bring; the next label begins a line of its own."""
    (folder / "labels.csv").write_bytes(b'\xef\xbb\xbf0.png,PIY\r\nno.png,X\n1.png,BCA')
    client, service = client_of(folder)
    assert service.labelling.labels == {"0.png": "PIY", "1.png": "BCA"}
    answer = client.post("/label", json={"path": "1.png", "label": "BCAVDPXT"})
    long = client.post("/label", json={"path": "1.png", "label": 200_000 * "A"})
    service.pool.shutdown()
    assert answer.json["labelled"] == 2 and long.status_code == 400
    assert (folder / "labels.csv").read_bytes() == (
        b'\xef\xbb\xbf0.png,PIY\r\nno.png,X\n1.png,BCA\n1.png,BCAVDPXT\n')


def test_it_goes_on_with_the_lists_that_training_reads(folder):
    """In the list's own signs: a comma in a file of semicolons would be no use to anybody."""
    (folder / "labels.csv").write_text("image;text\n0.png;PIY\n")
    (folder / "labels.txt").write_text("deep/3.png\tPIY\n")
    client, service = client_of(folder)
    assert service.labelling.labels == {"0.png": "PIY", "deep/3.png": "PIY"}
    assert client.post("/label", json={"path": "1.png", "label": "BCAVDPXT"}).json["labelled"] == 3
    service.pool.shutdown()
    assert (folder / "labels.csv").read_text() == "image;text\n0.png;PIY\n1.png;BCAVDPXT\n"
    assert LstmCtcOcr().find_labels(folder)[0]["1.png"] == "BCAVDPXT"


def test_a_full_disk_is_told_and_leaves_no_half_line(folder, monkeypatch):
    (folder / "labels.csv").write_text("0.png,PIY\n")
    client, service = client_of(folder)
    with monkeypatch.context() as full:
        def fail(*_):
            raise OSError(28, "No space left on device")

        full.setattr("os.fsync", fail)
        answer = client.post("/label", json={"path": "1.png", "label": "A"})
    service.pool.shutdown()
    assert answer.status_code == 503 and "No space left" in answer.json["error"]
    assert (folder / "labels.csv").read_text() == "0.png,PIY\n" and "1.png" not in service.labelling.labels


def test_an_image_that_goes_away_is_not_waited_for(folder):
    client, service = client_of(folder)
    for name in [*NAMES][1:]:
        (folder / name).unlink()
    assert client.get("/label/image").json["path"] == "0.png"
    os.rename(folder / "0.png", folder / "moved.png")
    assert client.get("/label/image").json["path"] == "" == client.get("/label/image?path=0.png").json["path"]
    service.pool.shutdown()


@pytest.mark.parametrize("content, complaint", [(None, "no images in"), ({}, "no images in"),
                                                ({"a.png": b"", "labels.csv": b"\xff\xfe\n"}, "no CSV file in UTF-8")])
def test_what_cannot_be_labelled_is_one_line(tmp_path, capfd, content, complaint):
    folder = tmp_path / "folder"
    if content is not None:
        folder.mkdir()
        for name, data in content.items():
            (folder / name).write_bytes(data)
    assert main(["start", "--port", "0", "--model", str(SHIPPED), "--label", str(folder)]) == 2
    message = capfd.readouterr().err.splitlines()
    assert len(message) == 1 and complaint in message[0]
