"""What a sweep tries: a grid, a list of sets, or what a study of Optuna proposes; read from YAML and checked before anything starts."""
import json
from dataclasses import dataclass
from itertools import product
from math import prod
from pathlib import Path

from flows.forms import declared, typed
from nbs_lib.config import WrongCall, coerce, digest, nearest, read_yaml

MOST = 1000  # sets of a grid


@dataclass
class Stage:
    "The parameters of one stage, as its notebook declares them."
    name: str

    def __post_init__(self):
        self.kinds = {key: kind for key, (kind, _) in declared()[self.name].items()}
        self.usual = typed(self.name)  # as it is now: people edit it meanwhile

    def whole(self, values: dict,  # key → value; None keeps what params.yaml says
              where: str           # they stand, for the message
              ):
        "The section with these values in it. Raises `WrongCall` for a name that is no parameter, or a value of the wrong type."
        if not isinstance(values, dict): raise WrongCall(f"{where}: keys and values were expected, not {values!r}")
        for key in values:
            if key not in self.kinds: raise WrongCall(f"{where}: {self.name} has no parameter {key!r}.{nearest(key, self.kinds)}")
        given = {key: coerce(value, self.kinds[key], f"{where}: {self.name}.{key}") for key, value in values.items() if value is not None}
        return {**self.usual, **given}

    def typed(self, values, where):
        "The values alone, each of its parameter's type."
        whole = self.whole(values, where)
        return {key: whole[key] for key in values}


def expand(grid: dict  # key → values to try
           ):
    "Every combination, the last key changing first."
    return [dict(zip(grid, values)) for values in product(*grid.values())]


def read_sets(file: Path, stage: Stage):
    "The sets of a grid or of a list, typed. Raises `WrongCall` where there are none, too many, two the same, or one that the stage cannot take."
    given = read_yaml(file)
    if not given or not isinstance(given, (dict, list)): raise WrongCall(f"{file}: it holds no sets: key → values to try, or a list of key → value")
    if isinstance(given, dict):
        stage.whole(dict.fromkeys(given), file)
        for key, values in given.items():
            if not isinstance(values, list) or not values: raise WrongCall(f"{file}: {key} must have a list of values to try, not {values!r}")
        if (n := prod(map(len, given.values()))) > MOST: raise WrongCall(f"{file}: a grid of {n} sets, more than {MOST}: a study tries some of them")
        given = expand(given)
    sets, known = [stage.typed(values, f"{file}, set {i}") for i, values in enumerate(given, 1)], {}
    for i, values in enumerate(sets, 1):
        first = known.setdefault(digest(stage.whole(values, file)), i)
        if first != i: raise WrongCall(f"{file}: sets {first} and {i} are the same: {told(sets[first - 1])} and {told(values)}")
    return sets


def told(values: dict):
    "A set in one line."
    return " ".join(f"{key}={value}" for key, value in values.items()) or "params.yaml as it is"


@dataclass
class Sets:
    "The sets of a grid or a list, one after the other."
    left: list
    metric: str = None
    direction: str = "maximize"

    def __post_init__(self): self.trials = len(self.left)

    def ask(self):
        "The next one: a number, which a study's have, and the set."
        return (None, self.left.pop(0)) if self.left else None

    def tell(self, trial, value): pass


@dataclass
class Study:
    "Sets that Optuna's TPE proposes from the outcomes so far; remembered in a file, so that it goes on where it was stopped."
    trials: int           # that shall complete; a later call makes up for failed ones
    parameters: dict      # key → distribution of Optuna
    stage: Stage
    seed: int = 0
    metric: str = None    # of the stage's report; None: as for a grid
    direction: str = "maximize"

    def open(self, file: Path,  # database
             name: str          # of the study in it
             ):
        "Find the study, or begin it. Whoever opens it is alone: trials that still run there were stopped."
        import optuna
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.study = optuna.create_study(storage=f"sqlite:///{file}", study_name=name, direction=self.direction, load_if_exists=True)
        past, states = self.study.get_trials(deepcopy=False), optuna.trial.TrialState
        self.known = [(None, trial.params) for trial in past if trial.state == states.COMPLETE]
        self.known += [(trial.number, trial.params) for trial in past if trial.state == states.RUNNING]
        self.left = self.trials - len(self.known)

    def ask(self):
        "The next trial: its number, None where its outcome is known, and its set."
        if self.known: number, values = self.known.pop(0)
        elif self.left > 0: number, values = self.propose()
        else: return None
        return number, self.stage.typed(values, f"trial {number}")

    def propose(self):
        "A new trial. Each has a sampler of its own: a study that was stopped proposes the same as an undisturbed one."
        import optuna
        self.left -= 1
        self.study.sampler = optuna.samplers.TPESampler(seed=self.seed + len(self.study.get_trials(deepcopy=False)))
        trial = self.study.ask(self.parameters)
        return trial.number, trial.params

    def tell(self, trial, value):
        "The outcome of a trial; None: it failed."
        import optuna
        if trial is not None: self.study.tell(trial, value, None if value is not None else optuna.trial.TrialState.FAIL)


def read_study(file: Path, stage: Stage):
    "A study. Raises `WrongCall` for a word that is not known, or a range that the stage cannot take."
    given, words = read_yaml(file), dict(trials=int, seed=int, metric=str, direction=str, parameters=dict)
    if not isinstance(given, dict): raise WrongCall(f"{file}: a study has the keys {', '.join(words)}")
    for key in given:
        if key not in words: raise WrongCall(f"{file}: a study has no key {key!r}.{nearest(key, words)}")
    for key in ("trials", "parameters"):
        if not given.get(key): raise WrongCall(f"{file}: a study must say its {key}")
    given = {key: coerce(value, words[key], f"{file}: {key}") for key, value in given.items()}
    if given["trials"] < 1: raise WrongCall(f"{file}: trials must be at least 1")
    if given.get("direction") not in (None, *(ways := ("maximize", "minimize"))): raise WrongCall(f"{file}: direction is {' or '.join(ways)}")
    stage.whole(dict.fromkeys(given["parameters"]), file)
    space = {key: distribution(key, values, stage, file) for key, values in given["parameters"].items()}
    return Study(**given | dict(parameters=space), stage=stage)


def distribution(key, values, stage, file):
    "What may be tried of one parameter, as Optuna has it: a list of choices, or a range."
    from optuna import distributions
    where, kind = f"{file}: {key}", stage.kinds[key]
    if isinstance(values, list) and values:
        choices = [stage.typed({key: value}, file)[key] for value in values]
        return distributions.CategoricalDistribution([json.dumps(c) if isinstance(c, (dict, list)) else c for c in choices])
    if not isinstance(values, dict) or kind not in (int, float):
        raise WrongCall(f"{where} must be a list of choices{', or a range: {low: …, high: …}' if kind in (int, float) else ''}, not {values!r}")
    words = dict(low=kind, high=kind, log=bool, step=kind)
    for word in values:
        if word not in words: raise WrongCall(f"{where}: a range has no {word!r}.{nearest(word, words)}")
    if missing := [word for word in ("low", "high") if word not in values]: raise WrongCall(f"{where}: the range lacks {' and '.join(missing)}")
    values = {word: coerce(value, words[word], f"{where}.{word}") for word, value in values.items()}
    try: return {int: distributions.IntDistribution, float: distributions.FloatDistribution}[kind](**values)
    except ValueError as error: raise WrongCall(f"{where}: {error}") from None
