import functools
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from generate_runs import CONFIG, SHARED, call, write_bare_source, write_checkpoint
from jax.experimental.compilation_cache import compilation_cache

from infer import console
from infer.session import FullSession, Replies
from lsa_jax import cli, convert, model_io
from lsa_jax.cache import codec
from lsa_jax.config import CacheConfig, ComputeConfig
from lsa_jax.engine import Engine
from lsa_jax.sampling import Greedy
from lsa_jax.text.messages import SystemMessage, UserMessage, encode_messages
from lsa_jax.text.special import BOS, END_THINK
from lsa_jax.text.tokenizer import Tokenizer
from pallas_kernels import dispatch

ROOT = Path(__file__).parents[1]
IDS = [int(i) for i in np.random.default_rng(5).integers(2, 320, 37)]
IDS_TEXT = " ".join(map(str, IDS))


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("generate")


@pytest.fixture(scope="module", autouse=True)
def compiled_once(root) -> Iterator[Path]:
    """Every run of the command starts afresh; its programs are compiled once, and quickly."""
    settings = {
        "jax_disable_most_optimizations": True,
        "jax_compilation_cache_dir": str(root / "compiled"),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    before = {name: jax.config.values[name] for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield root / "compiled"
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def ckpt(root) -> Path:
    return write_checkpoint(root)


@pytest.fixture(scope="module")
def engine(ckpt) -> Engine:
    model = model_io.load_model(ckpt, compute=ComputeConfig(dtype="float32"))
    return Engine(model, CacheConfig(kv_format="float32"), prefill_chunk=16)


@pytest.fixture
def run(capsys, ckpt):
    return functools.partial(call, capsys, ckpt)


@pytest.fixture
def run_json(run, tmp_path):
    """Runs the command, which must succeed: the content of its `--json`."""

    def succeed(*arguments: object) -> dict:
        file = tmp_path / "run.json"
        code, _, err = run(*arguments, "--json", file)
        assert code == 0, err
        return json.loads(file.read_text())

    return succeed


def test_dumped_logits_are_those_of_one_forward_pass(run_json, engine, tmp_path) -> None:
    file = tmp_path / "logits.npz"
    arguments = ["--prompt-ids", IDS_TEXT, "--max-new-tokens", 20, "--dump-logits", file]
    result = run_json(*arguments)
    dump = np.load(file)
    ids, logits = dump["ids"], dump["logits"]
    assert ids.dtype == np.int32 and ids.tolist() == IDS + result["ids"] and len(ids) == 57
    assert logits.dtype == np.float32 and logits.shape == (56, 320)
    whole = Engine(engine.model, engine.cache, prefill_chunk=64)
    state = whole.start(batch=1, capacity=256)
    (want,), _ = whole.prefill(state, [ids[:-1].tolist()], all_logits=True)
    # One chunk of 56 against chunks of 16 and single steps: the same sums in another order. The
    # project's bound for equal logits.
    np.testing.assert_allclose(logits, want, rtol=0, atol=2e-5)
    assert logits[36:].argmax(-1).tolist() == result["ids"]


def test_no_new_tokens_gives_the_logits_of_the_prompt(run, tmp_path) -> None:
    file = tmp_path / "logits.npz"
    arguments = ["--prompt-ids", "5,6 7", "--max-new-tokens", 0, "--dump-logits", file]
    code, out, _ = run(*arguments)
    assert (code, out) == (0, "\n")
    assert np.load(file)["ids"].tolist() == [5, 6, 7]
    assert np.load(file)["logits"].shape == (3, 320)


@pytest.mark.slow
def test_ids_repeat_with_the_seed_and_change_with_it(run_json) -> None:
    arguments = ["--prompt", "hello", "--max-new-tokens", 24]
    assert run_json(*arguments)["ids"] == run_json(*arguments, "--seed", 1)["ids"]
    sampled = [*arguments, "--temperature", 1.0, "--top-k", 200, "--top-p", 0.99]
    first = run_json(*sampled, "--seed", 1)["ids"]
    assert first == run_json(*sampled, "--seed", 1)["ids"]
    assert first != run_json(*sampled, "--seed", 2)["ids"]


def test_json_and_streams_tell_what_happened(run, ckpt, tmp_path) -> None:
    file = tmp_path / "out.json"
    code, out, err = run("--prompt", "hello", "--max-new-tokens", 24, "--json", file)
    assert code == 0
    result = json.loads(file.read_text())
    tokenizer = Tokenizer.from_dir(ckpt)
    ids = result["ids"]
    assert len(ids) == 24
    assert result["text"] == tokenizer.decode(ids, skip_special=True) == out.removesuffix("\n")
    (turn,) = result["turns"]
    assert turn["prompt_ids"] == tokenizer.encode(encode_messages([UserMessage("hello")]))
    assert turn["ids"] == ids and turn["ended"] == "length"
    assert result["prefill"]["tokens"] == len(turn["prompt_ids"])
    assert result["decode"]["tokens"] == len(ids) - 1
    for phase in (result["prefill"], result["decode"]):
        assert phase["tokens_per_second"] == phase["tokens"] / phase["seconds"] > 0
    assert result["compile_seconds"] > 0 and result["compilations"] == 3
    parts = dict(result["kv_bytes"])
    assert parts.pop("total") == sum(parts.values()) > 0
    assert set(parts) == {"window", "csa_entries", "hca_entries", "index_keys", "tails"}
    assert (result["platform"], result["devices"]) == ("cpu", 1)
    assert result["jax_version"] == jax.__version__ and result["device"]
    assert (result["dtype"], result["kv_format"]) == ("float32", "float32")
    assert result["settings"]["prompt"] == "hello" and result["settings"]["max_new_tokens"] == 24
    loading, summary = err.splitlines()
    assert str(ckpt) in loading
    assert f"{len(turn['prompt_ids'])} prompt and {len(ids)} new tokens" in summary


def test_a_second_chat_turn_equals_a_fresh_prefill_of_the_conversation(
    run_json, ckpt, monkeypatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n\n  \nhow are you?\n/exit\nnever read\n"))
    limits = ["--max-new-tokens", 150]
    result = run_json("--chat", "--system", "Be kind.", *limits)
    one, two = result["turns"]
    tokenizer = Tokenizer.from_dir(ckpt)
    first = encode_messages([SystemMessage("Be kind."), UserMessage("hello")])
    assert one["prompt_ids"] == tokenizer.encode(first)
    second = tokenizer.encode(encode_messages([UserMessage("how are you?")], add_bos=False))
    assert two["prompt_ids"] == [tokenizer.eos_id, *second]  # it closes a reply that was cut off
    # Only what is new goes in: the turn, and the reply's last token, which was drawn but not fed.
    assert two["prefill"]["tokens"] == len(two["prompt_ids"]) + 1
    assert result["ids"] == one["ids"] + two["ids"]
    conversation = one["prompt_ids"] + one["ids"] + two["prompt_ids"]
    fresh = run_json("--prompt-ids", " ".join(map(str, conversation)), *limits)
    assert fresh["ids"] == two["ids"]


def test_a_reply_ends_at_its_stop_token_which_the_next_turn_feeds(engine) -> None:
    def session(stop: tuple[int, ...]) -> FullSession:
        replies = Replies(sampler=Greedy(), seed=0, stop=stop, max_new_tokens=130)
        return FullSession(engine, replies)

    free = session(())
    free.prefill(IDS)
    reply = list(free.generate())
    assert len(reply) == 130 and free.turns[0].ended == "length" and free.capacity == 256
    stop = reply[7]
    stopped = session((stop,))
    stopped.prefill(IDS)
    short = list(stopped.generate())
    assert short == reply[: reply.index(stop) + 1] and stopped.turns[0].ended == "stop"

    for talk, said in ((free, reply), (stopped, short)):
        talk.prefill([7, 8, 9])
        assert talk.turns[1].prefilled == 4
        fresh = session(talk.replies.stop)
        fresh.prefill([*IDS, *said, 7, 8, 9])
        assert list(talk.generate()) == list(fresh.generate())
    assert free.capacity == 512  # 170 tokens before the second turn, 133 in it


def test_a_turn_without_room_is_refused_and_the_session_goes_on(engine) -> None:
    replies = Replies(sampler=Greedy(), seed=0, stop=(), max_new_tokens=4)
    session = FullSession(engine, replies)
    session.prefill(IDS)
    list(session.generate())
    with pytest.raises(ValueError, match="max_position_embeddings=1048576"):
        session.prefill([3] * 2**20)
    session.prefill([7])
    assert len(list(session.generate())) == 4 and len(session.turns) == 2


def test_what_a_named_kernel_declines_in_the_model_is_one_line(run, monkeypatch) -> None:
    def decline(*args: object) -> None:
        raise dispatch.Unsupported("top_k: mosaic_gpu: k must be at most 4096, got 5000")

    monkeypatch.setattr(console, "answer", decline)
    code, out, err = run("--prompt-ids", "1 2 3")
    assert code == 2 and not out
    said = err.strip().splitlines()
    assert said[-1] == "error: backend: top_k: mosaic_gpu: k must be at most 4096, got 5000"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "dtype", "kv_format"),
    [
        (["--kv", "fp8", "--simulate-quant", "kv"], "float32", "fp8"),
        (
            ["--dtype", "bfloat16", "--kv", "bf16", "--simulate-quant", "all"],
            "bfloat16",
            "bfloat16",
        ),
    ],
)
def test_storage_and_arithmetic_are_as_asked(run_json, arguments, dtype, kv_format) -> None:
    common = ["--prompt-ids", IDS_TEXT, "--max-new-tokens", 8, "--page-entries", 8]
    result = run_json(*common, *arguments)
    assert len(result["ids"]) == 8
    assert (result["dtype"], result["kv_format"]) == (dtype, kv_format)
    entries = result["kv_capacity_tokens"] // CONFIG.csa_ratio
    assert result["kv_bytes"]["csa_entries"] == entries * codec.entry_bytes(CONFIG, kv_format)


def test_prompts_are_encoded_as_their_options_say(run_json, ckpt, tmp_path) -> None:
    encode = Tokenizer.from_dir(ckpt).encode
    bos = Tokenizer.from_dir(ckpt).bos_id
    (tmp_path / "prompt.txt").write_bytes("  zwei\r\nZeilen: äöü\n".encode())
    text = (tmp_path / "prompt.txt").read_bytes().decode()
    (tmp_path / "ids").write_text("7, 8\n9\n")

    def prompt(*arguments: object) -> list[int]:
        return run_json(*arguments, "--max-new-tokens", 1)["turns"][0]["prompt_ids"]

    assert prompt("--prompt-ids", tmp_path / "ids") == [7, 8, 9]
    assert prompt("--raw", "--prompt", "ab") == [bos, *encode("ab")]
    assert prompt("--raw", "--prompt", BOS + "ab") == [bos, *encode("ab")]
    thinking = encode_messages([SystemMessage("S"), UserMessage(text)], thinking=True)
    arguments = ["--prompt-file", tmp_path / "prompt.txt", "--system", "S", "--thinking"]
    assert prompt(*arguments) == encode(thinking)


def test_a_checkpoint_without_tokenizer_takes_ids_and_gives_ids(
    capsys, run_json, root, tmp_path
) -> None:
    bare, file = root / "bare", tmp_path / "bare.json"
    assert convert.main([str(write_bare_source(root)), str(bare), "--weights", "f32"]) == 0
    arguments = ["--prompt-ids", "5 6 7", "--max-new-tokens", 5]
    code, out, _ = call(capsys, bare, *arguments, "--json", file)
    result = json.loads(file.read_text())
    assert code == 0 and result["text"] is None
    assert out == " ".join(map(str, result["ids"])) + " \n"
    assert result["ids"] == run_json(*arguments)["ids"]
    code, _, err = call(capsys, bare, "--prompt", "x")
    assert code == 2 and "tokenizer.json is missing" in err


def test_reasoning_is_hidden_and_no_character_is_cut(ckpt, capsys) -> None:
    tokenizer = Tokenizer.from_dir(ckpt)
    printer = console.Printer(tokenizer, END_THINK)
    for token in tokenizer.encode(f"secret{END_THINK}für"):
        printer.push(token)
        capsys.readouterr().out.encode()  # never half a character
    printer.finish()
    printer = console.Printer(tokenizer)
    for token in tokenizer.encode(f"open{END_THINK}für"):
        printer.push(token)
    printer.finish()
    assert capsys.readouterr().out == f"\nopen{END_THINK}für\n"


def test_a_long_prefill_shows_its_progress(run, monkeypatch) -> None:
    monkeypatch.setattr(cli, "_LINE_SECONDS", 0.0)
    code, _, err = run("--prompt-ids", IDS_TEXT, "--max-new-tokens", 1)
    assert code == 0
    lines = [line for line in err.splitlines() if line.startswith("prefill: ")]
    assert [line.split(", ")[0] for line in lines] == [
        f"prefill: {percent} % of 37 tokens" for percent in (43, 86, 100)
    ]


def command(*arguments: object, **env: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "infer.generate", *SHARED, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def test_ctrl_c_keeps_what_was_generated(ckpt, tmp_path, compiled_once) -> None:
    output, dump = tmp_path / "out.json", tmp_path / "out.npz"
    limits = ["--max-new-tokens", 20000, "--json", output, "--dump-logits", dump]
    process = command(
        *("--ckpt", ckpt, "--prompt-ids", IDS_TEXT, *limits),
        JAX_COMPILATION_CACHE_DIR=str(compiled_once),
    )
    assert process.stdout is not None
    first = process.stdout.read(1)  # the model is talking
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err.decode()
    assert "Traceback" not in err.decode() and err.decode().splitlines()[-1] == "interrupted"
    result = json.loads(output.read_text())
    ids = result["ids"]
    assert 0 < len(ids) < 20000 and result["turns"][0]["ended"] == "interrupted"
    assert result["text"].startswith((first + out).decode().removesuffix("\n")[:10])
    arrays = np.load(dump)
    assert arrays["ids"].tolist() == IDS + ids
    assert arrays["logits"].shape == (len(IDS) + len(ids) - 1, 320)
    assert arrays["logits"][36:].argmax(-1).tolist() == ids


@pytest.mark.slow
def test_a_mesh_gives_the_ids_of_one_device(run_json, ckpt, tmp_path, compiled_once) -> None:
    arguments = ["--prompt-ids", IDS_TEXT, "--max-new-tokens", 8]
    output = tmp_path / "mesh.json"
    process = command(
        *("--ckpt", ckpt, *arguments, "--mesh", "1,2,2", "--json", output),
        XLA_FLAGS="--xla_force_host_platform_device_count=4",
        JAX_COMPILATION_CACHE_DIR=str(compiled_once),
    )
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err.decode()
    result = json.loads(output.read_text())
    assert result["devices"] == 4
    assert result["ids"] == run_json(*arguments)["ids"]
