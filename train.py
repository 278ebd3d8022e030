"""Train one fold: WavLM, a CNN or a feature Transformer, to valence and arousal.

    python train.py --preset demo                                        # two minutes on two cores
    python train.py --data iemocap --data_dir IEMOCAP_full_release --fold 1 --preset verify
    torchrun --standalone --nproc_per_node 2 train.py --preset demo      # DDP, same losses
    ./launch.sh --folds 1-5 --gpus 0,1,2,3 -- --data iemocap --data_dir ... --preset full

One process per GPU, one fold per run; launch.sh runs folds in parallel. This file is what happens
and when: set-up, the loop, the end of a run. The update itself is in step.py, the flags are in
flags.py, audio and batches in data.py, what a tensor passes through in model.py, bytes in
memory.py.
"""

import ctypes
import os
import signal
import sys

if __name__ == "__main__":  # before the imports, which take seconds
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(os.EX_TEMPFAIL))
    if "TORCHELASTIC_RUN_ID" in os.environ:  # a rank does not outlive its torchrun
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG

import argparse
import functools
import itertools
import logging
import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import data as vadata
import flags
import memory
import report
import step
from corpora import Corpus, make_splits, num_folds, read_corpus
from flags import parse_args
from model import TARGETS, EmotionModel, metrics
from util import distributed, runs
from util.distributed import Ranks, Stopped
from util.files import UserError
from util.log import (
    Hints,
    Meter,
    git_commit,
    score_line,
    start_logging,
    startup_block,
    step_line,
    trainable_line,
    versions,
)
from util.runs import Progress, RunFiles

log = logging.getLogger("vatune")


@dataclass
class Data:
    """One fold of a corpus, ready to be batched."""

    corpus: Corpus
    splits: dict[str, np.ndarray]  # train, dev, test: rows of the corpus
    dataset: vadata.Batches
    dialogs: list[str]  # of every row
    labels: Tensor  # (N, 2) in [0, 1]
    shape: step.InputShape

    def in_label_scale(self, preds: Tensor) -> Tensor:
        low, high = self.corpus.label_range
        return low + (high - low) * preds


@dataclass
class Run:
    """What the set-up has made; the loop and the end of the run work on it."""

    args: argparse.Namespace
    flags: dict  # as they were given: a run may find another micro-batch, and is resumed with these
    ranks: Ranks
    data: Data
    files: RunFiles
    model: EmotionModel  # the bare module, for checkpoints and evaluation
    optimizer: torch.optim.AdamW
    scaler: torch.amp.GradScaler
    plan: vadata.TrainPlan
    meter: Meter
    progress: Progress
    hints: Hints | None = None  # on the rank that writes
    planned_gib: float = 0.0

    @property
    def total_steps(self) -> int:
        steps = self.plan.steps_per_epoch * self.args.epochs
        return min(steps, self.args.max_steps) if self.args.max_steps > 0 else steps


# ---------------------------------------------------------------------------------------------
# Set-up


def load_data(args: argparse.Namespace) -> Data:
    """The corpus, this fold's splits and the inputs of the model; builds caches that are missing.

    The normaliser of prosody is not here: it sees the train split alone, in start_model.
    """
    label_range = tuple(args.label_range) if args.label_range else None
    corpus = read_corpus(args.data, args.data_dir, label_range, Path(args.cache_dir))
    corpus, pack = vadata.load_audio(corpus, args.cache_dir)
    frames = prosody = speaker = None
    if args.features_dir:
        frames = vadata.FrameFeatures(corpus, args.features_dir)
    if args.prosody == "egemaps":
        prosody = vadata.egemaps(corpus, pack, args.cache_dir)
    if args.speaker != "none" and not args.no_film:
        speaker = vadata.speaker_embeddings(corpus, pack, args.speaker, args.cache_dir)
    dataset = vadata.Batches(
        labels=corpus.labels(TARGETS),
        pack=None if frames else pack,
        features=frames,
        prosody=prosody,
        speaker=speaker,
        max_seconds=args.max_seconds,
        augment=args.augment,
        seed=args.seed,
    )
    return Data(
        corpus=corpus,
        splits=make_splits(corpus, args.fold),
        dataset=dataset,
        dialogs=[utterance.dialog for utterance in corpus.utterances],
        labels=torch.from_numpy(dataset.labels),
        shape=step.InputShape(
            speaker_dim=0 if speaker is None else speaker.shape[1],
            frame_dim=0 if frames is None else frames.dim,
            length=int(dataset.lengths.max()),
            rate=dataset.rate,
        ),
    )


def start_model(args: argparse.Namespace, data: Data) -> EmotionModel:
    """The model before its first step, the same on every rank."""
    if args.init_from:
        model, _ = runs.load_model(args.init_from, "--init_from")
        runs.check_unseen(args.init_from, data.corpus, data.splits)
        expected = (model.config.speaker_dim, model.config.frame_dim)
        found = (data.shape.speaker_dim, data.shape.frame_dim)
        if expected != found:
            raise UserError(
                f"--init_from: its model reads speaker vectors and frames of widths {expected}, "
                f"--speaker and --features_dir have {found} (0 = none)"
            )
        step.set_checkpointing(model, args.gradient_checkpointing)
        return model
    model = step.build_model(args, data.shape)
    if data.dataset.prosody is not None:
        model.prosody.fit(torch.from_numpy(data.dataset.prosody[data.splits["train"]]))
    return model


def load_interrupted(args: argparse.Namespace, given: dict, files: RunFiles) -> dict | None:
    """Content of last.pt with --resume, if there is one; UserError if it is another run's."""
    last = runs.load_last(files.directory) if args.resume else None
    if last:
        decisive = {k: v for k, v in given.items() if k not in flags.FREE_ON_RESUME}
        runs.check_resumable(decisive, last, files.directory, step.stays_frozen(args, epoch=0))
    return last


def choose_batch(
    args: argparse.Namespace, data: Data, model: EmotionModel, ranks: Ranks, last: dict | None
) -> str:
    """Fills in the batch sizes if they are not known yet; returns how a size was found, or ""."""
    if last:  # with the micro-batch that the interrupted run had found
        args.global_batch_size = last["progress"]["global_batch_size"]
        args.gradient_accumulation_steps = None
        try:
            flags.split_batch(args, last["progress"]["batch_size"], ranks.world_size)
        except UserError as error:  # --batch_size auto had found another split
            raise UserError(
                f"--resume on {ranks.world_size} ranks: {error}: resume on as many as it had"
            ) from None
        return ""
    if args.batch_size != "auto":
        return ""
    largest = len(data.splits["train"]) // (flags.AUTO_STEPS * ranks.world_size)
    size, found = memory.auto_batch(
        model, args, data.shape, ranks.device, ranks.world_size, max(args.context, largest)
    )
    flags.split_batch(args, size, ranks.world_size)
    return found


def plan_batches(args: argparse.Namespace, data: Data, ranks: Ranks) -> vadata.TrainPlan:
    return vadata.TrainPlan(
        lengths=data.dataset.lengths,
        rows=data.splits["train"],
        dialogs=data.dialogs,
        batch_size=args.batch_size,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        context=args.context,
        rank=ranks.rank,
        world_size=ranks.world_size,
        seed=args.seed,
    )


def restore(run: Run, last: dict) -> None:
    """Puts the run back to where last.pt was written."""
    runs.load_weights(run.model, last["model"], run.files.directory)
    run.optimizer.load_state_dict(last["optimizer"])
    run.scaler.load_state_dict(last["scaler"])
    run.progress = Progress(**last["progress"])
    run.meter.load_state(last["meter"])


def announce(run: Run, how_batch_was_found: str) -> None:
    """Logs what a person checks before leaving a run alone."""
    args, data = run.args, run.data
    plan = memory.plan(args, data.shape, run.ranks.world_size)
    run.planned_gib = plan.peak_gib
    stage = step.stage_at(args.unfreeze, run.progress.epoch)
    step.set_trainable(run.model, stage, args.train_only)
    log.info(
        startup_block(
            args, data.corpus, data.splits, run.plan, run.total_steps, run.optimizer,
            run.ranks.device,
        )
    )  # fmt: skip
    log.info(plan.line() + how_batch_was_found)


def write_first_files(run: Run, resumed: bool) -> None:
    """The files that a run has before its first step."""
    run.files.start(run.progress.records, run.progress.step)
    run.files.write_json("args.json", vars(run.args))
    run.files.write_splits(run.data.corpus, run.data.splits)
    run.files.write_status(run.progress.step)
    if not resumed and step.stays_frozen(run.args, epoch=0):
        content = {"model": runs.wavlm_weights(run.model), "args": run.flags}
        run.files.save("frozen.pt", content)
    if run.files.writes:
        records = runs.read_records(run.files.directory)
        run.hints = Hints(run.args, run.ranks.device, records)


# ---------------------------------------------------------------------------------------------
# In the loop


def begin_stage(run: Run, stage: str) -> None:
    """Freezes and unfreezes for a stage of --unfreeze, and reads or fills the cache it trains from.

    A signal ends the run at once here: last.pt is of this very step, and filling a cache takes
    long.
    """
    distributed.handle_signals(at_once=True)
    run.optimizer.zero_grad(set_to_none=True)  # what is frozen now must not be updated
    step.set_trainable(run.model, stage, run.args.train_only)
    dataset = run.data.dataset
    dataset.hidden = None
    dataset.hidden = step.frozen_states(run.model, dataset, run.args, stage, run.ranks.device)
    distributed.handle_signals(at_once=False)  # now all ranks stop at the same step, and save it


def weights_to_save(run: Run, epoch: int) -> dict[str, Tensor]:
    """All weights, without those of a WavLM that has not trained: 1.3 GB for Large."""
    if step.stays_frozen(run.args, epoch):
        return runs.other_weights(run.model)
    return run.model.state_dict()


def save(run: Run, epoch: int, seconds: float) -> None:
    """last.pt of this step; what it saves must be finite (all ranks participate)."""
    run.meter.check(run.scaler, run.optimizer, run.data.corpus)
    run.progress.seconds, run.progress.records = seconds, run.files.records
    content = {
        "model": weights_to_save(run, epoch) if run.files.writes else {},
        "optimizer": run.optimizer.state_dict(),
        "scaler": run.scaler.state_dict(),
        "progress": asdict(run.progress),
        "meter": run.meter.state(),
        "args": run.flags,
    }
    run.files.save("last.pt", content)
    run.files.write_status(run.progress.step)


def finish_epoch(run: Run, epoch: int) -> None:
    """Evaluates on dev if that is due, and keeps the best weights (all ranks participate).

    Raises Stopped if a signal arrives: then the epoch is not over, and a resumed run evaluates it.
    """
    args, data, files, progress = run.args, run.data, run.files, run.progress
    due = (epoch + 1) % args.eval_every == 0 or progress.step == run.total_steps
    evaluation = evaluate(run, "dev") if due else None
    progress.epoch = epoch + 1
    if evaluation is None:
        return
    rows = data.splits["dev"]
    scores = score(run, "dev", evaluation.preds)
    better = progress.update(scores["ccc_mean"], args.patience, args.scheduler)
    log.info(score_line(f"epoch {epoch + 1:>3} | dev", scores) + (" | best" if better else ""))
    record = {"epoch": epoch + 1} | {f"dev/{name}": value for name, value in scores.items()}
    files.record("dev", progress.step, record)
    if run.hints:
        run.hints.after_evaluation(record)
    if better:
        content = {
            "model": weights_to_save(run, epoch),
            "config": asdict(run.model.config),
            "args": run.flags,
            "label_range": list(data.corpus.label_range),
            "epoch": epoch + 1,
        }
        files.save("best.pt", content)
        files.write_predictions("dev", data.corpus, rows, data.in_label_scale(evaluation.preds))
    if files.writes and args.separation_every and (epoch + 1) % args.separation_every == 0:
        speakers = [data.corpus.utterances[row].speaker for row in rows]
        figures = report.separation(evaluation.vectors, data.labels[rows], speakers)
        record = {f"separation/{name}": value for name, value in figures.items()}
        files.record("separation", progress.step, record)
    if files.writes and args.plot_every and (epoch + 1) % args.plot_every == 0:
        report.plot_run(files.directory, "dev", evaluation.vectors)
    run.meter.restart()


def evaluate(run: Run, split: str) -> step.Evaluation:
    """step.evaluate on a split (all ranks participate)."""
    data = run.data
    return step.evaluate(
        run.model, data.dataset, data.splits[split], data.dialogs, run.args, run.ranks.device
    )


def score(run: Run, split: str, preds: Tensor) -> dict[str, float]:
    """CCC, PCC and RMSE, the last in the label's own units."""
    low, high = run.data.corpus.label_range
    return metrics(preds, run.data.labels[run.data.splits[split]], scale=high - low)


def use_smaller_batch(run: Run, fault: str) -> None:
    """Splits the global batch into smaller micro-batches; OutOfMemoryError if it cannot be."""
    args = run.args
    run.optimizer.zero_grad(set_to_none=True)
    flags.halve_batch(args, run.ranks.world_size)
    run.progress.batch_size = args.batch_size
    run.plan = plan_batches(args, run.data, run.ranks)
    if run.ranks.cuda:
        torch.cuda.empty_cache()
    log.info(
        f"step {run.progress.step + 1}: out of memory ({fault}): going on with batch_size "
        f"{args.batch_size} x accumulation {args.gradient_accumulation_steps}"
    )


# ---------------------------------------------------------------------------------------------
# The end of a run


def finish(run: Run) -> None:
    """Tests once, with the best weights of the dev split, and writes result.json (all ranks)."""
    args, data, files, progress = run.args, run.data, run.files, run.progress
    distributed.wait_for_ranks()  # best.pt is written
    best = runs.read_checkpoint(files.directory / "best.pt")
    runs.load_weights(run.model, best["model"], files.directory)
    if not step.stays_frozen(args, epoch=args.epochs):
        data.dataset.hidden = None  # the best epoch's encoder may be another one
    scores = {}
    for split in ("dev", "test"):
        evaluation = evaluate(run, split)
        scores[split] = score(run, split, evaluation.preds)
        log.info(score_line(f"best epoch {progress.best_epoch} | {split}", scores[split]))
        scaled = data.in_label_scale(evaluation.preds)
        files.write_predictions(split, data.corpus, data.splits[split], scaled)
    if not files.writes:
        return
    files.write_vectors(evaluation.vectors)
    record = {f"{split}/{k}": v for split in scores for k, v in scores[split].items()}
    files.record("test", progress.step, {"epoch": progress.best_epoch} | record)
    report.plot_run(files.directory, "test", evaluation.vectors)
    files.write_json("result.json", result(run, scores))  # last: a run with it is complete
    if args.preset == "verify" and args.unfreeze != "none":
        log.info(report.against_frozen(files.directory))
    files.close()
    log.info(f"done in {progress.seconds:.0f} s: {files.directory / 'result.json'}")


def result(run: Run, scores: dict[str, dict[str, float]]) -> dict:
    """Content of result.json."""
    args, data, progress = run.args, run.data, run.progress
    trained = [p for group in run.optimizer.param_groups for p in group["params"]]
    is_cut = run.total_steps < run.plan.steps_per_epoch * args.epochs
    return {
        "name": args.name,
        "fold": args.fold,
        "num_folds": num_folds(data.corpus),
        "encoder": args.encoder,
        "wavlm": args.wavlm if args.encoder == "wavlm" else None,
        "wavlm_revision": args.wavlm_revision,
        "data": args.data,
        "seed": args.seed,
        "best_epoch": progress.best_epoch,
        "epochs_run": progress.epoch,
        "stopped": progress.stopped or ("max_steps" if is_cut else "epochs"),
        "seconds": progress.seconds,
        "audio_seconds_per_second": progress.audio_seconds / max(progress.seconds, 1e-9),
        "peak_gib_predicted": run.planned_gib,
        "peak_gib_measured": distributed.peak_gib(run.ranks.device),
        "parameters_total": sum(p.numel() for p in run.model.parameters()),
        "parameters_trainable": sum(p.numel() for p in trained),
        "git_commit": git_commit(),
        "versions": versions(),
        "label_range": list(data.corpus.label_range),
        "splits": {name: len(rows) for name, rows in data.splits.items()},
        **scores,
    }


# ---------------------------------------------------------------------------------------------
# The run


def main(args: argparse.Namespace) -> int:
    """Trains, evaluates and tests one fold; returns 0, or 75 if a signal stopped it.

    UserError carries a message for the user.
    """
    distributed.stop_signals.clear()
    distributed.handle_signals(at_once=True)  # before the first step there is nothing to save
    given = dict(vars(args))
    ranks = distributed.find_ranks(args.device)
    start_logging(None, console=ranks.rank == 0)
    data = load_data(args)  # before the process group: no collective should wait for decoding
    distributed.start_ranks(ranks, max(distributed.START_SECONDS, args.timeout))
    files = runs.open_run(args, writes=ranks.rank == 0 and not args.dry_run)
    if files.writes:
        start_logging(files.directory / "train.log", console=True)
    distributed.configure_device(ranks.device, args.tf32 == "on", args.memory_fraction)
    torch.manual_seed(args.seed)
    model = start_model(args, data).to(ranks.device)
    if args.compile:
        step.compile_layers(model)
    last = load_interrupted(args, given, files)
    if last and (files.directory / "result.json").exists():
        log.info(f"{files.directory} is complete: nothing to resume")
        return 0
    how_batch_was_found = choose_batch(args, data, model, ranks, last)
    run = Run(
        args=args,
        flags=given,
        ranks=ranks,
        data=data,
        files=files,
        model=model,
        optimizer=step.build_optimizer(model, args),
        scaler=torch.amp.GradScaler(ranks.device.type, enabled=args.amp == "fp16"),
        plan=plan_batches(args, data, ranks),
        meter=Meter(ranks.device),
        progress=Progress(batch_size=args.batch_size, global_batch_size=args.global_batch_size),
    )
    if last:
        restore(run, last)
    announce(run, how_batch_was_found)
    if args.dry_run:
        return 0
    write_first_files(run, resumed=last is not None)
    stopped = train(run)
    if stopped:
        distributed.wait_for_ranks()  # torchrun ends all ranks after the first: rank 0 has saved
        log.info(f"stopped by a signal at step {run.progress.step}: continue with --resume")
        return distributed.RETRY_EXIT_CODE
    finish(run)
    distributed.end_ranks()
    return 0


def train(run: Run) -> bool:
    """The loop; True if a signal stopped it. A step is one optimizer update."""
    args, progress, model, optimizer = run.args, run.progress, run.model, run.optimizer
    device, scaler, meter, files = run.ranks.device, run.scaler, run.meter, run.files
    total_steps, first_step = run.total_steps, progress.step
    on_terminal = run.ranks.rank == 0 and sys.stderr.isatty()
    bar = tqdm(total=total_steps, initial=progress.step, unit="step", disable=not on_terminal)
    stage, loader = step.stage_at(args.unfreeze, progress.epoch), None
    begin_stage(run, stage)
    started = time.perf_counter() - progress.seconds
    model.train()

    while not progress.stopped and progress.epoch * run.plan.steps_per_epoch < total_steps:
        epoch = progress.epoch
        if stage != step.stage_at(args.unfreeze, epoch):
            stage = step.stage_at(args.unfreeze, epoch)
            begin_stage(run, stage)
            loader = None
            log.info(f"epoch {epoch + 1} | unfreeze {stage} | {trainable_line(optimizer)}")
        if loader is None:
            ddp_model = distributed.wrap_ddp(model, device)  # buckets of what trains now
            loader = step.make_loader(run.data.dataset, run.plan, args, device)
        run.plan.set_epoch(epoch, first_step=progress.step - epoch * run.plan.steps_per_epoch)
        stop = distributed.any_rank(bool(distributed.stop_signals))
        steps_left = 0 if stop else total_steps - progress.step
        arriving = distributed.with_timeout(loader, args.timeout)
        arriving = step.group_micro_batches(arriving, args.gradient_accumulation_steps, device)

        try:
            for batches in itertools.islice(meter.timed(arriving), steps_left):
                factor = step.lr_at(progress.step, total_steps, args.warmup, args.scheduler)
                step.set_learning_rates(optimizer, progress.lr_factor * factor)
                update = functools.partial(
                    step.train_step, ddp_model, batches, optimizer, scaler, args, progress
                )
                result = distributed.guard_memory(update, ddp_model, step.zero_sums(device))
                progress.step += 1
                progress.audio_seconds += run.ranks.world_size * meter.add(
                    progress.step, step.batch_loss(result.sums, args), result.gradient_norm, batches
                )
                bar.update()
                if progress.step == first_step + 1:
                    distributed.set_rank_timeout(args.timeout)

                if progress.step % args.log_every == 0 or progress.step == total_steps:
                    meter.check(scaler, optimizer, run.data.corpus)
                    record = meter.read(progress.step / run.plan.steps_per_epoch, optimizer)
                    log.info(step_line(record, progress.step, total_steps, scaler))
                    files.record("train", progress.step, record | {"total_steps": total_steps})
                    if run.hints:
                        cached = run.data.dataset.hidden is not None
                        run.hints.after_steps(record, cached)

                if args.save_every and progress.step % args.save_every == 0:
                    save(run, epoch, time.perf_counter() - started)
                    meter.restart()

                stop = result.stop
                if stop:
                    break
        except distributed.StepTooLarge as error:  # the same step again, in smaller pieces
            fault = str(error).splitlines()[0][:120]
            batches = arriving = update = loader = ddp_model = None  # makes room
            use_smaller_batch(run, fault)
            continue

        meter.check(scaler, optimizer, run.data.corpus)
        if not stop:
            try:
                finish_epoch(run, epoch)
            except Stopped:
                stop = True
        save(run, epoch, time.perf_counter() - started)
        if stop:
            return True
    bar.close()
    return False


def run(argv: list[str] | None = None) -> int:
    """main with exit codes: 0 done, 75 resume me, 2 wrong flags or data, 1 anything else.

    Every rank prints its own reason. Mistakes of the user and faults of the machine are one or two
    lines; everything else keeps its traceback.
    """
    args = parse_args(argv)
    rank, code, reason = os.environ.get("RANK", "0"), 1, "done"
    try:
        code = main(args)
    except Stopped:
        code = distributed.RETRY_EXIT_CODE
    except distributed.FaultOnOtherRank:
        return 2
    except UserError as error:
        code, reason = 2, str(error)
    except Exception as error:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise once more
        reason = distributed.machine_fault(error, runs.run_dir(args), args.timeout)
        if not reason:
            reason = f"{type(error).__name__}: {error}"
            traceback.print_exc()
        distributed.kill_workers()  # before the loader goes with `error`, and waits for them
    if code == distributed.RETRY_EXIT_CODE:
        reason = "stopped by a signal: continue with --resume"
    elif code:
        where = "" if rank == "0" else f"rank {rank}: "
        print(f"train.py: error: {where}{reason}", file=sys.stderr)
    runs.end_status(runs.run_dir(args), code, reason)
    distributed.kill_workers()
    return code


if __name__ == "__main__":
    sys.exit(run())
