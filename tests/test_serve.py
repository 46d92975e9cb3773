"The service as a process of its own: switched under load, fed with what nobody should send, driven in a browser, and started when things are down."
import base64, json, os, re, shutil, signal, socket, subprocess, sys, threading, time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest
from PIL import Image
from hypothesis import HealthCheck, given, settings, strategies as st

from conftest import wait
from nbs_lib.boxes import iou
from nbs_lib.registry import promote, versions
from nbs_lib.store import connect

pytestmark = [pytest.mark.timeout(1200), pytest.mark.xdist_group("serve")]
TOKEN = "a token of some length"
HOLDER = dict(authorization=f"Bearer {TOKEN}")


class Serving:
    "`nbs serve` of a workspace on a free port."
    def __init__(self, workspace, *args, **env):
        with socket.socket() as s: s.bind(("127.0.0.1", 0)); self.port = s.getsockname()[1]
        self.address, self.said = f"http://127.0.0.1:{self.port}", workspace/f"serve-{self.port}.log"
        with open(self.said, "w") as log:
            env = {**os.environ, "PYTHONPATH": str(workspace.folder), "NBS_SERVE_TOKEN": TOKEN, "MLFLOW_TRACKING_URI": "", **env}
            self.process = subprocess.Popen([Path(sys.executable).with_name("nbs"), "serve", "--port", str(self.port), *args], cwd=workspace.folder, env=env,
                                            stdout=log, stderr=log, start_new_session=True)
        self.http = httpx.Client(base_url=self.address, timeout=60)
        wait(lambda: self.status("/health/live") == 200 or self.process.poll() is not None, 120, .2)
        assert self.process.poll() is None, self.said.read_text()

    def status(self, path):
        try: return self.http.get(path).status_code
        except httpx.TransportError: return None

    def ready(self):
        wait(lambda: self.status("/health/ready") == 200, 120, .2)
        return self

    def follow(self):
        "The champion again, whatever the tests before let answer."
        assert self.ready().http.post("/update-model", json={}, headers=HOLDER).status_code == 200
        return self

    def predict(self, *pictures, **params): return self.http.post("/predict/", files=[("image", p) for p in pictures], params=params)

    def memory(self): return psutil.Process(self.process.pid).memory_info().rss

    def stop(self, how=signal.SIGTERM):
        if self.process.poll() is None: os.killpg(self.process.pid, how)
        return self.process.wait(30)


@contextmanager
def serving(workspace, *args, **env):
    service = Serving(workspace, *args, **env)
    try: yield service
    finally: service.stop(signal.SIGKILL)


@pytest.fixture(scope="module")
def two(_judged, tmp_path_factory):
    "A workspace with two published versions, the first of which is champion."
    workspace = _judged.copy(tmp_path_factory.mktemp("two")/"workspace")
    workspace.set(train=dict(seed=1))
    workspace.run("dvc", "repro")
    workspace.run("nbs", "publish")
    return workspace


@pytest.fixture(scope="module")
def service(two):
    "Served once for all tests that leave the versions as they are."
    with serving(two) as service: yield service.follow()


@pytest.fixture(scope="module")
def pictures(two): return [p.read_bytes() for p in sorted((two/"data/processed/images/test").iterdir())]


def loaded(service, pictures, requests, clients, meanwhile):
    "Answers to so many requests by so many clients, while something else happens; (seconds, status, answer or text) each."
    def one(i):
        begun = time.perf_counter()
        said = service.predict(pictures[i % len(pictures)], conf=1e-6, max_det=5)
        return time.perf_counter() - begun, said.status_code, said.json() if said.headers["content-type"] == "application/json" else said.text
    other = threading.Thread(target=meanwhile); other.start()
    with ThreadPoolExecutor(clients) as pool: answers = list(pool.map(one, range(requests)))
    other.join()
    return answers


def alike(some, others):
    "The share of boxes that the others have, too: each load chooses its runtime anew, and runtimes agree to an IoU of .99 and a score within .01."
    edges = lambda boxes: np.array([[b[k] for k in ("xmin", "ymin", "xmax", "ymax")] for b in boxes]).reshape(-1, 4)
    same = lambda a, b: a["label"] == b["label"] and abs(a["score"] - b["score"]) < .01
    near = iou(edges(some), edges(others)) > .99
    return sum(any(near[i, j] and same(a, b) for j, b in enumerate(others)) for i, a in enumerate(some)) / max(len(some), 1)


@pytest.mark.parametrize("requests, switches", [(400, 4), pytest.param(10_000, 20, marks=pytest.mark.serving)])
def test_switched_under_load(two, pictures, requests, switches):
    "No request fails, every answer names the version that made it, and has that version's boxes."
    with serving(two) as service:
        service.ready()
        alone, switched = {}, []
        for version in ("1", "2"):
            assert service.http.post("/update-model", json=dict(version=version), headers=HOLDER).json() == dict(version=version)
            alone[version] = [service.predict(p, conf=1e-6, max_det=5).json()["pictures"][0]["boxes"] for p in pictures]
        def switch():
            for i in range(switches):
                switched.append(service.http.post("/update-model", json=dict(version=str(1 + i % 2)), headers=HOLDER).status_code)
        answers = loaded(service, pictures, requests, 8, switch)
        while len(answers) < requests or len(switched) < switches: answers += loaded(service, pictures, 100, 8, lambda: None)
        assert {status for _, status, _ in answers} == {200} and switched == [200] * switches
        told = [(said["pictures"][0]["version"], said["pictures"][0]["boxes"]) for _, _, said in answers]
        assert {version for version, _ in told} == {"1", "2"}
        for i, (version, boxes) in enumerate(told[:requests]):
            shares = {name: alike(boxes, found[i % len(pictures)]) for name, found in alone.items()}
            assert max(shares, key=shares.get) == version and shares[version] > .5, (version, shares)
        print(f"{len(answers)} requests, {switches} switches, none failed; slowest {max(s for s, _, _ in answers):.2f} s")
        assert service.stop() in (0, -signal.SIGTERM)


def test_a_promotion_is_followed(two, pictures):
    "Within seconds, without a restart or a request that fails."
    client = connect(f"sqlite:///{two/'data/mlflow/mlflow.db'}")
    with serving(two) as service:
        service.follow()
        assert service.predict(pictures[0]).json()["pictures"][0]["version"] == "1"
        promote(client, "detector", 2, why="a test", who="test")
        answers = []
        def follows():
            answers.append(service.predict(pictures[0]))
            return answers[-1].json()["pictures"][0]["version"] == "2"
        wait(follows, 60, .1)
        assert {a.status_code for a in answers} == {200}
        assert [v["answers"] for v in service.http.get("/models/").json()] == [True, False]
        promote(client, "detector", 1, why="as before", who="test")


def test_every_odd_picture_has_an_answer(service, real):
    "Never a 5xx, codes are the gatekeeper's, and memory stays flat."
    files = sorted(p for p in (real/"badimages").rglob("*") if p.is_file())
    assert len(files) > 100
    codes, before = set(), None
    for _ in range(2):
        for file in files:
            said = service.predict(file.read_bytes()) if file.stat().st_size < 20_000_000 else service.predict(b"0" * 20_000_001)
            assert said.status_code == 200 or 400 <= said.status_code < 500 and said.json()["code"], (file, said.status_code, said.text)
            if said.status_code != 200: codes.add(said.json()["code"])
        before, after = before or service.memory(), service.memory()
    assert {"unreadable_image", "too_many_pixels"} <= codes and after < before + 100_000_000, (codes, before >> 20, after >> 20)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_no_body_breaks_it(service, data):
    form, plain = "multipart/form-data; boundary=x", ["multipart/form-data", "application/json", "application/x-www-form-urlencoded", "text/html", ""]
    kind = data.draw(st.sampled_from([form, *plain]))
    part = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n%s\r\n--x--\r\n'
    keys = st.sampled_from(["image", "images", "id", "verdict", "boxes", "version"]) | st.text()
    json_like = st.recursive(st.none() | st.booleans() | st.floats() | st.text(), lambda x: st.lists(x) | st.dictionaries(keys, x))
    some = st.binary(max_size=300)
    body = data.draw(some | some.map(lambda b: part % b) | json_like.map(lambda x: json.dumps(x).encode())
                     | st.binary(max_size=99).map(lambda b: json.dumps(dict(images=[base64.b64encode(b).decode()])).encode()))
    path = data.draw(st.sampled_from(["/predict/", "/predict/annotated", "/feedback/", "/update-model"]))
    said = service.http.post(path, content=body, headers={"content-type": kind, **HOLDER})
    assert said.status_code < 500 and (said.status_code == 200 or said.json()["code"]), (path, kind, body, said.status_code, said.text)


@pytest.mark.parametrize("examples", [15, pytest.param(300, marks=pytest.mark.serving)])
def test_fuzzed_by_its_own_document(service, examples, tmp_path):
    "schemathesis makes requests from /openapi.json, those that fit and those that do not."
    command = [Path(sys.executable).with_name("schemathesis"), "run", f"{service.address}/openapi.json", "-H", f"Authorization: Bearer {TOKEN}",
               "--checks", "not_a_server_error,status_code_conformance", "--phases", "examples,coverage,fuzzing", "--max-examples", examples,
               "--seed", 1, "--no-color", "--exclude-path", "/update-model"]
    done = subprocess.run(list(map(str, command)), cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert service.status("/health/ready") == 200


def test_who_is_slow_large_or_many(service, pictures):
    "Ends with a 4xx that says so, at once where the length is told, and others are answered meanwhile."
    form = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'
    def raw(head, *chunks):
        "The status line that a hand-made request ends with."
        with closing(socket.create_connection(("127.0.0.1", service.port), 60)) as s:
            s.settimeout(60)
            s.sendall(b"POST /predict/ HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data; boundary=x\r\n" + head + b"\r\n\r\n")
            for chunk in chunks:
                try: s.sendall(chunk)
                except OSError: break
            return s.recv(1000).split(b"\r\n")[0].decode()
    assert "413" in raw(b"Content-Length: 2000000000", form)
    endless = (b"%x\r\n%s\r\n" % (len(part), part) for part in [form, *[b"0" * 1_000_000] * 200])
    before = service.memory()
    assert "413" in raw(b"Transfer-Encoding: chunked", *endless) and service.memory() < before + 300_000_000
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(raw, b"Content-Length: 5000", form)
        assert service.predict(pictures[0]).status_code == 200
        assert "408" in slow.result()
    many = [("image", pictures[0])] * 1000
    for files, status, code in (([], 415, "wrong_type"), ([("image", b"")], 422, "unreadable_image"), (many, 413, "too_many_pictures")):
        said = service.http.post("/predict/", files=files)
        assert (said.status_code, said.json()["code"]) == (status, code), said.text


def test_a_full_line_is_told_at_once(service, pictures):
    "429 with a time to come back, and whoever was let in is answered."
    with ThreadPoolExecutor(12) as pool: said = list(pool.map(lambda _: service.predict(*pictures[:1] * 16), range(24)))
    assert {s.status_code for s in said} == {200, 429}
    assert all(s.headers["retry-after"] == "1" and s.json()["code"] == "busy" for s in said if s.status_code == 429)
    assert service.predict(pictures[0]).status_code == 200


def test_what_it_was_asked_is_known(service, pictures, two):
    "By id, with version and boxes; a wrong token sees nothing; feedback becomes a batch that a retraining takes."
    said = service.predict(pictures[0], conf=1e-6, max_det=3).json()["pictures"][0]
    rows = wait(lambda: [r for r in service.http.get("/requests", headers=HOLDER).json() if r["id"] == said["id"]], 10)
    assert (rows[0]["version"], len(rows[0]["boxes"]), rows[0]["sha"], rows[0]["source"]) == ("1", 3, said["sha"], "api")
    for wrong in ({}, dict(authorization="Bearer nothing"), dict(authorization=TOKEN), dict(authorization="Bearer \xff".encode("latin-1"))):
        for path, ask in (("/requests", service.http.get), ("/update-model", service.http.post)): assert ask(path, headers=wrong).status_code == 401
    box = dict(xmin=1, ymin=2, xmax=30, ymax=40, label="3")
    kept = service.http.post("/feedback/", json=dict(id=said["id"], verdict="corrected", boxes=[box])).json()["written"]
    assert kept == f"feedback-{time.strftime('%Y-%m-%d', time.gmtime())}/Annotations/{said['sha']}.xml" and (two/"data/incoming"/kept).exists()
    shutil.rmtree(two/"data/incoming")


def test_nothing_there_yet(two, tmp_path, pictures):
    """No champion: it starts, says why it is not ready, and is as soon as there is one. A registry that is down: it serves what it has.
    A broken bundle: the one before stays."""
    fresh = two.copy(tmp_path/"workspace")
    (fresh/"data/mlflow").rename(tmp_path/"aside")
    shutil.rmtree(fresh/"data/cache/serve", ignore_errors=True)
    with serving(fresh) as service:
        said = wait(lambda: "make run" in (r := service.http.get("/health/ready").json())["detail"] and r, 30, .2)
        assert said["code"] == "no_model" and service.predict(pictures[0]).json() == said and service.http.get("/").json()["answers"] is None
        assert service.http.get("/models/").json()["code"] == "no_registry"
        (tmp_path/"aside").rename(fresh/"data/mlflow")
        service.ready()
        one, = (fresh/"data/cache/serve").glob("*/version-1")
        shutil.copytree(one, bundle := one.with_name("version-2"))
        about = json.loads((bundle/"version.json").read_text())
        found = next(v for v in versions(connect(f"sqlite:///{fresh/'data/mlflow/mlflow.db'}"), "detector") if v.version == 2)
        (bundle/"version.json").write_text(json.dumps(dict(about, version=2, run=found.run_id, model_id=found.model_id, bundle=found.tags["nbs.bundle"])))
        (bundle/"best.pt").write_bytes(b"no weights")
        refused = service.http.post("/update-model", json=dict(version="2"), headers=HOLDER)
        assert refused.status_code == 409 and "best.pt" in refused.json()["detail"] and service.http.get("/health/ready").json()["version"] == "1"
        assert "has no version '9'" in service.http.post("/update-model", json=dict(version="9"), headers=HOLDER).json()["detail"]
    (fresh/"data/mlflow").rename(tmp_path/"aside")
    with serving(fresh) as service:
        service.ready()
        assert service.predict(pictures[0]).json()["pictures"][0]["version"] == "1"
        assert wait(lambda: "nothing was tracked yet" in service.said.read_text(), 60, .2)
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        with serving(fresh, MLFLOW_TRACKING_URI=f"http://127.0.0.1:{nobody.getsockname()[1]}") as service:  # it may have another version 1
            assert wait(lambda: "does not answer" in service.said.read_text(), 60, .2)
            assert service.predict(pictures[0]).json()["code"] == "no_model"


def test_what_people_get_wrong_at_the_start(two):
    "One line and a status."
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0)); taken.listen()
        port = str(taken.getsockname()[1])
        for args, status, says in ((["--port", port], 2, "cannot be had"), (["--token", "short"], 2, "16 characters"),
                                   (["--requests", "mysql://x"], 2, "sqlite:////"),
                                   (["--port", "65536"], 2, "65535"), (["--days", "0"], 2, "days says how long")):
            said = two.run("nbs", "serve", *args, status=status)
            assert says in said and "Traceback" not in said


def test_a_person_at_the_page(service, page, two, tmp_path):
    "A picture in, boxes out, thresholds moved, a correction sent; nothing is asked of other machines."
    from playwright.sync_api import expect
    elsewhere = []
    page.on("request", lambda r: elsewhere.append(r.url) if not re.match(r"(http://127\.0\.0\.1|blob:|data:)", r.url) else None)
    page.goto(f"{service.address}/page/")
    expect(page.get_by_text("answers, on")).to_contain_text("Version 1 answers")
    file, own = sorted((two/"data/processed/images/test").iterdir())[0], service.http.get("/deployed_version/").json()["limits"]
    score, overlap = page.locator("input[type=number]").first, page.locator("input[type=number]").nth(1)
    expect(score).to_have_value(str(own["conf"])); expect(overlap).to_have_value(str(own["iou"]))
    rows = lambda: service.http.get("/requests", headers=HOLDER).json()
    answer = service.predict(file.read_bytes()).json()["pictures"][0]
    wait(lambda: answer["id"] in {r["id"] for r in rows()}, 10)
    known = {r["id"] for r in rows()}
    page.locator("input[type=file]").first.set_input_files(file)
    expect(page.get_by_text("by version")).to_contain_text(f"{len(answer['boxes'])} boxes by version 1")
    [asked] = wait(lambda: [r for r in rows() if r["id"] not in known], 10)
    assert asked["conf"] == own["conf"]
    score.fill("0.00001"); score.press("Enter")
    page.get_by_role("button", name="Find objects").click()
    expect(page.get_by_text(re.compile(r"[1-9]\d* boxes by version 1"))).to_be_visible()
    page.get_by_role("button", name="Right", exact=True).click()
    expect(page.get_by_text("Thank you")).to_contain_text("feedback-")
    page.screenshot(path=os.environ.get("NBS_SCREENSHOTS", str(tmp_path)) + "/page.png")
    Image.new("RGB", (8, 8)).save(small := tmp_path/"small.png")
    count = lambda: sum(float(n) for n in re.findall(r'nbs_requests_total\{path="/predict/",.* (.*)', service.http.get("/metrics").text))
    before = count()
    page.get_by_label("Clear").or_(page.get_by_role("button", name="Remove Image")).first.click()
    page.locator("input[type=file]").first.set_input_files(small)
    expect(page.get_by_text("a side is less than 10").first).to_be_visible()
    page.get_by_role("button", name="Right", exact=True).click()
    expect(page.get_by_text("Ask about a picture first")).to_be_visible()
    assert count() == before + 1
    page.get_by_text("Another version").click()
    page.get_by_label("token of the service").fill("a wrong one")
    page.get_by_role("button", name="Let it answer").click()
    expect(page.get_by_text("this needs the token")).to_be_visible()
    page.get_by_label("version or alias").fill("2"); page.get_by_label("token of the service").fill(TOKEN)
    page.get_by_role("button", name="Let it answer").click()
    expect(page.get_by_text("Version 2 answers now")).to_be_visible()
    expect(score).to_have_value(str(service.http.get("/deployed_version/").json()["limits"]["conf"]))
    assert service.http.post("/update-model", json=dict(version="1"), headers=HOLDER).status_code == 200 and not elsewhere
    shutil.rmtree(two/"data/incoming")
