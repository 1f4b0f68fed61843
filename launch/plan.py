"""What a phase would need on so many GPUs, without any: memory, bytes, time, and the layouts that should be best.

python launch/plan.py --ds_config ds_configs/phase3.json --gpus 64 --gpu_memory 80
python launch/plan.py --ds_config ds_configs/scale_70b.json --gpus 1024 --build
python launch/plan.py --ds_config ds_configs/phase1.json --gpus 8 --write my_phase1.json
python launch/plan.py --ds_config ds_configs/distill.json --teacher runs/phase3 --gpus 8

Memory is that of the fullest rank, uncompiled. Times follow from the stated rates and from nothing measured: read them
as an order among layouts. docs/planner.md says what they count.
"""

import argparse
import json
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # as in the other launch files

from launch.pretrain import command_parser
from neomoba_dist.config import Config, ConfigError, load_config
from neomoba_dist.errors import exit_code_of

if TYPE_CHECKING:
    from neomoba_dist.train.distill_plan import PlannedTeacher
    from neomoba_dist.train.planner import Layout, Planner

GIB = 2**30
RATES = (
    ("gpus_per_machine", 8, "GPUs that NVLink joins"),
    ("tflops", 989.0, "of a GPU in the compute dtype, dense"),
    ("tf32_tflops", 495.0, "of a GPU in TF32, in which Muon's products are if neomoba.phase.allow_tf32"),
    ("fp32_tflops", 67.0, "of a GPU in float32, in which they are else"),
    ("kernel_share", 0.5, "part of it that compiled layers reach"),
    ("nvlink", 450.0, "GB/s that a GPU receives from its machine"),
    ("network", 50.0, "GB/s that a GPU receives from other machines"),
)


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser, add = command_parser(__doc__)
    add("ds_config", required=True, metavar="FILE", help="JSON of a phase")
    add("set", nargs="+", action="extend", default=[], metavar="PATH.TO.KEY=VALUE", help="override keys of the JSON")
    add("teacher", metavar="DIR", help="of a student, as with launch/distill.py: a run or checkpoint, or of the hub")
    add("gpus", required=True, type=int, metavar="N", help="number of ranks")
    add("gpu_memory", type=float, default=80.0, metavar="GIB", help="of a GPU (default: 80)")
    add(
        "reserve",
        type=float,
        default=0.1,  # planner.RESERVE, without importing it
        metavar="PART",
        help="of it for what is not counted: CUDA, NCCL, gaps (default: 0.1)",
    )
    add("list", type=int, default=5, metavar="N", help="how many layouts to propose (default: 5)")
    add("json", action="store_true", help="print everything as JSON")
    add("write", metavar="FILE", help="write the phase with the first proposal as a JSON for launch/pretrain.py")
    add(
        "build",
        action="store_true",
        help="build every kind of rank of the layout that the JSON names, on the meta device",
    )
    for name, default, what in RATES:
        add(name, type=type(default), default=default, metavar="X", help=f"{what} (default: {default:g})")
    return parser.parse_args(arguments)


def table(named: list[tuple[str, "Layout"]]) -> list[str]:
    """A line for each layout: memory in GiB by part, then time."""
    width = max(len(layout.axes) for _, layout in named)
    parts = ("weights", "grads", "optim", "activ", "buffers", "total")
    lines = [
        f"{'GiB':9}{'':{width}}{''.join(f'{part:>9}' for part in parts)}"
        f"{'s/step':>10}{'tokens/s':>13}{'MFU':>7}{'idle':>7}"
    ]
    for name, layout in named:
        memory, step = layout.memory, layout.step
        sizes = (*asdict(memory).values(), memory.total)
        lines.append(
            f"{name:9}{layout.axes:{width}}{''.join(f'{size / GIB:9.2f}' for size in sizes)}{step.seconds:10.3g}"
            f"{layout.plan.tokens_per_update / step.seconds:13,.0f}{100 * step.mfu:6.1f}%{100 * step.bubble:6.1f}%"
        )
    return lines


def traffic(layout: "Layout") -> str:
    """What a rank receives in a step, by axis, with the seconds at the stated rates."""
    step = layout.step
    moved = [
        f"{axis} {received / 1e9:.3g} GB in {step.communication[axis]:.2g} s"
        for axis, received in step.received.items()
        if received
    ]
    return f"a rank computes {step.compute:.3g} s and receives: {', '.join(moved) or 'nothing'}"


def teacher_of(config: Config) -> "PlannedTeacher | None":
    """The model that `neomoba.distill.teacher` names. Raises ConfigError."""
    if config.distill.teacher is None:
        return None
    from neomoba_dist.checkpoint.hf import open_checkpoint
    from neomoba_dist.checkpoint.layout import CheckpointError
    from neomoba_dist.train.distill_plan import PlannedTeacher

    try:
        taught_by = open_checkpoint(config.distill.teacher).config
    except CheckpointError as error:
        raise ConfigError(
            f"neomoba.distill.teacher: {error}; name one with --teacher, or plan the student alone with "
            "--set neomoba.distill.teacher=null"
        ) from error
    return PlannedTeacher(replace(taught_by, source=f"--teacher {config.distill.teacher}"))


def teacher(layout: "Layout") -> list[str]:
    """What the teacher costs, where there is one."""
    beside, flops = layout.teacher, layout.step.teacher_flops
    if not flops:
        return []
    return [
        f"teacher: {flops / 1e15:.3g} PFLOP an update, {beside.weights / GIB:.2g} GiB of weights and "
        f"{(beside.kept + beside.passing) / GIB:.2g} GiB of its states and logits on the fullest rank"
    ]


def muon(layout: "Layout") -> list[str]:
    """What Muon's whole matrices cost, where it is the optimizer."""
    step, held = layout.step, layout.muon_memory / GIB
    if layout.config.phase.optimizer != "muon":
        return []
    return [
        f"Muon: a rank makes matrices orthogonal by {step.muon_flops / 1e12:.3g} TFLOP in {step.muon:.2g} s a step, "
        f"and holds {held:.2g} GiB for it"
    ]


def build(planner: "Planner", config: Config) -> str:
    """Every kind of rank of the layout, made on the meta device."""
    began, sizes = time.perf_counter(), planner.build(config)
    few, many = min(sizes.values()), max(sizes.values())
    return (
        f"built {len(sizes)} kinds of rank of {planner.world_size} in {time.perf_counter() - began:.1f} s: "
        f"{few:,} to {many:,} parameters each"
    )


def as_json(layout: "Layout") -> dict[str, Any]:
    """All of a layout."""
    parallel, config = asdict(layout.config.parallel), layout.config
    return {
        "parallel": parallel,
        "zero_stage": config.zero_stage,
        "recompute": config.phase.recompute,
        "batch": asdict(layout.plan),
        "memory": asdict(layout.memory) | {"total": layout.memory.total},
        "muon_memory": layout.muon_memory,
        "teacher": layout.teacher._asdict(),
        "step": asdict(layout.step),
    }


def run(arguments: argparse.Namespace) -> int:
    """Plan, print, write. Raises ConfigError."""
    for flag in ("gpus", "gpu_memory", "list", *(name for name, *_ in RATES)):
        if getattr(arguments, flag) <= 0:
            raise ConfigError(f"--{flag} is {getattr(arguments, flag)}; give more than 0")
    if not 0 <= arguments.reserve < 1:
        raise ConfigError(f"--reserve is {arguments.reserve}; give a part of the memory, 0 to 1")
    changes = [f"neomoba.distill.teacher={arguments.teacher}"] if arguments.teacher else []
    config = load_config(arguments.ds_config, [*arguments.set, *changes])
    from neomoba_dist.train.planner import Planner, parameter_counts, settings
    from neomoba_dist.train.step_plan import Machine

    machine = Machine(
        arguments.gpus_per_machine,
        arguments.tflops * 1e12,
        arguments.tf32_tflops * 1e12,
        arguments.fp32_tflops * 1e12,
        arguments.kernel_share,
        arguments.nvlink * 1e9,
        arguments.network * 1e9,
    )
    planner = Planner(arguments.gpus, machine, teacher=teacher_of(config))
    budget = arguments.gpu_memory * (1 - arguments.reserve) * GIB
    refusal, named = "", []
    try:
        config = planner.with_recompute(config, budget)
        given = planner.layout(config)
        named.append(("as given", given))
        if given.memory.total > budget:
            refusal = (
                f"the layout as given needs {given.memory.total / GIB:.1f} GiB on its fullest rank, more than "
                f"{1 - arguments.reserve:.0%} of {arguments.gpu_memory:g} GiB"
            )
    except ConfigError as error:
        refusal = f"the layout as given is refused: {error}"
    search = planner.best(config, budget)
    best = search.layouts[: arguments.list]
    named += [(f"{place}.", layout) for place, layout in enumerate(best, 1)]
    total, active = parameter_counts(config)
    if arguments.json:
        found = {
            "parameters": total,
            "active_parameters": active,
            "machine": asdict(machine),
            "refusal": refusal or None,
        }
        print(json.dumps(found | {"layouts": {name: as_json(layout) for name, layout in named}}, indent=2))
    else:
        print(f"{total / 1e6:,.1f} M parameters, of which a token meets {active / 1e6:,.1f} M; rows of one document")
        if named:
            print(
                f"an update of {config.phase.tokens_per_update:,} tokens is {named[0][1].step.flops / 1e15:,.3g} PFLOP"
            )
        print(*([refusal] if refusal else []), *(table(named) if named else []), sep="\n")
        for name, layout in named[:2]:
            print(*(f"{name} {line}" for line in (traffic(layout), *muon(layout), *teacher(layout))), sep="\n")
        print(
            f"{len(search.layouts)} ways to cut {arguments.gpus} GPUs fit; counted with ZeRO stages, {search.refused} "
            f"cannot run and {search.large} are too large"
        )
        if arguments.build:
            print(build(planner, config))
    if not best:
        raise ConfigError(f"no layout on {arguments.gpus} GPUs fits; {refusal or 'give more'}")
    if arguments.write:
        Path(arguments.write).write_text(json.dumps(settings(best[0].config), indent=2) + "\n", encoding="utf-8")
        print(f"{arguments.write}: written", file=sys.stderr)
    return 0


def main(command_line: list[str]) -> int:
    """Returns the exit code."""
    arguments = parse_arguments(command_line)
    return exit_code_of(lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
