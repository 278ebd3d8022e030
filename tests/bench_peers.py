"""The same training job through transformers' Trainer and through train.py: speed, memory, loss.

    python tests/bench_peers.py --wavlm tiny --steps 30                # to see it work: a minute
    python tests/bench_peers.py --wavlm base                           # CPU: twenty minutes
    python tests/bench_peers.py --wavlm large --amp fp16 --batch_size 16 --steps 60     # GPU
    python tests/bench_peers.py --wavlm base --unfreeze top:3          # the rest frozen, or cached

The first steps of fine-tuning WavLM for two targets: the same weights (random, saved once), the
same recordings (noise, with IEMOCAP's durations: log-normal, mean 4.46 s, at most 12 s), AdamW,
precision, batch size, dropout, frozen CNN, CCC + 0.1 MSE. The Trainer gets AutoModel and a
mean-pool head, as it comes and with its own length grouping; train.py runs without prosody, FiLM
and state, which leaves the same shape. Each run is a process of its own; the contestants take
turns, and the table gives medians over the runs. Speed: seconds of real audio over the time of all
steps but the first. Memory: resident on a CPU, allocated on a GPU. Loss: mean over the last quarter
of the steps.

Needs accelerate (pip install accelerate), which Trainer imports. Run by hand.
"""

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import soundfile
import torch
import torch.nn.functional as F
from torch import Tensor, nn

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # of several, the Trainer would take all
sys.path.insert(0, str(Path(__file__).parent.parent))
import train
from util import distributed
from wavlm import load_wavlm, save_wavlm

ROOT = Path(__file__).parent.parent
RATE = 16_000
CONTESTANTS = {
    "trainer": "Trainer, as it comes",
    "grouped": "Trainer, grouped by length",
    "vatune": "train.py",
}


def make_job(directory: Path, args: argparse.Namespace) -> None:
    """Weights and a corpus of three sessions; sessions 2 and 3, dev and test, are a token."""
    torch.manual_seed(0)
    save_wavlm(load_wavlm(args.wavlm), directory / "wavlm")
    rng = np.random.default_rng(0)
    rows = []
    for i in range(args.utterances + 4):
        seconds = min(12.0, max(0.6, float(np.exp(1.26 + 0.66 * rng.standard_normal()))))
        session = 3 if i < args.utterances else 1 + i % 2  # test = 1, dev = 2
        valence, arousal = rng.random(2)
        audio = 0.02 * (1 + 4 * arousal) * rng.standard_normal(int(seconds * RATE))
        soundfile.write(directory / f"{i}.wav", audio, RATE, subtype="PCM_16")
        rows.append([f"u{i}", f"{i}.wav", f"{valence:.4f}", f"{arousal:.4f}", session, f"s{i}"])
    with open(directory / "job.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["utt_id", "path", "valence", "arousal", "session", "speaker"])
        writer.writerows(rows)


# ---------------------------------------------------------------- the rival


class MeanPoolHead(nn.Module):
    """AutoModel, mean over real frames, two linear maps: what people write."""

    def __init__(self, path: Path, unfreeze: str) -> None:
        from transformers import AutoModel

        super().__init__()
        self.encoder = AutoModel.from_pretrained(path, layerdrop=0.0, mask_time_prob=0.0)
        self.encoder.freeze_feature_encoder()
        self.encoder.feature_extractor.requires_grad_(False)
        if unfreeze != "transformer":  # top:K
            self.encoder.requires_grad_(False)
            for layer in self.encoder.encoder.layers[-int(unfreeze.removeprefix("top:")) :]:
                layer.requires_grad_(True)
        width = self.encoder.config.hidden_size
        self.head = nn.Sequential(nn.Linear(width, 256), nn.ReLU(), nn.Linear(256, 2))

    def forward(self, input_values: Tensor, attention_mask: Tensor, labels: Tensor) -> dict:
        frames = self.encoder(input_values, attention_mask=attention_mask).last_hidden_state
        mask = self.encoder._get_feature_vector_attention_mask(frames.shape[1], attention_mask)
        mask = mask.to(frames.dtype).unsqueeze(-1)
        preds = self.head((frames * mask).sum(1) / mask.sum(1)).float().sigmoid()
        mp, my = preds.mean(0), labels.mean(0)
        spread = preds.var(0, correction=0) + labels.var(0, correction=0) + (mp - my) ** 2
        ccc = 2 * ((preds - mp) * (labels - my)).mean(0) / (spread + 1e-8)
        return {"loss": 1 - ccc.mean() + 0.1 * F.mse_loss(preds, labels)}


def run_trainer(directory: Path, args: argparse.Namespace, grouped: bool) -> dict:
    from transformers import Trainer, TrainerCallback, TrainingArguments

    with open(directory / "job.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["session"] == "3"]

    lengths = [soundfile.info(directory / row["path"]).frames for row in rows]

    class Clips(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return len(rows)

        def __getitem__(self, i: int) -> dict:
            audio, _ = soundfile.read(directory / rows[i]["path"], dtype="float32")
            audio = (audio - audio.mean()) / np.sqrt(audio.var() + 1e-7)
            labels = [float(rows[i]["valence"]), float(rows[i]["arousal"])]
            return {"input_values": audio, "labels": labels, "length": len(audio)}

        def __getitems__(self, indices: list[int]) -> list[dict]:
            return [self[i] for i in indices]

    heard = []

    def collate(items: list[dict]) -> dict:
        clips = [torch.from_numpy(item["input_values"]) for item in items]
        samples = torch.tensor([len(clip) for clip in clips])
        heard.append(float(samples.sum()) / RATE)
        input_values = nn.utils.rnn.pad_sequence(clips, batch_first=True)
        mask = (torch.arange(input_values.shape[1]) < samples[:, None]).long()
        labels = torch.tensor([item["labels"] for item in items])
        return {"input_values": input_values, "attention_mask": mask, "labels": labels}

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.marks, self.losses = [], []

        def on_step_end(self, *_: object, **__: object) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.marks.append(time.perf_counter())

        def on_log(self, *_: object, logs: dict, **__: object) -> None:
            if "loss" in logs:
                self.losses.append(float(logs["loss"]))

    class Grouped(Trainer):
        def _get_train_sampler(self, *_: object) -> torch.utils.data.Sampler | None:
            from transformers.trainer_pt_utils import LengthGroupedSampler

            if not grouped:
                return super()._get_train_sampler()
            return LengthGroupedSampler(args.batch_size, lengths=lengths)

    torch.manual_seed(0)
    distributed.allow_tf32(True)  # as train.py does
    flags = TrainingArguments(
        output_dir=str(directory / "out"), per_device_train_batch_size=args.batch_size,
        max_steps=args.steps, learning_rate=1e-5, lr_scheduler_type="cosine", warmup_steps=0.1,
        max_grad_norm=1.0, weight_decay=0.01, bf16=args.amp == "bf16", fp16=args.amp == "fp16",
        use_cpu=not torch.cuda.is_available(), dataloader_drop_last=True, logging_steps=1,
        save_strategy="no", report_to=[], disable_tqdm=True, remove_unused_columns=False,
    )  # fmt: skip
    clock = Clock()
    model = MeanPoolHead(directory / "wavlm", args.unfreeze)
    trainer = Grouped(
        model=model, args=flags, train_dataset=Clips(), data_collator=collate, callbacks=[clock]
    )
    trainer.train()
    seconds = clock.marks[-1] - clock.marks[0]
    audio = sum(heard[1 : len(clock.marks)])
    return summary(seconds, audio, clock.losses)


# ---------------------------------------------------------------- ours


def run_vatune(directory: Path, args: argparse.Namespace) -> dict:
    flags = ["--data", directory / "job.csv", "--wavlm", directory / "wavlm", "--prosody", "none"]
    flags += ["--no_film", "--d_state", "0", "--epochs", "1", "--log_every", "1", "--layers"]
    flags += [json.loads((directory / "wavlm/config.json").read_text())["num_hidden_layers"]]
    flags += ["--batch_size", args.batch_size, "--amp", args.amp, "--cache_dir", directory / "c"]
    flags += ["--unfreeze", args.unfreeze, "--attention", args.attention]
    flags += ["--compile"] if args.compile else []
    flags += ["--num_workers", "0", "--out", directory / "runs", "--name", "b", "--overwrite"]
    flags += ["--encoder_lr", "1e-5", "--lr", "1e-5", "--max_steps", args.steps]
    assert train.main(train.parse_args([str(flag) for flag in flags])) == 0
    lines = (directory / "runs/b/fold1/metrics.jsonl").read_text().splitlines()
    steps = [r for r in map(json.loads, lines) if r["event"] == "train"]
    timed = [r for r in steps if "ms_per_step" in r]
    seconds = sum(r["ms_per_step"] for r in timed) / 1000
    audio = sum(r["audio_seconds_per_second"] * r["ms_per_step"] for r in timed) / 1000
    return summary(seconds, audio, [r["loss"] for r in steps])


def summary(seconds: float, audio: float, losses: list[float]) -> dict:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    last = losses[-max(1, len(losses) // 4) :]
    return {
        "seconds": seconds,
        "audio_seconds_per_second": audio / seconds,
        "peak_gib": distributed.peak_gib(device),
        "loss": statistics.mean(last),
    }


# ---------------------------------------------------------------- the race


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--wavlm", default="base", help="random weights of this size")
    p.add_argument("--utterances", type=int, default=1600, help="in the train split")
    p.add_argument("--steps", type=int, default=12, help="of which the first is not timed")
    p.add_argument("--batch_size", type=int, default=8)
    p.add_argument("--amp", choices=("off", "bf16", "fp16"), default="off")
    p.add_argument("--unfreeze", default="transformer", help="or top:K")
    p.add_argument("--attention", default="fused", help="of train.py")
    p.add_argument("--compile", action="store_true", help="in train.py")
    p.add_argument("--runs", type=int, default=3)
    p.add_argument("--contestants", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS))
    p.add_argument("--worker", choices=CONTESTANTS, help=argparse.SUPPRESS)
    p.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.worker:
        run = {
            "trainer": lambda: run_trainer(args.directory, args, grouped=False),
            "grouped": lambda: run_trainer(args.directory, args, grouped=True),
            "vatune": lambda: run_vatune(args.directory, args),
        }
        print("RESULT " + json.dumps(run[args.worker]()))
        return
    with tempfile.TemporaryDirectory(prefix="vatune-bench-") as name:
        directory = Path(name)
        make_job(directory, args)
        results = {contestant: [] for contestant in args.contestants}
        for _ in range(args.runs):
            for contestant, entries in results.items():
                again = [sys.executable, __file__, *sys.argv[1:], "--worker", contestant]
                done = subprocess.run(
                    [*again, "--directory", name], capture_output=True, text=True, cwd=ROOT
                )
                line = [x for x in done.stdout.splitlines() if x.startswith("RESULT ")]
                if not line:
                    sys.exit(f"{contestant} failed:\n{done.stderr[-3000:]}")
                entries.append(json.loads(line[0].removeprefix("RESULT ")))
                print(contestant, entries[-1], flush=True)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    job = f"{args.wavlm}, {args.unfreeze}, amp {args.amp}"
    print(f"\n{job}, {args.steps} steps of {args.batch_size} utterances")
    print(f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}\n")
    print("| job | s | audio-s/s | peak GiB | loss | train.py is faster by |")
    print("|---|---|---|---|---|---|")
    medians = {
        contestant: {key: statistics.median(e[key] for e in entries) for key in entries[0]}
        for contestant, entries in results.items()
    }
    best = medians.get("vatune", {}).get("audio_seconds_per_second", float("nan"))
    for contestant, m in medians.items():
        ratio = best / m["audio_seconds_per_second"]
        print(
            f"| {CONTESTANTS[contestant]} | {m['seconds']:.1f} | "
            f"{m['audio_seconds_per_second']:.1f} | {m['peak_gib']:.2f} | {m['loss']:.3f} | "
            f"{ratio:.2f} |"
        )


if __name__ == "__main__":
    main()
