"""Train one fold: WavLM, a CNN or a feature Transformer, to valence and arousal.

    python train.py --preset demo                                        # two minutes on two cores
    python train.py --data iemocap --data_dir IEMOCAP_full_release --fold 1 --preset verify
    torchrun --standalone --nproc_per_node 2 train.py --preset demo      # DDP, same losses
    ./launch.sh --folds 1-5 --gpus 0,1,2,3 -- --data iemocap --data_dir ... --preset full

One process per GPU, one fold per run; launch.sh runs folds in parallel. This file says what happens
and when: set-up, the loop, the end of a run. The update itself is in step.py, the flags are in
flags.py, audio and batches in data.py, what a tensor passes through in model.py, the memory plan in
memory.py. A step is one optimizer update.
"""

import ctypes
import os
import signal
import sys

if __name__ == "__main__":  # before the imports, which take seconds
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, lambda *_: os._exit(os.EX_TEMPFAIL))  # imports may swallow exceptions
    if "TORCHELASTIC_RUN_ID" in os.environ:  # a rank does not outlive its torchrun
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG

import argparse
import functools
import itertools
import logging
import time
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from tqdm import tqdm

import data
import flags
import memory
import report
import step
from corpora import BLIND, TESTS, num_folds
from flags import parse_args
from model import EmotionModel, metrics
from step import Progress
from util import distributed, exits, pictures, runs, trials
from util import log as logs
from util.checkpoints import read_checkpoint
from util.distributed import Ranks, Stopped
from util.files import UserError, open_standard_streams, without_gc
from util.runs import RunFiles

log = logging.getLogger("vatune")


@dataclass
class Run:
    """Everything that set-up creates, for the loop and the end of the run."""

    args: argparse.Namespace
    given: dict  # flags as given: a run may find another batch_size, and is resumed with these
    ranks: Ranks
    fold: data.Fold
    files: RunFiles
    model: EmotionModel  # the bare module, for checkpoints and evaluation
    optimizer: torch.optim.AdamW
    scaler: torch.amp.GradScaler
    plan: data.TrainPlan
    meter: logs.Meter
    progress: Progress
    planned: memory.Plan | None  # of rank 0
    git_commit: str  # at the start: it may change while the run goes on
    started: float = 0.0  # on time.perf_counter's clock, less the seconds before --resume

    @property
    def total_steps(self) -> int:
        steps = self.plan.steps_per_epoch * self.args.epochs
        return min(steps, self.args.max_steps) if self.args.max_steps > 0 else steps


# ---------------------------------------------------------------------------------------------
# The run


def main(args: argparse.Namespace) -> int:
    """Trains, evaluates and tests one fold; returns 0, or 75 if a signal stopped it.

    UserError carries a message for the user.
    """
    distributed.stop_signals.clear()
    distributed.raised_signals.clear()
    distributed.handle_signals(at_once=True)  # before the first step there is nothing to save
    run = set_up(args)
    if run is None:
        return 0
    if train(run):
        distributed.wait_for_ranks()  # torchrun kills the others once one exits: rank 0 has saved
        log.info(f"stopped by a signal at step {run.progress.step}: continue with --resume")
        return distributed.RETRY_EXIT_CODE
    finish(run)
    distributed.end_ranks()
    return 0


@without_gc()
def set_up(args: argparse.Namespace) -> Run | None:
    """The run before its first step, or back where last.pt was written (all ranks participate).

    None if there is nothing to do: --dry_run, or --resume of a complete run.
    """
    given = dict(vars(args))
    ranks = distributed.find_ranks(args.device)
    logs.start_logging(None, console=ranks.rank == 0)
    fold = load_fold(args, ranks)
    files = runs.open_run(args, fold, writes=ranks.rank == 0 and not args.dry_run)
    if files.writes:
        logs.start_logging(files.directory / "train.log", console=True)
    distributed.configure_device(ranks.device, args.tf32 == "on", args.memory_fraction)
    torch.manual_seed(args.seed)
    model = step.start_model(args, fold).to(ranks.device)
    trials.check_attention(model, args, ranks.device)
    trials.check_scan(model, args, ranks.device)
    if args.compile:
        trials.check_compile(model, fold.dataset, args, ranks.device)
    last = None
    if args.resume:
        decisive = {k: v for k, v in given.items() if k not in flags.FREE_ON_RESUME}
        last = runs.read_interrupted(files, decisive, frozen=step.stays_frozen(args, epoch=0))
    if last and files.is_complete():
        log.info(f"{files.directory} is complete: nothing to resume")
        distributed.wait_for_ranks()  # they have read last.pt
        if not (args.keep_last or last["args"].get("keep_last")):
            files.remove_last()
        return None
    batch_note = trials.choose_batch(args, fold, model, ranks, last)
    planned = None  # only rank 0 writes of it
    if ranks.rank == 0:
        planned = memory.plan_run(args, fold.shape, model, ranks.world_size)
    run = Run(
        args=args,
        given=given,
        ranks=ranks,
        fold=fold,
        files=files,
        model=model,
        optimizer=step.build_optimizer(model, args),
        scaler=torch.amp.GradScaler(ranks.device.type, enabled=args.amp == "fp16"),
        plan=data.TrainPlan(fold, args, ranks.rank, ranks.world_size),
        meter=logs.Meter(ranks.device),
        progress=Progress(),
        planned=planned,
        git_commit=logs.git_commit(),
    )
    log.info(logs.startup_block(args, fold, run.plan, run.total_steps, ranks, run.git_commit))
    if planned:
        log.info(planned.line() + batch_note)
    if args.dry_run:
        return None
    begin(run, last)
    return run


def train(run: Run) -> bool:
    """The loop; returns True if a signal stopped it (all ranks participate)."""
    args, progress, model, optimizer = run.args, run.progress, run.model, run.optimizer
    device, scaler, meter = run.ranks.device, run.scaler, run.meter
    total_steps, first_step = run.total_steps, progress.step
    on_terminal = run.ranks.rank == 0 and sys.stderr.isatty()
    bar = tqdm(total=total_steps, initial=progress.step, unit="step", disable=not on_terminal)
    run.started = time.perf_counter() - progress.seconds
    stage, loader, stop = None, None, False
    model.train()

    while not progress.stopped and progress.epoch * run.plan.steps_per_epoch < total_steps:
        epoch = progress.epoch
        if stage != step.stage_at(args.unfreeze, epoch):
            loader = ddp_model = None
            stage = step.stage_at(args.unfreeze, epoch)
            begin_stage(run, stage)
        if loader is None:
            num_bytes = step.bytes_on_their_way(run.fold.dataset, args)
            distributed.check_shared_memory(num_bytes, args.num_workers)
            run.files.wait()  # the loader forks processes, which no thread may write beside
            ddp_model = distributed.wrap_ddp(model, device)  # its buckets hold what trains now
            loader = step.make_loader(run.fold.dataset, run.plan, args, device)
        run.plan.set_epoch(epoch, first_step=progress.step - epoch * run.plan.steps_per_epoch)
        stop = distributed.any_rank(bool(distributed.stop_signals))
        steps_left = 0 if stop else total_steps - progress.step  # 0 if only evaluation is left
        batches = distributed.with_timeout(loader, args.timeout)
        batches = step.group_micro_batches(batches, args.gradient_accumulation_steps)

        try:
            for micro_batches in itertools.islice(meter.timed(batches), steps_left):
                factor = step.lr_at(progress.step, total_steps, args.warmup, args.scheduler)
                step.set_learning_rates(optimizer, progress.lr_factor * factor)
                update = functools.partial(
                    step.train_step, ddp_model, micro_batches, optimizer, scaler, args, progress
                )
                zeros = step.zero_sums(device, args)
                result = distributed.guard_memory(update, ddp_model, zeros)
                progress.step += 1
                loss = step.batch_loss(result.sums, args)
                meter.add(progress.step, loss, result.gradient_norm, micro_batches)
                bar.update()
                if progress.step == first_step + 1:
                    distributed.set_rank_timeout(args.timeout)

                if progress.step % args.log_every == 0 or progress.step == total_steps:
                    log_steps(run)
                if args.save_every and progress.step % args.save_every == 0:
                    save(run, epoch, best={})
                stop = result.stop
                if stop:
                    break
        except distributed.StepTooLarge as error:  # the same step again, in smaller pieces
            fault = str(error).splitlines()[0][:120]
            micro_batches = batches = update = loader = ddp_model = None  # makes room
            use_smaller_batch(run, fault)
            continue
        except distributed.NoBatch:
            distributed.leave_step(ddp_model, step.zero_sums(device, args))
            stop = True
        except Stopped:  # another rank got a signal and no batch: no rank has made this step
            stop = True

        meter.check(scaler, optimizer, run.fold.corpus)
        best = {}
        if not stop:
            try:
                best = finish_epoch(run, epoch)
            except Stopped:  # the epoch is not over: a resumed run evaluates it
                stop = True
        save(run, epoch, best)
        if stop:
            break
    bar.close()
    run.files.wait()
    return stop


def finish(run: Run) -> None:
    """Tests once, with the best weights on dev, and writes result.json (all ranks participate)."""
    args, fold, files, progress = run.args, run.fold, run.files, run.progress
    distributed.wait_for_ranks()  # best.pt is written
    best = read_checkpoint(files.directory / "best.pt")
    runs.load_weights(run.model, best["model"], files.directory)
    if len(step.stages(args.unfreeze)) > 1:
        fold.dataset.frozen = None  # the best epoch may have had another frozen part
    elif fold.dataset.frozen is None:  # of a run that was resumed after its last epoch
        stage, device = step.stage_at(args.unfreeze, 0), run.ranks.device
        step.set_trainable(run.model, stage, args.train_only)
        fold.dataset.frozen = step.frozen_states(run.model, fold.dataset, args, stage, device)
    scores, vectors, best_epoch = {}, {}, f"best epoch {progress.best_epoch}"
    for split in ("dev", *(name for name in TESTS if name in fold.splits)):
        figures, evaluation = evaluate(run, split)
        files.write_predictions(split, fold, evaluation.preds)
        vectors[split] = evaluation.vectors
        if split == BLIND:
            files.write_challenge(split, fold, evaluation.preds)
            log.info(f"{best_epoch} | {split} predicted: {files.directory / split}.csv")
        if fold.is_labelled(split):
            scores[split] = figures
            log.info(logs.score_line(f"{best_epoch} | {split}", figures, args.targets))
    if not files.writes:
        return
    files.write_vectors(vectors["test"])
    files.write_ratings(fold)
    tests = [split for split in scores if split != "dev"]
    record = {f"{split}/{name}": x for split in tests for name, x in scores[split].items()}
    files.record("test", progress.step, {"epoch": progress.best_epoch} | record)
    files.write_json("result.json", result(run, scores))  # from here on the run is complete
    show_embeddings(run, "test", vectors["test"], measure=False, draw=True)
    if args.preset == "verify" and args.unfreeze != "none":
        log.info(report.against_frozen(files.directory))
    if not args.keep_last:
        files.remove_last()
    files.close()
    log.info(f"done in {progress.seconds:.0f} s: {files.directory / 'result.json'}")


def result(run: Run, scores: dict[str, dict[str, float]]) -> dict:
    """Content of result.json; `scores`: metrics of dev and of each test split that has labels."""
    args, fold, progress, device = run.args, run.fold, run.progress, run.ranks.device
    flops = run.planned.flops if run.planned else {}
    trained = [p for group in run.optimizer.param_groups for p in group["params"]]
    is_cut = run.total_steps < run.plan.steps_per_epoch * args.epochs
    flags_shown = ("name", "fold", "encoder", "wavlm_revision", "data", "targets", "seed")
    medians = ("audio_seconds_per_second", "tflops", "peak_share")
    return {
        **{name: getattr(args, name) for name in flags_shown},
        "wavlm": args.wavlm if args.encoder == "wavlm" else None,
        "num_folds": num_folds(fold.corpus),
        "best_epoch": progress.best_epoch,
        "epochs_run": progress.epoch,
        "stopped": progress.stopped or ("max_steps" if is_cut else "epochs"),
        "seconds": progress.seconds,
        **{name: run.files.median(name) for name in medians},
        "gflop_per_audio_second": {stage: sum(n) / 1e9 for stage, n in flops.items()},
        "device": distributed.device_name(device),
        "peak_gib_predicted": run.planned.peak_gib if run.planned else None,
        "peak_gib_measured": distributed.peak_gib(device),
        "parameters_total": sum(p.numel() for p in run.model.parameters()),
        "parameters_trainable": sum(p.numel() for p in trained),
        "git_commit": run.git_commit,
        "versions": logs.versions(),
        "label_range": list(fold.corpus.label_range),
        "splits": {name: len(rows) for name, rows in fold.splits.items()},
        **scores,
    }


# ---------------------------------------------------------------------------------------------
# Set-up


def load_fold(args: argparse.Namespace, ranks: Ranks) -> data.Fold:
    """The data, and then the process group: no collective waits for hours of decoding.

    All ranks end if one finds its data wrong.
    """
    fold, fault = None, None
    try:
        if not (args.resume or args.overwrite or args.dry_run):
            runs.refuse_existing(runs.run_dir(args))
        fold = data.load_fold(args)
        fold.corpus.notes += step.selection_notes(args, fold)
    except UserError as error:
        fault = error
    distributed.start_ranks(ranks, max(distributed.START_SECONDS, args.timeout))
    distributed.raise_together(fault)
    return fold


def begin(run: Run, last: dict | None) -> None:
    """Puts the run back to where last.pt was written, and writes what a run has before a step."""
    records = 0
    if last:
        runs.load_weights(run.model, last["model"], run.files.directory)
        run.optimizer.load_state_dict(last["optimizer"])
        run.scaler.load_state_dict(last["scaler"])
        run.progress = Progress(**last["progress"])
        run.meter.load_state(last["meter"])
        records = last["records"]
    elif step.stays_frozen(run.args, epoch=0):
        content = {"model": runs.split_weights(run.model)[0], "args": run.given}
        run.files.save({"frozen.pt": content}, step=0)
    run.files.start(records, run.progress.step)
    label_range = list(run.fold.corpus.label_range)
    run.files.write_json("args.json", vars(run.args) | {"label_range": label_range})
    run.files.write_splits(run.fold.corpus, run.fold.splits)
    run.files.wait()
    run.files.write_status(run.progress.step)


# ---------------------------------------------------------------------------------------------
# In the loop


def begin_stage(run: Run, stage: str) -> None:
    """Freezes and unfreezes for a stage of --unfreeze, and reads or fills the cache it needs.

    A signal ends the run at once here: last.pt already holds this step, and filling a cache takes
    long.
    """
    distributed.handle_signals(at_once=True)
    run.optimizer.zero_grad(set_to_none=True)  # what is frozen now must not be updated
    step.set_trainable(run.model, stage, run.args.train_only)
    dataset = run.fold.dataset
    dataset.frozen = None
    dataset.frozen = step.frozen_states(run.model, dataset, run.args, stage, run.ranks.device)
    distributed.handle_signals(at_once=False)  # now all ranks stop at the same step, and save it
    log.info(f"epoch {run.progress.epoch + 1} | {logs.trainable_line(run.optimizer, stage)}")


def use_smaller_batch(run: Run, fault: str) -> None:
    """Splits the global batch into smaller micro-batches; OutOfMemoryError if it cannot be."""
    args = run.args
    run.optimizer.zero_grad(set_to_none=True)
    flags.halve_batch(args, run.ranks.world_size)
    run.plan = data.TrainPlan(run.fold, args, run.ranks.rank, run.ranks.world_size)
    if run.ranks.cuda:
        torch.cuda.empty_cache()
    log.info(
        f"step {run.progress.step + 1}: out of memory ({fault}): continuing with batch_size "
        f"{args.batch_size} x accumulation {args.gradient_accumulation_steps}"
    )


def log_steps(run: Run) -> None:
    """One line, and the same record in metrics.jsonl (all ranks participate)."""
    progress, meter = run.progress, run.meter
    meter.check(run.scaler, run.optimizer, run.fold.corpus)
    record = meter.read(progress.step / run.plan.steps_per_epoch, run.optimizer)
    record["total_steps"] = run.total_steps
    if run.planned and "audio_seconds_per_second" in record:
        stage = step.stage_at(run.args.unfreeze, progress.epoch)
        speed = record["audio_seconds_per_second"]
        record |= memory.achieved(run.planned, stage, speed, run.ranks)
    log.info(logs.step_line(record, progress.step, run.scaler))
    run.files.record("train", progress.step, record)
    logs.give_hints(run.args, run.files)


def evaluate(run: Run, split: str) -> tuple[dict[str, float], step.Evaluation]:
    """Scores of a split, RMSE in the label's units, and the predictions behind them (all ranks)."""
    fold = run.fold
    rows, (low, high) = fold.splits[split], fold.corpus.label_range
    evaluation = step.evaluate(
        run.model, fold.dataset, rows, fold.dialogs, run.args, run.ranks.device
    )
    scores = metrics(evaluation.preds, fold.labels[rows], run.args.targets, scale=high - low)
    return scores, evaluation


def finish_epoch(run: Run, epoch: int) -> dict[str, dict]:
    """Evaluates on dev if that is due (all ranks participate).

    {"best.pt": content} if the weights are the best so far, else {}. Raises Stopped if a signal
    arrives meanwhile.
    """
    args, fold, files, progress = run.args, run.fold, run.files, run.progress
    due = (epoch + 1) % args.eval_every == 0 or progress.step == run.total_steps
    if due:
        files.wait()  # evaluation forks loader processes, which no thread may write beside
        scores, evaluation = evaluate(run, "dev")
    progress.epoch = epoch + 1
    if not due:
        return {}
    score = step.selection_score(scores, args)
    better = progress.update(score, args.patience, args.scheduler)
    line = logs.score_line(f"epoch {epoch + 1:>3} | dev", scores, args.targets)
    log.info(line + (" | best" if better else ""))
    record = {"epoch": epoch + 1} | {f"dev/{name}": value for name, value in scores.items()}
    files.record("dev", progress.step, record)
    logs.give_hints(args, files)
    best = {}
    if better:
        best["best.pt"] = {
            "model": weights_to_save(run, epoch),
            "config": asdict(run.model.config),
            "args": run.given,
            "data": files.data_digest,
            "label_range": list(fold.corpus.label_range),
            "epoch": epoch + 1,
        }
        files.write_predictions("dev", fold, evaluation.preds)
    measure = args.separation_every and (epoch + 1) % args.separation_every == 0
    draw = args.plot_every and (epoch + 1) % args.plot_every == 0
    show_embeddings(run, "dev", evaluation.vectors, measure, draw)
    return best


def show_embeddings(run: Run, split: str, vectors: Tensor, measure: bool, draw: bool) -> None:
    """Writes what is due; a run does not end because matplotlib or scikit-learn is broken."""
    fold, files = run.fold, run.files
    try:
        if measure and files.writes:
            labels = fold.labels[fold.splits[split]]
            speakers, targets = fold.speakers(split), run.args.targets
            figures = pictures.separation(vectors, labels, speakers, targets)
            record = {f"separation/{name}": value for name, value in figures.items()}
            files.record("separation", run.progress.step, record)
        if draw and files.writes:
            pictures.plot_run(files.directory, split, vectors, run.args.targets)
    except UserError as error:
        log.warning(str(error))


def weights_to_save(run: Run, epoch: int) -> dict[str, Tensor]:
    """All weights, or only those outside WavLM while that is frozen: 1.3 GB less for Large."""
    if step.stays_frozen(run.args, epoch):
        return runs.split_weights(run.model)[1]
    return run.model.state_dict()


def save(run: Run, epoch: int, best: dict[str, dict]) -> None:
    """Writes last.pt, after the `best` of the epoch (all ranks participate).

    FloatingPointError if a value is not finite.
    """
    run.meter.check(run.scaler, run.optimizer, run.fold.corpus)
    run.progress.seconds = time.perf_counter() - run.started
    content = {
        "model": weights_to_save(run, epoch),
        "optimizer": run.optimizer.state_dict(),
        "scaler": run.scaler.state_dict(),
        "progress": asdict(run.progress),
        "meter": run.meter.state(),
        "args": run.given,
        "data": run.files.data_digest,
        "world_size": run.ranks.world_size,
        "batch_size": run.args.batch_size,
        "global_batch_size": run.args.global_batch_size,
        "records": len(run.files.history),
    }
    run.files.save(best | {"last.pt": content}, run.progress.step)
    run.meter.restart()  # saving is no part of a step's time


def cli(argv: list[str] | None = None) -> int:
    """The exit code: 0 done, 75 resume me, 2 wrong flags or data, 1 anything else."""
    open_standard_streams()
    return exits.exit_code(main, parse_args(argv))


if __name__ == "__main__":
    sys.exit(cli())
