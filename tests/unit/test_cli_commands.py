"""The command line: what it prints, where, and with which exit code; against a small API over a real socket."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import click
import pytest

from motet.cli import command, main
from motet.cli.jobs import parse_tasks
from motet.cli.show import connect, fitted, program, result_table
from motet.tasks import parse
from tests.unit.fake_api import ADMIN, TOKEN, FakeApi, serving


class Ran(NamedTuple):
    code: int
    out: str
    err: str


class Shell:
    """Runs commands in this process, as the entry point does."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys

    def __call__(self, *args: str) -> Ran:
        self.capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(args)
        said = self.capsys.readouterr()
        code = ended.value.code
        assert isinstance(code, int)
        assert "Traceback" not in said.err
        return Ran(code, said.out, said.err)


@pytest.fixture
def api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeApi]:
    with serving() as fake:
        home = tmp_path / "home"
        home.mkdir()
        known = {"url": fake.url, "token": TOKEN, "admin_token": ADMIN}
        (home / "client.json").write_text(json.dumps(known))
        for name in ("MOTET_URL", "MOTET_TOKEN", "MOTET_TOKEN_FILE", "MOTET_DEBUG"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("MOTET_HOME", str(home))
        yield fake


@pytest.fixture
def motet(capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(capsys)


@pytest.fixture
def tickets(tmp_path: Path) -> str:
    path = tmp_path / "tickets.jsonl"
    path.write_text("".join(json.dumps({"text": f"ticket {i}"}) + "\n" for i in range(30)))
    return str(path)


TOPIC = ("--task", "topic=classify:news-topics")
TWO = (*TOPIC, "--task", "vector=embed:all-MiniLM-L6-v2,dtype=fp16")


def every_command(group: click.Command, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    yield path
    if isinstance(group, click.Group):
        for name, sub in group.commands.items():
            yield from every_command(sub, (*path, name))


COMMANDS = list(every_command(command))


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_every_command_has_help_with_an_example_and_json(motet: Shell, path: tuple[str, ...]) -> None:
    found: click.Command = command
    for name in path:
        assert isinstance(found, click.Group)
        found = found.commands[name]
    assert found.help
    assert found.epilog
    assert "motet " in found.epilog
    # The launcher prints its log.
    if not isinstance(found, click.Group) and path != ("worker",):
        assert "--json" in {option for p in found.params for option in p.opts}
    shown = motet(*path, "--help")
    assert (shown.code, shown.err) == (0, "")
    assert all(option in shown.out for p in found.params for option in p.opts if option.startswith("--"))


def test_submit_prints_the_id_alone_so_that_a_script_can_take_it(
    api: FakeApi, motet: Shell, tickets: str
) -> None:
    ran = motet("submit", tickets, *TWO, "--name", "mine", "--no-reuse", "--priority", "bulk")
    assert ran == Ran(0, "job-1\n", "")
    opening = api.jobs["job-1"].opening
    assert (opening["name"], opening["reuse"], opening["priority"]) == ("mine", False, "bulk")
    assert opening["tasks"]["vector"]["dtype"] == "fp16"


def test_submit_can_wait_and_say_how_it_ended(api: FakeApi, motet: Shell, tickets: str) -> None:
    ran = motet("submit", tickets, *TWO, "--wait")
    assert (ran.code, ran.out) == (0, "job-1\n")
    assert "succeeded · 60 of 60 cells" in ran.err
    assert json.loads(motet("submit", tickets, *TWO, "--wait", "--json").out)["state"] == "succeeded"


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_submit_can_write_the_rows(
    api: FakeApi, motet: Shell, tickets: str, tmp_path: Path, suffix: str
) -> None:
    out = tmp_path / f"rows.{suffix}"
    ran = motet("submit", tickets, *TWO, "--out", str(out))
    assert ran.code == 0
    assert f"30 rows in {out}" in ran.err
    assert out.stat().st_size > 100


def test_plan_shows_what_is_shared(api: FakeApi, motet: Shell, tickets: str) -> None:
    ran = motet("plan", tickets, *TWO)
    assert ran.code == 0
    assert "2 tasks → 1 pass over 30 rows" in ran.out
    assert "topic, vector" in ran.out
    assert json.loads(motet("plan", tickets, *TWO, "--json").out)["estimate"] is True
    assert api.jobs == {}


def test_plan_draws_who_waits_for_whom(api: FakeApi, motet: Shell, tickets: str) -> None:
    mood = ("--task", "mood=choose:m,labels=glad|sad", "--task", "gist=generate:m,prompt=Sum up.")
    ran = motet("plan", tickets, *mood, "--task", "reply=generate:m,prompt=To a {mood} customer.")
    assert ran.code == 0
    assert "rows ─▶ pass 0  fake  mood · gist   one prefill for 2 tasks: 50 % of tokens saved" in ran.out
    assert "        └─ mood ─▶ pass 1  fake  reply\n" in ran.out
    assert "3 tasks → 2 passes over 30 rows" in ran.out
    assert "at most 15,360 written" in ran.out
    assert "written ≤" in ran.out
    assert "written" not in motet("plan", tickets, *TWO).out
    assert "\x1b" not in ran.out


def test_jobs_are_listed_watched_cancelled_and_removed(api: FakeApi, motet: Shell, tickets: str) -> None:
    assert "no jobs" in motet("jobs").err
    assert json.loads(motet("jobs", "--json").out) == []
    api.eager = False
    motet("submit", tickets, *TOPIC)
    assert "job-1" in motet("jobs", "--state", "running").out
    assert "cancelled" in motet("cancel", "job-1").out
    assert motet("watch", "job-1") == Ran(1, "", "error: job job-1: cancelled: cancelled by its owner\n")
    assert motet("rm", "job-1").code == 0
    assert motet("watch", "job-1").code == 1
    api.eager = True
    motet("submit", tickets, *TOPIC)
    assert "succeeded" in motet("watch", "job-2").out
    lines = motet("watch", "job-2", "--json").out.splitlines()
    assert [json.loads(line)["state"] for line in lines] == ["succeeded"]


def test_the_beginning_of_an_id_stands_for_it_while_it_is_the_only_one(
    api: FakeApi, motet: Shell, tickets: str
) -> None:
    for _ in range(2):
        motet("submit", tickets, *TOPIC)
    api.jobs = {f"0198f2c4-{i}-whole": job for i, job in enumerate(api.jobs.values())}
    for job_id, job in api.jobs.items():
        job.id = job_id
    assert motet("watch", "0198f2c4-1").code == 0
    assert "2 jobs have ids that begin with 0198" in motet("watch", "0198").err
    for no_id in ("019", "0198f2c4-9"):
        assert "no job of this id" in motet("watch", no_id).err
    assert json.loads(motet("rm", "0198f2c4-1", "--json").out) == {"removed": ["0198f2c4-1-whole"]}


def test_cells_that_were_skipped_are_not_shown_as_done(api: FakeApi, motet: Shell, tickets: str) -> None:
    api.eager = False
    motet("submit", tickets, *TOPIC)
    assert "skipped" not in motet("jobs").out
    motet("cancel", "job-1")
    listed = motet("jobs").out
    assert "0/30" in listed
    assert "skipped" in listed


def test_jobs_tell_the_tokens_that_were_written_where_there_are_any(
    api: FakeApi, motet: Shell, tickets: str
) -> None:
    motet("submit", tickets, *TOPIC)
    assert "written" not in motet("jobs").out
    api.jobs["job-1"].spent = {"tokens_out": 12_345}
    assert "12,345" in motet("jobs").out


def test_a_narrow_table_drops_columns_in_order_and_never_shrinks_an_id() -> None:
    columns = ("!job", "name", "#cells", "created")
    rows = [["j" * 36, "a name of several words, which may go on in the next line", "12/12", "2026-11-23"]]
    drop = ("created", "#cells")
    assert fitted(columns, rows, drop, 80)[0] == list(columns)
    assert fitted(columns, rows, drop, 75)[0] == ["!job", "name", "#cells"]
    assert fitted(columns, rows, drop, 40) == (["!job", "name"], [rows[0][:2]])


def test_a_narrow_table_of_results_leaves_out_vectors_and_scores(
    api: FakeApi, motet: Shell, tickets: str
) -> None:
    motet("submit", tickets, *TWO)
    with connect() as client:
        rows = list(client.job("job-1").results())
        assert [c.header for c in result_table(rows, width=80).columns] == ["row", "topic"]
        assert list(result_table(rows, width=80).columns[1].cells)[:2] == ["sport", "tech"]
        assert [c.header for c in result_table(rows, width=120).columns] == ["row", "topic", "vector"]
        only = list(client.job("job-1").results(["vector"]))
        assert [c.header for c in result_table(only, width=80).columns] == ["row", "vector"]


def test_the_command_is_named_as_it_was_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "my env" / "bin" / "motet"
    script.parent.mkdir(parents=True)
    script.touch(mode=0o755)
    monkeypatch.setattr(sys, "argv", [str(script)])
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.chdir(tmp_path)
    assert program() == "'my env/bin/motet'"
    monkeypatch.chdir(script.parent)
    assert program() == "./motet"
    monkeypatch.chdir("/")
    assert program() in (f"'{script}'", f"'{str(script)[1:]}'")
    monkeypatch.setenv("PATH", str(script.parent))
    assert program() == "motet"
    monkeypatch.setattr(sys, "argv", ["-c"])
    assert program() == "motet"


def test_the_help_cuts_no_summary(motet: Shell) -> None:
    listed = motet("--help").out.partition("Commands:")[2].partition("Start here")[0]
    assert "..." not in listed


def test_results_are_a_table_for_people_and_lines_for_programs(
    api: FakeApi, motet: Shell, tickets: str
) -> None:
    motet("submit", tickets, *TWO)
    lines = motet("results", "job-1").out.splitlines()
    assert [json.loads(line)["topic"] for line in lines] == ["sport", "tech"] * 15
    assert motet("results", "job-1", "--json", "--limit", "2").out.splitlines() == lines[:2]
    read = list(csv.DictReader(io.StringIO(motet("results", "job-1", "--format", "csv").out)))
    assert [row["topic"] for row in read] == ["sport", "tech"] * 15
    table = motet("results", "job-1", "--format", "table", "--task", "topic")
    assert "sport 0.75" in table.out
    assert "first 20 of 30 rows" in table.err
    assert "no task 'mood'" in motet("results", "job-1", "--task", "mood").err


def test_a_version_is_promoted_shown_by_its_alias_and_rolled_back(api: FakeApi, motet: Shell) -> None:
    first = motet("models", "promote", "news-topics@0", "prod")
    assert first == Ran(0, "news-topics@prod → news-topics@0 (nothing before)\n", "")
    second = motet("models", "promote", "news-topics@1", "prod")
    assert second.out == "news-topics@prod → news-topics@1 (before: news-topics@0)\n"
    assert "prod" in motet("models").out
    (shown,) = json.loads(motet("models", "--json").out)
    assert [(a["alias"], a["ref"]) for a in shown["aliases"]] == [("news-topics@prod", "news-topics@1")]
    assert "news-topics@prod → news-topics@1" in motet("models", "show", "news-topics").out
    assert json.loads(motet("models", "show", "news-topics", "--json").out)["aliases"] == shown["aliases"]
    back = json.loads(motet("models", "rollback", "news-topics@prod", "--json").out)
    assert (back["ref"], back["before"]) == ("news-topics@0", None)
    assert "nothing stood before" in motet("models", "rollback", "news-topics@prod").err
    assert motet("models", "unalias", "news-topics@prod") == Ran(0, "", "")
    assert api.aliases == {}
    assert "name@version" in motet("models", "promote", "news-topics", "prod").err
    assert motet("models", "promote", "news-topics@1").code == 2


def test_models_workers_and_tokens_are_shown(api: FakeApi, motet: Shell) -> None:
    assert "news-topics@1" in motet("models").out
    assert json.loads(motet("models", "--json").out)[0]["name"] == "news-topics"
    assert "sport, tech" in motet("models", "show", "news-topics").out
    assert "running job" in motet("models", "rm", "news-topics@1").err
    assert "CPU slot" in motet("workers").out
    assert json.loads(motet("workers", "--json").out)[0]["backlog_s"] == 1.5
    assert motet("token", "create", "laptop").out == "t2.made\n"
    assert json.loads(motet("token", "create", "laptop", "--json").out)["token"] == "t2.made"
    variables = motet("token", "create", "laptop", "--openai").out.splitlines()
    assert variables == [f"export OPENAI_BASE_URL={api.url}/openai/v1", "export OPENAI_API_KEY=t2.made"]
    assert "laptop" in motet("token", "list").out
    assert motet("token", "revoke", "t1").code == 0


def test_an_error_is_one_line_with_a_remedy(api: FakeApi, motet: Shell, tickets: str, tmp_path: Path) -> None:
    for args, words in [
        (("watch", "nope"), "no job of this id; see `motet jobs`"),
        (("submit", "none.jsonl", *TOPIC), "check the path"),
        (("submit", tickets, "--task", "topic=classify:unknown"), "tasks.topic.model"),
        (("submit", tickets, "--task", "topic=guess:m"), "one of chat, choose, classify"),
    ]:
        ran = motet(*args)
        assert (ran.code, ran.out) == (1, "")
        assert ran.err.startswith("error: ")
        assert ran.err.count("\n") == 1
        assert words in ran.err


def test_many_problems_are_listed_below_each_other(api: FakeApi, motet: Shell, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": NaN}\n{"text": NaN}\n')
    ran = motet("submit", str(path), *TOPIC)
    assert ran.err.splitlines()[0] == "error: 2 problems (rows count from 0):"
    assert "--bad-rows error" in ran.err
    assert "(line 2)" in ran.err
    ran = motet("submit", str(path), *TOPIC, "--bad-rows", "error", "--wait")
    assert ran.code == 0
    assert "motet results job-1" in ran.err
    assert "<bad_row: text: got NaN" in motet("results", "job-1", "--format", "table").out


@pytest.mark.parametrize(
    "args",
    [
        ("submit", "x.jsonl"),
        ("submit", "x.jsonl", "--task", "classify:news-topics"),
        ("submit", "x.jsonl", "--task", "topic=news-topics"),
        ("submit", "x.jsonl", *TOPIC, *TOPIC),
        ("submit", "x.jsonl", *TOPIC, "--out", "rows.xlsx"),
        ("submit", "x.jsonl", *TOPIC, "--out", "no-such-folder/rows.csv"),
        ("jobs", "--state", "asleep"),
        ("up", "--cpus", "0"),
        *(
            (*command, option, amount)
            for amount in ("nan", "inf", "-inf", "0", "some")
            for *command, option in (
                ("submit", "x.jsonl", *TOPIC, "--retention-days"),
                ("drain", "a-worker", "--timeout"),
                ("token", "create", "laptop", "--expires-days"),
            )
        ),
        ("worker", "--verbose"),
        ("models", "add"),
        ("models", "add", "--openai", "http://host/v1"),
        ("models", "add", "x", "--engine", "abacus"),
        ("compress", "all-MiniLM-L6-v2"),
        *(
            ("compress", "all-MiniLM-L6-v2", "--to", "int8", f"--tolerance={points}")
            for points in ("nan", "inf", "-inf", "few")
        ),
        ("nonsense",),
    ],
)
def test_a_command_that_is_written_wrongly_ends_with_2(
    api: FakeApi, motet: Shell, args: tuple[str, ...]
) -> None:
    ran = motet(*args)
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith("error: ")
    assert "--help" in ran.err
    assert api.requests == []


def test_no_command_at_all_shows_the_help(motet: Shell) -> None:
    ran = motet()
    assert ran.code == 2
    assert "motet up" in ran.err


def test_no_server_is_told_with_how_to_start_one(
    motet: Shell, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MOTET_HOME", str(tmp_path))
    monkeypatch.delenv("MOTET_TOKEN", raising=False)
    assert "motet up" in motet("jobs").err
    monkeypatch.setenv("MOTET_TOKEN", TOKEN)
    monkeypatch.setenv("MOTET_URL", "http://127.0.0.1:9")
    ran = motet("jobs")
    assert ran.code == 1
    assert "does not answer: no connection; start it with `motet up`" in ran.err


def test_a_bug_is_one_line_too(api: FakeApi, motet: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **options: object) -> object:
        raise ZeroDivisionError("of a user's text")

    monkeypatch.setattr("motet.client.Client.jobs", broken)
    ran = motet("jobs")
    assert (ran.code, ran.err) == (
        1,
        "error: unexpected ZeroDivisionError; set MOTET_DEBUG=1 to see where, and report it\n",
    )


def test_task_options_are_read_up_to_the_next_name() -> None:
    assert parse_tasks(["a=classify:m,input={x}, {y},scores=true,max_tokens=64", "b=embed:m@2"]) == {
        "a": {"kind": "classify", "model": "m", "input": "{x}, {y}", "scores": True, "max_tokens": 64},
        "b": {"kind": "embed", "model": "m@2"},
    }


def test_scores_are_numbers_and_words_stay_words() -> None:
    """What a user types for them was refused as text, and as a number."""
    read = parse_tasks(
        ["a=classify:m,min_score=0.5,otherwise=7", "b=function:f,artefact=2024,when=true == a", "c=chat:m,temperature=.5"]
    )  # fmt: skip
    assert read == {
        "a": {"kind": "classify", "model": "m", "min_score": 0.5, "otherwise": "7"},
        "b": {"kind": "function", "model": "f", "artefact": "2024", "when": "true == a"},
        "c": {"kind": "chat", "model": "m", "temperature": 0.5},
    }
    assert parse(read).keys() == {"a", "b", "c"}


def test_a_ranking_names_its_query_and_its_list() -> None:
    assert parse_tasks(["best=rank:m", "top=rank:m,query=42,documents={pages}"]) == {
        "best": {"kind": "rank", "model": "m"},
        "top": {"kind": "rank", "model": "m", "query": "42", "documents": "{pages}"},
    }


def test_whether_a_model_thinks_is_true_false_or_null() -> None:
    asked = parse_tasks([f"{name}=chat:m,thinking={name}" for name in ("true", "false", "null")])
    assert [task["thinking"] for task in asked.values()] == [True, False, None]


def test_options_of_language_models_are_read_as_what_they_are(tmp_path: Path) -> None:
    (tmp_path / "form.json").write_text('{"type": "object"}')
    (tmp_path / "reply.txt").write_text("Write a reply,\nto a {mood} customer.\n")
    (tmp_path / "labels.txt").write_text("glad\n\nnot, glad\n")
    assert parse_tasks(
        [
            "mood=choose:m,labels=glad|very sad,question=42,scores=true",
            f"reply=generate:m,prompt=@{tmp_path}/reply.txt,temperature=0.7,seed=3,max_tokens=9,stop=a|b",
            f"form=extract:m,schema=@{tmp_path}/form.json",
            'short=extract:m,schema={"type": "object", "required": ["a"]},prompt=What, if a=1?',
            f"of=choose:m,labels=@{tmp_path}/labels.txt",
            "answer=chat:m,messages={past},system=true",
        ]
    ) == {
        "mood": {
            "kind": "choose",
            "model": "m",
            "labels": ["glad", "very sad"],
            "question": "42",
            "scores": True,
        },
        "reply": {
            "kind": "generate",
            "model": "m",
            "prompt": "Write a reply,\nto a {mood} customer.",
            "temperature": 0.7,
            "seed": 3,
            "max_tokens": 9,
            "stop": ["a", "b"],
        },
        "form": {"kind": "extract", "model": "m", "schema": {"type": "object"}},
        "short": {
            "kind": "extract",
            "model": "m",
            "schema": {"type": "object", "required": ["a"]},
            "prompt": "What, if a=1?",
        },
        "of": {"kind": "choose", "model": "m", "labels": ["glad", "not, glad"]},
        "answer": {"kind": "chat", "model": "m", "messages": "{past}", "system": "true"},
    }


@pytest.mark.parametrize(
    ("task", "words"),
    [
        ("form=extract:m,schema=@nowhere.json", "'nowhere.json' cannot be read: no such file"),
        ("form=extract:m,schema={", "broken JSON"),
    ],
)
def test_an_option_that_cannot_be_read_is_told_before_anything_is_sent(
    api: FakeApi, motet: Shell, tickets: str, task: str, words: str
) -> None:
    ran = motet("submit", tickets, "--task", task)
    assert ran.code == 2
    assert words in ran.err
    assert api.requests == []


@pytest.mark.parametrize(
    ("task", "words"),
    [
        ("a=generate:m", "tasks.a.prompt: got nothing"),
        ("a=choose:m,labels=one", "got a list of one label; expected 2 to 1,000 different texts"),
        ("a=extract:m", "tasks.a.schema: got nothing"),
        ("a=generate:m,prompt=x,temperature=warm", "a number from 0 to 10"),
    ],
)
def test_a_task_that_lacks_something_says_what(
    api: FakeApi, motet: Shell, tickets: str, task: str, words: str
) -> None:
    ran = motet("submit", tickets, "--task", task)
    assert ran.code == 1
    assert words in ran.err


# -- as a process of its own


def process(*args: str, **options: Any) -> subprocess.Popen[bytes]:
    code = "from motet.cli import main; main()"
    return subprocess.Popen(
        [sys.executable, "-c", code, *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options
    )


def test_a_reader_that_has_seen_enough_is_no_error(api: FakeApi, motet: Shell, tmp_path: Path) -> None:
    path = tmp_path / "many.txt"
    path.write_text("a ticket\n" * 20_000)
    motet("submit", str(path), *TOPIC)
    with process("results", "job-1") as running:
        assert running.stdout is not None
        assert running.stderr is not None
        assert json.loads(running.stdout.readline())["row"] == 0
        running.stdout.close()
        assert running.stderr.read() == b""


def test_a_pipe_gets_results_and_no_bar(api: FakeApi, tickets: str) -> None:
    with process("submit", tickets, *TOPIC, "--wait") as running:
        out, err = running.communicate(timeout=60)
    assert out == b"job-1\n"
    assert err.decode().startswith("succeeded")
    assert b"\x1b" not in err


def test_worker_and_models_add_become_the_workers_own_program(api: FakeApi, tmp_path: Path) -> None:
    """A package ``workers`` that comes first on the path tells what it was given."""
    (tmp_path / "workers").mkdir()
    (tmp_path / "workers" / "__init__.py").touch()
    (tmp_path / "workers" / "__main__.py").write_text(
        "import os, sys, json; print(json.dumps([sys.argv[1:], os.environ['MOTET_URL'], os.environ['MOTET_TOKEN']]))"
    )
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{Path(__file__).parents[2]}"}
    with process("worker", "--cpus", "2", "--name", "w", "--threads", "1", env=env) as running:
        assert json.loads(running.communicate(timeout=60)[0]) == [
            ["--cpus", "2", "--name", "w", "--threads", "1"],
            api.url,
            TOKEN,
        ]
    with process("models", "add", "./m", "--name", "m", "--json", env=env) as running:
        assert json.loads(running.communicate(timeout=60)[0]) == [
            ["register", "./m", "--name", "m", "--json"],
            api.url,
            ADMIN,
        ]


@pytest.mark.parametrize(
    ("path", "called"), [(("worker",), ""), (("models", "add"), "register"), (("compress",), "compress")]
)
def test_the_workers_own_program_takes_the_options_of_the_command(
    motet: Shell, path: tuple[str, ...], called: str
) -> None:
    from workers.__main__ import program

    ours: click.Command = command
    for name in path:
        assert isinstance(ours, click.Group)
        ours = ours.commands[name]
    theirs = program.commands[called] if called else program
    assert [p.to_info_dict() for p in theirs.params] == [p.to_info_dict() for p in ours.params]
    assert theirs.epilog == ours.epilog
