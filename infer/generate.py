"""Text from a DeepSeek-V4 checkpoint: `python -m infer.generate --ckpt DIR --prompt "..."`.

Without `--ckpt` it is the embedded model. `--dry-run` says what a run needs and runs nothing.
`python -m infer.generate --demo` is a command of its own (`infer.demo`).
"""

import io
import sys

import jax

from infer import console, demo, dry_run, embedded, lsa_report, prompts, report
from infer.lsa_options import Plan, make_plan
from infer.lsa_session import LsaTurns
from infer.options import Options, parse
from infer.session import FullSession, Replies, Session
from lsa_jax import cli, model_io, shardings
from lsa_jax.config import ModelConfig
from lsa_jax.engine import Engine
from lsa_jax.sampling import make_sampler
from lsa_jax.text.tokenizer import Tokenizer


def generate(options: Options) -> None:
    """Checks everything that can be checked cheaply, loads the model, and runs."""
    report.check_writable(options)
    lsa_report.check_plot(options)
    cfg = model_io.read_config(options.ckpt)
    tokenizer = prompts.load_tokenizer(options, cfg)
    prompt = None if options.chat else prompts.read_prompt(options, tokenizer, cfg)
    plan = read_plan(options, cfg, prompt)
    embedded.announce(options.ckpt)
    if options.dry_run is not None:
        assert prompt is not None  # the options refuse --chat
        dry_run.show(options, dry_run.find(options, cfg, plan, len(prompt)))
        return
    session = open_session(options, cfg, tokenizer, plan)
    try:
        with model_io.backend_refusals():
            if prompt is not None:
                console.answer(options, session, prompt, tokenizer)
            elif tokenizer is not None:
                console.chat(options, session, tokenizer)
    finally:
        report.write_outputs(options, session, tokenizer)
        if isinstance(session, LsaTurns):
            lsa_report.write_outputs(options, session)
        report.print_summary(session)


def read_plan(options: Options, cfg: ModelConfig, prompt: list[int] | None) -> Plan | None:
    """How LSA runs, if it does; a single prompt is held to the budget's floor here."""
    if options.lsa.attention == "full":
        return None
    cache = options.cache(options.compute(dry_run.backend(options)))
    plan = make_plan(options.lsa, cfg, cache, seed=options.seed)
    if prompt is not None:
        plan.check_room(cfg, cache, len(prompt) + options.max_new_tokens)
    return plan


def open_session(
    options: Options, cfg: ModelConfig, tokenizer: Tokenizer | None, plan: Plan | None
) -> Session:
    """Loads the model. Text ends at the model's EOS and at the tokenizer's."""
    mesh = None if options.mesh is None else shardings.make_mesh(*options.mesh)
    compute = options.compute(jax.default_backend())
    print(f"loading {options.ckpt}", file=sys.stderr)
    model = model_io.load_model(options.ckpt, compute=compute, mesh=mesh)
    stop = {cfg.eos_token_id} | (set() if tokenizer is None else {tokenizer.eos_id})
    replies = Replies(
        sampler=make_sampler(options.temperature, options.top_k, options.top_p),
        seed=options.seed,
        stop=() if options.ignore_eos else tuple(sorted(stop)),
        max_new_tokens=options.max_new_tokens,
        keep_logits=options.dump_logits is not None,
    )
    cache = options.cache(compute)
    if plan is None:
        engine = Engine(model, cache, prefill_chunk=options.prefill_chunk, mesh=mesh)
        return FullSession(engine, replies)
    return LsaTurns(
        model,
        cache,
        plan,
        replies,
        prefill_chunk=options.prefill_chunk,
        grows=options.chat,
        fingerprint=str(options.ckpt),
        mesh=mesh,
    )


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    given = sys.argv[1:] if argv is None else argv
    if "--demo" in given:
        return demo.main(given)
    options = parse(given)
    cli.show_log()
    if isinstance(sys.stdout, io.TextIOWrapper):  # a model may write what the terminal cannot show
        sys.stdout.reconfigure(errors="replace")
    return cli.exit_code(lambda: generate(options), interrupted="interrupted")


if __name__ == "__main__":
    sys.exit(main())
