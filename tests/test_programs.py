"""train.py and eval.py: selection, resuming, determinism, tables, errors; in process where that is enough."""
import csv
import json
import multiprocessing
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

import corrkd
import data
import double_flow
import eval as evaluation
import train
import umdf
from data import SPLITS, STREAMS
from helpers import ROOT, begun, content, equal, feature_folders, history, learnable, official_names, parameters, program, run, written


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two finished seeds and one ablation on the small pickle, whose splits differ in size."""
    folder = tmp_path_factory.mktemp("trained")
    made = learnable()
    made["valid"] = {k: v[:30] for k, v in made["valid"].items()}
    made["test"] = {k: v[:20] for k, v in made["test"].items()}
    written(folder / "data", made)
    assert run(folder, seeds=("1", "2"), epochs="3") == 0 and run(folder, "--ablate", "no_scd", seeds=("1",), epochs="3") == 0
    return folder


# ------------------------------------------------------------------------------------- metrics

def test_weighted_f1_has_its_arguments_in_the_right_order():
    """Always "negative" on 70 negative and 30 positive clips: .7 * 2 * .7 / 1.7 = .576; swapped it would be .824."""
    truth = np.array([0] * 70 + [1] * 30)
    assert evaluation.metrics("polarity", np.zeros(100, int), truth)["F1"] == pytest.approx(100 * .7 * 1.4 / 1.7)


def test_emotions_are_four_decisions_in_the_papers_order():
    truth = np.zeros((10, 4), int)
    truth[:4, data.EMOTIONS.index("sad")] = 1
    got = evaluation.metrics("emotions", np.zeros((10, 4), int), truth)
    assert list(got) == ["F1 happy", "F1 sad", "F1 angry", "F1 neutral"]
    assert got["F1 sad"] == pytest.approx(100 * .6 * 1.2 / 1.6) and got["F1 happy"] == 100


def test_one_class_alone_is_scored_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert evaluation.metrics("polarity", np.zeros(5, int), np.ones(5, int))["F1"] == 0


def test_label_zero_is_left_out_of_polarity():
    index, truth = evaluation.targets(torch.tensor([-1.0, 0.0, .2, 0.0, 3.0]), "polarity")
    assert index.tolist() == [0, 2, 4] and truth.tolist() == [0, 1, 1]


def test_regression_metrics_computed_by_hand():
    truth = np.array([-2.0, -1.0, 0.0, 0.5, 1.5, 3.0])
    answer = np.array([-1.4, 0.2, -0.1, 0.0, 2.5, 3.7])
    got = evaluation.metrics("regression", answer, truth)
    assert got["MAE"] == pytest.approx((.6 + 1.2 + .1 + .5 + 1.0 + .7) / 6)
    # without label 0: truth - - + + +, answer - + - + + (0.0 is not > 0): 3 of 5
    assert got["Acc-2"] == pytest.approx(60) and got["F1"] == pytest.approx(100 * (2 / 5 * .5 + 3 / 5 * 2 / 3))
    # with it, >= 0: truth - - + + + +, answer - + - + + +: 4 of 6
    assert got["Acc-2 has0"] == pytest.approx(400 / 6) and got["F1 has0"] == pytest.approx(100 * (2 / 6 * .5 + 4 / 6 * .75))
    # halves to the even: truth -2 -1 0 0 2 3, answer -1 0 0 0 2 3 (2.5 -> 2, 3.7 clipped to 3): 4 of 6
    assert got["Acc-7"] == pytest.approx(400 / 6)
    x, y = truth - truth.mean(), answer - answer.mean()
    assert got["Corr"] == pytest.approx((x * y).sum() / ((x * x).sum() * (y * y).sum()) ** .5)


def test_metrics_of_hard_regressions_are_quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        constant = evaluation.metrics("regression", np.full(4, .2), np.array([1.0, 2.0, -1.0, 0.0]))
        assert np.isnan(constant["Corr"]) and constant["Acc-2"] == pytest.approx(200 / 3) and constant["MAE"] == pytest.approx(4.0 / 4)
        neutral = evaluation.metrics("regression", np.array([.3, -.1]), np.zeros(2))      # nobody is positive or negative
        assert np.isnan(neutral["F1"]) and neutral["F1 has0"] == pytest.approx(200 / 3)
        assert np.isnan(evaluation.metrics("regression", np.array([.3]), np.array([1.0]))["Corr"])


def test_a_correlation_that_is_not_defined_stays_so_in_the_table():
    got, = evaluation.records("sets", "Corr", "ours", "x", [{"l": v} for v in (.5, float("nan"), .7)])
    assert np.isnan(got["mean"]) and np.isnan(got["std"]) and got["n"] == 3 and evaluation.cell(got) == "nan±nan"


def test_the_constant_predictor_of_each_task():
    assert evaluation.constant(torch.tensor([-1.0, .2, .4, 3.0, 3.0]), "regression") == pytest.approx(.4)
    assert evaluation.constant(torch.tensor([0, 1, 1]), "polarity") == 1
    assert evaluation.constant(torch.tensor([[0, 1, 0, 0], [0, 1, 0, 1], [1, 0, 0, 0]]), "emotions") == [0, 1, 0, 0]


def test_one_number_for_results_over_several_sets():
    sets = {c: {"n": 3, "realised": {}, "F1": 90.0, "MAE": 1.0 + k} for k, c in enumerate(data.SETS)}
    assert evaluation.score(sets) == pytest.approx(-4.0)
    emotions = {c: {"n": 3, "realised": {}, "F1 happy": 50.0 + k, "F1 sad": 60.0 + k} for k, c in enumerate(data.SETS)}
    assert evaluation.score(emotions) == pytest.approx(58.0)


# ------------------------------------------------------------------------------------- predictions

@pytest.mark.parametrize("lengths", [(8, 8, 8), (8, 12, 10)])
def test_streams_encoded_once_give_what_full_passes_give(tmp_path, lengths):
    made = content(n=30, lengths=lengths)
    made["test"]["vision"][:7] = 0
    made["test"] = {k: v[np.random.default_rng(0).permutation(30)] for k, v in made["test"].items()}   # not by length
    split = data.load("mosi", written(tmp_path, made), SPLITS)["test"]
    torch.manual_seed(0)
    model = corrkd.CorrKD({m: split[m].shape[2] for m in STREAMS}, "polarity").eval()
    conditions = [*data.SETS, 0.0, 0.3, 1.0]
    masks = [data.evaluation_masks(split["real"], c, "test") for c in conditions]
    for present, a, b in zip(masks, *(evaluation.predict(model, split, masks, size) for size in (7, 64))):
        with torch.no_grad():
            full = model(**{m: split[m] * present[m][..., None] for m in STREAMS}, real=split["real"])
        torch.testing.assert_close(a, full, rtol=0, atol=1e-5)
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_a_method_without_separate_streams_is_evaluated_by_full_passes(tmp_path):
    made = content(n=30)
    made["test"] = {k: v[np.random.default_rng(0).permutation(30)] for k, v in made["test"].items()}   # not by length
    split = data.load("mosi", written(tmp_path, made), SPLITS)["test"]
    torch.manual_seed(0)
    model = corrkd.CorrKD({m: split[m].shape[2] for m in STREAMS}, "polarity").eval()

    class Joint(torch.nn.Module):
        encode = None

        def represent(self, streams, real):
            return model.represent(streams, real)

        def classify(self, h):
            return model.classify(h)

    masks = [data.evaluation_masks(split["real"], c, "test") for c in (*data.SETS, .5)]
    for a, b in zip(evaluation.predict(Joint(), split, masks, 7), evaluation.predict(model, split, masks)):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


# ------------------------------------------------------------------------------------- training

def test_a_run_learns_and_leaves_what_the_help_says(trained):
    folder = trained / "runs" / "mosi/corrkd/s1"
    assert {p.name for p in folder.iterdir()} - {"results.json"} == {"config.json", "log.jsonl", "model.pt", "last.pt"}
    lines = history(trained)
    assert [(h["stage"], h["epoch"]) for h in lines] == [(s, e) for s in ("teacher", "student") for e in (1, 2, 3)]
    assert lines[2]["losses"]["task"] < lines[0]["losses"]["task"]
    assert set(lines[-1]["losses"]) == {"task", "scd", "scd_active", "cpd", "rcd", "total"} and 0 <= lines[-1]["losses"]["scd_active"] <= 1
    checkpoint = torch.load(folder / "model.pt", weights_only=True)
    assert checkpoint["epoch"] == 3 and checkpoint["run"]["config"]["lr"] == 4e-3
    assert set(lines[0]["valid"]) == {"lav"} and set(lines[-1]["valid"]) == set(data.SETS)
    assert lines[-1]["valid"]["l"]["n"] == 30 and lines[-1]["valid"]["l"]["F1"] > 90
    last = torch.load(folder / "last.pt", weights_only=True)
    assert last["finished"] and last["recent"] == [] and last["optimizer"] == {}        # nothing goes on from here: no weight twice
    config = json.loads((folder / "config.json").read_text())
    assert config["run"]["data"]["sha256"] == data.sha256(trained / "data" / "mosi_data.pkl") and config["commit"] and config["versions"]["torch"]
    assert checkpoint["run"] == config["run"] == last["run"]      # one record, whole in each


def test_two_runs_are_bit_equal_and_seeds_differ(trained, tmp_path):
    (tmp_path / "data").symlink_to(trained / "data")
    run(tmp_path, epochs="3")
    for name in ("log.jsonl", "model.pt", "last.pt"):
        a, b = ((f / "runs" / "mosi/corrkd/s1" / name).read_bytes() for f in (trained, tmp_path))
        assert a == b.replace(str(tmp_path).encode(), str(trained).encode()) or name.endswith("pt") and equal(parameters(trained), parameters(tmp_path))
    assert not equal(parameters(trained), parameters(trained, "mosi/corrkd/s2"))


@pytest.mark.parametrize("stop_after", [1, 2, 3, 4, 5])
def test_an_interrupted_run_ends_as_if_never_interrupted(trained, tmp_path, monkeypatch, capsys, stop_after):
    """Stopped in the middle of the epoch after this many, in the teacher's stage, between the stages, in the student's."""
    (tmp_path / "data").symlink_to(trained / "data")
    whole, store, done = train.Clips.batch, train.save_epoch, {"epochs": 0, "steps": 0}

    def stopping(self, model, rows):
        done["steps"] += 1
        if done["epochs"] == stop_after and done["steps"] == 2:
            raise KeyboardInterrupt
        return whole(self, model, rows)

    monkeypatch.setattr(train.Clips, "batch", stopping)
    monkeypatch.setattr(train, "save_epoch", lambda *a: (store(*a), done.update(epochs=done["epochs"] + 1, steps=0)))
    assert run(tmp_path, epochs="3") == 130
    said = capsys.readouterr().err
    assert "the same command goes on" in said and len(history(tmp_path)) == stop_after
    monkeypatch.undo()
    assert run(tmp_path, epochs="3") == 0
    assert history(tmp_path) == history(trained) and equal(parameters(tmp_path), parameters(trained))


def test_a_finished_run_is_not_run_again_and_another_configuration_is_refused(trained, capsys):
    path = trained / "runs" / "mosi/corrkd/s1" / "last.pt"
    before = path.stat().st_mtime_ns
    assert run(trained, epochs="3") == 0 and "finished already" in capsys.readouterr().out
    for change, said in ((("--lr", "0.1"), "differs in lr"), (("--limit", "20"), "differs in limit"), (("--no-normalize",), "differs in normalize")):
        assert run(trained, *change, epochs="3") == 2
        error = capsys.readouterr().err
        assert said in error and len(error.splitlines()) == 1
    assert run(trained, epochs="4") == 2 and "differs in epochs" in capsys.readouterr().err
    assert path.stat().st_mtime_ns == before


def test_starting_over_replaces_a_run(tmp_path):
    written(tmp_path / "data", learnable())
    run(tmp_path, epochs="2")
    assert run(tmp_path, "--no-resume", epochs="1") == 0 and len(history(tmp_path)) == 2


def test_the_test_split_has_no_say(trained, tmp_path):
    """Other test features and labels: the same history and the same checkpoint."""
    made = learnable()
    made["valid"] = {k: v[:30] for k, v in made["valid"].items()}
    made["test"]["labels"] = -made["test"]["labels"][::-1].copy()
    made["test"]["text"][made["test"]["text"] != 0] = 3.0
    written(tmp_path / "data", made)
    run(tmp_path, epochs="3")
    assert history(tmp_path) == history(trained) and equal(parameters(tmp_path), parameters(trained))


@pytest.mark.parametrize("scores, best", [([3, 2, 1], 3), ([1, 1, 1, 99, 5, 7, 9, 9, 4], 7), ([1, 2, 3, 4, 9, 8, 7, 6, 5], 5)])
def test_a_stage_ends_with_the_mean_of_five_epochs_that_is_best_on_validation(tmp_path, monkeypatch, capsys, scores, best):
    """Teacher and student, stopped once on the way. A mean of fewer epochs counts only where there are no five; of equal ones the
    first. Training itself goes on from the weights of the last epoch, and the teacher moves no more."""
    written(tmp_path / "data", learnable(n=12))
    began, ended, script, stop, epochs = [], [], 2 * scores, [KeyboardInterrupt], len(scores)
    whole, judge, store = train.train_epoch, evaluation.evaluate, train.save_epoch
    copy = lambda model: {k: v.double() for k, v in model.state_dict().items()}

    def stopping(folder, state, answer):
        store(folder, state, answer)
        if stop and len(state["history"]) == 2 * epochs - 1:
            raise stop.pop()

    def scripted(model, *a):
        found, value = judge(model, *a), None if isinstance(model, evaluation.Linear) else script.pop(0)
        return found if value is None else {c: {**v, "F1": value} for c, v in found.items()}
    monkeypatch.setattr(train, "save_epoch", stopping)
    monkeypatch.setattr(evaluation, "evaluate", scripted)
    monkeypatch.setattr(train, "train_epoch", lambda model, *a: (began.append(copy(model)), whole(model, *a), ended.append(copy(model)))[1])
    assert run(tmp_path, epochs=str(epochs)) == 130 and run(tmp_path, epochs=str(epochs)) == 0
    shown = capsys.readouterr().out.splitlines()
    assert set(next(line for line in shown if line.startswith("F1 ours")).split()[3:]) == {f"{scores[best - 1]:.2f}"}
    mean = lambda states, part: {k: sum(s[k] for s in states[-5:]) / len(states[-5:]) for k in states[0] if k.startswith(part)}
    close = lambda a, b: all(torch.allclose(a[k].double(), b[k], rtol=0, atol=1e-6) for k in b)
    assert all(equal(began[i], ended[i - 1]) for i in range(1, 2 * epochs) if i != epochs)
    teacher, student = mean(ended[:best], "teacher"), mean(ended[epochs:epochs + best], "student")
    assert close(began[epochs], teacher) and not close(ended[epochs - 1], teacher)
    final = parameters(tmp_path)
    assert close(final, student) and all(torch.equal(final[k].double(), began[epochs][k]) for k in teacher)
    assert torch.load(tmp_path / "runs" / "mosi/corrkd/s1" / "model.pt", weights_only=True)["epoch"] == best


def test_the_sets_that_a_stage_is_about_choose(tmp_path, monkeypatch):
    """Double-Flow's are complete clips and clips without text: best at epoch 6, while all others get better to the end."""
    written(tmp_path / "data", learnable(n=12))
    judge, left = evaluation.evaluate, [5, 5, 5, 5, 4, 1, 3, 3]

    def scripted(model, *a):
        found, value = judge(model, *a), None if isinstance(model, evaluation.Linear) else left.pop(0)
        return found if value is None else {c: {**v, "MAE": value if c in ("lav", "av") else 9 * len(left)} for c, v in found.items()}
    monkeypatch.setattr(evaluation, "evaluate", scripted)
    assert run(tmp_path, method="double_flow", epochs="8") == 0
    assert torch.load(tmp_path / "runs" / "mosi/double_flow/s1" / "model.pt", weights_only=True)["epoch"] == 6


def test_an_epochs_mean_counts_clips_and_the_gradient_is_clipped(tmp_path, monkeypatch):
    """40 clips in batches of 16, 16 and 8: each clip counts once. The norm of every step's gradient is at most the config's."""
    written(tmp_path / "data", learnable())
    steps, norms, losses, step = [], [], corrkd.CorrKD.losses, torch.optim.Adam.step
    monkeypatch.setattr(evaluation, "fit_linear", lambda *a: None)

    def counted(self, complete, *more):
        terms = losses(self, complete, *more)
        steps.append((len(complete["text"]), terms["task"].item()))
        return terms

    def watched(self, *a):
        norms.append(torch.cat([p.grad.flatten() for p in self.param_groups[0]["params"] if p.grad is not None]).norm().item())
        return step(self, *a)
    monkeypatch.setattr(corrkd, "ABLATIONS", {"tight": {"clip": .01, "student": False}, "loose": {"clip": 0.0, "student": False}})
    monkeypatch.setattr(corrkd.CorrKD, "losses", counted)
    monkeypatch.setattr(torch.optim.Adam, "step", watched)
    run(tmp_path, "--ablate", "tight", "loose", epochs="1")
    told = history(tmp_path, "mosi/corrkd-tight/s1")[0]["losses"]["task"]
    assert sorted(n for n, _ in steps[:3]) == [8, 16, 16] and told == pytest.approx(sum(n * v for n, v in steps[:3]) / 40, rel=1e-6)
    assert all(v <= .01 + 1e-6 for v in norms[:3]) and all(v > .05 for v in norms[3:])


def test_training_masks_are_drawn_anew_in_every_epoch(tmp_path, monkeypatch):
    written(tmp_path / "data", learnable())
    step, masks, clips, drawn = train.Clips.batch, data.training_masks, [], []
    monkeypatch.setattr(evaluation, "fit_linear", lambda *a: None)
    monkeypatch.setattr(train.Clips, "batch", lambda self, model, rows: (clips.append(rows.tolist()), step(self, model, rows))[1])
    monkeypatch.setattr(data, "training_masks", lambda *a: (drawn.append(masks(*a)), drawn[-1])[1])
    run(tmp_path, "--ablate", "no_distillation")
    epochs = [{}, {}]
    for i, (index, present) in enumerate(zip(clips, drawn)):
        for row, clip in enumerate(index):
            kept = [present[m][row].nonzero()[:, 0].tolist() for m in STREAMS]
            epochs[i >= len(clips) // 2][clip] = kept
    assert len(epochs[0]) == len(epochs[1]) == 40 and len(clips) == 6
    assert sum(epochs[0][clip] != epochs[1][clip] for clip in range(40)) > 34


def test_ablations_share_their_start(tmp_path, monkeypatch):
    """The student of every ablation begins with the same weights, random state, masks and batches, whatever came before."""
    written(tmp_path / "data", learnable())
    first, whole = [], train.Clips.batch

    def watch(self, model, rows):
        if model.stage == "student" and not model.seen:
            first.append((self.generator.get_state(), torch.get_rng_state(), rows, *model.student.state_dict().values()))
            first[-1] = [v.clone() for v in first[-1]]
            model.seen = True
        return whole(self, model, rows)
    monkeypatch.setattr(train.Clips, "batch", watch)
    monkeypatch.setattr(corrkd.CorrKD, "seen", False, raising=False)
    run(tmp_path, "--ablate", "all", epochs="1")
    assert len(first) == 9          # all but the ablation `teacher`; two have another depth, so other weights
    for other in first[1:]:
        assert all(torch.equal(a, b) for a, b in zip(first[0][:3], other))
    assert sum(len(a) == len(first[0]) and all(map(torch.equal, a, first[0])) for a in first) == 7


@pytest.mark.parametrize("method, ablation", [(m, a) for m, module in (("corrkd", corrkd), ("umdf", umdf), ("double_flow", double_flow)) for a in module.ABLATIONS])
def test_every_ablation_trains_and_is_evaluated(tmp_path, method, ablation, capsys):
    written(tmp_path / "data", learnable(n=6))
    assert run(tmp_path, "--ablate", ablation, epochs="1", method=method) == 0
    assert evaluation.main([str(tmp_path / "runs" / f"mosi/{method}-{ablation}/s1"), "--rates", "0", "0.5"]) == 0
    assert f"{method} {ablation} on mosi" in capsys.readouterr().out


@pytest.fixture
def comparable(monkeypatch):
    """The small made-up data counts as the papers': its sizes are the standard ones, its text as wide as the papers'."""
    monkeypatch.setattr(data, "SIZES", dict.fromkeys(data.SIZES, (40, 40, 40)))
    for module in evaluation.METHODS.values():
        monkeypatch.setattr(module, "FEATURES", {"text": 6, "audio": 4, "vision": 3})


@pytest.mark.parametrize("lengths", [(8, 8, 8), (8, 12, 10)])
def test_a_regression_from_training_to_table(tmp_path, capsys, lengths, comparable):
    """UMDF on aligned and unaligned clips: learns, is chosen by MAE, and its table has the paper's two known cells."""
    made = learnable(lengths=lengths)
    written(tmp_path / "data", made)
    assert run(tmp_path, epochs="3", method="umdf") == 0
    lines = history(tmp_path, "mosi/umdf/s1")
    assert lines[-1]["losses"]["task_complete"] < lines[0]["losses"]["task_complete"] and {h["stage"] for h in lines} == {"train"}
    checkpoint = torch.load(tmp_path / "runs" / "mosi/umdf/s1" / "model.pt", weights_only=True)
    assert checkpoint["run"]["config"]["aligned"] is (len(set(lengths)) == 1)
    mae = statistics.fmean(lines[-1]["valid"][c]["MAE"] for c in data.SETS)
    assert lines[-1]["valid"]["l"]["n"] == 40 and f"valid, mean of 7 sets: MAE {mae:.4f}" in capsys.readouterr().out      # clips of label 0 count
    assert evaluation.main([str(tmp_path / "runs" / "mosi/umdf/s1"), "--rates", "0", "0.5"]) == 0
    sets, rates = ({tuple(line.replace("umdf ", "").split("  ")[0].split()): line.split()[-1] for line in part.splitlines() if line.startswith(("F1", "MAE"))}
                   for part in capsys.readouterr().out.split("Share of"))
    assert sets["F1", "paper"] == "83.36" and sets["MAE", "paper"] == "0.7820" and sets["F1", "-", "paper"][0] in "+-"
    assert ("F1", "-", "paper") in rates and ("MAE", "paper") in rates and "linear" in str(rates)
    y, median = made["test"]["labels"].ravel(), np.sort(made["train"]["labels"].ravel())[19]
    assert float(sets["MAE", "constant"]) == pytest.approx(abs(y - median).mean(), abs=1e-4)


def test_an_aligned_run_refuses_an_unaligned_file(tmp_path, capsys):
    written(tmp_path / "data", learnable(n=20))
    written(tmp_path / "other", learnable(n=20, lengths=(8, 12, 10)))
    run(tmp_path, epochs="1", method="umdf")
    assert evaluation.main([str(tmp_path / "runs" / "mosi/umdf/s1"), "--data-dir", str(tmp_path / "other")]) == 2
    assert "unaligned streams" in capsys.readouterr().err


def test_double_flow_from_training_to_the_papers_table(tmp_path, capsys, comparable):
    """Warm-up and decay of the learning rate, selection on both flows, the two columns, and what stands in for text."""
    written(tmp_path / "data", learnable(), "mosei_senti_data.pkl")
    seen, step = [], torch.optim.Adam.step
    torch.optim.Adam.step = lambda self, *a: (seen.append((self.param_groups[0]["lr"], self.param_groups[0]["weight_decay"])), step(self, *a))[1]
    try:
        assert run(tmp_path, epochs="6", method="double_flow", dataset="mosei") == 0
    finally:
        torch.optim.Adam.step = step
    assert [round(lr / .004, 6) for lr, _ in seen[::3]] == [.2, .4, .6, .8, 1, 1] and {decay for _, decay in seen} == {1e-5}
    said = capsys.readouterr().out
    for line in history(tmp_path, "mosei/double_flow/s1"):
        assert f"valid, mean of 2 sets: MAE {(line['valid']['lav']['MAE'] + line['valid']['av']['MAE']) / 2:.4f}" in said
    assert "double_flow on mosei simulated text: learned from audio" in said
    assert evaluation.main([str(tmp_path / "runs" / "mosei/double_flow/s1"), "--rates", "0", "0.5"]) == 0
    out = capsys.readouterr().out
    first, second, third = (part.splitlines() for part in re.split("The paper's table|Available streams, an extension|Share of frames dropped", out)[1:])
    assert "simulated text: learned from audio" in out and first[1].split() == ["complete", "text", "missing"]
    assert [line.split()[-2:] for line in first if line.startswith("MAE double_flow paper")] == [["0.5060", "0.5503"]]
    for metric in ("F1", "MAE", "Acc-2", "Acc-7", "Corr"):
        assert any(line.startswith(f"{metric} double_flow (n=1)") for line in first), metric
    results = json.loads((tmp_path / "runs" / "mosei/double_flow/s1" / "results.json").read_text())["conditions"]
    ours = next(line.split()[-2:] for line in first if line.startswith("MAE double_flow (n"))
    assert ours == [f"{results[c]['MAE']:.4f}" for c in ("lav", "av")]
    assert "not in the paper" in second[0] and "not in the paper" in third[0] and second[1].split()[0] == "{l}"


def test_simulated_text_in_a_pickle_is_named_by_both_programs(tmp_path, capsys):
    made = learnable(n=20)
    for f in made.values():
        f["simulated_text"] = f["text"][..., ::-1].copy()
    written(tmp_path / "data", made)
    assert run(tmp_path, epochs="1", method="double_flow") == 0
    assert evaluation.main([str(tmp_path / "runs" / "mosi/double_flow/s1"), "--protocol", "combos"]) == 0
    out = capsys.readouterr().out
    assert out.count("simulated text: from the data") == 2 and "learned from audio" not in out


def test_feature_folders_from_training_to_table(tmp_path, capsys):
    """Training over the authors' layout, evaluation of the run, and of a published checkpoint with the same weights."""
    where, *_ = feature_folders(tmp_path / "made", sizes=(24, 8, 8))
    features = ["--features", *(f"{m}={d}" for m, d in where["features"].items()), "--labels", str(where["labels"])]
    base = ["--dataset", "mosei", "--out", str(tmp_path / "runs"), "--batch-size", "8", "--device", "cpu", "--seeds", "1", "--epochs", "2", *features]
    assert train.main(["--method", "double_flow", "--ablate", "no_mia", *base]) == 0
    folder = tmp_path / "runs" / "mosei/double_flow-no_mia/s1"
    assert "simulated text: from the data" in capsys.readouterr().out
    assert evaluation.main([str(folder), "--rates", "0", "1"]) == 0
    out, results = capsys.readouterr().out, json.loads((folder / "results.json").read_text())
    assert "simulated text: from the data" in out and "WARNING" not in out and "text is 6 wide, not 4096" in out and "no linear row" in out
    assert results["conditions"]["lav"]["n"] == 8
    best = torch.load(folder / "model.pt", weights_only=True)
    model = double_flow.DoubleFlow(best["run"]["dims"], "regression", double_flow.Config(mia="off"))
    model.load_state_dict(best["model"])
    torch.save({"state_dict": {f"model.{k}": v for k, v in official_names(model).items()}}, tmp_path / "published.pth")
    official = ["--method", "double_flow", *base, "--official"]
    assert train.main([*official, str(tmp_path / "published.pth")]) == 0
    folder = tmp_path / "runs" / "mosei/double_flow/sofficial"
    assert evaluation.main([str(folder), "--rates", "0", "1", "--predictions", str(tmp_path / "p.csv")]) == 0
    assert "seeds official" in capsys.readouterr().out
    measured = json.loads((folder / "results.json").read_text())
    assert measured["conditions"] == results["conditions"] and measured["constant"] == results["constant"]
    assert train.main(["--method", "corrkd", *base]) == 0 and train.main(["--method", "umdf", *base]) == 0      # the other methods too
    assert evaluation.main([*(str(tmp_path / "runs" / f"mosei/{m}/s1") for m in ("corrkd", "umdf")), "--rates", "0"]) == 0
    capsys.readouterr()
    torch.save({"state_dict": {"x": torch.zeros(1)}}, tmp_path / "other.pth")
    (tmp_path / "bad.pth").write_bytes(b"nothing")
    for name, said in (("other.pth", "is missing"), ("bad.pth", "damaged, or not the published"), ("nowhere.pth", "does not exist")):
        assert train.main([*official, str(tmp_path / name)]) == 2
        error = capsys.readouterr().err
        assert said in error and len(error.splitlines()) == 1


@pytest.mark.parametrize("arguments, said", [
    (["--features", "text=a"], "--features and --labels belong together"), (["--labels", "x.npz"], "--features and --labels belong together"),
    (["--features", "texts=a", "--labels", "x"], "is not NAME=DIR"), (["--features", "text=a", "--labels", "x", "--normalize"], "leave --normalize"),
    (["--features", "text=a", "--labels", "x", "--synthetic"], "--synthetic out"), (["--features", "text=a", "--labels", "x"], "lacks audio, vision")])
def test_mistakes_with_features_are_told(tmp_path, arguments, said, capsys):
    try:
        code = train.main(["--method", "double_flow", "--dataset", "mosei", "--out", str(tmp_path), *arguments])
    except SystemExit as stop:
        code = stop.code
    assert code == 2 and said in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize("method", ["corrkd", "umdf", "double_flow"])
def test_iemocap_with_four_heads(tmp_path, capsys, method):
    written(tmp_path / "data", learnable(emotions=True), "iemocap_data.pkl")
    assert run(tmp_path, dataset="iemocap", epochs="1", method=method) == 0
    assert evaluation.main([str(tmp_path / "runs" / f"iemocap/{method}/s1"), "--protocol", "combos"]) == 0
    out = capsys.readouterr().out
    assert [line.split()[1] for line in out.splitlines() if f" {method} (n=1) " in line and line.startswith("F1")][-4:] == ["happy", "sad", "angry", "neutral"]


def test_unaligned_streams_and_a_stream_that_the_data_lacks(tmp_path, capsys):
    made = learnable(lengths=(8, 12, 10))
    for f in made.values():
        f["vision"][:] = 0
    written(tmp_path / "data", made)
    assert run(tmp_path, epochs="1") == 0
    assert evaluation.main([str(tmp_path / "runs" / "mosi/corrkd/s1"), "--rates", "0", "0.5"]) == 0
    assert capsys.readouterr().out.split()[-4:] == ["rate", "0.000", "0.500", "-"]    # vision has no frames, and no say
    assert all(np.isfinite(list(h["losses"].values())).all() for h in history(tmp_path))


def test_a_validation_split_of_one_class(tmp_path):
    made = learnable()
    made["valid"]["labels"] = abs(made["valid"]["labels"])
    written(tmp_path / "data", made)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run(tmp_path, epochs="1") == 0


def test_a_loss_that_is_not_finite_stops_the_run_and_is_named(tmp_path, monkeypatch, capsys):
    written(tmp_path / "data", learnable())
    whole = corrkd.sample_contrastive
    monkeypatch.setattr(corrkd, "sample_contrastive", lambda *a: whole(*a) * float("nan"))
    assert run(tmp_path, epochs="1") == 2
    error = capsys.readouterr().err
    assert "student 1/1, step 1: the loss term 'scd' is not finite" in error and len(error.splitlines()) == 1


# ------------------------------------------------------------------------------------- tables

def test_results_come_from_the_asked_split_and_do_not_depend_on_the_batch(trained, capsys):
    folder, got = str(trained / "runs" / "mosi/corrkd/s1"), {}
    for more in ((), ("--batch-size", "7"), ("--split", "valid"), ("--mask-seed", "1")):
        assert evaluation.main([folder, *more]) == 0
        got[more] = json.loads((trained / "runs" / "mosi/corrkd/s1" / "results.json").read_text())
    assert got[()]["conditions"] == got[("--batch-size", "7")]["conditions"]
    assert got[()]["conditions"]["l"]["n"] == 20 and got[("--split", "valid")]["conditions"]["l"]["n"] == 30
    assert got[()]["conditions"]["0.5"] != got[("--mask-seed", "1")]["conditions"]["0.5"]
    assert got[()]["conditions"]["la"]["realised"] == {"text": 0, "audio": 0, "vision": 1}
    assert abs(statistics.fmean(got[()]["conditions"]["0.5"]["realised"].values()) - .5) < .05
    y = learnable()["test"]["labels"][:20].ravel()
    share = max((y > 0).mean(), 1 - (y > 0).mean())
    majority = (learnable()["train"]["labels"] > 0).mean() > .5
    share = (y > 0).mean() if majority else (y < 0).mean()
    assert got[()]["constant"]["av"]["F1"] == pytest.approx(100 * share * 2 * share / (1 + share))


def results_of(seed, shift, ablation="", method="corrkd", **changes):
    """What eval.py keeps of a run, with F1 that rise by the set and fall by the rate; changes are those of the record."""
    module = evaluation.METHODS[method]
    source = {"file": "x.pkl", "sha256": "a" * 64, "synthetic": False, "sizes": [1284, 229, 686], "notes": [],
              "arguments": {"data_dir": "x.pkl", "synthetic": False, "features": None, "labels": None, "max_frames": 9}, **changes.pop("data", {})}
    record = {"format": evaluation.FORMAT, "method": method, "dataset": "mosi", "task": module.TASKS["mosi"], "ablation": ablation, "seed": seed, "limit": None,
              "normalize": True, "dims": {"text": 300, "audio": 74, "vision": 35}, "lacking": [], "constant": 1, "data": source,
              "config": {**vars(module.PAPER["mosi"]), **module.ABLATIONS.get(ablation, {}), **changes.pop("config", {})}, **changes}
    sets = {c: {"n": 9, "realised": dict.fromkeys(STREAMS, 0.0), "F1": 60.0 + k * k + shift} for k, c in enumerate(data.SETS)}
    rates = {str(p): {"n": 9, "realised": {"text": p, "audio": p + .02, "vision": None}, "F1": 80.0 - 20 * p * p + shift} for p in (0.0, .2, 1.0)}
    found = {c: v for c, v in {**sets, **rates}.items() if c in rates or c in data.answerable(data.SETS, record["lacking"])}
    return {"run": record, "split": "test", "mask_seed": 0, "data": source, "conditions": found, "epoch": 1, "epochs_run": record["config"]["epochs"],
            "checkpoint_sha256": "c", **{k: {c: {"F1": v} for c in found} for k, v in (("constant", 40.0), ("linear", 50.0))}}


def table_of(groups, *more):
    """(table, metric, kind, group, column) -> record of `tabulate`."""
    rows = evaluation.tabulate(groups, evaluation.parse(["x", "--rates", "0", "0.2", "1", *more]))
    return {tuple(r[k] for k in ("table", "metric", "kind", "group", "column")): r for r in rows}, rows


def test_tables_against_cells_computed_by_hand():
    """Two runs: mean, sample deviation, Avg. over six, difference to the paper, area by the trapezoidal rule at uneven rates."""
    found, rows = table_of({"corrkd": [results_of(1, 0.0), results_of(2, 3.0)]})
    get = lambda *key: found[key]["mean"]
    one = found["sets", "F1", "ours", "corrkd", "a"]
    assert (one["mean"], one["std"], one["n"]) == (62.5, pytest.approx(4.5 ** .5), 2)
    assert get("sets", "F1", "ours", "corrkd", "avg") == pytest.approx((60 + 61 + 64 + 69 + 76 + 85) / 6 + 1.5)
    assert get("sets", "F1", "difference", "corrkd", "l") == pytest.approx(61.5 - 81.20) and get("sets", "F1", "paper", "corrkd", "avg") == 74.69
    assert get("sets", "F1", "constant", "", "avg") == pytest.approx(40) and get("sets", "F1", "linear", "", "lav") == 50
    assert get("rates", "F1", "ours", "corrkd", "area") == pytest.approx((.2 * (80 + 79.2) / 2 + .8 * (79.2 + 60) / 2) + 1.5)
    assert get("rates", "F1", "ours", "corrkd", "0.2") == pytest.approx(80.7) and get("rates", "", "realised", "", "0.2") == pytest.approx(.21)
    assert get("rates", "F1", "paper", "corrkd", "0.0") == 83.94 and get("rates", "F1", "difference", "corrkd", "0.0") == pytest.approx(81.5 - 83.94)
    assert not any(key[2] == "paired" for key in found) and ("rates", "F1", "paper", "corrkd", "0.2") not in found
    text = evaluation.show(rows, "sets", ["F1"], evaluation.TITLES, "text").splitlines()
    assert text[0].split() == ["{l}", "{a}", "{v}", "{l,a}", "{l,v}", "{a,v}", "Avg.", "{l,a,v}"]
    assert text[1].split()[:4] == ["F1", "corrkd", "(n=2)", "61.50±2.12"] and text[3].split()[:5] == ["F1", "corrkd", "-", "paper", "-19.70"]
    assert evaluation.show(rows, "sets", ["F1"], evaluation.TITLES, "markdown").splitlines()[1].startswith("| --- | ---")
    alone, _ = table_of({"corrkd no_rcd": [results_of(1, 0.0, "no_rcd")]})
    assert alone["sets", "F1", "ours", "corrkd no_rcd", "l"]["std"] is None and not any(key[2] in ("paper", "difference") for key in alone)
    assert table_of({"x": [results_of(1, 0.0, "no_cpd")]})[0]["sets", "F1", "paper", "x", "avg"]["mean"] == 71.81


def test_the_area_is_a_mean_height_whatever_the_span():
    """Over rates from 0.2 to 1.0 alone the area is divided by 0.8."""
    rows = evaluation.tabulate({"x": [results_of(1, 0.0)]}, evaluation.parse(["x", "--rates", "0.2", "1", "--protocol", "rates"]))
    assert [r["mean"] for r in rows if r["kind"] == "ours" and r["column"] == "area"] == [pytest.approx((79.2 + 60) / 2)]


@pytest.mark.parametrize("changes, said", [
    ({"data": {"synthetic": True}}, "the data is SYNTHETIC"), ({"data": {"sizes": [1283, 229, 686]}}, "1283/229/686 clips are not the standard splits of mosi"),
    ({"dims": {"text": 768, "audio": 74, "vision": 35}}, "text is 768 wide, as from BERT, not 300"), ({"limit": 100}, "only the first 100 clips"),
    ({"dims": {"text": 300, "audio": 5, "vision": 20}}, None), ({}, "")])
def test_the_paper_stands_beside_comparable_numbers_only(changes, said, capsys):
    """GloVe text, standard splits, no made-up data; other widths of audio and vision are told."""
    found, rows = table_of({"corrkd": [results_of(1, 0.0, **changes)]})
    shown = any(key[2] in ("paper", "difference") for key in found)
    evaluation.show_report({"corrkd": [results_of(1, 0.0, **changes)]}, rows, evaluation.parse(["x", "--rates", "0", "0.2", "1"]))
    out = capsys.readouterr().out
    assert shown is (not said) and ("corrkd paper" in out) is shown
    assert ("nothing is compared with the paper: " + said in out) if said else ("nothing is compared" not in out)
    assert ("the paper's features are others: audio 5 wide, not 74, vision 20 wide, not 35" in out) is (said is None)


def test_the_difference_to_the_reference_is_paired_by_seed():
    """Over the seeds that both have: mean, sample deviation and n of the differences, in every column of both tables."""
    groups = {"corrkd": [results_of(s, d) for s, d in ((1, 1.0), (2, 5.0), (3, 9.0))],
              "corrkd no_scd": [results_of(s, d, "no_scd") for s, d in ((3, 6.0), (2, 4.0), (7, 90.0))], "umdf": [results_of(8, 0.0, method="umdf")]}
    found, rows = table_of(groups)
    for key in (("sets", "avg"), ("sets", "lav"), ("rates", "0.2"), ("rates", "area")):
        one = found[key[0], "F1", "paired", "corrkd no_scd - corrkd", key[1]]
        assert (one["mean"], one["std"], one["n"]) == (pytest.approx(-2), pytest.approx(2 ** .5), 2), key
    assert {key[3] for key in found if key[2] == "paired"} == {"corrkd no_scd - corrkd"}        # umdf has no seed in common and no reference
    other, _ = table_of(groups, "--reference", "corrkd no_scd")
    assert other["sets", "F1", "paired", "corrkd - corrkd no_scd", "l"]["mean"] == pytest.approx(2)
    assert "+2.00±1.41" in evaluation.show([r for r in other.values()], "sets", ["F1"], evaluation.TITLES, "text")
    with pytest.raises(data.DataError, match="--reference mult: the runs are of corrkd, corrkd no_scd, umdf"):
        table_of(groups, "--reference", "mult")


def test_the_printed_tables_and_their_files(trained, tmp_path, capsys):
    runs = [str(trained / "runs" / "mosi" / n) for n in ("corrkd", "corrkd-no_scd/s1")]      # a folder of run folders, a run folder
    assert evaluation.main([*runs, "--rates", "0", "0.5", "1", "--json", str(tmp_path / "t.json"), "--csv", str(tmp_path / "t.csv")]) == 0
    out = capsys.readouterr().out
    for part in ("corrkd on mosi, test split, seeds 1 2", "corrkd no_scd on mosi", "F1 corrkd (n=2)", "F1 corrkd no_scd - corrkd (n=1)",
                 "F1 corrkd no_scd (n=1)", "F1 constant", "F1 linear", "realised rate", "nothing is compared with the paper", "not the standard splits",
                 "At 1.0 nothing is left", data.sha256(trained / "data" / "mosi_data.pkl")[:12]):
        assert part in out, part
    table, = json.loads((tmp_path / "t.json").read_text())
    own = [json.loads((trained / "runs" / "mosi" / "corrkd" / s / "results.json").read_text())["conditions"]["l"]["F1"] for s in ("s1", "s2")]
    with open(tmp_path / "t.csv") as file:
        lines = list(csv.DictReader(file))
    rows = {tuple(r[k] for k in ("table", "metric", "kind", "group", "column")): r for r in lines}
    assert float(rows["sets", "F1", "ours", "corrkd", "l"]["mean"]) == pytest.approx(statistics.fmean(own)) and rows["sets", "F1", "ours", "corrkd", "l"]["n"] == "2"
    assert len(table["runs"]) == 3 and len(rows) == len(lines) == len(table["rows"])        # the same list of numbers
    for line, record in zip(lines, table["rows"]):
        assert [line[k] for k in record] == ["" if v is None else str(v) for v in record.values()]
    assert evaluation.main([*runs, "--rates", "0", "0.5", "1", "--stored"]) == 0 and capsys.readouterr().out == out     # the files say all
    assert evaluation.main([str(trained / "runs"), "--rates", "0", "0.5", "1", "--stored"]) == 0 and capsys.readouterr().out == out


@pytest.mark.parametrize("method, dataset", [("corrkd", "mosi"), ("umdf", "mosi"), ("corrkd", "iemocap")])
def test_the_table_can_be_made_again_from_the_predictions(tmp_path, capsys, method, dataset):
    """scikit-learn's metrics on the file's columns, averaged over the seeds: every number of the table, to the last digit."""
    from sklearn.metrics import f1_score, mean_absolute_error
    made = learnable(n=24, emotions=dataset == "iemocap")
    written(tmp_path / "data", made, f"{dataset}_data.pkl")
    assert run(tmp_path, epochs="1", method=method, dataset=dataset, seeds=("1", "2")) == 0
    files = [str(tmp_path / n) for n in ("p.csv", "t.csv")]
    assert evaluation.main([str(tmp_path / "runs"), "--rates", "0", "0.5", "--predictions", files[0], "--csv", files[1]]) == 0
    lines, table = (list(csv.DictReader(open(f, newline=""))) for f in files)
    assert len(lines) == 2 * 9 * 24 and {line["clip"] for line in lines} == {i[0].decode() for i in made["test"]["id"]}
    numbers = lambda text: [float(v) for v in text.strip("[]").split(",")]
    for row in (r for r in table if r["kind"] == "ours" and r["column"] not in ("avg", "area") and r["metric"].split()[0] in ("F1", "MAE")):
        each = []
        for seed in ("1", "2"):
            mine = [line for line in lines if line["condition"] == row["column"] and line["seed"] == seed]
            truth, answer = (np.array([numbers(line[k]) for line in mine]) for k in ("truth", "answer"))
            column = data.EMOTIONS.index(row["metric"].split()[1]) if dataset == "iemocap" else 0
            truth, answer = truth[:, column], answer[:, column]
            if method == "umdf":
                kept = truth >= -9 if "has0" in row["metric"] else truth != 0
                each.append(mean_absolute_error(truth, answer) if row["metric"] == "MAE" else 100 * (
                    f1_score(truth >= 0, answer >= 0, average="weighted") if "has0" in row["metric"] else f1_score(truth[kept] > 0, answer[kept] > 0, average="weighted")))
            else:
                each.append(100 * f1_score(truth, answer, average="weighted", zero_division=0))
                chance = np.array([numbers(line["probability"]) for line in mine])[:, column]
                assert ((chance > .5) == (answer == 1)).all()
        assert statistics.fmean(each) == pytest.approx(float(row["mean"]), rel=1e-6)
    assert evaluation.main([str(tmp_path / "runs"), "--rates", "0", "--predictions", str(tmp_path / "no" / "p.csv")]) == 2


def test_the_linear_baseline_sees_what_the_methods_see(tmp_path, monkeypatch):
    """Clip by clip: the mean over real frames, dropped ones as zeros, times the fitted matrix; better than the constant where text tells
    the label; the same predictions as scikit-learn's ridge of the chosen strength; chosen on validation."""
    from sklearn.linear_model import Ridge
    loaded = data.load("mosi", written(tmp_path, learnable(lengths=(8, 12, 10), n=60)), SPLITS)
    for task in ("regression", "polarity"):
        parts = evaluation.fit_linear(loaded, task)
        model, split = evaluation.Linear(task, **parts), loaded["test"]
        for condition in ("l", "av", .5):
            output, = evaluation.predict(model, split, [data.evaluation_masks(split["real"], condition, "test")])
            present = data.evaluation_masks(split["real"], condition, "test")
            for i in (0, 7, 41):
                x = np.concatenate([(split[m][i] * present[m][i][:, None]).double().sum(0) / int(split["real"][m][i].sum()) for m in STREAMS])
                y = float(x @ parts["weight"][0].numpy() + parts["bias"][0].item())
                assert output[i].tolist() == pytest.approx([y] if task == "regression" else [-y, y])
        assert evaluation.evaluate(model, task, split, ["l"], "test")["l"]["F1"] > 85
    tried, fit = [], Ridge.fit
    monkeypatch.setattr(Ridge, "fit", lambda self, x, y: (tried.append((self.alpha, x, y)), fit(self, x, y))[1])
    loaded.pop("linear")
    evaluation.fit_linear(loaded, "regression")
    assert [a for a, *_ in tried] == list(evaluation.STRENGTHS) and len(tried[0][1]) == 60 * evaluation.COPIES
    scores = []
    for alpha, x, y in tried:
        ridge = Ridge(alpha=alpha)
        fit(ridge, x, y)
        model = evaluation.Linear("regression", torch.tensor(np.atleast_2d(ridge.coef_)), torch.tensor(ridge.intercept_))
        scores.append(evaluation.score(evaluation.evaluate(model, "regression", loaded["valid"], data.SETS, "valid")))
    best = Ridge(alpha=evaluation.STRENGTHS[int(np.argmax(scores))])
    np.testing.assert_allclose(loaded["linear"]["regression"]["weight"][0], np.ravel(fit(best, *tried[0][1:]).coef_))
    rows = np.unique(tried[0][1].round(6), axis=0)
    assert len(rows) > 200          # the copies are not the same copy


def test_streams_that_the_data_lacks_count_in_nothing(tmp_path, capsys):
    """No vision: {v}, {l,v}, {a,v} are not evaluated, and are in no average; one line says so. Aligned streams too."""
    for lengths in ((8, 8, 8), (8, 12, 10)):
        made = learnable(lengths=lengths, n=20)
        for f in made.values():
            f["vision"][:] = 0
        written(tmp_path / str(lengths) / "data", made)
        for method in ("corrkd", "double_flow"):
            assert run(tmp_path / str(lengths), epochs="1", method=method) == 0
            assert list(history(tmp_path / str(lengths), f"mosi/{method}/s1")[-1]["valid"]) == ["l", "a", "la", "lav"]
        assert "there is no vision: {v} {l,v} {a,v} are not answered" in capsys.readouterr().out
        assert evaluation.main([str(tmp_path / str(lengths) / "runs" / "mosi/corrkd"), "--protocol", "combos", "--csv", str(tmp_path / "t.csv")]) == 0
        out = capsys.readouterr().out
        assert "{v} {l,v} {a,v} are not answered and count in no average" in out
        line, = (line for line in out.splitlines() if line.startswith("F1 corrkd (n=1)"))
        cells = line.split("  ")
        cells = [c for c in cells if c][1:]
        assert [c == " -" or c.strip() == "-" for c in cells] == [False, False, True, False, True, True, False, False]
        with open(tmp_path / "t.csv") as file:
            rows = {r["column"]: float(r["mean"]) for r in csv.DictReader(file) if r["kind"] == "ours"}
        assert rows["avg"] == pytest.approx((rows["l"] + rows["a"] + rows["la"]) / 3) and "v" not in rows


def test_a_written_stand_in_is_known_as_synthetic(tmp_path, monkeypatch, capsys):
    """The mark in the file is enough: check, train.py's header and folder, and eval.py's table say SYNTHETIC, and nothing is compared."""
    monkeypatch.setattr(data, "SIZES", dict.fromkeys(data.SIZES, (20, 12, 12)))
    assert data.main(["synthesize", "mosi", "--out", str(tmp_path / "data")]) == 0 and data.main(["check", str(tmp_path / "data")]) == 0
    assert "nothing is compared with the paper: the data is SYNTHETIC" in capsys.readouterr().out
    assert run(tmp_path, epochs="1") == 0 and "note: nothing is compared with the paper: the data is SYNTHETIC" in capsys.readouterr().out
    assert evaluation.main([str(tmp_path / "runs" / "mosi-synthetic" / "corrkd"), "--rates", "0"]) == 0
    out = capsys.readouterr().out
    assert "SYNTHETIC data: these numbers say nothing" in out and "corrkd paper" not in out and "0 - paper" not in out


def test_other_data_than_a_run_was_trained_on_is_a_warning(trained, tmp_path, capsys):
    other = learnable(n=12)
    written(tmp_path, other)
    assert evaluation.main([str(trained / "runs" / "mosi/corrkd/s2"), "--data-dir", str(tmp_path), "--protocol", "combos"]) == 0
    assert "WARNING: this is not the file" in capsys.readouterr().out
    for f in other.values():
        f["text"] = f["text"][..., :5]
    written(tmp_path, other)
    assert evaluation.main([str(trained / "runs" / "mosi/corrkd/s2"), "--data-dir", str(tmp_path)]) == 2
    assert "5 features of text" in capsys.readouterr().err


def stored_run(folder, seed, shift, ablation="", method="corrkd", **changes):
    """A run folder that holds results.json alone."""
    path = folder / f"{method}-{ablation}-s{seed}"
    path.mkdir()
    (path / "results.json").write_text(json.dumps(results_of(seed, shift, ablation, method, **changes)))
    return str(path)


def test_one_table_of_several_methods_from_stored_results(tmp_path, capsys):
    """UMDF and CorrKD differ in task, so each has its own baselines; the same row for all where the numbers are the same."""
    runs = [stored_run(tmp_path, s, s) for s in (1.0, 2.0)] + [stored_run(tmp_path, s, s + 1, "no_scd") for s in (1.0, 2.0)]
    umdf_run = stored_run(tmp_path, 1, 0.0, method="umdf")
    assert evaluation.main([*runs, umdf_run, "--stored", "--rates", "0", "1"]) == 0
    out = capsys.readouterr().out
    labels = [line.split("  ")[0] for line in out.split("Share of")[0].splitlines() if line.startswith("F1 ")]
    assert labels == ["F1 umdf (n=1)", "F1 umdf paper", "F1 umdf - paper", "F1 corrkd (n=2)", "F1 corrkd paper", "F1 corrkd - paper", "F1 corrkd no_scd (n=2)",
                      "F1 corrkd no_scd paper", "F1 corrkd no_scd - paper", "F1 corrkd no_scd - corrkd (n=2)", "F1 constant", "F1 linear"]
    assert "+1.00±0.00" in out
    made = json.loads((Path(umdf_run) / "results.json").read_text())
    made["linear"] = {c: {"F1": 51.0} for c in made["linear"]}
    (Path(umdf_run) / "results.json").write_text(json.dumps(made))
    assert evaluation.main([*runs, umdf_run, "--stored", "--protocol", "combos"]) == 0
    out = capsys.readouterr().out
    assert "F1 linear of umdf " in out and "F1 linear of corrkd " in out and "F1 constant  " in out


def test_runs_of_other_data_or_settings_never_share_a_row(tmp_path, capsys):
    runs = [stored_run(tmp_path, 1, 0.0), stored_run(tmp_path, 2, 9.0, data={"sha256": "b" * 64}), stored_run(tmp_path, 3, 5.0, config={"lr": .5})]
    assert evaluation.main([*runs, "--stored", "--protocol", "combos"]) == 0
    out = capsys.readouterr().out
    assert out.count("Available streams") == 2 and "F1 corrkd [lr 0.001] (n=1)" in out and "F1 corrkd [lr 0.5] (n=1)" in out and "F1 corrkd (n=1)" in out
    assert "other settings than the defaults: lr 0.5 (corrkd [lr 0.5])\n" in out and "SHA-256 aaaaaaaaaaaa\n" in out     # of whom, where not of all
    again = tmp_path / "again"
    again.mkdir()
    assert evaluation.main([runs[0], stored_run(again, 1, 0.0), "--stored", "--protocol", "combos"]) == 2
    assert "second run of the same configuration and seed" in capsys.readouterr().err


def test_stored_results_that_do_not_fit_are_refused(tmp_path, trained, capsys):
    one = stored_run(tmp_path, 1, 10.0)
    (tmp_path / "empty").mkdir()
    for arguments, said in (([one, "--stored"], "no condition 0.1"), ([one, "--stored", "--protocol", "combos", "--mask-seed", "3"], "mask_seed 0, not 3"),
                            ([str(tmp_path / "empty"), "--stored"], "there is no results.json in it")):
        assert evaluation.main(arguments) == 2
        error = capsys.readouterr().err
        assert said in error and len(error.splitlines()) == 1
    good = json.loads((Path(one) / "results.json").read_text())
    wrong = [{"run": {**good["run"], **change}} for change in ({"config": {"depth": 3}}, {"method": "mult"}, {"data": 5})]
    for change in (*wrong, {"conditions": None}, {"data": 5}, {"run": {}}):
        (Path(one) / "results.json").write_text(json.dumps({**good, **change}))
        assert evaluation.main([one, "--stored", "--protocol", "combos"]) == 2 and "of another version" in capsys.readouterr().err, change
    (Path(one) / "results.json").write_text(json.dumps(good))
    (Path(one) / "model.pt").write_bytes((trained / "runs" / "mosi/corrkd/s1" / "model.pt").read_bytes())
    assert evaluation.main([one, "--stored", "--protocol", "combos"]) == 2 and "another checkpoint" in capsys.readouterr().err


def test_runs_that_are_not_finished_are_named(trained, tmp_path, capsys):
    """One folder without a checkpoint is left out; one that was stopped after its first epoch says so."""
    (tmp_path / "data").symlink_to(trained / "data")
    (tmp_path / "nothing").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        def stop(folder, state, best, store=train.save_epoch):
            store(folder, state, best)
            if len(state["history"]) == 4:
                raise KeyboardInterrupt
        patch.setattr(train, "save_epoch", stop)
        assert run(tmp_path, epochs="3") == 130
    assert evaluation.main([str(tmp_path / "nothing"), str(tmp_path / "runs" / "mosi/corrkd/s1"), "--protocol", "combos"]) == 0
    said = capsys.readouterr()
    assert "note: seed 1 was stopped after 1 of 3 epochs" in said.out and "left out: " in said.err and "nothing has no model.pt" in said.err
    assert evaluation.main([str(trained / "runs" / "mosi/corrkd/s1"), "--protocol", "combos"]) == 0 and "stopped after" not in capsys.readouterr().out


def test_all_ablations_and_the_full_method_by_one_word():
    for method, module in evaluation.METHODS.items():
        assert train.parse(["--method", method, "--dataset", "mosi", "--ablate", "all"]).ablate == ["", *module.ABLATIONS]


def test_the_plot(trained, tmp_path, capsys, monkeypatch):
    run_folder = str(trained / "runs" / "mosi/corrkd/s1")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert evaluation.main([run_folder, "--plot", str(tmp_path / "f.png")]) == 2
    assert "pip install matplotlib" in capsys.readouterr().err
    monkeypatch.undo()
    pytest.importorskip("matplotlib", reason="matplotlib is optional and not installed")
    folders = [run_folder, str(trained / "runs" / "mosi/corrkd-no_scd/s1")]
    for name, more in (("curves.png", ()), ("tsne.png", ("--figure", "tsne")), ("curves.pdf", ("--stored",))):
        assert evaluation.main([*folders, "--plot", str(tmp_path / name), *more]) == 0
        assert (tmp_path / name).stat().st_size > 5000
    assert evaluation.main([run_folder, "--plot", str(tmp_path / "f.xyz")]) == 2 and "--plot" in capsys.readouterr().err
    assert evaluation.main([run_folder, "--plot", str(tmp_path / "no" / "f.png")]) == 2 and "cannot be written" in capsys.readouterr().err


def test_the_joint_representation_is_what_the_head_gets(trained):
    """Of every class at most 100 clips; the head applied to it gives the model's answer."""
    for method, task in (("corrkd", "polarity"), ("umdf", "regression"), ("double_flow", "regression"), ("umdf", "emotions")):
        torch.manual_seed(0)
        label = (torch.arange(300) % 3 - 1.0) if task != "emotions" else torch.eye(4)[torch.arange(300) % 4]
        split = {m: torch.randn(300, 6, w) for m, w in (("text", 5), ("audio", 4), ("vision", 3))}
        split |= {"real": {m: torch.ones(300, 6, dtype=torch.bool) for m in STREAMS}, "label": label, "id": []}
        model = evaluation.METHODS[method].Model({"text": 5, "audio": 4, "vision": 3}, task).eval()
        whole, = evaluation.predict(model, split, [data.evaluation_masks(split["real"], "l", "test")])
        args = evaluation.parse(["x"])
        h, kind = evaluation.joint(model, split, task, "l", args)
        counts = np.unique(kind, return_counts=True)[1].tolist()
        assert counts == ([75] * 4 if task == "emotions" else [100, 100])
        answers = model.classify(torch.from_numpy(h)).flatten(1)
        for row, k in ((0, kind[0]), (len(h) - 1, kind[-1])):
            wanted = [i for i in range(300) if (label[i].argmax() if task == "emotions" else int(label[i] > 0) if label[i] else -1) == k]
            assert min((whole.flatten(1)[wanted] - answers[row]).abs().sum(1)) < 1e-5


# ------------------------------------------------------------------------------------- programs as programs

def test_the_readmes_commands_cut_to_seconds(tmp_path):
    """The first command of the README as it stands there, fewer clips and one seed; then the command that it prints."""
    readme = (ROOT / "README.md").read_text()
    command = next(line for line in readme.splitlines() if "train.py --method corrkd --dataset mosi --synthetic" in line)
    first = command.split("python ")[-1].split()
    assert "pip install -r requirements.txt && " in command and first[-2:] == ["--epochs", "5"]
    done = program(ROOT / first[0], *first[1:-2], "--epochs", "1", "--limit", "60", "--seeds", "1111", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for part in ("command: python", "code: commit", "device: ", "SYNTHETIC stand-in", "parameters", "teacher 1/1", "student 1/1", "{l,a,v}"):
        assert part in done.stdout, part
    assert done.stderr == ""        # no progress bar where there is no terminal, no warning
    second = done.stdout.splitlines()[-1].split("python ")[1].split()
    done = program(ROOT / second[0], *second[1:], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("SYNTHETIC") >= 2 and "F1 constant" in done.stdout and "area" in done.stdout and done.stderr == ""
    assert "pip install -r requirements.txt && python -m pytest -q" in readme and "python -m pytest -q" in (ROOT / ".ci" / "run").read_text()


def readme_commands():
    """The train.py and eval.py lines of the README, as lists of words, D standing for each data set in turn."""
    found = re.findall(r"(?:^|`|&& )python ((?:train|eval)\.py [^`\n]*)", (ROOT / "README.md").read_text(), re.M)
    words = [shlex.split(command) for command in found]
    return [[re.sub(r"\bD\b", d, w) for w in line] for line in words if "-h" not in line
            for d in (data.SIZES if any(re.search(r"\bD\b", w) for w in line) else ("",))]


def test_every_command_of_the_readme_is_understood():
    commands = readme_commands()
    assert len(commands) > 30
    for name, *words in commands:
        assert {"train.py": train, "eval.py": evaluation}[name].parse(words), words


@pytest.mark.long
def test_every_training_command_of_the_readme_starts(tmp_path, monkeypatch, capsys):
    """Each line on small made-up data: the data is loaded, all its ablations are built, a batch goes through each stage."""
    monkeypatch.setattr(data, "SIZES", dict.fromkeys(data.SIZES, (24, 12, 12)))
    monkeypatch.chdir(tmp_path)
    lines = {tuple(words) for name, *words in readme_commands() if name == "train.py" and "--features" not in words}
    assert {(w[w.index("--method") + 1], w[w.index("--dataset") + 1]) for w in lines} == {(m, d) for m in evaluation.METHODS for d in data.SIZES}
    for words in sorted(lines):
        if "--data-dir" in words:
            words = (*words[:words.index("--data-dir")], *words[words.index("--data-dir") + 2:])
        assert train.main([*words, "--synthetic", "--dry-run", "--device", "cpu"]) == 0, words
    assert capsys.readouterr().out.count("one batch") >= len(lines) and not list(tmp_path.iterdir())


@pytest.mark.long
def test_seeds_side_by_side(trained, tmp_path):
    """The same numbers as one after the other; a seed that fails is named and the others finish."""
    (tmp_path / "data").symlink_to(trained / "data")
    blocked = tmp_path / "runs" / "mosi/corrkd/s3"
    blocked.mkdir(parents=True)
    (blocked / "config.json").write_text("{}")
    (blocked / "model.pt").write_bytes((trained / "runs" / "mosi/corrkd/s2" / "model.pt").read_bytes())   # not of this run
    done = program(ROOT / "train.py", "--method", "corrkd", "--dataset", "mosi", "--data-dir", tmp_path / "data", "--out", tmp_path / "runs", "--epochs", "3",
                   "--batch-size", "16", "--lr", "0.004", "--device", "cpu", "--jobs", "2", "--seeds", "1", "3")
    assert done.returncode == 2 and "corrkd/s3 failed: error: " in done.stderr and "Traceback" not in done.stderr
    assert "corrkd/s1: student 3/3" in done.stdout and "F1 ours (n=1)" in done.stdout
    one, two = history(trained), history(tmp_path)
    assert [h["stage"] for h in one] == [h["stage"] for h in two] and one[0]["losses"]["task"] == pytest.approx(two[0]["losses"]["task"], rel=1e-4)


def test_processes_side_by_side_stay_and_share_the_plan(tmp_path, monkeypatch, capsys):
    """Two processes train six runs, to the numbers of one after the other; nobody else loads the data; a run that fails is named."""
    written(tmp_path / "data", learnable(n=12))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)        # as the processes have
    plan = ["--ablate", "", "no_rep", "no_resp"]
    assert run(tmp_path, *plan, seeds=("1", "2"), epochs="1", method="umdf") == 0
    torch.set_num_threads(threads)
    one = capsys.readouterr().out
    (tmp_path / "runs").rename(tmp_path / "alone")
    blocked = tmp_path / "runs" / "mosi" / "umdf-no_rep" / "s2"
    blocked.mkdir(parents=True)
    (blocked / "config.json").write_text("{}")
    begun, start = [], multiprocessing.get_context("spawn").Process.start
    monkeypatch.setattr(multiprocessing.get_context("spawn").Process, "start", lambda self: (begun.append(self), start(self))[1])
    monkeypatch.setattr(data, "load", None)         # in this process
    assert run(tmp_path, *plan, "--jobs", "2", seeds=("1", "2"), epochs="1", method="umdf") == 2
    said = capsys.readouterr()
    assert len(begun) == 2 and "umdf-no_rep/s2 failed: error: " in said.err and "Traceback" not in said.err
    left = sorted(p.relative_to(tmp_path / "runs") for p in (tmp_path / "runs").rglob("model.pt"))
    assert len(left) == 5
    for path in left:
        here, there = (torch.load(root / path, weights_only=True)["model"] for root in (tmp_path / "runs", tmp_path / "alone"))
        assert equal(here, there), path
    tables = [text[text.index("validation, umdf on"):].split("validation, umdf no_rep")[0] for text in (said.out, one)]
    assert tables[0] == tables[1] and one.strip().endswith(f"the test table: python eval.py {tmp_path / 'runs' / 'mosi'}")     # one folder


@pytest.mark.long
@pytest.mark.skipif(os.name != "posix", reason="sends a POSIX signal")
def test_a_stop_from_the_keyboard_ends_all_processes_and_says_how_to_go_on(tmp_path):
    with begun(ROOT / "train.py", "--method", "corrkd", "--dataset", "mosi", "--synthetic", "--limit", "60", "--epochs", "99", "--seeds", "1", "2", "--jobs", "2",
               "--device", "cpu", cwd=tmp_path) as process:
        assert any("s1: teacher 2/99" in line for line in process.stdout)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=30)
    assert process.returncode == 130 and error.strip() == "stopped; the same command goes on after the last finished epoch"
    assert len((tmp_path / "runs" / "mosi-synthetic/corrkd/s1" / "log.jsonl").read_text().splitlines()) >= 2


def test_a_dry_run_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert train.main("--method corrkd --dataset iemocap --synthetic --dry-run --limit 40 --device cpu".split()) == 0
    assert "student, one batch: task" in capsys.readouterr().out and not list(tmp_path.iterdir())


USER_ERRORS = {
    "no data": (["train.py", "--dataset", "mosei"], "No file of mosei in data"),
    "no file in it": (["train.py", "--data-dir", "run"], "No file of mosi in run"),
    "damaged data": (["train.py", "--data-dir", "bad.pkl"], "bad.pkl is refused"),
    "unknown ablation": (["train.py", "--synthetic", "--ablate", "no_sdc"], "no_sdc: corrkd has no_scd"),
    "no such device": (["train.py", "--synthetic", "--device", "cuda:77"], "has no such device"),
    "zero epochs": (["train.py", "--synthetic", "--epochs", "0"], "--epochs must be greater than 0"),
    "out is a file": (["train.py", "--synthetic", "--limit", "40", "--out", "bad.pkl"], "cannot be made"),
    "no such folder": (["train.py", "--data-dir", "gone"], "No file of mosi in gone, which does not exist"),
    "a file for a run": (["eval.py", "bad.pkl"], "bad.pkl is a file: name a run folder"),
    "csv nowhere": (["eval.py", "run", "--csv", "gone/t.csv"], "--csv gone/t.csv cannot be written"),
    "json a folder": (["eval.py", "run", "--json", "run"], "--json run cannot be written"),
    "predictions nowhere": (["eval.py", "run", "--predictions", "gone/p.csv"], "--predictions gone/p.csv cannot be written"),
    "no run": (["eval.py", "nothing"], "there is no model.pt in it"),
    "damaged run": (["eval.py", "run"], "damaged or no checkpoint"),
    "another checkpoint": (["eval.py", "other"], "no checkpoint of this version of train.py"),
    "rate 2": (["eval.py", "run", "--rates", "2"], "shares from 0 to 1"),
    "check nothing": (["data.py", "check", "nowhere.pkl"], "nowhere.pkl does not exist"),
}


@pytest.mark.parametrize("name", USER_ERRORS)
def test_a_users_mistake_is_told_in_a_sentence(tmp_path, name, monkeypatch, capsys):
    arguments, said = USER_ERRORS[name]
    (tmp_path / "bad.pkl").write_bytes(b"nothing good")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "model.pt").write_bytes(b"nothing good")
    (tmp_path / "other").mkdir()
    torch.save({"state_dict": {}}, tmp_path / "other" / "model.pt")
    if arguments[0] == "train.py":
        arguments = [arguments[0], "--method", "corrkd", *([] if "--dataset" in arguments else ["--dataset", "mosi"]), *arguments[1:]]
    before = sorted(p for p in tmp_path.rglob("*"))
    if name in ("no data", "check nothing"):     # as a user would; the rest in process
        done = program(ROOT / arguments[0], *arguments[1:], cwd=tmp_path)
        code, error = done.returncode, done.stderr
    else:
        monkeypatch.chdir(tmp_path)
        try:
            code = {"train.py": train, "eval.py": evaluation, "data.py": data}[arguments[0]].main(arguments[1:])
        except SystemExit as stop:
            code = stop.code
        error = capsys.readouterr().err
    assert code == (1 if "check" in arguments else 2), error
    assert said in error and "Traceback" not in error and len(error.splitlines()) <= 2, error
    assert sorted(p for p in tmp_path.rglob("*")) == before


def test_a_reader_that_leaves_early_is_no_error(trained, tmp_path):
    """As in `eval.py ... | head -1`; what is written to files is written all the same."""
    arguments = ROOT / "eval.py", trained / "runs" / "mosi/corrkd/s1", "--protocol", "combos", "--csv", tmp_path / "t.csv"
    with subprocess.Popen([sys.executable, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 0 and (tmp_path / "t.csv").stat().st_size > 100


def test_a_stop_while_torch_is_imported_is_told_in_a_word():
    for name in ("train", "eval", "data"):
        code = f"import sys; sys.path[:0] = [{str(ROOT)!r}]; sys.modules['torch'] = None\ntry: import {name}\nexcept ImportError: pass\nraise KeyboardInterrupt"
        assert program("-c", code).stderr == "stopped\n", name


@pytest.mark.parametrize("module", [train, evaluation, data])
def test_help(module, capsys):
    with pytest.raises(SystemExit) as stop:
        module.main(["--help"])
    assert stop.value.code == 0 and "usage" in capsys.readouterr().out


@pytest.mark.parametrize("method", evaluation.METHODS)
def test_a_deterministic_run_is_the_same_on_a_cpu(tmp_path, method, monkeypatch):
    """The strict mode refuses operations without a repeatable form, and changes no number here."""
    written(tmp_path / "data", learnable(n=12))
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    asked = []
    for more in ([], ["--deterministic"]):
        monkeypatch.setattr(train, "train_epoch", lambda *a, whole=train.train_epoch: (
            asked.append(torch.are_deterministic_algorithms_enabled()), whole(*a))[1])
        assert run(tmp_path, *more, "--no-resume", epochs="1", method=method) == 0
        monkeypatch.undo()
        monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
        (tmp_path / f"runs{len(more)}").mkdir()
        (tmp_path / "runs").rename(tmp_path / f"runs{len(more)}" / "runs")
    torch.use_deterministic_algorithms(False)
    name = f"mosi/{method}/s1"
    assert asked[0] is False and asked[-1] is True
    assert equal(*(parameters(tmp_path / f"runs{i}", name) for i in (0, 1)))
