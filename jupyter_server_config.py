"JupyterLab of this workspace. `make install` links this file to where the workspace's own Jupyter looks for it."
from pathlib import Path

from nbdev.clean import clean_nb

NOTEBOOKS = Path(__file__).resolve().parent/"notebooks"


def clean(model, path, contents_manager, **_):
    """Save notebooks without what a run leaves in them, so that Run All + Save changes no dependency of DVC.

    Stage notebooks lose their outputs, those of a run lie in data/runs, and so does the welcome page, which is about here and now. The others keep theirs.
    """
    file = Path(contents_manager.root_dir, path.strip("/")).resolve()
    if model["type"] != "notebook" or NOTEBOOKS not in file.parents: return
    clean_nb(model["content"], allowed_cell_metadata_keys=["tags"])
    for cell in model["content"]["cells"] if file.parent.name == "stages" or file.stem == "00_welcome" else ():
        if cell["cell_type"] == "code": cell["outputs"] = []


c = get_config()  # noqa: F821 - Jupyter puts it there
c.FileContentsManager.pre_save_hook = clean
c.LabApp.app_settings_dir = str(NOTEBOOKS.parent/"jupyter")  # how long each cell took; saving drops it again
