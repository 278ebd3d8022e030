"""text.py: vectors of transcripts by a tiny random text model."""

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModel,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertTokenizerFast,
    GPT2Config,
    GPT2Model,
    PreTrainedTokenizerFast,
    T5Config,
    T5Model,
)

import text
from util.files import UserError

WORDS = ["i", "am", "so", "very", "happy", "sad", "today", "no", "yes", "excuse", "me", "a"]
SHAPE = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}
SAID = {"a": "I am so very happy", "b": "no", "c": "", "d": "so sad today"}


def tiny_bert(folder, seed=0):
    """A masked language model, as on the hub: it has no pooler."""
    torch.manual_seed(seed)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    BertTokenizerFast.from_pretrained(folder).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(vocabulary), intermediate_size=32, max_position_embeddings=14, **SHAPE
    )
    BertForMaskedLM(config).save_pretrained(folder)
    return folder


def tiny_other(folder, model):
    """A model whose tokenizer knows neither padding nor special tokens."""
    vocabulary = {word: i for i, word in enumerate(["<unk>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
    model.save_pretrained(folder)


def write_csv(path, texts):
    """A manifest without labels."""
    lines = [f"{utt_id},x.wav,{said}" for utt_id, said in texts.items()]
    (path.parent / "x.wav").touch()
    path.write_text("\n".join(["utt_id,path,text", *lines]) + "\n")
    return path


def extract(tmp_path, *flags, data="m.csv", model="model", out="out"):
    argv = ["--data", tmp_path / data, "--model", tmp_path / model]
    text.extract(text.parse_args(list(map(str, [*argv, "--out", tmp_path / out, *flags]))))
    return {path.stem: np.load(path) for path in (tmp_path / out).glob("*.npy")}


def test_a_vector_is_the_mean_over_tokens_whatever_shares_the_batch(tmp_path, capsys):
    folder = tiny_bert(tmp_path / "model")
    write_csv(tmp_path / "m.csv", SAID)
    got = extract(tmp_path)
    said = capsys.readouterr().out
    assert "1 of 4 utterances have no words (c)" in said and "4 vectors written" in said
    alone = extract(tmp_path, "--batch_size", "1", out="alone")
    first = extract(tmp_path, "--layer", "1", out="first")
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder)
    for utt_id in SAID:
        tokens = tokenizer(SAID[utt_id], return_tensors="pt")
        with torch.no_grad():
            states = model.eval()(**tokens, output_hidden_states=True).hidden_states
        for vectors, layer in ((got, 2), (alone, 2), (first, 1)):
            expected = states[layer][0].mean(0).numpy()
            np.testing.assert_allclose(vectors[utt_id], expected, rtol=1e-4, atol=1e-5)


def test_what_is_there_is_kept_unless_its_transcript_changed_and_another_model_is_refused(
    tmp_path, capsys
):
    tiny_bert(tmp_path / "model")
    write_csv(tmp_path / "m.csv", SAID)
    before = extract(tmp_path)
    files = {path.stem: path for path in (tmp_path / "out").glob("*.npy")}
    stamps = {utt_id: path.stat().st_mtime_ns for utt_id, path in files.items()}
    files["b"].unlink()
    np.save(tmp_path / "out/e.npy", np.zeros(16))  # of somebody else
    write_csv(tmp_path / "m.csv", SAID | {"d": "so happy today", "e": "yes"})
    after = extract(tmp_path)
    assert "2 vectors are of other transcripts (d)" in capsys.readouterr().out
    changed = {utt_id for utt_id in stamps if files[utt_id].stat().st_mtime_ns != stamps[utt_id]}
    assert changed == {"b", "d"} and after["e"].any()
    np.testing.assert_allclose(after["b"], before["b"], atol=1e-6)
    assert np.abs(after["d"] - before["d"]).max() > 1e-3
    tiny_bert(tmp_path / "other", seed=1)
    for flags, model in ((["--layer", "1"], "model"), ([], "other")):
        with pytest.raises(UserError, match="of another model or --layer"):
            extract(tmp_path, *flags, model=model)
    (tmp_path / "out/text.json").unlink()
    with pytest.raises(UserError, match="or of another program: choose another --out"):
        extract(tmp_path)


@pytest.mark.parametrize("kind", ["gpt2", "t5"])
def test_a_model_without_padding_or_with_a_decoder_serves_too(tmp_path, kind):
    torch.manual_seed(0)
    count = len(WORDS) + 1
    model = GPT2Model(GPT2Config(vocab_size=count, n_positions=32, n_embd=16, n_layer=2, n_head=2))
    if kind == "t5":
        shape = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
        model = T5Model(T5Config(vocab_size=count, decoder_start_token_id=0, **shape))
    tiny_other(tmp_path / "model", model)
    write_csv(tmp_path / "m.csv", SAID)
    got = extract(tmp_path)
    assert not got["c"].any()  # no token at all
    alone = extract(tmp_path, "--batch_size", "1", out="alone")
    for utt_id in SAID:
        np.testing.assert_allclose(got[utt_id], alone[utt_id], rtol=1e-4, atol=1e-5)


def test_a_text_beyond_the_models_length_is_cut_and_counted(tmp_path, capsys):
    tiny_bert(tmp_path / "model")
    write_csv(tmp_path / "m.csv", {"a": "so " * 50, "b": "so " * 10})  # and [CLS], [SEP]
    got = extract(tmp_path)
    assert "1 texts are longer than 12 tokens (a): cut there" in capsys.readouterr().out
    np.testing.assert_allclose(got["a"], got["b"], rtol=1e-4, atol=1e-6)


SPOKEN = ("Excuse me.", "Yes. [LAUGHTER]")


def iemocap(root):
    dialog = "Ses01F_impro01"
    labels, said = "", f"{dialog}_FXX0 [005.0000-006.0000]: So?\nF: what\n"
    for i, words in enumerate(SPOKEN):
        write(root / f"Session1/sentences/wav/{dialog}/{dialog}_F00{i}.wav", "")
        labels += f"[{i}.0000 - {i + 1}.0000]\t{dialog}_F00{i}\tneu\t[2.5, 2.5, 2.5]\n"
        said += f"{dialog}_F00{i} [00{i}.0000-00{i + 1}.0000]: {words}\n"
    write(root / f"Session1/dialog/EmoEvaluation/{dialog}.txt", labels)
    write(root / f"Session1/dialog/transcriptions/{dialog}.txt", said)


def msp_podcast(root):
    rows = "FileName,EmoAct,EmoVal,Split_Set\n"
    for i, words in enumerate(SPOKEN):
        write(root / f"Audios/MSP-PODCAST_0001_000{i}.wav", "")
        write(root / f"Transcripts/MSP-PODCAST_0001_000{i}.txt", words + "\n")
        rows += f"MSP-PODCAST_0001_000{i}.wav,4,4,Train\n"
    write(root / "Labels/labels_consensus.csv", rows)


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


@pytest.mark.parametrize("make", [iemocap, msp_podcast])
def test_transcripts_of_a_published_corpus_are_those_of_a_csv_with_the_same_words(tmp_path, make):
    tiny_bert(tmp_path / "model")
    make(tmp_path / "corpus")
    flags = ["--data", make.__name__, "--data_dir", tmp_path / "corpus"]
    got = extract(tmp_path, *flags)
    write_csv(tmp_path / "m.csv", dict(zip("ab", SPOKEN)))
    expected = extract(tmp_path, out="expected")
    for utt_id, other in zip(sorted(got), "ab", strict=True):
        np.testing.assert_allclose(got[utt_id], expected[other], rtol=1e-4, atol=1e-5)
    for path in (tmp_path / "corpus").rglob("*.txt"):
        if path.parent.name in ("transcriptions", "Transcripts"):
            path.unlink()
    with pytest.raises(UserError, match="2 of 2 utterances have no transcript"):
        extract(tmp_path, *flags, out="none")


def test_what_has_no_words_or_is_no_text_model_is_said_in_a_line(tmp_path, small_wavlm):
    write_csv(tmp_path / "m.csv", SAID)
    for model in (small_wavlm, "nobody"):
        with pytest.raises(UserError, match=r"--model .*: cannot be used \(transformers") as caught:
            extract(tmp_path, model=model)
        assert "\n" not in str(caught.value)
    tiny_bert(tmp_path / "model")
    with pytest.raises(UserError, match=r"--layer 3: .* has layers 0 to 2"):
        extract(tmp_path, "--layer", "3")
    write_csv(tmp_path / "m.csv", {"a": " "})
    with pytest.raises(UserError, match="none of its 1 utterances has a transcript"):
        extract(tmp_path)
    (tmp_path / "m.csv").write_text("utt_id,path\na,x.wav\n")
    with pytest.raises(UserError, match=r"1 of 1 .* no transcript \(a\): expected a column text"):
        extract(tmp_path)
