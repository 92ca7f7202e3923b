"""The frame of documents is that which a base was trained with, and is used wherever text is framed."""

import json
import shutil
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from rich.console import Console
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

import diffusify
from diffusify.cli import app
from diffusify.config import DiffusionConfig, DocumentFrame
from diffusify.evaluation.bits_per_byte import bits_per_byte
from diffusify.evaluation.harness import DiffusifyLM
from diffusify.evaluation.likelihood import Autoregressive
from diffusify.evaluation.likelihood_requests import LikelihoodRequest
from diffusify.evaluation.scoring import likelihood_request
from diffusify.evaluation.tasks import MultipleChoice
from diffusify.models import document_frame
from diffusify.models.bundled import bundled_models
from diffusify.models.denoiser import Denoiser
from diffusify.models.document_frame import SENTENCES, best_start, choose_frame, measure_starts
from diffusify.models.loading import Base
from diffusify.models.recipes import block
from diffusify.sampling.diffusion_lm import DiffusionLM
from diffusify.serving.api.infill import Alternatives
from diffusify.serving.api.schemas import AlternativesBody, ScoreBody
from diffusify.serving.api.score import Score
from diffusify.text.examples import Template, make_examples
from diffusify.text.prompts import continuation_canvas, infill_canvas
from diffusify.text.tokenizer import TextTokenizer
from diffusify.training.adapt import adapt
from tests.families import tiny_network
from tests.text.chats import CHATML, LLAMA2, LLAMA3
from tests.text.makers import byte_level, sentence_bpe, unigram, word_piece

TINY = {"length": 32, "held_out": 64, "per_device_train_batch_size": 2, "bf16": False}
OWN = DocumentFrame()


def chatml() -> TextTokenizer:
    """As SmolLM2's: BOS and EOS are marks of chats, and another token parts documents."""
    tokenizer = byte_level()
    tokenizer.tokenizer.add_special_tokens({"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"})
    tokenizer.tokenizer.chat_template = CHATML
    return tokenizer


def llama3() -> TextTokenizer:
    """As Llama 3 Instruct's: EOS ends turns, BOS starts documents, and another token ends them."""
    tokenizer = sentence_bpe()
    tokenizer.tokenizer.add_tokens(["<|end_of_text|>"], special_tokens=True)
    tokenizer.tokenizer.add_special_tokens({"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"})
    tokenizer.tokenizer.chat_template = LLAMA3
    return tokenizer


def qwen() -> TextTokenizer:
    """As Qwen 2.5's: a template of chats with marks of its own, and the token that parts documents as EOS."""
    tokenizer = byte_level()
    tokenizer.tokenizer.bos_token = None
    tokenizer.tokenizer.chat_template = CHATML
    return tokenizer


def llama2() -> TextTokenizer:
    """As Llama 2 Chat's: BOS and EOS are those of documents and of turns."""
    tokenizer = sentence_bpe()
    tokenizer.tokenizer.chat_template = LLAMA2
    return tokenizer


def base_of(tokenizer: TextTokenizer, family: str = "llama") -> Base:
    rows = len(tokenizer.tokenizer)
    network = tiny_network(family, vocab_size=rows, bos_token_id=None, eos_token_id=None)
    return Base(network, tokenizer.tokenizer, "base", masked=family == "bert")


def trained(tokenizer: TextTokenizer, start: str | None) -> Base:
    """A base that learned the sentences after one start token, and noise after all others."""
    base, generator = base_of(tokenizer), torch.Generator().manual_seed(0)
    texts = [ids[: document_frame.MAX_TOKENS] for ids in map(tokenizer.encode, SENTENCES)]
    texts = torch.tensor([ids for ids in texts if len(ids) == document_frame.MAX_TOKENS])
    noise = torch.randint(270, 310, texts.shape, generator=generator)
    right = None if start is None else base.tokenizer.convert_tokens_to_ids(start)
    optimizer = torch.optim.Adam(base.network.parameters(), 1e-2)
    for _ in range(25):
        for token in measure_starts(base):
            head = torch.full((len(texts), int(token is not None)), token or 0)
            rows = torch.cat([head, texts], 1)
            wanted = torch.cat([head, texts if token == right else noise], 1)
            logits = base.network(input_ids=rows).logits[:, head.shape[1] : -1]
            torch.nn.functional.cross_entropy(logits.flatten(0, 1), wanted[:, head.shape[1] + 1 :].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return base


@pytest.fixture(scope="module")
def chat_base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a base with chat marks as BOS and EOS, whose documents are parted by `<|endoftext|>`."""
    base, folder = trained(chatml(), "<|endoftext|>"), tmp_path_factory.mktemp("bases") / "chatml"
    base.network.save_pretrained(folder)
    base.tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_losses_are_those_of_transformers(family: str) -> None:
    base = base_of(chatml(), family)
    found = measure_starts(base)
    names = [None if i is None else base.tokenizer.convert_ids_to_tokens(i) for i in found]
    assert names == ["<|im_start|>", "<|im_end|>", "<|endoftext|>", None]
    for start, loss in found.items():
        total, count = 0.0, 0
        for sentence in SENTENCES:
            ids: Any = base.tokenizer(sentence, add_special_tokens=False)["input_ids"]
            text = ids[: document_frame.MAX_TOKENS]
            row = ([] if start is None else [start]) + text
            labels = [-100] * (len(row) - len(text) + 1) + text[1:]
            output = base.network(input_ids=torch.tensor([row]), labels=torch.tensor([labels]))
            total, count = total + output.loss.item() * (len(text) - 1), count + len(text) - 1
        assert len(loss) == count and float(loss.mean()) == pytest.approx(total / count, abs=1e-4)


@pytest.mark.parametrize(
    ("make", "learned", "frame"),
    [
        (chatml, "<|endoftext|>", ("<|endoftext|>", "<|endoftext|>")),
        (chatml, "<|im_start|>", ("<|im_start|>", "<|endoftext|>")),
        (llama3, "<|begin_of_text|>", ("<|begin_of_text|>", "<|end_of_text|>")),
        (qwen, "<|endoftext|>", ("<|endoftext|>", "<|endoftext|>")),
        (llama2, "<s>", ("<s>", "</s>")),
    ],
    ids=["chatml", "chatml-own", "llama3", "qwen", "llama2"],
)
def test_the_frame_is_what_a_base_learned(make: Any, learned: str, frame: tuple[str, str]) -> None:
    base = trained(make(), learned)
    found, line = choose_frame(base)
    ids = [found.start_token_id, found.end_token_id or 0]
    assert tuple(base.tokenizer.convert_ids_to_tokens(ids)) == frame
    assert found.start_prompts
    assert line.startswith(
        f"documents start with {frame[0]} and end with {frame[1]}; nats/token after each start token"
    )
    assert line.index(f" {learned} 0.") < line.index(" none ")  # the cheapest first


def test_a_base_that_learned_no_start_token_gets_none_before_prompts() -> None:
    tokenizer = chatml()
    found, line = choose_frame(trained(tokenizer, None))
    assert found == DocumentFrame(0, 0, start_prompts=False)
    assert ", prompts have no start token; nats/token after each start token: none 0." in line
    framed = TextTokenizer(tokenizer.tokenizer, tokenizer.mask_token_id, found)
    assert framed.add_start([5, 6]) == [5, 6] and framed.add_start([]) == [0]
    assert framed.document("x") == [0, *framed.encode("x"), 0]


@pytest.mark.parametrize("make", [chatml, llama2, llama3, qwen])
def test_a_tie_goes_to_the_own_start_token(make: Any) -> None:
    """Under random weights no start token is significantly better."""
    tokenizer = make()
    found, _ = choose_frame(base_of(tokenizer))
    assert found.start_token_id == tokenizer.start_token_id and found.start_prompts


def test_only_a_significant_lead_counts() -> None:
    noise = torch.randn(80, generator=torch.Generator().manual_seed(0))
    noise = (noise - noise.mean()) / noise.std()
    for lead, best in ((2.9, 7), (3.1, None)):
        better = 5 - noise - lead / 80**0.5  # by this many standard errors
        assert best_start({7: torch.full((80,), 5.0), None: better, 3: torch.full((80,), 6.0)}) == best
    assert best_start({7: torch.ones(80), 3: torch.ones(80)}) == 7


def test_sentences_in_an_unknown_language_measure_nothing() -> None:
    words = Tokenizer(WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2, "C1CC1": 3}, "<unk>"))
    names: dict[str, Any] = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=words, chat_template=LLAMA2, **names)
    base = base_of(TextTokenizer(fast, 3))
    assert [len(values) for values in measure_starts(base).values()] == [0, 0, 0]
    assert choose_frame(base) == (DocumentFrame(1, 2), "")


@pytest.mark.parametrize(
    ("make", "family"), [(word_piece, "bert"), (unigram, "bert"), (byte_level, "gpt2"), (sentence_bpe, "llama")]
)
def test_masked_models_and_those_without_chats_keep_their_own_tokens(
    make: Any, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(document_frame, "measure_starts", lambda base: pytest.fail("measured"))
    base = base_of(make(), family)
    assert choose_frame(base) == (OWN, "")
    end = base.tokenizer.all_special_tokens[0]
    assert choose_frame(base, end_token=end)[0] == DocumentFrame(None, base.tokenizer.all_special_ids[0])


def test_given_tokens() -> None:
    base = base_of(chatml())
    known = DocumentFrame(1, 1)
    assert choose_frame(base, known) == (known, "")
    given, line = choose_frame(base, known, start_token="<|im_start|>", end_token="<|im_end|>")
    ids = base.tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    assert [given.start_token_id, given.end_token_id] == ids
    assert line == "documents start with <|im_start|> and end with <|im_end|>"
    assert choose_frame(base, start_token="none")[0] == DocumentFrame(0, 0, start_prompts=False)
    assert choose_frame(base, start_token="none", end_token="<|im_end|>")[0] == DocumentFrame(1, 1, start_prompts=False)
    assert choose_frame(base, known, end_token="<|endoftext|>")[0] == DocumentFrame(1, 0)
    with pytest.raises(
        ValueError, match=r'start_token="<.endoftxt.>" is no special token of base; did you mean "<.endof'
    ):
        choose_frame(base, start_token="<|endoftxt|>")
    with pytest.raises(ValueError, match='end_token="none" is no special token of base; known'):
        choose_frame(base, end_token="none")


def test_a_generated_text_ends_with_the_frame_or_the_own_end() -> None:
    plain = chatml()
    framed = TextTokenizer(plain.tokenizer, plain.mask_token_id, DocumentFrame(0, 0))
    assert (plain.end_token_ids, framed.end_token_ids) == ((1,), (0, 1))
    assert framed.fingerprint != plain.fingerprint
    assert word_piece().end_token_ids == (3,)


def test_an_adapted_model_keeps_the_measured_frame(chat_base: str, corpus: str, tmp_path: Path) -> None:
    console = Console(file=StringIO(), width=60)
    out = adapt(chat_base, corpus, tmp_path / "run", steps=1, console=console, **TINY)
    assert "documents start with <|endoftext|> and end with <|endoftext|>; nats/token" in console.file.getvalue()  # pyright: ignore
    assert DiffusionConfig.load(out).frame == DocumentFrame(0, 0)
    model = diffusify.load(out)
    assert model.tokenizer.document("x")[0] == model.tokenizer.document("x")[-1] == 0
    assert next(model.stream("The cat", max_new_tokens=4)).tokens[0, 0] == 0
    assert next(model.stream("", max_new_tokens=4)).tokens[0, 0] == 0
    chat = model.chat_template.prompt([{"role": "user", "content": "x"}])
    assert chat[0] == model.tokenizer.tokenizer.bos_token_id and model.chat_template.end_token_id == 1
    harness = DiffusifyLM(str(out), add_bos_token=True)
    assert harness.prefix_token_id == harness.eot_token_id == 0
    assert harness.tok_encode("the cat") == [0, *model.tokenizer.encode("the cat")]
    # A model keeps its frame when it is trained further, unless another is given.
    console = Console(file=StringIO())
    more = adapt(str(out), corpus, tmp_path / "more", steps=1, console=console, **TINY)
    assert DiffusionConfig.load(more).frame == DocumentFrame(0, 0)
    assert "documents start" not in console.file.getvalue()  # pyright: ignore
    other = adapt(str(out), corpus, tmp_path / "other", steps=1, start_token="none", end_token="<|im_end|>", **TINY)
    assert DiffusionConfig.load(other).frame == DocumentFrame(1, 1, start_prompts=False)
    assert next(diffusify.load(other).stream("The cat", max_new_tokens=4)).tokens[0, 0] != 1


def test_the_command_takes_and_shows_them(chat_base: str, corpus: str, tmp_path: Path) -> None:
    options = [f"{name}={value}" for name, value in TINY.items()] + ["start_token=none", "end_token=<|im_end|>"]
    command = ["adapt", chat_base, "--data", corpus, "--steps", "1", "--out", str(tmp_path / "run")]
    done = CliRunner().invoke(app, command + [word for option in options for word in ("-o", option.replace("F", "f"))])
    assert "documents start with <|im_end|> and end with <|im_end|>, prompts have no start token\n" in done.output
    facts = json.loads(CliRunner().invoke(app, ["show", str(tmp_path / "run"), "--json"]).stdout)
    assert (facts["start_token"], facts["end_token"]) == ("<|im_end|> (1), not before prompts", "<|im_end|> (1)")
    assert "| start token id of a document | 1 |" in (tmp_path / "run" / "README.md").read_text()


def test_an_unfinished_run_keeps_its_frame(chat_base: str, corpus: str, tmp_path: Path) -> None:
    run = adapt(chat_base, corpus, tmp_path / "run", steps=1, **TINY)
    settings = json.loads((run / "run.json").read_text())
    assert settings["frame"] == {"type": "DocumentFrame", "start_token_id": 0, "end_token_id": 0, "start_prompts": True}
    for changed, expected in (
        (settings | {"frame": settings["frame"] | {"end_token_id": 1}}, DocumentFrame(0, 1)),
        ({k: v for k, v in settings.items() if k not in ("frame", "start_token", "end_token")}, OWN),  # an earlier one
    ):
        shutil.rmtree(run)
        run.mkdir()
        (run / "run.json").write_text(json.dumps(changed))
        assert DiffusionConfig.load(adapt(chat_base, corpus, run, steps=1, **TINY)).frame == expected


def test_a_base_is_evaluated_with_the_measured_frame(chat_base: str) -> None:
    lm = diffusify.load(chat_base)
    assert lm.config.frame == DocumentFrame(0, 0)
    ids = tuple(lm.tokenizer.encode(SENTENCES[0]))
    (expected,) = Autoregressive()(lm.denoiser, [LikelihoodRequest((0,), (ids,))])
    bits, _ = bits_per_byte(lm.denoiser, [SENTENCES[0]], lm.tokenizer, Autoregressive())
    assert bits == pytest.approx(-expected.log_prob[0] / torch.tensor(2.0).log().item() / len(SENTENCES[0]))


def test_prompts_without_a_start_token_have_none_anywhere(chat_base: str) -> None:
    lm = diffusify.load(chat_base)
    tokenizer = replace(lm.tokenizer, frame=DocumentFrame(0, 1, start_prompts=False))
    lm, ids, mask = DiffusionLM(lm.denoiser, tokenizer), tokenizer.encode("The cat"), tokenizer.mask_token_id
    sat = tokenizer.encode(" sat")
    for prompt, head in (("The cat", ids), ("", [0])):
        assert continuation_canvas(tokenizer, [prompt], 1, context=None).tokens.tolist() == [[*head, mask]]
        assert likelihood_request(lm, MultipleChoice(prompt, (" sat",), 0)).context == tuple(head)
        assert Score(lm, ScoreBody(model="m", prompt=prompt, text=" sat")).canvas.tokens.tolist() == [[*head, *sat]]
        tokens: list[int | None] = [*([] if prompt == "" else ids), None, 5]
        body = AlternativesBody(model="m", tokens=tokens, position=len(tokens) - 2)
        assert Alternatives(lm, body).canvas.tokens.tolist() == [[*head, mask]]
    record = Dataset.from_dict({"record": ['{"a": "The cat", "b": " sat"}'], "fault": [None]})
    examples = make_examples(record, tokenizer, template=Template("{a}", "{b}"), each_turn=True, length=32)
    assert examples.rows["tokens"][:] == [[*ids, *sat, 1]]
    assert infill_canvas(tokenizer, ["The cat[[1]]"], context=None).tokens.tolist() == [[0, *ids, mask, 1]]


def test_a_long_context_keeps_its_end_if_it_has_no_start_token() -> None:
    base = base_of(chatml())
    frame = DocumentFrame(0, 0, start_prompts=False)
    config = block().diffusion_config("LlamaForCausalLM", 2, "")
    for each, kept in ((config, 1), (replace(config, frame=frame), 0)):
        denoiser = Denoiser(base.network, each)
        long, short = tuple(range(10, 80)), (5,)
        context = denoiser.context_length or 0
        head = long[:kept] + long[len(long) - (context - 1 - kept) :]
        values = [
            next(Autoregressive()(denoiser, [LikelihoodRequest(given, (short,))])).log_prob for given in (long, head)
        ]
        assert values[0] == pytest.approx(values[1])


def test_bundled_models_keep_the_frame_of_their_training() -> None:
    frames = {name: DiffusionConfig.load(folder).frame for name, folder in bundled_models().items()}
    assert frames.pop("smollm2-masked") == OWN  # made before it was measured
    assert set(frames.values()) == {DocumentFrame(0, 0)}
