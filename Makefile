# Each target does its own set-up in .venv. A fresh machine needs Python 3.11 or newer and the package registries.
PYTHON ?= python3
STEPS ?= all
export OMP_NUM_THREADS ?= 1
# two workers, each with whole files: many tests wait for ranks, launchers and time limits
PYTEST = .venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: quickstart corpus test test-full check bench bench-gpu gpu-wheels bench-corpora ablations cluster-configs clean

.venv/ready: requirements.txt requirements-dev.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --disable-pip-version-check -r requirements.txt -r requirements-dev.txt
	touch .venv/ready

quickstart: .venv/ready  ## corpus, tokenizer, three phases on 4 CPU ranks, evaluation, report
	.venv/bin/python launch/quickstart.py --steps $(STEPS)

corpus: .venv/ready  ## the standard library's text as a 30k WordPiece corpus in runs/corpus, for phase1-3.json
	.venv/bin/python -m data_tools.sample_corpus --output runs/corpus/text
	.venv/bin/python -m data_tools.train_tokenizer --input runs/corpus/text/train --output runs/corpus/tokenizer
	for part in train validation; do .venv/bin/python -m data_tools.tokenize_corpus --input runs/corpus/text/$$part \
	    --tokenizer runs/corpus/tokenizer --output runs/corpus/$$part || exit 1; done

test: .venv/ready  ## what a change must pass
	$(PYTEST) -m "not full and not gpu"

test-full: .venv/ready  ## everything that runs without a GPU; hours
	$(PYTEST) -m "not gpu"

check: .venv/ready  ## style and types
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

# four layers of phase 1 and a seventh of its vocabulary
cpu_step = --ds-config ds_configs/phase1.json --micro-batches 2 --set bf16.enabled=false \
    train_micro_batch_size_per_gpu=1 neomoba.model.num_hidden_layers=4 neomoba.model.vocab_size=4352

bench: .venv/ready  ## benchmarks of this machine; run nothing else meanwhile
	.venv/bin/python -m evals bench attention
	.venv/bin/python -m evals bench prepare
	.venv/bin/python -m evals bench loader
	.venv/bin/python -m evals bench moe
	.venv/bin/python -m evals bench decoding
	.venv/bin/python -m evals bench train_step --peer plain $(cpu_step)
	.venv/bin/python -m evals bench train_step --peer hf $(cpu_step)
	.venv/bin/python -m evals bench layouts $(cpu_step)
	.venv/bin/python -m evals bench checkpoint

cluster-configs: .venv/ready  ## the phases for 1, 8, 64 and 256 GPUs of 80 GiB as the planner lays them out, with what it says
	for phase in phase1 phase2 phase3; do for gpus in 1 8 64 256; do \
	    .venv/bin/python launch/plan.py --ds_config ds_configs/$$phase.json --gpus $$gpus --list 3 \
	    --write ds_configs/cluster/$${phase}_$$gpus.json > ds_configs/cluster/$${phase}_$$gpus.txt || exit 1; done; done

bench-corpora: runs/bench/corpus runs/bench/subwords runs/bench/passkeys  ## what the ablations of the tiny size train on

ablations: bench-corpora  ## every comparison of models at its tiny size; hours
	for name in $(notdir $(basename $(wildcard ds_configs/ablations/*.json))); do \
	    .venv/bin/python -m evals ablation $$name --output runs/bench/$$name || exit 1; done

runs/bench/corpus: .venv/ready  # of the standard library's text
	.venv/bin/python -m data_tools.sample_corpus --output $@.writing/text
	$(call tokenized,$@.writing/text,8192)

runs/bench/subwords: runs/bench/corpus  # the same text in shorter pieces: a small model's weights are not in its embedding
	$(call tokenized,runs/bench/corpus/text,1024)

# $(call tokenized,TEXT,VOCABULARY)
define tokenized
	.venv/bin/python -m data_tools.train_tokenizer --input $(1)/train --output $@.writing/tokenizer --vocab_size $(2)
	for part in train validation; do .venv/bin/python -m data_tools.tokenize_corpus --input $(1)/$$part \
	    --tokenizer $@.writing/tokenizer --output $@.writing/$$part || exit 1; done
	mv $@.writing $@
endef

runs/bench/passkeys: .venv/ready  # made-up words with a passkey, for the needle task
	$(call passkeys,short,4 40,1,20000,2)
	.venv/bin/python -m data_tools.train_tokenizer --input $@.writing/short.text --output $@.writing/tokenizer \
	    --vocab_size 512
	$(call passkeys,middle,4 200,2,6000,2)
	$(call passkeys,long,40 1900,3,5000,2)
	$(call passkeys,validation,1000 2000,4,100,0)
	for name in short middle long validation; do .venv/bin/python -m data_tools.tokenize_corpus \
	    --input $@.writing/$$name.text --tokenizer $@.writing/tokenizer --output $@.writing/$$name || exit 1; done
	mv $@.writing $@

# $(call passkeys,NAME,WORDS,SEED,DOCUMENTS,DIGITS)
passkeys = .venv/bin/python -m data_tools.passkeys --output $@.writing/$(1).text --words $(2) --seed $(3) \
	    --documents $(4) --copies 6 --digits $(5)

bench-gpu:  ## 19 minutes on a GPU with this machine's own Python, whose torch has CUDA: attention, experts, MFU, tests, retrieval
	$(PYTHON) -m evals bench gpu --output runs/bench-gpu

gpu-wheels: .venv/ready  ## what training needs on a GPU machine without a registry, with install.sh, in runs/gpu-wheels
	sh launch/gpu_wheels.sh runs/gpu-wheels libraries

clean:  ## caches; never runs/
	find . -name __pycache__ -not -path "./.venv/*" -prune -exec rm -rf {} +
	rm -rf .pytest_cache .hypothesis .mypy_cache .ruff_cache
