"""`braid chat`: talk to a trained model, or to a base with its adapter, by transformers and PEFT."""

import json
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from engine.config.parse import help_text, parse
from engine.errors import ConfigError, ModelError, first_line
from launch.record import options_text

if TYPE_CHECKING:
    from engine.model.spec import ModelSpec

_USAGE = """usage: braid chat --model DIR [--adapter DIR] [--system TEXT]

On a terminal: ask, /clear forgets the conversation, /exit or Ctrl-D leaves, Ctrl-C ends an answer. Otherwise
every line of standard input is a question of one conversation, and the answers are printed.
"""


@dataclass(kw_only=True)
class ChatOptions:
    """Flags of `braid chat`."""

    model: str | None = None
    """Hugging Face directory or id: the hf/ of a run, or with --adapter the base. An adapter directory goes
    here too; its base is then the one that it names.
    """

    adapter: str | None = None
    """Directory of a PEFT adapter."""

    system: str | None = None
    """System message."""

    max_new_tokens: int = 512
    """Longest answer, in tokens."""

    temperature: float | None = None
    """0 takes the likeliest token; default: the model's generation_config.json."""

    torch_dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Arithmetic; auto: that of the checkpoint on CUDA, float32 on CPU."""

    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Where to run; auto takes CUDA where a GPU is visible."""

    seed: int = 42
    """Of the answers that are drawn."""

    use_hf: bool | None = None
    """Look an id up at Hugging Face, or (false) at ModelScope."""

    dry_run: bool = False
    """Check the model and its tokenizer, print what would be loaded, and stop."""


def chat(argv: Sequence[str]) -> int:
    """The command: 0 when the conversation is over. Raises UserError."""
    if "--help" in argv or "-h" in argv:
        print(_USAGE + help_text(ChatOptions))
        return 0
    options, _ = parse(ChatOptions, argv)
    if options.model is None:
        raise ConfigError("no model given; pass --model DIR")
    if options.max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens must be at least 1, not {options.max_new_tokens}")
    if options.temperature is not None and not 0 <= options.temperature < float("inf"):
        raise ConfigError(f"temperature must not be negative, not {options.temperature}")
    if options.dry_run:
        return _dry_run(options)
    conversation = Conversation(options)
    for line in _lines(conversation):
        try:
            conversation.ask(line)
        except KeyboardInterrupt:
            print("\n(stopped)")
    return 0


def _dry_run(options: ChatOptions) -> int:
    model, adapter = places(options.model or "", options.adapter, use_hf=options.use_hf)
    spec, _ = description(model)
    print(options_text(vars(options)), end="")
    print(f"model: {model} ({spec.summary()})")
    if adapter is not None:
        print(f"adapter: {adapter}")
    return 0


def _lines(conversation: "Conversation") -> Iterator[str]:
    """What the user asks."""
    interactive = sys.stdin.isatty()
    while True:
        if interactive:
            print("\n> ", end="", flush=True)
        try:
            line = sys.stdin.readline()
        except KeyboardInterrupt:
            line = ""
        words = line.strip()
        if not line or words == "/exit":
            return
        if words == "/clear":
            conversation.clear()
        elif words:
            yield words


class Conversation:
    """A model, and what has been said."""

    def __init__(self, options: ChatOptions) -> None:
        import torch

        torch.manual_seed(options.seed)
        self.options = options
        model, adapter = places(options.model or "", options.adapter, use_hf=options.use_hf)
        self.model, self.tokenizer = load(
            model, adapter, torch_dtype=options.torch_dtype, device=options.device
        )
        self.messages: list[dict[str, str]] = []
        self.clear()

    def clear(self) -> None:
        """Forget what has been said."""
        system = self.options.system
        self.messages = [] if system is None else [{"role": "system", "content": system}]

    def ask(self, question: str) -> str:
        """Print the answer as it comes; an answer that is broken off is forgotten with its question."""
        from transformers import TextStreamer

        asked = [*self.messages, {"role": "user", "content": question}]
        inputs = prompts(self.tokenizer, [asked]).to(self.model.device)
        streamer = TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        settings: dict[str, Any] = {"max_new_tokens": self.options.max_new_tokens}
        if self.options.temperature is not None:
            settings["do_sample"] = self.options.temperature > 0
            settings["temperature"] = self.options.temperature or None
            if not self.options.temperature:
                settings |= {"top_p": None, "top_k": None}
        out = self.model.generate(**inputs, streamer=streamer, **settings)
        answer: str = self.tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        self.messages = [*asked, {"role": "assistant", "content": answer}]
        return answer


def places(model: str, adapter: str | None, *, use_hf: bool | None) -> tuple[str, str | None]:
    """Where the base and the adapter are; `model` may be an adapter that names its base. Raises UserError."""
    from engine.data.hub import find_model
    from engine.model.lora_spec import CONFIG_FILE, read_lora_config

    if adapter is None and (Path(model) / CONFIG_FILE).is_file():
        read_lora_config(Path(model))  # says what is wrong with it
        config = json.loads((Path(model) / CONFIG_FILE).read_text(encoding="utf-8"))
        base = config.get("base_model_name_or_path")
        if not base:
            raise ModelError(f"{model} is an adapter that names no base; pass --model BASE --adapter {model}")
        model, adapter = str(base), model
    if adapter is not None:
        read_lora_config(Path(adapter))
    return find_model(model, use_hf=use_hf), adapter


def load(
    model: str, adapter: str | None, *, torch_dtype: str = "auto", device: str = "auto"
) -> tuple[Any, Any]:
    """Model and tokenizer; words are those of `ChatOptions`. Raises UserError for what transformers or PEFT
    cannot load.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)
    _, tokenizer = description(model)
    cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    if cuda and not torch.cuda.is_available():
        raise ConfigError("device cuda: torch sees no GPU here; pass --device cpu")
    dtype = "float32" if torch_dtype == "auto" and not cuda else torch_dtype
    try:
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, local_files_only=True)
        if adapter is not None:
            loaded = _with_adapter(loaded, adapter)
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(f"{adapter or model} cannot be loaded: {first_line(error)}") from error
    return loaded.to("cuda" if cuda else "cpu").eval(), tokenizer


def description(model: str) -> tuple["ModelSpec", Any]:
    """What a directory says of its model, and its tokenizer. Raises UserError for one that cannot talk."""
    from engine.data.prepare import load_tokenizer
    from engine.model.spec import load_model_spec

    spec, tokenizer = load_model_spec(model), load_tokenizer(model)
    if tokenizer.chat_template is None:
        raise ModelError(f"the tokenizer of {model} has no chat template; take that of an Instruct model")
    return spec, tokenizer


def prompts(tokenizer: Any, conversations: Sequence[Sequence[Mapping[str, str]]]) -> Any:
    """Tokens of conversations up to the answer that is to come; shorter ones are padded on the left."""
    texts = [
        tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        for messages in conversations
    ]
    inputs = tokenizer(
        texts, return_tensors="pt", padding=len(texts) > 1, padding_side="left", add_special_tokens=False
    )
    inputs.pop("token_type_ids", None)
    return inputs


def _with_adapter(model: Any, adapter: str) -> Any:
    try:
        from peft import PeftModel
    except ImportError as error:
        raise ConfigError("an adapter needs PEFT: `pip install peft`") from error
    return PeftModel.from_pretrained(model, adapter)
