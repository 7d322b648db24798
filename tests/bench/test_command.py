from __future__ import annotations

import json
from pathlib import Path

import pytest

from uda.bench import documents
from uda.bench.ledger import Ledger
from uda.bench.runner import run_all
from uda.bench.suite import Suite
from uda.cli import main
from uda.commands.bench_tables import made_from_marker
from uda.errors import UDAError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def done(write_suite, fake, capsys):
    """A suite with all its runs in the ledger."""
    path = write_suite()
    suite = Suite.load(path)
    run_all(suite.runs(), Ledger(suite.ledger), launch=fake)
    capsys.readouterr()
    return path


@pytest.fixture
def document(done, tmp_path):
    path = tmp_path / "docs" / "report.md"
    path.parent.mkdir()
    marker = "<!-- uda-bench: ../runs/ledger.jsonl --figure last -->\n<!-- /uda-bench -->\n"
    path.write_text(f"# Report\n\n{marker}\nSome words.\n\n```\n<!-- uda-bench: LEDGER -->\n```\n")
    return path


def test_dry_run_lists_and_runs_nothing(write_suite, tmp_path, capsys):
    assert main(["bench", "run", str(write_suite()), "--dry-run", "--only", "dann"]) == 0
    out = capsys.readouterr().out
    assert out.count("to run  ") == 4
    assert not (tmp_path / "runs").exists()


def test_the_exit_code_tells_of_failures(write_suite, launcher, monkeypatch, capsys):
    path = str(write_suite())
    monkeypatch.setattr("uda.bench.runner.run_all.__defaults__", (1, launcher(fail=("dann/0",)), (), True))
    assert main(["bench", "run", path, "--only", "a->b/*"]) == 1
    out = capsys.readouterr()
    assert "3 runs finished, 1 failed" in out.out
    assert "a->b/dann/0" in out.err
    monkeypatch.setattr("uda.bench.runner.run_all.__defaults__", (1, launcher(), (), True))
    assert main(["bench", "run", path, "--set", "trainer.max_epochs=2", "--seeds", "5", "--workers", "2"]) == 0
    assert "4 runs finished, 0 failed" in capsys.readouterr().out


def test_tables_from_a_suite_and_from_its_ledger(done, tmp_path, capsys):
    assert main(["bench", "table", str(done)]) == 0
    first = capsys.readouterr().out
    assert main(["bench", "table", str(tmp_path / "runs" / "ledger.jsonl")]) == 0
    assert capsys.readouterr().out == first
    assert (
        main(
            [
                "bench",
                "table",
                str(done),
                "--kind",
                "figures",
                "--format",
                "csv",
                "-o",
                str(tmp_path / "t.csv"),
            ]
        )
        == 0
    )
    assert (tmp_path / "t.csv").read_text().startswith("method,last")
    assert main(["bench", "table", str(done), "--kind", "scores", "--methods", "dann,plain"]) == 0


def test_a_suite_shows_its_current_runs_under_their_current_names(done, write_suite, capsys):
    renamed = write_suite(methods={"source": {}, "dann": {"plugins": {"align": {"class_path": "MCC"}}}})
    assert main(["bench", "table", str(renamed)]) == 0
    rows = [line.split("|")[1].strip() for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert rows[2:] == ["source"]  # dann has another config now, and has not been run


def test_update_then_check_then_a_figure_typed_by_hand(document, capsys):
    folder = str(document.parent)
    assert main(["bench", "check", folder]) == 1  # not made yet
    assert main(["bench", "table", "--update", folder]) == 0
    assert main(["bench", "check", folder]) == 0
    assert "1 tables say what their ledgers say" in capsys.readouterr().out
    text = document.read_text()
    assert "| plain " in text
    assert "<!-- uda-bench: LEDGER -->" in text  # an example in a code block stays an example
    row = next(line for line in text.splitlines() if line.startswith("| plain"))
    digit = next(i for i, c in enumerate(row) if c.isdigit())
    edited = row[:digit] + str((int(row[digit]) + 1) % 10) + row[digit + 1 :]
    document.write_text(text.replace(row, edited))
    assert main(["bench", "check", folder]) == 1
    out = capsys.readouterr()
    assert f"-{edited}" in out.out
    assert f"+{row}" in out.out
    assert main(["bench", "table", "--update", str(document)]) == 0
    assert document.read_text() == text


def test_check_sees_a_ledger_that_has_moved_on(document, done, tmp_path):
    main(["bench", "table", "--update", str(document)])
    ledger = Ledger(tmp_path / "runs" / "ledger.jsonl")
    line = ledger.read()[0]
    line["metrics"]["target_accuracy"]["last"] = 0.999
    ledger.append(line)
    assert main(["bench", "check", str(document)]) == 1


@pytest.mark.parametrize(
    ("marker", "message"),
    [
        ("<!-- uda-bench: ../runs/ledger.jsonl -->\n", "1 markers"),
        ("<!-- uda-bench: ../runs/lodger.jsonl -->\n<!-- /uda-bench -->\n", "Did you mean 'ledger.jsonl'"),
        ("<!-- uda-bench: ../runs/ledger.jsonl --figure best -->\n<!-- /uda-bench -->\n", "invalid choice"),
    ],
)
def test_a_bad_marker_is_an_error(document, marker, message):
    document.write_text(marker)
    with pytest.raises(UDAError) as error:
        documents.check([document], made_from_marker)
    assert message in str(error.value)


def test_bad_input_ends_with_code_2(done, capsys):
    assert main(["bench", "table", "nothing.yaml"]) == 2
    assert main(["bench", "run", str(done), "--set", "oops"]) == 2
    assert main(["bench", "run", str(done), "--seeds", "a"]) == 2
    assert "KEY=VALUE" in capsys.readouterr().err


def test_a_ledger_names_no_folder_of_one_machine(write_suite, fake, monkeypatch):
    monkeypatch.setenv("FOLDER", "/home/somebody")
    suite = Suite.load(write_suite(overrides={"data.reader.path": "${FOLDER:-x}/d.npz"}))
    run_all(suite.runs(), Ledger(suite.ledger), launch=fake)
    assert fake.configs["a->b/plain/0"]["data"]["reader"]["init_args"]["path"] == "/home/somebody/d.npz"
    text = suite.ledger.read_text()
    assert "/home/somebody" not in text
    assert json.loads(text.splitlines()[0])["config"]["data"]["reader"]["init_args"]["path"] == "${FOLDER:-x}/d.npz"


@pytest.mark.slow
def test_the_tables_of_this_projects_documents_say_what_their_ledgers_say():
    count, differences = documents.check([ROOT / "docs"], made_from_marker)
    assert count >= 1
    assert differences == []
