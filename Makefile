# Everything a clone needs: `make demo` and `make test` set up .venv by themselves, from the pinned requirements.lock.

.DEFAULT_GOAL := help
.PHONY: help demo test browser chaos bench bench-decoding bench-heads bench-finetuning bench-scoring bench-similar bench-growth bench-planning lint format hooks lock docs manifests clean

# `make test PYTHON=/path/to/python3.12` decides; otherwise the first of these that is fit.
PYTHONS = $(or $(PYTHON),python3.11 python3.12 python3.13 python3)
IS_FIT := import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' Makefile | expand -t 26

demo: .venv/.installed  ## the whole cycle on bundled real images
	.venv/bin/engine demo

# Two processes; a file stays in one of them, with its Ray.
test: .venv/.installed  ## the test suite; `make test PYTEST="-n 0 -k storage"` passes options on
	.venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(PYTEST)

browser: .venv/.installed  ## open the report in a real Chromium; its pictures are then in build/browser
	@.venv/bin/python -c "import axe_playwright_python, playwright" 2>/dev/null \
	  || .venv/bin/uv pip install --quiet --python .venv/bin/python -r pyproject.toml --extra browser
	ENGINE_BROWSER_NEEDED=1 .venv/bin/python -m pytest -n 0 tests/browser $(PYTEST)

chaos: .venv/.installed  ## break things on purpose, for an hour (tests/faults/README.md); `make chaos ROUNDS=5` for less
	ENGINE_CHAOS_ROUNDS=$(or $(ROUNDS),20) .venv/bin/python -m pytest -rPs -v tests/faults tests/flows/test_interrupted_run.py \
	  tests/flows/test_killed_nights.py tests/k8s/test_runs.py
	ENGINE_CHAOS_ROUNDS=1 ENGINE_TEST_S3=radosgw .venv/bin/python -m pytest -rPs -v tests/contracts/test_storage_contract.py \
	  tests/test_storage.py tests/flows/test_three_jobs_on_s3.py tests/faults/test_faulty_storage.py
	ENGINE_CHAOS_ROUNDS=3 ENGINE_CHAOS_ON=s3 ENGINE_TEST_S3=radosgw .venv/bin/python -m pytest -rPs -v tests/faults/test_chaos.py

bench: .venv/.installed  ## images/s of the engine, of hand-written programs and of the limit, then heads, fine-tuning and scoring; `make bench NETWORK=MobileNetV2`
	.venv/bin/python -m tests.benchmarks.throughput $(if $(NETWORK),--network $(NETWORK)) $(BENCH)
	$(if $(NETWORK)$(BENCH),,$(MAKE) bench-heads bench-finetuning bench-scoring)

bench-decoding: .venv/.installed  ## time and fidelity of decoding, beside OpenCV, Pillow and TensorFlow
	.venv/bin/python -m tests.benchmarks.decoding

bench-heads: .venv/.installed  ## heads beside scikit-learn: accuracy, time, what a grid costs, wrong labels that are found
	.venv/bin/python -m tests.benchmarks.heads $(BENCH)
	.venv/bin/python -m tests.benchmarks.head_sets

bench-finetuning: .venv/.installed  ## fine-tuning: what it is worth on two real sets, and its rate beside a Keras fit
	.venv/bin/python -m tests.benchmarks.finetuning $(BENCH)

bench-scoring: .venv/.installed  ## rows/s of scoring from embeddings, beside reading them and beside Keras in Ray Data
	.venv/bin/python -m tests.benchmarks.scoring $(BENCH)

bench-similar: .venv/.installed  ## rows/s of a search for similar images, beside reading the embeddings; copies among photos that are found
	.venv/bin/python -m tests.benchmarks.similar $(BENCH)
	.venv/bin/python -m tests.benchmarks.duplicates $(BENCH)

bench-growth: .venv/.installed  ## how the rate grows with actors, shards, images and parts; `make bench-growth BENCH=--quick`
	.venv/bin/python -m tests.benchmarks.growth $(BENCH)

bench-planning: .venv/.installed  ## how long planning takes, and what a million shards cost the driver
	.venv/bin/python -m tests.benchmarks.planning

lint: .venv/.installed  ## ruff (rules and layout), mypy and pyright (types)
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/basedpyright

format: .venv/.installed  ## let ruff put the code in order
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

hooks:  ## git runs `make lint` before each commit here (with pre-commit: .pre-commit-config.yaml)
	@hook="$$(git rev-parse --git-path hooks)/pre-commit"; \
	  if [ -e "$$hook" ] && ! grep -q '^exec make lint$$' "$$hook"; then \
	    echo "$$hook is there and not ours: put 'make lint' into it, or remove it"; exit 1; fi; \
	  mkdir -p "$${hook%/*}" && printf '#!/bin/sh\nexec make lint\n' > "$$hook" && chmod +x "$$hook" && echo "wrote $$hook"

lock: .venv/.installed  ## requirements.lock from pyproject.toml; `make lock UPGRADE=1` takes newer versions
	.venv/bin/uv pip compile pyproject.toml --universal --python-version 3.11 --extra demo --extra test \
	  --generate-hashes --quiet --custom-compile-command "make lock" $(if $(UPGRADE),--upgrade) \
	  --output-file requirements.lock
	.venv/bin/uv pip compile pyproject.toml --python-platform x86_64-manylinux_2_28 --python-version 3.11 --extra gpu \
	  --extra demo --constraint requirements.lock --generate-hashes --quiet --custom-compile-command "make lock" \
	  $(if $(UPGRADE),--upgrade) --output-file k8s/gpu.lock

docs: .venv/.installed  ## engine/docs/recipes.md, from the recipes' own models
	.venv/bin/python -m jobs.recipe_page

manifests: .venv/.installed  ## RayJobs of k8s/base and patches of its overlays, as `engine manifest` prints them
	.venv/bin/python -m k8s.render

clean:  ## remove .venv and all else that git ignores here
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache build dist demo-output *.egg-info
	find . -name __pycache__ -prune -exec rm -rf {} +

# uv takes a third of the time that pip takes; pip fetches it, and stands in where only pip can reach the index.
.venv/.installed: requirements.lock pyproject.toml
	@echo "Setting up .venv from requirements.lock (1.4 GB to fetch, 4.6 GB on disk, 1 to 4 minutes) ..."
	@for python in $(PYTHONS); do "$$python" -c '$(IS_FIT)' 2>/dev/null && exec "$$python" -m venv .venv; done; \
	  echo "No Python 3.11, 3.12 or 3.13 with its venv and ensurepip modules among: $(PYTHONS)."; \
	  echo "Install one (Debian, Ubuntu: python3-venv), or name it: make test PYTHON=/path/to/python3.12"; exit 1
	@sed -n '/^uv==/,/# via/p' requirements.lock | .venv/bin/python -m pip install --quiet --require-hashes -r /dev/stdin
	@.venv/bin/uv pip sync --python .venv/bin/python --compile-bytecode --require-hashes requirements.lock \
	  || .venv/bin/python -m pip install --require-hashes -r requirements.lock
	@.venv/bin/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@
