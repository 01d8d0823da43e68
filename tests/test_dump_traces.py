"""`python -m train.dump_traces`: what it refuses before it runs, what it skips, how it goes on."""

import dataclasses
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from lsa_jax import model_io
from lsa_jax.checkpoint import manifest
from lsa_jax.text.messages import encode_messages
from lsa_jax.text.special import BOS
from lsa_jax.text.tokenizer import Tokenizer
from tests import generate_runs
from train import dump_traces
from train.dump_options import parse
from train.traces.recording import Document, Nothing, Recorded
from train.traces.trace import TraceWriter, finished_traces, open_trace
from train.traces.trace_info import KeyRope, Keys, TraceInfo, fingerprint, weights_digest
from train.traces.votes import SparseRows, VoteConfig

CONFIG = generate_runs.CONFIG  # one CSA layer
COMMON = ("--min-layers", "1", "--max-new-tokens", "20", "--kv", "fp8", "--prefill-chunk", "16")
MESSAGES = [{"role": "user", "content": "What is the magic word in all of this?"}]
PROMPTS = (
    {"prompt": json.dumps(MESSAGES), "answer": "xyz", "golden_chunks": [{"prefix": "a"}]},
    {"messages": MESSAGES, "answer": "another answer than that of the first"},
    {"text": "Once upon a time there was", "answer": [7, 8, 9]},
    {"ids": [*range(2, 40)], "answer": [3] * 30},
)


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory) -> Path:
    return generate_runs.write_checkpoint(tmp_path_factory.mktemp("model"))


def write(path: Path, *lines: object) -> Path:
    """A file of these lines, text as it is and objects as JSON."""
    texts = (line if isinstance(line, str) else json.dumps(line) for line in lines)
    path.write_text("\n".join(texts) + "\n", encoding="utf-8", errors="surrogatepass")
    return path


def call(capsys, ckpt: Path, prompts: Path, out: Path, *arguments: object) -> tuple[int, str, str]:
    """Runs the command in this process: (exit code, stdout, stderr)."""
    capsys.readouterr()
    given = ("--ckpt", ckpt, "--prompts", prompts, "--out", out, *COMMON, *arguments)
    try:
        code = dump_traces.main(list(map(str, given)))
    except SystemExit as stop:  # the parser's errors
        assert isinstance(stop.code, int)
        code = stop.code
    return code, *capsys.readouterr()


class Stub:
    """Stands for a Recorder: a document's trace is made of its ids, and needs no model."""

    def __init__(self, fails_at: str | None = None):
        self.fails_at, self.seen = fails_at, []

    def record(self, document: Document, root: Path, progress, note) -> Recorded:
        if len(document.prompt) < 8:
            raise Nothing("the prompt is too short")
        self.seen.append(document)
        answer = tuple(document.answer or document.prompt[:4])
        info = TraceInfo(
            name=document.name,
            source=document.source,
            model=fingerprint(CONFIG),
            target_layers=(0,),
            csa_layers=1,
            csa_ratio=4,
            page_entries=64,
            prompt_tokens=len(document.prompt),
            rope=KeyRope.of_model(CONFIG),
            votes=VoteConfig(min_layers=1),
        )
        count = len(answer)
        none = SparseRows(
            np.zeros(0, np.int32), np.zeros(0, np.uint8), np.zeros(count + 1, np.int64)
        )
        hidden = np.array(answer, np.float32)[:, None, None]
        with TraceWriter(root, info, hidden_size=1, hidden_dtype=np.float32, mass=False) as writer:
            writer.append(hidden, len(document.prompt) + np.arange(count), none)
            if document.name == self.fails_at:
                raise KeyboardInterrupt
            note(answer, True)
            writer.finish(Keys(np.ones((len(document.prompt) // 4, 1, 8), np.float32), None))
        return Recorded(root / document.name, answer, True, 0, 4 * count, 2.0, 1.0)


@pytest.fixture
def stub(monkeypatch) -> Stub:
    made = Stub()
    monkeypatch.setattr(dump_traces, "_recorder", lambda *_: made)
    return made


def test_all_forms_of_prompts_become_documents_in_order(capsys, ckpt, stub, tmp_path):
    prompts = write(tmp_path / "p.jsonl", *PROMPTS[:2], "", *PROMPTS[2:])
    code, out, err = call(capsys, ckpt, prompts, tmp_path / "set", "--start", "40")
    assert (code, err) == (0, "")
    assert out == (
        f"{tmp_path / 'set'}: 4 documents, 16 tokens, 0 labels, 0.00 MB, 50.00% of the attention"
        " mass; 0 were there already, 0 skipped\n"
    )
    tokenizer = Tokenizer.from_dir(ckpt)
    chat = tokenizer.encode(encode_messages(MESSAGES))
    text = tokenizer.encode(BOS + "Once upon a time there was")
    assert [list(d.prompt) for d in stub.seen] == [chat, chat, text, [*range(2, 40)]]
    assert [d.answer for d in stub.seen] == [None] * 4
    names = [f"doc_{n:05d}" for n in (40, 41, 42, 43)]
    assert [path.name for path in finished_traces(tmp_path / "set")] == names
    said = json.loads((tmp_path / "set" / "answers" / "doc_00043.json").read_text())
    assert said == {"ids": [2, 3, 4, 5], "text": tokenizer.decode([2, 3, 4, 5]), "stopped": True}
    assert stub.seen[0].source == stub.seen[1].source != stub.seen[2].source


def test_thinking_and_replay_change_what_is_fed(capsys, ckpt, stub, tmp_path):
    prompts = write(tmp_path / "p.jsonl", *PROMPTS)
    assert call(capsys, ckpt, prompts, tmp_path / "a", "--thinking", "--end-idx", "1")[0] == 0
    options = ("--replay", "--start-idx", "1", "--end-idx", "3")
    assert call(capsys, ckpt, prompts, tmp_path / "b", *options)[0] == 0
    tokenizer = Tokenizer.from_dir(ckpt)
    first, second, third = stub.seen
    assert first.prompt == tokenizer.encode(encode_messages(MESSAGES, thinking=True))
    assert second.answer == tokenizer.encode("another answer than that of the first")
    assert third.answer == [7, 8, 9]
    assert [second.name, third.name] == ["doc_00001", "doc_00002"]


def test_a_second_run_goes_on_and_loads_nothing_when_all_is_there(
    capsys, ckpt, monkeypatch, tmp_path
):
    prompts, out = write(tmp_path / "p.jsonl", *PROMPTS), tmp_path / "set"
    broken = Stub(fails_at="doc_00002")
    monkeypatch.setattr(dump_traces, "_recorder", lambda *_: broken)
    code, _, err = call(capsys, ckpt, prompts, out)
    assert (code, err) == (130, "interrupted; run it again to go on\n")
    assert len(finished_traces(out)) == 2 == len(list((out / "answers").iterdir()))
    (out / "doc_00003.partial").mkdir()  # of a run that was killed
    (out / "doc_00003.partial" / "junk").touch()
    whole = Stub()
    monkeypatch.setattr(dump_traces, "_recorder", lambda *_: whole)
    code, said, _ = call(capsys, ckpt, prompts, out)
    assert code == 0 and "2 documents" in said and "; 2 were there already, 0 skipped" in said
    assert [d.name for d in whole.seen] == ["doc_00002", "doc_00003"]
    assert len(finished_traces(out)) == 4 and not list(out.glob("*.partial"))
    monkeypatch.setattr(dump_traces, "_recorder", lambda *_: pytest.fail("the model was loaded"))
    assert "0 documents" in call(capsys, ckpt, prompts, out)[1]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--kv", "bf16"), ("'kv fp8'", "'kv bfloat16'")),
        (("--top-p", "0.5"), ("'top-p 0.6'", "'top-p 0.5'")),
        (("--replay",), ("prompt ", "answer own", "answer replayed")),
    ],
)
def test_a_document_of_other_settings_is_not_taken_for_the_same(
    capsys, ckpt, stub, tmp_path, options, words
):
    prompts, out = write(tmp_path / "p.jsonl", PROMPTS[3]), tmp_path / "set"
    assert call(capsys, ckpt, prompts, out)[0] == 0
    code, said, err = call(capsys, ckpt, prompts, out, *options)
    assert (code, said) == (2, "") and err.count("\n") == 1
    assert f"{prompts}:1 cannot become {out / 'doc_00000'}, which is there already" in err
    assert all(word in err for word in words)
    assert len(stub.seen) == 1


def test_another_prompt_under_the_same_name_is_refused_before_anything_runs(
    capsys, ckpt, stub, tmp_path
):
    out = tmp_path / "set"
    assert call(capsys, ckpt, write(tmp_path / "p.jsonl", *PROMPTS[:2]), out)[0] == 0
    other = write(tmp_path / "q.jsonl", PROMPTS[0], PROMPTS[2], PROMPTS[3])
    code, _, err = call(capsys, ckpt, other, out)
    assert code == 2 and f"{other}:2 cannot become {out / 'doc_00001'}" in err
    assert len(stub.seen) == 2


def test_skipped_prompts_are_named_a_line_each(capsys, ckpt, stub, tmp_path):
    prompts = write(tmp_path / "p.jsonl", {"ids": [5, 6]}, PROMPTS[3], {"ids": [1]})
    code, out, _ = call(capsys, ckpt, prompts, tmp_path / "set")
    lines = out.splitlines()
    assert code == 0 and len(lines) == 3
    assert lines[:2] == [f"{prompts}:{n}: skipped: the prompt is too short" for n in (1, 3)]
    assert lines[2].endswith("; 0 were there already, 2 skipped")
    assert [p.name for p in finished_traces(tmp_path / "set")] == ["doc_00001"]


BAD_LINES = [
    ("{", "must be a JSON object: "),
    ("\ud800", "must be a JSON object: "),  # not UTF-8
    ([1], "must be a JSON object, got [1]"),
    ({"question": "?"}, "must have exactly one of the fields prompt, messages, text, ids, got qu"),
    ({"text": "a", "ids": [1]}, "must have exactly one of the fields prompt, messages, text, ids"),
    ({"text": ""}, "text must be not empty, got ''"),
    ({"text": 3}, "text must be a string, got 3"),
    ({"text": "\ud800"}, "text must be valid Unicode"),
    ({"prompt": "hello"}, "prompt must be JSON text of a list of chat messages, got 'hello'"),
    ({"prompt": [1]}, "prompt must be JSON text of a list of chat messages, got [1]"),
    ({"prompt": "{}"}, "prompt must be a list of chat messages, not empty, got {}"),
    ({"messages": []}, "messages must be a list of chat messages, not empty, got []"),
    ({"messages": [{"role": "bot", "content": "a"}]}, "messages: messages[0].role must be "),
    ({"messages": [{"role": "assistant", "content": "a"}]}, "messages[0].role must be one that is"),
    ({"ids": []}, "ids must be a list of token ids, not empty, got []"),
    ({"ids": [1, 320]}, "ids[1] must be an id in [0, vocab_size=320), got 320"),
    ({"ids": [True]}, "ids[0] must be an id in [0, vocab_size=320), got True"),
    ({"ids": [1], "answer": ""}, "answer must be text or token ids to replay, not empty, got ''"),
    ({"ids": [1]}, "answer must be text or token ids to replay, not empty, got None"),
    ({"ids": [1], "answer": [-1]}, "answer[0] must be an id in [0, vocab_size=320), got -1"),
]


@pytest.mark.parametrize(("line", "fault"), BAD_LINES, ids=[fault[:40] for _, fault in BAD_LINES])
def test_a_bad_line_is_named_before_anything_runs(capsys, ckpt, stub, tmp_path, line, fault):
    prompts = write(tmp_path / "p.jsonl", PROMPTS[3], "", line, PROMPTS[3])
    code, out, err = call(capsys, ckpt, prompts, tmp_path / "set", "--replay")
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {prompts}:3") and err.count("\n") == 1
    assert f": {fault}" in err or f":3 {fault}" in err
    assert not stub.seen and not (tmp_path / "set").exists()


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        (("--targets", "1"), "target_layers must be distinct ascending CSA ordinals in 0..0"),
        (("--targets", "a"), "argument --targets: must be CSA ordinals such as 10,12,20, got 'a'"),
        (("--min-layers", "2"), "votes.min_layers must be <= the model's 1 CSA layers, got 2"),
        (("--top-p", "1.5"), "votes.top_p must be in (0, 1), got 1.5"),
        (("--mass-eps", "-1"), "record.mass_eps must be in [0, 1), got -1.0"),
        (("--max-new-tokens", "0"), "argument --max-new-tokens: must be an integer >= 1, got '0'"),
        (("--end-idx", "5"), "must choose from the 4 prompts of"),
        (("--start-idx", "4"), "must choose from the 4 prompts of"),
        (("--mesh", "2,1,1"), "argument --mesh: must be DATA,EXPERT,TENSOR with DATA = 1"),
        (("--ckpt", "nowhere"), "no checkpoint directory nowhere"),
        (("--prompts", "nothing.jsonl"), "nothing.jsonl"),
    ],
)
def test_a_bad_option_is_one_line(capsys, ckpt, stub, tmp_path, options, fault):
    prompts = write(tmp_path / "p.jsonl", *PROMPTS)
    code, out, err = call(capsys, ckpt, prompts, tmp_path / "set", *options)
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert err.startswith("error: ") and fault in err
    assert not stub.seen and not (tmp_path / "set").exists()


def test_a_place_that_cannot_become_a_trace_set_is_refused_first(
    capsys, ckpt, stub, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "p.jsonl", *PROMPTS)
    code, _, err = call(capsys, ckpt, Path("p.jsonl"), Path("p.jsonl/set"))
    assert code == 2 and not stub.seen
    wanted = f"a directory to write to, but {tmp_path / 'p.jsonl'} is none"
    assert err == f"error: --out must be {wanted}, got 'p.jsonl/set'\n"


def test_the_recorder_is_told_the_digest_of_the_weights(ckpt, tmp_path, monkeypatch):
    """It depends on parameters alone: not on the tokenizer or on what the checkpoint is of."""
    parts = []
    monkeypatch.setattr(dump_traces, "Recorder", lambda *_, **given: parts.append(given))
    monkeypatch.setattr(dump_traces.model_io, "load_model", lambda *_, **__: None)
    options = parse(["--ckpt", str(ckpt), "--prompts", "p", "--out", "o", *COMMON], "")
    cfg = model_io.read_config(ckpt)
    dump_traces._recorder(options, cfg, options.record(cfg), None)
    assert parts[0]["weights"] == weights_digest(ckpt)
    found = manifest.read(ckpt)

    def other(**changes) -> str:
        (tmp_path / manifest.NAME).write_bytes(
            manifest.encode(dataclasses.replace(found, **changes))
        )
        return weights_digest(tmp_path)

    assert other(origin={"from": "elsewhere"}, files={}) == weights_digest(ckpt)
    path, digests = next(iter(found.chunks.items()))
    flipped = {name: x[::-1] for name, x in digests.items()}
    assert other(chunks={**found.chunks, path: flipped}) != weights_digest(ckpt)


def test_a_file_without_prompts_is_refused(capsys, ckpt, stub, tmp_path):
    prompts = write(tmp_path / "p.jsonl", "", " ")
    code, _, err = call(capsys, ckpt, prompts, tmp_path / "set")
    assert code == 2 and err == f"error: {prompts} must have at least one prompt, got none\n"


LONG = [{"ids": [*range(2, 100)]}, {"ids": [*range(3, 150)]}, {"ids": [*range(4, 90)]}]
REAL = ("--ignore-eos", "--max-new-tokens", "300", "--page-entries", "8", "--dtype", "float32")


@pytest.mark.slow
def test_a_killed_run_leaves_a_partial_document_and_goes_on_to_the_same_traces(
    capsys, ckpt, tmp_path
):
    prompts, out = write(tmp_path / "p.jsonl", *LONG), tmp_path / "set"
    given = ("--ckpt", ckpt, "--prompts", prompts, "--out", out, *COMMON, *REAL)
    command = [sys.executable, "-m", "train.dump_traces", *map(str, given)]
    run = subprocess.Popen(command, cwd=Path(__file__).parents[1], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not (out / "doc_00001.partial").exists():
        assert run.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    run.send_signal(signal.SIGKILL)
    run.wait()
    assert [path.name for path in finished_traces(out)] == ["doc_00000"]
    left = sorted(path.name for path in out.iterdir())
    assert left == ["answers", "doc_00000", "doc_00001.partial"]
    first = (out / "doc_00000" / "trace.json").stat()

    code, said, _ = call(capsys, ckpt, prompts, out, *REAL)
    assert code == 0 and "2 documents, 600 tokens" in said and "1 were there already" in said
    assert not list(out.glob("*.partial"))
    assert (out / "doc_00000" / "trace.json").stat().st_mtime_ns == first.st_mtime_ns

    whole = tmp_path / "whole"
    code, said, _ = call(capsys, ckpt, prompts, whole, *REAL)
    assert code == 0 and "3 documents, 900 tokens" in said
    for path in finished_traces(whole):
        got, want = open_trace(out / path.name), open_trace(path)
        assert got.info == want.info and got.columns == want.columns  # with digests
        assert want.tokens == 300 and want.info.prompt_tokens == len(
            LONG[int(path.name[-1])]["ids"]
        )
        assert want.info.model == fingerprint(model_io.read_config(ckpt))
        assert want.info.weights == weights_digest(ckpt)
        answers = [root / "answers" / f"{path.name}.json" for root in (out, whole)]
        assert answers[0].read_bytes() == answers[1].read_bytes()
