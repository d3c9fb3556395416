"""`braid verify` as a user runs it: exit codes, what is printed, the JSON report."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.storage.manifest import MANIFEST_FILE
from launch.cli import main
from launch.verify import PROMPTS, QUESTION
from tests.launch.runs import braid
from tests.support.models import MOE_MODELS, save_adapter, save_tiny_model_with_words

UP = "model.layers.1.mlp.up_proj.weight"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A command that has ended; `report` is its JSON, if there is one."""

    code: int
    out: str
    err: str
    report: dict[str, Any] | None

    def line(self) -> str:
        """The one line of an error."""
        assert (self.code, self.out, self.report) == (2, "", None), self
        assert self.err.count("\n") == 1
        assert self.err.startswith("braid verify: error: ")
        return self.err


Verify = Callable[..., Outcome]


@pytest.fixture
def verify(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Verify:
    """verify(*words): the command in this process, with a report."""

    def run(*words: object) -> Outcome:
        path = tmp_path / "report.json"
        path.unlink(missing_ok=True)
        capsys.readouterr()
        code = main(["verify", *map(str, words), "--report", str(path)])
        out, err = capsys.readouterr()

        def refuse(constant: str) -> None:
            raise AssertionError(f"{constant} is no JSON")

        report = json.loads(path.read_text(), parse_constant=refuse) if path.exists() else None
        return Outcome(code=code, out=out, err=err, report=report)

    return run


@pytest.fixture(scope="session")
def converted(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the tiny model, not to be changed."""
    directory = tmp_path_factory.mktemp("verify") / "mcore"
    words = ["convert", "--to", "mcore", "--model", str(tiny_model), "--output_dir", str(directory)]
    assert main(words) == 0
    return directory


@pytest.fixture
def checkpoint(converted: Path, tmp_path: Path) -> Path:
    """A copy to be damaged at will."""
    return Path(shutil.copytree(converted, tmp_path / "mcore"))


def edit_weights(model: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    tensors = load_file(model / "model.safetensors")
    edit(tensors)
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    return model


# Weights


def test_weights(verify: Verify, tiny_model: Path, converted: Path, model: Path) -> None:
    same = verify("--model", tiny_model, "--checkpoint", converted)
    assert (same.code, same.err) == (0, "")
    count = len(load_file(tiny_model / "model.safetensors"))
    assert same.out == f"same model: {count} tensors are identical\n"
    assert same.report is not None
    assert len(same.report["tensors"]) == count
    assert {len(tensor["sha256"]) for tensor in same.report["tensors"]} == {64}

    edit_weights(model, lambda t: t[UP][2, 3:5].copy_(torch.tensor([float("nan"), float("inf")])))
    other = verify("--model", tiny_model, "--checkpoint", model, "--workers", 3)
    assert (other.code, other.err) == (1, "")
    assert "NOT the same model: 1 tensors differ" in other.out
    assert f"{UP} holds 0 NaN and 0 Inf; in the other 1 NaN and 1 Inf\n" in other.out
    assert other.report is not None
    assert [(t["name"], t["max_abs_diff"]) for t in other.report["differences"]] == [(UP, "nan")]
    itself = verify("--model", model, "--checkpoint", model)
    assert itself.code == 0
    assert f"{UP} holds 1 NaN and 1 Inf\n" in itself.out


# Logits


def test_logits_in_a_process_of_its_own(
    tiny_model: Path, converted: Path, tmp_path: Path, cache: Path
) -> None:
    """Nothing but the report is printed, neither by transformers, nor by Megatron, nor by gloo."""
    report = tmp_path / "report.json"
    words = ["verify", "--model", str(tiny_model), "--checkpoint", str(converted), "--level", "logits"]
    run = braid(*words, "--report", str(report), cache=cache)
    assert (run.code, run.stderr, run.left_running) == (0, "", ())
    lines = run.stdout.splitlines()
    assert lines[0].startswith("same model: ")
    assert "computed up to" in run.stdout
    assert lines[-1].startswith("same logits: ")
    assert len(lines) == 1 + 4 + 5 + 1, run.stdout  # weights; frame of the table; five stages; summary
    content = json.loads(report.read_text())
    assert content["same"]
    assert content["logits"]["same"]
    assert [stage["stage"] for stage in content["logits"]["stages"]] == [
        "embedding",
        "layer 0",
        "layer 1",
        "final norm",
        "logits",
    ]
    assert content["logits"]["prompts"] == len(PROMPTS) + 1
    assert max(stage["relative_diff"] for stage in content["logits"]["stages"]) < 1e-5


def test_logits_name_the_layer(verify: Verify, model: Path, converted: Path) -> None:
    edit_weights(model, lambda t: t[UP].mul_(1.1))
    outcome = verify("--model", model, "--checkpoint", converted, "--level", "logits")
    assert (outcome.code, outcome.err) == (1, "")
    assert "NOT the same model: 1 tensors differ" in outcome.out
    assert "NOT the same logits: first different at layer 1, mean KL" in outcome.out
    assert outcome.report is not None
    assert (outcome.report["same"], outcome.report["logits"]["first_difference"]) == (False, "layer 1")


@pytest.mark.parametrize("kind", MOE_MODELS)
def test_logits_of_experts(verify: Verify, tmp_path: Path, kind: str) -> None:
    """A model and its conversion, and one in which a single expert is another."""
    model, mcore = save_tiny_model_with_words(kind, tmp_path / "model"), tmp_path / "mcore"
    assert main(["convert", "--to", "mcore", "--model", str(model), "--output_dir", str(mcore)]) == 0
    same = verify("--model", model, "--checkpoint", mcore, "--level", "logits")
    assert (same.code, same.err) == (0, "")
    assert "\nsame logits: " in same.out
    name = "model.layers.2.mlp.experts.3.down_proj.weight"
    edit_weights(model, lambda t: t[name].mul_(1.1))
    other = verify("--model", model, "--checkpoint", mcore, "--level", "logits")
    assert (other.code, other.err) == (1, "")
    assert "NOT the same model: 1 tensors differ" in other.out
    assert other.report is not None
    assert [t["name"] for t in other.report["differences"]] == [name]
    assert "NOT the same logits: first different at layer 2, mean KL" in other.out


def test_logits_within_the_bound_do_not_make_other_weights_the_same(
    verify: Verify, model: Path, converted: Path
) -> None:
    edit_weights(model, lambda t: t[UP][0, 0].mul_(1.0 + 1e-6))
    outcome = verify("--model", model, "--checkpoint", converted, "--level", "logits")
    assert outcome.code == 1
    assert "same logits: largest relative difference" in outcome.out
    assert outcome.report is not None
    assert (outcome.report["same"], outcome.report["logits"]["same"]) == (False, True)


def test_prompts_of_a_file(verify: Verify, tiny_model: Path, converted: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    texts = ["Hello", "床前明月光", "  def f():"]
    file = tmp_path / "prompts.txt"
    file.write_bytes("\r\n".join(["", *texts, "", "   "]).encode())
    words = ["--model", tiny_model, "--checkpoint", converted, "--level", "logits", "--prompts", file]
    outcome = verify(*words)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    assert outcome.report is not None
    assert outcome.report["logits"]["prompts"] == 3
    assert outcome.report["logits"]["tokens"] == sum(len(tokenizer(text).input_ids) for text in texts)
    assert outcome.code == 0
    file.write_text(" \n\n")
    assert "holds no prompt; write one on each line" in verify(*words).line()
    file.write_bytes(b"\xff\xfe\n")
    assert "is not UTF-8 text" in verify(*words).line()
    file.unlink()
    assert "prompts.txt cannot be read: No such file" in verify(*words).line()


def test_the_question_goes_through_the_chat_template(
    verify: Verify, model: Path, converted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from converters import logits

    seen: list[str] = []
    original = logits.check_prompts
    monkeypatch.setattr(
        logits,
        "check_prompts",
        lambda m, c, prompts: seen.extend(p.text for p in prompts) or original(m, c, prompts),
    )
    words = ["--model", model, "--checkpoint", converted, "--level", "logits"]
    assert verify(*words).code == 0
    assert seen == [*PROMPTS, f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"]
    seen.clear()
    (model / "chat_template.jinja").unlink()
    assert verify(*words).code == 0
    assert seen == [*PROMPTS]
    (model / "chat_template.jinja").write_text("{{ raise_exception('only for\nfour legs') }}")
    assert "the chat template of" in verify(*words).line()


def test_models_that_cannot_be_compared(verify: Verify, tiny_model: Path, model: Path) -> None:
    edit_weights(model, lambda t: t.pop("model.norm.weight"))
    outcome = verify("--model", tiny_model, "--checkpoint", model, "--level", "logits")
    assert (outcome.code, outcome.err) == (1, "")
    assert "logits were not compared: " in outcome.out
    assert "model.norm.weight [32] is missing" in outcome.out
    assert outcome.report is not None
    assert outcome.report["logits"]["not_compared"] in outcome.out


def test_a_checkpoint_whose_optimizer_is_cut_off(
    verify: Verify, tiny_model: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its weights can be compared, but the engine does not load it."""
    from converters.mcore import reader

    def cut_off(self: Any, directory: Path) -> None:
        original(self, directory)
        chunk = replace(self.tensors["decoder.final_layernorm.weight"].chunks[0], start=10**9)
        self.tensors["optimizer.state"] = replace(
            self.tensors["decoder.final_layernorm.weight"], key="optimizer.state", chunks=(chunk,)
        )

    original = reader.DistReader.__init__
    monkeypatch.setattr(reader.DistReader, "__init__", cut_off)
    words = ["--model", tiny_model, "--checkpoint", checkpoint]
    assert verify(*words).code == 0
    outcome = verify(*words, "--level", "logits")
    assert (outcome.code, outcome.report) == (2, None)
    assert outcome.err.count("\n") == 1
    assert "__0_0.distcp is truncated" in outcome.err


def test_a_model_without_tokenizer(verify: Verify, model: Path, converted: Path) -> None:
    words = ["--model", model, "--checkpoint", converted]
    for path in model.glob("*token*"):
        path.unlink()
    assert verify(*words).code == 0
    assert "model has no tokenizer (tokenizer.json)" in verify(*words, "--level", "logits").line()
    (model / "tokenizer.json").write_text("{")
    assert "the tokenizer of" in verify(*words, "--level", "logits").line()


# Flags


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("--model M", "pass both"),
        ("--checkpoint M", "pass both"),
        ("--manifest", "--manifest checks the files of --checkpoint DIR; pass it"),
        ("--manifest --model M", "--manifest checks the files of --checkpoint DIR; pass it"),
        ("--checkpoint M --manifest --level weights", "--level does not go with --manifest"),
        ("--checkpoint M --manifest --prompts P", "--prompts does not go with --manifest"),
        ("--model M --checkpoint M --prompts P", "--prompts is for --level logits"),
        ("--model M --checkpoint M --level weights --prompts P", "--prompts is for --level logits"),
        ("--model M --checkpoint M --level tokens", "level must be one of weights, logits, not 'tokens'"),
        ("--model M --checkpoint M --workers 0", "workers must be at least 1, not 0"),
        ("--model M --checkpoint M --manifset", "did you mean --manifest?"),
    ],
)
def test_flags_that_contradict_each_other(verify: Verify, tiny_model: Path, words: str, named: str) -> None:
    assert named in verify(*(tiny_model if word == "M" else word for word in words.split())).line()


def test_help_names_every_way(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "--help"]) == 0
    printed = capsys.readouterr().out
    for part in ("--level weights|logits", "--manifest", "--prompts", "--workers", "--report"):
        assert part in printed


# The manifest


def test_an_intact_directory(verify: Verify, tiny_model: Path, converted: Path) -> None:
    outcome = verify("--checkpoint", converted, "--manifest")
    assert (outcome.code, outcome.err) == (0, "")
    files = [path for path in converted.rglob("*") if path.is_file() and path.name != MANIFEST_FILE]
    size = sum(path.stat().st_size for path in files) / 1e9
    assert outcome.out.startswith(f"every file is intact: {len(files)} files, {size:.3f} GB, written 20")
    assert outcome.out.count("\n") == 1
    assert outcome.report is not None
    assert (outcome.report["good"], outcome.report["problems"], outcome.report["model"]) == (True, [], None)
    assert outcome.report["made_by"].startswith("braid convert --to mcore")
    assert outcome.report["made_from"]["path"] == str(tiny_model)


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE: dict[str, tuple[Callable[[Path], Any], str, str]] = {
    # What is done -> the file, the problem.
    "a flipped bit": (lambda c: _flip(c / "__0_0.distcp"), "__0_0.distcp", "sha256"),
    "truncated": (lambda c: os.truncate(c / "__0_0.distcp", 1000), "__0_0.distcp", "size"),
    "longer": (lambda c: os.truncate(c / ".metadata", 10**5), ".metadata", "size"),
    "deleted": (lambda c: (c / "common.pt").unlink(), "common.pt", "missing"),
    "added": (lambda c: (c / "notes[red].txt").write_text("x"), "notes[red].txt", "surplus"),
    "added below": (
        lambda c: (c / "hf_companions" / "x.py").write_text(""),
        "hf_companions/x.py",
        "surplus",
    ),
    "another tokenizer": (
        lambda c: _flip(c / "hf_companions" / "tokenizer.json"),
        "hf_companions/tokenizer.json",
        "sha256",
    ),
    "a directory in place of a file": (
        lambda c: ((c / "common.pt").unlink(), (c / "common.pt").mkdir()),
        "common.pt",
        "missing",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_directory(verify: Verify, checkpoint: Path, case: str) -> None:
    damage, name, problem = DAMAGE[case]
    damage(checkpoint)
    outcome = verify("--checkpoint", checkpoint, "--manifest", "--workers", 2)
    assert (outcome.code, outcome.err) == (1, "")
    assert "NOT intact: 1 problems with 13 files" in outcome.out
    assert name in outcome.out
    assert outcome.report is not None
    assert not outcome.report["good"]
    (found,) = outcome.report["problems"]
    assert (found["name"], found["problem"]) == (name, problem)
    if problem in ("size", "sha256"):
        assert found["expected"] != found["found"] != ""


def test_several_problems_at_once(verify: Verify, checkpoint: Path) -> None:
    for damage, _, _ in (DAMAGE["a flipped bit"], DAMAGE["deleted"], DAMAGE["added"]):
        damage(checkpoint)
    outcome = verify("--checkpoint", checkpoint, "--manifest")
    assert outcome.report is not None
    assert sorted(item["problem"] for item in outcome.report["problems"]) == ["missing", "sha256", "surplus"]


def test_a_manifest_that_cannot_be_read(verify: Verify, checkpoint: Path, tiny_model: Path) -> None:
    words = ["--checkpoint", checkpoint, "--manifest"]
    manifest = checkpoint / MANIFEST_FILE
    os.truncate(manifest, manifest.stat().st_size // 2)
    assert f"{MANIFEST_FILE} is damaged" in verify(*words).line()
    manifest.unlink()
    assert f"has no {MANIFEST_FILE}" in verify(*words).line()
    assert f"has no {MANIFEST_FILE}" in verify("--checkpoint", tiny_model, "--manifest").line()
    assert "none does not exist" in verify("--checkpoint", checkpoint / "none", "--manifest").line()


def test_a_file_that_cannot_be_read(
    verify: Verify, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root may read everything, so the disk fails by hand."""
    from engine.storage import manifest

    def fail(path: Path) -> Any:
        raise OSError(5, "Input/output error", str(path))

    monkeypatch.setattr(manifest, "hash_file", fail)
    assert "cannot be read (Input/output error)" in verify("--checkpoint", checkpoint, "--manifest").line()


def test_what_the_directory_was_made_from(
    verify: Verify, tiny_model: Path, converted: Path, model: Path, tmp_path: Path
) -> None:
    """The digest is the model's: neither the place of the files nor their format matters."""
    words = ["--checkpoint", converted, "--manifest"]
    for source in (tiny_model, model, converted):
        outcome = verify(*words, "--model", source)
        assert outcome.code == 0
        assert "\nwas made from this model: digest " in outcome.out
        assert outcome.report is not None
        assert outcome.report["model"]["is_source"]
        assert outcome.report["model"]["sha256"] == outcome.report["made_from"]["sha256"]
    edit_weights(model, lambda t: (t[UP].neg_(), t["model.norm.weight"].neg_()))
    outcome = verify(*words, "--model", model)
    assert (outcome.code, outcome.err) == (1, "")
    assert "every file is intact" in outcome.out
    assert "\nwas made from another model: digest " in outcome.out
    assert outcome.out.endswith(f"; {UP} differs (and 1 more)\n")
    assert outcome.report is not None
    assert outcome.report["model"]["differing"] == [UP, "model.norm.weight"]
    assert not outcome.report["good"]
    export = tmp_path / "hf"
    assert main(["convert", "--to", "hf", "--checkpoint", str(converted), "--output_dir", str(export)]) == 0
    for source, code in ((converted, 0), (tiny_model, 0), (model, 1)):
        assert verify("--checkpoint", export, "--manifest", "--model", source).code == code
    (model / "model.safetensors").unlink()
    assert "has neither model.safetensors nor" in verify(*words, "--model", model).line()


def test_what_was_not_made_from_a_model(verify: Verify, tiny_model: Path, tmp_path: Path) -> None:
    adapter = str(save_adapter(tiny_model, tmp_path / "adapter"))
    base = ["--model", str(tiny_model), "--adapter", adapter, "--output_dir"]
    assert main(["merge", *base, str(tmp_path / "merged")]) == 0
    assert main(["convert", "--to", "mcore", *base, str(tmp_path / "mcore")]) == 0
    for directory, how in (("merged", "a base and an adapter together"), ("mcore", "a LoRA adapter")):
        words = ["--checkpoint", tmp_path / directory, "--manifest"]
        assert verify(*words).code == 0
        line = verify(*words, "--model", tiny_model).line()
        assert f"was made from {how}, not from a model as it is; leave --model out" in line
