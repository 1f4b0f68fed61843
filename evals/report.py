"""report.html: what was trained, how it went, what the result can do; one self-contained file."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from evals import page
from evals.ablation import read_result
from evals.ablation import table as ablation_table
from evals.ablation_plot import figure as ablation_figure
from evals.cli import EvalError
from evals.grid import Grid
from evals.layer_plots import LAST_STEPS as HEATMAP_STEPS
from evals.layer_plots import expert_heatmap, expert_loads, layer_figure
from evals.plots import curve_figure, data_uri, loss_figure
from evals.results import read_results
from evals.runs import LAST_STEPS, Run, read_run
from evals.tasks import TASKS, Result, Table, Task, load_task

MISSING = "-"
# a figure that is not read at half the width of the page: times as wide as high, or inches
WIDE, WIDEST = 2.5, 10.0
CURVES = (
    ("grad_norm", "gradient norm", "Gradient norm over all parameters, before clipping."),
    ("lr", "learning rate", "Learning rate of the step, as the schedule gives it."),
    ("tokens_per_second", "tokens per second", "Tokens of an update over its wall time, all ranks together."),
    ("next_sentence_loss", "next-sentence loss", "Nats per pair of texts: does the second follow the first?"),
    ("next_sentence_accuracy", "next-sentence accuracy", "Share of the pairs that are told right; chance is one half."),
)


def write_report(args: argparse.Namespace) -> int:
    """The command. Raises EvalError, ConfigError or CheckpointError before anything is written."""
    if not args.run and not args.eval and not args.ablation:
        raise EvalError(
            "report: nothing to show; give run folders with --run, folders of results with --eval, or of ablations "
            "with --ablation"
        )
    runs = [read_run(folder) for folder in args.run]
    results = by_task([read_results(folder) for folder in args.eval])
    ablations = [read_result(folder) for folder in args.ablation]
    flags = ("run", "eval", "ablation")
    words = [word for flag in flags if getattr(args, flag) for word in (f"--{flag}", *getattr(args, flag))]
    this = shlex.join(["python", "-m", "evals", "report", *map(str, words), "--output", str(args.output)])
    title = f"Training report: {', '.join(run.config.phase.name for run in runs)}" if runs else "Evaluation report"
    body = [page.heading(title, 1)]
    if runs:
        body += [
            page.paragraph(lead(runs), "lead"),
            page.pair(summary_section(runs), loss_section(runs)),
            *curves_section(runs),
            *layers_section(runs),
            *experts_section(runs),
        ]
    body += [part for task, found in results.items() for part in task_sections(task, found)]
    body += [part for ablation in ablations for part in ablation_section(ablation)]
    body += [*missing_section(runs, results), *commands_section(runs, this)]
    try:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(page.page(title, body), encoding="utf-8")
    except OSError as error:
        raise EvalError(f"--output {args.output}: cannot be written ({error.strerror}); give another file") from error
    print(f"report: {args.output}")
    return 0


def by_task(read: Sequence[Mapping[str, Result]]) -> dict[str, dict[str, Result]]:
    """Task -> name of the checkpoint -> result, in the order of the tasks and folders."""
    found: dict[str, list[tuple[str, Result]]] = {}
    for task in TASKS:
        for results in read:
            if task in results:
                result = results[task]
                name = f"{result['phase']}, step {result['step']:,}" + (", PARTIAL" if result.get("partial") else "")
                found.setdefault(task, []).append((name, result))
    return {task: distinct(named) for task, named in found.items()}


def distinct(named: Sequence[tuple[str, Result]]) -> dict[str, Result]:
    """Where names are the same, the run folders tell the results apart, and where these are, numbers."""
    names = [name for name, _ in named]
    if len(set(names)) < len(names):
        names = [f"{name}, {Path(result['checkpoint']).parent.parent.name}" for name, result in named]
    found: dict[str, Result] = {}
    for name, (_, result) in zip(names, named, strict=True):
        found[f"{name} ({len(found) + 1})" if name in found else name] = result
    return found


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


def loss_section(runs: Sequence[Run]) -> list[str]:
    """Training and validation loss."""
    entropy = runs[-1].unigram_entropy
    caption = (
        "Training loss of every step and validation loss on fixed rows and masks, over the tokens seen. Vertical "
        "lines: a new phase begins; above it its name and sequence length."
    )
    if entropy is not None:
        caption += " Dotted: unigram entropy of the validation corpus."
    if any(run.switch for run in runs):
        caption += " Dashed: the MoBA layers change to full attention."
    return [
        page.heading("Training"),
        page.picture(data_uri(loss_figure(runs, entropy)), "training and validation loss", caption),
    ]


def curves_section(runs: Sequence[Run]) -> list[str]:
    """What else metrics.jsonl tells of every step."""
    told = [curve for curve in CURVES if any(curve[0] in entry for run in runs for entry in run.steps)]
    return [
        page.row([page.picture(data_uri(curve_figure(runs, key, label)), label, text) for key, label, text in told])
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
        page.row(
            [
                page.picture(data_uri(expert_heatmap(mixed[-1])), "load of every expert of every layer", heat),
                page.picture(data_uri(layer_figure(runs, "kl_to_uniform", "KL to uniform, nats")), "KL", kl_text),
                page.picture(
                    data_uri(layer_figure(runs, "max_violation", "max violation")), "max violation", violation_text
                ),
            ]
        ),
    ]


def task_sections(task: str, results: Mapping[str, Result]) -> list[str]:
    """All results of one task; where there are several, first what compares them, then each, side by side where
    figures allow it."""
    module = load_task(task)
    if len(results) == 1:
        (result,) = results.values()
        figure, table, wide = task_parts(module, result)
        return [page.heading(module.TITLE), *([*figure, *table] if wide else [page.pair(figure, table)])]
    parts = [page.heading(f"{module.TITLE}: checkpoints compared")]
    compare = getattr(module, "compare", None)
    if compare:
        drawn, lines = compare(results)
        parts.append(page.pair([page.picture(data_uri(drawn), TASKS[task].about, "")], [page.table(lines)]))
    columns, stacked = [], False
    for name, result in results.items():
        figure, table, wide = task_parts(module, result)
        columns.append([page.heading(f"{module.TITLE}: {name}", 3), *figure, *table])
        stacked |= wide
    return [*parts, *(["\n".join(column) for column in columns] if stacked else [page.pair(*columns)])]


def task_parts(module: Task, result: Result) -> tuple[list[str], list[str], bool]:
    """(figure, table with origin and command, whether the figure wants a line of its own) of one result."""
    origin = f"Checkpoint {result['checkpoint']}, {result['seconds']:.0f} s on {result['device']} in {result['dtype']}."
    partial = result.get("partial")
    warning = f"PARTIAL: only the first {partial} samples of each set; not to be compared with whole runs."
    drawn = module.figure(result)
    width, height = drawn.get_size_inches()
    wide = bool(width > WIDE * height or width > WIDEST)
    figure = page.picture(data_uri(drawn), TASKS[result["task"]].about, module.caption(result))
    table = [page.table(module.table(result)), page.paragraph(origin, "note"), page.command(result["command"])]
    return (
        [page.wide(figure) if wide else figure],
        ([page.paragraph(warning, "warning")] if partial else []) + table,
        wide,
    )


def ablation_section(result: Mapping[str, Any]) -> list[str]:
    """The picture and the table of models that were trained alike but for one thing."""
    metrics = [Grid.Metric(**entry) for entry in result["metrics"]]
    many = len(result["seeds"])
    caption = (
        f"Validation loss in training, then every number of the table by arm: a dot for each of {many} seed"
        f"{'s' * (many > 1)}, a line for their mean; chance dashed. ±: standard deviation over seeds."
    )
    command = shlex.join(["python", "-m", "evals", *result["command"]])
    return [
        page.heading(f"Ablation: {result['grid']}, {result['size']}"),
        page.wide(page.picture(data_uri(ablation_figure(result)), result["question"], caption)),
        page.table(ablation_table(result["arms"], metrics)),
        page.command(command),
    ]


def missing_section(runs: Sequence[Run], results: Mapping[str, object]) -> list[str]:
    """Says which tasks have no result of the last run, and how to make one."""
    encoder_decoder = bool(runs and runs[-1].config.model.num_decoder_layers)
    usual = [name for name, task in TASKS.items() if (task.encoder_decoder if encoder_decoder else task.usual)]
    missing = [name for name in usual if name not in results]
    if not missing or not runs:
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
    training = [page.paragraph(text), page.command("\n".join(lines))] if lines else []
    return [page.heading("Reproduce"), *training, page.paragraph("This report:"), page.command(this)]


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
