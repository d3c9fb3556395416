# Every target makes .venv first, so that each works alone on a fresh clone with Python 3.11+ and pip.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: setup demo test lint docs bench bench-convert bench-checkpoint bench-gpu faults pictures clean
setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(RUN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $(STAMP)

# Tiny Qwen3 checkpoint -> Megatron shards -> SFT at TP2 x PP2 on four CPU processes -> hf/ -> greedy answers.
demo: setup
	$(RUN)/python -m launch.demo

test: setup
	$(RUN)/python -m pytest -m 'not slow and not gpu and not multi_gpu' $(PYTEST_ARGS)

lint: setup
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy

# docs/ as a site, in out/site; a link that leads nowhere is an error.
docs: setup
	$(RUN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(RUN)/mkdocs build --strict --quiet -f .ci/mkdocs.yml

# A training step against the same step written with transformers and torch, and the data side against
# datasets.map; one process, CPU.
bench: setup
	$(RUN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[hub]'
	$(RUN)/python -m tests.bench.step
	$(RUN)/python -m tests.bench.data

# Conversion of 3 GB in both directions against cp and fsync; needs 10 GB in TMPDIR.
bench-convert: setup
	$(RUN)/python -m tests.bench.convert

# How long a save keeps a step waiting, in the background against at once.
bench-checkpoint: setup
	$(RUN)/python -m tests.bench.checkpoint

# Braid on one GPU beside transformers and Liger: docs/performance.md. Goes on where it was cut off; options, such as
# --cases 'qwen2.5-7b-*', in BENCH_GPU_ARGS. For Transformer Engine: .venv/bin/pip install -e '.[te]'.
bench-gpu: setup
	$(RUN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[peers]'
	$(RUN)/python -m tests.bench.gpu --output_dir out/bench-gpu --resume $(BENCH_GPU_ARGS)

# 200 faults on runs at TP2 x PP2, each followed by a restart that must end as the unhurt run. Half an hour.
faults: setup
	$(RUN)/python -W ignore -m tests.faults --count 200

# docs/terminal.svg and docs/loss.png, taken from a run of about a minute on a CPU.
pictures: setup
	$(RUN)/python -m launch.pictures

clean:
	rm -rf $(VENV) build *.egg-info
