"""`braid chat` and `braid eval`: what a conversation is, and what is handed to lm_eval."""

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from launch.cli import main
from launch.demo import answer
from tests.launch.runs import Place, assert_one_line
from tests.support.models import save_adapter

SHORT = ("--max_new_tokens", "8", "--device", "cpu")


def talk(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], asked: str, *words: str
) -> list[str]:
    """The answers to lines of questions."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(asked))
    capsys.readouterr()
    assert main(["chat", *words, *SHORT]) == 0
    return capsys.readouterr().out.splitlines()


def answers(model: Any, directory: Path, conversation: list[str], system: str | None = None) -> list[str]:
    """Greedy answers, each with all that was said before."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    messages = [{"role": "system", "content": system}] if system else []
    found = []
    for question in conversation:
        messages.append({"role": "user", "content": question})
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        inputs.pop("token_type_ids", None)
        out = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        answer = tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        messages.append({"role": "assistant", "content": answer})
        found.append(answer)
    return found


def plain(directory: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


def test_answers_are_those_of_transformers(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A conversation, and another one after /clear."""
    wanted = answers(plain(tiny_model), tiny_model, ["one", "two"], "be brief")
    asked = "one\n\ntwo\n/clear\none\n/exit\nthree\n"
    words = ("--model", str(tiny_model), "--system", "be brief", "--temperature", "0")
    printed = talk(monkeypatch, capsys, asked, *words)
    assert "\n".join(printed) == "\n".join([*wanted, wanted[0]])
    assert wanted[0] != answers(plain(tiny_model), tiny_model, ["one"])[0], "the system message does nothing"


def test_an_adapter_brings_its_base(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = save_adapter(tiny_model, tmp_path / "adapter", scale=1.0)
    tuned = PeftModel.from_pretrained(plain(tiny_model), str(adapter))
    wanted = answers(tuned, tiny_model, ["one"])
    assert wanted != answers(plain(tiny_model), tiny_model, ["one"])
    cold = ("--temperature", "0")
    assert talk(monkeypatch, capsys, "one\n", "--model", str(adapter), *cold) == wanted
    both = ("--model", str(tiny_model), "--adapter", str(adapter))
    assert talk(monkeypatch, capsys, "one\n", *both, *cold) == wanted


def test_questions_at_once_are_answered_as_one_by_one(tiny_model: Path) -> None:
    """As the demo asks them: the shorter ones are padded."""
    asked = ["one", "which of the two is it, then?", "two words"]
    wanted = [answers(plain(tiny_model), tiny_model, [question])[0].strip() for question in asked]
    assert answer(tiny_model, asked, max_new_tokens=8) == wanted


def test_answers_that_are_drawn_repeat_with_the_seed(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def drawn(seed: str) -> list[str]:
        words = ("--model", str(tiny_model), "--temperature", "1.5", "--seed", seed)
        return talk(monkeypatch, capsys, "one\n", *words)

    assert drawn("1") == drawn("1")
    assert drawn("1") != drawn("2")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("chat", "no model given; pass --model DIR"),
        ("chat --model gone/to/nowhere", "gone/to/nowhere"),
        ("chat --model M --adapter gone", "adapter gone has no adapter_config.json"),
        ("chat --model M --temperature -1", "temperature must not be negative, not -1.0"),
        ("chat --model M --max_new_tokens 0", "max_new_tokens must be at least 1, not 0"),
        ("chat --model M --temprature 1", "unknown option --temprature; did you mean --temperature?"),
        ("eval --tasks gsm8k", "no model given; pass --model DIR"),
        ("eval --model M", "no tasks given; pass --tasks gsm8k"),
        ("eval --model a,b --tasks gsm8k", "pretrained a,b has a comma"),
    ],
)
def test_what_is_wrong_is_one_line(place: Place, words: str, said: str) -> None:
    asked = [str(place.model) if word == "M" else word for word in words.split()]
    assert main(asked) == 2
    assert_one_line(place.capsys.readouterr().err, asked[0], said)


def test_a_tokenizer_without_a_chat_template_is_refused(place: Place) -> None:
    (place.model / "chat_template.jinja").unlink()
    assert main(["chat", "--model", str(place.model)]) == 2
    assert_one_line(place.capsys.readouterr().err, "chat", "has no chat template")


def test_lm_eval_is_told_what_was_asked(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = save_adapter(tiny_model, tmp_path / "adapter")
    ran: list[list[str]] = []

    def run(command: list[str], **more: Any) -> Any:
        ran.append(command)
        return subprocess.CompletedProcess(command, 3)

    monkeypatch.setattr("launch.evaluate.subprocess.run", run)
    words = ["eval", "--model", str(adapter), "--tasks", "gsm8k", "ifeval", "--limit", "5", "--device", "cpu"]
    assert main([*words, "--dry_run", "true"]) == 0
    assert not ran
    monkeypatch.setattr("launch.evaluate.importlib.util.find_spec", lambda name: None)
    assert main(words) == 2
    assert "pip install 'lm-eval[hf]'" in capsys.readouterr().err
    monkeypatch.setattr("launch.evaluate.importlib.util.find_spec", lambda name: object())
    assert main(words) == 3, "the code is lm_eval's"
    assert ran == [
        [
            *(sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args"),
            f"pretrained={tiny_model},dtype=auto,peft={adapter}",
            *("--tasks", "gsm8k,ifeval", "--batch_size", "auto", "--apply_chat_template"),
            *("--limit", "5.0", "--device", "cpu"),
        ]
    ]
