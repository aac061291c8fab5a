"""Tokenizers in GGUF files: what stands there, and that llama.cpp cuts every text alike."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("transformers")
pytest.importorskip("torch")
pytest.importorskip("gguf")

from llama_runs import needs_llama_cpp, run_llama_cpp  # noqa: E402
from model_files import TEXTS, byte_level, read_gguf, sentencepiece_like, write_model  # noqa: E402
from small_checkpoint import load_plain  # noqa: E402

from colab_qlora import UserError  # noqa: E402
from colab_qlora.data.chat_templates import get_chat_template  # noqa: E402
from colab_qlora.export.gguf_tokenizer import read_vocabulary  # noqa: E402
from colab_qlora.export.pre_tokenizers import pre_tokenizer_name  # noqa: E402
from colab_qlora.export.save_gguf import save_pretrained_gguf  # noqa: E402

KINDS = ("smollm", "gpt-2", "llama-bpe", "dbrx", "qwen2", "tekken", "gpt-4o")
# as of gguf's TokenType
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6


@pytest.mark.parametrize("kind", KINDS)
def test_a_byte_level_tokenizer(kind):
    tokenizer = byte_level(kind)
    tokenizer.add_tokens(["<tool_call>"])
    rows = len(tokenizer) + 3
    vocabulary = read_vocabulary(tokenizer, rows)
    assert (vocabulary.model, vocabulary.pre) == ("gpt2", kind)
    assert len(vocabulary.tokens) == len(vocabulary.types) == rows
    assert vocabulary.tokens[:3] == ["<|pad|>", "<|im_start|>", "<|im_end|>"]
    assert vocabulary.types[:3] == [CONTROL, CONTROL, CONTROL]
    assert (vocabulary.tokens[-4], vocabulary.types[-4]) == ("<tool_call>", USER_DEFINED)
    assert vocabulary.tokens[-1] == f"[PAD{rows - 1}]" and vocabulary.types[-3:] == [UNUSED] * 3
    for token, token_id in tokenizer.get_vocab().items():
        assert vocabulary.tokens[token_id] == token
    assert vocabulary.special == {"eos": 2, "pad": 0}
    assert vocabulary.flags == {"add_bos_token": False, "add_eos_token": False}
    # each merge makes a token of two that are there
    assert vocabulary.merges and not vocabulary.scores
    for merge in vocabulary.merges:
        left, right = merge.split(" ")
        assert left + right in vocabulary.tokens


def test_a_sentencepiece_tokenizer():
    tokenizer = sentencepiece_like()
    vocabulary = read_vocabulary(tokenizer, len(tokenizer))
    assert (vocabulary.model, vocabulary.pre) == ("llama", "default")
    assert vocabulary.types[:3] == [UNKNOWN, CONTROL, CONTROL]
    assert vocabulary.types[3:259] == [BYTE] * 256
    assert set(vocabulary.types[259:]) == {NORMAL}
    assert vocabulary.special == {"bos": 1, "eos": 2, "unk": 0, "pad": 0}
    assert vocabulary.flags == {
        "add_bos_token": True,
        "add_eos_token": False,
        "add_space_prefix": True,
    }
    # what is merged earlier has the higher score
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    by_token = dict(zip(vocabulary.tokens, vocabulary.scores, strict=True))
    scores = [by_token["".join(merge)] for merge in merges]
    assert scores == sorted(scores, reverse=True) and len(set(scores)) > 100


def test_without_a_prefix_or_bos():
    vocabulary = read_vocabulary(sentencepiece_like(prefix=False, bos=False), 1000)
    assert vocabulary.flags["add_space_prefix"] is False
    assert vocabulary.flags["add_bos_token"] is False


@pytest.mark.parametrize(("scheme", "expected"), [("first", True), ("never", False)])
def test_a_metaspace_prefix(scheme, expected):
    from tokenizers import normalizers, pre_tokenizers

    tokenizer = sentencepiece_like()
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(
        prepend_scheme=scheme, split=False
    )
    assert read_vocabulary(tokenizer, 1000).flags["add_space_prefix"] is expected


def test_a_second_end_token_ends_a_turn():
    from transformers import GenerationConfig

    tokenizer = byte_level("llama-bpe")
    ends = GenerationConfig(eos_token_id=[2, 1])
    assert read_vocabulary(tokenizer, 600, ends).special["eot"] == 1
    assert "eot" not in read_vocabulary(tokenizer, 600, GenerationConfig(eos_token_id=2)).special


def test_more_tokens_than_rows():
    tokenizer = byte_level("smollm")
    size = len(tokenizer)
    read_vocabulary(tokenizer, size)
    tokenizer.add_tokens(["<new>"])
    with pytest.raises(UserError, match=rf"got {size + 1}; allowed: {size} at most.*resize_token"):
        read_vocabulary(tokenizer, size)


def test_a_unigram_tokenizer_is_refused():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    unigram = Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0))
    with pytest.raises(UserError, match="got Unigram; allowed: BPE"):
        read_vocabulary(PreTrainedTokenizerFast(tokenizer_object=unigram), 10)


@pytest.mark.parametrize(
    "steps",
    [
        [{"type": "Whitespace"}],
        [{"type": "ByteLevel", "add_prefix_space": True, "use_regex": True}],
        [
            {"type": "Digits", "individual_digits": False},
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
        ],
        [
            {"type": "Split", "pattern": {"Regex": "[a-z]+"}, "behavior": "Isolated"},
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
        ],
        [],
    ],
)
def test_a_splitter_that_is_not_known(steps):
    with pytest.raises(UserError, match=r"whose name in llama.cpp is not known.*smollm.*convert"):
        pre_tokenizer_name({"type": "Sequence", "pretokenizers": steps}, False)
    with pytest.raises(UserError, match="got no splitter"):
        pre_tokenizer_name(None, False)


def test_in_the_file(tmp_path):
    tokenizer = get_chat_template(byte_level("smollm"), "chatml")
    place = write_model(tmp_path / "m", "llama", tokenizer)
    [file] = save_pretrained_gguf(load_plain(place), tmp_path / "out", tokenizer, "f16")
    fields = read_gguf(file)[0]
    vocabulary = read_vocabulary(tokenizer, len(tokenizer) + 5)
    assert fields["tokenizer.ggml.model"] == "gpt2"
    assert fields["tokenizer.ggml.pre"] == "smollm"
    assert fields["tokenizer.ggml.tokens"] == vocabulary.tokens
    assert fields["tokenizer.ggml.token_type"] == vocabulary.types
    assert fields["tokenizer.ggml.merges"] == vocabulary.merges
    assert fields["tokenizer.ggml.eos_token_id"] == 2
    assert fields["tokenizer.ggml.padding_token_id"] == 0
    assert fields["tokenizer.ggml.add_bos_token"] is False
    assert fields["tokenizer.chat_template"] == tokenizer.chat_template
    assert "tokenizer.ggml.scores" not in fields


@pytest.mark.parametrize("kind", ["smollm", "gpt-2"])
def test_transformers_reads_the_tokenizer_out_of_the_file(tmp_path, kind):
    from transformers import AutoTokenizer

    tokenizer = byte_level(kind)
    place = write_model(tmp_path / "m", "llama", tokenizer)
    [file] = save_pretrained_gguf(load_plain(place), tmp_path / "out", tokenizer, "f16")
    try:
        read = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    except AttributeError as error:
        # 5.15 looks for the end token under the first one's name; this tokenizer has no first one
        if "bos_token_id" not in str(error):
            raise
        pytest.skip("this transformers reads no GGUF file without a first token")
    # its reader splits as GPT-2 does, whatever the file says
    texts = [text for text in TEXTS if not any(letter.isdigit() for letter in text)]
    for text in texts:
        ours = tokenizer(text, add_special_tokens=False).input_ids
        assert read(text, add_special_tokens=False).input_ids == ours, text


def as_in_transformers(kind):
    """transformers' own class for a family, around pieces that were learned here."""
    import transformers

    learned = sentencepiece_like(prefix=False, bos=False)
    model = json.loads(learned.backend_tokenizer.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    names = {} if kind == "LlamaTokenizer" else {"bos_token": "<s>", "eos_token": "</s>"}
    tokenizer = getattr(transformers, kind)(
        vocab=model["vocab"], merges=merges, pad_token="<unk>", unk_token="<unk>", **names
    )
    # Gemma has tokens for several blanks, written with the letter that stands for one
    blanks = ["\u2581\u2581\u2581"] if kind == "GemmaTokenizer" else []
    tokenizer.add_tokens(["<unused>", *blanks])
    return tokenizer


def test_added_tokens_with_blanks():
    vocabulary = read_vocabulary(as_in_transformers("GemmaTokenizer"), 1000)
    assert vocabulary.types[vocabulary.tokens.index("   ")] == USER_DEFINED
    assert vocabulary.flags["add_space_prefix"] is False
    assert read_vocabulary(as_in_transformers("LlamaTokenizer"), 1000).flags["add_space_prefix"]


@needs_llama_cpp
def test_llama_cpp_cuts_every_text_alike(tmp_path):
    makers = {kind: byte_level(kind) for kind in KINDS}
    makers |= {
        "sentencepiece": sentencepiece_like(),
        "no prefix": sentencepiece_like(prefix=False, bos=False),
        "Llama 2": as_in_transformers("LlamaTokenizer"),
        "Gemma": as_in_transformers("GemmaTokenizer"),
    }
    files = {}
    for kind, tokenizer in makers.items():
        place = write_model(tmp_path / kind, "llama", tokenizer, num_hidden_layers=1)
        model = load_plain(place)
        [files[kind]] = save_pretrained_gguf(model, tmp_path / f"{kind} out", tokenizer, "f16")
    marked = "<|im_start|>user\nWho?<|im_end|>\n"
    texts = [*TEXTS, marked]
    _, cut = run_llama_cpp(files.values(), tmp_path / "none.npz", texts=texts)
    for (kind, tokenizer), found in zip(makers.items(), cut, strict=True):
        for text, ids in zip(texts, found, strict=True):
            # llama.cpp puts its blank in front always, as SentencePiece does; transformers'
            # Metaspace not where there is one
            if kind != "Llama 2" or not text.startswith(" "):
                assert ids == tokenizer(text).input_ids, (kind, text)


@needs_llama_cpp
@pytest.mark.model
def test_llama_cpp_cuts_as_the_embedded_tokenizer(embedded_folder, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(embedded_folder)
    place = write_model(tmp_path / "m", "llama", tokenizer, num_hidden_layers=1)
    [file] = save_pretrained_gguf(load_plain(place), tmp_path / "out", tokenizer, "q8_0")
    texts = [*TEXTS, "<|im_start|>user\nWho?<|im_end|>\n", "Hello<|endoftext|>"]
    _, [cut] = run_llama_cpp([file], tmp_path / "none.npz", texts=texts)
    assert cut == [tokenizer(text).input_ids for text in texts]
