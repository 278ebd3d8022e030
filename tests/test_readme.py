"""README.md and docs/: their commands run, the README's examples are applied and trained.

The commands run in the order of the text, in a copy of the sources, among small stand-ins for what
the text takes for granted: corpora, recordings, a manifest. Only QUICK, MEANT and NOT_RUN change
them, so that they take a minute. Python is tests/warm_python.py; with -m slow they run once more
under the real one.
"""

import importlib.util
import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile
import torch
from helpers import ROOT, wait_for

from corpora.demo import DEMO_VERSION, demo_voice, synthesise
from train import parse_args

README = (ROOT / "README.md").read_text()
PAGES = [page.read_text() for page in sorted(ROOT.glob("docs/*.md"))]
BEFORE, CHANGES = re.split(r"^## How to change it\n", README, flags=re.MULTILINE)
USAGE = "\n".join([BEFORE, *PAGES])

# What makes a command quick. These flags go before those of the command, which win: two steps of a
# narrow WavLM without download, on the CPU, in one process; the plan of a small CNN takes seconds.
TRAIN = "--max_steps 2 --wavlm small_wavlm --device cpu --num_workers 0"
QUICK = {
    r"train\.py(?= -)": TRAIN,
    r"launch\.sh .* --(?= )": TRAIN,
    r"memory\.py(?= -(?!.*--lora))": "--encoder baseline --base_channels 8",
    r"memory\.py(?= -.*--lora)": "--wavlm small_wavlm",
}
# What a reader puts in place of a word. Three folds are all that the stand-ins have
MEANT = {
    r"train\.py \.\.\.": "train.py --data iemocap --data_dir D --preset full --name nodes",
    r"--data_dir D\b": "--data_dir IEMOCAP_full_release",
    r"--folds 1-\d": "--folds 1-3",
    r"--nproc_per_node 4": "--nproc_per_node 1",
}
NOT_RUN = {
    "python3 -m venv": "installing needs the network: .ci/run does it",
    "pip install": "the same",
    "python -m pytest": "this is it",
    "python tests/bench_": "minutes to hours",
    "python memory.py --calibrate": "half a minute; tests/test_memory.py calls it",
    "python faces.py": "needs a vision model; tests/test_faces.py calls it",
    "python text.py": "needs a text model; tests/test_text.py calls it",
    "#!/bin/bash\n# ladder.sh": "five experiments; the slow test below runs it",
}
# Files that a command writes without a flag that names them
WRITES = {
    "berlin.py": ["emodb/manifest.csv"],
    "logmel.py": ["features/03a00Wa.npy"],
    "melstats.py": ["mel-berlin/03a00Wa.npy"],
}
# What it must say where it writes nothing
SAYS = {
    "data.py": r"fold 1\nsplit .*\ntrain ",
    "memory.py": "card must have .* GiB",
    "report.py": "CCC",
    "--help": "--unfreeze UNFREEZE",
}


def commands(text):
    """Every command of a text in its order, without comments; a script is one."""
    for part in re.split(r"(```.*?```)", text, flags=re.DOTALL):
        if part.startswith("```bash\n#!"):
            yield part[8:-3]
        elif part.startswith("```bash\n"):
            yield from (re.sub(r" +#.*", "", line) for line in part[8:-3].strip().splitlines())
        elif not part.startswith("```"):
            yield from inline(part)


def inline(text):
    """Commands between backticks in running text."""
    found = [" ".join(words.split()) for words in re.findall(r"`([^`]+)`", text)]
    return [words for words in found if re.match(r"(python|torchrun|\S*launch\.sh) \S", words)]


def fences(language, text):
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


SLOW = pytest.mark.slow
COMMANDS = [c for c in dict.fromkeys(commands(USAGE)) if not c.startswith(tuple(NOT_RUN))]


# ---------------------------------------------------------------------------------------------
# The place where they run


def speech(path, speaker, valence, arousal, seconds=0.6):
    """A file of babble; valence and arousal in -1..1."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(list(path.stem.encode()))
    audio = synthesise(demo_voice(speaker, "FM"[speaker % 2]), valence, arousal, seconds, rng)
    soundfile.write(path, audio, 16_000)


def write_iemocap(root):
    """3 sessions with 4 dialogues of 4 turns."""
    rng = np.random.default_rng(0)
    for session in range(1, 4):
        for i in range(4):
            dialog, lines = f"Ses0{session}{'FM'[i % 2]}_impro0{i + 1}", []
            for turn in range(4):
                utt_id = f"{dialog}_{'FM'[turn % 2]}00{turn}"
                valence, arousal, dominance = rng.uniform(-0.9, 0.9, 3)
                wav = root / f"Session{session}/sentences/wav/{dialog}/{utt_id}.wav"
                speech(wav, 2 * session + turn % 2, valence, arousal)
                ratings = ", ".join(f"{3 + 2 * x:.4f}" for x in (valence, arousal, dominance))
                lines.append(f"[{turn}.0000 - {turn}.6000]\t{utt_id}\tneu\t[{ratings}]\n")
            table = root / f"Session{session}/dialog/EmoEvaluation/{dialog}.txt"
            table.parent.mkdir(parents=True, exist_ok=True)
            table.write_text("".join(lines))


def write_msp_podcast(root):
    rows = []
    for i, split in enumerate(["Train"] * 12 + ["Development"] * 6 + ["Test1"] * 6):
        name, x = f"MSP-PODCAST_{i:04d}_0001.wav", i % 5 / 2 - 1
        speech(root / "Audios" / name, i // 3, x, -x)
        ratings = {"EmoAct": 4 - 3 * x, "EmoVal": 4 + 3 * x, "EmoDom": 4 + x}
        rows.append({"FileName": name, **ratings, "SpkrID": i // 3, "Split_Set": split})
    (root / "Labels").mkdir()
    pd.DataFrame(rows).to_csv(root / "Labels/labels_consensus.csv", index=False)


def write_clips(root):
    """Files named as the Berlin ones, of 3 speakers, a vector for each, two manifests of them."""
    rng = np.random.default_rng(1)
    rows = []
    (root / "vectors").mkdir()
    for i in range(48):
        name = f"{3 + i % 3:02d}a{i // 3:02d}{'WLEAFTN'[i % 7]}a"
        valence, arousal = rng.uniform(0, 1, 2)
        speech(root / f"emodb/wav/{name}.wav", i % 3, 2 * valence - 1, 2 * arousal - 1)
        np.save(root / f"vectors/{name}.npy", rng.standard_normal(16).astype(np.float32))
        rows.append((name, f"emodb/wav/{name}.wav", valence, arousal))
    table = pd.DataFrame(rows, columns=["utt_id", "path", "valence", "arousal"])
    # the third session has 32 clips: a batch of --global_batch_size 32
    session = np.minimum(table.index // 8, 2)
    speaker, dialog = [f"p{k}" for k in session], [f"d{i // 4}" for i in table.index]
    manifest = table.assign(session=session, dialog=dialog, speaker=speaker)
    manifest.to_csv(root / "manifest.csv", index=False)
    split = ["test"] * 6 + ["dev"] * 6 + ["train"] * 12  # dev and test were not in fold 1's train
    table[:24].assign(split=split).to_csv(root / "personal.csv", index=False)


@pytest.fixture(scope="module", params=["warm", pytest.param("cold", marks=SLOW)])
def python(request):
    """PATH under which `python` and `torchrun` are quick to start, or the real ones."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    if request.param == "cold":
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="warm-") as directory:  # short: a socket's is limited
        server = subprocess.Popen(
            [sys.executable, ROOT / "tests/warm_python.py", directory],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            wait_for(lambda: os.access(f"{directory}/python", os.X_OK), 60)
            yield f"{directory}:{path}"
        finally:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


class Clone:
    """A copy of the sources in a folder, with a small demo corpus and a small WavLM."""

    def __init__(self, directory, small_wavlm, path):
        self.directory, self.path = directory, f"{directory}/bin:{path}"
        for file in (*ROOT.glob("*.py"), ROOT / "launch.sh"):
            shutil.copy(file, directory)
        for folder in ROOT.glob("*/__init__.py"):  # corpora/ and util/
            shutil.copytree(folder.parent, directory / folder.parent.name)
        shutil.copytree(small_wavlm, directory / "small_wavlm")
        write_iemocap(directory / f"cache/demo-v{DEMO_VERSION}")

    def start(self, command, **environment):
        return subprocess.Popen(
            ["bash", "-c", command],
            cwd=self.directory,
            env=os.environ | {"PATH": self.path} | environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, command, code=0, **environment):
        """What it prints; it must end with this exit code."""
        process = self.start(command, **environment)
        output, _ = process.communicate(timeout=600)
        assert process.returncode == code, f"{command}\n{output}"
        return output


@pytest.fixture(scope="module")
def clone(tmp_path_factory, small_wavlm, python):
    """With the inputs of all commands beside it."""
    directory = tmp_path_factory.mktemp("clone")
    clone = Clone(directory, small_wavlm, python)
    write_iemocap(directory / "IEMOCAP_full_release")
    write_msp_podcast(directory / "MSP-Podcast-1.11")
    write_clips(directory)
    for name in ("recording", "recordings/a", "recordings/b", "turns/1", "turns/2", "turns/3"):
        speech(directory / f"{name}.wav", 0, 0.5, 0.5, seconds=1)
    speech(directory / "long.wav", 0, 0.5, 0.5, seconds=13)
    for text in fences("python", USAGE):
        (directory / re.match(r"# (\w+\.py): ", text)[1]).write_text(text)
    (directory / "bin").mkdir()  # srun runs a command, scontrol writes down its arguments
    for name, line in (("srun", 'exec "$@"'), ("scontrol", 'echo "$@" >>scontrol.log')):
        (directory / "bin" / name).write_text(f"#!/bin/sh\n{line}\n")
        (directory / "bin" / name).chmod(0o755)
    return clone


# ---------------------------------------------------------------------------------------------
# Commands


def shrunk(command, steps=2):
    """The command with MEANT in place of placeholders, and with QUICK."""
    for pattern, words in MEANT.items():
        command = re.sub(pattern, words, command)
    for pattern, flags in QUICK.items():
        flags = flags.replace("--max_steps 2", f"--max_steps {steps}")
        command = re.sub(pattern, rf"\g<0> {flags}", command)
    return command


def promised(command):
    """Files that it must write, from its flags and, of train.py, from the run they name."""
    if command.startswith("#!"):
        command = re.search(r"^srun (.*) &$", command, flags=re.MULTILINE)[1]
    words = command.replace("$SLURM_ARRAY_TASK_ID", "1").split()
    program = next(word for word in words if word.endswith((".py", "launch.sh")))
    argv = words[words.index(program) + 1 :]
    files = list(WRITES.get(program, []))
    for flag, name in itertools.pairwise(argv):
        if flag in ("--out", "--plot", "--export", "--state", "--skipped"):
            files.append(f"{name}/report.html" if program == "report.py" else name)
    if program == "report.py" and re.search(r"py \S+ runs/", command):  # several runs
        files += ["report.html", "experiment_comparison.md"]
    if program.endswith("launch.sh"):
        args, folds = parse_args(argv[argv.index("--") + 1 :]), (1, 2, 3)
    elif program == "train.py" and "--help" not in argv:
        args = parse_args(argv)
        folds = (args.fold,)
    else:
        return files
    return files + [f"{args.out}/{args.name}/fold{fold}/result.json" for fold in folds]


def is_alike(command):
    """Does it differ from a neighbour in flags of the model or the preset alone?"""
    names = r"berlin-\w+|retried|one_gpu|full|ddp|resumable|frozen|verify"
    others = r"runs/berlin|logmel.py|report.py runs/folds$|--lora 8 --gradient_checkpointing"
    return re.search(rf"--name ({names})\b|{others}", command)


ALIKE = [command for command in COMMANDS if is_alike(command)]
TRIED = [pytest.param(c, marks=SLOW) if c in ALIKE else c for c in COMMANDS]


@pytest.mark.parametrize("command", TRIED)
def test_every_command_runs_and_leaves_what_it_promises(clone, python, command, monkeypatch):
    if command in ALIKE and "/warm-" in python:
        pytest.skip("tried under the real python, after the commands that it needs")
    monkeypatch.chdir(clone.directory)
    command, began = shrunk(command), time.time()
    if "--nnodes 2" in command:  # the same line on both nodes
        with socket.create_server(("127.0.0.1", 0)) as free:
            host = f"127.0.0.1:{free.getsockname()[1]}"
        command = re.sub(r"HOST:\d+", host, command)
        said = clone.run(f"{command} & {command}; code=$?; wait $! && exit $code")
    else:
        said = clone.run(command, SLURM_ARRAY_TASK_ID="1", SLURM_JOB_ID="7")
    files = promised(command)
    for file in files:
        assert Path(file).stat().st_mtime > began - 1, f"{command} left an old {file}"
    expected = [text for word, text in SAYS.items() if word in command]
    for text in expected:
        assert re.search(text, said), f"{command}\n{said}"
    assert files or expected, f"{command}: nothing is known of what it does"


def test_the_flags_of_commands_that_are_tried_with_slow_alone_exist(clone, monkeypatch):
    monkeypatch.chdir(clone.directory)
    shutil.copy("manifest.csv", "emodb/manifest.csv")  # berlin.py's
    assert len(ALIKE) > 10
    for command in ALIKE:
        promised(shrunk(command))  # a wrong flag exits


@pytest.mark.slow
def test_the_ladder_of_the_docs_ends_in_one_report_with_a_gain_over_the_base_at_each_step(clone):
    (script,) = [text for text in fences("bash", USAGE) if "# ladder.sh" in text]
    (clone.directory / "ladder.sh").write_text(script)
    flags = f"--data manifest.csv {TRAIN} --unfreeze all"
    said = clone.run(f"VECTORS=vectors bash ladder.sh steps 1-2 0-1 {flags}")  # of three folds
    table = said[said.index("less the baseline") :]
    for name in ("stats", "balance", "vectors", "lora"):
        assert re.search(rf"runs/steps-{name} .*\[[-+]", table), (name, table)
    assert "Ensemble: mean of the test predictions of 10 runs" in said
    assert (clone.directory / "runs/steps-ladder/report.html").exists()


def test_one_process_and_two_print_the_same_losses_as_the_readme_says(clone):
    losses = {}
    for name in ("one", "two"):
        text = (clone.directory / f"runs/{name}/fold1/metrics.jsonl").read_text()
        records = [json.loads(line) for line in text.splitlines()]
        losses[name] = [r["loss"] for r in records if r["event"] == "train"]
    assert len(losses["one"]) == 3  # steps 2, 4 and 6: the stand-in has one step in an epoch
    assert losses["one"] == pytest.approx(losses["two"], abs=1e-4)


@pytest.mark.parametrize("quick", [True, pytest.param(False, marks=SLOW)])
def test_the_first_command_prints_what_the_readme_says(clone, demo_cache, quick):
    """With the real corpus and WavLM also the figures, within what another torch may change."""
    first = next(command for command in COMMANDS if "train.py" in command)
    assert first == "python train.py --preset demo"
    real = f"{first} --cache_dir {demo_cache} --overwrite"
    said = clone.run(f"{shrunk(first)} --prosody none --overwrite" if quick else real)
    (stated,) = re.findall(r"The log ends.*?```\n(.*?)```", README, flags=re.DOTALL)
    shape = re.sub(r"-?\d+(\.\d+)?", "N", said)
    for line in stated.splitlines():
        short = quick and re.match("epoch +6", line)  # not best: there is one epoch
        assert line == "..." or short or re.sub(r"-?\d+(\.\d+)?", "N", line) in shape, line
    if not quick:
        found, expected = (re.findall(r"(?:valence|arousal) (0\.\d+)", s) for s in (said, stated))
        found = found[:2] + found[8:12] + found[-2:]  # epochs 1, 5 and 6; test
        assert np.allclose(np.float64(found), np.float64(expected), atol=0.03), said  # any torch


def test_a_slurm_job_at_its_time_limit_is_requeued_and_a_failed_one_is_not(clone):
    (script,) = [command for command in COMMANDS if "#SBATCH" in command]
    script = shrunk(script, steps=-1)
    wrong = clone.start(script, SLURM_ARRAY_TASK_ID="9", SLURM_JOB_ID="9")
    job = clone.start(script, SLURM_ARRAY_TASK_ID="2", SLURM_JOB_ID="8")
    wait_for((clone.directory / "runs/slurm/fold2/last.pt").exists, 120)
    job.send_signal(signal.SIGUSR1)  # --signal=B: to the shell alone
    said, _ = job.communicate(timeout=120)
    assert job.returncode == 75, said
    said, _ = wrong.communicate(timeout=120)
    assert wrong.returncode == 2 and "--fold 9" in said
    assert (clone.directory / "scontrol.log").read_text() == "requeue 8\n"


def test_every_flag_in_the_text_exists_and_every_page_is_linked_once():
    assert all(any(c.startswith(start) for c in commands(USAGE)) for start in NOT_RUN)
    text = "\n".join([README, *PAGES])
    programs = [*ROOT.glob("*.py"), ROOT / "launch.sh", ROOT / "tests" / "gpu.sh"]
    programs += ROOT.glob("tests/bench_*.py")
    known = "\n".join(path.read_text() for path in programs)
    others = r"\btorchrun [^`]*?train\.py|#SBATCH.*|pip install.*|docker run[^`]*"
    ours = re.sub(others, "", text)
    for flag in sorted(set(re.findall(r"(?<![\w-])--([a-z_0-9]+)", ours))):
        assert f"--{flag}" in known, flag
    assert all(f"tests/{path.name}" in text for path in ROOT.glob("tests/bench_*.py"))
    for page in ROOT.glob("docs/*.md"):
        assert README.count(f"]({page.relative_to(ROOT)})") == 1
    assert len(README.splitlines()) <= 300


# ---------------------------------------------------------------------------------------------
# How to change it


@pytest.fixture
def hacked(tmp_path, small_wavlm, python):
    return Clone(tmp_path, small_wavlm, python)


def apply_example(title, clone):
    """Puts the example's lines where their comments say; its command, made quick."""
    (text,) = re.findall(rf"^\*\*{title}\.\*\*(.*?)(?=^\*\*|^## )", CHANGES, flags=re.M | re.S)
    (code,) = fences("python", text)
    places = re.split(r"^# (\S+\.py), (a new file|above|below)(?: `(.*)`)?\n", code, flags=re.M)
    assert places[0] == ""
    for name, where, mark, lines in zip(*[iter(places[1:])] * 4):
        file = clone.directory / name
        if where == "a new file":
            assert not file.exists()
            file.write_text(lines)
            continue
        source = file.read_text().splitlines()
        (at,) = [i for i, line in enumerate(source) if mark in line]
        source.insert(at + (where == "below"), lines.rstrip())
        file.write_text("\n".join(source) + "\n")
    (command,) = inline(re.sub("```.*```", "", text, flags=re.DOTALL))
    return shrunk(command)


def result_of(clone, name):
    return json.loads((clone.directory / f"runs/{name}/fold1/result.json").read_text())


def test_the_corpus_of_the_readme_is_read_and_trained_on(hacked):
    lines = []
    for i in range(36):
        clip = f"{('anna', 'ben', 'cleo')[i % 3]}/clip{i}"
        speech(hacked.directory / f"mine/{clip}.wav", i % 3, i / 18 - 1, 1 - i / 18)
        lines.append(f"{clip} {1 + i / 6} {7 - i / 6}\n")
    (hacked.directory / "mine/ratings.txt").write_text("".join(lines))
    command = apply_example("A corpus", hacked)
    hacked.run(command.replace("FOLDER", "mine"))
    splits = json.loads((hacked.directory / "runs/mine-wavlm/fold1/splits.json").read_text())
    assert {split: {utt_id[:3] for utt_id in ids} for split, ids in splits.items()} == {
        "train": {"cle"}, "dev": {"ben"}, "test": {"ann"}
    }  # fmt: skip
    said = hacked.run("python data.py --data mine --data_dir mine")
    assert "utterances  36" in said and "labels in 1..7" in said


def test_the_encoder_of_the_readme_trains_is_planned_and_ignores_padding(hacked):
    command = apply_example("An encoder", hacked)
    hacked.run(command)
    assert result_of(hacked, "gru")["encoder"] == "gru"
    said = hacked.run(f"{command} --overwrite --gradient_checkpointing", code=2)
    assert "--encoder gru has no --gradient_checkpointing" in said
    assert "card must have" in hacked.run("python memory.py --encoder gru --max_seconds 0.5")
    spec = importlib.util.spec_from_file_location("hacked", hacked.directory / "model.py")
    changed = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(changed)
    encoder = changed.GRU(changed.ModelConfig(encoder="gru", d_model=64))
    waveform, mask = torch.randn(2, 8000), torch.ones(2, 8000, dtype=torch.bool)
    mask[1, 5000:] = False
    (states,), frame_mask = encoder({"input_values": waveform * mask, "attention_mask": mask})
    alone = {"input_values": waveform[1:, :5000], "attention_mask": mask[1:, :5000]}
    (expected,), _ = encoder(alone)
    torch.testing.assert_close(states[1, frame_mask[1]], expected[0])


def test_the_target_of_the_readme_is_in_loss_metrics_files_and_predictions(hacked):
    rows = []
    for i in range(36):
        speech(hacked.directory / f"clips/c{i}.wav", i % 3, i / 18 - 1, 1 - i / 18)
        rows.append((f"c{i}", f"clips/c{i}.wav", f"s{i % 3}", i / 36, i % 12 / 12))
    table = pd.DataFrame(rows, columns=["utt_id", "path", "speaker", "valence", "engagement"])
    table.to_csv(hacked.directory / "manifest.csv", index=False)
    hacked.run(apply_example("A target", hacked))
    test = result_of(hacked, "engaged")["test"]
    assert {"ccc_valence", "ccc_engagement"} < test.keys() and "ccc_arousal" not in test
    hacked.run("python predict.py --checkpoint runs/engaged/fold1 clips --out out.csv")
    columns = pd.read_csv(hacked.directory / "out.csv").columns
    assert list(columns[-2:]) == ["pred_valence", "pred_engagement"]
    said = hacked.run("python report.py runs/engaged runs/engaged --folds 1 --out report")
    assert "engagement" in said and (hacked.directory / "report/report.html").exists()
    said = hacked.run("python data.py --data manifest.csv")
    assert "correlation of valence and engagement" in said


def test_the_loss_of_the_readme_does_not_depend_on_how_a_batch_is_split(hacked):
    same = " --dropout 0 --wavlm_dropout 0 --global_batch_size 8 --log_every 1 --batch_size "
    norms = {"plain": [], "l1": [], "split": []}
    hacked.run(shrunk(f"python train.py --preset demo --name plain{same}8"))
    command = apply_example("A loss", hacked) + same
    hacked.run(f"{command}8")
    hacked.run(f"{command}2".replace("l1", "split"))
    for name, found in norms.items():
        lines = (hacked.directory / f"runs/{name}/fold1/metrics.jsonl").read_text().splitlines()
        found += [r["gradient_norm"] for r in map(json.loads, lines) if r["event"] == "train"]
    assert norms["l1"] == pytest.approx(norms["split"], rel=1e-4)
    assert norms["l1"] != pytest.approx(norms["plain"], rel=1e-2)


def test_a_step_that_looks_at_values_trains_though_no_plan_can_be_made_of_it(hacked):
    file = hacked.directory / "step.py"
    mark = "            seen += sums.detach()\n"
    assert mark in file.read_text()
    file.write_text(file.read_text().replace(mark, mark + "            float(preds.sum())\n"))
    said = hacked.run(shrunk("python train.py --preset demo --name values"))
    assert "memory is not planned" in said and result_of(hacked, "values")["best_epoch"]
