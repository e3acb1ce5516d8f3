"""python -m bench run | report | compare | providers | plan | forecast | fit | kernels | publish"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from .environment import ROOT, alone, device_folder


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="measure what this machine can, then write JSON, CSV, pictures and report.html")
    run.add_argument("--out", type=Path, default=None, help="default: build/bench/<gpu or cpu>")
    run.add_argument("--only", default="", help="regular expression on a measurement's id, such as softmax-4k-bf16-fwd")
    run.add_argument("--budget", type=float, default=None, help="seconds after which nothing new is started")
    run.add_argument("--resume", action="store_true", help="keep and continue the results already in the folder")
    report = commands.add_parser("report", help="draw the pictures and report.html from a results file")
    report.add_argument("results", type=Path, help="results.csv, or the folder that holds it")
    report.add_argument("--out", type=Path, default=None, help="default: beside the results")
    compared = commands.add_parser("compare", help="exit status 1 when ours became slower by more than the threshold")
    compared.add_argument("before", type=Path)
    compared.add_argument("after", type=Path)
    compared.add_argument("--threshold", type=float, default=0.05, help="0.05 is 5%%")
    providers = commands.add_parser("providers", help="who can be measured here, and why the others cannot")
    providers.add_argument("--device", default=None, help="cuda or cpu; default: what is there")
    plan = commands.add_parser("plan", help="the GPU matrix in the order it would run")
    plan.add_argument("--only", default="")
    forecast = commands.add_parser(
        "forecast", help="write what each headline row should take to bench/results/<gpu>/forecast.csv"
    )
    forecast.add_argument("--gpu", default="all", help="h100, h200 or all (default)")
    forecast.add_argument("--root", type=Path, default=ROOT, help="the checkout to write in")
    fit = commands.add_parser("fit", help="fit a GPU's coefficients to its residuals, and say whether rows held out agree")
    fit.add_argument("gpu", help="a folder of bench/results with residuals.csv and counts.csv, as h200")
    fit.add_argument("--only", default="", help="comma-separated coefficients, as norm,host (default: all that may be fitted)")
    fit.add_argument("--root", type=Path, default=ROOT, help="the checkout to read")
    kernels = commands.add_parser("kernels", help="what the headline rows' kernels cost, before and after, beside Liger's")
    kernels.add_argument("--before", default="", help="a table that --save wrote; default: the committed one of this Triton")
    kernels.add_argument("--after", type=Path, default=None, help="a table; default: compile the kernels as they are")
    kernels.add_argument("--save", type=Path, default=None, help="also write what was compiled as a table")
    kernels.add_argument("--peers", type=Path, default=None, help="a folder with liger_kernel: its kernels beside ours")
    kernels.add_argument("--save-peers", type=Path, default=None, help="also write what Liger's cost as a table")
    kernels.add_argument(
        "--committed", action="store_true",
        help="compile nothing: the committed tables of every Triton, written to bench/results/kernels.md",
    )  # fmt: skip
    kernels.add_argument("--gpu", default="h100", help="whose coefficients forecast (default h100)")
    kernels.add_argument("--only", default="", help="regular expression on a row, such as softmax-4k")
    kernels.add_argument("--jobs", type=int, default=None, help="processes to compile in")
    kernels.add_argument("--out", type=Path, default=None, help="write the Markdown there instead of printing it")
    publish = commands.add_parser(
        "publish", help="check the results of one GPU's runs, and file them under bench/results/<gpu>/"
    )
    publish.add_argument("results", type=Path, nargs="+", help="folders that bench/gpu.sh wrote, or their results.tar.gz")
    publish.add_argument("--add", action="store_true", help="keep what is filed for this GPU, as the earliest run")
    publish.add_argument("--replace", action="store_true", help="drop what is filed for this GPU")
    publish.add_argument("--commit", default="", help="for runs that do not say theirs")
    publish.add_argument("--root", type=Path, default=ROOT, help="the checkout to file in")
    args = parser.parse_args(argv)
    command = {
        "run": _run, "report": _report, "compare": _compare, "providers": _providers, "plan": _plan, "forecast": _forecast,
        "publish": _publish, "fit": _fit, "kernels": _kernels,
    }[args.command]  # fmt: skip
    try:
        import fused_ops  # noqa: F401
    except ValueError as error:  # SettingError: a variable of the environment means nothing
        print(f"python -m bench {args.command}: {error}", file=sys.stderr)
        return 2
    try:
        return command(args)
    except BrokenPipeError:  # the reader, such as head, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _run(args: argparse.Namespace) -> int:
    import pytest

    out = args.out or ROOT / "build" / "bench" / device_folder()
    out.mkdir(parents=True, exist_ok=True)
    results = out / "results.csv"
    if not args.resume:
        results.unlink(missing_ok=True)
    options = [f"--bench-csv={results}", f"--benchmark-json={out / 'benchmark.json'}", "--benchmark-columns=median,iqr,rounds"]
    options += [f"--bench-only={args.only}"] if args.only else []
    options += [f"--bench-budget={args.budget}"] if args.budget else []
    options += ["--bench-resume"] if args.resume else []
    for name in set(os.environ) - set(alone()):
        del os.environ[name]
    status = int(pytest.main([str(ROOT / "bench"), "-q", *options]))
    if results.exists():
        _report(argparse.Namespace(results=out, out=out))
    return status


def _report(args: argparse.Namespace) -> int:
    from .compare import results_file

    try:
        results = results_file(args.results)
        from .report import write_report

        print(f"wrote {write_report(results, args.out or results.parent)}")
    except (OSError, ValueError) as error:
        print(f"python -m bench: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        print(f"python -m bench: the report needs {error.name}: pip install 'fused-ops[bench]'", file=sys.stderr)
        return 2
    return 0


def _compare(args: argparse.Namespace) -> int:
    from .compare import compare, machine, results_file, table

    try:
        changes, lost = compare(args.before, args.after)
        machines = [machine(results_file(p)) for p in (args.before, args.after)]
    except (OSError, ValueError) as error:
        print(f"python -m bench compare: {error}", file=sys.stderr)
        return 2
    if machines[0] != machines[1]:
        print(f"note: different machines: {machines[0]} before, {machines[1]} after")
    if not changes:
        print("python -m bench compare: the two runs have no measurement in common", file=sys.stderr)
        return 2
    text, regressed = table(changes, lost, args.threshold)
    print(text)
    return 1 if regressed else 0


def _providers(args: argparse.Namespace) -> int:
    import torch

    from .providers import PROVIDERS

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    for provider in PROVIDERS:
        print(f"{provider.name:<22} {provider.available(device) or 'available'}")
    return 0


def _plan(args: argparse.Namespace) -> int:
    from .providers import PROVIDERS
    from .tasks import matrix

    for task, provider in matrix(args.only, [p.name for p in PROVIDERS]):
        moved, flops = task.work()
        print(f"{task.id}-{provider}  {moved / 1e6:.1f} MB  {flops / 1e9:.1f} GFLOP")
    return 0


def _forecast(args: argparse.Namespace) -> int:
    from .forecast import GPUS, write_forecast

    names = list(GPUS) if args.gpu == "all" else [args.gpu]
    if unknown := set(names) - set(GPUS):
        print(f"python -m bench forecast: --gpu: got {', '.join(unknown)}, allowed: {', '.join(GPUS)}, all", file=sys.stderr)
        return 2
    for name in names:
        print(f"wrote {write_forecast(args.root / 'bench' / 'results' / name, name)}")
    return 0


def _fit(args: argparse.Namespace) -> int:
    from .fit import FITTED, fit_folder, said

    try:
        names = [name for name in args.only.split(",") if name] or list(FITTED)
        print(said(fit_folder(args.root / "bench" / "results" / args.gpu, names)))
    except (OSError, ValueError) as error:
        print(f"python -m bench fit: {error}", file=sys.stderr)
        return 2
    return 0


def _kernels(args: argparse.Namespace) -> int:
    from .kernel_table import committed, kernel_table

    results = ROOT / "bench" / "results"
    try:
        if args.committed:
            args.out = args.out or results / "kernels.md"
            text = f"# The headline rows' kernels, before and after\n\n{committed(args.gpu, results)}"
        else:
            text = kernel_table(
                args.before, args.after, args.save, args.peers, args.save_peers, args.gpu, args.only, args.jobs
            )  # fmt: skip
    except (OSError, RuntimeError, ValueError) as error:
        print(f"python -m bench kernels: {error}", file=sys.stderr)
        return 2
    if args.out is None:
        print(text)
    else:
        args.out.write_text(text + "\n")
    return 0


def _publish(args: argparse.Namespace) -> int:
    from .publish import publish
    from .results_format import FormatError

    try:
        done = publish(args.results, args.root, args.add, args.replace, args.commit)
    except (FormatError, OSError) as error:
        print(f"python -m bench publish: {error}", file=sys.stderr)
        return 2
    print("\n".join(done.said))
    for warning in done.warnings:
        print(f"python -m bench publish: note: {warning}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
