"""The text encoder loads from both layouts, gives what transformers gives, and its embeddings can be kept in a file."""

import json
import re
import string
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

REASON = 'needs pip install "flexkern[model]"'
transformers = pytest.importorskip("transformers", reason=REASON)
tokenizers = pytest.importorskip("tokenizers", reason=REASON)
pytest.importorskip("ftfy", reason=REASON)

import layouts
from state_dicts import scaled_float8

from flexkern.model import load
from flexkern.model.spiece import tokenizer_of
from flexkern.model.text import (
    SavedEmbeddings,
    _sizes,
    _transformers_names,
    clean_prompt,
    load_text_encoder,
    save_embeddings,
    validate_text_encoder,
)

KEYS = json.loads((Path(__file__).parent.parent / "data" / "part_shapes.json").read_text())["t5"]
VOCABULARY = 64
SMALL = {256384: VOCABULARY, 4096: 24, 10240: 40, 64: 3}  # sizes of UMT5-XXL: those of the tests; 3 heads of 8
FILE = "models_t5_umt5-xxl-enc-bf16.pth"
PROMPTS = ["a red disc", "", "a b, c"]
PER_LAYER = {  # Wan's name within a block: that of transformers
    "norm1": "layer.0.layer_norm", "norm2": "layer.1.layer_norm", "attn.q": "layer.0.SelfAttention.q",
    "attn.k": "layer.0.SelfAttention.k", "attn.v": "layer.0.SelfAttention.v", "attn.o": "layer.0.SelfAttention.o",
    "pos_embedding.embedding": "layer.0.SelfAttention.relative_attention_bias",
    "ffn.gate.0": "layer.1.DenseReluDense.wi_0", "ffn.fc1": "layer.1.DenseReluDense.wi_1",
    "ffn.fc2": "layer.1.DenseReluDense.wo",
}  # fmt: skip
TOP = {"token_embedding": "shared", "norm": "encoder.final_layer_norm"}


def small(shape):
    return [SMALL.get(size, size) for size in shape]


@pytest.fixture(scope="module")
def state():
    """The published keys of two layers with random weights, narrow."""
    generator = torch.Generator().manual_seed(1)
    keys = [key for key in KEYS if not re.match(r"blocks\.([2-9]|\d\d)", key)]
    return {key: 0.3 * torch.randn(small(KEYS[key]), generator=generator) for key in keys}


@pytest.fixture(scope="module")
def theirs(state):
    """transformers' model with the same weights, named here anew."""
    renamed = {}
    for key, tensor in state.items():
        name = key.removesuffix(".weight")
        if match := re.match(r"blocks\.(\d+)\.", name):
            renamed[f"encoder.block.{match[1]}.{PER_LAYER[name[match.end() :]]}.weight"] = tensor
        else:
            renamed[f"{TOP[name]}.weight"] = tensor
    sizes = {"vocab_size": VOCABULARY, "d_model": 24, "d_kv": 8, "d_ff": 40, "num_layers": 2, "num_heads": 3}
    module = transformers.UMT5EncoderModel(transformers.UMT5Config(**sizes))
    renamed["encoder.embed_tokens.weight"] = renamed["shared.weight"]
    module.load_state_dict(renamed)
    return module.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def tokenizer():
    letters = [(letter, -5.0) for letter in "▁" + string.ascii_lowercase + ".,"]
    words = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0), *letters, ("▁a", -2.0), ("▁red", -3.0)]
    model = tokenizers.Tokenizer(tokenizers.models.Unigram(words, unk_id=2))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    ends = {"single": "$A </s>", "special_tokens": [("</s>", 1)]}
    model.post_processor = tokenizers.processors.TemplateProcessing(**ends)
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=model, **names)


@pytest.fixture(scope="module")
def wan(state, tokenizer, tmp_path_factory):
    """A folder of Wan's own layout."""
    folder = tmp_path_factory.mktemp("Wan2.1-T2V-1.3B")
    torch.save(state, folder / FILE)
    tokenizer.save_pretrained(folder / "google/umt5-xxl")
    (folder / "config.json").write_text(json.dumps({"model_type": "t2v", "dim": 1536}))
    save_file({"patch_embedding.bias": torch.ones(2)}, folder / "diffusion_pytorch_model.safetensors")
    return folder


@pytest.fixture(scope="module")
def encoder(wan):
    return load_text_encoder(wan, dtype=torch.float32)


@pytest.fixture(scope="module")
def expected(theirs, tokenizer):
    """What transformers computes with padding and mask, as diffusers' pipeline calls it."""
    inputs = tokenizer(PROMPTS, padding="max_length", max_length=512, truncation=True, return_tensors="pt")
    with torch.no_grad():
        rows = theirs(inputs.input_ids, inputs.attention_mask).last_hidden_state
    return rows * inputs.attention_mask.unsqueeze(-1)


def test_every_published_key_has_its_place():
    renamed = _transformers_names({key: torch.empty(shape, device="meta") for key, shape in KEYS.items()})
    sizes = _sizes(renamed, Path(FILE))
    assert sizes == {
        "vocab_size": 256384, "d_model": 4096, "d_kv": 64, "num_heads": 64, "d_ff": 10240, "num_layers": 24,
        "relative_attention_num_buckets": 32,
    }  # fmt: skip
    with torch.device("meta"):
        module = transformers.UMT5EncoderModel(transformers.UMT5Config(**sizes)).state_dict()
    del module["encoder.embed_tokens.weight"]
    assert {key: t.shape for key, t in renamed.items()} == {key: t.shape for key, t in module.items()}


@pytest.mark.parametrize(
    "layout", ["folder", "file", "diffusers root", "diffusers folder", "shards", "bin", "elsewhere"]
)
def test_both_layouts_give_what_transformers_gives(layout, wan, theirs, tokenizer, expected, tmp_path):
    path, options = tmp_path, {}
    if layout in ("folder", "file"):
        path = wan if layout == "folder" else wan / FILE
    elif layout == "elsewhere":
        options["tokenizer"] = wan / "google/umt5-xxl"
        theirs.save_pretrained(tmp_path)
        path = tmp_path / "model.safetensors"
    else:
        tokenizer.save_pretrained(tmp_path / "tokenizer")
        folder = tmp_path / "text_encoder"
        theirs.save_pretrained(folder, max_shard_size="8KB" if layout == "shards" else "5GB")
        if layout == "shards":
            assert len(list(folder.glob("model-*.safetensors"))) > 2
        if layout == "bin":
            (folder / "model.safetensors").unlink()
            torch.save(theirs.state_dict(), folder / "pytorch_model.bin")
        path = folder if layout == "diffusers folder" else tmp_path
    embedded = load_text_encoder(path, dtype=torch.float32, **options)(PROMPTS)
    assert embedded.shape == (3, 512, 24) and embedded.abs().max() > 0.1
    assert (embedded - expected).abs().max() < 1e-5


def test_rows_behind_the_prompt_are_zero(encoder, tokenizer):
    embedded = encoder(PROMPTS)
    for rows, prompt in zip(embedded, PROMPTS, strict=True):
        length = len(tokenizer(prompt).input_ids)
        assert rows[:length].ne(0).all() and not rows[length:].any()


def test_an_embedding_does_not_depend_on_its_neighbours(encoder):
    assert torch.equal(encoder(PROMPTS), torch.cat([encoder([prompt]) for prompt in PROMPTS]))


def test_the_embedding_is_in_the_asked_dtype_and_has_no_gradient(wan, encoder):
    embedded = load_text_encoder(wan)(PROMPTS)
    assert embedded.dtype == torch.bfloat16 and not embedded.requires_grad
    assert (embedded.float() - encoder(PROMPTS)).abs().mean() < 0.02


def test_prompts_are_cleaned_as_wan_does(encoder):
    assert clean_prompt(" a \t red\n\ndisc ") == "a red disc"
    assert clean_prompt("salt &amp;amp; pepper &lt;b&gt;") == "salt & pepper <b>"
    assert clean_prompt("a < b &amp;amp; c") == "a < b & c"  # ftfy leaves entities beside a bare < alone
    assert clean_prompt("itâ€™s caf\u00c3\u00a9") == "it's café"
    assert torch.equal(encoder(["  a   red disc\n"]), encoder(["a red disc"]))


def test_a_prompt_that_is_too_long_is_cut_with_a_warning(encoder, theirs, tokenizer):
    prompt = "a " * 600
    with pytest.warns(UserWarning, match="prompt of 601 tokens is cut to 512: 'a a a"):
        rows = encoder([prompt])[0]
    ids = tokenizer(prompt.strip(), truncation=True, max_length=512, return_tensors="pt").input_ids
    assert ids[0, -1] == 1
    with torch.no_grad():
        assert (rows - theirs(ids).last_hidden_state[0]).abs().max() < 1e-5


def test_weights_are_held_once(wan, state):
    module = load_text_encoder(wan, dtype=torch.float32).module
    assert module.shared.weight.data_ptr() == module.encoder.embed_tokens.weight.data_ptr()
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in module.parameters()}
    assert sum(held.values()) <= 2 * sum(tensor.nbytes for tensor in state.values())


def test_a_config_of_its_own_tells_what_shapes_do_not(theirs, tokenizer, tmp_path, expected):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    theirs.save_pretrained(tmp_path / "text_encoder")
    file = tmp_path / "text_encoder/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"layer_norm_epsilon": 0.5}))
    other = load_text_encoder(tmp_path, dtype=torch.float32)(PROMPTS)
    assert (other - expected).abs().max() > 0.01


def test_what_is_missing_or_wrong_is_said(wan, state, tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "tokenizer")

    def broken(content):
        torch.save(content, tmp_path / FILE)
        return tmp_path

    with pytest.raises(ValueError, match="dtype must be bfloat16 or float32, in which T5 does not overflow"):
        load_text_encoder(wan, dtype=torch.float16)
    with pytest.raises(FileNotFoundError, match="no weights at"):
        load_text_encoder(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match=r"looked for models_t5\*\.pth, .*; there is 1: tokenizer"):
        load_text_encoder(tmp_path)
    without = {key: tensor for key, tensor in state.items() if key != "blocks.1.attn.o.weight"}
    missing = "missing 1: encoder.block.1.layer.0.SelfAttention.o.weight; unexpected 1: blocks.0.surplus; wrongly"
    with pytest.raises(ValueError, match=re.escape(missing)):
        load_text_encoder(broken(without | {"blocks.0.surplus": torch.ones(1)}))
    shape = "wrongly shaped 1: encoder.final_layer_norm.weight [7] instead of [24]"
    with pytest.raises(ValueError, match=re.escape(shape)):
        load_text_encoder(broken(state | {"norm.weight": torch.ones(7)}))
    with pytest.raises(ValueError, match="is no UMT5 encoder: it lacks some of shared.weight"):
        load_text_encoder(broken({"patch_embedding.weight": torch.ones(2)}))
    with pytest.raises(ValueError, match="norm.weight is torch.int32; expected floating point, not quantised"):
        load_text_encoder(broken(state | {"norm.weight": torch.ones(24, dtype=torch.int32)}))
    with pytest.raises(ValueError, match="has 34 tokens, .* embeds 20"):
        load_text_encoder(broken(state | {"token_embedding.weight": torch.ones(20, 24)}))


def test_a_missing_tokenizer_is_named(state, wan, tmp_path):
    torch.save(state, tmp_path / FILE)
    with pytest.raises(FileNotFoundError, match="google/umt5-xxl, .*; pass its folder as tokenizer"):
        load_text_encoder(tmp_path)
    with pytest.raises(FileNotFoundError, match="no tokenizer at /nowhere"):
        load_text_encoder(tmp_path, tokenizer="/nowhere")
    load_text_encoder(tmp_path, tokenizer=wan / "google/umt5-xxl")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "the tokenizer in .*tokenizer cannot be read: .*; get it again"),
        ("", "the tokenizer in .*tokenizer cannot be read: "),
        (
            "version https://git-lfs.github.com/spec/v1\nsize 7\n",
            "tokenizer.json is a Git LFS pointer for a file of 7 bytes",
        ),
    ],
)
def test_a_tokenizer_that_cannot_be_read_is_named(theirs, tokenizer, tmp_path, content, words):
    theirs.save_pretrained(tmp_path / "text_encoder")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match=words):
        validate_text_encoder(tmp_path)


def test_shards_that_the_index_names_must_be_there(theirs, tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    theirs.save_pretrained(tmp_path / "text_encoder", max_shard_size="8KB")
    shard = sorted((tmp_path / "text_encoder").glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=f"names files that are not there, 1: {shard.name}"):
        load_text_encoder(tmp_path)


def test_a_missing_package_names_the_extra():
    with pytest.raises(ImportError, match=r'the text encoder needs nowhere_to_be: pip install "flexkern\[model\]"'):
        load.need("nowhere_to_be", "the text encoder")


def test_embeddings_are_saved_and_reused(encoder, tmp_path):
    file = tmp_path / "prompts.safetensors"
    save_embeddings(file, encoder, [*PROMPTS, PROMPTS[0]])
    saved = SavedEmbeddings(file)
    assert saved.prompts == tuple(PROMPTS)
    assert torch.equal(saved(PROMPTS), encoder(PROMPTS)) and torch.equal(saved([""]), encoder([""]))
    assert file.stat().st_size < 4 * 24 * 100  # the prompts' rows, not 512 of each
    with pytest.raises(ValueError, match="holds no embedding of 'a blue disc'; it holds 3: 'a red disc', '', 'a b, c'"):
        saved(["a red disc", "a blue disc"])
    with pytest.raises(ValueError, match="holds no embedding of 'a red disc '"):
        saved(["a red disc "])  # to the letter


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_saved_embeddings_of_any_encoder_come_back_exactly(dtype, tmp_path):
    full = torch.randn(1, 6, 4).to(dtype)
    blank = torch.zeros(1, 6, 4, dtype=dtype)
    any_encoder = lambda prompts: torch.cat([full if prompt == "full" else blank for prompt in prompts])
    save_embeddings(tmp_path / "e.safetensors", any_encoder, ["full", "blank"])
    saved = SavedEmbeddings(tmp_path / "e.safetensors")
    assert torch.equal(saved(["blank", "full", "full"]), torch.cat([blank, full, full]))
    assert saved(["blank"]).dtype == dtype


def test_other_files_and_inputs_are_refused(encoder, tmp_path):
    save_file({"x": torch.ones(1)}, tmp_path / "other.safetensors")
    (tmp_path / "text.safetensors").write_text("nothing of the kind")
    with pytest.raises(ValueError, match="does not say which prompts it holds; expected a file of save_embeddings"):
        SavedEmbeddings(tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="is a text of 19 bytes that begins 'nothing of the kind', not weights"):
        SavedEmbeddings(tmp_path / "text.safetensors")
    with pytest.raises(FileNotFoundError):
        SavedEmbeddings(tmp_path / "absent.safetensors")
    for wrong in ("a red disc", [], [3]):
        with pytest.raises(ValueError, match="prompts must be a list of at least one text, got"):
            encoder(wrong)
    with pytest.raises(ValueError, match="prompts must be a list of at least one text, got"):
        save_embeddings(tmp_path / "none.safetensors", encoder, [])


NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6
PIECES = [("<pad>", 0.0, CONTROL), ("</s>", 0.0, CONTROL), ("<unk>", 0.0, UNKNOWN)]
PIECES += [(letter, -5.0, NORMAL) for letter in "▁" + string.ascii_lowercase + ".,"]
PIECES += [("▁a", -2.0, NORMAL), ("▁red", -3.0, NORMAL)]


def in_comfys_file(theirs, file, *, model=None, small=True):
    """The encoder as ComfyUI publishes it: one file, float8 with scales, the tokenizer inside."""
    state = {key: t.clone() for key, t in theirs.state_dict().items() if key != "encoder.embed_tokens.weight"}
    chosen = lambda key, tensor: small and ".SelfAttention." in key and tensor.dim() == 2 and "bias" not in key
    stored, exact = scaled_float8(state, chosen)
    stored["scaled_fp8"] = torch.zeros(0, dtype=torch.float8_e4m3fn)
    raw = layouts.sentencepiece_model(PIECES) if model is None else model
    stored["spiece_model"] = torch.frombuffer(bytearray(raw), dtype=torch.uint8).clone()
    save_file(stored, file)
    return exact


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_comfys_file_has_scales_and_its_own_tokenizer(theirs, tokenizer, tmp_path, dtype):
    file = tmp_path / "umt5_xxl_fp8_e4m3fn_scaled.safetensors"
    exact = in_comfys_file(theirs, file)
    encoder = load_text_encoder(file, dtype=dtype)
    state = encoder.module.state_dict()
    assert validate_text_encoder(file) == 24 and all(torch.equal(state[key], t.to(dtype)) for key, t in exact.items())
    for prompt in [*PROMPTS, "red  red, aa.", "q7 \u732b"]:
        ids = encoder.tokenizer(clean_prompt(prompt))["input_ids"]
        assert ids == tokenizer(clean_prompt(prompt))["input_ids"] and ids[-1] == 1
    whole = tmp_path / "whole.safetensors"
    save_file(exact, whole)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    whole_one = load_text_encoder(whole, dtype=dtype)
    torch.testing.assert_close(encoder(PROMPTS), whole_one(PROMPTS), rtol=0, atol=1e-5)


def test_plain_float8_is_read(theirs, tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    state = {key: t.clone() for key, t in theirs.state_dict().items() if key != "encoder.embed_tokens.weight"}
    small = {key: t.to(torch.float8_e4m3fn) if t.dim() == 2 else t for key, t in state.items()}
    save_file(small, tmp_path / "small.safetensors")
    encoder = load_text_encoder(tmp_path / "small.safetensors", dtype=torch.float32)
    loaded = encoder.module.state_dict()
    assert all(torch.equal(loaded[key], tensor.float()) for key, tensor in small.items())
    assert encoder(PROMPTS).isfinite().all() and encoder(PROMPTS).dtype == torch.float32


def test_a_named_tokenizer_wins_over_the_one_inside(theirs, tokenizer, tmp_path):
    in_comfys_file(theirs, tmp_path / "e.safetensors", model=b"no model")
    for way in (load_text_encoder, validate_text_encoder):
        with pytest.raises(ValueError, match="spiece_model is no SentencePiece model"):
            way(tmp_path / "e.safetensors")
    tokenizer.save_pretrained(tmp_path / "words")
    assert load_text_encoder(tmp_path / "e.safetensors", tokenizer=tmp_path / "words")(PROMPTS).shape == (3, 512, 24)
    load_text_encoder(tmp_path / "e.safetensors", tokenizer=tmp_path / "words/tokenizer.json")


def test_pieces_of_bytes_spell_what_has_no_other_piece():
    pieces = [*PIECES, *((f"<0x{byte:02X}>", 0.0, BYTE) for byte in range(256))]
    words = tokenizer_of(layouts.sentencepiece_model(pieces), transformers)
    spelled = [len(PIECES) + byte for byte in "\u732b".encode()]
    assert words("a \u732b")["input_ids"] == [PIECES.index(("▁a", -2.0, NORMAL)), 3, *spelled, 1]
    assert words.pad_token_id == 0 and len(words) == len(pieces)


@pytest.mark.parametrize("wrapped", ["module.", "module.model."])
def test_names_of_wrappers_are_removed(theirs, tokenizer, tmp_path, wrapped, expected):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    state = {f"{wrapped}{key}": tensor for key, tensor in theirs.state_dict().items()}
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "e.ckpt")
    got = load_text_encoder(tmp_path / "e.ckpt", dtype=torch.float32)(PROMPTS)
    assert (got - expected).abs().max() < 1e-5


def test_weights_that_are_not_finite_are_refused(state, tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    torch.save(state | {"norm.weight": torch.full((24,), float("nan"))}, tmp_path / FILE)
    with pytest.raises(ValueError, match="encoder.final_layer_norm.weight .float32. holds 24 of 24 values not finite"):
        load_text_encoder(tmp_path)
