"""Console script `haechi`: verb → plain function. Reports go to standard output, progress and errors to standard error."""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from haechi.components.shared.errors import HaechiError, InputError
from haechi.serving.command import add_arguments as add_serve_arguments

from .doctor.command import add_arguments as add_doctor_arguments

__all__ = ["VERBS", "Verb", "build_parser", "main"]

Arguments = argparse.Namespace
_DEFAULT_WORKDIR = ".haechi/run"


@dataclass(frozen=True)
class Verb:
    """One verb: what it is for, how its arguments are added, what runs, and whether it reports (`--json`)."""

    help: str
    arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[Arguments], int]
    reports: bool = False


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, run the verb, and return its exit code (0 well, 2 usage, else by kind of error)."""
    arguments = build_parser().parse_args(argv)
    try:
        return VERBS[arguments.verb].run(arguments)
    except HaechiError as error:
        sys.stderr.write(f"haechi {arguments.verb}: {error}\n")
        return error.exit_code
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("haechi"):
            raise
        sys.stderr.write(f"haechi {arguments.verb}: {error.name} is not installed. Run: pip install 'haechi[demo]'\n")
        return 1
    except BrokenPipeError:
        return 0
    except KeyboardInterrupt:
        return 130


def build_parser() -> argparse.ArgumentParser:
    """The command line's grammar."""
    parser = argparse.ArgumentParser(prog="haechi", description="A Kubeflow-native flywheel for camera detectors.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, verb in VERBS.items():
        sub = verbs.add_parser(name, help=verb.help, description=verb.help)
        verb.arguments(sub)
        if verb.reports:
            sub.add_argument("--json", action="store_true", help="print the report as JSON")
    return parser


def _report(arguments: Arguments, value: Any, lines: Sequence[str]) -> None:
    text = json.dumps(value, indent=2, ensure_ascii=False) if arguments.json else "\n".join(lines)
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _workdir_argument(parser: argparse.ArgumentParser, default: str = _DEFAULT_WORKDIR) -> None:
    parser.add_argument(
        "--workdir", type=Path, default=Path(default), help="folder for all state (default %(default)s)"
    )


# demo, up, down ---------------------------------------------------------------------------------------------------


def _demo_arguments(parser: argparse.ArgumentParser) -> None:
    _workdir_argument(parser, ".haechi/demo")


def _demo(arguments: Arguments) -> int:
    from .demo.demo import demo

    demo(arguments.workdir)
    return 0


def _up(arguments: Arguments) -> int:
    from .servers import CREDENTIALS
    from .services import up

    settings = up(arguments.workdir).settings()
    value = {
        "workdir": str(arguments.workdir),
        "s3_endpoint": settings.s3_endpoint,
        "mlflow": settings.mlflow_tracking_uri,
        "bucket": settings.bucket,
        "credentials": str(arguments.workdir / CREDENTIALS),
    }
    lines = [
        f"object store  {settings.s3_endpoint} (bucket {settings.bucket}, keys in {value['credentials']})",
        f"MLflow        {settings.mlflow_tracking_uri}",
    ]
    _report(arguments, value, lines)
    return 0


def _down(arguments: Arguments) -> int:
    from .services import down

    stopped = down(arguments.workdir)
    lines = ["stopped" if stopped else f"nothing was running in {arguments.workdir}"]
    _report(arguments, {"workdir": str(arguments.workdir), "stopped": stopped}, lines)
    return 0


# run, compile, submit ---------------------------------------------------------------------------------------------


def _parameter_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", default="", help="entrance, safety, or a YAML file of parameters")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a pipeline parameter; VALUE is YAML; dots reach inside",
    )


def _run_arguments(parser: argparse.ArgumentParser) -> None:
    _parameter_arguments(parser)
    _workdir_argument(parser)


def _run(arguments: Arguments) -> int:
    from .local_run import run_training
    from .parameters import run_parameters
    from .services import services

    parameters = run_parameters(arguments.preset, arguments.set)
    with services(arguments.workdir) as running:
        result = run_training(parameters, arguments.workdir, running.settings())
    value = {
        "decision": result.decision,
        "folder": str(result.folder),
        "seconds": result.seconds,
        "artifacts": {name: [str(path) for path in paths] for name, paths in result.artifacts.items()},
    }
    verdict = json.loads((result.artifact("verdict") / "verdict.json").read_text(encoding="utf-8"))
    value["verdict"] = verdict
    lines = [f"decision  {result.decision}", *[f"          {reason}" for reason in verdict["reasons"]]]
    lines += [f"report    {result.folder / 'report.html'}", f"run       {result.folder}"]
    _report(arguments, value, lines)
    return 0


def _compile_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=None, help="folder to write to (default: pipelines/compiled)")
    parser.add_argument("--check", action="store_true", help="write nothing; fail where the committed files differ")
    _claim_argument(parser)


def _claim_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--cache-claim", default="", metavar="NAME", help="PersistentVolumeClaim that trainings keep frames in"
    )


def _compile(arguments: Arguments) -> int:
    from .compiling import COMPILED, compile_all, differences

    out = arguments.out or COMPILED
    if not arguments.check:
        for path in compile_all(out, arguments.cache_claim):
            sys.stdout.write(f"{path}\n")
        return 0
    with tempfile.TemporaryDirectory() as fresh:
        compile_all(Path(fresh), arguments.cache_claim)
        stale = differences(out, Path(fresh))
    for name in stale:
        sys.stderr.write(f"{out / name} is not what pipelines/training.py compiles to; run `haechi compile`\n")
    return 1 if stale else 0


def _submit_arguments(parser: argparse.ArgumentParser) -> None:
    _parameter_arguments(parser)
    where = parser.add_argument_group("where")
    where.add_argument("--host", default="", help="URL of the Kubeflow Pipelines API (default: KF_PIPELINES_ENDPOINT)")
    where.add_argument(
        "--namespace", default="", help="profile namespace (default: KF_PIPELINES_NAMESPACE, or kubeflow)"
    )
    where.add_argument("--token-file", default="", help="file with a bearer token (never on the command line)")
    where.add_argument("--ca-file", default="", help="certificates to check the server's against")
    where.add_argument("--ui", default="", help="URL of the dashboard, where it is not --host")
    parser.add_argument("--experiment", default="", help="KFP experiment (default: the pipeline's name)")
    parser.add_argument("--run-name", default="", help="name shown in the dashboard; of a schedule, what makes it one")
    parser.add_argument("--service-account", default="", help="service account of the pods (default: the server's)")
    parser.add_argument("--no-cache", action="store_true", help="train anew what is trained already (retrain=true)")
    _claim_argument(parser)
    when = parser.add_argument_group("again and again, instead of once")
    when.add_argument("--cron", default="", help="six fields, seconds first, such as '0 0 3 * * *'")
    when.add_argument("--every", default="", help="an interval, such as 6h")
    when.add_argument("--pin", action="store_true", help="stay with this version of the pipeline, not the newest")
    wait = parser.add_argument_group("to the end")
    wait.add_argument("--wait", action="store_true", help="follow the run; exit 0 promoted, 30 not promoted, 31 failed")
    wait.add_argument("--timeout", type=float, default=0, help="seconds to wait at most (default: no limit)")


def _submit(arguments: Arguments) -> int:
    from .kubeflow import Kubeflow
    from .kubeflow_settings import KubeflowSettings
    from .parameters import run_parameters
    from .scheduling import Schedule
    from .submitting import shipped_package
    from .watching import watch

    recurring = bool(arguments.cron or arguments.every)
    if recurring and arguments.wait:
        raise InputError("--wait does not go with --cron or --every", "Leave it out: a schedule has no end.")
    if not arguments.timeout >= 0:  # nor is `nan`
        raise InputError(f"--timeout is {arguments.timeout:g}", "Give seconds, or 0 for no limit.")
    if arguments.timeout and not arguments.wait:
        raise InputError("--timeout is for --wait", "Leave it out: nothing is waited for.")
    if arguments.pin and not recurring:
        raise InputError("--pin is for --cron and --every", "Leave it out: a run keeps its version anyway.")
    parameters = run_parameters(arguments.preset, [*arguments.set, *(["retrain=true"] if arguments.no_cache else [])])
    schedule = Schedule.parse(arguments.cron, arguments.every) if recurring else None
    given = {name: getattr(arguments, name) for name in ("host", "namespace", "ui", "token_file", "ca_file")}
    with shipped_package(arguments.cache_claim) as package:
        api = Kubeflow(KubeflowSettings.from_env(**given))
        done = _hand_over(arguments, api, package, parameters, schedule)
    value = asdict(done)
    lines = [
        f"version   {done.version}{' (new)' if done.uploaded else ''}",
        f"{'schedule' if schedule else 'run':9} {done.name} {done.id} {done.change}",
        f"see       {done.url}",
    ]
    if not arguments.wait:
        _report(arguments, value, lines)
        return 0
    sys.stderr.write("\n".join(lines) + "\n")
    ended = watch(api, done.id, package.steps, timeout=arguments.timeout)
    _report(arguments, value | asdict(ended), [f"decision  {ended.decision}", lines[-1]])
    return ended.exit_code


def _hand_over(arguments: Arguments, api: Any, package: Any, parameters: dict[str, Any], schedule: Any) -> Any:
    from .submitting import schedule_training, submit_training

    common = {"experiment": arguments.experiment, "service_account": arguments.service_account, "package": package}
    if schedule:
        return schedule_training(api, parameters, schedule, name=arguments.run_name, pin=arguments.pin, **common)
    return submit_training(api, parameters, run_name=arguments.run_name, **common)


# export, evaluate, serve, predict ---------------------------------------------------------------------------------


def _export_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", type=Path, required=True, help="Ultralytics detection checkpoint (.pt)")
    parser.add_argument("--out", type=Path, required=True, help="model folder to write")
    parser.add_argument("--name", default="", help="model name (default: the checkpoint's file name)")
    parser.add_argument("--imgsz", type=int, default=0, help="longer side of the input (default: the checkpoint's)")
    parser.add_argument("--images", type=Path, help="folder of images to take the golden set from")
    parser.add_argument("--data", type=Path, help="data.yaml to take the golden set from")
    parser.add_argument(
        "--conf", type=float, default=0.25, help="confidence threshold of every class (default %(default)s)"
    )
    parser.add_argument("--iou", type=float, default=0.7, help="NMS overlap (default %(default)s)")


def _export(arguments: Arguments) -> int:
    from haechi.components.export.step import export_checkpoint

    model = export_checkpoint(
        arguments.checkpoint,
        arguments.out,
        name=arguments.name or _kebab(arguments.checkpoint.stem),
        images=[arguments.images] if arguments.images else None,
        data=arguments.data,
        imgsz=arguments.imgsz,
        thresholds={"default": arguments.conf},
        iou=arguments.iou,
    )
    lines = [
        f"model    {model.name} {model.version}",
        f"classes  {', '.join(model.classes)}",
        f"golden   {model.golden} images",
    ]
    if not model.golden:
        lines.append("Nothing proves this folder: give --images or --data, or serve it with --allow-unverified.")
    _report(arguments, asdict(model), [*lines, f"folder   {arguments.out}"])
    return 0


def _kebab(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "model"


def _evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, required=True, help="model folder, .onnx, or .pt")
    parser.add_argument("--data", type=Path, required=True, help="data.yaml")
    parser.add_argument("--split", default="test", choices=("train", "val", "test"), help="split (default %(default)s)")


def _evaluate(arguments: Arguments) -> int:
    from haechi.components.evaluate.standalone import evaluate_model

    value = evaluate_model(arguments.model, arguments.data, arguments.split)
    lines = [f"{'class':20} {'boxes':>7} {'mAP50-95':>9} {'mAP50':>7}"]
    for name, row in [*value["per_class"].items(), ("all", {**value, "boxes": ""})]:
        numbers = ["–" if row[key] is None else f"{row[key]:.3f}" for key in ("map50_95", "map50")]
        lines.append(f"{name:20} {row['boxes']!s:>7} {numbers[0]:>9} {numbers[1]:>7}")
    _report(arguments, value, lines)
    return 0


def _serve(arguments: Arguments) -> int:
    from haechi.serving.command import run

    return run(arguments)


def _predict_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("inputs", nargs="+", help="images, folders, or http(s) image URLs")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--model", type=Path, help="model folder to run here")
    where.add_argument(
        "--endpoint", default="", help="V1 URL of a server, such as http://127.0.0.1:8080/v1/models/safety"
    )
    parser.add_argument("--out", type=Path, help="folder for drawn pictures")
    parser.add_argument("--json", action="store_true", help="changes nothing: the report is JSON in any case")
    parser.add_argument(
        "--conf", type=float, default=None, help="confidence from which boxes count (default: the model's)"
    )


def _predict(arguments: Arguments) -> int:
    from .predict import predict

    rows = predict(
        arguments.inputs, model=arguments.model, endpoint=arguments.endpoint, out=arguments.out, conf=arguments.conf
    )
    sys.stdout.write(json.dumps(rows, indent=2, ensure_ascii=False) + "\n")
    return 1 if any("error" in row for row in rows) else 0


# review -----------------------------------------------------------------------------------------------------------


def _review_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    listing = actions.add_parser("list", help="show the open review tasks, most uncertain first")
    answer = actions.add_parser("answer", help="answer one task")
    for sub in (listing, answer):
        sub.add_argument("--workdir", type=Path, default=Path(_DEFAULT_WORKDIR), help="folder whose services to use")
        sub.add_argument("--json", action="store_true", help="print the report as JSON")
    listing.add_argument(
        "--images", type=Path, help="also write each frame, with its proposals drawn, into this folder"
    )
    answer.add_argument("sha256", help="the frame's SHA-256, or the beginning of it")
    answer.add_argument("--reviewer", required=True, help="your name; it stays with the labels")
    how = answer.add_mutually_exclusive_group(required=True)
    how.add_argument("--accept", action="store_true", help="the proposals are right")
    how.add_argument("--empty", action="store_true", help="there is no object of any class")
    how.add_argument(
        "--boxes", help='JSON list of {"class": name, "box": [x1, y1, x2, y2]} in pixels; - reads standard input'
    )


def _review(arguments: Arguments) -> int:
    from .reviewing import answer_task, list_open

    if arguments.action == "list":
        rows = list_open(arguments.workdir, arguments.images)
        lines = [f"{row['sha256'][:12]}  {row['priority']:.2f}  {row['camera']:12}  {row['reason']}" for row in rows]
        _report(arguments, rows, [*lines, f"{len(rows)} open"])
        return 0
    text = sys.stdin.read() if arguments.boxes == "-" else arguments.boxes
    done = answer_task(
        arguments.workdir,
        arguments.sha256,
        arguments.reviewer,
        "[]" if arguments.empty else text,
        accept=arguments.accept,
    )
    _report(arguments, done, [f"{done['sha256'][:12]} answered by {done['reviewer']}: {done['boxes']} boxes"])
    return 0


def _doctor(arguments: Arguments) -> int:
    from .doctor.command import run

    return run(arguments)


# promote, rollback, status, reconcile --------------------------------------------------------------------------------


def _service_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", help="registered model")
    parser.add_argument("--target", default="", help="deploy target, such as kserve:haechi-serving/safety")
    _workdir_argument(parser)


def _switch_arguments(parser: argparse.ArgumentParser) -> None:
    _rollout_argument(parser)
    parser.add_argument("--take-over", action="store_true", help="take the target from whoever is deploying to it")


def _rollout_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--rollout",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a key of the parameter rollout, such as strategy=rolling; VALUE is YAML",
    )


def _promote_arguments(parser: argparse.ArgumentParser) -> None:
    _service_arguments(parser)
    parser.add_argument("version", help="the model's version (12 hex digits), or the beginning of it")
    _switch_arguments(parser)


def _rollback_arguments(parser: argparse.ArgumentParser) -> None:
    _service_arguments(parser)
    _switch_arguments(parser)


def _promote(arguments: Arguments) -> int:
    from .operations import promote, settings_of

    target, rollout = _target(arguments), _rollout(arguments)
    with settings_of(arguments.workdir, target) as settings:
        done = promote(settings, arguments.name, arguments.version, target, rollout, arguments.take_over)
    _report(arguments, done, [f"champion  {done['version']}", f"before    {done['former'] or 'none'}"])
    return 0


def _rollback(arguments: Arguments) -> int:
    from .operations import rollback, settings_of

    target, rollout = _target(arguments), _rollout(arguments)
    with settings_of(arguments.workdir, target) as settings:
        done = rollback(settings, arguments.name, target, rollout, arguments.take_over)
    _report(arguments, done, [f"champion  {done['version']}", f"before    {done['former'] or 'none'}"])
    return 0


def _status(arguments: Arguments) -> int:
    from .operations import settings_of, status, status_lines

    target = _target(arguments)
    with settings_of(arguments.workdir, target) as settings:
        found = status(settings, arguments.name, target)
    _report(arguments, found, status_lines(found))
    return 0


def _target(arguments: Arguments) -> Any:
    """The parsed target, once the model's name is known to be one."""
    from haechi.components.deploy.target import Target
    from haechi.components.shared.files import check_name

    check_name(arguments.name)
    return Target.parse(arguments.target)


def _rollout(arguments: Arguments) -> Any:
    from haechi.components.deploy.rollout import Rollout

    from .parameters import parse_settings

    return Rollout.parse(parse_settings(arguments.rollout))


def _reconcile_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("pairs", nargs="+", metavar="NAME=TARGET", help="a registered model and its deploy target")
    parser.add_argument("--every", type=float, default=30.0, help="seconds between rounds (default %(default)s)")
    parser.add_argument("--once", action="store_true", help="one round, as in a CronJob")
    _rollout_argument(parser)
    _workdir_argument(parser)


def _reconcile(arguments: Arguments) -> int:
    from .operations import parse_pairs, reconcile, settings_of

    pairs, rollout = parse_pairs(arguments.pairs), _rollout(arguments)
    with settings_of(arguments.workdir, *(target for _, target in pairs)) as settings:
        told = reconcile(settings, pairs, 0.0 if arguments.once else max(1.0, arguments.every), rollout)
    _report(arguments, told, [f"{name}: {sentence}" for name, sentence in told.items()])
    return 0


VERBS: dict[str, Verb] = {
    "demo": Verb("show the whole journey on this machine", _demo_arguments, _demo),
    "up": Verb(
        "start the embedded object store and MLflow, and leave them running", _workdir_argument, _up, reports=True
    ),
    "down": Verb("stop what `haechi up` started", _workdir_argument, _down, reports=True),
    "run": Verb("run the training pipeline on this machine", _run_arguments, _run, reports=True),
    "compile": Verb("compile the pipeline to IR and Kubernetes objects", _compile_arguments, _compile),
    "submit": Verb("start a run on Kubeflow Pipelines", _submit_arguments, _submit, reports=True),
    "export": Verb("turn a checkpoint into a model folder", _export_arguments, _export, reports=True),
    "evaluate": Verb("measure a model on labelled images", _evaluate_arguments, _evaluate, reports=True),
    "serve": Verb("serve a model folder over HTTP", add_serve_arguments, _serve),
    "predict": Verb("detect in images, here or at an endpoint", _predict_arguments, _predict),
    "promote": Verb("make a registered version the champion", _promote_arguments, _promote, reports=True),
    "rollback": Verb(
        "withdraw a canary, or go back to the champion before", _rollback_arguments, _rollback, reports=True
    ),
    "status": Verb("show what serves and how its rollout goes", _service_arguments, _status, reports=True),
    "reconcile": Verb("let targets serve what alias champion names", _reconcile_arguments, _reconcile, reports=True),
    "review": Verb("list and answer review tasks", _review_arguments, _review),
    "doctor": Verb("find what is wrong here and on the cluster, and say how to mend it", add_doctor_arguments, _doctor),
}


if __name__ == "__main__":
    sys.exit(main())
