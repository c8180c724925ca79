"""Data: read the standard pickles safely, make a synthetic stand-in, drop frames and streams.

    python data.py check FILE|DIR                                   what a file is, or what is wrong with it
    python data.py synthesize mosi|mosei|iemocap --out DIR          write a SYNTHETIC stand-in in MulT's layout

Formats: MulT's (split -> text, audio, vision, labels, id) and MMSA's (split -> text, audio, vision,
regression_labels, id, audio_lengths, ...); splits are train, valid, test. Or folders of feature files, one .npy or one
folder of .npy a clip, with Double-Flow's label file. A split in memory is one dict:

    text, audio, vision   float32 (N, T_m, d_m) on the device, or Frames, which reads the clips of a batch from their
                          files; each clip starts at position 0, padding is zero
    simulated_text        the same, where the data carries it
    real                  stream -> bool (N, T_m) on the CPU, True = not padding
    label                 float32 (N,) in [-3, 3], or (N, 4) of 0 and 1: neutral, happy, sad, angry
    id                    list of N strings ([] where the file has none)

Masks have one convention everywhere: `real` True = not padding; `present` True = the frame is there.
"""
import argparse
import contextlib
import hashlib
import math
import mmap
import os
import pickle
import re
import sys
import zipfile
import zlib
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

# A stop from the keyboard while torch is imported, which takes seconds, is told in a word and not by a traceback.
sys.excepthook = lambda kind, *more: (print("stopped", file=sys.stderr) if kind is KeyboardInterrupt
                                      else sys.__excepthook__(kind, *more))

import numpy as np
import torch

STREAMS = ("text", "audio", "vision")
SIMULATED = "simulated_text"        # made from the audio beforehand; a fourth stream of Double-Flow alone
SPLITS = ("train", "valid", "test")
SETS = {"l": ("text",), "a": ("audio",), "v": ("vision",), "la": ("text", "audio"), "lv": ("text", "vision"),
        "av": ("audio", "vision"), "lav": STREAMS}      # the papers' available sets
RATES = tuple(i / 10 for i in range(11))
EMOTIONS = ("neutral", "happy", "sad", "angry")         # the order in MulT's file
SIZES = {"mosi": (1284, 229, 686), "mosei": (16326, 1871, 4659), "iemocap": (2717, 798, 938)}
FILES = {"mosi": ("mosi_data.pkl", "aligned_50.pkl", "mosi_data_noalign.pkl", "unaligned_50.pkl"),
         "mosei": ("mosei_senti_data.pkl", "aligned_50.pkl", "mosei_senti_data_noalign.pkl", "unaligned_50.pkl"),
         "iemocap": ("iemocap_data.pkl", "iemocap_data_noalign.pkl")}
# As published beside the download links of MMSA; nobody publishes any for MulT's files.
KNOWN = {"78e0f8b5ef8ff71558e7307848fc1fa929ecb078203f565ab22b9daab2e02524": "MMSA's MOSI/unaligned_50.pkl",
         "d3994fd25681f9c7ad6e9c6596a6fe9b4beb85ff7d478ba978b124139002e5f9": "MMSA's MOSI/aligned_50.pkl",
         "ad8b23d50557045e7d47959ce6c5b955d8d983f2979c7d9b7b9226f6dd6fec1f": "MMSA's MOSEI/unaligned_50.pkl",
         "45eccfb748a87c80ecab9bfac29582e7b1466bf6605ff29d3b338a75120bf791": "MMSA's MOSEI/aligned_50.pkl"}
SYNTHETIC = "SYNTHETIC stand-in, version 1"
GLOVE = {"text": 300, "audio": 74, "vision": 35}        # widths of the papers' GloVe, COVAREP and Facet features
FIELDS = (*STREAMS, SIMULATED, "labels", "regression_labels", "id", *(f"{m}_lengths" for m in STREAMS))
CHUNK = 256             # clips handled at a time: bounds every temporary copy
LARGE = 1 << 20         # bytes from which an array is a view of the file, not read until it is needed
MAX_FRAMES = 1500       # of a training clip in feature folders; our choice


def _printable(text: str, most: int = 100) -> str:
    text = "".join(c if c.isprintable() else " " for c in text)
    return text if len(text) <= most else f"{text[:most - 60]} ... {text[-50:]}"


class DataError(Exception):
    """A user's mistake, told in one or two sentences: one line, whatever a file has put into it."""

    def __str__(self) -> str:
        return _printable(super().__str__(), 600)


@contextlib.contextmanager
def told(what, advice: str):
    """Whatever reading a file may raise becomes one sentence: a damaged one can raise anything."""
    try:
        yield
    except DataError:
        raise
    except FileNotFoundError:
        raise DataError(f"{what} does not exist.") from None
    except OSError as error:
        raise DataError(f"{what} cannot be read: {error.strerror or error}.") from None
    except Exception as error:
        known = isinstance(error, (pickle.UnpicklingError, EOFError))
        said = " ".join(str(error).split()).rstrip(".") if known else type(error).__name__
        raise DataError(f"{what} is refused: {said}. {advice}") from None


@contextlib.contextmanager
def replacing(path: Path):
    """A file to write, which takes the place of `path` once it is whole: a reader never sees half of it."""
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(beside, "wb") as file:
            yield file
        os.replace(beside, path)
    except OSError as error:
        raise DataError(f"{path} cannot be written: {error.strerror}. Mend that, then run the command again.") from None
    finally:
        with contextlib.suppress(OSError):
            beside.unlink()


# ---------------------------------------------------------------------------------- reading pickles

class _File:
    """A pickle's bytes, in memory or mapped, and how far they are read."""

    def __init__(self, content: bytes | mmap.mmap):
        self.content, self.size, self.at = content, len(content), 0

    def block(self, count: int) -> memoryview:
        """The next bytes as they lie in the file: nothing of them is read before it is used, and nothing copied."""
        self.at += count
        if self.at > self.size:
            raise EOFError("it ends too early")
        return memoryview(self.content)[self.at - count:self.at]

    def read(self, count: int) -> bytes:
        return bytes(self.block(count))

    def readline(self) -> bytes:
        end = self.content.find(b"\n", self.at)
        return self.read((self.size if end < 0 else end) + 1 - self.at)


class _DType:
    """A pickled numpy.dtype, plain numbers, strings and objects only."""

    def __init__(self, code, *_):
        if not re.fullmatch(r"[<>|=]?([fiubSU]\d+|\?|O8?)", str(code)):
            raise pickle.UnpicklingError(f"it holds an array of type {code!r}, which is not numbers or strings")
        self.dtype = np.dtype(code)

    def __setstate__(self, state):
        self.dtype = self.dtype.newbyteorder(state[1])


class _Array:
    """A pickled numpy.ndarray; `value` is the array itself, a view of the file where it is large."""
    value = None

    def __setstate__(self, state):
        _, shape, dtype, fortran, raw = state
        self.fill(raw, dtype.dtype, shape, "F" if fortran else "C")

    def fill(self, raw, dtype, shape, order):
        if isinstance(raw, str):                                # written by Python 2
            raw = raw.encode("latin1")
        count = len(raw) if dtype.hasobject else len(raw) / max(1, dtype.itemsize)
        if min(shape, default=0) < 0 or math.prod(shape) != count:
            raise pickle.UnpicklingError(f"an array of shape {tuple(shape)} comes with data for {count:g} values")
        if dtype.hasobject:
            self.value = np.empty(count, object)
            for i, item in enumerate(raw):                      # not [:]: numpy would unpack items that are lists
                self.value[i] = item
            self.value = self.value.reshape(shape, order=order)
        else:
            self.value = np.frombuffer(raw, dtype).reshape(shape, order=order)


class _Unpickler(pickle._Unpickler):
    """Builds numpy arrays and plain containers; whatever else a pickle asks for is refused, by name. The form of the
    standard library that is written in Python: the one in C takes as much memory as a memo's number tells it to."""
    dispatch = dict(pickle._Unpickler.dispatch)

    def __init__(self, source: _File):
        super().__init__(source, encoding="latin1")
        self.source = source

    def load_binbytes(self, digits: int = 4):
        block = self.source.block(int.from_bytes(self.read(digits), "little"))
        self.append(block if len(block) >= LARGE else bytes(block))

    def load_binbytes8(self):
        self.load_binbytes(8)

    def load_frame(self):           # frames are there to be read ahead, and need not be
        self.read(8)

    dispatch.update({pickle.BINBYTES[0]: load_binbytes, pickle.BINBYTES8[0]: load_binbytes8,
                     pickle.BYTEARRAY8[0]: load_binbytes8, pickle.FRAME[0]: load_frame})

    def find_class(self, module, name):
        where = module.replace("numpy._core", "numpy.core").replace("__builtin__", "builtins")
        admitted = {"numpy.core.multiarray._reconstruct": lambda *_: _Array(), "numpy.ndarray": "ndarray",
                    "numpy.core.multiarray.scalar": self._scalar, "numpy.dtype": _DType,
                    "numpy.core.numeric._frombuffer": self._frombuffer,                 # protocol 5
                    "_codecs.encode": lambda text, *_: text.encode("latin1"),           # bytes in protocols 0 to 2
                    "collections.OrderedDict": OrderedDict, "builtins.set": set, "builtins.bytes": lambda: b""}
        if f"{where}.{name}" not in admitted:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is no array; nothing of it was run")
        return admitted[f"{where}.{name}"]

    def _frombuffer(self, raw, dtype, shape, order):
        array = _Array()
        array.fill(raw, dtype.dtype, shape, order)
        return array

    def _scalar(self, dtype, raw=b""):
        return self._frombuffer(raw, dtype, (1,), "C").value[0]


def _plain(value, room: int, depth: int = 0):
    """An array, a value, or nested lists of these, without the reader's wrappers. A list that holds one other many
    times is small in a file and endless when it is written out: `room` is how many values may come of it."""
    if isinstance(value, _Array):
        if value.value is None:
            raise pickle.UnpicklingError("it holds an array without data")
        return value.value
    if not isinstance(value, (list, tuple)):
        return value
    if len(value) > room or depth == 5:
        raise pickle.UnpicklingError("it holds lists of more values than it has bytes, or deeper than any data set's")
    return [_plain(v, room // len(value), depth + 1) for v in value]


def read_pickle(path: Path) -> dict:
    """split -> field -> array or list, for the splits train, valid and test and the fields that are used, and whether
    the file is marked as "SYNTHETIC". Runs nothing in the file."""
    with told(path, "Download it again from where the README says."), open(path, "rb") as file:
        if path.stat().st_size == 0:
            raise EOFError("it is empty")
        source = _File(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        if source.content[:1] not in b"\x80(]}lcd":
            begin = _printable(source.content[:40].decode("latin1").strip().split("\n")[0])
            raise pickle.UnpicklingError(f"not a pickle: it begins with {begin}, so the download went wrong")
        content = _Unpickler(source).load()
        if source.at != source.size:
            raise pickle.UnpicklingError(f"{source.size - source.at} bytes follow where it should end")
        if isinstance(content, dict) and all(isinstance(content.get(s), dict) for s in SPLITS):
            used = {s: {k: content[s][k] for k in FIELDS if k in content[s]} for s in SPLITS}
            return {**{s: {k: _plain(v, max(source.size, 1000)) for k, v in used[s].items()} for s in SPLITS},
                    "SYNTHETIC": "SYNTHETIC" in content}
    held = f"a {type(content).__name__}"
    if isinstance(content, dict):
        held += " of " + ", ".join(k[:40] if isinstance(k, str) else type(k).__name__ for k in list(content)[:8])
    raise DataError(f"{path} holds {held}; expected a dict of train, valid and test, each a dict of arrays.")


def find(dataset: str | None, data_dir: str | Path) -> Path:
    """The data set's file: data_dir itself if it is a file, else the first known name in it, aligned first."""
    root = Path(data_dir)
    if root.is_file() or dataset is None:
        return root
    folders = [root, *(root / name / sub for name in (dataset.upper(), dataset) for sub in (".", "Processed"))]
    for path in (folder / name for name in FILES[dataset] for folder in folders):
        if path.is_file():
            return path
    gone = "" if root.exists() else ", which does not exist"
    raise DataError(f"No file of {dataset} in {root}{gone}: looked for {', '.join(FILES[dataset])}. "
                    "Get one from where the README says, or add --synthetic to run on made-up data.")


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---------------------------------------------------------------------------------- splits in memory

def _count(field) -> int:
    return len(field) if isinstance(field, np.ndarray) and field.ndim else 0


def _release(array: np.ndarray) -> None:
    """Give back the memory of a mapped file that was read so far: a second reading finds it in the file again."""
    while isinstance(array, np.ndarray):
        array = array.base
    if isinstance(array, memoryview) and isinstance(array.obj, mmap.mmap) and os.name == "posix":
        array.obj.madvise(mmap.MADV_DONTNEED)


def _stream(fields: dict, name: str, where: str, ids: list, count: int) -> tuple:
    """A feature array as float32 (N, T, d), which of its frames (N, T) are not all zero, and what it was.
    -inf in audio becomes 0, as in MulT's reader."""
    if name not in fields:
        raise DataError(f"{where} has no '{name}', only {', '.join(fields)}.")
    array = fields[name]
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiub":
        raise DataError(f"{where}: '{name}' is not an array of numbers of one shape.")
    if array.ndim != 3 or 0 in array.shape:
        raise DataError(f"{where}: '{name}' has shape {array.shape}; expected (clips, frames, features).")
    x, seen, minus = torch.empty(count, *array.shape[1:]), torch.empty(count, array.shape[1], dtype=torch.bool), 0
    for i in range(0, count, CHUNK):
        with np.errstate(over="ignore"):
            part = torch.from_numpy(array[i:min(count, i + CHUNK)].astype(np.float32))
        if name == "audio":
            minus += int((part == -torch.inf).sum())
            part.masked_fill_(part == -torch.inf, 0)
        if not part.isfinite().all():
            bad = i + int((~part.isfinite()).flatten(1).any(1).nonzero()[0])
            raise DataError(f"{where}: '{name}' holds values that are NaN, infinite or too large for float32, first in "
                            f"clip {ids[bad] if ids else bad}. Repair the file or download it again.")
        x[i:i + CHUNK], seen[i:i + CHUNK] = part, (part != 0).any(-1)
        _release(array)
    return x, seen, f"{array.dtype}" + (f", {minus} values of -inf read as 0" if minus else "")


def _labels(fields: dict, dataset: str, where: str) -> torch.Tensor:
    """(N,) sentiment in [-3, 3], or (N, 4) emotions of 0 and 1, from any of the published forms."""
    key = next((k for k in ("labels", "regression_labels") if k in fields), None)
    if key is None:
        raise DataError(f"{where} has neither 'labels' nor 'regression_labels', only {', '.join(fields)}.")
    try:
        label = torch.from_numpy(np.array(fields[key], dtype=np.float32))
    except (ValueError, TypeError):
        raise DataError(f"{where}: '{key}' is not an array of numbers.") from None
    n = label.shape[0] if label.ndim else 0
    if dataset == "iemocap":
        if label.shape[1:] == (4, 2) and torch.equal(label.sum(-1), torch.ones(n, 4)):
            label = label[..., 1]                               # one-hot: no, yes
        if label.shape[1:] != (4,) or not ((label == 0) | (label == 1)).all():
            raise DataError(f"{where}: '{key}' of shape {tuple(label.shape)} is not four yes/no emotions a clip: "
                            "(N, 4) of 0 and 1, or (N, 4, 2) one-hot.")
    else:
        if label.numel() != n:
            raise DataError(f"{where}: '{key}' of shape {tuple(label.shape)} is not one sentiment score a clip.")
        label = label.reshape(n)
        if not (label.abs() <= 3).all():
            raise DataError(f"{where}: '{key}' leaves the range [-3, 3] of {dataset}, or is NaN.")
    return label


def _ids(fields: dict) -> list[str]:
    """'a/b/c' of the non-empty parts of each id; ids come as strings, bytes, or rows of either."""
    def text(part):
        return part.decode("utf-8", "replace") if isinstance(part, bytes) else str(part)
    rows = fields.get("id", [])
    rows = rows.tolist() if isinstance(rows, np.ndarray) else rows
    return ["/".join(filter(None, map(text, row))) if isinstance(row, list) else text(row)
            for row in (rows if isinstance(rows, list) else [])]


def _spans(seen: torch.Tensor, length) -> tuple[torch.Tensor, torch.Tensor]:
    """First and behind-last real frame of each clip (0, 0 where there is none): the span of the frames that are
    `seen` (N, T), widened to a stated length where that covers the span from the front or from the back."""
    frames = torch.arange(seen.shape[1])
    start = torch.where(seen, frames, seen.shape[1]).amin(1)
    stop = torch.where(seen, frames + 1, 0).amax(1)
    start = start.minimum(stop)
    if length is not None:
        length = torch.as_tensor(np.array(length, dtype=np.int64))[:len(seen)].clamp(1, seen.shape[1])
        back = (stop > 0) & (stop <= length)                    # padded behind, the stated length fits
        front = (stop == seen.shape[1]) & (start >= stop - length) & ~back
        start = torch.where(back, 0, torch.where(front, stop - length, start))
        stop = torch.where(back, length, stop)
    return start, stop


def tensors(fields: dict, dataset: str, where: str, limit: int | None = None) -> dict:
    """One split's arrays, checked and shifted to position 0, as the dict that the file's opening describes, with
    "held" (stream -> what the file held) and "lacking" (the streams without a single frame that is not zero)."""
    label, ids = _labels(fields, dataset, where), _ids(fields)
    sizes = {m: _count(fields[m]) for m in STREAMS if m in fields}
    if {*sizes.values(), len(ids) or len(label)} - {len(label)}:
        raise DataError(f"{where}: {len(label)} labels, {len(ids)} ids and "
                        f"{', '.join(f'{n} clips of {m}' for m, n in sizes.items())} do not match.")
    count = min(len(label), limit or len(label))
    split, seen, held = {"label": label[:count], "id": ids[:count], "real": {}}, {}, {}
    for m in (*STREAMS, *([SIMULATED] if SIMULATED in fields else [])):
        split[m], seen[m], held[m] = _stream(fields, m, where, ids, count)
        fields[m] = None                                        # a stand-in's array is no longer needed
    lacking = [m for m in STREAMS if not seen[m].any()]
    aligned = len({seen[m].shape[1] for m in STREAMS}) == 1
    if aligned:
        seen.update(dict.fromkeys(STREAMS, seen["text"] | seen["audio"] | seen["vision"]))
    for m in streams(split):
        start, stop = _spans(seen[m], None if aligned else fields.get(f"{m}_lengths"))
        frames = torch.arange(seen[m].shape[1])
        split["real"][m] = frames < (stop - start)[:, None]
        for i in (i for i in range(0, count, CHUNK) if start[i:i + CHUNK].any()):
            part, source = split[m][i:i + CHUNK], frames + start[i:i + CHUNK, None]
            moved = part.gather(1, source.clamp(max=len(frames) - 1)[..., None].expand_as(part))
            part.copy_(moved * split["real"][m][i:i + CHUNK, :, None])
        front, behind = int((start > 0).sum()), int(((stop > 0) & (stop < len(frames))).sum())
        held[m] += f", zero padding {'in front' if front > behind else 'behind' if behind else 'nowhere'}"
    return {**split, "held": held, "lacking": lacking}


def streams(split: dict) -> list[str]:
    return [m for m in (*STREAMS, SIMULATED) if m in split]


def statistics(split: dict) -> dict:
    """Mean and standard deviation of each feature over the frames that are not all zero: stream -> (mean, std)."""
    result = {}
    for m in STREAMS:
        def frames():
            return (part[(part != 0).any(-1)].double() for part in split[m].split(CHUNK))
        count = max(1, sum(len(part) for part in frames()))
        mean = sum(part.sum(0) for part in frames()) / count
        std = (sum((part - mean).square().sum(0) for part in frames()) / count).sqrt()  # not from E[x^2]: cancellation
        result[m] = (mean.float(), torch.where(std > 1e-7 * mean.abs(), std, 1.0).float())
    return result


def standardize(split: dict, stats: dict) -> None:
    """In place: (x - mean) / std clipped to +-5; frames of zeros (padding, a face not found) stay zero, the mean.
    Simulated text is treated as text, whose features it imitates."""
    for m in streams(split):
        mean, std = stats["text" if m == SIMULATED else m]
        if len(mean) != split[m].shape[2]:
            raise DataError(f"The data has {split[m].shape[2]} features of {m}, the run was trained on {len(mean)}.")
        for part in split[m].split(CHUNK):
            seen = (part != 0).any(-1, keepdim=True)
            part.sub_(mean).div_(std).clamp_(-5, 5).mul_(seen)


# ---------------------------------------------------------------------------------- folders of feature files

def _open_npy(path: Path) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path} cannot be read as an array of numbers: {str(error).splitlines()[0]}") from None
    if array.dtype.kind not in "fiu" or array.ndim not in (1, 2) or 0 in array.shape:
        raise DataError(f"{path} is an array of {array.dtype} {array.shape}; expected numbers, (frames, features) or "
                        "(features,).")
    return array


class Frames:
    """One stream of feature files in the place of a tensor (N, T, d): `rows` reads the clips that a batch asks for."""

    def __init__(self, name: str, folder: Path, ids: list[str]):
        self.name, self.paths, self.device = name, [], "cpu"
        if not folder.is_dir():
            raise DataError(f"--features {name}={folder}: there is no such folder.")
        lacking, length, widths = [], [], {}
        for clip in ids:
            file, parts = folder / f"{clip}.npy", folder / clip
            paths = [file] if file.is_file() else sorted(parts.glob("*.npy")) if parts.is_dir() else []
            if not paths:
                lacking.append(clip)
                continue
            shape = _open_npy(paths[0]).shape
            self.paths.append(paths)
            length.append(shape[0] if len(paths) == 1 and len(shape) == 2 else len(paths))
            widths.setdefault(shape[-1], clip)
        if lacking:
            raise DataError(f"--features {name}={folder} lacks {len(lacking)} of {len(ids)} clips, first {lacking[0]}.")
        if len(widths) > 1:
            (a, first), (b, second) = list(widths.items())[:2]
            raise DataError(f"--features {name}={folder}: clip {first} has {a} features a frame, clip {second} {b}.")
        self.length = torch.tensor(length)
        self.shape = (len(ids), max(length), next(iter(widths)))

    def to(self, device) -> "Frames":
        self.device = device
        return self

    def keep(self, index: torch.Tensor) -> None:
        """Only these clips from now on."""
        self.paths, self.length = [self.paths[i] for i in index.tolist()], self.length[index]
        self.shape = (len(index), int(self.length.max()), self.shape[2])

    def rows(self, index: torch.Tensor, longest: int) -> torch.Tensor:
        """float32 (len(index), longest, d) on the device, padded behind."""
        def read(row: int, i: int) -> None:
            parts = [np.atleast_2d(_open_npy(path)) for path in self.paths[i]]
            array = parts[0] if len(parts) == 1 else np.concatenate(parts)
            if array.shape != (int(self.length[i]), self.shape[2]):
                raise DataError(f"{self.paths[i][0]}: this clip has {array.shape} values of {self.name} now, and had "
                                f"{(int(self.length[i]), self.shape[2])} before, or its frames differ.")
            x.numpy()[row, :len(array)] = array[:longest]
        x = torch.zeros(len(index), longest, self.shape[2])
        with ThreadPoolExecutor(8) as readers:
            list(readers.map(read, range(len(index)), index.tolist()))
        if not (x.sum().isfinite() or x.isfinite().all()):      # the sum tells nearly always, and at once
            bad = index[int((~x.isfinite()).flatten(1).any(1).nonzero()[0])]
            raise DataError(f"{self.paths[bad][0]}: '{self.name}' holds values that are NaN or infinite.")
        return x.to(self.device)


def read_labels(path: Path) -> dict:
    """split -> (ids, sentiment (N,)) of Double-Flow's label file: an .npz of train_corpus, val_corpus and test_corpus,
    each a pickled dict clip -> {"emo", "val"}. Read as every pickle here: nothing in it runs."""
    result, form = {}, "Expected an .npz of train_corpus, val_corpus and test_corpus, each a dict clip -> {emo, val}."
    with told(f"--labels {path}", form), zipfile.ZipFile(path) as archive:
        for split, name in zip(SPLITS, ("train_corpus.npy", "val_corpus.npy", "test_corpus.npy")):
            if archive.getinfo(name).file_size > 1 << 28:
                raise pickle.UnpicklingError(f"{name} is too large for a list of labels")
            raw = archive.read(name)
            raw = raw[raw.index(b"\n") + 1:]                    # behind numpy's header, which ends in a new line
            corpus = _plain(_Unpickler(_File(raw)).load(), 1).reshape(-1)[0]
            values = np.array([float(np.reshape(_plain(fact["val"], 1), ())) for fact in corpus.values()], np.float32)
            result[split] = list(map(str, corpus)), torch.from_numpy(values)
    for split, (ids, label) in result.items():
        if not ids or not (label.abs() <= 3).all():
            raise DataError(f"--labels {path}: {split} is empty, or a sentiment in it leaves the range [-3, 3].")
        if strange := next((i for i in ids if Path(i).name != i or i in ("", ".", "..")), None):
            raise DataError(f"--labels {path}: {strange!r} cannot be the name of a clip's file.")
    return result


def folder(text: str) -> tuple[str, str]:
    """name=DIR of --features."""
    name, sign, where = text.partition("=")
    known = (*STREAMS, SIMULATED)
    if name not in known or not sign or not where:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=DIR with NAME one of {', '.join(known)}")
    return name, where


def _feature_splits(features: dict, labels: Path, splits, limit: int | None, max_frames: int) -> tuple[dict, dict]:
    """The named splits over feature folders, and their source."""
    if lacking := [m for m in STREAMS if m not in features]:
        raise DataError(f"--features lacks {', '.join(lacking)}: give text=DIR audio=DIR vision=DIR, if you have it "
                        f"{SIMULATED}=DIR, and --labels FILE.")
    corpus, result, said = read_labels(labels), {}, []
    for s in splits:
        ids, label = (part[:limit] for part in corpus[s])
        split = {m: Frames(m, Path(features[m]), ids) for m in (*STREAMS, SIMULATED) if m in features}
        longest = torch.stack([f.length for f in split.values()]).amax(0)
        kept = (longest <= max_frames).nonzero()[:, 0] if s == "train" else torch.arange(len(ids))
        if len(kept) == 0:
            raise DataError(f"All training clips are longer than --max-frames {max_frames}.")
        if len(kept) < len(ids):
            said.append(f"{len(ids) - len(kept)} training clips of more than {max_frames} frames are left out")
        for frames in split.values():
            frames.keep(kept)
        real = {m: torch.arange(f.shape[1]) < f.length[:, None] for m, f in split.items()}
        result[s] = {**split, "real": real, "label": label[kept], "id": [ids[i] for i in kept.tolist()], "lacking": []}
    widths = sorted((m, Path(where).name, result[splits[0]][m].shape[2]) for m, where in features.items())
    digest = hashlib.sha256(labels.read_bytes() + repr(widths).encode()).hexdigest()
    folders = " ".join(f"{m}={where}" for m, where in features.items())
    return result, {"file": f"features {folders} labels={labels}", "sha256": digest, "synthetic": False,
                    "sizes": [len(corpus[s][0]) for s in SPLITS],
                    "notes": said + _shared({s: ids for s, (ids, _) in corpus.items()})}


def _read(dataset: str | None, data_dir, splits, synthetic, limit, features, labels, max_frames) -> tuple:
    """The data set's name, its splits as they are, and their source; the arguments are those of `load`."""
    if features:
        result, source = _feature_splits(features, Path(labels), splits, limit, max_frames)
    elif synthetic:
        overlapping = synthetic == "overlapping"
        fields = {s: stand_in(dataset, s, overlapping=overlapping) for s in splits}
        source = {"file": SYNTHETIC + (", overlapping streams" if overlapping else ""), "sha256": None,
                  "synthetic": True, "sizes": list(SIZES[dataset]), "notes": []}
    else:
        data_dir = find(dataset, data_dir)
        fields = read_pickle(data_dir)
        sizes = [_count(fields[s].get("text")) for s in SPLITS]
        dataset = dataset or next((d for d, known in SIZES.items() if [*known] == sizes), None) or (
            "iemocap" if np.shape(fields["train"].get("labels", ()))[1:2] == (4,) else "mosi")
        source = {"file": str(data_dir), "sha256": sha256(data_dir), "synthetic": fields["SYNTHETIC"], "sizes": sizes,
                  "layout": "MMSA" if "regression_labels" in fields["train"] else "MulT",
                  "notes": _shared({s: _ids(fields[s]) for s in SPLITS})}
    if not features:
        result = {s: tensors(fields.pop(s), dataset, f"{source['file']}, split {s}", limit) for s in splits}
    source["arguments"] = {"data_dir": str(data_dir), "synthetic": synthetic, "features": features,
                           "labels": labels and str(labels), "max_frames": max_frames}
    return dataset, result, source


def load(dataset: str | None, data_dir: str | Path = "data", splits=("train", "valid"), device="cpu", normalize=True,
         stats: dict | None = None, synthetic=False, limit: int | None = None, features: dict | None = None,
         labels: str | Path | None = None, max_frames: int = MAX_FRAMES) -> dict:
    """The named splits, plus "dataset", "dims" (stream -> width), "aligned" (whether all streams have the same number
    of frames), "lacking" (streams without a single frame in these splits), "stats" (None without normalisation) and
    "source": what the data is, and the arguments that load it again. `dataset` None: told from the file, for a look at
    it. `stats` of an earlier load replace the training split's own; `limit` keeps each split's first clips. The other
    splits' features are not read. Memory peaks a little above the float32 size of the features. With `features`
    (stream -> folder) and `labels`, clips are read from feature files batch by batch, as they are: normalize must be
    off."""
    if features and (normalize or dataset == "iemocap" or labels is None):
        raise DataError("--features needs --labels FILE, Double-Flow's label_official.npz, and holds sentiment clips "
                        "that are used as they are: mosi or mosei, without --normalize.")
    dataset, result, source = _read(dataset, data_dir, splits, synthetic, limit, features, labels, max_frames)
    dims = {m: result[splits[0]][m].shape[2] for m in streams(result[splits[0]])}
    if any(dims != {m: result[s][m].shape[2] for m in streams(result[s])} for s in splits):
        raise DataError(f"{source['file']}: the splits differ in feature width.")
    if dims.get(SIMULATED, dims["text"]) != dims["text"]:
        raise DataError(f"{source['file']}: simulated_text has {dims[SIMULATED]} features, text {dims['text']}; they "
                        "must be the same.")
    if normalize:
        stats = stats or statistics(result["train"])
        for s in splits:
            standardize(result[s], stats)
    for s in splits:
        result[s].update({k: result[s][k].to(device) for k in (*streams(result[s]), "label")})
    aligned = not features and all(len({result[s][m].shape[1] for m in STREAMS}) == 1 for s in splits)
    lacking = [m for m in STREAMS if all(m in result[s]["lacking"] for s in splits)]
    if lacking:
        gone = " ".join("{" + ",".join(c) + "}" for c in SETS if c not in answerable(SETS, lacking))
        source["notes"].append(f"there is no {' and no '.join(lacking)}: {gone} are not answered and count in no "
                               "average; {l,a,v} is all that there is")
    if not aligned and not features:
        source["notes"].append("the streams are not aligned")
    return {**result, "dataset": dataset, "dims": dims, "aligned": aligned, "lacking": lacking,
            "stats": stats if normalize else None, "source": source}


def _shared(ids: dict[str, list[str]]) -> list[str]:
    """Which clips stand in more than one split, or more than once in one; ids: split -> its clips' ids."""
    said = []
    for a, b in (("train", "valid"), ("train", "test"), ("valid", "test")):
        if both := set(ids[a]) & set(ids[b]):
            said.append(f"{len(both)} clips stand in both {a} and {b}, for instance {_printable(min(both))}")
    for s in SPLITS:
        if not ids[s]:
            said.append(f"{s} has no ids, so nothing tells whether its clips stand elsewhere too")
        elif twice := len(ids[s]) - len(set(ids[s])):
            said.append(f"{twice} clips of {s} have the id of another one in it")
    return said


def comparison(run: dict, source: dict, widths: dict) -> tuple[bool, str]:
    """Whether numbers on this data may stand beside a paper's, which are of features of these widths; and what is to be
    said of that, if anything. run: "dataset", "dims" and "limit", as in a run record."""
    dims, standard = run["dims"], SIZES[run["dataset"]]
    why = ["the data is SYNTHETIC"] if source["synthetic"] else []
    if run["limit"]:
        why.append(f"only the first {run['limit']} clips of each split are used")
    if tuple(source["sizes"]) != standard:
        sizes, standard = ("/".join(map(str, of)) for of in (source["sizes"], standard))
        why.append(f"{sizes} clips are not the standard splits of {run['dataset']} ({standard})")
    if dims["text"] != widths["text"]:
        bert = ", as from BERT" if dims["text"] == 768 else ""
        why.append(f"text is {dims['text']} wide{bert}, not {widths['text']}")
    if why:
        return False, "nothing is compared with the paper: " + "; ".join(why)
    other = ", ".join(f"{m} {dims[m]} wide, not {w}" for m, w in widths.items() if dims[m] != w)
    return True, other and f"the paper's features are others: {other}"


# ---------------------------------------------------------------------------------- missing frames and streams

def drop(real: torch.Tensor, rate, generator: torch.Generator) -> torch.Tensor:
    """present (N, T): floor(rate * n + u) of a clip's n real frames are gone, u uniform in [0, 1), the frames
    uniform without replacement. rate: a number or (N,). The mean rate is exact even for clips of one frame."""
    n = real.sum(1)
    u = torch.rand(len(real), dtype=torch.float64, generator=generator)
    gone = (torch.as_tensor(rate, dtype=torch.float64) * n + u).floor()
    order = torch.rand(real.shape, generator=generator).masked_fill(~real, 2.0).argsort(1).argsort(1)
    return real & (order >= gone[:, None])


def training_masks(real: dict, generator: torch.Generator) -> dict:
    """Modality random missing, present: stream -> (B, T_m). Our choice where the papers are silent: a clip keeps one
    of the 7 non-empty sets of streams, and of each stream's frames it loses a share from 0, 0.1, ..., 0.9."""
    count = len(real["text"])
    available = torch.randint(1, 8, (count,), generator=generator)
    present = {}
    for bit, m in enumerate(STREAMS):
        rate = torch.randint(0, 10, (count,), generator=generator).double() / 10
        present[m] = drop(real[m], rate, generator) & (available >> bit & 1).bool()[:, None]
    return present


def evaluation_masks(real: dict, condition: str | float, split: str, seed: int = 0) -> dict:
    """Fixed masks of a whole split: a set ("l" ... "lav") keeps its streams whole, a rate p drops that share of
    the frames of every stream. They depend on seed, split and condition alone."""
    if condition in SETS:
        return {m: real[m] if m in SETS[condition] else torch.zeros_like(real[m]) for m in STREAMS}
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{split}/{condition:.3f}".encode()))
    return {m: drop(real[m], condition, generator) for m in STREAMS}


def answerable(sets, lacking: list[str]) -> list[str]:
    """Those of the sets ("l" ... "lav") that name no stream which the data lacks; {l,a,v} is all that there is."""
    return [c for c in sets if c == "lav" or not set(SETS[c]) & set(lacking)]


def realised(present: dict, real: dict) -> dict:
    """stream -> the share of its real frames that is gone; None for a stream that has none."""
    return {m: 1 - present[m].sum().item() / real[m].sum().item() if real[m].any() else None for m in STREAMS}


def batches(real: dict, index: torch.Tensor, size: int, generator: torch.Generator, pool: int = 4):
    """`index` as random batches of clips of similar length: sorted by length, ties at random, cut into pools of
    `pool` batches, shuffled inside each pool, the batches in random order."""
    index = index[torch.randperm(len(index), generator=generator)]
    index = index[sum(real[m][index].sum(1) for m in STREAMS).argsort(stable=True)]
    index = torch.cat([p[torch.randperm(len(p), generator=generator)] for p in index.split(pool * size)])
    groups = index.split(size)
    return [groups[i] for i in torch.randperm(len(groups), generator=generator)]


def sent(tensors: list[torch.Tensor], device) -> list[torch.Tensor]:
    """CPU tensors of one type on the device, by one copy for which nothing waits."""
    if torch.device(device).type == "cpu":
        return tensors
    flat = torch.cat([t.flatten() for t in tensors]).pin_memory().to(device, non_blocking=True)
    return [part.view(t.shape) for part, t in zip(flat.split([t.numel() for t in tensors]), tensors)]


def ahead(split: dict, items):
    """The items of a generator; over feature folders each is made by a thread while the one before it is in use."""
    if not isinstance(split["text"], Frames):
        yield from items
        return
    with ThreadPoolExecutor(1) as reader:
        coming = reader.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = reader.submit(next, items, None)
            yield item


def gather(split: dict, m: str, index: torch.Tensor, there: torch.Tensor, longest: int) -> torch.Tensor:
    """Stream m of these clips, cut to `longest` frames, on the device. there: index on the device."""
    x = split[m]
    return x.rows(index, longest) if isinstance(x, Frames) else x[:, :longest][there]


def batch(split: dict, index: torch.Tensor, there: torch.Tensor, draw=None) -> tuple[dict, dict, dict]:
    """The clips of `index` cut to their longest, on the device: streams, real, and what `draw` makes of real, or {}.
    there: index on the device."""
    real = {m: split["real"][m][index] for m in streams(split)}
    longest = {m: max(1, int(r.sum(1).max())) for m, r in real.items()}
    real = {m: r[:, :longest[m]] for m, r in real.items()}
    present = draw(real) if draw else {}
    masks = iter(sent([*real.values(), *present.values()], there.device))
    return ({m: gather(split, m, index, there, longest[m]) for m in real}, *({m: next(masks) for m in d}
                                                                             for d in (real, present)))


# ---------------------------------------------------------------------------------- the synthetic stand-in

# Measured on MOSI where known, else from the data sets' papers: label mean and deviation before clipping, share of
# zeros; median and spread of the log length. Strengths are calibrated: see stand_in.
_LABELS = {"mosi": ((.25, 1.62, .04), (.33, 1.78, .05), (-.34, 1.72, .04)), "mosei": ((.25, 1.15, .22),) * 3,
           "iemocap": ((.36, .25, .20, .19), (.36, .25, .20, .19), (.409, .144, .206, .241))}
_LENGTHS = {"mosi": (50, 11, .64), "mosei": (50, 19, .6), "iemocap": (20, 12, .5)}
_STRENGTH = {"text": 2.0, "audio": .65, "vision": .5}


def stand_in(dataset: str, split: str, seed: int = 0, overlapping: bool = False) -> dict:
    """Made-up features in the real sizes, as MulT's pickle holds them: front-padded float32 arrays.

    A frame is a mix of 12 hidden factors. In a few frames of a clip, marked by one factor, others carry the label plus
    noise of the clip and stream: little noise in text, more in audio and vision, so each holds a part of its own.
    overlapping: there are three noisy cues of the label a clip, and each stream holds two of them, so that any two
    streams hold all that three do, and what one has lost another one may still tell. The factors that carry the cues
    are three times as loud in unmarked frames: a mean over the frames loses most of them, attention need not.
    """
    n, position = SIZES[dataset][SPLITS.index(split)], SPLITS.index(split)
    rng = np.random.default_rng([seed, zlib.crc32(dataset.encode()), position])
    longest, median, spread = _LENGTHS[dataset]
    length = np.clip(np.rint(median * np.exp(spread * rng.standard_normal(n))), 2, longest).astype(int)
    if dataset == "iemocap":
        labels = np.eye(4, dtype=np.float32)[rng.choice(4, n, p=_LABELS[dataset][position])]
        signal, labels = labels - .25, np.stack((1 - labels, labels), -1)
    else:
        mean, deviation, zeros = _LABELS[dataset][position]
        y = np.clip(np.rint(5 * rng.normal(mean, deviation, n)) / 5, -3, 3)
        y[y == 0] = rng.choice([-.2, .2], (y == 0).sum())       # the share of zeros is set, not left to rounding
        y[rng.random(n) < zeros] = 0
        signal, labels = y[:, None] / 1.5, y.astype(np.float32).reshape(n, 1, 1)
    fields = {"labels": labels}
    if overlapping:
        cues = signal + rng.standard_normal((3, *signal.shape))
    for i, m in enumerate(STREAMS):
        shared = np.random.default_rng([seed, zlib.crc32(f"{dataset}/{m}".encode())])      # the same in all splits
        mix, scale = shared.standard_normal((12, GLOVE[m])), 10 ** shared.uniform(-1, 1, GLOVE[m])
        offset = scale * shared.standard_normal(GLOVE[m])
        told = (np.concatenate((cues[i], cues[i - 1]), 1) if overlapping
                else _STRENGTH[m] * signal + rng.standard_normal(signal.shape))
        x = np.zeros((n, longest, GLOVE[m]), np.float32)
        for j in range(0, n, CHUNK):
            here = length[j:j + CHUNK, None]
            factors = rng.standard_normal((len(here), longest, 12)).astype(np.float32)
            chosen = rng.random((len(here), longest)) < .2
            chosen[np.arange(len(here)), -1 - rng.integers(0, here[:, 0])] = True          # at least one frame
            factors[..., 0] += 3 * chosen
            if overlapping:
                factors[..., 1:1 + told.shape[1]] *= np.where(chosen, 1, 3)[..., None]
            factors[..., 1:1 + told.shape[1]] += 1.5 * chosen[..., None] * told[j:j + CHUNK, None]
            frames = factors @ np.float32(mix * scale)
            frames += rng.standard_normal(frames.shape, np.float32) * np.float32(scale) + np.float32(offset)
            frames[np.arange(longest) < longest - here] = 0
            x[j:j + CHUNK] = frames
        fields[m] = x
    names = np.array([[f"{split}{i}", "0", "1"] for i in range(n)])
    return {**fields, "id": names.astype("S") if dataset == "mosi" else names}


# ---------------------------------------------------------------------------------- command line

def check(path: Path) -> None:
    """Print what one file is; raises DataError on what is wrong with it."""
    loaded = load(None, path, SPLITS, normalize=False)
    source, emotions = loaded["source"], loaded["dataset"] == "iemocap"
    print(f"{path}\n  layout {source['layout']}, labels: {'emotions' if emotions else 'sentiment'}"
          + (f", {SYNTHETIC}" if source["synthetic"] else "") + f"\n  SHA-256 {source['sha256']}: "
          f"{KNOWN.get(source['sha256'], 'not one of the files whose hash the README lists')}")
    for s in SPLITS:
        split, y = loaded[s], loaded[s]["label"]
        print(f"  {s}: {len(y)} clips")
        for m in streams(split):
            n = split["real"][m].sum(1).float()
            print(f"    {m:6s} {tuple(split[m].shape)} {split['held'][m]}; real frames: mean {n.mean():.1f}, median "
                  f"{n.median():.0f}, most {n.max():.0f}, clips without any: {int((n == 0).sum())}")
        print("    labels " + (
            ", ".join(f"{e} {100 * share:.1f} %" for e, share in zip(EMOTIONS, y.mean(0))) if emotions else
            f"{y.min():.1f} to {y.max():.1f}, mean {y.mean():.2f}, std {y.std():.2f}, "
            f"{100 * (y > 0).float().mean():.1f} % positive, {100 * (y == 0).float().mean():.1f} % zero"))
    compared, said = comparison({**loaded, "limit": None}, source, GLOVE)
    print(f"  CorrKD, UMDF: {said or 'the features and splits of the papers'}")
    print("  Double-Flow: trains on this file; its paper's features are folders, so nothing is compared with it; "
          f"simulated text {'comes from the file' if SIMULATED in loaded['dims'] else 'is learned from the audio'}")
    for note in source["notes"]:
        print(f"  note: {note}")


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description="Check a data file, or write a synthetic one.")
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("check", help="print what a file is, or what is wrong with it; exit 0 or 1")
    one.add_argument("path", type=Path, help="a pickle, or a folder whose pickles are all checked")
    two = commands.add_parser("synthesize", help="write a SYNTHETIC stand-in in the layout of MulT's pickles")
    two.add_argument("dataset", choices=SIZES)
    two.add_argument("--out", type=Path, required=True, help="folder for the file")
    args = parser.parse_args(argv)
    try:
        if args.command == "check":
            paths = sorted(args.path.rglob("*.pkl")) if args.path.is_dir() else [args.path]
            if not paths:
                raise DataError(f"No .pkl file in {args.path}.")
            for path in paths:
                check(path)
        else:
            path = args.out / FILES[args.dataset][0]
            if path.exists():
                raise DataError(f"{path} exists already; it is left as it is. Name another folder, or remove it.")
            args.out.mkdir(parents=True, exist_ok=True)
            content = {**{s: stand_in(args.dataset, s) for s in SPLITS}, "SYNTHETIC": SYNTHETIC}
            with replacing(path) as file:
                pickle.dump(content, file, protocol=4)
            print(f"wrote {path}: {SYNTHETIC}, not {args.dataset}")
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1 if args.command == "check" else 2
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
