"What a machine without cards can show of a training on several: what each card's process is handed."
import subprocess, sys, textwrap

from nbs_lib.detector import Watch


def test_each_process_of_a_training_on_several_cards_gets_our_callbacks(tmp_path):
    """ultralytics starts a process for each card, from a file with the trainer and its callbacks in it.

    The second process here loads that file as those do; the next thing they do is to take their card.
    """
    code = """
        import sys
        from pathlib import Path
        from nbs_lib.detector import Watch, ultralytics
        from nbs_lib.scenes import write_scenes
        from nbs_lib.ingest import ingest
        from nbs_lib.split import split
        here = Path(sys.argv[1])
        write_scenes(here/'raw', scenes=dict(train=8, val=4, test=4), side=64)
        ingest(here/'in', root=here, sources=[dict(path='raw', format='coco')], classes=[], max_pixels=10**6, min_side=10, overhang=.1,
               on_bad_box="reject_box")
        split(here/'in', here/'tree', keep=True, val=.1, test=.1, max_dead_rate=1.)
        yolo, watch = ultralytics().YOLO('yolo11n.yaml'), Watch(here/'tree', here)
        for event in watch.EVENTS: yolo.add_callback(event, getattr(watch, event))
        from ultralytics.models.yolo.detect import DetectionTrainer
        from ultralytics.utils.dist import generate_ddp_file
        overrides = dict(model='yolo11n.yaml', data=str(here/'tree/data.yaml'), imgsz=64, epochs=1, device='cpu', project=str(here), name='run', task='detect')
        trainer = DetectionTrainer(overrides=overrides, _callbacks=yolo.callbacks)
        Path(generate_ddp_file(trainer)).with_suffix('.pt').rename(here/'state.pt')
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code), str(tmp_path)], check=True, capture_output=True, text=True)
    child = """
        import sys, torch
        state = torch.load(sys.argv[1], weights_only=False)
        ours = [f.__qualname__ for found in state['callbacks'].values() for f in found if 'Watch' in f.__qualname__]
        print(state['trainer'].__name__, *sorted(ours))
    """
    said = subprocess.run([sys.executable, "-c", textwrap.dedent(child), str(tmp_path/"state.pt")], check=True, capture_output=True, text=True).stdout
    assert said.splitlines()[-1].split() == ["DetectionTrainer", *sorted(f"Watch.{event}" for event in Watch.EVENTS)]
