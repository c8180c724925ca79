"""Train a method and leave run folders that eval.py reads.

    python train.py --method corrkd --dataset mosei               real data from data/, five seeds
    python train.py --method corrkd --dataset mosi --synthetic    made-up data, nothing to download
    python train.py --method corrkd --dataset mosi --synthetic --limit 64 --epochs 1 --seeds 1

Each stage ends with its epoch that is best on validation. A stopped run goes on by the same
command, with as many threads to the same numbers (on CUDA with --deterministic). A run is a folder,
<out>/<dataset>[-synthetic]/<method>[-<ablation>]/s<seed>/ (sofficial with --official), with

    config.json  what the run is, and the command, code and machine that began it
    log.jsonl    one line an epoch: loss terms, numbers on validation, the best epoch so far
    last.pt      all that the next epoch depends on
    model.pt     the result, a dict that torch.load(path, weights_only=True) reads:
        run      what the run is: method, data set, task, ablation, seed, config, widths, ...
        load     the arguments of data.load that find its data again
        stats    stream -> (mean, deviation): a frame that is not all zeros becomes
                 (x - mean) / deviation, clipped to [-5, 5]; frames of zeros stay. None: as they are
        linear   the linear baseline (a ridge regression for each set of streams), or None
        epoch    in which epoch of the last stage these weights were best; None with --official
        model    the weights, of CorrKD those of teacher, student and critics

The features that Double-Flow's authors give (see the README) are folders. With --official FILE, their
checkpoint, nothing is trained, without it all is (not run here: we cannot reach their addresses):

    python train.py --method double_flow --dataset mosei --out runs/official \\
        --labels label_official.npz --official mosei_mult-view_kd_full_0.5060_0.5503.pt --features \\
        text=features_mosei/vicuna-7b-v1.5-FRA-wavlm2vicuna-half-gt \\
        audio=features_mosei/wavlm-large-FRA_-5 vision=features_mosei/manet_FRA \\
        "simulated_text=features_mosei/vicuna-7b-v1.5-FRA-wavlm2vicuna-half-wav+prompt[take_generate_wordembed_-4]"
    python eval.py runs/official/mosei/double_flow

Runs are independent of each other, so the shell runs several side by side, and a cluster many:

    printf '%s\\n' 1111 1112 1113 1114 1115 | OMP_NUM_THREADS=1 xargs -P 5 -n 1 \\
        python train.py --method corrkd --dataset mosei --seeds

    #SBATCH --array=1-5
    python train.py --method corrkd --dataset mosei --seeds $((1110 + SLURM_ARRAY_TASK_ID))
"""
import argparse
import io
import json
import os
import platform
import shlex
import subprocess
import sys
import time
import zlib
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import data
from data import DataError
from eval import (FORMAT, METHODS, clips_at_a_time, constant, device_named, differences, evaluate, fit_linear,
                  read_checkpoint, score, targets)

START_OVER = "It is not as train.py writes it: start over with --no-resume."


# ---------------------------------------------------------------------------------- training

def train_all(args) -> None:
    """Train every run that is asked for."""
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")     # without it CUDA's matrix products refuse
    torch.use_deterministic_algorithms(args.deterministic)
    device = device_named(args.device)
    load = {name: vars(args)[name] for name in ("data_dir", "synthetic", "features", "labels")}
    loaded = data.load(args.dataset, splits=("train", "valid"), device=device, normalize=args.normalize,
                       limit=args.limit, **load)
    runs = [describe(args, ablation, seed, loaded) for ablation in args.ablate for seed in args.seeds]
    introduce(runs[0], loaded, device)
    linear = None       # the linear baseline, the same for all runs
    for run in runs:
        folder = run_folder(args, run)
        folder.mkdir(parents=True, exist_ok=True)
        data.check_writable(folder)
        print(f"\n{folder}")
        if args.official:       # nothing is trained
            adopt(run, folder, load, args.official)
            continue
        state = restore(folder, run, args.no_resume)
        if state["finished"]:
            print("finished already")
            continue
        linear = linear or fit_linear(loaded, run["task"])
        train(run, folder, loaded, load, linear, device, state)
    ablations = dict.fromkeys(["", *args.ablate])       # with the full method, if it is trained, to compare with
    groups = [run_folder(args, {**runs[0], "ablation": ablation}).parent for ablation in ablations]
    trained = [str(group) for group in groups if any(group.glob("*/model.pt"))]
    print(f"\nthe test table: python eval.py {shlex.join(trained)}")


def train(run: dict, folder: Path, loaded: dict, load: dict, linear: dict | None, device, state: dict) -> None:
    """All stages of one run, from `state` on, which becomes what last.pt holds."""
    module = METHODS[run["method"]]
    config = module.Config(**run["config"])
    index, truth = targets(loaded["train"]["label"].cpu(), run["task"])
    truth = truth.to(device)
    torch.manual_seed(run["seed"])
    model = module.Model(run["dims"], run["task"], config).to(device)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
    stages = list(model.stages)
    if state["history"]:
        tell_of_going_on(folder, state["history"][-1], device)
        with data.reading(folder / "last.pt", START_OVER):
            model.load_state_dict(state["model"])

    for number in range(state["stage"], len(stages)):
        stage, last = stages[number], number == len(stages) - 1
        model.begin(stage)
        learning = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(learning, lr=config.lr, weight_decay=config.weight_decay)
        if state["epoch"]:
            optimizer.load_state_dict(state["optimizer"])
        teacher = teacher_rows(model, loaded["train"], index)
        sets = data.distinct(model.stages[stage], run["lacking"])       # the best epoch is chosen on these
        metric = "-MAE" if run["task"] == "regression" else "F1"
        print(f"{stage}: the epoch with the best {metric} on validation is kept, mean over {' '.join(sets)}")

        for epoch in range(state["epoch"], config.epochs):
            began, name = time.perf_counter(), f"{stage} {epoch + 1}/{config.epochs}"
            generator = seed_epoch(run["seed"], len(stages) - number, epoch)
            if module.learning_rate_factor:
                optimizer.param_groups[0]["lr"] = config.lr * module.learning_rate_factor(epoch)
            losses = train_epoch(model, optimizer, loaded["train"], index, truth, teacher, config, generator, name)
            valid = evaluate(model, run["task"], loaded["valid"], sets, "valid")
            now = score(valid)
            better = epoch == 0 or now > state["best"]["score"]
            if better:      # a copy, as the weights go on changing; on the CPU, so that any machine reads model.pt
                weights = {key: value.to("cpu", copy=True) for key, value in model.state_dict().items()}
                state["best"] = {"score": now, "epoch": epoch + 1, "weights": weights}
            state["history"].append({"stage": stage, "epoch": epoch + 1, "best": state["best"]["epoch"],
                                     "losses": losses, "valid": valid})
            state.update(stage=number, epoch=epoch + 1, finished=last and epoch + 1 == config.epochs,
                         model=model.state_dict(), optimizer=optimizer.state_dict())
            if number == epoch == 0:
                begin_folder(folder, run, load, device)
            # Before last.pt: a run that is stopped in between repeats this epoch.
            if last and better:
                save(folder / "model.pt", {"run": run, "load": load, "stats": loaded["stats"], "linear": linear,
                                           "epoch": epoch + 1, "model": weights})
            save_state(folder, state)
            print(f"{name}  loss {losses['total']:.3f}  valid {metric} {now:.4f}{' (best)' if better else ''}  "
                  f"{time.perf_counter() - began:.1f} s")

        model.load_state_dict(state["best"]["weights"])     # the next stage goes on from the best epoch
        state["epoch"] = 0


@torch.no_grad()
def teacher_rows(model, split: dict, index: torch.Tensor) -> list[torch.Tensor] | None:
    """The frozen teacher's outputs on each complete clip of `index`, or None where the stage has no teacher.
    They do not change during a stage, so they are computed once."""
    parts = []
    for clips in index.split(clips_at_a_time(split)):
        complete, _, real = data.batch(split, clips)
        outputs = model.teacher_outputs(complete, real)
        if outputs is None:
            return None
        parts.append(outputs)
    return [torch.cat(column) for column in zip(*parts)]


def seed_epoch(seed: int, stages_left: int, epoch: int) -> torch.Generator:
    """Seed dropout, and return the generator of batches and masks: two streams of random numbers that share
    nothing. They depend on these three numbers alone, so a run that was stopped goes on with the same ones. Stages
    are counted from the end, so that the last stage of every ablation sees the same batches and masks."""
    place = f"{seed}/{stages_left}/{epoch}"
    torch.manual_seed(zlib.crc32(f"dropout/{place}".encode()))
    return torch.Generator().manual_seed(zlib.crc32(place.encode()))


def train_epoch(model, optimizer, split: dict, index, truth, teacher, config, generator, name: str) -> dict:
    """One pass over the clips of `index` (n,), whose targets are truth (n, ...) and whose teacher's outputs are the
    rows of `teacher`. Returns the mean of each loss term."""
    model.train()
    order = data.batches({m: split["real"][m][index] for m in data.STREAMS}, config.batch_size, generator)
    step_losses = []
    for rows in tqdm(order, desc=name, unit="step", leave=False, disable=None):
        complete, missing, real = data.batch(split, index[rows], generator)
        stored = None if teacher is None else [output[rows] for output in teacher]
        terms = model.losses(complete, missing, truth[rows], real, stored)
        optimizer.zero_grad()
        terms["total"].backward()
        if config.clip:
            torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], config.clip)
        optimizer.step()
        step_losses.append(torch.stack([term.detach() for term in terms.values()]))
    values = torch.stack(step_losses).double().cpu()    # (steps, terms); the device is waited for only here
    broken = (~values.isfinite()).nonzero()
    if len(broken):
        step, term = broken[0].tolist()
        raise DataError(f"{name}, step {step + 1}: the loss term '{list(terms)[term]}' is not finite. "
                        "Try a lower --lr, and look at the features with python data.py check.")
    # One batch may be smaller: every clip counts once, not every step.
    share = torch.tensor([len(rows) for rows in order], dtype=torch.float64) / len(index)
    return dict(zip(terms, (share @ values).tolist()))


# ---------------------------------------------------------------------------------- what a run is

def describe(args, ablation: str, seed, loaded: dict) -> dict:
    """The record of one run. Two runs whose records are equal are the same run. seed: a number, or "official" where
    nothing is trained. DataError if the method refuses its settings."""
    module = METHODS[args.method]
    task = module.TASKS[args.dataset]
    flags = {name: vars(args)[name] for name in ("epochs", "batch_size", "lr") if vars(args)[name]}
    config = replace(module.PAPER[args.dataset], aligned=loaded["aligned"], **{**flags, **args.ablate[ablation]})
    try:
        with torch.device("meta"):      # no memory: only to hear now what Model refuses
            module.Model(loaded["dims"], task, config)
    except ValueError as error:
        raise DataError(f"{args.method} {ablation}: {error}.") from None
    return {
        "format": FORMAT, "method": args.method, "dataset": args.dataset, "task": task, "ablation": ablation,
        "seed": seed, "limit": args.limit, "normalize": args.normalize,
        "dims": loaded["dims"], "lacking": loaded["lacking"], "config": asdict(config),
        "constant": constant(targets(loaded["train"]["label"], task)[1], task),
        "data": {name: loaded["source"][name] for name in ("sha256", "synthetic", "sizes")},
    }


def run_folder(args, run: dict) -> Path:
    dataset = run["dataset"] + ("-synthetic" if run["data"]["synthetic"] else "")
    method = run["method"] + (f"-{run['ablation']}" if run["ablation"] else "")
    return args.out / dataset / method / f"s{run['seed']}"


def introduce(run: dict, loaded: dict, device: torch.device) -> None:
    """Print what is about to run, on which data and by which code. `run`: the first of the runs."""
    source = loaded["source"]
    for name, value in machine(device).items():
        print(f"{name}: {value}")
    print(f"data: {data.identity(source)}")
    print(f"clips: {len(loaded['train']['label'])} for training, {len(loaded['valid']['label'])} for validation; "
          f"widths {run['dims']}")
    for note in (*source["notes"], data.comparison(run, source, METHODS[run["method"]].FEATURES)[1]):
        if note:
            print(f"note: {note}")


def machine(device: torch.device) -> dict:
    """On what a run is made, and by which code."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    return {"command": f"python {shlex.join(sys.argv)}", "commit": commit(), "device": name, "versions": versions}


def commit() -> str:
    """The commit of this code, marked where files differ from it; "unknown" where git does not track this file."""
    try:
        for command in (["ls-files", "--error-unmatch", "train.py"],
                        ["describe", "--always", "--dirty", "--exclude=*"]):
            answer = subprocess.check_output(["git", *command], cwd=Path(__file__).resolve().parent,
                                             stderr=subprocess.DEVNULL, text=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return answer.strip()


# ---------------------------------------------------------------------------------- files of a run

def restore(folder: Path, run: dict, start_over: bool) -> dict:
    """What last.pt holds, or what a run begins with. Another run's folder is refused."""
    path = folder / "last.pt"
    if start_over or not path.exists():
        return {"run": run, "stage": 0, "epoch": 0, "best": None, "history": [], "finished": False}
    state = read_checkpoint(path, ("run", "history", "finished"), START_OVER)
    if differ := differences(run, state["run"]):
        raise DataError(f"{folder} holds a run of another configuration (it differs in {', '.join(differ)}). "
                        "Name another folder with --out, or start over with --no-resume.")
    return state


def tell_of_going_on(folder: Path, line: dict, device: torch.device) -> None:
    """Print after which line of the log a run goes on, and a note if it began on another device, thread count or
    torch."""
    print(f"continuing after {line['stage']} epoch {line['epoch']}")
    with data.reading(folder / "config.json", START_OVER):
        began = json.loads((folder / "config.json").read_text())
        before, now = (f"{each['device']}, torch {each['versions']['torch']}" for each in (began, machine(device)))
    if before != now:
        print(f"note: this run began on {before}, and goes on on {now}: its numbers will differ a little from those "
              "of a run that was not stopped")


def begin_folder(folder: Path, run: dict, load: dict, device) -> None:
    """Remove what an earlier run left here, and write config.json. This comes after the first epoch: a run that is
    started over and stopped at once has lost nothing."""
    for name in ("last.pt", "model.pt", "log.jsonl", "results.json", "predictions.csv"):
        (folder / name).unlink(missing_ok=True)
    data.write(folder / "config.json", json.dumps({"run": run, "load": load, **machine(device)}, indent=1).encode())


def adopt(run: dict, folder: Path, load: dict, path: Path) -> None:
    """Write a model.pt that holds the weights of the official code's published checkpoint."""
    module = METHODS[run["method"]]
    model = module.Model(run["dims"], run["task"], module.Config(**run["config"]))
    advice = "It is damaged or not the published checkpoint: download it again."
    with data.reading(path, advice):
        model.load_official(read_checkpoint(path, (), advice))
    save(folder / "model.pt", {"run": run, "load": load, "stats": None, "linear": None, "epoch": None,
                               "model": model.state_dict()})


def save_state(folder: Path, state: dict) -> None:
    """last.pt, which alone decides where a run goes on, and log.jsonl, which repeats its history. Going on is exact:
    only whole epochs are saved; batches, masks and dropout start anew from seed, stage and epoch; validation masks
    are fixed, the learning rate follows from the epoch, and the frozen teacher's outputs from its weights."""
    save(folder / "last.pt", state)
    lines = [json.dumps(line) + "\n" for line in state["history"]]
    data.write(folder / "log.jsonl", "".join(lines).encode())


def save(path: Path, content: dict) -> None:
    """torch.save, whole or not at all."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    data.write(path, buffer.getvalue())


# ---------------------------------------------------------------------------------- command line

def main(argv=None) -> int:
    args = parse(argv)
    stopped = "stopped; the same command (without --no-resume) goes on after the last finished epoch"
    return data.run_program(lambda: train_all(args), stopped)


def parse(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="python train.py --method M --dataset D [options]; -h explains them")
    add = parser.add_argument
    positive = number(int, 1, 2**31)
    add("--method", choices=METHODS, required=True)
    add("--dataset", choices=data.SIZES, required=True)
    source = parser.add_mutually_exclusive_group().add_argument
    source("--data-dir", type=os.path.abspath, default="data",
           help="a data file, or a folder that holds one (default: data)")
    source("--synthetic", action="store_true",
           help="use a made-up stand-in of the data set's size; results say SYNTHETIC")
    source("--features", type=feature_folder, nargs="+", default=(), metavar="NAME=DIR",
           help="feature folders instead of a pickle, as Double-Flow's authors have them: text=DIR audio=DIR "
           "vision=DIR simulated_text=DIR, each with a <clip>.npy or a folder <clip> of .npy for each clip; they are "
           f"used as they are, but for training clips of more than {data.MAX_FRAMES} frames, which are left out")
    add("--labels", type=os.path.abspath, metavar="FILE",
        help="the label file of --features, Double-Flow's label_official.npz")
    add("--official", type=Path, metavar="FILE",
        help="train nothing: make a run folder of the published checkpoint of Double-Flow's official code, "
        "MIA off as in its main file, for eval.py to evaluate on --features")
    add("--seeds", type=number(int, -2**63, 2**63 - 1), nargs="+", default=[1111, 1112, 1113, 1114, 1115],
        help="a run for each (default: 1111 1112 1113 1114 1115)")
    add("--epochs", type=positive, help="of each stage (default: PAPER in the method's file)")
    add("--batch-size", type=positive, help="default: PAPER in the method's file")
    add("--lr", type=number(float, 1e-37, 1e37), help="learning rate of Adam (default: PAPER in the method's file)")
    add("--ablate", nargs="+", default=[""], metavar="NAME",
        help="a run for each NAME instead of the full method, whose own name is \"\"; all: it and each name of "
        + "; ".join(f"{name}: {', '.join(module.ABLATIONS)}" for name, module in METHODS.items())
        + ". Or settings of Config in the method's file: margin=1.0 layers=3,dropout=0.2 are two runs")
    add("--no-normalize", dest="normalize", action="store_false",
        help="use the features as they are, not standardised by the training split")
    add("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, ...")
    add("--out", type=Path, default="runs", help="folder for the run folders (default: runs)")
    add("--no-resume", action="store_true", help="start over instead of going on where a run stopped")
    add("--limit", type=positive, metavar="N", help="only the first N clips of each split, for a quick look")
    add("--deterministic", action="store_true",
        help="let CUDA repeat every number bit for bit, as a CPU does anyway; slower")
    args = parser.parse_args(argv)
    if bool(args.features) != bool(args.labels):
        parser.error("--features and --labels belong together")
    if args.official and not (args.features and args.method == "double_flow"):
        parser.error("--official is for --method double_flow with --features and --labels")
    args.features = dict(args.features)
    args.normalize = args.normalize and not args.features
    # Of each ablation the changes: a misspelled one is told before the data is read.
    if "all" in args.ablate:
        args.ablate = ["", *METHODS[args.method].ABLATIONS, *args.ablate]
    args.ablate = {name: changes_of(name, args.method, parser) for name in args.ablate if name != "all"}
    if args.official:       # one run, with MIA off as in the official code's main file
        args.ablate, args.seeds = {"": {"mia": "off"}}, ["official"]
    return args


def changes_of(ablation: str, method: str, parser) -> dict:
    """The fields of Config that an ablation changes: one of ABLATIONS, or settings like margin=1.0,layers=3. A mistake
    ends the program."""
    module = METHODS[method]
    named = {"": {}, **module.ABLATIONS}
    if ablation in named:
        return named[ablation]
    defaults = asdict(module.Config())
    defaults.pop("aligned")         # which the data says
    changes = {}
    for setting in ablation.split(","):
        name, _, text = setting.partition("=")
        if name not in defaults:
            parser.error(f"--ablate {setting}: {method} has the ablations {', '.join(module.ABLATIONS)}, and the "
                         f"settings NAME=VALUE with NAME one of {', '.join(defaults)}")
        kind = type(defaults[name])
        try:
            changes[name] = {"True": True, "False": False}[text] if kind is bool else kind(text)
            if kind is int and changes[name] < 1 or kind is float and not 0 <= changes[name] < 1e37:
                raise ValueError
        except (KeyError, ValueError):
            parser.error(f"--ablate {setting}: {name} is of type {kind.__name__}, for instance {defaults[name]}")
    return changes


def feature_folder(text: str) -> tuple[str, str]:
    """NAME=DIR of --features."""
    name, _, folder = text.partition("=")
    names = (*data.STREAMS, data.SIMULATED)
    if name not in names or not folder:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=DIR with NAME one of {', '.join(names)}")
    return name, os.path.abspath(folder)


def number(kind: type, least, most):
    """The type of a number from `least` to `most`; more overflows in torch."""
    def checked(text: str):
        if not least <= kind(text) <= most:
            raise argparse.ArgumentTypeError(f"{text} is not between {least:g} and {most:g}")
        return kind(text)
    checked.__name__ = kind.__name__        # argparse says it: invalid int value
    return checked


if __name__ == "__main__":
    sys.exit(main())
