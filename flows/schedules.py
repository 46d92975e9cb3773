"""What flows/schedules.yaml says, checked before a server hears of it."""
import difflib, importlib, inspect, logging
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, get_args
from zoneinfo import available_timezones

from prefect.exceptions import ParameterTypeError
from prefect.schedules import Cron, Interval, RRule
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from flows.home import ROOT
from nbs_lib.config import WrongCall, nearest, read_yaml

FILE, FLOWS, TYPES = ROOT/"flows/schedules.yaml", ("retrain", "score", "drift"), ("process", "docker")
ANCHOR = datetime(2020, 1, 1, tzinfo=UTC)  # an interval that counted from now would begin anew whenever it is served


class Strict(BaseModel): model_config = ConfigDict(extra="forbid")


class When(Strict):
    "One of cron, interval and rrule."
    cron: str | None = None
    interval: float | None = Field(None, gt=0)  # [s]
    rrule: str | None = None
    timezone: str = "UTC"
    active: bool = True

    def kinds(self): return [kind for kind in ("cron", "interval", "rrule") if getattr(self, kind) is not None]

    def schedule(self):
        "As Prefect has it. Raises ValueError for what it cannot read."
        if len(self.kinds()) != 1: raise ValueError(f"name one of cron, interval and rrule, not {' and '.join(self.kinds()) or 'none'}")
        if self.timezone not in (zones := available_timezones()):
            close = difflib.get_close_matches(self.timezone, zones, n=1)
            raise ValueError(f"there is no timezone {self.timezone!r}{f'; did you mean {close[0]!r}?' if close else ', such as Europe/Berlin'}")
        common = dict(timezone=self.timezone, active=self.active)
        if self.cron: return Cron(self.cron, **common)
        return RRule(self.rrule, **common) if self.rrule else Interval(self.interval, anchor_date=ANCHOR, **common)


class WorkPool(Strict):
    "Where workers take the runs from, and what they are told beside the flow."
    name: str
    work_queue_name: str = Field("default", min_length=1)
    job_variables: dict = {}


class Entry(Strict):
    "One deployment."
    name: str = Field(pattern="^[^/%&<>]+$")  # what Prefect takes
    flow: Literal[FLOWS]
    schedules: list[When] = []
    parameters: dict = {}
    triggers: list[str] = []
    paused: bool = False
    work_pool: WorkPool | None = None


def entries(file: Path = FILE):
    "The deployments of a file. Raises `WrongCall` for the first thing in it that is wrong: where, what, what to do."
    return pools_and_entries(file)[1]


def pools_and_entries(file: Path):
    "The type of each work pool by its name, and the deployments. Raises `WrongCall` as `entries` does."
    whole = read_yaml(file)
    if not isinstance(whole, dict) or set(whole) - {"work_pools"} != {"deployments"} or not isinstance(whole["deployments"], list):
        raise WrongCall(f"{file}: one list is expected, `deployments:`; before it may stand `work_pools:`")
    pools = checked_pools(file, whole.get("work_pools") or {})
    found = [checked(file, n, given, pools) for n, given in enumerate(whole["deployments"], 1)]
    names = [(e.flow, e.name) for e in found]
    if twice := next((name for name in names if names.count(name) > 1), None): raise WrongCall(f"{file}: there are two deployments {'/'.join(twice)}")
    return pools, found


def checked_pools(file, given):
    if not isinstance(given, dict): raise WrongCall(f"{file}: work_pools: a type is expected for each name, such as {{cpu: process}}")
    for name, kind in given.items():
        if kind not in TYPES: raise WrongCall(f"{file}: work_pools: {name}: there is no type {kind!r}.{nearest(kind, TYPES)}")
    return given


def checked(file, number, given, pools):
    where = f"{file}: deployment {given.get('name', number) if isinstance(given, dict) else number}"
    try: entry = Entry.model_validate(given)
    except ValidationError as error: raise WrongCall(f"{where}: {first(error)}") from None
    for n, when in enumerate(entry.schedules, 1):
        try: when.schedule()
        except ValidationError as error: raise WrongCall(f"{where}: schedule {n}: {first(error)}") from None
        except ValueError as error: raise WrongCall(f"{where}: schedule {n}: {' '.join(str(error).split())}") from None
    if entry.work_pool and entry.work_pool.name not in pools:
        raise WrongCall(f"{where}: work_pools has no pool {entry.work_pool.name!r}.{nearest(entry.work_pool.name, pools)}")
    check_parameters(where, flow_of(entry), entry.parameters)
    return entry.model_copy(update=dict(parameters=own_timezone(where, entry) | entry.parameters))


def own_timezone(where, entry):
    "What a flow that asks for a timezone, in which it reads the day, is told unless the line says it."
    if not (zones := sorted({when.timezone for when in entry.schedules})) or "timezone" not in inspect.signature(flow_of(entry).fn).parameters: return {}
    if len(zones) == 1: return dict(timezone=zones[0])
    if not entry.parameters.get("batch") or entry.parameters.get("timezone"): return {}
    raise WrongCall(f"{where}: its schedules have the timezones {' and '.join(zones)}: name the one of `batch` as parameters.timezone")


def first(error):
    "The first complaint of pydantic, with the names there are."
    told = error.errors()[0]
    place = ".".join(str(part) for part in told["loc"])
    known = [key for part in (Entry, When, WorkPool) for key in part.model_fields]
    if told["type"] == "extra_forbidden": return f"there is no key {place}.{nearest(told['loc'][-1], known)}"
    if told["type"] == "literal_error": return f"there is no {place} {told['input']!r}.{nearest(told['input'], FLOWS)}"
    return f"{place}: {told['msg']}".removeprefix(": ") + (f", not {told['input']!r}" if isinstance(told["input"], str | int | float) else "")


def flow_of(entry): return getattr(importlib.import_module(f"flows.{entry.flow}"), entry.flow)


def check_parameters(where, flow, given):
    known = inspect.signature(flow.fn).parameters
    for name in given:
        if name not in known: raise WrongCall(f"{where}: {flow.name} has no parameter {name!r}.{nearest(name, known)}")
        form = next((kind for kind in get_args(known[name].annotation) if hasattr(kind, "model_fields")), None)
        for key in given[name] if form and isinstance(given[name], dict) else ():
            if key not in form.model_fields: raise WrongCall(f"{where}: there is no key {name}.{key}.{nearest(key, form.model_fields)}")
    logging.getLogger("prefect.flows").disabled = True  # it would tell the same in twelve lines
    try: flow.validate_parameters(given)
    except ParameterTypeError as error: raise WrongCall(f"{where}: {flow.name}: {str(error).split(' - ')[1].splitlines()[0]}") from None
    finally: logging.getLogger("prefect.flows").disabled = False
