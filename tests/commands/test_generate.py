"""`mpgpt generate` in this process: what becomes of a request that fails after it has begun."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mpgpt.cluster.session import Session, SessionOptions
from mpgpt.commands.generate import Generate, GenerateOptions
from mpgpt.errors import RequestError
from mpgpt.model.tokenizer import TextStream, Tokenizer
from mpgpt.transport.link import SoloWorld
from tests.support import vocabularies
from tests.support.models import break_embedding, save_random

BAD = "this prompt is bad"
SENTENCE = "the text of this one cannot be"


class Bad(TextStream):
    """Fails at its fourth token."""

    error: Exception = RequestError(SENTENCE)

    def push(self, token: int) -> str:
        if len(self.starts) == 3:
            raise self.error
        return super().push(token)


@pytest.fixture(params=[RequestError(SENTENCE), KeyError("bug")], ids=["of the text", "of ours"])
def sentence(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Whatever continues the bad prompt fails; the sentence that is told of it."""
    good = Tokenizer.stream

    def stream(self: Tokenizer, stops: Sequence[str] = (), *, after: Sequence[int] = ()) -> TextStream:
        if list(after) == self.encode(BAD):
            return Bad(self._backend, stops)
        return good(self, stops, after=after)

    monkeypatch.setattr(Bad, "error", request.param)
    monkeypatch.setattr(Tokenizer, "stream", stream)
    return SENTENCE if isinstance(request.param, RequestError) else "internal error in this request's text (KeyError)"


DEFAULTS = SessionOptions(threads=1, max_new_tokens=6, ignore_eos=True, seed=1)


def generate(model: Path, options: GenerateOptions, *, interactive: bool = False, **of_session: Any) -> int:
    session = Session(
        replace(DEFAULTS, model=str(model), **of_session),
        home=model.parent,
        file=None,
        device_factory=nobody,
        explain=lambda timings, computing: None,
        report=lambda line: None,
    )
    run = Generate(session, options, interactive=interactive)
    with contextlib.closing(SoloWorld()) as world:
        return run.run_rank0(run.start(world))


def nobody(ipad: Any, world: Any) -> Any:
    raise AssertionError("there is no iPad here")


def test_a_batch_goes_on_without_it(
    models: dict[str, Path], tmp_path: Path, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = tmp_path / "prompts.txt", tmp_path / "out.jsonl"
    source.write_text(f"good morning\n{BAD}\ngood night\n")
    assert generate(models["llama"], GenerateOptions(prompts_file=source, out=out)) == 1
    records = {one["id"]: one for one in map(json.loads, out.read_text().splitlines())}
    assert records[2]["error"] == f"line 2: {sentence}" and records[2]["finish_reason"] == "error"
    assert records[2]["completion_tokens"] == 4
    assert "1 of 3 prompts failed" in capsys.readouterr().err
    source.write_text("good morning\ngood night\n")
    assert generate(models["llama"], GenerateOptions(prompts_file=source, out=tmp_path / "alone.jsonl")) == 0
    alone = [json.loads(line) for line in (tmp_path / "alone.jsonl").read_text().splitlines()]
    assert [(one["text"], one["error"]) for one in alone] == [(records[id]["text"], None) for id in (1, 3)]


def test_a_failed_record_is_made_anew(
    models: dict[str, Path], tmp_path: Path, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = tmp_path / "prompts.txt", tmp_path / "out.jsonl"
    source.write_text(f"good morning\n{BAD}\n")
    assert generate(models["llama"], GenerateOptions(prompts_file=source, out=out)) == 1
    monkeypatch.setattr(Bad, "push", TextStream.push)
    assert generate(models["llama"], GenerateOptions(prompts_file=source, out=out)) == 0
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(one["id"], one["error"], one["completion_tokens"]) for one in records] == [(1, None, 6), (2, None, 6)]


def test_a_single_prompt_ends_with_the_sentence(
    models: dict[str, Path], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(RequestError) as told:
        generate(models["llama"], GenerateOptions(prompts=(BAD,)))
    assert (str(told.value), told.value.exit_status) == (sentence, 1)
    assert capsys.readouterr().out.endswith("\n")


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prompt with ~ in it makes its logits NaN."""
    return break_embedding(save_random("llama-biased", tmp_path_factory.mktemp("broken") / "model"), "~")


LOGITS = "the model's logits for token 1 of the answer are NaN or infinite"


def test_logits_that_are_none(broken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A sentence and status 1 for one prompt, a record for one of several."""
    with pytest.raises(RequestError, match=LOGITS) as told:
        generate(broken, GenerateOptions(prompts=("hello ~ you",)))
    assert told.value.exit_status == 1
    source, out = tmp_path / "prompts.txt", tmp_path / "out.jsonl"
    source.write_text("good morning\n~\ngood night\nhello ~ you\n")
    assert generate(broken, GenerateOptions(prompts_file=source, out=out), max_sequences=1) == 1
    records = {one["id"]: one for one in map(json.loads, out.read_text().splitlines())}
    for id in (2, 4):
        one = records[id]
        assert one["error"].startswith(f"line {id}: {LOGITS}") and one["finish_reason"] == "error"
        assert (one["text"], one["token_ids"], one["ttft_s"]) == ("", [], None)
    source.write_text("good morning\n\ngood night\n")
    assert generate(broken, GenerateOptions(prompts_file=source, out=tmp_path / "alone.jsonl")) == 0
    alone = [json.loads(line) for line in (tmp_path / "alone.jsonl").read_text().splitlines()]
    assert [(one["id"], one["token_ids"]) for one in alone] == [(id, records[id]["token_ids"]) for id in (1, 3)]


def test_a_conversation_goes_on_after_logits_that_are_none(
    broken: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    heard = []
    for said in ("hello\n", "hello\na ~ b\nhello\n"):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(said.encode())))
        assert generate(broken, GenerateOptions(), interactive=True) == 0
        heard.append(capsys.readouterr().out.split("> ")[1:])
    first, bad, again, _ = heard[1]
    assert f"({LOGITS}" in bad and "begins anew)" in bad
    texts = [one.split("\n[")[0] for one in (heard[0][0], first, again)]
    assert texts[0] == texts[1] == texts[2] and len(texts[0].strip())


def test_output_that_cannot_be_written_is_no_requests_error(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run ends by it, as it is."""

    def full(stream: Any, piece: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mpgpt.commands.terminal.echo", full)
    with pytest.raises(OSError, match="No space left"):
        generate(models["llama"], GenerateOptions(prompts=("hello",)))


def test_raw_text_is_a_continuation_and_an_answer_is_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With a tokenizer that leaves out a text's first space."""
    import transformers

    folder = save_random("llama", tmp_path / "tiny")
    vocabularies.save(vocabularies.llama("abcdefghijkl"), folder, chat_template="{{ messages[0].content }}")
    kind: Any = transformers.PreTrainedTokenizerFast
    theirs = kind.from_pretrained(folder)
    prompt = Tokenizer(folder).encode("abc de")
    source, texts = tmp_path / "prompts.jsonl", list[str]()
    source.write_text("".join(json.dumps({"prompt": "abc de", "seed": seed}) + "\n" for seed in range(60)))
    for raw in (True, False):
        out = tmp_path / f"{raw}.jsonl"
        options = GenerateOptions(prompts_file=source, out=out)
        assert generate(folder, options, chat=not raw, temperature=4.0, max_new_tokens=2) == 0
        for one in map(json.loads, out.read_text().splitlines()):
            before = prompt if raw else []
            whole = theirs.decode([*before, *one["token_ids"]], skip_special_tokens=True)
            assert theirs.decode(before, skip_special_tokens=True) + one["text"] == whole
            texts.append(one["text"])
    assert any(text.startswith(" ") for text in texts[:60])
