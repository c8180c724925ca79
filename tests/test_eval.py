"""eval.py: metrics by hand, masks, predictions, the linear baseline, checkpoints from elsewhere, tables, outputs."""
import csv
import functools
import importlib.util
import itertools
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import types
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

import corrkd
import data
import eval as evaluation
from data import DataError, SPLITS, STREAMS
from helpers import ROOT, WIDTHS, Call, content, feature_arguments, learnable, rerecord, run, run_main, written


RATES = ("--rates", "0.8", "0", "0.5", "0.5")        # neither sorted nor from 0 to 1
TRUTH, ANSWER = [-2.0, -1.0, 0.0, 0.5, 1.5, 3.0], [-1.4, 0.2, -0.1, 0.0, 2.5, 3.7]
NONE = float("nan")
NOT_OURS = "not as this train.py writes it"


def sized(train=40, valid=30, test=20, **changes):
    """A learnable pickle of so many clips a split, of which one in test has a name beyond ASCII."""
    made, sizes = learnable(n=max(train, valid, test), **changes), (train, valid, test)
    made["test"]["id"][5, 0] = "caf\xe9".encode()
    return {split: {key: value[:n] for key, value in made[split].items()} for split, n in zip(SPLITS, sizes)}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two seeds of CorrKD and of one ablation, evaluated; one label of test is 0."""
    folder, made = tmp_path_factory.mktemp("trained"), sized()
    made["test"]["labels"][3] = 0
    written(folder / "data", made)
    assert run(folder, "--ablate", "", "no_scd", seeds=("1", "2")) == 0
    assert run_main(folder / "runs", *RATES, main=evaluation.main) == 0
    return folder


@pytest.fixture
def copied(trained, tmp_path):
    """One run of its own, s1 of CorrKD, whose data is the fixture's."""
    return shutil.copytree(trained / "runs/mosi/corrkd/s1", tmp_path / "corrkd/s1")


@pytest.fixture
def comparable(monkeypatch):
    """The small made-up data counts as the papers': of the standard sizes, its text as wide as theirs."""
    monkeypatch.setattr(data, "SIZES", dict.fromkeys(data.SIZES, (40, 30, 20)))
    for module in evaluation.METHODS.values():
        monkeypatch.setattr(module, "FEATURES", WIDTHS)


def results(folder):
    """As a strict reader takes it: without NaN."""
    return json.loads((folder / "results.json").read_text(), parse_constant=pytest.fail)


def read_csv(path):
    return list(csv.DictReader(path.read_text("utf-8").splitlines()))


def shown(capsys, *arguments):
    """What eval.py prints, and its tables: "sets", "rates" or "paper" -> "metric name[ - subtracted]" -> column -> mean
    and deviation."""
    capsys.readouterr()
    assert run_main(*arguments, main=evaluation.main) == 0
    out, tables = capsys.readouterr().out, {"sets": {}, "rates": {}, "paper": {}}
    title = r"^(.+?)(?: in %)?(?: minus that of (.+?))?: (available|share|the paper).*\n\n((?:\|.*\n)+)"
    for metric, against, kind, table in re.findall(title, out, re.MULTILINE):
        first, _, *lines = ([cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines())
        rows = []
        for label, *texts in lines:
            if any(text.startswith("±") for text in texts) or not any(texts):       # the second line of a row
                rows[-1] = f"{rows[-1][0]} {label}".strip(), [a + b for a, b in zip(rows[-1][1], texts)]
            else:
                rows.append((label, texts))
        place = tables[{"available": "sets", "share": "rates", "the paper": "paper"}[kind]]
        for label, texts in rows:
            place[f"{metric} {label}" + (f" - {against}" if against else "")] = dict(zip(first[1:], texts))
    return out, tables


def refused(capsys, *arguments):
    """The sentence by which the program ends."""
    assert run_main(*arguments, main=evaluation.main) == 2
    *usage, error = capsys.readouterr().err.splitlines()
    assert "error: " in error and len(usage) <= 1
    return error


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("task, answer, truth, expected", [
    # always "negative" on 70 negative and 30 positive clips; with the arguments swapped it would be .824
    ("polarity", [0] * 100, [0] * 70 + [1] * 30, {"F1": 100 * .7 * 2 * .7 / 1.7, "Acc-2": 70}),
    ("polarity", [0, 1, 0, 1, 0], [1] * 5, {"F1": NONE, "Acc-2": 40}),
    # four decisions, neutral, happy, sad, angry: "no" to all, of ten clips four are sad and two of them angry
    ("emotions", [[0] * 4] * 10, [[0, 0, 1, 1]] * 2 + [[0, 0, 1, 0]] * 2 + [[0] * 4] * 6,
     {"F1 neutral": NONE, "F1 happy": NONE, "F1 sad": 100 * .6 * 1.2 / 1.6, "F1 angry": 100 * .8 * 1.6 / 1.8}),
    ("regression", ANSWER, TRUTH, {
        "MAE": (.6 + 1.2 + .1 + .5 + 1.0 + .7) / 6,
        # without label 0: truth - - + + +, answer - + - + + (0.0 is not > 0): 3 of 5
        "Acc-2": 60, "F1": 100 * (2 / 5 * .5 + 3 / 5 * 2 / 3),
        # with it, >= 0: truth - - + + + +, answer - + - + + +: 4 of 6
        "Acc-2 has0": 400 / 6, "F1 has0": 100 * (2 / 6 * .5 + 4 / 6 * .75),
        # halves to the even: truth -2 -1 0 0 2 3, answer -1 0 0 0 2 3 (2.5 -> 2, 3.7 clipped to 3): 4 of 6
        "Acc-7": 400 / 6, "Corr": statistics.correlation(TRUTH, ANSWER)}),
    ("regression", [.2] * 4, [1.0, 2.0, -1.0, 0.0], {
        "MAE": 1, "Acc-2": 200 / 3, "F1": 100 * 2 / 3 * .8, "Acc-2 has0": 75, "F1 has0": 100 * 3 / 4 * 6 / 7,
        "Acc-7": 25, "Corr": NONE})])
def test_metrics_are_those_computed_by_hand_and_nan_where_they_are_not_defined(task, answer, truth, expected):
    assert evaluation.metrics(task, np.array(answer), np.array(truth)) == pytest.approx(expected, nan_ok=True)


def test_polarity_leaves_label_zero_out_and_the_constant_is_the_median_or_the_commoner_class():
    index, truth = evaluation.targets(torch.tensor([-1.0, 0.0, .2, 0.0, 3.0]), "polarity")
    assert index.tolist() == [0, 2, 4] and truth.tolist() == [0, 1, 1]
    with pytest.raises(DataError, match="All sentiments of a split are 0"):
        evaluation.targets(torch.zeros(3), "polarity")
    assert evaluation.constant(torch.tensor([-1.0, .2, .4, 3.0, 3.0]), "regression") == pytest.approx(.4)
    assert evaluation.constant(torch.tensor([0, 1, 1]), "polarity") == 1
    assert evaluation.constant(torch.tensor([[0, 1, 0, 0], [0, 1, 0, 1], [1, 0, 0, 0]]), "emotions") == [0, 1, 0, 0]


def test_the_score_is_the_mean_over_the_sets_of_f1_or_minus_mae():
    sets = {c: {"n": 3, "F1": 90.0, "MAE": 1.0 + k} for k, c in enumerate(data.SETS)}
    assert evaluation.score(sets) == pytest.approx(-4.0)
    emotions = {c: {"n": 3, "F1 happy": 50.0 + k, "F1 sad": 60.0 + k} for k, c in enumerate(data.SETS)}
    assert evaluation.score(emotions) == pytest.approx(58.0)
    one_class = {"l": {"n": 3, "F1 happy": NONE, "F1 sad": 60.0}, "a": {"n": 3, "F1": NONE, "Acc-2": 50.0}}
    assert evaluation.score(one_class) == pytest.approx(55.0)


@pytest.mark.parametrize("lengths", [(8, 8, 8), (8, 12, 10)])
@pytest.mark.parametrize("joint", [False, True])
def test_predictions_are_those_of_one_full_pass_for_each_condition(tmp_path, lengths, joint):
    """Of a model that offers its streams one by one or not, whatever the batch size, which is less for long clips."""
    made, order = content(n=30, lengths=lengths), np.random.default_rng(0).permutation(30)
    made["test"]["vision"][:7] = 0
    made["test"] = {key: value[order] for key, value in made["test"].items()}
    split = data.load("mosi", written(tmp_path, made), SPLITS)["test"]
    torch.manual_seed(0)
    model, conditions = corrkd.CorrKD(WIDTHS, "polarity").train(), [*data.SETS, 0.0, 0.3, 1.0]
    if joint:
        model.encode = None
    parts, whole = (evaluation.predict(model, split, conditions, "test", size=size) for size in (7, 256))
    for condition in conditions:
        present = data.evaluation_masks(split["real"], condition, "test")
        with torch.no_grad():
            h = model.represent({m: split[m] * present[m][..., None] for m in STREAMS}, split["real"])
        torch.testing.assert_close(parts[condition], model.classify(h), rtol=0, atol=1e-5)
        torch.testing.assert_close(parts[condition], whole[condition], rtol=0, atol=1e-6)
    assert evaluation.clips_at_a_time({"real": {m: torch.ones(1, 500) for m in STREAMS}}) == 43
    split["audio"][9] = NONE            # of one clip
    with pytest.raises(DataError, match="not finite"):
        evaluation.predict(model, split, ["lav"], "test")


@pytest.mark.parametrize("task, four, noise", [
    ("regression", False, 2), ("regression", True, 0), ("polarity", True, 0)])
def test_the_linear_baseline_is_a_ridge_regression_for_each_set_of_streams(tmp_path, task, four, noise):
    """Against the closed form on plain features, clip by clip. The strength, the features and the streams of a set are
    the best on validation, not on training and not of {l,a,v}; a frame of zeros is not there, and a clip without a
    stream is answered by the regression of the set that it has."""
    loaded = data.load("mosi", written(tmp_path, learnable(lengths=(8, 12, 10))), SPLITS)
    for split in SPLITS if four else ():
        audio, vision = loaded[split]["audio"][..., 0], loaded[split]["vision"][..., 1]
        loaded[split]["label"] = audio.amax(1) + vision.amin(1) + .01       # none is 0
    loaded["valid"]["label"] += noise * torch.randn(40, generator=torch.Generator().manual_seed(0))
    loaded["test"]["vision"][..., 2] = 0        # a number of each frame, not the frame, is 0
    loaded["valid"]["audio"] *= .3
    for name in SPLITS[1:]:
        loaded[name]["vision"][::4] = 0
    labels = {name: loaded[name]["label"].double().numpy() for name in SPLITS}
    got, decides = evaluation.fit_linear(loaded, task), task == "polarity"
    y = np.sign(labels["train"]) if decides else labels["train"]

    def pools(frames):
        x = frames[(frames != 0).any(1)].double().numpy()
        return [x.mean(0), x.std(0), x.max(0), x.min(0)] if len(x) else [np.zeros(frames.shape[1])] * 4

    def plain(streams, pooled):
        return np.concatenate([pool for x in streams for pool in pools(x)[:4 if pooled else 1]])

    @functools.cache
    def fitted(pooled, strength, read):
        x = np.array([plain([loaded["train"][m][i] for m in read], pooled) for i in range(40)])
        centred = x - x.mean(0)
        w = np.linalg.solve(centred.T @ centred + strength * np.eye(x.shape[1]), centred.T @ (y - y.mean()))
        return w, y.mean() - x.mean(0) @ w

    def answer(name, condition, pooled, strength, reads={}):
        split, answers = loaded[name], []
        present = data.evaluation_masks(split["real"], condition, name)
        for i in range(40):
            frames = {m: split[m][i] * present[m][i][:, None] for m in STREAMS}
            own = tuple(m for m in STREAMS if frames[m].any())
            read = reads.get(own, own)
            w, bias = fitted(pooled, strength, read) if read else (0, y.mean())
            answers.append((plain([frames[m] for m in read], pooled) @ w if read else 0) + bias)
        return np.array(answers)

    def error(name, sets, choice):          # choice: whether pooled, strength; own streams -> those that are read
        found, y = [answer(name, c, *choice) for c in sets], labels[name]
        if decides:
            return -statistics.fmean(evaluation.metrics(task, (x > 0) * 1, (y > 0) * 1)["F1"] for x in found)
        return statistics.fmean(abs(x - y).mean() for x in found)
    choices = [(pooled, 10. ** power) for pooled in (False, True) for power in range(5, -1, -1)]
    best, *others = (min(choices, key=lambda choice: error(name, sets, choice)) for name, sets in (
        ("valid", data.SETS), ("train", data.SETS), ("valid", ["lav"])))
    assert (decides or best not in others) and best[0] is four
    reads = {}
    for condition, own in data.SETS.items():
        choices = [some for k in range(len(own), 0, -1) for some in itertools.combinations(own, k)]
        reads[own] = min(choices, key=lambda some: error("valid", [condition], (*best, {**reads, own: some})))
    assert reads["audio", "vision"] != ("audio", "vision") or decides
    model, conditions = evaluation.Linear(task, **got), [.3, *data.SETS]
    output = evaluation.predict(model, loaded["test"], [*conditions, 1.0], "test", size=7)
    for condition in conditions:
        expected = answer("test", condition, *best, reads)
        np.testing.assert_allclose(output[condition][:, -1], expected, rtol=0, atol=1e-6)
        assert not decides or torch.equal(output[condition][:, 0], -output[condition][:, 1])
    assert output[1.0][:, -1].tolist() == pytest.approx([y.mean()] * 40)        # nothing is left


def test_a_set_that_equals_another_has_no_second_say_in_the_linear_baseline_and_of_equals_most_streams_are_read(
        tmp_path, monkeypatch):
    """Without vision {l,a,v} is {l,a}; text alone tells the class."""
    made, asked, pooled_clips = learnable(n=12), [], evaluation.pooled_clips
    for split in made.values():
        split["vision"][:] = 0
    loaded = data.load("mosi", written(tmp_path, made))
    monkeypatch.setattr(evaluation, "pooled_clips", lambda *of: asked.append(of[2]) or pooled_clips(*of))
    evaluation.fit_linear(loaded, "regression")
    assert asked == ["lav", "l", "a", "la"]         # the first of training
    assert evaluation.fit_linear(loaded, "polarity")["weight"][3, :, 24:40].any()       # audio's, of {l,a}


@pytest.mark.parametrize("change, more, said", [
    ({"format": 3}, [], "another version"),
    ({"width": 3_000_000}, [], NOT_OURS),
    ({"dims": {"text": 2 ** 40, "audio": 4, "vision": 3}}, [], "trained on {'text': 1099511627776"),
    ({"model": {}}, [], NOT_OURS),
    ({"model": Call(os.system, ("touch GOTCHA",))}, [], "more than tensors and plain values"),
    (None, [], NOT_OURS),       # cut short
    ({}, ["--rates", "1.5"], "1.5 is no share from 0 to 1"),
    ({}, ["--no-rates", "--plot", "x.png"], "leave --no-rates out"),
    ({}, ["--csv", "nowhere/t.csv"], "folder cannot be written"),
    ({}, ["--csv", "model.pt"], "does not end in .csv"),
    ({}, ["--plot", "x.png"], "pip install matplotlib"),
    ({}, ["log.jsonl"], "There is no model.pt in log.jsonl")])
def test_mistakes_and_what_is_no_result_of_training_are_told_at_once(copied, change, more, said, monkeypatch, capsys):
    """In a sentence, before any answer; nothing in a file is run, and a record alone asks for no memory."""
    monkeypatch.chdir(copied)
    monkeypatch.setattr(evaluation, "predict", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    if change is None:
        (copied / "model.pt").write_bytes((copied / "model.pt").read_bytes()[:-300])
    else:
        rerecord(copied, **change)
    before = {path: path.read_bytes() for path in copied.iterdir()}
    error = refused(capsys, copied, *more)
    assert said in error and error.isprintable()
    assert {path: path.read_bytes() for path in copied.iterdir()} == before


def test_runs_in_one_folder_differ_in_their_seed_alone(copied, capsys):
    changed = {**torch.load(copied / "model.pt", weights_only=True)["run"]["data"], "sha256": "0" * 64}
    for change, said in (({"seed": 7, "batch_size": 8}, "they differ in batch_size"), ({}, "the same seed"),
                         ({"seed": 7, "data": changed}, "they differ in sha256")):
        rerecord(copied.parent / "s7", copied, **change)
        assert said in refused(capsys, copied.parent, "--no-rates")


def test_every_number_of_the_tables_and_the_csv_is_made_of_what_was_measured(trained, capsys):
    """Means, deviations, differences seed by seed, Avg. and area from results.json alone, by other means; a star stands
    where the interval leaves out 0."""
    columns = ["l", "a", "v", "la", "lv", "av", "lav", "0.0", "0.5", "0.8", "avg", "area"]

    def both_seeds(name, part):
        found = [results(trained / "runs/mosi" / name / f"s{s}")[part] for s in (1, 2)]
        x = np.array([[one[c]["F1"] for c in columns[:-2]] for one in found])
        return np.column_stack((x, x[:, :6].mean(1), (.25 * x[:, 7] + .4 * x[:, 8] + .15 * x[:, 9]) / .8))
    full, ablation = both_seeds("corrkd", "conditions"), both_seeds("corrkd-no_scd", "conditions")
    linear, constant = both_seeds("corrkd", "linear"), both_seeds("corrkd", "constant")
    expected = {
        "F1 corrkd": full, "F1 corrkd no_scd": ablation, "F1 corrkd no_scd - corrkd": ablation - full,
        "F1 corrkd - linear": full - linear, "F1 corrkd no_scd - linear": ablation - linear,
        "F1 constant": constant[:1], "F1 linear": linear[:1]}
    out, tables = shown(capsys, trained / "runs", *RATES, "--csv", trained / "t.csv")
    assert set(tables["sets"]) == {*expected} and out.count(", n = 2\n") == 4
    assert set(tables["rates"]) == {label for label in expected if " - " not in label}
    lines, cells, stars = read_csv(trained / "t.csv"), set(), set()
    assert list(lines[0]) == "dataset synthetic data table metric kind name column mean std n low high".split()
    about = "mosi", "False", data.sha256(trained / "data/mosi_data.pkl")
    for x in lines:
        column, part = x["column"], "sets" if x["column"] in (*data.SETS, "avg") else "rates"
        assert (x["dataset"], x["synthetic"], x["data"], x["table"]) == (*about, part)
        mean, std, low, high = (float(x[name] or "nan") for name in ("mean", "std", "low", "high"))
        paired, star = x["kind"] == "paired", "*" if low > 0 or high < 0 else ""
        assert (low <= high) is (paired and x["metric"] == "F1")
        if x["metric"] == "F1":
            label = f"F1 {x['name'] if x['kind'] in ('ours', 'paired') else x['kind']}"
            numbers = expected[label][:, columns.index(column)]
            deviation = statistics.stdev(numbers) if len(numbers) > 1 else NONE
            assert (mean, std) == pytest.approx((numbers.mean(), deviation), nan_ok=True)
            assert x["n"] == ("2" if len(numbers) > 1 else "")
            text = f"{mean:{'+' if paired else ''}.2f}{star}" + (f"±{std:.2f}" if len(numbers) > 1 else "")
            assert tables[part].get(label, {}).get(evaluation.TITLES.get(column, column), text) == text
            cells.add((label, column))
            stars.add(star)
    assert cells == {(label, column) for label in expected for column in columns} and stars == {"", "*"}


@pytest.mark.parametrize("split, seed, limit", [("test", 6, 9), ("valid", 7, None), ("train", 0, None)])
def test_every_number_of_results_json_and_predictions_csv_is_what_its_name_says(
        copied, trained, split, seed, limit, monkeypatch, capsys):
    """On the first clips, standardised as in training, under the split's own masks; the constant is the record's."""
    checkpoint = torch.load(copied / "model.pt", weights_only=True)
    clips = data.load("mosi", trained / "data", SPLITS, limit=limit, stats=checkpoint["stats"])[split]
    index, truth = (part.numpy() for part in evaluation.targets(clips["label"], "polarity"))
    classes = ["" if y == 0 else str(int(y > 0)) for y in clips["label"].tolist()]
    model, linear = corrkd.CorrKD(WIDTHS, "polarity").eval(), evaluation.Linear("polarity", **checkpoint["linear"])
    model.load_state_dict(checkpoint["model"])
    always = 1 - evaluation.constant(torch.tensor(truth), "polarity")       # not what these labels would say
    rerecord(copied, constant=always, limit=limit)
    asked, predict = [], evaluation.predict
    monkeypatch.setattr(evaluation, "predict", lambda *of: asked.append(of[1:]) or predict(*of))
    out, _ = shown(capsys, copied, "--split", split, "--mask-seed", seed, "--rates", "0.3", "0.6", "1")
    assert len(asked) == 2 and asked[0][1:] == asked[1][1:]        # the model and the linear baseline, alike
    got, lines = results(copied), read_csv(copied / "predictions.csv")
    assert len(lines) == 10 * len(classes)

    def measured(output):
        return evaluation.metrics("polarity", output.argmax(-1).numpy()[index], truth)
    for c in (*data.SETS, .3, .6, 1.0):
        masks = data.evaluation_masks(clips["real"], c, split, seed)
        streams = {m: clips[m] * masks[m][..., None] for m in STREAMS}
        about = {"n": len(truth)}
        output = model(**streams, real=clips["real"])
        assert got["conditions"][str(c)] == {**about, **measured(output)}
        second = linear.classify(linear.represent(streams, clips["real"]))
        assert got["linear"][str(c)] == {**about, **measured(second)}
        assert got["constant"][str(c)] == measured(torch.eye(2)[always].expand(len(classes), 2))
        names, truths, answers, chance = zip(*(tuple(x.values())[1:] for x in lines if x["condition"] == str(c)))
        assert (list(names), list(truths)) == (clips["id"], classes)
        assert [int(answer) for answer in answers] == output.argmax(-1).tolist()
        assert output.softmax(-1)[:, 1].tolist() == pytest.approx([float(p) for p in chance], abs=1e-6)
    assert (got["split"], got["mask_seed"], got["epoch"], got["epochs_run"]) == (split, seed, checkpoint["epoch"], 2)
    assert f"corrkd on mosi, {split} split, seeds 1, mask seed {seed}" in out
    assert got["data"]["sha256"][:16] in out and "SYNTHETIC" not in out
    assert got["checkpoint_sha256"] == data.sha256(copied / "model.pt")


def test_a_draw_of_each_clip_once_gives_the_difference_itself(copied, monkeypatch, capsys):
    """Of one seed; the clip of sentiment 0 does not count, however often it is drawn."""
    monkeypatch.setattr(evaluation, "draw_weights", lambda units: np.array([[1.0, 1, 1, 9] + [1] * 16] * 2))
    shown(capsys, copied, *RATES, "--csv", copied / "t.csv")
    lines = [[float(x[name]) for name in ("low", "mean", "high")] for x in read_csv(copied / "t.csv") if x["low"]]
    assert len(lines) == 12 and all(low == pytest.approx(mean) == high for low, mean, high in lines)


def test_seeds_are_paired_by_their_number_and_the_reference_is_the_full_method(copied, trained, capsys):
    """A run named twice counts once; a second group of one name has its folder's; another treatment, another table."""
    top, runs = copied.parent.parent, trained / "runs/mosi"
    rerecord(top / "a/1", runs / "corrkd-no_scd/s1", seed=2)
    rerecord(top / "a/2", runs / "corrkd-no_scd/s2", seed=3)
    rerecord(top / "corrkd/s2", runs / "corrkd/s2")
    long = top / ("e" * 90)
    rerecord(long / "s1", copied)
    out, _ = shown(capsys, top, top / "a", *RATES, "--csv", top / "t.csv")
    first, second = (results(top / where)["conditions"] for where in ("a/1", "corrkd/s2"))
    lines = [x for x in read_csv(top / "t.csv") if (x["kind"], x["metric"]) == ("paired", "F1")]
    named = {(x["name"], x["n"]) for x in lines if not x["name"].endswith("linear")}
    assert named == {("corrkd no_scd - corrkd", "1"), (f"corrkd [{long}] - corrkd", "1")} and "n = 1 or 2" in out
    found = {x["column"]: float(x["mean"]) for x in lines if x["name"] == "corrkd no_scd - corrkd"}
    assert found == pytest.approx(found | {c: first[c]["F1"] - second[c]["F1"] for c in first})
    rerecord(top / "c/s1", copied, limit=9)
    rerecord(top / "d/s1", copied, normalize=False)
    rerecord(top / "f/s1", copied, data={**results(copied)["run"]["data"], "sha256": "0" * 64})
    out, _ = shown(capsys, top, "--data-dir", trained / "data", *RATES, "--csv", top / "t.csv")
    assert out.count("F1 in %: available streams") == 4
    cells = [(x["metric"], x["name"], x["column"]) for x in read_csv(top / "t.csv")]
    assert cells.count(("F1", "corrkd", "area")) == 4


def test_a_reason_to_read_the_numbers_with_care_is_told(copied, tmp_path, capsys):
    rerecord(copied, epochs=9, batch_size=64)
    out, tables = shown(capsys, copied, "--no-rates")
    assert "note: seed 1 was stopped after 2 of 9 epochs" in out and "batch_size" not in out
    assert "note: other settings than the defaults: epochs 9" in out and "nothing is compared with the paper" in out
    for absent in ("not standardised", "simulated text", "the file that", ", paper"):
        assert absent not in out
    assert tables["sets"] and not tables["rates"] and list(results(copied)["conditions"]) == list(data.SETS)
    rerecord(copied, normalize=False)
    made = sized()
    made["test"]["labels"] = abs(made["test"]["labels"])
    out, tables = shown(capsys, copied, "--no-rates", "--data-dir", written(tmp_path, made))
    assert "features not standardised" in out and "note: labels of one class alone in test" in out
    assert tables["sets"] == {} and results(copied)["conditions"]["l"]["F1"] is None


def test_a_note_says_of_which_row_and_seed_it_is(copied, tmp_path, capsys):
    rerecord(copied, epochs=9)
    rerecord(copied.parent / "s2", copied, seed=2)
    shutil.move(copied / "log.jsonl", copied.parent / "s2")         # nothing is known of seed 1
    rerecord(tmp_path / "no_scd/s1", copied, ablation="no_scd")
    out, _ = shown(capsys, tmp_path, "--no-rates")
    assert "note: seed 2 was stopped after 2 of 9 epochs (corrkd)\n" in out and "seed 1" not in out


def test_a_full_disk_leaves_the_results_of_before(copied, monkeypatch, capsys):
    before, replace = (copied / "results.json").read_bytes(), os.replace

    def full(source, target):
        if Path(target).name == "results.json":
            raise OSError(28, "No space left on device")
        replace(source, target)
    monkeypatch.setattr(os, "replace", full)
    assert "results.json cannot be written: No space left" in refused(capsys, copied, "--no-rates")
    assert (copied / "results.json").read_bytes() == before


def test_a_reader_who_stops_reading_sees_no_traceback(copied):
    """As with | head, here before the first line. The exit code tells a script so."""
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "eval.py", copied, "--device", "cpu"], cwd=ROOT, stdout=write,
                          stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert done.returncode == 141 and "Traceback" not in done.stderr and "Exception" not in done.stderr


def test_the_figure_has_a_panel_for_each_metric(trained, tmp_path, comparable, monkeypatch, capsys):
    figure = pytest.importorskip("matplotlib.figure").Figure
    axes, whole = [], figure.subplots
    monkeypatch.setattr(figure, "subplots", lambda *a, **k: (axes.append(whole(*a, **k)), axes[0])[1])
    rerecord(tmp_path / "s1", trained / "runs/mosi/corrkd/s1", normalize=False)     # another panel
    shown(capsys, trained / "runs", tmp_path, *RATES, "--plot", tmp_path / "f.png")
    assert (tmp_path / "f.png").read_bytes().startswith(b"\x89PNG")
    axis, _ = sorted(axes[0].flat, key=lambda axis: -len(axis.containers))
    assert axis.get_title() == "mosi\ntest split, 19 clips" and axis.get_ylabel() == "weighted F1 (%)"
    curves = {curve.get_label(): curve for curve in axis.containers}
    assert set(curves) == {"corrkd", "corrkd no_scd", "constant", "linear"}
    found = [results(trained / f"runs/mosi/corrkd/s{s}")["conditions"] for s in (1, 2)]
    found = np.array([[one[p]["F1"] for p in ("0.0", "0.5", "0.8")] for one in found])
    line, _, (bars,) = curves["corrkd"]
    np.testing.assert_allclose(line.get_data(orig=False), ([0, .5, .8], found.mean(0)))
    above = [bar[1, 1] for bar in bars.get_segments()]
    np.testing.assert_allclose(above, found.mean(0) + found.std(0, ddof=1))


def test_the_papers_numbers_stand_beside_ours_where_the_data_is_theirs(copied, comparable, capsys):
    """Checksums of what was compared with their tables, cell by cell."""
    tables = {name: json.dumps(module.REPORTED, sort_keys=True) for name, module in evaluation.METHODS.items()}
    assert {name: zlib.crc32(table.encode()) for name, table in tables.items()} == {
        "umdf": 2661151904, "corrkd": 1214070142, "double_flow": 2929009196}
    sets, rates, _ = shown(capsys, copied, "--rates", "0")[1].values()
    assert sets["F1 corrkd, paper"]["{l,a}"] == "83.56" and rates["F1 corrkd, paper"]["0.0"] == "83.94"
    rerecord(copied.parent / "no_scd/s1", copied, ablation="no_scd")
    ablation = shown(capsys, copied.parent / "no_scd", "--no-rates")[1]["sets"]["F1 corrkd no_scd, paper"]
    assert (ablation["{l,a}"], ablation["Avg."]) == ("-", "72.46")
    out, _ = shown(capsys, copied, "--no-rates", "--split", "valid")
    assert "corrkd, paper" not in out and "its numbers are of the test split" in out


@pytest.mark.parametrize("dataset, other", [("mosei", "mosi"), ("mosi", "mosei")])
def test_a_run_on_one_data_set_is_evaluated_on_another_and_compared_with_nothing(
        tmp_path, comparable, monkeypatch, dataset, other, capsys):
    """Emotions are refused."""
    sizes = {"mosi": (40, 30, 20), "mosei": (60, 50, 24), "iemocap": (80, 70, 90)}
    files = {name: tmp_path / "data" / data.FILES[name][0] for name in sizes}
    monkeypatch.setattr(data, "SIZES", sizes)
    for name, file in files.items():
        written(file.parent, sized(*sizes[name], emotions=name == "iemocap"), file.name)
    assert run(tmp_path, dataset=dataset, epochs="1") == 0
    folder, where = tmp_path / f"runs/{dataset}/corrkd/s1", f"{other}, trained on {dataset}"
    out, _ = shown(capsys, folder, "--no-rates", "--data-dir", files[other], "--csv", tmp_path / "t.csv")
    assert f"corrkd on {where}, test split" in out and ", paper" not in out and "of one data set" in out
    lr = "lr 0.004, " if dataset == "mosei" else ""         # which is MOSI's default
    assert f"other settings than the defaults: {lr}batch_size 16, epochs 1\n" in out
    assert (results(folder)["dataset"], results(folder)["conditions"]["l"]["n"]) == (where, sizes[other][2])
    assert {x["dataset"] for x in read_csv(tmp_path / "t.csv")} == {where}
    error = refused(capsys, folder, "--data-dir", files["iemocap"])
    assert "the splits of iemocap, not of mosi or mosei. Name another file with --data-dir" in error


def test_double_flows_own_table_comes_first_and_feature_folders_have_no_linear_row(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)         # not the folder in which the run is evaluated
    assert run_main("--method", "double_flow", "--out", tmp_path / "runs", "--epochs", 1, "--seeds", 1,
                    "--device", "cpu", *feature_arguments(Path("made"))) == 0
    monkeypatch.chdir(ROOT)
    out, tables = shown(capsys, tmp_path / "runs", "--rates", "0")
    for present in ("simulated text: from the data", "no linear row", "MAE: the paper's columns, n = 1\n",
                    "MAE: available streams, n = 1, an extension: not in the paper\n"):
        assert present in out
    assert "linear is" not in out and "not standardised" not in out and out.index("paper's columns") < out.index("{l}")
    lav, av = (results(tmp_path / "runs/mosei/double_flow/s1")["conditions"][c] for c in ("lav", "av"))
    for metric, digits in (("MAE", 4), ("F1", 2)):
        assert tables["paper"][f"{metric} double_flow"] == {
            "complete": f"{lav[metric]:.{digits}f}", "text missing": f"{av[metric]:.{digits}f}"}
    written(tmp_path / "data", learnable(n=12))
    assert run(tmp_path, method="double_flow", epochs="1") == 0
    assert "simulated text: learned from audio\n" in shown(capsys, tmp_path / "runs/mosi", "--no-rates")[0]


def test_two_tasks_have_two_baselines_and_are_subtracted_from_their_own_alone(copied, tmp_path, trained, capsys):
    os.symlink(trained / "data", tmp_path / "data")
    assert run(tmp_path, method="umdf", epochs="1") == 0
    table = shown(capsys, copied, tmp_path / "runs", "--no-rates", "--csv", tmp_path / "t.csv")[1]["sets"]
    assert {x["metric"] for x in read_csv(tmp_path / "t.csv")} == {
        "Acc-2", "Acc-2 has0", "Acc-7", "Corr", "F1", "F1 has0", "MAE"}
    lines = read_csv(tmp_path / "runs/mosi/umdf/s1/predictions.csv")
    errors = [abs(float(x["answer"]) - float(x["truth"])) for x in lines if x["condition"] == "la"]
    assert len(errors) == 20 and not any(x["probability"] for x in lines)
    assert table["MAE umdf"]["{l,a}"] == f"{statistics.fmean(errors):.4f}"
    assert re.fullmatch(r"[+-]\d\.\d{3}\*?", table["MAE umdf - linear"]["{l,a}"])
    unaligned = written(tmp_path / "other", sized(lengths=(8, 12, 10)))
    assert "aligned" in refused(capsys, tmp_path / "runs", "--data-dir", unaligned)
    labels = {"F1 constant, polarity", "F1 constant, regression", "F1 linear, polarity", "F1 linear, regression",
              "F1 umdf - linear", "MAE umdf - linear"}
    assert labels <= set(table) and "MAE corrkd - linear" not in table and "F1 corrkd - umdf" not in table


def test_iemocap_shows_four_emotions(tmp_path, capsys):
    written(tmp_path / "data", learnable(emotions=True), "iemocap_data.pkl")
    assert run(tmp_path, dataset="iemocap", epochs="1") == 0
    draws = ["--plot", tmp_path / "f.png"] if importlib.util.find_spec("matplotlib") else []
    out, tables = shown(capsys, tmp_path / "runs", "--csv", tmp_path / "t.csv", *draws)
    table, measured = tables["sets"], results(tmp_path / "runs/iemocap/corrkd/s1")
    assert "sentiment 0" not in out and {"F1 happy", "F1 angry"} <= {
        x["metric"] for x in read_csv(tmp_path / "t.csv") if x["low"] and x["high"]}
    assert list(measured["conditions"]) == [*data.SETS, *(f"{i / 10}" for i in range(11))]       # the default rates
    assert (measured["split"], measured["mask_seed"]) == ("test", 0) and measured["linear"]["l"]["F1 happy"] > 90
    assert [label for label in table if label.endswith("corrkd")] == [
        f"F1 {e} corrkd" for e in ("happy", "sad", "angry", "neutral")]
    lines = read_csv(tmp_path / "runs/iemocap/corrkd/s1/predictions.csv")
    answers, chances = (np.array([json.loads(line[name]) for line in lines]) for name in ("answer", "probability"))
    assert answers.shape[1] == 4 and (answers == (chances > .5)).all() and (answers.sum(1) > 1).any()


@pytest.mark.parametrize("splits", [["test"], ["train", "valid"], list(SPLITS)])
def test_a_stream_that_is_lacking_counts_in_no_average(tmp_path, copied, splits, capsys):
    made, folder = sized(), copied
    for split in splits:
        made[split]["vision"][:] = 0
    written(tmp_path / "data", made)
    if "train" in splits:
        assert run(tmp_path, epochs="1") == 0
        folder = tmp_path / "runs/mosi/corrkd/s1"
    out, tables = shown(capsys, folder, "--rates", "0.5", "--data-dir", tmp_path / "data")
    row = tables["sets"]["F1 corrkd"]
    three = [results(folder)["conditions"][c]["F1"] for c in ("l", "a", "la")]
    assert row["{v}"] == row["{a,v}"] == "-" and row["Avg."] == f"{statistics.fmean(three):.2f}"
    assert "vision" in out and out.count("not answered") == 1
    assert ("note: this is not the file that the runs were trained on" in out) is (splits == ["test"])


def test_clips_of_ones_own_are_all_of_that_file_whatever_the_run_was_trained_on(copied, tmp_path, capsys):
    """A run on few clips of the stand-in, and one on feature folders; what is made up is called so."""
    written(tmp_path / "mine", {**learnable(n=25), "SYNTHETIC": "made up"})
    load = torch.load(copied / "model.pt", weights_only=True)["load"]
    for change in ({"synthetic": True}, {"features": {"text": "gone"}, "labels": "gone"}):
        rerecord(copied, limit=6, load={**load, **change})
        out, _ = shown(capsys, copied, "--no-rates", "--data-dir", tmp_path / "mine", "--csv", tmp_path / "t.csv")
        assert results(copied)["conditions"]["l"]["n"] == 25 and "SYNTHETIC data" in out and "not the file that" in out
        assert {x["synthetic"] for x in read_csv(tmp_path / "t.csv")} == {"True"}


@pytest.mark.parametrize("form", ["no labels", "all 0"])
def test_clips_without_labels_are_answered(copied, tmp_path, form, capsys):
    """A file that holds the asked split alone; truth is empty, there is no table and no results.json."""
    made = {"test": sized()["test"]}
    made["test"]["labels"][:] = 0
    before = read_csv(copied / "predictions.csv")
    if form == "no labels":         # and no ids: clips are numbered
        del made["test"]["labels"], made["test"]["id"]
        before = [{**line, "clip": str(i % 20)} for i, line in enumerate(before)]
    out, _ = shown(capsys, copied, *RATES, "--data-dir", written(tmp_path / "mine", made), "--csv", tmp_path / "t.csv")
    assert "has no labels" in out and "There are no numbers, so no --csv" in out and "|" not in out
    assert not (copied / "results.json").exists() and not (tmp_path / "t.csv").exists()
    assert read_csv(copied / "predictions.csv") == [{**line, "truth": ""} for line in before]


def test_a_fourth_method_with_a_buffer_and_nothing_to_list_trains_and_is_evaluated(tmp_path, monkeypatch, capsys):
    """The poorest that METHODS' comment allows: what is not in its state_dict has values all the same."""
    class Late(torch.nn.Linear):
        stages, encode, classify = {"train": ("lav",)}, None, torch.nn.Linear.forward

        def __init__(self, dims, task, config):
            super().__init__(sum(dims[m] for m in STREAMS), 2)
            self.register_buffer("scale", torch.tensor(2.0), persistent=False)

        def begin(self, *_):
            return None
        teacher_outputs = begin

        def represent(self, streams, real):
            return self.scale * torch.cat([streams[m].sum(1) for m in STREAMS], -1)

        def losses(self, complete, missing, target, real, teacher=None):
            return {"total": torch.nn.functional.cross_entropy(self.classify(self.represent(missing, real)), target)}
    monkeypatch.setitem(evaluation.METHODS, "late", types.SimpleNamespace(
        TASKS=corrkd.TASKS, Config=corrkd.Config, PAPER=corrkd.PAPER, ABLATIONS={}, REPORTED={}, FEATURES={}, TABLE={},
        learning_rate_factor=None,
        Model=Late))
    written(tmp_path / "data", learnable())
    assert run(tmp_path, method="late") == 0
    assert "F1 late" in shown(capsys, tmp_path / "runs", "--no-rates")[1]["sets"]
