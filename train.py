"""Train a method and leave run folders that eval.py reads.

    python train.py --method corrkd --dataset mosei                     real data from data/, five seeds
    python train.py --method corrkd --dataset mosi --synthetic          made-up data, nothing to download
    python train.py --method corrkd --dataset mosi --synthetic --limit 64 --epochs 1 --seeds 1 --out runs/look

Each stage of a method ends with the epoch that is best on validation. An interrupted run goes on by the same
command, on the same machine to the same numbers (on CUDA with --deterministic). A run is a folder, of the form
<out>/<dataset>[-synthetic]/<method>[-<ablation>]/s<seed>/, with

    config.json   what the run is, and the command, code and machine that began it
    log.jsonl     one line an epoch: its loss terms, its numbers on validation, the best epoch so far
    last.pt       all that the next epoch depends on
    model.pt      the result, a dict of tensors and plain values that torch.load(path, weights_only=True) reads:
                    run     what the run is: method, data set, task, ablation, seed, config, widths of the streams, ...
                    load    the arguments of data.load that find its data again
                    stats   stream -> (mean, deviation): a frame that is not all zeros becomes (x - mean) / deviation,
                            clipped to [-5, 5]; frames of zeros stay. None: the features are used as they are
                    linear  weight and bias of the linear baseline, or None
                    epoch   in which epoch of the last stage these weights were best; None with --official
                    model   the weights, of CorrKD those of teacher, student and critics

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
from data import DataError, say
from eval import (FORMAT, METHODS, constant, device_named, evaluate, fit_linear, read_checkpoint, score,
                  targets)

START_OVER = "It is not as train.py writes it: start over with --no-resume."
LAST = ("run", "stage", "epoch", "finished", "best", "model", "optimizer", "history")     # what last.pt holds


def parse(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="python train.py --method M --dataset D [options]; -h explains them")
    add = parser.add_argument
    add("--method", choices=METHODS, required=True)
    add("--dataset", choices=data.SIZES, required=True)
    add("--data-dir", metavar="PATH", help="a data file, or a folder that holds one (default: data)")
    add("--synthetic", action="store_true",
        help="use a made-up stand-in of the data set's size; results say SYNTHETIC")
    add("--seeds", type=int, nargs="+", metavar="N", help="a run for each (default: 1111 1112 1113 1114 1115)")
    add("--epochs", type=int, metavar="N", help="of each stage (default: PAPER in the method's file)")
    add("--batch-size", type=int, metavar="N", help="default: PAPER in the method's file")
    add("--lr", type=float, metavar="X", help="learning rate of Adam (default: PAPER in the method's file)")
    add("--ablate", nargs="+", metavar="NAME",
        help="a run for each NAME instead of the full method, whose own name is \"\"; all: it and each NAME. "
        + "; ".join(f"{name}: {', '.join(module.ABLATIONS)}" for name, module in METHODS.items()))
    add("--no-normalize", action="store_true",
        help="use the features as they are, not standardised by the training split")
    own = parser.add_argument_group("the features of Double-Flow's authors").add_argument
    own("--features", type=feature_folder, nargs="+", action="extend", metavar="NAME=DIR",
        help="feature folders instead of a pickle: text=DIR audio=DIR vision=DIR simulated_text=DIR, "
        "each with a <clip>.npy or a folder <clip> of .npy for each clip; they are used as they are")
    own("--labels", metavar="FILE", help="the label file of --features, Double-Flow's label_official.npz")
    own("--max-frames", type=int, metavar="N",
        help=f"of --features leave out training clips of more than N frames (default: {data.MAX_FRAMES})")
    own("--official", type=Path, metavar="FILE",
        help="train nothing: make a run folder of the published checkpoint of Double-Flow's official code, "
        "MIA off as in its main file, for eval.py to evaluate on --features")
    add("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, ...")
    add("--out", type=Path, default=Path("runs"), help="folder for the run folders (default: runs)")
    add("--no-resume", action="store_true", help="start over instead of going on where a run stopped")
    add("--limit", type=int, metavar="N", help="only the first N clips of each split, for a quick look")
    add("--deterministic", action="store_true",
        help="let CUDA repeat every number bit for bit, as a CPU does anyway; slower")
    args = parser.parse_args(argv)
    check_arguments(args, parser.error)
    return args


def feature_folder(text: str) -> tuple[str, str]:
    """NAME=DIR of --features."""
    name, _, folder = text.partition("=")
    names = (*data.STREAMS, data.SIMULATED)
    if name not in names or not folder:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=DIR with NAME one of {', '.join(names)}")
    return name, folder


def check_arguments(args, refuse) -> None:
    """Refuse flags that exclude each other and values that make no sense, then fill in the defaults."""
    exclusive = {"synthetic": ("data_dir",), "features": ("data_dir", "synthetic", "no_normalize"),
                 "official": ("ablate", "seeds", "epochs", "batch_size", "lr", "no_resume", "limit")}
    for flag, others in exclusive.items():
        for other in others:
            if vars(args)[flag] and vars(args)[other]:
                refuse(f"--{flag} and --{other.replace('_', '-')} exclude each other")
    if bool(args.features) != bool(args.labels):
        refuse("--features and --labels belong together")
    if args.max_frames is not None and not args.features:
        refuse("--max-frames belongs to --features")
    if args.official and not (args.features and args.method == "double_flow"):
        refuse("--official is for --method double_flow with --features and --labels")
    for name in ("epochs", "batch_size", "lr", "limit", "max_frames"):
        value = vars(args)[name]
        most = 1e37 if name == "lr" else 2**31      # more overflows in torch
        if value is not None and not 0 < value < most:
            refuse(f"--{name.replace('_', '-')} must be greater than 0 and less than {most:g}, not {value}")
    if not all(-2**63 <= seed < 2**63 for seed in args.seeds or ()):
        refuse("--seeds must be of at most 64 bits")
    names = METHODS[args.method].ABLATIONS
    for name in args.ablate or ():
        if name not in ("", "all", *names):
            refuse(f"--ablate {data.printable(name)}: {args.method} has {', '.join(names)}, and all")
    if args.ablate and "all" in args.ablate:
        args.ablate = ["", *names]
    if args.features:
        streams = [name for name, _ in args.features]
        if len(set(streams)) < len(streams):
            refuse(f"--features names a stream twice: {', '.join(streams)}")
        args.features = {name: os.path.abspath(folder) for name, folder in args.features}
        args.labels = os.path.abspath(args.labels)
    args.ablate = list(dict.fromkeys(args.ablate or [""]))
    args.seeds = list(dict.fromkeys(args.seeds or [1111, 1112, 1113, 1114, 1115]))
    args.normalize = not (args.no_normalize or args.features)
    args.data_dir = os.path.abspath(args.data_dir or "data")    # so that eval.py finds it from any folder
    args.max_frames = args.max_frames or data.MAX_FRAMES


# ---------------------------------------------------------------------------------- what a run is

def describe(args, ablation: str, seed, loaded: dict) -> dict:
    """The record of one run. Two runs whose records are equal are the same run."""
    module = METHODS[args.method]
    task = module.TASKS[args.dataset]
    changes = {"mia": "off"} if args.official else dict(module.ABLATIONS.get(ablation, {}))
    for name in ("epochs", "batch_size", "lr"):
        if vars(args)[name] is not None:
            changes[name] = vars(args)[name]
    config = replace(module.PAPER[args.dataset], aligned=loaded["aligned"], **changes)
    source = loaded["source"]
    return {
        "format": FORMAT, "method": args.method, "dataset": args.dataset, "task": task, "ablation": ablation,
        "seed": seed, "limit": args.limit, "normalize": args.normalize,
        "dims": loaded["dims"], "lacking": loaded["lacking"], "config": asdict(config),
        "constant": constant(targets(loaded["train"]["label"], task)[1], task),
        "data": {name: source[name] for name in ("sha256", "synthetic", "sizes", "layout", "max_frames")},
    }


def run_folder(args, run: dict) -> Path:
    dataset = run["dataset"] + ("-synthetic" if run["data"]["synthetic"] else "")
    method = run["method"] + (f"-{run['ablation']}" if run["ablation"] else "")
    return args.out / dataset / method / f"s{run['seed']}"


def commit() -> str:
    """The commit of this code, marked where files differ from it; "unknown" where git does not track this file."""
    try:
        for command in (["ls-files", "--error-unmatch", "train.py"],
                        ["describe", "--always", "--dirty", "--exclude=*"]):
            answer = subprocess.run(["git", *command], cwd=Path(__file__).resolve().parent, capture_output=True,
                                    text=True, errors="replace", check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return answer.stdout.strip()


def machine(device: torch.device) -> dict:
    """On what a run is made, and by which code."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    return {"command": f"python {shlex.join(sys.argv)}", "commit": commit(), "device": name, "versions": versions}


def introduce(run: dict, loaded: dict, device: torch.device) -> None:
    """Print what is about to run, on which data and by which code. `run`: the first of the runs."""
    module, source, computer = METHODS[run["method"]], loaded["source"], machine(device)
    config = module.Config(**run["config"])
    model = module.Model(run["dims"], run["task"], config)
    parameters = sum(p.numel() for p in model.parameters())
    widths = " ".join(f"{m} {width}" for m, width in run["dims"].items())
    versions = ", ".join(f"{name} {version}" for name, version in computer["versions"].items())
    say(f"command: {computer['command']}")
    say(f"code: commit {computer['commit']}; {versions}")
    say(f"device: {computer['device']}")
    say(f"data: {data.identity(source)}")
    say(f"clips: {len(loaded['train']['label'])} for training, {len(loaded['valid']['label'])} for validation; "
        f"widths {widths}")
    for note in (*source["notes"], data.comparison(run, source, module.FEATURES)[1]):
        if note:
            say(f"note: {note}")
    say(f"model: {run['method']}, {parameters:,} parameters; {config}")


# ---------------------------------------------------------------------------------- files of a run

def save(path: Path, content: dict) -> None:
    """torch.save, whole or not at all."""
    buffer = io.BytesIO()       # torch tells a full disk as a RuntimeError; a file of our own raises an OSError
    torch.save(content, buffer)
    with data.replacing(path) as file:
        file.write(buffer.getvalue())


def save_json(path: Path, lines: list, indent=None) -> None:
    with data.replacing(path) as file:
        for line in lines:
            file.write(json.dumps(line, indent=indent).encode() + b"\n")


def begin_folder(folder: Path, run: dict, load: dict, device) -> None:
    """Remove what an earlier run left here, and what a killed process left half-written, and write config.json. This
    comes after the first epoch: a run that is started over and stopped at once has lost nothing."""
    for name in ("last.pt", "model.pt", "log.jsonl", "results.json", "predictions.csv"):
        (folder / name).unlink(missing_ok=True)
    for path in folder.glob("*.tmp"):
        if not path.is_dir():
            path.unlink()
    save_json(folder / "config.json", [{"run": run, "load": load, **machine(device)}], indent=1)


def save_state(folder: Path, state: dict) -> None:
    """last.pt, which alone decides where a run goes on, and log.jsonl, which repeats its history. Going on is exact:
    only whole epochs are saved; batches, masks and dropout start anew from seed, stage and epoch; validation masks
    are fixed, the learning rate follows from the epoch, and the frozen teacher's outputs from its weights."""
    save(folder / "last.pt", state)
    save_json(folder / "log.jsonl", state["history"])


def save_model(folder: Path, state: dict, loaded: dict, load: dict, linear: dict | None) -> None:
    """model.pt: the weights of the best epoch so far in the last stage."""
    best = state["best"]
    save(folder / "model.pt", {"run": state["run"], "load": load, "stats": loaded["stats"], "linear": linear,
                               "epoch": best["epoch"], "model": best["weights"]})


def restore(folder: Path, run: dict) -> dict | None:
    """What last.pt holds, or None where nothing is to go on from. Another run's folder is refused."""
    path = folder / "last.pt"
    if not path.exists():
        return None
    state = read_checkpoint(path, LAST, START_OVER)
    if state["run"] != run:
        new, old = [{**record, **record["config"], **record["data"]} for record in (run, state["run"])]
        told = [name for name in new if name not in ("config", "data", "constant")]     # constant follows from others
        differ = [name for name in told if new[name] != old.get(name)]
        raise DataError(f"{folder} holds a run of another configuration (it differs in {', '.join(differ)}). "
                        "Name another folder with --out, or start over with --no-resume.")
    with data.reading(path, START_OVER):
        place = state["stage"], state["epoch"], len(state["history"]), state["best"]["epoch"]
        whole = all(type(number) is int for number in place)
        if not whole or min(place) < 0 or set(state["best"]) != {"score", "epoch", "weights"}:
            raise ValueError
    return state


# ---------------------------------------------------------------------------------- training

def seed_epoch(seed: int, stages_left: int, epoch: int) -> torch.Generator:
    """Seed dropout, and return the generator of batches and masks: two streams of random numbers that share
    nothing. They depend on these three numbers alone, so a run that was stopped goes on with the same ones. Stages
    are counted from the end, so that the last stage of every ablation sees the same batches and masks."""
    place = f"{seed}/{stages_left}/{epoch}"
    torch.manual_seed(zlib.crc32(f"dropout/{place}".encode()))
    return torch.Generator().manual_seed(zlib.crc32(place.encode()))


@torch.no_grad()
def teacher_rows(model, split: dict, index: torch.Tensor) -> list[torch.Tensor] | None:
    """The frozen teacher's outputs on each complete clip of `index`, or None where the stage has no teacher.
    They do not change during a stage, so they are computed once."""
    parts = []
    for clips in index.split(256):
        complete, _, real = data.batch(split, clips)
        outputs = model.teacher_outputs(complete, real)
        if outputs is None:
            return None
        parts.append(outputs)
    return [torch.cat(column) for column in zip(*parts)]


def train_epoch(model, optimizer, split: dict, index, truth, teacher, config, generator, name: str) -> dict:
    """One pass over the clips of `index` (n,), whose targets are truth (n, ...) and whose teacher's outputs are the
    rows of `teacher`. Returns the mean of each loss term."""
    model.train()
    parameters = optimizer.param_groups[0]["params"]
    real = {m: split["real"][m][index] for m in data.STREAMS}
    order = data.batches(real, config.batch_size, generator)
    step_losses = []
    for rows in tqdm(order, desc=name, unit="step", leave=False, disable=None):
        complete, missing, real = data.batch(split, index[rows], generator)
        stored = None if teacher is None else [output[rows] for output in teacher]
        terms = model.losses(complete, missing, truth[rows], real, stored)
        optimizer.zero_grad()
        terms["total"].backward()
        if config.clip:
            torch.nn.utils.clip_grad_norm_(parameters, config.clip)
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


def begin_stage(model, stage: str, config, state: dict, path: Path) -> torch.optim.Adam:
    """The optimizer of a stage that begins, or goes on from `state`, which is what last.pt at `path` holds."""
    model.begin(stage)
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(learning, lr=config.lr, weight_decay=config.weight_decay)
    if state["epoch"]:
        with data.reading(path, START_OVER):
            optimizer.load_state_dict(state["optimizer"])
    return optimizer


def train(run: dict, folder: Path, loaded: dict, load: dict, linear: dict | None, device, state: dict | None) -> None:
    """All stages of one run, from `state` on, which is what last.pt holds, or from the beginning (None)."""
    module = METHODS[run["method"]]
    config = module.Config(**run["config"])
    index, truth = targets(loaded["train"]["label"].cpu(), run["task"])
    truth = truth.to(device)
    torch.manual_seed(run["seed"])
    model = module.Model(run["dims"], run["task"], config).to(device)
    stages = list(model.stages)
    if state is None:
        state = {"run": run, "stage": 0, "epoch": 0, "best": None, "history": []}
    else:
        with data.reading(folder / "last.pt", START_OVER):
            model.load_state_dict(state["best"]["weights"])     # only to see that they fit
            model.load_state_dict(state["model"])
            say(f"continuing after {stages[state['stage']]} epoch {state['epoch']}")

    for number in range(state["stage"], len(stages)):
        stage, last = stages[number], number == len(stages) - 1
        optimizer = begin_stage(model, stage, config, state, folder / "last.pt")
        teacher = teacher_rows(model, loaded["train"], index)
        sets = data.distinct(model.stages[stage], run["lacking"])       # the best epoch is chosen on these

        for epoch in range(state["epoch"], config.epochs):
            began, name = time.perf_counter(), f"{stage} {epoch + 1}/{config.epochs}"
            generator = seed_epoch(run["seed"], len(stages) - number, epoch)
            if hasattr(module, "learning_rate_factor"):
                optimizer.param_groups[0]["lr"] = config.lr * module.learning_rate_factor(epoch)
            losses = train_epoch(model, optimizer, loaded["train"], index, truth, teacher, config, generator, name)
            valid = validate(model, run["task"], loaded["valid"], sets, name)

            better = epoch == 0 or score(valid) > state["best"]["score"]
            if better:      # a copy: the weights themselves go on changing
                weights = {key: value.clone() for key, value in model.state_dict().items()}
                state["best"] = {"score": score(valid), "epoch": epoch + 1, "weights": weights}
            line = {"stage": stage, "epoch": epoch + 1, "best": state["best"]["epoch"],
                    "losses": losses, "valid": valid}
            state = {**state, "stage": number, "epoch": epoch + 1, "finished": last and epoch + 1 == config.epochs,
                     "model": model.state_dict(), "optimizer": optimizer.state_dict(),
                     "history": [*state["history"], line]}
            if number == 0 and epoch == 0:
                begin_folder(folder, run, load, device)
            # Before last.pt: a run that is stopped in between repeats this epoch.
            if last and (better or not (folder / "model.pt").exists()):
                save_model(folder, state, loaded, load, linear)
            save_state(folder, state)
            say(f"{name}  {loss_text(losses)}  {valid_text(valid)}{', the best' if better else ''}  "
                f"{time.perf_counter() - began:.1f} s")

        model.load_state_dict(state["best"]["weights"])     # the next stage goes on from the best epoch
        state["epoch"] = 0


def validate(model, task: str, split: dict, sets, name: str) -> dict:
    """eval.evaluate on the validation split; answers that are not finite are told with the epoch's name."""
    try:
        return evaluate(model, task, split, sets, "valid")
    except DataError as error:
        raise DataError(f"{name}: {error}") from None


def adopt(run: dict, folder: Path, load: dict, path: Path) -> None:
    """A run folder whose model.pt holds the weights of the official code's published checkpoint."""
    module = METHODS[run["method"]]
    model = module.Model(run["dims"], run["task"], module.Config(**run["config"]))
    weights = read_checkpoint(path, (), "It is damaged or no checkpoint: download it again.")
    try:
        model.load_official(weights)
    except ValueError as error:
        raise DataError(f"--official {path}: {error}.") from None
    folder.mkdir(parents=True, exist_ok=True)
    save(folder / "model.pt", {"run": run, "load": load, "stats": None, "linear": None, "epoch": None,
                               "model": model.state_dict()})
    say(f"{folder} holds the weights of {path}; evaluate it: python eval.py {shlex.quote(str(folder))}")


def loss_text(losses: dict) -> str:
    return " ".join(f"{name} {value:.3f}" for name, value in losses.items())


def valid_text(valid: dict) -> str:
    sets = "complete clips" if list(valid) == ["lav"] else f"mean of {len(valid)} sets"
    regresses = any("MAE" in cell for cell in valid.values())
    number = f"MAE {-score(valid):.4f}" if regresses else f"F1 {score(valid):.2f}"
    return f"valid, {sets}: {number}"


# ---------------------------------------------------------------------------------- the program

def train_all(args) -> None:
    """Train every run that is asked for."""
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")     # without it CUDA's matrix products refuse
    torch.use_deterministic_algorithms(args.deterministic)
    device = device_named(args.device)
    load = {name: vars(args)[name] for name in ("data_dir", "synthetic", "features", "labels", "max_frames")}
    loaded = data.load(args.dataset, splits=("train", "valid"), device=device, normalize=args.normalize,
                       limit=args.limit, **load)
    if args.official:
        run = describe(args, "", "official", loaded)
        introduce(run, loaded, device)
        adopt(run, run_folder(args, run), load, args.official)
        return

    runs = [describe(args, ablation, seed, loaded) for ablation in args.ablate for seed in args.seeds]
    introduce(runs[0], loaded, device)
    linear = fit_linear(loaded, runs[0]["task"])
    for run in runs:
        folder = run_folder(args, run)
        folder.mkdir(parents=True, exist_ok=True)
        data.check_writable(folder)
        say()
        say(str(folder))
        state = None if args.no_resume else restore(folder, run)
        if state and state["finished"]:
            say("finished already")
            save_json(folder / "log.jsonl", state["history"])
            if not (folder / "model.pt").exists():      # it was deleted: last.pt holds the best weights too
                save_model(folder, state, loaded, load, linear)
                say("model.pt was missing, and is written again")
        else:
            train(run, folder, loaded, load, linear, device, state)
    groups = dict.fromkeys(str(run_folder(args, run).parent) for run in runs)
    say()
    say(f"the test table: python eval.py {shlex.join(groups)}")


def main(argv=None) -> int:
    args = parse(argv)
    again = "without --no-resume the same command" if args.no_resume else "the same command"
    return data.run_program(lambda: train_all(args), f"stopped; {again} goes on after the last finished epoch")


if __name__ == "__main__":
    sys.exit(main())
