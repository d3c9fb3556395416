"""`braid data`: numbers counted another way, the same wherever they are shown, and what it refuses."""

import json
import re
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from engine.config.options import DataOptions
from engine.data.packing import pack
from engine.data.prepare import prepare
from engine.data.survey import Lengths, histogram
from launch.cli import main
from launch.data import ReportOptions, read_options
from launch.data_report import visible
from launch.pipe import CLOSED
from tests.launch.runs import ROOT, Place, assert_one_line, everything_in, question_rows, write_rows

END = "<|im_end|>"


def conversation(*words: str) -> dict[str, Any]:
    """Question, answer, question, answer, ..."""
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": word} for i, word in enumerate(words)]}


ROWS = [
    conversation("What is the capital of France?", "Paris."),
    conversation("How many legs has a spider?", "Eight.", "And an ant?", "Six legs, of course."),
    conversation("水的化学式是什么？", "H2O。"),
    conversation("Say it again and again and again.", "again " * 30 + "done"),
    conversation("What is the capital of France?", "Paris."),
]


class Counted:
    """Tokens of rows, counted with the tokenizer and its template alone."""

    def __init__(self, model: Path, rows: list[dict[str, Any]]) -> None:
        tokenizer = AutoTokenizer.from_pretrained(str(model))

        def count(text: str) -> int:
            return len(tokenizer(text, add_special_tokens=False)["input_ids"])

        self.lengths = [count(tokenizer.apply_chat_template(row["messages"], tokenize=False)) for row in rows]
        self.supervised = [
            sum(count(m["content"] + END) for m in row["messages"] if m["role"] == "assistant")
            for row in rows
        ]


@pytest.fixture
def counted(tiny_model: Path) -> Counted:
    return Counted(tiny_model, ROWS)


@pytest.fixture
def words(tiny_model: Path, tmp_path: Path) -> list[str]:
    data = write_rows(tmp_path / "rows.jsonl", ROWS)
    return ["data", "--model", str(tiny_model), "--dataset", str(data)]


def report(words: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    capsys.readouterr()
    assert main([*words, "--json"]) == 0
    return dict(json.loads(capsys.readouterr().out))


def printed(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert main(words) == 0
    return capsys.readouterr().out


def cells(page: str, title: str, name: str) -> list[str]:
    """The cells behind `name` in the table of that title."""
    lines = page[page.index(f"\n{title}" if not page.startswith(title) else title) :].splitlines()
    line = next(line for line in lines if re.match(rf"[│|] {name} +[│|]", line))
    return [cell.strip() for cell in re.split("[│|]", line)[2:-1]]


def test_numbers_are_those_of_the_rows(
    words: list[str], counted: Counted, capsys: pytest.CaptureFixture[str]
) -> None:
    found = report(words, capsys)
    part, lengths, supervised = found["training"], counted.lengths, counted.supervised
    assert found["evaluation"] is None
    assert (part["rows"], part["kept"], part["too_long"], part["truncated"]) == (5, 5, 0, 0)
    assert part["without_target"] == 0
    assert part["tokens"] == sum(lengths)
    assert part["supervised_tokens"] == sum(supervised)
    assert part["supervised_share"] == pytest.approx(sum(supervised) / sum(lengths))
    ordered = sorted(lengths)
    assert part["lengths"] == part["lengths_as_read"]
    assert part["lengths"] == {
        "shortest": ordered[0],
        "median": ordered[2],
        "mean": pytest.approx(sum(lengths) / 5),
        "p90": ordered[-1],
        "p99": ordered[-1],
        "longest": ordered[-1],
    }
    assert (part["fewest_answers"], part["mean_answers"], part["most_answers"]) == (1, 1.2, 2)
    assert part["duplicates"] == 1
    assert part["packing"] is None
    for item in part["histogram"]:
        mine = [i for i, length in enumerate(lengths) if item["first"] <= length <= item["last"]]
        assert item["rows"] == len(mine)
        assert item["supervised_tokens"] == sum(supervised[i] for i in mine)
    assert sum(item["rows"] for item in part["histogram"]) == 5


def test_a_run_would_train_on_the_same(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    extra = ["--split_dataset_ratio", "0.4", "--seed", "3", "--system", "Be brief.", "--max_length", "60"]
    found = report([*words, *extra], capsys)
    options = DataOptions(dataset=[words[-1]], split_dataset_ratio=0.4, system="Be brief.", max_length=60)
    data = prepare(options, words[2], seed=3)
    assert data.train is not None
    assert data.evaluation is not None
    for name, store in (("training", data.train), ("evaluation", data.evaluation)):
        part, counts = found[name], store.report
        assert (part["rows"], part["kept"], part["tokens"]) == (counts.rows, counts.kept, counts.tokens)
        assert part["supervised_tokens"] == counts.supervised_tokens
        assert part["too_long"] + part["without_target"] == counts.deleted
        assert part["lengths"]["longest"] == counts.longest
    assert found["training"]["rows"] == 3
    assert found["evaluation"]["rows"] == 2


def test_the_table_says_what_the_json_says(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    words = [*words, "--max_length", "60", "--packing"]
    part, page = report(words, capsys)["training"], printed(words, capsys)
    counts = [part[name] for name in ("rows", "kept", "too_long", "without_target", "truncated")]
    assert cells(page, "rows", "training") == [
        *map(str, counts), str(part["duplicates"]), "1 to 2, mean 1.2",
    ]  # fmt: skip
    share = f"{100 * part['supervised_share']:.2f} %"
    assert cells(page, "tokens  ", "training") == [
        str(part["tokens"]), str(part["supervised_tokens"]), share,
    ]  # fmt: skip
    for name, key in (("training", "lengths"), ("training, as read", "lengths_as_read")):
        shown = [float(cell.replace(",", "")) for cell in cells(page, "tokens a row", name)]
        assert shown == [pytest.approx(value, abs=0.051) for value in part[key].values()]
    packs = part["packing"]
    rows = f"{packs['fewest_rows']} to {packs['most_rows']}, mean {packs['mean_rows']:.1f}"
    assert cells(page, "packing", "training") == [
        str(part["kept"]), str(packs["packs"]), "60", f"{100 * packs['full']:.2f} %", rows,
    ]  # fmt: skip
    # The bars: every bin with its rows, and the limit before the first one beyond.
    bars = page[page.index("training: rows by length") :]
    for item in part["histogram"]:
        assert re.search(rf"\b{item['first']}-{item['last']} +{item['rows']}\b", bars)
    lines = bars.splitlines()
    limit = next(i for i, line in enumerate(lines) if "max_length" in line)
    assert lines[limit].split()[0] == "60"
    assert lines[limit - 1].split()[0].endswith("-60")
    assert lines[limit + 1].split()[0].startswith("61-")


def test_rows_too_long_are_left_out(
    words: list[str], counted: Counted, capsys: pytest.CaptureFixture[str]
) -> None:
    limit = sorted(counted.lengths)[-2]
    part = report([*words, "--max_length", str(limit)], capsys)["training"]
    kept = [length for length in counted.lengths if length <= limit]
    assert (part["rows"], part["kept"], part["too_long"], part["truncated"]) == (5, len(kept), 1, 0)
    assert (part["tokens"], part["lengths"]["longest"]) == (sum(kept), limit)
    assert part["lengths_as_read"]["longest"] == max(counted.lengths)
    assert any(item["last"] == limit for item in part["histogram"])
    assert sum(item["rows"] for item in part["histogram"] if item["first"] > limit) == 1


@pytest.mark.parametrize("strategy", ["right", "left"])
def test_rows_too_long_are_cut(
    strategy: str, words: list[str], counted: Counted, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*words, "--max_length", "12", "--truncation_strategy", strategy]
    assert all(length > 12 for length in counted.lengths)
    if strategy == "right":
        # The question fills the whole row, so no row keeps an answer.
        capsys.readouterr()
        assert main(words) == 2
        assert_one_line(capsys.readouterr().err, "data", "none of the 5 rows is left", "max_length")
        return
    found = report(words, capsys)
    part = found["training"]
    assert (part["kept"], part["truncated"], part["too_long"], part["without_target"]) == (5, 5, 0, 0)
    assert part["tokens"] == 60
    assert found["findings"][0].startswith("5 of 5 training rows (100.0 %) are cut to max_length 12")


def test_answers_that_truncation_cuts_off(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_rows(
        tmp_path / "rows.jsonl",
        [conversation("long " * 40, "gone"), conversation("Hi", "Hello"), conversation("Hi", "there " * 80)],
    )
    found = report([*words, "--max_length", "30", "--truncation_strategy", "right", "--samples", "5"], capsys)
    part = found["training"]
    assert (part["kept"], part["without_target"], part["truncated"], part["too_long"]) == (2, 1, 1, 0)
    assert "1 of 3 training rows (33.3 %) are left out, without a supervised token" in found["findings"][0]
    # Which rows are left is known: those of the samples, and what each file has.
    assert [sample["place"].rpartition(" ")[2] for sample in found["samples"]] == ["2", "3"]
    (file,) = part["files"]
    assert (file["rows"], file["kept"], file["tokens"]) == (3, 2, part["tokens"])


def test_duplicates_and_rows_of_both_parts(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_rows(tmp_path / "val.jsonl", [ROWS[0], ROWS[0], conversation("New?", "Yes.")])
    found = report([*words, "--val_dataset", str(other)], capsys)
    assert found["training"]["duplicates"] == 1
    assert (found["evaluation"]["duplicates"], found["evaluation"]["seen_in_training"]) == (1, 2)
    assert found["findings"] == [
        "1 of 5 training rows (20.0 %) repeat another row",
        "1 of 3 evaluation rows (33.3 %) repeat another row",
        "2 of 3 evaluation rows (66.7 %) are training rows too",
    ]
    page = printed([*words, "--val_dataset", str(other)], capsys)
    assert page.splitlines()[-1] == f"look at this: {'; '.join(found['findings'])}"


def test_good_data_has_a_good_verdict(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_rows(tmp_path / "rows.jsonl", question_rows())
    assert report(words, capsys)["findings"] == []
    assert printed(words, capsys).splitlines()[-1] == "nothing to look at"


def test_several_files(
    words: list[str],
    tmp_path: Path,
    tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    other = "[red]b.jsonl"
    write_rows(Path(other), question_rows())
    words = [*words[:4], "rows.jsonl", f"{other}#3"]
    part = report(words, capsys)["training"]
    first, second = part["files"]
    mine = Counted(tiny_model, ROWS)
    assert (first["source"], first["rows"], first["kept"]) == (words[4], 5, 5)
    assert (first["tokens"], first["supervised_tokens"]) == (sum(mine.lengths), sum(mine.supervised))
    assert (second["source"], second["rows"], second["kept"]) == (other, 3, 3)
    assert first["tokens"] + second["tokens"] == part["tokens"]
    assert first["share"] + second["share"] == pytest.approx(1)
    page = printed(words, capsys)
    assert "training by file" in page
    assert "│ [red]b.jsonl │" in page


def test_packing(words: list[str], counted: Counted, capsys: pytest.CaptureFixture[str]) -> None:
    limit = max(counted.lengths) + 10
    packs = pack(np.array(counted.lengths, dtype=np.int64), limit)
    found = report([*words, "--packing", "--max_length", str(limit)], capsys)["training"]["packing"]
    rows = [len(packs[i]) for i in range(len(packs))]
    assert found == {
        "packs": len(packs),
        "capacity": limit,
        "full": pytest.approx(sum(counted.lengths) / (len(packs) * limit)),
        "fewest_rows": min(rows),
        "mean_rows": pytest.approx(5 / len(packs)),
        "most_rows": max(rows),
    }


# Samples


def test_supervised_text_is_the_answers_with_their_ends(
    words: list[str], counted: Counted, capsys: pytest.CaptureFixture[str]
) -> None:
    samples = report([*words, "--samples", "99"], capsys)["samples"]
    assert len(samples) == 5
    for index, (sample, row) in enumerate(zip(samples, ROWS, strict=True)):
        answers = [m["content"] + END for m in row["messages"] if m["role"] == "assistant"]
        assert [run["text"] for run in sample["runs"] if run["supervised"]] == answers
        whole = "".join(f"<|im_start|>{m['role']}\n{m['content']}{END}\n" for m in row["messages"])
        assert "".join(run["text"] for run in sample["runs"]) == whole
        assert sample["place"] == f"{words[-1]}, row {index + 1}"
        assert sample["tokens"] == counted.lengths[index]
        assert sample["supervised_tokens"] == counted.supervised[index]


def test_the_seed_chooses_samples(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    def places(seed: int) -> str:
        return str(report([*words, "--seed", str(seed)], capsys)["samples"][0]["place"])

    chosen = [places(seed) for seed in range(6)]
    assert chosen == [places(seed) for seed in range(6)]
    assert len(set(chosen)) > 1
    assert report([*words, "--samples", "0"], capsys)["samples"] == []


def test_a_row_is_printed_as_it_is(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "[bold]not bold[/bold] [/nothing] :smile: \x1b[31mnot red"
    write_rows(tmp_path / "rows.jsonl", [conversation(text, "[green]x[/green]\r")])
    page = printed(words, capsys)
    assert "<|im_start|>user\n[bold]not bold[/bold] [/nothing] :smile: ␛[31mnot red<|im_end|>\n" in page
    assert "<|im_start|>assistant\n⟦[green]x[/green]␍<|im_end|>⟧\n" in page
    assert "\x1b" not in page


def test_supervised_text_is_green_on_a_terminal(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    write_rows(tmp_path / "rows.jsonl", [conversation("Hi", "Hello"), conversation("long", "x" * 9000)])
    page = printed([*words, "--samples", "2", "--max_length", "20000"], capsys)
    assert f"<|im_start|>assistant\n\x1b[32mHello{END}\x1b[0m\n" in page
    assert "⟦" not in page
    # A stretch that would flood the terminal comes without its middle.
    assert re.search(r"x … 5,010 characters … x", page)


def test_what_would_steer_a_terminal_is_a_symbol() -> None:
    assert visible("a\x1b[2J\x00\x7f\x9b\u202e\n", breaks=True) == "a␛[2J␀\\u007f\\u009b\\u202e\n"
    assert visible("a\nb\tc") == "a␊b␉c"
    assert visible("水\u3000é👨\u200d👩") == "水\u3000é👨\u200d👩"


def test_a_reader_that_has_had_enough(words: list[str], tmp_path: Path) -> None:
    """`| head -1` closes the pipe: not a word, and the files are written all the same."""
    out = tmp_path / "out"
    command = [sys.executable, "-m", "launch.cli", *words, "--output_dir", str(out)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait(timeout=300) == CLOSED
    assert len(list(out.iterdir())) == 3


# Files


@pytest.mark.parametrize("as_json", [False, True])
def test_files(as_json: bool, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "report"
    rows = [*ROWS, conversation("Show `code`", "```python\nprint('|')\n```")]
    write_rows(tmp_path / "rows.jsonl", rows)
    words = [*words, "--output_dir", str(out), "--max_length", "60", "--samples", "9", "--packing"]
    capsys.readouterr()
    assert main([*words, *(["--json"] if as_json else [])]) == 0
    stdout, stderr = capsys.readouterr()
    record = json.loads((out / "data.json").read_text())
    assert {path.name for path in out.iterdir()} == {"data.json", "data.md", "data.png"}
    line = f"wrote data.json, data.md and data.png to {out}\n"
    if as_json:
        assert json.loads(stdout) == record
        assert stderr == line
    else:
        assert stdout.endswith(line)
    assert record["options"]["max_length"] == 60
    assert (out / "data.png").read_bytes().startswith(b"\x89PNG\r\n")
    page = (out / "data.md").read_text(encoding="utf-8")
    part = record["training"]
    assert cells(page, "## tokens\n", "training")[:2] == [str(part["tokens"]), str(part["supervised_tokens"])]
    assert cells(page, "## rows\n", "training")[:3] == ["6", "5", "1"]
    assert "![rows by length](data.png)" in page
    assert f"**look at this: {'; '.join(record['findings'])}**" in page
    # The fence around a row is longer than any of its own.
    assert f"````text\n<|im_start|>user\nShow `code`{END}\n" in page
    assert f"⟦```python\nprint('|')\n```{END}⟧\n\n````" in page


def test_the_yaml_file_of_a_run_will_do(words: list[str], tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        f"model: {words[2]}\ndataset: [a.jsonl]\nmax_length: 77\nseed: 5\nlearning_rate: 1e-4\n"
        f"output_dir: {tmp_path}/run\npacking: true\n"
    )
    config = read_options(["--config", str(file), "--max_length", "99", "--packing", "false"])
    assert (config.report.model, config.report.seed, config.report.output_dir) == (words[2], 5, None)
    assert (config.data.dataset, config.data.max_length, config.data.packing) == (["a.jsonl"], 99, False)
    assert read_options([f"--config={file}", "--json"]).report.json


def test_ids_that_the_model_does_not_have(place: Place) -> None:
    config = json.loads((place.model / "config.json").read_text())
    (place.model / "config.json").write_text(json.dumps(config | {"vocab_size": 64}))
    words = ["data", "--model", str(place.model), "--dataset", str(place.data)]
    (finding,) = report(words, place.capsys)["findings"]
    assert "vocab_size is 64" in finding
    # Without a config.json there is nothing to compare with.
    (place.model / "config.json").unlink()
    assert report(words, place.capsys)["findings"] == []


# Numbers


@pytest.mark.parametrize("max_length", [2, 30, 100, 513, 1000, 10**6])
@pytest.mark.parametrize("spread", [(1, 3), (5, 600), (400, 9000), (700, 701)])
def test_bins_hold_every_row_once(max_length: int, spread: tuple[int, int]) -> None:
    draw = np.random.default_rng(0)
    lengths = draw.integers(*spread, size=500)
    supervised = draw.integers(0, lengths + 1)
    bins = histogram(lengths, supervised, max_length=max_length)
    assert 1 <= len(bins) <= 25
    for before, after in pairwise(bins):
        assert after.first == before.last + 1
    for item in bins:
        inside = (lengths >= item.first) & (lengths <= item.last)
        expected = (inside.sum(), lengths[inside].sum(), supervised[inside].sum())
        assert (item.rows, item.tokens, item.supervised_tokens) == expected
        assert item.last <= max_length or item.first > max_length
    assert sum(item.rows for item in bins) == 500


def test_quantiles_are_lengths_of_rows() -> None:
    lengths = Lengths.of(np.arange(1, 201, dtype=np.int64))
    assert (lengths.shortest, lengths.p90, lengths.p99, lengths.longest) == (1, 180, 198, 200)
    assert (lengths.median, lengths.mean) == (100.5, 100.5)


# Refusals


def test_bad_input(place: Place) -> None:
    words = ["data", "--model", str(place.model), "--dataset", str(place.data)]
    missing, used = str(place.root / "none.jsonl"), place.root / "used"
    used.mkdir()
    (used / "notes.txt").write_text("mine")
    place.refused(["data", "--dataset", str(place.data)], "--model")
    place.refused(words[:3], "--dataset")
    place.refused([*words[:3], "--dataset", missing], missing, "does not exist")
    place.refused([*words, "--val_dataset", missing], missing, "does not exist")
    place.refused([*words, "--streaming"], "stream")
    place.refused([*words, "--output_dir", str(used)], str(used), "in use")
    place.refused([*words, "--output_dir", str(place.data)], "is a file")
    place.refused([*words, "--max_lenght", "9"], "--max_lenght", "--max_length")
    place.refused([*words, "--learning_rate", "1"], "--learning_rate")
    place.refused([*words, "--samples", "-1"], "samples")
    place.refused([*words, "--seed", "-1"], "seed")
    place.refused([*words, "--max_length", "1"], "max_length")
    place.refused([*words, "--config"], "--config")
    place.refused([*words, "--config", str(place.root / "none.yaml")], "none.yaml")
    place.refused(["data", "--model", str(used), "--dataset", str(place.data)], "tokenizer")


def test_a_bad_row_is_named(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_rows(tmp_path / "rows.jsonl", [ROWS[0], {"text": "no answer"}])
    before = everything_in(tmp_path)
    capsys.readouterr()
    assert main([*words, "--output_dir", str(tmp_path / "out")]) == 2
    assert_one_line(capsys.readouterr().err, "data", "row 2", "no recognised keys")
    assert everything_in(tmp_path) == before


def test_help_lists_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "--help"]) == 0
    listed = Counter(re.findall(r"^  --(\w+)", capsys.readouterr().out, re.MULTILINE))
    assert set(listed) == {*vars(ReportOptions()), *vars(DataOptions())}


@pytest.mark.parametrize(
    ("words", "share", "rows"),
    [
        ((), 0.0, None),
        (("--eval_steps", "2"), 0.01, 1),
        (("--eval_steps", "2", "--split_dataset_ratio", "0"), 0.0, None),
        (("--eval_steps", "2", "--split_dataset_ratio", "0.25"), 0.25, 2),
        (("--eval_steps", "2", "--val_dataset", "DATA"), 0.0, 8),
    ],
)
def test_asking_for_evaluations_holds_rows_out(
    place: Place, words: tuple[str, ...], share: float, rows: int | None
) -> None:
    words = tuple(str(place.data) if word == "DATA" else word for word in words)
    assert main(place.sft("--dry_run", *words)) == 0
    printed = place.capsys.readouterr().out
    assert f"split_dataset_ratio: {share}" in printed
    evaluated = [line for line in printed.splitlines() if line.startswith("eval:")]
    assert [f"{rows} rows" in line for line in evaluated] == ([] if rows is None else [True])
