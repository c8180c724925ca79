"""train.py: what a run leaves, that it repeats and resumes bit for bit, how it chooses, what it refuses."""
import csv
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys

import pytest
import torch

import corrkd
import data
import double_flow
import eval as evaluation
import train
import umdf
from helpers import ROOT, WIDTHS, equal, feature_folders, history, learnable, parameters, run, run_main, written


QUICK = ("--epochs", "1", "--seeds", "1", "--device", "cpu")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """CorrKD, two seeds of three epochs on data whose text tells the label."""
    folder = tmp_path_factory.mktemp("trained")
    written(folder / "data", learnable())
    assert run(folder, seeds=("1", "2"), epochs="3") == 0
    return folder


def saved(folder, name="last.pt", where="mosi/corrkd/s1"):
    return torch.load(folder / "runs" / where / name, weights_only=True)


# ------------------------------------------------------------------------------------- a run and its files

def test_a_run_learns_and_leaves_what_the_help_says(trained):
    folder = trained / "runs" / "mosi/corrkd/s1"
    assert {path.name for path in folder.iterdir()} == {"config.json", "log.jsonl", "model.pt", "last.pt"}
    lines = history(trained)
    stages = ["teacher"] * 3 + ["student"] * 3
    assert [(line["stage"], line["epoch"]) for line in lines] == list(zip(stages, [1, 2, 3, 1, 2, 3]))
    assert lines[2]["losses"]["task"] < lines[0]["losses"]["task"]
    assert set(lines[-1]["losses"]) == {"task", "scd", "cpd", "rcd", "total"}
    assert set(lines[0]["valid"]) == {"lav"} and set(lines[-1]["valid"]) == set(data.SETS)
    assert lines[-1]["valid"]["l"]["F1"] > 90
    checkpoint = saved(trained, "model.pt")
    assert set(checkpoint) == {"run", "load", "stats", "linear", "epoch", "model"}
    for name in checkpoint:
        assert f"    {name} " in train.__doc__
    model = corrkd.CorrKD(checkpoint["run"]["dims"], "polarity")
    model.load_state_dict(checkpoint["model"])
    split = data.load("mosi", trained / "data")["valid"]
    for condition, cell in evaluation.evaluate(model, "polarity", split, data.SETS, "valid").items():
        assert lines[2 + checkpoint["epoch"]]["valid"][condition] == {**cell, "F1": pytest.approx(cell["F1"])}
    config = json.loads((folder / "config.json").read_text())
    assert config["run"]["data"]["sha256"] == data.sha256(trained / "data" / "mosi_data.pkl")
    assert checkpoint["run"] == config["run"] == saved(trained)["run"]


@pytest.mark.parametrize("method, stops", [("corrkd", 5), ("umdf", 2), ("double_flow", 2)])
def test_a_run_that_is_stopped_after_each_epoch_ends_as_if_never_stopped(tmp_path, monkeypatch, capsys, method, stops):
    """Ctrl-C in the second step behind every epoch of every stage, and continued, the last time as if on another
    machine: log and weights are bit-equal to those of a whole run, here with --deterministic, which changes nothing
    on a CPU but refuses operations that have no repeatable form."""
    written(tmp_path / "data", learnable())
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    where, step, steps = f"mosi/{method}/s1", torch.optim.Adam.step, []
    assert run(tmp_path, "--deterministic", epochs="3", method=method) == 0
    assert torch.are_deterministic_algorithms_enabled()
    lines = history(tmp_path, where)
    (tmp_path / "runs").rename(tmp_path / "whole")

    def stopping(*arguments):
        steps.append(arguments)
        if len(steps) % 5 == 0:         # an epoch has three
            signal.raise_signal(signal.SIGINT)
        return step(*arguments)
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.Adam, "step", stopping)
        for stop in range(1, stops + 1):
            assert run(tmp_path, epochs="3", method=method) == 130
            said = capsys.readouterr()
            if stop > 1:
                line = lines[stop - 2]
                assert f"continuing after {line['stage']} epoch {line['epoch']}\n" in said.out
            assert said.err.strip().endswith("goes on after the last finished epoch") and said.err.count("\n") <= 2
            assert len(history(tmp_path, where)) == stop and "this run began on" not in said.out
    path = tmp_path / "runs" / where / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "versions": {"torch": "1.0"}}))
    assert run(tmp_path, epochs="3", method=method) == 0
    assert re.search(r"note: this run began on .* threads, torch 1\.0, and goes on on .* threads, torch",
                     capsys.readouterr().out)
    assert not torch.are_deterministic_algorithms_enabled() and history(tmp_path, where) == lines
    for name in ("model.pt", "last.pt"):
        ours, whole = (torch.load(tmp_path / top / where / name, weights_only=True) for top in ("runs", "whole"))
        assert equal(ours["model"], whole["model"]) and ours["epoch"] == whole["epoch"]
    assert equal(ours["best"]["weights"], whole["best"]["weights"])


def test_a_finished_run_is_neither_run_again_nor_taken_for_another(trained, capsys):
    path = trained / "runs/mosi/corrkd/s1/last.pt"
    before = path.stat().st_mtime_ns
    assert run(trained, epochs="3") == 0 and "finished already" in capsys.readouterr().out
    for change, entry in (("--lr 0.1", "lr"), ("--limit 20", "limit"), ("--no-normalize", "normalize"),
                          ("--epochs 4", "epochs")):
        assert run(trained, *change.split(), epochs="3") == 2
        error = capsys.readouterr().err
        assert f"another configuration (it differs in {entry}" in error and len(error.splitlines()) == 1
    assert path.stat().st_mtime_ns == before


def test_a_full_disk_leaves_the_last_good_checkpoint_and_one_that_does_not_fit_is_refused(
        tmp_path, monkeypatch, capsys):
    written(tmp_path / "data", learnable(n=12))
    replace, path = os.replace, tmp_path / "runs/mosi/corrkd/s1/last.pt"

    def full(source, target):
        if str(target).endswith("last.pt") and len(torch.load(source, weights_only=True)["history"]) == 3:
            raise OSError(28, "No space left on device")
        return replace(source, target)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        assert run(tmp_path) == 2
    error = capsys.readouterr().err
    assert "last.pt" in error and "No space left on device" in error and len(error.splitlines()) == 1
    good = saved(tmp_path)
    assert path.with_name("model.pt").exists()      # the best weights are written first
    assert len(good["history"]) == 2 and not list((tmp_path / "runs").rglob("*.tmp"))
    train.save(path, {**good, "model": {}})
    before = path.read_bytes()
    assert run(tmp_path) == 2 and path.read_bytes() == before
    assert re.search(f"{path} is refused.*start over with --no-resume", capsys.readouterr().err)
    train.save(path, good)
    assert run(tmp_path) == 0 and len(history(tmp_path)) == 4


def test_starting_over_replaces_a_run_once_its_first_epoch_is_there(tmp_path, monkeypatch):
    written(tmp_path / "data", learnable(n=12))
    assert run(tmp_path) == 0
    stale = [tmp_path / "runs/mosi/corrkd/s1" / name for name in ("results.json", "predictions.csv")]
    for path in stale:
        path.write_text("of the earlier run")
    before = {path: path.read_bytes() for path in (tmp_path / "runs").rglob("*") if path.is_file()}
    with monkeypatch.context() as patch:
        patch.setattr(train, "train_epoch", lambda *arguments: signal.raise_signal(signal.SIGINT))
        assert run(tmp_path, "--no-resume", epochs="1") == 130
    assert all(path.read_bytes() == content for path, content in before.items())
    calls, epoch = [], train.train_epoch

    def stopping(*arguments):
        calls.append(arguments)
        return signal.raise_signal(signal.SIGINT) if len(calls) == 2 else epoch(*arguments)
    with monkeypatch.context() as patch:        # and once it is there, no old weights are
        patch.setattr(train, "train_epoch", stopping)
        assert run(tmp_path, "--no-resume", epochs="1") == 130
    assert {path.name for path in (tmp_path / "runs/mosi/corrkd/s1").iterdir()} == {
        "config.json", "last.pt", "log.jsonl"}
    for path in stale:
        path.write_text("of the earlier run")
    assert run(tmp_path, "--no-resume", epochs="1") == 0
    assert [line["stage"] for line in history(tmp_path)] == ["teacher", "student"]
    assert not any(path.exists() for path in stale)


def test_what_a_run_was_made_by_is_written_down(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "--ablate", "", "a b"])
    machine = train.machine(torch.device("cpu"))
    assert machine["command"] == "python train.py --ablate '' 'a b'"
    assert machine["device"].endswith(f", {torch.get_num_threads()} threads")
    monkeypatch.setattr(train, "__file__", str(tmp_path / "train.py"))
    assert train.commit() == "unknown"
    if shutil.which("git"):
        for name in [name for name in os.environ if name.startswith("GIT_")]:
            monkeypatch.delenv(name)
        (tmp_path / "train.py").touch()
        settings = "user.name=a", "user.email=a@b", "commit.gpgsign=false", f"core.hooksPath={os.devnull}"
        git = ["git", *(word for setting in settings for word in ("-c", setting))]
        for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
            subprocess.run([*git, *command], cwd=tmp_path, check=True)
        clean = train.commit()
        (tmp_path / "train.py").write_text("changed")
        assert re.fullmatch("[0-9a-f]{7,}", clean) and train.commit() == f"{clean}-dirty"


# ------------------------------------------------------------------------------------- how it trains and chooses

def test_what_a_run_begins_with_and_follows(tmp_path, monkeypatch, capsys):
    """Seven epochs that train nothing but a first step without a loss, by which Adam's weight decay, a part of the
    gradient, moves a weight by about the rate. Of the first 8 clips of each split, the folder named from within."""
    written(tmp_path / "data", learnable())
    monkeypatch.chdir(tmp_path)
    begun, rates = [], []

    def epoch(model, optimizer, split, index, *more):
        group, = optimizer.param_groups
        rates.append(group["lr"])
        assert len(split["label"]) == len(index) == 8
        if len(rates) % 7 == 1:
            begun.append(torch.nn.utils.parameters_to_vector(group["params"]).detach())
            sum(p.sum() * 0 for p in group["params"]).backward()
            optimizer.step()
            moved = torch.nn.utils.parameters_to_vector(group["params"]) - begun[-1]
            assert moved.abs().mean().item() == pytest.approx(rates[-1], rel=.2)
        return {"total": 1.25}
    monkeypatch.setattr(train, "train_epoch", epoch)
    flags = ("--method", "double_flow", "--dataset", "mosi", "--data-dir", "data", "--limit", "8", "--lr", "0.01",
             "--epochs", "7", "--device", "cpu", "--seeds", "5")
    assert run_main(*flags, "6") == run_main(*flags, "--out", "again/runs", "--no-normalize") == 0
    assert torch.equal(begun[0], begun[2]) and not torch.equal(begun[0], begun[1])
    assert rates == 3 * [pytest.approx(.01 * factor) for factor in (.2, .4, .6, .8, 1, 1, 1)]
    best, raw = (saved(top, "model.pt", "mosi/double_flow/s5") for top in (tmp_path, tmp_path / "again"))
    assert best["run"]["constant"] == pytest.approx(sorted(learnable()["train"]["labels"][:8].ravel())[3])
    assert best["stats"] and raw["stats"] is None and raw["run"]["normalize"] is False and raw["run"]["limit"] == 8
    valid, said = history(tmp_path, "mosi/double_flow/s5")[0]["valid"], capsys.readouterr().out
    mean = sum(cell["MAE"] for cell in valid.values()) / len(valid)
    assert f"loss 1.250  valid -MAE {-mean:.4f} (best)" in said and valid["av"]["n"] == 8
    assert f"the epoch with the best -MAE on validation is kept, mean over {' '.join(valid)}\n" in said
    assert "clips: 8 for training, 8 for validation; widths {'text': 6, 'audio': 4, 'vision': 3}" in said
    monkeypatch.chdir("runs")
    assert evaluation.main([".", "--no-rates"]) == 0


def test_a_run_repeats_bit_for_bit_and_the_test_split_has_no_say(trained, tmp_path):
    made = learnable()
    made["test"]["labels"] = -made["test"]["labels"][::-1].copy()
    made["test"]["text"][made["test"]["text"] != 0] = 3.0
    written(tmp_path / "data", made)
    run(tmp_path, epochs="3")
    assert history(tmp_path) == history(trained) and equal(parameters(tmp_path), parameters(trained))
    assert not equal(parameters(trained), parameters(trained, "mosi/corrkd/s2"))


def test_dropout_and_masks_are_drawn_from_two_streams_of_random_numbers():
    """Which seed, stage and epoch each change, and nothing else does."""
    def drawn(*place):
        generator = train.seed_epoch(*place)
        return torch.stack((torch.rand(8), torch.rand(8, generator=generator)))
    first = drawn(1111, 1, 0)
    assert torch.equal(drawn(1111, 1, 0), first) and not torch.isclose(*first).any()
    for place in ((1112, 1, 0), (1111, 2, 0), (1111, 1, 1)):
        assert not torch.isclose(drawn(*place), first).any()


@pytest.mark.parametrize("scores, best", [([3, 2, 1], 1), ([1, 5, 5, 4], 2), ([1, 2, 3], 3)])
def test_a_stage_ends_with_the_epoch_that_is_best_on_validation(tmp_path, monkeypatch, scores, best):
    """Teacher and student; of equal ones the first. The stored weights are a copy: training goes on from the last."""
    written(tmp_path / "data", learnable(n=12))
    script, ends = 2 * scores, []
    train_epoch, judge = train.train_epoch, train.evaluate

    def epoch(model, *arguments):
        result = train_epoch(model, *arguments)
        ends.append({name: value.clone() for name, value in model.state_dict().items()})
        return result

    def scripted(*arguments):
        value = script.pop(0)
        return {c: {**cell, "F1": value} for c, cell in judge(*arguments).items()}
    monkeypatch.setattr(train, "train_epoch", epoch)
    monkeypatch.setattr(train, "evaluate", scripted)
    assert run(tmp_path, epochs=str(len(scores))) == 0
    final, last = saved(tmp_path, "model.pt"), saved(tmp_path)
    assert final["epoch"] == best and equal(last["model"], ends[-1])
    count = len(scores)
    for name, value in final["model"].items():
        source = ends[best - 1] if name.startswith("teacher") else ends[count + best - 1]
        assert torch.equal(value, source[name]), name
    assert equal(final["model"], last["model"]) == (best == count)
    so_far = [1 + scores.index(max(scores[:k])) for k in range(1, count + 1)]
    assert [line["best"] for line in history(tmp_path)] == 2 * so_far


def test_each_step_trains_on_what_belongs_to_its_clips_and_each_clip_counts_once(tmp_path, monkeypatch):
    """39 clips, one of sentiment 0 left out, in batches of 16, 16 and 7; two epochs of two stages, of which the second
    follows an evaluation. Dropout is on, the target is the clip's own, which its text tells, and so are the teacher's
    outputs. An epoch's mean counts clips, and no step's gradient is longer than config.clip."""
    made = learnable()
    made["train"]["labels"][3] = 0
    written(tmp_path / "data", made)
    steps, given, norms, losses, step = [], [], [], corrkd.CorrKD.losses, torch.optim.Adam.step

    def watched(self, complete, missing, target, real, teacher):
        assert self.network.training and torch.equal(target, (complete["text"][:, 0, 0] > 0).long())
        if teacher is not None:
            given.append(teacher)
            torch.testing.assert_close(tuple(teacher), self.teacher_outputs(complete, real), rtol=1e-5, atol=1e-5)
        terms = losses(self, complete, missing, target, real, teacher)
        steps.append((len(target), terms["task"].item()))
        return terms

    def watched_step(self, *arguments):
        gradients = [p.grad.flatten() for p in self.param_groups[0]["params"] if p.grad is not None]
        norms.append(torch.cat(gradients).norm().item())
        return step(self, *arguments)
    monkeypatch.setattr(corrkd.CorrKD, "losses", watched)
    monkeypatch.setattr(torch.optim.Adam, "step", watched_step)
    assert run(tmp_path, "--ablate", "clip=0.01", "clip=0.0") == 0
    assert len(steps) == 24 and len(given) == 12 and sorted(n for n, _ in steps[:3]) == [7, 16, 16]
    mean = history(tmp_path, "mosi/corrkd-clip=0.01/s1")[0]["losses"]["task"]
    assert mean == pytest.approx(sum(n * value for n, value in steps[:3]) / 39, rel=1e-6)
    assert max(norms[:12]) <= .01 + 1e-6 and min(norms[12:15]) > .05


def test_an_epoch_is_the_plain_loop(tmp_path):
    """Of UMDF, with weights other than 1, on the batches and copies that the generator draws."""
    split = data.load("mosi", written(tmp_path, learnable()))["train"]
    index, truth = evaluation.targets(split["label"], "regression")
    config = umdf.Config(rep=.3, resp=.4, batch_size=16, clip=.5)
    models = []
    for ours in (True, False):
        torch.manual_seed(0)
        model, generator = umdf.UMDF(WIDTHS, "regression", config), torch.Generator().manual_seed(1)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        if ours:
            train.train_epoch(model, optimizer, split, index, truth, None, config, generator, "")
        for rows in data.batches(split["real"], 16, generator) if not ours else ():
            complete, missing, real = data.batch(split, rows, generator)
            assert any((missing[m] != complete[m]).any() for m in complete)
            terms = model.losses(complete, missing, split["label"][rows], real)
            optimizer.zero_grad()
            (terms["task_complete"] + terms["task_missing"] + .3 * terms["rep"] + .4 * terms["resp"]).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), .5)
            optimizer.step()
        models.append(model.state_dict())
    for name, value in models[0].items():
        torch.testing.assert_close(value, models[1][name], rtol=0, atol=1e-6)


def test_every_epoch_has_masks_of_its_own_and_ablations_share_those_and_the_start_of_their_last_stage(
        tmp_path, monkeypatch):
    """Of those with the same layers; there the student begins as the same one."""
    written(tmp_path / "data", learnable())
    batch, begin, starts = data.batch, corrkd.CorrKD.begin, []

    def watched(split, index, generator=None):
        complete, missing, real = batch(split, index, generator)
        if generator is not None:
            starts[-1][1].append((index, missing["text"]))
        return complete, missing, real

    def watched_begin(self, stage):
        begin(self, stage)
        starts.append(({k: v.clone() for k, v in self.student.state_dict().items()}, []))
    monkeypatch.setattr(data, "batch", watched)
    monkeypatch.setattr(corrkd.CorrKD, "begin", watched_begin)
    assert run(tmp_path, "--ablate", "", "no_scd", "kl", "no_distillation") == 0
    student, batches = starts[1]
    assert len(starts) == 7 and len(batches) == 6
    for other, other_batches in (starts[3], starts[5], starts[6]):      # no_distillation has no teacher's stage
        assert equal(student, other)
        assert all(torch.equal(a, c) and torch.equal(b, d)
                   for (a, b), (c, d) in zip(batches, other_batches, strict=True))
    shown = [{}, {}]
    for i, (index, text) in enumerate(batches):
        shown[i // 3] |= {clip: frames.any(-1).tolist() for clip, frames in zip(index.tolist(), text)}
    assert len(shown[0]) == len(shown[1]) == 40
    assert sum(shown[0][clip] != shown[1][clip] for clip in range(40)) > 25


@pytest.mark.parametrize("method", evaluation.METHODS)
def test_all_are_the_full_method_and_every_ablation_which_train(tmp_path, method):
    written(tmp_path / "data", learnable(n=6))
    assert run(tmp_path, "--ablate", "all", epochs="1", method=method) == 0
    changes = {f"{method}-{name}": change for name, change in evaluation.METHODS[method].ABLATIONS.items()}
    assert {folder.name for folder in (tmp_path / "runs/mosi").iterdir()} == {method, *changes}
    for name, change in changes.items():
        config = saved(tmp_path, "model.pt", f"mosi/{name}/s1")["run"]["config"]
        assert config == {**config, **change}


@pytest.mark.parametrize("method", evaluation.METHODS)
@pytest.mark.parametrize("dataset", data.SIZES)
def test_all_nine_pairs_of_method_and_data_set_take_their_own_settings(tmp_path, method, dataset, capsys):
    """On few clips, in a folder whose name has a space: the printed command quotes it."""
    made = learnable(n=12, emotions=dataset == "iemocap")
    written(tmp_path / "my data", made, data.FILES[dataset][0])
    assert run_main("--method", method, "--dataset", dataset, "--data-dir", tmp_path / "my data",
                    "--out", tmp_path / "my runs", *QUICK) == 0
    command = capsys.readouterr().out.splitlines()[-1].split("python ")[1]
    assert shlex.split(command) == ["eval.py", str(tmp_path / "my runs" / dataset / method)]
    path = tmp_path / "my runs" / dataset / method / "s1" / "last.pt"
    state, listed = torch.load(path, weights_only=True), evaluation.METHODS[method].PAPER[dataset]
    record, adam = state["run"], state["optimizer"]["param_groups"][0]
    assert record["task"] == evaluation.METHODS[method].TASKS[dataset]
    assert (record["config"]["batch_size"], adam["weight_decay"]) == (listed.batch_size, listed.weight_decay)
    assert adam["lr"] == listed.lr / (5 if method == "double_flow" else 1)      # whose first epoch is a warm-up


def test_a_validation_split_of_one_class_and_a_stream_that_one_split_lacks(tmp_path, capsys):
    """Of unaligned made-up data without a test split, which training does not read."""
    made = {**learnable(lengths=(8, 12, 10)), "SYNTHETIC": "made up"}
    del made["test"]
    made["valid"]["labels"] = abs(made["valid"]["labels"])
    made["valid"]["vision"][:] = 0
    written(tmp_path / "data", made)
    assert run(tmp_path, epochs="1") == 0
    where = "mosi-synthetic/corrkd/s1"
    assert set(history(tmp_path, where)[-1]["valid"]) == {"l", "a", "la"}       # {l,a,v} is {l,a}, which counts once
    assert saved(tmp_path, where=where)["run"]["config"]["aligned"] is False
    assert "one class alone in valid" in (said := capsys.readouterr().out) and "accuracy chooses" in said


def test_settings_are_a_run_each_beside_the_full_method(tmp_path, capsys):
    """Read by the type of the field, in a folder of their own; a flag for all runs gives way."""
    written(tmp_path / "data", learnable(n=12))
    names = ["corrkd", "corrkd-margin=1.0", "corrkd-layers=1,dropout=0.2,scd_raw=True,epochs=2"]
    assert run(tmp_path, "--ablate", "", *(name[7:] for name in names[1:]), epochs="1") == 0
    folders = [str(tmp_path / "runs/mosi" / name) for name in names]
    assert f"python eval.py {shlex.join(folders)}" in capsys.readouterr().out
    config, *changed = (saved(tmp_path, "model.pt", f"mosi/{name}/s1")["run"]["config"] for name in names)
    assert run(tmp_path, "--ablate", "margin=1.0", epochs="1") == 0
    assert f"python eval.py {shlex.join(folders[:2])}\n" in capsys.readouterr().out
    assert changed == [{**config, "margin": 1.0}, {**config, "layers": 1, "dropout": .2, "scd_raw": True, "epochs": 2}]


def test_a_run_folder_of_a_published_checkpoint_holds_its_weights_and_another_file_is_refused(tmp_path, capsys):
    """With feature folders, whose names are those of the authors."""
    made, *_ = feature_folders(tmp_path, sizes=(24, 8, 8))
    names = {"vision": "manet_FRA", "text": "vicuna-7b-v1.5-FRA-wavlm2vicuna-half-gt", "audio": "wavlm-large-FRA_-5",
             "simulated_text": "vicuna-7b-v1.5-FRA-wavlm2vicuna-half-wav+prompt[take_generate_wordembed_-4]"}
    for m, name in names.items():
        os.rename(made["features"][m], tmp_path / name)
    base = ["--method", "double_flow", "--dataset", "mosei", "--out", tmp_path / "runs", "--labels", made["labels"],
            "--features", *(f"{m}={tmp_path / name}" for m, name in names.items())]
    assert run_main(*base, "--ablate", "no_mia", "--batch-size", "8", *QUICK) == 0
    best = saved(tmp_path, "model.pt", "mosei/double_flow-no_mia/s1")
    model = double_flow.DoubleFlow(best["run"]["dims"], "regression", double_flow.Config(mia="off"))
    model.load_state_dict(best["model"])
    published = {}
    for key, value in model.state_dict().items():       # under the names of the official code
        prefix = max((p for p in double_flow.OFFICIAL if key.startswith(p)), key=len)
        published[f"model.{double_flow.OFFICIAL[prefix]}{key.removeprefix(prefix)}"] = value
    path = tmp_path / "published.pth"
    official = [*base, "--device", "cpu", "--official", path]
    torch.save({"state_dict": {"x": torch.zeros(1)}}, path)
    assert run_main(*official) == 2 and "is missing" in capsys.readouterr().err
    path.write_text("nothing")
    assert run_main(*official) == 2 and "download it again" in capsys.readouterr().err
    torch.save({"state_dict": published}, path)
    assert run_main(*official) == 0
    adopted = saved(tmp_path, "model.pt", "mosei/double_flow/sofficial")
    assert equal(adopted["model"], best["model"]) and adopted["run"]["config"]["mia"] == "off"
    assert adopted["stats"] is adopted["linear"] is adopted["epoch"] is None
    assert adopted["run"]["normalize"] is False and adopted["load"]["features"] == best["load"]["features"]
    for name in ("double_flow-no_mia", "double_flow"):
        assert evaluation.main([str(tmp_path / "runs/mosei" / name), "--no-rates", "--split", "valid"]) == 0


# ------------------------------------------------------------------------------------- mistakes

def test_what_is_not_finite_stops_the_run_and_is_named(tmp_path, monkeypatch, capsys):
    """Answers behind finite losses, with the condition; a loss term, with the step."""
    written(tmp_path / "data", learnable(n=8))
    assert run(tmp_path, "--lr", "1e30", method="umdf", epochs="1") == 2
    whole = corrkd.sample_contrastive
    monkeypatch.setattr(corrkd, "sample_contrastive", lambda *arguments: whole(*arguments) * float("nan"))
    assert run(tmp_path, epochs="1") == 2
    answers, loss = capsys.readouterr().err.splitlines()
    assert re.search(r"condition l are not finite.*lower --lr", answers)
    assert "student 1/1, step 1: the loss term 'scd' is not finite" in loss


FEATURES = "--features text=a --labels x"
MISTAKES = [
    ("", "No file of mosi in "),
    ("--data-dir empty", "empty: looked for"),
    ("--data-dir mine.pkl", "mine.pkl does not exist"),
    ("--data-dir bad.pkl", "bad.pkl"),
    ("--synthetic --data-dir data", "--data-dir: not allowed with argument --synthetic"),
    ("--synthetic --device cuda:77", "has no such device"),
    ("--synthetic --limit 40 --out bad.pkl", "bad.pkl"),
    ("--synthetic --epochs 0", "--epochs: 0 is not between 1"),
    ("--synthetic --lr nan", "--lr: nan is not between"),
    (f"--synthetic --seeds {2 ** 63}", f"--seeds: {2 ** 63} is not between"),
    ("--features text=a", "--features and --labels belong together"),
    ("--features texts=a --labels x", "is not NAME=DIR"),
    ("--features audio=a audio=b --labels x", "lacks text, vision"),
    (FEATURES, "lacks audio, vision"),
    (f"{FEATURES} --official x", "--official is for"),
    ("--synthetic --ablate all no_sdc", "no_sdc: corrkd has the ablations no_scd"),
    ("--synthetic --ablate margin=wide", "margin is of type float"),
    ("--synthetic --ablate margin=-1.0", "margin is of type float"),
    ("--synthetic --ablate layers=0", "layers is of type int"),
    ("--synthetic --ablate scd_raw=1", "scd_raw is of type bool"),
    ("--synthetic --ablate aligned=False", "settings NAME=VALUE"),
    ("--synthetic --limit 40 --ablate heads=7", "no multiple of"),
]


@pytest.mark.parametrize("words, sentence", MISTAKES)
def test_a_users_mistake_is_told_in_a_sentence(tmp_path, words, sentence, monkeypatch, capsys):
    (tmp_path / "bad.pkl").write_bytes(b"nothing good")
    (tmp_path / "empty").mkdir()
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "fit_linear", lambda *arguments: pytest.fail("training began"))
    assert run_main("--method", "corrkd", "--dataset", "mosi", *words.split()) == 2
    error = capsys.readouterr().err
    assert sentence in error and "Traceback" not in error and len(error.splitlines()) <= 2
    assert sorted(tmp_path.rglob("*")) == before


def test_every_command_of_the_readme_is_understood():
    text = (ROOT / "README.md").read_text().replace("\\\n", " ")
    commands = re.findall(r"python ((?:train|eval)\.py (?!-h)[^`\n|#&]*)", text)
    assert len(commands) > 6
    assert train.parse(["--method", "umdf", "--dataset", "mosi"]).seeds == [1111, 1112, 1113, 1114, 1115]
    for command in commands:
        name, *words = shlex.split(command)
        if words[-1] == "--seeds":                  # xargs adds the seed
            words.append("1111")
        words = ["mosi" if word == "D" else "1111" if word.startswith(("$", "{")) else word for word in words]
        assert {"train.py": train, "eval.py": evaluation}[name].parse(words), words


@pytest.mark.parametrize("flag", [(), ("--no-normalize",)])
def test_the_readmes_section_on_own_clips_does_what_it_says(tmp_path, monkeypatch, flag):
    """Its commands and its script as they stand, but for one epoch and one seed; the script answers as eval.py does."""
    monkeypatch.chdir(tmp_path)
    written(tmp_path, learnable(n=20), "mine.pkl")
    written(tmp_path, {"test": {m: x for m, x in learnable(n=20)["test"].items() if m != "labels"}}, "new.pkl")
    section = (ROOT / "README.md").read_text().split("## Your own clips")[1].split("\n## ")[0].replace("\\\n", "")
    commands = re.findall(r"^python (\S+) (.*)$", section, re.MULTILINE)
    assert [name for name, _ in commands] == ["train.py", "eval.py", "train.py"]
    for name, words in commands:
        if name == "train.py":
            assert run_main(*shlex.split(words), "--epochs", "1", "--seeds", "1111", *flag) == 0
        else:
            assert evaluation.main(shlex.split(words)) == 0
    names = {}
    exec(section.split("```python\n")[1].split("```")[0], names)
    with open("runs/mine/mosi/corrkd/s1111/predictions.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["condition"] == "lav"]
    expected = torch.tensor([float(row["probability"]) for row in rows])
    torch.testing.assert_close(names["probability"], expected, rtol=0, atol=1e-6)
    assert os.path.exists("runs/mine/mosi/corrkd-layers=3,dropout=0.2/s1111/model.pt")


def test_the_readmes_losses_run_as_they_stand():
    first, second = (ROOT / "README.md").read_text().split("```python\n")[1:3]
    names = {}
    exec(first.split("```")[0], names)
    exec(second.split("```")[0], names)
    assert all(names[loss].isfinite() for loss in ("scd", "cpd", "rcd", "rep", "rnc"))
