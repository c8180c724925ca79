"""Train a method and leave run folders that eval.py reads.

    python train.py --method corrkd --dataset mosei                     real data from data/, five seeds
    python train.py --method corrkd --dataset mosei --synthetic         made-up data, nothing to download

A run is runs/<dataset>[-synthetic]/<method>[-<ablation>]/s<seed>/ with config.json, log.jsonl (one line an epoch),
model.pt (the mean of the weights after each of five epochs in a row, those best on validation) and last.pt. An
interrupted run goes on by the same command, to the same numbers.
"""
import argparse
import io
import json
import multiprocessing
import os
import platform
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import data         # first: it tells a stop while torch is imported
import numpy as np
import torch
from tqdm import tqdm

import eval as evaluation
from data import DataError
from eval import METHODS

AVERAGED = 5    # epochs in a row whose weights are averaged: our choice, see the README
KEPT = {}       # what a process of --jobs keeps from run to run: its device, and the data

try:
    import fcntl
except ImportError:     # Windows has no such locks: two processes in one folder are not noticed there
    fcntl = None


def parse(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     usage="python train.py --method M --dataset D [options]; -h explains them")
    add = parser.add_argument
    add("--method", choices=METHODS, required=True)
    add("--dataset", choices=data.SIZES, required=True)
    add("--data-dir", default="data", help="a data file or a folder that holds one (default: data)")
    add("--synthetic", nargs="?", const=True, default=False, choices=("overlapping",), help="use a made-up stand-in of "
        "the data set's size; results say SYNTHETIC; overlapping: what one stream holds, the two others hold too")
    add("--seeds", type=int, nargs="+", default=[1111, 1112, 1113, 1114, 1115], help="a run each (1111 ... 1115)")
    add("--epochs", type=int, help="for each stage (default: the method file's)")
    add("--batch-size", type=int, help="default: the method file's")
    add("--lr", type=float, help="learning rate of Adam (default: the method file's)")
    add("--ablate", nargs="+", default=[""], metavar="NAME", help="a run for each NAME instead of the full method; "
        "all: the full method and each NAME; "
        + "; ".join(f"{name}: {', '.join(module.ABLATIONS)}" for name, module in METHODS.items()))
    add("--normalize", action=argparse.BooleanOptionalAction,
        help="standardise the features by the training split (default: on; --features are used as they are)")
    add("--features", nargs="+", type=data.folder, metavar="NAME=DIR",
        help="feature folders instead of a pickle: text=DIR audio=DIR vision=DIR simulated_text=DIR, "
        "each with a <clip>.npy or a folder <clip> of .npy for each clip")
    add("--labels", type=Path, metavar="FILE", help="the label file of --features, Double-Flow's label_official.npz")
    add("--max-frames", type=int, default=data.MAX_FRAMES, metavar="N",
        help=f"of --features leave out training clips of more than N frames (default {data.MAX_FRAMES})")
    add("--official", type=Path, metavar="FILE", help="train nothing: a run folder of the published checkpoint of "
        "Double-Flow's official code, MIA off as in its main file, for eval.py to evaluate on --features")
    add("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, ...")
    add("--out", type=Path, default=Path("runs"), help="folder for the run folders (default: runs)")
    add("--resume", action=argparse.BooleanOptionalAction, default=True, help="go on where a run stopped")
    add("--dry-run", action="store_true", help="load, build, run one batch of each stage, write nothing")
    add("--limit", type=int, metavar="N", help="only the first N clips of each split, for a quick look")
    add("--jobs", type=int, default=1, metavar="N", help="runs side by side, in N processes that share the threads and "
        "hold the data once each (default 1)")
    add("--deterministic", action="store_true", help="let CUDA repeat every number bit for bit, as a CPU does anyway; "
        "slower")
    args = parser.parse_args(argv)
    if args.features and (args.normalize or args.synthetic):
        parser.error("--features are used as they are: leave --normalize and --synthetic out")
    if bool(args.features) != bool(args.labels):
        parser.error("--features and --labels belong together")
    if args.official and not (args.features and args.method == "double_flow"):
        parser.error("--official is for --method double_flow with --features and --labels")
    args.features = args.features and dict(args.features)
    args.normalize = not args.features if args.normalize is None else args.normalize
    for name in ("epochs", "batch_size", "lr", "limit", "jobs", "max_frames"):
        value = vars(args)[name]
        if value is not None and not 0 < value < float("inf"):
            parser.error(f"--{name.replace('_', '-')} must be greater than 0, not {value}")
    known = METHODS[args.method].ABLATIONS
    if "all" in args.ablate:
        args.ablate = ["", *known]
    for name in filter(None, args.ablate):
        if name not in known:
            parser.error(f"--ablate {name}: {args.method} has {', '.join(known)}, and all")
    return args


def describe(args, ablation: str, seed: int, loaded: dict) -> dict:
    """The record of one run: the method's config for this data set, with what the command line, the ablation and the
    data's form change."""
    module = METHODS[args.method]
    changes = {k: v for k in ("epochs", "batch_size", "lr") if (v := vars(args)[k]) is not None}
    config = replace(module.PAPER[args.dataset], **changes, aligned=loaded["aligned"],
                     **({"mia": "off"} if args.official else module.ABLATIONS.get(ablation, {})))
    return evaluation.run_record(args.method, args.dataset, ablation, seed, config, loaded, args.normalize, args.limit)


def run_name(method: str, ablation: str, seed) -> str:
    return f"{method}{'-' if ablation else ''}{ablation}/s{seed}"


def run_folder(args, run: dict) -> Path:
    under = run["dataset"] + ("-synthetic" if run["data"]["synthetic"] else "")
    return args.out / under / run_name(run["method"], run["ablation"], run["seed"])


def machine(device: torch.device) -> dict:
    """On what a run was made, and by which code: its commit, marked where files differ from it."""
    here = Path(__file__).resolve().parent
    try:
        said = subprocess.run(["git", "describe", "--always", "--dirty", "--exclude=*"], cwd=here, capture_output=True,
                              text=True).stdout.strip()
    except OSError:
        said = ""
    name = (torch.cuda.get_device_name(device) if device.type == "cuda"
            else f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads")
    return {"command": f"python {' '.join(sys.argv)}", "commit": said or "unknown", "device": name,
            "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}}


# ---------------------------------------------------------------------------------- the state of a run

@contextmanager
def locked(folder: Path):
    """Create the folder, and keep other processes out of it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder, os.O_RDONLY) if fcntl else None
    except OSError as error:
        raise DataError(f"--out: {folder} cannot be made: {error.strerror}.") from None
    try:
        if fcntl:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise DataError(f"{folder} is in use by another process. Wait for it, or name another --out.") from None
            except OSError:         # a file system without locks
                pass
        yield
    finally:
        if lock is not None:
            os.close(lock)


def save(path: Path, content: dict) -> None:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    with data.replacing(path) as file:
        file.write(buffer.getvalue())


def save_epoch(folder: Path, state: dict, answer: dict | None) -> None:
    """last.pt, all that the next epoch depends on, which alone decides where a run goes on. model.pt, which the last
    stage writes, goes before it and the log after it, which is always the history of last.pt."""
    if answer:
        save(folder / "model.pt", answer)
    save(folder / "last.pt", state)
    write_log(folder, state)


def write_log(folder: Path, state: dict) -> None:
    with data.replacing(folder / "log.jsonl") as file:
        file.write("".join(json.dumps(line) + "\n" for line in state["history"]).encode())


def restore(folder: Path, run: dict, resume: bool, device: torch.device) -> dict | None:
    """last.pt of a folder that holds this very run, None where there is nothing to go on from."""
    if not resume:
        for name in ("config.json", "last.pt", "model.pt", "log.jsonl", "results.json"):
            (folder / name).unlink(missing_ok=True)
    for name in ("config.json", "last.pt", "model.pt", "log.jsonl"):     # what a killed process left half-written
        for left in folder.glob(f"{name}.*.tmp"):
            left.unlink()
    path = folder / "config.json"
    if not path.exists():
        with data.replacing(path) as file:
            file.write(json.dumps({"run": run, **machine(device)}, indent=1).encode())
    for path in (path, folder / "last.pt"):
        if not path.exists():
            return None
        with data.told(path, "It is damaged, or of another version of train.py: start over with --no-resume."):
            found = json.loads(path.read_text()) if path.suffix == ".json" else evaluation.read_checkpoint(
                path, ("model", "finished", "stage", "epoch", "best", "recent", "history", "optimizer", "random"))
            differ = evaluation.differences(run, found["run"])
        if differ:
            raise DataError(f"{folder} holds a run of another configuration (differs in {', '.join(differ)}). "
                            "Name another folder with --out, or start over with --no-resume.")
    write_log(folder, found)    # which a process that was killed may have had no time to write
    return found


def random_state(generator: torch.Generator, device: torch.device, state: dict | None = None) -> dict:
    """The state of every random generator in use; sets it first if one is given."""
    if state:
        torch.set_rng_state(state["torch"])
        generator.set_state(state["masks"])
        if device.type == "cuda" and "cuda" in state:       # not if the run was begun on a CPU
            torch.cuda.set_rng_state(state["cuda"], device)
    cuda = {"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {}
    return {"torch": torch.get_rng_state(), "masks": generator.get_state(), **cuda}


# ---------------------------------------------------------------------------------- training

class Clips:
    """The training clips that count, and what a step needs of them."""

    def __init__(self, run: dict, loaded: dict, device: torch.device):
        self.split, self.device = loaded["train"], device
        self.there, self.truth = evaluation.targets(self.split["label"], run["task"])
        self.index, self.generator, self.fixed = self.there.cpu(), torch.Generator(), None
        self.real = {m: r[self.index] for m, r in self.split["real"].items()}

    def batch(self, model, rows: torch.Tensor) -> tuple:
        """What model.losses asks for, of the clips at these rows of self.index: two copies to the device, no wait."""
        def draw(real):
            return data.training_masks(real, self.generator)
        there, = data.sent([rows], self.device)
        streams, real, present = data.batch(self.split, self.index[rows], self.there[there],
                                            draw if model.sees_missing else None)
        missing = {m: streams[m] * present[m][..., None] for m in present} or None
        return streams, missing, self.truth[there], real, self.fixed and tuple(t[there] for t in self.fixed)

    @torch.no_grad()
    def teacher_outputs(self, model) -> tuple | None:
        """The frozen teacher's answers on every complete training clip, once; None if this stage needs none."""
        if not model.has_teacher:
            return None
        model.eval()
        parts = [model.teacher_outputs(*data.batch(self.split, index, there)[:2])
                 for index, there in zip(self.index.split(256), self.there.split(256))]
        return tuple(torch.cat(p) for p in zip(*parts))


def train_epoch(model, optimizer, clips: Clips, config, name: str) -> dict:
    """One pass over the training clips; returns the mean of each loss term. The device is waited for at its end."""
    model.train()
    order = data.batches(clips.real, torch.arange(len(clips.index)), config.batch_size, clips.generator)
    parameters, values = [p for p in model.parameters() if p.requires_grad], []
    for batch in data.ahead(clips.split, (clips.batch(model, rows) for rows in order)):
        terms = model.losses(*batch)
        values.append(torch.stack([t.detach() for t in terms.values()]))
        optimizer.zero_grad(set_to_none=True)
        terms["total"].backward()
        if config.clip:
            torch.nn.utils.clip_grad_norm_(parameters, config.clip)
        optimizer.step()
    values = torch.stack(values).double().cpu()         # (steps, terms)
    for step, term in (~values.isfinite()).nonzero()[:1].tolist():
        raise DataError(f"{name}, step {step + 1}: the loss term '{list(terms)[term]}' is not finite. "
                        "Try a lower --lr, and look at the features with python data.py check.")
    share = torch.tensor([len(rows) for rows in order], dtype=torch.float64) / len(clips.index)
    return dict(zip(terms, (share @ values).tolist()))


def train(run: dict, folder: Path, loaded: dict, device: torch.device, state: dict | None, tell) -> None:
    """All stages of one run, from `state` (last.pt) on if there is one. After each epoch the mean of the weights of the
    last few is measured on validation; a stage ends with the best of these means. tell(line, epochs): see progress."""
    module, fresh = METHODS[run["method"]], state is None
    config, clips = module.Config(**run["config"]), Clips(run, loaded, device)
    linear = evaluation.fit_linear(loaded, run["task"])
    torch.manual_seed(run["seed"])
    if fresh:
        model = module.Model(run["dims"], run["task"], config).to(device)
        state = {"run": run, "stage": 0, "epoch": 0, "best": None, "recent": [], "history": []}
    else:
        model = evaluation.build(state, folder / "last.pt", device)
        tell(f"continuing after {list(model.stages)[state['stage']]} epoch {state['epoch']}", len(state["history"]))
    stages = list(model.stages)
    for number in range(state["stage"], len(stages)):
        stage, last = stages[number], number == len(stages) - 1
        sets = data.answerable(data.SETS if last else model.stages[stage], run["lacking"])
        model.begin(stage)
        learning = {k: p for k, p in model.named_parameters() if p.requires_grad}
        if fresh:
            # Counted from the end: the last stage of every ablation sees the same masks and batches.
            torch.manual_seed(run["seed"] + len(stages) - 1 - number)
            clips.generator.manual_seed(run["seed"] + len(stages) - 1 - number)
        clips.fixed = clips.teacher_outputs(model)
        optimizer = torch.optim.Adam(learning.values(), lr=config.lr, weight_decay=config.weight_decay)
        if not fresh:
            model.load_state_dict(state["recent"][-1], strict=False)
            optimizer.load_state_dict(state["optimizer"])
            random_state(clips.generator, device, state["random"])
        fresh = True            # from the next stage on
        for epoch in range(state["epoch"], config.epochs):
            began, name = time.perf_counter(), f"{stage} {epoch + 1}/{config.epochs}"
            optimizer.param_groups[0]["lr"] = config.lr * module.learning_rate_factor(epoch)
            losses = train_epoch(model, optimizer, clips, config, name)
            recent = [*state["recent"], {k: p.detach().to("cpu", copy=True) for k, p in learning.items()}]
            recent = recent[-AVERAGED:]
            model.load_state_dict(averaged(recent), strict=False)
            found = evaluation.evaluate(model, run["task"], loaded["valid"], sets, "valid")
            own = {c: v for c, v in found.items() if c in model.stages[stage]}      # the sets that this stage is about
            score = evaluation.score(own)
            if epoch < AVERAGED or score > state["best"]["score"]:      # a mean of fewer epochs gives way to the next
                state.update(best={"score": score, "epoch": epoch + 1},
                             model={k: v.clone() for k, v in model.state_dict().items()})
            state["history"].append({"stage": stage, "epoch": epoch + 1, "best": state["best"]["epoch"],
                                     "losses": losses, "valid": found})
            finished = last and epoch + 1 == config.epochs      # then nothing goes on from here
            state.update(stage=number, epoch=epoch + 1, finished=finished, recent=[] if finished else recent,
                         optimizer={} if finished else optimizer.state_dict(),
                         random=random_state(clips.generator, device))
            answer = {"run": run, "stats": loaded["stats"], "linear": linear, "epoch": state["best"]["epoch"],
                      "model": state["model"]}
            save_epoch(folder, state, answer if last else None)
            tell(f"{name}  {terms_text(losses)}  {valid_text(own, score)}  "
                 f"{time.perf_counter() - began:.1f} s", 1)
            model.load_state_dict(recent[-1], strict=False)
        if not last:
            model.load_state_dict(state["model"])
            state.update(epoch=0, recent=[])


def dry(run: dict, loaded: dict, device: torch.device, tell) -> None:
    """One batch of each stage, nothing written."""
    module, clips = METHODS[run["method"]], Clips(run, loaded, device)
    model = module.Model(run["dims"], run["task"], module.Config(**run["config"])).to(device).train()
    for stage in model.stages:
        model.begin(stage)
        clips.generator.manual_seed(run["seed"])
        terms = model.losses(*clips.batch(model, torch.arange(min(run["config"]["batch_size"], len(clips.index)))))
        terms["total"].backward()
        tell(f"{stage}, one batch: {terms_text({k: v.item() for k, v in terms.items()})}")


def adopt(run: dict, folder: Path, path: Path) -> None:
    """A run folder whose model.pt holds the weights of the official code's published checkpoint."""
    module = METHODS[run["method"]]
    model = module.Model(run["dims"], run["task"], module.Config(**run["config"]))
    with data.told(f"--official {path}", "It is damaged, or not the published checkpoint."):
        content = evaluation.read_tensors(path, "cpu")
        try:
            model.load_official(content)
        except ValueError as error:
            raise DataError(f"--official {path}: {error}.") from None
    with locked(folder):
        answer = {"run": run, "stats": None, "linear": None, "epoch": None, "model": model.state_dict()}
        save(folder / "model.pt", answer)
    print(f"{folder} holds the weights of {path}; evaluate it: python eval.py {folder}")


def averaged(states: list[dict]) -> dict:
    return {k: torch.stack([s[k] for s in states]).mean(0) for k in states[0]}


def terms_text(losses: dict) -> str:
    return " ".join(f"{k} {v:.3f}" for k, v in losses.items() if k != "scd_active")


def valid_text(found: dict, score: float) -> str:
    of = "complete clips" if list(found) == ["lav"] else f"mean of {len(found)} sets"
    return f"valid, {of}: " + (f"MAE {-score:.4f}" if "MAE" in found["lav"] else f"F1 {score:.2f}")


# ---------------------------------------------------------------------------------- the program

def load(args, device: torch.device) -> dict:
    return data.load(args.dataset, args.data_dir, ("train", "valid"), device, args.normalize, synthetic=args.synthetic,
                     limit=args.limit, features=args.features, labels=args.labels, max_frames=args.max_frames)


def introduce(run: dict, loaded: dict, device: torch.device) -> None:
    """What is about to run, so that a log answers every later question."""
    source, here, module = loaded["source"], machine(device), METHODS[run["method"]]
    sizes = "/".join(str(len(loaded[s]["label"])) for s in ("train", "valid"))
    print(f"command: {here['command']}")
    print(f"code: commit {here['commit']}; " + ", ".join(f"{k} {v}" for k, v in here["versions"].items()))
    print(f"device: {here['device']}")
    print(f"data: {source['file']}" + (f", SHA-256 {source['sha256']}" if source["sha256"] else "")
          + f"; {sizes} training/validation clips, widths " + " ".join(f"{m} {w}" for m, w in loaded["dims"].items()))
    compared = data.comparison(run, source, module.FEATURES)[1]
    for note in filter(None, (*source["notes"], compared, evaluation.unlisted(run))):
        print(f"note: {note}")
    config = module.Config(**run["config"])
    count = sum(p.numel() for p in module.Model(run["dims"], run["task"], config).parameters())
    print(f"model: {run['method']}, {count:,} parameters; {config}", flush=True)


def closing(args, done: dict[str, list[Path]]) -> None:
    """The validation table of the runs just made, from their folders, and the command for the test table."""
    for ablation, folders in done.items():
        found = []
        for folder in folders:
            lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
            found += [x["valid"] for x in lines if (x["stage"], x["epoch"]) == (lines[-1]["stage"], lines[-1]["best"])]
        run, rows = json.loads((folder / "config.json").read_text())["run"], []
        for metric in (metrics := evaluation.measured(found[0])):
            each = [evaluation.cells("sets", f, metric) for f in found]
            rows += evaluation.records("sets", metric, "ours", "ours", each)
        name = " ".join(filter(None, (args.method, ablation, "on", args.dataset,
                                      "SYNTHETIC" if run["data"]["synthetic"] else "",
                                      evaluation.simulation(args.method, run["dims"]))))
        print(f"\nvalidation, {name} ({evaluation.units(metrics)})")
        print(evaluation.show(rows, "sets", metrics, evaluation.TITLES, "text"))
    folders = [str(f.parent) for folders in done.values() for f in folders]
    print(f"\nthe test table: python eval.py {os.path.commonpath(folders)}", flush=True)


@contextmanager
def progress(total: int, name: str = "", place: int = 0):
    """tell(line, epochs=0): print a line, and move the terminal's bar of `total` epochs on. name: of one run of several
    side by side, which has a bar of its own at this place, and its last line in it."""
    hidden = not sys.stderr.isatty()
    with tqdm(total=total, desc=name, position=place, unit="epoch", leave=False, disable=hidden) as bar:
        def tell(line: str, epochs: int = 0) -> None:
            if name and not hidden:
                bar.set_postfix_str(line.strip())
            else:
                with tqdm.external_write_mode():
                    print(f"{name}: {line.strip()}" if name else line, flush=True)
            bar.update(epochs)
        yield tell


def epochs_of(run: dict) -> int:
    """How many epochs a run has in all its stages."""
    module = METHODS[run["method"]]
    config = module.Config(**run["config"])
    return len(module.Model(run["dims"], run["task"], config).stages) * config.epochs


def one_run(args, run: dict, loaded: dict, device: torch.device, tell) -> Path:
    """Train one run of the plan, from where it stopped; returns its folder."""
    folder = run_folder(args, run)
    tell(f"\n{folder}")
    if args.dry_run:
        dry(run, loaded, device, tell)
        return folder
    with locked(folder):
        state = restore(folder, run, args.resume, device)
        if state and state["finished"]:
            tell("finished already", len(state["history"]))
        else:
            train(run, folder, loaded, device, state, tell)
    return folder


def work(args, ablation: str, seed: int, first: bool, threads: int) -> Path:
    """One run in a process of side_by_side, which loads the data for its first one and keeps it."""
    torch.set_num_threads(threads)
    if not KEPT:
        torch.use_deterministic_algorithms(args.deterministic)
        device = evaluation.device_named(args.device)
        KEPT.update(device=device, loaded=load(args, device))
    run = describe(args, ablation, seed, KEPT["loaded"])
    if first:
        introduce(run, KEPT["loaded"], KEPT["device"])
    place = int(multiprocessing.current_process().name.rpartition("-")[2]) - 1
    with progress(epochs_of(run), run_name(args.method, ablation, seed), place) as tell:
        return one_run(args, run, KEPT["loaded"], KEPT["device"], tell)


def side_by_side(args, plan: list) -> dict:
    """(ablation, seed) -> folder of the runs that did not fail. `jobs` processes share the threads, load the data once
    each and take the next run when they have done one."""
    context, folders, told = multiprocessing.get_context("spawn"), {}, set()
    with ProcessPoolExecutor(args.jobs, context, tqdm.set_lock, (context.RLock(),)) as pool:
        # A stop from the keyboard is for this process, which then ends the others.
        stopping = signal.signal(signal.SIGINT, signal.SIG_IGN)
        coming = {}
        for i, one in enumerate(plan):
            beside = min(args.jobs, len(plan) - i // args.jobs * args.jobs)      # in the last round there may be fewer
            threads = max(1, (os.cpu_count() or 1) // beside)
            coming[pool.submit(work, args, *one, i == 0, threads)] = one
        signal.signal(signal.SIGINT, stopping)
        try:
            for future in as_completed(coming):
                try:
                    folders[coming[future]] = future.result()
                except (DataError, BrokenProcessPool) as error:
                    reason = f": error: {error}" if str(error) not in told else " for the same reason"
                    print(f"{run_name(args.method, *coming[future])} failed{reason}", file=sys.stderr, flush=True)
                    told.add(str(error))
        except KeyboardInterrupt:
            for child in multiprocessing.active_children():
                child.terminate()
            raise
    return folders


def main(argv=None) -> int:
    args = parse(argv)
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")     # without it CUDA's matrix products refuse
    torch.use_deterministic_algorithms(args.deterministic)
    seeds = args.seeds[:1] if args.dry_run else dict.fromkeys(args.seeds)
    plan, done = [(ablation, seed) for ablation in dict.fromkeys(args.ablate) for seed in seeds], {}
    try:
        if args.jobs > 1 and len(plan) > 1 and not (args.dry_run or args.official):
            folders = side_by_side(args, plan)
        else:
            device = evaluation.device_named(args.device)
            loaded = load(args, device)
            runs = [describe(args, *one, loaded) for one in ([("", "official")] if args.official else plan)]
            introduce(runs[0], loaded, device)
            if args.official:
                adopt(runs[0], run_folder(args, runs[0]), args.official)
                return 0
            with progress(sum(map(epochs_of, runs))) as tell:
                folders = {one: one_run(args, run, loaded, device, tell) for one, run in zip(plan, runs)}
        for ablation, seed in plan:
            if (ablation, seed) in folders:
                done.setdefault(ablation, []).append(folders[ablation, seed])
        if done and not args.dry_run:
            closing(args, done)
        return 2 if len(folders) < len(plan) else 0
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on after the last finished epoch", file=sys.stderr)
        return 130


if __name__ == "__main__":
    code = main()
    if code == 130:         # stopped from the keyboard: not to wait for torch's clean-up, which takes a second
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)
