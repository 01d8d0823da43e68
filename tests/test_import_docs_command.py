"""`python -m train.import_docs`: what it imports, what it refuses, how it goes on."""

import shutil

from tests.doc_cases import GOLDENS, check_golden, write_doc
from tests.golden import doc_values
from tests.golden.doc_values import DROPPED, FOLDER, TOKENS
from tests.test_torch_reader import ATTACKS
from train.import_docs import main
from train.traces.trace import finished_traces, open_trace


def test_the_command_imports_a_directory_and_goes_on_where_it_stopped(tmp_path, capsys):
    dst = tmp_path / "set"
    assert main([str(GOLDENS[0]), str(dst)]) == 0
    before = (dst / "doc_00000" / "trace.json").stat().st_mtime_ns
    (dst / "doc_00001.partial").mkdir()  # of a run that was killed
    assert main([str(FOLDER), str(dst)]) == 0
    out = capsys.readouterr().out
    count = doc_values.labels()[0].size - DROPPED
    assert f"2 documents, {2 * TOKENS} tokens, {2 * count} labels; 4 labels out of range" in out
    assert f"{dst / 'doc_00001'}: 2 labels were of entries beyond its 27 entries" in out
    assert finished_traces(dst) == sorted(dst.iterdir()) and len(finished_traces(dst)) == 2
    assert (dst / "doc_00000" / "trace.json").stat().st_mtime_ns == before
    check_golden(open_trace(dst / "doc_00000"))


def test_the_command_names_every_refused_document_and_imports_the_others(tmp_path, capsys):
    src, dst = tmp_path / "src", tmp_path / "set"
    src.mkdir()
    shutil.copy(GOLDENS[0], src / "doc_2.pkl")
    write_doc(src / "doc_1.pkl", compk_layer_12=None)
    (src / "doc_3.pkl").write_bytes(ATTACKS["global"])
    assert main([str(src), str(dst)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("error: 2 of 3 documents were refused")
    assert "doc_1.pkl: compk_layer_12 is missing" in lines[1]
    assert "doc_3.pkl: its pickle names 'posix.mkdir', which is refused" in lines[2]
    assert lines[0].endswith(f"; {dst} has the others")
    assert [path.name for path in finished_traces(dst)] == ["doc_2"]
    (src / "doc_2.pkl").unlink()
    assert main([str(src), str(tmp_path / "none")]) == 2
    first = capsys.readouterr().err.splitlines()[0]
    assert first == f"error: 2 of 2 documents were refused; {tmp_path / 'none'} has none of them"


def test_the_command_refuses_what_it_cannot_tell_apart(tmp_path, capsys):
    src, dst = tmp_path / "src", tmp_path / "set"
    src.mkdir()
    shutil.copy(GOLDENS[1], src / "doc_00000.pkl")
    assert main([str(FOLDER), str(src), str(dst)]) == 2
    assert "documents must have different names" in capsys.readouterr().err
    assert not dst.exists()
    assert main([str(FOLDER), str(dst)]) == 0
    assert main([str(src), str(dst)]) == 2
    assert "is there already, from 'doc_00000.pkl sha256:" in capsys.readouterr().err
    assert main([str(dst / "doc_00000"), str(dst)]) == 2
    assert "must have documents named doc_*.pkl, got none" in capsys.readouterr().err
    assert main([str(src / "doc_9.pkl"), str(dst)]) == 2
    assert "doc_9.pkl" in capsys.readouterr().err
    assert main([str(FOLDER), str(src / "doc_00000.pkl")]) == 2
    assert "DST must be a directory to write to, but" in capsys.readouterr().err
    assert main([str(FOLDER), str(dst / "x"), "--min-layers", "0"]) == 2
    assert "votes.min_layers must be >= 1" in capsys.readouterr().err


def test_what_the_dumps_do_not_say_is_taken_from_the_options(tmp_path, capsys):
    path = write_doc(tmp_path / "doc_1.pkl")
    options = ["--csa-layers", "40", "--top-p", "0.4", "--page-entries", "16"]
    assert main([str(path), str(tmp_path / "set"), *options]) == 0
    info = open_trace(tmp_path / "set" / "doc_1").info
    assert (info.csa_layers, info.votes.top_p, info.page_entries) == (40, 0.4, 16)
    assert main([str(path), str(tmp_path / "other"), "--csa-layers", "20"]) == 2
    assert "label_scores must be votes in [3, 20], got" in capsys.readouterr().err
    assert main([str(path), str(tmp_path / "other"), "--min-layers", "22"]) == 2
