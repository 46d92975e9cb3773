"""The sections of params.yaml as parameters of a flow: Prefect's form shows each key with its type, its meaning and what params.yaml says."""
import builtins, inspect
from contextlib import chdir
from functools import cache

from pydantic import ConfigDict, Field, create_model

from flows.home import ROOT
from flows.stage import stage_notebooks
from nbs_lib.config import COMMANDS, WrongCall, params, read_yaml


@cache
def declared():
    "Key → (type, meaning) of each section, as the notebooks of the stages and the commands declare them."
    import papermill
    with chdir(ROOT):
        cells = {name: papermill.inspect_notebook(path) for name, path in stage_notebooks().items()}
    stages = {name: {key: (getattr(builtins, told["inferred_type_name"]), told["help"]) for key, told in cell.items() if key != "out"}
              for name, cell in cells.items()}
    return stages | {name: {key: (kind, "") for key, kind in keys.items()} for name, keys in COMMANDS.items()}


def typed(section, **values):
    "Values that people gave for a section, as the stage or command that has it would take them. Raises what `params` raises."
    kinds = {key: kind for key, (kind, _) in declared()[section].items()}
    return params(section, dict(__annotations__=kinds), path=ROOT/"params.yaml", **values)


def form(name, keys, usual):
    "A section: nothing is filled in, and what stays empty keeps params.yaml, also a later one."
    fields = {key: (kind | None, Field(None, description=f"{meaning} (params.yaml: {str(usual.get(key))[:60]})".strip()))
              for key, (kind, meaning) in keys.items()}
    return create_model(name, __config__=ConfigDict(extra="forbid", protected_namespaces=()), **fields)


def sections(*names: str):
    "A form for each of the sections, in the order of params.yaml. What is wrong in that file is for the run to tell, which people hear of."
    try: usual = read_yaml(ROOT/"params.yaml")
    except WrongCall: usual = None
    usual = {name: values if isinstance(values, dict) else {} for name, values in (usual if isinstance(usual, dict) else {}).items()}
    return {name: form(name, declared()[name], usual.get(name, {})) for name in dict.fromkeys([*usual, *names]) if name in names}


def with_sections(*names: str):
    "Let a function with `**sections` be called with each of them by name."
    def decorate(function):
        own = [p for p in inspect.signature(function).parameters.values() if p.kind != p.VAR_KEYWORD]
        more = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=model | None) for name, model in sections(*names).items()]
        function.__signature__ = inspect.Signature([*own, *more])
        return function
    return decorate


def chosen(given):
    "What was filled in: section → key → value."
    filled = {name: model.model_dump(exclude_none=True) for name, model in given.items() if model}
    return {name: values for name, values in filled.items() if values}
