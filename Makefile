# Each target does its own set-up in .venv. A fresh machine needs Python 3.11 or newer and the package registries.
PYTHON ?= python3
STEPS ?= all
export OMP_NUM_THREADS ?= 1

.PHONY: quickstart corpus test test-full check bench bench-gpu clean

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --disable-pip-version-check -r requirements.txt
	touch .venv/ready

quickstart: .venv/ready  ## corpus, tokenizer, three phases on 4 CPU ranks, evaluation, report
	.venv/bin/python launch/quickstart.py --steps $(STEPS)

corpus: .venv/ready  ## the standard library's text as a 30k WordPiece corpus in runs/corpus, for phase1-3.json
	.venv/bin/python -m data_tools.sample_corpus --output runs/corpus/text
	.venv/bin/python -m data_tools.train_tokenizer --input runs/corpus/text/train --output runs/corpus/tokenizer
	for part in train validation; do .venv/bin/python -m data_tools.tokenize_corpus --input runs/corpus/text/$$part \
	    --tokenizer runs/corpus/tokenizer --output runs/corpus/$$part || exit 1; done

test: .venv/ready  ## what a change must pass
	.venv/bin/python -m pytest -m "not full and not gpu"

test-full: .venv/ready  ## everything that runs without a GPU; hours
	.venv/bin/python -m pytest -m "not gpu"

check: .venv/ready  ## style and types
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

bench: .venv/ready  ## benchmarks of this machine; run nothing else meanwhile
	.venv/bin/python -m evals bench attention
	.venv/bin/python -m evals bench prepare
	.venv/bin/python -m evals bench loader
	.venv/bin/python -m evals bench moe
	$(MAKE) runs/bench/corpus
	.venv/bin/python -m evals ablation three_way --output runs/bench/three_way

runs/bench/corpus: .venv/ready  # of the standard library's text, for the comparison of models
	.venv/bin/python -m data_tools.sample_corpus --output $@.writing/text
	.venv/bin/python -m data_tools.train_tokenizer --input $@.writing/text/train --output $@.writing/tokenizer \
	    --vocab_size 8192
	for part in train validation; do .venv/bin/python -m data_tools.tokenize_corpus --input $@.writing/text/$$part \
	    --tokenizer $@.writing/tokenizer --output $@.writing/$$part || exit 1; done
	mv $@.writing $@

bench-gpu:  ## 25 minutes on a GPU with this machine's own Python, whose torch has CUDA: tests, attention, MFU, retrieval
	$(PYTHON) -m evals bench gpu --output runs/bench-gpu

clean:  ## caches; never runs/
	find . -name __pycache__ -not -path "./.venv/*" -prune -exec rm -rf {} +
	rm -rf .pytest_cache .hypothesis .mypy_cache .ruff_cache
