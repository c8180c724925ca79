"""Load the standard pickles, drop frames and streams, cut batches; check, convert or make up a file.

    python data.py check FILE                               what a file is, or what is wrong with it
    python data.py convert FOLDER --out DIR                 MFN's .h5 files as a pickle (needs h5py)
    python data.py synthesize mosi|mosei|iemocap --out DIR  a SYNTHETIC stand-in in MulT's layout

Formats: MulT's (split -> text, audio, vision, labels, id), which MultiBench uses too, and MMSA's (split -> text, audio,
vision, regression_labels, id, audio_lengths, ...); splits are train, valid, test. Or folders of feature files, one .npy
or one folder of .npy a clip, with Double-Flow's label file. A split in memory is one dict:

    text, audio, vision   float32 (N, T_m, d_m) on the device, or Frames, which reads the clips of a batch from their
                          files; each clip starts at position 0, padding is zero
    simulated_text        the same, where the data carries it
    real                  stream -> bool (N, T_m) on the CPU, True = not padding
    label                 float32 (N,) in [-3, 3], or (N, 4) of 0 and 1: neutral, happy, sad, angry; None where an
                          evaluated file has none
    id                    list of N strings ([] where the file has none)
    lacking               the streams whose frames are all zeros

Masks have one convention everywhere: `real` True = not padding; `present` True = the frame is there.
"""
import argparse
import contextlib
import hashlib
import itertools
import math
import os
import pickle
import re
import sys
import tempfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch

STREAMS = ("text", "audio", "vision")
SIMULATED = "simulated_text"        # made from the audio beforehand, a fourth stream of Double-Flow alone
SPLITS = ("train", "valid", "test")
SETS = {                            # the papers' available sets
    "l": ("text",),
    "a": ("audio",),
    "v": ("vision",),
    "la": ("text", "audio"),
    "lv": ("text", "vision"),
    "av": ("audio", "vision"),
    "lav": STREAMS,
}
RATES = tuple(i / 10 for i in range(11))
EMOTIONS = ("neutral", "happy", "sad", "angry")         # the order in MulT's file
SIZES = {"mosi": (1284, 229, 686), "mosei": (16326, 1871, 4659), "iemocap": (2717, 798, 938)}
FILES = {       # looked for in this order: aligned to words and of the papers' widths first
    "mosi": ("mosi_raw.pkl", "mosi_data.pkl", "MOSI/Processed/aligned_50.pkl", "mosi_data_noalign.pkl",
             "MOSI/Processed/unaligned_50.pkl"),
    "mosei": ("mosei_senti_data.pkl", "mosei_raw.pkl", "MOSEI/Processed/aligned_50.pkl",
              "mosei_senti_data_noalign.pkl", "MOSEI/Processed/unaligned_50.pkl"),
    "iemocap": ("iemocap_data.pkl", "iemocap_data_noalign.pkl"),
}
SYNTHETIC = "SYNTHETIC stand-in, version 1"
GLOVE = {"text": 300, "audio": 74, "vision": 35}    # widths of the papers' GloVe, COVAREP and Facet
CHUNK = 256             # clips handled at a time: bounds every temporary copy
MAX_FRAMES = 1500       # of a training clip in feature folders, longer ones are left out; our choice


# ---------------------------------------------------------------------------------- loading

def load(dataset: str | None, data_dir: str | Path = "data", splits=("train", "valid"), device="cpu",
         normalize: bool = True, stats: dict | None = None, synthetic: bool = False, limit: int | None = None,
         features: dict | None = None, labels: str | Path | None = None, across: bool = False) -> dict:
    """The named splits, each as the file's opening describes, and beside them

        dataset    its name               dims       stream -> width
        aligned    all streams have the same number of frames
        lacking    the streams that have no frame at all in one of these splits
        stats      stream -> (mean, std) of the training split, None without normalize
        source     what the data is: file, sha256, synthetic, sizes (of the three splits, None = absent), notes; of
                   feature folders sha256 is of the label file, the names and the frame counts

    stats: an earlier load's, in the place of the training split's own. limit: only the first clips of each split.
    features (stream -> folder) and labels: clips are read batch by batch, as they are, so normalize must be off.
    across: a file of the other one of mosi and mosei will do. Of the three splits a pickle needs only these (None:
    those that it has), feature folders need all; where train is asked for, train and valid must have labels. Memory
    peaks at the file plus the float32 size of the features asked for (pickles of protocol 3 and later). DataError for
    whatever is wrong.
    """
    if features:
        if normalize or dataset == "iemocap" or labels is None:
            raise DataError("--features is for --dataset mosi or mosei, with --labels FILE, Double-Flow's "
                            "label_official.npz; from Python with normalize=False.")
        result, source = load_folders(features, Path(labels), splits, limit)
    else:
        dataset, result, source = load_arrays(dataset, data_dir, splits, synthetic, limit, across)
    dims = widths(result, source["file"])
    aligned = not features and all(is_aligned(split) for split in result.values())
    source["notes"] += content_notes(dataset, result, source["file"])
    if not aligned:
        source["notes"].append("the streams are not aligned")
    if normalize and stats is None:
        if "train" not in result:
            raise DataError("Features are standardised by the training split, which is not among the splits read: give "
                            "the stats of an earlier load, or normalize=False for a run made with --no-normalize.")
        stats = statistics(result["train"])
    for split in result.values():
        if normalize:
            standardize(split, stats)
        for name in (*streams(split), "label"):
            if isinstance(split[name], torch.Tensor):
                split[name] = split[name].to(device)
    lacking = set().union(*(split["lacking"] for split in result.values()))
    return {
        **result, "dataset": dataset, "dims": dims, "aligned": aligned,
        "lacking": sorted(lacking, key=STREAMS.index),
        "stats": stats if normalize else None, "source": source,
    }


def load_arrays(dataset, data_dir, splits, synthetic: bool, limit: int | None, across: bool) -> tuple[str, dict, dict]:
    """The data set's name, the splits as tensors and their source, of a pickle or of the stand-in; as `load` says."""
    if synthetic:
        content = {s: stand_in(dataset, s) for s in splits}
        source = {"file": SYNTHETIC, "sha256": None, "synthetic": True, "sizes": list(SIZES[dataset]), "notes": []}
    else:
        dataset, content, source = load_pickle(dataset, data_dir, splits, across)
    result = {}
    for s, fields in content.items():
        with reading(f"{source['file']}, split {s}", "Repair the file or download it again."):
            result[s] = tensors(fields, dataset, limit, need_labels=s != "test" and "train" in content)
    return dataset, result, source


def load_pickle(dataset: str | None, data_dir, splits, across: bool) -> tuple[str, dict, dict]:
    """The data set's name, split -> fields of the asked splits, and their source; as `load` says. dataset None: as the
    file's sizes and labels say."""
    path = find(dataset, data_dir)
    with reading(path, "Download it again, or write a dict of numpy arrays by pickle.dump."):
        content, synthetic = read_pickle(path, splits or ())
        sizes = [len(content[s].get("text", ())) if s in content else None for s in SPLITS]
        ids = {s: read_ids(fields) for s, fields in content.items()}
        emotions = np.shape(next(iter(content.values())).get("labels"))[1:2] == (4,)
    meant = data_set_of(sizes)
    dataset = dataset or meant or ("iemocap" if emotions else "mosi")
    allowed = ("mosi", "mosei") if across and dataset != "iemocap" else (dataset,)
    if meant not in (None, *allowed):
        raise DataError(f"{path} has {'/'.join(map(str, sizes))} clips, the splits of {meant}, not of "
                        f"{' or '.join(allowed)}. Name another file with --data-dir, or train with --dataset {meant}.")
    dataset = meant or dataset
    notes = shared("clips", ids)
    if sizes != list(SIZES[dataset]):           # the standard splits are what they are
        notes += shared("videos", {s: list(map(video_of, ids[s])) for s in ids})
    if absent := [s for s in ids if not ids[s]]:
        notes.append(f"no ids in {', '.join(absent)}: nothing tells whether these clips stand elsewhere too")
    source = {"file": printable(str(path), 300), "sha256": sha256(path), "synthetic": synthetic, "sizes": sizes,
              "notes": notes}
    return dataset, {s: content[s] for s in splits or content}, source


def find(dataset: str | None, data_dir: str | Path) -> Path:
    """The data set's file: data_dir itself if it is a file or no data set is named, else the first of FILES in it."""
    root = Path(data_dir)
    if dataset is None or root.is_file() or root.suffix and not root.exists():      # the last: a mistyped file
        return root
    for name in FILES[dataset]:
        if (root / name).is_file():
            return root / name
    raise DataError(f"No file of {dataset} in {root}: looked for {', '.join(FILES[dataset])}. The README says where to "
                    "get one; name it with --data-dir. train.py --synthetic trains on made-up data.")


def data_set_of(sizes: list) -> str | None:
    """The data set that a file's sizes say: each within a tenth of the standard one, as the same data set's
    releases are of each other."""
    for name, standard in SIZES.items():
        near = [abs(n - usual) <= usual / 10 for n, usual in zip(sizes, standard) if n is not None]
        if all(near) and len(near) > 1:         # one split alone may be of about that size by chance
            return name
    return None


def shared(what: str, names: dict) -> list[str]:
    """Notes on clips or videos (what) that stand in more than one split; names: split -> what stands in it."""
    notes = []
    for a, b in itertools.combinations(names, 2):
        if both := set(names[a]) & set(names[b]) - {""}:
            notes.append(f"{len(both)} {what} stand in both {a} and {b}, for instance {printable(min(both))}")
    return notes


def video_of(clip: str) -> str:
    """The video of a clip called video/..., video$_$segment or video_segment, the last a number; else ""."""
    video, found = re.subn(r"(?s)/.*|\$_\$.*|_\d+\Z", "", clip, count=1)
    return video if found else ""


def content_notes(dataset: str, result: dict, file: str) -> list[str]:
    """What a reader of a table should know of the splits' content; result: split -> split. DataError if nothing can be
    learned from the training labels."""
    notes = []
    for m in STREAMS:
        if without := [s for s, split in result.items() if m in split["lacking"]]:
            notes.append(f"no {m} in {', '.join(without)}: a set with it is not answered and counts in no average; "
                         "{l,a,v} is what there is")
    labels = {s: split["label"] for s, split in result.items() if split["label"] is not None}
    one_class = []
    for s, label in labels.items():
        decisions = label.T if dataset == "iemocap" else [label[label != 0] > 0]
        if any(len(decision.unique()) < 2 for decision in decisions):
            one_class.append(s)
    if "train" in one_class:
        raise DataError(f"{file}: the training labels (with --limit the first ones) leave one class alone. Sentiments "
                        "are meant, in [-3, 3]: below 0 negative, above 0 positive, 0 counts as neither; or four "
                        "emotions, each with clips that have it and clips that have it not.")
    if one_class:
        notes.append(f"labels of one class alone in {', '.join(one_class)}: its F1 means nothing and is \"-\"; of "
                     "valid, accuracy chooses the epoch")
    if dataset != "iemocap" and labels and all(label.abs().max() <= 1 for label in labels.values()):
        notes.append("all labels lie within [-1, 1]: Acc-7, which is of [-3, 3], means nothing")
    return notes


def widths(result: dict, file: str) -> dict:
    """stream -> features a frame; DataError unless they are the same in all splits."""
    dims = {}
    for s, split in result.items():
        here = {m: split[m].shape[2] for m in streams(split)}
        dims = dims or here
        if here != dims or here.get(SIMULATED, here["text"]) != here["text"]:
            raise DataError(f"{file}: {s} has features of width {here}, expected {dims}; all splits must have the same "
                            "ones, and simulated_text as many as text.")
    return dims


def identity(source: dict) -> str:
    """The data's file and what tells it from others, for a log."""
    return source["file"] if source["sha256"] is None else f"{source['file']}, SHA-256 {source['sha256'][:16]}..."


def comparison(run: dict, source: dict, paper: dict) -> tuple[bool, str]:
    """Whether numbers on this data may stand beside a paper's, which are of features of these widths (paper: stream ->
    width): the test split has the standard size, the text the paper's width. And what is to be said of that, if
    anything. run: "dataset", "dims" and "limit", as in a run record."""
    reasons, differences = [], []       # why nothing is compared; what is to be known of a comparison
    if source["synthetic"]:
        reasons.append("the data is SYNTHETIC")
    if run["limit"]:
        reasons.append(f"the run is of only the first {run['limit']} clips of each split")
    for s, n, standard in zip(SPLITS, source["sizes"], SIZES[run["dataset"]]):
        if n != standard:
            matters = reasons if s == "test" else differences
            matters.append(f"{s} has {n or 'no'} clips, the paper's {standard}")
    for m, width in paper.items():
        if run["dims"][m] != width:
            matters = reasons if m == "text" else differences
            matters.append(f"{m} is {run['dims'][m]} wide, the paper's {width}")
    if reasons:
        return False, "nothing is compared with the paper: " + "; ".join(reasons)
    return True, "; ".join(differences)


# ---------------------------------------------------------------------------------- a split as tensors

def tensors(fields: dict, dataset: str, limit: int | None, need_labels: bool) -> dict:
    """One split's arrays, checked and shifted to position 0, as the dict that the file's opening describes. `fields` is
    used up: an array leaves memory as soon as its tensor is there. ValueError for what is wrong with them."""
    names = [*STREAMS, SIMULATED] if SIMULATED in fields else STREAMS
    counts = {m: len(feature_array(fields, m)) for m in names}
    ids, label = read_ids(fields), read_labels(fields, dataset)
    if label is not None:
        counts["labels"] = len(label)
        label = label[:limit]
    elif need_labels:
        raise ValueError(f"it has neither 'labels' nor 'regression_labels', only {', '.join(fields)}")
    if ids:
        counts["ids"] = len(ids)
    if len(set(counts.values())) > 1:
        raise ValueError(f"the numbers of clips do not match: {counts}")
    split = {"label": label, "id": ids[:limit], "real": {}}
    nonzero = {}
    for m in names:
        split[m] = read_features(fields.pop(m)[:limit], m, ids)
        nonzero[m] = (split[m] != 0).any(-1)
    split["lacking"] = [m for m in STREAMS if not nonzero[m].any()]
    if is_aligned(split):                       # one span for all streams, whatever lengths are stated
        fields = {}
        together = nonzero["text"] | nonzero["audio"] | nonzero["vision"]
        nonzero.update(dict.fromkeys(STREAMS, together))
    for m in names:
        longest = split[m].shape[1]
        stated = read_lengths(fields, m, counts[m], longest)
        start, length = spans(nonzero[m], stated[:limit])
        split["real"][m] = torch.arange(longest) < length[:, None]
        for i in start.nonzero()[:, 0].tolist():        # what stands before the start is zero and comes to stand behind
            split[m][i] = split[m][i].roll(-int(start[i]), 0)
    return split


def spans(nonzero: torch.Tensor, stated: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """First real frame of each clip and the number of them (0, 0 where there is none): the span of its frames that are
    not all zero, (N, T), widened to the stated length (N,) where that covers it from the front or the back."""
    longest = nonzero.shape[1]
    start = nonzero.int().argmax(1)                     # the first of the largest
    stop = (nonzero * torch.arange(1, longest + 1)).amax(1)
    padded_behind = (stop > 0) & (stop <= stated)       # and the stated length fits
    start = torch.where(stop == longest, start.minimum(stop - stated), start)           # padded in front
    start = torch.where(padded_behind, 0, start)
    return start, torch.where(padded_behind, stated, stop - start)


def is_aligned(split: dict) -> bool:
    """Whether all streams have the same number of frames, a word each."""
    return len({split[m].shape[1] for m in STREAMS}) == 1


def streams(split: dict) -> list[str]:
    """The streams that the split holds, in the order that all code goes through them."""
    return [m for m in (*STREAMS, SIMULATED) if m in split]


def statistics(split: dict) -> dict:
    """Mean and standard deviation of each feature over the frames that are not all zero: stream -> (mean, std)."""
    result = {}
    for m in STREAMS:
        count = max(1, sum(len(frames) for frames in nonzero_frames(split[m])))
        mean = sum(frames.sum(0) for frames in nonzero_frames(split[m])) / count
        squares = sum((frames - mean).square().sum(0) for frames in nonzero_frames(split[m]))
        std = (squares / count).sqrt()                  # not from E[x^2], which cancels
        result[m] = (mean.float(), torch.where(std > 1e-7 * mean.abs(), std, 1.0).float())
    return result


def standardize(split: dict, stats: dict) -> None:
    """In place: (x - mean) / std clipped to +-5; frames of zeros (padding, a face not found) stay zero, the mean.
    Simulated text is treated as text, whose features it imitates."""
    for m in streams(split):
        mean, std = stats["text" if m == SIMULATED else m]
        width = split[m].shape[2]
        if len(mean) != width:
            raise DataError(f"The data has {width} features of {m}, the run was trained on {len(mean)}.")
        for part in split[m].split(CHUNK):
            nonzero = (part != 0).any(-1, keepdim=True)
            part.sub_(mean).div_(std).clamp_(-5, 5).mul_(nonzero)


def nonzero_frames(x: torch.Tensor):
    """The frames of x (N, T, d) that are not all zero, float64 (n, d), chunk by chunk."""
    for part in x.split(CHUNK):
        yield part[(part != 0).any(-1)].double()


# ---------------------------------------------------------------------------------- batches, missing frames and streams

def batches(real: dict, size: int, generator: torch.Generator) -> list:
    """Random batches (indices) of clips of similar length: sorted by length, ties at random, cut into pools of four
    batches, shuffled inside each pool, the batches in random order."""
    index = torch.randperm(len(real["text"]), generator=generator)
    frames = sum(real[m][index].sum(1) for m in STREAMS)
    pools = index[frames.argsort(stable=True)].split(4 * size)
    index = torch.cat([p[torch.randperm(len(p), generator=generator)] for p in pools])
    groups = index.split(size)
    return [groups[i] for i in torch.randperm(len(groups), generator=generator)]


def batch(split: dict, index: torch.Tensor, generator: torch.Generator | None = None) -> tuple:
    """(complete, missing, real) of the clips of `index`, a CPU tensor, cut to their longest, on the split's device.

    complete: stream -> (B, T, d). missing: with a generator the same after training_masks, of STREAMS alone; without
    one None. real: stream -> bool (B, T).
    """
    complete, real, missing = {}, {}, None
    for m in streams(split):
        x, rows = split[m], split["real"][m][index]
        longest = max(1, int(rows.sum(1).max()))
        real[m] = rows[:, :longest]
        if isinstance(x, Frames):                       # files are read into the CPU's memory
            complete[m] = x.rows(index, longest).to(split["label"].device)
        else:
            complete[m] = x[:, :longest][index]
    device = complete["text"].device
    if generator is not None:
        present = training_masks(real, generator, split["lacking"])
        missing = {m: complete[m] * present[m].to(device)[..., None] for m in STREAMS}
    return complete, missing, {m: real[m].to(device) for m in real}


def training_masks(real: dict, generator: torch.Generator, lacking=()) -> dict:
    """Modality random missing, present: stream -> (B, T_m). Our choice where the papers are silent: a clip keeps one
    of the non-empty sets of the streams that it has (7, or 3 without vision), and of each stream's frames it loses a
    share from 0, 0.1, ..., 0.9. A copy that would lose its last frame keeps one, each equally likely. lacking: the
    streams that hold only zeros in the whole split. In aligned data `real` is one span for all streams, so a clip with
    zeros for one of them counts as having it."""
    held = torch.stack([real[m].any(1) & (m not in lacking) for m in STREAMS])      # (3, B)
    num_sets = 2 ** held.sum(0) - 1                     # a bit for each stream that the clip has, 0 left out
    chosen = 1 + (torch.rand(held.shape[1], generator=generator) * num_sets).long()
    bit = held.cumsum(0) - held.long()                  # which bit of `chosen` is the stream's
    available = held & (chosen >> bit & 1).bool()
    present, candidates = [], []
    for m, keeps in zip(STREAMS, available):
        rate = torch.randint(10, (len(keeps),), generator=generator).double() / 10
        candidates.append(real[m] & keeps[:, None])
        present.append(drop(candidates[-1], rate, generator))
    present, candidates = torch.cat(present, 1), torch.cat(candidates, 1)           # (B, frames of all streams)
    kept = torch.rand(candidates.shape, generator=generator).masked_fill(~candidates, -1).argmax(1)
    emptied = candidates.any(1) & ~present.any(1)
    present[emptied, kept[emptied]] = True
    return dict(zip(STREAMS, present.split([real[m].shape[1] for m in STREAMS], 1)))


def evaluation_masks(real: dict, condition: str | float, split: str, seed: int = 0) -> dict:
    """Fixed masks of a whole split: a set ("l" ... "lav") keeps its streams whole, a rate p drops that share of
    the frames of every stream. They depend on seed, split, condition and `real`, on no method."""
    if condition in SETS:
        return {m: real[m] & (m in SETS[condition]) for m in STREAMS}
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{split}/{condition:.3f}".encode()))
    return {m: drop(real[m], condition, generator) for m in STREAMS}


def drop(real: torch.Tensor, rate, generator: torch.Generator) -> torch.Tensor:
    """present (N, T): of a clip's n real frames floor(rate * n + u) are dropped, each equally likely. u is uniform in
    [0, 1), so the mean rate is exact even for clips of one frame. rate: a number or (N,)."""
    n = real.sum(1).double()
    u = torch.rand(len(real), dtype=torch.float64, generator=generator)
    number = (rate * n + u).floor()
    order = torch.rand(real.shape, generator=generator).masked_fill(~real, 2.0).argsort(1)      # padding comes last
    rank = order.argsort(1)
    return real & (rank >= number[:, None])


def distinct(sets, lacking: list[str]) -> list[str]:
    """The answerable ones of the sets, each content once: without vision {l,a,v} is {l,a}."""
    contents = {}
    for c in answerable(sets, lacking):
        contents.setdefault(frozenset(SETS[c]) - set(lacking), c)
    return list(contents.values())


def answerable(sets, lacking: list[str]) -> list[str]:
    """Those of the sets ("l" ... "lav") that name no stream which the data lacks; {l,a,v} is all that there is."""
    return [c for c in sets if c == "lav" or set(lacking).isdisjoint(SETS[c])]


# ---------------------------------------------------------------------------------- fields of a file

def feature_array(fields: dict, name: str) -> np.ndarray:
    """The field as it is, (clips, frames, features) of numbers; ValueError if it is anything else."""
    if name not in fields:
        raise ValueError(f"it has no '{name}', only {', '.join(fields)}")
    array = fields[name]
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiub" or array.ndim != 3 or 0 in array.shape:
        raise ValueError(f"'{name}' is {describe(array)}; expected numbers, (clips, frames, features)")
    return array


def read_features(array: np.ndarray, name: str, ids: list[str]) -> torch.Tensor:
    """float32 (N, T, d), a copy. -inf in audio becomes 0, as in MulT's and MultiBench's readers; whatever else is not
    finite in float32 is a ValueError that names the clip."""
    with np.errstate(all="ignore"):
        x = array.astype(np.float32, order="C")
    if name == "audio":
        x[array == -np.inf] = 0             # of the file's own numbers: -1e300 is -inf only in float32
    bad = ~np.isfinite(x).all((1, 2))
    if bad.any():
        i = int(bad.argmax())
        raise ValueError(f"'{name}' holds values that are NaN, infinite or too large for float32, first in clip "
                         f"{ids[i] if ids else i}")
    return torch.from_numpy(x)


def read_labels(fields: dict, dataset: str) -> torch.Tensor | None:
    """(N,) sentiment in [-3, 3] or (N, 4) emotions of 0 and 1, from any of the published forms; None if unlabelled."""
    key = "labels" if "labels" in fields else "regression_labels"
    if key not in fields:
        return None
    label = torch.from_numpy(np.array(fields[key], dtype=np.float32))
    held = f"of shape {tuple(label.shape)}, from {label.min():g} to {label.max():g}"
    if dataset == "iemocap":
        expected = "four yes/no emotions a clip, (N, 4) of 0 and 1 or (N, 4, 2) one-hot"
        if label.shape[1:] == (4, 2):
            label = label[..., 1]           # one-hot: no, yes
        good = label.shape[1:] == (4,) and (label == label.bool()).all()
    else:
        expected = "one sentiment a clip, in [-3, 3]"
        if label.shape[1:] == (1, 7):       # MOSEI's "All Labels": the sentiment, then six emotions
            label = label[:, 0, 0]
        good = len(label) == label.numel() and (label.abs() <= 3).all()
        label = label.flatten()
    if not good:
        raise ValueError(f"'{key}' is {held}, not {expected}")
    return label


def read_ids(fields: dict) -> list[str]:
    """'a/b/c' of the non-empty parts of each id; ids come as strings, bytes, or rows of either. [] if there is none."""
    result = []
    for row in to_list(fields.get("id", [])):
        result.append("/".join(filter(None, map(to_text, to_list(row)))))
    return result


def read_lengths(fields: dict, name: str, count: int, longest: int) -> torch.Tensor:
    """(N,) frames of each clip as the file states them, zeros where it does not."""
    key = f"{name}_lengths"
    length = np.array(fields.get(key, [0] * count), dtype=np.float64).flatten()
    if len(length) != count or not np.isin(length, range(longest + 1)).all():
        raise ValueError(f"'{key}' is not {count} whole numbers between 0 and {longest}")
    return torch.from_numpy(length).long()


def to_text(value) -> str:
    if isinstance(value, (list, tuple, dict, set, Array)):
        raise TypeError("no text")          # a list that holds itself many times would have no end
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def to_list(value) -> list | tuple:
    if isinstance(value, np.ndarray):
        value = value.tolist()
    return value if isinstance(value, (list, tuple)) else [value]


def describe(value) -> str:
    """What a field is, in words."""
    if isinstance(value, np.ndarray):
        return f"an array of {value.dtype} of shape {value.shape}"
    return f"a {type(value).__name__}"


# ---------------------------------------------------------------------------------- safe pickles

def read_pickle(path: Path, splits) -> tuple[dict, bool]:
    """split -> field -> array, list or value, of all splits that the file holds, and whether the file calls itself
    SYNTHETIC. ValueError unless `splits` are among them. Runs nothing in the file."""
    with open_file(path) as file:
        start = file.peek(20).strip()[:20]
        if start[:1] not in b"\x80(]}lcd":          # the first opcodes of pickles
            raise ValueError(f"it begins with {start}, as a web page, a pointer of Git LFS or an archive would, and is "
                             "no pickle")
        content = Unpickler(file, encoding="bytes").load()
    content = by_name(content) if isinstance(content, dict) else {}
    result = {}
    for s in SPLITS:
        if isinstance(content.get(s), dict):
            result[s] = {name: plain(value) for name, value in by_name(content[s]).items()}
    if not result or not set(splits) <= set(result):
        raise ValueError(f"it holds {', '.join(content) or 'no splits'}; expected a dict of "
                         f"{', '.join(splits or SPLITS)}, each a dict of arrays")
    return result, "SYNTHETIC" in content


class Unpickler(pickle.Unpickler):
    """Builds numpy arrays and plain containers; whatever else a pickle asks for is refused, by name."""

    def find_class(self, module, name):
        # Functions made anew for each request: a pickle may set attributes of what it is given.
        allowed = {
            "numpy.core.multiarray._reconstruct": lambda *_: Array(),
            "numpy.core.multiarray.scalar": lambda dtype, raw=b"": to_array(raw, dtype, (1,), "C")[0],
            "numpy.core.numeric._frombuffer": lambda *arguments: to_array(*arguments),      # protocol 5
            "numpy.ndarray": "ndarray",         # only handed to _reconstruct, which does not look at it
            "numpy.dtype": DType,
            "_codecs.encode": lambda text, *_: text.encode("latin1"),       # bytes in protocols 0 to 2
            "collections.OrderedDict": dict,
            "builtins.bytes": lambda: b"",
        }
        key = f"{module}.{name}".replace("numpy._core", "numpy.core").replace("__builtin__", "builtins")
        if key not in allowed:
            raise ValueError(f"it asks for {module}.{name}, which is no array; nothing was run")
        return allowed[key]


class DType:
    """Stands in for numpy.dtype while a pickle is read: plain numbers, strings and objects only. numpy's own takes
    flags from the file, by which raw bytes could pose as pointers to objects."""

    def __init__(self, code, *_):
        code = to_text(code)
        if not re.fullmatch(r"[<>|=]?([fiubSU]\d+|\?|O8?)", code):
            raise ValueError(f"an array of type {code} is not of numbers or strings")
        self.dtype = np.dtype(code)

    def __setstate__(self, state):
        self.dtype = self.dtype.newbyteorder(to_text(state[1]))


class Array:
    """Stands in for numpy.ndarray while a pickle is read; `value` is the array itself, a view of the bytes read, or a
    list of objects."""
    value = None

    def __setstate__(self, state):
        _, shape, dtype, fortran, raw = state
        self.value = to_array(raw, dtype, shape, "F" if fortran else "C")


def to_array(raw, dtype: DType, shape: tuple, order: str) -> np.ndarray | list:
    """The array of these bytes; of objects a list, of lists where the array has more dimensions."""
    if dtype.dtype.hasobject:
        return np.fromiter(raw, object).reshape(shape, order=order).tolist()
    return np.frombuffer(raw, dtype.dtype).reshape(shape, order=order)


def plain(value):
    """A field without the stand-ins: an array of numbers or strings, a list, or the value as it is. A list's items are
    freed of them too, but not the lists inside it: one that holds itself would have no end."""
    value = unwrap(value)
    return [unwrap(item) for item in value] if isinstance(value, (list, tuple)) else value


def by_name(fields: dict) -> dict:
    """The dict with its keys as text: Python 2 wrote bytes."""
    return {to_text(key): value for key, value in fields.items()}


def unwrap(value):
    """The array of an Array, any other value as it is."""
    return value.value if isinstance(value, Array) else value


# ---------------------------------------------------------------------------------- feature folders

def load_folders(features: dict, labels: Path, splits, limit: int | None) -> tuple[dict, dict]:
    """The splits over feature folders (stream -> folder), and their source."""
    if absent := [m for m in STREAMS if m not in features]:
        raise DataError(f"--features lacks {', '.join(absent)}: give text=DIR audio=DIR vision=DIR, if you have it "
                        f"{SIMULATED}=DIR, and --labels FILE.")
    corpus = read_corpus(labels)
    notes = shared("clips", {s: ids for s, (ids, _) in corpus.items()})
    digest = hashlib.sha256(labels.read_bytes())
    result = {}
    for s, (ids, label) in corpus.items():
        lengths = {}
        for m in streams(features):
            lengths[m] = frame_counts(Path(features[m]), ids)
            digest.update(repr((m, ids, lengths[m].tolist())).encode())
        if s not in splits:
            continue
        longest = torch.stack(list(lengths.values())).amax(0)[:limit]
        most = MAX_FRAMES if s == "train" else math.inf
        index = (longest <= most).nonzero()[:, 0]
        if len(index) == 0:
            raise DataError(f"All training clips have more than {MAX_FRAMES} frames (MAX_FRAMES in data.py).")
        if number := len(longest) - len(index):
            notes.append(f"{number} training clips of more than {MAX_FRAMES} frames are left out")
        kept = [ids[i] for i in index.tolist()]
        result[s] = split = {"real": {}, "label": label[index], "id": kept, "lacking": []}
        for m, length in lengths.items():
            split[m] = Frames(Path(features[m]), kept, length[index])
            split["real"][m] = torch.arange(split[m].shape[1]) < length[index, None]
    folders = " ".join(f"{m}={folder}" for m, folder in features.items())
    source = {"file": printable(f"features {folders} labels={labels}", 600), "sha256": digest.hexdigest(),
              "synthetic": False, "sizes": [len(ids) for ids, _ in corpus.values()], "notes": notes}
    return result, source


class Frames:
    """One stream of feature files in the place of a tensor (N, T, d): `rows` reads the clips that a batch asks for.
    length (N,): frames of each clip."""

    def __init__(self, folder: Path, ids: list[str], length: torch.Tensor):
        self.folder, self.ids, self.length = folder, ids, length
        width = open_npy(frame_files(folder / ids[0])[0]).shape[1]      # `rows` compares the other clips with it
        self.shape = len(ids), int(length.max()), width

    def rows(self, index: torch.Tensor, longest: int) -> torch.Tensor:
        """float32 (len(index), longest, d), padded behind; DataError if a file is not as it was."""
        width = self.shape[2]
        x = torch.zeros(len(index), longest, width)
        for row, i in enumerate(index.tolist()):
            clip, length = self.folder / self.ids[i], int(self.length[i])
            expected = f"Expected {length} frames of {width} numbers, finite in float32."
            with reading(clip, expected), np.errstate(over="ignore"):
                array = np.concatenate([open_npy(path) for path in frame_files(clip)]).astype(np.float32)
                if array.shape != (length, width) or not np.isfinite(array).all():
                    raise ValueError(f"it holds {describe(array)}, or numbers that are not finite")
            x[row, :length] = torch.from_numpy(array[:longest])
        return x


def frame_counts(folder: Path, ids: list[str]) -> torch.Tensor:
    """(N,) frames of each clip: of one file as many as it holds, else one a file."""
    counts = []
    for clip in ids:
        files = frame_files(folder / clip)
        counts.append(len(open_npy(files[0])) if len(files) == 1 else len(files))
    return torch.tensor(counts)


def frame_files(clip: Path) -> list[Path]:
    """<clip>.npy, or the files in the folder <clip>, 2.npy before 10.npy."""
    alone = clip.with_name(f"{clip.name}.npy")
    if alone.is_file():
        return [alone]
    files = sorted(clip.glob("[!.]*.npy"), key=lambda path: (len(path.name), path.name))
    if not files:
        raise DataError(f"There is no {alone} and no folder {clip.name} of .npy files beside it.")
    return files


def open_npy(path: Path) -> np.ndarray:
    """(frames, features) of one file, not yet read."""
    with reading(path, "Expected an .npy file of numbers, (frames, features) or (features,)."):
        return np.atleast_2d(np.load(path, mmap_mode="r"))


def read_corpus(path: Path) -> dict:
    """split -> (ids, sentiment (N,)) of Double-Flow's label file: an .npz of train_corpus, val_corpus and test_corpus,
    each a pickled dict clip -> {"emo", "val"}. Read as every pickle here: nothing in it runs."""
    result = {}
    with reading(path, "Expected an .npz of train_corpus, val_corpus, test_corpus: dicts clip -> {emo, val}."):
        with open_file(path) as whole, zipfile.ZipFile(whole) as archive:
            for split, name in zip(SPLITS, ("train_corpus", "val_corpus", "test_corpus")):
                with archive.open(f"{name}.npy") as file:
                    file.readline()                     # numpy's header, which ends in a new line
                    corpus = plain(Unpickler(file, encoding="bytes").load())
                label = torch.tensor([float(plain(facts["val"])) for facts in corpus.values()])
                if not corpus or not (label.abs() <= 3).all():
                    raise ValueError(f"{split} is empty, or leaves the range [-3, 3]")
                result[split] = list(map(to_text, corpus)), label
    return result


# ---------------------------------------------------------------------------------- the stand-in

# Measured on MOSI where known, else from the data sets' papers: label mean and deviation before clipping, share of
# zeros (IEMOCAP: the share of each emotion); median and spread of the log length. The strengths are calibrated, so that
# text tells most of the label and audio and vision a part.
_LABELS = {
    "mosi": ((.25, 1.62, .04), (.33, 1.78, .05), (-.34, 1.72, .04)),
    "mosei": ((.25, 1.15, .22),) * 3,
    "iemocap": ((.36, .25, .20, .19), (.36, .25, .20, .19), (.409, .144, .206, .241)),
}
_LENGTHS = {"mosi": (50, 11, .64), "mosei": (50, 19, .6), "iemocap": (20, 12, .5)}
_STRENGTH = {"text": 2.0, "audio": .65, "vision": .5}


def stand_in(dataset: str, split: str) -> dict:
    """Made-up features in the real sizes, as MulT's pickle holds them. Each stream carries the label plus noise of the
    clip and stream: little noise in text, more in audio and vision, so each holds a part that the others lack."""
    position = SPLITS.index(split)
    n = SIZES[dataset][position]
    longest, median, spread = _LENGTHS[dataset]
    rng = np.random.default_rng([0, zlib.crc32(dataset.encode()), position])
    length = np.clip(np.rint(median * np.exp(spread * rng.standard_normal(n))), 2, longest).astype(int)
    labels, signal = random_labels(_LABELS[dataset][position], n, rng)
    fields = {"labels": labels}
    for m in STREAMS:
        cues = _STRENGTH[m] * signal + rng.standard_normal(signal.shape)
        common = np.random.default_rng([0, zlib.crc32(f"{dataset}/{m}".encode())])      # the same in all splits
        fields[m] = random_frames(GLOVE[m], common, cues, length, longest, rng)
    ids = np.array([[f"{split}{i}", "0", "1"] for i in range(n)])
    return {**fields, "id": ids.astype("S") if dataset == "mosi" else ids}


def random_labels(measured: tuple, n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Labels as MulT's file holds them, and what of them the features shall carry, (n, 1) or (n, 4). measured: the
    split's numbers in _LABELS."""
    if len(measured) == len(EMOTIONS):
        labels = np.eye(4, dtype=np.float32)[rng.choice(4, n, p=measured)]
        return np.stack((1 - labels, labels), -1), labels - .25
    mean, deviation, zeros = measured
    y = np.clip(np.rint(5 * rng.normal(mean, deviation, n)) / 5, -3, 3)
    y[y == 0] = rng.choice([-.2, .2], (y == 0).sum())   # the share of zeros is set, not left to rounding
    y[rng.random(n) < zeros] = 0
    return y.astype(np.float32).reshape(n, 1, 1), y[:, None] / 1.5


def random_frames(width: int, common, cues: np.ndarray, length: np.ndarray, longest: int, rng):
    """Front-padded float32 array (N, longest, width): a frame is a mix of 12 hidden factors. In a few frames of a clip
    the first factor is raised, and the next k carry `cues` (N, k). `common` draws the mix, rng the frames."""
    mix, scale = common.standard_normal((12, width)), 10 ** common.uniform(-1, 1, width)
    offset = scale * common.standard_normal(width)
    x = np.zeros((len(cues), longest, width), np.float32)
    for i in range(0, len(cues), CHUNK):
        n = length[i:i + CHUNK, None]
        factors = rng.standard_normal((len(n), longest, 12)).astype(np.float32)
        marks = rng.random((len(n), longest)) < .2
        marks[np.arange(len(n)), -1 - rng.integers(0, n[:, 0])] = True          # at least one frame
        factors[..., 0] += 3 * marks
        factors[..., 1:1 + cues.shape[1]] += 1.5 * marks[..., None] * cues[i:i + CHUNK, None]
        frames = factors @ np.float32(mix * scale)
        frames += rng.standard_normal(frames.shape, np.float32) * np.float32(scale) + np.float32(offset)
        frames[np.arange(longest) < longest - n] = 0
        x[i:i + CHUNK] = frames
    return x


# ---------------------------------------------------------------------------------- mistakes

def run_program(work, stopped: str) -> int:
    """The exit code of work(): 0; 2 after a user's mistake or an OSError, said on stderr; 130 after Ctrl-C, with
    `stopped` said; 141 where nobody reads stdout any more."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):      # a path may hold what the terminal cannot show; a log is read at once
            stream.reconfigure(errors="backslashreplace", line_buffering=True)
    try:
        work()
        return 0
    except BrokenPipeError:                     # | head: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\n{stopped}", file=sys.stderr)
        return 130


@contextlib.contextmanager
def reading(what, advice: str):
    """Whatever reading `what` raises becomes one DataError: a damaged file can make a library raise anything."""
    try:
        yield
    except DataError:
        raise
    except OSError as error:
        raise DataError(f"{what} cannot be read: {error.strerror or error}.") from None
    except Exception as error:
        reason = str(error).rstrip(".") or type(error).__name__
        raise DataError(f"{what} is refused: {reason}. {advice}") from None


def open_file(path: Path):
    """The file, open to be read in binary. What is no regular file is refused: a FIFO would wait for ever."""
    if not path.is_file():
        raise DataError(f"{path} is no regular file." if path.exists() else f"{path} does not exist.")
    return open(path, "rb")


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write(path: Path, content: bytes) -> None:
    """Write a file whole or not at all: a reader never sees half of it. DataError, and nothing left behind, if it
    cannot be written."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError as error:
        raise DataError(f"{path} cannot be written: {error.strerror}.") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def check_writable(folder: Path) -> None:
    """A DataError if no file can be made in this folder."""
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise DataError(f"Nothing can be written into {folder}: {error.strerror}.") from None


class DataError(Exception):
    """A user's mistake in one or two sentences; str() is one printable line, whatever a file has put into it."""

    def __str__(self) -> str:
        return printable(super().__str__(), 600)


def printable(text: str, most: int = 100) -> str:
    """A file's own text made safe for a terminal: at most `most` characters, no control ones."""
    text = "".join(c if c.isprintable() else " " for c in text)
    return text if len(text) <= most else f"{text[:most * 2 // 3]} ... {text[-most // 5:]}"


# ---------------------------------------------------------------------------------- command line

def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\nFormats")[0],
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for work in (check, convert, synthesize):
        command = commands.add_parser(work.__name__)
        command.set_defaults(work=work)
        if work is synthesize:
            command.add_argument("dataset", choices=SIZES)
        else:
            command.add_argument("path", type=Path)
        if work is not check:
            command.add_argument("--out", type=Path, required=True, metavar="DIR")
    args = vars(parser.parse_args(argv))
    work = args.pop("work")
    return run_program(lambda: work(**args), "stopped")


def check(path: Path) -> None:
    """Print what one file is; DataError on what is wrong with it."""
    loaded = load(None, path, None, normalize=False)
    source = loaded["source"]
    print(f"{identity(source)}, labels as of {loaded['dataset']}")
    for s in filter(loaded.get, SPLITS):
        split, label = loaded[s], loaded[s]["label"]
        labels = "no labels" if label is None else f"labels from {label.min():.1f} to {label.max():.1f}"
        print(f"  {s}: {len(split['text'])} clips, {labels}")
        for m in streams(split):
            frames = split["real"][m].sum(1).float()
            print(f"    {m:6s} {tuple(split[m].shape)}, {frames.mean():.1f} real frames a clip")
    if absent := [s for s in SPLITS[:2] if s not in loaded]:
        source["notes"].append(f"no {' and no '.join(absent)}: train.py refuses this file, eval.py takes it")
    _, compared = comparison({**loaded, "limit": None}, source, GLOVE)
    for note in (*source["notes"], f"CorrKD, UMDF: {compared or 'the features and splits of the papers'}"):
        print(f"  note: {note}")


def convert(path: Path, out: Path) -> None:
    """Write the .h5 files of MOSI that MFN (github.com/pliang279/MFN) has in its folder data as a pickle: X_train.h5,
    y_train.h5 and so on, each with one dataset `data`. A clip's last 20 words, padded in front: 300 columns of text
    (GloVe), 5 of audio (COVAREP), 20 of vision (Facet); y is the sentiment."""
    try:
        import h5py
    except ImportError:
        raise DataError("convert needs h5py, which is not installed: pip install h5py.") from None
    content = {}
    for s, n in zip(SPLITS, SIZES["mosi"]):
        arrays = []
        for name, shape in ((f"X_{s}.h5", (n, 20, 325)), (f"y_{s}.h5", (n, 1, 1))):
            advice = f"MFN's file of MOSI holds {n} clips: download it again."
            with reading(path / name, advice), open_file(path / name) as raw, h5py.File(raw) as file:
                own = isinstance(file.get("data", getlink=True), h5py.HardLink)
                if not own or file["data"].external or file["data"].is_virtual:
                    raise ValueError("it has no dataset `data` of its own")
                arrays.append(file["data"][()].astype(np.float32).reshape(shape))
        x, labels = arrays
        content[s] = dict(zip(STREAMS, np.split(x, (300, 305), axis=2)), labels=labels)
    print(f"wrote {write_new(out / 'mosi_data.pkl', content)}")


def synthesize(dataset: str, out: Path) -> None:
    """Write the stand-in as a pickle in MulT's layout."""
    content = {**{s: stand_in(dataset, s) for s in SPLITS}, "SYNTHETIC": SYNTHETIC}
    print(f"wrote {write_new(out / FILES[dataset][0], content)}: {SYNTHETIC}, not {dataset}")


def write_new(path: Path, content: dict) -> Path:
    """Write a pickle, never over a file."""
    if path.exists():
        raise DataError(f"{path} exists already, and is left as it is. Name another folder, or remove it.")
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, pickle.dumps(content, protocol=4))
    return path


if __name__ == "__main__":
    sys.exit(main())
