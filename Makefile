# `make demo` runs the main job end to end, `make test` everything that CI runs.
# Both install what they need into .venv. On Linux torch's default wheel is a CUDA build; for the
# smaller CPU build pass pip's own options: make demo TORCH='torch==2.13.0 --index-url URL'.

PYTHON ?= python3
TORCH ?= torch==2.13.0
TORCHREC := torchrec==1.8.0
BIN := .venv/bin
DEMO := runs/demo

.PHONY: install install-cuda demo test lint test-gpu test-spark clean
.DELETE_ON_ERROR:

install: .venv/.installed

# torch first: whatever else pip resolves must find it there. TorchRec without its dependencies:
# it asks for an unpinned fbgemm-gpu, a CUDA wheel of another ABI; pyproject.toml lists the rest.
.venv/.installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet $(TORCH)
	$(BIN)/pip install --quiet --editable '.[cpu]'
	$(BIN)/pip install --quiet --no-deps $(TORCHREC)
	touch $@

.venv/.installed-test: .venv/.installed
	$(BIN)/pip install --quiet --editable '.[cpu,test]'
	touch $@

# mamba-ssm is built without its CUDA extensions: only its Triton kernels are used.
install-cuda:
	$(PYTHON) -m venv .venv
	$(BIN)/pip uninstall --quiet --yes fbgemm-gpu-cpu
	$(BIN)/pip install --quiet $(TORCH)
	$(BIN)/pip install --quiet --editable '.[cuda]'
	$(BIN)/pip install --quiet --no-deps $(TORCHREC)
	MAMBA_FORCE_BUILD=TRUE MAMBA_SKIP_CUDA_BUILD=TRUE $(BIN)/pip install --quiet --no-deps \
		--no-build-isolation mamba-ssm==2.3.2.post1
	$(BIN)/python -m tools.check_env
	touch .venv/.installed

demo: install
	rm -rf $(DEMO)/run $(DEMO)/bundle $(DEMO)/scores
	$(BIN)/python -m tools.fetch_movielens output=$(DEMO)/movielens
	$(BIN)/python -m tools.convert_logs input=$(DEMO)/movielens/ratings.parquet \
		output=$(DEMO)/data overwrite=true
	OMP_NUM_THREADS=1 $(BIN)/torchrun --nproc_per_node=2 trainer/main.py experiment=demo
	$(BIN)/python -m trainer.export checkpoint=$(DEMO)/run output=$(DEMO)/bundle
	$(BIN)/python -m tools.score_histories bundle=$(DEMO)/bundle input=$(DEMO)/data \
		output=$(DEMO)/scores k=20
	$(BIN)/python -m tools.show_recommendations scores=$(DEMO)/scores histories=$(DEMO)/data \
		items=$(DEMO)/movielens/items.parquet users=3

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not gpu" -n 2 --dist loadfile

lint: .venv/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# On a machine with a GPU, after `make install-cuda`.
test-gpu: .venv/.installed-test
	$(BIN)/python -m pytest -m gpu

# Where there is Java 17: engine=spark of tools.convert_logs beside engine=duckdb.
test-spark: .venv/.installed-test
	$(BIN)/pip install --quiet --editable '.[spark]'
	$(BIN)/python -m pytest tests/tools/test_convert_spark.py

clean:
	rm -rf .venv runs
