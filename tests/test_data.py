"""data.py: formats, safety, standardising, masks, batches, the stand-in, feature folders, what is printed."""
import collections
import copyreg
import gzip
import io
import os
import pickle
import random
import re
import shutil
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

posix = pytest.mark.skipif(os.name != "posix", reason="FIFOs, links and devices are POSIX's")
UNALIGNED = {"lengths": (8, 12, 10)}
PAPERS = {"text": 300, "audio": 74, "vision": 35}


def load(folder, made, splits=SPLITS, dataset="mosi", name="mosi_data.pkl", **more):
    return data.load(dataset, written(folder, made, name), splits, **{"normalize": False, **more})


def every(splits=SPLITS, more={}, **changes):
    """A good file's content with these fields in each of the splits; a function is called with the split's fields."""
    made = content(**more)
    for s in splits:
        for key, value in changes.items():
            made[s][key] = value(made[s]) if callable(value) else value
    return made


def without(split, key):
    return {s: {k: v for k, v in f.items() if (s, k) != (split, key)} for s, f in content().items()}


def number(stream, value):
    """A good file but for this number in the last frame of clip 2 of the training split."""
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


# ------------------------------------------------------------------------------------- formats

def test_mults_layout(tmp_path):
    made = content()
    made["train"]["audio"][4, 5, 2] = -np.inf           # read as 0, as MulT's and MultiBench's readers do
    loaded = load(tmp_path, made)
    made["train"]["audio"][4, 5, 2] = 0
    for k, s in enumerate(SPLITS):
        for m in STREAMS:
            for i in range(5):
                np.testing.assert_array_equal(loaded[s][m][i, :3 + i], made[s][m][i, 5 - i:])
                assert not loaded[s][m][i, 3 + i:].any()
                assert loaded[s]["real"][m][i].tolist() == [True] * (3 + i) + [False] * (5 - i)
        np.testing.assert_array_equal(loaded[s]["label"], made[s]["labels"].ravel())
        assert loaded[s]["id"] == [f"clip{k}_{i}" for i in range(5)]
    assert loaded["dims"] == WIDTHS and loaded["aligned"] and loaded["source"]["sizes"] == [5, 5, 5]


def test_mmsas_layout(tmp_path):
    """regression_labels, ids as a list of strings, text_bert left alone."""
    made = every(more={**UNALIGNED, "front": False}, id=[f"v$_${i}" for i in range(5)], text_bert=np.zeros((5, 3, 8)),
                 regression_labels=lambda split: split.pop("labels").ravel().tolist())
    written(tmp_path / "MOSI" / "Processed", made, "unaligned_50.pkl")
    loaded = data.load("mosi", tmp_path, normalize=False)
    split = loaded["train"]
    assert split["id"][1] == "v$_$1" and not loaded["aligned"]
    assert split["real"]["text"].sum(1).tolist() == [3, 4, 5, 6, 7]


SPANS = [   # of 12 frames: a clip's first, the one behind its last, its stated length -> its beginning, its length
    (2, 5, 5, 0, 5), (2, 5, 7, 0, 7), (2, 5, 4, 2, 3), (2, 5, 0, 2, 3), (5, 9, 8, 5, 4), (0, 0, 5, 0, 0),
    (4, 12, 8, 4, 8), (6, 12, 8, 4, 8), (4, 12, 9, 3, 9), (4, 12, 7, 4, 8), (3, 12, 12, 0, 12), (0, 12, 3, 0, 12)]


def test_a_stated_length_that_covers_a_clip_from_the_front_or_the_back_widens_it(tmp_path):
    t = np.arange(12)[:, None].repeat(4, 1)
    x = np.stack([np.where((first <= t) & (t < behind), t - 20, 0) for first, behind, *_ in SPANS])
    made = every(more={"n": len(x), **UNALIGNED}, audio=x, audio_lengths=[span[2:3] for span in SPANS])
    split = load(tmp_path, made)["train"]
    for i, (_, _, _, start, length) in enumerate(SPANS):
        assert split["audio"][i, :, 0].tolist() == [*x[i, start:, 0], *[0] * start], SPANS[i]
        assert split["real"]["audio"][i].tolist() == [t < length for t in range(12)], SPANS[i]


def test_a_limit_takes_the_first_clips_of_each_split(tmp_path):
    pickled = {"data_dir": written(tmp_path, every(more=UNALIGNED, audio_lengths=[5, 6, 7, 8, 9]))}
    folders, _, _ = feature_folders(tmp_path)
    for name, sizes, more in (("mosi", [5, 5, 5], pickled), ("mosei", [12, 6, 6], folders),
                              ("iemocap", [2717, 798, 938], {"synthetic": True})):
        whole, part = (data.load(name, splits=["valid"], normalize=False, limit=limit, **more) for limit in (None, 3))
        assert whole["source"]["sizes"] == part["source"]["sizes"] == sizes
        whole, part = whole["valid"], part["valid"]
        assert part["id"] == whole["id"][:3] and torch.equal(part["label"], whole["label"][:3])
        assert part["text"].shape[0] == 3 < whole["text"].shape[0]
        (a, _, real), (b, _, same_real) = (data.batch(split, torch.arange(3)) for split in (whole, part))
        assert all(torch.equal(a[m], b[m]) and torch.equal(real[m], same_real[m]) for m in a | b)


@pytest.mark.parametrize("lengths", [
    [5] * 10, [5], 5, [5] * 4, [5] * 4 + [13], [5] * 4 + [-1], [5] * 4 + [2.5], [5] * 4 + [np.nan], ["five"] * 5, None,
    [[5], [5], [5], [5], [5, 6]], [1e30] * 5, {"a": 5}, [[5] * 5] * 5, [10 ** 400] * 5])
def test_lengths_that_are_not_a_whole_number_of_frames_a_clip_are_refused(tmp_path, lengths):
    said = "data.pkl, split train(: 'audio_lengths' is not 5 whole numbers between 0 and 12| is refused)"
    with pytest.raises(DataError, match=said):
        load(tmp_path, every(more=UNALIGNED, audio_lengths=lengths))


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


@pytest.mark.parametrize("dataset, form", [
    *(("mosi", form) for form in (list, np.float64, np.ravel, lambda y: y[:, 0], lambda y: y.ravel().tolist())),
    ("mosei", lambda y: np.concatenate((y, np.ones((5, 1, 6))), -1)),           # the sentiment, then six emotions
    *(("iemocap", form) for form in (np.int64, lambda y: y.argmax(-1), lambda y: y.argmax(-1).tolist()))])
def test_labels_in_all_their_forms(tmp_path, dataset, form):
    emotions = dataset == "iemocap"
    made = every(more={"emotions": emotions}, labels=lambda split: form(split["labels"]))
    y = content(emotions=emotions)["valid"]["labels"]
    split = load(tmp_path, made, dataset=dataset, name=data.FILES[dataset][0])["valid"]
    np.testing.assert_array_equal(split["label"], y.argmax(-1) if emotions else y.ravel())
    assert load(tmp_path, without("valid", "labels"), ["valid"], name="mosi_raw.pkl")["valid"]["label"] is None


@pytest.mark.parametrize("ids, first", [
    ([["a", "0", "1"]] * 5, "a/0/1"), (np.array([[b"a", b"", b""]] * 5), "a"), (["x"] * 5, "x"), ([b"x"] * 5, "x"),
    (np.fromiter([["a", "b"]] * 5, dtype=object), "a/b"), (np.array(["x"] * 5, dtype=object), "x"),
    (np.array([["a", 1.5, 2]] * 5, dtype=object), "a/1.5/2"), ([np.array(["a", "b"])] * 5, "a/b"), (np.arange(5), "0")])
def test_ids_in_all_their_forms(tmp_path, ids, first):
    assert load(tmp_path, every(id=ids))["train"]["id"][0] == first


NOTES = {
    "no vision in test: a set with it is not answered": every(["test"], UNALIGNED, vision=np.zeros((5, 9, 3))),
    "no vision in train, valid, test: a set": every(vision=np.zeros((5, 8, 3))),
    "no ids in valid: nothing tells": without("valid", "id"),
    "all labels lie within [-1, 1]: Acc-7": every(labels=np.linspace(-1, 1, 5)),
    **{f"2 clips stand in both {a} and {b}": {**content(), a: {**fields(seed=7), "id": list("abcde")},
                                              b: {**fields(seed=8), "id": list("fdgeh")}}
       for a, b in (("train", "valid"), ("train", "test"), ("valid", "test"))},
    "the streams are not aligned": every(["test"], vision=np.ones((5, 9, 3)), labels=np.linspace(-3, 3, 5)),
}


@pytest.mark.parametrize("text", NOTES)
def test_what_a_reader_of_a_table_should_know_is_noted(tmp_path, text):
    loaded = load(tmp_path, NOTES[text])
    assert any(note.startswith(text) for note in loaded["source"]["notes"])
    assert loaded["lacking"] == ["vision"] * ("no vision" in text)
    for dataset, made in (("mosi", every(SPLITS[1:], labels=[-1, 0, 0, 0, 1])), ("iemocap", content(emotions=True))):
        assert load(tmp_path, made, dataset=dataset, name=data.FILES[dataset][0])["source"]["notes"] == []


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
def test_protocols_and_number_types(tmp_path, protocol, dtype):
    made = content(dtype=dtype, front=False)
    made["train"]["text"] = np.asfortranarray(made["train"]["text"])
    loaded = load(tmp_path, encoded(made, protocol))
    for k, s in enumerate(SPLITS):
        for m in STREAMS:
            np.testing.assert_array_equal(loaded[s][m], made[s][m].astype(np.float32))
            assert loaded[s][m].dtype == torch.float32
        assert loaded[s]["id"] == [f"clip{k}_{i}" for i in range(5)]


@pytest.mark.parametrize("dataset, names", [
    ("mosi", ("mosi_raw", "mosi_data", "aligned_50", "mosi_data_noalign", "unaligned_50")),
    ("mosei", ("mosei_senti_data", "mosei_raw", "aligned_50", "mosei_senti_data_noalign", "unaligned_50")),
    ("iemocap", ("iemocap_data", "iemocap_data_noalign"))])
def test_word_aligned_files_come_first_and_a_missing_one_is_told(tmp_path, dataset, names):
    with pytest.raises(DataError, match="--synthetic"):
        data.find(dataset, tmp_path)
    for name in reversed(names):
        (tmp_path / f"{name}.pkl").touch()
        assert data.find(dataset, tmp_path).stem == name


def test_a_file_whose_sizes_are_another_data_sets_is_refused(tmp_path, monkeypatch):
    for made, dataset in ((content(), "mosi"), (content(emotions=True), "iemocap")):        # of no data set's size
        assert data.load(None, written(tmp_path, made) / "mosi_data.pkl")["dataset"] == dataset
    monkeypatch.setattr(data, "SIZES", {"mosi": (9, 9, 9), "mosei": (50, 46, 50), "iemocap": (7, 7, 7)})
    with pytest.raises(DataError, match="50/50/50 clips, .* splits of mosei, not of mosi. .* --dataset mosei"):
        load(tmp_path, content(n=50))
    assert data.load(None, tmp_path / "mosi_data.pkl")["dataset"] == "mosei"
    two = {s: fields(n=50) for s in ("train", "valid")}
    with pytest.raises(DataError, match="the splits of mosei, not of mosi"):
        load(tmp_path, two, ("train", "valid"))
    assert load(tmp_path, content(n=50), across=True)["dataset"] == "mosei"
    with pytest.raises(DataError, match="splits of iemocap, not of mosi or mosei. Name another file with --data"):
        load(tmp_path, content(n=7), across=True)
    with pytest.raises(DataError, match="the splits of mosei, not of iemocap. Name another file with --data-dir"):
        load(tmp_path, content(n=50), dataset="iemocap", name="iemocap_data.pkl", across=True)


@pytest.mark.parametrize("sizes, name", [
    ((1284, 229, 686), "mosi"), ((1412, 207, 754), "mosi"), ((1413, 229, 686), None), ((1284, 229, 617), None),
    ((16326, 1871, 4659), "mosei"), ((2717, None, 938), "iemocap"), ((1284, None, None), None)])
def test_a_files_sizes_tell_its_data_set_where_two_splits_lie_within_a_tenth(sizes, name):
    assert data.data_set_of(list(sizes)) == name


@pytest.mark.parametrize("change, compared, text", [
    ({}, True, ""), ({"sizes": [1283, 214, 686]}, True, "train has 1283 clips, the paper's 1284; valid has 214 clips"),
    ({"sizes": [1284, 229, 685]}, False, "test has 685 clips, the paper's 686"),
    ({"sizes": [1284, 229, None]}, False, "test has no clips"), ({"synthetic": True}, False, "SYNTHETIC"),
    ({"sizes": [None, 229, 686]}, True, "train has no clips, the paper's 1284"),
    ({"text": 768}, False, "text is 768 wide, the paper's 300"), ({"limit": 9}, False, "of only the first 9 clips"),
    ({"audio": 5}, True, "audio is 5 wide"), ({"vision": 47}, True, "vision is 47 wide"),
    ({"sizes": [1290, 229, 686]}, True, "train has 1290 clips"), ({"text": 299}, False, "text is 299 wide"),
    ({"dataset": "iemocap", "sizes": [2717, 798, 938]}, True, "")])
def test_what_may_stand_beside_print(change, compared, text):
    dims = {m: change.get(m, width) for m, width in PAPERS.items()}
    source = {"sizes": [1284, 229, 686], "synthetic": False, **change}
    answer, line = data.comparison({"dataset": "mosi", "limit": None, **change, "dims": dims}, source, PAPERS)
    assert answer is compared and text in line and bool(text) == bool(line)


# ------------------------------------------------------------------------------------- bad files

WHOLE = pickle.dumps(content())
BAD = {     # what is said: content of the file
    "is refused: Ran out of input": b"",
    "data.pkl is refused: ": WHOLE[:-200],
    "begins with b'<!DOCTYPE html>.*, as a web page": b"\n<!DOCTYPE html>\n<html>",
    "begins with b'version https://git": b"version https://git-lfs.github.com/spec/v1\noid sha256:0",
    "begins with .* an archive would, and is no pickle": gzip.compress(WHOLE),
    "begins with b'PK": b"PK\x03\x04",
    "holds no splits; expected a dict of train, valid, test": [1, 2],
    "holds train, dev; expected": {"train": {}, "dev": {}},
    "only acoustic, visual": {**content(), "train": {b"acoustic": 0, "visual": 0}},
    "no 'audio', only text, vision, labels, id, acoustic": every(acoustic=lambda split: split.pop("audio")),
    "no 'text', only .* text_bert": every(text_bert=lambda split: split.pop("text")),
    r"'text' is an array of float64 of shape \(5, 6\); expected numbers": every(text=np.ones((5, 6))),
    "'audio' is a list; expected numbers": every(audio=[np.zeros((9, 4))] * 40),
    "'text' is an array of <U2": every(text=np.full((5, 2, 2), "so")),
    "do not match: .*'audio': 4, .* 'labels': 5": every(audio=np.ones((4, 8, 4))),
    "'simulated_text': 1": every(simulated_text=np.ones((1, 8, 6))),
    r"from 3.01 to 3.01, not one sentiment a clip, in \[-3, 3\]": every(labels=np.full(5, 3.01)),
    "from nan to nan": every(labels=np.full(5, np.nan)),
    r"of shape \(5, 2\), .* not one sentiment": every(labels=np.zeros((5, 2))),
    "not four yes/no": every(labels=np.full((5, 4), 2)),
    "not four yes/no emotions": every(labels=np.eye(5, 4) / 2),
    r"\(5, 4, 3\), .* not four yes/no": every(labels=np.ones((5, 4, 3))),
    "split train is refused: int too large": every(labels=[10 ** 400] * 5),
    "'vision' holds.* NaN.* clip clip0_2": number("vision", np.nan),
    "'audio' holds values .* clip clip0_2": number("audio", np.inf),
    "'text' holds values": number("text", -np.inf),
    "'vision' holds values": number("vision", -np.inf),
    "'audio' .*too large.*clip clip0_2": number("audio", -1e300),
    "split valid has neither 'labels' nor": without("valid", "labels"),
    "split train has neither 'labels' nor": without("train", "labels"),
    "simulated_text as many as text": every(simulated_text=lambda split: split["text"][..., :4]),
    "all splits must have the same ones": every(["train"], text=np.ones((5, 8, 5))),
}


@pytest.mark.parametrize("text", BAD)
def test_a_bad_file_is_told_in_a_sentence(tmp_path, text):
    with warnings.catch_warnings(), pytest.raises(DataError, match=text) as error:
        warnings.simplefilter("error")
        load(tmp_path, BAD[text], **{"dataset": "iemocap", "name": "iemocap_data.pkl"} if "yes/no" in text else {})
    assert str(error.value).isprintable() and len(str(error.value)) <= 600


@posix
@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
def test_what_is_no_regular_file_is_not_opened(tmp_path, make):
    make(tmp_path / "x")
    with pytest.raises(DataError, match="no regular file"):
        data.read_corpus(tmp_path / "x")


# ------------------------------------------------------------------------------------- hostile pickles

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
functools.partial operator.attrgetter types.FunctionType torch.load codecs.decode _codecs.lookup numpy.load numpy.memmap
numpy.core.multiarray.fromfile numpy._core.multiarray.frombuffer numpy.ctypeslib.load_library""".split()
SYSTEM = b"cos\nsystem\n(Vtouch GOTCHA\ntR"
FORMS = (
    b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x0ctouch GOTCHA\x85R.", b"(Vtouch GOTCHA\nios\nsystem\n.",
    b"(cos\nsystem\nVtouch GOTCHA\no.", b"\x80\x02cos\nsystem\nVtouch GOTCHA\n\x85\x81.",
    b"cnumpy\nndarray\n0(cnumpy.core.multiarray\n_reconstruct\n(" + SYSTEM + b"tR.",
    b"cnumpy.core.multiarray\n_reconstruct\n(tR" + SYSTEM + b"b.", b"ccollections\nOrderedDict\n((l" + SYSTEM + b"atR.",
    b"cnumpy\ndtype\n(" + SYSTEM + b"tR.", b"}" + SYSTEM + b"I1\ns.",
    b"\x80\x02\x82\xf1(Vtouch GOTCHA\ntR.")      # the last by an extension code, which the test registers
LARGE = (       # 2 GB of text, 8 EB of bytes, a bytearray and a frame of 64 GB, a number of 2 GB, one of many digits
    b"\x80\x02X\xff\xff\xff\x7fabc.", b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7fabc.",
    b"\x80\x05\x96\x00\x00\x00\x00\x10\x00\x00\x00abc.", b"\x80\x04\x95\x00\x00\x00\x00\x10\x00\x00\x00abc.",
    b"\x80\x02\x8b\xff\xff\xff\x7fabc.", b"(I" + b"9" * 10 ** 6 + b"\nl.")
ATTRIBUTES = (  # set on what is handed out; and a memo that is not there, an extension code that nobody has
    b"cnumpy\ndtype\n(N}Vdtype\nVGOTCHA\nstb.", b"cnumpy\nndarray\n(N}Vvalue\nVGOTCHA\nstb.",
    b"ccollections\nOrderedDict\n(N}Vupdate\nVGOTCHA\nstb.", b"\x80\x02h\x07.", b"\x80\x02\x82\x7b.")
BOMB = [0]      # small in a file and endless when it is written out
for _ in range(40):
    BOMB = [BOMB] * 10
HOSTILE = {     # opcodes: what the refusal must say
    **{call(name): f"asks for {name}," for name in NAMES},
    **dict.fromkeys(FORMS, "asks for os.system"),
    **dict.fromkeys((*LARGE, *ATTRIBUTES), "is refused"),
    b"\x80\x04\x8c\x15numpy.core.multiarray\x8c\x1c_reconstruct.__globals__.get\x93.": "asks for .*__globals__.get",
    b"Pos.system\n.": "begins with b'Pos.system",
    b"\x80\x02X\x09\x00\x00\x00os.systemQ.": "persistent",
    b"\x80\x05\x97.": "out-of-band",
    b"c_codecs\nencode\n(N}V__defaults__\n(Va\ntstb.": "holds no splits",
    b"\x80\x02]r\xff\xff\xff\x7f.": "MemoryError",                               # a memo of a huge number
    b"\x80\x02}\x8b\xa0\x86\x01\x00" + b"\x7f" * 10 ** 5 + b"I1\ns.": "is refused",
    pickle.dumps({s: {**fields(), "id": BOMB} for s in SPLITS}): "is refused: no text",
    pickle.dumps({s: {**fields(), "text": BOMB} for s in SPLITS}): "'text' is a list",
    inside(b"]q\x00h\x00a"): "'text' is a list",                            # a list that holds itself
    b"\x80\x02" + b"]" * 10 ** 5 + b"a" * (10 ** 5 - 1) + b".": "holds no splits",
    shaped((10 ** 13,)): "cannot reshape array of size 1",
    shaped((4294967296, 4294967296)): "cannot reshape array of size 1",     # a size that overflows to 0
    shaped((-1, -1)): "is refused",
    shaped((1,), "S1099511627776"): "is refused",
    shaped((1,), "O"): "cannot reshape array of size 4",                    # raw bytes as pointers
    pickle.dumps(np.zeros(3, [("a", "f4"), ("b", "O")])): "an array of type",
    inside(b"cnumpy.core.multiarray\n_reconstruct\n(tR"): "is refused",
    b"\x80\x02}X\x09\x00\x00\x00\x1b]0;hi\x07\n\nK\x01s.": "expected a dict",     # a terminal's commands
}
for what in (Call(os.system, ("touch GOTCHA",)), np.array([1, Call(os.system, ("touch GOTCHA",))], dtype=object),
             Call(__import__, ("os",)), Call(np.ndarray, ((2,),)), torch.nn.Linear(1, 1), collections.Counter("a")):
    HOSTILE.update({pickle.dumps({"train": what}, protocol=p): "is refused" for p in range(6)})


@pytest.fixture
def little_memory():
    """At most 2 GB more than now, so that a file which asks for all there is ends at once."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_AS)
    now = int(re.search(r"VmSize:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024
    resource.setrlimit(resource.RLIMIT_AS, (now + (2 << 30), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.parametrize("raw", HOSTILE, ids=range(len(HOSTILE)))
def test_a_hostile_pickle_executes_nothing_and_is_refused(tmp_path, monkeypatch, little_memory, raw):
    """Nothing is called, no file appears, no class is changed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(copyreg._inverted_registry, 0xf1, ("os", "system"))
    Path("x.pkl").write_bytes(raw)
    before = dict(vars(data.DType)), dict(vars(data.Array)), dict(vars(data))
    with pytest.raises(DataError, match=HOSTILE[raw]) as error:
        data.load("mosi", "x.pkl")
    assert str(error.value).isprintable() and len(str(error.value)) <= 600
    assert os.listdir() == ["x.pkl"] and before == (dict(vars(data.DType)), dict(vars(data.Array)), dict(vars(data)))


def test_what_follows_a_pickles_end_is_not_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    same(load(tmp_path, WHOLE + call("os.system"))["train"], load(tmp_path, WHOLE)["train"])
    assert os.listdir() == ["mosi_data.pkl"]


def damage(raw: bytes, draw: random.Random) -> bytes:
    """One to three of: a bit flipped, a byte replaced, a piece cut out, doubled, or zeroed, the end cut off."""
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        i, n = draw.randrange(len(raw) + 1), draw.choice((1, 1, 2, 4, 8, 16, 100, 1000))
        piece, byte = raw[i:i + n], raw[i:i + 1]
        raw = raw[:i] + draw.choice((
            bytes(b ^ 1 << draw.randrange(8) for b in byte) + raw[i + 1:], draw.randbytes(1) + raw[i + 1:],
            raw[i + n:], piece * 2 + raw[i + n:], bytes(len(piece)) + raw[i + n:], b""))
    return raw


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_a_damaged_pickle_loads_the_same_clips_or_is_told_in_a_sentence(tmp_path, protocol, little_memory):
    """Values may differ, and ids be lost, which only the SHA-256 can tell."""
    made = content(n=4, lengths=(3, 3, 3))
    made["train"]["labels"][0] = 1      # so that it has two classes
    whole = pickle.dumps(made, protocol=protocol)
    draw, refusals, good = random.Random(protocol), 0, load(tmp_path, whole)
    for _ in range(300):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")      # a damaged file is no reason for one either
                loaded = load(tmp_path, damage(whole, draw), normalize=True)
        except DataError as error:
            assert str(error).isprintable() and len(str(error)) <= 600
            refusals += 1
            continue
        for s in SPLITS:
            assert len(loaded[s]["label"]) == 4 and (loaded[s]["label"].abs() <= 3).all()
            assert all(loaded[s][m].shape == good[s][m].shape and loaded[s][m].isfinite().all() for m in STREAMS)
            assert len(loaded[s]["id"]) == 4 or "no ids in " in " ".join(loaded["source"]["notes"])
            assert len(loaded[s]["id"]) in (0, 4)
    assert 60 < refusals < 290, refusals


@pytest.mark.filterwarnings("ignore")       # numpy's, of headers as Python 2 wrote them
def test_a_damaged_npy_is_told_with_its_path(tmp_path):
    where, *_ = feature_folders(tmp_path, sizes=(3, 1, 1))
    path = sorted(Path(where["features"]["audio"]).iterdir())[0]
    whole, draw, refusals = path.read_bytes(), random.Random(0), 0
    for _ in range(200):
        path.write_bytes(damage(whole, draw))
        try:
            data.batch(data.load("mosei", splits=SPLITS, normalize=False, **where)["train"], torch.arange(3))
        except DataError as error:
            assert path.stem in str(error) and str(error).isprintable()
            refusals += 1
    assert refusals > 50, refusals


def test_standardising_is_what_the_docstring_says(tmp_path):
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
    same(data.load("mosi", tmp_path, ("test",), stats=loaded["stats"])["test"], loaded["test"])
    with pytest.raises(DataError, match="The data has 6 features of text, the run was trained on 5"):
        data.load("mosi", tmp_path, stats=dict.fromkeys(STREAMS, (torch.zeros(5), torch.ones(5))))


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


# ------------------------------------------------------------------------------------- masks and batches

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
            assert torch.equal(present[m], real[m] & (one == "1")) and data.realised(present, real)[m] == 1 - int(one)


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
    assert set(data.realised(*[dict.fromkeys(STREAMS, real["vision"][:10])] * 2).values()) == {None}


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


# ------------------------------------------------------------------------------------- the stand-in

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
    made = every(more=UNALIGNED, id=content()["train"]["id"])
    made["train"]["vision"][1] = 0
    path = written(tmp_path, made) / "mosi_data.pkl"
    assert data.main(["check", str(path)]) == 0
    out = capsys.readouterr().out
    for part in ("labels as of mosi", "SHA-256 " + data.sha256(path), "train: 5 clips, labels from",
                 "(5, 12, 4), 5.0 real frames a clip", "1 videos stand in both train and test",
                 "test has 5 clips, the paper's 686"):
        assert part in out, (part, out)
    del made["test"]["labels"]
    written(tmp_path, {"test": made["test"]})
    assert "train.py" not in out and data.main(["check", str(path)]) == 0
    out = capsys.readouterr().out
    assert "test: 5 clips, no labels" in out and "no train and no valid: train.py refuses this file, eval.py" in out
    for bad, said in ((tmp_path / "nothing.pkl", "does not exist"), (tmp_path, "is no regular file")):
        assert data.main(["check", str(bad)]) == 2 and said in capsys.readouterr().err


@pytest.mark.parametrize("dataset, sign", [("mosi", 1), ("mosi", -1), ("iemocap", 1)])
def test_labels_of_one_class_are_refused_in_training_and_noted_elsewhere(tmp_path, dataset, sign):
    """Labels of 0 and 1 have no negative, those of 0 and -1 no positive; an emotion may be lacking."""
    def positive(split):
        y = split["labels"].copy()
        if dataset == "mosi":
            return sign * (y > 0).astype(np.float32)
        y[:, 2] = (0, 1)
        return y
    name, more = data.FILES[dataset][0], {"n": 12, "emotions": dataset == "iemocap"}
    with pytest.raises(DataError, match="one class alone. Sentiments are meant, in .-3, 3."):
        load(tmp_path, every(["train"], more, labels=positive), dataset=dataset, name=name)
    loaded = load(tmp_path, every(["valid", "test"], more, labels=positive), dataset=dataset, name=name)
    text = "labels of one class alone in valid, test: its F1"
    assert any(note.startswith(text) for note in loaded["source"]["notes"])


def test_a_video_with_clips_in_two_splits_is_noted_but_not_of_the_standard_ones(tmp_path, monkeypatch):
    for ids in ("v_x_{}", "v_x$_${}", "v_x/{}"):
        made = {s: {**fields(seed=k), "id": [ids.format(5 * k + i) for i in range(5)]} for k, s in enumerate(SPLITS)}
        notes = load(tmp_path, made)["source"]["notes"]
        assert sum("1 videos stand in both" in note and note.endswith("v_x") for note in notes) == 3
    for other in ("v{}", "Ses01_F{}", "_{}"):
        made = {s: {**fields(seed=k), "id": [other.format(5 * k + i) for i in range(5)]} for k, s in enumerate(SPLITS)}
        assert load(tmp_path, made)["source"]["notes"] == []
    monkeypatch.setattr(data, "SIZES", {"mosi": (5, 5, 5)})
    made = {s: {**fields(seed=k), "id": [f"v_x/{5 * k + i}" for i in range(5)]} for k, s in enumerate(SPLITS)}
    assert load(tmp_path, made)["source"]["notes"] == []


def test_statistics_that_are_asked_for_and_not_there_are_told(tmp_path):
    with pytest.raises(DataError, match="by the training split, .* normalize=False for a run made with --no-normalize"):
        load(tmp_path, content(), ("test",), normalize=True)
    assert load(tmp_path, content(), ("test",))["stats"] is None


def mfn(folder, sizes=(6, 4, 5)):
    """MFN's files of MOSI, smaller: stream -> value of its columns, in a clip's last frames."""
    h5py = pytest.importorskip("h5py")
    folder.mkdir(exist_ok=True)
    rng, truth = np.random.default_rng(0), {}
    for s, n in zip(SPLITS, sizes):
        x, y = rng.standard_normal((n, 20, 325)), rng.uniform(-3, 3, n)
        x[:, :15], y[:2] = 0, (-1, 1)
        truth[s] = x, y
        for name, array in (("X", x), ("y", y)):
            with h5py.File(folder / f"{name}_{s}.h5", "w") as file:
                file["data"] = array
    return truth


def test_mfns_files_become_a_pickle_in_mults_layout(tmp_path, monkeypatch, capsys):
    truth = mfn(tmp_path / "MFN")
    monkeypatch.setattr(data, "SIZES", {**data.SIZES, "mosi": (6, 4, 5)})
    command = ["convert", str(tmp_path / "MFN"), "--out", str(tmp_path / "data")]
    assert data.main(command) == 0 and "mosi_data.pkl" in capsys.readouterr().out
    raw = pickle.loads((tmp_path / "data/mosi_data.pkl").read_bytes())
    for s, (x, y) in truth.items():
        assert set(raw[s]) == {"text", "audio", "vision", "labels"} and raw[s]["labels"].shape == (len(y), 1, 1)
        for m, columns in (("text", x[..., :300]), ("audio", x[..., 300:305]), ("vision", x[..., 305:])):
            assert raw[s][m].dtype == np.float32
            np.testing.assert_array_equal(raw[s][m], columns.astype(np.float32))
        np.testing.assert_array_equal(raw[s]["labels"].ravel(), y.astype(np.float32))
    loaded = data.load("mosi", tmp_path / "data")
    assert loaded["dims"] == {"text": 300, "audio": 5, "vision": 20}
    assert loaded["train"]["real"]["text"].sum(1).tolist() == [5] * 6
    assert data.main(command) == 2 and "exists already" in capsys.readouterr().err


@pytest.mark.parametrize("name, change, said", [
    ("X_valid", lambda file: file.move("data", "features"), "X_valid.h5 is refused"),
    ("y_test", lambda file: file.create_dataset("more", data=1), ""),
    ("X_train", lambda file: (file.pop("data"), file.create_dataset("data", data=np.ones((6, 20, 300)))),
     "X_train.h5 is refused: cannot reshape"),
    ("y_train", lambda file: (file.pop("data"), file.create_dataset("data", data=np.ones(7))),
     "MFN's file of MOSI holds 6 clips"),
    ("y_train", "remove", "y_train.h5 does not exist"), ("y_train", "damage", "y_train.h5 ")])
def test_what_is_wrong_with_mfns_files_is_told(tmp_path, monkeypatch, capsys, name, change, said):
    mfn(tmp_path)
    import h5py
    monkeypatch.setattr(data, "SIZES", {**data.SIZES, "mosi": (6, 4, 5)})
    path = tmp_path / f"{name}.h5"
    if callable(change):
        with h5py.File(path, "a") as file:
            change(file)
    elif change == "remove":
        path.unlink()
    else:
        path.write_bytes(b"<html>")
    code = data.main(["convert", str(tmp_path), "--out", str(tmp_path / "data")])
    assert (code, (tmp_path / "data").exists()) == ((2, False) if said else (0, True))
    assert said in capsys.readouterr().err


def test_convert_without_h5py_says_how_to_get_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "h5py", None)
    assert data.main(["convert", str(tmp_path), "--out", str(tmp_path)]) == 2
    assert "pip install h5py" in capsys.readouterr().err


def test_mfns_real_labels_are_those_of_the_standard_splits():
    h5py, folder = pytest.importorskip("h5py"), ROOT.parent / "shared/data/mfn_mosi_labels"
    if not folder.is_dir():
        pytest.skip("../shared/data/mfn_mosi_labels is not there: MFN's label files are not read")
    for s, n in zip(SPLITS, data.SIZES["mosi"]):
        with h5py.File(folder / f"y_{s}.h5") as file:
            y = file["data"][()]
        assert y.shape == (n,) and y.dtype == np.float64 and abs(y).max() <= 3


def test_a_files_own_text_gives_a_terminal_no_commands():
    assert data.printable("a\x1b]0;\ud800\u202e\n") == "a ]0;   " and len(data.printable("x" * 1000)) < 120
    assert str(DataError("a\nb" * 1000)).isprintable() and len(str(DataError("a\nb" * 1000))) <= 600


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    """A link is replaced, not followed."""
    (tmp_path / "victim").write_bytes(b"mine")
    (tmp_path / "a").symlink_to(tmp_path / "victim")
    data.write(tmp_path / "a", b"new")
    assert (tmp_path / "victim").read_bytes() == b"mine" and (tmp_path / "a").read_bytes() == b"new"
    for path, error in ((tmp_path / "no/a", "No such"), (tmp_path, "Is a dir")):
        with pytest.raises(DataError, match=f"cannot be written: {error}"):
            data.write(path, b"x")
    monkeypatch.setattr(os, "replace", lambda *paths: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(DataError, match="a cannot be written: No space left"):
        data.write(tmp_path / "a", b"newer")
    assert (tmp_path / "a").read_bytes() == b"new" and sorted(os.listdir(tmp_path)) == ["a", "victim"]


# ------------------------------------------------------------------------------------- feature folders

def test_feature_folders_are_read_clip_by_clip_in_natural_order_without_over_long_training_clips(tmp_path, monkeypatch):
    """The frames of a clip lie in 0.npy ... 19.npy."""
    where, truth, corpus = feature_folders(tmp_path, longest=20)
    monkeypatch.setattr(data, "MAX_FRAMES", 15)
    loaded = data.load("mosei", splits=SPLITS, normalize=False, **where)
    assert loaded["dims"] == FOLDERS and loaded["stats"] is None and not loaded["aligned"]
    short = [clip for clip in corpus["train_corpus"] if max(len(truth[m][clip]) for m in FOLDERS) <= 15]
    assert 5 < len(short) < 12 and loaded["source"]["sizes"] == [12, 6, 6]
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


def test_training_clips_of_more_than_1500_frames_are_left_out(tmp_path):
    where, _, corpus = feature_folders(tmp_path, sizes=(3, 1, 1))
    facts, (valid,) = corpus["train_corpus"], corpus["val_corpus"]
    first, second, third = facts
    for clip, n in ((first, 1501), (second, 1500), (valid, 1501)):
        np.save(Path(where["features"]["audio"]) / f"{clip}.npy", np.ones((n, 5)))
    loaded = data.load("mosei", normalize=False, **where)
    assert loaded["train"]["id"] == [second, third] and loaded["valid"]["id"] == [valid]
    assert loaded["train"]["label"].tolist() == pytest.approx([facts[second]["val"], facts[third]["val"]])


def test_copied_feature_folders_are_the_same_data_and_other_frame_counts_or_labels_are_not(tmp_path):
    """Whatever the files' times, the order of the streams and the asked splits; a clip of train counts for a load of
    test."""
    where, _, corpus = feature_folders(tmp_path / "a", sizes=(3, 1, 1))
    shutil.copytree(tmp_path / "a", tmp_path / "b", copy_function=shutil.copyfile)
    copied = {"features": {m: where["features"][m].replace("/a/", "/b/") for m in sorted(where["features"])[::-1]},
              "labels": tmp_path / "b" / where["labels"].name}
    os.utime(next(Path(copied["features"]["audio"]).iterdir()), (1, 1))

    def identity(which, splits=SPLITS):
        return data.load("mosei", splits=splits, normalize=False, **which)["source"]["sha256"]
    first = identity(where)
    assert first == identity(copied) == identity(where, ("test",))
    clip = next(iter(corpus["train_corpus"]))
    for m, name, x in (("vision", f"{clip}/99.npy", np.ones(4)), ("audio", f"{clip}.npy", np.ones((30, 5)))):
        before = identity(copied, ("test",))
        np.save(Path(copied["features"][m]) / name, x)
        assert identity(copied, ("test",)) != before
    np.savez(where["labels"], **{k: np.array({c: {"val": 1 - f["val"] % 2} for c, f in v.items()}, dtype=object)
                                 for k, v in corpus.items()})
    assert identity(where, ("test",)) != first


def labelled(where, clip, value=1.0):
    corpus = np.array({clip: {"val": value}}, dtype=object)
    np.savez(where["labels"], **dict.fromkeys(("train_corpus", "val_corpus", "test_corpus"), corpus))


def test_a_clip_of_feature_folders_in_two_splits_is_noted(tmp_path):
    where, _, corpus = feature_folders(tmp_path)
    labelled(where, clip := next(iter(corpus["test_corpus"])))
    notes = data.load("mosei", splits=("valid", "test"), normalize=False, **where)["source"]["notes"]
    assert f"1 clips stand in both train and test, for instance {clip}" in notes


WRONG = {       # what is said, and what is done to the folders; path is one file
    "no folder .* of .npy files": lambda where, path: path.unlink(),
    "simulated_text as many as text": lambda where, path: [
        np.save(text, np.zeros(8)) for text in Path(where["features"]["text"]).iterdir()],
    "is refused.* Expected an .npy file": lambda where, path: np.save(path, np.array({"a": 1}, dtype=object)),
    "audio=nowhere has no": lambda where, path: where["features"].update(audio="nowhere"),
    "lacks vision": lambda where, path: where["features"].pop("vision"),
    "with --labels FILE": lambda where, path: where.update(labels=None),
    "does not exist": lambda where, path: where.update(labels=Path("nowhere.npz")),
    "File is not a zip file": lambda where, path: where["labels"].write_bytes(where["labels"].read_bytes()[:90]),
    r"leaves the range \[-3, 3\]": lambda where, path: labelled(where, "a", 3.01),
    "asks for .*system": lambda where, path: labelled(where, "a", Call(os.system, ("touch GOTCHA",))),
    "is refused: int too large": lambda where, path: labelled(where, "a", 10 ** 400),
}


@pytest.mark.parametrize("text", WRONG)
def test_what_is_wrong_with_feature_folders_is_told_before_training(tmp_path, text, monkeypatch):
    monkeypatch.chdir(tmp_path)
    where, *_ = feature_folders(tmp_path)
    WRONG[text](where, sorted(Path(where["features"]["audio"]).iterdir())[0])
    with pytest.raises(DataError, match=text):
        data.load("mosei", splits=SPLITS, normalize=False, **where)
    assert not Path("GOTCHA").exists()


@pytest.mark.parametrize("frame, text", [
    (np.full(4, np.nan), "not finite. Expected . frames of 4 numbers, finite"), (np.full(4, 1e300), "not finite"),
    (np.ones(5), "Expected . frames of 4"), (np.ones((2, 4)), r"\(10, 4\).* Expected 9 frames of 4 numbers"),
    (np.array(["so"] * 4), "Expected . frames of 4 numbers")])
def test_a_later_frame_that_is_wrong_is_told_with_its_clip(tmp_path, frame, text):
    where, truth, _ = feature_folders(tmp_path)
    split = data.load("mosei", splits=SPLITS, normalize=False, **where)["train"]
    i = max(range(12), key=lambda i: len(truth["vision"][split["id"][i]]))
    np.save(sorted((Path(where["features"]["vision"]) / split["id"][i]).iterdir())[-1], frame)
    with pytest.raises(DataError, match=f"{split['id'][i]}.*{text}"):
        data.batch(split, torch.tensor([i]))
