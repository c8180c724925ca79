"""data.py: formats, safety, standardising, masks, batches, the stand-in, feature folders, what is printed."""
import collections
import copyreg
import gzip
import io
import os
import pickle
import random
import re
import sys
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

import data
from data import SPLITS, STREAMS, DataError
from helpers import FOLDERS, WIDTHS, Call, content, feature_folders, fields, written

posix = pytest.mark.skipif(os.name != "posix", reason="FIFOs, links and devices are POSIX's")
UNALIGNED = {"lengths": (8, 12, 10)}


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


def same(a, b):
    for m in STREAMS:
        assert torch.equal(a[m], b[m]) and torch.equal(a["real"][m], b["real"][m])
    assert torch.equal(a["label"], b["label"]) and a["id"] == b["id"]


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
    """regression_labels, ids as a list of strings, text_bert left alone, stated lengths of unaligned streams."""
    made = every(more={**UNALIGNED, "front": False}, id=[f"v$_${i}" for i in range(5)], text_bert=np.zeros((5, 3, 8)),
                 regression_labels=lambda split: split.pop("labels").ravel().tolist(),
                 audio_lengths=[5, 6, 7, 8, 9], vision_lengths=np.full((5, 1), 2))
    made["train"]["audio"][1] = np.roll(made["train"]["audio"][1], 8, 0)        # padded in front
    written(tmp_path / "MOSI" / "Processed", made, "unaligned_50.pkl")
    loaded = data.load("mosi", tmp_path, normalize=False)
    split = loaded["train"]
    assert split["id"][1] == "v$_$1" and loaded["source"]["layout"] == "MMSA" and not loaded["aligned"]
    assert split["real"]["text"].sum(1).tolist() == [3, 4, 5, 6, 7]
    assert split["real"]["audio"].sum(1).tolist() == [5, 6, 7, 8, 9]        # the stated length covers the frames
    assert split["real"]["vision"].sum(1).tolist() == [3, 4, 5, 6, 7]       # it does not: the frames count
    made["train"]["audio"][1] = np.roll(made["train"]["audio"][1], -6, 0)       # 2 of its 6 frames are zeros
    np.testing.assert_array_equal(split["audio"], made["train"]["audio"])


@pytest.mark.parametrize("lengths", [
    [5] * 10, [5], 5, [5] * 4, [5] * 4 + [13], [5] * 4 + [-1], [5] * 4 + [2.5], [5] * 4 + [np.nan], ["five"] * 5, None,
    [[5], [5], [5], [5], [5, 6]], [1e30] * 5, {"a": 5}, [[5] * 5], [10 ** 400] * 5])
def test_lengths_that_are_not_a_whole_number_of_frames_a_clip_are_refused(tmp_path, lengths):
    with pytest.raises(DataError, match="data.pkl, split train: 'audio_lengths'.* 5 whole numbers between 0 and 12"):
        load(tmp_path, every(more=UNALIGNED, audio_lengths=lengths))


def test_aligned_streams_share_their_span(tmp_path):
    """A face not found at a clip's edge is no padding while a word is there."""
    made = content()
    made["train"]["vision"][4, 1:4] = 0
    made["train"]["audio"][2] = 0
    split = load(tmp_path, made)["train"]
    assert split["real"]["vision"][4].sum() == 7 and split["vision"][4].any(-1).tolist() == [0, 0, 0, 1, 1, 1, 1, 0]
    assert split["real"]["audio"][2].sum() == 5 and not split["audio"][2].any()


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


@pytest.mark.parametrize("ids, first", [
    ([["a", "0", "1"]] * 5, "a/0/1"), (np.array([[b"a", b"", b""]] * 5), "a"), (["x"] * 5, "x"), ([b"x"] * 5, "x"),
    (np.fromiter([["a", "b"]] * 5, dtype=object), "a/b"), (np.array(["x"] * 5, dtype=object), "x"),
    (np.array([["a", 1.5, 2]] * 5, dtype=object), "a/1.5/2"), ([np.array(["a", "b"])] * 5, "a/b"), (np.arange(5), "0")])
def test_ids_in_all_their_forms(tmp_path, ids, first):
    assert load(tmp_path, every(id=ids))["train"]["id"][0] == first


NOTES = {
    "test has no vision: a set with it is not answered": every(["test"], UNALIGNED, vision=np.zeros((5, 9, 3))),
    "5 clips stand in both train and test": every(id=list("abcde")),
    "4 clips of train have the id of another one in it": every(["train"], id=list("aaaaa")),
    "valid has no ids": without("valid", "id"),
    "all labels lie within [-1, 1]: Acc-7": every(labels=np.linspace(-1, 1, 5)),
    "the streams are not aligned": content(**UNALIGNED),
}


@pytest.mark.parametrize("text", NOTES)
def test_what_a_reader_of_a_table_should_know_is_noted(tmp_path, text):
    assert any(note.startswith(text) for note in load(tmp_path, NOTES[text])["source"]["notes"])
    assert load(tmp_path, every(labels=np.linspace(-1.2, 1, 5)))["source"]["notes"] == []


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
        assert loaded[s]["id"] == [f"clip{k}_{i}" for i in range(5)]


def test_word_aligned_files_come_first_and_a_missing_one_is_told(tmp_path):
    with pytest.raises(DataError, match="--synthetic"):
        data.find("mosei", tmp_path)
    for name in reversed(("mosei_senti_data.pkl", "mosei_raw.pkl", "aligned_50.pkl", "mosei_senti_data_noalign.pkl")):
        (tmp_path / name).touch()
        assert data.find("mosei", tmp_path).name == name


def test_a_file_whose_sizes_are_another_data_sets_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "SIZES", {"mosi": (50, 46, 50), "mosei": (9, 9, 9), "iemocap": (7, 7, 7)})
    with pytest.raises(DataError, match="50/50/50 clips, .* splits of mosi, not of mosei. Use --dataset mosi"):
        load(tmp_path, content(n=50), dataset="mosei", name="mosei_raw.pkl")
    two = {s: fields(n=50) for s in ("train", "valid")}
    with pytest.raises(DataError, match="the splits of mosi, not of mosei"):
        load(tmp_path, two, ("train", "valid"), dataset="mosei", name="mosei_raw.pkl")


@pytest.mark.parametrize("change, compared, text", [
    ({}, True, ""), ({"sizes": [1283, 214, 686]}, True, "train has 1283 clips, the paper's 1284; valid has 214 clips"),
    ({"sizes": [1284, 229, 685]}, False, "test has 685 clips, mosi's standard split 686"),
    ({"sizes": [1284, 229, None]}, False, "test has no clips"), ({"synthetic": True}, False, "SYNTHETIC"),
    ({"sizes": [None, 229, 686]}, True, "train has no clips, the paper's 1284"),
    ({"text": 768}, False, "text is 768 wide, not 300"), ({"limit": 9}, False, "of only the first 9 clips"),
    ({"audio": 5}, True, "audio is 5 wide")])
def test_what_may_stand_beside_print(change, compared, text):
    dims = {m: change.get(m, width) for m, width in data.GLOVE.items()}
    source = {"sizes": [1284, 229, 686], "synthetic": False, **change}
    answer, line = data.comparison({"dataset": "mosi", "dims": dims, "limit": change.get("limit")}, source, data.GLOVE)
    assert answer is compared and text in line and bool(text) == bool(line)


# ------------------------------------------------------------------------------------- bad files

WHOLE = pickle.dumps(content())
BAD = {     # what is said: content of the file
    "is refused: it is empty": b"",
    "begins with <!DOCTYPE html>, so the download went wrong": b"\n<!DOCTYPE html>\n<html>",
    "compressed by gzip; unpack it": gzip.compress(WHOLE),
    "compressed by bzip2; unpack it": b"BZh9",
    "compressed by xz; unpack it": b"\xfd7zXZ\x00",
    "by zlib, as joblib does": zlib.compress(WHOLE),
    "a zip archive, as torch.save and numpy.savez write": b"PK\x03\x04",
    "written by torch.save": b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.",
    "an HDF5 file": b"\x89HDF\r\n\x1a\n",
    "a single array in numpy's own format": b"\x93NUMPY\x01\x00v\x00",
    "holds a list of 2 values; expected a dict of train, valid, test": [1, 2],
    "holds a dict of train, dev; expected": {"train": {}, "dev": {}},
    "only acoustic, visual": {**content(), "train": {b"acoustic": 0, "visual": 0}},
    "no 'audio', only text, vision, labels, id, acoustic": every(acoustic=lambda split: split.pop("audio")),
    "'text_bert' holds token ids": every(text_bert=lambda split: split.pop("text")),
    r"'text' has shape \(5, 6\)": every(text=np.ones((5, 6))),
    "'audio' is a list of 40 arrays": every(audio=[np.zeros((9, 4))] * 40),
    "'text' is an array of <U2": every(text=np.full((5, 2, 2), "so")),
    "4 clips of audio, .* 5 labels": every(audio=np.ones((4, 8, 4))),
    "1 clips of simulated_text": every(simulated_text=np.ones((1, 8, 6))),
    r"leaves the range \[-3, 3\]": every(labels=np.full(5, 7)),
    "or is NaN": every(labels=np.full(5, np.nan)),
    r"of shape \(5, 2\) is not one sentiment": every(labels=np.zeros((5, 2))),
    "'labels' is refused .OverflowError": every(labels=[10 ** 400] * 5),
    "split train: 'id' is refused .ValueError": every(id=[10 ** 5000] * 5),
    "'vision' holds.* NaN.* clip clip0_2": number("vision", np.nan),
    "'audio' holds values .* clip clip0_2": number("audio", np.inf),
    "'text' holds values": number("text", -np.inf),
    "'audio' .*too large.*clip clip0_2": number("audio", -1e300),
    "split valid has neither 'labels' nor": without("valid", "labels"),
    "simulated_text has 4 features, text 6": every(simulated_text=lambda split: split["text"][..., :4]),
    "differ in feature width": every(["train"], text=np.ones((5, 8, 5))),
}


@pytest.mark.parametrize("text", BAD)
def test_a_bad_file_is_told_in_a_sentence(tmp_path, text):
    with warnings.catch_warnings(), pytest.raises(DataError, match=text) as error:
        warnings.simplefilter("error")
        load(tmp_path, BAD[text])
    assert str(error.value).isprintable() and len(str(error.value)) <= 600


@posix
@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
@pytest.mark.parametrize("read", [lambda path: data.load("mosi", path), data.read_corpus])
def test_what_is_no_regular_file_is_not_opened(tmp_path, make, read):
    make(tmp_path / "x")
    with pytest.raises(DataError, match="no regular file"):
        read(tmp_path / "x")


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
    b"cnumpy.core.multiarray\n_reconstruct\n(tR" + SYSTEM + b"b.", b"cbuiltins\nset\n((l" + SYSTEM + b"atR.",
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
    WHOLE + call("os.system"): "bytes follow where it should",
    b"Pos.system\n.": "begins with Pos.system",
    b"\x80\x02X\x09\x00\x00\x00os.systemQ.": "persistent",
    b"\x80\x05\x97.": "out-of-band",
    b"c_codecs\nencode\n(N}V__defaults__\n(Va\ntstb.": "holds a function",
    b"\x80\x02]r\xff\xff\xff\x7f.": "more memory than there is",                 # a memo of a huge number
    b"\x80\x02}\x8b\xa0\x86\x01\x00" + b"\x7f" * 10 ** 5 + b"I1\ns.": "refused .ValueError",
    pickle.dumps({s: {**fields(), "id": BOMB} for s in SPLITS}): "'id' is refused",
    pickle.dumps({s: {**fields(), "text": BOMB} for s in SPLITS}): "'text' is a list of 10",
    inside(b"]q\x00h\x00a"): "neither 'labels'",                            # a list that holds itself
    b"\x80\x02" + b"]" * 10 ** 5 + b"a" * (10 ** 5 - 1) + b".": "holds a list",
    shaped((10 ** 13,)): "comes with data for 1 values",
    shaped((4294967296, 4294967296)): "comes with data for 1 values",       # a size that overflows to 0
    shaped((-1, -1)): "comes with data for 1 values",
    shaped((1,), "S1099511627776"): "is refused",
    shaped((1,), "O"): "comes with data for 4 values",                      # raw bytes as pointers
    pickle.dumps(np.zeros(3, [("a", "f4"), ("b", "O")])): "an array of type",
    inside(b"cnumpy.core.multiarray\n_reconstruct\n(tR"): "without data",
    b"\x80\x02}X\x09\x00\x00\x00\x1b]0;hi\x07\n\nK\x01s.": "a dict of",     # a terminal's commands
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
    """Values may differ, which only the SHA-256 can tell; a file without ids says so."""
    whole = pickle.dumps(content(n=4, lengths=(3, 3, 3)), protocol=protocol)
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
            assert len(loaded[s]["id"]) == 4 or f"{s} has no ids" in " ".join(loaded["source"]["notes"])
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
    made["valid"]["text"][:, -1, 0] = 1e4
    raw, loaded = load(tmp_path, made), load(tmp_path, made, normalize=True)
    for m in STREAMS:
        frames = [frame for clip in raw["train"][m].double().numpy() for frame in clip if frame.any()]
        mean, std = np.mean(frames, 0), np.std(frames, 0)
        std[std < 1e-6] = 1
        for s in SPLITS:                        # all splits by the training split's numbers
            x = raw[s][m].numpy()
            expected = np.clip((x - mean) / std, -5, 5) * (x != 0).any(-1, keepdims=True)
            np.testing.assert_allclose(loaded[s][m], expected, atol=1e-4)
    assert loaded["valid"]["text"].max() == 5 and not loaded["train"]["vision"][4, 2].any()
    same(data.load("mosi", tmp_path, ("test",), stats=loaded["stats"])["test"], loaded["test"])
    with pytest.raises(DataError, match="The data has 6 features of text, the run was trained on 5"):
        data.load("mosi", tmp_path, stats=dict.fromkeys(STREAMS, (torch.zeros(5), torch.ones(5))))


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


def test_batches_hold_every_clip_once_and_clips_of_similar_length():
    real, generator = some_real(500, 50), torch.Generator().manual_seed(0)
    first, second = data.batches(real, 32, generator), data.batches(real, 32, generator)
    assert all(torch.equal(torch.cat(groups).sort()[0], torch.arange(500)) for groups in (first, second))
    n = real["text"].sum(1)
    assert sum(int(n[group].max()) * len(group) for group in first) < .75 * 50 * 500     # at random: .97
    both = {tuple(sorted(g.tolist())) for g in first} & {tuple(sorted(g.tolist())) for g in second}
    assert len(both) < 4                                        # mixed anew, not only reordered


def test_a_batch_is_cut_to_its_longest_clip_and_drops_what_the_training_masks_say(tmp_path):
    split, index = load(tmp_path, every(simulated_text=lambda split: split["text"]))["train"], torch.tensor([2, 0])
    complete, missing, real = data.batch(split, index)
    assert missing is None and real["text"].dtype == torch.bool and complete["text"].shape == (2, 5, 6)
    assert torch.equal(complete["text"][1, :3], split["text"][0, :3])
    assert real["simulated_text"].tolist() == [[True] * 5, [True] * 3 + [False] * 2]
    complete, missing, real = data.batch(split, index, torch.Generator().manual_seed(1))
    present = data.training_masks(real, torch.Generator().manual_seed(1))
    assert list(missing) == list(STREAMS)
    for m in STREAMS:
        assert torch.equal(missing[m], torch.where(present[m][..., None], complete[m], torch.tensor(0.)))


# ------------------------------------------------------------------------------------- the stand-in

def test_the_stand_in_has_mosis_size_and_balance_and_stays_what_it_is():
    made = {s: data.stand_in("mosi", s) for s in SPLITS}
    assert [len(split["labels"]) for split in made.values()] == [1284, 229, 686]
    assert abs((made["test"]["labels"] > 0).mean() - .40) < .05
    y, sizes = made["train"]["labels"].ravel(), [np.abs(made["train"][m], dtype=np.float64).mean() for m in STREAMS]
    assert abs(y.mean() - .23) < .1 and abs(y.std() - 1.51) < .1 and .02 < (y == 0).mean() < .06
    assert y[:4].tolist() == pytest.approx([.2, 2.2, -3, 1.2])
    assert sizes == pytest.approx([2.0615295, 2.2455682, 1.3678357], rel=1e-5)


def test_the_written_stand_in_is_mults_layout_and_the_one_in_memory(tmp_path, capsys):
    """Read back the way MulT's reader does: plain pickle, float arrays, id rows of three byte strings that decode."""
    command = ["synthesize", "mosi", "--out", str(tmp_path / "new")]
    assert data.main(command) == 0 and "SYNTHETIC" in capsys.readouterr().out
    raw = pickle.loads((tmp_path / "new" / "mosi_raw.pkl").read_bytes())
    for s in SPLITS:
        assert {m: raw[s][m].shape[1:] for m in STREAMS} == {m: (50, d) for m, d in data.GLOVE.items()}
        assert raw[s]["labels"].shape == (len(raw[s]["text"]), 1, 1)
        assert [part.decode("UTF-8") for part in raw[s]["id"][3]] == [f"{s}3", "0", "1"]
        assert not raw[s]["text"][:, 0].any(1).all() and raw[s]["text"][:, -1].any(1).all()       # padded in front
    loaded, memory = data.load("mosi", tmp_path / "new"), data.load("mosi", synthetic=True)
    same(loaded["train"], memory["train"])
    assert loaded["source"]["synthetic"] and memory["source"]["synthetic"]
    assert data.main(command) == 2 and "exists already" in capsys.readouterr().err


def test_check_says_what_a_file_is_and_goes_on_after_a_bad_one(tmp_path, monkeypatch, capsys):
    made = every(more=UNALIGNED, id=content()["train"]["id"])
    made["train"]["audio"][4, -1, 1], made["train"]["vision"][1] = -np.inf, 0
    written(tmp_path, made)
    for name in ("a.pkl", "._mosi.pkl"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "folder.pkl").mkdir()
    locked = f"{tmp_path}/folder.pkl: Permission denied"
    with monkeypatch.context() as patch:        # root may read every folder
        patch.setattr(data, "files_below", lambda *arguments, whole=data.files_below: (whole(*arguments)[0], [locked]))
        assert data.main(["check", str(tmp_path)]) == 1
    out, error = capsys.readouterr()
    assert error.splitlines()[0] == f"error: {locked}" and "a.pkl is refused: it is empty" in error.splitlines()[1]
    for part in ("layout MulT", "SHA-256 " + data.sha256(tmp_path / "mosi_data.pkl"), "train: 5 clips",
                 "(5, 12, 4) float32, 1 values of -inf read as 0", "mean 5.0, most 7", "clips of zeros alone: 1",
                 "5 clips stand in both train and test", "test has 5 clips, mosi's standard split 686"):
        assert part in out, (part, out)


@posix
@pytest.mark.parametrize("name", ["closed", "full", "left early"])
def test_an_output_that_takes_nothing_costs_no_run(monkeypatch, name):
    read, write = os.pipe()
    os.close(read)
    output = {"closed": lambda: None, "full": lambda: open("/dev/full", "w"), "left early": lambda: open(write, "w")}
    monkeypatch.setattr(sys, "stdout", output[name]())
    for _ in range(3):
        data.say("line")


def test_no_text_stops_the_printing_and_a_terminal_gets_no_commands(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "ascii"))
    data.say("1\xb12 \ud800")
    assert sys.stdout.buffer.getvalue() == rb"1\xb12 \ud800" + os.linesep.encode()
    assert data.printable("a\x1b]0;\ud800\u202e\n") == "a ]0;\\ud800  " and len(data.printable("x" * 1000)) < 120
    assert str(DataError("a\nb" * 1000)).isprintable() and len(str(DataError("a\nb" * 1000))) <= 600


@posix
def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path, link = tmp_path / "a", tmp_path / "link"
    path.write_bytes(b"old")
    link.symlink_to(path)
    with pytest.raises(ZeroDivisionError), data.replacing(path) as file:
        file.write(b"half")
        1 / 0
    assert path.read_bytes() == b"old" and len(os.listdir(tmp_path)) == 2
    with data.replacing(link, named=True) as file:
        file.write(b"new")
    assert link.is_symlink() and path.read_bytes() == b"new" and len(os.listdir(tmp_path)) == 2


@pytest.mark.parametrize("path, error, text", [
    ("no/a", None, "No such"), ("full", OSError(28, "No space left on device"), "No space"), (".", None, "Is a dir")])
def test_a_file_that_cannot_be_written_is_told_and_nothing_is_left(tmp_path, monkeypatch, path, error, text):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=f"cannot be written: {text}"), data.replacing(Path(path), named=True) as file:
        file.write(b"x")
        raise error
    assert os.listdir() == []


def test_a_link_that_lies_where_a_program_writes_of_itself_is_replaced_and_not_followed(tmp_path):
    (tmp_path / "victim").write_bytes(b"mine")
    (tmp_path / "results.json").symlink_to(tmp_path / "victim")
    with data.replacing(tmp_path / "results.json") as file:
        file.write(b"new")
    assert (tmp_path / "victim").read_bytes() == b"mine"
    assert (tmp_path / "results.json").read_bytes() == b"new" and not (tmp_path / "results.json").is_symlink()


# ------------------------------------------------------------------------------------- feature folders

def test_feature_folders_are_read_clip_by_clip_in_natural_order_without_over_long_training_clips(tmp_path):
    """The frames of a clip lie in 0.npy ... 19.npy."""
    where, truth, corpus = feature_folders(tmp_path, longest=20)
    assert data.load("mosei", normalize=False, **where)["source"]["max_frames"] == data.MAX_FRAMES
    loaded = data.load("mosei", splits=SPLITS, normalize=False, max_frames=15, **where)
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


def test_a_changed_file_changes_the_fingerprint_and_nothing_else_does(tmp_path):
    where, *_ = feature_folders(tmp_path, sizes=(3, 1, 1))
    prints = [data.load("mosei", splits=s, normalize=False, **where)["source"]["sha256"] for s in (SPLITS, ("test",))]
    os.utime(sorted(Path(where["features"]["audio"]).iterdir())[0], (1, 1))
    source = data.load("mosei", splits=SPLITS, normalize=False, **where)["source"]
    assert prints[0] == prints[1] != source["sha256"]
    assert "fingerprint of names, sizes and times" in data.identity(source) and "SHA" not in data.identity(source)


def test_a_stream_of_zeros_in_one_split_of_feature_folders_is_lacking(tmp_path):
    where, truth, corpus = feature_folders(tmp_path, sizes=(3, 2, 2))
    for clip in corpus["test_corpus"]:
        np.save(Path(where["features"]["audio"]) / f"{clip}.npy", np.zeros((2, FOLDERS["audio"])))
    loaded = [data.load("mosei", splits=(s,), normalize=False, **where) for s in SPLITS]
    assert [each["lacking"] for each in loaded] == [[], [], ["audio"]]
    assert any("test has no audio" in note for note in loaded[2]["source"]["notes"])


def labelled(where, clip, value=1.0):
    corpus = np.array({clip: {"val": value}}, dtype=object)
    np.savez(where["labels"], **dict.fromkeys(("train_corpus", "val_corpus", "test_corpus"), corpus))


WRONG = {       # what is said, and what is done to the folders; path is one file
    "no folder .* of .npy files": lambda where, path: path.unlink(),
    "has . features a frame": lambda where, path: np.save(path, np.ones((3, 7))),
    "simulated_text has 6 features, text 8": lambda where, path: [
        np.save(text, np.zeros(8)) for text in Path(where["features"]["text"]).iterdir()],
    "is refused .ValueError.. It is no .npy": lambda where, path: np.save(path, np.array({"a": 1}, dtype=object)),
    "is an array of <U2": lambda where, path: np.save(path, np.array(["so"])),
    "audio=nowhere has no": lambda where, path: where["features"].update(audio="nowhere"),
    "lacks vision": lambda where, path: where["features"].pop("vision"),
    "with --labels FILE": lambda where, path: where.update(labels=None),
    "does not exist": lambda where, path: where.update(labels=Path("nowhere.npz")),
    "BadZipFile": lambda where, path: where["labels"].write_bytes(where["labels"].read_bytes()[:90]),
    r"leaves the range \[-3, 3\]": lambda where, path: labelled(where, "a", 4.0),
    "cannot be the name": lambda where, path: labelled(where, "../../a"),
    "asks for .*system": lambda where, path: labelled(where, "a", Call(os.system, ("touch GOTCHA",))),
    "File name too long": lambda where, path: labelled(where, "a" * 300),
    "is refused .OverflowError": lambda where, path: labelled(where, "a", 10 ** 400),
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
    (np.full(4, np.nan), "'vision' has values that are NaN"), (np.ones(5), "ValueError.. The clip's frames differ"),
    (np.full(4, 1e300), "too large for float32"), (np.ones((2, 4)), "ValueError.. The clip's frames differ")])
def test_a_later_frame_that_is_wrong_is_told_with_its_clip(tmp_path, frame, text):
    where, truth, _ = feature_folders(tmp_path)
    split = data.load("mosei", splits=SPLITS, normalize=False, **where)["train"]
    i = max(range(12), key=lambda i: len(truth["vision"][split["id"][i]]))
    np.save(sorted((Path(where["features"]["vision"]) / split["id"][i]).iterdir())[-1], frame)
    with pytest.raises(DataError, match=f"{split['id'][i]}.*{text}"):
        data.batch(split, torch.tensor([i]))
