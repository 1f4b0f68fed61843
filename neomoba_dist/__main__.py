"""`neomoba`, or `python -m neomoba_dist`: every command of the project under one name.

    neomoba pretrain --ds_config ds_configs/phase1.json
    neomoba data tokenize_corpus --help

Each is a module of its own and can be started by itself, which launchers of several processes want:
`deepspeed --num_gpus 8 launch/pretrain.py ...`.
"""

import runpy
import sys
from collections.abc import Collection, Sequence
from typing import NoReturn

from neomoba_dist import completion
from neomoba_dist.errors import MISTAKE

COMMANDS = {
    "pretrain": ("launch.pretrain", "train one phase"),
    "finetune": ("launch.finetune", "fine-tune a checkpoint on tasks or pairs of texts"),
    "distill": ("launch.distill", "train a smaller model by a larger one"),
    "compress": ("launch.compress", "prune a model, and measure it in int8 on a CPU"),
    "generate": ("launch.generate", "continue texts with a causal model"),
    "convert": ("launch.convert", "look into checkpoints, merge, translate and foretell them"),
    "plan": ("launch.plan", "memory, bytes and time of a phase on many GPUs, and the best layouts"),
    "quickstart": ("launch.quickstart", "from text to report in minutes, on four CPU ranks"),
    "evals": ("evals", "evaluate checkpoints, measure speed, compare models"),
    "data": ("data_tools", "make token shards of text"),
}
DATA = (
    "fetch", "clean", "sample_corpus", "passkeys", "train_tokenizer", "tokenize_corpus", "tokenize_chat", "index",
    "plan_rows", "verify_shards", "inspect_shards",
)  # fmt: skip


def usage() -> str:
    """All commands, a line each."""
    lines = [f"  neomoba {name:11} {about}" for name, (_, about) in COMMANDS.items()]
    return "\n".join(["usage: neomoba COMMAND ...", "", *lines, "", f"neomoba data: {', '.join(DATA)}"])


def names_after(words: Sequence[str]) -> Collection[str] | None:
    """What may follow some words; None where they name a command, whose flags follow."""
    if not words:
        return COMMANDS
    if list(words) == ["data"]:
        return DATA
    if words[0] == "evals":
        from evals.__main__ import names_after as evals_names_after

        return evals_names_after(words[1:])
    return None


def main() -> None:
    """Run the command that the first word names, as if its module had been started."""
    if completion.asked():
        completion.answer(names_after)
    words = sys.argv[1:]
    asked = words[1:] if words[:1] == ["data"] else words
    if not asked or asked[0] in ("-h", "--help"):
        print(usage())
        return
    name, rest = words[0], words[1:]
    if name not in COMMANDS:
        refuse(f"{name}: no such command; choose from: {', '.join(COMMANDS)}")
    module = COMMANDS[name][0]
    if name == "data":
        if rest[0] not in DATA:
            refuse(f"data {rest[0]}: no such command; choose from: {', '.join(DATA)}")
        module, rest = f"{module}.{rest[0]}", rest[1:]
    sys.argv = [f"neomoba {name}", *rest]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def refuse(problem: str) -> NoReturn:
    """End with one line and the code of a mistake."""
    print(f"error: {problem}", file=sys.stderr)
    sys.exit(MISTAKE)


if __name__ == "__main__":
    main()
