"""IEMOCAP as released (Busso et al. 2008): Session*/dialog/EmoEvaluation and Session*/sentences."""

import math
import re
from pathlib import Path

from corpora.base import Corpus, Utterance, to_float, to_label
from util.files import UserError

# [onset - end] utt_id emotion [valence, arousal, dominance]
TURN = re.compile(r"\[([\d.]+) - ([\d.]+)\]\t([\w.-]+)\t(\w+)\t\[(.+), (.+), (.+)\]\s*")
SPEAKER = re.compile(r"_([FM])\d{3}")


def read_iemocap(root: Path, label_range: tuple[float, float], name: str = "iemocap") -> Corpus:
    """The corpus below `root`. Utterances of emotion `xxx` (no majority) have valid ratings."""
    if (root / "IEMOCAP_full_release").is_dir():
        root = root / "IEMOCAP_full_release"
    corpus, annotated = Corpus(name, root, label_range, []), set()
    # *.txt of this folder only: its subfolders repeat every turn once per evaluator
    tables = without_forks(root, "Session*/dialog/EmoEvaluation/*.txt")
    if not tables:
        raise UserError(f"{root}: no Session*/dialog/EmoEvaluation/*.txt (set --data_dir)")
    for table in tables:
        session, dialog = table.parents[2].name, table.stem
        lines = table.read_text("utf-8", errors="replace").splitlines()
        for row, line in enumerate(lines, 1):
            # neither a turn nor a damaged one: header, blank, or an evaluator's C-/A- line
            if not line.startswith("[") and not SPEAKER.search(line):
                continue
            match = TURN.fullmatch(line)
            genders = SPEAKER.findall(match[3]) if match else []
            if not genders:
                corpus.skip(f"{table.name} row {row}", table, "annotation not understood")
                continue
            utt_id, emotion = match[3], match[4]
            annotated.add(utt_id)
            onset, end = map(to_float, match.group(1, 2))
            valence, arousal, dominance = map(to_label, match.group(5, 6, 7))
            gender = genders[-1]  # not the letter of the prefix, which names the dialogue
            speaker = f"Ses{re.sub('[^0-9]', '', session).zfill(2)}{gender}"
            wav = root / session / "sentences" / "wav" / dialog / f"{utt_id}.wav"
            reason = "" if wav.is_file() else "audio file missing"
            if not math.isfinite(onset + end):
                reason = "time is not a number"
            u = Utterance(
                utt_id, wav, valence=valence, arousal=arousal, dominance=dominance,
                session=session, dialog=dialog, speaker=speaker,
                gender=gender, emotion=emotion, onset=onset,
            )  # fmt: skip
            if reason:
                corpus.skip(utt_id, wav, reason)
            else:
                corpus.utterances.append(u)
    for wav in without_forks(root, "Session*/sentences/wav/*/*.wav"):
        if wav.stem not in annotated:
            corpus.skip(wav.stem, wav, "no annotation")
    return corpus


def without_forks(root: Path, pattern: str) -> list[Path]:
    """Files in order, without those that the Mac which packed the release left beside them."""
    return sorted(path for path in root.glob(pattern) if not path.name.startswith("._"))
