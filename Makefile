# The workspace's commands. Each says what it does before it does it; `make help` lists them.
.DEFAULT_GOAL := help
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
PYTHON ?= python3
VENV ?= .venv
export PATH := $(abspath $(VENV))/bin:$(PATH)
# The locked torch runs on a CPU too. On Linux `make install TORCH=cpu` takes the build without CUDA, and none of NVIDIA's packages
TORCH ?= cuda
PORT ?= 5000
# Every stage starts a Python of its own: compiled once here, it starts twice as fast, also where Python may write no bytecode
export UV_COMPILE_BYTECODE := 1

.PHONY: help install run retrain serve deploy api mlflow test test-kills test-flows test-serving test-large test-bench bench guides lab image \
	stack-env stack-up stack-join stack-deploy stack-down stack-logs stack-upgrade stack-backup stack-restore stack-test export lock clean

help:  ## list these commands
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 15

install: $(VENV)/.installed  ## make .venv from the lock

$(VENV)/.installed: requirements.txt pyproject.toml
	@echo "install: the locked packages into $(VENV) (several GB on Linux, once)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "install: Python 3.11 or newer is needed; name it, e.g. make run PYTHON=python3.12")'
	@test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	@$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check uv
ifeq ($(TORCH),cpu)
	@uv pip install --python $(VENV) --torch-backend cpu $$(grep -oE '^(torch|torchvision)==[0-9.]+' requirements.txt)
	@uv pip install --python $(VENV) --require-hashes --excludes <(grep -oE '^(cuda|nvidia|triton)[a-z0-9-]*' requirements.txt) -r requirements.txt
else
	@uv pip install --python $(VENV) --require-hashes -r requirements.txt
endif
	@uv pip install --python $(VENV) --no-deps --no-build-isolation --quiet --editable .
	@mkdir -p $(VENV)/etc/jupyter && ln -sf ../../../jupyter_server_config.py $(VENV)/etc/jupyter/
	@touch $@

run: install  ## pictures in, judged detector out, champion where it is better
	@echo "run: fetch, ingest, split, train, evaluate; only what changed; then publish and gate"
	@$(if $(wildcard .git),$(if $(wildcard .dvc/config.local),dvc config --local core.no_scm false),dvc config --local core.no_scm true)
	@$(if $(NBS_ENV),nbs params --apply)
	@python -m flows.preflight
	@dvc repro
	@nbs publish --gate || [ $$? = 3 ]  # refused is an answer too
	@echo "run: score in data/reports/evaluate.json, report: $$(python -c 'from flows.stage import page; print(page("evaluate"))'), what was rejected: nbs letters, every run: make mlflow"
	@dvc metrics show data/reports/evaluate.json

retrain: install  ## what the schedule does, once and without a server: new data, what changed, publish, gate
	@python -m flows.retrain || [ $$? = 3 ]  # another run is at work, and has said so

serve: install  ## the schedules of flows/schedules.yaml, with Prefect's pages on http://127.0.0.1:4200
	@python -m flows.serve

deploy: install  ## the same schedules on the server that PREFECT_API_URL names, for workers (IMAGE=… or SOURCE=…, which is git's origin)
	@python -m flows.deploy $(if $(IMAGE),--image '$(IMAGE)',--source '$(or $(SOURCE),$(shell git remote get-url origin 2>/dev/null))')

api: install  ## the champion over HTTP, with a page for people: http://127.0.0.1:8000/page
	@nbs serve

mlflow: install  ## MLflow's pages on the workspace's own runs and models, http://127.0.0.1:5000 (PORT=… for another)
	@test -f data/mlflow/mlflow.db || { echo "mlflow: data/mlflow holds nothing yet: make run"; exit 1; }
	@echo "mlflow: http://127.0.0.1:$(PORT), Ctrl-C ends it"
	@MLFLOW_DISABLE_TELEMETRY=true mlflow server --backend-store-uri 'sqlite:///$(CURDIR)/data/mlflow/mlflow.db' --host 127.0.0.1 --port $(PORT) --workers 1

test: install  ## every notebook, every rule, the whole pipeline on a small setting
	@echo "test: api notebooks, rules, end to end"
	@python -m pytest

test-kills: install  ## every process stopped at three moments of every stage (forty minutes)
	@echo "test-kills: KILL, TERM, Ctrl-C, full disk"
	@python -m pytest -n 0 -m kills -s

test-flows: install  ## schedules, workers, scoring, sweeps, kills and failures, on real Prefect servers (half an hour)
	@echo "test-flows: serve, deploy, retrain, score, sweep, killed and fed with new data"
	@python -m pytest -n 0 -m flows -s

test-serving: install  ## ten thousand requests while the model is switched, and what a fuzzer thinks up (ten minutes)
	@echo "test-serving: nbs serve at full load"
	@python -m pytest -n 0 -m serving -s tests/test_serve.py

test-large: install  ## annotation files of a gigabyte, a million letters, 20,000 pictures, a real set (some twenty minutes, 10 GB of disk)
	@echo "test-large: what does not fit into memory"
	@python -m pytest -n 0 -m large -s

bench: $(VENV)/peers/.installed  ## this workspace beside its peers, row by row (hours, 15 GB of disk; NAMES=… for some of notebooks/bench)
	@python -m flows.bench $(NAMES)

test-bench: $(VENV)/peers/.installed  ## every benchmark with hardly any work, to see that it runs
	@python -m flows.bench --small $(NAMES)

$(VENV)/peers/.installed: $(VENV)/.installed notebooks/bench/requirements.txt
	@echo "bench: pycocotools, supervision and datumaro, in an environment of their own"
	@test -x $(VENV)/peers/bin/python || $(PYTHON) -m venv $(VENV)/peers
	@uv pip install --python $(VENV)/peers --require-hashes --quiet -r notebooks/bench/requirements.txt
	@touch $@

guides: install  ## the guides in full, as HTML in data/runs/guides (the one on blood cells needs data/raw/bccd)
	@mkdir -p data/runs/guides
	@for guide in notebooks/guides/*.ipynb; do \
		if [[ $$guide == *blood_cells* && ! -d data/raw/bccd ]]; then echo "guides: $$guide is left out, there is no data/raw/bccd"; continue; fi; \
		echo "guides: $$guide"; executed=data/runs/guides/$$(basename $$guide); \
		papermill --no-progress-bar $$guide $$executed && jupyter nbconvert --log-level=ERROR --to html $$executed || exit 1; done

lab: install  ## JupyterLab on this workspace
	@jupyter lab --ServerApp.root_dir=. --LabApp.default_url=/lab/tree/notebooks/guides/00_welcome.ipynb

image:  ## the workspace as a container image, for `docker run --rm --gpus all --shm-size 2g -v "$PWD":/workspace -p 127.0.0.1:8888:8888 nbs`
	@DOCKER_BUILDKIT=1 docker build --file docker/Dockerfile --build-arg UID=$$(id -u | sed 's/^0$$/1000/') --tag nbs .

stack-env:  ## docker/stack.env with passwords of its own, for all that follows
	@$(PYTHON) docker/stack.py env

stack-up: stack-env  ## JupyterLab, MLflow, Prefect, a worker and their database in containers; built, healthy, scheduled
	@$(PYTHON) docker/stack.py up

stack-join: stack-env  ## a worker here for the stack of another machine, which NBS_SERVER of docker/stack.env names
	@$(PYTHON) docker/stack.py join

stack-deploy:  ## its schedules at the commit that is checked out
	@$(PYTHON) docker/stack.py deploy

stack-down:  ## its containers away; what they keep stays in volumes
	@$(PYTHON) docker/stack.py down

stack-logs:  ## what its containers say
	@$(PYTHON) docker/stack.py logs

stack-upgrade:  ## MLflow's database to the version of the image; first make a backup
	@$(PYTHON) docker/stack.py upgrade

stack-backup:  ## databases, artifacts and DVC's remote into a new folder (FOLDER=…)
	@$(PYTHON) docker/stack.py backup '$(or $(FOLDER),$(error name a new folder: FOLDER=…))'

stack-restore:  ## the same back, into an empty stack (FOLDER=…)
	@$(PYTHON) docker/stack.py restore '$(or $(FOLDER),$(error name the folder of a backup: FOLDER=…))'

stack-test: install  ## the whole stack for real: built, retraining, killed, backed up (half an hour, 30 GB of disk)
	@python -m pytest -n 0 -m stack -s tests/test_stack.py

export: install  ## nbs_lib from the notebooks, and the notebooks cleaned
	@nbdev_export
	@nbdev_clean

lock: install  ## requirements.txt anew from pyproject.toml
	@uv pip compile pyproject.toml --extra dev --universal --generate-hashes --no-emit-index-url --no-header --upgrade --quiet --output-file requirements.txt
	@uv pip compile notebooks/bench/requirements.in --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header --upgrade --quiet \
		--output-file notebooks/bench/requirements.txt

clean:  ## remove what can be made again, but not .venv and not your data
	@rm -rf data/cache data/interim data/processed data/models data/raw/fetched data/.*.tmp data/raw/.*.tmp
	@for run in data/runs/*; do \
		if [[ ! -d $$run/edited || -L $$run ]]; then rm -rf "$$run"; continue; fi; \
		find "$$run" -mindepth 1 -maxdepth 1 ! -name edited -exec rm -rf {} +; echo "clean: $$run/edited stays, the only copy of what somebody edited"; done
	@rmdir data/runs 2>/dev/null || true
