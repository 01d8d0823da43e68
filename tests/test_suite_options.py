"""The command line of `evals.run`: what cannot be is refused in one line."""

import pytest

from evals.suite import options


@pytest.mark.parametrize("text", ["0/2", "3/2", "2", "a/2", "1/2/3", "1/1000"])
def test_a_part_that_is_none_is_refused_in_one_line(text, capsys):
    with pytest.raises(SystemExit) as stop:
        options.parse(["--ckpt", "a", "--out", "b", "--part", text])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and "must be I/N with 1 <= I" in error
