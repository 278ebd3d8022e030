"""Bootstrap intervals of pooled CCCs, and what human raters reach.

Utterances of a speaker are not independent, so all of them are drawn together; with several seeds,
seeds are drawn, too. Labels, predictions and ratings are in any common scale.

References: CCC (Lin 1989); bootstrap of two crossed factors (Owen 2007, "The pigeonhole
bootstrap"); one rater against the others as the lower end of the noise ceiling (Nili et al. 2014);
reliability from two halves (Spearman 1910, Brown 1910).
"""

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from corpora import known_speaker
from model import concordance, moment_sums

RESAMPLES = 2000
SEED = 0
MIN_CLUSTERS = 5  # fewer speakers than this say little about the next one [guess]
SPLITS_IN_HALF = 10  # random halves of the raters, whose reliabilities are averaged [guess]


def cluster_ids(rows: pd.DataFrame) -> tuple[np.ndarray, str]:
    """Cluster of each row (N,) from 0, and what the clusters are: "10 speakers".

    Dialogues where fewer than MIN_CLUSTERS speakers are known, or else single utterances. An
    utterance of unknown speaker (dialogue) is a cluster by itself.
    """
    names = {"speaker": "speakers", "dialog": "dialogues", "utt_id": "utterances"}
    for column in names:
        known = rows[column].map(known_speaker)
        count = rows[column][known].nunique()
        if count >= MIN_CLUSTERS:
            break
    keys = rows[column].where(known, "utterance " + rows["utt_id"])
    return pd.factorize(keys, sort=True)[0], f"{count} {names[column]}"


def resampled_cccs(
    preds: Tensor, labels: Tensor, ids: np.ndarray, seeds: np.ndarray | None = None
) -> np.ndarray:
    """CCC of each column of preds, labels (N, C) in each resample of clusters, (RESAMPLES, C).

    ids (N,): cluster of each row, as from cluster_ids. With `seeds` (N,) from 0, each row belongs
    to one of S runs of the same thing: the CCC is the mean of the runs' CCCs, and S of the runs are
    drawn with replacement, independently of the clusters; with two or three, the intervals are too
    narrow (docs/corpora.md). The same draws on every call.
    """
    rows = moment_sums(preds[None], labels[None])  # (6, N, C), one utterance each
    without = torch.where(labels.isnan().all(0), torch.nan, 0.0)  # columns without label
    return resampled_sums(rows, ids, seeds) + without.numpy()


def resampled_sums(rows: Tensor, ids: np.ndarray, seeds: np.ndarray | None = None) -> np.ndarray:
    """As resampled_cccs, from the moment sums of each row (6, N, C), which may be weighted.

    A CCC needs six sums only, so a resample adds up those of its clusters.
    """
    seeds = np.zeros_like(ids) if seeds is None else seeds
    size, runs, columns = int(ids.max()) + 1, int(seeds.max()) + 1, rows.shape[2]
    sums = torch.zeros(6, size * runs, columns, dtype=torch.float64)
    sums.index_add_(1, torch.from_numpy(ids * runs + seeds), rows)
    sums = sums.reshape(6, size, runs * columns)
    rng, cccs = np.random.default_rng(SEED), []
    for _ in range(0, RESAMPLES, 100):  # 100 at a time: bounded memory for 100 000 clusters
        times = rng.multinomial(size, np.full(size, 1 / size), size=100)  # (100, clusters)
        drawn = torch.einsum("rc,fct->frt", torch.from_numpy(times).double(), sums)
        cccs.append(concordance(drawn))  # (100, S C)
    cccs = torch.cat(cccs).numpy().reshape(-1, runs, columns)
    times = rng.multinomial(runs, np.full(runs, 1 / runs), size=len(cccs))  # (RESAMPLES, S)
    return np.einsum("rs,rsc->rc", times / runs, cccs)


def intervals(cccs: np.ndarray, names: list[str]) -> dict[str, tuple[float, float]]:
    """95 % percentile interval per column of (RESAMPLES, C) and, by the last name, their mean."""
    cccs = np.column_stack((cccs, np.nanmean(cccs, 1)))
    low, high = np.quantile(cccs, (0.025, 0.975), axis=0).tolist()
    return dict(zip(names, zip(low, high)))


# ---------------------------------------------------------------------------------------------
# Human raters


def human_ceiling(ratings: pd.DataFrame, rows: pd.DataFrame, target: str) -> dict | None:
    """What one rater reaches on `rows` (utt_id, dialog, speaker), or None without two raters.

    ratings: utt_id and the target's rating, a line per rater, in any order. Of an utterance with
    n >= 2 ratings, each is compared with the mean of the n - 1 others; the CCC is one over all
    these pairs, each with the weight 1 / n, so that an utterance counts once, as for a model. A
    model may exceed it: the mean of all raters, with which it is compared, is less noisy.

    {"utterances": [utt_id, ...] that it is of, "raters": mean n, "ccc", "interval": (low, high),
    "clusters", "reliability": of the mean of all raters, from split_half}
    """
    rows = rows.drop_duplicates("utt_id")
    rated = ratings[["utt_id", target]].dropna()
    rated = rated[rated["utt_id"].isin(rows["utt_id"])]
    counts = rated["utt_id"].map(rated["utt_id"].value_counts()).to_numpy()
    rated, counts = rated[counts > 1], counts[counts > 1]
    if not len(rated):
        return None
    rows = rows[rows["utt_id"].isin(rated["utt_id"])]
    utterance = pd.Index(rows["utt_id"]).get_indexer(rated["utt_id"])  # row of each rating
    values = rated[target].to_numpy(dtype=np.float64)
    others = (np.bincount(utterance, values)[utterance] - values) / (counts - 1)
    pairs = moment_sums(torch.tensor(values[None, :, None]), torch.tensor(others[None, :, None]))
    pairs = pairs / torch.from_numpy(counts)[:, None]  # (6, ratings, 1)
    ids, clusters = cluster_ids(rows)
    [interval] = np.quantile(resampled_sums(pairs, ids[utterance]), (0.025, 0.975), axis=0).T
    return {
        "utterances": rows["utt_id"].tolist(),
        "raters": len(rated) / len(rows),
        "ccc": float(concordance(pairs.sum(1))),
        "interval": tuple(interval.tolist()),
        "clusters": clusters,
        "reliability": split_half(values, utterance),
    }


def split_half(values: np.ndarray, utterance: np.ndarray) -> float:
    """Reliability of the mean over the raters of an utterance; NaN if means do not vary.

    values (N,): ratings; utterance (N,): that of each, from 0, of two raters at least. The raters
    of each utterance are split into two random halves, with r the correlation of the halves' means;
    2 r / (1 + r) is that of means over all raters (Spearman-Brown). Mean over SPLITS_IN_HALF
    draws, the same on every call. Its square root bounds the correlation of any predictor with
    these labels, but for chance.
    """
    rng, found = np.random.default_rng(SEED), []
    counts = np.bincount(utterance)
    place = np.arange(len(values)) - np.repeat(np.cumsum(counts) - counts, counts)
    for _ in range(SPLITS_IN_HALF):
        order = rng.permutation(len(values))
        order = order[np.argsort(utterance[order], kind="stable")]  # random within an utterance
        halves = []
        for half in (0, 1):
            chosen = order[place % 2 == half]
            sums = np.bincount(utterance[chosen], values[chosen], len(counts))
            halves.append(sums / np.bincount(utterance[chosen], minlength=len(counts)))
        if min(map(np.ptp, halves)) == 0:
            return float("nan")
        r = np.corrcoef(*halves)[0, 1]
        found.append(2 * r / max(1 + r, 1e-9))
    return float(np.mean(found))
