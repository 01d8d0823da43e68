"""What the user sees: the reply as it comes, progress of long prefills, the chat loop."""

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence

from infer.options import Options
from infer.prompts import message_ids
from infer.session import Session
from lsa_jax import cli
from lsa_jax.config import ConfigError
from lsa_jax.text.messages import MessageError
from lsa_jax.text.special import END_THINK
from lsa_jax.text.tokenizer import StreamDecoder, Tokenizer, TokenizerError


class Printer:
    """Writes a reply to stdout, token by token; ids where there is no tokenizer.

    `hide_until` is the text of the token before which nothing is shown.
    """

    def __init__(self, tokenizer: Tokenizer | None, hide_until: str | None = None):
        self._decoder = tokenizer and StreamDecoder(tokenizer, skip_special=True)
        self._reveal = (
            tokenizer.encode(hide_until)[-1] if tokenizer and hide_until is not None else None
        )

    def push(self, token: int) -> None:
        """Shows what this token completes."""
        if self._reveal is not None:
            self._reveal = None if token == self._reveal else self._reveal
        elif self._decoder is None:
            self._write(f"{token} ")
        else:
            self._write(self._decoder.push(token))

    def finish(self) -> None:
        """Shows what is left, and ends the line."""
        self._write("\n" if self._decoder is None else self._decoder.finish() + "\n")

    def _write(self, text: str) -> None:
        if text:
            sys.stdout.write(text)
            sys.stdout.flush()


@contextlib.contextmanager
def _prefill_progress(session: Session, tokens: int) -> Iterator[Callable[[int], None] | None]:
    """Progress of a prefill that takes more than one chunk."""
    if tokens <= session.prefill_chunk:
        yield None
        return
    with cli.token_progress(tokens, "prefill") as advance:
        shown = 0

        def update(done: int) -> None:
            nonlocal shown
            done = min(done, tokens)
            advance(done - shown)
            shown = done

        yield update


def answer(
    options: Options, session: Session, prompt_ids: Sequence[int], tokenizer: Tokenizer | None
) -> None:
    """Runs one turn and shows the reply."""
    with _prefill_progress(session, len(prompt_ids)) as progress:
        session.prefill(prompt_ids, progress)
    printer = Printer(tokenizer, END_THINK if options.hide_thinking else None)
    try:
        for token in session.generate():
            printer.push(token)
    finally:
        printer.finish()


def chat(options: Options, session: Session, tokenizer: Tokenizer) -> None:
    """Answers lines of stdin until `/exit` or its end.

    A message that cannot be taken (too long, say) is refused in one line; the conversation goes on.
    """
    while (text := _read_line()) is not None:
        if not text.strip():
            continue
        last = session.turns[-1] if session.turns else None
        # The reply before must end as the message format says, even if it was cut off.
        closing = [tokenizer.eos_id] if last is not None and last.ended != "stop" else []
        try:
            ids = message_ids(options, tokenizer, text, first=last is None)
            answer(options, session, closing + ids, tokenizer)
        except (ConfigError, MessageError, TokenizerError) as why:
            print(f"error: {why}", file=sys.stderr)


def _read_line() -> str | None:
    """A line of stdin, None at the end of the conversation."""
    try:
        line = input("> " if sys.stdin.isatty() else "")
    except EOFError:
        return None
    return None if line.strip() == "/exit" else line
