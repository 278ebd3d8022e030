"""The readers of corpora with several raters: who rated what."""

import numpy as np
import pytest

import corpora


def rated(corpus, columns=("valence", "arousal")):
    table = corpus.ratings()[["utt_id", "rater", *columns]]
    return [*table.itertuples(index=False, name=None)]


def test_iemocap_gives_its_evaluators_and_not_the_actors_on_themselves(tmp_path):
    folder = tmp_path / "Session1" / "sentences" / "wav" / "Ses01F_impro01"
    table = tmp_path / "Session1" / "dialog" / "EmoEvaluation" / "Ses01F_impro01.txt"
    for path in (folder, table.parent):
        path.mkdir(parents=True)
    turn = "[{0}.5 - {0}.9]\tSes01F_impro01_F00{0}\tneu\t[2.5000, 2.5000, 2.5000]\n"
    for i in range(3):
        (folder / f"Ses01F_impro01_F00{i}.wav").touch()
    table.write_text(
        "% [START_TIME - END_TIME] TURN_NAME EMOTION [V, A, D]\n\n"
        + turn.format(0)
        + "C-E2:\tNeutral;\t()\nC-F1:\tNeutral;\t()\n"
        + "A-E3:\tval 3; act 2; dom  2;\t()\nA-E4:\tval 2; act 3; dom  3;\t(breathing)\n"
        + "A-F1:\tval 5; act 5; dom  5;\t()\n\n"
        + turn.format(1)
        + "A-E3:\tval 4; act ; dom  2;\t()\nA-M1:\tval 5; act 5; dom  5;\t()\n\n"
        + turn.format(2).replace("2.5000, 2.5000, ", "")  # not understood
        + "A-E3:\tval 1; act 1; dom  1;\t()\n"
    )
    corpus = corpora.read_corpus("iemocap", str(tmp_path), None)
    first, second = "Ses01F_impro01_F000", "Ses01F_impro01_F001"
    assert rated(corpus)[:2] == [(first, "E3", 3, 2), (first, "E4", 2, 3)]
    assert rated(corpus, ["valence", "dominance"])[2] == (second, "E3", 4, 2)
    assert np.isnan(rated(corpus)[2][3]) and len(corpus.ratings()) == 3


NAMES = ("MSP-PODCAST_0001_0001.wav", "MSP-PODCAST_0001_0002.wav")
IN_COLUMNS = "FileName,WorkerID,EmoClass_Major,EmoAct,EmoVal,EmoDom\n" + "".join(
    f"{NAMES[i]},W{w},Neutral,{a},{v},4\n"
    for i, w, a, v in ((0, 1, 2, 6), (0, 2, 3, 5), (1, 1, 7, 1))
)
IN_ONE_CELL = "FileName,Detail\n" + (
    f'{NAMES[0]},"W1; Neutral; Concerned,Neutral; A:2.000; V:6.000; D:4.000;"\n'
    f"{NAMES[0]},W2; Other-Curious; A:3.0; V:5.0; D:4.0;\n"
    f"{NAMES[1]},W1; Sad; ; A:7; V:1; D:4;\n"
)


@pytest.mark.parametrize(
    "text",
    [
        IN_COLUMNS,
        IN_ONE_CELL,
        "",
        "FileName,EmoAct,EmoVal\na.wav,1,2\n",
        f"File,Detail\n{NAMES[0]},W2; Sad; ; A:3.0; V:5.0; D:4.0;\n",
        f"File,WorkerID,EmoAct,EmoVal\n{NAMES[0]},W2,3,5\n",
    ],
)
def test_msp_podcast_gives_its_workers_in_each_form_of_labels_detailed(tmp_path, text, caplog):
    (tmp_path / "Audios").mkdir()
    (tmp_path / "Labels").mkdir()
    for audio in NAMES:
        (tmp_path / "Audios" / audio).touch()
    header = "FileName,EmoClass,EmoAct,EmoVal,EmoDom,SpkrID,Gender,Split_Set\n"
    lines = "".join(f"{audio},N,2.5,5.5,4,1,Male,Train\n" for audio in NAMES)
    (tmp_path / "Labels" / "labels_consensus.csv").write_text(header + lines)
    (tmp_path / "Labels/labels_detailed.csv").write_text(text)
    corpus = corpora.read_corpus("msp_podcast", str(tmp_path), None)
    assert [(u.valence, u.arousal) for u in corpus.utterances] == [(5.5, 2.5)] * 2
    if text in (IN_COLUMNS, IN_ONE_CELL):
        one, two = (audio.removesuffix(".wav") for audio in NAMES)
        assert rated(corpus) == [(one, "W1", 6, 2), (one, "W2", 5, 3), (two, "W1", 1, 7)]
    else:
        assert not len(corpus.ratings())
        assert caplog.messages[0].startswith("labels_detailed.csv is not understood")
