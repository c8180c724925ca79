"""data.py: formats, safety, standardising, masks, batches, the stand-in, feature folders, what is printed."""
import collections
import copyreg
import hashlib
import io
import itertools
import os
import pickle
import re
import subprocess
import sys
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

import data
from data import SPLITS, STREAMS, DataError
from helpers import FOLDERS, ROOT, WIDTHS, Call, content, feature_folders, fields, written

UNALIGNED = {"lengths": (8, 12, 10)}
PAPERS = {"text": 300, "audio": 74, "vision": 35}


def load(folder, made, splits=SPLITS, dataset="mosi", **more):
    return data.load(dataset, written(folder, made, "x.pkl") / "x.pkl", splits, **{"normalize": False, **more})


def every(splits=SPLITS, more={}, **changes):
    """A good file's content with these fields in each of the splits; a function is called with the split's fields."""
    made = content(**more)
    for s in splits:
        for key, value in changes.items():
            made[s][key] = value(made[s]) if callable(value) else value
    return made


def named(ids):
    """A good file whose clips 0 to 14 are called by this pattern."""
    return {s: {**fields(seed=k), "id": [ids.format(5 * k + i) for i in range(5)]} for k, s in enumerate(SPLITS)}


def without(split, key):
    return {s: {k: v for k, v in f.items() if (s, k) != (split, key)} for s, f in content().items()}


def number(stream, value):
    """A good file but for this number in the last frame of training clip 2."""
    made = content(dtype=np.float64)
    made["train"][stream][2, 7, 0] = value
    return made


def crc(*arrays):
    return zlib.crc32(b"".join(np.asarray(x).tobytes() for x in arrays))


def same(a, b):
    for m in STREAMS:
        assert torch.equal(a[m], b[m]) and torch.equal(a["real"][m], b["real"][m])
    assert torch.equal(a["label"], b["label"]) and a["id"] == b["id"]


def test_the_names_and_numbers_that_files_and_tables_go_by():
    assert data.SETS == {name: tuple(m for letter, m in zip("lav", ("text", "audio", "vision")) if letter in name)
                         for name in ("l", "a", "v", "la", "lv", "av", "lav")}
    assert data.EMOTIONS == ("neutral", "happy", "sad", "angry")
    assert data.RATES == (0, .1, .2, .3, .4, .5, .6, .7, .8, .9, 1)
    assert data.SIZES == {"mosi": (1284, 229, 686), "mosei": (16326, 1871, 4659), "iemocap": (2717, 798, 938)}
    assert data.MAX_FRAMES == 1500


# ------------------------------------------------------------------------------------- formats

class Python2(pickle._Pickler):
    """Writes bytes as Python 2 wrote its strings."""
    dispatch = {**pickle._Pickler.dispatch,
                bytes: lambda self, b: (self.write(b"T" + len(b).to_bytes(4, "little") + b), self.memoize(b))}


def encoded(made, protocol):
    if protocol == "python 2":
        buffer = io.BytesIO()
        Python2(buffer, 2).dump({s.encode(): {k.encode(): v for k, v in made[s].items()} for s in made})
        return buffer.getvalue()
    if protocol == "numpy 1":
        return pickle.dumps(made, protocol=2).replace(b"numpy._core", b"numpy.core")
    return pickle.dumps(made, protocol=protocol)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ">f8", np.int32])
@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5, "python 2", "numpy 1"])
def test_mults_layout_in_every_protocol_and_number_type(tmp_path, protocol, dtype):
    """And -inf in audio is 0, as in MulT's reader."""
    made = every(**{m: lambda split, m=m: (9 * split[m]).astype(dtype) for m in STREAMS})
    made["train"]["text"] = np.asfortranarray(made["train"]["text"])
    loaded = load(tmp_path, encoded(made, protocol))
    for k, s in enumerate(SPLITS):
        for m in STREAMS:
            assert loaded[s][m].dtype == torch.float32
            for i in range(5):
                np.testing.assert_array_equal(loaded[s][m][i, :3 + i], made[s][m][i, 5 - i:].astype(np.float32))
                assert not loaded[s][m][i, 3 + i:].any()
                assert loaded[s]["real"][m][i].tolist() == [True] * (3 + i) + [False] * (5 - i)
        np.testing.assert_array_equal(loaded[s]["label"], made[s]["labels"].ravel())
        assert loaded[s]["id"] == [f"clip{k}_{i}" for i in range(5)]
    assert loaded["dims"] == WIDTHS and loaded["aligned"] and loaded["source"]["sizes"] == [5, 5, 5]
    same(load(tmp_path, number("audio", -np.inf))["train"], load(tmp_path, number("audio", 0))["train"])


SPANS = [   # of 12 frames: a clip's first, the one behind its last, its stated length -> its beginning, its length
    (2, 5, 5, 0, 5), (2, 5, 7, 0, 7), (2, 5, 4, 2, 3), (2, 5, 0, 2, 3), (5, 9, 8, 5, 4), (0, 0, 5, 0, 0),
    (4, 12, 8, 4, 8), (6, 12, 8, 4, 8), (4, 12, 9, 3, 9), (4, 12, 7, 4, 8), (3, 12, 12, 0, 12), (0, 12, 3, 0, 12)]


def test_mmsas_layout_and_its_lengths_which_widen_a_clip_that_they_cover_from_the_front_or_the_back(tmp_path):
    """regression_labels, ids as a list of strings, text_bert left alone."""
    t, y = np.arange(12)[:, None].repeat(4, 1), np.linspace(-3, 3, 12).tolist()
    x = np.stack([np.where((first <= t) & (t < behind), t - 20, 0) for first, behind, *_ in SPANS])
    made = every(more={"n": 12, "front": False, **UNALIGNED}, audio=x, audio_lengths=[span[2:3] for span in SPANS],
                 id=[f"v$_${i}" for i in range(12)], text_bert=np.zeros((12, 3, 8)), regression_labels=y)
    made = {s: {k: v for k, v in f.items() if k != "labels"} for s, f in made.items()}
    written(tmp_path / "MOSI" / "Processed", made, "unaligned_50.pkl")
    loaded = data.load("mosi", tmp_path, normalize=False)
    split = loaded["train"]
    assert split["id"][1] == "v$_$1" and not loaded["aligned"] and split["label"].tolist() == pytest.approx(y)
    assert split["real"]["text"].sum(1).tolist() == [3, 4, 5, 6, 7, *[8] * 7]
    for i, (_, _, _, start, length) in enumerate(SPANS):
        assert split["audio"][i, :, 0].tolist() == [*x[i, start:, 0], *[0] * start], SPANS[i]
        assert split["real"]["audio"][i].tolist() == [t < length for t in range(12)], SPANS[i]


def test_aligned_streams_share_their_span(tmp_path):
    """A face not found at a clip's edge is no padding while a word is there."""
    made = content()
    made["train"]["vision"][4, 1:4] = 0
    made["train"]["audio"][3] = 0
    made["train"]["simulated_text"] = made["train"]["text"].copy()
    for i, m in enumerate(STREAMS):
        made["train"][m][i, 1] = -1                     # a frame that one stream alone has
        made["train"][f"{m}_lengths"] = [8] * 5         # of no account
    split = load(tmp_path, made, ("train",))["train"]
    assert split["vision"][4].any(-1).tolist() == [0, 0, 0, 1, 1, 1, 1, 0] and not split["text"][1, 0].any()
    assert not split["audio"][3].any() and split["lacking"] == []
    assert all(split["real"][m].sum(1).tolist() == [7, 7, 7, 6, 7] for m in STREAMS)
    assert split["real"]["simulated_text"].sum(1).tolist() == [3, 4, 5, 6, 7]


def test_a_limit_takes_the_first_clips_of_each_split(tmp_path):
    pickled = {"data_dir": written(tmp_path, every(more=UNALIGNED, audio_lengths=[5, 6, 7, 8, 9]))}
    for name, sizes, more in (("mosi", [5, 5, 5], pickled), ("mosei", [12, 6, 6], feature_folders(tmp_path)[0]),
                              ("iemocap", [2717, 798, 938], {"synthetic": True})):
        whole, part = (data.load(name, splits=["valid"], normalize=False, limit=limit, **more) for limit in (None, 3))
        assert whole["source"]["sizes"] == part["source"]["sizes"] == sizes
        whole, part = whole["valid"], part["valid"]
        assert part["id"] == whole["id"][:3] and torch.equal(part["label"], whole["label"][:3])
        assert part["text"].shape[0] == 3 < whole["text"].shape[0]
        (a, _, real), (b, _, same_real) = (data.batch(split, torch.arange(3)) for split in (whole, part))
        assert all(torch.equal(a[m], b[m]) and torch.equal(real[m], same_real[m]) for m in a | b)


@pytest.mark.parametrize("dataset, form", [
    *(("mosi", form) for form in (np.float64, np.ravel, lambda y: y[:, 0], lambda y: y.ravel().tolist())),
    ("mosei", lambda y: np.concatenate((y, np.ones((5, 1, 6))), -1)),           # the sentiment, then six emotions
    *(("iemocap", form) for form in (np.int64, np.bool_, lambda y: y.argmax(-1), lambda y: y.argmax(-1).tolist()))])
def test_labels_in_all_their_forms(tmp_path, dataset, form):
    more = {"emotions": dataset == "iemocap"}
    y = content(**more)["valid"]["labels"]
    loaded = load(tmp_path, every(more=more, labels=lambda split: form(split["labels"])), dataset=dataset)
    np.testing.assert_array_equal(loaded["valid"]["label"], y[..., 1] if more["emotions"] else y.ravel())


@pytest.mark.parametrize("ids, first", [
    ([["a", "0", "1"]] * 5, "a/0/1"), (np.array([[b"a", b"", b""]] * 5), "a"), (["x"] * 5, "x"),
    ([b"caf\xe9"] * 5, "caf\ufffd"),
    (np.array([["a", 1.5, 2]] * 5, dtype=object), "a/1.5/2"), ([np.array(["a", "b"])] * 5, "a/b"), (np.arange(5), "0")])
def test_ids_in_all_their_forms(tmp_path, ids, first):
    assert load(tmp_path, every(id=ids))["train"]["id"][0] == first


PAIRS = list(itertools.combinations(SPLITS, 2))
ONE_CLASS = (   # 0 is neither positive nor negative; an emotion may be lacking
    ({}, [0, 1, 2, 1, 0]), ({}, [0, -1, -2, -1, 0]), ({"emotions": True}, np.eye(4)[[0, 1, 3, 0, 1]]))
NOTES = [       # the beginning of a note, and the file that it is of
    ("no vision in test: a set with it is not answered", every(["test"], UNALIGNED, vision=np.zeros((5, 9, 3)))),
    ("no ids in valid: nothing tells", without("valid", "id")),
    ("all labels lie within [-1, 1]: Acc-7", every(labels=np.linspace(-1, 1, 5))),
    ("the streams are not aligned", every(["test"], vision=np.ones((5, 9, 3)))),
    *((f"2 clips stand in both {a} and {b}", {**content(), a: {**fields(seed=7), "id": list("abcde")},
                                              b: {**fields(seed=8), "id": list("fdgeh")}}) for a, b in PAIRS),
    *((f"1 videos stand in both {a} and {b}, for instance v_x", named(ids))
      for a, b in PAIRS for ids in ("v_x_{}", "v_x$_${}", "v_x/{}")),
    *(("labels of one class alone in valid, test: its F1", every(SPLITS[1:], more, labels=y)) for more, y in ONE_CLASS),
]


@pytest.mark.parametrize("text, made", NOTES, ids=range(len(NOTES)))
def test_what_a_reader_of_a_table_should_know_is_noted(tmp_path, text, made):
    loaded = load(tmp_path, made, dataset=None)
    assert any(note.startswith(text) for note in loaded["source"]["notes"])
    assert loaded["lacking"] == ["vision"] * ("no vision" in text)


def test_nothing_is_noted_of_good_files_and_no_video_of_the_standard_splits(tmp_path, monkeypatch):
    for made in (every(SPLITS[1:], labels=[-1, 0, 0, 0, 1]), content(emotions=True), named("v{}"), named("S1_F{}")):
        assert load(tmp_path, made, dataset=None)["source"]["notes"] == []
    monkeypatch.setattr(data, "SIZES", {"mosi": (5, 5, 5)})
    assert load(tmp_path, named("v_x_{}"))["source"]["notes"] == []


@pytest.mark.parametrize("dataset, names", [
    ("mosi", ("mosi_raw", "mosi_data", "MOSI/Processed/aligned_50", "mosi_data_noalign",
              "MOSI/Processed/unaligned_50")),
    ("mosei", ("mosei_senti_data", "mosei_raw", "MOSEI/Processed/aligned_50", "mosei_senti_data_noalign",
               "MOSEI/Processed/unaligned_50")),
    ("iemocap", ("iemocap_data", "iemocap_data_noalign"))])
def test_word_aligned_files_come_first_and_a_missing_one_is_told(tmp_path, dataset, names):
    with pytest.raises(DataError, match="--synthetic"):
        data.find(dataset, tmp_path)
    for name in reversed(names):
        written((tmp_path / name).parent, b"", f"{Path(name).name}.pkl")
        assert data.find(dataset, tmp_path) == tmp_path / f"{name}.pkl"


def test_a_file_whose_sizes_are_about_those_of_another_data_set_is_refused(tmp_path, monkeypatch):
    for sizes, name in (((1284, 229, 686), "mosi"), ((1412, 207, 754), "mosi"), ((1413, 229, 686), None),
                        ((1284, 229, 617), None), ((2717, None, 938), "iemocap"), ((1284, None, None), None)):
        assert data.data_set_of(list(sizes)) == name
    monkeypatch.setattr(data, "SIZES", {"mosi": (9, 9, 9), "mosei": (50, 46, 50), "iemocap": (7, 7, 7)})
    for n, dataset, across, text in ((50, "mosi", False, "50/50/50 clips, .* mosei, not of mosi. .* --dataset mosei"),
                                     (7, "mosi", True, "splits of iemocap, not of mosi or mosei. Name another file"),
                                     (50, "iemocap", True, "the splits of mosei, not of iemocap. Name another file")):
        with pytest.raises(DataError, match=text):
            load(tmp_path, content(n=n), dataset=dataset, across=across)
    assert load(tmp_path, content(n=50), across=True)["dataset"] == "mosei"
    assert load(tmp_path, content(n=50), dataset=None)["dataset"] == "mosei"


@pytest.mark.parametrize("change, compared, text", [
    ({}, True, ""), ({"sizes": [1283, 214, 686]}, True, "train has 1283 clips, the paper's 1284; valid has 214 clips"),
    ({"sizes": [1284, 229, 685]}, False, "test has 685 clips, the paper's 686"), ({"synthetic": True}, False, "SYNTH"),
    ({"sizes": [1284, 229, None]}, False, "test has no clips"), ({"limit": 9}, False, "of only the first 9 clips"),
    ({"text": 299}, False, "text is 299 wide, the paper's 300"), ({"audio": 5}, True, "audio is 5 wide"),
    ({"vision": 47}, True, "vision is 47 wide"), ({"dataset": "iemocap", "sizes": [2717, 798, 938]}, True, "")])
def test_what_may_stand_beside_print(change, compared, text):
    dims = {m: change.get(m, width) for m, width in PAPERS.items()}
    source = {"sizes": [1284, 229, 686], "synthetic": False, **change}
    answer, line = data.comparison({"dataset": "mosi", "limit": None, **change, "dims": dims}, source, PAPERS)
    assert answer is compared and text in line and bool(text) == bool(line)


# ------------------------------------------------------------------------------------- bad and hostile files

BAD = [         # what is said, and the file's content
    *(("x.pkl is refused: ", pickle.dumps(content())[:n]) for n in (0, 300, -200, -1)),         # cut off
    ("begins with b'<!DOCTYPE html>.*, as a web page", b"\n<!DOCTYPE html>\n<html>"),
    ("holds train, dev; expected", {"train": {}, "dev": {}}),
    ("no 'audio', only text, vision, labels, id, acoustic", every(acoustic=lambda split: split.pop("audio"))),
    (r"'text' is an array of float64 of shape \(5, 6\); expected numbers", every(text=np.ones((5, 6)))),
    ("do not match: .*'audio': 4, .* 'labels': 5", every(audio=np.ones((4, 8, 4)))),
    ("do not match: .* 'ids': 4", every(id=list("abcd"))),
    (r"from 3.01 to 3.01, not one sentiment a clip, in \[-3, 3\]", every(labels=np.full(5, 3.01))),
    ("from nan to nan", every(labels=np.full(5, np.nan))),
    (r"of shape \(5, 2\), .* not one sentiment", every(labels=np.zeros((5, 2)))),
    ("not four yes/no emotions", every(labels=np.full((5, 4), 2))),
    ("split train is refused: int too large", every(labels=[10 ** 400] * 5)),
    *(("one class alone. Sentiments are meant, in .-3, 3.", every(["train"], more, labels=y)) for more, y in ONE_CLASS),
    ("'vision' holds.* NaN.* clip clip0_2", number("vision", np.nan)),
    ("'audio' holds values .* clip clip0_2", number("audio", np.inf)),
    ("'text' holds values", number("text", -np.inf)), ("'vision' holds values", number("vision", -np.inf)),
    ("'audio' .*too large.*clip clip0_2", number("audio", -1e300)),
    ("split valid .* has neither 'labels' nor", without("valid", "labels")),
    ("simulated_text as many as text", every(simulated_text=lambda split: split["text"][..., :4])),
    ("all splits must have the same ones", every(["train"], text=np.ones((5, 8, 5)))),
    *(("'audio_lengths' is not 5 whole numbers between 0 and 12", every(more=UNALIGNED, audio_lengths=x))
      for x in ([5] * 4, [5] * 4 + [13], [5] * 4 + [-1], [5] * 4 + [2.5], [5] * 4 + [np.nan])),
]


@pytest.mark.parametrize("text, made", BAD, ids=range(len(BAD)))
def test_a_bad_file_is_told_in_a_sentence(tmp_path, text, made):
    with warnings.catch_warnings(), pytest.raises(DataError, match=text) as error:
        warnings.simplefilter("error")
        load(tmp_path, made, dataset=None)
    assert str(error.value).isprintable() and len(str(error.value)) <= 600


def call(name):
    """name("touch GOTCHA") in opcodes of protocol 0, by no name that need exist here."""
    return "c{}\n{}\n(Vtouch GOTCHA\ntR.".format(*name.rsplit(".", 1)).encode()


def inside(payload):
    """A pickle whose train split holds the payload as its text, given as opcodes without the final stop."""
    return (b"\x80\x03}X\x05\x00\x00\x00train}X\x04\x00\x00\x00text" + payload
            + b"ssX\x05\x00\x00\x00valid}sX\x04\x00\x00\x00test}s.")


def shaped(shape, code="f4"):
    """An array of this shape and type that comes with four bytes."""
    sizes = "".join(f"I{n}\n" for n in shape)
    array = f"cnumpy.core.multiarray\n_reconstruct\n(tR(I1\n({sizes}tcnumpy\ndtype\n(V{code}\ntRI00\nC\x04abcdtb"
    return inside(array.encode())


NAMES = """subprocess.Popen os.system builtins.eval builtins.getattr __builtin__.eval pickle.loads data.read_pickle
torch.load codecs.decode _codecs.lookup numpy.load numpy.core.multiarray.fromfile numpy._core.multiarray.frombuffer
numpy.memmap""".split()
SYSTEM = b"cos\nsystem\n(Vtouch GOTCHA\ntR"
FORMS = (
    b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x0ctouch GOTCHA\x85R.", b"(Vtouch GOTCHA\nios\nsystem\n.",
    b"(cos\nsystem\nVtouch GOTCHA\no.", b"\x80\x02cos\nsystem\nVtouch GOTCHA\n\x85\x81.",
    b"cnumpy\nndarray\n0(cnumpy.core.multiarray\n_reconstruct\n(" + SYSTEM + b"tR.",
    b"cnumpy.core.multiarray\n_reconstruct\n(tR" + SYSTEM + b"b.", b"ccollections\nOrderedDict\n((l" + SYSTEM + b"atR.",
    b"cnumpy\ndtype\n(" + SYSTEM + b"tR.", b"}" + SYSTEM + b"I1\ns.",
    b"\x80\x02\x82\xf1(Vtouch GOTCHA\ntR.")      # the last by an extension code, which the test registers
REFUSED = (     # attributes set on what is handed out; a memo that is not there, an unknown extension; 8 EB of bytes
    b"cnumpy\ndtype\n(N}Vdtype\nVGOTCHA\nstb.", b"cnumpy\nndarray\n(N}Vvalue\nVGOTCHA\nstb.",
    b"ccollections\nOrderedDict\n(N}Vupdate\nVGOTCHA\nstb.", b"\x80\x02h\x07.", b"\x80\x02\x82\x7b.",
    b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7fabc.", shaped((-1, -1)), shaped((1,), "S1099511627776"))
BOMB = [0]      # small in a file and large when it is written out
for _ in range(6):
    BOMB = [BOMB] * 10
HOSTILE = {     # opcodes: what the refusal must say
    **{call(name): f"asks for {name}," for name in NAMES},
    **dict.fromkeys(FORMS, "asks for os.system"),
    **dict.fromkeys(REFUSED, "is refused"),
    b"\x80\x04\x8c\x15numpy.core.multiarray\x8c\x1c_reconstruct.__globals__.get\x93.": "asks for .*__globals__.get",
    b"\x80\x02X\x09\x00\x00\x00os.systemQ.": "persistent",
    b"c_codecs\nencode\n(N}V__defaults__\n(Va\ntstb.": "holds no splits",
    pickle.dumps({s: {**fields(), "id": BOMB} for s in SPLITS}): "is refused: no text",
    pickle.dumps({s: {**fields(), "text": BOMB} for s in SPLITS}): "'text' is a list",
    inside(b"]q\x00h\x00a"): "'text' is a list",                            # a list that holds itself
    b"\x80\x02" + b"]" * 10 ** 5 + b"a" * (10 ** 5 - 1) + b".": "holds no splits",
    shaped((10 ** 13,)): "cannot reshape array of size 1",
    shaped((4294967296, 4294967296)): "cannot reshape array of size 1",     # a size that overflows to 0
    shaped((1,), "O"): "cannot reshape array of size 4",                    # raw bytes as pointers
    pickle.dumps(np.zeros(3, [("a", "f4"), ("b", "O")])): "an array of type",
    b"\x80\x02}X\x09\x00\x00\x00\x1b]0;hi\x07\n\nK\x01s.": "expected a dict",     # a terminal's commands
}
for what in (Call(os.system, ("touch GOTCHA",)), np.array([1, Call(os.system, ("touch GOTCHA",))], dtype=object),
             Call(__import__, ("os",)), Call(np.ndarray, ((2,),)), torch.nn.Linear(1, 1), collections.Counter("a")):
    HOSTILE.update({pickle.dumps({"train": what}, protocol=p): "is refused" for p in range(6)})


@pytest.mark.parametrize("raw", HOSTILE, ids=range(len(HOSTILE)))
def test_a_hostile_pickle_executes_nothing_and_is_refused(tmp_path, monkeypatch, raw):
    """Nothing is called, no file appears, no class is changed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(copyreg._inverted_registry, 0xf1, ("os", "system"))
    Path("x.pkl").write_bytes(raw)
    before = dict(vars(data.DType)), dict(vars(data.Array)), dict(vars(data))
    with pytest.raises(DataError, match=HOSTILE[raw]) as error:
        data.load("mosi", "x.pkl")
    assert str(error.value).isprintable() and len(str(error.value)) <= 600
    assert os.listdir() == ["x.pkl"] and before == (dict(vars(data.DType)), dict(vars(data.Array)), dict(vars(data)))


# ------------------------------------------------------------------------------------- standardising, masks, batches

def test_standardising_is_what_the_docstring_says(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "CHUNK", 2)       # of the 5 training clips
    made = content()
    made["train"]["text"][..., 2] *= 1e4
    made["train"]["vision"][4, 3] = 0           # a face not found inside the clip
    made["train"]["audio"][..., 1] = np.where(made["train"]["audio"][..., 1] != 0, 3.25, 0)      # a constant
    made["train"]["text"][3:, 6, 1] = made["train"]["vision"][3:, 6, 1] = 0        # numbers of real frames
    made["valid"]["text"][:, -1, :2] = 1e4, -1e4
    raw, loaded = load(tmp_path, made), load(tmp_path, made, normalize=True)
    for m in STREAMS:
        frames = [frame for clip in raw["train"][m].double().numpy() for frame in clip if frame.any()]
        mean, std = np.mean(frames, 0), np.std(frames, 0)
        std[std < 1e-6] = 1
        for s in SPLITS:                        # all splits by the training split's numbers
            x = raw[s][m].numpy()
            expected = np.clip((x - mean) / std, -5, 5) * (x != 0).any(-1, keepdims=True)
            np.testing.assert_allclose(loaded[s][m], expected, atol=1e-4)
    assert loaded["valid"]["text"].aminmax() == (-5, 5) and not loaded["train"]["vision"][4, 2].any()
    same(data.load("mosi", tmp_path / "x.pkl", ("test",), stats=loaded["stats"])["test"], loaded["test"])
    with pytest.raises(DataError, match="The data has 6 features of text, the run was trained on 5"):
        data.load("mosi", tmp_path / "x.pkl", stats=dict.fromkeys(STREAMS, (torch.zeros(5), torch.ones(5))))
    with pytest.raises(DataError, match="by the training split, .* normalize=False for a run made with --no-normalize"):
        data.load("mosi", tmp_path / "x.pkl", ("test",))


def test_a_feature_that_is_constant_but_for_rounding_is_divided_by_1_and_no_other(tmp_path):
    x = np.where(np.arange(8)[:, None] % 2, [1, 1, 3e-9], [1 + 2 ** -23, 1 + 3 * 2 ** -23, 1e-9])
    mean, std = load(tmp_path, every(vision=np.stack([x] * 5)), normalize=True)["stats"]["vision"]
    assert mean.tolist() == pytest.approx([1, 1, 2e-9], rel=1e-5)
    assert std.tolist() == pytest.approx([1, 3 * 2 ** -24, 1e-9], rel=1e-3)


def test_simulated_text_is_standardised_as_text_and_has_masks_of_its_own(tmp_path):
    made = every(simulated_text=lambda split: np.roll(split["text"], 1, axis=-1).repeat(2, axis=1))
    loaded = load(tmp_path, made, normalize=True)
    split, (mean, std) = loaded["train"], loaded["stats"]["text"]
    assert loaded["dims"]["simulated_text"] == 6 and loaded["aligned"] and split["simulated_text"].shape[1] == 16
    raw = torch.from_numpy(made["train"]["simulated_text"][2, -1])
    torch.testing.assert_close(split["simulated_text"][2, 9], ((raw - mean) / std).clamp(-5, 5))
    assert split["real"]["simulated_text"][2].sum() == 10 and split["real"]["text"][2].sum() == 5


def some_real(n=400, t=20, seed=3):
    lengths = torch.randint(1, t + 1, (n, 1), generator=torch.Generator().manual_seed(seed))
    return {m: torch.arange(t) < lengths for m in STREAMS}


@pytest.mark.parametrize("rate", data.RATES)
def test_the_realised_rate_is_the_nominal_one_and_dropped_frames_are_uniform(rate):
    real = some_real()
    present = data.evaluation_masks(real, rate, "test")
    for m in STREAMS:
        n, dropped = real[m].sum(1), (real[m] & ~present[m]).sum(1)
        assert not (present[m] & ~real[m]).any()                        # padding is neither there nor dropped
        assert ((dropped - rate * n).abs() < 1 + 1e-9).all()            # within rounding, clip by clip
        assert abs(float((dropped / n).mean()) - rate) < (.02 if 0 < rate < 1 else 1e-9)
    for count, longest in ((20000, 1), (6000, 12)):         # clips of one frame, and clips with 2 frames of padding
        real = torch.arange(longest).expand(count, longest) < 10
        shares = (real & ~data.drop(real, rate, torch.Generator().manual_seed(1))).float().mean(0)
        assert (shares[:10] - rate).abs().max() <= 4 * (rate * (1 - rate) / count) ** .5 and not shares[10:].any()


def test_evaluation_masks_depend_on_seed_split_and_condition_alone():
    real = some_real(50)
    first = data.evaluation_masks(real, .4, "test")
    torch.rand(7)       # other generators do not matter
    assert all(torch.equal(first[m], data.evaluation_masks(real, .4, "test")[m]) for m in STREAMS)
    for other in ((.5, "test", 0), (.4, "valid", 0), (.4, "test", 1)):
        assert not torch.equal(first["text"], data.evaluation_masks(real, *other)["text"])
    assert not torch.equal(first["text"], first["audio"])       # each stream its own frames
    for name, whole in (("l", "100"), ("a", "010"), ("v", "001"), ("lv", "101"), ("lav", "111")):
        present = data.evaluation_masks(real, name, "test")
        for m, one in zip(STREAMS, whole):
            assert torch.equal(present[m], real[m] & (one == "1"))


def test_training_masks_cover_the_seven_sets_evenly_and_change_every_time():
    real, generator = {m: torch.ones(7000, 30, dtype=torch.bool) for m in STREAMS}, torch.Generator().manual_seed(5)
    first, second = data.training_masks(real, generator), data.training_masks(real, generator)
    available = torch.stack([first[m].any(1) for m in STREAMS], 1)
    _, counts = available.unique(dim=0, return_counts=True)
    assert available.any(1).all() and len(counts) == 7 and (counts - 1000).abs().max() < 4 * 30
    rates = 1 - first["text"][available[:, 0]].float().mean(1)
    assert abs(rates.mean() - .45) < .02 and set((rates * 10).round().int().tolist()) == set(range(10))
    assert torch.stack([(first[m] != second[m]).any(1) for m in STREAMS]).any(0).float().mean() > .95


def test_a_training_copy_is_never_empty_and_its_sets_are_those_of_the_streams_that_its_clip_has():
    """Clips of one frame; of no vision in a split, told by the mask or by `lacking`; and one clip of vision alone."""
    generator, one = torch.Generator().manual_seed(3), torch.ones(6000, 1, dtype=torch.bool)
    none, few = torch.zeros(6000, 4, dtype=torch.bool), torch.arange(4).expand(6000, 4) < 2
    for real, lacking, sets in (({"text": one, "audio": one, "vision": one}, (), 7),
                                ({"text": few, "audio": one, "vision": none}, (), 3),
                                ({"text": few, "audio": few, "vision": few}, ["vision"], 3),
                                ({"text": none, "audio": none, "vision": few}, (), 1)):
        present = data.training_masks(real, generator, lacking)
        kept = torch.stack([present[m].any(1) for m in STREAMS], 1)
        assert kept.any(1).all() and len(kept.unique(dim=0)) == sets
        assert not any((present[m] & ~real[m]).any() or (m in lacking and present[m].any()) for m in STREAMS)
    counts = data.training_masks({m: few for m in STREAMS}, generator)["text"].float().mean(0)[:2]
    assert abs(counts[0] - counts[1]) < .03         # the frame that is kept is each one equally often
    lost = data.training_masks(dict.fromkeys(STREAMS, none), generator)
    assert not any(mask.any() for mask in lost.values())


def test_masks_and_batches_of_a_seed_stay_what_they_are():
    """Streams of different lengths, 10 clips without vision. Other masks would make other tables."""
    generator = torch.Generator().manual_seed(7)
    real = {m: torch.arange(t) < torch.randint(1, t + 1, (100, 1), generator=generator)
            for m, t in zip(STREAMS, (12, 20, 9))}
    real["vision"][:10] = False
    conditions = (.05, "test"), (.1, "test"), (.25, "valid", 1), (.3, "train"), (1 / 3, "test", 1111)
    masks = [*(data.evaluation_masks(real, *condition) for condition in conditions),
             *(data.training_masks(real, generator, lacking) for lacking in ((), (), ["audio"]))]
    assert [crc(*(present[m] for m in STREAMS)) for present in masks] == [
        3268989052, 567036526, 643839977, 36068199, 3287557051, 480333817, 2120122442, 141142650]
    groups = data.batches(real, 8, generator)
    assert crc(*groups) == 747452907 and [len(group) for group in groups] == [8] * 9 + [4] + [8] * 3


@pytest.mark.parametrize("lacking, answered, once", [
    ([], "l a v la lv av lav", "l a v la lv av lav"), (["vision"], "l a la lav", "l a la"),
    (["text", "audio"], "v lav", "v"), (list(STREAMS), "lav", "lav")])
def test_sets_that_name_a_stream_which_the_data_lacks_are_not_answered(lacking, answered, once):
    assert data.answerable(data.SETS, lacking) == answered.split() and data.distinct(data.SETS, lacking) == once.split()


def test_batches_hold_every_clip_once_and_clips_of_similar_length():
    real, generator = some_real(500, 50), torch.Generator().manual_seed(0)
    first, second = data.batches(real, 32, generator), data.batches(real, 32, generator)
    assert all(torch.equal(torch.cat(groups).sort()[0], torch.arange(500)) for groups in (first, second))
    assert sum(real["text"][group].sum(1).max() * len(group) for group in first) < .75 * 50 * 500   # at random: .97
    assert crc(*first) != crc(*second)


@pytest.mark.parametrize("lacking, frames, longest", [([], 8, 5), (["vision"], 8, 5), (["vision"], 9, 1)])
def test_a_batch_is_cut_to_its_longest_clip_and_drops_what_the_training_masks_say(tmp_path, lacking, frames, longest):
    made = every(simulated_text=lambda split: split["text"], **{m: np.zeros((5, frames, 3)) for m in lacking})
    split, index = load(tmp_path, made)["train"], torch.tensor([2, 0])
    complete, missing, real = data.batch(split, index)
    assert split["lacking"] == lacking and complete["vision"].shape[1] == longest
    assert missing is None and real["text"].dtype == torch.bool and complete["text"].shape == (2, 5, 6)
    assert torch.equal(complete["text"][1, :3], split["text"][0, :3])
    assert real["simulated_text"].tolist() == [[True] * 5, [True] * 3 + [False] * 2]
    complete, missing, real = data.batch(split, index, torch.Generator().manual_seed(1))
    present = data.training_masks(real, torch.Generator().manual_seed(1), lacking)
    assert list(missing) == list(STREAMS)
    for m in STREAMS:
        assert torch.equal(missing[m], torch.where(present[m][..., None], complete[m], torch.tensor(0.)))


# ------------------------------------------------------------------------------------- the stand-in, check, convert

STAND_IN = {    # splits, checksums of their labels and of which frames are real, mean sizes of text, audio and vision
    "mosi": (SPLITS, 1936247570, 930032496, 6.2622615, 6.7841872, 4.1310012),
    "mosei": (["valid"], 3951076093, 2468569508, 2.9929695, 2.567616, 2.9681072),
    "iemocap": (SPLITS, 1712227425, 1590262699, 12.451118, 11.938454, 15.619171),
}


@pytest.mark.parametrize("dataset", STAND_IN)
def test_the_stand_in_stays_what_it_is(dataset):
    splits, labels, frames, *sizes = STAND_IN[dataset]
    made = [data.stand_in(dataset, s) for s in splits]
    assert crc(*(np.rint(split["labels"] * 5).astype("i1") for split in made)) == labels
    for m, size in zip(STREAMS, sizes):
        assert crc(*(split[m].any(-1) for split in made)) == frames
        assert sum(np.abs(split[m], dtype=np.float64).mean() for split in made) == pytest.approx(size, rel=1e-5)


def test_the_written_stand_in_is_mults_layout_and_the_one_in_memory(tmp_path, capsys):
    """Read back the way MulT's reader does: plain pickle, float arrays, id rows of three byte strings that decode."""
    command = ["synthesize", "mosi", "--out", str(tmp_path / "new")]
    assert data.main(command) == 0 and "SYNTHETIC" in capsys.readouterr().out
    raw = pickle.loads((tmp_path / "new" / "mosi_raw.pkl").read_bytes())
    for s in SPLITS:
        assert {m: raw[s][m].shape[1:] for m in STREAMS} == {m: (50, d) for m, d in PAPERS.items()}
        assert raw[s]["labels"].shape == (len(raw[s]["text"]), 1, 1)
        assert [part.decode("UTF-8") for part in raw[s]["id"][3]] == [f"{s}3", "0", "1"]
        assert not raw[s]["text"][:, 0].any(1).all() and raw[s]["text"][:, -1].any(1).all()       # padded in front
    loaded, memory = data.load("mosi", tmp_path / "new"), data.load("mosi", synthetic=True)
    same(loaded["train"], memory["train"])
    assert loaded["source"]["synthetic"] and memory["source"]["synthetic"]
    assert data.main(command) == 2 and "exists already" in capsys.readouterr().err


def test_check_says_what_a_file_is_and_what_the_programs_will_miss(tmp_path, capsys):
    made = every(["train", "valid"], UNALIGNED)
    del made["test"]["labels"]
    getattr(os, "mkfifo", os.mkdir)(tmp_path / "waits")         # a FIFO, which would be waited for; Windows has none
    whole = written(tmp_path / "whole", made) / "mosi_data.pkl"
    part = written(tmp_path / "part", {"test": made["test"]}) / "mosi_data.pkl"
    trains = written(tmp_path / "trains", {s: made[s] for s in ("train", "valid")}) / "mosi_data.pkl"
    del made["valid"]["labels"]         # which are needed beside train alone
    judged = written(tmp_path / "judged", {"valid": made["valid"]}) / "mosi_data.pkl"
    for path, code, parts in (
            (trains, 0, ("train: 5 clips", "test has no clips")),
            (judged, 0, ("valid: 5 clips, no labels", "no train:")),
            (whole, 0, ("labels as of mosi", "SHA-256 " + data.sha256(whole)[:16], "train: 5 clips, labels from",
                        "(5, 12, 4), 5.0 real frames a clip", "test has 5 clips, the paper's 686")),
            (part, 0, ("test: 5 clips, no labels", "no train and no valid: train.py refuses this file, eval.py")),
            (tmp_path / "nothing", 2, ["does not exist"]), (tmp_path / "waits", 2, ["is no regular file"])):
        assert data.main(["check", str(path)]) == code
        said = "".join(capsys.readouterr())
        assert all(part in said for part in parts), said
        assert path != trains or "refuses" not in said


def h5(folder, name, array):
    with pytest.importorskip("h5py").File(folder / f"{name}.h5", "w") as file:
        file["data"] = array


def test_mfns_files_become_a_pickle_in_mults_layout_or_what_is_wrong_with_them_is_told(tmp_path, monkeypatch, capsys):
    rng, truth, made = np.random.default_rng(0), {}, tmp_path / "made/mosi_data.pkl"
    monkeypatch.setattr(data, "SIZES", {**data.SIZES, "mosi": (6, 4, 5)})
    for s, n in zip(SPLITS, data.SIZES["mosi"]):
        x, y = rng.standard_normal((n, 20, 325)), rng.uniform(-3, 3, n)
        x[:, :15], y[:2] = 0, (-1, 1)
        truth[s] = x, y
        h5(tmp_path, f"X_{s}", x)
        h5(tmp_path, f"y_{s}", y)
    command = ["convert", str(tmp_path), "--out", str(made.parent)]
    assert data.main(command) == 0 and "mosi_data.pkl" in capsys.readouterr().out
    raw = pickle.loads(made.read_bytes())
    for s, (x, y) in truth.items():
        assert set(raw[s]) == {"text", "audio", "vision", "labels"} and raw[s]["labels"].shape == (len(y), 1, 1)
        for m, columns in (("text", x[..., :300]), ("audio", x[..., 300:305]), ("vision", x[..., 305:])):
            assert raw[s][m].dtype == np.float32
            np.testing.assert_array_equal(raw[s][m], columns.astype(np.float32))
        np.testing.assert_array_equal(raw[s]["labels"].ravel(), y.astype(np.float32))
    assert data.load("mosi", made)["train"]["real"]["text"].sum(1).tolist() == [5] * 6
    made.unlink()
    for name, array, said in (("y_train", np.ones(7), "y_train.h5 is refused: .* MFN's file of MOSI holds 6 clips"),
                              ("X_train", np.ones((6, 20, 300)), "X_train.h5 is refused: cannot reshape")):
        h5(tmp_path, name, array)
        assert data.main(command) == 2 and re.search(said, capsys.readouterr().err)
    h5(tmp_path, "X_train", truth["train"][0])
    import h5py
    secret = tmp_path / "secret"
    secret.write_bytes(bytes(24))
    layout = h5py.VirtualLayout((6,), np.float32)
    layout[:] = h5py.VirtualSource(secret, "data", (6,))
    for borrow in (lambda file: file.create_dataset("data", (6,), np.float32, external=[(str(secret), 0, 24)]),
                   lambda file: file.create_virtual_dataset("data", layout),
                   lambda file: file.__setitem__("data", h5py.ExternalLink(secret, "data")),
                   lambda file: file.__setitem__("data", h5py.SoftLink("/there"))):
        with h5py.File(tmp_path / "y_train.h5", "w") as file:
            borrow(file)
        assert data.main(command) == 2 and "it has no dataset `data` of its own" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "h5py", None)
    assert data.main(command) == 2 and "pip install h5py" in capsys.readouterr().err and not made.exists()


def test_mfns_real_labels_are_those_of_the_standard_splits():
    h5py, folder = pytest.importorskip("h5py"), ROOT.parent / "shared/data/mfn_mosi_labels"
    if not folder.is_dir():
        pytest.skip("../shared/data/mfn_mosi_labels is not there: MFN's label files are not read")
    for s, n in zip(SPLITS, data.SIZES["mosi"]):
        y = h5py.File(folder / f"y_{s}.h5")["data"][()]
        assert y.shape == (n,) and y.dtype == np.float64 and abs(y).max() <= 3


def test_a_file_is_known_by_all_of_its_bytes(tmp_path):
    (tmp_path / "x").write_bytes(bytes(2 ** 21) + b"x")
    assert data.sha256(tmp_path / "x") == hashlib.sha256(bytes(2 ** 21) + b"x").hexdigest()


def test_a_folder_that_takes_no_file_is_told(tmp_path):
    with pytest.raises(DataError, match="Nothing can be written into .*nowhere"):
        data.check_writable(tmp_path / "nowhere")
    data.check_writable(tmp_path)


def test_a_path_that_the_terminal_cannot_show_is_no_mistake(tmp_path):
    written(tmp_path, content(), "caf\xe9.pkl")
    done = subprocess.run([sys.executable, ROOT / "data.py", "check", "caf\xe9.pkl"], cwd=tmp_path, text=True,
                          env={**os.environ, "PYTHONIOENCODING": "ascii"}, capture_output=True)
    assert done.returncode == 0 and "caf\\xe9.pkl" in done.stdout


def test_a_file_is_written_whole_or_not_at_all_and_a_link_is_replaced(tmp_path, monkeypatch):
    """Two programs may write into one folder at once."""
    (tmp_path / "victim").write_bytes(b"mine")
    (tmp_path / "a").symlink_to(tmp_path / "victim")
    data.write(tmp_path / "a", b"new")
    assert (tmp_path / "victim").read_bytes() == b"mine" and (tmp_path / "a").read_bytes() == b"new"
    replace = os.replace

    def another_first(source, target):
        monkeypatch.setattr(os, "replace", replace)
        data.write(tmp_path / "b", b"other")
        replace(source, target)
    monkeypatch.setattr(os, "replace", another_first)
    data.write(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"new" and (tmp_path / "b").read_bytes() == b"other"
    monkeypatch.setattr(os, "replace", lambda *paths: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(DataError, match="a cannot be written: No space left"):
        data.write(tmp_path / "a", b"newer")
    assert (tmp_path / "a").read_bytes() == b"new" and sorted(os.listdir(tmp_path)) == ["a", "b", "victim"]


# ------------------------------------------------------------------------------------- feature folders

def load_folders(where, splits=SPLITS):
    return data.load("mosei", splits=splits, normalize=False, **where)


def labelled(where, clip, value=1.0):
    corpus = np.array({clip: {"val": value}}, dtype=object)
    np.savez(where["labels"], **dict.fromkeys(("train_corpus", "val_corpus", "test_corpus"), corpus))


def test_feature_folders_are_read_clip_by_clip_in_natural_order_without_over_long_training_clips(tmp_path, monkeypatch):
    """The frames of a clip lie in 0.npy ... 19.npy, beside a file that is hidden."""
    where, truth, corpus = feature_folders(tmp_path, longest=20)
    for clip in Path(where["features"]["vision"]).iterdir():
        (clip / "._0.npy").write_bytes(b"of macOS")
    for clip, n in zip(corpus["train_corpus"], (15, 16)):
        truth["audio"][clip] = np.ones((n, 5), np.float32)
        np.save(Path(where["features"]["audio"]) / f"{clip}.npy", truth["audio"][clip])
    monkeypatch.setattr(data, "MAX_FRAMES", 15)
    loaded = load_folders(where)
    assert loaded["dims"] == FOLDERS and loaded["stats"] is None and not loaded["aligned"]
    longest = {clip: max(len(truth[m][clip]) for m in FOLDERS) for clip in corpus["train_corpus"]}
    short = [clip for clip in longest if longest[clip] <= 15]
    assert {15, 16} <= set(longest.values()) and len(short) > 5 and loaded["source"]["sizes"] == [12, 6, 6]
    assert f"{12 - len(short)} training clips of more than 15 frames are left out" in loaded["source"]["notes"]
    index = torch.tensor([4, 0, 5])
    for s, name, ids in zip(SPLITS, corpus, (short, list(corpus["val_corpus"]), list(corpus["test_corpus"]))):
        split = loaded[s]
        assert split["id"] == ids
        assert split["label"].tolist() == pytest.approx([corpus[name][clip]["val"] for clip in ids])
        complete, _, real = data.batch(split, index)
        for m in FOLDERS:
            for row, i in enumerate(index.tolist()):
                x = truth[m][ids[i]]
                np.testing.assert_array_equal(complete[m][row, :len(x)], x)
                assert not complete[m][row, len(x):].any() and real[m][row].sum() == len(x)


def test_copied_feature_folders_are_the_same_data_and_other_frame_counts_or_labels_are_not(tmp_path):
    """Whatever the order of the streams and the asked splits; a clip of train counts for a load of test."""
    def identity(which, splits=("test",)):
        return load_folders(which, splits)["source"]["sha256"]

    where, _, corpus = feature_folders(tmp_path / "a", sizes=(3, 1, 1))
    copied, _, _ = feature_folders(tmp_path / "b", sizes=(3, 1, 1))
    copied["features"] = dict(reversed(copied["features"].items()))
    clip, seen = next(iter(corpus["train_corpus"])), [identity(where)]
    assert seen[0] == identity(copied, SPLITS)
    for m, name, x in (("vision", f"{clip}/99.npy", np.ones(4)), ("audio", f"{clip}.npy", np.ones((30, 5)))):
        np.save(Path(where["features"][m]) / name, x)
        seen.append(identity(where))
    for value in (1, 2):
        labelled(where, clip, value)
        seen.append(identity(where))
    note = f"1 clips stand in both train and test, for instance {clip}"
    assert len(set(seen)) == 5 and note in load_folders(where, ("valid", "test"))["source"]["notes"]


WRONG = {       # what is said, and what is done to the folders; path is one file
    "no folder .* of .npy files": lambda where, path: path.unlink(),
    "simulated_text as many as text": lambda where, path: [
        np.save(text, np.zeros(8)) for text in Path(where["features"]["text"]).iterdir()],
    "is refused.* Expected an .npy file": lambda where, path: np.save(path, np.array({"a": 1}, dtype=object)),
    r"audio_dir.video.*npy is refused": lambda where, path: path.write_bytes(path.read_bytes()[:-4]),
    "lacks vision": lambda where, path: where["features"].pop("vision"),
    "with --labels FILE": lambda where, path: where.update(labels=None),
    r"leaves the range \[-3, 3\]": lambda where, path: labelled(where, "a", 3.01),
    "allow_pickle": lambda where, path: path.write_bytes(pickle.dumps(Call(os.system, ("touch GOTCHA",)))),
    "asks for .*system": lambda where, path: labelled(where, "a", Call(os.system, ("touch GOTCHA",))),
}


@pytest.mark.parametrize("text", WRONG)
def test_what_is_wrong_with_feature_folders_is_told_before_training(tmp_path, text, monkeypatch):
    monkeypatch.chdir(tmp_path)
    where, *_ = feature_folders(tmp_path)
    WRONG[text](where, sorted(Path(where["features"]["audio"]).iterdir())[0])
    with pytest.raises(DataError, match=text):
        load_folders(where)
    assert not Path("GOTCHA").exists()


@pytest.mark.parametrize("frame, text", [
    (np.full(4, np.nan), "not finite. Expected . frames of 4 numbers, finite"), (np.full(4, 1e300), "not finite"),
    (np.ones(5), "Expected . frames of 4"), (np.ones((2, 4)), r"\(10, 4\).* Expected 9 frames of 4 numbers")])
def test_a_later_frame_that_is_wrong_is_told_with_its_clip(tmp_path, frame, text):
    where, truth, _ = feature_folders(tmp_path)
    split = load_folders(where)["train"]
    i = max(range(12), key=lambda i: len(truth["vision"][split["id"][i]]))
    np.save(sorted((Path(where["features"]["vision"]) / split["id"][i]).iterdir())[-1], frame)
    with pytest.raises(DataError, match=f"{split['id'][i]}.*{text}"):
        data.batch(split, torch.tensor([i]))
