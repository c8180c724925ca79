"""Train a method and leave a run folder that eval.py reads.

    python train.py --method corrkd --dataset mosei                     real data from data/, five seeds
    python train.py --method corrkd --dataset mosi --synthetic          made-up data, nothing to download

A run is runs/<method>-<dataset>[-synthetic][-ablation]-s<seed>/ with config.json, log.jsonl (one line an epoch),
best.pt (chosen on validation) and last.pt. An interrupted run goes on by the same command, to the same numbers.
"""
import argparse
import io
import json
import os
import platform
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import data
import eval as evaluation
from data import STREAMS, DataError
from eval import METHODS, write

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
    add("--synthetic", action="store_true", help="use a made-up stand-in of the data set's size; results say SYNTHETIC")
    add("--seeds", type=int, nargs="+", default=[1111, 1112, 1113, 1114, 1115], help="a run each (1111 ... 1115)")
    add("--epochs", type=int, help="for each stage (default: the method file's)")
    add("--batch-size", type=int, help="default: the method file's")
    add("--lr", type=float, help="learning rate of Adam (default: the method file's)")
    add("--ablate", nargs="+", default=[""], metavar="NAME", help="a run for each NAME instead of the full method; "
        "all: the full method and each NAME; "
        + "; ".join(f"{name}: {', '.join(module.ABLATIONS)}" for name, (module, _) in METHODS.items()))
    add("--normalize", action=argparse.BooleanOptionalAction,
        help="standardise the features by the training split (default: on; --features are used as they are)")
    add("--features", nargs="+", type=data.folder, metavar="NAME=DIR",
        help="feature folders instead of a pickle: text=DIR audio=DIR vision=DIR simulated_text=DIR, "
        "each with a <clip>.npy or a folder <clip> of .npy for each clip")
    add("--labels", type=Path, metavar="FILE", help="the label file of --features, Double-Flow's label_official.npz")
    add("--max-frames", type=int, default=data.MAX_FRAMES, metavar="N",
        help=f"of --features leave out training clips of more than N frames (default {data.MAX_FRAMES})")
    add("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, ...")
    add("--out", type=Path, default=Path("runs"), help="folder for the run folders (default: runs)")
    add("--resume", action=argparse.BooleanOptionalAction, default=True, help="go on where a run stopped")
    add("--dry-run", action="store_true", help="load, build, run one batch of each stage, write nothing")
    add("--limit", type=int, metavar="N", help="only the first N clips of each split, for a quick look")
    add("--jobs", type=int, default=1, metavar="N", help="runs side by side, sharing the threads (default 1)")
    args = parser.parse_args(argv)
    if args.features and (args.normalize or args.synthetic):
        parser.error("--features are used as they are: leave --normalize and --synthetic out")
    if bool(args.features) != bool(args.labels):
        parser.error("--features and --labels belong together")
    args.features = args.features and dict(args.features)
    args.normalize = not args.features if args.normalize is None else args.normalize
    for name in ("epochs", "batch_size", "lr", "limit", "jobs", "max_frames"):
        value = getattr(args, name)
        if value is not None and not 0 < value < float("inf"):
            parser.error(f"--{name.replace('_', '-')} must be greater than 0, not {value}")
    known = METHODS[args.method][0].ABLATIONS
    if "all" in args.ablate:
        args.ablate = ["", *known]
    for name in filter(None, args.ablate):
        if name not in known:
            parser.error(f"--ablate {name}: {args.method} has {', '.join(known)}, and all")
    return args


def configure(args, ablation: str, loaded: dict):
    """The method's config for this data set, with what the command line, the ablation and the data's form change."""
    module = METHODS[args.method][0]
    changes = {k: getattr(args, k) for k in ("epochs", "batch_size", "lr") if getattr(args, k) is not None}
    if hasattr(module.Config, "aligned"):
        changes["aligned"] = loaded["aligned"]
    return replace(module.PAPER[args.dataset], **changes, **module.ABLATIONS.get(ablation, {}))


def run_folder(args, ablation: str, seed: int) -> Path:
    parts = [args.method, args.dataset] + ["synthetic"] * args.synthetic + [ablation] * bool(ablation)
    return args.out / ("-".join(parts) + f"-s{seed}")


def commit() -> str:
    """The code's commit, marked where files differ from it; "unknown" outside a git checkout."""
    here = Path(__file__).resolve().parent
    try:
        said = subprocess.run(["git", "describe", "--always", "--dirty", "--exclude=*"], cwd=here, capture_output=True,
                              text=True)
    except OSError:
        return "unknown"
    return said.stdout.strip() or "unknown"


def save(path: Path, content: dict) -> None:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write(path, buffer.getvalue())


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


class Run:
    """One seed of one configuration: its model, its random state, its folder."""

    def __init__(self, args, ablation: str, seed: int, loaded: dict, device: torch.device):
        module, Model = METHODS[args.method]
        self.args, self.seed, self.device, self.data = args, seed, device, loaded
        self.config, self.folder = configure(args, ablation, loaded), run_folder(args, ablation, seed)
        self.task = module.TASKS[args.dataset]
        torch.manual_seed(seed)
        self.model = Model(loaded["dims"], self.task, self.config).to(device)
        self.stages = getattr(self.model, "stages", ("train",))
        self.index, self.truth = evaluation.targets(loaded["train"]["label"], self.task)
        constant = evaluation.constant(self.truth, self.task)
        self.identity = {"method": args.method, "dataset": args.dataset, "synthetic": args.synthetic,
                         "ablation": ablation, "seed": seed, "limit": args.limit, "normalize": args.normalize,
                         "task": self.task, "dims": loaded["dims"], "config": asdict(self.config),
                         "data": loaded["source"], "constant": constant}
        self.history, self.best, self.stage, self.epoch, self.lock = [], None, 0, 0, None
        self.generator = torch.Generator()

    def begin(self, stage: str) -> None:
        """Only a method of several stages needs to be told."""
        if hasattr(self.model, "begin"):
            self.model.begin(stage)

    # ---- one step, one epoch

    def step_loss(self, index: torch.Tensor, fixed) -> dict:
        """The loss terms of the clips at these rows of self.index; fixed: the frozen teacher's answers, if any."""
        streams, real = data.batch(self.data["train"], self.index[index].cpu())
        present = data.training_masks(real, self.generator)
        missing = {m: streams[m] * present[m].to(self.device)[..., None] for m in STREAMS}
        real = {m: r.to(self.device) for m, r in real.items()}
        known = {"teacher": tuple(t[index] for t in fixed)} if fixed else {}
        return self.model.losses(streams, missing, self.truth[index], real, **known)

    def train_epoch(self, optimizer, fixed, name: str) -> dict:
        """One pass over the training split; returns the mean of each loss term."""
        self.model.train()
        train_real = {m: r[self.index.cpu()] for m, r in self.data["train"]["real"].items()}
        order = data.batches(train_real, torch.arange(len(self.index)), self.config.batch_size, self.generator)
        sums = {}
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        for step, rows in enumerate(tqdm(order, desc=name, leave=False, disable=not sys.stderr.isatty())):
            terms = self.step_loss(rows.to(self.device), fixed)
            if not torch.isfinite(torch.stack([t.detach() for t in terms.values()])).all():
                bad = next(k for k, t in terms.items() if not torch.isfinite(t))
                raise DataError(f"{name}, step {step + 1}: the loss term '{bad}' is not finite. "
                                "Try a lower --lr, and look at the features with python data.py check.")
            optimizer.zero_grad(set_to_none=True)
            terms["total"].backward()
            if self.config.clip:
                torch.nn.utils.clip_grad_norm_(parameters, self.config.clip)
            optimizer.step()
            for k, t in terms.items():
                sums[k] = sums.get(k, 0) + t.detach() * len(rows) / len(self.index)
        return {k: float(v) for k, v in sums.items()}

    @torch.no_grad()
    def teacher_outputs(self):
        """The frozen teacher's answers on every complete training clip, once; None if this stage needs none."""
        if self.stages[self.stage] != "student" or "teacher" not in self.stages:
            return None
        self.model.eval()
        rows = torch.arange(len(self.index))
        parts = []
        for part in rows.split(256):
            streams, real = data.batch(self.data["train"], self.index[part.to(self.device)].cpu())
            parts.append(self.model.teacher_outputs(streams, {m: r.to(self.device) for m, r in real.items()}))
        return tuple(torch.cat(p) for p in zip(*parts))

    # ---- a whole run

    def train(self) -> None:
        """All stages; a stage ends with the parameters of its best epoch on validation."""
        resumed, module = self.restore(), METHODS[self.args.method][0]
        while self.stage < len(self.stages):
            stage, last = self.stages[self.stage], self.stage == len(self.stages) - 1
            self.begin(stage)
            if not resumed:
                # Counted from the end: the last stage of every ablation sees the same masks and batches.
                stage_seed = self.seed + len(self.stages) - 1 - self.stage
                torch.manual_seed(stage_seed)
                self.generator.manual_seed(stage_seed)
            fixed = self.teacher_outputs()
            optimizer = torch.optim.Adam((p for p in self.model.parameters() if p.requires_grad), lr=self.config.lr,
                                         weight_decay=getattr(self.config, "weight_decay", 0.0))
            if resumed:
                optimizer.load_state_dict(resumed["optimizer"])
                self.random_state(resumed["random"])
            resumed = None
            while self.epoch < self.config.epochs:
                began = time.perf_counter()
                if hasattr(module, "learning_rate_factor"):
                    optimizer.param_groups[0]["lr"] = self.config.lr * module.learning_rate_factor(self.epoch)
                self.epoch += 1
                losses = self.train_epoch(optimizer, fixed, f"{stage} epoch {self.epoch}/{self.config.epochs}")
                # The final stage is chosen over all available sets, or those that its file names; a teacher on the
                # complete clips that it will see.
                sets = list(data.SETS) if last else ["lav"]
                valid = evaluation.evaluate(self.model, self.task, self.data["valid"], sets, "valid")
                chosen_on = getattr(module, "SELECTION", data.SETS) if last else sets
                better = self.note(stage, losses, valid, evaluation.score({c: valid[c] for c in chosen_on}), last)
                self.store(optimizer)
                terms = " ".join(f"{k} {v:.3f}" for k, v in losses.items() if k != "scd_active")
                print(f"{stage} {self.epoch}/{self.config.epochs}  {terms}  {self.valid_score()}"
                      f"{' *' if better else ''}  {time.perf_counter() - began:.1f} s", flush=True)
            self.model.load_state_dict(self.best["model"])
            self.stage, self.epoch, self.best = self.stage + 1, 0, None

    def valid_score(self) -> str:
        score = self.history[-1]["score"]
        return f"valid MAE {-score:.4f}" if self.task == "regression" else f"valid F1 {score:.2f}"

    def note(self, stage: str, losses: dict, valid: dict, score: float, last: bool) -> bool:
        """Record the epoch, and keep its parameters if it is the best so far; returns whether it is."""
        better = self.best is None or score > self.best["score"]
        if better:
            model = {k: v.detach().cpu().clone() for k, v in self.model.state_dict().items()}
            self.best = {"score": score, "epoch": self.epoch, "model": model}
            if last:
                save(self.folder / "best.pt",
                     {**self.identity, "stats": self.data["stats"], "epoch": self.epoch, "model": model})
        self.history.append({"stage": stage, "epoch": self.epoch, "losses": losses, "score": score, "best": better,
                             "valid": {c: {k: v for k, v in r.items() if k != "realised"} for c, r in valid.items()}})
        return better

    def random_state(self, state: dict | None = None) -> dict:
        """The state of every random generator in use; sets it first if one is given."""
        if state:
            torch.set_rng_state(state["torch"])
            self.generator.set_state(state["masks"])
            if self.device.type == "cuda":
                torch.cuda.set_rng_state(state["cuda"], self.device)
        cuda = {"cuda": torch.cuda.get_rng_state(self.device)} if self.device.type == "cuda" else {}
        return {"torch": torch.get_rng_state(), "masks": self.generator.get_state(), **cuda}

    def store(self, optimizer) -> None:
        """All that the next epoch depends on, then the log, which is always the history of last.pt."""
        save(self.folder / "last.pt",
             {**self.identity, "stage": self.stage, "epoch": self.epoch, "best": self.best, "history": self.history,
              "model": self.model.state_dict(), "optimizer": optimizer.state_dict(), "random": self.random_state()})
        self.log()

    def log(self) -> None:
        write(self.folder / "log.jsonl", "".join(json.dumps(line) + "\n" for line in self.history))

    def read_last(self) -> dict:
        """last.pt, refused where it is not of this run."""
        path = self.folder / "last.pt"
        saved = evaluation.read_checkpoint(path)
        if not {"stage", "epoch", "best", "history", "optimizer", "random"} <= saved.keys():
            raise DataError(f"{path} is not what a run leaves to go on from. Start over with --no-resume.")
        self.compare(path, saved)
        return saved

    def restore(self) -> dict | None:
        """Create the folder, or take up what an earlier run of the same configuration left in it."""
        path = self.folder / "config.json"
        if path.exists() and self.args.resume:
            self.compare(path)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.take()
            for name in ("last.pt", "best.pt", "log.jsonl", "results.json") if not self.args.resume else ():
                (self.folder / name).unlink(missing_ok=True)
        except OSError as error:
            raise DataError(f"--out: {self.folder} cannot be made: {error.strerror}.") from None
        if (self.folder / "last.pt").exists():
            saved = self.read_last()
            try:
                self.model.load_state_dict(saved["model"])
            except (RuntimeError, TypeError, AttributeError):
                raise DataError(f"{self.folder / 'last.pt'} does not fit {self.args.method}.py. Start over with "
                                "--no-resume.") from None
            self.stage, self.epoch, self.best, self.history = (saved[k] for k in ("stage", "epoch", "best", "history"))
            print(f"continuing {self.folder} after {self.stages[self.stage]} epoch {self.epoch}", flush=True)
            return saved
        versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
        write(path, json.dumps({**self.identity, "command": " ".join(sys.argv), "commit": commit(),
                                "versions": versions, "device": device_name(self.device)}, indent=1))
        return None

    def take(self) -> None:
        """Keep other processes out of the folder until this one ends or leaves it."""
        if fcntl is None:
            return
        self.lock = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"{self.folder} is in use by another process. Wait for it, or name another "
                            "--out.") from None
        except OSError:         # a file system without locks
            pass

    def leave(self) -> None:
        if self.lock is not None:
            os.close(self.lock)

    def compare(self, path: Path, found: dict | None = None) -> None:
        """Refuse a folder that holds another configuration."""
        try:
            found = found or json.loads(path.read_text())
            found["config"], found["data"]["sha256"]
        except (OSError, ValueError, KeyError, TypeError):
            raise DataError(f"{path} is damaged. Start over with --no-resume.") from None
        differ = [k for k, v in self.identity.items() if k != "data" and json.loads(json.dumps(v)) != found.get(k)]
        if found["data"]["sha256"] != self.identity["data"]["sha256"]:
            differ.append("data file")
        if "config" in differ:
            known = found["config"]
            differ[differ.index("config")] = ", ".join(k for k, v in asdict(self.config).items() if known.get(k) != v)
        if differ:
            raise DataError(f"{self.folder} holds a run of another configuration (differs in {', '.join(differ)}). "
                            "Name another folder with --out, or start over with --no-resume.")

    def finished(self) -> bool:
        """Whether the folder's last epoch is the last one of the last stage."""
        if not (self.args.resume and (self.folder / "last.pt").exists() and (self.folder / "best.pt").exists()):
            return False
        self.compare(self.folder / "config.json")
        saved = self.read_last()
        if saved["stage"] < len(self.stages) - 1 or saved["epoch"] < self.config.epochs:
            return False
        self.history = saved["history"]
        self.log()      # which a process that was killed may have had no time to write
        return True

    def dry(self) -> None:
        """One batch of each stage, nothing written."""
        for self.stage, stage in enumerate(self.stages):
            self.begin(stage)
            self.model.train()
            self.generator.manual_seed(self.seed)
            terms = self.step_loss(torch.arange(min(self.config.batch_size, len(self.index)), device=self.device), None)
            terms["total"].backward()
            print(f"{stage}, one batch: " + " ".join(f"{k} {float(v.detach()):.3f}" for k, v in terms.items()))


def introduce(args, loaded: dict, device: torch.device, run: Run) -> None:
    """What is about to run, so that a log answers every later question."""
    source, sizes = loaded["source"], "/".join(str(len(loaded[s]["label"])) for s in ("train", "valid"))
    print(f"command: python {' '.join(sys.argv)}")
    print(f"code: commit {commit()}; python {platform.python_version()}, torch {torch.__version__}, "
          f"numpy {np.__version__}")
    print(f"device: {device_name(device)}")
    print(f"data: {source['file']}" + (f", SHA-256 {source['sha256']}" if source["sha256"] else "")
          + f"; {sizes} training/validation clips, widths " + " ".join(f"{m} {w}" for m, w in loaded["dims"].items()))
    for note in source["notes"]:
        print(f"note: {note}")
    count = sum(p.numel() for p in run.model.parameters())
    print(f"model: {args.method}, {count:,} parameters; {run.config}", flush=True)


def closing(plan: list, args, dims: dict) -> None:
    """The seven-column validation table of the runs just made, from their logs, and the command for the test table."""
    groups, folders = {}, [run_folder(args, *p) for p in plan]
    for (ablation, _), folder in zip(plan, folders):
        lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        best = max((h for h in lines if h["stage"] == lines[-1]["stage"]), key=lambda h: h["score"])
        groups.setdefault(ablation, []).append(evaluation.averages(best["valid"]))
    for ablation, results in groups.items():
        name = " ".join(filter(None, (args.method, ablation, "on", args.dataset, "SYNTHETIC" * args.synthetic,
                                      evaluation.simulation(args.method, dims))))
        print(f"\nvalidation, {name} ({evaluation.UNITS[METHODS[args.method][0].TASKS[args.dataset]]})")
        table = {k: {"ours": {c: evaluation.summary([r[c][k] for r in results]) for c in evaluation.COLUMNS}}
                 for k in results[0]["avg"]}
        print(evaluation.show(table, evaluation.TITLES, "text"))
    print(f"\nthe test table: python eval.py {' '.join(map(str, folders))}", flush=True)


def side_by_side(args, argv: list[str], plan: list) -> list[int]:
    """Each run as a process of its own with its share of the threads; one progress line a process on a terminal.
    Returns the exit codes."""
    share = {**os.environ, "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // args.jobs)), "PYTHONUNBUFFERED": "1"}
    begun = []

    def work(place: int, ablation: str, seed: int) -> int:
        name = run_folder(args, ablation, seed).name
        command = [sys.executable, str(Path(__file__).resolve()), *argv, "--jobs", "1", "--seeds", str(seed)]
        # A session of its own: a stop from the keyboard reaches it once, through this process.
        child = subprocess.Popen(command + ["--ablate", ablation], env=share, stdout=subprocess.PIPE,
                                 stderr=subprocess.STDOUT, text=True, start_new_session=True)
        begun.append(child)
        with tqdm(desc=name, position=place, disable=not sys.stderr.isatty(), bar_format="{desc}: {postfix}") as line:
            final = ""
            for said in child.stdout:
                final = said.strip() or final
                line.set_postfix_str(final)
                if line.disable and " valid " in said:
                    print(f"{name}: {final}", flush=True)
        if child.wait() not in (0, 130):        # 130: stopped from the keyboard
            print(f"{name} failed: {final}", file=sys.stderr, flush=True)
        return child.returncode

    with ThreadPoolExecutor(args.jobs) as pool:
        try:
            return list(pool.map(work, range(len(plan)), *zip(*plan)))
        except KeyboardInterrupt:
            for child in begun:
                child.send_signal(signal.SIGINT)
            raise


def main(argv=None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    seeds = args.seeds[:1] if args.dry_run else dict.fromkeys(args.seeds)
    plan = [(ablation, seed) for ablation in dict.fromkeys(args.ablate) for seed in seeds]
    try:
        device = evaluation.device_named(args.device)
        loaded = data.load(args.dataset, args.data_dir, ("train", "valid"), device, args.normalize,
                           synthetic=args.synthetic, limit=args.limit, features=args.features, labels=args.labels,
                           max_frames=args.max_frames)
        introduce(args, loaded, device, Run(args, *plan[0], loaded, device))
        code = 0
        if args.jobs > 1 and len(plan) > 1 and not args.dry_run:
            codes = side_by_side(args, argv, plan)
            plan, code = [p for p, c in zip(plan, codes) if c == 0], 2 if any(codes) else 0
        else:
            for ablation, seed in plan:
                run = Run(args, ablation, seed, loaded, device)
                print(f"\n{run.folder}", flush=True)
                if args.dry_run:
                    run.dry()
                elif run.finished():
                    print("finished already")
                else:
                    try:
                        run.train()
                    finally:
                        run.leave()
        if plan and not args.dry_run:
            closing(plan, args, loaded["dims"])
        return code
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
