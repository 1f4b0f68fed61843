"""report.html: what was trained, how it went, what the result can do; one self-contained file."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable, Sequence

from evals import page
from evals.cli import EvalError
from evals.layer_plots import LAST_STEPS as HEATMAP_STEPS
from evals.layer_plots import expert_heatmap, expert_loads, layer_figure
from evals.plots import curve_figure, data_uri, loss_figure
from evals.results import read_results
from evals.runs import LAST_STEPS, Run, read_run
from evals.tasks import TASKS, Result, Table, load_task

MISSING = "-"
CURVES = (
    ("grad_norm", "gradient norm", "Gradient norm over all parameters, before clipping."),
    ("lr", "learning rate", "Learning rate of the step, as the schedule gives it."),
    ("tokens_per_second", "tokens per second", "Tokens of an update over its wall time, all ranks together."),
)


def write_report(args: argparse.Namespace) -> int:
    """The command. Raises EvalError, ConfigError or CheckpointError before anything is written."""
    runs = [read_run(folder) for folder in args.run]
    read = [read_results(folder) for folder in args.eval]
    results = [found[task] for task in TASKS for found in read if task in found]
    words = ["report", "--run", *map(str, args.run), *(["--eval", *map(str, args.eval)] if args.eval else [])]
    this = shlex.join(["python", "-m", "evals", *words, "--output", str(args.output)])
    phases = ", ".join(run.config.phase.name for run in runs)
    body = [
        page.heading(f"Training report: {phases}", 1),
        page.paragraph(lead(runs), "lead"),
        *summary_section(runs),
        *curves_section(runs),
        *layers_section(runs),
        *experts_section(runs),
        *(part for result in results for part in task_section(result, alone=len(read) == 1)),
        *missing_section(runs, results),
        *commands_section(runs, this),
    ]
    try:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(page.page(f"Training report: {phases}", body), encoding="utf-8")
    except OSError as error:
        raise EvalError(f"--output {args.output}: cannot be written ({error.strerror}); give another file") from error
    print(f"report: {args.output}")
    return 0


def lead(runs: Sequence[Run]) -> str:
    """The result in two sentences."""
    last = runs[-1]
    tokens, seconds = sum(run.tokens for run in runs), sum(run.seconds for run in runs)
    size = f"A {'masked' if last.config.model.objective == 'mlm' else 'causal'} language model"
    if last.parameters:
        size += f" of {last.parameters:,} parameters"
    text = f"{size}, trained on {tokens:,} tokens in {duration(seconds)} over {len(runs)} phase"
    text += ". " if len(runs) == 1 else "s. "
    loss, entropy = last.validation_loss, last.unigram_entropy
    if loss is None:
        return text + f"The training loss ends at {last.final_loss:.3f} nats per token."
    text += f"The validation loss ends at {loss:.3f} nats per token"
    if entropy is None:
        return text + "."
    side = "below" if loss < entropy else "above"
    return text + f", {abs(entropy - loss):.3f} {side} the unigram entropy of its corpus, {entropy:.3f}."


def summary_section(runs: Sequence[Run]) -> list[str]:
    """One column per phase."""

    def line(label: str, value: Callable[[Run], str]) -> list[str]:
        return [label, *(value(run) for run in runs)]

    lines: Table = [
        line("", lambda r: r.config.phase.name),
        line("steps", lambda r: f"{len(r.steps):,}"),
        line("tokens", lambda r: f"{r.tokens:,}"),
        line("tokens per update", lambda r: f"{r.config.phase.tokens_per_update:,}"),
        line("sequence length", lambda r: f"{r.config.phase.sequence_length:,}"),
        line("parameters", lambda r: optional(r.parameters, ",")),
        line("steps with full attention", lambda r: f"{100 * r.full_share:.0f} %"),
        line("layout", layout),
        line("peak learning rate", lambda r: f"{r.config.phase.learning_rate:.1e}"),
        line("training loss, final", lambda r: f"{r.final_loss:.3f}"),
        line("validation loss, last", lambda r: optional(r.validation_loss, ".3f")),
        line("unigram entropy", lambda r: optional(r.unigram_entropy, ".3f")),
        line("tokens per second, median", lambda r: f"{r.tokens_per_second:,.0f}"),
        line("wall time of the steps", lambda r: duration(r.seconds)),
    ]
    note = (
        f"Losses in nats per token. Final: mean of the last {LAST_STEPS} steps; validation: fixed rows and masks at "
        "the phase's own sequence length. Unigram entropy: of the validation corpus (training corpus if there is "
        "none), the loss of a model that knows only how frequent each token is. Parameters: shapes in the newest "
        "checkpoint, padding not counted. Wall time: sum of step_seconds, without start, validation and checkpoints. "
        "All from config.json, metrics.jsonl and the newest checkpoint of each run folder."
    )
    return [page.heading("Summary"), page.table(lines), page.paragraph(note, "note")]


def curves_section(runs: Sequence[Run]) -> list[str]:
    """Loss, and what else metrics.jsonl tells of every step."""
    entropy = runs[-1].unigram_entropy
    caption = (
        "Training loss of every step and validation loss on fixed rows and masks, over the tokens seen. Vertical "
        "lines: a new phase begins; above it its name and sequence length."
    )
    if entropy is not None:
        caption += " Dotted: unigram entropy of the validation corpus."
    if any(run.switch for run in runs):
        caption += " Dashed: the MoBA layers change to full attention."
    rest = [page.picture(data_uri(curve_figure(runs, key, label)), label, text) for key, label, text in CURVES]
    return [
        page.heading("Training"),
        page.picture(data_uri(loss_figure(runs, entropy)), "training and validation loss", caption),
        page.row(rest),
    ]


def layers_section(runs: Sequence[Run]) -> list[str]:
    """What metrics.jsonl tells of every layer; nothing for runs of an older version."""
    if not any("layer_grad_norms" in entry for run in runs for entry in run.steps):
        return []
    figures = (
        ("layer_grad_norms", "gradient norm of a layer", "Gradient norm of every layer, before clipping.", True),
        ("activation_rms", "activations, root mean square", "Size of the residual stream after every layer.", False),
    )
    lines = "Orange: the first layer, blue: the last."
    return [
        page.heading("Layers"),
        page.row(
            [
                page.picture(data_uri(layer_figure(runs, key, label, logarithmic=log)), label, f"{text} {lines}")
                for key, label, text, log in figures
            ]
        ),
    ]


def experts_section(runs: Sequence[Run]) -> list[str]:
    """How evenly the experts are used; nothing where no run has any."""
    mixed = [run for run in runs if run.steps[-1].get("tokens_per_expert")]
    if not mixed:
        return []
    last, together = mixed[-1].steps[-1], float(expert_loads(mixed[-1]).max()) - 1
    text = (
        f"At the last step of {mixed[-1].config.phase.name} the max violation, choices of the busiest expert over "
        f"the mean minus 1, of the least even layer is {max(last['max_violation']):.2f}; over the last "
        f"{HEATMAP_STEPS} steps together it is {together:.2f}. The largest divergence from an even distribution is "
        f"{max(last['kl_to_uniform']):.4f} nats. {last['dropped_choices']:,} choices were dropped, "
        f"{last['rerouted_choices']:,} went to another expert than the router's first ones."
    )
    heat = f"Router's choices of every expert over the last {HEATMAP_STEPS} steps; 1 is a fair share."
    kl_text = "Divergence of the router's choices from an even distribution, layer by layer; 0 is perfect balance."
    violation_text = "Choices of the busiest expert of each layer over the mean, minus 1."
    return [
        page.heading("Experts"),
        page.paragraph(text),
        page.picture(data_uri(expert_heatmap(mixed[-1])), "load of every expert of every layer", heat),
        page.row(
            [
                page.picture(data_uri(layer_figure(runs, "kl_to_uniform", "KL to uniform, nats")), "KL", kl_text),
                page.picture(
                    data_uri(layer_figure(runs, "max_violation", "max violation")), "max violation", violation_text
                ),
            ]
        ),
    ]


def task_section(result: Result, *, alone: bool) -> list[str]:
    """Figure, table and command of one result; its checkpoint is in the heading unless it is `alone`."""
    module = load_task(result["task"])
    title = module.TITLE if alone else f"{module.TITLE}: {result['phase']}, step {result['step']:,}"
    origin = f"Checkpoint {result['checkpoint']}, {result['seconds']:.0f} s on {result['device']} in {result['dtype']}."
    return [
        page.heading(title),
        page.picture(data_uri(module.figure(result)), TASKS[result["task"]][1], module.caption(result)),
        page.table(module.table(result)),
        page.paragraph(origin, "note"),
        page.command(result["command"]),
    ]


def missing_section(runs: Sequence[Run], results: Sequence[Result]) -> list[str]:
    """Says which tasks have no result, and how to make one."""
    missing = [task for task in TASKS if task not in {result["task"] for result in results}]
    if not missing:
        return []
    text = f"No result of {', '.join(missing)} was given. Make it, then make this report again with --eval EVAL:"
    run = ["python", "-m", "evals", "run", "--tasks", ",".join(missing), "--checkpoint", str(runs[-1].folder)]
    line = shlex.join([*run, "--output", "EVAL"])
    return [page.heading("Not evaluated"), page.paragraph(text), page.command(line)]


def commands_section(runs: Sequence[Run], this: str) -> list[str]:
    """How to do it all again."""
    lines = []
    for before, run in zip([None, *runs], runs, strict=False):
        words = ["deepspeed", "--num_gpus", str(run.world_size or 1), "launch/pretrain.py"]
        words += ["--ds_config", f"{run.folder}/config.json", "--output_dir", f"AGAIN/{run.config.phase.name}"]
        words += ["--init_from", f"AGAIN/{before.config.phase.name}"] if before else []
        lines.append(shlex.join(words))
    text = "Training, from the resolved configurations, where each phase starts from the weights of the one before:"
    return [
        page.heading("Reproduce"),
        page.paragraph(text),
        page.command("\n".join(lines)),
        page.paragraph("This report:"),
        page.command(this),
    ]


def layout(run: Run) -> str:
    """Ranks along the axes, and the ZeRO stage."""
    parallel = run.config.parallel
    sizes = {
        "tp": parallel.tensor_model_parallel_size,
        "pp": parallel.pipeline_model_parallel_size,
        "cp": parallel.context_parallel_size,
        "ep": parallel.expert_model_parallel_size,
    }
    if run.world_size:
        sizes["dp"] = run.world_size // (sizes["tp"] * sizes["pp"] * sizes["cp"])
    axes = [f"{axis} {size}" for axis, size in sizes.items() if size > 1]
    return ", ".join([" x ".join(axes) or "one rank", f"ZeRO-{run.config.zero_stage}"])


def optional(value: float | None, form: str) -> str:
    """A number, or a dash where it is not known."""
    return MISSING if value is None else format(value, form)


def duration(seconds: float) -> str:
    """As 4 s, 2:03 min or 1:02:03 h."""
    whole = round(seconds)
    hours, rest = divmod(whole, 3600)
    if whole < 60:
        return f"{whole} s"
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d} h" if hours else f"{rest // 60}:{rest % 60:02d} min"
