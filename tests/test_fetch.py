"Downloads from a server that fails, stalls, breaks off and lies; archives that are broken or hostile."
import hashlib, io, json, os, random, signal, subprocess, sys, tarfile, threading, time, zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from PIL import Image

from conftest import ROOT
from nbs_lib.config import WrongCall
from nbs_lib.deadletter import Letters
from nbs_lib.download import Unavailable, download, unpack
from nbs_lib.fetch import fetch_coco
from nbs_lib.ingest import balanced, ingest

FAST = dict(timeout=.5, pause=.01)


def by_content(body): return {"ETag": f'"{hashlib.sha256(body).hexdigest()[:8]}"'}


class Server(ThreadingHTTPServer):
    def handle_error(self, *args): pass  # clients that hang up are part of the game


class Answer(BaseHTTPRequestHandler):
    "Serves `server.files` as a good server does, unless `server.faults` has something planned for the path."
    protocol_version = "HTTP/1.1"

    def log_message(self, *args): pass

    def do_GET(self):
        self.server.seen.append((self.path, dict(self.headers)))
        planned = self.server.faults.get(self.path)
        (planned.pop(0) if planned else whole)(self)

    @property
    def body(self): return self.server.files.get(self.path)

    @property
    def tag(self): return self.server.tag(self.body)

    def answer(self, status, body=b"", length=None, **headers):
        self.send_response(status)
        for k, v in headers.items(): self.send_header(k.replace("_", "-"), v)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        for i in range(0, len(body), 1 << 16):
            self.wfile.write(body[i:i + (1 << 16)])
            if self.server.holds and i >= 1 << 20: self.server.released.wait(60)
        self.close_connection = length is not None


def whole(a):
    if a.body is None: return a.answer(404)
    if a.tag and a.headers.get("If-None-Match") == a.tag["ETag"]: return a.answer(304, **a.tag)
    if a.headers.get("Range") and a.headers.get("If-Range") == a.tag.get("ETag"): return rest(a)
    a.answer(200, a.body, **a.tag)


def rest(a, shift=0):
    "The rest that was asked for, whatever If-Range says."
    begin = int(a.headers["Range"][6:-1]) + shift
    if begin >= len(a.body): return a.answer(416)
    a.answer(206, a.body[begin:], **a.tag, Content_Range=f"bytes {begin}-{len(a.body) - 1}/{len(a.body)}")


def some(a):
    "A thousand bytes of the rest, as a server with a limit may answer."
    begin = int(a.headers["Range"][6:-1])
    a.answer(206, a.body[begin:begin + 1000], **a.tag, Content_Range=f"bytes {begin}-{begin + 999}/{len(a.body)}")


def half(a): a.answer(200, a.body[:len(a.body) // 2], len(a.body), **a.tag)
def too_long(a): a.answer(200, a.body, len(a.body) + 1000, **a.tag)
def too_short(a): a.answer(200, a.body[:-1000], **a.tag)
def deaf(a): a.answer(200, a.body, **a.tag)
def elsewhere(a): rest(a, shift=7)
def piece(a): a.answer(206, a.body[:1000], **a.tag, Content_Range=f"bytes 0-999/{len(a.body)}")
def silent(a): a.server.released.wait(5); a.close_connection = True
def page(a): a.answer(200, b"<!doctype html><title>Please log in</title>")
def gone(a): a.close_connection = True


def stall(a):
    half(a)
    a.server.released.wait(5)


def another(a):
    "Half of the file; then it is another one."
    half(a)
    a.server.files[a.path] = a.body[::-1]


def status(code, **headers):
    def answer(a): a.answer(code, **headers)
    answer.__name__ = str(code)
    return answer


@pytest.fixture
def server():
    server = Server(("127.0.0.1", 0), Answer)
    server.files, server.faults, server.seen, server.tag, server.holds, server.released = {}, {}, [], by_content, False, threading.Event()
    server.url = f"http://127.0.0.1:{server.server_port}"
    server.asked = lambda key: [headers.get(key) for _, headers in server.seen]
    threading.Thread(target=server.serve_forever, args=(.02,), daemon=True).start()
    yield server
    server.released.set()
    server.shutdown()
    server.server_close()


def noise(n, seed=0): return random.Random(seed).randbytes(n)


def called(value): return "-".join(f.__name__ for f in value) if isinstance(value, list) else None


@pytest.mark.parametrize("faults, requests", [
    ([status(503)], 2), ([status(500), status(502)], 3), ([status(429, Retry_After="1")], 2), ([gone], 2), ([silent], 2), ([stall], 2), ([half], 2),
    ([half, half], 3), ([half, deaf], 2), ([half, gone, silent], 4), ([half, some], 3), ([half, elsewhere], 3), ([half, status(416)], 3), ([too_long], 3)],
    ids=called)
def test_what_passes_is_tried_again(server, tmp_path, faults, requests):
    server.files["/a"], server.faults["/a"] = noise(300_001), list(faults)
    assert download(f"{server.url}/a", tmp_path/"a", **FAST).read_bytes() == server.files["/a"]
    assert len(server.seen) == requests
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "a.json"]


@pytest.mark.parametrize("fault, says, requests", [
    (status(404), "HTTP 404 Not Found", 1), (status(403), "HTTP 403 Forbidden", 1), (status(204), "HTTP 204 No Content", 1),
    (status(304), "HTTP 304 Not Modified", 1), (piece, "HTTP 206 Partial Content", 1), (status(503), "HTTP 503 Service Unavailable", 3),
    (status(503, Retry_After="3600"), "HTTP 503 Service Unavailable", 1),
    (status(302, Location="file:///etc/hostname"), "unsupported protocol 'file://'", 1), (status(302, Location="/a"), "maximum allowed redirects", 6),
    (silent, "the server was silent for 0.5 s", 3), (gone, "the connection broke before the end", 3)])
def test_what_does_not_pass_is_told(server, tmp_path, fault, says, requests):
    server.files["/a"], server.faults["/a"] = noise(3000), [fault] * 20
    with pytest.raises(Unavailable) as e: download(f"{server.url}/a", tmp_path/"a", tries=3, **FAST)
    assert says in str(e.value) and str(e.value).startswith(f"{server.url}/a: ") and "\n" not in str(e.value)
    assert len(server.seen) == requests and not (tmp_path/"a").exists()


def test_nobody_there(tmp_path):
    with pytest.raises(Unavailable, match="no connection"): download("http://127.0.0.1:9/a", tmp_path/"a", tries=2, **FAST)


@pytest.mark.parametrize("url", ["ftp://127.0.0.1/a", "file:///etc/hostname", "/etc/hostname", "http://", "http:///a", "http://a/\ud800", "http://a/\n", ""])
def test_only_http_and_https(tmp_path, url):
    with pytest.raises(Unavailable, match="this is no http or https address"): download(url, tmp_path/"a")


def test_a_redirect_is_followed(server, tmp_path):
    server.files["/b"], server.faults["/a"] = noise(3000), [status(302, Location="/b"), status(302, Location=f"{server.url}/b")]
    for _ in range(2): assert download(f"{server.url}/a", tmp_path/"a").read_bytes() == server.files["/b"]
    assert [path for path, _ in server.seen] == ["/a", "/b"] * 2 and server.asked("If-None-Match")[3]


def test_only_the_rest_comes_again(server, tmp_path):
    server.files["/a"], server.faults["/a"] = noise(300_001), [half]
    with pytest.raises(Unavailable): download(f"{server.url}/a", tmp_path/"a", tries=1, **FAST)
    have = (tmp_path/"a.part").stat().st_size
    assert download(f"{server.url}/a", tmp_path/"a", **FAST).read_bytes() == server.files["/a"]
    assert 0 < have <= 150_000 and server.asked("Range") == [None, f"bytes={have}-"] and server.asked("If-Range")[1]


def test_a_download_stopped_before_its_last_step_is_whole(server, tmp_path):
    server.files["/a"] = noise(300_001)
    download(f"{server.url}/a", tmp_path/"a").rename(tmp_path/"a.part")
    assert download(f"{server.url}/a", tmp_path/"a").read_bytes() == server.files["/a"]
    assert server.asked("Range") == [None, None] and server.asked("If-None-Match")[1]


@pytest.mark.parametrize("second", [whole, rest], ids=["If-Range kept", "If-Range ignored"])
def test_a_file_that_changed_meanwhile_is_begun_anew(server, tmp_path, second):
    first = noise(300_001)
    server.files["/a"], server.faults["/a"] = first, [another, second]
    assert download(f"{server.url}/a", tmp_path/"a", **FAST).read_bytes() == first[::-1]


def test_without_a_mark_of_the_file_nothing_is_resumed(server, tmp_path):
    server.tag, server.files["/a"], server.faults["/a"] = lambda body: {}, noise(300_001), [half]
    for _ in range(2): assert download(f"{server.url}/a", tmp_path/"a", **FAST).read_bytes() == server.files["/a"]
    assert server.asked("Range") == [None] * 3


def test_another_address_at_the_same_path_is_another_file(server, tmp_path):
    server.files |= {"/a": noise(300_001), "/b": noise(300_001, 1)}
    server.faults["/a"], server.tag = [half], lambda body: {"ETag": '"1"'}
    with pytest.raises(Unavailable): download(f"{server.url}/a", tmp_path/"x", tries=1, **FAST)
    for name in "/b", "/a", "/b": assert download(server.url + name, tmp_path/"x").read_bytes() == server.files[name]


def test_a_killed_stage_goes_on_where_it_was(server, tmp_path):
    content, packed = noise(4_000_000), io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as t: t.addfile(member("a.bin", len(content)), io.BytesIO(content))
    server.files["/a.tar"], server.holds = packed.getvalue(), True
    code = "import sys; from nbs_lib.fetch import fetch; a = sys.argv; print(fetch(a[1], a[2], '.', kind='archive', address=a[3], " \
           "train_scenes=1, val_scenes=1, test_scenes=1, side=64, seed=0, classes=[], limit=0, annotations='', part=''))"
    command = [sys.executable, "-c", code, tmp_path/"out", tmp_path/"cache", f"{server.url}/a.tar"]
    first = subprocess.Popen(command, cwd=ROOT)
    while sum(p.stat().st_size for p in (tmp_path/"cache").glob("*.part")) < 500_000:
        assert first.poll() is None
        time.sleep(.02)
    os.kill(first.pid, signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL and not (tmp_path/"out").exists()
    server.holds = False
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    begin = int(server.asked("Range")[-1][6:-1])
    assert 500_000 <= begin < len(content) and len(server.seen) == 2
    assert said == "{'kind': 'archive', 'files': 1, 'bytes': 4000000}\n" and (tmp_path/"out/a.bin").read_bytes() == content


# archives

def member(name, size=0, **fields):
    m = tarfile.TarInfo(name)
    m.size = size
    for k, v in fields.items(): setattr(m, k, v)
    return m


FILES = {"set/a.txt": b"some text" * 300, "set/b.bin": noise(3000), "set/deep/c.txt": b""}


def packed(path, mode, *odd):
    "A good archive, and after it the members that are asked for."
    if mode == "zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as z:
            for name, data in FILES.items(): z.writestr(name, data)
            for m in odd: z.writestr(m, b"../a.txt")
        return path
    with tarfile.open(path, mode) as t:
        for name, data in FILES.items(): t.addfile(member(name, len(data)), io.BytesIO(data))
        for m in odd: t.addfile(m)
    return path


def content(folder): return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


MODES = ["zip", "w", "w:gz", "w:bz2", "w:xz"]


@pytest.mark.parametrize("mode", MODES)
def test_an_archive_is_known_by_its_content(tmp_path, mode):
    report = unpack(packed(tmp_path/"archive.of-any-name", mode), tmp_path/"out")
    assert content(tmp_path/"out") == FILES and report == dict(files=3, bytes=sum(map(len, FILES.values())))


def zip_member(name, attributes=0, **fields):
    m = zipfile.ZipInfo(name)
    m.external_attr = attributes << 16
    for k, v in fields.items(): setattr(m, k, v)
    return m


LINK, HARD = dict(type=tarfile.SYMTYPE), dict(type=tarfile.LNKTYPE)
HOSTILE = {
    "above": ("w:gz", [member("../evil.txt")], "'../evil.txt' leads out of the folder"),
    "absolute": ("w", [member("/tmp/evil.txt")], "'/tmp/evil.txt' leads out of the folder"),
    "hidden above": ("w", [member("set/../../evil.txt")], "leads out of the folder"),
    "link out": ("w:gz", [member("set/l", linkname="../../secret.txt", **LINK)], "'set/l' is a link to '../../secret.txt'"),
    "absolute link": ("w", [member("l", linkname="/etc/hostname", **LINK)], "'l' is a link to '/etc/hostname'"),
    "hard link out": ("w", [member("l", linkname="../secret.txt", **HARD)], "'l' is a link to '../secret.txt'"),
    "through a link": ("w", [member("l", linkname="..", **LINK), member("l/evil.txt")], "'l' is a link to '..'"),
    "link to itself": ("w", [member("l", linkname="m", **LINK), member("m", linkname="l", **LINK)], "'l' is a link to 'm'"),
    "device": ("w:xz", [member("null", type=tarfile.CHRTYPE, devmajor=1, devminor=3)], "'null' is a device, a pipe or the like"),
    "pipe": ("w:bz2", [member("pipe", type=tarfile.FIFOTYPE)], "'pipe' is a device, a pipe or the like"),
    "zip above": ("zip", [zip_member("../evil.txt")], "'../evil.txt' leads out of the folder"),
    "zip Windows": ("zip", [zip_member("C:evil.txt")], "'C:evil.txt' leads out of the folder"),
    "zip absolute": ("zip", [zip_member("/evil.txt")], "'/evil.txt' leads out of the folder"),
    "zip link": ("zip", [zip_member("l", 0o120777)], "'l' is a link or a device"),
    "a file as a folder": ("w", [member("set/a.txt/d.txt")], "cannot be read"),
}


@pytest.mark.parametrize("mode, odd, says", HOSTILE.values(), ids=HOSTILE)
def test_nothing_comes_out_of_a_hostile_archive(tmp_path, mode, odd, says):
    (tmp_path/"in").mkdir()
    (tmp_path/"in/secret.txt").write_text("secret")
    archive = packed(tmp_path/"in/archive", mode, *odd)
    with pytest.raises(WrongCall) as e: unpack(archive, tmp_path/"in/out")
    assert says in str(e.value) and str(e.value).startswith(f"{archive}: ") and "\n" not in str(e.value)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["archive", "in", "secret.txt"]


def test_links_within_an_archive_become_copies(tmp_path):
    odd = member("set/l", linkname="b.bin", **LINK), member("h", linkname="set/a.txt", **HARD), member("m", linkname="set/l", **LINK)
    unpack(packed(tmp_path/"a", "w:gz", *odd), tmp_path/"out")
    assert content(tmp_path/"out") == {**FILES, "set/l": FILES["set/b.bin"], "h": FILES["set/a.txt"], "m": FILES["set/b.bin"]}
    assert not any(p.is_symlink() for p in tmp_path.rglob("*"))


def test_what_the_disk_cannot_hold_is_not_begun(tmp_path):
    packed(tmp_path/"a", "w:gz", member("bomb", 1 << 60))
    with zipfile.ZipFile(tmp_path/"b", "w") as z:
        z.writestr("bomb", b"boom")
        z.infolist()[0].file_size = 1 << 60
    for name in "ab":
        with pytest.raises(WrongCall, match="it unpacks to more than the [0-9]+ bytes that the disk has left"): unpack(tmp_path/name, tmp_path/"out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def test_an_encrypted_zip_is_told(tmp_path):
    data = bytearray(packed(tmp_path/"a.zip", "zip").read_bytes())
    data[data.index(b"PK\1\2") + 8] |= 1
    (tmp_path/"a.zip").write_bytes(data)
    with pytest.raises(WrongCall, match="a.zip: 'set/a.txt' is encrypted"): unpack(tmp_path/"a.zip", tmp_path/"out")


@pytest.mark.parametrize("text", [b"<!doctype html><title>Please log in</title>", b"", b"PK\3\4", b"\x1f\x8b" + bytes(100), bytes(10240)])
def test_what_is_no_archive_is_told(tmp_path, text):
    (tmp_path/"a.zip").write_bytes(text)
    with pytest.raises(WrongCall, match="a.zip: "): unpack(tmp_path/"a.zip", tmp_path/"out")
    assert [p.name for p in tmp_path.iterdir()] == ["a.zip"]


@pytest.mark.parametrize("mode", MODES)
def test_a_cut_archive_never_passes_for_a_smaller_one(tmp_path, mode):
    data = packed(tmp_path/"a", mode).read_bytes()
    end = len(data) if mode != "w" else len(data.rstrip(b"\0")) + 512  # a plain tar ends with a block of nothing, and padding
    for n in [*range(0, end, 97), end - 1]:
        (tmp_path/"a").write_bytes(data[:n])
        with pytest.raises(Unavailable): unpack(tmp_path/"a", tmp_path/"out")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("mode", MODES)
def test_a_damaged_archive_is_one_line_or_unharmed(tmp_path, mode):
    rng, data, told = random.Random(0), packed(tmp_path/"a", mode).read_bytes(), 0
    for _ in range(300):
        broken = bytearray(data)
        for _ in range(rng.choice([1, 1, 3, 20])): broken[rng.randrange(len(broken))] = rng.randrange(256)
        (tmp_path/"a").write_bytes(broken)
        try: unpack(tmp_path/"a", tmp_path/"out")
        except WrongCall as e:
            told += 1
            assert "\n" not in str(e)
    assert told > 30 and {p.name for p in tmp_path.iterdir()} <= {"a", "out"}


# COCO

def jpeg(seed, size=(64, 48), exif=None):
    "A picture that cannot be mistaken for another."
    out = io.BytesIO()
    Image.frombytes("RGB", size, noise(3 * size[0] * size[1], seed)).save(out, "JPEG", **({"exif": exif} if exif else {}))
    return out.getvalue()


@pytest.fixture
def coco(server):
    "A site with good and bad pictures of dogs, and one of a cat."
    images = [dict(id=100 - i, file_name=f"{i:012}.jpg", width=64, height=48, license=3, coco_url=f"{server.url}/{i:012}.jpg") for i in range(12)]
    for i in range(12): server.files[f"/{i:012}.jpg"] = jpeg(i)
    turned = Image.Exif()
    turned[0x0112] = 6
    server.files["/000000000001.jpg"] = jpeg(1, exif=turned.tobytes())
    server.files["/000000000002.jpg"] = jpeg(2, size=(64, 40))
    images[3]["file_name"] = "../../evil.jpg"
    images[4]["coco_url"] = ["nowhere"]
    images[5]["coco_url"] = "file:///etc/hostname"
    images[10]["coco_url"] = images[9]["coco_url"]
    for i, fault in {0: status(503), 6: status(404), 7: page, 8: too_short, 9: half}.items(): server.faults[f"/{i:012}.jpg"] = [fault]
    server.faults["/000000000011.jpg"] = [status(302, Location="file:///etc/hostname")]
    boxes = [dict(id=1000 + i, image_id=im["id"], category_id=18, bbox=[4, 4, 20, 20], area=400, iscrowd=int(i == 1)) for i, im in enumerate(images)]
    images.append(dict(id=5, file_name="cat.jpg", width=64, height=48, coco_url=f"{server.url}/cat.jpg"))
    boxes += [dict(id=2000, image_id=5, category_id=17, bbox=[1, 1, 9, 9]), dict(id=2001, image_id=100, category_id=17, bbox=[1, 1, 9, 9])]
    content = dict(info=dict(year=2017), licenses=[dict(id=3)], images=images, annotations=boxes,
                   categories=[dict(id=17, name="cat", supercategory="animal"), dict(id=18, name="dog", supercategory="animal")])
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr("annotations/captions_val2017.json", "{}")
        z.writestr("annotations/instances_val2017.json", json.dumps(content))
    server.files |= {"/annotations.zip": archive.getvalue(), "/instances.json": json.dumps(content).encode()}
    server.faults["/annotations.zip"] = [half]
    return server


FAILED = {98: "the picture has 64×40 pixels, its record says 64×48", 96: "the record has no coco_url", 95: "this is no http or https address",
          94: "HTTP 404 Not Found", 93: "unreadable_image: no known picture format", 92: "unreadable_image: OSError: image file is truncated",
          89: "Request URL has an unsupported protocol 'file://'."}
DOGS = dict(classes=["dog"], limit=0, part="val2017", **FAST)


def test_each_picture_comes_or_is_a_letter_that_says_why(coco, tmp_path):
    raw = tmp_path/"raw/fetched"
    assert fetch_coco(raw, tmp_path/"cache", tmp_path, annotations=f"{coco.url}/annotations.zip", **DOGS) == dict(pictures=12, failed=7)
    made = json.loads((raw/"annotations/instances.json").read_text())
    assert [im["id"] for im in made["images"]] == list(range(89, 101)) and made["info"] == dict(year=2017)
    assert made["categories"] == [dict(id=18, name="dog", supercategory="animal")] and {a["category_id"] for a in made["annotations"]} == {18}
    assert {im["id"]: im["file_name"] for im in made["images"] if "fetch_error" not in im} == {
        100: "000000000000.jpg", 99: "000000000001.jpg", 97: "evil.jpg", 91: "000000000009.jpg", 90: "000000000010.jpg"}
    assert sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*.jpg")) == sorted(
        f"raw/fetched/images/{im['file_name']}" for im in made["images"] if "fetch_error" not in im)

    source = dict(path="fetched", format="coco")
    report = ingest(tmp_path/"interim", root=tmp_path/"raw", sources=[source], classes=[], max_pixels=10**7, min_side=10, overhang=.1,
                    on_bad_box="reject_box")
    letters = {l.row: l for l in Letters(tmp_path/"interim/dead_letters.jsonl")}
    assert balanced(report) and report["samples"] == 4 and report["duplicates"] == 1 and set(letters) == set(FAILED)
    for id, reason in FAILED.items(): assert letters[id].code == "missing_image" and letters[id].record["fetch_error"].startswith(reason), letters[id]


def test_the_next_run_asks_for_what_failed_and_gives_the_same_bytes(coco, tmp_path):
    run = lambda name, cache, **kw: fetch_coco(tmp_path/name, tmp_path/cache, tmp_path, **{"annotations": f"{coco.url}/annotations.zip", **DOGS, **kw})
    run("first", "cache")
    coco.seen.clear()
    assert run("second", "cache")["failed"] == 3  # whose own record is to blame, and the picture of another size
    answers = {path: headers.get("If-None-Match") is not None for path, headers in coco.seen}
    assert {path for path, known in answers.items() if not known} == {f"/{i:012}.jpg" for i in (6, 7, 8, 11)}
    assert run("third", "other")["failed"] == 3
    assert content(tmp_path/"second") == content(tmp_path/"third")


@pytest.mark.parametrize("kw, says", [
    (dict(classes=["dgo"]), "there is no class 'dgo'. Did you mean 'dog'?"), (dict(part="val2071"), "there is no part 'val2071'. Did you mean 'val2017'?"),
    (dict(limit=-1), "fetch.limit"), (dict(annotations="no.zip"), "no.zip: there is no such file"), (dict(annotations="ftp://a/b"), "no http or https address"),
    (dict(annotations="{url}/nothing"), "/nothing: HTTP 404 Not Found"), (dict(annotations="{url}/cat.jpg"), "/cat.jpg: cannot be read"),
    (dict(annotations="{url}/list.json"), "/list.json: this is no COCO file"), (dict(classes=["cat"], limit=1), "not one of 1 ")])
def test_what_cannot_be_done_is_one_line(coco, tmp_path, kw, says):
    coco.files |= {"/cat.jpg": noise(1000), "/list.json": b"[]"}
    kw = {"annotations": "{url}/annotations.zip", **DOGS, **kw}
    with pytest.raises(WrongCall) as e:
        fetch_coco(tmp_path/"out", tmp_path/"cache", tmp_path, **{**kw, "annotations": kw["annotations"].format(url=coco.url)})
    assert says in str(e.value) and "\n" not in str(e.value) and not (tmp_path/"out").exists()


def test_where_nothing_can_be_had_not_all_is_tried(server, tmp_path):
    content = dict(images=[dict(id=i, file_name=f"{i}.jpg", coco_url=f"{server.url}/{i}.jpg") for i in range(2000)], annotations=[], categories=[])
    (tmp_path/"instances.json").write_text(json.dumps(content))
    with pytest.raises(WrongCall, match="not one of 50 pictures could be had; the last one: http"):
        fetch_coco(tmp_path/"out", tmp_path/"cache", tmp_path, classes=[], limit=0, annotations="instances.json", part="", **FAST)
    assert 50 <= len(server.seen) < 2000
