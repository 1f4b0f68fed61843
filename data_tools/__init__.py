"""Commands that turn text into token shards: `python -m data_tools.COMMAND --help`.

sample_corpus -> train_tokenizer -> tokenize_corpus -> verify_shards, inspect_shards. Each may be interrupted and run
again. Heavy libraries are imported when a command works, so that `--help` answers at once.
"""
