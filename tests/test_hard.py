"""Hostile and damaged files, kills, full disks, two processes, extreme numbers, leakage, determinism.

The slow half is marked `long` and runs by `python -m pytest -q -m long` alone.
"""
import copyreg
import json
import multiprocessing
import os
import pickle
import random
import signal
import struct
import time
import tracemalloc
import warnings

import numpy as np
import pytest
import torch

import data
import eval as evaluation
import train
from data import SPLITS, STREAMS, DataError
from helpers import ROOT, Call, begun, content, equal, history, learnable, parameters, run, written

# ------------------------------------------------------------------------------------- hostile pickles


def call(module, name, *arguments):
    """module.name(*arguments) in opcodes, strings as arguments; protocol 0, so by no name that need exist here."""
    return f"c{module}\n{name}\n(".encode() + b"".join(b"V" + a.encode() + b"\n" for a in arguments) + b"tR."


def nested(levels, width):
    value = [0]
    for _ in range(levels):
        value = [value] * width
    return value


def inside(payload, place="text"):
    """A pickle whose train split holds the payload, given as opcodes without the final stop."""
    return b"\x80\x03}X\x05\x00\x00\x00train}X" + struct.pack("<I", len(place)) + place.encode() + payload + b"ssX\x05\x00\x00\x00valid}sX\x04\x00\x00\x00test}s."


NUMPY = [("numpy", "load"), ("numpy", "fromfile"), ("numpy", "memmap"), ("numpy", "genfromtxt"), ("numpy", "save"), ("numpy.testing._private.utils", "runstring"),
         ("numpy.f2py", "compile"), ("numpy.core.multiarray", "fromfile"), ("numpy.lib.npyio", "NpzFile"), ("numpy._core.multiarray", "frombuffer"),
         ("numpy.ctypeslib", "load_library"), ("numpy.lib.utils", "safe_eval")]
HOSTILE = {
    # name: (opcodes, what the refusal must say)
    **{f"{m}.{n}": (call(m, n, "touch GOTCHA"), f"asks for {m}.{n},") for m, n in (
        ("os", "system"), ("posix", "system"), ("nt", "system"), ("subprocess", "Popen"), ("subprocess", "call"), ("builtins", "eval"), ("builtins", "exec"),
        ("__builtin__", "eval"), ("builtins", "open"), ("builtins", "getattr"), ("builtins", "__import__"), ("builtins", "compile"), ("builtins", "input"),
        ("importlib", "import_module"), ("runpy", "run_path"), ("pickle", "loads"), ("_pickle", "loads"), ("marshal", "loads"), ("types", "FunctionType"),
        ("functools", "partial"), ("operator", "attrgetter"), ("shutil", "rmtree"), ("pathlib", "Path"), ("webbrowser", "open"), ("socket", "socket"),
        ("ctypes", "CDLL"), ("pty", "spawn"), ("timeit", "timeit"), ("code", "interact"), ("data", "read_pickle"), ("torch", "load"), ("torch.hub", "load"),
        ("codecs", "decode"), ("_codecs", "lookup"), ("collections", "namedtuple"), ("sys", "exit"), *NUMPY)},
    "dotted name": (b"\x80\x04\x8c\x15numpy.core.multiarray\x8c\x1c_reconstruct.__globals__.get\x93.", "_reconstruct.__globals__.get"),
    "class by STACK_GLOBAL": (b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x0ctouch GOTCHA\x85R.", "asks for os.system"),
    "INST": (b"(Vtouch GOTCHA\nios\nsystem\n.", "asks for os.system"),
    "OBJ": (b"(cos\nsystem\nVtouch GOTCHA\no.", "asks for os.system"),
    "NEWOBJ": (b"\x80\x02cos\nsystem\nVtouch GOTCHA\n\x85\x81.", "asks for os.system"),
    "reduce in a reduce": (b"cnumpy\nndarray\n0(cnumpy.core.multiarray\n_reconstruct\n(cos\nsystem\n(Vtouch GOTCHA\ntRtR.", "asks for os.system"),
    "in a dtype": (b"cnumpy\ndtype\n(cos\nsystem\n(Vtouch GOTCHA\ntRtR.", "asks for os.system"),
    "as a state": (b"cnumpy.core.multiarray\n_reconstruct\n(tRcos\nsystem\n(Vtouch GOTCHA\ntRb.", "asks for os.system"),
    "as a dict's key": (b"}cos\nsystem\n(Vtouch GOTCHA\ntRI1\ns.", "asks for os.system"),
    "in a set": (b"cbuiltins\nset\n((lcos\nsystem\n(Vtouch GOTCHA\ntRatR.", "asks for os.system"),
    "behind the end": (pickle.dumps(content(), 4) + call("os", "system", "touch GOTCHA"), "bytes follow where it should end"),
    "persistent id": (b"Pos.system\n.", "begins with Pos.system"),
    "binary persistent id": (b"\x80\x02X\x09\x00\x00\x00os.systemQ.", "unsupported persistent id"),
    "extension code, unknown": (b"\x80\x02\x82\x7b.", "ValueError"),
    "extension code of os.system": (b"\x80\x02\x82\xf1(Vtouch GOTCHA\ntR.", "asks for os.system"),
    "out-of-band buffer": (b"\x80\x05\x97.", "out-of-band"),
    "attributes of what is handed out": (b"cnumpy\ndtype\n(N}Vdtype\nVGOTCHA\nstb.", ""),
    "a class's attributes": (b"ccollections\nOrderedDict\n(N}Vupdate\nVGOTCHA\nstb.", ""),
    "a memo that is not there": (b"\x80\x02h\x07.", ""),
    "a memo of a huge index": (b"\x80\x02]r\xff\xff\xff\x7f.", "holds a list"),
    "a string of 2 GB": (b"\x80\x02X\xff\xff\xff\x7fabc.", "too early"),
    "bytes of 8 EB": (b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7fabc.", ""),
    "a bytearray of 64 GB": (b"\x80\x05\x96\x00\x00\x00\x00\x10\x00\x00\x00abc.", ""),
    "a frame of 64 GB": (b"\x80\x04\x95\x00\x00\x00\x00\x10\x00\x00\x00abc.", "is refused"),
    "a number of 2 GB": (b"\x80\x02\x8b\xff\xff\xff\x7fabc.", ""),
    "a number of a million digits": (b"(I" + b"9" * 10 ** 6 + b"\nl.", "ValueError"),
    "huge keys": (b"\x80\x02}\x8b" + struct.pack("<I", 10 ** 5) + b"\x7f" * 10 ** 5 + b"I1\ns.", "a dict of int"),
    "lists of lists of lists": (pickle.dumps({s: {"text": nested(40, 10)} for s in SPLITS}), "deeper than any data set"),
    "a wide memo bomb": (pickle.dumps({s: {"text": nested(4, 1000)} for s in SPLITS}), "more values than it has bytes"),
    "a list that holds itself": (inside(b"]q\x00h\x00a"), "deeper"),
    "deep nesting": (b"\x80\x02" + b"]" * 10 ** 5 + b"a" * (10 ** 5 - 1) + b".", "holds a list"),
    "array of 10^13 values": (pickle.dumps({"train": Call(np.ndarray.__reduce__(np.zeros(0))[0], (np.ndarray, (10 ** 13,), b"b"))}), ""),
    "shape that overflows": (inside(b"cnumpy.core.multiarray\n_reconstruct\n(tR(I1\n(I4294967296\nI4294967296\ntcnumpy\ndtype\n(Vf4\ntRI00\nC\x04abcdtb"), "comes with data for 1 values"),
    "shape of -1": (inside(b"cnumpy.core.multiarray\n_reconstruct\n(tR(I1\n(I-1\nI-1\ntcnumpy\ndtype\n(Vf4\ntRI00\nC\x04abcdtb"), "comes with data"),
    "dtype with fields": (pickle.dumps(np.zeros(3, [("a", "f4"), ("b", "O")])), "type"),
    "dtype of a terabyte": (inside(b"cnumpy.core.multiarray\n_reconstruct\n(tR(I1\n(I1\ntcnumpy\ndtype\n(VS1099511627776\ntRI00\nC\x04abcdtb"), ""),
    "array without data": (inside(b"cnumpy.core.multiarray\n_reconstruct\n(tR"), "without data"),
    "split's name with a terminal's commands": (b"\x80\x02}X\x09\x00\x00\x00\x1b]0;hi\x07\n\nK\x01s.", "a dict of"),
}
SHELLS = {f"protocol {p}: {name}": (pickle.dumps({**content(), "extra": what}, protocol=p), said) for p in range(6) for name, what, said in (
    ("os.system", Call(os.system, ("touch GOTCHA",)), "system"), ("in an object array", np.array([1, Call(os.system, ("touch GOTCHA",))], dtype=object), "system"),
    ("an import", Call(__import__, ("os",)), "__import__"))}


@pytest.mark.parametrize("name", [*HOSTILE, *SHELLS, "torch legacy", "torch zip"])
def test_a_hostile_pickle_executes_nothing_and_is_refused_by_name(tmp_path, monkeypatch, name):
    """Nothing is called, no file appears, no class is changed; within 200 MB, and in seconds where memory is traced."""
    monkeypatch.chdir(tmp_path)
    if name in ("torch legacy", "torch zip"):
        torch.save({"train": Call(eval, ("open('GOTCHA', 'w')",))}, tmp_path / "x.pkl", _use_new_zipfile_serialization="zip" in name)
        said = "bytes follow where it should end" if "legacy" in name else "is refused"
    else:
        raw, said = {**HOSTILE, **SHELLS}[name]
        (tmp_path / "x.pkl").write_bytes(raw)
    if "of os.system" in name:
        copyreg.add_extension("os", "system", 0xf1)
    before, began = dict(vars(data._DType)), time.perf_counter()
    tracemalloc.start()
    try:
        with pytest.raises(DataError) as error:
            data.read_pickle(tmp_path / "x.pkl")
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        if "of os.system" in name:
            copyreg.remove_extension("os", "system", 0xf1)
    text = str(error.value)
    assert said in text and text.isprintable() and len(text) <= 600, text
    assert os.listdir() == ["x.pkl"] and dict(vars(data._DType)) == before
    assert time.perf_counter() - began < 20 and peak < 2e8, peak      # of a file of at most a megabyte


def test_there_are_at_least_forty_hostile_pickles():
    assert len(HOSTILE) + len(SHELLS) + 2 >= 100


# ------------------------------------------------------------------------------------- damaged files

def damage(raw: bytes, draw: random.Random) -> bytes:
    """One to three of: a bit flipped, a byte replaced, a piece cut out, doubled, or zeroed, the end cut off."""
    raw = bytearray(raw)
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        i, n = draw.randrange(len(raw)), int(draw.choice((1, 1, 2, 4, 8, 16, 100, 1000)))
        kind = draw.choice("flip flip flip byte byte cut double zero end".split())
        if kind == "flip":
            raw[i] ^= 1 << draw.randrange(8)
        elif kind == "byte":
            raw[i] = draw.randrange(256)
        elif kind == "end":
            del raw[i:]
        else:
            raw[i:i + n] = {"cut": b"", "double": raw[i:i + n] * 2, "zero": bytes(len(raw[i:i + n]))}[kind]
        if not raw:
            break
    return bytes(raw)


@pytest.mark.parametrize("form", ["protocol 0", "protocol 2", "protocol 4", "protocol 5"])
def test_a_damaged_file_loads_the_same_clips_or_is_told_in_a_sentence(tmp_path, form):
    """500 times for each form. Values may differ, which only the SHA-256 can tell; a file without ids says so."""
    whole = pickle.dumps(content(n=4, lengths=(3, 3, 3)), protocol=int(form.split()[1]))
    path, draw, told, same = tmp_path / "mosi_data.pkl", random.Random(form), 0, 0
    path.write_bytes(whole)
    good = data.load("mosi", path, SPLITS)
    for round_ in range(500):
        raw = damage(whole, draw)
        path.write_bytes(raw)
        began = time.perf_counter()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")      # a damaged file is no reason for one either
                got = data.load("mosi", path, SPLITS)
        except DataError as error:
            assert str(error).isprintable() and len(str(error)) <= 600, round_
            told += 1
        else:
            same += 1
            assert (got["dims"], got["aligned"]) == (good["dims"], good["aligned"]), round_
            for s in SPLITS:
                assert len(got[s]["label"]) == 4 and (got[s]["label"].abs() <= 3).all(), round_
                assert all(got[s][m].shape == good[s][m].shape and got[s][m].isfinite().all() for m in STREAMS), round_
                if got[s]["id"]:
                    assert len(got[s]["id"]) == 4 and sum(a != b for a, b in zip(got[s]["id"], good[s]["id"])) <= 3, round_
                else:
                    assert any(f"{s} has no ids" in note for note in got["source"]["notes"]), round_
            if raw != whole:
                assert got["source"]["sha256"] != good["source"]["sha256"], round_
        assert time.perf_counter() - began < 5, round_
    assert told > 100 and same > 50, (told, same)


def test_a_damaged_file_ends_the_program_with_code_2(tmp_path, capsys):
    whole, draw, codes = pickle.dumps(learnable(n=12)), random.Random(0), []
    for _ in range(15):
        written(tmp_path / "data", damage(whole, draw))
        codes.append(run(tmp_path, "--dry-run"))
        said = capsys.readouterr().err
        assert (codes[-1], len(said.splitlines())) in ((0, 0), (2, 1)), said
    assert set(codes) == {0, 2}


# ------------------------------------------------------------------------------------- kills, full disks, two processes

def short(folder, *more):
    return train.main(["--method", "corrkd", "--dataset", "mosi", "--data-dir", str(folder / "data"), "--out", str(folder / "runs"), "--epochs", "5", "--lr", "0.004",
                       "--batch-size", "8", "--device", "cpu", "--seeds", "1", *more])


def in_child(folder, before=lambda: None):
    """A process that trains; started by a fork, so that torch need not be imported again. In one thread: the threads that
    the tests before have started do not come along, and a child that counts on them waits for ever."""
    def work():
        torch.set_num_threads(1)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        before()
        os._exit(short(folder))
    child = multiprocessing.get_context("fork").Process(target=work)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)     # of forking where threads run
        child.start()
    return child


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    written(folder / "data", learnable(n=24))
    child = in_child(folder)
    child.join(120)
    assert child.exitcode == 0
    return folder


def same_end(folder, whole):
    """Log, best checkpoint, last checkpoint and results are those of the run that nobody stopped."""
    a, b = (f / "runs" / "mosi/corrkd/s1" for f in (folder, whole))
    assert (a / "log.jsonl").read_bytes() == (b / "log.jsonl").read_bytes() and {p.name for p in a.iterdir()} == {p.name for p in b.iterdir()}
    for name in ("model.pt", "last.pt"):
        x, y = (torch.load(f / name, weights_only=True) for f in (a, b))
        assert equal(x["model"], y["model"]) and x["epoch"] == y["epoch"]
    results = []
    for f in (a, b):
        assert evaluation.main([str(f), "--rates", "0", "0.5", "1", "--data-dir", str(whole / "data")]) == 0
        results.append({k: v for k, v in json.loads((f / "results.json").read_text()).items() if k not in ("checkpoint_sha256", "run", "data")})
        (f / "results.json").unlink()
    assert results[0] == results[1]


posix = pytest.mark.skipif(os.name != "posix", reason="forks and sends POSIX signals")


def some(quick, *every):
    """Each of `every`, those that are not `quick` marked long."""
    return [pytest.param(*one, marks=() if one in quick else pytest.mark.long) for one in every]


MOMENTS = [(n, m) for n in ("config.json", "model.pt", "last.pt", "log.jsonl") for m in ("half written", "written, not renamed", "renamed")]


@posix
@pytest.mark.parametrize("name, moment", some((MOMENTS[7],), *MOMENTS))
def test_a_kill_while_a_file_is_written(uninterrupted, tmp_path, name, moment, one_thread):
    """At the second and at the last write of each file (the first ones of model.pt, the only one of config.json), then the
    same command again."""
    (tmp_path / "data").symlink_to(uninterrupted / "data")
    last = tmp_path / "runs" / "mosi/corrkd/s1" / "last.pt"
    for nth in (1,) if name == "config.json" else (1, 1) if name == "model.pt" else (2, None):
        if nth is None:
            nth = 10 - len(torch.load(last, weights_only=True)["history"])      # five epochs in each of two stages
        def before(seen=[]):
            replace = os.replace

            def stopping(a, b):
                if str(b).endswith(name):
                    seen.append(b)
                if len(seen) != nth or not str(b).endswith(name):
                    return replace(a, b)
                if moment == "half written":
                    os.truncate(a, 100)
                if moment == "renamed":
                    replace(a, b)
                os.kill(os.getpid(), signal.SIGKILL)
            data.os.replace = stopping
        child = in_child(tmp_path, before)
        child.join(120)
        assert child.exitcode == -signal.SIGKILL
    child = in_child(tmp_path)
    child.join(120)
    assert child.exitcode == 0
    same_end(tmp_path, uninterrupted)


@posix
@pytest.mark.long
def test_thirty_kills_at_random_moments(uninterrupted, tmp_path, one_thread):
    (tmp_path / "data").symlink_to(uninterrupted / "data")
    draw, killed = random.Random(0), 0
    began = time.perf_counter()
    child = in_child(uninterrupted)     # finished already: how long a start takes
    child.join(120)
    start = time.perf_counter() - began
    while killed < 30:
        child = in_child(tmp_path)
        child.join(start * draw.uniform(.2, 2.5))
        if child.exitcode is None:
            child.kill()
            child.join(120)
            killed += 1
        elif child.exitcode == 0:       # it came to its end before it was killed often enough: once more from the beginning
            same_end(tmp_path, uninterrupted)
            for path in (tmp_path / "runs" / "mosi/corrkd/s1").iterdir():
                path.unlink()
    child = in_child(tmp_path)
    child.join(120)
    assert child.exitcode == 0
    same_end(tmp_path, uninterrupted)


@posix
def test_a_second_process_in_a_run_folder_is_refused(uninterrupted, tmp_path, one_thread, capsys):
    (tmp_path / "data").symlink_to(uninterrupted / "data")
    (tmp_path / "runs" / "mosi/corrkd/s1").mkdir(parents=True)
    import fcntl
    held = os.open(tmp_path / "runs" / "mosi/corrkd/s1", os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    for more in ((), ("--no-resume",)):
        assert short(tmp_path, *more) == 2
        error = capsys.readouterr().err
        assert "in use by another process" in error and len(error.splitlines()) == 1 and not list((tmp_path / "runs" / "mosi/corrkd/s1").iterdir())
    os.close(held)
    child = in_child(tmp_path)
    child.join(120)
    assert child.exitcode == 0
    same_end(tmp_path, uninterrupted)


@pytest.fixture
def one_thread():
    """As many as the runs in children have, so that numbers are the same to the last bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@posix
def test_a_disk_that_is_full_and_a_folder_that_vanishes(uninterrupted, tmp_path, one_thread, monkeypatch, capsys):
    """/dev/full answers as a full disk does; the last good checkpoint stays, and the same command goes on later."""
    (tmp_path / "data").symlink_to(uninterrupted / "data")
    folder, store = tmp_path / "runs" / "mosi/corrkd/s1", train.save_epoch

    def filling(folder, state, best):
        if len(state["history"]) == 7:
            (folder / f"last.pt.{os.getpid()}.tmp").symlink_to("/dev/full")
        store(folder, state, best)
    if os.path.exists("/dev/full"):
        monkeypatch.setattr(train, "save_epoch", filling)
        assert short(tmp_path) == 2
        error = capsys.readouterr().err
        assert "last.pt cannot be written: No space left on device" in error and len(error.splitlines()) == 1
        assert len(history(tmp_path)) == 6 and torch.load(folder / "last.pt", weights_only=True)["epoch"] == 1 and not list(folder.glob("*.tmp"))
    monkeypatch.setattr(train, "save_epoch", lambda f, state, best: (folder.rename(tmp_path / "away") if len(state["history"]) == 8 else None, store(f, state, best)))
    assert short(tmp_path) == 2
    error = capsys.readouterr().err
    assert "cannot be written: No such file or directory" in error and len(error.splitlines()) == 1
    (tmp_path / "away").rename(folder)
    monkeypatch.undo()
    assert short(tmp_path) == 0
    assert history(tmp_path) == history(uninterrupted)


# ------------------------------------------------------------------------------------- checkpoints

def test_a_checkpoint_that_does_not_belong_is_refused(uninterrupted, tmp_path, capsys):
    """In a run folder (to go on from, or as the run that is evaluated), each told in a sentence."""
    (tmp_path / "data").symlink_to(uninterrupted / "data")
    assert run(tmp_path, epochs="1") == 0 and run(tmp_path, epochs="1", method="umdf") == 0
    folder, other = (tmp_path / "runs" / f"mosi/{m}/s1" for m in ("corrkd", "umdf"))
    good = {name: (folder / name).read_bytes() for name in ("model.pt", "last.pt")}
    own = torch.load(folder / "model.pt", weights_only=True)

    def altered(**changes):
        last = torch.load(folder / "last.pt", weights_only=True)
        record = {k: changes.pop(k) for k in list(changes) if k in last["run"]}
        torch.save({**last, "run": {**last["run"], **record}, **changes}, tmp_path / "altered.pt")
        return (tmp_path / "altered.pt").read_bytes()
    wide = {**own["run"]["dims"], "text": 7}
    for raw, said in (((other / "last.pt").read_bytes(), "differs in method"), (altered(dims=wide), "differs in dims"), (altered(dataset="mosei"), "differs in dataset"),
                      (altered(data={**own["run"]["data"], "sha256": "other"}), "data file"), (good["model.pt"], "it holds no best and no finished"), (good["last.pt"][:-300], "damaged"),
                      (altered(model={"x": torch.zeros(1)}, epoch=0, finished=False), "does not fit corrkd.py"), (altered(config=5), "no checkpoint of this version"),
                      (altered(format=1), "no checkpoint of this version")):
        (folder / "last.pt").write_bytes(raw)
        assert run(tmp_path, epochs="1") == 2, said
        error = capsys.readouterr().err
        assert said in error and len(error.splitlines()) == 1, (said, error)
        (folder / "last.pt").write_bytes(good["last.pt"])
    for changes, said in (({"dims": wide}, "does not fit corrkd.py"), ({"method": "umdf"}, "no checkpoint of"), ({"model": {}}, "does not fit"), ({"data": 5}, "no checkpoint of"),
                          ({"dataset": "meld"}, "no checkpoint of"), ({"dataset": "iemocap"}, "four yes/no"), ({"config": {"depth": 3}}, "no checkpoint of"), ({"format": 1}, "no checkpoint of")):
        torch.save({**own, **changes} if "model" in changes else {**own, "run": {**own["run"], **changes}}, folder / "model.pt")
        assert evaluation.main([str(folder)]) == 2, said
        error = capsys.readouterr().err
        assert said in error and len(error.splitlines()) == 1, (said, error)
    (folder / "model.pt").write_bytes(good["last.pt"])
    assert evaluation.main([str(folder)]) == 2 and "it holds no linear and no stats" in capsys.readouterr().err


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    torch.save({"method": "corrkd", "model": Call(os.system, ("touch GOTCHA",))}, tmp_path / "run" / "model.pt")
    assert evaluation.main(["run"]) == 2 and "more than tensors and plain values" in capsys.readouterr().err and not (tmp_path / "GOTCHA").exists()


@pytest.mark.parametrize("seed", some([(0,)], (0,), (1,), (2,)))
def test_a_damaged_checkpoint_is_told_in_a_sentence(uninterrupted, tmp_path, seed, capsys):
    """Each outcome is a table or a sentence; a checkpoint that still loads may hold other weights, which its SHA-256 in results.json tells."""
    whole, draw, codes = (uninterrupted / "runs" / "mosi/corrkd/s1" / "model.pt").read_bytes(), random.Random(seed), []
    (tmp_path / "run").mkdir()
    for _ in range(12):
        (tmp_path / "run" / "model.pt").write_bytes(damage(whole, draw))
        codes.append(evaluation.main([str(tmp_path / "run"), "--protocol", "combos"]))
        said = capsys.readouterr().err
        assert (codes[-1], len(said.splitlines())) in ((0, 0), (2, 1)), said
    assert 2 in codes


# ------------------------------------------------------------------------------------- numbers

def extreme(name):
    """A learnable set with something out of the ordinary in it."""
    lengths = {"one frame": (1, 1, 1), "a thousand frames": (1000, 1000, 1000)}.get(name, (6, 6, 6))
    made = learnable(n=10 if name == "a thousand frames" else 17, lengths=lengths)     # 17 = 16 + 1: a batch of one
    for s, f in made.items():
        if name == "1e30":
            f["audio"] *= np.float32(1e30)
        elif name == "largest":
            f["audio"][f["audio"] != 0] = np.finfo(np.float32).max * np.sign(f["audio"][f["audio"] != 0])
        elif name == "denormals":
            f["vision"] *= np.float32(1e-42)
        elif name == "constant features":
            f["audio"][f["audio"] != 0] = 3.0
        elif name == "no vision in training":
            f["vision"][...] = 0 if s == "train" else f["vision"]
        elif name == "one clip" and s != "train":
            made[s] = {k: v[:1] for k, v in f.items()}
        elif name == "one class":
            f["labels"] = abs(f["labels"]) + np.float32(.1)
            f["labels"][f["labels"] > 3] = 3
        elif name == "the same clip":
            made[s] = {k: np.repeat(v[:1], 17, axis=0) for k, v in f.items()}
    return made


EXTREME = [(n, m) for n in ("1e30", "largest", "denormals", "constant features", "no vision in training", "one clip", "one class", "the same clip", "one frame",
                            "a thousand frames") for m in ("corrkd", "umdf", "double_flow")]


@pytest.mark.parametrize("name, method", some(EXTREME[::4], *EXTREME))
def test_extreme_but_finite_data(tmp_path, name, method, capsys):
    """Trains, is evaluated, all losses and parameters finite, nothing on stderr."""
    written(tmp_path / "data", extreme(name))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run(tmp_path, epochs="1", method=method) == 0
        assert evaluation.main([str(tmp_path / "runs" / f"mosi/{method}/s1"), "--rates", "0", "0.5", "1"]) == 0
    said = capsys.readouterr()
    assert said.err == "" and ("have the id of another one" in said.out) == (name == "the same clip")
    assert all(np.isfinite(list(h["losses"].values())).all() for h in history(tmp_path, f"mosi/{method}/s1"))
    assert all(p.isfinite().all() for p in parameters(tmp_path, f"mosi/{method}/s1").values())


@pytest.mark.parametrize("method", ["corrkd", "umdf", "double_flow"])
def test_a_clip_alone_in_its_batch_and_a_split_of_one(tmp_path, method):
    made = learnable(n=1)
    written(tmp_path / "data", made)
    assert run(tmp_path, epochs="2", method=method) == 0


def test_features_too_large_for_the_model_stop_with_the_name_of_the_loss(tmp_path, capsys):
    written(tmp_path / "data", extreme("largest"))
    assert run(tmp_path, "--no-normalize", epochs="1", method="umdf") == 2
    error = capsys.readouterr().err
    assert "the loss term 'task_complete' is not finite" in error and "--lr" in error and len(error.splitlines()) == 1


# ------------------------------------------------------------------------------------- leakage and determinism

@pytest.mark.parametrize("method", ["umdf", "double_flow"])      # corrkd: test_programs.py
def test_the_test_split_has_no_say_in_the_other_methods(tmp_path, method):
    made = learnable(n=20)
    written(tmp_path / "a" / "data", made)
    made["test"]["labels"] = made["test"]["labels"][::-1].copy()
    made["test"]["text"] = np.random.default_rng(1).standard_normal((7, 6, 6)).astype(np.float32)
    made["test"] = {k: v[:7] for k, v in made["test"].items()}
    made["test"]["audio"], made["test"]["vision"] = (made["test"][m][:, :6] for m in ("audio", "vision"))
    written(tmp_path / "b" / "data", made)
    for f in ("a", "b"):
        assert run(tmp_path / f, method=method) == 0
    name = f"mosi/{method}/s1"
    assert history(tmp_path / "a", name) == history(tmp_path / "b", name) and equal(parameters(tmp_path / "a", name), parameters(tmp_path / "b", name))


def test_a_clip_in_two_splits_is_reported_by_training_too(tmp_path, capsys):
    made = learnable(n=12)
    made["test"]["id"] = made["train"]["id"]
    written(tmp_path / "data", made)
    assert run(tmp_path, "--dry-run") == 0 and "note: 12 clips stand in both train and test, for instance " in capsys.readouterr().out


@pytest.mark.parametrize("method", some([("corrkd",)], ("corrkd",), ("umdf",), ("double_flow",)))
def test_neither_the_evaluations_batches_nor_the_threads_matter(tmp_path, method):
    """A prediction moves by less than 1e-6 with the batch size, and no metric does; with 1 and 2 threads a short run ends
    within 1e-4 in every metric, and twice the same is bit-equal."""
    written(tmp_path / "data", learnable(n=40))
    before, ends = torch.get_num_threads(), []
    for name, threads in (("a", 1), ("b", 2), ("c", 1)):
        torch.set_num_threads(threads)
        args = ["--method", method, "--dataset", "mosi", "--data-dir", str(tmp_path / "data"), "--out", str(tmp_path / name), "--epochs", "2", "--batch-size", "16",
                "--device", "cpu", "--seeds", "1"]
        assert train.main(args) == 0
        folder = tmp_path / name / f"mosi/{method}/s1"
        assert evaluation.main([str(folder), "--rates", "0", "0.5"]) == 0
        ends.append((json.loads((folder / "results.json").read_text())["conditions"], torch.load(folder / "model.pt", weights_only=True)["model"]))
    torch.set_num_threads(before)
    assert ends[0][0] == ends[2][0] and equal(ends[0][1], ends[2][1])
    for condition, values in ends[0][0].items():
        for k, v in values.items():
            if k not in ("n", "realised"):
                assert ends[1][0][condition][k] == pytest.approx(v, abs=1e-4, nan_ok=True), (condition, k)
    run_, model, loaded = evaluation.open_run(folder, evaluation.parse([str(folder)]), torch.device("cpu"), {})
    masks = [data.evaluation_masks(loaded["test"]["real"], c, "test") for c in ("lav", "a", .5)]
    outputs = [evaluation.predict(model, loaded["test"], masks, size) for size in (1, 7, 256)]
    for condition in zip(*outputs):
        assert all((o - condition[0]).abs().max() <= 1e-6 for o in condition)


@posix
@pytest.mark.long
def test_a_stop_from_the_keyboard_takes_less_than_a_second(tmp_path):
    took = []
    for _ in range(5):      # another process may take the machine for a while: the quickest of five
        with begun(ROOT / "train.py", "--method", "umdf", "--dataset", "mosi", "--synthetic", "--epochs", "99", "--seeds", "1", "--device", "cpu", "--limit", "48",
                   "--batch-size", "16", cwd=tmp_path) as process:
            assert any("train " in line for line in process.stdout)
            time.sleep(.5)
            began = time.perf_counter()
            process.send_signal(signal.SIGINT)
            _, error = process.communicate(timeout=30)
        took.append(time.perf_counter() - began)
        assert process.returncode == 130 and error.strip() == "stopped; the same command goes on after the last finished epoch"
        if took[-1] < 1:
            break
    assert min(took) < 1, took


def test_a_stop_while_reading_or_evaluating_is_told_in_a_line(monkeypatch, capsys):
    def stop(*_, **__):
        raise KeyboardInterrupt
    monkeypatch.setattr(evaluation, "run_folders", stop)
    assert evaluation.main(["runs/some"]) == 130 and "stopped; " in capsys.readouterr().err
    monkeypatch.setattr(data, "check", stop)
    assert data.main(["check", "some.pkl"]) == 130 and capsys.readouterr().err == "\nstopped\n"
