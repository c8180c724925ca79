"""The printed tables: their form, what stands beside print, and the intervals of differences."""
import re

import numpy as np
import pytest

import eval as evaluation
from helpers import learnable, rerecord, run, run_main, written


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """CorrKD with settings, one epoch."""
    folder = tmp_path_factory.mktemp("tables")
    written(folder / "data", learnable(n=24))
    assert run(folder, "--ablate", "margin=1.0,dropout=0.2", epochs="1") == 0
    return folder


def printed(capsys, *arguments):
    capsys.readouterr()
    assert run_main(*arguments, main=evaluation.main) == 0
    return capsys.readouterr().out


def test_a_table_fits_on_a_screen_with_long_names_and_numbers_of_the_most_digits(tmp_path, monkeypatch, capsys):
    written(tmp_path / "data", learnable(n=24))
    assert run(tmp_path, method="umdf", epochs="1") == 0
    for name in ("complete_to_missing", "missing_to_complete"):
        for seed in (1, 2):
            folder = tmp_path / f"runs/mosi/umdf-{name}/s{seed}"
            rerecord(folder, tmp_path / "runs/mosi/umdf/s1", ablation=name, seed=seed)
    rng, measured = np.random.default_rng(0), evaluation.metrics
    monkeypatch.setattr(evaluation, "metrics", lambda *of: {
        name: rng.choice((0.1, 100.0)) if name.startswith("F1") else rng.uniform(0, 6) for name in measured(*of)})
    out = printed(capsys, tmp_path / "runs")
    rows = [line for line in out.splitlines() if line.startswith("|")]
    assert max(map(len, rows)) <= 100 and "100.00" in out and any("complete_to_" in row for row in rows)
    assert re.search(r"\| +0.0 \| +0.2 \| +0.4 \| +0.6 \| +0.8 \| +1.0 \| +area \|\n", out)


def test_the_legend_explains_what_stands_in_the_tables_and_nothing_else(trained, capsys):
    out = printed(capsys, trained / "runs", "--no-rates")
    for absent in ("area", "At 1.0", "MAE", "has0", "emotion", "videos and seeds"):
        assert absent not in out
    for present in ("margin=1.0,dropout=0.2", "takes clips as independent", "commoner in training",
                    "1000 draws of clips and seeds"):
        assert present in out
    last = out.splitlines()[-1]
    assert "results.json" in last and "predictions.csv" in last
    made = learnable(n=24)
    made["test"]["id"] = [f"v{min(i, 20)}_{i}" for i in range(24)]
    out = printed(capsys, trained / "runs", "--rates", "0", "0.25", "1", "--data-dir",
                  written(trained / "videos", made))
    assert "1000 draws of videos and seeds" in out and "as independent" not in out
    assert "area is" in out and "At 1.0" in out and " 0.25 |" in out


def made_up(task, truth, answers_of, seed, units=None, index=None):
    """What evaluate_run hands to the tables, of these answers to one condition; index: the clips that count."""
    metrics = {c: evaluation.metrics(task, answer, truth) for c, answer in answers_of.items()}
    clips = {"truth": truth, "index": np.arange(len(truth)) if index is None else index, "conditions": answers_of,
             "units": np.arange(len(truth)) if units is None else units}
    return {"run": {"seed": seed, "task": task}, "conditions": metrics, "clips": clips}


@pytest.mark.parametrize("task, metric", [("polarity", "F1"), ("regression", "F1"), ("regression", "MAE"),
                                          ("emotions", "F1 sad")])
def test_a_draw_of_clips_has_the_metric_of_the_clips_that_it_repeats(task, metric):
    rng = np.random.default_rng(2)
    shape = (40, 4) if task == "emotions" else 40
    truth, answer = (rng.integers(0, 2, shape) for _ in range(2))
    if task == "regression":
        truth, answer = rng.integers(-3, 4, 40).astype(float), rng.normal(size=40) * (np.arange(40) % 8 > 0)
    weights = evaluation.draw_weights(np.arange(40) // 3)[:20]      # whose sums differ
    drawn = evaluation.drawn_metric(metric, task, answer, truth, weights)
    for number, counts in zip(drawn, weights.astype(int)):
        again = evaluation.metrics(task, np.repeat(answer, counts, 0), np.repeat(truth, counts, 0))
        assert number == pytest.approx(again[metric])


def test_an_interval_is_that_of_a_plain_loop_over_draws_of_clips_and_seeds():
    """Both sides of a difference get the same clips, some of them hard for both; videos are drawn whole, and the first
    has no clip that counts."""
    rng, units, index = np.random.default_rng(3), np.arange(33) // 3, np.arange(3, 33)
    truth, hard = rng.normal(size=(2, 30)) * [[1], [3]]
    ours, theirs = ([made_up("regression", truth, {c: truth + hard + size * rng.normal(size=30) for c in "la"}, seed,
                             units, index) for seed in range(3)] for size in (.5, 1))
    row = evaluation.paired("MAE", "x", "y", ours, theirs, "conditions", [], evaluation.draw_weights(units))
    draw, means = np.random.default_rng(9), []
    for _ in range(4000):
        clips = np.concatenate([3 * video - 3 + np.arange(3) for video in draw.integers(0, 11, 11) if video])
        seeds = draw.integers(0, 3, 3)
        errors = [[abs(side[seed]["clips"]["conditions"][c] - truth)[clips].mean() for seed in seeds for c in "la"]
                  for side in (ours, theirs)]
        means.append(np.mean(errors[0]) - np.mean(errors[1]))
    low, high = np.percentile(means, (2.5, 97.5))
    assert (row.low["avg"], row.high["avg"]) == pytest.approx((low, high), abs=.05 * (high - low))


def test_an_interval_holds_the_true_difference_about_nineteen_times_in_twenty(monkeypatch):
    """Two predictors, 40 seeds of each, on 3,000 clips of which some are hard for all seeds; 150 times 5 seeds and 100
    clips are seen. An interval over seeds alone holds the difference far less often."""
    monkeypatch.setattr(evaluation, "DRAWS", 300)
    rng = np.random.default_rng(4)
    truth, answers_of = rng.integers(0, 2, 3000), []
    for shift in (.55, .4):
        skill = rng.normal(size=3000) + .3 * rng.normal(size=(40, 3000)) + .05 * rng.normal(size=(40, 1)) + shift
        answers_of.append(np.where(skill > 0, truth, 1 - truth))

    def row(clips, seeds):
        sides = [[made_up("polarity", truth[clips], {"l": answers[seed, clips]}, seed) for seed in seeds]
                 for answers in answers_of]
        weights = evaluation.draw_weights(np.arange(len(clips)))
        return evaluation.paired("F1", "x", "y", *sides, "conditions", [], weights)
    whole, held, by_seeds = row(np.arange(3000), range(40)).mean["l"], 0, 0
    for _ in range(150):
        one = row(rng.choice(3000, 100, replace=False), rng.choice(40, 5, replace=False))
        held += one.low["l"] <= whole <= one.high["l"]
        by_seeds += abs(one.mean["l"] - whole) <= 2.776 * one.std["l"] / 5 ** .5
    assert 135 <= held <= 149 and by_seeds < 110


def test_whole_videos_are_drawn_where_the_ids_tell_enough_of_them():
    ids = [f"video_{i // 3}_{i}" for i in range(3 * evaluation.VIDEOS)]
    units = evaluation.units(ids, 60)
    assert len(set(units)) == 20 and all(units[i] == units[i - i % 3] for i in range(60))
    for few in (ids[3:], ["clip"] + ids, []):
        assert evaluation.units(few, 60).tolist() == list(range(60))
    weights = evaluation.draw_weights(units)
    assert (weights[:, 0] == weights[:, 1]).all() and (weights[:, 0] != weights[:, 3]).any()
    assert (weights == evaluation.draw_weights(units)).all()        # the same ones in every evaluation
    assert weights.sum(1).tolist() == [60] * evaluation.DRAWS
