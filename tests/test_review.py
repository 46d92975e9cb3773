"A person decides on dead letters in JupyterLab, in a real browser; and a hundred thousand of them make no more rows than one page has."
import json

from jupyter import Jupyter
from nbs_lib.deadletter import Letter, Letters, Patches, write_letters
from nbs_lib.ingest import ingest
from nbs_lib.review import review
from nbs_lib.scenes import write_scenes

NOTEBOOK = """from nbs_lib.config import workspace
from nbs_lib.review import review
data = workspace()/'data'
review(data/'interim/dead_letters.jsonl', data/'patches.jsonl', root=data/'raw', interim=data/'interim')"""


def test_a_person_decides(workspace, page):
    from playwright.sync_api import expect
    write_scenes(workspace/"data/raw/fetched", scenes=dict(train=6, val=2, test=2))
    ingest(workspace/"data/interim", root=workspace/"data/raw", sources=[dict(path="fetched", format="coco")], classes=[], max_pixels=50_000_000, min_side=10,
           overhang=.1, on_bad_box="reject_box")
    letters, patches = Letters(workspace/"data/interim/dead_letters.jsonl"), workspace/"data/patches.jsonl"
    one = {l.code: l for l in letters}
    cell = dict(cell_type="code", id="review", metadata={}, source=NOTEBOOK, outputs=[], execution_count=None)
    kernel = dict(name="python3", display_name="python3", language="python")
    (workspace/"review.ipynb").write_text(json.dumps(dict(cells=[cell], metadata=dict(kernelspec=kernel), nbformat=4, nbformat_minor=5)))
    decisions = lambda: [(p["id"], p["action"], p.get("value"), p["why"]) for p in Patches(patches).by_id.values()]

    with Jupyter(workspace) as server:
        page.goto(f"http://{server.address}/lab/tree/review.ipynb?token={server.token}")
        expect(page.get_by_text("| Idle")).to_be_visible()  # before that the menus are not whole, and JupyterLab asks for a kernel
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_text("Run All Cells", exact=True).click()
        widget = page.locator(".jp-OutputArea")
        press = lambda name: widget.get_by_role("button", name=name, exact=True).click()
        chosen = lambda: expect(widget.get_by_text("1–1 of 1")).to_be_visible()  # before that the table still changes
        choose = lambda code: (widget.get_by_role("combobox").first.select_option(f"{code} (1)"), chosen(), press(one[code].id))
        why, record, facts, wrong = (widget.locator(css) for css in ("input[type=text]", "textarea", ".nbs-facts", ".nbs-wrong"))
        expect(widget.get_by_text("1–9 of 9")).to_be_visible()

        choose("unknown_class")
        expect(widget.locator("img")).to_be_visible()
        page.wait_for_function("() => document.querySelector('.jp-OutputArea img').naturalWidth > 100")
        why.fill("no such class"); press("Drop")
        expect(widget.get_by_text("drop: no such class")).to_be_visible()
        dropped = one["unknown_class"].id, "drop", None, "no such class"
        assert decisions() == [dropped]

        choose("empty_box")
        expect(facts).to_contain_text(one["empty_box"].id)
        mended = {**one["empty_box"].record, "bbox": [10, 10, 20, 20]}
        record.fill(json.dumps(mended)); why.fill("the width was lost"); press("Replace")
        expect(facts).to_contain_text("replace: the width was lost")
        expect(widget.locator(".nbs-line").last).to_contain_text("replace")
        assert decisions() == [dropped, (one["empty_box"].id, "replace", mended, "the width was lost")]

        choose("box_outside")
        expect(facts).to_contain_text(one["box_outside"].id)
        before = patches.read_bytes()
        press("Drop")
        expect(wrong).to_contain_text("say why")
        assert patches.read_bytes() == before


def test_a_hundred_thousand_letters(tmp_path):
    boxes = (Letter("empty_box", "box", "raw", f"{i % 1000}.xml", i, f"width {i}", {"i": i}) for i in range(100_000))
    write_letters(boxes, tmp_path/"letters.jsonl")
    desk = review(tmp_path/"letters.jsonl", tmp_path/"patches.jsonl", root=tmp_path, interim=tmp_path)
    assert (len(desk.table.children), desk.count.value) == (20, "1–20 of 100,000")
    for page in (5000, 1, 4999): desk.turn(page)
    assert (len(desk.table.children), desk.count.value) == (20, "99,961–99,980 of 100,000")
    assert desk.lines[-1].children[0].description == desk.letters[99_979].id
