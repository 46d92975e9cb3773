"The consumer on a real Redis: killed again and again, messages that kill, a server that goes and comes back, pictures that are none, a password that is wrong."
import io, json, os, random, shutil, signal, socket, subprocess, sys, threading, time
from contextlib import suppress

import pytest
from PIL import Image, ImageDraw
from redis import Redis, RedisError, ResponseError

from conftest import ROOT, wait
from nbs_lib.boxes import Boxes
from nbs_lib.config import WrongCall
from nbs_lib.consume import Limits, consume, redrive
from nbs_lib.requestlog import RequestLog

# finds what is not black: a detector that is cheap, and whose boxes can be checked
DETECT = """
import os, signal, sys, time
from nbs_lib.boxes import Boxes
from nbs_lib.consume import consume

def detect(pictures, **asked):
    if any(p.width == 13 for p in pictures): os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(.002 * len(pictures))
    return '3', 'abc', [Boxes([p.getbbox()], ['spot'], [.9]) for p in pictures]

if __name__ == '__main__': print(consume(sys.argv[1], detect, idle=float(sys.argv[2]), attempts=int(sys.argv[3])), flush=True)
"""


class Server:
    "Redis in a folder, which can be killed and started again."
    def __init__(self, folder):
        self.folder = folder
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.port = s.getsockname()[1]
        self.url = f"redis://:geheim@127.0.0.1:{self.port}/0"
        self.redis = Redis.from_url(self.url, protocol=2)
        self.start()

    def start(self):
        words = dict(port=self.port, bind="127.0.0.1", dir=self.folder, requirepass="geheim", appendonly="yes", appendfsync="always", save="")
        self.process = subprocess.Popen(["redis-server", *(str(w) for k, v in words.items() for w in (f"--{k}", v))], stdout=subprocess.DEVNULL)
        def answers():
            with suppress(RedisError): return self.redis.ping()
        wait(answers, 60)

    def kill(self):
        self.process.kill()
        self.process.wait()

    def send(self, data=None, **fields): return self.redis.xadd("pictures", {**({} if data is None else {"image": data}), **fields}).decode()

    def results(self): return [{k.decode(): v.decode() for k, v in fields.items()} for _, fields in self.redis.xrange("boxes")]

    def left(self):
        "Messages that are taken, and messages that are there; nothing while there is no group."
        with suppress(ResponseError): return self.redis.xpending("pictures", "detectors")["pending"], self.redis.xlen("pictures")

    def consumer(self, idle=.5, attempts=30):
        return subprocess.Popen([sys.executable, "-c", DETECT, self.url, str(idle), str(attempts)], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)},
                                stdout=subprocess.PIPE, text=True)


@pytest.fixture
def server(tmp_path):
    if not shutil.which("redis-server"): pytest.skip("no redis-server on the path: apt-get install redis-server")
    it = Server(tmp_path)
    yield it
    it.kill()


def picture(i, width=64):
    "Black, with a spot that says which it is."
    image = Image.new("RGB", (width, 48))
    ImageDraw.Draw(image).rectangle(spot := (i % 40, i // 40, i % 40 + 9, i // 40 + 9), fill="white")
    image.save(out := io.BytesIO(), "PNG")
    return out.getvalue(), [[*map(float, spot[:2]), spot[2] + 1., spot[3] + 1., "spot", .9]]


def detect(pictures, **asked): return "3", "abc", [Boxes([p.getbbox()], ["spot"], [.9]) for p in pictures]


def test_a_thousand_messages_and_ten_kills(server):
    "Two consumers; one of them is killed at a random moment, ten times."
    sent, rng = {}, random.Random(0)
    for i in range(1000):
        data, boxes = picture(i)
        sent[server.send(data, id=f"photo {i}")] = f"photo {i}", boxes
    consumers, kills = [server.consumer() for _ in range(2)], 0
    wait(lambda: server.redis.xlen("boxes") > 10, 60)
    while kills < 10:
        time.sleep(rng.uniform(0, .05))
        before = server.redis.xlen("boxes")
        assert before < 1000, f"all was done after {kills} kills"
        consumers[kills % 2].kill()
        consumers[kills % 2].communicate()
        kills += 1
        consumers[kills % 2 ^ 1] = server.consumer()
        wait(lambda: server.redis.xlen("boxes") >= min(before + 40, 990), 60)
    wait(lambda: server.left() == (0, 0), 120)
    for process in consumers:
        process.send_signal(signal.SIGTERM)
        assert process.communicate(timeout=30)[0].startswith("{'answered': ")
    results = server.results()
    assert len(results) == len({r["message"] for r in results}) == 1000 and not server.redis.exists("pictures:dead")
    assert {r["message"]: (r["id"], json.loads(r["boxes"])) for r in results} == sent


def test_a_message_that_kills_becomes_a_dead_letter_and_takes_no_others_with_it(server):
    good = [server.send(picture(i)[0]) for i in range(4)]
    bad = server.send(picture(7, width=13)[0], id="killer", conf=.3)
    good += [server.send(picture(i)[0]) for i in range(4)]
    died = 0
    process = server.consumer(.3, 3)
    while server.left() != (0, 0):
        if process.poll() is not None: died, process = died + 1, server.consumer(.3, 3)
        assert died <= 3
        time.sleep(.05)
    process.send_signal(signal.SIGTERM)
    process.communicate()
    results = {r["message"]: r for r in server.results()}
    assert died == 3 and sorted(results) == sorted([*good, bad]) and all("boxes" in results[m] for m in good)
    assert results[bad]["code"] == "prediction_failed" and results[bad]["detail"] == "taken 3 times, and each time whoever took it died"
    (_, dead), = server.redis.xrange("pictures:dead")
    letter = json.loads(dead[b"letter"])
    assert dead[b"image"] == picture(7, width=13)[0] and dead[b"error"].decode() == letter["detail"] == results[bad]["detail"]
    assert (letter["code"], letter["file"], letter["picture"], letter["record"]) == ("prediction_failed", bad, "killer", dict(id="killer", conf="0.3"))
    assert (redrive(server.url), redrive(server.url)) == (1, 0)
    assert [fields for _, fields in server.redis.xrange("pictures")] == [{b"id": b"killer", b"conf": b"0.3", b"image": dead[b"image"]}]
    assert consume(server.url, detect, once=True)["answered"] == 1 and not server.redis.xlen("pictures:dead")


def test_dead_letters_whose_message_was_trimmed_stay_and_hold_up_no_others(server, capsys):
    trims = [True, False, True, False]
    def die(*_, **__):
        if trims.pop(): server.redis.xtrim("pictures", maxlen=0, approximate=False)
        raise RuntimeError("no picture of mine")
    while trims:
        server.send(picture(1)[0])
        assert consume(server.url, die, once=True, attempts=1)["dead"] == 1
    assert (redrive(server.url), redrive(server.url)) == (2, 0)
    assert server.redis.xlen("pictures:dead") == 2 == server.redis.xlen("pictures")
    assert "2 dead letters stay in pictures:dead" in capsys.readouterr().out


def test_redis_killed_and_back(server):
    sent, said, stop = {}, [], threading.Event()
    thread = threading.Thread(target=consume, args=(server.url, detect), kwargs=dict(idle=.5, stop=stop, say=said.append, batch=2))
    thread.start()
    for round in range(3):
        for i in range(100): sent[server.send(picture(i)[0])] = picture(i)[1]
        wait(lambda: server.redis.xlen("boxes") > 100 * round + 5, 60)
        server.kill()
        wait(lambda: len(said) == 2 * round + 1, 60)
        time.sleep(.5)
        server.start()
        wait(lambda: len(said) == 2 * round + 2, 60)
    wait(lambda: server.left() == (0, 0), 60)
    stop.set()
    thread.join(30)
    assert sorted((r["message"], json.loads(r["boxes"])) for r in server.results()) == sorted(sent.items())
    assert said[1::2] == ["Redis: it is back"] * 3 and all(s.endswith("; waiting for it") for s in said[::2])


def test_pictures_that_are_none_are_answered_with_codes(server, tmp_path):
    png = picture(1)[0]
    bomb, tiny, eps = (io.BytesIO() for _ in range(3))
    Image.new("1", (9000, 9000)).save(bomb, "PNG"), Image.new("RGB", (5, 50)).save(tiny, "PNG"), Image.new("L", (50, 50)).save(eps, "EPS")
    wrong = [("unreadable_image", dict(data=b"")), ("unreadable_image", dict(data=png[:60])), ("unreadable_image", dict(data=b"<html>")),
             ("unsupported_format", dict(data=eps.getvalue())), ("too_many_pixels", dict(data=bomb.getvalue())), ("too_many_pixels", dict(data=bytes(300_000))),
             ("too_small", dict(data=tiny.getvalue())), ("missing_key", dict(id="no picture")), ("malformed_record", dict(data=png, conf="much")),
             ("malformed_record", dict(data=png, max_det="0")), ("malformed_record", dict(data=png, iou="nan"))]
    sent = {server.send(**fields): code for code, fields in wrong}
    fine = server.send(png, conf=0.5, max_det=1)
    log = RequestLog(f"sqlite:///{tmp_path}/requests.db", pictures=tmp_path/"pictures")
    done = consume(server.url, detect, once=True, log=log, limits=Limits(max_bytes=200_000))
    log.close(30)
    results = {r["message"]: r for r in server.results()}
    assert done == dict(answered=12, refused=11, dead=0) and {m: r.get("code") for m, r in results.items()} == sent | {fine: None}
    assert all(r["detail"] for m, r in results.items() if m != fine) and not server.redis.exists("pictures:dead")
    rows = {r["id"]: r for r in log.recent()}
    assert {m: rows[r["request"]]["code"] for m, r in results.items()} == sent | {fine: None} and {r["source"] for r in rows.values()} == {"stream"}
    row = rows[results[fine]["request"]]
    assert (row["boxes"], row["version"], row["width"], row["bytes"]) == (picture(1)[1], "3", 64, len(png)) and (tmp_path/f"pictures/{row['sha']}.png").exists()


def test_a_detector_that_fails_and_one_that_is_not_there_yet(server):
    tries, said = [], []
    def fails(pictures):
        tries.append(len(pictures))
        if len(tries) < 3: raise WrongCall("there is no champion")
        if any(p.width == 50 for p in pictures): raise RuntimeError("out of luck")
        return detect(pictures)
    for i in range(3): server.send(picture(i)[0])
    unlucky = server.send(picture(0, width=50)[0])
    total = [consume(server.url, fails, once=True, idle=.3, attempts=2, say=said.append) for _ in range(2) if time.sleep(.4) is None]
    assert total == [dict(answered=3, refused=0, dead=0), dict(answered=1, refused=0, dead=1)] and tries[:3] == [4, 4, 4]
    assert said == ["no detector: there is no champion; waiting for one"]
    result, = [r for r in server.results() if r["message"] == unlucky]
    assert result["detail"] == "taken 2 times; at last: RuntimeError: out of luck"


def test_other_groups_trimming_and_what_was_trimmed(server):
    server.redis.xgroup_create("pictures", "others", "0", mkstream=True)
    for i in range(300): server.send(picture(i)[0])
    assert consume(server.url, detect, once=True, keep=100)["answered"] == 300 and server.redis.xlen("pictures") == 300
    assert 100 <= server.redis.xlen("boxes") < 300
    server.redis.xgroup_destroy("pictures", "others")
    server.redis.flushall()  # the group, too
    server.send(picture(0)[0])
    assert consume(server.url, detect, once=True)["answered"] == 1 and server.left() == (0, 0)
    server.send(picture(0)[0])
    server.redis.xreadgroup("detectors", "dead", {"pictures": ">"})
    server.redis.xtrim("pictures", 0)
    said = []
    time.sleep(.02)
    assert consume(server.url, detect, once=True, idle=.01, say=said.append)["answered"] == 0 and "were trimmed from pictures" in said[0]


def test_a_wrong_password_is_one_line(server):
    for word in ("Gehe1m", ""):
        with pytest.raises(WrongCall, match="Redis: .*([Aa]uthentication|password)") as refused: consume(server.url.replace("geheim", word), detect)
        assert "ehe" not in str(refused.value)


def test_a_name_that_something_else_has(server):
    server.redis.set("boxes", "x")
    with pytest.raises(WrongCall, match="Redis: boxes is a string, no stream"): consume(server.url, detect)
