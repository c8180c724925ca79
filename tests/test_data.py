"""data.py: formats, safety, masks, batches, the stand-in."""
import collections
import io
import mmap
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import data
from data import SPLITS, STREAMS, DataError
from helpers import FOLDERS, ROOT, SHARED, WIDTHS, Call, content, feature_folders, fields, written


def same(a, b):
    for m in STREAMS:
        assert torch.equal(a[m], b[m]) and torch.equal(a["real"][m], b["real"][m])
    assert torch.equal(a["label"], b["label"]) and a["id"] == b["id"]


# ------------------------------------------------------------------------------------- formats

def test_mults_layout(tmp_path):
    made = content()
    loaded = data.load("mosi", written(tmp_path, made), SPLITS, normalize=False)
    for s in SPLITS:
        for m in STREAMS:
            for i in range(5):
                np.testing.assert_array_equal(loaded[s][m][i, :3 + i], made[s][m][i, 5 - i:])
                assert not loaded[s][m][i, 3 + i:].any() and loaded[s]["real"][m][i].sum() == 3 + i
        np.testing.assert_array_equal(loaded[s]["label"], made[s]["labels"].ravel())
        assert loaded[s]["id"] == [f"clip{SPLITS.index(s)}_{i}" for i in range(5)]
    assert loaded["dims"] == WIDTHS and list(loaded["train"]["real"]["text"][0]) == [True] * 3 + [False] * 5


def test_the_side_of_the_padding_does_not_matter(tmp_path):
    a, b = (data.load("mosi", written(tmp_path / str(f), content(front=f)), SPLITS) for f in (True, False))
    for s in SPLITS:
        for m in STREAMS:
            assert torch.equal(a[s]["real"][m], b[s]["real"][m])
    made = {s: {k: np.roll(v, 2, axis=1) if k in STREAMS else v for k, v in f.items()} for s, f in content(front=False, n=3).items()}
    rolled, plain = data.load("mosi", written(tmp_path / "c", made)), data.load("mosi", written(tmp_path / "d", content(front=False, n=3)))
    same(rolled["train"], plain["train"])


@pytest.mark.parametrize("place", ["", "MOSI", "mosi", "MOSI/Processed"])
def test_mmsas_layout(tmp_path, place):
    """regression_labels, ids as a list of strings, text_bert ignored, stated lengths of unaligned streams."""
    made = content(lengths=(8, 12, 10), front=False)
    for s, f in made.items():
        n = len(f["labels"])
        f.update(regression_labels=f.pop("labels").ravel().tolist(), id=[f"v$_${i}" for i in range(n)], text_bert=np.zeros((n, 3, 8)),
                 audio_lengths=[5 + i for i in range(n)], vision_lengths=[2] * n, raw_text=np.array(["so"] * n))
    loaded = data.load("mosi", written(tmp_path / place, made, "unaligned_50.pkl") and tmp_path, normalize=False)["train"]
    assert loaded["id"][1] == "v$_$1"
    assert loaded["real"]["text"].sum(1).tolist() == [3, 4, 5, 6, 7]
    assert loaded["real"]["audio"].sum(1).tolist() == [5, 6, 7, 8, 9]       # the stated length covers the frames
    assert loaded["real"]["vision"].sum(1).tolist() == [3, 4, 5, 6, 7]      # it does not: the frames count
    np.testing.assert_array_equal(loaded["audio"], made["train"]["audio"])


def test_stated_lengths_of_clips_padded_in_front(tmp_path):
    made = content(lengths=(8, 12, 10))
    for f in made.values():
        f["audio_lengths"] = np.array([5] * 5)
    loaded = data.load("mosi", written(tmp_path, made), normalize=False)["train"]
    assert loaded["real"]["audio"].sum(1).tolist() == [5, 5, 5, 6, 7]
    np.testing.assert_array_equal(loaded["audio"][0, :5], made["train"]["audio"][0, 7:])


def test_a_clip_of_its_stated_length_keeps_its_first_frames_of_zeros():
    seen = torch.tensor([[0, 0, 1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 0, 1, 1]], dtype=torch.bool)
    assert [t.tolist() for t in data._spans(seen, [5, 5])] == [[0, 3], [5, 8]]      # padded behind, padded in front
    assert [t.tolist() for t in data._spans(seen, None)] == [[2, 3], [5, 8]]


def test_aligned_streams_share_their_span(tmp_path):
    """A face not found at a clip's edge is no padding while a word is there."""
    made = content()
    made["train"]["vision"][4, 1:4] = 0
    made["train"]["audio"][2] = 0
    loaded = data.load("mosi", written(tmp_path, made))["train"]
    assert loaded["real"]["vision"][4].sum() == 7 and not loaded["vision"][4, :3].any() and loaded["vision"][4, 3].any()
    assert loaded["real"]["audio"][2].sum() == 5 and not loaded["audio"][2].any()


def test_a_stream_without_frames_in_unaligned_data(tmp_path):
    made = content(lengths=(8, 12, 10))
    for f in made.values():
        f["vision"][:] = 0
    loaded = data.load("mosi", written(tmp_path, made))["train"]
    assert not loaded["real"]["vision"].any() and loaded["real"]["audio"].any() and loaded["vision"].isfinite().all()


@pytest.mark.parametrize("form", [lambda y: y, lambda y: y.argmax(-1), lambda y: y.argmax(-1).tolist(), lambda y: y.astype(np.int64)])
def test_iemocaps_labels(tmp_path, form):
    made = content(emotions=True)
    expected = made["train"]["labels"].argmax(-1)
    for f in made.values():
        f["labels"] = form(f["labels"])
        del f["id"]
    loaded = data.load("iemocap", written(tmp_path, made, "iemocap_data.pkl"))["train"]
    np.testing.assert_array_equal(loaded["label"], expected)
    assert loaded["id"] == []


@pytest.mark.parametrize("form", [lambda y: y, lambda y: y[:, 0], lambda y: y.ravel(), lambda y: y.ravel().tolist(), lambda y: y.astype(np.float64)])
def test_sentiment_labels(tmp_path, form):
    made = content()
    expected = made["valid"]["labels"].ravel()
    for f in made.values():
        f["labels"] = form(f["labels"])
    np.testing.assert_array_equal(data.load("mosi", written(tmp_path, made))["valid"]["label"], expected)


@pytest.mark.parametrize("ids, first", [([["a", "0", "1"]] * 5, "a/0/1"), (np.array([[b"a", b"", b""]] * 5), "a"), (["x"] * 5, "x"),
                                        ([b"x"] * 5, "x"), (np.fromiter([["a", "b"]] * 5, dtype=object), "a/b"), (np.array(["x"] * 5, dtype=object), "x"), (np.array([["a", 1.5, 2]] * 5, dtype=object), "a/1.5/2")])
def test_ids(tmp_path, ids, first):
    made = content()
    for f in made.values():
        f["id"] = ids
    loaded = data.load("mosi", written(tmp_path, made))
    assert loaded["train"]["id"][0] == first
    assert any("both train and test" in n for n in loaded["source"]["notes"])      # the same ids in each split are reported


class Python2(pickle._Pickler):
    """Writes bytes as Python 2 wrote its strings."""
    dispatch = dict(pickle._Pickler.dispatch)
    dispatch[bytes] = lambda self, b: (self.write(b"T" + len(b).to_bytes(4, "little") + b), self.memoize(b))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ">f8", np.int32])
@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5, "python 2", "numpy 1", "numpy 2"])
def test_protocols_and_number_types(tmp_path, protocol, dtype):
    made = content(dtype=dtype)
    expected = data.load("mosi", written(tmp_path / "a", made), SPLITS, normalize=False)
    assert torch.equal(expected["train"]["text"][4, :7], torch.from_numpy(made["train"]["text"][4, 1:].astype(np.float32)))
    if protocol == "python 2":
        buffer = io.BytesIO()
        Python2(buffer, 2).dump(made)
        raw = buffer.getvalue()
    else:
        raw = pickle.dumps(made, protocol=2 if isinstance(protocol, str) else protocol)
    if protocol == "numpy 1":
        raw = raw.replace(b"numpy._core", b"numpy.core")
        assert b"numpy.core" in raw
    if protocol == "numpy 2":
        raw = raw.replace(b"numpy.core", b"numpy._core")
        assert b"numpy._core" in raw
    loaded = data.load("mosi", written(tmp_path / "b", raw), SPLITS, normalize=False)
    for s in SPLITS:
        same(loaded[s], expected[s])


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("order", ["C", "F"])
def test_large_arrays_are_read_from_the_file(tmp_path, protocol, order, monkeypatch):
    """The same numbers as pickle's own reader, from arrays above and below the size where reading is put off."""
    monkeypatch.setattr(data, "LARGE", 1 << 17)     # pickle keeps blocks above 64 KiB out of its frames
    monkeypatch.setattr(data, "CHUNK", 7)
    made = {s: {k: np.asarray(v, order=order) for k, v in f.items()}
            for s, f in content(n=60, lengths=(90, 90, 90), dtype=np.float64, front=False).items()}
    path = written(tmp_path, made, protocol=protocol) / "mosi_data.pkl"
    fields_read = data.read_pickle(path)

    def base(array):
        return base(array.base) if isinstance(array, np.ndarray) else getattr(array, "obj", None)
    maps = [m for m in STREAMS if isinstance(base(fields_read["train"][m]), mmap.mmap)]
    assert maps == (["text", "audio"] if protocol > 2 else [])      # 60 * 90 * 3 float64 of vision are below the limit
    loaded = data.load("mosi", path, SPLITS, normalize=False)
    for s in SPLITS:
        for m in STREAMS:
            np.testing.assert_array_equal(loaded[s][m], made[s][m].astype(np.float32))


def test_aligned_files_come_first_and_a_missing_one_is_told(tmp_path):
    with pytest.raises(DataError, match="--synthetic"):
        data.find("mosei", tmp_path)
    for name in reversed(data.FILES["mosi"]):
        (tmp_path / name).touch()
        assert data.find("mosi", tmp_path).name == ("aligned_50.pkl" if name == "mosi_data.pkl" else name) or name == "mosi_data.pkl"
    assert data.find("mosi", tmp_path).name == "mosi_data.pkl"
    assert data.find("mosei", tmp_path / "mosi_data.pkl").name == "mosi_data.pkl"


# ------------------------------------------------------------------------------------- bad files

@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("what, name", [
    (Call(os.system, ("touch GOTCHA",)), "system"), (Call(eval, ("open('GOTCHA', 'w')",)), "eval"),
    (Call(np.load, ("GOTCHA",)), "load"), (Call(getattr, ("so", "upper")), "getattr"), (Call(np.ndarray, ((2,),)), None),
    (np.array([Call(os.system, ("touch GOTCHA",))], dtype=object), "system"), (torch.nn.Linear(1, 1), None),
    (collections.Counter("a"), "Counter"), (np.dtype([("a", "f4")]), None)])
def test_nothing_in_a_pickle_is_executed(tmp_path, monkeypatch, protocol, what, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=f"is refused.*{name or ''}"):
        data.read_pickle(written(tmp_path, {**content(), "extra": what}, protocol=protocol) / "mosi_data.pkl")
    assert os.listdir() == ["mosi_data.pkl"]


def broken(change):
    made = content()
    return change(made) or made


BAD = {
    "nothing": (b"", "is refused"),
    "a zip": (b"PK\x03\x04 this is a zip", "not a pickle: it begins with PK"),
    "a page": (b"\n<!DOCTYPE html>\n<html>", "not a pickle: it begins with <!DOCTYPE html>, so the download went wrong"),
    "a pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00", "it begins with version https://git-lfs"),
    "an array": (b"\x93NUMPY\x01\x00v\x00", "not a pickle: it begins with NUMPY"),
    "words in lines": (b"id,text,label\n1,so,2\n", "not a pickle: it begins with id,text,label"),
    "cut": (pickle.dumps(content())[:-900], "is refused"),
    "a list": ([1, 2], "holds .*list.*expected a dict"),
    "other splits": ({"train": {}, "dev": {}}, "holds a dict of train, dev"),
    "no audio": (broken(lambda c: c["train"].pop("audio") is None), "split train has no 'audio', only text"),
    "no labels": (broken(lambda c: c["valid"].pop("labels") is None), "neither 'labels' nor 'regression_labels'"),
    "flat": (broken(lambda c: c["train"].update(text=c["train"]["text"][:, 0])), r"'text' has shape \(5, 6\)"),
    "ragged": (broken(lambda c: c["train"].update(text=[[[1.0]], [[1.0], [2.0]]] + [[[0.0]]] * 3)), "not an array of numbers of one shape|do not match"),
    "words": (broken(lambda c: c["train"].update(text=np.full((5, 2, 2), "so"))), "not an array of numbers"),
    "clips lost": (broken(lambda c: c["train"].update(audio=c["train"]["audio"][:4])), "5 labels, 5 ids and 5 clips of text, 4 clips of audio"),
    "ids lost": (broken(lambda c: c["train"].update(id=c["train"]["id"][:4])), "4 ids"),
    "label 7": (broken(lambda c: c["valid"]["labels"].__setitem__(0, 7)), r"leaves the range \[-3, 3\]"),
    "label nan": (broken(lambda c: c["valid"]["labels"].__setitem__(0, np.nan)), "range"),
    "two labels": (broken(lambda c: c["valid"].update(labels=np.zeros((5, 2)))), "not one sentiment score"),
    "nan": (broken(lambda c: c["train"]["vision"].__setitem__((3, 7, 0), np.nan)), "split train: 'vision' holds values that are NaN.* first in clip clip0_3"),
    "inf": (broken(lambda c: c["train"]["audio"].__setitem__((2, 7, slice(0, 2)), np.inf)), "'audio' holds values .* clip0_2"),
    "-inf in text": (broken(lambda c: c["train"]["text"].__setitem__((2, 7, 0), -np.inf)), "'text' holds values"),
    "1e300": (broken(lambda c: c["train"].update(text=c["train"]["text"].astype(float) * 1e300)), "'text' holds .* too large for float32"),
    "other width": (broken(lambda c: c["valid"].update(text=c["valid"]["text"][..., :5])), "differ in feature width"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_told_in_a_sentence(tmp_path, name):
    what, said = BAD[name]
    with pytest.raises(DataError, match=said) as error:
        data.load("mosi", written(tmp_path, what))
    assert str(error.value).count("\n") == 0 and len(str(error.value)) < 400 + len(str(tmp_path))


def test_emotions_that_are_none(tmp_path):
    with pytest.raises(DataError, match="four yes/no emotions"):
        data.load("iemocap", written(tmp_path, content(), "iemocap_data.pkl"))


def test_a_file_that_claims_an_enormous_array_fails_at_once(tmp_path):
    small = pickle.dumps(content(), protocol=3)
    size = len(content()["train"]["text"].tobytes()).to_bytes(4, "little")
    assert size in small
    with pytest.raises(DataError, match="is refused"):
        data.read_pickle(written(tmp_path, small.replace(b"B" + size, b"B\xff\xff\xff\x7f", 1)) / "mosi_data.pkl")
    huge = Call(np.ndarray.__reduce__(np.zeros(0))[0], (np.ndarray, (10**13,), b"b"))
    with pytest.raises(DataError):
        data.load("mosi", written(tmp_path, {**content(), "train": {**fields(), "text": huge}}))


def test_minus_infinity_in_audio_is_zero_as_in_mult(tmp_path):
    made = content()
    made["train"]["audio"][4, 7, 1] = -np.inf
    loaded = data.load("mosi", written(tmp_path, made), normalize=False)["train"]
    assert loaded["audio"][4, 6, 1] == 0 and loaded["audio"].isfinite().all()


# ------------------------------------------------------------------------------------- standardising

def test_standardising_is_what_the_docstring_says(tmp_path):
    made = content()
    made["train"]["text"][..., 2] *= 1e4
    made["train"]["text"][:, -3:, 5] = 7.0      # all but constant
    made["train"]["text"][made["train"]["text"][..., 0] == 0] = 0
    made["train"]["vision"][4, 3] = 0           # a face not found inside the clip
    made["train"]["audio"][..., 1] = np.where(made["train"]["audio"][..., 1] != 0, 3.25, 0)
    made["valid"]["text"][:, -1, 0] = 1e4
    raw = data.load("mosi", written(tmp_path, made), normalize=False)
    loaded = data.load("mosi", tmp_path)
    for m, d in WIDTHS.items():
        seen = [raw["train"][m][i, t].double() for i in range(5) for t in range(8) if raw["train"][m][i, t].any()]
        for k in range(d):
            values = [float(v[k]) for v in seen]
            mean = sum(values) / len(values)
            std = (sum((v - mean) ** 2 for v in values) / len(values)) ** .5 or 1.0
            for s in ("train", "valid"):
                for i in range(5):
                    for t in range(8):
                        expected = max(-5.0, min(5.0, (float(raw[s][m][i, t, k]) - mean) / std)) if raw[s][m][i, t].any() else 0.0
                        assert float(loaded[s][m][i, t, k]) == pytest.approx(expected, abs=1e-4)
    assert loaded["valid"]["text"].max() == 5 and not loaded["train"]["vision"][4, 2].any()
    again = data.load("mosi", tmp_path, ("test",), stats=loaded["stats"])       # the test split by the training split's numbers
    assert torch.allclose(again["test"]["text"][0, 0], ((raw_test(tmp_path) - loaded["stats"]["text"][0]) / loaded["stats"]["text"][1]).clamp(-5, 5))


def raw_test(folder):
    return data.load("mosi", folder, ("test",), normalize=False)["test"]["text"][0, 0]


# ------------------------------------------------------------------------------------- masks

def some_real(n=400, t=20, seed=3):
    lengths = torch.randint(1, t + 1, (n, 1), generator=torch.Generator().manual_seed(seed))
    return {m: torch.arange(t) < lengths for m in STREAMS}


@pytest.mark.parametrize("rate", data.RATES)
def test_the_realised_rate_is_the_nominal_one(rate):
    real = some_real()
    present = data.evaluation_masks(real, rate, "test")
    for m in STREAMS:
        gone = real[m] & ~present[m]
        n, k = real[m].sum(1), gone.sum(1)
        assert not (present[m] & ~real[m]).any()                                    # padding is neither there nor dropped
        assert ((k - rate * n).abs() < 1 + 1e-9).all()                              # within rounding, clip by clip
        assert abs(float((k / n).mean()) - rate) < 0.02 + (rate in (0, 1)) * -0.02 + 1e-9
    if rate == 0:
        assert all(torch.equal(present[m], real[m]) for m in STREAMS)
    if rate == 1:
        assert not any(present[m].any() for m in STREAMS)


def test_the_mean_rate_is_exact_for_clips_of_one_frame():
    real = torch.ones(20000, 1, dtype=torch.bool)
    for rate in (.1, .5, .9):
        gone = 1 - float(data.drop(real, rate, torch.Generator().manual_seed(0)).float().mean())
        assert abs(gone - rate) < 4 * (rate * (1 - rate) / 20000) ** .5


def test_dropped_frames_are_uniform():
    real = torch.arange(12).expand(6000, 12) < 10
    gone = (real & ~data.drop(real, .3, torch.Generator().manual_seed(1))).float().mean(0)
    assert (gone[:10] - .3).abs().max() < 4 * (.3 * .7 / 6000) ** .5 and not gone[10:].any()


def test_evaluation_masks_are_fixed_and_keyed():
    real = some_real(50)
    a = data.evaluation_masks(real, .4, "test")
    torch.rand(7)       # other generators do not matter
    assert all(torch.equal(a[m], data.evaluation_masks(real, .4, "test")[m]) for m in STREAMS)
    for other in (data.evaluation_masks(real, .5, "test"), data.evaluation_masks(real, .4, "valid"), data.evaluation_masks(real, .4, "test", 1)):
        assert not torch.equal(a["text"], other["text"])
    assert not torch.equal(a["text"], a["audio"])       # each stream its own frames
    for name, streams in data.SETS.items():
        present = data.evaluation_masks(real, name, "test")
        assert all(torch.equal(present[m], real[m]) if m in streams else not present[m].any() for m in STREAMS)
        assert data.realised(present, real) == {m: 0.0 if m in streams else 1.0 for m in STREAMS}


def test_training_masks_cover_the_seven_sets_evenly_and_change_every_time():
    real = {m: torch.ones(7000, 30, dtype=torch.bool) for m in STREAMS}
    g = torch.Generator().manual_seed(5)
    first, second = data.training_masks(real, g), data.training_masks(real, g)
    there = torch.stack([first[m].any(1) for m in STREAMS], 1)
    assert there.any(1).all()                                                       # never an empty clip
    _, counts = there.unique(dim=0, return_counts=True)
    assert len(counts) == 7 and (counts - 1000).abs().max() < 4 * 30
    rates = 1 - first["text"][there[:, 0]].float().mean(1)
    assert torch.allclose(rates.mean(), torch.tensor(.45), atol=.02) and set((rates * 10).round().int().tolist()) == set(range(10))
    differs = torch.stack([(first[m] != second[m]).any(1) for m in STREAMS]).any(0)
    assert differs.float().mean() > .95


def test_batches_hold_every_clip_once_and_clips_of_similar_length():
    real = some_real(500, 50)
    index = torch.arange(500)[torch.arange(500) % 7 > 0]
    g = torch.Generator().manual_seed(0)
    first, second = data.batches(real, index, 32, g), data.batches(real, index, 32, g)
    assert torch.equal(torch.cat(first).sort()[0], index) and torch.equal(torch.cat(second).sort()[0], index)
    assert not torch.equal(torch.cat(first), torch.cat(second))
    n = real["text"].sum(1)
    assert sum(int(n[b].max()) * len(b) for b in first) < .75 * 50 * len(index)     # at random: .97
    neighbours = lambda groups: {tuple(sorted(b.tolist())) for b in groups}
    assert len(neighbours(first) & neighbours(second)) < 4                          # batches are mixed anew, not only reordered


def test_clips_of_one_length_come_in_random_batches():
    same = {m: torch.ones(64, 5, dtype=torch.bool) for m in STREAMS}
    first, = data.batches(same, torch.arange(64), 64, torch.Generator().manual_seed(0))
    assert first.tolist() != sorted(first.tolist())
    groups = data.batches(same, torch.arange(64), 4, torch.Generator().manual_seed(0), pool=1)
    assert max(int(g.max() - g.min()) for g in groups) > 16         # in file order a batch would span 3


def test_a_batch_is_cut_to_its_longest_clip(tmp_path):
    split = data.load("mosi", written(tmp_path, content()))["train"]
    index = torch.tensor([2, 0])
    streams, real, _ = data.batch(split, index, index)
    assert streams["text"].shape == (2, 5, 6) and torch.equal(streams["text"][1, :3], split["text"][0, :3])
    assert real["text"].tolist() == [[True] * 5, [True] * 3 + [False] * 2]


# ------------------------------------------------------------------------------------- the stand-in

def test_the_stand_in_has_mosis_size_shape_and_balance():
    made = {s: data.stand_in("mosi", s) for s in SPLITS}
    assert [len(f["labels"]) for f in made.values()] == [1284, 229, 686]
    y = made["train"]["labels"].ravel()
    assert abs(y.mean() - .23) < .1 and abs(y.std() - 1.51) < .1 and .02 < (y == 0).mean() < .06
    assert abs((made["test"]["labels"] > 0).mean() - .40) < .05
    split = data.tensors(made["train"], "mosi", "here")
    n = split["real"]["text"].sum(1).float()
    assert abs(n.mean() - 13) < 1.5 and abs(n.median() - 11) <= 1 and .002 < (n == 50).float().mean() < .02
    assert {m: tuple(split[m].shape[1:]) for m in STREAMS} == {"text": (50, 300), "audio": (50, 74), "vision": (50, 35)}


def test_the_written_stand_in_is_mults_layout_and_the_one_in_memory(tmp_path, capsys):
    """Read back the way MulT's reader does: plain pickle, float arrays, id rows of three bytes strings that decode."""
    command = ["synthesize", "mosi", "--out", str(tmp_path / "new")]
    assert data.main(command) == 0 and "SYNTHETIC" in capsys.readouterr().out
    with open(tmp_path / "new" / "mosi_data.pkl", "rb") as file:
        raw = pickle.load(file)
    for s in SPLITS:
        assert set(raw[s]) == {"text", "audio", "vision", "labels", "id"} and set(raw) == {*SPLITS, "SYNTHETIC"}
        assert all(raw[s][m].astype(np.float32).ndim == 3 for m in STREAMS) and raw[s]["labels"].shape == (len(raw[s]["text"]), 1, 1)
        assert [part.decode("UTF-8") for part in raw[s]["id"][3]] == [f"{s}3", "0", "1"]
        assert not raw[s]["text"][:, 0].any(1).all() and raw[s]["text"][:, -1].any(1).all()       # padded in front
    loaded, memory = data.load("mosi", tmp_path / "new"), data.load("mosi", synthetic=True)
    same(loaded["train"], memory["train"])
    assert data.main(command) == 2
    error = capsys.readouterr().err
    assert "exists already" in error and len(error.splitlines()) == 1
    assert os.listdir(tmp_path / "new") == ["mosi_data.pkl"]


def test_iemocaps_stand_in():
    split = data.load("iemocap", synthetic=True, splits=("valid",), normalize=False)["valid"]
    assert split["label"].shape == (798, 4) and (split["label"].sum(1) == 1).all() and split["text"].shape == (798, 20, 300)


# ------------------------------------------------------------------------------------- check

def test_check_says_what_a_file_is(tmp_path, capsys):
    made = content(lengths=(8, 12, 10))
    made["train"]["audio"][4, -1, 1] = -np.inf
    made["test"]["id"] = made["train"]["id"]
    written(tmp_path, made)
    done = subprocess.run([sys.executable, ROOT / "data.py", "check", tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for part in ("layout MulT", "SHA-256 " + data.sha256(tmp_path / "mosi_data.pkl"), "train: 5 clips", "(5, 12, 4) float32, 1 values of -inf read as 0",
                 "zero padding in front", "mean 5.0, median 5, most 7", "5 clips stand in both train and test",
                 "CorrKD, UMDF: nothing is compared with the paper: 5/5/5 clips are not the standard splits of mosi (1284/229/686); text is 6 wide, not 300",
                 "learned from the audio"):
        assert part in done.stdout, (part, done.stdout)
    for name, (what, _) in list(BAD.items())[:5] + [("nan", BAD["nan"])]:
        written(tmp_path / "bad", what)
        assert data.main(["check", str(tmp_path / "bad" / "mosi_data.pkl")]) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: ") and len(error.splitlines()) == 1, (name, error)


def test_ids_that_are_not_there_or_not_unique_are_noted(tmp_path):
    made = content()
    del made["valid"]["id"]
    made["train"]["id"] = np.repeat(made["train"]["id"][:1], 5, axis=0)
    said = data.load("mosi", written(tmp_path, made))["source"]["notes"]
    assert "4 clips of train have the id of another one in it" in said and any(note.startswith("valid has no ids") for note in said)
    assert not any("test" in note for note in said)


@pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data, an optional folder of extra real data, is not here")
@pytest.mark.parametrize("name, sizes", [("mosi400_lav", (218, 80, 102)), ("mosi_official_la", (1284, 229, 686))])
def test_real_files(name, sizes):
    loaded = data.load("mosi", SHARED / name, SPLITS)
    with open(SHARED / name / "mosi_data_noalign.pkl", "rb") as file:
        raw = pickle.load(file)
    for s, n in zip(SPLITS, sizes):
        split = loaded[s]
        assert len(split["label"]) == len(set(split["id"])) == n
        for m in STREAMS:
            assert split[m].isfinite().all() and split[m].abs().max() <= 5
            spans = [np.flatnonzero(clip.any(-1)) for clip in raw[s][m]]
            assert split["real"][m].sum(1).tolist() == [int(k[-1] - k[0] + 1) if len(k) else 0 for k in spans]
    seen = loaded["train"]["text"][(loaded["train"]["text"] != 0).any(-1)]
    varies = seen.std(0) > 0        # a feature that never changes stays 0
    assert varies.sum() >= 380 and seen.mean(0).abs().max() < .1 and (seen.std(0)[varies] - 1).abs().max() < .2


# ------------------------------------------------------------------------------------- folders of feature files

def test_feature_folders_are_read_clip_by_clip(tmp_path):
    where, truth, corpus = feature_folders(tmp_path)
    loaded = data.load("mosei", splits=SPLITS, normalize=False, **where)
    assert loaded["dims"] == FOLDERS and loaded["stats"] is None and not loaded["aligned"]
    for s, name in zip(SPLITS, corpus):
        split = loaded[s]
        assert split["id"] == list(corpus[name]) and split["label"].tolist() == pytest.approx([f["val"] for f in corpus[name].values()])
        index = torch.tensor([4, 0, 5])
        streams, real, _ = data.batch(split, index, index)
        for m in FOLDERS:
            assert streams[m].shape[1] == real[m].sum(1).max()
            for row, i in enumerate(index.tolist()):
                x = truth[m][split["id"][i]]
                assert torch.equal(streams[m][row, :len(x)], torch.from_numpy(x)) and streams[m][row, len(x):].eq(0).all()
                assert real[m][row].tolist() == [t < len(x) for t in range(real[m].shape[1])]


def test_over_long_training_clips_are_left_out_and_no_others(tmp_path):
    where, truth, corpus = feature_folders(tmp_path, longest=20)
    loaded = data.load("mosei", splits=SPLITS, normalize=False, max_frames=15, **where)
    short = lambda name: [c for c in corpus[name] if max(len(truth[m][c]) for m in FOLDERS) <= 15]
    assert 0 < len(short("train_corpus")) < 12 and loaded["train"]["id"] == short("train_corpus")
    assert [len(loaded[s]["id"]) for s in ("valid", "test")] == [6, 6] and len(short("val_corpus")) < 6
    assert any(f"{12 - len(short('train_corpus'))} training clips of more than 15 frames" in n for n in loaded["source"]["notes"])
    everyone = torch.arange(len(loaded["train"]["id"]))
    data.batch(loaded["train"], everyone, everyone)
    with pytest.raises(DataError, match="--max-frames 0"):
        data.load("mosei", splits=SPLITS, normalize=False, max_frames=0, **where)


def test_the_features_themselves_are_read_only_when_a_batch_asks(tmp_path, monkeypatch):
    where, *_ = feature_folders(tmp_path)
    loaded = data.load("mosei", splits=SPLITS, normalize=False, **where)
    opened, whole = [], data._open_npy
    monkeypatch.setattr(data, "_open_npy", lambda path: (opened.append(path), whole(path))[1])
    data.batch(loaded["train"], torch.tensor([2]), torch.tensor([2]))
    clip = loaded["train"]["id"][2]
    assert opened and all(path.stem == clip or path.parent.name == clip for path in opened)


def damaged(where, name):
    """Each mistake, and what is said of it."""
    audio, text = Path(where["features"]["audio"]), Path(where["features"]["text"])
    first = sorted(audio.iterdir())[0]
    corpus = {n: np.array({"a_0": {"val": 1.0}}, dtype=object) for n in ("train_corpus", "val_corpus", "test_corpus")}
    if name == "missing clip":
        first.unlink()
        return f"lacks 1 of .* clips, first {first.stem}"
    if name == "other width":
        np.save(first, np.zeros((3, 7), np.float32))
        return "7 features a frame|has 7 features"
    if name == "simulated width":
        for path in text.iterdir():
            np.save(path, np.zeros(8, np.float32))
        return "simulated_text has 6 features, text 8"
    if name == "objects":
        np.save(first, np.array({"a": 1}, dtype=object), allow_pickle=True)
        return "cannot be read as an array of numbers"
    if name == "not a file of arrays":
        first.write_bytes(b"nothing")
        return "cannot be read as an array of numbers"
    if name == "no folder":
        where["features"]["audio"] = "nowhere"
        return "no such folder"
    if name == "no vision":
        del where["features"]["vision"]
        return "lacks vision"
    if name == "no labels":
        where["labels"] = None
        return "needs --labels"
    if name == "labels gone":
        where["labels"] = Path("nowhere.npz")
        return "does not exist"
    if name == "labels damaged":
        where["labels"].write_bytes(where["labels"].read_bytes()[:90])
        return "is refused"
    if name == "labels out of range":
        corpus["val_corpus"] = np.array({"a_0": {"val": 4.0}}, dtype=object)
        np.savez(where["labels"], **corpus)
        return r"leaves the range \[-3, 3\]"
    if name == "labels lead elsewhere":
        corpus["val_corpus"] = np.array({"../../a": {"val": 1.0}}, dtype=object)
        np.savez(where["labels"], **corpus)
        return "cannot be the name"
    if name == "labels run code":
        corpus["test_corpus"] = np.array({"a_0": {"val": Runs()}}, dtype=object)
        np.savez(where["labels"], **corpus)
        return "asks for .*system"
    raise AssertionError(name)


class Runs:
    def __reduce__(self):
        return os.system, ("touch ran_code",)


@pytest.mark.parametrize("name", ["missing clip", "other width", "simulated width", "objects", "not a file of arrays", "no folder", "no vision",
                                  "no labels", "labels gone", "labels damaged", "labels out of range", "labels lead elsewhere", "labels run code"])
def test_what_is_wrong_with_feature_folders_is_told_before_training(tmp_path, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    where, *_ = feature_folders(tmp_path)
    said = damaged(where, name)
    with pytest.raises(DataError, match=said):
        data.load("mosei", splits=SPLITS, normalize=False, **where)
    assert not (tmp_path / "ran_code").exists()


def test_a_feature_that_is_not_a_number_is_named(tmp_path):
    where, truth, corpus = feature_folders(tmp_path)
    clip = list(corpus["train_corpus"])[1]
    np.save(Path(where["features"]["audio"]) / f"{clip}.npy", np.full((2, 5), np.nan, np.float32))
    loaded = data.load("mosei", splits=SPLITS, normalize=False, **where)
    with pytest.raises(DataError, match=f"{clip}.npy: 'audio' holds values that are NaN"):
        data.batch(loaded["train"], torch.arange(3), torch.arange(3))


def test_a_pickle_may_carry_simulated_text(tmp_path):
    """Standardised like the text that it imitates, kept apart from the aligned streams' masks, ignored by other methods."""
    made = content()
    for s in SPLITS:
        made[s]["simulated_text"] = np.roll(made[s]["text"], 1, axis=-1).repeat(2, axis=1)
    loaded = data.load("mosi", written(tmp_path, made), SPLITS)
    assert loaded["dims"]["simulated_text"] == 6 and loaded["aligned"] and loaded["train"]["simulated_text"].shape[1] == 16
    mean, std = loaded["stats"]["text"]
    raw = torch.from_numpy(made["train"]["simulated_text"][2, -1])
    torch.testing.assert_close(loaded["train"]["simulated_text"][2, 2 * 5 - 1], ((raw - mean) / std).clamp(-5, 5))
    assert loaded["train"]["real"]["simulated_text"][2].sum() == 10 and loaded["train"]["real"]["text"][2].sum() == 5
    for s in SPLITS:
        made[s]["simulated_text"] = made[s]["simulated_text"][..., :4]
    with pytest.raises(DataError, match="simulated_text has 4 features, text 6"):
        data.load("mosi", written(tmp_path / "b", made), SPLITS)


def test_overlapping_streams_share_their_cues_two_by_two():
    """The marked frames' mean of the features tells the cues linearly; two streams agree as far as they share one."""
    plain, made = (data.stand_in("mosi", "valid", overlapping=o) for o in (False, True))
    assert np.array_equal(plain["labels"], made["labels"]) and np.array_equal(plain["text"] != 0, made["text"] != 0)
    y = made["labels"].ravel()
    for fields, few, most in ((plain, .1, .9), (made, .2, .8)):
        corr = []
        for m in STREAMS:
            x = np.float64(fields[m]) / np.abs(fields[m]).max((0, 1))
            mean = x.sum(1) / (x != 0).any(-1).sum(1, keepdims=True)
            half = len(y) // 2
            w = np.linalg.solve(mean[:half].T @ mean[:half] + .1 * np.eye(mean.shape[1]), mean[:half].T @ (y[:half] - y[:half].mean()))
            corr.append(np.corrcoef(mean[half:] @ w, y[half:])[0, 1])
        assert all(few < c < most for c in corr), corr
        if fields is made:
            assert max(corr) - min(corr) < .25, corr         # no stream is the main one
        else:
            assert corr[0] - max(corr[1:]) > .1, corr
