"""IEMOCAP as released (Busso et al. 2008): Session*/dialog/EmoEvaluation and Session*/sentences."""

import functools
import math
import re
from pathlib import Path

from corpora.base import Corpus, Utterance, table_of_ratings, to_float, to_label
from util.files import UserError

# [onset - end] utt_id emotion [valence, arousal, dominance]
TURN = re.compile(r"\[([\d.]+) - ([\d.]+)\]\t([\w.-]+)\t(\w+)\t\[(.+), (.+), (.+)\]\s*")
# A-E3: val 2; act 3; dom 3; of an evaluator. A-F1 and A-M1 are the actors on themselves: they know
# what they meant, and the released labels are without them
RATING = re.compile(r"A-(E\d+):\s*val([^;]*);\s*act([^;]*);\s*dom([^;]*);")
SPEAKER = re.compile(r"_([FM])\d{3}")
SPOKEN = re.compile(r"([\w.-]+) +\[[\d. -]+\]:(.*)")  # utt_id [onset-end]: words


def read_iemocap(root: Path, label_range: tuple[float, float], name: str = "iemocap") -> Corpus:
    """The corpus below `root`. Utterances of emotion `xxx` (no majority) have valid ratings."""
    if (root / "IEMOCAP_full_release").is_dir():
        root = root / "IEMOCAP_full_release"
    corpus, annotated, ratings = Corpus(name, root, label_range, []), set(), []
    # *.txt of this folder only: its subfolders repeat every turn once per evaluator
    tables = without_forks(root, "Session*/dialog/EmoEvaluation/*.txt")
    if not tables:
        raise UserError(f"{root}: no Session*/dialog/EmoEvaluation/*.txt (set --data_dir)")
    for table in tables:
        session, dialog = table.parents[2].name, table.stem
        lines, utt_id = table.read_text("utf-8", errors="replace").splitlines(), ""
        for row, line in enumerate(lines, 1):
            rating = RATING.match(line)
            if rating and utt_id:
                values = (to_float(text.strip()) for text in rating.groups()[1:])
                ratings.append((utt_id, rating[1], *values))
            # neither a turn nor a damaged one: header, blank, or an evaluator's C-/A- line
            if not line.startswith("[") and not SPEAKER.search(line):
                continue
            match, utt_id = TURN.fullmatch(line), ""
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
            if not math.isfinite(onset + end):
                corpus.skip(utt_id, wav, "time is not a number")
            elif not wav.is_file():
                corpus.skip(utt_id, wav, "audio file missing")
            else:
                u = Utterance(
                    utt_id, wav, valence=valence, arousal=arousal, dominance=dominance,
                    session=session, dialog=dialog, speaker=speaker, gender=gender,
                    emotion=emotion, onset=onset,
                )  # fmt: skip
                corpus.utterances.append(u)
    corpus.ratings = functools.partial(table_of_ratings, ratings)
    corpus.texts = functools.partial(read_transcripts, root)
    for wav in without_forks(root, "Session*/sentences/wav/*/*.wav"):
        if wav.stem not in annotated:
            corpus.skip(wav.stem, wav, "no annotation")
    return corpus


def read_transcripts(root: Path) -> dict[str, str]:
    """utt_id -> its words in Session*/dialog/transcriptions, with marks such as [LAUGHTER]."""
    texts = {}
    for table in without_forks(root, "Session*/dialog/transcriptions/*.txt"):
        for line in table.read_text("utf-8", errors="replace").splitlines():
            if match := SPOKEN.fullmatch(line.strip()):
                texts[match[1]] = match[2]
    return texts


def without_forks(root: Path, pattern: str) -> list[Path]:
    """Files in order, without those that the Mac which packed the release left beside them."""
    return sorted(path for path in root.glob(pattern) if not path.name.startswith("._"))
