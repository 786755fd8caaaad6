"""Submit one training, or an array of them over seeds and settings, to Slurm through submitit; or run them here.

    dist-train submit --nodes 2 --preset block94 epochs=12
    dist-train submit --seeds 0-4 --grid optim.kernels.lr=0.12,0.24 --at-most 4 --wait
    dist-train submit --sweep dist_train/examples/sweep.yaml --at-most 4
    dist-train submit --local --preset digits

All other arguments are passed on to python -m dist_train.main. The defaults of the options are those of slurm/train.sh.
In Python:

    from dist_train.launch import submit
    job = submit.train(["--preset", "block94", "epochs=12"], nodes=2)
    print(job.result().test_accuracy)
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import re
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import submitit
import yaml

from dist_train import config, data_prep
from dist_train.command_line import Parser, command, count, positive
from dist_train.config.arguments import parser as trainer_parser
from dist_train.config.arguments import resolve
from dist_train.data import dataset
from dist_train.distributed.launcher import gpus_here
from dist_train.errors import DONE, FAILED, UserError, say, show
from dist_train.files import write_atomic
from dist_train.launch import cluster
from dist_train.launch.node import Training, as_name
from dist_train.main import check_run
from dist_train.model.shapes import check_shapes
from dist_train.reports import table
from dist_train.runs import layout
from dist_train.runs.run import Run

_POLL = 2.0  # seconds between two polls of a job
_FORGOTTEN = 5  # consecutive polls in which Slurm does not know a job, after which it counts as ended
_PRINTABLE = re.compile(r"[ -~]+")
_NAME = re.compile(r"[a-z][a-z0-9-]*")
# options of sbatch that say how the job is started, which is decided here
_DECIDED = {
    "array",
    "chdir",
    "error",
    "ntasks",
    "ntasks-per-node",
    "open-mode",
    "output",
    "parsable",
    "test-only",
    "wrap",
}
_LEAST = {"nodes": 1, "gpus-per-node": 0, "cpus-per-task": 1}
_MOST = 10_000  # members of an array: more than Slurm takes, unless its administrator has raised MaxArraySize
_LONGEST = 200  # bytes of a file's name, to which a job's number may be added
# keys of a W&B sweep's file that an array supports; others (early_terminate, run_cap, ...) require W&B's server
_SWEEP_KEYS = {"command", "description", "entity", "method", "metric", "name", "parameters", "program", "project"}


class JobError(RuntimeError):
    """A job ended before its training was done. The message has the state of the job and the end of its log."""


@dataclass(frozen=True)
class Options:
    """The options of a job; those that are None are those of slurm/train.sh.

    gpus_per_node, cpus_per_node: of each node; without either, whole nodes. time: in Slurm's format. more: any other
    option of sbatch, by long name, True where it has no value.
    """

    nodes: int | None = None
    gpus_per_node: int | None = None
    cpus_per_node: int | None = None
    partition: str | None = None
    account: str | None = None
    time: str | None = None
    job_name: str | None = None
    more: dict[str, str | bool] | None = None

    def sbatch(self) -> dict[str, str | bool]:
        """All options by their long names of sbatch, those of slurm/train.sh included. Raises UserError."""
        given = {
            "nodes": self.nodes,
            "gpus-per-node": self.gpus_per_node,
            "cpus-per-task": self.cpus_per_node,  # one task a node
            "partition": self.partition,
            "account": self.account,
            "time": self.time,
            "job-name": self.job_name,
        }
        options = cluster.options()
        if self.gpus_per_node is not None or self.cpus_per_node is not None:
            options.pop("exclusive", None)
        more = self.more or {}
        for name in more:
            if not _NAME.fullmatch(name):
                raise UserError(f"--sbatch {name!r}: not the long name of an option of sbatch; write it as qos=low")
            if name in _DECIDED:
                raise UserError(f"--sbatch {name}: submit sets this one itself; remove it")
        options |= {name: str(value) for name, value in given.items() if value is not None}
        options |= {name: value if isinstance(value, bool) else str(value) for name, value in more.items()}
        for name, value in options.items():
            if not isinstance(value, bool) and not _PRINTABLE.fullmatch(value):
                raise UserError(f"--{name} {value!r}: an option of sbatch is one line of printable characters")
        for name, least in _LEAST.items():
            text = str(options.get(name, least))
            if not re.fullmatch("[0-9]{1,9}", text) or int(text) < least:
                raise UserError(f"--{name} {text}: give a whole number from {least}")
        if "time" in options and not cluster.minutes(str(options["time"])):
            raise UserError(f"--time {options['time']}: give at least a minute")
        return options


@dataclass(frozen=True)
class Result:
    """The results of a training. Accuracies are fractions from 0 to 1, after the last epoch. summary: all of
    summary.json."""

    run_dir: Path
    test_accuracy: float
    test_accuracy_tta: float | None
    train_seconds: float
    weights_sha256: str
    summary: dict[str, Any]

    @classmethod
    def read(cls, run_dir: Path) -> Result:
        """The results in a run folder. Raises UserError for a run that is not done."""
        run = Run(run_dir)
        run.need(layout.SUMMARY)
        required = {key: run.summary[key] for key in ("test_accuracy", "train_seconds", "weights_sha256")}
        return cls(
            run_dir=run_dir, test_accuracy_tta=run.summary.get("test_accuracy_tta"), summary=run.summary, **required
        )


@dataclass(frozen=True)
class Job:
    """A submitted training. id: Slurm's, NUMBER_INDEX in an array. log: of all of its nodes."""

    id: str
    run_dir: Path
    log: Path
    handle: submitit.Job[str]

    def state(self) -> str:
        """In Slurm's words (PENDING, RUNNING, COMPLETED, ...), "" for a job that Slurm no longer knows."""
        if isinstance(self.handle, submitit.SlurmJob):
            return cluster.state(self.id)
        if not self.handle.done():
            return "RUNNING"
        return "COMPLETED" if Run(self.run_dir).done else "FAILED"

    def wait(self) -> str:
        """Wait until it has ended for good, through any number of requeues. Returns its last state."""
        forgotten = 0
        while (state := self.state()) not in cluster.ENDED and forgotten < _FORGOTTEN:
            forgotten = 0 if state else forgotten + 1
            time.sleep(_POLL)
        return state

    def result(self) -> Result:
        """Wait for the end, and read the results. Raises JobError, and UserError for a damaged summary."""
        state = self.wait()
        # submitit's own result takes the loss of a node for the end of the job, although Slurm starts the job again
        if state in ("COMPLETED", "") and Run(self.run_dir).done:
            return Result.read(self.run_dir)
        tail = self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-30:] if self.log.exists() else []
        ended = f"ended as {state}" if state else "has ended, and Slurm no longer knows how"
        raise JobError("\n".join([f"job {self.id} {ended}; the end of {self.log}:", *tail]))


def train(arguments: Sequence[str], *, local: bool = False, **options: Any) -> Job:
    """Submit one training, and return at once.

    arguments: of `python -m dist_train.main`. local: run on this machine instead of Slurm. options: fields of Options.
    Raises UserError before anything is submitted."""
    return _submit([("", list(arguments))], Options(**options), local, 1)[0]


def array(members: dict[str, Sequence[str]], *, at_most: int = 0, local: bool = False, **options: Any) -> list[Job]:
    """Submit several trainings as one array, and return at once; with `local`, when the last has begun.

    members: the arguments of each by its name, without --run-dir: the run folder is the name, in the array's folder.
    at_most: the number of members that run at a time, 0 for all. options: fields of Options. Raises UserError before
    anything is submitted."""
    return _submit([(name, list(arguments)) for name, arguments in members.items()], Options(**options), local, at_most)


def members(
    arguments: Sequence[str], seeds: str, grid: Sequence[str], sweep: Path | None = None
) -> dict[str, Sequence[str]]:
    """The members of an array, the arguments of each by its name: all combinations of the values of the parameters in a
    W&B sweep's file, of the KEY=V1,V2,... of the grid, and of the seeds. Raises UserError."""
    fixed, axes = _sweep(sweep) if sweep else ([], [])
    for axis in grid:
        key, equals, values = axis.partition("=")
        if not equals or not values:
            raise UserError(f"--grid {axis}: write it as KEY=VALUE,VALUE,...")
        axes.append((key, values.split(",")))
    if seeds:
        axes.append(("train.seed", [str(seed) for seed in _numbers(seeds)]))
    if (count := math.prod(len(values) for _, values in axes)) > _MOST:
        raise UserError(f"--sweep, --grid, --seeds: {count} members are too many; ask for at most {_MOST}")
    named: dict[str, Sequence[str]] = {}
    for chosen in itertools.product(*([(key, value) for value in values] for key, values in axes)):
        name = "-".join(as_name(f"{key.rpartition('.')[2]}{value}") for key, value in chosen)
        if name in named or len(dict(chosen)) < len(chosen):
            raise UserError(
                f"--sweep, --grid, --seeds: two members would be called {name}, or a setting has two values in it; "
                f"remove the duplicate"
            )
        named[name] = [*fixed, *arguments, *(f"{key}={value}" for key, value in chosen)]
    return named


def _sweep(path: Path) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """The arguments in a W&B sweep's file that all members share, and the settings with their values, as W&B's agent
    would pass them on. Raises UserError, also for a sweep that requires W&B's server."""
    remedy = "or have W&B's server choose, with wandb sweep and wandb agent"
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--sweep {path}: cannot be read ({error.strerror}); name a W&B sweep's YAML file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--sweep {path}: not valid YAML ({' '.join(str(error).split())}); fix that line") from None
    if not isinstance(tree, dict) or not isinstance(tree.get("parameters"), dict):
        raise UserError(f"--sweep {path}: has no parameters; write them as parameters: {{KEY: {{values: [V, V]}}}}")
    if tree.get("method") != "grid":
        raise UserError(f"--sweep {path}: method = {tree.get('method')}: an array is a grid; write grid, {remedy}")
    if unsupported := sorted(map(str, tree.keys() - _SWEEP_KEYS)):
        raise UserError(f"--sweep {path}: {unsupported[0]}: not supported by an array; remove it, {remedy}")
    fixed = _arguments(path, tree)
    if "project" in tree:
        fixed.append(f"record.project={tree['project']}")
    axes = []
    for key, given in tree["parameters"].items():
        given = given if isinstance(given, dict) else {}
        if given.keys() - {"distribution"} == {"value"}:
            fixed.append(f"{key}={given['value']}")
        elif given.keys() - {"distribution"} == {"values"} and isinstance(given["values"], list) and given["values"]:
            axes.append((str(key), [str(value) for value in given["values"]]))
        else:
            fault = f"has {', '.join(map(str, given))}" if given else "has no values"
            raise UserError(
                f"--sweep {path}: parameters.{key} {fault}: write values: [V, V] and nothing else, {remedy}"
            )
    return fixed, axes


def _arguments(path: Path, tree: dict[str, Any]) -> list[str]:
    """The trainer's arguments in the command of a W&B sweep's file, without the parameters. Raises UserError."""
    command, trainer = tree.get("command"), "dist_train.main"
    words = [str(word) for word in command] if isinstance(command, list) else []
    words = [str(tree.get("program")) if word == "${program}" else word for word in words]
    if trainer not in words or words[-1] != "${args_no_hyphens}":
        raise UserError(
            f"--sweep {path}: command = {shlex.join(words)}: it must start {trainer}, and end with "
            f"${{args_no_hyphens}}, which stands for the parameters as key=value"
        )
    arguments = words[words.index(trainer) + 1 : -1]
    if macros := [word for word in arguments if "${" in word]:
        raise UserError(f"--sweep {path}: command: {macros[0]} is not supported by an array; write its value")
    return arguments


def _numbers(text: str) -> list[int]:
    """The seeds in a list such as 0-4 or 0,2,5. Raises UserError."""
    numbers: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"([0-9]{1,20})(?:-([0-9]{1,20}))?", part)
        if not match:
            raise UserError(f"--seeds {text}: write it as 0-4 or 0,2,5")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise UserError(f"--seeds {text}: {part} ends before it begins; write the smaller number first")
        if last - first >= _MOST:
            raise UserError(f"--seeds {text}: {last - first + 1} members are too many; ask for at most {_MOST}")
        numbers += range(first, last + 1)
    return numbers


@dataclass(frozen=True)
class _Plan:
    """A submission that has been checked. sbatch: options by long name. at_most: members that run at a time, 0 for
    all."""

    trainings: list[Training]
    folder: Path  # of submitit's files; may contain %j or %A
    sbatch: dict[str, str | bool]
    local: bool
    at_most: int

    def executor(self) -> submitit.Executor:
        options = dict(self.sbatch)
        delay = re.fullmatch(r"(?:[A-Z]+:)?\w+@(\d+)", str(options.pop("signal", "")))
        timeout = cluster.minutes(str(options.pop("time", "60")))
        common = {"signal_delay_s": int(delay[1]) if delay else 120, "stderr_to_stdout": True}
        if self.local:
            executor: submitit.Executor = submitit.LocalExecutor(self.folder)
            executor.update_parameters(timeout_min=timeout, gpus_per_node=_local_gpus(self.sbatch), **common)
            return executor
        # one log for all nodes, in place of submitit's one for each
        log = str(submitit.core.utils.JobPaths(self.folder).stdout).replace("%t", "0")
        if len(self.trainings) > 1:
            log = log.replace("%j", "%A_%a")
        # requeued after any number of timeouts, because each start resumes where the last one stopped
        executor = submitit.SlurmExecutor(self.folder, max_num_timeout=10**6)
        options.pop("open-mode", None)
        executor.update_parameters(
            job_name=options.pop("job-name", "train"),
            time=timeout,
            nodes=int(options.pop("nodes", 1)),
            ntasks_per_node=1,
            array_parallelism=min(self.at_most or len(self.trainings), len(self.trainings)),
            setup=cluster.set_up(),
            srun_args=["--kill-on-bad-exit=1", "--open-mode=append", f"--output={log}"],
            additional_parameters=options,
            **common,
        )
        return executor


def _local_gpus(sbatch: dict[str, str | bool]) -> int:
    return int(sbatch.get("gpus-per-node", gpus_here()))


def _plan(named: Sequence[tuple[str, list[str]]], options: Options, local: bool, at_most: int) -> _Plan:
    """Check a submission. named: the members' names and arguments; a single training has the name "". Raises
    UserError."""
    if not named:
        raise UserError("there is nothing to submit: give the members of the array")
    if at_most < 0:
        raise UserError(f"--at-most {at_most}: give the number of members that run at a time, 0 for all")
    sbatch = options.sbatch()
    nodes, gpus = int(sbatch.get("nodes", 1)), int(sbatch.get("gpus-per-node", 0))
    run_dirs = {trainer_parser().parse_intermixed_args(arguments).run_dir for _, arguments in named}
    name = as_name(str(sbatch.get("job-name", "train")))
    if local:
        default = Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    else:
        default = Path("runs") / f"{name}-{'%A' if len(named) > 1 else '%j'}"
    folder = run_dirs.pop() or default
    if run_dirs:
        raise UserError("--run-dir: the members of an array share one; give it once")
    _check_names(folder, [member for member, _ in named])
    trainings = []
    first: dict[str, str] = {}  # the member that has given settings
    manifests: dict[Any, data_prep.Manifest] = {}
    for member, arguments in named:
        given = trainer_parser().parse_intermixed_args(arguments)
        _, settings = resolve(given)
        check_run(settings, folder / member, config.given(given.config, given.settings))
        _check_data(settings, local, manifests)
        if (same := first.setdefault(repr(settings), member)) != member:
            raise UserError(
                f"--sweep, --grid, --seeds: {same} and {member} have the same settings; give each setting in one of "
                f"them, and each value once"
            )
        if nodes * max(gpus, 1) > settings.train.microbatches:
            raise UserError(
                f"--nodes {nodes}{f' with --gpus-per-node {gpus}' * bool(gpus)}: train.microbatches = "
                f"{settings.train.microbatches} gives work to no more than that many ranks; request fewer, or raise "
                f"train.microbatches"
            )
        trainings.append(Training(arguments, folder / member, group=bool(member)))
    if local:
        if nodes > 1:
            raise UserError(f"--nodes {nodes}: --local is one machine; remove --nodes")
        if gpus > (here := gpus_here()):
            raise UserError(f"--gpus-per-node {gpus}: this machine has {here} GPUs; ask for fewer")
    else:
        limit = cluster.minutes(str(sbatch.get("time", "0")))
        cpus = int(sbatch.get("cpus-per-task", 0))
        candidates = cluster.check(str(sbatch.get("partition", "")), nodes, gpus, cpus, limit)
        cluster.check_shared(folder, candidates)
    return _Plan(trainings, (folder / "slurm").absolute(), sbatch, local, at_most)


def _check_data(settings: config.Config, local: bool, manifests: dict[Any, data_prep.Manifest]) -> None:
    """Raises UserError for settings that do not fit the data set, where its betons can be seen from here: a job on a
    cluster may see another disk. manifests: those of the betons that have been checked, which takes time."""
    data = settings.data
    if local:
        dataset.check(data)
    if not dataset.is_written(data):
        return
    key = data.dataset, data.folder, data.source_folder, data.image_size, data.drop_equal
    manifest = manifests.get(key) or dataset.manifest(data)
    manifests[key] = manifest
    dataset.check_images(data, manifest, settings.train.batch_size)
    check_shapes(settings, manifest.image_shape)


def _check_names(folder: Path, members: Sequence[str]) -> None:
    """Raises UserError for a run folder or a member whose name is no file's, or would not fit into the job script."""
    path = str(folder.absolute())
    if not path.isprintable():
        raise UserError(f"--run-dir {path!r}: a job's folder has a name of printable characters; name another")
    if any(len(part.encode()) > _LONGEST for part in folder.parts):
        raise UserError(f"--run-dir {folder}: is too long for a file's name; give a shorter --run-dir or --job-name")
    if long := [member for member in members if len(member.encode()) > _LONGEST]:
        raise UserError(f"--grid: {long[0]} is too long for a file's name; give shorter settings")


def _submit(named: Sequence[tuple[str, list[str]]], options: Options, local: bool, at_most: int) -> list[Job]:
    return _start(_plan(named, options, local, at_most))


def _start(plan: _Plan) -> list[Job]:
    executor = plan.executor()
    jobs: list[Job] = []
    try:
        if plan.local:
            group = plan.folder.parent
            _write_members(plan, group)
            for training in plan.trainings:
                while plan.at_most and sum(not job.handle.done() for job in jobs) >= plan.at_most:
                    time.sleep(_POLL / 10)
                jobs.append(_job(executor.submit(training), training))
            return jobs
        handles = executor.submit_array(plan.trainings)
    except submitit.core.utils.FailedJobError as error:
        raise UserError(f"sbatch refuses the job: {str(error).strip().splitlines()[-1]}") from None
    jobs = [_job(handle, training) for handle, training in zip(handles, plan.trainings, strict=True)]
    _write_members(plan, jobs[0].run_dir.parent)
    return jobs


def _write_members(plan: _Plan, group: Path) -> None:
    """Write the names and arguments of an array's members, from which the table knows the missing ones."""
    if any(training.group for training in plan.trainings):
        group.mkdir(parents=True, exist_ok=True)
        members = {training.run_dir.name: training.arguments for training in plan.trainings}
        write_atomic(group / layout.MEMBERS, (json.dumps(members, indent=1) + "\n").encode())


def _job(handle: submitit.Job[str], training: Training) -> Job:
    number = handle.job_id.split("_")[0]
    run_dir = Path(str(training.run_dir).replace("%A", number).replace("%j", number))
    return Job(handle.job_id, run_dir, handle.paths.stdout, handle)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        "submit",
        __doc__,
        epilog=f"slurm/train.sh is read from the current folder, else from {cluster.SCRIPT};\n"
        f"for a copy to edit: mkdir -p slurm && {shlex.join(['cp', str(cluster.SCRIPT), 'slurm/'])}",
    )
    add = parser.add_argument
    add("--nodes", metavar="N", type=positive)
    add("--gpus-per-node", metavar="N", type=count, help="(default: whole nodes)")
    add("--cpus-per-node", metavar="N", type=positive)
    add("--partition", metavar="NAME")
    add("--account", metavar="NAME")
    add("--time", metavar="LIMIT", help="minutes, H:M:S or D-H:M:S; at the limit a job is saved, requeued and resumed")
    add("--job-name", metavar="NAME", help="also of the run folder: runs/NAME-JOB unless --run-dir is given")
    add("--sbatch", metavar="NAME[=VALUE]", action="append", default=[], help="any other option of sbatch")
    add("--seeds", metavar="LIST", default="", help="an array over seeds: 0-4 or 0,2,5")
    add("--grid", metavar="KEY=V,V", action="append", default=[], help="an array over a setting's values; repeatable")
    add("--sweep", metavar="FILE", type=Path, help="an array over a W&B sweep's file, of method grid, without W&B")
    add("--at-most", metavar="M", type=positive, help="members that run at a time (default: all; --local: 1)")
    add("--wait", action="store_true", help="wait for the end, and print the accuracy or the table")
    add("--local", action="store_true", help="on this machine, without Slurm")
    add("--dry-run", action="store_true", help="check and print what would be submitted, submit nothing")
    return parser


@command
def main(arguments: list[str] | None = None) -> int:
    """Run the command. Returns the exit code."""
    args, arguments = _parser().parse_known_args(arguments)
    more: dict[str, str | bool] = {}
    for option in args.sbatch:
        name, equals, value = option.lstrip("-").partition("=")
        more[name] = value if equals else True
    names = ("nodes", "gpus_per_node", "cpus_per_node", "partition", "account", "time", "job_name")
    options = Options(**{name: getattr(args, name) for name in names}, more=more)
    named = members(arguments, args.seeds, args.grid, args.sweep)
    at_most = args.at_most or (1 if args.local else 0)
    plan = _plan([(name, list(each)) for name, each in named.items()], options, args.local, at_most)
    if args.dry_run:
        show(*_dry_run(plan).split("\n"))
        return DONE
    jobs = _start(plan)
    _print_submitted(jobs, plan)
    return _wait(jobs, plan.trainings[0].group) if args.wait or args.local else DONE


def _dry_run(plan: _Plan) -> str:
    """The commands of a submission, and for Slurm its job script."""
    lines = []
    for training in plan.trainings:
        lines += [shlex.join(["dist_train.main", *training.arguments, "--run-dir", str(training.run_dir)])]
    if plan.local:
        return "\n".join(lines)
    executor: Any = plan.executor()
    if len(plan.trainings) > 1:
        executor.parameters["map_count"] = len(plan.trainings)
    return "\n".join([executor._make_submission_file_text(executor._submitit_command_str, ""), "", *lines])


def _print_submitted(jobs: Sequence[Job], plan: _Plan) -> None:
    """Print the job's number and folder, and the commands for its log, state and table."""
    first, slurm = jobs[0], not plan.local
    number = first.id.split("_")[0]
    array = len(jobs) > 1
    group = plan.trainings[0].group
    folder = first.run_dir.parent if group else first.run_dir
    what = f"job {number}" + (f", {len(jobs)} members" if array else "") if slurm else f"{len(jobs)} on this machine"
    show(f"{what}; run folder{'s in' * group} {folder}")
    show(f"its log: tail -F {shlex.quote(str(first.log))}")
    if slurm:
        show(f"its state: squeue -j {number}; to end it: scancel {number}")
    if group:
        show(f"its table: dist-train table {shlex.quote(str(folder))}")


def _wait(jobs: Sequence[Job], is_array: bool) -> int:
    """Wait for all jobs, and print their results. Returns the exit code."""
    code = DONE
    for job in jobs:
        try:
            result = job.result()
        except JobError as error:
            show(*str(error).split("\n"), stream=sys.stderr)
            code = FAILED
            continue
        tta = f" ({100 * result.test_accuracy_tta:.2f} % with TTA)" if result.test_accuracy_tta is not None else ""
        show(f"{job.run_dir}: test accuracy {100 * result.test_accuracy:.2f} %{tta}")
    if is_array:
        text, damaged = table.write(jobs[0].run_dir.parent)
        show(*text.splitlines())
        for damage in damaged:
            say(str(damage))
            code = FAILED
    return code


if __name__ == "__main__":
    sys.exit(main())
