"""The forms in which people have a WavLM: each loads to the same weights, or a line says why not.

python -m pytest tests/test_wavlm_files.py
"""

import dataclasses
import json
import logging
import re
import runpy
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from test_wavlm import NARROW, NORMS, batch, pair, randomise
from transformers import WavLMModel

import flags as train_flags
import memory
import wavlm
from wavlm import WavLM, WavLMError, load_wavlm, read_config, save_wavlm

PUBLISHED = dataclasses.replace(NARROW, max_bucket_distance=800)  # what no tensor shows is as there
TO_FAIRSEQ = [
    (r"^feature_projection\.layer_norm", "layer_norm"),
    (r"^feature_projection\.projection", "post_extract_proj"),
    (r"^masked_spec_embed", "mask_emb"),
    (r"(conv_layers\.\d)\.conv", r"\1.0"),
    (r"(encoder\.layers\.\d)\.layer_norm", r"\1.self_attn_layer_norm"),
    (r"pos_conv_embed\.conv\.parametrizations\.weight\.original0", "pos_conv.0.weight_g"),
    (r"pos_conv_embed\.conv\.parametrizations\.weight\.original1", "pos_conv.0.weight_v"),
    (r"pos_conv_embed\.conv", "pos_conv.0"),
    (r"\.attention", ".self_attn"),
    (r"gru_rel_pos_linear", "grep_linear"),
    (r"gru_rel_pos_const", "grep_a"),
    (r"rel_attn_embed", "relative_attention_bias"),
    (r"feed_forward\.intermediate_dense", "fc1"),
    (r"feed_forward\.output_dense", "fc2"),
]


def fairseq(state):
    """By the names of Microsoft's original files."""
    norms = "2.1" if "feature_extractor.conv_layers.1.layer_norm.weight" in state else "2"
    renamed = {}
    for name, tensor in state.items():
        for pattern, replacement in TO_FAIRSEQ:
            name = re.sub(pattern, replacement, name)
        renamed[re.sub(r"(conv_layers\.\d)\.layer_norm", rf"\1.{norms}", name)] = tensor
    return renamed


def torchaudio(state):
    """By the names of torchaudio.models.wavlm_base, which has no masked_spec_embed."""
    renamed = {}
    for name, tensor in state.items():
        name = re.sub(r"^encoder\.", "encoder.transformer.", name)
        name = re.sub(r"^feature_projection", "encoder.feature_projection", name)
        if ".q_proj." in name:
            end = name.rpartition(".")[2]
            layer = name.split(".")[3]
            parts = [state[f"encoder.layers.{layer}.attention.{p}_proj.{end}"] for p in "qkv"]
            name, tensor = name.replace("q_proj.", "attention.in_proj_"), torch.cat(parts)
        name = name.replace("attention.out_proj", "attention.attention.out_proj")
        if not re.search(r"masked_spec_embed|\.[kv]_proj\.", name):
            renamed[name] = tensor
    return renamed | {"aux.weight": torch.ones(2, 2)}


def microsoft(state, config):
    """What WavLM-Large.pt and WavLM-Base.pt hold, and heads that some copies have."""
    cnn = zip(config.conv_dim, config.conv_kernel, config.conv_stride)
    cfg = {
        "extractor_mode": "layer_norm" if config.feat_extract_norm == "layer" else "default",
        "layer_norm_first": config.do_stable_layer_norm, "max_distance": config.max_bucket_distance,
        "conv_feature_layers": "[(16,10,5)] + [(16,3,2)] * 4 + [(16,2,2)] * 2", "dropout": 0.25,
        "attention_dropout": 0.5, "activation_dropout": 0.0, "dropout_input": 0.125,
        "activation_fn": "gelu", "encoder_layers": 3, "gru_rel_pos": True, "normalize": True,
    }  # fmt: skip
    assert [*cnn] == [(16, 10, 5), *[(16, 3, 2)] * 4, *[(16, 2, 2)] * 2]
    heads = {"final_proj.weight": torch.ones(2, 2), "label_embs_concat": torch.ones(3)}
    return {"cfg": cfg, "model": fairseq(state) | heads}


def under(prefix, state):
    """The state in a larger model."""
    head = {"classifier.weight": torch.ones(2, 2), f"{prefix}scale": torch.ones(1)}
    return head | {f"{prefix}{name}": tensor for name, tensor in state.items()}


def wrapped(state):
    """As torch.compile of each layer, inside DistributedDataParallel, names them."""
    names = {n: re.sub(r"(layers\.\d\.)", r"\1_orig_mod.", n) for n in state}
    return {f"module.{names[name]}": tensor for name, tensor in state.items()}


def old_weight_norm(state):
    renamed = dict(state)
    conv = "encoder.pos_conv_embed.conv."
    renamed[f"{conv}weight_g"] = renamed.pop(f"{conv}parametrizations.weight.original0")
    renamed[f"{conv}weight_v"] = renamed.pop(f"{conv}parametrizations.weight.original1")
    return renamed


# form: (needs a config.json beside it, what is told about it, content of the file)
FORMS = {
    "microsoft": (False, "names of fairseq with prefix 'model.'", microsoft),
    "fairseq": (False, "names of fairseq with prefix ''; dropout 0.1", lambda s, _: fairseq(s)),
    "fairseq, nested": (
        False, "fairseq with prefix 'state_dict.module.ssl_model.'",
        lambda s, _: {"epoch": 3, "state_dict": under("module.ssl_model.", fairseq(s))},
    ),
    "torchaudio": (False, "names of torchaudio with prefix", lambda s, _: torchaudio(s)),
    "torchaudio, inside": (False, "'encoder.'", lambda s, _: under("encoder.", torchaudio(s))),
    "task model": (True, "prefix 'wavlm.'", lambda s, _: under("wavlm.", s)),
    "old weight norm": (True, None, lambda s, _: old_weight_norm(s)),
    "wrappers": (True, "prefix 'module.'", lambda s, _: wrapped(s)),
    "nested": (
        True, "prefix 'model_state_dict.model.encoder.wavlm.'",
        lambda s, _: {"model_state_dict": under("model.encoder.wavlm.", s), "optimizer": {0: 1}},
    ),
    "compiled": (True, "'_orig_mod.ssl_model.'", lambda s, _: under("_orig_mod.ssl_model.", s)),
}  # fmt: skip


@pytest.fixture(scope="module")
def models():
    """A model for each kind of front end; norms come first where it has layer norms."""
    torch.manual_seed(0)
    kinds = {"layer": True, "group": False}
    return {
        norm: randomise(
            WavLM(
                dataclasses.replace(PUBLISHED, feat_extract_norm=norm, do_stable_layer_norm=first)
            )
        )
        for norm, first in kinds.items()
    }


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("norm", ["layer", "group"])
def test_each_form_of_a_checkpoint_gives_the_same_weights_and_config(
    models, form, norm, tmp_path, caplog
):
    model = models[norm]
    state = {name: tensor.half().float() for name, tensor in model.state_dict().items()}
    needs_config, told, content = FORMS[form]
    half = {name: tensor.half() for name, tensor in state.items()}
    torch.save(content(half, model.config), tmp_path / "WavLM.pt")
    if needs_config:
        (tmp_path / "config.json").write_text(json.dumps(model.config.to_dict()))
    with caplog.at_level(logging.INFO, "vatune"):
        loaded = load_wavlm(str(tmp_path / "WavLM.pt"))
    assert [told in line for line in caplog.messages] == ([True] if told else [])
    got = loaded.state_dict()
    if "torchaudio" in form:
        del state["masked_spec_embed"]
    assert all(torch.equal(got[name], state[name]) for name in state)
    assert all(tensor.dtype == torch.float32 for tensor in got.values())
    config = read_config(str(tmp_path / "WavLM.pt"))
    assert config == loaded.config
    if form == "microsoft":
        assert (config.hidden_dropout, config.feat_proj_dropout) == (0.25, 0.125)
    for field in dataclasses.fields(config):
        if not re.search("dropout|mask_time|raw", field.name):
            mine, wanted = getattr(config, field.name), getattr(model.config, field.name)
            assert (tuple(mine) if isinstance(mine, list) else mine) == wanted, field.name


@pytest.mark.parametrize("stem", ["model.safetensors", "pytorch_model.bin"])
def test_shards_are_put_together_and_one_that_is_missing_is_named(models, stem, tmp_path):
    state = models["layer"].state_dict()
    save_wavlm(models["layer"], tmp_path)
    (tmp_path / "model.safetensors").unlink()
    stem, _, suffix = stem.partition(".")
    weight_map = {n: f"{stem}-{1 + i % 2:05}-of-00002.{suffix}" for i, n in enumerate(state)}
    write = save_file if suffix == "safetensors" else torch.save
    for shard in set(weight_map.values()):
        part = {name: state[name].clone() for name in state if weight_map[name] == shard}
        write(part, tmp_path / shard)
    index = tmp_path / f"{stem}.{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    for name in (tmp_path, index):
        loaded = load_wavlm(str(name)).state_dict()
        assert all(torch.equal(loaded[name], state[name]) for name in state)
    shard = f"{stem}-00002-of-00002.{suffix}"
    (tmp_path / shard).unlink()
    with pytest.raises(WavLMError, match=f"^{index}: {shard} is missing .copy"):
        load_wavlm(str(tmp_path))


@pytest.mark.parametrize("large", [False, True])
def test_a_model_of_torchaudio_gives_the_same_states(large, tmp_path):
    try:
        from torchaudio.models import wavlm_model
    except (ImportError, OSError, RuntimeError) as error:  # not installed, or for another torch
        pytest.skip(f"torchaudio: {error}")
    cnn = [(16, 10, 5), *[(16, 3, 2)] * 4, *[(16, 2, 2)] * 2]
    theirs = wavlm_model(
        extractor_mode="layer_norm" if large else "group_norm", extractor_conv_layer_config=cnn,
        extractor_conv_bias=large, encoder_embed_dim=32, encoder_projection_dropout=0.0,
        encoder_pos_conv_kernel=16, encoder_pos_conv_groups=4, encoder_num_layers=3,
        encoder_num_heads=4, encoder_num_buckets=32, encoder_max_distance=800,
        encoder_attention_dropout=0.0, encoder_ff_interm_features=48, encoder_ff_interm_dropout=0.0,
        encoder_dropout=0.0, encoder_layer_norm_first=large, encoder_layer_drop=0.0,
        aux_num_out=None,
    )  # fmt: skip
    randomise(theirs).eval()
    torch.save(theirs.state_dict(), tmp_path / "torchaudio.pt")
    ours = load_wavlm(str(tmp_path / "torchaudio.pt")).eval()
    input_values, _ = batch([9_000, 9_000])
    with torch.no_grad():
        wanted, _ = theirs.extract_features(input_values)
        got, _ = ours(input_values, layers=range(4))
        last, _ = theirs(input_values)  # after the final layer norm
    for layer in (1, 2):
        torch.testing.assert_close(got[layer], wanted[layer - 1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got[3], last, rtol=1e-5, atol=1e-5)


def test_the_planner_takes_shapes_from_a_file(models, tmp_path, capsys):
    state, path = models["layer"].state_dict(), tmp_path / "WavLM-Large.pt"
    torch.save(microsoft(state, PUBLISHED), path)
    words = ["--prosody", "none", "--json", "--batch_size", "1", "--max_seconds", "1", "--wavlm"]
    assert memory.main([*words, str(path)]) == 0
    planned = json.loads(capsys.readouterr().out)["plan"]["bytes"]["parameters"]
    assert planned > 4 * sum(tensor.numel() for tensor in state.values())
    assert memory.main([*words, f"{path}/no.pt"]) == 2
    assert f"memory.py: error: --wavlm {path}/no.pt: no such" in capsys.readouterr().err


# ---------------------------------------------------------------- weights of transformers
@pytest.mark.parametrize(("norm", "stable"), NORMS)
def test_weights_saved_by_transformers_load_and_ours_load_there(norm, stable, tmp_path):
    config = dataclasses.replace(NARROW, feat_extract_norm=norm, do_stable_layer_norm=stable)
    reference, _ = pair(config, dtype=torch.float32)
    input_values, mask = batch([9_000, 9_000])
    wanted = reference(input_values, attention_mask=mask.long()).last_hidden_state
    reference.save_pretrained(tmp_path / "theirs")
    ours = load_wavlm(str(tmp_path / "theirs")).eval()
    torch.testing.assert_close(ours(input_values, mask)[0][3], wanted, rtol=1e-4, atol=2e-5)
    assert ours.config.raw["layerdrop"] == 0.0  # fields that are not ours survive
    save_wavlm(ours, tmp_path / "ours")
    back = WavLMModel.from_pretrained(tmp_path / "ours").eval()
    again = back(input_values, attention_mask=mask.long()).last_hidden_state
    assert torch.equal(again, wanted)
    assert all(p.requires_grad for n, p in ours.named_parameters() if n != "masked_spec_embed")


@pytest.fixture
def saved(tmp_path):
    """Makes a directory below tmp_path: a checkpoint, its config changed, a file overwritten."""

    def save(name, changes=None, **files):
        directory = tmp_path / name
        save_wavlm(WavLM(NARROW), directory)
        config = json.loads((directory / "config.json").read_text()) | (changes or {})
        (directory / "config.json").write_text(json.dumps(config))
        for stem, content in files.items():
            (path,) = directory.glob(f"{stem}.*")
            if content is None:
                path.unlink()
            else:
                path.write_bytes(content)
        return directory

    return save


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2148\nsize 1261990257\n"


def test_what_is_not_a_wavlm_is_refused_in_one_line_that_names_the_file_and_the_remedy(
    tmp_path, saved, models, monkeypatch
):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    state = models["layer"].state_dict()
    hubert = {name: tensor for name, tensor in state.items() if "gru_rel_pos" not in name}
    gate = "feature_extractor.conv_layers.0.conv.weight"
    weights = (saved("good") / "model.safetensors").read_bytes()
    again = "damaged, cut short or no checkpoint: .* .copy or download it again.$"
    objects = "could run code .* .if you trust it, .* save its state_dict"
    pointer = ": a Git LFS pointer, .* .run `git lfs pull`"
    absent = ": no model.safetensors or pytorch_model.bin in this directory .give tiny, base"
    cases = {"empty": absent, "no/where/WavLM.pt": ": no such file or directory .give tiny"}
    (tmp_path / "empty").mkdir()
    configs = {
        "hubert": ({"model_type": "hubert"}, "/config.json: model_type is 'hubert', not 'wavlm'"),
        "norm": (
            {"feat_extract_norm": "batch"},
            "/config.json: feat_extract_norm is 'batch', not layer or group",
        ),
        "act": ({"hidden_act": "mish"}, "/config.json: hidden_act is 'mish', not gelu"),
        "heads": ({"num_attention_heads": 0}, "/config.json: 0 attention heads"),
        "wide": ({"hidden_size": 64}, "/model.safetensors: weights do not fit .*size mismatch for"),
        "deep": ({"num_hidden_layers": 4}, r"/model.safetensors: .*Missing .*encoder\.layers\.3\."),
        "flat": (
            {"num_hidden_layers": 2},
            r"/model.safetensors: .*Unexpected .*layers\.2",
        ),
    }
    for name, (changes, message) in configs.items():
        saved(name, changes)
        cases[name] = message
    damages = {  # what takes the place of a file
        "no_weights": ({"model": None}, absent),
        "no_config": ({"config": None}, "/model.safetensors: no config.json beside it .copy it"),
        "nothing": ({"model": b""}, f"/model.safetensors: {again}"),
        "cut": ({"model": weights[:-1000]}, f"/model.safetensors: {again}"),
        "pointer": ({"model": POINTER}, f"/model.safetensors{pointer}"),
        "no_json": ({"config": b"{"}, "/config.json: Expecting"),
        "list": ({"config": b"[]"}, "/config.json: not a JSON object"),
        "not_text": ({"config": b"\xff\xfe\xfa"}, "/config.json: .*utf-8"),
    }
    for name, (files, message) in damages.items():
        saved(name, **files)
        cases[name] = message
    save_file(hubert, saved("weights_of_hubert", model=None) / "model.safetensors")
    cases["weights_of_hubert"] = "/model.safetensors: a HuBERT or wav2vec 2.0, not a WavLM"
    (saved("index", model=None) / "model.safetensors.index.json").write_text("{}")
    cases["index"] = "/model.safetensors.index.json: no WavLM in it"
    arguments = train_flags.parse_args(["--preset", "demo"])
    incomplete = {n: t for n, t in fairseq(state).items() if "attention_bias" not in n}
    contents = {  # of a file that torch.save writes
        "pickled.pt": ({"cfg": {}, "model": print}, f": holds Python objects .print.*{objects}"),
        "arguments.pt": (
            {"args": arguments, "model": state},
            f": holds Python objects .argparse.Namespace.*{objects}",
        ),
        "hubert.pt": ({"cfg": {}, "model": fairseq(hubert)}, ": a HuBERT or wav2vec 2.0, not a "),
        "other.pt": ({"decoder": torch.ones(3)}, ": no WavLM in it; its tensors are decoder"),
        "numbers.pt": ({"epoch": 3}, ": no WavLM in it; its tensors are none"),
        "two.pt": (
            {"model": state, "ema": state},
            ": more than one model in it: 'model.', 'ema.' .save the WavLM alone",
        ),
        "strides.pt": (
            fairseq(state | {gate: torch.ones(16, 1, 9)}),
            ": the strides of its CNN are unknown .put a config.json beside it",
        ),
        "incomplete.pt": (incomplete, ": incomplete, without .*attention.rel_attn_embed.weight"),
        "relu.pt": (
            {"cfg": {"activation_fn": "relu"}, "model": fairseq(state)},
            ": hidden_act is 'relu', not gelu",
        ),
    }
    for name, (content, message) in contents.items():
        torch.save(content, tmp_path / name)
        cases[name] = message
    whole = (tmp_path / "two.pt").read_bytes()
    for name, content in {"cut.pt": whole[:-1000], "text.pt": b"hello"}.items():
        (tmp_path / name).write_bytes(content)
        cases[name] = f": {again}"
    for name, message in cases.items():
        with pytest.raises(WavLMError, match=f"^{tmp_path / name}{message}") as caught:
            load_wavlm(str(tmp_path / name))
        assert "\n" not in str(caught.value)
    with pytest.raises(WavLMError, match=r"^lab/wavlm: .*, and from the hub: .* .give tiny"):
        load_wavlm("lab/wavlm")


def test_an_error_in_code_that_was_changed_is_not_turned_into_a_message(tmp_path, saved):
    source = Path(wavlm.__file__).read_text()
    changed = source.replace("        self.frozen_blocks = 0\n", "        raise KeyError('beta')\n")
    assert changed != source
    (tmp_path / "changed.py").write_text(changed)
    load = runpy.run_path(tmp_path / "changed.py")["load_wavlm"]
    for name in ("tiny", str(saved("good"))):
        with pytest.raises(KeyError, match="beta"):
            load(name)
