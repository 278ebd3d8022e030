"""--balance: rare labels more often, in numbers that a closed form tells."""

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest

import data
from data import BatchSpec, TrainPlan
from train import main, parse_args
from util.runs import run_dir

RNG = np.random.default_rng(0)
N = 960
LABELS = np.clip(RNG.normal(0.5, 0.18, (N, 2)), 0, 1).astype(np.float32)
LABELS[::50, 1] = np.nan
LENGTHS = np.exp(RNG.normal(1.3, 0.6, N) + 9.68).astype(int)
DIALOGS = [f"d{row // 12}" for row in range(N)]


def plan(balance, batch_size=8, context=1, epoch=0):
    dataset = SimpleNamespace(lengths=LENGTHS, labels=LABELS)
    fold = SimpleNamespace(dataset=dataset, splits={"train": np.arange(N)}, dialogs=DIALOGS)
    args = SimpleNamespace(
        batch_size=batch_size, gradient_accumulation_steps=1, context=context, seed=3,
        balance=balance, target_weights=[0.5, 0.5],
    )  # fmt: skip
    plan = TrainPlan(fold, args, rank=0, world_size=1)
    plan.set_epoch(epoch)
    return plan


def rows_of(specs):
    return [row for spec in specs for chunk in spec.chunks for row in chunk]


def cells_of(labels):
    """The cell of each row, written down independently: fifths of the range, and "missing"."""
    names = {True: lambda x: "missing", False: lambda x: min(4, int(np.float32(x * 5)))}
    return [tuple(names[bool(np.isnan(x))](x) for x in row) for row in labels]


@pytest.mark.parametrize("balance", [0.3, 1.0])
def test_an_epoch_holds_each_cell_as_often_as_the_closed_form_says(balance):
    cells = cells_of(LABELS)
    before = Counter(cells)
    share = {cell: count ** (1 - balance) for cell, count in before.items()}
    expected = {cell: N * value / sum(share.values()) for cell, value in share.items()}
    drawn = rows_of(plan(balance))
    assert len(drawn) == N  # as many as without
    found = Counter(cells[row] for row in drawn)
    for count in set(before.values()):  # cells of one size share their rounding
        alike = [cell for cell in before if before[cell] == count]
        off = sum(found[cell] for cell in alike) - sum(expected[cell] for cell in alike)
        assert abs(off) < 1 + 1e-6
    for row, times in Counter(drawn).items():
        wanted = expected[cells[row]] / before[cells[row]]
        assert abs(times - wanted) < 1 + 1e-6


def test_over_epochs_each_utterance_of_a_cell_is_drawn_about_alike():
    epochs = 40
    times = sum(np.bincount(rows_of(plan(1.0, epoch=e)), minlength=N) for e in range(epochs))
    draws = data.balanced_draws(LABELS, 1.0)
    error = np.abs(times / epochs - draws)
    assert (error < 5 * np.sqrt(0.25 / epochs)).all()  # a fraction varies by 1/2 at most
    assert draws.max() > 4 * draws.min()


def test_chunks_of_a_dialogue_stay_together_and_are_drawn_by_the_mean_of_their_turns():
    means, draws = {}, data.balanced_draws(LABELS, 1.0)
    for balance in (0, 1.0):
        chunks = [chunk for spec in plan(balance, 8, context=4) for chunk in spec.chunks]
        assert all(list(chunk) == list(range(chunk[0], chunk[-1] + 1)) for chunk in chunks)
        assert all(len({DIALOGS[row] for row in chunk}) == 1 for chunk in chunks)
        means[balance] = np.mean([draws[list(chunk)].mean() for chunk in chunks])
    assert means[1.0] > 1.5 * means[0]


def test_batches_still_hold_utterances_of_like_length_and_few_of_them_twice():
    padding = {}
    for balance in (0, 0.5):
        specs = list(plan(balance))
        lengths = [LENGTHS[rows_of([spec])] for spec in specs]
        padding[balance] = sum(len(x) * x.max() for x in lengths) / sum(x.sum() for x in lengths)
    assert padding[0.5] < 1.03 * padding[0]
    distinct = [len(set(rows_of([spec]))) / 8 for spec in specs]
    assert np.mean(distinct) > 0.9


def test_the_batch_knows_the_labels_that_its_step_holds():
    for spec in plan(0.5):
        assert isinstance(spec, BatchSpec)
        assert spec.step_size == tuple((~np.isnan(LABELS[rows_of([spec])])).sum(0))


def test_data_py_shows_the_bins_before_and_after_of_the_targets_that_train_py_takes(corpus, capsys):
    data.inspect(data.parse_args(["--data", str(corpus), "--balance", "1", "--fold", "1"]))
    table = capsys.readouterr().out.split("--balance 1, ")[1].splitlines()
    assert table[1].split() == ["valence", "valence", "balanced", "arousal", "arousal", "balanced"]
    before, after = zip(*((int(line.split()[1]), int(line.split()[2])) for line in table[2:8]))
    assert sum(before) == 24 and sum(after) == pytest.approx(24, abs=2)
    assert table[7].split() == ["missing", "0", "0", "0", "0"]
    occupied = [n for n in before if n]
    assert len(occupied) == 5 and np.std(after[:5]) < np.std(before[:5])


def test_a_run_draws_by_the_labels_of_its_train_split_alone(flags, corpus, tmp_path):
    args = parse_args([*flags, "--balance", "1", "--dry_run"])
    fold = data.load_fold(args)
    drawn = TrainPlan(fold, args, 0, 1).draws
    rows = fold.splits["train"]
    assert drawn[rows].sum() == pytest.approx(len(rows)) and drawn.sum() == drawn[rows].sum()
    fold.dataset.labels[fold.splits["dev"]] = 0.99  # of others, nothing counts
    fold.dataset.labels[fold.splits["test"]] = np.nan
    assert np.array_equal(TrainPlan(fold, args, 0, 1).draws, drawn)
    args = parse_args([*flags, "--balance", "1", "--dry_run", "--valence_weight", "1"])
    fifths = np.floor(fold.dataset.labels[rows, 0] * 5)  # of valence, which alone trains
    totals = [TrainPlan(fold, args, 0, 1).draws[rows][fifths == i].sum() for i in range(5)]
    assert totals == pytest.approx([len(rows) / 5] * 5)
    losses = []
    for balance in ("0", "1"):
        args = parse_args([*flags, "--balance", balance, "--name", balance, "--epochs", "1"])
        assert main(args) == 0
        losses.append((run_dir(args) / "metrics.jsonl").read_text().splitlines()[0])
    assert losses[0] != losses[1]


@pytest.mark.parametrize("weight", ["-0.1", "1.5", "nan", "rare"])
def test_a_weight_outside_0_to_1_is_refused_in_one_line(weight, capsys):
    for parse in (parse_args, data.parse_args):
        with pytest.raises(SystemExit):
            parse(["--data", "demo", f"--balance={weight}"])
        assert "--balance" in capsys.readouterr().err.splitlines()[-1]
