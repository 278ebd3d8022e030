"""A run on disk: its checkpoints, its directory, and what others read there.

train.py writes, predict.py and report.py read. No file is ever half-written (util/files.py); the
format of a checkpoint is in util/checkpoints.py.
"""

import argparse
import contextlib
import dataclasses
import errno
import fcntl
import io
import json
import logging
import math
import os
import platform
import shutil
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import numpy as np
import pandas as pd
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from corpora import Corpus, Utterance, real_path, write_skipped
from data import Fold
from model import EmotionModel, ModelConfig
from util import distributed
from util.checkpoints import Writer, read_checkpoint
from util.files import (
    UserError,
    digest,
    optional_module,
    replace_text,
    replacing,
    without_nan,
)
from wavlm import LORA

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

log = logging.getLogger("vatune")

# train.py's flags that belong to a model, also when it is trained further
MODEL_FLAGS = {f.name for f in dataclasses.fields(ModelConfig)} | {
    "prosody", "speaker", "vectors", "no_film", "wavlm_revision", "wavlm_dropout", "max_seconds",
    "context",
}  # fmt: skip
# What a TensorBoard raises that is installed but does not work
BROKEN = (ImportError, OSError, RuntimeError, AttributeError, TypeError, ValueError)
WAVLM = "encoder.wavlm."  # where WavLM's weights are in an EmotionModel, and those of --lora

# Columns of predictions_<split>.csv
TEXTS = ("utt_id", "dialog", "speaker", "emotion")
CHALLENGE = {"arousal": "EmoAct", "valence": "EmoVal", "dominance": "EmoDom"}  # MSP-Podcast's


# ---------------------------------------------------------------------------------------------
# Checkpoints


def load_weights(model: EmotionModel, weights: dict[str, Tensor], directory: Path) -> None:
    """Fills the model from a checkpoint in a directory."""
    model.load_state_dict(all_weights(weights, model.config.encoder, directory))


def all_weights(weights: dict[str, Tensor], encoder: str, directory: Path) -> dict[str, Tensor]:
    """The weights, and those of a WavLM that did not train, which are in frozen.pt."""
    if encoder == "wavlm" and not any(map(is_pretrained, weights)):
        return weights | read_checkpoint(directory / "frozen.pt")["model"]
    return weights


def load_model(path: str | Path, flag: str) -> tuple[EmotionModel, dict]:
    """(model in eval mode, the checkpoint's dict) of a run directory, a best.pt or an export.

    UserError names `flag` and the file when it is missing or not ours.
    """
    path = Path(path)
    exported = (path / "config.json").is_file()
    path = path / "best.pt" if path.is_dir() and not exported else path
    try:
        if exported:
            checkpoint = json.loads((path / "config.json").read_text(encoding="utf-8"))
            checkpoint["model"] = load_file(path / "model.safetensors")
            checkpoint["args"]["wavlm"] = str(path / "wavlm")
        else:
            checkpoint = read_checkpoint(path)
        config = checkpoint["config"]
        weights = all_weights(checkpoint["model"], config["encoder"], path.parent)
    except UserError as error:
        raise UserError(f"{flag} {error} (give a run directory, NAME/foldK)") from None
    except (OSError, ValueError, LookupError, TypeError, SafetensorError) as error:
        reason = f"{type(error).__name__}: {str(error).splitlines()[0][:80]}"
        raise UserError(f"{flag} {path}: not a best.pt or an export ({reason})") from None
    model = EmotionModel(ModelConfig(**config))  # an error of code that was changed passes
    model.load_state_dict(weights)
    return model.eval(), checkpoint


def read_flags(path: str | Path, flag: str) -> dict:
    """The flags of the run behind what load_model takes, with the range of its labels.

    Its weights are not read. UserError names `flag` and the path.
    """
    path = Path(path)
    directory = path if path.is_dir() else path.parent
    config = read_json(directory / "config.json")  # of an export
    found = read_json(directory / "args.json") or config.get("args")
    if not isinstance(found, dict):
        raise UserError(f"{flag} {path}: no args.json there (give a run directory, NAME/foldK)")
    found = {"targets": list(ModelConfig.targets)} | found  # older code knew these two alone
    return found | {"label_range": found.get("label_range") or config.get("label_range")}


def load_last(directory: Path, writes: bool) -> dict | None:
    """The content of last.pt or, if that is missing or damaged, of previous.pt; None without
    either. UserError if all are damaged. The rank that `writes` sets a damaged last.pt aside."""
    faults = []
    for path in (directory / "last.pt", directory / "previous.pt"):
        try:
            content = read_checkpoint(path)
        except UserError as error:
            faults.append(str(error))
        else:
            if faults:
                log.warning(f"{faults[0]}: continuing from {path}, the one before")
            if faults and writes:  # the next save must not put the bad one over the good one
                with contextlib.suppress(FileNotFoundError):
                    (directory / "last.pt").rename(directory / "damaged.pt")
            return content
    if not any((directory / name).exists() for name in ("last.pt", "previous.pt")):
        return None
    raise UserError(f"--resume: {'; '.join(faults)}: start anew with --overwrite")


def read_interrupted(files: "RunFiles", flags: dict, frozen: bool) -> dict | None:
    """Content of last.pt, or of best.pt if the run is complete and has removed it; None if there is
    nothing to resume.

    UserError if a file that the run needs is damaged, missing, older than last.pt or of another
    run: with another value of one of `flags`, those that decide the result, or with other data.
    `frozen`: WavLM does not train in the first stage, so frozen.pt has its weights.
    """
    last, contents = load_last(files.directory, files.writes), {}
    if last is None and not files.is_complete():
        return None
    if last:
        contents["--resume"] = last
        if last["world_size"] != distributed.world_size():
            raise UserError(
                f"--resume: the interrupted run had {last['world_size']} ranks, this one has "
                f"{distributed.world_size()}: start as many"
            )
    needed = ["best.pt"] if last is None or last["progress"]["best_epoch"] else []
    for name in [*needed, "frozen.pt"] if frozen else needed:
        try:
            contents[f"{files.directory / name}"] = read_checkpoint(files.directory / name)
        except UserError as error:
            raise UserError(f"--resume: {error}: start anew with --overwrite") from None
    for what, content in contents.items():
        check_same_run(what, content, flags, files)
        if last and content.get("epoch", math.inf) < last["progress"]["best_epoch"]:
            raise UserError(f"{what} is older than last.pt: start anew with --overwrite")
    first = next(iter(contents.values()))
    for flag in sorted(flags.keys() - first["args"].keys()):
        log.info(f"--resume: --{flag} {flags[flag]} is new since the run began")
    return first


def check_same_run(what: str, content: dict, flags: dict, files: "RunFiles") -> None:
    """UserError if the content of a checkpoint is of a run with other data, or with another value
    of a flag that both know."""
    before = content["args"]
    places = {"data", "features_dir", "vectors"}  # wherever the data is now, its digest counts
    if "speaker vector" in files.data.partition("\n")[0]:
        places.add("speaker")
    for flag in sorted(flags.keys() & before.keys() - places):
        if before[flag] != flags[flag]:
            raise UserError(
                f"{what}: --{flag} was {before[flag]} in the interrupted run and is {flags[flag]} "
                "now: give the old value, or start anew with --overwrite"
            )
    if content.get("data", files.data_digest) == files.data_digest:
        return
    path = files.directory / "data.csv"
    text = path.read_text("utf-8", errors="replace") if path.is_file() else ""
    found = "data.csv, which would tell in what, is missing or damaged"
    if digest(text) == content["data"]:
        found = differences(text, files.data)
    raise UserError(
        f"--resume: the data differs from that of the interrupted run: {found}: restore it, or "
        "start anew with --overwrite"
    )


def is_pretrained(name: str) -> bool:
    """True for a weight of WavLM, False for one of --lora's updates, or of anything else."""
    return name.startswith(WAVLM) and not name.endswith(LORA)


def split_weights(model: EmotionModel) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(pre-trained weights of WavLM, all others): while these are frozen, frozen.pt has them."""
    weights = model.state_dict()
    pretrained = {name: tensor for name, tensor in weights.items() if is_pretrained(name)}
    return pretrained, {k: tensor for k, tensor in weights.items() if k not in pretrained}


def check_unseen(init_from: str, corpus: Corpus, splits: dict[str, np.ndarray]) -> None:
    """UserError if the run to start from has seen an utterance that is dev or test here.

    It has if its splits.json holds the same part of the same file, or an utterance of the same name
    in a file of the same name. An export has no splits.json: nothing is known of it.
    """
    directory = Path(init_from)
    directory = directory if directory.is_dir() else directory.parent
    seen = read_json(directory / "splits.json")
    later = [split for split in splits if split != "train"]
    pairs = [(theirs, ours) for ours in later for theirs in ("train", "dev") if theirs != ours]
    folders = {}
    for theirs, ours in pairs:
        sources = seen.get(theirs, {})
        places = {tuple(source) for source in sources.values()}
        leaked = []
        for row in splits[ours]:
            utterance = corpus.utterances[row]
            path, start, end = audio_source(utterance, folders)
            known = sources.get(utterance.utt_id)
            renamed = known is not None and Path(known[0]).name == Path(path).name
            if renamed or (path, start, end) in places:
                leaked.append(utterance.utt_id)
        if leaked:
            raise UserError(
                f"--init_from {init_from}: {len(leaked)} utterances of {ours} here (as "
                f"{min(leaked)}) were in its {theirs} split: start from the run of this --fold"
            )


def audio_source(utterance: Utterance, folders: dict[str, Path]) -> tuple[str, float, float | None]:
    """(resolved path, start, end in seconds): what an utterance is cut from."""
    return str(real_path(str(utterance.path), folders)), utterance.start, utterance.end


# ---------------------------------------------------------------------------------------------
# The data of a run


def data_table(fold: Fold) -> str:
    """CSV of all that the data decides about a run: a line per utterance, with digests instead of
    paths, so that moved files are the same data."""
    rows = np.concatenate(list(fold.splits.values()))
    table = utterance_table(fold, rows)[["utt_id", "dialog", *fold.corpus.targets]]
    table["split"] = np.repeat(list(fold.splits), list(map(len, fold.splits.values())))
    for kind, digests in fold.digests.items():
        table[kind] = [digests[row] for row in rows]
    text = table.to_csv(index=False)
    return text.encode(errors="backslashreplace").decode()  # as it comes back from a file


def utterance_table(fold: Fold, rows: np.ndarray) -> pd.DataFrame:
    """A line per utterance with all of its fields."""
    return pd.DataFrame([vars(fold.corpus.utterances[row]) for row in rows])


def differences(before: str, now: str) -> str:
    """What two data_tables differ in, with an example of each kind."""
    old, new = (
        pd.read_csv(io.StringIO(text), dtype=str, keep_default_na=False, index_col="utt_id")
        for text in (before, now)
    )
    found = []
    for names, what in (
        (old.index.difference(new.index), "gone"),
        (new.index.difference(old.index), "new"),
    ):
        if len(names):
            found.append(f"rows that are {what}: {len(names)} (as {names[0]})")
    for column in old.columns.symmetric_difference(new.columns):
        found.append(f"{column} is given in one of them alone")
    both = old.index.intersection(new.index)
    for column in old.columns.intersection(new.columns):
        one, two = old.loc[both, column], new.loc[both, column]
        changed = both[one != two]
        if len(changed):
            example = first = changed[0]
            digests = ("audio", "features", "speaker vector", "vectors")
            if column not in digests:  # which say nothing
                example = f"{first}, {one[first]} before and {two[first]} now"
            found.append(f"utterances whose {column} has changed: {len(changed)} (as {example})")
    return ", ".join(found) or "rows are in another order"


def check_same_data(data: str) -> None:
    """UserError on ranks whose machine has other data than the rank with most of it (all ranks
    participate)."""
    fault = None
    if len(set(distributed.gather(digest(data)))) > 1:
        tables = distributed.gather(data)
        most = max(tables, key=lambda table: table.count("\n"))
        if data != most:
            fault = UserError(
                f"the data here differs from that of rank {tables.index(most)}: "
                f"{differences(most, data)}: give all machines the same files"
            )
    distributed.raise_together(fault)


# ---------------------------------------------------------------------------------------------
# The directory of a run


def run_dir(args: argparse.Namespace) -> Path:
    return Path(args.out) / args.name / f"fold{args.fold}"


def open_run(args: argparse.Namespace, fold: Fold, writes: bool) -> "RunFiles":
    """The files of the run (all ranks participate); the rank that `writes` claims the directory.

    It creates the directory, clears it (--overwrite) or keeps it (--resume). All ranks raise
    UserError if they have not the same data, if another process holds the directory, if it exists
    without either flag, or if one of them does not see it.
    """
    directory, lock, fault = run_dir(args), None, None
    data = data_table(fold)
    check_same_data(data)
    if writes:
        try:
            lock = claim(directory, args.resume, args.overwrite)
        except UserError as error:
            fault = error
    distributed.raise_together(fault)
    if not args.dry_run and not directory.is_dir():
        fault = UserError(f"{directory}, made by rank 0, is not seen here: --out on a shared disk?")
    distributed.raise_together(fault)
    return RunFiles(directory, lock, data)


def refuse_existing(path: Path) -> None:
    if path.exists():
        raise UserError(
            f"{path} exists: give --resume to continue it, --overwrite to delete it, "
            "or another --name"
        )


def claim(path: Path, resume: bool, overwrite: bool) -> TextIO:
    """An open file whose lock is this run's claim on the directory `path`, which is there then.

    The lock ends with the process, however that dies. UserError names what is in the way.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = open(path.with_name(f".{path.name}.lock"), "a+")  # noqa: SIM115 the caller keeps it
    except OSError as error:
        raise UserError(
            f"--out: {path.parent} cannot be written ({error.strerror}): give another --out"
        ) from None
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock: workers would inherit it
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):  # otherwise this disk knows no locks
            lock.seek(0)
            raise UserError(
                f"{path} is in use by another run ({lock.read().strip()}): wait for its end, or "
                "give another --name"
            ) from None
    lock.truncate(0)
    print(f"pid {os.getpid()} on {platform.node()}", file=lock, flush=True)
    if overwrite and path.exists():
        if any(path.iterdir()) and not (path / "train.log").exists():
            raise UserError(f"{path} is not a run directory: --overwrite will not delete it")
        shutil.rmtree(path)
    if not resume:
        refuse_existing(path)
    path.mkdir(exist_ok=resume)
    for aside in path.glob(".*.aside"):  # left by a run that was killed while it wrote
        aside.unlink()
    return lock


class RunFiles:
    """What a run writes: checkpoints, metrics.jsonl, TensorBoard, JSON and CSV files.

    Only rank 0 has a `lock`, its claim on the directory, held as long as this object lives. On the
    other ranks, and in a dry run, every method does nothing.
    """

    def __init__(self, directory: Path, lock: TextIO | None, data: str) -> None:
        self.directory, self.lock = directory, lock
        self.data, self.data_digest = data, digest(data)  # see data_table
        self.history: list[dict] = []  # records of metrics.jsonl
        self.hints: set[str] = set()  # kinds that were logged
        self.board = None
        self.writer = Writer()

    @property
    def writes(self) -> bool:
        return self.lock is not None

    def start(self, records: int, step: int) -> None:
        """Keeps the first `records` lines of metrics.jsonl, and TensorBoard's points through
        `step`: a resumed run writes the later ones again."""
        if not self.writes:
            return
        path = self.directory / "metrics.jsonl"
        self.history = read_records(self.directory)[:records]
        replace_text(path, "".join(json.dumps(record) + "\n" for record in self.history))
        if len(self.history) < records:
            log.warning(f"{path} lacks records from before step {step}")
        self.board = open_board(self.directory / "tb", step)

    def record(self, event: str, step: int, values: dict[str, float]) -> None:
        """Appends to metrics.jsonl, and to TensorBoard, what is not NaN."""
        if not self.writes:
            return
        values = {key: value for key, value in values.items() if not math.isnan(value)}
        self.history.append({"event": event, "step": step, **values})
        path = self.directory / "metrics.jsonl"
        try:
            with open(path, "a") as file:
                file.write(json.dumps(self.history[-1]) + "\n")
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from None
        scalars = {key if "/" in key else f"{event}/{key}": value for key, value in values.items()}
        try:
            for key, value in scalars.items() if self.board else ():
                self.board.add_scalar(key, value, step)
        except BROKEN as error:
            self.board = warn_of_board(error)

    def median(self, name: str) -> float | None:
        """The median of a figure over the log lines of steps; None if no line has it."""
        values = [record[name] for record in self.history if name in record]
        return statistics.median(values) if values else None

    def save(self, contents: dict[str, dict], step: int) -> None:
        """Checkpoints by name, and then status.json, while the run goes on; see Writer."""
        if self.writes:
            contents = {self.directory / name: content for name, content in contents.items()}
            self.writer.write(contents, lambda: self._write_saved(step))

    def _write_saved(self, step: int) -> None:
        """write_status, unless the run has ended with an error while its checkpoint was written."""
        if read_json(self.directory / "status.json").get("exit_code") is None:
            self.write_status(step)

    def wait(self) -> None:
        """Returns when all checkpoints are on the disk; OSError if one could not be written."""
        self.writer.wait()

    def is_complete(self) -> bool:
        return (self.directory / "result.json").exists()

    def remove_last(self) -> None:
        """Removes what only --resume reads; best.pt and frozen.pt stay."""
        for name in ("last.pt", "previous.pt") if self.writes else ():
            (self.directory / name).unlink(missing_ok=True)

    def write_json(self, name: str, content: dict) -> None:
        """The content, with null for NaN."""
        if self.writes:
            text = json.dumps(without_nan(content), indent=1)
            replace_text(self.directory / name, text + "\n")

    def write_status(self, step: int) -> None:
        """status.json of a run that goes on and has saved `step`; end_status completes it."""
        status = {"exit_code": None, "reason": "running", "step": step, "time": time.time()}
        status |= {"host": platform.node(), "pid": os.getpid(), "launcher": os.getppid()}
        self.write_json("status.json", status)

    def write_splits(self, corpus: Corpus, splits: dict[str, np.ndarray]) -> None:
        """splits.json: per split {utt_id: (audio path, start, end)}; data.csv; skipped.csv."""
        sources, folders = {}, {}
        for split, rows in splits.items():
            utterances = [corpus.utterances[row] for row in rows]
            sources[split] = {u.utt_id: audio_source(u, folders) for u in utterances}
        if self.writes:
            text = json.dumps(sources)  # with indent it takes ten times as long
            replace_text(self.directory / "splits.json", text + "\n")
            replace_text(self.directory / "data.csv", self.data)
            write_skipped(self.directory / "skipped.csv", corpus)

    def write_predictions(self, split: str, fold: Fold, preds: Tensor) -> None:
        """predictions_<split>.csv of preds (n, E) in [0, 1], in the label's scale, and labels."""
        if not self.writes:
            return
        rows, targets = fold.splits[split], fold.corpus.targets
        table = utterance_table(fold, rows)[[*TEXTS, *targets]]
        table.insert(len(TEXTS), "seconds", fold.corpus.seconds[rows].round(3))
        table[predicted(targets)] = fold.in_label_scale(preds).double().numpy().round(6)
        replace_text(self.directory / f"predictions_{split}.csv", table.to_csv(index=False))

    def write_ratings(self, fold: Fold) -> None:
        """ratings_test.csv of the test split, a line per rater, where the corpus has several."""
        if not self.writes:
            return
        ids = [fold.corpus.utterances[row].utt_id for row in fold.splits["test"]]
        ratings = fold.corpus.ratings()
        ratings = ratings[ratings["utt_id"].isin(ids)]
        if len(ratings):
            text = ratings[["utt_id", "rater", *fold.corpus.targets]].to_csv(index=False)
            replace_text(self.directory / "ratings_test.csv", text)

    def write_challenge(self, split: str, fold: Fold, preds: Tensor) -> None:
        """<split>.csv of preds (n, E) in [0, 1], see challenge_table."""
        if self.writes:
            utterances = [fold.corpus.utterances[row] for row in fold.splits[split]]
            values = fold.in_label_scale(preds).double().numpy()
            table = challenge_table(utterances, values, fold.corpus.targets)
            replace_text(self.directory / f"{split}.csv", table.to_csv(index=False))

    def write_vectors(self, vectors: Tensor) -> None:
        """embedding_test.npy (n, U) float16, rows as predictions_test.csv."""
        if self.writes:
            with replacing(self.directory / "embedding_test.npy") as file:
                np.save(file, vectors.half().numpy())

    def close(self) -> None:
        try:
            if self.board:
                self.board.close()
        except BROKEN as error:
            warn_of_board(error)


def challenge_table(
    utterances: list[Utterance], preds: np.ndarray, targets: Sequence[str]
) -> pd.DataFrame:
    """preds (n, E), in the label's scale, in the form of MSP-Podcast's challenges: FileName, then
    those of EmoAct, EmoVal and EmoDom that are targets."""
    columns = {"FileName": [u.path.name for u in utterances]}
    for target, column in CHALLENGE.items():
        if target in targets:
            columns[column] = preds[:, list(targets).index(target)].round(6)
    return pd.DataFrame(columns)


def open_board(directory: Path, step: int) -> "SummaryWriter | None":
    """TensorBoard's writer, which forgets the points after `step`; None if it does not work."""
    try:
        optional_module("tensorboard", "tensorboard", directory.name)
        from torch.utils.tensorboard import SummaryWriter  # takes a second

        return SummaryWriter(directory, purge_step=step + 1)
    except BROKEN as error:
        return warn_of_board(error)


def warn_of_board(error: Exception) -> None:
    name = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
    reason = f"{name}{error}".splitlines()[0]
    log.warning(f"no TensorBoard ({reason}); metrics.jsonl has the same figures")


# ---------------------------------------------------------------------------------------------
# Reading a run


def read_json(path: Path) -> dict:
    """The object in a JSON file; empty if the file is absent or damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def read_records(directory: Path) -> list[dict]:
    """Records of metrics.jsonl, without lines that are incomplete or not written by train.py."""
    path = directory / "metrics.jsonl"
    records = []
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else ():
        try:
            record = json.loads(line)
        except ValueError:
            continue  # the run is writing it, or was killed while it did
        if isinstance(record, dict) and {"event", "step"} <= record.keys():
            numbers = (value for key, value in record.items() if key != "event")
            if all(isinstance(value, (int, float)) for value in numbers):
                records.append(record)
    return records


def predicted(targets: Sequence[str]) -> list[str]:
    """Columns of the predictions."""
    return [f"pred_{target}" for target in targets]


def read_predictions(path: Path, targets: Sequence[str]) -> pd.DataFrame:
    """At least one row of a predictions CSV: TEXTS as strings; seconds, labels and predictions as
    finite float64, or NaN for a label whose cell is empty.

    UserError names the file and, of a wrong number, its row and column.
    """
    columns = ["seconds", *targets, *predicted(targets)]  # of numbers
    try:
        rows = pd.read_csv(path, dtype=str, keep_default_na=False, index_col=False)
    except (OSError, ValueError) as error:  # ValueError: neither UTF-8 nor a table
        raise UserError(f"{path}: cannot be read ({error})") from error
    absent = [name for name in (*TEXTS, *columns) if name not in rows]
    if absent and len(rows):
        raise UserError(f"{path}: column {', '.join(absent)} is missing")
    if not len(rows):
        raise UserError(f"{path}: no rows")
    rows = rows[[*TEXTS, *columns]]
    numbers = rows[columns].map(to_number)
    missing = (rows[columns] == "") & [name in targets for name in columns]
    wrong = np.argwhere(~(np.isfinite(numbers) | missing).to_numpy())
    if len(wrong):
        row, column = wrong[0]
        fault = f"{columns[column]} {rows[columns[column]][row]!r} is not a finite number"
        raise UserError(f"{path} row {row + 2}: {fault}")  # row 1 is the header
    return rows.assign(**{name: numbers[name] for name in columns})


def read_ratings(directory: Path, targets: Sequence[str]) -> pd.DataFrame:
    """Ratings of the test split: utt_id and rater as strings, targets as float64, NaN where a cell
    is empty. No rows where raters are not known. UserError if they are damaged."""
    path = directory / "ratings_test.csv"
    if not path.exists():
        return pd.DataFrame(columns=["utt_id", "rater", *targets])
    try:
        ratings = pd.read_csv(path, dtype={"utt_id": str, "rater": str}, keep_default_na=False,
            na_values=[""], index_col=False)  # fmt: skip
        ratings = ratings[["utt_id", "rater", *targets]].astype(dict.fromkeys(targets, np.float64))
    except (OSError, ValueError, LookupError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error
    if np.isinf(ratings[[*targets]].to_numpy()).any():
        raise UserError(f"{path}: a rating is infinite")
    return ratings


def read_vectors(directory: Path, count: int) -> np.ndarray:
    """Utterance vectors (count, U) of the test split, in the row order of its predictions."""
    path = directory / "embedding_test.npy"
    try:
        vectors = np.lib.format.open_memmap(path, mode="r")
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error
    is_finite = vectors.dtype.kind == "f" and bool(np.isfinite(vectors).all())
    if vectors.ndim != 2 or len(vectors) != count or not is_finite:
        raise UserError(f"{path}: {vectors.dtype} {vectors.shape}, not {count} finite rows")
    return vectors


def to_number(text: str) -> float:
    """The number that the text spells, exactly, or NaN."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def tensors(rows: pd.DataFrame, targets: Sequence[str]) -> tuple[Tensor, Tensor]:
    """preds, labels (N, E) in float64, of rows as from read_predictions."""
    columns = (predicted(targets), list(targets))
    return tuple(torch.tensor(rows[names].to_numpy()) for names in columns)
